"""Measures of a finished run: what the loss looks like around its model, how well directions agree.

    python -m lab.measures FOLDER                     eigenvalues, trace and SAM sharpness
    python -m lab.measures FOLDER slice disagreement  these measures, of those in MEASURES

A measure is a function of a federation and a sample of training images. What was measured is kept
in the run's folder (measures/NAME-DIGEST.json), so a new measure of finished runs needs no
training. The digest is that of the measure's arguments and of this file.

The loss L is the plain mean cross-entropy of the sample, without weight decay or MAN's term, and
its Hessian H is taken over all d parameters.

    eigenvalues     the largest and the smallest eigenvalue of H, by Lanczos iteration (sam.py)
    trace           E v'Hv over random signs v, since E vv' = I                          (`trace`)
    sam             S_rho = max_{||e|| <= rho} L(w + e) - L(w): what SAM makes small; at a minimum
                    it is rho^2 / 2 times the largest eigenvalue + O(rho^3)      (`sam_sharpness`)
    slice, plane    L(w + a d) and L(w + a d + b e) for random directions d, e    (`line`, `plane`)
    path            the cosine of where the model goes in some rounds to minus the gradient of L on
                    the way                                                        (`descending`)
    disagreement    half the variance of the clients' gradients (GradAlign's r)
    step            milliseconds of a local step

Largest eigenvalue, or largest |eigenvalue|? PyHessian's power iteration finds the latter, with its
sign. The two differ where the smallest eigenvalue has the larger magnitude, as it may at random
first weights. This project prints the largest eigenvalue; `eigenvalues` gives both ends, and says
what PyHessian would find.

A slice along plain random numbers says nothing about sharpness: a ReLU network computes the same
when one layer is multiplied by c and the next one divided by c, but then looks c times steeper. So
each filter of d gets the norm of that filter of w (`filter_direction`), and such a rescaling leaves
the slice as it is. S_rho and the eigenvalues have no such protection.

Sources: trace, Hutchinson 1990. Slices, Li et al. 2018. S_rho, Foret et al. 2021, eq. (1), (2).
Disagreement, Dandi, Barba and Jaggi 2022. Measures of networks, PyHessian, Yao et al. 2020.
"""

import copy
import hashlib
import inspect
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import compress
import fl
import run
import sam
import synth
from plumbing.folder import read_json, whole
from plumbing.settings import PLACES, closest
from vision import task

# --------------------------------------------------------------------------------------- the loss L


class Sample:
    """The mean cross-entropy L of apply(w [d], x) over a sample of images, summed over chunks.

    images: as in vision.data, with `chunks`. each: `map`, or that of a thread pool.
    """

    def __init__(self, apply, images, each=map, chunk=100):
        self.each, self.images = each, images
        self.losses = [share(apply, some, len(images.y)) for some in images.chunks(chunk)]

    def loss(self, w):
        """L(w [d]), a number."""
        with torch.no_grad():
            return float(sum(self.each(lambda part: part(w).double(), self.losses)))

    def gradient(self, w):
        """The gradient of L at w [d] -> [d]."""
        return sum(self.each(lambda part: fl.autograd(part, w), self.losses))

    def hessian(self, w):
        """The Hessian of L at w [d], as a function v [d] -> H v [d]."""
        return sam.hessian(self.losses, w, each=self.each)


def share(apply, some, n):
    """The share of a chunk in a mean over n images, as a function of w [d]."""
    return lambda w: F.cross_entropy(apply(w, some.x), some.y, reduction="sum") / n


def sample_of(federation, train, n):
    """The images that a run measures itself on: n of the training images, equal for all runs."""
    images = run.measured_images(train, n)
    return Sample(federation.task.apply, images, federation.each)


# ---------------------------------------------------------------------------------------- curvature


def ends(times, like):
    """The largest and smallest eigenvalue of a symmetric matrix v [d] -> H v [d]: two numbers."""
    largest = sam.largest_eigenvalue(times, like)
    return largest, -sam.largest_eigenvalue(lambda v: -times(v), like)


