"""Every refusal and failure as an RFC 9457 problem document. One table says which error has which status."""

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from api.http.limits import BodyTooLarge, BodyTooSlow
from api.http.media_types import NotAcceptable
from api.http.preconditions import PreconditionRequired
from api.http.prefix import public
from api.http.strict import NotJson, NotSentAsJson, check_sent
from api.http.turns import Busy, TooManyRequests
from service.errors import (
    AmbiguousId,
    ArtifactMissing,
    ArtifactRootFull,
    ArtifactRootUnusable,
    Changed,
    Conflict,
    DatabaseAway,
    IdempotencyMismatch,
    InvalidQuery,
    InvalidSpec,
    NotFound,
    QuotaExceeded,
    SchemaOutdated,
    Unauthenticated,
    UncannyError,
    UnfitDatabase,
)
from service.lab.access import NotAllowed
from service.lab.checkpoints import NotChecked, TensorsDiffer
from service.model.json import JsonObject
from service.model.pointers import pointer_to
from service.specs.sweep import as_written, sentence_of

log = logging.getLogger("uncanny.api")

PARAMETER = re.compile(r"{[^}]*}")
PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_SECONDS = {503: 2, 429: 2, 507: 30}  # for problems that pass; a full disk takes longer to clear
ALWAYS = (401, 403, 406, 429, 503)
MAX_ERRORS, MAX_DETAIL = 50, 10_000  # of one problem document; the other errors are shown when these are corrected


class Forbidden(UncannyError):
    """This request is not allowed."""


STATUS: dict[type[UncannyError], int] = {
    NotJson: 400,
    NotSentAsJson: 415,
    InvalidSpec: 422,
    InvalidQuery: 422,
    IdempotencyMismatch: 422,
    NotFound: 404,
    AmbiguousId: 409,
    NotAcceptable: 406,
    ArtifactMissing: 404,
    Conflict: 409,
    Changed: 412,
    PreconditionRequired: 428,
    QuotaExceeded: 403,
    Unauthenticated: 401,
    Forbidden: 403,
    NotAllowed: 403,
    TooManyRequests: 429,
    BodyTooLarge: 413,
    BodyTooSlow: 408,
    Busy: 503,
    DatabaseAway: 503,
    ArtifactRootUnusable: 503,
    ArtifactRootFull: 507,
    SchemaOutdated: 503,
    UnfitDatabase: 503,
    NotChecked: 503,
}


class TensorProblem(BaseModel):
    """A tensor of the network that is another one in the file."""

    name: str
    found: str = Field(description="In the file.", examples=["(8, 128)"])
    expected: str = Field(description="In the network.", examples=["(7, 128)"])


class TensorProblems(BaseModel):
    """All tensors in which a file of weights and the network differ."""

    missing: list[str] = Field(description="Of the network, by its names.")
    unknown: list[str] = Field(description="Of the file, by its names.")
    misshapen: list[TensorProblem]
    copies: list[str] = Field(description="Prefixes under which the file has all tensors of the network.")


class FieldProblem(BaseModel):
    """What is wrong with one field of the body (`pointer`) or one parameter of the request (`parameter`)."""

    pointer: str | None = Field(default=None, description="JSON pointer into the body.", examples=["/attack/eps"])
    parameter: str | None = Field(default=None, description="Name of a query, path or header parameter.")
    position: int | None = Field(default=None, description="Where in a filter, counted from 0.")
    detail: str
    tensors: TensorProblems | None = Field(default=None, description="What differs in a file of weights.")


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[FieldProblem] = Field(default_factory=list)


