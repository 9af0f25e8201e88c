"""The fields by which results can be filtered and sorted. Exports and aggregates name their columns alike."""

from collections.abc import Callable
from dataclasses import replace

from sqlalchemy import and_, case, func, literal, or_, select

from service.model.flags import FLAGS
from service.model.threat_model import ADVERSARIES
from service.specs.measures import MEASURES
from service.specs.numbers import METRICS, filed
from service.specs.parameters import closed_lists, scalars
from service.store import meanings
from service.store.fields import Column, Field, Fields, Kind, Test
from service.store.job_fields import CHECK_OUTCOMES, JOB_ID, LABELS, REASON, VERDICT
from service.store.meanings import Meaning, one_of
from service.store.own_weights import left_out
from service.store.result_tables import cells, results
from service.store.spec_fields import (
    CHECK_NAMES,
    SHORT,
    SPEC_KINDS,
    SPEC_MEANINGS,
    json_value,
    kinds_of,
    list_field,
    measures_field,
    spec_column,
    text_field,
)
from service.store.states import DIGEST
from service.store.tables import attack_results, attempts, job_tasks, jobs, measurements, tasks
from service.store.task_kinds import TASK_KINDS
from service.store.typed import json_flag, json_list, json_number, json_text

JSON_KINDS: dict[str, Callable[..., Column]] = {
    "text": json_text,
    "number": json_number,
    "boolean": json_flag,
    "list": json_list,
}
PROVENANCE: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "code_version",
            "code_revision",
            "code_digest",
            "python",
            "torch",
            "torchvision",
            "timm",
            "numpy",
            "ray",
            "cuda",
            "driver",
            "device",
            "gpu_uuid",
            "gpu_capability",
            "hostname",
            "matmul_precision",
            "convolution_precision",
            "weights_sha256",
            "dataset_sha256",
            "source_weights_sha256",
            "task_digest",
            "task_kind",
            "dataset",
            "precision",
            "cpu_capability",
        ),
        "text",
    ),
    **dict.fromkeys(
        ("code_dirty", "deterministic_algorithms", "cudnn_deterministic", "cudnn_benchmark", "eval_mode"), "boolean"
    ),
    **dict.fromkeys(
        (
            "cudnn",
            "threads",
            "task_version",
            "wall_seconds",
            "cpu_seconds",
            "device_seconds",
            "peak_host_memory_bytes",
            "peak_device_memory_bytes",
            "device_share",
            "device_free_bytes",
            "gpu_memory_bytes",
            "gpu_sm_count",
            "batch_images",
            "seed",
            "attack_seed",
            "pid",
        ),
        "number",
    ),
    "dataset_files_sha256": "list",
}
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


def _of_cell(kind: Kind, expression: Column, meaning: Meaning | None = None) -> Field:
    column = select(expression).where(cells.c.id == results.c.cell_id).correlate(results).scalar_subquery()
    return Field(kind, column, expression, meaning=meaning)


def _cell_field(name: str, kind: Kind) -> Field:
    return _of_cell(kind, spec_column(cells, name, kind), SPEC_MEANINGS.get(name))


def _of_job(kind: Kind, expression: Column) -> Field:
    return Field(kind, select(expression).where(jobs.c.id == results.c.job_id).correlate(results).scalar_subquery())


def _within(make: Callable[[str], Field | None]) -> Callable[[str], Field | None]:
    def within(key: str) -> Field | None:
        of_job = make(key)
        return None if of_job is None else replace(_of_job(of_job.kind, of_job.column), meaning=of_job.meaning)

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
    return list_field(column, meaning) if kind == "list" else Field(kind, column, meaning=meaning)


def _number(name: str) -> Field:
    """The number of this name: of the attack, else of a further measure, else of the closed forms."""
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
    measuring = further.with_only_columns(tasks.c.id)
    from_attack, from_further, from_closed_forms, measured_by = (
        query.correlate(results).scalar_subquery() for query in (of_attack, further, of_closed_forms, measuring)
    )
    task = case(
        (from_attack.is_not(None), results.c.attack_task_id),
        else_=func.coalesce(measured_by, results.c.measure_task_id),
    )
    number = func.coalesce(from_attack, from_further, from_closed_forms)
    return Field("number", number, task=task, measure=case((from_attack.is_(None), measured_by)))


