"""Figures of stored rows, and of two models side by side.

    python -m lab.figures A B     the loss landscapes of the runs in the folders A and B

The figures of claims, and one of all claims, are drawn by lab.claims and lab.report.

Every bar is a 95 % t-interval over the seeds (verdicts.py). seaborn's own bar is a bootstrap, which
at three seeds is far too short. Small dots are single seeds. The bars of two arms may overlap
although their paired difference is significant, since the arms share their seeds; so the
comparisons have a panel of their own.

Landscapes are filter-normalised (measures.py), with the same seeds for both models, and drawn on
the same scale: what differs in the picture differs in the models.
"""

import re
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.transforms import Bbox

import run
from lab import measures, study, verdicts
from lab.verdicts import MEASURES, Value
from plumbing.folder import read_json

BLUE, RED, GREY = "#0072B2", "#D55E00", "#808080"  # Okabe-Ito: also for colour-blind readers
OUTCOMES = {1: BLUE, -1: RED, 0: GREY}
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}
LINE = {"arrowstyle": "-", "lw": 0.6, "color": GREY, "shrinkA": 0, "shrinkB": 0}
BESIDE = {"textcoords": "offset pixels", "fontsize": 8, "va": "center", "in_layout": False}
BESIDE |= {"bbox": {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}}
PLACES = [(x, y) for x in (9, -9, 25, -25, 60, -60, 100, -100) for y in range(-300, 301, 4)]
PLACES.sort(key=lambda place: sum(np.abs(place)))  # in pixels from the point, the nearest first
plt.switch_backend("agg")  # no screen is needed


def file_name(name, task=""):
    """The file of a claim's figure for a task."""
    return re.sub(r"[^\w.-]+", "_", f"{name} {task}".strip()) + ".png"


def t_bar(x):
    """The t-interval of x as (low, high), as seaborn's `errorbar` wants it."""
    return verdicts.interval(x)[1:]


# --------------------------------------------------------------------------------- a claim's figure


def draw_claim(path, claim, table, found, word):
    """A claim's figure: some measures of every arm, and all judged comparisons."""
    judged = found[found.sign != 0]
    rows, wide = max(table.arm.nunique(), len(judged)), len(claim.panels)
    ratios = [1] * wide + [1.5]
    with plt.rc_context(STYLE):
        size = (4 + 2.2 * wide + 5, 1.6 + 0.23 * rows)
        page, axes = plt.subplots(
            1, wide + 1, figsize=size, width_ratios=ratios, layout="constrained"
        )
        for axis, measure in zip(axes, claim.panels):
            draw_arms(axis, table, measure)
            axis.tick_params(labelleft=axis is axes[0])
        draw_comparisons(axes[-1], judged, list(dict.fromkeys(table.arm)))
        axes[-1].set_title(f"comparisons: {word.lower()}")
        page.suptitle(
            f"{claim.name}: means and 95 % t-intervals over seeds. Comparisons, after Holm's "
            "correction: blue as claimed, red the other way, grey not significant",
            fontsize=9,
        )
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def draw_arms(axis, table, measure):
    """A line for each arm: its seeds, their mean and its t-interval."""
    table = table.assign(**{measure: table[measure].astype(float)})
    order = list(dict.fromkeys(table.arm))
    like = {"data": table, "x": measure, "y": "arm", "order": order, "ax": axis}
    bar = {"errorbar": t_bar, "capsize": 0.3, "linestyle": "none", "err_kws": {"linewidth": 1.2}}
    sns.pointplot(**like, **bar, color=GREY, marker="|", markersize=9, markeredgewidth=2)
    sns.stripplot(**like, color="black", size=4, alpha=0.6, jitter=False)
    axis.set(xlabel=MEASURES[measure][0], ylabel="")
    if measure == "eigenvalue" and table[measure].max() > 1000 * table[measure].min() > 0:
        axis.set_xscale("log")
    axis.grid(axis="y", visible=False)


