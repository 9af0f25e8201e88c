"""Sweeps: submit a grid of jobs, look at its progress, cancel and retry."""

from typing import Annotated

from fastapi import Body, Query, Request, Response

from api.http.deps import Cursor, IsDryRun, Key, Limit, Questions, User, Verbs, Wait, idempotency
from api.http.errors import documented
from api.http.jobs import answer, wait_for
from api.http.paging import linked
from api.http.permissions import owner_of, scope
from api.http.preconditions import Seen, tag
from api.http.routing import Answer, Router
from api.http.schemas.examples import SWEEP_EXAMPLE
from api.http.schemas.jobs import Change
from api.http.schemas.previews import DryRun
from api.http.schemas.sweeps import AcceptedSweep, Changed, Extension, Retried, SweepDetail, SweepPage
from service import specs
from service.errors import InvalidQuery
from service.model.dotted import or_rather
from service.model.jobs import RETRIABLE

router = Router(prefix="/v1/sweeps", tags=["sweeps"])
ENDED = ("succeeded", "failed", "cancelled")
States = Annotated[
    str,
    Query(
        description="Of these states: " + ", ".join(RETRIABLE) + ", with commas between them.", examples=["failed,held"]
    ),
]


@router.post(
    "",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=AcceptedSweep | DryRun,
    responses={200: {"model": DryRun, "description": "Dry run"}, **documented(409, 413, 422)},
)
def submit_sweep(
    body: Annotated[specs.Sweep, Body(examples=[SWEEP_EXAMPLE])],
    request: Request,
    response: Response,
    service: Verbs,
    user: User,
    key: Key = None,
    dry_run: IsDryRun = False,
) -> Answer:
    """Submit all jobs of a grid at once, or none: the whole sweep is refused for one bad cell."""
    if dry_run:
        response.status_code = 200
        return service.dry_run(body, user=user)
    return answer(service.submit_sweep(body, user=user, idempotency=idempotency(key, request, body)), request, response)


@router.get("", dependencies=[scope("read")], response_model=SweepPage, responses=documented(422))
def list_sweeps(
    request: Request,
    response: Response,
    insights: Questions,
    user: str | None = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> Answer:
    """Sweeps with their progress, the newest first."""
    return linked(insights.sweeps(user=user, cursor=cursor, limit=limit), request, response)


@router.get("/{sweep_id}", dependencies=[scope("read")], response_model=SweepDetail, responses=documented(404))
async def get_sweep(sweep_id: str, insights: Questions, request: Request, response: Response, wait: Wait = 0) -> Answer:
    """One sweep: counts of its jobs and tasks, and the seconds that are left, once that can be said.

    `ETag` is for `If-Match` too: it goes stale there with priority or labels only.
    """
    return tag(await wait_for(request, lambda: insights.sweep(sweep_id), ENDED, wait), response)


@router.patch(
    "/{sweep_id}",
    dependencies=[owner_of("sweep")],
    response_model=SweepDetail,
    responses=documented(404, 412, 422, 428),
)
def change_sweep(
    sweep_id: str, body: Change, seen: Seen, response: Response, service: Verbs, insights: Questions, user: User
) -> Answer:
    """Change the priority of a sweep and its live jobs, or the labels of it and all its jobs. What runs goes on."""
    service.change_sweep(sweep_id, user=user, seen=seen, priority=body.priority, labels=body.labels)
    return tag(insights.sweep(sweep_id), response)


@router.post(
    "/{sweep_id}:pause", dependencies=[owner_of("sweep")], response_model=SweepDetail, responses=documented(404, 409)
)
def pause_sweep(sweep_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Start nothing more for this sweep. What runs is finished; what other jobs need too goes on for them."""
    service.pause_sweep(sweep_id, user=user)
    return insights.sweep(sweep_id)


@router.post(
    "/{sweep_id}:resume", dependencies=[owner_of("sweep")], response_model=SweepDetail, responses=documented(404)
)
def resume_sweep(sweep_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Let a paused sweep go on."""
    service.resume_sweep(sweep_id, user=user)
    return insights.sweep(sweep_id)


@router.post(
    "/{sweep_id}:extend",
    dependencies=[owner_of("sweep")],
    response_model=AcceptedSweep,
    responses=documented(404, 409, 413, 422),
)
def extend_sweep(
    sweep_id: str, body: Extension, request: Request, response: Response, service: Verbs, user: User, key: Key = None
) -> Answer:
    """Add values to axes of a sweep's grid; only the cells that are new by it become jobs."""
    reply = service.extend(sweep_id, body.grid, user=user, idempotency=idempotency(key, request, body))
    return answer(reply, request, response)


@router.post("/{sweep_id}:cancel", dependencies=[owner_of("sweep")], response_model=Changed, responses=documented(404))
def cancel_sweep(sweep_id: str, service: Verbs, user: User) -> Answer:
    """Cancel the jobs of a sweep that have not ended."""
    return {"id": sweep_id, "jobs": service.cancel_sweep(sweep_id, user=user)}


@router.post(
    "/{sweep_id}:retry-failed", dependencies=[owner_of("sweep")], response_model=Retried, responses=documented(404, 422)
)
def retry_failed(sweep_id: str, service: Verbs, user: User, states: States = "failed") -> Answer:
    """Run the failed jobs of a sweep again, or those in `states`; what had succeeded is kept."""
    chosen = [state.strip() for state in states.split(",")]
    for state in chosen:
        if state not in RETRIABLE:
            raise InvalidQuery("states", f"no job is run again from {state!r:.120}{or_rather(state, RETRIABLE)}")
    retried, there_were = service.retry_failed(sweep_id, user=user, states=chosen)
    return {"id": sweep_id, "jobs": retried, "states": there_were}


@router.post("/{sweep_id}:boost", dependencies=[scope("admin")], response_model=Changed, responses=documented(404))
def boost_sweep(sweep_id: str, service: Verbs, user: User) -> Answer:
    """Let the live jobs of a sweep go before all other users' work, whatever they have used (admin)."""
    return {"id": sweep_id, "jobs": service.boost_sweep(sweep_id, user=user)}


@router.post("/{sweep_id}:unboost", dependencies=[scope("admin")], response_model=Changed, responses=documented(404))
def unboost_sweep(sweep_id: str, service: Verbs, user: User) -> Answer:
    """Let the boosted jobs of a sweep wait for their owner's turn again (admin)."""
    return {"id": sweep_id, "jobs": service.boost_sweep(sweep_id, user=user, boosted=False)}
