"""One page for the wall of a classroom: whose gradient should a client climb?

    python -m lab.report --draw          draws results/wall.png, too

Three jobs, a row each. A dot is an ascent direction: its gain over no ascent, against its cosine to
the global gradient (left) and against the sharpness of the model that it leads to (right). All
directions of a row have the learning rate of its baseline.
"""

import textwrap

import matplotlib.pyplot as plt

from lab import figures

TITLE = "Whose gradient should a client climb?"
ABOUT = (
    "Sharpness-aware minimization computes every gradient at w + ρ u / ‖u‖, a little way up the "
    "loss. In federated learning, which way is up? The ascent direction u may be the client's own "
    "gradient; the gradient of other clients; that of synthetic images, which the server learnt; "
    "the way back to an older model; or the true one, on images of all clients, which only an "
    "experiment can know. Each dot is one of them: the mean of three to five runs and its 95 % "
    "interval. Up is better."
)
ROWS = {  # (claim, split): what the job is, and what its row says
    ("whose", "FedAvg"): (
        "FedAvg, one bit a parameter, clients with images of one class",
        "Little is gained. On average the flatter models are the better ones, whoever showed the "
        "way; the client's own gradient, which points away from the global one, flattens most.",
    ),
    ("whose", "FedDyn"): (
        "The same with drift correction (FedDyn)",
        "The nearer to the global gradient, the better: the true one gains {FedDyn, true - FedDyn, "
        "none | accuracy} points. The client's own makes the flattest models, and gains "
        "nothing, {FedDyn, own, as true - FedDyn, none | accuracy}; with a learning rate of its "
        "own {FedDyn, own - FedDyn, none | accuracy}.",
    ),
    ("overfit", "Dir 0.1"): (
        "FedAvg, two bits a parameter, 10,000 photographs: training overfits",
        "The gradient of the very batch of the step gains most, {Dir 0.1, own - Dir 0.1, fedavg | "
        "test_loss} of test loss; the true one {Dir 0.1, true - Dir 0.1, fedavg | test_loss}. "
        "What flattens helps; the cosine to the global gradient says nothing.",
    ),
}
END = (
    "So neither flatness nor the global direction is the whole answer: each explains one job and "
    "not another. Brackets are 95 % intervals of paired differences. Nothing here is judged; the "
    "claims, their rules and all settings stand in results/."
)
AXES = {
    "cos_used": "cosine of u to the true gradient",
    "eigenvalue": "top eigenvalue of the Hessian (flat on the left, sharp on the right)",
}
KINDS = {  # colour: (what u is made of, how the names of such directions begin)
    "#D55E00": ("this client's images", ("own", "another batch", "whole client")),
    "#0072B2": ("real images of others", ("true", "another client")),
    "#009E73": ("synthetic images", ("synthetic",)),
    "#CC79A7": ("both: own and synthetic", ("mixture", "debiased", "synthetic, debiased")),
    "#808080": ("no image, or no ascent", ("last update", "random", "none", "fedavg")),
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
        page.subplots_adjust(0.09, 0.11, 0.97, 0.795, wspace=0.16, hspace=0.6)
        page.text(0.05, 0.965, TITLE, fontsize=26, weight="bold", va="top")
        page.text(0.05, 0.93, textwrap.fill(ABOUT, 122), fontsize=12, va="top", linespacing=1.4)
        dots = [plt.Line2D([], [], color=c, marker="o", ls="") for c in KINDS]
        what = [what for what, _ in KINDS.values()]
        page.legend(dots, what, loc="lower center", ncols=5, frameon=False, columnspacing=1)
        page.text(0.05, 0.068, textwrap.fill(END, 136), fontsize=11, va="top", linespacing=1.4)
        for row, ((name, split), (job, said)) in zip(axes, ROWS.items()):
            claim, table = stored[name]
            words += draw_row(row, claim, table, split)
            top = row[0].get_position().y1
            page.text(0.05, top + 0.054, job, fontsize=14, weight="bold", va="bottom")
            text = textwrap.fill(filled(said, table), 128)
            page.text(0.05, top + 0.049, text, fontsize=11.5, va="top", linespacing=1.4)
        page.draw_without_rendering()
        figures.write_beside(words)
        page.savefig(path)
        plt.close(page)


def draw_row(row, claim, table, split):
    """The two panels of a job: the labels still to be written, as write_beside wants them."""
    loss = claim.name == "overfit"
    found = figures.gains_against(claim, table, "test_loss" if loss else "accuracy")
    near = found[(found.split == split) & ~found.apart]
    near = near[near.rate == near.rate.iloc[0]]
    labels = []
    for axis, measure in zip(row, AXES):
        for p in near[near[measure].notna()].itertuples():
            x, ends = getattr(p, measure), (p.mean, p.low, p.high)
            words = figures.words_of(p.arm).removesuffix(", as true")
            figures.draw_gain(axis, x, ends, colour_of(words))
            if (axis, words) not in [(label[0], label[-1]) for label in labels]:
                labels.append((axis, x, p.mean, words))
        axis.set_xlabel(AXES[measure])
        correlation = figures.rank_correlation(near, measure)
        axis.set_title(f"rank correlation {-correlation if loss else correlation:+.2f}")
        axis.axhline(0, color="black", lw=0.8)
        if loss:
            axis.invert_yaxis()  # up is better everywhere
    if near.eigenvalue.max() > 20 * near.eigenvalue.min():
        row[1].set_xscale("log")
    row[0].set_ylabel("test loss, minus FedAvg's" if loss else "test accuracy, points gained")
    return labels
