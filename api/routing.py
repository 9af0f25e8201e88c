"""The routes of paths with a body: who asks is known before the body is read, and no thread waits for a body."""

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from api.auth import READING, current_caller
from api.strict import StrictRequest
from api.turns import Turns

WRITERS, REGISTRATIONS, UPLOADS = "writers", "registrations", "uploads"


def new_turns() -> dict[str, Turns]:
    """Together less than the threads of a server: questions are answered while all that changes something waits."""
    return {
        WRITERS: Turns("requests that write", at_once=8, most_waiting=200, patience_seconds=10.0),
        REGISTRATIONS: Turns("registrations", at_once=2, most_waiting=20, patience_seconds=10.0),
        UPLOADS: Turns("uploads", at_once=64, most_waiting=100, patience_seconds=10.0),
    }


class StrictRoute(APIRoute):
    """A route whose body, if it has one, is JSON that says each field once, of someone who may send it.

    The framework reads and parses a body before it asks any dependency, that of who is asking among them. What changes
    something takes its turn when its body is there.
    """

    turns: ClassVar[str] = WRITERS

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            await current_caller(request)
            request = StrictRequest(request.scope, request.receive)
            if request.method in READING:
                return await handle(request)
            if self.body_field is not None:
                await request.body()
            async with request.app.state.turns[self.turns].one():
                return await handle(request)

        return strict


class RegistrationRoute(StrictRoute):
    """What is registered is looked at first, which may take minutes."""

    turns = REGISTRATIONS


class UploadRoute(StrictRoute):
    """The body is a stream, read by the endpoint."""

    turns = UPLOADS
