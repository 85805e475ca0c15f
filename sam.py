"""Sharpness-aware minimisation (SAM): which way is uphill, and how far to climb before reading the gradient.

SAM looks for a w whose whole neighbourhood has a low loss, min_w max_{||eps|| <= rho} F(w + eps). It climbs from w to
the rim of a ball of radius rho, reads the gradient there, and takes that gradient as its step at w:

    eps = rho u / ||u||            u = the direction believed to be uphill       (`perturb`)
    w  <- w - eta grad F(w + eps)                                                (`sam_gradient`)

Why the direction u is an argument. A client of a federation wants to flatten the GLOBAL loss F = mean_i F_i, but at its
own point w it can only see F_i. What it takes for u is what separates the methods:

    FedSAM      its own mini-batch gradient: uphill for F_i, which under skewed data may be downhill for F
    FedLESAM    minus the last move of the global model: global, but old, and blurred by compression
    FedSynSAM   a mixture of its own gradient and the gradient on synthetic data distilled from the global trajectory

What else can be changed is the shape of the ball (`perturb_adaptive`) and what of the gradient counts: GCSAM takes out of
every weight's gradient its mean over all but the output dimension (`centralise`, `perturb_centralised`).

Sources: SAM, Foret et al. 2021, eq. (2)-(3); ASAM, Kwon et al. 2021; GCSAM, Hassan et al. 2025 (arXiv 2501.11584); FedSynSAM,
arXiv 2602.11584.
Read next: synth.py (where the synthetic data come from).
"""
import torch

TINY = 1e-12                     # guards 0 / 0: a zero direction moves nothing


def perturb(w, direction, rho):
    """Climb from w to the rim of the ball: w + rho u / ||u||, one global l2 norm over all coordinates.

    w [d], direction u [d], rho >= 0 -> [d].  The move has length rho (0 if u = 0).  Source: Foret et al. 2021, eq. (2).
    """
    return w + direction * (rho / direction.norm().clamp_min(TINY))


def perturb_adaptive(w, direction, rho, eta=0.01, scaled=None):
    """ASAM's climb: rho T^2 u / ||T u|| with T = |w| + eta, so that a rescaled but equal network climbs equally.

    w [d], direction u [d], scaled [d] bool (where T applies; elsewhere, e.g. for biases, T = 1; None: everywhere) -> [d].
    With T = 1 this is `perturb`. rho is not comparable with SAM's.  Source: Kwon et al. 2021.
    """
    T = w.abs() + eta
    if scaled is not None:
        T = torch.where(scaled, T, 1)
    return w + T * T * direction * (rho / (T * direction).norm().clamp_min(TINY))


def centralise(g, shapes):
    """Gradient centralisation: every parameter with more than one dimension minus its mean over all dimensions but the first.

    g [d], shapes of the parameters in w (models.Model) -> [d].  A convolution lies in w as OHWI: output channel first all the same,
    so one row of `view(outputs, -1)` is what is averaged. A linear projection: applied twice it is applied once.
    Source: Hassan et al. 2025 (GCSAM), after Yong et al. 2020.
    """
    parts = []
    for p, shape in zip(g.split([torch.Size(s).numel() for s in shapes]), shapes):
        if len(shape) > 1:
            p = p.view(shape[0], -1)
            p = (p - p.mean(1, keepdim=True)).view(-1)
        parts.append(p)
    return torch.cat(parts)


def perturb_centralised(w, direction, rho, shapes, norm_first=False):
    """GCSAM's climb, along C u = `centralise` of u: w + rho C u / ||C u||, or w + rho C u / ||u|| if norm_first.

    w [d], direction u [d], rho >= 0 -> [d].  The move has length rho; with norm_first at most rho, since C only shortens.
    Source: Hassan et al. 2025 (GCSAM): the first is its formula, the second its released code.
    """
    u = centralise(direction, shapes)
    return w + u * (rho / (direction if norm_first else u).norm().clamp_min(TINY))


def sam_gradient(grad, w, direction, rho):
    """The gradient that SAM descends: grad F at the rim, uphill from w along the direction.

    grad: [d] -> [d], w [d], direction [d] (or None: stay at w), rho >= 0 -> [d].  On F = w'Aw/2 with direction Aw it is
    A (w + rho Aw/||Aw||).  w itself is never changed, so nothing has to be restored.  Source: Foret et al. 2021, eq. (3).
    """
    return grad(w if direction is None else perturb(w, direction, rho))


def unit(u):
    """u / ||u||: [d] -> [d], the zero vector stays zero.  Source: definition."""
    return u / u.norm().clamp_min(TINY)


def mix_directions(own, synthetic, mix, normalise):
    """FedSynSAM's direction: u = (1 - mix) g_own + mix g_syn, of the raw gradients or of their unit vectors.

    own [d], synthetic [d], mix in [0, 1], normalise True for unit vectors -> [d].  mix = 0 is FedSAM's direction.
    Source: the mixture is this project's reading of FedSynSAM (arXiv 2602.11584, abstract); which form, it leaves open.
    """
    if normalise:
        own, synthetic = unit(own), unit(synthetic)
    return (1 - mix) * own + mix * synthetic


def cosine(a, b):
    """How well two directions agree: <a, b> / (||a|| ||b||), [d], [d] -> number in [-1, 1].  Source: definition."""
    return float(torch.dot(unit(a), unit(b)))
