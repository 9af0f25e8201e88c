"""The Ray cluster that this process belongs to: connecting to it, or starting a local one, and what its nodes are.

`workers.pool` prepares the environment before Ray is imported, so this module is imported through it.
"""

import hashlib
import logging
import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from service.settings import Settings

log = logging.getLogger("uncanny.pool")

SOCKET_ROOM_BYTES = 40  # of the 107 of a unix socket's path, what Ray leaves for the folder that it is given
OBJECT_STORE_BYTES = 256 << 20  # outcomes are small; weights travel as artifacts
PREEMPTED = 3  # NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
# Warm processes are reused for other GPUs, so the variable must not change under a live CUDA context.
WORKER_ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


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


def connect(settings: Settings, cpus: int | None = None) -> None:
    """Make this process a driver of the cluster at RAY_ADDRESS, or start a local Ray (with so many CPUs; all if None).

    What Ray starts dies with the thread that called this.
    """
    started = time.monotonic()
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if settings.ray_address:
        environment = {"env_vars": WORKER_ENVIRONMENT}
        ray.init(address=settings.ray_address, runtime_env=environment, **common)
    else:
        os.environ.update(WORKER_ENVIRONMENT)
        _use_token(_token(settings.home))
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False,
            _temp_dir=str(_session_root(settings.home)), object_store_memory=OBJECT_STORE_BYTES, **common,
        )  # fmt: skip
    log.info("Ray is up after %.1f seconds", time.monotonic() - started)


def _use_token(path: Path) -> None:
    """Authentication by this token, here and in the processes that are started. Ray remembers what it read before."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _token(home: Path) -> Path:
    """The file with the token of local clusters, which only its owner can read; made where it is not there."""
    path = home / "ray_token"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return path


def _session_root(home: Path) -> Path:
    """Where Ray keeps sockets and logs: under home, or in a short folder of our own where its path is too long."""
    path = home / "ray"
    if len(os.fsencode(path)) > SOCKET_ROOM_BYTES:
        name = f"uncanny-ray-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
        path = Path(tempfile.gettempdir()) / name
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user: set UNCANNY_HOME to a shorter path")
    return path
