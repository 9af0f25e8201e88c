"""A task, whole."""

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.examples import ATTEMPT_EXAMPLE, CANONICAL_EXAMPLE, JOB_ID, MEASURE_DIGEST, MEASURE_EXAMPLE
from service.model.json import JsonObject


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
    spec: JsonObject = Field(examples=[MEASURE_EXAMPLE])
    canonical: str = Field(examples=[CANONICAL_EXAMPLE])
    detail: JsonObject = Field(examples=[{"step": 4, "steps": 4}])
    attempts: list[JsonObject] = Field(examples=[[ATTEMPT_EXAMPLE]])
    jobs: list[str] = Field(examples=[[JOB_ID]])
    retracted_at: str | None = Field(default=None, examples=[None])
    retracted_with: str | None = Field(default=None, description="The task that was retracted.", examples=[None])
    joined: bool = Field(default=True, description="Whether new jobs join it, or get a newer generation.")
