"""The federated loop, and the methods of this project, each as its difference from its parent.

    server  chooses m of N clients, sends w [d] (+ what the method adds)
    client  K local steps  w <- w - eta G(w, batch)           G is the method
            sends a BUFFER: encode(w_K - w_0)                 cost = len(buffer)
    server  decodes the buffers, averages them, moves w

Symbols: d parameters; N clients, m active in a round; K local steps; eta learning rate of the client; rho radius of SAM's
ball; `delta` is always a descent displacement (w_after - w_before), a gradient is `g`, and uphill is -delta or +g.

A method answers four questions, and a new method overrides only the answers that differ from its parent's:

    broadcast   what is sent down besides w?
    direction   which way is uphill, before the gradient is read there?   (None: read it at w)
    finish      what does a client send up, and what does it remember?
    server      how does the server move?

    FedAvg -> FedSAM            climb along the client's own gradient
           -> FedLESAM          climb back along the last global move (as the client saw it, or as the server made it)
           -> Distilling        watch the trajectory of w and distil synthetic data from it (synth.py)
                 -> DynaFed     train on them at the server
                 -> FedSynSAM   climb along a mixture of own and synthetic gradient

Everything that a client does is a pure function of tensors (`local_training`), so all clients of a round run in chunks
under `torch.func.vmap`, or one by one on a few threads, with the same numbers. All randomness comes from `generator(seed,
what, round, client)`: a run that is cut off and resumed, or spread over more workers, draws the same numbers.

Sources: FedAvg, McMahan et al. 2017, Algorithm 1; FedSAM, Qu et al. 2022 and Caldarola et al. 2022; FedLESAM, Fan et al.
2024; DynaFed, Pi et al. 2023; FedSynSAM, arXiv 2602.11584. Read next: sharpness.py.
"""
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.nn import functional as F

import compress
import data
import sam
import synth


def generator(seed, *what, device="cpu"):
    """A random generator that belongs to (seed, what...), e.g. (0, "batches", round 3, client 7): no state to carry along.

    -> torch.Generator (no tensors []).  Source: ours.
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Diverged(ArithmeticError):
    """A client's or the server's numbers stopped being finite; the message says where and why (no tensors []).  Source: ours."""


class Task:
    """What is learnt and where it lies: a loss of (w, batch), and N clients that can draw batches.

    w0 [d] initial weights, apply(w [d], x) scores, train: Images, parts: N tensors of image numbers.  A task of another
    kind (the quadratics of test_all.py) needs w0, sizes, loss and plan.  Source: ours.
    """

    def __init__(self, model, train, parts, cfg):
        self.w0, self.apply, self.train, self.parts, self.cfg = model.w0, model.apply, train, parts, cfg
        self.sizes = [len(p) for p in parts]

    def loss(self, w, rows):
        """Mean cross-entropy at w [d] of the batch rows [B, 4]; padded rows weigh nothing -> [].  Source: definition."""
        x, y, weight = self.train.batch(rows, self.cfg.augment)
        return (F.cross_entropy(self.apply(w, x), y, reduction="none") * weight).sum()

    def plan(self, client, g):
        """All batches of one client's round: -> rows [K, B, 4].  Source: data.draw_batches."""
        c = self.cfg
        return data.draw_batches(self.parts[client], c.batch, c.local_steps, c.local_epochs, g, c.augment).to(self.train.y.device)


class Client(NamedTuple):
    """What one client holds during a round: start [d] = w^t as received, memory [p, d] its own rows.  Source: ours."""
    start: torch.Tensor
    memory: torch.Tensor


