"""Retractions: wrong results and tasks are hidden with a reason, never deleted, and computed again.

A result is retracted with all results that show the same numbers: those of its attack task, and of the attack task that
differs only in whether it keeps `arrays`. A task is retracted with everything that rests on it. Jobs that wait for it
or need it later get a new generation of it.
"""

import json
from collections.abc import Sequence

from pydantic import ValidationError

from service.errors import Conflict, InvalidQuery, InvalidSpec, NotFound
from service.lab.access import NotAllowed
from service.model.dotted import or_rather
from service.model.events import EventKind
from service.model.json import JsonObject
from service.model.query import Node
from service.model.records import Task
from service.queue import replanning
from service.queue.plans import plans_of
from service.queue.verbs import Service
from service.results.judging import judge_results
from service.results.results import result_of
from service.specs import JobSpec, problems
from service.specs.measures import FURTHER_MEASURES
from service.store import Connection, flagging, history, reading, retractions
from service.store import results as store
from service.store.fields import Column
from service.store.history import Event

MAX_AGAIN = 10_000  # jobs that one request may submit again
RETRACT, RESTORE = "retract", "restore"


def retract(service: Service, job_id: str, reason: str, *, user: str, rerun: bool = False, admin: bool) -> JsonObject:
    """Retract a result, and with it all results that show the same numbers.

    Results whose verdicts compared them with that attack at s = 1 are judged again without it. With `rerun` the same
    job is submitted as another replicate. Raises, with nothing done: `NotFound`; `Conflict` if it is retracted already;
    `NotAllowed` if the user is no admin and others' results show these numbers; `QuotaExceeded`.
    """
    with service.database.write() as connection:
        row = result_of(connection, job_id)
        if row.retracted_at is not None:
            raise Conflict(f"the result of job {job_id} is retracted already: {row.retraction_reason}")
        now = service.database.now(connection)
        attacks = retractions.with_equal_numbers(connection, [row.attack_task_id])
        retracted = retractions.retract(connection, now, user, reason, attacks)
        if not admin:
            _check_own(connection, [*retracted, *retractions.waiting_for(connection, attacks)], user)
            # Else a later result with these numbers is hidden as it is filed; only an admin may decide that for others.
            retractions.give_digests_up(connection, attacks)
        flagging.renew(connection, retracted)
        _tell(connection, now, user, EventKind.RESULT_RETRACTED, retracted, {"reason": reason})
        _judge_without(connection, now, user, attacks)
        again = _submit(service, connection, now, _replicates(connection, [job_id]), user) if rerun else []
    return {"retracted": retracted, "resubmitted": again}


def retract_all(
    service: Service, nodes: Sequence[Node], reason: str, *, user: str, rerun: bool = False, measure: str | None = None
) -> JsonObject:
    """Retract every result that the filters choose, such as all of `versions.attack = 1`.

    With the type of a further `measure` the results stay, without that measure's numbers: its tasks are retracted.
    Raises, with nothing retracted: `InvalidQuery`, also without any filter; `InvalidSpec` if more jobs would be
    submitted again than one request may; `QuotaExceeded` if they are more than the user may have.
    """
    with service.database.write() as connection:
        where = _chosen(connection, nodes, RETRACT)
        if measure is not None:
            _check_measure(measure)
            wrong = retractions.measures_of(connection, where, measure, retracted=False)
            return _retract_tasks(service, connection, wrong, reason, user, rerun)
        attacks = retractions.with_equal_numbers(connection, retractions.attacks_of(connection, where))
        now = service.database.now(connection)
        retracted = retractions.retract(connection, now, user, reason, attacks)
        flagging.renew(connection, retracted)
        _tell(connection, now, user, EventKind.RESULT_RETRACTED, retracted, {"reason": reason})
        _judge_without(connection, now, user, attacks)
        again = _submit(service, connection, now, _replicates(connection, retracted), user) if rerun else []
    return {"retracted": retracted, "resubmitted": again}


def retract_task(
    service: Service, id_or_digest: str, reason: str, *, user: str, rerun: bool = False, admin: bool
) -> JsonObject:
    """Retract a task with all that rests on it: tasks on its checkpoint, and results that need one of these tasks.

    Jobs that imported its weights by their digest are among them. If the weights are registered under a name, the name
    stays usable, and `still_registered` has it. A result for which it is only a further measure stays, without those
    numbers. Live jobs are planned again and get a new generation, like every later job. With `rerun`, the jobs of the
    results that were hidden or lost numbers are submitted again, except for those that name the weights.
    Raises, with nothing done: `NotFound`; `Conflict` if it is retracted already; `InvalidSpec` and `QuotaExceeded` as
    `retract_all`; `NotAllowed` if the user is no admin and others' jobs rest on it, or none of their own does.
    """
    with service.database.write() as connection:
        task = _task(connection, id_or_digest)
        if task.retracted_at is not None:
            raise Conflict(f"{task.kind} {task.id} is retracted already: {task.retraction_reason}")
        task_ids = retractions.with_equal_numbers(connection, [task.id])
        if not admin:
            _check_users(connection, task_ids, user)
        return _retract_tasks(service, connection, task_ids, reason, user, rerun)


