"""Experiments: put the parts together, run, write everything down, continue after a kill, compare.

    python run.py                                    FedSynSAM on the bundled images, 100 clients
    python run.py --algo fedavg fedsynsam --seeds 3  a comparison: mean and standard deviation
    python run.py --resume runs/NAME                 continue a run or a comparison
    python run.py --quick                            the same job at a tenth of the size
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
never that of its best round. Exit codes: 0 done, 1 a run failed, 2 wrong input, 130 interrupted.
"""

import argparse
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

if __name__ == "__main__":  # Ctrl-C during the slow imports: end, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fl
import sam
from scale import faults, visits
from vision import data, models, plots, split, task

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder, and works without
    fcntl = None

HERE = Path(__file__).parent

# ---------------------------------------------------------------------------------- the settings


class Run:
    """The settings of a run that belong to no other part."""

    algo: Annotated[str, "method"] = "fedsynsam"
    compress: Annotated[str, "compressor of the updates"] = "qsgd"
    model: Annotated[str, "network"] = "cnn"
    partition: Annotated[str, "how the images are split over the clients"] = "dirichlet"
    dataset: Annotated[str, "bundled, a name that torchvision knows, or a file .npz"] = "bundled"
    val: Annotated[int, "training images held out for tuning", 0, None] = 1000
    clients: Annotated[int, "number of clients N", 1, None] = 100
    rounds: Annotated[int, "rounds T", 1, 10**7] = 60
    seed: Annotated[int, "seed of all random choices but the validation images", 0, 10**9] = 0
    eval_every: Annotated[int, "rounds between evaluations", 1, None] = 2
    last: Annotated[int, "the result is a mean over so many last evaluations", 1, None] = 5
    measure_images: Annotated[int, "training images for loss and eigenvalue", 1, None] = 2000


class Machine:
    """The settings that change seconds and not the experiment (and threads, chunk of scale/)."""

    device: Annotated[Literal["auto", "cpu", "cuda"], "where to compute"] = "auto"
    visit: Annotated[Literal["auto", "plain", "threads", "vmap"], "how clients are visited"] = (
        "auto"
    )
    checkpoint_every: Annotated[int, "rounds between checkpoints", 1, None] = 5


MACHINE = (Machine, visits.Threads, visits.Vmap)


class Setting(NamedTuple):
    """A declared setting. lowest and highest are legal; None is no limit."""

    type: type
    meaning: str
    lowest: float | None
    highest: float | None
    default: object


def settings_of(part):
    """The settings that a class (with its parents) or a function declares: {name: Setting}."""
    hints = get_type_hints(part, include_extras=True)
    if inspect.isclass(part):
        hints |= get_type_hints(part.__init__, include_extras=True)
    parameters = inspect.signature(part).parameters
    settings = {}
    for name, hint in hints.items():
        if get_origin(hint) is Annotated:
            meaning, lowest, highest = (*hint.__metadata__, None, None)[:3]
            default = parameters[name].default if name in parameters else getattr(part, name)
            settings[name] = Setting(hint.__origin__, meaning, lowest, highest, default)
    return settings


def check(name, value, setting):
    """The value, in the type of the setting; ValueError if it is not legal."""
    kind, _, lowest, highest, _ = setting
    words = get_args(kind)  # of a Literal
    if words and value not in words:
        raise ValueError(f"{name} = {value!r} is unknown; {closest(value, words)}")
    if kind is float and type(value) is int and abs(value) < 1e30:
        value = float(value)
    if not words and type(value) is not kind:
        raise ValueError(f"{name} = {value!r} is no {kind.__name__}")
    if kind in (int, float):
        low = -1e30 if lowest is None else lowest
        high = {int: 2**31, float: 1e30}[kind] if highest is None else highest
        if not low <= value <= high:  # written so, it refuses nan too
            legal = f"in {low:g}..{high:g}" if highest is not None else f"at least {low:g}"
            raise ValueError(f"{name} = {value} is out of range; it must be {legal}")
    return value


def changes_seconds(name):
    """Is this a setting that changes seconds and not the experiment?"""
    return any(name in settings_of(part) for part in MACHINE)


