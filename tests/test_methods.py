"""The theorems of methods/: independent slow loops, limits that recover the parent, identities.

    python -m pytest -q tests/test_methods.py

Everything runs on the tiny tasks of toys.py in float64: Linear has clients with unequal numbers of
images and steps, and short batches; Quadratics have a known minimum.
"""

import math

import pytest
import torch
from torch.nn import functional as F

import fl
import synth
from compress import QSGD, Identity, TopK, seal, with_feedback
from fl import SCAFFOLD, Distilling, DynaFed, FedAvg, Federation, FedLESAM, FedSAM, FedSynSAM, rng
from methods import fedsynth
from methods.adam import DynaFed_Adam, FedAdam, FedAvg_Adam
from methods.alignment import Aligned, FedGA, FedGA_Previous, GradAlign
from methods.combinations import (
    FedGAMMA,
    FedLESAM_D,
    FedLESAM_S,
    FedSMOO,
    FedSpeed,
    FedSynSAM_D,
    FedSynSAM_S,
    MoFedSAM,
)
from methods.drift import FedCM, FedDyn, FedProx
from methods.fedgloss import FedGloSS
from methods.fedsynth import FedSynth
from methods.fedwmsam import FedWMSAM
from methods.labelcal import LabelCal, calibrated_loss
from methods.oracle import Oracle
from methods.ours import FedSynSAM_Debiased, FedSynSAM_Descent
from methods.sam_variants import GCSAM, FedASAM, FedLESAM_Server, centralise
from methods.swa import SWA
from plumbing.settings import find, parts, settings_of
from scale import faults
from tests.toys import Linear, Quadratics, f64, in_batches, normal, seeded

torch.set_num_threads(1)  # tiny tensors; pytest runs a worker on every core

WITH_C = (SCAFFOLD, FedGAMMA, FedLESAM_S, FedSynSAM_S, FedWMSAM)
WITH_H = (FedDyn, FedSpeed, FedSMOO, FedLESAM_D, FedSynSAM_D, FedGloSS)
SMALL = {
    **{"lr": 0.1, "warmup": 2, "window": 2, "outer_steps": 3, "inner_steps": 2, "ipc": 1},
    **{"fs_steps": 3, "fs_batches": 2, "fs_images": 2, "oracle_images": 9, "finetune_epochs": 2},
}
WIRES = {
    "identity": (Identity(f64), "off"),
    "qsgd": (QSGD(1, "max", 8, f64), "off"),
    "topk": (TopK(6, f64), "on"),
}


def every_method():
    """All method classes of methods/."""
    found = [M for M in parts("algo").values() if M.__module__ != "fl"]
    return [M for M in found if M is not Aligned]


def started(M, task=None, wire="identity", m=3, average="uniform", seed=0, **settings):
    """A federation before its first round; settings that M does not have are left out."""
    task = task or Linear()
    settings = {k: v for k, v in (SMALL | settings).items() if hasattr(M, k)}
    compressor, feedback = WIRES[wire]
    return Federation(M(task, seed, **settings), compressor, m, average, feedback)


def run(M, task=None, rounds=4, **more):
    f = started(M, task, **more)
    for _ in range(rounds):
        f.round()
    return f


def quadratics(N=4, d=4, K=5, seed=0, spread=3.0):
    a = 1 + 0.3 * normal(N, d, seed=seed).abs()
    task = Quadratics(a, spread * normal(N, d, seed=seed + 1), K)
    task.w0 = normal(d, seed=seed + 2)
    return task


def near(a, b, tolerance=1e-11):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def message_bytes(settings, image_shape, classes, dtype=torch.float32):
    """Bytes of a message of FedSynth with these settings: a, Y, X and the checksum."""
    count = settings.fs_batches * settings.fs_images
    images = fedsynth.image_bytes((count, *image_shape), settings.fs_format, dtype)
    return dtype.itemsize * (1 + count * classes) + images + 4


# -------------------------------------------------------------------------------------- the rules


BOOK = (FedAvg, SCAFFOLD, FedSAM, FedLESAM, Distilling, DynaFed, FedSynSAM)
COSTS = {  # gradients a step, vectors [d] up, vectors [d] down
    **{FedAvg: (1, 1, 1), SCAFFOLD: (1, 2, 2), FedSAM: (2, 1, 1), FedLESAM: (1, 1, 1)},
    **{Distilling: (1, 1, 1), DynaFed: (1, 1, 1), FedSynSAM: (2, 1, 1)},
    **{FedProx: (1, 1, 1), FedDyn: (1, 1, 1), FedCM: (1, 1, 2), FedAdam: (1, 1, 1)},
    **{FedAvg_Adam: (1, 1, 1), DynaFed_Adam: (1, 1, 1), MoFedSAM: (2, 1, 2), FedGAMMA: (2, 2, 2)},
    **{FedSpeed: (2, 1, 1), FedLESAM_S: (1, 2, 2), FedLESAM_D: (1, 1, 1), FedSMOO: (2, 2, 2)},
    **{FedSynSAM_S: (2, 2, 2), FedSynSAM_D: (2, 1, 1), FedLESAM_Server: (1, 1, 2)},
    **{FedASAM: (2, 1, 1), GCSAM: (2, 1, 1), GradAlign: (1, 2, 2), FedGA: (1, 2, 2)},
    **{FedGA_Previous: (1, 1, 2), Oracle: (2, 1, 1), LabelCal: (1, 1, 1), FedGloSS: (1, 1, 1)},
    **{FedWMSAM: (1, 1, 3), FedSynth: (1, None, 1), SWA: (1, 1, 1)},
    **{FedSynSAM_Debiased: (3, 1, 1), FedSynSAM_Descent: (3, 1, 1)},
}


