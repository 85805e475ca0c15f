"""Settings of published tables, with their numbers: `python run.py --preset NAME --algo METHOD ...`.

A reference is worth what it reproduces. Each preset names a table somebody published, the settings that made it (as far as the
paper and its released code say), the settings that single methods had for themselves, and the accuracies printed there. A run
that changes nothing but the seed and what the table itself varies (alpha, IID, MAN's zeta) shows the published number beside its own.

What no source settles is marked [ours]. Everywhere: this project holds `val` training images out (1,000), which the published
runs trained on; it reports the mean of the last evaluations, where most of them do not say which round they report. Augmented
images are shifted with black borders in every batch; FL-Simulator's code shifts every second image, with borders of the mean colour.

Sources: each preset names its own. Read next: experiment.py.
"""
import dataclasses
from typing import NamedTuple

from config import MACHINE, Config


class Preset(NamedTuple):
    """settings: fields of Config; own: fields that one method has for itself; published: (method, alpha or "iid", zeta) -> accuracy %."""
    source: str
    settings: dict
    own: dict
    published: dict


def rows(columns, table, man=0.0):
    """A table "method number number ..." with its columns, alpha or "iid" -> {(method, column, zeta): number}, 0 being no number."""
    lines = [line.split() for line in table.strip().splitlines()]
    return {(name, column, man): float(x) for name, *numbers in lines for column, x in zip(columns, numbers, strict=True) if float(x)}


# FedWMSAM's, MAN's and FL-Simulator's experiments share a frame, and mostly a code base
FRAME = {"clients": 100, "participation": 10, "local_epochs": 5, "batch": 50, "lr": 0.1, "lr_decay": 0.998, "weight_decay": 1e-3, "clip": 10.0,
         "server_lr": 1.0, "average": "uniform", "partition": "dirichlet-recycled", "compress": "identity", "prox": 0.1, "momentum_alpha": 0.1,
         "rho": 0.1, "eval_every": 10, "last": 5}
FEDWMSAM_RHO = {name: {"rho": 0.01} for name in ("fedsam", "fedgamma", "fedlesam", "fedlesam-s", "fedlesam-d", "fedlesam-server")}
RESNET = {"model": "resnet18", "stem": "imagenet", "augment": True}
DYNAFED = {"clients": 80, "participation": 32, "rounds": 200, "local_epochs": 1, "batch": 32, "local_adam_lr": 1e-3, "clip": 0.0, "partition": "dirichlet-balanced",
           "alpha": 0.04, "model": "convnet", "compress": "identity", "warmup": 24, "ipc": 15, "outer_steps": 3000, "inner_steps": 20, "window": 3,
           "syn_step": 0.004, "syn_labels": 0.0, "rate_images": 0.05, "rate_labels": 0.01, "rate_step": 1e-5, "syn_augment": True,
           "finetune_epochs": 20, "finetune_lr": 1e-4, "finetune_batch": 256, "eval_every": 5, "last": 5}

