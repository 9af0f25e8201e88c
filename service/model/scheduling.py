"""Which tasks go next: a pure function of the queue, users' usage and limits, the free resources, and the clock.

Between users: boosted tasks go first, then the user who has used least for their weight, regardless of priorities: each
task that runs brings the other users nearer to their turn, so nobody waits for ever.
Among the tasks of one user: the boosted ones, then priority, to which each `AGEING_SECONDS` of a task's own wait add a
point, then trainings (those that most jobs need first), then the order of submission. So only finitely many of a
user's own tasks can ever come before one of theirs that waits.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

MAX_BUNDLE = 16  # tasks; more would keep a worker from others for too long
RULE = 4  # version of these rules: the log replays only decisions of the same version
AGEING_SECONDS = 3600.0  # of waiting count as much as one point of priority
BOOST_SECONDS = 1e10  # a boosted task is due by so much earlier: longer than any clock has run
HEAD_START_SECONDS = 1.0  # a training is due by so much earlier than tasks that were submitted with it
TURN_SECONDS = 60.0  # assumed usage of each device of a running bundle, until it is known
NOWHERE = "a node of that size"  # a resource that nobody has: what a kind needs that no node is large enough for
ROUNDING = 1e-9  # ten tenths of a GPU are one


@dataclass(frozen=True)
class Waiting:
    """A queued task, as far as ranking needs to know it. `train_digest` names the checkpoint that it works on.

    `needed_by` says how many live jobs need it, `waiting_since` is in seconds since 1970. `whole` says that it ran out
    of the memory of a GPU that it shared, so that it has the next one to itself; `boosted`, that an admin wants it
    before all others.
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
    boosted: bool = False


@dataclass(frozen=True)
class Account:
    """A user's usage and limits: device seconds by half-life, devices in use now.

    `max_gpus` limits devices in use at once; on a cluster without GPUs each slot counts as one device.
    """

    device_seconds: float = 0.0
    devices: float = 0.0
    weight: float = 1.0
    max_gpus: float | None = None


@dataclass(frozen=True)
class Cluster:
    """How many more bundles fit, and the devices (a share of a GPU, or one slot) that a bundle of each kind takes.

    `room` has the free amount of each resource, `needs_by_kind` the amounts that a bundle of each kind takes.
    `lookahead` bundles may wait for resources, which they reserve. Only bundles of one size wait at a time, because the
    executor starts a small bundle in the room that a large one waits for: `waits_for` is what those need that wait
    already, None if there are none.
    """

    free_slots: int
    share_by_kind: Mapping[str, float] = field(default_factory=dict)
    room: Mapping[str, float] = field(default_factory=dict)
    needs_by_kind: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lookahead: int = 0
    waits_for: Mapping[str, float] | None = None

    def share(self, kind: str, whole: bool = False) -> float:
        share = self.share_by_kind.get(kind, 1.0)
        return max(1.0, share) if whole and share else share

    def needs(self, kind: str, whole: bool = False) -> Mapping[str, float]:
        needs = self.needs_by_kind.get(kind, {})
        if not whole:
            return needs
        return {name: max(1.0, amount) if is_gpu(name) else amount for name, amount in needs.items()}


@dataclass(frozen=True)
class Decision:
    """Tasks to hand over together, their sponsor, the devices that they take, and why they are next.

    `whole`: none of its GPUs is to be shared.
    """

    task_ids: tuple[str, ...]
    sponsor: str
    share: float
    reason: str
    whole: bool = False