def closest(word, known):
    """A hint for a word that is not among the known ones: the most similar ones, or all."""
    near = difflib.get_close_matches(str(word).lower(), known, 3, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


# ------------------------------------------------------------------------------------- the parts

PLACES = {
    "algo": ("fl", "methods"),
    "compress": ("compress", "codes"),
    "model": ("vision.models",),
    "partition": ("vision.split",),
}


def is_part(kind, thing):
    """Is this member of a module a method, a compressor, a network or a split?"""
    if kind == "partition":
        first = ["labels", "N", "rng"]
        return inspect.isfunction(thing) and [*inspect.signature(thing).parameters][:3] == first
    if not inspect.isclass(thing):
        return False
    if kind == "model":
        return "image_shape" in inspect.signature(thing).parameters
    return issubclass(thing, fl.FedAvg) if kind == "algo" else hasattr(thing, "encode")


def name_of(part):
    """The name of a part on the command line: FedLESAM_S is fedlesam-s."""
    return part.__name__.lower().replace("_", "-")


def parts(kind):
    """All parts of a kind ("algo", "compress", "model", "partition"): {name: class or function}."""
    found = {}
    for place in PLACES[kind]:
        files = sorted((HERE / place).glob("[!_]*.py"))
        for module in [f"{place}.{file.stem}" for file in files] or [place]:
            for thing in vars(importlib.import_module(module)).values():
                if getattr(thing, "__module__", None) == module and is_part(kind, thing):
                    found[name_of(thing)] = thing
    return found


def find(kind, name):
    """A part: itself, by its name, as FILE.py:NAME, or two methods combined as NAME+NAME."""
    if not isinstance(name, str):
        return name
    path, colon, member = name.rpartition(":")
    if colon:
        return from_file(kind, Path(path), member)
    known = parts(kind)
    if kind == "algo" and "+" in name:
        return combined(name)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, known)} (or FILE.py:NAME)")
    return known[name]


def combined(name):
    """The class NAME+NAME, whose parents are these methods."""
    parents = tuple(find("algo", word) for word in name.split("+"))
    try:
        return type(name, parents, {})
    except TypeError:  # of several kinds, and in several lines
        message = "cannot be combined: one of them is there twice, or is a parent of a later one"
        raise ValueError(f"{name} {message}") from None


def from_file(kind, path, member):
    """The part called `member` in a file of the reader's own."""
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"there is no file {path} of Python code")
    label = "reader_" + path.stem  # a file called sam.py must not replace ours
    text, loaded = path.read_bytes(), sys.modules.get(label)
    if loaded is None or loaded.text != text:  # otherwise its classes must stay the same objects
        loaded = sys.modules[label] = import_file(label, path)
        loaded.text = text
    part = getattr(loaded, member, None)
    if part is None or not is_part(kind, part):
        raise ValueError(f"{path} has no {kind} called {member!r}")
    return part


def import_file(label, path):
    """The module in a file, under another name."""
    spec = importlib.util.spec_from_file_location(label, path.absolute())
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


def owners(given):
    """Everything that declares settings in a run with these parts."""
    chosen = [find(kind, given.get(kind, getattr(Run, kind))) for kind in PLACES]
    return [Run, *chosen, fl.Federation, faults.Tolerant, task.Images, *MACHINE]


def resolve(**given):
    """All settings of a run, checked, the defaults filled in: {name: value}.

    Raises ValueError for a setting that no part of the run has, or a value that is not legal.
    """
    settings = {}
    for part in owners(given):
        for name, setting in settings_of(part).items():
            value = given.get(name, setting.default)
            settings[name] = value if name in PLACES else check(name, value, setting)
    for name in given:
        if name not in settings:
            raise ValueError(f"{name} is no setting of this run; {who_has(name, settings)}")
    T = settings["rounds"]
    if settings.get("warmup", 0) >= T:
        raise ValueError(f"warmup = {settings['warmup']} must be below the number of rounds, {T}")
    return settings


