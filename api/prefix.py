"""The path under which a proxy shows this service (`UNCANNY_ROOT_PATH`), whether or not the proxy strips it."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """ASGI middleware: `path` is without the prefix from here on, `root_path` is the prefix."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            if path == self.root_path or path.startswith(f"{self.root_path}/"):
                path = path.removeprefix(self.root_path) or "/"
            scope = {**scope, "path": path, "root_path": self.root_path}
        await self.app(scope, receive, send)


def public(connection: HTTPConnection, path: str) -> str:
    """A path of this service as the client has to ask for it."""
    return f"{connection.scope.get('root_path', '')}{path}"
