"""The documentation page: Swagger UI on the OpenAPI document. Its files come from an installed package."""

import re
from base64 import b64encode
from collections.abc import AsyncIterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, StreamingResponse

from api.http.permissions import open_to_all
from api.http.prefix import public
from service.errors import NotFound

SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"
INLINE = re.compile(b"<script>(.*?)</script>", re.DOTALL)
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'sha256-{}'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
MEDIA_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
SLICE_BYTES = 1 << 16
PARAMETERS = {"docExpansion": "none", "defaultModelsExpandDepth": 0}  # all folded, so that the page is short at first


def install(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False, dependencies=[open_to_all()])
    @app.get("/docs", include_in_schema=False, dependencies=[open_to_all()])
    def docs(request: Request) -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url=public(request, "/openapi.json"),
            title=f"{app.title} API",
            swagger_js_url=public(request, "/docs/swagger-ui-bundle.js"),
            swagger_css_url=public(request, "/docs/swagger-ui.css"),
            swagger_favicon_url="data:,",
            swagger_ui_parameters=PARAMETERS,
        )
        [script] = INLINE.findall(page.body)  # the only inline script that the policy allows
        page.headers["Content-Security-Policy"] = POLICY.format(b64encode(sha256(script).digest()).decode())
        return page

    @app.get("/docs/{file}", include_in_schema=False, dependencies=[open_to_all()])
    def part_of_the_page(file: str) -> StreamingResponse:
        if file not in MEDIA_TYPES:
            raise NotFound(f"there is no /docs/{file}")
        content = _content(file)
        headers = {"Content-Length": str(len(content))}
        return StreamingResponse(_slices(content), media_type=MEDIA_TYPES[file], headers=headers)


@cache
def _content(file: str) -> bytes:
    """In memory: anybody may ask for it, and a slow reader of a file would hold a descriptor."""
    return (SWAGGER_UI / file).read_bytes()


async def _slices(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), SLICE_BYTES):
        yield content[start : start + SLICE_BYTES]
