"""The path under which a proxy shows this service (`UNCANNY_ROOT_PATH`), whether or not the proxy strips it."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """ASGI middleware: `path` is without the prefix from here on, `root_path` is the prefix.

    Both are changed in place, because the handler of unexpected errors stands outside of this middleware and needs them
    too. A path that has the prefix twice goes to `missing`: the framework would take the second one off by itself.
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
    """A path of this service as the client has to request it."""
    return f"{connection.scope.get('root_path', '')}{path}"
