"""Natural compression: sign and exponent of a float32; the mantissa is rounded away at random.

    |x_j| = 2^e (1 + f), 0 <= f < 1, becomes 2^(e+1) with probability f, and 2^e otherwise

    name      E x_hat   E||x_hat - x||^2   bits
    natural   x         <= ||x||^2 / 8     9 d

The variance of one |x_j| is 4^e f (1 - f), and f (1 - f) / (1 + f)^2 is largest at f = 1/3, where
it is 1/8. Adding a uniform 23-bit integer to the bits of the float and cutting the mantissa does
just that, for subnormal numbers and for 0 too.

Source: Horvath et al. 2019.
"""

from dataclasses import dataclass

import torch

from compress import from_bytes, pack, seal, unpack, unseal


@dataclass(frozen=True)
class Natural:
    """Every |x_j| becomes a power of two at random; x_hat is float32.

    Fields: d exponents of one byte, as in IEEE 754 (0 stands for 0, e for 2^(e - 127), and 255 is
    refused); d signs of one bit, 1 for minus, packed as in compress.pack.
    """

    unbiased = True

    def encode(self, x, generator=None):
        pattern = x.float().contiguous().view(torch.int32)
        noise = torch.randint(
            1 << 23, x.shape, generator=generator, dtype=torch.int32, device=x.device
        )
        exponent = (pattern & 0x7FFFFFFF) + noise >> 23
        exponent.clamp_(max=254)  # 255 would be infinity
        return seal(pack(exponent, 8), pack((pattern < 0).to(torch.int32), 1))

    def decode(self, buffer, d):
        exponent, negative = unseal(buffer).tensor_split([d])
        exponent = unpack(exponent, d, 8)
        pattern = exponent.to(torch.int32) << 23
        size = from_bytes(pattern.view(torch.uint8), d, torch.float32)  # refuses exponent 255
        return torch.where(unpack(negative, d, 1) > 0, -size, size)
