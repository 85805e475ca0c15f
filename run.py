#!/usr/bin/env python3
"""Run federated experiments from the command line; this file parses, composes and prints, the work is done above it.

    python run.py --algo fedsynsam                      one run: bundled images, 100 clients, quantized uplink
    python run.py --algo fedavg fedsynsam --seeds 3     a comparison: one table with mean and standard deviation
    python run.py --resume runs/NAME                    continue a run that was cut off, to bit-identical weights (CPU)
    python run.py --explain fedsynsam                   what a method changes against its parent, from the source itself
    python run.py --quick ...                           the same job at a tenth of the size

Every run has a folder: config.json (all settings, versions, hardware), log.jsonl (a line a round, written as it happens),
checkpoint.pt, result.json, curve.png and synthetic.png (the distilled images). A folder is never overwritten. A comparison
is a folder of such folders with comparison.json, table.md and curve.png. Exit codes: 0 done, 1 a run failed (diverged),
2 wrong input, found before any work.

The result card. accuracy: mean over the last evaluations, never the best one. top eigenvalue: of the Hessian of the training
loss (sharpness.py). alignment: cosine of each estimate of "uphill" to the true global gradient (fl.py). MB: lengths of the
buffers that were really sent.  Read next: test_all.py.
"""
import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time

import numpy
import torch
from tqdm import tqdm

import config
import data
import fl
import models
import sharpness
import synth
from config import Config
from tools import plot

HERE = pathlib.Path(__file__).parent


class UserError(ValueError):
    """Wrong input: one helpful line, exit code 2 (no tensors []).  Source: ours."""


