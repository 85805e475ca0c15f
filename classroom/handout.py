"""The book with holes: exercises.py is made of it, and so is the folder that students get.

An exercise is a function of the book without its body. What is asked is listed in EXERCISES, and
everything else follows from the source of the book: the stubs of exercises.py keep name, signature
and docstring, and the chapters in a handout have the same holes, so that it holds no answer.

    python -m classroom.handout                   write classroom/exercises.py anew
    python -m classroom.exercises --handout DIR   the folder for students
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HOLE = "raise NotImplementedError"


class Exercise(NamedTuple):
    """title: for people. asked: {file of the book: names that are asked}."""

    title: str
    asked: dict


EXERCISES = {
    "topk": Exercise("Top-k", {"compress.py": ["TopK.encode", "TopK.decode"]}),
    "randk": Exercise("Unbiased random-k", {"compress.py": ["RandK.encode", "RandK.decode"]}),
    "qsgd": Exercise(
        "QSGD and its variance", {"compress.py": ["QSGD.bucket_scales", "QSGD.random_levels"]}
    ),
    "feedback": Exercise("Error feedback", {"compress.py": ["with_feedback"]}),
    "perturb": Exercise("The step of SAM", {"sam.py": ["perturb"]}),
    "fedlesam": Exercise(
        "FedLESAM's direction",
        {"fl.py": ["FedLESAM.first_memory", "FedLESAM.direction", "FedLESAM.upload"]},
    ),
    "dirichlet": Exercise("The Dirichlet split", {"vision/split.py": ["dirichlet", "take_turns"]}),
    "unroll": Exercise(
        "Unrolled steps and the matching loss", {"synth.py": ["unroll", "matching_loss"]}
    ),
    "fedsynsam": Exercise(
        "FedSynSAM's direction",
        {"fl.py": ["FedSynSAM.direction", "FedSynSAM.synthetic_gradient"]},
    ),
    "gradalign": Exercise(
        "GradAlign's displacement and its regulariser",
        {
            "methods/alignment.py": ["Aligned.displacement", "GradAlign.point"],
            "lab/measures.py": ["disagreement", "client_gradient"],
        },
    ),
    "man": Exercise(
        "MAN's term", {"vision/models.py": ["mean_square"], "vision/task.py": ["Images.loss"]}
    ),
    "lanczos": Exercise("The largest eigenvalue", {"sam.py": ["largest_eigenvalue"]}),
}
HIDDEN = {
    "take_turns",
    "client_gradient",
}  # not asked: how the work is divided is up to the student
SHORT = {"Images"}  # of this class the stub holds only what is asked

# ------------------------------------------------------------------------------------ the stubs


def defined(tree, name):
    """The definition NAME or CLASS.NAME in a module."""
    for part in name.split("."):
        tree = next(x for x in tree.body if getattr(x, "name", None) == part)
    return tree


def first_line(node):
    """The line where a definition begins, decorators included, counted from 1."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def body_of(function):
    """The lines of a function's body behind its docstring: (first, last), counted from 1."""
    first = function.body[1] if ast.get_docstring(function) else function.body[0]
    header_end = function.body[0].end_lineno if ast.get_docstring(function) else None
    begin = header_end + 1 if header_end else first.lineno
    return begin, function.end_lineno


def with_holes(source, names):
    """The source of a module in which the functions NAME and CLASS.NAME have no body."""
    lines, tree = source.splitlines(), ast.parse(source)
    holes = sorted((defined(tree, name) for name in names), key=lambda f: -f.lineno)
    for function in holes:
        begin, end = body_of(function)
        lines[begin - 1 : end] = [" " * (function.col_offset + 4) + HOLE]
    return "\n".join(lines) + "\n"


def stubs(source, names, solved=False):
    """What stands in exercises.py for some names of one module: the definitions with holes."""
    names = names if solved else [name for name in names if name not in HIDDEN]
    source = source if solved else with_holes(source, names)
    lines, tree, parts = source.splitlines(), ast.parse(source), []
    for top in dict.fromkeys(name.split(".")[0] for name in names):
        node = defined(tree, top)
        text = lines[first_line(node) - 1 : node.end_lineno]
        if top in SHORT:
            text = shortened(lines, tree, top, names)
        parts.append("\n".join(text))
    return parts


def shortened(lines, tree, top, names):
    """A class that inherits all but what is asked from the book's class of the same name."""
    node = defined(tree, top)
    doc = lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    text = [f"class {top}(task.{top}):", *doc]
    for name in names:
        if name.startswith(top + "."):
            method = defined(tree, name)
            text += ["", *lines[first_line(method) - 1 : method.end_lineno]]
    return text


