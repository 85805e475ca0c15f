"""How fast is a round, against the least that PyTorch needs? All competitors stay alive and take turns, so noise hits all alike.

    python -m tools.bench                     W1, W2, phases, start, memory; writes results/bench.json
    python -m tools.bench --small             a look at whether it works

Workload W1: complete Fashion-MNIST, 100 clients, per-class Dirichlet(0.1), 10 clients a round, 20 SGD steps of batch 32,
lr 0.05, cnn of 215,370 parameters, plain average, no evaluation. W2: the same with SAM. The floor is a bare loop of
nn.Module and torch.optim.SGD over the same clients and batches, in one process with all cores, and in one process per core
with one thread each. Ratios are ours / floor, of rounds done one right after the other; below 1 we are faster.
"""
import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))


def workload(algo, small):
    """The settings of W1 (fedavg) or W2 (fedsam)."""
    from config import Config
    data = {"dataset": "bundled"} if small else {"dataset": "fashionmnist"}
    return Config(algo=algo, **data, partition="dirichlet-class", alpha=0.1, width=2 if small else 16, hidden=128, participation=10, local_steps=2 if small else 20, batch=32,
                  lr=0.05, clip=0.0, rho=0.05, compress="identity").check()


# ------------------------------------------------------------------------------------------------------ competitors
def bare(pipe, number, procs, algo, small):
    """The floor: modules and SGD. Every message on the pipe is one round; answers when it is done."""
    import torch
    from torch.nn import functional as F

    import experiment
    import models
    cfg = workload(algo, small)
    images, fed = experiment.compose(cfg)
    torch.set_num_threads(1 if procs > 1 else os.cpu_count())
    train = images.train
    pixels = (train.x.reshape(len(train.y), -1).float() - train.mean) / train.std       # one channel; rows of 784, PyTorch's contiguous layout
    torch.manual_seed(cfg.seed)
    net = models.cnn_module(1, 28, 28, 10, cfg.width, cfg.hidden)
    weights = list(net.parameters())
    optimizer = torch.optim.SGD(weights, lr=cfg.lr)
    server, t = [p.detach().clone() for p in weights], 0

    def backward(rows):
        optimizer.zero_grad()
        F.cross_entropy(net(pixels[rows].view(-1, 1, 28, 28)), train.y[rows]).backward()

    def sam_backward(rows):
        backward(rows)
        with torch.no_grad():
            scale = cfg.rho / torch.stack([p.grad.norm() for p in weights]).norm()
            moved = [p.grad * scale for p in weights]
            torch._foreach_add_(weights, moved)
        backward(rows)
        with torch.no_grad():
            torch._foreach_sub_(weights, moved)
    step = sam_backward if algo == "fedsam" else backward
    while pipe.recv():
        clients = fed.clients(t)
        mean = [torch.zeros_like(p) for p in server]
        for plan in fed.plans(clients, t)[number::procs]:
            with torch.no_grad():
                torch._foreach_copy_(weights, server)
            for rows in plan:
                step(rows[:, 0])
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(mean, weights, alpha=1 / len(clients))
        if procs == 1:
            server = mean
        t += 1
        pipe.send(None)
    pipe.send(models.flatten(server).numpy() if procs == 1 else None)      # two bare processes never talk: that part is left out for them


def ours(pipe, number, procs, algo, small):
    """This project, as run.py composes it. Every message on the pipe is one round."""
    import dataclasses

    import experiment
    import ranks
    if procs > 1:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(procs), LOCAL_WORLD_SIZE=str(procs), MASTER_ADDR="127.0.0.1")
        ranks.join()
    _, fed = experiment.compose(dataclasses.replace(workload(algo, small), device="cpu"))
    while pipe.recv():
        fed.round()
        pipe.send(None)
    pipe.send(fed.w.numpy())
    ranks.leave()


