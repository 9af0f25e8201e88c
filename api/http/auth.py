"""Who is asking, and whether they may. Without authentication everyone on this machine is believed."""

import getpass
import re
from typing import Any
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from api.binding import is_loopback
from api.http import shares
from api.http.errors import Forbidden
from api.http.turns import TooManyRequests
from service.errors import InvalidQuery, Unauthenticated
from service.lab.access import Access, Caller
from service.results.insights import Insights
from service.settings import Settings
from service.store.identifying import Kind

HEADER = "X-Uncanny-User"
NAME = re.compile(r"[\w.@+-]{1,100}")
PUBLIC = {
    "/healthz",
    "/readyz",
    "/docs",
    "/docs/{file}",
    "/",
}  # as `/openapi.json` is: none shows anything of the store
READING = {"GET", "HEAD"}
ADMIN = {
    ("POST", "/v1/queue:pause"),
    ("POST", "/v1/queue:resume"),
    ("POST", "/v1/results:retract"),
    ("POST", "/v1/results:restore"),
    *(
        ("POST", f"/v1/{noun}:{verb}")
        for noun in ("jobs/{job_id}", "sweeps/{sweep_id}")
        for verb in ("boost", "unboost")
    ),
    ("GET", "/v1/users"),
    ("PUT", "/v1/users/{name}"),
    ("DELETE", "/v1/users/{name}"),
}
"""What only an admin may do. All else takes `read` to look and `submit` to change what is one's own."""
IDS: dict[str, Kind] = {"job_id": "job", "sweep_id": "sweep", "task_id": "task", "token_id": "token"}
FAILURES_PER_MINUTE = 60  # of one address with bad tokens
ASKING = 8  # threads that find out who is asking: slow questions of others keep nobody outside

_bearer = HTTPBearer(auto_error=False, description="A token of `uncanny token create`; not needed where auth is off.")


class Limiter:
    """How many requests a caller may make in a minute, counted in this process."""

    def __init__(self) -> None:
        self._counter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, per_minute: int, kind: str, who: str) -> None:
        """Count a request. Raises `TooManyRequests` beyond the limit; 0 is none."""
        if per_minute and not self._counter.hit(RateLimitItemPerMinute(per_minute), kind, who):
            raise TooManyRequests(f"more than {per_minute} requests a minute: wait a little")


async def current_caller(request: Request, _documented: Any = Depends(_bearer)) -> Caller | None:
    """Who asks, allowed to ask this; None only where everyone may look. Found out once for a request.

    Raises `Unauthenticated`, `Forbidden` for what this caller may not do, `TooManyRequests`.
    """
    path = getattr(request.scope.get("route"), "path_format", request.url.path)
    if path in PUBLIC:
        return None
    if not hasattr(request.state, "caller"):
        credentials = await _bearer(request)
        if request.app.state.settings.auth:
            asking: CapacityLimiter = request.app.state.asking
            caller = await to_thread.run_sync(_allowed, request, credentials, path, limiter=asking)
            shares.count(
                request.scope, request.app.state.open_by, caller.name, request.app.state.settings.max_open_requests
            )
            request.state.caller = caller
        else:
            request.state.caller = _trusted(request, request.app.state.settings)
            if request.path_params:
                await to_thread.run_sync(_identify, request, request.state.caller, limiter=request.app.state.asking)
    return request.state.caller  # type: ignore[no-any-return]


def _allowed(request: Request, credentials: HTTPAuthorizationCredentials | None, path: str) -> Caller:
    settings: Settings = request.app.state.settings
    access: Access = request.app.state.access
    limiter: Limiter = request.app.state.limiter
    caller = _identified(request, credentials, access, limiter)
    limiter.count(settings.requests_per_minute, "caller", caller.name)
    _identify(request, caller)
    needed = "admin" if (request.method, path) in ADMIN else "read" if _only_reads(request, caller) else "submit"
    if not caller.may(needed):
        raise Forbidden(f"this takes a token of scope {needed!r}, yours has {caller.scope!r}")
    if request.method not in READING and not caller.may("admin"):
        _check_owner(request, access, caller)
    return caller


async def current_user(caller: Caller | None = Depends(current_caller)) -> str:
    return caller.name if caller is not None else operating_system_user()


def _identified(
    request: Request, credentials: HTTPAuthorizationCredentials | None, access: Access, limiter: Limiter
) -> Caller:
    if credentials is None:
        raise Unauthenticated("send a token: `Authorization: Bearer ...`, or UNCANNY_TOKEN for the commands")
    try:
        caller = access.caller(credentials.credentials)
    except Unauthenticated:
        limiter.count(FAILURES_PER_MINUTE, "failed", request.client.host if request.client else "")
        raise
    if request.headers.get(HEADER, caller.name) != caller.name:
        raise Forbidden(f"this token is {caller.name}'s: leave {HEADER} out")
    return caller


def _trusted(request: Request, settings: Settings) -> Caller:
    """The user named by the header, else the one who runs the server.

    A page of another site can reach a loopback server through a name that resolves to it, and can send it simple
    requests: such hosts and origins are refused.
    """
    if not settings.insecure and not is_loopback(request.url.hostname or ""):
        raise Forbidden(f"this server answers on loopback only, not as {request.url.hostname!r}")
    origin = request.headers.get("Origin")
    if origin is not None and _place(origin) != request.url.netloc:
        raise Forbidden(f"a page of {origin!r:.200} may not use this server")
    name = request.headers.get(HEADER)
    if name is None:
        return Caller(operating_system_user())
    if not NAME.fullmatch(name):
        raise InvalidQuery(HEADER, f"{name!r:.120} cannot be a user's name: letters, digits and . _ @ + -, at most 100")
    return Caller(name)


def _identify(request: Request, caller: Caller) -> None:
    """Put the whole ids in the place of the prefixes in the path, for whoever reads it from here on."""
    insights: Insights = request.app.state.insights
    for name, kind in IDS.items():
        if name in request.path_params:
            user = None if caller.may("admin") else caller.name
            request.path_params[name] = insights.identify(kind, request.path_params[name], user=user)


def _place(origin: str) -> str | None:
    """Host and port of an origin; None for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _only_reads(request: Request, caller: Caller) -> bool:
    """To look, or to give up the very token that is used."""
    return request.method in READING or (
        request.method == "DELETE"
        and caller.token_id is not None
        and request.path_params.get("token_id") == caller.token_id
    )


def _check_owner(request: Request, access: Access, caller: Caller) -> None:
    """What is changed must be the caller's own; what does not exist is the endpoint's to speak of."""
    job_id, sweep_id = (request.path_params.get(name) for name in ("job_id", "sweep_id"))
    if job_id is None and sweep_id is None:
        return
    owner = access.owner(job_id=job_id, sweep_id=sweep_id)
    if owner is not None and owner != caller.name:
        noun = f"job {job_id}" if job_id is not None else f"sweep {sweep_id}"
        raise Forbidden(f"{noun} is {owner}'s: only they or an admin can change it")


def operating_system_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
