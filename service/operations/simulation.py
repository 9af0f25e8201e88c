"""A load of jobs on a cluster in virtual time: the real dispatcher, store and scheduler; only tasks are not computed.

The service itself takes no virtual time: what it took on this machine is in the report. Tasks report no progress, and
running tasks are looked through for cancelled ones no more often than leases are renewed.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Capacity, Grant, Succeeded
from service.model.jobs import TaskState
from service.model.resources import ENDLESS, Amounts, amounts, needs_of, too_large
from service.model.retrying import Patience
from service.model.scheduling import Account
from service.operations.simulation_report import Measured, Report, report
from service.queue.dispatcher import POLL_INTERVAL_SECONDS, Dispatcher
from service.queue.plans import distinct_tasks, plans_of
from service.queue.verbs import Service
from service.queue.virtual import VirtualClock, VirtualExecutor, outcome
from service.settings import KINDS, Settings
from service.specs import JobSpec
from service.store import Connection, Database, changing, claiming, joining, reading, recording, users
from service.store.simulated import SimulatedDatabase, have_used, turns

GPUS_PER_NODE = 8
IDLE_ROUNDS = 3  # in which nothing runs and nobody submits, until the simulation ends
NAME = "simulation"  # of the dispatcher
NEVER_SECONDS = 1e12  # after which a task that reports no progress counts as stalled
PATIENCE = Patience(max_errors=1, max_suspect_losses=1, backoff_seconds=0.0)

Nodes = Mapping[str, Mapping[str, float]]
"""The resources of each node, as Ray names them, by the node's name."""
Lengths = Callable[[Bundle, Grant], float]
"""How many seconds a task of a bundle runs."""


@dataclass(frozen=True)
class Submission:
    """Jobs that `user` submits `at` so many seconds after the start; before it, if it is negative."""

    at: float
    user: str
    cells: Sequence[JobSpec]
    priority: int = 0
    boosted: bool = False


@dataclass(frozen=True)
class Load:
    """Who submits what, in the order of time, and what users have used and may use; others have the settings' limits.

    Data sets and weights of the jobs are those of the database `planning`, and what has succeeded there is not computed
    again. Without it, there are only public data sets, and nothing is known.
    """

    submissions: Iterable[Submission]
    users: Mapping[str, Account] = field(default_factory=dict)
    planning: Database | None = None


def nodes_with(gpus: float, cpus: float, gpus_per_node: int = GPUS_PER_NODE, name: str = "node") -> dict[str, Amounts]:
    """So many GPUs on nodes that have at most `gpus_per_node` of them, and an equal share of the CPUs each."""
    count = max(1, math.ceil(gpus / gpus_per_node))
    shares = [min(float(gpus_per_node), gpus - gpus_per_node * i) for i in range(count)]
    return {
        f"{name}-{i + 1}": {"CPU": cpus * (share / gpus if gpus else 1.0), "GPU": share, "memory": ENDLESS}
        for i, share in enumerate(shares)
    }


def simulate(load: Load, nodes: Nodes, lengths: Lengths, settings: Settings) -> Report:
    """Run the load until nothing can run any more. Raises `InvalidSpec` for jobs that cannot be planned.

    Limits of queued jobs do not count: everything that is submitted is accepted.
    """
    with TemporaryDirectory(prefix="uncanny-simulation-") as folder:
        simulation = _Simulation(Path(folder), load, nodes, lengths, settings)
        try:
            return simulation.run()
        finally:
            simulation.database.close()


