"""Parts of the environment that failed and are set aside: nodes, devices, data folders, artifact roots.

A fault counts against its owner, never against the task. The owner gets no work for `FIRST_WAIT_SECONDS`, then one
bundle as a trial. If the trial is lost too, the wait doubles, up to `LONGEST_WAIT_SECONDS`. If it succeeds, the owner
is used again. The worker that found the fault of a device keeps that device busy, so the other devices of the node
still take work.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from service.model.executor import Bundle, Capacity, Failed, Fault, Lost, Message, Owner, Progress, Started, Succeeded
from service.model.json import JsonMapping, JsonObject

FIRST_WAIT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 600.0
DEVICE_WAIT_SECONDS = 300.0  # how long a worker that cannot use its GPU keeps others from it
QUICK_SECONDS = 10.0  # an attempt that ends within this of its start has hardly begun
QUICK_LOSSES = 2  # such attempts in a row after which a node is set aside, if another is left
SHARED = {"artifact_root", "data_folder"}  # owners that nodes may have in common: tried on one of them at a time

Key = tuple[str, int]
"""`(task id, attempt)`"""
AsideKey = tuple[Owner, str, str, str]
"""The part that is set aside: `(owner, name, node, dataset)`, as in `Fault`."""


@dataclass(frozen=True)
class SetAside:
    """The owner of a fault: why it gets no work, since when, and when its next trial is due.

    An empty `node` means every node, an empty `dataset` every data set. `losses` counts the losses in a row.
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
    def key(self) -> AsideKey:
        return self.owner, self.name, self.node, self.dataset

    def may_be(self, other: AsideKey) -> bool:
        """Whether `other` may be the same folder, seen from another node."""
        owner, name, _, dataset = other
        return owner in SHARED and (owner, name, dataset) == (self.owner, self.name, self.dataset)

    def concerns(self, node: str, dataset: str) -> bool:
        """Whether tasks on that data set are kept from that node. A device keeps none away: it is busy anyway."""
        return self.owner != "device" and self.node in ("", node) and self.dataset in ("", dataset)

    def as_data(self) -> JsonObject:
        """The fields that an event has."""
        return {name: getattr(self, name) for name in ("owner", "name", "node", "dataset", "reason", "losses")}

    def sentence(self, now: float) -> str:
        tried = "is being tried again" if now >= self.retry_at else f"is tried again in {self.retry_at - now:.0f} s"
        scope = f" for {self.dataset}" if self.dataset else ""
        return f"{self.owner.replace('_', ' ')} {self.name} is set aside{scope} and {tried}: {self.reason}"


def concerning(aside: Iterable[SetAside], node: str, dataset: str) -> list[SetAside]:
    """The faults that keep tasks on that data set from that node."""
    return [fault for fault in aside if fault.concerns(node, dataset)]


def names_of(capacity: Capacity) -> tuple[str, ...]:
    """The nodes that take work. An executor without names has one node, whose name is empty."""
    return capacity.names or ("",)


def avoided(aside: Collection[SetAside], names: Iterable[str], dataset: str) -> frozenset[str]:
    """The nodes that tasks on that data set are kept from."""
    return frozenset(name for name in names if concerning(aside, name, dataset)) if aside else frozenset()


def hindrance(aside: Collection[SetAside], names: Sequence[str], dataset: str) -> SetAside | None:
    """If every node is kept from tasks on that data set: the owner that is tried again first. Otherwise None."""
    if not aside or avoided(aside, names, dataset) != frozenset(names):
        return None
    return min(
        (fault for name in names for fault in concerning(aside, name, dataset)), key=lambda fault: fault.retry_at
    )


def reported(status: JsonMapping) -> list[SetAside]:
    """The faults that the leading dispatcher's status has; their times are by the database's clock."""
    return [SetAside(**fields) for fields in status.get("set_aside", ())]


