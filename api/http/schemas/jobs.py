"""Jobs: one to submit, one that was accepted, its state and tasks, and why it waits."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.http.schemas.examples import DIGEST, JOB_EXAMPLE, JOB_ID
from service.model.json import JsonObject
from service.specs import JobSpec
from service.specs.base import Labels, Priority


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
        fields_set = self.model_fields_set & JobSpec.model_fields.keys()
        return JobSpec.model_construct(fields_set, **{name: getattr(self, name) for name in JobSpec.model_fields})


class Accepted(BaseModel):
    """An accepted job, with the digests of the tasks that it needs."""

    id: str = Field(examples=[JOB_ID])
    state: str = Field(examples=["queued"])
    tasks: list[str] = Field(examples=[[DIGEST]])


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
    spec: JsonObject = Field(examples=[JOB_EXAMPLE])
    spec_digest: str
    verdict: str | None = Field(examples=["trusted"])
    created_at: str = Field(examples=["2026-01-01T12:00:00.000Z"])
    finished_at: str | None


class JobDetail(Job):
    tasks: list[TaskLine]


class JobPage(BaseModel):
    items: list[Job]
    next_cursor: str | None


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


class ShortIds(BaseModel):
    prefixes: dict[str, str] = Field(description="By id.", examples=[{JOB_ID: JOB_ID[:13]}])
