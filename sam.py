"""Sharpness, and what sharpness-aware minimization (SAM) does about it.

A minimum is sharp if the loss F rises steeply around it. The Hessian H of F at w [d] measures that:
its largest eigenvalue is the largest curvature of F along any direction. H has d^2 entries, too
many to store, but a product H v costs no more than a few gradients (`hessian_vector`), and a few
dozen products give the largest eigenvalue (`largest_eigenvalue`).

SAM looks for weights whose whole neighbourhood has a low loss:  min_w  max_{||e|| <= rho} F(w + e).
The loss rises fastest along its gradient u at w. So each step goes a little way along u, and takes
its gradient there:

    e = rho u / ||u||             u [d]: the ascent direction            Foret et al. 2021, eq. (2)
    w <- w - lr grad F(w + e)                                            Foret et al. 2021, eq. (3)

In federated learning the loss that should become flat is the global one, F = mean_i F_i, but a
client can only differentiate its own F_i. Methods differ in what they take for u:

    FedSAM      the client's own gradient: it increases F_i, and may decrease F
    FedLESAM    the way back to the model that the client received last time: global, but old, and
                made of updates that were compressed
    FedSynSAM   a gradient on synthetic data, which the server learnt from the model's trajectory

Sources: SAM, Foret et al. 2021. Hessian-vector products, Pearlmutter 1994. Lanczos iteration with
full reorthogonalisation, Golub and Van Loan, chapter 10.
"""

import torch

TINY = 1e-12  # a direction of zeros moves nothing, instead of 0 / 0

# ------------------------------------------------------------------------------- the ascent step


def unit(u):
    """u / ||u||, and 0 for u = 0; shorter if ||u|| < TINY.   u [d] -> [d]"""
    return u / u.norm().clamp_min(TINY)


def perturb(w, u, rho):
    """The perturbed point w + rho u / ||u||.   w [d], u [d], rho >= 0 -> [d]

    One l2 norm over all coordinates. (FedLESAM's released code divides by the sum of the layers'
    norms instead, which moves w by as little as rho / 8 in a resnet18.)
    """
    return w + rho * unit(u)


def blend(own, other, weight):
    """Two directions by their unit vectors: (1 - weight) own + weight other.   [d], [d] -> [d]

    The raw gradients would not do: the one with the larger norm would decide alone.
    """
    return (1 - weight) * unit(own) + weight * unit(other)


# --------------------------------------------------------------------------- how sharp is a point


def hessian_vector(loss, w, v):
    """H v = grad <grad F, v>, where H is the Hessian of the loss F at w [d].   v [d] -> [d]"""
    w = w.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
    return torch.autograd.grad(g @ v, w)[0]


def hessian(losses, w, each=map):
    """The Hessian of a sum of losses at w [d], as a function v [d] -> H v [d].

    losses: functions of w, one for each chunk of images; the graph of one chunk fits in memory
    where that of all images might not. each: `map`, or that of a thread pool.
    """
    return lambda v: sum(each(lambda loss: hessian_vector(loss, w, v), losses))


def largest_eigenvalue(times, like, steps=100, tolerance=1e-3, seed=0):
    """The largest eigenvalue of a symmetric matrix, given as a function v [d] -> H v [d].

    Lanczos iteration: q_0, q_1, ... is an orthonormal basis of span{v, H v, H^2 v, ...}, and in
    this basis H is a tridiagonal matrix T, whose largest eigenvalue tends to that of H. Let s be
    the eigenvector of T that belongs to it. The Ritz vector y = sum_j s_j q_j has the residual

        ||H y - value y|| = ||r|| * |last entry of s|

    where r is the last product H q_j without its parts along the basis, so it costs no product. The
    iteration stops when it is at most tolerance * |value|, or after `steps` products, and keeps
    steps * d numbers. A small residual says that an eigenvalue is near; that it is the largest is
    likely, since the start is random, and not certain.
    like [d]: a vector of the type and on the device that are wanted.

    "Largest" respects the sign: -3 is smaller than 1. PyHessian's power iteration reports the
    largest |eigenvalue| instead. The two differ where the most negative eigenvalue has the larger
    magnitude, as it may at random initial weights.
    """
    steps = min(steps, len(like))
    q = unit(torch.randn(len(like), generator=torch.Generator().manual_seed(seed)).to(like))
    basis, diagonal, off_diagonal = q.new_empty(steps, len(q)), [], []
    for j in range(steps):
        basis[j] = q
        r = times(q)
        if not r.isfinite().all():
            raise FloatingPointError("a product with the Hessian is not finite")
        diagonal.append(float(q @ r))
        for _ in range(2):  # twice is enough, once is not: rounding destroys the orthogonality
            r = r - basis[: j + 1].T @ (basis[: j + 1] @ r)
        off_diagonal.append(float(r.norm()))
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, off_diagonal[:-1]))
        residual = off_diagonal[-1] * vectors[-1, -1].abs()
        if residual <= tolerance * values[-1].abs():
            break
        q = r / off_diagonal[-1]
    return float(values[-1])


def tridiagonal(diagonal, off_diagonal):
    """The symmetric tridiagonal matrix with these numbers, in float64.   [n], [n - 1] -> [n, n]"""
    off = torch.tensor(off_diagonal, dtype=torch.float64)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return T + torch.diag(off, 1) + torch.diag(off, -1)
