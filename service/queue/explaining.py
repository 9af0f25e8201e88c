"""Why a job is not running, and which tasks come before its own: the scheduler's own function ranks the queue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from service.errors import DatabaseAway, DatabaseFull, NotFound
from service.model import resources, scheduling
from service.model.environment import SetAside, hindrance, names_of, reported
from service.model.executor import Capacity
from service.model.jobs import LIVE_JOB, TaskState
from service.model.json import JsonObject
from service.model.records import Job, Task
from service.model.scheduling import Account, Cluster
from service.model.times import iso
from service.settings import Settings
from service.store import Connection, Database, changing, claiming, quotas, reading

WINDOW = 512  # tasks of the queue that are ranked to count those that come before a task
NO_SHARE = Account()


def explain(database: Database, settings: Settings, job_id: str) -> JsonObject:
    """A sentence on the job, and one on each of its tasks that has not succeeded. Raises `NotFound`."""
    full = _database_full(database)
    with database.read() as connection:
        job = reading.job(connection, job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id}")
        tasks = reading.tasks_of_job(connection, job_id)
        look = _look(connection, database.now(connection), settings, tasks, job.dataset, full)
        lines = [_task_line(connection, look, task, tasks) for task in tasks if task.state != TaskState.SUCCEEDED]
        sweep = reading.sweep(connection, job.sweep_id) if job.sweep_id else None
    paused = sweep is not None and sweep.paused and job.state in LIVE_JOB
    why = sweep.pause_reason or "" if sweep is not None and paused else ""
    sentence = _sentence(job, tasks, lines, paused) + (f" ({why})" if why else "")
    return {"job_id": job_id, "state": job.state, "sentence": sentence, "tasks": lines}


def queue_status(database: Database, settings: Settings) -> JsonObject:
    """Whether the queue is paused, and the use of each user who waits, runs something or has used something lately."""
    with database.read() as connection:
        row, now = changing.queue(connection), database.now(connection)
        waiting = claiming.waiting_sponsors(connection)
        names = {*waiting, *quotas.devices_in_use(connection), *quotas.known(connection)}
        accounts = quotas.accounts(connection, now, names, settings.usage_half_life_seconds, settings.limits)
    return {
        "paused": bool(row and row.paused),
        "paused_by": row.changed_by if row and row.paused else None,
        "changed_at": iso(row.changed_at) if row else None,
        "users": [
            {
                "user": name,
                "weight": account.weight,
                "device_seconds": round(account.device_seconds, 1),
                "gpus_in_use": account.devices,
                "max_gpus": account.max_gpus,
                "waiting": name in waiting,
            }
            for name, account in accounts.items()
        ],
    }


@dataclass(frozen=True)
class _Look:
    """The queue and the cluster at one moment.

    `stop`: why nothing at all is claimed (None: something is). `kept`: why no node takes the job's data set (None: one
    does). `too_large`: the resources of each kind of task that no node is large enough for. `before`: how many tasks
    come before each of the `seen` tasks. `in_use` of the `slots` (GPUs, or CPUs if there are none) are taken.
    """

    now: float
    stop: str | None
    cluster: Cluster
    too_large: Mapping[str, str]
    accounts: Mapping[str, Account]
    before: Mapping[str, int]
    seen: int
    slots: float = 0.0
    in_use: float = 0.0
    kept: SetAside | None = None
    no_gpu: str = ""  # why a task that takes a GPU waits for one, if the cluster has lost all of its GPUs


def _database_full(database: Database) -> str | None:
    """A sentence if the database cannot grow any more: then no dispatcher can lead, and nothing is claimed."""
    with database.read() as connection:
        leads = claiming.leads_now(connection, database.now(connection))
    try:
        database.check_room(doubt=not leads)
    except DatabaseFull as error:
        return str(error)
    except DatabaseAway:  # a long write of somebody else: no sign of a full disk
        return None
    return None


def _look(
    connection: Connection, now: float, settings: Settings, tasks: Sequence[Task], dataset: str, full: str | None
) -> _Look:
    queued = [task for task in tasks if task.state == TaskState.QUEUED and not task.paused]
    leader, row = claiming.leader(connection), changing.queue(connection)
    reported_capacity = leader.status.get("capacity") if leader else None
    capacity = Capacity(**reported_capacity) if reported_capacity else Capacity(False, 0.0, 0.0)
    stop = None
    if full is not None:
        stop = full
    elif row is not None and row.paused:
        stop = f"the queue is paused (by {row.changed_by}, {iso(row.changed_at)})"
    elif leader is None or leader.expires_at <= now:
        stop = "no dispatcher leads: `uncanny serve` or `uncanny dispatch` runs one"
    elif not capacity.ready:
        stop = "the cluster is not ready yet"
    too_large = resources.too_large(settings, capacity) if capacity.ready else {}
    no_gpu = _no_gpu(capacity, reported(leader.status), now) if leader else ""
    shares = resources.cluster(settings, capacity, ()).share_by_kind
    cluster = Cluster(WINDOW, shares)  # with a slot for every task, so that all are ranked
    kept = hindrance(reported(leader.status), names_of(capacity), dataset) if leader and stop is None else None
    if not queued:
        return _Look(now, stop, cluster, too_large, {}, {}, 0, kept=kept, no_gpu=no_gpu)
    window = claiming.waiting(connection, now, WINDOW)
    names = {task.sponsor for task in window} | {task.sponsor for task in queued}
    accounts = quotas.accounts(connection, now, names, settings.usage_half_life_seconds, settings.limits)
    unlimited = {name: replace(account, max_gpus=None) for name, account in accounts.items()}
    before: dict[str, int] = {}
    for decision in scheduling.choose(window, unlimited, replace(cluster, free_slots=len(window)), now):
        before |= dict.fromkeys(decision.task_ids, len(before))
    in_use = sum(quotas.devices_in_use(connection).values())
    slots = claiming.slots(connection)
    return _Look(now, stop, cluster, too_large, accounts, before, len(window), slots, in_use, kept, no_gpu)


def _no_gpu(capacity: Capacity, aside: Sequence[SetAside], now: float) -> str:
    if capacity.gpus > 0 or not capacity.had_gpus:
        return ""
    devices = [set_aside.sentence(now) for set_aside in aside if set_aside.owner == "device"]
    why = devices[0] if devices else "no node that has one is there"
    return f", but the cluster has no GPU now, and it waits for one: {why} (UNCANNY_GPUS_PER_TASK=0 uses CPUs)"


def _task_line(connection: Connection, look: _Look, task: Task, tasks: Sequence[Task]) -> JsonObject:
    sentence, before = f"it is {task.state}", None
    match task.state:
        case TaskState.RUNNING if task.worker is None:
            sentence = f"it was handed over and waits for a free worker{_nowhere(look, task)}"
        case TaskState.RUNNING:
            sentence = f"it runs on {task.worker}, {100 * task.progress:.0f} % done"
        case TaskState.BLOCKED:
            trainings = [other for other in tasks if other.kind == "train" and other.state != TaskState.SUCCEEDED]
            sentence = "it waits for " + " and ".join(
                f"training {training.own_digest[:10]}, which is {training.state}" for training in trainings
            )
        case TaskState.QUEUED:
            sentence, before = _queued(look, task)
        case TaskState.HELD | TaskState.FAILED | TaskState.CANCELLED:
            ends = [attempt.end or "running" for attempt in reading.attempts_of(connection, task.id)]
            history = f" (attempts: {', '.join(ends[-10:])})" if ends else ""
            sentence = f"it is {task.state}: {task.reason}{history}"
    return {"id": task.id, "kind": task.kind, "state": task.state, "sentence": sentence, "tasks_before": before}


def _queued(look: _Look, task: Task) -> tuple[str, int | None]:
    """Why a queued task is not claimed. If the reason is its turn, also how many tasks come before it."""
    if task.paused:
        return "all jobs that need it are paused", None
    if look.stop is not None:
        return look.stop, None
    if look.kept is not None:
        return look.kept.sentence(look.now), None
    if task.not_before > look.now:
        wait = task.not_before - look.now
        after = f"after error {task.errors}" if task.errors else "after a loss that it is not charged for"
        return f"it is tried again in {wait:.0f} s, {after}: {task.reason}", None
    account, share = look.accounts.get(task.sponsor, NO_SHARE), look.cluster.share(task.kind)
    if scheduling.at_limit(account, account.devices, share):
        have = f"{account.devices:g} of {account.max_gpus:g} GPUs"
        return f"{task.sponsor}, its sponsor, uses {have} and may use no more at once", None
    used = f"{task.sponsor} has used {account.device_seconds:.0f} device seconds at weight {account.weight:g}"
    why = f"{'an admin boosted it; ' if task.boosted else ''}{used}; priority {task.priority} among their own tasks"
    if task.id not in look.before:
        return f"at least {look.seen} tasks come before it ({why})", look.seen
    count = look.before[task.id]
    turn = "it is next" if count == 0 else f"{count} task{'s come' if count > 1 else ' comes'} before it"
    return f"{turn} ({why}){_nowhere(look, task) or _full(look)}", count


def _nowhere(look: _Look, task: Task) -> str:
    takes = look.too_large.get(task.kind)
    if takes and look.no_gpu:
        return look.no_gpu
    return f", but no node of the cluster is large enough for it: it takes {takes} (UNCANNY_RESOURCES)" if takes else ""


def _full(look: _Look) -> str:
    full = look.slots and look.in_use >= look.slots
    return f"; all {look.slots:g} slots of the cluster are taken" if full else ""


def _sentence(job: Job, tasks: Sequence[Task], lines: Sequence[JsonObject], paused: bool) -> str:
    """The most informative sentence on a job."""
    if job.state not in LIVE_JOB:
        return f"it has ended: {job.state}" + (f" ({job.reason})" if job.reason else "")
    done = f"{len(tasks) - len(lines)} of its {len(tasks)} tasks are done"
    by_state: dict[str, list[JsonObject]] = {}
    for line in lines:
        by_state.setdefault(line["state"], []).append(line)
    if held := by_state.get(TaskState.HELD):
        return f"a {held[0]['kind']} task is held for a person to look at: {held[0]['sentence']}"
    if running := by_state.get(TaskState.RUNNING):
        at_it = ", ".join(f"{line['kind']}: {line['sentence']}" for line in running[:3])
        return f"it is under way, {done}; {at_it}" + (
            "; its sweep is paused: nothing more is started" if paused else ""
        )
    if paused:
        return f"its sweep is paused ({done}): `uncanny resume {job.sweep_id}`"
    queued = by_state.get(TaskState.QUEUED, [])
    if not queued:
        return f"it waits for other tasks, {done}"
    first = min(queued, key=lambda line: (line["tasks_before"] is None, line["tasks_before"] or 0))
    return f"it waits for its turn, {done}; {first['kind']}: {first['sentence']}"
