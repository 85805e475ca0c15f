"""Nothing lost, nothing let in, nothing silently wrong: the same accidents, many times, counted.

    python -m tests.stress            all of it, some minutes; writes results/stress.json
    python -m tests.stress --small    a little of each, in seconds, and writes nothing
    python -m tests.stress kills      one part only

    kills      SIGKILL at any moment, of a run alone or of one rank of two, until the run is done:
               it ends with the bits of a run that was left alone, and a lost rank is noticed
    buffers    damaged and forged messages: ValueError, or finite numbers
    files      damaged files in the folder of a run or a comparison: the same result, or exit code 2
               and one line that names the file
    options    every setting with every strange number: refused, or the run ends with a clear line
    data       strange data sets: legal ones never crash, illegal ones are named
    clients    of the clients, 30 % misbehave in every round: as accurate as without them

Every accident happens in a process of its own, a fork of this one, which has imported everything.
Exit code 0 if nothing went wrong, else 1; what went wrong is printed.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import statistics
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import compress
import fl
import run
from codes.dithering import Dithering
from plumbing.folder import machine, write
from plumbing.settings import HERE, closest, parts
from scale import faults, visits
from tests import check_method
from tests.test_run import RUN_ONCE, run_settings, run_state, run_words, run_write_images

COUNTS = {"kills": 100, "buffers": 10**6, "files": 500, "options": 10**6, "data": 10**6}
SMALL = {"kills": 4, "buffers": 2000, "files": 12, "options": 25, "data": 8}
PATIENCE = 120  # seconds for one run
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Tally:
    """What was counted {name: number}, and what went wrong [sentence]."""

    def __init__(self):
        self.counts, self.wrong = collections.Counter(), []

    def check(self, fine, sentence):
        if not fine:
            self.wrong.append(sentence[:2000])


# ----------------------------------------------------------------------------- a process of its own


def start(place, call, environment=()):
    """Fork; the child calls call() and ends with the exit code that it returns: -> its number.

    What it prints goes to the files out and err in `place`. 99 is a traceback.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(environment, TMPDIR=str(place))
        tempfile.tempdir = None
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        run.draw = run.plots.curve = lambda *a: None  # pictures take longer than the run
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        run.sys.stdout.flush()
        os._exit(code)


