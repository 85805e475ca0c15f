"""Compressors: an update x [d] becomes a buffer of bytes, and a buffer becomes x_hat [d].

A federated client sends its update over a slow uplink, so it sends less than it computed. Every compressor
here is a pair: `encode(x) -> buffer`, a uint8 tensor with really packed bits, and `decode(buffer, d) -> x_hat`.
The server sees buffers only, and the cost of a message is `len(buffer)`; nothing is counted on paper.

    name       what x_hat is                                    E x_hat   error E||x_hat - x||^2        bits (+ 32 checksum)
    identity   x                                                x         0                             32 d
    topk       the k largest |x_j|, the rest 0                  biased    <= (1 - k/d) ||x||^2          k (32 + ceil(log2 d))
    randk      k random coordinates (scaled by d/k or not)      x / -     (d/k - 1) or (1 - k/d) ||x||^2  32 k + 64
    qsgd       |x_j| rounded at random to a grid of s levels    x         <= min(q/s^2, sqrt(q)/s) ||x||^2  d (1 + ceil(log2(s+1))) + 32 per bucket
      elias    the same                                         x         the same                      <= n (3 + 2 log2(d/n) + log2 l^2) + 32 a bucket
    dithering  |x_j| rounded to multiples of 2 sqrt(nu/d) ||x||   x / -   <= nu ||x||^2                 <= d (2.5 + 1/(2 sqrt(nu))) + 32
    sign       (||x||_1 / d) sign(x)                            biased    ||x||^2 - ||x||_1^2 / d       d + 32
    natural    |x_j| rounded at random to a power of two        x         <= ||x||^2 / 8                9 d

d is the length of x, q the bucket length of qsgd (d if there is one bucket; the bound is for the l2 scale), n the number of
coordinates whose level is not 0 and l^2 the mean square of these levels. elias and dithering are entropy codes: what is sent is
mostly far less than the bound, which holds for every x (of dithering at random on the mean) up to headers of some 100 bits.
The README shows measured bits and errors; `python -m tools.tradeoff` makes that table.
Unbiased with E err^2 <= omega ||x||^2 is the class U(omega); E err^2 <= (1 - delta) ||x||^2 is the class B(delta).
The table is tested line by line (test_all.py, section compress).

Sources: QSGD, Alistarh et al. 2017; top-k and error feedback, Stich et al. 2018, Karimireddy et al. 2019; natural
compression, Horvath et al. 2019; sparse dithering, Albasyoni et al. 2020; the class names, Beznosikov et al. 2020. How integers
become bits, and the 4-byte checksum that ends every buffer, so that a damaged message is an error and never a wrong update, is
in bits.py. Read next: sam.py.
"""
from dataclasses import dataclass

import torch

from bits import from_bytes, pack, read_integers, seal, to_bytes, unpack, unseal, write_integers


# ------------------------------------------------------------------------------------------------ the compressors
@dataclass(frozen=True)
class Identity:
    """x_hat = x: nothing is lost, 4 d bytes (+4) are sent.

    encode: x [d] -> buffer; decode: buffer -> [d].  `dtype` is the float type on the wire, in every class of this file;
    float64 lets a test be exact.  Source: definition.
    """
    dtype: torch.dtype = torch.float32
    unbiased = True

    def encode(self, x, generator=None):
        return seal(to_bytes(x.to(self.dtype)))

    def decode(self, buffer, d):
        return from_bytes(unseal(buffer, d * self.dtype.itemsize), self.dtype)


