"""An experiment is many runs: cells x seeds, each run resumable, one table with differences over seeds, one file of results.

A CLAIM of a paper becomes an experiment by answering five questions (class `Claim`; claims.py answers them for eight claims):

    cells     which settings are run?                    {label: what differs from the base settings}
    measure   what is measured in a run that is done?    (besides what every run measures: accuracy, losses, bytes, eigenvalue, cosines)
    columns   what does the table show?
    verdict   does the claim hold, by numbers?
    draw      the figure

`conduct` runs the cells that are not done yet, each with the same seeds (the same split, weights, clients and batches for every
cell of a seed), and may be killed and called again; two calls at once share the work. Differences between cells are PAIRED: taken
seed by seed, then averaged, which removes what the seeds have in common. With three seeds their standard error is itself
uncertain, so a verdict asks for a mean difference of two standard errors AND the same sign in every seed (`differs`).

`report` rewrites the README's tables between <!-- NAME --> marks from the files of results and from nothing else.

Source: ours. Read next: claims.py.
"""
import dataclasses
import json
import math
import pathlib
import re
import shlex
import statistics

import experiment
import loop
from config import Config

SIZES = ("quick", "cpu", "gpu")
QUICK = {"clients": 8, "participation": 3, "rounds": 4, "local_steps": 2, "batch": 4, "width": 2, "hidden": 8, "warmup": 2, "window": 2, "outer_steps": 3,
         "inner_steps": 2, "ipc": 1, "measure_images": 40, "last": 1, "alpha": 0.5}
GPU = {"dataset": "fashionmnist", "rounds": 300, "local_epochs": 1, "batch": 50, "lr": 0.1, "width": 32, "hidden": 512, "warmup": 25, "ipc": 15,
       "outer_steps": 3000, "inner_steps": 20, "eval_every": 5}


class Claim:
    """A claim as an experiment; a subclass gives its answers. name: of the command, says: the claim, refuted: what would refute it.

    Source: each names its own.
    """
    name = says = refuted = source = ""
    seeds = {"quick": 1, "cpu": 3, "gpu": 3}

    def cells(self, size):
        """The settings to run at this size -> {label: fields of Config that differ from `base(size)`}."""
        raise NotImplementedError

    def measure(self, fed, rows):
        """What is measured besides, in a run that is done: its Federation with w [d], numbers [n] of the measured images -> dict for JSON."""
        return {}

    def columns(self):
        """What the table shows -> list of (heading, function of a row, format)."""
        return [("test accuracy %", lambda r: 100 * r["test_acc"], ".2f"), ("training loss", lambda r: r["train_loss"], ".3f"),
                ("top eigenvalue", lambda r: r["eigenvalue"], ".1f")]

    def verdict(self, cells):
        """What the numbers say about the claim, cells: {label: rows over seeds} -> one or two sentences."""
        raise NotImplementedError

    def draw(self, cells, path):
        """The figure, cells: {label: rows over seeds} -> a file at `path`."""
        raise NotImplementedError


def base(size, **fields):
    """The settings that all cells of a size start from -> dict of fields of Config."""
    return {**{"quick": QUICK, "cpu": {}, "gpu": GPU}[size], **fields}


# ------------------------------------------------------------------------------------------------------------ running
def runs_of(claim, size):
    """All runs of an experiment, seed by seed, so that a stopped one has whole seeds -> list of (label, Config, checked)."""
    cells = claim.cells(size)
    return [(label, Config(seed=seed, **base(size, **fields)).check()) for seed in range(claim.seeds[size]) for label, fields in cells.items()]


def one(folder, cfg, label, claim):
    """Do one run of an experiment, or what is left of it -> its row: label, seed, settings, result, log, and the claim's own measures.

    A run that diverges gives a row that says so. Raises UserError if the folder holds a run of other settings.
    """
    done = folder / "row.json"
    if not folder.exists():
        experiment.new_folder(folder.parent, folder.name, "", "config.json", experiment.described(cfg))
    stored = experiment.read_settings(folder)[1][0]
    if stored.hash() != cfg.hash():
        raise experiment.UserError(f"{folder} is a run of other settings ({stored.hash()}, not {cfg.hash()}); move it away, or choose another --out")
    if done.exists():
        return json.loads(done.read_text())
    row = {"cell": label, "seed": cfg.seed, "settings": dataclasses.asdict(cfg)}
    try:
        row |= experiment.execute(folder, stored, f"{label} seed {cfg.seed}")
        _, fed = experiment.compose(stored)
        experiment.restore(folder, fed)
        row |= claim.measure(fed, experiment.measured_rows(fed)) | {"log": experiment.read_log(folder)}
    except (loop.Diverged, FloatingPointError) as error:
        row["diverged"] = str(error)
    experiment.write(done, json.dumps(row) + "\n")
    return row