def draw_comparisons(axis, found, arms):
    """Differences with their intervals, in the colour of their outcome, in blocks of one kind."""
    labels, y = [], 0.0
    found, unit = on_one_axis(found)
    for (about, measure), block in found.groupby(["about", "measure"], sort=False):
        head = about if measure.startswith("cos") else f"{MEASURES[measure][0]}: {about}"
        head = textwrap.fill(head, 55)
        y += 0.8 * head.count("\n")
        labels.append((y - 0.4 * head.count("\n"), head, True))
        for _, c in block.iterrows():
            y += 1
            colour = OUTCOMES.get(c.outcome, GREY)
            axis.plot([c.low, c.high], [y, y], color=colour, lw=1.5)
            axis.plot(c["mean"], y, "o", color=colour, ms=4)
            if c.margin:
                axis.vlines(-np.sign(c.sign) * c.margin, y - 0.5, y + 0.5, color="black", lw=0.8)
            labels.append((y, f"{arms_of(c, arms)}: {c.words}", False))
        y += 1.6
    axis.axvline(0, color="black", lw=0.8)
    axis.set(xlabel=unit, ylim=(y - 0.9, -0.8), xlim=room(found))
    axis.locator_params(axis="x", nbins=6)
    axis.set_yticks([at for at, *_ in labels], [text for _, text, _ in labels])
    for tick, (_, _, head) in zip(axis.get_yticklabels(), labels):
        tick.set(fontstyle="italic" if head else "normal", fontsize=8)
    axis.yaxis.tick_right()
    axis.spines["right"].set_visible(True)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", visible=False)


def on_one_axis(found):
    """Comparisons with the mean difference in words, and the unit of their axis.

    Those of several measures are each divided by the largest of their own numbers.
    """
    digits = [
        0 if abs(c["mean"]) >= 100 else verdicts.finer(c.measure) for _, c in found.iterrows()
    ]
    found = found.assign(words=[f"{x:+,.{n}f}" for x, n in zip(found["mean"], digits)])
    kinds = found.measure.where(~found.measure.str.startswith("cos"), "cosine")
    if kinds.nunique() < 2:
        return found, "difference"
    largest = found[["mean", "low", "high"]].abs().max(axis=1)
    scaled = found[["mean", "low", "high", "margin"]].div(largest, axis=0)
    return found.assign(**scaled), "difference, each on a scale of its own"


def arms_of(c, arms):
    """The arms of a comparison, without the settings in parentheses where that is clear."""
    short = {arm: arm.split(" (")[0] for arm in arms}
    if len(set(short.values())) < len(short):
        short = {arm: arm for arm in arms}
    first, second = short[c["first"]], short[c["second"]]
    return first if first == second else f"{first} − {second}"


# --------------------------------------------------------------------- gains over FedAvg of a claim

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#000000", "#808080")


def draw_gains(path, claim, table):
    """Paired differences to FedAvg over the splits, a line a direction; arms are "SPLIT, NAME"."""
    with plt.rc_context(STYLE | {"font.size": 10}):
        page, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        for axis, measure in zip(axes, ("accuracy", "mean_model")):
            names = list(claim.directions)[1:]
            for k, (name, colour) in enumerate(zip(names, COLOURS)):
                found = gains(claim, table, name, measure)
                at = np.arange(len(found)) + 0.08 * (k - len(names) / 2)
                axis.vlines(at, found.low, found.high, color=colour, lw=1.3)
                axis.plot(at, found["mean"], "o-", color=colour, ms=4, lw=0.8, label=name)
            axis.axhline(0, color="black", lw=0.8)
            axis.set(xticks=range(len(claim.splits)), xticklabels=claim.splits)
            axis.set(title=MEASURES[measure][0] + ", minus FedAvg's")
            axis.grid(axis="x", visible=False)
        page.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def gains(claim, table, name, measure):
    """A direction minus FedAvg on every split: DataFrame with mean, low, high."""
    pairs = [(f"{split}, {name}", f"{split}, fedavg") for split in claim.splits]
    both = [[Value(arm, measure) for arm in pair] for pair in pairs]
    found = [verdicts.interval(verdicts.differences(table, *pair)) for pair in both]
    return pd.DataFrame(found, columns=["mean", "low", "high"])


