"""Retractions: marks on results, by the attack task whose numbers they show, and on tasks with all that rests on them.

What rests on a task: the tasks that are computed on its checkpoint, also if another task imported its weights by
their digest, and the results that need any of these for a number or for their verdict. A further measure is no such
need: without it, a result lacks only that measure's numbers.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple  # Any for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    String,
    bindparam,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)

from service.model.jobs import LIVE_JOB, JobState
from service.model.json import JsonObject
from service.specs.versions import LATER
from service.store.fields import Column
from service.store.listed import listed
from service.store.result_tables import results
from service.store.tables import checkpoints, job_tasks, jobs, task_edges, tasks, trainings
from service.store.values import Values, every

RETRACTION = ("retracted_at", "retracted_by", "retraction_reason")
MARK = (*RETRACTION, "retracted_with")
NO_MARK: dict[str, None] = dict.fromkeys(MARK)
FURTHER = (tasks.c.kind == "measure") & (tasks.c.spec["measure", "type"].as_string() != "closed_forms")
IMPORTED = tasks.c.spec["recipe", "name"].as_string() == "imported"  # a training that uses given weights
WEIGHTS = tasks.c.spec["recipe", "weights_sha256"].as_string()
GIVEN_UP = "retracted:"  # before a task's id, in place of a digest that the task has given up
LET_GO = (JobState.FAILED, JobState.CANCELLED)  # jobs that lose nothing with a task


def attacks_of(connection: Connection, where: Sequence[Column]) -> list[str]:
    """The attack tasks of the results that `where` chooses."""
    return list(connection.scalars(select(results.c.attack_task_id).where(*where).distinct()))


def with_equal_numbers(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """These tasks and the counterparts of attacks: a counterpart differs only in whether it keeps `arrays`."""
    attacks = (tasks.c.id.in_(listed(task_ids)), tasks.c.kind == "attack")
    specs = {task_id: spec for task_id, spec in connection.execute(select(tasks.c.id, tasks.c.spec).where(*attacks))}
    if not specs:
        return list(task_ids)
    trainings_of = select(task_edges.c.parent_id).where(task_edges.c.child_id.in_(listed(specs)))
    beside = select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(trainings_of))
    query = select(tasks.c.id, tasks.c.spec).where(tasks.c.id.in_(beside), tasks.c.kind == "attack")
    wanted = {_numbers_of(spec | {"arrays": not spec["arrays"]}) for spec in specs.values()}
    equal = {task_id for task_id, spec in connection.execute(query) if _numbers_of(spec) in wanted}
    return [*task_ids, *sorted(equal - set(task_ids))]


def _numbers_of(spec: JsonObject) -> str:
    """An attack's spec as text; one that was stored before a field existed has that field's default."""
    return json.dumps({**LATER, **spec}, sort_keys=True)


def retraction_of(connection: Connection, attack_ids: Iterable[str]) -> dict[str, Values]:
    """When, by whom and why the numbers of these attack tasks were retracted by themselves, and not with a task.

    A retracted result shows the numbers of the task, or of its counterpart: the same attack with or without `arrays`.
    A counterpart of another generation does not count, because it was computed again after the retraction.
    """
    specs = (tasks.c.id, tasks.c.spec, tasks.c.former_digest.is_not(None).label("given_up"))
    parents = select(task_edges.c.parent_id).where(task_edges.c.child_id.in_(listed(attack_ids)))
    hidden = select(*specs, *(results.c[name] for name in RETRACTION))
    hidden = hidden.join(results, results.c.attack_task_id == tasks.c.id).where(results.c.train_task_id.in_(parents))
    alone = (results.c.retracted_at.is_not(None), results.c.retracted_with.is_(None))
    marks: dict[str | tuple[str, bool], Values] = {}
    for row in connection.execute(hidden.where(*alone).order_by(results.c.sequence)):
        mark = {name: getattr(row, name) for name in RETRACTION}
        marks.setdefault(row.id, mark)
        marks.setdefault(_counterpart_key(row), mark)
    if not marks:
        return {}
    rows = connection.execute(select(*specs).where(tasks.c.id.in_(listed(attack_ids)))).all()
    mark_of = {row.id: marks.get(row.id, marks.get(_counterpart_key(row))) for row in rows}
    return {task_id: mark for task_id, mark in mark_of.items() if mark is not None}


def _counterpart_key(row: Row[Any]) -> tuple[str, bool]:
    """Equal for an attack and its counterpart of the same generation."""
    return _numbers_of(row.spec | {"arrays": None}), row.given_up


def measures_of(connection: Connection, where: Sequence[Column], kind: str, *, retracted: bool) -> list[str]:
    """The measure tasks of this type, retracted or not, that the results which `where` chooses need."""
    of_kind = (tasks.c.kind == "measure") & (tasks.c.spec["measure", "type"].as_string() == kind)
    query = select(tasks.c.id).join(job_tasks, job_tasks.c.task_id == tasks.c.id)
    query = query.join(results, results.c.job_id == job_tasks.c.job_id).where(*where, of_kind)
    marked = tasks.c.retracted_at.is_not(None)
    return sorted(connection.scalars(query.where(marked if retracted else ~marked).distinct()))


def hidden_by(connection: Connection, where: Sequence[Column]) -> tuple[list[str], list[str]]:
    """Why the results that `where` chooses are hidden: the attack tasks of those that were retracted by themselves,
    and the retracted tasks that the others rest on."""
    hidden = (*where, results.c.retracted_at.is_not(None))
    alone = attacks_of(connection, [*hidden, results.c.retracted_with.is_(None)])
    query = select(results.c.retracted_with).where(*hidden, results.c.retracted_with.is_not(None))
    return alone, sorted(connection.scalars(query.distinct()))


def retract(connection: Connection, now: float, user: str, reason: str, attack_ids: Sequence[str]) -> list[str]:
    """Mark the results that show the numbers of these attack tasks; returns those that were not marked yet."""
    values = {"retracted_at": now, "retracted_by": user, "retraction_reason": reason}
    statement = update(results).where(_showing(attack_ids), results.c.retracted_at.is_(None))
    return sorted(connection.scalars(statement.values(values).returning(results.c.job_id)))


def restore(connection: Connection, attack_ids: Sequence[str]) -> list[str]:
    """Take these marks away again; returns the results that are shown from now on.

    One that rests on a task which was retracted meanwhile stays hidden with that task.
    """
    marked = (_showing(attack_ids), results.c.retracted_at.is_not(None), results.c.retracted_with.is_(None))
    cleared = list(connection.scalars(update(results).where(*marked).values(NO_MARK).returning(results.c.job_id)))
    return sorted(set(cleared) - set(_hide(connection, results.c.job_id.in_(listed(cleared)))))


def give_digests_up(connection: Connection, task_ids: Sequence[str]) -> None:
    """Make these tasks give up their digests, so that no new job joins them."""
    connection.execute(update(tasks).where(tasks.c.id.in_(listed(task_ids))).values(new_digest()))


def resting_on(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """These tasks, and those that are computed on their checkpoints: only trainings have any, and have no parents."""
    parents = [*task_ids, *imports_of(connection, task_ids)]
    children = select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(listed(parents)))
    return sorted({*parents, *connection.scalars(children)})


def imports_of(connection: Connection, task_ids: Sequence[str]) -> dict[str, str]:
    """The unretracted tasks that import these trainings' weights by their digest: `task id -> training's id`.

    Two kinds of weights are left out: those that another unretracted training made too, and those that are registered
    under a name, because their imports may rest on the uploaded file.
    """
    if not (made := _made_by(connection, task_ids)):
        return {}
    others = select(trainings.c.checkpoint_digest).join(tasks, tasks.c.id == trainings.c.task_id)
    others = others.where(trainings.c.checkpoint_digest.in_(listed(made)), tasks.c.retracted_at.is_(None))
    standing = set(connection.scalars(others.where(tasks.c.id.not_in(listed(task_ids)), ~IMPORTED)))
    spoiled = made.keys() - standing - {weights for _, weights in _registered(connection, made)}
    imports = select(tasks.c.id, WEIGHTS).where(tasks.c.kind == "train", IMPORTED, tasks.c.retracted_at.is_(None))
    rows = connection.execute(imports.where(WEIGHTS.in_(listed(spoiled)))) if spoiled else ()
    return {task_id: made[weights] for task_id, weights in rows}


def registered_of(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """The names under which the weights of these trainings are registered."""
    return sorted(name for name, _ in _registered(connection, _made_by(connection, task_ids)))


def _made_by(connection: Connection, task_ids: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of the weights that these trainings made, with the training."""
    query = select(trainings.c.checkpoint_digest, tasks.c.id).join(tasks, tasks.c.id == trainings.c.task_id)
    query = query.where(tasks.c.id.in_(listed(task_ids)), ~IMPORTED).order_by(tasks.c.id)
    return {weights: task_id for weights, task_id in connection.execute(query)}


def _registered(connection: Connection, weights: Iterable[str]) -> list[tuple[str, str]]:
    """The checkpoints that have these weights: `(name, SHA-256)`."""
    query = select(checkpoints.c.name, checkpoints.c.weights_sha256)
    rows = connection.execute(query.where(checkpoints.c.weights_sha256.in_(listed(weights))))
    return [(name, sha256) for name, sha256 in rows]


def retract_tasks(connection: Connection, now: float, user: str, reason: str, task_ids: Sequence[str]) -> list[str]:
    """Mark these tasks and those that rest on them, and make them give up their digests.

    Returns those that were not marked yet.
    """
    values = {"retracted_at": now, "retracted_by": user, "retraction_reason": reason, "retracted_with": tasks.c.id}
    unmarked = (tasks.c.id.in_(listed(task_ids)), tasks.c.retracted_at.is_(None))
    marked = list(
        connection.scalars(update(tasks).where(*unmarked).values(values | new_digest()).returning(tasks.c.id))
    )
    imports = _mark_imports(connection, marked)
    return sorted([*marked, *imports, *_mark_children(connection, _children_of([*marked, *imports]))])


def hide_resting_on(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """Mark the results that rest on these tasks, which are retracted; returns those that were not marked yet."""
    return _hide(connection, results.c.job_id.in_(_jobs_of(task_ids)))


def restore_tasks(connection: Connection, roots: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the retractions of these tasks back: `(tasks, results)` that are not marked any more.

    What rests on another retracted task too stays retracted with that one.
    """
    of_roots = listed(roots)
    marked_tasks = update(tasks).where(tasks.c.retracted_with.in_(of_roots))
    cleared = list(connection.scalars(marked_tasks.values(NO_MARK).returning(tasks.c.id)))
    still = _mark_children(connection, tasks.c.id.in_(listed(cleared)))
    marked_results = update(results).where(results.c.retracted_at.is_not(None), results.c.retracted_with.in_(of_roots))
    shown = list(connection.scalars(marked_results.values(NO_MARK).returning(results.c.job_id)))
    hidden = _hide(connection, results.c.job_id.in_(listed(shown)))
    return sorted(set(cleared) - set(still)), sorted(set(shown) - set(hidden))


def importing(connection: Connection, task_ids: Sequence[str]) -> set[str]:
    """The jobs that need one of these tasks as the import of weights."""
    needing = select(job_tasks.c.job_id).join(tasks, tasks.c.id == job_tasks.c.task_id)
    return set(connection.scalars(needing.where(tasks.c.id.in_(listed(task_ids)), tasks.c.kind == "train", IMPORTED)))


def give_digests_back(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """Give restored tasks their digests back, so that new jobs join them; returns the tasks that stay without.

    A task stays without if a newer generation of it has the digest, or if the training that it was computed on has a
    newer generation: jobs never mix two. A training whose weights were lost and came back as others stays without too.
    """
    parent = tasks.alias("parent")
    on_newer = exists().where(
        task_edges.c.child_id == tasks.c.id, parent.c.id == task_edges.c.parent_id, parent.c.former_digest.is_not(None)
    )
    lost = exists().where(trainings.c.task_id == tasks.c.id, trainings.c.trained_again_as.is_not(None))
    which = (tasks.c.id.in_(listed(task_ids)), tasks.c.former_digest.is_not(None))
    query = select(tasks.c.id, tasks.c.former_digest).where(*which, ~on_newer, ~lost).order_by(tasks.c.generation)
    for of_kind in (tasks.c.kind == "train", tasks.c.kind != "train"):
        newest = {digest: task_id for task_id, digest in connection.execute(query.where(of_kind))}
        taken = set(connection.scalars(select(tasks.c.digest).where(tasks.c.digest.in_(listed(newest)))))
        free = [{"task": task_id, "own": digest} for digest, task_id in newest.items() if digest not in taken]
        if free:
            own = update(tasks).where(tasks.c.id == bindparam("task"))
            connection.execute(own.values(digest=bindparam("own"), former_digest=None), free)
    return sorted(connection.scalars(select(tasks.c.id).where(*which)))


def unmeasured_by(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """The results that are shown and lack, or get back, the numbers of these tasks as those of a further measure."""
    needing = select(job_tasks.c.job_id).join(tasks, tasks.c.id == job_tasks.c.task_id)
    needing = needing.where(tasks.c.id.in_(listed(task_ids)), FURTHER)
    shown = select(results.c.job_id).where(results.c.job_id.in_(needing), results.c.retracted_at.is_(None))
    return sorted(connection.scalars(shown))


def outlived(connection: Connection, job_ids: Sequence[str]) -> list[str]:
    """The jobs among these that need a task which a newer generation replaces, or will replace."""
    query = select(job_tasks.c.job_id).join(tasks, tasks.c.id == job_tasks.c.task_id)
    query = query.where(job_tasks.c.job_id.in_(listed(job_ids)), tasks.c.former_digest.is_not(None))
    return list(connection.scalars(query.distinct()))


class ResultSpec(NamedTuple):
    """The cell, the seed and the spec of a result."""

    cell_id: int
    seed: int
    spec: JsonObject


def specs_of(connection: Connection, job_ids: Sequence[str]) -> list[ResultSpec]:
    query = select(results.c.cell_id, results.c.seed, jobs.c.spec).join(jobs, jobs.c.id == results.c.job_id)
    return every(connection, ResultSpec, query.where(results.c.job_id.in_(listed(job_ids))))


def last_replicate(connection: Connection, cell_id: int, seed: int) -> int:
    """The highest replicate that has a result in this cell with this seed; 0 if there is none."""
    replicate = jobs.c.spec["replicate"].as_integer()
    query = select(func.max(replicate)).join(results, results.c.job_id == jobs.c.id)
    where = (results.c.cell_id == cell_id) & (results.c.seed == seed)
    return int(connection.execute(query.where(where)).scalar_one() or 0)


def others_of(connection: Connection, job_ids: Sequence[str], user: str) -> list[str]:
    """The owners of these jobs, apart from `user`."""
    owners = select(jobs.c.user).where(jobs.c.id.in_(listed(job_ids)), jobs.c.user != user)
    return sorted(connection.scalars(owners.distinct()))


def waiting_for(connection: Connection, attack_ids: Sequence[str]) -> list[str]:
    """The live jobs whose result will show the numbers of one of these attack tasks."""
    of_attacks = (jobs.c.id.in_(_jobs_of(attack_ids)), jobs.c.attack_task_id.in_(listed(attack_ids)))
    return list(connection.scalars(select(jobs.c.id).where(*of_attacks, jobs.c.state.in_(LIVE_JOB))))


def judged_by(connection: Connection, attack_ids: Sequence[str]) -> dict[str, str]:
    """The verdicts, by job, that rest on these attacks at s = 1 and are of another attack."""
    rests = (jobs.c.id.in_(_jobs_of(attack_ids)), jobs.c.baseline_task_id.in_(listed(attack_ids)))
    query = select(jobs.c.id, jobs.c.verdict).where(*rests, jobs.c.attack_task_id.not_in(listed(attack_ids)))
    rows = connection.execute(query.where(jobs.c.verdict.is_not(None)).order_by(jobs.c.sequence))
    return {job_id: verdict for job_id, verdict in rows}


def users_of(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """The owners of the jobs that need these tasks and have a result, or will have one."""
    needing = select(jobs.c.user).where(jobs.c.id.in_(_jobs_of(task_ids)), jobs.c.state.not_in(LET_GO))
    return sorted(connection.scalars(needing.distinct()))


def _jobs_of(task_ids: Sequence[str]) -> Select[str]:
    return select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(task_ids)))


def _showing(attack_ids: Sequence[str]) -> Column:
    """The results of these attacks, by an index on `job_tasks`; a job's baseline does not count."""
    return results.c.job_id.in_(_jobs_of(attack_ids)) & results.c.attack_task_id.in_(listed(attack_ids))


def _children_of(task_ids: Sequence[str]) -> Column:
    return tasks.c.id.in_(select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(listed(task_ids))))


def _mark_imports(connection: Connection, marked: Sequence[str]) -> list[str]:
    """Mark the tasks that import the weights of these trainings, which are retracted, with the training."""
    imports = imports_of(connection, marked)
    training = tasks.alias("training")
    for task_id, training_id in imports.items():
        values = {name: select(training.c[name]).where(training.c.id == training_id).scalar_subquery() for name in MARK}
        connection.execute(update(tasks).where(tasks.c.id == task_id).values(values | new_digest()))
    return sorted(imports)


def _mark_children(connection: Connection, which: Column) -> list[str]:
    """Mark those of these tasks that were computed on the checkpoint of a retracted training, with the training."""
    parent = tasks.alias("parent")
    edge = (task_edges.c.child_id == tasks.c.id) & (parent.c.id == task_edges.c.parent_id)
    marked = select(parent.c.id).where(edge, parent.c.retracted_at.is_not(None)).correlate(tasks)
    values = _first_mark(marked, parent) | new_digest()
    statement = update(tasks).where(which, tasks.c.retracted_at.is_(None), marked.exists()).values(values)
    return list(connection.scalars(statement.returning(tasks.c.id)))


def _hide(connection: Connection, which: Column) -> list[str]:
    """Mark those of these results that rest on retracted tasks, each with the task that was retracted first."""
    needed = (job_tasks.c.job_id == results.c.job_id) & (tasks.c.id == job_tasks.c.task_id)
    spoiled = needed & tasks.c.retracted_at.is_not(None) & or_(tasks.c.kind != "measure", _CLOSED_FORMS)
    marked = select(tasks.c.id).where(spoiled).correlate(results)
    statement = update(results).where(which, results.c.retracted_at.is_(None), marked.exists())
    hidden = connection.scalars(statement.values(_first_mark(marked, tasks)).returning(results.c.job_id))
    return sorted(hidden)


_CLOSED_FORMS: ColumnElement[bool] = tasks.c.id == results.c.measure_task_id


def _first_mark(marked: Select[str], table: FromClause) -> Values:
    """The values of the earliest of the marks that these tasks have."""
    first = marked.order_by(table.c.retracted_at, table.c.id).limit(1)
    return {name: first.with_only_columns(table.c[name]).scalar_subquery() for name in MARK}


def new_digest() -> Values:
    """The values by which a task gives its digest up, so that a new task can have it."""
    return {
        "former_digest": func.coalesce(tasks.c.former_digest, tasks.c.digest),
        "digest": literal(GIVEN_UP, String) + tasks.c.id,
    }
