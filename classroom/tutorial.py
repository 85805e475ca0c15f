# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---

# %% [markdown]
# # Compressed, sharpness-aware federated learning in eight stations
#
# Each station has a question, a picture and something to change. All of it runs in about two
# minutes on a laptop without a GPU. Nothing is implemented here: every station imports a chapter
# of the book, and `run.experiment` makes the runs, so what you see is what `python run.py` does,
# with a small network.
#
# The stations:
#
# 1. A hundred clients and what they hold
# 2. FedAvg, and how clients drift
# 3. An update as bytes
# 4. What error feedback repairs
# 5. What sharpness is
# 6. SAM, and whose gradient it should follow
# 7. Images that emerge from a trajectory
# 8. FedSynSAM against its parents

# %% [markdown]
# This cell finds the chapters and installs what is missing, also in a hosted notebook. If you
# opened the notebook alone, without the folder it belongs to, write the address of the project
# between the last two quotation marks of the line with PROJECT: it is what `git clone` takes.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("PROJECT", "")
if missing := [
    name for name in ("torch", "numpy", "tqdm", "matplotlib") if not importlib.util.find_spec(name)
]:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
if os.environ["PROJECT"] and not Path("project").exists():
    subprocess.run(["git", "clone", "-q", os.environ["PROJECT"], "project"], check=True)
try:
    place = next(p for p in (".", "..", "project") if (Path(p) / "fl.py").exists())
except StopIteration:
    raise FileNotFoundError("the chapters are not here; write their address above") from None
sys.path.insert(0, str(Path(place).resolve()))

import matplotlib.pyplot as plt
import numpy as np
import torch

import compress
import fl
import run
import sam
import synth
from lab import measures
from vision import data, split

QUICK = os.environ.get("TUTORIAL") == "quick"  # a test runs it so, without a look at the results
plt.rcParams |= {"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}
BLUE, RED, BLACK, GREEN, GREY = "#0072B2", "#D55E00", "#000000", "#009E73", "#808080"


def rounds(n):
    return 4 if QUICK else n


# What all runs of this tutorial have in common: twenty clients, five of them in each round.
SMALL = {"model": "mlp", "hidden": 32, "clients": 20, "participation": 5, "local_steps": 20}
SMALL |= {"lr": 0.1, "compress": "qsgd", "measure_images": 300, "eval_every": 2, "last": 3}
SMALL |= {"local_steps": 4, "measure_images": 20, "eval_every": 4} if QUICK else {}


def curve(outcome):
    """The rounds that were evaluated, and their test accuracies in percent."""
    rows = [row for row in outcome.log if "test_acc" in row]
    return [row["round"] for row in rows], [100 * row["test_acc"] for row in rows]


# %% [markdown]
# ## 1. A hundred clients and what they hold
#
# *Question.* Federated learning is easy if every client is a small copy of the whole. How far
# from that are the splits that papers use?
#
# Each column below is a client, each colour a class. A Dirichlet split draws every client's class
# prior from Dir(alpha). (`vision/split.py`)

# %%
labels = data.load("bundled").train.y
names = data.FASHION_CLASSES

figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharex=True)
for axis, (how, settings) in zip(
    axes, [("iid", {}), ("dirichlet", {"alpha": 0.1}), ("shards", {"classes_per_client": 2})]
):
    parts = split.partition(how, labels, 100, **settings)
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    bottom = np.zeros(100)
    for c in range(10):
        axis.bar(range(100), counts[:, c], 1.0, bottom, color=plt.cm.tab10(c), label=names[c])
        bottom += counts[:, c]
    values = ", ".join(f"{name} = {value}" for name, value in settings.items())
    axis.set(ylabel="images", xlim=(-0.5, 99.5), title=f"{how} {values}")
    axis.grid(False)
handles, _ = axes[0].get_legend_handles_labels()
figure.legend(handles, names, ncols=5, fontsize=8, loc="outside upper center")
axes[-1].set_xlabel("client")
plt.show()

