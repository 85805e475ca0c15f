"""The folder of a run: nothing in it is lost, and nothing in it is believed unread.

    config.json       all that the numbers depend on, a hash of that, and the machine
    checkpoint.pt     what the next rounds depend on, and the log so far
    log.jsonl         a line a round, for the reader; a resumed run writes it anew
    result.json       the result, once the run is finished

All but log.jsonl are written in one piece and carry a checksum. A folder is data and never code.
"""

import contextlib
import hashlib
import inspect
import json
import os
import platform
import shlex
import tempfile
import zipfile
from pathlib import Path

import torch

from plumbing.settings import HERE, PLACES, changes_seconds, closest, name_of, parts, short

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder, and works without
    fcntl = None


def add_line(path, row):
    """Add a dict to log.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_result(path, config):
    """The dict of result.json.  ValueError if it is damaged, or of another run."""
    result = read_json(path, sealed=True)
    if result["settings"] != config["hash"]:
        raise ValueError(f"{path} is of another run")
    return result


def first_rank():
    """Is this the process that writes and prints? Of several under torchrun, it is rank 0."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK") == "0"


@contextlib.contextmanager
def workplace(folder):
    """Where this process writes: the run's folder, locked; a temporary one if there is none."""
    if folder is None or not first_rank():
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        yield folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another process") from None
    finally:
        os.close(handle)


def described(settings, images):
    """The dict of config.json: all that the numbers depend on, a hash of that, and the machine."""
    labels = {kind: label_of(kind, settings[kind]) for kind in PLACES}
    words = [word for label in labels.values() for word in label.split("+") if ":" in word]
    files = [Path(word.rpartition(":")[0]) for word in words]
    code = {str(f): f.read_bytes() for f in files if f.is_file()}
    for kind, label in labels.items():  # a class of a notebook has no file, and may change, too
        if callable(settings[kind]) and ":" in label and label.rpartition(":")[0] not in code:
            code[label] = source_of(settings[kind])
    numbers = {
        "settings": {k: v for k, v in (settings | labels).items() if not changes_seconds(k)},
        "files": {name: hashlib.sha256(text).hexdigest() for name, text in code.items()},
        "data": digest_of(images),
    }
    digest = checksum(numbers)[:8]
    label = f"{short(labels['algo'])}-s{settings['seed']}"
    return numbers | {"hash": digest, "label": label, "machine": machine()}


def label_of(kind, part):
    """How a part is written down: by its name, or as FILE.py:NAME."""
    if isinstance(part, str) or part in parts(kind).values():
        return part if isinstance(part, str) else name_of(part)
    try:
        return f"{inspect.getsourcefile(part)}:{part.__name__}"
    except (OSError, TypeError):  # from a notebook or an interpreter
        return f"{part.__module__}:{part.__name__}"


def source_of(part):
    """The text of a class or function as bytes; of an interpreter's, which has none, its code."""
    try:
        return inspect.getsource(part).encode()
    except (OSError, TypeError):
        functions = vars(part).values() if inspect.isclass(part) else [part]
        codes = [f.__code__ for f in functions if inspect.isfunction(f)]
        return repr([(c.co_code, c.co_consts, c.co_names) for c in codes]).encode()


def digest_of(images):
    """A digest of all images and labels, and of whose they are, if the data say it."""
    digest = hashlib.blake2b(digest_size=8)
    for some in (images.train, images.val, images.test):
        digest.update(some.x.cpu().numpy())
        digest.update(some.y.cpu().numpy())
    for client in images.clients or ():
        digest.update(f"{len(client)} ".encode() + client.numpy().tobytes())
    return digest.hexdigest()


