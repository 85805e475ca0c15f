"""The grader: pytest, over the theorems, with a student's module as the module under test.

    python -m classroom.exercises                     your exercises.py
    python -m classroom.exercises topk qsgd           some exercises
    python -m classroom.exercises --board             the board of the open exercise
    python -m classroom.exercises --handout DIR       the folder for students
    python -m classroom.exercises --grade DIR         a table, one line a hand-in
    python -m classroom.exercises --gradescope FILE   FILE.zip: the autograder for Gradescope;
                                                      FILE.json with --grade: its results.json

Hand-ins are DIR/NAME.py, or DIR/NAME/.../exercises.py.

How strangers' code is run. All hand-ins are read before the first one runs. Each is graded in a
process of its own, in a new folder with its own copy of the theorems and of the book with holes,
with a clean environment, a time limit for each test (pytest-timeout) and one for the whole. Where
Linux has Landlock (jail.py), it can write into that folder only, and cannot read this one. What the
grader believes are lines that begin with a token, which is drawn anew for each process and which
the student's code is not told. If a process dies, the exercise that it was in has failed, and a new
process does the others. At the end nonsense is put through the same theorems: if it passes, they
have been changed, and nothing counts.

What this does not protect against: code that searches the memory of its own process, where theorems
and token must be; without Landlock, code that writes to other files of yours; with it, still UDP,
and reading what Python and the system have installed. Use a container if you must be sure.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from classroom import handout, jail
from classroom.handout import EXERCISES, ROOT

NOT_YET, PASSED, FAILED = "not yet", "passed", "failed"


class Result(NamedTuple):
    """Of an exercise: outcome "not yet", "passed" or "failed", and what there is to say."""

    outcome: str
    message: str = ""


# -------------------------------------------------- in the process that runs the student's code


class Plugin:
    """Pytest's side of the grader: the module under test, and a line about every test."""

    def __init__(self, module, wanted, tell):
        self.module, self.wanted, self.tell, self.failed = module, wanted, tell, set()

    @pytest.fixture
    def m(self):
        """The module under test."""
        return self.module

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if exercise_of(item.name) in self.wanted]

    def pytest_runtest_setup(self, item):
        exercise = exercise_of(item.name)
        if exercise in self.failed:
            pytest.skip("a test of this exercise has failed already")
        self.tell(begin=exercise)

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call":
            exercise, problem = exercise_of(item.name), call.excinfo
            if problem:
                self.failed.add(exercise)
                self.tell(exercise=exercise, **said(problem.value, item.obj.__doc__))
            else:
                self.tell(exercise=exercise, outcome=PASSED)


def exercise_of(test):
    """topk, of test_topk_small."""
    return test.split("_")[1]


def said(error, theorem):
    """What to tell about an error in a test: {outcome, message}."""
    if isinstance(error, NotImplementedError):
        return {"outcome": NOT_YET, "message": str(error)}
    first = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    shown = "\n".join(first.strip().splitlines()[:12])[:1500] + line_of(error)
    return {"outcome": FAILED, "message": f"{theorem}\n{shown}"}


