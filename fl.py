"""Federated learning: the loop, and the main methods as differences from FedAvg.

    server   sends the model w^t [d] to m of the N clients
    client   makes K local steps  w <- w - lr G  from w^t, and sends its update w_K - w^t as bytes
    server   w^{t+1} = w^t + server_lr * (mean of the decoded updates)

In code, with a compressor (compress.py) and the loss of a client on a batch, a round of FedAvg is,
but for clipping and error feedback,

    updates = []
    for i in chosen_clients:
        w_i = w
        for batch in batches_of(i):
            w_i = w_i - lr * autograd(lambda v: loss(v, batch), w_i)
        buffer = compressor.encode(w_i - w)
        updates.append(compressor.decode(buffer, d))
    w = w + server_lr * torch.stack(updates).mean(0)

Every client i has its own loss F_i; the goal is the minimum of their mean F. During the K steps a
client moves towards the minimum of F_i instead: it drifts. A method is FedAvg with some of its
hooks changed. A hook is a function that the loop calls; here they are in the order of a round:

    server   first_state      what it keeps, before round 0
             prepare          its work before a round
             broadcast        what every client receives
             broadcast_once   what it receives in addition, but downloads only once
    client   first_memory     what it remembers, before its first round
             start            where its steps begin
    K times  direction        SAM methods only: the ascent direction u                    (sam.py)
             point            where the gradient g is computed; a SAM method goes to w + e
             correct          makes G of g; SCAFFOLD: g + c - c_i. Then G is clipped
             move             the step itself
    client   upload           what it sends, after the K steps
             remember         what it remembers, once it knows what the server decoded
    server   collect          what is averaged, made of the decoded upload of a client
             aggregate        the next global model
             judged           the model that is evaluated, if it is not the global one

The classes FedAvg and FedSAM below show the arguments of the hooks. Less often: `loss` (what a
client minimises), `codec` (another way to make bytes), `fed_back` (names of the vectors that error
feedback is for), and `exchanges`, for methods whose clients upload something before training, too
(methods/alignment.py). CONTRIBUTING.md has the rules for a method of your own.

Notation
    w         the global model on the server, the local one on a client                        [d]
    w^t       the global model of round t                                                      [d]
    g, G      gradient of F_i on a batch; corrected gradient, which the local step follows     [d]
    u, e      ascent direction of SAM, and its step e = rho u / ||u||                          [d]
    update    the sum of the K steps, about -K lr g: a descent direction, unlike g and u       [d]
    lr_sum    K lr: -update / lr_sum is a mean G, weight decay included; a tensor under vmap
    received  what a client got: `broadcast`, `broadcast_once`, the mean of an earlier exchange
    mine      the memory of this client; `point`, `move`, `upload` and `remember` return it, too
    decoded   what the server reads from one upload
    mean      the mean over the clients of what `collect` made of it
The last four are dicts {name: tensor}.

A task says what is learnt (vision/task.py for images; tests/toys.py has quadratics):
    w0, sizes                 first model [d]; number of images of each of the N clients
    plan(client, generator)   the batches of one round -> [K, B, 4]; a row is one image: its index,
                              and how it is shifted and flipped; or -1 four times: no image
    loss(w, batch)            mean loss over the images of batch [B, 4], 0 if there are none -> []
    steps(client)             K
    apply(w, x)               class scores of images x
and for some methods more: see vision/task.py.

Sources: FedAvg, McMahan et al. 2017, Algorithm 1. SCAFFOLD, Karimireddy et al. 2020, option II.
FedSAM, Qu et al. 2022, Caldarola et al. 2022. FedLESAM, Fan et al. 2024. DynaFed, Pi et al. 2023.
FedSynSAM, Gu et al. 2026 (arXiv 2602.11584).
"""

import hashlib
import inspect
import math
from typing import Annotated, Literal

import torch

import sam
import synth
from compress import Identity, with_feedback

# ---------------------------------------------------------------------------------- the methods