def trace(times, like, samples=10, seed=0):
    """The trace of a symmetric matrix v [d] -> H v [d]: (estimate, its standard error).

    A sample v'Hv has variance 2 (||H||_F^2 - sum_j H_jj^2), so none if H is diagonal. The random
    signs depend on the seed only: differences between models see the same ones. samples >= 2.
    """
    g, seen = torch.Generator().manual_seed(seed), []
    for _ in range(samples):
        v = (2 * torch.randint(2, (len(like),), generator=g) - 1).to(like)
        seen.append(float(v @ times(v)))
    seen = torch.tensor(seen, dtype=torch.float64)
    return float(seen.mean()), float(seen.std()) / math.sqrt(samples)


# --------------------------------------------------------------------------------- around the model


def sam_sharpness(loss, gradient, w, rho, steps=20, seed=0):
    """S_rho at w [d]: (by SAM's one step, by an ascent), two lower bounds of the maximum.

    loss: [d] -> number, gradient: [d] -> [d]. SAM's step is e = rho g / ||g||. The ascent starts
    there (at a random e if g = 0), makes steps of length rho along the gradient and goes back into
    the ball; the largest value counts. Its step length is this project's choice.
    """
    base, g = loss(w), gradient(w)
    one_step = best = loss(sam.perturb(w, g, rho)) - base
    if not g.any():
        g = torch.randn(len(w), generator=torch.Generator().manual_seed(seed)).to(w)
    e = rho * sam.unit(g)
    for _ in range(steps):
        e = sam.perturb(e, gradient(w + e), rho)
        e = e * min(1.0, rho / max(float(e.norm()), sam.TINY))
        best = max(best, loss(w + e) - base)
    return one_step, best


