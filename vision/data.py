"""Images: loading them, keeping them on the device, and drawing the batches of a client.

The images stay on the device as bytes and are normalised batch by batch. So all of CIFAR-10 takes
184 MB, and a client takes nothing: it is a list of image numbers (split.py).

A batch is a tensor [B, 4] of integers: image number, shift down, shift right, flip. Number -1 is
padding, with weight 0. All randomness is in these numbers, which `draw_batches` draws before the
training. Training itself is then a pure function of tensors.

Three sets never meet: clients train on `train`, settings are chosen on `val`, results are reported
on `test`.

Sources: batches, McMahan et al. 2017, Algorithm 1. Shift and flip, He et al. 2016, section 4.2.
"""

import difflib
import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

FOLDER = Path(__file__).parents[1] / "data"
BUNDLED = FOLDER / "fashion_10k.npz"
DOWNLOADS = FOLDER / "downloads"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION_CLASSES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()
TORCHVISION = {
    "fashionmnist": "FashionMNIST",
    "mnist": "MNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
DATASETS = ["bundled", *TORCHVISION]
MAX_SHIFT = 4  # pixels, up, down, left or right: "crop with padding 4"


class Batch(NamedTuple):
    """Images and labels of a batch."""

    x: torch.Tensor  # [B, C, H, W] normalised
    y: torch.Tensor  # [B]
    weight: torch.Tensor  # [B] 1 / (number of real images); 0 for padding


class Images(NamedTuple):
    """A set of images on the device."""

    x: torch.Tensor  # [n, C, H, W] uint8
    y: torch.Tensor  # [n] int64
    mean: torch.Tensor  # [C] of the training images
    std: torch.Tensor  # [C]
    classes: list  # their names

    def batch(self, rows, augment=False):
        """The images that rows [B, 4] name, normalised -> Batch; augment: shifted and flipped."""
        number, dtype = rows[:, 0], self.mean.dtype
        real = number >= 0
        number = number.clamp_min(0)
        x = moved(self.x, number, rows[:, 1:]) if augment else self.x[number]
        x = (x.to(dtype) - self.mean[:, None, None]) / self.std[:, None, None]
        return Batch(x, self.y[number], real.to(dtype) / real.sum().clamp_min(1))

    def chunks(self, size, numbers=None):
        """All images, or those of numbers [n], in order, as batches of at most `size`."""
        if numbers is None:
            numbers = torch.arange(len(self.y), device=self.y.device)
        for part in numbers.split(size):
            yield self.batch(unmoved(part))


class Dataset(NamedTuple):
    """Three disjoint sets of images, and the clients if the data set says who they are."""

    train: Images
    val: Images
    test: Images
    clients: list | None = None  # for each client its numbers of training images, sorted


def unmoved(numbers):
    """Rows of a batch that take these images as they are: [..., B] -> [..., B, 4]."""
    return pad(numbers[..., None], (0, 3))


def moved(x, number, how):
    """Shift and flip images by index arithmetic: x [n, C, H, W], number [B] -> [B, C, H, W].

    how [B, 3] is (down, right, flip): shifted first, then flipped if flip is 1. Pixels that come
    from outside are black, as in torchvision's RandomCrop(padding=4).
    """
    H, W = x.shape[2:]
    down, right, flip = how[:, :1], how[:, 1:2], how[:, 2:]
    row = torch.arange(H, device=x.device) - down  # [B, H], where a pixel comes from
    column = torch.arange(W, device=x.device)
    column = torch.where(flip > 0, W - 1 - column, column) - right  # [B, W]
    inside = ((row >= 0) & (row < H))[:, :, None] & ((column >= 0) & (column < W))[:, None, :]
    row, column = row.clamp(0, H - 1)[:, :, None], column.clamp(0, W - 1)[:, None, :]
    out = x[number[:, None, None], :, row, column]  # [B, H, W, C]
    return (out * inside[..., None]).permute(0, 3, 1, 2)


def draw_batches(mine, batch, steps, epochs, generator, augment=False):
    """The batches of a client's round, from its image numbers mine [n] -> [K, batch, 4].

    With epochs > 0, each epoch is a fresh shuffle cut into ceil(n / batch) batches, the last one
    padded with -1. Otherwise there are `steps` full batches, cut from shuffles laid end to end: a
    client with few images meets them again.
    """

    def shuffled():
        return mine[torch.randperm(len(mine), generator=generator)]

    if epochs:
        numbers = [pad(shuffled(), (0, -len(mine) % batch), value=-1) for _ in range(epochs)]
        number = torch.cat(numbers)
    else:
        need = steps * batch
        number = torch.cat([shuffled() for _ in range(math.ceil(need / len(mine)))])[:need]
    rows = unmoved(number)
    if augment:
        shifts = (len(number), 2)
        rows[:, 1:3] = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, shifts, generator=generator)
        rows[:, 3] = torch.randint(2, (len(number),), generator=generator)
    return rows.view(-1, batch, 4)


