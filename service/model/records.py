"""The nouns as the store hands them out: frozen values, each with the columns of its table as fields, in their order.

Times are seconds since 1970 by the database's clock. A printed value has its whole id: ids begin with the time, so
those of jobs that were submitted together share their first letters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from service.model.json import JsonObject
from service.model.names import OWN_DATASET


@dataclass(frozen=True, slots=True)
class Job:
    """One cell that a user asked for. `state` is one of `JobState`; without a verdict yet, its fields are None."""

    id: str
    sequence: int
    sweep_id: str | None
    user: str
    spec: JsonObject
    spec_digest: str
    architecture: str
    dataset: str
    scale: float
    attack: str
    norm: str | None
    eps: float | None
    recipe: str
    seed: int
    samples: int
    priority: int
    boosted: bool
    labels: dict[str, str]
    state: str
    reason: str | None
    created_at: float
    finished_at: float | None
    train_task_id: str
    measure_task_id: str
    attack_task_id: str
    baseline_task_id: str
    control_task_id: str | None
    masked_fraction: float | None
    masked_n: int | None
    masked_fraction_of_correct: float | None
    reverse_fraction: float | None
    verdict: str | None
    verdict_reasons: list[str] | None
    verdict_checks: JsonObject | None
    verdict_counts: JsonObject | None
    verdict_version: int | None

    def __str__(self) -> str:
        return f"job {self.id} ({self.state})"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A named grid of jobs. `pause_reason` is set only if the service itself paused the sweep."""

    id: str
    name: str
    user: str
    spec: JsonObject
    priority: int
    labels: dict[str, str]
    paused: bool
    pause_reason: str | None
    created_at: float

    def __str__(self) -> str:
        return f"sweep {self.id} ({self.name}{', paused' if self.paused else ''})"


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of computation that jobs share. `state` is one of `TaskState`; `progress` is from 0 to 1."""

    id: str
    digest: str
    kind: str
    version: int
    spec: JsonObject
    generation: int
    state: str
    reason: str | None
    train_digest: str
    priority: int
    sponsor: str
    sequence: int
    boosted: bool
    needed_by: int
    shared: bool
    waiting_since: float
    due: float
    paused: bool
    attempt: int
    errors: int
    suspect_losses: int
    not_before: float
    holder: str | None
    lease_expires_at: float | None
    cancel_requested: bool
    worker: str | None
    progress: float
    detail: JsonObject
    resume_digest: str | None
    resume_bytes: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    retracted_at: float | None
    retracted_by: str | None
    retraction_reason: str | None
    retracted_with: str | None
    former_digest: str | None

    @property
    def own_digest(self) -> str:
        """The digest of the task's spec, even if new jobs join a newer generation of it."""
        return self.former_digest or self.digest

    def __str__(self) -> str:
        return f"{self.kind} task {self.id} ({self.state})"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a task. `end` is `succeeded`, `failed` or the reason of a loss; None while it runs."""

    task_id: str
    number: int
    holder: str
    worker: str | None
    started_at: float
    ended_at: float | None
    end: str | None
    message: str | None
    traceback: str | None
    missing_digest: str | None
    provenance: JsonObject | None
    bundle: str | None
    device_share: float | None
    charged_until: float | None

    def __str__(self) -> str:
        return f"attempt {self.number} of task {self.task_id} ({self.end or 'running'})"


@dataclass(frozen=True, slots=True)
class User:
    """A user with weight and limits; None stands for the default in the settings."""

    name: str
    weight: float | None
    max_queued_jobs: int | None
    max_gpus: float | None
    created_at: float
    role: str
    disabled_at: float | None

    def __str__(self) -> str:
        return f"user {self.name} ({'disabled' if self.disabled_at is not None else self.role})"


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a user. Its secret is not stored, only the hash of it, which is not printed."""

    id: str
    user: str
    name: str
    prefix: str
    sha256: str = field(repr=False)
    scope: str
    created_by: str
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None
    parent_id: str | None

    def __str__(self) -> str:
        return f"token {self.id} of {self.user} ({'revoked' if self.revoked_at is not None else self.scope})"


@dataclass(frozen=True, slots=True)
class Admission:
    """A token with the fields of its user that decide whether the token is accepted."""

    token: Token
    role: str  # of its user
    disabled_at: float | None  # when its user was disabled


@dataclass(frozen=True, slots=True)
class Registration:
    """The facts that registering a data set checks: the digests of its two files, the shape of an image, the counts."""

    name: str
    train_sha256: str
    test_sha256: str
    channels: int
    height: int
    width: int
    classes: int
    train_count: int
    test_count: int


@dataclass(frozen=True, slots=True)
class RegisteredDataset(Registration):
    """A lab's own images, which jobs call `npz:NAME`, and who registered them."""

    created_by: str
    created_at: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: `[channels, height, width]`."""
        return self.channels, self.height, self.width

    @property
    def reference(self) -> str:
        """The name by which jobs call it."""
        return OWN_DATASET + self.name

    def __str__(self) -> str:
        return f"data set {self.reference}"


@dataclass(frozen=True, slots=True)
class RegisteredCheckpoint:
    """Weights that were trained elsewhere: the uploaded file, how it is read, and the weights that the service uses."""

    name: str
    architecture: str
    dataset: str
    channels: int
    height: int
    width: int
    classes: int
    weights_sha256: str
    size_bytes: int
    parameters: int
    uploaded_sha256: str
    keys: dict[str, str]
    mean: list[float]
    std: list[float]
    expected_clean_accuracy: float | None
    tolerance: float | None
    stripped_prefix: str | None
    converted_from: list[object] | None
    created_by: str
    created_at: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: `[channels, height, width]`."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"checkpoint {self.name} ({self.architecture} on {self.dataset})"


@dataclass(frozen=True, slots=True)
class Lease:
    """The leader's lease: its holder, epoch and end, and the last status of the cluster that the leader reported."""

    role: str
    holder: str
    epoch: int
    expires_at: float
    status: JsonObject

    def __str__(self) -> str:
        return f"lease of {self.holder} ({self.role}, epoch {self.epoch})"


@dataclass(frozen=True, slots=True)
class Queue:
    """Whether the queue is paused, and who changed that last."""

    name: str
    paused: bool
    changed_by: str
    changed_at: float

    def __str__(self) -> str:
        return f"queue {self.name}{' (paused)' if self.paused else ''}"


@dataclass(frozen=True, slots=True)
class Decision:
    """One claim: the scheduler's input, packed, and its decisions."""

    id: int
    at: float
    actor: str
    seen: bytes = field(repr=False)
    decided: Sequence[JsonObject]

    def __str__(self) -> str:
        return f"decision {self.id} by {self.actor}"


class TaskCount(NamedTuple):
    """The `n` distinct tasks of one kind and state that a sweep's jobs need; `progress` is the sum of theirs."""

    sweep_id: str
    kind: str
    state: str
    n: int
    progress: float


class RunningTask(NamedTuple):
    """The fields of a running task that reports of progress show."""

    id: str
    digest: str
    kind: str
    attempt: int
    worker: str | None
    progress: float
    detail: JsonObject


class FirstEvent(NamedTuple):
    """The oldest event that is kept."""

    id: int
    at: float
