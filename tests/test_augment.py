"""The differentiable augmentation: each change at the ends of its range, seen from outside.

    python -m pytest -q tests/test_augment.py

`high` and `low` stand in for the random numbers, at the ends of their range, and `same` in the
middle of it.
"""

import math

import pytest
import torch

from tests.toys import f64, seeded
from tests.toys import normal as randn
from vision import augment


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


def test_augmentation_of_strength_zero_changes_nothing():
    x = picture()
    for change in (augment.crop, augment.scale, augment.rotate, augment.color, augment.flip):
        assert torch.allclose(change(x, same), x, atol=1e-12), change
    for strength in (low, high):
        moved = augment.crop(x, strength)
        assert not torch.allclose(moved, x, atol=0.1)


def test_crop_shifts_by_an_eighth_of_the_side():
    x = picture()
    (r0, c0), (r1, c1), (r2, c2) = (
        center(y) for y in (x, augment.crop(x, high), augment.crop(x, low))
    )
    for a, b in ((r0, r1), (c0, c1), (r2, r0), (c2, c0)):
        assert a - b == pytest.approx(28 / 8, abs=0.2)
    bottom = torch.zeros(1, 1, 16, 16, dtype=f64)
    bottom[..., 8, 8] = 1
    assert (augment.crop(bottom, high)[0, 0] == 1).nonzero().tolist() == [[6, 6]]  # 16 / 8 = 2


def test_cutout_is_half_the_side_and_may_stand_over_the_edge():
    x = torch.ones(1, 2, 28, 28, dtype=f64)
    holes = []
    for start in range(28):
        y = augment.cutout(
            x, lambda *shape, s=start: torch.full((1, *shape), (s + 0.5) / 28).to(f64)
        )
        rows = (y[0, 0] == 0).any(1).nonzero().view(-1)
        assert torch.equal(y[0, 0], y[0, 1]) and (y[0, 0] == 0).sum() == len(rows) ** 2
        holes.append((int(rows[0]), int(rows[-1])))
    assert max(b - a + 1 for a, b in holes) == 14 and (7, 20) in holes
    assert holes[0] == (0, 6) and holes[27] == (20, 27)


def test_color_ends_at_its_strengths():
    x = picture()
    grey = x.mean(1, keepdim=True)
    bright, dark = (augment.color(x, strength) for strength in (high, low))
    more = (x - grey) * 2 + grey
    assert torch.allclose(bright, (more - more.mean()) * 1.5 + more.mean() + 0.5)
    assert torch.allclose(dark, ((grey - grey.mean()) * 0.5 + grey.mean() - 0.5).expand_as(x))


def test_flip_scale_and_rotation_end_at_their_strengths():
    x = picture() * torch.linspace(0, 1, 28, dtype=f64)
    assert torch.allclose(augment.flip(x, low), x.flip(-1)) and torch.allclose(
        augment.flip(x, high), x
    )
    round_ = picture(side=84)
    for strength, factor in ((high, 1 / 1.2), (low, 1.2)):
        for before, after in zip(spread(round_), spread(augment.scale(round_, strength))):
            assert after / before == pytest.approx(factor, rel=0.02)
    line = torch.zeros(1, 1, 201, 201, dtype=f64)
    line[..., 100, 10:191] = 1  # a horizontal line, and then a vertical one
    for strength, sign in ((high, 1), (low, -1)):
        across = augment.rotate(line, strength)[0, 0]
        down = augment.rotate(line.mT, strength)[0, 0].T
        assert angle_of(across) == pytest.approx(sign * 15, abs=0.2)
        assert angle_of(down) == pytest.approx(-sign * 15, abs=0.2)


def test_augmentation_draws_every_change_and_carries_gradients():
    x, seen = randn(4, 3, 8, 8).requires_grad_(), set()
    changes = ("color", "crop", "cutout", "flip", "scale", "rotate")
    for seed in range(60):
        y = augment.augmented(x, seeded(seed))
        (g,) = torch.autograd.grad(y.square().sum(), x)
        assert y.shape == x.shape and y.isfinite().all() and g.abs().sum() > 0
        assert torch.equal(y, augment.augmented(x, seeded(seed)))
        seen.add(int(torch.randint(len(changes), (1,), generator=seeded(seed))))
    assert seen == set(range(6))