HEADER = '''"""Your answers. The exercises are described in exercises.md, one after the other.

    python -m classroom.exercises           check all
    python -m classroom.exercises topk      check one; its name stands above each exercise

Replace `raise NotImplementedError`. Leave names, signatures and docstrings as they are. You may add
functions and imports. This file is made by classroom/handout.py out of the chapters.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn import functional as F

import fl
import sam
import synth
from compress import count, from_bytes, pack, place_bits, seal, to_bytes, unpack, unseal
from fl import Distilling, FedAvg, FedSAM
from methods import alignment
from sam import TINY, tridiagonal, unit
from vision import data, models, task
from vision.split import Alpha, by_class

# What is imported above and not used below is for your answers.
GIVEN = (math, np, F, fl, sam, synth, alignment, data, models, count, from_bytes, pack)
GIVEN += (place_bits, seal, to_bytes, unpack, unseal, TINY, tridiagonal, unit, by_class)
'''

MORE = "import bisect\nfrom synth import synthetic_loss\n"  # what the answers of the book need

OPEN = '''
class Mine(FedSAM):
    """An ascent direction of your own, at no more bytes than FedSynSAM's."""

    def direction(self, w, batch, received, mine):
        raise NotImplementedError


if __name__ == "__main__":
    import sys

    from classroom import grader

    sys.exit(grader.main())
'''


def exercises_source(solved=False):
    """The text of exercises.py; solved: with the answers of the book, as a hand-in to grade."""
    parts = [HEADER + (MORE if solved else "")]
    for number, (key, exercise) in enumerate(EXERCISES.items(), 1):
        parts.append(f"# {number}. {exercise.title}: {key} ".ljust(100, "-"))
        for file, names in exercise.asked.items():
            parts += stubs((ROOT / file).read_text(), names, solved)
    parts += ["# 13. Open: beat the synthetic direction: mine ".ljust(100, "-"), OPEN]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


# ---------------------------------------------------------------------------------- the folder

BOOK = ["compress.py", "sam.py", "synth.py", "fl.py", "run.py"]
FOLDERS = ["vision", "methods", "codes", "scale", "plumbing"]
OTHERS = ["tests/__init__.py", "tests/toys.py", "requirements.txt", "LICENSE"]
CLASSROOM = ["__init__", "exercises", "theorems", "grader", "handout", "jail", "board"]


def tree(data=True):
    """All files of a handout: {path: bytes}. data: with the bundled images."""
    files = {}
    paths = [*BOOK, *OTHERS, *(f"classroom/{name}.py" for name in CLASSROOM)]
    paths += ["classroom/exercises.md", "classroom/requirements.txt"]
    paths += [str(p.relative_to(ROOT)) for f in FOLDERS for p in sorted((ROOT / f).glob("*.py"))]
    if data:
        paths += ["data/fashion_10k.npz", "data/fashion_10k.LICENSE.txt"]
    for path in paths:
        files[path] = (ROOT / path).read_bytes()
    for path, names in holes().items():
        if path in files:
            files[path] = with_holes(files[path].decode(), names).encode()
    return files


def holes():
    """What is asked of each file of the book: {file: names}."""
    found = {}
    for exercise in EXERCISES.values():
        for file, names in exercise.asked.items():
            found.setdefault(file, []).extend(names)
    return found


def write_tree(files, folder):
    """Write {path: bytes} into a folder."""
    for path, content in files.items():
        place = Path(folder) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


README = """# Exercises

    pip install -r requirements.txt -r classroom/requirements.txt
    python -m classroom.exercises

The first command installs what is needed. The second checks `classroom/exercises.py`, where your
answers go, and says of each exercise "not yet", "passed", or what is wrong. Start with
`classroom/exercises.md`. One exercise alone: `python -m classroom.exercises topk`.

The other files are the chapters that you read, with the answers taken out. Changes there count for
nothing: hand in `classroom/exercises.py` alone.
"""


def write(folder):
    """Write the folder for students. Raises ValueError if it is there and not empty."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose a new folder")
    write_tree(tree() | {"README.md": README.encode()}, folder)
    shutil.copymode(ROOT / "run.py", folder / "run.py")


def answered(text):
    """Which functions of exercises.py have a body in this text."""
    tree, found = ast.parse(text), []
    for name in ["Mine.direction", *(name for names in holes().values() for name in names)]:
        try:
            if HOLE not in ast.unparse(defined(tree, name)):
                found.append(name)
        except StopIteration:  # it is not there: a new exercise, or one of HIDDEN
            continue
    return found


def main(argv=None):
    """The command: exit code 0 or 2."""
    p = argparse.ArgumentParser("python -m classroom.handout", description="exercises.py anew")
    p.parse_args(argv)
    path = ROOT / "classroom" / "exercises.py"
    found = answered(path.read_text()) if path.exists() else []
    if found:
        print(f"{path} holds answers ({found[0]}); move it away first", file=sys.stderr)
        return 2
    path.write_text(exercises_source())
    return 0


if __name__ == "__main__":
    sys.exit(main())