class Competitor:
    """A group of processes that do a round when told to."""

    def __init__(self, work, procs, algo, small):
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(["torch", "experiment"])         # imported once; elsewhere this does nothing
        self.pipes, self.processes = [], []
        for number in range(procs):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=work, args=(there, number, procs, algo, small), daemon=True))
            self.processes[-1].start()
            self.pipes.append(here)

    def ask(self, message):
        for pipe in self.pipes:
            pipe.send(message)
        return [pipe.recv() for pipe in self.pipes][0]

    def round(self):
        """-> seconds."""
        start = time.perf_counter()
        self.ask(True)
        return time.perf_counter() - start


def race(algo, rounds, small):
    """Seconds a round of all competitors, taken in turns -> {name: [seconds]}, how far our weights end from the bare loop's, accuracies."""
    cores = os.cpu_count()
    os.environ["MASTER_PORT"] = "29617"
    field = {"bare, 1 process": Competitor(bare, 1, algo, small), f"bare, {cores} processes": Competitor(bare, cores, algo, small),
             "ours, 1 process": Competitor(ours, 1, algo, small), f"ours, {cores} processes": Competitor(ours, cores, algo, small)}
    seconds = {name: [] for name in field}
    warm = 1 if small else 2
    for n in range(rounds + warm):
        for name, competitor in field.items():
            s = competitor.round()
            if n >= warm:
                seconds[name].append(s)
    w = {name: competitor.ask(False) for name, competitor in field.items()}
    reference = w["bare, 1 process"]
    apart = {n: float(((v - reference)**2).sum()**0.5 / (reference**2).sum()**0.5) for n, v in w.items() if v is not None and n.startswith("ours")}
    return seconds, apart, {n: accuracy(algo, small, v) for n, v in w.items() if v is not None}


def accuracy(algo, small, w):
    """Test accuracy of weights w [d]."""
    import torch

    import experiment
    import tasks
    images, fed = experiment.compose(workload(algo, small))
    return tasks.evaluate(fed.task.apply, torch.from_numpy(w), images.test)[1]


# ---------------------------------------------------------------------------------------------------------- phases
def phases(algo, small, **settings):
    """Where the seconds of a run go, in one thread -> {phase: seconds}; a phase does not count what it calls in another phase."""
    import dataclasses

    import config
    import experiment
    import loop
    import synth
    spent, running = {}, []

    def timed(owner, name, phase):
        inner = getattr(owner, name)

        def outer(*args, **kw):
            now = time.perf_counter()
            if running:
                spent[running[-1][0]] = spent.get(running[-1][0], 0) + now - running[-1][1]
            running.append([phase, time.perf_counter()])
            try:
                return inner(*args, **kw)
            finally:
                now = time.perf_counter()
                spent[phase] = spent.get(phase, 0) + now - running.pop()[1]
                if running:
                    running[-1][1] = now
        setattr(owner, name, outer)
        return lambda: setattr(owner, name, inner)
    cfg = dataclasses.replace(config.Config(algo=algo, threads=1, device="cpu", **settings), **({"rounds": 2, "measure_images": 100} if small else {"rounds": 60 if algo == "fedsynsam" else 15}))
    undo = [timed(loop, "local_training", "local steps"), timed(loop.Federation, "uplink", "compression and packing"),
            timed(loop.Federation, "through_wire", "compression and packing"), timed(synth, "distill_as_set", "synthesis"),
            timed(experiment, "evaluated", "evaluation"), timed(experiment, "save", "checkpoints"), timed(experiment, "conclude", "eigenvalue, alignment, figures"),
            timed(experiment.json, "dumps", "logging")]
    with tempfile.TemporaryDirectory() as folder:
        run = timed(sys.modules[__name__], "one_run", "the rest")
        try:
            sys.modules[__name__].one_run(pathlib.Path(folder), cfg)
        finally:
            for back in (run, *undo):
                back()
    return spent


def one_run(folder, cfg):
    """A whole run in a folder of its own."""
    import experiment
    experiment.execute(folder, cfg.check())