class FedAvg:
    """Federated averaging: the local step is w <- w - lr g.

    `name: Annotated[type, "meaning", lowest, highest] = default` declares a setting. Both ends are
    legal, None is no limit; run.py checks them.
    Clipping is not part of the published algorithm; without it, some clients diverge at large lr.
    """

    lr: Annotated[float, "learning rate of the local steps (CIFAR: try 0.1)", 1e-12, None] = 0.4
    lr_decay: Annotated[float, "lr is multiplied by this after every round", 1e-12, 1] = 1.0
    server_lr: Annotated[float, "step size along the mean update", 1e-12, None] = 1.0
    clip: Annotated[float, "largest norm of G; 0: no clipping", 0, None] = 10.0
    weight_decay: Annotated[float, "adds weight_decay w to the clipped G", 0, None] = 0.0

    # names of the functions that a client runs in a round: each ends with an upload, "train" last
    exchanges = ("train",)
    fed_back = ("update",)  # what error feedback is for

    def __init__(self, task, seed=0, **settings):
        self.task, self.seed = task, seed
        self.gradient_of = autograd  # scale/visits.py puts one that works under vmap in its place
        known = {name for part in type(self).__mro__ for name in inspect.get_annotations(part)}
        for name, value in settings.items():
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no setting {name}")
            setattr(self, name, value)
        self.state = self.first_state()

    # On the server.

    def first_state(self):
        """What the server keeps before round 0, and checkpoints save: {name: value}.

        A value is a tensor, a number, a text, None, or a list or dict of such values.
        """
        return {}

    def prepare(self, t, w):
        """Do the server's work before round t, with the model w [d].

        Returns True if the result of `broadcast_once` is new, so that every client must fetch it.
        """
        return False

    def broadcast(self, w):
        """What every client of the round receives: {name: tensor}, "w" [d] among them."""
        return {"w": w}

    def broadcast_once(self):
        """What a client downloads once, and again after `prepare` returned True: {name: tensor}.

        It is in `received` in every round.
        """
        return {}

    def collect(self, decoded, lr_sum):
        """What is averaged: the decoded upload of a client {name: [d]}, and tensors made of it."""
        return decoded

    def aggregate(self, w, mean, lr_sum, share):
        """The next global model [d], from w [d] and the mean of what was collected {name: tensor}.

        lr_sum is the mean over the clients of the round, weighted as `mean` is. share is their
        part of all weights (m / N, if they are equal), so share * mean is what this round adds to a
        mean over all N clients.
        """
        return w + self.server_lr * mean["update"]

    def judged(self, w):
        """The model that is evaluated when the global model is w [d]."""
        return w

    # On a client.

    def first_memory(self, received):
        """What a client remembers before its first round: {name: tensor}."""
        return {}

    def start(self, received, mine):
        """Where the local steps begin [d]."""
        return received["w"]

    def point(self, w, batch, received, mine):
        """Where the gradient is computed: (point [d], memory after this step)."""
        return w, mine

    def correct(self, g, w, received, mine):
        """The corrected gradient G [d] of the step from w [d], made from the gradient g [d]."""
        return g

    def move(self, w, G, mine, lr):
        """The local step, against G: (w [d], memory)."""
        return w - lr * (G + self.weight_decay * w), mine

    def upload(self, w, received, mine, lr_sum):
        """After the K steps: (the vectors to send {name: [d]}, memory)."""
        return {"update": w - received["w"]}, mine

    def remember(self, mine, decoded, lr_sum):
        """The memory of a client that now knows what the server decoded from its upload.

        A compressor loses something, so the server receives `decoded`, not what was sent. What the
        server and the clients both sum up (such as SCAFFOLD's c and c_i), both must sum up from
        `decoded`; otherwise the two sums drift apart. The client can decode its own message.
        """
        return mine

    # What is made of the hooks.

    def train(self, received, mine, batches, lr):
        """The local steps of a client on batches [K, B, 4]: (vectors to send, memory)."""
        w = self.start(received, mine)
        for batch in batches:
            w, mine = self.step(w, batch, received, mine, lr)
        return self.upload(w, received, mine, lr * len(batches))

    def step(self, w, batch, received, mine, lr):
        """One local step: (w [d], memory)."""
        point, mine = self.point(w, batch, received, mine)
        G = self.correct(self.gradient(point, batch), w, received, mine)
        if self.clip:
            G = G * (self.clip / G.norm().clamp_min(self.clip))
        return self.move(w, G, mine, lr)

    def gradient(self, w, batch):
        """The gradient of F_i on the batch at w [d] -> [d]."""
        return self.gradient_of(lambda v: self.loss(v, batch), w)

    def loss(self, w, batch):
        """What a client minimises: its mean loss on the batch at w [d] -> []."""
        return self.task.loss(w, batch)

    def codec(self, compressor, received, batches=None):
        """What encodes and decodes the upload. The server, which decodes, has no batches."""
        return compressor