# %% [markdown]
# *Change.* Set alpha to 1 and to 100. At which alpha would you call the clients similar? With
# `dirichlet-class` in place of `dirichlet`, the sizes of the clients differ too.
#
# ## 2. FedAvg, and how clients drift
#
# *Question.* A client makes many local steps before it sends anything. What is wrong with that?
#
# Left: FedAvg on clients that all look alike, and on clients that hold one class each. Right:
# five clients of the second kind during their local steps from the global model. Their own loss
# falls; the loss of all images rises. They walk to different places, and the mean of the places
# is worse than it could be. (`fl.py`)

# %%
alike = run.experiment(**SMALL, algo="fedavg", partition="iid", rounds=rounds(24))
DISJOINT = {"partition": "shards", "classes_per_client": 1}
apart = run.experiment(**SMALL, **DISJOINT, algo="fedavg", rounds=rounds(24))


def losses_on_the_way(outcome, steps=20):
    """Of each client of the next round: its own loss and that of all, after 0, 1, ... steps."""
    f, found = outcome.federation, []
    sample = measures.sample_of(f, outcome.data.train, 300)
    received = {"w": f.w}
    for i in f.choose():
        own_images = f.task.everything(i).flatten(0, 1)[:100]
        w, mine, rows = f.w, {}, []
        for batch in f.plan("train", i)[:steps]:
            rows.append((float(f.task.loss(w, own_images)), sample.loss(w)))
            w, mine = f.method.step(w, batch, received, mine, f.method.lr)
        found.append(rows)
    return np.array(found)  # [clients, steps, 2]


way = losses_on_the_way(apart)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for outcome, colour, label in ((alike, BLUE, "clients alike"), (apart, RED, "one class each")):
    left.plot(*curve(outcome), color=colour, label=label)
left.set(xlabel="round", ylabel="test accuracy (%)")
left.legend()
for k, colour, label in ((0, GREEN, "own loss F_i"), (1, RED, "global loss F")):
    right.plot(way[:, :, k].T, color=colour, alpha=0.35)
    right.plot(way[:, :, k].mean(0), color=colour, lw=2.5, label=label)
right.set(xlabel="local step", ylabel="loss", yscale="log")
right.legend()
plt.show()

# %% [markdown]
# *Change.* Set `local_steps` in `SMALL` to 2 and `rounds` ten times as high: the same number of
# gradients. Does the left picture change? What does that cost in bytes?
#
# ## 3. An update as bytes
#
# *Question.* How many bits does an update need?
#
# One real update of one client, five compressors, several settings each. Every point is a buffer
# that was really written and read back: its length is the horizontal axis, the squared error the
# vertical one. Lower left is better; above the dashed line, sending nothing would be closer.
# (`compress.py`)

# %%
f = apart.federation
client = f.choose()[0]
sent, _ = f.method.train({"w": f.w}, {}, f.plan("train", client), f.method.lr)
x = sent["update"]
d = len(x)

families = {
    "identity": [compress.Identity()],
    "top-k": [compress.TopK(k) for k in (0.003, 0.01, 0.03, 0.1, 0.3)],
    "random-k (unbiased)": [compress.RandK(k) for k in (0.01, 0.03, 0.1, 0.3)],
    "QSGD": [compress.QSGD(levels) for levels in (1, 3, 7, 31, 127)],
    "sign": [compress.Sign()],
}
g = torch.Generator().manual_seed(0)
figure, axis = plt.subplots(figsize=(7, 4))
for (name, settings), colour in zip(families.items(), (BLACK, RED, GREY, BLUE, GREEN)):
    bits, errors = [], []
    for c in settings:
        buffer = c.encode(x, g)
        bits.append(8 * len(buffer) / d)
        errors.append(float((c.decode(buffer, d) - x).square().sum() / x.square().sum()))
    axis.plot(bits, np.maximum(errors, 1e-6), "o-", color=colour, label=name)
axis.axhline(1, color=BLACK, lw=0.8, ls="--")
axis.set(xscale="log", yscale="log", xlabel="bits a parameter", ylabel="||x_hat - x||² / ||x||²")
axis.legend(loc="lower left")
plt.show()

