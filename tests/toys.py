"""Two tiny tasks in float64, on which a theorem can be checked in milliseconds.

    Quadratics    F_i(w) = 1/2 sum_j a_ij (w_j - b_ij)^2: everything is known, the minimum too
    Linear        a softmax classifier of random images; unequal clients, short last batches

Both have what fl.py asks of a task, and what methods ask in addition:
    everything(client)       all images of a client, in batches -> [n, B, 4]
    balanced(n, generator)   about n images of all clients, as many of each class -> [n, 4]
    examples(batch)          (images x, labels y, weight of each row, 0 for padding); Linear only
    watched(w, x)            (class scores, activity of each image); Linear only
    image_shape, classes     of the images; Linear only
    shapes, weights          of the parameters in w; is coordinate j a weight (or a bias)? [d]
"""

import torch
from torch.nn import functional as F

f64 = torch.float64


def seeded(seed=0):
    """A random generator."""
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=seeded(seed), dtype=f64)


def symmetric(values, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=f64)) @ q.T


def in_batches(rows, B):
    """Numbers of images [n] -> batches [ceil(n / B), B, 4]; the last one is filled up with -1."""
    padded = F.pad(rows, (0, -len(rows) % B), value=-1)
    return F.pad(padded[:, None], (0, 3)).view(-1, B, 4)  # not shifted, not flipped


def row_weights(batch):
    """1 / n for the n rows of a batch that are images, 0 for padding.   [B, 4] -> [B]"""
    real = (batch[:, 0] >= 0).to(f64)
    return real / real.sum().clamp_min(1)


class Quadratics:
    """N clients with a, b [N, d]. The minimum of the mean of the F_i is sum_i a_i b_i / sum_i a_i.

    K: local steps, one number or one for each client. sizes: "images" of each client; if noise > 0,
    image r of client i has b_i + noise * (a random vector); these vectors have mean 0 for each i.
    """

    def __init__(self, a, b, K=10, sizes=None, noise=0.0):
        N = len(a)
        self.a, self.b, self.K = a, b, [K] * N if isinstance(K, int) else list(K)
        self.sizes = [1] * N if sizes is None else list(sizes)
        self.w0, self.optimum = torch.zeros_like(a[0]), (a * b).sum(0) / a.sum(0)
        self.shapes, self.weights = [a[0].shape], torch.ones_like(a[0], dtype=torch.bool)
        self.images = torch.arange(sum(self.sizes)).split(self.sizes)
        self.owner = torch.arange(N).repeat_interleave(torch.tensor(self.sizes))
        noises = (noise * normal(n, len(b[0]), seed=i) for i, n in enumerate(self.sizes))
        self.centers = b[self.owner] + torch.cat([x - x.mean(0) for x in noises])

    def loss(self, w, batch):
        row = batch[:, 0].clamp_min(0)
        each = 0.5 * (self.a[self.owner[row]] * (w - self.centers[row]) ** 2).sum(1)
        return (each * row_weights(batch)).sum()

    def gradient(self, i, w):
        """The gradient of F_i at w [d] -> [d]."""
        return self.a[i] * (w - self.b[i])

    def plan(self, client, generator):
        drawn = torch.randint(self.sizes[client], (self.K[client],), generator=generator)
        return in_batches(self.images[client][drawn], 1)

    def steps(self, client):
        return self.K[client]

    def everything(self, client):
        return in_batches(self.images[client], 2)

    def balanced(self, n, generator):
        return in_batches(torch.randperm(len(self.owner), generator=generator)[:n], 1)[:, 0]


class Linear:
    """Scores W x + b on images of 1 x 4 x 4 pixels in three classes, so d = 51.

    A client visits its images once a round, in a random order and in batches of B; the last one may
    be short. So K differs from client to client. Clients hold mostly one class.
    """

    image_shape, classes = (1, 4, 4), 3

    def __init__(self, sizes=(3, 9, 6, 1, 5), B=4, seed=0):
        n, C = sum(sizes), self.classes
        self.sizes, self.B = list(sizes), B
        self.images = torch.arange(n).split(self.sizes)
        client = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        other = torch.randint(C, (n,), generator=torch.Generator().manual_seed(seed))
        self.y = torch.where(torch.arange(n) % 3 < 2, client % C, other)
        means = normal(C, *self.image_shape, seed=seed + 1)
        self.x = means[self.y] + 0.5 * normal(n, *self.image_shape, seed=seed + 2)
        self.shapes = [torch.Size((C, 16)), torch.Size((C,))]
        self.weights = torch.arange(C * 16 + C) < C * 16
        self.w0 = 0.1 * normal(C * 16 + C, seed=seed + 3)

    def apply(self, w, x):
        W, b = w[: 16 * self.classes].view(self.classes, 16), w[16 * self.classes :]
        return x.flatten(1) @ W.T + b

    def watched(self, w, x):
        """The scores, and as if a ReLU came behind them, the mean of its squares for each image."""
        scores = self.apply(w, x)
        return scores, scores.relu().square().mean(1)

    def examples(self, batch):
        row = batch[:, 0].clamp_min(0)
        return self.x[row], self.y[row], row_weights(batch)

    def loss(self, w, batch):
        x, y, weight = self.examples(batch)
        return (F.cross_entropy(self.apply(w, x), y, reduction="none") * weight).sum()

    def plan(self, client, generator):
        order = torch.randperm(self.sizes[client], generator=generator)
        return in_batches(self.images[client][order], self.B)

    def steps(self, client):
        return -(-self.sizes[client] // self.B)

    def everything(self, client):
        return in_batches(self.images[client], self.B)

    def balanced(self, n, generator):
        each, order = max(1, n // self.classes), torch.randperm(len(self.y), generator=generator)
        chosen = [order[self.y[order] == c][:each] for c in range(self.classes)]
        return in_batches(torch.cat(chosen), 1)[:, 0]