def who_has(name, known):
    """A hint about a setting that this run has not: which parts have it, or a similar name."""
    name, having = name.replace("-", "_"), []
    for kind in PLACES:
        for label, part in parts(kind).items():
            if name in settings_of(part):
                having.append(f"{kind} {label}")
    if having:
        return f"it belongs to {', '.join(having)}"
    return closest(name, sorted(filter(None, known)))


def quick(settings):
    """The same job at a tenth of the size, for a first look and for tests."""
    least = {"rounds": 3, "warmup": 2, "outer_steps": 5, "fs_steps": 5, "measure_images": 100}
    small = {n: max(low, round(settings[n] / 10)) for n, low in least.items() if n in settings}
    if "warmup" in settings:
        small["warmup"] = min(small["warmup"], small["rounds"] - 1)
        small["window"] = min(settings["window"], small["warmup"])
        small["resynthesize"] = math.ceil(settings["resynthesize"] / 10)
    return settings | small | {"last": 1}


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
    m, N = settings["participation"], len(clients)  # the data may bring its own clients
    if m > N:
        raise ValueError(f"participation = {m} is out of range; it must be in 1..{N} clients")
    learnt = task.Images(model, images.train, clients, **of(task.Images))
    compressor = compressor(**of(compressor))
    compressor.encode(model.w0)  # k of top-k, for instance, may not fit
    visitor, how = visitor_of(settings, device)
    method = method(learnt, seed, **of(method))
    return visitor(method, compressor, **of(fl.Federation), **how), images


def device_of(wanted):
    """The torch.device, set up so that numbers do not depend on threads and are true float32."""
    torch.set_num_threads(1)  # one core for one operation; the threads of scale/ use the others
    torch.backends.cudnn.allow_tf32 = False
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and not gpus:
        raise ValueError("device = cuda, but torch sees no GPU here; use auto or cpu")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    torch.cuda.set_device(device)
    return device


def visitor_of(settings, device):
    """How the clients of a round are visited: (a class like fl.Federation, its arguments)."""
    how = settings["visit"]
    if how == "auto":
        how = "vmap" if device.type == "cuda" else "threads"
    alone = {"plain": fl.Federation, "threads": visits.Threads, "vmap": visits.Vmap}
    ranks = {"plain": visits.Ranks, "threads": visits.ThreadRanks, "vmap": visits.VmapRanks}
    wanted = {"plain": (), "threads": ("threads",), "vmap": ("chunk",)}[how]
    visitor = (ranks if "WORLD_SIZE" in os.environ else alone)[how]
    if settings["on_bad_client"] == "drop" or settings["dropout"]:
        visitor = type("Tolerant" + visitor.__name__, (faults.Tolerant, visitor), {})
        wanted += ("on_bad_client", "dropout")
    return visitor, {name: settings[name] for name in wanted}


# ------------------------------------------------------------------------------------------ a run


class Outcome(NamedTuple):
    """What a run gives: the dict of result.json, the rows of log.jsonl, and what it ended with."""

    result: dict
    log: list
    federation: fl.Federation
    data: data.Dataset


def experiment(folder=None, *, watch=None, **settings):
    """One run, with or without a folder -> Outcome.

    A folder is made if it is not there. If it holds a run with the same settings, that is
    continued; if it is finished, it is read. watch(federation) is called after every round.
    Raises ValueError for wrong input, FloatingPointError if numbers stop being finite.
    """
    settings, folder = resolve(**settings), folder and Path(folder)
    federation, images = compose(settings)
    config = described(settings, images)
    sample = measured_images(images.train, settings["measure_images"])
    with workplace(folder) as place, explained(settings):
        agree(place / "config.json", config)
        log, seconds = restore(folder or place, federation, config["hash"])
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
            seconds = {"seconds": time.perf_counter() - began}
            result = result_of(config, federation, log, sample) | seconds
            if place == folder:
                draw(place, federation, log, config["label"], images)
            write_json(place / "result.json", result)
        result = read_result(place / "result.json", config)
        return Outcome(result, log, federation, images)


