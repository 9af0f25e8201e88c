"""What the supervisor does for one process, without the others."""

import sys
from pathlib import Path

import pytest
from waiting import until

from api.serve import supervisor
from api.serve.supervisor import Part

SPEAKS = """
import os, sys, time
print("before " * 3000, flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("after", flush=True)
"""


def test_a_log_is_bounded_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 10_000)
    log, go = tmp_path / "api.log", tmp_path / "go"
    part = Part("api", [sys.executable, "-c", SPEAKS, str(go)], {}, log, ())
    part.start()
    try:
        until(lambda: log.stat().st_size >= 21_000)
        part.bound_log()
        assert log.stat().st_size == 0
        earlier = tmp_path / "api.log.1"
        assert earlier.read_text().count("before") == 3000
        assert earlier.stat().st_mode & 0o077 == 0
        go.touch()
        assert part.process is not None
        part.process.wait(30)
        assert log.read_text() == "after\n"
    finally:
        part.end()
