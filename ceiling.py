"""The ceiling: how much is there to gain from knowing which way the GLOBAL loss rises?

FedSAM, FedLESAM and FedSynSAM differ in how they ESTIMATE uphill. If a client knew it, no estimator could do better by
pointing better. So here is a client that peeks: at every step it reads its direction from images of everybody,

    u = grad L_S(w)         S: `oracle_images` training images of all clients, class-balanced, the same all along
    w <- w - eta g_i(w + rho u / ||u||)                                       everything else as in FedSAM

Of what FedAvg lacks to it (a gap), each estimator closes a share:

    share = (accuracy - FedAvg's) / (oracle's - FedAvg's)                     0: as without a perturbation, 1: as with the true one

A ceiling for DIRECTIONS only: it climbs as far (rho) and descends the same mini-batch gradient as the others, and a method that does
other things (trains at the server, corrects drift) may well be above it. If the gap is nothing, no estimator can help here.

Source: ours. Read next: baselines.py.
"""
import fl


class Oracle(fl.FedSAM):
    """FedSAM, except: it is no method: the client PEEKS at images of all clients and climbs the true global loss: u = grad L_S(w).

    w [d]; 2 gradients a step, one of them over all `oracle_images`; d floats up and down; no state, and what it peeks at is not
    counted as bytes. FedSynSAM with mix = 1 whose D_syn were these images takes the same steps (a test).
    Source: ours, no paper.
    """

    def receive(self, w, extra):
        self.peeked = self.task.balanced(self.cfg.oracle_images, fl.generator(self.cfg.seed, "oracle"))

    def direction(self, w, rows, me):
        return self.grad(w, self.peeked)


METHODS = {"oracle": Oracle}
