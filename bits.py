"""Bits: how integers and floats become a buffer of bytes, and how a buffer is read without trusting it.

A compressor (compress.py) ends with integers and a few floats. This file writes them down without gaps and reads them back. A
buffer is a uint8 tensor that ends with a CRC-32; what is damaged or forged is a ValueError, never a wrong number, a long wait
or a large allocation.

Sources: ours.  Read next: compress.py.
"""
import zlib

import torch


# ---------------------------------------------------------------------------------------------- bits and bytes
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


def unseal(buffer, length=None):
    """Check a sealed buffer [n + 4] and return its body [n].

    Raises ValueError if it is no byte tensor, is not `length` + 4 long (when length is given), or fails its checksum.
    Source: ours.
    """
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError("a buffer is a one-dimensional uint8 tensor")
    if len(buffer) < 4 or length is not None and len(buffer) != length + 4:
        raise ValueError(f"buffer of {len(buffer)} bytes, expected {'at least 4' if length is None else length + 4}")
    body, crc = buffer[:-4], buffer[-4:]
    if zlib.crc32(body.contiguous().cpu().numpy()) != int.from_bytes(bytes(crc.tolist()), "little"):
        raise ValueError("damaged buffer: the checksum does not match")
    return body
