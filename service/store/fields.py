"""What jobs and results can be asked about: a name as in a result row, its kind, and the SQL that it stands for."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import BigInteger, Connection, and_, case, cast, exists, func, literal, or_, select
from sqlalchemy.sql import ColumnElement

from service.errors import InvalidQuery
from service.model.dotted import or_rather
from service.model.flags import FLAGS
from service.model.jobs import JobState
from service.model.query import LABEL, plain
from service.model.threat_model import ADVERSARIES
from service.model.verdict import CHECKS, OUTCOMES, REASONS, VERDICTS
from service.specs.measures import FURTHER_MEASURES, MEASURES
from service.specs.numbers import METRICS, filed
from service.specs.parameters import closed_lists, parameters, scalars
from service.specs.versions import LATER
from service.store import meanings
from service.store.listed import elements
from service.store.meanings import Meaning, one_of
from service.store.own_weights import left_out
from service.store.result_tables import cells, number_names, results
from service.store.states import DIGEST
from service.store.tables import attack_results, attempts, job_tasks, jobs, measurements, tasks
from service.store.task_kinds import TASK_KINDS
from service.store.typed import json_flag, json_list, json_number, json_text

Column = ColumnElement[Any]
Kind = Literal["text", "number", "integer", "boolean", "time", "list"]
Test = Callable[[Column], Column]
KINDS: dict[str, Kind] = {"number": "number", "integer": "integer", "boolean": "boolean", "string": "text"}
UNQUOTABLE = re.compile(r'[\x00-\x1f\x7f"\\]')
JSON_KINDS: dict[str, Callable[..., Column]] = {
    "text": json_text, "number": json_number, "boolean": json_flag, "list": json_list,
}  # fmt: skip
DIGITS = 18  # of an integer that every database holds


@dataclass(frozen=True)
class Field:
    """A scalar SQL expression of each row, null where the row has no such value.

    `of_cell` is the same of the row's cell, where it is the same for all of its seeds; `any_of`, of a list, whether
    any element passes a test; `task`, of a number, the id of the task that computed it, where that is not the attack,
    and `measure` the id of that task where it is a measure that the job asked for beyond the closed forms. `meaning`,
    of texts, is what a value stands for where only some can be.
    """

    kind: Kind
    column: Column
    of_cell: Column | None = None
    any_of: Callable[[Test], Column] | None = None
    task: Column | None = None
    measure: Column | None = None
    meaning: Meaning | None = None


@dataclass(frozen=True)
class Fields:
    """Fields by name: those that are always there, families of them (`labels.KEY`), and stored numbers."""

    known: Mapping[str, Field]
    families: Mapping[str, Callable[[str], Field | None]] = field(default_factory=dict)
    number: Callable[[str], Field] | None = None

    def find(self, connection: Connection, name: str, parameter: str, position: int | None = None) -> Field:
        """Raises `InvalidQuery` for a name that there is not, with those that are nearest."""
        name = plain(name)
        if name in self.known:
            return self.known[name]
        family, _, key = name.partition(".")
        found = self.families[family](key) if key and family in self.families else None
        if found is not None:
            return found
        if self.number is not None:
            names = stored_numbers(connection)
            if name in names:
                return self.number(name)
            raise unknown(parameter, name, [*self.known, *self._of_families()], position, others=names)
        raise unknown(parameter, name, [*self.known, *self._of_families()], position)

    def _of_families(self) -> list[str]:
        shown = {
            "provenance": [f"provenance.{name}" for name in PROVENANCE],
            "verdict_checks": [f"verdict_checks.{name}" for name in CHECKS],
            "measures": ["measures.TYPE.PARAMETER"],
        }
        return [name for family in self.families for name in shown.get(family, [f"{family}.KEY"])]


def unknown(
    parameter: str, name: str, known: Sequence[str], position: int | None = None, others: Sequence[str] = ()
) -> InvalidQuery:
    """That there is no such field, and which are near; `others` are too many to be listed."""
    return InvalidQuery(parameter, f"unknown field {name!r}{or_rather(name, known, others)}", position)


def stored_numbers(connection: Connection) -> list[str]:
    """The names of all numbers that attacks and measures have left, beside those with a column of their own."""
    query = select(number_names.c.name).distinct().order_by(number_names.c.name)
    return [name for name in connection.scalars(query) if name not in METRICS]


def _kinds(types: Mapping[str, str]) -> dict[str, Kind]:
    return {name: KINDS[kind] for name, kind in types.items()}


SPEC_KINDS = _kinds(parameters())
SPEC_MEANINGS: dict[str, Meaning] = {
    "dataset": meanings.dataset, **{name: one_of(texts) for name, texts in closed_lists().items()},
    **{
        f"{outer}recipe.{name}": meaning for outer in ("", "attack.source.")
        for name, meaning in (("checkpoint", meanings.checkpoint), ("weights_sha256", meanings.digest))
    },
}  # fmt: skip
SHORT = {"attack": "attack.type", "norm": "attack.norm", "recipe": "recipe.name"}
COLUMNS = {"attack.type": "attack", "attack.norm": "norm", "attack.eps": "eps", "recipe.name": "recipe"}
PROVENANCE: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "code_version", "code_revision", "code_digest", "python", "torch", "torchvision", "timm", "numpy", "ray",
            "cuda", "driver", "device", "gpu_uuid", "gpu_capability", "hostname", "matmul_precision",
            "convolution_precision", "weights_sha256", "dataset_sha256",
            "source_weights_sha256",
            "task_digest", "task_kind", "dataset", "precision", "cpu_capability",
        ),
        "text",
    ),
    **dict.fromkeys(
        ("code_dirty", "deterministic_algorithms", "cudnn_deterministic", "cudnn_benchmark", "eval_mode"), "boolean"
    ),
    **dict.fromkeys(
        (
            "cudnn", "threads", "task_version", "wall_seconds", "cpu_seconds", "device_seconds",
            "peak_host_memory_bytes", "peak_device_memory_bytes", "device_share", "device_free_bytes",
            "gpu_memory_bytes", "gpu_sm_count", "batch_images", "seed", "attack_seed", "pid",
        ),
        "number",
    ),
    "dataset_files_sha256": "list",
}  # fmt: skip
PRECISIONS = dict.fromkeys(closed_lists()["recipe.precision"] + closed_lists()["attack.precision"])
DIGESTS = (
    "code_digest",
    "task_digest",
    "weights_sha256",
    "source_weights_sha256",
    "dataset_sha256",
    "dataset_files_sha256",
)
PROVENANCE_MEANINGS: dict[str, Meaning] = {
    "dataset": meanings.dataset,
    "task_kind": one_of(TASK_KINDS),
    "precision": one_of(PRECISIONS),
    **dict.fromkeys(DIGESTS, meanings.digest),
}


def _json(column: Any, path: tuple[str, ...], kind: Kind) -> Column:
    value: Any = column[path]
    match kind:
        case "number":
            found: Column = value.as_float()
        case "integer":  # one that is too long would make a cast, and so every question of this field, fail
            text = value.as_string()
            found = case((func.length(text) <= DIGITS, cast(text, BigInteger)))
        case "boolean":
            found = value.as_boolean()
        case _:
            found = value.as_string()
    return found


def _of_cell(kind: Kind, expression: Column, meaning: Meaning | None = None) -> Field:
    here = select(expression).where(cells.c.id == results.c.cell_id).correlate(results).scalar_subquery()
    return Field(kind, here, expression, meaning=meaning)


def _of_spec(table: Any, name: str, kind: Kind) -> Column:
    column = COLUMNS.get(name, name)
    if column in table.c:
        found: Column = table.c[column]
        return found
    value = _json(table.c.spec, tuple(name.split(".")), kind)
    return func.coalesce(value, LATER[name]) if name in LATER else value


def _cell_field(name: str, kind: Kind) -> Field:
    return _of_cell(kind, _of_spec(cells, name, kind), SPEC_MEANINGS.get(name))


def _job_spec_field(name: str, kind: Kind) -> Field:
    return Field(kind, _of_spec(jobs, name, kind), meaning=SPEC_MEANINGS.get(name))


def _of_job(kind: Kind, expression: Column) -> Field:
    return Field(kind, select(expression).where(jobs.c.id == results.c.job_id).correlate(results).scalar_subquery())


def _measures(job_id: Column) -> Field:
    kind = tasks.c.spec["measure", "type"].as_string()

    def any_of(test: Test) -> Column:
        theirs = (job_tasks.c.job_id == job_id) & (tasks.c.id == job_tasks.c.task_id) & (tasks.c.kind == "measure")
        return exists(select(literal(1)).where(theirs, kind != "closed_forms", test(kind)))

    return Field("list", literal(None), any_of=any_of, meaning=one_of(FURTHER_MEASURES))


def _list(array: Column, meaning: Meaning | None = None) -> Field:
    def any_of(test: Test) -> Column:
        rows = elements(array)
        return exists(select(literal(1)).select_from(rows).where(test(rows.c.value)))

    return Field("list", array, any_of=any_of, meaning=meaning)


def _text_of(column: Column) -> Callable[[str], Field | None]:
    """By a key of that JSON object; some keys it cannot have, and a path in JSON could not name them.

    Rows of before have keys in escapes, which SQLite does not undo.
    """

    def text_of(key: str) -> Field | None:
        if UNQUOTABLE.search(key):
            return None
        forms = dict.fromkeys((key, json.dumps(key)[1:-1]))
        found = [json_text(column, literal(form)) for form in forms]
        return Field("text", found[0] if len(found) == 1 else func.coalesce(*found))

    return text_of


def _check_of(column: Column) -> Callable[[str], Field | None]:
    text_of = _text_of(column)

    def check_of(key: str) -> Field | None:
        found = text_of(key) if key in CHECKS else None
        return None if found is None else replace(found, meaning=one_of(OUTCOMES))

    return check_of


def _within(make: Callable[[str], Field | None]) -> Callable[[str], Field | None]:
    def within(key: str) -> Field | None:
        found = make(key)
        return None if found is None else replace(_of_job(found.kind, found.column), meaning=found.meaning)

    return within


def _provenance(key: str) -> Field | None:
    kind = PROVENANCE.get(key)
    if kind is None:
        return None
    value = JSON_KINDS[kind](attempts.c.provenance, literal(key))
    made = (tasks.c.id == results.c.attack_task_id) & (attempts.c.task_id == tasks.c.id)
    query = select(value).where(made, attempts.c.number == tasks.c.attempt).correlate(results)
    column = query.scalar_subquery()
    meaning = PROVENANCE_MEANINGS.get(key)
    return _list(column, meaning) if kind == "list" else Field(kind, column, meaning=meaning)


def _number(name: str) -> Field:
    """Of the attack, else of a measure that the job asked for, else of the closed forms."""
    attack = json_number(attack_results.c.numbers, literal(name))
    measure = json_number(measurements.c.numbers, literal(name))
    further = (
        select(measure)
        .join(job_tasks, job_tasks.c.task_id == measurements.c.task_id)
        .join(tasks, tasks.c.id == measurements.c.task_id)
        .where(job_tasks.c.job_id == results.c.job_id, tasks.c.id != results.c.measure_task_id, measure.is_not(None))
        .where(tasks.c.retracted_at.is_(None), ~left_out(tasks.c.id))
        .order_by(DIGEST.desc())
        .limit(1)
    )
    of_attack = select(attack).where(attack_results.c.task_id == results.c.attack_task_id)
    closed_forms = results.c.measure_task_id
    of_closed_forms = select(measure).where(measurements.c.task_id == closed_forms, ~left_out(closed_forms))
    whose = further.with_only_columns(tasks.c.id)
    from_attack, from_further, from_closed_forms, measured_by = (
        query.correlate(results).scalar_subquery() for query in (of_attack, further, of_closed_forms, whose)
    )
    task = case(
        (from_attack.is_not(None), results.c.attack_task_id),
        else_=func.coalesce(measured_by, results.c.measure_task_id),
    )
    number = func.coalesce(from_attack, from_further, from_closed_forms)
    return Field("number", number, task=task, measure=case((from_attack.is_(None), measured_by)))


def _of_measure(name: str) -> Field | None:
    """`TYPE.PARAMETER` of a further measure, or its `version`; of two, those of the one whose numbers are shown."""
    kind, _, parameter = name.partition(".")
    found = MEASURE_KINDS.get(kind, {}).get(parameter)
    if found is None:
        return None
    value = tasks.c.version if parameter == "version" else _json(tasks.c.spec, ("measure", parameter), found)
    of_type = tasks.c.spec["measure", "type"].as_string() == kind
    theirs = (
        (job_tasks.c.job_id == results.c.job_id) & (tasks.c.id == job_tasks.c.task_id) & (tasks.c.kind == "measure")
    )
    query = select(value).where(theirs, of_type).order_by(tasks.c.retracted_at.is_not(None), DIGEST.desc()).limit(1)
    meaning = one_of((kind,)) if parameter == "type" else None
    return Field(found, query.correlate(results).scalar_subquery(), meaning=meaning)


def _measure_kinds() -> dict[str, dict[str, Kind]]:
    """The parameters of each further measure, and the version of its task."""
    found: dict[str, dict[str, Kind]] = {}
    for kind, model in MEASURES.items():
        schema = model.model_json_schema(mode="serialization")
        found[kind] = {**_kinds(scalars(schema)), "version": "integer"}
    return found


MEASURE_KINDS = _measure_kinds()


def _named(column: Column, meaning: Meaning) -> Field:
    return Field("text", column, meaning=meaning)


# The short names stand for the dotted ones; ids may be given by their beginning, a `sweep` also by its name.
LABEL_OF_JOB, CHECK_OF_JOB = _text_of(jobs.c.labels), _check_of(jobs.c.verdict_checks)
JOB_ID = meanings.id_of("job", jobs.c.id)
VERDICT, REASON = one_of(VERDICTS), one_of(REASONS)
JOB_SPEC = {name: _job_spec_field(name, kind) for name, kind in SPEC_KINDS.items()}
JOBS = Fields(
    {
        "id": _named(jobs.c.id, JOB_ID),
        "state": _named(jobs.c.state, one_of(tuple(JobState))),
        "user": _named(jobs.c.user, meanings.user), "owner": _named(jobs.c.user, meanings.user),
        "sweep": _named(jobs.c.sweep_id, meanings.sweep), **JOB_SPEC,
        **{short: JOB_SPEC[name] for short, name in SHORT.items()}, "measures": _measures(jobs.c.id),
        "priority": Field("integer", jobs.c.priority), "reason": Field("text", jobs.c.reason),
        "verdict": _named(jobs.c.verdict, VERDICT), "verdict_reasons": _list(jobs.c.verdict_reasons, REASON),
        "spec_digest": _named(jobs.c.spec_digest, meanings.digest),
        "created_at": Field("time", jobs.c.created_at), "finished_at": Field("time", jobs.c.finished_at),
    },
    {"labels": LABEL_OF_JOB, "verdict_checks": CHECK_OF_JOB},
)  # fmt: skip

VERSIONS = {f"versions.{kind}": _cell_field(f"versions.{kind}", "integer") for kind in TASK_KINDS}
SPEC: dict[str, Field] = {
    name: Field(kind, results.c[name], meaning=SPEC_MEANINGS.get(name))
    if name in results.c
    else _cell_field(name, kind)
    for name, kind in SPEC_KINDS.items()
}  # fmt: skip


def _flags() -> Field:
    def any_of(test: Test) -> Column:
        return or_(*(and_(results.c[name], test(literal(name))) for name in FLAGS))

    return Field("list", literal(None), any_of=any_of, meaning=one_of(FLAGS))


THREAT_MODEL = {
    "threat_model": _of_cell("text", cells.c.threat_model, meanings.threat_model),
    "adversary": _of_cell(
        "text", case(dict(ADVERSARIES), value=cells.c.attack), one_of(dict.fromkeys(ADVERSARIES.values()))
    ),
}
COMPUTED_BY = {
    **dict.fromkeys(filed("measure"), results.c.measure_task_id),
    **dict.fromkeys(filed("train"), results.c.train_task_id),
}
HEADLINE: dict[str, Field] = {
    **{name: Field("number", results.c[name], task=COMPUTED_BY.get(name)) for name in METRICS},
    "masked_n": Field("integer", results.c.masked_n), "verdict": _named(results.c.verdict, VERDICT),
}  # fmt: skip
TASK_DIGESTS = (tasks.c.digest, tasks.c.former_digest)
ATTACK_DIGEST = select(DIGEST).where(tasks.c.id == results.c.attack_task_id).correlate(results)
RESULTS = Fields(
    {
        "job_id": _named(results.c.job_id, JOB_ID),
        "user": _named(results.c.user, meanings.user),
        "owner": _named(results.c.user, meanings.user), "sweep": _named(results.c.sweep_id, meanings.sweep),
        "sweep_id": _named(results.c.sweep_id, meanings.sweep), **SPEC,
        **{short: SPEC[name] for short, name in SHORT.items()},
        "measures": _measures(results.c.job_id), **THREAT_MODEL, **HEADLINE,
        "flags": _flags(),
        "verdict_reasons": _list(_of_job("list", jobs.c.verdict_reasons).column, REASON),
        "verdict_version": Field("integer", results.c.verdict_version),
        "weights_sha256": _named(results.c.weights_sha256, meanings.digest),
        "spec_digest": _named(_of_job("text", jobs.c.spec_digest).column, meanings.digest), **VERSIONS,
        "attack_digest": _named(ATTACK_DIGEST.scalar_subquery(), meanings.digest_of_task(*TASK_DIGESTS)),
        "created_at": Field("time", results.c.created_at), "finished_at": Field("time", results.c.finished_at),
        "retracted_at": Field("time", results.c.retracted_at),
        "retracted_by": _named(results.c.retracted_by, meanings.retracted_by),
        "retraction_reason": Field("text", results.c.retraction_reason),
    },
    {
        "labels": _within(LABEL_OF_JOB), "verdict_checks": _within(CHECK_OF_JOB), "provenance": _provenance,
        "measures": _of_measure,
    },
    _number,
)  # fmt: skip

__all__ = ["HEADLINE", "JOBS", "LABEL", "RESULTS", "SPEC", "Column", "Field", "Fields", "stored_numbers", "unknown"]
