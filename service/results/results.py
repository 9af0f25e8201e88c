"""Questions about results: pages and streams of rows, one result whole, the curves of several."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from service.errors import InvalidQuery, NotFound
from service.model.dotted import FAMILIES, chosen
from service.model.flags import NetworkInCell
from service.model.jobs import TaskState
from service.model.json import JsonMapping, JsonObject
from service.model.observations import INTERVALS
from service.model.query import Node
from service.model.results import Result, ResultKey
from service.results import views
from service.results.questions import ALL_FIELDS, Question
from service.results.worst_case import worst_case_of
from service.store import Connection, reading
from service.store import results as store
from service.store.database import Database
from service.store.datasets import test_samples
from service.store.fields import stored_numbers, unknown
from service.store.flagging import flags_of, trained_again
from service.store.keyset import Order, Page
from service.store.own_weights import mixed_weights
from service.store.result_fields import RESULTS
from service.store.result_tables import results
from service.store.task_kinds import ROLES

STREAM_ROWS = 500
ROW_FIELDS = (*RESULTS.known, *INTERVALS, *FAMILIES)
MAX_FIELDS = 200
MAX_TRAJECTORIES = 100


class Results:
    """Questions about the results of one store."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def results(self, question: Question) -> JsonObject:
        """A page of results; the first page says how many results are hidden because they are retracted.

        Raises `InvalidQuery`.
        """
        with self.database.read() as connection:
            check_fields(connection, question.fields)
            rows, cursor = self._page(connection, question)
            first = question.cursor is None
            hidden = store.hidden(connection, question.nodes) if first and not question.retracted else None
        return {"items": rows, "next_cursor": cursor, "retracted": hidden}

    def hidden(self, nodes: Sequence[Node]) -> int:
        """How many of the results that the filters choose are retracted; at most 1,000 are counted."""
        with self.database.read() as connection:
            return store.hidden(connection, nodes)

    def all_results(self, question: Question) -> Iterator[JsonObject]:
        """Every row, page by page, so that neither memory nor a transaction grows with their number.

        Raises `InvalidQuery` at once, before the first row is taken.
        """
        with self.database.read() as connection:
            check_fields(connection, question.fields)
            question.after(order_of(connection, question))
            store.selected(connection, question.nodes)
        return self._all(replace(question, limit=STREAM_ROWS))

    def _all(self, question: Question) -> Iterator[JsonObject]:
        while True:
            with self.database.read() as connection:
                rows, cursor = self._page(connection, question)
            yield from rows
            if cursor is None:
                return
            question = replace(question, cursor=cursor)

    def _page(self, connection: Connection, question: Question) -> tuple[list[JsonObject], str | None]:
        order = order_of(connection, question)
        page = keys_of(connection, question, order)
        rows = rows_of(connection, [key.job_id for key in page.rows], question.fields)
        return rows, question.next_cursor(order, page.end)

    def result(self, job_id: str) -> JsonObject:
        """One whole result: all numbers by the role of their task, with provenance and names of curves.

        Its `flags` are findings from other results; its `worst_case` is over all attacks in its threat model.
        """
        with self.database.read() as connection:
            result = result_of(connection, job_id)
            network, cell_id = result.weights_sha256, result.cell_id
            further = store.further_measures(connection, [result])[job_id]
            cell = store.cell_specs(connection, [cell_id])[cell_id]
            flags = flags_of(connection, NetworkInCell(network, cell_id)) + trained_again(connection, job_id)
            flags += mixed_weights(connection, job_id, network)
            worst_case = worst_case_of(connection, network, cell)
            parts = _parts(connection, result)
            size = test_samples(connection, [result.dataset]).get(result.dataset)
        row = views.result_row(result, further, cell, test_samples=size, whole=False)
        return {**row, "flags": flags, "worst_case": worst_case, "parts": parts}

    def trajectory(self, job_id: str) -> JsonObject:
        """The curves of a result: along the attack's steps, and over the epochs of the training."""
        with self.database.read() as connection:
            result = result_of(connection, job_id)
            return {"job_id": job_id, **views.retracted(result), "curves": _curves(connection, result)}

    def trajectories(self, job_ids: Sequence[str], parts: Sequence[str] = ()) -> list[JsonObject]:
        """The curves of several results at once, of these parts or of all. Raises `InvalidQuery`, `NotFound`."""
        if not 1 <= len(job_ids) <= MAX_TRAJECTORIES:
            raise InvalidQuery("ids", f"between 1 and {MAX_TRAJECTORIES} ids can be asked for, not {len(job_ids)}")
        if wrong := [part for part in parts if part not in ROLES]:
            raise unknown("parts", wrong[0], list(ROLES))
        with self.database.read() as connection:
            return [
                {**_summary(result), "curves": _curves(connection, result, parts)}
                for result in (result_of(connection, job_id) for job_id in dict.fromkeys(job_ids))
            ]


