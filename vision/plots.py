"""The two pictures of a run: curves over rounds and over bytes, and the synthetic images.

matplotlib is imported only when something is drawn, so that a run starts without it.
"""

import contextlib

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart, and then strokes
COLOURS = "#D55E00 #0072B2 #000000 #009E73 #CC79A7 #E69F00 #56B4E9".split()
STROKES = ["-", "--", ":", "-.", (0, (8, 2, 2, 2))]
STYLE = {
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@contextlib.contextmanager
def drawing(path, width, height):
    """A figure of so many inches to draw on; afterwards it is written to path."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # inches
        yield figure
        figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------- curves


def curve(path, logs, title):
    """Draw test accuracy and training loss over rounds, and test accuracy over megabytes sent up.

    logs: {label: [rows of the log of seed 0, of seed 1, ...]}. Rows of evaluated rounds have
    "round", "up" (bytes), "test_acc" (0..1) and "train_loss"; others are left out. With several
    seeds, the line is their mean and the band one standard deviation.
    """
    panels = [
        ("round", 1, "test_acc", 100, "test accuracy (%)"),
        ("round", 1, "train_loss", 1, "training loss"),
        ("up", 1e-6, "test_acc", 100, "test accuracy (%)"),
    ]
    with drawing(path, 12.5, 4.2) as figure:
        axes = figure.subplots(1, 3)
        for axis, (x, x_scale, y, y_scale, y_label) in zip(axes, panels):
            ends = []
            for n, (label, runs) in enumerate(logs.items()):
                runs = evaluated(runs)
                at = x_scale * column(runs, x).mean(0)
                values = y_scale * column(runs, y)
                band(axis, at, values, label, n)
                ends += list(values[np.isfinite(values)])
            axis.set(xlabel="megabytes sent up" if x == "up" else x, ylabel=y_label)
            axis.set_xlim(left=0)
            zoom(axis, ends, y_label)
        handles, labels = axes[0].get_legend_handles_labels()
        if len(labels) > 1:
            under = {"loc": "outside lower center", "ncols": min(7, len(labels))}
            for text in figure.legend(handles, labels, **under).get_texts():
                text.set_parse_math(False)  # a $ in a name is no mathematics
        figure.suptitle(title, weight="bold", parse_math=False)


def evaluated(runs):
    """The evaluated rows of each run, as many as the shortest run has: [seeds][rows]."""
    runs = [[row for row in rows if "test_acc" in row] for rows in runs]
    shortest = min(map(len, runs))
    return [rows[:shortest] for rows in runs]


def column(runs, key):
    """[seeds, rows]"""
    return np.array([[row[key] for row in rows] for rows in runs], dtype=float)


def band(axis, x, y, label, n):
    """A line through the means of y [seeds, points], in a band of one standard deviation."""
    colour, stroke = COLOURS[n % len(COLOURS)], STROKES[n // len(COLOURS) % len(STROKES)]
    middle = y.mean(0)
    axis.plot(x, middle, color=colour, linestyle=stroke, linewidth=1.6, label=label)
    if len(y) > 1 and n < 7:  # more bands would hide each other
        spread = y.std(0, ddof=1)
        axis.fill_between(x, middle - spread, middle + spread, color=colour, alpha=0.12, lw=0)


def zoom(axis, values, label):
    """Good methods differ near the best value: then leave out what the first rounds do."""
    if not values:
        return
    if label == "training loss":
        axis.set_ylim(0, max(4 * min(values), 1e-3))
    else:
        best = max(values)
        axis.set_ylim(best - 25 if best > 75 else 0, min(100.5, best + 2))


# -------------------------------------------------------------------------------- synthetic images


def grid(path, images, logits, train):
    """Draw synthetic images, a column for each class, and below each how sure its label is.

    images [n, C, H, W] normalised, in the order of their classes; logits [n, classes] of their
    labels; train: data.Images, whose mean and std undo the normalisation. An image stands in the
    column of the class that it began as; if its label now favours another, that one is named, in
    colour. At most 20 classes are drawn.
    """
    names, each = train.classes, len(images) // len(train.classes)
    columns = min(len(names), 20)
    pixels, shares = denormalised(images, train), logits.softmax(1).cpu()
    tall = pixels.shape[1] / pixels.shape[2]
    pitch = tall + 0.3  # from one image to that below it, in widths of an image
    inch = min(1.2, 13 / columns, 7.5 / (pitch * each))  # that width, so that all fit on a screen
    height = inch * (pitch * each + 0.3) + 0.6
    with drawing(path, max(7, inch * columns), height) as figure:
        axis = figure.subplots()
        for c, name in enumerate(names[:columns]):
            write(axis, c, -0.1, name, inch, weight="bold")
        for i in range(each * columns):
            column, top = i // each, pitch * (i % each)
            place = (column + 0.03, column + 0.97, top + 0.94 * tall, top)
            axis.imshow(pixels[i], cmap="gray", vmin=0, vmax=1, extent=place)
            says, colour = learnt_label(shares[i], column, names)
            write(axis, column, top + tall + 0.11, says, inch, color=colour)
        axis.set(xlim=(0, columns), ylim=(pitch * each, -0.3))
        axis.set_axis_off()
        some = "" if columns == len(names) else f" of the first {columns} classes"
        figure.suptitle(f"synthetic images{some}: class at the start, and what the label says now")


def learnt_label(shares, column, names):
    """What to write below an image with label shares [classes] -> (text, colour)."""
    share, favoured = shares.max(0)
    if favoured == column:
        return f"{100 * share:.0f} %", "black"
    return f"{names[favoured]} {100 * share:.0f} %", COLOURS[0]


def write(axis, column, y, text, inch, **style):
    """Write centred in a column of `inch` inches, small enough to fit into it."""
    size = min(8, 115 * inch / max(1, len(text)))
    axis.text(column + 0.5, y, text, ha="center", fontsize=size, **style)


def denormalised(images, train):
    """Normalised images [n, C, H, W] -> [n, H, W, C], or [n, H, W] if they are grey; in 0..1."""
    mean, std = train.mean[:, None, None], train.std[:, None, None]
    pixels = (images.to(mean) * std + mean).clamp(0, 255) / 255
    return pixels.permute(0, 2, 3, 1).squeeze(3).cpu().numpy()
