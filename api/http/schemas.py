"""The shapes of requests and answers, for the OpenAPI document; every answer is checked against them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from service.model.names import DIGEST_PATTERN, TEXT_PATTERN
from service.specs import JobSpec
from service.specs.base import Labels, Priority

JOB_ID = "01939d3e-7b1f-7c3e-a2d4-5f60718293a4"
DIGEST = "9c818143cfd10e15676234d9e38dbf9e0d968d847d151aa08a8cf4f190080b17"
JOB_EXAMPLE: dict[str, Any] = {
    "architecture": "simple_cnn",
    "dataset": "digits",
    "scale": 5,
    "attack": {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10},
    "recipe": {"name": "standard", "epochs": 5},
    "samples": 200,
}
SWEEP_EXAMPLE: dict[str, Any] = {
    "name": "scales of a small net",
    "base": {"dataset": "digits", "recipe": {"name": "standard", "epochs": 5}, "samples": 200},
    "grid": {"architecture": ["simple_cnn", "mlp"], "scale": [0.5, 1, 5], "attack": ["pgd_l2", "pgd_linf"]},
}
MEASURE_EXAMPLE: dict[str, Any] = {
    "kind": "measure", "version": 1, "checkpoint": DIGEST, "measure": {"type": "closed_forms"}, "scale": 5.0,
    "scale_bias": True, "samples": 200,
}  # fmt: skip
MEASURE_DIGEST = "2ff9f2560789cbcb77919ee22236745c2e66c44cdf316a4a181251b8c43cf979"
CANONICAL_EXAMPLE = (
    f'{{"checkpoint":"{DIGEST}","kind":"measure","measure":{{"type":"closed_forms"}},"samples":200,"scale":5.0,'
    '"version":1}'
)
ATTEMPT_EXAMPLE: dict[str, Any] = {
    "number": 1, "holder": "node-1", "worker": "node-3 pid 4711 cuda:0", "started_at": "2026-01-01T12:00:00.000Z",
    "ended_at": "2026-01-01T12:00:04.000Z", "end": "succeeded", "message": None, "traceback": None,
    "provenance": {"torch": "2.11.0", "device": "NVIDIA H100 80GB HBM3", "wall_seconds": 3.9},
}  # fmt: skip
RESULT_EXAMPLE: dict[str, Any] = {
    **JOB_EXAMPLE, "job_id": JOB_ID, "clean_accuracy": 0.97, "robust_accuracy": 0.55,
    "robust_accuracy_ci95_low": 0.481, "robust_accuracy_ci95_high": 0.617, "verdict": "trusted",
    "verdict_reasons": [], "log_relative_sharpness_median": -34.1,
}  # fmt: skip
WILSON = "Of the 95 % interval from its images (Wilson), for this one network."
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def with_bounds(schema: Any) -> Any:
    """A JSON schema whose bounds are in its own words: pydantic leaves `ge` and so on where a validator comes first."""
    if isinstance(schema, dict):
        return {BOUNDS.get(name, name): with_bounds(value) for name, value in schema.items()}
    return [with_bounds(item) for item in schema] if isinstance(schema, list) else schema


class JobSubmission(JobSpec):
    """A JobSpec, with what matters to the queue only."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    checkpoint: str | None = Field(
        default=None,
        description="In place of `recipe` and `seed`: a registered checkpoint, or weights by their SHA-256.",
    )
    priority: Priority = 0
    labels: Labels = Field(default_factory=dict)

    @property
    def job(self) -> JobSpec:
        said = self.model_fields_set & JobSpec.model_fields.keys()
        return JobSpec.model_construct(said, **{name: getattr(self, name) for name in JobSpec.model_fields})


