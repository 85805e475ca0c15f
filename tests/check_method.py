"""check_method(M): does a method, also one of your own, keep the rules of CONTRIBUTING.md?

    python -m pytest test_all.py --method mine.py:MyMethod

It runs M on a tiny classifier whose clients have unequal numbers of images and steps, with short
batches, m = 3 of N = 5 clients in a round and QSGD on the wire. Every failure says what to mend.

    names                no hook is misspelt, run.py sees every setting, and no other method keeps
                         or sends something of the same name, or has another setting of that name
    the rules            a client sees only what it received; nothing is changed in place; the names
                         in a client's memory are those of first_memory; the server keeps nothing
                         outside of self.state; "update" is the sum of the steps
    other visits         threads and ranks end with the same bits, vmap with the same numbers
    checkpoints          a run that was stopped and continued ends with the same bits
    combinations         to the left and to the right of SCAFFOLD and FedDyn: c is still the mean of
                         the c_i, and h that of the h_i
    its limit            if the class says `off = {"rho": 0.0}`, it takes with these settings the
                         steps of one of its parents, bit for bit

What it cannot see: whether the equations are those of the paper. Nor a method that is wrong in the
same way wherever it runs; nor what a client reads of the server, or of the images of others,
through an object that the method made at the start (the oracle does, on purpose).
"""

import copy
import difflib
import functools
import inspect
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, get_origin

import torch

from compress import QSGD
from fl import SCAFFOLD, FedAvg, Federation
from methods.drift import FedDyn
from plumbing.settings import one_meaning, parts
from scale.visits import Ranks, Threads, Vmap
from tests.toys import Linear, f64

SMALL = {  # so that a round takes milliseconds; a method uses those that it has
    **{"warmup": 2, "window": 2, "outer_steps": 2, "inner_steps": 2, "ipc": 1},
    **{"finetune_epochs": 2, "oracle_images": 6, "swa_start": 2},
    **{"fs_steps": 2, "fs_batches": 1, "fs_images": 1},
}
ROUNDS = 5


def check_method(M, off=None):
    """Raises AssertionError with a sentence that says which rule the method class M broke.

    off: settings with which M is one of its parents; if not given, the class attribute `off`.
    """
    check_names(M)
    check_rules(M)
    check_taken(M)
    check_threads(M)
    check_ranks(M)
    check_vmap(M)
    check_checkpoint(M)
    check_combinations(M)
    check_off(M, off or vars(M).get("off"))


# ------------------------------------------------------------------------------------------- names


def check_names(M):
    """A function whose name is nearly that of a hook is called by nobody."""
    inherited = {name: x for parent in M.__mro__[:0:-1] for name, x in vars(parent).items()}
    for name in [name for name, x in vars(M).items() if inspect.isfunction(x)]:
        if inspect.isfunction(inherited.get(name)):
            check_arguments(M, name, inherited[name])
        near = name not in inherited and difflib.get_close_matches(name, inherited, 1, 0.85)
        assert not near, f"{M.__name__}: {name} is no hook; did you mean {''.join(near)}?"
    for name, hint in inspect.get_annotations(M).items():
        if name in inherited:  # as server_lr in methods/adam.py, which is no setting any more
            continue
        ok = get_origin(hint) is Annotated and hasattr(M, name)
        how = f'{name}: Annotated[type, "meaning", lowest, highest] = default'
        assert ok, f"{M.__name__}: {name} is no setting; declare it as {how}"


def check_arguments(M, name, hook):
    """A hook is called with the arguments that its parent names."""
    ours, theirs = ([*inspect.signature(f).parameters] for f in (vars(M)[name], hook))
    words = f"{name}({', '.join(ours)}), but the hook is {name}({', '.join(theirs)})"
    assert ours[: len(theirs)] == theirs, f"{M.__name__} has {words}"


def check_taken(M):
    """What M keeps or sends has no name of another method: combined, one would lose its own."""
    for other in parts("algo").values():
        if not (issubclass(M, other) or issubclass(other, M)):
            try:
                one_meaning(M.__name__, (M, other))
            except ValueError as error:
                raise AssertionError(error) from None
            for place, names in introduced(M).items():
                both = ", ".join(sorted(names & introduced(other)[place]))
                text = f"{M.__name__}: {place} holds {both}, as that of {other.__name__} does"
                assert not both, f"{text}; combined, one would lose its own. Choose another name"


