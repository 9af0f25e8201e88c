"""What the databases' errors mean: the database is away, full or damaged, or the question takes too long."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DatabaseError, DataError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.errors import DatabaseAway, DatabaseDamaged, DatabaseFull, InvalidQuery

# PostgreSQL's codes of errors that may pass by themselves: a broken connection, a standby server, a writer that idled,
# a conflict, no resources left, no turn in time, a shutdown or time-out, an input or output error.
AWAY = ("08", "25006", "25P03", "40", "53", "55P03", "57", "58")
FULL = "53100"  # the one of these codes for a full disk
DAMAGED = ("XX001", "XX002")  # data pages and index pages that cannot be read
DAMAGED_SQLITE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if isinstance(error, DataError) and "NUL" in str(error.orig):
            sentence = "a text in it contains a NUL character, which no database keeps"
            raise InvalidQuery("request", sentence) from error
        if _is_damaged(error.orig):
            raise _damaged(error) from error
        if not isinstance(error, (OperationalError, InternalError)):
            raise
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR or not _is_away(error.orig):
            raise  # a mistake in a statement, such as a missing table
        raise _away(error) from error
    except InterfaceError as error:
        if not _is_away(error.orig):
            raise
        raise _away(error) from error
    except _of_drivers("Error") as error:  # a driver raised it outside of a statement of SQLAlchemy
        if _is_damaged(error):
            raise _damaged(error) from error
        if not isinstance(error, _of_drivers("OperationalError")) or not _is_away(error):
            raise
        raise _away(error) from error
    except PoolTimeout as error:
        raise DatabaseAway("all connections to the database are busy: it will be tried again") from error


def _of_drivers(name: str) -> tuple[type[Exception], ...]:
    """The drivers' exceptions of this name. psycopg is imported for PostgreSQL only, and has raised nothing before."""
    return tuple(getattr(sys.modules[driver], name) for driver in ("sqlite3", "psycopg") if driver in sys.modules)


def _is_damaged(error: BaseException | None) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return (code is not None and code & 0xFF in DAMAGED_SQLITE) or getattr(error, "sqlstate", None) in DAMAGED


def _damaged(error: Exception) -> DatabaseDamaged:
    return DatabaseDamaged(
        f"the database is damaged ({_first_line(error)}): stop the service, keep a copy of the database, and restore a "
        "backup into a new one (`uncanny db restore FILE`)"
    )


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _is_away(error: BaseException | None) -> bool:
    """Whether the error may pass by itself. Those without a code are of the connection, or of SQLite."""
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(AWAY)


def _away(error: Exception) -> DatabaseAway:
    origin = getattr(error, "orig", None) or error
    message = _first_line(error)
    if getattr(origin, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(origin, "sqlstate", None) == FULL:
        return DatabaseFull(f"the database's disk is full ({message}): make room; nothing was written")
    if "statement timeout" in message or getattr(origin, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return DatabaseAway(
            f"this takes the database too long ({message}): narrow the filter, ask for fewer rows or fields, or ask "
            "when the database has less to do"
        )
    return DatabaseAway(f"the database does not answer ({message}): it will be tried again")
