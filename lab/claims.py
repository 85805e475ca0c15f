"""Claims of papers, each as an experiment whose rules were written before its runs.

    python -m lab.claims accuracy --size quick | cpu | gpu
    python -m lab.claims skew --tune               first, for a claim with settings of its own

quick says whether it works; cpu takes about half an hour on two cores, and skew, whose and overfit
some hours; gpu is the full form. --seeds 1 makes fewer seeds; --only "Dir 0.1|IID" makes only the
arms whose labels begin so, for remedy, skew, whose and overfit. The command may be stopped and
given again, and given twice at once to share the runs (study.py). It writes results/NAME.json and
NAME.png and prints the table, all comparisons, and the verdict (verdicts.py); `python -m
lab.report` writes results/README.md.

    default      the table of the README
    sharpness    compression makes the global landscape sharper, more so when clients differ
    compressed   the same with one class per client
    remedy       where compression sharpens, does FedSynSAM help?
    alignment    own gradient and last update mis-estimate the global one, synthetic data do not
    accuracy     under compression FedSynSAM generalises better than its rivals
    hyper        FedSynSAM is robust to its settings
    fedsynth     synthetic data are worth their bytes, against random masking
    gradalign    displacement makes clients' gradients agree and helps accuracy
    man          penalising activation norms lowers the top eigenvalue and raises accuracy
    oracle       how much is there to gain from the true global direction?
    skew         what each ascent direction gains over FedAvg, as the clients differ more
    whose        whose gradient, or which batch? Trial directions at one class per client
    overfit      the same directions where training overfits, on photographs

A claim says which arms are run (`arms`), what is measured besides accuracy, losses, bytes and
eigenvalue (`measures`, `watch`), and which arm minus which arm should have which sign (`rules`). A
verdict holds for these images, networks and rounds, and no more than that.
"""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

import run
from lab import figures, study, tune, verdicts
from lab.verdicts import Rule, Value
from plumbing.settings import HERE

UPLINKS = {
    "none": {"compress": "identity"},
    "4 bits": {"compress": "qsgd", "levels": 7},
    "2 bits": {"compress": "qsgd", "levels": 1},
    "top 10 %": {"compress": "topk", "k": 0.1},
    "top 5 %": {"compress": "topk", "k": 0.05},
    "top 1 %": {"compress": "topk", "k": 0.01},
}
SPLITS = {"IID": {"partition": "iid"}, "Dir 0.6": {"alpha": 0.6}, "Dir 0.1": {"alpha": 0.1}}


class Claim:
    """A claim at one size; a subclass says what it claims, and how that is tested.

    says, refuted: the claim, and what would refute it. source: whose claim. columns of its table,
    panels of its figure: names in verdicts.MEASURES. results: the folder of tuned.json. seeds and
    only: fewer seeds, and only arms whose labels match this regular expression from the start.
    """

    says = refuted = source = ""
    columns = ("accuracy", "train_loss", "eigenvalue")
    panels = ("accuracy", "eigenvalue")
    repeats = 3  # seeds of every arm, but at the size quick
    first_seed = 0
    sizes = study.SIZES
    divisible = False  # whether some of its arms can be judged alone
    pictures = {}  # more figures: {what is added to the file's name: a function of figures.py}

    def __init__(self, size="cpu", results=HERE / "results", seeds=0, only=""):
        self.size, self.results, self.name = size, results, type(self).__name__.lower()
        self.command = f"python -m lab.claims {self.name} --size {size}"
        self.command += f" --seeds {seeds}" if seeds else ""
        self.command += f' --only "{only}"' if only else ""
        self.only = only
        self.seeds = seeds or (1 if size == "quick" else self.repeats)

    def check(self):
        """Before the runs: ValueError if something is missing, or stored rows would be lost."""
        if self.size not in self.sizes:
            raise ValueError(f"{self.name} has the sizes {' and '.join(self.sizes)}")
        if self.only and not self.divisible:
            raise ValueError(
                f"{self.name} is judged as a whole; --only is for remedy, skew, whose, overfit"
            )
        path = self.results / f"{self.name}.json"
        part = json.loads(path.read_text()).get(self.size) if path.exists() else None
        rows = map(study.plain, part["rows"] if part else ())
        stored = {(row["arm"], row["seed"]) for row in rows}
        coming = {(arm, s["seed"]) for _, arm, s in study.jobs(self)}
        if not stored <= coming:
            raise ValueError(
                f"{path} holds {len(stored - coming)} rows that these runs would not replace, such "
                f"as {min(stored - coming)}; keep them with --results and another folder"
            )

    def tasks(self):
        """{task: settings that all arms share}"""
        return study.TASKS[self.size]

    def arms(self, task):
        """{label: settings of this arm}"""
        raise NotImplementedError

    def seeds_of(self, arm):
        """How many seeds an arm has."""
        return self.seeds

    def searches(self):
        """What --tune finds: {(name in tuned.json, arm): (settings, grid, number of seeds)}."""
        return {}

    def measures(self, seed):
        """What is measured at the end of a run: {name in measures.MEASURES: arguments}."""
        return {}

    def watch(self, task):
        """What is measured during a run: {"every": rounds, "names": [...]}, or None."""
        return None

    def derive(self, table):
        """The table of a task with what a row cannot know alone, in new columns."""
        return table

    def rules(self, table):
        """All comparisons: a list of verdicts.Rule."""
        raise NotImplementedError

    def baseline(self, arm):
        """The label of FedAvg's arm that this arm is compared with in the figure of all claims."""
        return "fedavg"

    def on_cpu(self, **settings):
        """These settings at the size cpu, none at the others."""
        return settings if self.size == "cpu" else {}


