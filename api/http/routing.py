"""The routes of the API: they check the caller before they read the body, and work in turns."""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from enum import Enum
from typing import ClassVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from api.http.auth import READING
from api.http.permissions import Permission, declared
from api.http.strict import StrictRequest
from api.http.turns import Turns

WRITERS, REGISTRATIONS, UPLOADS = "writers", "registrations", "uploads"
QUESTIONS, DOWNLOADS = "questions", "downloads"
Answer = Mapping[str, object]
"""The answer of an endpoint: the route's `response_model` has its fields, and checks them."""
Handler = Callable[[Request], Coroutine[None, None, Response]]
OF_MANY = {
    "/v1/correlations",
    "/v1/jobs",
    "/v1/leaderboard",
    "/v1/networks",
    "/v1/results",
    "/v1/results:aggregate",
    "/v1/results:compare",
    "/v1/results:trajectories",
    "/v1/sweeps",
    "/v1/worst-cases",
}
"""Questions that take longer the more the store has; they take turns. Others are answered at once."""


def new_turns() -> dict[str, Turns]:
    """The turns of each kind of request.

    Those that hold a thread are together fewer than the threads of the server, and than the connections of its pool.
    So small requests are answered while large ones wait.
    """
    return {
        WRITERS: Turns("requests that write", at_once=8, most_waiting=200, patience_seconds=10.0, per_user=6),
        REGISTRATIONS: Turns("registrations", at_once=2, most_waiting=20, patience_seconds=10.0),
        UPLOADS: Turns("uploads", at_once=128, most_waiting=100, patience_seconds=10.0, per_user=64),
        QUESTIONS: Turns("questions about many rows", at_once=6, most_waiting=200, patience_seconds=10.0, per_user=4),
        DOWNLOADS: Turns("downloads", at_once=6, most_waiting=200, patience_seconds=10.0, per_user=4),
    }


class StrictRoute(APIRoute):
    """A route that checks its permission before it reads the body, and that reads the body as strict JSON.

    The framework by itself would read and parse the body before it calls any dependency. A request that changes
    something takes its turn when its body is there. A question about many rows takes a turn, and one more for each
    piece of an answer that streams.
    """

    turns: ClassVar[str] = WRITERS

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        permission = declared(self)
        _check_closed(self)

        async def strict(request: Request) -> Response:
            user = (await permission.admit(request)).name if isinstance(permission, Permission) else ""
            request = StrictRequest(request.scope, request.receive)
            if request.method in READING:
                reading = self._reading()
                return await (_in_turn(request, handle, reading, user) if reading else handle(request))
            if self.body_field is not None:
                await request.body()
            async with request.app.state.turns[self.turns].one(user):
                return await handle(request)

        return strict

    def _reading(self) -> str | None:
        """The kind of turn that a reading request takes; None if it takes none."""
        return QUESTIONS if self.path_format in OF_MANY else None


class RegistrationRoute(StrictRoute):
    """Files are checked before they are registered, which may take minutes."""

    turns = REGISTRATIONS


class UploadRoute(StrictRoute):
    """The body is a stream, read by the endpoint."""

    turns = UPLOADS

    def _reading(self) -> str | None:
        return DOWNLOADS


class Router(APIRouter):
    """A router whose routes are strict unless they name another strict class."""

    def __init__(
        self, *, prefix: str = "", tags: list[str | Enum], route_class: type[StrictRoute] = StrictRoute
    ) -> None:
        super().__init__(prefix=prefix, tags=tags, route_class=route_class)


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Add these routers, and make the routes strict that the application itself defines from now on.

    Raises `TypeError` for a route that is not strict, because it would read its body before it checks the caller.
    """
    app.router.route_class = StrictRoute
    for router in routers:
        for route in router.routes:
            if not isinstance(route, StrictRoute):
                raise TypeError(f"{route} is not strict: make its router with `Router`")
        app.include_router(router)


def _check_closed(route: APIRoute) -> None:
    """Raises `TypeError` if the model of the body would ignore unknown fields."""
    if route.body_field is not None:
        model = route.body_field.field_info.annotation
        if not (
            isinstance(model, type) and issubclass(model, BaseModel) and model.model_config.get("extra") == "forbid"
        ):
            raise TypeError(f'{route.path}: the body must be a model with `extra="forbid"`, not {model}')


async def _in_turn(request: Request, handle: Handler, which: str, user: str) -> Response:
    turns: Turns = request.app.state.turns[which]
    async with turns.one(user):
        response = await handle(request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = turns.each(aiter(response.body_iterator), user)
    return response