def line_of(error):
    """The line of exercises.py that an error came from; nothing if a theorem found it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == "exercises.py"]
    return f"\n(exercises.py, line {lines[-1]})" if lines else ""


def child(folder):
    """Grade classroom/exercises.py of a folder; the job is a line of standard input."""
    job = json.loads(sys.stdin.readline())
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(folder)

    def tell(**event):
        print(job["token"], json.dumps(event), file=pipe, flush=True)

    from classroom import theorems  # before the student's code

    before = fingerprint(theorems)
    with contextlib.suppress(jail.Unavailable):
        jail.lock(folder)
        tell(locked=True)
    module = student_module(tell)
    if module is not None:
        plugin = Plugin(module, job["exercises"], tell)
        options = ["-c", os.devnull, "--rootdir", folder, "--confcutdir", folder]
        options += ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--assert=plain"]
        options += [f"--timeout={job['test_seconds']}"]
        pytest.main([*options, theorems.__file__], plugins=[plugin])
        tell(tampered=tampered(theorems, before))
    pipe.flush()
    os._exit(0)  # nothing that the student left behind runs at the exit


def student_module(tell):
    """The module under test, or None if it does not import."""
    try:
        import classroom.exercises
    except BaseException as error:
        name = type(error).__name__
        tell(broken=f"exercises.py does not import: {name}: {error}"[:500])
        return None
    tell(imported=True)
    return classroom.exercises


def fingerprint(theorems):
    """What the theorems are made of: {name: (object, its code)}."""
    return {name: (x, getattr(x, "__code__", None)) for name, x in vars(theorems).items()}


def tampered(theorems, before):
    """Has somebody changed the theorems, or what they stand on, so that nonsense passes?"""
    after = fingerprint(theorems)
    changed = [n for n, (x, code) in before.items() if after.get(n, (None, None))[0] is not x]
    changed += [n for n, (x, code) in before.items() if getattr(x, "__code__", None) is not code]
    zero = theorems.torch.zeros((), dtype=theorems.f64)
    nonsense = SimpleNamespace(
        perturb=lambda w, u, rho: w,
        mean_square=lambda a: a.new_zeros(len(a)),
        matching_loss=lambda *_: zero,
        largest_eigenvalue=lambda *_, **__: 0.0,
    )
    names = ("perturb_small", "perturb_distance", "man_small", "unroll_matching", "lanczos_small")
    passed = [name for name in names if passes(getattr(theorems, f"test_{name}"), nonsense)]
    passed += ["near"] if passes(lambda _: theorems.near(1.0, 2.0, 0.1, ""), None) else []
    return changed + passed


def passes(theorem, module):
    """Does a module pass a theorem?"""
    try:
        theorem(module)
    except BaseException:
        return False
    return True


# --------------------------------------------------------------------------- in the grader itself

START = (
    "import sys; sys.dont_write_bytecode = True; folder = sys.argv[1]; sys.path.insert(0, folder); "
    "from classroom import grader; getattr(grader, sys.argv[2])(folder)"
)
KEPT = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "LD_LIBRARY_PATH")  # of the environment


def spawn(folder, entry, job, seconds):
    """Run a function of this file in a process of its own: (its lines, did it end in time?)."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", START, folder, entry],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        **{"cwd": folder, "env": environment, "text": True, "errors": "replace"},
        start_new_session=True,
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(bounded(process.stdout)), daemon=True)
    reader.start()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.close()
    in_time = True
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    kill(process)
    reader.join(2)
    return lines, in_time


def bounded(stream, most=20_000):
    """The lines of a stream; what comes after `most` lines is read and thrown away."""
    for n, line in enumerate(stream):
        if n < most:
            yield line


def kill(process):
    """End a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def events(lines, token):
    """What the process said. A line without the token is the student's, and is ignored."""
    for line in lines:
        head, _, rest = line.partition(" ")
        if head == token:
            with contextlib.suppress(ValueError):
                yield json.loads(rest, object_hook=printable)


def printable(event):
    """An event whose texts hold nothing that could steer a terminal."""

    def clean(text):
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)

    return {name: clean(x) if isinstance(x, str) else x for name, x in event.items()}


def grade(text, files, exercises=tuple(EXERCISES), seconds=120, test_seconds=10):
    """Grade the text of an exercises.py: ({exercise: Result}, was the process locked?).

    files: handout.tree(). seconds: for the whole, which ends as well if it dies four times.
    """
    results, waiting, locked = {}, list(exercises), False
    deadline = time.monotonic() + seconds
    for _ in range(4):
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            break
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            handout.write_tree(files | {"classroom/exercises.py": text.encode()}, folder)
            token = secrets.token_hex(16)
            job = {"token": token, "exercises": waiting, "test_seconds": test_seconds}
            lines, in_time = spawn(os.path.realpath(folder), "child", job, left)
        seen = list(events(lines, token))
        locked = any("locked" in event for event in seen)
        results |= read(seen, waiting, in_time)
        waiting = [x for x in waiting if x not in results]
    late = Result(FAILED, f"not reached: {seconds:g} seconds or four processes were used up")
    return {x: results.get(x, late) for x in exercises}, locked


