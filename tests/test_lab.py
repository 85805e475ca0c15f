"""The lab: intervals and verdicts against scipy and by hand, measures against dense Hessians and
closed forms, claims and presets that are legal, stored rows that give the stored tables, and each
command once at a tiny size.

    python -m pytest tests/test_lab.py
"""

import collections
import copy
import functools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy import stats
from torch.nn import functional as F

import compress
import fl
import run
import sam
from lab import (
    claims,
    directions,
    figures,
    measures,
    onebit,
    ours,
    papers,
    presets,
    report,
    study,
    tune,
    verdicts,
    wall,
)
from lab.claim import Claim
from lab.verdicts import Rule, Value
from methods.alignment import FedGA
from methods.ours import FedSynSAM_Debiased
from plumbing.settings import HERE, changes_seconds, parts
from tests.toys import Linear, Quadratics, f64, normal, symmetric
from vision import data, models

RESULTS = HERE / "results"
TINY = study.QUICK | {"rounds": 3, "threads": 1}


def runs(arm, numbers, measure="accuracy"):
    """Rows of a table: one run a seed."""
    return [{"arm": arm, "seed": seed, measure: x} for seed, x in enumerate(numbers)]


# --------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("n", (2, 3, 10))
def test_the_interval_is_students(n):
    x = normal(n, seed=n).numpy()
    mean, low, high = verdicts.interval(x)
    expected = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=x.std(ddof=1) / math.sqrt(n))
    assert (low, high) == pytest.approx(expected) and mean == pytest.approx(x.mean())
    assert verdicts.half_width(x) == pytest.approx((high - low) / 2)
    assert verdicts.interval([1.0, 2.0, 3.0])[2] == pytest.approx(2 + 4.302653 / math.sqrt(3))


def test_p_values_are_those_of_the_paired_test_and_agree_with_the_interval():
    for seed in range(50):
        a, b = normal(3, seed=seed).numpy() + 1, normal(3, seed=seed + 99).numpy()
        p, (_, low, high) = verdicts.p_value(a - b), verdicts.interval(a - b)
        assert p == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert (p <= 0.05) == (not low <= 0 <= high)
    assert verdicts.p_value([2.0, 2.0]) == 0 and verdicts.p_value([0.0, 0.0]) == 1
    assert np.isnan(verdicts.p_value([1.0])) and np.isnan(verdicts.interval([1.0])[1])


def test_holm_by_hand_and_by_its_step_down_definition():
    assert verdicts.holm([0.01, 0.04, np.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True
    )
    for seed in range(20):
        p = np.random.default_rng(seed).random(6) ** 3
        corrected = verdicts.holm(p)
        for alpha in (0.01, 0.05, 0.2):
            rejected = np.zeros(6, dtype=bool)
            for rank, j in enumerate(np.argsort(p)):
                if p[j] > alpha / (6 - rank):
                    break
                rejected[j] = True
            assert ((corrected <= alpha) == rejected).all()


def test_holm_keeps_the_share_of_false_alarms_of_a_whole_claim():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(300):
        p = [verdicts.p_value(rng.standard_normal(3)) for _ in range(8)]
        alarms += (verdicts.holm(p) <= 0.05).any()
    assert alarms / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize(
    "outcomes, word",
    [
        ([1, 1], "Holds"),
        ([1, 0], "Holds in part"),
        ([1, np.nan], "Holds in part"),
        ([1, -1, 0], "Mixed"),
        ([-1, 0], "Refuted"),
        ([0, np.nan], "No significant difference"),
        ([np.nan], "Not decided"),
        ([], "Not decided"),
    ],
)
def test_the_word_of_a_claim(outcomes, word):
    assert verdicts.verdict(outcomes) == word


def test_differences_are_taken_by_seed():
    table = pd.DataFrame(
        runs("a", [10.0, 20.0, 30.0, 1.0, np.nan]) + runs("b", [9, 18, 29, np.nan, 0])
    )
    table = table.sample(frac=1, random_state=0)  # in any order
    found = verdicts.differences(table, Value("a", "accuracy"), Value("b", "accuracy"))
    assert sorted(found) == [1, 1, 2]
    assert not len(verdicts.differences(table, Value("a", "accuracy"), Value("b", "missing")))


def rule(sign, margin=0.0):
    return Rule("", Value("a", "accuracy"), Value("b", "accuracy"), sign, margin)


@pytest.mark.parametrize(
    "sign, margin, a, outcome, word",
    [
        (1, 0, [1.0, 1.1, 0.9], 1, "higher"),
        (-1, 0, [1.0, 1.1, 0.9], -1, "higher"),
        (-1, 0, [-1.0, -1.1, -0.9], 1, "lower"),
        (1, 0, [1.0, -1.0, 0.5], 0, "no significant difference"),
        (1, 1, [-0.5, -0.6, -0.4], 1, "less than 1 lower"),
        (1, 1, [-1.5, -1.6, -1.4], -1, "more than 1 lower"),
        (1, 1, [-1.5, -0.6, -0.4], 0, "not shown to be less than 1 lower"),
        (-1, 1, [0.5, 0.6, 0.4], 1, "less than 1 higher"),
        (0, 0, [1.0, 1.1, 0.9], np.nan, "higher"),
        (1, 0, [1.0], np.nan, "too few seeds"),
    ],
)
def test_one_comparison(sign, margin, a, outcome, word):
    table = pd.DataFrame(runs("a", a) + runs("b", [0.0, 0.0, 0.0]))
    (row,) = [row for _, row in verdicts.compare(table, [rule(sign, margin)]).iterrows()]
    assert row.outcome == pytest.approx(outcome, nan_ok=True) and verdicts.word(row) == word


def test_many_comparisons_are_corrected_and_those_not_judged_do_not_count():
    table = pd.DataFrame(runs("a", [1.0, 1.3, 0.7]) + runs("b", [0.0, 0.0, 0.0]))
    one, alone = [verdicts.compare(table, [rule(1)] * n + [rule(0)] * 9) for n in (2, 1)]
    assert alone.outcome[0] == 1 and one.outcome[0] == 0
    assert one.corrected[0] == pytest.approx(2 * one.p[0])
    assert verdicts.word(one.iloc[0]) == "no significant difference (Holm)"


# --------------------------------------------------------------------------------- measures


def network(name, side=28, **settings):
    """A small network in float64."""
    part = models.NETWORKS[name]
    return models.build(part, (1, side, side), 10, 0, "cpu", dtype=f64, **settings)


def sample(model, side=28, n=40, **more):
    """A Sample of random images, and the same loss written down plainly."""
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (n, 1, side, side), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (n,), generator=g)
    spread = torch.tensor([80.0], dtype=f64)
    images = data.Images(pixels, labels, spread, spread, list(range(10)))
    some = next(images.chunks(n))

    def plain(w):
        return F.cross_entropy(model.apply(w, some.x), some.y)

    return measures.Sample(model.apply, images, **more), plain


def test_both_ends_of_the_spectrum_and_what_is_largest():
    for values in ([-9.0, -1, 2, 3, 7], [0.5, 1, 2, 3, 8]):
        A = symmetric(torch.tensor(values))
        ends = measures.ends(lambda v: A @ v, A[0])
        assert ends == pytest.approx((max(values), min(values)), rel=1e-5)


def test_curvature_of_a_network_is_that_of_its_dense_hessian():
    model = network("mlp", side=5, hidden=3)
    L, plain = sample(model, side=5, chunk=7)
    w = model.w0 + 0.3 * normal(len(model.w0))
    H = torch.func.hessian(plain)(w)
    assert L.loss(w) == pytest.approx(float(plain(w)), rel=1e-12)
    assert torch.allclose(L.gradient(w), torch.func.grad(plain)(w), atol=1e-12)
    values = torch.linalg.eigvalsh(H).tolist()
    assert measures.ends(L.hessian(w), w) == pytest.approx((values[-1], values[0]), rel=1e-4)
    estimate, error = measures.trace(L.hessian(w), w, samples=60)
    assert abs(estimate - H.trace()) < 4 * error


def test_the_trace_is_exact_for_a_diagonal_and_knows_its_error():
    diagonal = torch.linspace(-1, 3, 20, dtype=f64)
    exact = measures.trace(lambda v: diagonal * v, diagonal, samples=2)
    assert exact == pytest.approx((float(diagonal.sum()), 0), abs=1e-9)
    A, n = symmetric(diagonal), 3000
    estimate, error = measures.trace(lambda v: A @ v, A[0], samples=n)
    assert abs(estimate - A.trace()) < 4 * error
    variance = 2 * (A.square().sum() - A.diag().square().sum())
    assert n * error**2 == pytest.approx(float(variance), rel=0.15)


