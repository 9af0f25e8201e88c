"""Dry runs: the tasks, time and quota of a job or a sweep before it is submitted."""

from pydantic import BaseModel, Field


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
    own_tasks_before: int = Field(description="Waiting tasks that you sponsor, counted up to 10,000.")
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
