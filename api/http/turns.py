"""Work of which only so much goes on at a time: the rest waits in line, without a thread, and not for long."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from service.errors import UncannyError

T = TypeVar("T")


class Busy(UncannyError):
    """The service has so much to do that this request was not begun; nothing of it was done."""


class TooManyRequests(UncannyError):
    """The caller asks faster, or for more at once, than one caller may."""


class Turns:
    """At most `at_once` at a time, of what `noun` says; up to `most_waiting` wait, up to `patience_seconds`.

    Of these, one user has at most `share` at a time, and the same part of the line. Without a `share` there is no such
    limit.
    """

    def __init__(
        self, noun: str, at_once: int, most_waiting: int, patience_seconds: float, share: int | None = None
    ) -> None:
        self.noun, self.at_once = noun, at_once
        self.most_waiting, self.patience_seconds = most_waiting, patience_seconds
        self.share = at_once if share is None else share
        self._all, self._of = asyncio.Semaphore(at_once), dict[str, asyncio.Semaphore]()
        self._here = Counter[str]()  # requests of each user that wait or have their turn
        self._waiting = Counter[str]()

    @asynccontextmanager
    async def one(self, user: str = "", *, patience_seconds: float | None = None) -> AsyncIterator[None]:
        """Raises `Busy` if there is no turn in time, `TooManyRequests` if this user's own requests are the reason."""
        own = self._of.setdefault(user, asyncio.Semaphore(self.share))
        self._here[user] += 1
        try:
            await self._wait(user, own, self.patience_seconds if patience_seconds is None else patience_seconds)
            try:
                yield
            finally:
                self._all.release()
                own.release()
        finally:
            self._here[user] -= 1
            if not self._here[user]:
                del self._here[user], self._of[user]

    async def each(self, pieces: AsyncIterator[T], user: str) -> AsyncIterator[T]:
        """The same pieces, each made when it is this user's turn: between two of them others have theirs."""
        while True:
            async with self.one(user, patience_seconds=math.inf):
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    return
            yield piece

    async def _wait(self, user: str, own: asyncio.Semaphore, patience_seconds: float) -> None:
        """Take a place of the user's share, then one of all."""
        patient = math.isinf(patience_seconds)
        if not patient and own.locked() and self._waiting[user] >= self.most_waiting * self.share // self.at_once:
            raise self._too_many()
        if not patient and self._all.locked() and self._waiting.total() >= self.most_waiting:
            raise self._busy()
        self._waiting[user] += 1
        refusal = self._too_many()
        try:
            async with asyncio.timeout(None if patient else patience_seconds):
                await own.acquire()
                refusal = self._busy()
                try:
                    await self._all.acquire()
                except BaseException:
                    own.release()
                    raise
        except TimeoutError:
            raise refusal from None
        finally:
            self._waiting[user] -= 1
            if not self._waiting[user]:
                del self._waiting[user]

    def _busy(self) -> UncannyError:
        return Busy(f"{self.at_once} {self.noun} are going on and others wait: nothing was done; try again in a moment")

    def _too_many(self) -> UncannyError:
        if self.share == self.at_once:
            return self._busy()
        return TooManyRequests(
            f"{self.share} {self.noun} of yours are going on, as many as one user may have at once, and others of "
            "yours wait: nothing was done; try again when some have ended"
        )
