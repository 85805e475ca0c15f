"""Parts of a run and their settings: found by name, checked, and made into flags.

A part is a method, a compressor, a network or a split: a class or a function that declares its
settings as `name: Annotated[type, "meaning", lowest, highest] = default`, as a class attribute or
as a keyword parameter. They are declared nowhere else; `settings_of` reads them. Nobody needs to
understand this file to understand a method.
"""

import argparse
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch

import fl
from scale.machine import MACHINE

HERE = Path(__file__).parents[1]


TAKEN = ("list", "resume", "seeds", "name", "out", "quick", "help", "folder", "watch")
TAKEN += tuple(name for name, x in vars(fl.FedAvg).items() if callable(x))  # the hooks


class Setting(NamedTuple):
    """A declared setting. lowest and highest are legal; None is no limit."""

    type: type
    meaning: str
    lowest: float | None
    highest: float | None
    default: object


def settings_of(part):
    """The settings that a class (with its parents) or a function declares: {name: Setting}."""
    hints = get_type_hints(part, include_extras=True)
    if inspect.isclass(part):
        hints |= get_type_hints(part.__init__, include_extras=True)
    parameters = inspect.signature(part).parameters
    settings = {}
    for name, hint in hints.items():
        if get_origin(hint) is Annotated:
            meaning, lowest, highest = (*hint.__metadata__, None, None)[:3]
            nothing = inspect.Parameter.empty
            default = (
                parameters[name].default if name in parameters else getattr(part, name, nothing)
            )
            kind, words = hint.__origin__, get_args(hint.__origin__)
            where = f"the setting {name} of {part.__name__}"
            if default is nothing:
                raise ValueError(f"{where} has no default")
            if kind not in (int, float, bool, str) and {type(x) for x in words} != {str}:
                raise ValueError(f"{where} is no int, float, bool, str or Literal of words")
            if name in TAKEN or name.startswith("_"):
                raise ValueError(f"{where} has a name that is taken; rename it")
            settings[name] = Setting(kind, meaning, lowest, highest, default)
    return settings


def check(name, value, setting):
    """The value, in the type of the setting; ValueError if it is not legal."""
    kind, _, lowest, highest, _ = setting
    value = value.item() if isinstance(value, np.generic) else value
    words = get_args(kind)  # of a Literal
    if words and value not in words:
        raise ValueError(f"{name} = {value!r} is unknown; {closest(value, words)}")
    if kind is float and type(value) is int and abs(value) < 1e30:
        value = float(value)
    if not words and type(value) is not kind:
        raise ValueError(f"{name} = {value!r} is no {kind.__name__}")
    if kind in (int, float):
        low = -1e30 if lowest is None else lowest
        high = {int: 2**31, float: 1e30}[kind] if highest is None else highest
        if not low <= value <= high:  # written so, it refuses nan too
            bounded = highest is not None or value > high
            legal = f"in {low:g}..{high:g}" if bounded else f"at least {low:g}"
            raise ValueError(f"{name} = {value} is out of range; it must be {legal}")
    return value


def changes_seconds(name):
    """Is this a setting that changes seconds and not the experiment?"""
    return any(name in settings_of(part) for part in MACHINE)


def tenth(settings, given=()):
    """What a small version of the job changes; settings that were given stay."""
    least = {"rounds": 3, "warmup": 2, "outer_steps": 5, "fs_steps": 5, "measure_images": 100}
    least |= {"swa_start": 0}
    small = {"last": 1} | {
        name: max(low, round(settings[name] / 10))
        for name, low in least.items()
        if name in settings
    }
    rounds = settings["rounds"] if "rounds" in given else small["rounds"]
    if "swa_start" in settings:
        small["swa_start"] = min(small["swa_start"], rounds - 1)
    if "warmup" in settings:
        shortest = settings["window"] if "window" in given else 1
        small["warmup"] = min(max(small["warmup"], shortest), max(1, rounds - 1))
        small["window"] = min(settings["window"], small["warmup"])
        small["resynthesize"] = math.ceil(settings["resynthesize"] / 10)
    return {name: value for name, value in small.items() if name not in given}


