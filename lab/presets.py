"""Published tables: the settings that made them, and the numbers printed there.

    python -m lab.presets                                          all presets
    python -m lab.presets fedwmsam-fmnist --algo fedsam scaffold   run two methods of a table
    python -m lab.presets fedwmsam-fmnist --algo fedsmoo --column 0.1 --seeds 1 --set prox_clip=true

A preset names a table that somebody published, the settings behind it as far as the paper and the
released code tell them, what single methods had for themselves, and the accuracies of the table.
The command runs methods and columns of the table and prints the published number beside each mean.
What `--set` changes is said, and the published number still stands beside it. Rows are kept in
results/NAME/rows.json, runs in --out.

Everywhere: this project holds 1,000 training images out (`val`), on which the published runs
trained; it reports the mean of the last evaluations, where most of them do not say which round they
report. Augmented images are shifted with black borders in every batch; FL-Simulator's code shifts
every second image, with borders of the mean colour.

Proximal terms: FL-Simulator and its descendants (FedWMSAM, MAN) let prox w pass as weight decay and
clip the rest, which is prox_clip = false here. It matters: with resnet18, prox ||w0|| = 11.2 is
above the clipping norm of 10 before anything is learnt.

FedWMSAM's table contradicts itself and its code. Its Table 3 has FedWMSAM at 78 % in round 356 and
FedAvg at 74 % in round 432, its Table 1 (here) 76.64 and 70.05 after 500 rounds. The paper has rho
0.01, all its scripts 0.1. Its code moves each tensor by one number instead of along the momentum,
and FedLESAM-S and -D by one instead of along the last update, so these rows are probably not those
of the published methods. It says MLP and ResNet-34, and ships neither. Two rows are odd: FedSMOO
falls below FedAvg on CIFAR-100 with a Dirichlet split only, FedGAMMA to 1.98 % with 10 classes a
client.

DynaFed's loss is divided by the number of classes C = 10, so its step size 0.04 with Adam rate 1e-5
is 0.004 with 1e-6 here (synth.py).

Sources: each preset names its own.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import run
from lab import study, verdicts
from plumbing.settings import HERE, closest


class Preset(NamedTuple):
    """settings: of all methods that have them; own: {method: settings for itself};
    published: {method: {column: accuracy %}}; `column_settings` says what a column stands for."""

    source: str
    settings: dict
    own: dict
    published: dict


def table(text):
    """Lines "method number number ..." under a line of columns -> {method: {column: number}}.

    A number "-" was not printed.
    """
    heads, *lines = [line.split() for line in text.strip().splitlines()]
    cells = {name: zip(heads, numbers, strict=True) for name, *numbers in lines}
    return {name: {c: float(x) for c, x in row if x != "-"} for name, row in cells.items()}


def column_settings(column):
    """What a column of a table sets: "0.6" a Dirichlet split, "iid", "6cl" six classes a client.

    "+man" adds MAN, "/200" is for 200 clients of which 10 take part, with batches of 25.
    """
    split, _, more = column.partition("+")
    split, _, clients = split.partition("/")
    found = {"man": 0.15} if more == "man" else {}
    found |= {"clients": 200, "participation": 10, "batch": 25} if clients == "200" else {}
    if split == "iid":
        return found | {"partition": "iid"}
    if split.endswith("cl"):
        return found | {"partition": "shards", "classes_per_client": int(split[:-2])}
    return found | {"alpha": float(split)}


FRAME = {"clients": 100, "participation": 10, "local_epochs": 5, "batch": 50, "lr": 0.1}
FRAME |= {"lr_decay": 0.998, "weight_decay": 1e-3, "clip": 10.0, "prox_clip": False, "prox": 0.1}
FRAME |= {"momentum_alpha": 0.1, "rho": 0.1, "partition": "dirichlet-recycled"}
FRAME |= {"compress": "identity", "eval_every": 10, "last": 5}
RESNET = {"model": "resnet18", "stem": "imagenet", "augment": True}
WMSAM_OWN = {
    name: {"rho": 0.01}
    for name in ("fedsam", "fedgamma", "fedlesam", "fedlesam-s", "fedlesam-d", "fedwmsam")
}
DYNAFED = {"clients": 80, "participation": 32, "rounds": 200, "local_epochs": 1, "batch": 32}
DYNAFED |= {"local_adam_lr": 1e-3, "clip": 0.0, "partition": "dirichlet-balanced"}
DYNAFED |= {"model": "convnet", "compress": "identity", "warmup": 24, "ipc": 15, "window": 3}
DYNAFED |= {"outer_steps": 3000, "inner_steps": 20, "syn_step": 0.004, "syn_labels": 0.0}
DYNAFED |= {"rate_images": 0.05, "rate_labels": 0.01, "rate_step": 1e-6, "syn_augment": True}
DYNAFED |= {"finetune_epochs": 20, "finetune_lr": 1e-4, "finetune_batch": 256, "eval_every": 5}
DYNAFED |= {"last": 5, "lr": 0.2}

PRESETS = {
    "fedwmsam-fmnist": Preset(
        "FedWMSAM (arXiv 2511.22080, NeurIPS 2025), Table 1, Fashion-MNIST. The paper says MLP and "
        "names no decay of the rate. One hidden layer of 64 and a constant rate came nearest to "
        "FedAvg's two Dirichlet numbers among four candidates; no other method had a part in that "
        "choice. Weight decay and clipping: the code's defaults. fedlesam: the best of its three",
        FRAME | {"dataset": "fashionmnist", "model": "mlp", "lr_decay": 1.0, "rounds": 500},
        WMSAM_OWN,
        table("""
                     0.6    0.1    6cl    3cl
            fedavg   86.84  82.26  86.25  81.50
            fedcm    82.83  73.33  80.47  66.30
            scaffold 87.89  83.51  87.85  83.11
            fedsam   86.83  82.61  86.73  80.45
            mofedsam 82.78  74.89  81.41  68.22
            fedgamma 87.08  82.98  87.16  83.03
            fedsmoo  88.46  83.37  87.45  82.96
            fedlesam 86.89  83.75  87.32  82.09
            fedwmsam 87.56  84.64  88.05  85.31"""),
    ),
    "fedwmsam-cifar10": Preset(
        "FedWMSAM (arXiv 2511.22080), Table 1, CIFAR-10: ResNet-18 with GroupNorm; as above",
        FRAME | RESNET | {"dataset": "cifar10", "rounds": 500},
        WMSAM_OWN,
        table("""
                     0.6    0.1    6cl    3cl
            fedavg   78.86  70.05  78.73  64.26
            fedcm    81.26  72.29  81.67  70.25
            scaffold 82.32  74.28  81.79  67.86
            fedsam   79.63  69.63  79.08  65.03
            mofedsam 83.39  73.86  83.34  73.27
            fedgamma 82.92  72.18  80.43  61.05
            fedsmoo  84.10  75.07  83.82  70.99
            fedlesam 81.65  72.84  81.27  63.81
            fedwmsam 83.56  76.64  84.43  74.46"""),
    ),
    "fedwmsam-cifar100": Preset(
        "FedWMSAM (arXiv 2511.22080), Table 1, CIFAR-100. The paper has a ResNet-34, this preset a "
        "ResNet-18: the order of the methods can be compared, the numbers cannot",
        FRAME | RESNET | {"dataset": "cifar100", "rounds": 500},
        WMSAM_OWN,
        table("""
                     0.6    0.1    20cl   10cl
            fedavg   39.17  38.15  39.68  36.31
            fedcm    46.35  42.90  43.94  39.40
            scaffold 48.55  44.37  46.47  41.33
            fedsam   40.83  37.90  39.33  35.53
            mofedsam 48.59  44.72  46.19  42.79
            fedgamma 48.37  44.74  17.39  1.98
            fedsmoo  32.25  29.87  46.20  30.06
            fedlesam 42.60  41.14  42.98  39.14
            fedwmsam 49.08  46.46  47.86  43.83"""),
    ),
    "flsimulator-cifar10": Preset(
        "README of FL-Simulator (code of FedSpeed's and FedSMOO's authors), CIFAR-10",
        FRAME | RESNET | {"dataset": "cifar10", "rounds": 1000},
        {"fedgamma": {"rho": 0.01}, "fedadam": {"adam_lr": 0.1}},
        table("""
                     iid    0.6    0.3    0.1    iid/200  0.6/200  0.3/200  0.1/200
            fedavg   82.52  80.65  79.75  77.31  81.09    79.93    78.66    75.21
            fedprox  82.54  81.05  79.52  76.86  81.56    79.49    78.76    75.84
            fedadam  84.32  82.56  82.12  77.58  83.29    81.22    80.22    75.83
            scaffold 84.88  83.53  82.75  79.92  84.24    83.01    82.04    78.23
            feddyn   85.46  84.22  83.22  78.96  81.11    80.25    79.43    75.43
            fedcm    85.74  83.81  83.44  78.92  83.77    82.01    80.77    75.91
            fedgamma 85.74  84.80  83.81  80.72  84.99    84.02    83.03    80.09
            mofedsam 87.24  85.74  85.14  81.58  86.27    84.71    83.44    79.02
            fedspeed 87.31  86.33  85.39  82.26  86.87    85.07    83.94    79.66
            fedsmoo  87.70  86.87  86.04  83.30  87.40    85.97    85.14    81.35"""),
    ),
    "dynafed-fmnist": Preset(
        "DynaFed (arXiv 2211.10878), results table, Fashion-MNIST. Its clients keep Adam's "
        "moments, so its FedAvg is fedavg-adam and its own method dynafed-adam here. Synthesis as "
        "in its CIFAR-10 script, which is this project's choice for Fashion-MNIST",
        DYNAFED | {"dataset": "fashionmnist"},
        {},
        table("""
                         0.01   0.04   0.16
            fedavg-adam  74.50  81.74  89.54
            dynafed-adam 87.52  89.45  91.35"""),
    ),
    "dynafed-cifar10": Preset(
        "DynaFed (arXiv 2211.10878), results table, CIFAR-10, settings of its CIFAR-10 script; "
        "that for alpha 0.16 has 15 epochs at the server, the others 20",
        DYNAFED | {"dataset": "cifar10"},
        {},
        table("""
                         0.01   0.04   0.16
            fedavg-adam  39.30  51.19  69.74
            dynafed-adam 65.53  70.07  74.69"""),
    ),
    "man-cifar100": Preset(
        "MAN (arXiv 2512.08314), README of its code, CIFAR-100: lenet. FedAvg at alpha 0.3 is "
        "printed as 49.9 there, out of line with its neighbours. Augmentation as in FL-Simulator "
        "is this project's choice",
        FRAME
        | {"dataset": "cifar100", "model": "lenet", "rounds": 500, "augment": True}
        | {"prox": 0.01, "rho": 0.05},
        {"fedspeed": {"rho": 0.01, "prox": 0.1}},
        table("""
                     0.3    0.6    iid    0.3+man  0.6+man  iid+man
            fedavg   49.90  40.39  39.40  52.00    52.42    52.59
            fedsam   43.44  43.36  41.31  51.59    52.62    52.85
            feddyn   49.29  49.91  50.04  55.27    55.63    55.83
            fedspeed 50.95  51.33  50.95  55.23    55.84    55.89"""),
    ),
}


def settings_of(name, algo, column, changes=None):
    """The settings of a method in a column of a preset's table, with changes."""
    preset = PRESETS[name]
    epochs = {"finetune_epochs": 15} if (name, column) == ("dynafed-cifar10", "0.16") else {}
    shared = preset.settings | column_settings(column) | epochs
    return study.fitting(shared, {"algo": algo} | preset.own.get(algo, {}) | (changes or {}))