def highest(A, g, rho):
    """max of g'e + e'Ae/2 over the ball: e = (mu I - A)^-1 g with ||e|| = rho, by bisection."""
    values, q = torch.linalg.eigh(A)
    c, low, high = q.T @ g, values[-1], values[-1] + g.norm() / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (c / (mu - values)).norm() > rho else (low, mu)
    e = q @ (c / (high - values))
    return float(g @ e + e @ A @ e / 2)


@pytest.mark.parametrize("least", (0.1, -9.0))
def test_sam_sharpness_is_the_maximum_over_the_ball(least):
    A, rho = symmetric([7.0, 5, least, *torch.linspace(0.2, 4, 37)]), 0.3

    def around(w):
        loss, gradient = (lambda v: float(v @ A @ v / 2)), (lambda v: A @ v)
        return measures.sam_sharpness(loss, gradient, w, rho, steps=100)

    one_step, best = around(torch.zeros(40, dtype=f64))
    assert one_step == 0 and best == pytest.approx(0.5 * 7 * rho**2, rel=1e-6)
    w = 0.1 * normal(40, seed=1)
    g, (one_step, best) = A @ w, around(w)
    e = rho * g / g.norm()
    assert one_step == pytest.approx(float(g @ e + e @ A @ e / 2), rel=1e-9)
    assert best == pytest.approx(highest(A, g, rho), rel=1e-4) and best > one_step + 1e-3


@pytest.mark.parametrize("name", ("mlp", "cnn", "convnet"))
def test_every_filter_of_a_direction_has_the_norm_of_the_models(name):
    model = network(name)
    d = measures.filter_direction(model.w0, model.shapes, seed=3)
    pairs = zip(models.unflatten(model.w0, model.shapes), models.unflatten(d, model.shapes))
    for p, q in pairs:  # as [out, in, H, W], however w stores them
        if p.dim() == 1:
            assert not q.any()
        else:
            norms = p.flatten(1).norm(dim=1), q.flatten(1).norm(dim=1)
            assert torch.allclose(*norms)
            assert (F.cosine_similarity(p.flatten(1), q.flatten(1)).abs() < 0.999).all()
    assert torch.equal(d, measures.filter_direction(model.w0, model.shapes, 3))
    assert not torch.equal(d, measures.filter_direction(model.w0, model.shapes, 4))


@pytest.mark.parametrize("name, side", (("mlp", 7), ("cnn", 28)))
def test_slices_do_not_change_under_a_rescaling_of_relu_layers(name, side):
    model = network(name, side, **({"width": 2, "hidden": 4} if name == "cnn" else {"hidden": 4}))
    L, _ = sample(model, side, n=20)
    scaled = [p.clone() for p in models.unflatten(model.w0, model.shapes)]
    scaled[0], scaled[1], scaled[2] = 5 * scaled[0], 5 * scaled[1], scaled[2] / 5
    at, slices, plain = measures.places(5), [], []
    for w in (model.w0, models.flatten(scaled)):
        d, e = (measures.filter_direction(w, model.shapes, seed) for seed in (0, 1))
        along = measures.line(L.loss, w, d, at)
        square = measures.plane(L.loss, w, d, e, at)
        assert along[2] == square[2][2] == L.loss(w) and along[4] == L.loss(w + d)
        assert square[0][3] == pytest.approx(L.loss(w - d + 0.5 * e), rel=1e-12)
        slices.append(along + square[1])
        plain.append(measures.line(L.loss, w, normal(len(w)) / len(w) ** 0.5, at))
    assert at == [-1, -0.5, 0, 0.5, 1]
    assert slices[0] == pytest.approx(slices[1], rel=1e-8) and np.std(slices[0]) > 1e-3
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)  # what the normalisation is for


# ------------------------------------------------------------------------- clients' directions


def federation(method=fl.FedAvg, compressor=None, task=None, rounds=1, **settings):
    """A federation of the linear toy after some rounds."""
    made = method(task or Linear(), seed=3, **({"lr": 0.1} | settings))
    fed = fl.Federation(made, compressor or compress.Identity(f64), participation=3)
    for _ in range(rounds):
        fed.round()
    return fed


class Toy:
    """The mean loss of all images of the toy, as a Sample."""

    def __init__(self, task):
        self.batch = torch.cat([b for i in range(len(task.sizes)) for b in task.everything(i)])
        self.task = task

    def gradient(self, w):
        return fl.autograd(lambda v: self.task.loss(v, self.batch), w)


def frozen(fed):
    return copy.deepcopy((fed.w, fed.t, fed.bytes_up, fed.bytes_down, fed.informed, fed.memory))


def test_alignment_at_the_model_that_was_sent():
    fed = federation(lr=0.5)
    L, before = Toy(fed.task), frozen(fed)
    true = L.gradient(fed.w)
    first = [fed.plan("train", i)[0] for i in fed.choose()]
    own = [float(sam.unit(fed.method.gradient(fed.w, b)) @ sam.unit(true)) for b in first]
    found = measures.alignment(fed, L, {"last_move": -3 * true}, steps=0)
    assert found["own"] == pytest.approx(np.mean(own)) and found["last_move"] == pytest.approx(1)
    assert found["synthetic"] is None and found["mixed"] is None
    later = [measures.alignment(fed, L, steps=n)["own"] for n in (1, 99, None)]
    assert later[0] != pytest.approx(found["own"]) and later[1] == later[2]
    assert frozen(fed)[1:5] == before[1:5] and torch.equal(fed.w, before[0])


def test_alignment_of_synthetic_data_and_of_the_blend():
    fed = federation(
        fl.FedSynSAM, warmup=2, window=1, ipc=1, outer_steps=1, inner_steps=1, rounds=3
    )
    task = fed.task
    one_hot = 1e3 * F.one_hot(task.y, task.classes).to(f64)
    fed.method.state = fed.method.state | {"X": task.x, "Y": one_hot}  # all images: u is true
    found = measures.alignment(fed, Toy(task), steps=0, mix=0.25)
    assert found["synthetic"] == pytest.approx(1)
    assert found["own"] < found["mixed"] < 1


def test_alignment_of_the_direction_that_a_method_really_uses():
    def found(M, **settings):
        fed = federation(M, rounds=3, **settings)

        return measures.alignment(fed, Toy(fed.task))

    own = found(fl.FedSAM)
    assert own["used"] == own["own"] and found(fl.FedAvg)["used"] is None
    small = {"warmup": 2, "window": 1, "ipc": 1, "outer_steps": 1, "inner_steps": 1}
    mixed = found(fl.FedSynSAM, mix=0.5, **small)
    assert mixed["used"] == pytest.approx(mixed["mixed"]) != mixed["own"]
    alone = found(fl.FedSynSAM, mix=1.0, **small)
    assert alone["used"] == pytest.approx(alone["synthetic"])
    debiased = found(FedSynSAM_Debiased, **small)  # overrides the point, not the direction
    assert debiased["used"] not in (pytest.approx(debiased["synthetic"]), None)
    whole = found(directions.WholeClient)  # has a `train` of its own, which gathers the images
    assert whole["used"] not in (pytest.approx(whole["own"]), None)
    rows = [{"log": [{"alignment": own}, {"alignment": own}]}, {"log": [{"alignment": mixed}]}]
    assert study.cosine(rows[0], "used") == pytest.approx(own["own"])
    assert study.cosine(rows[1], "used") == pytest.approx(mixed["mixed"])


def test_the_walk_is_that_of_the_coming_round():
    fed = federation(directions.AnotherClient, rounds=2)
    foreign = [received["foreign"] for _, _, received, _ in measures.walk(fed)]
    other = measures.twin(fed)
    other.round()
    assert all(torch.equal(x, other.method.state["foreign"]) for x in foreign)
    assert not torch.equal(foreign[0], fed.method.state["foreign"])
    for M in (FedGA, fl.SCAFFOLD):  # FedGA: an exchange comes first
        assert measures.seconds_of_a_step(federation(M, rounds=1), times=1) > 0


@pytest.mark.parametrize("method", (fl.FedAvg, fl.SCAFFOLD, fl.FedLESAM))
def test_the_move_without_compression_is_that_of_an_uncompressed_round(method):
    plain = federation(method, rounds=2)
    lossy = copy.deepcopy(plain)
    lossy.compressor = compress.TopK(5, f64)
    before = frozen(lossy)
    meant, w = measures.move_without_compression(lossy), plain.w
    plain.round()
    assert torch.allclose(meant, plain.w - w)
    assert str(frozen(lossy)) == str(before)  # nothing of the federation has changed
    lossy.round()
    assert not torch.allclose(meant, lossy.w - w)


