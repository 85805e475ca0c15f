"""The figures: curves over rounds and over bytes, the distilled images, and what experiments draw (claims.py). matplotlib is imported only when drawing."""
import contextlib

import numpy as np

# Okabe-Ito colours, told apart by colour-blind readers, then some of Tol's "muted" set; a method looks the same in every
# figure. The colour of a method of baselines.py is that of its base, its stroke is its direction: solid none, dashed the own
# gradient, dotted the model last seen, dash-dot-dash FedSynSAM's mixture; dash-dot-dot Adam at the client.
COLOURS = {"fedavg": "#000000", "fedsam": "#E69F00", "fedlesam": "#56B4E9", "fedlesam-server": "#0072B2", "dynafed": "#CC79A7",
           "fedsynsam": "#D55E00", "fedprox": "#555555", "scaffold": "#009E73", "feddyn": "#661100", "fedcm": "#DDCC77", "fedadam": "#332288",
           "mofedsam": "#DDCC77", "fedgamma": "#009E73", "fedspeed": "#661100", "fedsmoo": "#661100", "fedlesam-s": "#009E73",
           "fedlesam-d": "#661100", "fedsynsam-s": "#009E73", "fedsynsam-d": "#661100", "fedasam": "#E69F00", "gcsam": "#E69F00",
           "fedavg-adam": "#000000", "dynafed-adam": "#CC79A7",
           "gradalign": "#999933", "fedga": "#882255", "fedga-previous": "#882255", "fedsynth": "#AA4499", "oracle": "#44AA99"}
STROKES = {"mofedsam": "--", "fedgamma": "--", "fedspeed": "--", "fedsmoo": "-.", "fedlesam-s": ":", "fedlesam-d": ":", "fedasam": "-.",
           "fedsynsam-s": (0, (8, 2, 2, 2)), "fedsynsam-d": (0, (8, 2, 2, 2)),
           "gcsam": "--", "fedavg-adam": (0, (6, 2, 1, 2, 1, 2)), "dynafed-adam": (0, (6, 2, 1, 2, 1, 2)), "fedga-previous": ":", "oracle": (0, (1, 1))}


