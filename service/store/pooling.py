"""What stands behind a PostgreSQL URL: a pooler that changes backends between transactions, and which encoding.

Through such a pooler a prepared statement is another one, or none, on the next backend, and `LISTEN` is forgotten.
"""

import re
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import ArgumentError

from service.errors import UnfitDatabase

POOLED = "pgbouncer"  # `?pgbouncer=true` in a URL: there is one, as other clients spell it too
NEVER = re.compile(
    r"invalid (\w+ value: |port number: |integer value )\""
)  # libpq's words for an option; it has no code
Connect = Callable[[], "psycopg.Connection[Any]"]


class Pooling:
    """Whether there is a pooler, which is looked at before an engine's first connection; None until then.

    Where there is one, the engine prepares no statements.
    """

    def __init__(self, declared: bool) -> None:
        self.declared = declared
        self.found: bool | None = None

    def install(self, engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def _connect(_dialect: Any, _record: Any, arguments: Any, options: dict[str, Any]) -> None:
            if self.found is None:
                self.found = self._look(lambda: psycopg.connect(*arguments, **options, autocommit=True))
            if self.found:
                options["prepare_threshold"] = None

    def _look(self, connect: Connect) -> bool:
        """Raises `UnfitDatabase` for an encoding that cannot keep every text, and for options that nobody knows."""
        try:
            with connect() as first:
                encoding = _shown(first, "SHOW server_encoding")
                if encoding != "UTF8":
                    raise UnfitDatabase(
                        f"the database {first.info.dbname!r} has the encoding {encoding}, which keeps not every name: "
                        "make it with CREATE DATABASE ... TEMPLATE template0 ENCODING 'UTF8'"
                    )
                if self.declared:
                    return True
                with connect() as second:
                    return changes_backends(first, second)
        except (psycopg.ProgrammingError, psycopg.OperationalError) as error:
            if isinstance(error, psycopg.OperationalError) and not NEVER.search(str(error)):
                raise
            raise UnfitDatabase(f"the database URL cannot be used: {str(error).strip()}") from None


def changes_backends(first: "psycopg.Connection[Any]", second: "psycopg.Connection[Any]") -> bool:
    """Whether two connections, in autocommit, are not each one backend for as long as they live.

    A pooler names itself as the process to cancel, or the backend that it had at first; whichever it gives back first
    or last it gives to the next one: so the two begin in both orders after they have ended in both.
    """
    pair = (first, second)
    own = tuple(connection.info.backend_pid for connection in pair)
    if tuple(map(_backend, pair)) != own or own[0] == own[1]:
        return True
    for order in (pair, pair[::-1], pair):
        for connection in order:
            connection.execute("BEGIN")
        seen = tuple(map(_backend, pair))
        for connection in pair:
            connection.execute("COMMIT")
        if seen != own:
            return True
    return False


def postgresql_url(url: str) -> tuple[URL, bool]:
    """The URL without what only we understand, and whether it says that there is a pooler. Raises `UnfitDatabase`."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UnfitDatabase(
            "the database URL cannot be read: write postgresql://USER@HOST:PORT/NAME or sqlite:////PATH"
        ) from None
    declared = str(parsed.query.get(POOLED, "")).lower() in ("1", "true", "yes")
    return parsed.difference_update_query([POOLED]), declared


def _backend(connection: "psycopg.Connection[Any]") -> int:
    return int(_shown(connection, "SELECT pg_backend_pid()"))


def _shown(connection: "psycopg.Connection[Any]", statement: str) -> Any:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row[0]
