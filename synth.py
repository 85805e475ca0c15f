"""Synthetic data from a trajectory: a few images that teach what the federation has learnt so far.

The server of a federation sees no images. But it sees its own model move, w^0, w^1, w^2, ..., and that trajectory is a
trace of everybody's data. DynaFed's trajectory matching looks for a small synthetic set D_syn = (X, Y) such that plain
gradient descent ON D_syn walks along a piece of the trajectory:

    theta_0 = w^p                                     p drawn at random
    theta_{j+1} = theta_j - a grad l(theta_j; X, Y)   j = 0..M-1, the unrolled inner steps        (`unroll`)
    L_TM = ||theta_M - target||^2 / ||theta_0 - target||^2                                        (`matching_loss`)

with the target some way ahead, w^{p+r} or an average of such snapshots (`draw_segment`). X (images), Y (label logits) and
the step size a are learnt by Adam on L_TM, with gradients through all M inner steps (`distill`). L_TM = 1 means "D_syn
teaches nothing", 0 means "D_syn walks exactly where the federation walked".

What D_syn is good for: DynaFed trains on it at the server; FedSynSAM reads the global ascent direction from it
(the gradient of `synthetic_loss`; fl.py). The soft cross-entropy here is the true one, a sum over classes; DynaFed's code also divides
by the number of classes C, so its step size 0.04 is 0.004 here (C = 10).

Sources: DynaFed, Pi et al. 2023 (arXiv 2211.10878) and its released code; trajectory matching, Cazenavette et al. 2022; the
augmentation, Zhao and Bilen 2021 (DSA). Read next: fl.py.
"""
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm


class Synthetic(NamedTuple):
    """images X [n, C, H, W] (normalised), label logits Y [n, classes], step size a [].  Source: DynaFed, Pi et al. 2023."""
    images: torch.Tensor
    logits: torch.Tensor
    step: torch.Tensor


def soft_cross_entropy(scores, logits):
    """Mean over samples of -sum_c softmax(Y)_c log softmax(scores)_c.  scores, logits [n, classes] -> [].

    With one-hot labels (logits of +large) it is the ordinary cross-entropy; DynaFed's code divides it by C.
    Source: DynaFed (released code), in true cross-entropy scale.
    """
    return -(logits.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def synthetic_loss(apply, w, synthetic):
    """The soft cross-entropy at w [d] on all synthetic images -> []; its gradient is FedSynSAM's estimate of "uphill".

    Source: FedSynSAM (arXiv 2602.11584), abstract; full batch and soft labels are our reading.
    """
    return soft_cross_entropy(apply(w, synthetic.images), synthetic.logits)


def unroll(apply, w, synthetic, inner_steps, look=lambda x: x):
    """M steps of gradient descent on D_syn: w = theta_0 [d] -> theta_M [d], differentiable in X, Y and a.

    look: what is done to the images before each step (augmentation).  Source: DynaFed (released code).
    """
    images, logits, step = synthetic
    for _ in range(inner_steps):
        x = look(images)
        w = w - step * torch.func.grad(lambda v: soft_cross_entropy(apply(v, x), logits))(w)
    return w


def matching_loss(end, start, target):
    """L_TM = ||end - target||^2 / ||start - target||^2, three vectors [d] -> [].

    It is 1 if end = start, 0 if end = target, and does not change when all differences are scaled.  The caller sees to it
    that start != target (`draw_segment`).  Source: DynaFed (released code); Cazenavette et al. 2022.
    """
    return (end - target).square().sum() / (start - target).square().sum()


def draw_segment(trajectory, window, average, generator):
    """A piece of trajectory [L, d]: a start w^p and a target at most `window` snapshots ahead -> (start [d], target [d]).

    average: the target is the mean of r snapshots drawn with replacement from the window, r from {2, ..., window} (r = 1
    if window is 1); otherwise it is the last snapshot of the window. A segment that does not move is drawn again; raises
    ValueError if the trajectory is too short, FloatingPointError if nothing in it moves.  Source: DynaFed's released code.
    """
    if len(trajectory) <= window:
        raise ValueError(f"a trajectory of {len(trajectory)} snapshots has no window of {window} moves; warm up longer")
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))            # noqa: E731
    for _ in range(100):
        p = pick(0, len(trajectory) - window)
        if average:
            r = pick(min(2, window), window + 1)
            target = torch.stack([trajectory[p + pick(1, window + 1)] for _ in range(r)]).mean(0)
        else:
            target = trajectory[p + window]
        if not torch.equal(target, trajectory[p]):
            return trajectory[p], target
    raise FloatingPointError("the trajectory does not move, so trajectory matching would divide by zero; is lr or server_lr tiny?")


def first_guess(n_per_class, classes, image_shape, label_scale, step, generator, like):
    """Where learning starts: X ~ N(0, 1) [n, C, H, W], Y = label_scale * one-hot [n, classes], a = step.

    like: a tensor whose type and device are used.  Source: DynaFed's released code (its scripts start at Y = 0; ours is
    a config field).
    """
    n = n_per_class * classes
    images = torch.randn(n, *image_shape, generator=generator, dtype=like.dtype).to(like.device)
    labels = torch.arange(classes, device=like.device).repeat_interleave(n_per_class)
    return Synthetic(images, label_scale * F.one_hot(labels, classes).to(like.dtype), torch.tensor(step).to(like))


