# ------------------------------------------------------------------------------------ compress
# Imports: dataclasses, math, struct, time, zlib, numpy as np, pytest, torch, compress.
import math
import struct
import time
import zlib

import numpy as np
import pytest
import torch

import compress
from compress import (
    QSGD,
    Identity,
    RandK,
    Sign,
    TopK,
    pack,
    seal,
    to_bytes,
    unpack,
    unseal,
    with_feedback,
)

f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


def through(compressor, x, seed=0):
    return compressor.decode(compressor.encode(x, seeded(seed)), len(x)).to(x.dtype)


# ---- compress, to be pasted from here
COMPRESSORS = [
    *(Identity(), Identity(f64), TopK(7), TopK(0.2), TopK(7, f64), RandK(7), RandK(0.2, False)),
    *(QSGD(), QSGD(7, "l2", 0), QSGD(4, "max", 0), QSGD(7, "max", 16), QSGD(100, "l2", 16)),
    *(QSGD(3, "max", 16, f64), QSGD(255), QSGD(300, "l2", 0), QSGD(32767), Sign(), Sign(f64)),
]


# A second decoder, written from the docstrings of compress.py alone: it shares no line with it.
def integers(b, n, bits):
    if bits > 8:
        low, high = b[:n], integers(b[n:], n, bits - 8)
        return [low[i] + 256 * high[i] for i in range(n)]
    word = int.from_bytes(b, "little")
    return [word >> (i * bits) & (2**bits - 1) for i in range(n)]


def floats(b, n, dtype):
    size, letter = {torch.float32: (4, "f"), f64: (8, "d")}[dtype]
    return list(struct.unpack(f"<{n}{letter}", b[: n * size])), b[n * size :]


def places_of_seed(seed, k, d):
    words = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=d, dtype=np.uint32)
    r = list(range(d))
    for i in range(d - 1):
        z = i + int(words[i]) % (d - i)
        r[i], r[z] = r[z], r[i]
    return r[:k]


