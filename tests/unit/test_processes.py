"""Processes as others see them, and events that their signals set."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from api import home
from service.processes import SignalSafeEvent
from service.settings import Settings


def test_an_event_may_be_set_in_the_middle_of_its_own_wait() -> None:
    """As a handler does that interrupts the thread which holds the event's lock just then."""
    told = SignalSafeEvent()

    def interrupted() -> None:
        with told._cond:
            told.set()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert told.wait(0)


def test_a_service_that_is_dead_and_not_yet_reaped_serves_nothing(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began_at = psutil.Process(process.pid).create_time()
        note = f'{{"url": "http://127.0.0.1:1", "pid": {process.pid}, "process_began_at": {began_at}}}'
        (tmp_path / "serve.json").write_text(note)
        assert home.running_url(settings) == "http://127.0.0.1:1"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
        assert home.running_url(settings) is None


IN_BETWEEN = """
import os, signal, subprocess, sys
from service.processes import die_with_parent

def orphaned(dies=die_with_parent()):
    os.kill(os.getppid(), signal.SIGKILL)
    while os.getppid() == parent:
        pass
    dies()

parent = os.getpid()
subprocess.Popen([sys.executable, "-c", "print('it lives', flush=True); input()"], preexec_fn=orphaned)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_whose_parent_died_before_it_was_ready_does_not_begin() -> None:
    """Between fork and prctl: the kernel tells only of deaths that come later."""
    read, write = os.pipe()
    with open(read, "rb") as said:
        done = subprocess.run([sys.executable, "-c", IN_BETWEEN], stdout=write, stdin=subprocess.PIPE, check=False)
        os.close(write)
        assert done.returncode == -signal.SIGKILL
        assert said.read() == b""  # at the end of whoever could write
