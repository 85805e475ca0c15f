"""What the loss looks like around a point: how high it rises within a ball, and what it is along random lines and planes.

The Hessian (sharpness.py) describes the loss at w itself. Here the loss is evaluated elsewhere, at w + e:

    SAM sharpness     S_rho = max_{||e|| <= rho} L(w + e) - L(w), the very quantity that SAM makes small. The maximum is
                      searched by climbing (`sam_sharpness`), so what is found is a lower bound. At a minimum
                      S_rho = rho^2 lambda_max / 2 + O(rho^3); elsewhere it also sees the slope.
    slices            L(w + a d) for a random direction d, and L(w + a d + b e) for two of them (`line`, `plane`)

A slice along plain random numbers says nothing about sharpness: a ReLU network computes the same when one layer is multiplied by c
and the next divided by c, but looks c times steeper to a step of fixed length. So each filter of d (the weights that feed one
output channel of a convolution, one output of a linear layer) gets the length of that filter of w, and biases and norm
parameters stay where they are (`filter_direction`). Then the slice does not change under such a rescaling. S_rho does.

All of it returns numbers; the loss and its gradient come as callables, those of a network from `sharpness.Objective`.

Sources: Foret et al. 2021 (SAM); Li et al. 2018, Visualizing the Loss Landscape of Neural Nets. Read next: data.py.
"""
from typing import NamedTuple

import torch

import sam


# ---------------------------------------------------------------------------------------------------- SAM's sharpness
class SamSharpness(NamedTuple):
    """S_rho as one step sees it, and as the ascent does (never less); rho is part of the result.  Numbers [].  Source: Foret et al. 2021."""
    one_step: float
    ascent: float
    rho: float


def sam_sharpness(loss, gradient, w, rho, steps=20, seed=0):
    """S_rho = max_{||e|| <= rho} L(w + e) - L(w) at w [d], from loss: [d] -> number and gradient: [d] -> [d] -> SamSharpness.

    one_step: e = rho g / ||g||; 0 at a minimum, where g = 0 says nothing. ascent: from there (from a random e, if g = 0) `steps`
    times a step of length rho uphill and back into the ball; the highest point seen. Both are lower bounds of S_rho. Costs
    steps + 1 gradients and steps + 2 losses.  Source: Foret et al. 2021, eq. (1), (2); the ascent's step length is ours.
    """
    base, g = loss(w), gradient(w)
    one_step = best = loss(sam.perturb(w, g, rho)) - base
    if not g.any():
        g = torch.randn(len(w), generator=torch.Generator().manual_seed(seed)).to(w)
    e = sam.perturb(torch.zeros_like(w), g, rho)
    for _ in range(steps):
        e = sam.perturb(e, gradient(w + e), rho)
        e = e * min(1, rho / max(float(e.norm()), sam.TINY))
        best = max(best, loss(w + e) - base)
    return SamSharpness(one_step, best, rho)


def m_sharpness(objective, w, rho, m, steps=20):
    """The mean of S_rho over batches of m images of an Objective at w [d], each with an e of its own -> SamSharpness.

    At least S_rho of all the images, and the larger the smaller m. ValueError if there are fewer than m images.
    Source: Foret et al. 2021, section 4.1.
    """
    batches = objective.batches(m)
    if not batches:
        raise ValueError(f"m = {m} is out of range; it must be in 1..{len(objective.rows)}, the number of images")
    found = torch.tensor([sam_sharpness(b.loss, b.gradient, w, rho, steps) for b in batches], dtype=torch.float64)
    return SamSharpness(*found[:, :2].mean(0).tolist(), rho)


# ------------------------------------------------------------------------------------------------------------ slices
def filter_direction(w, shapes, seed=0):
    """A random direction d [d] for the network at w [d] with parameters of `shapes`: ||d_f|| = ||w_f|| for every filter f.

    A filter is one row [in, or height * width * in] of a weight; parameters with one dimension (biases, norms) get 0. The
    same seed gives the same random numbers on every device and for every model of these shapes: compare models with equal seeds.
    Source: Li et al. 2018, section 4; "one dimension gets 0" holds for all networks of models.py.
    """
    noise = torch.randn(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(w)
    d, sizes = [], [torch.Size(s).numel() for s in shapes]
    for s, part, random in zip(shapes, w.split(sizes), noise.split(sizes)):
        if len(s) < 2:
            d.append(torch.zeros_like(part))
        else:                                                # w holds a convolution as OHWI: the output channel comes first there too
            rows, random = part.view(s[0], -1), random.view(s[0], -1)
            d.append((random * (rows.norm(dim=1) / random.norm(dim=1))[:, None]).view(-1))
    return torch.cat(d)


def steps_of(points, span):
    """Where a slice is evaluated: `points` numbers from -span to span, exactly 0 in the middle if they are odd -> [points].  Source: Li et al. 2018."""
    return span * torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1)


def line(loss, w, direction, points=51, span=1.0):
    """L(w + a d) along direction d [d] from w [d], loss: [d] -> number -> (a [points], L [points]) in float64.

    Source: Li et al. 2018, section 2; 51 points on [-1, 1] are theirs.
    """
    a = steps_of(points, span)
    return a, torch.tensor([loss(w + x * direction) for x in a.tolist()], dtype=torch.float64)


def plane(loss, w, first, second, points=51, span=1.0):
    """L(w + a d + b e) for two directions d, e [d] (`filter_direction` with two seeds) -> (a [points], L [points, points]) in float64.

    Row i, column j is a_i along the first and a_j along the second. Costs points^2 losses.  Source: Li et al. 2018, section 4.
    """
    a = steps_of(points, span)
    return a, torch.stack([line(loss, w + x * first, second, points, span)[1] for x in a.tolist()])
