"""The board of the open exercise: whose ascent direction is best, at equal bytes?

A run of a few seconds on the bundled images, with a small network, fifty clients that hold two
classes each, and two bits a parameter. In the handout the chapters have holes, so your own answers
are put into them first: the board runs the book with your QSGD, your perturb, your FedSynSAM.

    cosine       of u to the gradient of the global loss, at the points where clients are; the mean
                 over a last round
    test loss    mean of the last evaluations
    accuracy     the same, in percent
    MB up, down  bytes of the whole run

Equal bytes: neither up nor down may you send more than FedSynSAM.
"""

import importlib

import fl
import run
import sam
from classroom.handout import EXERCISES, HIDDEN

TASK = {"model": "mlp", "hidden": 16, "partition": "shards", "clients": 50, "rounds": 30}
TASK |= {"participation": 5, "local_steps": 10, "lr": 0.1, "visit": "plain", "device": "cpu"}
TASK |= {"classes_per_client": 2, "measure_images": 200, "eval_every": 3, "last": 3}
SYNTHESIS = {"warmup": 6, "outer_steps": 60, "ipc": 1}
NEEDED = ["qsgd", "perturb", "unroll", "fedsynsam", "man", "lanczos"]


def fill_holes(answers, keys=NEEDED):
    """Put the answers of a module into the holes of the chapters: functions, or whole classes."""
    for key in keys:
        for file, names in EXERCISES[key].asked.items():
            book = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            for name in {name.split(".")[0] for name in names} - HIDDEN:
                setattr(book, name, getattr(answers, name))


def cosine(federation):
    """The mean cosine of u to the gradient of the global loss, over one more round."""
    method, seen = federation.method, []
    sample = federation.task.balanced(500, fl.rng(0, "board"))
    direction = method.direction

    def watched(w, batch, received, mine):
        u = direction(w, batch, received, mine)
        seen.append(float(sam.unit(u) @ sam.unit(method.gradient(w, sample))))
        return u

    method.direction = watched
    federation.round()
    return sum(seen) / len(seen)


def row(algo, compress, seeds=2):
    """A line of the board: {column: number}, means over the seeds."""
    rows = []
    for seed in range(seeds):
        known = run.settings_of(run.find("algo", algo))
        own = {name: value for name, value in SYNTHESIS.items() if name in known}
        outcome = run.experiment(algo=algo, compress=compress, seed=seed, **TASK, **own)
        result = outcome.result
        rows.append(
            {
                "cosine": cosine(outcome.federation),
                "test loss": result["test_loss"],
                "accuracy": 100 * result["test_acc"],
                "MB up": result["up"] / 1e6,
                "MB down": result["down"] / 1e6,
            }
        )
    return {name: sum(r[name] for r in rows) / seeds for name in rows[0]}


def board(answers, seeds=2):
    """All lines of the board: {method: line}."""
    fill_holes(answers)
    methods = {"FedSAM": "fedsam", "FedSynSAM": answers.FedSynSAM}
    methods |= {"Oracle": "oracle", "Mine": answers.Mine}
    return {name: row(algo, answers.QSGD, seeds) for name, algo in methods.items()}


def table(lines):
    """The board as text."""
    columns = list(next(iter(lines.values())))
    text = [" " * 12 + "".join(f"{name:>12}" for name in columns)]
    for name, line in lines.items():
        text.append(f"{name:12}" + "".join(f"{line[c]:12.3f}" for c in columns))
    mine, other = lines["Mine"], lines["FedSynSAM"]
    over = any(mine[c] > 1.001 * other[c] for c in ("MB up", "MB down"))
    text.append("Mine sends more than FedSynSAM: it does not count." if over else verdict(lines))
    return "\n".join(text)


def verdict(lines):
    ahead = lines["Mine"]["cosine"] - lines["FedSynSAM"]["cosine"]
    return f"Mine minus FedSynSAM, cosine: {ahead:+.3f}"
