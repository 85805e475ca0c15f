"""How sharp is a point of the loss landscape? The largest eigenvalue of the Hessian, without ever forming the Hessian.

The Hessian H of the loss at w is d x d: 54,314 x 54,314 for the default network. But H v costs only two gradients
(`hessian_vector`), and a few dozen such products give the ends of the spectrum (`lanczos`): Lanczos builds an orthonormal
basis q_1, ..., q_m of span{v, Hv, H^2 v, ...} in which H is a small tridiagonal matrix T, whose extreme eigenvalues
approach those of H much faster than power iteration does, and with their signs.

Rules, so that numbers can be compared: plain mean cross-entropy without weight decay, all parameters, a fixed sample of
the TRAINING images whose size is stated.

Sources: Hessian-vector products, Pearlmutter 1994; Lanczos with full re-orthogonalisation, Golub and Van Loan, ch. 10;
as a measure of networks, PyHessian, Yao et al. 2020. Read next: run.py.
"""
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

import sam
import synth


def hessian_vector(loss, w, v):
    """H v for a scalar function loss(w): w [d], v [d] -> [d].  Source: Pearlmutter 1994, reverse over reverse."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        gradient, = torch.autograd.grad(loss(w), w, create_graph=True)
        return torch.autograd.grad(gradient, w, v)[0]


def lanczos(matvec, start, steps, tolerance=1e-4):
    """Ritz values (ascending) of the symmetric operator matvec: [d] -> [d] after at most `steps` products.

    start [d] any vector with a part in every eigenspace (random) -> [<= steps].  Stops early when the value of largest
    magnitude changes by less than `tolerance` (relative) three times in a row, or when the space is exhausted.
    Source: Golub and Van Loan, Algorithm 10.1.1, with full re-orthogonalisation.
    """
    q, basis, diagonal, off, calm = start / start.norm(), [], [], [], 0
    ritz = start.new_zeros(0)
    for _ in range(min(steps, len(start))):
        basis.append(q)
        r = matvec(q)
        diagonal.append(torch.dot(q, r))
        for _ in range(2):                                  # twice is enough: rounding destroys orthogonality otherwise
            Q = torch.stack(basis)
            r = r - Q.T @ (Q @ r)
        T = torch.diag(torch.stack(diagonal))
        if off:
            T = T + torch.diag(torch.stack(off), 1) + torch.diag(torch.stack(off), -1)
        last, ritz = ritz, torch.linalg.eigvalsh(T.double())
        off.append(r.norm())
        if off[-1] <= 1e-7 * ritz.abs().max():
            break
        if len(last) and abs(extreme(ritz) - extreme(last)) <= tolerance * abs(extreme(ritz)):
            calm += 1
        else:
            calm = 0
        if calm == 3:
            break
        q = r / off[-1]
    return ritz


def extreme(values):
    """The value of largest magnitude, with its sign: [n] -> float.  Source: definition."""
    return float(values[values.abs().argmax()])


def top_eigenvalue(apply, w, images, rows=None, chunk=250, steps=40, seed=0, each=map):
    """The Hessian eigenvalue of largest magnitude of the mean cross-entropy at w [d] over `images` (rows [n] of them).

    The Hessian is summed over chunks of images, so memory does not grow with their number; each: `map`, or that of a thread
    pool. -> float, with its sign.
    Source: PyHessian's measure, computed by Lanczos.
    """
    batches = list(images.chunks(chunk, rows))
    n = sum(len(b.y) for b in batches)

    def matvec(v):
        return sum(each(lambda b: hessian_vector(lambda u: F.cross_entropy(apply(u, b.x), b.y, reduction="sum") / n, w, v), batches))
    start = torch.randn(len(w), generator=torch.Generator().manual_seed(seed)).to(w)
    return extreme(lanczos(matvec, start, steps))


def full_gradient(apply, w, images, rows, chunk=500):
    """The gradient at w [d] of the mean cross-entropy over the images numbered in rows [n] -> [d].  Source: definition."""
    part = torch.func.grad(lambda v, b: F.cross_entropy(apply(v, b.x), b.y, reduction="sum"))
    return sum(part(w, b) for b in images.chunks(chunk, rows)) / len(rows)


class Alignment(NamedTuple):
    """Cosines in -1..1 to the true global gradient (means over clients; nan: not available), numbers [].  Source: ours."""
    own: float
    last_move: float
    synthetic: float
    mixed: float


def alignment(fed, rows, mix=0.5):
    """How well does each estimate of "uphill" agree with the true global gradient, at the clients' own last points?

    The clients of the coming round walk K - 1 steps from w^t; at the point [d] each of them reaches, the cosine of its own
    mini-batch gradient, of minus the last global move, and (if there is one) of the synthetic gradient and the mixture,
    to the gradient over the training images `rows` [n].  -> one NamedTuple of means over the clients.
    Source: the claim of FedSynSAM's abstract; the measure is ours.
    """
    task, method, clients = fed.task, fed.method, fed.clients(fed.t)
    synthetic = getattr(method, "synthetic", None)
    method.receive(fed.w, method.broadcast(fed.w)[1:])
    plans = fed.plans(clients, fed.t)
    said = torch.stack([x_hat for x_hat, _ in fed.answers(fed.w, clients, fed.t)]) if method.surveys else None
    if method.surveys:
        fed.announce(said, clients)

    def measure(c, sent, _):
        w = fed.w + sent[0]
        true, own = full_gradient(task.apply, w, task.train, rows), method.grad(w, plans[c][-1])
        cos = [sam.cosine(u, true) for u in (own, -fed.move)]
        if synthetic is None:
            return cos + [math.nan] * 2
        g = method.grad_of(lambda v: synth.synthetic_loss(task.apply, v, synthetic), w)
        return cos + [sam.cosine(u, true) for u in (g, sam.mix_directions(own, g, mix, fed.cfg.mix_units))]
    cos = fed.each_client(fed.w, fed.recall(clients, fed.w), [p[:-1] for p in plans], fed.t, measure, said)
    return Alignment(*torch.tensor(list(cos)).mean(0).tolist())