def machine():
    """Versions and hardware."""
    places = (HERE, *(HERE / name for name in ("vision", "methods", "codes", "scale")))
    files = sorted(file for place in places for file in place.glob("*.py"))
    source = b"".join(file.read_bytes() for file in files if file.name != "test_all.py")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "source": hashlib.sha256(source).hexdigest()[:8],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def agree(path, config):
    """Write config.json, or ValueError if there is one of another run, or only other files."""
    if not path.exists():
        for name in ("checkpoint.pt", "log.jsonl", "result.json", "curve.png", "synthetic.png"):
            if path.with_name(name).exists():
                raise ValueError(f"{path.parent} holds {name} and no run; choose a new folder")
        return write_json(path, config)
    ours, theirs = flat(config), flat(read_json(path, sealed=True))
    for name in ours | theirs:  # the settings first, the hash last
        if ours.get(name) != theirs.get(name):
            old, new = theirs.get(name), ours.get(name)
            if name.endswith(".py"):
                raise ValueError(f"{path} is of another run: {name} has changed since then")
            raise ValueError(f"{path} is of another run: {name} was {old!r}, and is {new!r} now")


def one_version(folder, seen):
    """Add the code and data of a run to seen, {name: digest}; ValueError if one of them changed."""
    config = read_json(folder / "config.json", sealed=True)
    for name, digest in (config["files"] | {"its dataset": config["data"]}).items():
        if seen.setdefault(name, digest) != digest:
            raise ValueError(f"{folder} is not comparable: {name} changed before that run")


def flat(config):
    """Settings, files and data of a config.json in one dict."""
    settings, files = config.get("settings"), config.get("files")
    if not isinstance(settings, dict) or not isinstance(files, dict):
        raise ValueError("config.json has no settings or files")
    return settings | files | {name: config.get(name) for name in ("data", "hash")}


@contextlib.contextmanager
def whole(path):
    """Write a file of bytes in one piece: it is there whole, or as it was before."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except RuntimeError as error:  # so torch.save calls a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def write(path, text):
    """Write a file of text in one piece."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path, content):
    """Write a dict, and its checksum with it."""
    write(path, json.dumps(content | {"checksum": checksum(content)}, indent=1) + "\n")


