"""Sparse dithering: a grid that is as fine as a wanted relative error nu needs.

    h = sqrt(nu / d),   |x_j| becomes a multiple k_j of the step 2 h ||x||

    name                        E x_hat   E||x_hat - x||^2   mean number of bits
    dithering --no-randomized   biased    <= nu ||x||^2      <= d (2 + 2 log2(3/2 + 1/(2 sqrt(nu))))
    dithering                   x         <= nu ||x||^2      <= d (2 + 2 log2(1 + 1/(2 sqrt(nu))))

and 32 bits for the step, 1 for a flag. To the nearest multiple (not randomized), |x_j| moves by at
most h ||x||, which makes nu ||x||^2 in all. What is below h ||x|| vanishes: sparse. Then not the
step is sent but the multiplier of least squares, <|x|, k> / <k, k>, which is never worse.
Randomized, |x_j| goes to the multiple above or below, without bias. The bound is the same, because
p (1 - p) (2 h)^2 <= h^2. That is QSGD's grid with s = sqrt(d / nu) / 2.

The multiples are small whatever x is: sum_j |x_j| <= sqrt(d) ||x||, so their mean m is at most
1 / (2 sqrt(nu)), and 1/2 more to the nearest. Elias's dense form takes at most 2 + 2 log2(1 + k_j)
bits for k_j and its sign. That is concave in k_j, so all take at most d (2 + 2 log2(1 + m)).

Source: Albasyoni et al. 2020 (arXiv 2010.03246). Only its abstract was at hand: grid and step are
rebuilt from it, and the lines above prove the bounds. The multiplier and the code may differ from
the paper's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from codes.elias import decode_integers, encode_integers
from compress import from_bytes, seal, to_bytes, unseal


@dataclass(frozen=True)
class Dithering:
    """|x_j| is rounded to a multiple of one step, and the multiples go through Elias's code.

    Fields: the step (or the multiplier of least squares) as a float; the multiples with the signs
    of x_j, as `codes.elias.encode_integers` writes them. x_hat is step times multiple.
    Raises ValueError if nu >= 1 and not randomized, where the bound says nothing.
    """

    nu: Annotated[
        float, "largest ||x_hat - x||^2 / ||x||^2, on the mean if randomized", 1e-6, 100
    ] = 0.5
    randomized: Annotated[
        bool, "round at random (unbiased), or to the nearest (half the error)"
    ] = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.nu >= 1 and not self.randomized:
            raise ValueError(f"nu = {self.nu:g} bounds nothing to the nearest; it must be below 1")

    @property
    def unbiased(self):
        return self.randomized

    @property
    def contractive(self):
        return self.nu < 1

    def encode(self, x, generator=None):
        step = 2 * (self.nu / len(x)) ** 0.5 * torch.linalg.vector_norm(x, dtype=torch.float64)
        step = self.on_the_wire(step, x)  # rounded before it is used, as in QSGD
        k = self.multiples(x, step, generator)
        if not self.randomized:
            step = self.on_the_wire(least_squares(x.abs().double(), k.double()), x)
        return seal(to_bytes(step), encode_integers(torch.where(x < 0, -k, k).long()))

    def decode(self, buffer, d):
        step, code = unseal(buffer).tensor_split([self.dtype.itemsize])
        step = from_bytes(step, 1, self.dtype)
        if step < 0:
            raise ValueError("damaged buffer: a step below 0")
        largest = torch.finfo(self.dtype).max  # a multiple next to it must not become infinite
        return (decode_integers(code, d).to(self.dtype) * step).clamp_(-largest, largest)

    def on_the_wire(self, step, x):
        """The step as a number that both the wire and x can hold."""
        largest = min(torch.finfo(self.dtype).max, torch.finfo(x.dtype).max)
        return step.clamp_max(0.99 * largest).to(x.dtype).to(self.dtype)

    def multiples(self, x, step, generator):
        """|x| / step, rounded -> whole numbers >= 0 [d]."""
        per_step = 1 / step.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
        noise = 0.5
        if self.randomized:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        k = (x.abs() * per_step + noise).floor_()
        return k.clamp_(max=2**32)  # where a step underflows; Elias's words end at 2^33


def least_squares(size, k):
    """The a that minimises ||size - a k||^2, for size [d] and k [d]; 0 if k is 0."""
    return size @ k / k.square().sum().clamp_min(1)
