"""Filing a finished job's result: its row in `results`, written in the transaction that ends the job."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any  # for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import Column, ColumnElement, Connection, Row, Select, and_, func, insert, select, update

from service.model.flags import apart_from_strength
from service.model.json import JsonMapping, JsonObject
from service.model.threat_model import threat_model
from service.specs.numbers import filed
from service.specs.versions import LATER
from service.store import flagging
from service.store.listed import insert_rows, listed
from service.store.own_weights import leave_out
from service.store.result_tables import cells, number_names, results
from service.store.retractions import RETRACTION, retraction_of
from service.store.states import WEIGHTS_USED
from service.store.tables import attempts, job_tasks, jobs, tasks, trainings
from service.store.task_kinds import TASK_KINDS
from service.store.values import Values

AT_ONCE = 1000
# Results of one cell may differ in these fields, and in further measures, which say more about the same network.
OF_SPEC = ("seed", "attack_seed", "replicate", "arrays")
OWN = frozenset({*OF_SPEC, "measures"})
FROM_JOB = (*filed("job"), "masked_n", "verdict", "verdict_version")
FROM_TASKS = {
    name: (kind, task_kind.numbers.c[number])
    for kind, task_kind in TASK_KINDS.items()
    for name, number in filed(kind).items()
}
"""The columns of `results` that repeat a number of a task: the kind of the task, and the number's own column."""
PARTS = {kind: task_kind.column for kind, task_kind in TASK_KINDS.items()}
NOT_RETRACTED: Values = dict.fromkeys(RETRACTION)


def file(connection: Connection, job_ids: Sequence[str]) -> None:
    """Write the rows of these jobs, which have just succeeded and been judged."""
    for start in range(0, len(job_ids), AT_ONCE):
        rows = connection.execute(_finished(job_ids[start : start + AT_ONCE])).all()
        attacks = [row.attack_task_id for row in rows]
        seen, marks = _with_results(connection, attacks), retraction_of(connection, attacks)
        versions = _versions(connection, rows)
        specs = [cell_spec(row.spec, of_job) for row, of_job in zip(rows, versions, strict=True)]
        ids = _cells(connection, specs)
        networks = _networks(connection, {row.weights_sha256 for row in rows})
        new_rows = []
        for row, cell_id in zip(rows, ids, strict=True):
            network = (cell_id, row.weights_sha256)
            # If its network is not known, statistics look closer.
            repeats = network in networks or row.weights_sha256 is None
            repeated = {"repeated": row.attack_task_id in seen, "repeats_network": repeats}
            new_rows.append({**_row(row, cell_id), **repeated, **marks.get(row.attack_task_id, NOT_RETRACTED)})
            seen.add(row.attack_task_id)
            networks.add(network)
        insert_rows(connection, results, new_rows)
    leave_out(connection, job_ids)
    flagging.renew(connection, job_ids)


def file_verdicts(connection: Connection, job_ids: Sequence[str]) -> None:
    """Copy the verdicts of these jobs, which were judged again, to their results."""
    of_job = {name: select(jobs.c[name]).where(jobs.c.id == results.c.job_id).scalar_subquery() for name in FROM_JOB}
    connection.execute(update(results).where(results.c.job_id.in_(listed(job_ids))).values(of_job))


def note_names(connection: Connection, kind: str, numbers: Iterable[JsonMapping]) -> None:
    """Store the names of numbers that tasks of this kind left, if they are new."""
    names = {name for of_task in numbers for name in of_task}
    existing = set(connection.scalars(select(number_names.c.name).where(number_names.c.kind == kind)))
    if fresh := names - existing:
        connection.execute(insert(number_names), [{"kind": kind, "name": name} for name in sorted(fresh)])


