"""What an answer must satisfy: theorems as tests, in which m is the module under test.

A test is called test_EXERCISE_what. Its docstring is the sentence that the grader prints. The first
test of an exercise takes a small input and the slow loop of exercises.md, which is the definition.
All are in float64 and draw from fixed seeds, so they say the same on every run.
"""

import math
import struct

import numpy as np
import torch
from torch.nn import functional as F

import fl
from compress import Identity
from tests.toys import Linear, Quadratics
from vision import data, models

f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


def vector(*numbers):
    return torch.tensor(numbers, dtype=f64)


def same(yours, expected, what, tolerance=1e-9):
    """AssertionError that shows both, unless they are equal up to rounding."""
    assert yours is not None, f"{what}\n  yours:    None; a `return` is missing"
    mine, right = (torch.as_tensor(plain(x), dtype=f64).detach() for x in (yours, expected))
    shapes = mine.shape == right.shape
    close = shapes and torch.allclose(mine, right, rtol=tolerance, atol=tolerance)
    seen = f"{what}\n  yours:    {shown(mine)}\n  expected: {shown(right)}"
    if shapes and mine.numel() > 1:  # eight numbers may look equal
        seen += f"\n  largest difference {(mine - right).abs().max():.2g}"
    assert close, seen


def plain(x):
    """x, if it is no tensor of a class of its own, which could call itself equal to anything."""
    kind = type(x)
    own = isinstance(x, torch.Tensor) and kind is not torch.Tensor
    assert not own, f"give a plain torch.Tensor, and no {kind.__name__}"
    return x


def shown(x):
    """At most eight numbers of a tensor."""
    numbers = ", ".join(f"{v:.5g}" for v in x.reshape(-1)[:8].tolist())
    more = ", ..." if x.numel() > 8 else ""
    return f"[{numbers}{more}]" + (f"  of shape {list(x.shape)}" if x.dim() > 1 else "")


def near(yours, expected, error, what):
    """AssertionError unless a mean lies within five of its standard errors."""
    ok = abs(yours - expected) <= 5 * error + 1e-12
    spread = "" if error > 1e-12 else ", the same in all draws: nothing is random"
    assert ok, f"{what}\n  yours:    {yours:.4g} +- {error:.2g}{spread}\n  expected: {expected:.4g}"


def through(compressor, x, seed=0):
    return plain(compressor.decode(compressor.encode(x, seeded(seed)), len(x)))


def many(compressor, x, draws=1500):
    """x_hat for many draws -> [draws, d]."""
    g = seeded(1)
    hats = [compressor.decode(compressor.encode(x, g), len(x)) for _ in range(draws)]
    return torch.stack([plain(x_hat) for x_hat in hats])


def unbiased(hats, x, what):
    for j in range(len(x)):
        error = float(hats[:, j].std()) / len(hats) ** 0.5
        near(float(hats[:, j].mean()), float(x[j]), error, f"{what}, coordinate {j}")


# ------------------------------------------------------------------------------------------ topk


def slow_topk(x, k):
    """x_hat, where the k largest |x_j| stay and the rest is 0."""
    x_hat = [0.0] * len(x)
    for j in sorted(range(len(x)), key=lambda j: -abs(x[j]))[:k]:
        x_hat[j] = x[j]
    return x_hat


def test_topk_small(m):
    """x_hat of [0.5, -3, 2, 0, -1] for k = 2, and of random vectors, is that of the loop."""
    x = vector(0.5, -3, 2, 0, -1)
    same(through(m.TopK(2, f64), x), slow_topk(x.tolist(), 2), "x_hat of [0.5, -3, 2, 0, -1], k=2")
    for d, k in ((1, 1), (7, 7), (50, 6)):
        x = randn(d, seed=d)
        same(through(m.TopK(k, f64), x), slow_topk(x.tolist(), k), f"x_hat for d = {d}, k = {k}")


def test_topk_error(m):
    """The squared error is at most (1 - k/d) ||x||^2, and equal to it if all |x_j| are equal."""
    for x in (randn(20), vector(*[1.0, -1.0] * 10)):
        error = float((through(m.TopK(5, f64), x) - x).square().sum())
        bound = (1 - 5 / 20) * float(x.square().sum())
        assert error <= bound + 1e-9, f"the error is {error:.4g}, above {bound:.4g}"
    same(error, bound, "the error where all |x_j| are equal")


def test_topk_wire(m):
    """The buffer holds k floats and k places of ceil(log2 d) bits, both in the order of places."""
    x = torch.tensor([0.5, 2, -3, 0, -1])  # the larger one comes second
    buffer = m.TopK(2).encode(x)
    assert buffer.dtype == torch.uint8, f"the buffer is {buffer.dtype}, and must be uint8"
    same(len(buffer), 8 + 1 + 4, "bytes: two floats, two places of 3 bits, the checksum")
    same(
        struct.unpack("<2f", bytes(buffer[:8].tolist())),
        [2, -3],
        "the floats of [0.5, 2, -3, 0, -1]",
    )
    same(int(buffer[8]), 1 + (2 << 3), "the byte with the places 1 and 2")
    same(m.TopK(2).decode(buffer, 5), [0, 2, -3, 0, 0], "the decoded buffer")


