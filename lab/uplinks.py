"""Uplinks of one bit that are no published compressors: trials. What is it that the sign lacks?

    python run.py --compress lab/uplinks.py:BucketSign

    BucketSign    the sign, with a scale for every 512 numbers, as QSGD has
    RandomSign    the same, and the sign is drawn at random, so that x_hat is x on the mean

QSGD with one level is RandomSign with a zero.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from compress import Sign, from_bytes, pack, seal, to_bytes, unpack, unseal


@dataclass(frozen=True)
class BucketSign(Sign):
    """x_hat_j = sign(x_j) times the mean magnitude of its bucket.

    Fields: the scales as floats; d signs of one bit, 1 for minus.
    """

    bucket: Annotated[int, "coordinates that share a scale", 1] = 512

    def encode(self, x, generator=None):
        scales = torch.stack(
            [part.abs().mean(dtype=torch.float64) for part in x.split(self.bucket)]
        )
        return seal(to_bytes(scales.to(self.dtype)), pack((x < 0).to(torch.int32), 1))

    def decode(self, buffer, d):
        n = -(-d // self.bucket)
        scales, negative = unseal(buffer).tensor_split([n * self.dtype.itemsize])
        size = from_bytes(scales, n, self.dtype).repeat_interleave(self.bucket)[:d]
        return torch.where(unpack(negative, d, 1) > 0, -size, size)


@dataclass(frozen=True)
class RandomSign(BucketSign):
    """x_hat_j = the largest magnitude of its bucket, with plus or minus; on the mean it is x_j."""

    unbiased = True

    def encode(self, x, generator=None):
        scales = torch.stack([part.abs().amax() for part in x.split(self.bucket)]).to(self.dtype)
        size = scales.to(x.dtype).repeat_interleave(self.bucket)[: len(x)]
        noise = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        minus = (2 * noise - 1) * size > x  # with probability (1 - x_j / size) / 2
        return seal(to_bytes(scales), pack(minus.to(torch.int32), 1))
