"""Processes that end together, and by signals. Light enough for every command to import."""

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
    """An event that the handler of a signal may set. Wait for it with a timeout.

    A plain event may be locked by the very thread that the handler interrupts: it would wait for itself for ever.
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
            if os.getppid() != parent:  # the parent died before: no signal would come
                os._exit(1)

    return in_child


def adopt_orphans() -> None:
    """Children of a dead child become children of this process (Linux)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    """A port of loopback on which nothing listens at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
