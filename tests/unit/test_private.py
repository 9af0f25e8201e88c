"""What another account of this machine can do with a home: nothing. Asked as that account, which takes root."""

import os
import shutil
import socket
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import reached_by_nobody
from privileges import needs_root

from api import home
from api.serve.supervisor import _open_log
from service import private
from service.lab.artifacts import Artifacts
from service.model.executor import Succeeded
from service.queue.spool import Spool
from service.settings import Settings
from service.store import Database
from workers.head import SESSION_ROOM_BYTES, _sessions, driver_environment


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every account may enter and read, unlike pytest's own; what it holds is made by a loose umask."""
    before = os.umask(0o022)
    path = Path(tempfile.mkdtemp(prefix="u-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        os.umask(before)
        shutil.rmtree(path)


def made(settings: Settings) -> None:
    """A home with all that a service keeps in it, as its processes make it."""
    settings.home.parent.chmod(0o755)
    home.lock(settings).close()
    home.announce(settings, "http://127.0.0.1:1")
    private.folder(settings.logs)
    _open_log(settings.logs / "api.log").close()
    database = Database(settings.database)
    database.upgrade()
    Artifacts(settings.artifacts).write_chunks("upload", [b"bytes"])
    Spool(settings.spool).keep([Succeeded("t", 1, None)])  # type: ignore[arg-type]
    driver_environment(settings.home, local=True)


def within(folder: Path) -> list[Path]:
    return [folder, *sorted(folder.rglob("*"))]


@needs_root
def test_the_question_would_find_an_open_place(open_folder: Path) -> None:
    (open_folder / "file").write_text("x")
    (open_folder / "closed").mkdir(mode=0o700)
    (open_folder / "closed" / "file").write_text("x")
    assert reached_by_nobody(within(open_folder)) == [open_folder, open_folder / "closed", open_folder / "file"]


@needs_root
def test_another_account_reaches_nothing_in_a_home(open_folder: Path) -> None:
    settings = Settings(home=open_folder / "home")
    made(settings)
    with sqlite3.connect(settings.home / "uncanny.db") as connection:  # with the files beside it
        connection.execute("BEGIN IMMEDIATE")
        inside = within(settings.home)[1:]
        assert {"uncanny.db", "uncanny.db-wal", "uncanny.db-shm", "ray_token", "api.log"} <= {
            one.name for one in inside
        }
        assert reached_by_nobody(inside) == []
    connection.close()


def modes(folder: Path) -> dict[str, int]:
    """Those that others may use."""
    return {str(one): stat.S_IMODE(one.lstat().st_mode) for one in within(folder) if one.lstat().st_mode & 0o077}


def test_all_of_it_is_closed_by_its_own_mode_too(open_folder: Path) -> None:
    """So that nothing is open when somebody opens the home for another reason."""
    settings = Settings(home=open_folder / "home")
    made(settings)
    assert modes(settings.home) == {}
    assert private.tighten(settings) is None


def test_a_home_of_an_earlier_version_is_closed_and_that_is_said(open_folder: Path) -> None:
    settings = Settings(home=open_folder / "home")
    made(settings)
    for one in within(settings.home):
        one.chmod(0o755 if one.is_dir() else 0o644)
    said = private.tighten(settings)
    assert said is not None
    assert f"other accounts of this machine could read {settings.home} and " in said
    assert modes(settings.home) == {}
    assert private.tighten(settings) is None


def test_folders_that_are_not_its_own_stay_as_they_are(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is everybody's, the account's own, or a link to another's file: what is ours in it is closed."""
    for name, mode in (("everybody", 0o1777), ("account", 0o755)):
        place = open_folder / name
        place.mkdir()
        place.chmod(mode)
        monkeypatch.setenv("HOME", str(open_folder / "account"))
        (place / "uncanny.db").write_text("")
        (place / "theirs").write_text("")
        (place / "serve.json").symlink_to(place / "theirs")
        assert private.tighten(Settings(home=place)) is not None
        found = {one.name: stat.S_IMODE(one.stat().st_mode) for one in within(place)}
        assert found == {name: mode, "uncanny.db": 0o600, "theirs": 0o644, "serve.json": 0o644}


@pytest.mark.parametrize("mode", [0o755, 0o2775, 0o700])
def test_artifacts_are_as_open_as_their_root(open_folder: Path, mode: int) -> None:
    """A root that other accounts' workers share stays one."""
    root = open_folder / "root"
    root.mkdir()
    root.chmod(mode)
    before = os.umask(0o077)
    try:
        ref = Artifacts(str(root)).write_chunks("upload", [b"bytes"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / ref.digest[:2]).stat().st_mode) == mode
    assert stat.S_IMODE((root / ref.digest[:2] / ref.digest).stat().st_mode) == mode & 0o666


@pytest.mark.parametrize("name", ["home", "ein längerer Ort"])
@needs_root
def test_what_ray_opens_to_all_is_in_a_folder_that_is_closed(open_folder: Path, name: str) -> None:
    """Ray gives its folder, `sockets`, `logs` and others the mode 0777, also where the umask forbids it."""
    place = open_folder / name
    sessions = _sessions(place)
    try:
        assert (sessions.parent.parent == place) == (name == "home")
        assert len(os.fsencode(sessions)) <= SESSION_ROOM_BYTES
        for folder in (sessions, sessions / "session" / "sockets", sessions / "session" / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)
        place.mkdir(exist_ok=True)
        place.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(sessions / "session" / "sockets" / "raylet"))
            listening.listen()
            (sessions / "session" / "sockets" / "raylet").chmod(0o777)
            assert reached_by_nobody(within(sessions)) == []
        assert _sessions(place) == sessions, "what the last one left is gone"
        assert within(sessions) == [sessions]
    finally:
        shutil.rmtree(sessions.parent)