AGAINST = {"cos_used": "cosine to the true gradient", "eigenvalue": "top eigenvalue"}


def draw_against(path, claim, table, gain="accuracy"):
    """Gain over the baseline against each of AGAINST: an arm is a point with its 95 % t-interval.

    A row for each split. Arms that claim.apart, a regular expression, finds are named under the
    picture instead.
    """
    found, words = gains_against(claim, table, gain), []
    splits = found.split.unique()
    with plt.rc_context(STYLE | {"font.size": 10}):
        size = {"figsize": (12, 1 + 4.5 * len(splits)), "layout": "constrained"}
        page, axes = plt.subplots(len(splits), len(AGAINST), squeeze=False, sharex="col", **size)
        for row, split, colour in zip(axes, splits, COLOURS[3:]):
            near = found[(found.split == split) & ~found.apart]
            lr, some = near.rate.iloc[0], alike(near)
            for axis, measure in zip(row, AGAINST):
                for p in near[near[measure].notna()].itertuples():
                    x = getattr(p, measure)
                    draw_gain(axis, x, (p.mean, p.low, p.high), colour)
                    other = "" if p.rate == lr else f" (lr {p.rate:g})"
                    words.append((axis, x, p.mean, words_of(p.arm) + other))
                which = f" at lr {lr:g}, rho {some.rho.max():g}" if len(some) < len(near) else ""
                axis.set_title(f"rank correlation {rank_correlation(near, measure):+.2f}{which}")
                axis.axhline(0, color="black", lw=0.8)
            row[0].set_ylabel(f"{split}: {MEASURES[gain][0]},\nminus that without an ascent")
        for axis, (measure, title) in zip(axes[-1], AGAINST.items()):
            x = found[measure]
            axis.set_xscale("log" if 0 < 20 * x.min() < x.max() else "linear")
            axis.set_xlabel(title)
        page.supxlabel(out_of_the_picture(found), fontsize=9)
        page.draw_without_rendering()  # from now on every point has its place on the page
        write_beside(words)
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def out_of_the_picture(found):
    """The arms that are apart, and their gains: the text under the picture."""
    words = [f"{p.arm} ({p.mean:+.2f})" for p in found[found.apart].itertuples()]
    return textwrap.fill("out of the picture: " + ", ".join(words), 160) if words else ""


def gains_against(claim, table, gain):
    """A line for each arm: split, lr, rho, gain (mean, low, high), means of AGAINST, if apart."""
    arms, (common,) = list(dict.fromkeys(table.arm)), claim.tasks().values()
    found = pd.DataFrame([gain_of(claim, table, arm, gain) for arm in arms])
    found.columns = ["mean", "low", "high"]
    found["arm"], found["split"] = arms, [arm.split(", ")[0] for arm in arms]
    own = claim.arms("")
    settings = [study.fitting(common, own[arm]) for arm in arms]
    found["rate"], found["rho"] = ([s.get(x) for s in settings] for x in ("lr", "rho"))
    found["apart"] = [bool(re.search(claim.apart, arm)) for arm in arms]
    for measure in AGAINST:
        found[measure] = [verdicts.values(table, Value(arm, measure)).mean() for arm in arms]
    return found


def rank_correlation(found, measure):
    """Spearman's, of gain and a measure, over the arms of a split that are alike."""
    found = alike(found)
    return found[measure].corr(found["mean"], "spearman")


def alike(found):
    """The arms of a split with the learning rate of the first one, the baseline, and the radius of
    most. Another rate or radius moves accuracy and flatness, whatever the direction."""
    found = found[found.rate == found.rate.iloc[0]]
    return found[found.rho.isna() | found.rho.isin(found.rho.mode()[:1])]


