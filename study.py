"""An experiment is many runs: cells x seeds, each run resumable, one table with differences over seeds, one file of results.

A CLAIM of a paper becomes an experiment by answering five questions (class `Claim`; claims.py and relatives.py answer them):

    cells     which settings are run?                    {label: what differs from the world's settings}
    measure   what is measured in a run that is done?    (besides what every run measures: accuracy, losses, bytes, eigenvalue, cosines)
    columns   what does the table show?
    verdict   does the claim hold, by a rule that was written before the numbers were seen?
    draw      the figure

A size is one or more WORLDS (data, network, rounds). `conduct` runs the cells that are not done yet, each with the same seeds (the same
split, weights, clients and batches for every cell of a seed), and may be killed and called again; two calls at once share the work, and
experiments share the runs whose settings are the same.

Differences between cells are PAIRED: taken seed by seed, then averaged, which removes what the seeds have in common. With three
seeds their standard error is itself uncertain, so a difference counts only if its mean is two standard errors or more AND every
seed has the same sign (`differs`). Three seeds agree by chance in one case of four, so of many comparisons some will count that are
nothing: read the numbers, not only the words.

`report` rewrites the README between <!-- NAME --> and <!-- /NAME --> from the files of results and from nothing else.

Source: ours. Read next: tune.py.
"""
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import sys
import time

import experiment
import loop
from config import Config

SIZES = ("quick", "cpu", "gpu")                                   # a smoke test; about half an hour on two cores; the full form
QUICK = {"clients": 8, "participation": 2, "rounds": 4, "local_steps": 2, "batch": 4, "model": "mlp", "hidden": 8, "warmup": 2, "window": 2,
         "outer_steps": 3, "inner_steps": 2, "ipc": 1, "measure_images": 40, "oracle_images": 20, "last": 1, "alpha": 0.5}
GPU = {"rounds": 300, "local_epochs": 1, "batch": 50, "lr": 0.1, "width": 32, "hidden": 512, "warmup": 25, "ipc": 15, "outer_steps": 3000,
       "inner_steps": 20, "eval_every": 5}
WORLDS = {"quick": {"": QUICK}, "cpu": {"": {}},
          "gpu": {"Fashion-MNIST, cnn": {**GPU, "dataset": "fashionmnist"}, "CIFAR-10, convnet": {**GPU, "dataset": "cifar10", "model": "convnet"},
                  "CIFAR-100, resnet18": {**GPU, "dataset": "cifar100", "model": "resnet18", "augment": True, "ipc": 1, "inner_steps": 10}}}


class Claim:
    """A claim as an experiment of one size; a subclass gives its answers. results: the folder in which tuned.json may lie.

    name: of the command; says: the claim; refuted: what would refute it, written beforehand; source: whose claim.
    """
    name = says = refuted = source = ""
    seeds = {"quick": 1, "cpu": 3, "gpu": 3}

    def __init__(self, size="cpu", results=experiment.HERE / "results"):
        self.size, self.results = size, results

    def cells(self, world):
        """The settings to run in a world of this size -> {label: fields of Config that differ from the world's}."""
        raise NotImplementedError

    def measure(self, fed, rows):
        """What is measured besides, in a run that is done: its Federation with w [d], numbers [n] of the measured images -> dict for JSON."""
        return {}

    def derive(self, cells):
        """Numbers of a row that need the other rows, put into it; cells: {label: rows over seeds}, as below."""

    def columns(self):
        """What the table shows -> list of (heading, function of a row, format)."""
        return [("test accuracy %", accuracy, ".2f"), ("training loss", lambda r: r["train_loss"], ".3f"), ("top eigenvalue", eigenvalue, ".1f")]

    def verdict(self, cells):
        """What the numbers say about the claim -> text that begins with the word of `judge`."""
        raise NotImplementedError

    def draw(self, cells, path):
        """The figure, in a file at `path`."""
        raise NotImplementedError

    def worlds(self):
        """The worlds of this size -> {name: fields of Config}."""
        return WORLDS[self.size]

    def runs(self, **machine):
        """All runs, seed by seed, so that a stopped experiment has whole seeds -> list of (world, label, Config, checked)."""
        return [(world, label, Config(**{**start, **fields, **machine, "seed": seed}).check())
                for seed in range(self.seeds[self.size]) for world, start in self.worlds().items() for label, fields in self.cells(world).items()]