def restore(service: Service, job_id: str, *, user: str, admin: bool) -> JsonObject:
    """Take back the retraction that hides a result, for all results that it hides.

    Raises `NotFound`, `Conflict` if it is not retracted, and `NotAllowed` if the user is no admin and somebody else
    retracted it or owns some of the results.
    """
    with service.database.write() as connection:
        row = result_of(connection, job_id)
        if row.retracted_at is None:
            raise Conflict(f"the result of job {job_id} is not retracted")
        if not admin and row.retracted_by != user:
            raise NotAllowed(f"{row.retracted_by} retracted the result of job {job_id}: ask an admin to restore it")
        if row.retracted_with is not None:
            if not admin:
                _check_users(connection, [row.retracted_with], user)
            return _restore(service, connection, user, [], [row.retracted_with])
        restored = _restore(service, connection, user, [row.attack_task_id], [])
        if not admin:
            _check_own(connection, restored["restored"], user)
        return restored


def restore_task(service: Service, id_or_digest: str, *, user: str, admin: bool) -> JsonObject:
    """Take back the retraction of a task, and of all that was retracted with it.

    New jobs join it again, unless there is a newer generation already (`superseded`): then only its numbers are shown.
    Raises `NotFound`, `Conflict` if it is not retracted or was retracted with its training, and `NotAllowed`.
    """
    with service.database.write() as connection:
        task = _task(connection, id_or_digest)
        if task.retracted_at is None:
            raise Conflict(f"{task.kind} {task.id} is not retracted")
        if task.retracted_with != task.id:
            raise Conflict(f"{task.kind} {task.id} is retracted with training {task.retracted_with}: restore that")
        if not admin:
            if task.retracted_by != user:
                raise NotAllowed(f"{task.retracted_by} retracted {task.kind} {task.id}: ask an admin to restore it")
            _check_users(connection, retractions.with_equal_numbers(connection, [task.id]), user)
        return _restore(service, connection, user, [], [task.id])


def restore_all(service: Service, nodes: Sequence[Node], *, user: str, measure: str | None = None) -> JsonObject:
    """Take back every retraction that hides a result that the filters choose, or its numbers of a further `measure`.

    Raises `InvalidQuery`, also without any filter.
    """
    with service.database.write() as connection:
        where = _chosen(connection, nodes, RESTORE)
        if measure is not None:
            _check_measure(measure)
            return _restore(
                service, connection, user, [], retractions.measures_of(connection, where, measure, retracted=True)
            )
        return _restore(service, connection, user, *retractions.hidden_by(connection, where))


def _retract_tasks(
    service: Service, connection: Connection, task_ids: Sequence[str], reason: str, user: str, rerun: bool
) -> JsonObject:
    now = service.database.now(connection)
    marked = retractions.retract_tasks(connection, now, user, reason, task_ids)
    retracted = retractions.hide_resting_on(connection, marked)
    unmeasured = retractions.unmeasured_by(connection, marked)
    why = {"reason": reason}
    events = [Event(EventKind.TASK_RETRACTED, task_id=task_id, data=why) for task_id in marked]
    history.append(connection, now, user, events)
    flagging.renew(connection, retracted)
    _tell(connection, now, user, EventKind.RESULT_RETRACTED, retracted, why)
    _tell(connection, now, user, EventKind.RESULT_UNMEASURED, unmeasured, why)
    replanned = replanning.replan(connection, now, user, marked)
    again: list[str] = []
    if rerun:
        gone = retractions.importing(connection, marked)  # the weights that these jobs name are retracted
        again_of = [job_id for job_id in [*retracted, *unmeasured] if job_id not in gone]
        again = _submit(service, connection, now, _specs(connection, again_of), user)
    registered = retractions.registered_of(connection, task_ids)
    numbers = {"tasks": marked, "unmeasured": unmeasured, "replanned": replanned, "still_registered": registered}
    return {"retracted": retracted, "resubmitted": again, **numbers}


def _restore(
    service: Service, connection: Connection, user: str, attack_ids: Sequence[str], roots: Sequence[str]
) -> JsonObject:
    """Restore results that were retracted by themselves, by their attacks, and `roots` with all that rests on them."""
    now = service.database.now(connection)
    attack_ids = retractions.with_equal_numbers(connection, attack_ids)
    roots = retractions.with_equal_numbers(connection, roots)
    restored = retractions.restore(connection, attack_ids)
    tasks, shown = retractions.restore_tasks(connection, roots)
    superseded = retractions.give_digests_back(connection, [*tasks, *attack_ids])
    unmeasured = retractions.unmeasured_by(connection, tasks)
    restored = sorted({*restored, *shown})
    events = [
        Event(EventKind.TASK_RESTORED, task_id=task_id, data={"joined": task_id not in superseded}) for task_id in tasks
    ]
    history.append(connection, now, user, events)
    flagging.renew(connection, restored)
    _tell(connection, now, user, EventKind.RESULT_RESTORED, restored)
    _tell(connection, now, user, EventKind.RESULT_MEASURED, unmeasured)
    _judge_without(connection, now, user, attack_ids)
    return {"restored": restored, "tasks": tasks, "superseded": superseded, "measured": unmeasured}


