"""Work of which only so much goes on at a time: the rest waits in line, without a thread, and not for long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import UncannyError


class Busy(UncannyError):
    """The service has so much to do that this request was not begun; nothing of it was done."""


class Turns:
    """At most `at_once` at a time, of what `noun` says; up to `most_waiting` wait, up to `patience_seconds`."""

    def __init__(self, noun: str, at_once: int, most_waiting: int, patience_seconds: float) -> None:
        self.noun, self.at_once = noun, at_once
        self.most_waiting, self.patience_seconds = most_waiting, patience_seconds
        self._semaphore = asyncio.Semaphore(at_once)
        self._waiting = 0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Raises `Busy` if there is no turn in time."""
        if self._semaphore.locked() and self._waiting >= self.most_waiting:
            raise self._busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(self.patience_seconds):
                await self._semaphore.acquire()
        except TimeoutError:
            raise self._busy() from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._semaphore.release()

    def _busy(self) -> Busy:
        return Busy(f"{self.at_once} {self.noun} are going on and others wait: nothing was done; try again in a moment")
