"""How fast is a round, against the least that PyTorch needs?

    python -m scale.bench                     W1 and W2; writes results/bench.json
    python -m scale.bench --small             does it work?

W1: FedAvg, 100 clients, 10 of them in a round, 20 steps of batch 32, cnn with 215,370 parameters,
images of 28 x 28 pixels. W2: the same with FedSAM. No evaluation and no compression. The pixels are
noise, which takes the same time as photographs and needs no download.

The floor is a bare loop of nn.Module, cross_entropy and torch.optim.SGD over the same clients and
batches. All competitors are in one process and take turns, one round each, so that what else the
machine does hits all of them alike. A ratio is ours / bare of the same turn; below 1 we are faster.
`apart` is the distance of the models at the end, relative to how far they moved. It shows that both
did the same work, and no more: on noise, rounding grows with every step.

Run it on a machine that does nothing else, and read the median.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from compress import Identity
from fl import FedAvg, Federation, FedSAM
from scale.visits import Threads, cores
from vision import data, models, task

RESULTS = Path(__file__).parents[1] / "results"
WORKLOADS = {"W1": (FedAvg, {"lr": 0.05, "clip": 0}), "W2": (FedSAM, {"lr": 0.05, "clip": 0})}


def noise_task(network, N, n, shape=(1, 28, 28), device="cpu", batches=None, **settings):
    """An image task of N clients, with n images of noise in ten classes.

    batches: settings of task.Images; settings: those of the network.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)
    mean, std = torch.full((shape[0],), 127.5), torch.full((shape[0],), 74.0)
    tensors = (part.to(device) for part in (x, torch.arange(n) % 10, mean, std))
    train = data.Images(*tensors, [str(c) for c in range(10)])
    model = models.build(network, shape, 10, device=device, **settings)
    return task.Images(model, train, torch.arange(n).tensor_split(N), **(batches or {}))


def workload_task(small, device="cpu"):
    """The task of W1 and W2."""
    size = {"width": 2, "hidden": 16} if small else {"width": 16, "hidden": 128}
    batches = {"batch": 32, "local_steps": 2 if small else 20}
    return noise_task("cnn", 100, 3200 if small else 20_000, (1, 28, 28), device, batches, **size)


# ----------------------------------------------------------------------------------- the floor


class Bare:
    """FedAvg or FedSAM in plain PyTorch; `like`, a federation, says which clients and batches."""

    def __init__(self, like, small, each=map):
        self.like, self.each, self.method = like, each, like.method
        size = (2, 16) if small else (16, 128)
        self.net = models.CNN((1, 28, 28), 10, width=size[0], hidden=size[1])
        self.set(models.unflatten(like.task.w0, [p.shape for p in self.net.parameters()]))
        train = like.task.train
        self.x, self.y = (train.x - train.mean[:, None, None]) / train.std[:, None, None], train.y

    def set(self, values):
        for p, value in zip(self.net.parameters(), values):
            p.data = value.clone(memory_format=torch.contiguous_format)

    @property
    def w(self):
        return models.flatten(p.detach() for p in self.net.parameters())

    def round(self):
        plans = [self.like.plan("train", i) for i in self.like.choose()]
        self.like.t += 1
        ends = list(self.each(self.train, plans))
        self.set(torch.stack(parameters).mean(0) for parameters in zip(*ends))

    def train(self, plan):
        net = copy.deepcopy(self.net)
        optimizer = torch.optim.SGD(net.parameters(), lr=self.method.lr)
        for batch in plan:
            x, y = self.x[batch[:, 0]], self.y[batch[:, 0]]
            self.backward(net, x, y)
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    def backward(self, net, x, y):
        gradient(net, x, y)
        if isinstance(self.method, FedSAM):
            w, g = list(net.parameters()), [p.grad.clone() for p in net.parameters()]
            length = torch.stack(torch._foreach_norm(g)).norm()
            with torch.no_grad():
                e = torch._foreach_mul(g, float(self.method.rho / length))
                torch._foreach_add_(w, e)
                with torch.enable_grad():
                    gradient(net, x, y)
                torch._foreach_sub_(w, e)


