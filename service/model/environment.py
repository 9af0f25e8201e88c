"""What of the environment has failed and is set aside: nodes, devices, data folders, artifact roots.

A fault is its owner's, never the task's. Its owner gets no work for `FIRST_WAIT_SECONDS`, then one bundle to try it
with: if that is lost too, the wait doubles, up to `LONGEST_WAIT_SECONDS`; if it succeeds, the owner is back.
A device is set aside by the worker that found its fault, which keeps it busy: the other devices of its node go on.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from service.model.executor import Bundle, Capacity, Failed, Fault, Lost, Message, Owner, Progress, Started, Succeeded
from service.model.results import JsonMapping, JsonObject

FIRST_WAIT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 600.0
DEVICE_WAIT_SECONDS = 300.0  # for which a worker that cannot use its GPU keeps others from it
QUICK_SECONDS = 10.0  # an attempt that ends within this of its start has hardly begun
QUICK_LOSSES = 2  # tasks that a node may lose so, one after the other, where other nodes are left
SHARED = {"artifact_root", "data_folder"}  # owners that nodes may have in common: tried on one of them at a time

Key = tuple[str, int]
"""`(task id, attempt)`"""
Place = tuple[Owner, str, str, str]
"""What is set aside: `(owner, name, node, dataset)`, as in `Fault`."""


@dataclass(frozen=True)
class SetAside:
    """A fault's owner and why it gets no work, since when, and from when on it is tried again. An empty `node` is every
    node, an empty `dataset` every data set. `losses` are those in a row that it was tried with.
    """

    owner: Owner
    name: str
    node: str
    dataset: str
    reason: str
    since: float
    retry_at: float
    losses: int = 1
    writing: bool = False

    @property
    def place(self) -> Place:
        return self.owner, self.name, self.node, self.dataset

    def may_be(self, other: Place) -> bool:
        """Whether that one may be the same folder, seen by another node."""
        owner, name, _, dataset = other
        return owner in SHARED and (owner, name, dataset) == (self.owner, self.name, self.dataset)

    def concerns(self, node: str, dataset: str) -> bool:
        """Whether it keeps tasks on that data set from that node. A device keeps none: nothing can be placed on it."""
        return self.owner != "device" and self.node in ("", node) and self.dataset in ("", dataset)

    def as_data(self) -> JsonObject:
        """What an event says of it."""
        return {name: getattr(self, name) for name in ("owner", "name", "node", "dataset", "reason", "losses")}

    def sentence(self, now: float) -> str:
        tried = "is being tried again" if now >= self.retry_at else f"is tried again in {self.retry_at - now:.0f} s"
        of = f" for {self.dataset}" if self.dataset else ""
        return f"{self.owner.replace('_', ' ')} {self.name} is set aside{of} and {tried}: {self.reason}"


def concerning(aside: Iterable[SetAside], node: str, dataset: str) -> list[SetAside]:
    """What keeps tasks on that data set from that node."""
    return [fault for fault in aside if fault.concerns(node, dataset)]


def names_of(capacity: Capacity) -> tuple[str, ...]:
    """The nodes that take work. An executor without names has one node, whose name is empty."""
    return capacity.names or ("",)


def avoided(aside: Collection[SetAside], names: Iterable[str], dataset: str) -> frozenset[str]:
    """The nodes that tasks on that data set are kept from."""
    return frozenset(name for name in names if concerning(aside, name, dataset)) if aside else frozenset()


def hindrance(aside: Collection[SetAside], names: Sequence[str], dataset: str) -> SetAside | None:
    """What keeps tasks on that data set from every node, the one that is tried again first; None where one is left."""
    if not aside or avoided(aside, names, dataset) != frozenset(names):
        return None
    return min(
        (fault for name in names for fault in concerning(aside, name, dataset)), key=lambda fault: fault.retry_at
    )


def reported(status: JsonMapping) -> list[SetAside]:
    """What the leading dispatcher has set aside, as its status says, by the database's clock."""
    return [SetAside(**fields) for fields in status.get("set_aside", ())]


