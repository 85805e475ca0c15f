"""The methods: FedAvg, and each other one as its difference from its parent.

A client does K local steps w <- w - eta G(w, batch) from the global model w^t [d] and sends w_K - w^t; the server averages
what arrives and moves. G and a few details are the method; the machinery around them, one for all, is loop.py.

Symbols: d parameters; N clients, m active in a round; K local steps; eta learning rate of the client; rho radius of SAM's
ball; `delta` is always a descent displacement (w_after - w_before), a gradient is `g`, and uphill is -delta or +g.

A method answers six questions, and a new method overrides only the answers that differ from its parent's:

    broadcast   what is sent down besides w?                              (`receive`: what a client makes of it)
    start       where does a client begin to walk?                        (at the w it received)
    direction   which way is uphill, before the gradient is read there?   (None: read it at w)
    gradient    what corrects the gradient?
    finish      what does a client send up, and what does it remember?    (`remember`: once it knows what the server decoded)
    codec       how does it become a buffer, and a vector again?          (the run's compressor)
    server      how does the server move?

    FedAvg -> FedSAM            climb along the client's own gradient
           -> FedLESAM          climb back along the last global move (as the client saw it, or as the server made it)
           -> FedSynth          send data instead of an update (synth.py): a compressor that learns
           -> Distilling        watch the trajectory of w and distil synthetic data from it (synth.py)
                 -> DynaFed     train on them at the server
                 -> FedSynSAM   climb along a mixture of own and synthetic gradient

What a method does on a client is a pure function of tensors, so that loop.py may run clients under `torch.func.vmap`. A client
reads its own memory and what `receive` and `unpack` made of the wire, never what the server holds.

Sources: FedAvg, McMahan et al. 2017, Algorithm 1; FedSAM, Qu et al. 2022 and Caldarola et al. 2022; FedLESAM, Fan et al.
2024; DynaFed, Pi et al. 2023; FedSynth, Hu et al. 2022; FedSynSAM, arXiv 2602.11584. Read next: loop.py, or baselines.py for the other methods of the
literature (SCAFFOLD, FedDyn, FedCM, ...) and their crossings with these.
"""
import hashlib
from typing import NamedTuple

import torch

import sam
import synth


def generator(seed, *what, device="cpu"):
    """A random generator that belongs to (seed, what...), e.g. (0, "batches", round 3, client 7): no state to carry along.

    -> torch.Generator.  Source: ours.
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Client(NamedTuple):
    """What one client holds during a round: start [d] = w^t as received, memory [p, d] its own rows, said [s, d]: see `survey`.  Source: ours."""
    start: torch.Tensor
    memory: torch.Tensor
    said: torch.Tensor = None


# ------------------------------------------------------------------------------------------------------ the methods
class FedAvg:
    """Federated averaging: G = g_i(w), w^{t+1} = w^t + eta_g mean_i delta_i.

    w [d]; 1 gradient a step; d floats up and down; no state.  Source: McMahan et al. 2017, Algorithm 1.
    """
    memory = 0                                  # vectors [d] that a client keeps between its rounds
    uplinks = 1                                 # vectors [d] that a client sends in a round, after its steps
    surveys = 0                                 # vectors [d] that a client sends in a round, before its steps (align.py)
    gradients = 1                               # gradients that a client computes in a local step, for `run.py --list`
    reports = ()                                # names of the numbers that `report` says
    functional = False                          # True where torch.func must take the gradients: under vmap and torch.compile

    def __init__(self, task, cfg):
        self.task, self.cfg = task, cfg         # whatever else a method puts on itself is saved in checkpoints

    def grad_of(self, loss, w):
        """The gradient of a scalar function loss(w) at w [d] -> [d]; plain autograd, 1.5x faster on threads, where it may be.

        Source: definition.
        """
        if self.functional:
            return torch.func.grad(loss)(w)
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loss(w), w)[0]

    def grad(self, w, rows):
        """g(w; batch): w [d], rows of one batch -> [d].  Source: definition."""
        return self.grad_of(lambda v: self.task.loss(v, rows), w)

    def begin(self, t, w, progress=False):
        """What the server does before round t with its model w [d] -> True if there is a new parcel.  Source: ours."""

    def parcel(self):
        """What each client fetches once, when there is a new one: -> list of tensors [...].  Source: ours."""
        return []

    def unpack(self, tensors):
        """What the clients make of a parcel, its tensors [...] as they came through the wire.  Source: ours."""

    def broadcast(self, w):
        """What the server sends in every round: w [d] first -> list of vectors [d].  Source: ours."""
        return [w]

    def receive(self, w, extra):
        """What a client makes of w [d] and the other vectors [d] as they came through the wire, before its steps.  Source: ours."""

    def first_memory(self, w):
        """The rows [p, d] of a client that was never active before, given w [d].  Source: ours."""
        return w.new_zeros(self.memory, len(w))

    def survey(self, w, everything):
        """What a client sends before it trains, given w [d] and all its images in batches [n, B, 4] -> [surveys, d].  Source: ours."""

    def hear(self, mean):
        """What a client makes of the mean [surveys, d] of all active clients' answers, as it came down the wire.  Source: ours."""

    def start(self, w, me):
        """Where a client begins, given w [d] as received -> [d].  Source: ours."""
        return w

    def direction(self, w, rows, me):
        """Which way is uphill at w [d]? -> [d], or None to stay at w.  Source: ours."""
        return None

    def gradient(self, w, rows, me, uphill):
        """G: the gradient at the rim of SAM's ball (at w if uphill [d] is None) -> [d].  Source: Foret et al. 2021, eq. (3)."""
        return sam.sam_gradient(lambda v: self.grad(v, rows), w, uphill, self.cfg.rho)

    def slope(self, w, rows, me, uphill):
        """What the client's optimizer gets at w [d]: G, clipped, and only then weight decay added -> [d].  Source: FL-Simulator's code."""
        g = self.gradient(w, rows, me, uphill)
        if self.cfg.clip:
            g = g * (self.cfg.clip / g.norm().clamp_min(self.cfg.clip))
        if self.cfg.weight_decay:
            g = g + self.cfg.weight_decay * w
        return g

    def step(self, w, rows, me, lr, uphill):
        """One local step: w [d] -> (w [d], me).  A padded step has lr = 0 and must change nothing.  Source: McMahan et al. 2017."""
        return w - lr * self.slope(w, rows, me, uphill), me

    def finish(self, w, me, steps, lr):
        """After K steps: w [d] -> (vectors to send [uplinks, d], memory to keep [p, d]).  Source: ours."""
        return (w - me.start)[None], me.memory

    def codec(self, compressor, w, plan=None):
        """How a vector [d] becomes a buffer, and a buffer x_hat [d]: -> an object with encode and decode (compress.py).

        w [d] as received, plan [K, B, 4] of the round's batches, which only encode may use: the server has none.  Source: ours.
        """
        return compressor

    def remember(self, memory, decoded):
        """Memory [p, d] once the client knows what the server made of its message, decoded [uplinks, d] -> [p, d].

        A client can decode its own buffer. What server and client both add up must be added up from the SAME numbers, or
        the errors of the compressor pile up between the two for ever.  Source: ours.
        """
        return memory

    def server(self, w, mean, steps, lr):
        """w^{t+1} from w^t [d] and the mean of what was decoded, mean [uplinks, d], after `steps` local steps in the mean -> [d].

        Source: McMahan et al. 2017.
        """
        return w + self.cfg.server_lr * mean[0]

    def report(self, said, kept, weights):
        """Numbers for the log, one for each of `reports`, from decoded answers said [m, s, d], memory kept [m, p, d], weights [m].  Source: ours."""
        return []


