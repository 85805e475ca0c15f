"""The methods that learn synthetic data: FedSynSAM, the centre of this project, its parent DynaFed, and FedSynth.

Three uses of a few learnt images (synth.py says how they are learnt), each a difference from its parent in the form of fl.py:

    FedAvg -> FedSynth          a client sends data instead of an update: a compressor that learns
           -> Distilling        the server watches the trajectory of w and distils data from it
                 -> DynaFed     the server trains on them after every average
                 -> FedSynSAM   clients climb along a mixture of own and synthetic gradient before they read theirs

Why FedSynSAM. SAM wants to climb the GLOBAL loss F = mean_i F_i before it reads the gradient. A client can climb its own F_i (FedSAM),
which under skewed data may lead down in F, or back along the last move of the model (FedLESAM), which is old, and blurred by
compression. The trajectory w^0, w^1, ... averages over many rounds and clients, and data that explain it give a gradient of their
own at ANY point w, also at a client's twentieth step.

Of FedSynSAM only the abstract was at hand: what mixes with what, when and how, is this project's choice, and each choice a setting.

Sources: FedSynSAM, arXiv 2602.11584; DynaFed, Pi et al. 2023; FedSynth, Hu et al. 2022; "update", Goetz and Tewari 2020. Read next: align.py.
"""
import torch

import sam
import synth
from fl import FedAvg, generator


