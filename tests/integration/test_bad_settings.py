"""Settings that name no database or artifact root are one sentence and an exit code, whichever command reads them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import typer
from sqlalchemy import make_url

from api.cli import main as cli

if TYPE_CHECKING:
    from typer._click.core import Command

URLS = {
    "foreign": "mysql://ann:secret@db/lab",
    "no port": "postgresql://ann:secret@h:many/x",
    "no URL": "secret",
    "unknown option": "postgresql://ann:secret@127.0.0.1/lab?colour=red",
    "in memory": "sqlite://",
}
ROOTS = {"foreign": "gopher://host/folder", "read-only": "https://host/folder"}
BY_PROCESS = ("dispatch",)  # it becomes another program
# Commands that ask a service over HTTP, and those that neither ask nor look: all others open the database.
OVER_HTTP = {
    "submit", "watch", "cancel", "retry", "pause", "resume", "extend", "priority", "boost", "explain", "queue", "jobs",
    "sweeps", "results", "catalog", "aggregate", "leaderboard", "worst-cases", "compare", "correlations", "report",
    "export", "retract", "data add", "data list", "checkpoint add", "checkpoint list", "user set", "user list",
    "user disable", "user enable", "token list", "token revoke",
}  # fmt: skip
OF_FILES = {"verify"}
OVER_A_SERVICE = {"demo"}  # `serve`, whose process has the sentence in its log
NOT_OF_THE_ROOT = {"db upgrade", "db status", "db backup", "token create", "simulate"}
ONLY_WITH = {"token create": ["--direct"], "simulate": ["--from-store"]}
FIRST = ("foreign", "no port", "no URL", "in memory")
SEEN_BY = {"dispatch": FIRST[:2], "doctor": FIRST, "db restore": FIRST, "openapi": FIRST}
"""A process takes seconds; `openapi` connects to none, `restore` reads the backup first, `doctor` has many checks."""
Run = tuple[int, str]


def leaves(command: "Command", path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Each command of the tree, with something for each argument that it cannot do without."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        needed = [one for one in command.params if one.param_type_name == "argument" and one.required]
        yield " ".join(path), ["1" if "value" in one.name else "x=1" for one in needed]


COMMANDS = dict(leaves(typer.main.get_command(cli.app)))
OF_THE_DATABASE = sorted(COMMANDS.keys() - OVER_HTTP - OF_FILES - OVER_A_SERVICE)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("UNCANNY_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNCANNY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UNCANNY_PORT", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def run(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The exit code and what is on stderr; of what runs in this process as well as of what does not."""
    arguments = [*command.split(), *COMMANDS[command], *ONLY_WITH.get(command, [])]
    if command in BY_PROCESS:
        done = subprocess.run([sys.executable, "-m", "api.cli", *arguments], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr
    monkeypatch.setattr(sys, "argv", ["uncanny", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli._run()
    code = ended.value.code
    assert isinstance(code, int)
    return code, capfd.readouterr().err


def assert_one_sentence(said: Run, about: str) -> None:
    code, err = said
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 1, err
    assert len(lines) == 1, err
    assert re.search(about, lines[0])
    assert "secret" not in err
    assert "Error" not in err


@pytest.mark.parametrize(
    ("command", "url"),
    [(command, url) for command in OF_THE_DATABASE for url in URLS if url in SEEN_BY.get(command, URLS)],
)
def test_a_bad_database_url(
    command: str, url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNCANNY_DATABASE_URL", URLS[url])
    assert_one_sentence(run(command, monkeypatch, capfd), "(?i)database")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("command", sorted(set(OF_THE_DATABASE) - NOT_OF_THE_ROOT))
def test_a_bad_artifact_root(
    command: str, root: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNCANNY_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("UNCANNY_ARTIFACT_ROOT", ROOTS[root])
    assert_one_sentence(run(command, monkeypatch, capfd), "artifact root")


@pytest.mark.parametrize("command", sorted(set(OF_THE_DATABASE) - {"doctor", "db restore", "openapi"}))
def test_a_database_that_cannot_keep_every_name(
    command: str, ascii_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNCANNY_DATABASE_URL", ascii_url)
    assert_one_sentence(run(command, monkeypatch, capfd), "has the encoding SQL_ASCII")


@pytest.fixture(scope="module")
def ascii_url(postgresql_template: str) -> str:
    """A database of the encoding SQL_ASCII, which goes with the server."""
    administration = make_url(postgresql_template).set(database="postgres", drivername="postgresql")
    with psycopg.connect(administration.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
    return make_url(postgresql_template).set(database="bare").render_as_string(hide_password=False)


def test_the_lists_above_name_commands_that_there_are() -> None:
    assert COMMANDS.keys() >= OVER_HTTP | OF_FILES | OVER_A_SERVICE | NOT_OF_THE_ROOT | ONLY_WITH.keys()
    assert {"api", "dispatch", "doctor", "gc", "serve", "db upgrade", "artifacts adopt"} <= set(OF_THE_DATABASE)
