"""Users and their tokens."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.http.auth import NAME
from service.model.access import Role, Scope

MOST = 2**31 - 1  # the largest number of the column
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

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$", description="What it is for.")]
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
