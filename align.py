"""Gradient alignment: displace a client before it reads its gradient, so that descent also makes the clients agree.

Where the gradients of the clients differ, a step that helps one harms another. Half their variance measures it:

    r(w) = 1/(2m) sum_i ||g_i(w) - g(w)||^2                     g = mean_i g_i, over the m active clients     (`gradient_variance`)

To descend f + beta r looks as if it took second derivatives: grad r = mean_i H_i (g_i - g), with H_i the Hessian of f_i (the
derivative of g drops out, because the g_i - g sum to 0). But a Hessian times a vector is how a gradient changes along that vector.
So let every client read its gradient a little aside, where it is more like itself and less like the others:

    v_i = beta (g_i(w) - g(w))              sum_i v_i = 0                                                     (`displacement`)
    mean_i g_i(w + v_i) = mean_i (g_i + H_i v_i + ...) = grad f + beta grad r + O(beta^2)

exactly so if the f_i are quadratic. Nothing but first derivatives is computed. There are two ways to use it:

    GradAlign   w <- w - eta g_i(w + v_i)       read at w + v_i, step from w
    FedGA       y_0 = w + v_i,  y <- y - eta g_i(y)       start at w + v_i, walk as FedAvg does, K steps

Put y = w + v_i into the second line and it is the first: while v_i is held, both walk the same path, v_i apart, for every K
(weight decay alone can tell them apart: it pulls w in one, y in the other). K = 1 is the paper's GradAlign; to hold v_i through more
steps is ours.

Two relatives. SCAFFOLD adds the same difference, with the same sign, to EVERY step, eta (g_i - g) each, which after k steps is a
displacement with beta = k eta, paid back by nobody; FedGA adds it once, before the first step, and takes it out at the end. SAM climbs before it reads, too: v_i is uphill of
f_i - f, so one may see in r a sharpness of the clients' disagreement; but v_i is not normalised, and fades as the clients agree.

Where g_i and g come from. Fresh: an exchange before the round (`survey`), in which every active client sends its full gradient at
w^t and hears the mean; that costs a second vector each way, and one gradient over all of a client's images. Previous: the last
updates, for -delta_i / (K eta) is the mean gradient along a client's last walk (FedGAPrevious); that costs no exchange, but is stale.

Compression. v_i is made of what the server decoded, g_i and g alike (a client can decode its own buffer), so the v_i sum to 0
with every compressor, weighted as the mean over clients is. Hence a client sends y_K - y_0 and keeps v_i to itself: w^{t+1} is the
same, and the compressor need not carry v_i, nor add its noise to it (ours; the released code averages y_K).

Symbols beyond fl.py's: beta length of the displacement per unit of gradient, v_i [d]; g_i, g full gradients [d]; r number.

Source: Dandi, Barba and Jaggi 2022 (arXiv 2106.13897), the algorithms; the Taylor argument is derived here. In the released code
beta decays with the learning rate, here it does not. Read next: ceiling.py, baselines.py (SCAFFOLD), or loop.py for how a survey is held.
"""
import torch

import fl


def gradient_variance(gradients, weights):
    """r = 1/2 sum_i p_i ||g_i - sum_j p_j g_j||^2: gradients [m, d], weights p [m] with sum 1 -> number [].  Source: this card."""
    apart = gradients - weights @ gradients
    return 0.5 * torch.dot(weights, apart.square().sum(1))


class Displaced(fl.FedAvg):
    """FedAvg, except: every client knows v_i = beta (g_i - g), from an exchange of full gradients at w^t before it trains.

    w [d]; 1 gradient a step and one over all images a round; 2 d floats up (g_i and delta_i), 2 d down (w and g); no state between
    rounds. `gradient_variance` in the log is r at w^t of the decoded g_i, so it holds the compressor's error too.
    Source: Dandi et al. 2022, released code (fresh gradients).
    """
    surveys, reports = 1, ("gradient_variance",)

    def survey(self, w, everything):
        n = (everything[..., 0] >= 0).sum(1).to(w.dtype)              # images of each batch; one that is padding has none
        return sum(share * self.grad(w, rows) for share, rows in zip(n / n.sum(), everything))[None]

    def hear(self, mean):
        self.g_heard = mean[0]

    def displacement(self, me):
        """v_i of the client -> [d], the same through all steps of a round.  Source: Dandi et al. 2022."""
        return self.cfg.beta * (me.said[0] - self.g_heard)

    def report(self, said, kept, weights):
        return [float(gradient_variance(said[:, 0], weights))]


class GradAlign(Displaced):
    """Displaced, except: the gradient is read at w + v_i and the step made from w: G = g_i(w + v_i).

    w [d]; 1 gradient a step and one over all images a round; 2 d floats up (g_i and delta_i), 2 d down (w and g); no state between
    rounds. K = 1 is the paper's; v_i held through K > 1 steps is ours, and then it is FedGA (see the card). beta = 0 is FedAvg.
    Source: Dandi et al. 2022 (GradAlign).
    """

    def gradient(self, w, rows, me, uphill):
        return super().gradient(w + self.displacement(me), rows, me, uphill)


class FedGA(Displaced):
    """Displaced, except: the client starts at y_0 = w^t + v_i, takes FedAvg's steps from there and sends y_K - y_0.

    w [d]; 1 gradient a step and one over all images a round; 2 d floats up (g_i and delta_i), 2 d down (w and g); no state between
    rounds. That v_i is not sent is ours: it cancels in the mean. beta = 0 is FedAvg; K = 1 is GradAlign.
    Source: Dandi et al. 2022 (FedGA).
    """

    def start(self, w, me):
        return super().start(w, me) + self.displacement(me)

    def finish(self, w, me, steps, lr):
        return super().finish(w - self.displacement(me), me, steps, lr)


class FedGAPrevious(FedGA):
    """FedGA, except: g_i and g are read off the last updates: g_i = -delta_i / (K_i eta), g = -(mean delta) / (K eta).

    w [d]; 1 gradient a step; d floats up, 2 d down (w and g); client g_i [d] (0 vectors of its own before it was active: it takes g,
    so v_i = 0), server g [d], 0 at first: round 0 is FedAvg's. g_i is as old as the client's last round, and only at full
    participation with equal K_i do the v_i sum to 0; what is left of their sum is not sent, so it moves no model.
    `gradient_variance` is that of this round's decoded g_i, mean gradients along K steps: at K = 1, of one batch each.
    Source: ours (the paper's code takes fresh gradients).
    """
    surveys, memory = 0, 1

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.g = torch.zeros_like(task.w0)

    def broadcast(self, w):
        return [w, self.g]

    def receive(self, w, extra):
        self.g_heard = extra[0]

    def first_memory(self, w):
        return self.g_heard[None]

    def displacement(self, me):
        return self.cfg.beta * (me.memory[0] - self.g_heard)

    def finish(self, w, me, steps, lr):
        return super().finish(w, me, steps, lr)[0], -torch.ones_like(me.memory) / (steps * lr)      # `remember` makes it g_i

    def remember(self, memory, decoded):
        return memory * decoded

    def server(self, w, mean, steps, lr):
        self.g = -mean[0] / (steps * lr)
        return super().server(w, mean, steps, lr)

    def report(self, said, kept, weights):
        return super().report(kept, None, weights)


METHODS = {"gradalign": GradAlign, "fedga": FedGA, "fedga-previous": FedGAPrevious}
