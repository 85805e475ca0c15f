"""Drift correction: clients whose data differ walk apart, and these methods correct the gradient.

    name      G, the corrected gradient            the client keeps  the server keeps
    FedProx   g + prox (w - w^t)                   nothing           nothing
    SCAFFOLD  g + c - c_i            (fl.py)       c_i               c, the mean of the c_i
    FedDyn    g + prox (w - w^t + h_i)             h_i               h, the mean of the h_i
    FedCM     alpha g + (1 - alpha) momentum       nothing           the momentum

c_i, c and the momentum are gradients; h_i and h are displacements of w. The server adds up what it
decoded, and so does the client (`remember`): h stays the mean of the h_i with every compressor.
Combined with SAM they are in methods/combinations.py.

"FL-Simulator" is the released code of FedSpeed and FedSMOO, which holds most of the methods here.
G is clipped with all that was added to it, and weight decay is added afterwards. FL-Simulator does
the same, but it treats prox w as weight decay, too; this is prox_clip = False.

Sources: FedProx, Li et al. 2020. FedDyn, Acar et al. 2021. FedCM, Xu et al. 2021.
"""

from typing import Annotated

import torch

from fl import FedAvg


class FedProx(FedAvg):
    """FedAvg, but G = g + prox (w - w^t): the client minimises F_i(w) + prox/2 ||w - w^t||^2.

    One gradient a step. The second part is the proximal term.
    Source: Li et al. 2020.
    """

    prox: Annotated[float, "weight of the proximal term", 0, None] = 0.1
    prox_clip: Annotated[bool, "clip all of the proximal term, else all but prox w"] = True

    def correct(self, g, w, received, mine):
        away = w - received["w"] if self.prox_clip else -received["w"]
        return super().correct(g, w, received, mine) + self.prox * away

    def move(self, w, G, mine, lr):
        end, mine = super().move(w, G, mine, lr)
        return (end if self.prox_clip else end - lr * self.prox * w), mine


class FedDyn(FedProx):
    """FedProx, but its anchor is w^t - h_i instead of w^t; h_i is the sum of the client's updates.

        G = g + prox (w - w^t + h_i)                       h_i <- h_i + update
        w^{t+1} = w^t + server_lr * mean update + h        h = mean of the h_i of all N clients

    One gradient a step. When nothing moves any more, -prox h_i is the gradient of F_i at w^t, and
    the h_i have mean 0: then the gradient of F at w^t is 0. prox = 0 is not FedAvg, since the
    server still adds h.
    Source: Acar et al. 2021, Algorithm 1, where prox is alpha, -prox h_i is the gradient that the
    client stores, and server_lr is 1.
    """

    def first_state(self):
        return super().first_state() | {"h": torch.zeros_like(self.task.w0)}

    def first_memory(self, received):
        return super().first_memory(received) | {"h_i": torch.zeros_like(received["w"])}

    def correct(self, g, w, received, mine):
        return super().correct(g, w, received, mine) + self.prox * mine["h_i"]

    def remember(self, mine, decoded, lr_sum):
        mine = super().remember(mine, decoded, lr_sum)
        return mine | {"h_i": mine["h_i"] + decoded["update"]}

    def aggregate(self, w, mean, lr_sum, share):
        h = self.state["h"] + share * mean["update"]
        self.state = self.state | {"h": h}
        return super().aggregate(w, mean, lr_sum, share) + h


class FedCM(FedAvg):
    """FedAvg, but G = alpha g + (1 - alpha) momentum; momentum is the mean G of the last round.

        momentum <- -mean update / lr_sum

    One gradient a step. In round 0 the momentum is 0, and a step is alpha times that of FedAvg.
    Source: Xu et al. 2021; the scale of the server's step is FedAvg's, as in FL-Simulator.
    """

    momentum_alpha: Annotated[float, "weight of the client's own gradient", 1e-12, 1] = 0.1

    def first_state(self):
        return super().first_state() | {"momentum": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(w) | {"momentum": self.state["momentum"]}

    def correct(self, g, w, received, mine):
        g, alpha = super().correct(g, w, received, mine), self.alpha(received)
        return alpha * g + (1 - alpha) * received["momentum"]

    def alpha(self, received):
        """The weight of the client's own gradient."""
        return self.momentum_alpha

    def aggregate(self, w, mean, lr_sum, share):
        w = super().aggregate(w, mean, lr_sum, share)
        self.state = self.state | {"momentum": -mean["update"] / lr_sum}
        return w