def write_beside(points):
    """The words of (axis, x, y, words) near their points, each with a line to its own.

    They take the nearest place at which they cover no point and no other words. A point whose
    words are "" is only kept free.
    """
    dots = [axis.transData.transform((x, y)) for axis, x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    for axis, x, y, words in [point for point in points if point[-1]]:
        text = axis.annotate(words, (x, y), (0, 0), **BESIDE)
        box = text.get_window_extent()
        text.remove()
        for right, up in PLACES:
            left = right if right > 0 else right - box.width
            place = box.translated(left, up)
            inside = axis.bbox.x0 < place.x0 and place.x1 < axis.bbox.x1
            if inside and not any(place.overlaps(other) for other in taken):
                break
        line = LINE | {"relpos": (right < 0, 0.5)}  # from the nearer end of the words
        axis.annotate(words, (x, y), (left, up), arrowprops=line, **BESIDE)
        taken.append(place)


def draw_gain(axis, x, ends, colour):
    """A point at x with its interval (y, low, high)."""
    axis.vlines(x, *ends[1:], color=colour, lw=1, alpha=0.6)
    axis.plot(x, ends[0], "o", color=colour, ms=5, zorder=5)


def words_of(arm):
    """How an arm is called in a picture, where the colour says its split."""
    return arm.split(", ", 1)[1].split(" (")[0]


def gain_of(claim, table, arm, measure):
    """An arm minus its baseline: (mean, low, high)."""
    pair = Value(arm, measure), Value(claim.baseline(arm), measure)
    return verdicts.interval(verdicts.differences(table, *pair))


def draw_sharpness(path, claim, table):
    """Accuracy against the top eigenvalue: what one bit does to a method, and an ascent to that.

    A colour for each of claim.families (no ascent, own, synthetic, true): an arrow leads from 2
    bits to 1 bit, and lines from there to the three ascents. Crosses are 95 % t-intervals.
    """
    with plt.rc_context(STYLE | {"font.size": 10}):
        page, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        for family, colour in zip(claim.families, COLOURS[4:2:-1]):
            arms = (f"{family[0]}, 2 bits", *family)
            points = [draw_cross(axis, table, arm, colour) for arm in arms]
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 6, "shrinkB": 6, "lw": 2}
            axis.annotate("", points[1], points[0], arrowprops=arrow)
            for point in points[2:]:
                axis.plot(*zip(points[1], point), ":", color=colour, lw=1)
        axis.set(xscale="log", xlabel="top eigenvalue (log scale)", ylabel="test accuracy %")
        axis.set_title("arrow: one bit in place of two; dotted: the same with an ascent")
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def draw_cross(axis, table, arm, colour):
    """An arm as a point with two intervals and its label: the point."""
    x, *x_ends = verdicts.interval(verdicts.values(table, Value(arm, "eigenvalue")))
    y, *y_ends = verdicts.interval(verdicts.values(table, Value(arm, "accuracy")))
    axis.plot(np.maximum(x_ends, x / 4), [y, y], color=colour, lw=0.8)
    axis.plot([x, x], y_ends, color=colour, lw=0.8)
    axis.plot(x, y, "o", color=colour, ms=6)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    axis.annotate(arm, (x, y), (6, 6), textcoords="offset points", fontsize=9, bbox=white, zorder=5)
    return x, y


# --------------------------------------------------------------------------- all claims on one page


def to_fedavg(claim, table, measure):
    """Paired differences of every arm to FedAvg: DataFrame with arm, mean, low, high."""
    arms, rows = list(dict.fromkeys(table.arm)), []
    for arm in arms:
        base = claim.baseline(arm)  # or its beginning, as "fedavg (" of "fedavg (lr 0.2)"
        base = base if base in arms else next((a for a in arms if a.startswith(base)), None)
        if base not in (None, arm):
            x = verdicts.differences(table, Value(arm, measure), Value(base, measure))
            rows.append((arm, *verdicts.interval(x)))
    return pd.DataFrame(rows, columns=["arm", "mean", "low", "high"])


