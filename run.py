#!/usr/bin/env python3
"""Run federated experiments from the command line; this file parses, composes and prints, the work is done above it.

    python run.py --algo fedsynsam                      one run: bundled images, 100 clients, quantized uplink
    python run.py --algo fedavg fedsynsam --seeds 3     a comparison: one table with mean and standard deviation
    python run.py --resume runs/NAME                    continue a run that was cut off, to bit-identical weights (CPU)
    python run.py --procs 4 ...                         four processes share every round (ranks.py); torchrun does it too
    python run.py --preset fedwmsam-fmnist --algo ...   the settings of a published table, its numbers beside ours (presets.py)
    python run.py --list                                every method: parent, gradients, bytes both ways, state, source
    python run.py --explain fedsynsam                   what a method changes against its parent, from the source itself
    python run.py --quick ...                           the same job at a tenth of the size
    python run.py --experiment NAME --size cpu          a claim of a paper, measured: table, figure, verdict (claims.py)
    python run.py --tune METHOD --size cpu              search settings on validation images, for `accuracy` (tune.py)
    python run.py --report                              rewrite the README's tables from results/

Every run has a folder: config.json (all settings, versions, hardware), log.jsonl (a line a round, written as it happens),
checkpoint.pt, result.json, curve.png and synthetic.png (the distilled images). A folder is never overwritten. A comparison
is a folder of such folders with comparison.json, table.md and curve.png. Exit codes: 0 done, 1 a run failed (diverged),
2 wrong input, found before any work.  Read next: test_all.py.
"""
import argparse
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import sys

import torch

import baselines
import claims
import config
import experiment
import loop
import presets
import ranks
import show
import study
import tune
from config import Config
from tools import plot


# ------------------------------------------------------------------------------------------------------ comparisons
def compare(folder, configs, made=None):
    """Do all runs of a comparison that are not done yet, one after the other; print and keep the table -> exit code.

    made: what experiment.compose made of the first of them.

    A run that diverges is reported and does not stop the others.
    """
    results, failed = [], 0

    def begin(child, cfg):
        child.mkdir(exist_ok=True)
        if not (child / "config.json").exists():
            experiment.write(child / "config.json", experiment.described(cfg))
    for n, cfg in enumerate(configs):
        child = folder / f"{cfg.algo}-s{cfg.seed}"
        ranks.served(lambda: begin(child, cfg))
        try:
            results.append(experiment.execute(child, cfg, f"{n + 1}/{len(configs)} {child.name}", made if n == 0 else None))
        except (loop.Diverged, FloatingPointError) as error:
            complain(f"{child}: {error}")
            failed = 1
    if results and ranks.rank() == 0:
        logs = {a: [experiment.read_log(folder / f"{r['algo']}-s{r['seed']}") for r in results if r["algo"] == a] for a in dict.fromkeys(r["algo"] for r in results)}
        plot.curve(folder / "curve.png", logs, folder.name)
        experiment.write(folder / "table.md", show.table(results) + "\n")
        print(show.table(results))
        print(f"folder {folder}")
    return failed


