"""methods/ours.py and trials of lab/ (directions, uplinks) against their formulas, in float64."""

import pytest
import torch

import fl
import run
import sam
from compress import Identity, Sign
from lab import directions as D
from lab import uplinks
from methods.oracle import Oracle
from methods.ours import FedSynSAM_Debiased, FedSynSAM_Descent
from tests import check_method
from tests.check_compressor import check_compressor
from tests.toys import Linear, f64, normal

SMALL = {"warmup": 2, "window": 2, "outer_steps": 3, "inner_steps": 2, "ipc": 1, "lr": 0.3}


def federation(M, rounds=0, **settings):
    settings = {k: v for k, v in (SMALL | settings).items() if hasattr(M, k)}
    f = fl.Federation(M(Linear(), **settings), Identity(f64), participation=3)
    for _ in range(rounds):
        f.round()
    return f


def asked(f, i=None, step=1):
    """What a client's `direction` gets in its step: (w, batch, received, mine, batches)."""
    i = max(range(len(f.task.sizes)), key=f.task.steps) if i is None else i
    batches = f.plan("train", i)
    f.method.prepare(f.t, f.w)
    received = f.send_down([i])
    mine, w = f.recall(i, received), f.w
    for batch in batches[:step]:
        w, mine = f.method.step(w, batch, received, mine, 0.3)
    return w, batches[step], received, mine, batches


def gradient(f, w, batch):
    return fl.autograd(lambda v: f.task.loss(v, batch), w)


def synthetic(f, w):
    X, Y = f.method.state["X"], f.method.state["Y"]

    def loss(v):
        return -(Y.softmax(1) * f.task.apply(v, X).log_softmax(1)).sum(1).mean()

    return fl.autograd(loss, w)


def test_directions_of_other_images():
    f = federation(D.AnotherBatch)
    w, batch, received, mine, batches = asked(f)
    assert torch.equal(f.method.direction(w, batch, received, mine), gradient(f, w, batches[0]))
    assert not f.method.direction(w, batch, received, f.recall(1, received)).any()
    f = federation(D.AnotherClient)
    w, batch, received, mine, _ = asked(f)
    foreign = f.method.direction(w, batch, received, mine)
    assert torch.equal(foreign, gradient(f, w, received["foreign"]))
    drawn = set()
    for _ in range(12):
        f.round()
        drawn |= {tuple(f.method.state["foreign"][:, 0].tolist())}
    assert len(drawn) > 4
    f = federation(D.OnceARound, oracle_images=7)
    w, batch, received, mine, _ = asked(f)
    true = gradient(f, f.w, f.task.balanced(7, fl.rng(f.method.seed, "oracle")))
    assert not torch.equal(w, f.w)
    assert torch.allclose(f.method.direction(w, batch, received, mine), true, atol=1e-12)
    f = federation(D.Negative)
    w, batch, received, mine, _ = asked(f)
    assert torch.equal(f.method.direction(w, batch, received, mine), -gradient(f, w, batch))
    f = federation(D.Random)
    w, batch, received, mine, batches = asked(f)
    u = f.method.direction(w, batch, received, mine)
    assert torch.equal(u, f.method.direction(w, batch, received, mine))
    assert not torch.equal(u, f.method.direction(w, batches[0], received, mine))


def test_the_direction_of_the_whole_client():
    class Seen(D.WholeClient):
        def direction(self, w, batch, received, mine):
            u = super().direction(w, batch, received, mine)
            seen.append((w, u, mine["images"]))
            return u

    seen, f = [], federation(Seen)
    received, batches = f.send_down([0]), f.plan("train", 0)
    _, mine = f.method.train(received, f.recall(0, received), batches, 0.3)
    rows = sorted(set(map(tuple, batches.reshape(-1, 4).tolist())))
    for w, u, images in seen:
        assert sorted(map(tuple, images.tolist())) == rows
        each = [gradient(f, w, torch.tensor([row])) for row in rows if row[0] >= 0]
        assert torch.allclose(u, torch.stack(each).mean(0), atol=1e-12)
    assert len(seen) == len(batches) and mine["images"].shape == (0, 4)


