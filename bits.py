"""Bits: how integers and floats become a buffer of bytes, and how a buffer is read without trusting it.

A compressor (compress.py) ends with a few floats and many small integers. This file writes them down without gaps. Integers
that are all about as likely take a fixed number of bits; where small ones are likelier, likely numbers get short code words:

    code     numbers      bits of one number          short when
    fixed    0..2^b - 1   b                           never: all are equally long
    gamma    v >= 1       2 floor(log2 v) + 1         P(v) falls like 1 / v^2, whatever the scale: no parameter
    rice     v >= 0       r + 1 + floor(v / 2^r)      P(v) falls by a constant factor, like the gaps between rare events

and two codes of a whole vector of signed integers k [d] are made of them, `elias` (that of QSGD) and `runs`. A string of bits is
a bool tensor until it is packed. No loop runs over numbers or bits, only over binary digits, of which a number has few.

A buffer is a uint8 tensor that ends with a CRC-32. What is damaged or forged raises ValueError; it is never a number that is
not finite, a long wait or an allocation beyond a fixed multiple of the buffer's own size and d.

Sources: gamma, Elias 1975; rice, Golomb 1966 and Rice 1979; QSGD, Alistarh et al. 2017; the rest ours.  Read next: compress.py.
"""
import zlib

import torch


