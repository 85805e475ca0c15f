"""How sharp is a point of the loss landscape? What the Hessian says about it, without ever forming the Hessian.

The Hessian H of the loss at w is d x d: 54,314 x 54,314 for the default network. But H v costs only as much as two or three
gradients (`hessian_vector`), and a few such products say a great deal:

    largest eigenvalues     Lanczos: an orthonormal basis q_1, ..., q_m of span{v, Hv, H^2 v, ...} makes H a small tridiagonal
                            matrix T, whose extreme eigenvalues approach those of H much faster than power iteration does,
                            and with their signs                                          (`lanczos`, `top_eigenvalues`)
    trace                   mean of v'Hv over random signs v, for E[v v'] = I             (`trace`)
    all eigenvalues         Lanczos from random signs: the eigenvalues of T, weighted by how much of v lies in their
                            directions, spread like those of H                            (`spectrum`, `density`)

All of them describe the point itself; how high the loss rises around it is measured in landscape.py.

Rules, so that numbers can be compared: plain mean cross-entropy without weight decay, all parameters, a fixed sample of
the TRAINING images whose size is stated (`Objective`). Each measure is a function of callables (H v, loss, gradient), so a
quadratic with a known answer can take the network's place.

Sources: Hessian-vector products, Pearlmutter 1994; Lanczos with full re-orthogonalisation, Golub and Van Loan, ch. 10; errors
of its values, Parlett, The Symmetric Eigenvalue Problem, ch. 11; trace, Hutchinson 1990; spectrum, Ubaru, Chen and Saad 2017; as
measures of networks, PyHessian, Yao et al. 2020. Read next: landscape.py.
"""
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

import sam
import synth


# ------------------------------------------------------------------------------------------------- what is measured
def gradient_graph(loss, w):
    """The gradient of loss(w) with its graph: w [d] -> (gradient [d], the copy of w [d] that it depends on).  Source: Pearlmutter 1994."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loss(w), w, create_graph=True)[0], w


def product(graph, v):
    """H v from a `gradient_graph`, which stays usable: v [d] -> [d], the gradient of <gradient, v>.  Source: Pearlmutter 1994."""
    gradient, w = graph
    return torch.autograd.grad(gradient @ v, w, retain_graph=True)[0]           # with v as an argument of grad, torch imports sympy: a second


def hessian_vector(loss, w, v):
    """H v for a scalar function loss(w): w [d], v [d] -> [d].  Source: Pearlmutter 1994, reverse over reverse."""
    return product(gradient_graph(loss, w), v)


class Objective:
    """L(w): the mean cross-entropy of apply(w [d], x) over `images` (rows [n] of them), its value, gradient and Hessian.

    Summed over chunks of images, so that memory does not grow with their number; each: `map`, or that of a thread pool, whose
    sums are the same to the last bit.  Source: definition; the chunks are ours.
    """

    def __init__(self, apply, images, rows=None, chunk=100, each=map, memory=2**30):
        self.apply, self.images, self.chunk, self.each, self.memory = apply, images, chunk, each, memory
        self.rows = torch.arange(len(images.y), device=images.y.device) if rows is None else rows

    def part(self, batch):
        """One chunk's share of L, as a function of w [d] -> [].  Source: definition."""
        return lambda w: F.cross_entropy(self.apply(w, batch.x), batch.y, reduction="sum") / len(self.rows)

    def summed(self, f):
        """f(batch) [...], summed over all chunks.  Source: definition."""
        return sum(self.each(f, self.images.chunks(self.chunk, self.rows)))

    def loss(self, w):
        """L(w [d]) -> number; the chunks are added in float64.  Source: definition."""
        with torch.no_grad():
            return float(self.summed(lambda b: self.part(b)(w).double()))

    def gradient(self, w):
        """The gradient of L at w [d] -> [d].  Source: definition."""
        w = w.detach().requires_grad_()
        return self.summed(lambda b: torch.autograd.grad(self.part(b)(w), w)[0])

    def hessian(self, w):
        """The Hessian of L at w [d], as a function v [d] -> H v [d].

        The gradient's graph does not depend on v: that of as many chunks as fit into `memory` bytes is made once and kept as
        long as the function; the others are made again in every product, at half the speed.  Source: Pearlmutter 1994; keeping is ours.
        """
        parts, saved = [self.part(b) for b in self.images.chunks(self.chunk, self.rows)], {}

        def weigh(t):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda t: t):
            gradient_graph(parts[0], w)
        fit = self.memory // max(1, sum(saved.values()))
        graphs = list(self.each(lambda part: gradient_graph(part, w), parts[:fit]))
        again = [None] * len(parts[fit:])

        def matvec(v):
            work = list(zip(parts, graphs + again))
            return sum(self.each(lambda p: hessian_vector(p[0], w, v) if p[1] is None else product(p[1], v), work))
        return matvec

    def batches(self, m):
        """The same for disjoint samples of m images each, in order -> list of Objective; a last one of fewer is left out.  [ ] if n < m.

        Source: m-sharpness, Foret et al. 2021, section 4.1.
        """
        return [Objective(self.apply, self.images, r, self.chunk, self.each, self.memory) for r in self.rows.split(m) if len(r) == m]


