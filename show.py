"""What a run, a comparison and the command line say: result card, table of a comparison, --list, --explain.

The result card. accuracy: mean over the last evaluations, never the best one. top eigenvalue: of the Hessian of the training
loss (sharpness.py). alignment: cosine of each estimate of "uphill" to the true global gradient (sharpness.py). MB: lengths of the
buffers that were really sent. `listing` and `explain` ask the code itself (its attributes, its source, buffers encoded on the spot),
so neither can say what is no longer true.  Read next: run.py.
"""
import difflib
import inspect
import statistics
import types

import torch

import baselines
import compress
import config
import fedsynsam
import fl
import models
import presets
from config import Config


def card(folder, r):
    """The result card of one run as text."""
    cos = ", ".join(f"{k.replace('_', ' ')} {v:+.2f}" for k, v in r["alignment"].items() if v is not None)
    cos = cos.replace("mixed", f"mixed {r['mixed_at']:g}")
    rows = [("accuracy", f"{100 * r['test_acc']:.2f} % test, {100 * r['val_acc']:.2f} % validation (mean of rounds "
                         f"{', '.join(map(str, r['averaged']))})"),
            ("top eigenvalue", f"{r['eigenvalue']:.1f}   (training loss {r['train_loss']:.3f})"),
            ("alignment", f"{cos}"), ("", f"(cosines to the global gradient over {r['measured_on']:,} training images, at the clients' last points)"),
            ("sent up", f"{r['up'] / 1e6:.2f} MB, {r['ratio']:.1f} times less than uncompressed"),
            ("sent down", f"{r['down'] / 1e6:.2f} MB"),
            ("seconds", f"{r['seconds']:.0f}"), ("settings", f"{r['settings']} (d = {r['d']:,}, seed {r['seed']})"), ("folder", str(folder))]
    if "gradient_variance" in r:
        rows.insert(4, ("variance", f"{r['gradient_variance']:.3g}   (of the clients' gradients as the server saw them, halved; mean of the same rounds)"))
    if r["published"] is not None:
        rows.insert(1, ("published", f"{r['published']:.2f} % test ({presets.PRESETS[r['preset']].source.split(',')[0]})"))
    if r["matching_loss"] is not None:
        rows.insert(4, ("matching loss", f"{r['matching_loss']:.3f}   (1: the synthetic images teach nothing, 0: they retrace the trajectory)"))
    return "\n".join([f"--- {r['algo']} " + "-" * 60, *(f"{k:>15}  {v}" for k, v in rows)])


