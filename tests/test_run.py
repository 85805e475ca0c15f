"""run.py: settings, parts, the folder of a run, killing and resuming, the command line."""

import ast
import fcntl
import graphlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

import fl
import run
import synth
from plumbing import terminal
from plumbing.folder import CHECKPOINT
from plumbing.settings import HERE, Setting, parts, short
from tests.check_method import same
from vision import data

f64 = torch.float64

RUN_TINY = (
    dict(clients=5, participation=2, local_steps=2, batch=4, width=2, hidden=4, rounds=4)
    | dict(val=20, measure_images=20, eval_every=1, checkpoint_every=2, last=2, threads=1)
    | dict(warmup=2, window=1, outer_steps=2, inner_steps=2, ipc=1)
    | dict(fs_steps=2, fs_batches=1, fs_images=2, swa_start=1)
)


@pytest.fixture(scope="session")
def run_images(tmp_path_factory):
    return run_write_images(tmp_path_factory.mktemp("images") / "tiny.npz")


def run_write_images(path):
    """A data set of 90 + 30 images of 12 x 12 pixels in three classes."""
    rng = np.random.default_rng(0)
    y, y_test = np.arange(90) % 3, np.arange(30) % 3
    x, x_test = (
        (60 * labels[:, None, None] + rng.integers(0, 99, (len(labels), 12, 12))).astype(np.uint8)
        for labels in (y, y_test)
    )
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return str(path)


@pytest.fixture
def run_tiny(run_images, monkeypatch):
    """Settings of a run that takes a moment, for a method; and no pictures, which take longer."""
    monkeypatch.setattr(run, "draw", lambda *a: None)
    monkeypatch.setattr(run.plots, "curve", lambda *a: None)

    return lambda algo="fedavg", **more: run_settings(run_images, algo, **more)


def run_settings(images, algo, **more):
    """Those of RUN_TINY that the run has, and `more`; images: the path of the data set."""
    known = {name for part in run.owners({"algo": algo} | more) for name in run.settings_of(part)}
    tiny = {name: value for name, value in RUN_TINY.items() if name in known}
    return tiny | {"dataset": images, "algo": algo} | more


def run_words(settings):
    """Settings as words of the command line."""
    flags = [("--" + name.replace("_", "-"), str(value)) for name, value in settings.items()]
    return [word for flag in flags for word in flag]


def run_main(capsys, *words):
    code = run.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def run_state(folder):
    """What a run ended with."""
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    return (
        stored["w"],
        stored["memory"],
        (folder / "log.jsonl").read_bytes(),
        result | {"seconds": 0, "checksum": 0},
    )


# Settings.


def test_run_settings_are_read_where_they_are_declared():
    class Parent:
        rho: Annotated[float, "radius", 0, None] = 0.1
        other: float = 3.0

    class Child(Parent):
        word: Annotated[Literal["a", "b"], "a word"] = "b"

        def __init__(self, x, *, n: Annotated[int, "number", 1, 9] = 5, dtype: type = f64):
            pass

    @dataclass(frozen=True)
    class Data:
        k: Annotated[float, "kept", 1e-12] = 0.5
        dtype: type = f64

    def function(labels, N, rng, size: Annotated[int, "size"] = 7):
        pass

    declared = run.settings_of(Child)
    assert declared == {
        "rho": Setting(float, "radius", 0, None, 0.1),
        "word": Setting(Literal["a", "b"], "a word", None, None, "b"),
        "n": Setting(int, "number", 1, 9, 5),
    }
    assert run.settings_of(Data) == {"k": Setting(float, "kept", 1e-12, None, 0.5)}
    assert run.settings_of(function) == {"size": Setting(int, "size", None, None, 7)}


def run_every_setting():
    """All settings that any part has: {(kind, part, name): Setting}."""
    found = {}
    for kind in run.PLACES:
        for label, part in parts(kind).items():
            found |= {(kind, label, n): s for n, s in run.settings_of(part).items()}
    common = [
        s for s in run.owners({}) if s not in map(run.find, run.PLACES, ("fedsynsam", "qsgd"))
    ]
    return found | {("", "", n): s for part in common for n, s in run.settings_of(part).items()}


def test_run_every_default_is_legal_and_explained():
    settings = run_every_setting()
    for (_, _, name), setting in settings.items():
        assert run.check(name, setting.default, setting) == setting.default
        assert len(setting.meaning) > 5, name
    assert len({name for _, _, name in settings}) > 60
    for kind in run.PLACES:
        for label in parts(kind):
            run.resolve(**{kind: label})


def test_run_check_refuses_what_is_not_legal():
    number, whole = (Setting(kind, "x", 0, 5, 1) for kind in (float, int))
    assert run.check("x", 5, number) == 5.0 and type(run.check("x", 5, number)) is float
    for setting, values in (
        (number, (-1e-9, 5.1, math.nan, math.inf, "1", None, True, 10**400, [1])),
        (whole, (-1, 6, 1.0, math.nan, "1", None, True, 10**30)),
        (Setting(bool, "x", None, None, True), (1, "yes", None)),
        (
            Setting(Literal["size", "uniform"], "x", None, None, "size"),
            ("sizes", 1, None, True),
        ),
        (Setting(float, "x", None, None, 1.0), (math.inf, -math.inf, math.nan, 1e31)),
    ):
        for value in values:
            with pytest.raises(ValueError, match="x = "):
                run.check("x", value, setting)
    with pytest.raises(ValueError, match="did you mean size"):
        run.check("x", "sizes", Setting(Literal["size", "uniform"], "x", None, None, "size"))


RUN_PARTS = [  # every setting belongs to one of them
    *({"algo": a} for a in parts("algo")),
    *({"algo": "fedavg", "compress": c} for c in parts("compress")),
    *({"algo": "fedavg", "model": m} for m in parts("model") if m in ("cnn", "mlp")),
    *({"algo": "fedavg", "partition": p} for p in parts("partition")),
]
RUN_ONCE = {}  # setting -> the first of RUN_PARTS that has it
for run_chosen in RUN_PARTS:
    for run_part in run.owners(run_chosen):
        for run_name, run_setting in run.settings_of(run_part).items():
            if run_setting.type in (int, float):
                RUN_ONCE.setdefault(run_name, run_chosen)


@pytest.mark.parametrize("name", RUN_ONCE)
def test_run_any_number_is_refused_or_works(name, run_tiny):
    """0, -1, far too large, nan and inf, for every numeric setting: a ValueError, or a run."""
    tiny = run_tiny(**RUN_ONCE[name]) | {"rounds": 3}
    for value in (0, -1, 10**30, math.nan, math.inf):
        for kind in {int, float} if value in (0, -1, 10**30) else {float}:
            try:
                settings = run.resolve(**tiny | {name: kind(value)})
            except ValueError as error:
                assert name in str(error)
                continue
            try:
                assert run.experiment(**settings).result["d"] > 0
            except (ValueError, FloatingPointError) as error:
                assert len(str(error)) > 10


