"""Quick jobs and readers of events for minutes: what memory, descriptors, threads and disk grow by per 1,000 jobs.

TEST_SOAK_MINUTES=10 uv run pytest -m slow -s tests/integration/test_soak.py
"""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import made_up
import psutil
import pytest
from processes import command_of, serve_with
from sqlalchemy import func, select

from api.client import Client
from service.processes import die_with_parent
from service.store import Database
from service.store.tables import artifacts, jobs

MINUTES = float(os.environ.get("TEST_SOAK_MINUTES", "2"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 240 * max(MINUTES, 10))]

SAMPLE_SECONDS = 2.0
# Until then the API grows: by what planning remembers (of 256 jobs), by compiled statements, and by the pages of the
# database that each connection keeps (up to 2 MB). From job 750 to 1,600 it grew by 0.8 MB.
WARM_JOBS = 700
MOST_WAITING = 60  # jobs that are not done; then the next one is submitted later
JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16, "recipe": {"epochs": 1}}
QUESTIONS = (
    "/v1/jobs?limit=20",
    "/v1/results?limit=20",
    "/v1/queue",
    "/v1/cluster",
    "/v1/leaderboard?filter=seed<1050",
)
PARTS = {
    "api.serve.server": "API", "workers.dispatch": "dispatcher", made_up.__file__: "dispatcher",
    "workers.head": "guard",
    "gcs_server": "GCS", "raylet/raylet": "raylet", "ray::IDLE": "worker", "ray::bundle": "worker",
}  # fmt: skip
FOLDERS = ("database", "artifacts", "spool", "logs")
KINDS = ("memory of worker", "memory", "descriptors", "threads", *FOLDERS)
DONE = select(func.count()).where(jobs.c.state == "succeeded")


