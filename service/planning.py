"""What cells need, on the data sets of one store, and how much of it is there."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from service.checkpoints import weights_of
from service.errors import InvalidSpec
from service.jobs import TaskState
from service.plan import JobPlan, PlannedTask, plan_job
from service.specs import DatasetRef, JobSpec
from service.specs.attacks import Transfer
from service.specs.fitting import Images, misfits
from service.specs.recipes import Imported
from service.store.tables import datasets

OWN = "npz:"  # in front of the names of a lab's own data sets
REOPENED = (TaskState.FAILED, TaskState.CANCELLED)
Known = Mapping[str, tuple[str, TaskState]]
"""`digest -> (task id, state)`, as `submitting.known_tasks` says it."""


def plans_of(
    connection: Connection,
    cells: Sequence[JobSpec],
    located: Callable[[JobSpec, InvalidSpec], InvalidSpec] | None = None,
) -> list[JobPlan]:
    """What the jobs need. Raises `InvalidSpec`; `located` says where in the request a job is that cannot be had so.

    Two jobs that are the same once the `samples` that one of them leaves out are known have one plan.
    """
    own: dict[str, Row[Any]] = {}
    weights: dict[tuple[str, str, str], str] = {}
    plans: dict[JobSpec, JobPlan] = {}
    for job in cells:
        try:
            if job.dataset.startswith(OWN) and job.dataset not in own:
                own[job.dataset] = _own_dataset(connection, job.dataset)
            row = own.get(job.dataset)
            whole = _sampled(job, row)
            if whole not in plans:
                named = _weights(connection, whole, weights, "/{}".format)
                plans[whole] = plan_job(whole, _reference(job.dataset, row), named)
        except InvalidSpec as error:
            raise error if located is None else located(job, error) from None
    return list(plans.values())


def distinct_tasks(plans: Sequence[JobPlan]) -> dict[str, PlannedTask]:
    return {digest: task for plan in plans for digest, task in plan.tasks.items()}


def counted(jobs: int, needed: Mapping[str, PlannedTask], known: Known, *, repetitions: int = 0) -> dict[str, Any]:
    """Cells, dropped repetitions, distinct tasks by kind, and how many are known, under way, to be computed."""
    kinds: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "known", "under_way", "to_compute")}
    for digest, task in needed.items():
        kinds["tasks"][task.spec.kind] += 1
        kinds["to_compute"][task.spec.kind] += 0
        kinds[standing(digest, known)][task.spec.kind] += 1
    return {"jobs": jobs, "repetitions": repetitions, **{name: dict(counts) for name, counts in kinds.items()}}


def standing(digest: str, known: Known) -> str:
    """Whether a task is `known`, `under_way` or still `to_compute`; one that failed is computed again."""
    _, state = known.get(digest, ("", TaskState.FAILED))
    if state in REOPENED:
        return "to_compute"
    return "known" if state is TaskState.SUCCEEDED else "under_way"


def _weights(
    connection: Connection, job: JobSpec, known: dict[tuple[str, str, str], str], pointer: Callable[[str], str]
) -> dict[str, str]:
    """The SHA-256 of each checkpoint that the job names: its own, and the one that a transfer's images come from."""
    source = job.attack.source if isinstance(job.attack, Transfer) else None
    networks = [(job.recipe, job.architecture, "recipe")]
    if source is not None:
        networks.append((source.recipe or job.recipe, source.architecture, "attack"))
    named: dict[str, str] = {}
    for recipe, architecture, field in networks:
        if isinstance(recipe, Imported):
            if recipe.checkpoint is None or recipe.weights_sha256 is not None:
                raise InvalidSpec([(pointer(field), "name a registered checkpoint, and nothing else of it")])
            key = (recipe.checkpoint, architecture, job.dataset)
            if key not in known:
                try:
                    known[key] = weights_of(connection, *key)
                except ValueError as error:
                    raise InvalidSpec([(pointer(field), str(error))]) from None
            named[recipe.checkpoint] = known[key]
    return named


def _own_dataset(connection: Connection, name: str) -> Row[Any]:
    """The row that a data set's name stands for; nothing else of it is read when jobs are submitted."""
    row = connection.execute(select(datasets).where(datasets.c.name == name.removeprefix(OWN))).one_or_none()
    if row is None:
        known = ", ".join(f"{OWN}{other}" for other in connection.scalars(select(datasets.c.name).limit(20))) or "none"
        sentence = f"{name} is not registered (registered: {known}): `uncanny data add NAME DIR`"
        raise InvalidSpec([("/dataset", sentence)])
    return row


def _sampled(job: JobSpec, row: Row[Any] | None) -> JobSpec:
    """The job with as many samples as its own data set has, where it says nothing of them; for images that it suits."""
    if row is None:
        return job
    images = Images((row.channels, row.height, row.width), row.classes)
    if found := misfits(job.architecture, job.attack, images):
        raise InvalidSpec([("/" + "/".join(path), sentence) for path, sentence in found])
    if job.samples <= row.test_count:
        return job
    if "samples" in job.model_fields_set:
        sentence = f"{job.dataset} has {row.test_count} test images, {job.samples} were asked for"
        raise InvalidSpec([("/samples", sentence)])
    return job.model_copy(update={"samples": row.test_count})


def _reference(name: str, row: Row[Any] | None) -> DatasetRef:
    files = {} if row is None else {"train_sha256": row.train_sha256, "test_sha256": row.test_sha256}
    return DatasetRef(name=name, **files)
