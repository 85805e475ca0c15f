"""What the user of run.py sees: the card of a run, the table of a comparison, a line for an error.

Whatever happens to the terminal (a closed pipe, a full disk), the run goes on.
"""

import contextlib
import inspect
import json
import os
import statistics
import sys
import textwrap
import traceback

from plumbing.folder import first_rank
from plumbing.settings import HERE, PLACES, changes_seconds, parts, settings_of

SHOWN = {  # on the card and in the table: key of the result, factor, digits
    "test accuracy %": ("test_acc", 100, 2),
    "test loss": ("test_loss", 1, 3),
    "training loss": ("train_loss", 1, 3),
    "top eigenvalue": ("eigenvalue", 1, 1),
    "MB up": ("up", 1e-6, 2),
    "MB down": ("down", 1e-6, 2),
    "seconds": ("seconds", 1, 0),
}


def card(result, settings, folder):
    """The result of a run with these settings as text."""
    shown = {n: f"{f * result[key]:.{digits}f}" for n, (key, f, digits) in SHOWN.items()}
    rounds = result["averaged"]
    averaged = f"round {rounds[0]}"
    if len(rounds) > 1:
        averaged = f"mean of {len(rounds)} evaluations, rounds {rounds[0]} to {rounds[-1]}"
    shown["test accuracy %"] += f"   ({averaged})"
    shown["MB up"] += f"   ({result['bits']:.2f} bits a parameter, client and round)"
    if result["matching_loss"] is not None:
        shown["matching loss"] = f"{result['matching_loss']:.3f}   (1: nothing learnt, 0: all)"
    beside = stored_beside(settings)
    if beside:
        words = ", ".join(f"{algo}~{100 * x:.1f}" for algo, x in beside.items())
        lines = textwrap.wrap(words, 62)
        shown["tuned, 5 seeds"] = ("\n" + 18 * " ").join(lines).replace("~", " ")
    shown |= {"settings": result["settings"], "folder": folder}
    title = f"--- {result['algo']}, seed {result['seed']}, d = {result['d']:,} "
    return "\n".join([title.ljust(80, "-"), *(f"{n:>16}  {text}" for n, text in shown.items())])


def stored_beside(settings, path=HERE / "results" / "default.json"):
    """Mean test accuracies in the README's table, tuned, if these settings are those of its job."""
    stored = json.loads(path.read_text()).get("cpu") if path.exists() else None
    if not stored:
        return {}
    job = stored["defaults"] | {name: settings[name] for name in ("algo", "seed")}
    if any(settings.get(k, x) != x for k, x in job.items() if not changes_seconds(k)):
        return {}
    rows = [r for r in stored["rows"] if r["arm"] == r.get("algo")]  # others: another uplink
    algos = dict.fromkeys(r["algo"] for r in rows)
    return {x: statistics.fmean(r["test_acc"] for r in rows if r["algo"] == x) for x in algos}


def table(arms):
    """Markdown: a line for each arm {name: results}, mean ± standard deviation over its seeds."""
    lines = ["| method | " + " | ".join(SHOWN) + " | runs |", "| --- " * (len(SHOWN) + 2) + "|"]
    for arm, runs in arms.items():
        cells = []
        for key, factor, digits in SHOWN.values():
            values = [factor * r[key] for r in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(runs) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def listing():
    """All parts, with the first paragraph about each."""
    lines = []
    for kind in PLACES:
        lines += ["", f"{kind}:"]
        for name, part in parts(kind).items():
            first = (inspect.getdoc(part) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"  {name:20} {first}")
    return "\n".join(lines[1:])


def say(text, file=None):
    """Print. If nobody can receive it (a closed pipe, a full disk), the work goes on.

    A letter that the terminal does not know becomes a question mark.
    """
    file = file or sys.stdout
    letters = file.encoding or "utf-8"
    try:
        print(text.encode(letters, "replace").decode(letters), file=file, flush=True)
    except OSError:  # Python tries once more at the end, and then it must work
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def complain(text):
    """One line for the user."""
    if first_rank():
        say("run.py: " + " ".join(str(text).split()), sys.stderr)


def place_of(error):
    """Where Python found an error, for a reader whose own code may be to blame; else nothing."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
    own = any(name.startswith("reader_") for name in sys.modules)  # from_file of settings.py
    if not own or frame.line.startswith("raise "):  # an error that we wrote says enough
        return ""
    notes = "\n".join(getattr(error, "__notes__", ()))  # by another process: scale/visits.py
    there = [line.strip() for line in notes.splitlines() if line.lstrip().startswith("File ")]
    return f" ({there[-1] if there else place})"


@contextlib.contextmanager
def explained(owners, settings):
    """If a number stops being finite, say also which float settings are not the defaults.

    A CPU without memory becomes MemoryError, as a GPU without memory is torch.OutOfMemoryError.
    """
    try:
        yield
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError(str(error).partition("DefaultCPUAllocator: ")[2]) from None
        raise
    except FloatingPointError as error:
        declared = [item for part in owners for item in settings_of(part).items()]
        floats = {name for name, s in declared if s.type is float and settings[name] != s.default}
        chosen = ", ".join(f"{name} = {settings[name]:g}" for name in sorted(floats))
        more = f"not the defaults: {chosen}" if chosen else "try a smaller lr"
        raise FloatingPointError(f"{error}; {more}") from None