def accuracy(row):
    """Test accuracy in %: mean over the last evaluations."""
    return 100 * row["test_acc"]


def eigenvalue(row):
    """Top eigenvalue of the Hessian of the training loss, at the end."""
    return row["eigenvalue"]


# ------------------------------------------------------------------------------------------------------------ running
def trained(folder, cfg, label):
    """Do the run of `folder`, or what is left of it -> (its result, Federation at its end); made if it is not there.

    Raises UserError if the folder holds a run of other settings, and what experiment.execute raises.
    """
    if not folder.exists():
        try:
            experiment.new_folder(folder.parent, folder.name, "", "config.json", experiment.described(cfg))
        except experiment.UserError:
            if not folder.exists():                               # else the same command, started twice, was faster
                raise
    stored = experiment.read_settings(folder)[1][0]
    if stored.hash() != cfg.hash():
        raise experiment.UserError(f"{folder} is a run of other settings ({stored.hash()}, not {cfg.hash()}); move it away, or choose another --out")
    made = experiment.compose(cfg)
    result = experiment.execute(folder, cfg, label, made, figures=False)
    if made[1].t < cfg.rounds:                                    # it was done before
        experiment.restore(folder, made[1])
    return result, made[1]


def alone_in(folder, work):
    """work() while no other process is in `folder`; raises experiment.Busy if one is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        experiment.alone(lock, folder)
        return work()


def one(folder, cfg, world, label, claim):
    """One run of an experiment -> its row: world, cell, seed, settings, result, log, and the claim's own measures; kept in NAME.json.

    A run that diverges gives a row that says so.
    """
    name = f"{world} {label} seed {cfg.seed}".strip()

    def work():
        done = folder / f"{claim.name}.json"
        row = json.loads(done.read_text()) if done.exists() else {}
        if row.get("hash") == cfg.hash():
            return row | {"world": world, "cell": label}              # two cells may be one run, or one was renamed
        row = {"world": world, "cell": label, "seed": cfg.seed, "hash": cfg.hash(), "fields": differing(cfg)}
        try:
            result, fed = trained(folder, cfg, name)
            row |= result | claim.measure(fed, experiment.measured_rows(fed))
            row["log"] = [{k: v for k, v in x.items() if k not in ("lr", "move")} for x in experiment.read_log(folder) if "test_acc" in x]
        except (loop.Diverged, FloatingPointError) as error:
            row["diverged"] = str(error)
        row["machine"] = json.loads((folder / "config.json").read_text())["machine"]
        experiment.write(done, json.dumps(row) + "\n")
        print(f"{claim.name}: {name}, {folder}: " + (row.get("diverged") or f"{row['seconds']:.0f} s"), file=sys.stderr, flush=True)
        return row
    return alone_in(folder, work)


def differing(cfg):
    """The settings that are not Config's defaults -> dict; the machine's are left out."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default and f.name not in ("device", "threads", "chunk")}


def shared(jobs, wait=2.0):
    """Call all jobs, those that another process is busy with later, when it has done them or died -> their results, in order."""
    results, left = {}, dict(enumerate(jobs))
    while left:
        before = len(left)
        for n, job in list(left.items()):
            try:
                results[n] = job()
                del left[n]
            except experiment.Busy:
                pass
        if left and len(left) == before:
            time.sleep(wait)
    return [results[n] for n in sorted(results)]


