"""Idempotency keys with the replies to their requests, written in the transaction of the request itself."""

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from service.errors import IdempotencyMismatch
from service.model.json import JsonObject
from service.store.tables import idempotency_keys


@dataclass(frozen=True)
class Reply:
    """The answer to a submission; `replayed` if it is the stored answer to an earlier request."""

    status: int
    location: str
    body: JsonObject
    replayed: bool = False


def find(connection: Connection, user: str, key: str, body_sha256: str) -> Reply | None:
    """The stored reply to this user's key. Raises `IdempotencyMismatch` if its request had another body."""
    same_key = (idempotency_keys.c.user == user) & (idempotency_keys.c.key == key)
    row = connection.execute(select(idempotency_keys).where(same_key)).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != body_sha256:
        raise IdempotencyMismatch(f"the idempotency key {key!r} was used before with another body; take a new key")
    return Reply(row.status, row.location, row.body, replayed=True)


def keep(connection: Connection, now: float, user: str, key: str, body_sha256: str, reply: Reply) -> None:
    row = {"user": user, "key": key, "body_sha256": body_sha256, "status": reply.status}
    connection.execute(insert(idempotency_keys).values(**row, location=reply.location, body=reply.body, created_at=now))
