"""What only the executor in threads has to mind; what all executors promise is in tests/contract/test_executors.py."""

import threading
from collections.abc import Iterator

import pytest
from waiting import until

from service.model.executor import Bundle, Grant, Message, Progress
from service.queue.inprocess import InProcessExecutor


def test_one_that_always_has_something_to_say_stops_also_where_the_interrupt_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a callback of the garbage collector, in which Python ignores it. Nobody listens, so it would go on."""
    monkeypatch.setattr("service.queue.inprocess.interrupt", lambda thread: None)

    def talks(bundle: Bundle) -> Iterator[Message]:
        while True:
            yield Progress("task", 1, 0.0, {})

    executor = InProcessExecutor(talks, grace_seconds=0.0)
    executor.submit(Bundle("talks", (Grant("task", 1, "d" * 64, {"kind": "train"}),), {}))
    assert executor.poll(0.1)
    executor.close()
    until(lambda: "bundle talks" not in {thread.name for thread in threading.enumerate()})
