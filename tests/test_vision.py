"""What vision/ promises: the data and their three sets, splits, networks, the task, the pictures.

    python -m pytest -q tests/test_vision.py

The oracle is a slow loop, PyTorch's own modules, or a definition, in float64 where it matters.
"""

import gzip
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from tests.toys import f64, seeded
from tests.toys import normal as randn
from vision import data, make_subset, models, plots, split, task

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


# ---- data


@pytest.fixture(scope="session")
def bundled():
    return data.load("bundled")


def pack(path, n=40, shape=(8, 8), **changed):
    """Write a legal .npz of n random training images of 4 classes, with some arrays changed."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        "y_train": np.arange(n) % 4,
        "x_test": rng.integers(0, 256, (8, *shape), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    } | changed
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_a_subset_holds_so_many_images_of_every_class_and_only_those_of_the_data_set(tmp_path):
    source, out = tmp_path / "all.npz", tmp_path / "new folder" / "some.npz"
    raw = pack(source, classes=np.array(list("abcd")))
    words = [str(source), str(out), "--train", "3", "--test", "2"]
    assert make_subset.main(words) == 0
    small = data.read(str(out))
    assert np.bincount(small.y_train).tolist() == [3] * 4 and list(small.classes) == list("abcd")
    assert np.bincount(small.y_test).tolist() == [2] * 4
    known = {x.tobytes(): y for x, y in zip(raw["x_train"], raw["y_train"])}
    drawn = [x.tobytes() for x in small.x_train]
    assert len(set(drawn)) == 12 and [known[x] for x in drawn] == small.y_train.tolist()
    assert make_subset.main(words) == 2  # never over a file that is there


def test_a_subset_of_more_images_than_there_are_is_refused(tmp_path, capsys):
    pack(tmp_path / "all.npz")
    words = [str(tmp_path / "all.npz"), str(tmp_path / "some.npz")]
    assert make_subset.main([*words, "--train", "11", "--test", "2"]) == 2
    assert "class 0 has 10 images, fewer than 11" in capsys.readouterr().err
    assert make_subset.main([*words, "--train", "0"]) == 2
    assert make_subset.main([words[0], str(tmp_path / "some.txt"), "--train", "3"]) == 2
    pack(tmp_path / "whose.npz", client_train=np.arange(40) // 10)
    capsys.readouterr()
    assert make_subset.main([str(tmp_path / "whose.npz"), words[1], "--train", "3"]) == 2
    assert "a subset would lose it" in capsys.readouterr().err


@pytest.mark.skipif(not data.DEBIAN_FASHION.exists(), reason="needs dataset-fashion-mnist")
def test_the_bundled_file_is_what_make_subset_draws(tmp_path):
    assert make_subset.main(["fashionmnist", str(tmp_path / "again.npz")]) == 0
    with np.load(tmp_path / "again.npz") as again, np.load(data.BUNDLED) as bundled:
        assert all(np.array_equal(again[name], bundled[name]) for name in bundled.files)


def test_bundled_images_are_balanced_and_the_three_sets_disjoint(bundled):
    train, val, test, clients = bundled
    assert [len(s.y) for s in (train, val, test)] == [9000, 1000, 2000] and clients is None
    assert train.x.shape[1:] == (1, 28, 28) and train.x.dtype == torch.uint8
    for images in (train, val, test):
        assert torch.equal(images.y.bincount(), torch.full((10,), len(images.y) // 10))
    a, b = ({x.numpy().tobytes() for x in images.x} for images in (train, val))
    assert len(a & b) <= 2  # the source itself holds a few duplicates
    x, _, weight = train.batch(torch.tensor([[0, 0, 0, 0], [-1, 0, 0, 0]]))
    pixels = train.x.float()
    assert weight.tolist() == [1, 0]
    assert torch.allclose(x[0], (pixels[0] - pixels.mean()) / pixels.std(), atol=1e-4)


def test_colour_npz_files_are_read(tmp_path):
    arrays = pack(tmp_path / "a.npz", shape=(10, 12, 3), y_train=np.arange(40)[:, None] % 4)
    d = data.load(tmp_path / "a.npz", val=8)
    assert d.train.x.shape == (32, 3, 10, 12) and d.val.y.bincount().tolist() == [2] * 4
    held = data.balanced(np.arange(40) % 4, 8, np.random.default_rng(0))
    kept = np.setdiff1d(np.arange(40), held)
    assert np.array_equal(d.train.x.numpy().transpose(0, 2, 3, 1), arrays["x_train"][kept])
    pixels = d.train.x.double()
    assert torch.allclose(d.train.mean.double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(d.train.std.double(), pixels.std((0, 2, 3), correction=0))
    x = next(d.train.chunks(100)).x
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("labels", [np.arange(40) // 10, np.array(list("zyxw"))[np.arange(40) % 4]])
def test_an_npz_can_say_who_the_clients_are(labels, tmp_path):
    arrays = pack(tmp_path / "a.npz", client_train=labels)
    d = data.load(tmp_path / "a.npz", val=8)
    assert torch.equal(torch.cat(d.clients).sort().values, torch.arange(32))
    by_pixels = {x.tobytes(): label for x, label in zip(arrays["x_train"], labels)}
    for label, mine in zip(sorted(set(labels)), d.clients):
        assert torch.equal(mine, mine.sort().values)
        assert {by_pixels[x.numpy().tobytes()] for x in d.train.x[mine, 0]} == {label}


def test_a_client_without_a_training_image_is_named(tmp_path):
    pack(tmp_path / "a.npz", n=5, y_train=np.arange(5) % 4, client_train=np.array(list("aabcd")))
    with pytest.raises(ValueError, match="client '[abcd]' of client_train has no training image"):
        data.load(tmp_path / "a.npz", val=4)
    assert [len(mine) for mine in data.load(tmp_path / "a.npz", val=0).clients] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    "message, changed",
    [
        ("no array 'y_test'", {"y_test": None}),
        ("expected uint8", {"x_train": np.zeros((40, 8, 8))}),
        ("expected uint8", {"x_train": np.zeros((40, 7, 8), np.uint8)}),
        ("expected 40 integer labels", {"y_train": np.zeros(39, int)}),
        ("expected 40 integer labels", {"y_train": np.zeros(40)}),
        ("must lie in 0..999; found -1..-1", {"y_train": np.full(40, -1)}),
        ("labels of y_test must lie in 0..3", {"y_test": np.full(8, 9)}),
        ("those of x_test", {"x_test": np.zeros((8, 9, 9), np.uint8)}),
        ("y_test is empty", {"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, int)}),
        ("cannot be read", {"y_test": np.array([print], dtype=object)}),
        (r"classes is \(2,\)", {"classes": np.array(["a", "b"])}),
        ("client_train is int64.*expected 40", {"client_train": np.zeros(39, int)}),
        ("client_train is float64", {"client_train": np.zeros(40)}),
    ],
)
def test_a_wrong_npz_is_refused_by_name(message, changed, tmp_path):
    pack(tmp_path / "a.npz", **changed)
    with pytest.raises(ValueError, match=f"a.npz.*{message}"):
        data.load(tmp_path / "a.npz", val=4)


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("I am no npz")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="no such file.*did you mean 'cifar10'"):
        data.load("cifar-10")
    with pytest.raises(ValueError, match="must be in 0..9999"):
        data.load("bundled", val=10000)


def idx_folder(folder, n=12):
    """Write the four files of MNIST's format with n training and n/2 test images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, m in (("train", n), ("t10k", n // 2)):
        x = rng.integers(0, 256, (m, 28, 28), dtype=np.uint8)
        y = (np.arange(m) % 3).astype(np.uint8)
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        for name, array, head in ((images, x, [2051, m, 28, 28]), (labels, y, [2049, m])):
            content = np.array(head, dtype=">i4").tobytes() + array.tobytes()
            (folder / name).write_bytes(content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_idx_files_and_torchvision_agree(tmp_path, monkeypatch):
    folder = tmp_path / "FashionMNIST" / "raw"
    idx_folder(folder)
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "absent")
    a = data.load("fashionmnist", val=3, root=tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FASHION", folder)
    b = data.load("fashionmnist", val=3, root=tmp_path / "absent")
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)


