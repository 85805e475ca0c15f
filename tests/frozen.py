"""Does the new code compute the bits of the old code?  And how do their seconds compare?

    python -m tests.frozen           all methods on a tiny task: same model, same bytes?
    python -m tests.frozen --speed   seconds of a round, of the start and of a small run
    --old COMMIT                     what to compare with; by default the last before the rebuild

Both codes run side by side on this machine, each in a process of its own. A stored hash would not
do, since another processor gives other bits. The whole chain is compared: data, split, network,
rounds. EXPECTED lists the differences that are there on purpose. Exit code 0 if there are no
others, else 1. Not collected by pytest.
"""

import argparse
import fnmatch
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1]
BEFORE = "c16383e"  # the last commit before the rebuild

NAMES = """fedavg fedsam fedlesam fedlesam-server fedsynth dynafed fedsynsam gradalign fedga
    fedga-previous oracle fedprox scaffold feddyn fedcm fedadam mofedsam fedgamma fedspeed fedsmoo
    fedlesam-s fedlesam-d fedsynsam-s fedsynsam-d fedasam gcsam fedavg-adam dynafed-adam""".split()
METHODS = {name: dict(algo=name) for name in NAMES} | {
    "fedavg-server": dict(algo="fedavg", server_lr=0.9),
    "feddyn-server": dict(algo="feddyn", server_lr=0.9),
    "fedavg-size": dict(algo="fedavg", average="size"),
    "scaffold-size": dict(algo="scaffold", average="size"),
    "feddyn-size": dict(algo="feddyn", average="size"),
    "fedsam-man": dict(algo="fedsam", man=0.15),
    "fedavg-bf16": dict(algo="fedavg", bf16=True),
    "fedprox-unclipped": dict(algo="fedprox", prox_clip=False, clip=0.5),
    "gcsam-code": dict(algo="gcsam", gc_code=True),
    "fedsynth-data": dict(algo="fedsynth", fs_objective="data"),
    "fedsynsam-again": dict(algo="fedsynsam", resynthesize=1, warmup_method="fedavg", mix=1.0),
    "fedsynsam-augment": dict(algo="fedsynsam", syn_augment=True, average_targets=False),
}
COMPRESSORS = {
    "none": {"compress": "identity"},
    "qsgd": {"compress": "qsgd", "levels": 1},
    "topk": {"compress": "topk", "k": 0.05, "error_feedback": True},
}
TINY = (
    dict(rounds=4, clients=6, participation=4, local_epochs=1, batch=8, lr=0.1, lr_decay=0.9)
    | dict(weight_decay=1e-3, augment=True)
    | dict(partition="dirichlet-class", alpha=0.5, min_size=2, val=20, measure_images=20)
    | dict(model="cnn", width=2, hidden=8, device="cpu")
    | dict(warmup=2, window=2, ipc=1, outer_steps=3, inner_steps=2, finetune_epochs=2)
    | dict(oracle_images=20, fs_steps=2, fs_batches=2, fs_images=2)
    | dict(mix=0.5, warmup_method="fedsam")
)
MODES = ("plain", "threads", "vmap")
# Why a difference is better. Each was found by making the same change in the old code, which then
# ended with the bits of the new one.
FEEDBACK = "error feedback acts on the update only, no longer on SCAFFOLD's second vector"
NUMBERS = "rounding: lr_sum and lr are numbers in float64, and were float32 tensors"
RECIPROCAL = "rounding: a division by lr_sum was a product with 1 / lr_sum"
MOMENTS = "rounding: new moments are stored as they are, no longer as m + (new - m)"
SHARE = "with average = size, c and h are means with the weights of the clients"
SERVER_LR = "server_lr scales the mean update in FedDyn, too; 1 is the paper's"
CUTOUT = "cutout is 14 x 14 of 28 pixels, not 13; and rounding of gradients of means used twice"
VARIATES = ("scaffold", "fedgamma", "fedlesam-s", "fedsynsam-s")
EXPECTED = (  # pattern of "method compressor mode what": why
    {f"{method} topk * w": FEEDBACK for method in VARIATES}
    | {f"{method} * * w": NUMBERS for method in (*VARIATES, "fedprox-unclipped")}
    | {"fedga-previous * * w": RECIPROCAL}
    | {"fedavg-adam * * w": MOMENTS, "dynafed-adam * * w": MOMENTS}
    | {"scaffold-size * * w": SHARE, "feddyn-size * * w": SHARE, "feddyn-server * * w": SERVER_LR}
    | {"fedsynsam-augment * * w": CUTOUT, "fedsynth-data topk * error": "both refuse it"}
)


