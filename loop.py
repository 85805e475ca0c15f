"""The federated loop: one round, from the server through the wire to the clients and back.

    server  chooses m of N clients, sends w [d] (+ what the method adds)
    client  K local steps  w <- w - eta G(w, batch)           G is the method (fl.py)
            sends a BUFFER: encode(w_K - w_0)                 cost = len(buffer), nothing else is counted
    server  decodes the buffers, averages them, moves w

`local_training` is one client's round as a pure function of tensors. All clients of a round go through it in chunks under
`torch.func.vmap` (a GPU is then busy with one large kernel instead of waiting for many small ones), or one by one on a few
threads of one core each (faster on a CPU), with the same numbers. All randomness comes from `fl.generator(seed, what, round,
client)`, so a run that is cut off and resumed, or spread over more workers, draws the same numbers.

Sources: McMahan et al. 2017, Algorithm 1; error feedback, Karimireddy et al. 2019. Read next: sharpness.py.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

import compress
import data
from fl import Client, generator


class Diverged(ArithmeticError):
    """A client's or the server's numbers stopped being finite; the message says where and why.  Source: ours."""


class Task:
    """What is learnt and where it lies: a loss of (w, batch), and N clients that can draw batches.

    w0 [d] initial weights, weights [d] (is this coordinate one of a weight, or of a bias?), apply(w [d], x) scores, train:
    Images, parts: N tensors of image numbers.  A task of another kind (the quadratics of test_all.py) needs w0, weights,
    sizes, loss, plan and steps_of.  Source: ours.
    """

    def __init__(self, model, train, parts, cfg):
        self.weights = model.weights
        self.w0, self.apply, self.train, self.parts, self.cfg = model.w0, model.apply, train, parts, cfg
        self.sizes = [len(p) for p in parts]

    def loss(self, w, rows):
        """Mean cross-entropy at w [d] of the batch rows [B, 4]; padded rows weigh nothing -> [].  Source: definition."""
        x, y, weight = self.train.batch(rows, self.cfg.augment)
        return (F.cross_entropy(self.apply(w, x), y, reduction="none") * weight).sum()

    def plan(self, client, g):
        """All batches of one client's round: -> rows [K, B, 4].  Source: data.draw_batches."""
        c = self.cfg
        return data.draw_batches(self.parts[client], c.batch, c.local_steps, c.local_epochs, g, c.augment).to(self.train.y.device)

    def steps_of(self, client):
        """K_i, the length of a client's plan, known without drawing it -> number [].  Source: data.draw_batches."""
        return self.cfg.local_epochs * -(-self.sizes[client] // self.cfg.batch) or self.cfg.local_steps


def local_training(method, w, memory, plan, lr):
    """One client's round, the pure function that is vmapped: K steps from w [d] with its memory [p, d] and plan [K, B, ...].

    A step whose batch is all padding changes nothing: clients with fewer steps wait for the others of their chunk.
    -> (vectors to send [uplinks, d], memory to keep [p, d]).  Source: McMahan et al. 2017, Algorithm 1, ClientUpdate.
    """
    me, alive = Client(w, memory), (plan[..., 0] >= 0).any(1).to(w.dtype)
    for k in range(len(plan)):
        uphill = method.direction(w, plan[k], me)
        w, me = method.step(w, plan[k], me, lr * alive[k], uphill)
    return method.finish(w, me, alive.sum(), lr)


class Memory:
    """Rows [p, d] for every client that was ever active, in one tensor [clients seen, p, d] that grows by doubling.

    Source: ours.
    """

    def __init__(self, rows, like):
        self.table, self.slot = like.new_zeros(0, rows, len(like)), {}

    def read(self, clients, default):
        """-> [m, p, d]; a client never seen has `default` [p, d].  Source: ours."""
        return torch.stack([self.table[self.slot[i]] if i in self.slot else default for i in clients])

    def write(self, clients, rows):
        """Keep rows [m, p, d].  Source: ours."""
        for i in clients:
            self.slot.setdefault(i, len(self.slot))
        if len(self.slot) > len(self.table):
            more = self.table.new_zeros(max(len(self.slot) - len(self.table), len(self.table)), *self.table.shape[1:])
            self.table = torch.cat([self.table, more])
        self.table[[self.slot[i] for i in clients]] = rows


class Federation:
    """The state of a run between two rounds: w [d], round t, the method's and the clients' memory, bytes up and down.

    Source: McMahan et al. 2017, Algorithm 1, Server executes.
    """

    def __init__(self, method, compressor=compress.Identity(), workers=1, chunk=1):
        task, cfg = method.task, method.cfg
        self.method, self.task, self.cfg, self.compressor, self.chunk = method, task, cfg, compressor, chunk
        self.w, self.t, self.up, self.down = task.w0.clone(), 0, 0, 0
        self.move = torch.zeros_like(task.w0)                        # w^t - w^{t-1}
        self.wire = compress.Identity(task.w0.dtype)                 # the downlink is not compressed
        self.residuals = self.method.uplinks if cfg.error_feedback else 0
        self.memory = Memory(self.method.memory + self.residuals, task.w0)
        self.holders, self.parcel = set(), 0                         # clients that have the method's parcel; its bytes
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def clients(self, t):
        """The m clients of round t, without replacement -> their numbers [m], sorted.  Source: McMahan et al. 2017."""
        order = torch.randperm(len(self.task.sizes), generator=generator(self.cfg.seed, "clients", t))
        return sorted(order[:self.cfg.participation].tolist())

    def lr(self, t):
        """eta of round t -> number [].  Source: FL-Simulator's code, lr * decay^t."""
        return self.cfg.lr * self.cfg.lr_decay ** t

    def plans(self, clients, t):
        """The batches of round t: -> one tensor [K_i, B, ...] per client.  Source: data.draw_batches."""
        return [self.task.plan(i, generator(self.cfg.seed, "batches", t, i)) for i in clients]

    def train(self, w, clients, plans, t):
        """All local training of round t from w [d] -> what is sent [m, uplinks, d], and the clients' memory after it [m, p, d].

        One client after the other on `workers` threads (chunk = 1), or `chunk` clients at a time under vmap.  Source: ours.
        """
        memory = self.memory.read(clients, torch.cat([self.method.first_memory(w), w.new_zeros(self.residuals, len(w))]))
        own, lr = memory[:, :self.method.memory], self.lr(t)
        if self.chunk == 1:
            done = list(self.pool.map(lambda c: local_training(self.method, w, own[c], plans[c], lr), range(len(clients))))
            sent, kept = (torch.stack(column) for column in zip(*done))
        else:
            K = max(map(len, plans))
            padded = torch.stack([F.pad(p, (0, 0) * (p.dim() - 1) + (0, K - len(p)), value=-1) for p in plans])
            train = torch.func.vmap(lambda m, p: local_training(self.method, w, m, p, lr))
            self.method.vmapped = True
            done = [train(own[c:c + self.chunk], padded[c:c + self.chunk]) for c in range(0, len(clients), self.chunk)]
            self.method.vmapped = False
            sent, kept = (torch.cat(column) for column in zip(*done))
        return sent, torch.cat([kept, memory[:, self.method.memory:]], 1)

    def likely_cause(self):
        """Why a client's update may have become infinite, judged by the model [d] it received -> text.  Source: ours."""
        largest = float(self.w.abs().max())
        if largest > 1e4:
            return f"the server sent a model with entries up to {largest:.0e}, so server_lr = {self.cfg.server_lr:g} is too large"
        return f"lr = {self.lr(self.t):g} is too large for this model and batch" + ("" if self.cfg.clip else ", and clip = 0 lets gradients grow")

    def uplink(self, client, x, e, t, part):
        """One vector through the wire: x [d], residual e [d] or None -> (decoded [d], new e).  Adds to `up`.  Source: ours."""
        g = generator(self.cfg.seed, "compressor", t, client, part, device=x.device)
        if e is None:
            buffer = self.compressor.encode(x, g)
        else:
            buffer, e = compress.with_feedback(self.compressor, x, e, g)
        self.up += len(buffer)
        return self.compressor.decode(buffer, len(x)).to(x.dtype), e

    def through_wire(self, tensors):
        """The way down to one client: tensors [...] -> (the list as decoded, the bytes it took).  Source: ours."""
        buffers = [self.wire.encode(x.flatten()) for x in tensors]
        return [self.wire.decode(b, x.numel()).view_as(x) for b, x in zip(buffers, tensors)], sum(map(len, buffers))

    def round(self, progress=False):
        """One round: w^t [d] -> w^{t+1} [d]; returns True if the server synthesised data in it.

        Raises Diverged if a number is not finite.  Source: this file's card.
        """
        t, method, clients = self.t, self.method, self.clients(self.t)
        try:
            synthesised = method.begin(t, self.w, progress)
        except FloatingPointError as error:
            raise Diverged(f"round {t + 1}, server: {error}") from None
        if synthesised:
            decoded, self.parcel = self.through_wire(method.parcel())
            method.unpack(decoded)
            self.holders = set()
        (w, *extra), size = self.through_wire(method.broadcast(self.w))
        method.receive(w, extra)
        self.down += size * len(clients) + self.parcel * len(set(clients) - self.holders)
        self.holders |= set(clients)

        sent, kept = self.train(w, clients, self.plans(clients, t), t)
        for i, vectors in zip(clients, sent):
            if not vectors.isfinite().all():
                raise Diverged(f"round {t + 1}, client {i}: the update is not finite. Likely cause: {self.likely_cause()}")
        size = torch.tensor([self.task.sizes[i] if self.cfg.average == "size" else 1 for i in clients], dtype=torch.float64)
        steps = float(sum(n * self.task.steps_of(i) for n, i in zip(size, clients)) / size.sum())
        mean = torch.zeros_like(sent[0])
        for c, i in enumerate(clients):                              # in a fixed order: the sum is the same every time
            for j in range(method.uplinks):
                e = kept[c, method.memory + j] if self.residuals else None
                sent[c, j], e = self.uplink(i, sent[c, j], e, t, j)              # from here on as the server decoded it
                mean[j] += float(size[c] / size.sum()) * sent[c, j]
                if self.residuals:
                    kept[c, method.memory + j] = e
            kept[c, :method.memory] = method.remember(kept[c, :method.memory], sent[c])
        if kept.shape[1]:
            self.memory.write(clients, kept)
        new = method.server(self.w, mean, steps, self.lr(t))
        if not new.isfinite().all():
            raise Diverged(f"round {t + 1}, server: the model is not finite. Likely cause: server_lr = {self.cfg.server_lr:g} or the "
                           f"compressor's error is too large")
        self.move, self.w, self.t = new - self.w, new, t + 1
        return bool(synthesised)


def evaluate(apply, w, images, chunk=1000):
    """Mean cross-entropy and accuracy of w [d] on all images -> (loss, accuracy in 0..1).  Source: definition."""
    loss = right = 0.0
    with torch.no_grad():
        for x, y, _ in images.chunks(chunk):
            scores = apply(w, x)
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
            right += int((scores.argmax(1) == y).sum())
    return loss / len(images.y), right / len(images.y)