def table(results):
    """One line a method, mean and standard deviation over seeds, as Markdown text."""
    def spread(values, form):
        values = [v for v in values if v is not None]
        if not values:
            return "-"
        return format(statistics.fmean(values), form) + (f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else "")
    numbers = any(r["published"] for r in results)
    out = ["| method | test accuracy % | " + "published % | " * numbers + "test loss | validation accuracy % | top eigenvalue | cosine: own | last move | synthetic | MB up | MB down | seconds | runs |",
           "| --- " * (12 + numbers) + "|"]
    for algo in dict.fromkeys(r["algo"] for r in results):
        mine = [r for r in results if r["algo"] == algo]
        column = lambda f: [f(r) for r in mine]                                                            # noqa: E731
        cells = [spread(column(lambda r: 100 * r["test_acc"]), ".2f"), *[f"{mine[0]['published'] or '-'}"] * numbers, spread(column(lambda r: r["test_loss"]), ".3f"),
                 spread(column(lambda r: 100 * r["val_acc"]), ".2f"),
                 spread(column(lambda r: r["eigenvalue"]), ".1f"),
                 *(spread(column(lambda r: r["alignment"][k]), ".2f") for k in ("own", "last_move", "synthetic")),
                 f"{statistics.fmean(column(lambda r: r['up'])) / 1e6:.2f}", f"{statistics.fmean(column(lambda r: r['down'])) / 1e6:.2f}",
                 f"{statistics.fmean(column(lambda r: r['seconds'])):.0f}", str(len(mine))]
        out.append(f"| {algo} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def explain(name):
    """What a method changes against its parents, as a diff of the source itself -> text.  Source: inspect."""
    method = baselines.METHODS[name]
    out, above = [f"{method.__name__}: {inspect.cleandoc(method.__doc__)}", ""], method.__mro__[1:-1]
    if not above:
        return "\n".join(out + [inspect.getsource(method)])
    owner = lambda key: next((c for c in above if key in vars(c)), above[0])                        # noqa: E731, whose answer is replaced
    for key, value in vars(method).items():
        if inspect.isfunction(value):
            source = inspect.getsource(value)
            inherits = not hasattr(above[0], key) or f"super().{key}(" in source      # it adds to its parent's answer
            before = [] if inherits else inspect.getsource(getattr(owner(key), key)).splitlines()
            out += list(difflib.unified_diff(before, source.splitlines(), f"{owner(key).__name__}.{key}",
                                             f"{method.__name__}.{key}", n=99, lineterm="")) + [""]
        elif not key.startswith("__"):
            out += [f"{method.__name__}.{key} = {value!r}   ({owner(key).__name__}: {getattr(owner(key), key, None)!r})", ""]
    if len(method.__bases__) > 1:                                                     # a crossing: who answers what
        answered = dict.fromkeys(k for c in above[:-1] for k in vars(c) if not k.startswith("__") and k not in vars(method))
        out += [f"{key}: as {owner(key).__name__}" for key in answered] + [""]
    return "\n".join(out + [f"(parent: {explain_name(c)})" for c in method.__bases__ if c is not fl.FedAvg])


def explain_name(method):
    """How to read on about a parent class."""
    named = [n for n, m in baselines.METHODS.items() if m is method]
    return f"python run.py --explain {named[0]}" if named else f"class {method.__name__} in {method.__module__}.py"


def listing(cfg=Config()):
    """Every method and what it costs, read off the classes and off what they would send -> a table as text.

    Bytes are those of one client in one round: lengths of buffers encoded here, for the network and the compressor of cfg.
    """
    w = models.build(cfg.model, (1, 28, 28), 10, cfg.width, cfg.hidden, depth=cfg.depth, stem=cfg.stem).w0
    task = types.SimpleNamespace(w0=w, apply=None, train=types.SimpleNamespace(x=torch.zeros(0, 1, 28, 28), classes=range(10)))
    one_up, wire, synthetic = len(config.compressor(cfg, len(w)).encode(w)), compress.Identity(), fedsynsam.FedSynth(task, cfg).codec(None, w).size
    times = lambda n: "-" if n == 0 else "d" if n == 1 else f"{n} d"                                # noqa: E731
    rows = [("method", "parent", "gradients", "up", "bytes up", "down", "bytes down", "client keeps", "server keeps", "source")]
    for name, kind in baselines.METHODS.items():
        method = kind(task, cfg)
        down = method.broadcast(w)
        kept = [k + " [d]" * torch.is_tensor(v) for k, v in vars(method).items() if k not in ("task", "cfg")]
        source = " ".join(kind.__doc__.split("Source:")[1].split()).split(";")[0].rstrip(".")
        ups, down = method.uplinks + method.surveys, down + [w] * method.surveys                     # an answer up, the mean down
        rows.append((name, " + ".join(c.__name__ for c in kind.__bases__ if c is not object) or "-", f"{method.gradients}{' + all' * method.surveys}", "D_syn" if kind is fedsynsam.FedSynth else times(ups),
                     f"{synthetic if kind is fedsynsam.FedSynth else ups * one_up:,}", times(len(down)) + " + parcel" * (kind.parcel is not fl.FedAvg.parcel),
                     f"{sum(len(wire.encode(x)) for x in down):,}", times(method.memory), ", ".join(kept) or "-", source))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(widths), *lines[1:], "",
                      f"gradients: per local step; all: one over all of a client's images, once a round. d = {len(w):,} (the default network); up: compressed by {cfg.compress}, down: uncompressed.",
                      f"fedsynth sends {cfg.fs_batches} x {cfg.fs_images} images ({cfg.fs_format}), whatever `compress` is, and the gradients of "
                      f"learning them come on top (README); random masking at equal bytes: --algo fedavg --compress randk --no-scaled --k {compress.masking_within(synthetic)}.",
                      "A parcel (synthetic images) is fetched once. What a method does: python run.py --explain METHOD"])
