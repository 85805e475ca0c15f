"""Choosing settings fairly: the same budget for every method, and never a look at the test images.

A method that was tuned beats one that was not, whatever they are. So `python run.py --tune METHOD --size SIZE` gives every method
nine settings, three learning rates times three values of the ONE knob that matters most for it (`GRID`, a table), the same
number of rounds, the same seed (100, which no report uses), and one judge, the accuracy on the 1,000 validation images:

    stage 1     all nine, a third of the rounds            the best three go on
    stage 2     three, all rounds                          the best one wins

which is successive halving with two stages: 9/3 + 3 = 6 complete runs instead of 9. Its known flaw: a slow learner that would win at
the end may fall in stage 1. A setting that diverges has lost. Equal accuracies: the earlier in the grid.

Winners are kept in results/tuned.json, a line each with the command that made it and all that was tried; `accuracy` (claims.py)
uses those of its size. One validation image is 0.1 points and one seed is noisy: this finds good settings, not the best ones.

Source: successive halving, Jamieson and Talwalkar 2016; the grid and the two stages are ours. Read next: relatives.py.
"""
import functools
import itertools
import json
import shlex

import experiment
import loop
import study
from config import Config

SEED = 100
RATES = (0.05, 0.1, 0.2)                                          # eta
RADII = (0.05, 0.1, 0.2)                                          # rho
GRID = {                                                          # method: {field of Config: three values}; two fields each
    "fedavg": {"lr": RATES, "server_lr": (0.7, 1.0, 1.4)},
    "fedsam": {"lr": RATES, "rho": RADII},
    "fedlesam": {"lr": RATES, "rho": RADII},
    "fedlesam-server": {"lr": RATES, "rho": RADII},
    "fedsynth": {"lr": RATES, "fs_step": (0.05, 0.1, 0.3)},
    "dynafed": {"lr": RATES, "finetune_lr": (1e-5, 1e-4, 1e-3)},
    "fedsynsam": {"lr": RATES, "rho": RADII},
    "oracle": {"lr": RATES, "rho": RADII},
    "gradalign": {"lr": RATES, "beta": (0.025, 0.1, 0.4)},
    "fedga": {"lr": RATES, "beta": (0.025, 0.1, 0.4)},
    "fedga-previous": {"lr": RATES, "beta": (0.025, 0.1, 0.4)},
    "fedprox": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "scaffold": {"lr": RATES, "variate": (0.1, 0.5, 1.0)},
    "feddyn": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "fedcm": {"lr": RATES, "momentum_alpha": (0.1, 0.3, 0.7)},
    "fedadam": {"lr": RATES, "adam_lr": (0.01, 0.03, 0.1)},
    "mofedsam": {"lr": RATES, "momentum_alpha": (0.1, 0.3, 0.7)},
    "fedgamma": {"lr": RATES, "variate": (0.1, 0.5, 1.0)},
    "fedspeed": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "fedsmoo": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "fedlesam-s": {"lr": RATES, "variate": (0.1, 0.5, 1.0)},
    "fedlesam-d": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "fedsynsam-s": {"lr": RATES, "variate": (0.1, 0.5, 1.0)},
    "fedsynsam-d": {"lr": RATES, "prox": (0.01, 0.1, 1.0)},
    "fedasam": {"lr": RATES, "rho": (0.3, 0.7, 1.4)},
    "gcsam": {"lr": RATES, "rho": RADII},
    "fedavg-adam": {"local_adam_lr": (3e-4, 1e-3, 3e-3), "server_lr": (0.7, 1.0, 1.4)},
    "dynafed-adam": {"local_adam_lr": (3e-4, 1e-3, 3e-3), "finetune_lr": (1e-5, 1e-4, 1e-3)},
}


def settings(algo):
    """The nine settings of a method, in the order of the grid -> list of dicts."""
    grid = GRID[algo]
    return [dict(zip(grid, both)) for both in itertools.product(*grid.values())]


