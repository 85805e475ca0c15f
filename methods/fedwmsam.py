"""FedWMSAM: the momentum of FedCM also gives the ascent direction of SAM, at no extra gradient.

Each client has its own momentum, with SCAFFOLD's correction in it; c_i is a mean gradient of client
i, c the mean of the c_i of all clients. alpha, the weight of a client's own gradient, is adapted.

    client   m_i = m + alpha / (1 - alpha) (c - c_i)
             u = w^t + b m_i - w                         b: number of steps so far; first u = 0
             G = alpha g(w + rho u / ||u||) + (1 - alpha) m_i
             c_i <- c_i - c - update / lr_sum            after the K steps, as in SCAFFOLD
    server   c <- c + sum over the clients (c_i' - c_i) / N
             m <- -mean update / lr_sum                  as in FedCM
             alpha <- 0.99 alpha + 0.01 clamp(mean of 1 + cos(update, m), 0.1, 0.9)

m points uphill and an update downhill, so 1 + cos is 0 if they agree, and 1 if they are orthogonal.
The more they disagree, the less the momentum will count.

Source: Li et al. 2025 (arXiv 2511.22080) and its released code. The sign of u and its norm are the
paper's. The code perturbs in the opposite direction, divides by a sum of norms of layers, and
indexes a flat vector by layer, which shifts all entries of a layer by one number. That alpha grows
as they disagree is the code's rule, and fits its README; a formula of the paper says the opposite.
"""

from typing import Annotated

import torch

import sam
from fl import SCAFFOLD, FedSAM
from methods.drift import FedCM


class FedWMSAM(FedSAM, FedCM, SCAFFOLD):
    """FedCM with SCAFFOLD's correction and an adapted alpha, and with u from the momentum.

    One gradient a step. The update is all that a client sends: c_i, c, m and alpha are made of it,
    as it was decoded. The code's server keeps the c_i and sends m_i, so its clients would receive
    2 d numbers and alpha; here they receive 3 d and alpha.
    """

    momentum_alpha: Annotated[float, "first weight of the client's own gradient", 0.1, 0.9] = 0.1
    alpha_rate: Annotated[float, "how fast alpha is adapted; 0: constant", 0, 1] = 0.01

    def first_state(self):
        return super().first_state() | {"alpha": self.task.w0.new_tensor(self.momentum_alpha)}

    def broadcast(self, w):
        return super().broadcast(w) | {"alpha": self.state["alpha"]}

    def first_memory(self, received):
        return super().first_memory(received) | {"b": torch.zeros_like(received["alpha"])}

    def alpha(self, received):
        return received["alpha"]

    def personal_momentum(self, received, mine):
        alpha, c_minus_c_i = received["alpha"], received["c"] - mine["c_i"]
        return received["momentum"] + alpha / (1 - alpha) * (self.variate * c_minus_c_i)

    def direction(self, w, batch, received, mine):
        return received["w"] + mine["b"] * self.personal_momentum(received, mine) - w

    def point(self, w, batch, received, mine):
        point, mine = super().point(w, batch, received, mine)
        return point, mine | {"b": mine["b"] + 1}

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        c_i = mine["c_i"] - received["c"]  # `remember` adds the rest, made of the decoded update
        sent = {name: x for name, x in sent.items() if name != "c_i_change"}
        return sent, mine | {"c_i": c_i, "b": 0 * mine["b"]}

    def remember(self, mine, decoded, lr_sum):
        rest = {"c_i_change": -decoded["update"] / lr_sum}
        return super().remember(mine, decoded | rest, lr_sum)

    def collect(self, decoded, lr_sum):
        update, m = decoded["update"], self.state["momentum"]
        disagreement = (1 + sam.unit(update) @ sam.unit(m)) * (update.any() & m.any())
        change = -self.state["c"] - update / lr_sum
        own = {"c_i_change": change, "disagreement": disagreement}
        return super().collect(decoded, lr_sum) | own

    def aggregate(self, w, mean, lr_sum, share):
        w, alpha = super().aggregate(w, mean, lr_sum, share), self.state["alpha"]
        target = mean["disagreement"].clamp(0.1, 0.9)
        alpha = (1 - self.alpha_rate) * alpha + self.alpha_rate * target
        self.state = self.state | {"alpha": alpha}
        return w
