"""Results that were found to be wrong: hidden from then on with a reason, never deleted, computed again on request."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection

from service.access import NotAllowed
from service.errors import Conflict, InvalidQuery, InvalidSpec
from service.planning import plans_of
from service.query import Node
from service.results import found
from service.specs import JobSpec, problems
from service.store import history, retracting
from service.store import results as store
from service.store.history import Event
from service.submission import Service

MAX_AGAIN = 10_000  # jobs that one request may submit anew


def retract(
    service: Service, job_id: str, reason: str, *, user: str, rerun: bool = False, admin: bool
) -> dict[str, Any]:
    """Retract a result, and with it all that show the same numbers because they rest on the same attack task.

    With `rerun` the same job is submitted as another replicate. Raises `NotFound`, `Conflict` where it is retracted,
    `NotAllowed` where others' results show these numbers and the user is no admin, `QuotaExceeded`: nothing is done.
    """
    with service.database.write() as connection:
        row = found(connection, job_id)
        if row.retracted_at is not None:
            raise Conflict(f"the result of job {job_id} is retracted already: {row.retraction_reason}")
        now = service.database.now(connection)
        retracted = retracting.retract(connection, now, user, reason, [row.attack_task_id])
        if not admin:
            _check_own(connection, retracted, user)
        _tell(connection, now, user, reason, retracted)
        again = _submit(service, connection, now, [job_id], user) if rerun else []
    return {"retracted": retracted, "resubmitted": again}


def retract_all(
    service: Service, nodes: Sequence[Node], reason: str, *, user: str, rerun: bool = False
) -> dict[str, Any]:
    """Retract every result that the filters choose, such as all of `versions.attack = 1`.

    Raises `InvalidQuery`, also without any filter, and for more jobs than can be submitted anew `InvalidSpec`, or
    `QuotaExceeded` where they are more than the user may have: then nothing is retracted.
    """
    if not nodes:
        raise InvalidQuery("filter", "it is empty, and would retract every result: say which ones are wrong")
    with service.database.write() as connection:
        where = store.selected(connection, nodes)
        tasks = retracting.attacks_of(connection, where)
        now = service.database.now(connection)
        retracted = retracting.retract(connection, now, user, reason, tasks)
        _tell(connection, now, user, reason, retracted)
        again = _submit(service, connection, now, retracted, user) if rerun else []
    return {"retracted": retracted, "resubmitted": again}


def restore(service: Service, job_id: str, *, user: str, admin: bool) -> dict[str, Any]:
    """Take a retraction back, of all results that rest on the same attack task.

    Raises `NotFound`, `Conflict`, and `NotAllowed` where it or some of the results are others' and no admin asks.
    """
    with service.database.write() as connection:
        row = found(connection, job_id)
        if row.retracted_at is None:
            raise Conflict(f"the result of job {job_id} is not retracted")
        if not admin and row.retracted_by != user:
            raise NotAllowed(f"{row.retracted_by} retracted the result of job {job_id}: ask an admin to restore it")
        restored = retracting.restore(connection, row.attack_task_id)
        if not admin:
            _check_own(connection, restored, user)
        now = service.database.now(connection)
        events = [Event("result.restored", job_id=other) for other in restored]
        history.append(connection, now, user, events)
    return {"restored": restored}


def _again(connection: Connection, job_ids: Sequence[str]) -> list[JobSpec]:
    """The jobs of retracted results anew, each spec once: as a replicate that nobody has a result of yet.

    A replicate's training, measures and attacks are all independent of those before. Raises `InvalidSpec` for too many.
    """
    rows = {_apart_from_replicate(row.spec): row for row in retracting.specs_of(connection, job_ids)}
    if len(rows) > MAX_AGAIN:
        raise InvalidSpec([("/rerun", f"these are {len(rows):,} jobs; at most {MAX_AGAIN:,} are submitted again")])
    again = [
        {**row.spec, "replicate": retracting.last_replicate(connection, row.cell_id, row.seed) + 1}
        for row in rows.values()
    ]
    try:
        return [JobSpec.model_validate(spec) for spec in again]
    except ValidationError as error:  # accepted once, by an earlier version
        said = "; ".join(f"{pointer}: {sentence}" for pointer, sentence in problems(error))
        raise InvalidSpec([("/rerun", f"a job of these is not accepted any more: {said}")]) from None


def _apart_from_replicate(spec: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in spec.items() if name != "replicate"}, sort_keys=True)


def _submit(service: Service, connection: Connection, now: float, job_ids: Sequence[str], user: str) -> list[str]:
    """In the transaction that retracts: where the jobs do not fit into the quota, nothing is retracted."""
    plans = plans_of(connection, _again(connection, job_ids))
    return service.accept(connection, now, plans, user=user) if plans else []


def _check_own(connection: Connection, job_ids: Sequence[str], user: str) -> None:
    """Raises `NotAllowed` where some of these results are not the user's."""
    if others := retracting.others_of(connection, job_ids, user):
        raise NotAllowed(f"results of {', '.join(others)} show the same numbers: ask an admin to do this")


def _tell(connection: Connection, now: float, user: str, reason: str, job_ids: Sequence[str]) -> None:
    events = [Event("result.retracted", job_id=job_id, data={"reason": reason}) for job_id in job_ids]
    history.append(connection, now, user, events)
