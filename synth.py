"""Synthetic data: a few images that teach what a federation, or one of its clients, has learnt.

The server of a federation sees no images. But it sees its own model move, w^0, w^1, w^2, ..., and that trajectory is a
trace of everybody's data. DynaFed's trajectory matching looks for a small synthetic set D_syn = (X, Y) such that plain
gradient descent ON D_syn walks along a piece of the trajectory:

    theta_0 = w^p                                     p drawn at random
    theta_{j+1} = theta_j - a grad l(theta_j; X, Y)   j = 0..M-1, the unrolled inner steps        (`unroll`)
    L_TM = ||theta_M - target||^2 / ||theta_0 - target||^2                                        (`matching_loss`)

with the target some way ahead, w^{p+r} or an average of such snapshots (`draw_segment`). X (images), Y (label logits) and
the step size a are learnt by Adam on L_TM, with gradients through all M inner steps (`distill`). L_TM = 1 means "D_syn
teaches nothing", 0 means "D_syn walks exactly where the federation walked".

FedSynth turns this round: a CLIENT learns M batches (X_1, Y_1), ..., (X_M, Y_M) and a, such that the M steps that use them one
after the other lead from w^t to where it wants the model to be, and sends the batches instead of an update (`AsData`, a
compressor like those of compress.py, but for its price: S M gradients of gradients a message).

What D_syn is good for: DynaFed trains on it at the server; FedSynSAM reads the global ascent direction from it
(the gradient of `synthetic_loss`; fedsynsam.py). The soft cross-entropy here is the true one, a sum over classes; DynaFed's code also divides
by the number of classes C, so its step size 0.04 is 0.004 here (C = 10).

Sources: DynaFed, Pi et al. 2023 (arXiv 2211.10878) and its released code; trajectory matching, Cazenavette et al. 2022; the
augmentation, Zhao and Bilen 2021 (DSA); FedSynth, Hu et al. 2022 (arXiv 2204.01273), and Goetz and Tewari 2020 (arXiv
2008.04489). Read next: sharpness.py.
"""
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from bits import from_bytes, seal, to_bytes, unseal


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


