"""The mark by which the artifact root is known: one row, from the first use of a folder on."""

from sqlalchemy import Connection, delete, insert, select

from service.store.tables import artifact_roots, artifacts


def mark(connection: Connection) -> str | None:
    """The mark of the artifact root; None before its first use."""
    return connection.execute(select(artifact_roots.c.mark)).scalar_one_or_none()


def names_bytes(connection: Connection) -> bool:
    """Whether the index names any artifacts: then the artifact root was used before."""
    return connection.execute(select(artifacts.c.digest).limit(1)).one_or_none() is not None


def keep(connection: Connection, now: float, mark: str) -> None:
    """Know the artifact root by this mark, and by no other."""
    connection.execute(delete(artifact_roots))
    connection.execute(insert(artifact_roots).values(mark=mark, adopted_at=now))
