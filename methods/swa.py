"""SWA at the server: judge the mean of the last global models, and train as before.

    mean = (w^{s+1} + ... + w^t) / (t - s)                 s = swa_start, the rounds left out

When clients differ, each round pulls the global model towards the few clients that took part: w^t
swings around a point that no w^t reaches. Their mean lies nearer to it, and often where the loss is
flatter. It costs no byte and no gradient, and fits every method: `--algo swa+fedsam`.

Sources: SWA, Izmailov et al. 2018; at the server, Caldarola et al. 2022, who also vary the learning
rate in cycles and begin after three quarters of the rounds. Here the rate is left as it is.
"""

from typing import Annotated

import torch

from fl import FedAvg


class SWA(FedAvg):
    """FedAvg, but the model that is judged is the mean of the global models after `swa_start`.

    One gradient a step. The clients still start from the last global model.
    """

    swa_start: Annotated[int, "rounds whose models are not in the mean", 0, None] = 40

    def first_state(self):
        nothing = {"rounds": -1, "mean_w": torch.zeros_like(self.task.w0)}
        return super().first_state() | nothing

    def prepare(self, t, w):
        """Here w is what all parents have made of the global model, whatever their order."""
        news = super().prepare(t, w)
        self.state = self.state | {"rounds": t, "mean_w": self.mean_with(t, w)}
        return news

    def mean_with(self, t, w):
        """The mean of w^{s+1} ... w^t, where w = w^t [d] -> [d]; before that, as it was."""
        n, mean_w = t - self.swa_start, self.state["mean_w"]
        return mean_w + (w - mean_w) / n if n > 0 else mean_w

    def judged(self, w):
        t = self.state["rounds"] + 1
        return self.mean_with(t, w) if t > self.swa_start else super().judged(w)