def test_a_path_goes_downhill_as_far_as_it_follows_minus_the_gradient():
    a, w = normal(6, seed=1).abs() + 1, normal(6, seed=2)
    path = [w]
    for _ in range(5):  # gradient descent: every piece is minus the sum of its gradients
        path.append(path[-1] - 0.1 * a * path[-1])
    assert measures.descending(path, lambda w: a * w, 3) == pytest.approx(1)
    assert measures.descending(path[::-1], lambda w: a * w, 1) < -0.9  # uphill
    assert measures.descending(path, lambda w: a * (w - path[-1]), 5) != pytest.approx(1)
    fed = federation(fl.DynaFed, warmup=3, window=2, resynthesize=9, outer_steps=1, rounds=4)
    L, models = Toy(fed.task), fed.method.state["trajectory"]
    found = [  # by hand: two pieces of two rounds
        F.cosine_similarity(models[p + 2] - models[p], -L.gradient(models[p]) - g, dim=0)
        for p, g in ((0, L.gradient(models[1])), (1, L.gradient(models[2])))
    ]
    assert len(models) == 4 and torch.equal(models[0], fed.task.w0)
    assert measures.measure_path(fed, L)["cos_path"] == pytest.approx(float(sum(found) / 2))
    with pytest.raises(ValueError, match="path needs a method that learns images"):
        measures.measure_path(federation(fl.FedAvg, rounds=1), L)


def test_disagreement_is_half_the_variance_of_the_clients_gradients():
    task = Quadratics(
        normal(4, 6, seed=1).abs(), normal(4, 6, seed=2), sizes=[1, 3, 2, 5], noise=0.1
    )
    w = normal(6, seed=3)
    g = torch.stack([task.gradient(i, w) for i in range(4)])
    r = 0.5 * ((g - g.mean(0)) ** 2).sum(1).mean()
    assert measures.disagreement(task, w) == pytest.approx(float(r))
    task.a[:], task.b[:] = task.a[0], task.b[0]
    alike = Quadratics(task.a, task.b)
    assert measures.disagreement(alike, w) == pytest.approx(0, abs=1e-12)


def test_timing_a_local_step_changes_nothing():
    fed = federation(fl.SCAFFOLD)
    before = str(frozen(fed))
    assert measures.seconds_of_a_step(fed, times=2) > 0 and str(frozen(fed)) == before


# ------------------------------------------------------------------------------------ study


def test_the_digest_of_code_does_not_see_comments_and_docstrings():
    source = 'def f(x):\n    """Twice x."""\n    return 2 * x\n'
    other = "def f(x):  # doubled\n    return 2 * x\n"
    assert study.bare(source) == study.bare(other) != study.bare(other.replace("2", "3"))


def test_images_come_to_the_device_of_the_model():
    images = data.load("bundled", 10, "cpu").val
    there = measures.placed(images, torch.device("meta"))
    assert {x.device.type for x in there if torch.is_tensor(x)} == {"meta"}
    assert there.classes == images.classes and there.y.shape == images.y.shape


def test_the_mean_model_of_a_watch_is_what_swa_judges(tmp_path):
    watch = {"every": 2, "names": ["mean_model"], "mean_from": 1}
    settings = study.fitting(TINY, {"algo": "fedavg", "rounds": 4, "eval_every": 2})
    folder, _, _ = study.train(tmp_path, settings, watch)
    swa = run.experiment(**settings | {"algo": "swa", "swa_start": 1})
    seen = measures.watched(folder)
    for line in swa.log[1::2]:
        found = seen[line["round"]]["mean_model"]
        assert found["test_acc"] == line["test_acc"]
        assert found["val_loss"] == pytest.approx(line["val_loss"], abs=1e-6)
    row = {"log": [line | seen.get(line["round"], {}) for line in swa.log]}
    assert study.mean_model(row) == 100 * swa.log[-1]["test_acc"]
    assert math.isnan(study.mean_model({"log": swa.log}))


def test_a_folder_is_named_by_settings_and_watch_and_not_by_the_machine(tmp_path):
    def name(watch=None, **changes):
        return study.name_of(
            run.resolve(**study.fitting(TINY, {"algo": "fedavg"} | changes)), watch
        )

    assert name() == name(threads=2) == name(checkpoint_every=9)
    others = [name(rounds=4), name(seed=1), name({"every": 2, "names": ["eigenvalue"]})]
    assert len({name(), *others}) == 4 and name().startswith("fedavg-s0-")


def test_an_arm_takes_what_its_parts_have_and_its_own_must_be_legal():
    own = {"algo": "fedavg", "partition": "dirichlet"}
    found = study.fitting({"rho": 0.3, "alpha": 0.5, "rounds": 9}, own)
    assert found == {"alpha": 0.5, "rounds": 9} | own
    assert study.fitting({"rho": 0.3}, {"algo": "fedsam"})["rho"] == 0.3
    with pytest.raises(ValueError, match="rho"):
        run.resolve(**study.fitting({}, {"algo": "fedavg", "rho": 0.1}))


def test_two_processes_share_the_work(tmp_path):
    tries = []

    def busy_twice():
        tries.append(1)
        if len(tries) < 3:
            raise study.Busy("somebody is here")
        return "late"

    assert study.shared([busy_twice, lambda: "early"], wait=0.01) == ["late", "early"]
    alone = functools.partial(study.locked, tmp_path / "x", wait=False)
    with alone(), pytest.raises(study.Busy), alone():
        raise AssertionError
    with alone():
        pass


class Two(Claim):
    """Two arms, in seconds."""

    says, refuted, source = "small things are small", "they are large", "nobody"

    def arms(self, task):
        synthetic = {"algo": "dynafed", "finetune_epochs": 0}
        return {"a": synthetic, "b": synthetic | {"compress": "identity"}}

    def watch(self, task):
        return {"every": 2, "names": ["eigenvalue", "alignment"]}

    def measures(self, seed):
        return {"trace": {"samples": 2}, "slice": {"points": 3}}


def without_time(rows):
    """Rows without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "machine")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of the claim above, and the folder of its runs."""
    root = tmp_path_factory.mktemp("whole")
    return without_time(study.conduct(Two("quick"), root, threads=1)), root


def test_a_row_has_all_that_was_measured(whole):
    rows, root = whole
    assert [row["arm"] for row in rows] == ["a", "b"]
    assert all(len(row["slice"]) == 3 and row["trace"] for row in rows)
    seen = [line for line in rows[0]["log"] if "alignment" in line]
    assert [line["round"] for line in seen] == [2, 4]
    assert all(-1 <= line["alignment"]["last_uncompressed"] <= 1 for line in seen)
    last = seen[1]["alignment"]
    assert last["synthetic"] is not None and last["last_move"] != last["last_uncompressed"]
    uncompressed = rows[1]["log"][-1]["alignment"]
    assert uncompressed["last_move"] == pytest.approx(uncompressed["last_uncompressed"], rel=1e-4)
    assert rows[0]["eigenvalue"] == pytest.approx(seen[1]["eigenvalue"], rel=1e-5)


def test_a_finished_study_does_nothing_and_a_new_measure_needs_no_training(whole, monkeypatch):
    rows, root = whole
    monkeypatch.setattr(fl.Federation, "round", lambda self: pytest.fail("it trains again"))
    assert without_time(study.conduct(Two("quick"), root, threads=1)) == rows
    new = {"eigenvalues": {}}
    monkeypatch.setattr(Two, "measures", lambda self, seed: new)
    again = study.conduct(Two("quick"), root, threads=1)
    assert all(row["largest"] >= row["smallest"] for row in again)
    assert [row["trace"] for row in rows] != [row.get("trace") for row in again]


@pytest.mark.parametrize("after", (1, 3))
def test_a_study_that_was_killed_continues_to_the_same_rows(whole, after, tmp_path, monkeypatch):
    call, rounds = fl.Federation.round, []

    def killed(self):
        rounds.append(1)
        if len(rounds) == after + 1:
            raise KeyboardInterrupt
        call(self)

    one = Two("quick")
    one.arms = lambda task: {"a": Two("quick").arms(task)["a"]}
    monkeypatch.setattr(fl.Federation, "round", killed)
    with pytest.raises(KeyboardInterrupt):
        study.conduct(one, tmp_path, threads=1, checkpoint_every=1)
    assert without_time(study.conduct(one, tmp_path, threads=1)) == whole[0][:1]


def test_a_run_that_diverges_is_a_row_and_stays_one(tmp_path):
    claim = Two("quick")
    claim.arms = lambda task: {"a": {"algo": "fedavg", "lr": 1e30, "clip": 0.0}}
    for _ in range(2):
        (row,) = study.conduct(claim, tmp_path, threads=1)
        assert "not finite" in row["diverged"] or "loss" in row["diverged"]
    table = study.frame([row], run.resolve())
    assert "1, 1 diverged" in verdicts.arms_text(table, ["accuracy"])