# ----------------------------------------------------------------------------------------------------- command line
def known(name):
    """The name of a method -> itself; UserError with the closest match if there is none."""
    if name not in baselines.METHODS:
        raise experiment.UserError(f"unknown method {name!r}; {config.closest(name, list(baselines.METHODS))}")
    return name


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the closest flag, exit code 2."""

    def print_help(self, file=None):
        if ranks.rank() == 0:                                                         # once, not once per process of torchrun
            super().print_help(file)

    def error(self, message):
        flags = [a for action in self._actions for a in action.option_strings]
        for word in message.replace(":", " ").split():
            near = difflib.get_close_matches(word, flags, 1, 0.7) if word.startswith("--") and word not in flags else []
            message += f"; did you mean {near[0]}?" if near else ""
        raise experiment.UserError(message)


def parser():
    """The command line: one flag per field of Config, and those that are not settings.  Source: config.py."""
    p = Parser(description="Compressed, sharpness-aware federated learning: FedSynSAM and the methods it is compared with.", allow_abbrev=False)
    p.add_argument("--algo", nargs="+", default=argparse.SUPPRESS, metavar="METHOD", help=f"one or more of {', '.join(baselines.METHODS)} (default fedsynsam)")
    p.add_argument("--preset", default=argparse.SUPPRESS, metavar="NAME",
                   help=f"settings of a published table, which other flags then change: {', '.join(presets.PRESETS)} (presets.py)")
    p.add_argument("--seeds", type=int, default=argparse.SUPPRESS, metavar="n", help="runs per method: seed, seed+1, ... (default 1)")
    p.add_argument("--name", help="name of the folder (default: made from method and seed)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR", help="where folders are made (default runs)")
    p.add_argument("--resume", type=pathlib.Path, metavar="DIR", help="continue the run or comparison in this folder; its settings are used")
    p.add_argument("--list", action="store_true", help="print every method with its parent, gradients, bytes, state and source, and stop")
    p.add_argument("--explain", metavar="METHOD", help="print what a method changes against its parent, and stop")
    p.add_argument("--quick", action="store_true", help="the same job at a tenth of the size")
    p.add_argument("--experiment", metavar="NAME", help=f"run one of {', '.join(claims.CLAIMS)} (claims.py), or what is left of it, in DIR/experiments")
    p.add_argument("--tune", metavar="METHOD", help="choose a method's settings on validation images (tune.py), or continue to")
    p.add_argument("--size", metavar="SIZE", help=f"of --experiment and --tune: {', '.join(study.SIZES)} (default cpu)")
    p.add_argument("--report", action="store_true", help="rewrite the README's tables from the files of --experiment, and stop")
    p.add_argument("--results", type=pathlib.Path, default=experiment.HERE / "results", metavar="DIR", help="where experiments keep their results (default results)")
    for f in dataclasses.fields(Config):
        if f.name in ("algo", "preset"):
            continue
        text = f.metadata["text"] + (f": {', '.join(f.metadata['legal'])}" if f.metadata["legal"] else "") + f" (default {f.default})"
        flag = "--" + f.name.replace("_", "-")
        if f.type in (bool, "bool"):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            p.add_argument(flag, type=type(f.default), default=argparse.SUPPRESS, metavar=type(f.default).__name__, help=text)
    return p


def configs_of(args):
    """All the runs a command line asks for, checked -> list of Config."""
    algos, seeds = getattr(args, "algo", ["fedsynsam"]), getattr(args, "seeds", 1)
    for name in algos:
        known(name)
    if not 1 <= seeds <= 1000:
        raise experiment.UserError(f"seeds = {seeds} is out of range; it must be in 1..1000")
    if args.name is not None and (pathlib.Path(args.name).name != args.name or len(args.name) > 200):
        raise experiment.UserError(f"name = {args.name!r} is no plain folder name (use --out DIR for where it goes)")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name not in ("algo", "preset") and hasattr(args, f.name)}
    if hasattr(args, "preset") and args.preset not in presets.PRESETS:
        raise experiment.UserError(f"unknown preset {args.preset!r}; {config.closest(args.preset, list(presets.PRESETS))}")
    start = {a: presets.fields(args.preset, a) if hasattr(args, "preset") else {} for a in algos}
    configs = [Config(algo=a, **{**start[a], **given}).check() for a in start]
    base = configs[0]
    threads, device = experiment.threads_of(base), experiment.device_of(base).type
    if base.procs not in (0, ranks.size()):
        raise experiment.UserError(f"procs = {base.procs}, but this is a group of {ranks.size()}; leave --procs out under torchrun, and elsewhere start "
                                   f"`python run.py` itself")
    configs = [dataclasses.replace(c.quick() if args.quick else c, procs=ranks.size(), threads=threads, device=device) for c in configs]
    return [dataclasses.replace(c, seed=c.seed + s).check() for c in configs for s in range(seeds)]


def prepare(args):
    """Everything that can be wrong with the input is found here, before any work -> (folder, its Configs, is it one run?, the first composed).

    Raises ValueError; for a new run it makes the folder, as the last thing.
    """
    if args.resume is not None:
        extra = sorted(set(vars(args)) - {"resume", "explain", "list", "out", "name", "quick", "experiment", "tune", "size", "report", "results"}) + ["name"] * bool(args.name) + ["quick"] * args.quick
        if extra:
            raise experiment.UserError(f"--resume takes all settings from the folder; leave out --{extra[0].replace('_', '-')}")
        single, configs = experiment.read_settings(args.resume)
        return args.resume, configs, single, experiment.compose(configs[0])
    configs = configs_of(args)
    made = experiment.compose(configs[0])

    def new_folder():
        if len(configs) == 1:
            wanted = f"{configs[0].algo}-s{configs[0].seed}", "config.json", experiment.described(configs[0])
        else:
            wanted = "comparison", "comparison.json", json.dumps([dataclasses.asdict(c) for c in configs], indent=1) + "\n"
        return experiment.new_folder(args.out, args.name, *wanted)
    return ranks.tell(ranks.served(new_folder)), configs, len(configs) == 1, made


def investigate(args):
    """--experiment, --tune or --report: -> what to print. Raises UserError for anything wrong with the command, before any work."""
    machine = {k: v for k, v in vars(args).items() if k in ("device", "threads", "chunk", "compile", "deterministic", "memory_file", "checkpoint_every")}
    asked = {"experiment": args.experiment is not None, "tune": args.tune is not None, "report": args.report}
    extra = [k for k in vars(args) if k not in {"out", "results", "size", *asked, *machine, "explain", "list", "name", "quick", "resume"}]
    extra += [k for k in ("name", "quick", "resume") if getattr(args, k)] + (["size"] if args.report and args.size else [])
    if sum(asked.values()) > 1:
        raise experiment.UserError("--experiment, --tune and --report are three commands; give one of them")
    if not any(asked.values()):
        raise experiment.UserError("--size belongs to --experiment or --tune")
    if ranks.size() > 1 or "procs" in extra:
        raise experiment.UserError("an experiment works in one process; leave out --procs, and start the same command twice to share its runs")
    if extra:
        raise experiment.UserError(f"an experiment sets all settings itself; leave out --{extra[0].replace('_', '-')}")
    size, root = args.size or "cpu", args.out / "experiments"
    if size not in study.SIZES:
        raise experiment.UserError(f"unknown size {size!r}; {config.closest(size, study.SIZES)}")
    if args.report:
        names = study.report(experiment.HERE / "README.md", args.results, tuned=tune.table(args.results / "tuned.json"))
        return f"README.md: {', '.join(names) or 'no marks <!-- NAME -->'}, from {args.results}"
    if args.tune is not None:
        known(args.tune)
        return tune.tune(args.tune, size, root, args.results, tune.command_of("--tune", args.tune, "--size", size), **machine)
    if args.experiment not in claims.CLAIMS:
        raise experiment.UserError(f"unknown experiment {args.experiment!r}; {config.closest(args.experiment, list(claims.CLAIMS))}")
    claim = claims.CLAIMS[args.experiment](size, args.results)
    return study.keep(claim, study.conduct(claim, root, **machine), tune.command_of("--experiment", claim.name, "--size", size))


def complain(text):
    """One line for the user, from one process."""
    if ranks.rank() == 0:
        print(f"run.py: {text}", file=sys.stderr)


def main(argv=None):
    """The command, in this process: -> exit code 0, 1 or 2, or 130 after Ctrl-C.  Source: this file's card."""
    ranks.join()
    try:
        return obey(argv)
    finally:
        ranks.leave()


