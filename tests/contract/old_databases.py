"""Databases as earlier versions left them, one per migration: `python tests/contract/old_databases.py` adds what lacks.

The rows of the first one, `first_schema.sql`, were written by the code of that day. Each of the others is the one
before it, upgraded by one migration: so a migration that is changed later is found out.
"""

import gzip
import sqlite3
import tempfile
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from alembic.script import ScriptDirectory

import service.store
from service.store import Database

FIRST = Path(__file__).with_name("first_schema.sql")
FOLDER = Path(__file__).with_name("old_databases")


def revisions() -> list[str]:
    """All revisions of the schema, the first one first."""
    migrations = Path(service.store.__path__[0]) / "migrations"
    return [script.revision for script in reversed(list(ScriptDirectory(str(migrations)).walk_revisions()))]


def rows_of(revision: str) -> Path:
    """The file with the rows of the database of this revision, as SQL."""
    return FIRST if revision == revisions()[0] else FOLDER / f"{revision}.sql.gz"


def load(path: Path, revision: str) -> Database:
    """A new SQLite database at this path, with the schema and the rows of this revision."""
    database = Database(f"sqlite:///{path}")
    database.upgrade(revision)
    packed = rows_of(revision).read_bytes()
    script = packed.decode() if rows_of(revision) == FIRST else gzip.decompress(packed).decode()
    with closing(sqlite3.connect(path)) as connection:
        own = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        for [name] in own.fetchall():
            if name != "alembic_version":  # the migrations themselves write rows, which the script has too
                connection.execute(f'DELETE FROM "{name}"')
        connection.commit()
        connection.executescript(f"BEGIN;\n{script}\nCOMMIT;")
    return database


def dump(path: Path) -> str:
    """The rows of a SQLite database, as SQL."""
    with closing(sqlite3.connect(path)) as connection:
        lines = [line for line in connection.iterdump() if line.startswith("INSERT INTO")]
    return "\n".join(line for line in lines if '"alembic_version"' not in line and '"sqlite_sequence"' not in line)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for before, revision in pairwise(revisions()):
        if rows_of(revision).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "old.db"
            with closing(load(path, before)) as database:
                database.upgrade(revision)
            rows_of(revision).write_bytes(gzip.compress(dump(path).encode(), mtime=0))
        print(rows_of(revision))


if __name__ == "__main__":
    main()
