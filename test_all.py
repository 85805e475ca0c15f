"""The claims of this project, as tests: theorems, limits that recover the parent, independent oracles, the README's commands.

    python -m pytest -q test_all.py                 everything, a few minutes on two cores
    python -m pytest -q test_all.py -k compress     one chapter

One section per file, in reading order; a test is named by the claim it checks. The oracle is a definition written as a slow
loop, a dense matrix, PyTorch's own nn.Module and SGD, or finite differences, in float64 where it matters; the function under
test is always the shipped one.
"""
import dataclasses
import functools
import gzip
import importlib
import inspect
import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import align
import baselines
import bits
import claims
import compress
import config
import data
import experiment
import fedsynsam
import fl
import landscape
import loop
import memory
import models
import presets
import ranks
import run
import sam
import sharpness
import show
import split
import study
import synth
import tasks
import tune
from compress import QSGD, Identity, Natural, RandK, Sign, SparseDithering, TopK
from tools import plot, tradeoff

torch.set_num_threads(1)                # pytest runs one worker on each core; more threads would only wait for each other
HERE = pathlib.Path(__file__).parent
f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


def through(compressor, x, seed=0):
    return compressor.decode(compressor.encode(x, seeded(seed)), len(x)).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("b", range(33))
def test_bits_packing_has_no_gaps_and_no_loss(b):
    for n in (0, 1, 7, 8, 9, 100):
        v = torch.randint(0, 2**b, (n,), generator=seeded(n))
        packed = bits.pack(v, b)
        assert len(packed) == (n * b + 7) // 8 and torch.equal(bits.unpack(packed, n, b), v)
    assert bits.pack(torch.tensor([1, 2, 3]), 2).tolist() == [0b111001]         # the docstring's example


def gamma_word(v):
    """Elias's code word as he writes it: as many zeros as binary digits follow the leading 1, then the number."""
    return "0" * (v.bit_length() - 1) + f"{v:b}"


def omega_word(v):
    word = "0"
    while v > 1:
        word, v = f"{v:b}" + word, v.bit_length() - 1
    return word


def slow_rice(v):
    return 5 + min(sum(r + 1 + (x >> r) for x in v) for r in range(32))


def slow_subset(mask):
    members = [i for i, m in enumerate(mask) if m == (2 * sum(mask) <= len(mask))]
    return 1 + len(gamma_word(len(members) + 1)) + slow_rice([b - a - 1 for a, b in zip([-1, *members], [*members, len(mask)])])


def slow_length(k, code):
    """Bits of the integers k in an entropy code, from its definition, word by word."""
    size = [abs(v) for v in k]
    where, large = [j for j, v in enumerate(size) if v], [v for v in size if v]
    if code == "elias":
        dense = sum(len(gamma_word(v + 1)) for v in size)
        sparse = sum(len(gamma_word(v)) for v in [len(where) + 1, *[b - a for a, b in zip([-1, *where], [*where, len(k)])], *large])
        return 1 + min(dense, sparse) + len(where)
    total = len(where)
    for _ in range(3):
        total, size = total + slow_subset([v > 0 for v in size]), [v - 1 for v in size if v > 0]
    return total + slow_rice(size)


def test_bits_gamma_words_are_elias_words_side_by_side():
    v = torch.tensor([1, 2, 5])
    assert "".join(map(str, bits.gamma(v).int().tolist())) == "011010100"          # the docstring's example
    for v in (torch.arange(1, 70), torch.tensor([1, 2**33 - 1, 2**32, 7]), torch.ones(5).long(), torch.ones(0).long()):
        coded = bits.gamma(v)
        assert len(coded) == sum(len(gamma_word(x)) for x in v.tolist())
        reader = bits.Reader(bits.pack(coded, 1))
        assert torch.equal(bits.read_gamma(reader, len(v)), v) and reader.at == len(coded)
    lengths = [(len(gamma_word(v)), len(omega_word(v))) for v in range(1, 128)]
    assert all(g <= o for g, o in lengths) and len(gamma_word(128)) > len(omega_word(128))      # why gamma stands in for omega
    assert [o for _, o in lengths[:16]] == [1, 3, 3, 6, 6, 6, 6] + [7] * 8 + [11]               # known lengths of omega


def test_bits_rice_takes_the_best_number_of_low_digits():
    for scale in (0, 1, 30, 5000, 2**31, 2**38):
        v = (torch.rand(50, generator=seeded(scale), dtype=f64).log() * -scale).long()
        coded = bits.rice(v)
        reader = bits.Reader(bits.pack(coded, 1))
        assert len(coded) == slow_rice(v.tolist()) and torch.equal(bits.read_rice(reader, 50), v) and reader.at == len(coded)


@pytest.mark.parametrize("code", bits.CODES)
def test_bits_integers_come_back_and_take_what_their_words_take(code):
    some = [torch.zeros(30), torch.ones(30), -torch.ones(1), torch.zeros(1), torch.eye(30)[29] * 10**9, torch.eye(30)[0], torch.arange(-15, 15)]
    some += [(randn(d, seed=d) * scale).round() for d in (2, 7, 64, 300) for scale in (0.2, 1, 4, 100)]
    for k in some:
        b = bits.write_integers(k.long(), code)
        assert len(b) == math.ceil(slow_length(k.long().tolist(), code) / 8)
        assert torch.equal(bits.read_integers(b, len(k), code), k.long())
        for d in (len(k) - 1, len(k) + 1, 10 * len(k)):
            if code == "runs" or b[0] & 1 == 0:                                      # what holds runs belongs to one d; elias's dense form
                with pytest.raises(ValueError):                                      # and fixed lengths may have room for one zero more
                    bits.read_integers(b, d, code)


def test_bits_subset_is_close_to_its_entropy():
    n = 50_000
    for share in (0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.38, 0.5, 0.7, 0.99, 1):
        mask = torch.rand(n, generator=seeded(), dtype=f64) < share
        p = float(mask.double().mean())
        entropy = n * -sum(x * math.log2(x) for x in (p, 1 - p) if x)
        assert entropy - 1 <= len(bits.subset(mask)) <= min(1.05 * entropy, n) + 8 + 2 * math.log2(n), share


@pytest.mark.parametrize("code", bits.CODES)
def test_bits_forged_integers_neither_hang_nor_fill_the_memory(code):
    """Lengths and counts that a forged buffer claims: a number of thousands of digits, 2^33 non-zeros, runs beyond d."""
    word = lambda v: bits.gamma(torch.tensor([v]))                                                          # noqa: E731
    zero, one = torch.zeros(1).bool(), torch.ones(1).bool()
    many, none = torch.ones(10**5).bool(), torch.zeros(10**5).bool()
    forged = [torch.ones(10**6).bool(), torch.zeros(10**6).bool(), torch.cat([zero, word(2**33 - 1)]), torch.cat([one, word(2**33 - 1)]),
              torch.cat([zero, word(2**33 - 1), many]), torch.cat([zero, word(3), many[:5], none, one] * 2),
              torch.cat([zero, word(3), word(2**33 - 1), word(2**33 - 1), word(5), one]), zero[:0]]
    start = time.perf_counter()
    for b in forged:
        with pytest.raises(ValueError, match="damaged"):
            bits.read_integers(bits.pack(b, 1), 40, code)
    assert time.perf_counter() - start < 1


# ---------------------------------------------------------------------------------------------------------- compress
ALL = [Identity(), TopK(7), RandK(7), RandK(7, scaled=False), QSGD(1), QSGD(7), QSGD(4, "max"), QSGD(7, "max", 16), QSGD(100, "l2", 16),
       Sign(), Natural(), QSGD(1, code="elias"), QSGD(100, "l2", 16, code="elias"), QSGD(7, "max", 16, code="runs"), SparseDithering(0.5),
       SparseDithering(0.01), SparseDithering(0.5, False), SparseDithering(0.05, False)]


def levels_of(c, buffer, d):
    """The integers k [d] in a buffer of QSGD or SparseDithering, from what it decodes to: one step is what it starts with."""
    n, q = c.rows(d) if isinstance(c, QSGD) else (1, d)
    step = bits.from_bytes(buffer[:n * c.dtype.itemsize], c.dtype) / (c.levels if isinstance(c, QSGD) else 1)
    return (c.decode(buffer, d) / step.repeat_interleave(q)[:d]).round().long()


@pytest.mark.parametrize("c", ALL, ids=str)
def test_compress_length_is_the_formula_of_the_table(c):
    for d in (7, 16, 17, 1000):
        formula = {Identity: 32 * d, TopK: 7 * (32 + math.ceil(math.log2(d))), RandK: 32 * 7 + 64, Sign: d + 32, Natural: 9 * d}
        if isinstance(c, QSGD):
            buckets = math.ceil(d / min(c.bucket or d, d))
            formula[QSGD] = 32 * buckets + d * (1 + math.ceil(math.log2(c.levels + 1)))
        buffer = c.encode(randn(d).float(), seeded())
        if isinstance(c, SparseDithering):
            formula[type(c)] = 32 + slow_length(levels_of(c, buffer, d).tolist(), "runs")
        elif isinstance(c, QSGD) and c.code != "fixed":
            formula[QSGD] = 32 * buckets + slow_length(levels_of(c, buffer, d).tolist(), c.code)
        assert buffer.dtype == torch.uint8 and buffer.shape == (math.ceil(formula[type(c)] / 8) + 4,)
        assert c.decode(buffer, d).shape == (d,)


@pytest.mark.parametrize("c", ALL, ids=str)
def test_compress_zero_maps_to_zero_and_scaling_commutes(c):
    x = randn(50).float()
    assert torch.equal(through(c, torch.zeros(50)), torch.zeros(50))
    assert torch.equal(through(c, 8 * x), 8 * through(c, x))                         # a power of two: exact in floats
    assert torch.isfinite(through(c, 1e-38 * x)).all() and torch.isfinite(through(c, 1e37 * x)).all()


def test_compress_topk_is_a_contraction():
    for d, k in ((10, 1), (50, 7), (50, 50), (1, 1)):
        x, c = randn(d, seed=d), TopK(k, f64)
        x_hat = through(c, x)
        assert (x_hat - x).square().sum() <= (1 - k / d) * x.square().sum() + 1e-12
        slow = torch.zeros(d, dtype=f64)
        for j in sorted(range(d), key=lambda j: -abs(x[j]))[:k]:                     # the definition
            slow[j] = x[j]
        assert torch.equal(x_hat, slow) and torch.equal(through(c, x_hat), x_hat)
    flat = torch.tensor([1.0, -1.0] * 10, dtype=f64)
    assert (through(TopK(5, f64), flat) - flat).square().sum() == pytest.approx((1 - 5 / 20) * 20, abs=1e-12)


def monte_carlo(c, x, n=2000):
    """Mean of x_hat and of the squared error over n draws, with the standard error of the latter."""
    g, hats = seeded(1), []
    for _ in range(n):
        hats.append(c.decode(c.encode(x, g), len(x)).to(f64))
    hats = torch.stack(hats)
    err = (hats - x).square().sum(1)
    return hats.mean(0), hats.std(0) / n**0.5, float(err.mean()), float(err.std() / n**0.5)


def test_compress_unbiased_ones_are_unbiased():
    x = randn(24)
    for c in (RandK(6, True, f64), QSGD(1, "l2", 0, f64), QSGD(3, "max", 0, f64), QSGD(3, "l2", 8, f64), Natural(),
              SparseDithering(0.5, True, f64), SparseDithering(3, True, f64)):
        assert c.unbiased and not SparseDithering(0.5, False).unbiased
        mean, se, _, _ = monte_carlo(c, x, 200 if isinstance(c, SparseDithering) else 800)
        assert ((mean - x).abs() <= 5 * se + 1e-6).all(), c                           # 1e-6: natural works in float32


def test_compress_randk_error_is_exactly_its_constant():
    x, d, k = randn(24), 24, 6
    for c, constant in ((RandK(k, True, f64), d / k - 1), (RandK(k, False, f64), 1 - k / d)):
        _, _, err, se = monte_carlo(c, x)
        assert abs(err - constant * float(x.square().sum())) <= 4 * se


@pytest.mark.parametrize("c", [QSGD(1, "l2", 0, f64), QSGD(4, "l2", 0, f64), QSGD(4, "max", 0, f64), QSGD(4, "l2", 10, f64)], ids=str)
def test_compress_qsgd_error_is_exactly_its_variance(c):
    x, s = randn(30), c.levels
    exact = bound = 0.0
    for bucket in x.split(c.bucket or 30):
        size = bucket.norm() if c.scale == "l2" else bucket.abs().max()
        p = (s * bucket.abs() / size) % 1
        exact += float((size / s) ** 2 * (p * (1 - p)).sum())
        q = len(bucket)
        bound += float(min(q / s**2, q**0.5 / s) * bucket.square().sum()) if c.scale == "l2" else q * float(size) ** 2 / (4 * s**2)
    _, _, err, se = monte_carlo(c, x)
    assert abs(err - exact) <= 4 * se and exact <= bound
    if s == 1 and not c.bucket:
        assert exact == pytest.approx(float(x.norm() ** 2 * (x.abs().sum() / x.norm() - 1)), rel=1e-12)


def test_compress_qsgd_puts_values_on_its_grid():
    x = randn(40)
    level = through(QSGD(5, "max", 0, f64), x) / x.abs().max() * 5
    assert (level - level.round()).abs().max() < 1e-12 and level.abs().max() <= 5 + 1e-12
    assert ((level - 5 * x / x.abs().max()).abs() <= 1 + 1e-12).all()                # one of the two neighbours


def test_compress_qsgd_decodes_to_the_same_from_every_code():
    x = randn(300).float()
    for c in (QSGD(1), QSGD(7, "max", 64), QSGD(300)):
        for code in bits.CODES:
            assert torch.equal(through(dataclasses.replace(c, code=code), x), through(c, x))


