"""The methods of the literature around the mission's own, each as its difference from its parent, in the form of fl.py.

Two ideas, and their crossings. A BASE corrects the drift of clients whose data differ: it changes what is added to the gradient
and what the server does. A DIRECTION says where to climb before the gradient is read (sam.py). They touch different questions
of fl.py, so a crossing is a class with two parents and nothing in it: Python asks the left one first, then the right one.

    base \\ direction           none              own gradient         model last seen      mixed with synthetic
    FedAvg                     FedAvg            FedSAM, FedASAM,     FedLESAM             FedSynSAM
                                                 GCSAM
    + Adam at the client       LocalAdam (and with DynaFed's server: DynaFedAdam)
    + a spring                 FedProx
    + state at the server      FedCM, FedAdam    MoFedSAM (FedCM's)
    + state on both sides      SCAFFOLD          FedGAMMA             FedLESAM-S           FedSynSAM-S
    + a spring and state       FedDyn            FedSpeed, FedSMOO    FedLESAM-D           FedSynSAM-D

FedAvg, FedSAM, FedLESAM stand in fl.py, FedSynSAM and DynaFed in fedsynsam.py. FedSynSAM-S and FedSynSAM-D are ours.

`python run.py --list` prints what each costs: gradients, bytes both ways, state.

Symbols beyond fl.py's: lambda = `prox` strength of the spring; c_i, c control variates of client and server; h_i, h dual
variables of client and server (h is the mean of h_i over ALL N clients, active or not); m momentum; mu_i, s dual variables of
the perturbation. h_i is a displacement (-gradient / lambda), c_i and m are gradients.

Compression. The server sees decoded vectors only. Where it adds them up (c, h), the client adds up the same decoded vectors
(`remember`), so c = mean of all c_i and h = mean of all h_i hold with every compressor, and the error fades as the sent
vectors do. Had a client added up what it meant to send, the two would drift apart by the sum of all errors, and the
method would settle beside the minimum. With `average = size` the means over the active clients are weighted, and these two
identities hold only at full participation (weighted); the papers average uniformly.

Where released code says something else than the paper, the paper's rule is the default and the code's is a setting; where
only the code was at hand, its rule stands here and the docstring says so. "FL-Simulator" is the code of FedSpeed's and
FedSMOO's authors; clipping G to norm `clip`, correction included, and only then adding weight decay is its rule.

Sources: each class names its own. Read next: ranks.py.
"""
import math

import torch

import align
import ceiling
import fedsynsam
import fl
import sam


# ------------------------------------------------------------------------------------------------------------- bases
class FedProx(fl.FedAvg):
    """FedAvg, except: a spring holds the client near the model it received: G = g_i(w) + lambda (w - w^t).

    w [d]; 1 gradient a step; d floats up and down; no state. The client descends F_i(w) + lambda/2 ||w - w^t||^2.
    FL-Simulator clips g_i - lambda w^t only and lets lambda w pass as weight decay: `--no-prox-clip`; the same if clip = 0.
    Source: Li et al. 2020 (FedProx), the proximal objective; that clipping takes all of G: ours.
    """

    def gradient(self, w, rows, me, uphill):
        pull = w - me.start if self.cfg.prox_clip else -me.start
        return super().gradient(w, rows, me, uphill) + self.cfg.prox * pull

    def step(self, w, rows, me, lr, uphill):
        end, me = super().step(w, rows, me, lr, uphill)
        return (end if self.cfg.prox_clip else end - lr * self.cfg.prox * w), me


class SCAFFOLD(fl.FedAvg):
    """FedAvg, except: c - c_i, global minus own mean gradient, takes out of every step what is special about the client.

        G = g_i(w) + variate (c - c_i)     c_i' = c_i - c - delta_i / (K_i eta)     c += (1/N) sum over active of (c_i' - c_i)

    w [d]; 1 gradient a step; 2 d floats up (delta_i and c_i' - c_i), 2 d down (w and c); client c_i [d], server c [d], 0 at
    first, so round 0 is FedAvg's. Without clipping and with variate = 1, c_i' is the mean of the K_i gradients (+ weight decay).
    FL-Simulator divides by one K for all clients, and keeps c_i at the server to send c - c_i only; same numbers for equal K_i.
    Source: Karimireddy et al. 2020 (SCAFFOLD), Algorithm 1, option II.
    """
    memory, uplinks = 1, 2

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.c = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.c]

    def receive(self, w, extra):
        self.c_seen = extra[0]

    def gradient(self, w, rows, me, uphill):
        return super().gradient(w, rows, me, uphill) + self.cfg.variate * (self.c_seen - me.memory[0])

    def finish(self, w, me, steps, lr):
        delta = w - me.start
        return torch.stack([delta, -self.c_seen - delta / (steps * lr)]), me.memory        # c_i changes in `remember`

    def remember(self, memory, decoded):
        return torch.cat([memory[:1] + decoded[1:], memory[1:]])

    def server(self, w, mean, steps, lr):
        self.c = self.c + self.cfg.participation / self.cfg.clients * mean[1]
        return super().server(w, mean, steps, lr)