def _of_measure(name: str) -> Field | None:
    """`TYPE.PARAMETER` of a further measure, or its `version`; of two measures, the one whose numbers are shown."""
    kind, _, parameter = name.partition(".")
    parameter_kind = MEASURE_KINDS.get(kind, {}).get(parameter)
    if parameter_kind is None:
        return None
    value: Column = tasks.c.version
    if parameter != "version":
        value = json_value(tasks.c.spec, ("measure", parameter), parameter_kind)
    of_type = tasks.c.spec["measure", "type"].as_string() == kind
    of_job = (job_tasks.c.job_id == results.c.job_id) & (tasks.c.id == job_tasks.c.task_id)
    query = (
        select(value)
        .where(of_job, tasks.c.kind == "measure", of_type)
        .order_by(tasks.c.retracted_at.is_not(None), DIGEST.desc())
        .limit(1)
    )
    meaning = one_of((kind,)) if parameter == "type" else None
    return Field(parameter_kind, query.correlate(results).scalar_subquery(), meaning=meaning)


def _measure_kinds() -> dict[str, dict[str, Kind]]:
    """The parameters of each further measure, and the version of its task."""
    kinds: dict[str, dict[str, Kind]] = {}
    for measure, model in MEASURES.items():
        schema = model.model_json_schema(mode="serialization")
        kinds[measure] = {**kinds_of(scalars(schema)), "version": "integer"}
    return kinds


MEASURE_KINDS = _measure_kinds()
VERSIONS = {f"versions.{kind}": _cell_field(f"versions.{kind}", "integer") for kind in TASK_KINDS}
SPEC: dict[str, Field] = {
    name: Field(kind, results.c[name], meaning=SPEC_MEANINGS.get(name))
    if name in results.c
    else _cell_field(name, kind)
    for name, kind in SPEC_KINDS.items()
}


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
    "masked_n": Field("integer", results.c.masked_n),
    "verdict": text_field(results.c.verdict, VERDICT),
}
TASK_DIGESTS = (tasks.c.digest, tasks.c.former_digest)
ATTACK_DIGEST = select(DIGEST).where(tasks.c.id == results.c.attack_task_id).correlate(results)
RESULTS = Fields(
    {
        "job_id": text_field(results.c.job_id, JOB_ID),
        "user": text_field(results.c.user, meanings.user),
        "owner": text_field(results.c.user, meanings.user),
        "sweep": text_field(results.c.sweep_id, meanings.sweep),
        "sweep_id": text_field(results.c.sweep_id, meanings.sweep),
        **SPEC,
        **{short: SPEC[name] for short, name in SHORT.items()},
        "measures": measures_field(results.c.job_id),
        **THREAT_MODEL,
        **HEADLINE,
        "flags": _flags(),
        "verdict_reasons": list_field(_of_job("list", jobs.c.verdict_reasons).column, REASON),
        "verdict_version": Field("integer", results.c.verdict_version),
        "weights_sha256": text_field(results.c.weights_sha256, meanings.digest),
        "spec_digest": text_field(_of_job("text", jobs.c.spec_digest).column, meanings.digest),
        **VERSIONS,
        "attack_digest": text_field(ATTACK_DIGEST.scalar_subquery(), meanings.digest_of_task(*TASK_DIGESTS)),
        "created_at": Field("time", results.c.created_at),
        "finished_at": Field("time", results.c.finished_at),
        "retracted_at": Field("time", results.c.retracted_at),
        "retracted_by": text_field(results.c.retracted_by, meanings.retracted_by),
        "retraction_reason": Field("text", results.c.retraction_reason),
    },
    {
        "labels": _within(LABELS),
        "verdict_checks": _within(CHECK_OUTCOMES),
        "provenance": _provenance,
        "measures": _of_measure,
    },
    _number,
    ["labels.KEY", *CHECK_NAMES, *(f"provenance.{name}" for name in PROVENANCE), "measures.TYPE.PARAMETER"],
)