# %% [markdown]
# (The error of `identity` is 0, and drawn at the lower edge.) Sign, top-k and QSGD do not rank in
# the same way everywhere. And error is not all: random-k and QSGD are unbiased, so the errors of
# many clients average out; those of top-k and sign do not.
#
# *Change.* Replace x by `torch.randn(d)`. Whom does it help, whom does it harm, and why?
#
# ## 4. What error feedback repairs
#
# *Question.* Top-k is biased. What happens if a client always sends the largest numbers, and the
# others never?
#
# Ten clients send one in a thousand of their numbers. Without error feedback the rest is lost;
# with it, the client keeps it and adds it to its next update. (`compress.with_feedback`)

# %%
TEN = SMALL | {"clients": 10, "participation": 10, "local_steps": 10, "partition": "iid"}
TEN |= {"algo": "fedavg", "rounds": rounds(30)}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for feedback, colour, label in (("off", RED, "top-k"), ("on", BLUE, "top-k, error feedback")):
    norms = []

    def watch(federation):
        kept = [item for memory in federation.memory.values() for item in memory.items()]
        residuals = [x for name, x in kept if name.startswith("residual")]
        norms.append(float(torch.stack(residuals).norm(dim=1).mean()))

    sparse = TEN | {"compress": "topk", "k": 0.001, "error_feedback": feedback}
    outcome = run.experiment(**sparse, watch=watch if feedback == "on" else None)
    left.plot(*curve(outcome), color=colour, label=label)
    if feedback == "on":
        right.plot(range(1, len(norms) + 1), norms, color=colour)
full = run.experiment(**TEN | {"compress": "identity"})
left.plot(*curve(full), color=BLACK, ls=":", label="not compressed, 670 times the bytes")
left.set(xlabel="round", ylabel="test accuracy (%)")
left.legend(fontsize=8)
right.set(xlabel="round", ylabel="||residual||, mean of the clients", ylim=(0, None))
plt.show()

# %% [markdown]
# The residual grows ever more slowly: everything is sent in the end, only later. That delay is the
# price.
#
# *Change.* Set `participation` to 2. A client's residual now waits five rounds. Is feedback still
# worth it?
#
# ## 5. What sharpness is
#
# *Question.* Two models have a similar training loss. How do they differ, and who decided that?
#
# Runs with four step sizes. Left: the loss along a random direction through each model (every
# filter of the direction has the norm of that filter of the model). Middle: along the direction in
# which the loss is steepest, the top eigenvector of the Hessian. Right: the largest eigenvalue,
# which is the curvature there, with the training loss below. Then the landscapes of the smallest
# and the largest step size, spanned by the two directions. (`sam.py`, `lab/measures.py`)

# %%
rates, colours = (0.02, 0.05, 0.1, 0.2), (RED, GREY, GREEN, BLUE)
at, near = measures.places(7 if QUICK else 21), measures.places(7 if QUICK else 21, span=0.7)


def steepest(sample, w, products=20):
    """About the top eigenvector of the Hessian: what H leaves of a random vector."""
    H, v = sample.hessian(w), torch.randn(len(w), generator=torch.Generator().manual_seed(0))
    for _ in range(products):
        v = sam.unit(H(v))
    return v


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
planes = {}
for lr, colour in zip(rates, colours):
    flat = run.experiment(**SMALL | {"lr": lr}, algo="fedavg", partition="iid", rounds=rounds(30))
    w, r = flat.federation.w, flat.result
    sample = measures.sample_of(flat.federation, flat.data.train, 300)
    random, top = measures.directions(flat.federation)[0], steepest(sample, w)
    left.plot(at, measures.line(sample.loss, w, random, at), color=colour, label=f"lr = {lr}")
    middle.plot(near, measures.line(sample.loss, w, top, near), color=colour)
    right.bar(f"{lr}\n({r['train_loss']:.2f})", r["eigenvalue"], color=colour)
    if lr in (rates[0], rates[-1]):
        planes[lr] = np.array(measures.plane(sample.loss, w, random, top, near[::2]))
left.set(xlabel="along a random direction", ylabel="training loss", ylim=(0, 1.5))
middle.set(xlabel="along the steepest direction", ylim=(0, 6))
right.set(xlabel="learning rate (training loss)", ylabel="largest eigenvalue")
left.legend(fontsize=8)
plt.show()