def distill(apply, trajectory, guess, generator, outer_steps=200, inner_steps=10, window=3, average=True,
            rate_images=0.05, rate_labels=0.01, rate_step=1e-5, augment=False, progress=True):
    """Learn D_syn from trajectory [L, d], starting from `guess` -> (Synthetic, list of outer_steps values of L_TM).

    One outer step: draw a segment, unroll M inner steps from its start, move X, Y and a by Adam (three learning rates)
    along -grad L_TM. A step whose loss or gradient is not finite is dropped and a halved; after 10 such steps in a row
    (or if all fail) FloatingPointError is raised.  Source: DynaFed (released code); the guards are ours.
    """
    learnt = [t.clone().requires_grad_() for t in guess]
    adam = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(learnt, (rate_images, rate_labels, rate_step))])
    losses, failed = [], 0
    bar = tqdm(range(outer_steps), desc="distilling", disable=None if progress else True, leave=False, mininterval=0.5)
    for _ in bar:
        start, target = draw_segment(trajectory, window, average, generator)
        look = (lambda x: augmented(x, generator)) if augment else (lambda x: x)
        loss = matching_loss(unroll(apply, start, Synthetic(*learnt), inner_steps, look), start, target)
        gradients = torch.autograd.grad(loss, learnt)
        if all(t.isfinite().all() for t in (loss, *gradients)):
            failed = 0
            for p, g in zip(learnt, gradients):
                p.grad = g
            adam.step()
        else:
            failed += 1
            with torch.no_grad():
                learnt[2].mul_(0.5)
            if failed == min(10, outer_steps):
                raise FloatingPointError(f"the matching loss stayed non-finite for {failed} steps: lower the synthetic step size "
                                         "(syn_step) or its learning rates")
        losses.append(loss.item())
        bar.set_postfix(L_TM=f"{losses[-1]:.3f}")
    return Synthetic(*(p.detach() for p in learnt)), losses


def distill_as_set(apply, trajectory, image_shape, classes, c, generator, progress=True):
    """`first_guess` and `distill` of images [C, H, W] with the settings c (config.py) -> what `distill` returns.  Source: ours."""
    guess = first_guess(c.ipc, classes, image_shape, c.syn_labels, c.syn_step, generator, trajectory[0])
    return distill(apply, trajectory, guess, generator, c.outer_steps, c.inner_steps, c.window, c.average_targets,
                   c.rate_images, c.rate_labels, c.rate_step, c.syn_augment, progress)


def augmented(x, generator):
    """One randomly chosen differentiable change, the same kind for all images: x [n, C, H, W] -> [n, C, H, W].

    color (brightness 1, saturation 2, contrast 0.5), crop (shift by up to 1/8), cutout (a square of half the side), flip,
    scale (up to 1.2), rotate (up to 15 degrees).  Source: Zhao and Bilen 2021 (DSA), DynaFed's strengths.
    """
    n, _, H, W = x.shape
    rand = lambda *shape: torch.rand(n, *shape, generator=generator, dtype=x.dtype).to(x.device)      # noqa: E731
    kind = ("color", "crop", "cutout", "flip", "scale", "rotate")[int(torch.randint(6, (1,), generator=generator))]
    if kind == "color":
        x = x + (rand(1, 1, 1) - 0.5)
        x = (x - x.mean(1, keepdim=True)) * (2 * rand(1, 1, 1)) + x.mean(1, keepdim=True)
        return (x - x.mean((1, 2, 3), keepdim=True)) * (rand(1, 1, 1) + 0.5) + x.mean((1, 2, 3), keepdim=True)
    if kind == "cutout":
        row, col = (torch.arange(s, device=x.device) - (rand(1) * s).floor() for s in (H, W))
        return x * ~((row.abs() < H / 4)[:, None, :, None] & (col.abs() < W / 4)[:, None, None, :])
    # the others are affine maps of the plane: read pixel (u, v) of the new image at A (u, v, 1) of the old one
    A = torch.eye(2, 3, dtype=x.dtype, device=x.device).repeat(n, 1, 1)
    if kind == "crop":
        A[:, :, 2] = (2 * rand(2) - 1) * 0.25                         # in units of half the side
    elif kind == "flip":
        A[:, 0, 0] = torch.where(rand() < 0.5, -1.0, 1.0)
    elif kind == "scale":
        A[:, [0, 1], [0, 1]] = 1.2 ** (2 * rand(2) - 1)
    else:
        angle = (2 * rand() - 1) * math.radians(15)
        A[:, 0, 0], A[:, 0, 1], A[:, 1, 0], A[:, 1, 1] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    return F.grid_sample(x, F.affine_grid(A, x.shape, align_corners=False), align_corners=False)
