"""RayExecutor: bundles as Ray tasks, on an existing cluster or on a local head that still comes up."""

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.errors import ArtifactRootUnusable, DatabaseAway
from service.model.executor import Bundle, Capacity, Failed, Fault, Lost, Message, Needs, Reason, Started
from service.model.ledger import Ledger
from service.settings import Settings
from workers.cluster import RETRY_SECONDS, NodeChecks, connect, nodes
from workers.worker import WorkerSettings, end_frozen, run_bundle

log = logging.getLogger("uncanny.pool")

NOT_READY = Capacity(ready=False, cpus=0.0, gpus=0.0)
Body = Callable[[Bundle, WorkerSettings], Iterator[list[Message]]]
POLL_INTERVAL_SECONDS = 0.1  # how often a waiting poll checks for bundles that do not stop
POLL_OVERTIME_SECONDS = 0.2  # how long a poll reads on after its timeout, if bundles never pause
CLUSTER_INTERVAL_SECONDS = 1.0  # between two requests for the size of the cluster
SETTLE_SECONDS = 4.0  # until the cluster knows that a node is gone whose workers have died


@dataclass
class _Running:
    ledger: Ledger
    generator: Any
    act_at: float | None = None  # when a bundle that does not stop is killed, and later given up
    killed: bool = False
    ended: bool = False  # a task on its node was sent to end its process
    node: str = ""  # where it runs, known from its first message on
    pid: int = 0  # of its worker there
    host: str = ""  # of its worker, while that prepares itself; empty once it is ready
    crash: str = ""  # its worker died; at `act_at` it is decided whether its node died too
    needs: Needs = field(default_factory=Needs)
    holds: bool = False  # its grants are answered, and its worker keeps an unfit device busy

    @property
    def waitable(self) -> Any:
        """What `ray.wait` waits for. Ray calls the generator of a cancelled task ready, but reading it blocks."""
        return self.generator.completed() if self.ledger.stopping else self.generator


