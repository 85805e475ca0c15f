"""Synthetic data: a few images on which training takes the same path as the federation did.

The server of a federation sees no images. But it sees its own model move, w^0, w^1, w^2, ..., and
this trajectory was made by the images of the clients. Trajectory matching, a way of dataset
distillation, looks for synthetic data D = (X, Y) on which plain gradient descent follows a piece of
the trajectory:

    theta_0 = w^p                                      p is drawn at random
    theta_{j+1} = theta_j - a grad l(theta_j; X, Y)    j = 0 ... M - 1          (`unroll`)
    L = ||theta_M - target||^2 / ||theta_0 - target||^2                         (`matching_loss`)

The target lies `window` rounds ahead, or is a mean of snapshots until then (`draw_segment`). Adam
lowers L by moving the images X [n, C, H, W], the label logits Y [n, classes] and the step size a,
with gradients through all M inner steps (`synthesize`); Adam's rate for a is so low that a hardly
moves. L = 1 means that training on D comes no nearer to the target, L = 0 that it leads
exactly there.

    DynaFed      the server trains every new global model on D                  (`finetune`)
    FedSynSAM    the clients take the gradient of `synthetic_loss` as an estimate of the gradient
                 of the global loss, and so of the ascent direction of SAM

The soft cross-entropy l sums over classes. The released code of DynaFed takes the mean over them,
so with 10 classes its step sizes are a tenth as large here (lab/presets.py).

Sources: DynaFed, Pi et al. 2023 (arXiv 2211.10878) and its released code. Trajectory matching,
Cazenavette et al. 2022.
"""

from typing import Annotated, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vision.augment import augmented


class Synthetic(NamedTuple):
    """Images X [n, C, H, W] (normalised), label logits Y [n, classes], step size a []."""

    images: torch.Tensor
    logits: torch.Tensor
    step: torch.Tensor


class Synthesis:
    """The settings of `synthesize`; a method has these settings if it inherits this class.

    The defaults are this project's choices, made on validation images, except rate_images, window
    and average_targets, which are DynaFed's. The other settings of its scripts: lab/presets.py.
    """

    ipc: Annotated[int, "synthetic images per class", 1, 1000] = 2
    outer_steps: Annotated[int, "Adam steps of the synthesis", 1, None] = 200
    inner_steps: Annotated[int, "unrolled steps M", 1, 1000] = 10
    window: Annotated[int, "the target lies at most so many rounds ahead", 1, None] = 3
    average_targets: Annotated[bool, "the target is a mean of snapshots in the window"] = True
    syn_step: Annotated[float, "first value of the synthetic step size a", 1e-12, None] = 0.1
    syn_labels: Annotated[float, "the first label logits are this times one-hot"] = 5.0
    rate_images: Annotated[float, "Adam rate of the synthetic images", 0, None] = 0.05
    rate_labels: Annotated[float, "Adam rate of the label logits", 0, None] = 0.1
    rate_step: Annotated[float, "Adam rate of the synthetic step size", 0, None] = 1e-5
    syn_augment: Annotated[bool, "differentiable augmentation in the synthesis"] = False