class DatasetSubmission(BaseModel):
    """A data set of your own: its two files are uploaded as artifacts first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [
        {"name": "my_images", "train_sha256": DIGEST, "test_sha256": DIGEST}
    ]})  # fmt: skip

    name: Annotated[str, Field(min_length=1, max_length=100)]
    train_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    test_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)]


class Accepted(BaseModel):
    """An accepted job, with the digests of the tasks that it needs."""

    id: str = Field(examples=[JOB_ID])
    state: str = Field(examples=["queued"])
    tasks: list[str] = Field(examples=[[DIGEST]])


class Preview(BaseModel):
    """What a sweep means: its jobs, the distinct tasks of each kind, and which of them exist already."""

    name: str
    jobs: int
    repetitions: int = Field(0, description="Cells that say the same as another, however written; they were dropped.")
    tasks: dict[str, int] = Field(examples=[{"train": 2, "measure": 6, "attack": 12, "control": 4}])
    known: dict[str, int] = Field(description="Computed before.", examples=[{"train": 2}])
    under_way: dict[str, int] = Field(description="Waiting or running for another job.", examples=[{}])
    to_compute: dict[str, int] = Field(examples=[{"train": 0, "measure": 6, "attack": 12, "control": 4}])


class History(BaseModel):
    """What tasks of one kind took on the device that ran such tasks last; the estimate is for all of `tasks`."""

    kind: str = Field(examples=["attack"])
    method: str = Field(examples=["pgd"])
    architecture: str = Field(examples=["simple_cnn"])
    dataset: str = Field(examples=["digits"])
    tasks: int = Field(description="To be computed.", examples=[12])
    device: str
    timings: int = Field(description="Measured ones that the estimate rests on.", examples=[200])
    device_seconds_p50: float
    device_seconds_p90: float


class Estimated(BaseModel):
    """Device seconds of what is to be computed, and when all would be done; null, with the reason, where unknown."""

    device_seconds_p50: float | None
    device_seconds_p90: float | None
    reason: str | None
    history: list[History]
    eta_seconds: float | None
    eta_reason: str


class QueueAhead(BaseModel):
    paused: bool
    own_tasks_before: int = Field(description="Tasks that wait at your expense, counted up to 1,000.")
    other_users_waiting: int


class Quota(BaseModel):
    """What you may have, have, and would have. Null is no limit."""

    user: str
    weight: float
    max_queued_jobs: int | None
    max_gpus: float | None
    unfinished_jobs: int
    unfinished_jobs_after: int
    fits: bool = Field(description="False: it would be refused.")
    gpus_in_use: float


class DryRun(Preview):
    """What a job or a sweep would mean."""

    estimate: Estimated
    queue: QueueAhead
    quota: Quota


class AcceptedSweep(Preview):
    id: str = Field(examples=[JOB_ID])


class TaskLine(BaseModel):
    id: str
    digest: str = Field(examples=[DIGEST])
    kind: str = Field(examples=["attack"])
    roles: list[str] = Field(examples=[["attack", "baseline"]])
    state: str = Field(examples=["running"])
    reason: str | None
    progress: float
    attempt: int
    worker: str | None
    started_at: str | None
    finished_at: str | None


class Job(BaseModel):
    id: str = Field(examples=[JOB_ID])
    state: str = Field(examples=["running"])
    reason: str | None = Field(description="Why it failed, is held or was cancelled.")
    progress: float = Field(examples=[0.5])
    sweep_id: str | None
    user: str = Field(examples=["ada"])
    priority: int
    boosted: bool = Field(default=False, description="By an admin: it goes before all other users' work.")
    labels: dict[str, str]
    spec: dict[str, Any] = Field(examples=[JOB_EXAMPLE])
    spec_digest: str
    verdict: str | None = Field(examples=["trusted"])
    created_at: str = Field(examples=["2026-01-01T12:00:00.000Z"])
    finished_at: str | None


class JobDetail(Job):
    tasks: list[TaskLine]


class JobPage(BaseModel):
    items: list[Job]
    next_cursor: str | None


class Sweep(BaseModel):
    id: str = Field(examples=[JOB_ID])
    name: str = Field(examples=["scales of a small net"])
    user: str
    state: str = Field(examples=["running"], description="running, paused, succeeded, failed or cancelled.")
    pause_reason: str | None = Field(default=None, description="Why the service itself has paused it.")
    priority: int
    labels: dict[str, str]
    created_at: str
    jobs: dict[str, int] = Field(description="How many, in all and by state.")
    tasks: dict[str, int] = Field(description="Distinct tasks, in all and by state.")
    progress: float
    eta_seconds: float | None = Field(description="Null while unknown.")


class SweepDetail(Sweep):
    spec: dict[str, Any] = Field(examples=[SWEEP_EXAMPLE])


class SweepPage(BaseModel):
    items: list[Sweep]
    next_cursor: str | None


class ShortIds(BaseModel):
    prefixes: dict[str, str] = Field(description="By id.", examples=[{JOB_ID: JOB_ID[:13]}])


class Change(BaseModel):
    """What can be changed of a job or sweep; what is left out stays. Labels are replaced as a whole."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"priority": 5}]})

    priority: Priority | None = None
    labels: Labels | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.priority is None and self.labels is None:
            raise ValueError("say what to change: `priority`, `labels`")
        return self


