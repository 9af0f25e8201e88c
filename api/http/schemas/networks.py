"""Trained networks."""

from pydantic import BaseModel, Field

from api.http.schemas.examples import DIGEST, JOB_EXAMPLE, JOB_ID
from service.model.json import JsonObject


class Network(BaseModel):
    """A trained network: what it was trained by, how well that went, and how many jobs rest on it."""

    weights_sha256: str = Field(examples=[DIGEST])
    architecture: str = Field(examples=["simple_cnn"])
    dataset: str = Field(examples=["digits"])
    recipe: JsonObject = Field(description="Whole, with its augmentation.", examples=[JOB_EXAMPLE["recipe"]])
    seed: int = Field(examples=[0])
    replicate: int = Field(examples=[0])
    test_accuracy: float | None = Field(description="On all test images.", examples=[0.97])
    size_bytes: int = Field(examples=[420_000])
    task_id: str = Field(description="The training.", examples=[JOB_ID])
    task_digest: str = Field(description="The one it had before another generation took it.", examples=[DIGEST])
    jobs: int = Field(examples=[12])
    created_at: str = Field(description="When the training ended.", examples=["2026-01-01T12:00:00.000Z"])
    retracted_at: str | None = Field(
        description="When its training was retracted; no job can name such a network.", examples=[None]
    )
    retracted_by: str | None = Field(examples=[None])
    retraction_reason: str | None = Field(examples=[None])


class NetworkPage(BaseModel):
    items: list[Network]
    next_cursor: str | None = Field(examples=[None])
