"""An executor in virtual time: a cluster whose tasks compute nothing and take as long as a table says."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from service.model.executor import (
    ArtifactRef,
    Bits,
    Bundle,
    Capacity,
    Grant,
    Message,
    Numbers,
    Outcome,
    Started,
    Succeeded,
)
from service.model.ledger import Ledger
from service.model.resources import Amounts, amounts, nodes_of
from service.model.scheduling import ROUNDING, has_room

CHECKS = ("train_mode_modules", "random_forward_changed", "batch_dependent_changed", "eps_zero_changed")
PANEL = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")


class VirtualClock:
    """Seconds that pass only when somebody says so, and never backwards."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def advance(self, to: float) -> None:
        """It is `to` now, unless it is later already."""
        self._now = max(self._now, to)

    def sleep(self, seconds: float) -> None:
        self.advance(self._now + seconds)


class Run(NamedTuple):
    """A task that ran, and how many devices it had."""

    task_id: str
    started_at: float
    ended_at: float
    devices: float


class Idle(NamedTuple):
    """A time in which `devices` were idle, and the kinds of task for which a node had room."""

    since: float
    until: float
    devices: float
    room_for: frozenset[str]


@dataclass
class _Running:
    bundle: Bundle
    ledger: Ledger
    needs: Amounts
    left: Iterator[Grant]
    node: int | None = None  # None while it waits for resources
    current: Grant | None = None
    started_at: float = 0.0


