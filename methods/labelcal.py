"""Label calibration: a batch that lacks a class should not lower the scores of that class.

A client with skewed data sees batches in which most classes are absent. Cross-entropy lowers the
scores of these classes at every step, and the model forgets them. So an image gets a target that
depends on how frequent the classes are in its batch. Let the batch hold n_c images of class c, let
y be the label of the image, and p = softmax(scores), taken as a constant:

    target_j = 1[j = y] + p_j (n_y - n_j) / n_y         loss = -sum_j target_j log softmax(scores)_j

Its derivative with respect to score j is p_j S - target_j, with S = sum_j target_j. A class as
frequent as y keeps the target 0 of cross-entropy. For an absent class the derivative is p_j (S - 1)
in place of p_j S, and for a more frequent one it is larger. The targets need not sum to 1.

Source: Xiao, Zuo and Wang 2024 (error asymmetry mitigation), released code. They call the method
FedGA; the FedGA of methods/alignment.py is another one.
"""

import torch

from fl import FedAvg


def calibrated_loss(scores, y, real):
    """The loss of each image -> [B].   scores [B, classes], labels y [B], real [B]: no padding?"""
    log_p, classes = scores.log_softmax(1), torch.arange(scores.shape[1], device=y.device)
    one_hot = (y[:, None] == classes).to(scores)  # F.one_hot looks at values, which vmap forbids
    n = (one_hot * real[:, None]).sum(0)
    n_y = n[y].clamp_min(1)[:, None]  # a row of padding may have a label that no image has
    target = one_hot + log_p.detach().exp() * (n_y - n) / n_y
    return -(target * log_p).sum(1)


class LabelCal(FedAvg):
    """FedAvg, but with a loss that does not lower the scores of classes which a batch lacks.

    One gradient a step; nothing more is sent or kept. Any method can be combined with it, as in
    `--algo labelcal+fedsam`, but not with MAN, which is a term of the usual loss (`--man`); bf16
    does not act either.
    Source: Xiao, Zuo and Wang 2024, released code.
    """

    def __init__(self, task, seed=0, **settings):
        super().__init__(task, seed, **settings)
        if getattr(task, "man", 0):
            raise ValueError(f"man = {task.man} does not act on the loss of labelcal; leave it 0")

    def loss(self, w, batch):
        x, y, weight = self.task.examples(batch)
        return (calibrated_loss(self.task.apply(w, x), y, weight > 0) * weight).sum()