def pyplot():
    """matplotlib without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def curve(path, logs, title):
    """Draw test accuracy and training loss over rounds, and accuracy over megabytes sent up.

    logs: {method: [log of seed 0, log of seed 1, ...]}, a log being the list of lines of log.jsonl; with several seeds the
    line is the mean and the band one standard deviation.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for n, (method, runs) in enumerate(logs.items()):
        runs = [[x for x in run if "test_acc" in x] for run in runs]
        runs = [run[:min(map(len, runs))] for run in runs]
        rounds, colour = [x["round"] for x in runs[0]], COLOURS.get(method, f"C{n}")
        mega = np.mean([[x["up"] for x in run] for run in runs], 0) / 1e6
        for axis, at, key, scale in ((axes[0], rounds, "test_acc", 100), (axes[1], rounds, "train_loss", 1), (axes[2], mega, "test_acc", 100)):
            y = scale * np.array([[x[key] for x in run] for run in runs])
            axis.plot(at, y.mean(0), color=colour, ls=STROKES.get(method, "-"), label=method, lw=1.6)
            if len(runs) > 1:
                axis.fill_between(at, y.mean(0) - y.std(0, ddof=1), y.mean(0) + y.std(0, ddof=1), color=colour, alpha=0.15, lw=0)
    for axis, x, y in zip(axes, ("round", "round", "megabytes sent up"), ("test accuracy (%)", "training loss", "test accuracy (%)")):
        axis.set(xlabel=x, ylabel=y)
    best = max(100 * x["test_acc"] for runs in logs.values() for run in runs for x in run if "test_acc" in x)
    for axis in (axes[0], axes[2]):                         # methods differ near the top: cut the climb from chance level off
        axis.set_ylim(bottom=max(0, best - 25), top=best + 2)
    axes[1].set_ylim(bottom=0, top=4 * min(x["train_loss"] for runs in logs.values() for run in runs for x in run if "test_acc" in x))
    axes[0].legend(frameon=False, loc="lower right", ncols=1 + (len(logs) > 8), fontsize=10 if len(logs) < 7 else 7, handlelength=2.6)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def synthetic(path, learnt, images):
    """Draw the distilled images, one row per class, each with the class its learnt label favours and how strongly.

    learnt: synth.Synthetic with images [n, C, H, W] (normalised) and logits [n, classes]; images: the data.Images whose mean
    and std undo the normalisation.
    """
    plt = pyplot()
    mean, std = (v.cpu()[:, None, None] for v in (images.mean, images.std))
    pixels = ((learnt.images.cpu() * std + mean).clamp(0, 255) / 255).permute(0, 2, 3, 1).numpy()
    labels, classes = learnt.logits.softmax(1).cpu(), images.classes
    rows, per_class = min(len(classes), 20), len(pixels) // len(classes)        # of many classes the first twenty are drawn
    H, W = pixels.shape[1:3]
    gap = H // 3                                                # room above every image for its label
    canvas = np.ones((rows * (H + gap), per_class * (W + 2), pixels.shape[3]))
    figure, axis = plt.subplots(figsize=(1.6 + 1.1 * per_class, 0.3 + 1.4 * rows))
    for i in range(rows * per_class):
        top, left = i // per_class * (H + gap) + gap, i % per_class * (W + 2)
        canvas[top:top + H, left:left + W] = pixels[i]
        best = int(labels[i].argmax())
        axis.text(left + W / 2, top - 1, f"{classes[best]} {float(labels[i, best]):.2f}", fontsize=7, ha="center", va="bottom")
    axis.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[gap + H / 2 + r * (H + gap) for r in range(rows)])
    axis.set_yticklabels([str(c) for c in classes[:rows]], fontsize=8)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title("rows: first label; above: learnt label", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------- experiments
# what is compared in an experiment and is no method: compressors from none (black) to strong (red), splits, estimates of uphill
SERIES = {"none": "#000000", "4 bits": "#0072B2", "2 bits": "#56B4E9", "top 10 %": "#E69F00", "top 5 %": "#E69F00", "top 1 %": "#D55E00",
          "IID": "#000000", "Dir 0.6": "#0072B2", "Dir 0.1": "#D55E00", "without": "#999999", "with": "#D55E00",
          "own gradient": COLOURS["fedsam"], "last move": COLOURS["fedlesam-server"], "last move, uncompressed": COLOURS["fedlesam"],
          "synthetic": COLOURS["dynafed"], "mixed": COLOURS["fedsynsam"], "fedsynsam raw": "#994F00"}
MARKS = "osD^vPX<>*"
OTHERS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#999999")         # Okabe-Ito, for what has no colour of its own


@contextlib.contextmanager
def figure(path, columns, rows=1, width=4.0, height=3.4, foot=0.0):
    """Axes to draw on, in order; then the file at `path` is written. foot: inches left free below, for a `legend` of all axes."""
    plt = pyplot()
    tall = height * rows + foot
    page, axes = plt.subplots(rows, columns, figsize=(width * columns, tall), squeeze=False)
    yield list(axes.flat)
    page.tight_layout(rect=(0, foot / tall, 1, 1))
    page.savefig(path, dpi=110)
    plt.close(page)


def colour(name, n=0):
    """The colour of a method or of anything else that is compared; a label "fedsam (lr 0.1)" is fedsam's."""
    return SERIES.get(name) or COLOURS.get(name.split(" (")[0]) or OTHERS[n % len(OTHERS)]


def dots(axis, groups, label, title="", dodge=True):
    """Means with standard deviations over seeds, every seed a faint dot beside them; groups: {place on the x axis: {series: numbers}}.

    dodge: series stand side by side at each place, each with its own mark; else each place has one series.
    """
    names = list(dict.fromkeys(name for g in groups.values() for name in g))
    for n, name in enumerate(names):
        places = [(x + dodge * 0.7 * ((n + 0.5) / len(names) - 0.5), g[name]) for x, g in enumerate(groups.values()) if g.get(name)]
        c, mark = colour(name, n), MARKS[n % len(MARKS)] if dodge else "o"
        for at, numbers in places:
            axis.plot([at + 0.17 / (len(names) if dodge else 1)] * len(numbers), numbers, mark, color=c, alpha=0.5, ms=3.5, mew=0)
        axis.errorbar([at for at, _ in places], [np.mean(v) for _, v in places], [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in places],
                      fmt=mark, color=c, capsize=3, ms=6, label=name)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set(ylabel=label, title=title)
    axis.grid(False, axis="x")


def slant(axis):
    """Long names below a figure, turned so that they do not touch."""
    axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=35, ha="right", fontsize=8)


def band(axis, x, runs, name, n=0, stroke=None):
    """A line through the means over runs [seeds][points], in a band of one standard deviation; nothing if there are none."""
    if not runs or not len(x):
        return
    y = np.array(runs, dtype=float)
    stroke = STROKES.get(name.split(" (")[0], "-") if stroke is None else stroke
    axis.plot(x, y.mean(0), color=colour(name, n), ls=stroke, marker=MARKS[n % len(MARKS)], ms=4, lw=1.6, label=name)
    if len(y) > 1:
        axis.fill_between(x, y.mean(0) - y.std(0, ddof=1), y.mean(0) + y.std(0, ddof=1), color=colour(name, n), alpha=0.15, lw=0)


def contours(axis, at, losses, title, levels):
    """The loss on a plane through a model, losses [points, points] at `at` [points] along both directions."""
    lines = axis.contour(at, at, np.array(losses), levels=levels, cmap="viridis")
    axis.clabel(lines, fontsize=7, fmt="%.3g")
    axis.plot([0], [0], "+", color="black", ms=8)
    axis.set(xlabel="along one random direction", ylabel="along another", title=title)


def legend(axis, where="best", columns=1, below=False):
    """The names of what was drawn, without a frame; below: under all axes, side by side. Nothing if there is one name or none."""
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1 and below:
        axis.figure.legend(handles, names, frameon=False, fontsize=9, ncols=len(names), loc="lower center", handlelength=2)
    elif len(names) > 1:
        axis.legend(handles, names, frameon=False, fontsize=8, ncols=columns, loc=where, handlelength=2)


def curve_of(axis, x, runs, name):
    """A thin line of many points, as `band` draws a few: no marks."""
    y = np.array(runs)
    n = len(x)
    axis.plot(x, y.mean(0)[:n], color=colour(name), ls=STROKES.get(name, "-"), label=name, lw=1.5)
    if len(y) > 1:
        axis.fill_between(x, y.mean(0) - y.std(0, ddof=1), y.mean(0) + y.std(0, ddof=1), color=colour(name), alpha=0.12, lw=0)
