"""Who sends a request: the owner of its token; without authentication, the user that the request names."""

import getpass
import re
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from api.binding import is_loopback
from api.http.errors import Forbidden
from api.http.turns import TooManyRequests
from service.errors import InvalidQuery, Unauthenticated
from service.lab.access import Access, Caller
from service.settings import Settings

HEADER = "X-Uncanny-User"
NAME = re.compile(r"[\w.@+-]{1,100}")
READING = {"GET", "HEAD"}
FAILURES_PER_MINUTE = 60  # requests with bad tokens from one address
ADMISSION_THREADS = 8  # threads of their own for checking tokens, so that slow questions delay no admission

bearer = HTTPBearer(auto_error=False, description="A token of `uncanny token create`; not needed where auth is off.")


class Limiter:
    """How many requests a caller may make in a minute, counted in this process."""

    def __init__(self) -> None:
        self._counter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, per_minute: int, kind: str, who: str) -> None:
        """Count a request. Raises `TooManyRequests` beyond the limit; a limit of 0 means no limit."""
        if per_minute and not self._counter.hit(RateLimitItemPerMinute(per_minute), kind, who):
            raise TooManyRequests(f"more than {per_minute} requests a minute: wait a little")


async def current_caller(request: Request) -> Caller:
    """The caller, whom the route's permission has admitted. A route that is open to all has none."""
    caller: Caller = request.state.caller
    return caller


async def current_user(caller: Annotated[Caller, Depends(current_caller)]) -> str:
    return caller.name


def caller_of_token(request: Request, credentials: HTTPAuthorizationCredentials | None) -> Caller:
    """The caller that the token of this request stands for.

    Raises `Unauthenticated`, `Forbidden` if the request names another user, `TooManyRequests`.
    """
    settings: Settings = request.app.state.settings
    access: Access = request.app.state.access
    limiter: Limiter = request.app.state.limiter
    if credentials is None:
        raise Unauthenticated("send a token: `Authorization: Bearer ...`, or UNCANNY_TOKEN for the commands")
    try:
        caller = access.caller(credentials.credentials)
    except Unauthenticated:
        limiter.count(FAILURES_PER_MINUTE, "failed", request.client.host if request.client else "")
        raise
    if request.headers.get(HEADER, caller.name) != caller.name:
        raise Forbidden(f"this token is {caller.name}'s: leave {HEADER} out")
    limiter.count(settings.requests_per_minute, "caller", caller.name)
    return caller


def trusted_caller(request: Request, settings: Settings) -> Caller:
    """The user whom the header names, else the one who runs the server.

    A web page of another site could send requests to a server on loopback, through a name that resolves to it.
    Requests with such a host or origin are refused.
    """
    if not settings.insecure and not is_loopback(request.url.hostname or ""):
        raise Forbidden(f"this server answers on loopback only, not as {request.url.hostname!r}")
    origin = request.headers.get("Origin")
    if origin is not None and _netloc(origin) != request.url.netloc:
        raise Forbidden(f"a page of {origin!r:.200} may not use this server")
    name = request.headers.get(HEADER)
    if name is None:
        return Caller(operating_system_user())
    if not NAME.fullmatch(name):
        raise InvalidQuery(HEADER, f"{name!r:.120} cannot be a user's name: letters, digits and . _ @ + -, at most 100")
    return Caller(name)


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def operating_system_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
