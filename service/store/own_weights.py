"""Results show numbers of one network: those of a task that used other weights than their attack are left out.

Stores of earlier versions have such tasks. There, a training that ran again overwrote its weights and its numbers in
place, and what had been computed on the lost weights stayed beside what was computed on the new ones.
"""

from collections.abc import Collection

from sqlalchemy import Column, ColumnElement, Connection, exists, literal, or_, select, update

from service.model.flags import MIXED_WEIGHTS, Flag
from service.specs.numbers import filed
from service.store.listed import listed
from service.store.result_tables import results
from service.store.states import CURRENT, WEIGHTS_USED
from service.store.tables import attempts, job_tasks, tasks, trainings
from service.store.typed import json_text


def used_others(task_id: Column[str]) -> ColumnElement[bool]:
    """Whether the current attempt of this task reports other weights than those of the result's attack."""
    task, attempt = tasks.alias(), attempts.alias()
    used = json_text(attempt.c.provenance, literal("weights_sha256"))
    current = (attempt.c.task_id == task.c.id) & (attempt.c.number == task.c.attempt)
    where = (task.c.id == task_id, used != results.c.weights_sha256)
    query = select(literal(1)).select_from(task).join(attempt, current).where(*where)
    return query.correlate_except(task, attempt).exists()


def left_out(task_id: Column[str]) -> ColumnElement[bool]:
    """The same, but at no cost for results without the flag `mixed_weights`."""
    return results.c.mixed_weights & used_others(task_id)


def leave_out(connection: Connection, job_ids: Collection[str]) -> None:
    """Take the numbers of measures and trainings of other weights out of these results, and flag them."""
    of_jobs = results.c.job_id.in_(listed(job_ids))
    training = exists().where(
        trainings.c.task_id == results.c.train_task_id, trainings.c.checkpoint_digest != results.c.weights_sha256
    )
    measure = job_tasks.c.task_id == tasks.c.id, tasks.c.kind == "measure", used_others(job_tasks.c.task_id)
    measures = exists().where(job_tasks.c.job_id == results.c.job_id, *measure)
    flagged = update(results).where(of_jobs, or_(training, measures)).values(mixed_weights=True)
    mixed_ids = connection.scalars(flagged.returning(results.c.job_id)).all()
    if not mixed_ids:
        return
    mixed = results.c.job_id.in_(listed(mixed_ids))
    for others, names in ((training, filed("train")), (used_others(results.c.measure_task_id), filed("measure"))):
        connection.execute(update(results).where(mixed, others).values(dict.fromkeys(names)))


def mixed_weights(connection: Connection, job_id: str, weights_sha256: str | None) -> list[Flag]:
    """The tasks of this result whose numbers are left out because they used other weights than `weights_sha256`."""
    if weights_sha256 is None:
        return []
    of_job = select(job_tasks.c.task_id).where(job_tasks.c.job_id == job_id)
    measure = tasks.c.spec["measure", "type"].as_string()
    measures = select(tasks.c.id, measure, WEIGHTS_USED).join(attempts, CURRENT)
    measures = measures.where(
        tasks.c.id.in_(of_job), tasks.c.kind == "measure", literal(weights_sha256) != WEIGHTS_USED
    )
    training = select(trainings.c.task_id, literal("train"), trainings.c.checkpoint_digest)
    training = training.join(results, results.c.train_task_id == trainings.c.task_id)
    training = training.where(results.c.job_id == job_id, trainings.c.checkpoint_digest != weights_sha256)
    return [
        {"flag": MIXED_WEIGHTS, "task_id": task_id, "part": part, "weights_sha256": used}
        for query in (training, measures)
        for task_id, part, used in connection.execute(query)
    ]
