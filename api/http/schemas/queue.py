"""The queue as a whole, and each user's part in it."""

from pydantic import BaseModel, Field


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
