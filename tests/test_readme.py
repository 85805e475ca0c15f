"""What the README says is true: its code runs, its commands work, its numbers are measured."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fl
import run
from compress import TopK
from plumbing.folder import described
from plumbing.settings import parts
from tests.test_methods import COSTS

HERE = Path(__file__).parents[1]
README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
TINY = (
    "--partition iid --clients 6 --participation 2 --local-steps 2 --batch 4 --width 2 --hidden 4 "
    "--val 20 --measure-images 20 --rounds 3"
).split()


def block(mark):
    """The code block of the README that contains this mark."""
    (text,) = [text for _, text in BLOCKS if mark in text]
    return text


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with mine.py, as a reader would have it; commands are run there."""
    (tmp_path / "mine.py").write_text(block("class Blended"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_round_in_plain_pytorch_is_a_round_of_fl(monkeypatch):
    monkeypatch.chdir(HERE)
    plain = {}
    exec(block("decoded = []"), plain)

    class Task:
        """The README's network and clients, as a task of fl.py."""

        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(784, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )
        w0, sizes = torch.nn.utils.parameters_to_vector(net.parameters()).detach(), [30] * 4

        def loss(self, w, batch):
            shapes, i = [p.shape for p in self.net.parameters()], int(batch[0, 0])
            a, b, c, d = (v.view(s) for v, s in zip(w.split([s.numel() for s in shapes]), shapes))
            hidden = torch.relu(plain["x"][i] @ a.T + b)
            return torch.nn.functional.cross_entropy(hidden @ c.T + d, plain["y"][i])

        def plan(self, client, generator):
            return torch.full((plain["K"], 1, 4), client)

        def steps(self, client):
            return plain["K"]

    method = fl.FedSAM(Task(), lr=plain["lr"], rho=plain["rho"], clip=0.0)
    federation = fl.Federation(method, TopK(plain["k"]), participation=4)
    federation.round()
    assert torch.allclose(federation.w, plain["w"], atol=1e-7)
    assert not torch.allclose(federation.w, Task.w0, atol=1e-4)


def test_the_run_from_python_runs(capsys):
    exec(block("outcome ="), {})
    assert "torch.Size([54314])" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(^|&& )python run.py", c)])
def test_commands_of_run_work(command, mine, capsys):
    words = shlex.split(command.rpartition("python run.py")[2])
    if "--resume" in words:
        run.main(["--algo", "fedavg", "--seeds", "2", "--name", "first", *TINY])
        assert run.main(words) == 0
    elif "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            run.main(words)
        assert "--prox" in capsys.readouterr().out
    elif "--list" in words:
        assert run.main(words) == 0
    else:
        small = TINY if "fedsynsam" not in words and words else [*TINY, *SYNTHESIS]
        assert run.main([word for word in words if word != "--quick"] + small) == 0
        assert run.main([*words, "--out", "other", "--rho=nan"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m lab." in c])
def test_commands_of_the_lab_work(command, tmp_path, capsys):
    pytest.importorskip("pandas", reason="lab/requirements.txt")
    module, *words = shlex.split(command.rpartition("python -m ")[2])
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert importlib.import_module(module).main(words + places) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


SYNTHESIS = "--warmup 1 --window 1 --outer-steps 2 --inner-steps 2".split()


def elsewhere(start):
    """All commands of the other documents that begin like this."""
    pages = [HERE / "CONTRIBUTING.md", *HERE.glob("*/*.md")]
    held = ("lab", "results")  # commands of stored results, which take hours
    text = "\n".join(page.read_text() for page in pages if page.parent.name not in held)
    found = re.findall(rf"^{start}[^#\n]*|(?<=`){start}[^`]*(?=`)", text, re.M)
    return sorted({" ".join(command.split()) for command in found})


@pytest.mark.parametrize("command", elsewhere("python run.py"))
def test_commands_of_run_in_other_documents_work(command, mine, capsys):
    parent = "compress.Sign" if "--compress" in command else "fl.FedAvg"
    Path("mine.py").write_text(f"import compress\nimport fl\n\n\nclass Mine({parent}):\n    pass\n")
    words = [x for x in shlex.split(command.replace("NAME", "natural"))[2:] if x != "--quick"]
    if "cuda" in words and not torch.cuda.is_available():
        pytest.skip("no GPU")
    synthesis = [] if "fed" in command else SYNTHESIS  # the default learns images
    assert run.main([*words, *([] if "--list" in words else [*TINY, *synthesis])]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command", elsewhere("python -m (?!pytest)"))
def test_modules_and_flags_of_commands_in_other_documents_are_there(command):
    module, *words = command.split()[2:]
    file = HERE / (module.replace(".", "/") + ".py")
    source = "".join(path.read_text() for path in file.parent.glob("*.py"))
    assert file.exists() and all(word in source for word in words if word.startswith("--"))


def test_every_command_of_the_readme_is_run_by_a_test():
    tested = r"python run\.py|torchrun|(.*&& )?python -m lab\.|.*--method|.*&& python -m pytest"
    known = r"pip install .*&& python run\.py"
    assert all(re.match(f"({tested}|{known})", command) for command in COMMANDS)


def test_torchrun_works(mine):
    (command,) = [c for c in COMMANDS if c.startswith("torchrun")]
    words = shlex.split(command)
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    words[words.index("run.py")] = str(HERE / "run.py")
    words.remove("--quick")
    done = subprocess.run([*words, *TINY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1


def test_a_method_of_your_own_keeps_the_rules(mine):
    (command,) = [c for c in COMMANDS if "--method" in c]
    words = [sys.executable, *shlex.split(command)[1:], "-n0", "-p", "no:cacheprovider"]
    words = [str(HERE / word) if word == "test_all.py" else word for word in words]
    words += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_numbers_of_the_main_job_are_those_of_the_stored_rows():
    pytest.importorskip("pandas", reason="lab/requirements.txt")
    from lab import claims, verdicts

    claim, part = claims.stored_claims(HERE / "results")["default"]
    columns = ("accuracy", "mean_model", "test_loss", "eigenvalue")
    table = claims.tables(claim, part)[""]
    one_bit = table[~table.arm.str.endswith(", 2 bits")]
    assert verdicts.arms_text(one_bit, columns) in README


# -------------------------------------------------------------------------- the table of methods


def rows_of_methods():
    """(name, up, down, gradients) for each method of methods/README.md; None: not said."""
    rows = {}
    for line in (HERE / "methods" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([a-z-]+)`", cells[0])
        if len(cells) == 5 and names:
            for k, name in enumerate(names):
                numbers = [numbers_of(cell, k) for cell in cells[2:]]
                rows[name] = numbers
            for other in re.findall(r"[;(] ?`([a-z-]+)`[:)]", cells[1]):
                rows[other] = None
    return rows


def numbers_of(cell, k):
    """The k-th of the numbers in a cell, or the only one."""
    numbers = [int(x) for x in cell.split(", ")] if cell else [None]
    return numbers[k] if len(numbers) > 1 else numbers[0]


TWO_BITS = "one class, 2 bits, lr 0.4"
DIFFERENCES = [  # in the README's order: claim, arms, measure
    ("compressed", "1 bit, feedback - none", "excess"),
    ("pooled", "FedSynSAM minus FedAvg", "eigenvalue"),
    ("pooled", "FedSynSAM minus FedAvg", "accuracy"),
    ("pooled", "FedSynSAM minus FedAvg", "mean_model"),
    ("pooled", "FedSAM minus FedAvg", "accuracy"),
    ("pooled", "FedSAM minus FedAvg", "mean_model"),
    ("default", "fedsynsam-d - fedspeed", "accuracy"),
    ("whose", "FedAvg, synthetic - FedAvg, synthetic, not learnt", "accuracy"),
    ("means", "FedDyn, 1 bit, class means - FedDyn, 1 bit, learnt", "accuracy"),
    ("whose", "FedDyn, true - FedDyn, none", "accuracy"),
    ("whose", "FedDyn, own - FedDyn, none", "accuracy"),
    ("whose", "FedDyn, own, as true - FedDyn, none", "accuracy"),
    ("default", "oracle+feddyn - fedspeed", "accuracy"),
    ("levels", "feddyn, three levels - feddyn, 1 bit", "accuracy"),
    ("levels", "feddyn, three levels - feddyn, no compression", "accuracy"),
    ("corrected", "one class, no ascent - one class, fedavg", "accuracy"),
    ("cifar", "Dir 0.1, own - Dir 0.1, fedavg", "test_loss"),
    ("cifar", "Dir 0.1, own - Dir 0.1, fedavg", "accuracy"),
    ("cifar", "Dir 0.1, true - Dir 0.1, fedavg", "test_loss"),
    ("accuracy", "fedgamma - fedsynsam", "accuracy"),
]


def test_differences_in_the_text_are_those_of_the_stored_rows():
    pytest.importorskip("pandas", reason="lab/requirements.txt")
    from lab import claims, report, verdicts

    number = r"([-+]?[\d.]+)"
    found = re.findall(rf"{number}\s+\[{number}, {number}\]", README)
    assert len(found) == len(DIFFERENCES)
    stored = claims.stored_claims(HERE / "results")
    for said, (name, arms, measure) in zip(found, DIFFERENCES):
        x = []
        pairs = report.POOLED[arms] if name == "pooled" else {name: arms}
        for claim, pair in pairs.items():
            table = claims.tables(*stored[claim])[""]
            labels = [report.arm_called(arm, table) for arm in pair.split(" - ")]
            x += [*verdicts.differences(table, *(verdicts.Value(a, measure) for a in labels))]
        true = verdicts.interval(x)
        for text, x in zip(said, true):
            digits = len(text.partition(".")[2])
            assert float(text) == pytest.approx(x, abs=0.51 * 10**-digits), (name, arms)


def test_other_numbers_in_the_text_are_those_of_the_stored_rows():
    pytest.importorskip("pandas", reason="lab/requirements.txt")
    from lab import claims

    stored = claims.stored_claims(HERE / "results")

    def means(name):
        (table,) = claims.tables(*stored[name]).values()
        return table.groupby("arm")[["eigenvalue", "accuracy", "mb_up"]].mean()

    text = " ".join(README.split())
    accuracy = means("levels").accuracy["feddyn, three levels"]
    assert f"--algo feddyn --compress qsgd-elias --lr 0.1` has {accuracy:.1f} % (" in text
    arms = [f"feddyn, {x}" for x in ("three levels", "1 bit", "no compression")]
    three, one, all_of_them = means("levels").mb_up[arms]
    assert three < one and "in an entropy code take fewer bytes" in text
    assert f"for {100 * three / all_of_them:.1f} % of the bytes up" in text
    (table,) = claims.tables(*stored["trajectory"]).values()
    path = table.groupby("arm").cos_path.mean()[["one class, 1 bit", TWO_BITS]]
    said = "their cosine to it is {:.2f}, with three values {:.2f} (`trajectory`"
    assert said.format(*path) in text


def test_the_rank_correlations_in_the_text_are_those_of_the_stored_rows():
    pytest.importorskip("pandas", reason="lab/requirements.txt")
    from lab import claims, figures

    stored, ranks = claims.stored_claims(HERE / "results"), []
    pictures = ("whose", "FedAvg"), ("whose", "FedDyn"), ("overfit", "Dir 0.1")
    for name, split in pictures:
        claim, (table,) = stored[name][0], claims.tables(*stored[name]).values()
        gain = "test_loss" if name == "overfit" else "accuracy"
        found = figures.gains_against(claim, table, gain)
        near = found[(found.split == split) & ~found.apart]
        ranks += [figures.rank_correlation(near, x) for x in ("eigenvalue", "cos_used")]
    ranks[4] *= -1  # there a gain lowers the test loss
    said = "of one lr and rho: {0:+.2f}), and on photographs lower the test loss less ({4:+.2f}). "
    said += "With FedDyn the gain grows with the cosine ({3:+.2f})"
    assert said.format(*ranks) in " ".join(README.split())


UNTUNED = ("compress", "levels", "seed")


def test_the_settings_of_the_main_table_are_those_of_the_stored_rows():
    _, _, said = " ".join(README.split()).partition("all have the defaults but for ")
    own = {}
    for flag, value, names in re.findall(r"`--([a-z-]+) ([\d.]+)` \((`[^)]+)\)", said):
        for algo in re.findall(r"`([a-z+-]+)`", names):
            own.setdefault(algo, {})[flag.replace("-", "_")] = float(value)
    rows = json.loads((HERE / "results" / "default.json").read_text())["cpu"]["rows"]
    for row in rows:
        algo, settings = row["algo"], row["fields"]
        told = run.resolve(algo=algo) | own.get(algo, {})
        told |= {k: settings[k] for k in UNTUNED if k in settings}
        assert {k: told[k] for k in settings} == settings, algo
    assert len(own) == 7 and set(own) < {row["algo"] for row in rows}


def test_the_table_names_every_method():
    assert set(rows_of_methods()) == set(parts("algo"))


def test_the_table_counts_what_is_sent_and_computed():
    for name, told in rows_of_methods().items():
        if told:  # up, down, gradients
            measured = COSTS[parts("algo")[name]]  # gradients, up, down
            assert told == [*measured[1:], measured[0]], name


def test_the_card_has_the_hash_of_the_default_settings():
    settings = run.resolve()
    _, images = run.compose(settings)
    assert f"settings  {described(settings, images)['hash']}\n" in README