def draw_overview(path, claims):
    """Every arm of every claim on one page: accuracy and top eigenvalue minus the baseline's.

    claims: {name: (claim, table)}.
    """
    sizes = {
        name: len(to_fedavg(claim, table, "accuracy")) for name, (claim, table) in claims.items()
    }
    sizes = {name: size for name, size in sizes.items() if size}
    columns = in_two(sizes)
    with plt.rc_context(STYLE | {"font.size": 8}):
        tall = max(sum(sizes[name] + 3 for name in column) for column in columns)
        page = plt.figure(figsize=(15, 0.8 + 0.19 * tall), layout="constrained")
        for part, column in zip(page.subfigures(1, len(columns), squeeze=False)[0], columns):
            ratios = [sizes[name] + 2 for name in column]
            axes = part.subplots(len(column), 2, height_ratios=ratios, squeeze=False)
            for pair, name in zip(axes, column):
                draw_pair(pair, name, *claims[name])
        page.suptitle(
            "Every arm minus FedAvg (descent: FedSynSAM; half of whose, most of means: FedDyn; "
            "levels: itself, 1 bit), same seeds: mean and 95 % t-interval, without correction. "
            "Blue: better, red: worse, grey: it crosses 0",
            fontsize=10,
        )
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def in_two(sizes):
    """Names in two columns of about equal height, or in one if there is one."""
    left, half = [], sum(sizes.values()) / 2
    for name, n in sizes.items():
        if not left or sum(sizes[x] for x in left) + n / 2 <= half:
            left.append(name)
    columns = left, [name for name in sizes if name not in left]
    return [column for column in columns if column]