class Extension(BaseModel):
    """Values to add to axes of a sweep's grid."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"grid": {"scale": [100]}}]})

    grid: Annotated[dict[str, list[Any]], Field(min_length=1)]


class TaskExplanation(BaseModel):
    id: str
    kind: str = Field(examples=["attack"])
    state: str = Field(examples=["queued"])
    sentence: str = Field(examples=["7 tasks come before it"])
    tasks_before: int | None = Field(description="That would be claimed first; null where it is not in the queue.")


class Explanation(BaseModel):
    """Why a job is not running, or what it is at."""

    job_id: str
    state: str
    sentence: str = Field(
        examples=["it waits for its turn: 7 tasks come before it (ada has used 12 device seconds, ...)"]
    )
    tasks: list[TaskExplanation] = Field(description="Those that have not succeeded.")


class UserShare(BaseModel):
    """A user's part in the queue. `max_gpus` null is no limit."""

    user: str = Field(examples=["ada"])
    weight: float = Field(examples=[1.0])
    device_seconds: float = Field(description="Used, by half-life.", examples=[3600.0])
    gpus_in_use: float = Field(examples=[0.5])
    max_gpus: float | None = Field(examples=[4.0])
    waiting: bool = Field(examples=[True])


class Queue(BaseModel):
    paused: bool
    paused_by: str | None = Field(examples=[None])
    changed_at: str | None = Field(
        description="When it was last paused or resumed.", examples=["2026-01-01T12:00:00.000Z"]
    )
    jobs: dict[str, int] = Field(description="By state.", examples=[{"queued": 3, "succeeded": 112}])
    tasks: dict[str, dict[str, int]] = Field(
        description="By kind and state.", examples=[{"attack": {"queued": 2, "running": 1}}]
    )
    users: list[UserShare] = Field(description="Who has something waiting or running, or has used something lately.")


class Changed(BaseModel):
    """How many jobs of a sweep were changed."""

    id: str = Field(examples=[JOB_ID])
    jobs: int = Field(examples=[12])


class Retried(Changed):
    """How many jobs of a sweep run again, and how many were in each state from which they can be."""

    states: dict[str, int] = Field(examples=[{"failed": 12, "held": 0, "cancelled": 3}])


class Task(BaseModel):
    """One computation, whole: its spec, the canonical form whose SHA-256 is its digest, and each attempt."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(examples=[JOB_ID])
    digest: str = Field(examples=[MEASURE_DIGEST])
    kind: str = Field(examples=["measure"])
    state: str = Field(examples=["succeeded"])
    reason: str | None = Field(examples=[None])
    progress: float = Field(examples=[1.0])
    attempt: int = Field(examples=[1])
    worker: str | None = Field(examples=["node-3 pid 4711 cuda:0"])
    spec: dict[str, Any] = Field(examples=[MEASURE_EXAMPLE])
    canonical: str = Field(examples=[CANONICAL_EXAMPLE])
    detail: dict[str, Any] = Field(examples=[{"step": 4, "steps": 4}])
    attempts: list[dict[str, Any]] = Field(examples=[[ATTEMPT_EXAMPLE]])
    jobs: list[str] = Field(examples=[[JOB_ID]])
    retracted_at: str | None = Field(default=None, examples=[None])
    retracted_with: str | None = Field(default=None, description="The task that was retracted.", examples=[None])
    joined: bool = Field(default=True, description="Whether new jobs join it, or get a newer generation.")


class Dataset(BaseModel):
    """A registered data set."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(examples=["npz:my_images"])
    train_sha256: str
    test_sha256: str
    channels: int
    height: int
    width: int
    classes: int
    train_count: int
    test_count: int
    test_images_in_train: int | None = Field(
        default=None, description="Test images that are training images too: counted when files are registered."
    )