# ------------------------------------------------------------------------------------------------ fixed length, bytes
def pack(v, bits):
    """Write n integers 0 <= v < 2^bits one after the other, without gaps.

    v [n] integer tensor, bits in 0..32 -> uint8 [ceil(n bits / 8)].  Eight values of b <= 8 bits are exactly b bytes:
    they are summed into one 64-bit word, of which b bytes are kept. Longer values are cut into 8-bit planes.
    Example: pack([1, 2, 3], 2) is the one byte 0b111001.  Source: ours.
    """
    if bits == 0:
        return v.new_zeros(0, dtype=torch.uint8)
    if bits > 8:
        return torch.cat([pack(v & 255, 8), pack(v >> 8, bits - 8)])
    if bits == 8:
        return v.to(torch.uint8)
    n = len(v)
    words = torch.nn.functional.pad(v.long(), (0, -n % 8)).view(-1, 8)
    words = (words << (bits * torch.arange(8, device=v.device))).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[:(n * bits + 7) // 8]


def unpack(b, n, bits):
    """The inverse of `pack`: uint8 [ceil(n bits / 8)] -> int64 [n].  Source: ours."""
    if bits == 0:
        return b.new_zeros(n, dtype=torch.long)
    if bits > 8:
        return unpack(b[:n], n, 8) | unpack(b[n:], n, bits - 8) << 8
    if bits == 8:
        return b.long()
    groups = torch.nn.functional.pad(b, (0, -len(b) % bits)).view(-1, bits)
    words = torch.nn.functional.pad(groups, (0, 8 - bits)).contiguous().view(torch.long)
    return (words >> (bits * torch.arange(8, device=b.device)) & (1 << bits) - 1).reshape(-1)[:n]


def to_bytes(x):
    """The memory of a tensor of any shape [...] and type as bytes: -> uint8 [numel * itemsize].  Source: ours."""
    return x.reshape(-1).contiguous().view(torch.uint8)


def from_bytes(b, dtype):
    """The inverse of `to_bytes`: uint8 [n * itemsize] -> [n]; ValueError if a number is not finite.  Source: ours."""
    x = b.clone().view(dtype)                          # the clone aligns the memory
    if x.dtype.is_floating_point and not x.isfinite().all():
        raise ValueError("damaged buffer: it holds a number that is not finite")
    return x


def seal(*parts):
    """Join byte tensors [n_1], [n_2], ... and close them with a CRC-32: -> uint8 [sum n_i + 4].  Source: ours."""
    body = torch.cat(parts)
    crc = zlib.crc32(body.cpu().numpy())
    return torch.cat([body, torch.tensor(list(crc.to_bytes(4, "little")), dtype=torch.uint8, device=body.device)])


def unseal(buffer, length, exact=True):
    """Check a sealed buffer [n + 4] and return its body [n].

    Raises ValueError if it is no byte tensor, is not `length` + 4 long (or longer, if not exact), or fails its checksum.
    Source: ours.
    """
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError("a buffer is a one-dimensional uint8 tensor")
    if len(buffer) < length + 4 or exact and len(buffer) != length + 4:
        raise ValueError(f"buffer of {len(buffer)} bytes, expected {'' if exact else 'at least '}{length + 4}")
    body, crc = buffer[:-4], buffer[-4:]
    if zlib.crc32(body.contiguous().cpu().numpy()) != int.from_bytes(bytes(crc.tolist()), "little"):
        raise ValueError("damaged buffer: the checksum does not match")
    return body


# ------------------------------------------------------------------------------------------------ variable length
def spread(v, r):
    """The r lowest binary digits of v [n], lowest first -> bits [n r].  Source: definition."""
    return (v[:, None] >> torch.arange(r, device=v.device) & 1).bool().view(-1)


def gather(b, n, r):
    """The inverse of `spread`: bits [n r] -> int64 [n].  Source: definition."""
    return (b.view(n, r).long() << torch.arange(r, device=b.device)).sum(1)


class Reader:
    """The bits of a byte tensor [n], taken from front to back; ValueError when more are wanted than there are.

    Whatever a forged buffer claims, what is read from it is at most as long as the buffer.  Source: ours.
    """

    def __init__(self, b):
        self.bits, self.at = unpack(b, 8 * len(b), 1).bool(), 0

    def take(self, n):
        """The next n bits -> bool [n].  Source: ours."""
        if n > len(self.bits) - self.at:
            raise ValueError("damaged buffer: it ends too soon")
        self.at += n
        return self.bits[self.at - n:self.at]

    def unary(self, n):
        """n numbers, each written as so many zeros and a one -> int64 [n].  Source: definition."""
        ends = self.bits[self.at:].nonzero().view(-1)[:n]
        if len(ends) < n:
            raise ValueError("damaged buffer: it ends too soon")
        self.take(int(ends[-1]) + 1 if n else 0)
        return torch.diff(ends, prepend=ends.new_tensor([-1])) - 1

    def close(self):
        """ValueError unless what is left [n < 8] is the padding of the last byte.  Source: ours."""
        if len(self.bits) - self.at >= 8 or self.bits[self.at:].any():
            raise ValueError("damaged buffer: something follows its end")


def gamma(v):
    """Elias's gamma code: 2 floor(log2 v) + 1 bits for each of n integers v >= 1.

    v [n] int64 -> bits [sum of lengths].  A code word is the binary number without its leading 1; every digit is announced
    by a 1, and a 0 ends the word. The words stand side by side, not end to end: all first flags, the digits these announce,
    all second flags, ... The length is the same, and both directions become operations on whole vectors; words end to end
    could only be decoded one after the other.  Example: gamma([1, 2, 5]) = 011 01 01 0 0.  Source: Elias 1975.
    """
    out = [v.new_zeros(0, dtype=torch.bool)]
    while len(v):
        more = v > 1
        v = v[more]
        out += [more, (v & 1).bool()]
        v = v >> 1
    return torch.cat(out)


def read_gamma(reader, n):
    """The inverse of `gamma`: the next n numbers -> int64 [n], each below 2^33.  Source: Elias 1975."""
    digits = []
    while n:
        more = reader.take(n)
        n = int(more.sum())
        digits.append((more, reader.take(n)))
        if len(digits) > 33:
            raise ValueError("damaged buffer: a number of more than 33 binary digits")
    v = reader.bits.new_zeros(0, dtype=torch.long)
    for more, digit in reversed(digits):
        v = torch.ones_like(more, dtype=torch.long).masked_scatter_(more, 2 * v + digit)
    return v


def rice(v):
    """Rice's code: each v >= 0 without its r lowest binary digits as so many zeros and a one, then these digits as they are.

    v [n] int64 -> bits [5 + n (r + 1) + sum floor(v / 2^r)].  The r in 0..31 that makes this shortest goes first, in 5 bits.
    Source: Golomb 1966; Rice 1979.
    """
    r = 0                                     # one digit more for each saves zeros, fewer and fewer: the first loss ends the search
    while r < 31 and len(v) + int((v >> r + 1).sum()) < int((v >> r).sum()):
        r += 1
    ends = ((v >> r) + 1).cumsum(0)
    unary = v.new_zeros(int(ends[-1]) if len(v) else 0, dtype=torch.bool)
    unary[ends - 1] = True
    return torch.cat([spread(v.new_tensor([r]), 5), unary, spread(v, r)])


def read_rice(reader, n):
    """The inverse of `rice`: the next n numbers -> int64 [n].  Source: Rice 1979."""
    r = int(gather(reader.take(5), 1, 5))
    high = reader.unary(n)
    return high << r | gather(reader.take(n * r), n, r)


def subset(mask):
    """A set of places, bool [n]: the gaps between its members, or between the others where these are fewer -> bits.

    Within 5 % of the entropy n H(share) of a random set, plus a header of 8 + 2 log2(n) bits; never above n + header, because
    rice with r = 0 is the mask itself.  Source: Golomb 1966.
    """
    flip = 2 * int(mask.sum()) > len(mask)
    where = (mask ^ flip).nonzero().view(-1)
    gaps = torch.diff(where, prepend=where.new_tensor([-1]), append=where.new_tensor([len(mask)])) - 1
    return torch.cat([spread(where.new_tensor([flip]), 1), gamma(where.new_tensor([len(where) + 1])), rice(gaps)])


def read_subset(reader, n):
    """The inverse of `subset` -> bool [n].  Source: Golomb 1966."""
    flip, count = reader.take(1), int(read_gamma(reader, 1)) - 1
    gaps = read_rice(reader, count + 1)
    if int(gaps.sum()) + count != n:                         # no sum can overflow: it is below 2^32 times the bits read
        raise ValueError(f"damaged buffer: its runs do not fill {n} places")
    mask = torch.zeros(n, dtype=torch.bool, device=gaps.device)
    mask[(gaps[:-1] + 1).cumsum(0) - 1] = True
    return mask ^ flip


# ------------------------------------------------------------------------------------------- vectors of signed integers
def read_signs(reader, k):
    """k [d] with a minus wherever the next bits, one for each non-zero, say so -> [d].  Source: definition."""
    negative = reader.take(int((k != 0).sum()))
    return torch.where(torch.zeros_like(k, dtype=torch.bool).masked_scatter_(k != 0, negative), -k, k)


def elias(k):
    """QSGD's code of k [d] int64: the shorter of its two forms -> bits.

    Sparse: for every non-zero the distance from the one before, its size and its sign; it costs at most
    3 + 2 log2(d/n) + log2(mean k^2) bits for each of n non-zeros, up to the last run. Dense: |k| + 1 for every coordinate and
    the signs of the non-zeros. We use Elias's gamma code where the paper has his omega code: it is nowhere longer up to 127.
    Source: Alistarh et al. 2017, section 3.1 (sparse) and the full version (dense).
    """
    where = k.nonzero().view(-1)
    size, steps = k[where].abs(), torch.diff(where, prepend=where.new_tensor([-1]), append=where.new_tensor([len(k)]))
    dense = torch.cat([spread(k.new_tensor([1]), 1), gamma(k.abs() + 1)])
    sparse = torch.cat([spread(k.new_tensor([0]), 1), gamma(k.new_tensor([len(where) + 1])), gamma(steps), gamma(size)])
    return torch.cat([min(sparse, dense, key=len), k[where] < 0])


def read_elias(reader, d):
    """The inverse of `elias` -> int64 [d].  Source: Alistarh et al. 2017."""
    if reader.take(1):
        k = read_gamma(reader, d) - 1
    else:
        n = int(read_gamma(reader, 1)) - 1
        steps = read_gamma(reader, n + 1)
        if int(steps.sum()) != d + 1:                        # the last run ends at d: a buffer belongs to one d
            raise ValueError(f"damaged buffer: its runs do not fill d = {d} places")
        k = steps.new_zeros(d)
        k[steps[:-1].cumsum(0) - 1] = read_gamma(reader, n)
    return read_signs(reader, k)


LAYERS = 3                                                       # above 3, levels are so few that their code hardly matters


def runs(k):
    """k [d] int64 by layers: which |k| are above 0, which of those above 1, of those above 2, what is left, and the signs -> bits.

    A layer is a set and is sent as `subset` does, close to its entropy, so no distribution of small levels has to be
    assumed; the few numbers above 3 go through `rice`. At most d + sum |k| + n bits for n non-zeros, up to four headers.
    Source: ours, in the place of an enumeration of all supports with n members.
    """
    above, out = k.abs(), []
    for _ in range(LAYERS):
        layer = above > 0
        out.append(subset(layer))
        above = above[layer] - 1
    return torch.cat([*out, rice(above), k[k != 0] < 0])


def read_runs(reader, d):
    """The inverse of `runs` -> int64 [d].  Source: ours."""
    layers = []
    for _ in range(LAYERS):
        layers.append(read_subset(reader, int(layers[-1].sum()) if layers else d))
    k = read_rice(reader, int(layers[-1].sum()))
    for layer in reversed(layers):
        k = torch.zeros_like(layer, dtype=torch.long).masked_scatter_(layer, k + 1)
    return read_signs(reader, k)


CODES = {"elias": (elias, read_elias), "runs": (runs, read_runs)}


def write_integers(k, code):
    """Signed integers k [d] as bytes, uint8 [n], in the code named "elias" or "runs".  Source: see each."""
    return pack(CODES[code][0](k), 1)


def read_integers(b, d, code):
    """The inverse of `write_integers`: uint8 [n] -> int64 [d], or ValueError.  Source: see each."""
    reader = Reader(b)
    k = CODES[code][1](reader, d)
    reader.close()
    return k
