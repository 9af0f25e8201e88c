"""Turns: only so many requests of a kind are worked on at a time. The rest waits in line, without a thread."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from service.errors import UncannyError

T = TypeVar("T")


class Busy(UncannyError):
    """The service is busy: the request was not begun, and nothing of it was done."""


class TooManyRequests(UncannyError):
    """The caller sends requests faster, or has more of them open at once, than one caller may."""


class Turns:
    """At most `at_once` requests of a kind, which `noun` names; up to `most_waiting` wait, up to `patience_seconds`.

    One user has at most `per_user` of the turns, and the same part of the line; without `per_user`, all of them.
    """

    def __init__(
        self, noun: str, at_once: int, most_waiting: int, patience_seconds: float, per_user: int | None = None
    ) -> None:
        self.noun, self.at_once = noun, at_once
        self.most_waiting, self.patience_seconds = most_waiting, patience_seconds
        self.per_user = at_once if per_user is None else per_user
        self._all, self._of = asyncio.Semaphore(at_once), dict[str, asyncio.Semaphore]()
        self._here = Counter[str]()  # requests of each user that wait or have their turn
        self._waiting = Counter[str]()

    @asynccontextmanager
    async def one(self, user: str = "", *, patience_seconds: float | None = None) -> AsyncIterator[None]:
        """Raises `Busy` if there is no turn in time, `TooManyRequests` if this user's own requests are the reason."""
        own = self._of.setdefault(user, asyncio.Semaphore(self.per_user))
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
        """The same pieces. Each is made in a turn of its own, so that others have theirs between two pieces."""
        while True:
            async with self.one(user, patience_seconds=math.inf):
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    return
            yield piece

    async def _wait(self, user: str, own: asyncio.Semaphore, patience_seconds: float) -> None:
        """Take one of the user's turns, then one of all."""
        patient = math.isinf(patience_seconds)
        if not patient and own.locked() and self._waiting[user] >= self.most_waiting * self.per_user // self.at_once:
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
        if self.per_user == self.at_once:
            return self._busy()
        return TooManyRequests(
            f"{self.per_user} {self.noun} of yours are going on, as many as one user may have at once, and others of "
            "yours wait: nothing was done; try again when some have ended"
        )