def checksum(content):
    """The SHA-256 of a dict that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path, sealed=False):
    """The dict in a file; sealed: as `write_json` wrote it.  ValueError that names the file."""
    try:
        if path.exists() and not path.is_file():  # a pipe, for instance, would be waited for
            raise ValueError("it is no file")
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if sealed and content.pop("checksum", None) != checksum(content):
            raise ValueError("its checksum is wrong")
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error  # without number and path
        raise ValueError(f"{path} cannot be read: {reason}") from None


CHECKPOINT = ("w", "t", "bytes_up", "bytes_down", "memory", "informed")  # of a Federation


def save(place, federation, log, digest, seconds):
    """Write checkpoint.pt in one piece: what the next rounds depend on, and the log so far."""
    held = {name: getattr(federation, name) for name in CHECKPOINT}
    more = {"state": federation.method.state, "log": log, "hash": digest, "seconds": seconds}
    with whole(place / "checkpoint.pt") as file:
        torch.save(held | more, file)


def restore(place, federation, digest):
    """Go back to checkpoint.pt if there is one: (rows of the log, seconds that the run has taken).

    The checkpoint holds the log, so the two cannot disagree after a kill. ValueError if the file is
    damaged (torch.load does not look at the checksums in it), of another run, or if what it holds
    does not fit. It loads no code.
    """
    path = place / "checkpoint.pt"
    if not path.exists():
        return [], 0.0
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        stored = torch.load(path, map_location=federation.w.device, weights_only=True)
        if stored["hash"] != digest:
            raise ValueError("it is of another run")
        for name in CHECKPOINT:
            setattr(federation, name, stored[name])
        federation.method.state = stored["state"]
        if not fits(federation, stored["log"]):
            raise ValueError("what it holds is not what a run writes")
        return stored["log"], float(stored["seconds"])
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is of no use: {error}") from None


def fits(federation, log):
    """Has the federation the shapes and types that rounds give it, and the log a row for each?"""
    f, clients = federation, range(len(federation.weights))
    received = f.method.broadcast(f.w) | f.method.broadcast_once()
    at_first = f.recall(None, received)  # what a client remembers before its first round
    end = log[-1] if log else {"round": 0, "up": 0, "down": 0}
    return (
        alike(f.w, f.task.w0)
        and f.w.isfinite().all()
        and len(log) == f.t == end["round"]
        and (f.bytes_up, f.bytes_down) == (end["up"], end["down"])
        and all(i in clients and alike(mine, at_first) for i, mine in f.memory.items())
        and f.informed <= set(clients)
        and alike(f.method.state, f.method.first_state())
        and all(alike(w, f.task.w0) for w in f.method.state.get("trajectory", ()))
        and images_fit(f.task, f.method.state.get("X"), f.method.state.get("Y"))
    )


def images_fit(task, X, Y):
    """Are these synthetic images and labels of this task, or is neither there?"""
    if X is None or Y is None:
        return X is Y
    return len(X) and (X.shape[1:], Y.shape) == (task.image_shape, (len(X), task.classes))


def alike(x, like):
    """Have two things the same names, shapes and types? What was None may be anything."""
    if isinstance(like, dict):
        return x.keys() == like.keys() and all(alike(x[name], like[name]) for name in like)
    if isinstance(like, torch.Tensor):
        return (x.shape, x.dtype) == (like.shape, like.dtype)
    return like is None or type(x) is type(like)


def stored_settings(folder, **given):
    """The settings of the run in a folder; given: those of the machine may be new.

    A folder is data and never code. If it names a part in a file of the reader's own, that file is
    imported only if the caller names it again, as in algo="mine.py:M".
    """
    settings = read_json(Path(folder) / "config.json", sealed=True).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}/config.json has no settings")
    refuse_code(folder, [settings], given.values())
    return continued(settings, given)


def continued(settings, given):
    """Settings from a folder, with those of the machine that are given."""
    for name, value in given.items():
        if not changes_seconds(name) and name not in settings:
            raise ValueError(f"{name} is no setting of the run in the folder")
        if not changes_seconds(name) and value != settings[name]:
            raise ValueError(f"{name} = {settings[name]} comes from the folder, and stays")
    return settings | given


def refuse_code(folder, runs, given):
    """ValueError if settings of runs in a folder name code that is not among the words given."""
    for kind in PLACES:
        labels = dict.fromkeys(str(settings.get(kind)) for settings in runs)
        own = [x for x in labels if ":" in x or x.endswith(".py") or ".py+" in x]
        if set(own) - set(given):
            own = " ".join(own)
            raise ValueError(f"{folder} uses {own}; to run this code, give {kind} = {own} again")


def stored_runs(folder, named, given):
    """The runs of the comparison in a folder {name: settings}, as in `stored_settings`.

    named: {"algo" or "compress": words of the command}
    """
    runs = read_json(folder / "comparison.json", sealed=True)
    for label, settings in runs.items():
        if not isinstance(settings, dict) or not is_plain(label):
            raise ValueError(f"{folder}/comparison.json: {label!r} is no run")
    refuse_code(folder, runs.values(), [*sum(named.values(), []), *given.values()])
    runs = {label: continued(settings, given) for label, settings in runs.items()}
    for kind, words in named.items():
        known = {settings[kind] for settings in runs.values()}
        for word in set(words) - known:
            raise ValueError(f"{folder} has no run of {word}; {closest(word, sorted(known))}")
    return runs


def is_plain(name):
    """Is this the name of a folder, and no way to another place?"""
    return Path(name).name == name and name not in ("", "..")


def new_folder(root, name, fallback):
    """A new folder root/name, or root/fallback, root/fallback-2, ...: nothing is overwritten."""
    if name is not None and not is_plain(name):
        raise ValueError(f"name = {name!r} is no plain folder name; --out says where it goes")
    for n in range(1, 10**6):
        folder = root / (name or (fallback if n == 1 else f"{fallback}-{n}"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if name:
                raise ValueError(
                    f"{folder} exists; choose another --name, or --resume it"
                ) from None
        except OSError as error:
            raise ValueError(f"{folder} cannot be made: {error.strerror}") from None


def way_on(folder):
    """What to do about a run that was cut off."""
    names = ("config.json", "comparison.json")
    if folder and any((folder / name).exists() for name in names):
        return f"continue with: python run.py --resume {shlex.quote(str(folder))}"
    return "there is nothing to continue"
