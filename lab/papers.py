"""Claims of papers: FedSynSAM's four, and those of FedSynth, FedGA and MAN."""

import numpy as np

from lab import study, tune
from lab.claim import SPLITS, UPLINKS, Claim, arms_of, rule
from lab.verdicts import Rule, Value


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
            masking |= {"error_feedback": "off"}
            place = 7 if self.size == "gpu" else 6  # bytes of a float and of its place
            top = {"compress": "topk", "k": float((size - 4) // place), "error_feedback": "off"}
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