# ----------------------------------------------------------------------------------------- randk


def slow_randk(x, places):
    """x_hat for the places that were drawn: x_j times d/k there, 0 elsewhere."""
    x_hat = [0.0] * len(x)
    for j in places:
        x_hat[j] = x[j] * len(x) / len(places)
    return x_hat


def test_randk_small(m):
    """x_hat is x times d/k at the k places that the seed stands for, and 0 elsewhere."""
    x = vector(1, 2, 3, 4, 5, 6)
    c = m.RandK(2, True, f64)
    buffer = c.encode(x, seeded())
    seed = int.from_bytes(bytes(buffer[:8].tolist()), "little")
    places = c.places(seed, 6).tolist()
    same(c.decode(buffer, 6), slow_randk(x.tolist(), places), f"x_hat for the places {places}")
    same(c.decode(buffer, 6), c.decode(buffer, 6), "the same buffer decoded twice")


def test_randk_unbiased(m):
    """The mean of x_hat is x, and the mean squared error is (d/k - 1) ||x||^2."""
    x = randn(8)
    hats = many(m.RandK(2, True, f64), x)
    unbiased(hats, x, "mean of x_hat")
    errors = (hats - x).square().sum(1)
    error = float(errors.std()) / len(errors) ** 0.5
    near(float(errors.mean()), 3 * float(x.square().sum()), error, "mean squared error")


def test_randk_masking(m):
    """Not scaled, x_hat is x at the places, and the mean squared error (1 - k/d) ||x||^2."""
    x = randn(8)
    hats = many(m.RandK(2, False, f64), x, 800)
    kept = hats != 0
    same(hats[kept], x.expand_as(hats)[kept], "x_hat where it is not 0")
    same(kept.sum(1), torch.full((800,), 2), "numbers of coordinates kept")
    errors = (hats - x).square().sum(1)
    error = float(errors.std()) / len(errors) ** 0.5
    near(float(errors.mean()), 0.75 * float(x.square().sum()), error, "mean squared error")


def test_randk_wire(m):
    """The buffer holds the seed and the k floats x_j as drawn; the generator decides the seed."""
    x = torch.arange(1.0, 21)
    c = m.RandK(3)
    buffer = c.encode(x, seeded())
    same(len(buffer), 8 + 12 + 4, "bytes: the seed, three floats, the checksum")
    drawn = c.places(int.from_bytes(bytes(buffer[:8].tolist()), "little"), 20)
    same(struct.unpack("<3f", bytes(buffer[8:20].tolist())), x[drawn], f"x at the places {drawn}")
    same(c.encode(x, seeded(5)), c.encode(x, seeded(5)), "two buffers from equal generators")
    places = {tuple(through(c, x, seed).nonzero().view(-1).tolist()) for seed in range(10)}
    assert len(places) > 5, f"ten seeds gave only {len(places)} different sets of places"


# ------------------------------------------------------------------------------------------ qsgd


def slow_qsgd(x, levels, scale, noise):
    """x_hat of one bucket, if noise [d] are the random numbers in 0..1."""
    size = max(abs(v) for v in x) if scale == "max" else math.sqrt(sum(v * v for v in x))
    x_hat = []
    for v, r in zip(x, noise):
        u = levels * abs(v) / size
        level = math.floor(u) + (1 if r < u - math.floor(u) else 0)
        x_hat.append(math.copysign(size * level / levels, v))
    return x_hat


def test_qsgd_small(m):
    """The scales are max |x_j| or ||x||, and each |x_j| goes to one of its two grid points."""
    rows = vector(3, -1, 0, 2).view(1, 4)
    same(m.QSGD(3, "max", 0, f64).bucket_scales(rows), [3], "scale 'max' of [3, -1, 0, 2]")
    same(m.QSGD(3, "l2", 0, f64).bucket_scales(rows), [14**0.5], "scale 'l2' of [3, -1, 0, 2]")
    for scale in ("max", "l2"):
        x = randn(6, seed=3)
        low = slow_qsgd(x.tolist(), 3, scale, [1.0] * 6)
        high = slow_qsgd(x.tolist(), 3, scale, [0.0] * 6)
        for seed in range(20):
            for j, v in enumerate(through(m.QSGD(3, scale, 0, f64), x, seed).tolist()):
                grid = [low[j], high[j]]
                nearest = min(grid, key=lambda g: abs(g - v))
                near_it = ", ".join(f"{g:.5g}" for g in grid)
                same(
                    v,
                    nearest,
                    f"x_hat_{j} of x_{j} = {x[j]:.5g}, {scale}; its grid points: {near_it}",
                )