class RayExecutor:
    """Runs each bundle as one Ray task, whose generator streams its messages. Ray itself never retries.

    A thread connects to Ray; until then `capacity().ready` is false. The methods are for one thread, the dispatcher's.
    `body` runs on the worker. `root_mark` gives the mark by which workers know the artifact root, or raises. With an
    empty mark, workers take any root of that name.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        body: Body = run_bundle,
        grace_seconds: float = 3.0,
        root_mark: Callable[[], str] = lambda: "",
    ) -> None:
        self._settings = settings
        self._root_mark = root_mark
        self._grace_seconds = grace_seconds
        self._worker_settings = WorkerSettings(settings.artifacts, settings.data, settings.epoch_state_seconds)
        self._task = ray.remote(max_calls=0, max_retries=0, num_returns="streaming")(body)
        self._bundles: dict[str, _Running] = {}
        self._lost: list[Message] = []
        self._capacity = NOT_READY
        self._checks = NodeChecks()
        self._dead: set[str] = set()  # nodes
        self._preempted: set[str] = set()
        self._closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._hold_ray, name="ray", daemon=True)
        self._thread.start()

    def capacity(self) -> Capacity:
        """What the cluster has, without the unfit devices that workers keep busy."""
        if self._closed:
            return NOT_READY
        return without(
            self._capacity, [(running.node, running.needs) for running in self._bundles.values() if running.holds]
        )

    def submit(self, bundle: Bundle) -> None:
        ledger = Ledger(bundle)
        if not self.capacity().ready:
            ledger.stopping = True
            self._lost += ledger.end("given_back", "Ray is not up")
            return
        try:
            avoid = bundle.avoid | self._capacity.unfit.keys()
            worker_settings = replace(self._worker_settings, root_mark=self._root_mark())
            task = self._task.options(name=f"bundle {bundle.id}", **_options(bundle.needs, avoid))
            generator = task.remote(bundle, worker_settings)
        except (ValueError, TypeError) as error:  # Ray refuses these needs, and would refuse them again
            why = f"Ray does not take what this asks for (UNCANNY_RESOURCES): {error}"
            self._lost += [Failed(grant.task_id, grant.attempt, "configuration", why) for grant in bundle.grants]
            return
        except ArtifactRootUnusable as error:  # the database knows no root yet, and this one cannot be it
            fault = Fault("artifact_root", self._settings.artifacts, "")
            self._lost += ledger.end("environment", str(error), fault)
            return
        except DatabaseAway as error:
            self._lost += ledger.end("given_back", str(error))
            return
        self._bundles[bundle.id] = _Running(ledger, generator, needs=bundle.needs)

    def poll(self, timeout_seconds: float) -> list[Message]:
        deadline = time.monotonic() + timeout_seconds
        messages: list[Message] = []
        while True:
            self._handle_troubled_bundles()
            messages += self._lost
            self._lost = []
            wait = 0.0 if messages else min(max(0.0, deadline - time.monotonic()), POLL_INTERVAL_SECONDS)
            ready = self._ready(wait)
            for bundle_id in ready:
                over = self._bundles[bundle_id].ledger.stopping  # then its end was waited for
                messages += self._read(bundle_id)
                while over and bundle_id in self._bundles:
                    messages += self._read(bundle_id)
            late = time.monotonic() - deadline
            if late >= POLL_OVERTIME_SECONDS or (not ready and (messages or late >= 0)):
                return messages

    def cancel(self, task_id: str, attempt: int) -> None:
        for bundle_id, running in list(self._bundles.items()):
            if running.ledger.owes((task_id, attempt)):
                self._lost += self._heard(bundle_id)
            stop, lost = running.ledger.cancel((task_id, attempt))
            self._lost += lost
            if stop:
                self._stop(running)

    def close(self) -> None:
        self._closed = True
        for bundle_id, running in list(self._bundles.items()):
            self._lost += self._heard(bundle_id)
            self._stop(running)
        arrived: list[Message] = []
        while self._bundles:  # `poll` gives up on each after two grace periods
            arrived += self.poll(POLL_INTERVAL_SECONDS)
        self._lost += arrived
        self._closing.set()
        self._thread.join(self._grace_seconds + RETRY_SECONDS)

    def _heard(self, bundle_id: str) -> list[Message]:
        """The messages that a bundle has sent: a cancellation would lose those that are not read."""
        messages: list[Message] = []
        deadline = time.monotonic() + POLL_INTERVAL_SECONDS  # for a bundle that sends without a pause
        while (running := self._bundles.get(bundle_id)) and not running.ledger.stopping and not running.crash:
            if time.monotonic() > deadline or not ray.wait([running.generator], timeout=0)[0]:
                break
            messages += self._read(bundle_id)
        return messages

    def _ready(self, timeout_seconds: float) -> list[str]:
        """The bundles that have a message or an end to read. Waits for the first one."""
        waiting = {running.waitable: name for name, running in self._bundles.items() if not running.crash}
        if not waiting:
            time.sleep(timeout_seconds)
            return []
        first, rest = ray.wait(list(waiting), num_returns=1, timeout=timeout_seconds)
        if first and rest:
            first += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [waiting[ready] for ready in first]

    def _read(self, bundle_id: str) -> list[Message]:
        """The next messages of a ready bundle, or its end."""
        running = self._bundles[bundle_id]
        try:
            batch: list[Message] = ray.get(next(running.generator))
        except StopIteration:
            return self._end(bundle_id, "worker_died", "the bundle ended without an answer")
        except TaskCancelledError:
            return self._end(bundle_id, "executor_lost", "its bundle was stopped")
        except RayTaskError as error:  # raised by the body itself, before or between its grants
            why = f"the worker failed: {error.cause}"
            guilty, failed = running.ledger.guilty, []
            if guilty is not None and not running.node:  # it failed before its first message
                self._checks.forget()
                return self._end(bundle_id, "environment", why, Fault("node", "a node of the cluster", ""))
            if guilty is not None:
                failed = [Failed(*guilty, "error", why, re.sub(r"\x1b\[\d+m", "", str(error)))]
                running.ledger.accept(failed[0])
            running.ledger.stopping = True
            return [*failed, *self._end(bundle_id, "given_back", why)]
        except RayError as error:
            reason, why = _reason(error), str(error).partition("\n")[0]
            if reason == "worker_died" and self._settings.ray_address:
                running.crash, running.act_at = why, time.monotonic() + SETTLE_SECONDS
                return []
            if reason == "node_died":
                reason = self._loss_of(running.node)
            return self._end(bundle_id, reason, why)
        accepted = [message for message in batch if running.ledger.accept(message)]
        for message in accepted:
            if isinstance(message, Started):
                running.node, running.pid = message.node, message.pid
                running.host = "" if message.ready else message.worker.split()[0]
            if isinstance(message, Lost) and message.fault is not None and message.fault.owner == "device":
                running.node, running.host, running.holds = message.fault.node, "", True
        if running.ledger.unwanted:
            self._stop(running)
        return accepted

    def _end(self, bundle_id: str, reason: Reason, message: str, fault: Fault | None = None) -> list[Message]:
        running = self._bundles.pop(bundle_id)
        if reason == "worker_died" and running.host:  # no task had begun in it
            reason, fault = "environment", Fault("node", running.host, running.node)
            message = f"a worker died while it prepared itself ({running.host}): {message}"
        return [*running.ledger.end(reason, message, fault)]

    def _stop(self, running: _Running) -> None:
        if not running.ledger.stopping:
            running.ledger.stopping = True
            running.act_at = time.monotonic() + self._grace_seconds
            ray.cancel(running.generator, force=False)

    def _handle_troubled_bundles(self) -> None:
        """Press bundles that do not stop, stop those whose node is dead, and tell crashed workers from dead nodes."""
        now = time.monotonic()
        for bundle_id, running in list(self._bundles.items()):
            if running.node in self._dead and not running.crash:
                self._stop(running)  # the worker may outlive its node
            if running.crash and running.node in self._preempted | self._dead:
                self._lost += self._end(bundle_id, self._loss_of(running.node), running.crash)
                continue
            if running.act_at is None or now < running.act_at:
                continue
            if running.crash:
                gone = running.node in nodes().dead
                self._lost += self._end(
                    bundle_id, self._loss_of(running.node) if gone else "worker_died", running.crash
                )
            elif running.ended or (running.killed and not running.pid):
                self._lost += self._end(bundle_id, "given_back", "its worker could not be stopped in time")
            elif running.killed:
                _end_on_its_node(running.node, running.pid)
                running.ended, running.act_at = True, now + self._grace_seconds / 2
            else:
                log.warning("bundle %s does not stop: killing its worker", bundle_id)
                ray.cancel(running.generator, force=True)
                running.killed = True
                running.act_at = now + self._grace_seconds / (2 if running.pid else 1)

    def _loss_of(self, node: str) -> Reason:
        return "preempted" if node in self._preempted else "node_died"

    def _hold_ray(self) -> None:
        """The thread that owns Ray."""
        # A local Ray head may be starting, so the next attempt comes sooner.
        pause_seconds = RETRY_SECONDS if self._settings.ray_address else POLL_INTERVAL_SECONDS
        logged = ""
        while not self._closing.is_set():
            try:
                connect(self._settings)
                break
            except Exception as error:  # noqa: BLE001 - Ray may come back, whatever the error; it is logged once
                if logged != (logged := f"Ray is not up yet: {type(error).__name__}: {error}"):
                    log.warning("%s", logged)
                ray.shutdown()
                self._closing.wait(pause_seconds)
        trouble = ""
        while not self._closing.is_set():
            try:
                self._capacity, now = self._look(), ""
            except Exception as error:  # noqa: BLE001 - the error may pass, whatever it is; it is logged once
                self._capacity, now = NOT_READY, f"{type(error).__name__}: {error}"
            if now != trouble:
                log.log(logging.ERROR if now else logging.INFO, "%s", now or "the cluster is usable again")
                trouble = now
            self._closing.wait(CLUSTER_INTERVAL_SECONDS)
        ray.shutdown()

    def _look(self) -> Capacity:
        """The size of the cluster: of its fit nodes, which have the dispatcher's code.

        If no node is fit, raises what is wrong with one of them.
        """
        cluster = nodes()
        self._preempted |= cluster.preempted
        self._dead = cluster.dead
        unfit = self._checks.unfit(cluster.resources) if self._settings.ray_address else {}
        if unfit and len(unfit) == len(cluster.resources):
            raise next(iter(unfit.values()))
        fit = {name: of for name, of in cluster.resources.items() if name not in unfit}
        cpus, gpus = (sum(node.get(kind, 0.0) for node in fit.values()) for kind in ("CPU", "GPU"))
        reasons = {name: str(why) for name, why in unfit.items()}
        return Capacity(True, cpus, gpus, nodes=tuple(fit.values()), names=tuple(fit), unfit=reasons)


def without(capacity: Capacity, held: Collection[tuple[str, Needs]]) -> Capacity:
    """The capacity that is left when bundles with these needs hold devices of these nodes."""
    if not held:
        return capacity
    nodes = dict(zip(capacity.names, map(dict, capacity.nodes), strict=True))
    cpus, gpus = capacity.cpus, capacity.gpus
    for name, needs in held:
        if node := nodes.get(name):
            cpus, gpus = cpus - needs.cpus, gpus - needs.gpus
            node["CPU"], node["GPU"] = node.get("CPU", 0.0) - needs.cpus, node.get("GPU", 0.0) - needs.gpus
    return replace(capacity, cpus=cpus, gpus=gpus, nodes=tuple(nodes.values()))


def _end_on_its_node(node: str, pid: int) -> None:
    """End a worker that does not end itself: Ray asks the process to, and a frozen process does not.

    It would keep its CPUs forever. A task on its node ends it, and nothing waits for that task.
    """
    log.warning("worker process %d does not end itself: it is ended if it is frozen", pid)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(end_frozen).options(scheduling_strategy=there).remote(pid)


def _options(needs: Needs, avoid: Collection[str] = ()) -> dict[str, Any]:
    """The needs of a bundle, as Ray's options. An autoscaler sees tasks that do not fit yet as demand."""
    options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "resources": dict(needs.custom)}
    if needs.memory_bytes:
        options["memory"] = needs.memory_bytes
    if needs.accelerator:
        options["accelerator_type"] = needs.accelerator
    if avoid:
        options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
    return options


def _reason(error: RayError) -> Reason:
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(error, WorkerCrashedError):
        return "worker_died"
    if isinstance(error, (NodeDiedError, LocalRayletDiedError, ObjectLostError)):
        return "node_died"
    return "executor_lost"


__all__ = ["RayExecutor", "connect"]
