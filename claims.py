"""The claims of FedSynSAM, each as an experiment; what would refute it is written before it is run.

    python run.py --experiment NAME --size quick | cpu | gpu        quick: does it work; cpu: half an hour on two cores; gpu: the full form

    sharpness   compression makes the global landscape sharper, more so when clients differ           (FedSynSAM)
    alignment   own gradient and last move mis-estimate the global direction, synthetic data do not    (FedSynSAM)
    accuracy    under compression FedSynSAM generalises better than its rivals                         (FedSynSAM)
    hyper       FedSynSAM is robust to its settings                                                    (FedSynSAM)
    fedsynth, gradalign, man, oracle                                                                   (relatives.py)

What is compared shares seeds, rounds and the rule how settings were chosen (tune.py, or the defaults for all); differences are paired and
the verdict is computed from them (study.py). A verdict is about these images, networks and rounds, and no more than that.

"cpu: ... minutes" are what two processes took on two cores of an AMD EPYC, beside a little other work. Sources: each class names its own. Read next: show.py.
"""
import math
import statistics

import landscape
import relatives
import sharpness
import study
import tune
from study import accuracy, compared, differs, eigenvalue, judge, paired, said, values
from tools import plot

UPLINKS = {"none": {"compress": "identity"}, "4 bits": {"compress": "qsgd", "levels": 7}, "2 bits": {"compress": "qsgd", "levels": 1},
           "top 10 %": {"compress": "topk", "k": 0.1}, "top 1 %": {"compress": "topk", "k": 0.01}}
SPLITS = {"IID": {"partition": "iid"}, "Dir 0.6": {"alpha": 0.6}, "Dir 0.1": {"alpha": 0.1}}


def lines_of(rows, key):
    """The lines of every row's log that have `key` -> list of lists of dicts, one for each row that did not diverge."""
    return [[x for x in r["log"] if key in x] for r in rows if "diverged" not in r]