@contextlib.contextmanager
def explained(settings):
    """If a number stops being finite, say also which settings are not the defaults."""
    try:
        yield
    except FloatingPointError as error:
        declared = [item for part in owners(settings) for item in settings_of(part).items()]
        floats = {name for name, s in declared if s.type is float and settings[name] != s.default}
        chosen = ", ".join(f"{name} = {settings[name]:g}" for name in sorted(floats))
        more = f"not the defaults: {chosen}" if chosen else "all settings of type float: defaults"
        raise FloatingPointError(f"{error}; {more}") from None


def add_line(path, row):
    """Add a dict to log.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def row_of(federation, images, sample, settings):
    """What the log says of the round that has just ended: {name: number}."""
    t = federation.t
    row = {"round": t, "up": federation.bytes_up, "down": federation.bytes_down}
    if getattr(federation, "left_out", None):
        row["left_out"] = federation.left_out
    if t % settings["eval_every"] == 0 or t == settings["rounds"]:
        for name, some in (("train", sample), ("val", images.val), ("test", images.test)):
            if len(some.y):
                apply, each = federation.task.apply, each_of(federation)
                loss, accuracy = task.evaluate(apply, federation.w, some, each=each)
                row |= {f"{name}_loss": loss, f"{name}_acc": accuracy}
        if not math.isfinite(row["train_loss"]):
            where = f"after {t} rounds (|w_j| up to {federation.w.abs().max():.2g})"
            raise FloatingPointError(f"{where}: the training loss is {row['train_loss']}")
    return row


def each_of(federation):
    """The `map` of the federation's threads, or the usual one."""
    return federation.pool.map if hasattr(federation, "pool") else map


def measured_images(train, n):
    """n training images, the same for all seeds and methods."""
    chosen = torch.randperm(len(train.y), generator=fl.rng(0, "measure"))[:n].to(train.y.device)
    return train._replace(x=train.x[chosen], y=train.y[chosen])


def result_of(config, federation, log, sample):
    """The dict of result.json, but for the seconds, of a run that has made all its rounds."""
    settings, d = config["settings"], len(federation.w)
    last = [row for row in log if "train_loss" in row][-settings["last"] :]
    sent = settings["rounds"] * settings["participation"] * d
    return {
        "algo": settings["algo"],
        "seed": settings["seed"],
        "settings": config["hash"],
        "d": d,
        **{key: statistics.fmean(row[key] for row in last) for key in last[0] if "_" in key},
        "averaged": [row["round"] for row in last],
        "eigenvalue": eigenvalue(federation, sample),
        "measured_on": len(sample.y),
        "matching_loss": federation.method.state.get("matching"),
        "up": federation.bytes_up,
        "down": federation.bytes_down,
        "bits": 8 * federation.bytes_up / sent,
    }


def read_result(path, config):
    """The dict of result.json.  ValueError if it is damaged, or of another run."""
    result = read_json(path, sealed=True)
    if result["settings"] != config["hash"]:
        raise ValueError(f"{path} is of another run")
    return result


def eigenvalue(federation, images):
    """The largest Hessian eigenvalue of the mean cross-entropy of images, at the global model."""
    w, apply, n = federation.w, federation.task.apply, len(images.y)

    def share_of(x, y):
        return lambda v: cross_entropy(apply(v, x), y, reduction="sum") / n

    losses = [share_of(batch.x, batch.y) for batch in images.chunks(100)]
    return sam.largest_eigenvalue(sam.hessian(losses, w, each=each_of(federation)), w)


# ------------------------------------------------------------------------------- the run's folder


def first_rank():
    """Is this the process that writes and prints? Of several under torchrun, it is rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def workplace(folder):
    """Where this process writes: the run's folder, locked; a temporary one if there is none."""
    if folder is None or not first_rank():
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another process") from None
    finally:
        os.close(handle)