# ------------------------------------------------------------------------------------------------------ the methods
class FedAvg:
    """Federated averaging: G = g_i(w), w^{t+1} = w^t + eta_g mean_i delta_i.

    w [d]; 1 gradient a step; d floats up and down; no state.  Source: McMahan et al. 2017, Algorithm 1.
    """
    memory = 0                                  # vectors [d] that a client keeps between its rounds
    uplinks = 1                                 # vectors [d] that a client sends in a round
    parcel = 0                                  # bytes that each client receives once
    vmapped = False                             # True while clients are trained under torch.func.vmap

    def __init__(self, task, cfg):
        self.task, self.cfg = task, cfg         # whatever else a method puts on itself is saved in checkpoints

    def grad_of(self, loss, w):
        """The gradient of a scalar function loss(w) at w [d] -> [d]; outside vmap plain autograd, 1.5x faster on threads.

        Source: definition.
        """
        if self.vmapped:
            return torch.func.grad(loss)(w)
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loss(w), w)[0]

    def grad(self, w, rows):
        """g(w; batch): w [d], rows of one batch -> [d].  Source: definition."""
        return self.grad_of(lambda v: self.task.loss(v, rows), w)

    def begin(self, t, w, progress=False):
        """What the server does before round t with its model w [d] -> True if clients must fetch a new parcel.  Source: ours."""

    def broadcast(self, w):
        """What the server sends in every round: w [d] first -> list of vectors; `receive` gets them decoded.  Source: ours."""
        return [w]

    def receive(self, vectors):
        """What a client keeps of the vectors beyond w (a list of [d]).  Source: ours."""

    def first_memory(self, w):
        """The rows [p, d] of a client that was never active before, given w [d].  Source: ours."""
        return w.new_zeros(self.memory, len(w))

    def direction(self, w, rows, me):
        """Which way is uphill at w [d]? -> [d], or None to stay at w.  Source: ours."""
        return None

    def gradient(self, w, rows, me):
        """G: the gradient at the rim of SAM's ball (or at w if direction is None) -> [d].  Source: Foret et al. 2021, eq. (3)."""
        return sam.sam_gradient(lambda v: self.grad(v, rows), w, self.direction(w, rows, me), self.cfg.rho)

    def step(self, w, rows, me, lr):
        """One local step, in this order: clip G, add weight decay, move.  w [d] -> (w [d], me).  Source: FL-Simulator's code."""
        g = self.gradient(w, rows, me)
        if self.cfg.clip:
            g = g * (self.cfg.clip / g.norm().clamp_min(self.cfg.clip))
        return w - lr * (g + self.cfg.weight_decay * w), me

    def finish(self, w, me, steps, lr):
        """After K steps: w [d] -> (vectors to send [uplinks, d], memory to keep [p, d]).  Source: ours."""
        return (w - me.start)[None], me.memory

    def server(self, w, mean):
        """w^{t+1} from w^t [d] and the mean of what was decoded, mean [uplinks, d] -> [d].  Source: McMahan et al. 2017."""
        return w + self.cfg.server_lr * mean[0]


class FedSAM(FedAvg):
    """FedAvg, except: the gradient is read at the rim, uphill of this client's OWN loss: u = g_i(w).

    w [d]; 2 gradients a step; d floats up and down; no state.  Source: Qu et al. 2022; Caldarola et al. 2022.
    """

    def direction(self, w, rows, me):
        return self.grad(w, rows)


class FedLESAM(FedAvg):
    """FedAvg, except: uphill is back to the global model this client last saw: u = w_i^old - w^t, fixed for the round.

    w [d]; 1 gradient a step; d floats up and down; the client keeps w_i^old [1, d]. At its first round u = 0, plain SGD.
    One global l2 norm (the released code divides by a sum of layer norms and indexes a flat vector by layer).
    Source: Fan et al. 2024 (FedLESAM), the paper's rule.
    """
    memory = 1

    def first_memory(self, w):
        return w[None]

    def direction(self, w, rows, me):
        return me.memory[0] - me.start

    def finish(self, w, me, steps, lr):
        return super().finish(w, me, steps, lr)[0], me.start[None]


class FedLESAMServer(FedAvg):
    """FedAvg, except: uphill is against the server's last move: u = w^{t-1} - w^t, the same for all clients.

    w [d]; 1 gradient a step; d floats up, 2 d down; the server keeps its last move [d]. In round 0 u = 0, plain SGD.
    Source: Fan et al. 2024 (FedLESAM), the idea of the released code with the norm of the paper.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.move = self.uphill = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.move]

    def receive(self, vectors):
        self.uphill = -vectors[0]

    def direction(self, w, rows, me):
        return self.uphill

    def server(self, w, mean):
        self.move = super().server(w, mean) - w
        return w + self.move


class Distilling(FedAvg):
    """FedAvg, except: the server keeps w^0 ... w^{T_w} and distils a synthetic data set from them before round T_w.

    w [d]; client as FedAvg; the server keeps T_w + 1 snapshots [d] and D_syn (synth.Synthetic), learnt once, or anew every
    `resynthesize` rounds from the latest T_w + 1 snapshots.  Source: Pi et al. 2023 (DynaFed), Algorithm 1.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.trajectory, self.synthetic, self.matching = [], None, []      # matching: L_TM of every outer step

    def begin(self, t, w, progress=False):
        c, late = self.cfg, t - self.cfg.warmup
        if late <= 0 or c.resynthesize:
            self.trajectory = [*self.trajectory, w][-(c.warmup + 1):]
        if late == 0 or late > 0 and c.resynthesize and late % c.resynthesize == 0:
            g = generator(c.seed, "synthesis", t)
            x = self.task.train.x
            guess = synth.first_guess(c.ipc, len(self.task.train.classes), x.shape[1:], c.syn_labels, c.syn_step, g, w)
            self.synthetic, self.matching = synth.distill(
                self.task.apply, self.trajectory, guess, g, c.outer_steps, c.inner_steps, c.window, c.average_targets,
                c.rate_images, c.rate_labels, c.rate_step, c.syn_augment, progress)
            return True


