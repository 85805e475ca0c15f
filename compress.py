"""Compressors: an update x [d] becomes bytes, and the bytes become x_hat [d].

In federated learning a client sends its update over a slow uplink, so it sends less than it
computed. A compressor is a pair, `encode(x) -> buffer` and `decode(buffer, d) -> x_hat`. A buffer
is a uint8 tensor of really packed bits. The server sees buffers only, and a message costs
len(buffer) bytes. Shapes stand in brackets: x [d] has d entries, and [] is a single number.

    name      what x_hat is                      E x_hat  E||x_hat - x||^2       bits
    identity  x                                  x        0                      32 d
    topk      the k largest |x_j|, the rest 0    biased   <= (1 - k/d) ||x||^2   k (32 + a)
    randk     k random coordinates, times d/k    x        (d/k - 1) ||x||^2      64 + 32 k
              the same, not scaled               biased   (1 - k/d) ||x||^2      64 + 32 k
    qsgd      |x_j| rounded to a grid at random  x        <= omega ||x||^2       32 n + d (1 + b)
    sign      (||x||_1 / d) sign(x)              biased   ||x||^2 - ||x||_1^2/d  32 + d

The checksum adds 32 bits to each, and a packed field is filled up to whole bytes. a = ceil(log2 d)
bits name one of d places. qsgd cuts x into n buckets of q coordinates, and its grid has s levels
above 0, which b = ceil(log2(s + 1)) bits number; omega = min(q / (4 s^2), sqrt(q) / s), at most
the paper's.

A compressor is in the class U(omega) if it is unbiased and E||x_hat - x||^2 <= omega ||x||^2. It is
in the class B(delta), or contractive, if E||x_hat - x||^2 <= (1 - delta) ||x||^2 with delta > 0.

The wire format
* A buffer holds the fields that the compressor's docstring lists, in that order and without gaps.
  It ends with a checksum: the CRC-32 (that of zlib) of all bytes before it, as a 4-byte integer.
* Whatever takes several bytes is little-endian: the least significant byte comes first.
* A float is IEEE 754. It has 4 bytes, unless `dtype` chooses another type (float64 in tests).
* Integers of b bits are packed without gaps; see `pack`. In a field of signs, 1 means minus.
* d and the settings are not sent. Both ends know them.

A damaged or forged buffer raises ValueError, or decodes to finite numbers.

Sources: QSGD, Alistarh et al. 2017; top-k and rand-k, Stich et al. 2018; sign and error feedback,
Karimireddy et al. 2019; the classes U and B, Beznosikov et al. 2020, who write them with the
numbers 1 + omega and 1 / delta. The wire format is this project's own. Entropy codes and further
compressors are in codes/.
"""

import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.nn import functional as F

# -------------------------------------------------------------------------------------- the wire


def pack(v, bits):
    """Write n integers 0 <= v < 2^bits without gaps.

    v [n], bits in 0..32 -> uint8 [ceil(n bits / 8)].  Up to 8 bits: integer i takes the bits
    i * bits to (i + 1) * bits - 1 of a string of bits, its least significant bit first. Bit t of
    the string is bit t % 8 of byte t // 8, where bit 0 is the least significant one. Zeros fill the
    last byte. More than 8 bits: first come the lowest 8 bits of all n integers, n bytes, and then
    the higher bits of all n, packed by the same rule.

    Examples: pack([1, 2, 3], 2) is the byte 0b00_11_10_01. pack([0x1AB, 0x0CD], 9) is AB CD 01.
    """
    if bits == 0:
        return v.new_zeros(0, dtype=torch.uint8)
    if bits > 8:
        return torch.cat([pack(v & 255, 8), pack(v >> 8, bits - 8)])
    if bits == 8:
        return v.to(torch.uint8)
    # Eight integers are exactly `bits` bytes: they are summed into one 64-bit word.
    n = len(v)
    eights = F.pad(v.long(), (0, -n % 8)).view(-1, 8)
    words = (eights << (bits * torch.arange(8, device=v.device))).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: (n * bits + 7) // 8]