def read(seen, waiting, in_time):
    """What the events of a process say of the exercises that waited: {exercise: Result}."""
    broken = next((event["broken"] for event in seen if "broken" in event), None)
    if broken or not any("imported" in event for event in seen):
        silent = "importing exercises.py " + ("ended the process" if in_time else "does not end")
        return {x: Result(FAILED, broken or silent) for x in waiting}
    results = {}
    for exercise in waiting:
        mine = [event for event in seen if event.get("exercise") == exercise]
        bad = next((event for event in mine if event["outcome"] != PASSED), None)
        if bad:
            results[exercise] = Result(bad["outcome"], bad["message"])
        elif len(mine) == theorems_of(exercise):
            results[exercise] = Result(PASSED, f"{len(mine)} properties")
    tampered = next((event["tampered"] for event in seen if "tampered" in event), None)
    if tampered is None:
        begun = [event["begin"] for event in seen if "begin" in event]
        died = "the process was ended" if in_time else "it does not end"
        if begun and results.get(begun[-1], Result(FAILED)).outcome != NOT_YET:
            results[begun[-1]] = Result(FAILED, f"{died} while this exercise was checked")
        return results
    wrong = Result(FAILED, f"the theorems were tampered with: {', '.join(tampered)[:200]}")
    return {x: wrong for x in waiting} if tampered else results


def theorems_of(exercise):
    """The number of theorems of an exercise."""
    text = (ROOT / "classroom" / "theorems.py").read_text()
    return text.count(f"\ndef test_{exercise}_")


# ---------------------------------------------------------------------------------- many hand-ins


def hand_ins(folder):
    """The hand-ins of a folder: {name: text, or None if there is no file}."""
    found = {}
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix == ".py":
            found[path.stem] = path.read_text(errors="replace")
        elif path.is_dir():
            files = sorted(path.rglob("exercises.py")) or sorted(path.rglob("*.py"))
            found[path.name] = files[0].read_text(errors="replace") if files else None
    return found


def grade_all(folder, exercises, seconds, say=print):
    """Grade a folder of hand-ins and print a line for each: {name: {exercise: Result}}."""
    texts, files, table = hand_ins(folder), handout.tree(data=False), {}
    if not texts:
        raise ValueError(f"{folder} holds no hand-ins: no NAME.py, and no NAME/exercises.py")
    wide = max(map(len, texts)) + 2
    say(" " * wide + " ".join(f"{x[:8]:>8}" for x in exercises) + "   score")
    for name, text in texts.items():
        if text is None:
            results, locked = {x: Result(FAILED, "no file was handed in") for x in exercises}, True
        else:
            results, locked = grade(text, files, exercises, seconds)
        table[name] = results
        say(line(name.ljust(wide), results))
        if not locked and jail.version():
            say(f"{'':{wide}}(this process did not lock itself)")
    if not jail.version():
        say("Landlock is not available: the hand-ins could write to your files.")
    return table


def line(name, results):
    """A student's line of the table."""
    marks = {PASSED: "ok", NOT_YET: "-", FAILED: "wrong"}
    score = sum(r.outcome == PASSED for r in results.values())
    cells = " ".join(f"{marks[r.outcome]:>8}" for r in results.values())
    messages = {r.message for r in results.values() if r.outcome == FAILED}
    lines = messages.pop().splitlines() if len(messages) == 1 else [""]
    alone = "   " + lines[min(1, len(lines) - 1)][:60]
    return f"{name}{cells}   {score:2}/{len(results)}{alone}".rstrip()


# ------------------------------------------------------------------------------------- Gradescope

SETUP = """#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
cd /autograder/source
/autograder/venv/bin/pip install -r requirements.txt -r classroom/requirements.txt
"""
RUN = """#!/usr/bin/env bash
cd /autograder/source
/autograder/venv/bin/python -m classroom.exercises --grade /autograder/submission \\
    --gradescope /autograder/results/results.json
"""


