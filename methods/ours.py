"""Two methods of this project: what else the synthetic gradient g_syn of FedSynSAM is good for.

    fedsynsam-debiased    u = g_i - (mean of this round's g_i so far) + g_syn
    fedsynsam-descent     G = (1 - pull) g_i(w + e) + pull g_syn

A client's gradient on a batch has two parts: what that batch has of its own, and what the client
has of its own. Where a network overfits, an ascent along the first makes it generalise; where
clients differ much, an ascent along the second misleads. The debiased direction keeps the first and
puts g_syn in the place of the second.
The descent along g_i has the second part, too: it is drift. A share of g_syn in the step works
against it, for no byte more. What both are worth stands in results/README.md.
"""

from typing import Annotated

import sam
from fl import FedSynSAM


class FedSynSAM_Debiased(FedSynSAM):
    """FedSynSAM, but u keeps the batch's own part of the gradient, as FedSAM's does.

    Three gradients a step. The mean is over the steps of this round, the present one included.
    `mix` has no effect: g_syn is added as it is.
    """

    def first_memory(self, received):
        w = received["w"]
        return super().first_memory(received) | {"g_sum": 0 * w, "g_count": w.new_zeros(())}

    def point(self, w, batch, received, mine):
        if "X" not in received:
            return super().point(w, batch, received, mine)
        g = self.gradient(w, batch)
        mine = mine | {"g_sum": mine["g_sum"] + g, "g_count": mine["g_count"] + 1}
        u = g - mine["g_sum"] / mine["g_count"] + self.synthetic_gradient(w, received)
        return sam.perturb(w, u, self.rho), mine

    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent, mine | {"g_sum": 0 * mine["g_sum"], "g_count": 0 * mine["g_count"]}


class FedSynSAM_Descent(FedSynSAM):
    """FedSynSAM, and a share of every local step goes along g_syn, too.

    Three gradients a step, as g_syn at w is computed twice: once would do, and would be longer.
    """

    off = {"pull": 0.0}  # then it is FedSynSAM

    pull: Annotated[float, "share of the synthetic gradient in the local step", 0, 1] = 0.3

    def correct(self, g, w, received, mine):
        if "X" in received:
            g = (1 - self.pull) * g + self.pull * self.synthetic_gradient(w, received)
        return super().correct(g, w, received, mine)
