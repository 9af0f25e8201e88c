"""Artifacts."""

from pydantic import BaseModel, Field

from api.http.schemas.examples import DIGEST


class Artifact(BaseModel):
    digest: str = Field(examples=[DIGEST])
    size_bytes: int