def gradescope_zip(path):
    """Write the autograder: its two scripts, and what a handout holds."""
    files = handout.tree(data=False) | {"setup.sh": SETUP.encode(), "run_autograder": RUN.encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            executable = name in ("setup.sh", "run_autograder")
            entry.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(entry, content)


def gradescope_results(results):
    """The content of results.json for one student."""
    tests = []
    for number, (key, result) in enumerate(results.items(), 1):
        score = 1 if result.outcome == PASSED else 0
        test = {"name": EXERCISES[key].title, "number": str(number), "max_score": 1}
        status = "passed" if score else "failed"
        tests.append(test | {"score": score, "status": status, "output": text_of(result)})
    return {"score": sum(test["score"] for test in tests), "tests": tests}


def text_of(result):
    return f"{result.outcome}: {result.message}" if result.message else result.outcome


def one_hand_in(folder):
    """The text of the only student in a folder, as Gradescope lays it out."""
    texts = {name: text for name, text in hand_ins(folder).items() if text is not None}
    wanted = [text for name, text in texts.items() if name == "exercises"] or list(texts.values())
    if len(wanted) != 1:
        raise ValueError(f"{folder} must hold one exercises.py, and holds {len(wanted)} files")
    return wanted[0]


# -------------------------------------------------------------------------------------- the command


def parser():
    import argparse

    p = argparse.ArgumentParser(prog="python -m classroom.exercises")
    p.add_argument("exercises", nargs="*", metavar="EXERCISE", help=", ".join(EXERCISES))
    p.add_argument("--file", type=Path, default=ROOT / "classroom" / "exercises.py")
    p.add_argument("--board", action="store_true", help="the board of the open exercise")
    p.add_argument("--handout", type=Path, metavar="DIR", help="write the folder for students")
    p.add_argument("--grade", type=Path, metavar="DIR", help="grade a folder of hand-ins")
    p.add_argument("--gradescope", type=Path, metavar="FILE", help="write FILE.zip or FILE.json")
    p.add_argument("--seconds", type=float, default=120, help="time limit of a hand-in")
    p.add_argument("--out", type=Path, help="with --grade: all messages as a JSON file")
    return p


def check_own(given):
    """Grade one file and say everything about it: the exit code."""
    files = handout.tree(data=False)
    results, _ = grade(given.file.read_text(), files, given.exercises, given.seconds)
    for key, result in results.items():
        first, *more = text_of(result).splitlines()
        print(f"{key:10} {first}", *(f"{'':10} {text}" for text in more), sep="\n")
    return 0 if all(r.outcome == PASSED for r in results.values()) else 1


def main(argv=None):
    """The command: exit code 0, 1 if something is not passed, 2 for wrong input."""
    given = parser().parse_args(argv)
    try:
        for name in given.exercises:
            if name not in EXERCISES:
                raise ValueError(f"there is no exercise {name!r}; known: {', '.join(EXERCISES)}")
        given.exercises = given.exercises or list(EXERCISES)
        return do(given)
    except (ValueError, OSError) as error:
        print(f"classroom: {error}", file=sys.stderr)
        return 2


def do(given):
    """What the command asks for: the exit code."""
    if given.handout:
        handout.write(given.handout)
        print(f"{given.handout} is ready; its README.md says how to begin")
    elif given.gradescope and given.gradescope.suffix == ".zip":
        gradescope_zip(given.gradescope)
    elif given.gradescope and not given.grade:
        raise ValueError("--gradescope results.json needs --grade DIR, the hand-in")
    elif given.gradescope:
        files = handout.tree(data=False)
        results, _ = grade(one_hand_in(given.grade), files, given.exercises, given.seconds)
        given.gradescope.write_text(json.dumps(gradescope_results(results), indent=1))
    elif given.grade:
        table = grade_all(given.grade, given.exercises, given.seconds)
        if given.out:
            plain = {s: {x: r._asdict() for x, r in rs.items()} for s, rs in table.items()}
            given.out.write_text(json.dumps(plain, indent=1))
    elif given.board:
        return show_board(given.file)
    else:
        return check_own(given)
    return 0


def show_board(path):
    """The board of the open exercise, for the answers in a file."""
    import importlib.util

    from classroom import board

    spec = importlib.util.spec_from_file_location("answers", path)
    answers = sys.modules["answers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    try:
        print(board.table(board.board(answers)))
    except NotImplementedError:
        needed = ", ".join([*board.NEEDED, "mine"])
        raise ValueError(f"the board needs your answers to {needed} first") from None
    return 0
