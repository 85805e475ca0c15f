"""Other ways to visit the clients of a round, with the same numbers as the plain loop of fl.py.

    Threads    a client on each core                                      for a CPU
    Vmap       many clients in one computation, by torch.func.vmap        for a GPU
    Ranks      each process of a torchrun takes a part of the clients     for several of them

Each overrides `Federation.visits(work, clients, received, lr)`, which yields the reply of every
client in order: its bytes and its memory. What is drawn at random depends on (seed, purpose, round,
client) only, so it does not matter who visits a client, or when.

What is equal. Threads and any number of ranks end with the bits of the plain loop, if each does an
operation on one core (`torch.set_num_threads(1)`, as run.py does, or OMP_NUM_THREADS=1): a sum that
two cores share has another order. The price is that the server's own work, such as the synthesis,
uses one core too. Vmap sums in another order, so it agrees up to rounding only.

Ranks exchange what a federation exchanges, the bytes of the clients. Each process is the whole
server: it decodes all bytes in the same order, and takes the mean. On a GPU, or on another kind of
processor, sums need not repeat; so once a round the w and the state of rank 0 replace the others'.
"""

import datetime
import io
import os
import pickle
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from fl import Federation

# ------------------------------------------------------------------------------------- threads


class Threads(Federation):
    """Federation, but the clients of a round are visited by threads of one core each.

    PyTorch lets other threads run while it computes, so m >= `threads` clients keep all cores busy.
    """

    def __init__(
        self, *args, threads: Annotated[int, "CPU threads; 0: all cores", 0, 1024] = 0, **settings
    ):
        super().__init__(*args, **settings)
        one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self.each = ThreadPoolExecutor(threads or cores(), **one_core).map

    def visits(self, work, clients, received, lr):
        return self.each(lambda i: self.visit(work, i, received, lr), clients)


def cores():
    """How many cores this process may use; the processes of a torchrun share a computer's cores."""
    everywhere = hasattr(os, "sched_getaffinity")
    usable = len(os.sched_getaffinity(0)) if everywhere else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------- vmap


class Vmap(Federation):
    """Federation, but `chunk` clients at a time are computed under torch.func.vmap.

    They need equally many batches: short plans are filled up with empty ones, which change nothing
    and cost as much as the others.
    """

    def __init__(
        self,
        *args,
        chunk: Annotated[int, "clients per vmap call; 0: all of the round", 0, None] = 0,
        **settings,
    ):
        super().__init__(*args, **settings)
        self.chunk = chunk
        self.method.gradient_of = functional_gradient

    def visits(self, work, clients, received, lr):
        chunk = self.chunk or len(clients)
        for first in range(0, len(clients), chunk):
            yield from self.at_once(work, clients[first : first + chunk], received, lr)

    def at_once(self, work, clients, received, lr):
        """The replies of some clients: [(buffers, memory)]."""

        def one(mine, batches):
            if work == "train":
                return train_padded(self.method, received, mine, batches, lr)
            return getattr(self.method, work)(received, mine, batches, lr)

        plans = [self.plan(work, i) for i in clients]
        memory = stacked([self.recall(i, received) for i in clients])
        sent, kept = torch.func.vmap(one)(memory, padded(plans))
        replies = []
        for k, i in enumerate(clients):
            # a row of kept is a view, which would keep the memory of the whole chunk alive
            mine = {name: x[k].clone() for name, x in kept.items()}
            own = {name: x[k] for name, x in sent.items()}
            replies.append(self.encode(work, i, own, mine, received, plans[k]))
        return replies


def functional_gradient(loss, w):
    """The gradient of loss(w) at w [d] -> [d], in the form that vmap can see through."""
    return torch.func.grad(loss)(w)


def stacked(memories):
    """The memories of m clients, {name: [...]} each, as one {name: [m, ...]}."""
    return {name: torch.stack([mine[name] for mine in memories]) for name in memories[0]}


