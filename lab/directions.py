"""Whose gradient, or which batch? Ascent directions that are no published methods: trials.

    python run.py --algo lab/directions.py:AnotherBatch

All are FedSAM, the gradient at w + rho u / ||u||, with another u:

    AnotherBatch     the client's gradient on the batch of its last step
    WholeClient      the client's gradient on all of its images
    AnotherClient    another client's gradient; the clients peek
    Negative         minus the own gradient
    Random           random numbers
    OnceARound       the true gradient at w^t, on images of all clients; they peek
    ManyImages       the true gradient at every step, in bfloat16, for many images; they peek
    ClassMeans       the gradient on mean images, one of each class, over all clients

All run in the plain loop and in threads; WholeClient and Random do not run under vmap. Two trials
that won are methods now (methods/ours.py).
"""

import torch

from fl import FedSAM, FedSynSAM, rng
from methods.oracle import Oracle


class AnotherBatch(FedSAM):
    """u is the gradient on the batch of the client's last step. In its very first step u = 0."""

    def first_memory(self, received):
        batch = self.task.plan(0, rng(self.seed, "the size of a batch"))[0]
        return super().first_memory(received) | {"batch": torch.full_like(batch, -1)}

    def direction(self, w, batch, received, mine):
        return self.gradient(w, mine["batch"])

    def point(self, w, batch, received, mine):
        point, mine = super().point(w, batch, received, mine)
        return point, mine | {"batch": batch}


class WholeClient(FedSAM):
    """u is the gradient on all images that a client sees in a round; K B >= n_i: all it has."""

    def first_memory(self, received):
        return super().first_memory(received) | {"images": torch.empty(0, 4, dtype=torch.int64)}

    def train(self, received, mine, batches, lr):
        images = batches.reshape(-1, 4).unique(dim=0)
        sent, mine = super().train(received, mine | {"images": images}, batches, lr)
        return sent, mine | {"images": images[:0]}

    def direction(self, w, batch, received, mine):
        return self.gradient(w, mine["images"])


class AnotherClient(FedSAM):
    """u is the gradient on a batch of one client, drawn anew in every round, the same for all."""

    def prepare(self, t, w):
        news = super().prepare(t, w)
        generator = rng(self.seed, "another client", t)
        other = int(torch.randint(len(self.task.sizes), (), generator=generator))
        self.state = self.state | {"foreign": self.task.plan(other, generator)[0]}
        return news

    def first_state(self):
        return super().first_state() | {"foreign": None}

    def broadcast(self, w):
        foreign = self.state["foreign"]
        return super().broadcast(w) | ({} if foreign is None else {"foreign": foreign})

    def direction(self, w, batch, received, mine):
        return self.gradient(w, received["foreign"])


class Negative(FedSAM):
    """u is minus the own gradient: a step of descent, and the gradient of what comes after it."""

    def direction(self, w, batch, received, mine):
        return -super().direction(w, batch, received, mine)


class Random(FedSAM):
    """u is a vector of normal random numbers, another one for every batch."""

    def direction(self, w, batch, received, mine):
        generator = rng(self.seed, "direction", batch.tolist())
        return torch.randn(len(w), generator=generator, dtype=w.dtype).to(w.device)


class OnceARound(Oracle):
    """u is the gradient on `oracle_images` at the model w^t of the server: the same for all steps.

    FedLESAM's last update is an estimate of it. So many images cost little here.
    """

    def broadcast(self, w):
        return super().broadcast(w) | {"true": mean_gradient(self, w)}

    def direction(self, w, batch, received, mine):
        return received["true"]


class ManyImages(Oracle):
    """u is the oracle's, in bfloat16, which is faster. Unlike with --bf16, all else is float32."""

    def direction(self, w, batch, received, mine):
        with torch.autocast(w.device.type, torch.bfloat16):
            return mean_gradient(self, w)


def mean_gradient(oracle, w):
    """The gradient on all images at which the oracle peeks, 500 at a time: so it is faster. [d]"""
    n = len(oracle.peeked)
    return sum(len(few) / n * oracle.gradient(w, few) for few in oracle.peeked.split(500))


class ClassMeans(FedSynSAM):
    """FedSynSAM, but its images are not learnt: they are means, one for each class.

    A mean is over as many images of each class as there are, of all clients. Each client would send
    a sum for each class, once, and secure aggregation would hide whose it is. Here the server
    peeks, and these bytes up are not counted; those of the means down are. FedMix (Yoon et al.
    2021, arXiv 2107.00233) has clients train on means of their images.
    """

    def learn_synthetic_data(self, t):
        rows = self.task.balanced(sum(self.task.sizes), rng(self.seed, "class means"))
        x, y, _ = self.task.examples(rows)
        means = torch.stack([x[y == c].mean(0) for c in range(self.task.classes)])
        labels = self.syn_labels * torch.eye(self.task.classes).to(means)  # as a synthesis begins
        self.state = self.state | {"X": means, "Y": labels, "trajectory": []}
