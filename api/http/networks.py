"""Trained networks: the weights that trainings of this service made, for jobs to name."""

from typing import Annotated

from fastapi import Query, Request, Response

from api.http.deps import Cursor, Limit, Verbs
from api.http.errors import documented
from api.http.paging import linked
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.networks import NetworkPage
from service.model.names import DIGEST_PATTERN, TEXT_PATTERN
from service.results.networks import trained

router = Router(prefix="/v1/networks", tags=["checkpoints"])
Only = Annotated[str | None, Query(description="Only networks of this one.", pattern=TEXT_PATTERN)]


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
) -> Answer:
    """The networks that trainings made, the newest first. Jobs name one as `"checkpoint": WEIGHTS_SHA256`, in place of
    recipe and seed: they join its training, and what was computed on it."""
    every = {"architecture": architecture, "dataset": dataset, "recipe": recipe, "weights_sha256": weights_sha256}
    filters = {name: value for name, value in every.items() if value is not None}
    return linked(trained(service.database, filters, cursor, limit), request, response)
