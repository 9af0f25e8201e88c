"""Random numbers of the next batch, drawn by a thread while a GPU works on this one.

The thread guesses that the next batch makes the draws of this one for its own examples, so an attack declares none of
them. A draw is a pure function of its arguments, with the same numbers in any thread; a wrong guess only costs time.
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
    """Inside, `drawn` looks ahead. Call the function that this gives with the number of each batch, before its draws.

    The thread ends with the block, also if an exception ends it.
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
    """`draw(index, *rest)`, from the thread if that has drawn it already."""
    ahead = _current.get()
    return draw(index, *rest) if ahead is None else ahead.take(draw, index, rest)


class _Ahead:
    def __init__(self, thread: ThreadPoolExecutor, batches: Sequence[list[int]]) -> None:
        self.thread, self.batches, self.number = thread, batches, 0
        self.planned: dict[tuple[Any, ...], None] = {}  # (number of the batch, draw, rest), in the order of their use
        self.slots: dict[tuple[Any, ...], Future[Tensor]] = {}

    def begin(self, number: int) -> None:
        """Start batch `number`: draws for earlier batches that were not used are dropped."""
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
        return made.result()[[row[example] for example in index]]  # some examples may have left the batch

    def _fill(self) -> None:
        while self.planned and len(self.slots) < SLOTS:
            key = next(iter(self.planned))
            del self.planned[key]
            number, draw, rest = key
            self.slots[key] = self.thread.submit(draw, self.batches[number], *rest)


_current: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)