def alive(child):
    """Has this process not ended yet?"""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(child, patience=PATIENCE):
    """The exit code of a child, negative if a signal ended it; "hangs" if it must be killed."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def command(place, *words):
    """The command line run.py WORDS -> (exit code, what it printed, its errors)."""
    code = finish(start(place, lambda: run.main([str(word) for word in words])))
    return code, *((place / name).read_text(errors="replace") for name in ("out", "err"))


def one_line(code, err, codes):
    """Did it end with one of these codes, and one line that says why?"""
    return code in codes and err.count("\n") == 1 and err.startswith("run.py: ")


# -------------------------------------------------------------------------------------------- kills


def kills(numbers, draws, place, images):
    """So many kills, about a third of them of one rank of two, and at least one of these."""
    tally, life = Tally(), 0
    methods = [("scaffold", 2), ("fedsynsam", 0), ("fedlesam", 0)]
    while tally.counts["kills"] < len(numbers) or not tally.counts["kills of one rank of two"]:
        algo, ranks = methods[life % len(methods)]
        feedback = dict(compress="topk", error_feedback="on")
        settings = run_settings(images, algo, seed=life, rounds=30, **feedback)
        whole, cut = place / f"whole{life}", place / f"cut{life}"
        began = time.monotonic()
        tally.check(finish(train(place, whole, settings)) == 0, f"{algo} alone did not end well")
        seconds = time.monotonic() - began
        for _ in range(6):
            if cut_off(tally, draws, place, cut, settings, ranks, draws.uniform(0, seconds)):
                break
        code = finish(train(place, cut, settings))
        same = code == 0 and check_method.same(run_state(cut), run_state(whole))
        tally.check(same, f"{algo} of seed {life} ended with {code} and other numbers")
        tally.counts["runs"] += 1
        life += 1
        shutil.rmtree(whole)
        shutil.rmtree(cut)
    return tally


def train(place, folder, settings, environment=()):
    """Start or continue a run in another process -> its number."""

    def call():
        try:
            run.experiment(folder, watch=lambda f: (place / "joined").touch(), **settings)
        except visits.Lost:
            return 3
        return 0

    return start(place, call, environment)


def cut_off(tally, draws, place, folder, settings, ranks, delay):
    """Kill a run after so many seconds, or one of its ranks -> was it done before?"""
    group = [()]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        shared |= {"LOCAL_WORLD_SIZE": str(ranks)}
        group = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    (place / "joined").unlink(missing_ok=True)
    children = [train(place, folder, settings, environment) for environment in group]
    while ranks and not (place / "joined").exists() and alive(children[0]):
        time.sleep(0.01)  # a rank that dies before all have met is missed by torchrun only
    time.sleep(delay)
    victim = draws.choice(children)
    os.kill(victim, signal.SIGKILL)  # it may have ended: then it waits to be collected
    codes = {child: finish(child, 10) for child in children}
    killed = codes.pop(victim) == -signal.SIGKILL
    tally.counts["kills"] += killed
    tally.counts["kills of one rank of two"] += killed and ranks > 0
    for code in codes.values():  # a rank that lost the other says so, or both were done
        tally.check(code in (0, 3), f"after a kill, the other rank ended with {code}")
    return not killed


# ------------------------------------------------------------------------------------------ buffers


def buffers(numbers, draws, place, images):
    """Messages of all compressors, damaged in some way."""
    tally, generator = Tally(), torch.Generator().manual_seed(draws.randrange(2**30))
    codecs = [part() for part in parts("compress").values()]
    codecs += [compress.QSGD(7, "l2", 0), compress.RandK(3.0), compress.TopK(1.0)]
    codecs += [Dithering(0.1, randomized=False), compress.QSGD(dtype=torch.float64)]
    goods = []
    for codec in codecs:
        for d in (20, 37, 600):
            x = torch.randn(d, generator=generator) * 10 ** draws.uniform(-30, 30)
            goods.append((codec, d, codec.encode(x, generator)))
    for _ in numbers:
        codec, d, good = draws.choice(goods)
        bad, how = damaged_buffer(good, draws)
        try:
            x = codec.decode(bad, d)
            fine = x.shape == (d,) and bool(x.isfinite().all())
            tally.check(fine, f"{codec}: {how} gives {x}")
            tally.counts["buffers decoded"] += 1
        except ValueError:
            tally.counts["buffers refused"] += 1
        except Exception as error:
            tally.check(False, f"{codec}, d = {d}: {how}: {error!r}, {bad.tolist()[:50]}")
        tally.counts["buffers"] += 1
    return tally


def damaged_buffer(good, draws):
    """A buffer that differs from a good one: (bytes, in which way)."""
    body, how = bytearray(good[:-4].tolist()), draws.choice(("flip", "cut", "add", "noise", "ends"))
    where = draws.randrange(len(body))
    if how == "flip":
        body[where] ^= 1 << draws.randrange(8)
    elif how == "cut":
        del body[where : where + draws.randrange(1, 9)]
    elif how == "add":
        body[where:where] = draws.randbytes(draws.randrange(1, 9))
    elif how == "noise":
        body = bytearray(draws.randbytes(draws.choice((len(body), draws.randrange(1, 99)))))
    else:
        body[: draws.randrange(1, 9)] = draws.choice((b"\xff\xff\x7f\x7f", b"\xff" * 8, b"\0" * 4))
    new = torch.frombuffer(body, dtype=torch.uint8) if body else good[:0]
    if draws.random() < 0.25:
        return torch.cat([new, good[-4:]]), how + ", with the old checksum"
    return compress.seal(new), how + ", with the right checksum"


# -------------------------------------------------------------------------------------------- files

DEEP = "[" * 100_000
JSON = (
    "",
    "{}",
    "[{}]",
    "null",
    "3",
    "{",
    DEEP,
    '{"settings": {}}',
    '{"a": ' * 900 + "1" + "}" * 900,
)


def files(numbers, draws, place, images):
    """Damaged files: in a finished run, in one that was cut off, in a comparison."""
    tally, (done, cut, both) = Tally(), folders(place, images)
    state, (_, table, _) = run_state(done), command(place, "--resume", both)
    for _ in numbers:
        source, folder = draws.choice((done, cut, both)), place / "damaged"
        shutil.copytree(source, folder)
        kinds = (".json", ".pt", ".jsonl")
        path = draws.choice(sorted(p for p in folder.rglob("*") if p.suffix in kinds))
        how = damage(path, done, draws)
        code, out, err = command(place, "--resume", folder)
        story = f"{source.name}/{path.relative_to(folder)}, {how}: exit code {code}, {err}"
        if code:
            child = path.parent != folder  # a run of a comparison: the other is in the table
            fine = one_line(code, err, [1] if child else [2]) and path.name in err
            tally.check(fine and ("| fedsynsam |" in out or not child), story)
        else:
            as_before = out.replace(str(folder), str(both)) == table
            same = as_before if source == both else check_method.same(run_state(folder), state)
            tally.check(same, story)
        tally.counts["files"] += 1
        tally.counts["files, the same result" if code == 0 else "files refused"] += 1
        shutil.rmtree(folder)
    return tally


def folders(place, images):
    """A finished run, one that was cut off after round 3, and a comparison: their folders."""
    done, cut, both = (place / name for name in ("done", "cut", "both"))
    settings = run_settings(images, "fedsynsam", rounds=5)
    finish(train(place, done, settings))

    def until_round_3():
        run.experiment(cut, **settings, watch=lambda f: f.t == 3 and os._exit(0))

    finish(start(place, until_round_3))
    words = [*run_words(settings | {"rounds": 3}), "--seeds", 2, "--out", place, "--name", "both"]
    command(place, *words)
    return done, cut, both


def damage(path, other, draws):
    """Damage a file -> in which way."""
    good = bytearray(path.read_bytes())
    ways = ["flip", "flip", "cut", "zeros", "noise", "gone", "folder", "pipe", "other"]
    how = draws.choice(ways + ["json"] * (path.suffix == ".json"))
    where = draws.randrange(len(good))
    if how in ("folder", "pipe", "gone"):
        path.unlink()
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "gone": lambda: 0}[how]()
        return how
    if how == "flip":
        good[where] ^= 1 << draws.randrange(8)
    elif how == "cut":
        del good[where:]
    elif how == "zeros":
        good[where : where + 20] = bytes(20)
    elif how == "noise":
        good[where : where + 20] = draws.randbytes(20)
    elif how == "json":
        good = draws.choice(JSON).encode()
    else:
        good = (other / draws.choice(["config.json", "result.json", "checkpoint.pt"])).read_bytes()
    path.write_bytes(good)
    return f"{how} at {where}"


# ------------------------------------------------------------------------------------------ options

NUMBERS = ["0", "-1", "1", "0.5", str(10**30), str(-(10**30)), "nan", "inf", "-inf"]
NUMBERS += ["1e300", "-1e300", "1e30", "-1e30", "1e-300", "1e39", "2147483649", "x", ""]


def options(numbers, draws, place, images):
    """Every setting of type int or float, and those of the command line, with strange numbers."""
    tally = Tally()
    jobs = [(name, chosen, number) for name, chosen in RUN_ONCE.items() for number in NUMBERS]
    jobs += [(name, {"algo": "fedavg"}, x) for name in ("seeds", "resume", "out") for x in NUMBERS]
    random.Random(0).shuffle(jobs)
    for name, chosen, number in jobs[numbers.start : numbers.stop : numbers.step]:
        settings = run_settings(images, **chosen) | {"rounds": 3}
        settings.pop(name, None)
        flag = f"--{name.replace('_', '-')}={number}"
        words = [*run_words(settings), "--out", place / "runs", flag]
        if name == "out":
            words = [*run_words(settings), f"--out={place}/runs/{number}"]
        code, _, err = command(place, *words)
        fine = code == 0 or one_line(code, err, (1, 2))
        tally.check(fine, f"{chosen['algo']} {flag}: exit code {code}, {err}")
        tally.counts["options"] += 1
        tally.counts[{0: "options, done", 1: "options, failed"}.get(code, "options refused")] += 1
        shutil.rmtree(place / "runs", ignore_errors=True)
    return tally


# --------------------------------------------------------------------------------------------- data


def strange_data(draws):
    """Data sets as arrays: ({what: arrays} that are legal, those that are not)."""
    generator = np.random.default_rng(draws.randrange(2**30))

    def images(y, *shape, tests=9):
        x = generator.integers(0, 256, (len(y) + tests, *shape)).astype(np.uint8)
        y_test = np.resize(y, tests)
        return dict(x_train=x[tests:], y_train=np.array(y), x_test=x[:tests], y_test=y_test)

    plain = images(np.arange(60) % 3, 12, 12)
    writers = np.repeat(np.arange(12), 5)
    legal = {
        "a class without images": images(np.arange(60) % 3 * 2, 12, 12),
        "classes 7 and 900": images(np.where(np.arange(60) % 2, 7, 900), 12, 12),
        "one class": images(np.zeros(60, int), 12, 12),
        "one class, called 5": images(np.full(60, 5), 12, 12),
        "8 pixels": images(np.arange(60) % 3, 8, 8),
        "8 x 31 pixels in colour": images(np.arange(60) % 3, 8, 31, 3),
        "black images": images(np.arange(60) % 3, 12, 12) | {"x_train": 0 * plain["x_train"]},
        "as many images as clients": images(np.arange(5) % 3, 12, 12),
        "one image of each class": images(np.arange(60), 12, 12),
        "labels in a column": plain | {"y_train": plain["y_train"][:, None].astype(np.int8)},
        "more names than labels": plain | {"classes": np.array([*"abcdefg"])},
        "one test image": images(np.arange(60) % 3, 12, 12, tests=1),
        "writers": plain | {"client_train": writers},
        "writers with names, one of them with one image": plain
        | {"client_train": np.where(np.arange(60) == 7, "zoe", "writer of" + writers.astype(str))},
    }
    illegal = {
        "float images": plain | {"x_train": plain["x_train"] / 255},
        "7 pixels": images(np.arange(60) % 3, 7, 12),
        "two channels": images(np.arange(60) % 3, 12, 12, 2),
        "no images": images(np.zeros(0, int), 12, 12, tests=0),
        "a label below 0": plain | {"y_train": plain["y_train"] - 1},
        "a test label of its own": plain | {"y_test": plain["y_test"] + 1},
        "fewer labels": plain | {"y_train": plain["y_train"][1:]},
        "labels as floats": plain | {"y_train": plain["y_train"] / 2},
        "fewer names": plain | {"classes": np.array(["a", "b"])},
        "objects": plain | {"y_test": np.array([print] * 9)},
        "a scalar": plain | {"x_train": np.uint8(3)},
        "too few writers": plain | {"client_train": writers[1:]},
        "writers as floats": plain | {"client_train": writers / 2},
        "writers as objects": plain | {"client_train": np.array([None] * 60)},
        "writers in a table": plain | {"client_train": writers[:, None]},
    }
    return legal, illegal


def data(numbers, draws, place, images):
    """Strange data sets with every split, every network that is fast, and several methods."""
    tally, (legal, illegal) = Tally(), strange_data(draws)
    others = [{"partition": split} for split in parts("partition")]
    others += [{"model": model} for model in ("mlp", "convnet")]
    others += [{"algo": a} for a in ("fedsynsam", "labelcal", "oracle", "fedga", "fedsynth")]
    others += [{"visit": "vmap"}, {"augment": True}, {"local_epochs": 1}, {"average": "size"}]
    jobs = [(what, arrays, part) for what, arrays in legal.items() for part in others]
    jobs += [(what, arrays, {}) for what, arrays in illegal.items()]
    random.Random(0).shuffle(jobs)
    for what, arrays, part in jobs[numbers.start : numbers.stop : numbers.step]:
        path = place / "strange.npz"
        np.savez(path, **arrays)
        some = {"val": 0, "min_size": 1} | part
        settings = run_settings(str(path), some.pop("algo", "fedavg"), rounds=3, **some)
        if part.get("partition") != "dirichlet-class":
            settings.pop("min_size")
        flags = [f"--{name}" for name, value in settings.items() if value is True]
        words = run_words({n: value for n, value in settings.items() if value is not True})
        code, _, err = command(place, *words, *flags, "--out", place / "runs")
        fine = (
            code == 0 or one_line(code, err, (1, 2))
            if what in legal
            else (one_line(code, err, [2]) and "strange.npz" in err)
        )
        tally.check(fine, f"{what}, {part}: exit code {code}, {err}")
        tally.counts["data sets"] += 1
        tally.counts["data sets refused"] += code == 2
        shutil.rmtree(place / "runs", ignore_errors=True)
    return tally


# ------------------------------------------------------------------------------------------ clients

SHARE = 0.3


class Misbehaving(faults.Tolerant):
    """Tolerant, and 30 % of the clients of a round send something else than they should."""

    def encode(self, work, i, sent, mine, received, batches):
        g = fl.rng(self.method.seed, "misbehaving", self.t, i)
        chance, how = torch.rand(2, generator=g).tolist()
        if chance >= SHARE:
            return super().encode(work, i, sent, mine, received, batches)
        worse = {name: torch.full_like(x, float("nan")) for name, x in sent.items()}
        if how < 0.2:
            return super().encode(work, i, worse, mine, received, batches)
        buffers, mine = super().encode(work, i, sent, mine, received, batches)
        bad = {name: damaged_buffer(b, random.Random(how))[0][:-1] for name, b in buffers.items()}
        return (bad, {}, None, {"update": None})[int(4 * how)], mine


class Absent(faults.Tolerant):
    """The same clients are absent."""

    def absent(self, i):
        g = fl.rng(self.method.seed, "misbehaving", self.t, i)
        return float(torch.rand((), generator=g)) < SHARE


def clients(numbers, draws, place, images, rounds=100):
    """Accuracy with clients that misbehave, without them, and if all behave; three seeds."""
    tally, accuracy = Tally(), {Misbehaving: [], Absent: [], faults.Tolerant: []}
    for seed in range(3):
        settings = run.resolve(
            **dict(algo="scaffold", model="mlp", hidden=16, clients=20, local_steps=5, seed=seed),
            **dict(on_bad_client="drop", visit="plain", rounds=rounds),
            **dict(partition="dirichlet", alpha=0.5, lr=0.2, last=5),
        )
        federations = {}
        for kind, found in accuracy.items():
            federation, sets = run.compose(settings)
            federation.__class__ = kind
            federations[kind] = federation
            for _ in range(rounds):
                federation.round()
                left_out = len(federation.left_out) * (kind is Misbehaving)
                tally.counts["clients left out"] += left_out
            test = sets.test._replace(x=sets.test.x[:1000], y=sets.test.y[:1000])
            found.append(run.task.evaluate(federation.task.apply, federation.w, test)[1])
        same = check_method.same(federations[Misbehaving].w, federations[Absent].w)
        tally.check(same, "rounds without those that misbehave end with other bits")
        tally.counts["rounds"] += rounds
    means = {kind.__name__: statistics.fmean(found) for kind, found in accuracy.items()}
    tally.counts.update({f"accuracy, {name}": round(mean, 4) for name, mean in means.items()})
    spread = max(map(statistics.stdev, accuracy.values()))
    near = abs(means["Misbehaving"] - means["Tolerant"]) < 0.02 + 2 * spread
    tally.check(near, f"the accuracy suffers: {means}")
    return tally


# ----------------------------------------------------------------------------------------- together

PARTS = {part.__name__: part for part in (kills, buffers, files, options, data, clients)}


def share(job):
    """One share of the work: (part, numbers, small) -> (part, counts, what went wrong, seconds)."""
    name, numbers, small = job
    began, more = time.monotonic(), {"rounds": 5} if small and name == "clients" else {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        images = run_write_images(Path(place) / "tiny.npz")
        draws = random.Random(numbers.start)
        tally = PARTS[name](numbers, draws, Path(place), images, **more)
    return name, tally.counts, tally.wrong, time.monotonic() - began


def stress(names, small=False):
    """Do these parts -> {name: counts}, and "wrong": what went wrong."""
    counts, report = SMALL if small else COUNTS, {"wrong": []}
    jobs = []
    for name in names:
        shares = 1 if small or name == "clients" else CORES
        jobs += [(name, range(k, counts.get(name, 1), shares), small) for k in range(shares)]
    with ProcessPoolExecutor(CORES, mp_context=get_context("fork")) as pool:
        for name, found, wrong, seconds in pool.map(share, jobs):
            before = collections.Counter(report.get(name, {}))
            report[name] = dict(before + found + collections.Counter(seconds=round(seconds)))
            report["wrong"] += wrong
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--small", action="store_true", help="a little of each; writes nothing")
    given = parser.parse_args(argv)
    for name in set(given.parts) - set(PARTS):
        parser.error(f"{name} is no part; {closest(name, list(PARTS))}")
    report = stress(given.parts or list(PARTS), given.small)
    text = json.dumps(report | {"machine": machine()}, indent=1)
    print(text)
    if not given.small and not given.parts:
        write(HERE / "results" / "stress.json", text + "\n")
    return int(bool(report["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