class SCAFFOLD(FedAvg):
    """FedAvg, but G = g + c - c_i. Here c_i is the mean gradient of client i, and c that of all.

        c_i' = c_i - c - update / lr_sum              c <- c + sum over the clients (c_i' - c_i) / N

    Without clipping and weight decay, and with variate = 1, -update / lr_sum is the mean of the K
    corrected gradients g + c - c_i, so c_i' is the mean of the K gradients g. c is always the mean
    of the c_i of all N clients, weighted as `average` says.
    With variate below 1, c - c_i grows until variate (c - c_i) is the full correction: later, not
    smaller. As in Algorithm 1 both vectors are sent, although here the server could compute the
    second one from the first.
    Error feedback is for the update only. The next change of c_i starts from the decoded c_i, which
    is the one in c, and so makes good what compression did to the last change.
    """

    variate: Annotated[float, "factor of c - c_i; 0: no correction", 0, None] = 1.0

    def first_state(self):
        return super().first_state() | {"c": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(w) | {"c": self.state["c"]}

    def first_memory(self, received):
        return super().first_memory(received) | {"c_i": torch.zeros_like(received["w"])}

    def correct(self, g, w, received, mine):
        c_minus_c_i = received["c"] - mine["c_i"]
        return super().correct(g, w, received, mine) + self.variate * c_minus_c_i

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent | {"c_i_change": -received["c"] - sent["update"] / lr_sum}, mine

    def remember(self, mine, decoded, lr_sum):
        mine = super().remember(mine, decoded, lr_sum)
        return mine | {"c_i": mine["c_i"] + decoded["c_i_change"]}

    def aggregate(self, w, mean, lr_sum, share):
        w = super().aggregate(w, mean, lr_sum, share)
        self.state = self.state | {"c": self.state["c"] + share * mean["c_i_change"]}
        return w


class FedSAM(FedAvg):
    """FedAvg, but the gradient is computed at w + rho u / ||u||, where u is the gradient at w.

    Two gradients a step. u increases F_i, and may decrease F.
    """

    rho: Annotated[float, "radius of the ascent step", 0, None] = 0.1

    def direction(self, w, batch, received, mine):
        """The ascent direction u [d] at w [d]."""
        return self.gradient(w, batch)

    def point(self, w, batch, received, mine):
        u = self.direction(w, batch, received, mine)
        return sam.perturb(w, u, self.rho), mine


class FedLESAM(FedSAM):
    """FedSAM, but u = w_old - w^t, where w_old is the global model of this client's last round.

    Training should have lowered F on the way from w_old to w^t, so the way back raises it. u is the
    same in all K steps and costs no gradient. In a client's first round u = 0: no ascent.
    """

    def first_memory(self, received):
        return super().first_memory(received) | {"w_old": received["w"]}

    def direction(self, w, batch, received, mine):
        return mine["w_old"] - received["w"]

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent, mine | {"w_old": received["w"]}


class Distilling(FedAvg, synth.Synthesis):
    """FedAvg, but before round `warmup` the server learns synthetic data from w^0 ... w^warmup."""

    warmup: Annotated[int, "rounds before the synthesis", 1, None] = 10
    resynthesize: Annotated[int, "rounds between syntheses; 0: only one", 0, None] = 0

    def first_state(self):
        if self.window > self.warmup:
            raise ValueError(f"window = {self.window} is longer than the warmup = {self.warmup}")
        nothing = {"trajectory": [], "X": None, "Y": None, "matching": None}
        return super().first_state() | nothing

    def prepare(self, t, w):
        news = super().prepare(t, w)
        late = t - self.warmup  # rounds since the first synthesis
        if late <= 0 or self.resynthesize:
            trajectory = [*self.state["trajectory"], w][-(self.warmup + 1) :]
            self.state = self.state | {"trajectory": trajectory}
        again = late > 0 and self.resynthesize and late % self.resynthesize == 0
        if late == 0 or again:
            self.learn_synthetic_data(t)
            news = True
        return news

    def learn_synthetic_data(self, t):
        trajectory, generator = self.state["trajectory"], rng(self.seed, "synthesis", t)
        data, losses = synth.synthesize(self.task, trajectory, self, generator)
        last = [x for x in losses[-20:] if math.isfinite(x)]  # their mean, as L is noisy
        learnt = {"X": data.images, "Y": data.logits, "matching": sum(last) / len(last)}
        kept = trajectory if self.resynthesize else []
        self.state = self.state | learnt | {"trajectory": kept}


class DynaFed(Distilling):
    """Distilling, and the server trains every new global model on the synthetic data."""

    finetune_epochs: Annotated[int, "epochs of the server on the synthetic data", 0, None] = 20
    finetune_lr: Annotated[float, "learning rate of the server's Adam", 0, None] = 1e-4
    finetune_batch: Annotated[int, "images in a step of the server", 1, None] = 256

    def aggregate(self, w, mean, lr_sum, share):
        w = super().aggregate(w, mean, lr_sum, share)
        X, Y = self.state["X"], self.state["Y"]
        if X is None:
            return w
        epochs, lr, batch = self.finetune_epochs, self.finetune_lr, self.finetune_batch
        return synth.finetune(self.task.apply, w, X, Y, epochs, lr, batch)


class FedSynSAM(Distilling, FedSAM):
    """FedSAM, but u comes from the synthetic data, an estimate of the gradient of F.

        u = (1 - mix) g_i / ||g_i||  +  mix g_syn / ||g_syn||

    Two gradients a step; three if 0 < mix < 1. Until the synthesis it is FedAvg or FedSAM. Of the
    paper only the abstract was at hand, which does not say how to blend, or what to do before the
    synthesis: both are this project's choices.
    """

    mix: Annotated[float, "weight of the synthetic gradient in u", 0, 1] = 1.0
    warmup_method: Annotated[Literal["fedsam", "fedavg"], "before the synthesis"] = "fedavg"

    def broadcast_once(self):
        X, Y = self.state["X"], self.state["Y"]
        return super().broadcast_once() | ({} if X is None else {"X": X, "Y": Y})

    def direction(self, w, batch, received, mine):
        if "X" not in received and self.warmup_method == "fedavg":
            return torch.zeros_like(w)
        if "X" not in received or self.mix == 0:
            return super().direction(w, batch, received, mine)
        g_syn = self.synthetic_gradient(w, received)
        if self.mix == 1:
            return g_syn
        return sam.blend(super().direction(w, batch, received, mine), g_syn, self.mix)

    def synthetic_gradient(self, w, received):
        """The gradient of the loss on the synthetic images at w [d] -> [d]."""
        X, Y = received["X"], received["Y"]
        return self.gradient_of(lambda v: synth.synthetic_loss(self.task.apply, v, X, Y), w)


# ------------------------------------------------------------------------------------- the loop


class Federation:
    """The state of a run: global model w [d], round t, memories of the clients, bytes sent.

    m = participation of the N clients take part in a round. Here they are visited one after the
    other; scale/ has faster ways. Error feedback is explained in compress.py.
    """

    each = map  # how work on many clients or images is spread; scale/visits.py has one of threads

    def __init__(
        self,
        method,
        compressor,
        participation: Annotated[int, "clients per round m", 1, None] = 10,
        average: Annotated[Literal["uniform", "size"], "weights of the clients"] = "uniform",
        error_feedback: Annotated[
            Literal["auto", "on", "off"],
            "send later what compression removed; auto: for biased, contractive compressors",
        ] = "auto",
    ):
        self.method, self.task, self.compressor = method, method.task, compressor
        sizes, N = self.task.sizes, len(self.task.sizes)
        if not 1 <= participation <= N:
            legal = f"it must be in 1..{N} clients"
            raise ValueError(f"participation = {participation} is out of range; {legal}")
        self.m, self.feedback = participation, self.feeds_back(error_feedback)
        self.weights = {"uniform": [1] * len(sizes), "size": sizes}[average]
        self.w, self.t = self.task.w0.clone(), 0
        self.bytes_up, self.bytes_down = 0, 0
        self.memory = {}  # client -> {name: tensor}
        self.informed = set()  # clients that have received the latest `broadcast_once`

    def feeds_back(self, wanted):
        """Whether error feedback is used: "on", "off", or "auto". Unbiased errors need none.

        One that declares neither `unbiased` nor `contractive` counts as unbiased: "auto" means off.
        """
        vectors, compressor = self.method.fed_back, self.compressor
        contractive = getattr(compressor, "contractive", True)
        if wanted == "auto":
            return bool(vectors) and contractive and not getattr(compressor, "unbiased", True)
        if wanted not in ("on", "off"):
            raise ValueError(f"error_feedback = {wanted!r} is unknown; known: auto, on, off")
        if wanted == "on" and not contractive:
            raise ValueError(f"error_feedback needs a contractive compressor, not {compressor}")
        if wanted == "on" and not vectors:
            name = type(self.method).__name__
            raise ValueError(f"{name} has nothing for error_feedback to act on")
        return wanted == "on"

    def round(self):
        """One round: w^t becomes w^{t+1}."""
        method, lr = self.method, self.method.lr * self.method.lr_decay**self.t
        if method.prepare(self.t, self.w):
            self.informed = set()
        clients = self.choose()
        received = self.send_down(clients)
        for work in method.exchanges:
            mean = self.exchange(work, clients, received, lr)
            if work != "train":
                received = received | self.through_wire(mean, len(clients))

        weight = sum(self.weights[i] for i in clients)
        lr_sum = lr * sum(self.weights[i] * self.task.steps(i) for i in clients) / weight
        w = method.aggregate(self.w, mean, lr_sum, share=weight / sum(self.weights))
        if not w.isfinite().all():
            raise FloatingPointError(f"{self.place()}: the new global model is not finite")
        self.w, self.t = w, self.t + 1

    def judged(self):
        """The model that is evaluated [d]."""
        return self.method.judged(self.w)

    def choose(self):
        """The clients of this round: m of N, without replacement."""
        order = torch.randperm(len(self.weights), generator=self.rng("clients", self.t))
        return sorted(order[: self.m].tolist())

    def exchange(self, work, clients, received, lr):
        """The clients do their work ("train") and upload: the mean of what is collected."""
        codec = self.method.codec(self.compressor, received)
        weight = sum(self.weights[i] for i in clients)
        mean = {}  # in float64, against rounding; the order is always that of `clients`
        for i, (buffers, mine) in zip(clients, self.visits(work, clients, received, lr)):
            self.bytes_up += sum(buffer.nbytes for buffer in buffers.values())
            decoded = {n: codec.decode(b, len(self.w)).to(self.w) for n, b in buffers.items()}
            lr_sum = lr * self.task.steps(i)
            self.memory[i] = self.after_upload(work, mine, decoded, lr_sum)
            for name, x in self.method.collect(decoded, lr_sum).items():
                so_far = mean.get(name, torch.zeros_like(x, dtype=torch.float64))
                mean[name] = so_far.add(x, alpha=self.weights[i] / weight)
        return {name: x.to(self.w) for name, x in mean.items()}

    def after_upload(self, work, mine, decoded, lr_sum):
        """The memory of a client after an upload; what it sent before training is in it, too."""
        return self.method.remember(mine, decoded, lr_sum) if work == "train" else mine | decoded

    def visits(self, work, clients, received, lr):
        """The replies of all clients of the round, in order: yields (buffers, memory)."""
        for i in clients:
            yield self.visit(work, i, received, lr)

    def visit(self, work, i, received, lr):
        """Client i works and encodes what it sends: ({name: bytes}, memory)."""
        batches, mine = self.plan(work, i), self.recall(i, received)
        sent, mine = getattr(self.method, work)(received, mine, batches, lr)
        return self.encode(work, i, sent, mine, received, batches)

    def plan(self, work, i):
        """The batches of client i [K, B, 4]: drawn for training, all its images for other work."""
        if work != "train":
            return self.task.everything(i)
        return self.task.plan(i, self.rng("batches", self.t, i))

    def recall(self, i, received):
        """The memory of client i before it works: {name: tensor}."""
        if i in self.memory:
            return self.memory[i]
        mine, nothing = self.method.first_memory(received), torch.zeros_like(received["w"])
        if not self.feedback:
            return mine
        return mine | {"residual of " + name: nothing for name in self.method.fed_back}

    def encode(self, work, i, sent, mine, received, batches):
        """The vectors that client i sends {name: [d]} as bytes: ({name: bytes}, memory)."""
        codec, buffers = self.method.codec(self.compressor, received, batches), {}
        purpose = "compressor" if work == "train" else work  # other random numbers in each exchange
        for j, (name, x) in enumerate(sent.items()):
            if not x.isfinite().all():
                raise FloatingPointError(f"{self.place()}, client {i}: its {name} is not finite")
            generator = self.rng(purpose, self.t, i, j, device=x.device)
            if self.feedback and name in self.method.fed_back:
                residual = mine["residual of " + name]
                buffers[name], residual = with_feedback(codec, x, residual, generator)
                mine = mine | {"residual of " + name: residual}
            else:
                buffers[name] = codec.encode(x, generator)
        return buffers, mine

    def send_down(self, clients):
        """What the clients of the round hold after the download: {name: tensor}.

        All of them hold `broadcast_once`, but only those who fetch it now cost bytes for it.
        """
        newcomers = set(clients) - self.informed
        self.informed |= newcomers
        always = self.through_wire(self.method.broadcast(self.w), len(clients))
        once = self.through_wire(self.method.broadcast_once(), len(newcomers))
        return always | once

    def through_wire(self, tensors, receivers):
        """Tensors as they arrive; their bytes are counted. What goes down is not compressed."""
        arrived = {}
        for name, x in tensors.items():
            wire = Identity(x.dtype)
            buffer = wire.encode(x.flatten())
            self.bytes_down += len(buffer) * receivers
            arrived[name] = wire.decode(buffer, x.numel()).view_as(x)
        return arrived

    def place(self):
        """Where the run is, for an error: large weights say that it diverged in earlier rounds."""
        return f"round {self.t} (|w_j| up to {self.w.abs().max():.2g} at its start)"

    def rng(self, *purpose, device="cpu"):
        return rng(self.method.seed, *purpose, device=device)


# -------------------------------------------------------------------------------------- helpers


def autograd(loss, w):
    """The gradient of loss(w) at w [d] -> [d]."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def rng(seed, *purpose, device="cpu"):
    """A random generator for one purpose only, such as rng(0, "batches", round, client).

    So a run continues without saved generators, and the order of the work does not matter.
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)  # below 2^63