def conduct(name, algos, columns, seeds, root, changes=None, **machine):
    """Run methods and columns of a preset's table: yields rows for results/NAME/rows.json."""
    for algo in algos:
        for column in columns:
            settings = settings_of(name, algo, column, changes)
            row = {"algo": algo, "column": column, "changed": changes or {}}
            row["published"] = PRESETS[name].published.get(algo, {}).get(column)
            for seed in range(seeds):
                job = settings | machine | {"seed": seed}
                about = row | {"seed": seed, "rounds": settings["rounds"]}
                try:
                    ((_, result, _),) = study.shared([lambda: study.train(root, job)])
                    yield about | result
                except FloatingPointError as error:
                    yield about | {"diverged": str(error)}


def text(rows):
    """Rows as a Markdown table: published, and mean ± half the t-interval over seeds."""
    lines = ["| method | column | published | here | changed | runs |", "| --- " * 6 + "|"]
    cells = {}
    for row in rows:
        key = row["algo"], row["column"], row["published"], json.dumps(row["changed"])
        cells.setdefault(key, []).append(100 * row.get("test_acc", np.nan))
    for (algo, column, printed, changed), seen in cells.items():
        printed = "-" if printed is None else f"{printed:.2f}"
        here, changed = verdicts.pm(np.array(seen), 2), changed.strip("{}").replace('"', "")
        lines.append(f"| {algo} | {column} | {printed} | {here} | {changed} | {len(seen)} |")
    return "\n".join(lines)