class Environment:
    """What is set aside, by what the executor says; times are by the clock of this process.

    `news` are changes that nobody was told yet: `(what happened, to what)`; `ended` tasks that have succeeded (None) or
    failed at once (how), as they came.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._aside: dict[Place, SetAside] = {}
        self._changed_at: dict[Place, float] = {}  # when it last failed: older attempts say nothing about it
        self._trials: dict[str, frozenset[Place]] = {}  # by bundle
        self._taken_up: dict[Key, tuple[str, float]] = {}  # where, and when
        self._devices: dict[Key, str] = {}  # on which device, as a fault names it
        self._hosts: dict[str, str] = {}  # by node
        self._quick: dict[str, dict[str, str]] = {}  # by node, the tasks it lost in a row, each with how
        self._unfit: dict[str, SetAside] = {}  # by node
        self.news: list[tuple[str, SetAside]] = []
        self.ended: list[tuple[str, str | None]] = []

    @property
    def aside(self) -> list[SetAside]:
        """What keeps tasks from nodes that would take them; those that are unfit take none."""
        return list(self._aside.values())

    def heed(self, capacity: Capacity) -> None:
        """Forget nodes that are gone, and take note of those that the executor itself gives no work."""
        if not capacity.ready:
            return
        for place, fault in list(self._aside.items()):
            if fault.node and fault.node not in names_of(capacity):
                self._return(place)
        left = ((bundle_id, places & self._aside.keys()) for bundle_id, places in self._trials.items())
        self._trials = {bundle_id: places for bundle_id, places in left if places}
        for name in self._unfit.keys() - capacity.unfit.keys():
            self.news.append(("returned", self._unfit.pop(name)))
        for name, why in capacity.unfit.items():
            if name not in self._unfit:
                now = self._clock()
                self._unfit[name] = SetAside("node", self._hosts.get(name, name), name, "", why, now, now)
                self.news.append(("set_aside", self._unfit[name]))

    def node_of(self, key: Key) -> str | None:
        """Where that attempt was taken up; None where it was not yet."""
        return self._taken_up[key][0] if key in self._taken_up else None

    def hear(self, message: Message, bundle: Bundle, names: Sequence[str]) -> None:
        """Take note of what becomes of an attempt of that bundle; `names` are all nodes."""
        key = (message.task_id, message.attempt)
        now, dataset = self._clock(), bundle.dataset
        match message:
            case Started():
                self._taken_up.setdefault(key, (message.node, now))
                self._hosts[message.node] = message.worker.partition(" ")[0]
                if message.ready:
                    self._devices[key] = device_named(message.worker)
                return
            case Progress():
                if message.fraction > 0 and key in self._taken_up:
                    self._proved(*self._taken_up[key], dataset, wrote=message.resume is not None)
                return
            case _:
                node, at = self._taken_up.pop(key, ("", now))
                device = self._devices.pop(key, "")
        if isinstance(message, Succeeded):
            self.ended.append((message.task_id, None))
            self._proved(node, at, dataset, wrote=bool(message.outcome.artifacts))
            for place in [place for place in self._aside if place[:3] == ("device", device, node)]:
                self._return(place)
        elif isinstance(message, Lost) and message.fault is not None:
            self._set_aside(message.fault, message.message, tried=bundle.id in self._trials)
        elif isinstance(message, (Failed, Lost)) and is_quick(message, now - at):
            self.ended.append((message.task_id, message.message))
            self._suspect(node, message, names, tried=bundle.id in self._trials)
        self._trials.pop(bundle.id, None)

    def may_try(self, node: str, dataset: str) -> bool:
        """Whether a task on that data set may be what the node is tried with: all that keeps it away is due for it."""
        kept, now = concerning(self.aside, node, dataset), self._clock()
        tried = frozenset[Place]().union(*self._trials.values())
        if any(place == fault.place or fault.may_be(place) for fault in kept for place in tried):
            return False
        return bool(kept) and all(now >= fault.retry_at for fault in kept)

    def is_tried(self, bundle_id: str) -> bool:
        return bundle_id in self._trials

    def tries(self, bundle_id: str, node: str, dataset: str) -> None:
        """That bundle is what they are tried with: nothing else goes there until it has an answer."""
        self._trials[bundle_id] = frozenset(fault.place for fault in concerning(self.aside, node, dataset))

    def as_status(self, now: float) -> list[JsonObject]:
        """What is set aside as JSON, by the clock that says `now`."""
        ahead = now - self._clock()
        every = [*self._aside.values(), *self._unfit.values()]
        return [asdict(replace(fault, since=fault.since + ahead, retry_at=fault.retry_at + ahead)) for fault in every]

    def take_over(self, earlier: Iterable[SetAside], now: float) -> None:
        """Go on with what an earlier dispatcher has set aside, by the clock that says `now`."""
        ahead = self._clock() - now
        for fault in earlier:
            moved = replace(fault, since=fault.since + ahead, retry_at=fault.retry_at + ahead)
            self._aside.setdefault(fault.place, moved)
            self._changed_at.setdefault(fault.place, self._clock())

    def _set_aside(self, fault: Fault, reason: str, *, tried: bool) -> None:
        place: Place = (fault.owner, fault.name, fault.node, fault.dataset)
        now, before = self._clock(), self._aside.get(place)
        tried = tried or (before is not None and before.owner == "device" and now >= before.retry_at)
        if before is not None and not tried:
            return  # it ran beside the one that was told first
        losses = before.losses + 1 if before else 1
        wait_seconds = min(FIRST_WAIT_SECONDS * 2.0 ** (losses - 1), LONGEST_WAIT_SECONDS)
        wait_seconds = DEVICE_WAIT_SECONDS if fault.owner == "device" else wait_seconds
        since = before.since if before else now
        entry = SetAside(*place, reason, since, now + wait_seconds, losses, fault.writing)
        self._aside[place], self._changed_at[place] = entry, now
        self.news.append(("set_aside", entry))
        for other in self.aside:
            if tried and other.may_be(place) and other.place != place:  # it would lose the next one as well
                wait_until = max(other.retry_at, now + FIRST_WAIT_SECONDS)
                self._aside[other.place] = replace(other, retry_at=wait_until)

    def _proved(self, node: str, started_at: float, dataset: str, *, wrote: bool) -> None:
        """An attempt that was taken up since then works there."""
        self._quick.pop(node, None)
        for entry in concerning(self.aside, node, dataset):
            if started_at >= self._changed_at[entry.place] and (wrote or not entry.writing):
                self._return(entry.place)

    def _return(self, place: Place) -> None:
        self.news.append(("returned", self._aside.pop(place)))
        self._changed_at.pop(place)
        for other in self.aside:
            if other.may_be(place):  # it may be well there too
                self._aside[other.place] = replace(other, retry_at=min(other.retry_at, self._clock()))

    def _suspect(self, node: str, message: Failed | Lost, names: Sequence[str], *, tried: bool) -> None:
        """Several tasks that fail there at once may be the node's doing, but as well their own: the last node stays."""
        lost = self._quick.setdefault(node, {})
        lost[message.task_id] = message.message
        others = set(names) - {node} - avoided(self.aside, names, "")
        if len(lost) >= QUICK_LOSSES and others and node in names:
            del self._quick[node]
            why = f"{len(lost)} tasks in a row ended within {QUICK_SECONDS:g} s of their start"
            fault = Fault("node", self._hosts.get(node, node), node)
            self._set_aside(fault, f"{why}, the last: {message.message}", tried=tried)


def device_named(worker: str) -> str:
    """The device of a worker that says where it is, as the fault of a device names it.

    >>> device_named("gpu7 pid 4711 cuda:1")
    'cuda:1 of gpu7'
    """
    host, _, device = worker.partition(" ")
    return f"{device.rpartition(' ')[2]} of {host}"


def is_quick(message: Failed | Lost, seconds: float) -> bool:
    """Whether an attempt that ran for so long ended before it did anything, for a reason that may be anybody's."""
    odd = message.kind == "error" if isinstance(message, Failed) else message.reason == "worker_died"
    return odd and seconds <= QUICK_SECONDS
