"""What one user may have open at once, where tokens are asked for: so another one's requests still get in."""

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.turns import TooManyRequests

HELD = "uncanny.share"  # in the state of a request, the user whose share it counts in


class Shares:
    """ASGI middleware: counts each user's open requests, streams and waits among them, until their answers have ended.

    Who asks is told by `count`, as soon as it is known.
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
            user = state.pop(HELD, None)
            if user is not None:
                self.open_by[user] -= 1
                if not self.open_by[user]:
                    del self.open_by[user]
        return None


def count(scope: Scope, open_by: Counter[str], user: str, most: int) -> None:
    """Count this request as one of that user's. Raises `TooManyRequests` where `most` are open; 0 is no limit."""
    if not most:
        return
    if open_by[user] >= most:
        raise TooManyRequests(
            f"{most} requests of {user} are open, streams and uploads among them, as many as one user may have at "
            "once: nothing was done; close some, or wait until they have ended"
        )
    open_by[user] += 1
    scope["state"][HELD] = user


def user_of(scope: Scope) -> str | None:
    """Whose share a request counts in; None where there are no shares, or nobody knows yet who asks."""
    held: str | None = scope.get("state", {}).get(HELD)
    return held