def keep(path, rows):
    """Put rows into a file, in place of those for the same method, column, seed and changes."""

    def place(row):
        return row["algo"], row["column"], row["seed"], json.dumps(row["changed"])

    path.parent.mkdir(parents=True, exist_ok=True)
    with study.locked(path):
        stored = json.loads(path.read_text()) if path.exists() else []
        new = {place(row) for row in rows}
        rows = [row for row in stored if place(row) not in new] + rows
        run.write(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def changes_of(words):
    """["prox_clip=true", "rho=0.05"] -> {name: value}."""
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: it must be NAME=VALUE, as in rho=0.05")
        if name in ("algo", "seed"):
            raise ValueError(f"--set {word}: --algo and --seeds say that")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value  # a word, as in compress=qsgd
    return changes


def chosen(words, known, what):
    """The words, all known ones if there are none; ValueError for one that is not known."""
    for word in words:
        if word not in known:
            raise ValueError(f"{word!r} is no {what} of this table; {closest(word, list(known))}")
    return words or list(known)


def read(argv):
    """The command line: (name or None, methods, columns, everything)."""
    p = run.Parser(prog="python -m lab.presets", description=__doc__.split("\n")[0])
    p.add_argument("name", nargs="?", default=None)
    p.add_argument("--algo", nargs="+", default=[], help="methods; all of the table if none")
    p.add_argument("--column", nargs="+", default=[], help="columns; all of the table if none")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="changed settings")
    p.add_argument("--out", type=Path, default=Path("runs/lab"), help="where runs are kept")
    p.add_argument("--results", type=Path, default=HERE / "results")
    given = p.parse_args(argv)
    if given.seeds < 1:
        raise ValueError(f"seeds = {given.seeds} must be at least 1")
    if given.name is not None:
        (given.name,) = chosen([given.name], PRESETS, "preset")
        published = PRESETS[given.name].published
        given.algo = given.algo or list(published)
        given.column = chosen(given.column, next(iter(published.values())), "column")
        given.set = changes_of(given.set)
    return given


def main(argv=None):
    """The command: exit code 0, 1 if a run diverged, 2, or 130 if interrupted."""
    rows = []
    try:
        given = read(argv)
        if given.name is None:
            print("\n".join(f"{name:20} {preset.source}" for name, preset in PRESETS.items()))
            return 0
        job = given.name, given.algo, given.column, given.seeds, given.out, given.set
        for row in conduct(*job):
            rows.append(row)
            keep(given.results / given.name / "rows.json", [row])
    except (ValueError, OSError) as error:
        print(f"lab.presets: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lab.presets: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(text(rows))
    return int(any("diverged" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