class FedSAM(FedAvg):
    """FedAvg, except: the gradient is read at the rim, uphill of this client's OWN loss: u = g_i(w).

    w [d]; 2 gradients a step; d floats up and down; no state.  Source: Qu et al. 2022; Caldarola et al. 2022.
    """
    gradients = 2

    def direction(self, w, rows, me):
        return self.grad(w, rows)


class FedLESAM(FedAvg):
    """FedAvg, except: uphill is back to the global model this client last saw: u = w_i^old - w^t, fixed for the round.

    w [d]; 1 gradient a step; d floats up and down; the client keeps w_i^old [d], its last row. At its first round u = 0,
    plain SGD. One global l2 norm (the released code divides by a sum of layer norms and indexes a flat vector by layer).
    Source: Fan et al. 2024 (FedLESAM), the paper's rule.
    """
    memory = 1

    def first_memory(self, w):
        return torch.cat([super().first_memory(w)[1:], w[None]])

    def direction(self, w, rows, me):
        return me.memory[-1] - me.start

    def finish(self, w, me, steps, lr):
        sent, memory = super().finish(w, me, steps, lr)
        return sent, torch.cat([memory[:-1], me.start[None]])


class FedLESAMServer(FedAvg):
    """FedAvg, except: uphill is against the server's last move: u = w^{t-1} - w^t, the same for all clients.

    w [d]; 1 gradient a step; d floats up, 2 d down; the server keeps its last move [d]. In round 0 u = 0, plain SGD.
    Source: Fan et al. 2024 (FedLESAM), the idea of the released code with the norm of the paper.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.move = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.move]

    def receive(self, w, extra):
        self.uphill = -extra[0]

    def direction(self, w, rows, me):
        return self.uphill

    def server(self, w, mean, steps, lr):
        self.move = super().server(w, mean, steps, lr) - w
        return w + self.move


class FedSynth(FedAvg):
    """FedAvg, except: a client sends a small synthetic data set, and the server trains on it to see what the update is.

        theta_0 = w^t     theta_j = theta_{j-1} - a grad l(theta_{j-1}; X_j, Y_j), j = 1..M     x_hat = theta_M - w^t
        X, Y, a are learnt to make F_i(theta_M) small on the round's real mini-batches     (fs_objective = "data", the paper's)
        or ||theta_M - w_{i,K}||^2 small, after K local steps                              (fs_objective = "update")

    w [d]; 0 gradients a step, no local steps with "data" (1 gradient with "update"); to learn X, Y, a instead S M gradients of
    gradients a round (and S of F_i with "data"); D_syn up, of a size that knows no d, so `compress` is not used; d floats down; no
    state; server work: M gradients a client. Nothing keeps images that are learnt from looking like the client's own.
    Source: Hu et al. 2022 (FedSynth), of which the abstract was at hand; "update", Goetz and Tewari 2020.
    """
    gradients = 0

    def codec(self, compressor, w, plan=None):
        c, train, learnt = self.cfg, self.task.train, {}
        if plan is not None:
            own = train.y[plan[..., 0][plan[..., 0] >= 0]]
            learnt["first"] = own.repeat(-(-c.fs_batches * c.fs_images // len(own)))[:c.fs_batches * c.fs_images]
            learnt["real"] = (lambda v, s: self.task.loss(v, plan[s % len(plan)])) if c.fs_objective == "data" else None
        return synth.AsData(self.task.apply, w, (c.fs_batches, c.fs_images, *train.x.shape[1:]), len(train.classes), c.fs_format, **learnt,
                            steps=c.fs_steps, rates=(c.fs_rate_images, c.fs_rate_labels, c.fs_rate_step), step=c.fs_step,
                            label_scale=c.fs_labels, dtype=w.dtype)

    def step(self, w, rows, me, lr, uphill):
        return (w, me) if self.cfg.fs_objective == "data" else super().step(w, rows, me, lr, uphill)


class Distilling(FedAvg):
    """FedAvg, except: the server keeps w^0 ... w^{T_w} and distils a synthetic data set from them before round T_w.

    w [d]; client as FedAvg; the server keeps T_w + 1 snapshots [d] and D_syn (synth.Synthetic), learnt once, or anew every
    `resynthesize` rounds from the latest T_w + 1 snapshots.  Source: Pi et al. 2023 (DynaFed), released code.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.trajectory, self.synthetic, self.matching = [], None, []      # matching: L_TM of every outer step

    def begin(self, t, w, progress=False):
        c, late = self.cfg, t - self.cfg.warmup
        if late <= 0 or c.resynthesize:
            self.trajectory = [*self.trajectory, w][-(c.warmup + 1):]
        if late == 0 or late > 0 and c.resynthesize and late % c.resynthesize == 0:
            shape, classes = self.task.train.x.shape[1:], len(self.task.train.classes)
            self.synthetic, self.matching = synth.distill_as_set(
                self.task.apply, self.trajectory, shape, classes, c, generator(c.seed, "synthesis", t), progress)
            self.trajectory = self.trajectory if c.resynthesize else []        # done with: it need not sit in every checkpoint
            return True


