"""The Ray cluster that this process belongs to: connecting to it, and what its nodes are.

Ray reads its environment when it is imported: whoever imports this has set `workers.head.driver_environment` before.
"""

import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state

from service.settings import Settings
from workers.head import WORKER_ENVIRONMENT

log = logging.getLogger("uncanny.pool")

KNOCK_SECONDS = 5.0
PREEMPTED = 3  # NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED


@dataclass(frozen=True)
class Nodes:
    """The nodes of the cluster by their ids: resources of those that take work, which are dead, which are taken away.

    One that is drained takes no work any more; it is dead later, when whoever drains it takes the machine.
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


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    """What a node has, without what Ray counts for its own use."""
    own = ("node:", "object_store_memory")
    return {name: amount for name, amount in resources.items() if not name.startswith(own)}


def connect(settings: Settings) -> None:
    """Make this process a driver of the cluster at RAY_ADDRESS, or of the local head at `settings.ray_port`.

    Raises `ConnectionError` where nothing listens there: Ray would wait for over 100 s, and not say so.
    """
    started = time.monotonic()
    address = settings.ray_address or f"127.0.0.1:{settings.ray_port}"
    knock(address)
    # Elsewhere what workers need is in the runtime environment; a local head has it, and its workers are started ahead.
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
    """Raises `ConnectionError` where the address is one of host and port, and nothing listens there."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address} ({error})") from None
