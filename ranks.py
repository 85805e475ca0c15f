"""Several processes share the work of a round.

    python run.py --procs 4 ...                      on one computer: four processes, started by torch.multiprocessing
    torchrun --nproc-per-node 4 run.py ...           the same through torchrun; one process per GPU, or per few CPU cores

The processes are numbered: rank 0, 1, ..., P - 1. Rank 0 is the server: it alone keeps the state of the run, synthesises,
moves w and writes files. All ranks are clients: each trains and compresses its share of the m clients of a round. What a
client needs to know reaches it as in life, from the server: the model, the other vectors of the method, its own memory rows.
What the ranks decoded is added up, so P processes give the result of one up to the order of a sum.

    served     only the server works; if it fails, everybody fails with the same error
    gathered   everybody works; if one fails, everybody fails with the same error
    tell       an object, from the server to everybody        from_server, total   the same for a tensor; the sum of tensors

Outside a group (one process) each of them does the obvious thing without any communication, so the loop (loop.py) is written
once. An error that one rank alone meets is carried to all by `served` and `gathered`; a rank that dies closes its connections,
and then the others raise `Lost` instead of waiting for ever.

Source: torch.distributed (gloo on CPUs, nccl on GPUs). Read next: tasks.py.
"""
import datetime
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = datetime.timedelta(days=1)                # the others wait while the server synthesises; death is noticed at once


class Lost(RuntimeError):
    """Another process of the group is gone."""


def rank():
    """My number, 0 for the server: -> int []."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """Number of processes P: -> int []."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """My number among the processes of this computer: -> int []."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def local_size():
    """Number of processes of the group on this computer: -> int []."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if dist.is_initialized() else 1


def join():
    """Enter the group that a launcher announced in the environment, if there is one.

    nccl if every process of this computer has a GPU of its own, else gloo.  Source: torch.distributed, env://.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        dist.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE)


def leave():
    """Leave the group, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def talk(collective, *args):
    """Do one collective operation of torch.distributed; Lost if a process is gone."""
    try:
        return collective(*args)
    except RuntimeError as error:                     # what gloo and nccl raise when a connection closes or times out
        raise Lost(f"process {rank()} of {size()} lost the others; one of them died or was killed ({str(error).splitlines()[0][:120]})") from None


# ------------------------------------------------------------------------------------------------------- the words
def tell(thing):
    """The server's `thing`, any object that pickles (tensors [...] on the CPU): -> the same on every rank."""
    if size() == 1:
        return thing
    box = [thing]
    talk(dist.broadcast_object_list, box, 0)
    return box[0]


def served(work):
    """work() on the server alone -> its result there, None elsewhere; an exception is raised on every rank."""
    result = error = None
    if rank() == 0:
        try:
            result = work()
        except Exception as e:
            error = e
    error = tell(error)
    if error is not None:
        raise error
    return result


def gathered(work):
    """work() on every rank -> the list of all results [P]; the first exception, in the order of ranks, is raised on every rank."""
    if size() == 1:
        return [work()]
    mine, all_of_them = (None, None), [None] * size()
    try:
        mine = work(), None
    except Lost:
        raise
    except Exception as error:
        mine = None, error
    talk(dist.all_gather_object, all_of_them, mine)
    for _, error in all_of_them:
        if error is not None:
            raise error
    return [result for result, _ in all_of_them]


def from_server(x):
    """A tensor [...] of the server: -> the same on every rank; the others give one of the right shape."""
    if size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    talk(dist.broadcast, x, 0)
    return x


def total(x):
    """The sum over ranks of tensors [...]: -> the same on every rank, bit for bit."""
    if size() > 1:
        talk(dist.all_reduce, x)
    return x


def share(costs):
    """Deal m pieces of work out: the dearest first, each to the rank with the least so far.  costs [m] -> my places, in order.

    With equal costs it is the deal of a card game, place c to rank c mod P.  Source: Graham 1969 (longest processing time).
    """
    load, mine = [0.0] * size(), []
    for place in sorted(range(len(costs)), key=lambda c: -costs[c]):
        poorest = load.index(min(load))
        load[poorest] += costs[place]
        if poorest == rank():
            mine.append(place)
    return sorted(mine)


# ------------------------------------------------------------------------------------------------------- launching
def launch(main, procs, gpu=False):
    """Run main() in `procs` processes of this computer -> the exit code: 0, or that of the first that failed.

    Processes are forked, so they start at once and share what was imported; where there is no fork, or a GPU is used (which
    does not survive a fork), they are started afresh. main must be importable, and nothing may be computed before.
    """
    with socket.socket() as s:                        # a port that is free now
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = "fork" if hasattr(os, "fork") and os.uname().sysname == "Linux" and not gpu else "spawn"
    try:
        torch.multiprocessing.start_processes(member, (main, procs, port), procs, start_method=how)
    except torch.multiprocessing.ProcessExitedException as stop:
        if stop.signal_name:
            raise Lost(f"process {stop.error_index} of {procs} was killed ({stop.signal_name}); the others were stopped") from None
        return stop.exit_code
    return 0


def member(number, main, procs, port):
    """One process of `launch`: announce the group as torchrun would, and run main()."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(procs), LOCAL_WORLD_SIZE=str(procs),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = main()
    if code:
        raise SystemExit(code)
