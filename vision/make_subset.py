"""Make a class-balanced subset of a data set, for experiments that end on a laptop.

    python -m vision.make_subset fashionmnist fashion_10k.npz
    python -m vision.make_subset cifar10 data/downloads/cifar10_11k.npz --train 1100

The first one gives the images of the bundled file again. NAME is all that `run.py --dataset` knows;
--train and --test say how many images of every class are drawn (1000 and 200). They are shuffled
and written in the layout of keras.datasets. The same data give the same content on every machine.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from vision import data

SEED = 2602


def subset(x, y, per_class, rng):
    """per_class random images of every class, in random order: x [n, ...], y [n] -> (x, y).

    Raises ValueError if a class has fewer.
    """
    y, drawn = y.reshape(-1), []
    for c in np.unique(y):
        mine = np.flatnonzero(y == c)
        if len(mine) < per_class:
            raise ValueError(f"class {c} has {len(mine)} images, fewer than {per_class}")
        drawn.append(rng.choice(mine, per_class, replace=False))
    rows = np.concatenate(drawn)
    rng.shuffle(rows)
    return x[rows], y[rows]


def make(name, out, train, test):
    """Write the subset -> its arrays."""
    raw, rng = data.read(name), np.random.default_rng(SEED)
    if raw.client_train is not None:
        raise ValueError(f"{name} says whose image is whose (client_train); a subset would lose it")
    arrays = {}
    arrays["x_train"], arrays["y_train"] = subset(raw.x_train, raw.y_train, train, rng)
    arrays["x_test"], arrays["y_test"] = subset(raw.x_test, raw.y_test, test, rng)
    arrays["classes"] = np.array(raw.classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    return arrays


def main(argv=None):
    """The command: exit code 0, or 2 for wrong input."""
    p = argparse.ArgumentParser(
        prog="python -m vision.make_subset", description=__doc__.split("\n")[0]
    )
    p.add_argument("name")
    p.add_argument("out", type=Path, help="a .npz file that is not there yet")
    p.add_argument("--train", type=int, default=1000, help="training images of a class")
    p.add_argument("--test", type=int, default=200, help="test images of a class")
    given = p.parse_args(argv)
    try:
        if min(given.train, given.test) < 1:
            raise ValueError("--train and --test must be at least 1")
        if given.out.suffix != ".npz" or given.out.exists():
            raise ValueError(f"{given.out} must end in .npz and not be there yet")
        arrays = make(given.name, given.out, given.train, given.test)
    except (ValueError, OSError) as error:
        print(f"vision.make_subset: {error}", file=sys.stderr)
        return 2
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{given.out}: {shapes}, {given.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