# ----------------------------------------------------------------------------------------------- ends of the spectrum
class Ritz(NamedTuple):
    """What Lanczos knows after m products: values [m] ascending, of T; their eigenvectors in T, columns of coordinates [m, m];
    basis [m, d], so that coordinates' @ basis [m, d] are those of H; residuals [m], ||H y - value y||.  Source: Golub and Van Loan, ch. 10."""
    values: torch.Tensor
    coordinates: torch.Tensor
    basis: torch.Tensor
    residuals: torch.Tensor


def lanczos(matvec, start, steps, tolerance=1e-4, k=1):
    """The symmetric operator matvec: [d] -> [d] on the space of at most `steps` products -> Ritz; memory steps * d numbers.

    start [d]: any vector with a part in every eigenspace (random). Stops early when the `errors` of the k values of largest
    magnitude are below `tolerance` times the value, or when the space is exhausted. A repeated eigenvalue is seen once.
    Source: Golub and Van Loan, Algorithm 10.1.1, with full re-orthogonalisation; the stopping rule is ours.
    """
    steps = min(steps, len(start))
    basis, diagonal, off = start.new_empty(steps, len(start)), [], []
    q = start / start.norm()
    for j in range(steps):
        basis[j] = q
        r = matvec(q)
        diagonal.append(torch.dot(q, r))
        Q = basis[:j + 1]
        for _ in range(2):                                  # twice is enough: rounding destroys orthogonality otherwise
            r = r - Q.T @ (Q @ r)
        T = torch.diag(torch.stack(diagonal))
        if off:
            T = T + torch.diag(torch.stack(off), 1) + torch.diag(torch.stack(off), -1)
        off.append(r.norm())
        values, coordinates = torch.linalg.eigh(T.double())
        ritz = Ritz(values, coordinates, Q, off[-1] * coordinates[-1].abs())
        top = values.abs().argsort(descending=True)[:k]
        if off[-1] <= 1e-7 * values.abs().max() or j + 1 >= k and (errors(ritz)[top] <= tolerance * values[top].abs()).all():
            break
        q = r / off[-1]
    return ritz


def errors(ritz):
    """How far each Ritz value [m] may be from an eigenvalue: its residual r, or r^2 / gap where that is smaller -> [m].

    gap: the distance to the nearest other Ritz value, which stands for that to the nearest other eigenvalue; r alone is a bound.
    Source: Parlett, theorems 4.5.1 and 11.7.1.
    """
    gap = (ritz.values[:, None] - ritz.values).abs().fill_diagonal_(math.inf).amin(1)
    gap = torch.where(gap.isinf(), 0, gap)                   # a single value has no neighbour: r alone
    return torch.minimum(ritz.residuals, ritz.residuals**2 / gap.clamp_min(1e-300))


