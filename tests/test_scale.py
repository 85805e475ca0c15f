"""Tests of scale/, of check_method and of the toys.

The processes of a group are forked from one fresh interpreter, which has imported torch once.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import torch

from compress import Identity, TopK
from fl import SCAFFOLD, FedAvg, Federation, FedLESAM, FedSAM, FedSynSAM, autograd, rng
from methods.adam import FedAvg_Adam
from methods.alignment import FedGA, GradAlign
from methods.combinations import FedSMOO
from methods.drift import FedDyn
from methods.fedsynth import FedSynth
from plumbing.settings import parts
from scale import bench, gpu, growth, visits
from synth import Synthetic
from tests import check_method as check
from tests.toys import Linear, Quadratics, f64, normal

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------- the toys


def test_quadratics_have_the_gradient_and_the_minimum_that_they_say():
    a, b = normal(3, 4).abs() + 0.5, normal(3, 4, seed=1)
    task = Quadratics(a, b, K=[1, 2, 3], sizes=[2, 1, 3], noise=1.0)
    w, total = normal(4, seed=2), torch.zeros(4, dtype=f64)
    for i in range(3):
        g = mean_gradient(task, i, w)
        assert torch.allclose(g, task.gradient(i, w))
        total = total + task.gradient(i, task.optimum)
        assert len(task.plan(i, rng(0, "x"))) == task.steps(i) == i + 1
    assert torch.allclose(total, torch.zeros(4, dtype=f64))


def mean_gradient(task, i, w):
    """The gradient over all images of a client: each batch weighted by its number of images."""
    batches = task.everything(i)
    images = (batches[..., 0] >= 0).sum(1)
    assert images.sum() == task.sizes[i]
    gradients = [autograd(lambda v: task.loss(v, batch), w) for batch in batches]
    return sum(n * g for n, g in zip(images, gradients)) / images.sum()


def test_linear_is_the_mean_cross_entropy_of_the_images_that_are_there():
    task = Linear()
    for i in range(5):
        x, y = task.x[task.images[i]], task.y[task.images[i]]
        scores = x.flatten(1) @ task.w0[:48].view(3, 16).T + task.w0[48:]
        p = (scores - scores.logsumexp(1, keepdim=True)).exp()
        p[range(len(y)), y] -= 1  # d loss / d scores
        expected = torch.cat([(p.T @ x.flatten(1)).flatten(), p.sum(0)]) / len(y)
        assert torch.allclose(mean_gradient(task, i, task.w0), expected)
        plan = task.plan(i, rng(0, "x"))
        assert len(plan) == task.steps(i) and (plan[..., 0] >= 0).sum() == task.sizes[i]
    assert task.y[task.balanced(6, rng(0, "x"))[:, 0]].tolist() == [0, 0, 1, 1, 2, 2]


# --------------------------------------------------------------------------------- threads and vmap


def ten_rounds(M, loop=Federation, compressor=None, rounds=10, task=None, settings=(), **more):
    method = M(task or Linear(), 1, **dict(settings))
    federation = loop(method, compressor or Identity(f64), participation=3, **more)
    return check.run(federation, rounds)


WAYS = [(visits.Threads, {"threads": 3}), (visits.Vmap, {"chunk": 1}), (visits.Vmap, {"chunk": 2})]
WAYS += [(visits.Vmap, {})]


@pytest.mark.parametrize("loop, more", WAYS)
@pytest.mark.parametrize("M", [FedSAM, SCAFFOLD, FedLESAM, FedDyn])
def test_other_visits_give_the_numbers_of_the_plain_loop_with_error_feedback(M, loop, more):
    both = {"compressor": TopK(5, f64), "error_feedback": "on", "average": "size"}
    both["settings"] = {"weight_decay": 0.1}
    plain, other = check.end(ten_rounds(M, **both)), check.end(ten_rounds(M, loop, **both, **more))
    assert check.same(plain, other, check.close if loop is visits.Vmap else torch.equal)
    assert not torch.equal(plain["the model"], Linear().w0)


def test_empty_batches_change_nothing_not_even_by_weight_decay():
    method = FedSAM(Linear(), weight_decay=0.5, lr=0.3)
    received, plan = {"w": method.task.w0}, method.task.plan(1, rng(0, "x"))
    empty = torch.full((4, 4, 4), -1)
    sent, _ = method.train(received, {}, plan, 0.3)
    for batches in plan, torch.cat([plan, empty]):
        padded, _ = visits.train_padded(method, received, {}, batches, 0.3)
        assert torch.equal(sent["update"], padded["update"])


def test_vmap_calls_hold_chunk_clients(monkeypatch):
    sizes, vmap = [], torch.func.vmap

    def counted(f):
        def outer(memory, plans):
            sizes.append(len(plans))
            return vmap(f)(memory, plans)

        return outer

    monkeypatch.setattr(torch.func, "vmap", counted)
    ten_rounds(FedAvg, visits.Vmap, chunk=2, rounds=2)
    ten_rounds(FedAvg, visits.Vmap, rounds=1)
    assert sizes == [2, 1, 2, 1, 3]


def test_a_memory_kept_after_vmap_holds_no_other_clients_memory():
    federation = ten_rounds(FedAvg_Adam, visits.Vmap, rounds=2)
    for mine in federation.memory.values():
        assert mine["m"].untyped_storage().nbytes() == 8 * len(federation.w)


@pytest.mark.parametrize("M", [FedAvg_Adam, FedSMOO, FedGA, FedSynth])
def test_vmap_knows_memory_of_steps_another_start_a_survey_and_a_codec_with_batches(M):
    check.check_vmap(M)


@pytest.mark.parametrize("loop", [Federation, visits.Threads, visits.Vmap])
def test_a_client_that_diverges_is_named(loop):
    task = Quadratics(torch.tensor([[1.0], [1e250], [1.0]], dtype=f64), normal(3, 1), K=2)
    settings = {"clip": 0.0, "lr": 1e30}
    with pytest.raises(FloatingPointError, match="round 0 .*, client 1: its update is not finite"):
        ten_rounds(FedAvg, loop, task=task, settings=settings)


def test_a_thread_uses_one_core_and_ranks_share_the_cores(monkeypatch):
    federation = ten_rounds(FedAvg, visits.Threads, rounds=1)
    assert list(federation.each(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = visits.cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert visits.cores() == max(1, alone // 2)


# ------------------------------------------------------------------- ranks, as threads that talk


def test_more_ranks_than_clients():
    for other in check.ranks_of(FedAvg, size=5):
        check.must_agree(FedAvg, other, "with ranks")


class Together(FedAvg):
    """FedAvg, whose client number `bad` raises an error that cannot be pickled."""

    bad: int = -1

    def train(self, received, mine, batches, lr):
        if batches[0, 0, 0] in self.task.images[self.bad]:
            raise Strange(lambda: None)
        return super().train(received, mine, batches, lr)


class Strange(Exception):
    pass


def test_an_error_of_one_rank_is_raised_on_all_even_if_it_cannot_be_sent():
    seen = []

    def one(rank, group):
        federation = check.federation(Together, visits.Ranks, {"group": group}, bad=3)
        with pytest.raises(RuntimeError, match="Strange: <function") as caught:
            check.run(federation)
        seen.append(str(caught.value))

    in_threads(one)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_the_model_and_the_state_of_rank_0_replace_the_others():
    ends = {}

    def one(rank, group):
        federation = check.federation(SCAFFOLD, visits.Ranks, {"group": group})
        check.run(federation, 2)
        if rank == 1:  # as if its sums had come out differently
            federation.w = federation.w + 1e-9
            federation.method.state = {"c": federation.method.state["c"] * 2}
        check.run(federation, check.ROUNDS - 2)
        ends[rank] = check.end(federation)

    in_threads(one)
    assert check.same(ends[0], ends[1]) and check.same(ends[0], check.plain(SCAFFOLD))


def in_threads(one, size=2):
    """one(rank, group) in threads that stand for processes."""
    barrier, messages = check.threading.Barrier(size, timeout=30), [None] * size
    groups = [check.Thread(rank, barrier, messages) for rank in range(size)]
    with check.ThreadPoolExecutor(size) as pool:
        list(pool.map(one, range(size), groups))


def test_what_ranks_exchange_arrives_on_the_device_of_the_receiver():
    sent = {"a": torch.zeros(3), "b": [torch.ones(2), None, 0.5]}
    arrived = visits.from_bytes(visits.to_bytes(sent), "meta")
    assert arrived["a"].is_meta and arrived["b"][0].is_meta and arrived["b"][1:] == [None, 0.5]


# ---------------------------------------------------------------------- ranks, as real processes


class Checked(visits.Ranks):
    """Ranks, but what rank 0 says of the server must be what this rank has found itself."""

    def send_down(self, clients):
        mine = self.w, self.method.state
        received = super().send_down(clients)
        assert check.same(mine, (self.w, self.method.state))
        return received


def digest(M, loop, more=()):
    """SHA-256 of all that ten rounds of QSGD with weighted averages leave."""
    end = check.end(check.run(check.federation(M, loop, more), 10))
    return hashlib.sha256(repr(as_lists(end)).encode()).hexdigest()


def as_lists(x):
    if isinstance(x, dict):
        return [(key, as_lists(x[key])) for key in sorted(x)]
    if isinstance(x, list):
        return [as_lists(y) for y in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


def methods_for(P):
    """Three processes run every method, other numbers of processes only some."""
    return list(parts("algo").values()) if P == 3 else [FedLESAM, SCAFFOLD, FedSynSAM, GradAlign]


def write_digests(folder, rank, P):
    found = {M.__name__: digest(M, Checked) for M in methods_for(P)}
    (Path(folder) / f"{rank}of{P}.json").write_text(json.dumps(found))
    visits.leave()


def meet_an_error(folder, rank, P):
    """Client 3 fails, on one rank."""
    try:
        check.run(check.federation(Together, visits.Ranks, bad=3))
    except RuntimeError as error:
        (Path(folder) / f"error{rank}").write_text(str(error))


def lose_a_rank(folder, rank, P):
    """Rank 1 is killed between two rounds."""
    federation = check.federation(FedAvg, visits.Ranks)
    federation.round()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.time()
    try:
        check.run(federation)
    except visits.Lost as error:
        (Path(folder) / f"lost{rank}").write_text(f"{time.time() - start} {error}")


def never_meet(folder, rank, P):
    """Rank 1 dies before it has met the others."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    visits.Group.minutes_to_meet = 0.05
    try:
        visits.Group()
    except visits.Lost as error:
        (Path(folder) / f"alone{rank}").write_text(str(error))