def rule(about, first, second, measure, sign=1, margin=0.0):
    """first minus second, both arms, of the same measure."""
    return Rule(about, Value(first, measure), Value(second, measure), sign, margin)


def arms_of(table):
    """The labels of a table, each once."""
    return list(dict.fromkeys(table.arm))


class Default(Claim):
    """The table of the README: the default job, one class per client, all methods alike.

    With 10 local steps, tried first, the seeds differed too much to decide anything. Both began
    with three seeds, and got two more since three decided nothing.
    """

    says = (
        "With one class per client and one radius for all, a client's own gradient misleads the "
        "ascent, and the synthetic one does not"
    )
    source = "this project"
    refuted = (
        "FedSAM is more accurate than FedAvg, FedSynSAM less accurate than FedSAM, or more than 2 "
        "points less accurate than FedAvg"
    )
    columns = ("accuracy", "mean_model", "test_loss", "eigenvalue", "mb_up", "mb_down", "seconds")
    panels = ("accuracy", "mean_model", "eigenvalue")
    repeats = 5
    methods = ("fedavg", "fedsam", "fedlesam", "fedsynsam", "dynafed", "fedwmsam")
    trials = ("AnotherBatch", "Debiased", "Projected", "Descending")  # with 10 local steps

    def tasks(self):
        if self.size == "quick":
            return study.TASKS["quick"]
        return {"": {}, "10 local steps": {"local_steps": 10}}

    def arms(self, task):
        trials = {name: {"algo": f"lab/directions.py:{name}"} for name in self.trials}
        return {algo: {"algo": algo} for algo in self.methods} | (trials if task else {})

    def watch(self, task):
        every, mean_from = (2, 2) if self.size == "quick" else (40, 40)
        return {"every": every, "names": ["mean_model"], "mean_from": mean_from}

    def rules(self, table):
        found = [rule("FedSAM minus FedAvg", "fedsam", "fedavg", "accuracy", -1)]
        found += [rule("FedSynSAM minus FedSAM", "fedsynsam", "fedsam", "accuracy")]
        found += [rule("FedSynSAM minus FedAvg", "fedsynsam", "fedavg", "accuracy", 1, margin=2.0)]
        others = [arm for arm in arms_of(table) if arm != "fedavg"]
        if "Debiased" in others:  # came after the others were judged
            pairs = ("Debiased", "fedsam"), ("Descending", "fedsynsam")
            found += [rule(f"{a} minus {b}", a, b, "accuracy", 0) for a, b in pairs]
        for measure in ("accuracy", "mean_model", "test_loss", "eigenvalue"):
            found += [rule("minus FedAvg", algo, "fedavg", measure, 0) for algo in others]
        return found


class Sharpness(Claim):
    """FedAvg's model against compression and skew, at equal rounds and at equal training loss."""

    says = "Compression makes the global landscape sharper, and more so the more the clients differ"
    source = "FedSynSAM, arXiv 2602.11584"
    refuted = (
        "the top eigenvalue with compression is below that without it at equal training loss, or "
        "its excess is smaller at Dir 0.1 than IID"
    )
    columns = (*Claim.columns, "excess", "trace", "sam")
    panels = ("eigenvalue", "excess", "trace")

    def arms(self, task):
        own = {"algo": "fedavg"} | self.on_cpu(rounds=36, measure_images=500)
        pairs = [(s, u) for s in SPLITS for u in UPLINKS if u != "top 5 %"]
        return {f"{s}, {u}": own | SPLITS[s] | UPLINKS[u] for s, u in pairs}

    def watch(self, task):
        return {"every": {"quick": 1, "cpu": 6, "gpu": 50}[self.size], "names": ["eigenvalue"]}

    def measures(self, seed):
        plane = {"plane": {"points": 21}} if seed == 0 else {}  # 441 losses
        return {"trace": {}, "sam": {}} | plane

    def baseline(self, arm):
        return f"{arm.split(', ')[0]}, none"

    def derive(self, table):
        return table.assign(excess=study.excess(table, self.baseline))

    def rules(self, table):
        lossy = [a for a in arms_of(table) if not a.endswith(", none")]
        equal = "minus without compression"
        skew = "at Dir 0.1 minus IID"
        found = [rule(equal, a, self.baseline(a), "excess") for a in lossy]
        worst = [a for a in lossy if a.startswith("Dir 0.1")]
        found += [rule(skew, a, a.replace("Dir 0.1", "IID"), "excess") for a in worst]
        for measure in ("eigenvalue", "trace", "sam", "train_loss"):
            about = "at equal rounds, minus without compression"
            found += [rule(about, a, self.baseline(a), measure, 0) for a in lossy]
        return found