class Top(NamedTuple):
    """Eigenvalues [k] with their signs, largest magnitude first; unit eigenvectors [k, d]; errors [k] of the values.  Source: ours."""
    values: torch.Tensor
    vectors: torch.Tensor
    errors: torch.Tensor


def top_eigenvalues(matvec, like, k=1, steps=100, tolerance=1e-4, seed=0):
    """The k eigenvalues of largest MAGNITUDE of matvec: [d] -> [d], with their signs -> Top; like [d] says type and device.

    Fewer than k if the space is exhausted before; errors above `tolerance` if `steps` products were not enough. The vectors
    are less exact than the values: to about the root of their relative error. ValueError unless 1 <= k <= min(steps, d).
    Source: PyHessian's measure, computed by Lanczos.
    """
    if not 1 <= k <= min(steps, len(like)):
        raise ValueError(f"k = {k} eigenvalues of steps = {steps} products in d = {len(like)} dimensions; k must be in 1..{min(steps, len(like))}")
    ritz = lanczos(matvec, torch.randn(len(like), generator=torch.Generator().manual_seed(seed)).to(like), steps, tolerance, k)
    top = ritz.values.abs().argsort(descending=True)[:k]
    return Top(ritz.values[top], ritz.coordinates[:, top].T.to(like) @ ritz.basis, errors(ritz)[top])


def top_eigenvalue(apply, w, images, rows=None, chunk=100, steps=40, seed=0, each=map):
    """The Hessian eigenvalue of largest magnitude of the mean cross-entropy at w [d] over `images` (rows [n] of them).

    -> float, with its sign, to four digits.  Source: as `top_eigenvalues` and `Objective`.
    """
    return float(top_eigenvalues(Objective(apply, images, rows, chunk, each).hessian(w), w, steps=steps, seed=seed).values[0])


# ------------------------------------------------------------------------------------------------ the whole spectrum
def signs(n, like, seed):
    """n vectors of random signs, one after the other, like `like` [d] and equal on every device.  Source: Hutchinson 1990."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield (2 * torch.randint(2, (len(like),), generator=g) - 1).to(like)


class Trace(NamedTuple):
    """The mean of v'Hv over n sign vectors, and its standard error (nan for n = 1), numbers [].  Source: Hutchinson 1990."""
    estimate: float
    error: float


def trace(matvec, like, samples=30, seed=0):
    """The trace of matvec: [d] -> [d] from `samples` products -> Trace; like [d] says type and device.

    One sample has variance 2 (||H||_F^2 - sum_j H_jj^2): none if H is diagonal. Samples / trace, error / trace say whether there
    are enough.  Source: Hutchinson 1990.
    """
    values = torch.stack([torch.dot(v, matvec(v)) for v in signs(samples, like, seed)]).double()
    return Trace(float(values.mean()), float(values.std()) / math.sqrt(samples) if samples > 1 else math.nan)


class Spectrum(NamedTuple):
    """Values [n] and the weight [n] of each, which sum to 1: sum_j weight_j f(value_j) estimates trace(f(H)) / d.  Source: Ubaru et al. 2017."""
    values: torch.Tensor
    weights: torch.Tensor


def spectrum(matvec, like, starts=4, steps=80, seed=0):
    """All eigenvalues of matvec: [d] -> [d] at once, by stochastic Lanczos quadrature -> Spectrum; like [d] says type and device.

    From each of `starts` sign vectors v, Lanczos gives values and weights (squared first coordinates) with
    sum_j weight_j value_j^p = v'H^p v / d exactly for p < 2 steps; their mean estimates trace(H^p) / d.
    Source: Ubaru, Chen and Saad 2017; Golub and Welsch 1969.
    """
    runs = [lanczos(matvec, v, steps, tolerance=0) for v in signs(starts, like, seed)]
    return Spectrum(torch.cat([r.values for r in runs]), torch.cat([r.coordinates[0]**2 for r in runs]) / starts)