# ----------------------------------------------------------------------- in a process of each code


def old_federation(mode, settings):
    """The loop of the old code, in its folder."""
    import experiment
    from config import Config

    how = {"plain": {"threads": 1}, "threads": {"threads": 2}}.get(mode, {"chunk": 10})
    return experiment.compose(Config(**settings, **how).check())[1]


def new_federation(mode, settings):
    """The loop of the new code. A method gets those settings that it has."""
    import run

    given = settings | {"visit": mode, "threads": 2}
    given["error_feedback"] = "on" if given.get("error_feedback") else "off"
    known = {name for part in run.owners(given) for name in run.settings_of(part)}
    return run.compose(run.resolve(**{n: v for n, v in given.items() if n in known}))[0]


def bytes_of(federation):
    """Bytes (up, down); the names of the old code first."""
    if hasattr(federation, "up"):
        return federation.up, federation.down
    return federation.bytes_up, federation.bytes_down


def outcome(make, settings):
    """What a run ends with."""
    mode, rounds = settings.pop("mode"), settings["rounds"]
    try:
        federation = make(mode, settings)
        for _ in range(rounds):
            federation.round()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    up, down = bytes_of(federation)
    return {"w": federation.w.tolist(), "up": up, "down": down}


def serve(make):
    """Answer lines of JSON: a run; or what is to be timed, and then {} for each round of it."""
    answers, sys.stdout = sys.stdout, sys.stderr
    federation = None
    for line in sys.stdin:
        settings = json.loads(line)
        if settings and "time" in settings:
            del settings["time"]
            federation, answer = make(settings.pop("mode"), settings), 0
        elif settings:
            answer = outcome(make, settings)
        else:
            began = time.perf_counter()
            federation.round()
            answer = time.perf_counter() - began
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """A process of one of the codes, in the folder of its source."""

    def __init__(self, name, source):
        self.source, environment = source, dict(os.environ, PYTHONPATH=str(source))
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", name],
            cwd=source,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def send(self, settings):
        print(json.dumps(settings), file=self.process.stdin, flush=True)

    def receive(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, settings):
        self.send(settings)
        return self.receive()

    def seconds(self, *words):
        """How long `python run.py words` takes."""
        began, command = time.perf_counter(), [sys.executable, "run.py", *words]
        subprocess.run(command, cwd=self.source, check=True, capture_output=True)
        return time.perf_counter() - began

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------- the comparison