class DynaFed(Distilling):
    """Distilling, except: after every average the server trains the model on D_syn, `finetune_epochs` epochs of Adam.

    w [d]; client and traffic as FedAvg; server work: finetune_epochs x (images / finetune_batch) gradients a round.
    Source: Pi et al. 2023 (DynaFed), released code; its client keeps Adam state, ours is plain SGD like every method here.
    """

    def server(self, w, mean):
        w = super().server(w, mean)
        if self.synthetic is None:
            return w
        images, logits, _ = self.synthetic
        v = w.clone().requires_grad_()
        adam = torch.optim.Adam([v], lr=self.cfg.finetune_lr)          # a new one every round, as in the released code
        for _ in range(self.cfg.finetune_epochs):
            for x, y in zip(images.split(self.cfg.finetune_batch), logits.split(self.cfg.finetune_batch)):
                v.grad, = torch.autograd.grad(synth.soft_cross_entropy(self.task.apply(v, x), y), v)
                adam.step()
        return v.detach()


class FedSynSAM(Distilling):
    """Distilling, except: clients climb along a mixture of their own gradient and the gradient on D_syn.

        u = (1 - mix) g_i(w) + mix g_syn(w)         eps = rho u / ||u||         w <- w - eta g_i(w + eps)

    w [d]; 3 gradients a step (2 if mix is 0 or 1, or with one synthetic gradient a round); d floats up and down, and D_syn
    once to each client. Before round T_w: FedSAM, or FedAvg with warmup_method = "fedavg".
    Source: arXiv 2602.11584, abstract; the mixture and every knob are this project's choice (config.py marks them).
    """

    def begin(self, t, w, progress=False):
        if super().begin(t, w, progress):                 # the clients work with what came through the wire
            wire, (images, logits, step) = compress.Identity(w.dtype), self.synthetic
            buffer = wire.encode(torch.cat([images.flatten(), logits.flatten()]))
            x, y = wire.decode(buffer, images.numel() + logits.numel()).split([images.numel(), logits.numel()])
            self.synthetic, self.parcel = synth.Synthetic(x.view_as(images), y.view_as(logits), step), len(buffer)
            return True

    def direction(self, w, rows, me):
        c = self.cfg
        if self.synthetic is None:
            return self.grad(w, rows) if c.warmup_method == "fedsam" else None
        if c.mix == 0:
            return self.grad(w, rows)
        where = w if c.syn_gradient == "step" else me.start
        uphill = self.grad_of(lambda v: synth.synthetic_loss(self.task.apply, v, self.synthetic), where)
        return uphill if c.mix == 1 else sam.mix_directions(self.grad(w, rows), uphill, c.mix, c.mix_units)


METHODS = {"fedavg": FedAvg, "fedsam": FedSAM, "fedlesam": FedLESAM, "fedlesam-server": FedLESAMServer,
           "dynafed": DynaFed, "fedsynsam": FedSynSAM}


# --------------------------------------------------------------------------------------------------------- the loop
def local_training(method, w, memory, plan, lr):
    """One client's round, the pure function that is vmapped: K steps from w [d] with its memory [p, d] and plan [K, B, ...].

    A step whose batch is all padding changes nothing: clients with fewer steps wait for the others of their chunk.
    -> (vectors to send [uplinks, d], memory to keep [p, d]).  Source: McMahan et al. 2017, Algorithm 1, ClientUpdate.
    """
    me, alive = Client(w, memory), (plan[..., 0] >= 0).any(1).to(w.dtype)
    for k in range(len(plan)):
        w, me = method.step(w, plan[k], me, lr * alive[k])
    return method.finish(w, me, alive.sum(), lr)