@dataclass(frozen=True)
class TopK:
    """Keep the k largest |x_j|: values as floats, places as ceil(log2 d)-bit integers.

    encode: x [d] -> buffer; decode: buffer -> [d].  ||x_hat - x||^2 <= (1 - k/d) ||x||^2, with equality when all
    |x_j| are equal; applying it twice changes nothing.  Source: Stich et al. 2018, Definition 2.1.
    """
    k: int
    dtype: torch.dtype = torch.float32
    unbiased = False

    def encode(self, x, generator=None):
        check_k(self.k, len(x))
        kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        kept[x.abs().topk(self.k, sorted=False).indices] = True
        where = kept.nonzero().view(-1)                                # in increasing order, cheaper than a sort
        return seal(to_bytes(x[where].to(self.dtype)), pack(where, index_bits(len(x))))

    def decode(self, buffer, d):
        check_k(self.k, d)
        values, bits = self.k * self.dtype.itemsize, index_bits(d)
        body = unseal(buffer, values + (self.k * bits + 7) // 8)
        where = unpack(body[values:], self.k, bits)
        if where[-1] >= d or (where[1:] <= where[:-1]).any():
            raise ValueError(f"damaged buffer: places must increase and stay below d = {d}")
        value = from_bytes(body[:values], self.dtype)
        return value.new_zeros(d).index_copy_(0, where, value)


@dataclass(frozen=True)
class RandK:
    """Keep k coordinates chosen at random: the values and the 64-bit seed from which the server redraws the places.

    encode: x [d] -> buffer; decode: buffer -> [d].  scaled: x_hat = (d/k) x on the chosen places, unbiased with
    omega = d/k - 1; unscaled ("random masking"): E||x_hat - x||^2 = (1 - k/d) ||x||^2.  Source: Stich et al. 2018.
    """
    k: int
    scaled: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self):
        return self.scaled

    def places(self, seed, d):
        """The k places of [d] that a seed stands for -> [k], the same for client and server.  Source: Stich et al. 2018."""
        return torch.randperm(d, generator=torch.Generator().manual_seed(seed))[:self.k]

    def encode(self, x, generator=None):
        check_k(self.k, len(x))
        seed = torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else "cpu")
        where = self.places(int(seed), len(x)).to(x.device)
        return seal(to_bytes(seed.to(x.device)), to_bytes(x[where].to(self.dtype)))

    def decode(self, buffer, d):
        check_k(self.k, d)
        body = unseal(buffer, 8 + self.k * self.dtype.itemsize)
        value = from_bytes(body[8:], self.dtype) * (d / self.k if self.scaled else 1)
        if not value.isfinite().all():
            raise ValueError("damaged buffer: a value times d/k is not finite")
        where = self.places(int(from_bytes(body[:8], torch.long)) & 2**62 - 1, d).to(body.device)
        return value.new_zeros(d).index_copy_(0, where, value)