@functools.cache
def introduced(M):
    """The names that M adds to those of its parents: {place: set}."""
    parents = [names_of(P) for P in M.__mro__[1:] if issubclass(P, FedAvg)]
    return {place: x.difference(*(p[place] for p in parents)) for place, x in names_of(M).items()}


@functools.cache
def names_of(M):
    f = federation(M)
    received = f.send_down(range(1))
    memory = set(f.method.first_memory(received))
    return {"self.state": set(f.method.state), "`mine`": memory, "`received`": set(received)}


# ------------------------------------------------------------------------------------- a small run


@functools.cache
def task():
    return Linear()


def federation(M, loop=Federation, more=(), **settings):
    """A federation of the method class M on the tiny classifier; more: arguments of the loop."""
    small = {name: value for name, value in SMALL.items() if hasattr(M, name)}
    method = M(task(), seed=1, **(small | settings))
    return loop(method, QSGD(7, dtype=f64), participation=3, average="size", **dict(more))


def run(federation, rounds=ROUNDS):
    for _ in range(rounds):
        federation.round()
    return federation


def end(federation):
    """Everything that a run is, in the end."""
    f = federation
    return {
        "the model": f.w,
        "self.state": f.method.state,
        "the memory of the clients": f.memory,
        "the bytes up": f.bytes_up,
        "the bytes down": f.bytes_down,
    }


@functools.cache
def plain(M):
    """The end of the plain loop."""
    return end(run(federation(M)))


def same(a, b, equal=torch.equal):
    """Are two nested dicts, lists, tensors and numbers equal?"""
    if isinstance(a, float) and isinstance(b, float):
        a, b = torch.tensor(a, dtype=f64), torch.tensor(b, dtype=f64)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], equal) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, equal) for x, y in zip(a, b))
    return a == b


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def must_agree(M, other, how, equal=torch.equal):
    for name, x in plain(M).items():
        ok = same(x, other[name], equal)
        assert ok, f"{M.__name__}: {how}, {name} differs from that of the plain loop. {ADVICE[how]}"


ADVICE = {
    "with threads": "Two clients share something that one of them changes: keep it in `mine`.",
    "with ranks": "A client changed something that other processes do not see. What a client keeps "
    "belongs into `mine`, what the server keeps into self.state.",
    "under vmap": "There, all clients run at once, by `start`, `step` and `upload`, and batches "
    "without images are added. So change these or the hooks in them, not `train`; nothing may "
    "depend on len(batches), and a loss over rows that are all -1 must be 0.",
    "continued from a checkpoint": "What the server needs belongs into self.state, what a client "
    "needs into `mine`, and random numbers come from fl.rng(self.seed, purpose, t).",
}


# ---------------------------------------------------------------------------------------- the rules


class Hidden:
    """Stands for self.state while clients work; every use of it is an error."""

    def refuse(self, *_):
        raise AssertionError(
            "a client reads self.state, which only the server has. Send it in `broadcast` (so that "
            "its bytes count) and read it from `received`"
        )

    __getattr__ = __getitem__ = __contains__ = __iter__ = __or__ = __ror__ = __len__ = refuse


class Unchanged:
    """with Unchanged(message, thing): ...    the thing must hold the same numbers afterwards."""

    def __init__(self, message, thing):
        self.message, self.thing, self.before = message, thing, copy.deepcopy(thing)

    def __enter__(self):
        pass

    def __exit__(self, problem, *_):
        assert problem or same(self.thing, self.before), self.message