def closest(word, known):
    """A hint for a word that is not among the known ones: the most similar ones, or all."""
    return similar(word, known) or f"known: {', '.join(known)}"


def similar(word, known):
    """A hint that names the known words that are most similar, or nothing."""
    near = difflib.get_close_matches(str(word).lower(), known, 3, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""


PLACES = {
    "algo": ("fl", "methods"),
    "compress": ("compress", "codes"),
    "model": ("vision.models",),
    "partition": ("vision.split",),
}


NEEDS = {
    "algo": "a method derives from fl.FedAvg or from another method",
    "compress": "a compressor is a class with encode and decode",
    "model": "a network is a torch.nn.Module whose constructor takes image_shape and classes",
    "partition": "a split is a function whose arguments begin with labels, N, rng",
}


def is_part(kind, thing):
    """Is this member of a module a method, a compressor, a network or a split?"""
    if kind == "partition":
        first = ["labels", "N", "rng"]
        return inspect.isfunction(thing) and [*inspect.signature(thing).parameters][:3] == first
    if not inspect.isclass(thing):
        return False
    if kind == "model":
        network = issubclass(thing, torch.nn.Module)
        return network and "image_shape" in inspect.signature(thing).parameters
    if kind == "algo":
        return issubclass(thing, fl.FedAvg)
    return hasattr(thing, "encode") and hasattr(thing, "decode")


def name_of(part):
    """The name of a part on the command line: FedLESAM_S is fedlesam-s."""
    return part.__name__.lower().replace("_", "-")


def short(name):
    """The name of a method without the files it stands in: a+b.py:B becomes a+B."""
    return "+".join(word.rpartition(":")[2] for word in name.split("+"))


@functools.cache
def parts(kind):
    """All parts of a kind ("algo", "compress", "model", "partition"): {name: class or function}."""
    found = {}
    for place in PLACES[kind]:
        files = sorted((HERE / place).glob("[!_]*.py"))
        for module in [f"{place}.{file.stem}" for file in files] or [place]:
            for thing in vars(importlib.import_module(module)).values():
                if getattr(thing, "__module__", None) == module and is_part(kind, thing):
                    found[name_of(thing)] = thing
    return found


def find(kind, name):
    """A part: itself, by its name, as FILE.py:NAME, or two methods combined as NAME+NAME."""
    if callable(name):
        if not is_part(kind, name):
            raise ValueError(f"{name} is no {kind}; {NEEDS[kind]}")
        return name
    if not isinstance(name, str):
        raise ValueError(f"{kind} = {name!r}: a run has one, a name or a class")
    if kind == "algo" and "+" in name:
        return combined(name)
    path, colon, member = name.rpartition(":")
    if name.endswith(".py"):
        raise ValueError(f"{name} is a file; say which {kind} in it, as in {name}:NAME")
    if colon:
        return from_file(kind, Path(path), member)
    known = parts(kind)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, known)} (or FILE.py:NAME)")
    return known[name]


def combined(name):
    """The class NAME+NAME, whose parents are these methods."""
    parents = tuple(find("algo", word) for word in name.split("+"))
    one_meaning(name, parents)
    try:
        return type(name, parents, {})
    except TypeError:  # of several kinds, and in several lines
        message = "cannot be combined: one of them is there twice, or is a parent of a later one"
        raise ValueError(f"{name} {message}") from None


def one_meaning(name, parents):
    """ValueError if two of these methods call different settings by one name."""
    declared = {}  # setting -> the class that declares it
    for part in (part for parent in parents for part in parent.__mro__):
        for setting in inspect.get_annotations(part):
            first = declared.setdefault(setting, part)
            related = issubclass(first, part) or issubclass(part, first)
            if not related and meaning_of(setting, first) != meaning_of(setting, part):
                both = f"{name_of(first)} and {name_of(part)} both have a setting {setting}"
                raise ValueError(f"{name}: {both}, of two meanings; rename one of them")


