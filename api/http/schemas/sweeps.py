"""Sweeps: the answer to a submission, the progress, and the fields that can be changed."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.examples import JOB_ID, SWEEP_EXAMPLE
from api.http.schemas.previews import Preview
from service.model.json import JsonObject


class AcceptedSweep(Preview):
    id: str = Field(examples=[JOB_ID])


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
    spec: JsonObject = Field(examples=[SWEEP_EXAMPLE])


class SweepPage(BaseModel):
    items: list[Sweep]
    next_cursor: str | None


class Extension(BaseModel):
    """Values to add to axes of a sweep's grid."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"grid": {"scale": [100]}}]})

    grid: Annotated[dict[str, list[object]], Field(min_length=1)]


class Changed(BaseModel):
    """How many jobs of a sweep were changed."""

    id: str = Field(examples=[JOB_ID])
    jobs: int = Field(examples=[12])


class Retried(Changed):
    """How many jobs of a sweep run again, and how many were in each state from which they can be."""

    states: dict[str, int] = Field(examples=[{"failed": 12, "held": 0, "cancelled": 3}])
