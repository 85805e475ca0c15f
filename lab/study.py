"""A study is arms x seeds: every run in a folder of its own, a table of all of them in the end.

An arm is what is compared: a label and the settings it stands for. A size (quick, cpu, gpu) has one
or more tasks (data, network, rounds), and every arm runs on every task with the same seeds.

A run's folder is named by a digest of its settings, of the data and of the code, and nothing else:

    runs/lab/fedsam-s0-1f6c02d7-9b33a1c5

So what is finished is not run again, a study may be killed and started again, and two claims that
need the same run share it. After a change of the code or the data everything runs again, but not
after a change of comments, docstrings or of lab/: whoever changes what measures.Watch measures must
delete runs/lab. Two commands on one machine share the work: a run
is locked, and who finds it locked goes on with the next one and comes back.

Rows of runs are what results/NAME.json stores; `frame` makes a pandas table of them. Rows of older
versions say "cell" and "world" for arm and task, and hold settings that do not exist any more.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

import run
from lab import measures
from plumbing.folder import read_json
from plumbing.settings import HERE, changes_seconds
from vision import data

SIZES = ("quick", "cpu", "gpu")  # does it work, in seconds; half an hour on two cores; all of it
CODE = ("*.py", "vision/*.py", "methods/*.py", "codes/*.py", "scale/*.py")

# ---------------------------------------------------------------------------------------- the tasks

# The default job of older versions: clients differ less, and every method learns well.
MILD = {"partition": "dirichlet", "rounds": 60, "last": 5, "lr": 0.2}
MILD |= {"compress": "qsgd", "levels": 1, "local_steps": 20, "measure_images": 2000}
MILD |= {"mix": 0.5, "warmup_method": "fedsam"}
QUICK = MILD | {
    "clients": 8,
    "participation": 2,
    "rounds": 4,
    "local_steps": 2,
    "batch": 4,
    "alpha": 0.5,
}
QUICK |= {"model": "mlp", "hidden": 8, "warmup": 2, "window": 2, "outer_steps": 3, "ipc": 1}
QUICK |= {"inner_steps": 2, "fs_steps": 3, "measure_images": 40, "oracle_images": 20}
QUICK |= {"eval_every": 1, "last": 1, "swa_start": 2}
GPU = MILD | {"rounds": 300, "local_epochs": 1, "batch": 50, "lr": 0.1, "warmup": 25, "ipc": 15}
GPU |= {"outer_steps": 3000, "inner_steps": 20, "eval_every": 5}
TASKS = {  # size: {task: settings that all arms share, where their parts have them}
    "quick": {"": QUICK},
    "cpu": {"": MILD},
    "gpu": {
        "Fashion-MNIST, cnn": GPU | {"dataset": "fashionmnist", "width": 32, "hidden": 512},
        "CIFAR-10, convnet": GPU | {"dataset": "cifar10", "model": "convnet"},
        "CIFAR-100, resnet18": GPU
        | {
            "dataset": "cifar100",
            "model": "resnet18",
            "augment": True,
            "ipc": 1,
            "inner_steps": 10,
        },
    },
}

# --------------------------------------------------------------------------------------- the digest


@functools.cache
def code_digest():
    """Of what the code does: comments and docstrings are left out."""
    paths = [path for pattern in CODE for path in sorted(HERE.glob(pattern))]
    trees = [bare(path.read_text()) for path in paths if not path.name.startswith("test")]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:8]


def bare(source):
    """Python source as its syntax tree, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def images_of(dataset, val):
    """The data set, read once."""
    return data.load(dataset, val, "cpu")


def name_of(settings, watch):
    """The folder name of a run; settings: all of them, as run.resolve gives them."""
    config = run.described(settings, images_of(settings["dataset"], settings["val"]))
    told = json.dumps([config["hash"], code_digest(), watch])
    return f"{config['label']}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


# ----------------------------------------------------------------------------------------- the runs


def fitting(shared, own):
    """The settings of an arm: those of its task that its parts have, and its own."""
    parts = run.owners(shared | own)
    known = {name for part in parts for name in names_of(part)}
    return {name: value for name, value in shared.items() if name in known} | own


@functools.cache
def names_of(part):
    """The names of the settings of a part."""
    return frozenset(run.settings_of(part))