class Watched(Federation):
    """The plain loop, which looks at what a method does."""

    @property
    def name(self):
        return type(self.method).__name__

    def round(self):
        method = self.method
        kept = {name: x for name, x in vars(method).items() if name != "state"}
        message = f"{self.name}: self.state or w is changed in place. Make new ones, as in "
        with Unchanged(message + "self.state = self.state | {...}", (method.state, self.w)):
            super().round()
        for name, x in vars(method).items():
            if name != "state" and kept.get(name, self) is not x:
                raise AssertionError(
                    f"{self.name}: a round changes self.{name}. What the server keeps belongs into "
                    "self.state (`first_state`), what a client keeps into `mine` (`first_memory`)"
                )

    def recall(self, i, received):
        self.declared = self.method.first_memory(received)
        return super().recall(i, received)

    def visit(self, work, i, received, lr):
        message = f"{self.name}: `mine` or `received` is changed in place. Make new ones, as in "
        things = (self.memory.get(i), received)
        with HiddenState(self.method), Unchanged(message + 'mine | {"c_i": ...}', things):
            return super().visit(work, i, received, lr)

    def after_upload(self, work, mine, decoded, lr_sum):
        message = f"{self.name}: `remember` changes its arguments in place; make new tensors"
        with HiddenState(self.method), Unchanged(message, (mine, decoded)):
            after = super().after_upload(work, mine, decoded, lr_sum)
        if work == "train":
            self.compare_names(after)
        return after

    def compare_names(self, mine):
        ours, declared = describe(mine), describe(self.declared)
        assert ours == declared, (
            f"{self.name}: after a round the memory of a client is {ours}, but `first_memory` "
            f"declares {declared}. Names, shapes and types must stay as they were declared"
        )


class HiddenState:
    """with HiddenState(method): ...    meanwhile its self.state cannot be used."""

    def __init__(self, method):
        self.method = method

    def __enter__(self):
        self.state, self.method.state = self.method.state, Hidden()

    def __exit__(self, problem, *_):
        untouched, self.method.state = isinstance(self.method.state, Hidden), self.state
        name = type(self.method).__name__
        assert problem or untouched, f"{name}: a client sets self.state, which only the server has"


def describe(memory):
    tensors = {name: isinstance(x, torch.Tensor) for name, x in memory.items()}
    return {n: (tuple(x.shape), x.dtype) if tensors[n] else x for n, x in memory.items()}


def spied(M):
    """The class M, but what its `start`, `move` and `upload` return is looked at."""

    class Spy(M):
        plain_move = True  # is `move` always w - lr G?

        def start(self, received, mine):
            Spy.began = super().start(received, mine)
            return Spy.began

        def move(self, w, G, mine, lr):
            moved, mine = super().move(w, G, mine, lr)
            Spy.plain_move &= close(moved, w - lr * (G + self.weight_decay * w))
            return moved, mine

        def upload(self, w, received, mine, lr_sum):
            walked = w - Spy.began
            sent, mine = super().upload(w, received, mine, lr_sum)
            check_upload(M.__name__, sent, walked)
            return sent, mine

    Spy.__name__ = M.__name__
    return Spy


def check_upload(name, sent, walked):
    assert isinstance(sent, dict) and "update" in sent, (
        f'{name}: `upload` must return ({{name: vector}}, memory), with "update" among the names'
    )
    for key, x in sent.items():
        ok = isinstance(x, torch.Tensor) and x.shape == walked.shape
        assert ok, f"{name}: `upload` sends {key!r}, which is no vector [d]; only those are encoded"
    assert close(sent["update"], walked), (
        f'{name}: "update" is not w_K minus where `start` began, the sum of the local steps. '
        "SCAFFOLD, FedDyn and FedCM add it up or divide it by lr_sum, and would be wrong. Send or "
        "collect your own vector beside it, under another name"
    )


def check_rules(M):
    """What a client may see and change, and what "update" is.  Warns if `move` is another step."""
    Spy = spied(M)
    run(federation(Spy, Watched))
    if not Spy.plain_move:
        text = "is not w - lr G, so lr_sum means nothing; do not combine it with SCAFFOLD or FedCM"
        warnings.warn(f"{M.__name__}: `move` {text}", stacklevel=2)


# ------------------------------------------------------------------------ other visits, checkpoints


def check_threads(M):
    must_agree(M, end(run(federation(M, Threads, {"threads": 2}))), "with threads")


class Thread:
    """In place of scale.visits.Group: ranks that are threads of this process, and talk in bytes."""

    def __init__(self, rank, barrier, messages):
        self.rank, self.size = rank, barrier.parties
        self.barrier, self.messages = barrier, messages

    def all_gather(self, message):
        self.messages[self.rank] = message
        self.barrier.wait()
        everyone = list(self.messages)
        self.barrier.wait()
        return everyone

    def broadcast(self, message):
        return self.all_gather(message)[0]