class _TimedDispatcher(Dispatcher):
    """It knows how long its claims took, without those that handed nothing over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.claims: list[tuple[float, int]] = []  # `(seconds, bundles)`

    def claim(self) -> int:
        began = time.thread_time()
        bundles = super().claim()
        if bundles:
            self.claims.append((time.thread_time() - began, bundles))
        return bundles


class _Simulation:
    def __init__(self, home: Path, load: Load, nodes: Nodes, lengths: Lengths, settings: Settings) -> None:
        patient = {"stalled_seconds": NEVER_SECONDS, "stalled_limit_seconds": NEVER_SECONDS, "max_queued_jobs": None}
        self._settings = settings.model_copy(update={"home": home, "decision_log": 1, **patient})
        self._load = load
        self._clock = VirtualClock()
        self.database = SimulatedDatabase(home / "uncanny.db", self._clock)
        self.database.upgrade()
        whole = _capacity(nodes)
        kinds = {str(kind): amounts(needs_of(settings, kind, whole)) for kind in KINDS}
        self._too_large = too_large(settings, whole)
        lease = settings.lease_seconds
        self._executor = VirtualExecutor(self._clock, nodes, lengths, kinds, lease / 3)
        artifacts = Artifacts(str(home / "artifacts"))
        self._service = Service(self.database, artifacts, self._settings.limits)
        self._dispatcher = _TimedDispatcher(
            self.database, artifacts, self._executor, self._settings, NAME, self._clock, self._clock.sleep
        )
        self._seconds, self._rounds, self._statements, self._rows = 0.0, 0, 0, 0

    def run(self) -> Report:
        self._register()
        coming = iter(self._load.submissions)
        following, idle = next(coming, None), 0
        while idle < IDLE_ROUNDS:
            while following is not None and following.at <= self._clock():
                self._submit(following)
                following = next(coming, None)
            self._executor.horizon = math.inf if following is None else following.at
            if self._round():
                idle = 0
            elif following is not None:
                self._clock.advance(following.at)
            else:
                self._clock.sleep(POLL_INTERVAL_SECONDS)
                idle += 1
        return self._report()

    def _register(self) -> None:
        with self.database.write() as connection:
            for name, account in self._load.users.items():
                limits = {"weight": account.weight, "max_gpus": account.max_gpus}
                users.put_user(connection, self._clock(), name, limits)
                have_used(connection, self._clock(), name, account.device_seconds)

    def _submit(self, submission: Submission) -> None:
        with (self._load.planning or self.database).read() as connection:
            plans = plans_of(connection, submission.cells)
            existing = joining.existing_tasks(connection, distinct_tasks(plans)) if self._load.planning else {}
        with self.database.write() as connection:
            job_ids = self._service.accept(
                connection, submission.at, plans, user=submission.user, priority=submission.priority
            )
            for job_id in job_ids if submission.boosted else ():
                changing.boost_job(connection, submission.at, NAME, job_id, boosted=True)
            finished = [digest for digest, (_, state) in existing.items() if state is TaskState.SUCCEEDED]
            for _ in ("trainings", "the tasks that waited for them") if finished else ():
                self._finish(connection, finished)

    def _finish(self, connection: Connection, digests: Iterable[str]) -> None:
        """Let those of these tasks that are queued succeed at once, outside the cluster."""
        existing = joining.existing_tasks(connection, digests)
        queued = [task_id for task_id, state in existing.values() if state is TaskState.QUEUED]
        now, lease = self._clock(), self._settings.lease_seconds
        grants = claiming.grant(connection, now, "before", lease, queued).values()
        done = [Succeeded(grant.task_id, grant.attempt, outcome(grant, 0.0)) for grant in grants]
        recording.record(connection, now, "before", done, PATIENCE)

    def _round(self) -> bool:
        asked = self.database.asked
        statements, rows, spent, began = asked.statements, asked.rows, self._executor.spent_seconds, time.thread_time()
        busy = self._dispatcher.tick()
        self._seconds += time.thread_time() - began - (self._executor.spent_seconds - spent)
        self._statements += asked.statements - statements
        self._rows += asked.rows - rows
        self._rounds += 1
        return busy and self._executor.is_working

    def _report(self) -> Report:
        with self.database.read() as connection:
            every = list(turns(connection))
            names = sorted({turn.sponsor for turn in every} | self._load.users.keys())
            default = Account(weight=self._settings.weight, max_gpus=self._settings.max_gpus)
            accounts = {name: self._load.users.get(name, default) for name in names}
            _, by_kind = reading.queue_counts(connection)
        left = {
            kind: number
            for kind, counts in by_kind.items()
            if (number := sum(counts.values()) - counts.get(TaskState.SUCCEEDED, 0))
        }
        measured = Measured(
            self._executor.runs,
            self._executor.idle,
            every,
            accounts,
            self._executor.devices,
            self._dispatcher.claims,
            self._rounds,
            self._seconds,
            self._statements,
            self._rows,
            left,
            {kind: needs for kind, needs in self._too_large.items() if kind in left},
        )
        return report(measured, self._settings.usage_half_life_seconds)


def _capacity(nodes: Nodes) -> Capacity:
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes.values()) for name in ("CPU", "GPU"))
    return Capacity(True, cpus, gpus, tuple(nodes.values()), tuple(nodes))
