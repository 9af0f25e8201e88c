"""Results: rows as JSON pages; as CSV, NDJSON or Parquet in one stream; one result whole; curves."""

from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from api.http.deps import CurrentCaller, Cursor, Limit, Questions, TruthFromText, User, Verbs
from api.http.errors import documented
from api.http.filters import Filter, Sort, documented_filters, filters_of
from api.http.media_types import chosen
from api.http.paging import next_link
from api.http.permissions import owner_of, scope
from api.http.routing import Answer, Router
from api.http.schemas.results import Result, ResultPage, Trajectory
from api.http.schemas.retractions import Restorations, Restored, Retracted, Retraction, Retractions
from service.model.json import JsonObject
from service.model.query import names_of
from service.queue import retractions
from service.results import exporting
from service.results.insights import Insights
from service.results.questions import NEWEST_FIRST, Question, nodes_of
from service.store.result_fields import RESULTS

router = Router(prefix="/v1/results", tags=["results"])
Format = Literal["json", "csv", "ndjson", "parquet"]
PARQUET = "application/vnd.apache.parquet"
MEDIA: dict[str, Format] = {
    "application/json": "json",
    "text/csv": "csv",
    "application/x-ndjson": "ndjson",
    PARQUET: "parquet",
}
VARY = {"Vary": "Accept"}
STREAMED: JsonObject = {
    "text/csv": {"schema": {"type": "string"}},
    "application/x-ndjson": {"schema": {"type": "string"}},
    PARQUET: {"schema": {"type": "string", "format": "binary"}},
}
HIDDEN = "X-Uncanny-Retracted"
SAYS_HIDDEN: JsonObject = {
    HIDDEN: {
        "description": "Of rows in one stream: how many results of the filter are hidden because they are retracted, "
        "counted up to 1,000; not there with `include_retracted`.",
        "schema": {"type": "integer"},
    }
}
WithRetracted = Annotated[bool, TruthFromText, Query(description="Show retracted results too.")]


@router.get(
    "",
    dependencies=[scope("read")],
    response_model=None,
    responses={200: {"model": ResultPage, "content": STREAMED, "headers": SAYS_HIDDEN}, **documented(422)},
    openapi_extra=documented_filters(RESULTS),
)
def list_results(
    request: Request,
    insights: Questions,
    filter: Filter = None,
    sort: Sort = NEWEST_FIRST,
    fields: Annotated[
        str,
        Query(
            description="Up to 200 names by comma of what to show, any stored number among them; `*` for all.",
            examples=["job_id,architecture,scale,attack.norm,robust_accuracy"],
        ),
    ] = "",
    limit: Limit = 100,
    cursor: Cursor = None,
    format: Annotated[Format | None, Query(description="Instead of the `Accept` header.")] = None,
    include_retracted: WithRetracted = False,
) -> Response:
    """Results of succeeded jobs, the newest first. JSON comes in pages; CSV, NDJSON and Parquet with all rows."""
    simple = filters_of(request, RESULTS)
    question = Question(simple, sort, cursor, limit, names_of(fields), filter, include_retracted)
    wanted = format or MEDIA[chosen(request, list(MEDIA))]
    if wanted == "json":
        page = insights.results(question)
        return Response(
            to_json(page), media_type="application/json", headers=VARY | next_link(request, page["next_cursor"])
        )
    return _stream(wanted, insights, question)


def _stream(wanted: Literal["csv", "ndjson", "parquet"], insights: Insights, question: Question) -> Response:
    """All rows, as they are read. The body has only rows, so a header counts the hidden ones."""
    rows: Iterator[str] | Iterator[bytes]
    match wanted:
        case "csv":
            rows, media = exporting.csv_lines(exporting.table(insights.database, question)), "text/csv; charset=utf-8"
        case "ndjson":
            rows, media = exporting.json_lines(insights.all_results(question)), "application/x-ndjson"
        case "parquet":
            rows, media = exporting.parquet_bytes(exporting.table(insights.database, question)), PARQUET
    headers = dict(VARY)
    if wanted == "parquet":
        headers["Content-Disposition"] = 'attachment; filename="results.parquet"'
    if not question.retracted:
        headers[HIDDEN] = str(insights.hidden(question.nodes))
    return StreamingResponse(rows, media_type=media, headers=headers)


@router.post(":retract", dependencies=[scope("admin")], response_model=Retracted, responses=documented(422))
def retract_results(body: Retractions, service: Verbs, user: User) -> Answer:
    """Retract every result that a filter chooses, such as all of one version of a task; or their numbers of one
    further measure, such as `sam_sharpness` where `measures.sam_sharpness.version = 1`."""
    nodes = nodes_of(body.filter)
    return retractions.retract_all(service, nodes, body.reason, user=user, rerun=body.rerun, measure=body.measure)


@router.post(":restore", dependencies=[scope("admin")], response_model=Restored, responses=documented(422))
def restore_results(body: Restorations, service: Verbs, user: User) -> Answer:
    """Take back every retraction that hides one of the results, or measures, that a filter chooses."""
    return retractions.restore_all(service, nodes_of(body.filter), user=user, measure=body.measure)


@router.get("/{job_id}", dependencies=[scope("read")], response_model=Result, responses=documented(404))
def get_result(job_id: str, insights: Questions) -> Answer:
    """One result whole: every number of the tasks it rests on, their provenance, and which curves there are."""
    return insights.result(job_id)


@router.get("/{job_id}/trajectory", dependencies=[scope("read")], response_model=Trajectory, responses=documented(404))
def get_trajectory(job_id: str, insights: Questions) -> Answer:
    """The curves of a result: along the steps of the attack, and over the epochs of the training."""
    return insights.trajectory(job_id)


@router.post(
    "/{job_id}:retract", dependencies=[owner_of("job")], response_model=Retracted, responses=documented(404, 409, 422)
)
def retract_result(job_id: str, body: Retraction, service: Verbs, user: User, caller: CurrentCaller) -> Answer:
    """Hide a result, and all others that show the same numbers, from now on. Nothing is deleted."""
    return retractions.retract(service, job_id, body.reason, user=user, rerun=body.rerun, admin=caller.may("admin"))


@router.post(
    "/{job_id}:restore", dependencies=[owner_of("job")], response_model=Restored, responses=documented(404, 409)
)
def restore_result(job_id: str, service: Verbs, user: User, caller: CurrentCaller) -> Answer:
    """Take back the retraction that hides a result, of all that it hides."""
    return retractions.restore(service, job_id, user=user, admin=caller.may("admin"))
