"""Adam in place of a plain step: at the server (FedAdam), or at the clients.

    m = b1 m + (1 - b1) x       v = b2 v + (1 - b2) x^2       step along m / (sqrt(v) + eps)

x is the mean update at the server, the gradient at a client. A coordinate moves by up to about the
learning rate in a step, whatever the size of x, so the rates are settings of their own.

Sources: Adam, Kingma and Ba 2015. FedAdam, Reddi et al. 2021. DynaFed, Pi et al. 2023.
"""

import math
from typing import Annotated

import torch

from fl import DynaFed, FedAvg


class FedAdam(FedAvg):
    """FedAvg, but the server makes a step of Adam along the mean update, without bias correction.

        w^{t+1} = w^t + adam_lr m / (sqrt(v) + adam_eps)

    One gradient a step. m and v start at 0, as in FL-Simulator.
    Source: Reddi et al. 2021, Algorithm 2, as in FL-Simulator's code.
    """

    server_lr: float = 1.0  # no setting: adam_lr takes its place
    adam_lr: Annotated[float, "learning rate of the server", 1e-12, None] = 0.1
    adam_b1: Annotated[float, "decay of m in a round", 0, 0.9999] = 0.9
    adam_b2: Annotated[float, "decay of v in a round", 0, 0.9999] = 0.99
    adam_eps: Annotated[float, "added to sqrt(v), in units of w", 1e-12, None] = 0.01

    def first_state(self):
        zero = torch.zeros_like(self.task.w0)
        return super().first_state() | {"m": zero, "v": zero}

    def aggregate(self, w, mean, lr_sum, share):
        w_next = super().aggregate(w, mean, lr_sum, share)
        # the mean update, and what another parent adds to the step, such as FedDyn's h; else 0
        update = mean["update"] + (w_next - (w + self.server_lr * mean["update"]))
        m = self.adam_b1 * self.state["m"] + (1 - self.adam_b1) * update
        v = self.adam_b2 * self.state["v"] + (1 - self.adam_b2) * update.square()
        self.state = self.state | {"m": m, "v": v}
        return w + self.adam_lr * m / (v.sqrt() + self.adam_eps)


class FedAvg_Adam(FedAvg):
    """FedAvg, but a client steps by Adam, and keeps m, v and its number of steps k between rounds.

        w <- w - eta m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + 1e-8)        b1 = 0.9, b2 = 0.999

    One gradient a step. A round replaces the client's model, but not its moments. eta is
    local_adam_lr, times lr_decay after every round. Adam's gradient is the clipped G, plus
    weight_decay w.
    Source: the released code of DynaFed, where every client keeps its own torch.optim.Adam.
    """

    lr: float = 1.0  # no setting: local_adam_lr takes its place
    local_adam_lr: Annotated[float, "learning rate of the clients, instead of lr", 1e-12] = 1e-3

    def first_memory(self, received):
        zero = torch.zeros_like(received["w"])
        return super().first_memory(received) | {"m": zero, "v": zero, "k": zero.new_zeros(())}

    def move(self, w, G, mine, lr):
        b1, b2, G = 0.9, 0.999, G + self.weight_decay * w
        m = b1 * mine["m"] + (1 - b1) * G
        v = b2 * mine["v"] + (1 - b2) * G.square()
        k = mine["k"] + 1
        eta = lr * (self.local_adam_lr / self.lr)
        step = (m / one_minus_power(b1, k)) / ((v / one_minus_power(b2, k)).sqrt() + 1e-8)
        return w - eta * step, mine | {"m": m, "v": v, "k": k}


def one_minus_power(b, k):
    """1 - b^k of a tensor k, which as 1 - b**k in float32 is wrong by 1e-5: b = 0.999, k = 1."""
    return -torch.expm1(k * math.log(b))


class DynaFed_Adam(DynaFed, FedAvg_Adam):
    """The server of DynaFed, and clients with Adam, as in its released code.

    One gradient a step.
    """
