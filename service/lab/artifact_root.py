"""Which folder is the artifact root: the database keeps its mark, so another folder at the same path is refused.

Such a folder is usually the mount point of a disk that is not mounted. Bytes written there would be lost.
"""

import math
import time
from dataclasses import dataclass

from service.errors import DatabaseAway
from service.lab.artifacts import Artifacts
from service.store import Database, artifact_index, roots

FRESH_SECONDS = 2.0  # how long a mark is used before it is read again: an operator may accept another folder


class RootMark:
    """The mark of the artifact root of a database, read when it is needed.

    A call raises `DatabaseAway`, and `ArtifactRootUnusable` if the database has no mark yet and cannot take the
    folder's.
    """

    def __init__(self, database: Database, root: str) -> None:
        self._database, self._artifacts = database, Artifacts(root)
        self._mark, self._read_at = "", -math.inf

    def __call__(self) -> str:
        """The mark; empty for an object store, which is the same from everywhere."""
        if self._artifacts.is_folder and time.monotonic() - self._read_at > FRESH_SECONDS:
            try:
                self._mark = self._mark_of_database()
            except DatabaseAway:
                if not self._mark:
                    raise
            self._read_at = time.monotonic()
        return self._mark

    def _mark_of_database(self) -> str:
        """The mark in the database. At the first use it is that of the folder, which gets one if it has none."""
        if kept := _known_mark(self._database, self._artifacts):
            return kept
        mark = self._artifacts.mark()
        with self._database.write() as connection:
            kept = roots.mark(connection)
            if kept is None:
                roots.keep(connection, self._database.now(connection), mark)
        return kept or mark


def of_database(database: Database, root: str) -> Artifacts:
    """The artifact root of this database, for reading, writing and deleting."""
    return Artifacts(root, RootMark(database, root))


def check(database: Database, root: str) -> None:
    """Raises `ArtifactRootUnusable` if the folder is not the root of this database. Changes nothing."""
    artifacts = Artifacts(root)
    if artifacts.is_folder and (mark := _known_mark(database, artifacts)):
        Artifacts(root, mark).require_root()


def as_known(database: Database, root: str) -> Artifacts:
    """The artifact root with the mark that the database has now, if any, for callers that must not give it one."""
    with database.read() as connection:
        return Artifacts(root, roots.mark(connection) or "")


def _known_mark(database: Database, artifacts: Artifacts) -> str | None:
    """The mark in the database. If it has none, a folder without any artifact of the index is refused."""
    with database.read() as connection:
        mark = roots.mark(connection)
        names_bytes = mark is None and roots.names_bytes(connection)
    if names_bytes:
        artifacts.require_root()
    return mark


@dataclass(frozen=True)
class Adopted:
    """A folder that is the artifact root from now on. It lacks the `missing` ones of `named` artifacts."""

    root: str
    mark: str
    named: int
    missing: tuple[str, ...]


def adopt(database: Database, root: str) -> Adopted:
    """Accept the folder as the artifact root of this database, such as one that was moved or restored.

    Raises `ArtifactRootUnusable` if there is no such folder.
    """
    database.check_schema()
    artifacts = Artifacts(root)
    artifacts.require_folder()
    mark = artifacts.mark()
    if artifacts.is_folder:
        with database.write() as connection:
            roots.keep(connection, database.now(connection), mark)
    digests = named_digests(database)
    return Adopted(root, mark, len(digests), missing(digests, artifacts))


def named_digests(database: Database) -> list[str]:
    """The digests of all bytes that some row refers to."""
    with database.read() as connection:
        return artifact_index.named_digests(connection)


def missing(digests: list[str], artifacts: Artifacts) -> tuple[str, ...]:
    """The digests that have no bytes under the root."""
    return tuple(digest for digest in digests if not artifacts.exists(digest))