def unpack(b, n, bits):
    """The inverse of `pack`: bytes -> int64 [n]; ValueError if their length is wrong."""
    if bits > 8:
        return unpack(b[:n], n, 8) | (unpack(b[n:], n, bits - 8) << 8)
    expect(b, (n * bits + 7) // 8)
    if bits == 0:
        return b.new_zeros(n, dtype=torch.long)
    if bits == 8:
        return b.long()
    groups = F.pad(b, (0, -len(b) % bits)).view(-1, bits)
    words = F.pad(groups, (0, 8 - bits)).contiguous().view(torch.long)
    mask = (1 << bits) - 1
    eights = (words >> (bits * torch.arange(8, device=b.device))) & mask
    return eights.reshape(-1)[:n]


def to_bytes(x):
    """The memory of a tensor of any shape and type -> uint8 [numel * itemsize]."""
    return x.reshape(-1).contiguous().view(torch.uint8)


def from_bytes(b, n, dtype):
    """n numbers out of uint8 [n * itemsize] -> [n]; ValueError unless all are there and finite."""
    expect(b, n * dtype.itemsize)
    x = b.clone().view(dtype)  # the clone aligns the memory
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError("damaged buffer: it holds a number that is not finite")
    return x


def expect(b, length):
    """ValueError unless the field b has `length` bytes."""
    if len(b) != length:
        raise ValueError(f"damaged buffer: a field of {length} bytes has {len(b)}")


def seal(*fields):
    """Join byte tensors and add the checksum -> uint8 [sum of lengths + 4]."""
    body = torch.cat(fields)
    crc = zlib.crc32(body.cpu().numpy()).to_bytes(4, "little")
    return torch.cat([body, torch.tensor(list(crc), dtype=torch.uint8, device=body.device)])


def unseal(buffer):
    """Check the checksum of a buffer [n + 4] -> the bytes before it [n]; ValueError if it fails."""
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError("a buffer is a one-dimensional uint8 tensor")
    if len(buffer) < 4:
        raise ValueError(f"damaged buffer: {len(buffer)} bytes cannot hold a checksum of 4")
    body, crc = buffer[:-4], buffer[-4:]
    if zlib.crc32(body.contiguous().cpu().numpy()) != int.from_bytes(crc.tolist(), "little"):
        raise ValueError("damaged buffer: the checksum does not match")
    return body


# ------------------------------------------------------------------------------- the compressors
# Each is a frozen dataclass. encode(x, generator=None): x [d] -> buffer, uint8 [bytes].
# decode(buffer, d) -> x_hat [d], or ValueError. `dtype` is the float type on the wire, no setting.
# `unbiased` and `contractive`, both True if absent, decide whether error feedback is used.


@dataclass(frozen=True)
class Identity:
    """x_hat = x.

    Fields: x as d floats.
    """

    dtype: torch.dtype = torch.float32
    unbiased = True

    def encode(self, x, generator=None):
        return seal(to_bytes(x.to(self.dtype)))

    def decode(self, buffer, d):
        return from_bytes(unseal(buffer), d, self.dtype)


def count(k, d):
    """The number of coordinates that the setting k keeps of d.  ValueError if it cannot be kept."""
    kept = round(k * d) if k < 1 else k
    if not 1 <= kept <= d or kept != int(kept):
        rule = f"a count must be whole and in 1..{d}, a fraction below 1 must keep at least one"
        raise ValueError(f"k = {k:g} keeps {kept:g} of d = {d} coordinates; {rule}")
    return int(kept)


def place_bits(d):
    """Bits that name one of d places: ceil(log2 d)."""
    return (d - 1).bit_length()


@dataclass(frozen=True)
class TopK:
    """Keep the k largest |x_j|; the rest of x_hat is 0.

    ||x_hat - x||^2 <= (1 - k/d) ||x||^2, with equality when all |x_j| are equal.

    Fields: the kept x_j as k floats, in the order of increasing j; their places j, counted from 0,
    as k integers of ceil(log2 d) bits, in the same order.
    Source: Stich et al. 2018, Definition 2.1.
    """

    k: Annotated[float, "coordinates kept: a fraction of d if below 1, else a count", 1e-12] = 0.05
    dtype: torch.dtype = torch.float32
    unbiased = False

    def encode(self, x, generator=None):
        d = len(x)
        kept = torch.zeros(d, dtype=torch.bool, device=x.device)
        kept[x.abs().topk(count(self.k, d), sorted=False).indices] = True
        places = kept.nonzero().view(-1)  # increasing, and cheaper than a sort
        return seal(to_bytes(x[places].to(self.dtype)), pack(places, place_bits(d)))

    def decode(self, buffer, d):
        k = count(self.k, d)
        values, places = unseal(buffer).tensor_split([k * self.dtype.itemsize])
        values = from_bytes(values, k, self.dtype)
        places = unpack(places, k, place_bits(d))
        if places[-1] >= d or (places[1:] <= places[:-1]).any():
            raise ValueError(f"damaged buffer: places must increase and stay below d = {d}")
        return values.new_zeros(d).index_copy_(0, places, values)


@dataclass(frozen=True)
class RandK:
    """Keep k coordinates chosen at random; the server redraws their places from a seed.

    scaled: x_hat = (d/k) x at the chosen places, which is unbiased with omega = d/k - 1.
    Not scaled ("random masking"): x_hat = x there, and E||x_hat - x||^2 = (1 - k/d) ||x||^2.

    Fields: the seed, an integer of 8 bytes (of which the low 32 bits count); the chosen x_j, not
    yet multiplied by d/k, as k floats in the order in which the places were drawn.
    The places are the first k of torch.randperm(d) under a CPU generator with that seed, in that
    order. In other words: start with r = 0..d-1. For i = 0, 1, ..., d-2 exchange r_i and r_z, where
    z = i + (u_i mod (d - i)) and u_0, u_1, ... are the 32-bit outputs of the Mersenne Twister
    MT19937, initialised with the low 32 bits of the seed. The places are r_0, ..., r_{k-1}.
    Source: Stich et al. 2018.
    """

    k: Annotated[float, "coordinates kept: a fraction of d if below 1, else a count", 1e-12] = 0.05
    scaled: Annotated[bool, "multiply by d/k (unbiased), or not (random masking)"] = True
    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self):
        return self.scaled

    @property
    def contractive(self):
        return not self.scaled

    def places(self, seed, d):
        """The places that a seed stands for -> int64 [k], the same on every device."""
        generator = torch.Generator().manual_seed(seed & (2**32 - 1))
        return torch.randperm(d, generator=generator)[: count(self.k, d)]

    def encode(self, x, generator=None):
        device = generator.device if generator else "cpu"
        seed = torch.randint(2**62, (1,), generator=generator, device=device)
        places = self.places(int(seed), len(x)).to(x.device)
        return seal(to_bytes(seed.to(x.device)), to_bytes(x[places].to(self.dtype)))

    def decode(self, buffer, d):
        k = count(self.k, d)
        seed, values = unseal(buffer).tensor_split([8])
        seed = int(from_bytes(seed, 1, torch.long))
        values = from_bytes(values, k, self.dtype) * (d / k if self.scaled else 1)
        if not values.isfinite().all():
            raise ValueError("damaged buffer: a value times d/k is not finite")
        return values.new_zeros(d).index_copy_(0, self.places(seed, d).to(values.device), values)


