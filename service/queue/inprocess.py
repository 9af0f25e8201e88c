"""An executor in threads of this process: for tests, and for a laptop where starting Ray is not worth it."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.interrupt import interrupt
from service.model.executor import Bundle, Capacity, Message
from service.model.ledger import Ledger

POLL_INTERVAL_SECONDS = 0.1  # between two checks, while a poll waits, for threads that do not stop
OVERRUN_SECONDS = 0.2  # how long a poll may exceed its timeout while bundles send messages without a pause
AGAIN_SECONDS = 0.5  # until an interrupt is sent again: Python drops one that lands in a destructor or a gc callback


@dataclass(frozen=True)
class _Ended:
    why: str


@dataclass
class _Running:
    ledger: Ledger
    thread: threading.Thread
    begun: threading.Event  # set once the thread catches interrupts
    stop: threading.Event  # the thread sees it at its next message, even if interrupts are lost
    again_at: float = math.inf
    give_up_at: float = math.inf


class InProcessExecutor:
    """Runs bundles by `execute(bundle)`, as many at once as it has CPUs, each in a thread of its own.

    A thread cannot be killed: one that does not stop within the grace period after a cancel runs on in its slot, and
    its later messages are dropped. If `execute` raises, its task is `Lost(worker_died)`.
    Only one thread may call the methods: the dispatcher's.
    """

    def __init__(
        self, execute: Callable[[Bundle], Iterator[Message]], *, cpus: float = 1.0, grace_seconds: float = 3.0
    ) -> None:
        self._execute = execute
        self._cpus = cpus
        self._grace_seconds = grace_seconds
        self._slots = max(1, int(cpus))
        self._arrived: queue.SimpleQueue[tuple[str, Message | _Ended]] = queue.SimpleQueue()
        self._bundles: dict[str, _Running] = {}
        self._in_slots: set[str] = set()  # ids of the bundles whose threads have started and not ended
        self._lost: list[Message] = []
        self._closed = False

    def capacity(self) -> Capacity:
        return Capacity(ready=not self._closed, cpus=self._cpus, gpus=0.0)

    def submit(self, bundle: Bundle) -> None:
        if self._closed:
            ledger = Ledger(bundle)
            ledger.stopping = True
            self._lost += ledger.end("given_back", "the executor is closed")
            return
        begun, stop = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._run, args=(bundle, begun, stop), name=f"bundle {bundle.id}", daemon=True)
        self._bundles[bundle.id] = _Running(Ledger(bundle), thread, begun, stop)
        self._start_in_free_slots()

    def poll(self, timeout_seconds: float) -> list[Message]:
        deadline = time.monotonic() + timeout_seconds
        messages: list[Message] = []
        while True:
            self._press_unstopped()
            messages += self._lost
            self._lost = []
            now = time.monotonic()
            wait = 0.0 if messages else min(max(0.0, deadline - now), POLL_INTERVAL_SECONDS)
            try:
                bundle_id, item = self._arrived.get(timeout=wait)
            except queue.Empty:
                if messages or now >= deadline:
                    return messages
                continue
            if isinstance(item, _Ended):
                self._in_slots.discard(bundle_id)
            if bundle_id in self._bundles:
                messages += self._take(bundle_id, item)
            self._start_in_free_slots()
            if time.monotonic() >= deadline + OVERRUN_SECONDS:
                return messages

    def cancel(self, task_id: str, attempt: int) -> None:
        for bundle_id, running in list(self._bundles.items()):
            stop, lost = running.ledger.cancel((task_id, attempt))
            self._lost += lost
            if stop:
                self._stop(bundle_id)

    def close(self) -> None:
        self._closed = True
        for bundle_id in list(self._bundles):
            self._stop(bundle_id)
        arrived: list[Message] = []
        while self._bundles:  # until each has ended, or is given up
            arrived += self.poll(POLL_INTERVAL_SECONDS)
        self._lost += arrived

    def _run(self, bundle: Bundle, begun: threading.Event, stop: threading.Event) -> None:
        """The thread of one bundle. However the bundle ends, `_Ended` with the reason is its last message."""
        why = "the bundle ended without an answer"
        try:
            begun.set()
            for message in self._execute(bundle):
                self._arrived.put((bundle.id, message))
                if stop.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            why = "its bundle was stopped"
        except Exception as error:  # noqa: BLE001 - like a worker that dies: its task is lost, the process lives on
            why = f"{type(error).__name__}: {error}"
        finally:
            self._arrived.put((bundle.id, _Ended(why)))

    def _take(self, bundle_id: str, item: Message | _Ended) -> list[Message]:
        running = self._bundles[bundle_id]
        if isinstance(item, _Ended):
            del self._bundles[bundle_id]
            return [*running.ledger.end("worker_died", item.why)]
        accepted = running.ledger.accept(item)
        if running.ledger.unwanted:
            self._stop(bundle_id)
        return [item] if accepted else []

    def _start_in_free_slots(self) -> None:
        """Start as many threads as there are slots. No thread waits for a slot on a lock: an interrupt there could
        take the lock of another thread with it."""
        for bundle_id, running in self._bundles.items():
            if len(self._in_slots) < self._slots and running.thread.ident is None:
                self._in_slots.add(bundle_id)
                running.thread.start()

    def _stop(self, bundle_id: str) -> None:
        running = self._bundles[bundle_id]
        if running.thread.ident is None:
            running.ledger.stopping = True
            self._lost += self._bundles.pop(bundle_id).ledger.end("given_back", "its bundle was stopped")
        elif not running.ledger.stopping:
            running.ledger.stopping = True
            running.stop.set()
            running.again_at = time.monotonic() + AGAIN_SECONDS
            running.give_up_at = time.monotonic() + self._grace_seconds
            self._press(running)

    def _press_unstopped(self) -> None:
        now = time.monotonic()
        for bundle_id, running in list(self._bundles.items()):
            if now >= running.give_up_at:
                self._lost += self._bundles.pop(bundle_id).ledger.end("given_back", "its bundle did not stop in time")
            elif now >= running.again_at:
                running.again_at = now + AGAIN_SECONDS
                self._press(running)

    def _press(self, running: _Running) -> None:
        if running.begun.is_set():
            interrupt(running.thread)
