"""Choosing settings fairly: the same search for every method, and never a look at the test images.

    python -m lab.tune fedsam --size cpu
    python -m lab.claims skew --tune        what a claim compares, on its own tasks

A method that was tuned beats one that was not, whatever they are. So every method gets the same
search over two settings, its learning rate and the ONE setting that matters most for it (`GRID`),
in runs of the same rounds and the same seeds (from 100 on, which no report uses), judged by the
mean accuracy on the validation images:

    all values of the first setting, the other one in the middle of its grid      the best stays
    all values of the second setting                                              the best stays
    a winner at the end of its grid: the grid grows there, until the winner has two neighbours

This is coordinate search, 7 runs for two settings of four values. Its known flaw: it misses a pair
that is only good together. A setting that diverges has lost.

Winners are kept in results/tuned.json with all that was tried and the command that made them. One
validation image is 0.1 points and one seed is noisy: this finds good settings, not the best ones.
With one class per client accuracy differs so much from seed to seed that one or two find nothing;
so a claim may ask for more (`skew` in results/README.md has four there, which are few). The grids
are this project's choice.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import run
from lab import study
from plumbing.settings import HERE, closest

SEED = 100  # the first one
LONGEST = 9  # values of a grid that has grown
RATES = (0.05, 0.1, 0.2, 0.4)
RADII = {"lr": RATES, "rho": (0.01, 0.03, 0.1, 0.3)}
BETAS = {"lr": RATES, "beta": (0.025, 0.1, 0.4)}
VARIATES = {"lr": RATES, "variate": (0.1, 0.3, 1.0)}
PROXES = {"lr": RATES, "prox": (0.01, 0.1, 1.0)}
MOMENTA = {"lr": RATES, "momentum_alpha": (0.1, 0.3, 0.7)}
ADAMS = {"local_adam_lr": (3e-4, 1e-3, 3e-3)}
FINETUNE = {"finetune_lr": (1e-5, 1e-4, 1e-3, 1e-2)}
SERVER = {"server_lr": (0.5, 1.0, 2.0)}
GRID = {  # method: {setting: values}, two settings each
    **dict.fromkeys(("fedsam", "fedlesam", "fedlesam-server", "fedsynsam"), RADII),
    **dict.fromkeys(("oracle", "gcsam", "fedgloss", "fedwmsam"), RADII),
    **dict.fromkeys(("fedsynsam-debiased", "fedsynsam-descent"), RADII),
    **dict.fromkeys(("gradalign", "fedga", "fedga-previous"), BETAS),
    **dict.fromkeys(("scaffold", "fedgamma", "fedlesam-s", "fedsynsam-s"), VARIATES),
    **dict.fromkeys(("fedprox", "feddyn", "fedspeed", "fedsmoo"), PROXES),
    **dict.fromkeys(("fedlesam-d", "fedsynsam-d"), PROXES),
    **dict.fromkeys(("fedcm", "mofedsam"), MOMENTA),
    **dict.fromkeys(("fedavg", "labelcal", "swa"), {"lr": RATES} | SERVER),
    "dynafed": {"lr": RATES} | FINETUNE,
    "fedsynth": {"lr": RATES, "fs_step": (0.05, 0.1, 0.3)},
    "fedadam": {"lr": RATES, "adam_lr": (0.01, 0.03, 0.1)},
    "fedasam": {"lr": RATES, "rho": (0.3, 0.7, 1.4)},
    "fedavg-adam": ADAMS | SERVER,
    "dynafed-adam": ADAMS | FINETUNE,
}


def grid_of(algo):
    """The grid of a method: {setting: values}."""
    if algo not in GRID:
        raise ValueError(f"no grid for {algo!r}; {closest(algo, list(GRID))}")
    return GRID[algo]


def search(grid, score, legal=lambda name, value: True):
    """Coordinate search: (the chosen settings, all that was tried [(settings, score or None)]).

    grid: {setting: values}; score(settings): validation accuracy, None if the run diverged.
    legal(name, value): whether a grid may grow there. FloatingPointError if all runs diverged.
    """
    chosen = {name: values[(len(values) - 1) // 2] for name, values in grid.items()}
    tried = []

    def score_of(settings):
        for earlier, found in tried:
            if earlier == settings:
                return found
        tried.append((settings, score(settings)))
        return tried[-1][1]

    for name, values in grid.items():
        values = sorted(values)
        while True:
            scores = [score_of(chosen | {name: value}) for value in values]
            if all(x is None for x in scores):
                raise FloatingPointError(f"all values of {name} that were tried diverged: {values}")
            best = max(range(len(values)), key=lambda k: rank(scores[k], values[k], chosen[name]))
            grown = one_more(values, best)
            if len(values) == LONGEST or grown is None or not legal(name, grown):
                break
            values = sorted([*values, grown])
        chosen = chosen | {name: values[best]}
    return chosen, tried


def rank(score, value, before):
    """The order of values: by score, and of equal scores the value before the search."""
    return -1 if score is None else score, value == before


def one_more(values, best):
    """The value beyond the end of a grid where its best one lies, at equal ratios, or None."""
    if best == 0:
        return float(f"{values[0] ** 2 / values[1]:.3g}")
    if best == len(values) - 1:
        return float(f"{values[-1] ** 2 / values[-2]:.3g}")
    return None


def accuracy_of(root, settings, seeds=1):
    """The validation accuracy, mean over runs that are trained if need be; None if one diverged.

    Raises study.Busy while another process is at one of the runs and all others are done.
    """

    def job(seed):
        return study.train(root, settings | {"seed": seed})[1]["val_acc"]

    try:
        found = study.shared([functools.partial(job, SEED + k) for k in range(seeds)], wait=None)
    except FloatingPointError:
        return None
    return sum(found) / seeds


def winner_of(root, shared, grid, about, seeds=1):
    """Search the grid with these settings for all runs: an entry of tuned.json.

    about: {"size", "world" (the task), "method" (or the arm of a claim), "command"}
    """

    def legal(name, value):
        with contextlib.suppress(ValueError):
            return bool(run.resolve(**shared | {name: value}))
        return False

    chosen, tried = search(grid, lambda s: accuracy_of(root, shared | s, seeds), legal)
    rounds = run.resolve(**shared)["rounds"]
    told = {
        "settings": chosen,
        "val_acc": score_among(tried, chosen),
        "rounds": rounds,
        "seeds": list(range(SEED, SEED + seeds)),
    }
    return about | told | {"tried": [[rounds, *pair] for pair in tried]}


def score_among(tried, chosen):
    return next(found for settings, found in tried if settings == chosen)


def tune(searches, size, root, path, command, **machine):
    """Do all searches {(task, arm): (settings of all runs, grid, number of seeds)}.

    Winners go to the file at path.
    Several processes share the work. -> the entries, in order
    """

    def job(place, shared, grid, seeds):
        about = {"size": size, "world": place[0], "method": place[1], "command": command}
        entry = winner_of(root, shared | machine, grid, about, seeds)
        with study.locked(path):
            enter(path, entry)
        return entry

    jobs = [functools.partial(job, place, *what) for place, what in searches.items()]
    return study.shared(jobs)


def entries(path):
    """What tuned.json holds: a list of dicts, empty without the file."""
    return json.loads(path.read_text()) if path.exists() else []


def place(entry):
    """What an entry is for, in the order of the file."""
    return study.SIZES.index(entry["size"]), entry["world"], entry["method"]


def enter(path, entry):
    """Put an entry into tuned.json, in place of one for the same size, task and method."""
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [e for e in entries(path) if place(e) != place(entry)]
    lines = [json.dumps(e) for e in sorted([*others, entry], key=place)]
    run.write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def winner(path, size, task, algo):
    """The tuned settings of a method; {} if it was not tuned for this size and task."""
    for e in entries(path):
        if (e["size"], e["world"], e["method"]) == (size, task, algo):
            return e["settings"]
    return {}


def words(chosen):
    """Settings as text: "lr 0.1, rho 0.05"."""
    return ", ".join(f"{name} {value:g}" for name, value in chosen.items())


def text(path):
    """The winners in tuned.json as a Markdown table: what was tried, what won, by which command."""
    heads = ("", "size", "tried", "won", "validation accuracy %", "command")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for e in entries(path):
        values = {name: sorted({s[name] for _, s, _ in e["tried"]}) for name in e["settings"]}
        tried = "; ".join(f"{k} {', '.join(f'{v:g}' for v in vs)}" for k, vs in values.items())
        cells = (e["method"], f"{e['size']} {e['world']}".strip(), tried, words(e["settings"]))
        score = f"{100 * e['val_acc']:.2f}"
        lines.append("| " + " | ".join((*cells, score, f"`{e['command']}`")) + " |")
    return "\n".join(lines)


def main(argv=None):
    """The command: exit code 0, 1 if all runs of a search diverged, 2, or 130 if interrupted."""
    p = run.Parser(prog="python -m lab.tune", description=__doc__.split("\n")[0])
    p.add_argument("algo")
    p.add_argument("--size", choices=study.SIZES, default="cpu")
    p.add_argument("--out", type=Path, default=Path("runs/lab"), help="where runs are kept")
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    try:
        given = p.parse_args(argv)
        grid, size = grid_of(given.algo), given.size
        command = f"python -m lab.tune {given.algo} --size {size}"
        own = {"algo": given.algo}
        searches = {
            (t, given.algo): (study.fitting(x, own), grid, 1) for t, x in study.TASKS[size].items()
        }
        places = given.out, given.results / "tuned.json"
        found = tune(searches, size, *places, command, threads=given.threads)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lab.tune: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("lab.tune: interrupted; the same command continues", file=sys.stderr)
        return 130
    for e in found:
        score = 100 * e["val_acc"]
        print(
            f"{e['world']} {given.algo}: {words(e['settings'])}, {score:.2f} % on validation images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