def shapes(d):
    """Vectors [d] on which a bound can fail: Gaussian, heavy tails, sparse, constant magnitude, one coordinate."""
    return {**tradeoff.vectors(d), "one": torch.arange(d, dtype=f64).eq(d // 2).to(f64)}


def test_compress_elias_keeps_to_the_bounds_on_its_bits():
    d, head = 1600, 64 + 32 + 8                                                      # the scale in float64, checksum, padding
    for name, x in shapes(d).items():
        for s in (1, 4, 40, 200):
            c, g, sizes, counts = QSGD(s, "l2", 0, f64, "elias"), seeded(), [], []
            for _ in range(20):
                buffer = c.encode(x, g)
                k = levels_of(c, buffer, d).double()
                n = int((k != 0).sum())
                runs = 2 * math.log2(n + 1) + 1 + (n + 1) * (1 + 2 * math.log2((d + 1) / (n + 1)))       # for every x: log is concave
                assert 8 * len(buffer) <= head + 1 + runs + n * (2 + math.log2(max(1, k.square().sum() / max(n, 1))))
                sizes, counts = [*sizes, 8 * len(buffer)], [*counts, n]
            if s * s <= d:                                                           # Lemma 3.1 and Theorem 3.2: for every x, on the mean
                most = s * (s + d ** 0.5)
                assert np.mean(counts) <= most + 4 * np.std(counts) / 20 ** 0.5, (name, s)
                assert np.mean(sizes) <= (3 + 1.5 * math.log2(2 * (s * s + d) / most)) * most + head + 32, (name, s)
    gaussian = QSGD(40, code="elias").encode(shapes(d)["gaussian"], seeded())        # Corollary 3.3: 2.8 d + 32 at s = sqrt(d),
    assert 2.6 * d < 8 * len(gaussian) <= 2.8 * d + 32 + 32                          # where the o(1) of the omega code is left out:
    constant = QSGD(40, code="elias").encode(shapes(d)["constant"], seeded())        # a distance of 1, a sign and a level of 1 take 3 bits
    assert 8 * len(constant) == pytest.approx(3 * d, rel=0.03)


@pytest.mark.parametrize("nu", [0.01, 0.1, 0.5, 0.9])
def test_compress_dithering_keeps_to_its_error_and_bits(nu):
    d = 2000
    for name, x in shapes(d).items():
        norm2, step = float(x.square().sum()), 2 * (nu / d) ** 0.5 * float(x.norm())
        c = SparseDithering(nu, False, f64)
        buffer = c.encode(x)
        x_hat, k = c.decode(buffer, d), levels_of(c, buffer, d)
        assert ((x / step).abs() - k.abs()).abs().max() <= 0.5 + 1e-9                                # the nearest multiple,
        error, plain = float((x_hat - x).square().sum()), float((step * k - x).square().sum())
        assert error <= plain + 1e-12 * norm2 and plain <= nu * norm2 * (1 + 1e-12)                  # least squares is never worse
        assert abs(float((x - x_hat) @ x_hat)) < 1e-9 * norm2, name                                   # and leaves nothing to gain
        assert 8 * len(buffer) <= d * (2.5 + 0.5 / nu ** 0.5) + 64 + 32 + 8 + 4 * (8 + 2 * math.log2(d))
        c, g = SparseDithering(nu, True, f64), seeded()
        buffers = [c.encode(x, g) for _ in range(20)]
        p = (x / step).abs() % 1
        exact = step ** 2 * float((p * (1 - p)).sum())
        assert exact <= nu * norm2 * (1 + 1e-12)
        errors = torch.stack([(c.decode(b, d) - x).square().sum() for b in buffers])
        assert abs(float(errors.mean()) - exact) <= 5 * float(errors.std()) / 20 ** 0.5 + 1e-9 * norm2
        assert sum(8 * len(b) for b in buffers) / 20 <= d * (2 + 0.5 / nu ** 0.5) + 64 + 32 + 8 + 4 * (8 + 2 * math.log2(d))


def test_compress_dithering_is_qsgd_on_a_finer_grid():
    d, s = 64, 8                                                                     # powers of two: the same floats
    x = randn(d)
    assert torch.equal(through(SparseDithering(d / (4 * s * s), True, f64), x), through(QSGD(s, "l2", 0, f64), x))


def test_compress_dithering_survives_the_ends_of_the_floats():
    for c in (SparseDithering(0.1), SparseDithering(0.1, False), SparseDithering(1e-6), SparseDithering(50)):
        for x in (torch.full((50,), 3.4e38), torch.eye(50)[3] * 3.4e38, torch.full((50,), 1e-45), torch.eye(50)[3] * 1e-45, torch.ones(1)):
            assert through(c, x).isfinite().all()


def test_compress_bits_against_error():
    """The table of the README on shorter vectors, and what a lower bound can and cannot say.

    Uncertainty principle (Safaryan et al. 2020): a compressor whose buffers have b bits has at most 2^b answers. If each x of the
    unit ball has one within sqrt(a), 2^b balls of that radius cover the ball, so 2^b a^(d/2) >= 1, or a 4^(b/d) >= 1. The a is that
    of the WORST x of the ball: of one x nothing follows (sign below: no error at all). To assert it a vector is needed that is
    nearly the worst for every code at once, and a random one is: for Gaussian x the mean error and the mean bits of any
    code obey the same inequality (Shannon's rate-distortion function), and at d = 4096 one draw is close to the mean. For another
    independent source 1 becomes its entropy power over its variance; for Laplace that is e / pi.
    """
    d = 4096
    gaussian = torch.stack([tradeoff.vectors(d, seed)["gaussian"] for seed in range(3)])
    laplace = torch.stack([tradeoff.vectors(d, seed)["laplace"] for seed in range(3)])
    for name, c in tradeoff.compressors(d).items():
        b, error = tradeoff.measure(c, gaussian)
        assert error * 4 ** b >= 1 and tradeoff.above_bound(b, error) >= 0, name
        if c.unbiased:                                                               # a server may shrink x_hat by 1 / (1 + omega)
            assert error / (1 + error) * 4 ** b >= 1, name
        b, error = tradeoff.measure(c, laplace)
        assert error * 4 ** b >= math.e / math.pi, name
        for shape, x in tradeoff.vectors(d).items():                                 # the card's bounds hold for every x
            _, error = tradeoff.measure(c, x.expand(3, d))
            bound = {TopK: lambda: 1 - c.k / d, SparseDithering: lambda: c.nu, Natural: lambda: 1 / 8, Identity: lambda: 1e-13,
                     RandK: lambda: 1 if shape == "heavy" else 1 - c.k / d,          # on the mean only; of heavy tails three draws are too few
                     Sign: lambda: float(1 - x.abs().sum() ** 2 / d / x.square().sum()),
                     QSGD: lambda: math.inf if c.scale == "max" else min(d / c.levels ** 2, d ** 0.5 / c.levels)}
            assert error <= 1.03 * bound[type(c)]() + 1e-12, (name, shape)
    flat, few = tradeoff.vectors(d)["constant"][None], tradeoff.vectors(d)["sparse"][None]
    for c, x in ((Sign(), flat), (TopK(d // 20), few)):                              # one x: far below any bound
        b, error = tradeoff.measure(c, x)
        assert error * 4 ** b < 1e-6
    b = {code: tradeoff.measure(QSGD(1, "max", 512, code=code), gaussian)[0] for code in ("fixed", *bits.CODES)}
    assert b["runs"] < b["elias"] < b["fixed"]
    nearest, ideal = tradeoff.measure(SparseDithering(0.1, False), gaussian), math.log2(math.pi * math.e / 6) / 2
    assert ideal < tradeoff.above_bound(*nearest) < ideal + 0.12                     # what every fine grid loses, with an ideal code; ours is near


def test_compress_sign_error_is_exactly_its_constant():
    x = randn(31)
    err = (through(Sign(f64), x) - x).square().sum()
    assert float(err) == pytest.approx(float(x.square().sum() - x.abs().sum() ** 2 / 31), rel=1e-12)


def test_compress_natural_rounds_to_neighbouring_powers_of_two():
    x = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.7, 1e-42, 3e38, 0.0])
    x_hat = through(Natural(), x)
    assert torch.equal(x_hat[:3], x[:3])                                              # powers of two are kept
    assert x_hat[3] in (2, 4) and x_hat[4] in (-0.5, -1) and x_hat[7] == 0 and x_hat.isfinite().all()
    worst = torch.full((24,), 2 / 3, dtype=f64) * 2.0 ** torch.arange(24)             # f = 1/3 maximises f(1-f)/(1+f)^2 = 1/8
    _, _, err, se = monte_carlo(Natural(), worst)
    assert abs(err - float(worst.square().sum()) / 8) <= 4 * se + 1e-3 * err


@pytest.mark.parametrize("c", ALL, ids=str)
def test_compress_damaged_buffers_raise_value_error(c):
    x = randn(40).float()
    good, rng = c.encode(x, seeded()), np.random.default_rng(0)
    assert c.decode(good, 40).shape == (40,)
    bad = [good[:-1], good[:3], good[:0], torch.cat([good, good[:1]]), good.float(), good[None], None, b"bytes",
           bits.seal(good[:-5]), bits.seal(torch.cat([good[:-4], good[:1] * 0]))]                 # a byte too few or too many, well sealed
    for place in rng.integers(0, len(good), 40):
        flipped = good.clone()
        flipped[place] ^= 1 << int(rng.integers(8))
        bad.append(flipped)
    for buffer in bad:
        with pytest.raises(ValueError):
            c.decode(buffer, 40)
    with pytest.raises(ValueError):
        c.decode(good, 400 if not isinstance(c, RandK) else 6)                        # right buffer, wrong d


@pytest.mark.parametrize("c", ALL, ids=str)
def test_compress_forged_buffers_never_do_worse_than_value_error(c):
    n = len(c.encode(torch.ones(40), seeded())) - 4                                  # a right length and a right checksum:
    for seed in range(300):                                                          # what is left is to check the content
        body = torch.randint(0, 256, (n,), generator=seeded(seed), dtype=torch.uint8)
        try:
            assert c.decode(bits.seal(body), 40).isfinite().all()
        except ValueError:
            pass
    body = c.encode(randn(40).float(), seeded())[:-4]                                # the same for a true buffer with one bit changed,
    for change in range(8 * len(body) + 30):                                         # or cut short
        forged = body[:change - 8 * len(body)] if change >= 8 * len(body) else body.clone()
        if change < 8 * len(body):
            forged[change // 8] ^= 1 << change % 8
        try:
            assert c.decode(bits.seal(forged), 40).isfinite().all()
        except ValueError:
            pass


def test_compress_forged_content_is_refused():
    d, one = 40, torch.ones(7)
    places = bits.pack(torch.tensor([0, 1, 2, 3, 4, 5, 45]), 6)                  # 45 is outside
    twice = bits.pack(torch.tensor([0, 1, 2, 3, 4, 5, 5]), 6)
    for c, body in ((TopK(7), [bits.to_bytes(one), places]), (TopK(7), [bits.to_bytes(one), twice]),
                    (TopK(7), [bits.to_bytes(one / 0), bits.pack(torch.arange(7), 6)]),
                    (QSGD(4), [bits.to_bytes(one[:1]), bits.pack(torch.full((d,), 5), 4)]),         # level 5 > s = 4
                    (QSGD(4), [bits.to_bytes(-one[:1]), bits.pack(torch.full((d,), 1), 4)]),        # negative norm
                    (QSGD(4, code="elias"), [bits.to_bytes(one[:1]), bits.write_integers(torch.full((d,), -5), "elias")]),
                    (QSGD(4, code="elias"), [bits.to_bytes(one[:1]), bits.write_integers(torch.ones(d).long(), "elias"), one[:1].byte()]),
                    (SparseDithering(), [bits.to_bytes(-one[:1]), bits.write_integers(torch.ones(d).long(), "runs")]),
                    (SparseDithering(), [bits.to_bytes(one[:1] / 0), bits.write_integers(torch.ones(d).long(), "runs")]),
                    (Natural(), [torch.full((d,), 255, dtype=torch.uint8), bits.pack(torch.zeros(d).int(), 1)])):
        with pytest.raises(ValueError):
            c.decode(bits.seal(*body), d)


def test_compress_k_outside_1_to_d_is_refused():
    for k in (0, 11, -1):
        for c in (TopK(k), RandK(k)):
            with pytest.raises(ValueError, match="1..10"):
                c.encode(torch.ones(10))


@pytest.mark.parametrize("c", [TopK(3, f64), RandK(5, False, f64), Sign(f64), QSGD(4, "l2", 0, f64), SparseDithering(0.5, False, f64)], ids=str)
def test_compress_error_feedback_telescopes(c):
    g, e, sent, total = seeded(), torch.zeros(20, dtype=f64), 0, 0
    for t in range(50):
        x = randn(20, seed=t)
        buffer, e = compress.with_feedback(c, x, e, g)
        sent, total = sent + c.decode(buffer, 20), total + x
    assert (sent + e - total).abs().max() < 1e-12 * max(1, float(e.norm()))


def test_compress_encode_and_decode_take_under_ten_milliseconds():
    """Together, of 215k coordinates, where lengths are fixed; each, of the 54k of the default network, in entropy codes."""
    fixed = [Identity(), TopK(10_768), RandK(10_768), QSGD(1), QSGD(7), QSGD(7, "max", 512), QSGD(127), Sign(), Natural()]
    entropy = [QSGD(1, "max", 512, code="elias"), QSGD(7, "max", 512, code="elias"), QSGD(233, code="elias"), QSGD(1, "max", 512, code="runs"),
               SparseDithering(0.5), SparseDithering(0.5, False)]
    g, threads = seeded(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for c in fixed + entropy:
            x, best = torch.randn(215_370 if c in fixed else 54_314, generator=seeded()), [math.inf, math.inf]
            for _ in range(30):
                start = time.perf_counter()
                buffer = c.encode(x, g)
                between = time.perf_counter()
                c.decode(buffer, len(x))
                best = [min(best[0], between - start), min(best[1], time.perf_counter() - between)]
                slowest = sum(best) if c in fixed else max(best)
                if slowest < 0.010:
                    break
            assert slowest < 0.010, f"{c}: {1000 * best[0]:.1f} + {1000 * best[1]:.1f} ms"
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- sam
def test_sam_perturbation_has_norm_rho():
    for d in (1, 7, 1000):
        w, u = randn(d), randn(d, seed=1)
        assert float((sam.perturb(w, u, 0.1) - w).norm()) == pytest.approx(0.1, rel=1e-9)
        assert torch.equal(sam.perturb(w, u, 0.0), w) and torch.equal(sam.perturb(w, 0 * u, 0.1), w)
        assert torch.dot(sam.perturb(w, u, 0.1) - w, u) > 0


def test_sam_gradient_on_a_quadratic_is_its_formula():
    M = randn(6, 6)
    A, w, rho = M @ M.T, randn(6, seed=1), 0.3
    g = A @ w
    assert torch.allclose(sam.sam_gradient(lambda v: A @ v, w, g, rho), A @ (w + rho * g / g.norm()), rtol=1e-12)
    assert torch.equal(sam.sam_gradient(lambda v: A @ v, w, None, rho), g)


def test_sam_adaptive_with_unit_scale_is_sam():
    w, u = randn(9), randn(9, seed=1)
    nowhere = torch.zeros(9, dtype=torch.bool)
    assert torch.allclose(sam.perturb_adaptive(w, u, 0.2, 0.01, nowhere), sam.perturb(w, u, 0.2), rtol=1e-12)
    T = w.abs() + 0.2                                                                # Caldarola's form: rho T^2 g / ||T g||
    assert torch.allclose(sam.perturb_adaptive(w, u, 0.2, 0.2) - w, 0.2 * T**2 * u / (T * u).norm(), rtol=1e-10)


def test_sam_adaptive_does_not_see_a_rescaling_of_relu_layers():
    x, y = randn(8, 5), torch.arange(8) % 3
    loss = lambda w: F.cross_entropy(F.relu(x @ w[:20].view(5, 4)) @ w[20:].view(4, 3), y)                # noqa: E731
    at_rim = lambda w: loss(sam.perturb_adaptive(w, torch.func.grad(loss)(w), 0.5, eta=0.0))               # noqa: E731
    w = randn(32, seed=2)
    scaled = torch.cat([w[:20] * 3, w[20:] / 3])
    assert float(loss(w)) == pytest.approx(float(loss(scaled)), rel=1e-12)
    assert float(at_rim(w)) == pytest.approx(float(at_rim(scaled)), rel=1e-12)
    assert abs(float(loss(sam.perturb(w, torch.func.grad(loss)(w), 0.5)) - at_rim(w))) > 1e-6              # SAM is another map


def test_sam_centralising_is_the_slow_loop_over_a_modules_parameters():
    """The module's own shapes, OIHW and without any flat vector; and what is known of a projection."""
    model, module = models.build("cnn", (3, 16, 16), 10, 4, 6, dtype=f64), models.cnn_module(3, 16, 16, 10, 4, 6).double()
    for n, p in enumerate(module.parameters()):
        p.data = randn(*p.shape, seed=n) + n
    g, slow = models.flatten(p.detach() for p in module.parameters()), []
    for p in module.parameters():
        q = p.detach().clone()
        for out in range(len(q) if q.dim() > 1 else 0):
            q[out] -= q[out].sum() / q[out].numel()
        slow.append(q)
    fast, biases = sam.centralise(g, model.shapes), ~model.weights
    assert torch.allclose(fast, models.flatten(slow), rtol=1e-12, atol=1e-12) and (fast - g).norm() > 1
    assert torch.equal(fast[biases], g[biases]) and torch.allclose(sam.centralise(fast, model.shapes), fast, atol=1e-12)
    assert float(fast @ (g - fast)) == pytest.approx(0, abs=1e-9) and fast.norm() < g.norm()
    assert torch.equal(sam.centralise(g, [g.shape]), g)                              # one dimension: nothing to centralise
    w, far = randn(len(g), seed=9), lambda *a: sam.perturb_centralised(w, g, 0.3, model.shapes, *a) - w                # noqa: E731
    assert float(far().norm()) == pytest.approx(0.3, rel=1e-9) and torch.allclose(far(), 0.3 * fast / fast.norm())
    assert far(True).norm() < 0.299 and torch.allclose(far(True), 0.3 * fast / g.norm())       # the released code climbs less far
    assert torch.equal(sam.perturb_centralised(w, g, 0.0, model.shapes), w) and torch.equal(sam.perturb_centralised(w, 0 * g, 0.3, model.shapes), w)


def test_sam_mixing_ends_at_its_two_ingredients():
    a, b = randn(5), randn(5, seed=1)
    assert torch.equal(sam.mix_directions(a, b, 0.0, False), a) and torch.equal(sam.mix_directions(a, b, 1.0, False), b)
    assert sam.cosine(sam.mix_directions(a, b, 0.0, True), a) == pytest.approx(1)
    halfway = sam.mix_directions(a, 100 * b, 0.5, True)                              # unit vectors: the lengths do not matter
    assert sam.cosine(halfway, a) == pytest.approx(sam.cosine(halfway, b))


# ------------------------------------------------------------------------------------------------------------- synth
def tiny(seed=0, n=6, classes=3):
    """A two-layer network on 1x4x4 images in float64: (apply, w [d], Synthetic)."""
    d = 16 * 5 + 5 + 5 * classes

    def apply(w, x):
        h = torch.tanh(x.flatten(1) @ w[:80].view(16, 5) + w[80:85])
        return h @ w[85:].view(5, classes)
    return apply, 0.5 * randn(d, seed=seed), synth.Synthetic(randn(n, 1, 4, 4, seed=seed + 1), randn(n, classes, seed=seed + 2),
                                                            torch.tensor(0.3, dtype=f64))


def test_synth_matching_loss_is_one_at_rest_and_zero_on_target():
    apply, w, s = tiny()
    target = randn(len(w), seed=9)
    still = s._replace(step=torch.tensor(0.0, dtype=f64))
    assert float(synth.matching_loss(synth.unroll(apply, w, still, 3), w, target)) == 1
    flat = lambda v, x: apply(v, x) * 0                                              # noqa: E731  a net with zero gradient
    assert float(synth.matching_loss(synth.unroll(flat, w, s, 3), w, target)) == 1
    assert float(synth.matching_loss(target, w, target)) == 0
    end = synth.unroll(apply, w, s, 3)
    assert float(synth.matching_loss(w + 7 * (end - w), w, w + 7 * (target - w))) == pytest.approx(float(synth.matching_loss(end, w, target)))


def test_synth_gradients_through_the_unrolled_steps_are_finite_differences():
    apply, w, s = tiny()
    target, h = randn(len(w), seed=9), 1e-6
    L = lambda *parts: synth.matching_loss(synth.unroll(apply, w, synth.Synthetic(*parts), 2), w, target)    # noqa: E731
    leaves = [t.clone().requires_grad_() for t in s]
    gradients = torch.autograd.grad(L(*leaves), leaves)
    for i, g in enumerate(gradients):
        for place in (range(g.numel()) if g.numel() < 20 else (0, 5, 17, 31)):
            bump = torch.zeros(g.numel(), dtype=f64)
            bump[place] = h
            up, down = ([t + bump.view(t.shape) * sign if j == i else t for j, t in enumerate(s)] for sign in (1, -1))
            assert float(g.flatten()[place]) == pytest.approx(float(L(*up) - L(*down)) / (2 * h), rel=1e-5, abs=1e-9)


def test_synth_soft_loss_with_one_hot_labels_is_cross_entropy():
    scores, y = randn(6, 4), torch.arange(6) % 4
    assert float(synth.soft_cross_entropy(scores, 1e3 * F.one_hot(y, 4).to(f64))) == pytest.approx(float(F.cross_entropy(scores, y)))
    every_entry = (-(torch.softmax(randn(6, 4, seed=1), 1)) * scores.log_softmax(1)).mean()                   # DynaFed's code
    assert float(synth.soft_cross_entropy(scores, randn(6, 4, seed=1))) == pytest.approx(4 * float(every_entry))


def test_synth_data_that_made_the_trajectory_match_it():
    apply, w, s = tiny()
    labels = 1e3 * F.one_hot(torch.arange(6) % 3, 3).to(f64)
    trajectory = [w]
    for _ in range(4):                                                               # plain gradient descent, written by hand
        v = trajectory[-1].clone().requires_grad_()
        F.cross_entropy(apply(v, s.images), torch.arange(6) % 3).backward()
        trajectory.append((v - 0.3 * v.grad).detach())
    end = synth.unroll(apply, trajectory[1], synth.Synthetic(s.images, labels, torch.tensor(0.3, dtype=f64)), 3)
    assert float(synth.matching_loss(end, trajectory[1], trajectory[4])) < 1e-20


@pytest.mark.parametrize("dtype", (torch.float32, f64))
def test_synth_adam_is_torchs_to_the_last_bit(dtype):
    for shape in ((), (20, 1, 7, 7)):
        x = torch.randn(shape, generator=seeded(0)).to(dtype)
        p, m, v = x.clone().requires_grad_(), torch.zeros_like(x), torch.zeros_like(x)
        optimizer = torch.optim.Adam([p], lr=0.05)
        for k in range(1, 40):
            p.grad = (k % 7) * torch.randn(shape, generator=seeded(k)).to(dtype)
            optimizer.step()
            x, m, v = synth.adam(x, p.grad, m, v, 0.05, k)
        assert torch.equal(x, p.detach())


def test_synth_segments_start_and_end_inside_the_window():
    trajectory = [torch.tensor([float(i)]) for i in range(8)]
    seen = set()
    for seed in range(200):
        start, target = synth.draw_segment(trajectory, 3, False, seeded(seed))
        assert target - start == 3
        seen.add(int(start))
        start, target = synth.draw_segment(trajectory, 3, True, seeded(seed))
        assert 1 <= target - start <= 3
    assert seen == {0, 1, 2, 3, 4}
    assert synth.draw_segment(trajectory[:2], 1, True, seeded())[1] == 1


def test_synth_a_trajectory_that_rests_or_is_too_short_is_refused():
    with pytest.raises(FloatingPointError, match="does not move"):
        synth.draw_segment([torch.ones(3)] * 6, 3, True, seeded())
    with pytest.raises(ValueError, match="warm up longer"):
        synth.draw_segment([torch.ones(3)] * 3, 3, True, seeded())


def test_synth_distilling_learns_and_stops_on_nan():
    apply, w, s = tiny()
    trajectory = [w]
    for _ in range(5):
        trajectory.append(trajectory[-1] - 0.2 * torch.func.grad(lambda v: synth.synthetic_loss(apply, v, s))(trajectory[-1]))
    guess = synth.first_guess(2, 3, (1, 4, 4), 1.0, 0.1, seeded(3), w)
    learnt, losses = synth.distill(apply, trajectory, guess, seeded(4), outer_steps=150, inner_steps=3, window=2, rate_step=1e-3,
                                   progress=False)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10]) and learnt.images.shape == (6, 1, 4, 4)
    assert all(not torch.equal(a, b) for a, b in zip(learnt, guess))                # all three are learnt
    for steps in (5, 50):
        with pytest.raises(FloatingPointError, match="syn_step"):
            synth.distill(lambda w, x: apply(w, x) * math.nan, trajectory, guess, seeded(), steps, progress=False)


def test_synth_augmentation_keeps_shape_and_carries_gradients():
    x, kinds = randn(4, 3, 8, 8).requires_grad_(), set()
    for seed in range(40):
        y = synth.augmented(x, seeded(seed))
        assert y.shape == x.shape and y.isfinite().all()
        g, = torch.autograd.grad(y.square().sum(), x)
        assert g.abs().sum() > 0
        kinds.add(round(float(y.detach().sum()), 6))
    assert len(kinds) > 20
    w = randn(3 * 64 * 2)
    s = synth.Synthetic(x.detach(), randn(4, 2), torch.tensor(0.1, dtype=f64))
    end = synth.unroll(lambda v, z: z.flatten(1) @ v.view(192, 2), w, s, 2, lambda z: synth.augmented(z, seeded(5)))
    assert end.shape == w.shape


def as_data(format="float32", real=None, M=3, n=2, **kw):
    """FedSynth's codec on the network of `tiny` -> (codec, w [d], a vector to send [d])."""
    apply, w, _ = tiny()
    kw = {"first": torch.arange(M * n) % 3, "steps": 25, "rates": (0.1, 0.1, 0.01), "step": 0.3, "dtype": f64, **kw}
    return synth.AsData(apply, w, (M, n, 1, 4, 4), 3, format, real, **kw), w, 0.05 * randn(len(w), seed=7)


def test_synth_gradients_through_batches_in_turn_are_finite_differences():
    apply, w, s = tiny()
    real, h = randn(5, 1, 4, 4, seed=8), 1e-6
    s = s._replace(images=s.images.view(2, 3, 1, 4, 4), logits=s.logits.view(2, 3, 3))
    for target in (None, w + randn(len(w), seed=9)):                                 # the two objectives of FedSynth
        def L(*parts):
            end = synth.unroll(apply, w, synth.Synthetic(*parts))
            return F.cross_entropy(apply(end, real), torch.arange(5) % 3) if target is None else synth.matching_loss(end, w, target)
        leaves = [t.clone().requires_grad_() for t in s]
        for i, g in enumerate(torch.autograd.grad(L(*leaves), leaves)):
            for place in (range(g.numel()) if g.numel() < 20 else (0, 5, 50, 95)):   # pixels of both batches
                bump = torch.zeros(g.numel(), dtype=f64)
                bump[place] = h
                up, down = ([t + bump.view(t.shape) * sign if j == i else t for j, t in enumerate(s)] for sign in (1, -1))
                assert float(g.flatten()[place]) == pytest.approx(float(L(*up) - L(*down)) / (2 * h), rel=1e-5, abs=1e-9)


def test_synth_batches_in_turn_and_the_same_images_again_agree_where_they_must():
    apply, w, s = tiny()
    again = s._replace(images=s.images.expand(4, *s.images.shape), logits=s.logits.expand(4, *s.logits.shape))
    assert torch.equal(synth.unroll(apply, w, again), synth.unroll(apply, w, s, 4))
    halves = s._replace(images=s.images.view(2, 3, 1, 4, 4), logits=s.logits.view(2, 3, 3))
    swapped = halves._replace(images=halves.images.flip(0), logits=halves.logits.flip(0))
    assert not torch.allclose(synth.unroll(apply, w, halves), synth.unroll(apply, w, swapped))           # the order is part of the message


@pytest.mark.parametrize("format, pixel, extra", [("float32", 4, 0), ("float16", 2, 0), ("uint8", 1, 8)])
def test_synth_message_takes_the_bytes_of_its_formula(format, pixel, extra):
    for dtype in (torch.float32, f64):                                               # whatever the type of the model
        apply, w, _ = tiny()
        c = synth.AsData(apply, w.to(dtype), (3, 2, 1, 4, 4), 3, format, first=torch.arange(6) % 3, steps=1)
        buffer = c.encode(0.05 * randn(len(w)).to(dtype), seeded())
        assert len(buffer) == c.size == pixel * 6 * 16 + 4 * (6 * 3 + 1) + extra + 4
        assert c.decode(buffer, len(w)).dtype == dtype
    masking = RandK(compress.masking_within(c.size), False)                          # the baseline at equal bytes
    for size in range(c.size, c.size + 4):
        assert 0 <= size - len(RandK(compress.masking_within(size)).encode(torch.ones(1000), seeded())) < 4
    assert len(masking.encode(torch.ones(1000), seeded())) <= c.size


def test_synth_image_formats_keep_to_their_error():
    x = 3 * randn(2, 5, 1, 4, 4)
    back = {f: synth.read_images(synth.write_images(x, f, f64), x.shape, f, f64) for f in synth.FORMATS}
    assert torch.equal(back["float32"], x)                                           # the floats of the wire, here float64
    assert ((back["float16"] - x).abs() <= x.abs() / 2**11 + 2**-25).all() and not torch.equal(back["float16"], x)
    error = (back["uint8"] - x).abs().max() / (x.max() - x.min())
    assert 1 / 600 < error <= 1 / 510 + 1e-12 and back["uint8"].unique().numel() <= 256
    assert float(back["uint8"].min()) == float(x.min()) and float(back["uint8"].max()) == pytest.approx(float(x.max()))
    for f in synth.FORMATS:                                                          # ends of the floats, and images that are all equal
        for y in (torch.full((4,), 7.0), torch.tensor([3e38, -3e38]), torch.tensor([1e-42, 0.0])):
            assert synth.read_images(synth.write_images(y, f, torch.float32), y.shape, f, torch.float32).isfinite().all()
        assert torch.equal(synth.read_images(synth.write_images(torch.full((4,), 7.0), f, f64), (4,), f, f64), torch.full((4,), 7.0, dtype=f64))


@pytest.mark.parametrize("format", synth.FORMATS)
def test_synth_damaged_and_forged_messages_raise_value_error(format):
    c, w, x = as_data(format, steps=2, dtype=torch.float32)
    good = c.encode(x, seeded())
    assert c.decode(good, len(w)).isfinite().all()
    c, far = dataclasses.replace(c, w=w.float()), c.unpack(good)._replace(step=torch.tensor(3e38, dtype=f64))        # leads out of float32
    for bad in (good[:-1], torch.cat([good, good[:1]]), good.float(), None, bits.seal(good[:-5]), bits.seal(torch.cat([good[:-4], good[:1]])),
                good ^ (torch.arange(len(good)) == 9).to(torch.uint8), c.pack(c.unpack(good)._replace(step=torch.tensor(math.nan))),
                c.pack(far)):
        with pytest.raises(ValueError):
            c.decode(bad, len(w))
    for seed in range(100):                                                          # the right length and checksum, and any content
        try:
            assert c.decode(bits.seal(torch.randint(0, 256, (len(good) - 4,), generator=seeded(seed), dtype=torch.uint8)), len(w)).isfinite().all()
        except ValueError:
            pass


@pytest.mark.parametrize("format", synth.FORMATS)
def test_synth_a_client_learns_data_that_lower_its_objective(format):
    apply, w, _ = tiny()
    images = randn(30, 1, 4, 4, seed=5) + torch.arange(30).view(-1, 1, 1, 1) % 3
    real = lambda v, s: F.cross_entropy(apply(v, images), torch.arange(30) % 3)      # noqa: E731
    c, w, x = as_data(format, real, rates=(0.1, 0.1, 0.02))
    before, after = (float(real(v, 0)) for v in (w, w + c.decode(c.encode(x, seeded()), len(w))))
    start = float(c.objective(c.guess(seeded()), x))
    assert after < 0.7 * before and after < 0.7 * start                              # better than no message, and than what it started from
    c, w, x = as_data(format, rates=(0.1, 0.1, 0.02))
    error = float((c.decode(c.encode(x, seeded()), len(w)) - x).square().sum() / x.square().sum())
    assert error < 0.8 and error < 0.8 * float(c.objective(c.guess(seeded()), x))
    rough = c.guess(seeded(3))                                                       # the learning sees what the server will replay
    assert float(c.objective(rough, x)) == pytest.approx(float((c.decode(c.pack(rough), len(w)) - x).square().sum() / x.square().sum()), rel=1e-9)
    learnt = c.unpack(c.encode(x, seeded()))
    assert all(not torch.allclose(a, b) for a, b in zip(learnt, c.guess(seeded())))  # all three are learnt


def test_synth_a_message_is_never_worse_than_none_and_feedback_telescopes():
    c, w, x = as_data(step=50.0, steps=2)                                            # steps far too long
    assert float(c.objective(c.guess(seeded()), x)) > 1 and not c.decode(c.encode(x, seeded()), len(w)).any()
    c, w, x = as_data(steps=10)
    assert not c.decode(c.encode(0 * x, seeded()), len(w)).any()
    e, sent = torch.zeros_like(x), 0
    for t in range(4):
        buffer, e_new = compress.with_feedback(c, x, e, seeded(t))
        assert e_new.norm() <= (e + x).norm()
        sent, e = sent + c.decode(buffer, len(w)), e_new
    assert torch.allclose(sent + e, 4 * x, rtol=0, atol=1e-13) and sent.any()
    with pytest.raises(FloatingPointError, match="fs_step"):
        as_data(real=lambda v, s: v.sum() * math.nan)[0].encode(x, seeded())


# -------------------------------------------------------------------------------------------------------------- data
@pytest.fixture(scope="session")
def bundled():
    return data.load("bundled")


def test_data_bundled_images_are_balanced_and_the_three_sets_disjoint(bundled):
    train, val, test = bundled
    assert [len(s.y) for s in bundled] == [9000, 1000, 2000] and train.x.shape[1:] == (1, 28, 28) and train.x.dtype == torch.uint8
    for s in bundled:
        assert torch.equal(s.y.bincount(), torch.full((10,), len(s.y) // 10))
    keys = [{bytes(x.numpy().tobytes()) for x in s.x} for s in (train, val)]
    assert len(keys[0] & keys[1]) <= 2                                               # the source itself holds a few duplicates
    x, _, weight = train.batch(torch.tensor([[0, 0, 0, 0], [-1, 0, 0, 0]]))
    assert weight.tolist() == [1, 0] and torch.allclose(x[0], (train.x[0].float() - train.x.float().mean()) / train.x.float().std(), atol=1e-4)


@pytest.mark.parametrize("how", split.PARTITIONS)
def test_split_partitions_use_no_image_twice(how):
    y = torch.arange(3000) % 10
    parts = split.partition(y, 40, how, alpha=0.1, classes_per_client=2, min_size=10, seed=3)
    used = torch.cat(parts)
    assert len(parts) == 40 and len(used) >= 0.99 * 3000
    assert (len(used.unique()) == len(used)) == (how != "dirichlet-recycled")
    assert all(map(torch.equal, parts, split.partition(y, 40, how, 0.1, 2, 10, seed=3)))
    assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(parts, split.partition(y, 40, how, 0.1, 2, 10, seed=4)))
    sizes = [len(p) for p in parts]
    if how in ("iid", "dirichlet", "dirichlet-recycled"):
        assert set(sizes) == {75}
    if how == "dirichlet-balanced":
        assert 60 <= min(sizes) and max(sizes) <= 90
    assert min(sizes) >= 10


def test_split_partitions_are_as_skewed_as_they_say():
    y = torch.arange(6000) % 10
    held = lambda how, **kw: [len(y[p].unique()) for p in split.partition(y, 50, how, **kw)]                   # noqa: E731
    share = lambda alpha: np.mean([float(y[p].bincount().max() / len(p)) for p in split.partition(y, 50, "dirichlet", alpha)])  # noqa: E731
    assert max(held("shards", classes_per_client=3)) == 3 and min(held("iid")) == 10
    assert share(1e5) < 0.25 < 0.5 < share(0.1) and min(held("dirichlet", alpha=1e5)) == 10
    sizes = [len(p) for p in split.partition(y, 50, "dirichlet-class", 0.1)]
    assert max(sizes) > 3 * 120 and min(sizes) == 10


def test_split_recycled_classes_follow_the_priors_where_drawing_without_replacement_cannot():
    y = np.repeat(np.arange(10), 600)
    pools = [np.flatnonzero(y == c) for c in range(10)]
    prior = np.random.default_rng(1).dirichlet([0.1] * 10, 50)                       # the first thing that both draw
    gap = [np.abs(np.stack([np.bincount(y[p], minlength=10) / len(p) for p in split.dirichlet_per_client(pools, 50, 0.1, np.random.default_rng(1), r)])
                  - prior).sum(1).mean() for r in (False, True)]
    assert gap[1] < 0.12 < 0.3 < gap[0]              # 120 draws of a prior differ from it by 0.1 in the mean


def test_split_balanced_shares_are_doubly_stochastic_and_stay_skewed():
    shares = split.doubly_stochastic(np.random.default_rng(0).dirichlet([0.16] * 80, 10))
    assert np.allclose(shares.sum(1), 1) and np.allclose(shares.sum(0), 10 / 80, rtol=0.02) and (shares.max(0) / shares.sum(0)).mean() > 0.5
    target = np.outer([1, 2, 3], [1, 1, 2, 4]) * 1.0                                  # rank one: every entry must become 1 / 4
    assert np.allclose(split.doubly_stochastic(target), 1 / 4)


def test_split_partitions_refuse_the_impossible():
    y = torch.arange(100) % 10
    for message, kw in (("above 0", dict(n_clients=5, alpha=0)), ("1..100", dict(n_clients=101)), ("unknown partition", dict(n_clients=5, how="x")),
                        ("min_size", dict(n_clients=20, how="dirichlet-class")), ("cannot cover", dict(n_clients=2, how="shards")),
                        ("cannot cover", dict(n_clients=5, how="shards", classes_per_client=11))):
        with pytest.raises(ValueError, match=message):
            split.partition(y, **kw)


def test_data_batches_are_epochs_or_full_steps():
    mine = torch.arange(100, 117)
    rows = data.draw_batches(mine, 5, 0, 2, seeded())                                # 2 epochs of ceil(17/5) batches
    assert rows.shape == (8, 5, 4)
    for epoch in rows[:, :, 0].view(2, 20):
        assert sorted(epoch.tolist()) == [-1] * 3 + mine.tolist()
    rows = data.draw_batches(mine, 20, 3, 0, seeded())
    assert rows.shape == (3, 20, 4) and rows[..., 0].min() >= 100 and rows[..., 1:].eq(0).all()
    counts = rows[..., 0].flatten().bincount()[100:]
    assert counts.max() - counts.min() <= 1                                          # shuffles laid end to end


def test_data_shift_and_flip_are_the_slow_loop(bundled):
    x = torch.randint(0, 256, (3, 3, 8, 9), generator=seeded(), dtype=torch.uint8)
    how = torch.tensor([[1, -2, 0], [-4, 4, 1], [0, 0, 1], [3, 0, 1]])
    number = torch.tensor([0, 1, 2, 0])
    out = data.moved(x, number, how)
    for b in range(4):
        down, right, flip = how[b].tolist()
        for r in range(8):
            for c in range(9):
                inside = 0 <= r - down < 8 and 0 <= c - right < 9
                expected = x[number[b], :, r - down, c - right] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(out[b, :, r, 8 - c if flip else c], expected)              # shifted first, then flipped


def test_data_reads_colour_npz_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = dict(x_train=rng.integers(0, 256, (40, 10, 12, 3), dtype=np.uint8), y_train=np.arange(40)[:, None] % 4,
                  x_test=rng.integers(0, 256, (8, 10, 12, 3), dtype=np.uint8), y_test=np.arange(8) % 4)
    np.savez(tmp_path / "a.npz", **arrays)
    d = data.load(tmp_path / "a.npz", val=8)
    assert d.train.x.shape == (32, 3, 10, 12) and d.val.y.bincount().tolist() == [2] * 4 and d.train.mean.shape == (3,)
    first = np.setdiff1d(np.arange(40), data.balanced(np.arange(40) % 4, 8, np.random.default_rng(0)))[0]
    assert np.array_equal(d.train.x[0].numpy().transpose(1, 2, 0), arrays["x_train"][first])


def idx_folder(folder, n=12):
    """Write the four files of MNIST's format with n training and n/2 test images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, m in (("train", n), ("t10k", n // 2)):
        x, y = rng.integers(0, 256, (m, 28, 28), dtype=np.uint8), (np.arange(m) % 3).astype(np.uint8)
        for name, a, head in ((f"{split}-images-idx3-ubyte", x, [2051, m, 28, 28]), (f"{split}-labels-idx1-ubyte", y, [2049, m])):
            raw = np.array(head, dtype=">i4").tobytes() + a.tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            (folder / name).write_bytes(raw)


def test_data_idx_files_and_torchvision_agree(tmp_path, monkeypatch):
    idx_folder(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "absent")
    by_torchvision = data.load("fashionmnist", val=3, root=tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "FashionMNIST" / "raw")
    by_us = data.load("fashionmnist", val=3, root=tmp_path / "absent")
    assert torch.equal(by_torchvision.train.x, by_us.train.x) and torch.equal(by_torchvision.test.y, by_us.test.y)


def test_data_cifar_and_svhn_come_through_torchvision(tmp_path, monkeypatch):
    datasets = data.import_torchvision().datasets
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    d = data.load("cifar10", val=2, root=tmp_path)
    assert d.train.x.shape == (18, 3, 32, 32) and d.test.x.shape == (4, 3, 32, 32) and d.train.classes == ["a", "b"]
    assert torch.equal(d.test.x[0], torch.tensor(pixels[0].reshape(3, 32, 32)))

    class FakeSVHN:                                        # torchvision's own reader needs scipy: only its result is imitated
        def __init__(self, root, split, download):
            self.data, self.labels = np.zeros((6, 3, 32, 32), np.uint8), np.arange(6) % 2
    monkeypatch.setattr(datasets, "SVHN", FakeSVHN)
    assert data.load("svhn", val=2, root=tmp_path).train.x.shape == (4, 3, 32, 32)


def test_data_a_download_that_fails_is_the_users_news(tmp_path, monkeypatch):
    def no_network(*args, **kw):
        raise OSError("no network")
    monkeypatch.setattr(data.import_torchvision().datasets, "CIFAR100", no_network)
    with pytest.raises(ValueError, match="cifar100.*no network"):
        data.load("cifar100", root=tmp_path)


def test_data_torchvision_imports_where_its_operators_cannot_load():
    code = """if True:
        import torch, sys
        real = torch.ops.load_library
        def broken(path): raise OSError("operators of another build")     # what a CUDA wheel does beside a CPU torch
        torch.ops.load_library = broken
        try:
            import torchvision
            raise SystemExit("the trap is gone: this test and import_torchvision can go too")
        except RuntimeError as error:
            assert "nms" in str(error)
        import data
        tv = data.import_torchvision()
        assert tv is data.import_torchvision()
        assert tv.models.resnet18(num_classes=4).fc.out_features == 4 and tv.datasets.FashionMNIST
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE, timeout=120)


# ------------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)], ids=str)
def test_models_flat_function_is_the_nn_module(name, shape):
    model = models.build(name, shape, 10, seed=5, dtype=f64)
    build = {"mlp": lambda: models.mlp_module(*shape, 10, 64), "cnn": lambda: models.cnn_module(*shape, 10, 8, 64), "lenet": lambda: models.lenet_module(*shape, 10),
             "convnet": lambda: models.convnet_module(*shape, 10), "resnet18": lambda: models.resnet18_module(*shape, 10)}[name]
    torch.manual_seed(5)
    module = build().double()
    x, y = randn(3, *shape), torch.tensor([0, 3, 9])
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    assert torch.allclose(models.flatten(p.detach() for p in module.parameters()), model.w0)
    assert torch.allclose(model.apply(model.w0, x), module(x), rtol=1e-9, atol=1e-12)
    g = torch.func.grad(lambda w: F.cross_entropy(model.apply(w, x), y))(model.w0)
    assert torch.allclose(g, models.flatten(p.grad for p in module.parameters()), rtol=1e-7, atol=1e-12)


def test_models_mlp_has_the_depth_it_was_given():
    model = models.build("mlp", (1, 28, 28), 10, hidden=200, depth=2, dtype=f64)
    assert len(model.w0) == 199_210                                                   # the 2NN of McMahan et al. 2017
    W1, b1, W2, b2, W3, b3 = models.unflatten(model.w0, model.shapes)
    x = randn(3, 1, 28, 28)
    hidden = ((x.flatten(1) @ W1.T + b1).relu() @ W2.T + b2).relu()
    assert torch.allclose(model.apply(model.w0, x), hidden @ W3.T + b3)


def hooked_activity(module, x):
    """What a network's nn.ReLU modules let through, its mean square per image and summed over the calls -> [B]."""
    outs = []
    hooks = [m.register_forward_hook(lambda m, x, a: outs.append(a.clone())) for m in module.modules() if isinstance(m, nn.ReLU)]
    module(x)
    for hook in hooks:
        hook.remove()
    return torch.stack([sum((a[b] ** 2).sum() / a[b].numel() for a in outs) for b in range(len(x))]), len(outs)


@pytest.mark.parametrize("name, layers", [("mlp", 2), ("cnn", 3), ("lenet", 4), ("convnet", 3), ("resnet18", 17)])
def test_models_activity_is_what_hooks_on_the_modules_relus_see(name, layers):
    """Before pooling, every call of every ReLU, no scores; its gradient too."""
    shape, kind = (3, 20, 20), getattr(models, f"{name}_module")
    model = models.build(name, shape, 7, 4, 10, seed=2, dtype=f64, depth=2)
    torch.manual_seed(2)
    module = kind(*shape, 7, *{"mlp": (10, 2), "cnn": (4, 10)}.get(name, ())).double()
    x = randn(3, *shape)
    scores, activity = model.watched(model.w0, x)
    slow, calls = hooked_activity(module, x)
    assert calls == layers and activity.shape == (3,) and torch.allclose(activity, slow, rtol=1e-9)
    assert torch.allclose(scores, model.apply(model.w0, x), rtol=1e-12, atol=1e-12)
    slow.sum().backward()
    g = torch.func.grad(lambda w: model.watched(w, x)[1].sum())(model.w0)
    assert torch.allclose(g, models.flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()), rtol=1e-7, atol=1e-12)
    assert g.norm() > 0.01


def test_models_activity_is_a_mean_so_twice_the_units_are_as_active():
    model, x = models.build("mlp", (1, 4, 4), 3, hidden=5, dtype=f64), randn(6, 1, 4, 4)
    W, b, V, c = models.unflatten(model.w0, model.shapes)
    wide = models.build("mlp", (1, 4, 4), 3, hidden=10, dtype=f64)
    w = models.flatten([torch.cat([W, W]), torch.cat([b, b]), torch.cat([V, V], 1) / 2, c])
    for one, two in zip(model.watched(model.w0, x), wide.watched(w, x)):
        assert torch.allclose(one, two, rtol=1e-12)


def test_models_resnet18_has_the_stem_it_was_given():
    small, large = (models.build("resnet18", (3, 32, 32), 10, stem=stem) for stem in ("auto", "imagenet"))
    assert small.shapes[0] == (64, 3, 3, 3) and large.shapes[0] == (64, 3, 7, 7) and large.apply(large.w0, torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_models_convolution_weights_are_channels_last_views():
    model = models.build("cnn", (3, 32, 32), 10)
    parts = models.unflatten(model.w0, model.shapes)
    assert parts[2].is_contiguous(memory_format=torch.channels_last)
    assert all(p.untyped_storage().data_ptr() == model.w0.untyped_storage().data_ptr() for p in parts)
    assert torch.equal(models.flatten(parts), model.w0)
    before = torch.random.get_rng_state()
    models.build("mlp", (1, 28, 28), 10)
    assert torch.equal(before, torch.random.get_rng_state())                         # building leaves global randomness alone


def test_models_sizes_are_those_of_the_papers():
    assert len(models.build("cnn", (1, 28, 28), 10, width=32, hidden=512).w0) == 1_663_370        # McMahan et al. 2017
    net = models.resnet18_module(3, 32, 32, 10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) and net.bn1.num_groups == 2
    table = re.findall(r"^    (\w+) .*?([\d,]{6,})", models.__doc__, re.M)
    assert len(table) >= 3
    for name, d in table:
        if name in models.MODELS:
            assert len(models.build(name, (1, 28, 28), 10).w0) == int(d.replace(",", ""))


# --------------------------------------------------------------------------------------------------------------- fl
class Quadratics:
    """F_i(w) = (w - c_i)' A_i (w - c_i) / 2 in float64: a task whose every quantity is known in closed form."""

    def __init__(self, n=8, d=6, steps=3, seed=0, spread=1.0, sizes=None):
        M = randn(n, d, d, seed=seed)
        self.A = torch.eye(d, dtype=f64) + 0.1 * M @ M.transpose(1, 2)
        self.c, self.w0 = spread * randn(n, d, seed=seed + 1), randn(d, seed=seed + 2)
        self.sizes, self.steps, self.weights = sizes or [1] * n, steps, None
        self.shapes = [(2, (d - 1) // 2), (d - 2 * ((d - 1) // 2),)]                 # a matrix and a bias, for GCSAM
        self.best = torch.linalg.solve(self.A.mean(0), (self.A @ self.c[..., None]).mean(0)[:, 0])

    def loss(self, w, rows):
        A, v = self.A[rows[0, 0]], w - self.c[rows[0, 0]]
        return 0.5 * torch.dot(v, A @ v)

    def gradient(self, i, w):
        return self.A[i] @ (w - self.c[i])

    def plan(self, client, g):
        return torch.full((self.steps, 1, 1), client)

    def everything(self, client):
        return torch.full((1, 1, 1), client)

    def steps_of(self, client):
        return self.steps


def quad(task, algo, compressor=Identity(f64), rounds=1, chunk=1, **kw):
    """A federation on quadratics after some rounds; full participation, no clipping, unless kw says otherwise."""
    kw = {"participation": len(task.sizes), "clients": len(task.sizes), "clip": 0.0, "lr": 0.1, "warmup": 10**6, **kw}
    fed = loop.Federation(baselines.METHODS[algo](task, config.Config(algo=algo, **kw)), compressor, workers=2, chunk=chunk)
    for _ in range(rounds):
        fed.round()
    return fed


def vision(algo="fedavg", bundled=None, dtype=f64, model="mlp", compressor=None, chunk=1, begin=0, **kw):
    """A small federation on 240 of the bundled images in float64: Task and Federation as run.py composes them."""
    kw = {"clients": 6, "participation": 4, "rounds": 4, "local_steps": 3, "batch": 8, "warmup": 2, "window": 2, "outer_steps": 3, "inner_steps": 2,
          "ipc": 1, "hidden": 8, "width": 2, "alpha": 0.5, "lr": 0.05, "rho": 0.05, "warmup_method": "fedsam", "mix": 0.5, "oracle_images": 20,
          "fs_steps": 3, "fs_batches": 2, "fs_images": 2, "fs_step": 0.02, "fs_format": "float32", "fs_objective": "update" if kw.get("error_feedback") else "data", **kw}
    cfg = config.Config(algo=algo, model=model, **kw).check()
    train = bundled.train._replace(x=bundled.train.x[:240], y=bundled.train.y[:240], mean=bundled.train.mean.to(dtype), std=bundled.train.std.to(dtype))
    net = models.build(model, (1, 28, 28), 10, cfg.width, cfg.hidden, cfg.seed, dtype=dtype)
    task = tasks.Task(net, train, split.partition(train.y, cfg.clients, cfg.partition, cfg.alpha, min_size=2, seed=cfg.seed), cfg)
    fed = loop.Federation(baselines.METHODS[algo](task, cfg), compressor or Identity(dtype), workers=2, chunk=chunk)
    for _ in range(begin):
        fed.round()
    return fed


def test_fl_one_fedavg_round_is_modules_and_sgd(bundled):
    """The oracle: nn.Module, torch.optim.SGD, clip_grad_norm_, a list of state dicts, their mean."""
    fed = vision("fedavg", bundled, model="cnn", local_steps=0 + 4, weight_decay=0.01, clip=0.5, lr=0.1)
    clients = fed.clients(0)
    ends = []
    for i, plan in zip(clients, fed.plans(clients, 0)):
        torch.manual_seed(fed.cfg.seed)
        net = models.cnn_module(1, 28, 28, 10, 2, 8).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        for rows in plan:
            numbers = rows[:, 0]
            x = (fed.task.train.x[numbers].double() - fed.task.train.mean) / fed.task.train.std
            optimizer.zero_grad()
            F.cross_entropy(net(x), fed.task.train.y[numbers]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
        ends.append(models.flatten(p.detach() for p in net.parameters()))
    fed.round()
    assert torch.allclose(fed.w, torch.stack(ends).mean(0), rtol=1e-5, atol=1e-9)         # 1e-6 is the rounding of clip_grad_norm_
    assert (fed.w - fed.task.w0).norm() > 0.01


def test_fl_clip_then_decay_then_step():
    task = Quadratics(1, steps=1)
    task.c = 100 * task.c
    w, g = task.w0, task.gradient(0, task.w0)
    fed = quad(task, "fedavg", clip=10.0, weight_decay=0.1)
    assert g.norm() > 10
    assert torch.allclose(fed.w, w - 0.1 * (10 * g / g.norm() + 0.1 * w), rtol=1e-12)


SAM_METHODS = ["fedsam", "fedlesam", "fedlesam-server", "fedsynsam", "oracle"]


@pytest.mark.parametrize("algo", SAM_METHODS)
def test_fl_rho_zero_is_fedavg_bit_for_bit(algo, bundled):
    for kw in ({}, {"compressor": QSGD(7, "max", 64)}, {"compressor": TopK(50), "error_feedback": True}):
        pair = [vision(a, bundled, torch.float32, begin=4, **{"rho": 0.0, **kw}) for a in (algo, "fedavg")]
        assert torch.equal(pair[0].w, pair[1].w) and pair[0].up == pair[1].up
    assert not torch.equal(vision(algo, bundled, torch.float32, begin=4).w, vision("fedavg", bundled, torch.float32, begin=4).w)


def test_fl_mix_zero_is_compressed_fedsam(bundled):
    for kw in ({"compressor": QSGD(7, "max", 64)}, {"compressor": TopK(50), "error_feedback": True}):
        pair = [vision(a, bundled, torch.float32, begin=4, mix=0.0, **kw) for a in ("fedsynsam", "fedsam")]
        assert torch.equal(pair[0].w, pair[1].w)
    assert not torch.equal(vision("fedsynsam", bundled, torch.float32, begin=4, mix=0.5).w, vision("fedsam", bundled, torch.float32, begin=4).w)


def test_fl_warmup_follows_its_setting(bundled):
    for how, parent in (("fedsam", "fedsam"), ("fedavg", "fedavg")):
        assert torch.equal(vision("fedsynsam", bundled, begin=2, warmup_method=how).w, vision(parent, bundled, begin=2).w)


def test_fl_mix_one_gives_all_clients_one_direction(bundled):
    fed = vision("fedsynsam", bundled, begin=3, mix=1.0)
    me = fl.Client(fed.w, fed.w[:0])
    plans = fed.plans([0, 1, 2, 3], fed.t)
    directions = [fed.method.direction(fed.w, p[0], me) for p in plans]
    assert all(torch.equal(u, directions[0]) for u in directions) and directions[0].norm() > 0
    fed.cfg = fed.method.cfg = dataclasses.replace(fed.cfg, mix=0.5)
    assert not torch.equal(*(fed.method.direction(fed.w, p[0], me) for p in plans[:2]))


def test_fl_synthetic_equal_to_all_data_gives_the_global_perturbation(bundled):
    fed = vision("fedsynsam", bundled, begin=3, mix=1.0)
    train = fed.task.train
    everything = (train.x.double() - train.mean[:, None, None]) / train.std[:, None, None]
    fed.method.synthetic = synth.Synthetic(everything, 1e3 * F.one_hot(train.y, 10).double(), None)
    w = fed.w.clone().requires_grad_()
    F.cross_entropy(fed.task.apply(w, everything), train.y).backward()
    u = fed.method.direction(fed.w, fed.plans([0], 0)[0][0], fl.Client(fed.w, fed.w[:0]))
    assert torch.allclose(u, w.grad, rtol=1e-9, atol=1e-14)
    assert torch.allclose(u, sharpness.full_gradient(fed.task.apply, fed.w, train, torch.arange(240)), rtol=1e-9, atol=1e-14)


def test_fl_synthetic_gradient_once_a_round_is_taken_at_the_received_model(bundled):
    fed = vision("fedsynsam", bundled, begin=3, mix=1.0, syn_gradient="round", rho=0.5)
    method, me, elsewhere, rows = fed.method, fl.Client(fed.w, fed.w[:0]), fed.w + 0.1, fed.plans([0], 3)[0][0]
    method.receive(fed.w, [])
    at_start = method.direction(elsewhere, rows, me)
    assert torch.equal(at_start, method.direction(fed.w, rows, me)) and torch.equal(at_start, method.g_syn(fed.w))
    calls, g_syn = [], method.g_syn
    method.g_syn = lambda w: calls.append(1) or g_syn(w)
    fed.round()
    assert len(calls) == 1                                                           # one synthetic gradient for the whole round
    method.cfg = dataclasses.replace(fed.cfg, syn_gradient="step")
    assert not torch.equal(method.direction(elsewhere, rows, me), at_start)


def test_fl_synthesis_happens_when_it_should_and_is_fetched_once(bundled):
    fed = vision("fedsynsam", bundled, participation=6, begin=2)
    assert fed.method.synthetic is None
    model_bytes = 6 * (8 * len(fed.w) + 4)
    assert fed.down == 2 * model_bytes
    fed.round()
    first, parcel = fed.method.synthetic, 8 * (10 * 784 + 100) + 2 * 4
    assert first is not None and fed.parcel == parcel and fed.method.trajectory == []
    assert fed.down == 3 * model_bytes + 6 * parcel
    fed.round()
    assert fed.method.synthetic is first and fed.down == 4 * model_bytes + 6 * parcel
    again = vision("fedsynsam", bundled, participation=6, begin=4, resynthesize=1)
    assert not torch.equal(again.method.synthetic.images, first.images) and again.down == 4 * model_bytes + 12 * parcel
    assert torch.allclose(again.method.trajectory[-1], again.w - again.move) and len(again.method.trajectory) == 3
    assert vision("dynafed", bundled, participation=6, begin=4).down == 4 * model_bytes       # its images stay at the server


def test_fl_dynafed_without_server_epochs_is_fedavg(bundled):
    plain = vision("fedavg", bundled, begin=3).w
    assert torch.equal(vision("dynafed", bundled, begin=3, finetune_epochs=0).w, plain)
    tuned = vision("dynafed", bundled, begin=3, finetune_epochs=2, finetune_lr=1e-3)
    assert not torch.equal(tuned.w, plain) and (tuned.w - plain).abs().max() <= 2 * 1e-3 * 1.01         # Adam moves <= rate a step
    s = tuned.method.synthetic
    assert synth.synthetic_loss(tuned.task.apply, tuned.w, s) < synth.synthetic_loss(tuned.task.apply, plain, s)


def test_fl_man_zero_is_the_base_bit_for_bit(bundled):
    for algo, model in (("fedsam", "cnn"), ("feddyn", "mlp")):
        fed = vision(algo, bundled, torch.float32, model=model)
        fed.task.watched = None                                                      # not even called
        for _ in range(2):
            fed.round()
        assert torch.equal(fed.w, vision(algo, bundled, torch.float32, model=model, man=0.0, begin=2).w)
        assert not torch.equal(fed.w, vision(algo, bundled, torch.float32, model=model, man=0.1, begin=2).w)


def test_fl_man_adds_its_gradient_to_that_of_cross_entropy(bundled):
    """One hidden layer: (zeta / (B n)) sum over real images of (a_b 1[a_b > 0]) x_b' on W1, the same without x_b on b1, 0 above."""
    zeta, n = 0.15, 8
    plain, fed = vision("fedavg", bundled), vision("fedavg", bundled, man=zeta)
    rows = F.pad(fed.plans([0], 0)[0][0][:5], (0, 0, 0, 3), value=-1)                # three of the eight are padding
    train, w = fed.task.train, fed.w
    x = ((train.x[rows[:5, 0]].double() - train.mean) / train.std).flatten(1)
    W, b, _, _ = models.unflatten(w, fed.task.shapes)
    by_hand = [torch.zeros_like(p) for p in models.unflatten(w, fed.task.shapes)]
    for image in x:
        a = (W @ image + b).relu()
        by_hand[0] += zeta / (5 * n) * torch.outer(a, image)
        by_hand[1] += zeta / (5 * n) * a
    g = fed.method.grad(w, rows) - plain.method.grad(w, rows)
    assert torch.allclose(g, models.flatten(by_hand), rtol=1e-9, atol=1e-12) and g.norm() > 1e-3
    assert torch.allclose(fed.method.grad(w, rows), fed.method.grad(w, rows[:5]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("algo", ["fedsam", "fedasam", "gcsam", "fedsynsam"])
def test_fl_man_is_in_the_ascent_and_in_the_descent(algo, bundled):
    """One step of SAM against the whole loss, built here from a module and its hooks; g_syn stays plain cross-entropy."""
    fed, zeta = vision(algo, bundled, man=0.3, rho=0.2, mix=0.25), 0.3
    fed.method.synthetic = synth.first_guess(1, 10, (1, 28, 28), 5.0, 0.1, seeded(), fed.w)
    net, train, rows, w = models.mlp_module(1, 28, 28, 10, 8).double(), fed.task.train, fed.plans([0], 3)[0][0], fed.w
    x, y = (train.x[rows[:, 0]].double() - train.mean) / train.std, train.y[rows[:, 0]]

    def whole(v, zeta):
        nn.utils.vector_to_parameters(v, net.parameters())
        loss = F.cross_entropy(net(x), y) + zeta / 2 * hooked_activity(net, x)[0].mean()
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
    me, shapes = fl.Client(w, w[:0]), fed.task.shapes
    G = fed.method.gradient(w, rows, me, fed.method.direction(w, rows, me))

    def sam_of(up, down):
        u, grad = whole(w, up), lambda v: whole(v, down)                             # noqa: E731
        if algo == "fedsynsam":
            s = fed.method.synthetic
            syn = torch.func.grad(lambda v: synth.soft_cross_entropy(fed.task.apply(v, s.images), s.logits))(w)
            u = 0.75 * u / u.norm() + 0.25 * syn / syn.norm()
        if algo == "fedasam":
            return grad(sam.perturb_adaptive(w, u, 0.2, 0.2, fed.task.weights))
        if algo == "gcsam":
            return sam.centralise(sam.sam_gradient(grad, w, sam.centralise(u, shapes), 0.2), shapes)
        return sam.sam_gradient(grad, w, u, 0.2)
    assert torch.allclose(G, sam_of(zeta, zeta), rtol=1e-8, atol=1e-12)
    assert not any(torch.allclose(G, sam_of(*z), rtol=1e-4, atol=1e-8) for z in ((0, zeta), (zeta, 0)))


def test_fl_man_is_not_seen_by_what_measures(bundled):
    plain, fed = (vision("fedsynsam", bundled, man=z) for z in (0.0, 5.0))
    measures = [(tasks.evaluate(f.task.apply, plain.w, f.task.train), sharpness.top_eigenvalue(f.task.apply, plain.w, f.task.train, torch.arange(60)),
                 experiment.evaluated(f, data.Dataset(f.task.train, f.task.train, f.task.train), torch.arange(60))) for f in (plain, fed)]
    assert measures[0] == measures[1]
    guess = synth.first_guess(1, 10, (1, 28, 28), 5.0, 0.1, seeded(), plain.w)
    for f in (plain, fed):
        f.method.synthetic = guess
    assert torch.equal(plain.method.g_syn(plain.w), fed.method.g_syn(plain.w))


def test_fl_man_keeps_activations_small(bundled):
    activity = [float(f.task.watched(f.w, next(f.task.train.chunks(240)).x)[1].mean())
                for f in (vision("fedavg", bundled, man=z, local_steps=10, begin=4) for z in (0.0, 0.15, 1.0))]
    assert activity[0] > activity[1] > activity[2]


def test_fl_fedlesam_climbs_a_stale_global_gradient():
    """Full participation, K = 1: eps at round t is rho grad F(w^{t-1}) / || . ||, and round 0 is plain SGD."""
    for algo in ("fedlesam", "fedlesam-server"):
        task, rho = Quadratics(steps=1), 0.2
        fed, w, stale = quad(task, algo, rounds=0, rho=rho), task.w0, None
        for _ in range(3):
            rim = w if stale is None else w + rho * stale / stale.norm()
            stale = torch.stack([task.gradient(i, rim) for i in range(8)]).mean(0)   # what the server's move will be made of
            w = w - 0.1 * stale
            fed.round()
            assert torch.allclose(fed.w, w, rtol=1e-12)


def test_fl_fedlesam_remembers_the_model_a_client_last_saw():
    task = Quadratics(n=6)
    fed = quad(task, "fedlesam", participation=2, rounds=0, rho=0.1)
    seen = {}
    for t in range(12):
        now = fed.w.clone()
        for i in fed.clients(t):
            row = fed.memory.read([i], fed.method.first_memory(now))[0, 0]
            assert torch.equal(row, seen.get(i, now))
            seen[i] = now
        fed.round()
    me = fl.Client(fed.w, seen[fed.clients(11)[0]][None])
    move = fed.w - me.memory[0]
    assert torch.dot(fed.method.direction(fed.w, None, me), move) < 0                # uphill is against the last move
    assert len(fed.memory.slot) <= 6 and fed.memory.table.shape[1:] == (1, 6)


@pytest.mark.parametrize("algo", list(baselines.METHODS))
def test_fl_vmap_and_one_by_one_give_the_same_numbers(algo, bundled):
    for kw in ({"model": "cnn", "augment": True, "man": 0.1}, {"local_epochs": 1, "partition": "dirichlet-class", "min_size": 2}):
        feds = [vision(algo, bundled, begin=3, chunk=chunk, **kw) for chunk in (1, 3)]
        assert torch.allclose(feds[0].w, feds[1].w, rtol=1e-9, atol=1e-11)
        assert not torch.equal(feds[0].w, feds[0].task.w0)


def elsewhere(x):
    """A tensor, or a tuple or list of such, on the meta device, where tensors have shapes but no numbers and mixing devices is an error, as on a GPU."""
    if isinstance(x, (tuple, list)):
        return type(x)(*map(elsewhere, x)) if hasattr(x, "_fields") else type(x)(map(elsewhere, x))
    return x.to("meta") if torch.is_tensor(x) else x


@pytest.mark.parametrize("algo", list(baselines.METHODS))
def test_fl_no_method_leaves_anything_on_the_cpu(algo, bundled):
    fed = vision(algo, bundled, begin=3, augment=True, man=0.1, clip=1.0, weight_decay=0.01)
    method, w, clients = fed.method, elsewhere(fed.w), fed.clients(3)
    with pytest.raises(RuntimeError, match="device"):
        fed.at_once(lambda w, plan: (method.grad(w, plan[0]),), elsewhere(fed.w.expand(4, -1)), elsewhere(fed.plans(clients, 3)))      # the images are still here
    for owner in (method, fed.task):
        for name, value in vars(owner).items():
            setattr(owner, name, value if name == "parts" else elsewhere(value))              # which image is whose: the server's list
    rows = elsewhere(torch.zeros(4, method.memory + method.surveys, len(w), dtype=f64))
    if algo != "oracle":                                                                      # looks for images of each class, anew in each round
        method.receive(w, method.broadcast(w)[1:])
    job = lambda own, plan: loop.local_training(method, w, own[:method.memory], plan, 0.1, own[method.memory:])                 # noqa: E731
    plans = fed.plans(clients, 3)
    sent, kept = fed.at_once(job, rows, plans)
    once = job(rows[0], plans[0]) + (method.server(w, sent.mean(0), 3.0, 0.1), method.remember(kept[0], sent[0]))
    asked = [method.survey(w, fed.task.everything(0))] if method.surveys else []
    assert {x.device.type for x in (sent, kept, *once, *asked)} == {"meta"} and sent.shape == (4, method.uplinks, len(w))


@pytest.mark.parametrize("model", ["convnet", "resnet18"])
def test_fl_vmap_trains_the_large_networks_too(model, bundled):
    a, b = (vision("fedsam", bundled, torch.float32, model=model, man=0.1, clients=2, participation=2, local_steps=1, batch=2, chunk=c, begin=1) for c in (1, 2))
    assert torch.allclose(a.w, b.w, rtol=1e-3, atol=1e-5) and not torch.equal(a.w, a.task.w0)


@pytest.mark.parametrize("model", models.MODELS[:-1])
def test_fl_bfloat16_is_for_the_gradients_and_keeps_what_is_smaller_than_its_steps(model, bundled):
    kw = {"model": model, "man": 0.1, "clients": 2, "participation": 2, "local_steps": 2, "batch": 4, "lr": 1e-4}
    plain, half, at_once = (vision("fedavg", bundled, torch.float32, begin=1, bf16=b, chunk=c, **kw) for b, c in ((False, 1), (True, 1), (True, 2)))
    moves = [fed.w - fed.task.w0 for fed in (plain, half, at_once)]
    assert half.w.dtype == torch.float32 and (moves[0] - moves[1]).norm() < 0.1 * moves[0].norm() and (moves[1] - moves[2]).norm() < 0.1 * moves[0].norm()
    assert 1e-4 < (moves[0] - moves[1]).norm() / moves[0].norm()                     # it really was rounded
    at_rest = half.task.w0.bfloat16()
    assert (at_rest + moves[1].bfloat16() == at_rest).float().mean() > 0.5           # in bfloat16 most of the weights would not have moved
    assert tasks.evaluate(half.task.apply, half.w, half.task.train)[0] == pytest.approx(tasks.evaluate(plain.task.apply, plain.w, plain.task.train)[0], rel=1e-3)


def test_fl_bfloat16_is_for_resnet18_too(bundled):
    plain, half = (vision("fedavg", bundled, torch.float32, model="resnet18", bf16=b, batch=1) for b in (False, True))
    rows = plain.plans([0], 0)[0][0]
    g, rounded = plain.method.grad(plain.w, rows), half.method.grad(half.w, rows)
    assert rounded.dtype == torch.float32 and 1e-4 < (g - rounded).norm() / g.norm() < 0.2


def test_fl_clients_with_fewer_steps_wait(bundled):
    fed = vision("fedavg", bundled, local_epochs=1, partition="dirichlet-class", min_size=2, participation=6, weight_decay=0.1)
    plans = fed.plans(range(6), 0)
    assert len({len(p) for p in plans}) > 1                                          # really unequal
    padded = F.pad(plans[0], (0, 0, 0, 0, 0, 5), value=-1)
    ends = [loop.local_training(fed.method, fed.w, fed.w.new_zeros(0, len(fed.w)), p, 0.1)[0] for p in (plans[0], padded)]
    assert torch.equal(*ends)                                                        # not even weight decay acts on padding


def test_fl_number_of_workers_changes_nothing(bundled):
    feds = [vision("fedsam", bundled, torch.float32, compressor=QSGD(7), model="cnn") for _ in range(2)]
    feds[1].pool = loop.ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    for fed in feds:
        fed.round()
    assert torch.equal(feds[0].w, feds[1].w)


def test_fl_compiled_steps_give_the_same_numbers(bundled, monkeypatch):
    compiled, compiler = [], torch.compile                                            # without the C++ behind it, which takes half a minute
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled.append(f) or compiler(f, backend="aot_eager", **kw))
    plain, fused = (vision("fedsynsam", bundled, compile=c, weight_decay=1e-3) for c in (False, True))
    for _ in range(4):
        plain.round(), fused.round()
    assert compiled == [loop.local_step] and torch.allclose(plain.w, fused.w, rtol=0, atol=1e-10)


def test_fl_a_chunk_that_does_not_fit_into_memory_is_halved(bundled, monkeypatch):
    whole, tried = vision("fedsam", bundled, chunk=4, begin=1), []
    at_once = loop.Federation.at_once

    def small_memory(self, job, rows, plans):
        tried.append(len(plans))
        if len(plans) > 1:
            raise torch.OutOfMemoryError("the GPU is full")
        return at_once(self, job, rows, plans)
    monkeypatch.setattr(loop.Federation, "at_once", small_memory)
    assert torch.allclose(vision("fedsam", bundled, chunk=4, begin=1).w, whole.w, rtol=1e-9, atol=1e-11) and tried == [4, 2, 1, 1, 1, 1]
    monkeypatch.setattr(loop.Federation, "at_once", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("not even one")))
    with pytest.raises(torch.OutOfMemoryError):
        vision("fedsam", bundled, chunk=2, begin=1)


def test_fl_memory_in_a_file_is_memory(tmp_path):
    tables = [memory.Memory(2, torch.zeros(5, dtype=f64), file) for file in (None, tmp_path / "memory.bin")]
    for k, clients in enumerate(([3, 8], [8, 1], [0, 3, 99], list(range(20)))):
        for m in tables:
            m.write(clients, k + torch.arange(10.0 * len(clients), dtype=f64).view(-1, 2, 5))
    default = torch.full((2, 5), 7.0, dtype=f64)
    assert torch.equal(*(m.read([99, 50, 1, 8, 19], default) for m in tables)) and (tables[0].read([50], default) == 7).all()
    assert (tmp_path / "memory.bin").stat().st_size == len(tables[1].slot) * 2 * 5 * 8                 # clients never seen cost nothing
    other = memory.Memory(2, torch.zeros(5, dtype=f64), tmp_path / "other.bin")
    other.restore(tables[0].table, dict(tables[0].slot))
    assert torch.equal(*(m.read([99, 1], default) for m in (other, tables[0])))


def test_fl_evaluation_in_chunks_and_threads_is_the_whole(bundled):
    fed = vision("fedavg", bundled, begin=1)
    x, y, _ = next(fed.task.train.chunks(240))
    scores = fed.task.apply(fed.w, x)
    for each in (map, fed.pool.map):
        loss, accuracy = tasks.evaluate(fed.task.apply, fed.w, fed.task.train, chunk=50, each=each)
        assert loss == pytest.approx(float(F.cross_entropy(scores, y))) and accuracy == float((scores.argmax(1) == y).double().mean())


def test_fl_average_by_size_weighs_clients():
    task = Quadratics(3, sizes=[1, 2, 5])
    fed = quad(task, "fedavg", rounds=0)
    deltas = list(fed.each_client(task.w0, torch.zeros(3, 0, 6, dtype=f64), fed.plans(range(3), 0), 0, lambda c, sent, kept: sent[0]))
    assert torch.allclose(quad(task, "fedavg", average="size").w - task.w0, sum(n * d for n, d in zip((1, 2, 5), deltas)) / 8, rtol=1e-12)
    assert torch.allclose(quad(task, "fedavg").w - task.w0, sum(deltas) / 3, rtol=1e-12)
    assert torch.allclose(quad(task, "fedavg", server_lr=0.5).w - task.w0, sum(deltas) / 6, rtol=1e-12)


def test_fl_learning_rate_decays_per_round():
    fed = quad(Quadratics(steps=1), "fedavg", rounds=2, lr_decay=0.5)
    w = fed.task.w0
    for lr in (0.1, 0.05):
        w = w - lr * torch.stack([fed.task.gradient(i, w) for i in range(8)]).mean(0)
    assert torch.allclose(fed.w, w, rtol=1e-12)


def test_fl_bytes_are_the_lengths_of_what_was_sent(bundled):
    fed = vision("fedlesam-server", bundled, torch.float32, compressor=TopK(50), begin=3)
    d = len(fed.w)
    assert fed.up == 3 * 4 * (4 + math.ceil(50 * (32 + math.ceil(math.log2(d))) / 8))
    assert fed.down == 3 * 4 * 2 * (4 * d + 4)                                       # w and the last move


def test_fl_many_compressed_rounds_average_to_the_uncompressed_one():
    exact = quad(Quadratics(), "fedavg").w
    fed, ends = quad(Quadratics(), "fedavg", QSGD(2, "l2", 0, f64), rounds=0), []
    for seed in range(300):
        fed.cfg, fed.t, fed.w = dataclasses.replace(fed.cfg, seed=seed), 0, fed.task.w0
        fed.round()
        ends.append(fed.w)
    ends = torch.stack(ends)
    assert ((ends.mean(0) - exact).abs() <= 4.5 * ends.std(0) / 300**0.5).all() and ends.std(0).min() > 0


def test_fl_unbiased_compression_reaches_a_neighbourhood_that_shrinks_with_the_step():
    """Strongly convex quadratics, K = 1, full gradients: only the compressor is random."""
    def distance(lr, levels):
        task = Quadratics(steps=1)
        fed, tail = quad(task, "fedavg", QSGD(levels, "l2", 0, f64), rounds=int(6 / lr), lr=lr), []
        for _ in range(120):
            fed.round()
            tail.append(float((fed.w - task.best).square().sum()))
        return np.mean(tail)
    start = float((Quadratics().w0 - Quadratics().best).square().sum())
    coarse, small_step, fine = distance(0.2, 1), distance(0.05, 1), distance(0.2, 4)
    assert coarse < 0.2 * start and small_step < 0.5 * coarse and fine < 0.5 * coarse


def test_fl_topk_stalls_without_error_feedback_and_converges_with_it():
    def distance(feedback):
        task = Quadratics(n=3, d=6, steps=1)
        fed = quad(task, "fedavg", TopK(1, f64), rounds=600, lr=0.02, error_feedback=feedback)
        return float((fed.w - task.best).norm()), float((task.w0 - task.best).norm())
    (without, start), (with_it, _) = distance(False), distance(True)
    assert without > 0.2 * start and with_it < 0.2 * without, (start, without, with_it)


def test_fl_residuals_of_inactive_clients_stay_frozen():
    fed = quad(Quadratics(n=6), "fedavg", TopK(1, f64), participation=2, rounds=0, error_feedback=True)
    for t in range(10):
        before = {i: fed.memory.read([i], None)[0] for i in fed.memory.slot}
        fed.round()
        for i, row in before.items():
            assert torch.equal(fed.memory.read([i], None)[0], row) == (i not in fed.clients(t))


def test_fl_fedsynth_with_the_clients_own_batches_replays_its_update_exactly(bundled):
    """M = K batches, a = eta, hard labels: what the server makes of the buffer is what FedAvg's client would have sent."""
    fed = vision("fedsynth", bundled, model="cnn", clip=0.0, lr=0.1, local_steps=4, batch=8, fs_batches=4, fs_images=8, fs_objective="update")
    clients = fed.clients(0)
    for i, plan in zip(clients, fed.plans(clients, 0)):
        (delta,), _ = loop.local_training(fed.method, fed.w, fed.w.new_zeros(0, len(fed.w)), plan, 0.1)
        batches = [fed.task.train.batch(rows) for rows in plan]
        own = synth.Synthetic(torch.stack([b.x for b in batches]), torch.stack([1e3 * F.one_hot(b.y, 10).to(f64) for b in batches]), torch.tensor(0.1, dtype=f64))
        buffer = fed.method.codec(None, fed.w, plan).pack(own)
        assert len(buffer) == 8 * (4 * 8 * (28 * 28 + 10) + 1) + 4                   # float64 on this wire
        x_hat = fed.method.codec(None, fed.w).decode(buffer, len(delta))             # the server has no plan
        assert delta.norm() > 0.01 and torch.allclose(x_hat, delta, rtol=0, atol=1e-14)
        swapped = own._replace(images=own.images.flip(0), logits=own.logits.flip(0))
        assert not torch.allclose(fed.method.codec(None, fed.w).decode(fed.method.codec(None, fed.w).pack(swapped), len(delta)), delta, atol=1e-6)


@pytest.mark.parametrize("objective", ["data", "update"])
def test_fl_fedsynth_server_needs_the_buffer_and_the_model_alone(objective, bundled, monkeypatch):
    """Buffers are taken off the wire; a server elsewhere, with other seeds and other data, makes the same model of them."""
    fed, buffers, encode = vision("fedsynth", bundled, fs_objective=objective, fs_format="uint8"), [], synth.AsData.encode
    fed.pool, codecs, w = loop.ThreadPoolExecutor(1), [], fed.w
    monkeypatch.setattr(synth.AsData, "encode", lambda self, x, g: codecs.append(self) or buffers.append(encode(self, x, g)) or buffers[-1])
    fed.round()
    for codec, plan in zip(codecs, fed.plans(fed.clients(0), 0)):                    # each client learns from its own batches, in turn
        assert torch.equal(codec.first, fed.task.train.y[plan[0, :4, 0]])
        assert objective == "update" or all(torch.equal(codec.real(w, s), fed.task.loss(w, plan[s % 3])) for s in range(5))
    other = vision("fedsynth", bundled, fs_objective=objective, fs_format="uint8", partition="shards", lr=0.7, fs_steps=50)
    mean = sum(other.method.codec(None, w).decode(b, len(w)) for b in buffers) / len(buffers)
    assert torch.allclose(fed.w, w + mean, rtol=0, atol=1e-12) and not torch.equal(fed.w, w)
    assert fed.up == sum(map(len, buffers)) == 4 * (2 * 2 * 784 + 16 + 8 * (1 + 2 * 2 * 10) + 4)
    unequal = vision("fedsynth", bundled, fs_objective=objective, local_epochs=1, partition="dirichlet-class", min_size=2, begin=2)
    assert unequal.w.isfinite().all() and not torch.equal(unequal.w, unequal.task.w0)


def test_fl_fedsynth_learns_above_chance_and_without_local_steps(bundled):
    kw = {"clients": 4, "participation": 4, "alpha": 100.0, "hidden": 16, "batch": 20, "fs_images": 10, "fs_steps": 15, "fs_step": 0.3, "lr": 0.2,
          "dtype": torch.float32}
    for objective in ("data", "update"):
        fed = vision("fedsynth", bundled, begin=4, local_steps=10, fs_objective=objective, **kw)
        assert tasks.evaluate(fed.task.apply, fed.w, bundled.val)[1] > 0.3, objective
    calls, fed.method.grad_of = [], lambda loss, w: calls.append(1)
    data_only = vision("fedsynth", bundled, **kw)
    data_only.method.grad_of = fed.method.grad_of
    data_only.round()
    assert not calls


def test_fl_fedsynth_names_round_and_client_when_learning_fails(bundled):
    fed = vision("fedsynth", bundled)
    fed.task.loss = lambda w, rows: w.sum() * math.nan
    with pytest.raises(loop.Diverged, match=r"round 1, client \d.*fs_step"):
        fed.round()


def test_fl_fedsynth_trains_on_colour_images_and_continues_with_its_residuals(tmp_path):
    n = 60
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    images = data.Images(x, torch.arange(n) % 4, torch.full((3,), 128.0), torch.full((3,), 60.0), list(range(4)))
    cfg = config.Config(algo="fedsynth", model="mlp", clients=3, participation=3, local_steps=2, batch=4, fs_objective="update", error_feedback=True,
                        fs_steps=3, fs_batches=2, fs_images=2).check()
    task = tasks.Task(models.build("mlp", (3, 8, 8), 4, hidden=4), images, list(torch.arange(n).split(20)), cfg)
    fed, resumed = (loop.Federation(fedsynsam.FedSynth(task, cfg)) for _ in range(2))
    fed.round()
    experiment.save(tmp_path, fed, 1.0, 0)
    experiment.restore(tmp_path, resumed)
    assert fed.up == 3 * (2 * 2 * 3 * 64 + 8 + 4 * (1 + 2 * 2 * 4) + 4) and fed.memory.table.any()
    for f in (fed, resumed):
        f.round()
    assert torch.equal(fed.w, resumed.w) and torch.equal(fed.memory.table, resumed.memory.table)


def test_fl_divergence_names_round_client_and_cause():
    with pytest.raises(loop.Diverged, match=r"round \d+, client \d.*lr = 1e\+200"):
        quad(Quadratics(), "fedavg", rounds=50, lr=1e200)


def test_fl_alignment_is_one_where_the_estimate_is_the_truth(bundled):
    fed = vision("fedsynsam", bundled, begin=3, clients=1, participation=1, local_steps=1, batch=240)
    train, rows = fed.task.train, torch.arange(240)
    everything = (train.x.double() - train.mean[:, None, None]) / train.std[:, None, None]
    fed.method.synthetic = synth.Synthetic(everything, 1e3 * F.one_hot(train.y, 10).double(), None)
    a = sharpness.alignment(fed, rows)
    assert a.own == pytest.approx(1) and a.synthetic == pytest.approx(1) and a.mixed == pytest.approx(1) and -1 <= a.last_move < 1
    assert math.isnan(sharpness.alignment(vision("fedavg", bundled, begin=1), rows).synthetic)


# ------------------------------------------------------------------------------------------------------------- align
ALIGNED = list(align.METHODS)
UNEVEN = {"local_epochs": 1, "partition": "dirichlet-class", "min_size": 2, "participation": 3}               # clients of unequal length


def asked(fed, clients, w=None):
    """What the clients of the coming round say to the survey, and v_i [d] of each."""
    w, method = fed.w if w is None else w, fed.method
    method.receive(w, method.broadcast(w)[1:])
    said = w.new_zeros(len(clients), 0, len(w))
    if method.surveys:
        said = torch.stack([x for x, _ in fed.answers(w, clients, fed.t)])
        fed.announce(said, clients)
    rows = fed.recall(clients, w)
    return said, torch.stack([method.displacement(fl.Client(w, m, s)) for m, s in zip(rows, said)])


def test_align_full_gradient_runs_over_all_images_of_a_client_once(bundled):
    fed = vision("fedga", bundled, **UNEVEN)
    train, net = fed.task.train, models.mlp_module(1, 28, 28, 10, 8).double()
    assert len({len(fed.task.everything(i)) for i in range(6)}) > 1 and any(len(p) % 8 for p in fed.task.parts)      # unequal, and padded
    for i, mine in enumerate(fed.task.parts):
        nn.utils.vector_to_parameters(fed.w, net.parameters())
        loss = F.cross_entropy(net((train.x[mine].double() - train.mean) / train.std), train.y[mine])
        true = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        assert torch.allclose(fed.method.survey(fed.w, fed.task.everything(i))[0], true, rtol=1e-10, atol=1e-13)
        padded = F.pad(fed.task.everything(i), (0, 0, 0, 0, 0, 2), value=-1)
        assert torch.allclose(fed.method.survey(fed.w, padded)[0], true, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("average", ["uniform", "size"])
@pytest.mark.parametrize("compressor", [Identity(f64), QSGD(1, "max", 64, f64), TopK(50, f64)], ids=str)
def test_align_displacements_cancel(average, compressor, bundled):
    """Weighted as the mean over clients is, with every compressor: they are made of what was decoded."""
    fed = vision("fedga", bundled, compressor=compressor, begin=1, beta=0.3, average=average, **UNEVEN)
    said, v = asked(fed, fed.clients(1))
    p = fed.weights(fed.clients(1))
    assert float(p.sum()) == pytest.approx(1) and (len(set(p.tolist())) > 1) == (average == "size")
    assert (p @ v).norm() < 1e-12 * v.norm() and v.norm() > 1e-3
    exact = torch.stack([fed.method.survey(fed.w, fed.task.everything(i))[0] for i in fed.clients(1)])
    assert torch.allclose(said[:, 0], exact, rtol=1e-9, atol=1e-12) == isinstance(compressor, Identity)


def test_align_previous_displacements_cancel_at_full_participation():
    for compressor in (Identity(f64), QSGD(1, "max", 4, f64)):
        fed = quad(Quadratics(), "fedga-previous", compressor, rounds=4, beta=0.2)
        _, v = asked(fed, range(8))
        assert v.sum(0).norm() < 1e-12 * v.norm() and v.norm() > 0.01
    fed = quad(Quadratics(), "fedga-previous", rounds=3, beta=0.2, participation=2)
    new = next(i for i in range(8) if i not in fed.memory.slot)
    _, v = asked(fed, [new, next(iter(fed.memory.slot))])
    assert v[0].norm() == 0 and v[1].norm() > 0.01                                   # never active: not displaced


@pytest.mark.parametrize("algo", ALIGNED)
def test_align_without_beta_is_fedavg_bit_for_bit(algo, bundled):
    for kw in ({}, {"compressor": QSGD(7, "max", 64), "weight_decay": 0.1}, {"compressor": TopK(50), "error_feedback": True, "average": "size"}, {"chunk": 3}):
        pair = [vision(a, bundled, torch.float32, begin=4, beta=0.0, **kw) for a in (algo, "fedavg")]
        assert torch.equal(pair[0].w, pair[1].w)
    assert not torch.equal(vision(algo, bundled, torch.float32, begin=4, beta=0.3).w, vision("fedavg", bundled, torch.float32, begin=4).w)


def test_align_fedga_is_gradalign(bundled):
    """K = 1: the paper's identity. K > 1 with v_i held: w_k + v_i = y_k, so for every K, unless weight decay tells w and y apart."""
    ends = lambda **kw: [vision(a, bundled, begin=3, beta=0.3, clip=0.5, **kw).w for a in ("gradalign", "fedga")]       # noqa: E731
    for kw in ({"local_steps": 1}, {"local_steps": 5}, {"average": "size", **UNEVEN}):
        a, b = ends(**kw)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
    a, b = ends(local_steps=5, weight_decay=0.1)
    assert 1e-8 < (a - b).norm() < 1e-2


def test_align_on_quadratics_one_step_descends_the_loss_and_its_variance():
    """mean g_i(w + v_i) = grad f + beta grad r exactly, for every beta; r by its definition, grad r by central differences."""
    task, e = Quadratics(steps=1), torch.eye(6, dtype=f64)

    def r(w):
        g = [task.gradient(i, w) for i in range(8)]
        return sum((g_i - sum(g) / 8).square().sum() for g_i in g) / 16
    grad_r = torch.stack([(r(task.w0 + 1e-4 * x) - r(task.w0 - 1e-4 * x)) / 2e-4 for x in e])
    grad_f = torch.stack([task.gradient(i, task.w0) for i in range(8)]).mean(0)
    for beta in (0.01, 0.5, 20.0):
        for algo in ("gradalign", "fedga"):
            fed = quad(task, algo, beta=beta)
            assert torch.allclose((task.w0 - fed.w) / 0.1, grad_f + beta * grad_r, rtol=1e-7, atol=1e-9)
            assert fed.report["gradient_variance"] == pytest.approx(float(r(task.w0)), rel=1e-12)


def test_align_on_a_network_the_error_is_of_first_order_in_beta(bundled):
    """A smooth one: where ReLU has its kinks a gradient jumps, and no derivative knows of it."""
    fed = vision("gradalign", bundled, participation=6, local_steps=1, beta=0.1)

    def smooth(w, x):
        W1, b1, W2, b2 = w.split([6272, 8, 80, 10])
        return torch.tanh(x.flatten(1) @ W1.view(784, 8) / 28 + b1) @ W2.view(8, 10) + b2
    fed.task.apply = smooth
    rows = [fed.task.everything(i) for i in range(6)]
    gradients = lambda w: torch.stack([fed.method.survey(w, x)[0] for x in rows])                                # noqa: E731
    w = fed.w.clone().requires_grad_()
    g = [sum((x[:, 0] >= 0).sum() * torch.autograd.grad(fed.task.loss(w, x), w, create_graph=True)[0] for x in b) / (b[..., 0] >= 0).sum() for b in rows]
    r = sum((g_i - sum(g) / 6).square().sum() for g_i in g) / 12
    grad_r, = torch.autograd.grad(r, w)
    assert float(align.gradient_variance(gradients(fed.w), torch.full((6,), 1 / 6, dtype=f64))) == pytest.approx(float(r.detach()))
    errors = []
    for beta in (1e-2, 1e-3, 1e-4):
        fed.method.cfg = dataclasses.replace(fed.cfg, beta=beta)
        _, v = asked(fed, range(6))
        displaced = torch.stack([fed.method.survey(fed.w + v_i, x)[0] for v_i, x in zip(v, rows)])
        errors.append(float(((displaced - gradients(fed.w)).mean(0) / beta - grad_r).norm() / grad_r.norm()))
    assert errors[0] < 0.2 and errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1], errors


def test_align_makes_the_clients_agree():
    """Of two models with about the same loss, GradAlign's is the one where the gradients differ less."""
    task = Quadratics(n=4, d=4, steps=1)
    ends = {beta: quad(task, "gradalign", rounds=100, beta=beta) for beta in (0.0, 0.02, 0.1)}
    r = [fed.report["gradient_variance"] for fed in ends.values()]
    f = [float(torch.stack([task.loss(fed.w, torch.tensor([[i]])) for i in range(4)]).mean()) for fed in ends.values()]
    assert r[0] > r[1] > r[2] and f[0] < f[1] < f[2]                                 # alignment is bought with loss


def aligned_oracle(algo, fed, grad, full, rounds):
    """Fresh and previous once more, as slow loops; grad(i, w, rows), full(i, w) -> [d]. -> (w, r of each round)."""
    cfg, w, said = fed.cfg, fed.task.w0, []
    own, g = {}, torch.zeros_like(w)
    for t in range(rounds):
        active, eta, ends, K = fed.clients(t), cfg.lr * cfg.lr_decay**t, {}, {}
        p = {i: fed.task.sizes[i] / sum(fed.task.sizes[j] for j in active) if cfg.average == "size" else 1 / len(active) for i in active}
        if algo != "fedga-previous":
            own = {i: full(i, w) for i in active}
            g = sum(p[i] * own[i] for i in active)
            said.append(sum(p[i] * (own[i] - g).square().sum() / 2 for i in active))
        for i, plan in zip(active, fed.plans(active, t)):
            v = cfg.beta * (own.get(i, g) - g)
            y = w if algo == "gradalign" else w + v
            for rows in plan:
                G = grad(i, y + v if algo == "gradalign" else y, rows)
                y = y - eta * (G + cfg.weight_decay * y)
            ends[i], K[i] = y - w - (0 if algo == "gradalign" else v), len(plan)
        mean = sum(p[i] * ends[i] for i in active)
        if algo == "fedga-previous":
            own |= {i: -ends[i] / (K[i] * eta) for i in active}
            g = -mean / (eta * sum(p[i] * K[i] for i in active))
            centre = sum(p[i] * own[i] for i in active)
            said.append(sum(p[i] * (own[i] - centre).square().sum() / 2 for i in active))
        w = w + cfg.server_lr * mean
    return w, own, g, [float(r) for r in said]


ALIGN_KNOBS = {"beta": 0.2, "clip": 0.0, "server_lr": 0.7, "lr_decay": 0.8, "weight_decay": 0.01}


def agrees_with_aligned_oracle(algo, fed, grad, full):
    w, own, g, said = aligned_oracle(algo, fed, grad, full, 6)
    for r in said:
        fed.round()
        assert fed.report == {"gradient_variance": pytest.approx(r, rel=1e-9)}
    assert torch.allclose(fed.w, w, rtol=1e-11, atol=1e-12) and (fed.w - fed.task.w0).norm() > 1e-2
    if algo == "fedga-previous":
        assert torch.allclose(fed.method.g, g, rtol=1e-10, atol=1e-12) and len(fed.memory.slot) > fed.cfg.participation
        assert all(torch.allclose(fed.memory.read([i], None)[0, 0], row, rtol=1e-10, atol=1e-12) for i, row in own.items())


@pytest.mark.parametrize("algo", ALIGNED)
def test_align_equals_slow_loops_on_quadratics(algo):
    for average in ("uniform", "size"):
        fed = quad(Quadratics(sizes=[1, 2, 3, 4, 5, 6, 7, 8]), algo, rounds=0, participation=3, average=average, **ALIGN_KNOBS)
        agrees_with_aligned_oracle(algo, fed, lambda i, w, rows: fed.task.gradient(i, w), lambda i, w: fed.task.gradient(i, w))


@pytest.mark.parametrize("algo", ALIGNED)
def test_align_equals_slow_loops_on_a_network_with_unequal_clients(algo, bundled):
    for chunk, average in ((1, "size"), (2, "uniform")):
        fed = vision(algo, bundled, chunk=chunk, average=average, **ALIGN_KNOBS, **UNEVEN)
        net, train = models.mlp_module(1, 28, 28, 10, 8).double(), fed.task.train

        def full(i, w, numbers=None):
            nn.utils.vector_to_parameters(w, net.parameters())
            numbers = fed.task.parts[i] if numbers is None else numbers
            loss = F.cross_entropy(net((train.x[numbers].double() - train.mean) / train.std), train.y[numbers])
            return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        agrees_with_aligned_oracle(algo, fed, lambda i, w, rows: full(i, w, rows[rows[:, 0] >= 0, 0]), full)


def test_align_error_feedback_leaves_the_survey_alone():
    plain, fed = (quad(Quadratics(), "fedga", TopK(2, f64), rounds=0, error_feedback=b, beta=0.2) for b in (False, True))
    for _ in range(3):
        fed.round()
    plain.t, plain.w = fed.t, fed.w
    assert fed.memory.table.shape == (8, 1, 6) and fed.memory.table.norm() > 0       # one residual, of the update
    assert torch.equal(asked(plain, range(8))[0], asked(fed, range(8))[0])


def test_align_a_survey_that_is_not_finite_names_the_client():
    fed = quad(Quadratics(), "fedga", rounds=0)
    fed.w = torch.full_like(fed.w, 1e308)
    with pytest.raises(loop.Diverged, match=r"round 1, client \d.*1e\+308"):
        fed.round()


# --------------------------------------------------------------------------------------------------------- baselines
TWELVE = ["fedprox", "scaffold", "feddyn", "fedcm", "fedadam", "mofedsam", "fedgamma", "fedspeed", "fedsmoo", "fedlesam-s", "fedlesam-d", "fedasam"]
WITH_C, WITH_H = ("scaffold", "fedgamma", "fedlesam-s"), ("feddyn", "fedspeed", "fedsmoo", "fedlesam-d")      # c_i, c and h_i, h
WITH_ORACLE = [*TWELVE, "gcsam"]


def slow_centralised(g, shapes):
    """Each unit's incoming weights minus their mean, one unit after the other."""
    g, at = g.clone(), 0
    for shape in shapes:
        for _ in range(shape[0]):
            n = math.prod(shape[1:])
            if len(shape) > 1:
                g[at:at + n] -= g[at:at + n].sum() / n
            at += n
    assert at == len(g)
    return g


def oracle(algo, fed, grad, biases, rounds):
    """The equations once more, as slow loops over rounds, clients and steps with one list per symbol.

    grad(i, w, rows) -> [d]; nothing of fl.py, baselines.py, sam.py is used, and c, h are means over all N clients by definition.
    """
    cfg, N, w, zero = fed.cfg, fed.cfg.clients, fed.task.w0, torch.zeros_like(fed.task.w0)
    c_i, h_i, mu_i, old, m, v, s = [zero] * N, [zero] * N, [zero] * N, [zero] * N, zero, zero, zero
    seen = set()
    for t in range(rounds):
        active, eta, c, D, K = fed.clients(t), cfg.lr * cfg.lr_decay**t, sum(c_i) / N, {}, {}
        for i, plan in zip(active, fed.plans(active, t)):
            x = w
            for rows in plan:
                u, T, longer = grad(i, x, rows), torch.ones_like(w), 1
                if algo in ("fedprox", "scaffold", "feddyn", "fedcm", "fedadam"):
                    u = zero
                elif "lesam" in algo:
                    u = old[i] - w if i in seen else zero
                elif algo == "fedsmoo":
                    u = u - mu_i[i] - s
                elif algo == "fedasam":
                    T = torch.where(biases, 1.0, x.abs() + cfg.asam_eta)
                elif algo == "gcsam":
                    g, u = u, slow_centralised(u, fed.task.shapes)
                    longer = g.norm() / u.norm() if cfg.gc_code else 1               # the code divides by the norm of all of g
                eps = cfg.rho * T * T * u / (T * u).norm() / longer if u.norm() > 0 else zero
                G, decay = grad(i, x + eps, rows), cfg.weight_decay
                if algo == "gcsam" and not cfg.gc_code:
                    G = slow_centralised(G, fed.task.shapes)
                if algo in ("fedprox", *WITH_H) and cfg.prox_clip:
                    G = G + cfg.prox * (x - w + h_i[i])
                elif algo in ("fedprox", *WITH_H):
                    G, decay = G + cfg.prox * (h_i[i] - w), decay + cfg.prox
                elif algo in WITH_C:
                    G = G + cfg.variate * (c - c_i[i])
                elif algo in ("fedcm", "mofedsam"):
                    G = cfg.momentum_alpha * G + (1 - cfg.momentum_alpha) * m
                if cfg.clip and G.norm() > cfg.clip:
                    G = G * cfg.clip / G.norm()
                x = x - eta * (G + decay * x)
                mu_i[i] = mu_i[i] + eps - s
            D[i], K[i] = x - w, len(plan)
        mean = sum(D.values()) / len(D)
        for i in active:
            c_i[i], old[i] = c_i[i] - c - D[i] / (K[i] * eta), w
            h_i[i] = h_i[i] + D[i] if algo in WITH_H else zero
        seen |= set(active)
        if algo == "fedsmoo":
            s = sum(mu_i[i] for i in active)
            s = cfg.rho * s / s.norm()
        if algo in ("fedcm", "mofedsam"):
            m = -mean / (eta * sum(K.values()) / len(K))
        if algo == "fedadam":
            m, v = cfg.adam_b1 * m + (1 - cfg.adam_b1) * mean, cfg.adam_b2 * v + (1 - cfg.adam_b2) * mean**2
            w = w + cfg.adam_lr * m / (v.sqrt() + cfg.adam_eps)
        else:
            w = w + (mean + sum(h_i) / N if algo in WITH_H else cfg.server_lr * mean)
    rows = [c_i] * (algo in WITH_C) + [h_i] * (algo in WITH_H) + [mu_i] * (algo == "fedsmoo") + [old] * ("lesam" in algo)
    return w, rows, {"c": sum(c_i) / N, "h": sum(h_i) / N, "m": m, "v": v, "s": s}


def agrees_with_oracle(algo, fed, grad, biases, rounds=6):
    """Model, every row of every client's memory, and the server's vectors, to 1e-12."""
    w, rows, state = oracle(algo, fed, grad, biases, rounds)
    for _ in range(rounds):
        fed.round()
    near = lambda a, b: torch.allclose(a, b, rtol=1e-12, atol=1e-12)                                             # noqa: E731
    assert near(fed.w, w) and (fed.w - fed.task.w0).norm() > 1e-3, float((fed.w - w).norm())
    assert fed.method.memory == len(rows) and (not rows or len(fed.memory.slot) > fed.cfg.participation)          # clients came and went
    for i in fed.memory.slot:
        assert all(near(mine, row[i]) for mine, row in zip(fed.memory.read([i], None)[0], rows)), i
    assert all(near(getattr(fed.method, k), v) for k, v in state.items() if hasattr(fed.method, k))


KNOBS = {"rho": 0.05, "prox": 0.3, "variate": 0.8, "momentum_alpha": 0.4, "adam_eps": 0.1, "adam_lr": 0.6, "server_lr": 0.7, "lr_decay": 0.8, "weight_decay": 0.01}


@pytest.mark.parametrize("algo", WITH_ORACLE)
def test_baselines_equal_slow_loops_on_quadratics(algo):
    for clip in (0.0, 1.0):
        fed = quad(Quadratics(), algo, rounds=0, participation=3, clip=clip, gc_code=clip > 0, **KNOBS)
        agrees_with_oracle(algo, fed, lambda i, w, rows: fed.task.gradient(i, w), torch.zeros(6, dtype=bool))


@pytest.mark.parametrize("algo", WITH_ORACLE)
def test_baselines_equal_slow_loops_on_a_network_with_unequal_clients(algo, bundled):
    """nn.Module and autograd, batches without padding; one by one and under vmap, where short clients wait for long ones."""
    for chunk, prox_clip in ((1, True), (3, False)):
        fed = vision(algo, bundled, chunk=chunk, clip=0.5, prox_clip=prox_clip, gc_code=prox_clip, **KNOBS, **UNEVEN)
        net, train = models.mlp_module(1, 28, 28, 10, 8).double(), fed.task.train

        def grad(i, w, rows):
            nn.utils.vector_to_parameters(w, net.parameters())
            numbers = rows[rows[:, 0] >= 0, 0]
            loss = F.cross_entropy(net((train.x[numbers].double() - train.mean) / train.std), train.y[numbers])
            return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        biases = torch.cat([torch.full((p.numel(),), p.dim() == 1) for p in net.parameters()])
        assert len({len(p) for p in fed.plans(range(6), 0)}) > 1                     # really unequal
        agrees_with_oracle(algo, fed, grad, biases)


@pytest.mark.parametrize("algo, off, parent", [
    ("fedprox", {"prox": 0.0}, "fedavg"), ("scaffold", {"variate": 0.0}, "fedavg"), ("fedcm", {"momentum_alpha": 1.0}, "fedavg"),
    ("mofedsam", {"rho": 0.0}, "fedcm"), ("mofedsam", {"momentum_alpha": 1.0}, "fedsam"), ("fedgamma", {"rho": 0.0}, "scaffold"),
    ("fedgamma", {"variate": 0.0}, "fedsam"), ("fedspeed", {"rho": 0.0}, "feddyn"), ("fedsmoo", {"rho": 0.0}, "feddyn"),
    ("fedlesam-s", {"rho": 0.0}, "scaffold"), ("fedlesam-s", {"variate": 0.0}, "fedlesam"), ("fedlesam-d", {"rho": 0.0}, "feddyn"),
    ("fedsynsam-s", {"rho": 0.0}, "scaffold"), ("fedsynsam-s", {"variate": 0.0}, "fedsynsam"), ("fedsynsam-s", {"mix": 0.0}, "fedgamma"),
    ("fedsynsam-d", {"rho": 0.0}, "feddyn"), ("fedsynsam-d", {"mix": 0.0}, "fedspeed"),
    ("fedasam", {"rho": 0.0}, "fedavg"), ("gcsam", {"rho": 0.0, "gc_code": True}, "fedavg"), ("dynafed-adam", {"finetune_epochs": 0}, "fedavg-adam")])
def test_baselines_with_their_own_term_off_are_their_parents_bit_for_bit(algo, off, parent, bundled):
    for kw in ({}, {"compressor": QSGD(7, "max", 64)}, {"compressor": TopK(50), "error_feedback": True}):
        pair = [vision(a, bundled, torch.float32, begin=4, **kw, **off) for a in (algo, parent)]
        assert torch.equal(pair[0].w, pair[1].w)
    assert not torch.equal(vision(algo, bundled, torch.float32, begin=4).w, vision(parent, bundled, torch.float32, begin=4).w)


def test_baselines_states_that_start_at_zero_change_nothing_in_round_zero(bundled):
    first = {a: vision(a, bundled, begin=1).w for a in (*TWELVE, "fedavg", "fedsam")}
    assert torch.equal(first["scaffold"], first["fedavg"]) and torch.equal(first["fedgamma"], first["fedsam"])
    assert torch.equal(first["fedlesam-s"], first["fedavg"]) and torch.equal(first["fedlesam-d"], first["feddyn"])
    w0, N, m = vision("fedprox", bundled).w, 6, 4                                    # h_i = 0: FedDyn's clients are FedProx's
    assert torch.allclose(first["feddyn"] - w0, (1 + m / N) * (first["fedprox"] - w0), rtol=1e-10, atol=1e-15)
    one = [vision(a, bundled, begin=1, local_steps=1).w for a in ("fedsmoo", "fedspeed", "fedprox", "fedavg")]
    assert torch.equal(one[0], one[1]) and torch.equal(one[2], one[3])               # mu_i = s = 0; at w^t no spring pulls
    assert not torch.equal(first["fedsmoo"], first["fedspeed"])                      # in the second step mu_i is at work


def test_baselines_fedprox_holds_its_clients_the_tighter_the_stronger_the_spring():
    task = Quadratics(steps=200)
    moves = [float((quad(task, "fedprox", prox=p, lr=0.5 / (p + 10)).w - task.w0).norm()) for p in (0.0, 1.0, 10.0, 1000.0)]
    assert moves == sorted(moves, reverse=True) and moves[-1] < 0.02 * moves[0]
    one = Quadratics(1, steps=3000)                                                  # solved exactly: the proximal point
    point = torch.linalg.solve(one.A[0] + 2 * torch.eye(6, dtype=f64), one.A[0] @ one.c[0] + 2 * one.w0)
    assert torch.allclose(quad(one, "fedprox", prox=2.0).w, point, rtol=1e-10)


def test_baselines_prox_clip_decides_what_of_the_spring_is_clipped():
    task, p, clip = Quadratics(1, steps=2), 3.0, 0.5
    w1 = task.w0 - 0.1 * clip * task.gradient(0, task.w0) / task.gradient(0, task.w0).norm()
    g = task.gradient(0, w1) + p * (w1 - task.w0)
    whole = w1 - 0.1 * clip * g / g.norm()
    assert torch.allclose(quad(task, "fedprox", prox=p, clip=clip).w, whole, rtol=1e-12)
    v = task.w0
    for _ in range(2):
        g = task.gradient(0, v) - p * task.w0
        v = v - 0.1 * (clip * g / g.norm() + p * v)
    assert torch.allclose(quad(task, "fedprox", prox=p, clip=clip, prox_clip=False).w, v, rtol=1e-12) and not torch.allclose(v, whole)
    for algo in ("fedprox", *WITH_H):                                                # without clipping it is the same sum
        assert torch.allclose(*(quad(Quadratics(), algo, rounds=4, prox_clip=b).w for b in (True, False)), rtol=1e-9)


@pytest.mark.parametrize("algo", ["scaffold", "fedgamma"])
def test_baselines_scaffold_control_variate_is_the_mean_gradient(algo, bundled):
    """c_i' = mean over the steps of (g_k + wd w_k), whatever c and c_i were; here the sum is collected while the client walks."""
    fed = vision(algo, bundled, begin=3, clip=0.0, weight_decay=0.1, **UNEVEN)
    seen, method, clients = {}, fed.method, fed.clients(3)
    for i, plan in zip(clients, fed.plans(clients, 3)):
        method.receive(fed.w, [method.c])
        me, w, total = fl.Client(fed.w, fed.memory.read([i], fed.w.new_zeros(1, len(fed.w)))[0]), fed.w, 0
        for rows in plan:
            uphill = method.direction(w, rows, me)
            total = total + fl.FedAvg.gradient(method, w, rows, me, uphill) + 0.1 * w
            w, me = method.step(w, rows, me, 0.05, uphill)
        seen[i] = total / len(plan)
    assert method.c.norm() > 0 and fed.memory.table.norm() > 0
    fed.round()
    for i, mean in seen.items():
        assert torch.allclose(fed.memory.read([i], None)[0, 0], mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algo", [*WITH_C, *WITH_H])
@pytest.mark.parametrize("compressor, feedback", [(Identity(f64), False), (QSGD(1, "max", 4, f64), False), (TopK(2, f64), True)], ids=str)
def test_baselines_server_state_is_the_mean_of_all_clients_state(algo, compressor, feedback):
    """With every compressor: server and client add up the same decoded vectors."""
    fed = quad(Quadratics(), algo, compressor, rounds=0, participation=3, error_feedback=feedback, rho=0.05, prox=0.5)
    for _ in range(7):
        fed.round()
        rows = fed.memory.read(range(8), fed.w.new_zeros(fed.memory.table.shape[1], 6))[:, 0]
        assert torch.allclose(rows.mean(0), fed.method.c if algo in WITH_C else fed.method.h, rtol=1e-12, atol=1e-14) and rows.norm() > 0
    one = quad(Quadratics(1), "scaffold", compressor, rounds=5, error_feedback=feedback)        # one client: nothing to correct
    assert torch.allclose(one.w, quad(Quadratics(1), "fedavg", compressor, rounds=5, error_feedback=feedback).w, rtol=1e-12)


def test_baselines_scaffold_and_feddyn_reach_the_true_minimiser_where_fedavg_does_not():
    """Clients that differ, five local steps: FedAvg comes to rest beside the minimum of F."""
    task = Quadratics(n=4, d=4, steps=5, spread=3.0)
    start, rest = float((task.w0 - task.best).norm()), quad(task, "fedavg", rounds=60)
    assert rest.move.norm() < 1e-9 * start and (rest.w - task.best).norm() > 0.02 * start
    for algo, compressor, m in (("scaffold", Identity(f64), 4), ("scaffold", QSGD(4, "l2", 0, f64), 4), ("scaffold", Identity(f64), 2),
                                ("feddyn", Identity(f64), 4), ("feddyn", QSGD(4, "l2", 0, f64), 4), ("feddyn", Identity(f64), 2)):
        fed = quad(task, algo, compressor, rounds=120, prox=1.0, participation=m)
        assert (fed.w - task.best).norm() < 1e-7 * start, (algo, compressor, m, float((fed.w - task.best).norm()) / start)


@pytest.mark.parametrize("parent, vector", [(baselines.SCAFFOLD, 1), (baselines.FedDyn, 0)])
def test_baselines_a_client_that_adds_up_what_it_meant_to_send_rests_beside_the_minimum(parent, vector):
    """Why `remember` exists: under compression c_i (h_i) and the server's c (h) drift apart, and nothing ever brings them back."""
    class Own(parent):
        def finish(self, w, me, steps, lr):
            sent, memory = super().finish(w, me, steps, lr)
            return sent, memory + sent[vector]

        def remember(self, memory, decoded):
            return memory
    task = Quadratics(n=4, d=4, steps=5, spread=3.0)
    for compressor, beside in ((Identity(f64), False), (QSGD(4, "l2", 0, f64), True)):
        fed = quad(task, "fedavg", compressor, rounds=0, prox=1.0)
        fed.method, fed.memory = Own(task, fed.cfg), memory.Memory(1, task.w0)
        for _ in range(120):
            fed.round()
        assert fed.move.norm() < 1e-9 and ((fed.w - task.best).norm() > 0.01 * (task.w0 - task.best).norm()) == beside


def test_baselines_feddyn_rests_where_the_clients_gradients_cancel():
    task = Quadratics(n=4, d=4, steps=5)
    fed = quad(task, "feddyn", rounds=100, prox=2.0)
    h, gradients = fed.memory.read(range(4), None)[:, 0], torch.stack([task.gradient(i, task.best) for i in range(4)])
    assert torch.allclose(-2.0 * h, gradients, atol=1e-7) and gradients.norm() > 1 and fed.method.h.norm() < 1e-7
    exact = quad(Quadratics(n=3, d=3, steps=300), "feddyn", rounds=2, prox=2.0)      # the local problem solved to the end
    sent = list(exact.each_client(exact.w, exact.recall(range(3), exact.w), exact.plans(range(3), 2), 2, lambda c, sent, kept: sent[0]))
    for i, row in enumerate(exact.memory.read(range(3), None)[:, 0]):
        assert torch.allclose(-2.0 * (row + sent[i]), exact.task.gradient(i, exact.w + sent[i]), atol=1e-9)


def test_baselines_fedcm_momentum_is_the_last_mean_update_in_gradient_scale():
    fed, plain = (quad(Quadratics(steps=1), a, lr_decay=0.5, momentum_alpha=0.25) for a in ("fedcm", "fedavg"))
    assert torch.allclose(fed.w - fed.task.w0, 0.25 * (plain.w - fed.task.w0), rtol=1e-12)          # m_0 = 0: only shorter steps
    mean_gradient = torch.stack([fed.task.gradient(i, fed.task.w0) for i in range(8)]).mean(0)
    assert torch.allclose(fed.method.m, 0.25 * mean_gradient, rtol=1e-12)            # lr of THAT round, not of the next
    w = fed.w
    fed.round()
    step = 0.25 * torch.stack([fed.task.gradient(i, w) for i in range(8)]).mean(0) + 0.75 * 0.25 * mean_gradient
    assert torch.allclose(fed.w, w - 0.05 * step, rtol=1e-12)


def test_baselines_fedadam_steps_are_its_formula():
    task = Quadratics()
    delta = quad(task, "fedavg").w - task.w0
    fed = quad(task, "fedadam", adam_lr=0.05)
    assert torch.allclose(fed.w - task.w0, 0.05 * 0.1 * delta / (0.1 * delta.abs() + 0.01), rtol=1e-12)        # (1 - 0.99)^0.5 = 0.1
    large = quad(task, "fedadam", rounds=3, adam_lr=1e9, adam_eps=1e9, adam_b1=0.0, adam_b2=0.0)             # eps drowns sqrt(v)
    assert torch.allclose(large.w, quad(task, "fedavg", rounds=3).w, rtol=1e-8)
    sign = quad(task, "fedadam", adam_lr=0.05, adam_eps=1e-300, adam_b1=0.0, adam_b2=0.0)
    assert torch.allclose(sign.w - task.w0, 0.05 * delta.sign(), rtol=1e-9)


def test_baselines_fedsmoo_perturbations_are_of_length_rho_and_agree():
    fed = quad(Quadratics(steps=1), "fedsmoo", rho=0.3, prox=1.0)
    eps = fed.memory.read(range(8), None)[:, 1]                                      # from mu_i = s = 0: mu_i = eps after one step
    own = torch.stack([fed.task.gradient(i, fed.task.w0) for i in range(8)])
    assert torch.allclose(eps, 0.3 * own / own.norm(dim=1, keepdim=True), rtol=1e-12)
    assert torch.allclose(fed.method.s, 0.3 * eps.mean(0) / eps.mean(0).norm(), rtol=1e-12)
    for _ in range(4):
        before, s = fed.memory.read(range(8), None)[:, 1], fed.method.s
        fed.round()
        eps = fed.memory.read(range(8), None)[:, 1] - before + s                     # mu_i' = mu_i + eps - s
        assert torch.allclose(eps.norm(dim=1), torch.full((8,), 0.3, dtype=f64)) and float(fed.method.s.norm()) == pytest.approx(0.3, rel=1e-12)
    for _ in range(100):
        before, s = fed.memory.read(range(8), None)[:, 1], fed.method.s
        fed.round()
    eps, spread = fed.memory.read(range(8), None)[:, 1] - before + s, lambda e: float((e - e.mean(0)).norm())
    assert spread(eps) < 0.2 * spread(0.3 * own / own.norm(dim=1, keepdim=True))     # the clients agree with each other,
    assert sam.cosine(s, fed.method.s) < -0.99                                       # but on a sign that flips every round


def test_baselines_fedlesam_crossings_climb_back_along_the_whole_last_move():
    """At full participation that is minus the true step of the server, FedDyn's h included."""
    for algo in ("fedlesam-s", "fedlesam-d"):
        fed = quad(Quadratics(), algo, rounds=3, rho=0.1)
        for row in fed.memory.read(range(8), None):
            assert torch.allclose(fed.method.direction(None, None, fl.Client(fed.w, row)), -fed.move, rtol=1e-9)
    assert fed.method.h.norm() > 1e-3 * fed.move.norm()


def test_baselines_fedasam_scales_weights_and_not_biases(bundled):
    fed = vision("fedasam", bundled, model="cnn", rho=0.7)
    module = models.cnn_module(1, 28, 28, 10, 2, 8).double()
    assert torch.equal(fed.task.weights, models.flatten(torch.full_like(p, "weight" in n) for n, p in module.named_parameters()).bool())
    rows, w, points = fed.plans([0], 0)[0][0], fed.w, []
    fed.method.grad = lambda v, rows: points.append(v) or torch.ones_like(v)
    fed.method.gradient(w, rows, None, torch.linspace(-1, 1, len(w), dtype=f64))
    T, u = torch.where(fed.task.weights, w.abs() + 0.2, 1), torch.linspace(-1, 1, len(w), dtype=f64)
    assert torch.allclose(points[0] - w, 0.7 * T**2 * u / (T * u).norm(), atol=1e-14) and float(((points[0] - w) / T).norm()) == pytest.approx(0.7)
    ball = vision("fedasam", bundled, rho=0.05e-6, asam_eta=1e6)                     # T is nearly constant: a ball
    ball.task.weights = torch.ones_like(ball.task.weights)
    for _ in range(3):
        ball.round()
    assert torch.allclose(ball.w, vision("fedsam", bundled, begin=3, rho=0.05).w, atol=1e-6)


def test_baselines_gcsam_never_moves_the_mean_weight_into_a_unit(bundled):
    """As long as nothing but G moves w; by its released code it does. Without matrices there is nothing to centralise: FedSAM."""
    into = lambda w, shapes: torch.cat([p.flatten(1).mean(1) for p in models.unflatten(w, shapes) if p.dim() > 1])                # noqa: E731
    for code in (False, True):
        fed = vision("gcsam", bundled, model="cnn", lr=0.3, begin=3, gc_code=code)
        moved = (into(fed.w, fed.task.shapes) - into(fed.task.w0, fed.task.shapes)).abs().max()
        assert (moved < 1e-14) != code and (fed.w - fed.task.w0).norm() > 0.1 and (not code or moved > 1e-5)
        task = Quadratics()
        task.shapes = [(6,)]
        assert torch.equal(quad(task, "gcsam", rounds=3, gc_code=code).w, quad(task, "fedsam", rounds=3).w)


@pytest.mark.parametrize("chunk", [1, 3])
def test_baselines_local_adam_is_torchs_adam_kept_by_every_client(chunk, bundled):
    """A module and an optimizer of its own for every client, over rounds; clients of unequal length."""
    fed = vision("fedavg-adam", bundled, chunk=chunk, clip=0.5, weight_decay=0.01, lr=0.3, local_adam_lr=0.01, lr_decay=0.8, server_lr=0.7, **UNEVEN)
    nets = [models.mlp_module(1, 28, 28, 10, 8).double() for _ in range(6)]
    adams, train, w, steps = [torch.optim.Adam(net.parameters(), weight_decay=0.01) for net in nets], fed.task.train, fed.w, [0] * 6
    for t in range(5):
        active, ends = fed.clients(t), []
        for i, plan in zip(active, fed.plans(active, t)):
            nn.utils.vector_to_parameters(w, nets[i].parameters())
            for p in nets[i].parameters():
                p.data = p.data.clone()                                              # it would be a view of w
            adams[i].param_groups[0]["lr"], steps[i] = 0.01 * 0.8**t, steps[i] + len(plan)
            for rows in plan:
                numbers = rows[rows[:, 0] >= 0, 0]
                adams[i].zero_grad()
                F.cross_entropy(nets[i]((train.x[numbers].double() - train.mean) / train.std), train.y[numbers]).backward()
                norm = torch.cat([p.grad.flatten() for p in nets[i].parameters()]).norm()
                for p in nets[i].parameters():
                    p.grad *= min(1, 0.5 / norm)
                adams[i].step()
            ends.append(nn.utils.parameters_to_vector(nets[i].parameters()).detach())
        w = w + 0.7 * (torch.stack(ends).mean(0) - w)
        fed.round()
        assert torch.allclose(fed.w, w, rtol=1e-9, atol=1e-11), t
    assert len(set(steps)) > 2 and max(steps) > len(plan)                            # unequal, and somebody came again
    for i in fed.memory.slot:
        m, v, k = fed.memory.read([i], None)[0]
        assert (k == steps[i]).all()
        for mine, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
            theirs = torch.cat([adams[i].state[p][name].flatten() for p in nets[i].parameters()])
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12) and theirs.norm() > 0


def test_baselines_local_adam_corrects_its_bias_in_float32_too():
    """The first step is eta long in every coordinate, and 1 - 0.999 in float32 would be wrong by 1e-5."""
    method = baselines.LocalAdam(Quadratics(), config.Config(algo="fedavg-adam", clip=0.0, lr=0.5, local_adam_lr=0.5))
    g = torch.linspace(-1, 1, 6)
    method.gradient = lambda w, rows, me, uphill: g
    w, me = method.step(torch.zeros(6), None, fl.Client(None, torch.zeros(3, 6)), torch.tensor(1.0), None)
    assert torch.allclose(w, -g.sign(), rtol=1e-6) and torch.equal(me.memory[2], torch.ones(6))
    w, me = method.step(torch.zeros(6), None, fl.Client(None, torch.zeros(3, 6)), torch.tensor(0.0), None)
    assert torch.equal(w, torch.zeros(6)) and torch.equal(me.memory, torch.zeros(3, 6))                # padding


@pytest.mark.parametrize("algo", list(baselines.METHODS))
def test_baselines_clients_read_only_what_came_through_the_wire(algo, bundled):
    """A client in another process: a fresh method that has seen parcel, `receive` and its own memory, and nothing else."""
    fed = vision(algo, bundled, begin=3, **UNEVEN)
    elsewhere, clients = baselines.METHODS[algo](fed.task, fed.cfg), fed.clients(3)
    (w, *extra), _ = fed.through_wire(fed.method.broadcast(fed.w))
    if fed.method.parcel():
        elsewhere.unpack(fed.through_wire(fed.method.parcel())[0])
    said, ends = asked(fed, clients)[0] if algo in ALIGNED else [None] * 3, []
    for method in (fed.method, elsewhere):
        method.receive(w, extra)
        memory, fed.method = fed.memory.read(clients, method.first_memory(w)), method
        if method.surveys:
            fed.announce(said, clients)
        ends.append([loop.local_training(method, w, own, plan, 0.05, s) for own, plan, s in zip(memory, fed.plans(clients, 3), said)])
    for (sent, kept), (sent2, kept2) in zip(*ends):
        assert torch.equal(sent, sent2) and torch.equal(kept, kept2)


@pytest.mark.parametrize("algo", list(baselines.METHODS))
def test_baselines_padded_steps_change_neither_message_nor_memory(algo, bundled):
    fed = vision(algo, bundled, begin=3, weight_decay=0.1, **UNEVEN)
    fed.method.receive(fed.w, fed.method.broadcast(fed.w)[1:])
    said = asked(fed, fed.clients(3))[0] if algo in ALIGNED else [None] * 3
    for i, plan, s in zip(fed.clients(3), fed.plans(fed.clients(3), 3), said):
        own = fed.memory.read([i], fed.method.first_memory(fed.w))[0]
        ends = [loop.local_training(fed.method, fed.w, own, p, 0.05, s) for p in (plan, F.pad(plan, (0, 0, 0, 0, 0, 5), value=-1))]
        assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("algo", list(baselines.METHODS))
def test_baselines_docstring_and_list_tell_the_true_cost(algo, bundled):
    """Gradients counted, bytes measured, attributes found; against the docstring and the line of `run.py --list`."""
    cfg = config.Config(algo=algo, model="mlp", hidden=8, fs_batches=2, fs_images=2)
    fed = vision(algo, bundled, torch.float32, begin=3, hidden=8, fs_format=cfg.fs_format, fs_objective=cfg.fs_objective)
    fed.compressor, calls, grad_of, up, down = config.compressor(cfg, len(fed.w)), [], fed.method.grad_of, fed.up, fed.down
    fed.method.grad_of = lambda loss, w: calls.append(1) or grad_of(loss, w)
    fed.holders = set(range(6))                                                      # the parcel, if any, has been fetched
    fed.round()
    m, d, K, kind = 4, len(fed.w), 3, type(fed.method)
    line = next(row for row in show.listing(cfg).splitlines() if row.startswith(f"| {algo} "))
    name, parent, gradients, ups, bytes_up, downs, bytes_down, client, server, source = [cell.strip() for cell in line.strip("|").split("|")]
    whole = sum(len(fed.task.everything(i)) for i in fed.clients(3)) * gradients.endswith(" + all")
    assert len(calls) == m * K * int(gradients.split()[0]) + whole and (whole > 0) == ("one over all images a round" in kind.__doc__)
    assert (fed.up - up, fed.down - down) == tuple(m * int(b.replace(",", "")) for b in (bytes_up, bytes_down))
    vectors_down = (fed.down - down) // m // (4 * d)
    count = lambda text: int((re.match(r"(\d+)?", text).group() or (0 if text == "-" else 1)))                   # noqa: E731
    assert count(ups) == kind.uplinks + kind.surveys and count(downs) == vectors_down and ("parcel" in downs) == issubclass(kind, fedsynsam.FedSynSAM)
    rows = fed.memory.table.shape[1]
    assert count(client) == rows and (rows == 0 or len(fed.memory.slot) >= m)
    fresh = kind(fed.task, fed.cfg)
    assert [s.removesuffix(" [d]") for s in server.split(", ")] == ([k for k in vars(fresh) if k not in ("task", "cfg")] or ["-"])
    assert all(re.search(rf"\b{k}\b", kind.__doc__) for k, v in vars(fresh).items() if torch.is_tensor(v))
    fresh.receive(fed.w, fed.method.broadcast(fed.w)[1:])
    if kind.surveys:
        fresh.hear(fed.w[None])
    assert set(vars(fed.method)) - {"grad_of", "functional"} == set(vars(fresh))                   # no state that the list does not know
    assert all(p in parent for p in (c.__name__ for c in kind.__bases__ if c is not object)) and len(source) > 8
    said = re.search(r"(\d )?d floats up(?: and down|[^;]*?, (\d )?d down)", kind.__doc__.replace("\n", " "))
    assert (ups == "D_syn") == (algo == "fedsynth")
    if algo == "fedsynth":
        masked = config.compressor(config.Config(compress="randk", scaled=False, k=int(re.search(r"--k (\d+)", show.listing(cfg)).group(1))), d)
        assert 0 <= (fed.up - up) // m - len(masked.encode(fed.w)) < 4 and "1 gradient a step" in kind.__doc__
    elif not issubclass(kind, fedsynsam.Distilling) or said:
        both = "and down" in said.group()
        assert int(said.group(1) or 1) == kind.uplinks + kind.surveys and int((said.group(1) if both else said.group(2)) or 1) == vectors_down
        assert int(re.search(r"(\d) gradients? a step", kind.__doc__).group(1)) == int(gradients.split()[0])


@pytest.mark.parametrize("algo", [*WITH_ORACLE, *ALIGNED, "fedavg-adam"])
def test_baselines_continue_from_a_checkpoint_bit_for_bit(algo, tmp_path):
    kw = {"participation": 3, "error_feedback": True, "lr": 0.05, "server_lr": 0.5, "rho": 0.05, "prox": 0.5, "lr_decay": 0.9}
    whole, first, second = (quad(Quadratics(), algo, TopK(3, f64), rounds=r, **kw) for r in (8, 4, 0))
    experiment.save(tmp_path, first, 1.0, 0)
    assert experiment.restore(tmp_path, second) == (1.0, 0)
    for _ in range(4):
        second.round()
    assert torch.equal(second.w, whole.w) and torch.equal(second.memory.table, whole.memory.table) and second.up == whole.up
    assert all(torch.equal(v, vars(second.method)[k]) for k, v in vars(whole.method).items() if torch.is_tensor(v))


def test_baselines_every_method_looks_different_in_the_figures():
    looks = [(plot.COLOURS[a], plot.STROKES.get(a, "-")) for a in baselines.METHODS]
    assert len(set(looks)) == len(looks) and set(plot.COLOURS) == set(baselines.METHODS)
# ------------------------------------------------------------------------------------------------------------- ranks
def in_a_group(work, procs, *args, **kw):
    """Call test_all.work(*args, **kw) on every rank of a new group, started from a fresh interpreter -> its exit code and messages."""
    code = f"import sys, functools, ranks, test_all; sys.exit(ranks.launch(functools.partial(test_all.member_of_a_group, {work!r}, {args!r}, {kw!r}), {procs}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def member_of_a_group(work, args, kw):
    ranks.join()
    torch.set_num_threads(1)
    globals()[work](*args, **kw)
    ranks.leave()


def three_rounds_of_every_method(path, **kw):
    """The state after three rounds of every method."""
    bundled = data.load("bundled", val=1000, dtype=f64)
    out = {}
    for algo in baselines.METHODS:
        fed = vision(algo, bundled, compressor=QSGD(7, "max", 64, f64), begin=3, **kw)         # top-k would be torn by ties: pixels repeat
        table = fed.memory.table[[fed.memory.slot[i] for i in sorted(fed.memory.slot)]]
        loss = tasks.evaluate(fed.task.apply, fed.w, fed.task.train, chunk=50)
        own = (fed.w, fed.up, fed.down, fed.move)
        for theirs in ranks.gathered(lambda: own):
            assert torch.equal(theirs[0], own[0]) and theirs[1:3] == own[1:3] and torch.equal(theirs[3], own[3])           # all ranks agree
        out[algo] = [fed.w, table, torch.tensor([*loss, fed.up, fed.down, *fed.report.values()], dtype=f64)]
    if ranks.rank() == 0:
        torch.save(out, path)


@pytest.mark.parametrize("procs, kw", [(2, {"error_feedback": True, "participation": 5}),
                                       (3, {"local_epochs": 1, "batch": 16, "partition": "dirichlet-class", "min_size": 2, "average": "size"})])
def test_ranks_give_the_numbers_of_one_process(procs, kw, tmp_path):
    three_rounds_of_every_method(tmp_path / "1", **kw)
    alone = torch.load(tmp_path / "1")
    assert in_a_group("three_rounds_of_every_method", procs, str(tmp_path / "P"), **kw) == (0, "")
    together = torch.load(tmp_path / "P")
    assert together.keys() == alone.keys()
    for name in alone:
        for a, b in zip(alone[name], together[name]):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


def words_of_a_group():
    first = ranks.rank() == 0
    assert ranks.tell({"a": torch.ones(2)} if first else None)["a"].tolist() == [1, 1]
    assert ranks.served(lambda: "done") == ("done" if first else None)
    assert ranks.gathered(lambda: 10 * ranks.rank()) == [0, 10, 20]
    assert ranks.from_server(torch.full((3,), float(ranks.rank()))).tolist() == [0, 0, 0]
    assert ranks.total(torch.full((2,), 1.0 + ranks.rank())).tolist() == [6, 6]
    assert ranks.local_size() == 3 and ranks.local_rank() == ranks.rank()
    deals = ranks.gathered(lambda: ranks.share([5, 1, 1, 4, 3]))
    assert sorted(sum(deals, [])) == [0, 1, 2, 3, 4] and deals == [[0], [2, 3], [1, 4]]             # loads 5, 5, 4
    assert ranks.gathered(lambda: ranks.share([1] * 7)) == [[0, 3, 6], [1, 4], [2, 5]]
    for word, guilty in ((ranks.served, 0), (ranks.gathered, 2)):
        def fail():
            if ranks.rank() == guilty:
                raise loop.Diverged("number 7")
        with pytest.raises(loop.Diverged, match="number 7"):
            word(fail)


def test_ranks_words_mean_what_they_say():
    assert in_a_group("words_of_a_group", 3) == (0, "")
    assert ranks.tell(5) == 5 and ranks.served(lambda: 6) == 6 and ranks.gathered(lambda: 7) == [7] and ranks.share([1, 2]) == [0, 1]


def one_dies():
    ranks.gathered(lambda: None)
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.total(torch.zeros(3))
    except ranks.Lost as error:
        print(f"seen by {ranks.rank()}: {error}", file=sys.stderr, flush=True)


def test_ranks_a_dead_process_is_an_error_and_not_a_hang():
    start = time.time()
    code, err = in_a_group("one_dies", 2)
    assert code == 1 and "process 1 of 2 was killed (SIGKILL)" in err and time.time() - start < 60


def ends(folder):
    """What a run left: weights, client memory, and its log without the digits that the order of a sum may change."""
    state = torch.load(folder / "checkpoint.pt", weights_only=False)
    return [state["w"], state["table"][[state["slot"][i] for i in sorted(state["slot"])]]], [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def same_end(a, b):
    return (all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(ends(a)[0], ends(b)[0])) and len(ends(a)[1]) == len(ends(b)[1])
            and all(x[k] == pytest.approx(y[k], rel=1e-4) for x, y in zip(ends(a)[1], ends(b)[1]) for k in x))


def test_ranks_a_run_of_two_processes_is_the_run_of_one_and_survives_a_kill(tmp_path, capsys):
    words = [*SMALL, "--compress", "topk", "--error-feedback", "--local-steps", "10", "--checkpoint-every", "2", "--out", tmp_path]
    assert main(capsys, *words, "--name", "one")[0] == 0
    two = subprocess.run([sys.executable, "run.py", *map(str, words), "--name", "two", "--procs", "2"], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert two.returncode == 0 and two.stdout.count("top eigenvalue") == 1, two.stderr
    assert same_end(tmp_path / "one", tmp_path / "two")
    code, out, err = killed_in("loop.Federation.advance", 5, 1, *words, "--name", "cut", "--procs", "2")         # the second process, in round 5
    assert code == 1 and out == "" and "--resume" in err and "SIGKILL" in err and "Traceback" not in err, err
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 4
    assert subprocess.run([sys.executable, "run.py", "--resume", str(tmp_path / "cut")], cwd=HERE, timeout=120).returncode == 0
    assert same_end(tmp_path / "one", tmp_path / "cut")


def test_ranks_wrong_input_and_divergence_are_said_once(tmp_path, capsys):
    for words, code, hint in ((["--rho", "-1"], 2, "rho = -1.0 is out of range"), (["--lr", "1e30", "--clip", "0"], 1, "lr = 1e+30")):
        done = subprocess.run([sys.executable, "run.py", *SMALL, "--algo", "fedavg", "--out", str(tmp_path), "--procs", "2", *words], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == code and hint in done.stderr and done.stderr.count("run.py:") == 1 and "Traceback" not in done.stderr
    code, _, err = main(capsys, *SMALL, "--procs", "2", "--out", tmp_path)
    assert code == 2 and "procs = 2" in err                                          # in-process: nobody started the second one


# --------------------------------------------------------------------------------------------------------- sharpness
def symmetric(values, seed=0):
    """A dense symmetric matrix with these eigenvalues; its eigenvectors."""
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    return q @ torch.diag(values.to(f64)) @ q.T, q


def tiny_objective(bundled, model, n=60, chunk=25, **kw):
    """The Objective of `model` on n of the bundled images, shrunk to 7 x 7 unless the model is a cnn; and the loss, written down plainly."""
    small = slice(None) if model.shapes[0][-1] == 5 else slice(None, None, 4)
    images = bundled.train._replace(x=bundled.train.x[:n, :, small, small], y=bundled.train.y[:n], mean=bundled.train.mean.double(), std=bundled.train.std.double())
    x, y, _ = next(images.chunks(n))
    return sharpness.Objective(model.apply, images, chunk=chunk, **kw), lambda v: F.cross_entropy(model.apply(v, x), y)


def test_sharpness_lanczos_finds_the_ends_of_a_known_spectrum():
    for values in (torch.linspace(0.1, 7, 40), torch.cat([torch.linspace(-9, -1, 10), torch.linspace(0, 3, 30)])):
        A, _ = symmetric(values)
        ritz = sharpness.lanczos(lambda v: A @ v, randn(40, seed=3), 40, tolerance=0)
        assert torch.allclose(ritz.values[[0, -1]], torch.stack([values.min(), values.max()]).to(f64), rtol=1e-9)
        y = ritz.coordinates.T @ ritz.basis
        assert torch.allclose(y @ y.T, torch.eye(len(y), dtype=f64), atol=1e-9) and torch.allclose(y @ A, ritz.values[:, None] * y, atol=1e-6)
    assert len(sharpness.lanczos(lambda v: 2 * v, randn(40), 40).values) == 1        # one product exhausts the space


def test_sharpness_top_eigenvalues_are_the_largest_in_magnitude_with_sign_and_vector():
    values = torch.cat([torch.tensor([-9.0, 7, 5, -4.5]), torch.linspace(-3, 3, 96)])
    A, q = symmetric(values)
    top = sharpness.top_eigenvalues(lambda v: A @ v, randn(100), k=4, tolerance=1e-9)
    assert torch.allclose(top.values, values[:4].to(f64), rtol=1e-8) and (top.errors <= 1e-9 * top.values.abs()).all()
    assert torch.allclose((top.vectors @ q[:, :4]).abs(), torch.eye(4, dtype=f64), atol=1e-4)
    for k in (0, 101):
        with pytest.raises(ValueError, match=r"1\.\.100"):
            sharpness.top_eigenvalues(lambda v: A @ v, randn(100), k)


def test_sharpness_lanczos_stops_when_its_errors_are_small_and_they_are_honest():
    for seed in range(5):
        values = torch.cat([torch.tensor([8.0, 7, -6]), torch.randn(497, generator=seeded(seed))])
        A, _ = symmetric(values, seed)
        ritz = sharpness.lanczos(lambda v: A @ v, randn(500, seed=seed + 9), 100, tolerance=1e-4, k=3)
        top = ritz.values.abs().argsort(descending=True)[:3]
        missing = (ritz.values[top] - values[:3]).abs()
        assert (missing <= 2 * sharpness.errors(ritz)[top] + 1e-6).all() and (missing <= 2e-4 * values[:3].abs()).all()
        assert len(ritz.values) < 30 and (missing <= ritz.residuals[top] + 1e-6).all()


def test_sharpness_spectrum_of_a_network_is_that_of_the_dense_hessian(bundled):
    model = models.build("mlp", (1, 7, 7), 10, hidden=3, dtype=f64)
    objective, loss = tiny_objective(bundled, model)
    for w in (model.w0, model.w0 + randn(len(model.w0))):
        H = torch.func.hessian(loss)(w)
        dense = torch.linalg.eigvalsh(H)
        matvec = objective.hessian(w)
        top = sharpness.top_eigenvalues(matvec, w, k=5, tolerance=1e-8)
        assert torch.allclose(top.values, dense[dense.abs().argsort(descending=True)[:5]], rtol=1e-6)
        ends = sharpness.lanczos(matvec, randn(len(w), seed=5), 60, tolerance=0).values[[0, -1]]
        assert torch.allclose(ends, dense[[0, -1]], rtol=1e-6)
        assert sharpness.top_eigenvalue(model.apply, w, objective.images) == pytest.approx(float(top.values[0]), rel=1e-4)
    assert sharpness.top_eigenvalues(lambda v: -matvec(v), w).values[0] < 0                       # |lambda_min| > lambda_max


def test_sharpness_chunks_threads_and_kept_graphs_change_nothing(bundled, monkeypatch):
    model = models.build("cnn", (1, 28, 28), 10, width=2, hidden=4, dtype=f64)
    v, w, anew = randn(len(model.w0)), model.w0, []
    once = sharpness.hessian_vector
    monkeypatch.setattr(sharpness, "hessian_vector", lambda *a: anew.append(1) or once(*a))
    whole, loss = tiny_objective(bundled, model, 20, chunk=20)
    assert whole.loss(w) == pytest.approx(float(loss(w)), rel=1e-12) and torch.allclose(whole.gradient(w), torch.func.grad(loss)(w), rtol=1e-9, atol=1e-14)
    expected, pool = torch.func.jvp(torch.func.grad(loss), (w,), (v,))[1], ThreadPoolExecutor(2)
    results = []
    for each, memory, n in ((map, 2**30, 0), (pool.map, 2**30, 0), (map, 0, 3), (pool.map, 0, 3), (map, 600_000, 2)):
        anew.clear()
        objective, _ = tiny_objective(bundled, model, 20, chunk=7, each=each, memory=memory)
        matvec = objective.hessian(w)
        results.append((objective.loss(w), objective.gradient(w), matvec(v)))
        assert len(anew) == n and torch.equal(matvec(v), results[-1][2])             # graphs are kept, and stay usable
    for a, b, c in results:
        assert a == results[0][0] and torch.equal(b, results[0][1]) and torch.equal(c, results[0][2])
    assert torch.allclose(c, expected, rtol=1e-9, atol=1e-12) and torch.allclose(b, whole.gradient(w), rtol=1e-9, atol=1e-12)


def test_sharpness_trace_is_exact_for_a_diagonal_and_knows_its_error():
    values = torch.linspace(-1, 3, 20)
    diagonal = sharpness.trace(lambda v: values * v, values, samples=1)
    assert diagonal.estimate == pytest.approx(float(values.sum()), rel=1e-6) and math.isnan(diagonal.error)
    assert sharpness.trace(lambda v: values * v, values, samples=5).error == pytest.approx(0, abs=1e-6)
    A, _ = symmetric(values)
    n, found = 3000, sharpness.trace(lambda v: A @ v, A[0], samples=3000)
    assert abs(found.estimate - A.trace()) < 4 * found.error
    assert n * found.error**2 == pytest.approx(float(2 * (A.square().sum() - A.diag().square().sum())), rel=0.15)


def test_sharpness_spectrum_has_the_moments_of_the_matrix():
    A, _ = symmetric(torch.cat([torch.tensor([-4.0, 9]), torch.linspace(-1, 1, 58)]))
    spec = sharpness.spectrum(lambda v: A @ v, A[0], starts=3, steps=8, seed=2)
    for p in range(16):                                                              # exact for the starts that were drawn
        exact = torch.stack([v @ torch.linalg.matrix_power(A, p) @ v / 60 for v in sharpness.signs(3, A[0], 2)]).mean()
        assert torch.allclose(spec.weights @ spec.values**p, exact, rtol=1e-8)
    runs = [sharpness.spectrum(lambda v: A @ v, A[0], starts=1, steps=8, seed=s) for s in range(200)]
    for p in (1, 2):                                                                 # and right on the mean
        moments = torch.stack([r.weights @ r.values**p for r in runs])
        assert abs(moments.mean() - torch.linalg.matrix_power(A, p).trace() / 60) < 4 * moments.std() / 200**0.5
    for width in (None, 0.3):
        x, y = sharpness.density(spec, 2000, width)
        assert torch.trapezoid(y, x) == pytest.approx(1, abs=1e-4) and torch.trapezoid(x * y, x) == pytest.approx(float(spec.weights @ spec.values), abs=1e-3)
    one, height = sharpness.density(sharpness.Spectrum(torch.tensor([2.0]), torch.tensor([1.0])), 1001, 0.3)
    assert height[500] == pytest.approx(1 / (0.3 * math.sqrt(2 * math.pi)), rel=1e-4) and one[500] == pytest.approx(2)


# --------------------------------------------------------------------------------------------------------- landscape
def highest(A, g, rho):
    """max of g'e + e'Ae / 2 in the ball (not concave there): e = (mu I - A)^{-1} g with mu > lambda_max such that ||e|| = rho, by bisection."""
    values, q = torch.linalg.eigh(A)
    c, low, high = q.T @ g, values[-1], values[-1] + g.norm() / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (c / (mu - values)).norm() > rho else (low, mu)
    e = q @ (c / (high - values))
    return float(g @ e + e @ A @ e / 2)


@pytest.mark.parametrize("least", (0.1, -9.0))
def test_landscape_sam_sharpness_is_the_maximum_over_the_ball(least):
    A, _ = symmetric(torch.cat([torch.tensor([7.0, 5, least]), torch.linspace(0.2, 4, 37)]))
    loss, rho = lambda w: float(w @ A @ w / 2), 0.3
    at_minimum = landscape.sam_sharpness(loss, lambda w: A @ w, torch.zeros(40, dtype=f64), rho, steps=100)
    assert at_minimum.ascent == pytest.approx(0.5 * 7 * rho**2, rel=1e-6) and at_minimum.one_step == 0 and at_minimum.rho == rho
    w = randn(40, seed=1) * 0.1
    g, found = A @ w, landscape.sam_sharpness(loss, lambda w: A @ w, w, rho, steps=100)
    e = rho * g / g.norm()
    assert found.one_step == pytest.approx(float(g @ e + e @ A @ e / 2), rel=1e-9)
    assert found.ascent == pytest.approx(highest(A, g, rho), rel=1e-4) and found.ascent > found.one_step + 1e-3
    assert landscape.sam_sharpness(loss, lambda w: A @ w, w, 0.0).ascent == 0


def test_landscape_m_sharpness_is_the_mean_over_batches(bundled):
    model = models.build("mlp", (1, 7, 7), 10, hidden=3, dtype=f64)
    objective, loss = tiny_objective(bundled, model)
    whole = landscape.sam_sharpness(objective.loss, objective.gradient, model.w0, 0.1, 5)
    assert landscape.m_sharpness(objective, model.w0, 0.1, 60, 5) == pytest.approx(whole)
    x, y, _ = next(objective.images.chunks(50))
    parts = [lambda v, s=s: F.cross_entropy(model.apply(v, x[s]), y[s]) for s in (slice(0, 25), slice(25, 50))]        # the last 10 are left out
    slow = [landscape.sam_sharpness(lambda v: float(part(v)), torch.func.grad(part), model.w0, 0.1, 5) for part in parts]
    halves = landscape.m_sharpness(objective, model.w0, 0.1, 25, 5)
    assert halves == pytest.approx(torch.tensor(slow, dtype=f64).mean(0).tolist()) and halves.ascent > whole.ascent
    with pytest.raises(ValueError, match=r"1\.\.60"):
        landscape.m_sharpness(objective, model.w0, 0.1, 61)


@pytest.mark.parametrize("name", ["mlp", "cnn", "convnet"])
def test_landscape_every_filter_of_a_direction_has_the_length_of_the_models(name):
    model = models.build(name, (1, 28, 28), 10, width=2, hidden=8)
    d = landscape.filter_direction(model.w0, model.shapes, seed=3)
    for p, q in zip(models.unflatten(model.w0, model.shapes), models.unflatten(d, model.shapes)):      # OIHW: independent of how w stores it
        if p.dim() == 1:
            assert not q.any()                                                       # biases and norms
        else:
            assert torch.allclose(q.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1), rtol=1e-5)
            assert (F.cosine_similarity(p.flatten(1), q.flatten(1)).abs() < 1 - 1e-3).all()
    assert torch.equal(d, landscape.filter_direction(model.w0, model.shapes, 3)) and sam.cosine(d, landscape.filter_direction(model.w0, model.shapes, 4)) < 0.5
    zero = landscape.filter_direction(torch.zeros_like(d), model.shapes)
    assert not zero.any()                                                            # and no 0 / 0


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_landscape_slices_do_not_see_a_rescaling_of_relu_layers(name, bundled):
    model = models.build(name, (1, 28, 28) if name == "cnn" else (1, 7, 7), 10, width=2, hidden=4, dtype=f64)
    objective, loss = tiny_objective(bundled, model, 20)
    p = [q.clone() for q in models.unflatten(model.w0, model.shapes)]
    for i, c in ((0, 5.0), (4, 0.3))[:len(p) // 4]:                                  # layer i, its bias and the next layer
        p[i], p[i + 1], p[i + 2] = c * p[i], c * p[i + 1], p[i + 2] / c
    curves = []
    for w in (model.w0, models.flatten(p)):
        d, e = (landscape.filter_direction(w, model.shapes, s) for s in (0, 1))
        a, values = landscape.line(objective.loss, w, d, 5)
        b, square = landscape.plane(objective.loss, w, d, e, 3, span=0.5)
        assert a.tolist() == [-1, -0.5, 0, 0.5, 1] and b.tolist() == [-0.5, 0, 0.5]
        assert values[2] == square[1, 1] == objective.loss(w) and values[4] == objective.loss(w + d)
        assert square[2, 0] == pytest.approx(float(loss(w + 0.5 * d - 0.5 * e)), rel=1e-9) and torch.allclose(square[[0, 2], 1], values[[1, 3]], rtol=1e-9)
        curves.append(torch.cat([values, square.flatten()]))
    assert torch.allclose(*curves, rtol=1e-8) and curves[0].std() > 0.003
    assert len(landscape.line(loss, model.w0, d)[0]) == 51
    plain = [landscape.line(objective.loss, w, randn(len(w)) / len(w)**0.5, 5)[1] for w in (model.w0, models.flatten(p))]
    assert not torch.allclose(*plain, rtol=1e-3)                                     # what the normalisation is for


# -------------------------------------------------------------------------------------------------- config and run
SMALL = ["--quick", "--clients", "20", "--participation", "2", "--measure-images", "60", "--local-steps", "2", "--outer-steps", "50",
         "--inner-steps", "3", "--width", "4", "--hidden", "16"]


def main(capsys, *args):
    code = run.main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def dies_in(place, call, rank):
    """From now on the process of that rank is killed when it calls `place` ("module.function" or "module.Class.function") for the `call`-th time."""
    module, *path, name = place.split(".")
    owner, calls = functools.reduce(getattr, path, importlib.import_module(module)), []
    inner = getattr(owner, name)

    def outer(*args, **kw):
        calls.append(1)
        if len(calls) == call and ranks.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kw)
    setattr(owner, name, outer)


def killed_in(place, call, rank, *words):
    """`python run.py words`, in a fresh interpreter, with a death at an exact place -> exit code, what it printed, what it complained about."""
    code = f"import sys, run, test_all; test_all.dies_in({place!r}, {call}, {rank}); sys.exit(run.command(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=HERE, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_config_every_field_is_read_and_described():
    text = "".join((HERE / f).read_text() for f in ("fl.py", "fedsynsam.py", "align.py", "ceiling.py", "baselines.py", "tasks.py", "synth.py", "loop.py", "experiment.py", "config.py", "presets.py", "run.py"))
    for f in dataclasses.fields(config.Config):
        assert re.search(rf"\b(cfg|c|base|self)\.{f.name}\b", text), f"config field {f.name} is never read"
        assert len(f.metadata["text"]) > 5
    assert config.Config().hash() != config.Config(rho=0.2).hash() and config.Config().hash() == config.Config(threads=1).hash()


def test_config_names_every_compressor_with_its_settings():
    make = lambda **kw: config.compressor(config.Config(**kw).check(), 1000)                                 # noqa: E731
    assert {type(make(compress=name)) for name in compress.COMPRESSORS} == set(compress.COMPRESSORS.values())
    assert make(levels=3, scale="l2", bucket=64, code="elias") == QSGD(3, "l2", 64, code="elias")
    assert make(compress="dithering", nu=0.2, randomized=False) == SparseDithering(0.2, False)
    assert make(compress="randk", k=0.1, scaled=False) == RandK(100, False) and make(compress="topk", k=7) == TopK(7)
    assert make(compress="dithering", nu=2) == SparseDithering(2) and make() == QSGD(1, "max", 512)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_legal_settings_and_find_their_published_numbers(name):
    table = presets.PRESETS[name].published
    assert len(table) >= 6 and "arXiv" in presets.PRESETS[name].source + "arXiv" * name.startswith("flsim")
    for (algo, split, man), number in table.items():
        how = {"partition": "iid"} if split == "iid" else {"alpha": split}
        cfg = config.Config(algo=algo, **{**presets.fields(name, algo), **how, "man": man, "seed": 3}).check()
        assert presets.published(cfg) == number and 10 < number < 100
        for change in ({"rho": 0.3}, {"clients": 101}, {"partition": "shards"}, {"preset": ""}, {"alpha": 7.0, "partition": cfg.partition if split != "iid" else "dirichlet"}):
            assert presets.published(dataclasses.replace(cfg, **change)) is None
    assert dataclasses.replace(cfg, preset="").hash() == cfg.hash()                   # where settings came from does not change them


def test_presets_print_the_published_number_beside_ours_and_yield_to_flags(tmp_path, capsys, monkeypatch):
    words = run.parser().parse_args("--preset fedwmsam-fmnist --algo fedsam fedsmoo fedavg --batch 25".split())
    rho = {c.algo: (c.rho, c.batch, c.model, c.preset) for c in run.configs_of(words)}
    assert rho == {"fedsam": (0.01, 25, "mlp", "fedwmsam-fmnist"), "fedsmoo": (0.1, 25, "mlp", "fedwmsam-fmnist"), "fedavg": (0.1, 25, "mlp", "fedwmsam-fmnist")}
    tiny = {"rounds": 2, "clients": 4, "participation": 2, "local_steps": 1, "model": "mlp", "hidden": 4, "measure_images": 50, "alpha": 0.5}
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Preset("A paper (arXiv 1), table 2", tiny, {}, presets.rows((0.5,), "fedavg 12.34")))
    assert "| published % |" in (out := main(capsys, "--preset", "tiny", "--algo", "fedavg", "fedcm", "--out", tmp_path)[1]) and "| 12.34 |" in out and "| - |" in out
    assert "12.34 % test (A paper (arXiv 1))" in main(capsys, "--preset", "tiny", "--algo", "fedavg", "--out", tmp_path)[1]
    assert "12.34" not in main(capsys, "--preset", "tiny", "--algo", "fedavg", "--out", tmp_path, "--lr", 0.3)[1]


@pytest.mark.parametrize("words, hint", [
    ("--algo fedsinsam", "did you mean 'fedsynsam'"), ("--algo FEDAVG", "'fedavg'"), ("--alpha 0", "alpha = 0.0 must be above 0"),
    ("--alpha -1", "above 0"), ("--alpha nan", "not a finite number"), ("--clients 9001 --participation 1", "must be in 1..9000"),
    ("--participation 101", "1..100"), ("--compress topk --k 0", "must be above 0"), ("--compress topk --k 54315", "1..54314"),
    ("--compress topk --k 2.5", "whole"), ("--compress zip", "legal: identity"), ("--rho -0.1", "at least 0"), ("--mix 1.5", "0..1"),
    ("--rounds 0", "at least 1"), ("--lr x", "invalid float"), ("--rouns 3", "did you mean --rounds"), ("--dataset nosuch.npz", "no such file"),
    ("--dataset {text}", "cannot be read"), ("--dataset {labels}", "labels of y_test must lie in 0..3"), ("--dataset {floats}", "expected uint8"),
    ("--dataset {keys}", "no array 'y_test'"), ("--dataset {pickled}", "cannot be read"), ("--val 10000", "0..9999"), ("--model resnet", "did you mean 'resnet18'"),
    ("--resume {folder}", "no run folder"), ("--resume {foreign}", "not from this version"), ("--explain fedsim", "did you mean 'fedsam'"),
    ("--name a/b", "plain folder name"), ("--seeds 0", "1..1000"), ("--window 99", "1..10"), ("--partition shards --classes-per-client 11", "cannot cover"),
    ("--warmup 9 --rounds 9", "below rounds"), ("--compress randk --error-feedback", "contractive"), ("--dataset {names}", "classes is (2,)"),
    ("--clients 5000 --participation 1 --partition shards --classes-per-client 2", "without images"), ("--resume {folder} --rounds 3", "leave out --rounds"),
    ("--explain {nothing}", "unknown method ''"), ("--algo", "expected at least one"), ("--preset fedwmsam", "did you mean 'fedwmsam-fmnist'"), ("--lr-decay 0", "above 0"),
    ("--momentum-alpha 0", "above 0"), ("--man -0.1", "at least 0"), ("--adam-b1 1", "0..0.9999"), ("--prox -1", "at least 0"), ("--algo scafold", "did you mean 'scaffold'"), ("--seeds 100000000", "1..1000"), ("--width 4096", "1..512"),
    ("--name {long}", "plain folder name"), ("--resume {long}", "no run folder"), ("--resume {moved}", "no such file"),
    ("--algo fedsynth --fs-objective data --error-feedback", "--fs-objective update"), ("--fs-steps 0", "in 1..100000"), ("--fs-step 0", "above 0"), ("--fs-format int8", "did you mean 'uint8'"),
    ("--nu 0", "in 1e-06..100"), ("--compress dithering --nu 2 --no-randomized", "below 1"), ("--code zip", "legal: fixed, elias, runs"),
    ("--compress dithering --nu 1 --error-feedback", "below 1"), ("--experiment sharpnes", "did you mean 'sharpness'"), ("--experiment oracle --size cp", "did you mean 'cpu'"), ("--experiment oracle --rounds 3", "leave out --rounds"),
    ("--experiment oracle --tune fedavg", "give one of them"), ("--experiment oracle --procs 2", "share its runs"), ("--tune scafold", "did you mean 'scaffold'"), ("--size cpu", "belongs to"),
    ("--report --seeds 2", "leave out --seeds"), ("--report --size cpu", "leave out --size"), ("--device cuda", "no GPU"), ("--device tpu", "legal: auto"), ("--out {file}", "cannot make")])
def test_run_wrong_input_is_one_helpful_line_and_code_2(words, hint, tmp_path, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "text.npz").write_text("I am no npz")
    good = dict(x_train=np.zeros((20, 8, 8), np.uint8), y_train=np.arange(20) % 4, x_test=np.zeros((4, 8, 8), np.uint8), y_test=np.arange(4))
    np.savez(tmp_path / "labels.npz", **{**good, "y_test": np.array([0, 1, 2, 9])})
    np.savez(tmp_path / "floats.npz", **{**good, "x_train": np.zeros((20, 8, 8))})
    np.savez(tmp_path / "keys.npz", **{k: v for k, v in good.items() if k != "y_test"})
    np.savez(tmp_path / "pickled.npz", **{**good, "y_test": np.array([print], dtype=object)})
    np.savez(tmp_path / "names.npz", **good, classes=np.array(["a", "b"]))
    for name in ("folder", "foreign", "moved"):
        (tmp_path / name).mkdir()
    moved = dataclasses.asdict(config.Config(dataset="no/longer/there.npz"))
    (tmp_path / "moved" / "config.json").write_text(json.dumps({"settings": moved}))
    (tmp_path / "foreign" / "config.json").write_text('{"settings": {"colour": "red"}}')
    (tmp_path / "file").write_text("")
    words = words.format(**{n: tmp_path / f"{n}.npz" for n in ("text", "labels", "floats", "keys", "pickled", "names")}, nothing="",
                         **{n: tmp_path / n for n in ("folder", "foreign", "moved", "file")}, long="x" * 300)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = main(capsys, *([] if "--out" in words else ["--out", tmp_path / "runs"]), *words.split(" "))
    assert code == 2 and out == "" and hint in err and err.count("\n") == 1 and err.startswith("run.py: ")
    assert sorted(tmp_path.rglob("*")) == before                                     # nothing was begun


def test_run_writes_a_whole_folder_and_never_overwrites_it(tmp_path, capsys):
    code, out, _ = main(capsys, *SMALL, "--out", tmp_path, "--name", "mine")
    folder = tmp_path / "mine"
    assert code == 0 and "accuracy" in out and "top eigenvalue" in out and "alignment" in out and "synthetic" in out and "MB" in out
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "result.json", "curve.png", "synthetic.png"}
    stored = json.loads((folder / "config.json").read_text())
    assert set(stored["settings"]) == {f.name for f in dataclasses.fields(config.Config)} and stored["machine"]["torch"] == torch.__version__
    lines = experiment.read_log(folder)
    result = json.loads((folder / "result.json").read_text())
    assert [x["round"] for x in lines] == list(range(1, 7)) and lines[-1]["up"] == result["up"] and len(result["averaged"]) == 1
    assert result["test_acc"] == lines[-1]["test_acc"]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    code, _, err = main(capsys, *SMALL, "--out", tmp_path, "--name", "mine")
    assert code == 2 and "not overwritten" in err and "--resume" in err
    code, again, _ = main(capsys, "--resume", folder)                                # a finished run: its card, nothing else
    assert code == 0 and again == out and before == {p: p.read_bytes() for p in folder.iterdir()}


def test_run_default_names_do_not_collide(tmp_path, capsys):
    for expected in ("fedavg-s0", "fedavg-s0-2"):
        assert main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedavg")[0] == 0 and (tmp_path / expected / "result.json").exists()


def test_run_seeds_repeat_and_differ(tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedsam", "--name", name, "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / n / "log.jsonl").read_text() for n in "abc")
    assert a == b and a != c


def test_run_comparison_makes_one_table_and_resumes(tmp_path, capsys):
    words = [*SMALL, "--out", tmp_path, "--algo", "fedavg", "fedsynsam", "--seeds", "2", "--name", "both"]
    code, out, _ = main(capsys, *words)
    folder = tmp_path / "both"
    rows = [line for line in out.splitlines() if line.startswith("| fed")]
    assert code == 0 and len(rows) == 2 and all("±" in r for r in rows) and (folder / "table.md").read_text() in out
    assert {p.name for p in folder.iterdir()} == {"comparison.json", "table.md", "curve.png", *(f"{a}-s{s}" for a in ("fedavg", "fedsynsam") for s in (0, 1))}
    accuracy = [json.loads((folder / f"fedavg-s{s}" / "result.json").read_text())["test_acc"] for s in (0, 1)]
    assert f"{100 * np.mean(accuracy):.2f} ± {100 * np.std(accuracy, ddof=1):.2f}" in rows[0]
    (folder / "fedsynsam-s1" / "result.json").unlink()
    assert main(capsys, "--resume", folder)[:2] == (0, out)


def test_run_divergence_is_code_1_and_keeps_the_log(tmp_path, capsys):
    code, _, err = main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedavg", "--lr", "1e30", "--clip", "0", "--name", "boom")
    assert code == 1 and "round" in err and "client" in err and "lr = 1e+30" in err and (tmp_path / "boom" / "log.jsonl").exists()
    code, _, err = main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedavg", "--server-lr", "1e38", "--name", "bang")
    assert code == 1 and "server_lr = 1e+38" in err and len(err.strip().splitlines()) == 1


def test_run_killed_at_any_moment_resumes_to_identical_bits(tmp_path, capsys):
    words = [*SMALL, "--compress", "topk", "--error-feedback", "--checkpoint-every", "2", "--seed", "5", "--threads", "2", "--out", tmp_path]
    assert main(capsys, *words, "--name", "whole")[0] == 0
    cut = tmp_path / "cut"
    rounds = lambda: len((cut / "log.jsonl").read_text().splitlines())                # noqa: E731
    for place, call, logged in (("loop.Federation.advance", 2, 1),                    # in round 2, before there is a checkpoint
                                ("synth.matching_loss", 3, 2),                        # in the synthesis
                                ("os.replace", 1, 3)):                                # while a checkpoint is written
        assert killed_in(place, call, 0, *([*words, "--name", "cut"] if place.startswith("loop") else ["--resume", cut])) == (-signal.SIGKILL, "", "")
        assert rounds() == logged and (cut / "checkpoint.tmp").exists() == (place == "os.replace")
    (cut / "log.jsonl").open("a").write('{"round": 999, "torn li')                   # a line cut off in the middle
    code = "import sys, run; assert run.main(sys.argv[1:]) == 0 and not {'sympy', 'torch._dynamo'} & set(sys.modules)"      # seconds to import: synth.adam
    subprocess.run([sys.executable, "-c", code, "--resume", str(cut)], cwd=HERE, check=True, stdout=subprocess.DEVNULL, timeout=120)
    whole, again = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=False) for n in ("whole", "cut"))
    assert torch.equal(whole["w"], again["w"]) and torch.equal(whole["table"], again["table"]) and whole["slot"] == again["slot"]
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (cut / "log.jsonl").read_bytes()
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}


def test_run_damaged_or_foreign_checkpoints_are_refused(tmp_path, capsys):
    assert main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedavg", "--name", "a")[0] == 0
    (tmp_path / "a" / "result.json").unlink()
    good = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    (tmp_path / "a" / "checkpoint.pt").write_bytes(good[:1000])
    code, _, err = main(capsys, "--resume", tmp_path / "a")
    assert code == 2 and "cannot be read" in err
    (tmp_path / "a" / "checkpoint.pt").write_bytes(good)
    text = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a" / "config.json").write_text(text.replace('"rho": 0.', '"rho": 1.'))
    code, _, err = main(capsys, "--resume", tmp_path / "a")
    assert code == 2 and "other settings" in err


def test_run_a_reader_that_closes_the_pipe_is_no_error():
    run_py = subprocess.Popen([sys.executable, "run.py", "--list"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run_py.stdout.close()
    assert run_py.wait(timeout=100) == 0 and run_py.stderr.read() == b""


@pytest.mark.parametrize("name", list(baselines.METHODS))
def test_run_explain_shows_the_source_that_differs(name, capsys):
    code, out, _ = main(capsys, "--explain", name)
    method = baselines.METHODS[name]
    assert code == 0 and method.__name__ in out
    for key, value in vars(method).items():
        if inspect.isfunction(value):
            assert all(line.strip() in out for line in inspect.getsource(value).splitlines())
    assert all(base.__name__ in out for base in method.__bases__ if base is not object)
    assert len(method.__bases__) < 2 or ": as " in out                               # a crossing: who answers what


def test_config_synthesis_settings_do_not_bind_methods_without_synthesis():
    config.Config(algo="fedavg", warmup=2, rounds=2).check()
    with pytest.raises(ValueError, match="window"):
        config.Config(algo="fedsynsam", warmup=2).check()


def test_a_method_is_at_most_about_ten_lines_of_difference():
    for method in {*baselines.METHODS.values(), fedsynsam.Distilling, align.Displaced}:
        if method is not fl.FedAvg:
            lines = [line.strip() for line in inspect.getsource(method).replace(method.__doc__, "").splitlines()]
            assert sum(1 for line in lines if line and not line.startswith(("class ", "def ", '"""'))) <= 12, method


# --------------------------------------------------------------------------------------------------- study and claims
class Tiny(study.Claim):
    """Two cells, in seconds."""
    name, says, refuted, source = "tiny", "Tiny things are small", "they are large", "nobody"
    seeds = {"quick": 2}

    def cells(self, world):
        return {"plain": {"algo": "fedavg", "checkpoint_every": 1}, "up hill": {"algo": "fedsam", "rho": 0.1, "checkpoint_every": 1}}

    def measure(self, fed, rows):
        return {"norm": float(fed.w.norm())}

    def verdict(self, cells):
        return study.judge([study.differs(study.paired(cells["plain"], cells["up hill"], lambda r: r["norm"]))])

    def draw(self, cells, path):
        path.write_bytes(b"a figure")


def without_time(worlds):
    return {w: {c: [{k: v for k, v in r.items() if k not in ("seconds", "machine")} for r in rows] for c, rows in cells.items()} for w, cells in worlds.items()}


def row(seed, x, **more):
    return {"seed": seed, "x": x, **more}


def test_study_paired_differences_remove_what_seeds_share():
    a, b = [row(0, 10.0), row(1, 20.0), row(2, 30.0)], [row(2, 29.0), row(0, 9.0), row(1, 18.0)]
    x = lambda r: r["x"]                                                                                                         # noqa: E731
    assert study.paired(a, b, x) == [1.0, 2.0, 1.0]                                  # in another order, by seed
    assert study.paired(a, [row(0, 9.0), row(1, 0.0, diverged="boom"), row(5, 1.0)], x) == [1.0]
    assert study.paired(a, [row(0, None), row(1, math.nan), row(2, 29.0)], x) == [1.0]
    assert study.values([row(0, 1.0), row(1, None), row(2, math.nan), {"seed": 3, "diverged": "boom"}], x) == [1.0]
    # mean 4/3, standard deviation sqrt(1/3), standard error 1/3: four of them
    assert study.differs([1.0, 2.0, 1.0]) == 1 and study.differs([-1.0, -2.0, -1.0]) == -1
    assert study.differs([1.0, 2.0, -0.1]) == 0                                      # a sign is missing
    assert study.differs([0.1, 3.0, 0.1]) == 0                                       # mean 1.07, standard error 0.97: not two
    assert study.differs([0.0, 0.0]) == 0 and study.differs([1.0, 1.0]) == 1 and study.differs([1.0]) is None and study.differs([]) is None
    assert study.said([1.0, 2.0, 1.0]) == "+1.33 ± 0.58 (higher)" and study.said([1.0]) == "+1.00 (too few seeds)" and study.said([]) == "- (too few seeds)"
    assert study.spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_study_a_claim_is_judged_by_all_its_comparisons():
    for signs, word in (([1, 1], "Holds"), ([1, 0], "Holds in part"), ([1, None], "Holds in part"), ([1, -1], "Mixed"), ([-1, 0], "Refuted"), ([-1], "Refuted"),
                        ([0, None], "Not told apart"), ([None], "Not decided"), ([], "Not decided")):
        assert study.judge(signs) == word, signs
    up, down = [1.0, 1.0, 1.1], [-1.0, -1.0, -1.1]
    assert study.compared({"a": up, "b": down}, want=-1)[0] == [-1, 1]
    many = {str(n): [n + x for x in up] for n in range(8)}
    assert "8 of 8 higher (from +1.03 ± 0.06, 0, to +8.03 ± 0.06, 7)" in study.compared(many)[1]


def test_study_a_killed_experiment_continues_to_the_same_rows(tmp_path, monkeypatch):
    whole = study.conduct(Tiny("quick", tmp_path), tmp_path / "whole")
    assert [len(rows) for rows in whole[""].values()] == [2, 2] and all(r["norm"] > 0 and r["log"] for rows in whole[""].values() for r in rows)
    save, calls = experiment.save, []

    def killed(*args):
        save(*args)
        calls.append(1)
        if len(calls) in (2, 7):                                                     # in the first run, and after it
            raise KeyboardInterrupt
    monkeypatch.setattr(experiment, "save", killed)
    for n in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            study.conduct(Tiny("quick", tmp_path), tmp_path / "cut")
    assert len(list((tmp_path / "cut").rglob(f"{Tiny.name}.json"))) == 1                       # 4 checkpoints, less the 2 that were there
    cut = study.conduct(Tiny("quick", tmp_path), tmp_path / "cut")
    assert without_time(cut) == without_time(whole) and len(calls) == 16
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*.json*")}
    assert without_time(study.conduct(Tiny("quick", tmp_path), tmp_path / "cut")) == without_time(whole)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*.json*")}           # and does nothing when all is done
    for path in (tmp_path / "cut").rglob(f"{Tiny.name}.json"):                                 # trained, but killed while it was measured
        path.unlink()
    assert without_time(study.conduct(Tiny("quick", tmp_path), tmp_path / "cut")) == without_time(whole) and len(calls) == 16
    monkeypatch.setattr(Tiny, "name", "other")                                        # another experiment of the same runs only measures
    assert [r["norm"] for rows in study.conduct(Tiny("quick", tmp_path), tmp_path / "cut")[""].values() for r in rows] == [
        r["norm"] for rows in whole[""].values() for r in rows] and len(calls) == 16
    folder = next((tmp_path / "cut" / "quick").glob("fedavg-s0-????????"))
    with pytest.raises(experiment.UserError, match="other settings"):
        study.trained(folder, config.Config().check(), "")


def test_study_two_calls_share_the_runs(tmp_path):
    tries = []

    def busy_twice():
        tries.append(1)
        if len(tries) < 3:
            raise experiment.Busy("somebody is here")
        return "late"
    assert study.shared([busy_twice, lambda: "early"], wait=0.01) == ["late", "early"] and len(tries) == 3
    inside = []
    with pytest.raises(experiment.Busy):
        study.alone_in(tmp_path / "x", lambda: study.alone_in(tmp_path / "x", lambda: inside.append(1)))
    assert not inside and study.alone_in(tmp_path / "x", lambda: 5) == 5              # free again
    assert issubclass(experiment.Busy, experiment.UserError)


def test_study_a_cell_that_diverges_is_reported_and_breaks_nothing(tmp_path, monkeypatch):
    cells = Tiny.cells
    monkeypatch.setattr(Tiny, "cells", lambda self, world: {**cells(self, world), "boom": {"algo": "fedavg", "lr": 1e30, "clip": 0.0}})
    claim = Tiny("quick", tmp_path)
    worlds = study.conduct(claim, tmp_path / "runs")
    assert all("lr = 1e+30" in r["diverged"] for r in worlds[""]["boom"]) and "diverged" not in worlds[""]["plain"][0]
    assert "| boom | - | - | - | 2, 2 diverged |" in study.keep(claim, worlds, "a command")


def test_study_report_rewrites_what_lies_between_its_marks_and_nothing_else(tmp_path):
    claim, worlds = Tiny("quick", tmp_path / "results"), {"": {"plain": [], "up hill": []}}
    study.keep(claim, worlds, "a command")
    readme = tmp_path / "README.md"
    text = "above\n<!-- tiny -->\nold\n<!-- /tiny -->\nbelow \\1\n"
    readme.write_text(text)
    assert study.report(readme, tmp_path / "results") == ["tiny"]
    once = readme.read_text()
    assert once.startswith("above\n<!-- tiny -->\n") and once.endswith("<!-- /tiny -->\nbelow \\1\n") and "old" not in once
    assert all(words in once for words in ("Tiny things are small", "nobody", "they are large", "`a command`", "| plain |", "Not decided", "(results/tiny.png)"))
    study.report(readme, tmp_path / "results")
    assert readme.read_text() == once
    readme.write_text(once + "<!-- sharpness -->\n<!-- /sharpness -->\n")
    with pytest.raises(experiment.UserError, match="--experiment sharpness"):
        study.report(readme, tmp_path / "results")
    for cut_off in ("<!-- tiny -->\n", "<!-- verdicts -->\n"):
        readme.write_text(cut_off)
        with pytest.raises(experiment.UserError, match="no end of it"):
            study.report(readme, tmp_path / "results")
        assert readme.read_text() == cut_off
    readme.write_text("<!-- verdicts -->\nold\n<!-- /verdicts -->\n" + text)
    assert study.report(readme, tmp_path / "results") == ["tiny"]
    assert "| [`tiny`](#tiny) | Tiny things are small (nobody) | **Not decided** |\n<!-- /verdicts -->" in readme.read_text()
    large = Tiny("cpu", tmp_path / "results")
    large.says = "The largest size is shown"
    study.keep(large, worlds, "a command")
    study.keep(claim, worlds, "a command")                                           # quick again: leaves cpu where it is
    assert set(json.loads((tmp_path / "results" / "tiny.json").read_text())) == {"quick", "cpu"}
    readme.write_text(text)
    study.report(readme, tmp_path / "results")
    assert "The largest size is shown" in readme.read_text()


SIGNS = {"Holds": (1, 1, 1), "Refuted": (-1, -1, -1), "Not told apart": (1, -1, -0.9)}                 # of the effect, seed by seed


def invented(claim, effect):
    """Rows as `study.conduct` gives them: seeds share a level, and what the claim is about moves by `effect` in the claimed direction."""
    worlds = {}
    for world, label, cfg in claim.runs():
        e, level, treated = effect[cfg.seed], (0.0, 1.0, -0.5)[cfg.seed], 0.0
        if claim.name in ("accuracy", "oracle", "gradalign", "man", "fedsynth"):
            treated = 0.05 * e * {"accuracy": cfg.algo == "fedsynsam", "oracle": cfg.algo == "oracle", "gradalign": cfg.algo == "fedga", "man": cfg.man > 0,
                                  "fedsynth": cfg.algo == "fedsynth"}[claim.name]
        if claim.name == "hyper" and label not in ("default", "fedavg"):
            treated = 0.02 * (e - 1)                                                 # 0 when robust
        cosines = {"own": 0.0, "last_move": 0.0, "synthetic": 0.3 * e, "mixed": 0.1, "last_uncompressed": 0.1 * e}
        sharper = e * (2 + {"IID": 0, "Dir 0.6": 1, "Dir 0.1": 2}.get(label.split(", ")[0], 0)) * (cfg.compress != "identity")
        line = lambda t: {"round": t, "train_loss": 2 - 0.03 * t + 0.01 * level, "test_acc": 0.5 + 0.001 * t, "up": 1000 * t, "alignment": cosines,         # noqa: E731
                          "eigenvalue": 20 - 0.2 * t + level + sharper}
        r = {"world": world, "cell": label, "seed": cfg.seed, "fields": study.differing(cfg), "test_acc": 0.8 + 0.01 * level + treated, "val_acc": 0.8, "test_loss": 0.5,
             "train_loss": 0.4, "eigenvalue": 6 + level - 20 * treated, "trace": 70 + level, "sam": 0.1, "r": 5 + level - 20 * treated, "seconds": 9, "step_ms": 5.0, "down": 1,
             "up": 1000 * cfg.participation * cfg.rounds, "log": [line(t) for t in (10, 20, 30, 40)], "steps": [0, 5], "along": [cosines, cosines],
             "slice_at": [-1, 0, 1], "slice": [2, 1, 2], "plane_at": [-1, 0, 1], "plane": [[3, 2, 3], [2, 1, 2], [3, 2, 3]]}
        worlds.setdefault(world, {}).setdefault(label, []).append(r)
    for cells in worlds.values():
        claim.derive(cells)
    return worlds


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_claims_verdicts_follow_the_rows(name, tmp_path):
    claim = claims.CLAIMS[name]("cpu", tmp_path)
    for word, effect in SIGNS.items():
        cells = invented(claim, effect)[""]
        assert claim.verdict(cells).split(":")[0] == word
        single = {label: rows[:1] for label, rows in cells.items()}
        assert claim.verdict(single).startswith("Not decided")                       # one seed decides nothing
    lost = {label: [{**r, "diverged": "boom"} for r in rows] if n == len(cells) - 1 else rows for n, (label, rows) in enumerate(cells.items())}
    assert isinstance(claim.verdict(lost), str) and ", 3 diverged" in study.table(claim, lost)
    claim.draw(lost, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10000


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_claims_every_cell_of_every_size_is_legal(name, tmp_path):
    for size in study.SIZES:
        claim = claims.CLAIMS[name](size, tmp_path)
        runs = claim.runs()                                                          # each is checked
        places = [study.slug(f"{world} {label} s{cfg.seed}") for world, label, cfg in runs]
        assert len(set(places)) == len(places) == len({(w, cfg.hash()) for w, _, cfg in runs}), "two cells in one folder, or twice the same"
        assert {cfg.seed for *_, cfg in runs} == set(range(claim.seeds[size])) and claim.seeds[size] >= (1 if size == "quick" else 3)
        for *_, cfg in runs:
            config.compressor(cfg, 300_000 if size == "gpu" else 50890 if size == "cpu" else 6370)
    assert all((claim.says, claim.refuted, claim.source)) and claim.name == name and claim.refuted != claims.study.Claim.refuted


def test_claims_messages_of_equal_bytes_are_of_equal_bytes(tmp_path):
    for size, d in (("cpu", 50890), ("gpu", 300_000)):
        for _, label, cfg in claims.CLAIMS["fedsynth"](size, tmp_path).runs():
            if " bytes" in label and cfg.algo == "fedavg" and not (size == "gpu" and cfg.compress == "topk"):          # there an index has 19 to 24 bits
                budget = int(label.split(", ")[1].removesuffix(" bytes").replace(",", ""))
                assert 0.99 * budget < len(config.compressor(cfg, d).encode(randn(d).float(), seeded())) <= budget, label


def test_claims_eigenvalues_are_compared_where_the_losses_are_equal():
    lines = lambda *pairs: {"log": [{"train_loss": a, "eigenvalue": b} for a, b in pairs]}                                          # noqa: E731
    fast, slow = lines((1.0, 10.0), (0.5, 20.0), (0.2, 30.0)), lines((2.0, 5.0), (0.6, 40.0))
    assert claims.excess_at_equal_loss(slow, fast) == pytest.approx(40 - 18)         # fast passes 0.6 at 4/5 of the way from 10 to 20
    assert claims.excess_at_equal_loss(fast, slow) == pytest.approx(18 - 40) and claims.excess_at_equal_loss(fast, fast) == 0
    assert claims.excess_at_equal_loss(lines((3.0, 1.0), (1.5, 2.0)), fast) is None   # fast was below 1.5 before it was measured


def test_claims_shares_of_the_gap_need_a_gap():
    assert claims.relatives.shares({"a": [1.0, 1.0, 1.0], "oracle": [2.0, 2.0, 2.1]})["a"] == pytest.approx(3 / 6.1)
    assert claims.relatives.shares({"a": [1.0, 1.0], "oracle": [2.0, -2.0]}) == {}


def test_claims_disagreement_is_half_the_variance_of_full_gradients(bundled):
    fed = vision("fedavg", bundled, begin=1)
    g = torch.stack([sharpness.full_gradient(fed.task.apply, fed.w, fed.task.train, part) for part in fed.task.parts])
    assert claims.relatives.disagreement(fed) == pytest.approx(float(align.gradient_variance(g, torch.full((6,), 1 / 6, dtype=f64))), rel=1e-9)


def test_claims_timing_a_local_step_changes_nothing(bundled):
    fed = vision("feddyn", bundled, begin=1)
    before = (fed.w.clone(), fed.t, fed.up, fed.down, fed.recall(fed.clients(fed.t), fed.w))
    once = []
    fed.step = lambda *a: once.append(1) or loop.local_step(*a)
    steps = sum(map(len, fed.plans(fed.clients(fed.t), fed.t)))
    assert claims.relatives.seconds_of_a_step(fed, times=2) > 0 and len(once) == 2 * steps
    assert torch.equal(before[0], fed.w) and before[1:4] == (fed.t, fed.up, fed.down) and torch.equal(before[4], fed.recall(fed.clients(fed.t), fed.w))


def test_claims_an_experiment_from_its_command_to_its_files(tmp_path, capsys):
    words = ["--experiment", "oracle", "--size", "quick", "--out", tmp_path, "--results", tmp_path / "results"]
    code, out, err = main(capsys, *words)
    assert code == 0 and "| oracle |" in out and "Not decided" in out, err
    stored = json.loads((tmp_path / "results" / "oracle.json").read_text())["quick"]
    assert stored["command"] == "python run.py --experiment oracle --size quick" and stored["worlds"][""]["table"] in out and stored["machines"][0]["torch"] == torch.__version__
    assert [r["cell"] for r in stored["rows"]] == ["fedavg", "fedsam", "oracle"] and stored["rows"][2]["fields"]["oracle_images"] == 20
    assert config.Config(**{**stored["defaults"], **stored["rows"][1]["fields"]}).check().hash() == stored["rows"][1]["hash"]         # all settings are there
    assert (tmp_path / "results" / "oracle.png").stat().st_size > 10000 and len(list((tmp_path / "experiments" / "quick").glob("*/oracle.json"))) == 3
    assert main(capsys, *words)[:2] == (0, out)


def test_tune_picks_the_best_on_validation_images_and_sees_no_others(monkeypatch, tmp_path):
    class Result(dict):
        def __getitem__(self, key):
            assert key == "val_acc", f"tuning read {key}"
            return super().__getitem__(key)
    seen = []

    def run_of(cfg):                                                                 # best at lr 0.1, rho 0.2, but only at the end
        seen.append(cfg)
        late = cfg.rounds == 60
        return None if cfg.lr == 0.2 and cfg.rho == 0.2 else Result(val_acc=0.9 - abs(cfg.lr - 0.1) - (0.2 - cfg.rho if late else abs(0.1 - cfg.rho)) / 10, test_acc=1 - cfg.lr)
    tried = tune.halving("fedsam", {}, run_of)
    assert tried[-1][:2] == (60, {"lr": 0.1, "rho": 0.2}) and [cfg.rounds for cfg in seen] == [20] * 9 + [60] * 3 and {cfg.seed for cfg in seen} == {100}
    assert {(cfg.lr, cfg.rho) for cfg in seen[9:]} == {(0.1, r) for r in (0.05, 0.1, 0.2)} and len(tried) == 12
    with pytest.raises(experiment.UserError, match="diverged"):
        tune.halving("fedsam", {}, lambda cfg: None)
    assert all("test_acc" not in inspect.getsource(f) for f in vars(tune).values() if inspect.isfunction(f))
    assert set(baselines.METHODS) <= set(tune.GRID) and all(len(tune.settings(a)) == 9 for a in tune.GRID)
    for algo in baselines.METHODS:
        for size in study.SIZES:
            for world in study.WORLDS[size].values():
                (first, nine), (last, three) = tune.stages(world)
                assert first <= last and (nine, three) == (9, 3) and all(config.Config(**{**world, "algo": algo, "rounds": first, **s}).check() for s in tune.settings(algo))


def test_tune_keeps_winners_and_accuracy_uses_those_of_its_size(tmp_path, capsys):
    words = ["--tune", "fedsynsam", "--size", "quick", "--out", tmp_path, "--results", tmp_path / "results"]
    code, out, err = main(capsys, *words)
    table = tmp_path / "results" / "tuned.json"
    entry, = json.loads(table.read_text())
    assert code == 0 and "on validation images" in out and entry["command"] == "python run.py --tune fedsynsam --size quick" and len(entry["tried"]) == 12, err
    assert entry["val_acc"] == max(x for rounds, _, x in entry["tried"][-3:]) and entry["settings"] == entry["tried"][-1][1]
    for e in ({"size": "cpu", "method": "fedavg"}, {"size": "cpu", "method": "fedsynsam"}):
        tune.enter(table, {**entry, **e, "settings": {"lr": 0.05}})
    tune.enter(table, {**entry, "size": "cpu", "method": "fedavg", "settings": {"lr": 0.07}})
    assert len(table.read_text().splitlines()) == 5                                   # a line each, one for each method
    cells = claims.CLAIMS["accuracy"]("cpu", tmp_path / "results").cells("")
    assert cells["fedavg (lr 0.07)"]["lr"] == 0.07 and cells["fedsynsam raw (lr 0.05)"]["lr"] == 0.05 and "fedsam (not tuned)" in cells
    assert main(capsys, *words)[1] == out and len(json.loads(table.read_text())) == 3


def test_measure_every_adds_to_the_log_and_changes_nothing(tmp_path):
    fields = {**study.QUICK, "algo": "fedlesam-server", "rounds": 4, "eval_every": 2, "last": 2}
    (plain, a), (measured, b) = (study.trained(tmp_path / str(n), config.Config(**fields, measure_every=n).check(), "") for n in (0, 3))
    assert torch.equal(a.w, b.w) and {k: v for k, v in plain.items() if k not in ("seconds", "settings")} == {k: v for k, v in measured.items() if k not in ("seconds", "settings")}
    lines = experiment.read_log(tmp_path / "3")
    assert ["eigenvalue" in x for x in lines] == [False, False, True, False] and ["test_acc" in x for x in lines] == [False, True, True, True]
    assert lines[2]["alignment"]["own"] is not None and measured["averaged"] == [2, 4]
    assert not any("eigenvalue" in x for x in experiment.read_log(tmp_path / "0"))


def test_alignment_at_any_local_step_and_before_compression(bundled):
    fed = vision("fedavg", bundled, begin=2)
    clients, rows = fed.clients(2), torch.arange(240)
    true = sharpness.full_gradient(fed.task.apply, fed.w, fed.task.train, rows)
    own = [sam.cosine(fed.method.grad(fed.w, p[0]), true) for p in fed.plans(clients, 2)]
    assert sharpness.alignment(fed, rows, steps=0).own == pytest.approx(np.mean(own))           # at w itself, the first batch
    last, second, many, first = (sharpness.alignment(fed, rows, steps=s) for s in (None, 2, 99, 1))
    assert last.own == second.own == many.own != first.own and last.last_move == second.last_move != first.last_move
    assert torch.allclose(sharpness.last_update(fed), fed.move, rtol=1e-9, atol=1e-12) and last.last_uncompressed == pytest.approx(last.last_move)
    lossy = vision("fedavg", bundled, begin=1, compressor=TopK(50, f64))
    assert torch.allclose(sharpness.last_update(lossy), vision("fedavg", bundled, begin=1).move, rtol=1e-9, atol=1e-12) and (lossy.move != 0).sum() <= 200
    assert all(sharpness.last_update(vision(a, bundled, begin=1)) is None for a in ("scaffold", "fedga", "fedlesam-server")) and sharpness.last_update(vision("fedavg", bundled)) is None


def test_ceiling_oracle_is_fedsynsam_whose_synthetic_images_are_everybodys(bundled):
    syn, oracle = vision("fedsynsam", bundled, begin=3, mix=1.0, rho=0.5), vision("oracle", bundled, begin=3, rho=0.5, oracle_images=40)
    rows = oracle.method.peeked
    assert torch.equal(oracle.task.train.y[rows[:, 0]].bincount(), torch.full((10,), 4)) and len(rows[:, 0].unique()) == 40        # class-balanced
    x, y, _ = oracle.task.train.batch(rows)
    syn.method.synthetic = synth.Synthetic(x, 1e3 * F.one_hot(y, 10).double(), None)
    oracle.w = syn.w.clone()
    before = oracle.w
    for fed in (syn, oracle):
        fed.round()
    assert torch.allclose(oracle.w, syn.w, rtol=1e-9, atol=1e-12) and (oracle.w - before).norm() > 0.01
    sam_way = vision("fedsam", bundled, begin=3, rho=0.5)
    sam_way.w = before
    sam_way.round()
    assert (sam_way.w - oracle.w).norm() > 1e-3
    assert torch.equal(vision("oracle", bundled, begin=1, oracle_images=40).method.peeked, rows)                                # the same in every round


# ------------------------------------------------------------------------------------------------------- the project
def chapters():
    return [importlib.import_module(p.stem) for p in sorted(HERE.glob("*.py")) if not p.stem.startswith("test")]


NUMBERS = ["bits", "compress", "sam", "synth", "sharpness", "data", "split", "models", "landscape", "fl", "fedsynsam", "align", "ceiling", "baselines", "tasks", "memory", "loop"]         # the chapters whose functions take tensors


def test_every_public_docstring_says_what_goes_in_and_out_and_where_it_is_from():
    bare = []
    for module in chapters():
        assert len(module.__doc__.splitlines()) > 5 and "Read next" in module.__doc__, module
        for thing in vars(module).values():
            if getattr(thing, "__module__", None) != module.__name__ or not (inspect.isfunction(thing) or inspect.isclass(thing)):
                continue
            members = [m for m in vars(thing).values() if inspect.isfunction(m)] if inspect.isclass(thing) else []
            for t in (thing, *members):
                inherited = t is not thing and any(hasattr(base, t.__name__) for base in thing.__mro__[1:])
                codec = t.__name__ in ("encode", "decode")                           # described by their class
                no_tensors = t.__name__ in ("import_torchvision", "generator", "Diverged", "check_k")
                if t.__name__ == "<lambda>" or t.__name__.startswith("_") or inherited or codec or no_tensors and t.__doc__:
                    continue
                doc = t.__doc__ or ""
                if len(doc) < 20 or module.__name__ in NUMBERS and not ("[" in doc and "Source:" in doc):
                    bare.append(f"{module.__name__}.{t.__qualname__}")
    assert not bare, bare


def reading_order():
    """The README's table: [(chapter, what it teaches), ...]."""
    return re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", (HERE / "README.md").read_text(), re.M)


def test_every_chapter_says_which_to_read_next_in_the_order_of_the_readme():
    order = [c for c, _ in reading_order()]
    for this, then in zip(order, order[1:]):
        assert f"Read next: {then}.py" in (HERE / f"{this}.py").read_text(), this


def test_imports_form_a_line_and_star_imports_do_not_exist():
    order = [c for c, _ in reading_order()]
    assert order[0] == "bits" and {c.__name__ for c in chapters()} | {"test_all"} == set(order)
    for name in order:
        text = (HERE / f"{name}.py").read_text()
        found = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
        assert found & set(order) <= set(order[:order.index(name)]), name
        assert not re.search(r"^from \w+ import \*", text, re.M)


def readme_commands():
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


def test_readme_begins_with_the_two_commands():
    assert readme_commands()[:2] == ["pip install -r requirements.txt && python run.py --algo fedsynsam",
                                     "pip install -r requirements.txt && python -m pytest -q test_all.py"]


@pytest.mark.parametrize("command", [c for c in readme_commands() if "python run.py" in c and "--procs" not in c])
def test_readme_commands_work(command, tmp_path, capsys, monkeypatch):
    """Every command of the README, in --quick mode and smaller still, where its folders go to a temporary place."""
    words = command[command.index("python run.py"):].split()[2:]
    if "--report" in words:
        (tmp_path / "README.md").write_text("no marks")
        monkeypatch.setattr(experiment, "HERE", tmp_path)
    if "--experiment" in words or "--tune" in words:
        words += ["--size", "quick", "--out", str(tmp_path), "--results", str(tmp_path)]
    elif not {"--explain", "--list", "--help", "--resume", "--report"} & set(words):
        words += [*SMALL, "--out", str(tmp_path)]
    if "--preset" in words:
        words += ["--dataset", "bundled", "--rounds", "3", "--local-epochs", "0", "--batch", "4"]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)                          # its test is elsewhere; here it would take half a minute a run
    if "--resume" in words:
        assert main(capsys, *SMALL, "--out", tmp_path, "--algo", "fedavg", "--name", "x")[0] == 0
        words[words.index("--resume") + 1] = str(tmp_path / "x")
    if "--dataset" in words and words[words.index("--dataset") + 1].endswith(".npz"):
        words[words.index("--dataset") + 1] = str(data.BUNDLED)
    if "fashionmnist" in words:                                                       # three thousand of them
        idx_folder(tmp_path / "raw", 3000)
        monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "raw")
    code, out, err = main(capsys, *words)
    assert code == 0 and len(out) > (100 if "--report" not in words else 10), err


def test_readme_commands_between_words_are_understood():
    """Those in the text and its tables: too long to run here, but every flag and value is checked."""
    commands = re.findall(r"`python run\.py ([^`]*)`", (HERE / "README.md").read_text())
    assert len(commands) > 10
    for words in commands:
        args = run.parser().parse_args(words.split())
        assert args.experiment in claims.CLAIMS and args.size in study.SIZES if args.experiment else args.tune in tune.GRID if args.tune else run.configs_of(args), words


def test_readme_single_runs_are_what_their_commands_ask_for():
    for row in json.loads((HERE / "results" / "asides.json").read_text()):
        asked = run.configs_of(run.parser().parse_args(row["command"].split()[2:]))
        assert (row["algo"], row["seed"]) in [(c.algo, c.seed) for c in asked] and row["averaged"][-1] == asked[0].rounds, row["command"]


@pytest.mark.parametrize("command", [c for c in readme_commands() if not c.startswith("pip") and "tradeoff" not in c and (not c.startswith("python run.py") or "--procs" in c)])
def test_readme_tools_and_torchrun_work(command, tmp_path):
    """The other commands of the README, in their small form."""
    words = command.split()
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SMALL, "--out", str(tmp_path)]
    elif "--procs" in words:
        words = [sys.executable, *words[1:], *SMALL, "--out", str(tmp_path)]
    else:
        words = [sys.executable, *words[1:], "--small", "--out", str(tmp_path if "growth" in command else tmp_path / "new.json")] + ["--device", "cpu"] * ("gpu" in command)
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and len(done.stdout) > 100 and any(tmp_path.iterdir()), done.stderr


def test_readme_table_of_bits_against_error_is_what_its_command_prints():
    assert "python -m tools.tradeoff" in readme_commands()
    out = subprocess.run([sys.executable, "-m", "tools.tradeoff"], cwd=HERE, capture_output=True, text=True, check=True).stdout
    rows = lambda text: {name: values for name, values in re.findall(r"^\| (`.*?`) \|([^|`]*\|[^|`]*\|[^|`]*\|[^|`]*\|[^|`]*)\|$", text, re.M)}     # noqa: E731
    printed, shown = rows(out), rows((HERE / "README.md").read_text().split("## Bits against error")[1])
    assert len(printed) == len(tradeoff.SETTINGS) + 1 and list(printed) == list(shown)
    for name in list(printed)[1:]:                                                   # [0] is the headline
        numbers = [[float(v) for v in table[name].split("|")] for table in (printed, shown)]
        assert numbers[0][:3] == pytest.approx(numbers[1][:3], rel=0.1, abs=0.02), name
        assert numbers[0][3:] == pytest.approx(numbers[1][3:], rel=0.5, abs=0.05), name        # another machine trains another update


def test_readme_first_table_is_that_of_the_stored_runs():
    runs = json.loads((HERE / "results" / "default" / "results.json").read_text())
    assert len(runs) == 15 and show.table(runs) + "\n" in (HERE / "README.md").read_text()


def test_readme_claims_are_what_the_stored_rows_say(tmp_path):
    """Tables and verdicts follow from the numbers in results/ by today's rules, and the README shows them."""
    text = (HERE / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "results").symlink_to(HERE / "results")
    names = study.report(tmp_path / "README.md", tmp_path / "results", tuned=tune.table(tmp_path / "results" / "tuned.json"))
    assert (tmp_path / "README.md").read_text() == text and "oracle" in names and "python run.py --tune fedsynsam --size cpu" in text
    for name in names:
        for size, part in json.loads((HERE / "results" / f"{name}.json").read_text()).items():
            claim, worlds = claims.CLAIMS[name](size), {}
            for row in part["rows"]:
                worlds.setdefault(row["world"], {}).setdefault(row["cell"], []).append(row)
            for world, cells in worlds.items():
                claim.derive(cells)
                assert part["worlds"][world] == {"table": study.table(claim, cells), "verdict": claim.verdict(cells)}, name


def test_readme_round_in_plain_pytorch_is_the_loops_round(monkeypatch):
    """The README shows one whole round without this project; fl.py must give the same weights."""
    monkeypatch.chdir(HERE)
    space = {}
    exec(re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1), space)
    pack = np.load(data.BUNDLED)
    train = data.Images(torch.tensor(pack["x_train"][:120, None]), torch.tensor(pack["y_train"][:120]).long(), torch.zeros(1),
                        torch.tensor([255.0]), list(range(10)))
    cfg = config.Config(algo="fedsam", model="mlp", clients=4, participation=4, local_epochs=space["K"], batch=30, lr=space["eta"], rho=space["rho"])
    net = models.build("mlp", (1, 28, 28), 10, hidden=16, seed=0)
    fed = loop.Federation(fl.FedSAM(tasks.Task(net, train, list(torch.arange(120).split(30)), cfg), cfg), TopK(space["k"]))
    fed.round()
    assert torch.allclose(fed.w, space["w"], rtol=1e-4, atol=1e-6) and (fed.w - net.w0).abs().max() > 1e-3