def test_debiased_keeps_what_a_batch_has_of_its_own():
    f = federation(FedSynSAM_Debiased, 3)
    received = f.send_down([0])
    w, mine, gradients = f.w, f.recall(0, received), []
    for batch in f.plan("train", 0):
        gradients.append(gradient(f, w, batch))
        u = gradients[-1] - torch.stack(gradients).mean(0) + synthetic(f, w)
        expected = w + f.method.rho * u / u.norm()
        point, after = f.method.point(w, batch, received, mine)
        assert torch.allclose(point, expected, atol=1e-12)
        w, mine = f.method.step(w, batch, received, mine, 0.3)
        assert torch.equal(after["g_sum"], mine["g_sum"])
    mine = f.method.upload(w, received, mine, 1.0)[1]
    assert not mine["g_sum"].any() and not mine["g_count"].any()


@pytest.mark.parametrize("pull", [0.0, 0.3, 1.0])
def test_descent_moves_along_the_synthetic_gradient_too(pull):
    f = federation(FedSynSAM_Descent, 3, pull=pull, mix=1.0, clip=0.0)
    w, batch, received, mine, _ = asked(f, step=0)
    g = gradient(f, sam.perturb(w, synthetic(f, w), f.method.rho), batch)
    expected = w - 0.3 * ((1 - pull) * g + pull * synthetic(f, w))
    assert torch.allclose(f.method.step(w, batch, received, mine, 0.3)[0], expected, atol=1e-12)


@pytest.mark.parametrize("warmup_method", ["fedavg", "fedsam"])
@pytest.mark.parametrize("M", [FedSynSAM_Debiased, FedSynSAM_Descent], ids=str)
def test_before_the_synthesis_they_are_their_parent(M, warmup_method):
    f = federation(M, 2, warmup_method=warmup_method)
    parent = fl.FedAvg if warmup_method == "fedavg" else fl.FedSAM
    assert torch.equal(f.w, federation(parent, 2).w)


def test_class_means_are_means_of_each_class_and_are_sent_once_as_learnt_images_are():
    f = federation(D.ClassMeans, 2, warmup=1, window=1)
    rows = f.task.balanced(sum(f.task.sizes), fl.rng(f.method.seed, "class means"))[:, 0]
    for c, mean in enumerate(f.method.state["X"]):
        members = [f.task.x[i] for i in rows.tolist() if f.task.y[i] == c]
        assert len(members) > 1 and torch.allclose(mean, sum(members) / len(members), atol=1e-12)
    assert torch.equal(f.method.state["Y"].argmax(1), torch.arange(3))
    learnt = federation(fl.FedSynSAM, 2, warmup=1, window=1)
    assert f.bytes_down == learnt.bytes_down > federation(fl.FedSAM, 2).bytes_down
    w, batch, received, mine, _ = asked(f)
    u = f.method.direction(w, batch, received, mine)
    assert torch.allclose(u, synthetic(f, w), atol=1e-12)


@pytest.mark.parametrize("M", [D.AnotherBatch, D.AnotherClient, D.OnceARound, D.ClassMeans])
def test_trials_keep_the_rules(M):
    check_method.check_method(M)


def test_the_oracle_of_many_images_is_the_oracle_but_for_rounding():
    federation, _ = run.compose(run.resolve(algo="lab/directions.py:ManyImages", visit="plain"))
    method, w = federation.method, federation.w
    rounded, exact = (M.direction(method, w, None, {}, {}) for M in (type(method), Oracle))
    assert rounded.dtype == w.dtype and not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, 0) > 0.99


@pytest.mark.parametrize("C", [uplinks.BucketSign, uplinks.RandomSign], ids=str)
def test_uplinks_of_one_bit_keep_their_word(C):
    check_compressor(C)


def test_a_sign_with_a_scale_for_each_bucket_is_the_sign_of_each_bucket():
    x, c = normal(11), uplinks.BucketSign(f64, 4)
    parts = [Sign(f64).decode(Sign(f64).encode(part), len(part)) for part in x.split(4)]
    assert torch.equal(c.decode(c.encode(x), 11), torch.cat(parts))
    drawn = uplinks.RandomSign(f64, 4).decode(uplinks.RandomSign(f64, 4).encode(x), 11)
    sizes = [part.abs().max() for part in x.split(4) for _ in part]
    assert torch.equal(drawn.abs(), torch.stack(sizes))