@pytest.mark.parametrize("M", [*BOOK, *every_method()], ids=lambda M: M.__name__)
def test_methods_cost_what_their_docstrings_say(M):
    """In a round after the synthesis: gradients counted, bytes measured. All clients take part."""
    f, calls, task = run(M, m=5, rounds=3 if issubclass(M, Distilling) else 1), [], Linear()
    before, d = (f.bytes_up, f.bytes_down), len(task.w0)
    f.method.gradient_of = lambda loss, w: calls.append(1) or fl.autograd(loss, w)
    f.round()
    gradients, up, down = COSTS[M]
    whole = sum(len(task.everything(i)) for i in range(5)) if "survey" in M.exchanges else 0
    assert len(calls) == gradients * sum(map(task.steps, range(5))) + whole
    message = 8 * d + 4  # float64 and the checksum
    if M is FedSynth:
        up_bytes = message_bytes(f.method, task.image_shape, task.classes, f64)
    else:
        up_bytes = up * message
    extra = 8 + 4 if M is FedWMSAM else 0  # alpha
    assert f.bytes_up - before[0] == 5 * up_bytes
    assert f.bytes_down - before[1] == 5 * (down * message + extra)
    words = {1: "One gradient a step", 2: "Two gradients a step", 3: "Three gradients a step"}
    if M not in BOOK:
        assert words[gradients] in M.__doc__ and ("all images" in M.__doc__) == (whole > 0)


# ------------------------------------------------------------------- the equations, as slow loops


def slow_gradient(task, w, batch):
    """The gradient of the mean cross-entropy of a linear model, image by image, in closed form."""
    W, b = w[:48].view(3, 16), w[48:]
    rows = [int(r) for r in batch[:, 0] if r >= 0]
    dW, db = torch.zeros_like(W), torch.zeros_like(b)
    for r in rows:
        x = task.x[r].flatten()
        error = (W @ x + b).softmax(0) - F.one_hot(task.y[r], 3)
        dW, db = dW + torch.outer(error, x) / len(rows), db + error / len(rows)
    return torch.cat([dW.flatten(), db])


def slow_centralised(g):
    """Each unit's 16 incoming weights minus their mean, one unit after the other."""
    g = g.clone()
    for unit in range(3):
        g[16 * unit : 16 * unit + 16] -= g[16 * unit : 16 * unit + 16].sum() / 16
    return g


class Slow:
    """A method once more: one list for each symbol, and c, h as means over all N by definition.

    Nothing of the methods is used but their settings, and of fl.py only its random numbers.
    """

    def __init__(self, f, m):
        self.M, self.task, self.set, self.m = type(f.method), f.task, f.method, m
        self.N, self.w = len(f.weights), f.task.w0
        total = sum(f.weights)
        self.P = [weight / total for weight in f.weights]  # of all clients
        self.zero = torch.zeros_like(self.w)
        self.c_i, self.h_i, self.mu_i, self.g_i = ([self.zero] * self.N for _ in range(4))
        self.w_old = [None] * self.N
        self.m1 = self.v = self.momentum = self.s = self.p = self.g = self.back = self.zero
        self.alpha = getattr(f.method, "momentum_alpha", 1.0)
        self.rounds, self.late = 0, []

    def mean(self, x, over):
        return sum(self.P[i] * x[i] for i in over) / sum(self.P[i] for i in over)

    def round(self, t):
        everyone, lr = range(self.N), self.set.lr * self.set.lr_decay**t
        order = torch.randperm(self.N, generator=rng(0, "clients", t))
        active = sorted(order[: self.m].tolist())
        self.c = self.mean(self.c_i, everyone)
        if self.M in (GradAlign, FedGA):
            for i in active:
                self.g_i[i] = slow_gradient(self.task, self.w, self.all_images(i))
            self.g = self.mean(self.g_i, active)
        K = [self.task.steps(i) for i in everyone]
        lr_sum = lr * self.mean(K, active)
        update = {i: self.client(i, t, lr) for i in active}
        for i in active:
            self.c_i[i] = self.c_i[i] - self.c - update[i] / (K[i] * lr)
            self.h_i[i] = self.h_i[i] + update[i]
            self.w_old[i] = self.w
            if self.M is FedGA_Previous:
                self.g_i[i] = -update[i] / (K[i] * lr)
        self.server(update, active, lr_sum)

    def all_images(self, i):
        return in_batches(self.task.images[i], self.task.sizes[i])[0]

    def server(self, update, active, lr_sum):
        c, mean = self.set, self.mean(update, active)
        if self.M is FedWMSAM:
            v = {i: self.disagreement(update[i]) for i in active}
            v = min(0.9, max(0.1, self.mean(v, active)))
            self.alpha = (1 - c.alpha_rate) * self.alpha + c.alpha_rate * v
        self.momentum = self.g = -mean / lr_sum
        if self.M is FedSMOO:
            self.s = self.mean(self.mu_i, active)
            self.s = c.rho * self.s / self.s.norm()
        self.p = mean
        step = c.server_lr * mean
        if self.M in WITH_H:
            step = step + self.mean(self.h_i, range(self.N))
        if self.M is FedAdam:
            self.m1 = c.adam_b1 * self.m1 + (1 - c.adam_b1) * mean
            self.v = c.adam_b2 * self.v + (1 - c.adam_b2) * mean**2
            step = c.adam_lr * self.m1 / (self.v.sqrt() + c.adam_eps)
        self.w, self.back = self.w + step, -step
        self.rounds += 1
        self.late = [*self.late, self.w][-max(1, self.rounds - getattr(c, "swa_start", 0)) :]
        self.mean_w = sum(self.late) / len(self.late)

    def disagreement(self, update):
        if not self.momentum.any():
            return 0.0
        return float(1 + F.cosine_similarity(update, self.momentum, dim=0))

    def client(self, i, t, lr):
        """The update of client i."""
        c, first = self.set, self.w
        v_i = self.displacement(i)
        if self.M is FedGloSS and self.p.any():
            first = self.w - c.rho * self.p / self.p.norm()
        x = first + (v_i if self.M is not GradAlign else 0)
        for b, batch in enumerate(self.task.plan(i, rng(0, "batches", t, i))):
            at = x + self.perturbation(i, x, batch, b) + (v_i if self.M is GradAlign else 0)
            g = slow_gradient(self.task, at, batch)
            G, decay = self.corrected(g, i, x - first), c.weight_decay
            if self.proximal() and not c.prox_clip:
                G, decay = G - c.prox * x, decay + c.prox
            if c.clip and G.norm() > c.clip:
                G = G * c.clip / G.norm()
            x = x - lr * (G + decay * x)
        return x - first - (v_i if self.M is not GradAlign else 0)

    def displacement(self, i):
        if self.M not in (GradAlign, FedGA, FedGA_Previous):
            return self.zero
        if self.M is FedGA_Previous and self.w_old[i] is None:
            return self.zero
        return self.set.beta * (self.g_i[i] - self.g)

    def perturbation(self, i, x, batch, b):
        c, u = self.set, self.ascent(i, x, batch, b)
        T, longer = torch.ones_like(x), 1
        if self.M is FedASAM:
            T[:48] = x[:48].abs() + c.asam_eta
        if self.M is GCSAM:
            whole, u = u, slow_centralised(u)
            longer = whole.norm() / u.norm() if c.gc_code else 1
        if not u.any():
            return self.zero
        e = c.rho * T * T * u / (T * u).norm() / longer
        if self.M is FedSMOO:
            self.mu_i[i] = self.mu_i[i] + e - self.s
        return e

    def ascent(self, i, x, batch, b):
        if self.M is FedLESAM_Server:
            return self.back
        if issubclass(self.M, FedLESAM):
            return self.zero if self.w_old[i] is None else self.w_old[i] - self.w
        if self.M is FedWMSAM:
            odds = self.alpha / (1 - self.alpha)
            m_i = self.momentum + odds * self.set.variate * (self.c - self.c_i[i])
            return self.w + b * m_i - x if b else self.zero
        if not issubclass(self.M, FedSAM):
            return self.zero
        if self.M is Oracle:
            return slow_gradient(self.task, x, self.set.peeked)
        return slow_gradient(self.task, x, batch) - self.mu_i[i] - self.s

    def proximal(self):
        return self.M is FedProx or self.M in WITH_H

    def corrected(self, g, i, walked):
        c = self.set
        if self.M is GCSAM and not c.gc_code:
            g = slow_centralised(g)
        if self.proximal():
            g = g + c.prox * (walked + (self.h_i[i] if self.M in WITH_H else 0))
        if self.M in WITH_C:
            g = g + c.variate * (self.c - self.c_i[i])
        if issubclass(self.M, FedCM):
            g = self.alpha * g + (1 - self.alpha) * self.momentum
        return g


