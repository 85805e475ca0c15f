"""Experiments: put the parts together, run, write everything down, continue after a kill, compare.

    python run.py                                    FedSynSAM on the bundled images, 100 clients
    python run.py --algo fedavg fedsynsam --seeds 3  a comparison: mean and standard deviation
    python run.py --compress sign qsgd topk          the same of compressors
    python run.py --resume runs/NAME                 continue a run or a comparison
    python run.py --quick                            a small version: a tenth of the rounds
    python run.py --list                             all methods, compressors, networks and splits
    python run.py --algo fedprox --help              the settings of the parts of this run

and from Python

    outcome = run.experiment(algo="fedsynsam", rounds=20, rho=0.05)
    outcome.result["test_acc"]

A run has four parts: a method (fl.py, methods/), a compressor (compress.py, codes/), a network
(vision/models.py) and a split (vision/split.py). Each is a class or a function that declares its
settings, and the flags follow from them. A part of your own is FILE.py:NAME, or from Python the
class itself. Two methods are combined as scaffold+labelcal.

The folder of a run holds config.json (settings, versions, hardware), log.jsonl (a line a round),
checkpoint.pt, result.json, curve.png and synthetic.png. A run that was killed and resumed ends with
the same numbers as one that was not. The accuracy of a run is the mean over its last evaluations,
never that of its best round; "up" and "down" are bytes, of all clients since round 0. Exit codes:
0 done, 1 a run failed, 2 wrong input or a failure before the run, 130 interrupted.
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__":  # Ctrl-C during the slow imports: end, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fl
import sam
from plumbing.folder import (
    add_line,
    agree,
    described,
    first_rank,
    new_folder,
    one_version,
    read_result,
    restore,
    save,
    stored_runs,
    stored_settings,
    way_on,
    workplace,
    write,
    write_json,
)
from plumbing.settings import (
    PLACES,
    Parser,
    add_flag,
    check,
    find,
    name_of,
    settings_of,
    short,
    tenth,
    who_has,
)
from plumbing.terminal import card, complain, explained, listing, place_of, say, table
from scale import faults, visits
from scale.machine import MACHINE, device_of, visitor_of
from vision import data, models, plots, split, task

# ---------------------------------------------------------------------------------- the settings


class Run:
    """The settings of a run that belong to no other part."""

    algo: Annotated[str, "method"] = "fedsynsam"
    compress: Annotated[str, "compressor of the updates"] = "sign"
    model: Annotated[str, "network"] = "cnn"
    partition: Annotated[str, "how images are split, if the data do not say it"] = "shards"
    dataset: Annotated[str, "bundled, a name that torchvision knows, or a file .npz"] = "bundled"
    val: Annotated[int, "training images held out for tuning", 0, None] = 1000
    clients: Annotated[int, "number of clients N, if the data do not say it", 1, None] = 100
    rounds: Annotated[int, "rounds T", 1, 10**7] = 80
    seed: Annotated[int, "seed of the split, the first weights and training", 0, 10**9] = 0
    eval_every: Annotated[int, "rounds between evaluations", 1, None] = 2
    last: Annotated[int, "the result is a mean over so many last evaluations", 1, None] = 20
    measure_images: Annotated[int, "training images for loss and eigenvalue", 1, None] = 500


# ------------------------------------------------------------------------------------- the parts


def owners(given):
    """Everything that declares settings in a run with these parts."""
    chosen = [find(kind, given.get(kind, getattr(Run, kind))) for kind in PLACES]
    return [Run, *chosen, fl.Federation, faults.Tolerant, task.Images, *MACHINE]


def resolve(**given):
    """All settings of a run, checked, the defaults filled in: {name: value}.

    Raises ValueError for a setting that no part of the run has, or a value that is not legal.
    """
    settings = filled(**given)
    T = settings["rounds"]
    for name in ("warmup", "swa_start"):  # else the method would never begin
        if settings.get(name, 0) >= T:
            raise ValueError(f"{name} = {settings[name]} must be below the number of rounds, {T}")
    return settings


def quick(**given):
    """As `resolve`, but a tenth of the rounds, and less of all else that was not given."""
    return resolve(**given | tenth(filled(**given), given))


def filled(**given):
    """As `resolve`, but each setting is checked by itself, not with the others."""
    settings, owner = {}, {}
    for part in owners(given):
        for name, setting in settings_of(part).items():
            if name in settings:
                both = f"{name_of(owner[name])} and {name_of(part)}"
                raise ValueError(f"{both} both have a setting {name}; rename that of your own")
            owner[name], value = part, given.get(name, setting.default)
            settings[name] = value if name in PLACES else check(name, value, setting)
    for name in given:
        if name not in settings:
            raise ValueError(f"{name} is no setting of this run; {who_has(name, settings)}")
    return settings


def compose(settings):
    """From all settings to things: (Federation, Dataset).  Raises ValueError if they do not fit."""

    def of(part):
        return {name: settings[name] for name in settings_of(part)}

    method, compressor, network, splitter = (find(kind, settings[kind]) for kind in PLACES)
    seed, device = settings["seed"], device_of(settings["device"])
    images = data.load(settings["dataset"], settings["val"], device)
    shape, classes = images.train.x.shape[1:], len(images.train.classes)
    model = models.build(network, shape, classes, seed, device, **of(network))
    clients = images.clients or split.partition(
        splitter, images.train.y, settings["clients"], seed, **of(splitter)
    )
    images_task = task.Images(model, images.train, clients, **of(task.Images))
    compressor = compressor(**of(compressor))
    decoded = compressor.decode(compressor.encode(model.w0), len(model.w0))  # k may not fit
    if decoded.shape != model.w0.shape:
        raise ValueError(f"{compressor} decodes {[*decoded.shape]} and not [{len(model.w0)}]")
    visitor, how = visitor_of(settings, device)
    method = method(images_task, seed, **of(method))
    return visitor(method, compressor, **of(fl.Federation), **how), images


# ------------------------------------------------------------------------------------------ a run


class Outcome(NamedTuple):
    """What a run gives: the dict of result.json, the rows of log.jsonl, and what it ended with."""

    result: dict
    log: list
    federation: fl.Federation
    data: data.Dataset


def experiment(folder=None, *, watch=None, **settings):
    """One run, with or without a folder -> Outcome.

    A folder is made if it is not there. A run with the same settings that it holds is continued, or
    read if it is finished. watch(federation) is called after every round.
    Raises ValueError for wrong input, FloatingPointError if numbers stop being finite.
    """
    settings, folder = resolve(**settings), Path(folder) if folder else None
    federation, images = compose(settings)
    config = described(settings, images)
    sample = measured_images(images.train, settings["measure_images"])
    # place: the folder; a temporary one if there is none, or in other processes of a torchrun
    with workplace(folder) as place, explained(owners(settings), settings):
        agree(place / "config.json", config)
        log, seconds = restore(folder or place, federation, config["hash"])
        # log.jsonl may hold rounds after the checkpoint
        write(place / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        began = time.perf_counter() - seconds
        todo = range(federation.t, settings["rounds"])
        for _ in tqdm(todo, config["label"], disable=None if first_rank() else True):
            federation.round()
            log.append(row_of(federation, images, sample, settings))
            add_line(place / "log.jsonl", log[-1])
            if watch:
                watch(federation)
            if federation.t % settings["checkpoint_every"] == 0 or federation.t == todo.stop:
                save(place, federation, log, config["hash"], time.perf_counter() - began)
        if not (place / "result.json").exists():
            took = time.perf_counter() - began
            result = result_of(config, federation, log, sample) | {"seconds": took}
            if place == folder:
                draw(place, federation, log, config["label"], images)
            write_json(place / "result.json", result)
        result = read_result(place / "result.json", config)
        return Outcome(result, log, federation, images)


def row_of(federation, images, sample, settings):
    """What the log says of the round that has just ended: {name: value}."""
    t = federation.t
    row = {"round": t, "up": federation.bytes_up, "down": federation.bytes_down}
    if getattr(federation, "left_out", None):
        row["absent"] = federation.left_out
    if t % settings["eval_every"] == 0 or t == settings["rounds"]:
        apply, w, each = federation.task.apply, federation.judged(), federation.each
        for name, some in (("train", sample), ("val", images.val), ("test", images.test)):
            if len(some.y):
                loss, accuracy = task.evaluate(apply, w, some, each=each)
                row |= {f"{name}_loss": loss, f"{name}_acc": accuracy}
        if not math.isfinite(row["train_loss"]):
            where = f"after {t} rounds (|w_j| up to {federation.w.abs().max():.2g})"
            raise FloatingPointError(f"{where}: the training loss is {row['train_loss']}")
    return row


def measured_images(train, n):
    """n training images, the same for all seeds and methods."""
    chosen = torch.randperm(len(train.y), generator=fl.rng(0, "measure"))[:n].to(train.y.device)
    return train._replace(x=train.x[chosen], y=train.y[chosen])


MEANS = ("_loss", "_acc")  # what is averaged over the last evaluations


def result_of(config, federation, log, sample):
    """The dict of result.json, but for the seconds, of a run that has made all its rounds."""
    settings, d = config["settings"], len(federation.w)
    last = [row for row in log if "train_loss" in row][-settings["last"] :]
    absent = sum(len(row.get("absent", ())) for row in log)  # scale/faults.py
    visits_made = max(1, settings["rounds"] * settings["participation"] - absent)
    return {
        "algo": settings["algo"],
        "seed": settings["seed"],
        "settings": config["hash"],
        "d": d,
        **{k: statistics.fmean(row[k] for row in last) for k in last[0] if k.endswith(MEANS)},
        "averaged": [row["round"] for row in last],
        "eigenvalue": eigenvalue(federation, sample),
        "measured_on": len(sample.y),
        "matching_loss": federation.method.state.get("matching"),
        "up": federation.bytes_up,
        "down": federation.bytes_down,
        "bits": 8 * federation.bytes_up / (visits_made * d),
    }


def eigenvalue(federation, images):
    """The largest Hessian eigenvalue of the mean cross-entropy of images, at the judged model."""
    w, apply, n = federation.judged(), federation.task.apply, len(images.y)

    def share_of(x, y):
        return lambda v: cross_entropy(apply(v, x), y, reduction="sum") / n

    losses = [share_of(batch.x, batch.y) for batch in images.chunks(100)]
    return sam.largest_eigenvalue(sam.hessian(losses, w, each=federation.each), w)


# ------------------------------------------------------------------------------- the run's folder


def draw(place, federation, log, label, images):
    """curve.png, and synthetic.png if the method learnt images."""
    plots.curve(place / "curve.png", {label: [log]}, label)
    state = federation.method.state
    if state.get("X") is not None:
        plots.grid(place / "synthetic.png", state["X"], state["Y"], images.train)


def load(folder, **given):
    """A run as its folder has it: (Federation, Dataset)."""
    settings = resolve(**stored_settings(folder, **given))
    federation, images = compose(settings)
    restore(Path(folder), federation, described(settings, images)["hash"])
    return federation, images


# ---------------------------------------------------------------------------------- comparisons

SEVERAL = {"algo": "method", "compress": "compressor"}  # a command may name several of them


def pairs_of(given):
    """Every method of a command with every compressor: [{"algo": ..., "compress": ...}].

    What is not given is the default.
    """
    algos, compressors = (given.get(kind) or [getattr(Run, kind)] for kind in SEVERAL)
    return [{"algo": a, "compress": c} for a in algos for c in compressors]


def runs_of(given, seeds=1, settle=resolve):
    """The runs of a command: {name: settings}. Each run gets those flags that it has a use for.

    settle makes settings of flags: `resolve` or `quick`.
    `--algo fedavg fedsam --rho 0.05` is fine, although FedAvg has no rho.
    """
    runs, several_compressors = {}, len(given.get("compress", ())) > 1
    for pair in pairs_of(given):
        known = {name for part in owners(given | pair) for name in settings_of(part)}
        mine = {name: value for name, value in (given | pair).items() if name in known}
        arm = short(pair["algo"]) + (f"-{short(pair['compress'])}" if several_compressors else "")
        first = mine.get("seed", Run.seed)
        for seed in range(first, first + seeds):
            label = f"{arm}-s{seed}"
            if label in runs:
                raise ValueError(f"two runs would be called {label}; each needs a name of its own")
            runs[label] = settle(**mine | {"seed": seed})
    return runs


def compare(folder, runs):
    """Make the runs {name: settings} in folders of their own, then table.md and curve.png.

    A run that fails does not stop the others, and leaves an older table as it was; but under
    torchrun only a run that diverges, which all processes see, lets them go on. Returns the exit
    code: 1 if one failed.
    """
    results, logs, failed = {}, {}, 0  # {arm: [one for each seed]}
    versions = {}  # of the files and data that the runs have used
    several_compressors = len({settings["compress"] for settings in runs.values()}) > 1
    for name, settings in runs.items():
        arm = settings["algo"] + (f", {settings['compress']}" if several_compressors else "")
        try:
            outcome = experiment(folder and folder / name, **settings)
            if first_rank():
                one_version(folder / name, versions)
            results.setdefault(arm, []).append(outcome.result)
            logs.setdefault(arm, []).append(outcome.log)
        except Exception as error:
            if "WORLD_SIZE" in os.environ and not isinstance(error, FloatingPointError):
                raise  # other ranks may not see it, and would wait
            said = isinstance(error, (ValueError, ArithmeticError, OSError))  # in words
            what = error if said else f"{type(error).__name__}: {error}"
            complain(f"{name}: {what}{place_of(error)}")
            failed = 1
    if results and first_rank():
        if not failed or not (folder / "table.md").exists():
            write(folder / "table.md", table(results) + "\n")
            plots.curve(folder / "curve.png", logs, folder.name)
        say(f"{table(results)}\nfolder {folder}")
    return failed


# ----------------------------------------------------------------------------------- command line


def parser(given):
    """The flags of the parts that are given; a flag that is not used stays absent."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, word in SEVERAL.items():
        p.add_argument(
            "--" + kind,
            nargs="+",
            action="extend",
            metavar=word.upper(),
            help=f"one or more {word}s",
        )
    p.add_argument("--seeds", type=int, metavar="n", help="runs per method: seed, seed + 1, ...")
    p.add_argument("--name", help="name of the folder")
    p.add_argument("--out", type=Path, metavar="DIR", help="where folders are made (default runs)")
    p.add_argument("--resume", type=Path, metavar="DIR", help="continue this run or comparison")
    p.add_argument("--list", action="store_true", help="print all parts")
    p.add_argument("--quick", action="store_true", help="a small version: a tenth of the rounds")
    done = set(SEVERAL)
    for pair in pairs_of(given):
        for part in owners(given | pair):
            group = p.add_argument_group(name_of(part))
            for name, setting in settings_of(part).items():
                if name not in done:
                    add_flag(group, name, setting)
                done.add(name)
    return p


