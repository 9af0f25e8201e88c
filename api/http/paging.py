"""How a listing leads to its next page: by `next_cursor` in its body, and by a `Link` header (RFC 8288)."""

from typing import Any
from urllib.parse import urlencode

from fastapi import Request, Response

from api.http.prefix import public


def next_link(request: Request, cursor: str | None) -> dict[str, str]:
    """The header, relative to wherever this page was asked for; none on the last page."""
    if cursor is None:
        return {}
    others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    return {"Link": f'<{public(request, request.url.path)}?{urlencode([*others, ("cursor", cursor)])}>; rel="next"'}


def linked(page: dict[str, Any], request: Request, response: Response) -> dict[str, Any]:
    """The page, with the header on its answer."""
    response.headers.update(next_link(request, page["next_cursor"]))
    return page
