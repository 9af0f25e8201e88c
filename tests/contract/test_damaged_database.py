"""A database whose file is damaged is named in one sentence, by every command, the API and the doctor."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from api.http.app import create_app
from service.errors import DatabaseDamaged
from service.operations import doctor
from service.operations.upgrading import prepare_store
from service.settings import Settings
from service.store import Database

SENTENCE = "the database is damaged"


def scribble(path: Path) -> None:
    """As after a crash of its disk: every page but the first has other bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_bytes(b"this is no database at all " * 4000),
    "pages": scribble,
}


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path) -> Settings:
    path = tmp_path / "uncanny.db"
    shutil.copyfile(sqlite_template, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    DAMAGES[request.param](path)
    return Settings(home=tmp_path)


def test_readyz_and_questions_are_503(damaged: Settings) -> None:
    app = create_app(damaged)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as http:
        for path in ("/readyz", "/v1/jobs"):
            answer = http.get(path)
            assert (answer.status_code, SENTENCE in answer.json()["detail"]) == (503, True), answer.text
    app.state.service.database.close()


def test_the_doctor_names_it(damaged: Settings) -> None:
    checks = {check.name: check for check in doctor.examine(damaged, lambda _: {"error": "not looked at"})}
    assert checks["database"].state == "fail"
    assert SENTENCE in checks["database"].said


def test_no_service_starts_on_it(damaged: Settings) -> None:
    with pytest.raises(DatabaseDamaged, match=SENTENCE):
        prepare_store(damaged)


@pytest.mark.parametrize("arguments", [["db", "upgrade"], ["db", "status"], ["gc"]])
def test_a_command_says_one_sentence(damaged: Settings, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "api.cli", *arguments, "--home", str(damaged.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"uncanny: {SENTENCE}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("code", ["XX001", "XX002"])
def test_so_is_that_of_postgresql(module_postgresql_url: str, code: str) -> None:
    """As PostgreSQL itself says it, of a page or an index that it cannot read."""
    with closing(Database(module_postgresql_url)) as database, pytest.raises(DatabaseDamaged, match=SENTENCE):
        with database.read() as connection:
            connection.execute(text(f"DO $$ BEGIN RAISE 'invalid page in block 0' USING ERRCODE = '{code}'; END $$"))