class Environment:
    """Learns from the executor's messages which parts to set aside; times are by the clock of this process.

    `news` has the changes that are not reported yet, as `(event, owner)`. `ended` has, in order, the tasks that
    succeeded, as `(task id, None)`, and those that ended right after their start, as `(task id, message)`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._aside: dict[AsideKey, SetAside] = {}
        self._changed_at: dict[AsideKey, float] = {}  # its last failure: older attempts prove nothing
        self._trials: dict[str, frozenset[AsideKey]] = {}  # by bundle
        self._taken_up: dict[Key, tuple[str, float]] = {}  # `(node, time)`
        self._devices: dict[Key, str] = {}  # on which device, as a fault names it
        self._hosts: dict[str, str] = {}  # by node
        self._quick: dict[str, dict[str, str]] = {}  # by node: the tasks that it lost in a row, with the message
        self._unfit: dict[str, SetAside] = {}  # by node
        self.news: list[tuple[str, SetAside]] = []
        self.ended: list[tuple[str, str | None]] = []

    @property
    def aside(self) -> list[SetAside]:
        """The faults that are set aside, without unfit nodes: the executor gives these no work anyway."""
        return list(self._aside.values())

    def heed(self, capacity: Capacity) -> None:
        """Forget nodes that are gone, and note the unfit ones, to which the executor itself gives no work."""
        if not capacity.ready:
            return
        for key, fault in list(self._aside.items()):
            if fault.node and fault.node not in names_of(capacity):
                self._return(key)
        left = ((bundle_id, keys & self._aside.keys()) for bundle_id, keys in self._trials.items())
        self._trials = {bundle_id: keys for bundle_id, keys in left if keys}
        for name in self._unfit.keys() - capacity.unfit.keys():
            self.news.append(("returned", self._unfit.pop(name)))
        for name, why in capacity.unfit.items():
            if name not in self._unfit:
                now = self._clock()
                self._unfit[name] = SetAside("node", self._hosts.get(name, name), name, "", why, now, now)
                self.news.append(("set_aside", self._unfit[name]))

    def node_of(self, key: Key) -> str | None:
        """The node that took up that attempt; None before that."""
        return self._taken_up[key][0] if key in self._taken_up else None

    def hear(self, message: Message, bundle: Bundle, names: Sequence[str]) -> None:
        """Learn from a message about an attempt of that bundle; `names` are all nodes."""
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
            for aside_key in [aside_key for aside_key in self._aside if aside_key[:3] == ("device", device, node)]:
                self._return(aside_key)
        elif isinstance(message, Lost) and message.fault is not None:
            self._set_aside(message.fault, message.message, tried=bundle.id in self._trials)
        elif isinstance(message, (Failed, Lost)) and is_quick(message, now - at):
            self.ended.append((message.task_id, message.message))
            self._suspect(node, message, names, tried=bundle.id in self._trials)
        self._trials.pop(bundle.id, None)

    def may_try(self, node: str, dataset: str) -> bool:
        """Whether a task on that data set may be the trial of the node: all that keeps it away is due for one."""
        kept, now = concerning(self.aside, node, dataset), self._clock()
        tried = frozenset[AsideKey]().union(*self._trials.values())
        if any(key == fault.key or fault.may_be(key) for fault in kept for key in tried):
            return False
        return bool(kept) and all(now >= fault.retry_at for fault in kept)

    def is_tried(self, bundle_id: str) -> bool:
        return bundle_id in self._trials

    def tries(self, bundle_id: str, node: str, dataset: str) -> None:
        """Make that bundle the trial of all that keeps the data set from the node."""
        self._trials[bundle_id] = frozenset(fault.key for fault in concerning(self.aside, node, dataset))

    def as_status(self, now: float) -> list[JsonObject]:
        """The faults that are set aside, as JSON; times are by the clock that shows `now`."""
        ahead = now - self._clock()
        every = [*self._aside.values(), *self._unfit.values()]
        return [asdict(replace(fault, since=fault.since + ahead, retry_at=fault.retry_at + ahead)) for fault in every]

    def take_over(self, earlier: Iterable[SetAside], now: float) -> None:
        """Take over the faults that an earlier dispatcher set aside; their times are by the clock that shows `now`."""
        ahead = self._clock() - now
        for fault in earlier:
            moved = replace(fault, since=fault.since + ahead, retry_at=fault.retry_at + ahead)
            self._aside.setdefault(fault.key, moved)
            self._changed_at.setdefault(fault.key, self._clock())

    def _set_aside(self, fault: Fault, reason: str, *, tried: bool) -> None:
        key: AsideKey = (fault.owner, fault.name, fault.node, fault.dataset)
        now, before = self._clock(), self._aside.get(key)
        tried = tried or (before is not None and before.owner == "device" and now >= before.retry_at)
        if before is not None and not tried:
            return  # it ran beside the attempt that reported the fault first
        losses = before.losses + 1 if before else 1
        wait_seconds = min(FIRST_WAIT_SECONDS * 2.0 ** (losses - 1), LONGEST_WAIT_SECONDS)
        wait_seconds = DEVICE_WAIT_SECONDS if fault.owner == "device" else wait_seconds
        since = before.since if before else now
        entry = SetAside(*key, reason, since, now + wait_seconds, losses, fault.writing)
        self._aside[key], self._changed_at[key] = entry, now
        self.news.append(("set_aside", entry))
        for other in self.aside:
            if tried and other.may_be(key) and other.key != key:  # the same folder would lose a trial there too
                wait_until = max(other.retry_at, now + FIRST_WAIT_SECONDS)
                self._aside[other.key] = replace(other, retry_at=wait_until)

    def _proved(self, node: str, started_at: float, dataset: str, *, wrote: bool) -> None:
        """An attempt that started at `started_at` works on the node: parts that failed before that are used again."""
        self._quick.pop(node, None)
        for entry in concerning(self.aside, node, dataset):
            if started_at >= self._changed_at[entry.key] and (wrote or not entry.writing):
                self._return(entry.key)

    def _return(self, key: AsideKey) -> None:
        self.news.append(("returned", self._aside.pop(key)))
        self._changed_at.pop(key)
        for other in self.aside:
            if other.may_be(key):  # the folder may work there again too
                self._aside[other.key] = replace(other, retry_at=min(other.retry_at, self._clock()))

    def _suspect(self, node: str, message: Failed | Lost, names: Sequence[str], *, tried: bool) -> None:
        """Several tasks that end at once may be at fault themselves, so the last node is never set aside."""
        lost = self._quick.setdefault(node, {})
        lost[message.task_id] = message.message
        others = set(names) - {node} - avoided(self.aside, names, "")
        if len(lost) >= QUICK_LOSSES and others and node in names:
            del self._quick[node]
            why = f"{len(lost)} tasks in a row ended within {QUICK_SECONDS:g} s of their start"
            fault = Fault("node", self._hosts.get(node, node), node)
            self._set_aside(fault, f"{why}, the last: {message.message}", tried=tried)


def device_named(worker: str) -> str:
    """The device in the name of a worker, spelled as in the `Fault` of a device.

    >>> device_named("gpu7 pid 4711 cuda:1")
    'cuda:1 of gpu7'
    """
    host, _, device = worker.partition(" ")
    return f"{device.rpartition(' ')[2]} of {host}"


def is_quick(message: Failed | Lost, seconds: float) -> bool:
    """Whether an attempt ended right after its start, for a reason that may be the task's or the node's."""
    odd = message.kind == "error" if isinstance(message, Failed) else message.reason == "worker_died"
    return odd and seconds <= QUICK_SECONDS
