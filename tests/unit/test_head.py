"""How the head's guard tells whether its head lives, on processes that only have the names of Ray's."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import until

from workers.head import _Core, _name

# As the real one: what it forks has its name until it becomes another program.
RAYLET = "#!/bin/sh\n(sleep 1; exec sleep 1000) &\nwait\n"
GCS_SERVER = "#!/bin/sh\nsleep 1000 &\nwait\n"
HEAD = "import subprocess, sys; [one.wait() for one in [subprocess.Popen([path]) for path in sys.argv[1:]]]"


@pytest.fixture
def head(tmp_path: Path) -> Iterator[psutil.Process]:
    for name, script in (("raylet", RAYLET), ("gcs_server", GCS_SERVER)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-c", HEAD, str(tmp_path / "gcs_server"), str(tmp_path / "raylet")]
    with subprocess.Popen(command, start_new_session=True) as process:
        yield psutil.Process(process.pid)
        os.killpg(process.pid, signal.SIGKILL)  # also what has no parent any more


def named(head: psutil.Process, name: str) -> list[psutil.Process]:
    return [one for one in head.children(recursive=True) if _name(one) == name]


def test_what_a_raylet_forks_is_no_raylet(head: psutil.Process) -> None:
    """It was taken for one, and the head for dead when it became a worker: one start in fifteen."""
    core = _Core(head.pid)
    assert core.lives()  # it is still starting
    until(lambda: len(named(head, "raylet")) == 2)
    assert core.lives()
    until(lambda: len(named(head, "raylet")) == 1)
    assert core.lives()


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_head_without_one_of_its_two_processes_is_dead(head: psutil.Process, name: str) -> None:
    core = _Core(head.pid)
    until(lambda: named(head, "raylet") and named(head, "gcs_server"))
    assert core.lives()
    [one] = [child for child in head.children() if child.name() == name]
    one.kill()
    until(lambda: not core.lives(), 5)
