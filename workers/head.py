"""The local Ray head: `ray start --head --block`, and the guard that `python -m workers.head` puts around it.

Ray's processes outlive their parent: if it is killed, all of them stay, and even with death signals two agents stay for
a minute. The guard adopts the orphans, dies with its own parent, and ends when no process of Ray is left.
This module does not import Ray. Its settings were measured with Ray 2.60, and a test checks each of them.
"""

import argparse
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from service import private
from service.processes import SignalSafeEvent, adopt_orphans, die_with_parent, free_port

SESSION_ROOM_BYTES = 43  # for the folder: a Unix socket's path has 107 bytes, and Ray needs the others
OBJECT_STORE_BYTES = 256 << 20  # outcomes are small; weights travel as artifacts
LOG = "head.log"  # in the home, of a head that is not the supervisor's
CORE = ("gcs_server", "raylet")
POLL_INTERVAL_SECONDS = 0.2
STOP_SECONDS = 2.0  # for Ray to end by itself: it needs .2 to .4 s
ORPHAN_SECONDS = 2.0
GUARD_SECONDS = 10.0  # for the guard to end its head
# Warm processes are reused for other GPUs, so the variable must not change under a live CUDA context.
WORKER_ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ANYWHERE = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else it rebuilds the environment in every worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # which prints a stack at SIGTERM
}


def driver_environment(home: Path, *, local: bool) -> dict[str, str]:
    """The environment that a driver needs before it imports Ray: that of this process, with Ray's variables set.

    For a local head (`local`), no `RAY_` variable of this process is kept. For another cluster, the token and the
    address are the user's.
    """
    if not local:
        return {**os.environ, **ANYWHERE}
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token(home)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: listen on loopback only
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a driver without its head ends after so long, not after 60 s
        "RAY_task_events_report_interval_ms": "0",  # unused: the head would keep the events of 100,000 tasks
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for name in ("no_proxy", "NO_PROXY"):  # gRPC would reach this machine through a proxy
        ours[name] = ",".join(filter(None, [kept.get(name), "127.0.0.1", "localhost"]))
    return {**kept, **ANYWHERE, **ours}


def use_driver_environment(home: Path, *, local: bool) -> None:
    """Make `driver_environment` that of this process. To be called before Ray is imported, which reads it then."""
    environment = driver_environment(home, local=local)
    os.environ.clear()
    os.environ.update(environment)


def guard_command(home: Path, port: int, cpus: int | None = None) -> list[str]:
    """The command line of a guard, whose head has `cpus` CPUs (None: all) and listens on this port of loopback."""
    given = ["--home", str(home), "--port", str(port), *(["--cpus", str(cpus)] if cpus is not None else [])]
    return [sys.executable, "-m", "workers.head", *given]


