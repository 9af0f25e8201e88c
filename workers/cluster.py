"""The Ray cluster that this process belongs to: connecting to it, and what its nodes are.

Importing this module imports Ray, which reads its environment then: call `workers.head.use_driver_environment` before.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.model.environment import LONGEST_WAIT_SECONDS
from service.settings import Settings
from workers.head import WORKER_ENVIRONMENT
from workers.revision import identity

log = logging.getLogger("uncanny.pool")

KNOCK_SECONDS = 5.0
RETRY_SECONDS = 5.0  # until an absent cluster or an unfit node is tried again
PROBE_SECONDS = 60.0
PREEMPTED = 3  # NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED


class OtherCode(RuntimeError):
    """A node has other sources than the dispatcher, so it could compute other numbers."""


class NoWorker(RuntimeError):
    """A node is alive and starts no worker."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of the cluster by their ids: the resources of those that take work, and which are dead or preempted.

    A drained node takes no work any more, and counts as preempted. It is dead when its machine is taken away.
    """

    resources: dict[str, dict[str, float]]
    dead: set[str]
    preempted: set[str]


def nodes() -> Nodes:
    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    draining = set(state.get_draining_nodes())
    dead = {node["NodeID"]: node["DeathReason"] for node in listed if not node["Alive"]}
    usable = [node for node in listed if node["Alive"] and node["Resources"].get("CPU")]
    resources = {node["NodeID"]: _amounts(node["Resources"]) for node in usable if node["NodeID"] not in draining}
    return Nodes(resources, set(dead), draining | {name for name, reason in dead.items() if reason == PREEMPTED})


class NodeChecks:
    """Which nodes are fit for work. A node is asked once for its code; an unfit node is asked again after a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fit: set[str] = set()
        self._unfit: dict[str, tuple[Exception, int, float]] = {}  # reason, failures in a row, when to ask again

    def forget(self) -> None:
        """Ask all nodes again: one of them has failed though its first answer was right."""
        self._fit = set()

    def unfit(self, names: Iterable[str]) -> dict[str, Exception]:
        """Those of the nodes that get no work, each with the reason."""
        for name in names:
            _, times, again_at = self._unfit.get(name, (None, 0, 0.0))
            if name in self._fit or self._clock() < again_at:
                continue
            if error := _check(name):
                wait_seconds = min(RETRY_SECONDS * 2.0**times, LONGEST_WAIT_SECONDS)
                self._unfit[name] = error, times + 1, self._clock() + wait_seconds
                log.error("no work for a node: %s", error)
            else:
                self._unfit.pop(name, None)
                self._fit.add(name)
        return {name: self._unfit[name][0] for name in names if name in self._unfit}


def _check(name: str) -> Exception | None:
    """Why the node cannot compute what this dispatcher would compute; None if it can."""
    there = NodeAffinitySchedulingStrategy(name, soft=False)
    probe = ray.remote(num_cpus=0, max_retries=0)(identity).options(scheduling_strategy=there).remote()
    try:
        remote = ray.get(probe, timeout=PROBE_SECONDS)
    except GetTimeoutError:
        ray.cancel(probe, force=True)
        advice = "mend it, or take it out of the cluster"
        return NoWorker(f"node {name} starts no worker within {PROBE_SECONDS:g} s: {advice}")
    except RayError as error:
        return NoWorker(f"node {name} cannot say what code it has ({str(error).strip().splitlines()[-1]}): mend it")
    local = identity()
    if remote["code"] != local["code"]:
        return OtherCode(f"node {name} has other code than this dispatcher: install one version on both")
    if other := [library for library in local if remote[library] != local[library]]:
        has, expected = (", ".join(f"{library} {of[library]}" for library in other) for of in (remote, local))
        log.warning("numbers of node %s may differ in their last digits: it has %s, not %s", name, has, expected)
    return None


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    """The resources of a node, without those that Ray counts for its own use."""
    own = ("node:", "object_store_memory")
    return {name: amount for name, amount in resources.items() if not name.startswith(own)}


def connect(settings: Settings) -> None:
    """Make this process a driver of the cluster at RAY_ADDRESS, or of the local head at `settings.ray_port`.

    Raises `ConnectionError` if nothing listens there. Ray would wait for over 100 s without a message.
    """
    started = time.monotonic()
    address = settings.ray_address or f"127.0.0.1:{settings.ray_port}"
    knock(address)
    # A local head has these variables, so it can start workers before the first task. Other clusters get them here.
    environment = {"env_vars": WORKER_ENVIRONMENT} if settings.ray_address else None
    ray.init(
        address=address,
        runtime_env=environment,
        log_to_driver=False,
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    log.info("Ray is up after %.1f seconds", time.monotonic() - started)


def knock(address: str) -> None:
    """Raises `ConnectionError` if the address is a host and a port, and nothing listens there."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address} ({error})") from None