def conduct(claim, root, **machine):
    """Run what is not done yet of an experiment, in root/SIZE/METHOD-sSEED-HASH -> {world: {label: rows over seeds}}.

    The folder's name depends on the settings only: runs that several experiments ask for are done once.
    """
    worlds = {}
    jobs = [functools.partial(one, root / claim.size / f"{cfg.algo}-s{cfg.seed}-{cfg.hash()}", cfg, world, label, claim)
            for world, label, cfg in claim.runs(**machine)]
    for row in shared(jobs):
        worlds.setdefault(row["world"], {}).setdefault(row["cell"], []).append(row)
    for cells in worlds.values():
        claim.derive(cells)
    return worlds


def slug(label):
    """A label as a folder's name."""
    return re.sub(r"[^\w.=+-]+", "_", label.strip()).strip("_")


# --------------------------------------------------------------------------------------------------------- statistics
def values(rows, f):
    """f of every row that did not diverge, without None and nan -> list of floats."""
    out = [f(r) for r in rows if "diverged" not in r]
    return [float(v) for v in out if v is not None and not math.isnan(v)]


def spread(numbers, form=".2f"):
    """ "mean ± standard deviation", or the number if it is one, or "-"."""
    if not numbers:
        return "-"
    return format(statistics.fmean(numbers), form) + (f" ± {format(statistics.stdev(numbers), form.strip('+'))}" if len(numbers) > 1 else "")


def paired(first, second, f):
    """f(first) - f(second), seed by seed, over the seeds in which both have a number -> list of floats."""
    other = {r["seed"]: values([r], f) for r in second}
    return [a - b for r in first for a in values([r], f) for b in other.get(r["seed"], [])]


def differs(differences):
    """+1 or -1 if paired differences have all that sign and a mean of two standard errors or more, 0 if not, None if below two of them."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    sign = 1 if mean > 0 else -1
    return sign if all(sign * d > 0 for d in differences) and abs(mean) >= 2 * error else 0


def said(differences, form="+.2f", more="higher", less="lower"):
    """A paired difference in words: "-0.12 ± 0.03 (lower)"; ± is the standard deviation over seeds."""
    words = {1: more, -1: less, 0: "not told apart", None: "too few seeds"}[differs(differences)]
    return f"{spread(differences, form)} ({words})"


def judge(signs):
    """One word for a claim that makes several comparisons; signs: 1 as claimed, -1 the other way, 0 not told apart, None no two seeds."""
    known = [s for s in signs if s is not None]
    if not known:
        return "Not decided"
    if 1 not in known:
        return "Refuted" if -1 in known else "Not told apart"
    return "Mixed" if -1 in known else "Holds" if set(signs) == {1} else "Holds in part"


def compared(pairs, form="+.2f", want=1, more="higher", less="lower"):
    """Comparisons {name: paired differences}, claimed to have the sign `want` -> (signs for `judge`, text: each, or a count of many)."""
    found = {name: differs(d) for name, d in pairs.items()}
    signs = [s if s is None else s * want for s in found.values()]
    if len(pairs) <= 6:
        return signs, "; ".join(f"{name} {said(d, form, more, less)}" for name, d in pairs.items())
    counts = ((list(found.values()).count(s), word) for s, word in ((1, more), (-1, less), (0, "not told apart"), (None, "too few seeds")))
    order = sorted((name for name in pairs if pairs[name]), key=lambda name: statistics.fmean(pairs[name]))
    ends = f" (from {spread(pairs[order[0]], form)}, {order[0]}, to {spread(pairs[order[-1]], form)}, {order[-1]})" if order else ""
    return signs, ", ".join(f"{n} of {len(pairs)} {word}" for n, word in counts if n) + ends


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
def keep(claim, worlds, command):
    """Write NAME.json (everything, by size) and the figures into the claim's folder of results -> the text for the screen.

    A size replaces what was measured at the same size; the figures are those of the largest size there is.
    """
    claim.results.mkdir(parents=True, exist_ok=True)
    path = claim.results / f"{claim.name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    rows = [r for cells in worlds.values() for rows in cells.values() for r in rows]
    machines = {json.dumps(r.get("machine")): r.get("machine") for r in rows}
    said = {world: {"table": table(claim, cells), "verdict": claim.verdict(cells)} for world, cells in worlds.items()}
    stored[claim.size] = {"claim": claim.says, "source": claim.source, "refuted_by": claim.refuted, "command": command, "machines": list(machines.values()),
                          "defaults": dataclasses.asdict(Config()), "worlds": said, "rows": [{k: v for k, v in r.items() if k != "machine"} for r in rows]}
    experiment.write(path, one_row_a_line(stored))
    if claim.size == max(stored, key=SIZES.index):
        for world, cells in worlds.items():
            claim.draw(cells, claim.results / figure_of(claim.name, world))
    return "\n\n".join([f"{world}\n\n{part['table']}\n\n{part['verdict']}".strip() for world, part in said.items()] + [f"results {path}"])


def one_row_a_line(stored):
    """The JSON of results, such that a person and `diff` can read it: one line for each row."""
    part = lambda v: "[\n" + ",\n".join(json.dumps(r) for r in v) + "]" if isinstance(v, list) else json.dumps(v)                   # noqa: E731
    whole = lambda x: "{\n" + ",\n".join(f"{json.dumps(k)}: {part(v)}" for k, v in x.items()) + "}"                                # noqa: E731
    return "{" + ",\n".join(f"{json.dumps(size)}: {whole(x)}" for size, x in stored.items()) + "}\n"


def figure_of(name, world):
    """The file of a world's figure."""
    return slug(f"{name} {world}") + ".png"