@dataclass(frozen=True)
class Head:
    """A local head: the home with its token, its port, and its guard."""

    home: Path
    port: int
    guard: "subprocess.Popen[bytes]"

    def last_words(self) -> str:
        """The last line that the guard or Ray has written."""
        lines = (self.home / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextmanager
def running(cpus: int | None = None, *, home: Path | None = None) -> Iterator[Head]:
    """A head for as long as the context lasts. It may still be starting.

    Enter it in a thread that outlives it: when that thread ends, the guard gets its death signal. Without `home`, the
    home is a temporary folder.
    """
    with ExitStack() as stack:
        if home is None:
            temporary = tempfile.TemporaryDirectory(
                prefix="u-", dir=_short_temporary_folder(), ignore_cleanup_errors=True
            )
            home = Path(stack.enter_context(temporary))
        port = free_port()
        driver_environment(home, local=True)  # writes the token, before any driver reads it
        with private.opened(home / LOG, "wb") as log:
            guard = subprocess.Popen(
                guard_command(home, port, cpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        try:
            yield Head(home, port, guard)
        finally:
            guard.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    guard.wait(GUARD_SECONDS)
            finally:
                guard.kill()
                guard.wait()


def main(arguments: list[str] | None = None) -> int:
    """Keep a head until SIGTERM, SIGINT or the death of the parent; returns 0 then, else 1 when the head ended."""
    parser = argparse.ArgumentParser(prog="python -m workers.head", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="where the token is, and sessions if there is room")
    parser.add_argument("--port", type=int, required=True, help="of the head, on 127.0.0.1")
    parser.add_argument("--cpus", type=int, help="of the head; all of the machine when left out")
    options = parser.parse_args(arguments)

    stop = SignalSafeEvent()
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda *_: stop.set())
    parent = os.getppid()
    private.be_private()
    adopt_orphans()
    sessions = _sessions(options.home)
    environment = driver_environment(options.home, local=True)
    environment |= WORKER_ENVIRONMENT | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # else SIGTERM takes 30 s
    head = subprocess.Popen(
        _ray_start(sessions, options.port, options.cpus),
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        core = _Core(head.pid)
        while head.poll() is None and not stop.is_set() and os.getppid() == parent and core.lives():
            stop.wait(POLL_INTERVAL_SECONDS)
    finally:
        _end(head)
    if stop.is_set():
        shutil.rmtree(sessions.parent, ignore_errors=True)
        return 0
    return 1


class _Core:
    """The two core processes of a head. `ray start` keeps running if one of them ends by SIGTERM.

    Only its own children count: a process that a raylet forks has the raylet's name until it becomes a worker.
    """

    def __init__(self, head_pid: int) -> None:
        self._head_pid = head_pid
        self._processes: dict[str, psutil.Process] = {}

    def lives(self) -> bool:
        if len(self._processes) < len(CORE):
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._head_pid).children()
                self._processes |= {name: child for child in children if (name := _name(child)) in CORE}
        return all(p.is_running() and _name(p) == name for name, p in self._processes.items())


def _name(process: psutil.Process) -> str:
    """The name of the process; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.name() if process.status() != psutil.STATUS_ZOMBIE else ""
    return ""


def _ray_start(sessions: Path, port: int, cpus: int | None) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--temp-dir={sessions}",
        "--node-ip-address=127.0.0.1",
        *([f"--num-cpus={cpus}"] if cpus is not None else []),
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--no-monitor",
        "--include-log-monitor=false",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]


def _end(head: "subprocess.Popen[bytes]") -> None:
    """End the head and all that it leaves: the orphans of its processes become children of this process."""
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(STOP_SECONDS)
    end_family()


def end_family() -> None:
    """Kill all descendants of this process until none is left: some are adopted only when their parents die."""
    me, deadline = psutil.Process(), time.monotonic() + ORPHAN_SECONDS
    while (left := me.children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(me.children(), timeout=POLL_INTERVAL_SECONDS)


def _token(home: Path) -> Path:
    """The file with the token of local heads, which only its owner can read; made if it does not exist."""
    path = home / "ray_token"
    private.folder(home)
    if path.exists():
        return path
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    with suppress(FileExistsError):  # head and dispatcher start together: both read the same whole token
        os.link(fresh, path)
    fresh.unlink()
    return path


def _sessions(home: Path) -> Path:
    """An empty folder for Ray's sockets and logs: under home, or a short temporary one if Ray cannot work under home.

    Ray opens it to every account of the machine (mode 0777, whatever the umask). Others could swap its sockets, whose
    messages are unpickled. So it lies in a folder that only this account can enter, and whose mode Ray does not change.
    """
    path = home.absolute() / private.SESSIONS
    plain = str(path).isascii() and all(letter.isalnum() or letter in "/._-" for letter in str(path))
    if not plain or len(os.fsencode(path)) > SESSION_ROOM_BYTES:
        name = f"u-ray-{hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:12]}"
        path = _short_temporary_folder() / name / "s"
    closed = path.parent
    with suppress(FileNotFoundError):
        if closed.lstat().st_uid != os.getuid():
            raise PermissionError(f"{closed} belongs to another user: set UNCANNY_HOME to a shorter path")
        shutil.rmtree(closed)  # what the last head left
    private.folder(closed.parent)
    closed.mkdir(mode=0o700)
    path.mkdir(mode=0o700)
    return path


def _short_temporary_folder() -> Path:
    """The folder of temporary files, or /tmp if its path leaves no room for Ray's sockets."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= SESSION_ROOM_BYTES - len("/u-ray-0123456789ab/s") else Path("/tmp")


if __name__ == "__main__":
    sys.exit(main())