def test_run_a_setting_of_another_part_is_refused_with_who_has_it():
    with pytest.raises(ValueError, match="rho is no setting of this run; .*algo fedsam"):
        run.resolve(algo="fedavg", rho=0.1)
    with pytest.raises(ValueError, match="alpha .*partition dirichlet"):
        run.resolve(alpha=0.3)
    with pytest.raises(ValueError, match="did you mean rounds"):
        run.resolve(rouns=3)


def test_run_quick_is_the_same_job_and_legal_for_every_method():
    for algo in parts("algo"):
        settings, small = run.resolve(algo=algo), run.quick(algo=algo)
        assert run.resolve(**small) == small and small["rounds"] == 8 and small["last"] == 1
        assert small.get("swa_start", 0) < small["rounds"]  # else nothing would be averaged
        changed = {name for name in small if small[name] != settings[name]}
        assert changed <= set(
            "rounds warmup outer_steps fs_steps measure_images window last swa_start".split()
        )


def test_run_quick_leaves_rounds_after_the_synthesis():
    for rounds in (2, 3, 9, 10, 11, 40, 60):  # the defaults are warmup 10, swa_start 40
        for algo, start in (("dynafed", "warmup"), ("swa+fedavg", "swa_start")):
            small = run.quick(algo=algo, rounds=rounds)
            assert small["rounds"] == rounds > small[start]


# Parts.


def test_run_parts_have_the_names_of_their_classes():
    names = {kind: set(parts(kind)) for kind in run.PLACES}
    assert {"fedavg", "scaffold", "fedsynsam", "fedlesam-s", "feddyn", "gcsam"} <= names["algo"]
    assert {"identity", "topk", "randk", "qsgd", "sign", "natural"} <= names["compress"]
    assert {"mlp", "cnn", "lenet", "convnet", "resnet18"} == names["model"]
    assert {"iid", "dirichlet", "dirichlet-class", "shards"} <= names["partition"]
    assert run.find("algo", "fedsam") is fl.FedSAM and run.find("algo", fl.FedSAM) is fl.FedSAM


RUN_MINE = '''
from typing import Annotated
from torch import nn
from compress import Identity
from fl import FedAvg
import sam

class Mine(FedAvg):
    """My method."""
    strength: Annotated[float, "my setting", 0, 1] = 0.5
    where = sam.__file__

    def correct(self, g, w, received, mine):
        return (1 + self.strength) * super().correct(g, w, received, mine)

class Wire(Identity):
    pass

class Net(nn.Sequential):
    def __init__(self, image_shape, classes, *, units: Annotated[int, "units", 1] = 3):
        super().__init__(nn.Flatten(), nn.Linear(144, units), nn.ReLU(), nn.Linear(units, classes))

def halves(labels, N, rng, parts: Annotated[int, "clients that have images", 1] = 5):
    import numpy as np
    return np.array_split(rng.permutation(len(labels)), N)
'''


def test_run_parts_of_the_reader_are_found_in_their_file(tmp_path, run_tiny):
    path = tmp_path / "sam.py"  # has a name of ours, which it must not replace
    path.write_text(RUN_MINE)
    Mine = run.find("algo", f"{path}:Mine")
    assert Mine.where == str(HERE / "sam.py") and Path(sys.modules["sam"].__file__) != path
    kinds = {"compress": "Wire", "model": "Net", "partition": "halves"}
    mine = {kind: f"{path}:{name}" for kind, name in kinds.items()}
    outcome = run.experiment(
        tmp_path / "run", **run_tiny(f"{path}:Mine", **mine, strength=0.2, units=2)
    )
    assert outcome.result["d"] == 144 * 2 + 2 + 2 * 3 + 3
    assert type(outcome.federation.method) is Mine and outcome.federation.method.strength == 0.2
    by_class = run.experiment(**run_tiny(Mine, **mine, strength=0.2, units=2))
    assert torch.equal(by_class.federation.w, outcome.federation.w)
    assert by_class.result["algo"] == f"{path}:Mine"


def test_run_files_of_the_reader_that_do_not_fit_are_one_value_error(tmp_path):
    texts = {"syntax": "def (", "raises": "1 / 0", "imports": "import nosuch"}
    for name, text in (texts | {"fine": "x = 3\nclass M: pass\nimport fl"}).items():
        (tmp_path / f"{name}.py").write_text(text)
        for member in ("M", "x", "fl", "nothing", ""):
            for kind in run.PLACES:
                with pytest.raises(ValueError, match=name):
                    run.find(kind, f"{tmp_path / name}.py:{member}")
    with pytest.raises(ValueError, match="there is no file"):
        run.find("algo", f"{tmp_path}/nothing.py:M")
    for kind, need in (("algo", "fl.FedAvg"), ("model", "image_shape"), ("partition", "labels, N")):
        for thing in (f"{tmp_path}/fine.py:M", print):
            with pytest.raises(ValueError, match=need):
                run.find(kind, thing)


def test_run_a_dataclass_of_the_reader_with_annotations_of_the_future_is_imported(tmp_path):
    (tmp_path / "future.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport compress\n"
        "@dataclass(frozen=True)\nclass Half(compress.Identity):\n    pass\n"
    )
    assert run.find("compress", f"{tmp_path / 'future.py'}:Half").__name__ == "Half"


@pytest.mark.parametrize(
    "setting, hint",
    [
        ("q: Annotated[list, 'a list'] = []", "no int, float, bool, str or Literal of words"),
        ("q: Annotated[Literal[1, 2], 'numbers'] = 1", "no int, float, bool, str or Literal"),
        ("seeds: Annotated[int, 'of the command line'] = 1", "a name that is taken"),
        ("loss: Annotated[float, 'a hook'] = 1.0", "a name that is taken"),
        ("_q: Annotated[float, 'hidden'] = 1.0", "a name that is taken"),
    ],
)
def test_run_a_setting_of_no_legal_type_or_name_is_refused(setting, hint, tmp_path):
    text = "from typing import Annotated, Literal\nimport fl\nclass M(fl.FedAvg):\n    "
    (tmp_path / "mine.py").write_text(text + setting + "\n")
    with pytest.raises(ValueError, match=f"of M .*{hint}"):
        run.resolve(algo=f"{tmp_path / 'mine.py'}:M")


def test_run_a_per_cent_sign_in_a_meaning_is_shown(tmp_path, capsys):
    text = "from typing import Annotated\nimport fl\nclass M(fl.FedAvg):\n"
    (tmp_path / "mine.py").write_text(text + "    q: Annotated[float, 'a share in %'] = 1.0\n")
    with pytest.raises(SystemExit, match="0"):
        run.main(["--algo", f"{tmp_path / 'mine.py'}:M", "--help"])
    assert "a share in % (default 1.0)" in " ".join(capsys.readouterr().out.split())


