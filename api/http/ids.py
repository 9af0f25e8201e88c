"""Short ids for people: the shortest prefix that no other id has."""

from typing import Annotated

from fastapi import Query

from api.http.deps import Questions
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.examples import JOB_ID
from api.http.schemas.jobs import ShortIds
from service.errors import InvalidQuery
from service.model.query import names_of

router = Router(prefix="/v1/ids", tags=["jobs"])
MAX_IDS = 200


@router.get("", dependencies=[scope("read")], response_model=ShortIds, responses=documented(422))
def shorten_ids(
    insights: Questions,
    ids: Annotated[str, Query(description="Of jobs and sweeps, by comma.", min_length=1, examples=[JOB_ID])],
) -> Answer:
    """The shortest prefix of each id that no other job or sweep has now, of 8 characters or more.

    Wherever an id is taken, so is a prefix of 8 characters or more that only one has; 409 names the candidates where
    several have it.
    """
    whole = names_of(ids)
    if len(whole) > MAX_IDS:
        raise InvalidQuery("ids", f"at most {MAX_IDS} ids at once, not {len(whole)}")
    return {"prefixes": insights.short_ids(whole)}