PRESETS = {
    "fedwmsam-fmnist": Preset(
        "FedWMSAM (arXiv 2511.22080, NeurIPS 2025), its table on Fashion-MNIST. The paper says MLP and names no decay; its released code has no "
        "Fashion-MNIST. One hidden layer of 64 and a constant rate came nearest to FedAvg's two numbers among four candidates (README); no other "
        "method had a part in that choice. Weight decay and clipping: the code's defaults. FedLESAM's number is the best of its three",
        {**FRAME, "dataset": "fashionmnist", "model": "mlp", "hidden": 64, "depth": 1, "lr_decay": 1.0, "rounds": 500, "alpha": 0.6}, FEDWMSAM_RHO,
        rows((0.6, 0.1), """
             fedavg      86.84  82.26
             fedcm       82.83  73.33
             scaffold    87.89  83.51
             fedsam      86.83  82.61
             mofedsam    82.78  74.89
             fedgamma    87.08  82.98
             fedsmoo     88.46  83.37
             fedlesam    86.89  83.75
             fedlesam-s  86.89  83.75
             fedlesam-d  86.89  83.75""")),
    "fedwmsam-cifar10": Preset(
        "FedWMSAM (arXiv 2511.22080), its table on CIFAR-10: ResNet-18 with GroupNorm; the rest as above",
        {**FRAME, **RESNET, "dataset": "cifar10", "rounds": 500, "alpha": 0.6}, FEDWMSAM_RHO,
        rows((0.6, 0.1), """
             fedavg      78.86  70.05
             fedcm       81.26  72.29
             scaffold    82.32  74.28
             fedsam      79.63  69.63
             mofedsam    83.39  73.86
             fedgamma    82.92  72.18
             fedsmoo     84.10  75.07
             fedlesam    81.65  72.84
             fedlesam-s  81.65  72.84
             fedlesam-d  81.65  72.84""")),
    "flsimulator-cifar10": Preset(
        "the README of FL-Simulator (code of FedSpeed's and FedSMOO's authors), CIFAR-10, 100 clients, 10 %",
        {**FRAME, **RESNET, "dataset": "cifar10", "rounds": 1000, "alpha": 0.6},
        {"fedgamma": {"rho": 0.01}, "fedadam": {"adam_lr": 0.1}},
        rows(("iid", 0.6, 0.3, 0.1), """
             fedavg    82.52  80.65  79.75  77.31
             fedprox   82.54  81.05  79.52  76.86
             fedadam   84.32  82.56  82.12  77.58
             scaffold  84.88  83.53  82.75  79.92
             feddyn    85.46  84.22  83.22  78.96
             fedcm     85.74  83.81  83.44  78.92
             fedgamma  85.74  84.80  83.81  80.72
             mofedsam  87.24  85.74  85.14  81.58
             fedspeed  87.31  86.33  85.39  82.26
             fedsmoo   87.70  86.87  86.04  83.30""")),
    "dynafed-fmnist": Preset(
        "DynaFed (arXiv 2211.10878), its results table on Fashion-MNIST. Its clients keep Adam's moments between rounds, so its FedAvg is "
        "fedavg-adam and its own method dynafed-adam here. Synthesis as in its CIFAR-10 script [ours for Fashion-MNIST]",
        {**DYNAFED, "dataset": "fashionmnist"}, {},
        rows((0.01, 0.04, 0.16), """
             fedavg-adam   74.50  81.74  89.54
             dynafed-adam  87.52  89.45  91.35""")),
    "dynafed-cifar10": Preset(
        "DynaFed (arXiv 2211.10878), its results table on CIFAR-10, settings of its CIFAR-10 script",
        {**DYNAFED, "dataset": "cifar10"}, {},
        rows((0.01, 0.04, 0.16), """
             fedavg-adam   39.30  51.19  69.74
             dynafed-adam  65.53  70.07  74.69""")),
    "man-cifar100": Preset(
        "MAN (arXiv 2512.08314), README of its released code, CIFAR-100: a LeNet with 64-64 channels and 384-192 units. FedAvg at alpha 0.3 is printed "
        "as 49.9 there, out of line with its neighbours; --man 0.15 gives the table's second half. Augmentation as in FL-Simulator [ours]",
        {**FRAME, "dataset": "cifar100", "model": "lenet", "rounds": 500, "alpha": 0.3, "prox": 0.01, "rho": 0.05, "augment": True},
        {"fedspeed": {"rho": 0.01, "prox": 0.1}},
        {**rows((0.3, 0.6, "iid"), """
             fedavg    49.90  40.39  39.40
             fedsam    43.44  43.36  41.31
             feddyn    49.29  49.91  50.04
             fedspeed  50.95  51.33  50.95"""),
         **rows((0.3, 0.6, "iid"), """
             fedavg    52.00  52.42  52.59
             fedsam    51.59  52.62  52.85
             feddyn    55.27  55.63  55.83
             fedspeed  55.23  55.84  55.89""", man=0.15)}),
}


def fields(name, algo):
    """The fields of Config that preset `name` sets for method `algo` -> dict."""
    return {**PRESETS[name].settings, **PRESETS[name].own.get(algo, {}), "preset": name}


def published(cfg):
    """The accuracy in % that the preset's table prints for these settings, or None.

    None too if anything was changed that is neither the seed nor what the table varies nor the machine nor what is measured when.
    """
    if cfg.preset not in PRESETS:
        return None
    free = {"seed", "alpha", "partition", "man", "eval_every", "last", "measure_images", "val", *MACHINE}
    original = dataclasses.asdict(Config(algo=cfg.algo, **fields(cfg.preset, cfg.algo)))
    split = "iid" if cfg.partition == "iid" else cfg.alpha if cfg.partition == original["partition"] else None
    if any(value != original[key] for key, value in dataclasses.asdict(cfg).items() if key not in free):
        return None
    return PRESETS[cfg.preset].published.get((cfg.algo, split, cfg.man))
