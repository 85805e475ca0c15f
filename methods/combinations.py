"""Drift correction and sharpness-aware minimisation together: two parents, and mostly no body.

    a drift correction says what is added to the gradient    (`correct`, `aggregate`, `remember`)
    a SAM method says where the gradient is computed         (`direction`, `point`)

They change different hooks, and each hook calls super(). So Python's order of inheritance makes
    G = (gradient at w + e) + (correction at w).

              FedSAM      FedLESAM    FedSynSAM
    SCAFFOLD  FedGAMMA    FedLESAM_S  FedSynSAM_S
    FedDyn    FedSpeed    FedLESAM_D  FedSynSAM_D
              FedSMOO
    FedCM     MoFedSAM

FedSynSAM_S and FedSynSAM_D are this project's own. Any other combination is written in two lines.

Sources: MoFedSAM, Qu et al. 2022. FedGAMMA, Dai et al. 2023. FedSpeed and FedSMOO, Sun et al. 2023.
FedLESAM-S and FedLESAM-D, Fan et al. 2024. "FL-Simulator" is the code of FedSpeed's authors.
"""

import torch

import sam
from fl import SCAFFOLD, FedLESAM, FedSAM, FedSynSAM
from methods.drift import FedCM, FedDyn


class MoFedSAM(FedSAM, FedCM):
    """FedSAM with the momentum of FedCM: G = alpha g(w + e) + (1 - alpha) momentum.

    Two gradients a step. Source: Qu et al. 2022.
    """


class FedGAMMA(FedSAM, SCAFFOLD):
    """FedSAM with SCAFFOLD: G = g(w + e) + c - c_i, so c_i is a mean gradient at perturbed points.

    Two gradients a step. Source: Dai et al. 2023, as in FL-Simulator, where rho is 0.01.
    """


class FedSpeed(FedSAM, FedDyn):
    """FedSAM with FedDyn: G = g(w + e) + prox (w - w^t + h_i).

    Two gradients a step. The paper merges the gradient at w with the one after an ascent step; the
    rule here is that of its code, FL-Simulator.
    Source: Sun et al. 2023 (FedSpeed), released code.
    """


class FedLESAM_S(FedLESAM, SCAFFOLD):
    """FedLESAM with SCAFFOLD.

    One gradient a step. The released code multiplies c - c_i by 0.1 (variate = 0.1). For u it takes
    the last step of the server in place of w_old, as FedLESAM_Server does.
    Source: Fan et al. 2024, the direction of the paper.
    """


class FedLESAM_D(FedLESAM, FedDyn):
    """FedLESAM with FedDyn. u is made of two global models, so it contains h, not only the update.

    One gradient a step. Source: Fan et al. 2024, the direction of the paper.
    """


class FedSynSAM_S(FedSynSAM, SCAFFOLD):
    """FedSynSAM with SCAFFOLD. Two gradients a step, three if 0 < mix < 1."""


class FedSynSAM_D(FedSynSAM, FedDyn):
    """FedSynSAM with FedDyn. Two gradients a step, three if 0 < mix < 1."""


class FedSMOO(FedSpeed):
    """FedSpeed, but the perturbations e of the clients are made to agree, by dual variables mu_i.

        u = g - mu_i - s                             e = rho u / ||u||
        mu_i <- mu_i + e - s                         at every step
        s = rho mu / ||mu||                          at the server; mu is the mean of the mu_i

    Two gradients a step. mu_i and s are 0 at first. The client sends mu_i whole. Error feedback is
    for mu_i too: without it, top-k never shows the server its small entries (on quadratics, a
    quarter kept, it then ends 0.020 from the minimum, instead of 0.0035). FL-Simulator leaves out a
    small term of the paper's s, and so does this class.
    Source: Sun et al. 2023 (FedSMOO), released code.
    """

    fed_back = ("update", "mu_i")

    def first_state(self):
        return super().first_state() | {"s": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(w) | {"s": self.state["s"]}

    def first_memory(self, received):
        return super().first_memory(received) | {"mu_i": torch.zeros_like(received["w"])}

    def direction(self, w, batch, received, mine):
        return super().direction(w, batch, received, mine) - mine["mu_i"] - received["s"]

    def point(self, w, batch, received, mine):
        u = self.direction(w, batch, received, mine)
        mu_i = mine["mu_i"] + (self.rho * sam.unit(u) - received["s"])
        return sam.perturb(w, u, self.rho), mine | {"mu_i": mu_i}

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent | {"mu_i": mine["mu_i"]}, mine

    def aggregate(self, w, mean, lr_sum, share):
        self.state = self.state | {"s": self.rho * sam.unit(mean["mu_i"])}
        return super().aggregate(w, mean, lr_sum, share)