def test_qsgd_unbiased(m):
    """The mean of x_hat is x, with one bucket and with several, for both scales."""
    x = randn(12)
    for levels, scale, bucket in ((1, "max", 0), (1, "l2", 0), (3, "l2", 5)):
        name = f"mean of x_hat, {levels} levels, scale {scale}, bucket {bucket}"
        unbiased(many(m.QSGD(levels, scale, bucket, f64), x, 400), x, name)


def test_qsgd_variance(m):
    """The mean squared error of each bucket is (scale / s)^2 sum_j p_j (1 - p_j)."""
    x = randn(12)
    for s, scale, bucket in ((1, "l2", 0), (4, "max", 0), (4, "l2", 5)):
        exact = 0.0
        for part in x.split(bucket or 12):
            size = float(part.norm() if scale == "l2" else part.abs().max())
            p = (s * part.abs() / size) % 1
            exact += (size / s) ** 2 * float((p * (1 - p)).sum())
        errors = (many(m.QSGD(s, scale, bucket, f64), x, 600) - x).square().sum(1)
        error = float(errors.std()) / len(errors) ** 0.5
        near(float(errors.mean()), exact, error, f"mean squared error, s = {s}, scale {scale}")


def test_qsgd_zeros(m):
    """A bucket of zeros stays 0, and no level lies above s, also in float32."""
    same(through(m.QSGD(3, "l2", 0, f64), torch.zeros(5, dtype=f64)), [0.0] * 5, "x_hat of zeros")
    x = randn(1000)
    largest = through(m.QSGD(5, "max", 0, f64), x).abs().max()
    assert largest <= x.abs().max() * (1 + 1e-9), "a level lies above s"
    c = m.QSGD(2**15 - 1, "max", 0)
    for size in (0.0, 1.0):  # 0 / 0; and u + r, which float32 may round up to s + 1
        rows = torch.full((1, 20_000), size)
        found = c.random_levels(rows, c.bucket_scales(rows), seeded())
        same(found, size * c.levels + 0 * rows, f"levels of a bucket in which all x_j are {size:g}")


def test_qsgd_draws(m):
    """Each coordinate has a random number of its own, and the generator decides all of them."""
    x, c = torch.cat([torch.ones(1), torch.full((99,), 0.5)]), m.QSGD(1, "max", 0)
    kept = float((through(c, x)[1:] != 0).double().mean())
    assert 0.2 < kept < 0.8, (
        f"of 99 equal coordinates of a bucket {100 * kept:.0f} % are rounded up"
    )
    same(through(c, x, 3), through(c, x, 3), "x_hat from equal generators")
    same(through(m.QSGD(3, "l2", 5), randn(12).float()).shape, [12], "the shape, in float32")


# -------------------------------------------------------------------------------------- feedback


class Largest:
    """A compressor for this exercise: only the largest |x_j| stays. Its buffer is a list."""

    def encode(self, x, generator=None):
        j = int(x.abs().argmax())
        return [j, float(x[j])]

    def decode(self, buffer, d):
        x_hat = torch.zeros(d, dtype=f64)
        x_hat[buffer[0]] = buffer[1]
        return x_hat


class Noisy(Largest):
    """It keeps a coordinate at random."""

    def encode(self, x, generator=None):
        j = int(torch.randint(len(x), (1,), generator=generator))
        return [j, float(x[j])]


def slow_feedback(updates):
    """What the server decodes and the residual after it, if only the largest |p_j| is sent."""
    e, seen = [0.0] * len(updates[0]), []
    for x in updates:
        p = [a + b for a, b in zip(e, x)]
        j = max(range(len(p)), key=lambda j: abs(p[j]))
        sent = [p[j] if i == j else 0.0 for i in range(len(p))]
        e = [a - b for a, b in zip(p, sent)]
        seen.append((sent, e))
    return seen


def test_feedback_small(m):
    """The updates [3, 2], [0, 2], [1, 0] are sent as the loop sends them."""
    updates, e = [[3.0, 2.0], [0.0, 2.0], [1.0, 0.0]], torch.zeros(2, dtype=f64)
    for t, (sent, residual) in enumerate(slow_feedback(updates)):
        buffer, e = m.with_feedback(Largest(), vector(*updates[t]), e)
        same(Largest().decode(buffer, 2), sent, f"what the server decodes in round {t}")
        same(e, residual, f"the residual after round {t}")


def test_feedback_telescopes(m):
    """Everything that was sent plus the last residual is the sum of all updates."""
    e, sent, total = torch.zeros(9, dtype=f64), 0, 0
    for t in range(40):
        x = randn(9, seed=t)
        buffer, e = m.with_feedback(Largest(), x, e)
        sent, total = sent + Largest().decode(buffer, 9), total + x
    same(sent + e, total, "sum of what was sent, plus the residual")
    assert e.norm() < 60, f"the residual grew to {float(e.norm()):.0f}; it is never sent"


