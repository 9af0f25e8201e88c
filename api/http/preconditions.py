"""Changes are based on the current version: `ETag` with an answer, `If-Match` with a change (RFC 9110, RFC 6585).

The tag of a job or sweep is `"VERSION.CONTENT"`. VERSION is of the fields that can be changed; `If-Match` compares it
alone, so that progress does not refuse a change. CONTENT is a digest of the whole answer, for `If-None-Match`.
"""

import hashlib
import json
from typing import Annotated

from fastapi import Depends, Header, Response

from service.errors import UncannyError
from service.model.json import JsonObject
from service.results.views import version


class PreconditionRequired(UncannyError):
    """The change does not say which version it is based on."""


def tag(view: JsonObject, response: Response) -> JsonObject:
    """The view of a job or sweep, with its `ETag` on the answer."""
    content = hashlib.sha256(json.dumps(view, sort_keys=True).encode()).hexdigest()[:32]
    response.headers["ETag"] = f'"{version(view["id"], view["priority"], view["labels"])}.{content}"'
    return view


def _seen(
    if_match: Annotated[
        str | None,
        Header(alias="If-Match", description="The `ETag` of the answer that the change is based on, or `*`."),
    ] = None,
) -> frozenset[str] | None:
    """The versions of which one must be the current one; None for any. Weak tags do not count (RFC 9110)."""
    if if_match is None:
        raise PreconditionRequired("send If-Match with the ETag of what you have seen (GET it first), or `If-Match: *`")
    tags = [part.strip() for part in if_match.split(",")]
    if "*" in tags:
        return None
    strong = (part[1:-1] for part in tags if len(part) >= 2 and part[0] == part[-1] == '"')
    return frozenset(tag.partition(".")[0] for tag in strong)


Seen = Annotated[frozenset[str] | None, Depends(_seen)]
