"""The claims around FedSynSAM's, each as an experiment: those of FedSynth, GradAlign and MAN, and ours about the ceiling.

    fedsynth    synthetic data are worth their bytes, against random masking                          (FedSynth)
    gradalign   displacement aligns the clients' gradients and helps accuracy, at large batch too     (GradAlign, FedGA)
    man         the activation norm lowers the top eigenvalue and raises accuracy, with any method    (MAN)
    oracle      how much is there to gain from the true global direction?                             (ours)

How an experiment works stands in study.py, what all of them share in the card of claims.py.

Sources: each class names its own. Read next: claims.py.
"""
import statistics
import time

import compress
import config
import sharpness
import study
import synth
from study import accuracy, eigenvalue, paired, said, values
from tools import plot


class FedSynth(study.Claim):
    """Accuracy against the bytes of a client's message: FedSynth with both objectives, random masking at EQUAL bytes, top-k, QSGD.

    A small mlp: a client's learning costs gradients through gradients, and on the cnn nothing was learnt in the rounds that could be
    paid for. cpu: 3 seeds x (4 runs of FedSynth, 20 to 55 s each, + 7 of 5 s), 5 minutes.
    Source: Hu et al. 2022 (FedSynth), abstract.
    """
    name, source = "fedsynth", "FedSynth, Hu et al. 2022"
    says = "At equal bytes, synthetic data sent in place of an update are comparable to or better than random masking"
    refuted = "random masking at the same bytes has a higher test accuracy than FedSynth (objective data); comparable is: not told apart, and not 1 point below"
    BATCHES = {"quick": (1,), "cpu": (1, 4), "gpu": (1, 4, 16)}

    def cells(self, world):
        start = {**self.worlds()[world], **({"model": "mlp", "rounds": 20, "alpha": 0.6} if self.size == "cpu" else {}),
                 **({"fs_steps": 3} if self.size == "quick" else {})}
        plain, out = {**start, "algo": "fedavg"}, {"none": {**start, "algo": "fedavg", "compress": "identity"}}
        for batches in self.BATCHES[self.size]:
            size = self.message(start, batches)
            for objective in ("data", "update"):
                out[f"FedSynth {objective}, {size:,} bytes"] = {**start, "algo": "fedsynth", "fs_batches": batches, "fs_objective": objective}
            out[f"random masking, {size:,} bytes"] = {**plain, "compress": "randk", "scaled": False, "k": compress.masking_within(size)}
            out[f"top-k, {size:,} bytes"] = {**plain, "compress": "topk", "k": self.top_k_within(size)}
        return {**out, "QSGD, 2 bits": {**plain, "compress": "qsgd", "levels": 1}, "QSGD, 4 bits": {**plain, "compress": "qsgd", "levels": 7}}

    @staticmethod
    def message(fields, batches):
        """Bytes of FedSynth's message at these settings."""
        cfg = config.Config(**{**fields, "algo": "fedsynth"})
        shape, classes = {"cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100)}.get(cfg.dataset, ((1, 28, 28), 10))
        return synth.AsData(None, None, (batches, cfg.fs_images, *shape), classes, cfg.fs_format).size

    def top_k_within(self, size):
        """k of a TopK message of at most `size` bytes: for each a float and an index of 16 bits, or 24 for the networks of `gpu`."""
        return (size - 4) // (7 if self.size == "gpu" else 6)

    def columns(self):
        return [("test accuracy %", accuracy, ".2f"), ("bytes a client and round", message_bytes, ",.0f"),
                ("training loss", lambda r: r["train_loss"], ".3f"), ("seconds", lambda r: r["seconds"], ".0f")]

    def verdict(self, cells):
        gain = {}
        for label in cells:
            if label.startswith("FedSynth"):
                objective, size = label.removeprefix("FedSynth ").split(", ", 1)
                gain[objective, size] = paired(cells[label], cells[f"random masking, {size}"], accuracy)
        word = study.judge([comparable(d) for (objective, _), d in gain.items() if objective == "data"])
        return f"{word}: test accuracy minus that of random masking at equal bytes: " + "; ".join(
            f"{objective}, {size} {said(d)}" for (objective, size), d in gain.items())

    def draw(self, cells, path):
        families = {}
        for label, rows in cells.items():
            if values(rows, accuracy):
                families.setdefault(label.split(",")[0], []).append((statistics.fmean(values(rows, message_bytes)), values(rows, accuracy)))
        with plot.figure(path, 1, width=6, height=4) as (axis,):
            for n, (family, points) in enumerate(families.items()):
                at, runs = [b for b, _ in sorted(points)], [list(r) for r in zip(*(v for _, v in sorted(points)))]
                plot.band(axis, at, runs, {"none": "no compression", "FedSynth data": "FedSynth, objective data",
                                           "FedSynth update": "FedSynth, objective update"}.get(family, family), n)
            axis.set(xscale="log", xlabel="bytes of a client's message", ylabel="test accuracy (%)")
            plot.legend(axis)


def comparable(differences, margin=1.0):
    """`study.differs`, but 1 also if not told apart and on the mean at most `margin` below."""
    sign = study.differs(differences)
    return 1 if sign == 0 and statistics.fmean(differences) >= -margin else sign


def message_bytes(row):
    """Bytes up of one client in one round."""
    cfg = config.Config(**row["fields"])
    return row["up"] / (cfg.participation * cfg.rounds)


class GradAlign(study.Claim):
    """Disagreement r of ALL clients' full gradients at the final model, and accuracy, against beta and batch size.

    r is measured alike for every method, on uncompressed gradients; the uplink is not compressed (the papers'). Batch 100 makes 8 local
    steps where batch 20 makes 20. cpu: 3 seeds x 12 runs, about 26 minutes. Which beta is compared is chosen on validation images.
    Source: Dandi, Barba and Jaggi 2022.
    """
    name, source = "gradalign", "GradAlign and FedGA, Dandi et al. 2022"
    says = "The displacement makes the clients' gradients agree and improves accuracy, at large batch too"
    refuted = "with the beta that is best on validation images, r is not below FedAvg's, or test accuracy is below FedAvg's, at either batch size"
    BETAS = {"quick": (0.1,), "cpu": (0.025, 0.1, 0.4), "gpu": (0.025, 0.1, 0.4)}
    BATCHES = {"quick": {4: {"batch": 4, "local_steps": 2}}, "cpu": {20: {"batch": 20, "local_steps": 20}, 100: {"batch": 100, "local_steps": 8}},
               "gpu": {50: {"batch": 50}, 500: {"batch": 500}}}
    RIVALS = ("fedprox", "scaffold")

    def cells(self, world):
        methods = {"fedavg": {"algo": "fedavg"}, **{f"fedga, beta {b:g}": {"algo": "fedga", "beta": b} for b in self.BETAS[self.size]},
                   **{a: {"algo": a} for a in self.RIVALS}}
        return {f"{label}, batch {batch}": {"compress": "identity", **how, **fields}
                for batch, how in self.BATCHES[self.size].items() for label, fields in methods.items()}

    def measure(self, fed, rows):
        return {"r": disagreement(fed)}

    def columns(self):
        return [("test accuracy %", accuracy, ".2f"), ("validation accuracy %", lambda r: 100 * r["val_acc"], ".2f"), ("r", lambda r: r["r"], ".3f"),
                ("training loss", lambda r: r["train_loss"], ".3f"), ("top eigenvalue", eigenvalue, ".1f"), ("MB up", lambda r: r["up"] / 1e6, ".1f")]

    def verdict(self, cells):
        r, gain = {}, {}
        for batch in self.BATCHES[self.size]:
            mine = {f"beta {b:g}": cells[f"fedga, beta {b:g}, batch {batch}"] for b in self.BETAS[self.size]}
            best = max(mine, key=lambda b: statistics.fmean(values(mine[b], lambda x: x["val_acc"]) or [-1]))
            plain = cells[f"fedavg, batch {batch}"]
            r[f"batch {batch}, {best}"], gain[f"batch {batch}, {best}"] = paired(mine[best], plain, lambda x: x["r"]), paired(mine[best], plain, accuracy)
        (signs, lower), (more, higher) = study.compared(r, "+.3f", want=-1), study.compared(gain)
        return f"{study.judge(signs + more)}: FedGA minus FedAvg, with the beta best on validation images: r {lower}; test accuracy {higher}"

    def draw(self, cells, path):
        batches, betas = list(self.BATCHES[self.size]), self.BETAS[self.size]
        with plot.figure(path, 2, len(batches), width=5.4) as axes:
            for row, batch in enumerate(batches):
                for axis, (f, label) in zip(axes[2 * row:], ((lambda x: x["r"], "disagreement r of the clients"), (accuracy, "test accuracy (%)"))):
                    groups = {"FedAvg\n(beta 0)": {"fedavg": values(cells[f"fedavg, batch {batch}"], f)}}
                    groups |= {f"beta\n{b:g}": {"fedga": values(cells[f"fedga, beta {b:g}, batch {batch}"], f)} for b in betas}
                    groups |= {{"fedprox": "FedProx", "scaffold": "SCAFFOLD"}[a] + "\n": {a: values(cells[f"{a}, batch {batch}"], f)} for a in self.RIVALS}
                    plot.dots(axis, {k: {n: v} for k, g in groups.items() for n, v in g.items()}, label, f"batch {batch}", dodge=False)


def disagreement(fed):
    """r = 1/(2N) sum_i ||g_i - g||^2 at w [d], over full gradients of ALL N clients, never held together -> number; align.gradient_variance."""
    total, squares = fed.w.new_zeros(len(fed.w), dtype=fed.w.dtype).double(), 0.0
    gradient = lambda part: sharpness.full_gradient(fed.task.apply, fed.w, fed.task.train, part.to(fed.w.device)).double()            # noqa: E731
    for g in fed.pool.map(gradient, fed.task.parts):
        total += g
        squares += float(g.square().sum())
    n = len(fed.task.parts)
    return max(0.0, 0.5 * (squares / n - float((total / n).square().sum())))


class Man(study.Claim):
    """Top eigenvalue, trace, accuracy and the time of a local step with and without MAN, for four bases.

    The Hessian is that of plain cross-entropy, without MAN's term. Time is CPU time, which other programs on the machine
    change less than seconds. cpu: 3 seeds x 8 runs, about half an hour (some runs were paused meanwhile), a third of it done if `oracle` ran before.
    Source: Yashwanth et al. 2024 (MAN, arXiv 2512.08314).
    """
    name, source = "man", "MAN, arXiv 2512.08314"
    says = "Penalising activation norms lowers the top Hessian eigenvalue and raises test accuracy, whatever the method"
    refuted = "for some base, in every seed, the eigenvalue is not lower or the accuracy is lower with it"
    BASES = ("fedavg", "feddyn", "fedsam", "fedsynsam")
    ZETA = 0.15

    def cells(self, world):
        return {f"{base} {word} MAN": {"algo": base, "man": zeta} for base in self.BASES for word, zeta in (("without", 0.0), ("with", self.ZETA))}

    def measure(self, fed, rows):
        objective = sharpness.Objective(fed.task.apply, fed.task.train, rows, each=fed.pool.map)
        trace = sharpness.trace(objective.hessian(fed.w), fed.w, samples=3 if self.size == "quick" else 10)
        return {"trace": trace.estimate, "trace_error": trace.error, "step_ms": 1000 * seconds_of_a_step(fed)}

    def columns(self):
        return [*super().columns(), ("test loss", lambda r: r["test_loss"], ".3f"), ("trace", lambda r: r["trace"], ".0f"),
                ("a local step, ms", lambda r: r["step_ms"], ".1f")]

    def verdict(self, cells):
        pair = lambda f: {b: paired(cells[f"{b} with MAN"], cells[f"{b} without MAN"], f) for b in self.BASES}                     # noqa: E731
        (flat, lower), (good, higher) = study.compared(pair(eigenvalue), "+.1f", want=-1), study.compared(pair(accuracy))
        return f"{study.judge(flat + good)}: with minus without it: top eigenvalue {lower}; test accuracy {higher}"

    def draw(self, cells, path):
        names = {"fedavg": "FedAvg", "feddyn": "FedDyn", "fedsam": "FedSAM", "fedsynsam": "FedSynSAM"}
        with plot.figure(path, 4, width=4.2, foot=0.3) as axes:
            for axis, (f, label) in zip(axes, ((eigenvalue, "top Hessian eigenvalue"), (lambda r: r["trace"], "trace of the Hessian"),
                                               (accuracy, "test accuracy (%)"), (lambda r: r["step_ms"], "a local step, milliseconds"))):
                plot.dots(axis, {names[b]: {w: values(cells[f"{b} {w}"], f) for w in ("without MAN", "with MAN")} for b in self.BASES}, label)
            plot.legend(axes[0], below=True)


def seconds_of_a_step(fed, times=3):
    """CPU time (on a GPU: time) of a client's local step, in one more round from w [d] that is thrown away -> seconds, the least of `times`.

    For methods without a survey.
    """
    clients, clock = fed.clients(fed.t), time.process_time if fed.w.device.type == "cpu" else time.perf_counter
    plans, memory, seconds = fed.plans(clients, fed.t), fed.recall(clients, fed.w), []
    fed.method.receive(fed.w, fed.method.broadcast(fed.w)[1:])
    for _ in range(times):
        start = clock()
        for _ in fed.each_client(fed.w, memory, plans, fed.t, lambda n, sent, kept: float(sent[0, 0])):      # reading a number waits for the GPU
            pass
        seconds.append((clock() - start) / sum(map(len, plans)))
    return min(seconds)


# ------------------------------------------------------------------------------------------------------------ oracle
class Ceiling(study.Claim):
    """FedAvg, every estimate of the global direction, and the oracle that knows it (ceiling.py): what share of the gap does each close?

    All at the defaults (one rho and one learning rate for all). cpu: 3 seeds x 8 runs; 71 minutes of one core as measured on
    a machine that was busier than that (the oracle, of 200 images, 7, FedSynSAM 3.6 a run), so about 33 on two that are free.
    Source: ours.
    """
    name, source = "oracle", "ours"
    says = "Knowing the true global direction raises test accuracy over FedAvg under compression, so there is something for estimators to gain"
    refuted = "the oracle's test accuracy is below FedAvg's"
    CELLS = {"fedavg": {"algo": "fedavg"}, "fedsam": {"algo": "fedsam"}, "fedlesam": {"algo": "fedlesam"}, "fedlesam-server": {"algo": "fedlesam-server"},
             "fedsynsam (mix 0.5)": {"algo": "fedsynsam"}, "fedsynsam (mix 1)": {"algo": "fedsynsam", "mix": 1.0},
             "fedsynsam (raw gradients)": {"algo": "fedsynsam", "mix_units": False}, "oracle": {"algo": "oracle"}}

    def cells(self, world):
        many = {"quick": ("fedavg", "fedsam", "oracle")}.get(self.size, self.CELLS)
        peek = {"oracle_images": 200} if self.size == "cpu" else {}
        return {label: {"compress": "qsgd", "levels": 1, **(peek if label == "oracle" else {}), **self.CELLS[label]} for label in many}

    def columns(self):
        return [*super().columns(), ("test loss", lambda r: r["test_loss"], ".3f"), ("seconds", lambda r: r["seconds"], ".0f")]

    def verdict(self, cells):
        gain = {label: paired(rows, cells["fedavg"], accuracy) for label, rows in cells.items() if label != "fedavg"}
        flat = paired(cells["oracle"], cells["fedavg"], eigenvalue)
        share = shares(gain)
        words = "; ".join(f"{label} {said(d)}" + (f", {100 * share[label]:.0f} % of the gap" if share else "") for label, d in gain.items())
        none = "" if share else "No shares: the gap is not told apart from none. "
        return (f"{study.judge([study.differs(gain['oracle'])])}: test accuracy minus FedAvg's: {words}. {none}"
                f"The oracle's top eigenvalue minus FedAvg's: {said(flat, '+.1f')}")

    def draw(self, cells, path):
        gain = {label: paired(rows, cells["fedavg"], accuracy) for label, rows in cells.items() if label != "fedavg"}
        share = shares(gain)
        with plot.figure(path, 3, width=4.8, height=4.4) as axes:
            plot.dots(axes[0], {x: {x: values(rows, accuracy)} for x, rows in cells.items()}, "test accuracy (%)", dodge=False)
            plot.dots(axes[1], {x + (f", {100 * share[x]:.0f} %" if x in share else ""): {x: d} for x, d in gain.items()},
                      "test accuracy minus FedAvg's, same seed", "%: share of the gap closed" if share else "the gap is not told apart from none", dodge=False)
            plot.dots(axes[2], {x: {x: values(rows, eigenvalue)} for x, rows in cells.items()}, "top Hessian eigenvalue", dodge=False)
            axes[1].axhline(0, color="black", lw=0.6)
            for axis in axes:
                plot.slant(axis)


def shares(gain):
    """The share of the gap FedAvg -> oracle that each closes; gain: {label: paired differences to FedAvg} -> {label: number}, {} without a gap."""
    if study.differs(gain["oracle"]) != 1:
        return {}
    return {label: statistics.fmean(d) / statistics.fmean(gain["oracle"]) for label, d in gain.items() if d}


CLAIMS = {"fedsynth": FedSynth, "gradalign": GradAlign, "man": Man, "oracle": Ceiling}