def described(settings, images):
    """The dict of config.json: all that the numbers depend on, a hash of that, and the machine."""
    labels = {kind: label_of(kind, settings[kind]) for kind in PLACES}
    files = [Path(label.rpartition(":")[0]) for label in labels.values() if ":" in label]
    numbers = {
        "settings": {k: v for k, v in (settings | labels).items() if not changes_seconds(k)},
        "files": {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()},
        "data": digest_of(images),
    }
    digest = checksum(numbers)[:8]
    label = f"{labels['algo'].rpartition(':')[2]}-s{settings['seed']}"
    return numbers | {"hash": digest, "label": label, "machine": machine()}


def label_of(kind, part):
    """How a part is written down: by its name, or as FILE.py:NAME."""
    if isinstance(part, str) or part in parts(kind).values():
        return part if isinstance(part, str) else name_of(part)
    return f"{inspect.getsourcefile(part)}:{part.__name__}"


def digest_of(images):
    """A digest of all images and labels: a run is not continued on other data."""
    digest = hashlib.blake2b(digest_size=8)
    for some in (images.train, images.val, images.test):
        digest.update(some.x.cpu().numpy())
        digest.update(some.y.cpu().numpy())
    return digest.hexdigest()


def machine():
    """Versions and hardware."""
    places = (HERE, *(HERE / name for name in ("vision", "methods", "codes", "scale")))
    files = sorted(file for place in places for file in place.glob("*.py"))
    source = b"".join(file.read_bytes() for file in files if file.name != "test_all.py")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "source": hashlib.sha256(source).hexdigest()[:8],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def agree(path, config):
    """Write config.json, or ValueError if there is one of another run."""
    if not path.exists():
        return write_json(path, config)
    ours, theirs = flat(config), flat(read_json(path, sealed=True))
    for name in ours | theirs:  # the settings first, the hash last
        if ours.get(name) != theirs.get(name):
            old, new = theirs.get(name), ours.get(name)
            raise ValueError(f"{path} is of another run: {name} was {old!r}, and is {new!r} now")


def flat(config):
    """Settings, files and data of a config.json in one dict."""
    settings, files = config.get("settings"), config.get("files")
    if not isinstance(settings, dict) or not isinstance(files, dict):
        raise ValueError("config.json has no settings or files")
    return settings | files | {name: config.get(name) for name in ("data", "hash")}


@contextlib.contextmanager
def whole(path):
    """Write a file of bytes in one piece: it is there whole, or as it was before."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except RuntimeError as error:  # so torch.save calls a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def write(path, text):
    """Write a file of text in one piece."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path, content):
    """Write a dict, and its checksum with it."""
    write(path, json.dumps(content | {"checksum": checksum(content)}, indent=1) + "\n")


