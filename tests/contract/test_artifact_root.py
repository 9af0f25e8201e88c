"""The database keeps by what the artifact root is known: a folder that only has its name gets and loses nothing."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert
from typer.testing import CliRunner

from api.cli.main import app as commands
from api.http.app import create_app
from service.errors import ArtifactRootUnusable
from service.lab import artifact_root
from service.lab.artifact_root import RootMark, adopt, of_database
from service.lab.artifacts import MARK, Artifacts
from service.model.executor import Bundle, Capacity, Fault, Grant, Lost
from service.operations import doctor
from service.operations.housekeeping import Policy, collect
from service.operations.upgrading import prepare_store
from service.settings import Settings
from service.store import Database, tables

BYTES = b"the weights of a network"
DIGEST = sha256(BYTES).hexdigest()
NO_RAY = {"error": "not looked at"}


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Of a lab that has been used: its artifact root has an artifact that the index names."""
    settings = Settings(home=tmp_path / "home", database_url=database_url)
    with closing(Database(database_url)) as database:
        ref = of_database(database, settings.artifacts).write_chunks("checkpoint", [BYTES])
        row = {"digest": ref.digest, "task_id": "", "kind": ref.kind, "size_bytes": ref.size_bytes, "created_at": 0.0}
        with database.write() as connection:
            connection.execute(insert(tables.artifacts).values(row))
    return settings


@pytest.fixture(params=["absent", "empty", "another lab's"])
def swapped(request: pytest.FixtureRequest, settings: Settings) -> Path:
    """The artifact root's own folder, away; another one, or none, has its name."""
    root = Path(settings.artifacts)
    away = root.rename(root.with_name("away"))
    if request.param != "absent":
        root.mkdir(mode=0o700)
    if request.param == "another lab's":
        Artifacts(str(root)).mark()
        Artifacts(str(root)).write_chunks("checkpoint", [b"theirs"])
    return away


@pytest.fixture
def http(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
    app.state.service.database.close()


def files(settings: Settings) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in settings.home.rglob("*") if path.is_file() and path.suffix != ".db"}


class TestAnotherFolder:
    def test_the_api_says_so_and_takes_nothing(self, settings: Settings, swapped: Path, http: TestClient) -> None:
        before = files(settings)
        other = sha256(b"new").hexdigest()
        answers = [
            http.get("/readyz"),
            http.put(f"/v1/artifacts/{other}", content=b"new"),
            http.get(f"/v1/artifacts/{DIGEST}"),
        ]
        for answer in answers:
            assert answer.status_code == 503, answer.text
            detail = answer.json()["detail"]
            assert "is not the artifact root of this database" in detail
            assert "mount its disk" in detail
            assert "`uncanny artifacts adopt`" in detail
        assert files(settings) == before

    def test_gc_deletes_nothing(self, settings: Settings, swapped: Path, database: Database) -> None:
        before = files(settings)
        artifacts = of_database(database, settings.artifacts)
        with pytest.raises(ArtifactRootUnusable, match="not the artifact root"):
            collect(database, artifacts, Policy(age_seconds=-1, quota_bytes=0, event_seconds=0), home=settings.home)
        assert files(settings) == before
        with database.read() as connection:
            assert [row.digest for row in connection.execute(tables.artifacts.select())] == [DIGEST]

    def test_the_doctor_names_it(self, settings: Settings, swapped: Path) -> None:
        before = files(settings)
        check = next(one for one in doctor.examine(settings, lambda _: NO_RAY) if one.name == "artifacts")
        assert check.state == "fail"
        assert "is not the artifact root of this database" in check.said
        assert files(settings) == before

    def test_workers_are_told_the_mark_of_the_right_one(self, settings: Settings, swapped: Path) -> None:
        with closing(Database(settings.database)) as database:
            assert RootMark(database, settings.artifacts)() == (swapped / MARK).read_text()

    def test_the_right_one_is_taken_again_when_it_is_back(
        self, settings: Settings, swapped: Path, http: TestClient
    ) -> None:
        assert http.get("/readyz").status_code == 503
        shutil.rmtree(settings.artifacts, ignore_errors=True)
        swapped.rename(settings.artifacts)
        assert http.get("/readyz").status_code == 200
        assert http.get(f"/v1/artifacts/{DIGEST}").content == BYTES


