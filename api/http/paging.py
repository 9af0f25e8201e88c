"""How a listing leads to its next page: by `next_cursor` in its body, and by a `Link` header (RFC 8288)."""

from urllib.parse import urlencode

from fastapi import Request, Response

from api.http.prefix import public
from service.model.json import JsonObject


def next_link(request: Request, cursor: str | None) -> dict[str, str]:
    """The header, relative to wherever this page was asked for; none on the last page."""
    if cursor is None:
        return {}
    others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    return {"Link": f'<{public(request, request.url.path)}?{urlencode([*others, ("cursor", cursor)])}>; rel="next"'}


def linked(page: JsonObject, request: Request, response: Response) -> JsonObject:
    """The page, with the header on its answer."""
    response.headers.update(next_link(request, page["next_cursor"]))
    return page
