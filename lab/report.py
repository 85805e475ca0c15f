"""Writes results/README.md, and a page of numbers for each claim, from the stored rows only.

    python -m lab.report

README.md is what to read: what each claim says, how it came out, figures and prose. results/NAME.md
has the table of a claim and all of its comparisons. Their numbers come out of the rows in results/.
Prose stands in lab/notes.md, where a number is written as a place in a table and filled in here:

    {fedsam | accuracy}              mean ± half the 95 % t-interval over the seeds of an arm
    {fedsam - fedavg | test_loss}    paired difference [95 % interval], by seed

An arm may be written without what stands in parentheses behind it.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

import run
from lab import claims, figures, papers, presets, study, tune, verdicts, wall
from lab.claim import arms_of
from lab.verdicts import MEASURES, Value
from plumbing.settings import HERE, closest

NOTES = Path(__file__).with_name("notes.md")


# ------------------------------------------------------------------------------------- the prose


def notes(path=NOTES):
    """The sections of the notes: {heading: text}."""
    parts = re.split(r"^## (.+)\n", path.read_text(), flags=re.M)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2])}


def filled(text, table):
    """The text with its {arm | measure} and {arm - arm | measure} filled in from a table."""
    return re.sub(r"\{([^{}|]+)\|([^{}|]+)\}", lambda found: number(*found.groups(), table), text)


def number(arms, measure, table):
    """One place of the notes as text; ValueError if there is no such arm or measure."""
    measure = measure.strip()
    if measure not in MEASURES or measure not in table:
        raise ValueError(f"{NOTES.name}: no measure {measure!r}; known: {', '.join(MEASURES)}")
    values = [Value(arm_called(name.strip(), table), measure) for name in arms.split(" - ")]
    if len(values) == 1:
        return verdicts.pm(verdicts.values(table, values[0]), MEASURES[measure][1])
    return words_of(verdicts.differences(table, *values), measure)


def words_of(x, measure):
    """The mean of differences x [n] of a measure, and its t-interval."""
    mean, low, high = verdicts.interval(x)
    digits = verdicts.finer(measure) if abs(mean) < 100 else 0
    return f"{mean:+,.{digits}f} [{low:+,.{digits}f}, {high:+,.{digits}f}]"


def arm_called(name, table):
    """The label of an arm, also if it is written without its parentheses."""
    known = arms_of(table)
    found = [arm for arm in known if arm == name or arm.startswith(name + " (")]
    if not found:
        raise ValueError(f"{NOTES.name}: no arm {name!r}; {closest(name, known)}")
    return found[0]


# ------------------------------------------------------------------------------------- the claims


def section(claim, outcomes, prose):
    """What README.md says of a claim: its words, its verdicts, the figures and the notes.

    outcomes: for each task its table, its comparisons and the verdict.
    """
    lines = [f"## {claim.name}", f"{claim.says} ({claim.source})."]
    lines.append(f"`{claim.command}`; [its table and all comparisons]({claim.name}.md).")
    for task, (table, found, word) in outcomes.items():
        lines += [f"### {task}"] if task else []
        lines.append(f"**{word}.** {counted(found)} {seeds_text(table)}")
        file = Path(figures.file_name(claim.name, task))
        for suffix in ("", *claim.pictures):
            lines.append(f"![{claim.name}{suffix}]({file.with_stem(file.stem + suffix)})")
        said = prose.get(f"{claim.name} {task}".strip())
        lines += [filled(said, table)] if said else []
    return "\n\n".join(lines)


def numbers(claim, part, outcomes):
    """The page NAME.md of a claim: its tables and all comparisons."""
    lines = [f"# {claim.name}: the numbers", f"{claim.says} ({claim.source})."]
    how = "Refuted if one of these is significant, and no comparison is as claimed"
    lines.append(f"{how}: {claim.refuted}.")
    lines += [f"[What came out](README.md#{claim.name}).", made_by(claim, part)]
    for task, (table, found, word) in outcomes.items():
        lines += [f"## {task}"] if task else []
        lines.append(verdicts.arms_text(table, claim.columns))
        lines.append(f"**{word}.** {counted(found)}")
        lines.append(verdicts.comparisons_text(found[found.sign != 0]))
        if (found.sign == 0).any():
            shown = verdicts.comparisons_text(found[found.sign == 0], judged=False)
            lines += ["Shown, not judged:", shown]
    return "\n\n".join(lines) + "\n"


def made_by(claim, part):
    """By which command, versions and machines; older rows had another command."""
    command, wheres = part["command"], []
    for m in part["machines"]:
        where = f"torch {m.get('torch')}, {m.get('cores')} cores of {processor(m)}"
        wheres.append(f"source {m.get('source')}, {where}")
    if "lab.claims" not in command:
        command, old = claim.command, f" then called `{command}`,"
    else:
        old = ""
    return f"`{command}`,{old} made by {'; '.join(wheres) or 'a machine that is not known'}."


def processor(machine):
    return machine.get("gpu") or machine.get("processor") or machine.get("system", "a machine")


def counted(found):
    """How many comparisons are judged, and how they came out."""
    return f"Of {(found.sign != 0).sum()} comparisons: {came_out(found)}."


def seeds_text(table):
    """How many seeds an arm of a table has."""
    return f"Seeds: {' or '.join(map(str, sorted(set(table.groupby('arm').seed.nunique()))))}."


def came_out(found):
    """How the judged comparisons came out, in numbers."""
    judged = found[found.sign != 0]
    counts = [(judged.outcome == sign).sum() for sign in (1, -1, 0)]
    words = ("as claimed", "the other way", "not significant")
    return ", ".join(f"{n} {word}" for n, word in zip(counts, words) if n) or "none decided"


def summary(found):
    """All claims in one table, each with a link to its section."""
    lines = ["| | the claim | verdict | comparisons |", "| --- | --- | --- | --- |"]
    for name, (claim, _, outcomes) in found.items():
        for task, (_, compared, word) in outcomes.items():
            name_and_task = f"[{name}](#{name}) {task}".strip()
            cells = (name_and_task, claim.says, f"**{word}**", came_out(compared))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------- seeds of several claims

SHARP = "1 bit, feedback, tuned, "
POOLED = {  # what is compared: the claims that have it, and what the two arms are called there
    "FedSynSAM minus FedAvg": {
        "default": "fedsynsam - fedavg",
        "levels": "fedsynsam, 1 bit - fedavg, 1 bit",
        "remedy": f"{SHARP}fedsynsam - {SHARP}fedavg",
        "whose": "FedAvg, synthetic - FedAvg, none",
        "means": "FedAvg, 1 bit, learnt - FedAvg, 1 bit, none",
    },
    "FedSAM minus FedAvg": {
        "default": "fedsam - fedavg",
        "remedy": f"{SHARP}fedsam - {SHARP}fedavg",
        "whose": "FedAvg, own - FedAvg, none",
    },
    "FedSynSAM minus FedSAM": {
        "default": "fedsynsam - fedsam",
        "remedy": f"{SHARP}fedsynsam - {SHARP}fedsam",
        "whose": "FedAvg, synthetic - FedAvg, own",
    },
} | {
    f"photographs: {first} minus {second}": dict.fromkeys(
        ("overfit", "again"), f"Dir 0.1, {first} - Dir 0.1, {second}"
    )
    for first, second in (
        ("own", "fedavg"),
        ("another batch", "fedavg"),
        ("true", "fedavg"),
        ("synthetic", "fedavg"),
        ("own", "true"),
    )
}


def pooled(pairs, tables, measure="accuracy"):
    """The differences of two arms over the seeds of several claims.

    pairs: {claim: "arm - arm"}; tables: {claim: its table}.
    """
    found = []
    for name, arms in pairs.items():
        both = [Value(arm_called(arm, tables[name]), measure) for arm in arms.split(" - ")]
        found += [*verdicts.differences(tables[name], *both)]
    return found


def pooled_text(found):
    """POOLED as a table in Markdown; what needs a claim without rows is left out."""
    tables = {name: outcomes[""][0] for name, (*_, outcomes) in found.items() if "" in outcomes}
    measures = ("accuracy", "mean_model", "test_loss", "eigenvalue")
    titles = ["", *(MEASURES[m][0] for m in measures), "seeds", "claims"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for what, pairs in POOLED.items():
        if set(pairs) <= set(tables):
            x = {m: pooled(pairs, tables, m) for m in measures}
            cells = [what, *(words_of(x[m], m) for m in measures)]
            cells += [str(len(x["accuracy"])), ", ".join(pairs)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- other rows


def mild_table(results):
    """The comparison at the older defaults (study.MILD), as a table of runs."""
    return table_of(json.loads((results / "mild.json").read_text()))


def table_of(rows):
    """Rows of single commands as a table of runs; an arm is what its command says."""
    return study.frame([row | {"arm": arm_of(row), "fields": {}} for row in rows], run.resolve())


def arm_of(row):
    """The arm of a row: the method, and the settings in its command."""
    # what all rows have, and the seeds, which are no part of an arm
    words = re.sub(r"python run.py|--algo [^-]+(-[sd]\b)?|--seeds? \d+", "", row["command"]).split()
    return " ".join([row["algo"], *words])


def asides_table(results):
    """The runs outside of the claims, with those that they are compared with."""
    rows = json.loads((results / "asides.json").read_text())
    tables = [table_of(rows), mild_table(results)]
    size, part = study.stored(results / "accuracy.json")
    tuned = claims.tables(papers.Accuracy(size, results), part)
    both = pd.concat([*tables, *(t.assign(arm="tuned " + t.arm) for t in tuned.values())])
    return both.reset_index(drop=True)


def published_text(results):
    """Published numbers beside ours: stored rows of older versions, then those of lab.presets."""
    text = []
    for name, preset in presets.PRESETS.items():
        rows = []
        old, new = (results / name / file for file in ("results.json", "rows.json"))
        if old.exists():
            stored = json.loads(old.read_text())["runs"]
            rows += [in_columns(row, preset.published) for row in stored]
        if new.exists():
            rows += json.loads(new.read_text())
        if rows:
            text += [f"### {name}", preset.source + ".", f"`python -m lab.presets {name}`"]
            text += [presets.text(rows)]
    return "\n\n".join(text)


def in_columns(row, published):
    """A stored row of an older version as lab.presets writes them: it clipped proximal terms."""
    column = f"{row['alpha']:g}"
    changed = {} if row["lr_decay"] == 1 else {"lr_decay": row["lr_decay"]}
    changed |= {"prox_clip": True} if row["algo"] == "fedsmoo" else {}
    printed = published[row["algo"]][column]
    return row | {"column": column, "changed": changed, "published": printed}


# ------------------------------------------------------------------------------------- all of it


def signs_text(found):
    """Whether largest eigenvalue and largest |eigenvalue| can differ in the stored rows."""
    rows = [row for _, part, _ in found.values() for row in part["rows"] if "eigenvalue" in row]
    seen = [row["eigenvalue"] for row in rows]
    seen += [x["eigenvalue"] for row in rows for x in row["log"] if "eigenvalue" in x]
    negative = sum(value < 0 for value in seen)
    return f"{len(seen)} eigenvalues are stored; {negative} of them are negative."


def written(results):
    """The pages in results/: {file name: text}."""
    found, prose = {}, notes()
    for name, (claim, part) in claims.stored_claims(results).items():
        tables = claims.tables(claim, part).items()
        found[name] = claim, part, {t: (table, *claims.judged(claim, table)) for t, table in tables}
    if not found:
        raise ValueError(f"{results} holds no rows; python -m lab.claims NAME writes them")
    pages = {f"{name}.md": numbers(*of) for name, of in found.items()}
    parts = [prose["top"], summary(found), prose["how"]]
    parts += ["![all arms](overview.png)", "![two landscapes](landscape.png)", prose["landscape"]]
    parts += [section(claim, outcomes, prose) for claim, _, outcomes in found.values()]
    parts += ["## pooled", prose["pooled"], pooled_text(found)]
    if (results / "tuned.json").exists():
        parts += ["## tuned", prose["tuned"], "[All searches](tuned.md)."]
        pages["tuned.md"] = f"# What was tuned\n\n{tune.text(results / 'tuned.json')}\n"
    if (results / "mild.json").exists():
        table = mild_table(results)
        parts += ["## mild", verdicts.arms_text(table, MILD), filled(prose["mild"], table)]
    if (results / "asides.json").exists():
        table = asides_table(results)
        mine = table[table.arm.str.contains("--")]
        parts += ["## asides", verdicts.arms_text(mine, ASIDES), filled(prose["asides"], table)]
    published = published_text(results)
    if published:
        parts += ["## published", prose["published"], published]
    parts += ["## rows", signs_text(found), prose["rows"]]
    return pages | {"README.md": "\n\n".join(parts) + "\n"}


ASIDES = ("accuracy", "val_accuracy", "test_loss", "eigenvalue", "mb_up", "mb_down")
MILD = ("accuracy", "test_loss", "val_accuracy", "eigenvalue", "mb_up", "mb_down", "seconds")


def draw_all(results):
    """All figures of the stored rows: the paths that were written."""
    found, paths = {}, []
    for name, (claim, part) in claims.stored_claims(results).items():
        claims.draw(claim, part)
        for task, table in claims.tables(claim, part).items():
            paths.append(results / figures.file_name(name, task))
            found[f"{name} {task}".strip()] = claim, table
    if found:
        figures.draw_overview(results / "overview.png", found)
        paths.append(results / "overview.png")
    if {"whose", "overfit"} <= set(found):
        wall.draw_wall(results / "wall.png", found, filled)
        paths.append(results / "wall.png")
    if "sharpness" in found and "plane" in found["sharpness"][1]:
        arms = ("Dir 0.1, none", "Dir 0.1, top 1 %")
        figures.landscapes_of_rows(results / "landscape.png", found["sharpness"][1], arms)
        paths.append(results / "landscape.png")
    return paths


def main(argv=None):
    """The command: exit code 0 or 2."""
    p = run.Parser(prog="python -m lab.report", description=__doc__.split("\n")[0])
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--draw", action="store_true", default=False, help="all figures, too")
    try:
        given = p.parse_args(argv)
        results = given.results
        pages = written(results)
    except (ValueError, OSError) as error:
        print(f"lab.report: {error}", file=sys.stderr)
        return 2
    for name, text in pages.items():
        run.write(results / name, text)
    paths = [results / name for name in pages] + (draw_all(results) if given.draw else [])
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