def train(root, settings, watch=None):
    """The run with these settings, in a folder in root: (folder, result, log).

    watch: {"every": rounds, "names": [...]} of measures.Watch. Raises FloatingPointError if the run
    diverges, also if it did so before, and Busy if another process works in the folder.
    """
    resolved = run.resolve(**settings)
    folder = Path(root) / name_of(resolved, watch)
    with locked(folder, wait=False):
        lost = folder / "diverged"
        if lost.exists():
            raise FloatingPointError(lost.read_text())
        try:
            images, n = images_of(resolved["dataset"], resolved["val"]), resolved["measure_images"]
            watcher = watch and measures.Watch(folder, images, n, **watch)
            outcome = run.experiment(folder, watch=watcher, **resolved)
        except FloatingPointError as error:
            run.write(lost, str(error))
            raise
    return folder, outcome.result, outcome.log


class Busy(Exception):
    """Another process is at work in this folder."""


@contextlib.contextmanager
def locked(path, wait=True):
    """No other process works at this path: wait until that is so, or raise Busy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise Busy(f"{path} is in use by another process") from None
        yield


def shared(jobs, wait=2.0):
    """Call all jobs, those that another process is busy with later: their results, in order.

    wait: seconds between two looks at those, None: raise Busy when no other job is left.
    """
    results, left = {}, dict(enumerate(jobs))
    while left:
        before = len(left)
        for n, job in list(left.items()):
            with contextlib.suppress(Busy):
                results[n] = job()
                del left[n]
        if len(left) == before and wait is None:
            raise Busy("another process is at work")
        if len(left) == before:
            time.sleep(wait)
    return [results[n] for n in sorted(results)]


def jobs(claim):
    """All runs of a claim, seed by seed: a list of (task, arm, settings)."""
    found = []
    for k in range(claim.seeds):
        for task, common in claim.tasks().items():
            for arm, own in claim.arms(task).items():
                if k < claim.seeds_of(arm) and claim.only.match(arm):
                    seed = claim.first_seed + k
                    found.append((task, arm, fitting(common, own) | {"seed": seed}))
    return found


def conduct(claim, root, **machine):
    """Do what is not done yet of a claim: the rows of all its runs."""
    planned = jobs(claim)
    if not planned:
        raise ValueError(f"no arm of {claim.name} has a label that matches {claim.only.pattern!r}")
    return shared(
        functools.partial(row_of, claim, root, task, arm, settings | machine)
        for task, arm, settings in planned
    )


def row_of(claim, root, task, arm, settings):
    """One run of a claim, with what is measured of it: a row of results/NAME.json."""
    fields = {name: x for name, x in settings.items() if not changes_seconds(name)}
    row = {"task": task, "arm": arm, "seed": settings["seed"], "fields": fields}
    try:
        folder, result, log = train(root, settings, claim.watch(task))
    except FloatingPointError as error:
        return row | {"diverged": str(error)}
    with locked(folder, wait=False):
        code = {name: settings[name] for name in ("algo", "compress") if name in settings}
        found = measures.measure(folder, claim.measures(settings["seed"]), **code)
    seen = measures.watched(folder)
    log = [line | seen.get(line["round"], {}) for line in log]
    log = [line for line in log if "test_acc" in line or line["round"] in seen]
    said = " ".join(filter(None, (f"{claim.name}:", task, arm, f"seed {row['seed']}: {folder}")))
    print(said, file=sys.stderr)
    machine = read_json(folder / "config.json")["machine"]
    return row | result | found | {"log": log, "machine": machine}


# ---------------------------------------------------------------------------------------- the table


def frame(rows, defaults):
    """The table of all runs: task, arm, seed, the numbers of a row, and those derived from them.

    defaults: the settings that the rows do not name. Diverged runs have nan everywhere.
    """
    table = pd.DataFrame([plain(row) for row in rows])
    for name in ("test_acc", "val_acc", "train_acc"):
        if name in table:
            table[name.replace("acc", "accuracy")] = 100 * table[name]
    table["accuracy"] = table.get("test_accuracy", np.nan)
    for name in ("up", "down"):
        table["mb_" + name] = table.get(name, np.nan) / 1e6
    table["mean_model"] = [mean_model(row) for row in rows]
    table["message"] = [message_bytes(row, defaults) for row in rows]
    for name in COSINES:
        table["cos_" + name] = [cosine(row, name) for row in rows]
    return table


def plain(row):
    """A row with the names of today: {name: value}."""
    told = {"task": row.get("task", row.get("world")), "arm": row.get("arm", row.get("cell"))}
    kept = {k: v for k, v in row.items() if k not in ("world", "cell", "machine")}
    return kept | told | {"diverged": row.get("diverged")}


def message_bytes(row, defaults):
    """Bytes of one client's upload in one round."""
    settings = defaults | row["fields"]
    return row.get("up", np.nan) / (settings["participation"] * settings["rounds"])


