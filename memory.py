"""What clients remember between their rounds: one table of rows, in RAM or in a file.

A client of SCAFFOLD keeps its control variate, one of FedLESAM the model it last saw, any client under error feedback what the
compressor left out: rows [p, d] each. In life every client stores its own; here one process plays them all, so their rows lie
in one tensor [clients seen, p, d]. Three things matter at scale:

    slots      a client gets its place when it is first active: a million clients cost nothing before they are drawn
    doubling   the table doubles when it is full, so n clients are copied less than 2 n times in all
    a file     mapped into memory (`--memory-file`): the system keeps in RAM what it has room for, and writes the rest

A round reads the rows of its active clients at its start and writes them at its end (loop.py); nothing else touches them.

Source: ours. Read next: loop.py.
"""
import math

import torch


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
