# -------------------------------------------------------------------------------------- synth
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import synth

f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


# ---- synth, to be pasted from here
class SynthTask:
    """A two-layer network on images of 1 x 4 x 4 pixels in three classes, in float64."""

    image_shape, classes = (1, 4, 4), 3

    def apply(self, w, x):
        h = torch.tanh(x.flatten(1) @ w[:80].view(16, 5) + w[80:85])
        return h @ w[85:].view(5, 3)


def synth_case(n=6):
    """(apply, w [d], Synthetic)"""
    step = torch.tensor(0.3, dtype=f64)
    data = synth.Synthetic(randn(n, 1, 4, 4, seed=1), randn(n, 3, seed=2), step)
    return SynthTask().apply, 0.5 * randn(100), data


def synth_descent(apply, w, data, steps):
    """w and the next models of gradient descent on synthetic data, by hand -> list of [d]."""
    trajectory = [w]
    for _ in range(steps):
        v = trajectory[-1].clone().requires_grad_()
        scores = apply(v, data.images)
        (-(data.logits.softmax(1) * scores.log_softmax(1)).sum() / len(scores)).backward()
        trajectory.append((v - data.step * v.grad).detach())
    return trajectory


def synth_settings(**given):
    c = synth.Synthesis()
    for name, value in given.items():
        assert hasattr(c, name)
        setattr(c, name, value)
    return c


def test_synth_soft_loss_with_one_hot_labels_is_cross_entropy():
    scores, Y, y = randn(6, 4), randn(6, 4, seed=1), torch.arange(6) % 4
    one_hot = 1e3 * F.one_hot(y, 4).to(f64)
    assert torch.allclose(synth.soft_cross_entropy(scores, one_hot), F.cross_entropy(scores, y))
    every_entry = (-Y.softmax(1) * scores.log_softmax(1)).mean()  # DynaFed's code
    assert torch.allclose(synth.soft_cross_entropy(scores, Y), 4 * every_entry)


def test_synth_unrolled_steps_are_gradient_descent_by_hand():
    apply, w, data = synth_case()
    X, Y, a = data
    by_hand = synth_descent(apply, w, data, 3)
    assert torch.allclose(synth.unroll(apply, w, [(X, Y)] * 3, a), by_hand[3], rtol=1e-12)
    first, second = (X[:2], Y[:2]), (X[2:], Y[2:])  # batches are used in their order
    v = synth_descent(apply, w, synth.Synthetic(*first, a), 1)[1]
    v = synth_descent(apply, v, synth.Synthetic(*second, a), 1)[1]
    assert torch.allclose(synth.unroll(apply, w, [first, second], a), v, rtol=1e-12)
    assert torch.equal(synth.unroll(apply, w, [], a), w)


