"""The route that every path with a body is: who asks is known before the body is read, and the body is strict JSON."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from api.auth import current_caller
from api.strict import StrictRequest


class StrictRoute(APIRoute):
    """A route whose body, if it has one, is JSON that says each field once, of someone who may send it.

    The framework reads and parses a body before it asks any dependency, that of who is asking among them.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            await current_caller(request)
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
