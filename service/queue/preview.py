"""A dry run: what a submission would mean in cells, tasks, device seconds, time and quota. Nothing is written."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from service.limits import Limits
from service.model.estimates import Estimate, Workload, estimate, units, workload
from service.model.json import JsonObject
from service.queue.plans import counted, distinct_tasks, standing
from service.specs.plan import JobPlan, PlannedTask
from service.store import Connection, changing, claiming, quotas, timings
from service.store.joining import ExistingTasks, existing_tasks

MANY = 10_000  # the user's waiting tasks are counted up to this number


@dataclass(frozen=True)
class _Group:
    """Planned tasks that are alike, and the time that tasks like them took."""

    like: Workload
    units: tuple[float, ...]
    estimate: Estimate | None

    def seconds(self, quantile: str) -> float | None:
        return None if self.estimate is None else sum(self.units) * float(getattr(self.estimate, quantile))


def preview(
    connection: Connection, name: str, plans: Sequence[JobPlan], user: str, default: Limits, *, repetitions: int = 0
) -> JsonObject:
    """Counts, estimate, queue and quota if `user` submitted these jobs now."""
    needed = distinct_tasks(plans)
    existing = existing_tasks(connection, needed)
    groups = _groups(connection, needed, existing)
    limits = quotas.limits(connection, [user], default)[user]
    queue = _queue(connection, user)
    return {
        "name": name,
        **counted(len(plans), needed, existing, repetitions=repetitions),
        "estimate": _estimate(groups["to_compute"]) | _eta(connection, groups, queue, user, limits, default),
        "queue": queue,
        "quota": _quota(connection, user, limits, len(plans)),
    }


def _groups(
    connection: Connection, needed: Mapping[str, PlannedTask], existing: ExistingTasks
) -> dict[str, list[_Group]]:
    """The tasks that are `under_way` and those `to_compute`, each in groups of tasks that are alike."""
    sizes: dict[str, dict[Workload, list[float]]] = {"under_way": defaultdict(list), "to_compute": defaultdict(list)}
    specs = {digest: task.stored_spec for digest, task in needed.items() if task.spec.kind == "train"}
    for digest, task in needed.items():
        if (stand := standing(digest, existing)) != "known":
            spec = task.stored_spec
            sizes[stand][workload(spec, specs[task.train_digest])].append(units(spec))
    estimates = {like: estimate(timings.newest(connection, like)) for groups in sizes.values() for like in groups}
    return {
        stand: [_Group(like, tuple(units_of_group), estimates[like]) for like, units_of_group in groups.items()]
        for stand, groups in sizes.items()
    }


def _estimate(groups: Sequence[_Group]) -> JsonObject:
    """Device seconds of the tasks to compute; null, with a reason, while there is no history for some of them."""
    unknown = [group for group in groups if group.estimate is None]
    history = [
        {
            **vars(group.like),
            "tasks": len(group.units),
            "device": group.estimate.device,
            "timings": group.estimate.count,
            "device_seconds_p50": group.seconds("p50"),
            "device_seconds_p90": group.seconds("p90"),
        }
        for group in groups
        if group.estimate is not None
    ]
    if unknown:
        listed = "; ".join(f"{group.like} ({len(group.units)})" for group in unknown[:5])
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        return {
            "device_seconds_p50": None,
            "device_seconds_p90": None,
            "history": history,
            "reason": f"nothing like it has run here yet: {listed}{more}",
        }
    return {
        "device_seconds_p50": sum(row["device_seconds_p50"] for row in history),
        "device_seconds_p90": sum(row["device_seconds_p90"] for row in history),
        "history": history,
        "reason": None,
    }


def _eta(
    connection: Connection,
    groups: Mapping[str, Sequence[_Group]],
    queue: JsonObject,
    user: str,
    limits: Limits,
    default: Limits,
) -> JsonObject:
    """Seconds until all jobs are done, if the user gets a fair share of the slots among the users who wait now.

    The user's queued tasks come first, and are taken to be as long as these on average. The time is never less than
    that of the longest training and the longest other task after it.
    """
    both = [*groups["under_way"], *groups["to_compute"]]
    slots = claiming.slots(connection)
    if not both:
        return {"eta_seconds": 0.0, "eta_reason": "everything is known"}
    if slots <= 0:
        return {"eta_seconds": None, "eta_reason": "no dispatcher has said yet what the cluster has"}
    if any(group.estimate is None for group in both):
        return {"eta_seconds": None, "eta_reason": "there is no history for some of it"}
    waiting = set(claiming.waiting_sponsors(connection)) | {user}
    weights = {name: each.weight for name, each in quotas.limits(connection, waiting, default).items()}
    fair = slots * weights[user] / sum(weights.values())
    fair = max(min(fair, limits.max_gpus or fair), 1e-9)
    work = sum(group.seconds("p50") or 0.0 for group in both)
    mean = work / sum(len(group.units) for group in both)
    longest: dict[bool, float] = {True: 0.0, False: 0.0}
    for group in both:
        seconds = max(group.units) * (group.estimate.p50 if group.estimate else 0.0)
        longest[group.like.kind == "train"] = max(longest[group.like.kind == "train"], seconds)
    eta = max((work + queue["own_tasks_before"] * mean) / fair, sum(longest.values()))
    paused = "; the queue is paused" if queue["paused"] else ""
    reason = f"at {fair:.3g} of {slots:.3g} slots, {len(waiting) - 1} other users waiting{paused}"
    return {"eta_seconds": round(eta, 1), "eta_reason": reason}


def _queue(connection: Connection, user: str) -> JsonObject:
    row = changing.queue(connection)
    others = [name for name in claiming.waiting_sponsors(connection) if name != user]
    return {
        "paused": bool(row and row.paused),
        "own_tasks_before": claiming.queued_of(connection, user, MANY),
        "other_users_waiting": len(others),
    }


def _quota(connection: Connection, user: str, limits: Limits, more: int) -> JsonObject:
    have = quotas.unfinished_jobs(connection, user)
    fits = limits.max_queued_jobs is None or have + more <= limits.max_queued_jobs
    in_use = quotas.devices_in_use(connection).get(user, 0.0)
    return {
        "user": user,
        **asdict(limits),
        "unfinished_jobs": have,
        "unfinished_jobs_after": have + more,
        "fits": fits,
        "gpus_in_use": in_use,
    }
