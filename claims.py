"""The claims of the papers, each as an experiment: what is run, what is measured, and what would refute it.

    python run.py --experiment NAME --size quick | cpu | gpu        quick: does it work; cpu: 30 minutes on two cores; gpu: the full form

    sharpness   compression makes the global landscape sharper, more so when clients differ          (FedSynSAM)
    alignment   own gradient and last move mis-estimate the global direction, synthetic data do not   (FedSynSAM)
    accuracy    under compression FedSynSAM generalises better than its rivals                        (FedSynSAM)
    hyper       FedSynSAM is robust to its settings                                                   (FedSynSAM)
    fedsynth    synthetic data are worth their bytes, against random masking                          (FedSynth)
    gradalign   displacement aligns the clients' gradients and helps accuracy                         (GradAlign, FedGA)
    man         the activation norm lowers the top eigenvalue and raises accuracy, with any method    (MAN)
    oracle      how much is there to gain from the true global direction?                             (ours)

Everything that is compared shares seeds, rounds and the rule how settings were chosen; differences are paired (study.py). The
verdict is computed from the rows by a rule that was written before they were seen.

Sources: each class names its own. Read next: run.py.
"""
import statistics

import landscape
import sharpness
import study
from study import Claim, differs, paired, said, values
from tools import plot

UPLINKS = {"none": {"compress": "identity"}, "4 bits": {"compress": "qsgd", "levels": 7}, "2 bits": {"compress": "qsgd", "levels": 1},
           "top 10 %": {"compress": "topk", "k": 0.1}, "top 1 %": {"compress": "topk", "k": 0.01}}
SPLITS = {"IID": {"partition": "iid"}, "Dir 0.6": {"alpha": 0.6}, "Dir 0.1": {"alpha": 0.1}}
accuracy, loss, eigen = (lambda r: 100 * r["test_acc"]), (lambda r: r["train_loss"]), (lambda r: r["eigenvalue"])


def measured_lines(row):
    """The lines of a row's log in which eigenvalue and alignment were measured -> list of dicts."""
    return [x for x in row.get("log", []) if "eigenvalue" in x]


def eigenvalue_at(row, level):
    """The top eigenvalue where the training loss first falls to `level`, interpolated between measured rounds -> float, or None."""
    lines = measured_lines(row)
    for a, b in zip(lines, lines[1:]):
        if a["train_loss"] > level >= b["train_loss"]:
            share = (a["train_loss"] - level) / (a["train_loss"] - b["train_loss"])
            return a["eigenvalue"] + share * (b["eigenvalue"] - a["eigenvalue"])
    return None


class Sharpness(Claim):
    """Top eigenvalue, trace and SAM sharpness of FedAvg's final model against compression and skew, at equal rounds and equal loss.

    Source: the first claim of FedSynSAM's abstract.
    """
    name, source = "sharpness", "FedSynSAM, arXiv 2602.11584"
    says = "Compression makes the global loss landscape sharper, and more so the more the clients differ"
    refuted = "the top eigenvalue of compressed FedAvg is not higher than that of uncompressed FedAvg at equal training loss, or the excess does not grow with skew"

    def cells(self, size):
        rounds = study.base(size).get("rounds", 60)
        return {f"{split}, {uplink}": {"algo": "fedavg", "measure_every": max(1, rounds // 6), **how, **wire}
                for split, how in SPLITS.items() for uplink, wire in UPLINKS.items()}

    def measure(self, fed, rows):
        objective = sharpness.Objective(fed.task.apply, fed.task.train, rows, each=fed.pool.map)
        trace = sharpness.trace(objective.hessian(fed.w), fed.w, samples=10)
        rise = landscape.sam_sharpness(objective.loss, objective.gradient, fed.w, fed.cfg.rho, steps=5)
        direction = landscape.filter_direction(fed.w, fed.task.shapes)
        at, losses = landscape.line(objective.loss, fed.w, direction, points=21)
        return {"trace": trace.mean, "trace_error": trace.error, "sam": rise.ascent, "slice_at": list(at), "slice": list(losses)}

    def columns(self):
        return [*super().columns(), ("eigenvalue at equal loss", lambda r: r.get("at_loss"), ".1f"), ("trace", lambda r: r["trace"], ".0f"),
                ("SAM sharpness", lambda r: r["sam"], ".3f")]

    def finish(self, cells):
        """The loss that all runs of one split and seed reach, and the eigenvalue there."""
        for split in SPLITS:
            for seed in {r["seed"] for rows in cells.values() for r in rows}:
                mine = [r for label, rows in cells.items() if label.startswith(split + ",") for r in rows if r["seed"] == seed and "diverged" not in r]
                level = max((min(x["train_loss"] for x in measured_lines(r)) for r in mine), default=0)
                for r in mine:
                    r["at_loss"] = eigenvalue_at(r, level)

    def verdict(self, cells):
        lines, excess = [], {}
        for uplink in list(UPLINKS)[1:]:
            parts = []
            for split in SPLITS:
                equal = paired(cells[f"{split}, {uplink}"], cells[f"{split}, none"], lambda r: r.get("at_loss"))
                excess[split, uplink] = equal
                parts.append(f"{split} {said(equal, '+.1f', 'sharper', 'flatter')}")
            lines.append(f"{uplink}: " + ", ".join(parts))
        sharper = sum(differs(d) == 1 for d in excess.values())
        grows = sum(statistics.fmean(excess["Dir 0.1", u]) > statistics.fmean(excess["IID", u]) for u in list(UPLINKS)[1:]
                    if excess["Dir 0.1", u] and excess["IID", u])
        return (f"Top eigenvalue at equal training loss, minus that without compression: {'; '.join(lines)}. Sharper in {sharper} of {len(excess)} "
                f"comparisons; the excess is larger at Dir 0.1 than IID for {grows} of {len(UPLINKS) - 1} compressors")

    def draw(self, cells, path):
        plot.bars(path, {u: {s: values(cells[f"{s}, {u}"], eigen) for s in SPLITS} for u in UPLINKS}, "top Hessian eigenvalue",
                  {u: [r for r in cells[f"Dir 0.1, {u}"] if "slice" in r] for u in UPLINKS})
