"""Processes that end together, and when they are told to. Light enough for every command to import."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class SignalSafeEvent(threading.Event):
    """An event that a signal's handler may set; whoever waits for it says for how long at most.

    A plain one may be locked by the very thread that the handler interrupts, which then waits for itself for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cond = threading.Condition(threading.RLock())


def die_with_parent(which: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """For `preexec_fn`, made in the parent: the child gets this signal when its parent dies, however that dies (Linux).

    It comes when the *thread* that started the child ends, so start it from one that lives as long as it should.
    """
    parent = os.getpid()

    def in_child() -> None:
        if LIBC is not None:
            LIBC.prctl(PR_SET_PDEATHSIG, which, 0, 0, 0)
            if os.getppid() != parent:  # it died before: nobody would tell
                os._exit(1)

    return in_child


def adopt_orphans() -> None:
    """What dead children leave behind becomes this process's own child (Linux)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    """A port of loopback on which nothing listens at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
