"""A claim of this project: FedSynSAM need not learn its images, a mean image of each class will do.

Ten real images, one of each class, are nearly as good as a hundred for the ascent direction, and
those that are learnt from the path of the model are not shown to be worth more than random numbers
(`whose`). A mean over all clients hides single images better, and clients can sum up theirs without
showing them to the server (secure aggregation). lab/directions.py has the method.
"""

from lab.claim import Claim, rule
from lab.onebit import Untuned


class Means(Claim):
    """FedSynSAM with three kinds of images, and the ascents it competes with, at one class.

    All have rho 0.1 and, on FedDyn, prox 0.1. lr is what the searches of `default`, `whose` and
    `levels` found: with one bit 0.4 for FedAvg and for the own gradient, 0.2 for the others; 0.1
    with three levels. "Class means" come after the warm-up of FedSynSAM, "at once" before round 1.
    "Real" is the oracle with one image of each class. A look at validation images (seed 300) gave
    the claim.
    """

    says = (
        "With one class per client and drift correction FedSynSAM gains if its images are means, "
        "one of each class, over all clients, in place of learnt ones: it is more accurate than "
        "with learnt images and than without an ascent, and flatter than without an ascent"
    )
    source = "this project"
    refuted = "one of these differences has the other sign"
    columns = (*Claim.columns, "mean_model", "test_loss", "cos_used", "mb_up", "mb_down", "seconds")
    repeats, first_seed, divisible, sizes = 5, 80, True, ("quick", "cpu")
    bases = {  # a place: its uplink and learning rate
        "FedDyn, 1 bit": {"compress": "sign", "lr": 0.2, "prox": 0.1},
        "FedDyn, three levels": {"compress": "qsgd-elias", "levels": 1, "lr": 0.1, "prox": 0.1},
        "FedAvg, 1 bit": {"compress": "sign", "lr": 0.4},
    }
    methods = {  # on FedAvg, on FedDyn, other settings
        "none": ("fedavg", "feddyn", {}),
        "own": ("fedsam", "fedspeed", {}),
        "learnt": ("fedsynsam", "fedsynsam-d", {}),
        "class means": ("lab/directions.py:ClassMeans", "lab/directions.py:ClassMeans+feddyn", {}),
        "real": ("oracle", "oracle+feddyn", {"oracle_images": 10}),
    }
    methods["class means at once"] = *methods["class means"][:2], {"warmup": 1, "window": 1}
    fewer = ("none", "learnt", "class means")  # of FedAvg, where no direction gained much

    tasks, watch = Untuned.tasks, Untuned.watch

    def arms(self, task):
        found = {}
        for base, shared in self.bases.items():
            for name, (on_fedavg, on_feddyn, own) in self.methods.items():
                algo = on_fedavg if base.startswith("FedAvg") else on_feddyn
                own = {"algo": algo} | shared | own
                own |= {} if name == "none" else {"rho": 0.1}
                own |= {"lr": 0.4} if (base, name) == ("FedDyn, 1 bit", "own") else {}
                if algo == on_feddyn or name in self.fewer:
                    found[f"{base}, {name}"] = own
        return found

    def baseline(self, arm):
        return f"{arm.rpartition(', ')[0]}, none"

    def rules(self, table):
        found = []
        for base in self.bases:
            means, learnt, none = (f"{base}, {x}" for x in ("class means", "learnt", "none"))
            if base.startswith("FedDyn"):
                found += [rule("class means minus learnt", means, learnt, "accuracy")]
                found += [rule("class means minus none", means, none, "accuracy")]
                found += [rule("class means minus none", means, none, "eigenvalue", -1)]
            others = [f"{base}, {name}" for name in self.methods if name != "class means"]
            for measure in ("accuracy", "mean_model", "test_loss", "eigenvalue"):
                found += [rule("class means minus", means, x, measure, 0) for x in others]
                found += [rule("minus none", x, none, measure, 0) for x in others if x != none]
        return found
