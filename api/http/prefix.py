"""The path under which a proxy shows this service (`UNCANNY_ROOT_PATH`), whether or not the proxy strips it."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """ASGI middleware: `path` is without the prefix from here on, `root_path` is the prefix.

    Both are changed in place, for who answers what nobody expected stands outside. A path with the prefix twice is
    `missing`'s: the framework takes the prefix off by itself if it is still there.
    """

    def __init__(self, app: ASGIApp, root_path: str, missing: ASGIApp) -> None:
        self.app, self.root_path, self.missing = app, root_path, missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self.root_path
            if self._is_within(scope["path"]):
                scope["path"] = scope["path"].removeprefix(self.root_path) or "/"
                if self._is_within(scope["path"]):
                    await self.missing(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _is_within(self, path: str) -> bool:
        return path == self.root_path or path.startswith(f"{self.root_path}/")


def public(connection: HTTPConnection, path: str) -> str:
    """A path of this service as the client has to ask for it."""
    return f"{connection.scope.get('root_path', '')}{path}"
