"""The rows of users and of their tokens."""

from typing import Any

from sqlalchemy import Connection, insert, select, update
from uuid_utils import uuid7

from service.model.records import Admission, Token, User
from service.store.listed import listed
from service.store.tables import jobs, sweeps, tokens, users
from service.store.values import Values, every, one

NEW_USER = {"role": "researcher", "weight": None, "max_queued_jobs": None, "max_gpus": None, "disabled_at": None}


def user(connection: Connection, name: str) -> User | None:
    return one(connection, User, select(users).where(users.c.name == name))


def users_by_name(connection: Connection) -> list[User]:
    return every(connection, User, select(users).order_by(users.c.name))


def put_user(connection: Connection, now: float, name: str, changes: Values) -> User:
    """Make or change a user; columns that `changes` does not name stay as they are. Returns the user as stored."""
    if user(connection, name) is None:
        connection.execute(insert(users).values({**NEW_USER, **changes, "name": name, "created_at": now}))
    elif changes:
        connection.execute(update(users).where(users.c.name == name).values(changes))
    return User(*connection.execute(select(users).where(users.c.name == name)).one())


def insert_token(connection: Connection, now: float, **values: Any) -> Token:  # Any: each has the type of its column
    row = {"id": str(uuid7()), "created_at": now, **values}
    return Token(*connection.execute(insert(tokens).values(row).returning(tokens)).one())


def token(connection: Connection, token_id: str) -> Token | None:
    return one(connection, Token, select(tokens).where(tokens.c.id == token_id))


def tokens_of(connection: Connection, user: str) -> list[Token]:
    return every(connection, Token, select(tokens).where(tokens.c.user == user).order_by(tokens.c.id))


def admission(connection: Connection, *, sha256: str | None = None, token_id: str | None = None) -> Admission | None:
    """The token of that hash or id, with the role of its user and when the user was disabled; None if there is none."""
    which = tokens.c.sha256 == sha256 if token_id is None else tokens.c.id == token_id
    query = select(tokens, users.c.role, users.c.disabled_at).join(users, users.c.name == tokens.c.user)
    row = connection.execute(query.where(which)).one_or_none()
    return None if row is None else Admission(Token(*row[:-2]), *row[-2:])


def note_use(connection: Connection, token_id: str, now: float) -> None:
    connection.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_at=now))


def revoke(connection: Connection, token_id: str, now: float) -> list[Token]:
    """Revoke a token, those made with it, those made with these, and so on. Returns those that were valid until now."""
    family = select(tokens.c.id).where(tokens.c.id == token_id).cte("family", recursive=True)
    family = family.union(select(tokens.c.id).join(family, tokens.c.parent_id == family.c.id))
    family_ids = list(connection.scalars(select(family.c.id)))
    valid = update(tokens).where(tokens.c.id.in_(listed(family_ids)), tokens.c.revoked_at.is_(None))
    return every(connection, Token, valid.values(revoked_at=now).returning(tokens))


def owner(connection: Connection, *, job_id: str | None, sweep_id: str | None) -> str | None:
    table, ident = (jobs, job_id) if job_id is not None else (sweeps, sweep_id)
    return connection.execute(select(table.c.user).where(table.c.id == ident)).scalar_one_or_none()