def soft_cross_entropy(scores, logits):
    """Mean over images of -sum_c softmax(Y)_c log softmax(scores)_c.   [n, classes] twice -> []

    With one-hot labels (large logits) it is the ordinary cross-entropy.
    """
    return -(logits.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def synthetic_loss(apply, w, images, logits):
    """The loss of the network apply(w [d], x) on synthetic images -> []."""
    return soft_cross_entropy(apply(w, images), logits)


def unroll(apply, w, batches, step):
    """Gradient descent from w = theta_0 [d]: a step on each of the batches (X, Y) -> theta_M [d].

    The result can be differentiated with respect to X, Y and the step size.
    """
    w = w.detach().requires_grad_()
    for x, y in batches:
        (g,) = torch.autograd.grad(synthetic_loss(apply, w, x, y), w, create_graph=True)
        w = w - step * g
    return w


def matching_loss(end, start, target):
    """L = ||end - target||^2 / ||start - target||^2.   three vectors [d] -> []"""
    return (end - target).square().sum() / (start - target).square().sum()


def draw_segment(trajectory, window, average, generator):
    """Draw a piece of the trajectory (a list of vectors [d]) -> (start w^p [d], target [d]).

    The target is w^{p+window}. If average, it is the mean of r snapshots, drawn with replacement
    from w^{p+1} ... w^{p+window}, with r drawn from 2 ... window (r = 1 if window is 1). A segment
    that does not move is drawn again, since the matching loss would divide by zero.
    Raises ValueError if the trajectory is too short, FloatingPointError if nothing in it moves.
    """
    if len(trajectory) <= window:
        raise ValueError(
            f"window = {window} needs a trajectory of at least {window + 1} models, and there are "
            f"{len(trajectory)}"
        )

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(100):
        p = draw(0, len(trajectory) - window)
        ahead = [trajectory[p + window]]
        if average:
            r = draw(min(2, window), window + 1)
            ahead = [trajectory[p + draw(1, window + 1)] for _ in range(r)]
        if any(not torch.equal(w, trajectory[p]) for w in ahead):  # of a mean, rounding differs
            return trajectory[p], torch.stack(ahead).mean(0)
    raise FloatingPointError(
        "the trajectory does not move: its models are equal, so nothing can be learnt"
    )


def first_guess(settings, image_shape, classes, generator, like):
    """Where the synthesis starts: noise for images, classes in order for labels -> Synthetic.

    like: a tensor of the type and on the device that are wanted.
    """
    n = settings.ipc * classes
    images = torch.randn(n, *image_shape, generator=generator, dtype=like.dtype)
    one_hot = F.one_hot(torch.arange(classes).repeat_interleave(settings.ipc), classes)
    step = like.new_tensor(settings.syn_step)
    return Synthetic(images.to(like), (settings.syn_labels * one_hot).to(like), step)


def synthesize(task, trajectory, settings, generator):
    """Learn D from the trajectory, a list of vectors [d]: (Synthetic, outer_steps values of L)."""
    window, average, M = settings.window, settings.average_targets, settings.inner_steps

    def loss_of(synthetic, s):
        start, target = draw_segment(trajectory, window, average, generator)
        X, Y, a = synthetic
        batches = [(augmented(X, generator) if settings.syn_augment else X, Y) for _ in range(M)]
        return matching_loss(unroll(task.apply, start, batches, a), start, target)

    guess = first_guess(settings, task.image_shape, task.classes, generator, trajectory[0])
    rates = (settings.rate_images, settings.rate_labels, settings.rate_step)
    return learn(loss_of, guess, settings.outer_steps, rates)


def learn(loss_of, guess, steps, rates):
    """Adam on X, Y and a with three rates: (Synthetic, values [steps] of loss_of(Synthetic, s)).

    s counts Adam's steps. One whose loss or gradient is not finite is left out, and a is halved.
    After ten such steps in a row, or if all fail, FloatingPointError is raised. This rule is this
    project's choice: DynaFed leaves it open.
    """
    learnt = Synthetic(*(x.clone().requires_grad_() for x in guess))
    adam = torch.optim.Adam([{"params": [x], "lr": rate} for x, rate in zip(learnt, rates)])
    losses, failed = [], 0
    for s in tqdm(range(steps), "synthesis", disable=None, leave=False):
        loss = loss_of(learnt, s)
        gradients = torch.autograd.grad(loss, learnt)
        losses.append(loss.item())
        if all(x.isfinite().all() for x in (loss, *gradients)):
            failed = 0
            for x, g in zip(learnt, gradients):
                x.grad = g
            adam.step()
        else:
            failed += 1
            learnt.step.data *= 0.5
        if failed == min(10, steps):
            raise FloatingPointError(
                f"the matching loss was not finite in {failed} steps in a row, although the "
                f"synthetic step size was halved each time; it is now {learnt.step.item():g}"
            )
    return Synthetic(*(x.detach() for x in learnt)), losses


def finetune(apply, w, images, logits, epochs, lr, batch):
    """DynaFed's server: w [d] after some epochs of Adam on the synthetic data -> [d].

    A new Adam in every round, as in the released code. That code also augments the images. Batches
    smaller than n are the same in every epoch, each of few classes: `first_guess` sorts them.
    """
    w = w.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)
    for _ in range(epochs):
        for x, y in zip(images.split(batch), logits.split(batch)):
            (w.grad,) = torch.autograd.grad(synthetic_loss(apply, w, x, y), w)
            adam.step()
    return w.detach()