class VirtualExecutor:
    """A cluster of `nodes`. A bundle goes to the first node that has room for it; if none has, it waits in order.

    A waiting bundle lets others past it that need other resources, as Ray does. A poll never sleeps: it moves the clock
    to the next message, but at most `patience_seconds` on and never beyond `horizon`. `runs` has the tasks that
    succeeded. `idle` has the times in which devices (GPUs, or CPUs if there is none) had nothing to do; `kinds` are the
    needs of each kind of task.
    """

    def __init__(
        self,
        clock: VirtualClock,
        nodes: Mapping[str, Mapping[str, float]],
        seconds: Callable[[Bundle, Grant], float],
        kinds: Mapping[str, Amounts],
        patience_seconds: float = math.inf,
    ) -> None:
        self._clock, self._seconds, self._patience_seconds = clock, seconds, patience_seconds
        alike: dict[tuple[object, ...], list[str]] = {}
        for kind, needs in kinds.items():
            alike.setdefault(tuple(needs.items()), []).append(kind)
        self._kinds = [(frozenset(of_size), kinds[of_size[0]]) for of_size in alike.values()]
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes.values()) for name in ("CPU", "GPU"))
        self._capacity = Capacity(True, cpus, gpus, tuple(nodes.values()), tuple(nodes))
        self._names = list(nodes)
        self._free = nodes_of(self._capacity)
        self._device = "GPU" if gpus else "CPU"
        self.devices = gpus or cpus
        self._free_devices = self.devices
        self._bundles: dict[str, _Running] = {}
        self._waiting: dict[str, _Running] = {}  # those of them that no node has room for yet
        self._due: list[tuple[float, int, str, Grant]] = []  # a heap: when the current task of a bundle ends
        self._numbers = count()
        self._messages: list[Message] = []
        self._at = clock()  # the time up to which everything has happened
        self.horizon = math.inf
        self.runs: list[Run] = []
        self.idle: list[Idle] = []
        self.spent_seconds = 0.0  # of the processor, in `submit` and `poll`

    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, bundle: Bundle) -> None:
        began = time.thread_time()
        self._happen(self._clock())
        running = _Running(bundle, Ledger(bundle), amounts(bundle.needs), iter(bundle.grants))
        self._bundles[bundle.id] = self._waiting[bundle.id] = running
        self._place(self._at)
        self.spent_seconds += time.thread_time() - began

    def poll(self, timeout_seconds: float) -> list[Message]:
        began, now = time.thread_time(), self._clock()
        self._happen(now)
        if not self._messages and timeout_seconds:
            due = self._due[0][0] if self._due else now + timeout_seconds
            self._clock.advance(min(due, now + self._patience_seconds, self.horizon))
            self._happen(self._clock())
        messages, self._messages = self._messages, []
        self.spent_seconds += time.thread_time() - began
        return messages

    def cancel(self, task_id: str, attempt: int) -> None:
        for running in list(self._bundles.values()):
            stop, lost = running.ledger.cancel((task_id, attempt))
            self._messages += lost
            if stop:
                self._end(running)

    def close(self) -> None:
        for running in list(self._bundles.values()):
            running.ledger.stopping = True
            self._end(running)

    @property
    def is_working(self) -> bool:
        """Whether a bundle runs, or a message has not been read. A bundle that no node is large enough for waits on."""
        return bool(self._messages) or len(self._bundles) > len(self._waiting)

    def _happen(self, until: float) -> None:
        """Let all tasks end that end by then, each at its own time."""
        while self._due and self._due[0][0] <= until:
            at, _, bundle_id, grant = heappop(self._due)
            running = self._bundles.get(bundle_id)
            if running is not None and running.current is grant:
                self._note_idle(at)
                self._finish(running, grant, at)
        self._note_idle(until)

    def _note_idle(self, until: float) -> None:
        if until > self._at and self._free_devices > ROUNDING:
            fitting = [kinds for kinds, needs in self._kinds if any(has_room(free, needs) for free in self._free)]
            self.idle.append(Idle(self._at, until, self._free_devices, frozenset().union(*fitting)))
        self._at = max(self._at, until)

    def _finish(self, running: _Running, grant: Grant, at: float) -> None:
        devices, seconds = running.needs.get(self._device, 0.0), at - running.started_at
        self.runs.append(Run(grant.task_id, running.started_at, at, devices))
        self._say(running, Succeeded(grant.task_id, grant.attempt, outcome(grant, seconds)))
        self._start_next(running, at)

    def _start_next(self, running: _Running, at: float) -> None:
        """Start the next task of a bundle that has no answer yet; without one, the bundle ends."""
        for grant in running.left:
            if running.node is not None and running.ledger.owes((grant.task_id, grant.attempt)):
                running.current, running.started_at = grant, at
                node = self._names[running.node]
                worker = f"{node}, {running.bundle.id}"  # each bundle has a worker of its own
                self._say(running, Started(grant.task_id, grant.attempt, worker, node))
                ends_at = at + self._seconds(running.bundle, grant)
                heappush(self._due, (ends_at, next(self._numbers), running.bundle.id, grant))
                return
        self._end(running)

    def _end(self, running: _Running) -> None:
        """Answer for what has no answer yet, and give the resources back."""
        self._messages += running.ledger.end("given_back", "its bundle was stopped")
        del self._bundles[running.bundle.id]
        self._waiting.pop(running.bundle.id, None)
        if running.node is not None:
            self._take(running.node, running.needs, -1)
            self._place(self._at)

    def _place(self, at: float) -> None:
        """Start the waiting bundles that a node has room for, in order."""
        full: set[tuple[object, ...]] = set()  # needs that no node has room for
        for running in list(self._waiting.values()):
            if running.bundle.id not in self._waiting:
                continue
            shape = (*running.needs.items(), running.bundle.avoid)
            node = None if shape in full else self._node_for(running)
            if node is None:
                full.add(shape)
                continue
            del self._waiting[running.bundle.id]
            running.node = node
            self._take(node, running.needs, 1)
            self._start_next(running, at)

    def _node_for(self, running: _Running) -> int | None:
        nodes = enumerate(zip(self._names, self._free, strict=True))
        fit = (i for i, (name, free) in nodes if name not in running.bundle.avoid and has_room(free, running.needs))
        return next(fit, None)

    def _take(self, node: int, needs: Amounts, sign: int) -> None:
        free = self._free[node]
        for name, amount in needs.items():
            free[name] = free.get(name, 0.0) - sign * amount
        self._free_devices -= sign * needs.get(self._device, 0.0)

    def _say(self, running: _Running, message: Message) -> None:
        running.ledger.accept(message)
        self._messages.append(message)


def outcome(grant: Grant, seconds: float) -> Outcome:
    """The least that a task of this kind must leave so that it can be filed and judged."""
    provenance = {"device": "simulated", "device_seconds": seconds}
    match grant.spec["kind"]:
        case "train":
            return Outcome(artifacts=(ArtifactRef(grant.digest, 1, "checkpoint"),), provenance=provenance)
        case "measure":
            return Outcome({"log_relative_sharpness_median": -2.5}, provenance=provenance)
        case "attack":
            numbers: Numbers = {"robust_accuracy": 1.0, "outside_ball": 0}
            return Outcome(numbers, bits=_attack_bits(grant.spec["samples"]), provenance=provenance)
    return Outcome(dict.fromkeys(CHECKS, 0), bits=_panel_bits(grant.spec["samples"]), provenance=provenance)


@lru_cache
def _attack_bits(n: int) -> dict[str, Bits]:
    none = Bits(n, bytes(-(-n // 8)))
    return {"robust": _every(n), "clean_correct": _every(n), "zero_gradient": none}


@lru_cache
def _panel_bits(n: int) -> dict[str, Bits]:
    return {f"robust_{name}": _every(n) for name in PANEL}


def _every(n: int) -> Bits:
    """`n` bits that are all set; the bits that fill up the last byte are not."""
    return Bits(n, (((1 << n) - 1) << (-n % 8)).to_bytes(-(-n // 8), "big"))
