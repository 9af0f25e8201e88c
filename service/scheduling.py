"""Who goes next: a pure function of the queue, what users have used and may use, the room there is, and the clock.

Between users: the one whose best task has the highest priority goes first, then the one who has used least for their
weight. A user who waits gains a point of priority each `AGEING_SECONDS` until one of their tasks is claimed, so that no
flood of better-ranked work keeps anyone waiting for ever. Among the tasks of one user: priority with the same ageing by
each task's own wait, then trainings (those that most jobs need first), then the order of submission. So only finitely
many tasks can ever come before one that waits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_BUNDLE = 16  # tasks; more would keep a worker from others for too long
AGEING_SECONDS = 3600.0  # of waiting count as much as one point of priority
HEAD_START_SECONDS = 1.0  # by which a training is due before what was submitted with it
TURN_SECONDS = 60.0  # what a bundle that runs is taken to cost each of its devices, until it is known
ROUNDING = 1e-9  # ten tenths of a GPU are one


@dataclass(frozen=True)
class Waiting:
    """A queued task, as far as ranking needs to know it. `train_digest` names the checkpoint that it works on.

    `needed_by` says how many live jobs need it, `waiting_since` is in seconds since 1970. `whole` says that it ran out
    of the memory of a GPU that it shared, so that it has the next one to itself.
    """

    task_id: str
    kind: str
    train_digest: str
    sponsor: str
    priority: int
    sequence: int
    waiting_since: float = 0.0
    needed_by: int = 1
    whole: bool = False


@dataclass(frozen=True)
class Account:
    """A user's usage and limits: device seconds by half-life, devices in use now, when they were last served.

    `max_gpus` limits devices in use at once; on a cluster without GPUs each place to run counts as one device.
    """

    device_seconds: float = 0.0
    devices: float = 0.0
    served_at: float = 0.0
    weight: float = 1.0
    max_gpus: float | None = None


@dataclass(frozen=True)
class Cluster:
    """How many more bundles fit, and the devices (a share of a GPU, or one place) that a bundle of each kind takes.

    `room` is what is free of each resource, `needs_by_kind` what a bundle of each kind takes of it. `lookahead` bundles
    may wait for room: they reserve it, so that small ones behind a large one do not keep it waiting for ever.
    """

    free_slots: int
    share_by_kind: Mapping[str, float] = field(default_factory=dict)
    room: Mapping[str, float] = field(default_factory=dict)
    needs_by_kind: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lookahead: int = 0

    def share(self, kind: str, whole: bool = False) -> float:
        share = self.share_by_kind.get(kind, 1.0)
        return max(1.0, share) if whole and share else share

    def needs(self, kind: str, whole: bool = False) -> Mapping[str, float]:
        needs = self.needs_by_kind.get(kind, {})
        return {name: max(1.0, of) if is_gpu(name) else of for name, of in needs.items()} if whole else needs


@dataclass(frozen=True)
class Decision:
    """Tasks to hand over together, at whose expense, the devices they take, and why they are next.

    `whole`: none of its GPUs is to be shared.
    """

    task_ids: tuple[str, ...]
    sponsor: str
    share: float
    reason: str
    whole: bool = False


def choose(
    queue: Sequence[Waiting], accounts: Mapping[str, Account], cluster: Cluster, now: float
) -> list[Decision]:  # fmt: skip
    """Up to `free_slots` bundles, in the order of the module's docstring. A user at their limit is passed over.

    Tasks on one checkpoint are spread over the free slots, so that a short queue uses the whole cluster.
    """
    left: dict[str, list[Waiting]] = {}
    for task in sorted(queue, key=lambda task: _own_order(task, now)):
        left.setdefault(task.sponsor, []).append(task)
    checkpoints = Counter(task.train_digest for task in queue)
    devices = {sponsor: _account(accounts, sponsor).devices for sponsor in left}
    served: set[str] = set()
    decisions: list[Decision] = []
    room, lookahead = dict(cluster.room), cluster.lookahead
    while len(decisions) < cluster.free_slots:
        able = _those_with_room(left, cluster, room, lookahead)
        able = {name: mine for name, mine in able.items() if _fits(mine[0], accounts, devices, cluster)}
        if not able:
            break
        places = {
            name: _place(mine, _account(accounts, name), devices[name], name in served, now)
            for name, mine in able.items()
        }
        sponsor = min(able, key=lambda name: places[name])
        mine, head = left[sponsor], able[sponsor][0]
        needs = cluster.needs(head.kind, head.whole)
        lookahead -= not has_room(room, needs)
        room |= {name: room.get(name, 0.0) - amount for name, amount in needs.items()}
        size = 1
        if head.kind != "train":
            mates = [task for task in mine if _may_share(task, head) and cluster.needs(task.kind) == needs]
            slots = min(cluster.free_slots - len(decisions), checkpoints.total())
            size = min(MAX_BUNDLE, -(-len(mates) // max(1, slots // len(checkpoints))))
        taken = [head] if size == 1 else mates[:size]
        chosen = {task.task_id for task in taken}
        left[sponsor] = [task for task in mine if task.task_id not in chosen]
        if not left[sponsor]:
            del left[sponsor]
        checkpoints[head.train_digest] -= len(taken)
        checkpoints += Counter()  # without those of which nothing is left
        reason = _reason(head, places[sponsor], _account(accounts, sponsor), devices[sponsor])
        share = cluster.share(head.kind, head.whole)
        devices[sponsor] += share
        served.add(sponsor)
        decisions.append(Decision(tuple(task.task_id for task in taken), sponsor, share, reason, head.whole))
    return decisions


def due(waiting_since: float, priority: int, kind: str) -> float:
    """A number that orders one user's tasks at any time: what waits longer or has a higher priority has a lower one."""
    return waiting_since - priority * AGEING_SECONDS - (HEAD_START_SECONDS if kind == "train" else 0.0)