def padded(plans):
    """Plans [K_i, B, 4] of m clients -> [m, K, B, 4], filled up with batches without images."""
    K = max(len(plan) for plan in plans)
    return torch.stack([pad(plan, (0, 0, 0, 0, 0, K - len(plan)), value=-1) for plan in plans])


def train_padded(method, received, mine, batches, lr):
    """FedAvg.train, where some of the batches [K, B, 4] have no images and change nothing."""
    w = method.start(received, mine)
    steps = torch.zeros_like(w[0])
    for batch in batches:
        real = (batch[:, 0] >= 0).any()
        moved, after = method.step(w, batch, received, mine, lr)
        w = torch.where(real, moved, w)
        mine = {name: torch.where(real, x, mine[name]) for name, x in after.items()}
        steps = steps + real
    return method.upload(w, received, mine, lr * steps)


# --------------------------------------------------------------------------------------- ranks


class Lost(RuntimeError):
    """Another process of the group is gone."""


class Group:
    """The processes that torchrun started: `rank`, my number, of `size`.

    Everything goes over gloo, also on GPUs: what the ranks exchange is small beside what they
    compute, and if a process dies, gloo notices at once, while nccl waits.
    """

    minutes_to_meet = 5.0

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.all = self.together(meet, self.minutes_to_meet)

    def all_gather(self, message):
        """bytes of every rank -> the list [size] of all of them, the same on every rank."""
        messages = [None] * self.size
        self.together(dist.all_gather_object, messages, message, self.all)
        return messages

    def broadcast(self, message):
        """bytes of rank 0 -> the same on every rank."""
        box = [message]
        self.together(dist.broadcast_object_list, box, 0, self.all)
        return box[0]

    def together(self, collective, *arguments):
        """Call a function of torch.distributed, which all ranks must call.  Raises Lost."""
        try:
            return collective(*arguments)
        except RuntimeError as error:  # gloo: "Connection closed by peer", and others
            reason = str(error).splitlines()[0][:120]
            raise Lost(
                f"process {self.rank} of {self.size} lost the others: one of them has ended, "
                f"and its own message says why ({reason})"
            ) from None


def meet(minutes):
    """Wait for all processes that torchrun started -> their group.

    They must come within some minutes. Later they may wait for a day, while rank 0 evaluates.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=minutes))
    return dist.new_group(timeout=datetime.timedelta(days=1))


def leave():
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks(Federation):
    """Federation, but rank r of P visits the clients number r, r + P, r + 2 P, ... of the round.

    All ranks must be started with the same settings. If a client fails, all raise its error.
    """

    def __init__(self, *args, group=None, **settings):
        super().__init__(*args, **settings)
        self.group = group or Group()

    def visits(self, work, clients, received, lr):
        r, P, replies, error = self.group.rank, self.group.size, [], None
        try:
            replies = list(super().visits(work, clients[r::P], received, lr))
        except Exception as problem:
            problem.add_note(f"rank {r} of {P} says:\n{traceback.format_exc()}")
            error = portable(problem)
        everyone = self.group.all_gather(to_bytes((replies, error)))
        everyone = [from_bytes(message, self.w.device) for message in everyone]
        for _, error in everyone:
            if error:
                raise error
        return [everyone[k % P][0][k // P] for k in range(len(clients))]

    def send_down(self, clients):
        server = self.group.broadcast(to_bytes((self.w, self.method.state)))
        self.w, self.method.state = from_bytes(server, self.w.device)
        return super().send_down(clients)


class ThreadRanks(Ranks, Threads):
    """Ranks that have several cores each."""


class VmapRanks(Ranks, Vmap):
    """Ranks that have a GPU each."""


def to_bytes(thing):
    """Tensors, lists, dicts, exceptions -> bytes."""
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def from_bytes(message, device):
    """The inverse of `to_bytes`. Tensors move to the device: that of the sender may be another."""
    return torch.load(io.BytesIO(message), map_location=device, weights_only=False)


def portable(error):
    """The error, or if it cannot be sent to other processes, one with the same text."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            other.add_note(note)
        return other
