"""Users and their tokens, and who one is."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from api.http.auth import NAME
from api.http.deps import CurrentCaller, Users
from api.http.errors import documented
from api.http.permissions import scope, submitter_or_own_token
from api.http.routing import Router
from service.model.access import Role, Scope
from service.model.names import TEXT_PATTERN

router = Router(prefix="/v1", tags=["access"])
Name = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]
MOST = 2**31 - 1  # what the column holds
EXAMPLE = "ada"


class UserChange(BaseModel):
    """What is left out stays as it is; null is the default of the service."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"role": "researcher", "weight": 2}]})

    role: Role = "researcher"
    weight: (
        Annotated[float, Field(strict=True, gt=0, le=1000, description="Share of the cluster beside others.")] | None
    ) = None
    max_queued_jobs: (
        Annotated[int, Field(strict=True, ge=0, le=MOST, description="Unfinished jobs at once.")] | None
    ) = None
    max_gpus: (
        Annotated[
            float,
            Field(
                strict=True,
                ge=0,
                le=1e6,
                allow_inf_nan=False,
                description="GPUs (CPUs on a cluster without) in use at once.",
            ),
        ]
        | None
    ) = None

    disabled: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="Whether all tokens of this user are refused. Where it is left out, it stays so."
    )


class User(BaseModel):
    """A user; null quotas are the defaults of the service."""

    name: str = Field(examples=[EXAMPLE])
    role: str | None = Field(examples=["researcher"])
    weight: float | None = None
    max_queued_jobs: int | None = None
    max_gpus: float | None = None
    created_at: str | None = None
    disabled_at: str | None = None


class Me(User):
    """Who the request came from, and how far they may go."""

    scope: Scope
    token_id: str | None = None


class UserList(BaseModel):
    items: list[User]


class TokenRequest(BaseModel):
    """A new token. Each scope includes those before it: read, submit, admin."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "laptop", "scope": "submit", "expires_in_days": 90}]}
    )

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=TEXT_PATTERN, description="What it is for.")]
    scope: Scope = "submit"
    user: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = Field(
        default=None, description="Whose it is; the caller's when left out."
    )
    expires_in_days: Annotated[float, Field(strict=True, gt=0, le=3650)] | None = Field(
        default=None, description="Never: null."
    )


class Token(BaseModel):
    """A token, known by its prefix."""

    id: str
    user: str = Field(examples=[EXAMPLE])
    name: str = Field(examples=["laptop"])
    prefix: str = Field(examples=["unc_1a2b3c4d"])
    scope: Scope
    created_by: str
    parent_id: str | None = Field(default=None, description="The token that it was made with; revoked with that one.")
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None


class RevokedToken(Token):
    revoked_children: int = Field(description="So many others were revoked with it: made with it, or with these.")


class NewToken(Token):
    secret: str = Field(description="Shown this once; only a hash of it is kept.")


class TokenList(BaseModel):
    items: list[Token]


@router.get("/me", dependencies=[scope("read")], response_model=Me, responses=documented())
def get_me(users: Users, caller: CurrentCaller) -> Any:
    """Who you are, your role, quotas, and what your token may do."""
    return users.me(caller)


@router.get("/users", dependencies=[scope("admin")], response_model=UserList, responses=documented())
def list_users(users: Users) -> Any:
    """All users (admin)."""
    return {"items": users.users()}


@router.put("/users/{name}", dependencies=[scope("admin")], response_model=User, responses=documented(404, 409, 422))
def put_user(name: Name, body: UserChange, users: Users, caller: CurrentCaller) -> Any:
    """Make a user, or change role, weight and quotas of one; `disabled: false` lets one in again (admin)."""
    return users.put_user(name, body.model_dump(exclude_unset=True), actor=caller.name)


@router.delete("/users/{name}", dependencies=[scope("admin")], response_model=User, responses=documented(404, 409, 422))
def disable_user(name: Name, users: Users, caller: CurrentCaller) -> Any:
    """Refuse all tokens of a user from now on; what they measured stays (admin)."""
    return users.put_user(name, {"disabled": True}, actor=caller.name)


@router.get("/tokens", dependencies=[scope("read")], response_model=TokenList, responses=documented(403, 422))
def list_tokens(
    users: Users, caller: CurrentCaller, user: Annotated[str | None, Query(description="Another's: admin.")] = None
) -> Any:
    """Your tokens, also revoked ones. No secret is ever shown again."""
    return {"items": users.tokens(by=caller, user=user)}


@router.post(
    "/tokens",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=NewToken,
    responses=documented(403, 404, 409, 422),
)
def create_token(body: TokenRequest, users: Users, caller: CurrentCaller) -> Any:
    """Make a token for yourself, or, as an admin, for a user. Its secret is in this answer only."""
    return users.create_token(body.user or caller.name, body.name, body.scope, body.expires_in_days, by=caller)


@router.delete(
    "/tokens/{token_id}",
    dependencies=[submitter_or_own_token()],
    response_model=RevokedToken,
    responses=documented(404, 409),
)
def revoke_token(token_id: str, users: Users, caller: CurrentCaller) -> Any:
    """Refuse this token from now on, and all that were made with it."""
    return users.revoke_token(token_id, by=caller)
