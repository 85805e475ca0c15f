"""Gradient alignment: a displacement before the gradient, so that descent also makes clients agree.

Where the gradients g_i of the clients differ, a step that helps one harms another. Half their
variance measures it, with g the mean of the g_i over the m clients of the round:

    r(w) = 1/(2m) sum_i ||g_i(w) - g(w)||^2               grad r = mean_i H_i (g_i - g)

H_i is the Hessian of F_i. To descend F + beta r looks as if it took second derivatives. But H_i v
is how the gradient changes along v, so it is enough to compute the gradient a little aside:

    v_i = beta (g_i(w) - g(w))                            the v_i sum to 0
    mean_i g_i(w + v_i) = grad F + beta grad r + O(beta^2)          exact if the F_i are quadratic

There are two ways to use it.

    GradAlign   w <- w - lr g_i(w + v_i)                  computed at w + v_i, step from w
    FedGA       y_0 = w + v_i,  y <- y - lr g_i(y)        start at w + v_i, K steps as FedAvg

Put y = w + v_i into the second line: it is the first. While v_i is held, y stays v_i away from w,
for every K (only weight decay tells w and y apart). K = 1 is the paper's GradAlign;
holding v_i through more steps is this project's choice.

SCAFFOLD adds the same difference with the same sign, lr (g_i - g), to every step. FedGA adds it
once, and takes it out at the end. SAM perturbs w before it takes the gradient, too: v_i is an
ascent direction of F_i - F, but it is not normalised, and it vanishes as the clients agree.

Compression. v_i is made of what the server decoded, g_i and g alike, so the v_i sum to 0 with every
compressor, weighted as the mean over clients is. Hence a client sends y_K - y_0 and keeps v_i to
itself: w^{t+1} is the same, and the compressor need not carry v_i (the released code sends y_K).

Source: Dandi, Barba and Jaggi 2022 (arXiv 2106.13897); the Taylor argument is derived here. In the
released code beta decays with the learning rate, here it does not.
"""

from typing import Annotated

import torch

from fl import FedAvg


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
        return self.beta * (mine["g_i"] - received["g_i"])


class GradAlign(Aligned):
    """FedAvg, but the gradient is computed at w + v_i: G = g_i(w + v_i).

    One gradient a step, and one over all images of a client a round. Source: Dandi et al. 2022.
    """

    def point(self, w, batch, received, mine):
        return super().point(w + self.displacement(received, mine), batch, received, mine)


class FedGA(Aligned):
    """FedAvg, but the client starts at w^t + v_i, and takes v_i out before it sends its update.

    One gradient a step, and one over all images of a client a round. Source: Dandi et al. 2022.
    """

    def start(self, received, mine):
        return super().start(received, mine) + self.displacement(received, mine)

    def upload(self, w, received, mine, lr_sum):
        return super().upload(w - self.displacement(received, mine), received, mine, lr_sum)


class FedGA_Previous(FedGA):
    """FedGA without the second exchange: g_i and g come from the last updates.

        g_i = -update / lr_sum        g = -mean update / lr_sum

    One gradient a step. g_i is that of the client's last round; in its first round g_i = g, so
    v_i = 0. The v_i sum to 0 only if all clients take part with the same K; what is left of their
    sum is not sent. Source: this project's choice; the paper's code computes fresh gradients.
    """

    exchanges = ("train",)

    def first_state(self):
        return super().first_state() | {"g": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(w) | {"g_i": self.state["g"]}

    def first_memory(self, received):
        return super().first_memory(received) | {"g_i": received["g_i"]}

    def remember(self, mine, decoded, lr_sum):
        mine = super().remember(mine, decoded, lr_sum)
        return mine | {"g_i": -decoded["update"] / lr_sum}

    def aggregate(self, w, mean, lr_sum, share):
        self.state = self.state | {"g": -mean["update"] / lr_sum}
        return super().aggregate(w, mean, lr_sum, share)
