"""The rows of users and of their tokens."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update
from uuid_utils import uuid7

from service.store.tables import jobs, sweeps, tokens, users

NEW_USER = {"role": "researcher", "weight": None, "max_queued_jobs": None, "max_gpus": None, "disabled_at": None}


def user(connection: Connection, name: str) -> Any:
    return connection.execute(select(users).where(users.c.name == name)).one_or_none()


def users_by_name(connection: Connection) -> Sequence[Any]:
    return connection.execute(select(users).order_by(users.c.name)).all()


def put_user(connection: Connection, now: float, name: str, changes: dict[str, Any]) -> None:
    """Make or change a user; one who had been disabled is let in again unless the changes say otherwise."""
    changes = {"disabled_at": None, **changes}
    done = connection.execute(update(users).where(users.c.name == name).values(changes))
    if not done.rowcount:
        connection.execute(insert(users).values({**NEW_USER, **changes, "name": name, "created_at": now}))


def insert_token(connection: Connection, now: float, **values: Any) -> Any:
    row = {"id": str(uuid7()), "created_at": now, **values}
    return connection.execute(insert(tokens).values(row).returning(tokens)).one()


def token(connection: Connection, token_id: str) -> Any:
    return connection.execute(select(tokens).where(tokens.c.id == token_id)).one_or_none()


def tokens_of(connection: Connection, user: str) -> Sequence[Any]:
    return connection.execute(select(tokens).where(tokens.c.user == user).order_by(tokens.c.id)).all()


def token_by_hash(connection: Connection, sha256: str) -> Any:
    """The token with what matters of its user: `role`, `disabled_at`."""
    query = select(tokens, users.c.role, users.c.disabled_at).join(users, users.c.name == tokens.c.user)
    return connection.execute(query.where(tokens.c.sha256 == sha256)).one_or_none()


def note_use(connection: Connection, token_id: str, now: float) -> None:
    connection.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_at=now))


def revoke(connection: Connection, token_id: str, now: float) -> None:
    connection.execute(update(tokens).where(tokens.c.id == token_id).values(revoked_at=now))


def owner(connection: Connection, *, job_id: str | None, sweep_id: str | None) -> str | None:
    table, ident = (jobs, job_id) if job_id is not None else (sweeps, sweep_id)
    return connection.execute(select(table.c.user).where(table.c.id == ident)).scalar_one_or_none()