def meaning_of(name, part):
    """What a setting of a part means, or None if it is none."""
    setting = settings_of(part).get(name)
    return setting and setting.meaning


def from_file(kind, path, member):
    """The part called `member` in a file of the reader's own."""
    if path.suffix != ".py" or not path.is_file():
        meant = f"; did you mean {path}.py:{member}?" if Path(f"{path}.py").is_file() else ""
        raise ValueError(f"there is no file {path} of Python code{meant}")
    label = "reader_" + path.stem  # a file called sam.py must not replace ours
    text, loaded = path.read_bytes(), sys.modules.get(label)
    if loaded is None or loaded.text != text:  # otherwise its classes must stay the same objects
        loaded = import_file(label, path)
        loaded.text = text
    found = {n: x for n, x in vars(loaded).items() if not n.startswith("_") and is_part(kind, x)}
    if member not in found:
        hint = NEEDS[kind] if hasattr(loaded, member) or not found else closest(member, found)
        raise ValueError(f"{path}:{member} is no {kind}; {hint}")
    return found[member]


def import_file(label, path):
    """The module in a file, under another name."""
    spec = importlib.util.spec_from_file_location(label, path.absolute())
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # now, since a dataclass looks itself up there
    sys.path.append(str(path.absolute().parent))  # for other files beside it; ours come first
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[label]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
        where = f" (line {lines[-1]})" if lines else ""  # a SyntaxError says it itself
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} does not import: {what}{where}") from error
    return module


def who_has(name, known):
    """A hint about a setting that this run has not: which parts have it, or a similar name."""
    for other in (name.replace("_", "-"), name.replace("-", "_")):
        if other in known:
            return f"did you mean {other}?"
    name, having = name.replace("-", "_"), []
    for kind in PLACES:
        for label, part in parts(kind).items():
            if name in settings_of(part):
                having.append(f"{kind} {label}")
    if having:
        return f"it belongs to {', '.join(having)}"
    known = [label.replace("_", "-") for label in known if label]
    meant = [label for label in known if name in label.split("-")]
    words = f" {name.replace('_', ' ')} "
    meant += [label for label, meaning in meanings().items() if words in f" {meaning} "]
    if meant:
        return f"did you mean {' or '.join(meant[:3])}?"
    return similar(name, sorted(known)) or "run.py --help lists the settings"


def meanings():
    """What the settings of all parts mean: {name: meaning}."""
    every = [part for kind in PLACES for part in parts(kind).values()]
    pairs = [item for part in every for item in settings_of(part).items()]
    return {name.replace("_", "-"): setting.meaning for name, setting in pairs}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError that names the closest flag."""

    def __init__(self, **more):
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **more)

    def error(self, message):
        known = [flag[2:] for action in self._actions for flag in action.option_strings]
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        if unknown.startswith("-"):  # another word, as "true" behind a switch, is no flag
            hint = who_has(unknown.lstrip("-"), known)
            message = f"{unknown.removeprefix('--')} is no setting of this run; {hint}"
        for action in self._actions:
            if message == f"argument {'/'.join(action.option_strings)}: expected one argument":
                message = f"{action.option_strings[0]} needs a value: {action.metavar}"
        raise ValueError(message)


def add_flag(group, name, setting):
    """The flag --NAME of a setting."""
    flag, text = "--" + name.replace("_", "-"), f"{setting.meaning} (default {setting.default})"
    words, text = get_args(setting.type), text.replace("%", "%%")
    if setting.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif words:
        group.add_argument(flag, metavar="|".join(words), help=text)
    else:
        group.add_argument(flag, type=setting.type, metavar=setting.type.__name__, help=text)