def _summary(result: Result) -> JsonObject:
    """The fields by which a reader tells the curves of several results apart."""
    return {
        "job_id": result.job_id,
        "architecture": result.architecture,
        "dataset": result.dataset,
        "scale": result.scale,
        "seed": result.seed,
        "robust_accuracy": result.metrics["robust_accuracy"],
        **views.retracted(result),
    }


def order_of(connection: Connection, question: Question) -> Order:
    return question.order(connection, RESULTS, results.c.sequence)


def keys_of(connection: Connection, question: Question, order: Order) -> Page[ResultKey]:
    after = question.after(order)
    return store.keys(connection, question.nodes, order, after, question.limit, retracted=question.retracted)


def rows_of(connection: Connection, job_ids: Sequence[str], fields: Sequence[str]) -> list[JsonObject]:
    """These results as rows, cut to `fields` if there are any."""
    results = store.of_jobs(connection, job_ids)
    further = store.further_measures(connection, results)
    specs = store.cell_specs(connection, {result.cell_id for result in results})
    sizes = test_samples(connection, {result.dataset for result in results})
    shown = [
        views.result_row(
            result,
            further[result.job_id],
            specs[result.cell_id],
            test_samples=sizes.get(result.dataset),
            whole=bool(fields),
        )
        for result in results
    ]
    if not fields or ALL_FIELDS in fields:
        return shown
    return [chosen({**row, **other_names(row)}, fields) for row in shown]


def other_names(row: JsonMapping) -> JsonObject:
    """Further names of fields of a row. A transfer has the norm of the attack that makes its examples."""
    ball = row["attack"].get("attack", row["attack"])
    return {"sweep": row["sweep_id"], "owner": row["user"], "norm": ball.get("norm")}


def check_fields(connection: Connection, fields: Sequence[str]) -> None:
    """Raises `InvalidQuery` for fields that no row has, and for too many."""
    if len(fields) > MAX_FIELDS:
        raise InvalidQuery("fields", f"these are {len(fields)}; at most {MAX_FIELDS} can be named, and `*` is all")
    names = [name for name in fields if name not in (*ROW_FIELDS, ALL_FIELDS)]
    names = [name for name in names if not ("." in name and name.partition(".")[0] in FAMILIES)]
    if names:
        stored = stored_numbers(connection)
        for name in names:
            if name not in stored:
                raise unknown("fields", name, ROW_FIELDS, others=stored)


def result_of(connection: Connection, job_id: str) -> Result:
    """The result of a job. Raises `NotFound`."""
    result = store.of_job(connection, job_id)
    if result is None:
        job = reading.job(connection, job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id}")
        raise NotFound(f"job {job_id} is {job.state}: it has no result" + (f" ({job.reason})" if job.reason else ""))
    return result


def _parts(connection: Connection, result: Result) -> JsonObject:
    """The stored values of each task of a result, by its role; the name of a role's second task has its digest too."""
    parts: JsonObject = {}
    for task in reading.tasks_of_job(connection, result.job_id):
        attempts = [each for each in reading.attempts_of(connection, task.id) if each.number == task.attempt]
        part = {
            "task_id": task.id,
            "digest": task.own_digest,
            "kind": task.kind,
            "version": task.version,
            "failed": task.reason if task.state == TaskState.FAILED else None,
            **views.retracted(task),
            "numbers": store.numbers_of(connection, task.id, task.kind),
            "curves": store.curve_names(connection, task.id),
            "bits": store.bit_names(connection, task.id),
            "artifacts": store.artifacts_of(connection, task.id),
            "provenance": attempts[0].provenance if attempts else None,
        }
        for role in reading.roles(result, task):
            name = task.spec["measure"]["type"] if role == "measure" else role
            parts[name if name not in parts else f"{name}:{task.own_digest[:8]}"] = part
    return parts


def _curves(connection: Connection, result: Result, parts: Sequence[str] = ()) -> JsonObject:
    tasks = {role: getattr(result, column.name) for role, column in ROLES.items() if not parts or role in parts}
    curves = {role: store.curves_of(connection, task_id) for role, task_id in tasks.items() if task_id is not None}
    return {role: points for role, points in curves.items() if points}
