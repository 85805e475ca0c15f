# ----------------------------------------------------------------------------------------- fl
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fl
import synth
from compress import QSGD, Identity, TopK
from fl import SCAFFOLD, DynaFed, FedAvg, FedLESAM, FedSAM, FedSynSAM
from tests import toys
from vision import data, models, task

f64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


# ---- fl, to be pasted from here
def fl_plain_round(net, clients, lr, rho, k):
    """A round of FedAvg (rho = 0) or FedSAM with top-k, written with nothing but PyTorch.

    clients: for each of them the list of its batches (x, y) -> (w^t [d], w^{t+1} [d]).
    """
    w = parameters_to_vector(net.parameters()).detach()

    def gradient(v, x, y):
        vector_to_parameters(v, net.parameters())
        loss = F.cross_entropy(net(x), y)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    received = []
    for batches in clients:
        v = w
        for x, y in batches:
            u = gradient(v, x, y)
            v = v - lr * gradient(v + rho * u / u.norm(), x, y)
        update = v - w
        places = update.abs().topk(k).indices
        received.append(torch.zeros_like(w).index_copy(0, places, update[places]))
    return w, w + torch.stack(received).mean(0)


def fl_plain_cnn():
    """The cnn of width 2 and hidden 8, made of PyTorch's own layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * 7 * 7, 8), nn.ReLU(), nn.Linear(8, 10)),
    ).double()


@pytest.mark.parametrize("M, setting, kept", [(FedAvg, {}, 1.0), (FedSAM, {"rho": 0.05}, 0.1)])
def test_fl_a_round_is_what_plain_pytorch_computes(M, setting, kept):
    images = data.load("bundled", dtype=f64).train
    model = models.build("cnn", (1, 28, 28), 10, width=2, hidden=8, seed=3, dtype=f64)
    parts, d = list(torch.arange(120).split(30)), len(model.w0)
    learnt = task.Images(model, images, parts, batch=8, local_steps=3)
    k = round(kept * d)
    federation = fl.Federation(M(learnt, lr=0.1, clip=0.0, **setting), TopK(k, f64), 4)

    torch.manual_seed(3)
    net, pixels = fl_plain_cnn(), images.x.double() / 255
    pixels = (pixels - pixels.mean()) / pixels.std(correction=0)
    plans = [learnt.plan(i, fl.rng(0, "batches", 0, i))[..., 0] for i in range(4)]
    clients = [[(pixels[n], images.y[n]) for n in numbers] for numbers in plans]
    w, new = fl_plain_round(net, clients, 0.1, setting.get("rho", 0), k)

    # convolution weights lie in another order in model.w0: `place` says where PyTorch's are
    place = torch.cat([p.flatten() for p in models.unflatten(torch.arange(d), model.shapes)])
    federation.round()
    assert torch.equal(model.w0[place], w) and (new - w).norm() > 0.01
    assert torch.allclose(federation.w[place], new, rtol=1e-9, atol=1e-12)


FL_SMALL = dict(warmup=2, window=2, outer_steps=2, inner_steps=2, ipc=1, finetune_epochs=2)
FL_WIRES = [
    dict(compressor=Identity(f64)),
    dict(compressor=QSGD(7, "max", 16, f64)),
    dict(compressor=TopK(9, f64), error_feedback=True),
]
FL_METHODS = [FedAvg, SCAFFOLD, FedSAM, FedLESAM, DynaFed, FedSynSAM]


def fl_federation(M, learnt=None, compressor=Identity(f64), loop=fl.Federation, seed=0, **given):
    """A federation of method class M; `given` are settings of the method or of the loop."""
    names = ("participation", "average", "error_feedback")
    ours = {"participation": 3} | {n: given.pop(n) for n in names if n in given}
    small = {name: value for name, value in FL_SMALL.items() if hasattr(M, name)}
    method = M(learnt or toys.Linear(), seed, **small | given)
    return loop(method, compressor, **ours)


def fl_after(rounds, *args, **given):
    federation = fl_federation(*args, **given)
    for _ in range(rounds):
        federation.round()
    return federation


def fl_quadratics(N=5, d=4, **more):
    return toys.Quadratics(1 + randn(N, d).abs(), randn(N, d, seed=1), **more)


# What FedAvg is, in closed form.


@pytest.mark.parametrize("average", ["uniform", "size"])
def test_fl_fedavg_on_quadratics_is_its_closed_form(average):
    """K steps from w end at b_i + (1 - lr a_i)^K (w - b_i)."""
    K, sizes = [3, 1, 4, 1, 5], [2, 7, 1, 8, 2]
    learnt = fl_quadratics(K=K, sizes=sizes)
    given = dict(lr=0.1, lr_decay=0.5, server_lr=0.7, clip=0.0, average=average)
    federation, w = fl_federation(FedAvg, learnt, **given), learnt.w0
    for t in range(4):
        clients = federation.choose()
        weights = torch.tensor([sizes[i] if average == "size" else 1 for i in clients], dtype=f64)
        lr = 0.1 * 0.5**t
        ends = [learnt.b[i] + (1 - lr * learnt.a[i]) ** K[i] * (w - learnt.b[i]) for i in clients]
        w = w + 0.7 * (weights / weights.sum()) @ (torch.stack(ends) - w)
        federation.round()
        assert torch.allclose(federation.w, w, rtol=1e-12, atol=1e-15)


def test_fl_a_method_is_told_the_mean_lr_sum_and_the_share_of_the_clients():
    told = []

    class Spy(FedAvg):
        def aggregate(self, w, mean, lr_sum, share):
            told.append((lr_sum, share))
            return super().aggregate(w, mean, lr_sum, share)

    K, sizes = [3, 1, 4, 1, 5], [2, 7, 1, 8, 2]
    for average, n in (("uniform", [1] * 5), ("size", sizes)):
        given = dict(lr=0.1, lr_decay=0.5, average=average)
        federation = fl_after(2, Spy, fl_quadratics(K=K, sizes=sizes), **given)
        for t, (lr_sum, share) in enumerate(told[-2:]):
            federation.t = t
            chosen = federation.choose()
            total = sum(n[i] for i in chosen)
            assert share == pytest.approx(total / sum(n))
            assert lr_sum == pytest.approx(0.1 * 0.5**t * sum(n[i] * K[i] for i in chosen) / total)


def test_fl_a_step_is_clipped_and_then_decays():
    learnt = toys.Quadratics(torch.ones(1, 3, dtype=f64), 100 * randn(1, 3), K=1)
    learnt.w0 = randn(3, seed=2)
    g = learnt.gradient(0, learnt.w0)
    given = dict(lr=0.1, weight_decay=0.3, participation=1)
    clipped, free = (fl_after(1, FedAvg, learnt, clip=c, **given).w for c in (10.0, 0.0))
    assert g.norm() > 10
    expected = learnt.w0 - 0.1 * (10 * g / g.norm() + 0.3 * learnt.w0)
    assert torch.allclose(clipped, expected, rtol=1e-12)
    assert torch.allclose(free, learnt.w0 - 0.1 * (g + 0.3 * learnt.w0), rtol=1e-12)
    below = fl_after(1, FedAvg, learnt, clip=1e6, **given).w  # a short G is left alone
    assert torch.equal(below, free)


def test_fl_clients_are_drawn_without_replacement_and_equally_often():
    federation, counts = fl_federation(FedAvg, participation=2), torch.zeros(5)
    for federation.t in range(1000):
        clients = federation.choose()
        assert clients == sorted(set(clients)) and len(clients) == 2
        counts[clients] += 1
    assert (counts - 400).abs().max() < 5 * math.sqrt(1000 * 0.4 * 0.6)
    other = fl_federation(SCAFFOLD, participation=2)  # the same for every method, not every seed
    other.t = federation.t
    assert other.choose() == clients
    draws = [fl_federation(FedAvg, seed=s, participation=2).choose() for s in range(20)]
    assert len(set(map(tuple, draws))) > 3


def test_fl_generators_belong_to_their_purpose():
    def first(*purpose):
        return int(torch.randint(2**62, (1,), generator=fl.rng(*purpose)))

    purposes = [
        (s, w, t, i) for s in (0, 1) for w in ("a", "b") for t in range(5) for i in range(5)
    ]
    assert len({first(*p) for p in purposes}) == len(purposes) == 100
    assert first(0, "a", 3, 1) == first(0, "a", 3, 1) != first(0, "a", 31)
    assert all(fl.rng(*p).initial_seed() < 2**63 for p in purposes)


# Limits: a method whose own term is off is its parent, bit for bit.


@pytest.mark.parametrize("wire", FL_WIRES)
@pytest.mark.parametrize(
    "M, off, parent",
    [
        (FedSAM, {"rho": 0.0}, FedAvg),
        (FedLESAM, {"rho": 0.0}, FedAvg),
        (FedSynSAM, {"rho": 0.0}, FedAvg),
        (FedSynSAM, {"mix": 0.0}, FedSAM),
        (SCAFFOLD, {"variate": 0.0}, FedAvg),
        (DynaFed, {"finetune_epochs": 0}, FedAvg),
    ],
)
def test_fl_a_method_whose_term_is_off_is_its_parent(M, off, parent, wire):
    ours, theirs, on = (
        fl_after(4, M, **wire, **off),
        fl_after(4, parent, **wire),
        fl_after(4, M, **wire),
    )
    assert torch.equal(ours.w, theirs.w) and not torch.equal(on.w, theirs.w)
    assert M is SCAFFOLD or ours.bytes_up == theirs.bytes_up


def test_fl_fedsynsam_before_the_synthesis_follows_its_setting():
    for word, parent in (("fedsam", FedSAM), ("fedavg", FedAvg)):
        ours = fl_after(2, FedSynSAM, warmup_method=word)
        assert torch.equal(ours.w, fl_after(2, parent).w)
        ours.round()
        assert not torch.equal(ours.w, fl_after(3, parent).w)


def test_fl_gradients_in_a_step():
    counts = {}
    for M, given in [
        *((M, {}) for M in FL_METHODS),
        (FedSynSAM, {"mix": 1.0}),
        (FedSynSAM, {"mix": 0.0}),
    ]:
        federation, calls = fl_after(3, M, **given), []
        federation.method.gradient_of = lambda f, w: calls.append(1) or fl.autograd(f, w)
        steps = sum(federation.task.steps(i) for i in federation.choose())
        federation.round()
        counts.setdefault(M, []).append(len(calls) / steps)
    assert counts == {
        **{FedAvg: [1], SCAFFOLD: [1], FedSAM: [2], FedLESAM: [1], DynaFed: [1]},
        FedSynSAM: [3, 2, 2],
    }


# Oracles: the equations as slow loops, with clipping, decay, unequal clients and K.


def fl_slow(M, federation, rounds):
    """FedAvg, SCAFFOLD, FedSAM or FedLESAM: w, and c_i of all clients."""
    m, learnt, n = federation.method, federation.task, federation.weights
    w, zero, old = learnt.w0, torch.zeros_like(learnt.w0), {}
    c_i = {i: zero for i in range(len(n))}

    def gradient(w, batch):
        w = w.clone().requires_grad_()
        learnt.loss(w, batch[batch[:, 0] >= 0]).backward()
        return w.grad

    for t in range(rounds):
        federation.t, lr = t, m.lr * m.lr_decay**t
        clients, updates, c = federation.choose(), {}, sum(n[i] * c_i[i] for i in c_i) / sum(n)
        for i in clients:
            x, plan = w, learnt.plan(i, fl.rng(0, "batches", t, i))
            for batch in plan:
                u = {FedSAM: gradient(x, batch), FedLESAM: old.get(i, w) - w}.get(M, zero)
                e = m.rho * u / u.norm() if u.any() else zero
                G = gradient(x + e, batch) + (m.variate * (c - c_i[i]) if M is SCAFFOLD else 0)
                G = G * min(1, m.clip / float(G.norm()))
                x = x - lr * (G + m.weight_decay * x)
            updates[i] = x - w
            c_i[i] = c_i[i] - c - updates[i] / (lr * len(plan)) if M is SCAFFOLD else zero
            old[i] = w
        total = sum(n[i] for i in clients)
        w = w + m.server_lr * sum(n[i] * updates[i] for i in clients) / total
    return w, c_i


@pytest.mark.parametrize("M", [FedAvg, SCAFFOLD, FedSAM, FedLESAM])
@pytest.mark.parametrize("average", ["uniform", "size"])
def test_fl_methods_equal_slow_loops(M, average):
    own = {SCAFFOLD: {"variate": 0.8}, FedSAM: {"rho": 0.3}, FedLESAM: {"rho": 0.3}}.get(M, {})
    given = dict(lr=0.3, lr_decay=0.9, server_lr=0.7, clip=0.8, weight_decay=0.01, **own)
    w, c_i = fl_slow(M, fl_federation(M, average=average, **given), 6)
    federation = fl_after(6, M, average=average, **given)
    assert torch.allclose(federation.w, w, rtol=1e-12, atol=1e-13)
    for i, mine in federation.memory.items():
        assert M is not SCAFFOLD or torch.allclose(mine["c_i"], c_i[i], rtol=1e-12, atol=1e-13)


def test_fl_fedlesam_ascends_along_the_last_global_gradient():
    """With all clients and K = 1, u at round t is grad F(w^{t-1} + ...); round 0 is FedAvg."""
    learnt, rho, stale = fl_quadratics(K=1), 0.2, None
    federation = fl_federation(FedLESAM, learnt, participation=5, lr=0.1, rho=rho, clip=0.0)
    for _ in range(4):
        w = federation.w
        point = w if stale is None else w + rho * stale / stale.norm()
        stale = torch.stack([learnt.gradient(i, point) for i in range(5)]).mean(0)
        federation.round()
        assert torch.allclose(federation.w, w - 0.1 * stale, rtol=1e-12)


def test_fl_fedlesam_remembers_the_model_that_a_client_received_last():
    federation, seen = fl_federation(FedLESAM, participation=2), {}
    for _ in range(8):
        before, clients = federation.w, federation.choose()
        federation.round()
        seen |= dict.fromkeys(clients, before)
        assert {i: mine["w_old"].tolist() for i, mine in federation.memory.items()} == {
            i: w.tolist() for i, w in seen.items()
        }
    assert len(seen) == 5


@pytest.mark.parametrize("wire", FL_WIRES)
@pytest.mark.parametrize("average", ["uniform", "size"])
def test_fl_scaffold_c_is_the_mean_of_all_c_i(average, wire):
    """With every compressor, since server and clients sum up the same decoded vectors."""
    federation = fl_federation(SCAFFOLD, average=average, participation=2, **wire)
    n = federation.weights
    for _ in range(6):
        federation.round()
        mean = sum(n[i] * mine["c_i"] for i, mine in federation.memory.items()) / sum(n)
        c = federation.method.state["c"]
        assert torch.allclose(c, mean, rtol=1e-12, atol=1e-13) and c.norm() > 1e-3


def test_fl_scaffold_c_i_is_the_mean_gradient_of_the_client():
    seen = []

    class Spy(SCAFFOLD):
        def gradient(self, w, batch):
            seen.append(super().gradient(w, batch))
            return seen[-1]

    federation = fl_after(3, Spy, clip=0.0)
    seen.clear()
    clients = federation.choose()
    federation.round()
    for i in clients:
        mine, seen = seen[: federation.task.steps(i)], seen[federation.task.steps(i) :]
        c_i = federation.memory[i]["c_i"]
        assert torch.allclose(c_i, torch.stack(mine).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("participation", [5, 2])
def test_fl_scaffold_removes_the_drift_of_fedavg(participation):
    learnt = fl_quadratics(K=4)
    given = dict(lr=0.1, clip=0.0, participation=participation)
    apart = [
        float((fl_after(100, M, learnt, **given).w - learnt.optimum).norm())
        for M in (FedAvg, SCAFFOLD)
    ]
    assert apart[0] > 1e-2 and apart[1] < 1e-6


# Synthetic data.


def test_fl_mix_one_is_the_same_direction_for_all_clients():
    federation = fl_after(3, FedSynSAM, mix=1.0)
    received, method, w = federation.send_down([0, 1]), federation.method, federation.w
    batches = [federation.plan("train", i)[0] for i in (0, 1)]
    u = [method.direction(w, batch, received, {}) for batch in batches]
    assert torch.equal(*u) and u[0].norm() > 0
    method.mix = 0.5
    u = [method.direction(w, batch, received, {}) for batch in batches]
    assert not torch.allclose(*u) and u[0].norm() <= 1 + 1e-12  # a mean of unit vectors


def test_fl_mix_weighs_the_unit_vectors():
    federation = fl_after(3, FedSynSAM, mix=0.25)
    method, w, batch = federation.method, federation.w, federation.plan("train", 0)[0]
    received = federation.send_down([0])
    own, syn = method.gradient(w, batch), method.synthetic_gradient(w, received)
    u = method.direction(w, batch, received, {})
    assert torch.allclose(u, 0.75 * own / own.norm() + 0.25 * syn / syn.norm(), rtol=1e-12)


def test_fl_synthetic_data_equal_to_all_images_give_the_gradient_of_the_global_loss():
    federation = fl_after(3, FedSynSAM, mix=1.0)
    learnt, method, w = federation.task, federation.method, federation.w
    method.state = method.state | {"X": learnt.x, "Y": 1e3 * F.one_hot(learnt.y, 3).to(f64)}
    federation.informed = set()
    u = method.direction(w, None, federation.send_down([0]), {})
    shares = [n / len(learnt.y) for n in learnt.sizes]
    everything = [torch.cat(list(learnt.everything(i))) for i in range(5)]
    g = sum(s * method.gradient(w, batch) for s, batch in zip(shares, everything))
    assert torch.allclose(u, g, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("resynthesize", [0, 2])
def test_fl_synthesis_gets_the_trajectory_at_its_rounds(resynthesize, monkeypatch):
    calls, models_seen = [], []

    def synthesize(learnt, trajectory, settings, generator):
        assert settings.outer_steps == 2
        calls.append((torch.stack(trajectory), generator.initial_seed()))
        losses = [100.0] * 5 + [float(len(calls))] * 20
        return synth.Synthetic(learnt.x[:3], torch.eye(3, dtype=f64), None), losses

    monkeypatch.setattr(synth, "synthesize", synthesize)
    federation = fl_federation(FedSynSAM, resynthesize=resynthesize)
    for t in range(7):
        models_seen.append(federation.w)
        federation.round()
        assert (federation.method.state["X"] is None) == (t < 2)
    rounds = [2, 4, 6] if resynthesize else [2]
    assert len(calls) == len(rounds) and federation.method.state["matching"] == len(calls)
    for t, (trajectory, seed) in zip(rounds, calls):
        assert torch.equal(trajectory, torch.stack(models_seen[t - 2 : t + 1]))
        assert seed == fl.rng(0, "synthesis", t).initial_seed()
    assert len(federation.method.state["trajectory"]) == (3 if resynthesize else 0)


def test_fl_dynafed_trains_each_new_model_on_the_synthetic_data():
    plain = fl_after(3, FedAvg).w
    tuned = fl_after(3, DynaFed, finetune_epochs=3, finetune_lr=1e-3)
    X, Y, apply = tuned.method.state["X"], tuned.method.state["Y"], tuned.task.apply
    assert torch.equal(tuned.w, synth.finetune(apply, plain, X, Y, 3, 1e-3, 256))
    assert 2e-3 < (tuned.w - plain).abs().max() <= 3e-3 * 1.01  # Adam moves by its rate at most
    before, after = (synth.synthetic_loss(apply, w, X, Y) for w in (plain, tuned.w))
    assert after < before


def test_fl_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="window = 3 is longer than the warmup = 2"):
        fl_federation(DynaFed, window=3)
    with pytest.raises(TypeError, match="FedAvg has no setting rho"):
        fl_federation(FedAvg, rho=0.1)


# Bytes.


def test_fl_bytes_are_the_lengths_of_what_is_sent():
    d, m = 51, 3
    whole, sparse = 8 * d + 4, 4 + math.ceil((9 * 64 + 9 * 6) / 8)
    up = {FedAvg: 1, SCAFFOLD: 2, FedSAM: 1, FedLESAM: 1}
    for M, vectors in up.items():
        plain, topk = fl_after(4, M), fl_after(4, M, compressor=TopK(9, f64))
        assert (
            plain.bytes_up == 4 * m * vectors * whole and topk.bytes_up == 4 * m * vectors * sparse
        )
        assert plain.bytes_down == topk.bytes_down == 4 * m * vectors * whole
    assert fl_after(4, DynaFed).bytes_down == 4 * m * whole  # its images stay on the server


@pytest.mark.parametrize("resynthesize", [0, 2])
def test_fl_synthetic_data_are_sent_once_to_each_client_that_comes(resynthesize):
    federation = fl_federation(FedSynSAM, participation=2, resynthesize=resynthesize)
    whole, parcel, have, expected = 8 * 51 + 4, 8 * (3 * 16 + 3 * 3) + 2 * 4, set(), 0
    for t in range(8):
        clients = set(federation.choose())
        if t == 2 or (resynthesize and t > 2 and t % 2 == 0):
            have = set()
        expected += 2 * whole + (parcel * len(clients - have) if t >= 2 else 0)
        have |= clients
        federation.round()
        assert federation.bytes_down == expected


# Compression and error feedback.


class FlRecording(fl.Federation):
    """The plain loop, which keeps what goes through `encode`."""

    def encode(self, work, i, sent, mine, received, batches):
        buffers, after = super().encode(work, i, sent, mine, received, batches)
        self.records = [*getattr(self, "records", []), (sent, mine, buffers, after)]
        return buffers, after


def test_fl_error_feedback_is_for_the_update_only():
    topk = TopK(9, f64)
    federation = fl_after(6, SCAFFOLD, compressor=topk, loop=FlRecording, error_feedback=True)
    for sent, mine, buffers, after in federation.records:
        owed, arrived = (
            mine["residual of update"] + sent["update"],
            topk.decode(buffers["update"], 51),
        )
        assert torch.allclose(arrived + after["residual of update"], owed, rtol=1e-14)
        assert torch.equal(buffers["update"], topk.encode(owed))
        assert torch.equal(buffers["c_i_change"], topk.encode(sent["c_i_change"]))
    assert max(mine["residual of update"].norm() for _, mine, _, _ in federation.records) > 0
    assert all(
        "residual of update" not in m
        for m in fl_after(1, SCAFFOLD, compressor=topk).memory.values()
    )


def test_fl_memory_of_clients_that_rest_does_not_change():
    federation = fl_federation(
        SCAFFOLD, compressor=TopK(3, f64), participation=2, error_feedback=True
    )
    for _ in range(8):
        before, clients = dict(federation.memory), federation.choose()
        federation.round()
        for i, mine in before.items():
            assert all(torch.equal(x, federation.memory[i][n]) for n, x in mine.items()) == (
                i not in clients
            )


def test_fl_compressed_rounds_are_right_on_the_mean():
    learnt, ends = fl_quadratics(K=2), []
    for seed in range(200):
        ends.append(
            fl_after(1, FedAvg, learnt, QSGD(2, "l2", 0, f64), seed=seed, participation=5).w
        )
    exact, ends = fl_after(1, FedAvg, learnt, participation=5).w, torch.stack(ends)
    error = ends.std(0) / 200**0.5
    assert error.min() > 0 and ((ends.mean(0) - exact).abs() <= 4.5 * error).all()


def test_fl_unbiased_compression_reaches_a_neighbourhood_that_shrinks_with_lr_and_levels():
    def distance(lr, levels):
        learnt, tail = fl_quadratics(K=1), []
        given = dict(compressor=QSGD(levels, "l2", 0, f64), participation=5, lr=lr, clip=0.0)
        federation = fl_after(int(6 / lr), FedAvg, learnt, **given)
        for _ in range(60):
            federation.round()
            tail.append(float((federation.w - learnt.optimum).square().sum()))
        return np.mean(tail)

    coarse, small, fine = distance(0.2, 1), distance(0.05, 1), distance(0.2, 4)
    start = float(fl_quadratics().optimum.square().sum())
    assert coarse < 0.5 * start and small < 0.5 * coarse and fine < 0.5 * coarse


def test_fl_topk_stalls_without_error_feedback_and_converges_with_it():
    a, b = torch.ones(3, 6, dtype=f64), randn(3, 6, seed=4)
    learnt = toys.Quadratics(a, b * torch.tensor([3.0, 1, 1, 1, 1, 1]), K=1)
    given = dict(compressor=TopK(1, f64), participation=3, lr=0.05)
    without, with_it = (
        float((fl_after(250, FedAvg, learnt, error_feedback=f, **given).w - learnt.optimum).norm())
        for f in (False, True)
    )
    assert without > 0.2 * learnt.optimum.norm() and with_it < 0.2 * without


# The loop.


class FlBackwards(fl.Federation):
    """Visits the clients in another order."""

    def visits(self, work, clients, received, lr):
        replies = {i: self.visit(work, i, received, lr) for i in reversed(clients)}
        return [replies[i] for i in clients]


@pytest.mark.parametrize("wire", FL_WIRES)
@pytest.mark.parametrize("M", FL_METHODS)
def test_fl_a_run_repeats_and_does_not_depend_on_the_order_of_the_clients(M, wire):
    once, again = fl_after(5, M, **wire), fl_after(5, M, loop=FlBackwards, **wire)
    assert torch.equal(once.w, again.w) and once.bytes_up == again.bytes_up
    assert not torch.equal(once.w, fl_after(5, M, seed=1, **wire).w)


def test_fl_numbers_that_are_not_finite_are_named():
    learnt = fl_quadratics()
    with pytest.raises(FloatingPointError, match=r"round \d+, client \d: its update is not finite"):
        fl_after(50, FedAvg, learnt, lr=1e200, clip=0.0)
    with pytest.raises(FloatingPointError, match="round 0: the new global model is not finite"):
        fl_after(1, FedAvg, fl_quadratics(), lr=0.2, server_lr=1e308, clip=0.0, participation=1)


# w @ (1, 2, ..., d) after five rounds on toys.Linear, and bytes up and down, for each of FL_WIRES.
FL_FROZEN = {
    "FedAvg": [
        (35.92039949905576, 6180, 6180),
        (33.89020090605943, 930, 6180),
        (28.101599953783186, 1245, 6180),
    ],
    "SCAFFOLD": [
        (33.573577532685746, 12360, 12360),
        (32.2711224346465, 1860, 12360),
        (31.372748525687246, 2490, 12360),
    ],
    "FedSAM": [
        (37.75247537374548, 6180, 6180),
        (35.94357611309117, 930, 6180),
        (29.160446587568178, 1245, 6180),
    ],
    "FedLESAM": [
        (36.901361989279785, 6180, 6180),
        (34.79089730417555, 930, 6180),
        (25.873162627875114, 1245, 6180),
    ],
    "DynaFed": [
        (35.85678736969959, 6180, 6180),
        (33.820709737284204, 930, 6180),
        (28.01058874064952, 1245, 6180),
    ],
    "FedSynSAM": [
        (37.51232128870743, 6180, 8036),
        (35.64298501907954, 930, 8036),
        (27.830894095631532, 1245, 8036),
    ],
}


@pytest.mark.parametrize("M", FL_METHODS)
def test_fl_results_are_those_that_were_stored(M):
    """In float64, so that no processor changes a digit that is compared."""
    for wire, (expected, up, down) in zip(FL_WIRES, FL_FROZEN[M.__name__], strict=True):
        federation = fl_after(5, M, **wire)
        found = float(federation.w @ torch.arange(1.0, 52).to(f64))
        assert found == pytest.approx(expected, rel=1e-10)
        assert (federation.bytes_up, federation.bytes_down) == (up, down)
