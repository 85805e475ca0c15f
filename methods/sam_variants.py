"""Variants of FedSAM: another ascent direction, or another shape of the ball.

    FedLESAM_Server   u = w^{t-1} - w^t, the same for all clients
    FedASAM           the ball ||e|| <= rho becomes the ellipsoid ||e / T|| <= rho, T about |w|
    GCSAM             gradients are centralised: each unit's incoming weights keep their mean

Sources: FedLESAM, Fan et al. 2024. ASAM, Kwon et al. 2021. FedASAM, Caldarola et al. 2022. Gradient
centralisation, Yong et al. 2020. GCSAM, Hassan et al. 2025 (arXiv 2501.11584).
"""

from typing import Annotated

import torch

from fl import FedSAM
from sam import TINY


class FedLESAM_Server(FedSAM):
    """FedSAM, but u = w^{t-1} - w^t: against the server's last step, the same for all clients.

    One gradient a step. u is sent with w. In round 0 it is 0: no ascent.
    Source: Fan et al. 2024, the idea of the released code with the norm of the paper. (The code
    indexes a flat vector by layer, which shifts all entries of a layer by one number.)
    """

    def first_state(self):
        return super().first_state() | {"back": torch.zeros_like(self.task.w0)}

    def broadcast(self, w):
        return super().broadcast(w) | {"back": self.state["back"]}

    def direction(self, w, batch, received, mine):
        return received["back"]

    def aggregate(self, w, mean, lr_sum, share):
        new = super().aggregate(w, mean, lr_sum, share)
        self.state = self.state | {"back": w - new}
        return new


class FedASAM(FedSAM):
    """FedSAM, but e = rho T^2 u / ||T u||, where T = |w| + asam_eta for weights, and 1 for biases.

    Two gradients a step. With asam_eta = 0, a ReLU network without biases that is rescaled, its
    scores unchanged, is perturbed in the same way. rho is not comparable with FedSAM's: the code's
    CIFAR-10 script has rho 0.7.
    Source: Caldarola et al. 2022, released code; Kwon et al. 2021.
    """

    asam_eta: Annotated[float, "added to |w| in the axes of the ellipsoid", 0, None] = 0.2

    def point(self, w, batch, received, mine):
        u = self.direction(w, batch, received, mine)
        T = torch.where(self.task.weights, w.abs() + self.asam_eta, 1)
        return w + T * T * u * (self.rho / (T * u).norm().clamp_min(TINY)), mine


class GCSAM(FedSAM):
    """FedSAM, but G = C g(w + e) with e = rho C u / ||C u||, where C centralises a gradient.

    Two gradients a step. As long as only G moves w, the mean weight into a unit never changes.
    The released code has e = rho C u / ||u||, which is shorter, and G = g(w + e): gc_code = True.
    rho = 0 is then FedAvg; by the formulas it is FedAvg with centralised gradients.
    Source: Hassan et al. 2025, the formulas as restated by others. Clients as FedSAM's are this
    project's choice.
    """

    gc_code: Annotated[bool, "as the released code, else as the formulas"] = False

    def point(self, w, batch, received, mine):
        u = self.direction(w, batch, received, mine)
        Cu = centralise(u, self.task.shapes)
        length = (u if self.gc_code else Cu).norm()
        return w + self.rho * (Cu / length.clamp_min(TINY)), mine

    def correct(self, g, w, received, mine):
        g = g if self.gc_code else centralise(g, self.task.shapes)
        return super().correct(g, w, received, mine)


def centralise(g, shapes):
    """C g: every parameter that is no vector minus its mean over all dimensions but the first.

    g [d], the shapes of the parameters in it -> [d]. The first dimension is the unit (or channel)
    that a weight leads into. C is a projection: C C g = C g.
    """
    parts = []
    for part, shape in zip(g.split([torch.Size(shape).numel() for shape in shapes]), shapes):
        if len(shape) > 1:
            rows = part.view(shape[0], -1)
            part = (rows - rows.mean(1, keepdim=True)).view(-1)
        parts.append(part)
    return torch.cat(parts)
