"""How do seconds and memory grow, from 100 to 1,000,000 clients? Where does it bend, and why?

    python -m scale.growth                    all points; writes results/growth.json
    python -m scale.growth --small            does it work?

    clients in all      N = 100 ... 1,000,000, ten of them in a round. SCAFFOLD, whose clients
                        remember a vector [d]; one image of 8 x 8 pixels each
    clients per round   m = 10 ... 1,000 of 1,000, FedAvg, one step
    parameters          d = 2,395 ... 11,172,810, FedAvg, two clients, one step

One quantity grows in each series, and every point is measured in a fresh process, on one core.
`round` is the median; `memory` is the peak of the process above what it held after the imports.

What bends, and why:
* N. A round draws a permutation of all N clients and sums their weights, so it is linear in N in
  the end, and the task holds a Python object for each client. Clients that were never chosen have
  no memory: that grows with the number of clients seen, about m * rounds, and not with N.
* m. A round is linear in m. The plain loop holds one client's reply at a time. Threads, vmap and
  ranks hold those of the whole round (vmap: of a chunk), so m * d numbers bound what fits.
* d. Training is linear in d at best. The memory is a small multiple of d, and under Distilling
  `warmup` models more.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from compress import QSGD
from fl import SCAFFOLD, FedAvg, Federation
from scale.bench import noise_task, place, write

METHODS = {"fedavg": FedAvg, "scaffold": SCAFFOLD}


def peak():
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def point(method, network, N, m, n, shape, rounds, **settings):
    """One point: {"d", "compose": seconds before the first round, "round": seconds, "memory"}."""
    torch.set_num_threads(1)
    before, start = peak(), time.perf_counter()
    learnt = noise_task(network, N, n, shape, batches={"batch": 4, "local_steps": 1}, **settings)
    federation = Federation(METHODS[method](learnt), QSGD(), participation=m)
    compose, seconds = time.perf_counter() - start, []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        federation.round()
        seconds.append(time.perf_counter() - start)
    found = {"compose": compose, "round": statistics.median(seconds[1:])}
    return found | {"d": len(federation.w), "memory": peak() - before}


def measured(**settings):
    """`point` in a fresh process."""
    command = [sys.executable, "-m", "scale.growth", "--point", json.dumps(settings)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{settings} failed: {done.stderr}")
    found = settings | json.loads(done.stdout)
    keys = ("N", "m", "d")
    sizes = ", ".join(f"{key} = {found[key]:,}" for key in keys)
    memory = found["memory"] / 2**20
    text = f"{found['round']:.3f} s a round, {memory:.0f} MiB, composed in {found['compose']:.2f} s"
    print(f"  {sizes}: {text}", flush=True)
    return found


def series(small):
    """All points: {name of the series: [dict]}."""
    tiny = {"network": "mlp", "shape": (1, 8, 8), "hidden": 32}
    many = [100] if small else [100, 1000, 10_000, 100_000, 1_000_000]
    per_round = [10] if small else [10, 100, 1000]
    networks = [("mlp", {"hidden": 3}), ("mlp", {}), ("cnn", {"width": 16, "hidden": 128})]
    networks += [("cnn", {"width": 32, "hidden": 512}), ("resnet18", {})]
    two = {"method": "fedavg", "N": 2, "m": 2, "n": 100, "shape": (1, 28, 28), "rounds": 5}
    some = {"method": "fedavg", "N": 1000, "n": 10_000, "rounds": 3, **tiny}
    all_of_them = {"method": "scaffold", "m": 10, "rounds": 20, **tiny}
    return {
        "clients in all": [measured(N=N, n=N, **all_of_them) for N in many],
        "clients per round": [measured(m=m, **some) for m in per_round],
        "parameters": [
            measured(network=name, **two, **more) for name, more in networks[: 1 if small else None]
        ],
    }


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--small", action="store_true", help="one point of each series")
    p.add_argument("--out", type=Path, help="(default results/growth.json)")
    p.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.point:
        print(json.dumps(point(**args.point)))
        return
    write(
        place(args, "growth.json"),
        {"command": "python -m scale.growth", "points": series(args.small)},
    )


if __name__ == "__main__":
    main()