class DatasetList(BaseModel):
    items: list[Dataset]


class Artifact(BaseModel):
    digest: str = Field(examples=[DIGEST])
    size_bytes: int


class Flag(BaseModel):
    """A result that is equal but for one field, where more of it left more examples robust."""

    flag: Literal["not_monotone"]
    field: str = Field(examples=["attack.steps"])
    job_id: str = Field(examples=[JOB_ID])
    value: int | float = Field(description="What that result has in the field.", examples=[40])
    robust_accuracy: float = Field(description="Of that result, its repeats averaged.", examples=[0.61])
    results: int = Field(description="Its repeats: attack seeds, replicates.", examples=[1])


class TrainedAgain(BaseModel):
    """The weights of a network that the result rests on were lost, and its training gave others when it ran again.

    The result stands for the lost ones, which cannot be looked at any more; new jobs use the others.
    """

    flag: Literal["trained_again"]
    task_id: str = Field(description="The training.", examples=[JOB_ID])
    weights_sha256: str = Field(description="What was lost.", examples=[DIGEST])
    trained_again_as: str = Field(examples=[DIGEST])


class MixedWeights(BaseModel):
    """A measure or the training of the result has numbers of other weights than its attack: they are left out.

    Earlier versions left such results where a training ran again and gave other weights.
    """

    flag: Literal["mixed_weights"]
    task_id: str = Field(examples=[JOB_ID])
    part: str = Field(description="`train`, or the type of the measure.", examples=["closed_forms"])
    weights_sha256: str = Field(description="What that task used or made.", examples=[DIGEST])


class NamedAttack(BaseModel):
    """An attack that a worst case is over."""

    attack: dict[str, Any] = Field(examples=[JOB_EXAMPLE["attack"]])
    preset: str | None = Field(examples=["pgd_linf"])
    version: int = Field(examples=[1])
    results: int = Field(description="Its seeds, replicates and scales.", examples=[4])
    scales: list[float] = Field(examples=[[0.5, 1.0, 5.0]])
    robust_accuracy: float = Field(description="Of the images that it alone left right everywhere.", examples=[0.45])


class AllAttacks(BaseModel):
    """The images that every stored attack of one threat model left right, of one network: bits, joined by AND.

    Scales count where the bias is scaled too, because the predictions are the same. Retracted results, attacks of an
    older version, and those that left the ball, met a value that is not finite, or a network that answers at random are
    left out, and counted by the reason. The panel of controls, which looks at 256 images, is not in it.
    """

    threat_model: str = Field(examples=["linf 8/255"])
    ci95_low: float = Field(description="Of Wilson's interval over the images.", examples=[0.39])
    ci95_high: float = Field(examples=[0.45])
    n: int = Field(description="Images.", examples=[1000])
    attacks: list[NamedAttack] = Field(description="The strongest first.")
    results: int = Field(examples=[4])
    left_out: dict[str, int] = Field(examples=[{"superseded": 1}])
    flags: list[str] = Field(description="Of the results that count.", examples=[["not_monotone"]])


class WorstCase(AllAttacks):
    """The worst case of a result's network in its threat model."""

    robust_accuracy: float = Field(examples=[0.42])


class NetworkWorstCase(AllAttacks):
    """The worst case of a network in a threat model, and which network that is."""

    weights_sha256: str = Field(examples=["4f2978e34179abf6991c70fe5fcbd7a4d2a6002b8174c0e9f81e029971d73bb1"])
    architecture: str = Field(examples=["simple_cnn"])
    recipe: dict[str, Any]
    train_version: int | None = Field(description="Of the training task.", examples=[1])
    dataset: str = Field(examples=["digits"])
    samples: int = Field(examples=[1000])
    order: str = Field(default="permutation", examples=["permutation"])
    scale: float = Field(description="1 wherever the bias is scaled too: all those scales count.", examples=[1.0])
    robust_accuracy_worst_case: float = Field(examples=[0.42])
    attack_count: int = Field(description="Of different attacks.", examples=[3])


