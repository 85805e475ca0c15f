"""How do seconds and memory grow? One quantity at a time, each point in a fresh process.

    python -m tools.growth               all points, about ten minutes on two cores: tables, results/growth.json and growth.png
    python -m tools.growth --small       a look at whether it works

    clients per round   10 to 1,000 of 1,000, on the bundled images
    clients in all      100 to 100,000, ten per round, with a method that remembers one vector per client (fedlesam); tiny random images
    parameters          mlp to resnet18: one local step, one message through encode and decode
    processes           1 to 4 on this machine's cores

`memory` is what the process holds at its peak above what it held after importing torch.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))


def resident(kind="VmRSS"):
    """This process's memory in bytes now (VmRSS), or at its peak (VmHWM); Linux."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024


def noise(path, n, shape, test):
    """n training and `test` test images of a shape [H, W] or [H, W, C], ten classes in turn, in a file of Keras's layout -> its path."""
    import numpy as np
    rng = np.random.default_rng(0)
    pixels = lambda m: rng.integers(0, 256, (m, *shape), dtype=np.uint8)                               # noqa: E731
    np.savez(path, x_train=pixels(n), y_train=np.arange(n) % 10, x_test=pixels(test), y_test=np.arange(test) % 10)
    return str(path)


def point(rounds=3, images=0, **settings):
    """Some rounds with these settings -> dict of seconds to compose, seconds a round (the fastest), peak memory."""
    import torch

    import config
    import experiment
    import ranks
    ranks.join()
    before, start = resident(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if images:
            settings["dataset"] = noise(f"{folder}/tiny.npz", images + 10, (8, 8), 100)                 # ten are held out; all clients have some
            start = time.perf_counter()
        cfg = config.Config(device="cpu", rounds=10**6, **settings).check()
        _, fed = experiment.compose(cfg)
        fed.memory.file = pathlib.Path(folder) / "memory.bin" if cfg.memory_file and ranks.rank() == 0 else None
        composed, seconds = time.perf_counter() - start, []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            fed.round()
            seconds.append(time.perf_counter() - start)
        out = {"compose": composed, "round": min(seconds[1:]), "memory": resident("VmHWM") - before, "d": len(fed.w), "rows": len(fed.memory.table),
               "ranks": ranks.size(), "torch": torch.__version__}
    ranks.leave()
    return out


def measured(**settings):
    """`point` in a fresh process (or in `procs` of them, then of the server)."""
    procs = settings.pop("ranks", 1)
    code = ("import json, os, sys, tools.growth as g\nout = g.point(**json.loads(sys.argv[1]))\n"
            "if os.environ.get('RANK', '0') == '0': print(json.dumps(out))")
    words = [sys.executable, "-c", code, json.dumps(settings)]
    environments = [{**os.environ, **({} if procs == 1 else {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(procs), "LOCAL_WORLD_SIZE": str(procs),
                                                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"})} for r in range(procs)]
    running = [subprocess.Popen(words, cwd=HERE, env=e, stdout=subprocess.PIPE, text=True) for e in environments]
    texts = [p.communicate()[0] for p in running]
    if any(p.returncode for p in running):
        raise SystemExit(f"failed: {settings}")
    out = json.loads(texts[0].splitlines()[-1])
    print(f"  {settings} -> {out['round']:.3f} s a round, {out['memory'] / 2**20:.0f} MiB, composed in {out['compose']:.2f} s", flush=True)
    return {**settings, **out}


def series(small):
    """All points -> {name: list of dicts}."""
    step = {"local_steps": 5, "compress": "qsgd"}
    per_round = (10,) if small else (10, 30, 100, 300, 1000)
    in_all = (100,) if small else (100, 1000, 10_000, 100_000)
    networks = [("mlp", {}), ("cnn", {}), ("cnn", {"width": 16, "hidden": 128}), ("convnet", {}), ("cnn", {"width": 32, "hidden": 512}), ("resnet18", {})]
    active = {"rounds": 3 if small else 30, "algo": "fedlesam", "model": "mlp", "hidden": 32, "batch": 4, "local_steps": 1, "partition": "iid", "val": 10}
    return {
        "clients per round": [measured(algo="fedavg", clients=1000, participation=m, partition="iid", **step) for m in per_round],
        "clients in all": [measured(images=n, clients=n, participation=10, **active) for n in in_all],
        "active clients": [measured(**{**active, "rounds": 3}, images=10_000, clients=10_000, participation=1000 * k, memory_file=f) for k in (() if small else (1, 3, 10)) for f in (False, True)],
        "parameters": [measured(algo="fedavg", clients=20, participation=2, partition="iid", model=m, threads=1, **{**step, "local_steps": 1, "batch": 4}, **kw) for m, kw in (networks[:1] if small else networks)],
        "processes": [measured(algo="fedsam", clients=100, participation=12, ranks=p, **step) for p in ((2,) if small else (1, 2, 3, 4))]}


def figure(path, found):
    """Four log-log panels: seconds a round and memory against each quantity, with a line of slope 1."""
    from tools import plot
    plt = plot.pyplot()
    drawing, axes = plt.subplots(1, 4, figsize=(15, 3.6))
    for axis, (name, key, label) in zip(axes, (("clients per round", "participation", "clients per round"), ("clients in all", "clients", "clients in all"),
                                               ("parameters", "d", "parameters"), ("processes", "ranks", "processes"))):
        rows = sorted(found[name], key=lambda r: r[key])
        x = [r[key] for r in rows]
        axis.plot(x, [r["round"] for r in rows], "o-", color="#0072B2", label="seconds a round")
        axis.plot(x, [r["memory"] / 2**30 for r in rows], "s-", color="#D55E00", label="memory (GiB)")
        if name == "clients in all":
            axis.plot(x, [r["compose"] for r in rows], "^-", color="#009E73", label="seconds to start")
        if name != "processes":                             # one process already uses all cores, with threads
            axis.plot(x, [rows[0]["round"] * v / x[0] for v in x], ":", color="#888888", label="linear")
        axis.set(xscale="log", yscale="log", xlabel=label)
        if name != "parameters":
            axis.set(xticks=x, xticklabels=[f"{v:,}" for v in x])
        axis.minorticks_off()
        axis.tick_params(axis="x", labelrotation=30)
        axis.legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def table(found):
    """The points as Markdown."""
    out = []
    for name, rows in found.items():
        if not rows:
            continue
        keys = {"clients per round": ["participation"], "clients in all": ["clients"], "active clients": ["participation", "memory_file", "rows"],
                "parameters": ["model", "d"], "processes": ["ranks"]}[name]
        out += ["", f"| {name}: " + " | ".join([*keys, "seconds a round", "memory MiB", "seconds to start"]) + " |", "| --- " * (len(keys) + 3) + "|"]
        out += ["| " + " | ".join([*(f"{r[k]:,}" if isinstance(r[k], int) and not isinstance(r[k], bool) else str(r[k]) for k in keys), f"{r['round']:.3f}",
                                   f"{r['memory'] / 2**20:.0f}", f"{r['compose']:.2f}"]) + " |" for r in rows]
    return "\n".join(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="few points: does it work?")
    p.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="folder for growth.json and growth.png")
    args = p.parse_args()
    import experiment
    found = series(args.small)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "growth.json").write_text(json.dumps({"machine": experiment.machine(), "points": found}, indent=1) + "\n")
    figure(args.out / "growth.png", found)
    print(table(found))


if __name__ == "__main__":
    main()