def start_groups(folder, jobs):
    """Fork a group of processes for each (function, P), all at once, and wait for them."""
    torch.set_num_threads(1)
    context, started = multiprocessing.get_context("fork"), []
    for job, P in jobs:
        with socket.socket() as s:  # a port that is free now
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(P):
            arguments = (job, folder, rank, P, port)
            started.append(context.Process(target=join_and, args=arguments))
    for process in started:
        process.start()
    for process in started:
        process.join()


def join_and(job, folder, rank, P, port):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": P, "LOCAL_WORLD_SIZE": P}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    globals()[job](folder, rank, P)


def in_a_fresh_interpreter(folder, jobs):
    code = f"from tests import test_scale; test_scale.start_groups({str(folder)!r}, {jobs!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_one_two_and_three_processes_end_with_the_bits_of_the_plain_loop(tmp_path):
    jobs = [("write_digests", P) for P in (1, 2, 3)]
    problems = in_a_fresh_interpreter(tmp_path, jobs)
    expected = {M.__name__: digest(M, Federation) for M in list(parts("algo").values())}
    for P in 1, 2, 3:
        for rank in range(P):
            path = tmp_path / f"{rank}of{P}.json"
            assert path.exists(), problems
            found = json.loads(path.read_text())
            assert found == {M.__name__: expected[M.__name__] for M in methods_for(P)}
    assert len(set(expected.values())) > len(expected) / 2  # really different methods


