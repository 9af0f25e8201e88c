"""The local Ray head and its guard: what RAY settings really do, and that nothing outlives whoever wanted it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from accounts import reached_by_nobody
from privileges import needs_root
from processes import command_of
from waiting import until

from service.processes import free_port
from workers.head import STOP_SECONDS, driver_environment, guard_command, running

pytestmark = pytest.mark.slow

# A driver that has a task running which sleeps, says so, and waits.
DRIVER = """
    import sys, time
    import ray
    ray.init(address=f"127.0.0.1:{sys.argv[1]}", log_to_driver=False, configure_logging=False, logging_level="ERROR")
    @ray.remote(max_retries=0)
    def task():
        time.sleep(1000)
    held = task.remote()
    while ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]:
        time.sleep(0.05)
    print("running", flush=True)
    time.sleep(1000)
"""


def runs(what: str, parent: int) -> bool:
    return any(what in command_of(process) for process in descendants(parent))


def listens(port: int) -> bool:
    return any(
        c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in psutil.net_connections("tcp")
    )


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(family: list[psutil.Process]) -> bool:
    return not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)


@pytest.fixture
def head() -> Iterator[tuple[Path, int, psutil.Process]]:
    """A head of its own: home, port and the guard."""
    with running(cpus=1) as head:
        until(lambda: listens(head.port))
        yield head.home, head.port, psutil.Process(head.guard.pid)


@contextmanager
def driver(home: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(port)], env=driver_environment(home, local=True),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            until(lambda: "running" in process.stdout.readline())  # type: ignore[union-attr]
            yield process
        finally:
            process.kill()


def test_every_listener_is_on_loopback_and_no_agent_is_there_that_is_not_needed(head: Any) -> None:
    home, port, guard = head
    with driver(home, port):
        family = guard.children(recursive=True)
        bound = {c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert {address.removeprefix("::ffff:") for address in bound} == {"127.0.0.1"}
        names = " ".join(command_of(member) for member in family)
        assert "monitor" not in names.replace("--no-monitor", "").replace("--include-log-monitor", "")


@needs_root
def test_another_account_reaches_nothing_of_it(head: Any) -> None:
    """Neither sockets, whose messages are unpickled, nor logs, where links could be planted; while it is at work."""
    home, port, _ = head
    with driver(home, port):
        home.chmod(0o755)  # as the home of an earlier version
        places = sorted((home / "ray").rglob("*"))
        assert {"sockets", "logs", "runtime_resources", "raylet"} <= {place.name for place in places}
        assert any(place.is_dir() and place.stat().st_mode & 0o777 == 0o777 for place in places), "Ray opens them"
        assert reached_by_nobody(places) == []


def test_a_driver_without_the_token_is_refused(head: Any, tmp_path: Path) -> None:
    _, port, _ = head
    script = f"import ray; ray.init(address='127.0.0.1:{port}', log_to_driver=False)"
    environment = driver_environment(tmp_path, local=True)  # a token, and another one
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=100, check=False
    )
    assert done.returncode != 0


def test_a_driver_that_is_killed_takes_its_task_along_and_leaves_the_head(head: Any) -> None:
    home, port, guard = head
    with driver(home, port) as process:
        workers = [one for one in guard.children(recursive=True) if "ray::task" in command_of(one)]
        assert len(workers) == 1
        process.kill()
        until(lambda: gone(workers), 10)
    with driver(home, port):  # the next one finds it
        assert guard.is_running()


def test_told_to_stop_it_ends_with_everything_while_a_task_runs(head: Any) -> None:
    home, port, guard = head
    with driver(home, port):
        family = guard.children(recursive=True)
        began = time.monotonic()
        guard.terminate()
        until(lambda: gone([guard, *family]), 10)
        assert time.monotonic() - began < STOP_SECONDS  # else it was killed: Ray's own drain takes 30 s
    assert not (home / "ray").exists()


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_driver_whose_head_dies_ends_by_itself(head: Any, victim: str, which: signal.Signals) -> None:
    home, port, guard = head
    with driver(home, port) as process:
        family = guard.children(recursive=True)
        next(one for one in family if victim in one.name()).send_signal(which)
        until(lambda: gone([guard, *family]), 20)  # the guard ends what is left, and says so by ending itself
        process.wait(40)  # Ray's default is 60 s
        assert process.returncode != 0


def test_a_signal_is_the_drivers_own_affair(head: Any) -> None:
    home, port, _ = head
    with driver(home, port) as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert "SIGTERM" not in said  # Ray's handler prints a stack


@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_nothing_is_left_when_the_parent_or_the_guard_is_killed(victim: str, tmp_path: Path) -> None:
    """The parent is killed: the guard ends all. The guard is killed: who adopts orphans ends them, as `serve` does."""
    script = """
        import os, signal, sys, time
        from api.serve.supervisor import Part, Supervisor
        from service.processes import adopt_orphans
        adopt_orphans()
        part = Part("head", sys.argv[1:], dict(os.environ), None, (), death_signal=signal.SIGTERM)
        part.start()
        supervisor = Supervisor.__new__(Supervisor)
        supervisor.parts = [part]
        while part.died() is None:
            time.sleep(0.05)
        supervisor._end_orphans()
        time.sleep(1000)
    """
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(script), *guard_command(tmp_path, port, 1)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        try:
            until(lambda: listens(port))
            for last in ("DashboardAgent", "RuntimeEnvAgent"):  # which would stay for a minute
                until(partial(runs, last, parent.pid))
            family = descendants(parent.pid)
            guard = next(one for one in family if "workers.head" in command_of(one))
            os.kill(parent.pid if victim == "parent" else guard.pid, signal.SIGKILL)
            until(lambda: gone(family), 10)
        finally:
            parent.kill()


def test_a_dispatcher_on_its_own_ends_what_its_killed_guard_leaves(sqlite_url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UNCANNY_"))}
    environment |= {"UNCANNY_HOME": str(tmp_path), "UNCANNY_DATABASE_URL": sqlite_url}
    command = [sys.executable, "-m", "workers.dispatch"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            until(lambda: "starts" in process.stderr.readline())  # type: ignore[union-attr]
            family = descendants(process.pid)
            assert any("raylet" in one.name() for one in family)
            next(one for one in family if "workers.head" in command_of(one)).kill()
            process.communicate(timeout=60)
            assert process.returncode == 1
            assert gone(family)
        finally:
            process.kill()
