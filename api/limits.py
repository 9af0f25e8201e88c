"""A request whose body is larger than allowed is refused before it fills memory or disk."""

import asyncio
from contextlib import suppress

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, problem

HEAR_OUT_BYTES, HEAR_OUT_SECONDS = 64 << 20, 5.0  # of a body that is refused


class BodyLimit:
    """ASGI middleware: counts the bytes of a body as they arrive; uploads of artifacts have a limit of their own."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int) -> None:
        self.app, self.max_body_bytes, self.max_upload_bytes = app, max_body_bytes, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.max_upload_bytes if scope["path"].startswith("/v1/artifacts/") else self.max_body_bytes
        sentence = f"the body is larger than {limit:,} bytes"
        answer = problem(413, sentence, Request(scope), headers={"Connection": "close"})

        async def refusal(scope: Scope, receive: Receive, send: Send) -> None:
            """A client that is still sending would not see an answer before a closed connection: hear it out first."""
            with suppress(TimeoutError):
                async with asyncio.timeout(HEAR_OUT_SECONDS):
                    heard = 0
                    while heard < HEAR_OUT_BYTES and (message := await receive()).get("more_body"):
                        heard += len(message.get("body", b""))
            await answer(scope, receive, send)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            return await refusal(scope, receive, send)
        seen, answered = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise BodyTooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            if seen <= limit or answered:  # else the framework speaks of a body that cannot be parsed
                answered = True
                await send(message)

        with suppress(BodyTooLarge):
            await self.app(scope, counted, noted)
        if not answered:
            await refusal(scope, receive, send)
        return None