# --------------------------------------------------------------------------------------------------------- sharpness
class Sharpness(study.Claim):
    """Top eigenvalue, trace and SAM sharpness of FedAvg's model against compression and skew, at equal rounds and at equal training loss.

    Equal loss: the lower of two runs is read where it first came as low as the other one ever did, interpolated between the
    rounds in which the eigenvalue was measured. cpu: 3 seeds x 15 runs of 36 rounds, 26 minutes.
    Source: FedSynSAM, abstract, its first claim.
    """
    name, source = "sharpness", "FedSynSAM, arXiv 2602.11584"
    says = "Compression makes the global loss landscape sharper, and more so the more the clients differ"
    refuted = ("the top eigenvalue with compression is below that without it at equal training loss, or its excess is smaller at Dir 0.1 than IID; "
               "it holds if every compressor and split goes the claimed way")

    def cells(self, world):
        rounds = {"quick": 4, "cpu": 36}.get(self.size, self.worlds()[world].get("rounds"))
        splits, uplinks = (("IID", "Dir 0.1"), ("none", "2 bits")) if self.size == "quick" else (SPLITS, UPLINKS)
        small = {"measure_images": 500} if self.size == "cpu" else {}
        return {f"{split}, {uplink}": {"algo": "fedavg", "rounds": rounds, "measure_every": max(1, rounds // 6), **small, **SPLITS[split], **UPLINKS[uplink]}
                for split in splits for uplink in uplinks}

    def measure(self, fed, rows):
        L = sharpness.Objective(fed.task.apply, fed.task.train, rows, each=fed.pool.map)
        points = {"quick": 3}.get(self.size, 21)
        trace = sharpness.trace(L.hessian(fed.w), fed.w, samples={"quick": 2}.get(self.size, 10))
        rise = landscape.sam_sharpness(L.loss, L.gradient, fed.w, fed.cfg.rho, steps=5)
        first, second = (landscape.filter_direction(fed.w, fed.task.shapes, seed) for seed in (0, 1))
        at, losses = landscape.line(L.loss, fed.w, first, points)
        out = {"trace": trace.estimate, "trace_error": trace.error, "sam": rise.ascent, "slice_at": at.tolist(), "slice": losses.tolist()}
        if fed.cfg.seed == 0:                                        # a plane is drawn for one seed only: points^2 losses
            at, losses = landscape.plane(L.loss, fed.w, first, second, points // 2 + 1)
            out |= {"plane_at": at.tolist(), "plane": losses.tolist()}
        return out

    def derive(self, cells):
        for label, rows in cells.items():
            plain = {r["seed"]: r for r in cells[label.split(", ")[0] + ", none"] if "diverged" not in r}
            for r in rows:
                if "diverged" not in r and r["seed"] in plain:
                    r["excess"] = excess_at_equal_loss(r, plain[r["seed"]])

    def columns(self):
        return [*super().columns(), ("minus without compression, at equal loss", lambda r: r.get("excess"), "+.1f"), ("trace", lambda r: r["trace"], ".0f"),
                ("SAM sharpness", lambda r: r["sam"], ".3f")]

    def verdict(self, cells):
        splits, uplinks = (list(dict.fromkeys(label.split(", ")[n] for label in cells)) for n in (0, 1))
        excess = lambda r: r.get("excess")                                                                                         # noqa: E731
        one = {f"{u}, {s}": values(cells[f"{s}, {u}"], excess) for u in uplinks[1:] for s in splits}
        more = {u: paired(cells[f"{splits[-1]}, {u}"], cells[f"{splits[0]}, {u}"], excess) for u in uplinks[1:]}
        (sharp, words), (grows, skew) = compared(one, "+.1f", 1, "sharper", "flatter"), compared(more, "+.1f")
        return (f"{judge(sharp + grows)}: top eigenvalue at equal training loss, minus that without compression: {words}. "
                f"That excess at {splits[-1]}, minus the one {splits[0]}: {skew}")

    def draw(self, cells, path):
        splits, uplinks = (list(dict.fromkeys(label.split(", ")[n] for label in cells)) for n in (0, 1))
        worst = splits[-1]
        with plot.figure(path, 3, 2, foot=0.3) as axes:
            plot.dots(axes[0], {s: {u: values(cells[f"{s}, {u}"], eigenvalue) for u in uplinks} for s in splits}, "top Hessian eigenvalue", "at equal rounds")
            plot.dots(axes[1], {s: {u: values(cells[f"{s}, {u}"], lambda r: r.get("excess")) for u in uplinks} for s in splits},
                      "top eigenvalue, minus uncompressed", "at equal training loss")
            for n, u in enumerate(uplinks):
                rows = [r for r in cells[f"{worst}, {u}"] if "slice" in r]
                plot.band(axes[2], rows[0]["slice_at"] if rows else [], [r["slice"] for r in rows], u, n)
            axes[2].set(xlabel="along a random direction, filter-normalised", ylabel="training loss", title=f"slices at {worst}")
            plot.dots(axes[3], {s: {u: values(cells[f"{s}, {u}"], lambda r: r["trace"]) for u in uplinks} for s in splits}, "trace of the Hessian", "at equal rounds")
            planes = [next((r for r in cells[f"{worst}, {u}"] if "plane" in r), None) for u in (uplinks[0], uplinks[-1])]
            top = max((max(map(max, r["plane"])) for r in planes if r), default=1)
            low = min((min(map(min, r["plane"])) for r in planes if r), default=0) or 1e-3
            for axis, u, r in zip(axes[4:], (uplinks[0], uplinks[-1]), planes):
                if r and top > low:
                    plot.contours(axis, r["plane_at"], r["plane"], f"training loss at {worst}, {u}", [low * (top / low) ** (k / 8) for k in range(1, 8)])
            plot.legend(axes[0], below=True)


def excess_at_equal_loss(row, plain):
    """The top eigenvalue of a run minus that of another where their training losses are equal -> number, or None if that was between no two rounds."""
    if row is plain:
        return 0.0
    logs = [[x for x in r["log"] if "eigenvalue" in x] for r in (row, plain)]
    level = max(min(x["train_loss"] for x in lines) for lines in logs)
    a, b = (eigenvalue_at(lines, level) for lines in logs)
    return None if a is None or b is None else a - b


def eigenvalue_at(lines, level):
    """The top eigenvalue where the training loss first falls to `level`, interpolated between measured rounds -> number, or None."""
    for a, b in zip(lines, lines[1:]):
        if a["train_loss"] > level >= b["train_loss"]:
            share = (a["train_loss"] - level) / (a["train_loss"] - b["train_loss"])
            return a["eigenvalue"] + share * (b["eigenvalue"] - a["eigenvalue"])
    return None


# --------------------------------------------------------------------------------------------------------- alignment
ESTIMATES = {"own gradient": "own", "last move": "last_move", "last move, uncompressed": "last_uncompressed", "synthetic": "synthetic", "mixed": "mixed"}


class Alignment(study.Claim):
    """Cosine of every estimate of "uphill" to the true global gradient at the clients' own points, along local steps and over rounds.

    The trajectory is FedAvg's, with a synthesis that nothing uses (DynaFed without server epochs), so that all estimates are asked at the
    same points. A run's number is the mean over the rounds measured after the synthesis. cpu: 3 seeds x 8 runs of 40 rounds, 30 minutes.
    Source: FedSynSAM, abstract: what local SAM and the previous update get wrong.
    """
    name, source = "alignment", "FedSynSAM, arXiv 2602.11584"
    says = ("A client's own gradient and the previous update mis-estimate the global perturbation, the latter more under compression; "
            "synthetic data estimate it well")
    refuted = ("the synthetic gradient's cosine to the global one is below that of the own gradient or of the last move, or compression raises the "
               "last move's cosine; it holds if every cell goes the claimed way")
    LINKS = {"none": UPLINKS["none"], "4 bits": UPLINKS["4 bits"], "2 bits": UPLINKS["2 bits"], "top 5 %": {"compress": "topk", "k": 0.05}}

    def cells(self, world):
        start = self.worlds()[world]
        rounds = 40 if self.size == "cpu" else start["rounds"]
        small = {"measure_images": 800} if self.size == "cpu" else {}
        fields = {"algo": "dynafed", "finetune_epochs": 0, "rounds": rounds, "measure_every": max(1, rounds // 8), **small}
        splits, links = (("Dir 0.1",), ("none", "2 bits")) if self.size == "quick" else (("Dir 0.6", "Dir 0.1"), self.LINKS)
        return {f"{split}, {link}": {**fields, **SPLITS[split], **self.LINKS[link]} for split in splits for link in links}

    def measure(self, fed, rows):
        last = min(len(p) for p in fed.plans(fed.clients(fed.t), fed.t)) - 1
        steps = sorted({round(last * share) for share in ((0, 1) if self.size == "quick" else (0, 0.05, 0.2, 0.5, 1))})
        found = [sharpness.alignment(fed, rows, steps=s)._asdict() for s in steps]
        return {"steps": steps, "along": [{k: None if math.isnan(v) else v for k, v in a.items()} for a in found]}

    def columns(self):
        return [(name, lambda r, key=key: cosine_of(r, key), ".2f") for name, key in ESTIMATES.items()] + [("test accuracy %", accuracy, ".2f")]

    def verdict(self, cells):
        synthetic = lambda r: cosine_of(r, "synthetic")                                                                             # noqa: E731
        over = lambda key: {label: values(rows, lambda r: less(synthetic(r), cosine_of(r, key))) for label, rows in cells.items()}   # noqa: E731
        (a, own), (b, last) = compared(over("own")), compared(over("last_move"))
        blurred = {label: values(rows, lambda r: less(cosine_of(r, "last_move"), cosine_of(r, "last_uncompressed")))
                   for label, rows in cells.items() if not label.endswith("none")}
        c, words = compared(blurred, want=-1)
        mean = [v for rows in cells.values() for v in values(rows, synthetic)]
        return (f"{judge(a + b + c)}: cosine of the synthetic gradient minus that of the own one: {own}; minus that of the last move: {last}. "
                f"The last move's, minus that of the same move uncompressed: {words}. The synthetic gradient's own cosine is {study.spread(mean)} over all runs")

    def draw(self, cells, path):
        label = list(cells)[-2 if "2 bits" in list(cells)[-2] else -1]
        splits, links = (list(dict.fromkeys(x.split(", ")[n] for x in cells)) for n in (0, 1))
        with plot.figure(path, 2 + len(splits), foot=0.3) as axes:
            for n, (name, key) in enumerate(ESTIMATES.items()):
                logs = [[x for x in log if x["alignment"][key] is not None] for log in lines_of(cells[label], "alignment")]
                plot.band(axes[0], [x["round"] for x in logs[0]] if logs else [], [[x["alignment"][key] for x in log] for log in logs], name, n, "-")
                rows = [r for r in cells[label] if "along" in r and all(a[key] is not None for a in r["along"])]
                plot.band(axes[1], rows[0]["steps"] if rows else [], [[a[key] for a in r["along"]] for r in rows], name, n, "-")
            axes[0].set(xlabel="round", ylabel="cosine to the global gradient", title=f"at the last local step\n{label}")
            axes[1].set(xlabel="local steps taken", title=f"in the last round\n{label}")
            for axis, split in zip(axes[2:], splits):
                plot.dots(axis, {link: {n: values(cells[f"{split}, {link}"], lambda r: cosine_of(r, k)) for n, k in ESTIMATES.items()} for link in links},
                          "", f"mean over rounds\n{split}")
            for axis in axes:
                axis.axhline(0, color="black", lw=0.6)
                axis.set_ylim(-1, 1)
            plot.legend(axes[0], below=True)


def cosine_of(row, key):
    """The mean of a cosine over the rounds measured after the synthesis -> number, or None."""
    found = [x["alignment"][key] for x in row["log"] if "alignment" in x and x["alignment"]["synthetic"] is not None]
    return statistics.fmean(found) if found and None not in found else None


def less(a, b):
    """a - b, or None if one of them is missing."""
    return None if a is None or b is None else a - b


# ---------------------------------------------------------------------------------------------------------- accuracy
class Accuracy(study.Claim):
    """Test accuracy of FedSynSAM and its rivals at 2 bits, each with its own tuned settings if it was tuned for this size (tune.py).

    Run `--tune` for every method first; the labels say what was used. FedSynSAM of raw gradients has the settings of FedSynSAM.
    cpu: 3 seeds x 8 runs, 63 minutes of one core (FedAvg 1.3, FedSynSAM 3.6 a run) as measured, so 31 on two, a third less if `oracle` ran
    before; and nearly an hour on two for the tuning before it.
    Source: FedSynSAM, abstract.
    """
    name, source = "accuracy", "FedSynSAM, arXiv 2602.11584"
    says = "Under compression FedSynSAM generalises better than FedAvg, FedSAM, FedLESAM, DynaFed, FedSMOO and FedGAMMA"
    refuted = "one of them has a higher test accuracy and none a lower one; it holds if FedSynSAM is above each of them"
    METHODS = ("fedavg", "fedsam", "fedlesam", "dynafed", "fedsmoo", "fedgamma", "fedsynsam")

    def cells(self, world):
        out, raw = {}, {}
        for algo in ("fedavg", "fedsynsam") if self.size == "quick" else self.METHODS:
            chosen = tune.winner(self.results / "tuned.json", self.size, world, algo)
            name = f" ({tune.words(chosen) if chosen else 'not tuned'})"
            out[algo + name], raw = {"algo": algo, **UPLINKS["2 bits"], **(chosen or {})}, {**(chosen or {}), "mix_units": False}
        return {**out, f"fedsynsam raw{name}": {"algo": "fedsynsam", **UPLINKS["2 bits"], **raw}}

    def columns(self):
        return [*super().columns(), ("test loss", lambda r: r["test_loss"], ".3f"), ("validation accuracy %", lambda r: 100 * r["val_acc"], ".2f"),
                ("MB up", lambda r: r["up"] / 1e6, ".1f"), ("MB down", lambda r: r["down"] / 1e6, ".1f"), ("seconds", lambda r: r["seconds"], ".0f")]

    def verdict(self, cells):
        name = {label.split(" (")[0]: label for label in cells}
        rivals = {algo: paired(cells[name["fedsynsam"]], cells[name[algo]], accuracy) for algo in self.METHODS[:-1] if algo in name}
        flatter = {algo: paired(cells[name["fedsynsam"]], cells[name[algo]], eigenvalue) for algo in rivals}
        signs, words = compared(rivals)
        tuned = "" if "not tuned" not in str(list(cells)) else " Not all methods were tuned."
        return f"{judge(signs)}: FedSynSAM's test accuracy minus that of {words}. Its top eigenvalue minus that of {compared(flatter, '+.1f')[1]}.{tuned}"

    def draw(self, cells, path):
        with plot.figure(path, 3, width=4.6, height=4) as axes:
            for n, (label, rows) in enumerate(cells.items()):
                name, logs = label.split(" (")[0], lines_of(rows, "test_acc")
                if logs:
                    y = [[100 * x["test_acc"] for x in log] for log in logs]
                    plot.curve_of(axes[0], [x["round"] for x in logs[0]], y, name)
                    plot.curve_of(axes[1], [statistics.fmean(x) / 1e6 for x in zip(*([x["up"] for x in log] for log in logs))], y, name)
            best = max((y for label in cells for y in values(cells[label], accuracy)), default=100)
            for axis, x in zip(axes, ("round", "megabytes sent up")):
                axis.set(xlabel=x, ylabel="test accuracy (%)", ylim=(max(0, best - 25), best + 2))
            plot.dots(axes[2], {label.split(" (")[0]: {label.split(" (")[0]: values(rows, eigenvalue)} for label, rows in cells.items()},
                      "top Hessian eigenvalue", dodge=False)
            plot.slant(axes[2])
            plot.legend(axes[0], "lower right", 2)


class Hyper(study.Claim):
    """FedSynSAM with one knob at a time changed from its default: rho, mix, warm-up, images per class, re-synthesis.

    mix = 0 is FedSAM. cpu: 3 seeds x 12 runs of 30 rounds, 42 minutes.
    Source: FedSynSAM; the knobs and their ranges are ours, as are the defaults.
    """
    name, source = "hyper", "FedSynSAM, arXiv 2602.11584; the knobs are ours"
    says = "FedSynSAM is robust to its settings"
    refuted = "one change of one knob lowers test accuracy by 1 point or more; it holds if for every change a loss of 1 point is two standard errors away"
    KNOBS = {"quick": {"rho": (0.2,), "mix": (1.0,)},
             "cpu": {"rho": (0.05, 0.2), "mix": (0.0, 1.0), "warmup": (5, 20), "ipc": (1, 5), "resynthesize": (5, 10)},
             "gpu": {"rho": (0.02, 0.05, 0.2, 0.5), "mix": (0.0, 0.25, 0.75, 1.0), "warmup": (10, 50, 100), "ipc": (1, 5, 30), "resynthesize": (25, 50)}}

    def cells(self, world):
        fields = {"rounds": 30} if self.size == "cpu" else {}
        changes = {f"{knob} {v:g}": {knob: v} for knob, several in self.KNOBS[self.size].items() for v in several if v != self.worlds()[world].get(knob)}
        return {"fedavg": {"algo": "fedavg", **fields}, "default": {"algo": "fedsynsam", **fields},
                **{label: {"algo": "fedsynsam", **fields, **change} for label, change in changes.items()}}

    def verdict(self, cells):
        loss = {label: paired(rows, cells["default"], accuracy) for label, rows in cells.items() if label not in ("default", "fedavg")}
        return (f"{judge([robust(d) for d in loss.values()])}: test accuracy minus that of the default: {compared(loss)[1]}. "
                f"The default's minus FedAvg's: {said(paired(cells['default'], cells['fedavg'], accuracy))}")

    def draw(self, cells, path):
        knobs = self.KNOBS[self.size]
        names = {"rho": "radius rho", "mix": "weight of the synthetic part", "warmup": "rounds before the synthesis", "ipc": "synthetic images per class",
                 "resynthesize": "re-synthesis, rounds (0: none)"}
        with plot.figure(path, len(knobs), width=3.2) as axes:
            for axis, (knob, several) in zip(axes, knobs.items()):
                default = next(r["fields"].get(knob, study.Config.__dataclass_fields__[knob].default) for r in cells["default"])
                at = {v: cells[f"{knob} {v:g}"] for v in several if f"{knob} {v:g}" in cells} | {default: cells["default"]}
                plot.dots(axis, {f"{v:g}" + "*" * (v == default): {"fedsynsam": values(at[v], accuracy)} for v in sorted(at)}, "", names[knob])
                plain = values(cells["fedavg"], accuracy)
                if plain:
                    axis.axhline(statistics.fmean(plain), color=plot.COLOURS["fedavg"], ls="--", lw=1, label="fedavg")
            low, high = min(a.get_ylim()[0] for a in axes), max(a.get_ylim()[1] for a in axes)
            for axis in axes:
                axis.set_ylim(low, high)
            axes[0].set_ylabel("test accuracy (%)   (*: default)")
            plot.legend(axes[0])


def robust(differences, margin=1.0):
    """1 if a loss of `margin` is two standard errors away, -1 if the loss is that large and told apart, else 0; None if below two of them."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return 1 if mean - 2 * error > -margin else -1 if differs(differences) == -1 and mean <= -margin else 0


CLAIMS = {"sharpness": Sharpness, "alignment": Alignment, "accuracy": Accuracy, "hyper": Hyper, **relatives.CLAIMS}
