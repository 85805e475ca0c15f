"""Elias's code: small integers become few bits. QSGD's own entropy code, and the readers of bits.

QSGD at few levels (compress.py) sends many zeros, and each costs as much as any other level. An
entropy code gives likelier numbers shorter words. Elias's gamma code spends 2 floor(log2 v) + 1
bits on an integer v >= 1: it suits P(v) that falls like 1 / v^2 and needs no parameter.

    name        x_hat                bits for n levels that are not 0, with mean square l^2
    qsgd-elias  the same as qsgd's   <= n (3 + 2 log2(d / n) + log2 l^2), and 32 for each bucket

up to a few bits for the number n and the last run. On the mean over the rounding, with one bucket
and the scale "l2", n <= s (s + sqrt(d)) (QSGD, Lemma 3.1). At s = sqrt(d) the paper promises
2.8 d + 32 bits.

The paper has Elias's omega code in the place of gamma. Gamma is nowhere longer up to 127, and whole
vectors of it can be written and read at once: no loop here runs over numbers or bits, only over the
binary digits of the largest number.

A string of bits is a bool tensor until `pack(bits, 1)` makes it bytes. What a forged buffer claims
is never believed before it is compared with the bits that are there.

Sources: gamma, Elias 1975; its use, Alistarh et al. 2017, section 3.1 (sparse) and the full version
(dense). The order of the bits is this project's own.
"""

from dataclasses import dataclass

import torch

from compress import QSGD, pack, unpack


class Reader:
    """The bits of a byte tensor, read from front to back; ValueError when they do not suffice."""

    def __init__(self, b):
        self.bits, self.at = unpack(b, 8 * len(b), 1).bool(), 0

    def take(self, n):
        """The next n bits -> bool [n]."""
        if n > len(self.bits) - self.at:
            raise ValueError("damaged buffer: it ends too soon")
        self.at += n
        return self.bits[self.at - n : self.at]

    def close(self):
        """ValueError unless only the padding of the last byte is left: fewer than 8 zeros."""
        if len(self.bits) - self.at >= 8 or self.bits[self.at :].any():
            raise ValueError("damaged buffer: something follows its end")


def gamma(v):
    """Elias's gamma code of n integers: v [n] int64, v >= 1 -> bits [sum of 2 floor(log2 v) + 1].

    A word holds the binary digits of v without its leading 1, the least significant digit first.
    Before each digit stands a flag 1, and a flag 0 ends the word. The words of the n integers are
    written side by side: the first flags of all; then the first digits of those with a flag 1;
    then the second flags of these; their second digits, if flagged; and so on, until no flag is 1.
    Words end to end would have the same length but could be read only one after the other.

    Example: gamma([1, 2, 5]) = 011 01 01 0 0: flags, digits of 2 and 5, flags, digit of 5, flag.
    """
    out = [v.new_zeros(0, dtype=torch.bool)]
    while len(v):
        more = v > 1
        v = v[more]
        out += [more, (v & 1).bool()]
        v = v >> 1
    return torch.cat(out)


def read_gamma(reader, n):
    """The inverse of `gamma`: the next n numbers -> int64 [n], each below 2^33; else ValueError."""
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


def encode_integers(k):
    """Signed integers k [d] int64 -> bytes, the shorter of two forms.

    sparse: the flag 0; gamma of n + 1, where n is the number of non-zeros; gamma of n + 1
    distances: from place -1 to the first non-zero, from each to the next, from the last to place d;
    gamma of the n sizes |k_j|; n signs.
    dense: the flag 1; gamma of the d numbers |k_j| + 1; n signs.
    A sign is one bit, 1 for minus, in the order of the places, for non-zeros only. The string of
    bits becomes bytes as in `pack`: bit t is bit t % 8 of byte t // 8, and zeros fill the last
    byte.

    Examples. [0, 0, 0, -2, 0, 1] is dense and has the bytes D1 08:
        1, gamma([1, 1, 1, 3, 1, 2]) = 000101 10 00, signs 10
    Nineteen zeros and -2 are sparse and have the bytes 92 4E 02:
        0, gamma([2]) = 100, gamma([20, 1]) = 10 0 1 0 1 1 1 0 0, gamma([2]) = 100, sign 1
    """
    places = k.nonzero().view(-1)
    sizes = k[places].abs()
    ends = [k.new_tensor([-1]), places, k.new_tensor([len(k)])]
    distances = torch.diff(torch.cat(ends))
    flag = torch.tensor([True], device=k.device)
    dense = torch.cat([flag, gamma(k.abs() + 1)])
    n = k.new_tensor([len(places) + 1])
    sparse = torch.cat([~flag, gamma(n), gamma(distances), gamma(sizes)])
    shorter = min(sparse, dense, key=len)
    return pack(torch.cat([shorter, k[places] < 0]), 1)


def decode_integers(b, d):
    """The inverse of `encode_integers`: bytes -> int64 [d], or ValueError."""
    reader = Reader(b)
    dense = reader.take(1)
    k = read_gamma(reader, d) - 1 if dense else read_sparse(reader, d)
    minus = reader.take(int((k != 0).sum()))
    reader.close()
    k[k != 0] *= 1 - 2 * minus.long()
    return k


def read_sparse(reader, d):
    """The sizes [d] of the sparse form, signs not yet read."""
    n = int(read_gamma(reader, 1)) - 1
    distances = read_gamma(reader, n + 1)
    if int(distances.sum()) != d + 1:  # a buffer belongs to one d
        raise ValueError(f"damaged buffer: its distances do not fill d = {d} places")
    k = distances.new_zeros(d)
    k[distances[:-1].cumsum(0) - 1] = read_gamma(reader, n)
    return k


@dataclass(frozen=True)
class QSGD_Elias(QSGD):
    """QSGD with an entropy code: the same x_hat, usually fewer bits.

    Fields: the scales as in QSGD; the levels with their signs, as `encode_integers` writes them.
    Source: Alistarh et al. 2017, section 3.1.
    """

    def write(self, level, negative):
        return encode_integers(torch.where(negative, -level, level).long())

    def read(self, code, d):
        return decode_integers(code, d)