@dataclass(frozen=True)
class QSGD:
    """Stochastic quantization: |x_j| / scale is rounded at random, up or down, to the grid 0, 1/s, 2/s, ..., 1.

    encode: x [d] -> buffer; decode: buffer -> [d].  scale = "l2" (||x||_2, as in the paper) or "max" (max |x_j|: a
    finer grid, since the largest entry is at most the norm); `bucket` = q > 0 gives every q coordinates a scale of
    their own.  Unbiased; E||x_hat - x||^2 = (scale/s)^2 sum_j p_j (1 - p_j), p_j the fractional part of s |x_j|/scale.
    code = "fixed" gives every level the same number of bits and one to the sign, so "b-bit quantization" with the sign inside b
    is s = 2^(b-1) - 1. code = "elias" is the paper's entropy code: few bits for the zeros, which are many when s << sqrt(d).
    code = "runs" is ours (bits.py), usually shorter. x_hat is the same for all three.
    Source: Alistarh et al. 2017, section 3.1; the fixed-length code is ours.
    """
    levels: int = 7
    scale: str = "l2"
    bucket: int = 0
    dtype: torch.dtype = torch.float32
    code: str = "fixed"
    unbiased = True

    def rows(self, d):
        """How a vector [d] is cut: -> (number of buckets, their length).  Source: Alistarh et al. 2017 (bucketing)."""
        q = self.bucket if 0 < self.bucket < d else d
        return -(-d // q), q

    def encode(self, x, generator=None):
        s, d = self.levels, len(x)
        n, q = self.rows(d)
        x = torch.nn.functional.pad(x, (0, n * q - d)).view(n, q)
        # the sum of squares is taken in float64, where it cannot overflow; the scale is rounded to the wire's type FIRST,
        # so that both ends use the same grid and the code stays unbiased
        size = x.abs().amax(1) if self.scale == "max" else torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        size = size.clamp_max(0.99 * torch.finfo(self.dtype).max).to(self.dtype)
        u = x.abs() * (s / size.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(torch.finfo(x.dtype).max)[:, None]
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        level = (u + noise).floor_().clamp_(max=s).view(-1)[:d].to(torch.int32)      # l + 1 with probability u - l; clamp: rounding only
        negative = x.view(-1)[:d] < 0
        if self.code == "fixed":
            body = pack(level + (negative.to(torch.int32) << s.bit_length()), 1 + s.bit_length())
        else:
            body = write_integers(torch.where(negative, -level, level).long(), self.code)
        return seal(to_bytes(size), body)

    def decode(self, buffer, d):
        s, bits = self.levels, self.levels.bit_length()
        n, q = self.rows(d)
        head, fixed = n * self.dtype.itemsize, self.code == "fixed"
        body = unseal(buffer, head + ((d * (1 + bits) + 7) // 8 if fixed else 0), exact=fixed)
        size, code = from_bytes(body[:head], self.dtype), body[head:]
        if fixed:
            code = unpack(code, d, 1 + bits)
            level = code & (1 << bits) - 1
            level = torch.where(code >> bits > 0, -level, level)
        else:
            level = read_integers(code, d, self.code)
        if (size < 0).any() or (level.abs() > s).any():
            raise ValueError(f"damaged buffer: a scale below 0 or a level above s = {s}")
        x = level.to(self.dtype)
        x = (torch.nn.functional.pad(x, (0, n * q - d)).view(n, q) * (size / s)[:, None]).view(-1)[:d]
        if not x.isfinite().all():
            raise ValueError("damaged buffer: a level times its scale is not finite")
        return x


@dataclass(frozen=True)
class SparseDithering:
    """A grid as fine as a wanted error needs: |x_j| becomes a multiple of the step 2h ||x||_2, h = sqrt(nu / d).

    encode: x [d] -> buffer; decode: buffer -> [d].  To the nearest multiple (not randomized), no |x_j| moves by more than
    h ||x||, so ||x_hat - x||^2 <= nu ||x||^2, and what is below h ||x|| vanishes: sparse. Not the step is sent then but the
    multiplier of least squares, <|x|, k> / <k, k>, which is never worse. At random, to the multiple above or below: unbiased,
    E||x_hat - x||^2 <= nu ||x||^2, since p (1 - p) (2h)^2 <= h^2; this is QSGD's grid with s = sqrt(d / nu) / 2.
    The multiples are small whatever x is: sum_j |x_j| <= sqrt(d) ||x||, so on the mean they are at most 1 / (2 sqrt(nu)), and
    `bits.runs` takes d (2 + 1 / (2 sqrt(nu))) bits at most (in expectation; d / 2 more to the nearest), usually far fewer.
    Source: Albasyoni et al. 2020, of which only the abstract was at hand: grid and step are rebuilt, the bounds proved by these
    lines; the multiplier and the code may differ in detail from theirs.
    """
    nu: float = 0.5
    randomized: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self):
        return self.randomized

    def encode(self, x, generator=None):
        largest = 0.99 * torch.finfo(self.dtype).max
        step = 2 * (self.nu / len(x)) ** 0.5 * torch.linalg.vector_norm(x, dtype=torch.float64)
        step = step.clamp_max(largest).to(self.dtype)                                # rounded first, as in QSGD
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) if self.randomized else 0.5
        k = (x.abs() * (1 / step.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)) + noise).floor_()
        if not self.randomized:
            step = ((x.abs().double() @ k.double()) / k.double().square().sum().clamp_min(1)).clamp_max(largest).to(self.dtype)
        return seal(to_bytes(step), write_integers(torch.where(x < 0, -k, k).long(), "runs"))

    def decode(self, buffer, d):
        body = unseal(buffer, self.dtype.itemsize, exact=False)
        step = from_bytes(body[:self.dtype.itemsize], self.dtype)
        if step < 0:
            raise ValueError("damaged buffer: a step below 0")
        largest = torch.finfo(self.dtype).max                                        # a multiple next to it must not become infinite
        return (read_integers(body[self.dtype.itemsize:], d, "runs").to(self.dtype) * step).clamp_(-largest, largest)


@dataclass(frozen=True)
class Sign:
    """One bit a coordinate and the mean magnitude: x_hat = (||x||_1 / d) sign(x).

    encode: x [d] -> buffer; decode: buffer -> [d].  ||x_hat - x||^2 = ||x||^2 - ||x||_1^2 / d if no x_j is 0 (a zero is
    sent as +).  Source: Karimireddy et al. 2019.
    """
    dtype: torch.dtype = torch.float32
    unbiased = False

    def encode(self, x, generator=None):
        return seal(to_bytes(x.abs().mean(dtype=torch.float64).to(self.dtype)), pack((x < 0).to(torch.int32), 1))

    def decode(self, buffer, d):
        body = unseal(buffer, self.dtype.itemsize + (d + 7) // 8)
        size = from_bytes(body[:self.dtype.itemsize], self.dtype)
        return torch.where(unpack(body[self.dtype.itemsize:], d, 1) > 0, -size, size)


@dataclass(frozen=True)
class Natural:
    """Natural compression: the sign and the exponent of a float32, the mantissa rounded away at random.

    encode: x [d] -> buffer; decode: buffer -> [d] float32.  |x_j| = 2^e (1 + f), 0 <= f < 1, becomes 2^(e+1) with
    probability f, else 2^e: unbiased with omega = 1/8. Adding a uniform 23-bit integer to the bit pattern and cutting
    the mantissa does just that, subnormal numbers and 0 included.  Source: Horvath et al. 2019.
    """
    unbiased = True

    def encode(self, x, generator=None):
        pattern = x.float().contiguous().view(torch.int32)
        noise = torch.randint(1 << 23, x.shape, generator=generator, dtype=torch.int32, device=x.device)
        exponent = ((pattern & 0x7FFFFFFF) + noise >> 23).clamp_(max=254)        # 255 would be infinity
        return seal(pack(exponent, 8), pack((pattern < 0).to(torch.int32), 1))

    def decode(self, buffer, d):
        body = unseal(buffer, d + (d + 7) // 8)
        if (body[:d] == 255).any():
            raise ValueError("damaged buffer: exponent 255 is not a finite number")
        size = (body[:d].to(torch.int32) << 23).view(torch.float32)
        return torch.where(unpack(body[d:], d, 1) > 0, -size, size)


def index_bits(d):
    """Bits that name one of d places: ceil(log2 d), for a vector [d].  Source: definition."""
    return (d - 1).bit_length()


def masking_within(size, dtype=torch.float32):
    """Random masking at equal bytes: the k of the largest RandK buffer of at most `size` bytes, for any vector [d].  Source: definition."""
    return (size - 12) // dtype.itemsize                              # the seed takes 8 bytes, the checksum 4


def check_k(k, d):
    """ValueError unless k of a vector [d] can be kept: 1 <= k <= d.  Source: definition."""
    if not 1 <= k <= d:
        raise ValueError(f"k = {k} coordinates cannot be kept of d = {d}; k must be in 1..{d}")


# ------------------------------------------------------------------------------------------------ error feedback
def with_feedback(compressor, x, e, generator=None):
    """Error feedback: send what is owed too, and remember what was left out.

    p = e + x;  send C(p);  e <- p - C(p).   x [d], e [d] the residual this client kept (0 at first) -> (buffer, new e [d]).
    It telescopes: the sum of everything sent plus the current e is the sum of all x. Use it with contractive compressors
    (topk, sign, unscaled randk); with omega > 1 the residual grows without bound.
    Source: Karimireddy et al. 2019 (EF-SGD), in update scale (x already contains the learning rate).
    """
    p = e + x
    buffer = compressor.encode(p, generator)
    return buffer, p - compressor.decode(buffer, len(p)).to(p.dtype)


COMPRESSORS = {"identity": Identity, "topk": TopK, "randk": RandK, "qsgd": QSGD, "dithering": SparseDithering, "sign": Sign, "natural": Natural}
