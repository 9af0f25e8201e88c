"""`HEAD` for every `GET`, and 304 for an answer that the client has: `ETag`, `If-None-Match` (RFC 9110)."""

import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Conditional:
    """ASGI middleware. A JSON answer to GET gets a digest of its bytes as its `ETag`, unless it has one already.

    If the client has sent this tag, the answer is 304 without a body. HEAD has the headers of GET without its body. A
    stream whose body is left out is ended before its first byte is made.
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
    """The answer has been sent as far as the client wants it."""


class _Answer:
    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._held = ", ".join(Headers(scope=scope).getlist("if-none-match"))
        self._start: Message | None = None  # held back until the body is there, of which the tag is a digest
        self.without_body = False
        self._is_head = scope["method"] == "HEAD"

    async def send(self, message: Message) -> None:
        """Pass a message on, or its head alone. Raises `_Complete` when the sender has to stop."""
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
    """Whether the answer is JSON in one piece without an `ETag`."""
    headers = Headers(raw=start["headers"])
    json = headers.get("content-type", "").startswith("application/json")
    return start["status"] == 200 and json and "content-length" in headers and "etag" not in headers


def _names(held: str, tag: str) -> bool:
    """Whether an `If-None-Match` has this tag. A weak tag counts too: the comparison is the weak one."""
    return any(part.strip() == "*" or part.strip().removeprefix("W/") == tag for part in held.split(","))