def bold(verdict):
    """A verdict with its word in bold, Markdown."""
    word, colon, rest = verdict.partition(":")
    return f"**{word}{colon}**{rest}"


def between(text, name, words):
    """`text` with `words` between <!-- name --> and <!-- /name -->, wherever that stands."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + words + "\n" + m[2], text, flags=re.S)


def report(readme, folder, **tables):
    """Rewrite `readme` between <!-- NAME --> and <!-- /NAME --> from folder/NAME.json, its largest size -> the names.

    Between <!-- verdicts --> and its end comes a table of them all; tables: {mark: text} of other marks. UserError if a mark has no
    results or no end; then nothing is written.
    """
    text = readme.read_text()
    marks, where, rows = re.findall(r"<!-- (\w+) -->", text), os.path.relpath(folder, readme.parent), ["| | the claim | at this size |", "| --- | --- | --- |"]
    names = [name for name in marks if name not in ("verdicts", *tables)]
    for name in marks:
        path = folder / f"{name}.json"
        if name in names and not path.exists() or f"<!-- /{name} -->" not in text:
            raise experiment.UserError(f"{readme.name} has a place <!-- {name} -->, but " + (
                f"no end of it, <!-- /{name} -->" if name not in names or path.exists() else f"there is no {path}; run python run.py --experiment {name}"))
    for name in names:
        stored = json.loads((folder / f"{name}.json").read_text())
        part = stored[max(stored, key=SIZES.index)]
        text = between(text, name, f"{part['claim']} ({part['source']}). Refuted if {part['refuted_by']}. `{part['command']}`\n\n" + "\n\n".join(
            f"{world}\n\n{x['table']}\n\n{bold(x['verdict'])}\n\n![{name}]({where}/{figure_of(name, world)})".strip() for world, x in part["worlds"].items()))
        rows.append(f"| [`{name}`](#{name}) | {part['claim']} ({part['source']}) | " + "; ".join(
            f"{world} **{x['verdict'].partition(':')[0]}**".strip() for world, x in part["worlds"].items()) + " |")
    for mark, words in {"verdicts": "\n".join(rows), **tables}.items():
        text = between(text, mark, words)
    experiment.write(readme, text)
    return names
