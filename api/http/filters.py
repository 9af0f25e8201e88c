"""Filters in a query string: one `filter` in the grammar, and simple ones by field, repeated for any of the values."""

from collections.abc import Collection
from typing import Annotated

from fastapi import Query, Request

from service.model.json import JsonObject
from service.model.query import LABEL
from service.store.fields import Fields

Filter = Annotated[
    str | None,
    Query(
        description="As in `architecture = resnet18 and attack.eps <= 8/255 and not verdict in (suspect, invalid)`: "
        "`and or not ( )`, `= != < <= > >= in ~` (contains), `is null`, over any field, label (`labels.KEY`, or "
        '`labels."my key"`), stored number, `provenance.` field or parameter of a further measure '
        "(`measures.sam_sharpness.rho`). A comparison with a missing value is never true. A date alone is that day in "
        "UTC; a sweep is named by its id, 8 or more of its first characters, or its name. What a field can never be is "
        "refused, with what may have been meant.",
        examples=["architecture = resnet18 and robust_accuracy > 0.4"],
    ),
]
Sort = Annotated[
    str,
    Query(
        description="Up to 8 fields by comma, each with `-` in front where it descends; `created_at` ends ties.",
        examples=["-robust_accuracy,scale"],
    ),
]


def filters_of(request: Request, fields: Fields, leaving: Collection[str] = ()) -> dict[str, list[str]]:
    """The filters by field of this request, without those in `leaving`."""
    query = request.query_params
    names = [name for name in query if (name in fields.known or name == LABEL) and name not in leaving]
    return {name: query.getlist(name) for name in names}


def documented_filters(fields: Fields, leaving: Collection[str] = ()) -> JsonObject:
    """The filters by field, for the OpenAPI document."""
    described = {name: f"Only rows with this `{name}`; repeated: any of the values." for name in fields.known}
    described[LABEL] = 'Only rows with this label, as `key:value` or `"my: key":value`; repeated: all of them.'
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": text,
                "schema": {"type": "array", "items": {"type": "string"}},
            }
            for name, text in described.items()
            if name not in leaving
        ]
    }