def problem(
    status: int,
    detail: str,
    request: Request,
    errors: Sequence[JsonObject] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response for a problem, with `Retry-After` if the problem passes by itself."""
    headers = dict(headers or {})
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers.setdefault("Connection", "close")
    if status == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("WWW-Authenticate", "Bearer")
    if status in RETRY_AFTER_SECONDS:
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS[status]))
    body: JsonObject = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if len(errors) > MAX_ERRORS:
        detail = f"{len(errors):,} things are wrong, the first of them: {detail}"
    detail = detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 3] + "..."
    body |= {"detail": detail, "instance": public(request, request.url.path)}
    if errors:
        body["errors"] = list(errors[:MAX_ERRORS])
    return JSONResponse(body, status, headers, PROBLEM_JSON)


def install(app: FastAPI) -> None:
    """Translate every exception of an endpoint, and the framework's own refusals, into problem documents."""
    app.add_exception_handler(UncannyError, _uncanny)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _hung_up)
    app.add_exception_handler(Exception, _unexpected)


def _uncanny(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UncannyError)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    fields: list[JsonObject] = []
    if isinstance(error, InvalidSpec):
        fields = [{"pointer": pointer, "detail": sentence} for pointer, sentence in error.errors]
    if isinstance(error, TensorsDiffer):
        fields[0]["tensors"] = error.tensors
    if isinstance(error, InvalidQuery):
        fields = [{"parameter": error.parameter, "detail": error.sentence}]
        if error.position is not None:
            fields[0]["position"] = error.position
    return problem(status, str(error), request, fields)


def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    """The errors that pydantic found in the body or in the parameters."""
    assert isinstance(error, RequestValidationError)
    body = getattr(request.scope.get("route"), "body_field", None)
    names = tuple(getattr(body.field_info.annotation, "model_fields", ())) if body is not None else ()
    items = error.errors()
    try:
        for item in items:
            check_sent(item)
    except InvalidSpec as refusal:
        return _uncanny(request, refusal)
    fields = [_field(item, names) for item in items[: MAX_ERRORS + 1]]
    sentences = [f"{field.get('pointer') or field.get('parameter') or '/'}: {field['detail']}" for field in fields]
    return problem(422, "; ".join(sentences), request, fields)


def _field(item: JsonObject, names: Sequence[str]) -> dict[str, str]:
    """`names` are the fields of the body."""
    where, *location = item["loc"]
    path = as_written(location)
    sentence = sentence_of(item, path, names)
    if where == "body":
        return {"pointer": pointer_to(*path), "detail": sentence}
    return {"parameter": ".".join(path), "detail": sentence}


async def missing(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application that answers 404 to everything."""
    await _http(Request(scope), HTTPException(HTTPStatus.NOT_FOUND))(scope, receive, send)


def _http(request: Request, error: Exception) -> JSONResponse:
    """The framework's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UncannyError):  # raised while the body was read
        return _uncanny(request, error.__cause__)
    detail = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is no {public(request, request.url.path)}; see {public(request, '/docs')}"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed(request))
        detail = f"{request.method} is not offered at {request.url.path}; {headers['Allow']} is"
    return problem(error.status_code, detail, request, headers=headers)


def _allowed(request: Request) -> list[str]:
    """The methods of the most specific documented path that matches. The framework would name its first match."""
    documented_paths = request.app.openapi()["paths"]
    matching = [
        path
        for path in documented_paths
        if re.fullmatch("[^/]+".join(map(re.escape, PARAMETER.split(path))), request.url.path)
    ]
    path = max(matching, key=lambda path: len(PARAMETER.sub("", path)), default=None)
    methods = [method.upper() for method in documented_paths[path]] if path else ["GET"]
    return [*methods, "HEAD"] if "GET" in methods else methods


def _hung_up(request: Request, error: Exception) -> JSONResponse:
    """The client is gone: nobody reads the answer, and it is no failure of the service."""
    log.debug("%s %s: the client hung up", request.method, request.url.path)
    return problem(400, "the client hung up before the body was there", request)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "something unexpected happened; the server's log has the details. What was accepted before is safe."
    return problem(500, detail, request)


def documented(*statuses: int) -> dict[int | str, JsonObject]:
    """The problems that a route documents: these statuses, and `ALWAYS` (access, rate limits, the database)."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    with_body = {HTTPStatus.REQUEST_TIMEOUT.value} if HTTPStatus.REQUEST_ENTITY_TOO_LARGE in statuses else set()
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({*statuses, *ALWAYS, *with_body})
    }
