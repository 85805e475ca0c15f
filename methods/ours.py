"""Two methods of this project: what else the synthetic gradient g_syn of FedSynSAM is good for.

    fedsynsam-debiased    u = g - (mean of this round's g until now) + g_syn
    fedsynsam-descent     G = (1 - pull) g(w + e) + pull g_syn                   e = rho u / ||u||

A client's gradient g on a batch has three parts: the gradient of F; what the client has of its own;
what the batch has of its own. Where a network overfits, an ascent along the third may help it
generalise; where clients differ much, an ascent along the second may mislead. The debiased
direction keeps the third and puts g_syn in the place of the other two.
The descent along g has the second part, too, and drifts. A share of g_syn in the step works against
it, for no byte more. results/README.md says what both are worth (overfit, cifar, whose, descent).
"""

from typing import Annotated

import torch

import sam
from fl import FedSynSAM


class FedSynSAM_Debiased(FedSynSAM):
    """FedSynSAM, but u keeps the batch's own part of the gradient, as FedSAM's does.

    Three gradients a step. The mean is over the steps of this round, the present one included, so
    u = g_syn in the first step.
    """

    mix: float = 1.0  # no setting: g_syn is added as it is

    def first_memory(self, received):
        w = received["w"]
        nothing = {"g_sum": torch.zeros_like(w), "g_count": w.new_zeros(())}
        return super().first_memory(received) | nothing

    def point(self, w, batch, received, mine):
        if "X" not in received:
            return super().point(w, batch, received, mine)
        g = self.gradient(w, batch)
        mine = mine | {"g_sum": mine["g_sum"] + g, "g_count": mine["g_count"] + 1}
        u = g - mine["g_sum"] / mine["g_count"] + self.synthetic_gradient(w, received)
        return sam.perturb(w, u, self.rho), mine

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent, mine | {name: torch.zeros_like(mine[name]) for name in ("g_sum", "g_count")}


class FedSynSAM_Descent(FedSynSAM):
    """FedSynSAM, and a share of every local step goes along g_syn, too.

    Three gradients a step, four if 0 < mix < 1: g_syn at w is computed twice, which keeps the code
    short.
    """

    off = {"pull": 0.0}  # then it is FedSynSAM

    pull: Annotated[float, "share of the synthetic gradient in the local step", 0, 1] = 0.3

    def correct(self, g, w, received, mine):
        if "X" in received:
            g = (1 - self.pull) * g + self.pull * self.synthetic_gradient(w, received)
        return super().correct(g, w, received, mine)