def unpack_commit(commit, folder):
    """The files of a commit in a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def small_dataset(path):
    """The first 260 of the bundled images, as a file that both codes read."""
    with np.load(HERE / "data" / "fashion_10k.npz") as pack:
        first = {"x_train": 260, "y_train": 260, "x_test": 40, "y_test": 40}
        np.savez(path, **{name: pack[name][:n] for name, n in first.items()})
    return {"dataset": str(path)}


def why_expected(run, what):
    """The reason for a difference, or None."""
    line = f"{run} {what}"
    return next((why for pattern, why in EXPECTED.items() if fnmatch.fnmatch(line, pattern)), None)


def difference(what, old, new):
    """A word for the table: same, or how much another; for w the distance over the norm."""
    a, b = (np.array(end.get(what, np.nan), dtype=float) for end in (old, new))
    return "same" if (a == b).all() else f"{np.linalg.norm(b - a) / np.linalg.norm(a):.0e}"


def compare(sides, dataset, chosen):
    """The table of all runs, printed; returns the number of differences that nobody expects."""
    wrong, seen = 0, set()
    print(f"{'method':18}{'compress':9}{'mode':9} {'w':8} {'up':8} {'down':8}")
    for method, compressor, mode in itertools.product(chosen, COMPRESSORS, MODES):
        settings = {"mode": mode} | TINY | METHODS[method] | COMPRESSORS[compressor] | dataset
        for side in sides:  # both at once, on two cores
            side.send(settings)
        old, new = (side.receive() for side in sides)
        reasons = {
            what: why_expected(f"{method} {compressor} {mode}", what)
            for what in old | new
            if old.get(what) != new.get(what)
        }
        seen |= set(reasons.values())
        wrong += sum(why is None for why in reasons.values())
        marks = [difference(what, old, new) for what in ("w", "up", "down")]
        print(f"{method:18}{compressor:9}{mode:9}", *(f"{mark:8}" for mark in marks), end="")
        print("", *{why or "UNEXPECTED" for why in reasons.values()}, sep="  ", flush=True)
        for name, result in (("old", old), ("new", new)):
            if "error" in result:
                print(f"    {name}: {result['error']}")
    for why in set(EXPECTED.values()) - seen if len(chosen) == len(METHODS) else ():
        print("expected, but not seen:", why)
    return wrong


# --------------------------------------------------------------------------------------- the speed

FASHION = Path("/usr/share/datasets/fashion-mnist")  # complete Fashion-MNIST, if it is installed
W1 = (
    dict(dataset="fashionmnist" if FASHION.exists() else "bundled", partition="dirichlet-class")
    | dict(alpha=0.1, participation=10, local_steps=20, batch=32, lr=0.05, clip=0.0)
    | dict(width=16, hidden=128, compress="identity", device="cpu")
)
WORKLOADS = {
    "W1, a round of fedavg": W1 | {"algo": "fedavg"},
    "W2, a round of fedsam": W1 | {"algo": "fedsam", "rho": 0.05},
}
COMMANDS = {
    "python run.py --help": ["--help"],
    "a run of one round": "--algo fedavg --rounds 1 --measure-images 10".split(),
    "--quick": ["--quick"],
}


def speed(sides, rounds, folder):
    """Print medians and ratios of the seconds of both codes, which take turns."""

    def report(name, pairs):
        old, new = (statistics.median(values) for values in zip(*pairs))
        ratio = statistics.median(new / old for old, new in pairs)
        print(f"{name:24} old {old:7.3f} s   new {new:7.3f} s   new / old {ratio:.3f}", flush=True)

    for name, settings in WORKLOADS.items():
        for mode in ("plain", "threads"):
            for side in sides:
                side.ask(settings | {"mode": mode, "time": True})
            pairs = [[side.ask({}) for side in sides] for _ in range(rounds + 2)][2:]
            report(f"{name}, {mode}", pairs)
    for name, words in COMMANDS.items():
        out = [] if "--help" in words else ["--out", folder]
        report(name, [[side.seconds(*words, *out) for side in sides] for _ in range(5)])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--old", default=BEFORE, metavar="COMMIT")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--speed", action="store_true")
    p.add_argument("--rounds", type=int, default=15, help="timed rounds of a workload")
    p.add_argument("--serve", choices=["old", "new"], help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        return serve({"old": old_federation, "new": new_federation}[args.serve])
    with tempfile.TemporaryDirectory() as folder:
        unpack_commit(args.old, folder)
        sides = [Side("old", Path(folder)), Side("new", HERE)]
        if args.speed:
            wrong = speed(sides, args.rounds, folder)
        else:
            wrong = compare(sides, small_dataset(Path(folder) / "tiny.npz"), args.methods)
        for side in sides:
            side.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