def choose(queue: Sequence[Waiting], accounts: Mapping[str, Account], cluster: Cluster, now: float) -> list[Decision]:
    """Up to `free_slots` bundles, in the order of the module's docstring. A user at their limit is passed over.

    If the next task has no room, and bundles of another size wait in the executor already, its room is reserved: tasks
    behind it run only in what is left. Without any lookahead nothing is reserved.
    Tasks on one checkpoint are spread over the free slots, so that a short queue uses the whole cluster.
    """
    lines = _lines(queue, now)
    checkpoints = Counter(task.train_digest for task in queue)
    devices = {sponsor: _account(accounts, sponsor).devices for sponsor in lines}
    decisions: list[Decision] = []
    room, lookahead, waits_for = dict(cluster.room), cluster.lookahead, cluster.waits_for
    reserves = lookahead > 0 or waits_for is not None
    blocked: set[tuple[str, bool]] = set()
    while len(decisions) < cluster.free_slots:
        if not reserves:
            blocked = _full(cluster, room)
        heads = {name: head for name, line in lines.items() if (head := line.head(blocked)) is not None}
        heads = {name: head for name, head in heads.items() if _fits(head, accounts, devices, cluster)}
        if not heads:
            break
        sponsor = min(heads, key=lambda name: _rank(heads[name], _account(accounts, name), devices[name]))
        head = heads[sponsor]
        needs = cluster.needs(head.kind, head.whole)
        if not has_room(room, needs):
            somewhere = NOWHERE not in needs
            if lookahead <= 0 or (somewhere and waits_for not in (None, needs)):
                blocked.add((head.kind, head.whole))
                if somewhere:
                    lookahead, room = 0, _without(room, needs)
                continue
            lookahead, waits_for = lookahead - 1, needs if somewhere else waits_for
        room = _without(room, needs)
        slots = min(cluster.free_slots - len(decisions), checkpoints.total())
        taken = _bundle(head, lines[sponsor], cluster, max(1, slots // len(checkpoints)))
        lines[sponsor].take(taken)
        checkpoints[head.train_digest] -= len(taken)
        checkpoints += Counter()  # drops checkpoints without tasks
        reason = _reason(head, _account(accounts, sponsor), devices[sponsor], now)
        share = cluster.share(head.kind, head.whole)
        devices[sponsor] += share
        decisions.append(Decision(tuple(task.task_id for task in taken), sponsor, share, reason, head.whole))
    return decisions


def _bundle(head: Waiting, line: "_Line", cluster: Cluster, slots: int) -> list[Waiting]:
    """`head` and the tasks that go with it, if the tasks on its checkpoint are spread over `slots` bundles."""
    if head.kind == "train":
        return [head]
    needs = cluster.needs(head.kind, head.whole)
    mates = [task for task in line.mates(head) if cluster.needs(task.kind, task.whole) == needs]
    size = min(MAX_BUNDLE, -(-len(mates) // slots))
    return mates[:size] if size > 1 else [head]


def short_of_mates(queue: Sequence[Waiting], now: float, count: int) -> list[Waiting]:
    """The first tasks of a queue, about `count`, that work on checkpoints of which it has less than a bundle.

    Each is the best of its user on its checkpoint. There may be more such tasks further down the queue.
    """
    lines: dict[str, dict[tuple[object, ...], Waiting]] = {}
    mates: Counter[tuple[object, ...]] = Counter()
    for task in sorted(queue, key=lambda task: _own_order(task, now)):
        if task.kind != "train":
            lines.setdefault(task.sponsor, {}).setdefault(_bundle_of(task), task)
            mates[task.sponsor, *_bundle_of(task)] += 1
    each = max(1, count // max(1, len(lines)))
    return [
        task
        for sponsor, first in lines.items()
        for bundle, task in islice(first.items(), each)
        if mates[sponsor, *bundle] < MAX_BUNDLE
    ]


def due(waiting_since: float, priority: int, kind: str, *, boosted: bool = False) -> float:
    """A number that orders one user's tasks at any time: a longer wait or a higher priority makes it lower."""
    ahead = (HEAD_START_SECONDS if kind == "train" else 0.0) + (BOOST_SECONDS if boosted else 0.0)
    return waiting_since - priority * AGEING_SECONDS - ahead


def turns(accounts: Mapping[str, Account], cluster: Cluster) -> dict[str, int]:
    """Users' ranks in the queue, the lowest first: those at their limit last, the others by usage for their weight."""
    least = min(cluster.share_by_kind.values(), default=1.0)
    loads = {
        name: (at_limit(account, account.devices, least), _load(account, account.devices))
        for name, account in accounts.items()
    }
    line = sorted(set(loads.values()))
    return {name: line.index(load) for name, load in loads.items()}


def decayed(device_seconds: float, age_seconds: float, half_life_seconds: float) -> float:
    """The device seconds that usage of so long ago counts for now."""
    return device_seconds * float(0.5 ** (max(0.0, age_seconds) / half_life_seconds))


def at_limit(account: Account, devices: float, share: float) -> bool:
    """Whether `share` more devices would be more than the user may have at once."""
    return account.max_gpus is not None and devices + share > account.max_gpus + ROUNDING


def has_room(room: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    """Whether all needed resources are free."""
    return all(room.get(name, 0.0) >= amount - ROUNDING * max(1.0, amount) for name, amount in needs.items())


def is_gpu(name: str) -> bool:
    """Whether a resource of that name is GPUs, of any type or of one."""
    return name == "GPU" or name.startswith("GPU accelerator_type:")


class _Line:
    """The waiting tasks of one user, best first."""

    def __init__(self, tasks: Sequence[Waiting]) -> None:
        self._places = {task.task_id: place for place, task in enumerate(tasks)}
        self._by_size: dict[tuple[str, bool], deque[Waiting]] = {}
        self._by_bundle: dict[tuple[object, ...], list[Waiting]] = {}
        self._taken: set[str] = set()
        for task in tasks:
            self._by_size.setdefault((task.kind, task.whole), deque()).append(task)
            if task.kind != "train":
                self._by_bundle.setdefault(_bundle_of(task), []).append(task)

    def head(self, blocked: Collection[tuple[str, bool]]) -> Waiting | None:
        """The best task that is left, except for `blocked` kinds (whole or not); None if there is none."""
        for tasks in self._by_size.values():
            while tasks and tasks[0].task_id in self._taken:
                tasks.popleft()
        heads = [tasks[0] for size, tasks in self._by_size.items() if tasks and size not in blocked]
        return min(heads, key=lambda task: self._places[task.task_id], default=None)

    def mates(self, head: Waiting) -> list[Waiting]:
        """The tasks that are left and may share a bundle with `head`, and `head` itself."""
        return [task for task in self._by_bundle[_bundle_of(head)] if task.task_id not in self._taken]

    def take(self, tasks: Iterable[Waiting]) -> None:
        self._taken |= {task.task_id for task in tasks}


def _lines(queue: Sequence[Waiting], now: float) -> dict[str, _Line]:
    """By sponsor, in the order of their best tasks."""
    tasks: dict[str, list[Waiting]] = {}
    for task in sorted(queue, key=lambda task: _own_order(task, now)):
        tasks.setdefault(task.sponsor, []).append(task)
    return {sponsor: _Line(own) for sponsor, own in tasks.items()}


def _full(cluster: Cluster, room: Mapping[str, float]) -> set[tuple[str, bool]]:
    """The kinds of task, whole or not, that no free resources fit."""
    return {
        (kind, whole)
        for kind in cluster.needs_by_kind
        for whole in (False, True)
        if not has_room(room, cluster.needs(kind, whole))
    }


def _without(room: Mapping[str, float], needs: Mapping[str, float]) -> dict[str, float]:
    """What is left of the free resources, below 0 for those that are waited for."""
    return {**room, **{name: room.get(name, 0.0) - amount for name, amount in needs.items()}}


def _account(accounts: Mapping[str, Account], sponsor: str) -> Account:
    return accounts.get(sponsor, Account())


def _fits(head: Waiting, accounts: Mapping[str, Account], devices: Mapping[str, float], cluster: Cluster) -> bool:
    share = cluster.share(head.kind, head.whole)
    return not at_limit(_account(accounts, head.sponsor), devices[head.sponsor], share)


def _own_order(task: Waiting, now: float) -> tuple[bool, int, bool, int, int, str]:
    """Best first, among the tasks of one user."""
    training = task.kind == "train"
    needed_by = -task.needed_by if training else 0
    return (not task.boosted, -_aged(task, now), not training, needed_by, task.sequence, task.task_id)


def _rank(head: Waiting, account: Account, devices: float) -> tuple[bool, float, bool, int, str]:
    """Lowest first, among users: boosted, usage for their weight, trainings, the order of submission."""
    return (not head.boosted, _load(account, devices), head.kind != "train", head.sequence, head.task_id)


def _load(account: Account, devices: float) -> float:
    """Device seconds for each unit of weight, with a turn for each device in use."""
    return (account.device_seconds + TURN_SECONDS * devices) / account.weight


def _aged(task: Waiting, now: float) -> int:
    """Its priority among its sponsor's tasks, with a point for each `AGEING_SECONDS` of its wait."""
    return task.priority + int(max(0.0, now - task.waiting_since) // AGEING_SECONDS)


def _bundle_of(task: Waiting) -> tuple[object, ...]:
    """Equal for tasks that may share a bundle. A training runs alone."""
    return (task.train_digest, task.priority, task.whole, task.boosted)


def _reason(head: Waiting, account: Account, devices: float, now: float) -> str:
    boosted = "an admin boosted it; " if head.boosted else ""
    used = f"{head.sponsor} has used {account.device_seconds:.0f} device seconds and has {devices:g} in use"
    weight = f" at weight {account.weight:g}" if account.weight != 1 else ""
    aged = _aged(head, now)
    by_waiting = f" (by waiting: {aged})" if aged != head.priority else ""
    return f"{boosted}{used}{weight}; priority {head.priority}{by_waiting} among their own"