def ranks_of(M, size=2):
    """How the ranks of a group end; each has its own method and loop, as a process would."""
    barrier, messages = threading.Barrier(size), [None] * size

    def one(rank):
        try:
            return end(run(federation(M, Ranks, {"group": Thread(rank, barrier, messages)})))
        except BaseException:
            barrier.abort()  # else the others would wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def check_ranks(M):
    for other in ranks_of(M):
        must_agree(M, other, "with ranks")


def check_vmap(M):
    expected = plain(M)
    for chunk in 0, 2:
        try:
            other = end(run(federation(M, Vmap, {"chunk": chunk})))
        except Exception as error:
            raise AssertionError(
                f"{M.__name__}: it does not run under vmap: {error}\nOn a client: no `if` on the "
                "value of a tensor, no .item() or float(), no change in place, no random numbers"
            ) from error
        must_agree(M, {**expected, **other}, "under vmap", close)


def check_checkpoint(M):
    first = run(federation(M), 3)
    saved = {"w": first.w, "state": first.method.state, "memory": first.memory}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    try:
        saved = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            f"{M.__name__}: self.state and `mine` may hold tensors, numbers, text, lists and dicts "
            f"only, which can be loaded without running code: {error}"
        ) from error
    second = federation(M)
    for name in "t", "bytes_up", "bytes_down", "informed":
        setattr(second, name, getattr(first, name))
    second.w, second.memory, second.method.state = saved["w"], saved["memory"], saved["state"]
    must_agree(M, end(run(second, ROUNDS - 3)), "continued from a checkpoint")


# --------------------------------------------------------------------------------- combinations


def check_combinations(M):
    """M itself, and M with SCAFFOLD and FedDyn in both orders: c = mean c_i, h = mean h_i."""
    check_sums(M, M)
    for B in SCAFFOLD, FedDyn:
        if issubclass(M, B) or issubclass(B, M):
            continue  # there is nothing to combine
        for bases in (M, B), (B, M):
            C = type(f"{bases[0].__name__}_{bases[1].__name__}", bases, {})
            check_sums(M, C)
            assert not same(plain(C)["the model"], plain(M)["the model"]), (
                f"{C.__name__} takes the steps of {M.__name__} alone: its `correct` or `aggregate` "
                "does not call super()"
            )


def check_sums(M, C):
    try:
        w, state, memory, *_ = plain(C).values()
    except KeyError as error:
        raise AssertionError(
            f"{C.__name__}: {error} is missing. `first_state`, `first_memory`, `broadcast`, "
            f"`upload` and `collect` of {M.__name__} must call super() and add to what it returns"
        ) from error
    assert w.isfinite().all(), f"{C.__name__}: the model is not finite after {ROUNDS} rounds"
    weights = task().sizes
    for total, part, B in (("c", "c_i", SCAFFOLD), ("h", "h_i", FedDyn)):
        if issubclass(C, B):
            parts = sum(weights[i] * mine[part] for i, mine in memory.items())
            assert close(state[total], parts / sum(weights)), (
                f"{C.__name__}: {total} is not the mean of the {part} of all clients. In "
                f"`remember`, `collect` and `aggregate`, {M.__name__} must call super() and pass "
                '`decoded`, `mean` and `share` on as they are; "update" must stay what was decoded'
            )


def check_off(M, off):
    """With the settings `off`, M takes the steps of a parent that has the same settings."""
    if not off:
        return
    ours, full = run(federation(M, **off)).w, plain(M)["the model"]
    parents = [B for B in M.__bases__ if hasattr(B, "train")]
    names, found = " or ".join(B.__name__ for B in parents), False
    for B in parents:
        shared = {name: value for name, value in off.items() if hasattr(B, name)}
        found |= torch.equal(ours, run(federation(B, **shared)).w)
        assert not torch.equal(full, plain(B)["the model"]), (
            f"{M.__name__} takes the steps of {B.__name__} with its default settings, too: what it "
            "adds has no effect here (if that is right, leave `off` out, and test it yourself)"
        )
    assert found, f"{M.__name__} with {off} does not take the steps of {names}, bit for bit"
