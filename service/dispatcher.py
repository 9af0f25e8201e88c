"""The loop that keeps the cluster busy: lead, reap, collect, claim, hand over. One dispatcher leads, others wait."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from sqlalchemy import Connection

from service import decisions, environment, pausing, placing, replanning, resources, scheduling, sponsoring
from service.artifacts import Artifacts
from service.errors import Conflict, DatabaseAway
from service.environment import Environment
from service.executor import (
    ArtifactRef,
    Bundle,
    Capacity,
    Executor,
    Failed,
    Grant,
    Lost,
    Message,
    Reason,
    Succeeded,
)
from service.liveness import Liveness
from service.outbox import Outbox
from service.scheduling import Account, Cluster, Decision
from service.settings import Settings
from service.store import Database, claiming, deciding, history, recording, users
from service.store.history import Event
from service.store.waking import Waking, waking

log = logging.getLogger("uncanny.dispatcher")

POLL_SECONDS = 0.05
IDLE_SECONDS = 0.1
GATHER_SECONDS = 0.02  # what comes so close together is written together: a transaction costs more than a row in it
AWAY_SECONDS = 1.0
PASS_ON_SECONDS = 5.0  # how often it looks whether a shared task waits for the wrong user's turn
LOOK_SECONDS = 0.5  # how often it looks whether something that runs is not wanted any more
QUEUE_WINDOW = 1024  # how far down the ranked queue one decision looks

Key = tuple[str, int]
"""`(task id, attempt)`"""


Checkpointed = tuple[dict[str, Any], ArtifactRef | None]  # the spec of a training, and what it left


@dataclass(frozen=True)
class _Choice:
    """What the scheduler saw of the queue, and what it chose."""

    way: placing.Way
    accounts: dict[str, Account]
    cluster: Cluster
    now: float
    chosen: list[Decision]


@dataclass
class Dispatcher:
    """Moves tasks from the store to an executor and their outcomes back. `name` is what leases are held under.

    A dispatcher that is started under the name of one that has died, as the supervisor does, takes over at once;
    any other waits for the lease to expire.
    """

    database: Database
    artifacts: Artifacts
    executor: Executor
    settings: Settings
    name: str
    clock: Callable[[], float] = time.monotonic
    _epoch: int | None = None  # of its leadership; None while it stands by
    _outbox: Outbox = field(init=False)
    _waking: Waking = field(init=False)
    _running: dict[Key, Bundle] = field(default_factory=dict)  # what the executor owes an answer for
    _handed_over: set[str] = field(default_factory=set)  # the bundles that ran after the last claim
    _stopping: dict[Key, tuple[Reason, str] | None] = field(default_factory=dict)  # what was stopped -> how it is told
    _liveness: Liveness = field(init=False)
    _environment: Environment = field(init=False)
    _failing: dict[str, int] = field(default_factory=dict)  # by sweep, the quick failures in a row
    _renewed_at: float = -math.inf
    _seen_at: float = -math.inf  # when the database last answered about leadership
    _looked_at: float = -math.inf
    _passed_on_at: float = -math.inf
    _lead_from: float = -math.inf  # by the database's clock, as the next one
    _reap_from: float = 0.0

    def __post_init__(self) -> None:
        self._outbox = Outbox(self.database, self.artifacts, self.settings, self.name)
        self._waking = waking(self.database)
        self._liveness = Liveness(self.clock)
        self._environment = Environment(self.clock)

    @property
    def leading(self) -> bool:
        return self._epoch is not None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then let what runs finish for a while, give back the rest at no cost, and resign.

        Raises `Conflict` where another dispatcher has been started under the same name.
        """
        while not stop.is_set():
            busy = self._try(self.tick)
            if busy is None:
                stop.wait(AWAY_SECONDS)
            elif self.leading:
                self._waking.wait(0.0 if busy else IDLE_SECONDS)
            else:
                stop.wait(IDLE_SECONDS)
        self._wind_down()
        self._stop()

    def _try(self, do: Callable[[], bool]) -> bool | None:
        """`do`, or where the database is away (None) keep on disk what is finished meanwhile."""
        try:
            return do()
        except DatabaseAway as error:
            log.warning("%s", error)
            self._collect(0.0)
            self._outbox.keep()
            return None

    def tick(self) -> bool:
        """One round; true while there is something to wait for from the executor."""
        self._go_on()
        if self.leading:
            self._claim()
        return bool(self._running)

    def _go_on(self) -> bool:
        """A round without taking on new work."""
        self._hold_leadership()
        self._collect(POLL_SECONDS if self._running else 0.0)
        if self.leading:
            self._heed_cancellations()
            self._write()
            self._pause_failing()
            self._look_for_stalled()
        if not self.leading:
            self._outbox.drop()
        return bool(self._running)

    def _hold_leadership(self) -> None:
        """Become or stay the leader and prolong all leases, a third of the way through them."""
        wall, lease = self.clock(), self.settings.lease_seconds
        news = list(self._environment.news)
        if self.leading and wall - self._renewed_at < lease / 3 and not news:
            return
        if not self.leading and self._another_leads():
            self._seen_at = wall
            return
        if not self.leading:
            self._outbox.take_over()
        with self.database.write() as connection:
            if not self.leading and self.clock() - wall > lease / 2:
                self._seen_at = wall  # it waited so long for its turn that the leader may wait for its own
                return
            now = self.database.now(connection)
            before = claiming.leader(connection)
            if not self.leading and before is not None:
                self._environment.take_over(environment.reported(before.status), now)
            status = {"capacity": vars(self.executor.capacity()), "bundles": self._bundles}
            status["set_aside"] = self._environment.told(now)
            epoch = claiming.lead(connection, now, self.name, self._epoch, lease, status)
            if epoch is not None:
                happened = [Event(f"environment.{verb}", data=one.as_data()) for verb, one in news]
                history.append(connection, now, self.name, happened)
                if wall - self._seen_at > lease / 2:
                    self._reap_from = now + lease  # the database may have been away: others could not renew either
                claiming.renew(connection, now, self.name, lease)
                unwritten = self._outbox.keys
                if now >= self._reap_from and not unwritten:  # first what was finished, then what is lost
                    claiming.reap(connection, now, self.name)
                held = claiming.held_by(connection, self.name)
                # Of an earlier run, or granted when the connection broke as that was committed: nothing of it runs.
                unknown = held.keys() - self._running.keys() - unwritten
                taken = claiming.take_back(connection, now, self.name, [task_id for task_id, _ in unknown])
        del self._environment.news[: len(news)]
        self._seen_at = wall
        self._renewed_at = -math.inf if self._outbox.messages else wall
        if epoch is not None:
            if not self.leading:
                log.info("%s leads; took back %d tasks of an earlier run", self.name, taken)
            self._epoch = epoch
            self._cancel_unwanted(held)
        elif self.leading:
            self._step_down()

    def _another_leads(self) -> bool:
        """Look before writing: those who stand by are not to queue up for the one writing transaction.

        Where the database has been away, whoever led gets a lease of time to come back: it could not renew either.
        """
        with self.database.read() as connection:
            row, now = claiming.leader(connection), self.database.now(connection)
        lease = self.settings.lease_seconds
        if math.isfinite(self._seen_at) and self.clock() - self._seen_at > lease / 2:
            self._lead_from = now + lease
        if row is not None and row.holder != self.name and now < self._lead_from:
            return True
        return claiming.led_by_another(row, now, self.name)

    def _step_down(self) -> None:
        log.warning("%s no longer leads: stopping what it runs", self.name)
        self._epoch = None
        self._outbox.drop()
        self._cancel_unwanted({})
        with self.database.read() as connection:
            if claiming.leader(connection).holder == self.name:
                raise Conflict(f"another dispatcher was started as {self.name}: each needs a name of its own")

    def _heed_cancellations(self) -> None:
        wall = self.clock()
        if self._running and wall - self._looked_at >= LOOK_SECONDS:
            with self.database.read() as connection:
                held = claiming.held_by(connection, self.name)
            self._cancel_unwanted(held)
            self._looked_at = wall

    def _cancel_unwanted(self, held: dict[Key, bool]) -> None:
        """Stop what runs here and is, by the store, not ours any more or not wanted; once is enough."""
        for key in self._running:
            if held.get(key, True) and key not in self._stopping:
                self._stopping[key] = None
                self.executor.cancel(*key)

    def _give_up(self, key: Key, reason: Reason, why: str) -> None:
        """Stop what runs for a reason of our own, which is told instead of a cancellation."""
        if key in self._running and key not in self._stopping:
            self._stopping[key] = (reason, why)
            self.executor.cancel(*key)

    def _collect(self, timeout_seconds: float) -> None:
        """Take what the executor has to say; it is kept until it is written."""
        arrived: list[Message] = []
        messages = self.executor.poll(timeout_seconds)
        if messages and timeout_seconds:
            time.sleep(GATHER_SECONDS)
            messages += self.executor.poll(0.0)
        for message in messages:
            key = (message.task_id, message.attempt)
            self._liveness.hear(message)
            if key in self._running:
                self._environment.hear(message, self._running[key], environment.names_of(self.executor.capacity()))
            if isinstance(message, (Succeeded, Failed, Lost)):
                self._running.pop(key, None)
                told = self._stopping.pop(key, None)
                if told is not None and isinstance(message, Lost):
                    message = Lost(*key, *told)
            arrived.append(message)
        self._outbox.add(arrived)

    def _look_for_stalled(self) -> None:
        """Report those that do not advance, and start anew those that have not for too long."""
        report, limit = self.settings.stalled_seconds, self.settings.stalled_limit_seconds
        for key, seconds in list(self._liveness.standing_still(limit)):
            self._give_up(key, "stalled", f"it ran, but did not advance for {seconds:.0f} seconds (limit {limit:g})")
        if still := self._liveness.newly_standing_still(report):
            log.warning("%d tasks do not advance", len(still))
            with self.database.write() as connection:
                if self._still_leads(connection):
                    recording.note_stalled(connection, self.database.now(connection), self.name, still)

    def _write(self) -> None:
        if not self._outbox.write(self._epoch):
            self._step_down()

    def _pause_failing(self) -> None:
        ended = list(self._environment.ended)
        pausing.pause_failing(self.database, self.name, self._still_leads, ended, self._failing)
        del self._environment.ended[: len(ended)]

    def _claim(self) -> None:
        capacity = self.executor.capacity()
        self._environment.heed(capacity)
        self._take_back_misplaced(capacity)
        running = {bundle.id for bundle in self._running.values()}
        ended, self._handed_over = len(self._handed_over - running), running
        cluster = self._room(capacity, placing.Way((), frozenset()), ended)
        if cluster.free_slots <= 0:
            return
        if self.clock() - self._passed_on_at >= PASS_ON_SECONDS:
            self._passed_on_at = self.clock()
            sponsoring.pass_on(self.database, self.settings, cluster, self._still_leads)
        half_life, limits = self.settings.usage_half_life_seconds, self.settings.limits
        with self.database.read() as connection:
            now = self.database.now(connection)
            queue = [] if claiming.is_paused(connection) else claiming.waiting(connection, now, QUEUE_WINDOW)
            sponsors = {task.sponsor for task in queue}
            accounts = users.accounts(connection, now, sponsors, half_life, limits) if queue else {}
            trainings = {task.train_digest for task in queue} if self._environment.aside else set()
            datasets = claiming.datasets_of(connection, trainings) if trainings else {}
        for way in placing.ways(self._environment, capacity, queue, datasets):
            cluster = self._room(capacity, way, ended)
            if chosen := scheduling.choose(way.queue, accounts, cluster, now) if way.queue else []:
                self._hand_over(_Choice(way, accounts, cluster, now, chosen), capacity)
                return  # what is left, the next tick sees with these taken off

    def _room(self, capacity: Capacity, way: placing.Way, ended: int) -> Cluster:
        """What is free on the nodes of that way; bundles that are not taken up yet count as if they went there."""
        needs = {}
        for key, bundle in self._running.items():
            node = self._environment.node_of(key)
            if node in way.nodes or node is None and way.trial is None or not way.nodes:
                needs[bundle.id] = bundle.needs
        cluster = resources.cluster(self.settings, capacity, needs.values(), ended, way.nodes)
        if way.trial is None:
            return cluster
        return replace(cluster, free_slots=min(1, cluster.free_slots), lookahead=0)

    def _hand_over(self, choice: "_Choice", capacity: Capacity) -> None:
        """Grant what was chosen, and give the executor the bundles."""
        chosen, trial = choice.chosen, choice.way.trial
        names = [f"{self.name}-{self._epoch}-{next(_numbers)}" for _ in chosen]  # no other bundle ever has it
        placements = {
            task_id: claiming.Placement(decision.sponsor, name, decision.share)
            for decision, name in zip(chosen, names, strict=True)
            for task_id in decision.task_ids
        }
        bundles: list[Bundle] = []
        with self.database.write() as connection:
            leads = self._still_leads(connection)
            if leads and not claiming.is_paused(connection):
                granted = self._grant(connection, choice, placements)
                train_digest = {task.task_id: task.train_digest for task in choice.way.queue}
                for name, decision in zip(names, chosen, strict=True):
                    grants = tuple(granted[task_id] for task_id in decision.task_ids if task_id in granted)
                    if grants:
                        made = claiming.checkpoint_of(connection, train_digest[grants[0].task_id])
                        named = {grant.spec["source"] for grant in grants if grant.spec.get("source")}
                        sources = {source: claiming.checkpoint_of(connection, source) for source in named}
                        needs = resources.of_bundle(self.settings, grants, capacity, decision.whole)
                        bundles.append(Bundle(name, grants, *made, sources, needs))
        if not leads:
            self._step_down()
        for bundle in bundles:
            nodes = environment.names_of(capacity)
            if trial is not None:
                self._environment.tries(bundle.id, trial, bundle.dataset)
                bundle = replace(bundle, avoid=frozenset(nodes) - {trial})
            else:
                bundle = replace(bundle, avoid=environment.avoided(self._environment.aside, nodes, bundle.dataset))
            self._running |= {(grant.task_id, grant.attempt): bundle for grant in bundle.grants}
            self._handed_over.add(bundle.id)
            self.executor.submit(bundle)
            log.info("handed over %s", ", ".join(map(str, bundle.grants)))

    def _grant(
        self, connection: Connection, choice: "_Choice", placements: dict[str, claiming.Placement]
    ) -> dict[str, Grant]:  # fmt: skip
        now, lease = self.database.now(connection), self.settings.lease_seconds
        granted = claiming.grant(connection, now, self.name, lease, list(placements), placements)
        if old := replanning.outdated(granted.values()):
            claiming.take_back(connection, now, self.name, old)
            replanning.replan(connection, now, self.name, old)
            granted = {task_id: grant for task_id, grant in granted.items() if task_id not in old}
        users.fold(connection, now, self.settings.usage_half_life_seconds)
        seen = decisions.packed(choice.way.queue, choice.accounts, choice.cluster, choice.now)
        deciding.keep(connection, now, self.name, seen, decisions.told(choice.chosen), self.settings.decision_log)
        return granted

    def _take_back_misplaced(self, capacity: Capacity) -> None:
        """Bundles that wait for a node in the executor wait there for ever where that node is set aside, or gone, and
        do not get one that is back."""
        nodes, aside = environment.names_of(capacity), self._environment.aside
        if not capacity.ready:
            return
        taken_up = {bundle.id for key, bundle in self._running.items() if self._environment.node_of(key) is not None}
        for key, bundle in list(self._running.items()):
            waits = bundle.id not in taken_up and not self._environment.is_tried(bundle.id)
            if waits and bundle.avoid & {*nodes} != environment.avoided(aside, nodes, bundle.dataset):
                self._give_up(key, "given_back", "the nodes that it may go to have changed")

    def _still_leads(self, connection: Connection) -> bool:
        return claiming.still_leads(connection, self.name, self._epoch)

    @property
    def _bundles(self) -> int:
        return len({bundle.id for bundle in self._running.values()})

    def _wind_down(self) -> None:
        """Let what runs finish for a while, a training until its next epoch state; what waits is given back at once."""
        deadline = time.monotonic() + self.settings.stop_seconds
        why = "its dispatcher was told to stop"
        self._liveness.mark()
        for key in [key for key in self._running if key not in self._liveness]:
            self._give_up(key, "given_back", why)
        while self._running and self.leading and time.monotonic() < deadline:
            if self._try(self._go_on) is None:
                time.sleep(POLL_SECONDS)
            for key in self._liveness.saved:
                self._give_up(key, "given_back", f"{why}; its last epoch state is kept")

    def _stop(self) -> None:
        self.executor.close()
        self._waking.close()
        self._collect(0.0)
        if not self.leading:
            return
        try:
            self._write()
            with self.database.write() as connection:
                if self._still_leads(connection):  # else all of that is its successor's
                    now = self.database.now(connection)
                    claiming.take_back(connection, now, self.name)
                    claiming.resign(connection, now, self.name)
        except DatabaseAway as error:
            self._outbox.keep()
            log.warning("%s; what ran is taken back when its lease expires", error)


_numbers = count(1)