# ---------------------------------------------------------------------------------------- loading


def load(name, val=1000, device="cpu", root=DOWNLOADS, seed=0, dtype=torch.float32):
    """Load a data set by its name, or from a .npz file -> Dataset.

    val: training images held out for tuning, class-balanced; root: where torchvision keeps its
    downloads; seed: of the choice of validation images. Raises ValueError if there is no such data
    set, if it is damaged, or if val leaves nothing to train on.
    """
    raw = read(name, root)
    y, y_test = (labels.reshape(-1).astype(np.int64) for labels in (raw.y_train, raw.y_test))
    classes = [str(name) for name in raw.classes]
    if not 0 <= val < len(y):
        raise ValueError(
            f"val = {val} images cannot be held out of {len(y)} training images; "
            f"it must be in 0..{len(y) - 1}"
        )
    held = balanced(y, val, np.random.default_rng(seed))
    kept = np.setdiff1d(np.arange(len(y)), held)
    x_train = channels_first(raw.x_train[kept])
    mean, std = mean_and_std(x_train)
    mean = torch.tensor(mean, dtype=dtype, device=device)
    std = torch.tensor(std, dtype=dtype, device=device).clamp_min(1e-6)

    def images(x, y):
        x, y = torch.tensor(x, device=device), torch.tensor(y, device=device)
        return Images(x, y, mean, std, classes)

    return Dataset(
        images(x_train, y[kept]),
        images(channels_first(raw.x_train[held]), y[held]),
        images(channels_first(raw.x_test), y_test),
        None if raw.client_train is None else clients_of(raw.client_train, kept),
    )


def channels_first(x):
    """[n, H, W] or [n, H, W, C] -> [n, C, H, W]."""
    channels = 1 if x.ndim == 3 else x.shape[3]
    return np.ascontiguousarray(np.moveaxis(x.reshape(*x.shape[:3], channels), 3, 1))


def mean_and_std(x):
    """Mean and standard deviation of the channels of bytes x [n, C, H, W] -> two lists [C].

    They are read from histograms, which needs no copy of the images as floating-point numbers.
    """
    means, stds = [], []
    for channel in x.swapaxes(0, 1):
        parts = np.array_split(channel, math.ceil(len(x) / 1000))
        count = sum(np.bincount(part.reshape(-1), minlength=256) for part in parts)
        mean = (count @ np.arange(256)) / count.sum()
        means.append(mean)
        stds.append(math.sqrt(count @ (np.arange(256) - mean) ** 2 / count.sum()))
    return means, stds


def balanced(y, n, rng):
    """n places of y [N], as equally many of every class as possible, at random -> sorted [n]."""
    y = np.asarray(y)
    order = rng.permutation(len(y))
    rank = np.empty(len(y), dtype=int)  # 0 for the first image of each class in `order`, 1, 2, ...
    for c in np.unique(y):
        mine = order[y[order] == c]
        rank[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:n])


def clients_of(client_train, kept):
    """The clients of a data set, in the order of their labels -> sorted image numbers of each.

    client_train [n]: the client of each training image; kept: the images that were not held out.
    Image numbers count the kept ones. Raises ValueError if no image of a client was kept.
    """
    clients = []
    for label in np.unique(client_train):
        mine = np.flatnonzero(client_train[kept] == label)
        if len(mine) == 0:
            raise ValueError(
                f"client {label.item()!r} of client_train has no training image left: "
                f"all of its images are held out for validation; take a smaller val"
            )
        clients.append(torch.from_numpy(mine))
    return clients


# ------------------------------------------------------------------------------------ file formats


class Raw(NamedTuple):
    """A data set as it is stored."""

    x_train: np.ndarray  # [n, H, W] or [n, H, W, C] uint8
    y_train: np.ndarray  # [n] or [n, 1]
    x_test: np.ndarray
    y_test: np.ndarray
    classes: list
    client_train: np.ndarray | None = None  # [n] integers or strings


def read(name, root=DOWNLOADS):
    """Read a data set by its name, or from a .npz file -> Raw."""
    if name == "fashionmnist" and DEBIAN_FASHION.exists():
        return Raw(*read_idx(DEBIAN_FASHION), FASHION_CLASSES)
    if name in TORCHVISION:
        return read_torchvision(name, root)
    return read_npz(BUNDLED if name == "bundled" else name)


