"""What does a GPU gain? Seconds a round for one client after the other and for chunks of clients under vmap, and for what else runs there.

    python -m tools.gpu                            everything (not timed yet: no GPU was at hand); writes results/gpu.json
    python -m tools.gpu --small --device cpu       a look at whether it works

    W1, W2       FedAvg and FedSAM with the cnn of 215,370 parameters: 100 clients, 10 a round, 20 steps of batch 32 (tools/bench.py)
    resnet18     FedAvg on images of CIFAR-10's shape: 100 clients, 10 a round, 5 epochs of batch 50
    synthesis    FedSynSAM's: 150 images, 20 inner steps, convnet; outer steps are alike, so seconds are those of 3,000 as extrapolated
    measuring    evaluation of 10,000 images and the top eigenvalue on 2,000, resnet18

The pixels are noise, for they do not change the time and need no download. chunk 1 is the eager loop, one client after the other; its
seconds divided by a row's are the row's gain. `busy` is the share of the time in which the GPU had work, as nvidia-smi samples it
five times a second. A chunk that does not fit is halved by the loop, and the table says what it was halved to.
"""
import argparse
import dataclasses
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import config                                    # noqa: E402
import experiment                                # noqa: E402
import sharpness                                 # noqa: E402
import synth                                     # noqa: E402
import tasks                                     # noqa: E402
from tools.bench import workload                 # noqa: E402
from tools.growth import noise                   # noqa: E402


class Watch:
    """How busy the GPU is, and how much of its memory is taken, while a `with` lasts: .seconds, .busy (0..1 or None), .memory (bytes)."""

    def __enter__(self):
        self.sampler = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if shutil.which("nvidia-smi"):
                mine = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
                self.sampler = subprocess.Popen(["nvidia-smi", mine, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"],
                                                stdout=subprocess.PIPE, text=True)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds, self.busy = time.perf_counter() - self.start, None
        self.memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        if self.sampler is not None:
            self.sampler.terminate()
            samples = [float(x) for x in self.sampler.communicate()[0].split() if x.replace(".", "").isdigit()]
            self.busy = statistics.fmean(samples) / 100 if samples else None


def rounds(cfg, n):
    """n rounds after two to warm up -> dict: seconds of each, clients a chunk in the end, busy, memory."""
    _, fed = experiment.compose(cfg.check())
    fed.round()
    fed.round()
    seconds = []
    with Watch() as all_of_it:
        for _ in range(n):
            start = time.perf_counter()
            fed.round()                                                 # ends with buffers on the CPU, so nothing is left to wait for
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "chunk": fed.chunk, "busy": all_of_it.busy, "memory": all_of_it.memory}


def training(name, cfg, chunks, n):
    """A workload with every chunk, and the largest in bfloat16 -> list of rows; prints them."""
    found = []
    for chunk, extra in [*((c, {}) for c in chunks), (1, {"bf16": True}), (chunks[-1], {"bf16": True})]:
        row = {"workload": name, "asked": chunk, **extra, **rounds(dataclasses.replace(cfg, chunk=chunk, **extra), n)}
        found.append(row)
        gain = statistics.median(found[0]["seconds"]) / statistics.median(row["seconds"])
        busy, memory = ("-" if row[k] is None else form(row[k]) for k, form in (("busy", "{:.0%}".format), ("memory", lambda b: f"{b / 2**20:,.0f} MiB")))
        print(f"| {name} | {row['chunk']}{' bf16' if extra else ''} | {statistics.median(row['seconds']):.3f} ({min(row['seconds']):.3f} to {max(row['seconds']):.3f}) "
              f"| {gain:.2f} | {busy} | {memory} |", flush=True)
    return found


def single(name, work, times=1):
    """Seconds of work(), which is done once before -> dict; times: what they are multiplied by."""
    work()
    with Watch() as w:
        work()
    print(f"{name}: {times * w.seconds:.2f} s", flush=True)
    return {"what": name, "seconds": times * w.seconds, "busy": w.busy, "memory": w.memory}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="a small network, few steps: does it work?")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--rounds", type=int, default=5, help="timed rounds of each row")
    p.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "gpu.json")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("torch sees no GPU here; --small --device cpu shows whether the program works")
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds} leaves nothing to time; it must be at least 1")
    small, n = args.small, 1 if args.small else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        grey = noise(f"{folder}/grey.npz", 3000 if small else 60_000, (28, 28), 100)
        colour = noise(f"{folder}/colour.npz", 3000 if small else 50_000, (32, 32, 3), 100 if small else 10_000)
        here = {"device": args.device, "val": 10, "participation": 2 if small else 10}
        deep = config.Config(algo="fedavg", model="cnn" if small else "resnet18", local_epochs=1 if small else 5, batch=50, partition="iid", lr=0.05, clip=0.0,
                             compress="identity", dataset=colour, **here)
        print("| workload | clients a chunk | seconds a round | gain over chunk 1 | busy | memory |\n| --- | --- | --- | --- | --- | --- |")
        table = [row for name, cfg in (("W1", dataclasses.replace(workload("fedavg", small), dataset=grey, **here)),
                                       ("W2", dataclasses.replace(workload("fedsam", small), dataset=grey, **here)), ("resnet18", deep))
                 for row in training(name, cfg, (1, 2) if small else (1, 2, 5, 10), n)]
        images, fed = experiment.compose(deep.check())
        whole = images.train._replace(x=images.train.x[:60 if small else 2000], y=images.train.y[:60 if small else 2000])
        others = [single("evaluation of the test images", lambda: tasks.evaluate(fed.task.apply, fed.w, images.test)),
                  single(f"top eigenvalue on {len(whole.y):,} images", lambda: sharpness.top_eigenvalue(fed.task.apply, fed.w, whole))]
        images, fed = experiment.compose(dataclasses.replace(deep, model="cnn" if small else "convnet").check())
        trajectory = [fed.w + 0.01 * t * torch.ones_like(fed.w) for t in range(5)]                     # anything that moves
        settings, steps = config.Config(ipc=1 if small else 15, inner_steps=2 if small else 20, outer_steps=2 if small else 100, window=3), 3000
        others.append(single(f"synthesis of {10 * settings.ipc} images, {steps:,} outer steps (extrapolated from {settings.outer_steps})", lambda: synth.distill_as_set(
            fed.task.apply, trajectory, images.train.x.shape[1:], 10, settings, torch.Generator().manual_seed(0), False), steps / settings.outer_steps))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    experiment.write(args.out, json.dumps({"machine": experiment.machine(), "training": table, "others": others}, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
