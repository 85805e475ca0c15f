"""Every setting of a run: what it means, its unit, its legal values, and who chose it.

Results cannot be reproduced when a setting is not written down. So there is one list, this one; `python run.py --help`
prints it, config.json in every run folder records it, and a test checks that every field is really read.

[DynaFed] the value is that of DynaFed's released code; [FL-Simulator] that of the released code of FedSpeed's and FedSMOO's
authors; [Caldarola] that of FedASAM's; [paper] the paper's rule, where released code has another;  [ours] the source leaves it
open (of FedSynSAM only the abstract was at hand), and this is our choice, made on validation data where a number is meant
(README, "How the defaults were chosen").  Read next: presets.py.
"""
import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field

import baselines
import bits
import compress
import data
import fedsynsam
import models
import split
import synth


def option(default, text, *legal):
    """A field with its sentence for --help and, if given, its legal values."""
    return field(default=default, metadata={"text": text, "legal": legal})


@dataclass(frozen=True)
class Config:
    """All settings; `check()` says in one ValueError what is wrong with them.  Source: see each field."""
    algo: str = option("fedsynsam", "method", *baselines.METHODS)
    seed: int = option(0, "seed of split, weights, clients, batches, compressor, synthesis (the validation images are the same for all seeds)")
    # data
    dataset: str = option("bundled", f"one of {', '.join(data.DATASETS)}, or a Keras-layout file PATH.npz")
    val: int = option(1000, "training images held out for tuning, class-balanced")
    partition: str = option("dirichlet", "how images are split over clients (split.py)", *split.PARTITIONS)
    alpha: float = option(0.1, "Dirichlet parameter of the split, above 0; small is skewed")
    classes_per_client: int = option(2, "for partition shards")
    min_size: int = option(10, "for partition dirichlet-class: least images of a client")
    augment: bool = option(False, "shift images by up to 4 pixels and flip them")
    # network
    model: str = option("cnn", "network (models.py)", *models.MODELS)
    width: int = option(8, "channels of cnn's first layer")
    hidden: int = option(64, "units of the hidden layer of cnn and mlp")
    depth: int = option(1, "hidden layers of mlp; 2 with hidden 200 is the FedAvg paper's 2NN")
    stem: str = option("auto", "resnet18: first layers; auto is 3x3 without a pool for images up to 64 pixels, imagenet 7x7 with stride and pool", "auto", "imagenet")
    bf16: bool = option(False, "clients take the gradients of their images in bfloat16; weights, sums, synthesis, losses and eigenvalues stay float32 [ours]")
    # federation
    clients: int = option(100, "number of clients N")
    participation: int = option(10, "clients per round m")
    rounds: int = option(60, "rounds T")
    local_steps: int = option(20, "local steps K of every client")
    local_epochs: int = option(0, "if above 0: epochs over the client's own images, instead of local_steps")
    batch: int = option(20, "images per local step")
    lr: float = option(0.2, "learning rate eta of the clients")
    lr_decay: float = option(1.0, "eta is multiplied by this after every round")
    weight_decay: float = option(0.0, "added to the gradient as weight_decay * w, after clipping")
    clip: float = option(10.0, "largest l2 norm of a gradient step; 0 is off")
    server_lr: float = option(1.0, "learning rate eta_g of the server; FedDyn and its crossings and FedAdam do not use it")
    average: str = option("uniform", "weights of the clients in the mean", "uniform", "size")
    # uplink
    compress: str = option("qsgd", "compressor of the uplink (compress.py)", *compress.COMPRESSORS)
    k: float = option(0.05, "topk, randk: coordinates kept; below 1 a fraction of d, else a count")
    levels: int = option(1, "qsgd: levels s; with the sign, 1 + ceil(log2(s+1)) bits a coordinate")
    code: str = option("fixed", "qsgd: how levels become bits (bits.py); all but fixed are entropy codes", "fixed", *bits.CODES)
    scale: str = option("max", "qsgd: scale of a bucket", "l2", "max")
    bucket: int = option(512, "qsgd: coordinates that share a scale; 0 is all")
    nu: float = option(0.5, "dithering: largest relative error ||x_hat - x||^2 / ||x||^2, on the mean if randomized [ours]")
    randomized: bool = option(True, "dithering: round up or down at random (unbiased), or to the nearest grid point (about half the error)")
    scaled: bool = option(True, "randk: multiply by d/k (unbiased), or not (random masking)")
    error_feedback: bool = option(False, "clients add what compression left out to their next update")
    # sharpness-aware perturbation
    rho: float = option(0.1, "radius of SAM's ball [ours for FedSynSAM]")
    asam_eta: float = option(0.2, "FedASAM: added to |w|, the axes of the ball; with it rho 0.7 [Caldarola]")
    gc_code: bool = option(False, "GCSAM: as its released code, norm before centralising and descent not centralised; else as its formulas [paper]")
    man: float = option(0.0, "zeta of MAN, with any method: the clients' loss gets zeta/2 * mean squared activations; 0 is without [MAN: 0.15 for CIFAR-100]")
    # corrections of client drift (baselines.py)
    prox: float = option(0.1, "FedProx, FedDyn, FedSpeed, FedSMOO, FedLESAM-D: strength lambda of the spring, per unit of w [FL-Simulator]")
    prox_clip: bool = option(True, "clip the spring too [ours]; --no-prox-clip lets lambda * w pass unclipped, like weight decay [FL-Simulator]")
    variate: float = option(1.0, "SCAFFOLD, FedGAMMA, FedLESAM-S: factor of c - c_i [paper; FedLESAM-S's code 0.1]; 0 is without")
    momentum_alpha: float = option(0.1, "FedCM, MoFedSAM: weight of a client's own gradient, above 0; 1 is without momentum [FL-Simulator]")
    local_adam_lr: float = option(1e-3, "fedavg-adam, dynafed-adam: learning rate of the clients instead of lr; decays with it [DynaFed]")
    adam_lr: float = option(0.1, "FedAdam: eta_g, its learning rate at the server; a coordinate moves by up to about this in a round [FL-Simulator]")
    adam_b1: float = option(0.9, "FedAdam: decay of the first moment a round, below 1 [FL-Simulator]")
    adam_b2: float = option(0.99, "FedAdam: decay of the second moment a round, below 1 [FL-Simulator]")
    adam_eps: float = option(0.01, "FedAdam: added to the root of the second moment, per unit of w, above 0 [FL-Simulator]")
    # alignment of gradients (align.py)
    beta: float = option(0.025, "GradAlign, FedGA: displacement v_i = beta (g_i - g), per unit of gradient; 0 is FedAvg [GradAlign's code for EMNIST]")
    # synthetic data (DynaFed, FedSynSAM)
    warmup: int = option(10, "rounds T_w before the synthesis [ours; DynaFed 24]")
    warmup_method: str = option("fedsam", "FedSynSAM before the synthesis [ours]", "fedsam", "fedavg")
    resynthesize: int = option(0, "rounds between syntheses; 0 is once [DynaFed: once; ours for FedSynSAM]")
    ipc: int = option(2, "synthetic images per class [ours; DynaFed 15]")
    outer_steps: int = option(200, "Adam steps of the synthesis [ours; DynaFed 3000]")
    inner_steps: int = option(10, "unrolled steps M [ours; DynaFed 20]")
    window: int = option(3, "target lies at most so many rounds ahead [DynaFed]")
    average_targets: bool = option(True, "target is a mean of snapshots in the window [DynaFed]")
    syn_step: float = option(0.1, "first value of the synthetic step size a, true cross-entropy scale [ours; DynaFed 0.004]")
    syn_labels: float = option(5.0, "first label logits are this times one-hot [ours; DynaFed's scripts 0, its default 10]")
    rate_images: float = option(0.05, "Adam rate of the synthetic images [DynaFed]")
    rate_labels: float = option(0.1, "Adam rate of the label logits [ours; DynaFed 0.01]")
    rate_step: float = option(1e-5, "Adam rate of the synthetic step size [DynaFed]")
    syn_augment: bool = option(False, "differentiable augmentation in the synthesis [ours; DynaFed on]")
    mix: float = option(0.5, "FedSynSAM: weight of the synthetic gradient, 0..1; 0 is FedSAM if warmup_method is fedsam [ours]")
    mix_units: bool = option(True, "FedSynSAM: mix unit vectors instead of raw gradients [ours]")
    syn_gradient: str = option("step", "FedSynSAM: synthetic gradient at every step, or once a round at w^t [ours]", "step", "round")
    finetune_epochs: int = option(20, "DynaFed: server epochs on the synthetic data a round [DynaFed]")
    finetune_lr: float = option(1e-4, "DynaFed: Adam rate of the server [DynaFed]")
    finetune_batch: int = option(256, "DynaFed: images per server step [DynaFed]")
    # an update as data (FedSynth)
    fs_objective: str = option("update", "learn what reproduces the client's update [Goetz and Tewari], or what does well on its data [paper]; the default is ours, README", "update", "data")
    fs_batches: int = option(4, "synthetic batches M, used one after the other [ours]")
    fs_images: int = option(4, "images of a synthetic batch n [ours]")
    fs_steps: int = option(20, "Adam steps S of a client in a round [ours]")
    fs_rate_images: float = option(0.1, "Adam rate of the images [ours]")
    fs_rate_labels: float = option(0.1, "Adam rate of the label logits [ours]")
    fs_rate_step: float = option(0.005, "Adam rate of the step size [ours]")
    fs_step: float = option(0.2, "first value of the step size a [ours]")
    fs_labels: float = option(1.0, "first label logits are this times one-hot, of the client's own labels [ours]")
    fs_format: str = option("uint8", "how the images are sent; labels and step size are float32 [ours]", *synth.FORMATS)
    # measuring
    eval_every: int = option(2, "rounds between evaluations (the last round is always evaluated)")
    last: int = option(5, "the reported accuracy is the mean over this many last evaluations")
    measure_images: int = option(2000, "training images for eigenvalue and alignment")
    measure_every: int = option(0, "rounds between measurements of eigenvalue and alignment in the log; 0 is only at the end [ours]")
    oracle_images: int = option(500, "oracle: training images of all clients, class-balanced, that its direction is read from [ours]")
    preset: str = option("", "published table whose settings the others started from (presets.py); says which number to print beside ours")
    # machine: these change seconds, not the experiment, and are left out of the settings hash
    device: str = option("auto", "where to compute", "auto", "cpu", "cuda")
    procs: int = option(0, "processes that share the clients of a round (ranks.py); 0 is 1, or what torchrun started")
    threads: int = option(0, "CPU threads of all processes together, each training one client at a time; 0 is all cores")
    chunk: int = option(0, "clients per vmap call, halved when a GPU's memory is too small; 1 is one after the other; 0 is 1 on a CPU and all on a GPU")
    compile: bool = option(False, "fuse the operations of a local step by torch.compile: needs a C++ compiler, one client after the other, and half a minute at the start")
    memory_file: bool = option(False, "keep what clients remember in a file of the run's folder, mapped into memory")
    deterministic: bool = option(False, "refuse operations that are not reproducible on a GPU")
    checkpoint_every: int = option(5, "rounds between checkpoints")

    def check(self):
        """Raise ValueError with the value, the rule it broke and the legal values."""
        for f in dataclasses.fields(self):
            value, legal = getattr(self, f.name), f.metadata["legal"]
            if legal and value not in legal:
                raise ValueError(f"{f.name} = {value!r} is unknown; {closest(value, legal)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name} = {value} is not a finite number")
        distils = issubclass(baselines.METHODS[self.algo], fedsynsam.Distilling)
        for name, low, high in (
                ("seed", 0, 2**31), ("val", 1, None), ("classes_per_client", 1, None), ("min_size", 1, None), ("width", 1, 512),
                ("hidden", 1, 8192), ("depth", 1, 100), ("clients", 1, None), ("participation", 1, self.clients), ("rounds", 1, None),
                ("local_steps", 1, 10**5), ("local_epochs", 0, 10**4), ("batch", 1, 10**5), ("weight_decay", 0, None), ("clip", 0, None),
                ("levels", 1, 2**15 - 1), ("bucket", 0, None), ("nu", 1e-6, 100), ("rho", 0, None), ("warmup", 1, None),
                ("resynthesize", 0, None), ("ipc", 1, 1000), ("outer_steps", 1, None), ("inner_steps", 1, 1000), ("window", 1, self.warmup if distils else None),
                ("rate_images", 0, None), ("rate_labels", 0, None), ("rate_step", 0, None), ("mix", 0, 1), ("asam_eta", 0, None), ("man", 0, None), ("prox", 0, None),
                ("variate", 0, None), ("beta", 0, None), ("momentum_alpha", 0, 1), ("adam_b1", 0, 0.9999), ("adam_b2", 0, 0.9999), ("finetune_epochs", 0, None),
                ("finetune_lr", 0, None), ("finetune_batch", 1, None), ("fs_batches", 1, 1000), ("fs_images", 1, 1000), ("fs_steps", 1, 10**5),
                ("fs_rate_images", 0, None), ("fs_rate_labels", 0, None), ("fs_rate_step", 0, None), ("fs_labels", 0, None),
                ("eval_every", 1, None), ("last", 1, None), ("measure_images", 1, None), ("measure_every", 0, None), ("oracle_images", 1, None),
                ("procs", 0, 1024), ("threads", 0, 1024), ("chunk", 0, None), ("checkpoint_every", 1, None)):
            value = getattr(self, name)
            if value < low or high is not None and value > high:
                raise ValueError(f"{name} = {value} is out of range; it must be " +
                                 (f"at least {low}" if high is None else f"in {low}..{high}"))
        if distils and self.warmup >= self.rounds:
            raise ValueError(f"warmup = {self.warmup} leaves {self.algo} no round of {self.rounds} after its synthesis; it must be below rounds")
        if self.compile and self.chunk > 1:
            raise ValueError(f"compile needs one client after the other; chunk = {self.chunk} must be 1 or 0")
        if self.error_feedback and self.compress == "randk" and self.scaled:
            raise ValueError("error_feedback needs a contractive compressor, and scaled randk is none; add --no-scaled")
        if self.error_feedback and self.algo == "fedsynth" and self.fs_objective == "data":
            raise ValueError("error_feedback needs an update whose rest can be fed back, and fs_objective = 'data' has none; use --fs-objective update")
        if self.compress == "dithering" and self.nu >= 1 and (self.error_feedback or not self.randomized):
            raise ValueError(f"nu = {self.nu:g} promises nothing to error_feedback or without randomized; it must be below 1")
        for name in ("alpha", "lr", "lr_decay", "server_lr", "adam_lr", "local_adam_lr", "k", "syn_step", "fs_step", "momentum_alpha", "adam_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        return self

    def quick(self):
        """The same job at a tenth of the size, for a first look and for tests."""
        tenth = lambda n, least: max(least, round(n / 10))                                        # noqa: E731
        warmup = tenth(self.warmup, 2)
        return dataclasses.replace(
            self, rounds=tenth(self.rounds, 3), warmup=warmup, window=min(self.window, warmup), outer_steps=tenth(self.outer_steps, 5),
            last=1, measure_images=tenth(self.measure_images, 100), resynthesize=-(-self.resynthesize // 10), fs_steps=tenth(self.fs_steps, 5))

    def hash(self):
        """Eight characters that two runs share if and only if all settings but the machine's agree."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in MACHINE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


MACHINE = ("preset", "device", "procs", "threads", "chunk", "compile", "memory_file", "deterministic", "checkpoint_every")


def closest(word, legal):
    """"did you mean X? legal: ...", for a word that is none of `legal`."""
    near = difflib.get_close_matches(str(word).lower(), legal, 1, 0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"legal: {', '.join(legal)}"


def compressor(cfg, d):
    """The uplink compressor for vectors [d] that the settings name. Raises ValueError if k is not in 1..d.  Source: compress.py."""
    k = round(cfg.k * d) if cfg.k < 1 else cfg.k
    if cfg.compress in ("topk", "randk") and (k != int(k) or not 1 <= k <= d):
        raise ValueError(f"k = {cfg.k:g} keeps {k:g} of d = {d} coordinates; a count must be whole and in 1..{d}, a fraction in 0..1")
    known = compress.COMPRESSORS[cfg.compress]
    if known is compress.TopK:
        return known(int(k))
    if known is compress.RandK:
        return known(int(k), cfg.scaled)
    if known is compress.SparseDithering:
        return known(cfg.nu, cfg.randomized)
    return known(cfg.levels, cfg.scale, cfg.bucket, code=cfg.code) if known is compress.QSGD else known()