figure = plt.figure(figsize=(9, 4))
a, b = np.meshgrid(near[::2], near[::2], indexing="ij")
for k, (lr, plane) in enumerate(planes.items()):
    axis = figure.add_subplot(1, 2, k + 1, projection="3d")
    axis.plot_surface(a, b, np.minimum(plane, 6), cmap="viridis", vmin=0, vmax=6)
    axis.set(zlim=(0, 6), xlabel="random", ylabel="steepest", title=f"lr = {lr}")
    axis.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
plt.show()

# %% [markdown]
# Along a random direction all four look alike; there are very many directions, and hardly any is
# steep. The steepest one differs by a factor of five. The step size decides more about it than
# anything else in this tutorial: gradient descent cannot stay where the curvature is above 2 / lr,
# and with small batches it leaves long before that. Remember this when a method is said to find
# flatter minima: was the learning rate the same?
#
# *Change.* Put `model="cnn"` into `SMALL` (and remove `hidden`). Does the order of the
# eigenvalues stay?
#
# ## 6. SAM, and whose gradient it should follow
#
# *Question.* SAM takes its gradient at w + rho u / ||u||, where u should be the gradient of the
# loss that is to become flat. That is the global loss. What does a client know of its gradient?
#
# Clients with one class each, in the middle of their local steps. For each estimate: its cosine
# to the gradient of the global loss, at the point where the client is. (`fl.FedSAM`,
# `fl.FedLESAM`, `measures.walk`)

# %%
sample = measures.sample_of(f, apart.data.train, 300)
before = f.w
f.round()  # one round more, so that there is a last move
moved = f.w - before
steps = (0, 1, 2, 4, 8, 12, 16, 19)


def cosines(federation, at_step, estimates):
    """{name: mean cosine to the global gradient} of functions of (w, batch)."""
    found = {name: [] for name in estimates}
    for w, batch, *_ in measures.walk(federation, at_step):
        true = sam.unit(sample.gradient(w))
        for name, estimate in estimates.items():
            found[name].append(float(sam.unit(estimate(w, batch)) @ true))
    return {name: np.mean(values) for name, values in found.items()}


estimates = {
    "own gradient (FedSAM)": lambda w, batch: f.method.gradient(w, batch),
    "last move, reversed": lambda w, batch: -moved,
    "own path so far, w - w^t": lambda w, batch: w - f.w,
}
table = [cosines(f, step, estimates) for step in steps]
figure, axis = plt.subplots(figsize=(7, 3.6))
for name, colour in zip(estimates, (RED, GREY, GREEN)):
    axis.plot(steps, [row[name] for row in table], "o-", color=colour, label=name)
axis.axhline(0, color=BLACK, lw=0.8)
axis.set(xlabel="local steps made", ylabel="cosine to the global gradient", ylim=(-1, 1))
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# After one step a client is already too far in its own direction for the others. Its own gradient
# then points *away* from the gradient of the global loss: the perturbed point of FedSAM has a lower
# global loss, not a higher one. The way that the client has made since it received w^t increases F:
# this is drift again. And the reversed last move, which is what FedLESAM follows if every client is
# in every round? It undoes what other clients did a round ago; with five of twenty clients in a
# round, that lowers F. (The green line begins at 0, as the client has not moved yet.)
#
# *Change.* Use `alike.federation` for `f`. Whose gradient should one take if all clients look
# alike?
#
# ## 7. Images that emerge from a trajectory
#
# *Question.* The server has no images. What can it learn from its own models w^0, w^1, w^2, ...?
#
# It looks for images on which gradient descent takes the same path. Below, ten
# images, one for each class, after 0, 20, 100 and 400 steps of Adam; then the matching loss; then
# the cosine of the gradient on these images to the global gradient, at the points where clients
# are. (`synth.py`)

# %%
trajectory = []
start = run.experiment(
    **SMALL, **DISJOINT, algo="fedavg", rounds=rounds(8), watch=lambda f: trajectory.append(f.w)
)
f, settings = start.federation, synth.Synthesis()
settings.ipc, stops = 1, (0, 20, 100, 400) if not QUICK else (0, 1, 2, 3)
sample = measures.sample_of(f, start.data.train, 300)


