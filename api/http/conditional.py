"""`HEAD` wherever `GET`, and no answer twice that the client has: `ETag`, `If-None-Match`, 304 (RFC 9110)."""

import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Conditional:
    """ASGI middleware. A JSON answer to GET has a digest of its bytes as its `ETag`, unless it has one already.

    The body is left out where the tag is one that the client sent, with 304, and for HEAD, whose headers are those of
    GET. A stream whose body is left out is given up before its first byte is made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in {"GET", "HEAD"}:
            return await self.app(scope, receive, send)
        answer = _Answer(scope, send)
        try:
            await self.app({**scope, "method": "GET"}, receive, answer.send)
        except Exception:
            if not answer.without_body:
                raise
        return None


class _Complete(Exception):
    """All of the answer that is wanted has been sent."""


class _Answer:
    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._held = ", ".join(Headers(scope=scope).getlist("if-none-match"))
        self._start: Message | None = None  # while the tag depends on the body
        self.without_body = False
        self._is_head = scope["method"] == "HEAD"

    async def send(self, message: Message) -> None:
        """Pass a message on, or what is left of it. Raises `_Complete` to end who sends."""
        if message["type"] == "http.response.start":
            if _lacks_tag(message):
                self._start = message
            else:
                await self._begin(message)
        elif message["type"] == "http.response.body":
            if self._start is not None:
                tag = hashlib.sha256(message.get("body", b"")).hexdigest()[:32]
                MutableHeaders(scope=self._start)["ETag"] = f'"{tag}"'
                start, self._start = self._start, None
                await self._begin(start)
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        if start["status"] in (200, 206) and "etag" in headers and _names(self._held, headers["etag"]):
            start["status"], self.without_body = 304, True
            for name in ("Content-Length", "Content-Range", "Content-Type"):
                del headers[name]
        self.without_body |= self._is_head
        await self._send(start)
        if self.without_body:
            await self._send({"type": "http.response.body", "body": b""})
            raise _Complete


def _lacks_tag(start: Message) -> bool:
    """Whether this is JSON in one piece that says nothing of its version."""
    headers = Headers(raw=start["headers"])
    json = headers.get("content-type", "").startswith("application/json")
    return start["status"] == 200 and json and "content-length" in headers and "etag" not in headers


def _names(held: str, tag: str) -> bool:
    """Whether an `If-None-Match` has this tag; for reading, a weak one is as good."""
    return any(part.strip() == "*" or part.strip().removeprefix("W/") == tag for part in held.split(","))