class FedDyn(FedProx):
    """FedProx, except: the spring learns where to hold, so that resting points of clients and server agree.

        G = g_i(w) + lambda (w - w^t + h_i)     h_i += delta_i     w^{t+1} = mean of w_i + h,  h = mean of h_i over ALL N

    w [d]; 1 gradient a step; d floats up and down; client h_i [d], server h [d], 0 at first. server_lr is not used. If the
    client solves its problem exactly, -lambda h_i is the gradient of F_i at w_i; at rest h = 0. lambda = 0 is NOT FedAvg: the
    server still adds h. h_i adds up decoded delta_i (see the card).
    Source: Acar et al. 2021 (FedDyn), Algorithm 1, where lambda is alpha and -lambda h_i the client's stored gradient.
    """
    memory = 1

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.h = torch.zeros_like(task.w0)

    def gradient(self, w, rows, me, uphill):
        return super().gradient(w, rows, me, uphill) + self.cfg.prox * me.memory[0]

    def remember(self, memory, decoded):
        return torch.cat([memory[:1] + decoded[:1], memory[1:]])

    def server(self, w, mean, steps, lr):
        self.h = self.h + self.cfg.participation / self.cfg.clients * mean[0]
        return w + mean[0] + self.h


class FedCM(fl.FedAvg):
    """FedAvg, except: most of every step is the global gradient of the round before, as the server estimates it.

        G = a g_i(w) + (1 - a) m     m' = -(mean delta_i) / (K eta), with this round's eta and mean number of steps K

    w [d]; 1 gradient a step; d floats up, 2 d down (w and m); server m [d], no client state. a = `momentum_alpha`. m = 0 in
    round 0, whose steps are a times FedAvg's. m is the last mean update only, not smoothed further; it is made of decoded
    updates, so it carries the compressor's error into every step of the next round.
    Source: Xu et al. 2021 (FedCM); the scale of the server step is FedAvg's, as in FL-Simulator. Unequal K_i: ours.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.m = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.m]

    def receive(self, w, extra):
        self.m_seen = extra[0]

    def gradient(self, w, rows, me, uphill):
        a = self.cfg.momentum_alpha
        return a * super().gradient(w, rows, me, uphill) + (1 - a) * self.m_seen

    def server(self, w, mean, steps, lr):
        self.m = -mean[0] / (steps * lr)
        return super().server(w, mean, steps, lr)


class FedAdam(fl.FedAvg):
    """FedAvg, except: the server takes the mean update for a gradient and makes a step of Adam, without bias correction.

        m = b1 m + (1 - b1) delta     v = b2 v + (1 - b2) delta^2     w^{t+1} = w^t + eta_g m / (sqrt(v) + eps)

    w [d]; 1 gradient a step; d floats up and down; server m, v [2, d], 0 at first. A coordinate moves by up to about eta_g, so it
    must be far below FedAvg's 1 and is a setting of its own, adam_lr. Whether v should start at eps^2 the paper's text was
    not at hand to settle; here it starts at 0.  Source: FL-Simulator's code of Reddi et al. 2021 (FedAdam), Algorithm 2.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.m, self.v = torch.zeros_like(task.w0), torch.zeros_like(task.w0)

    def server(self, w, mean, steps, lr):
        c = self.cfg
        self.m = c.adam_b1 * self.m + (1 - c.adam_b1) * mean[0]
        self.v = c.adam_b2 * self.v + (1 - c.adam_b2) * mean[0].square()
        return w + c.adam_lr * self.m / (self.v.sqrt() + c.adam_eps)


