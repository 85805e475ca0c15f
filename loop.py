"""The federated loop: one round, from the server through the wire to the clients and back.

    server  chooses m of N clients, sends w [d] (+ what the method adds; some first ask for something: `survey`, align.py)
    client  K local steps  w <- w - eta G(w, batch)           G is the method (fl.py)
            sends a BUFFER: encode(w_K - w_0)                 cost = len(buffer), nothing else is counted
    server  decodes the buffers, averages them, moves w

`local_training` is one client's round as a pure function of tensors. All clients of a round go through it in chunks under
`torch.func.vmap` (a GPU is then busy with one large kernel instead of waiting for many small ones), or one by one on a few
threads of one core each (faster on a CPU), and may be dealt out to several processes (ranks.py), with the same numbers. All
randomness comes from `fl.generator(seed, what, round, client)`, so a run that is cut off and resumed, or spread over more
workers, draws the same numbers.

Sources: McMahan et al. 2017, Algorithm 1; error feedback, Karimireddy et al. 2019. Read next: config.py.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

import compress
import ranks
from fl import Client, generator
from memory import Memory


class Diverged(ArithmeticError):
    """A client's or the server's numbers stopped being finite; the message says where and why.  Source: ours."""


def local_step(method, w, rows, me, lr):
    """One step of one client from w [d] on the batch `rows` -> (w [d], me).  Source: fl.py, FedAvg.step."""
    return method.step(w, rows, me, lr, method.direction(w, rows, me))


def local_training(method, w, memory, plan, lr, said=None, step=local_step):
    """One client's round, the pure function that is vmapped: K steps from w [d] with its memory [p, d] and plan [K, B, ...].

    said [s, d]: its answer to the method's survey.  A step whose batch is all padding changes nothing: clients with fewer steps
    wait for the others of their chunk.
    -> (vectors to send [uplinks, d], memory to keep [p, d]).  Source: McMahan et al. 2017, Algorithm 1, ClientUpdate.
    """
    me, alive = Client(w, memory, said), (plan[..., 0] >= 0).any(1).to(w.dtype)
    w = method.start(w, me)
    for k in range(len(plan)):
        w, me = step(method, w, plan[k], me, lr * alive[k])
    return method.finish(w, me, alive.sum(), lr)


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
        self.report = {}                                             # what the method says of the last round, for the log
        self.step = torch.compile(local_step, dynamic=False) if cfg.compile else local_step
        if cfg.compile:                                              # else it stays the class's: no state of the method
            self.method.functional = True
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
        w, mine = self.send_down(clients), ranks.share([self.task.steps_of(i) for i in clients])
        mean, steps = self.clients_part(w, self.survey(w, clients, mine, t), clients, mine, t)
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

    def weights(self, clients):
        """What each of the clients counts in a mean -> [m], sum 1.  Source: McMahan et al. 2017 (size)."""
        size = torch.tensor([self.task.sizes[i] if self.cfg.average == "size" else 1 for i in clients], dtype=torch.float64)
        return size / size.sum()

    def survey(self, w, clients, mine, t):
        """The method's exchange before training, if it has one: answers at w [d] go up, their mean comes down, bytes are counted.

        mine: places of this rank's clients -> what all said, as the server decoded it [m, surveys, d].
        Source: the extra exchange of Dandi et al. 2022's released code.
        """
        said = w.new_zeros(len(clients), self.method.surveys, len(w))
        if self.method.surveys == 0:
            return said

        def work():
            answers = list(self.answers(w, [clients[c] for c in mine], t))
            for c, (x_hat, _) in zip(mine, answers):
                said[c] = x_hat
            return sum(size for _, size in answers)
        self.up += sum(ranks.gathered(work))
        said = ranks.total(said)
        self.down += self.announce(said, clients) * len(clients)
        return said

    def answers(self, w, clients, t):
        """What clients say to the survey at w [d], through the wire; yields (decoded [surveys, d], bytes) for each.  Source: ours.

        Without error feedback: that makes a SUM of messages right in the end, but an answer is used once, and alone.
        """
        rows = [self.task.everything(i) for i in clients]
        yield from self.each(lambda _, images: (self.method.survey(w, images),), w.new_zeros(len(clients), 0, len(w)), rows,
                             lambda n, said: self.encoded("survey", clients[n], t, self.compressor, said)[::2])

    def announce(self, said, clients):
        """All active clients hear the mean of what was said [m, surveys, d] -> bytes to each.  Source: ours."""
        mean = sum(p * x.double() for p, x in zip(self.weights(clients).tolist(), said))
        heard, size = self.through_wire(mean.to(said.dtype))
        self.method.hear(torch.stack(heard))
        return size

    def clients_part(self, w, said, clients, mine, t):
        """All m clients of round t train from w [d] and send; the server averages -> (mean decoded [uplinks, d], mean number of steps).

        said [m, surveys, d]: their answers to the survey.  Every rank does its share of the clients (places `mine`), one after the
        other or in chunks, and holds one decoded update at a time.  Source: McMahan et al. 2017, Algorithm 1.
        """
        memory = self.recall(clients, w)
        memory = ranks.from_server(memory) if memory.numel() else memory
        weights = self.weights(clients)
        # summed in float64: rounded to float32 afterwards, the mean is the same for any order of clients and number of ranks
        mean, kept = w.new_zeros(self.method.uplinks, len(w), dtype=torch.float64), torch.zeros_like(memory)

        def work():
            up, own = 0, [clients[c] for c in mine]
            plans = self.plans(own, t)
            send = lambda n, *trained: self.uplink(own[n], t, memory[mine[n]], self.method.codec(self.compressor, w, plans[n]), *trained)   # noqa: E731
            replies = self.each_client(w, memory[mine], plans, t, send, said[mine])
            for c, (x_hat, rows, bytes_up) in zip(mine, replies):
                mean.add_(x_hat, alpha=float(weights[c]))
                kept[c] = rows
                up += bytes_up
            return up
        self.up += sum(ranks.gathered(work))
        if kept.numel():
            kept = ranks.total(kept)
            if ranks.rank() == 0:
                self.memory.write(clients, kept)
        steps = float(sum(p * self.task.steps_of(i) for p, i in zip(weights, clients)))
        self.report = dict(zip(self.method.reports, self.method.report(said, kept[:, :self.method.memory], weights.to(w))))
        return ranks.total(mean).to(w.dtype), steps

    def each_client(self, w, memory, plans, t, then, said=None):
        """Local training of clients with memory [m, p, d], plans (m tensors [K_i, B, ...]) and answers said [m, surveys, d] from w [d].

        Yields then(place, sent [uplinks, d], kept [p, d]) in order.  Source: ours.
        """
        p, lr = self.method.memory, self.lr(t)
        rows = torch.cat([memory[:, :p], said], 1) if self.method.surveys else memory[:, :p]
        return self.each(lambda own, plan: local_training(self.method, w, own[:p], plan, lr, own[p:], self.step), rows, plans, then)

    def each(self, job, rows, plans, then):
        """job(rows [p, d], plan [K_i, B, ...]) -> tensors, for every client of rows [m, p, d] and plans; yields then(place, *tensors) in order.

        One client after the other on `workers` threads (chunk = 1), or `chunk` clients at a time under vmap. If a GPU's memory is
        too small for a chunk, the chunk is halved.  Source: ours.
        """
        done = 0
        if self.chunk == 1:
            yield from self.pool.map(lambda c: then(c, *job(rows[c], plans[c])), range(len(plans)))
            return
        while done < len(plans):
            try:
                results = self.at_once(job, rows[done:done + self.chunk], plans[done:done + self.chunk])
            except torch.OutOfMemoryError:
                if self.chunk == 1:
                    raise
                self.chunk //= 2
                torch.cuda.empty_cache()
                continue
            yield from self.pool.map(then, range(done, done + len(results[0])), *results)
            done += len(results[0])

    def at_once(self, job, rows, plans):
        """`job` of some clients under vmap, with rows [m, p, d] and plans padded to the longest: -> tensors [m, ...].  Source: torch.func."""
        K = max(map(len, plans))
        padded = torch.stack([F.pad(p, (0, 0) * (p.dim() - 1) + (0, K - len(p)), value=-1) for p in plans])
        self.method.functional = True
        try:
            return torch.func.vmap(job)(rows, padded)
        finally:
            self.method.functional = False

    def uplink(self, client, t, memory, codec, sent, kept):
        """A client's vectors through the wire, in round t: its rows before [p + residuals, d], sent [uplinks, d], kept [p, d].

        codec: encodes and decodes.  -> (decoded [uplinks, d], its rows after, bytes). Raises Diverged.  Source: ours.
        """
        decoded, residuals, size = self.encoded("compressor", client, t, codec, sent, memory[self.method.memory:])
        return decoded, torch.cat([self.method.remember(kept, decoded), *(e[None] for e in residuals)]), size

    def encoded(self, stream, client, t, codec, sent, residuals=()):
        """Vectors [n, d] of a client through its codec; residuals [n, d]: what error feedback adds, or nothing.

        stream: name of the random numbers.  -> (decoded [n, d], residuals after, bytes). Raises Diverged.  Source: ours.
        """
        if not sent.isfinite().all():
            raise Diverged(f"round {t + 1}, client {client}: what it sends is not finite. Likely cause: {self.likely_cause()}")
        decoded, residuals, size = [], list(residuals), 0
        for j, x in enumerate(sent):
            g = generator(self.cfg.seed, stream, t, client, j, device=x.device)
            try:
                if residuals:
                    buffer, residuals[j] = compress.with_feedback(codec, x, residuals[j], g)
                else:
                    buffer = codec.encode(x, g)
            except FloatingPointError as error:
                raise Diverged(f"round {t + 1}, client {client}: {error}") from None
            decoded.append(codec.decode(buffer, len(x)).to(x.dtype))
            size += len(buffer)
        return torch.stack(decoded), residuals, size

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
