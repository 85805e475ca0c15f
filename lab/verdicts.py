"""What may be concluded from a few seeds: t-intervals of paired differences, and Holm's correction.

Two arms that are compared are run with the same seeds: the same split, first weights, clients and
batches. So their difference is taken seed by seed, x_s = a_s - b_s, which removes what the seeds
have in common. With n seeds, mean m and standard deviation s of the x_s (`interval`):

    95 % t-interval    m +- t s / sqrt(n)         n = 3: t = 4.30,  n = 5: t = 2.78,  n = 10: 2.26

If the interval contains 0, the difference is not significant: a true difference of 0 would give
such numbers in more than 5 % of experiments. The p-value says in how many. A claim with k
comparisons has k chances of a false alarm, so its p-values are corrected (`holm`), those of each
table by themselves: the smallest is multiplied by k, the next one by k - 1, and so on. A comparison
counts if its corrected p-value is at most 0.05; its interval is printed as it is, without
correction.

A claim is a list of rules, written before its runs: which arm minus which arm, and the sign it
should have (`Rule`). Their words are made into one (`verdict`):

    Holds           all comparisons count, with the claimed sign
    Holds in part   some do, and none counts with the other sign
    Mixed           some count with the claimed sign, some with the other one
    Refuted         some count with the other sign, and none with the claimed one
    No significant difference      none counts;  Not decided: fewer than two seeds

"No significant difference" is not "no difference". A claim that something is not worse needs a
margin, and then a rule asks whether sign * difference + margin is above 0 (non-inferiority).

A few claims got more seeds after a look at the first ones, and say so. Two looks are two chances,
which these p-values do not count.

Three seeds agree in sign by chance in one case of four, and a t-interval of three is wide: a
difference must be 2.5 times its standard deviation over the seeds to count, without correction.

Sources: Student 1908; Holm 1979.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95


class Value(NamedTuple):
    """A measure of an arm; `arm` and `measure` are names in the table of all runs."""

    arm: str
    measure: str


class Rule(NamedTuple):
    """first - second should have this sign; with a margin: should not miss it by more than this.

    about: what is compared, the same words for comparisons of one kind. A rule with sign 0 is shown
    and not judged.
    """

    about: str
    first: Value
    second: Value
    sign: int = 1
    margin: float = 0.0


def interval(x, level=LEVEL):
    """The t-interval of the mean of x [n]: (mean, low, high); low and high are nan if n < 2."""
    x = np.asarray(x, dtype=float)
    if len(x) < 2:
        return (x.mean() if len(x) else np.nan), np.nan, np.nan
    error = x.std(ddof=1) / math.sqrt(len(x))
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * error
    return x.mean(), x.mean() - half, x.mean() + half


def half_width(x, level=LEVEL):
    """Half the length of the t-interval of x [n], the number behind a +-; nan if n < 2."""
    mean, _, high = interval(x, level)
    return high - mean


def p_value(x):
    """The two-sided p-value of the hypothesis that the mean of x [n] is 0; nan if n < 2."""
    x = np.asarray(x, dtype=float)
    if len(x) < 2:
        return np.nan
    if np.ptp(x) == 0:  # no spread, as for bytes: t is infinite, or 0 / 0
        return float(x[0] == 0)
    return float(stats.ttest_1samp(x, 0).pvalue)


def holm(p):
    """Holm's corrected p-values, in the order of p [k] -> [k]; nan stays nan and does not count.

    The j-th smallest of k (j = 0, 1, ...) is multiplied by k - j, and made at least as large as
    the corrected one before it. Rejecting those at most 0.05 makes an error with 5 % at most.
    """
    p = np.asarray(p, dtype=float)
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected


def values(table, value):
    """The numbers of a measure of an arm, by seed, without what is missing: a pandas Series."""
    if value.measure not in table:
        return pd.Series([])
    runs = table.loc[table.arm == value.arm, ["seed", value.measure]].set_index("seed")
    return runs[value.measure].astype(float).dropna()


def differences(table, first, second):
    """first - second, seed by seed, over the seeds that have both -> array [n]."""
    return (values(table, first) - values(table, second)).dropna().to_numpy(dtype=float)


def compare(table, rules):
    """All comparisons of a claim: a DataFrame with a row for each rule.

    mean, low, high of first - second; p and its corrected value; outcome: 1 as claimed, -1 the
    other way, 0 not significant, nan if there are fewer than two seeds or the rule is not judged.
    """
    rows = []
    for rule in rules:
        x = differences(table, rule.first, rule.second)
        mean, low, high = interval(x)
        tested = (rule.sign or 1) * x + rule.margin
        told = {"about": rule.about, "first": rule.first.arm, "second": rule.second.arm}
        told |= {"measure": rule.first.measure, "sign": rule.sign, "margin": rule.margin}
        told |= {"seeds": len(x), "mean": mean, "low": low, "high": high, "p": p_value(tested)}
        rows.append(told | {"side": np.sign(interval(tested)[0])})
    found = pd.DataFrame(rows)
    found["corrected"] = holm(found.p.where(found.sign != 0))
    found["outcome"] = found.side.where(found.corrected <= 1 - LEVEL, 0.0)
    found["outcome"] = found.outcome.where(found.corrected.notna())
    return found.drop(columns="side")


def verdict(outcomes):
    """One word for the outcomes of all judged comparisons of a claim; see the header."""
    known = [x for x in outcomes if not np.isnan(x)]
    if not known:
        return "Not decided"
    if 1 not in known:
        return "Refuted" if -1 in known else "No significant difference"
    if -1 in known:
        return "Mixed"
    return "Holds" if all(x == 1 for x in outcomes) else "Holds in part"


def word(row):
    """What a row of `compare` says, in words."""
    if row.seeds < 2:
        return "too few seeds"
    if row.sign == 0:
        outside = row.low > 0 or row.high < 0
        return (
            ("higher" if row["mean"] > 0 else "lower") if outside else "no significant difference"
        )
    lost = " (Holm)" if row.outcome == 0 and row.p <= 1 - LEVEL else ""
    if row.margin:
        worse = "lower" if row.sign > 0 else "higher"
        how = {1: "less than", -1: "more than", 0: "not shown to be less than"}[row.outcome]
        return f"{how} {row.margin:g} {worse}{lost}"
    if row.outcome == 0:
        return "no significant difference" + lost
    return "higher" if row.outcome * row.sign > 0 else "lower"


# ------------------------------------------------------------------------------------------ as text

MEASURES = {  # name: (what it is called, digits)
    "accuracy": ("test accuracy %", 2),
    "mean_model": ("test accuracy % of the mean model", 2),
    "at_equal_bytes": ("test accuracy % at equal bytes up", 2),
    "val_accuracy": ("validation accuracy %", 2),
    "train_accuracy": ("training accuracy %", 2),
    "train_loss": ("training loss", 3),
    "test_loss": ("test loss", 3),
    "eigenvalue": ("top eigenvalue", 1),
    "excess": ("eigenvalue at equal loss", 1),
    "trace": ("trace", 0),
    "sam": ("SAM sharpness", 3),
    "cos_own": ("cosine: own gradient", 2),
    "cos_used": ("cosine: the direction itself", 2),
    "cos_last_move": ("cosine: last move", 2),
    "cos_last_uncompressed": ("cosine: last move, uncompressed", 2),
    "cos_synthetic": ("cosine: synthetic", 2),
    "cos_mixed": ("cosine: mixed", 2),
    "cos_path": ("cosine: path of the model", 2),
    "r": ("r", 2),
    "message": ("bytes a client and round", 0),
    "step_ms": ("a local step, ms", 1),
    "mb_up": ("MB up", 1),
    "mb_down": ("MB down", 1),
    "seconds": ("seconds", 0),
}


def finer(measure):
    """Digits of a difference of a measure: one more where differences are small."""
    digits = MEASURES[measure][1]
    return max(1, digits + (digits == 1 or measure.startswith("cos")))


def pm(x, digits):
    """ "mean ± half the t-interval" of x [n], "-" if n is 0."""
    x = [v for v in x if not np.isnan(v)]
    if not x:
        return "-"
    half = half_width(x)
    spread = "" if np.isnan(half) or half < 1e-9 else f" ± {half:,.{digits}f}"
    return f"{np.mean(x):,.{digits}f}" + spread


def arms_text(table, columns):
    """A Markdown table with a line for each arm: mean ± half the t-interval over its seeds."""
    columns = [name for name in columns if name in table and table[name].notna().any()]
    heads = ["", *(MEASURES[name][0] for name in columns), "runs"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for arm, rows in table.groupby("arm", sort=False):
        cells = [pm(rows[name].astype(float), MEASURES[name][1]) for name in columns]
        lost = int(rows.diverged.notna().sum())
        runs = f"{len(rows)}" + (f", {lost} diverged" if lost else "")
        lines.append("| " + " | ".join([arm, *cells, runs]) + " |")
    return "\n".join(lines)


def comparisons_text(found, judged=True):
    """The comparisons of `compare` as a Markdown table; those not judged have no correction."""
    heads = ["what", "arms", "measure", "seeds", "difference", "95 % interval", "p"]
    heads += ["p, Holm", ""] if judged else [""]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for _, c in found.iterrows():
        arms = c["first"] if c["first"] == c["second"] else f"{c['first']} − {c['second']}"
        name, digits = MEASURES[c.measure][0], finer(c.measure)
        between = f"{c.low:+.{digits}f} to {c.high:+.{digits}f}" if c.seeds > 1 else "-"
        p = [f"{x:.3f}" if x == x else "-" for x in (c.p, c.corrected)][: 1 + judged]
        difference = f"{c['mean']:+.{digits}f}" if c.seeds else "-"
        cells = [c.about, arms, name, str(c.seeds), difference, between, *p, word(c)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
