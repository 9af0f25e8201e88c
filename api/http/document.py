"""The OpenAPI document: additions to the document that the framework makes of the routes."""

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.http.errors import Problem, documented
from service.model.json import JsonObject

DESCRIPTION = """
A service for robustness benchmarks: submit **jobs** (one cell: architecture, data set, scale, attack) or **sweeps**
(grids of them), follow them, and ask questions of every number ever measured.

Errors are problem documents (RFC 9457). Lists are `{"items": [...], "next_cursor": ...}`. Numbers may be written as
fractions (`"8/255"`). Who you are says a bearer token; where the server asks for none, the header `X-Uncanny-User`, and
without it you are the user that runs the server.

Whole JSON answers and artifacts have an `ETag`: sent back as `If-None-Match`, it is answered with 304 while nothing has
changed. Answers 429 and 503 say in `Retry-After` when to come back. `HEAD` is answered wherever `GET` is.

Within `v1` this document only grows: operations, optional parameters, fields of answers, members of enumerations and
problem statuses may be added, so ignore what you do not know. What is to go is first marked `deprecated` here, and
its answers say so in the headers `Deprecation` and `Sunset` (RFC 9745, RFC 8594), for at least six months and one
minor version, with what to use instead in its description. Whatever breaks a client that keeps to this is `v2`, beside
`v1`. A result, a verdict, a digest and the meaning of a stored number never change.
"""
STREAMS = {"/v1/events"}
ETAG = {"description": "Which version this is; tables have none.", "schema": {"type": "string"}}
LINK = {"description": "`rel=next` leads to the next page, where there is one.", "schema": {"type": "string"}}
LOCATION = {"description": "Where it is from now on.", "schema": {"type": "string"}}
REPLAYED = {
    "description": "`true` where this is the stored answer to an earlier request.",
    "schema": {"type": "string"},
}
RETRY_AFTER = {"description": "Seconds until it is worth while to ask again.", "schema": {"type": "string"}}
IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The `ETag` of what you have: 304 without a body where that is still the answer.",
}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
TAGS = [
    {"name": "jobs", "description": "One benchmark cell each."},
    {"name": "sweeps", "description": "Named grids of jobs."},
    {"name": "queue", "description": "Who goes next."},
    {"name": "results", "description": "The numbers of finished jobs."},
    {"name": "statistics", "description": "Groups of results, comparisons, rankings."},
    {"name": "tasks", "description": "Computations that jobs share."},
    {"name": "events", "description": "What happens, live."},
    {"name": "catalog", "description": "What can be named in a job."},
    {"name": "datasets", "description": "Data sets of the lab's own."},
    {"name": "checkpoints", "description": "Weights, also those made elsewhere."},
    {"name": "artifacts", "description": "Bytes by SHA-256."},
    {"name": "access", "description": "Users and tokens."},
    {"name": "health", "description": "Is it alive."},
]


def operation_id(route: APIRoute) -> str:
    """The name of the endpoint's function: it is stable, and generated clients name their methods by it."""
    return route.name


def install(app: FastAPI) -> None:
    """Make `app.openapi()` and `/openapi.json` return the completed document."""
    made = app.openapi

    def openapi() -> JsonObject:
        if app.openapi_schema is None:
            app.openapi_schema = completed(made())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def completed(document: JsonObject) -> JsonObject:
    """The document with our problem documents (422 too), a summary for each operation, and bounds as in JSON schema."""
    schemas = document["components"]["schemas"]
    own = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**own.pop("$defs"), "Problem": own}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["summary"] = _first_sentence(operation["description"])
            content = operation.get("requestBody", {}).get("content", {})
            always = (
                422,
                *((409,) if "_id}" in path else ()),
                *((413,) if content else ()),
                *((400, 415) if "application/json" in content else ()),
            )
            problems = {str(status): described for status, described in documented(*always).items()}
            operation["responses"] |= {str(status): problems[str(status)] for status in always}
            if method == "get" and path not in STREAMS:
                _describe_conditional(operation)
            _describe_headers(operation)
    return with_bounds(document)


def _describe_conditional(operation: JsonObject) -> None:
    operation.setdefault("parameters", []).append(IF_NONE_MATCH)
    operation["responses"]["200"]["headers"] = {"ETag": ETAG}
    operation["responses"]["304"] = {"description": "The client has this answer.", "headers": {"ETag": ETAG}}


def _describe_headers(operation: JsonObject) -> None:
    """Describe the headers of answers. Which ones an operation has follows from its parameters."""
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    responses = operation["responses"]
    if "cursor" in parameters:
        responses["200"].setdefault("headers", {})["Link"] = LINK
    if "Idempotency-Key" in parameters:
        of_both = {"Location": LOCATION, "Idempotency-Replayed": REPLAYED}
        responses["201" if "201" in responses else "200"]["headers"] = of_both
    for status in {"429", "503"} & responses.keys():
        responses[status]["headers"] = {"Retry-After": RETRY_AFTER}


def _first_sentence(text: str) -> str:
    sentence = " ".join(text.partition("\n\n")[0].split())
    for end in (". ", "; "):
        sentence = sentence.partition(end)[0]
    return sentence.rstrip(".")


def with_bounds(schema: JsonObject) -> JsonObject:
    """A JSON schema with bounds by JSON schema's names: pydantic leaves `ge` and so on if a validator comes first."""
    return {BOUNDS.get(name, name): _bounded(value) for name, value in schema.items()}


def _bounded(value: object) -> object:
    if isinstance(value, dict):
        return with_bounds(value)
    return [_bounded(item) for item in value] if isinstance(value, list) else value