def gradient(net, x, y):
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()


# ------------------------------------------------------------------------------------- the race


def field(M, settings, small, threads):
    """All competitors: {name: (object with round(), PyTorch's threads in its turn)}."""
    learnt = workload_task(small)

    def federation(loop=Federation, **more):
        return loop(M(learnt, **settings), Identity(), **more)

    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pool = ThreadPoolExecutor(threads, **one_core)
    return {
        "bare, 1 core": (Bare(federation(), small), 1),
        "ours, 1 core": (federation(), 1),
        "bare, all cores in every operation": (Bare(federation(), small), threads),
        "bare, a client on each core": (Bare(federation(), small, pool.map), 1),
        "ours, a client on each core": (federation(Threads, threads=threads), 1),
    }


def race(competitors, rounds):
    """Seconds of the rounds of each competitor, in turns, without the first: {name: [seconds]}."""
    seconds = {name: [] for name in competitors}
    for _ in range(rounds + 1):
        for name, (competitor, threads) in competitors.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            competitor.round()
            seconds[name].append(time.perf_counter() - start)
    return {name: all_of_them[1:] for name, all_of_them in seconds.items()}


def summary(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measured(M, settings, small, rounds, threads):
    """One workload: {"seconds": ..., "ratios": ..., "apart": ...}."""
    competitors = field(M, settings, small, threads)
    seconds = race(competitors, rounds)
    ratios = {
        f"{ours} / {bare}": summary([a / b for a, b in zip(seconds[ours], seconds[bare])])
        for ours, bare in (
            ("ours, 1 core", "bare, 1 core"),
            ("ours, a client on each core", "bare, all cores in every operation"),
            ("ours, a client on each core", "bare, a client on each core"),
        )
    }
    floor, w0 = competitors["bare, 1 core"][0].w, competitors["ours, 1 core"][0].task.w0
    ends = {
        name: float((c.w - floor).norm() / (floor - w0).norm())
        for name, (c, _) in competitors.items()
    }
    return {"seconds": {n: summary(s) for n, s in seconds.items()}, "ratios": ratios, "apart": ends}


def machine():
    """What a number depends on, besides the code."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cores": os.cpu_count(), "usable": cores(), "gpu": gpu, "torch": torch.__version__}
    return found | {"processor": processor(), "python": platform.python_version()}


def processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(name, found):
    print(f"\n{name}, seconds a round: median (least to most)")
    for kind in "seconds", "ratios":
        for label, x in found[kind].items():
            print(f"  {label:64} {x['median']:.3f} ({x['least']:.3f} to {x['most']:.3f})")
    print(f"  models apart, at most: {max(found['apart'].values()):.1e}", flush=True)


def place(args, name):
    """Where the numbers go: results/NAME, but never those of --small unless --out is given."""
    return args.out or (None if args.small else RESULTS / name)


def write(path, found):
    text = json.dumps({"machine": machine()} | found, indent=1)
    if path is None:
        return print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(f"\nwritten: {path}")


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=15, help="timed rounds of each competitor")
    p.add_argument("--threads", type=int, default=cores(), help="cores to use")
    p.add_argument("--small", action="store_true", help="a small network, two rounds")
    p.add_argument("--out", type=Path, help="(default results/bench.json)")
    args = p.parse_args(argv)
    command = " ".join(["python -m scale.bench", *(sys.argv[1:] if argv is None else argv)])
    found = {"command": command, "rounds": 2 if args.small else args.rounds}
    for name, (M, settings) in WORKLOADS.items():
        found[name] = measured(M, settings, args.small, found["rounds"], args.threads)
        report(name, found[name])
    write(place(args, "bench.json"), found)


if __name__ == "__main__":
    main()
