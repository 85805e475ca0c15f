"""Clients that misbehave: the round goes on without them, and the log says who it was.

A server cannot trust what arrives: a message may be damaged, of a wrong size, not finite, or
missing. Such a client is left out, as if it had not been chosen:

    w^{t+1} = w^t + server_lr * (mean of the decoded updates of the others, by their weights)

and its memory stays what it was before the exchange that failed. So what the server and the clients
both sum up (SCAFFOLD's c and c_i) still agrees. If nobody is left, the model stays.

A message that is well formed, finite and false is not seen here; that takes a robust mean.
"""

from typing import Annotated, Literal

import torch

from fl import Federation


class Nobody(Exception):
    """No client of the round is left."""


class Tolerant(Federation):
    """Federation, but clients drop out, and messages that cannot be used are left out.

    Put it before another way of visiting: `class TolerantThreads(Tolerant, Threads)`. left_out is
    {client: why} of the last round. Those who drop out have received the model, and it counts as
    bytes; what is left out does not count. Every message is decoded twice.
    """

    def __init__(
        self,
        *args,
        on_bad_client: Annotated[Literal["stop", "drop"], "if a client sends garbage"] = "stop",
        dropout: Annotated[float, "probability that a client does not answer", 0, 1] = 0.0,
        **settings,
    ):
        super().__init__(*args, **settings)
        self.drop, self.dropout, self.left_out = on_bad_client == "drop", dropout, {}

    def round(self):
        self.left_out = {}
        try:
            super().round()
        except Nobody:
            self.t += 1

    def exchange(self, work, clients, received, lr):
        """The mean over the clients that are left.

        The others are taken out of the list `clients`, with which `round` goes on.
        """
        present = [i for i in clients if not self.absent(i)]
        self.left_out |= {i: "dropped out" for i in set(clients) - set(present)}
        expected, self.good = self.names(work, received), {}
        for i, reply in zip(present, super().visits(work, present, received, lr)):
            why = self.fault(reply[0], expected, received)
            if why and not self.drop:
                raise ValueError(f"round {self.t}, client {i}: {why}")
            if why:
                self.left_out[i] = why
            else:
                self.good[i] = reply
        clients[:] = self.good
        if not clients:
            raise Nobody
        return super().exchange(work, clients, received, lr)

    def visits(self, work, clients, received, lr):
        return self.good.values()

    def absent(self, i):
        """Does client i drop out of this round?"""
        return float(torch.rand((), generator=self.rng("dropout", self.t, i))) < self.dropout

    def names(self, work, received):
        """What a client has to send {name}: found by a step on a batch without images."""
        nothing = torch.full((1, 1, 4), -1, device=self.w.device)
        sent, _ = getattr(self.method, work)(received, self.recall(None, received), nothing, 1.0)
        return set(sent)

    def fault(self, buffers, expected, received):
        """Why a message {name: buffer}, or None, cannot be used; "" if it can."""
        if buffers is None:
            return "a number of its own is not finite"
        if not isinstance(buffers, dict) or buffers.keys() != expected:
            return f"it does not send {' and '.join(sorted(expected))}"
        codec = self.method.codec(self.compressor, received)
        try:
            for buffer in buffers.values():
                if not codec.decode(buffer, len(self.w)).to(self.w).isfinite().all():
                    return "it sends a number that is not finite"
        except ValueError as error:
            return str(error)
        return ""

    def encode(self, work, i, sent, mine, received, batches):
        """A client whose own numbers are not finite has nothing to send."""
        try:
            return super().encode(work, i, sent, mine, received, batches)
        except FloatingPointError:
            if not self.drop:
                raise
            return None, mine
