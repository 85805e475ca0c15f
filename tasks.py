"""What is learnt, and how well: the loss of the clients' images, their batches, and the accuracy of a model.

The loop (loop.py) and the methods (fl.py) know a task by a few words only: a loss of (w, rows), how many images each client has,
and rows that name the images of a batch. So they run unchanged on anything that has these words, such as the quadratics of
test_all.py, whose every quantity is known in closed form.

    plan         the batches of one client's round, drawn at random
    everything   all images of a client once, in batches: what a full local gradient is read from
    balanced     images of all clients, as many of each class: what no client can see (ceiling.py)
    evaluate     mean loss and accuracy over a whole set of images

Source: McMahan et al. 2017, equation (1). Read next: memory.py.
"""
import torch
from torch.nn import functional as F

import data
import ranks


class Task:
    """What is learnt and where it lies: a loss of (w, batch), and N clients that can draw batches.

    w0 [d] initial weights, weights [d] (is this coordinate one of a weight, or of a bias?), shapes of the parameters, apply(w [d], x)
    scores, watched(w, x) scores and activity, train: Images, parts: N tensors of image numbers.  A task of another kind (the
    quadratics of test_all.py) needs w0, weights, shapes, sizes, loss, plan, everything, balanced and steps_of.  Source: ours.
    """

    def __init__(self, model, train, parts, cfg):
        self.weights, self.shapes, self.watched = model.weights, model.shapes, model.watched
        self.w0, self.apply, self.train, self.parts, self.cfg = model.w0, model.apply, train, parts, cfg
        self.sizes = [len(p) for p in parts]

    def loss(self, w, rows):
        """What a client descends at w [d] on the batch rows [B, 4]: mean cross-entropy; padded rows weigh nothing -> [].

        With `man` = zeta above 0, MAN's term is added: zeta/2 times the mean activity of the hidden layers (models.py), in every gradient
        that a client takes of its own images, SAM's ascent included. What is measured (loss, sharpness) and the loss on synthetic
        images stay plain cross-entropy: the trajectory that D_syn is learnt from holds the term already (ours). With `bf16` the network
        and its gradient are computed in bfloat16, from weights kept in float32: a step too small for bfloat16's 8 bits is not lost (ours).
        Source: definition; Yashwanth et al. 2024 (MAN, arXiv 2512.08314).
        """
        x, y, weight = self.train.batch(rows, self.cfg.augment)
        if self.cfg.bf16:
            w, x = w.bfloat16(), x.bfloat16()
        scores, activity = self.watched(w, x) if self.cfg.man else (self.apply(w, x), None)
        each = F.cross_entropy(scores.to(weight.dtype), y, reduction="none")
        if activity is not None:
            each = each + self.cfg.man / 2 * activity
        return (each * weight).sum()

    def plan(self, client, g):
        """All batches of one client's round: -> rows [K, B, 4].  Source: data.draw_batches."""
        c = self.cfg
        return data.draw_batches(self.parts[client], c.batch, c.local_steps, c.local_epochs, g, c.augment).to(self.train.y.device)

    def everything(self, client):
        """All images of a client once, as they are: -> rows [n, B, 4], the last batch padded with -1.  Source: definition."""
        mine, B = self.parts[client], self.cfg.batch
        number = F.pad(mine, (0, -len(mine) % B), value=-1)
        return F.pad(number[:, None], (0, 3)).view(-1, B, 4).to(self.train.y.device)

    def balanced(self, n, g):
        """About n images of ALL clients, as many of each class as there are, as they are: -> rows [n, 4]; only `ceiling.Oracle` and measures may ask.

        Source: ours.
        """
        y = self.train.y
        of_class = [(y == c).nonzero().view(-1) for c in range(len(self.train.classes))]
        each = max(1, n // len(of_class))
        number = torch.cat([mine[torch.randperm(len(mine), generator=g)[:each].to(y.device)] for mine in of_class])
        return F.pad(number[:, None], (0, 3))

    def steps_of(self, client):
        """K_i, the length of a client's plan, known without drawing it -> number [].  Source: data.draw_batches."""
        return self.cfg.local_epochs * -(-self.sizes[client] // self.cfg.batch) or self.cfg.local_steps


def evaluate(apply, w, images, chunk=500, each=map):
    """Mean cross-entropy and accuracy of w [d] on all images -> (loss, accuracy in 0..1).

    Chunks of images are dealt out to the ranks; each: `map`, or that of a thread pool.  Source: definition.
    """
    def part(rows):
        with torch.no_grad():
            x, y, _ = next(images.chunks(chunk, rows))
            scores = apply(w, x)
            return torch.stack([F.cross_entropy(scores, y, reduction="sum").double(), (scores.argmax(1) == y).sum()])
    places = torch.arange(len(images.y), device=images.y.device).split(chunk)[ranks.rank()::ranks.size()]
    loss, right = ranks.total(sum(each(part, places), torch.zeros(2, dtype=torch.float64, device=w.device))).tolist()
    return loss / len(images.y), right / len(images.y)