def stages(world):
    """Rounds of the two stages in a world (fields of Config), and how many settings enter each -> [(rounds, settings), ...]."""
    cfg = Config(**world)
    return [(max(cfg.rounds // 3, min(cfg.warmup + 1, cfg.rounds)), 9), (cfg.rounds, 3)]


def halving(algo, world, run):
    """Successive halving in a world; run: Config -> the result of a run (a dict with "val_acc"), or None if it diverged.

    -> list of (rounds, settings, validation accuracy or None), the winner last; ValueError if all diverged.
    """
    tried, left = [], settings(algo)
    for rounds, many in stages(world):
        scores = []
        for chosen in left[:many]:
            result = run(Config(**{**world, "algo": algo, "seed": SEED, "rounds": rounds, **chosen}).check())
            scores.append((rounds, chosen, None if result is None else result["val_acc"]))
        scores.sort(key=lambda s: -1 if s[2] is None else s[2], reverse=True)             # a stable sort: the earlier in the grid stays first
        left = [chosen for _, chosen, score in scores if score is not None]
        tried += scores[::-1]
    if not left:
        raise experiment.UserError(f"every setting of {algo} that was tried diverged")
    return tried


def tune(algo, size, root, results, command, **machine):
    """Tune a method in all worlds of a size, with runs in root/tune-METHOD-SIZE; write its lines of results/tuned.json -> text."""
    out = []
    for world, start in study.WORLDS[size].items():
        def run(cfg):
            name = study.slug(f"{world} {' '.join(f'{k}={getattr(cfg, k):g}' for k in GRID[algo])} T={cfg.rounds}")
            folder = root / f"tune-{algo}-{size}" / name
            return study.shared([functools.partial(study.alone_in, folder, lambda: attempt(folder, cfg))])[0]
        tried = halving(algo, {**start, **machine}, run)
        rounds, chosen, score = tried[-1]
        enter(results / "tuned.json", {"size": size, "world": world, "method": algo, "settings": chosen, "val_acc": score, "rounds": rounds, "seed": SEED,
                                       "command": command, "tried": tried})
        out += [f"{world} {algo}: {words(chosen)} with {100 * score:.2f} % on validation images".strip()]
    return "\n".join(out + [f"winners {results / 'tuned.json'}"])


def attempt(folder, cfg):
    """One run of the search -> its result, or None if it diverged; that is kept, too."""
    lost = folder / "diverged"
    if lost.exists():
        return None
    try:
        return study.trained(folder, cfg, folder.name)[0]
    except (loop.Diverged, FloatingPointError) as error:
        experiment.write(lost, f"{error}\n")


def entries(path):
    """What tuned.json holds -> list of dicts; empty without the file."""
    return json.loads(path.read_text()) if path.exists() else []


def enter(path, entry):
    """Put an entry into tuned.json, in place of one for the same size, world and method: a line each, sorted."""
    key = lambda e: (study.SIZES.index(e["size"]), e["world"], list(GRID).index(e["method"]))                                   # noqa: E731
    both = sorted([e for e in entries(path) if key(e) != key(entry)] + [entry], key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment.write(path, "[\n" + ",\n".join(json.dumps(e) for e in both) + "\n]\n")


def winner(path, size, world, algo):
    """The tuned settings of a method -> dict of fields of Config, or None if it was not tuned for this size and world."""
    return next((e["settings"] for e in entries(path) if (e["size"], e["world"], e["method"]) == (size, world, algo)), None)


def words(chosen):
    """Settings as text: "lr 0.1, rho 0.05"."""
    return ", ".join(f"{k} {v:g}" for k, v in chosen.items())


def table(path):
    """The winners in tuned.json -> Markdown text: what was tried, what won, the command that made it."""
    tried = lambda e: "; ".join(f"{k} {', '.join(f'{v:g}' for v in sorted({s[k] for _, s, _ in e['tried']}))}" for k in e["settings"])     # noqa: E731
    rows = [f"| {e['method']} | {e['size']} {e['world']}".rstrip() + f" | {tried(e)} | {words(e['settings'])} | {100 * e['val_acc']:.2f} | `{e['command']}` |"
            for e in entries(path)]
    return "\n".join(["| | size | tried | won | validation accuracy % | command |", "| --- " * 6 + "|", *rows])


def command_of(*args):
    """A command that can be pasted."""
    return shlex.join(["python", "run.py", *map(str, args)])
