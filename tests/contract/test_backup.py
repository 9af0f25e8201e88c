"""Backup and restore: everything comes back, on either kind of database; what is not whole is refused."""

import gzip
import hashlib
import json
import resource
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from store_lab import Lab

from api.http.app import create_app
from service.errors import BackupFailed, Conflict
from service.lab.artifacts import Artifacts
from service.operations.backup import backup, restore
from service.settings import Settings
from service.store import Database, claiming, tables

pytestmark = pytest.mark.slow


QUESTIONS = (
    "/v1/results?limit=1000",
    "/v1/results:aggregate?by=architecture,scale,attack.norm&metrics=robust_accuracy:mean,count&allow_mixed=true",
    "/v1/jobs?limit=1000",
    "/v1/sweeps",
    "/v1/queue",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.backup.gz"


def without_leases(dump: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: rows for name, rows in dump.items() if name != "leases"}


def answers(url: str, home: Path) -> dict[str, Any]:
    """What a service on this database says."""
    app = create_app(Settings(home=home, database_url=url))
    with TestClient(app, base_url="http://localhost") as http:
        replies = {question: http.get(question) for question in QUESTIONS}
    app.state.service.database.close()
    assert [reply.text for reply in replies.values() if reply.status_code != 200] == []
    return {question: reply.json() for question, reply in replies.items()}


def test_everything_comes_back_and_goes_on(lab: Lab, path: Path) -> None:
    lab.submit_sweep()
    lab.succeed(*lab.grant("train"))
    half = lab.grant()
    lab.succeed(*half[:10])
    lab.fail(half[10])
    before = lab.dump()
    made = backup(lab.database, path)
    assert made.rows == {name: len(rows) for name, rows in before.items()}
    assert path.stat().st_mode & 0o777 == 0o600
    lab.submit(user="bob", seed=7)
    lab.finish()
    restored = restore(lab.database, lab.artifacts, path, replace=True)
    assert (restored.rows, restored.missing_artifacts) == (made.rows, ())
    assert without_leases(lab.dump()) == without_leases(before)
    lab.expire()
    lab.finish()
    assert set(lab.job_states()) == {"succeeded", "failed"}


@pytest.mark.parametrize("to_postgresql", [True, False])
def test_a_store_moves_between_kinds_of_databases_and_answers_the_same(
    to_postgresql: bool, sqlite_url: str, postgresql_url: str, artifacts: Artifacts, path: Path, tmp_path: Path,
) -> None:  # fmt: skip
    source, target = (sqlite_url, postgresql_url) if to_postgresql else (postgresql_url, sqlite_url)
    with closing(Database(source)) as old, closing(Database(target)) as new:
        lab, moved = Lab(old, artifacts), Lab(new, artifacts)
        lab.submit_sweep()
        lab.finish()
        lab.submit(seed=1)
        backup(old, path)
        restore(new, artifacts, path)
        assert without_leases(moved.dump()) == without_leases(lab.dump())
        assert answers(target, tmp_path) == answers(source, tmp_path)
        moved.submit(seed=1, scale=50)
        moved.finish()  # new cells, new ids: what the database counts goes on where it was
        moved.check()
        assert moved.job_states() == {"succeeded": 30}


def test_a_backup_of_a_store_at_work_is_one_state_of_it(lab: Lab, path: Path) -> None:
    stop = threading.Event()
    first = lab.submit_sweep({"seed": list(range(5))})["jobs"]

    def work() -> None:
        seed = first
        while not stop.is_set():
            lab.submit(seed=seed)
            lab.finish()
            seed += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        reports = [backup(lab.database, path.with_name(f"{i}.gz")) for i in range(5)]
    finally:
        stop.set()
        worker.join()
    assert all(report.rows["jobs"] >= first for report in reports)
    for report in reports:
        restore(lab.database, lab.artifacts, Path(report.path), replace=True)
        lab.check()


class TestRefused:
    @pytest.fixture
    def made(self, lab: Lab, path: Path) -> Path:
        """A backup of a store with a finished job; the store is empty again."""
        lab.submit()
        lab.finish()
        backup(lab.database, path)
        empty = path.with_name("empty.gz")
        with lab.database.write() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                connection.execute(table.delete())
        backup(lab.database, empty)
        return path

    def test_what_was_cut_off(self, lab: Lab, made: Path) -> None:
        whole = made.read_bytes()
        for share in (0.0, 0.1, 0.5, 0.9, 0.999):
            made.write_bytes(whole[: int(share * len(whole))])
            refused(lab, made, "no whole backup|not all of a backup")
        lines = gzip.decompress(whole).splitlines(keepends=True)
        made.write_bytes(gzip.compress(b"".join(lines[:-1])))
        refused(lab, made, "no whole backup")

    def test_what_was_changed(self, lab: Lab, made: Path) -> None:
        lines = gzip.decompress(made.read_bytes())
        assert b'"succeeded"' in lines
        made.write_bytes(gzip.compress(lines.replace(b'"succeeded"', b'"cancelled"')))
        refused(lab, made, "damaged")

    def test_what_is_something_else(self, lab: Lab, path: Path) -> None:
        refused(lab, path, "there is no")
        path.write_bytes(b"SQLite format 3\0")
        refused(lab, path, "not all of a backup")
        path.write_bytes(gzip.compress(b'{"format": "another"}\n{}\n'))
        refused(lab, path, "no backup that this version")

    def test_another_schema(self, lab: Lab, made: Path) -> None:
        with lab.database.write() as connection:
            schema = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        rewrite(made, lambda header: {**header, "schema": "0001"})
        with pytest.raises(BackupFailed, match=f"schema 0001, this version has {schema}: restore it with the version"):
            restore(lab.database, lab.artifacts, made)

    def test_a_database_that_is_not_empty(self, lab: Lab, made: Path) -> None:
        lab.submit(seed=5)
        before = lab.dump()
        with pytest.raises(Conflict, match=r"not empty \(.*tasks.*--replace"):
            restore(lab.database, lab.artifacts, made)
        assert lab.dump() == before
        restore(lab.database, lab.artifacts, made, replace=True)
        assert lab.job_states() == {"succeeded": 1}

    def test_a_database_that_a_dispatcher_works_on(self, lab: Lab, made: Path) -> None:
        with lab.database.write() as connection:
            claiming.lead(connection, lab.database.now(connection), "d1", None, 60.0, {})
        with pytest.raises(Conflict, match="d1 is at work on this database: stop the service first"):
            restore(lab.database, lab.artifacts, made, replace=True)

    def test_a_file_that_is_there_already(self, lab: Lab, made: Path) -> None:
        before = made.read_bytes()
        with pytest.raises(BackupFailed, match="exists already"):
            backup(lab.database, made)
        assert made.read_bytes() == before
        with pytest.raises(BackupFailed, match="cannot be written"):
            backup(lab.database, made.parent / "no" / "folder" / "file")


def refused(lab: Lab, path: Path, sentence: str) -> None:
    before = lab.dump()
    with pytest.raises(BackupFailed, match=sentence):
        restore(lab.database, lab.artifacts, path, replace=True)
    assert lab.dump() == before


def rewrite(path: Path, change: Any) -> None:
    """The same backup with another header, and an end that fits."""
    header, *lines, end = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    body = json.dumps(change(json.loads(header))).encode() + b"\n" + b"".join(lines)
    fitting = json.dumps({**json.loads(end), "sha256": hashlib.sha256(body).hexdigest()}).encode()
    path.write_bytes(gzip.compress(body + fitting + b"\n"))


def test_who_led_then_leads_no_more(lab: Lab, path: Path) -> None:
    with lab.database.write() as connection:
        epoch = claiming.lead(connection, lab.database.now(connection), "d1", None, 0.0, {})
    backup(lab.database, path)
    restore(lab.database, lab.artifacts, path, replace=True)
    with lab.database.read() as connection:
        assert not claiming.still_leads(connection, "d1", epoch)


def test_bytes_that_are_missing_are_named(lab: Lab, path: Path, tmp_path: Path) -> None:
    lab.submit()
    lab.submit(seed=1)
    lab.finish()
    backup(lab.database, path)
    first, second = sorted(row.checkpoint_digest for row in lab.rows(tables.trainings))
    lab.artifacts.delete(second)
    assert restore(lab.database, lab.artifacts, path, replace=True).missing_artifacts == (second,)
    elsewhere = Artifacts(str(tmp_path / "elsewhere"))
    assert restore(lab.database, elsewhere, path, replace=True).missing_artifacts == (first, second)


def test_a_disk_without_room_leaves_nothing(sqlite_url: str, artifacts: Artifacts, path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Database(sqlite_url)) as database:
        Lab(database, artifacts).submit_sweep()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(BackupFailed, match=r"cannot be written: .*too large"):
                backup(database, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(path.parent.glob("*.gz*")) == []