def decayed(device_seconds: float, age_seconds: float, half_life_seconds: float) -> float:
    """What usage of so long ago counts now."""
    return device_seconds * float(0.5 ** (max(0.0, age_seconds) / half_life_seconds))


def at_limit(account: Account, devices: float, share: float) -> bool:
    """Whether so many devices more are more than the user may have at once."""
    return account.max_gpus is not None and devices + share > account.max_gpus + ROUNDING


def has_room(room: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    """Whether there is as much of everything as is needed."""
    return all(room.get(name, 0.0) >= amount - ROUNDING * max(1.0, amount) for name, amount in needs.items())


def is_gpu(name: str) -> bool:
    """Whether a resource of that name is GPUs, of any type or of one."""
    return name == "GPU" or name.startswith("GPU accelerator_type:")


def _those_with_room(
    left: Mapping[str, list[Waiting]], cluster: Cluster, room: Mapping[str, float], lookahead: int
) -> Mapping[str, list[Waiting]]:
    """Each user's tasks without those that neither fit now nor may wait for room any more."""
    if lookahead > 0:
        return left
    full = {
        (kind, whole)
        for kind in cluster.needs_by_kind
        for whole in (False, True)
        if not has_room(room, cluster.needs(kind, whole))
    }
    able = {name: [one for one in mine if (one.kind, one.whole) not in full] for name, mine in left.items()}
    return {name: mine for name, mine in able.items() if mine}


def _account(accounts: Mapping[str, Account], sponsor: str) -> Account:
    return accounts.get(sponsor, Account())


def _fits(head: Waiting, accounts: Mapping[str, Account], devices: Mapping[str, float], cluster: Cluster) -> bool:
    share = cluster.share(head.kind, head.whole)
    return not at_limit(_account(accounts, head.sponsor), devices[head.sponsor], share)


def _own_order(task: Waiting, now: float) -> tuple[int, bool, int, int, str]:
    """Best first, among the tasks of one user."""
    aged = task.priority + _points(now - task.waiting_since)
    training = task.kind == "train"
    return (-aged, not training, -task.needed_by if training else 0, task.sequence, task.task_id)


def _place(
    mine: Sequence[Waiting], account: Account, devices: float, served: bool, now: float
) -> tuple[int, float, bool, int, str]:  # fmt: skip
    """Lowest first, among users: effective priority, usage for their weight, trainings, the order of submission."""
    head = mine[0]
    since = min(task.waiting_since for task in mine)
    points = 0 if served else _points(now - max(since, account.served_at))
    load = (account.device_seconds + TURN_SECONDS * devices) / account.weight
    return (-max(task.priority for task in mine) - points, load, head.kind != "train", head.sequence, head.task_id)


def _points(waited_seconds: float) -> int:
    return int(max(0.0, waited_seconds) // AGEING_SECONDS)


def _may_share(task: Waiting, head: Waiting) -> bool:
    same = (task.train_digest, task.priority, task.whole) == (head.train_digest, head.priority, head.whole)
    return same and task.kind != "train"


def _reason(head: Waiting, place: tuple[int, float, bool, int, str], account: Account, devices: float) -> str:
    used = f"{head.sponsor} has used {account.device_seconds:.0f} device seconds and has {devices:g} in use"
    aged = f" (by waiting: {-place[0]})" if -place[0] != head.priority else ""
    weight = f" at weight {account.weight:g}" if account.weight != 1 else ""
    return f"priority {head.priority}{aged}, {used}{weight}"
