"""What a PostgreSQL URL leads to: a pooler that changes backends between transactions, if any, and which encoding.

Behind such a pooler, the next backend does not have a prepared statement, or has another one, and `LISTEN` is lost.
"""

import re
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import Engine, event

from service.errors import UnfitDatabase

# The messages of libpq for an invalid option: they come without a code.
INVALID_OPTION = re.compile(r"invalid (\w+ value: |port number: |integer value )\"")
Connect = Callable[[], "psycopg.Connection[Any]"]  # Any, here and below: the rows of any statement


class Pooling:
    """Whether there is a pooler. `is_present` is None until an engine makes its first connection.

    If there is one, the engine prepares no statements.
    """

    def __init__(self, declared: bool) -> None:
        self.declared = declared
        self.is_present: bool | None = None

    def install(self, engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def _connect(_dialect: Any, _record: Any, arguments: Any, options: dict[str, Any]) -> None:
            # Any: events have no types.
            if self.is_present is None:
                self.is_present = self._detect(lambda: psycopg.connect(*arguments, **options, autocommit=True))
            if self.is_present:
                options["prepare_threshold"] = None

    def _detect(self, connect: Connect) -> bool:
        """Raises `UnfitDatabase` for an encoding that cannot keep every text, and for invalid options."""
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
            if isinstance(error, psycopg.OperationalError) and not INVALID_OPTION.search(str(error)):
                raise
            raise UnfitDatabase(f"the database URL cannot be used: {str(error).strip()}") from None


def changes_backends(first: "psycopg.Connection[Any]", second: "psycopg.Connection[Any]") -> bool:
    """Whether two connections, in autocommit, do not each keep one backend for as long as they live.

    As the process to cancel, a pooler names itself, or the backend that it gave at first. It may give the next
    transaction the backend that was freed first, or the one freed last: so transactions begin and end in both orders.
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


def _backend(connection: "psycopg.Connection[Any]") -> int:
    return int(_shown(connection, "SELECT pg_backend_pid()"))


def _shown(connection: "psycopg.Connection[Any]", statement: str) -> Any:  # Any: whatever the statement shows
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row[0]