def independent_decode(c, buffer, d):
    """x_hat as a list of d floats."""
    raw = bytes(buffer.tolist())
    b, (crc,) = raw[:-4], struct.unpack("<I", raw[-4:])
    assert crc == zlib.crc32(b)
    if isinstance(c, Identity):
        return floats(b, d, c.dtype)[0]
    x, k = [0.0] * d, getattr(c, "k", 0)
    k = round(k * d) if k < 1 else k
    if isinstance(c, TopK):
        values, b = floats(b, k, c.dtype)
        for value, place in zip(values, integers(b, k, math.ceil(math.log2(d))), strict=True):
            x[place] = value
    elif isinstance(c, RandK):
        (seed,) = struct.unpack("<q", b[:8])
        for value, place in zip(floats(b[8:], k, c.dtype)[0], places_of_seed(seed, k, d)):
            x[place] = value * d / k if c.scaled else value
    elif isinstance(c, Sign):
        (size,), b = floats(b, 1, c.dtype)
        x = [-size if minus else size for minus in integers(b, d, 1)]
    else:
        s, q = c.levels, c.bucket if 0 < c.bucket < d else d
        scales, b = floats(b, math.ceil(d / q), c.dtype)
        bits = math.ceil(math.log2(s + 1))
        for j, code in enumerate(integers(b, d, 1 + bits)):
            level = code % 2**bits
            x[j] = (-1) ** (code >> bits) * scales[j // q] * level / s
    return x


@pytest.mark.parametrize("c", COMPRESSORS, ids=str)
def test_compress_docstrings_suffice_to_decode_a_buffer(c):
    for seed in range(5):
        buffer = c.encode(randn(50, seed=seed).to(c.dtype), seeded(seed))
        x_hat = c.decode(buffer, 50)
        assert x_hat.dtype == c.dtype and x_hat.tolist() == pytest.approx(
            independent_decode(c, buffer, 50), rel=1e-6, abs=0
        )


def test_compress_examples_of_the_docstrings():
    assert bytes(pack(torch.tensor([1, 2, 3]), 2).tolist()) == bytes([0b00_11_10_01])
    assert bytes(pack(torch.tensor([0x1AB, 0x0CD]), 9).tolist()) == bytes.fromhex("AB CD 01")
    buffer = QSGD(3, "max", 0).encode(torch.tensor([3.0, -1, 0, 2]))
    fields = bytes.fromhex("00 00 40 40 2B 04")
    assert bytes(buffer.tolist()) == fields + struct.pack("<I", zlib.crc32(fields))


@pytest.mark.parametrize("bits", range(33))
def test_compress_packing_has_no_gaps_and_no_loss(bits):
    for n in (0, 1, 7, 8, 9, 100):
        v = torch.randint(0, 2**bits, (n,), generator=seeded(n))
        packed = pack(v, bits)
        assert len(packed) == math.ceil(n * bits / 8) and torch.equal(unpack(packed, n, bits), v)
        assert integers(bytes(packed.tolist()), n, bits) == v.tolist()


@pytest.mark.parametrize("c", COMPRESSORS, ids=str)
def test_compress_length_is_the_formula_of_the_table(c):
    for d in (35, 64, 1000):
        x, word = randn(d).float(), 8 * c.dtype.itemsize
        k = compress.count(c.k, d) if hasattr(c, "k") else 0
        n = math.ceil(d / min(getattr(c, "bucket", 0) or d, d))
        b = math.ceil(math.log2(getattr(c, "levels", 1) + 1))
        bits = {
            Identity: word * d,
            TopK: k * (word + math.ceil(math.log2(d))),
            RandK: 64 + word * k,
            QSGD: word * n + d * (1 + b),
            Sign: word + d,
        }[type(c)]
        assert c.encode(x, seeded()).shape == (math.ceil(bits / 8) + 4,)


@pytest.mark.parametrize("c", COMPRESSORS, ids=str)
def test_compress_zero_maps_to_zero_and_scaling_commutes(c):
    x = randn(50).float()
    assert torch.equal(through(c, torch.zeros(50)), torch.zeros(50))
    assert torch.equal(through(c, 8 * x), 8 * through(c, x))  # a power of two: exact
    for factor in (1e-45, 1e-38, 1e37):
        assert through(c, factor * x).isfinite().all()


def test_compress_topk_keeps_the_largest_and_contracts():
    for d, k in ((10, 1), (50, 7), (50, 50), (1, 1)):
        x, slow = randn(d, seed=d), torch.zeros(d, dtype=f64)
        for j in sorted(range(d), key=lambda j: -abs(x[j]))[:k]:  # the definition
            slow[j] = x[j]
        x_hat = through(TopK(k, f64), x)
        assert torch.equal(x_hat, slow) and torch.equal(through(TopK(k, f64), x_hat), x_hat)
        assert (x_hat - x).square().sum() <= (1 - k / d) * x.square().sum() + 1e-12
    flat = torch.tensor([1.0, -1.0] * 10, dtype=f64)
    assert float((through(TopK(5, f64), flat) - flat).square().sum()) == 20 - 5


def monte_carlo(c, x, draws=2000):
    """Mean of x_hat and of the squared error over many draws, each with its standard error."""
    g = seeded(1)
    hats = torch.stack([c.decode(c.encode(x, g), len(x)).to(f64) for _ in range(draws)])
    errors = (hats - x).square().sum(1)
    root = draws**0.5
    return hats.mean(0), hats.std(0) / root, float(errors.mean()), float(errors.std()) / root


UNBIASED = [
    RandK(6, True, f64),
    QSGD(1, "l2", 0, f64),
    QSGD(3, "max", 0, f64),
    QSGD(3, "l2", 8, f64),
]


@pytest.mark.parametrize("c", UNBIASED, ids=str)
def test_compress_unbiased_ones_are_unbiased(c):
    mean, se, _, _ = monte_carlo(c, randn(24), 800)
    assert c.unbiased and ((mean - randn(24)).abs() <= 5 * se + 1e-12).all()
    assert not any(biased.unbiased for biased in (TopK(6), RandK(6, False), Sign()))


@pytest.mark.parametrize("scaled, constant", [(True, 24 / 6 - 1), (False, 1 - 6 / 24)])
def test_compress_randk_error_is_exactly_its_constant(scaled, constant):
    x = randn(24)
    _, _, error, se = monte_carlo(RandK(6, scaled, f64), x)
    assert abs(error - constant * float(x.square().sum())) <= 4 * se


@pytest.mark.parametrize(
    "s, scale, bucket", [(1, "l2", 0), (4, "l2", 0), (4, "max", 0), (4, "l2", 10)]
)
def test_compress_qsgd_error_is_exactly_its_variance(s, scale, bucket):
    x, exact, bound = randn(30), 0.0, 0.0
    for part in x.split(bucket or 30):
        size, q = float(part.norm() if scale == "l2" else part.abs().max()), len(part)
        p = (s * part.abs() / size) % 1
        exact += (size / s) ** 2 * float((p * (1 - p)).sum())
        bound += size**2 * (min(q / s**2, q**0.5 / s) if scale == "l2" else q / (4 * s**2))
    _, _, error, se = monte_carlo(QSGD(s, scale, bucket, f64), x)
    assert abs(error - exact) <= 4 * se and exact <= bound
    if s == 1 and not bucket:
        omega = x.abs().sum() / x.norm() - 1
        assert exact == pytest.approx(float(omega * x.square().sum()), rel=1e-12)


def test_compress_qsgd_goes_to_one_of_the_two_neighbours():
    x = randn(40)
    level = through(QSGD(5, "max", 0, f64), x) / x.abs().max() * 5
    assert (level - level.round()).abs().max() < 1e-12 and level.abs().max() <= 5 + 1e-12
    assert ((level - 5 * x / x.abs().max()).abs() <= 1 + 1e-12).all()


def test_compress_sign_error_is_exactly_its_constant():
    x = randn(31)
    exact = x.square().sum() - x.abs().sum() ** 2 / 31
    error = (through(Sign(f64), x) - x).square().sum()
    assert float(error) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("c", COMPRESSORS, ids=str)
def test_compress_damaged_buffers_raise_value_error(c):
    good = c.encode(randn(40).float(), seeded())
    bad = [good[:-1], good[:3], good[:0], torch.cat([good, good[:1]]), good.float(), good[None]]
    bad += [None, b"bytes", seal(good[:-5]), seal(good[:-4], good[:1] * 0)]  # one byte off, sealed
    for place in range(len(good)):
        flipped = good.clone()
        flipped[place] ^= 1 << place % 8
        bad.append(flipped)
    for buffer in bad:
        with pytest.raises(ValueError):
            c.decode(buffer, 40)
    with pytest.raises(ValueError, match="checksum"):
        unseal(good[:0])
    with pytest.raises(ValueError):  # the right buffer, a wrong d
        c.decode(good, 6 if isinstance(c, RandK) else 400)


@pytest.mark.parametrize("c", COMPRESSORS, ids=str)
def test_compress_forged_buffers_are_refused_or_finite(c):
    good = c.encode(randn(40).float(), seeded())[:-4]
    bodies = [
        torch.randint(0, 256, good.shape, generator=seeded(seed), dtype=torch.uint8)
        for seed in range(200)
    ]
    for bit in range(8 * len(good)):  # a true buffer with one bit changed
        bodies.append(good.clone())
        bodies[-1][bit // 8] ^= 1 << bit % 8
    bodies += [good[:n] for n in range(len(good))]
    for body in bodies:
        try:
            assert c.decode(seal(body), 40).isfinite().all()
        except ValueError:
            pass


ONE = torch.ones(7)


@pytest.mark.parametrize(
    "c, floats, v, bits",
    [
        (TopK(7), ONE, [0, 1, 2, 3, 4, 5, 45], 6),  # a place outside
        (TopK(7), ONE, [0, 1, 2, 3, 4, 5, 5], 6),  # a place twice
        (TopK(7), ONE / 0, [0, 1, 2, 3, 4, 5, 6], 6),  # an infinite value
        (QSGD(4), ONE[:1], [5] * 40, 4),  # a level above s = 4
        (QSGD(4), ONE[:1], [8 + 5] * 40, 4),
        (QSGD(4), -ONE[:1], [1] * 40, 4),  # a scale below 0
    ],
)
def test_compress_forged_content_is_refused(c, floats, v, bits):
    with pytest.raises(ValueError, match="damaged"):
        c.decode(seal(to_bytes(floats), pack(torch.tensor(v), bits)), 40)


def test_compress_k_is_a_count_or_a_fraction_that_can_be_kept():
    assert [compress.count(k, 40) for k in (1, 7.0, 40, 0.05, 0.5, 0.999)] == [1, 7, 40, 2, 20, 40]
    for k in (0, 41, -1, 2.5, 0.01, math.inf, math.nan):
        for c in (TopK(k), RandK(k)):
            with pytest.raises(ValueError, match="1..40|NaN"):
                c.encode(torch.ones(40))


@pytest.mark.parametrize(
    "c", [TopK(3, f64), RandK(5, False, f64), Sign(f64), QSGD(4, "l2", 0, f64)], ids=str
)
def test_compress_error_feedback_telescopes(c):
    g, e, sent, total = seeded(), torch.zeros(20, dtype=f64), 0, 0
    for t in range(50):
        x = randn(20, seed=t)
        buffer, e = with_feedback(c, x, e, g)
        sent, total = sent + c.decode(buffer, 20), total + x
    assert (sent + e - total).abs().max() < 1e-12 * max(1, float(e.norm()))


@pytest.mark.parametrize("c", [Identity(), TopK(), RandK(), QSGD(), QSGD(127), Sign()], ids=str)
def test_compress_no_loop_runs_over_coordinates(c):
    x, best = torch.randn(215_370, generator=seeded()), math.inf
    for _ in range(20):  # the best of a few: the machine may be busy
        start = time.perf_counter()
        c.decode(c.encode(x, seeded()), len(x))
        best = min(best, time.perf_counter() - start)
    assert best < 0.020, f"{1000 * best:.1f} ms"
