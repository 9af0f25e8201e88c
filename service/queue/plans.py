"""The plans of cells: the tasks that they need, on the data sets and weights of one store, and which of these exist."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from service.errors import InvalidSpec
from service.model.jobs import REOPENED_TASK, TaskState
from service.model.json import JsonObject
from service.model.names import OWN_DATASET
from service.model.pointers import pointer_to
from service.model.records import RegisteredDataset
from service.results.networks import Trained, named
from service.specs import DatasetRef, JobSpec
from service.specs.attacks import Transfer
from service.specs.fitting import Images, misfits
from service.specs.plan import JobPlan, PlannedTask, plan_job, with_arrays
from service.specs.recipes import Imported
from service.store import Connection, datasets
from service.store.joining import ExistingTasks, existing_tasks, retracted_digests


def plans_of(
    connection: Connection,
    cells: Sequence[JobSpec],
    located: Callable[[JobSpec, InvalidSpec], InvalidSpec] | None = None,
) -> list[JobPlan]:
    """The plans of these jobs. Raises `InvalidSpec`; `located` adds the job's position in the request to the error.

    Equal jobs have one plan, even if one leaves out the `samples` that the other states, or names a training by its
    weights that the other spells out. An attack that exists with its arrays is not computed again without arrays.
    """
    own: dict[str, RegisteredDataset] = {}
    weights = _Weights(connection, own)
    plans: dict[JobSpec, tuple[int, JobPlan]] = {}
    errors: dict[int, InvalidSpec] = {}
    # Seed by seed: the jobs of one network share tasks, and `plan_job` remembers only the last ones that it built.
    for index, job in sorted(enumerate(cells), key=lambda cell: (cell[1].seed, cell[1].replicate)):
        try:
            if job.dataset.startswith(OWN_DATASET) and job.dataset not in own:
                own[job.dataset] = _own_dataset(connection, job.dataset)
            dataset = own.get(job.dataset)
            whole, imported = weights.resolve(_sampled(job, dataset))
            first, plan = plans.get(whole) or (index, plan_job(whole, _reference(job.dataset, dataset), imported))
            plans[whole] = min(first, index), plan
        except InvalidSpec as error:
            errors[index] = error
    if errors:
        index = min(errors)
        raise errors[index] if located is None else located(cells[index], errors[index])
    in_order = sorted(plans.values(), key=lambda numbered: numbered[0])
    return _with_existing_arrays(connection, [plan for _, plan in in_order])


def distinct_tasks(plans: Sequence[JobPlan]) -> dict[str, PlannedTask]:
    return {digest: task for plan in plans for digest, task in plan.tasks.items()}


def counted(
    jobs: int, needed: Mapping[str, PlannedTask], existing: ExistingTasks, *, repetitions: int = 0
) -> JsonObject:
    """The counts of cells, of dropped repetitions, and of distinct tasks by kind: all, known, under way, to compute."""
    kinds: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "known", "under_way", "to_compute")}
    for digest, task in needed.items():
        kinds["tasks"][task.spec.kind] += 1
        kinds["to_compute"][task.spec.kind] += 0
        kinds[standing(digest, existing)][task.spec.kind] += 1
    return {"jobs": jobs, "repetitions": repetitions, **{name: dict(counts) for name, counts in kinds.items()}}


def standing(digest: str, existing: ExistingTasks) -> str:
    """Whether a task is `known`, `under_way` or still `to_compute`; one that failed is computed again."""
    _, state = existing.get(digest, ("", TaskState.FAILED))
    if state in REOPENED_TASK:
        return "to_compute"
    return "known" if state is TaskState.SUCCEEDED else "under_way"


def _with_existing_arrays(connection: Connection, plans: Sequence[JobPlan]) -> list[JobPlan]:
    """The plans, with each attack replaced by the same attack with arrays if only that one exists or is planned.

    Both have the same numbers, so an attack that exists with arrays, or that another of these plans needs with arrays,
    is not computed again without arrays. A retracted attack is computed again: the one with arrays is just as wrong.
    """
    attacks = {task.digest: task for plan in plans for task in (plan.attack, plan.baseline)}
    existing = existing_tasks(connection, attacks)
    lacking = [task for digest, task in attacks.items() if standing(digest, existing) == "to_compute"]
    counterparts = {task.digest: with_arrays(task) for task in lacking}
    existing = existing_tasks(connection, [counterpart.digest for counterpart in counterparts.values()])
    computed = {digest for digest in existing if standing(digest, existing) != "to_compute"} | attacks.keys()
    counterparts = {
        digest: counterpart
        for digest, counterpart in counterparts.items()
        if counterpart.digest != digest and counterpart.digest in computed
    }
    if not counterparts:
        return list(plans)
    for digest in retracted_digests(connection, counterparts):
        del counterparts[digest]
    return [
        replace(
            plan,
            attack=counterparts.get(plan.attack.digest, plan.attack),
            baseline=counterparts.get(plan.baseline.digest, plan.baseline),
        )
        for plan in plans
    ]


class _Weights:
    """The checkpoints that jobs name, each looked up once."""

    def __init__(self, connection: Connection, own: Mapping[str, RegisteredDataset]) -> None:
        self._connection, self._own = connection, own
        self._looked_up: dict[tuple[str, str, str, int], Trained | Imported] = {}

    def resolve(self, job: JobSpec) -> tuple[JobSpec, dict[str, Imported]]:
        """The job, with each training that it names by its weights spelled out, and the weights that it imports.

        A job can name weights for its own network and for the network that a transfer's images come from.
        """
        imported: dict[str, Imported] = {}
        attack, recipe = job.attack, job.recipe
        source = attack.source if isinstance(attack, Transfer) else None
        if isinstance(recipe, Imported):
            job = job.model_copy(
                update=self._training(job, recipe, job.architecture, job.replicate, "recipe", imported)
            )
        if source is not None and isinstance(made_by := source.recipe or recipe, Imported):
            training = self._training(job, made_by, source.architecture, source.replicate, "attack", imported)
            source = source.model_copy(update={"recipe": made_by, **training})
            job = job.model_copy(update={"attack": attack.model_copy(update={"source": source})})
        return job, imported

    def _training(
        self,
        job: JobSpec,
        recipe: Imported,
        architecture: str,
        replicate: int,
        field: str,
        imported: dict[str, Imported],
    ) -> JsonObject:
        """The fields that replace a recipe which names a training by its weights; weights of no training are added to
        `imported` instead.
        """
        if recipe.checkpoint is None or recipe != Imported(checkpoint=recipe.checkpoint):
            sentence = "name a registered checkpoint, or weights by their SHA-256, and nothing else of it"
            raise InvalidSpec([(f"/{field}", sentence)])
        key = (recipe.checkpoint, architecture, job.dataset, replicate)
        if key not in self._looked_up:
            dataset = _reference(job.dataset, self._own.get(job.dataset))
            try:
                self._looked_up[key] = named(self._connection, recipe.checkpoint, job, architecture, dataset, replicate)
            except ValueError as error:
                raise InvalidSpec([(f"/{field}", str(error))]) from None
        weights = self._looked_up[key]
        if isinstance(weights, Trained):
            return vars(weights)
        imported[recipe.checkpoint] = weights
        return {}


def _own_dataset(connection: Connection, name: str) -> RegisteredDataset:
    """The registration of a lab's data set. Its files are not read when jobs are submitted."""
    dataset = datasets.named(connection, name)
    if dataset is None:
        registered = ", ".join(datasets.some_names(connection)) or "none"
        sentence = f"{name} is not registered (registered: {registered}): `uncanny data add NAME DIR`"
        raise InvalidSpec([("/dataset", sentence)])
    return dataset


def _sampled(job: JobSpec, dataset: RegisteredDataset | None) -> JobSpec:
    """The job with at most as many samples as its lab's data set has, unless it states their number itself.

    Raises `InvalidSpec` if it states too many, or does not suit these images.
    """
    if dataset is None:
        return job
    images = Images(dataset.shape, dataset.classes, dataset.train_count)
    if errors := misfits(job.architecture, job.recipe, job.attack, images):
        raise InvalidSpec([(pointer_to(*path), sentence) for path, sentence in errors])
    if job.samples <= dataset.test_count:
        return job
    if "samples" in job.model_fields_set:
        sentence = f"{job.dataset} has {dataset.test_count} test images, {job.samples} were asked for"
        raise InvalidSpec([("/samples", sentence)])
    return job.model_copy(update={"samples": dataset.test_count})


def _reference(name: str, dataset: RegisteredDataset | None) -> DatasetRef:
    if dataset is None:
        return DatasetRef(name=name)
    return DatasetRef(name=name, train_sha256=dataset.train_sha256, test_sha256=dataset.test_sha256)
