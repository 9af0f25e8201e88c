"""Results and tasks that were found to be wrong: hidden from then on with a reason, never deleted, computed again.

A result is retracted with all that show the same numbers: those of one attack task, and of the one that differs from it
only in whether it keeps `arrays`. A task is retracted with everything that rests on it, and
jobs that need it from then on, or wait for it, get a new generation of it.
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

MAX_AGAIN = 10_000  # jobs that one request may submit anew
RETRACT, RESTORE = "retract", "restore"


def retract(service: Service, job_id: str, reason: str, *, user: str, rerun: bool = False, admin: bool) -> JsonObject:
    """Retract a result, and with it all that show the same numbers.

    What was compared with that attack at s = 1 is judged again without it.
    With `rerun` the same job is submitted as another replicate. Raises `NotFound`, `Conflict` where it is retracted,
    `NotAllowed` where others' results show these numbers and the user is no admin, `QuotaExceeded`: nothing is done.
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
            # A later result of these numbers is hidden as it is filed, which only an admin may decide for others.
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
    Raises `InvalidQuery`, also without any filter, and for more jobs than can be submitted anew `InvalidSpec`, or
    `QuotaExceeded` where they are more than the user may have: then nothing is retracted.
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
    """Retract a task with all that rests on it: tasks on its checkpoint, results that need one of them.

    Those that imported its weights by their digest are among them. Where these are registered under a name, that stays
    usable, and `still_registered` names it. A result that needs a further measure stays, without its numbers. Live jobs
    are planned again and get a new generation, as every job does from then on; with `rerun` those of the hidden results
    are submitted again, but for those that name the weights.
    Raises `NotFound`, `Conflict` where it is retracted, `InvalidSpec` and `QuotaExceeded` as `retract_all`, and
    `NotAllowed` for who is no admin where others' jobs rest on it, or none of the user's: nothing is done.
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
    """Take back the retraction that hides a result, of all results that it hides.

    Raises `NotFound`, `Conflict`, and `NotAllowed` where it or some of the results are others' and no admin asks.
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
    """Take the retraction of a task back, and of all that was retracted with it.

    New jobs join it again, unless there is a newer generation already (`superseded`): then only its numbers are shown.
    Raises `NotFound`, `Conflict` where it is not retracted, or was with its training, and `NotAllowed`.
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
    """Take back every retraction that hides a result which the filters choose, or its numbers of a further `measure`.

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
    """Of results that were retracted by themselves, by their attacks, and of `roots` with all that rests on them."""
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
    """Judge again what was compared with these attacks at s = 1: a retracted one is no evidence, a restored one is."""
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
    """The specs of these results, each once, as a replicate that nobody has a result of yet.

    A replicate's training, measures and attacks are all independent of those before.
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
        said = "; ".join(f"{pointer}: {sentence}" for pointer, sentence in problems(error))
        raise InvalidSpec([("/rerun", f"a job of these is not accepted any more: {said}")]) from None


def _apart_from_replicate(spec: JsonObject) -> str:
    return json.dumps({name: value for name, value in spec.items() if name != "replicate"}, sort_keys=True)


def _submit(service: Service, connection: Connection, now: float, jobs: Sequence[JobSpec], user: str) -> list[str]:
    """In the transaction that retracts: where the jobs do not fit into the quota, nothing is retracted.

    Raises `InvalidSpec` for too many.
    """
    if len(jobs) > MAX_AGAIN:
        raise InvalidSpec([("/rerun", f"these are {len(jobs):,} jobs; at most {MAX_AGAIN:,} are submitted again")])
    plans = plans_of(connection, jobs)
    return service.accept(connection, now, plans, user=user) if plans else []


def _check_own(connection: Connection, job_ids: Sequence[str], user: str) -> None:
    """Raises `NotAllowed` where some of these results are not the user's."""
    if others := retractions.others_of(connection, job_ids, user):
        raise NotAllowed(f"results of {', '.join(others)} show the same numbers: ask an admin to do this")


def _check_users(connection: Connection, task_ids: Sequence[str], user: str) -> None:
    """Raises `NotAllowed` where others' jobs need what rests on these tasks, or none of the user's does."""
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
