"""Users and their tokens, and the caller's own user."""

from typing import Annotated

from fastapi import Path, Query

from api.http.auth import NAME
from api.http.deps import CurrentCaller, Users
from api.http.errors import documented
from api.http.permissions import scope, submitter_or_own_token
from api.http.routing import Answer, Router
from api.http.schemas.access import Me, NewToken, RevokedToken, TokenList, TokenRequest, User, UserChange, UserList

router = Router(prefix="/v1", tags=["access"])
Name = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]


@router.get("/me", dependencies=[scope("read")], response_model=Me, responses=documented())
def get_me(users: Users, caller: CurrentCaller) -> Answer:
    """Who you are, your role, quotas, and what your token may do."""
    return users.me(caller)


@router.get("/users", dependencies=[scope("admin")], response_model=UserList, responses=documented())
def list_users(users: Users) -> Answer:
    """All users (admin)."""
    return {"items": users.users()}


@router.put("/users/{name}", dependencies=[scope("admin")], response_model=User, responses=documented(404, 409, 422))
def put_user(name: Name, body: UserChange, users: Users, caller: CurrentCaller) -> Answer:
    """Make a user, or change role, weight and quotas of one; `disabled: false` lets one in again (admin)."""
    return users.put_user(name, body.model_dump(exclude_unset=True), actor=caller.name)


@router.delete("/users/{name}", dependencies=[scope("admin")], response_model=User, responses=documented(404, 409, 422))
def disable_user(name: Name, users: Users, caller: CurrentCaller) -> Answer:
    """Refuse all tokens of a user from now on; what they measured stays (admin)."""
    return users.put_user(name, {"disabled": True}, actor=caller.name)


@router.get("/tokens", dependencies=[scope("read")], response_model=TokenList, responses=documented(403, 422))
def list_tokens(
    users: Users, caller: CurrentCaller, user: Annotated[str | None, Query(description="Another's: admin.")] = None
) -> Answer:
    """Your tokens, also revoked ones. No secret is ever shown again."""
    return {"items": users.tokens(by=caller, user=user)}


@router.post(
    "/tokens",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=NewToken,
    responses=documented(403, 404, 409, 422),
)
def create_token(body: TokenRequest, users: Users, caller: CurrentCaller) -> Answer:
    """Make a token for yourself, or, as an admin, for a user. Its secret is in this answer only."""
    return users.create_token(body.user or caller.name, body.name, body.scope, body.expires_in_days, by=caller)


@router.delete(
    "/tokens/{token_id}",
    dependencies=[submitter_or_own_token()],
    response_model=RevokedToken,
    responses=documented(404, 409),
)
def revoke_token(token_id: str, users: Users, caller: CurrentCaller) -> Answer:
    """Refuse this token from now on, and all that were made with it."""
    return users.revoke_token(token_id, by=caller)