def checksum(content):
    """The SHA-256 of a dict that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path, sealed=False):
    """The dict in a file; sealed: as `write_json` wrote it.  ValueError that names the file."""
    try:
        if path.exists() and not path.is_file():  # a pipe, for instance, would be waited for
            raise ValueError("it is no file")
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if sealed and content.pop("checksum", None) != checksum(content):
            raise ValueError("its checksum is wrong")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


CHECKPOINT = ("w", "t", "bytes_up", "bytes_down", "memory", "informed")  # of a Federation


def save(place, federation, log, digest, seconds):
    """Write checkpoint.pt in one piece: what the next rounds depend on, and the log so far."""
    held = {name: getattr(federation, name) for name in CHECKPOINT}
    more = {"state": federation.method.state, "log": log, "hash": digest, "seconds": seconds}
    with whole(place / "checkpoint.pt") as file:
        torch.save(held | more, file)


def restore(place, federation, digest):
    """Go back to checkpoint.pt if there is one: (rows of the log, seconds that the run has taken).

    The checkpoint holds the log, so the two cannot disagree after a kill. ValueError if the file is
    damaged (torch.load does not look at the checksums in it), of another run, or if what it holds
    does not fit. It loads no code.
    """
    path = place / "checkpoint.pt"
    if not path.exists():
        return [], 0.0
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        stored = torch.load(path, map_location=federation.w.device, weights_only=True)
        if stored["hash"] != digest:
            raise ValueError("it is of another run")
        for name in CHECKPOINT:
            setattr(federation, name, stored[name])
        federation.method.state = stored["state"]
        if not fits(federation, stored["log"]):
            raise ValueError("what it holds is not what a run writes")
        return stored["log"], float(stored["seconds"])
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is of no use: {error}") from None


def fits(federation, log):
    """Has the federation the shapes and types that rounds give it, and the log a row for each?"""
    f, clients = federation, range(len(federation.weights))
    received = f.method.broadcast(f.w) | f.method.broadcast_once()
    at_first = f.recall(None, received)  # what a client remembers before its first round
    end = log[-1] if log else {"round": 0, "up": 0, "down": 0}
    return (
        alike(f.w, f.task.w0)
        and f.w.isfinite().all()
        and len(log) == f.t == end["round"]
        and (f.bytes_up, f.bytes_down) == (end["up"], end["down"])
        and all(i in clients and alike(mine, at_first) for i, mine in f.memory.items())
        and f.informed <= set(clients)
        and alike(f.method.state, f.method.first_state())
    )


def alike(x, like):
    """Have two things the same names, shapes and types? Nothing may have become anything."""
    if isinstance(like, dict):
        return x.keys() == like.keys() and all(alike(x[name], like[name]) for name in like)
    if isinstance(like, torch.Tensor):
        return (x.shape, x.dtype) == (like.shape, like.dtype)
    return like is None or type(x) is type(like)


def draw(place, federation, log, label, images):
    """curve.png, and synthetic.png if the method learnt images."""
    plots.curve(place / "curve.png", {label: [log]}, label)
    state = federation.method.state
    if state.get("X") is not None:
        plots.grid(place / "synthetic.png", state["X"], state["Y"], images.train)


def stored_settings(folder, **given):
    """The settings of the run in a folder; given: those of the machine may be new.

    A folder is data and never code. If it names a part in a file of the reader's own, that file is
    imported only if the caller names it again, as in algo="mine.py:M".
    """
    settings = read_json(Path(folder) / "config.json", sealed=True).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}/config.json has no settings")
    refuse_code(folder, settings, given.values())
    for name, value in given.items():
        if not changes_seconds(name) and value != settings.get(name):
            raise ValueError(f"{name} = {settings.get(name)} comes from the folder, and stays")
    return settings | given


def refuse_code(folder, settings, given):
    """ValueError if settings from a folder name code that is not among the words given."""
    for kind in PLACES:
        label = settings.get(kind)
        if ":" in str(label) and label not in given:
            raise ValueError(
                f"{folder} uses {label}; to run this code, give {kind} = {label} again"
            )


def stored_runs(folder, given):
    """The runs of the comparison in a folder {name: settings}; given: words of the command."""
    runs = read_json(folder / "comparison.json", sealed=True)
    for label, settings in runs.items():
        if not isinstance(settings, dict) or Path(label).name != label:
            raise ValueError(f"{folder}/comparison.json: {label!r} is no run")
        refuse_code(folder, settings, given)
    return runs


def load(folder, **given):
    """A run as its folder has it: (Federation, Dataset)."""
    settings = resolve(**stored_settings(folder, **given))
    federation, images = compose(settings)
    restore(Path(folder), federation, described(settings, images)["hash"])
    return federation, images


# -------------------------------------------------------------------------- results, comparisons

SHOWN = {  # on the card and in the table: key of the result, factor, digits
    "test accuracy %": ("test_acc", 100, 2),
    "test loss": ("test_loss", 1, 3),
    "training loss": ("train_loss", 1, 3),
    "top eigenvalue": ("eigenvalue", 1, 1),
    "MB up": ("up", 1e-6, 2),
    "MB down": ("down", 1e-6, 2),
    "seconds": ("seconds", 1, 0),
}


def card(result, folder):
    """The result of a run as text."""
    shown = {n: f"{f * result[key]:.{digits}f}" for n, (key, f, digits) in SHOWN.items()}
    shown["test accuracy %"] += f"   (mean of rounds {', '.join(map(str, result['averaged']))})"
    shown["MB up"] += f"   ({result['bits']:.2f} bits a parameter, client and round)"
    if result["matching_loss"] is not None:
        shown["matching loss"] = f"{result['matching_loss']:.3f}   (1: nothing learnt, 0: all)"
    shown |= {"settings": result["settings"], "folder": folder}
    title = f"--- {result['algo']}, seed {result['seed']}, d = {result['d']:,} "
    return "\n".join([title.ljust(80, "-"), *(f"{n:>16}  {text}" for n, text in shown.items())])


def table(results):
    """Markdown: a line a method, mean ± standard deviation over its seeds."""
    lines = ["| method | " + " | ".join(SHOWN) + " | runs |", "| --- " * (len(SHOWN) + 2) + "|"]
    for algo in dict.fromkeys(r["algo"] for r in results):
        runs, cells = [r for r in results if r["algo"] == algo], []
        for key, factor, digits in SHOWN.values():
            values = [factor * r[key] for r in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(runs) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {algo} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def listing():
    """All parts, with what they come from and the first sentence about them."""
    lines = []
    for kind in PLACES:
        lines += ["", f"{kind}:"]
        for name, part in parts(kind).items():
            first = (inspect.getdoc(part) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"  {name:20} {first}")
    return "\n".join(lines[1:])


def runs_of(algos, seeds, given):
    """The runs of a command: {name: settings}. Each run gets those flags that it has a use for.

    `--algo fedavg fedsam --rho 0.05` is fine, although FedAvg has no rho. What no run has is an
    error.
    """
    runs, used = {}, set()
    for algo in algos:
        known = {name for part in owners(given | {"algo": algo}) for name in settings_of(part)}
        mine = {name: value for name, value in given.items() if name in known}
        used |= set(mine)
        for seed in range(mine.get("seed", 0), mine.get("seed", 0) + seeds):
            label = f"{algo.rpartition(':')[2]}-s{seed}"
            runs[label] = resolve(**mine | {"algo": algo, "seed": seed})
    for name in set(given) - used:
        raise ValueError(f"{name} is no setting of this run; {who_has(name, known)}")
    return runs


def compare(folder, runs):
    """Make the runs {name: settings} in folders of their own, then table.md and curve.png.

    A run that fails does not stop the others. Returns the exit code: 1 if one failed.
    """
    results, logs, failed = [], {}, 0
    for name, settings in runs.items():
        try:
            outcome = experiment(folder and folder / name, **settings)
            results.append(outcome.result)
            logs.setdefault(outcome.result["algo"], []).append(outcome.log)
        except (FloatingPointError, ValueError, OSError) as error:
            complain(f"{name}: {error}")
            failed = 1
    if results and first_rank():
        plots.curve(folder / "curve.png", logs, folder.name)
        write(folder / "table.md", table(results) + "\n")
        say(f"{table(results)}\nfolder {folder}")
    return failed


# ----------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError that names the closest flag."""

    def __init__(self, **more):
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **more)

    def error(self, message):
        known = [flag[2:] for action in self._actions for flag in action.option_strings]
        unknown = message.partition("unrecognized arguments: --")[2].split(" ")[0]
        if unknown:
            message = f"{unknown} is no setting of this run; {who_has(unknown, known)}"
        raise ValueError(message)


