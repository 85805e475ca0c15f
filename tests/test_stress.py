"""Accidents (tests/stress.py makes many of them): damage, full disks, clients that misbehave."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import fl
import run
from codes.dithering import Dithering
from compress import QSGD, Identity
from methods.drift import FedDyn
from plumbing.folder import write_json
from plumbing.settings import HERE, find, parts
from scale import faults, visits
from tests import check_method
from tests.stress import Absent, Misbehaving
from tests.test_run import (
    run_images,
    run_main,
    run_settings,
    run_state,
    run_tiny,
    run_words,
)
from vision import task

__all__ = ["run_images", "run_tiny"]  # fixtures


def test_stress_a_little_of_everything():
    code = [sys.executable, "-m", "tests.stress", "--small"]
    done = subprocess.run(code, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["wrong"] == [] and counts["kills"]["kills of one rank of two"] > 0


# The folder of a run.


@pytest.fixture
def finished(tmp_path, run_tiny):
    """The folder of a finished run, and its settings."""
    settings = run_tiny("fedsynsam", compress="topk", error_feedback="on", participation=3)
    run.experiment(tmp_path / "done", **settings)
    return tmp_path / "done", settings


def test_stress_every_changed_character_of_a_result_is_noticed(finished, capsys):
    folder, _ = finished
    path, good = folder / "result.json", (folder / "result.json").read_text()
    numbers = [place for place, character in enumerate(good) if character in "123456789"]
    for place in numbers[:: len(numbers) // 30]:
        other = str(10 - int(good[place])).replace("5", "6")
        changed = good[:place] + other + good[place + 1 :]
        if json.loads(changed) == json.loads(good):  # a digit that no float64 has
            continue
        path.write_text(changed)
        code, out, err = run_main(capsys, "--resume", folder)
        assert (code, out) == (2, "") and "result.json" in err and err.count("\n") == 1
    path.write_text(good)
    assert run_main(capsys, "--resume", folder)[0] == 0


def test_stress_files_of_two_runs_are_not_mixed(finished, tmp_path, run_tiny):
    folder, settings = finished
    run.experiment(tmp_path / "other", **settings | {"seed": 9})
    for name in ("result.json", "config.json", "checkpoint.pt"):
        mixed = shutil.copytree(folder, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "other" / name, mixed / name)
        with pytest.raises(ValueError, match=name):
            run.experiment(mixed, **settings)


CRAFTED = {  # what is in the checkpoint: what another program might write there
    "t": (-5, 10**9, 2, 4.5, None),
    "w": (torch.zeros(3), torch.zeros(3, 3), 0, "w", lambda w: w.double(), lambda w: w * torch.nan),
    "bytes_up": (-1, 10**30, None, "3"),
    "memory": (None, [], {99: {}}, {0: {}}, {"a": 1}, {0: {"residual of update": torch.ones(2)}}),
    "informed": ({99}, {"a"}, None, [0]),
    "state": ({}, None, {"X": 1}, {"trajectory": 3, "X": None, "Y": None, "matching": None}),
    "log": ([], None, "log", [3, 3, 3, 3], [{}] * 4, lambda log: log[:-1], lambda log: log[::-1]),
    "hash": ("0", None),
    "seconds": ("long", None),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_stress_a_checkpoint_that_another_program_wrote_is_refused(name, finished):
    folder, settings = finished
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)
    for value in CRAFTED[name]:
        value = value(stored[name]) if callable(value) else value
        torch.save(stored | {name: value}, folder / "checkpoint.pt")
        with pytest.raises(ValueError, match="checkpoint.pt is of no use"):
            run.experiment(folder, **settings)
    torch.save({n: x for n, x in stored.items() if n != name}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is of no use"):
        run.experiment(folder, **settings)


def test_stress_synthetic_images_of_another_task_are_refused(tmp_path, run_tiny):
    settings = run_tiny("fedsynsam")
    run.experiment(tmp_path / "a", **settings)
    path = tmp_path / "a" / "checkpoint.pt"
    stored = torch.load(path, weights_only=True)
    X, Y = stored["state"]["X"], stored["state"]["Y"]
    bad = [{"X": X[:, :, 1:]}, {"Y": Y[:, 1:]}, {"X": X[1:]}, {"X": X[:0], "Y": Y[:0]}, {"X": None}]
    for change in [*bad, {"trajectory": [stored["w"][1:]]}, {"trajectory": [0]}]:
        torch.save(stored | {"state": stored["state"] | change}, path)
        with pytest.raises(ValueError, match="checkpoint.pt is of no use"):
            run.experiment(tmp_path / "a", **settings)


def test_stress_memory_that_is_not_there_is_said(capsys, monkeypatch, tmp_path):
    command = ["--algo", "fedavg", "--batch", "100000", "--local-steps"]
    assert run_main(capsys, *command, 100000)[0] == 2
    command += [1, "--quick", "--out", tmp_path]

    def greedy(self, *_):
        return torch.empty(10**15)

    monkeypatch.setattr(task.Images, "plan", greedy)
    code, _, err = run_main(capsys, *command)
    assert code == 1 and "memory" in err and "bytes" in err and err.count("\n") == 1


@pytest.mark.parametrize("algo", parts("algo"))
def test_stress_a_good_checkpoint_of_every_method_fits(algo, tmp_path, run_tiny):
    outcome = run.experiment(tmp_path / "a", **run_tiny(algo))
    assert run.load(tmp_path / "a")[0].t == outcome.federation.t == 4


class Waits(BaseException):
    """A pipe was opened, and nobody writes to it."""


@pytest.fixture
def patience():
    """Raises Waits after half a minute."""

    def stop(*_):
        raise Waits

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", "config.json log.jsonl result.json checkpoint.pt".split())
def test_stress_a_folder_or_a_pipe_in_place_of_a_file(name, finished, capsys, patience):
    folder, _ = finished
    for make in (os.mkdir, os.mkfifo):
        (folder / name).unlink()
        make(folder / name)
        code, out, err = run_main(capsys, "--resume", folder)
        if name == "log.jsonl" and make == os.mkfifo:
            assert code == 0  # the log is in the checkpoint, and is written again
            continue
        assert code == 2 and out == "" and name in err and err.count("\n") == 1, err
        if make == os.mkdir:
            (folder / name).rmdir()
            (folder / name).touch()


def test_stress_a_pipe_as_data_is_refused(tmp_path, run_tiny, patience):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="pipe.npz.*no file"):
        run.experiment(**run_tiny(dataset=str(tmp_path / "pipe.npz")))


@pytest.mark.parametrize("text", ["[{}]", '{"settings": {}}', "[" * 10**5, '{"a":' * 800, "", "3"])
def test_stress_json_of_another_form_starts_nothing(text, tmp_path, capsys):
    for name in ("config.json", "comparison.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        code, out, err = run_main(capsys, "--resume", folder)
        assert code == 2 and out == "" and name in err and err.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == [name]


def test_stress_a_comparison_stays_in_its_folder(tmp_path, run_tiny, capsys):
    (tmp_path / "both").mkdir()
    for label in ("../outside", str(tmp_path / "outside"), ".."):
        write_json(tmp_path / "both" / "comparison.json", {label: run_tiny()})
        code, _, err = run_main(capsys, "--resume", tmp_path / "both")
        assert code == 2 and "is no run" in err and not (tmp_path / "outside").exists()


def test_stress_one_bad_run_does_not_end_a_comparison(tmp_path, run_tiny, capsys):
    words = [*run_words(run_tiny(rounds=2)), "--seeds", 3, "--out", tmp_path, "--name", "three"]
    _, table, _ = run_main(capsys, *words)
    folder = tmp_path / "three"
    (folder / "fedavg-s1" / "checkpoint.pt").write_text("damaged")
    (folder / "fedavg-s2" / "result.json").unlink()
    (folder / "fedavg-s2" / "result.json").mkdir()
    code, out, err = run_main(capsys, "--resume", folder)
    assert code == 1 and "| fedavg |" in out and out != table
    assert "fedavg-s1" in err and "fedavg-s2" in err and err.count("\n") == 2


# The machine.


def test_stress_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path, run_tiny, capsys, monkeypatch
):
    settings = run_tiny("scaffold")
    run.experiment(tmp_path / "whole", **settings)
    words = [*run_words(settings), "--out", tmp_path, "--name", "cut"]

    def full(federation, path):
        path.write(b"half of it")
        raise RuntimeError("unexpected pos 1664 vs 1558")  # torch.save on a full disk

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, _, err = run_main(capsys, *words)
    assert code == 1 and "checkpoint.pt cannot be written" in err and err.count("\n") == 1
    assert f"--resume {tmp_path / 'cut'}" in err
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"config.json", "log.jsonl"}
    assert run_main(capsys, "--resume", tmp_path / "cut")[0] == 0
    assert check_method.same(run_state(tmp_path / "cut"), run_state(tmp_path / "whole"))


def test_stress_a_folder_that_is_gone_cannot_be_continued(tmp_path, run_tiny, capsys, monkeypatch):
    inner = fl.Federation.round

    def gone(federation):
        inner(federation)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)

    monkeypatch.setattr(fl.Federation, "round", gone)
    words = [*run_words(run_tiny()), "--out", tmp_path, "--name", "cut"]
    code, _, err = run_main(capsys, *words)
    assert code == 1 and "nothing to continue" in err and err.count("\n") == 1


@pytest.mark.parametrize("how", [">&- 2>/dev/full", ">/dev/full 2>&-"])
def test_stress_a_run_ends_well_if_nobody_reads_what_it_prints(how, tmp_path, run_images):
    words = " ".join(map(str, run_words(run_settings(run_images, "fedavg", rounds=2))))
    line = f"{sys.executable} run.py {words} --out {tmp_path} --name a {how}"
    for buffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": buffered}
        assert subprocess.run(line, shell=True, cwd=HERE, env=environment).returncode == 0
        assert (tmp_path / "a" / "result.json").exists()
        line = f"{sys.executable} run.py --resume {tmp_path / 'a'} {how}"


def test_stress_an_interrupt_during_the_imports_prints_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = [sys.executable, "run.py", "--list"]
    child = subprocess.Popen(code, cwd=HERE, env=environment, stdout=-1, stderr=-1)
    assert child.stdout.readline() == b"here\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT and err == b""


# What is said.


@pytest.mark.parametrize(
    "algo, flags",
    [
        *((a, {"lr": 1e9, "clip": 0.0}) for a in ("fedavg", "scaffold", "feddyn", "fedcm")),
        *((a, {"weight_decay": 1e30}) for a in ("fedavg", "fedadam", "fedlesam")),
        ("fedsam", {"rho": 1e30, "clip": 0.0}),
        ("fedavg", {"man": 1e30, "clip": 0.0}),
    ],
)
def test_stress_a_divergence_names_the_settings_that_were_chosen(algo, flags, run_tiny):
    with pytest.raises(FloatingPointError) as error:
        run.experiment(**run_tiny(algo, rounds=9, **flags))
    said = str(error.value)
    assert all(f"{name} = {value:g}" in said for name, value in flags.items())
    others = {"lr", "server_lr", "weight_decay", "clip", "adam_lr", "alpha"} - set(flags)
    assert not any(f" {name} = " in said for name in others) and "round" in said


def test_stress_learning_rates_cannot_overflow():
    with pytest.raises(ValueError, match="lr_decay = 1.001 .*in 1e-12..1"):
        run.resolve(algo="fedavg", lr_decay=1.001)
    federation = check_method.federation(fl.FedAvg, lr=1e-12, lr_decay=1e-12)
    federation.t = 10**7
    federation.round()


@pytest.mark.parametrize(
    "codec",
    [
        Dithering(0.5, True, torch.float64),
        Dithering(0.5, False, torch.float64),
        QSGD(7, "l2", 0, torch.float64),
    ],
)
def test_stress_a_finer_wire_than_the_vector_bears_the_largest_vectors(codec):
    x = torch.full((600,), 3e38)
    decoded = codec.decode(codec.encode(x, torch.Generator().manual_seed(0)), 600)
    assert ((decoded - x).norm() / x.norm().double()).square() < 0.6  # the bound is nu = 0.5
    assert decoded.to(x).isfinite().all()


def test_stress_a_file_that_ends_the_process_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit(0)")
    with pytest.raises(ValueError, match="mine.py does not import: SystemExit"):
        find("algo", f"{tmp_path}/mine.py:M")


# Clients that misbehave.

KINDS = {"on_bad_client": "drop"}


def rounds_of(kind, M=fl.SCAFFOLD, rounds=6, **more):
    federation = check_method.federation(M, kind, KINDS | more)
    return check_method.run(federation, rounds)


def test_stress_tolerance_changes_nothing_if_all_behave():
    for M in (fl.SCAFFOLD, fl.FedSynSAM, find("algo", "fedga"), find("algo", "labelcal")):
        plain = check_method.end(check_method.run(check_method.federation(M), 6))
        tolerant = rounds_of(faults.Tolerant, M)
        assert check_method.same(check_method.end(tolerant), plain) and tolerant.left_out == {}


@pytest.mark.parametrize("algo", ["scaffold", "fedsynsam-d", "fedga", "fedsmoo", "fedlesam"])
def test_stress_clients_that_misbehave_are_as_if_they_were_not_there(algo):
    M = find("algo", algo)
    with_them, without = rounds_of(Misbehaving, M, 12), rounds_of(Absent, M, 12)
    assert torch.equal(with_them.w, without.w)
    assert check_method.same(with_them.memory, without.memory)
    assert check_method.same(with_them.method.state, without.method.state)
    assert with_them.bytes_up == without.bytes_up


def test_stress_every_kind_of_bad_message_is_named_and_its_memory_stays():
    good = Identity(torch.float64).encode(torch.ones(51, dtype=torch.float64))
    short = Identity(torch.float64).encode(torch.ones(50, dtype=torch.float64))
    messages = (None, 3, {}, {"update": good}, {"update": None, "c_i_change": good}, [])
    messages += tuple({"update": bad, "c_i_change": good} for bad in (good[:-1], short, b"", 0.5))
    messages += ({"update": good, "c_i_change": good, "more": good},)

    class One(faults.Tolerant):
        def encode(self, work, i, *rest):
            reply = super().encode(work, i, *rest)
            return (self.message, reply[1]) if i == self.bad else reply

    for message in messages:
        federation = rounds_of(One.__mro__[1], rounds=3)
        federation.__class__, federation.message = One, message
        clients = federation.choose()
        federation.bad, before = clients[0], dict(federation.memory)
        federation.compressor = Identity(torch.float64)
        federation.round()
        assert list(federation.left_out) == clients[:1] and federation.left_out[clients[0]]
        assert federation.memory.get(clients[0]) is before.get(clients[0])
        assert federation.memory[clients[1]] is not before.get(clients[1])
        federation.drop, federation.bad = False, federation.choose()[1]
        with pytest.raises(ValueError, match=f"round 4, client {federation.bad}: "):
            federation.round()


def test_stress_numbers_that_are_not_finite_are_left_out_or_stop():
    class Diverges(fl.FedAvg):
        def upload(self, w, received, mine, lr_sum):
            sent, mine = super().upload(w, received, mine, lr_sum)
            return {"update": sent["update"] / 0}, mine

    federation = rounds_of(faults.Tolerant, Diverges)
    assert torch.equal(federation.w, federation.task.w0) and federation.t == 6
    assert set(federation.left_out.values()) == {"a number of its own is not finite"}
    assert len(federation.left_out) == 3 and federation.memory == {}
    with pytest.raises(FloatingPointError, match="client"):
        rounds_of(faults.Tolerant, Diverges, on_bad_client="stop")


@pytest.mark.parametrize("M, sums", [(fl.SCAFFOLD, ("c", "c_i")), (FedDyn, ("h", "h_i"))])
def test_stress_the_server_and_the_clients_agree_after_dropouts(M, sums):
    federation = rounds_of(Misbehaving, M, 15, dropout=0.3)
    server, client = sums
    kept = sum(federation.weights[i] * mine[client] for i, mine in federation.memory.items())
    mean = kept / sum(federation.weights)
    assert torch.allclose(federation.method.state[server], mean, atol=1e-12) and mean.norm() > 0


def test_stress_dropout_has_its_probability_and_all_may_drop_out():
    federation, out = rounds_of(faults.Tolerant, fl.FedAvg, 0, dropout=0.3), 0
    for _ in range(100):
        federation.round()
        out += len(federation.left_out)
    assert abs(out / 300 - 0.3) < 4 * (0.3 * 0.7 / 300) ** 0.5
    nobody = rounds_of(faults.Tolerant, fl.FedAvg, 3, dropout=1.0)
    assert torch.equal(nobody.w, nobody.task.w0) and nobody.t == 3 and nobody.bytes_up == 0


def test_stress_tolerance_goes_with_every_way_of_visiting():
    plain = rounds_of(Misbehaving, dropout=0.2)
    threads = rounds_of(type("T", (Misbehaving, visits.Threads), {}), dropout=0.2, threads=2)
    assert torch.equal(plain.w, threads.w) and check_method.same(plain.memory, threads.memory)
    vmap = rounds_of(type("V", (Misbehaving, visits.Vmap), {}), dropout=0.2)
    assert (
        torch.allclose(plain.w, vmap.w, atol=1e-9) and plain.left_out.keys() == vmap.left_out.keys()
    )


def test_stress_dropouts_are_in_the_log_and_survive_a_kill(tmp_path, run_tiny):
    class Killed(BaseException):
        pass

    def kill(federation):
        if federation.t == 3:
            raise Killed

    settings = run_tiny("scaffold", dropout=0.5, on_bad_client="drop")
    whole = run.experiment(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run.experiment(tmp_path / "cut", watch=kill, **settings)
    run.experiment(tmp_path / "cut", **settings)
    assert check_method.same(run_state(tmp_path / "cut"), run_state(tmp_path / "whole"))
    left_out = [row["absent"] for row in whole.log if "absent" in row]
    assert left_out and set(left_out[0].values()) == {"dropped out"}
    plain = run.experiment(**run_tiny("scaffold"))
    assert whole.result["bits"] == pytest.approx(plain.result["bits"])  # of those who sent
    assert "Tolerant" in type(whole.federation).__name__
    assert not torch.equal(whole.federation.w, plain.federation.w)