class Compressed(Sharpness):
    """Sharpness again with one class per client, with 1 bit a parameter, and with error feedback.

    QSGD with 2 bits is not contractive, so its feedback piles up an error (compress.py).
    The learning rate is the default job's. The training loss swings from round to round, so "equal
    training loss" is read where it first falls to that level, every ten rounds. It began with three
    seeds, and got two more since three decided nothing.
    """

    says = "With one class per client, compression makes the global landscape sharper"
    refuted = "the top eigenvalue with compression is below that without it at equal training loss"
    columns = (*Sharpness.columns, "mean_model")
    repeats = 5
    uplinks = {name: UPLINKS[name] for name in UPLINKS if name != "top 5 %"}
    uplinks |= {"1 bit": {"compress": "sign"}}

    def arms(self, task):
        own = {"algo": "fedavg"} | Skew.splits["one class"]
        own |= {"clients": 10} if self.size == "quick" else {}
        own |= self.on_cpu(rounds=80, local_steps=10, lr=0.1, last=20, measure_images=500)
        found = {name: own | uplink for name, uplink in self.uplinks.items()}
        lossy = [name for name in found if name != "none"]
        fed_back = {f"{name}, feedback": found[name] | {"error_feedback": True} for name in lossy}
        return found | fed_back

    def watch(self, task):
        every, late = {"quick": (1, 2), "cpu": (5, 40), "gpu": (50, 150)}[self.size]
        return {"every": every, "names": ["eigenvalue", "mean_model"], "mean_from": late}

    def measures(self, seed):
        return {"trace": {}, "sam": {}}

    def baseline(self, arm):
        return "none"

    def rules(self, table):
        lossy = [arm for arm in arms_of(table) if arm != "none"]
        found = [rule("minus without compression", arm, "none", "excess") for arm in lossy]
        for measure in ("eigenvalue", "trace", "sam", "train_loss", "accuracy", "mean_model"):
            about = "at equal rounds, minus without compression"
            found += [rule(about, arm, "none", measure, 0) for arm in lossy]
        return found


class Remedy(Compressed):
    """Compressed's two sharpest uplinks, with the methods that are meant to help: the whole chain.

    `compressed` chose the uplinks with seeds 0 to 4, so these runs have others. First all methods
    have one learning rate and one radius, then three of them their own, found with one seed.
    """

    says = (
        "Where compression sharpens the global landscape, FedSynSAM makes it flatter and is more "
        "accurate than FedAvg and FedSAM"
    )
    refuted = "it is sharper than FedAvg, or less accurate than one of the two"
    columns = ("accuracy", "mean_model", "train_loss", "test_loss", "eigenvalue", "trace", "sam")
    panels = ("accuracy", "eigenvalue", "trace")
    first_seed, divisible, sizes = 5, True, ("quick", "cpu")
    methods = {algo: {"algo": algo} for algo in ("fedavg", "fedsam", "fedlesam", "dynafed")}
    methods |= {
        "fedsynsam": {"algo": "fedsynsam", "mix": 1.0, "warmup_method": "fedavg"},
        "mixture": {"algo": "fedsynsam", "mix": 0.5, "warmup_method": "fedsam"},
    }
    judged = (("fedavg", "eigenvalue", -1), ("fedavg", "accuracy", 1), ("fedsam", "accuracy", 1))

    def tasks(self):
        return study.TASKS["quick" if self.size == "quick" else "cpu"]

    def arms(self, task):
        sharp = {"1 bit, feedback", "top 1 %"}
        uplinks = {name: own for name, own in super().arms(task).items() if name in sharp}
        found = {
            f"{name}, {method}": uplink | own
            for name, uplink in uplinks.items()
            for method, own in self.methods.items()
        }
        for (place, algo), (settings, _, _) in self.searches().items():
            chosen = tune.winner(self.results / "tuned.json", self.size, place, algo)
            if chosen:
                found[f"{place}, {algo}"] = settings | chosen
        return found

    def searches(self):
        found, uplink = {}, super().arms("")["1 bit, feedback"]
        for algo in ("fedavg", "fedsam", "fedsynsam"):
            own = study.fitting(self.tasks()[""], uplink | self.methods[algo])
            found["1 bit, feedback, tuned", algo] = own, tune.GRID[algo], 1
        return found

    def baseline(self, arm):
        return arm.rpartition(", ")[0] + ", fedavg"

    def derive(self, table):
        return table

    def rules(self, table):
        found = []
        for arm in (a for a in arms_of(table) if a.endswith(", fedsynsam")):
            for other, measure, sign in self.judged:
                rival = arm.replace("fedsynsam", other)
                found.append(rule(f"minus {other}", arm, rival, measure, sign))
        others = [arm for arm in arms_of(table) if not arm.endswith(", fedavg")]
        for measure in ("accuracy", "mean_model", "test_loss", "eigenvalue", "trace", "sam"):
            found += [rule("minus fedavg", a, self.baseline(a), measure, 0) for a in others]
        return found