def test_eigenvalues_are_compared_where_the_losses_are_equal():
    def log(*pairs):
        return [{"train_loss": a, "eigenvalue": b} for a, b in pairs]

    fast, slow = log((1.0, 10.0), (0.5, 20.0), (0.2, 30.0)), log((2.0, 5.0), (0.6, 40.0))
    # fast passes 0.6 at 4/5 of the way from 10 to 20
    assert study.excess_of(slow, fast) == pytest.approx(40 - 18)
    assert study.excess_of(fast, slow) == pytest.approx(18 - 40)
    assert study.excess_of(fast, fast) == 0
    assert np.isnan(study.excess_of(log((3.0, 1.0), (1.5, 2.0)), fast))  # passed before round one


def test_accuracy_at_equal_bytes_is_that_of_the_rounds_until_then():
    def log(step):
        return [{"up": step * t, "test_acc": t / 100} for t in range(1, 11)]

    table = pd.DataFrame({"up": [10, 20], "log": [log(1), log(2)]})
    assert study.at_equal_bytes(table, last=3).tolist() == pytest.approx([9, 4])


# ----------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    "name, size", [(name, size) for name, kind in claims.CLAIMS.items() for size in kind.sizes]
)
def test_every_arm_of_every_size_is_legal_and_of_its_own(name, size):
    claim = claims.CLAIMS[name](size)
    for task, shared in claim.tasks().items():
        arms = claim.arms(task)
        resolved = [run.resolve(**study.fitting(shared, own)) for own in arms.values()]
        assert len({json.dumps(settings, sort_keys=True) for settings in resolved}) == len(arms)
        watch = claim.watch(task)
        assert watch is None or all(s["rounds"] % watch["every"] == 0 for s in resolved)
        assert all(any(b.startswith(claim.baseline(a)) for b in arms) for a in arms)
    assert set(claim.measures(0)) <= set(measures.MEASURES)
    assert {*claim.columns, *claim.panels} <= set(verdicts.MEASURES)
    assert claim.says and claim.refuted and claim.source
    assert claim.seeds == 1 if size == "quick" else claim.seeds in (3, 4, 5)
    for (place, arm), (shared, grid, _) in claim.searches().items():
        own = getattr(claim, "grids", {})
        assert grid == own.get(arm, own.get(place, tune.GRID.get(shared["algo"], tune.RADII)))
        assert run.resolve(**shared)["val"]


def test_skew_takes_the_settings_that_were_tuned_for_it(tmp_path, monkeypatch):
    claim, lr = ours.Skew("cpu", tmp_path), iter(range(1, 99))
    for split, name in claim.searches():
        found = {"size": "cpu", "world": split, "method": name, "settings": {"lr": next(lr)}}
        tune.enter(tmp_path / "tuned.json", found)
    arms = claim.arms("")
    assert [arms[f"{split}, fedavg"]["lr"] for split in claim.splits] == [1, 1, 0.1, 10]
    assert len({own["lr"] for own in arms.values()}) == 19 and len(arms) == 36
    two = {arm: own for arm, own in arms.items() if arm.startswith("two classes")}
    radii = collections.Counter(own.get("rho") for own in two.values())
    assert radii == {0.1: 7, None: 2}
    seen = []
    monkeypatch.setattr(study, "row_of", lambda claim, root, task, arm, s: seen.append((arm, s)))
    study.conduct(claim, tmp_path)
    counts = collections.Counter(arm for arm, _ in seen)
    assert {arm.split(",")[0]: n for arm, n in counts.items()} == {
        "IID": 3,
        "Dir 0.1": 5,
        "two classes": 3,
        "one class": 5,
    }
    assert tune.SEED not in {s["seed"] for _, s in seen}


def test_default_and_radius_take_only_the_settings_that_were_tuned_for_them(tmp_path):
    default, radius = (kind("cpu", tmp_path) for kind in (onebit.Default, onebit.Radius))
    with pytest.raises(ValueError, match="fedavg is not tuned; .* default --tune"):
        default.check()
    rates = {}
    for n, ((place, algo), (_, grid, seeds)) in enumerate(default.searches().items()):
        assert len(grid) == 2 and seeds == 3
        rates[algo] = 0.1 + n
        found = {"size": "cpu", "world": place, "method": algo, "settings": {"lr": rates[algo]}}
        tune.enter(tmp_path / "tuned.json", found)
    default.check()
    arms = default.arms("")
    assert set(arms) == {*rates, "fedavg, 2 bits", "feddyn, 2 bits"}
    assert all(own["lr"] == rates[own["algo"]] for own in arms.values())
    assert {s["lr"] for _, _, s in study.jobs(radius)} == {0.1}
    both = [{s["seed"] for _, _, s in study.jobs(claim)} for claim in (default, radius)]
    assert not both[0] & both[1] and len(both[0]) == len(both[1]) == 5


@pytest.mark.parametrize("size, d", (("cpu", 50890), ("gpu", 308746)))
def test_messages_of_equal_bytes_are_of_equal_bytes(size, d):
    claim, x = papers.FedSynth(size), normal(d).float()
    for label, own in claim.arms(next(iter(claim.tasks()))).items():
        if "bytes" in label and own["algo"] == "fedavg":
            budget = int(re.search(r"([\d,]+) bytes", label)[1].replace(",", ""))
            part = {"randk": compress.RandK, "topk": compress.TopK}[own["compress"]]
            sent = len(part(k=own["k"]).encode(x, torch.Generator().manual_seed(0)))
            least = 0.99 if size == "cpu" or own["compress"] == "randk" else 0.9
            assert least * budget < sent <= budget, label


def test_fedsynth_sends_as_many_bytes_as_its_label_says(tmp_path):
    claim = papers.FedSynth("quick")
    label, own = next((x, own) for x, own in claim.arms("").items() if x.startswith("FedSynth"))
    settings = study.fitting(claim.tasks()[""], own) | {"threads": 1, "rounds": 1}
    sent = run.experiment(**settings).result["up"] / settings["participation"]
    assert f"{sent:,.0f} bytes" in label


STORED = claims.stored_claims(RESULTS)
TABLES = {name: claims.tables(*pair) for name, pair in STORED.items()}


PREMISE = {("eigenvalue", 1, 0): 2, ("eigenvalue", -1, 0): 2, ("accuracy", 1, 0): 6}


@pytest.mark.parametrize(
    "name, claimed, word",
    [
        ("default", PREMISE, "Mixed"),
        ("untuned", PREMISE, "Holds in part"),
        ("sharpness", {("excess", 1, 0): 16}, "No significant difference"),
        ("alignment", {("cos_synthetic", 1, 0): 16, ("cos_last_move", -1, 0): 6}, "Holds in part"),
        ("accuracy", {("accuracy", 1, 0): 6}, "Refuted"),
        ("hyper", {("accuracy", 1, 1): 10}, "Holds in part"),
        ("fedsynth", {("accuracy", 1, 1): 2}, "No significant difference"),
        ("gradalign", {("r", -1, 0): 2, ("accuracy", 1, 0): 2}, "No significant difference"),
        ("man", {("eigenvalue", -1, 0): 4, ("accuracy", 1, 0): 4}, "No significant difference"),
        ("oracle", {("accuracy", 1, 0): 1}, "No significant difference"),
    ],
)
def test_what_is_claimed_and_what_the_stored_rows_say(name, claimed, word):
    found, verdict = claims.judged(STORED[name][0], TABLES[name][""])
    kinds = [(c.measure, c.sign, c.margin) for c in found[found.sign != 0].itertuples()]
    assert {kind: kinds.count(kind) for kind in kinds} == claimed and verdict == word


def invented(table, rules, effect, noise):
    """The table with numbers in which every rule's difference has sign(effect) times its sign."""
    heights, up = {}, np.sign(effect)
    for _ in rules:  # raise one of each pair until all differences are there
        for r in rules:
            low, high = (r.second, r.first) if r.sign * up > 0 else (r.first, r.second)
            heights[high] = max(heights.get(high, 0), heights.setdefault(low, 0) + abs(effect))
    table, rng = table.copy(), np.random.default_rng(0)
    for value, height in heights.items():
        here = table.arm == value.arm
        table.loc[here, value.measure] = height + noise * rng.standard_normal(here.sum())
        table.loc[here, value.measure] += 100.0 * table.seed[here]  # what the seeds share
    return table


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    "effect, noise, word",
    [
        (3, 1e-4, "Holds"),
        (-3, 1e-4, "Refuted"),
        (0, 30, "No significant difference"),
    ],
)
def test_verdicts_follow_the_rows(name, effect, noise, word):
    claim = STORED[name][0]
    table = TABLES[name][""]
    rules = [r for r in claim.comparisons(table) if r.sign]
    table = invented(table, rules, effect, noise)
    assert verdicts.verdict(verdicts.compare(table, rules).outcome) == word
    single = table[table.seed == claim.first_seed]
    assert verdicts.verdict(verdicts.compare(single, rules).outcome) == "Not decided"