class FedSynth(FedAvg):
    """FedAvg, except: a client sends a small synthetic data set, and the server trains on it to see what the update is.

        theta_0 = w^t     theta_j = theta_{j-1} - a grad l(theta_{j-1}; X_j, Y_j), j = 1..M     x_hat = theta_M - w^t
        X, Y, a are learnt to make F_i(theta_M) small on the round's real mini-batches     (fs_objective = "data", the paper's)
        or ||theta_M - w_{i,K}||^2 small, after K local steps                              (fs_objective = "update", our default)

    w [d]; 1 gradient a step with "update" ("data" makes no local steps); to learn X, Y, a besides S M gradients of gradients a
    round (and S of F_i with "data"); D_syn up, of a size that knows no d, so `compress` is not used; d floats down; no
    state; server work: M gradients a client. Nothing keeps images that are learnt from looking like the client's own.
    Source: Hu et al. 2022 (FedSynth), of which the abstract was at hand; "update", Goetz and Tewari 2020.
    """
    def codec(self, compressor, w, plan=None):
        c, train, learnt = self.cfg, self.task.train, {}
        if plan is not None:
            own = train.y[plan[..., 0][plan[..., 0] >= 0]]
            learnt["first"] = own.repeat(-(-c.fs_batches * c.fs_images // len(own)))[:c.fs_batches * c.fs_images]
            learnt["real"] = (lambda v, s: self.task.loss(v, plan[s % len(plan)])) if c.fs_objective == "data" else None
        return synth.AsData(self.task.apply, w, (c.fs_batches, c.fs_images, *train.x.shape[1:]), len(train.classes), c.fs_format, **learnt,
                            steps=c.fs_steps, rates=(c.fs_rate_images, c.fs_rate_labels, c.fs_rate_step), step=c.fs_step,
                            label_scale=c.fs_labels, dtype=w.dtype)

    def step(self, w, rows, me, lr, uphill):
        return (w, me) if self.cfg.fs_objective == "data" else super().step(w, rows, me, lr, uphill)


class Distilling(FedAvg):
    """FedAvg, except: the server keeps w^0 ... w^{T_w} and distils a synthetic data set from them before round T_w.

    w [d]; client as FedAvg; the server keeps T_w + 1 snapshots [d] and D_syn (synth.Synthetic), learnt once, or anew every
    `resynthesize` rounds from the latest T_w + 1 snapshots.  Source: Pi et al. 2023 (DynaFed), released code.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.trajectory, self.synthetic, self.matching = [], None, []      # matching: L_TM of every outer step

    def begin(self, t, w, progress=False):
        c, late = self.cfg, t - self.cfg.warmup
        if late <= 0 or c.resynthesize:
            self.trajectory = [*self.trajectory, w][-(c.warmup + 1):]
        if late == 0 or late > 0 and c.resynthesize and late % c.resynthesize == 0:
            shape, classes = self.task.train.x.shape[1:], len(self.task.train.classes)
            self.synthetic, self.matching = synth.distill_as_set(
                self.task.apply, self.trajectory, shape, classes, c, generator(c.seed, "synthesis", t), progress)
            self.trajectory = self.trajectory if c.resynthesize else []        # done with: it need not sit in every checkpoint
            return True


class DynaFed(Distilling):
    """Distilling, except: after every average the server trains the model on D_syn, `finetune_epochs` epochs of Adam.

    w [d]; client and traffic as FedAvg; server work: finetune_epochs x (images / finetune_batch) gradients a round.
    Source: Pi et al. 2023 (DynaFed), released code; its client keeps Adam state and its server augments D_syn, ours does not.
    """

    def server(self, w, mean, steps, lr):
        w = super().server(w, mean, steps, lr)
        if self.synthetic is None:
            return w
        images, logits, _ = self.synthetic
        m, v, k = torch.zeros_like(w), torch.zeros_like(w), 0                  # a new Adam every round, as in the released code
        for _ in range(self.cfg.finetune_epochs):
            for x, y in zip(images.split(self.cfg.finetune_batch), logits.split(self.cfg.finetune_batch)):
                here, k = w.detach().requires_grad_(), k + 1
                g, = torch.autograd.grad(synth.soft_cross_entropy(self.task.apply(here, x), y), here)
                w, m, v = synth.adam(w, g, m, v, self.cfg.finetune_lr, k)
        return w


class FedSynSAM(Distilling):
    """Distilling, except: clients climb along a mixture of their own gradient and the gradient on D_syn.

        u = (1 - mix) g_i(w) + mix g_syn(w)         eps = rho u / ||u||         w <- w - eta g_i(w + eps)

    w [d]; 3 gradients a step (2 if mix is 0 or 1); with syn_gradient = "round", g_syn(w^t) once a round instead, so 2 (or 1 if
    mix is 1); d floats up and down, and D_syn once to each client. Before round T_w: FedSAM or FedAvg (warmup_method), so it is
    FedSAM throughout if mix = 0 and warmup_method = "fedsam".
    Source: arXiv 2602.11584, abstract; the mixture and every knob are this project's choice (config.py marks them).
    """
    gradients = 3

    def parcel(self):
        return self.synthetic[:2]                       # images and label logits

    def unpack(self, tensors):
        self.synthetic = synth.Synthetic(*tensors, self.synthetic.step if self.synthetic else None)     # the server keeps the step size

    def receive(self, w, extra):
        super().receive(w, extra)
        self.uphill = self.g_syn(w) if self.synthetic and self.cfg.syn_gradient == "round" else None

    def g_syn(self, w):
        """The gradient of the synthetic loss at w [d] -> [d].  Source: our reading of arXiv 2602.11584."""
        return self.grad_of(lambda v: synth.synthetic_loss(self.task.apply, v, self.synthetic), w)

    def direction(self, w, rows, me):
        c = self.cfg
        if self.synthetic is None or c.mix == 0:                 # before round T_w: FedSAM, or FedAvg
            return None if self.synthetic is None and c.warmup_method == "fedavg" else self.grad(w, rows)
        uphill = self.g_syn(w) if c.syn_gradient == "step" else self.uphill
        return uphill if c.mix == 1 else sam.mix_directions(self.grad(w, rows), uphill, c.mix, c.mix_units)


METHODS = {"fedsynth": FedSynth, "dynafed": DynaFed, "fedsynsam": FedSynSAM}
