#!/usr/bin/env python3
"""Make data/fashion_10k.npz, the bundled class-balanced random subset of Fashion-MNIST.

    python tools/make_fashion.py [OUT.npz]

Takes the four files of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), draws 1,000
training and 200 test images of each of the ten classes with numpy's default_rng(seed 2602), shuffles them and writes
the Keras layout: x_train [10000, 28, 28] uint8, y_train [10000] uint8, x_test [2000, 28, 28], y_test [2000], and the
class names. The same seed gives the same file content on every machine.
"""
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from data import DEBIAN_FASHION, FASHION_CLASSES, read_idx_folder  # noqa: E402

SEED = 2602


def subset(x, y, per_class, rng):
    """`per_class` random images of every class in random order: x [n, H, W], y [n] -> (x, y) of 10 per_class rows."""
    rows = np.concatenate([rng.choice(np.flatnonzero(y == c), per_class, replace=False) for c in range(10)])
    rng.shuffle(rows)
    return x[rows], y[rows]


def main(out):
    x_train, y_train, x_test, y_test = read_idx_folder(DEBIAN_FASHION)
    rng = np.random.default_rng(SEED)
    x_train, y_train = subset(x_train, y_train, 1000, rng)
    x_test, y_test = subset(x_test, y_test, 200, rng)
    np.savez_compressed(out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test,
                        classes=np.array(FASHION_CLASSES))
    print(f"{out}: x_train {x_train.shape}, x_test {x_test.shape}, {pathlib.Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1] / "data" / "fashion_10k.npz")
