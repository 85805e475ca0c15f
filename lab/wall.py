"""One page for the wall of a classroom: whose gradient should a client climb?

    python -m lab.report --draw          draws results/wall.png, too

Three jobs, a row each. A dot is an ascent direction: its gain over no ascent, against its cosine to
the global gradient (left) and against the sharpness of the model that it leads to (right). In a row
all directions have one learning rate and one radius.
"""

import textwrap

import matplotlib.pyplot as plt

from lab import figures

TITLE = "Whose gradient should a client climb?"
ABOUT = (
    "Sharpness-aware minimization (SAM) computes every gradient at w + ρ u / ‖u‖, a little way up "
    "the loss. In federated learning, which way is up? A dot is one ascent direction u: its gain "
    "over no ascent, the mean of three to five runs, with its 95 % interval. Up is better. In a "
    "row all directions have one learning rate; ρ is 0.1. What u is the gradient of:"
)
KINDS = {  # colour: (what u is made of, how the names of such directions begin)
    "#D55E00": (
        "this client's loss: on the batch of the step (own), on another batch, on all its images",
        ("own", "another batch", "whole client"),
    ),
    "#0072B2": (
        "the loss of others: one other client; all clients (true), which only an experiment knows",
        ("true", "another client"),
    ),
    "#009E73": (
        "the loss on synthetic images, learnt from the path of the global model, or random",
        ("synthetic",),
    ),
    "#CC79A7": ("own and synthetic in one", ("mixture", "debiased", "synthetic, debiased")),
    "#808080": (
        "nothing: the way back to the model received last (last update), random numbers, no ascent",
        ("last update", "random", "none", "fedavg"),
    ),
}
ROWS = {  # (claim, split): what the job is, and what its row says
    ("whose", "FedAvg"): (
        "Fashion-MNIST, clients with images of one class, one bit a parameter: FedAvg",
        "No direction gains much. On average the flatter models are the better ones; the client's "
        "own gradients, which point away from the global one, make the flattest.",
    ),
    ("whose", "FedDyn"): (
        "The same with drift correction (FedDyn), which keeps clients from their own optimum",
        "The true gradient gains most, {FedDyn, true - FedDyn, none | accuracy} points, "
        "with ten images {FedDyn, true of 10 images - FedDyn, none | accuracy}. The own one makes "
        "the flattest models, and gains nothing, {FedDyn, own, as true - FedDyn, none | accuracy}; "
        "with a larger learning rate {FedDyn, own - FedDyn, none | accuracy}.",
    ),
    ("overfit", "Dir 0.1"): (
        "10,000 photographs (CIFAR-10), few classes a client, two bits: FedAvg overfits",
        "Directions gain most in which the very batch of the step takes part: own "
        "{Dir 0.1, own - Dir 0.1, fedavg | test_loss} of test loss, half own and half synthetic "
        "{Dir 0.1, mixture - Dir 0.1, fedavg | test_loss}. The true one has "
        "{Dir 0.1, true - Dir 0.1, fedavg | test_loss}, of 2,000 images "
        "{Dir 0.1, true of 2000 images - Dir 0.1, fedavg | test_loss}.",
    ),
}
END = (
    "Flatness goes with the gain in two jobs, nearness to the global gradient in one: neither is "
    "the whole answer, and a correlation is not a cause. No interval is corrected for their "
    "number. With the correction the gain of the own gradient in the third job is not "
    "significant; with new seeds, and with all 50,000 images, it is. Claims, rules: results/."
)
AXES = {
    "cos_used": ("cosine of u to the global gradient", "cosine"),
    "eigenvalue": (
        "top eigenvalue of the Hessian: flat on the left, sharp on the right",
        "eigenvalue",
    ),
}
LABELS = {  # what is written beside a dot; the others have none
    "own": "own",
    "another batch": "another batch",
    "whole client": "all its images",
    "another client": "another client",
    "true": "true, 100 images",
    "true of 10 images": "true, 10 images",
    "true of 500 images": "true, 500 images",
    "true of 2000 images": "true, 2,000 images",
    "synthetic": "synthetic",
    "synthetic, rho 0.1": "synthetic",
    "synthetic, not learnt": "random images",
    "mixture": "half own, half synthetic",
    "last update": "last update",
    "random": "random",
    "none": "no ascent",
    "fedavg": "no ascent",
}


def colour_of(words):
    """The colour of a direction, by the longest beginning that fits."""
    fits = [(len(x), c) for c, (_, names) in KINDS.items() for x in names if words.startswith(x)]
    return max(fits)[1]


def draw_wall(path, stored, filled):
    """The page, A3 upright. stored: {name: (claim, table)} of `whose` and `overfit`.

    filled: makes of a text and a table the text with its numbers (report.py).
    """
    words = []
    with plt.rc_context(figures.STYLE | {"font.size": 10, "figure.dpi": 150}):
        page, axes = plt.subplots(len(ROWS), 2, figsize=(11.7, 16.5))
        page.subplots_adjust(0.09, 0.085, 0.97, 0.74, wspace=0.16, hspace=0.75)
        page.text(0.05, 0.975, TITLE, fontsize=26, weight="bold", va="top")
        write(page, 0.942, ABOUT)
        for k, (colour, (what, _)) in enumerate(KINDS.items()):
            page.text(0.06, 0.8965 - 0.0155 * k, "●", color=colour, fontsize=12, va="top")
            page.text(0.08, 0.896 - 0.0155 * k, what, fontsize=11.5, va="top")
        write(page, 0.05, END)
        for row, ((name, split), (job, said)) in zip(axes, ROWS.items()):
            claim, table = stored[name]
            words += draw_row(row, claim, table, split)
            top = row[0].get_position().y1
            page.text(0.05, top + 0.05, job, fontsize=14, weight="bold", va="bottom")
            write(page, top + 0.046, filled(said, table))
        page.draw_without_rendering()
        figures.write_beside(words)
        page.savefig(path)
        plt.close(page)


def write(page, top, text):
    """A paragraph over the whole width."""
    page.text(0.05, top, textwrap.fill(text, 128), fontsize=11.5, va="top", linespacing=1.35)


def draw_row(row, claim, table, split):
    """The two panels of a job: the labels still to be written, as write_beside wants them."""
    loss = claim.name == "overfit"
    found = figures.gains_against(claim, table, "test_loss" if loss else "accuracy")
    near = figures.alike(found[(found.split == split) & ~found.apart])
    labels = []
    for axis, (measure, (title, short)) in zip(row, AXES.items()):
        for p in near[near[measure].notna()].itertuples():
            x = getattr(p, measure)
            words = figures.words_of(p.arm).removesuffix(", as true")
            figures.draw_gain(axis, x, (p.mean, p.low, p.high), colour_of(words))
            labels.append((axis, x, p.mean, LABELS.get(words, "")))
        if near[measure].min() > 0 and near[measure].max() > 8 * near[measure].min():
            axis.set_xscale("log")
        correlation = figures.rank_correlation(near, measure) * (-1 if loss else 1)
        axis.set(xlabel=title, title=f"rank correlation of gain and {short}: {correlation:+.2f}")
        axis.axhline(0, color="black", lw=0.8)
        if loss:
            axis.invert_yaxis()  # up is better everywhere
    row[0].set_ylabel("test loss, minus FedAvg's" if loss else "points of test accuracy gained")
    return labels
