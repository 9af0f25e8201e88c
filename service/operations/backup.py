"""Backup and restore: every row of the database, the index of artifacts among them, in one file.

The file is gzipped JSON, a value a line: a header with the schema; for each table its name, its columns and then its
rows; at the end the number of rows of each table, and the SHA-256 of all lines before. The file is the same for each
kind of database, so it also moves a store from SQLite to PostgreSQL. A backup reads in one transaction that sees one
state, so the service may run meanwhile. A restore writes in one transaction, so it is whole or changes nothing.

The bytes of artifacts are not in the file. A copy of the artifact root that is made after the backup has all artifacts
that the index names, unless `uncanny gc` ran in between. A restore lists those that are missing.
"""

import base64
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ArtifactRootUnusable, BackupFailed, Conflict
from service.lab.artifact_root import check, missing, named_digests
from service.lab.artifacts import Artifacts
from service.model.json import JsonObject
from service.store import Connection, Database, claiming, copying

FORMAT = "uncanny backup 1"
SUFFIX = ".backup.gz"
Row = list[Any]  # Any: the values of the columns, of whichever kinds these have
Line = JsonObject | Row
LEVEL = 5  # of compression: half the time of the best, and nearly as small


@dataclass(frozen=True)
class Report:
    """The contents of a backup: rows by table; after a restore, the digests without bytes under the artifact root.

    `is_root`: after a restore, whether the artifact root is the one that the backup knows.
    """

    path: str
    schema: str
    made_at: float
    rows: dict[str, int]
    missing_artifacts: tuple[str, ...] = ()
    is_root: bool = True


def backup(database: Database, path: Path) -> Report:
    """Write a backup to `path`, a new file, or into `path`, if it is a folder. Safe while the service runs.

    Raises `BackupFailed` if it cannot be written; then no part of it is left. `SchemaOutdated`, `DatabaseAway`.
    """
    database.check_schema()
    schema = str(database.revision())
    with database.read() as connection:
        now = database.now(connection)
        if path.is_dir():
            path = path / f"uncanny-{now:.0f}{SUFFIX}"
        if path.exists():
            raise BackupFailed(f"{path} exists already: name a new file")
        header = {"format": FORMAT, "schema": schema, "made_at": now}
        part = path.with_name(path.name + ".part")
        try:
            counts = _write(part, _lines(connection, header))
            os.replace(part, path)
        except OSError as error:
            raise BackupFailed(f"the backup cannot be written: {error}") from None
        finally:
            part.unlink(missing_ok=True)
    return Report(str(path), schema, now, counts)


def restore(database: Database, artifacts: Artifacts, path: Path, *, replace: bool = False) -> Report:
    """Put the rows of the backup into an empty database, or `replace` the rows of one. Stop the service first.

    Raises `BackupFailed` if the file is not a whole backup of this version's schema, `Conflict` if the database
    is not empty or a dispatcher is at work on it; then nothing has changed.
    """
    report = _check(path)
    if database.revision() is None:
        database.upgrade()
    database.check_schema()
    if report.schema != database.revision():
        raise BackupFailed(
            f"{path} has schema {report.schema}, this version has {database.revision()}: restore it with the version "
            "that made it, then run `uncanny db upgrade` with this one"
        )
    with database.write() as connection:
        leader = claiming.leader(connection)
        if leader is not None and leader.expires_at > database.now(connection):
            raise Conflict(f"the dispatcher {leader.holder} is at work on this database: stop the service first")
        filled = copying.filled(connection)
        if filled and not replace:
            raise Conflict(f"the database is not empty ({', '.join(filled)}): --replace deletes what it has")
        copying.empty(connection)
        _fill(connection, path)
        copying.after_filling(connection)
    absent = missing(named_digests(database), artifacts)
    return Report(report.path, report.schema, report.made_at, report.rows, absent, _is_of(database, artifacts))


def _is_of(database: Database, artifacts: Artifacts) -> bool:
    try:
        check(database, artifacts.root)
    except ArtifactRootUnusable:
        return False
    return True


def _write(path: Path, lines: Iterator[Line]) -> dict[str, int]:
    """Write these values and the last line; returns the rows of each table. Only its own user can read the file."""
    counts, seen, table = Counter[str](), hashlib.sha256(), ""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        with gzip.GzipFile("", "wb", LEVEL, file) as packed:
            for value in lines:
                if isinstance(value, list):
                    counts[table] += 1
                elif table := value.get("table", ""):
                    counts[table] = 0
                line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
                seen.update(line)
                packed.write(line)
            packed.write(json.dumps({"rows": counts, "sha256": seen.hexdigest()}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return dict(counts)


def _lines(connection: Connection, header: JsonObject) -> Iterator[Line]:
    yield header
    for table, columns in copying.tables().items():
        yield {"table": table, "columns": columns}
        binary = copying.binary_columns(table)
        for row in copying.rows(connection, table):
            yield [
                base64.b64encode(value).decode() if name in binary and value is not None else value
                for name, value in zip(columns, row, strict=True)
            ]


def _read(path: Path) -> Generator[Line, None, None]:
    """The values in the file, without its last line. Raises `BackupFailed` if that line does not fit them."""
    seen, last = hashlib.sha256(), b""
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                if last:
                    seen.update(last)
                    yield json.loads(last)
                last = line
            if json.loads(last)["sha256"] != seen.hexdigest():
                raise BackupFailed(f"{path} is damaged: its lines have another SHA-256 than it says")
    except FileNotFoundError:
        raise BackupFailed(f"there is no {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BackupFailed(f"{path} cannot be read, or is not all of a backup: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise BackupFailed(f"{path} is no whole backup of Uncanny") from None


def _check(path: Path) -> Report:
    """Read the whole file once before anything is changed."""
    with closing(_read(path)) as values:
        header = next(values, None)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise BackupFailed(f"{path} is no backup that this version of Uncanny reads")
        rows, table = Counter[str](), ""
        for value in values:
            if isinstance(value, dict):
                table = str(value.get("table"))
                rows[table] = 0
            else:
                rows[table] += 1
    return Report(str(path), str(header.get("schema")), float(header.get("made_at", 0)), dict(rows))


def _fill(connection: Connection, path: Path) -> None:
    with closing(_read(path)) as values:
        next(values)
        table, columns = "", [""]
        batch: list[Row] = []
        for value in values:
            if isinstance(value, dict):
                _insert(connection, table, columns, batch)
                table, columns, batch = value["table"], value["columns"], []
                continue
            batch.append(value)
            if len(batch) == copying.BATCH:
                _insert(connection, table, columns, batch)
                batch = []
        _insert(connection, table, columns, batch)


def _insert(connection: Connection, table: str, columns: list[str], rows: list[Row]) -> None:
    if not rows:
        return
    binary = copying.binary_columns(table)
    values = [
        {
            name: base64.b64decode(value) if name in binary and value is not None else value
            for name, value in zip(columns, row, strict=True)
        }
        for row in rows
    ]
    copying.fill(connection, table, values)
