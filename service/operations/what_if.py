"""What a simulation starts from: a lab's queue, cluster and timings as they are now, or lengths that are stated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby

from pydantic import ValidationError

from service.errors import InvalidSpec
from service.model.estimates import Estimate, Workload, estimate, units, workload
from service.model.executor import Bundle, Grant
from service.model.json import JsonMapping
from service.model.records import Job
from service.operations.simulation import Load, Nodes, Submission, nodes_with
from service.settings import Kind, Settings
from service.specs import JobSpec, problems
from service.store import Database, claiming, quotas, reading, timings

STATED_SECONDS: Mapping[Kind, float] = {"train": 600.0, "measure": 10.0, "attack": 60.0, "control": 30.0}
"""How long a task of each kind runs where nobody has measured it: a small network on one GPU."""


@dataclass
class TaskLengths:
    """The length of each task: the median of the stored timings of tasks like it, else the one that is stated.

    `begun` says how far tasks are already, by digest. `assumed` counts tasks of workloads without timings.
    """

    stated: Mapping[Kind, float]
    history: Callable[[Workload], Estimate | None] = lambda like: None
    begun: Mapping[str, float] = field(default_factory=dict)
    assumed: dict[Workload, int] = field(default_factory=dict)

    def __call__(self, bundle: Bundle, grant: Grant) -> float:
        like = workload(grant.spec, bundle.train_spec)
        known = self.history(like)
        if known is None:
            self.assumed[like] = self.assumed.get(like, 0) + 1
        whole = self.stated[grant.spec["kind"]] if known is None else known.p50 * units(grant.spec)
        return whole * (1.0 - self.begun.get(grant.digest, 0.0))


@dataclass(frozen=True)
class Lab:
    """A lab's queue as a load, its cluster, its tasks' lengths. `nodes` is None if no dispatcher has reported any."""

    load: Load
    nodes: Nodes | None
    lengths: TaskLengths


def lab_of(database: Database, settings: Settings, stated: Mapping[Kind, float]) -> Lab:
    """Read all that is unfinished and not paused, and change nothing. A running task goes on from where it is.

    Raises `InvalidSpec` for a job that this version refuses.
    """
    with database.read() as connection:
        now, jobs, running = database.now(connection), reading.live_jobs(connection), reading.running_tasks(connection)
        names = {job.user for job in jobs}
        accounts = quotas.accounts(connection, now, names, settings.usage_half_life_seconds, settings.limits)
        leader = claiming.leader(connection)
    accounts = {name: replace(account, devices=0.0) for name, account in accounts.items()}
    load = Load(list(_submissions(jobs, now)), accounts, database)
    return Lab(
        load,
        _nodes(leader.status if leader else {}),
        TaskLengths(stated, _history(database), {task.digest: task.progress for task in running}),
    )


def _submissions(jobs: list[Job], now: float) -> Iterator[Submission]:
    """Jobs that were submitted together are submitted together again, as long ago as they were."""

    def together(job: Job) -> tuple[float, str, int, bool]:
        return job.created_at - now, job.user, job.priority, job.boosted

    for (at, user, priority, boosted), group in groupby(jobs, key=together):
        yield Submission(at, user, [_spec(job) for job in group], priority, boosted)


def _spec(job: Job) -> JobSpec:
    try:
        return JobSpec.model_validate(job.spec)
    except ValidationError as error:
        refused = [(pointer, f"{sentence} (in {job})") for pointer, sentence in problems(error)]
        raise InvalidSpec(refused) from None


def _history(database: Database) -> Callable[[Workload], Estimate | None]:
    """Each workload's stored timings are looked up once, when they are first asked for."""

    @cache
    def look_up(like: Workload) -> Estimate | None:
        with database.read() as connection:
            return estimate(timings.newest(connection, like))

    return look_up


def _nodes(status: JsonMapping) -> Nodes | None:
    """The nodes of the cluster that the leading dispatcher has reported last."""
    capacity = status.get("capacity", {})
    if nodes := capacity.get("nodes"):
        return dict(zip(capacity["names"], nodes, strict=True))
    if not capacity.get("cpus") and not capacity.get("gpus"):
        return None
    return nodes_with(capacity["gpus"], capacity["cpus"], gpus_per_node=max(1, int(capacity["gpus"])))