def density(spec, points=1000, width=None):
    """A Spectrum as a curve: sum_j weight_j N(x; value_j, width^2) -> (x [points], density [points] per unit of x, area 1).

    width: standard deviation of each Gaussian, 1 % of the range unless given, so no finer structure can be seen; state it.
    Source: PyHessian, whose width is sqrt(1e-5 max(1, range)); 1 % is ours.
    """
    low, high = float(spec.values.min()), float(spec.values.max())
    width = width or 0.01 * (high - low) or 0.01 * abs(high) or 0.01
    x = torch.linspace(low - 5 * width, high + 5 * width, points).to(spec.values)
    bells = torch.exp(-((x[:, None] - spec.values) / width)**2 / 2) / (width * math.sqrt(2 * math.pi))
    return x, bells @ spec.weights


# ------------------------------------------------------------------------------------------------------- directions
def full_gradient(apply, w, images, rows, chunk=500):
    """The gradient at w [d] of the mean cross-entropy over the images numbered in rows [n] -> [d].  Source: definition."""
    return Objective(apply, images, rows, chunk).gradient(w)


class Alignment(NamedTuple):
    """Cosines in -1..1 to the true global gradient (means over clients; nan: not available), numbers [].

    last_uncompressed: as last_move, of the mean of the updates as the clients meant them.  Source: ours.
    """
    own: float
    last_move: float
    synthetic: float
    mixed: float
    last_uncompressed: float = math.nan


def last_update(fed):
    """The mean of the last round's updates before compression, walked again from w^{t-1} -> [d].

    None in round 0, and for methods with a survey, or whose clients or server remember: they cannot go back.  Source: ours.
    """
    method = fed.method
    if fed.t == 0 or method.memory or method.surveys or len(method.broadcast(fed.w)) > 1:
        return None
    t, w = fed.t - 1, fed.w - fed.move
    clients = fed.clients(t)
    method.receive(w, [])
    sent = fed.each_client(w, w.new_zeros(len(clients), 0, len(w)), fed.plans(clients, t), t, lambda c, sent, _: sent[0])
    return sum(p * x for p, x in zip(fed.weights(clients).tolist(), sent))


def alignment(fed, rows, mix=0.5, steps=None):
    """How well does each estimate of "uphill" agree with the true global gradient, at the clients' own points?

    The clients of the coming round walk `steps` steps from w^t (None: all but the last; never more than that); at the point [d] that
    each of them reaches, the cosine of the gradient of its next mini-batch, of minus the last global move (as it was, and as it would
    have been without compression), and (if there is one) of the synthetic gradient and the mixture, to the gradient over the training
    images `rows` [n].  -> one NamedTuple of means over the clients.  Source: the claim of FedSynSAM's abstract; the measure is ours.
    """
    task, method, clients, meant = fed.task, fed.method, fed.clients(fed.t), last_update(fed)
    synthetic = getattr(method, "synthetic", None)
    method.receive(fed.w, method.broadcast(fed.w)[1:])
    plans = fed.plans(clients, fed.t)
    taken = [len(p) - 1 if steps is None else min(steps, len(p) - 1) for p in plans]
    said = torch.stack([x_hat for x_hat, _ in fed.answers(fed.w, clients, fed.t)]) if method.surveys else None
    if method.surveys:
        fed.announce(said, clients)

    def measure(c, sent, _):
        w = fed.w + sent[0]
        true, own = full_gradient(task.apply, w, task.train, rows), method.grad(w, plans[c][taken[c]])
        cosine = lambda u: math.nan if u is None else sam.cosine(u, true)                            # noqa: E731
        g = None if synthetic is None else method.grad_of(lambda v: synth.synthetic_loss(task.apply, v, synthetic), w)
        mixed = None if g is None else sam.mix_directions(own, g, mix, fed.cfg.mix_units)
        return [cosine(u) for u in (own, -fed.move, g, mixed, None if meant is None else -meant)]
    cos = fed.each_client(fed.w, fed.recall(clients, fed.w), [p[:n] for p, n in zip(plans, taken)], fed.t, measure, said)
    return Alignment(*torch.tensor(list(cos)).mean(0).tolist())