class DynaFed(Distilling):
    """Distilling, except: after every average the server trains the model on D_syn, `finetune_epochs` epochs of Adam.

    w [d]; client and traffic as FedAvg; server work: finetune_epochs x (images / finetune_batch) gradients a round.
    Source: Pi et al. 2023 (DynaFed), released code; its client keeps Adam state and its server augments D_syn, ours does not.
    """

    def server(self, w, mean, steps, lr):
        w = super().server(w, mean, steps, lr)
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

    w [d]; 3 gradients a step (2 if mix is 0 or 1); with syn_gradient = "round", g_syn(w^t) once a round instead, so 2 (or 1 if
    mix is 1); d floats up and down, and D_syn once to each client. Before round T_w: FedSAM or FedAvg (warmup_method), so it is
    FedSAM throughout if mix = 0 and warmup_method = "fedsam".
    Source: arXiv 2602.11584, abstract; the mixture and every knob are this project's choice (config.py marks them).
    """
    gradients = 3

    def parcel(self):
        return self.synthetic[:2]                       # images and label logits

    def unpack(self, tensors):
        self.synthetic = synth.Synthetic(*tensors, self.synthetic.step if self.synthetic else None)     # the server keeps the step size

    def receive(self, w, extra):
        self.uphill = self.g_syn(w) if self.synthetic and self.cfg.syn_gradient == "round" else None

    def g_syn(self, w):
        """The gradient of the synthetic loss at w [d] -> [d].  Source: our reading of arXiv 2602.11584."""
        return self.grad_of(lambda v: synth.synthetic_loss(self.task.apply, v, self.synthetic), w)

    def direction(self, w, rows, me):
        c = self.cfg
        if self.synthetic is None and c.warmup_method == "fedavg":
            return None
        if self.synthetic is None or c.mix == 0:
            return self.grad(w, rows)
        uphill = self.g_syn(w) if c.syn_gradient == "step" else self.uphill
        return uphill if c.mix == 1 else sam.mix_directions(self.grad(w, rows), uphill, c.mix, c.mix_units)


METHODS = {"fedavg": FedAvg, "fedsam": FedSAM, "fedlesam": FedLESAM, "fedlesam-server": FedLESAMServer, "fedsynth": FedSynth,
           "dynafed": DynaFed, "fedsynsam": FedSynSAM}