def test_run_numbers_of_numpy_are_numbers():
    settings = run.resolve(lr=np.float64(0.25), rounds=np.int64(30), clip=np.float32(2))
    assert (settings["lr"], settings["rounds"], settings["clip"]) == (0.25, 30, 2.0)
    assert {type(settings[name]) for name in ("lr", "rounds", "clip")} == {float, int}
    with pytest.raises(ValueError, match="rounds = 3.0 is no int"):
        run.resolve(rounds=np.float64(3))


def test_run_compressors_and_splits_of_wrong_shape_are_refused(tmp_path, run_tiny):
    (tmp_path / "mine.py").write_text(
        "import compress\nimport numpy as np\n"
        "class Short(compress.Identity):\n"
        "    def decode(self, buffer, d):\n        return super().decode(buffer, d)[:1]\n"
        "def fewer(labels, N, rng):\n    return np.array_split(np.arange(len(labels)), N - 1)\n"
        "def below(labels, N, rng):\n    return np.array_split(np.arange(len(labels)) - 1, N)\n"
        "def above(labels, N, rng):\n    return np.array_split(np.arange(len(labels)) + 1, N)\n"
        "def masks(labels, N, rng):\n    return [labels % N == i for i in range(N)]\n"
    )
    with pytest.raises(ValueError, match=r"decodes \[1\] and not \["):
        run.experiment(**run_tiny("fedavg", compress=f"{tmp_path / 'mine.py'}:Short"))
    for name in ("fewer", "below", "above", "masks"):
        with pytest.raises(ValueError, match=f"{name}' must give N = 5 arrays of numbers in 0..69"):
            run.experiment(**run_tiny("fedavg", partition=f"{tmp_path / 'mine.py'}:{name}"))


def test_run_a_setting_with_the_name_of_another_one_is_refused(tmp_path):
    path, text = tmp_path / "mine.py", "from typing import Annotated\nimport fl\n"
    path.write_text(text + 'class M(fl.FedAvg):\n    alpha: Annotated[float, "mine"] = 0.5\n')
    with pytest.raises(ValueError, match="m and dirichlet both have a setting alpha"):
        run.resolve(algo=f"{path}:M", partition="dirichlet")
    assert run.resolve(algo=f"{path}:M", partition="iid")["alpha"] == 0.5


def test_run_the_card_of_the_main_job_shows_the_stored_numbers_of_its_rivals(tmp_path):
    result = {"algo": "fedsynsam", "settings": "abc", "seed": 0, "d": 9, "averaged": [2, 4]}
    result |= {key: 0.5 for key, *_ in terminal.SHOWN.values()} | {
        "bits": 2.0,
        "matching_loss": None,
    }
    rows = [{"algo": a, "arm": a, "test_acc": x} for a, x in (("fedavg", 0.5), ("sam", 0.4))]
    rows += [{"algo": "fedavg", "arm": "fedavg", "test_acc": 0.6}]
    rows += [{"algo": "fedsynsam", "arm": "fedsynsam", "test_acc": 0.1}]
    rows += [{"algo": "fedavg", "arm": "fedavg, 2 bits", "test_acc": 0.9}]
    rows += [{"arm": "sam", "diverged": "round 3"}]
    path, defaults = tmp_path / "default.json", run.resolve()
    path.write_text(json.dumps({"cpu": {"rows": rows, "defaults": defaults}}))
    settings = defaults | {"seed": 7, "visit": "plain"}
    expected = {"fedavg": 0.55, "sam": 0.4, "fedsynsam": 0.1}
    assert terminal.stored_beside(settings, path) == pytest.approx(expected)
    mine = run.resolve(algo="fedprox")  # a setting that the stored runs do not have
    assert list(terminal.stored_beside(mine, path)) == ["fedavg", "sam", "fedsynsam"]
    for other in ({"lr": 0.2}, {"compress": "qsgd"}, {"rho": 0.05}):
        assert terminal.stored_beside(settings | other, path) == {}
    assert terminal.stored_beside(settings, tmp_path / "none") == {}
    path.write_text(json.dumps({"quick": {"rows": rows}}))
    assert terminal.stored_beside(settings, path) == {}
    shown = terminal.card(result, settings, Path("runs"))
    assert "tuned, 5 seeds  fedavg" in shown and max(map(len, shown.splitlines())) < 90
    assert "tuned, 5 seeds" not in terminal.card(result, settings | {"lr": 0.2}, tmp_path)
    assert "(mean of 2 evaluations, rounds 2 to 4)" in shown
    assert "(round 8)" in terminal.card(result | {"averaged": [8]}, settings, tmp_path)


def test_run_quick_leaves_given_settings_alone():
    assert run.quick()["rounds"] == 8
    assert run.quick(rounds=5, algo="fedsynsam")["rounds"] == 5
    small = run.quick(window=3)
    assert small["window"] == small["warmup"] == 3
    with pytest.raises(ValueError, match="warmup = 8 must be below"):
        run.quick(rounds=8, warmup=8)


def test_run_two_methods_are_combined_by_a_plus(run_tiny):
    Both = run.find("algo", "fedsam+scaffold")
    assert Both.__mro__[1:4] == (fl.FedSAM, fl.SCAFFOLD, fl.FedAvg)
    outcome = run.experiment(**run_tiny("fedsam+scaffold", rho=0.2, variate=0.5))
    assert outcome.result["algo"] == "fedsam+scaffold"
    gamma = run.experiment(**run_tiny("fedgamma", rho=0.2, variate=0.5))
    assert torch.equal(outcome.federation.w, gamma.federation.w)
    with pytest.raises(ValueError, match="unknown algo 'fedsim'; did you mean fedsam"):
        run.find("algo", "fedsim+scaffold")
    for strange in ("fedsam+", "+", "fedsam+fedsam", "fedavg+fedsam"):
        with pytest.raises(ValueError):
            run.find("algo", strange)


def test_run_two_combined_methods_do_not_share_a_setting_that_means_two_things(tmp_path):
    code = """
        from __future__ import annotations  # then the hints are texts
        from typing import Annotated
        import fl
        class Mine(fl.FedAvg):
            %s: Annotated[float, "%s", 0, None] = 0.3
    """
    mine = tmp_path / "mine.py"
    mine.write_text(textwrap.dedent(code % ("variate", "how much")))
    said = "scaffold and mine both have a setting variate, of two meanings"
    with pytest.raises(ValueError, match=said):
        run.find("algo", f"scaffold+{mine}:Mine")
    mine.write_text(textwrap.dedent(code % ("rho", "radius of the ascent step")))
    assert run.find("algo", f"{mine}:Mine+fedsam").rho == 0.3  # one meaning, so it is shared
    assert issubclass(run.find("algo", "fedwmsam+mofedsam"), fl.FedSAM)  # a child may say more


# A run.