class Alignment(Claim):
    """Cosines to the true global gradient at the clients' own points.

    The trajectory is FedAvg's, with a synthesis that nothing uses (DynaFed without server epochs),
    so that all estimates are asked at the same points. A run's number is the mean over the rounds
    measured after the synthesis.
    """

    says = (
        "A client's own gradient and the previous update mis-estimate the global perturbation, "
        "the latter more under compression; synthetic data estimate it well"
    )
    source = "FedSynSAM, arXiv 2602.11584"
    refuted = (
        "the synthetic gradient's cosine to the global one is below that of the own gradient or of "
        "the last move, or compression raises the last move's cosine"
    )
    columns = (*(f"cos_{name}" for name in study.COSINES if name != "used"), "accuracy")
    panels = ("cos_own", "cos_last_move", "cos_synthetic")

    def arms(self, task):
        own = {"algo": "dynafed", "finetune_epochs": 0}
        own |= self.on_cpu(rounds=40, measure_images=800)
        splits, uplinks = ("Dir 0.6", "Dir 0.1"), ("none", "4 bits", "2 bits", "top 5 %")
        pairs = [(s, u) for s in splits for u in uplinks]
        return {f"{s}, {u}": own | SPLITS[s] | UPLINKS[u] for s, u in pairs}

    def watch(self, task):
        every = {"quick": 1, "cpu": 5, "gpu": 50}[self.size]
        return {"every": every, "names": ["eigenvalue", "alignment"]}

    def baseline(self, arm):
        return f"{arm.split(', ')[0]}, none"

    def rules(self, table):
        arms, found = arms_of(table), []
        for name, about in (("own", "the own gradient"), ("last_move", "the last move")):
            for arm in arms:
                pair = Value(arm, "cos_synthetic"), Value(arm, "cos_" + name)
                found.append(Rule(f"cosine of the synthetic gradient minus that of {about}", *pair))
        for arm in arms:
            pair = Value(arm, "cos_last_move"), Value(arm, "cos_last_uncompressed")
            if not arm.endswith("none"):
                about = "cosine of the last move minus that of the same move uncompressed"
                found.append(Rule(about, *pair, sign=-1))
        return found


class Accuracy(Claim):
    """FedSynSAM and its rivals at 2 bits, each with its own tuned settings.

    Run `python -m lab.tune METHOD --size SIZE` for every method first; the labels say what was
    used.
    """

    says = (
        "Under compression FedSynSAM generalises better than FedAvg, FedSAM, FedLESAM, DynaFed, "
        "FedSMOO and FedGAMMA"
    )
    source = "FedSynSAM, arXiv 2602.11584"
    refuted = "one of them has a higher test accuracy"
    columns = (*Claim.columns, "at_equal_bytes", "test_loss", "val_accuracy", "mb_up", "mb_down")
    methods = ("fedavg", "fedsam", "fedlesam", "dynafed", "fedsmoo", "fedgamma", "fedsynsam")

    def arms(self, task):
        found = {}
        for algo in self.methods:
            chosen = tune.winner(self.results / "tuned.json", self.size, task, algo)
            words = tune.words(chosen) if chosen else "not tuned"
            found[f"{algo} ({words})"] = {"algo": algo} | UPLINKS["2 bits"] | (chosen or {})
        return found

    def baseline(self, arm):
        return "fedavg ("  # and how it was tuned

    def derive(self, table):
        return table.assign(at_equal_bytes=study.at_equal_bytes(table))

    def rules(self, table):
        name = {arm.split(" (")[0]: arm for arm in arms_of(table)}
        rivals, found = [name[a] for a in self.methods[:-1] if a in name], []
        shown = dict.fromkeys(("at_equal_bytes", "eigenvalue", "test_loss"), 0)
        for measure, sign in ({"accuracy": 1} | shown).items():
            about = "FedSynSAM minus its rival"
            found += [rule(about, name["fedsynsam"], other, measure, sign) for other in rivals]
        for measure in ("accuracy", "at_equal_bytes", "test_loss"):
            about = "rival minus FedAvg"
            found += [rule(about, x, name["fedavg"], measure, 0) for x in rivals[1:]]
        return found


class Hyper(Claim):
    """FedSynSAM with one setting at a time changed from its default; mix = 0 is FedSAM."""

    says = "FedSynSAM is robust to its settings"
    source = "FedSynSAM, arXiv 2602.11584; which settings, and how far, is this project's choice"
    refuted = "one change of one setting lowers test accuracy by more than 1 point"
    changes = {
        "quick": {"rho": (0.2,), "mix": (1.0,)},
        "cpu": {
            "rho": (0.05, 0.2),
            "mix": (0.0, 1.0),
            "warmup": (5, 20),
            "ipc": (1, 5),
            "resynthesize": (5, 10),
        },
        "gpu": {
            "rho": (0.02, 0.05, 0.2, 0.5),
            "mix": (0.0, 0.25, 0.75, 1.0),
            "warmup": (10, 50, 100),
            "ipc": (1, 5, 30),
            "resynthesize": (25, 50),
        },
    }

    def arms(self, task):
        rounds = self.on_cpu(rounds=30)
        own = {"algo": "fedsynsam"} | rounds
        found = {"fedavg": {"algo": "fedavg"} | rounds, "default": own}
        for name, several in self.changes[self.size].items():
            for value in several:
                if value != self.tasks()[task].get(name):
                    found[f"{name} {value:g}"] = own | {name: value}
        return found

    def rules(self, table):
        changed = [a for a in arms_of(table) if a not in ("fedavg", "default")]
        about = "minus the default"
        found = [rule(about, a, "default", "accuracy", 1, margin=1.0) for a in changed]
        return [*found, rule("the default minus FedAvg", "default", "fedavg", "accuracy", 0)]


