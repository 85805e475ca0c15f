"""Images: loading them, keeping them on the device, and drawing a client's batches.

The images stay on the device as uint8 and are normalised batch by batch, so that all of CIFAR-10 costs 150 MB and a client
costs nothing: it is a list of image numbers (split.py).

A batch is a tensor `rows` [B, 4] of integers (image number, shift down, shift right, flip); number -1 is padding with
weight 0. All randomness is in these numbers, drawn beforehand (`draw_batches`), so that training itself is a pure function.
Three sets never meet: the clients train on `train`, settings are chosen on `val`, results are reported on `test`.

Sources: McMahan et al. 2017 (batches); He et al. 2016 (shift and flip). Read next: split.py.
"""
import gzip
import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
BUNDLED = HERE / "data" / "fashion_10k.npz"
DOWNLOADS = HERE / "data" / "downloads"
DEBIAN_FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")     # from Debian's package dataset-fashion-mnist
FASHION_CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
DATASETS = ["bundled", *TORCHVISION]
MAX_SHIFT = 4                                                          # pixels: "crop with padding 4"


class Batch(NamedTuple):
    """x [B, C, H, W] float, y [B] labels, weight [B]: 1/(number of real images), or 0 for padding.  Source: ours."""
    x: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor


class Images(NamedTuple):
    """x [n, C, H, W] uint8 and y [n] int64 on the device; mean, std [C] of the training images.  Source: ours."""
    x: torch.Tensor
    y: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    classes: list

    def batch(self, rows, augment=False):
        """The images that rows [B, 4] name, normalised (and shifted and flipped if augment) -> Batch.  Source: ours."""
        number, dtype = rows[:, 0], self.mean.dtype
        real = number >= 0
        number = number.clamp_min(0)
        x = moved(self.x, number, rows[:, 1:]) if augment else self.x[number]
        x = (x.to(dtype) - self.mean[:, None, None]) / self.std[:, None, None]
        return Batch(x, self.y[number], real.to(dtype) / real.sum().clamp_min(1))

    def chunks(self, size, rows=None):
        """All images (or those numbered in rows [n]) in order, as batches of at most `size`.  Source: ours."""
        rows = torch.arange(len(self.y), device=self.y.device) if rows is None else rows
        for part in rows.split(size):
            yield self.batch(torch.nn.functional.pad(part[:, None], (0, 3)))


class Dataset(NamedTuple):
    """Three disjoint sets of Images [n, C, H, W]: train (split over the clients), val (tuning), test (reporting).  Source: ours."""
    train: Images
    val: Images
    test: Images


def moved(x, number, how):
    """Shift and flip by index arithmetic: x [n, C, H, W], number [B], how [B, 3] = (down, right, flip) -> [B, C, H, W].

    Pixels that come from outside are 0 (black), as in torchvision's RandomCrop(padding=4).  Source: He et al. 2016, 4.2.
    """
    H, W = x.shape[2:]
    row = torch.arange(H, device=x.device) - how[:, :1]                                # [B, H]
    col = torch.arange(W, device=x.device).expand(len(number), W)
    col = torch.where(how[:, 2:] > 0, W - 1 - col, col) - how[:, 1:2]                   # [B, W]
    inside = ((row >= 0) & (row < H))[:, :, None] & ((col >= 0) & (col < W))[:, None, :]
    out = x[number[:, None, None], :, row.clamp(0, H - 1)[:, :, None], col.clamp(0, W - 1)[:, None, :]]   # [B, H, W, C]
    return (out * inside[..., None]).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- loading
def import_torchvision():
    """Import torchvision even where its compiled operators cannot load (a CUDA wheel beside a CPU torch).

    There `import torchvision` fails with "operator torchvision::nms does not exist". Nothing here uses these operators,
    so they are declared without an implementation and the import is tried again. -> the module
    Source: ours.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    import torchvision.datasets
    import torchvision.models
    return torchvision


def read_idx_folder(folder):
    """The four .gz files of MNIST's format -> x_train [n, H, W] uint8, y_train [n], x_test, y_test.  Source: LeCun, MNIST."""
    def read(name):
        raw = gzip.decompress((pathlib.Path(folder) / name).read_bytes())
        shape = np.frombuffer(raw, ">i4", raw[3], 4)              # byte 3 is the number of dimensions
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    return [read(f"{split}-{kind}-ubyte.gz") for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def read_npz(path):
    """A Keras-layout file -> x_train [n, H, W] or [n, H, W, C] uint8, y_train [n], x_test, y_test, class names.

    Raises ValueError, saying what is wrong, unless the file is an .npz with these four arrays and legal labels.
    Pickled objects are never loaded.  Source: the layout of keras.datasets.
    """
    try:
        with np.load(path, allow_pickle=False) as pack:
            missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in pack.files]
            if missing:
                raise ValueError(f"it has no array {missing[0]!r} (needed: x_train, y_train, x_test, y_test)")
            arrays = {k: pack[k] for k in ("x_train", "y_train", "x_test", "y_test", "classes") if k in pack.files}
    except FileNotFoundError:
        raise ValueError(f"dataset {str(path)!r}: there is no such file (built in: {', '.join(DATASETS)})") from None
    except Exception as error:                                   # numpy raises many kinds for a file that is no npz
        raise ValueError(f"dataset {str(path)!r} cannot be read as a Keras-layout .npz: {error}") from None
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.ndim == 4 and x.shape[3] not in (1, 3) or min(x.shape[1:3]) < 8:
            raise ValueError(f"dataset {str(path)!r}: x_{split} is {x.dtype} {x.shape}; expected uint8 (n, H, W) or "
                             f"(n, H, W, 1 or 3) with H, W >= 8")
        if y.size != len(x) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"dataset {str(path)!r}: y_{split} is {y.dtype} {y.shape}; expected {len(x)} integer labels")
        top = 999 if split == "train" else int(arrays["y_train"].max())
        if len(y) == 0 or y.min() < 0 or y.max() > top:
            raise ValueError(f"dataset {str(path)!r}: labels of y_{split} must lie in 0..{top}" +
                             (f", found {y.min()}..{y.max()}" if len(y) else ", found none"))
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"dataset {str(path)!r}: training and test images differ in shape")
    names = np.asarray(arrays.get("classes", np.arange(int(arrays["y_train"].max()) + 1)))
    if names.ndim != 1 or len(names) <= arrays["y_train"].max():
        raise ValueError(f"dataset {str(path)!r}: classes is {names.shape}; expected one name for each of the labels 0..{arrays['y_train'].max()}")
    names = [str(c) for c in names]
    return *(arrays[k] for k in ("x_train", "y_train", "x_test", "y_test")), names