class LocalAdam(fl.FedAvg):
    """FedAvg, except: the client steps by Adam, whose moments stay with it from round to round.

        m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     w <- w - eta m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + 1e-8)

    w [d]; 1 gradient a step; d floats up and down; client m, v, k [3, d], 0 at first; b1 = 0.9, b2 = 0.999. k counts this client's
    steps in all rounds, a number that takes a row because memory is rows. The model jumps at every round, the moments do not. A
    coordinate moves by up to about eta a step, so eta is a setting of its own, local_adam_lr, which decays as lr does. g is clipped, then decayed, as FedAvg's (ours).
    Source: DynaFed's code (Pi et al. 2023), where every client keeps its own torch.optim.Adam; Kingma and Ba 2015.
    """
    memory = 3

    def step(self, w, rows, me, lr, uphill):
        (m, v, k), b1, b2, g = me.memory, 0.9, 0.999, self.slope(w, rows, me, uphill)
        new = torch.stack([b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square(), k + 1])
        short = lambda b: -torch.expm1(new[2, 0] * math.log(b))                 # noqa: E731, 1 - b^k without cancellation in float32
        eta = lr * (self.cfg.local_adam_lr / self.cfg.lr)
        w = w - eta * (new[0] / short(b1)) / ((new[1] / short(b2)).sqrt() + 1e-8)
        return w, me._replace(memory=me.memory + (lr > 0) * (new - me.memory))                # a padded step has lr = 0


# --------------------------------------------------------------------------------------------------------- crossings
class MoFedSAM(fl.FedSAM, FedCM):
    """FedSAM on FedCM: G = a g_i(w + eps) + (1 - a) m, with eps along the client's own gradient.

    w [d]; 2 gradients a step; d floats up, 2 d down; server m [d].  Source: Qu et al. 2022 (MoFedSAM).
    """


class FedGAMMA(fl.FedSAM, SCAFFOLD):
    """FedSAM on SCAFFOLD: G = g_i(w + eps) + variate (c - c_i), so c_i is the mean of gradients at the rim.

    w [d]; 2 gradients a step; 2 d floats up, 2 d down; client c_i [d], server c [d]. The code's rho is 0.01.
    Source: FL-Simulator's code of Dai et al. 2023 (FedGAMMA); c_i as SCAFFOLD's option II.
    """


class FedSpeed(fl.FedSAM, FedDyn):
    """FedSAM on FedDyn: G = g_i(w + eps) + lambda (w - w^t + h_i).

    w [d]; 2 gradients a step; d floats up and down; client h_i [d], server h [d]. The abstract says that the gradient at w and
    the one after an ascent step are merged; how, and whether the ascent is normalised, was not at hand: the code's rule.
    Source: FL-Simulator's code of Sun et al. 2023 (FedSpeed).
    """


class FedSMOO(FedSpeed):
    """FedSpeed, except: all clients' perturbations are made to agree in the long run, by dual variables mu_i and a target s.

        r = g_i(w) - mu_i - s     eps = rho r / ||r||     mu_i += eps - s at every step     s = rho mu / ||mu||, mu = mean mu_i

    w [d]; 2 gradients a step; 2 d floats up (delta_i and mu_i), 2 d down (w and s); client h_i, mu_i [2, d], server h, s [2, d],
    0 at first: the first step of all is FedSpeed's, and ||s|| = rho after it. mu_i is sent whole and nothing adds it up, so
    the client keeps it as it is. The code leaves a term of the paper's s out, as small, and so does this class. With one full
    gradient a round on quadratics the clients come to agree on a perturbation whose sign flips every round (a test shows it).
    Source: FL-Simulator's code of Sun et al. 2023 (FedSMOO).
    """
    memory, uplinks = 2, 2

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.s = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.s]

    def receive(self, w, extra):
        self.s_seen = extra[0]

    def direction(self, w, rows, me):
        return super().direction(w, rows, me) - me.memory[1] - self.s_seen

    def step(self, w, rows, me, lr, uphill):
        mu = me.memory[1] + (lr > 0) * (self.cfg.rho * sam.unit(uphill) - self.s_seen)     # a padded step has lr = 0
        return super().step(w, rows, me._replace(memory=torch.stack([me.memory[0], mu])), lr, uphill)

    def finish(self, w, me, steps, lr):
        return torch.stack([w - me.start, me.memory[1]]), me.memory

    def server(self, w, mean, steps, lr):
        self.s = self.cfg.rho * sam.unit(mean[1])
        return super().server(w, mean, steps, lr)


