"""An oracle: what could be gained by knowing the ascent direction of the global loss?

FedSAM, FedLESAM and FedSynSAM differ in how they estimate that direction. Here the clients know it,
because they look at images of everybody. Another method closes this share of FedAvg's gap to it:

    share = (accuracy - FedAvg's) / (oracle's - FedAvg's)

It shows what a better estimate of the direction can give, not what other changes can: rho and the
gradient of the step are those of FedSAM. If there is no gap, a better estimate does not help.
"""

from typing import Annotated

from fl import FedSAM, rng


class Oracle(FedSAM):
    """FedSAM, but u is the gradient on images of all clients, as many of each class.

    Two gradients a step, one of them over all `oracle_images`. This is no method: a client peeks at
    images that it cannot have, and they are not counted as bytes. They are drawn once. FedSynSAM
    with mix = 1 would take the same steps after its warm-up if these were its synthetic images.
    Few images give only an estimate of the global gradient. That on 100 has cosine 1.00 to that on
    500 in the main job, and 0.55 on CIFAR-10 (`untuned` and `cifar` in results/README.md).
    """

    oracle_images: Annotated[int, "images of all clients that it peeks at", 1, None] = 500

    def __init__(self, task, seed=0, **settings):
        super().__init__(task, seed, **settings)
        self.peeked = task.balanced(self.oracle_images, rng(self.seed, "oracle"))

    def direction(self, w, batch, received, mine):
        return self.gradient(w, self.peeked)