def draw_pair(axes, name, claim, table):
    """Accuracy and top eigenvalue of a claim's arms, minus FedAvg's."""
    for axis, measure, good in zip(axes, ("accuracy", "eigenvalue"), (1, -1)):
        found = to_fedavg(claim, table, measure)
        for y, c in enumerate(found.itertuples()):
            crosses = not (c.low > 0 or c.high < 0)
            colour = GREY if crosses else BLUE if good * c.mean > 0 else RED
            axis.plot([c.low, c.high], [y, y], color=colour, lw=1.5)
            axis.plot(c.mean, y, "o", color=colour, ms=3.5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(ylim=(len(found) - 0.4, -0.6), yticks=range(len(found)))
        axis.set_yticklabels(found.arm if measure == "accuracy" else [])
        axis.set_title(f"{name}: {MEASURES[measure][0]}", fontsize=9, loc="left")
        axis.grid(axis="y", visible=False)
        axis.set_xlim(*room(found))
        sizes = found["mean"].abs()
        if sizes.max() > 100 * sizes.median():  # FedDyn's with one bit: the others must be seen
            axis.set_xscale("symlog", linthresh=sizes.median())


def room(found):
    """Limits of an axis: all means, but bars only up to some length; longer ones run out of it."""
    ends = found[["low", "high"]].abs().max(axis=1)
    reach = 1.1 * max(found["mean"].abs().max(), 1.6 * np.nanmedian([*ends, 0.0]), 1e-3)
    low, high = np.nanmin([*found.low, 0]), np.nanmax([*found.high, 0])
    margin = 0.05 * (min(high, reach) - max(low, -reach)) or 1.0
    return max(low, -reach) - margin, min(high, reach) + margin


# --------------------------------------------------------------------------------------- landscapes


def draw_landscapes(path, titles, at, planes):
    """The loss around two models side by side, and the slices through both, on one scale.

    at [n]: places along both directions; planes: for each model a list of rows of losses.
    """
    planes = [np.array(plane) for plane in planes]
    low, high = min(p.min() for p in planes), ceiling(planes)
    a, b = np.meshgrid(at, at, indexing="ij")
    with plt.rc_context(STYLE):
        page = plt.figure(figsize=(11, 8), layout="constrained")
        grid = page.add_gridspec(2, 6, height_ratios=[1.5, 1])
        for k, (title, plane) in enumerate(zip(titles, planes)):
            axis = page.add_subplot(grid[0, 3 * k : 3 * k + 3], projection="3d")
            shown = np.minimum(plane, high)
            axis.plot_surface(a, b, shown, cmap="viridis", vmin=low, vmax=high, lw=0.2, ec="white")
            axis.set(zlim=(low, high), title=title, xlabel="a", ylabel="b", zlabel="training loss")
            axis.set(xticks=[at[0], 0, at[-1]], yticks=[at[0], 0, at[-1]])
            axis.set_box_aspect((1, 1, 0.7), zoom=0.95)
            axis.view_init(28, -60)
            flat = page.add_subplot(grid[1, 2 * k : 2 * k + 2], aspect="equal")
            draw_contours(flat, at, plane, np.geomspace(max(low, 1e-6) * 1.02, high, 12))
            flat.set_title(title, fontsize=8)
        draw_slices(page.add_subplot(grid[1, 4:6]), titles, at, planes)
        page.savefig(path, bbox_inches="tight")
        plt.close(page)


def ceiling(planes):
    """Where the pictures are cut off: the highest loss two thirds of the way out."""
    n = len(planes[0])
    inside = slice(n // 6, n - n // 6)
    return max(plane[inside, inside].max() for plane in planes)


def draw_contours(axis, at, plane, levels):
    lines = axis.contour(at, at, plane.T, levels=levels, cmap="viridis")
    axis.clabel(lines, lines.levels[::2], fontsize=7, fmt="%.2g")
    axis.plot(0, 0, "+", color="black", ms=8)
    axis.set(xlabel="a, along one random direction", ylabel="b, along another")


def draw_slices(axis, titles, at, planes):
    middle = len(at) // 2
    for title, plane, colour in zip(titles, planes, (BLUE, RED)):
        axis.plot(at, plane[:, middle], color=colour, label=title)
        axis.plot(at, plane[middle], color=colour, ls="--")
    axis.set(xlabel="a (solid), b (dashed)", ylabel="training loss")
    axis.legend(frameon=False, fontsize=8, loc="upper center")
    axis.margins(y=0.25)


def landscapes_of_folders(path, folders, points=25, span=1.0):
    """The figure of two finished runs, from their folders; planes are kept in the folders."""
    d = {read_json(folder / "result.json")["d"] for folder in folders}
    if len(d) > 1:
        raise ValueError(f"the models have {sorted(d)} parameters; compare models of one network")
    wanted = {"plane": {"points": points, "span": span}}
    found = [measures.measure(folder, wanted) for folder in folders]
    titles = [read_json(folder / "config.json")["label"] for folder in folders]
    titles = [f"{title} ({folder.name})" for title, folder in zip(titles, folders)]
    draw_landscapes(path, titles, found[0]["plane_at"], [f["plane"] for f in found])


def landscapes_of_rows(path, table, arms):
    """The figure of two arms of `sharpness`, from the stored planes of seed 0."""
    rows = [table[(table.arm == arm) & table.plane.notna()].iloc[0] for arm in arms]
    titles = [f"{row.arm}, round {row.log[-1]['round']}" for row in rows]
    draw_landscapes(path, titles, rows[0].plane_at, [row.plane for row in rows])


# -------------------------------------------------------------------------------------- the command


def main(argv=None):
    """The command: exit code 0 or 2."""
    p = run.Parser(prog="python -m lab.figures", description=__doc__.split("\n")[0])
    p.add_argument("folders", nargs=2, type=Path, help="two finished runs")
    p.add_argument("--out", type=Path, default=Path("landscape.png"))
    p.add_argument("--points", type=int, default=25, help="along each direction")
    p.add_argument("--span", type=float, default=1.0, help="how far, 1: a norm of the weights")
    try:
        given = p.parse_args(argv)
        landscapes_of_folders(given.out, given.folders, given.points, given.span)
    except (ValueError, OSError) as error:
        print(f"lab.figures: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