def learn(steps):
    """The synthetic data after so many steps, always from the same start, and the losses."""
    settings.outer_steps = max(1, steps)
    generator = fl.rng(0, "tutorial")
    if steps == 0:
        w = trajectory[0]
        return synth.first_guess(settings, f.task.image_shape, 10, generator, w), []
    return synth.synthesize(f.task, trajectory, settings, generator)


figure, axes = plt.subplots(len(stops), 10, figsize=(9, 3.9))
aligned = []
for row, steps_made in zip(axes, stops):
    learnt, history = learn(steps_made)
    own = {
        "synthetic": lambda w, batch: measures.synthetic_gradient(
            f.task.apply, w, learnt.images, learnt.logits
        )
    }
    aligned.append(cosines(f, 10, own)["synthetic"])
    for c, axis in enumerate(row):
        image = learnt.images[c]
        axis.imshow(image[0], cmap="gray", vmin=-1.5, vmax=2.5)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_title(names[c] if steps_made == 0 else "", fontsize=8)
    row[0].set_ylabel(f"{steps_made} steps", fontsize=8)
plt.show()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(range(1, len(history) + 1), history, color=BLUE)
left.axhline(1, color=BLACK, lw=0.8, ls="--")
left.set(xlabel="step of the synthesis", ylabel="matching loss L", ylim=(0, 2))
right.plot(stops, aligned, "o-", color=BLUE)
right.axhline(0, color=BLACK, lw=0.8)
right.set(xlabel="step of the synthesis", ylabel="cosine to the global gradient")
plt.show()

# %% [markdown]
# L = 1 means: training on these images comes no nearer to where the federation went. The images
# are no photographs; they are whatever moves this network as the clients' images did.
#
# *Change.* Set `settings.ipc` to 5, or `settings.inner_steps` to 30. Does a smaller L give a
# better direction?
#
# ## 8. FedSynSAM against its parents
#
# *Question.* FedSynSAM takes SAM from FedSAM and the synthetic images from DynaFed. Is the child
# better than its parents, where clients share no class and where they do, and what does it cost
# in bytes?
#
# All send two bits a parameter up. Bytes down contain the synthetic images. (`fl.FedSynSAM`)

# %%
SYNTHESIS = {"warmup": min(10, rounds(40) - 2), "outer_steps": 5 if QUICK else 100, "ipc": 2}
SYNTHESIS |= {"window": 2} if QUICK else {}
METHODS = {
    "fedavg": {},
    "fedsam": {"rho": 0.05},
    "dynafed": SYNTHESIS,
    "fedsynsam": {"rho": 0.05} | SYNTHESIS,
}
SPLITS = {
    "clients share no class": DISJOINT,
    "clients share classes": {"partition": "dirichlet", "alpha": 1.0},
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
results = []
for axis, (title, how) in zip(axes, SPLITS.items()):
    for (algo, settings), colour in zip(METHODS.items(), (BLACK, GREY, GREEN, RED)):
        outcome = run.experiment(**SMALL, **how, algo=algo, rounds=rounds(40), **settings)
        results.append((title, outcome.result))
        axis.plot(*curve(outcome), color=colour, label=algo)
    axis.set(xlabel="round", ylabel="test accuracy (%)", title=title)
axes[0].legend(fontsize=8)
plt.show()

print(f"{'':24}{'method':12}{'accuracy':>9}{'loss':>8}{'eigenvalue':>12}{'MB up':>8}{'down':>8}")
for title, r in results:
    numbers = f"{100 * r['test_acc']:9.1f}{r['test_loss']:8.3f}{r['eigenvalue']:12.1f}"
    print(f"{title:24}{r['algo']:12}{numbers}{r['up'] / 1e6:8.2f}{r['down'] / 1e6:8.2f}")

# %% [markdown]
# One seed, a small network, one learning rate: this is a look, not a result. Differences of a few
# points change their sign with the seed, most of all where clients share no class. What the
# project measured over seeds, with intervals, is in `results/README.md`; there, too, the child
# does not beat its parents everywhere.
#
# *Change.* Add a loop over `seed` and take means. Give each method its own learning rate. Add
# `oracle` to `METHODS`, which peeks at everybody's images: how much could a better direction win
# here at all?
#
# From here: `classroom/exercises.md` has twelve exercises and an open one, in which you write a
# direction of your own.
