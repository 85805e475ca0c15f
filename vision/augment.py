"""Differentiable changes of synthetic images, for `--syn-augment`: DynaFed's augmentation.

Images are changed at random in every inner step of the synthesis, so that what is learnt does not
hang on single pixels. The synthesis differentiates through these changes, so they are arithmetic on
pixels: shifts, turns and stretches are affine maps, read between the pixels by interpolation.

Sources: DSA, Zhao and Bilen 2021; the strengths are those of DynaFed's released code.
"""

import math

import torch
from torch.nn.functional import affine_grid, grid_sample


def augmented(x, generator):
    """One of six differentiable changes, drawn at random, applied to all images x [n, C, H, W].

    Each image draws its own strength.
    """
    changes = (color, crop, cutout, flip, scale, rotate)
    change = changes[int(torch.randint(len(changes), (1,), generator=generator))]

    def uniform(*shape):
        """Numbers in 0..1, drawn on the CPU so that every device gets the same.   [n, *shape]"""
        return torch.rand(len(x), *shape, generator=generator, dtype=x.dtype).to(x.device)

    return change(x, uniform)


def color(x, uniform):
    """Brightness up to +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    x = x + (uniform(1, 1, 1) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * uniform(1, 1, 1)) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (uniform(1, 1, 1) + 0.5) + mean


def cutout(x, uniform):
    """A square of half the side becomes 0; it may reach over the edge."""
    row, column = (band(side, (uniform(1) * side).floor(), x.device) for side in x.shape[2:])
    return x * ~(row[:, None, :, None] & column[:, None, None, :])


def band(side, middle, device):
    """Which of the places 0 ... side - 1 lie in a band of half the side around the middle."""
    first = middle - side // 4
    place = torch.arange(side, device=device)
    return (first <= place) & (place < first + side // 2)


def crop(x, uniform):
    """Shift by up to an eighth of the side, height and width independently."""
    A = identities(x)
    A[:, :, 2] = (2 * uniform(2) - 1) * 0.25  # the side has length 2 in affine_grid
    return resample(x, A)


def flip(x, uniform):
    """Mirror left and right, with probability 1/2."""
    A = identities(x)
    A[:, 0, 0] = torch.where(uniform() < 0.5, -1.0, 1.0)
    return resample(x, A)


def scale(x, uniform):
    """Stretch by 1/1.2 to 1.2, height and width independently."""
    A = identities(x)
    A[:, [0, 1], [0, 1]] = 1.2 ** (2 * uniform(2) - 1)
    return resample(x, A)


def rotate(x, uniform):
    """Turn by up to 15 degrees."""
    A = identities(x)
    angle = (2 * uniform() - 1) * math.radians(15)
    A[:, 0, 0], A[:, 0, 1] = angle.cos(), -angle.sin()
    A[:, 1, 0], A[:, 1, 1] = angle.sin(), angle.cos()
    return resample(x, A)


def identities(x):
    """The affine map (u, v) -> (u, v) for each image of x [n, C, H, W] -> [n, 2, 3]"""
    return torch.eye(2, 3, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)


def resample(x, A):
    """Images whose pixel (u, v) is that of x at A (u, v, 1).   x [n, C, H, W], A [n, 2, 3]"""
    grid = affine_grid(A, x.shape, align_corners=False)
    return grid_sample(x, grid, align_corners=False)