def read_command(argv):
    """The command line as {name: value}, in two steps: which parts, and then their flags."""
    first = Parser(add_help=False)
    for kind in SEVERAL:
        first.add_argument("--" + kind, nargs="+", action="extend")
    for kind in ("model", "partition"):
        first.add_argument("--" + kind)
    which, _ = first.parse_known_args(argv)
    return vars(parser(vars(which)).parse_args(argv))


def job_of(given):
    """What a command asks for: (folder, {name: settings} of its runs, is it a comparison?)."""
    if "resume" in given:
        return resumed(given.pop("resume"), given)
    root, name = given.pop("out", Path("runs")), given.pop("name", None)
    small, seeds, folder = given.pop("quick", False), given.pop("seeds", 1), None
    if not 1 <= seeds <= 1000:
        raise ValueError(f"seeds = {seeds} is out of range; it must be in 1..1000")
    runs = runs_of(given, seeds, quick if small else resolve)
    several = len(runs) > 1
    for settings in [*runs.values()][::seeds]:
        compose(settings)  # one seed of each, so that wrong input is found before a folder is made
    if first_rank():
        folder = new_folder(root, name, "comparison" if several else next(iter(runs)))
        if several:
            write_json(folder / "comparison.json", runs)
    return folder, runs, several


def resumed(folder, given):
    """What is in a folder: as `job_of`. Only settings of the machine may be new."""
    named = {kind: given.pop(kind, []) for kind in SEVERAL}
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}")
    for name in {"seeds", "name", "out", "quick"} & set(given):
        raise ValueError(f"--{name} is for new runs; those in {folder} continue as they were begun")
    if (folder / "comparison.json").exists():
        return folder, stored_runs(folder, named, given), True
    for kind, words in named.items():
        if len(words) > 1:
            raise ValueError(f"{folder} holds one run, of one {SEVERAL[kind]}")
        if words:
            given[kind] = words[0]
    return folder, {folder.name: stored_settings(folder, **given)}, False


def main(argv=None):
    """The command: exit code 0, 1, 2 or 130."""
    folder, begun = None, False
    try:
        given = read_command(argv)
        if "list" in given:
            say(listing())
            return 0
        folder, runs, several = job_of(given)
        begun = True
        if several:
            return compare(folder, runs)
        (settings,) = runs.values()
        outcome = experiment(folder, **settings)
        if first_rank():
            say(card(outcome.result, settings, folder))
        return 0
    except (ValueError, IsADirectoryError) as error:  # a folder where a file belongs
        complain(f"{error}{place_of(error)}")
        return 2
    except FloatingPointError as error:  # no hint to resume: it would happen again
        complain(error)
        return 1
    except (OSError, MemoryError, torch.OutOfMemoryError, visits.Lost) as error:
        complain(f"{error}; {way_on(folder)}")
        return 1 if begun or isinstance(error, visits.Lost) else 2
    except KeyboardInterrupt:
        complain(f"interrupted; {way_on(folder)}")
        return 130
    finally:
        visits.leave()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it was closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.exit(main())