def conduct(claim, size, root):
    """Run what is not done yet of an experiment, in root/NAME-SIZE -> ({label: rows over seeds}, number of runs that others still work on)."""
    cells, busy = {}, 0
    for label, cfg in runs_of(claim, size):
        try:
            row = one(root / f"{claim.name}-{size}" / f"{slug(label)}-s{cfg.seed}", cfg, label, claim)
            cells.setdefault(label, []).append(row)
        except experiment.Busy:                                   # the same command, started twice, shares the runs
            busy += 1
    return cells, busy


def slug(label):
    """A label as a folder's name."""
    return re.sub(r"[^\w.=+-]+", "_", label)


# --------------------------------------------------------------------------------------------------------- statistics
def values(rows, f):
    """f of every row that did not diverge, without None and nan -> list of floats."""
    out = [f(r) for r in rows if "diverged" not in r]
    return [float(v) for v in out if v is not None and not math.isnan(v)]


def spread(numbers, form=".2f"):
    """ "mean ± standard deviation", or the number if it is one, or "-"."""
    if not numbers:
        return "-"
    return format(statistics.fmean(numbers), form) + (f" ± {format(statistics.stdev(numbers), form)}" if len(numbers) > 1 else "")


def paired(first, second, f):
    """f(first) - f(second), seed by seed, over the seeds that both have -> list of floats."""
    other = {r["seed"]: r for r in second}
    both = [(r, other[r["seed"]]) for r in first if r["seed"] in other and "diverged" not in r and "diverged" not in other[r["seed"]]]
    return [float(f(a)) - float(f(b)) for a, b in both if f(a) is not None and f(b) is not None]


def differs(differences):
    """+1 or -1 if paired differences have all that sign and a mean of two standard errors or more, 0 if not, None if too few (below 2)."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    sign = 1 if mean > 0 else -1
    return sign if all(sign * d > 0 for d in differences) and abs(mean) >= 2 * error else 0


def said(differences, form="+.2f", more="higher", less="lower"):
    """A paired difference in words: "-0.12 ± 0.03 (lower)"; ± is the standard deviation over seeds."""
    words = {1: more, -1: less, 0: "not told apart", None: "one seed only"}[differs(differences)]
    return f"{spread(differences, form).replace('± +', '± ')} ({words})"


def table(claim, cells):
    """The experiment's table, mean ± standard deviation over seeds -> Markdown text."""
    columns = claim.columns()
    lines = ["| | " + " | ".join(heading for heading, *_ in columns) + " | runs |", "| --- " * (len(columns) + 2) + "|"]
    for label, rows in cells.items():
        lost = sum("diverged" in r for r in rows)
        lines.append(f"| {label} | " + " | ".join(spread(values(rows, f), form) for _, f, form in columns) +
                     f" | {len(rows)}{f', {lost} diverged' if lost else ''} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ results
def keep(claim, size, cells, folder, command):
    """Write folder/NAME.json (everything, by size) and NAME.png -> the text for the screen. `quick` leaves what other sizes measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim.name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    text, verdict = table(claim, cells), claim.verdict(cells)
    stored[size] = {"claim": claim.says, "source": claim.source, "refuted_by": claim.refuted, "command": command, "machine": experiment.machine(),
                    "table": text, "verdict": verdict, "rows": [r for rows in cells.values() for r in rows]}
    experiment.write(path, json.dumps(stored) + "\n")
    if size == max(stored, key=SIZES.index):                      # the figure is that of the largest size there is
        claim.draw(cells, folder / f"{claim.name}.png")
    return f"{text}\n\n{verdict}\n\nresults {path}"


def report(readme, folder):
    """Rewrite the README between <!-- NAME --> and <!-- /NAME --> from folder/NAME.json -> names rewritten; UserError if a mark has no results."""
    text, names = readme.read_text(), []
    for name in re.findall(r"<!-- (\w+) -->", text):
        path = folder / f"{name}.json"
        if not path.exists():
            raise experiment.UserError(f"{readme.name} has a place for {name}, but there is no {path}; run python run.py --experiment {name}")
        stored = json.loads(path.read_text())
        size = max(stored, key=SIZES.index)
        part = stored[size]
        words = (f"*{part['claim']}* ({part['source']}). `{part['command']}`:\n\n{part['table']}\n\n**{part['verdict']}**\n\n"
                 f"![{name}]({folder.name}/{name}.png)\n")
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + words + m[2], text, flags=re.S)
        names.append(name)
    experiment.write(pathlib.Path(readme), text)
    return names


def command_of(name, size):
    """The command that makes an experiment."""
    return shlex.join(["python", "run.py", "--experiment", name, "--size", size])