# ------------------------------------------------------------------------------------------------ start and memory
def proportional_memory(pid):
    """Bytes of a process and its children, shared pages counted once (Linux: Pss)."""
    total, todo = 0, [pid]
    while todo:
        p = todo.pop()
        try:
            total += next(int(line.split()[1]) for line in open(f"/proc/{p}/smaps_rollup") if line.startswith("Pss:")) * 1024
            todo += [int(c) for task in os.listdir(f"/proc/{p}/task") for c in open(f"/proc/{p}/task/{task}/children").read().split()]
        except (OSError, StopIteration):
            pass                                        # it ended meanwhile
    return total


def command(words):
    """One `python run.py ...` -> (seconds until the first round starts, peak memory in bytes, seconds in all)."""
    with tempfile.TemporaryDirectory() as folder:
        start, begun, peak = time.perf_counter(), None, 0
        process = subprocess.Popen([sys.executable, str(HERE / "run.py"), *words, "--out", folder, "--name", "x"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = pathlib.Path(folder) / "x" / "log.jsonl"          # opened right before the first round
        while process.poll() is None:
            if begun is None and log.exists():
                begun = time.perf_counter() - start
            if begun is not None:
                peak = max(peak, proportional_memory(process.pid))
            time.sleep(0.01 if begun is None else 0.1)
        if process.returncode:
            raise SystemExit(f"run.py {' '.join(words)} failed")
    return begun, peak, time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------- report
def middle(values):
    """Median (least to most)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=8, help="timed rounds of each competitor")
    p.add_argument("--small", action="store_true", help="bundled images, one pass: does it work?")
    p.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "bench.json")
    args = p.parse_args()
    args.rounds = 1 if args.small else args.rounds
    import experiment
    report = {"machine": experiment.machine()}
    for name, algo in (("W1", "fedavg"), ("W2", "fedsam"))[:1 if args.small else 2]:
        seconds, apart, right = race(algo, args.rounds, args.small)
        report[name] = {"seconds": seconds, "weights_apart": apart, "accuracy": right}
        print(f"\n{name}, seconds a round: median (least to most)")
        for who, values in seconds.items():
            print(f"  {who:20} {middle(values)}" + (f"   test accuracy {right[who]:.4f}" if who in right else "")
                  + (f", weights {apart[who]:.1e} (relative) from the bare loop's" if who in apart else ""))
        for floor in [n for n in seconds if n.startswith("bare")]:
            for who in [n for n in seconds if n.startswith("ours")]:
                print(f"  {who} / {floor}: {middle([a / b for a, b in zip(seconds[who], seconds[floor])])}")
    w1 = {k: v for k, v in vars(workload("fedavg", args.small)).items() if k not in ("algo", "threads", "device", "rounds", "outer_steps", "compress")}
    for name, algo, settings in (("W1 with a 2-bit uplink", "fedavg", w1), ("the default run", "fedsynsam", {}))[:1 if args.small else 2]:
        report[f"phases of {name}"] = spent = phases(algo, args.small, **settings)
        print(f"\nphases of {name}, one thread, % of {sum(spent.values()):.1f} s")
        for phase, s in sorted(spent.items(), key=lambda item: -item[1]):
            print(f"  {phase:32} {100 * s / sum(spent.values()):5.1f} %")
    print("\nstart and memory: seconds until the first round, peak MiB (shared pages once)")
    big = ["--algo", "fedsam", "--dataset", "fashionmnist", "--width", "16", "--hidden", "128", "--batch", "32", "--rounds", "3"]
    first = ["--algo", "fedavg", "--rounds", "2", *["--measure-images", "60"] * args.small]
    for words in (first, ["--algo", "fedsynsam", "--quick"], ["--algo", "fedsynsam", "--quick", "--procs", "2"], big)[:1 if args.small else 4]:
        begun, peak, _ = zip(*(command(words) for _ in range(1 if args.small else 3)))
        report["run.py " + " ".join(words)] = {"start": begun, "peak": peak}
        print(f"  {' '.join(words)}: {middle(begun)} s, {max(peak) / 2**20:.0f} MiB")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
