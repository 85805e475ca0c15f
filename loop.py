"""The federated loop: one round, from the server through the wire to the clients and back.

    server  chooses m of N clients, sends w [d] (+ what the method adds)
    client  K local steps  w <- w - eta G(w, batch)           G is the method (fl.py)
            sends a BUFFER: encode(w_K - w_0)                 cost = len(buffer), nothing else is counted
    server  decodes the buffers, averages them, moves w

`local_training` is one client's round as a pure function of tensors. All clients of a round go through it in chunks under
`torch.func.vmap` (a GPU is then busy with one large kernel instead of waiting for many small ones), or one by one on a few
threads of one core each (faster on a CPU), and may be dealt out to several processes (ranks.py), with the same numbers. All
randomness comes from `fl.generator(seed, what, round, client)`, so a run that is cut off and resumed, or spread over more
workers, draws the same numbers.

Sources: McMahan et al. 2017, Algorithm 1; error feedback, Karimireddy et al. 2019. Read next: ranks.py.
"""
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

import compress
import data
import ranks
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

    With a `file` the tensor is that file, mapped into memory: the system keeps in RAM what it has room for.  Source: ours.
    """

    def __init__(self, rows, like, file=None):
        self.table, self.slot, self.file, self.device = like.new_zeros(0, rows, len(like)), {}, file, like.device

    def read(self, clients, default):
        """-> [m, p, d]; a client never seen has `default` [p, d].  Source: ours."""
        return torch.stack([self.table[self.slot[i]].to(self.device) if i in self.slot else default for i in clients])

    def write(self, clients, rows):
        """Keep rows [m, p, d].  Source: ours."""
        for i in clients:
            self.slot.setdefault(i, len(self.slot))
        if len(self.slot) > len(self.table):
            self.grow(len(self.slot) if self.file else max(len(self.slot), 2 * len(self.table)))
        self.table[[self.slot[i] for i in clients]] = rows.to(self.table.device)        # a file is the CPU's, also beside a GPU

    def restore(self, table, slot):
        """Take over saved rows: table [n, p, d].  Source: ours."""
        self.slot = slot
        if self.file is None:
            self.table = table
        else:
            self.grow(len(table))
            self.table.copy_(table)

    def grow(self, n):
        """Make room for n clients: table [n, p, d]. A file grows in place, without a copy.  Source: ours."""
        shape = (n, *self.table.shape[1:])
        if self.file is None:
            self.table = torch.cat([self.table, self.table.new_zeros(n - len(self.table), *shape[1:])])
        else:
            self.table = torch.from_file(str(self.file), True, math.prod(shape), dtype=self.table.dtype).view(shape)


class Federation:
    """The state of a run between two rounds: w [d], round t, the method's and the clients' memory, bytes up and down.

    Among several ranks, rank 0 holds all of it; the others hold w, the counters and what clients were sent.
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

    def recall(self, clients, w):
        """What the clients remember, before they train from w [d] -> rows [m, p + residuals, d].  Source: ours."""
        return self.memory.read(clients, torch.cat([self.method.first_memory(w), w.new_zeros(self.residuals, len(w))]))

    # --------------------------------------------------------------------------------------------------- a round
    def round(self, progress=False):
        """One round: w^t [d] -> w^{t+1} [d]; returns True if the server synthesised data in it.

        Raises Diverged if a number is not finite.  Source: this file's card.
        """
        t, clients = self.t, self.clients(self.t)
        synthesised = self.begin(t, progress)
        mean, steps = self.clients_part(self.send_down(clients), clients, t)
        self.advance(mean, steps)
        return synthesised

    def begin(self, t, progress):
        """The server before round t; if it has a new parcel [...], all ranks unpack it. -> is there one?  Source: ours."""
        def work():
            try:
                return [x.cpu() for x in self.method.parcel()] if self.method.begin(t, self.w, progress) else None
            except FloatingPointError as error:
                raise Diverged(f"round {t + 1}, server: {error}") from None
        parcel = ranks.tell(ranks.served(work))
        if parcel is not None:
            self.unpack(parcel)
            self.holders = set()
        return parcel is not None

    def unpack(self, parcel):
        """The clients get the method's parcel, tensors [...], through the wire.  Source: ours."""
        decoded, self.parcel = self.through_wire([x.to(self.w.device) for x in parcel])
        self.method.unpack(decoded)

    def send_down(self, clients):
        """The server sends w and what the method adds, and bytes are counted for every client -> w [d] as received.  Source: ours."""
        (w, *extra), size = self.through_wire([ranks.from_server(x) for x in self.method.broadcast(self.w)])
        self.method.receive(w, extra)
        self.down += size * len(clients) + self.parcel * len(set(clients) - self.holders)
        self.holders |= set(clients)
        return w

    def clients_part(self, w, clients, t):
        """All m clients of round t train from w [d] and send; the server averages -> (mean decoded [uplinks, d], mean number of steps).

        Every rank does its share of the clients, one after the other or in chunks, and holds one decoded update at a time.
        Source: McMahan et al. 2017, Algorithm 1.
        """
        memory = self.recall(clients, w)
        memory = ranks.from_server(memory) if memory.numel() else memory
        mine = ranks.share([self.task.steps_of(i) for i in clients])
        size = torch.tensor([self.task.sizes[i] if self.cfg.average == "size" else 1 for i in clients], dtype=torch.float64)
        # summed in float64: rounded to float32 afterwards, the mean is the same for any order of clients and number of ranks
        mean, kept = w.new_zeros(self.method.uplinks, len(w), dtype=torch.float64), torch.zeros_like(memory)

        def work():
            up, own = 0, [clients[c] for c in mine]
            plans = self.plans(own, t)
            send = lambda n, *trained: self.uplink(own[n], t, memory[mine[n]], self.method.codec(self.compressor, w, plans[n]), *trained)   # noqa: E731
            replies = self.each_client(w, memory[mine], plans, t, send)
            for c, (x_hat, rows, bytes_up) in zip(mine, replies):
                mean.add_(x_hat, alpha=float(size[c] / size.sum()))
                kept[c] = rows
                up += bytes_up
            return up
        self.up += sum(ranks.gathered(work))
        if kept.numel():
            kept = ranks.total(kept)
            if ranks.rank() == 0:
                self.memory.write(clients, kept)
        steps = float(sum(n * self.task.steps_of(i) for n, i in zip(size, clients)) / size.sum())
        return ranks.total(mean).to(w.dtype), steps

    def each_client(self, w, memory, plans, t, then):
        """Local training of clients with memory [m, p, d] and plans (m tensors [K_i, B, ...]) from w [d], and what comes `then`.

        One client after the other on `workers` threads (chunk = 1), or `chunk` clients at a time under vmap; yields
        then(place, sent [uplinks, d], kept [p, d]) in order. If a GPU's memory is too small for a chunk, the chunk is halved.
        Source: ours.
        """
        own, lr, done = memory[:, :self.method.memory], self.lr(t), 0
        if self.chunk == 1:
            yield from self.pool.map(lambda c: then(c, *local_training(self.method, w, own[c], plans[c], lr)), range(len(plans)))
            return
        while done < len(plans):
            try:
                sent, kept = self.at_once(w, own[done:done + self.chunk], plans[done:done + self.chunk], lr)
            except torch.OutOfMemoryError:
                if self.chunk == 1:
                    raise
                self.chunk //= 2
                torch.cuda.empty_cache()
                continue
            yield from self.pool.map(then, range(done, done + len(sent)), sent, kept)
            done += len(sent)

    def at_once(self, w, memory, plans, lr):
        """`local_training` of some clients under vmap, from w [d]: -> (sent [m, uplinks, d], kept [m, p, d]).  Source: torch.func."""
        K = max(map(len, plans))
        padded = torch.stack([F.pad(p, (0, 0) * (p.dim() - 1) + (0, K - len(p)), value=-1) for p in plans])
        self.method.vmapped = True
        try:
            return torch.func.vmap(lambda m, p: local_training(self.method, w, m, p, lr))(memory, padded)
        finally:
            self.method.vmapped = False

    def uplink(self, client, t, memory, codec, sent, kept):
        """A client's vectors through the wire, in round t: its rows before [p + residuals, d], sent [uplinks, d], kept [p, d].

        codec: encodes and decodes.  -> (decoded [uplinks, d], its rows after, bytes). Raises Diverged if a number is not
        finite.  Source: ours.
        """
        if not sent.isfinite().all():
            raise Diverged(f"round {t + 1}, client {client}: the update is not finite. Likely cause: {self.likely_cause()}")
        decoded, residuals, size = [], list(memory[self.method.memory:]), 0
        for j, x in enumerate(sent):
            g = generator(self.cfg.seed, "compressor", t, client, j, device=x.device)
            try:
                if residuals:
                    buffer, residuals[j] = compress.with_feedback(codec, x, residuals[j], g)
                else:
                    buffer = codec.encode(x, g)
            except FloatingPointError as error:
                raise Diverged(f"round {t + 1}, client {client}: {error}") from None
            decoded.append(codec.decode(buffer, len(x)).to(x.dtype))
            size += len(buffer)
        decoded = torch.stack(decoded)
        return decoded, torch.cat([self.method.remember(kept, decoded), *(e[None] for e in residuals)]), size

    def advance(self, mean, steps):
        """The server moves: w^{t+1} [d] from mean [uplinks, d] of `steps` steps, the same on every rank.  Source: McMahan et al. 2017."""
        new = ranks.served(lambda: self.method.server(self.w, mean, steps, self.lr(self.t)))
        new = ranks.from_server(self.w if new is None else new)
        if not new.isfinite().all():
            raise Diverged(f"round {self.t + 1}, server: the model is not finite. Likely cause: server_lr = {self.cfg.server_lr:g} or the "
                           f"compressor's error is too large")
        self.move, self.w, self.t = new - self.w, new, self.t + 1

    def share_state(self):
        """After the server read a checkpoint: the other ranks learn where it stands (w [d], counters, parcel).  Source: ours."""
        self.w = ranks.from_server(self.w)
        *state, parcel = ranks.tell((self.t, self.up, self.down, self.holders, [x.cpu() for x in self.method.parcel()] if self.parcel else None))
        self.t, self.up, self.down, self.holders = state
        if ranks.rank() > 0 and parcel is not None:
            self.unpack(parcel)

    def through_wire(self, tensors):
        """The way down to one client: tensors [...] -> (the list as decoded, the bytes it took).  Source: ours."""
        buffers = [self.wire.encode(x.flatten()) for x in tensors]
        return [self.wire.decode(b, x.numel()).view_as(x) for b, x in zip(buffers, tensors)], sum(map(len, buffers))

    def likely_cause(self):
        """Why a client's update may have become infinite, judged by the model [d] it received -> text.  Source: ours."""
        largest = float(self.w.abs().max())
        if largest > 1e4:
            return f"the server sent a model with entries up to {largest:.0e}, so server_lr = {self.cfg.server_lr:g} is too large"
        return f"lr = {self.lr(self.t):g} is too large for this model and batch" + ("" if self.cfg.clip else ", and clip = 0 lets gradients grow")


def evaluate(apply, w, images, chunk=500, each=map):
    """Mean cross-entropy and accuracy of w [d] on all images -> (loss, accuracy in 0..1).

    Chunks of images are dealt out to the ranks; each: `map`, or that of a thread pool.  Source: definition.
    """
    def part(rows):
        with torch.no_grad():
            x, y, _ = next(images.chunks(chunk, rows))
            scores = apply(w, x)
            return torch.stack([F.cross_entropy(scores, y, reduction="sum").double(), (scores.argmax(1) == y).sum()])
    places = torch.arange(len(images.y), device=images.y.device).split(chunk)[ranks.rank()::ranks.size()]
    loss, right = ranks.total(sum(each(part, places), torch.zeros(2, dtype=torch.float64, device=w.device))).tolist()
    return loss / len(images.y), right / len(images.y)