def test_run_writes_a_whole_folder_and_never_overwrites_it(tmp_path, run_images, capsys):
    tiny = run_settings(run_images, "fedsynsam", threads=2)
    words = [*run_words(tiny), "--out", tmp_path, "--name", "mine"]
    code, out, _ = run_main(capsys, *words)
    folder = tmp_path / "mine"
    names = "config.json log.jsonl checkpoint.pt result.json curve.png synthetic.png"
    assert code == 0 and {p.name for p in folder.iterdir()} == set(names.split())
    assert all(word in out for word in ("accuracy", "eigenvalue", "MB up", "matching", str(folder)))
    config = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    assert config["settings"]["hidden"] == 4 and config["machine"]["torch"] == torch.__version__
    assert "threads" not in config["settings"]
    assert [row["round"] for row in log] == [1, 2, 3, 4] and result["averaged"] == [3, 4]
    assert result["test_acc"] == pytest.approx((log[2]["test_acc"] + log[3]["test_acc"]) / 2)
    assert (result["up"], result["down"]) == (log[3]["up"], log[3]["down"])
    assert result["bits"] == pytest.approx(8 * result["up"] / (4 * 2 * result["d"]))

    before = {p: p.read_bytes() for p in folder.iterdir()}
    code, _, err = run_main(capsys, *words)
    assert code == 2 and "exists" in err and "--resume" in err
    assert run_main(capsys, "--resume", folder)[:2] == (0, out)  # finished: only its card
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_run_without_a_folder_gives_the_same_numbers(tmp_path, run_tiny):
    seen, settings = [], run_tiny("fedsam")
    outcome = run.experiment(**settings, watch=lambda federation: seen.append(federation.t))
    other = run.experiment(tmp_path / "deep" / "run", **settings)
    assert seen == [1, 2, 3, 4] and outcome.log == other.log
    assert torch.equal(outcome.federation.w, other.federation.w)
    assert outcome.result | {"seconds": 0} == other.result | {"seconds": 0}
    federation, images = run.load(tmp_path / "deep" / "run")
    assert torch.equal(federation.w, other.federation.w) and len(images.val.y) == 20
    assert not torch.equal(run.experiment(**settings, seed=1).federation.w, other.federation.w)


def test_run_seed_moves_everything_that_is_drawn(run_tiny):
    a, b, c = (
        run.compose(run.resolve(**run_tiny(**how)))[0]
        for how in ({"seed": 0}, {"seed": 1}, {"seed": 1, "algo": "scaffold"})
    )
    assert not torch.equal(a.task.w0, b.task.w0) and torch.equal(b.task.w0, c.task.w0)
    assert not same(a.task.parts, b.task.parts) and same(b.task.parts, c.task.parts)
    assert (a.method.seed, c.method.seed) == (0, 1)


def test_run_evaluates_when_it_should_and_averages_the_last(run_tiny):
    outcome = run.experiment(**run_tiny(rounds=7, eval_every=3, last=2))
    assert [row["round"] for row in outcome.log if "test_acc" in row] == [3, 6, 7]
    assert outcome.result["averaged"] == [6, 7]


def test_run_measures_all_images_of_the_sample(run_tiny):
    """Loss, accuracy and eigenvalue in chunks and on threads are those of the whole."""
    outcome = run.experiment(**run_tiny("fedsam", visit="threads", threads=2, measure_images=70))
    federation, images = outcome.federation, outcome.data
    sample = run.measured_images(images.train, 70)
    x, y, _ = sample.batch(data.unmoved(torch.arange(70)))
    scores = federation.task.apply(federation.w, x)
    row = outcome.log[-1]
    loss = torch.nn.functional.cross_entropy(scores, y)
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["train_acc"] == pytest.approx((scores.argmax(1) == y).double().mean().item())

    def whole(w):
        return torch.nn.functional.cross_entropy(federation.task.apply(w, x), y)

    H = torch.func.hessian(whole)(federation.w)
    largest = float(torch.linalg.eigvalsh(H.double())[-1])
    assert outcome.result["eigenvalue"] == pytest.approx(largest, rel=1e-2)