@pytest.mark.parametrize("same_images", [True, False])
def test_synth_gradients_through_the_unrolled_steps_are_finite_differences(same_images):
    apply, w, data = synth_case()
    target, h = randn(100, seed=9), 1e-6

    def L(X, Y, a):
        batches = [(X, Y)] * 2 if same_images else zip(X.split(3), Y.split(3))
        return synth.matching_loss(synth.unroll(apply, w, batches, a), w, target)

    leaves = [x.clone().requires_grad_() for x in data]
    for i, g in enumerate(torch.autograd.grad(L(*leaves), leaves)):
        for place in range(0, g.numel(), 1 if g.numel() < 20 else 13):
            ends = []
            for sign in (1, -1):
                bump = torch.zeros(g.numel(), dtype=f64)
                bump[place] = sign * h
                ends.append(L(*(x + bump.view_as(x) if j == i else x for j, x in enumerate(data))))
            slope = (ends[0] - ends[1]).item() / (2 * h)
            assert float(g.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_synth_matching_loss_is_one_at_the_start_and_zero_at_the_target():
    apply, w, (X, Y, a) = synth_case()
    target, end = randn(100, seed=9), synth.unroll(apply, w, [(X, Y)] * 3, a)
    still = synth.unroll(apply, w, [(X, Y)] * 3, 0 * a)
    assert float(synth.matching_loss(still, w, target)) == 1
    assert float(synth.matching_loss(target, w, target)) == 0
    L = synth.matching_loss(end, w, target)
    stretched = synth.matching_loss(w + 7 * (end - w), w, w + 7 * (target - w))
    assert torch.allclose(stretched, L, rtol=1e-12)
    assert torch.allclose(
        synth.matching_loss(w + 2 * (target - w), w, target), torch.ones(()).to(f64)
    )


def test_synth_segments_lie_in_the_window_and_use_all_of_it():
    """Snapshot i is the number 10^i, so the mean of some says which ones were drawn."""
    window, trajectory = 3, [torch.tensor(10.0**i, dtype=f64) for i in range(8)]
    legal = {
        round(sum(10**k for k in drawn) / r, 6)
        for r in (2, 3)
        for drawn in itertools.product((1, 2, 3), repeat=r)
    }
    starts, targets = set(), []
    for seed in range(300):
        start, target = synth.draw_segment(trajectory, window, False, seeded(seed))
        assert target / start == 10**window
        starts.add(float(start))
        start, target = synth.draw_segment(trajectory, window, True, seeded(seed))
        targets.append(round(float(target / start), 6))
    assert starts == {1, 10, 100, 1000, 10000} and set(targets) == legal
    one_snapshot = sum(target in (10, 100, 1000) for target in targets) / 300
    assert one_snapshot == pytest.approx((1 / 3 + 1 / 9) / 2, abs=0.08)  # r is 2 or 3
    for average in (False, True):
        assert synth.draw_segment(trajectory[:2], 1, average, seeded())[1] == 10


def test_synth_a_trajectory_that_rests_or_is_too_short_is_refused():
    still = [torch.ones(3)] * 6
    with pytest.raises(FloatingPointError, match="does not move"):
        synth.draw_segment(still, 3, True, seeded())
    with pytest.raises(ValueError, match="at least 4 models, and there are 3"):
        synth.draw_segment(still[:3], 3, True, seeded())
    partly = [*still, torch.zeros(3)]  # only the last step moves
    assert not torch.equal(*synth.draw_segment(partly, 1, False, seeded()))


def test_synth_first_guess_is_noise_with_classes_in_order():
    c = synth_settings(ipc=2, syn_labels=5.0, syn_step=0.25)
    X, Y, a = synth.first_guess(c, (1, 40, 50), 3, seeded(), torch.zeros(1, dtype=f64))
    assert X.shape == (6, 1, 40, 50) and X.dtype == f64 and float(a) == 0.25
    assert abs(X.mean()) < 0.05 and X.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(Y, 5.0 * F.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 3))


def test_synth_data_that_made_the_trajectory_are_not_changed():
    """The data by which gradient descent made the trajectory have L = 0, so Adam stays there."""
    apply, w, data = synth_case()
    trajectory, M = synth_descent(apply, w, data, 5), 3

    def loss_of(D, s):
        start, target = synth.draw_segment(trajectory, M, False, seeded(s))
        return synth.matching_loss(synth.unroll(apply, start, [D[:2]] * M, D.step), start, target)

    learnt, losses = synth.learn(loss_of, data, 3, (1e-9, 1e-9, 1e-9))
    assert max(losses) < 1e-20
    worse, _ = synth.learn(loss_of, data._replace(step=data.step * 2), 1, (0, 0, 0))
    assert float(loss_of(worse, 0)) > 0.1


def test_synth_synthesis_learns_all_three_and_matches_better():
    task, (apply, w, data) = SynthTask(), synth_case()
    trajectory = synth_descent(apply, w, data._replace(step=torch.tensor(0.2)), 5)
    kw = dict(window=2, outer_steps=150, inner_steps=3, ipc=2, syn_labels=1.0, rate_step=1e-3)
    c = synth_settings(**kw)
    learnt, losses = synth.synthesize(task, trajectory, c, seeded(4))
    assert len(losses) == 150 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    guess = synth.first_guess(c, task.image_shape, 3, seeded(4), w)
    assert all(not torch.equal(x, y) and x.isfinite().all() for x, y in zip(learnt, guess))
    again, _ = synth.synthesize(task, trajectory, c, seeded(4))
    assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(learnt, again))
    one_step, _ = synth.synthesize(
        task, trajectory, synth_settings(**kw | {"outer_steps": 1}), seeded(4)
    )
    for x, y, rate in zip(one_step, guess, (0.05, 0.1, 1e-3)):  # Adam's first step is its rate
        assert float((x - y).abs().max()) == pytest.approx(rate, rel=1e-3)


