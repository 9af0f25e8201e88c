"""From a job to the tasks it needs: a pure function of the spec and of the data set's row."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from service.model.json import JsonObject
from service.specs import AttackTask, ControlTask, DatasetRef, JobSpec, MeasureTask, Task, TrainTask, digest
from service.specs.attacks import AnyAttack, Apgd, Attack, Numerics, Pgd, Transfer
from service.specs.base import Order
from service.specs.measures import ClosedForms, Measure
from service.specs.recipes import AnyRecipe, Imported
from service.specs.versions import version_of, version_of_attack

PANEL_SAMPLES = 256  # science/README.md, "Controls"
REMEMBERED = 256  # tasks of each kind, two kilobytes each: building one again takes a few hundredths of a millisecond


@dataclass(frozen=True)
class PlannedTask:
    """A task spec with its digest, and the digest of the training whose checkpoint it works on (its own, for one)."""

    digest: str
    train_digest: str
    spec: Task

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the trainings that must succeed before this task can start."""
        if self.spec.kind == "train":
            return ()
        source = getattr(self.spec, "source", None)
        return (self.train_digest,) if source is None else (self.train_digest, source)

    @property
    def stored_spec(self) -> JsonObject:
        """The spec, fully spelled out, as plain JSON."""
        return self.spec.model_dump(mode="json")

    @cached_property
    def spec_json(self) -> str:
        """The stored spec as text."""
        return self.spec.model_dump_json()


@dataclass(frozen=True)
class JobPlan:
    """The tasks of one job by their role.

    For the verdict: `baseline`, the same attack at s = 1, and `control`, the panel; None if there is no ball.
    `source` is the training of the network that a transfer's examples come from; None if it is no other network.
    """

    job: JobSpec
    train: PlannedTask
    closed_forms: PlannedTask
    measures: tuple[PlannedTask, ...]
    attack: PlannedTask
    baseline: PlannedTask
    control: PlannedTask | None
    source: PlannedTask | None

    @property
    def tasks(self) -> dict[str, PlannedTask]:
        """All tasks, each once, parents before children, by digest."""
        parts = (self.train, self.source, self.attack, self.baseline, self.control, self.closed_forms, *self.measures)
        return {task.digest: task for task in parts if task is not None}


def plan_job(job: JobSpec, dataset: DatasetRef, weights: Mapping[str, Imported] | None = None) -> JobPlan:
    """All tasks that `job` needs; `dataset` is the row that its data set's name stands for.

    `weights` has, for each checkpoint that the job names, its weights and the accuracy expected of them.
    """
    train = _network(job.architecture, dataset, job.augmented(job.recipe), job.seed, job.replicate, weights or {})
    attack, source = job.attack, None
    if isinstance(attack, Transfer) and (origin := attack.source) is not None:
        recipe = job.augmented(origin.recipe or job.recipe)
        source = _network(origin.architecture, dataset, recipe, origin.seed, origin.replicate, weights or {})
        attack = attack.model_copy(update={"source": None})
    where, chosen = (job.attack_seed, job.samples, job.order), (job.samples, job.order)
    made_on = source.digest if source is not None and source.digest != train.digest else None
    return JobPlan(
        job,
        train,
        _measure(train.digest, ClosedForms(), job.scale, job.scale_bias, *chosen),
        tuple(_measure(train.digest, measure, job.scale, job.scale_bias, *chosen) for measure in job.measures),
        _attack(train.digest, attack, job.scale, job.scale_bias, *where, made_on, job.arrays),
        _attack(train.digest, attack, 1.0, job.scale_bias, *where, made_on, job.arrays),
        _control(train.digest, attack, min(job.samples, PANEL_SAMPLES), job.order),
        source,
    )


def _network(
    architecture: str,
    dataset: DatasetRef,
    recipe: AnyRecipe,
    seed: int,
    replicate: int,
    weights: Mapping[str, Imported],
) -> PlannedTask:
    """The training of a network. For imported weights neither their name nor a seed matters."""
    if isinstance(recipe, Imported):
        recipe, seed = weights[recipe.checkpoint or ""], 0
    return training(architecture, dataset, recipe, seed, replicate)