@pytest.mark.parametrize("name", STORED)
def test_a_claim_run_today_has_the_settings_of_its_stored_rows(name):
    """A new default must not change what a claim runs. Some names are other ones in older rows."""
    (claim, part), renamed = STORED[name], {"algo", "dataset", "error_feedback"}
    rows = {(study.plain(row)["arm"], row["seed"]): row for row in part["rows"]}
    jobs = [(arm, own) for _, arm, own in study.jobs(claim) if own["seed"] == claim.first_seed]
    stored = [(rows[arm, own["seed"]], own) for arm, own in jobs if (arm, own["seed"]) in rows]
    assert stored
    for row, own in stored:
        now, then = run.resolve(**own), part["defaults"] | row.get("fields", {})
        same = {k for k in now.keys() & then.keys() - renamed if not changes_seconds(k)}
        assert {k: now[k] for k in same} == {k: then[k] for k in same}, row["seed"]


@pytest.mark.parametrize("name", STORED)
def test_no_comparison_is_judged_and_shown_again_without_the_correction(name):
    for task, table in TABLES[name].items():
        pairs = [(r.first, r.second) for r in STORED[name][0].comparisons(table) if r.margin == 0]
        assert len(set(pairs)) == len(pairs)


def test_gains_are_paired_differences_to_fedavg_on_the_same_split(tmp_path):
    claim, rows = ours.Skew("cpu", tmp_path), []
    names = list(dict.fromkeys(arm.split(", ")[1] for arm in claim.arms("")))
    for k, arm in enumerate(claim.arms("")):
        for seed in range(claim.seeds_of(arm)):
            plain = 10 * k * arm.endswith("fedavg")
            height = plain + seed**2 + names.index(arm.split(", ")[1])
            row = {"task": "", "arm": arm, "seed": seed, "accuracy": height, "mean_model": 2 * seed}
            rows.append(row | {"eigenvalue": k, "cos_used": 0.1 * k, "diverged": None})
    table = pd.DataFrame(rows)
    path = tmp_path / figures.file_name(claim.name)
    for suffix, draw in claim.pictures.items():
        draw(path.with_stem(path.stem + suffix), claim, table)
        assert path.with_stem(path.stem + suffix).stat().st_size > 10_000
    for n, name in enumerate(names[1:], 1):
        found = figures.gains(claim, table, name, "accuracy")
        base = table[table.arm.str.endswith("fedavg")].groupby("arm", sort=False).accuracy.min()
        assert found["mean"].tolist() == pytest.approx((n - base).tolist())
        assert found.low.tolist() == pytest.approx(found.high.tolist())  # seeds cancel


def test_the_overview_pairs_every_arm_with_its_own_baseline():
    """Not with one whose name begins alike: fedsynsam-d, not fedsynsam-descent."""
    claim, table = STORED["descent"][0], TABLES["descent"][""]
    found = figures.to_fedavg(claim, table, "accuracy").set_index("arm")
    mean = table.groupby("arm").accuracy.mean()
    assert len(found) == 4 and claim.baseline("fedsynsam-descent+feddyn") == "fedsynsam-d"
    for arm, height in found["mean"].items():
        assert height == pytest.approx(mean[arm] - mean[claim.baseline(arm)])
    accuracy = TABLES["accuracy"][""]  # where a baseline is the beginning of a label
    assert len(figures.to_fedavg(STORED["accuracy"][0], accuracy, "accuracy")) == 7


def test_the_searches_of_whose_are_for_directions_that_have_no_settings_yet(tmp_path):
    claim = onebit.Whose("cpu", tmp_path)
    searches = claim.searches()
    own = set(claim.directions) - set(claim.like) - {"none"}  # with settings of their own
    assert {name for base, name in searches if base == "FedDyn"} == own
    assert {name for base, name in searches if base == "FedAvg"} == own & set(claim.trials)
    places = [*searches, *(("default", algo) for algo in ("fedsam", "fedsynsam", "oracle"))]
    for k, (world, name) in enumerate(places):
        found = {"size": "cpu", "world": world, "method": name, "settings": {"rho": 1 + k}}
        tune.enter(tmp_path / "tuned.json", found)
    arms = claim.arms("")
    for base in claim.bases:
        assert arms[f"{base}, negative"]["rho"] == arms[f"{base}, own (FedSAM)"]["rho"]
        learnt, control = (arms[f"{base}, synthetic, {x}"] for x in ("rho 0.1", "not learnt"))
        assert control == learnt | {"outer_steps": 1}
        assert learnt["rho"] == arms[f"{base}, true (oracle)"]["rho"]
    with pytest.raises(ValueError, match="FedAvg, none is not tuned"):
        claim.check()
    onebit.Whose("cpu", tmp_path, only="FedDyn, (random|synthetic)").check()  # what it runs is


def test_the_last_model_of_a_trial_is_measured_too(tmp_path):
    claim = onebit.Whose("quick", tmp_path, only="FedDyn, random")
    ((arm, own),) = [(a, s) for a, s in claim.arms("").items() if claim.only.match(a)]
    claim.arms = lambda task: {arm: own | {"compress": "codes/natural.py:Natural"}}  # both in files
    (row,) = study.conduct(claim, tmp_path)
    assert row["sam"] > 0


def test_an_arm_of_whose_that_is_another_one_is_left_out():
    arms = onebit.Whose("cpu").arms("")
    assert "FedAvg, synthetic, rho 0.1" not in arms and "FedDyn, synthetic, rho 0.1" in arms
    assert len({json.dumps(own, sort_keys=True) for own in arms.values()}) == len(arms)


@pytest.mark.parametrize("kind", [ours.Overfit, onebit.Whose])
def test_a_gain_is_drawn_against_the_cosine_and_the_eigenvalue(kind, tmp_path, monkeypatch):
    claim, rows, drawn = kind("cpu", tmp_path), [], []
    for k, arm in enumerate(claim.arms("")):
        for seed in range(3):
            own = {"accuracy": k + seed**2, "test_loss": k + seed**2, "eigenvalue": k}
            cosine = math.nan if arm == claim.baseline(arm) else k / 100
            rows.append({"arm": arm, "seed": seed, "cos_used": cosine, "diverged": None} | own)

    def note(axis, x, ends, colour):
        drawn.append((x, *ends))

    monkeypatch.setattr(figures, "draw_gain", note)
    (suffix,), (draw,) = zip(*claim.pictures.items())
    draw(tmp_path / "a.png", claim, pd.DataFrame(rows))
    order = list(claim.arms(""))
    for k, arm in enumerate(order):
        if re.search(claim.apart, arm):
            continue
        expected = pytest.approx((k, *[k - order.index(claim.baseline(arm))] * 3))
        assert any(one == expected for one in drawn)
    inside = sum(not re.search(claim.apart, arm) for arm in order)
    assert inside < len(order) and len(drawn) == 2 * inside - len({*map(claim.baseline, order)})


def test_the_page_for_the_wall_says_what_the_rows_say(tmp_path, monkeypatch):
    stored, drawn = {}, {}
    for name in ("whose", "overfit", "again", "cifar"):
        claim, part = claims.stored_claims(RESULTS)[name]
        stored[name] = claim, claims.tables(claim, part)[""]

    def note(axis, x, ends, colour):
        drawn.setdefault(axis, {})[x] = (ends[0], colour)

    monkeypatch.setattr(figures, "draw_gain", note)
    wall.draw_wall(tmp_path / "wall.png", stored, report.filled)
    assert (tmp_path / "wall.png").stat().st_size > 50_000 and len(drawn) == 6
    for (axis, points), (name, split) in zip([*drawn.items()][::2], wall.ROWS):
        claim, table = stored[name]
        gain = "test_loss" if name == "overfit" else "accuracy"
        assert axis.yaxis_inverted() == (gain == "test_loss")  # up is better
        own = f"{split}, own, as true" if split == "FedDyn" else f"{split}, own"
        for arm, made_of in ((own, "this client"), (f"{split}, true", "the loss of others")):
            arm = report.arm_called(arm, table)
            x = verdicts.values(table, verdicts.Value(arm, "cos_used")).mean()
            mean, colour = points[x]
            assert mean == figures.gain_of(claim, table, arm, gain)[0]
            assert wall.KINDS[colour][0].startswith(made_of)
    # its last sentence: not significant on the third job, but with new seeds, and with all images
    for name, outcome in (("overfit", 0), ("again", 1), ("cifar", 1)):
        found, _ = claims.judged(*stored[name])
        pair = (found["first"] == "Dir 0.1, own (FedSAM)") & (found["second"] == "Dir 0.1, fedavg")
        assert [*found[pair & (found.sign != 0)].outcome] == [outcome]