def filter_direction(w, shapes, seed=0):
    """A random direction d [d] with ||d_f|| = ||w_f|| for every filter f of the network at w [d].

    A filter is one row of a weight: what feeds one output channel or unit. Parameters with one
    dimension (biases, norms) get 0. Equal seeds give equal random numbers on every device and for
    every model of these shapes, so models are compared with equal seeds.
    """
    noise = torch.randn(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes, parts = [shape.numel() for shape in shapes], []
    for shape, mine, random in zip(shapes, w.split(sizes), noise.to(w).split(sizes)):
        if len(shape) < 2:
            parts.append(torch.zeros_like(mine))
            continue
        rows, random = mine.view(shape[0], -1), random.view(shape[0], -1)
        lengths = rows.norm(dim=1) / random.norm(dim=1)
        parts.append((random * lengths[:, None]).view(-1))
    return torch.cat(parts)


def places(points, span=1.0):
    """Where a slice is evaluated: `points` numbers from -span to span, 0 in the middle."""
    if points < 3 or points % 2 == 0:
        raise ValueError(
            f"points = {points} must be odd and at least 3: the model is in the middle"
        )
    return [span * k / (points - 1) for k in range(1 - points, points, 2)]


def line(loss, w, d, at):
    """L(w + a d) for all a of a list `at`: a list of numbers."""
    return [loss(w + a * d) for a in at]


def plane(loss, w, d, e, at):
    """L(w + a d + b e) for all a and b of a list `at`: a row for each a, a column for each b."""
    return [line(loss, w + a * d, e, at) for a in at]


# ---------------------------------------------------------------------- what clients would estimate


def twin(federation, compressor=None):
    """A copy that can make rounds while the original stays as it is."""
    other = copy.copy(federation)
    other.method = copy.copy(federation.method)
    other.memory, other.informed = dict(federation.memory), set(federation.informed)
    other.compressor = compressor or federation.compressor
    return other


def move_without_compression(federation):
    """w^{t+1} - w^t [d] of the coming round, if nothing were compressed."""
    other = twin(federation, compress.Identity(federation.w.dtype))
    other.round()
    return other.w - federation.w


def before_training(federation):
    """A copy in the coming round, before the clients train: (copy, clients, received, lr)."""
    other = twin(federation)
    method, lr = other.method, other.method.lr * other.method.lr_decay**other.t
    if method.prepare(other.t, other.w):
        other.informed = set()
    clients, mean = other.choose(), {}
    received = other.send_down(clients)
    for work in method.exchanges[:-1]:
        mean = other.exchange(work, clients, received, lr)
        received = received | other.through_wire(mean, len(clients))
    return other, clients, received, lr


def walk(federation, steps=None):
    """The clients of the coming round at the points they reach after some of their local steps.

    steps: how many; None: all but the last, and never more. Yields what a method's `point` gets:
    (w [d], the next batch, what was received, the memory).
    """
    other, clients, received, lr = before_training(federation)
    point, seen, n = other.method.point, [], 0

    def noted(*arguments):
        seen.append(arguments if len(seen) == n else None)
        return point(*arguments)

    other.method.point = noted
    for i in clients:
        batches, mine = other.plan("train", i), other.recall(i, received)
        n = len(batches) - 1 if steps is None else min(steps, len(batches) - 1)
        seen.clear()
        other.method.train(received, mine, batches, lr)
        yield from filter(None, seen)


def alignment(federation, sample, moves=None, steps=None, mix=0.5):
    """Cosines to the gradient of L at the points that clients reach, means over the clients.

    own: the gradient of the client's next batch; synthetic: that of the synthetic data; mixed: the
    blend of both; used: where this very method perturbs the model, if it does. moves:
    {name: displacement [d]}; minus a displacement is an estimate of an ascent direction, too.
    -> {name: cosine, or None if there is nothing to compare}
    """
    method, cosines = federation.method, {}
    for w, batch, received, mine in walk(federation, steps):
        true = sample.gradient(w)
        found = {"own": method.gradient(w, batch)}
        e = method.point(w, batch, received, mine)[0] - w
        if e.any():
            found["used"] = e
        found |= {name: -move for name, move in (moves or {}).items()}
        X, Y = method.state.get("X"), method.state.get("Y")
        if X is not None:
            found["synthetic"] = synthetic_gradient(federation.task.apply, w, X, Y)
            found["mixed"] = sam.blend(found["own"], found["synthetic"], mix)
        for name, u in found.items():
            cosines.setdefault(name, []).append(float(sam.unit(u) @ sam.unit(true)))
    names = ("own", "used", "last_move", "last_uncompressed", "synthetic", "mixed")
    means = {name: sum(c) / len(c) for name, c in cosines.items()}
    return {name: means.get(name) for name in names}


def synthetic_gradient(apply, w, X, Y):
    """The gradient of the loss on synthetic data at w [d] -> [d]."""
    return fl.autograd(lambda v: synth.synthetic_loss(apply, v, X, Y), w)


def descending(trajectory, gradient, window):
    """How much of a path goes downhill: a cosine, mean over all pieces of `window` rounds.

    trajectory: models w [d]; gradient: [d] -> [d]. A piece is compared with minus the sum of the
    gradients at the models that it leaves.
    """
    gradients, cosines = [gradient(w) for w in trajectory], []
    for p in range(len(trajectory) - window):
        moved = trajectory[p + window] - trajectory[p]
        downhill = -sum(gradients[p : p + window])
        cosines.append(float(sam.unit(moved) @ sam.unit(downhill)))
    return sum(cosines) / len(cosines)


def client_gradient(task, w, i):
    """The gradient of client i's loss over all of its images at w [d] -> [d], in float64."""
    total, batches = 0, task.everything(i)
    for batch in batches:
        weight = (batch[:, 0] >= 0).sum() / task.sizes[i]
        total = total + weight * fl.autograd(lambda v: task.loss(v, batch), w).double()
    return total


def disagreement(task, w, each=map):
    """r = 1/(2N) sum_i ||g_i - g||^2 over the gradients g_i of all N clients at w [d]: a number."""
    mean, squares, n = 0, 0.0, len(task.sizes)
    for g in each(lambda i: client_gradient(task, w, i), range(n)):
        mean, squares = mean + g / n, squares + float(g.square().sum()) / n
    return max(0.0, 0.5 * (squares - float(mean.square().sum())))


def seconds_of_a_step(federation, times=3):
    """CPU time (on a GPU: time) of a client's local step, in a round that is thrown away: the
    least of `times`. CPU time changes less with what else the machine does."""
    clock = time.process_time if federation.w.device.type == "cpu" else time.perf_counter
    other, clients, received, lr = before_training(federation)
    seen = []
    steps = sum(other.task.steps(i) for i in clients)
    for _ in range(times):
        began = clock()
        for i in clients:
            sent, _ = other.method.train(
                received, other.recall(i, received), other.plan("train", i), lr
            )
            float(next(iter(sent.values()))[0])  # reading a number waits for the GPU
        seen.append((clock() - began) / steps)
    return min(seen)


# ------------------------------------------------------------ measures of a run, kept in its folder


def measure_eigenvalues(federation, sample):
    """Both ends of the spectrum of H, and what PyHessian's power iteration would find."""
    largest, smallest = ends(sample.hessian(federation.judged()), federation.judged())
    magnitude = max(largest, smallest, key=abs)
    return {"largest": largest, "smallest": smallest, "largest_magnitude": magnitude}


def measure_trace(federation, sample, samples=10):
    estimate, error = trace(sample.hessian(federation.judged()), federation.judged(), samples)
    return {"trace": estimate, "trace_error": error}


def measure_sam(federation, sample, rho=0.1, steps=5):
    return {"sam": sam_sharpness(sample.loss, sample.gradient, federation.judged(), rho, steps)[1]}


def directions(federation):
    """Two filter-normalised directions [d] at the global model, of the seeds 0 and 1."""
    return [filter_direction(federation.judged(), federation.task.shapes, seed) for seed in (0, 1)]


def measure_slice(federation, sample, points=21):
    at = places(points)
    losses = line(sample.loss, federation.judged(), directions(federation)[0], at)
    return {"slice_at": at, "slice": losses}


def measure_plane(federation, sample, points=11, span=1.0):
    at = places(points, span)
    losses = plane(sample.loss, federation.judged(), *directions(federation), at)
    return {"plane_at": at, "plane": losses}


def measure_path(federation, sample):
    """`descending` on the trajectory of a synthesis; it is kept if there may be another one."""
    method = federation.method
    if not method.state.get("trajectory"):
        raise ValueError("path needs a method that learns images, and resynthesize above 0")
    return {"cos_path": descending(method.state["trajectory"], sample.gradient, method.window)}


def measure_disagreement(federation, sample):
    return {"r": disagreement(federation.task, federation.w, sample.each)}


def measure_step(federation, sample):
    return {"step_ms": 1000 * seconds_of_a_step(federation)}


MEASURES = {
    "eigenvalues": measure_eigenvalues,
    "trace": measure_trace,
    "sam": measure_sam,
    "slice": measure_slice,
    "plane": measure_plane,
    "path": measure_path,
    "disagreement": measure_disagreement,
    "step": measure_step,
}


def measure(folder, wanted, **given):
    """Measures of a finished run, from its folder or made now: {name: value}.

    wanted: {name in MEASURES: {argument: value}}; given: as for run.load, which needs the algo of a
    method in a file of the reader's own. Raises ValueError for an unknown measure.
    """
    folder, found, loaded = Path(folder), {}, None
    for name, arguments in wanted.items():
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; {closest(name, list(MEASURES))}")
        path = folder / "measures" / f"{name}-{digest(name, arguments)}.json"
        if not path.exists():
            loaded = loaded or opened(folder, **given)
            path.parent.mkdir(exist_ok=True)
            run.write(path, json.dumps(MEASURES[name](*loaded, **arguments)) + "\n")
        found |= read_json(path)
    return found


def digest(name, arguments):
    """Eight characters that change with the arguments of a measure and with the code here."""
    text = json.dumps([name, arguments]) + Path(__file__).read_text() + inspect.getsource(sam)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def opened(folder, **given):
    """The federation of a finished run and the Sample it is measured on."""
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} holds no finished run; python run.py --resume {folder}")
    federation, images = run.load(folder, **given)
    n = read_json(folder / "config.json")["settings"]["measure_images"]
    return federation, sample_of(federation, images.train, n)


