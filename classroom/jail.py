"""A process gives up rights before it runs code of strangers (Linux with Landlock; else nothing).

From then on the process and its children can write only into one folder, read only that folder and
what Python itself needs, open no TCP connection, and send no signal to a process outside. No
administrator is needed, and the rights cannot be taken back.

Landlock is three system calls: make a list of what is forbidden, add exceptions to it (rules), and
put it into force. The numbers below are those of the kernel's header linux/landlock.h.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

CREATE, ADD, RESTRICT = 444, 445, 446  # the system calls, the same on every architecture but alpha
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 13))  # write a file, remove and make things
SINCE = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # version: move between folders, truncate, devices
NO_NEW_PRIVS = 38  # of prctl


class Unavailable(OSError):
    """This system has no Landlock."""


def call(number, *arguments):
    """A system call; OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        error = ctypes.get_errno()
        raise Unavailable(error, os.strerror(error))
    return result


def version():
    """The version of Landlock of this system, 0 if there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return call(CREATE, None, 0, 1)
    except OSError:
        return 0


def lock(folder):
    """From now on: write only into `folder`, read only there and what Python needs.

    Raises Unavailable if the system cannot do it.
    """
    known = version()
    if not known:
        raise Unavailable("Landlock is not available")
    rights = READ | WRITE | sum(bit for since, bit in SINCE.items() if known >= since)
    network = 3 if known >= 4 else 0  # bind and connect
    signals = 3 if known >= 6 else 0  # abstract sockets and signals
    forbidden = struct.pack("QQQ", rights, network, signals)
    size = 8 if known < 4 else 16 if known < 6 else 24
    ruleset = call(CREATE, forbidden[:size], size, 0)
    allow(ruleset, folder, rights)
    allow(ruleset, "/dev", (READ | 1 << 1) & rights)
    for path in readable():
        allow(ruleset, path, READ)
    ctypes.CDLL(None).prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    call(RESTRICT, ruleset, 0)
    os.close(ruleset)


def readable():
    """What Python needs to read: itself, its packages, the libraries of the system."""
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys"]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *map(str, sys.path)]
    packages = [path for path in python if "site-packages" in path or path.startswith(sys.prefix)]
    return [path for path in [*system, *python[:3], *packages] if Path(path).exists()]


def allow(ruleset, path, rights):
    """An exception: below this path these rights stay."""
    handle = os.open(path, os.O_PATH)
    if not Path(path).is_dir():
        rights &= READ & ~(1 << 3) | 1 << 1
    call(ADD, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
    os.close(handle)
