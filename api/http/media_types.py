"""Which media type an answer has: the `Accept` header with its q values (RFC 9110, 12.5.1)."""

from collections.abc import Sequence

from fastapi import Request

from service.errors import UncannyError
from service.model.json import JsonObject


class NotAcceptable(UncannyError):
    """The client accepts none of the media types that are offered."""


def operation_of(request: Request) -> JsonObject | None:
    """The entry of the OpenAPI document for this request; None if the document has none."""
    route = request.scope.get("route")
    operations: dict[str, JsonObject] = request.app.openapi()["paths"].get(getattr(route, "path_format", ""), {})
    return operations.get(request.method.lower())


async def acceptable(request: Request) -> None:
    """Raises `NotAcceptable` if the document has answers to this request, but none that the client accepts."""
    responses = (operation_of(request) or {}).get("responses", {})
    offered = [media for status in ("200", "201") for media in responses.get(status, {}).get("content", {})]
    if offered and "format" not in request.query_params:
        chosen(request, list(dict.fromkeys(offered)))


def chosen(request: Request, offered: Sequence[str]) -> str:
    """The media type of `offered` with the highest q value; the first if there is no `Accept` header.

    Ties go to the media type that the client names more exactly, then to the one that it names first. Raises
    `NotAcceptable`.
    """
    header = ", ".join(request.headers.getlist("accept"))
    ranges = [_range(part) for part in header.split(",") if part.strip()]
    if not ranges:
        return offered[0]
    ranked = [(_rank(media, ranges), -place, media) for place, media in enumerate(offered)]
    (quality, *_), _, best = max(ranked)
    if quality <= 0:
        raise NotAcceptable(f"`Accept: {header:.200}` takes none of what there is: {', '.join(offered)}")
    return best


def _range(part: str) -> tuple[str, float]:
    """A media range and its q value: 1 if it is left out, 0 if it is invalid."""
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
    return name, quality if 0 <= quality <= 1 else 0.0


def _rank(media: str, ranges: Sequence[tuple[str, float]]) -> tuple[float, int, int]:
    """The q value of a media type by the most exact range that matches it, how exact that range is, and its place."""
    names = (media, f"{media.partition('/')[0]}/*", "*/*")
    matching = [
        (len(names) - names.index(name), -place, quality)
        for place, (name, quality) in enumerate(ranges)
        if name in names
    ]
    exactness, place, quality = max(matching, default=(0, 0, 0.0))
    return quality, exactness, place