@dataclass
class Soak:
    """A service with its clients; `values` has, by name, the jobs that were done then and what was measured."""

    process: "subprocess.Popen[str]"
    home: Path
    url: str
    database: Database
    stop: threading.Event = field(default_factory=threading.Event)
    submitted: int = 0
    events: int = 0
    refused: list[str] = field(default_factory=list)
    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def run(self, minutes: float, least_jobs: int) -> None:
        """For so long, and on a slow machine until that many jobs are done, at most four times as long."""
        clients = [threading.Thread(target=do) for do in (self.submit, self.read, self.read, self.come_and_go)]
        for client in clients:
            client.start()
        began = time.monotonic()
        try:
            while (passed := (time.monotonic() - began) / 60) < minutes or (
                self.done() < least_jobs and passed < 4 * minutes
            ):
                assert all(client.is_alive() for client in clients)
                self.sample()
                time.sleep(SAMPLE_SECONDS)
        finally:
            self.stop.set()
            for client in clients:
                client.join()
        done = self.done()
        print(f"\n{done} jobs in {passed:.1f} minutes, {self.events} events read")
        assert done >= least_jobs
        assert self.events > 4 * done
        assert not self.refused, self.refused

    def submit(self) -> None:
        """A steady stream of jobs, each with a network of its own."""
        with Client(self.url, user="ada", patience_seconds=60) as client:
            while not self.stop.is_set():
                if self.submitted - self.done() > MOST_WAITING:
                    self.stop.wait(0.2)
                    continue
                self.submitted += 1
                client.submit({**JOB, "seed": 1000 + self.submitted})

    def read(self) -> None:
        """A reader of all events."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            with http.stream("GET", "/v1/events") as reply:
                for line in reply.iter_lines():
                    self.events += line.startswith("event:")
                    if self.stop.is_set():
                        return

    def come_and_go(self) -> None:
        """Readers who hear of one thing and go, people who ask, and uploads."""
        chance = random.Random(0)
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stop.wait(0.1):
                with http.stream("GET", "/v1/events") as reply:
                    next(line for line in reply.iter_lines() if line.startswith("event:") or self.stop.is_set())
                content = chance.randbytes(1000)
                upload = http.put(f"/v1/artifacts/{hashlib.sha256(content).hexdigest()}", content=content)
                for answer in (upload, http.get(chance.choice(QUESTIONS))):
                    if answer.status_code not in (200, 201):
                        self.refused.append(f"{answer.request.url}: {answer.status_code}")

    def done(self) -> int:
        with self.database.read() as connection:
            return int(connection.scalar(DONE) or 0)

    def sample(self) -> None:
        done = self.done()
        for process in (psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)):
            command = command_of(process)
            part = (
                "supervisor" if process.pid == self.process.pid else next((PARTS[n] for n in PARTS if n in command), "")
            )
            with suppress(psutil.NoSuchProcess):
                if part:
                    self._note(f"memory of {part} {process.pid}", done, process.memory_info().rss / 2**20)
                    self._note(f"descriptors of {part} {process.pid}", done, process.num_fds())
                    self._note(f"threads of {part} {process.pid}", done, process.num_threads())
        for folder in FOLDERS:
            self._note(f"{folder} on disk", done, bytes_of(self.home, folder) / 2**20)

    def _note(self, name: str, done: int, value: float) -> None:
        self.values.setdefault(name, []).append((done, value))

    def slopes(self, warm_jobs: int) -> dict[str, float]:
        """What each grows by per 1,000 jobs, of what was there nearly all the time.

        Neither the first third counts nor what was measured before `warm_jobs` jobs were done.
        """
        longest = max(len(points) for points in self.values.values())
        slopes = {}
        for name, points in self.values.items():
            if len(points) > 0.8 * longest:
                counted = [point for point in points[longest // 3 :] if point[0] >= warm_jobs]
                jobs_done, measured = zip(*counted, strict=True)
                slopes[name] = 1000 * statistics.linear_regression(jobs_done, measured).slope
                print(f"{name:32} {measured[0]:9.1f} to {measured[-1]:9.1f}, {slopes[name]:+9.2f} per 1,000 jobs")
        return slopes


def bytes_of(home: Path, folder: str) -> int:
    if folder == "database":
        paths = list(home.glob("uncanny.db*"))
    else:
        paths = [Path(parent, name) for parent, _, names in os.walk(home / folder) for name in names]
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@contextmanager
def soaking(home: Path, command: list[str]) -> Iterator[Soak]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UNCANNY_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "UNCANNY_MAX_QUEUED_JOBS": "1000"}
    arguments = [*command, "--home", str(home), "--port", "0"]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=die_with_parent(),
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        with closing(Database(f"sqlite:///{home}/uncanny.db")) as database:
            yield Soak(process, home, url, database)
    finally:
        process.terminate()
        process.communicate(timeout=120)


def leaks(slopes: dict[str, float], **bounds: float) -> list[str]:
    """What grows by more per 1,000 jobs than it may."""
    kinds = {name: next(kind for kind in KINDS if name.startswith(kind)) for name in slopes}
    return [name for name, slope in slopes.items() if slope > bounds[kinds[name]]]


def without_ray(*options: str) -> list[str]:
    return serve_with(f"[sys.executable, {made_up.__file__!r}, *{options!r}]")


BOUNDS = {
    "memory of worker": 5.0,
    "memory": 5.0,
    "descriptors": 3.0,
    "threads": 3.0,
    "artifacts": 10.0,
    "spool": 0.1,
    "logs": 2.0,
    "database": 40.0,
}


def test_quick_jobs(tmp_path: Path) -> None:
    with soaking(tmp_path, without_ray()) as soak:
        soak.run(MINUTES, least_jobs=WARM_JOBS + 300)
        assert leaks(soak.slopes(WARM_JOBS), **BOUNDS) == []


def test_what_leaks_is_seen(tmp_path: Path) -> None:
    with soaking(tmp_path, without_ray(made_up.LEAK)) as soak:
        soak.run(1, least_jobs=WARM_JOBS + 200)
        seen = {name.rpartition(" ")[0] for name in leaks(soak.slopes(WARM_JOBS), **BOUNDS)}
    assert seen == {"memory of dispatcher", "descriptors of dispatcher", "threads of dispatcher"}


STORED_PER_JOB = 1.1  # of the bytes of its checkpoint, beside which only folders grow
# MB per 1,000 jobs with real numbers. A job's rows have 91 KB: 45 in curves (the attack's 40 steps, the training's
# epochs), 16 in numbers of measures, 14 in numbers of attacks. Indexes and pages add an eighth.
STORED_ROWS = 120.0


def test_jobs_on_ray(tmp_path: Path) -> None:
    """A job leaves its checkpoint and its rows on the disk, and in a worker its network, until the cache is full."""
    with soaking(tmp_path, [sys.executable, "-m", "api.cli", "serve", "--json"]) as soak:
        soak.run(max(MINUTES, 10), least_jobs=WARM_JOBS + 300)
        with soak.database.read() as connection:
            stored = connection.scalar(select(func.max(artifacts.c.size_bytes)).where(artifacts.c.kind == "checkpoint"))
        print(f"a checkpoint has {stored} bytes")
        of_checkpoints = STORED_PER_JOB * 1000 * stored / 2**20
        grown = {"artifacts": of_checkpoints, "memory of worker": BOUNDS["memory"] + of_checkpoints}
        bounds = BOUNDS | grown | {"database": STORED_ROWS}
        assert leaks(soak.slopes(WARM_JOBS), **bounds) == []