def read_npz(path):
    """Read a file with the layout of keras.datasets -> Raw. Pickled objects are never loaded.

    It holds x_train [n, H, W] or [n, H, W, C] uint8, y_train [n], x_test and y_test; perhaps
    `classes`, their names; perhaps client_train [n], the client of each training image, an integer
    or a string. Raises ValueError that says what is wrong.
    """
    needed = ("x_train", "y_train", "x_test", "y_test")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no file")
        with np.load(path, allow_pickle=False) as pack:
            missing = [key for key in needed if key not in pack.files]
            if missing:
                raise ValueError(f"it has no array {missing[0]!r} (needed: {', '.join(needed)})")
            known = (*needed, "classes", "client_train")
            arrays = {key: pack[key] for key in known if key in pack.files}
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), DATASETS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        message = f"there is no such file ({hint}built in: {', '.join(DATASETS)})"
        raise ValueError(f"dataset {str(path)!r}: {message}") from None
    except Exception as error:  # numpy raises many kinds for a file that is no .npz
        message = f"cannot be read as a Keras-layout .npz: {error}"
        raise ValueError(f"dataset {str(path)!r} {message}") from None
    try:
        check_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"dataset {str(path)!r}: {error}") from None
    arrays.setdefault("classes", np.arange(arrays["y_train"].max() + 1))
    return Raw(**arrays)


def check_arrays(arrays):
    """Raise ValueError unless the arrays of a .npz file are images, labels, names and clients."""
    for part in ("train", "test"):
        check_images(f"x_{part}", arrays[f"x_{part}"])
        check_labels(f"y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"]))
    shapes = [arrays[key].shape[1:] for key in ("x_train", "x_test")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"images of x_train are {shapes[0]}, those of x_test {shapes[1]}")
    top = arrays["y_train"].max()
    if arrays["y_test"].max() > top:
        found = arrays["y_test"].max()
        raise ValueError(f"labels of y_test must lie in 0..{top}, those of y_train; found {found}")
    names = arrays.get("classes")
    if names is not None and (names.ndim != 1 or len(names) <= top):
        raise ValueError(
            f"classes is {names.shape}; expected a name for each of the labels 0..{top}"
        )
    clients, n = arrays.get("client_train"), len(arrays["x_train"])
    if clients is not None and (clients.shape != (n,) or clients.dtype.kind not in "iuU"):
        found = f"{clients.dtype} {clients.shape}"
        raise ValueError(f"client_train is {found}; expected {n} integers or strings, ({n},)")


def check_images(name, x):
    pixels = x.dtype == np.uint8 and x.ndim in (3, 4) and min(x.shape[1:3]) >= 8
    if not pixels or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        expected = "expected uint8 (n, H, W) or (n, H, W, 1 or 3) with H, W >= 8"
        raise ValueError(f"{name} is {x.dtype} {x.shape}; {expected}")


def check_labels(name, y, n):
    if y.size != n or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} is {y.dtype} {y.shape}; expected {n} integer labels")
    if n == 0:
        raise ValueError(f"{name} is empty; expected at least one image")
    if y.min() < 0 or y.max() > 999:
        raise ValueError(f"labels of {name} must lie in 0..999; found {y.min()}..{y.max()}")


def read_idx(folder):
    """The four .gz files of MNIST's format -> x_train [n, H, W], y_train [n], x_test, y_test."""
    kinds = ("images-idx3", "labels-idx1")
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    return [read_idx_file(Path(folder) / name) for name in names]


def read_idx_file(path):
    """One array: two zero bytes, its type, its number of dimensions, its shape, its bytes."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_torchvision(name, root):
    """A data set of torchvision, which downloads it into `root` the first time -> Raw."""
    kind = getattr(import_torchvision().datasets, TORCHVISION[name])
    try:
        if name == "svhn":
            train, test = (kind(root, split=part, download=True) for part in ("train", "test"))
        else:
            train, test = (kind(root, train=part, download=True) for part in (True, False))
    except Exception as error:  # no network, a damaged file, svhn without scipy
        message = f"could not be loaded through torchvision into {root}: {error}"
        raise ValueError(f"dataset {name!r} {message}") from None
    if name == "svhn":  # the only one of them that has channels first
        arrays = [(s.data.transpose(0, 2, 3, 1), s.labels) for s in (train, test)]
    else:
        arrays = [(np.asarray(s.data), np.asarray(s.targets)) for s in (train, test)]
    return Raw(*arrays[0], *arrays[1], getattr(train, "classes", range(10)))


def import_torchvision():
    """Import torchvision, even where its compiled operators cannot be loaded -> the module.

    A CUDA build of it beside a CPU build of torch fails with "operator torchvision::nms does not
    exist". Nothing here uses its operators: declare the two, without a body, and import again.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", arguments)
        import torchvision
    import torchvision.datasets
    import torchvision.models

    return torchvision
