"""A run and its folder: compose, execute, write down, cut off and continue.

runs/NAME/ holds config.json (all settings, versions, hardware), log.jsonl (a line a round, written as it happens),
checkpoint.pt, and at the end result.json, curve.png and synthetic.png. Nothing in it depends on the clock except `seconds`
in result.json, so a run that was killed at any moment and continued ends with the same bytes in its log and the same bits
in its weights (on a CPU, with any number of threads): a checkpoint is replaced in one piece and knows how long the log
was when it was written; what was logged later is cut off and logged again.  Read next: study.py.
"""
import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time

import numpy
import torch
from tqdm import tqdm

import baselines
import config
import data
import fl
import loop
import models
import presets
import ranks
import sharpness
import split
import synth
import tasks
from config import Config
from tools import plot

try:
    import fcntl
except ImportError:                                     # Windows has no flock; runs work there without the lock
    fcntl = None

HERE = pathlib.Path(__file__).parent


class UserError(ValueError):
    """Wrong input: one helpful line, exit code 2."""


class Busy(UserError):
    """Another process is at work in the folder."""


# ----------------------------------------------------------------------------------------------------- composition
def device_of(cfg):
    """The torch device that the settings name, a GPU of its own for each process; ValueError for cuda without a GPU."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no GPU here; use auto or cpu")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())


def threads_of(cfg):
    """CPU threads of all processes of the run on this computer: the setting, or all cores it may use."""
    return cfg.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def compose(cfg):
    """From settings to things: load images, split them, build w0 [d], compressor and loop -> (Dataset, Federation).

    Raises ValueError for anything in the settings that cannot work.
    """
    device, threads = device_of(cfg), max(1, threads_of(cfg) // ranks.local_size())
    torch.set_num_threads(1)           # one core for one operation: the numbers do not depend on how many there are; the pool uses them
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():   # the call alone imports for two seconds
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # what torch asks for on a GPU
        torch.use_deterministic_algorithms(cfg.deterministic)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False                                # a GPU's convolutions in true float32, as on a CPU
    images = data.load(cfg.dataset, cfg.val, device)
    model = models.build(cfg.model, images.train.x.shape[1:], len(images.train.classes), cfg.width, cfg.hidden, cfg.seed, device,
                         depth=cfg.depth, stem=cfg.stem)
    parts = split.partition(images.train.y, cfg.clients, cfg.partition, cfg.alpha, cfg.classes_per_client, cfg.min_size, cfg.seed)
    task = tasks.Task(model, images.train, parts, cfg)
    chunk = cfg.chunk or (1 if device.type == "cpu" or cfg.compile else cfg.participation)
    workers = threads if device.type == "cpu" else 1
    return images, loop.Federation(baselines.METHODS[cfg.algo](task, cfg), config.compressor(cfg, len(model.w0)), workers, chunk)


def machine():
    """Versions and hardware, for config.json -> dict."""
    code = b"".join((HERE / f).read_bytes() for f in sorted(p.name for p in HERE.glob("*.py") if not p.name.startswith("test")))
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": importlib.metadata.version("torchvision"),
            "numpy": numpy.__version__, "system": platform.platform(), "processor": (names or [platform.processor()])[0],
            "cores": os.cpu_count(), "source": hashlib.sha256(code).hexdigest()[:8],
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


# -------------------------------------------------------------------------------------------------- folder of a run
def write(path, text):
    """Write a small file in one piece: it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def new_folder(root, name, fallback, file, text):
    """Make root/name (UserError if it exists), or root/fallback, root/fallback-2, ..., with one file in it, in one piece.

    The folder is filled under another name and then renamed, so that it is never there without its settings.
    -> its path.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as outer:
            hidden = pathlib.Path(outer) / "run"
            hidden.mkdir()
            write(hidden / file, text)
            for n in range(1, 10**6):
                folder = root / (name or (fallback if n == 1 else f"{fallback}-{n}"))
                if not folder.exists():
                    try:
                        hidden.rename(folder)
                        return folder
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):       # another process was faster
                            raise
                if name:
                    raise UserError(f"{folder} exists and is not overwritten; choose another --name, or continue it with --resume {folder}")
    except OSError as error:
        raise UserError(f"cannot make a folder in {root}: {error.strerror}") from None


def read_settings(folder):
    """(Is it a single run?, its Configs) of a run's or comparison's folder; UserError if it is neither."""
    path = folder / "comparison.json"
    try:
        single = not path.exists()
        path = folder / "config.json" if single else path
        stored = json.loads(path.read_text())
        return single, [Config(**s).check() for s in ([stored["settings"]] if single else stored)]
    except OSError:
        raise UserError(f"{folder} is no run folder: it has no config.json (runs here: {runs_beside(folder)})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not from this version of the project: {error}") from None


def runs_beside(folder):
    """Names of the run folders beside `folder`, for error messages."""
    found = sorted(p.parent.name for p in folder.parent.glob("[!.]*/config.json")) if folder.parent.is_dir() else []
    return ", ".join(found[:8]) or "none"


def save(folder, fed, seconds, log_length):
    """Write checkpoint.pt in one piece: w [d], the method's and the clients' memory, counters, the log's length."""
    method = {k: v for k, v in vars(fed.method).items() if k not in ("task", "cfg", "functional")}
    state = {"settings": fed.cfg.hash(), "t": fed.t, "w": fed.w, "move": fed.move, "up": fed.up, "down": fed.down, "method": method,
             "table": fed.memory.table, "slot": fed.memory.slot, "holders": sorted(fed.holders), "parcel": fed.parcel, "seconds": seconds, "log": log_length}
    with open(folder / "checkpoint.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def restore(folder, fed):
    """Continue from checkpoint.pt if there is one -> (seconds so far, length of the log then).  w [d] and all else as saved.

    UserError if the file is damaged or belongs to other settings. Loads no code (weights_only).
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0.0, 0
    try:
        with torch.serialization.safe_globals([synth.Synthetic]):
            state = torch.load(path, map_location=fed.w.device, weights_only=True, mmap=fed.memory.file is not None)
        if state["settings"] == fed.cfg.hash():
            fed.t, fed.w, fed.move, fed.up, fed.down, fed.parcel = (state[k] for k in ("t", "w", "move", "up", "down", "parcel"))
            fed.memory.restore(state["table"], state["slot"])
            fed.holders = set(state["holders"])
            vars(fed.method).update(state["method"])
            return state["seconds"], state["log"]
    except Exception as error:                                    # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    raise UserError(f"{path} belongs to other settings than {folder}/config.json")


# ------------------------------------------------------------------------------------------------------------ a run
def execute(folder, cfg, label="", made=None, figures=True):
    """Do the run of `folder`, from its checkpoint if it has one -> the dict of result.json; made: compose(cfg), if done already.

    figures: draw curve.png and synthetic.png at the end, too.

    Among several ranks all do the rounds, rank 0 alone touches the folder. Raises loop.Diverged or FloatingPointError if
    numbers stop being finite; the log is kept.
    """
    done = ranks.tell(ranks.served(lambda: finished(folder)))
    if done is not None:
        return done
    images, fed = made or compose(cfg)
    rows, first = measured_rows(fed), ranks.rank() == 0
    log, seconds = ranks.served(lambda: reopen(folder, fed)) or (contextlib.nullcontext(), 0.0)
    fed.share_state()
    started = time.perf_counter() - seconds
    with log, tqdm(total=cfg.rounds, initial=fed.t, desc=label or cfg.algo, disable=None if first else True) as bar:
        while fed.t < cfg.rounds:
            synthesised = fed.round(progress=first)
            line = {"round": fed.t, "lr": fed.lr(fed.t - 1), "move": float(fed.move.norm()), "up": fed.up, "down": fed.down, **fed.report}
            measure = cfg.measure_every and fed.t % cfg.measure_every == 0
            if measure or to_report(cfg, fed.t):
                line |= evaluated(fed, images, rows)
                bar.set_postfix(loss=f"{line['train_loss']:.3f}", acc=f"{line['test_acc']:.3f}", MB=f"{(fed.up + fed.down) / 1e6:.1f}")
            bar.update()
            if measure:
                line |= ranks.served(lambda: sharpness_of(fed, rows)) or {}
            if first:
                log.write(json.dumps(line) + "\n")
                log.flush()
                if fed.t % cfg.checkpoint_every == 0 or fed.t == cfg.rounds or synthesised:
                    os.fsync(log.fileno())              # the log reaches the disk before the checkpoint that counts on it
                    save(folder, fed, time.perf_counter() - started, log.tell())
    return ranks.tell(ranks.served(lambda: conclude(folder, images, fed, rows, time.perf_counter() - started, figures)))


def finished(folder):
    """The dict of result.json, if the run is done; None if not."""
    if not (folder / "result.json").exists():
        return None
    try:
        return json.loads((folder / "result.json").read_text())
    except ValueError:
        raise UserError(f"{folder}/result.json is damaged; delete it and resume to make it again") from None


def reopen(folder, fed):
    """Take the folder for this process and go back to its checkpoint -> (log.jsonl open at that place, seconds so far)."""
    log = open(folder / "log.jsonl", "a+")
    alone(log, folder)
    fed.memory.file = folder / "memory.bin" if fed.cfg.memory_file else None
    seconds, length = restore(folder, fed)
    if log.seek(0, os.SEEK_END) < length:
        raise UserError(f"{folder}/log.jsonl is shorter than its checkpoint says; the folder was changed from outside")
    log.truncate(length)                                # what was logged after the checkpoint will be logged again
    return log, seconds


def conclude(folder, images, fed, rows, seconds, figures=True):
    """The result and the figures of a run that is done -> the dict of result.json."""
    result = measured(folder, fed, rows, seconds)
    if figures:
        plot.curve(folder / "curve.png", {fed.cfg.algo: [read_log(folder)]}, fed.cfg.algo)
    if figures and getattr(fed.method, "synthetic", None) is not None:
        plot.synthetic(folder / "synthetic.png", fed.method.synthetic, images.train)
    if fed.memory.file is not None:
        fed.memory.file.unlink(missing_ok=True)         # the checkpoint holds what was in it
    write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def alone(log, folder):
    """Lock the open log (or any open file) for this process; Busy if another one is working in the folder."""
    if fcntl:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"{folder} is being worked on by another process") from None


def measured_rows(fed):
    """A fixed random sample of training images for loss, eigenvalue and alignment -> numbers [n]."""
    n = len(fed.task.train.y)
    return torch.randperm(n, generator=fl.generator(0, "measure"))[:fed.cfg.measure_images].to(fed.w.device)


def evaluated(fed, images, rows):
    """Loss and accuracy of w [d] on validation and test images, and the loss on the measured training images -> dict."""
    sample = images.train._replace(x=images.train.x[rows], y=images.train.y[rows])
    out = {}
    for name, part in (("train", sample), ("val", images.val), ("test", images.test)):
        out[f"{name}_loss"], out[f"{name}_acc"] = tasks.evaluate(fed.task.apply, fed.w, part, each=fed.pool.map)
    if not math.isfinite(out["train_loss"]):
        raise loop.Diverged(f"round {fed.t}, server: the training loss is {out['train_loss']}. Likely cause: lr = {fed.cfg.lr:g} is too large")
    return out


def to_report(cfg, t):
    """Is round t one of those whose evaluations count for the reported accuracy? measure_every adds evaluations that do not."""
    return t % cfg.eval_every == 0 or t == cfg.rounds


def sharpness_of(fed, rows):
    """Top eigenvalue and alignment at w [d] over the training images `rows` [n] -> dict, for a line of the log and for the result."""
    cfg = fed.cfg
    mix = cfg.mix if 0 < cfg.mix < 1 else 0.5             # at 0 and 1 the mixture is one of its ingredients: show the middle
    align = sharpness.alignment(fed, rows, mix)
    return {"eigenvalue": sharpness.top_eigenvalue(fed.task.apply, fed.w, fed.task.train, rows, each=fed.pool.map),
            "alignment": {k: None if math.isnan(v) else v for k, v in align._asdict().items()}, "mixed_at": mix}


def read_log(folder):
    """The lines of log.jsonl as dicts."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(folder, fed, rows, seconds):
    """What the result card says about a finished run -> dict.  Source: this file's card."""
    cfg, lines = fed.cfg, [x for x in read_log(folder) if to_report(fed.cfg, x["round"])][-fed.cfg.last:]
    mean = lambda key: statistics.fmean(x[key] for x in lines)                                          # noqa: E731
    matching = getattr(fed.method, "matching", [])[-20:]
    return {"algo": cfg.algo, "seed": cfg.seed, "preset": cfg.preset, "published": presets.published(cfg), "settings": cfg.hash(), "d": len(fed.w),
            "test_acc": mean("test_acc"), "val_acc": mean("val_acc"), "train_loss": mean("train_loss"), "test_loss": mean("test_loss"),
            "averaged": [x["round"] for x in lines],
            **sharpness_of(fed, rows), "measured_on": len(rows), "matching_loss": statistics.fmean(matching) if matching else None,
            **{name: mean(name) for name in fed.method.reports}, "up": fed.up, "down": fed.down, "seconds": seconds,
            "ratio": 4 * len(fed.w) * (fed.method.uplinks + fed.method.surveys) * cfg.participation * cfg.rounds / fed.up}


def described(cfg):
    """The text of config.json: all settings, their hash, versions and hardware."""
    return json.dumps({"settings": dataclasses.asdict(cfg), "hash": cfg.hash(), "machine": machine()}, indent=1) + "\n"
