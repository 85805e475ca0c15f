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
           -> FedSynth, Distilling, DynaFed, FedSynSAM      learn synthetic data (fedsynsam.py)
           -> GradAlign, FedGA                              start displaced (align.py)
           -> FedProx, SCAFFOLD, FedDyn, FedCM, ...         correct the drift of clients (baselines.py)

What a method does on a client is a pure function of tensors, so that loop.py may run clients under `torch.func.vmap`. A client
reads its own memory and what `receive` and `unpack` made of the wire, never what the server holds.

Sources: FedAvg, McMahan et al. 2017, Algorithm 1; FedSAM, Qu et al. 2022 and Caldarola et al. 2022; FedLESAM, Fan et al. 2024.
Read next: fedsynsam.py, or loop.py for the machinery.
"""
import hashlib
from typing import NamedTuple

import torch

import sam


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


METHODS = {"fedavg": FedAvg, "fedsam": FedSAM, "fedlesam": FedLESAM, "fedlesam-server": FedLESAMServer}
