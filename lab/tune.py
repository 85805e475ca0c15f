"""Choosing settings fairly: the same budget for every method, and never a look at the test images.

    python -m lab.tune fedsam --size cpu

A method that was tuned beats one that was not, whatever they are. So every method gets nine
settings, three learning rates times three values of the ONE setting that matters most for it
(`GRID`), the same rounds, the same seed (100, which no report uses), and one judge, the accuracy on
the validation images:

    stage 1     all nine, a third of the rounds       the best three go on
    stage 2     three, all rounds                     the best one wins

This is successive halving with two stages: 9/3 + 3 = 6 complete runs instead of 9. Its known flaw:
a slow learner that would win in the end may be lost in stage 1. A setting that diverges has lost.
Of equal accuracies, the earlier in the grid wins.

Winners are kept in results/tuned.json with all that was tried and the command that made them; the
claim `accuracy` uses those of its size. One validation image is 0.1 points and one seed is noisy:
this finds good settings, not the best ones.

Sources: successive halving, Jamieson and Talwalkar 2016. Grid and stages are this project's choice.
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import run
from lab import study
from plumbing.settings import HERE, closest

SEED = 100
RATES = (0.05, 0.1, 0.2)
RADII = {"lr": RATES, "rho": (0.05, 0.1, 0.2)}
BETAS = {"lr": RATES, "beta": (0.025, 0.1, 0.4)}
VARIATES = {"lr": RATES, "variate": (0.1, 0.5, 1.0)}
PROXES = {"lr": RATES, "prox": (0.01, 0.1, 1.0)}
MOMENTA = {"lr": RATES, "momentum_alpha": (0.1, 0.3, 0.7)}
ADAMS = {"local_adam_lr": (3e-4, 1e-3, 3e-3)}
FINETUNE = {"finetune_lr": (1e-5, 1e-4, 1e-3)}
SERVER = {"server_lr": (0.7, 1.0, 1.4)}
GRID = {  # method: {setting: three values}, two settings each
    **dict.fromkeys(("fedsam", "fedlesam", "fedlesam-server", "fedsynsam"), RADII),
    **dict.fromkeys(("oracle", "gcsam", "fedgloss", "fedwmsam"), RADII),
    **dict.fromkeys(("gradalign", "fedga", "fedga-previous"), BETAS),
    **dict.fromkeys(("scaffold", "fedgamma", "fedlesam-s", "fedsynsam-s"), VARIATES),
    **dict.fromkeys(("fedprox", "feddyn", "fedspeed", "fedsmoo"), PROXES),
    **dict.fromkeys(("fedlesam-d", "fedsynsam-d"), PROXES),
    **dict.fromkeys(("fedcm", "mofedsam"), MOMENTA),
    **dict.fromkeys(("fedavg", "labelcal"), {"lr": RATES} | SERVER),
    "dynafed": {"lr": RATES} | FINETUNE,
    "fedsynth": {"lr": RATES, "fs_step": (0.05, 0.1, 0.3)},
    "fedadam": {"lr": RATES, "adam_lr": (0.01, 0.03, 0.1)},
    "fedasam": {"lr": RATES, "rho": (0.3, 0.7, 1.4)},
    "fedavg-adam": ADAMS | SERVER,
    "dynafed-adam": ADAMS | FINETUNE,
}


def grid_of(algo):
    """The nine settings of a method, in the order of the grid: a list of dicts."""
    if algo not in GRID:
        raise ValueError(f"no grid for {algo!r}; {closest(algo, list(GRID))}")
    grid = GRID[algo]
    return [dict(zip(grid, both)) for both in itertools.product(*grid.values())]


def stages(settings):
    """The two stages for a run with all these settings: [(rounds, how many settings enter)]."""
    T, warmup = settings["rounds"], settings.get("warmup", 0)
    return [(max(T // 3, min(warmup + 1, T)), 9), (T, 3)]


def halving(algo, shared, score):
    """Successive halving: [(rounds, settings, validation accuracy or None)], the winner last.

    shared: the settings that all runs share. score(settings): the validation accuracy of a run,
    None if it diverged. Raises ValueError if all diverged.
    """
    shared = study.fitting(shared, {"algo": algo, "seed": SEED})
    tried, left = [], grid_of(algo)
    for rounds, many in stages(run.resolve(**shared)):
        scores = [(rounds, s, score(shared | {"rounds": rounds} | s)) for s in left[:many]]
        scores.sort(key=lambda entry: -1 if entry[2] is None else entry[2], reverse=True)
        left = [settings for _, settings, found in scores if found is not None]
        tried += scores[::-1]
    if not left:
        raise ValueError(f"every setting of {algo} that was tried diverged")
    return tried


def accuracy_of(root, settings):
    """The validation accuracy of a run, trained if it is not there; None if it diverged."""
    try:
        (run_of,) = study.shared([functools.partial(study.train, root, settings)])
    except FloatingPointError:
        return None
    return run_of[1]["val_acc"]


def tune(algo, tasks, size, root, path, command, **machine):
    """Tune a method on {task: settings}, put the winners into the file at `path`: the entries."""
    found = []
    for task, shared in tasks.items():
        tried = halving(algo, shared, lambda s: accuracy_of(root, s | machine))
        rounds, chosen, score = tried[-1]
        entry = {"size": size, "world": task, "method": algo, "settings": chosen, "val_acc": score}
        entry |= {"rounds": rounds, "seed": SEED, "command": command, "tried": tried}
        enter(path, entry)
        found.append(entry)
    return found


def entries(path):
    """What tuned.json holds: a list of dicts, empty without the file."""
    return json.loads(path.read_text()) if path.exists() else []


def place(entry):
    """What an entry is for, in the order of the file."""
    return study.SIZES.index(entry["size"]), entry["world"], list(GRID).index(entry["method"])


def enter(path, entry):
    """Put an entry into tuned.json, in place of one for the same size, task and method."""
    others = [e for e in entries(path) if place(e) != place(entry)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(e) for e in sorted([*others, entry], key=place)]
    run.write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def winner(path, size, task, algo):
    """The tuned settings of a method, or None if it was not tuned for this size and task."""
    for e in entries(path):
        if (e["size"], e["world"], e["method"]) == (size, task, algo):
            return e["settings"]
    return None


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
    """The command: exit code 0, 2, or 130 if interrupted."""
    p = run.Parser(prog="python -m lab.tune", description=__doc__.split("\n")[0])
    p.add_argument("algo")
    p.add_argument("--size", choices=study.SIZES, default="cpu")
    p.add_argument("--out", type=Path, default=Path("runs/lab"), help="where runs are kept")
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    try:
        given = p.parse_args(argv)
        path, size = given.results / "tuned.json", given.size
        command = f"python -m lab.tune {given.algo} --size {size}"
        machine = {"threads": given.threads}
        found = tune(given.algo, study.TASKS[size], size, given.out, path, command, **machine)
    except (ValueError, OSError) as error:
        print(f"lab.tune: {error}", file=sys.stderr)
        return 2
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