def test_feedback_generator(m):
    """The random numbers of the compressor come from the generator that was given."""
    x, e = randn(50), torch.zeros(50, dtype=f64)
    first, second = (m.with_feedback(Noisy(), x, e, seeded(3))[0] for _ in range(2))
    same(first, second, "two buffers from equal generators")
    buffer, residual = m.with_feedback(Noisy(), x, e, seeded(3))
    same(Noisy().decode(buffer, 50) + residual, x, "what was sent plus the residual; encode once")


# --------------------------------------------------------------------------------------- perturb


def slow_perturb(w, u, rho):
    """w + rho u / ||u||, and w if u is 0."""
    norm = math.sqrt(sum(v * v for v in u))
    return [a + rho * b / norm if norm > 0 else a for a, b in zip(w, u)]


def test_perturb_small(m):
    """w = [1, 2], u = [3, 4] and rho = 0.5 give [1.3, 2.4]; u = 0 gives w."""
    same(m.perturb(vector(1, 2), vector(3, 4), 0.5), [1.3, 2.4], "w = [1, 2], u = [3, 4]")
    same(m.perturb(vector(1, 2), vector(0, 0), 0.5), [1.0, 2.0], "w = [1, 2], u = [0, 0]")
    w, u = randn(5), randn(5, seed=1)
    same(m.perturb(w, u, 0.1), slow_perturb(w.tolist(), u.tolist(), 0.1), "random w and u")


def test_perturb_distance(m):
    """The point is rho away from w, however long u is."""
    for scale in (1e-6, 1.0, 1e6):
        away = m.perturb(randn(100), scale * randn(100, seed=1), 0.3) - randn(100)
        same(away.norm(), 0.3, f"the distance where ||u|| is about {10 * scale:g}", 1e-6)


def test_perturb_ascends(m):
    """No other point at the distance rho has a larger value of the linear loss <u, w>."""
    w, u = randn(6), randn(6, seed=1)
    best = float(u @ m.perturb(w, u, 0.5))
    for seed in range(200):
        e = randn(6, seed=seed + 2)
        other = float(u @ (w + 0.5 * e / e.norm()))
        assert other <= best + 1e-9, f"the loss is {best:.4g}, and {other:.4g} at another point"


# -------------------------------------------------------------------------------------- fedlesam


def quadratics():
    """Three clients with different curvatures and minima."""
    return Quadratics(torch.rand(3, 4, generator=seeded(), dtype=f64) + 0.5, 3 * randn(3, 4), K=3)


def slow_fedlesam(models_of_the_client):
    """The directions of a client whose rounds began at these global models, one after the other."""
    directions, w_old = [], models_of_the_client[0]
    for w_t in models_of_the_client:
        directions.append([a - b for a, b in zip(w_old, w_t)])
        w_old = w_t
    return directions


def test_fedlesam_small(m):
    """A client that receives [1, 1], [2, 0], [2, 5] has the directions of the loop."""
    method, mine = m.FedLESAM(quadratics()), None
    received = [vector(1, 1, 0, 0), vector(2, 0, 0, 0), vector(2, 5, 0, 0)]
    for t, expected in enumerate(slow_fedlesam([w.tolist() for w in received])):
        now = {"w": received[t]}
        mine = method.first_memory(now) if mine is None else mine
        for step in range(3):  # the same in all steps, wherever w is
            u = method.direction(randn(4, seed=step), None, now, mine)
            same(u, expected, f"u in the client's round {t}")
        sent, mine = method.upload(received[t] + 7, now, mine, 0.1)
        same(sent["update"], [7.0] * 4, "the update, which must stay w - w^t")
        kept, before = mine, dict(mine)
        method.upload(received[t], {"w": received[t] + 1}, kept, 0.1)
        ok = kept.keys() == before.keys() and all(kept[n] is before[n] for n in before)
        assert ok, "`upload` changes `mine` in place; return a new dict"


def test_fedlesam_participation(m):
    """w_old is the model of this client's last round, whatever other clients did since."""

    class Watched(m.FedLESAM):
        def point(self, w, batch, received, mine):
            u = self.direction(w, batch, received, mine)
            seen.append((received["w"], u))
            return w + 0.01 * u, mine

    seen, task = [], quadratics()
    f = fl.Federation(Watched(task, lr=0.05), Identity(f64), participation=1)
    last = {}
    for _ in range(12):
        (client,) = f.choose()
        seen.clear()
        f.round()
        received, u = seen[0]
        same(u, last.get(client, received) - received, f"u of client {client} in round {f.t}")
        last[client] = received


def test_fedlesam_ascends(m):
    """After a step of gradient descent u has a positive product with the gradient: it ascends."""
    task = quadratics()
    method, w = m.FedLESAM(task), randn(4)
    g = torch.stack([task.gradient(i, w) for i in range(3)]).mean(0)
    mine = method.first_memory({"w": w})
    _, mine = method.upload(w, {"w": w}, mine, 0.1)
    u = method.direction(w, None, {"w": w - 0.01 * g}, mine)
    assert u @ g > 0, f"<u, gradient> = {float(u @ g):.3g}, but it must be positive"