@dataclass(frozen=True)
class QSGD:
    """Stochastic quantization: |x_j| / scale is rounded at random to the grid 0, 1/s, 2/s, ..., 1.

    u = s |x_j| / scale becomes the level floor(u) + 1 with probability p_j = u - floor(u), and
    floor(u) otherwise. x_hat_j = sign(x_j) * scale * level / s, which is unbiased:
    E||x_hat - x||^2 = (scale / s)^2 sum_j p_j (1 - p_j), for each bucket.
    The scale is ||x||_2, as in the paper, or max |x_j|, whose grid is finer.

    x is cut into n = ceil(d / q) buckets of q = `bucket` coordinates, and the last may be shorter.
    bucket = 0, or a bucket of at least d, is one bucket.
    Fields: the n scales as floats; for each coordinate an integer of 1 + b bits, where
    b = ceil(log2(s + 1)). Its low b bits are the level. Its highest bit is the sign, 1 for minus; a
    level 0 may have either. So s = 2^(c-1) - 1 is "c-bit quantization" with the sign inside c.

    Example: QSGD(levels=3, scale="max", bucket=0) makes of [3, -1, 0, 2] the bytes 00 00 40 40 (the
    float 3) 2B 04 (the integers 0b011, 0b101, 0b000, 0b010) and the checksum.
    Source: Alistarh et al. 2017, section 3.1. The code of fixed length is this project's own.
    """

    levels: Annotated[
        int, "levels s; with the sign, 1 + ceil(log2(s+1)) bits a coordinate", 1, 2**15 - 1
    ] = 1
    scale: Annotated[Literal["l2", "max"], "scale of a bucket"] = "max"
    bucket: Annotated[int, "coordinates that share a scale; 0 is all", 0] = 512
    dtype: torch.dtype = torch.float32
    unbiased = True

    def encode(self, x, generator=None):
        n, q = self.shape(len(x))
        rows = F.pad(x, (0, n * q - len(x))).view(n, q)
        scales = self.bucket_scales(rows)
        level = self.random_levels(rows, scales, generator).view(-1)[: len(x)]
        return seal(to_bytes(scales), self.write(level.to(torch.int32), x < 0))

    def decode(self, buffer, d):
        n, q = self.shape(d)
        scales, code = unseal(buffer).tensor_split([n * self.dtype.itemsize])
        scales, level = from_bytes(scales, n, self.dtype), self.read(code, d)
        if (scales < 0).any() or (level.abs() > self.levels).any():
            raise ValueError(f"damaged buffer: a scale below 0 or a level above s = {self.levels}")
        step = scales / self.levels
        rows = F.pad(level.to(self.dtype), (0, n * q - d)).view(n, q)
        x = (rows * step[:, None]).view(-1)[:d]
        if not x.isfinite().all():
            raise ValueError("damaged buffer: a level times its scale is not finite")
        return x

    def shape(self, d):
        """How x [d] is cut: -> (number of buckets n, their length q)."""
        q = self.bucket if 0 < self.bucket < d else d
        return -(-d // q), q

    def bucket_scales(self, rows):
        """One scale a bucket [n, q] -> [n], already rounded to the wire's type.

        It is rounded before it is used: both ends then have the same grid, and the code stays
        unbiased. Squares are summed in float64, where they cannot overflow.
        """
        if self.scale == "max":
            scales = rows.abs().amax(1).double()
        else:
            scales = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        largest = min(torch.finfo(self.dtype).max, torch.finfo(rows.dtype).max)
        # 0.99, so that level * (scale / s) does not overflow in `decode`
        return scales.clamp_max(0.99 * largest).to(self.dtype)

    def random_levels(self, rows, scales, generator):
        """u of rows [n, q], rounded to levels at random -> [n, q]."""
        limits = torch.finfo(rows.dtype)
        per_unit = self.levels / scales.to(rows.dtype).clamp_min(limits.tiny)
        u = rows.abs() * per_unit.clamp_max(limits.max)[:, None]
        noise = torch.rand(u.shape, generator=generator, dtype=u.dtype, device=u.device)
        # floor(u + noise) is floor(u) + 1 with probability p_j; above s only by rounding errors
        return (u + noise).floor_().clamp_(max=self.levels)

    def write(self, level, negative):
        """Levels int32 [d] and signs bool [d] -> bytes."""
        b = self.levels.bit_length()
        return pack(level + (negative.to(torch.int32) << b), 1 + b)

    def read(self, code, d):
        """The inverse of `write`: bytes -> signed levels int64 [d]."""
        b = self.levels.bit_length()
        code = unpack(code, d, 1 + b)
        level = code & ((1 << b) - 1)
        return torch.where(code >> b > 0, -level, level)


@dataclass(frozen=True)
class Sign:
    """One bit a coordinate, and the mean magnitude: x_hat = (||x||_1 / d) sign(x).

    ||x_hat - x||^2 = ||x||^2 - ||x||_1^2 / d. A zero counts as plus.

    Fields: ||x||_1 / d as a float; d signs of one bit, 1 for minus.
    Source: Karimireddy et al. 2019.
    """

    dtype: torch.dtype = torch.float32
    unbiased = False

    def encode(self, x, generator=None):
        size = x.abs().mean(dtype=torch.float64).to(self.dtype)
        return seal(to_bytes(size), pack((x < 0).to(torch.int32), 1))

    def decode(self, buffer, d):
        size, negative = unseal(buffer).tensor_split([self.dtype.itemsize])
        size = from_bytes(size, 1, self.dtype)
        return torch.where(unpack(negative, d, 1) > 0, -size, size)


# -------------------------------------------------------------------------------- error feedback


def with_feedback(compressor, x, e, generator=None):
    """Error feedback: send what is owed too, and remember what was left out.

        p = e + x;  send C(p);  e <- p - C(p)

    x [d] is the update and already contains the learning rate; e [d] is the residual that this
    client kept, 0 at first -> (buffer, new e [d]). The sum of everything sent plus the current e is
    the sum of all x. Use it with contractive compressors (topk, sign, unscaled randk). With others
    e may grow without bound, as with scaled randk, so fl.Federation refuses a compressor whose
    attribute `contractive` is False. QSGD has no such attribute: there it depends on the settings.
    Source: Karimireddy et al. 2019 (EF-SGD).
    """
    p = e + x
    buffer = compressor.encode(p, generator)
    return buffer, p - compressor.decode(buffer, len(p)).to(p.dtype)
