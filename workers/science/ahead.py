"""Random numbers of the next batch, drawn by a thread while a GPU works on this one.

The next batch draws what this one draws, for other examples: so nobody has to say what an attack will need. A draw is a
pure function of its arguments, and whoever draws it gets the same numbers; a wrong guess costs time alone.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

SLOTS = 2
"""Draws that are ready or being made: the first for the next batch, and one more for its next restart."""

Draw = Callable[..., Tensor]
"""`draw(index, *rest)`: `[n, ...]`, row i of `index[i]` and `rest` alone."""


@contextmanager
def ahead_of(batches: Sequence[list[int]], *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Inside, `drawn` looks ahead. Call what this gives with the number of each batch of indices before its draws.

    No thread is left behind, whatever ends the block.
    """
    if not enabled or len(batches) < 2:
        yield lambda _number: None
        return
    with ThreadPoolExecutor(1, "random numbers") as thread:
        ahead = _Ahead(thread, batches)
        before = _current.set(ahead)
        try:
            yield ahead.begin
        finally:
            _current.reset(before)
            thread.shutdown(cancel_futures=True)


def drawn(draw: Draw, index: list[int], *rest: Any) -> Tensor:
    """`draw(index, *rest)`, from the thread where it has been drawn already."""
    ahead = _current.get()
    return draw(index, *rest) if ahead is None else ahead.take(draw, index, rest)


class _Ahead:
    def __init__(self, thread: ThreadPoolExecutor, batches: Sequence[list[int]]) -> None:
        self.thread, self.batches, self.number = thread, batches, 0
        self.planned: dict[tuple[Any, ...], None] = {}  # (number of the batch, draw, rest), in the order of their use
        self.slots: dict[tuple[Any, ...], Future[Tensor]] = {}

    def begin(self, number: int) -> None:
        """What the batches before have not used, nobody will."""
        self.number = number
        self.planned = {key: None for key in self.planned if key[0] >= number}
        for key in [key for key in self.slots if key[0] < number]:
            self.slots.pop(key).cancel()
        self._fill()

    def take(self, draw: Draw, index: list[int], rest: tuple[Any, ...]) -> Tensor:
        key = (self.number, draw, rest)
        made = self.slots.pop(key, None)
        self.planned.pop(key, None)
        if self.number + 1 < len(self.batches):
            self.planned[(self.number + 1, draw, rest)] = None
        self._fill()
        row = {example: row for row, example in enumerate(self.batches[self.number])}
        if made is None or made.cancel() or not row.keys() >= set(index):
            return draw(index, *rest)
        return made.result()[[row[example] for example in index]]  # some may have left the batch

    def _fill(self) -> None:
        while self.planned and len(self.slots) < SLOTS:
            key = next(iter(self.planned))
            del self.planned[key]
            number, draw, rest = key
            self.slots[key] = self.thread.submit(draw, self.batches[number], *rest)


_current: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)
