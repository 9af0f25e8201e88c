"""Trained networks: the weights that trainings of this service made, for jobs to name."""

from typing import Annotated, Any

from fastapi import Query, Request, Response
from pydantic import BaseModel, Field

from api.http.deps import Cursor, Limit, Verbs
from api.http.errors import documented
from api.http.paging import linked
from api.http.permissions import scope
from api.http.routing import Router
from api.http.schemas import DIGEST, JOB_EXAMPLE, JOB_ID
from service.model.names import DIGEST_PATTERN, TEXT_PATTERN
from service.results.networks import trained

router = Router(prefix="/v1/networks", tags=["checkpoints"])
Only = Annotated[str | None, Query(description="Only networks of this one.", pattern=TEXT_PATTERN)]


class Network(BaseModel):
    """A trained network: what it was trained by, how well that went, and how many jobs rest on it."""

    weights_sha256: str = Field(examples=[DIGEST])
    architecture: str = Field(examples=["simple_cnn"])
    dataset: str = Field(examples=["digits"])
    recipe: dict[str, Any] = Field(description="Whole, with its augmentation.", examples=[JOB_EXAMPLE["recipe"]])
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


@router.get("", dependencies=[scope("read")], response_model=NetworkPage, responses=documented(422))
def list_networks(
    request: Request,
    response: Response,
    service: Verbs,
    architecture: Only = None,
    dataset: Only = None,
    recipe: Annotated[
        str | None, Query(description="Only networks of the recipe of this name.", pattern=TEXT_PATTERN)
    ] = None,
    weights_sha256: Annotated[str | None, Query(description="Only of these weights.", pattern=DIGEST_PATTERN)] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Any:
    """The networks that trainings made, the newest first. Jobs name one as `"checkpoint": WEIGHTS_SHA256`, in place of
    recipe and seed: they join its training, and what was computed on it."""
    asked = {"architecture": architecture, "dataset": dataset, "recipe": recipe, "weights_sha256": weights_sha256}
    filters = {name: value for name, value in asked.items() if value is not None}
    return linked(trained(service.database, filters, cursor, limit), request, response)
