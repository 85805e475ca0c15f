"""Which device computes, and how the clients of a round are visited on it."""

import os
from typing import Annotated, Literal

import torch

import fl
from scale import faults, visits


class Machine:
    """The settings that change seconds and not the experiment (and threads, chunk of scale/)."""

    device: Annotated[Literal["auto", "cpu", "cuda"], "where to compute"] = "auto"
    visit: Annotated[Literal["auto", "plain", "threads", "vmap"], "how clients are visited"] = (
        "auto"
    )
    checkpoint_every: Annotated[int, "rounds between checkpoints", 1, None] = 5


MACHINE = (Machine, visits.Threads, visits.Vmap)


def device_of(wanted):
    """The torch.device. Sets torch, too: one thread for one operation, and true float32."""
    torch.set_num_threads(1)  # the threads of scale/ use the other cores
    torch.backends.cudnn.allow_tf32 = False
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and not gpus:
        raise ValueError("device = cuda, but torch sees no GPU here; use auto or cpu")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    torch.cuda.set_device(device)
    return device


def visitor_of(settings, device):
    """How the clients of a round are visited: (a class like fl.Federation, its arguments)."""
    how = settings["visit"]
    if how == "auto":
        how = "vmap" if device.type == "cuda" else "threads"
    alone = {"plain": fl.Federation, "threads": visits.Threads, "vmap": visits.Vmap}
    ranks = {"plain": visits.Ranks, "threads": visits.ThreadRanks, "vmap": visits.VmapRanks}
    wanted = {"plain": (), "threads": ("threads",), "vmap": ("chunk",)}[how]
    visitor = (ranks if "WORLD_SIZE" in os.environ else alone)[how]
    if settings["on_bad_client"] == "drop" or settings["dropout"]:
        visitor = type("Tolerant" + visitor.__name__, (faults.Tolerant, visitor), {})
        wanted += ("on_bad_client", "dropout")
    return visitor, {name: settings[name] for name in wanted}
