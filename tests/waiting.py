"""How a test waits: for a condition, never for a time."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def until(what: Callable[[], T | None], seconds: float = 90.0, ignoring: tuple[type[Exception], ...] = ()) -> T:
    """What `what` gives once it is true. The seconds are a safety net, for a machine that is slow or busy."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(*ignoring):
            if found := what():
                return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
