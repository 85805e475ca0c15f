"""Bits against error: every compressor on the same vectors, beside the least error that any code can have.

    python -m tools.tradeoff            the table of the README, a quarter of a minute

A code that spends b bits on the mean leaves of a vector x of d independent Gaussian numbers at least E||x_hat - x||^2 >=
4^(-b/d) E||x||^2 (Shannon's rate-distortion function). The same inequality for the worst x of a ball is the uncertainty
principle of Safaryan et al. 2020. Neither says anything about one given x: sign is exact where all |x_j| are equal.
Bits are 8 len(buffer), checksum included.
"""
import math

import torch

import config
import experiment
import run

SETTINGS = ("identity", "natural", "sign", "topk --k 0.05", "randk --k 0.05 --no-scaled",
            "qsgd --levels 1", "qsgd --levels 1 --code elias", "qsgd --levels 1 --code runs", "qsgd --levels 7", "qsgd --levels 7 --code elias",
            "qsgd --levels 7 --code runs", "qsgd --levels {root} --scale l2 --bucket 0 --code elias",
            "dithering --nu 0.9", "dithering --nu 0.5", "dithering --nu 0.1",
            "dithering --nu 0.9 --no-randomized", "dithering --nu 0.5 --no-randomized", "dithering --nu 0.1 --no-randomized")


def compressors(d):
    """What `python run.py --compress ...` would use for vectors [d], at each of SETTINGS -> {settings: compressor}."""
    names = [s.format(root=round(d ** 0.5)) for s in SETTINGS]
    return {name: config.compressor(run.configs_of(run.parser().parse_args(["--compress", *name.split()]))[0], d) for name in names}


def vectors(d, seed=0):
    """Vectors of several shapes in float64, finer than any wire -> {name: x [d]}."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.rand(d, generator=g, dtype=torch.float64)                                          # noqa: E731
    sign = lambda: (rand() < 0.5).double() * 2 - 1                                                          # noqa: E731
    gaussian = torch.randn(d, generator=g, dtype=torch.float64)
    return {"gaussian": gaussian, "laplace": -rand().log() * sign(), "heavy": gaussian * rand().pow(-0.6),
            "sparse": torch.randn(d, generator=g, dtype=torch.float64) * (rand() < 0.03), "constant": sign()}


def measure(c, xs, seed=0):
    """Compressor c over vectors xs [n, d] -> (mean bits per coordinate, sum of squared errors / sum of squares)."""
    g, bits, error = torch.Generator().manual_seed(seed), 0, 0.0
    for x in xs:
        buffer = c.encode(x, g)
        bits += 8 * len(buffer)
        error += float((c.decode(buffer, len(x)).double() - x).square().sum())
    return bits / xs.numel(), error / float(xs.square().sum())


def above_bound(bits, error):
    """Bits per coordinate more than the best code with this relative error needs: bits - log4(1 / error)."""
    return bits + math.log(error, 4)


def update(rounds=5):
    """What a client really sends: its update [d] after some rounds of FedAvg at the default settings, uncompressed."""
    cfg = config.Config(algo="fedavg", compress="identity", device="cpu", rounds=rounds + 1).check()
    _, fed = experiment.compose(cfg)
    for _ in range(rounds):
        fed.round()
    client = fed.clients(rounds)[:1]
    return next(fed.each_client(fed.w, fed.recall(client, fed.w), fed.plans(client, rounds), rounds, lambda place, sent, kept: sent[0])).double()


def table(x):
    """Bits and errors of all compressors on three Gaussian vectors as long as x [d], and on x -> text, as the README has it."""
    gaussian = torch.stack([vectors(len(x), seed)["gaussian"] for seed in range(3)])
    out = ["| `--compress` | Gaussian: bits a coordinate | relative error | bits above the bound | update: bits a coordinate | relative error |",
           "| --- " * 6 + "|"]
    for name, c in compressors(len(x)).items():
        (bits, error), (bits_x, error_x) = measure(c, gaussian), measure(c, x[None])
        out.append(f"| `{name}` | {bits:.2f} | {error:.2g} | {above_bound(bits, error):.2f} | {bits_x:.2f} | {error_x:.2g} |")
    return "\n".join(out)


if __name__ == "__main__":
    print(table(update()))
