"""Artifacts: bytes by their SHA-256."""

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import Header, HTTPException, Path, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from fastapi.responses import StreamingResponse

from api.http.deps import ArtifactRoot, User
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, Router, UploadRoute
from api.http.schemas.artifacts import Artifact
from service.lab.artifacts import CHUNK_BYTES
from service.model.executor import ArtifactRef
from service.model.json import JsonObject
from service.model.names import DIGEST_PATTERN

router = Router(route_class=UploadRoute, prefix="/v1/artifacts", tags=["artifacts"])
Digest = Annotated[str, Path(pattern=DIGEST_PATTERN)]
FOR_EVER = "private, max-age=31536000, immutable"
RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
OCTETS: JsonObject = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.put(
    "/{digest}",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=Artifact,
    responses=documented(413, 422, 507),
    openapi_extra={"requestBody": {"required": True, "content": OCTETS}},
)
async def put_artifact(digest: Digest, request: Request, artifacts: ArtifactRoot, user: User) -> Answer:
    """Upload bytes; they are kept only if their SHA-256 is the one in the path. Sending them again changes nothing."""
    size, held = 0, bytearray()
    async with contextmanager_in_threadpool(artifacts.receiving(digest)) as file:
        async for chunk in request.stream():
            held += chunk
            size += len(chunk)
            if len(held) >= CHUNK_BYTES:
                await run_in_threadpool(file.write, held)
                held = bytearray()
        await run_in_threadpool(file.write, held)
    return vars(ArtifactRef(digest, size, "upload"))


@router.get(
    "/{digest}",
    dependencies=[scope("read")],
    response_class=Response,
    responses={
        200: {"content": OCTETS},
        206: {"description": "The part that was asked for.", "content": OCTETS},
        **documented(404, 416),
    },
)
def get_artifact(
    digest: Digest,
    artifacts: ArtifactRoot,
    range: Annotated[str, Header(description="One range of bytes, as `bytes=0-99`; several are answered whole.")] = "",
) -> Response:
    """The bytes of an artifact, or a range of them."""
    headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes", "Cache-Control": FOR_EVER}
    size = artifacts.size(digest)
    part = _part(range, size)
    start, end = part or (0, size)
    if start >= end and part is not None:
        raise HTTPException(416, f"the artifact has {size:,} bytes", {"Content-Range": f"bytes */{size}"})
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"

    def chunks() -> Iterator[bytes]:
        left = end - start
        with artifacts.open(digest) as file:
            file.seek(start)
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk

    headers["Content-Length"] = str(end - start)
    status = 200 if part is None else 206
    return StreamingResponse(chunks(), status, headers, media_type="application/octet-stream")


def _part(range: str, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of the range in `size` bytes; None if the whole is meant (RFC 9110)."""
    match = RANGE.fullmatch(range.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start, last = int(match[1]), int(match[2]) if match[2] else size - 1
    return None if last < start and match[2] else (start, min(last + 1, size))