# The jobs of a sweep share most of their tasks, so each is built and hashed once.


@lru_cache(maxsize=REMEMBERED)
def training(architecture: str, dataset: DatasetRef, recipe: AnyRecipe, seed: int, replicate: int) -> PlannedTask:
    """A train task; its recipe has the augmentation spelled out."""
    spec = TrainTask(
        version=version_of("train", recipe.name),
        architecture=architecture,
        dataset=dataset,
        recipe=recipe,
        seed=seed,
        replicate=replicate,
    )
    own = digest(spec)
    return PlannedTask(own, own, spec)


@lru_cache(maxsize=REMEMBERED)
def _measure(
    checkpoint: str, measure: Measure, scale: float, scale_bias: bool, samples: int, order: Order
) -> PlannedTask:
    # A measure with images of its own does not depend on the job's samples.
    samples = getattr(measure, "images", samples)
    spec = MeasureTask(
        version=version_of("measure", measure.type),
        checkpoint=checkpoint,
        measure=measure,
        scale=scale,
        scale_bias=_bias(scale, scale_bias),
        samples=samples,
        order=order,
    )
    return PlannedTask(digest(spec), checkpoint, spec)


@lru_cache(maxsize=REMEMBERED)
def _attack(
    checkpoint: str,
    attack: Attack,
    scale: float,
    scale_bias: bool,
    seed: int,
    samples: int,
    order: Order,
    source: str | None,
    arrays: bool,
) -> PlannedTask:
    if getattr(attack, "source_scale", 1.0) == 1.0:  # else the bias of a transfer's source is scaled, or is not
        scale_bias = _bias(scale, scale_bias)
    spec = AttackTask(
        version=version_of_attack(attack.model_dump()),
        checkpoint=checkpoint,
        attack=attack,
        scale=scale,
        scale_bias=scale_bias,
        attack_seed=seed,
        samples=samples,
        order=order,
        source=source,
        arrays=arrays,
    )
    return PlannedTask(digest(spec), checkpoint, spec)


def with_arrays(attack: PlannedTask) -> PlannedTask:
    """The same attack, with the same numbers, which keeps the trajectory of every example."""
    spec = attack.spec.model_copy(update={"arrays": True})
    return PlannedTask(digest(spec), attack.train_digest, spec)


@lru_cache(maxsize=REMEMBERED)
def _control(checkpoint: str, attack: AnyAttack, samples: int, order: Order) -> PlannedTask | None:
    """The panel in the attack's ball: with its own steps if it is PGD, else with ten of a quarter of eps.

    None for an attack without a ball, or with a ball of radius 0.
    """
    if isinstance(attack, Transfer):
        return _control(checkpoint, attack.attack, samples, order)
    norm, eps = getattr(attack, "norm", None), getattr(attack, "eps", 0.0)
    if norm is None or eps == 0 or getattr(attack, "kind", "uniform") == "gaussian":
        return None
    step_size, steps = (attack.step_size, attack.steps) if isinstance(attack, Pgd) else (eps / 4, 10)
    spec = ControlTask(
        version=version_of("control"),
        checkpoint=checkpoint,
        norm=norm,
        eps=eps,
        step_size=step_size,
        steps=steps,
        samples=samples,
        order=order,
        twin=_twin(attack, step_size, steps),
    )
    return PlannedTask(digest(spec), checkpoint, spec)


def _twin(attack: AnyAttack, step_size: float, steps: int) -> Pgd | Apgd | None:
    """The attack with the margin loss; None if that is PGD from the image, which the panel runs anyway."""
    if not isinstance(attack, Pgd | Apgd):
        return None
    twin = attack.model_copy(update={"loss": "margin", **Numerics().model_dump()})
    plain = Pgd(norm=attack.norm, eps=attack.eps, step_size=step_size, steps=steps, loss="margin")
    return None if twin == plain else twin


def _bias(scale: float, scale_bias: bool) -> bool:
    """At s = 1 nothing is scaled, so both conventions are one task."""
    return True if scale == 1.0 else scale_bias