def test_no_words_of_a_figure_cover_others_or_a_point():
    page, axis = figures.plt.subplots()
    places = [(0.5, 0.5 + n / 1000) for n in range(5)] + [(0.55, 0.5)]
    names = ["the same place"] * 5 + [""]  # the last point has no words, and they must not cover it
    figures.write_beside([(axis, x, y, words) for (x, y), words in zip(places, names)])
    page.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the lines
    overlap = [a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n]]
    assert len(overlap) == 10 and not any(overlap)
    points = axis.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)
    for text, point in zip(axis.texts, points):
        assert text.arrow_patch.get_path().vertices[-1] == pytest.approx(point, abs=0.1)
    figures.plt.close(page)


@pytest.mark.parametrize("kind", [ours.Corrected, ours.Overfit])
def test_no_claim_takes_settings_that_were_tuned_for_another(kind, tmp_path):
    claim = kind("cpu", tmp_path)
    for arm in claim.arms(""):
        split, name = arm.split(", ", 1)
        found = {"size": "cpu", "world": split, "method": name, "settings": {"lr": 0.7}}
        tune.enter(tmp_path / "tuned.json", found)
    (task,) = claim.tasks().values()
    rates = [study.fitting(task, own)["lr"] for own in claim.arms("").values()]
    assert set(rates) == {0.1}


