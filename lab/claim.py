"""What a claim is: arms, measures, and rules that were written before the runs.

The claims of papers stand in papers.py, those of this project in ours.py and onebit.py. A claim
says which arms are run (`arms`), what is measured besides accuracy, losses, bytes and eigenvalue
(`measures`, `watch`), and which arm minus which arm should have which sign (`rules`). A verdict
holds for these images, networks and rounds, and no more than that.
"""

import json
import re

import pandas as pd

from lab import study, tune
from lab.verdicts import Rule, Value
from plumbing.settings import HERE

UPLINKS = {
    "none": {"compress": "identity"},
    "4 bits": {"compress": "qsgd", "levels": 7},
    "2 bits": {"compress": "qsgd", "levels": 1},
    "top 10 %": {"compress": "topk", "k": 0.1, "error_feedback": "off"},
    "top 5 %": {"compress": "topk", "k": 0.05, "error_feedback": "off"},
    "top 1 %": {"compress": "topk", "k": 0.01, "error_feedback": "off"},
}
SPLITS = {"IID": {"partition": "iid"}, "Dir 0.6": {"alpha": 0.6}, "Dir 0.1": {"alpha": 0.1}}


class Claim:
    """A claim at one size; a subclass says what it claims, and how that is tested.

    says, refuted: the claim, and what would refute it. source: whose claim. columns of its table,
    panels of its figure: names in verdicts.MEASURES. results: the folder of tuned.json. seeds and
    only: fewer seeds, and only arms whose labels begin with a match of this regular expression.
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
        if size not in self.sizes:
            raise ValueError(f"{self.name} has the sizes {' and '.join(self.sizes)}")
        self.only = expression(only)
        self.command = f"python -m lab.claims {self.name} --size {size}"
        self.command += f" --seeds {seeds}" if seeds else ""
        self.command += f' --only "{only}"' if only and not self.kept() else ""
        self.seeds = seeds or (1 if size == "quick" else self.repeats)

    def check(self):
        """Before the runs: ValueError if something is missing, or stored rows would be lost."""
        if self.only.pattern and not self.divisible:
            raise ValueError(f"{self.name} is judged as a whole, so it takes no --only")
        coming = [(arm, s["seed"]) for _, arm, s in study.jobs(self)]
        rows = [study.plain(row) for row in self.stored().get("rows", ())]
        before = {(row["arm"], row["seed"]) for row in rows}
        arms = list(dict.fromkeys(arm for arm, _ in [*coming, *before]))
        if coming and self.divisible and not self.comparisons(pd.DataFrame({"arm": arms})):
            raise ValueError(f"--only {self.only.pattern!r} leaves nothing to compare")
        lost = {(arm, seed) for arm, seed in before - {*coming} if self.only.match(arm)}
        if lost:
            raise ValueError(
                f"{self.results / self.name}.json holds {len(lost)} rows that these runs would not "
                f"replace, such as {min(lost)}; keep them with --results and another folder"
            )
        for arm, _ in coming:
            if self.size == "cpu" and self.place(arm) and not self.winner(arm):
                raise ValueError(f"{arm} is not tuned; python -m lab.claims {self.name} --tune")

    def stored(self):
        """What results/NAME.json holds of this size: rows, machines and more; {} if nothing."""
        path = self.results / f"{self.name}.json"
        return json.loads(path.read_text()).get(self.size, {}) if path.exists() else {}

    def kept(self):
        """The stored rows of arms that these runs do not touch."""
        rows = self.stored().get("rows", ())
        return [row for row in rows if not self.only.match(study.plain(row)["arm"])]

    def tasks(self):
        """{task: settings that all arms share}"""
        return study.TASKS[self.size]

    def arms(self, task):
        """{label: settings of this arm}"""
        raise NotImplementedError

    def seeds_of(self, arm):
        """How many seeds an arm has."""
        return self.seeds

    def place(self, arm):
        """The search in tuned.json whose settings an arm takes: (task, method), or None."""
        return None

    def winner(self, arm):
        """What this search found, as settings; {} if there was none."""
        place = self.place(arm)
        return tune.winner(self.results / "tuned.json", self.size, *place) if place else {}

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

    def comparisons(self, table):
        """The rules whose arms are both in the table; what is judged is not shown again."""
        known = set(table.arm)
        found = [r for r in self.rules(table) if {r.first.arm, r.second.arm} <= known]
        judged = {(r.first, r.second) for r in found if r.sign}
        return [r for r in found if r.sign or (r.first, r.second) not in judged]

    def baseline(self, arm):
        """The label of the arm that this one is compared with in the figure of all claims."""
        return "fedavg"

    def on_cpu(self, **settings):
        """These settings at the size cpu, none at the others."""
        return settings if self.size == "cpu" else {}


def expression(text):
    """A regular expression, compiled; ValueError if it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--only {text!r} is no regular expression: {error}") from None


def rule(about, first, second, measure, sign=1, margin=0.0):
    """first minus second, both arms, of the same measure."""
    return Rule(about, Value(first, measure), Value(second, measure), sign, margin)


def arms_of(table):
    """The labels of a table, each once."""
    return list(dict.fromkeys(table.arm))
