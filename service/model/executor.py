"""The seam between the queue and the executor that runs tasks: bundles go in, messages come out.

All of these are plain frozen values that pickle, so they travel to a Ray worker and back as they are.
Every message names the task and the attempt it speaks for; the store drops those of a superseded attempt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from service.model.json import JsonObject

Numbers = dict[str, float | int | None]
Reason = Literal[
    "worker_died",
    "out_of_memory",
    "out_of_shared_memory",
    "stalled",
    "node_died",
    "preempted",
    "executor_lost",
    "disk_full",
    "environment",
    "cancelled",
    "given_back",
]
"""Why an attempt was lost. Only `worker_died`, `out_of_memory` and `stalled` count against the task.

`disk_full` and `environment` come with a `Fault`, whose owner is set aside.
"""
Owner = Literal["node", "device", "data_folder", "artifact_root"]


@dataclass(frozen=True)
class ArtifactRef:
    """Bytes under the artifact root, by SHA-256. `kind` is what they are: `checkpoint`, `epoch_state`, `arrays`."""

    digest: str
    size_bytes: int
    kind: str


@dataclass(frozen=True)
class Fault:
    """A part of the environment that failed: `name` is its host, device or path, `node` the executor's name of the node
    where it failed (empty if unknown).

    With a `dataset`, only tasks on that data set are affected; with `writing`, reading may still work.
    """

    owner: Owner
    name: str
    node: str
    dataset: str = ""
    writing: bool = False


@dataclass(frozen=True)
class Bits:
    """One outcome bit per example, in sample order: `n` of them, packed eight to a byte, most significant first."""

    n: int
    packed: bytes


@dataclass(frozen=True)
class Grant:
    """The right to run one task once. `attempt` is the fencing token.

    `spec` is the task's whole spec as plain JSON; `resume` an epoch state of an earlier attempt of a training.
    """

    task_id: str
    attempt: int
    digest: str
    spec: JsonObject
    resume: ArtifactRef | None = None

    def __str__(self) -> str:
        return f"{self.spec['kind']} {self.digest[:10]} (attempt {self.attempt})"


@dataclass(frozen=True)
class Needs:
    """The resources of a bundle: CPUs, GPUs (a share of one, or whole ones), memory, and further ones of its node.

    `accelerator` is a type of GPU and `custom` are resources, both as Ray names them.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    accelerator: str = ""
    custom: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """Grants that share a checkpoint, run one after the other on one worker.

    `train_spec` and `checkpoint` belong to the network that they measure or attack (a training has no checkpoint yet).
    `sources` has both for each other network that a transfer's examples are made on, by the training's digest. The
    bundle must not run on the nodes of `avoid`.
    """

    id: str
    grants: tuple[Grant, ...]
    train_spec: JsonObject
    checkpoint: ArtifactRef | None = None
    sources: dict[str, tuple[JsonObject, ArtifactRef | None]] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    avoid: frozenset[str] = frozenset()

    @property
    def dataset(self) -> str:
        """The name of the data set that its network is trained on."""
        return str(self.train_spec.get("dataset", {}).get("name", ""))


@dataclass(frozen=True)
class Outcome:
    """The stored outcome of a finished task: numbers, curves, bits, artifacts, and how they were made."""

    numbers: Numbers = field(default_factory=dict)
    curves: JsonObject = field(default_factory=dict)
    bits: dict[str, Bits] = field(default_factory=dict)
    artifacts: tuple[ArtifactRef, ...] = ()
    provenance: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The worker took the task up. `worker` names it: host, pid, device; `node` is the executor's name of its node.

    A worker that is not `ready` still prepares itself, and has not begun with the task. `pid` is its process id, 0 if
    it has no process of its own.
    """

    task_id: str
    attempt: int
    worker: str
    node: str = ""
    ready: bool = True
    pid: int = 0


@dataclass(frozen=True)
class Progress:
    """How far the task is: `fraction` of 1, with `detail` (epoch, step, loss, images_per_second).

    `resume` is a new epoch state from which a later attempt of this training can continue.
    """

    task_id: str
    attempt: int
    fraction: float
    detail: JsonObject
    resume: ArtifactRef | None = None


@dataclass(frozen=True)
class Succeeded:
    task_id: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True)
class Failed:
    """The task's own code failed. A `configuration` error would happen again, an `error` may not.

    `missing_checkpoint` happens again until the training that made the weights `missing` (a digest) has run again.
    """

    task_id: str
    attempt: int
    kind: Literal["configuration", "missing_checkpoint", "error"]
    message: str
    traceback: str = ""
    missing: str | None = None


@dataclass(frozen=True)
class Lost:
    """The attempt ended without an answer."""

    task_id: str
    attempt: int
    reason: Reason
    message: str
    fault: Fault | None = None


Message = Started | Progress | Succeeded | Failed | Lost


@dataclass(frozen=True)
class Capacity:
    """All CPUs and GPUs of the cluster, and whether it is up.

    `nodes` has the resources of each node, as Ray names them (`CPU`, `GPU`, `memory` in bytes, `accelerator_type:...`),
    and `names` the executor's names of the nodes, in the same order. Without `nodes`, the cluster is one node with an
    empty name and unlimited memory. `unfit` nodes are not among them: it says by name why no bundle goes there.
    `had_gpus`: the cluster has GPUs, or had some before, so a task that takes one waits until they are back.
    """

    ready: bool
    cpus: float
    gpus: float
    nodes: tuple[Mapping[str, float], ...] = ()
    names: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    had_gpus: bool = False


class Executor(Protocol):
    """Runs bundles. No call blocks for longer than it says, and none raises because of what a bundle does.

    For each grant submitted, exactly one of `Succeeded`, `Failed`, `Lost` comes back, sooner or later.
    """

    def capacity(self) -> Capacity:
        """The resources to run on; `ready` is false while the cluster comes up."""
        ...

    def submit(self, bundle: Bundle) -> None:
        """Hand a bundle over; returns at once."""
        ...

    def poll(self, timeout_seconds: float) -> list[Message]:
        """All messages that have arrived. Waits up to the timeout for the first one, and never much longer, however
        many messages the bundles send.
        """
        ...

    def cancel(self, task_id: str, attempt: int) -> None:
        """Stop one attempt: softly first, by force after a grace period. The rest of its bundle is given back."""
        ...

    def close(self) -> None:
        """Stop everything that runs and leave the cluster."""
        ...