def parser(given):
    """The flags of the parts that are given; a flag that is not used stays absent."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--algo", nargs="+", metavar="METHOD", help="one or more methods")
    p.add_argument("--seeds", type=int, metavar="n", help="runs a method: seed, seed + 1, ...")
    p.add_argument("--name", help="name of the folder")
    p.add_argument("--out", type=Path, metavar="DIR", help="where folders are made (default runs)")
    p.add_argument("--resume", type=Path, metavar="DIR", help="continue this run or comparison")
    p.add_argument("--list", action="store_true", help="print all parts")
    p.add_argument("--quick", action="store_true", help="the same job at a tenth of the size")
    done = {"algo"}
    for algo in given.get("algo", [Run.algo]):
        for part in owners(given | {"algo": algo}):
            group = p.add_argument_group(name_of(part))
            for name, setting in settings_of(part).items():
                if name not in done:
                    add_flag(group, name, setting)
                done.add(name)
    return p


def add_flag(group, name, setting):
    """The flag --NAME of a setting."""
    flag, text = "--" + name.replace("_", "-"), f"{setting.meaning} (default {setting.default})"
    words = get_args(setting.type)
    if setting.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif words:
        group.add_argument(flag, metavar="|".join(words), help=text)
    else:
        group.add_argument(flag, type=setting.type, metavar=setting.type.__name__, help=text)


def read_command(argv):
    """The command line as {name: value}, in two steps: which parts, and then their flags."""
    first = Parser(add_help=False)
    first.add_argument("--algo", nargs="+")
    for kind in ("compress", "model", "partition"):
        first.add_argument("--" + kind)
    which, _ = first.parse_known_args(argv)
    return vars(parser(vars(which)).parse_args(argv))


def new_folder(root, name, fallback):
    """A new folder root/name, or root/fallback, root/fallback-2, ...: nothing is overwritten."""
    if name is not None and (Path(name).name != name or name == ".."):
        raise ValueError(f"name = {name!r} is no plain folder name; --out says where it goes")
    for n in range(1, 10**6):
        folder = root / (name or (fallback if n == 1 else f"{fallback}-{n}"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if name:
                raise ValueError(
                    f"{folder} exists; choose another --name, or --resume it"
                ) from None
        except OSError as error:
            raise ValueError(f"{folder} cannot be made: {error.strerror}") from None


def job_of(given):
    """What a command asks for: (folder, {name: settings} of its runs, is it a comparison?)."""
    root, name = given.pop("out", Path("runs")), given.pop("name", None)
    small, folder = given.pop("quick", False), given.pop("resume", None)
    algos, seeds = given.pop("algo", []), given.pop("seeds", 1)
    if folder and (folder / "comparison.json").exists():
        return folder, stored_runs(folder, [*algos, *given.values()]), True
    if folder:
        given |= {"algo": algo for algo in algos}
        return folder, {folder.name: stored_settings(folder, **given)}, False
    if not 1 <= seeds <= 1000:
        raise ValueError(f"seeds = {seeds} is out of range; it must be in 1..1000")
    runs = runs_of(algos or [Run.algo], seeds, given)
    if small:
        runs = {label: quick(settings) for label, settings in runs.items()}
    several = len(runs) > 1
    for settings in list(runs.values())[:1]:
        compose(settings)  # so that wrong input is found before a folder is made
    if first_rank():
        folder = new_folder(root, name, "comparison" if several else next(iter(runs)))
        if several:
            write_json(folder / "comparison.json", runs)
    return folder, runs, several


def say(text, file=None):
    """Print. If nobody can receive it (a closed pipe, a full disk), the work goes on."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError:  # Python tries once more at the end, and then it must work
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def complain(text):
    """One line for the user."""
    if first_rank():
        say("run.py: " + " ".join(str(text).split()), sys.stderr)


def way_on(folder):
    """What to do about a run that was cut off."""
    names = ("config.json", "comparison.json")
    if folder and any((folder / name).exists() for name in names):
        return f"continue with: python run.py --resume {shlex.quote(str(folder))}"
    return "there is nothing to continue"


def main(argv=None):
    """The command: exit code 0, 1, 2 or 130."""
    folder = None
    try:
        given = read_command(argv)
        if "list" in given:
            say(listing())
            return 0
        folder, runs, several = job_of(given)
        if several:
            return compare(folder, runs)
        (settings,) = runs.values()
        outcome = experiment(folder, **settings)
        if first_rank():
            say(card(outcome.result, folder))
        return 0
    except (ValueError, IsADirectoryError) as error:
        complain(error)
        return 2
    except FloatingPointError as error:  # it would happen again
        complain(error)
        return 1
    except (OSError, MemoryError, torch.OutOfMemoryError, visits.Lost) as error:
        complain(f"{error}; {way_on(folder)}")
        return 1 if folder or isinstance(error, visits.Lost) else 2
    except KeyboardInterrupt:
        complain(f"interrupted; {way_on(folder)}")
        return 130
    finally:
        visits.leave()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