def refresh(connection: Connection, task_ids: Collection[str]) -> None:
    """Copy the numbers of tasks that ran again to the results that rest on them."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(task_ids)))
    numbers = {name: _number(number, results.c[PARTS[kind]]) for name, (kind, number) in FROM_TASKS.items()}
    made_by = (tasks.c.id == results.c.attack_task_id) & (attempts.c.task_id == tasks.c.id)
    used = select(WEIGHTS_USED).where(made_by, attempts.c.number == tasks.c.attempt).scalar_subquery()
    # The weights used now may be those of another result too: statistics look closer if a network may be repeated.
    network = {"weights_sha256": func.coalesce(used, results.c.weights_sha256), "repeats_network": True}
    network["mixed_weights"] = False  # `leave_out` sets it again if it is still true
    values = {**numbers, **network}
    connection.execute(update(results).where(results.c.job_id.in_(needing)).values(values))
    job_ids = connection.scalars(needing).all()
    leave_out(connection, job_ids)
    flagging.renew(connection, job_ids)


def cell_spec(spec: JsonMapping, versions: Mapping[str, int | None]) -> JsonObject:
    """What all results of a cell have in common: a job's spec without the fields of `OWN`, and its tasks' versions."""
    # A field that specs did not always have is left out at its earlier value, so that old and new results share a cell.
    kept = {name: value for name, value in spec.items() if name not in OWN and (name, value) not in LATER.items()}
    if spec["scale"] == 1 and spec["attack"].get("source_scale", 1) == 1:
        kept["scale_bias"] = True  # nothing is scaled
    return {**kept, "versions": dict(versions)}


def cell_digest(spec: JsonMapping) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def family(spec: JsonMapping) -> str:
    """A digest that is equal for cells whose attacks differ only in strength, for the flag `not_monotone`."""
    return cell_digest(apart_from_strength(spec))


def cell_row(digest: str, spec: JsonMapping) -> Values:
    attack = spec["attack"]
    ball = attack.get("attack", attack)  # a transfer has the ball of the attack that makes its examples
    return {
        "digest": digest,
        "architecture": spec["architecture"],
        "dataset": spec["dataset"],
        "scale": spec["scale"],
        "attack": attack["type"],
        "norm": ball.get("norm"),
        "eps": ball.get("eps"),
        "recipe": spec["recipe"]["name"],
        "samples": spec["samples"],
        "spec": dict(spec),
        "threat_model": threat_model(attack).ball,
        "family": family(spec),
    }


def _finished(job_ids: Sequence[str]) -> Select[str]:
    columns = [jobs.c[name] for name in ("id", "sequence", "user", "sweep_id", "spec", "created_at", *FROM_JOB)]
    parts = [jobs.c[name] for name in ("finished_at", *PARTS.values())]
    numbers = [number.label(name) for name, (_, number) in FROM_TASKS.items()]
    weights = func.coalesce(WEIGHTS_USED, trainings.c.checkpoint_digest).label("weights_sha256")
    query = select(*columns, *parts, *numbers, weights).select_from(jobs)
    for kind in sorted({"train", *(kind for kind, _ in FROM_TASKS.values())}):  # each kind that a column is of
        table = TASK_KINDS[kind].numbers
        query = query.outerjoin(table, table.c.task_id == jobs.c[PARTS[kind]])
    return (
        query.join(tasks, tasks.c.id == jobs.c.attack_task_id)
        .outerjoin(attempts, and_(attempts.c.task_id == tasks.c.id, attempts.c.number == tasks.c.attempt))
        .where(jobs.c.id.in_(listed(job_ids)))
        .order_by(jobs.c.sequence)
    )


def _versions(connection: Connection, rows: Sequence[Row[Any]]) -> list[dict[str, int | None]]:
    """The versions of each job's tasks, by kind. A query of its own, because planners give up on many joins at once."""
    parts = [{kind: getattr(row, column) for kind, column in PARTS.items()} for row in rows]
    ids = {task_id for of_job in parts for task_id in of_job.values() if task_id is not None}
    query = select(tasks.c.id, tasks.c.version).where(tasks.c.id.in_(listed(ids)))
    version = dict(connection.execute(query).all())
    return [{kind: version.get(task_id) for kind, task_id in of_job.items()} for of_job in parts]


def _with_results(connection: Connection, attack_ids: Sequence[str]) -> set[str]:
    """The attack tasks among these that have a result already."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(attack_ids)))
    attacks = select(results.c.attack_task_id).where(results.c.job_id.in_(listed(connection.scalars(needing))))
    return set(connection.scalars(attacks.distinct()))


def _networks(connection: Connection, weights: Iterable[str]) -> set[tuple[int, str]]:
    """The cells in which these networks have a result: `(cell id, SHA-256 of the weights)`."""
    query = select(results.c.cell_id, results.c.weights_sha256).where(results.c.weights_sha256.in_(listed(weights)))
    return {(cell_id, network) for cell_id, network in connection.execute(query.distinct())}


def _cells(connection: Connection, specs: Sequence[JsonObject]) -> list[int]:
    """The id of the cell of each of these specs; a new cell is inserted."""
    digests = [cell_digest(spec) for spec in specs]
    ids = _existing_cells(connection, digests)
    if fresh := {digest: spec for digest, spec in zip(digests, specs, strict=True) if digest not in ids}:
        connection.execute(insert(cells), [cell_row(digest, spec) for digest, spec in fresh.items()])
        ids |= _existing_cells(connection, list(fresh))
    return [ids[digest] for digest in digests]


def _existing_cells(connection: Connection, digests: Sequence[str]) -> dict[str, int]:
    query = select(cells.c.digest, cells.c.id).where(cells.c.digest.in_(listed(dict.fromkeys(digests))))
    return {digest: cell_id for digest, cell_id in connection.execute(query)}


def _row(row: Row[Any], cell_id: int) -> Values:
    kept = ("sequence", "user", "sweep_id", "train_task_id", "measure_task_id", "attack_task_id", "created_at")
    numbers = (*FROM_JOB, *FROM_TASKS, "weights_sha256")
    return {
        "job_id": row.id,
        "cell_id": cell_id,
        "finished_at": row.finished_at,
        **{name: getattr(row, name) for name in (*kept, *numbers)},
        **{name: row.spec[name] for name in OF_SPEC},
    }


def _number(number: Column[float], task_id: Column[str]) -> ColumnElement[float]:
    """The number of the task in this column."""
    return select(number).where(number.table.c.task_id == task_id).scalar_subquery()