class Memory:
    """Rows [p, d] for every client that was ever active, in one tensor [clients seen, p, d] that grows by doubling.

    Source: ours.
    """

    def __init__(self, rows, like):
        self.table, self.slot = like.new_zeros(0, rows, len(like)), {}

    def read(self, clients, default):
        """-> [m, p, d]; a client never seen has `default` [p, d].  Source: ours."""
        return torch.stack([self.table[self.slot[i]] if i in self.slot else default for i in clients])

    def write(self, clients, rows):
        """Keep rows [m, p, d].  Source: ours."""
        for i in clients:
            self.slot.setdefault(i, len(self.slot))
        if len(self.slot) > len(self.table):
            more = self.table.new_zeros(max(len(self.slot) - len(self.table), len(self.table)), *self.table.shape[1:])
            self.table = torch.cat([self.table, more])
        self.table[[self.slot[i] for i in clients]] = rows


class Federation:
    """The state of a run between two rounds: w [d], round t, the method's and the clients' memory, bytes up and down.

    Source: McMahan et al. 2017, Algorithm 1, Server executes.
    """

    def __init__(self, task, cfg, compressor=compress.Identity(), workers=1, chunk=1):
        self.task, self.cfg, self.compressor, self.chunk = task, cfg, compressor, chunk
        self.method = METHODS[cfg.algo](task, cfg)
        self.w, self.t, self.up, self.down = task.w0.clone(), 0, 0, 0
        self.move = torch.zeros_like(task.w0)                        # w^t - w^{t-1}
        self.wire = compress.Identity(task.w0.dtype)                 # the downlink is not compressed
        self.residuals = self.method.uplinks if cfg.error_feedback else 0
        self.memory = Memory(self.method.memory + self.residuals, task.w0)
        self.holders = set()                                         # clients that have the method's parcel
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def clients(self, t):
        """The m clients of round t, without replacement -> sorted list (no tensors []).  Source: McMahan et al. 2017."""
        order = torch.randperm(len(self.task.sizes), generator=generator(self.cfg.seed, "clients", t))
        return sorted(order[:self.cfg.participation].tolist())

    def lr(self, t):
        """eta of round t (a number, no tensors []).  Source: FL-Simulator's code, lr * decay^t."""
        return self.cfg.lr * self.cfg.lr_decay ** t

    def plans(self, clients, t):
        """The batches of round t: -> one tensor [K_i, B, ...] per client.  Source: data.draw_batches."""
        return [self.task.plan(i, generator(self.cfg.seed, "batches", t, i)) for i in clients]

    def train(self, w, clients, plans, t):
        """All local training of round t from w [d] -> what is sent [m, uplinks, d], and the clients' memory after it [m, p, d].

        One client after the other on `workers` threads (chunk = 1), or `chunk` clients at a time under vmap.  Source: ours.
        """
        memory = self.memory.read(clients, torch.cat([self.method.first_memory(w), w.new_zeros(self.residuals, len(w))]))
        own, lr = memory[:, :self.method.memory], self.lr(t)
        if self.chunk == 1:
            done = list(self.pool.map(lambda c: local_training(self.method, w, own[c], plans[c], lr), range(len(clients))))
            sent, kept = (torch.stack(column) for column in zip(*done))
        else:
            K = max(map(len, plans))
            padded = torch.stack([F.pad(p, (0, 0) * (p.dim() - 1) + (0, K - len(p)), value=-1) for p in plans])
            train = torch.func.vmap(lambda m, p: local_training(self.method, w, m, p, lr))
            self.method.vmapped = True
            done = [train(own[c:c + self.chunk], padded[c:c + self.chunk]) for c in range(0, len(clients), self.chunk)]
            self.method.vmapped = False
            sent, kept = (torch.cat(column) for column in zip(*done))
        return sent, torch.cat([kept, memory[:, self.method.memory:]], 1)

    def uplink(self, client, x, e, t, part):
        """One vector through the wire: x [d], residual e [d] or None -> (decoded [d], new e).  Adds to `up`.  Source: ours."""
        g = generator(self.cfg.seed, "compressor", t, client, part, device=x.device)
        if e is None:
            buffer = self.compressor.encode(x, g)
        else:
            buffer, e = compress.with_feedback(self.compressor, x, e, g)
        self.up += len(buffer)
        return self.compressor.decode(buffer, len(x)).to(x.dtype), e

    def downlink(self, vectors, m):
        """A list of vectors [d] through the wire to m clients -> decoded list.  Adds to `down`.  Source: ours."""
        buffers = [self.wire.encode(v) for v in vectors]
        self.down += m * sum(map(len, buffers))
        return [self.wire.decode(b, len(v)) for b, v in zip(buffers, vectors)]

    def round(self, progress=False):
        """One round: w^t [d] -> w^{t+1} [d]; returns True if the server synthesised data in it.

        Raises Diverged if a number is not finite.  Source: this file's card.
        """
        t, method, clients = self.t, self.method, self.clients(self.t)
        synthesised = method.begin(t, self.w, progress)
        if synthesised:
            self.holders = set()
        w, *extra = self.downlink(method.broadcast(self.w), len(clients))
        method.receive(extra)
        self.down += method.parcel * len(set(clients) - self.holders)
        self.holders |= set(clients)

        sent, kept = self.train(w, clients, self.plans(clients, t), t)
        for i, vectors in zip(clients, sent):
            if not vectors.isfinite().all():
                raise Diverged(f"round {t + 1}, client {i}: the update is not finite. Likely cause: lr = {self.lr(t):g} is too "
                               f"large for this model and batch" + ("" if self.cfg.clip else ", and clip = 0 lets gradients grow"))
        size = torch.tensor([self.task.sizes[i] if self.cfg.average == "size" else 1 for i in clients], dtype=torch.float64)
        mean = torch.zeros_like(sent[0])
        for c, i in enumerate(clients):                              # in a fixed order: the sum is the same every time
            for j in range(method.uplinks):
                e = kept[c, method.memory + j] if self.residuals else None
                x_hat, e = self.uplink(i, sent[c, j], e, t, j)
                mean[j] += float(size[c] / size.sum()) * x_hat
                if self.residuals:
                    kept[c, method.memory + j] = e
        if kept.shape[1]:
            self.memory.write(clients, kept)
        new = method.server(self.w, mean)
        if not new.isfinite().all():
            raise Diverged(f"round {t + 1}, server: the model is not finite. Likely cause: server_lr = {self.cfg.server_lr:g} or the "
                           f"compressor's error is too large")
        self.move, self.w, self.t = new - self.w, new, t + 1
        return bool(synthesised)