def test_processes_notice_an_error_of_one_and_the_death_of_one(tmp_path):
    jobs = [("meet_an_error", 2), ("lose_a_rank", 3), ("never_meet", 2)]
    in_a_fresh_interpreter(tmp_path, jobs)
    errors = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "Strange" in errors[0]
    for rank in 0, 2:
        seconds, text = (tmp_path / f"lost{rank}").read_text().split(" ", 1)
        assert float(seconds) < 20
        assert text.startswith(f"process {rank} of 3 lost the others: one of them has ended")
    assert (tmp_path / "alone0").read_text().startswith("process 0 of 2 lost the others")


TORCHRUN = """
import os
from fl import SCAFFOLD
from scale import visits
from tests import test_scale
digest = test_scale.digest(SCAFFOLD, visits.ThreadRanks)
os.write(1, f"digest {digest}\\n".encode())  # in one piece: the ranks write at the same time
visits.leave()
"""


def test_torchrun(tmp_path):
    """The launcher that the README names, and threads in each rank."""
    (tmp_path / "job.py").write_text(TORCHRUN)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, str(tmp_path / "job.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count(f"digest {digest(SCAFFOLD, Federation)}") == 2, done.stderr


# ----------------------------------------------------------------- check_method, broken methods


class Peeking(SCAFFOLD):
    def correct(self, g, w, received, mine):
        return g + self.state["c"] - mine["c_i"]


class Forgetful(SCAFFOLD):
    def remember(self, mine, decoded, lr_sum):
        return mine


class InPlace(SCAFFOLD):
    def remember(self, mine, decoded, lr_sum):
        mine["c_i"] += decoded["c_i_change"]
        return mine


class StateInPlace(SCAFFOLD):
    def aggregate(self, w, mean, lr_sum, share):
        self.state["c"] += share * mean["c_i_change"]
        return FedAvg.aggregate(self, w, mean, lr_sum, share)


class ReceivedInPlace(FedAvg):
    def upload(self, w, received, mine, lr_sum):
        sent = {"update": w - received["w"]}
        received["w"].mul_(0.5)
        return sent, mine


class Undeclared(FedAvg):
    def upload(self, w, received, mine, lr_sum):
        sent, mine = super().upload(w, received, mine, lr_sum)
        return sent, mine | {"last": w}


class ElsewhereThanState(FedAvg):
    def aggregate(self, w, mean, lr_sum, share):
        self.momentum = mean["update"]
        return super().aggregate(w, mean, lr_sum, share)


class OnlyItself(FedAvg):
    def upload(self, w, received, mine, lr_sum):
        return {"update": w - received["w"]}, mine


class AloneOnTheServer(FedAvg):
    def aggregate(self, w, mean, lr_sum, share):
        return w + 0.5 * mean["update"]


class Deaf(FedAvg):
    def correct(self, g, w, received, mine):
        return 0.9 * g


class OtherUpdate(FedAvg):
    def upload(self, w, received, mine, lr_sum):
        return {"update": (w - received["w"]) / lr_sum}, mine


class Branching(FedAvg):
    def correct(self, g, w, received, mine):
        return g if g.norm() > 1 else 2 * g


class OwnTrain(FedAvg):
    def train(self, received, mine, batches, lr):
        return super().train(received, mine, batches[:1], lr)


class OwnGenerator(FedAvg):
    generator = torch.Generator()

    def aggregate(self, w, mean, lr_sum, share):
        noise = torch.randn(w.shape, generator=self.generator, dtype=w.dtype)
        return super().aggregate(w, mean, lr_sum, share) + 1e-3 * noise


class Unsavable(FedAvg):
    def first_state(self):
        w0 = self.task.w0
        return super().first_state() | {"synthetic": Synthetic(w0, w0, w0)}


class NoLimit(FedSAM):
    off = {"lr": 0.1}

    def correct(self, g, w, received, mine):
        return 0.9 * super().correct(g, w, received, mine)


class NoEffect(FedSAM):
    factor: Annotated[float, "of rho", 0, 1] = 0.5
    off = {"factor": 1.0}


class Misspelt(FedAvg):
    def corect(self, g, w, received, mine):
        return 2 * g


class Shorter(FedAvg):
    def move(self, w, G, lr):
        return w - lr * G


class Numbered(FedAvg):
    def remember(self, mine, decoded, lr_sum):
        return mine | {"k": 1}


class WithoutDefault(FedAvg):
    beta: Annotated[float, "has no default", 0, 1]


class WithoutMeaning(FedAvg):
    beta: float = 0.5


class Taken(FedAvg):
    def first_state(self):
        return super().first_state() | {"momentum": torch.zeros_like(self.task.w0)}


class TwoMeanings(FedAvg):
    variate: Annotated[float, "how much", 0, 1] = 0.5


BROKEN = [
    (TwoMeanings, "twomeanings and scaffold both have a setting variate, of two meanings"),
    (Taken, "Taken: self.state holds momentum, as that of FedCM does"),
    (Misspelt, "Misspelt: corect is no hook; did you mean correct?"),
    (Shorter, "Shorter has move.self, w, G, lr., but the hook is move.self, w, G, mine, lr."),
    (Numbered, "the memory of a client is {'k': 1}, but `first_memory` declares {}"),
    (WithoutDefault, "WithoutDefault: beta is no setting"),
    (WithoutMeaning, "WithoutMeaning: beta is no setting"),
    (Peeking, "a client reads self.state.*`broadcast`"),
    (Forgetful, "c is not the mean of the c_i"),
    (InPlace, "`remember` changes its arguments in place"),
    (StateInPlace, "self.state or w is changed in place"),
    (ReceivedInPlace, "`mine` or `received` is changed in place"),
    (Undeclared, "after a round the memory of a client is.*last.*`first_memory` declares {}"),
    (ElsewhereThanState, "a round changes self.momentum.*first_state"),
    (OnlyItself, "'c_i_change' is missing.*`upload`.*call super"),
    (AloneOnTheServer, "AloneOnTheServer_SCAFFOLD: c is not the mean"),
    (Deaf, "Deaf_SCAFFOLD takes the steps of Deaf alone: its `correct`"),
    (OtherUpdate, '"update" is not w_K minus where `start` began'),
    (Branching, "does not run under vmap.*no `if`"),
    (OwnTrain, "under vmap, the model differs.*not `train`"),
    (OwnGenerator, "differs from that of the plain loop"),
    (Unsavable, "may hold tensors, numbers, text"),
    (NoLimit, r"with {'lr': 0.1} does not take the steps of FedSAM"),
    (NoEffect, "what it adds has no effect"),
]


@pytest.mark.parametrize("M, message", BROKEN, ids=[M.__name__ for M, _ in BROKEN])
def test_check_method_says_what_is_broken(M, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check.check_method(M)


class Weaker(FedSAM):
    factor: Annotated[float, "of rho", 0, 1] = 0.5
    off = {"factor": 1.0}

    def correct(self, g, w, received, mine):
        return self.factor * super().correct(g, w, received, mine)


def test_check_method_lets_a_good_method_pass():
    check.check_method(Weaker)


def test_check_method_compares_a_method_whose_own_term_is_off_with_its_parent():
    class Farther(FedSAM):
        off = {"rho": 0.0}

        def point(self, w, batch, received, mine):
            return w + 0.1, mine

    check.check_off(FedSAM, {"rho": 0.0})
    with pytest.raises(AssertionError, match="FedSAM with .* does not take the steps of FedAvg"):
        check.check_off(FedSAM, {"rho": 0.05})
    with pytest.raises(AssertionError, match="does not take the steps of FedSAM"):
        check.check_method(Farther)


def test_check_method_warns_of_a_move_that_lr_sum_does_not_fit():
    class Longer(FedAvg):
        def move(self, w, G, mine, lr):
            return w - 2 * lr * G, mine

    with pytest.warns(UserWarning, match="Longer: `move` is not w - lr G"):
        check.check_method(Longer)


# ----------------------------------------------------------------------------------- measurements


def test_the_bare_loop_of_the_benchmark_does_the_same_work():
    for M, settings in bench.WORKLOADS.values():
        found = bench.measured(M, settings, small=True, rounds=1, threads=1)
        apart = found["apart"]
        assert max(apart.values()) < 1e-3
        assert apart["ours, 1 core"] == apart["ours, a client on each core"]  # the same bits
        assert all(x["median"] > 0 for x in found["ratios"].values())


def test_growth_and_gpu_measure_something(tmp_path, monkeypatch, capsys):
    tiny = {"network": "mlp", "shape": (1, 8, 8), "hidden": 2}
    found = growth.point("scaffold", N=20, n=20, m=2, rounds=2, **tiny)
    assert found["d"] == 160 and found["round"] > 0 and found["memory"] >= 0
    gpu.main(["--small", "--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    stored = {file: file.read_bytes() for file in bench.RESULTS.glob("*.json")}
    for main in (bench.main, growth.main):
        monkeypatch.setattr(bench, "WORKLOADS", {})
        monkeypatch.setattr(growth, "series", lambda small: {"small": small})
        main(["--small"])
        assert '"machine"' in capsys.readouterr().out
    assert stored == {file: file.read_bytes() for file in bench.RESULTS.glob("*.json")}
    rows = json.loads((tmp_path / "gpu.json").read_text())["resnet18"]
    assert rows[0]["apart"] == 0 and 0 < rows[1]["apart"] < 1e-3