def test_cifar_and_svhn_come_through_torchvision(tmp_path, monkeypatch):
    datasets = data.import_torchvision().datasets
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]})
        (folder / name).write_bytes(content)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    d = data.load("cifar10", val=2, root=tmp_path)
    assert d.train.x.shape == (18, 3, 32, 32) and d.train.classes == ["a", "b"]
    assert torch.equal(d.test.x[0], torch.tensor(pixels[0].reshape(3, 32, 32)))

    class FakeSVHN:  # torchvision's own reader needs scipy: only its result is imitated
        def __init__(self, root, split, download):
            self.data, self.labels = np.zeros((6, 3, 32, 32), np.uint8), np.arange(6) % 2

    monkeypatch.setattr(datasets, "SVHN", FakeSVHN)
    assert data.load("svhn", val=2, root=tmp_path).train.x.shape == (4, 3, 32, 32)


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    def no_network(*args, **settings):
        raise OSError("no network")

    monkeypatch.setattr(data.import_torchvision().datasets, "CIFAR100", no_network)
    with pytest.raises(ValueError, match="cifar100.*no network"):
        data.load("cifar100", root=tmp_path)


def test_torchvision_imports_where_its_operators_cannot_load():
    code = """if True:
        import torch
        def broken(path): raise OSError("operators of another build")
        torch.ops.load_library = broken  # what a CUDA build meets beside a CPU torch
        try:
            import torchvision
            raise SystemExit("the trap is gone: this test and import_torchvision can go too")
        except RuntimeError as error:
            assert "nms" in str(error)
        from vision import data
        tv = data.import_torchvision()
        assert tv is data.import_torchvision()
        assert tv.models.resnet18(num_classes=4).fc.out_features == 4 and tv.datasets.MNIST
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


# ---- batches


def test_batches_are_epochs_or_full_steps():
    mine = torch.arange(100, 117)
    rows = data.draw_batches(mine, 5, 0, 2, seeded())  # two epochs of ceil(17 / 5) batches
    assert rows.shape == (8, 5, 4)
    for epoch in rows[:, :, 0].view(2, 20):
        assert sorted(epoch.tolist()) == [-1] * 3 + mine.tolist()
    rows = data.draw_batches(mine, 20, 3, 0, seeded())
    assert rows.shape == (3, 20, 4) and rows[..., 1:].eq(0).all()
    counts = rows[..., 0].flatten().bincount()[100:]
    assert counts.max() - counts.min() <= 1  # shuffles laid end to end


def test_shifts_are_all_of_minus_four_to_four_and_half_the_images_are_flipped():
    rows = data.draw_batches(torch.arange(50), 50, 100, 0, seeded(), augment=True).flatten(0, 1)
    for shift in (rows[:, 1], rows[:, 2]):
        assert shift.unique().tolist() == list(range(-4, 5))
        share = (shift + 4).bincount() / len(shift)
        assert (share - 1 / 9).abs().max() < 0.02
    assert rows[:, 3].unique().tolist() == [0, 1] and (rows[:, 3].float().mean() - 0.5).abs() < 0.03


def test_moved_is_the_slow_loop():
    x = torch.randint(0, 256, (3, 3, 8, 9), generator=seeded(), dtype=torch.uint8)
    how = torch.tensor([[1, -2, 0], [-4, 4, 1], [0, 0, 1], [3, 0, 1]])
    number = torch.tensor([0, 1, 2, 0])
    out = data.moved(x, number, how)
    for b in range(4):
        down, right, flip = how[b].tolist()
        shifted = torch.zeros(3, 8, 9, dtype=torch.uint8)
        for r in range(8):
            for c in range(9):
                if 0 <= r + down < 8 and 0 <= c + right < 9:
                    shifted[:, r + down, c + right] = x[number[b], :, r, c]
        assert torch.equal(out[b], shifted.flip(2) if flip else shifted)


# ---- split


@pytest.mark.parametrize("name", split.SPLITS)
def test_no_image_is_used_twice_and_the_seed_decides(name):
    y = torch.arange(3000) % 10
    parts = split.partition(name, y, 40, seed=3)
    used = torch.cat(parts)
    assert len(parts) == 40 and len(used) >= 0.99 * 3000
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert (len(used.unique()) == len(used)) == (name != "dirichlet-recycled")
    assert all(map(torch.equal, parts, split.partition(split.SPLITS[name], y, 40, seed=3)))
    assert [p.tolist() for p in parts] != [p.tolist() for p in split.partition(name, y, 40, seed=4)]
    sizes = [len(part) for part in parts]
    if name in ("iid", "dirichlet", "dirichlet-recycled"):
        assert set(sizes) == {75}
    if name == "dirichlet-balanced":
        assert 60 <= min(sizes) and max(sizes) <= 90
    assert min(sizes) >= 10


def test_splits_are_as_skewed_as_they_say():
    y = torch.arange(6000) % 10

    def classes_held(name, **settings):
        return [len(y[part].unique()) for part in split.partition(name, y, 50, **settings)]

    def largest_share(alpha):
        parts = split.partition("dirichlet", y, 50, alpha=alpha)
        return np.mean([float(y[part].bincount().max() / len(part)) for part in parts])

    assert max(classes_held("shards", classes_per_client=3)) == 3
    assert min(classes_held("iid")) == 10 and min(classes_held("dirichlet", alpha=1e5)) == 10
    assert largest_share(1e5) < 0.25 < 0.5 < largest_share(0.1)
    sizes = [len(part) for part in split.partition("dirichlet-class", y, 50)]
    assert max(sizes) > 3 * 120 and min(sizes) == 10


def test_recycled_classes_follow_the_priors_where_drawing_without_replacement_cannot():
    y = np.repeat(np.arange(10), 600)
    rng = np.random.default_rng(1)
    split.by_class(y, rng)
    prior = rng.dirichlet([0.1] * 10, 50)  # the next thing that both draw

    def gap(name):
        parts = split.partition(name, y, 50, seed=1)
        shares = np.stack([np.bincount(y[part], minlength=10) / len(part) for part in parts])
        return np.abs(shares - prior).sum(1).mean()

    # 120 draws from a prior differ from it by 0.1 in the mean
    assert gap("dirichlet-recycled") < 0.12 < 0.25 < gap("dirichlet")


def test_balanced_shares_are_doubly_stochastic_and_stay_skewed():
    drawn = np.random.default_rng(0).dirichlet([0.16] * 80, 10)
    shares = split.doubly_stochastic(drawn)
    assert np.allclose(shares.sum(1), 1) and np.allclose(shares.sum(0), 10 / 80, rtol=0.02)
    assert (shares.max(0) / shares.sum(0)).mean() > 0.5
    rank_one = np.outer([1, 2, 3], [1, 1, 2, 4]) * 1.0
    assert np.allclose(split.doubly_stochastic(rank_one), 1 / 4)


@pytest.mark.parametrize(
    "message, name, N, settings",
    [
        ("above 0", "dirichlet", 5, {"alpha": 0}),
        ("without images", "dirichlet-balanced", 50, {"alpha": 1e-12}),
        ("finite", "dirichlet-class", 5, {"alpha": math.inf}),
        ("finite", "dirichlet-class", 5, {"alpha": math.nan}),
        ("1..100", "iid", 101, {}),
        ("1..100", "iid", 0, {}),
        ("min_size", "dirichlet-class", 20, {}),
        ("cannot cover", "shards", 2, {}),
        ("it must be in 2..10", "shards", 5, {"classes_per_client": 11}),
        ("without images", "shards", 99, {"classes_per_client": 2}),
    ],
)
def test_impossible_splits_are_refused(message, name, N, settings):
    with pytest.raises(ValueError, match=message):
        split.partition(name, torch.arange(100) % 10, N, **settings)


@pytest.mark.parametrize("name", split.SPLITS)
@pytest.mark.parametrize("y", [[0, 0, 5, 5, 5, 7, 7, 7], [3] * 8, [0] * 8], ids=str)
def test_missing_classes_one_class_and_clients_of_one_image_split(name, y):
    settings = {"dirichlet-class": {"min_size": 1}, "shards": {"classes_per_client": 1}}
    settings = settings.get(name, {"alpha": 10} if name == "dirichlet-balanced" else {})
    N = 2 if name == "dirichlet-balanced" else 3
    used = torch.cat(split.partition(name, np.array(y), N, **settings))
    assert set(used.tolist()) <= set(range(8)) and len(used) >= 6
    if name in ("iid", "dirichlet", "dirichlet-class"):
        parts = split.partition(name, np.array(y), 8, **settings)
        assert [len(part) for part in parts] == [1] * 8


@pytest.mark.parametrize("alpha", [1e-12, 1e308])
@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-recycled", "dirichlet-class"])
def test_extreme_alphas_split(name, alpha):
    parts = split.partition(name, np.arange(400) % 10, 20, alpha=alpha)
    assert min(map(len, parts)) >= 10


# ---- models


def plain(name, C, H):
    """The networks as a textbook writes them, with ReLU before pooling; resnet18: torchvision's."""
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(C * H * H, 64), nn.ReLU(), nn.Linear(64, 10))
    if name == "cnn":
        layers = [nn.Conv2d(C, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Linear(16 * (H // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)
    if name == "lenet":
        layers = [nn.Conv2d(C, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 5), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(384), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10))
    if name == "convnet":
        layers = []
        for channels in (C, 128, 128):
            layers += [nn.Conv2d(channels, 128, 3, padding=1)]
            layers += [nn.InstanceNorm2d(128, affine=True), nn.ReLU(), nn.AvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (H // 8) ** 2, 10))
    return models.ResNet18((C, H, H), 10)


def fill(module, w, shapes):
    """Put w [d] into a module."""
    for p, value in zip(module.parameters(), models.unflatten(w, shapes)):
        p.data = value.clone().contiguous()


def activity_by_hooks(module, x):
    """What the nn.ReLU of a module let through: mean square of an image, summed over the calls."""
    outs = []
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda layer, inputs, a: outs.append(a.clone()))
    module(x)
    return sum(a.flatten(1).square().mean(1) for a in outs), len(outs)


RELUS = {"mlp": 1, "cnn": 3, "lenet": 4, "convnet": 3, "resnet18": 17}


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("C, H", [(1, 28), (3, 20)])
def test_the_function_of_w_is_the_plain_module(name, C, H):
    """Scores, activity (every call of every ReLU, before pooling) and the gradients of both."""
    model = models.build(name, (C, H, H), 10, seed=5, dtype=f64)
    reference = plain(name, C, H).double()
    x, y = randn(3, C, H, H), torch.tensor([0, 3, 9])
    reference(x)  # gives the lazy layer of lenet its shape
    fill(reference, model.w0, model.shapes)

    def loss(w):
        return F.cross_entropy(model.apply(w, x), y)

    def activity(w):
        return model.watched(w, x)[1].sum()

    scores = reference(x)
    assert torch.allclose(model.apply(model.w0, x), scores, rtol=1e-9, atol=1e-12)
    F.cross_entropy(scores, y).backward()
    g = models.flatten(p.grad for p in reference.parameters())
    assert torch.allclose(grad(loss)(model.w0), g, rtol=1e-7, atol=1e-12)

    reference.zero_grad(set_to_none=False)
    slow, calls = activity_by_hooks(reference, x)
    watched_scores, fast = model.watched(model.w0, x)
    assert calls == RELUS[name] and torch.allclose(fast, slow, rtol=1e-9)
    assert torch.allclose(watched_scores, scores, rtol=1e-12, atol=1e-12)
    slow.sum().backward()
    g = models.flatten(p.grad for p in reference.parameters())
    assert torch.allclose(grad(activity)(model.w0), g, rtol=1e-7, atol=1e-12) and g.norm() > 0.01


@pytest.mark.parametrize("name", models.NETWORKS)
def test_w0_is_the_modules_and_building_leaves_global_randomness_alone(name):
    before = torch.random.get_rng_state()
    model = models.build(name, (1, 28, 28), 10, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    module = models.NETWORKS[name]((1, 28, 28), 10)
    assert torch.equal(model.w0, models.flatten(p.detach() for p in module.parameters()))
    names = [torch.full_like(p, "weight" in n) for n, p in module.named_parameters()]
    assert torch.equal(model.weights, models.flatten(names).bool())


def test_sizes_are_those_of_the_papers():
    def d(name, shape=(1, 28, 28), **settings):
        return len(models.build(name, shape, 10, **settings).w0)

    assert d("mlp", hidden=200, depth=2) == 199_210  # the 2NN of McMahan et al. 2017
    assert d("cnn", width=32, hidden=512) == 1_663_370
    for name, size in (("mlp", 50_890), ("cnn", 54_314), ("lenet", 573_578), ("convnet", 308_746)):
        assert d(name) == size and f"{size:,}" in models.__doc__
    assert d("resnet18") == 11_172_810 and "11,172,810" in models.__doc__


def test_mlp_has_the_depth_it_was_given():
    model = models.build("mlp", (1, 28, 28), 10, hidden=20, depth=2, dtype=f64)
    W1, b1, W2, b2, W3, b3 = models.unflatten(model.w0, model.shapes)
    x = randn(3, 1, 28, 28)
    hidden = ((x.flatten(1) @ W1.T + b1).relu() @ W2.T + b2).relu()
    assert torch.allclose(model.apply(model.w0, x), hidden @ W3.T + b3)


def test_resnet18_has_the_stem_it_was_given_and_no_batch_norm():
    small, large = (
        models.build("resnet18", (3, 32, 32), 10, stem=stem) for stem in ("auto", "imagenet")
    )
    assert small.shapes[0] == (64, 3, 3, 3) and large.shapes[0] == (64, 3, 7, 7)
    net = models.ResNet18((3, 32, 32), 10)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    assert net.net.bn1.num_groups == 2


def test_activity_is_a_mean_so_twice_the_units_are_as_active():
    x = randn(6, 1, 4, 4)
    narrow, wide = (models.build("mlp", (1, 4, 4), 3, hidden=h, dtype=f64) for h in (5, 10))
    W, b, V, c = models.unflatten(narrow.w0, narrow.shapes)
    w = models.flatten([torch.cat([W, W]), torch.cat([b, b]), torch.cat([V, V], 1) / 2, c])
    for one, two in zip(narrow.watched(narrow.w0, x), wide.watched(w, x)):
        assert torch.allclose(one, two, rtol=1e-12)


def test_convolution_weights_are_channels_last_views():
    model = models.build("cnn", (3, 32, 32), 10)
    parts = models.unflatten(model.w0, model.shapes)
    assert parts[2].is_contiguous(memory_format=torch.channels_last)
    storage = model.w0.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in parts)
    assert torch.equal(models.flatten(parts), model.w0)


class Own(nn.Module):
    """A reader's network: a layer that is used twice, and a parameter that two layers share."""

    def __init__(self, image_shape, classes, *, units=6):
        super().__init__()
        C, H, W = image_shape
        self.first = nn.Conv2d(C, units, 3, stride=2)
        self.one, self.two = nn.LazyLinear(units, bias=False), nn.Linear(units, units, bias=False)
        self.three = nn.Linear(units, units, bias=False)
        self.three.weight = self.two.weight
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(units, classes)

    def forward(self, x):
        h = self.one(self.relu(self.first(x)).flatten(1))
        return self.last(self.three(self.relu(self.two(h))))


def test_a_readers_own_network_is_a_function_of_w_too():
    model = models.build(Own, (3, 9, 9), 4, seed=1, dtype=f64, units=5)
    reference = Own((3, 9, 9), 4, units=5).double()
    x = randn(2, 3, 9, 9)
    reference(x)
    fill(reference, model.w0 * 1.5, model.shapes)
    assert len(model.w0) == sum(p.numel() for p in reference.parameters())
    scores, activity = model.watched(model.w0 * 1.5, x)
    assert torch.allclose(scores, reference(x)) and torch.equal(
        scores, model.apply(model.w0 * 1.5, x)
    )
    assert torch.allclose(activity, activity_by_hooks(reference, x)[0])


def shaky(*layers):
    """A network of a reader with these layers between two good ones."""

    class Shaky(nn.Sequential):
        def __init__(self, image_shape, classes):
            front = [nn.Conv2d(image_shape[0], 4, 3), *layers, nn.Flatten()]
            super().__init__(*front, nn.LazyLinear(classes))

    return Shaky


class WithBuffer(Own):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("centre", torch.zeros(1))


class Noisy(Own):
    def forward(self, x):
        return super().forward(x + torch.rand(()))


class TooMany(Own):
    def __init__(self, image_shape, classes):
        super().__init__(image_shape, classes + 1)


@pytest.mark.parametrize(
    "message, network",
    [
        ("layer '1' is BatchNorm2d.*GroupNorm", shaky(nn.BatchNorm2d(4))),
        (
            "layer '1' is BatchNorm2d.*GroupNorm",
            shaky(nn.BatchNorm2d(4, track_running_stats=False)),
        ),
        ("'1.running_mean' is a buffer", shaky(nn.InstanceNorm2d(4, track_running_stats=True))),
        ("'centre' is a buffer.*GroupNorm", WithBuffer),
        ("layer '1' is Dropout.*GroupNorm", shaky(nn.Dropout())),
        ("Noisy.*random", Noisy),
        (r"turns 2 images into \[2, 5\]; expected \[2, 4\]", TooMany),
        ("at least 16x16", "lenet"),
    ],
)
def test_what_w_cannot_describe_is_refused_by_name(message, network):
    with pytest.raises(ValueError, match=message):
        models.build(network, (1, 8, 8), 4)


def test_dropout_of_zero_is_nothing_and_man_needs_a_relu():
    model = models.build(shaky(nn.Dropout(0)), (1, 8, 8), 4)
    with pytest.raises(ValueError, match="needs a network with nn.ReLU"):
        model.watched(model.w0, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("network", ["mlp", "cnn", "convnet", Own], ids=str)
def test_networks_run_under_vmap_and_on_threads_at_once(network):
    model = models.build(network, (1, 8, 8), 4, dtype=f64)
    x, y = randn(5, 1, 8, 8), torch.arange(5) % 4
    ws = model.w0 + 0.1 * randn(6, len(model.w0), seed=1)

    def gradient(w):
        def loss(v):
            scores, activity = model.watched(v, x)
            return F.cross_entropy(scores, y) + activity.mean()

        return grad(loss)(w)

    one_by_one = torch.stack([gradient(w) for w in ws])
    assert torch.allclose(vmap(gradient)(ws), one_by_one, rtol=1e-9, atol=1e-12)
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(torch.stack(list(pool.map(gradient, [*ws] * 5)))[-6:], one_by_one)


def test_a_call_leaves_no_graph_behind():
    model = models.build("mlp", (1, 8, 8), 4)
    model.apply(model.w0.clone().requires_grad_(), torch.zeros(1, 1, 8, 8))
    module, places = model.mine()
    assert len(places) == 4 and all(getattr(layer, name) is None for layer, name, _ in places)


# ---- task


def toy(bundled, n=240, N=6, network="mlp", dtype=f64, split_by="iid", **settings):
    """Images of N clients with n of the bundled images."""
    train = bundled.train
    train = train._replace(
        x=train.x[:n], y=train.y[:n], mean=train.mean.to(dtype), std=train.std.to(dtype)
    )
    model = models.build(network, (1, 28, 28), 10, dtype=dtype)
    return task.Images(model, train, split.partition(split_by, train.y, N), **settings)


@pytest.mark.parametrize("augment", [False, True])
def test_the_loss_is_the_mean_over_the_images_of_a_batch(bundled, augment):
    t = toy(bundled, batch=7, local_epochs=2, augment=augment)
    batch = t.plan(0, seeded())[5]  # 40 images in batches of 7: the sixth has 5, and padding
    real = batch[:, 0] >= 0
    assert real.sum() == 5
    losses = []
    for number, down, right, flip in batch[real].tolist():
        pixels = torch.zeros(36, 36, dtype=f64)
        pixels[4 + down : 32 + down, 4 + right : 32 + right] = t.train.x[number, 0]
        pixels = pixels[4:32, 4:32]
        pixels = pixels.flip(1) if flip else pixels
        x = ((pixels - t.train.mean) / t.train.std)[None, None]
        losses.append(-t.apply(t.w0, x).log_softmax(1)[0, t.train.y[number]])
    assert t.loss(t.w0, batch) == pytest.approx(float(sum(losses) / 5), rel=1e-9)
    assert (batch[real][:, 1:] != 0).any() == augment


def test_man_adds_half_of_zeta_times_the_mean_activity(bundled):
    plain_task, man_task = (toy(bundled, batch=16, local_epochs=1, man=man) for man in (0, 0.3))
    batch = plain_task.plan(0, seeded())[2]  # 8 images and padding
    x, _, weight = plain_task.examples(batch)
    hidden = x.flatten(1) @ models.unflatten(plain_task.w0, plain_task.shapes)[0].T
    hidden = (hidden + models.unflatten(plain_task.w0, plain_task.shapes)[1]).relu()
    extra = 0.15 * hidden[weight > 0].square().mean()
    w = plain_task.w0
    assert man_task.loss(w, batch) - plain_task.loss(w, batch) == pytest.approx(float(extra))


@pytest.mark.parametrize("network", ["mlp", "cnn", "lenet", "convnet"])
def test_bfloat16_rounds_the_gradient_and_keeps_the_weights(network, bundled):
    settings = {"n": 48, "batch": 8, "man": 0.1, "network": network, "dtype": torch.float32}
    exact, rounded = (toy(bundled, bf16=bf16, **settings) for bf16 in (False, True))
    batch = exact.plan(0, seeded())[0]
    a, b = (grad(lambda w: t.loss(w, batch))(t.w0) for t in (exact, rounded))
    assert b.dtype == torch.float32 and 1e-4 < (a - b).norm() / a.norm() < 0.1
    at_once = vmap(lambda w: grad(lambda v: rounded.loss(v, batch))(w))(rounded.w0[None])[0]
    assert (at_once - b).norm() < 0.1 * a.norm()


@pytest.mark.parametrize("epochs", [0, 2])
def test_plans_hold_own_images_and_are_as_long_as_they_say(epochs, bundled):
    t = toy(bundled, N=7, batch=9, local_steps=3, local_epochs=epochs)
    for i, mine in enumerate(t.parts):
        plan = t.plan(i, seeded(i))
        assert plan.shape == (t.steps(i), 9, 4) and t.sizes[i] == len(mine)
        assert set(plan[..., 0].flatten().tolist()) - {-1} <= set(mine.tolist())
        everything = t.everything(i)
        numbers = everything[..., 0].flatten()
        assert torch.equal(numbers[numbers >= 0], mine) and not everything[..., 1:].any()
        assert everything.shape == (-(-len(mine) // 9), 9, 4)


def test_balanced_images_are_of_all_classes(bundled):
    t = toy(bundled, n=2000)
    rows = t.balanced(57, seeded())
    assert torch.equal(t.train.y[rows[:, 0]].bincount(), torch.full((10,), 5))
    assert len(rows[:, 0].unique()) == 50 and not rows[:, 1:].any()


def test_evaluation_in_chunks_and_threads_is_the_whole(bundled):
    t = toy(bundled)
    x, y, _ = next(t.train.chunks(240))
    scores = t.apply(t.w0, x)
    with ThreadPoolExecutor(2) as pool:
        for each in (map, pool.map):
            loss, accuracy = task.evaluate(t.apply, t.w0, t.train, chunk=50, each=each)
            assert loss == pytest.approx(float(F.cross_entropy(scores, y)))
            assert accuracy == float((scores.argmax(1) == y).double().mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", ["mlp", "cnn", "convnet", "resnet18"])
def test_tiny_images_a_missing_class_and_no_validation_work(network, channels, tmp_path):
    y = np.array([0, 3, 3, 3, 0])
    shape = (8, 8, 3) if channels == 3 else (8, 8)
    pack(tmp_path / "a.npz", n=5, shape=shape, y_train=y, y_test=np.zeros(8, int))
    d = data.load(tmp_path / "a.npz", val=0)
    model = models.build(network, tuple(d.train.x.shape[1:]), len(d.train.classes))
    parts = split.partition("dirichlet", d.train.y, 5)  # clients of one image
    t = task.Images(model, d.train, parts, batch=3, local_steps=2, augment=True, man=0.1)
    assert t.classes == 4 and t.image_shape == (channels, 8, 8) and t.sizes == [1] * 5
    g = grad(lambda w: t.loss(w, t.plan(4, seeded())[1]))(t.w0)
    assert g.isfinite().all() and len(t.balanced(8, seeded())) == 4
    assert all(map(math.isnan, task.evaluate(t.apply, t.w0, d.val)))
    assert 0 <= task.evaluate(t.apply, t.w0, d.test)[1] <= 1


# ---- plots


def size_of(path):
    """Width and height of a .png, in pixels."""
    head = path.read_bytes()[:24]
    assert head[:4] == b"\x89PNG"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def log(rounds, offset=0.0):
    rows = [{"round": t, "up": 1000 * t, "test_acc": 1 - 1 / t + offset} for t in range(1, rounds)]
    return [{"round": 0, "up": 0}] + [row | {"train_loss": 1 / row["round"]} for row in rows]


@pytest.mark.parametrize(
    "logs",
    [
        {"fedavg": [log(9)]},
        {f"method {k}": [log(9, -k / 100), log(7, k / 100)] for k in range(20)},
        {"fedavg": [[{"round": 0, "up": 0}]]},
        {"fedavg": [log(4) + [{"round": 4, "up": 9, "test_acc": 0.1, "train_loss": math.nan}]]},
    ],
    ids=["one", "many", "never evaluated", "diverged"],
)
def test_curves_are_drawn_and_fit_a_screen(logs, tmp_path):
    logs = {f"{label} $_$": runs for label, runs in logs.items()}  # which is no mathematics
    plots.curve(tmp_path / "curve.png", logs, "a$_$")
    width, height = size_of(tmp_path / "curve.png")
    assert width <= 1440 and height <= 900


def test_a_curve_is_the_mean_over_the_seeds_up_to_the_shortest(tmp_path, monkeypatch):
    drawn = []

    def note(axis, x, y, label, n):
        drawn.append((x, y))

    monkeypatch.setattr(plots, "band", note)
    plots.curve(tmp_path / "curve.png", {"a": [log(9), log(5, 0.1)]}, "title")
    (rounds, accuracy), (_, loss), (megabytes, _) = drawn
    assert rounds.tolist() == [1, 2, 3, 4] and np.allclose(megabytes, rounds / 1000)
    expected = 100 * (1 - 1 / rounds)
    assert np.allclose(accuracy, [expected, expected + 10]) and np.allclose(loss, 1 / rounds)


@pytest.mark.parametrize("classes, each, C", [(10, 2, 1), (10, 15, 3), (100, 1, 3), (2, 1, 1)])
def test_synthetic_images_fit_a_screen(classes, each, C, tmp_path):
    names = [f"class {c}" for c in range(classes)]
    mean, std = torch.full((C,), 100.0), torch.full((C,), 50.0)
    train = data.Images(None, None, mean, std, names)
    images = torch.randn(classes * each, C, 12, 10, generator=seeded())
    logits = torch.randn(classes * each, classes, generator=seeded())
    plots.grid(tmp_path / "synthetic.png", images, logits, train)
    width, height = size_of(tmp_path / "synthetic.png")
    assert width <= 1440 and height <= 960


def test_synthetic_images_are_denormalised_and_their_labels_read():
    train = data.Images(None, None, torch.tensor([100.0]), torch.tensor([50.0]), ["a", "b"])
    pixels = plots.denormalised(torch.tensor([[[[0.0, 1.0], [-9.0, 9.0]]]]), train)
    assert np.allclose(pixels, [[[100 / 255, 150 / 255], [0, 1]]])
    shares = torch.tensor([0.2, 0.8])
    assert plots.learnt_label(shares, 1, ["a", "b"]) == ("80 %", "black")
    assert plots.learnt_label(shares, 0, ["a", "b"]) == ("b 80 %", plots.COLOURS[0])