def test_run_takes_the_clients_that_come_with_the_data(tmp_path, run_tiny, run_images):
    path = str(tmp_path / "writers.npz")
    with np.load(run_images) as pack:
        np.savez(path, **pack, client_train=np.array(list("abc"))[np.arange(90) // 30])
    outcome = run.experiment(**run_tiny(dataset=path, clients=3, val=0))
    assert outcome.federation.task.sizes == [30, 30, 30]
    with pytest.raises(ValueError, match="participation = 5"):
        run.experiment(**run_tiny(dataset=path, clients=5, participation=5))


def test_run_settings_of_the_machine_do_not_change_the_numbers(tmp_path, run_tiny):
    settings = run_tiny("scaffold", rounds=2)
    run.experiment(tmp_path / "a", **settings)
    for how in ({"visit": "plain"}, {"visit": "threads", "threads": 2}, {"checkpoint_every": 1}):
        outcome = run.experiment(**settings | how)
        assert outcome.log == run.experiment(tmp_path / "a", **settings | how).log  # no other run
    vmap = run.experiment(**settings, visit="vmap", chunk=2)
    assert torch.allclose(vmap.federation.w, outcome.federation.w, rtol=1e-4, atol=1e-6)


class RunKilled(BaseException):
    """In place of SIGKILL."""


def run_until_killed(owner, name, call, folder, settings, only=lambda *a: True):
    """Start a run that dies when it calls owner.name for the call-th time."""
    inner, calls = getattr(owner, name), []

    def outer(*args, **more):
        calls.extend([1] * bool(only(*args)))
        if len(calls) >= call and only(*args):
            raise RunKilled
        return inner(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunKilled):
        patch.setattr(owner, name, outer)
        run.experiment(folder, **settings)


def test_run_killed_anywhere_resumes_to_the_same_bits(tmp_path, run_tiny):
    """There are checkpoints after rounds 2, 4, 6 and 7; the synthesis is before round 3."""
    more = dict(rounds=7, participation=3, compress="topk", error_feedback="on", seed=5)
    settings, whole, cut = run_tiny("fedsynsam", **more), tmp_path / "whole", tmp_path / "cut"
    run.experiment(whole, **settings)

    def checkpoint(source, target):
        return target.name == "checkpoint.pt"

    run_until_killed(run, "write", 1, cut, settings)  # before config.json is there
    run_until_killed(fl.Federation, "round", 2, cut, settings)  # before there is a checkpoint
    run_until_killed(synth, "matching_loss", 2, cut, settings)
    run_until_killed(os, "replace", 1, cut, settings, checkpoint)
    run_until_killed(fl.Federation, "round", 4, cut, settings)  # it had gone back to round 2
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"round": 999, "torn li')  # a line cut off in the middle
    run_until_killed(run.json, "dumps", 1, cut, settings, lambda x, **k: x.get("round") == 6)
    run_until_killed(run, "result_of", 1, cut, settings)
    run_until_killed(os, "replace", 1, cut, settings, lambda a, b: b.name == "result.json")
    run.experiment(cut, **settings)
    assert same(run_state(cut), run_state(whole))


RUN_KILLER = """
import os, signal, sys
replace = os.replace
def killed(a, b):
    if b.name == "checkpoint.pt":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = killed
import run
sys.exit(run.main(sys.argv[1:]))
"""


def test_run_killed_by_the_system_resumes_to_the_same_bits(tmp_path, run_tiny, capsys):
    settings = run_tiny("scaffold", compress="topk", error_feedback="on") | {"checkpoint_every": 3}
    run.experiment(tmp_path / "whole", **settings)
    words = run_words(settings) + ["--out", str(tmp_path), "--name", "cut"]
    code = [sys.executable, "-c", RUN_KILLER, *words]
    assert subprocess.run(code, cwd=HERE, capture_output=True).returncode == -signal.SIGKILL
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 3
    assert run_main(capsys, "--resume", tmp_path / "cut", "--threads", 1)[0] == 0
    assert same(run_state(tmp_path / "cut"), run_state(tmp_path / "whole"))


def test_run_damage_of_a_checkpoint_is_found(tmp_path, run_tiny):
    """Whatever bit is flipped: the file is refused, or holds what it held."""
    settings = run_tiny("fedsynsam", compress="topk", error_feedback="on")
    folder, fate = tmp_path / "a", []
    run.experiment(folder, **settings)
    path, before = folder / "checkpoint.pt", run.load(folder)[0]
    good, draws = path.read_bytes(), random.Random(0)
    places = [*draws.sample(range(len(good)), 30), *range(30), *range(len(good) - 30, len(good))]
    federation, digest = (
        run.compose(run.resolve(**settings))[0],
        json.loads((folder / "config.json").read_text())["hash"],
    )
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << draws.randrange(8)
        path.write_bytes(bad)
        try:
            run.restore(folder, federation, digest)
            fate.append("same")
            for name in CHECKPOINT:
                assert same(getattr(federation, name), getattr(before, name)), place
            assert same(federation.method.state, before.method.state), place
        except ValueError as error:
            assert "checkpoint.pt" in str(error)
            fate.append("refused")
    assert fate.count("refused") > 40
    run.experiment(tmp_path / "b", **settings | {"seed": 1})
    others = (tmp_path / "b" / "checkpoint.pt").read_bytes()
    for bad in (b"", good[:1000], good[1000:], b"x" * 5000, others):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="checkpoint.pt is of no use"):
            run.restore(folder, federation, digest)


def test_run_a_folder_is_continued_only_by_the_run_that_it_holds(tmp_path, run_tiny, run_images):
    copy, folder, mine = tmp_path / "copy.npz", tmp_path / "a", tmp_path / "mine.py"
    mine.write_text(RUN_MINE)
    copy.write_bytes(Path(run_images).read_bytes())
    settings = run_tiny(f"{mine}:Mine", dataset=str(copy), rounds=2)
    run.experiment(folder, **settings)
    for change in ({"strength": 0.6}, {"rounds": 3}, {"compress": "qsgd"}, {"seed": 1}):
        (name,) = change
        with pytest.raises(ValueError, match=f"of another run: {name} was"):
            run.experiment(folder, **settings | change)
    with np.load(copy) as pack:
        changed = dict(pack)
    changed["x_train"][0, 0, 0] ^= 1
    np.savez(copy, **changed)
    with pytest.raises(ValueError, match="of another run: data was"):
        run.experiment(folder, **settings)
    copy.write_bytes(Path(run_images).read_bytes())
    mine.write_text(RUN_MINE.replace("(1 + self.strength)", "(2 + self.strength)"))
    with pytest.raises(ValueError, match="of another run: .*mine.py has changed"):
        run.experiment(folder, **settings)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json"):
        run.experiment(folder, **settings)


def test_run_a_folder_is_not_continued_with_other_clients(tmp_path, run_tiny, run_images):
    own, folder = tmp_path / "own.npz", tmp_path / "a"
    with np.load(run_images) as pack:
        arrays = dict(pack)
    np.savez(own, **arrays, client_train=np.arange(90) % 5)
    settings = run_tiny("fedavg", dataset=str(own), val=0, rounds=2)
    run.experiment(folder, **settings)
    np.savez(own, **arrays, client_train=np.arange(90) // 18)
    with pytest.raises(ValueError, match="of another run: data was"):
        run.experiment(folder, **settings)


def test_run_a_class_without_a_file_is_not_taken_for_another_one(tmp_path, run_tiny):
    def defined(factor):
        made = {"fl": fl, "__name__": "notebook"}
        text = "class M(fl.FedAvg):\n    def correct(self, g, *_):\n"
        exec(f"{text}        return {factor} * g", made)
        return made["M"]

    settings = run_tiny("fedavg", rounds=2)
    run.experiment(tmp_path / "a", **settings | {"algo": defined(1)})
    run.experiment(tmp_path / "a", **settings | {"algo": defined(1)})
    with pytest.raises(ValueError, match="of another run: .*M was"):
        run.experiment(tmp_path / "a", **settings | {"algo": defined(2)})


def test_run_a_folder_of_other_things_is_left_alone(tmp_path, run_tiny):
    for name in ("log.jsonl", "curve.png", "result.json", "checkpoint.pt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(ValueError, match=f"holds {name} and no run"):
            run.experiment(folder, **run_tiny("fedavg"))
        assert [path.read_text() for path in folder.iterdir()] == ["precious"]


def test_run_a_file_that_changes_during_a_comparison_is_no_part_of_its_table(
    tmp_path, run_tiny, capsys, monkeypatch
):
    mine, real = tmp_path / "mine.py", run.experiment
    mine.write_text(RUN_MINE)

    def edited(folder, **settings):
        outcome = real(folder, **settings)
        mine.write_text(RUN_MINE.replace("(1 + self.strength)", "(2 + self.strength)"))
        return outcome

    monkeypatch.setattr(run, "experiment", edited)
    tiny = run_tiny(rounds=2)
    del tiny["algo"]
    words = [*run_words(tiny), "--algo", f"{mine}:Mine", "--seeds", "3", "--out", tmp_path]
    code, out, err = run_main(capsys, *words)
    assert code == 1 and err.count("mine.py changed before that run") == 2
    assert re.search(r"\| 1 \|$", out, re.M)  # one run in the table


def test_run_a_method_that_breaks_does_not_stop_the_others(tmp_path, run_tiny, capsys):
    text = "import fl\nclass M(fl.FedAvg):\n    def aggregate(self, *a, **b):\n        return {}[0]"
    (tmp_path / "mine.py").write_text(text)
    tiny = run_tiny(rounds=2)
    del tiny["algo"]
    methods = ["--algo", f"{tmp_path / 'mine.py'}:M", "--algo", "fedavg"]  # as both in one
    code, out, err = run_main(capsys, *run_words(tiny), *methods, "--out", tmp_path)
    assert code == 1 and "M-s0: KeyError: 0" in err and "| fedavg |" in out


def test_run_a_rank_without_a_world_is_no_rank(tmp_path, run_tiny, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run.experiment(tmp_path / "a", **run_tiny("fedavg", rounds=2))
    assert (tmp_path / "a" / "result.json").exists()


def test_run_a_folder_never_brings_its_own_code(tmp_path, run_tiny, capsys):
    mine, folder = tmp_path / "mine.py", tmp_path / "a"
    mine.write_text(RUN_MINE)
    run.experiment(folder, **run_tiny(f"{mine}:Mine", rounds=2))
    (folder / "result.json").unlink()
    code, _, err = run_main(capsys, "--resume", folder)
    assert code == 2 and f"give algo = {mine}:Mine again" in err
    with pytest.raises(ValueError, match="give algo"):
        run.load(folder)
    code, out, err = run_main(capsys, "--resume", folder, "--algo", f"{mine}:Mine")
    assert code == 0 and "accuracy" in out, err
    assert run.load(folder, algo=f"{mine}:Mine")[0].t == 2


@pytest.mark.parametrize("label", ["{}:M", "{}", "fedavg+{}", "{}:M+fedavg", "fedavg:{}"])
@pytest.mark.parametrize("kind", ["algo", "compress", "model", "partition"])
def test_run_no_folder_brings_its_own_code(label, kind, tmp_path, run_tiny, capsys):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    settings = run_tiny() | {kind: label.format(evil)}
    for name, content in (("config", {"settings": settings}), ("comparison", {"x-s0": settings})):
        (tmp_path / name).mkdir()
        run.write_json(tmp_path / name / f"{name}.json", content)
        code, _, err = run_main(capsys, "--resume", tmp_path / name)
        assert code == 2 and "to run this code" in err
    assert not (tmp_path / "touched").exists()


def test_run_resume_changes_the_machine_and_nothing_else(tmp_path, run_tiny, capsys):
    settings = run.resolve(**run_tiny(rounds=2))
    run.write_json(tmp_path / "comparison.json", {"x-s0": settings, "x-s1": settings | {"seed": 1}})
    folder, runs, several = run.job_of({"resume": tmp_path, "threads": 1})
    assert several and folder == tmp_path and [s["seed"] for s in runs.values()] == [0, 1]
    assert all(s == settings | {"threads": 1, "seed": s["seed"]} for s in runs.values())
    refused = {"--rounds 200": "stays", "--rho 0.2": "rho is no setting", "--seeds 5": "continue"}
    refused |= dict.fromkeys(("--quick", "--name x", "--out y"), "continue")
    for words, why in refused.items():
        code, _, err = run_main(capsys, "--resume", tmp_path, *words.split())
        assert code == 2 and words.split()[0][2:] in err and why in err


def test_run_resume_says_what_is_no_setting_of_the_run(tmp_path, run_tiny):
    run.experiment(tmp_path / "a", **run_tiny("fedavg", rounds=1))
    with pytest.raises(ValueError, match="rho is no setting of the run in the folder"):
        run.load(tmp_path / "a", rho=0.1)


def test_run_takes_a_class_without_a_file_and_a_file_with_other_classes(tmp_path, run_tiny):
    M = type("M", (fl.FedAvg,), {"__module__": "a_notebook"})
    outcome = run.experiment(tmp_path / "a", **run_tiny(M, rounds=1))
    assert outcome.result["algo"] == "a_notebook:M"
    mine = tmp_path / "mine.py"
    mine.write_text("from torch import Tensor, device\nfrom collections import deque\n" + RUN_MINE)
    assert run.find("model", f"{mine}:Net").__name__ == "Net"


def test_run_a_folder_belongs_to_one_process(tmp_path, run_tiny):
    with run.workplace(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        run.experiment(tmp_path, **run_tiny())
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again
    os.close(handle)


# The command line.


def test_run_default_names_do_not_collide(tmp_path, run_tiny, capsys):
    words = [*run_words(run_tiny(rounds=1)), "--out", tmp_path]
    for name in ("fedavg-s0", "fedavg-s0-2"):
        assert run_main(capsys, *words)[0] == 0 and (tmp_path / name / "result.json").exists()


def test_run_comparison_gives_each_run_its_flags_and_one_table(tmp_path, run_tiny, capsys):
    tiny = run_tiny("fedsam", rounds=2) | {"rho": 0.05}
    del tiny["algo"]
    words = [*run_words(tiny), "--algo", "fedavg", "fedsam", "--seeds", 2]
    code, out, _ = run_main(capsys, *words, "--out", tmp_path, "--name", "both")
    folder = tmp_path / "both"
    rows = [line for line in out.splitlines() if line.startswith("| fed")]
    assert code == 0 and len(rows) == 2 and (folder / "table.md").read_text() in out
    config = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/config.json")}
    assert set(config) == {"fedavg-s0", "fedavg-s1", "fedsam-s0", "fedsam-s1"}
    assert (
        config["fedsam-s1"]["settings"]["rho"] == 0.05
        and "rho" not in config["fedavg-s0"]["settings"]
    )
    accuracy = [
        100 * json.loads((folder / f"fedavg-s{s}" / "result.json").read_text())["test_acc"]
        for s in (0, 1)
    ]
    assert f"{np.mean(accuracy):.2f} ± {np.std(accuracy, ddof=1):.2f}" in rows[0]
    (folder / "fedsam-s1" / "result.json").unlink()
    again = run_main(capsys, "--resume", folder)
    assert again[0] == 0 and rows[0] in again[1]
    code, _, err = run_main(capsys, "--resume", folder, "--algo", "fedavg", "fedprox")
    assert code == 2 and "has no run of fedprox; known: fedavg, fedsam" in err
    code, _, err = run_main(capsys, "--resume", folder / "fedavg-s0", "--algo", "fedsam", "fedavg")
    assert code == 2 and "holds one run" in err


def test_run_comparison_with_one_wrong_method_makes_no_folder(tmp_path, run_tiny, capsys):
    tiny = run_tiny("dynafed", rounds=9, warmup=2, window=5)
    del tiny["algo"]
    words = [*run_words(tiny), "--algo", "fedavg", "dynafed", "--out", tmp_path]
    code, _, err = run_main(capsys, *words)
    assert code == 2 and "window = 5 is longer" in err and not list(tmp_path.iterdir())


def test_run_table_has_means_and_standard_deviations():
    def result(accuracy):
        return {key: 1.0 for key, _, _ in terminal.SHOWN.values()} | {"test_acc": accuracy}

    table = terminal.table({"b": [result(0.1), result(0.2)], "a": [result(0.5)]}).splitlines()
    assert table[2].startswith("| b | 15.00 ± 7.07 | 1.000 ± 0.000 |") and table[2].endswith(
        "| 2 |"
    )
    assert table[3].startswith("| a | 50.00 | 1.000 |") and len(table) == 4


@pytest.mark.parametrize("algo", [["fedavg", "fedsam"], 3, None])
def test_run_has_one_method(algo):
    with pytest.raises(ValueError, match="a run has one, a name or a class"):
        run.experiment(algo=algo)


def test_run_compares_compressors_too(tmp_path, run_tiny, capsys):
    tiny = run_tiny("fedsam", rounds=2)
    del tiny["algo"]
    chosen = ["--algo", "fedavg", "fedsam", "--compress", "sign", "topk", "--k", 0.1, "--seeds", 2]
    code, out, _ = run_main(capsys, *run_words(tiny), *chosen, "--out", tmp_path, "--name", "all")
    assert code == 0
    arms = ["fedavg, sign", "fedavg, topk", "fedsam, sign", "fedsam, topk"]
    lines = [line for line in out.splitlines() if line.endswith("| 2 |")]
    assert [line.split(" | ")[0] for line in lines] == ["| " + arm for arm in arms]
    config = json.loads((tmp_path / "all" / "fedsam-topk-s1" / "config.json").read_text())
    assert config["settings"]["k"] == 0.1 and config["settings"]["compress"] == "topk"
    code, again, _ = run_main(capsys, "--resume", tmp_path / "all", "--compress", "topk")
    assert code == 0 and again.splitlines()[2] == out.splitlines()[2]
    code, _, err = run_main(capsys, "--resume", tmp_path / "all", "--compress", "qsgd")
    assert code == 2 and "has no run of qsgd; known: sign, topk" in err
    one = tmp_path / "all" / "fedsam-topk-s1"
    code, _, err = run_main(capsys, "--resume", one, "--compress", "topk", "sign")
    assert code == 2 and "holds one run, of one compress" in err


def test_run_flags_that_no_run_has_are_refused(capsys):
    runs = run.runs_of({"algo": ["fedavg", "fedsam"], "rho": 0.3, "rounds": 20})
    assert runs["fedsam-s0"]["rho"] == 0.3 and "rho" not in runs["fedavg-s0"]
    code, _, err = run_main(capsys, "--algo", "fedavg", "scaffold", "--rho", 0.3)
    assert code == 2 and "rho is no setting" in err


def test_run_comparison_goes_on_after_a_run_that_fails(tmp_path, run_tiny, capsys):
    tiny = run_tiny("fedsam", rounds=2, clip=0.0) | {"rho": 1e29}
    del tiny["algo"]
    words = [*run_words(tiny), "--algo", "fedsam", "fedavg", "--out", tmp_path]
    code, out, err = run_main(capsys, *words)
    assert code == 1 and "| fedavg |" in out and "fedsam-s0: round" in err


OWN = """
from typing import Annotated
import fl

class A(fl.FedAvg):
    def upload(self, w, received, mine, lr_sum):
        return super().upload(w, received, mine, lr_sum)

class B(A):
    pass

class C(A):
    beta: Annotated[float, "has no default", 0, 1]
"""


def test_run_what_is_finished_stays_when_a_file_of_ones_own_has_changed(tmp_path, run_tiny, capsys):
    mine, folder = tmp_path / "mine.py", tmp_path / "table"
    mine.write_text(OWN)
    tiny = run_tiny(rounds=2)
    del tiny["algo"]
    algos = [f"{mine}:A", f"{mine}:B"]
    words = [*run_words(tiny), "--algo", "fedavg", *algos, "--out", tmp_path, "--name", "table"]
    assert run_main(capsys, *words)[0] == 0
    table = (folder / "table.md").read_text()
    (folder / "curve.png").write_text("the curve")
    mine.write_text(OWN.replace("mine, lr_sum)\n\nclass B", "mine, lr_sum)[0]\n\nclass B"))
    code, _, err = run_main(capsys, "--resume", folder)
    assert code == 2 and f"give algo = {' '.join(algos)} again" in err
    code, out, err = run_main(capsys, "--resume", folder, "--algo", *algos)
    assert code == 1 and "mine.py has changed since then" in err and "| fedavg |" in out
    assert (folder / "table.md").read_text() == table
    assert (folder / "curve.png").read_text() == "the curve"
    # and in a new run, where Python finds the mistake, not we
    code, _, err = run_main(capsys, *run_words(tiny), "--algo", algos[0], "--out", tmp_path)
    assert code == 2 and re.search(r"to unpack .*\(File .*fl.py\", line \d+, in visit\)", err)
    code, _, err = run_main(capsys, *run_words(tiny), "--algo", f"{mine}:C", "--out", tmp_path)
    assert code == 2 and err.endswith("the setting beta of C has no default\n")


def test_run_divergence_is_code_1_and_keeps_the_log(tmp_path, run_tiny, capsys):
    for flags, word in (({"lr": 1e29, "clip": 0.0}, "client"), ({"server_lr": 1e29}, "round")):
        words = [*run_words(run_tiny() | flags), "--out", tmp_path, "--name", word]
        code, _, err = run_main(capsys, *words)
        (name, value), *_ = flags.items()
        assert code == 1 and word in err and "not the defaults: " in err
        assert f"{name} = {value:g}" in err and "--resume" not in err  # it would happen again
        assert (tmp_path / word / "log.jsonl").exists()


def test_run_interrupted_is_code_130(tmp_path, run_tiny, capsys, monkeypatch):
    def interrupted(federation):
        raise KeyboardInterrupt

    monkeypatch.setattr(fl.Federation, "round", interrupted)
    code, _, err = run_main(capsys, *run_words(run_tiny()), "--out", tmp_path)
    assert code == 130 and "--resume" in err


def test_run_list_names_every_part(capsys):
    code, out, _ = run_main(capsys, "--list")
    assert code == 0
    for kind in run.PLACES:
        for name, part in parts(kind).items():
            assert any(
                line.split()[0] == name and len(line) > 30 for line in out.splitlines() if line
            )


def test_run_help_shows_the_parts_in_question(capsys):
    def help_of(*words):
        with pytest.raises(SystemExit) as end:
            run.main([*words, "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    out = help_of("--algo", "fedprox", "--compress", "topk")
    assert "--prox" in out and "--k " in out and "--rho" not in out and "--levels" not in out
    out = help_of("--algo", "fedsam", "scaffold")
    assert "--rho" in out and "--variate" in out and "default 0.1" in out


@pytest.mark.parametrize(
    "words, hint",
    [
        ("--algo fedsinsam", "did you mean fedsynsam"),
        ("--algo FEDAVG", "fedavg"),
        ("--algo scafold", "did you mean scaffold"),
        ("--algo", "expected at least one"),
        ("--model resnet", "resnet18"),
        ("--compress zip", "known: "),
        ("--partition dirichle", "did you mean dirichlet"),
        ("--partition dirichlet --alpha 0", "alpha = 0"),
        ("--partition dirichlet --alpha nan", "alpha = nan"),
        ("--rho -0.1", "at least 0"),
        ("--mix 1.5", "0..1"),
        ("--rounds 0", "must be in 1.."),
        ("--rounds 3.5", "invalid int"),
        ("--lr x", "invalid float"),
        ("--average sizes", "did you mean size"),
        ("--rouns 3", "did you mean rounds"),
        ("--local_steps 3", "did you mean local-steps?"),
        ("-lr 0.1", "did you mean lr?"),
        ("--radius 0.1", "did you mean rho"),
        ("--epochs 3", "did you mean local-epochs or"),
        ("--learning-rate 3", "did you mean lr"),
        ("--algo fl.py", "which algo in it, as in fl.py:NAME"),
        ("--algo run:Mine", "did you mean run.py:Mine"),
        ("--algo labelcal --man 0.15", "does not act on the loss of labelcal"),
        ("--xyzzy 3", "run.py --help lists the settings"),
        ("--error-feedback", "needs a value: auto|on|off"),
        ("--prox 0.1", "algo fedprox"),
        ("--algo fedavg --rho 0.1", "algo fedsam"),
        ("--participation 101", "1..100"),
        ("--clients 9001 --participation 1", "1..9000"),
        ("--clients 5000 --participation 1 --classes-per-client 2", "without images"),
        ("--partition shards --classes-per-client 11", "classes_per_client = 11"),
        ("--window 99", "window = 99"),
        ("--lr 3e36", "1e+30"),
        ("--algo fedavg fedavg", "two runs would be called fedavg-s0"),
        ("--warmup 9 --rounds 9", "below the number of rounds"),
        ("--algo swa --rounds 20", "swa_start = 40 must be below the number of rounds, 20"),
        ("--compress topk --k 0", "k = 0"),
        ("--compress topk --k 54315", "1..54314"),
        ("--compress topk --k 2.5", "whole"),
        ("--val 10000", "0..9999"),
        ("--dataset nosuch.npz", "no such file"),
        ("--dataset {text}", "cannot be read"),
        ("--dataset {pickled}", "cannot be read"),
        ("--seeds 0", "1..1000"),
        ("--name a/b", "plain folder name"),
        ("--name ..", ".."),
        ("--resume {folder}", "config.json cannot be read: No such file"),
        ("--resume {folder}/none", "there is no folder"),
        ("--resume {foreign}", "colour"),
        ("--resume {text}", "config.json"),
        ("--resume {list}", "comparison.json"),
        ("--device cuda", "no GPU"),
        ("--device tpu", "did you mean cpu"),
        ("--algo {text}:M", "text.npz"),
        ("--out {text}", "text.npz"),
    ],
)
def test_run_wrong_input_is_one_helpful_line_and_code_2(words, hint, tmp_path, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    places = {name: tmp_path / name for name in ("folder", "foreign", "list")}
    for place in places.values():
        place.mkdir()
    foreign = {"settings": {"colour": "red"}}
    run.write_json(tmp_path / "foreign" / "config.json", foreign)
    (tmp_path / "list" / "comparison.json").write_text('{"x": 3}')
    (tmp_path / "text.npz").write_text("I am no npz")
    good = dict(x_train=np.zeros((20, 8, 8), np.uint8), y_train=np.arange(20) % 4)
    good |= dict(x_test=np.zeros((4, 8, 8), np.uint8), y_test=np.array([print] * 4, dtype=object))
    np.savez(tmp_path / "pickled.npz", **good)
    places |= {name: tmp_path / f"{name}.npz" for name in ("text", "pickled")}
    before = sorted(tmp_path.rglob("*"))
    new = "--out" not in words and "--resume" not in words
    out_folder = ["--out", tmp_path / "runs"] if new else []
    code, out, err = run_main(capsys, *words.format(**places).split(), *out_folder)
    assert code == 2 and out == "" and hint in err, err
    assert err.startswith("run.py: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_run_a_run_that_fails_in_another_rank_is_no_wrong_input(monkeypatch, capsys):
    def fail(folder, **settings):
        assert folder is None  # only the first rank has one
        raise OSError("the disk is full")

    monkeypatch.setattr(run, "first_rank", lambda: False)
    monkeypatch.setattr(run, "experiment", fail)
    code, _, err = run_main(capsys, "--algo", "fedavg", "--quick")
    assert code == 1 and "the disk is full" in err


def test_run_starts_without_slow_imports_and_bears_a_closed_pipe():
    slow = "matplotlib", "torchvision", "sympy", "torch._dynamo"
    code = f"import sys, run; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    listing = subprocess.Popen([sys.executable, "run.py", "--list"], cwd=HERE, stdout=-1, stderr=-1)
    listing.stdout.close()
    assert listing.wait(timeout=100) in (0, 1) and b"Traceback" not in listing.stderr.read()


def test_run_a_terminal_without_the_letters_of_the_table_gets_question_marks():
    code = "from plumbing import terminal; terminal.say('1 \u00b1 2')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, env=environment
    )
    assert done.stdout == b"1 ? 2\n", done.stderr


def test_run_a_combination_is_called_by_all_its_parts(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from fl import FedAvg\nclass Mine(FedAvg):\n    pass\n")
    algos = [f"{path}:Mine", f"scaffold+{path}:Mine", "fedsam"]
    assert list(run.runs_of({"algo": algos})) == ["Mine-s0", "scaffold+Mine-s0", "fedsam-s0"]
    assert short(f"{path}:Mine+a") == "Mine+a"


# The project.

RUN_BOOK = ("compress", "sam", "synth", "fl", "run")


def run_imports():
    """What the files of the project import of it: {module: {module}}."""
    files = {
        ".".join(path.relative_to(HERE).with_suffix("").parts): path
        for folder in (
            ".",
            "vision",
            "methods",
            "codes",
            "scale",
            "plumbing",
            "lab",
            "classroom",
            "tests",
        )
        for path in (HERE / folder).glob("*.py")
    }
    found = {}
    for module, path in files.items():
        names, tree = set(), ast.parse(path.read_text())
        if ast.unparse(tree.body[-1:]).startswith("if __name__ == '__main__'"):
            tree.body.pop()  # what the command needs, not the module
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.names[0].name != "*", path
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = names & (files.keys() - {module})
    return found


def test_run_imports_point_one_way():
    imports, book = run_imports(), set(RUN_BOOK)
    assert {"vision.data", "fl", "run"} <= imports.keys() and imports["fl"] >= {"sam", "synth"}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle
    for module, used in imports.items():
        folder = module.partition(".")[0]
        ours = {name.partition(".")[0] for name in used}
        if folder in RUN_BOOK[:-1]:
            legal = {*RUN_BOOK[: RUN_BOOK.index(folder)], "vision"}
        else:
            legal = {
                "run": {*book, "vision", "scale", "plumbing"},
                "plumbing": {"fl", "vision", "scale", "plumbing"},
                "vision": {"vision"},
                "codes": book - {"run"} | {"codes", "vision"},
                "methods": book - {"run"} | {"methods", "vision"},
                "scale": book - {"run"} | {"scale", "vision", "methods"},
            }.get(folder, ours)
        assert ours <= legal, f"{module} imports {ours - legal}"
        if "run" in used:
            assert folder in ("lab", "classroom", "tests", "test_all"), f"{module} imports run"