def test_a_part_of_a_claim(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(study, "row_of", lambda claim, root, task, arm, s: seen.append(s["seed"]))
    study.conduct(ours.Skew("cpu", tmp_path, seeds=1), tmp_path)
    assert set(seen) == {0} and len(seen) == 36
    seen.clear()
    study.conduct(ours.Overfit("cpu", tmp_path, only="two.*own"), tmp_path)
    assert seen == [2, 3, 4]
    part = ours.Skew("cpu", tmp_path, only="Dir 0.1")
    assert len(study.conduct(part, tmp_path)) == 45 and part.command.endswith('--only "Dir 0.1"')


def test_a_part_of_a_claim_takes_its_place_beside_the_stored_rows(tmp_path):
    Skew = type("Skew", (ours.Skew,), {"tuned_on": {}})

    def rows(split, seeds, mark):
        arms = [arm for arm in Skew().arms("") if arm.startswith(split)]
        return [
            {"task": "", "arm": arm, "seed": seed, "mark": mark, "machine": {"torch": mark}}
            for seed in seeds
            for arm in arms
        ]

    def keep(only, found):
        return claims.keep(Skew("cpu", tmp_path, only=only), found)

    old = rows("two classes", range(3), "old") + rows("one class", range(5), "old")
    keep("one class|two classes", old)
    part = keep("one class", rows("one class", range(5), "new"))
    marks = collections.Counter((row["arm"].split(",")[0], row["mark"]) for row in part["rows"])
    assert marks == {("two classes", "old"): 27, ("one class", "new"): 45}
    assert [m["torch"] for m in part["machines"]] == ["new", "old"]
    assert all(part["machines"][row["machine"]]["torch"] == row["mark"] for row in part["rows"])
    assert part["command"] == "python -m lab.claims skew --size cpu"
    first = [row["arm"] for row in part["rows"] if row["seed"] == 0]
    assert first == [arm for arm in Skew().arms("") if arm in first]
    with pytest.raises(ValueError, match="holds 9 rows"):
        Skew("cpu", tmp_path, seeds=4, only="one class").check()


def test_a_claim_is_not_run_where_something_is_missing_or_would_be_lost(
    tmp_path, monkeypatch, capsys
):
    def refused(*words):
        assert claims.main([*words, "--results", str(tmp_path)]) == 2
        return capsys.readouterr().err

    monkeypatch.setitem(ours.PHOTOGRAPHS, "dataset", "absent.npz")
    for name in ("overfit", "photographs"):
        assert "vision.make_subset cifar10 absent.npz --train 1100" in refused(name)
    assert "python -m lab.claims skew --tune" in refused("skew", "--only", "IID")
    assert "no arm" in refused("skew", "--size", "quick", "--only", "no such arm")
    assert "judged" in refused("oracle", "--only", "fedavg")
    assert "quick and cpu" in refused("whose", "--size", "gpu")
    assert "must not be negative" in refused("oracle", "--seeds", "-1")
    assert "no regular expression" in refused("skew", "--only", "(")
    assert "nothing to compare" in refused("skew", "--size", "quick", "--only", "IID, fedavg")
    assert "nothing to compare" in refused("remedy", "--only", ".*fedsynsam$")
    assert "quick and cpu" in refused("skew", "--tune", "--size", "gpu")
    assert "a search has seeds of its own" in refused("skew", "--tune", "--seeds", "2")
    rows = [{"task": "", "arm": "fedavg", "seed": seed} for seed in range(3)]
    study.store(tmp_path / "oracle.json", "cpu", {"rows": rows})
    assert "holds 1 rows" in refused("oracle", "--seeds", "2")


def test_the_figure_is_that_of_the_largest_size(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study, "conduct", lambda claim, root, threads: [])
    monkeypatch.setattr(claims, "draw", lambda claim, part: drawn.append(claim.size))
    monkeypatch.setattr(claims, "told", lambda claim, part: "")
    for size in ("quick", "cpu", "quick"):
        claims.conducted(ours.Oracle(size, tmp_path), tmp_path, 1)
    assert drawn == ["quick", "cpu"]


def test_a_claim_from_its_command_to_its_files(tmp_path, capsys):
    words = ["oracle", "--size", "quick", "--threads", "1", "--out", str(tmp_path / "runs")]
    words += ["--results", str(tmp_path)]
    assert claims.main(words) == 0
    out = capsys.readouterr().out
    assert "**Not decided.**" in out and "| oracle |" in out and "too few seeds" in out
    part = json.loads((tmp_path / "oracle.json").read_text())["quick"]
    assert part["command"] == "python -m lab.claims oracle --size quick"
    assert [row["arm"] for row in part["rows"]] == list(ours.Oracle("quick").arms(""))
    assert part["machines"][0]["torch"] == torch.__version__
    assert (tmp_path / "oracle.png").stat().st_size > 10_000
    assert claims.main(words) == 0 and capsys.readouterr().out == out


# ------------------------------------------------------------------------- report and figures


def test_the_report_is_that_of_the_stored_rows_and_notes():
    pages = report.written(RESULTS)
    for name, text in pages.items():
        assert text == (RESULTS / name).read_text(), "run python -m lab.report"
    assert {path.name for path in RESULTS.glob("*.md")} == set(pages)
    text = pages["README.md"]
    for name, (claim, _) in STORED.items():
        assert f"## {name}\n" in text and f"`python -m lab.claims {name} --size " in text
        assert f"as claimed: {claim.refuted}.\n" in pages[f"{name}.md"]  # today's words
    assert not re.search(r"\{[^{}]*\|[^{}]*\}", text)  # every place of the notes is filled in


def test_what_the_notes_say_of_the_search_for_a_radius_is_what_it_found():
    text, found = report.notes()["radius"], {}
    for e in tune.entries(RESULTS / "tuned.json"):
        if e["world"] == "one bit":
            found[e["method"]] = {s["rho"]: f"{100 * x:.1f}" for _, s, x in e["tried"]}
            assert e["settings"] == {"rho": 0.03 if e["method"] == "fedsam" else 0.1}
    own, synthetic, true = (found[algo] for algo in ("fedsam", "fedsynsam", "oracle"))
    said = re.findall(
        r"\d\d\.\d", text.split("On validation images")[1].split("FedSynSAM minus")[0]
    )
    three = (0.03, 0.1, 0.3)
    wanted = [own[rho] for rho in (0.009, *three)]
    assert said == [*wanted, *(synthetic[rho] for rho in three), *(true[rho] for rho in three)]


def test_what_the_notes_say_of_the_radii_on_feddyn_is_what_the_search_found():
    claim = onebit.Whose("cpu")
    names = ("synthetic (FedSynSAM)", "last update (FedLESAM)", "random")
    rho = [claim.winner(f"FedDyn, {name}")["rho"] for name in names]
    text = " ".join(report.notes()["whose"].split())
    assert rho[0] == rho[1] and f"rho {rho[0]}, which is next to no ascent" in text
    assert f"and a random direction {rho[2]}," in text


def test_numbers_in_notes_are_means_and_paired_differences():
    table = pd.DataFrame(runs("a (lr 1)", [1.0, 2.0, 3.0]) + runs("b", [0.0, 1.0, 2.5]))
    assert report.filled("{a | accuracy} %", table) == "2.00 ± 2.48 %"
    low, high = verdicts.interval([1.0, 1.0, 0.5])[1:]
    assert report.filled("{a - b | accuracy}", table) == f"+0.83 [{low:+.2f}, {high:+.2f}]"
    for wrong in ("{c | accuracy}", "{a | acuracy}"):
        with pytest.raises(ValueError, match="known"):
            report.filled(wrong, table)


def test_differences_of_several_measures_fit_on_one_axis():
    columns = ["measure", "mean", "low", "high", "margin"]
    rows = [("eigenvalue", -100.0, -200.0, 0.0, 0.0), ("accuracy", 2.0, 1.0, 4.0, 1.0)]
    found = pd.DataFrame([*rows, ("accuracy", -1.0, -3.0, 1.0, 0.0)], columns=columns)
    scaled, unit = figures.on_one_axis(found)
    assert scaled["mean"].tolist() == [-0.5, 0.5, -1 / 3] and "scale of its own" in unit
    assert scaled.low.tolist() == [-1, 0.25, -1] and scaled.margin.tolist() == [0, 0.25, 0]
    assert scaled.words.tolist() == ["-100", "+2.00", "-1.00"]
    alone, unit = figures.on_one_axis(found[1:])
    assert alone.drop(columns="words").equals(found[1:]) and unit == "difference"


def test_figures_are_drawn_with_runs_that_are_missing(tmp_path):
    claim, (table,) = STORED["hyper"][0], TABLES["hyper"].values()
    table = table.copy()
    table.loc[table.arm == "mix 1", "accuracy"] = np.nan
    figures.draw_claim(tmp_path / "a.png", claim, table, *claims.judged(claim, table))
    figures.draw_overview(tmp_path / "b.png", {"hyper": (claim, table)})
    figures.landscapes_of_rows(
        tmp_path / "c.png", TABLES["sharpness"][""], ("Dir 0.1, none", "Dir 0.1, 2 bits")
    )
    assert all((tmp_path / f"{x}.png").stat().st_size > 10_000 for x in "abc")


def test_two_stored_models_side_by_side(whole, tmp_path, capsys):
    folders = [str(path) for path in sorted(whole[1].glob("dynafed-*")) if path.is_dir()]
    words = [*folders, "--points", "3", "--out", str(tmp_path / "two.png")]
    assert figures.main(words) == 0 and (tmp_path / "two.png").stat().st_size > 10_000
    assert figures.main([folders[0]]) == figures.main([*words, "--points", "4"]) == 2
    assert measures.main([folders[0], "trace"]) == 0 and "trace_error" in capsys.readouterr().out


# ------------------------------------------------------------------------- tuning and presets


def test_the_notes_say_how_the_search_at_one_class_went():
    entries = tune.entries(RESULTS / "tuned.json")
    found = {e["method"]: e for e in entries if e["world"] == "one class"}
    assert set(found) == set(ours.Skew.directions)
    assert all(len(e["seeds"]) == ours.Skew.tuned_on["one class"] for e in found.values())

    def percent(name):
        """By radius, with lr 0.1, which won."""
        assert found[name]["settings"]["lr"] == 0.1
        tried = {s["rho"]: x for _, s, x in found[name]["tried"] if s["lr"] == 0.1}
        return [f"{100 * tried[rho]:.1f}" for rho in sorted(tried)]

    said = report.notes()["skew"].split("What the search did")[1]
    numbers = re.findall(r"\d\d\.\d", said)
    fedavg = [f"{100 * found['fedavg']['val_acc']:.1f}"]
    own, synthetic = percent("own (FedSAM)"), percent("synthetic (FedSynSAM)")
    assert numbers == [*own, *fedavg, *synthetic]
    assert found["own (FedSAM)"]["settings"]["rho"] == 0.3


def test_the_notes_say_which_radius_the_validation_images_choose():
    (table,) = TABLES["overfit"].values()
    loss = table.groupby("arm").val_loss.mean()
    said = report.notes()["overfit"].split("**The radius.**")[1].split("\n\n")[1].splitlines()
    for line in said[2:]:
        cells = re.findall(r"(\**)\{([^}]*) - Dir 0.1, fedavg \| test_loss\}", line)
        arms = {report.arm_called(name, table): bool(bold) for bold, name in cells}
        assert len(arms) > 1 and [arm for arm in arms if arms[arm]] == [loss[[*arms]].idxmin()]
    assert len(said) == 10


def test_the_notes_say_which_learning_rates_three_levels_got():
    arms, said = onebit.Levels("cpu").arms(""), " ".join(report.notes()["levels"].split())
    fedavg, synthetic, *others = (
        arms[f"{algo}, three levels"]["lr"] for algo in onebit.Levels.methods
    )
    rates = f"chose {fedavg} for FedAvg, {synthetic} for FedSynSAM and {others[0]} for the others."
    assert rates in said and len(set(others)) == 1


def test_the_notes_say_what_each_direction_has_at_each_learning_rate():
    found = {(e["world"], e["method"]): e for e in tune.entries(RESULTS / "tuned.json")}
    rates, none = onebit.Whose.grids["FedDyn"]["lr"], ("default", "feddyn")
    said = report.notes()["whose"].split("The searches say why")[1].split("\n\n")[1].splitlines()
    assert said[0].split(" | ")[1:] == [f"lr {lr}" for lr in rates[:2]] + [f"lr {rates[2]} |"]
    for line in said[2:]:
        name, *numbers = line.strip("| ").split(" | ")
        entry = found[none if name == "none" else ("FedDyn", name)]
        own = {"prox": 0.1} if name == "none" else {"rho": 0.1}
        tried = [(s, x) for _, s, x in entry["tried"]]
        values = [x for lr in rates for s, x in tried if s == {"lr": lr} | own]
        assert numbers == [f"{100 * x:.1f}" for x in values]
    assert len(said) == 11


def test_tuning_searches_one_setting_after_the_other():
    seen = []

    def score(s):  # best at lr 0.1, rho 0.2; rho matters more at other lr, and lr 0.4 diverges
        seen.append((s["lr"], s["rho"]))
        return None if s["lr"] == 0.4 else 0.9 - abs(s["lr"] - 0.1) - abs(s["rho"] - 0.2) * s["lr"]

    grid = {"lr": (0.4, 0.05, 0.1, 0.2), "rho": (0.1, 0.2, 0.4)}
    chosen, tried = tune.search(grid, score)
    assert chosen == {"lr": 0.1, "rho": 0.2}
    assert seen == [(0.05, 0.2), (0.1, 0.2), (0.2, 0.2), (0.4, 0.2), (0.1, 0.1), (0.1, 0.4)]
    assert [tuple(s.values()) for s, _ in tried] == seen and tried[3][1] is None
    with pytest.raises(FloatingPointError, match="all values of lr that were tried diverged"):
        tune.search(grid, lambda s: None)


@pytest.mark.parametrize("best", [0.003, 3.0])
def test_a_grid_grows_until_its_winner_has_two_neighbours(best):
    def score(s):
        return -abs(math.log(s["rho"] / best))

    chosen, tried = tune.search({"rho": (0.03, 0.1, 0.3)}, score)
    values = sorted(s["rho"] for s, _ in tried)
    place = values.index(chosen["rho"])
    assert chosen["rho"] == pytest.approx(best, rel=0.3) and 0 < place < len(values) - 1
    assert tune.search({"rho": (0.1, 0.3, 1.0)}, score, lambda _, x: 0.05 < x <= 1)[0] == {
        "rho": min(max(best, 0.1), 1.0)
    }
    assert len(tune.search({"rho": (0.1, 0.2)}, lambda s: s["rho"])[1]) == tune.LONGEST
    assert tune.search({"rho": (0.1, 0.2, 0.3)}, lambda s: 0.5)[0] == {"rho": 0.2}  # a draw


@pytest.mark.parametrize("algo", tune.GRID)
def test_every_grid_has_at_least_three_legal_values(algo):
    grid = tune.grid_of(algo)
    for size in study.SIZES:
        shared = study.fitting(next(iter(study.TASKS[size].values())), {"algo": algo})
        for name, values in grid.items():
            assert len(set(values)) == len(values) >= 3 and list(values) == sorted(values)
            assert all(run.resolve(**shared | {name: value}) for value in values)


def test_two_processes_share_a_search(tmp_path, monkeypatch):
    """While another process is at a run of the first search, the second search goes on."""
    order, busy = [], [True]

    def score(root, s, seeds):
        if s["algo"] == "fedavg" and busy and busy.pop():
            raise study.Busy
        order.append(s["algo"])
        return s["lr"]

    monkeypatch.setattr(tune, "accuracy_of", score)
    monkeypatch.setattr(study.time, "sleep", lambda s: None)
    with pytest.raises(study.Busy):
        study.shared([lambda: score("", {"algo": "fedavg"}, 1)], wait=None)
    busy.append(True)
    grid = {"lr": (0.1, 0.2, 0.3)}
    searches = {("", algo): ({"algo": algo}, grid, 2) for algo in ("fedavg", "fedsam")}
    found = tune.tune(searches, "quick", tmp_path, tmp_path / "tuned.json", "a command")
    assert [e["method"] for e in found] == ["fedavg", "fedsam"]
    assert list(dict.fromkeys(order)) == ["fedsam", "fedavg"]
    assert all(e["rounds"] == 80 and e["seeds"] == [100, 101] for e in found)


def test_every_method_has_a_grid():
    only_parents = {"aligned", "distilling"}
    assert set(parts("algo")) - only_parents <= set(tune.GRID)


def test_a_score_of_tuning_is_the_mean_validation_accuracy_of_its_runs(tmp_path):
    settings = study.fitting(TINY, {"algo": "fedavg"})
    score = tune.accuracy_of(tmp_path, settings, 2)
    both = [run.experiment(**settings | {"seed": s}).result["val_acc"] for s in (100, 101)]
    assert score == pytest.approx(np.mean(both)) and both[0] != both[1]
    assert tune.accuracy_of(tmp_path, settings) == both[0]
    assert tune.accuracy_of(tmp_path, settings | {"lr": 1e30, "clip": 0.0}) is None


def test_winners_are_kept_and_used_by_the_claim(tmp_path, capsys, monkeypatch):
    def score(root, s, seeds):
        return 1 - abs(s["lr"] - 0.2) - abs(s["server_lr"] - 1)

    monkeypatch.setattr(tune, "accuracy_of", score)
    words = ["fedavg", "--size", "quick", "--results", str(tmp_path), "--out", str(tmp_path)]
    assert tune.main(words) == 0 and "lr 0.2, server_lr 1, 100.00 %" in capsys.readouterr().out
    path = tmp_path / "tuned.json"
    (entry,) = tune.entries(path)
    assert entry["command"] == "python -m lab.tune fedavg --size quick"
    assert len(entry["tried"]) == 6 and entry["settings"] == {"lr": 0.2, "server_lr": 1.0}
    assert entry["val_acc"] == 1 and entry["tried"][0] == [4, {"lr": 0.05, "server_lr": 1.0}, 0.85]
    tune.enter(path, entry | {"size": "cpu", "settings": {"lr": 0.05}})
    tune.enter(path, entry | {"size": "cpu", "settings": {"lr": 0.07}})
    assert len(path.read_text().splitlines()) == 4  # a line each, between brackets
    arms = papers.Accuracy("cpu", tmp_path).arms("")
    assert arms["fedavg (lr 0.07)"]["lr"] == 0.07 and "fedsam (not tuned)" in arms
    assert tune.winner(RESULTS / "tuned.json", "cpu", "", "fedsmoo") == {"lr": 0.1, "prox": 0.1}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_cell_of_a_published_table_can_be_run(name):
    preset = presets.PRESETS[name]
    for algo, row in preset.published.items():
        for column, accuracy in row.items():
            settings = presets.settings_of(name, algo, column)
            resolved = run.resolve(**settings)
            assert 1 < accuracy < 100 and resolved["compress"] == "identity"
            if "prox_clip" in resolved:  # the released code does not clip the proximal term
                assert resolved["prox_clip"] is False
            assert resolved.get("man", 0) == (0.15 if column.endswith("man") else 0)


def test_published_numbers_and_settings_of_single_methods():
    wmsam = presets.PRESETS["fedwmsam-cifar10"].published
    assert wmsam["fedwmsam"] == {"0.6": 83.56, "0.1": 76.64, "6cl": 84.43, "3cl": 74.46}
    assert presets.settings_of("fedwmsam-cifar10", "fedsam", "0.1")["rho"] == 0.01
    assert presets.settings_of("fedwmsam-cifar10", "fedsmoo", "0.1")["rho"] == 0.1
    pathological = presets.settings_of("fedwmsam-fmnist", "fedavg", "6cl")
    assert (pathological["partition"], pathological["classes_per_client"]) == ("shards", 6)
    dynafed = presets.settings_of("dynafed-cifar10", "dynafed-adam", "0.16")
    # a loss that is divided by 10 classes: step size and its rate are a tenth
    assert (dynafed["syn_step"], dynafed["rate_step"]) == (0.04 / 10, pytest.approx(1e-5 / 10))
    assert dynafed["finetune_epochs"] == 15
    assert presets.settings_of("flsimulator-cifar10", "fedavg", "iid/200")["clients"] == 200


def test_a_preset_from_its_command_to_its_row(tmp_path, capsys):
    small = "dataset=bundled rounds=1 clients=20 participation=2 local_epochs=1 prox_clip=true"
    words = ["fedwmsam-fmnist", "--algo", "feddyn", "fedsmoo", "--column", "0.1", "--seeds", "1"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--set", *small.split()]
    assert presets.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| fedsmoo \| 0.1 \| 83.37 \| \d+.\d+ \| .*prox_clip: true", out)
    assert re.search(r"\| feddyn \| 0.1 \| - \|", out)  # not in this table
    rows = json.loads((tmp_path / "fedwmsam-fmnist" / "rows.json").read_text())
    assert presets.main(words) == 0
    again = json.loads((tmp_path / "fedwmsam-fmnist" / "rows.json").read_text())
    assert again == rows and rows[1]["published"] == 83.37


def test_commands_beside_each_other_keep_all_rows_of_a_preset(tmp_path):
    rows = [{"algo": "a", "column": "b", "seed": k, "changed": {}} for k in range(40)]
    path = tmp_path / "new" / "rows.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: presets.keep(path, [row]), rows))
    assert sorted(row["seed"] for row in json.loads(path.read_text())) == list(range(40))


def test_only_chooses_searches_by_their_arm_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "tune", lambda searches, *_, **__: seen.extend(searches) or [])
    words = ["radius", "--tune", "--only", "fedsam", "--results", str(tmp_path)]
    assert claims.main(words) == 0 and seen == [("one bit", "fedsam")]


def test_a_preset_keeps_what_is_done_when_a_run_diverges(tmp_path, monkeypatch, capsys):
    def train(root, settings):
        if settings["algo"] == "fedsmoo":
            raise FloatingPointError("round 3: not finite")
        return root, {"test_acc": 0.5}, []

    monkeypatch.setattr(study, "train", train)
    words = ["fedwmsam-fmnist", "--algo", "fedsmoo", "feddyn", "--column", "0.1", "--seeds", "2"]
    assert presets.main([*words, "--results", str(tmp_path)]) == 1
    assert re.search(r"\| fedsmoo \| 0.1 \| 83.37 \| - \|", capsys.readouterr().out)
    rows = json.loads((tmp_path / "fedwmsam-fmnist" / "rows.json").read_text())
    assert [row.get("test_acc") for row in rows] == [None, None, 0.5, 0.5]
    assert rows[0]["diverged"] == "round 3: not finite"


@pytest.mark.parametrize(
    "main, words, hint",
    [
        (claims.main, ["acuracy"], "accuracy"),
        (claims.main, ["accuracy", "--size", "large"], "quick"),
        (tune.main, ["fedsm", "--size", "quick"], "fedsam"),
        (presets.main, ["fedwmsam"], "fedwmsam-"),
        (presets.main, ["fedwmsam-fmnist", "--seeds", "0"], "at least 1"),
        (presets.main, ["fedwmsam-fmnist", "--column", "0.7"], "0.6"),
        (presets.main, ["fedwmsam-fmnist", "--set", "rho"], "NAME=VALUE"),
        (presets.main, ["fedwmsam-fmnist", "--set", "algo=fedsam"], "--algo and --seeds say that"),
        (presets.main, ["fedwmsam-fmnist", "--algo", "fedprix"], "fedprox"),
        (measures.main, ["nowhere"], "no finished run"),
        (measures.main, ["nowhere", "trac"], "did you mean trace"),
        (figures.main, ["one"], "folders"),
        (report.main, ["--results", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(main, words, hint, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert hint in err and err.count("\n") == 1 and "Traceback" not in err
