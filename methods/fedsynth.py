"""FedSynth: a client sends a few synthetic images in place of its update.

The server trains on them, and what comes of it is the update:

    theta_0 = w^t       theta_j = theta_{j-1} - a grad l(theta_{j-1}; X_j, Y_j),   j = 1 ... M
    x_hat = theta_M - w^t

M batches X_j [n, C, H, W] of images, their label logits Y_j [n, classes] and the step size a are
learnt by S steps of Adam, with gradients through all M steps (synth.py). Adam minimises one of

    "data"      F_i(theta_M) on the client's real batches; the client makes no local steps
    "update"    ||theta_M - w_K||^2 / ||w_K - w^t||^2, after K local steps

A message has a size that does not depend on d. It takes the place of `compress`, which only decides
here whether `error_feedback = auto` means on. Nothing keeps the learnt images from looking like the
client's own. If w^t itself does better ("data": on one batch), a = 0 is sent, so no message is
worse than none. So ||x_hat - x|| <= ||x|| with "update", and error feedback may be used.

Sources: "data", Hu et al. 2022 (FedSynth, arXiv 2204.01273), of which the abstract was at hand.
"update", Goetz and Tewari 2020. Start, image formats and the last rule are this project's choices.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch.nn import functional as F

import synth
from compress import expect, from_bytes, seal, to_bytes, unseal
from fl import FedAvg


class FedSynth(FedAvg):
    """FedAvg, but a client sends a few synthetic images in place of its update.

    One gradient a step with "update", none with "data"; and S M gradients of gradients a round,
    with "data" also S of F_i. The server computes M gradients a client. "data" is the paper's.
    The default is "update", which did better here.
    """

    fs_objective: Annotated[Literal["update", "data"], "what the images are learnt for"] = "update"
    fs_batches: Annotated[int, "synthetic batches M, used one after the other", 1, 1000] = 4
    fs_images: Annotated[int, "images of a synthetic batch n", 1, 1000] = 4
    fs_steps: Annotated[int, "Adam steps S of a client in a round", 1, 10**5] = 20
    fs_rate_images: Annotated[float, "Adam rate of the images", 0, None] = 0.1
    fs_rate_labels: Annotated[float, "Adam rate of the label logits", 0, None] = 0.1
    fs_rate_step: Annotated[float, "Adam rate of the step size", 0, None] = 0.005
    fs_step: Annotated[float, "first value of the step size a", 1e-12, None] = 0.2
    fs_labels: Annotated[float, "the first label logits are this times one-hot", 0, None] = 1.0
    fs_format: Annotated[
        Literal["float32", "float16", "uint8"], "how images are sent; the rest is float32"
    ] = "uint8"

    @property
    def fed_back(self):
        """Nothing, with the objective "data": it does not look at the update."""
        return ("update",) if self.fs_objective == "update" else ()

    def codec(self, compressor, received, batches=None):
        return AsData(self.task, received["w"], self, batches)

    def step(self, w, batch, received, mine, lr):
        if self.fs_objective == "data":
            return w, mine
        return super().step(w, batch, received, mine, lr)


@dataclass
class AsData:
    """An update as synthetic data: encode learns them, decode trains on them.

    w [d] is what the client received, settings are those of FedSynth, batches [K, B, 4] are the
    client's own of this round; decode needs none.
    Fields: a as a float; Y [M, n, classes] as floats; X [M, n, C, H, W] as `write_images` has it.
    """

    task: Any
    w: torch.Tensor
    settings: Any
    batches: torch.Tensor = None

    @property
    def shape(self):
        return self.settings.fs_batches, self.settings.fs_images, *self.task.image_shape

    def encode(self, x, generator=None):
        """x [d] -> buffer. With "data", x is 0 and not looked at."""
        c, learnt = self.settings, self.first_guess(generator)
        if c.fs_objective == "data" or x.any():
            rates = (c.fs_rate_images, c.fs_rate_labels, c.fs_rate_step)
            learnt, _ = synth.learn(
                lambda synthetic, s: self.objective(synthetic, x, s), learnt, c.fs_steps, rates
            )
        silent = learnt._replace(step=0 * learnt.step)
        better = self.objective(learnt, x) < self.objective(silent, x)
        return self.pack(learnt if better else silent)

    def decode(self, buffer, d):
        """buffer -> x_hat [d]; ValueError if it is damaged or does not stay finite."""
        X, Y, a = self.unpack(buffer)
        update = synth.unroll(self.task.apply, self.w, zip(X, Y), a).detach() - self.w
        if not update.isfinite().all():
            raise ValueError("damaged buffer: training on its images does not stay finite")
        return update

    def first_guess(self, generator):
        """Where learning starts: noise for images, and labels of the client's own images."""
        images = torch.randn(
            self.shape,
            generator=generator,
            dtype=self.w.dtype,
            device=generator.device if generator else "cpu",
        )
        labels = F.one_hot(self.own_labels(), self.task.classes)
        step = torch.tensor(self.settings.fs_step)
        logits = self.settings.fs_labels * labels
        return synth.Synthetic(images.to(self.w), logits.to(self.w), step.to(self.w))

    def own_labels(self):
        """The labels of the round's images, repeated as needed -> [M, n]."""
        M, n = self.shape[:2]
        labels = []
        for batch in self.batches:
            _, y, weight = self.task.examples(batch)
            labels.append(y[weight > 0])
        labels = torch.cat(labels)
        return labels.repeat(-(-M * n // len(labels)))[: M * n].view(M, n)

    def objective(self, synthetic, x, s=0):
        """What step s of the learning makes small -> [].

        It sees the images as they will be sent; its gradient takes the rounding for the identity.
        """
        X, Y, a = synthetic
        bytes_of_X = write_images(X.detach(), self.settings.fs_format)
        as_sent = read_images(bytes_of_X, self.shape, self.settings.fs_format, X.dtype)
        X = X + (as_sent - X).detach()
        end = synth.unroll(self.task.apply, self.w, zip(X, Y), a)
        if self.settings.fs_objective == "data":
            return self.settings.loss(end, self.batches[s % len(self.batches)])
        return synth.matching_loss(end, self.w, self.w + x)

    def pack(self, synthetic):
        X, Y, a = synthetic
        return seal(to_bytes(a), to_bytes(Y), write_images(X, self.settings.fs_format))

    def unpack(self, buffer):
        """The inverse of `pack` -> Synthetic."""
        dtype, M, n = self.w.dtype, *self.shape[:2]
        numbers = 1 + M * n * self.task.classes
        body, format = unseal(buffer), self.settings.fs_format
        head, images = body.tensor_split([numbers * dtype.itemsize])
        head = from_bytes(head, numbers, dtype)
        X = read_images(images, self.shape, format, dtype)
        return synth.Synthetic(X, head[1:].view(M, n, -1), head[0])


# ------------------------------------------------------------------------------ images as bytes


def image_type(format, dtype):
    """The type of a number on the wire; "float32" means the type of w, float64 in tests."""
    return {"float32": dtype, "float16": torch.float16, "uint8": torch.uint8}[format]


def image_bytes(shape, format, dtype):
    """Bytes that images of this shape take; uint8 adds two floats."""
    ends = 2 * dtype.itemsize if format == "uint8" else 0
    return math.prod(shape) * image_type(format, dtype).itemsize + ends


def write_images(x, format):
    """Images of any shape -> bytes: as floats, as half floats, or as integers 0..255.

    Half floats have a relative error of 2^-11. Integers stand for a grid between the minimum and
    the maximum, which are sent first, as floats; the error is at most (max - min) / 510.
    """
    kind = image_type(format, x.dtype)
    if format != "uint8":
        largest = min(torch.finfo(kind).max, torch.finfo(x.dtype).max)
        return to_bytes(x.clamp(-largest, largest).to(kind))
    ends = torch.stack(x.aminmax())
    low, high = ends.double()  # in float64 their difference is finite
    level = (x.double() - low) * (255 / (high - low).clamp_min(1e-300))
    return torch.cat([to_bytes(ends), to_bytes(level.round().clamp(0, 255).to(kind))])


def read_images(b, shape, format, dtype):
    """The inverse of `write_images`: bytes -> x of this shape and type, or ValueError."""
    kind, n = image_type(format, dtype), math.prod(shape)
    if format != "uint8":
        return from_bytes(b, n, kind).to(dtype).view(shape)
    expect(b, image_bytes(shape, format, dtype))
    ends, levels = b.tensor_split([2 * dtype.itemsize])
    low, high = from_bytes(ends, 2, dtype)
    part = levels.to(dtype) / 255
    return (low * (1 - part) + high * part).view(shape)