# ----------------------------------------------------------------------------------------------------- composition
def device_of(cfg):
    """The torch device that the settings name; ValueError for cuda without a GPU (no tensors []).  Source: ours."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def threads_of(cfg):
    """CPU threads to use: the setting, or all cores this process may use (no tensors []).  Source: ours."""
    return cfg.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def compose(cfg):
    """From settings to things: load images, split them, build w0 [d], compressor and loop -> (Dataset, Federation).

    Raises ValueError for anything in the settings that cannot work.  Source: ours.
    """
    device = device_of(cfg)
    torch.set_num_threads(threads_of(cfg))
    torch.use_deterministic_algorithms(cfg.deterministic)
    images = data.load(cfg.dataset, cfg.val, device)
    model = models.build(cfg.model, images.train.x.shape[1:], len(images.train.classes), cfg.width, cfg.hidden, cfg.seed, device)
    parts = data.partition(images.train.y, cfg.clients, cfg.partition, cfg.alpha, cfg.classes_per_client, cfg.min_size, cfg.seed)
    task = fl.Task(model, images.train, parts, cfg)
    chunk = cfg.chunk or (1 if device.type == "cpu" else cfg.participation)
    return images, fl.Federation(task, cfg, config.compressor(cfg, len(model.w0)), threads_of(cfg), chunk)


def machine():
    """Versions and hardware, for config.json -> dict (no tensors []).  Source: ours."""
    code = b"".join((HERE / f).read_bytes() for f in sorted(p.name for p in HERE.glob("*.py") if not p.name.startswith("test")))
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "system": platform.platform(),
            "processor": platform.machine(), "cores": os.cpu_count(), "source": hashlib.sha256(code).hexdigest()[:8],
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


# -------------------------------------------------------------------------------------------------- folder of a run
def write(path, text):
    """Write a small file in one piece: it is there whole or not at all (no tensors []).  Source: ours."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def new_folder(root, name, fallback):
    """Make root/name (UserError if it exists), or root/fallback, root/fallback-2, ... (no tensors []).  Source: ours."""
    for n in range(1, 10**6):
        folder = root / (name or (fallback if n == 1 else f"{fallback}-{n}"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if name:
                raise UserError(f"{folder} exists and is not overwritten; choose another --name, or continue it with --resume {folder}") from None
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def read_settings(folder):
    """(Is it a single run?, its Configs) of a run's or comparison's folder; UserError if it is neither (no tensors []).  Source: ours."""
    single = not (folder / "comparison.json").exists()
    path = folder / ("config.json" if single else "comparison.json")
    try:
        stored = json.loads(path.read_text())
        return single, [Config(**s).check() for s in ([stored["settings"]] if single else stored)]
    except OSError:
        raise UserError(f"{folder} is no run folder: it has no config.json (runs here: {runs_beside(folder)})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not from this version of the project: {error}") from None


def runs_beside(folder):
    """Names of the run folders beside `folder`, for error messages (no tensors []).  Source: ours."""
    found = sorted(p.parent.name for p in folder.parent.glob("*/config.json")) if folder.parent.is_dir() else []
    return ", ".join(found[:8]) or "none"


def save(folder, fed, seconds, log_length):
    """Write checkpoint.pt in one piece: w [d], the method's and the clients' memory, counters, the log's length.  Source: ours."""
    method = {k: v for k, v in vars(fed.method).items() if k not in ("task", "cfg")}
    state = {"settings": fed.cfg.hash(), "t": fed.t, "w": fed.w, "move": fed.move, "up": fed.up, "down": fed.down, "method": method,
             "table": fed.memory.table, "slot": fed.memory.slot, "holders": sorted(fed.holders), "seconds": seconds, "log": log_length}
    with open(folder / "checkpoint.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def restore(folder, fed):
    """Continue from checkpoint.pt if there is one -> (seconds so far, length of the log then).  w [d] and all else as saved.

    UserError if the file is damaged or belongs to other settings. Loads no code (weights_only).  Source: ours.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0.0, 0
    try:
        with torch.serialization.safe_globals([synth.Synthetic]):
            state = torch.load(path, map_location=fed.w.device, weights_only=True)
        same = state["settings"] == fed.cfg.hash()
    except Exception as error:                                    # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not same:
        raise UserError(f"{path} belongs to other settings than {folder}/config.json")
    fed.t, fed.w, fed.move, fed.up, fed.down = (state[k] for k in ("t", "w", "move", "up", "down"))
    fed.memory.table, fed.memory.slot, fed.holders = state["table"], state["slot"], set(state["holders"])
    vars(fed.method).update(state["method"])
    return state["seconds"], state["log"]


# ------------------------------------------------------------------------------------------------------------ a run
def execute(folder, cfg, label=""):
    """Do the run of `folder`, from its checkpoint if it has one -> the dict of result.json (no tensors []).

    Raises fl.Diverged or FloatingPointError if numbers stop being finite; the log is kept.  Source: ours.
    """
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    images, fed = compose(cfg)
    rows = measured_rows(fed)
    seconds, length = restore(folder, fed)
    started = time.perf_counter() - seconds
    with open(folder / "log.jsonl", "a+") as log, tqdm(total=cfg.rounds, initial=fed.t, desc=label or cfg.algo, disable=None) as bar:
        log.truncate(length)                            # what was logged after the checkpoint will be logged again
        while fed.t < cfg.rounds:
            synthesised = fed.round(progress=True)
            line = {"round": fed.t, "lr": fed.lr(fed.t - 1), "move": float(fed.move.norm()), "up": fed.up, "down": fed.down}
            if fed.t % cfg.eval_every == 0 or fed.t == cfg.rounds:
                line |= evaluated(fed, images, rows)
                bar.set_postfix(loss=f"{line['train_loss']:.3f}", acc=f"{line['test_acc']:.3f}", MB=f"{(fed.up + fed.down) / 1e6:.1f}")
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update()
            if fed.t % cfg.checkpoint_every == 0 or fed.t == cfg.rounds or synthesised:
                save(folder, fed, time.perf_counter() - started, log.tell())
    result = measured(folder, fed, rows, time.perf_counter() - started)
    lines = read_log(folder)
    plot.curve(folder / "curve.png", {cfg.algo: [lines]}, cfg.algo)
    if getattr(fed.method, "synthetic", None) is not None:
        plot.synthetic(folder / "synthetic.png", fed.method.synthetic, images.train)
    write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def measured_rows(fed):
    """A fixed random sample of training images for loss, eigenvalue and alignment -> numbers [n].  Source: ours."""
    n = len(fed.task.train.y)
    return torch.randperm(n, generator=fl.generator(0, "measure"))[:fed.cfg.measure_images].to(fed.w.device)


def evaluated(fed, images, rows):
    """Loss and accuracy of w [d] on validation and test images, and the loss on the measured training images -> dict.  Source: ours."""
    sample = images.train._replace(x=images.train.x[rows], y=images.train.y[rows])
    out = {}
    for name, part in (("train", sample), ("val", images.val), ("test", images.test)):
        out[f"{name}_loss"], out[f"{name}_acc"] = fl.evaluate(fed.task.apply, fed.w, part)
    if not math.isfinite(out["train_loss"]):
        raise fl.Diverged(f"round {fed.t}, server: the training loss is {out['train_loss']}. Likely cause: lr = {fed.cfg.lr:g} is too large")
    return out


def read_log(folder):
    """The lines of log.jsonl as dicts (no tensors []).  Source: ours."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(folder, fed, rows, seconds):
    """What the result card says about a finished run -> dict (no tensors []).  Source: this file's card."""
    cfg, lines = fed.cfg, [x for x in read_log(folder) if "test_acc" in x][-fed.cfg.last:]
    mean = lambda key: statistics.fmean(x[key] for x in lines)                                          # noqa: E731
    align = fl.alignment(fed, rows, cfg.mix)
    matching = getattr(fed.method, "matching", [])[-20:]
    return {"algo": cfg.algo, "seed": cfg.seed, "settings": cfg.hash(), "d": len(fed.w),
            "test_acc": mean("test_acc"), "val_acc": mean("val_acc"), "train_loss": mean("train_loss"), "test_loss": mean("test_loss"),
            "averaged": [x["round"] for x in lines],
            "eigenvalue": sharpness.top_eigenvalue(fed.task.apply, fed.w, fed.task.train, rows),
            "alignment": {k: None if math.isnan(v) else v for k, v in align._asdict().items()},
            "matching_loss": statistics.fmean(matching) if matching else None,
            "up": fed.up, "down": fed.down, "seconds": seconds,
            "ratio": 4 * len(fed.w) * fed.method.uplinks * cfg.participation * cfg.rounds / fed.up}


def card(folder, r):
    """The result card of one run as text (no tensors []).  Source: ours."""
    cos = ", ".join(f"{k.replace('_', ' ')} {v:+.2f}" for k, v in r["alignment"].items() if v is not None)
    rows = [("accuracy", f"{100 * r['test_acc']:.2f} % test, {100 * r['val_acc']:.2f} % validation (mean of rounds "
                         f"{', '.join(map(str, r['averaged']))})"),
            ("top eigenvalue", f"{r['eigenvalue']:.1f}   (training loss {r['train_loss']:.3f})"),
            ("alignment", f"{cos}   (cosine to the true global gradient)"),
            ("sent up", f"{r['up'] / 1e6:.2f} MB, {r['ratio']:.1f} times less than uncompressed"),
            ("sent down", f"{r['down'] / 1e6:.2f} MB"),
            ("seconds", f"{r['seconds']:.0f}"), ("settings", f"{r['settings']} (d = {r['d']:,}, seed {r['seed']})"), ("folder", str(folder))]
    if r["matching_loss"] is not None:
        rows.insert(3, ("matching loss", f"{r['matching_loss']:.3f}   (1: the synthetic images teach nothing, 0: they retrace the trajectory)"))
    return "\n".join([f"--- {r['algo']} " + "-" * 60, *(f"{k:>15}  {v}" for k, v in rows)])


# ------------------------------------------------------------------------------------------------------ comparisons
def table(results):
    """One line a method, mean and standard deviation over seeds, as Markdown text (no tensors []).  Source: ours."""
    def spread(values, form):
        values = [v for v in values if v is not None]
        if not values:
            return "-"
        return format(statistics.fmean(values), form) + (f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else "")
    out = ["| method | test accuracy % | validation accuracy % | top eigenvalue | cosine: own | last move | synthetic | MB up | MB down | seconds | runs |",
           "| --- " * 11 + "|"]
    for algo in dict.fromkeys(r["algo"] for r in results):
        mine = [r for r in results if r["algo"] == algo]
        column = lambda f: [f(r) for r in mine]                                                            # noqa: E731
        cells = [spread(column(lambda r: 100 * r["test_acc"]), ".2f"), spread(column(lambda r: 100 * r["val_acc"]), ".2f"),
                 spread(column(lambda r: r["eigenvalue"]), ".1f"),
                 *(spread(column(lambda r: r["alignment"][k]), ".2f") for k in ("own", "last_move", "synthetic")),
                 f"{statistics.fmean(column(lambda r: r['up'])) / 1e6:.2f}", f"{statistics.fmean(column(lambda r: r['down'])) / 1e6:.2f}",
                 f"{statistics.fmean(column(lambda r: r['seconds'])):.0f}", str(len(mine))]
        out.append(f"| {algo} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def compare(folder, configs):
    """Do all runs of a comparison that are not done yet, one after the other; print and keep the table -> exit code.

    A run that diverges is reported and does not stop the others (no tensors []).  Source: ours.
    """
    results, failed = [], 0
    for n, cfg in enumerate(configs):
        child = folder / f"{cfg.algo}-s{cfg.seed}"
        child.mkdir(exist_ok=True)
        if not (child / "config.json").exists():
            write(child / "config.json", described(cfg))
        try:
            results.append(execute(child, cfg, f"{n + 1}/{len(configs)} {child.name}"))
        except (fl.Diverged, FloatingPointError) as error:
            print(f"run.py: {child}: {error}", file=sys.stderr)
            failed = 1
    if results:
        logs = {a: [read_log(folder / f"{r['algo']}-s{r['seed']}") for r in results if r["algo"] == a] for a in dict.fromkeys(r["algo"] for r in results)}
        plot.curve(folder / "curve.png", logs, folder.name)
        write(folder / "table.md", table(results) + "\n")
        print(table(results))
        print(f"folder {folder}")
    return failed


def described(cfg):
    """The text of config.json: all settings, their hash, versions and hardware (no tensors []).  Source: ours."""
    return json.dumps({"settings": dataclasses.asdict(cfg), "hash": cfg.hash(), "machine": machine()}, indent=1) + "\n"


# ----------------------------------------------------------------------------------------------------- command line
def explain(name):
    """What a method changes against its parent, as a diff of the source itself -> text (no tensors []).  Source: inspect."""
    known(name)
    method = fl.METHODS[name]
    parent, out = method.__bases__[0], [f"{method.__name__}: {inspect.cleandoc(method.__doc__)}", ""]
    if parent is object:
        return "\n".join(out + [inspect.getsource(method)])
    for key, value in vars(method).items():
        if inspect.isfunction(value):
            before = inspect.getsource(getattr(parent, key)).splitlines() if hasattr(parent, key) else []
            out += list(difflib.unified_diff(before, inspect.getsource(value).splitlines(), f"{parent.__name__}.{key}",
                                             f"{method.__name__}.{key}", n=99, lineterm="")) + [""]
        elif not key.startswith("__"):
            out += [f"{method.__name__}.{key} = {value!r}   ({parent.__name__}: {getattr(parent, key, None)!r})", ""]
    return "\n".join(out) + (f"\n(parent: {explain_name(parent)})" if parent is not fl.FedAvg else "")


def explain_name(method):
    """How to read on about a parent class (no tensors []).  Source: ours."""
    named = [n for n, m in fl.METHODS.items() if m is method]
    return f"python run.py --explain {named[0]}" if named else f"class {method.__name__} in fl.py"


def known(name):
    """UserError with the closest match unless `name` is a method (no tensors []).  Source: ours."""
    if name not in fl.METHODS:
        raise UserError(f"unknown method {name!r}; {config.closest(name, list(fl.METHODS))}")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the closest flag, exit code 2 (no tensors []).  Source: ours."""

    def error(self, message):
        flags = [a for action in self._actions for a in action.option_strings]
        for word in message.split():
            near = difflib.get_close_matches(word, flags, 1, 0.7) if word.startswith("--") and word not in flags else []
            message += f"; did you mean {near[0]}?" if near else ""
        raise UserError(message)


def parser():
    """The command line: one flag per field of Config, and those that are not settings (no tensors []).  Source: config.py."""
    p = Parser(description="Compressed, sharpness-aware federated learning: FedSynSAM and the methods it is compared with.", allow_abbrev=False)
    p.add_argument("--algo", nargs="+", default=["fedsynsam"], metavar="METHOD", help=f"one or more of {', '.join(fl.METHODS)} (default fedsynsam)")
    p.add_argument("--seeds", type=int, default=1, metavar="n", help="runs per method: seed, seed+1, ... (default 1)")
    p.add_argument("--name", help="name of the folder (default: made from method and seed)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR", help="where folders are made (default runs)")
    p.add_argument("--resume", type=pathlib.Path, metavar="DIR", help="continue the run or comparison in this folder; its settings are used")
    p.add_argument("--explain", metavar="METHOD", help="print what a method changes against its parent, and stop")
    p.add_argument("--quick", action="store_true", help="the same job at a tenth of the size")
    for f in dataclasses.fields(Config)[1:]:
        text = f.metadata["text"] + (f": {', '.join(f.metadata['legal'])}" if f.metadata["legal"] else "") + f" (default {f.default})"
        flag = "--" + f.name.replace("_", "-")
        if f.type in (bool, "bool"):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            p.add_argument(flag, type=type(f.default), default=argparse.SUPPRESS, metavar=type(f.default).__name__, help=text)
    return p


def configs_of(args):
    """All the runs a command line asks for, checked -> list of Config (no tensors []).  Source: ours."""
    for name in args.algo:
        known(name)
    if args.seeds < 1:
        raise UserError(f"seeds = {args.seeds} is out of range; it must be at least 1")
    if args.name is not None and pathlib.Path(args.name).name != args.name:
        raise UserError(f"name = {args.name!r} is no plain folder name (use --out DIR for where it goes)")
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name != "algo" and hasattr(args, f.name)}
    base = Config(**fields).check()
    base = base.quick() if args.quick else base
    return [dataclasses.replace(base, algo=a, seed=base.seed + s).check() for a in dict.fromkeys(args.algo) for s in range(args.seeds)]


def main(argv=None):
    """The command: -> exit code 0, 1 or 2 (no tensors []).  Source: this file's card."""
    try:
        args = parser().parse_args(argv)
        if args.explain:
            print(explain(args.explain))
            return 0
        if args.resume:
            folder = args.resume
            single, configs = read_settings(folder)
        else:
            configs = configs_of(args)
            compose(configs[0])                         # whatever is wrong with the input is found here, before any work
            single = len(configs) == 1
            folder = new_folder(args.out, args.name, f"{configs[0].algo}-s{configs[0].seed}" if single else "comparison")
            if single:
                write(folder / "config.json", described(configs[0]))
            else:
                write(folder / "comparison.json", json.dumps([dataclasses.asdict(c) for c in configs], indent=1) + "\n")
        if not single:
            return compare(folder, configs)
        print(card(folder, execute(folder, configs[0])))
        return 0
    except (fl.Diverged, FloatingPointError) as error:
        print(f"run.py: {error} (the log is kept in {folder})", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrun.py: interrupted; continue with: python run.py --resume {folder}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