class Result(BaseModel):
    """One finished job: what was asked for, and what came out. Further numbers stand beside these by their names.

    Shares of images carry their Wilson 95 % interval as `NAME_ci95_low` and `NAME_ci95_high`, null where the number of
    images is not known: robust_accuracy_any_iterate, robust_top5_accuracy, robust_accuracy_of_correct, flip_rate and
    test_accuracy too.
    """

    model_config = ConfigDict(extra="allow")

    job_id: str = Field(examples=[JOB_ID])
    architecture: str = Field(examples=["simple_cnn"])
    dataset: str = Field(examples=["digits"])
    scale: float = Field(examples=[5.0])
    attack: dict[str, Any] = Field(examples=[JOB_EXAMPLE["attack"]])
    recipe: dict[str, Any]
    clean_accuracy: float | None = Field(examples=[0.97])
    robust_accuracy: float | None = Field(examples=[0.568])
    clean_accuracy_ci95_low: float | None = Field(description=WILSON, examples=[0.936])
    clean_accuracy_ci95_high: float | None = Field(description=WILSON, examples=[0.986])
    robust_accuracy_ci95_low: float | None = Field(description=WILSON, examples=[0.499])
    robust_accuracy_ci95_high: float | None = Field(description=WILSON, examples=[0.635])
    masked_fraction: float | None = Field(examples=[0.02])
    zero_gradient_fraction: float | None = Field(examples=[0.0])
    verdict: str | None = Field(examples=["trusted"])
    verdict_reasons: list[str] | None = Field(examples=[["masked"]])
    log_relative_sharpness_median: float | None = Field(default=None, examples=[-34.1])
    threat_model: str | None = Field(description="The attack's ball; null without one.", examples=["linf 8/255"])
    adversary: Literal["white_box", "black_box", "transfer", "noise"]
    flags: list[Flag | TrainedAgain | MixedWeights] = Field(
        description="What was found since: what other results say against it, lost weights. Its verdict stays.",
        examples=[[]],
    )
    worst_case: WorstCase | None = Field(description="Of the network, over all attacks of the threat model.")
    parts: dict[str, Any] = Field(description="All numbers of each task it rests on, with their provenance.")


class ResultPage(BaseModel):
    items: list[dict[str, Any]] = Field(
        description="Rows as in Result, or the fields asked for.", examples=[[RESULT_EXAMPLE]]
    )
    next_cursor: str | None = Field(examples=[None])
    retracted: int | None = Field(
        default=None,
        description="On the first page: how many results of the filter are hidden, counted up to 1,000.",
        examples=[0],
    )


Measure = Annotated[
    str | None,
    Field(description="A further measure: only its numbers are meant.", max_length=200, examples=["sam_sharpness"]),
]


class Retraction(BaseModel):
    """Why results are retracted, and whether their jobs are to be computed again, as another replicate."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [
        {"reason": "the attack clipped to [0, 255]", "rerun": True}
    ]})  # fmt: skip

    reason: Annotated[str, Field(min_length=3, max_length=2000, pattern=TEXT_PATTERN)]
    rerun: StrictBool = False


class Retractions(Retraction):
    """The same for every result that a filter chooses."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [
        {"filter": "versions.attack = 1 and attack = apgd", "reason": "wrong step size", "rerun": False}
    ]})  # fmt: skip

    filter: Annotated[str, Field(pattern=r"\S", description="As for `GET /v1/results`; a blank one is refused.")]
    measure: Measure = None


class Restorations(BaseModel):
    """Which retractions are taken back: those that hide results which a filter chooses."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [
        {"filter": "retraction_reason = 'wrong step size'"}
    ]})  # fmt: skip

    filter: Annotated[str, Field(pattern=r"\S", description="As for `GET /v1/results`; a blank one is refused.")]
    measure: Measure = None