class FedSynth(Claim):
    """FedSynth with both objectives against random masking of equal bytes, top-k and QSGD.

    On a CPU a small mlp: a client's learning costs gradients through gradients.
    """

    says = (
        "At equal bytes, synthetic data sent in place of an update are comparable to or better "
        "than random masking"
    )
    source = "FedSynth, Hu et al. 2022"
    refuted = (
        'FedSynth (objective "data") has a test accuracy more than 1 point below that of random '
        "masking at the same bytes; comparable is: less than 1 point below"
    )
    columns = ("accuracy", "message", "train_loss", "seconds")
    panels = ("accuracy",)
    batches = {"quick": (1, 4), "cpu": (1, 4), "gpu": (1, 4, 16)}

    def arms(self, task):
        small = self.on_cpu(model="mlp", rounds=20, alpha=0.6)
        plain = {"algo": "fedavg"} | small
        found = {"none": plain | UPLINKS["none"]}
        for batches in self.batches[self.size]:
            size, learnt = self.message(task, batches), {"fs_batches": batches}
            for objective in ("data", "update"):
                own = {"algo": "fedsynth", "fs_objective": objective} | learnt | small
                found[f"FedSynth {objective}, {size:,} bytes"] = own
            masking = {"compress": "randk", "scaled": False, "k": float((size - 12) // 4)}
            place = 7 if self.size == "gpu" else 6  # bytes of a float and of its place
            top = {"compress": "topk", "k": float((size - 4) // place)}
            found[f"random masking, {size:,} bytes"] = plain | masking
            found[f"top-k, {size:,} bytes"] = plain | top
        return found | {f"QSGD, {u}": plain | UPLINKS[u] for u in ("2 bits", "4 bits")}

    def message(self, task, batches, images=4):
        """Bytes of FedSynth's message: images (8 bits), labels, step size, range, checksum."""
        dataset = self.tasks()[task].get("dataset", "bundled")
        shape = 3 * 32 * 32 if dataset.startswith("cifar") else 28 * 28
        classes = 100 if dataset == "cifar100" else 10
        return batches * images * (shape + 4 * classes) + 16

    def baseline(self, arm):
        return "none"

    def rules(self, table):
        found = []
        for arm in arms_of(table):
            if arm.startswith("FedSynth"):
                kind, size = arm.split(", ", 1)
                judged = {"sign": 1, "margin": 1.0} if kind.endswith("data") else {"sign": 0}
                about = "minus random masking at equal bytes"
                found.append(rule(about, arm, f"random masking, {size}", "accuracy", **judged))
        return found


class GradAlign(Claim):
    """Disagreement r of ALL clients' full gradients, and accuracy, against beta and batch size.

    The uplink is not compressed, as in the papers. Which beta is compared is chosen on validation
    images.
    """

    says = (
        "The displacement makes the clients' gradients agree and improves accuracy, at large batch "
        "too"
    )
    source = "GradAlign and FedGA, Dandi et al. 2022"
    refuted = (
        "with the beta that is best on validation images, r is above FedAvg's, or test accuracy is "
        "below FedAvg's, at either batch size"
    )
    columns = ("accuracy", "val_accuracy", "r", "train_loss", "eigenvalue", "mb_up")
    panels = ("accuracy", "r", "eigenvalue")
    betas = (0.025, 0.1, 0.4)
    batches = {
        "quick": {20: {"batch": 20}, 100: {"batch": 100}},
        "cpu": {20: {"batch": 20, "local_steps": 20}, 100: {"batch": 100, "local_steps": 8}},
        "gpu": {50: {"batch": 50}, 500: {"batch": 500}},
    }

    def arms(self, task):
        methods = {"fedavg": {"algo": "fedavg"}}
        for beta in self.betas:
            methods[f"fedga, beta {beta:g}"] = {"algo": "fedga", "beta": beta}
        methods |= {"fedprox": {"algo": "fedprox"}, "scaffold": {"algo": "scaffold"}}
        found = {}
        for batch, own in self.batches[self.size].items():
            for label, settings in methods.items():
                found[f"{label}, batch {batch}"] = UPLINKS["none"] | own | settings
        return found

    def measures(self, seed):
        return {"disagreement": {}}

    def baseline(self, arm):
        return f"fedavg, {arm.split(', ')[-1]}"

    def rules(self, table):
        found, shown = [], []
        for batch in dict.fromkeys(arm.split(", ")[-1] for arm in arms_of(table)):
            plain = f"fedavg, {batch}"
            tried = [a for a in arms_of(table) if a.startswith("fedga") and a.endswith(batch)]
            means = [table.val_accuracy[table.arm == arm].mean() for arm in tried]
            best = tried[int(np.nanargmax(means))] if np.isfinite(means).any() else tried[0]
            about = "FedGA minus FedAvg, with the beta best on validation images"
            found += [rule(about, best, plain, m, s) for m, s in (("r", -1), ("accuracy", 1))]
            others = [a for a in arms_of(table) if a.endswith(batch) and a not in (plain, best)]
            for measure in ("r", "accuracy", "eigenvalue"):
                shown += [rule("the others minus FedAvg", a, plain, measure, 0) for a in others]
        return found + shown


class Man(Claim):
    """Top eigenvalue, trace, accuracy and the time of a local step with and without MAN.

    The Hessian is that of plain cross-entropy, without MAN's term. Time is CPU time.
    """

    says = (
        "Penalising activation norms lowers the top Hessian eigenvalue and raises test accuracy, "
        "whatever the method"
    )
    source = "MAN, arXiv 2512.08314"
    refuted = "for some method the eigenvalue is higher or the accuracy lower with it"
    columns = (*Claim.columns, "test_loss", "trace", "step_ms")
    methods = ("fedavg", "feddyn", "fedsam", "fedsynsam")

    def arms(self, task):
        pairs = [
            (m, w, zeta) for m in self.methods for w, zeta in (("without", 0.0), ("with", 0.15))
        ]
        return {f"{m} {word} MAN": {"algo": m, "man": zeta} for m, word, zeta in pairs}

    def measures(self, seed):
        return {"trace": {}, "step": {}}

    def baseline(self, arm):
        return "fedavg without MAN"

    def rules(self, table):
        found = []
        signs = {"eigenvalue": -1, "accuracy": 1, "test_loss": 0, "trace": 0, "step_ms": 0}
        for measure, sign in signs.items():
            for m in self.methods:
                pair = f"{m} with MAN", f"{m} without MAN"
                found.append(rule("with MAN minus without it", *pair, measure, sign))
        return found


class Oracle(Claim):
    """FedAvg, every estimate of the global direction, and the oracle that knows it.

    All at the defaults, one rho and one learning rate for all.
    """

    says = (
        "Knowing the true global direction raises test accuracy over FedAvg under compression, so "
        "there is something for estimators to gain"
    )
    source = "this project"
    refuted = "the oracle's test accuracy is below FedAvg's"
    columns = (*Claim.columns, "test_loss", "seconds")

    def arms(self, task):
        found = {
            "fedavg": {"algo": "fedavg"},
            "fedsam": {"algo": "fedsam"},
            "fedlesam": {"algo": "fedlesam"},
            "fedlesam-server": {"algo": "fedlesam-server"},
            "fedsynsam (mix 0.5)": {"algo": "fedsynsam"},
            "fedsynsam (mix 1)": {"algo": "fedsynsam", "mix": 1.0},
            "oracle": {"algo": "oracle"} | self.on_cpu(oracle_images=200),
        }
        return {label: UPLINKS["2 bits"] | own for label, own in found.items()}

    def rules(self, table):
        others = [a for a in arms_of(table) if a not in ("fedavg", "oracle")]
        found = [rule("the oracle minus FedAvg", "oracle", "fedavg", "accuracy")]
        for measure in ("accuracy", "eigenvalue", "test_loss"):
            about = "an estimate minus FedAvg"
            arms = others if measure == "accuracy" else [*others, "oracle"]
            found += [rule(about, a, "fedavg", measure, 0) for a in arms]
        return found


class Skew(Claim):
    """Every ascent direction on four splits, with a learning rate and a setting of its own.

    Tuned on Dir 0.1, whose winners are used on IID too, and on one class, whose winners are used on
    two classes too: `python -m lab.claims skew --tune`. The accuracy of a run is the mean over the
    second half of its rounds, since the global model swings. The searches make all 80 rounds: tuned
    in 40, FedAvg got a learning rate of 0.05 and the synthetic direction 0.1, which after 80 rounds
    alone made nine points of difference.

    "server" and "momentum" are whole methods: FedGloSS has FedDyn in it, FedWMSAM has SCAFFOLD and
    FedCM. DynaFed has no ascent and spends the same synthetic images at the server.
    """

    says = (
        "Where clients differ, it matters whose gradient the ascent follows: the synthetic one "
        "gains over FedAvg and over the client's own, and so does the true one"
    )
    source = "the premise of FedSynSAM, arXiv 2602.11584, in the words of this project"
    refuted = (
        "at Dir 0.1 or at one class per client the synthetic or the true direction has a lower "
        "test accuracy than FedAvg or than the own gradient"
    )
    columns = (*Claim.columns, "test_loss", "train_accuracy", "mean_model", "cos_own")
    columns += ("cos_used", "seconds")
    panels = ("accuracy", "mean_model", "eigenvalue")
    pictures = {"_gains": figures.draw_gains}
    splits = {
        "IID": {"partition": "iid"},
        "Dir 0.1": {"alpha": 0.1},
        "two classes": {"partition": "shards", "classes_per_client": 2},
        "one class": {"partition": "shards", "classes_per_client": 1},
    }
    tuned = {"IID": "Dir 0.1", "two classes": "one class"}  # whose settings a split takes over
    repeats = 5
    divisible, sizes = True, ("quick", "cpu")
    hard = ("Dir 0.1", "one class")
    directions = {
        "fedavg": {"algo": "fedavg"},
        "own (FedSAM)": {"algo": "fedsam"},
        "last update (FedLESAM)": {"algo": "fedlesam"},
        "synthetic (FedSynSAM)": {"algo": "fedsynsam", "mix": 1.0, "warmup_method": "fedavg"},
        "mixture (FedSynSAM)": {"algo": "fedsynsam", "mix": 0.5, "warmup_method": "fedsam"},
        "true (oracle)": {"algo": "oracle"},
        "server (FedGloSS)": {"algo": "fedgloss"},
        "momentum (FedWMSAM)": {"algo": "fedwmsam"},
        "no ascent (DynaFed)": {"algo": "dynafed"},
    }

    def seeds_of(self, arm):
        return self.seeds if arm.startswith(self.hard) else min(self.seeds, 3)

    def check(self):
        super().check()
        for _, arm, _ in study.jobs(self):
            split, name = arm.split(", ")
            place = self.size, self.tuned.get(split, split), name
            if self.size == "cpu" and not tune.winner(self.results / "tuned.json", *place):
                raise ValueError(f"{arm} is not tuned; python -m lab.claims {self.name} --tune")

    def settings(self, split, name):
        """All settings of an arm but the tuned ones."""
        own = self.splits[split] | UPLINKS["2 bits"] | self.directions[name]
        if self.size == "quick":
            return own | {"clients": 10}  # one for each class
        own |= {"rounds": 80, "local_steps": 10, "last": 20, "measure_images": 500}
        return own | ({"oracle_images": 100} if name.startswith("true") else {})

    def searches(self):
        found, (common,) = {}, self.tasks().values()
        for split in self.hard:
            for name in self.directions:
                shared = study.fitting(common, self.settings(split, name))
                seeds = 3 if split == "one class" and self.size != "quick" else 1
                found[split, name] = shared, tune.GRID.get(shared["algo"], tune.RADII), seeds
        return found

    def tasks(self):
        return study.TASKS["quick" if self.size == "quick" else "cpu"]

    def arms(self, task):
        found = {}
        for split in self.splits:
            for name in self.directions:
                place = self.size, self.tuned.get(split, split), name
                chosen = tune.winner(self.results / "tuned.json", *place) or {}
                found[f"{split}, {name}"] = self.settings(split, name) | chosen
        return found

    def watch(self, task):
        every, mean_from = (2, 2) if self.size == "quick" else (40, 40)
        return {"every": every, "names": ["alignment", "mean_model"], "mean_from": mean_from}

    def baseline(self, arm):
        return f"{arm.split(', ')[0]}, fedavg"

    judged_by = ("accuracy", 1)
    judged = [
        ("synthetic (FedSynSAM)", "fedavg"),
        ("synthetic (FedSynSAM)", "own (FedSAM)"),
        ("true (oracle)", "fedavg"),
        ("true (oracle)", "own (FedSAM)"),
    ]

    def rules(self, table):
        def compare(split, first, second, measure, sign):
            about = f"{first.split(' (')[0]} minus {second.split(' (')[0]}"
            return rule(about, f"{split}, {first}", f"{split}, {second}", measure, sign)

        found = [compare(s, *pair, *self.judged_by) for s in self.hard for pair in self.judged]
        for measure in ("accuracy", "mean_model", "test_loss", "eigenvalue"):
            for split in self.splits:
                others = list(self.directions)[1:]
                found += [compare(split, name, "fedavg", measure, 0) for name in others]
        known = arms_of(table)
        return [r for r in found if {r.first.arm, r.second.arm} <= set(known)]


class Whose(Skew):
    """Skew's task with one class per client, with directions that are trials (lab/directions.py).

    Arms that Skew has are the same runs. Each trial is tuned as those are:
    `python -m lab.claims whose --tune`.
    """

    says = (
        "At one class per client a direction that keeps what a batch has of its own, and exchanges "
        "the client's bias for the synthetic gradient, gains over FedAvg and over FedSAM; the "
        "synthetic gradient gains more in the descent than in the ascent"
    )
    source = "this project"
    refuted = "one of these three differences of test accuracy has the other sign"
    splits = {"one class": Skew.splits["one class"]}
    hard, tuned = ("one class",), {}
    pictures = {"_against": figures.draw_against}
    trials = {
        "another batch": {"algo": "lab/directions.py:AnotherBatch"},
        "another client": {"algo": "lab/directions.py:AnotherClient"},
        "debiased": {"algo": "lab/directions.py:Debiased"},
        "projected": {"algo": "lab/directions.py:Projected", "warmup_method": "fedavg"},
        "once a round": {"algo": "lab/directions.py:OncePerRound"},
        "descending": Skew.directions["synthetic (FedSynSAM)"]
        | {"algo": "lab/directions.py:Descending"},
    }
    directions = dict(list(Skew.directions.items())[:6]) | trials
    judged = [
        ("debiased", "fedavg"),
        ("debiased", "own (FedSAM)"),
        ("descending", "synthetic (FedSynSAM)"),
    ]

    def searches(self):
        return {
            place: what for place, what in super().searches().items() if place[1] in self.trials
        }


class Overfit(Skew):
    """Skew's directions where the network overfits: 10,000 photographs, 120 rounds.

    One learning rate and one radius for all, so a gain may be one of the radius. A first look with
    seeds 0 and 1 gave the claim: training accuracy was 20 points above test accuracy, and methods
    differed in test loss, in accuracy by two points or less. So test loss is judged, with other
    seeds.
    """

    says = (
        "Where training overfits, the ascent must follow the gradient of the very batch of the "
        "step: it lowers the test loss, more than the true global direction, the synthetic one or "
        "another batch of the same client do"
    )
    source = "this project, after m-sharpness in Foret et al. 2021"
    refuted = "one of these differences of test loss has the other sign"
    columns = ("accuracy", "train_accuracy", "val_accuracy", "test_loss", "eigenvalue")
    columns += ("mean_model", "cos_own", "cos_used", "seconds")
    panels = ("test_loss", "accuracy", "eigenvalue")
    pictures = {"_against": functools.partial(figures.draw_against, gain="test_loss")}
    splits = {name: Skew.splits[name] for name in ("Dir 0.1", "two classes")}
    hard, tuned, repeats, first_seed = tuple(splits), {}, 3, 2
    sizes = study.SIZES
    directions = Skew.directions | {
        "another batch": Whose.trials["another batch"],
        "debiased": Whose.trials["debiased"],
    }
    judged_by = ("test_loss", -1)
    judged = [
        ("own (FedSAM)", other)
        for other in ("fedavg", "true (oracle)", "synthetic (FedSynSAM)", "another batch")
    ]
    images = "data/downloads/cifar10_11k.npz"

    def check(self):
        Claim.check(self)
        if self.size == "cpu" and not Path(self.images).exists():
            make = f"python -m vision.make_subset cifar10 {self.images} --train 1100"
            raise ValueError(f"there is no {self.images}; make it with {make}")

    def settings(self, split, name):
        own = super().settings(split, name)
        if self.size == "quick":
            return own
        own |= {"model": "cnn", "width": 16, "hidden": 128, "lr": 0.1, "local_steps": 20}
        sizes = {"cpu": (self.images, 120), "gpu": ("cifar10", 400)}
        dataset, rounds = sizes[self.size]
        return own | {"dataset": dataset, "rounds": rounds, "last": 8}

    def searches(self):
        return {}

    def watch(self, task):
        every = {"quick": 2, "cpu": 60, "gpu": 200}[self.size]
        return super().watch(task) | {"every": every, "mean_from": every}

    def arms(self, task):
        pairs = [(split, name) for split in self.splits for name in self.directions]
        return {f"{split}, {name}": self.settings(split, name) for split, name in pairs}


CLAIMS = {
    claim.__name__.lower(): claim
    for claim in (Default, Sharpness, Compressed, Remedy, Alignment, Accuracy, Hyper, FedSynth)
    + (GradAlign, Man, Oracle, Skew, Whose, Overfit)
}


def tables(claim, part):
    """The tables of a stored size: {task: DataFrame with all that the rules need}."""
    table = study.frame(part["rows"], part["defaults"])
    return {task: claim.derive(rows) for task, rows in table.groupby("task", sort=False)}


def judged(claim, table):
    """The comparisons of a claim, and its verdict: (DataFrame, word)."""
    found = verdicts.compare(table, claim.rules(table))
    return found, verdicts.verdict(found.outcome[found.sign != 0])


def told(claim, part):
    """The tables of a stored size, all comparisons and the verdicts, in Markdown."""
    text = []
    for task, table in tables(claim, part).items():
        found, word = judged(claim, table)
        text += [f"{task}\n"] if task else []
        text += [verdicts.arms_text(table, claim.columns), f"**{word}.**"]
        text += [verdicts.comparisons_text(found)]
    return "\n\n".join(text)


def keep(claim, rows):
    """Write results/NAME.json -> the part of this size."""
    machines = {json.dumps(row.get("machine")): row.get("machine") for row in rows}
    part = {"claim": claim.says, "source": claim.source, "refuted_by": claim.refuted}
    part |= {"command": claim.command, "machines": [m for m in machines.values() if m]}
    part["defaults"] = run.resolve()
    part["rows"] = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
    study.store(claim.results / f"{claim.name}.json", claim.size, part)
    return part


def draw(claim, part):
    """Write results/NAME.png, a figure for each task."""
    for task, table in tables(claim, part).items():
        path = claim.results / figures.file_name(claim.name, task)
        figures.draw_claim(path, claim, table, *judged(claim, table))
        for suffix, draw_more in claim.pictures.items():
            draw_more(path.with_stem(path.stem + suffix), claim, table)


def stored_claims(results):
    """All claims with stored rows: {name: (claim at its largest size, its part)}."""
    found = {}
    for name, kind in CLAIMS.items():
        if (results / f"{name}.json").exists():
            size, part = study.stored(results / f"{name}.json")
            found[name] = kind(size, results), part
    return found


def tuned(claim, root, threads):
    """Do the searches of a claim, print the winners, exit code 0; 2 if it has none."""
    searches = {
        place: what
        for place, what in claim.searches().items()
        if re.match(claim.only, ", ".join(place))
    }
    if not searches:
        raise ValueError(f"{claim.name} tunes nothing of its own here; see python -m lab.tune")
    path, command = claim.results / "tuned.json", claim.command + " --tune"
    for e in tune.tune(searches, claim.size, root, path, command, threads=threads):
        print(f"{e['world']}, {e['method']}: {tune.words(e['settings'])}")
    return 0


def conducted(claim, root, threads):
    """Do the runs of a claim, store the rows, draw, print what came out: exit code 0."""
    claim.check()
    part = keep(claim, study.conduct(claim, root, threads=threads))
    if study.stored(claim.results / f"{claim.name}.json")[0] == claim.size:
        draw(claim, part)  # the figure is that of the largest size
    print(told(claim, part))
    return 0


def main(argv=None):
    """The command: exit code 0, 2, or 130 if interrupted."""
    p = run.Parser(prog="python -m lab.claims", description=__doc__.split("\n")[0])
    p.add_argument("name", choices=CLAIMS)
    p.add_argument("--size", choices=study.SIZES, default="cpu")
    p.add_argument("--out", type=Path, default=Path("runs/lab"), help="where runs are kept")
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    p.add_argument("--seeds", type=int, default=0, help="seeds of each arm; 0: those of the claim")
    p.add_argument("--only", default="", help="only arms whose labels match from the start")
    p.add_argument("--tune", action="store_true", default=False, help="its settings, not its runs")
    try:
        given = p.parse_args(argv)
        if given.seeds < 0:
            raise ValueError(f"seeds = {given.seeds} must not be negative")
        claim = CLAIMS[given.name](given.size, given.results, given.seeds, given.only)
        task = tuned if given.tune else conducted
        return task(claim, given.out, given.threads)
    except (ValueError, OSError) as error:
        print(f"lab.claims: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lab.claims: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