KNOBS = {
    **{"rho": 0.05, "prox": 0.3, "variate": 0.8, "momentum_alpha": 0.4, "alpha_rate": 0.3},
    **{"adam_eps": 0.1, "adam_lr": 0.6, "server_lr": 0.7, "lr_decay": 0.8, "weight_decay": 0.01},
    **{"lr": 0.3, "beta": 0.2, "swa_start": 2},
}
VARIANTS = {
    "paper": ("uniform", {"clip": 0.0}),
    "code": ("size", {"clip": 0.3, "prox_clip": False, "gc_code": True}),
}
NOT_SLOW = (FedAvg_Adam, DynaFed_Adam, FedSynSAM_S, FedSynSAM_D, FedSynth, LabelCal)
NOT_SLOW += (FedSynSAM_Debiased, FedSynSAM_Descent)  # in test_directions.py
SLOW = [SCAFFOLD, FedLESAM, *(M for M in every_method() if M not in NOT_SLOW)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("M", SLOW, ids=lambda M: M.__name__)
def test_methods_equal_slow_loops(M, variant):
    """Model, memory of every client, and what the server keeps; three of five unequal clients."""
    average, more = VARIANTS[variant]
    f = started(M, average=average, **KNOBS, **more)
    slow = Slow(f, 3)
    for t in range(5):
        f.round()
        slow.round(t)
    assert near(f.w, slow.w) and (f.w - f.task.w0).norm() > 0.01
    if M is SWA:
        assert near(f.judged(), slow.mean_w)
        f.method.prepare(5, f.w)  # where it reads w^5
    assert len(f.memory) > 3  # clients came and went
    for i, mine in f.memory.items():
        for name in {"c_i", "h_i", "mu_i", "w_old"} & set(mine):
            assert near(mine[name], getattr(slow, name)[i]), (name, i)
    slow.h, slow.m = slow.mean(slow.h_i, range(5)), slow.m1
    slow.c = slow.mean(slow.c_i, range(5))
    for name in f.method.state:
        found, expected = f.method.state[name], getattr(slow, name)
        assert near(*(torch.as_tensor(x, dtype=f64) for x in (found, expected))), name


# ------------------------------------------------------------- what server and clients both sum up


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("average", ["uniform", "size"])
@pytest.mark.parametrize("M", [*WITH_C, *WITH_H], ids=lambda M: M.__name__)
def test_the_servers_c_and_h_are_the_means_of_all_clients(M, average, wire):
    """With every compressor, weighted as the mean is; three of five unequal clients take part."""
    f = started(M, wire=wire, average=average)
    total, part = ("c", "c_i") if M in WITH_C else ("h", "h_i")
    for _ in range(5):
        f.round()
        parts = sum(f.weights[i] * mine[part] for i, mine in f.memory.items()) / sum(f.weights)
        assert near(f.method.state[total], parts) and parts.norm() > 1e-3


@pytest.mark.parametrize("M", [SCAFFOLD, FedGAMMA], ids=lambda M: M.__name__)
def test_c_i_is_the_mean_of_the_gradients_with_weight_decay(M):
    """Whatever c and c_i were; the sum is collected while the client trains."""
    seen = []

    class Spy(M):
        def correct(self, g, w, received, mine):
            seen.append(g + 0.1 * w)
            return super().correct(g, w, received, mine)

    f = run(Spy, rounds=3, clip=0.0, weight_decay=0.1)
    assert f.method.state["c"].norm() > 0
    seen.clear()
    i = f.choose()[0]
    f.round()
    assert near(f.memory[i]["c_i"], torch.stack(seen[: f.task.steps(i)]).mean(0), 1e-9)


def test_with_one_client_scaffold_has_nothing_to_correct():
    for wire in WIRES:
        task = Linear(sizes=(9,))
        assert near(run(SCAFFOLD, task, m=1, wire=wire).w, run(FedAvg, task, m=1, wire=wire).w)


FINE = {"identity": Identity(f64), "qsgd": QSGD(4, "l2", 0, f64)}


def distance(M, wire="identity", m=4, rounds=100, **settings):
    """Distance from the minimum in the end, in units of that at the start; clients that differ."""
    task = quadratics()
    settings = {k: v for k, v in ({"prox": 1.0} | settings).items() if hasattr(M, k)}
    f = Federation(M(task, lr=0.1, clip=0.0, **settings), FINE[wire], m)
    for _ in range(rounds):
        f.round()
    return float((f.w - task.optimum).norm() / (task.w0 - task.optimum).norm())


@pytest.mark.parametrize("M", [SCAFFOLD, FedDyn], ids=lambda M: M.__name__)
def test_drift_correction_reaches_the_minimum_and_fedavg_does_not(M):
    assert distance(FedAvg) > 0.01
    for wire, m in (("identity", 4), ("qsgd", 4), ("identity", 2)):
        assert distance(M, wire, m) < 1e-7, (wire, m)


@pytest.mark.parametrize("M, part", [(SCAFFOLD, "c_i"), (FedDyn, "h_i")])
def test_a_client_that_adds_up_what_it_meant_to_send_ends_beside_the_minimum(M, part):
    """Why `remember` exists: under compression the two sums drift apart for ever."""

    class Own(M):
        def upload(self, w, received, mine, lr_sum):
            sent, mine = super().upload(w, received, mine, lr_sum)
            return sent, super().remember(mine, sent, lr_sum)

        def remember(self, mine, decoded, lr_sum):
            return mine

    assert distance(Own) < 1e-7 and distance(Own, "qsgd") > 0.001


def test_fedsmoo_needs_error_feedback_for_mu_i():
    """With top-k of a quarter; the numbers are in its docstring."""

    class Own(FedSMOO):
        fed_back = ("update",)

    def ends(M):
        task = Quadratics(1 + 3 * torch.rand(6, 20, dtype=f64), normal(6, 20, seed=1), K=2)
        f = run(M, task, wire="topk", rounds=100, m=6, prox=2.0, rho=0.1, clip=0.0)
        return (f.w - task.optimum).norm() / task.optimum.norm()

    torch.manual_seed(0)
    assert ends(FedSMOO) < 0.4 * ends(Own)


def test_feddyn_ends_where_the_clients_gradients_cancel():
    task = quadratics()
    f = run(FedDyn, task, rounds=150, m=4, prox=2.0, clip=0.0)
    h = torch.stack([f.memory[i]["h_i"] for i in range(4)])
    gradients = torch.stack([task.gradient(i, task.optimum) for i in range(4)])
    assert near(-2.0 * h, gradients, 1e-6) and gradients.norm() > 1
    assert f.method.state["h"].norm() < 1e-7


# ------------------------------------------------------------------------------ one after the other


def test_fedprox_holds_its_clients_the_tighter_the_larger_prox_is():
    task = quadratics(N=1, K=1000)
    point = (task.a * task.b + 2 * task.w0) / (task.a + 2)  # the proximal point
    assert near(run(FedProx, task, 1, m=1, prox=2.0, clip=0.0).w, point[0], 1e-9)
    moves = [
        float((run(FedProx, task, 1, m=1, prox=p, lr=0.5 / (p + 3)).w - task.w0).norm())
        for p in (0.0, 1.0, 10.0, 1000.0)
    ]
    assert moves == sorted(moves, reverse=True) and moves[-1] < 0.02 * moves[0]


@pytest.mark.parametrize("start, judged", [(0, 4), (3, 1), (4, 0), (9, 0)])
def test_swa_trains_as_its_parent_and_judges_the_mean_of_the_last_models(start, judged):
    class Both(SWA, FedSAM):
        pass

    f, plain, models = started(Both, swa_start=start), started(FedSAM), []
    for _ in range(4):
        f.round()
        plain.round()
        models.append(plain.w)
        assert torch.equal(f.w, plain.w)
    expected = torch.stack(models[-judged:]).mean(0) if judged else plain.w
    assert near(f.judged(), expected) and plain.judged() is plain.w


@pytest.mark.parametrize("order", ["swa+feddyn", "feddyn+swa", "fedadam+swa", "dynafed+swa"])
def test_swa_judges_the_mean_of_the_global_models_on_either_side(order):
    f, models = started(find("algo", order), swa_start=1), []
    for _ in range(4):
        f.round()
        models.append(f.w)
    assert near(f.judged(), torch.stack(models[1:]).mean(0))


def test_swa_counts_rounds_without_clients():
    class Sparse(faults.Tolerant):
        def absent(self, i):
            return self.t in (0, 2, 4)

    method = SWA(Linear(), swa_start=2)
    f, models = Sparse(method, Identity(f64), participation=3), []
    for _ in range(5):
        f.round()
        models.append(f.w)
    assert near(f.judged(), torch.stack(models[2:]).mean(0))


def test_fedadam_steps_along_what_the_other_parent_made_of_the_update():
    f = started(find("algo", "fedadam+feddyn"), adam_b1=0.0, adam_b2=0.0, adam_lr=1.0, adam_eps=1e9)
    plain = started(FedDyn)
    f.round(), plain.round()  # m / (sqrt(v) + eps) = x / 1e9: the direction of FedDyn
    assert near(1e9 * (f.w - f.task.w0), plain.w - f.task.w0, 1e-4)


def test_combinations_keep_what_the_other_parent_sends_and_minimises():
    f = run(find("algo", "fedwmsam+fedsmoo"), Linear(), 3)
    assert f.method.state["s"].any() and f.method.state["c"].any()
    data = {"fs_objective": "data", "fs_steps": 3, "fs_batches": 1, "fs_images": 2}
    one = run(find("algo", "fedsynth"), Linear(), 2, **data)
    other = run(find("algo", "labelcal+fedsynth"), Linear(), 2, **data)
    assert not torch.equal(one.w, other.w)


def test_swa_is_nearer_to_the_minimum_about_which_the_global_model_swings():
    task = quadratics(N=20, d=6, spread=9.0)
    f = run(SWA, task, 200, m=2, swa_start=50)
    best = run(FedAvg, task, 40, m=20).w  # all clients in every round: no swings
    assert (f.judged() - best).norm() < 0.3 * (f.w - best).norm()


def test_fedadam_has_no_setting_without_effect():
    assert "server_lr" not in settings_of(FedAdam) and "server_lr" in settings_of(FedAvg)


def test_fedadam_is_fedavg_where_eps_drowns_v_and_the_sign_where_nothing_is_kept():
    task = quadratics()
    update = run(FedAvg, task, 1).w - task.w0
    large = {"adam_lr": 1e9, "adam_eps": 1e9, "adam_b1": 0.0, "adam_b2": 0.0}
    assert near(run(FedAdam, task, 3, **large).w, run(FedAvg, task, 3).w, 1e-7)
    sign = {"adam_lr": 0.05, "adam_eps": 1e-300, "adam_b1": 0.0, "adam_b2": 0.0}
    assert near(run(FedAdam, task, 1, **sign).w - task.w0, 0.05 * update.sign(), 1e-9)


def test_local_adam_is_torchs_adam_kept_by_every_client():
    """A parameter and an optimizer of its own for every client, over rounds."""
    settings = {"clip": 0.5, "weight_decay": 0.01, "lr": 0.3, "local_adam_lr": 0.01}
    f = started(FedAvg_Adam, lr_decay=0.8, server_lr=0.7, **settings)
    task, w = f.task, f.task.w0
    own = [w.clone().requires_grad_() for _ in range(5)]
    adams = [torch.optim.Adam([x], weight_decay=0.01) for x in own]
    for t in range(5):
        active, ends = f.choose(), []
        for i in active:
            own[i].data = w.clone()
            adams[i].param_groups[0]["lr"] = 0.01 * 0.8**t
            for batch in task.plan(i, rng(0, "batches", t, i)):
                g = slow_gradient(task, own[i].detach(), batch)
                own[i].grad = g * min(1, 0.5 / g.norm())
                adams[i].step()
            ends.append(own[i].detach().clone())
        w = w + 0.7 * (torch.stack(ends).mean(0) - w)
        f.round()
        assert near(f.w, w, 1e-9), t
    for i, mine in f.memory.items():
        state = adams[i].state[own[i]]
        assert mine["k"] == state["step"]
        assert near(mine["m"], state["exp_avg"]) and near(mine["v"], state["exp_avg_sq"])


def test_local_adam_corrects_its_bias_in_float32_too():
    """The first step is local_adam_lr long in every coordinate."""
    method, g = FedAvg_Adam(quadratics(), lr=0.5, local_adam_lr=0.25), torch.linspace(-1, 1, 6)
    w, mine = method.move(torch.zeros(6), g, method.first_memory({"w": g}), 0.5)
    assert torch.allclose(w, -0.25 * g.sign(), rtol=1e-6) and mine["k"] == 1


def test_fedsmoo_perturbations_have_length_rho_and_come_to_agree():
    task = quadratics(N=8, d=6, K=1)
    f, spread = started(FedSMOO, task, m=8, rho=0.3, prox=1.0), []
    mu = torch.zeros(8, 6, dtype=f64)
    for _ in range(100):
        before, s = mu, f.method.state["s"]
        f.round()
        mu = torch.stack([f.memory[i]["mu_i"] for i in range(8)])
        e = mu - before + s  # mu_i' = mu_i + e - s
        assert near(e.norm(dim=1), torch.full((8,), 0.3, dtype=f64), 1e-8)
        spread.append(float((e - e.mean(0)).norm()))
    assert spread[-1] < 0.2 * spread[0]


def test_gcsam_never_moves_the_mean_weight_into_a_unit():
    """As long as nothing but G moves w; by its released code it does."""
    g = normal(51, seed=4)
    assert near(centralise(g, Linear().shapes), slow_centralised(g))
    for code in (False, True):
        f = run(GCSAM, rounds=3, gc_code=code, rho=0.5)
        moved = (f.w - f.task.w0)[:48].view(3, 16)
        assert (moved.mean(1).abs().max() < 1e-14) != code and moved.norm() > 0.1
    task = quadratics()  # a vector: there is nothing to centralise
    assert torch.equal(run(GCSAM, task).w, run(FedSAM, task).w)


@pytest.mark.parametrize("variate", [1.0, 0.5])
def test_a_small_variate_only_delays_the_correction_of_scaffold(variate):
    """Linear losses <a_i, w>: c - c_i ends at (mean of a - a_i) / variate, so G is that mean."""
    a = normal(5, 51, seed=7)

    class Lines(Linear):
        def loss(self, w, batch):
            i = int(batch[0, 0])
            return a[next(k for k, images in enumerate(self.images) if i in images)] @ w

    f = started(SCAFFOLD, Lines(), m=5, variate=variate, clip=0.0)
    for _ in range(60):
        f.round()
    for i, mine in f.memory.items():
        assert near(a[i] + variate * (f.method.state["c"] - mine["c_i"]), a.mean(0), 1e-9)


def test_the_oracle_is_fedsynsam_whose_synthetic_images_are_those_it_peeks_at():
    f, g = started(Oracle), started(FedSynSAM, mix=1.0, warmup=10)
    x, y, _ = f.task.examples(f.method.peeked)
    assert sorted(y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    g.method.state = g.method.state | {"X": x, "Y": 1e3 * F.one_hot(y, 3).to(f64)}
    for _ in range(4):
        f.round()
        g.round()
    assert near(f.w, g.w) and not near(f.w, run(FedSAM).w, 1e-3)


# ---------------------------------------------------------------------------------------- alignment


def displacements(f, clients):
    """v_i [d] of the clients of the coming round, after their survey."""
    received = f.send_down(clients)
    if "survey" in f.method.exchanges:
        mean = f.exchange("survey", clients, received, f.method.lr)
        received = received | f.through_wire(mean, len(clients))
    mine = [f.recall(i, received) for i in clients]
    return torch.stack([f.method.displacement(received, own) for own in mine])


@pytest.mark.parametrize("average", ["uniform", "size"])
@pytest.mark.parametrize("wire", WIRES)
def test_displacements_sum_to_zero(wire, average):
    """Weighted as the mean is, with every compressor: they are made of what was decoded."""
    f = run(FedGA, rounds=2, wire=wire, average=average, beta=0.3)
    clients = f.choose()
    residuals = [f.memory[i].get("residual of update") for i in clients if i in f.memory]
    v = displacements(f, clients)
    weights = torch.tensor([f.weights[i] for i in clients], dtype=f64)
    assert (weights @ v).norm() < 1e-11 * v.norm() and v.norm() > 1e-3
    after = [f.memory[i].get("residual of update") for i in clients if i in f.memory]
    assert all(a is b for a, b in zip(residuals, after))  # error feedback leaves the survey alone


def test_displacements_of_the_last_updates_sum_to_zero_at_full_participation():
    for wire in WIRES:
        f = run(FedGA_Previous, quadratics(d=8), m=4, wire=wire, beta=0.2)
        v = displacements(f, range(4))
        assert v.sum(0).norm() < 1e-11 * v.norm() and v.norm() > 0.01
    f = run(FedGA_Previous, m=2, rounds=1)
    new = next(i for i in range(5) if i not in f.memory)
    v = displacements(f, [new, next(iter(f.memory))])
    assert v[0].norm() == 0 and v[1].norm() > 0  # its first round: not displaced


def test_fedga_is_gradalign_for_every_k():
    """w_k + v_i = y_k while v_i is held, unless weight decay tells w and y apart."""
    for settings in ({}, {"average": "size", "clip": 0.5}):
        a, b = (run(M, beta=0.3, **settings).w for M in (GradAlign, FedGA))
        assert near(a, b)
    a, b = (run(M, beta=0.3, weight_decay=0.1).w for M in (GradAlign, FedGA))
    assert 1e-8 < (a - b).norm() < 1e-1


@pytest.mark.parametrize("M", [GradAlign, FedGA], ids=lambda M: M.__name__)
def test_on_quadratics_one_step_descends_the_loss_and_the_variance(M):
    """mean g_i(w + v_i) = grad F + beta grad r, for every beta; grad r by central differences."""
    task = quadratics(N=8, K=1)

    def gradients(w):
        return torch.stack([task.gradient(i, w) for i in range(8)])

    def r(w):
        return (gradients(w) - gradients(w).mean(0)).square().sum() / 16

    steps = 1e-4 * torch.eye(4, dtype=f64)
    grad_r = torch.stack([(r(task.w0 + h) - r(task.w0 - h)) / 2e-4 for h in steps])
    for beta in (0.01, 0.5, 20.0):
        f = run(M, task, 1, m=8, beta=beta, clip=0.0)
        expected = gradients(task.w0).mean(0) + beta * grad_r
        assert near((task.w0 - f.w) / 0.1, expected, 1e-6)


def test_alignment_is_bought_with_loss():
    task, r, loss = quadratics(K=1), [], []
    for beta in (0.0, 0.05, 0.2):
        w = run(GradAlign, task, 150, m=4, beta=beta, clip=0.0).w
        g = torch.stack([task.gradient(i, w) for i in range(4)])
        r.append(float((g - g.mean(0)).square().sum() / 8))
        loss.append(float((task.a * (w - task.b) ** 2).sum()))
    assert r[0] > r[1] > r[2] and loss[0] < loss[1] < loss[2]


# ----------------------------------------------------------------------------------------- FedSynth


def codec(task=None, seed=1, w=None, **settings):
    """FedSynth's codec for client 1, whose images are of all classes, and a vector to send [d]."""
    task = task or Linear(sizes=(12, 12))
    small = {"fs_steps": 25, "fs_batches": 3, "fs_images": 2, "fs_step": 0.3, "fs_rate_step": 0.02}
    method = FedSynth(task, **({"fs_format": "float32"} | small | settings))
    batches = task.plan(1, torch.Generator().manual_seed(seed))
    w = task.w0 if w is None else w
    return method.codec(None, {"w": w}, batches), 0.05 * normal(len(w), seed=7)


def test_with_the_clients_own_batches_the_server_replays_its_update():
    """M = K batches, a = lr, hard labels: x_hat is what FedAvg's client would have sent."""
    task = Linear(sizes=(12, 12))
    settings = {"fs_batches": 3, "fs_images": 4, "fs_format": "float32", "clip": 0.0}
    method, received = FedSynth(task, **settings), {"w": task.w0}
    batches = task.plan(1, seeded())
    sent, _ = method.train(received, {}, batches, 0.1)
    images = [task.examples(batch) for batch in batches]
    X = torch.stack([x for x, _, _ in images])
    Y = torch.stack([1e3 * F.one_hot(y, 3).to(f64) for _, y, _ in images])
    server = method.codec(None, received)  # it has no batches
    buffer = server.pack(synth.Synthetic(X, Y, torch.tensor(0.1, dtype=f64)))
    assert near(server.decode(buffer, 51), sent["update"]) and sent["update"].norm() > 0.01
    assert len(buffer) == message_bytes(method, task.image_shape, 3, f64)
    swapped = server.pack(synth.Synthetic(X.flip(0), Y.flip(0), torch.tensor(0.1, dtype=f64)))
    assert not near(server.decode(swapped, 51), sent["update"], 1e-6)  # the order counts


@pytest.mark.parametrize("objective", ["data", "update"])
def test_the_server_of_fedsynth_needs_the_buffers_and_the_model_alone(objective):
    """A server elsewhere, with other seeds and settings of learning, makes the same model."""
    f, buffers, calls = started(FedSynth, fs_objective=objective), [], []
    visits = f.visits
    f.method.gradient_of = lambda loss, w: calls.append(1) or fl.autograd(loss, w)

    def overheard(*arguments):
        for sent, mine in visits(*arguments):
            buffers.append(sent["update"])
            yield sent, mine

    f.visits = overheard
    f.round()
    other = started(FedSynth, seed=5, fs_objective=objective, fs_steps=50, lr=0.7)
    server = other.method.codec(None, {"w": f.task.w0})
    mean = torch.stack([server.decode(b, 51) for b in buffers]).mean(0)
    assert near(f.w, f.task.w0 + mean) and mean.norm() > 0
    assert (len(calls) == 0) == (objective == "data")  # no local steps with "data"


@pytest.mark.parametrize(
    "format, pixel, extra", [("float32", 4, 0), ("float16", 2, 0), ("uint8", 1, 8)]
)
def test_a_message_takes_the_bytes_of_its_formula(format, pixel, extra):
    c, x = codec(w=Linear().w0.float(), fs_format=format, fs_steps=1)
    c.task.x = c.task.x.float()
    buffer = c.encode(x.float(), seeded())
    assert len(buffer) == pixel * 6 * 16 + 4 * (6 * 3 + 1) + extra + 4
    assert len(buffer) == message_bytes(c.settings, (1, 4, 4), 3)
    assert c.decode(buffer, 51).dtype == torch.float32


def test_image_formats_keep_to_their_error():
    def back(x, format):
        return fedsynth.read_images(fedsynth.write_images(x, format), x.shape, format, x.dtype)

    x = 3 * normal(2, 5, 1, 4, 4)
    assert torch.equal(back(x, "float32"), x)
    half, bytes_ = back(x, "float16"), back(x, "uint8")
    assert ((half - x).abs() <= x.abs() / 2**11 + 2**-25).all() and not torch.equal(half, x)
    error = (bytes_ - x).abs().max() / (x.max() - x.min())
    assert 1 / 600 < error <= 1 / 510 + 1e-12 and bytes_.min() == x.min()
    for format in ("float32", "float16", "uint8"):  # the ends of the floats; images that are equal
        for values in ([7.0, 7.0], [3e38, -3e38], [1e-42, 0.0]):
            assert back(torch.tensor(values), format).isfinite().all()
        assert torch.equal(back(torch.full((4,), 7.0), format), torch.full((4,), 7.0))


@pytest.mark.parametrize("format", ["float32", "float16", "uint8"])
def test_damaged_and_forged_messages_raise_value_error(format):
    c, x = codec(fs_format=format, fs_steps=2)
    good = c.encode(x, seeded())
    learnt = c.unpack(good)
    forged = [learnt._replace(step=torch.tensor(a, dtype=f64)) for a in (math.nan, 1e308)]
    flipped = good ^ (torch.arange(len(good)) == 9).to(torch.uint8)
    bad = [
        good[:-1],
        good.float(),
        None,
        flipped,
        seal(good[:-5]),
        seal(good),
        *map(c.pack, forged),
    ]
    for buffer in bad:
        with pytest.raises(ValueError):
            c.decode(buffer, 51)
    for seed in range(50):  # the right length and checksum, and any content
        noise = torch.randint(0, 256, (len(good) - 4,), generator=seeded(seed), dtype=torch.uint8)
        try:
            assert c.decode(seal(noise), 51).isfinite().all()
        except ValueError:
            pass


@pytest.mark.parametrize("format", ["float32", "float16", "uint8"])
def test_a_client_learns_images_that_lower_its_objective(format):
    c, x = codec(fs_objective="data", fs_format=format)
    before = float(c.task.loss(c.w, c.batches[0]))
    after = float(c.task.loss(c.w + c.decode(c.encode(x, seeded()), 51), c.batches[0]))
    assert after < 0.7 * before
    c, x = codec(fs_format=format)
    error = (c.decode(c.encode(x, seeded()), 51) - x).square().sum() / x.square().sum()
    guess = c.first_guess(seeded(3))
    assert error < 0.8 and error < 0.8 * c.objective(guess, x)
    replayed = (c.decode(c.pack(guess), 51) - x).square().sum() / x.square().sum()
    assert near(c.objective(guess, x), replayed)  # the learning sees what the server will replay
    start, end = c.first_guess(seeded()), c.unpack(c.encode(x, seeded()))
    assert all(not torch.allclose(a, b) for a, b in zip(start, end))  # all three are learnt


def test_a_message_is_never_worse_than_none_and_feedback_telescopes():
    c, x = codec(fs_step=50.0, fs_steps=2)  # steps far too long
    assert c.objective(c.first_guess(seeded()), x) > 1
    assert not c.decode(c.encode(x, seeded()), 51).any()
    c, x = codec(fs_steps=10)
    assert not c.decode(c.encode(0 * x, seeded()), 51).any()
    e, sent = torch.zeros_like(x), 0
    for t in range(4):
        owed = (e + x).norm()
        buffer, e = with_feedback(c, x, e, seeded(t))
        sent = sent + c.decode(buffer, 51)
        assert e.norm() <= owed
    assert near(sent + e, 4 * x) and sent.any()


def test_labels_start_from_the_clients_own_and_real_batches_take_turns():
    c, x = codec(Linear(sizes=(12, 3, 10)), fs_labels=2.0)  # client 1 has a short batch
    own = torch.cat([c.task.examples(b)[1][b[:, 0] >= 0] for b in c.batches]).repeat(2)
    guess = c.first_guess(seeded())
    assert torch.equal(guess.logits.view(-1, 3), 2.0 * F.one_hot(own[:6], 3))
    c, x = codec(fs_objective="data")
    guess = c.first_guess(seeded())
    end = c.w + c.decode(c.pack(guess), 51)
    for s in range(5):
        assert near(c.objective(guess, x, s), c.task.loss(end, c.batches[s % 3]))


def test_each_of_the_three_rates_is_its_own_and_nan_is_refused():
    names = ("fs_rate_images", "fs_rate_labels", "fs_rate_step")
    for k, name in enumerate(names):
        c, x = codec(fs_objective="data", **(dict.fromkeys(names, 0.0) | {name: 0.02}))
        start, end = c.first_guess(seeded()), c.unpack(c.encode(x, seeded()))
        assert [not torch.equal(a, b) for a, b in zip(start, end)] == [k == i for i in range(3)]
    c, x = codec(fs_objective="data")
    c.task.loss = lambda w, batch: w.sum() * math.nan
    with pytest.raises(FloatingPointError, match="step size"):
        c.encode(x, seeded())


# ------------------------------------------------------------------------------- label calibration


def test_label_calibration_has_the_derivative_of_its_equation():
    """p_j S - target_j, image by image; a row of padding counts nowhere."""
    y, real = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([True] * 5 + [False])
    n, classes = [3, 1, 1, 0, 0], 5
    scores = normal(6, classes).requires_grad_()
    each = calibrated_loss(scores, y, real)
    (derivative,) = torch.autograd.grad(each.sum(), scores)
    for b in range(5):
        p, n_y = scores[b].detach().softmax(0), n[y[b]]
        target = torch.tensor(
            [float(j == y[b]) + float(p[j]) * (n_y - n[j]) / n_y for j in range(classes)], dtype=f64
        )
        assert near(derivative[b], p * target.sum() - target)
        assert near(each[b], -(target * scores[b].log_softmax(0)).sum())
    assert each.isfinite().all()


def test_label_calibration_of_a_balanced_batch_is_cross_entropy():
    scores, y, real = normal(6, 3), torch.arange(6) % 3, torch.ones(6, dtype=torch.bool)
    assert near(calibrated_loss(scores, y, real), F.cross_entropy(scores, y, reduction="none"))
    task = Linear()
    balanced = torch.cat([(task.y == c).nonzero()[:2, 0] for c in range(3)])
    batch = in_batches(balanced, 8)[0]  # with two rows of padding
    assert near(LabelCal(task).loss(task.w0, batch), task.loss(task.w0, batch))
    skewed = in_batches(balanced[:3], 8)[0]
    assert not near(LabelCal(task).loss(task.w0, skewed), task.loss(task.w0, skewed), 1e-3)


def test_label_calibration_is_in_both_gradients_of_sam():
    class Both(LabelCal, FedSAM):
        """The ascent and the step minimise the calibrated loss."""

    f, task = started(Both, rho=0.3), Linear()
    batch = task.everything(1)[0]

    def grad(w):
        return fl.autograd(lambda v: f.method.loss(v, batch), w)

    u = grad(task.w0)
    assert not near(u, slow_gradient(task, task.w0, batch), 1e-3)
    point, _ = f.method.point(task.w0, batch, {}, {})
    assert near(point, task.w0 + 0.3 * u / u.norm())


# ------------------------------------------------------------------------------- FedGloSS, FedWMSAM


def test_fedgloss_along_the_true_step_is_fedlesam_d():
    """The same path, e apart, at full participation and without weight decay."""

    class TrueStep(FedGloSS):
        def aggregate(self, w, mean, lr_sum, share):
            new = super().aggregate(w, mean, lr_sum, share)
            self.state = self.state | {"p": new - w}
            return new

    assert near(run(TrueStep, m=5, rho=0.2).w, run(FedLESAM_D, m=5, rho=0.2).w)
    assert not near(run(FedGloSS, m=5, rho=0.2).w, run(FedLESAM_D, m=5, rho=0.2).w, 1e-4)


def test_with_one_step_a_round_fedwmsam_does_not_know_rho():
    task = quadratics(K=1)
    assert torch.equal(run(FedWMSAM, task, rho=0.0).w, run(FedWMSAM, task, rho=5.0).w)
    assert not near(run(FedWMSAM, rho=0.0).w, run(FedWMSAM, rho=0.5).w, 1e-4)


def test_fedwmsam_alpha_stays_in_its_bounds_and_grows_with_disagreement():
    f = started(FedWMSAM, alpha_rate=0.5)
    alphas = [0.1]
    for _ in range(6):
        f.round()
        alphas.append(float(f.method.state["alpha"]))
    assert alphas[1] == pytest.approx(0.1) and all(0.1 <= a <= 0.9 for a in alphas)
    m = f.method.state["momentum"]
    across = m.roll(1) - m * (m.roll(1) @ m) / (m @ m)
    found = [
        float(f.method.collect({"update": x}, 1.0)["disagreement"]) for x in (-m, across, m, 0 * m)
    ]
    assert found == pytest.approx([0, 1, 2, 0], abs=1e-12)


def test_fedwmsam_ascends_along_its_momentum():
    """<e, m_i> > 0 after the first step, for a small lr; the first step has no perturbation."""
    seen = []

    class Spy(FedWMSAM):
        def direction(self, w, batch, received, mine):
            u = super().direction(w, batch, received, mine)
            seen.append((float(mine["b"]), float(u @ self.personal_momentum(received, mine))))
            return u

    f = run(Spy, lr=1e-3, rounds=2)
    seen.clear()
    f.round()
    assert all((inner == 0) if b == 0 else (inner > 0) for b, inner in seen)
    assert {b for b, _ in seen} >= {0.0, 1.0}