def unroll(apply, w, synthetic, inner_steps=None, look=lambda x: x):
    """M steps of gradient descent on D_syn: w = theta_0 [d] -> theta_M [d], differentiable in X, Y and a.

    Every step sees all images X [n, C, H, W], `inner_steps` times over (DynaFed); or, if inner_steps is None, X [M, n, C, H, W]
    and Y [M, n, classes] are M batches, used one after the other (FedSynth).
    look: what is done to the images before each step (augmentation).  Source: DynaFed (released code); Hu et al. 2022.
    """
    images, logits, step = synthetic
    learning = any(t.requires_grad for t in synthetic)
    for x, y in zip(images, logits) if inner_steps is None else [(images, logits)] * inner_steps:
        x = look(x)
        here = w if w.requires_grad else w.detach().requires_grad_()
        g, = torch.autograd.grad(soft_cross_entropy(apply(here, x), y), here, create_graph=learning)
        w = (here if learning else w) - step * g
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

    One outer step: draw a segment, unroll M inner steps from its start, move X, Y and a along -grad L_TM (`learn`, which
    raises FloatingPointError).  Source: DynaFed (released code).
    """
    def loss_of(learnt, _):
        start, target = draw_segment(trajectory, window, average, generator)
        look = (lambda x: augmented(x, generator)) if augment else (lambda x: x)
        return matching_loss(unroll(apply, start, learnt, inner_steps, look), start, target)
    return learn(loss_of, guess, outer_steps, (rate_images, rate_labels, rate_step), "syn_step", progress)


def learn(loss_of, guess, steps, rates, setting, progress=False):
    """Adam on X, Y and a, from `guess`, with three rates: -> (Synthetic, the values [steps] of loss_of(Synthetic, s)).

    A step whose loss or gradient is not finite is dropped and a halved; after 10 such steps in a row (or if all fail)
    FloatingPointError is raised; it names the setting that a starts from.  Source: DynaFed (released code); the guards are ours.
    """
    learnt, m, v, k = guess, *(Synthetic(*map(torch.zeros_like, guess)) for _ in "mv"), 0
    losses, failed = [], 0
    bar = tqdm(range(steps), desc="distilling", disable=None if progress else True, leave=False, mininterval=0.5)
    for s in bar:
        here = Synthetic(*(x.detach().requires_grad_() for x in learnt))
        loss = loss_of(here, s)
        gradients = torch.autograd.grad(loss, here)
        if all(x.isfinite().all() for x in (loss, *gradients)):
            failed, k = 0, k + 1
            learnt, m, v = (Synthetic(*after) for after in zip(*(adam(*each, k) for each in zip(learnt, gradients, m, v, rates))))
        else:
            failed += 1
            learnt = learnt._replace(step=0.5 * learnt.step)
            if failed == min(10, steps):
                raise FloatingPointError(f"the matching loss stayed non-finite for {failed} steps: lower the synthetic step size "
                                         f"({setting}) or its learning rates")
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return learnt, losses


def adam(x, g, m, v, rate, k):
    """Step k = 1, 2, ... of Adam along the gradient g [...] at x [...] -> (x, m, v) after it; m and v [...] are 0 at first.

        m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     x <- x - rate m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + 1e-8)

    b1 = 0.9, b2 = 0.999; the order of operations is torch.optim.Adam's, so the bits are, too (on a CPU). That one would import torch's
    compiler, which takes two seconds of a process that else ends after six; so would torch.func.grad in `unroll`.
    Source: Kingma and Ba 2015 (Adam), Algorithm 1.
    """
    m, v = torch.lerp(m, g, 1 - 0.9), (0.999 * v).addcmul(g, g, value=1 - 0.999)
    return x.addcdiv(m, v.sqrt() / (1 - 0.999**k)**0.5 + 1e-8, value=-rate / (1 - 0.9**k)), m, v


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


# ---------------------------------------------------------------------------------------------- an update as data
@dataclass(frozen=True)
class AsData:
    """FedSynth's message: M batches of n images, their label logits and a step size; training on them from w [d] is the update.

    encode: x [d] -> buffer: D_syn = (X [M, n, C, H, W], Y [M, n, classes], a), learnt in `steps` steps of Adam on
        objective "data":    real(theta_M, s), the loss of the s-th mini-batch of real images; x is not looked at
        objective "update":  ||theta_M - (w + x)||^2 / ||x||^2, if `real` is None
    decode: buffer -> theta_M - w [d]; only apply, w, shape, classes and the number formats matter here. What is damaged, or does
    not stay finite, raises ValueError.
    Labels and a are floats of type `dtype`, images are so too, or have 16 or 8 bits. The learning sees the images as they will be
    sent (its gradient takes the rounding for the identity).  first [M n]: the classes from which Y starts.
    A message is never worse than none: if w itself does better (on the first real mini-batch; on x), a = 0 is sent. So
    ||x_hat - x|| <= ||x|| with objective "update", and error feedback may be used there.
    Source: "data", Hu et al. 2022 (FedSynth), of which the abstract was at hand; "update", Goetz and Tewari 2020; start, formats
    and the never-worse rule, ours.
    """
    apply: Callable
    w: torch.Tensor
    shape: tuple
    classes: int
    format: str = "float32"
    real: Callable = None
    first: torch.Tensor = None
    steps: int = 30
    rates: tuple = (0.1, 0.1, 0.01)
    step: float = 0.1
    label_scale: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def size(self):
        """Bytes of a buffer, those of every [d]: D_syn and a checksum.  Source: ours."""
        return self.dtype.itemsize * (1 + math.prod(self.shape[:2]) * self.classes) + image_bytes(self.shape, self.format, self.dtype) + 4

    def guess(self, generator=None):
        """Where learning starts: X ~ N(0, 1), Y = label_scale * one-hot(first), a = step -> Synthetic, X [M, n, C, H, W].  Source: ours."""
        images = torch.randn(self.shape, generator=generator, dtype=self.w.dtype, device=generator.device if generator else "cpu")
        labels = self.label_scale * F.one_hot(self.first.view(self.shape[:2]), self.classes)
        return Synthetic(images.to(self.w), labels.to(self.w), torch.tensor(self.step).to(self.w))

    def objective(self, synthetic, x, s=0):
        """What outer step s makes small, for D_syn as it will be sent and x [d] -> [].  Source: Hu et al. 2022; Goetz and Tewari 2020."""
        images = synthetic.images
        sent = read_images(write_images(images.detach(), self.format, self.dtype), self.shape, self.format, self.dtype)
        end = unroll(self.apply, self.w, synthetic._replace(images=images + (sent - images).detach()))
        return self.real(end, s) if self.real else matching_loss(end, self.w, self.w + x)

    def encode(self, x, generator=None):
        learnt = self.guess(generator)
        if self.real or x.any():                                        # there is something to learn
            learnt, _ = learn(lambda synthetic, s: self.objective(synthetic, x, s), learnt, self.steps, self.rates, "fs_step")
        silent = learnt._replace(step=0 * learnt.step)
        return self.pack(learnt if self.objective(learnt, x) < self.objective(silent, x) else silent)

    def pack(self, synthetic):
        """D_syn, X [M, n, C, H, W] -> buffer: a, Y, X, checksum.  Source: ours."""
        images, logits, step = synthetic
        return seal(to_bytes(step.to(self.dtype)), to_bytes(logits.to(self.dtype)), write_images(images, self.format, self.dtype))

    def unpack(self, buffer):
        """The inverse of `pack` -> Synthetic, X [M, n, C, H, W]; ValueError if the buffer is damaged.  Source: ours."""
        body, bits = unseal(buffer, self.size - 4), self.dtype.itemsize
        labels = bits * (1 + math.prod(self.shape[:2]) * self.classes)
        numbers = from_bytes(body[:labels], self.dtype)
        images = read_images(body[labels:], self.shape, self.format, self.dtype)
        return Synthetic(images.to(self.w.dtype), numbers[1:].view(*self.shape[:2], -1).to(self.w.dtype), numbers[0].to(self.w.dtype))

    def decode(self, buffer, d):
        update = unroll(self.apply, self.w, self.unpack(buffer)) - self.w
        if not update.isfinite().all():
            raise ValueError("damaged buffer: training on its images does not stay finite")
        return update


FORMATS = {"float32": None, "float16": torch.float16, "uint8": torch.uint8}                # None: the wire's own floats


def image_bytes(shape, format, dtype):
    """Bytes that images of a shape [...] take; floats are of type dtype, uint8 adds two of them.  Source: ours."""
    return math.prod(shape) * (FORMATS[format] or dtype).itemsize + 2 * dtype.itemsize * (format == "uint8")


def write_images(x, format, dtype):
    """x [...] -> its bytes: floats of type dtype, half floats (relative error 2^-11), or whole numbers 0..255 between min and max.

    The error of uint8 is at most (max - min) / 510; min and max are sent first.  Source: ours.
    """
    if format != "uint8":
        kind = FORMATS[format] or dtype
        largest = min(torch.finfo(kind).max, torch.finfo(x.dtype).max)
        return to_bytes(x.clamp(-largest, largest).to(kind))
    ends = torch.stack(x.aminmax()).to(dtype)
    low, high = ends.double()                                           # in float64 their difference is finite
    level = ((x.double() - low) * (255 / (high - low).clamp_min(1e-300))).round().clamp(0, 255)
    return torch.cat([to_bytes(ends), level.to(torch.uint8).view(-1)])


def read_images(b, shape, format, dtype):
    """The inverse of `write_images`: bytes -> x [...] of type dtype; ValueError for a number that is not finite.  Source: ours."""
    if format != "uint8":
        return from_bytes(b, FORMATS[format] or dtype).to(dtype).view(shape)
    (low, high), part = from_bytes(b[:2 * dtype.itemsize], dtype), b[2 * dtype.itemsize:].to(dtype) / 255
    return (low * (1 - part) + high * part).view(shape)
