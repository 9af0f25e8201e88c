"""Who may use a route. Every route declares a permission as a dependency: `dependencies=[scope("submit")]`.

`routing.StrictRoute` checks the permission before it reads a byte of the body. As a dependency alone it would come too
late: the framework reads and parses the body first.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from fastapi.params import Depends as Dependency
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials

from api.http import open_requests
from api.http.auth import READING, bearer, caller_of_token, trusted_caller
from api.http.errors import Forbidden
from service.lab.access import Access, Caller
from service.model.access import Scope
from service.results.insights import Insights
from service.settings import Settings
from service.store.identifying import Kind

Owned = Literal["job", "sweep"]
IDS: dict[str, Kind] = {"job_id": "job", "sweep_id": "sweep", "task_id": "task", "token_id": "token"}
"""Path parameters that may be a prefix of an id."""


@dataclass(frozen=True)
class OpenToAll:
    """Everyone may use the route, also without a token."""

    async def __call__(self) -> None: ...


@dataclass(frozen=True)
class Permission:
    """The scope that the caller's token must have, and what the caller must own, unless they are an admin.

    `own_token` lets a token of any scope be used on itself.
    """

    scope: Scope
    owned: Owned | None = None
    own_token: bool = False

    async def __call__(
        self, request: Request, _documented: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> None:
        await self.admit(request)

    async def admit(self, request: Request) -> Caller:
        """The caller, if they have this permission. It is checked once for each request.

        Raises `Unauthenticated`, `Forbidden`, `TooManyRequests`; `NotFound` and `AmbiguousId` for an id in the path.
        """
        if not hasattr(request.state, "caller"):
            settings: Settings = request.app.state.settings
            threads: CapacityLimiter = request.app.state.admission_threads
            if settings.auth:
                credentials = await bearer(request)
                caller = await to_thread.run_sync(self._admit_token, request, credentials, limiter=threads)
                open_requests.count(request.scope, request.app.state.open_by, caller.name, settings.max_open_requests)
            else:
                caller = trusted_caller(request, settings)
                if request.path_params:
                    await to_thread.run_sync(_complete_ids, request, caller, limiter=threads)
            request.state.caller = caller
        admitted: Caller = request.state.caller
        return admitted

    def _admit_token(self, request: Request, credentials: HTTPAuthorizationCredentials | None) -> Caller:
        caller = caller_of_token(request, credentials)
        _complete_ids(request, caller)
        uses_itself = self.own_token and request.path_params["token_id"] == caller.token_id
        needed = "read" if uses_itself else self.scope
        if not caller.may(needed):
            raise Forbidden(f"this takes a token of scope {needed!r}, yours has {caller.scope!r}")
        if self.owned is not None and not caller.may("admin"):
            _check_owner(self.owned, request, caller)
        return caller


def open_to_all() -> Dependency:
    """Everyone may use this route."""
    return Dependency(OpenToAll())


def scope(needed: Scope) -> Dependency:
    """The caller's token must have this scope. Each scope includes those before it: read, submit, admin."""
    return Dependency(Permission(needed))


def owner_of(noun: Owned) -> Dependency:
    """The job or sweep in the path must be the caller's own, unless they are an admin."""
    return Dependency(Permission("submit", owned=noun))


def submitter_or_own_token() -> Dependency:
    """The scope `submit`, but a token of any scope may be used on itself."""
    return Dependency(Permission("submit", own_token=True))


def declared(route: APIRoute) -> OpenToAll | Permission:
    """The permission that a route declares.

    Raises `TypeError` if there is none or more than one, or if a route that changes something requires only `read`.
    """
    methods = route.methods or set()
    name = f"{', '.join(sorted(methods))} {route.path}"
    dependencies = [each.dependency for each in route.dependencies]
    permissions = [dependency for dependency in dependencies if isinstance(dependency, OpenToAll | Permission)]
    if len(permissions) != 1:
        raise TypeError(f"{name} declares {len(permissions)} permissions: it needs one, as in `scope('read')`")
    [permission] = permissions
    only_reads = isinstance(permission, OpenToAll) or permission.scope == "read"
    if only_reads and not methods <= READING:
        raise TypeError(f"{name} changes something: it needs `owner_of`, or `scope` of `submit` or `admin`")
    of_one = {f"{noun}_id" for noun in ("job", "sweep")} & route.param_convertors.keys()
    if of_one and not methods <= READING and not _guards_owner(permission):
        raise TypeError(f"{name} changes what one user owns: it needs `owner_of`, or `scope('admin')`")
    if isinstance(permission, Permission):
        owned = f"{permission.owned}_id" if permission.owned else "token_id" if permission.own_token else None
        if owned is not None and owned not in route.param_convertors:
            raise TypeError(f"{name} has no {owned} in its path")
    return permission


def _guards_owner(permission: OpenToAll | Permission) -> bool:
    return isinstance(permission, Permission) and (permission.owned is not None or permission.scope == "admin")


def _complete_ids(request: Request, caller: Caller) -> None:
    """Replace prefixes of ids in the path by whole ids. Only admins can name other users' tokens."""
    insights: Insights = request.app.state.insights
    user = None if caller.may("admin") else caller.name
    for name in IDS.keys() & request.path_params.keys():
        request.path_params[name] = insights.identify(IDS[name], request.path_params[name], user=user)


def _check_owner(noun: Owned, request: Request, caller: Caller) -> None:
    """Raises `Forbidden` for another user's job or sweep. One that does not exist is left to the endpoint."""
    access: Access = request.app.state.access
    ident: str = request.path_params[f"{noun}_id"]
    owner = access.owner(
        job_id=ident if noun == "job" else None,
        sweep_id=ident if noun == "sweep" else None,
    )
    if owner is not None and owner != caller.name:
        raise Forbidden(f"{noun} {ident} is {owner}'s: only they or an admin can change it")
