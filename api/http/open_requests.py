"""The open requests of each user: with tokens, one user may have only so many, so that others are still served."""

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.turns import TooManyRequests

COUNTED = "uncanny.counted"  # in the state of a request: the user whose open requests it is one of


class OpenRequests:
    """ASGI middleware: the other half of `count`. When an answer has ended, its request is no longer open.

    Streams and requests that wait are open too.
    """

    def __init__(self, app: ASGIApp, open_by: Counter[str]) -> None:
        self.app, self.open_by = app, open_by

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        try:
            await self.app(scope, receive, send)
        finally:
            user = state.pop(COUNTED, None)
            if user is not None:
                self.open_by[user] -= 1
                if not self.open_by[user]:
                    del self.open_by[user]
        return None


def count(scope: Scope, open_by: Counter[str], user: str, most: int) -> None:
    """Count this request as one of the user's. Raises `TooManyRequests` if `most` are open; 0 means no limit."""
    if not most:
        return
    if open_by[user] >= most:
        raise TooManyRequests(
            f"{most} requests of {user} are open, streams and uploads among them, as many as one user may have at "
            "once: nothing was done; close some, or wait until they have ended"
        )
    open_by[user] += 1
    scope["state"][COUNTED] = user


def user_of(scope: Scope) -> str | None:
    """The user whose request this is; None if it is not counted, or not yet known whose it is."""
    user: str | None = scope.get("state", {}).get(COUNTED)
    return user
