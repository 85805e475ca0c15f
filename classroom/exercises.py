"""Your answers. The exercises are described in exercises.md, one after the other.

    python -m classroom.exercises           check all
    python -m classroom.exercises topk      check one; its name stands above each exercise

Replace `raise NotImplementedError`. Leave names, signatures and docstrings as they are. You may add
functions and imports. This file is made by classroom/handout.py out of the chapters.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn import functional as F

import fl
import sam
import synth
from compress import count, from_bytes, pack, place_bits, seal, to_bytes, unpack, unseal
from fl import Distilling, FedAvg, FedSAM
from methods import alignment
from sam import TINY, tridiagonal, unit
from vision import data, models, task
from vision.split import Alpha, by_class

# What is imported above and not used below is for your answers.
GIVEN = (math, np, F, fl, sam, synth, alignment, data, models, count, from_bytes, pack)
GIVEN += (place_bits, seal, to_bytes, unpack, unseal, TINY, tridiagonal, unit, by_class)


# 1. Top-k: topk -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopK:
    """Keep the k largest |x_j|; the rest of x_hat is 0.

    ||x_hat - x||^2 <= (1 - k/d) ||x||^2, with equality when all |x_j| are equal.

    Fields: the kept x_j as k floats, in the order of increasing j; their places j, counted from 0,
    as k integers of ceil(log2 d) bits, in the same order.
    Source: Stich et al. 2018, Definition 2.1.
    """

    k: Annotated[float, "coordinates kept: a fraction of d if below 1, else a count", 1e-12] = 0.05
    dtype: torch.dtype = torch.float32
    unbiased = False

    def encode(self, x, generator=None):
        raise NotImplementedError

    def decode(self, buffer, d):
        raise NotImplementedError


# 2. Unbiased random-k: randk ----------------------------------------------------------------------


@dataclass(frozen=True)
class RandK:
    """Keep k coordinates chosen at random; the server redraws their places from a seed.

    scaled: x_hat = (d/k) x at the chosen places, which is unbiased with omega = d/k - 1.
    Not scaled ("random masking"): x_hat = x there, and E||x_hat - x||^2 = (1 - k/d) ||x||^2.

    Fields: the seed, an integer of 8 bytes (of which the low 32 bits count); the chosen x_j, not
    yet multiplied by d/k, as k floats in the order in which the places were drawn.
    The places are the first k of torch.randperm(d) under a CPU generator with that seed, in that
    order. In other words: start with r = 0..d-1. For i = 0, 1, ..., d-2 exchange r_i and r_z, where
    z = i + (u_i mod (d - i)) and u_0, u_1, ... are the 32-bit outputs of the Mersenne Twister
    MT19937, initialised with the low 32 bits of the seed. The places are r_0, ..., r_{k-1}.
    Source: Stich et al. 2018.
    """

    k: Annotated[float, "coordinates kept: a fraction of d if below 1, else a count", 1e-12] = 0.05
    scaled: Annotated[bool, "multiply by d/k (unbiased), or not (random masking)"] = True
    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self):
        return self.scaled

    @property
    def contractive(self):
        return not self.scaled

    def places(self, seed, d):
        """The places that a seed stands for -> int64 [k], the same on every device."""
        generator = torch.Generator().manual_seed(seed & (2**32 - 1))
        return torch.randperm(d, generator=generator)[: count(self.k, d)]

    def encode(self, x, generator=None):
        raise NotImplementedError

    def decode(self, buffer, d):
        raise NotImplementedError


# 3. QSGD and its variance: qsgd -------------------------------------------------------------------


@dataclass(frozen=True)
class QSGD:
    """Stochastic quantization: |x_j| / scale is rounded at random to the grid 0, 1/s, 2/s, ..., 1.

    u = s |x_j| / scale becomes the level floor(u) + 1 with probability p_j = u - floor(u), and
    floor(u) otherwise. x_hat_j = sign(x_j) * scale * level / s, which is unbiased:
    E||x_hat - x||^2 = (scale / s)^2 sum_j p_j (1 - p_j), for each bucket.
    The scale is ||x||_2, as in the paper, or max |x_j|, whose grid is finer.

    x is cut into n = ceil(d / q) buckets of q = `bucket` coordinates, and the last may be shorter.
    bucket = 0, or a bucket of at least d, is one bucket.
    Fields: the n scales as floats; for each coordinate an integer of 1 + b bits, where
    b = ceil(log2(s + 1)). Its low b bits are the level. Its highest bit is the sign, 1 for minus; a
    level 0 may have either. So s = 2^(c-1) - 1 is "c-bit quantization" with the sign inside c.

    Example: QSGD(levels=3, scale="max", bucket=0) makes of [3, -1, 0, 2] the bytes 00 00 40 40 (the
    float 3) 2B 04 (the integers 0b011, 0b101, 0b000, 0b010) and the checksum.
    Source: Alistarh et al. 2017, section 3.1. The code of fixed length is this project's own.
    """

    levels: Annotated[
        int, "levels s; with the sign, 1 + ceil(log2(s+1)) bits a coordinate", 1, 2**15 - 1
    ] = 1
    scale: Annotated[Literal["l2", "max"], "scale of a bucket"] = "max"
    bucket: Annotated[int, "coordinates that share a scale; 0 is all", 0] = 512
    dtype: torch.dtype = torch.float32
    unbiased = True

    def encode(self, x, generator=None):
        n, q = self.shape(len(x))
        rows = F.pad(x, (0, n * q - len(x))).view(n, q)
        scales = self.bucket_scales(rows)
        level = self.random_levels(rows, scales, generator).view(-1)[: len(x)]
        return seal(to_bytes(scales), self.write(level.to(torch.int32), x < 0))

    def decode(self, buffer, d):
        n, q = self.shape(d)
        scales, code = unseal(buffer).tensor_split([n * self.dtype.itemsize])
        scales, level = from_bytes(scales, n, self.dtype), self.read(code, d)
        if (scales < 0).any() or (level.abs() > self.levels).any():
            raise ValueError(f"damaged buffer: a scale below 0 or a level above s = {self.levels}")
        step = scales / self.levels
        rows = F.pad(level.to(self.dtype), (0, n * q - d)).view(n, q)
        x = (rows * step[:, None]).view(-1)[:d]
        if not x.isfinite().all():
            raise ValueError("damaged buffer: a level times its scale is not finite")
        return x

    def shape(self, d):
        """How x [d] is cut: -> (number of buckets n, their length q)."""
        q = self.bucket if 0 < self.bucket < d else d
        return -(-d // q), q

    def bucket_scales(self, rows):
        """One scale a bucket [n, q] -> [n], already rounded to the wire's type.

        It is rounded before it is used: both ends then have the same grid, and the code stays
        unbiased. Squares are summed in float64, where they cannot overflow.
        """
        raise NotImplementedError

    def random_levels(self, rows, scales, generator):
        """u of rows [n, q], rounded to levels at random -> [n, q]."""
        raise NotImplementedError

    def write(self, level, negative):
        """Levels int32 [d] and signs bool [d] -> bytes."""
        b = self.levels.bit_length()
        return pack(level + (negative.to(torch.int32) << b), 1 + b)

    def read(self, code, d):
        """The inverse of `write`: bytes -> signed levels int64 [d]."""
        b = self.levels.bit_length()
        code = unpack(code, d, 1 + b)
        level = code & ((1 << b) - 1)
        return torch.where(code >> b > 0, -level, level)


# 4. Error feedback: feedback ----------------------------------------------------------------------


def with_feedback(compressor, x, e, generator=None):
    """Error feedback: send what is owed too, and remember what was left out.

        p = e + x;  send C(p);  e <- p - C(p)

    x [d] is the update and already contains the learning rate; e [d] is the residual that this
    client kept, 0 at first -> (buffer, new e [d]). The sum of everything sent plus the current e is
    the sum of all x. Use it with contractive compressors (topk, sign, unscaled randk). With others
    e may grow without bound, as with scaled randk, so fl.Federation refuses a compressor whose
    attribute `contractive` is False. QSGD has no such attribute: there it depends on the settings.
    Source: Karimireddy et al. 2019 (EF-SGD).
    """
    raise NotImplementedError


# 5. The step of SAM: perturb ----------------------------------------------------------------------


def perturb(w, u, rho):
    """The perturbed point w + rho u / ||u||.   w [d], u [d], rho >= 0 -> [d]

    One l2 norm over all coordinates. (FedLESAM's released code divides by the sum of the layers'
    norms instead, which moves w by as little as rho / 8 in a resnet18.)
    """
    raise NotImplementedError


# 6. FedLESAM's direction: fedlesam ----------------------------------------------------------------


class FedLESAM(FedSAM):
    """FedSAM, but u = w_old - w^t, where w_old is the global model of this client's last round.

    Training should have lowered F on the way from w_old to w^t, so the way back raises it. u is the
    same in all K steps and costs no gradient. In a client's first round u = 0: no ascent.
    """

    def first_memory(self, received):
        raise NotImplementedError

    def direction(self, w, batch, received, mine):
        raise NotImplementedError

    def upload(self, w, received, mine, lr_sum):
        raise NotImplementedError


# 7. The Dirichlet split: dirichlet ----------------------------------------------------------------


def dirichlet(labels, N, rng, alpha: Alpha = 0.1):
    """Client i draws images of class c with probability p_i[c], where p_i ~ Dir(alpha).

    The clients take turns to draw one image, n // N times. A class that has run out leaves every
    prior. At alpha 0.1 this happens to most clients, so their last images come from classes that
    they did not ask for; as they take turns, it happens to all of them equally often. Turns, and
    drawing without replacement, are this project's choice.
    """
    raise NotImplementedError


# 8. Unrolled steps and the matching loss: unroll --------------------------------------------------


def unroll(apply, w, batches, step):
    """Gradient descent from w = theta_0 [d]: a step on each of the batches (X, Y) -> theta_M [d].

    The result can be differentiated with respect to X, Y and the step size.
    """
    raise NotImplementedError


def matching_loss(end, start, target):
    """L = ||end - target||^2 / ||start - target||^2.   three vectors [d] -> []"""
    raise NotImplementedError


# 9. FedSynSAM's direction: fedsynsam --------------------------------------------------------------


class FedSynSAM(Distilling, FedSAM):
    """FedSAM, but u comes from the synthetic data, an estimate of the gradient of F.

        u = (1 - mix) g_i / ||g_i||  +  mix g_syn / ||g_syn||

    Two gradients a step; three if 0 < mix < 1. Until the synthesis it is FedAvg or FedSAM. Of the
    paper only the abstract was at hand, which does not say how to blend, or what to do before the
    synthesis: both are this project's choices.
    """

    mix: Annotated[float, "weight of the synthetic gradient in u", 0, 1] = 1.0
    warmup_method: Annotated[Literal["fedsam", "fedavg"], "before the synthesis"] = "fedavg"

    def broadcast_once(self):
        X, Y = self.state["X"], self.state["Y"]
        return super().broadcast_once() | ({} if X is None else {"X": X, "Y": Y})

    def direction(self, w, batch, received, mine):
        raise NotImplementedError

    def synthetic_gradient(self, w, received):
        """The gradient of the loss on the synthetic images at w [d] -> [d]."""
        raise NotImplementedError


# 10. GradAlign's displacement and its regulariser: gradalign --------------------------------------


class Aligned(FedAvg):
    """FedAvg, but every client first sends its full gradient at w^t and receives the mean of all.

    So a round costs a second exchange of [d] each way, and one gradient over all images of a
    client. mine["g_i"] and received["g_i"] are what the server decoded from it, and the mean.
    Source: Dandi et al. 2022, released code.
    """

    beta: Annotated[float, "length of v_i per unit of gradient; 0: FedAvg", 0, None] = 0.025

    exchanges = ("survey", "train")

    def first_memory(self, received):
        return super().first_memory(received) | {"g_i": torch.zeros_like(received["w"])}

    def survey(self, received, mine, batches, lr):
        """The full gradient at w^t, over batches [n, B, 4] of all images: ({name: [d]}, memory)."""
        images = (batches[..., 0] >= 0).sum(1).to(received["w"])
        shares = images / images.sum()
        g_i = sum(share * self.gradient(received["w"], x) for share, x in zip(shares, batches))
        return {"g_i": g_i}, mine

    def displacement(self, received, mine):
        """v_i [d], the same in all steps of a round."""
        raise NotImplementedError


class GradAlign(Aligned):
    """FedAvg, but the gradient is computed at w + v_i: G = g_i(w + v_i).

    One gradient a step, and one over all images of a client a round. Source: Dandi et al. 2022.
    """

    def point(self, w, batch, received, mine):
        raise NotImplementedError


def disagreement(task, w, each=map):
    """r = 1/(2N) sum_i ||g_i - g||^2 over the gradients g_i of all N clients at w [d]: a number."""
    raise NotImplementedError


# 11. MAN's term: man ------------------------------------------------------------------------------


def mean_square(a):
    """The mean square of the numbers of each image, in any shape: a [B, ...] -> [B]."""
    raise NotImplementedError


class Images(task.Images):
    """Image classification by N clients.

    model: models.Model; train: data.Images of all clients; parts: N tensors of image numbers.

    w0 [d], weights [d], shapes, apply    as in models.Model
    image_shape (C, H, W), classes        of the images; number of classes
    sizes                                 number of images of each client

    A batch is a tensor [B, 4] of rows (image number, shift down, shift right, flip); see data.py.
    """

    def loss(self, w, batch):
        """What a client minimises: the mean cross-entropy of w [d] on a batch [B, 4] -> [].

        MAN adds man/2 times the mean activity of the hidden layers, in every gradient that a client
        takes of its own images (0.15 in its paper, for CIFAR-100). What is measured, and the loss
        on synthetic images, stay plain.
        """
        raise NotImplementedError


# 12. The largest eigenvalue: lanczos --------------------------------------------------------------


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
    raise NotImplementedError


# 13. Open: beat the synthetic direction: mine -----------------------------------------------------


class Mine(FedSAM):
    """An ascent direction of your own, at no more bytes than FedSynSAM's."""

    def direction(self, w, batch, received, mine):
        raise NotImplementedError


if __name__ == "__main__":
    import sys

    from classroom import grader

    sys.exit(grader.main())
