"""The figures: curves over rounds and over bytes, and the distilled images. matplotlib is imported only when drawing."""
import numpy as np

# Okabe-Ito colours, told apart by colour-blind readers, then some of Tol's "muted" set; a method looks the same in every
# figure. The colour of a method of baselines.py is that of its base, its stroke is its direction: solid none, dashed the own
# gradient, dotted the model last seen; dash-dot-dot Adam at the client.
COLOURS = {"fedavg": "#000000", "fedsam": "#E69F00", "fedlesam": "#56B4E9", "fedlesam-server": "#0072B2", "dynafed": "#CC79A7",
           "fedsynsam": "#D55E00", "fedprox": "#555555", "scaffold": "#009E73", "feddyn": "#661100", "fedcm": "#DDCC77", "fedadam": "#332288",
           "mofedsam": "#DDCC77", "fedgamma": "#009E73", "fedspeed": "#661100", "fedsmoo": "#661100", "fedlesam-s": "#009E73",
           "fedlesam-d": "#661100", "fedasam": "#E69F00", "gcsam": "#E69F00", "fedavg-adam": "#000000", "dynafed-adam": "#CC79A7",
           "gradalign": "#999933", "fedga": "#882255", "fedga-previous": "#882255", "fedsynth": "#AA4499"}
STROKES = {"mofedsam": "--", "fedgamma": "--", "fedspeed": "--", "fedsmoo": "-.", "fedlesam-s": ":", "fedlesam-d": ":", "fedasam": "-.",
           "gcsam": "--", "fedavg-adam": (0, (6, 2, 1, 2, 1, 2)), "dynafed-adam": (0, (6, 2, 1, 2, 1, 2)), "fedga-previous": ":"}


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
