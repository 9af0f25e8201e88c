"""Limits on bodies: their size, the memory of all that are being read, and the time that a slow sender has."""

import asyncio
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.open_requests import user_of
from api.http.turns import Busy, TooManyRequests
from service.errors import UncannyError

BODY_BYTES = 1 << 20  # the largest body, except of sweeps and artifacts
SMALL_BYTES = 64 << 10  # of each body that do not count towards HELD_BYTES
HELD_BYTES = 128 << 20  # of all bodies that are being read, beyond SMALL_BYTES of each
ONE_USERS_PART = 2  # one user's bodies may have a half of HELD_BYTES
BODY_SECONDS = 20.0  # that a sender may keep the server waiting,
SLOWEST_BYTES_PER_SECOND = 50_000  # and a second more for so many bytes
SWEEPS, ARTIFACTS = "/v1/sweeps", "/v1/artifacts/"


def is_of_sweeps(path: str) -> bool:
    """Whether the body for this path is a sweep or a part of one, which may be large."""
    return path == SWEEPS or path.startswith(f"{SWEEPS}/")


class BodyTooLarge(UncannyError):
    """The body is larger than the server accepts."""


class BodyTooSlow(UncannyError):
    """The body did not come in time."""


class BodyLimit:
    """ASGI middleware: bounds each body, and the memory of all that are being read.

    Bytes are counted as the application reads them. Reading raises `BodyTooLarge`, `BodyTooSlow`, `Busy` or, if the
    same user's bodies are the reason, `TooManyRequests`. Artifacts need no memory: they go to disk as they come.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, held_by: Counter[str] | None = None
    ) -> None:
        self.app, self.max_body_bytes, self.max_upload_bytes = app, max_body_bytes, max_upload_bytes
        self.held_bytes = 0
        self.held_by = Counter[str]() if held_by is None else held_by  # bytes of each user whose requests are counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(self, scope, receive)
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.release()
        return None

    def most(self, path: str) -> int:
        """The size up to which a body for this path is read."""
        if path.startswith(ARTIFACTS):
            return self.max_upload_bytes
        if is_of_sweeps(path):
            return self.max_body_bytes
        return min(BODY_BYTES, self.max_body_bytes)


class _Body:
    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive) -> None:
        self._limit, self._scope, self._receive = limit, scope, receive
        self._most = limit.most(scope["path"])
        self._streamed = scope["path"].startswith(ARTIFACTS)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        self._declared = int(declared) if declared.isdigit() else 0
        self._waited_seconds = 0.0
        self._seen, self._ended = 0, False
        self._user: str | None = None
        self.held_bytes = 0

    async def receive(self) -> Message:
        if self._ended:  # the next message is the end of the connection
            return await self._receive()
        if max(self._seen, self._declared) > self._most:
            raise BodyTooLarge(f"the body is larger than {self._most:,} bytes")
        message = await self._next()
        self._seen += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._seen > self._most:
            raise BodyTooLarge(f"the body is larger than {self._most:,} bytes")
        if not self._streamed:
            self._hold()
        return message

    async def _next(self) -> Message:
        clock = asyncio.get_running_loop().time
        began = clock()
        left = BODY_SECONDS + self._seen / SLOWEST_BYTES_PER_SECOND - self._waited_seconds
        try:
            async with asyncio.timeout(left):
                return await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"of the body only {self._seen:,} bytes came in time; nothing was done") from None
        finally:
            self._waited_seconds += clock() - began

    def _hold(self) -> None:
        more = max(0, self._seen - SMALL_BYTES) - self.held_bytes
        if not more:
            return
        self._user = user_of(self._scope)
        if self._user is not None and self._limit.held_by[self._user] + more > HELD_BYTES // ONE_USERS_PART:
            raise TooManyRequests(
                f"many large bodies of {self._user} are being read: nothing was done; try again when some have been"
            )
        if self._limit.held_bytes + more > HELD_BYTES:
            raise Busy("many large bodies are being read: nothing was done; try again in a moment")
        self.held_bytes += more
        self._limit.held_bytes += more
        if self._user is not None:
            self._limit.held_by[self._user] += more

    def release(self) -> None:
        """Give back the memory that this body was counted for."""
        self._limit.held_bytes -= self.held_bytes
        if self._user is not None:
            self._limit.held_by[self._user] -= self.held_bytes
            if not self._limit.held_by[self._user]:
                del self._limit.held_by[self._user]