class TestAdopting:
    def test_one_that_was_moved_is_accepted_by_a_command(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Copied without its mark, as `cp -r artifacts/* there` does."""
        there = tmp_path / "there"
        shutil.copytree(settings.artifacts, there, ignore=shutil.ignore_patterns(MARK))
        moved = settings.model_copy(update={"artifact_root": str(there)})
        with closing(Database(moved.database)) as database:
            with pytest.raises(ArtifactRootUnusable, match=r"has no \.root"):
                artifact_root.check(database, moved.artifacts)
            for name, value in moved.environment().items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("UNCANNY_ARTIFACT_ROOT", str(there))
            done = CliRunner().invoke(commands, ["artifacts", "adopt"])
            assert done.exit_code == 0, done.output
            assert "0 of 1 artifacts are not in it" in " ".join(done.output.split())
            artifact_root.check(database, moved.artifacts)
            with of_database(database, moved.artifacts).local(DIGEST) as path:
                assert path.read_bytes() == BYTES

    def test_one_that_is_not_there_is_not_made(self, settings: Settings, tmp_path: Path) -> None:
        with closing(Database(settings.database)) as database, pytest.raises(ArtifactRootUnusable, match="no folder"):
            adopt(database, str(tmp_path / "nowhere"))
        assert not (tmp_path / "nowhere").exists()

    def test_what_is_missing_is_counted(self, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        with closing(Database(settings.database)) as database:
            adopted = adopt(database, str(tmp_path / "new"))
        assert (adopted.named, adopted.missing) == (1, (DIGEST,))


class TestFirstUse:
    @pytest.fixture
    def forgotten(self, settings: Settings, database: Database) -> Settings:
        """As a database of an earlier version has it: the folder is there, and perhaps its mark."""
        with database.write() as connection:
            connection.execute(tables.artifact_roots.delete())
        return settings

    def mark(self, database: Database) -> str:
        with database.read() as connection:
            return str(connection.scalar(tables.artifact_roots.select()))

    @pytest.mark.parametrize("marked", [True, False])
    def test_the_first_start_takes_the_mark_that_is_there_or_makes_one(
        self, forgotten: Settings, database: Database, marked: bool
    ) -> None:
        path = Path(forgotten.artifacts) / MARK
        before = path.read_text()
        if not marked:
            path.unlink()
        prepare_store(forgotten)
        assert self.mark(database) == path.read_text()
        assert (path.read_text() == before) == marked

    @pytest.mark.parametrize("state", ["is empty", "is not there"])
    def test_nor_then_is_a_folder_taken_that_has_nothing_of_what_the_index_names(
        self, forgotten: Settings, database: Database, state: str
    ) -> None:
        root = Path(forgotten.artifacts)
        shutil.rmtree(root)
        if state == "is empty":
            root.mkdir()
        prepare_store(forgotten)
        assert self.mark(database) == "None"
        with pytest.raises(ArtifactRootUnusable, match=state):
            artifact_root.check(database, str(root))
        with pytest.raises(ArtifactRootUnusable, match=state):
            RootMark(database, str(root))()
        assert not list(root.glob("*"))


def test_where_the_first_root_is_not_there_it_is_the_root_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import pool

    def refused() -> str:
        raise ArtifactRootUnusable("it is empty")

    monkeypatch.setattr(pool.RayExecutor, "_hold_ray", lambda self: None)
    executor: Any = pool.RayExecutor(Settings(home=tmp_path, ray_address="127.0.0.1:1"), root_mark=refused)
    executor._capacity = Capacity(True, 4.0, 0.0)
    executor.submit(Bundle("b", (Grant("a", 1, "d", {}), Grant("b", 1, "e", {})), {}))
    first, second = executor.poll(0.0)
    assert isinstance(first, Lost)
    assert (first.reason, first.fault) == ("environment", Fault("artifact_root", str(tmp_path / "artifacts"), ""))
    assert (second.reason, second.fault) == ("given_back", None)
