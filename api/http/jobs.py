"""Jobs: submit one, look at them, cancel and retry."""

import asyncio
import time
from collections.abc import Callable, Collection

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool

from api.http.deps import Cursor, IsDryRun, Key, Limit, Questions, ServerSettings, User, Verbs, Wait, idempotency
from api.http.errors import documented
from api.http.filters import Filter, Sort, documented_filters, filters_of
from api.http.paging import linked
from api.http.permissions import owner_of, scope
from api.http.preconditions import Seen, tag
from api.http.prefix import public
from api.http.routing import Answer, Router
from api.http.schemas.jobs import Accepted, Change, Explanation, JobDetail, JobPage, JobSubmission
from api.http.schemas.previews import DryRun
from service.model.jobs import STOPPED_JOB
from service.model.json import JsonObject
from service.queue.explaining import explain
from service.results.insights import NEWEST_FIRST, Question
from service.store.job_fields import JOBS
from service.store.replies import Reply

router = Router(prefix="/v1/jobs", tags=["jobs"])
POLL_INTERVAL_SECONDS = 0.2
MOST_WAITING = 32  # requests that poll the database for the end of a job or sweep


@router.post(
    "",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=Accepted | DryRun,
    responses={200: {"model": DryRun, "description": "Dry run"}, **documented(409, 413, 422)},
)
def submit_job(
    body: JobSubmission,
    request: Request,
    response: Response,
    service: Verbs,
    user: User,
    key: Key = None,
    dry_run: IsDryRun = False,
) -> Answer:
    """Submit one job. The answer is 201 once it is stored; what others have computed is not computed again."""
    if dry_run:
        response.status_code = 200
        return service.dry_run(body.job, user=user)
    reply = service.submit(
        body.job, user=user, priority=body.priority, labels=body.labels, idempotency=idempotency(key, request, body)
    )
    return answer(reply, request, response)


@router.get(
    "",
    dependencies=[scope("read")],
    response_model=JobPage,
    responses=documented(422),
    openapi_extra=documented_filters(JOBS),
)
def list_jobs(
    request: Request,
    response: Response,
    insights: Questions,
    filter: Filter = None,
    sort: Sort = NEWEST_FIRST,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Answer:
    """Jobs, the newest first."""
    page = insights.jobs(Question(filters_of(request, JOBS), sort, cursor, limit, filter=filter))
    return linked(page, request, response)


@router.get("/{job_id}", dependencies=[scope("read")], response_model=JobDetail, responses=documented(404))
async def get_job(job_id: str, insights: Questions, request: Request, response: Response, wait: Wait = 0) -> Answer:
    """One job with its tasks. `ETag` is for `If-Match` too: it goes stale there with priority or labels only."""
    return tag(await wait_for(request, lambda: insights.job(job_id), STOPPED_JOB, wait), response)


@router.patch(
    "/{job_id}", dependencies=[owner_of("job")], response_model=JobDetail, responses=documented(404, 409, 412, 422, 428)
)
def change_job(
    job_id: str, body: Change, seen: Seen, response: Response, service: Verbs, insights: Questions, user: User
) -> Answer:
    """Change a job's priority while it has not ended, or its labels (all of them at once). What runs goes on."""
    service.change_job(job_id, user=user, seen=seen, priority=body.priority, labels=body.labels)
    return tag(insights.job(job_id), response)


@router.get("/{job_id}/explain", dependencies=[scope("read")], response_model=Explanation, responses=documented(404))
def explain_job(job_id: str, insights: Questions, settings: ServerSettings) -> Answer:
    """Why it is not running, in a sentence, and the same for each of its tasks; what comes before it."""
    return explain(insights.database, settings, job_id)


@router.post(
    "/{job_id}:cancel", dependencies=[owner_of("job")], response_model=JobDetail, responses=documented(404, 409)
)
def cancel_job(job_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Cancel a job. What no other job needs stops within seconds."""
    service.cancel_job(job_id, user=user)
    return insights.job(job_id)


@router.post(
    "/{job_id}:retry", dependencies=[owner_of("job")], response_model=JobDetail, responses=documented(404, 409)
)
def retry_job(job_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Run a failed, held or cancelled job again; what had succeeded is kept."""
    service.retry_job(job_id, user=user)
    return insights.job(job_id)


@router.post("/{job_id}:boost", dependencies=[scope("admin")], response_model=JobDetail, responses=documented(404, 409))
def boost_job(job_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Let a job go before all other users' work, whatever they have used (admin). What runs goes on."""
    service.boost_job(job_id, user=user)
    return insights.job(job_id)


@router.post(
    "/{job_id}:unboost", dependencies=[scope("admin")], response_model=JobDetail, responses=documented(404, 409)
)
def unboost_job(job_id: str, service: Verbs, insights: Questions, user: User) -> Answer:
    """Let a boosted job wait for its owner's turn again (admin)."""
    service.boost_job(job_id, user=user, boosted=False)
    return insights.job(job_id)


def answer(reply: Reply, request: Request, response: Response) -> JsonObject:
    """The response to a submission. A replay is the stored answer, and its header says so."""
    response.status_code = reply.status
    response.headers["Location"] = public(request, reply.location)
    if reply.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return reply.body


_waiting: set[object] = set()


async def wait_for(
    request: Request, look: Callable[[], JsonObject], ended: Collection[str], seconds: float
) -> JsonObject:
    """The job or sweep that `look` reads, once its state is one of `ended`, the time is up, or the client has left.

    Each waiting request polls the database. If `MOST_WAITING` do so already, the answer comes at once.
    """
    deadline = time.monotonic() + seconds
    job_or_sweep = await run_in_threadpool(look)
    if len(_waiting) >= MOST_WAITING:
        return job_or_sweep
    _waiting.add(me := object())
    try:
        while job_or_sweep["state"] not in ended and time.monotonic() < deadline:
            await asyncio.sleep(POLL_INTERVAL_SECONDS)
            if await request.is_disconnected():
                break
            job_or_sweep = await run_in_threadpool(look)
    finally:
        _waiting.remove(me)
    return job_or_sweep
