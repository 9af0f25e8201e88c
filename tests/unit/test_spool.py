"""The spool: there as a whole or not at all, whatever happens while it is written."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from service.model.executor import ArtifactRef, Bits, Failed, Lost, Message, Outcome, Progress, Started, Succeeded
from service.queue.spool import Spool

DONE = Succeeded("a", 2, Outcome({"x": 0.1, "y": None}, {"c": [1.0]}, {"b": Bits(3, b"\xa0")}, provenance={"p": 1}))
SAVED = Progress("b", 1, 0.5, {"epoch": 1}, ArtifactRef("0" * 64, 10, "epoch_state"))
MESSAGES: list[Message] = [
    Started("a", 2, "worker"), Progress("a", 2, 0.5, {}), SAVED, DONE, Failed("c", 1, "error", "broke"),
    Lost("d", 1, "node_died", "gone"),
]  # fmt: skip


def test_what_another_has_written_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait for the same database share a folder."""
    other = Spool(tmp_path)
    other.keep(MESSAGES)
    listed = list(tmp_path.iterdir())
    other.forget()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(listed))
    assert Spool(tmp_path).take() == []


def test_what_must_not_be_lost_is_there_for_the_next_process(tmp_path: Path) -> None:
    first = Spool(tmp_path / "spool")
    assert not (tmp_path / "spool").exists(), "opening writes nothing"
    first.keep(MESSAGES[:3])
    first.keep(MESSAGES)
    second = Spool(tmp_path / "spool")
    assert second.take() == MESSAGES[2:]
    assert Spool(tmp_path / "spool").take() == MESSAGES[2:], "until it is written elsewhere"
    second.forget()
    assert list((tmp_path / "spool").iterdir()) == []
    assert Spool(tmp_path / "spool").take() == []


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    Spool(tmp_path / "spool").keep(MESSAGES)
    [file] = (tmp_path / "spool").iterdir()
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_read_is_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Spool(tmp_path).keep(MESSAGES)
    (tmp_path / "0.messages").write_bytes(pickle.dumps(MESSAGES)[:-5])
    spool = Spool(tmp_path)
    assert spool.take() == MESSAGES[2:]
    spool.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["0.unreadable"]
    assert "left aside" in caplog.text


def test_a_full_disk_is_said_and_what_was_kept_before_stays(tmp_path: Path) -> None:
    """In a process that may not write more than a page."""
    code = f"""
import logging, resource, signal
from pathlib import Path
from service.model.executor import Lost, Outcome, Succeeded
from service.queue.spool import Spool
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
spool = Spool(Path({str(tmp_path)!r}))
small = Lost("a", 1, "node_died", "gone")
spool.keep([small])
spool.keep([small, Succeeded("b", 1, Outcome(curves={{"loss": [0.1] * 10_000}}))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "2 outcomes stay in memory only" in done.stderr
    assert "make room" in done.stderr
    assert Spool(tmp_path).take() == [Lost("a", 1, "node_died", "gone")]


def test_nothing_is_written_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    spool = Spool(tmp_path)
    spool.keep(MESSAGES)
    [file] = tmp_path.iterdir()
    before = file.stat().st_ino
    spool.keep([*MESSAGES])
    assert file.stat().st_ino == before
    assert len(caplog.records) == 1