def _judge_without(connection: Connection, now: float, user: str, attack_ids: Sequence[str]) -> None:
    """Judge the results again that were compared with these attacks at s = 1: only unretracted ones are evidence."""
    if before := retractions.judged_by(connection, attack_ids):
        judge_results(connection, now, user, before)


def _task(connection: Connection, id_or_digest: str) -> Task:
    task = reading.task(connection, id_or_digest)
    if task is None:
        raise NotFound(f"there is no task {id_or_digest}")
    return task


def _chosen(connection: Connection, nodes: Sequence[Node], verb: str) -> list[Column]:
    """The results that a filter chooses: to retract those that are shown, to restore all. Raises `InvalidQuery`."""
    if not nodes:
        raise InvalidQuery("filter", f"it is empty, and would {verb} every result: say which ones are wrong")
    return store.selected(connection, nodes, retracted=verb == RESTORE)


def _check_measure(name: str) -> None:
    if name not in FURTHER_MEASURES:
        raise InvalidQuery("measure", f"unknown measure {name!r}{or_rather(name, FURTHER_MEASURES)}")


def _specs(connection: Connection, job_ids: Sequence[str]) -> list[JobSpec]:
    """The specs of these results, each once."""
    specs = {json.dumps(row.spec, sort_keys=True): row.spec for row in retractions.specs_of(connection, job_ids)}
    return _accepted(list(specs.values()))


def _replicates(connection: Connection, job_ids: Sequence[str]) -> list[JobSpec]:
    """The specs of these results, each once, as a replicate that has no result yet.

    A replicate's training, measures and attacks are all independent of those of earlier replicates.
    """
    rows = {_apart_from_replicate(row.spec): row for row in retractions.specs_of(connection, job_ids)}
    again = [
        {**row.spec, "replicate": retractions.last_replicate(connection, row.cell_id, row.seed) + 1}
        for row in rows.values()
    ]
    return _accepted(again)


def _accepted(specs: Sequence[JsonObject]) -> list[JobSpec]:
    """Raises `InvalidSpec` for a spec that an earlier version accepted and this one refuses."""
    try:
        return [JobSpec.model_validate(spec) for spec in specs]
    except ValidationError as error:
        sentences = "; ".join(f"{pointer}: {sentence}" for pointer, sentence in problems(error))
        raise InvalidSpec([("/rerun", f"a job of these is not accepted any more: {sentences}")]) from None


def _apart_from_replicate(spec: JsonObject) -> str:
    return json.dumps({name: value for name, value in spec.items() if name != "replicate"}, sort_keys=True)


def _submit(service: Service, connection: Connection, now: float, jobs: Sequence[JobSpec], user: str) -> list[str]:
    """Submit jobs in the transaction that retracts: if they do not fit into the quota, nothing is retracted.

    Raises `InvalidSpec` for too many jobs, and `QuotaExceeded`.
    """
    if len(jobs) > MAX_AGAIN:
        raise InvalidSpec([("/rerun", f"these are {len(jobs):,} jobs; at most {MAX_AGAIN:,} are submitted again")])
    plans = plans_of(connection, jobs)
    return service.accept(connection, now, plans, user=user) if plans else []


def _check_own(connection: Connection, job_ids: Sequence[str], user: str) -> None:
    """Raises `NotAllowed` if some of these results are not the user's."""
    if others := retractions.others_of(connection, job_ids, user):
        raise NotAllowed(f"results of {', '.join(others)} show the same numbers: ask an admin to do this")


def _check_users(connection: Connection, task_ids: Sequence[str], user: str) -> None:
    """Raises `NotAllowed` if others' jobs need a task that rests on these, or if none of the user's jobs does."""
    users = retractions.users_of(connection, retractions.resting_on(connection, task_ids))
    if others := [name for name in users if name != user]:
        raise NotAllowed(f"jobs of {', '.join(others)} rest on it: ask an admin to do this")
    if user not in users:
        raise NotAllowed("no job of yours rests on it: ask an admin to do this")


def _tell(
    connection: Connection,
    now: float,
    user: str,
    kind: EventKind,
    job_ids: Sequence[str],
    data: JsonObject | None = None,
) -> None:
    events = [Event(kind, job_id=job_id, data=data or {}) for job_id in job_ids]
    history.append(connection, now, user, events)