def evaluate(apply, w, images, chunk=1000):
    """Mean cross-entropy and accuracy of w [d] on all images -> (loss, accuracy in 0..1).  Source: definition."""
    loss = right = 0.0
    with torch.no_grad():
        for x, y, _ in images.chunks(chunk):
            scores = apply(w, x)
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
            right += int((scores.argmax(1) == y).sum())
    return loss / len(images.y), right / len(images.y)


def full_gradient(apply, w, images, rows, chunk=500):
    """The gradient at w [d] of the mean cross-entropy over the images numbered in rows [n] -> [d].  Source: definition."""
    part = torch.func.grad(lambda v, b: F.cross_entropy(apply(v, b.x), b.y, reduction="sum"))
    return sum(part(w, b) for b in images.chunks(chunk, rows)) / len(rows)


def alignment(fed, rows, mix=0.5):
    """How well does each estimate of "uphill" agree with the true global gradient, at the clients' own last points?

    The clients of the coming round walk K - 1 steps from w^t; at the point [d] each of them reaches, the cosine of its own
    mini-batch gradient, of minus the last global move, and (if there is one) of the synthetic gradient and the mixture,
    to the gradient over the training images `rows` [n].  -> one NamedTuple of means over the clients.
    Source: the claim of FedSynSAM's abstract; the measure is ours.
    """
    task, method, clients = fed.task, fed.method, fed.clients(fed.t)
    synthetic = getattr(method, "synthetic", None)
    plans = fed.plans(clients, fed.t)
    sent, _ = fed.train(fed.w, clients, [p[:-1] for p in plans], fed.t)

    def measure(c):
        w = fed.w + sent[c, 0]
        true, own = full_gradient(task.apply, w, task.train, rows), method.grad(w, plans[c][-1])
        cos = [sam.cosine(u, true) for u in (own, -fed.move)]
        if synthetic is None:
            return cos + [float("nan")] * 2
        g = method.grad_of(lambda v: synth.synthetic_loss(task.apply, v, synthetic), w)
        return cos + [sam.cosine(u, true) for u in (g, sam.mix_directions(own, g, mix, fed.cfg.mix_units))]
    return Alignment(*torch.tensor(list(fed.pool.map(measure, range(len(clients))))).mean(0).tolist())


class Alignment(NamedTuple):
    """Cosines in -1..1 to the true global gradient (means over clients; nan: not available; no tensors []).  Source: ours."""
    own: float
    last_move: float
    synthetic: float
    mixed: float
