"""Make data/fashion_10k.npz, the bundled class-balanced subset of Fashion-MNIST.

    python -m vision.make_fashion [OUT.npz]

It reads the four files of Debian's package dataset-fashion-mnist, draws 1,000 training and 200
test images of each of the ten classes, shuffles them and writes the layout of keras.datasets. The
same seed gives the same content on every machine.
"""

import sys
from pathlib import Path

import numpy as np

from vision.data import BUNDLED, DEBIAN_FASHION, FASHION_CLASSES, read_idx

SEED = 2602


def subset(x, y, per_class, rng):
    """per_class random images of every class, in random order: x [n, H, W], y [n] -> (x, y)."""
    drawn = [rng.choice(np.flatnonzero(y == c), per_class, replace=False) for c in range(10)]
    rows = np.concatenate(drawn)
    rng.shuffle(rows)
    return x[rows], y[rows]


def main(out):
    x_train, y_train, x_test, y_test = read_idx(DEBIAN_FASHION)
    rng = np.random.default_rng(SEED)
    arrays = {}
    arrays["x_train"], arrays["y_train"] = subset(x_train, y_train, 1000, rng)
    arrays["x_test"], arrays["y_test"] = subset(x_test, y_test, 200, rng)
    np.savez_compressed(out, **arrays, classes=np.array(FASHION_CLASSES))
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{out}: {shapes}, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else BUNDLED)