class FedLESAMS(fl.FedLESAM, SCAFFOLD):
    """FedLESAM on SCAFFOLD: G = g_i(w + eps) + variate (c - c_i), with eps back to the global model this client last saw.

    w [d]; 1 gradient a step; 2 d floats up, 2 d down; client c_i and w_i^old [2, d], server c [d]. The code multiplies c - c_i by
    0.1: `--variate 0.1`. It takes the server's last step for all clients instead of w_i^old (fl.FedLESAMServer does so).
    Source: Fan et al. 2024 (FedLESAM-S), the paper's direction.
    """
    memory = 2


class FedLESAMD(fl.FedLESAM, FedDyn):
    """FedLESAM on FedDyn: G = g_i(w + eps) + lambda (w - w^t + h_i), with eps back to the global model this client last saw.

    w [d]; 1 gradient a step; d floats up and down; client h_i and w_i^old [2, d], server h [d]. The difference of two global
    models holds the server's h too, not the mean update alone.  Source: Fan et al. 2024 (FedLESAM-D), the paper's direction.
    """
    memory = 2


class FedSynSAMS(fedsynsam.FedSynSAM, SCAFFOLD):
    """FedSynSAM on SCAFFOLD: G = g_i(w + eps) + variate (c - c_i), with eps along FedSynSAM's mixture.

    w [d]; 3 gradients a step; 2 d floats up, 2 d down, and D_syn once to each client; client c_i [d], server c [d].
    Source: ours, the crossing that FedGAMMA is of FedSAM.
    """


class FedSynSAMD(fedsynsam.FedSynSAM, FedDyn):
    """FedSynSAM on FedDyn: G = g_i(w + eps) + lambda (w - w^t + h_i), with eps along FedSynSAM's mixture.

    w [d]; 3 gradients a step; d floats up and down, and D_syn once to each client; client h_i [d], server h [d].
    Source: ours, the crossing that FedSpeed is of FedSAM.
    """


class DynaFedAdam(fedsynsam.DynaFed, LocalAdam):
    """DynaFed on LocalAdam: the server of DynaFed, and clients as in its released code.

    w [d]; 1 gradient a step; d floats up and down; client m, v, k [3, d]; server as DynaFed's.
    Source: DynaFed's code (Pi et al. 2023), but for the augmentation at its server.
    """


class FedASAM(fl.FedSAM):
    """FedSAM, except: the ball is an ellipsoid, long where |w| is large: eps = rho T^2 g / ||T g||, T = |w| + asam_eta.

    w [d]; 2 gradients a step; d floats up and down; no state. T = 1 for biases. rho is not comparable with FedSAM's: the
    code's CIFAR-10 script has rho 0.7, asam_eta 0.2.  Source: Caldarola et al. 2022 (FedASAM), released code; Kwon et al. 2021.
    """

    def gradient(self, w, rows, me, uphill):
        return self.grad(sam.perturb_adaptive(w, uphill, self.cfg.rho, self.cfg.asam_eta, self.task.weights), rows)


class GCSAM(fl.FedSAM):
    """FedSAM, except: gradients are centralised, C g = g minus the mean over each output's weights: G = C g_i(w + rho C g / ||C g||).

    w [d]; 2 gradients a step; d floats up and down; no state. So the mean weight into each unit never changes, as long as nothing
    else (weight decay, compression) moves it. The released code says otherwise, `--gc-code`: G = g_i(w + rho C g / ||g||), where
    ||eps|| <= rho and the descent is not centralised. Of rho = 0 the code makes FedAvg, the formula centralised FedAvg.
    Source: Hassan et al. 2025 (GCSAM, arXiv 2501.11584), the formulas as restated by others; on FedSAM's clients: ours.
    """

    def gradient(self, w, rows, me, uphill):
        shapes, code = self.task.shapes, self.cfg.gc_code
        g = self.grad(sam.perturb_centralised(w, uphill, self.cfg.rho, shapes, code), rows)
        return g if code else sam.centralise(g, shapes)


METHODS = {**fl.METHODS, **fedsynsam.METHODS, **align.METHODS, **ceiling.METHODS, "fedprox": FedProx, "scaffold": SCAFFOLD, "feddyn": FedDyn, "fedcm": FedCM, "fedadam": FedAdam,
           "mofedsam": MoFedSAM, "fedgamma": FedGAMMA, "fedspeed": FedSpeed, "fedsmoo": FedSMOO, "fedlesam-s": FedLESAMS,
           "fedlesam-d": FedLESAMD, "fedsynsam-s": FedSynSAMS, "fedsynsam-d": FedSynSAMD, "fedasam": FedASAM, "gcsam": GCSAM,
           "fedavg-adam": LocalAdam, "dynafed-adam": DynaFedAdam}
