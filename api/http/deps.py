"""Dependencies and parameters of endpoints: the verbs, the questions, the user, an idempotency key, pages."""

import hashlib
from typing import Annotated

from fastapi import Depends, Header, Query, Request
from pydantic import BaseModel, BeforeValidator

from api.http.auth import current_caller, current_user
from api.http.feed import Feed
from api.http.media_types import operation_of
from service.errors import InvalidQuery
from service.lab.access import Access, Caller
from service.lab.artifacts import Artifacts
from service.limits import MAX_LIMIT
from service.model.dotted import or_rather
from service.queue.verbs import Idempotency, Service
from service.results.insights import Insights
from service.settings import Settings
from service.specs.base import number, truth, whole


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _insights(request: Request) -> Insights:
    insights: Insights = request.app.state.insights
    return insights


async def _artifacts(request: Request) -> Artifacts:
    artifacts: Artifacts = request.app.state.service.artifacts
    return artifacts


async def _access(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


async def _feed(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


Verbs = Annotated[Service, Depends(_service)]
Questions = Annotated[Insights, Depends(_insights)]
ArtifactRoot = Annotated[Artifacts, Depends(_artifacts)]
ServerSettings = Annotated[Settings, Depends(_settings)]
EventFeed = Annotated[Feed, Depends(_feed)]
Users = Annotated[Access, Depends(_access)]
CurrentCaller = Annotated[Caller, Depends(current_caller)]
User = Annotated[str, Depends(current_user)]

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Sent again with the same body, the request is not repeated: its stored answer comes back.",
    ),
]
WholeFromText = BeforeValidator(lambda value: whole(value) if isinstance(value, str) else value)
Limit = Annotated[int, WholeFromText, Query(ge=1, le=MAX_LIMIT, description="Rows of a page.", examples=[100])]
CURSOR_EXAMPLE = "_8R5S4AtWyI4MGQ5YmVlZGZmMTciLFtdLDQyXQ"
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.", examples=[CURSOR_EXAMPLE])]
TruthFromText = BeforeValidator(lambda value: truth(value) if isinstance(value, str) else value)
NumberFromText = BeforeValidator(lambda value: number(value) if isinstance(value, str) else value)
IsDryRun = Annotated[
    bool, TruthFromText, Query(alias="dry_run", description="Only say what it would mean; nothing is stored.")
]
Wait = Annotated[
    float,
    NumberFromText,
    Query(ge=0, le=60, description="Wait up to so many seconds for the end before answering.", examples=[30]),
]


def idempotency(key: str | None, request: Request, body: BaseModel) -> Idempotency | None:
    """The key, with a digest of the route and of the body, in which the order of fields makes no difference."""
    if key is None:
        return None
    text = f"{request.method} {request.url.path} {body.model_dump_json()}"
    return Idempotency(key, hashlib.sha256(text.encode()).hexdigest())


async def only_documented_parameters(request: Request) -> None:
    """Refuses a query parameter that the OpenAPI document does not have, so that a typo changes no answer."""
    operation = operation_of(request)
    if operation is None:
        return
    names = sorted(item["name"] for item in operation.get("parameters", []) if item["in"] == "query")
    for name in request.query_params:
        if name not in names:
            raise InvalidQuery(name, f"unknown parameter {name!r}{or_rather(name, names)}")