def read_torchvision(name, root):
    """A torchvision data set, downloaded into `root` on first use -> arrays as `read_npz` [n, H, W(, C)].  Source: torchvision."""
    kind = getattr(import_torchvision().datasets, TORCHVISION[name])
    try:
        sets = [kind(root, split=s, download=True) if name == "svhn" else kind(root, train=s == "train", download=True)
                for s in ("train", "test")]
    except Exception as error:           # no network, a damaged file, svhn without scipy: all of them the user's to mend
        raise ValueError(f"dataset {name!r} could not be loaded through torchvision into {root}: {error}") from None
    out = []
    for s in sets:
        x = np.asarray(s.data)
        out += [x.transpose(0, 2, 3, 1) if name == "svhn" else x, np.asarray(s.labels if name == "svhn" else s.targets)]
    return *out, getattr(sets[0], "classes", [str(c) for c in range(10)])


def load(name, val=1000, device="cpu", root=DOWNLOADS, seed=0, dtype=torch.float32):
    """Load a data set by name or .npz path and hold `val` class-balanced training images out -> Dataset of [n, C, H, W].

    `fashionmnist` comes from Debian's package when it is installed, else from torchvision. Raises ValueError for a name
    that is neither known nor a readable file, or for val >= the number of training images.  Source: ours.
    """
    if name == "fashionmnist" and DEBIAN_FASHION.exists():
        *arrays, names = *read_idx_folder(DEBIAN_FASHION), FASHION_CLASSES
    elif name in TORCHVISION:
        *arrays, names = read_torchvision(name, root)
    else:
        *arrays, names = read_npz(BUNDLED if name == "bundled" else name)
    x, y, x_test, y_test = arrays
    y, y_test = y.reshape(-1).astype(np.int64), y_test.reshape(-1).astype(np.int64)
    if not 0 <= val < len(y):
        raise ValueError(f"val = {val} images cannot be held out of {len(y)} training images; it must be in 0..{len(y) - 1}")
    held = balanced(y, val, np.random.default_rng(seed))
    kept = np.setdiff1d(np.arange(len(y)), held)
    pixels = [np.moveaxis(a.reshape(*a.shape[:3], -1), 3, 1) for a in (x[kept], x[held], x_test)]
    mean, std = (torch.tensor(v, dtype=dtype, device=device) for v in zip(*map(mean_and_std, pixels[0].transpose(1, 0, 2, 3))))
    return Dataset(*(Images(torch.tensor(np.ascontiguousarray(a), device=device), torch.tensor(b, device=device),
                            mean, std.clamp_min(1e-6), names) for a, b in zip(pixels, (y[kept], y[held], y_test))))


def mean_and_std(x):
    """Mean and standard deviation of bytes x [n, H, W], from their histogram, so without a copy as float64.  Source: definition."""
    count = sum(np.bincount(part.reshape(-1), minlength=256) for part in np.array_split(x, -(-len(x) // 1000)))
    mean = (count @ np.arange(256)) / count.sum()
    return mean, math.sqrt(count @ (np.arange(256) - mean)**2 / count.sum())


def balanced(y, n, rng):
    """n places of y [N], as equally many of every class as possible, at random -> sorted places [n].  Source: ours."""
    y = np.asarray(y)
    order = rng.permutation(len(y))
    rank = np.empty(len(y), dtype=int)                            # the how-manieth of its class each image is, in `order`
    for c in np.unique(y):
        mine = order[y[order] == c]
        rank[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:n])


# ------------------------------------------------------------------------------------------------------- batches
def draw_batches(mine, batch_size, steps, epochs, generator, augment=False):
    """One client's batches of one round: mine [n] image numbers -> rows [K, B, 4] (image, down, right, flip).

    With epochs > 0: each epoch is a fresh shuffle cut into ceil(n / B) batches, the last one padded with -1. Otherwise
    exactly `steps` full batches from shuffles laid end to end, so a small client meets its images again.
    Source: McMahan et al. 2017, Algorithm 1 (epochs).
    """
    def shuffle():
        return mine[torch.randperm(len(mine), generator=generator)]
    if epochs:
        number = torch.cat([torch.nn.functional.pad(shuffle(), (0, -len(mine) % batch_size), value=-1) for _ in range(epochs)])
    else:
        need = steps * batch_size
        number = torch.cat([shuffle() for _ in range(-(-need // len(mine)))])[:need]
    how = torch.zeros(len(number), 3, dtype=torch.long)
    if augment:
        how[:, :2] = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (len(number), 2), generator=generator)
        how[:, 2] = torch.randint(2, (len(number),), generator=generator)
    return torch.cat([number[:, None], how], 1).view(-1, batch_size, 4)
