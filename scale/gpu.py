"""What does a GPU gain? Run this on one.

    python -m scale.gpu                          writes results/gpu.json
    python -m scale.gpu --small --device cpu     does it work?

It prints a row for each workload and each way to visit the clients:

    | workload | clients at once | seconds a round | gain | memory | apart |

    workload           W1 and W2 of scale/bench.py; resnet18: FedAvg, 10 clients, 20 steps of 50
                       colour images of 32 x 32 pixels
    clients at once    1: one client after the other (fl.Federation); else scale/visits.Vmap
    gain               seconds of the first row of the workload, divided by those of this row
    apart              after one round with one local step: the distance of the model from that of
                       the first row, relative to how far it moved. 2e-4 or less is rounding. After
                       many steps it would say nothing: on noise, rounding grows a thousandfold

vmap runs the convolutions of several clients as one grouped convolution. Whether that gains
anything, only a measurement says: for small networks it does if a GPU waits for many small kernels,
for large ones it may not. If a chunk does not fit, PyTorch says so; take a smaller one.

For several GPUs: `torchrun --nproc-per-node GPUS run.py ...`; compare the seconds in result.json.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

from compress import Identity
from fl import FedAvg, Federation, FedSAM
from scale.bench import noise_task, place, workload_task, write
from scale.visits import Vmap

GENTLE = {"lr": 0.05, "clip": 0}


def workloads(small, device):
    """{name: (method class, task)}."""
    batches = {"batch": 4 if small else 50, "local_steps": 1 if small else 20}
    deep = noise_task(
        "cnn" if small else "resnet18", 100, 5000, (3, 32, 32), device, batches=batches
    )
    shallow = workload_task(small, device)
    return {"W1": (FedAvg, shallow), "W2": (FedSAM, shallow), "resnet18": (FedAvg, deep)}


def rounds(federation, n):
    """Seconds of n rounds, after one that is not counted, and the GPU's peak memory in bytes."""
    gpu, seconds = federation.w.is_cuda, []
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(n + 1):
        start = time.perf_counter()
        federation.round()  # ends with numbers on the CPU, so nothing is left to wait for
        seconds.append(time.perf_counter() - start)
    return seconds[1:], torch.cuda.max_memory_allocated() if gpu else None


def federation_of(M, learnt, chunk):
    """The plain loop if chunk is 1, else vmap."""
    loop, more = (Federation, {}) if chunk == 1 else (Vmap, {"chunk": chunk})
    return loop(M(learnt, **GENTLE), Identity(), **more)


def model_after_a_step(M, learnt, chunk):
    """The global model [d] after one round with one local step."""
    short = copy.copy(learnt)
    short.local_steps = 1
    federation = federation_of(M, short, chunk)
    federation.round()
    return federation.w


def measured(name, M, learnt, chunks, n):
    """The rows of a workload; prints them."""
    rows, first = [], model_after_a_step(M, learnt, 1)
    for chunk in chunks:
        w = model_after_a_step(M, learnt, chunk)
        apart = float((w - first).norm() / (first - learnt.w0).norm())
        seconds, memory = rounds(federation_of(M, learnt, chunk), n)
        row = {"chunk": chunk, "seconds": statistics.median(seconds), "all": seconds}
        rows.append(row | {"memory": memory, "apart": apart})
        gain = rows[0]["seconds"] / row["seconds"]
        held = "-" if memory is None else f"{memory / 2**20:,.0f} MiB"
        cells = [name, chunk, f"{row['seconds']:.3f}", f"{gain:.2f}", held, f"{apart:.0e}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--small", action="store_true", help="small networks, one round")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--rounds", type=int, default=5, help="timed rounds of each row")
    p.add_argument("--out", type=Path, help="(default results/gpu.json)")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("torch sees no GPU here; --small --device cpu shows whether the program works")
    torch.backends.cudnn.allow_tf32 = False
    chunks, n = ([1, 2], 1) if args.small else ([1, 2, 5, 10], args.rounds)
    print("| workload | clients at once | seconds a round | gain | memory | apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    command = " ".join(["python -m scale.gpu", *(sys.argv[1:] if argv is None else argv)])
    found = {"command": command}
    for name, (M, learnt) in workloads(args.small, args.device).items():
        found[name] = measured(name, M, learnt, chunks, n)
        write(place(args, "gpu.json"), found)  # now: the next one may not fit, or take too long


if __name__ == "__main__":
    main()