# ------------------------------------------------------------------------------------- dirichlet


def slow_dirichlet(labels, N, rng, alpha):
    """The definition, one draw after the other -> N lists of image numbers."""
    C = max(labels) + 1
    left = [[j for j in range(len(labels)) if labels[j] == c] for c in range(C)]
    prior = [rng.dirichlet([alpha] * C) + 1e-12 for i in range(N)]
    parts = [[] for i in range(N)]
    for turn in range(len(labels) // N):
        for i in rng.permutation(N):
            possible = [c for c in range(C) if left[c]]
            p = np.array([prior[i][c] for c in possible])
            c = possible[rng.choice(len(possible), p=p / p.sum())]
            parts[i].append(left[c].pop(rng.integers(len(left[c]))))
    return parts


def concentration(parts, labels):
    """The sum of the squared class shares of each client: 1/C if even, 1 if one class -> [N]."""
    C = max(labels) + 1
    counts = [np.bincount(np.array(labels)[np.asarray(part)], minlength=C) for part in parts]
    return np.array([((n / n.sum()) ** 2).sum() for n in counts])


SPLIT = [c for c in range(5) for _ in range(80)]  # 400 labels of 5 classes


def test_dirichlet_small(m):
    """Every client gets n // N image numbers, and no image goes to two of them."""
    for labels, N in (([0, 0, 0, 1, 1, 1], 3), (SPLIT, 7)):
        parts = m.dirichlet(np.array(labels), N, np.random.default_rng(0), alpha=0.5)
        same([len(p) for p in parts], [len(labels) // N] * N, "numbers of images")
        together = sorted(int(j) for p in parts for j in p)
        assert len(set(together)) == len(together), "an image went to two clients"
        assert set(together) <= set(range(len(labels))), "there is a number of no image"


def test_dirichlet_concentration(m):
    """The clients are as concentrated on few classes as those of the loop, at every alpha."""
    for alpha in (0.1, 1.0, 1000.0):
        means = []
        for split in (m.dirichlet, slow_dirichlet):
            found = [split(np.array(SPLIT), 8, np.random.default_rng(s), alpha) for s in range(12)]
            means.append([concentration(parts, SPLIT).mean() for parts in found])
        yours, expected = np.mean(means, 1)
        error = math.hypot(*(np.std(x) / 12**0.5 for x in means))
        near(yours, expected, error, f"sum of squared class shares at alpha = {alpha}")


def test_dirichlet_turns(m):
    """The first clients are not more concentrated than the last ones: they take turns."""
    first, last = [], []
    for seed in range(120):
        parts = m.dirichlet(np.array(SPLIT), 100, np.random.default_rng(seed), 0.1)
        c = concentration(parts, SPLIT)
        first.append(c[:25].mean())
        last.append(c[-25:].mean())
    error = math.hypot(np.std(first), np.std(last)) / 120**0.5
    near(np.mean(first), np.mean(last), error, "concentration of the first and the last clients")


def test_dirichlet_random(m):
    """Another state of rng gives another split, and the same state the same one."""
    y = np.array(SPLIT)
    one, two, other = (m.dirichlet(y, 4, np.random.default_rng(s), 1.0) for s in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, two)), "rng does not decide the split"
    assert not all(np.array_equal(a, b) for a, b in zip(one, other)), "rng has no influence"


# ---------------------------------------------------------------------------------------- unroll


def small_network(w, x):
    """tanh hidden layer of two units on three pixels, two classes; d = 10."""
    h = torch.tanh(x.flatten(1) @ w[:6].view(3, 2))
    return h @ w[6:].view(2, 2)


def slow_unroll(apply, w, batches, step):
    """Gradient descent by hand, with nothing to differentiate afterwards."""
    for x, y in batches:
        v = w.clone().requires_grad_()
        scores = apply(v, x)
        loss = -(y.softmax(1) * scores.log_softmax(1)).sum() / len(x)
        loss.backward()
        w = w - step * v.grad
    return w


def synthetic():
    return randn(4, 1, 1, 3, seed=1), randn(4, 2, seed=2), torch.tensor(0.3, dtype=f64)


def test_unroll_small(m):
    """One step, three steps and no step end where the loop ends."""
    (X, Y, a), w = synthetic(), randn(10)
    for M in (1, 3, 0):
        end = m.unroll(small_network, w, [(X, Y)] * M, a)
        same(end, slow_unroll(small_network, w, [(X, Y)] * M, a), f"theta_{M}")


def test_unroll_order(m):
    """The batches are used one after the other, each at the point where the last step ended."""
    (X, Y, a), w = synthetic(), randn(10)
    batches = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    end = m.unroll(small_network, w, batches, a)
    same(end, slow_unroll(small_network, w, batches, a), "theta_2 from two different batches")


def test_unroll_differentiable(m):
    """The gradient of L with respect to images, labels and step is that of finite differences."""
    w, target = randn(10), randn(10, seed=9)

    def L(X, Y, a):
        return m.matching_loss(m.unroll(small_network, w, [(X, Y)] * 2, a), w, target)

    leaves = [x.clone().requires_grad_() for x in synthetic()]
    for i, g in enumerate(torch.autograd.grad(L(*leaves), leaves)):
        for place in range(g.numel()):
            ends = []
            for sign in (1e-6, -1e-6):
                bump = torch.zeros(g.numel(), dtype=f64)
                bump[place] = sign
                moved = [x + bump.view_as(x) if j == i else x for j, x in enumerate(synthetic())]
                ends.append(L(*moved).item())
            name = ("an image", "a label", "the step")[i]
            same(g.flatten()[place], (ends[0] - ends[1]) / 2e-6, f"dL / d {name}", 1e-5)


def test_unroll_matching(m):
    """L is 1 at the start, 0 at the target, 1/4 half the way, and has no unit of length."""
    start, target = randn(6), randn(6, seed=1)
    points = (start, 1.0), (target, 0.0), ((start + target) / 2, 0.25)
    for end, expected in points:
        same(m.matching_loss(end, start, target), expected, "L")
        same(m.matching_loss(9 * end, 9 * start, 9 * target), expected, "L of vectors times 9")


# ------------------------------------------------------------------------------------- fedsynsam


def slow_blend(own, syn, mix):
    """(1 - mix) own / ||own|| + mix syn / ||syn||"""
    norm_own = math.sqrt(sum(v * v for v in own))
    norm_syn = math.sqrt(sum(v * v for v in syn))
    return [(1 - mix) * a / norm_own + mix * b / norm_syn for a, b in zip(own, syn)]


def unit(u):
    return u / u.norm()


def fedsynsam_case(m, **settings):
    """(method, w [d], a batch, received with synthetic images)"""
    task = Linear()
    method = m.FedSynSAM(task, **settings)
    w = task.w0 + randn(len(task.w0), seed=8)
    received = {"w": task.w0, "X": randn(6, 1, 4, 4, seed=5), "Y": 3 * randn(6, 3, seed=6)}
    return method, w, task.everything(1)[0], received


def gradients(method, w, batch, received):
    """The gradient of the client, and that of the synthetic images, by autograd."""
    own = fl.autograd(lambda v: method.task.loss(v, batch), w)

    def loss(v):
        scores = method.task.apply(v, received["X"])
        return -(received["Y"].softmax(1) * scores.log_softmax(1)).sum() / len(scores)

    return own, fl.autograd(loss, w)


def test_fedsynsam_small(m):
    """u points where the loop says, for mix = 0.5 and 0.2."""
    for mix in (0.5, 0.2):
        method, w, batch, received = fedsynsam_case(m, mix=mix)
        own, syn = gradients(method, w, batch, received)
        same(method.synthetic_gradient(w, received), syn, "the synthetic gradient")
        u = method.direction(w, batch, received, {})
        expected = vector(*slow_blend(own.tolist(), syn.tolist(), mix))
        same(unit(u), unit(expected), f"u / ||u|| for mix = {mix}")


def test_fedsynsam_ends(m):
    """mix = 0 is FedSAM's direction, and mix = 1 that of the synthetic gradient."""
    for mix in (0.0, 1.0):
        method, w, batch, received = fedsynsam_case(m, mix=mix)
        expected = gradients(method, w, batch, received)[int(mix)]
        same(unit(method.direction(w, batch, received, {})), unit(expected), f"mix = {mix}")


def test_fedsynsam_norms(m):
    """A client's gradient that is a thousand times longer does not count for more."""
    method, w, batch, received = fedsynsam_case(m, mix=0.5)
    before = method.direction(w, batch, received, {})
    plain = method.task.loss
    method.task.loss = lambda v, b: 1000 * plain(v, b)
    after = method.direction(w, batch, received, {})
    same(unit(after), unit(before), "u / ||u|| if the client's loss is multiplied by 1000")


def test_fedsynsam_warmup(m):
    """Without synthetic images it is FedSAM, or FedAvg (u = 0) if warmup_method says so."""
    for name, factor in (("fedsam", 1), ("fedavg", 0)):
        method, w, batch, received = fedsynsam_case(m, warmup_method=name)
        own, _ = gradients(method, w, batch, received)
        u = method.direction(w, batch, {"w": received["w"]}, {})
        same(unit(u) if factor else u, unit(own) * factor, f"u with warmup_method = {name}")


def test_fedsynsam_global(m):
    """If the synthetic images were those of all clients, u would be the global gradient."""
    method, w, batch, _ = fedsynsam_case(m, mix=1.0)
    task = method.task
    labels = 1e3 * F.one_hot(task.y, 3).to(f64)
    u = method.direction(w, batch, {"w": w, "X": task.x, "Y": labels}, {})
    true = fl.autograd(lambda v: F.cross_entropy(task.apply(v, task.x), task.y), w)
    same(unit(u) @ unit(true), 1.0, "cosine to the global gradient")


# ------------------------------------------------------------------------------------- gradalign


def slow_disagreement(gradients):
    """1/(2N) sum_i ||g_i - g||^2 for the gradients of N clients, each a list of d numbers."""
    N, d, total = len(gradients), len(gradients[0]), 0.0
    g = [sum(g_i[j] for g_i in gradients) / N for j in range(d)]
    for g_i in gradients:
        for j in range(d):
            total += (g_i[j] - g[j]) ** 2 / (2 * N)
    return total


def displacements(m, task, w, beta):
    """v_i of all clients, and their gradients."""
    g = [task.gradient(i, w) for i in range(len(task.sizes))]
    received = {"w": w, "g_i": torch.stack(g).mean(0)}
    method = m.GradAlign(task, beta=beta)
    mine = [{"g_i": g_i} for g_i in g]
    return method, received, mine, g


def test_gradalign_small(m):
    """beta = 0.5, g_i = [3, 1] and g = [1, 1] give v_i = [1, 0]; the v_i have the sum 0."""
    method = m.Aligned(quadratics(), beta=0.5)
    v = method.displacement({"g_i": vector(1, 1)}, {"g_i": vector(3, 1)})
    same(v, [1.0, 0.0], "v_i for beta = 0.5, g_i = [3, 1], g = [1, 1]")
    method = m.Aligned(quadratics(), beta=0.3)
    g = [randn(4, seed=i) for i in range(3)]
    mean = {"g_i": torch.stack(g).mean(0)}
    total = sum(method.displacement(mean, {"g_i": g_i}) for g_i in g)
    same(total, [0.0] * 4, "sum of the v_i")


def test_gradalign_point(m):
    """The gradient is computed at w + v_i, and w itself stays."""
    method, received, mine, g = displacements(m, quadratics(), randn(4), beta=0.3)
    w = randn(4, seed=5)
    before = w.clone()
    point, _ = method.point(w, None, received, mine[0])
    same(point, w + 0.3 * (g[0] - received["g_i"]), "the point of client 0")
    same(w, before, "w afterwards")


def test_gradalign_regulariser(m):
    """On quadratics the mean of g_i(w + v_i) is exactly grad F + beta grad r."""
    task, w, beta = quadratics(), randn(4), 0.3
    method, received, mine, g = displacements(m, task, w, beta)
    points = [method.point(w, None, received, x)[0] for x in mine]
    mean = torch.stack([task.gradient(i, p) for i, p in enumerate(points)]).mean(0)

    def r(v):
        g = torch.stack([task.gradient(i, v) for i in range(3)])
        return 0.5 * (g - g.mean(0)).square().sum(1).mean()

    expected = torch.stack(g).mean(0) + beta * fl.autograd(r, w)
    same(mean, expected, "mean of the gradients at w + v_i")


def test_gradalign_disagreement(m):
    """r is that of the loop, also for clients of unequal sizes, and 0 if all clients agree."""
    task = Linear()
    w, each = task.w0 + 0.1, []
    for i, numbers in enumerate(task.images):

        def loss(v, numbers=numbers):
            return F.cross_entropy(task.apply(v, task.x[numbers]), task.y[numbers])

        each.append(fl.autograd(loss, w).tolist())
    same(m.disagreement(task, w), slow_disagreement(each), "r of five clients", 1e-7)
    equal = Quadratics(torch.ones(3, 4, dtype=f64), torch.ones(3, 4, dtype=f64))
    same(m.disagreement(equal, randn(4)), 0.0, "r of equal clients", 1e-7)


# ------------------------------------------------------------------------------------------- man


def slow_mean_square(a):
    """The mean of the squares of all numbers that belong to one image, for each image."""
    means = []
    for image in a:
        numbers = image.flatten().tolist()
        means.append(sum(v * v for v in numbers) / len(numbers))
    return means


def network(w, x):
    """(scores, what leaves the ReLU) of a small network: 16 pixels, 5 hidden units, 3 classes."""
    W, b, V, c = w.split([80, 5, 15, 3])
    a = (x.flatten(1) @ W.view(5, 16).T + b).relu()
    return a @ V.view(3, 5).T + c, a


def man_case(m, man):
    """A task of twelve images for the small network -> (task, w [d])"""
    x = torch.randint(256, (12, 1, 4, 4), generator=seeded(), dtype=torch.uint8)
    one = torch.ones(1, dtype=f64)
    images = data.Images(x, torch.arange(12) % 3, 128 * one, 64 * one, ["a", "b", "c"])
    model = models.build("mlp", (1, 4, 4), 3, hidden=5, dtype=f64)
    task = m.Images(model, images, [torch.arange(12)], man=man)

    def watched(w, x):
        scores, a = network(w, x)
        return scores, m.mean_square(a)

    task.watched = watched
    return task, model.w0


def batch_of(*numbers):
    return data.unmoved(torch.tensor(numbers))


def by_hand(task, w, numbers):
    """(mean cross-entropy, mean activity) of these images at w."""
    scores, a = network(w, (task.train.x[numbers].to(f64) - 128) / 64)
    loss = F.cross_entropy(scores, task.train.y[numbers])
    return float(loss), float(a.square().mean(1).mean())


def test_man_small(m):
    """||a||^2 / n of each image is that of the loop, for vectors and for images."""
    a = vector(1, 2, 2, 0, 3, 4).view(2, 3)
    same(m.mean_square(a), slow_mean_square(a), "[1, 2, 2] and [0, 3, 4]")
    a = randn(3, 2, 4, 5)
    same(m.mean_square(a), slow_mean_square(a), "a of the shape [3, 2, 4, 5]")


def test_man_plain(m):
    """Without MAN the loss is the mean cross-entropy, and padding (-1) does not count."""
    task, w = man_case(m, 0.0)
    expected, _ = by_hand(task, w, [3, 1, 7])
    same(task.loss(w, batch_of(3, 1, 7)), expected, "the loss of three images")
    same(task.loss(w, batch_of(3, 1, 7, -1, -1)), expected, "the same with two rows of padding")


def test_man_term(m):
    """MAN adds man/2 times the mean activity, and padding does not count there either."""
    for man in (0.4, 3.0):
        task, w = man_case(m, man)
        plain, activity = by_hand(task, w, [3, 1, 7])
        expected = plain + man / 2 * activity
        same(task.loss(w, batch_of(3, 1, 7)), expected, f"the loss with man = {man}")
        same(task.loss(w, batch_of(3, 1, 7, -1)), expected, "the same with a row of padding")


# --------------------------------------------------------------------------------------- lanczos


def slow_largest(A):
    """The largest eigenvalue of a small symmetric matrix, by its definition max v'Av / v'v."""
    lowest = float(np.abs(A).sum())  # A + lowest I has no negative eigenvalue
    v = np.random.default_rng(0).normal(size=len(A))
    for _ in range(20_000):
        v = A @ v + lowest * v
        v = v / np.sqrt((v * v).sum())
    return float(v @ A @ v)


def symmetric(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=f64)) @ q.T


def largest(m, A, **more):
    return m.largest_eigenvalue(lambda v: A @ v, A[0], **more)


def test_lanczos_small(m):
    """[[2, 1], [1, 2]] has 3, and random matrices of five rows have that of the loop."""
    same(largest(m, torch.tensor([[2.0, 1], [1, 2]], dtype=f64)), 3.0, "[[2, 1], [1, 2]]")
    same(largest(m, torch.tensor([[7.0]], dtype=f64)), 7.0, "[[7]]")
    A = randn(5, 5)
    A = A + A.T
    same(largest(m, A, tolerance=1e-8), slow_largest(A.numpy()), "a random matrix", 1e-6)


def test_lanczos_sign(m):
    """The largest counts with its sign: of -9, -7, 1, 3 it is 3, and of -5, -4, -1 it is -1."""
    for values in ([-9.0, -7, 1, 3], [-5.0, -4, -1], [2.0] * 6):
        same(largest(m, symmetric(values), tolerance=1e-6), max(values), f"of {values}", 1e-6)


def test_lanczos_orthogonal(m):
    """The vectors that H is applied to stay orthonormal in float32."""
    A, seen = symmetric([100.0, *(0.01 * k for k in range(99))]).float(), []

    def times(v):
        seen.append(v)
        return A @ v

    found = m.largest_eigenvalue(times, A[0], steps=40, tolerance=-1)
    same(found, 100.0, "the eigenvalue", 1e-4)
    same(len(seen), 40, "products with H for steps = 40, when the tolerance is never met")
    Q = torch.stack(seen).to(f64)
    worst = float((Q @ Q.T - torch.eye(len(Q), dtype=f64)).abs().max())
    assert worst < 1e-4, f"a product of two of the vectors is off by {worst:.2g}"


def test_lanczos_products(m):
    """It stops early, and not before the largest eigenvalue has come up."""
    values, products = [8.0, *np.linspace(-2, 2, 299)], []
    A = symmetric(values)
    found = m.largest_eigenvalue(lambda v: products.append(1) or A @ v, A[0])
    same(found, 8.0, "the eigenvalue", 1e-3)
    assert len(products) <= 30, f"it took {len(products)} products with H; 30 are plenty"
    ends = vector(1, 0.97, *np.linspace(0.6, -0.6, 96), -0.97, -0.99)
    for seed in range(40):
        found = m.largest_eigenvalue(lambda v: ends * v, ends, seed=seed)
        same(found, 1.0, f"the largest of two near ones, seed {seed}", 0.035)
