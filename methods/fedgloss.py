"""FedGloSS: the server makes the ascent step of SAM, so it costs a client no gradient and no byte.

    e = -rho p / ||p||                                  p: the mean update of the last round
    clients   start at w^t + e, and train as in FedDyn
    server    adds their updates to w^t, without e

The last mean update decreased F, so -p is an estimate of an ascent direction of F, as u is in
FedLESAM. There a client adds e for its gradients only; here e is sent as part of the model.

Source: Caldarola et al. 2025 (arXiv 2412.03752) and its released code.
"""

from typing import Annotated

import torch

import sam
from methods.drift import FedDyn


class FedGloSS(FedDyn):
    """FedDyn, but the clients receive the perturbed model w^t - rho p / ||p||.

    One gradient a step. In round 0, e = 0. With p = the server's last step, h included, and full
    participation, it would be FedLESAM_D. `--algo fedsam+fedgloss` makes an ascent step at the
    clients too (two gradients a step), with the same rho; the paper has a second one.

    The released code divides the round's contribution to h by the number of its clients once more.
    Then h is not the mean of the h_i, and the equation of the paper is used here. The code does not
    clip, and lets both radii grow at first. Its CIFAR-10 script has rho 0.15, prox 0.1.
    """

    rho: Annotated[float, "radius of the ascent step", 0, None] = 0.1

    def first_state(self):
        return super().first_state() | {"p": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(sam.perturb(w, -self.state["p"], self.rho))

    def aggregate(self, w, mean, lr_sum, share):
        self.state = self.state | {"p": mean["update"]}
        return super().aggregate(w, mean, lr_sum, share)
