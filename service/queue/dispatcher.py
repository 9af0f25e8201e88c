"""The loop that keeps the cluster busy: lead, reap, collect, claim, hand over. One dispatcher leads, others wait."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.errors import Conflict, DatabaseAway
from service.lab.artifacts import Artifacts
from service.model import environment
from service.model.environment import Environment
from service.model.events import EventKind
from service.model.executor import (
    Bundle,
    Executor,
    Failed,
    Lost,
    Message,
    Reason,
    Succeeded,
)
from service.model.json import JsonObject
from service.model.liveness import Liveness
from service.queue import pausing
from service.queue.claims import Claims
from service.queue.outbox import Outbox
from service.settings import Settings
from service.store import Connection, Database, claiming, history, recording
from service.store.history import Event
from service.store.waking import Waking, waking

log = logging.getLogger("uncanny.dispatcher")

NEWS = {"set_aside": EventKind.ENVIRONMENT_SET_ASIDE, "returned": EventKind.ENVIRONMENT_RETURNED}
POLL_TIMEOUT_SECONDS = 0.05  # the wait for the executor's next message
POLL_INTERVAL_SECONDS = 0.1  # between two ticks without work
BATCH_WINDOW_SECONDS = 0.02  # messages of one window share a transaction, which costs more than a row in it
RECONNECT_SECONDS = 1.0  # between two tries to reach a database that does not answer
CANCEL_CHECK_SECONDS = 0.5  # between two looks for running tasks that no live job needs any more

Key = tuple[str, int]
"""`(task id, attempt)`"""


@dataclass
class Dispatcher:
    """Moves tasks from the store to an executor, and their outcomes back. It holds its leases under `name`.

    A dispatcher that is started under the name of a dead one takes over at once: the supervisor starts it so. Any other
    waits for the lease to expire. A simulation gives it another `clock` and another `sleep`.
    """

    database: Database
    artifacts: Artifacts
    executor: Executor
    settings: Settings
    name: str
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _epoch: int | None = None  # the epoch of its leadership; None while it stands by
    _outbox: Outbox = field(init=False)
    _waking: Waking = field(init=False)
    _running: dict[Key, Bundle] = field(default_factory=dict)  # attempts without an outcome yet
    # Attempts that were stopped, and the reason to report; None if the executor's is right: the attempt was cancelled.
    _stopping: dict[Key, tuple[Reason, str] | None] = field(default_factory=dict)
    _liveness: Liveness = field(init=False)
    _environment: Environment = field(init=False)
    _claims: Claims = field(init=False)
    _failing: dict[str, int] = field(default_factory=dict)  # quick failures in a row, by sweep
    _renewed_at: float = -math.inf
    _seen_at: float = -math.inf  # when the database last answered about leadership
    _looked_at: float = -math.inf
    _lead_from: float = -math.inf  # in the database's time, like `_reap_from`
    _reap_from: float = 0.0

    def __post_init__(self) -> None:
        self._outbox = Outbox(self.database, self.artifacts, self.settings, self.name)
        self._waking = waking(self.database)
        self._liveness = Liveness(self.clock)
        self._environment = Environment(self.clock)
        self._claims = Claims(self.database, self.executor, self.settings, self.name, self._environment, self.clock)

    @property
    def leading(self) -> bool:
        return self._epoch is not None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then let attempts finish for a while, give back the rest at no cost, and resign.

        Raises `Conflict` if another dispatcher has been started under the same name.
        """
        while not stop.is_set():
            busy = self._try(self.tick)
            if busy is None:
                stop.wait(RECONNECT_SECONDS)
            elif self.leading:
                self._waking.wait(0.0 if busy else POLL_INTERVAL_SECONDS)
            else:
                stop.wait(POLL_INTERVAL_SECONDS)
        self._wind_down()
        self._stop()

    def _try(self, do: Callable[[], bool]) -> bool | None:
        """Call `do`. If the database is away, keep finished outcomes on disk and return None."""
        try:
            return do()
        except DatabaseAway as error:
            log.warning("%s", error)
            self._collect(0.0)
            self._outbox.keep()
            return None

    def tick(self) -> bool:
        """Do one round. True while tasks run, so that the executor may send messages."""
        self._go_on()
        if self.leading:
            self.claim()
        return bool(self._running)

    def _go_on(self) -> bool:
        """Do one round without claiming tasks."""
        self._hold_leadership()
        self._collect(POLL_TIMEOUT_SECONDS if self._running else 0.0)
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
        if not self.leading:
            if self._another_leads():
                self._seen_at = wall
                return
            self._outbox.take_over()
        with self.database.write() as connection:
            if not self.leading and self.clock() - wall > lease / 2:
                self._seen_at = wall  # this write had to wait, so the leader's renewal may be waiting too
                return
            now = self.database.now(connection)
            last_leader = claiming.leader(connection)
            if not self.leading and last_leader is not None:
                self._environment.take_over(environment.reported(last_leader.status), now)
                self._claims.take_over(last_leader.status)
            epoch = claiming.lead(connection, now, self.name, self._epoch, lease, self._status(now))
            if epoch is not None:
                events = [Event(NEWS[verb], data=aside.as_data()) for verb, aside in news]
                history.append(connection, now, self.name, events)
                if wall - self._seen_at > lease / 2:
                    self._reap_from = now + lease  # the database may have been away: others could not renew either
                claiming.renew(connection, now, self.name, lease)
                if now >= self._reap_from and not self._outbox.messages:  # finished attempts first, then lost ones
                    claiming.reap(connection, now, self.name)
                held = claiming.held_by(connection, self.name)
                # Leases of an earlier run, or of a grant whose commit broke the connection: nothing of it runs.
                unknown = held.keys() - self._running.keys() - self._outbox.keys
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

    def _status(self, now: float) -> JsonObject:
        """What the service says of the cluster, also after this dispatcher has ended."""
        aside = self._environment.as_status(now)
        return {"capacity": vars(self._claims.capacity()), "bundles": self._bundles, "set_aside": aside}

    def _another_leads(self) -> bool:
        """Read before writing, so that dispatchers that stand by do not queue up for the one writing transaction.

        If the database has been away, the last leader gets one lease of time to come back: it could not renew either.
        """
        with self.database.read() as connection:
            leader, now = claiming.leader(connection), self.database.now(connection)
        lease = self.settings.lease_seconds
        if math.isfinite(self._seen_at) and self.clock() - self._seen_at > lease / 2:
            self._lead_from = now + lease
        if leader is not None and leader.holder != self.name and now < self._lead_from:
            return True
        return claiming.led_by_another(leader, now, self.name)

    def _step_down(self) -> None:
        log.warning("%s no longer leads: stopping what it runs", self.name)
        self._epoch = None
        self._outbox.drop()
        self._cancel_unwanted({})
        with self.database.read() as connection:
            leader = claiming.leader(connection)
            if leader is not None and leader.holder == self.name:
                raise Conflict(f"another dispatcher was started as {self.name}: each needs a name of its own")

    def _heed_cancellations(self) -> None:
        wall = self.clock()
        if self._running and wall - self._looked_at >= CANCEL_CHECK_SECONDS:
            with self.database.read() as connection:
                held = claiming.held_by(connection, self.name)
            self._cancel_unwanted(held)
            self._looked_at = wall

    def _cancel_unwanted(self, held: dict[Key, bool]) -> None:
        """Stop running attempts that the store has given to others or that no live job needs, each only once."""
        for key in self._running:
            if held.get(key, True) and key not in self._stopping:
                self._stopping[key] = None
                self.executor.cancel(*key)

    def _give_up(self, key: Key, reason: Reason, why: str) -> None:
        """Stop a running attempt for a reason of our own, which is reported instead of a cancellation."""
        if key in self._running and key not in self._stopping:
            self._stopping[key] = (reason, why)
            self.executor.cancel(*key)

    def _collect(self, timeout_seconds: float) -> None:
        """Take the executor's messages. The outbox keeps them until they are written."""
        arrived: list[Message] = []
        messages = self.executor.poll(timeout_seconds)
        if messages and timeout_seconds:
            self.sleep(BATCH_WINDOW_SECONDS)
            messages += self.executor.poll(0.0)
        for message in messages:
            key = (message.task_id, message.attempt)
            self._liveness.hear(message)
            if key in self._running:
                self._environment.hear(message, self._running[key], environment.names_of(self.executor.capacity()))
            if isinstance(message, (Succeeded, Failed, Lost)):
                self._running.pop(key, None)
                stopped_for = self._stopping.pop(key, None)
                if stopped_for is not None and isinstance(message, Lost):
                    message = Lost(*key, *stopped_for)
            arrived.append(message)
        self._outbox.add(arrived)

    def _look_for_stalled(self) -> None:
        """Report attempts that do not advance, and stop those that have not advanced for too long: they are retried."""
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

    def claim(self) -> int:
        """Hand over the tasks that go next; returns the number of bundles."""
        for key in self._claims.misplaced(self._running):
            self._give_up(key, "given_back", "the nodes that it may go to have changed")
        bundles = self._claims.claim(self._epoch, self._running)
        if bundles is None:
            self._step_down()
        for bundle in bundles or ():
            self._running |= {(grant.task_id, grant.attempt): bundle for grant in bundle.grants}
            self.executor.submit(bundle)
            log.info("handed over %s", ", ".join(map(str, bundle.grants)))
        return len(bundles or ())

    def _still_leads(self, connection: Connection) -> bool:
        return claiming.still_leads(connection, self.name, self._epoch)

    @property
    def _bundles(self) -> int:
        return len({bundle.id for bundle in self._running.values()})

    def _wind_down(self) -> None:
        """Let attempts finish for a while, a training until its next epoch state; give waiting ones back at once."""
        deadline = time.monotonic() + self.settings.stop_seconds
        why = "its dispatcher was told to stop"
        self._liveness.mark()
        for key in [key for key in self._running if key not in self._liveness]:
            self._give_up(key, "given_back", why)
        while self._running and self.leading and time.monotonic() < deadline:
            if self._try(self._go_on) is None:
                self.sleep(POLL_TIMEOUT_SECONDS)
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
                if self._still_leads(connection):  # else its successor has the leases
                    now = self.database.now(connection)
                    claiming.take_back(connection, now, self.name)
                    claiming.resign(connection, now, self.name)
        except DatabaseAway as error:
            self._outbox.keep()
            log.warning("%s; what ran is taken back when its lease expires", error)