# --------------------------------------------------------------------- measures while a run goes on


class Watch:
    """Called after every round: measures in every `every`-th, as lines of FOLDER/watched.jsonl.

    names: of "eigenvalue", "alignment" and "mean_model"; n: training images to measure on; images:
    a vision.data.Dataset. Alignment needs the last move of the global model, also without
    compression, so one round earlier the model and the coming move are stored. "mean_model" is the
    mean of the global models after round `mean_from`, as in methods/swa.py; it is stored in every
    round. So a run that is killed and continued gives the same lines.
    """

    def __init__(self, folder, images, n, every, names, mean_from=0):
        self.folder, self.images, self.n = Path(folder), images, n
        self.every, self.names, self.mean_from = every, names, mean_from

    def __call__(self, federation):
        t = federation.t
        if "mean_model" in self.names and t > self.mean_from:
            self.add_to_mean(federation)
        if t % self.every == 0:
            row = {"round": t} | self.measured(federation)
            with open(self.folder / "watched.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if (t + 1) % self.every == 0 and "alignment" in self.names:
            meant = move_without_compression(federation)
            kept = {"t": t, "w": federation.w, "meant": meant}
            with whole(self.folder / "before.pt") as file:
                torch.save(kept, file)

    def measured(self, federation):
        sample, row = sample_of(federation, federation.task.train, self.n), {}
        if "eigenvalue" in self.names:
            H = sample.hessian(federation.w)
            row["eigenvalue"] = sam.largest_eigenvalue(H, federation.w)
        if "alignment" in self.names:
            row["alignment"] = alignment(federation, sample, self.moves(federation))
        if "mean_model" in self.names and federation.t > self.mean_from:
            row["mean_model"] = self.judge_mean(federation)
        return row

    def add_to_mean(self, federation):
        path, t = self.folder / "mean.pt", federation.t
        seen = torch.load(path) if path.exists() else {"t": self.mean_from, "w": federation.w}
        if seen["t"] == t - 1:  # a round that is made again is in it already
            w = seen["w"] + (federation.w - seen["w"]) / (t - self.mean_from)
            with whole(path) as file:
                torch.save({"t": t, "w": w}, file)

    def judge_mean(self, federation):
        w, found = torch.load(self.folder / "mean.pt")["w"], {}
        for name, some in (("val", self.images.val), ("test", self.images.test)):
            loss, accuracy = task.evaluate(federation.task.apply, w, placed(some, w.device))
            found |= {f"{name}_loss": loss, f"{name}_acc": accuracy}
        return found

    def moves(self, federation):
        """The last move of the global model, as it was and as the clients meant it."""
        path = self.folder / "before.pt"
        before = torch.load(path, map_location=federation.w.device) if path.exists() else {}
        if before.get("t") != federation.t - 1:
            return {}
        moved = federation.w - before["w"]
        return {"last_move": moved, "last_uncompressed": before["meant"]}


def placed(images, device):
    """data.Images on a device: those of a study lie on the CPU."""
    tensors = {k: x.to(device) for k, x in images._asdict().items() if torch.is_tensor(x)}
    return images._replace(**tensors)


def watched(folder):
    """What was measured while the run went on: {round: {name: value}}.

    Of a round that was made twice the first line counts, for which before.pt was there.
    """
    path, found = Path(folder) / "watched.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        found.setdefault(row.pop("round"), row)
    return found


def main(argv=None):
    """The command: exit code 0 or 2."""
    p = run.Parser(prog="python -m lab.measures", description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("names", nargs="*", default=["eigenvalues", "trace", "sam"])
    for kind in PLACES:
        p.add_argument("--" + kind, help="again, if it is in a file of yours")
    try:
        given = vars(p.parse_args(argv))
        folder, names = given.pop("folder"), given.pop("names")
        found = measure(folder, {name: {} for name in names}, **given)
    except (ValueError, OSError) as error:
        print(f"lab.measures: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