def obey(argv):
    """`main` inside a group of processes that it has joined: -> exit code."""
    try:
        args = parser().parse_args(argv)
        if args.list or args.explain is not None:
            text = show.listing() if args.list else show.explain(known(args.explain))
            if ranks.rank() == 0:
                print(text)
            return 0
        if args.experiment is not None or args.tune is not None or args.report or args.size is not None:
            print(investigate(args))
            return 0
        folder, configs, single, made = prepare(args)
    except ValueError as error:
        complain(error)
        return 2
    except SystemExit as stop:                                    # argparse, after --help
        return stop.code or 0
    except KeyboardInterrupt:
        complain("interrupted; the same command continues")
        return 130
    try:
        if not single:
            return compare(folder, configs, made)
        result = experiment.execute(folder, configs[0], made=made)
        if ranks.rank() == 0:
            print(show.card(folder, result))
        return 0
    except experiment.UserError as error:                         # a checkpoint that cannot be used
        complain(error)
        return 2
    except (loop.Diverged, FloatingPointError) as error:
        complain(f"{error} (the log is kept in {folder})")
        return 1
    except ranks.Lost as error:                                   # said by every process that is left: the first may be the dead one
        print(f"run.py: {error}; continue with: python run.py --resume {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        complain(f"interrupted; continue with: python run.py --resume {folder}")
        return 130


def command(argv=None):
    """`main`, in as many processes as the command line (or the folder it resumes) asks for: -> exit code.  Source: ranks.launch."""
    try:
        args = parser().parse_args(argv)
        procs, device = getattr(args, "procs", 0), getattr(args, "device", "auto")
        if args.experiment is not None or args.tune is not None or args.report:
            procs = 0                                             # main refuses them, in one line
        if args.resume is not None:
            first = experiment.read_settings(args.resume)[1][0]
            procs, device = first.procs, first.device
    except (ValueError, SystemExit):
        procs = 0                                                 # main will say what is wrong, or print the help
    if procs < 2 or "WORLD_SIZE" in os.environ:
        return main(argv)
    try:
        return ranks.launch(functools.partial(main, argv), procs, gpu=device != "cpu" and torch.cuda.is_available())
    except ranks.Lost as error:
        print(f"run.py: {error}; continue with --resume and the folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:                                       # `python run.py --list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