def test_synth_synthesis_augments_only_when_told_to(monkeypatch):
    task, (apply, w, data) = SynthTask(), synth_case()
    trajectory, calls = synth_descent(apply, w, data, 3), []
    monkeypatch.setattr(synth, "augmented", lambda x, g: calls.append(1) or x)
    for augment in (False, True):
        c = synth_settings(outer_steps=2, inner_steps=4, syn_augment=augment)
        synth.synthesize(task, trajectory, c, seeded())
        assert len(calls) == 8 * augment  # anew in each of the inner steps


def test_synth_learning_skips_bad_steps_and_gives_up_in_the_end():
    _, _, guess = synth_case()

    def good(D, s):
        return sum(x.square().sum() for x in D)

    def sometimes(D, s):
        return good(D, s) * (math.nan if s % 3 == 0 else 1)

    learnt, losses = synth.learn(sometimes, guess, 36, (0.1, 0.1, 0.0))
    assert sum(map(math.isnan, losses)) == 12 and all(x.isfinite().all() for x in learnt)
    assert float(learnt.step) == pytest.approx(0.3 / 2**12)  # halved, and its rate is 0
    for steps, tried in ((5, 5), (50, 10)):
        calls = []
        with pytest.raises(FloatingPointError, match=f"not finite in {tried} steps in a row"):
            synth.learn(
                lambda D, s: calls.append(s) or good(D, s) * math.nan, guess, steps, (1,) * 3
            )
        assert len(calls) == tried
    with pytest.raises(FloatingPointError):  # a loss that is finite, with gradients that are not
        synth.learn(lambda D, s: (D.step - D.step).sqrt() + good(D, s), guess, 20, (0.1,) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_synth_finetuning_is_adam_by_hand(dtype):
    apply, w, (X, Y, _) = synth_case(5)
    w, X, Y = w.to(dtype), X.to(dtype), Y.to(dtype)
    v, m, s, k = w.clone(), torch.zeros_like(w), torch.zeros_like(w), 0
    for _ in range(3):
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
            k += 1
            g = torch.func.grad(lambda v: synth.synthetic_loss(apply, v, X[rows], Y[rows]))(v)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            v = v - 0.01 * (m / (1 - 0.9**k)) / ((s / (1 - 0.999**k)).sqrt() + 1e-8)
    end = synth.finetune(apply, w, X, Y, 3, 0.01, 2)
    assert torch.allclose(end, v, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)
    assert torch.equal(synth.finetune(apply, w, X, Y, 0, 0.01, 2), w) and not end.requires_grad
    assert synth.synthetic_loss(apply, end, X, Y) < synth.synthetic_loss(apply, w, X, Y)


# Augmentation. `high` and `low` replace the random strength by the ends of its range.
def high(*shape):
    return torch.ones(1, *shape, dtype=f64)


def low(*shape):
    return torch.zeros(1, *shape, dtype=f64)


def same(*shape):
    return torch.full((1, *shape), 0.5, dtype=f64)


def picture(C=3, side=28):
    """A smooth picture: a bump in the middle, with another height in each channel."""
    axis = torch.linspace(-1, 1, side, dtype=f64)
    bump = (-12 * (axis[:, None] ** 2 + 2 * axis[None, :] ** 2)).exp()
    return bump * torch.arange(1.0, C + 1, dtype=f64).view(1, C, 1, 1)


def center(x):
    """Center of mass of each picture in pixels: (row, column)."""
    axis, mass = torch.arange(x.shape[-1], dtype=f64), x.sum(1)[0]
    return float(mass.sum(1) @ axis / mass.sum()), float(mass.sum(0) @ axis / mass.sum())


def spread(x):
    """Standard deviations of the mass in pixels: (rows, columns)."""
    axis, mass, (r, c) = torch.arange(x.shape[-1], dtype=f64), x.sum(1)[0], center(x)
    by_row, by_column = mass.sum(1) / mass.sum(), mass.sum(0) / mass.sum()
    return float(by_row @ (axis - r) ** 2) ** 0.5, float(by_column @ (axis - c) ** 2) ** 0.5


def angle_of(line):
    """By how many degrees a line through the middle of a square picture goes up to the right."""
    rows = torch.arange(len(line), dtype=f64)
    left, right = (float(line[:, c] @ rows / line[:, c].sum()) for c in (40, 160))
    return math.degrees(math.atan2(left - right, 120))


def test_synth_augmentation_of_strength_zero_changes_nothing():
    x = picture()
    for change in (synth.crop, synth.scale, synth.rotate, synth.color, synth.flip):
        assert torch.allclose(change(x, same), x, atol=1e-12), change
    for strength in (low, high):
        moved = synth.crop(x, strength)
        assert not torch.allclose(moved, x, atol=0.1)


def test_synth_crop_shifts_by_an_eighth_of_the_side():
    x = picture()
    (r0, c0), (r1, c1), (r2, c2) = (center(y) for y in (x, synth.crop(x, high), synth.crop(x, low)))
    for a, b in ((r0, r1), (c0, c1), (r2, r0), (c2, c0)):
        assert a - b == pytest.approx(28 / 8, abs=0.2)
    bottom = torch.zeros(1, 1, 16, 16, dtype=f64)
    bottom[..., 8, 8] = 1
    assert (synth.crop(bottom, high)[0, 0] == 1).nonzero().tolist() == [[6, 6]]  # 16 / 8 = 2


def test_synth_cutout_is_half_the_side_and_may_stand_over_the_edge():
    x = torch.ones(1, 2, 28, 28, dtype=f64)
    holes = []
    for start in range(28):
        y = synth.cutout(x, lambda *shape, s=start: torch.full((1, *shape), (s + 0.5) / 28).to(f64))
        rows = (y[0, 0] == 0).any(1).nonzero().view(-1)
        assert torch.equal(y[0, 0], y[0, 1]) and (y[0, 0] == 0).sum() == len(rows) ** 2
        holes.append((int(rows[0]), int(rows[-1])))
    assert max(b - a + 1 for a, b in holes) == 14 and (7, 20) in holes
    assert holes[0] == (0, 6) and holes[27] == (20, 27)


def test_synth_color_ends_at_its_strengths():
    x = picture()
    grey = x.mean(1, keepdim=True)
    bright, dark = (synth.color(x, strength) for strength in (high, low))
    more = (x - grey) * 2 + grey
    assert torch.allclose(bright, (more - more.mean()) * 1.5 + more.mean() + 0.5)
    assert torch.allclose(dark, ((grey - grey.mean()) * 0.5 + grey.mean() - 0.5).expand_as(x))


def test_synth_flip_scale_and_rotation_end_at_their_strengths():
    x = picture() * torch.linspace(0, 1, 28, dtype=f64)
    assert torch.allclose(synth.flip(x, low), x.flip(-1)) and torch.allclose(synth.flip(x, high), x)
    round_ = picture(side=84)
    for strength, factor in ((high, 1 / 1.2), (low, 1.2)):
        for before, after in zip(spread(round_), spread(synth.scale(round_, strength))):
            assert after / before == pytest.approx(factor, rel=0.02)
    line = torch.zeros(1, 1, 201, 201, dtype=f64)
    line[..., 100, 10:191] = 1  # a horizontal line, and then a vertical one
    for strength, sign in ((high, 1), (low, -1)):
        across = synth.rotate(line, strength)[0, 0]
        down = synth.rotate(line.mT, strength)[0, 0].T
        assert angle_of(across) == pytest.approx(sign * 15, abs=0.2)
        assert angle_of(down) == pytest.approx(-sign * 15, abs=0.2)


def test_synth_augmentation_draws_every_change_and_carries_gradients():
    x, seen = randn(4, 3, 8, 8).requires_grad_(), set()
    changes = ("color", "crop", "cutout", "flip", "scale", "rotate")
    for seed in range(60):
        y = synth.augmented(x, seeded(seed))
        (g,) = torch.autograd.grad(y.square().sum(), x)
        assert y.shape == x.shape and y.isfinite().all() and g.abs().sum() > 0
        assert torch.equal(y, synth.augmented(x, seeded(seed)))
        seen.add(int(torch.randint(len(changes), (1,), generator=seeded(seed))))
    assert seen == set(range(6))
    apply, w, (X, Y, a) = synth_case()
    end = synth.unroll(apply, w, [(synth.augmented(X, seeded(s)), Y) for s in range(2)], a)
    assert end.isfinite().all() and not torch.allclose(end, w)