COSINES = ("own", "used", "last_move", "last_uncompressed", "synthetic", "mixed")


def cosine(row, name):
    """The mean of a cosine over the rounds measured (after the synthesis, if any), or nan."""
    seen = [line["alignment"] for line in row.get("log", ()) if "alignment" in line]
    found = [a.get(name) for a in [a for a in seen if a["synthetic"] is not None] or seen]
    return float(np.mean(found)) if found and None not in found else np.nan


def mean_model(row):
    """Test accuracy % of the mean of the last global models (measures.Watch), or nan."""
    seen = [line["mean_model"] for line in row.get("log", ()) if "mean_model" in line]
    return 100 * seen[-1]["test_acc"] if seen else np.nan


def at_equal_bytes(table, last=5):
    """Accuracy % when a run has sent up as much as the thriftiest one does in all -> a Series.

    The mean over its last evaluations until then, as the accuracy of a run is at its end.
    """
    budget, found = table.up.min(), []
    for log in table.get("log", ()):
        rows = log if isinstance(log, list) else []
        seen = [100 * x["test_acc"] for x in rows if x["up"] <= budget and "test_acc" in x]
        found.append(np.mean(seen[-last:]) if seen else np.nan)
    return pd.Series(found, index=table.index)


def excess(table, baseline):
    """The largest eigenvalue minus that of the baseline arm where their training losses are equal.

    baseline: arm -> arm. Of two runs, the one with the lower loss is read where it first came as
    low as the other one ever did, interpolated between the rounds in which it was measured.
    -> a Series, nan where that was between no two rounds.
    """
    logs = {(r.arm, r.seed): r.log for r in table.itertuples() if isinstance(r.log, list)}
    pairs = zip(table.arm, table.seed)
    return pd.Series(
        [excess_of(logs.get((arm, s)), logs.get((baseline(arm), s))) for arm, s in pairs],
        index=table.index,
    )


def excess_of(log, plain_log):
    if log is None or plain_log is None:
        return np.nan
    if log is plain_log:
        return 0.0
    both = {"eigenvalue", "train_loss"}
    logs = [[x for x in rows if both <= set(x)] for rows in (log, plain_log)]
    level = max(min(x["train_loss"] for x in rows) for rows in logs)
    return eigenvalue_at(logs[0], level) - eigenvalue_at(logs[1], level)


def eigenvalue_at(rows, level):
    """The eigenvalue where the training loss first falls to a level, interpolated, or nan."""
    for a, b in zip(rows, rows[1:]):
        if a["train_loss"] > level >= b["train_loss"]:
            part = (a["train_loss"] - level) / (a["train_loss"] - b["train_loss"])
            return a["eigenvalue"] + part * (b["eigenvalue"] - a["eigenvalue"])
    return np.nan


# -------------------------------------------------------------------------------------- stored rows


def store(path, size, part):
    """Put a size into results/NAME.json, in place of what was there: a row a line."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[size] = part
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = ",\n".join(f"{json.dumps(size)}: {lines(stored[size])}" for size in stored)
    run.write(path, "{" + sizes + "}\n")


def lines(part):
    """The JSON of a size, such that a person and `diff` can read it."""

    def text(value):
        if isinstance(value, list):
            return "[\n" + ",\n".join(map(json.dumps, value)) + "]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"{json.dumps(k)}: {text(v)}" for k, v in part.items()) + "}"


def stored(path):
    """The largest size in results/NAME.json: (size, its part); ValueError without the file."""
    if not path.exists():
        raise ValueError(f"there is no {path}; run python -m lab.claims {path.stem}")
    sizes = json.loads(path.read_text())
    size = max(sizes, key=SIZES.index)
    return size, sizes[size]
