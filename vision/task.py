"""What is learnt, and how well: the loss of the clients' images, their batches, and the accuracy.

The loop and the methods (fl.py) know a task by a few words only, listed in fl.py. So they run
unchanged on anything that has these words, as on the quadratics of the tests, whose every quantity
is known in closed form. Here the task is to classify images:

    F_i(w) = mean over the images (x, y) of client i of  cross-entropy(apply(w, x), y)

Sources: McMahan et al. 2017, equation (1). The term of MAN, Yashwanth et al. 2024 (arXiv
2512.08314).
"""

import math
from typing import Annotated

import torch
from torch.nn import functional as F

from vision import data

MOST_ROWS = 10**8  # of batches that are drawn at once


class Images:
    """Image classification by N clients.

    model: models.Model; train: data.Images of all clients; parts: N tensors of image numbers.

    w0 [d], weights [d], shapes, apply    as in models.Model
    image_shape (C, H, W), classes        of the images; number of classes
    sizes                                 number of images of each client

    A batch is a tensor [B, 4] of rows (image number, shift down, shift right, flip); see data.py.
    """

    def __init__(
        self,
        model,
        train,
        parts,
        batch: Annotated[int, "images per local step", 1, 10**5] = 20,
        local_steps: Annotated[int, "local steps K of every client", 1, 10**5] = 10,
        local_epochs: Annotated[int, "epochs instead of local_steps; 0: steps", 0, 10**4] = 0,
        augment: Annotated[bool, "shift images by up to 4 pixels and flip them"] = False,
        man: Annotated[float, "weight zeta of MAN's term in the loss; 0: without", 0, None] = 0.0,
        bf16: Annotated[
            bool, "gradients on clients' images in bfloat16, all else in float32"
        ] = False,
    ):
        if not local_epochs and batch * local_steps > MOST_ROWS:
            raise ValueError(
                f"batch = {batch} times local_steps = {local_steps} is {batch * local_steps:.2g} "
                f"images for one visit of a client; at most {MOST_ROWS:.0e}"
            )
        self.w0, self.weights, self.shapes = model.w0, model.weights, model.shapes
        self.apply, self.watched = model.apply, model.watched
        self.train, self.parts = train, parts
        self.batch, self.local_steps, self.local_epochs = batch, local_steps, local_epochs
        self.augment, self.man, self.bf16 = augment, man, bf16
        self.sizes = [len(part) for part in parts]
        self.image_shape, self.classes = tuple(train.x.shape[1:]), len(train.classes)

    def loss(self, w, batch):
        """What a client minimises: the mean cross-entropy of w [d] on a batch [B, 4] -> [].

        MAN adds man/2 times the mean activity of the hidden layers, in every gradient that a client
        takes of its own images (0.15 in its paper, for CIFAR-100). What is measured, and the loss
        on synthetic images, stay plain.
        """
        x, y, weight = self.examples(batch)
        if self.bf16:
            # w itself stays float32, so that a step below the 8 bits of bfloat16 is not lost
            w, x = w.bfloat16(), x.bfloat16()
        scores, activity = self.watched(w, x) if self.man else (self.apply(w, x), None)
        each = F.cross_entropy(scores.to(weight.dtype), y, reduction="none")
        if self.man:
            each = each + self.man / 2 * activity
        return (each * weight).sum()

    def examples(self, batch):
        """Images and labels of a batch [B, 4] -> data.Batch (x, y, weight)."""
        return self.train.batch(batch, self.augment)

    def plan(self, client, generator):
        """The batches of a client's round -> [K, B, 4]. The generator lives on the CPU."""
        mine = self.parts[client]
        lengths = self.batch, self.local_steps, self.local_epochs
        rows = data.draw_batches(mine, *lengths, generator, self.augment)
        return rows.to(self.train.y.device)

    def steps(self, client):
        """K, the number of batches of `plan`, without drawing them."""
        if self.local_epochs:
            return self.local_epochs * math.ceil(self.sizes[client] / self.batch)
        return self.local_steps

    def everything(self, client):
        """All images of a client once, as they are -> [n, B, 4], the last batch padded with -1.

        The mean of the gradients over these, each weighted by its size, is that of F_i.
        """
        mine = self.parts[client]
        numbers = F.pad(mine, (0, -len(mine) % self.batch), value=-1)
        return data.unmoved(numbers.view(-1, self.batch)).to(self.train.y.device)

    def balanced(self, n, generator):
        """About n images of all clients, equally many of each class -> [n, 4].

        No client can see these; they are for measuring, and for a method that cheats on purpose.
        """
        y = self.train.y
        numbers = []
        for c in range(self.classes):
            mine = (y == c).nonzero().view(-1)
            order = torch.randperm(len(mine), generator=generator)
            numbers.append(mine[order[: max(1, n // self.classes)].to(y.device)])
        return data.unmoved(torch.cat(numbers))


def evaluate(apply, w, images, chunk=500, each=map):
    """Mean cross-entropy and accuracy in 0..1 of w [d] on all of data.Images -> (loss, accuracy).

    Without any image both are nan. each: `map`, or the map of a thread pool.
    """
    n = len(images.y)
    if n == 0:
        return math.nan, math.nan

    def sums(numbers):
        with torch.no_grad():
            x, y, _ = next(images.chunks(chunk, numbers))
            scores = apply(w, x)
            loss = F.cross_entropy(scores, y, reduction="sum").double()
            return torch.stack([loss, (scores.argmax(1) == y).sum()])

    parts = torch.arange(n, device=images.y.device).split(chunk)
    zero = torch.zeros(2, dtype=torch.float64, device=w.device)
    loss, right = sum(each(sums, parts), zero).tolist()
    return loss / n, right / n
