"""Bits against error: every compressor on the same vectors, beside the least error of any code.

    python -m codes.tradeoff                 the table of README.md, a quarter of a minute
    python -m codes.tradeoff UPDATE.npy      the same, with the update in that file, float64 [d]

A code that spends b bits on the mean leaves of a vector x of d independent Gaussian numbers at
least E||x_hat - x||^2 >= 4^(-b/d) E||x||^2 (Shannon's rate-distortion function). The same
inequality for the worst x of a ball is the uncertainty principle of Safaryan et al. 2020. Neither
says anything about one given x: sign is exact where all |x_j| are equal. Bits are 8 len(buffer),
with the checksum.
"""

import math
import sys
import zlib

import numpy as np
import torch

import fl
from codes.dithering import Dithering
from codes.elias import QSGD_Elias
from codes.natural import Natural
from compress import QSGD, Identity, RandK, Sign, TopK
from vision import data, models, split, task


def compressors(d):
    """What `run.py --compress NAME` chooses for vectors [d]: {NAME: compressor}."""
    root = round(d**0.5)
    return {
        "identity": Identity(),
        "natural": Natural(),
        "sign": Sign(),
        "topk --k 0.05": TopK(0.05),
        "randk --k 0.05 --no-scaled": RandK(0.05, scaled=False),
        "qsgd --levels 1": QSGD(levels=1),
        "qsgd-elias --levels 1": QSGD_Elias(levels=1),
        "qsgd --levels 7": QSGD(levels=7),
        "qsgd-elias --levels 7": QSGD_Elias(levels=7),
        f"qsgd-elias --levels {root} --scale l2 --bucket 0": QSGD_Elias(root, "l2", 0),
        "dithering --nu 0.9": Dithering(0.9),
        "dithering --nu 0.5": Dithering(0.5),
        "dithering --nu 0.1": Dithering(0.1),
        "dithering --nu 0.9 --no-randomized": Dithering(0.9, randomized=False),
        "dithering --nu 0.5 --no-randomized": Dithering(0.5, randomized=False),
        "dithering --nu 0.1 --no-randomized": Dithering(0.1, randomized=False),
    }


def vectors(d, seed=0):
    """Vectors of several shapes in float64, finer than any wire: {name: x [d]}."""
    g = torch.Generator().manual_seed(seed)
    gaussian, other = torch.randn(2, d, generator=g, dtype=torch.float64)
    uniform, coin, rare = torch.rand(3, d, generator=g, dtype=torch.float64)
    sign = torch.where(coin < 0.5, -1.0, 1.0).double()
    return {
        "gaussian": gaussian,
        "laplace": -uniform.log() * sign,
        "heavy": gaussian * uniform.pow(-0.6),
        "sparse": other * (rare < 0.03),
        "constant": sign,
        "one": torch.arange(d).eq(d // 2).double(),
    }


def measure(c, xs, seed=0):
    """Compressor c over vectors xs [n, d] -> (mean bits per coordinate, relative squared error)."""
    g = torch.Generator().manual_seed(seed)
    bits, error = 0, 0.0
    for x in xs:
        buffer = c.encode(x, g)
        bits += 8 * len(buffer)
        error += float((c.decode(buffer, len(x)).double() - x).square().sum())
    return bits / xs.numel(), error / float(xs.square().sum())


def above_bound(bits, error):
    """Bits per coordinate beyond what the best code with this error needs on Gaussian vectors."""
    return bits + math.log(error, 4)


def zipped(x, seed=0):
    """zlib.compress on 2-bit QSGD of x [d] -> bits per coordinate as sent, and without noise.

    The noise is the sign of a level 0, which QSGD sends although it means nothing. Encoding x_hat,
    which is on the grid and has no negative zeros, clears these signs and changes nothing else.
    """
    c, g = QSGD(levels=1), torch.Generator().manual_seed(seed)
    buffer = c.encode(x, g)
    cleared = c.encode(c.decode(buffer, len(x)), g)
    return [8 * len(zlib.compress(b.numpy())) / len(x) for b in (buffer, cleared)]


def table(x, name):
    """All compressors on three Gaussian vectors as long as x [d], and on x itself -> Markdown."""
    gaussian = torch.stack([vectors(len(x), seed)["gaussian"] for seed in range(3)])
    columns = ["`--compress`", "Gaussian: bits", "error", "above bound", f"{name}: bits", "error"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " + "| ---: " * 5 + "|"]
    for flags, c in compressors(len(x)).items():
        (bits, error), (bits_x, error_x) = measure(c, gaussian), measure(c, x[None])
        row = f"| `{flags}` | {bits:.2f} | {error:.2g} | {above_bound(bits, error):.2f} "
        lines.append(row + f"| {bits_x:.2f} | {error_x:.2g} |")
    sent, cleared = zipped(x)
    lines.append(
        f"\nzlib.compress on `qsgd --levels 1` ({name}): {sent:.2f} bits a coordinate as sent, "
        f"{cleared:.2f} with the signs of its zeros cleared."
    )
    return "\n".join(lines)


def update(rounds=5):
    """What a client really sends: its update [d] after some rounds of FedAvg, not compressed."""
    images = data.load("bundled")
    model = models.build("cnn", images.train.x.shape[1:], len(images.train.classes))
    clients = split.partition("dirichlet", images.train.y, 100)
    method = fl.FedAvg(task.Images(model, images.train, clients), lr=0.1)
    federation = fl.Federation(method, Identity())
    for _ in range(rounds):
        federation.round()
    i = federation.choose()[0]
    received = federation.send_down([i])
    buffers, _ = federation.visit("train", i, received, federation.method.lr)
    return Identity().decode(buffers["update"], len(federation.w)).double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(torch.from_numpy(np.load(sys.argv[1])) if sys.argv[1:] else update(), "update"))
