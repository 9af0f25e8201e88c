"""Results as frozen values, as the store hands them out. Pure.

Times are seconds since 1970 by the database's clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.model.json import JsonMapping, JsonObject

CellSpec = JsonMapping
"""A cell's spec without seeds, with the versions of its tasks."""


class ResultKey(NamedTuple):
    """The job of a result, and the cell that the result belongs to."""

    job_id: str
    cell_id: int


@dataclass(frozen=True, slots=True)
class Result:
    """The numbers of a succeeded job, from its tasks. The fields of the verdict are None until it is judged.

    `metrics` are the headline numbers by name. `measure_numbers` and `attack_numbers` are all that these tasks stored;
    the former are None if the closed forms were computed on other weights than the attack.
    """

    job_id: str
    cell_id: int
    sweep_id: str | None
    user: str
    labels: dict[str, str]
    spec: JsonObject
    spec_digest: str
    architecture: str
    dataset: str
    scale: float
    seed: int
    created_at: float
    finished_at: float | None
    train_task_id: str
    measure_task_id: str
    attack_task_id: str
    baseline_task_id: str
    control_task_id: str | None
    weights_sha256: str | None
    mixed_weights: bool
    flags: Sequence[str]
    metrics: Mapping[str, float | None]
    masked_n: int | None
    verdict: str | None
    verdict_reasons: list[str] | None
    verdict_checks: dict[str, str] | None
    verdict_counts: dict[str, list[int]] | None
    verdict_version: int | None
    retracted_at: float | None
    retracted_by: str | None
    retraction_reason: str | None
    retracted_with: str | None
    measure_numbers: JsonObject | None
    attack_numbers: JsonObject
    attack_digest: str
    provenance: JsonObject | None

    def __str__(self) -> str:
        return f"result of job {self.job_id}"


@dataclass(frozen=True, slots=True)
class FurtherMeasure:
    """A measure of a result beyond the closed forms: its spec and its numbers, or why it failed and has none."""

    spec: JsonObject
    numbers: JsonObject
    failed: str | None

    @property
    def type(self) -> str:
        return str(self.spec["type"])


@dataclass(frozen=True, slots=True)
class TrainedNetwork:
    """The weights that a training of this service made.

    If new jobs join another task instead of this training, `former_digest` has the digest that the training had.
    """

    task_id: str
    digest: str
    former_digest: str | None
    spec: JsonObject
    weights_sha256: str
    size_bytes: int
    test_accuracy: float | None
    finished_at: float | None
    retracted_at: float | None
    retracted_by: str | None
    retraction_reason: str | None

    @property
    def task_digest(self) -> str:
        """The digest of the computation, also if new jobs join another task."""
        return self.former_digest or self.digest


class NetworkCell(NamedTuple):
    """The `results` of one network in one cell: means over distinct computations, and the flags of any of them."""

    weights_sha256: str
    cell_id: int
    results: int
    robust_accuracy: float
    clean_accuracy: float | None
    flags: Sequence[str]


class AttackBits(NamedTuple):
    """One attack in a ball on one network.

    `robust` packs `n` bits, one per example: 1 if the network still classifies the attacked example correctly.
    """

    job_id: str
    weights_sha256: str
    cell_id: int
    robust_accuracy: float | None
    flags: Sequence[str]
    verdict_reasons: list[str] | None
    n: int
    robust: bytes


class Point(NamedTuple):
    """Two numbers of one result, to be correlated.

    Each comes with the task that stored it and, if a further measure computed it, with the spec and version of that
    measure. `keys` are the values of the fields that points are grouped by.
    """

    cell_id: int
    network: str
    attack_seed: int
    verdict_version: int | None
    measure: float
    target: float
    measure_task: str
    target_task: str
    measure_spec: JsonObject | None
    target_spec: JsonObject | None
    keys: tuple[object, ...]
