# ---------------------------------------------------------------------------------------- sam
import pytest
import torch
from torch.nn import functional as F

import sam
from vision import data, models

f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


# ---- sam, to be pasted from here
@pytest.mark.parametrize("d", [1, 7, 1000])
def test_sam_perturbed_point_is_rho_away_in_the_ascent_direction(d):
    w, u = randn(d), randn(d, seed=1)
    e = sam.perturb(w, u, 0.1) - w
    assert float(e.norm()) == pytest.approx(0.1, rel=1e-9) and torch.dot(e, u) > 0
    assert torch.allclose(e / 0.1, sam.unit(u), rtol=1e-9, atol=1e-12)
    assert torch.equal(sam.perturb(w, u, 0.0), w) and torch.equal(sam.perturb(w, 0 * u, 0.1), w)
    assert not sam.unit(0 * u).any() and sam.unit(1e-9 * u).norm() == pytest.approx(1)


def test_sam_blend_ends_at_its_two_unit_vectors_and_does_not_see_their_norms():
    a, b = randn(5), randn(5, seed=1)
    assert torch.equal(sam.blend(a, b, 0), a / a.norm()) and torch.equal(
        sam.blend(a, b, 1), b / b.norm()
    )
    half = sam.blend(a, 100 * b, 0.5)
    assert torch.allclose(half, sam.blend(a, b, 0.5)) and half @ sam.unit(a) == pytest.approx(
        half @ sam.unit(b)
    )
    assert torch.allclose(sam.blend(a, b, 0.25), 0.75 * a / a.norm() + 0.25 * b / b.norm())


def curved(w):
    """A loss whose Hessian has all entries, and depends on w."""
    return (w.square().sum() + w.prod() + 1).log() + (w @ torch.arange(1, len(w) + 1.0).to(w)).sin()


def test_sam_hessian_vector_is_the_dense_hessian_times_the_vector():
    w, v = randn(5), randn(5, seed=1)
    H = torch.func.hessian(curved)(w)
    assert torch.allclose(sam.hessian_vector(curved, w, v), H @ v, rtol=1e-10)
    graph = sam.gradient_graph(curved, w)
    for u in (v, w):  # a graph can be used again
        assert torch.allclose(sam.graph_times(graph, u), H @ u, rtol=1e-10)
    assert not w.requires_grad


def test_sam_hessian_of_a_sum_is_the_same_whether_its_graphs_are_kept_or_not(monkeypatch):
    w, v, anew, once = randn(6), randn(6, seed=1), [], sam.hessian_vector
    losses = [lambda w, k=k: (k + 1) * curved(w + k) for k in range(4)]
    H = sum(torch.func.hessian(loss)(w) for loss in losses)
    monkeypatch.setattr(sam, "hessian_vector", lambda *a: anew.append(1) or once(*a))
    size, results = sam.graph_bytes(losses[0], w), []
    for memory, expected in ((2**30, 0), (2 * size, 2), (2 * size - 1, 3), (0, 4)):
        anew.clear()
        times = sam.hessian(losses, w, memory)
        results.append(times(v))
        assert len(anew) == expected and torch.equal(times(v), results[0])
    assert all(torch.equal(x, results[0]) for x in results)
    assert torch.allclose(results[0], H @ v, rtol=1e-10)


def test_sam_graph_bytes_counts_what_autograd_keeps_once():
    x = randn(1000, 4)
    small, large = (
        sam.graph_bytes(lambda w, n=n: (x[:n] @ w).cos().sum(), randn(4)) for n in (500, 1000)
    )
    assert 8 * 500 < small < large < 100 * 8 * 1000
    assert sam.graph_bytes(lambda w: w.sum() * w.sum(), randn(1)) >= 1


def symmetric(values, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=f64)) @ q.T


@pytest.mark.parametrize(
    "values",
    [
        [0.1 + 0.2 * k for k in range(40)],
        [-9.0, -7.0, -5.0, *(0.05 * k for k in range(30)), 3.0],  # the largest in magnitude is -9
        [-5.0, -4.0, -3.0, -1.0],
        [2.0] * 10,
        [7.0],
    ],
)
def test_sam_largest_eigenvalue_is_the_largest_with_its_sign(values):
    A = symmetric(values)
    for seed in range(5):
        found = sam.largest_eigenvalue(lambda v: A @ v, A[0], tolerance=1e-6, seed=seed)
        assert found == pytest.approx(max(values), rel=1e-9)


def test_sam_lanczos_keeps_its_basis_orthogonal_where_rounding_destroys_it():
    A, products = symmetric([100.0, *(0.01 * k for k in range(99))]).float(), []
    found = sam.largest_eigenvalue(lambda v: products.append(v) or A @ v, A[0], 60, tolerance=-1)
    Q = torch.stack(products)
    assert torch.allclose(Q @ Q.T, torch.eye(60), atol=1e-4)
    assert found == pytest.approx(100, rel=1e-5)


def test_sam_largest_eigenvalue_stops_early_and_within_its_tolerance():
    products, values = [], torch.cat([torch.tensor([8.0]), torch.linspace(-2, 2, 499)])
    A = symmetric(values)
    found = sam.largest_eigenvalue(lambda v: products.append(1) or A @ v, A[0])
    assert len(products) < 15 and found == pytest.approx(8, rel=1e-5)


def test_sam_largest_eigenvalue_does_not_stop_at_another_eigenvalue():
    """What an earlier rule of stopping got wrong: with ends of nearly equal magnitude, it stopped
    when the value of largest magnitude stood still, at times before the largest was found."""
    values = torch.tensor(
        [1, 0.97, *torch.linspace(0.6, -0.6, 96).tolist(), -0.97, -0.99], dtype=f64
    )
    starts = 200
    found = [sam.largest_eigenvalue(lambda v: values * v, values, seed=s) for s in range(starts)]
    assert sum(abs(value - 1) > 0.01 for value in found) <= 0.02 * starts


def test_sam_largest_eigenvalue_of_a_network_is_that_of_its_dense_hessian():
    """At initial weights the most negative eigenvalue can be as large; once -0.468 was reported."""
    images = data.load("bundled", dtype=f64).train
    model = models.build("mlp", (1, 7, 7), 10, hidden=3, dtype=f64)
    x, y, _ = images.batch(data.unmoved(torch.arange(60)))
    x = x[:, :, ::4, ::4]

    def loss(w):
        return F.cross_entropy(model.apply(w, x), y)

    for w in (model.w0, model.w0 + randn(len(model.w0))):
        largest = float(torch.linalg.eigvalsh(torch.func.hessian(loss)(w))[-1])
        chunks = [
            lambda v, k=k: F.cross_entropy(model.apply(v, x[k]), y[k], reduction="sum") / 60
            for k in torch.arange(60).split(25)
        ]
        assert largest > 0
        assert sam.largest_eigenvalue(sam.hessian(chunks, w), w) == pytest.approx(largest, rel=1e-3)
