"""Claims, each as an experiment whose rules were written before its runs: the command.

    python -m lab.claims accuracy --size quick | cpu | gpu
    python -m lab.claims skew --tune               first, for a claim with settings of its own

quick says whether it works; cpu takes about half an hour on two cores, and default, skew, whose
and overfit some hours; gpu is the full form. --seeds 1 makes fewer seeds; --only "Dir 0.1|IID"
makes only the arms whose labels begin so, and keeps the stored rows of the others; claims of which
no part can be judged refuse it. The command may be stopped and given again, and given twice at once
to share the runs (study.py). It writes results/NAME.json and NAME.png and prints the table, all
comparisons, and the verdict (verdicts.py); `python -m lab.report` writes the pages in results/.

    default      the table of the README: every method with settings of its own
    untuned      the same job with lr 0.1, nothing tuned
    sharpness    compression makes the global landscape sharper, more so when clients differ
    compressed   the same with one class per client
    remedy       where compression sharpens, does FedSynSAM help?
    levels       fewer bytes than one bit costs, with a learning rate of its own
    alignment    own gradient and last update mis-estimate the global one, synthetic data do not
    learnt       the same, beside images that were never learnt
    trajectory   why so little is learnt with one bit and one class per client
    accuracy     under compression FedSynSAM generalises better than its rivals
    hyper        FedSynSAM is robust to its settings
    fedsynth     synthetic data are worth their bytes, against random masking
    gradalign    displacement makes clients' gradients agree and helps accuracy
    man          penalising activation norms lowers the top eigenvalue and raises accuracy
    oracle       how much is there to gain from the true global direction?
    skew         what each ascent direction gains over FedAvg, as the clients differ more
    whose        whose gradient, or which batch? Trial directions in the job of default
    means        FedSynSAM with mean images of each class in place of learnt ones
    corrected    the same directions on top of drift correction, at one class per client
    overfit      the same directions where training overfits, on photographs
    again        some of these with other seeds
    cifar        six of these with all 50,000 images of CIFAR-10, for a GPU
    photographs  where compression sharpens there
    descent      the synthetic gradient in the descent, too, in the job of untuned
    radius       that job with a radius of its own for each direction

claim.py says what a claim is made of; the claims of papers stand in papers.py, those of this
project in ours.py and onebit.py.
"""

import sys
from pathlib import Path

import run
from lab import figures, means, onebit, ours, papers, study, tune, verdicts
from plumbing.settings import HERE

KINDS = (onebit.Default, onebit.Untuned, papers.Sharpness, onebit.Compressed, onebit.Remedy)
KINDS += (onebit.Levels, papers.Alignment, ours.Learnt, ours.Trajectory)
KINDS += (papers.Accuracy, papers.Hyper, papers.FedSynth, papers.GradAlign, papers.Man)
KINDS += (ours.Oracle, ours.Skew, onebit.Whose, means.Means, ours.Corrected, ours.Overfit)
KINDS += (ours.Again, onebit.Photographs, ours.Cifar, onebit.Descent)
KINDS += (onebit.Radius,)
CLAIMS = {kind.__name__.lower(): kind for kind in KINDS}


def tables(claim, part):
    """The tables of a stored size: {task: DataFrame with all that the rules need}."""
    table = study.frame(part["rows"], part["defaults"])
    return {task: claim.derive(rows) for task, rows in table.groupby("task", sort=False)}


def judged(claim, table):
    """The comparisons of a claim, and its verdict: (DataFrame, word)."""
    found = verdicts.compare(table, claim.comparisons(table))
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
    """Write results/NAME.json -> the part of this size. A row has the number of its machine."""
    part = {"claim": claim.says, "source": claim.source, "refuted_by": claim.refuted}
    part |= {"command": claim.command, "machines": [], "defaults": run.resolve()}
    path = claim.results / f"{claim.name}.json"
    with study.locked(path):
        claim.check()  # again: another command may have stored rows in the meantime
        kept = claim.kept()
        before = claim.stored()["machines"] if kept else []
        of_kept = [before[row["machine"]] if "machine" in row else None for row in kept]
        found = [row.get("machine") for row in rows] + of_kept  # older rows do not say it
        seen = [machine for machine in found + before if machine]
        part["machines"] = [m for n, m in enumerate(seen) if m not in seen[:n]]
        places = [{"machine": part["machines"].index(m)} if m else {} for m in found]
        rows = [row | place for row, place in zip(rows + kept, places)]
        part["rows"] = in_order(claim, rows)
        study.store(path, claim.size, part)
    return part


def in_order(claim, rows):
    """Rows seed by seed, each with the arms in the order of the claim."""
    places = {arm: n for task in claim.tasks() for n, arm in enumerate(claim.arms(task))}
    return sorted(rows, key=lambda row: (row["seed"], places.get(row["arm"], len(places))))


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
    """Do the searches of a claim, print the winners: exit code 0."""
    searches = {
        place: what
        for place, what in claim.searches().items()
        if claim.only.match(", ".join(place)) or claim.only.match(place[1])
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
    """The command: exit code 0, 1 if all runs of a search diverged, 2, or 130 if interrupted."""
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
        if given.seeds and given.tune:
            raise ValueError("--seeds is for runs; a search has seeds of its own")
        claim = CLAIMS[given.name](given.size, given.results, given.seeds, given.only)
        task = tuned if given.tune else conducted
        return task(claim, given.out, given.threads)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lab.claims: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("lab.claims: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
