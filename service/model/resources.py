"""The resources of bundles and of the cluster, and how many more bundles fit."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from service.model.executor import Capacity, Grant, Needs
from service.model.scheduling import NOWHERE, Cluster, has_room
from service.settings import KINDS, Kind, Settings

ENDLESS = 1e18
AHEAD_PER_SLOT = 8  # bundles at the most, of tasks so short that more than one ends between two claims
Amounts = dict[str, float]
"""By the name of the resource. `GPU accelerator_type:X` are the GPUs of that type, which count as `GPU` too."""


def needs_of(settings: Settings, kind: Kind, capacity: Capacity) -> Needs:
    """The needs of a bundle of this kind.

    GPUs that the settings name for the kind are requested even if the cluster has none yet, so that an autoscaler sees
    the request. `gpus_per_task` counts only if the cluster has GPUs or had some: a node that restarts is waited for. If
    the cluster has fewer CPUs than a task asks for, the task takes all of them.
    """
    own = settings.resources.get(kind)
    cpus = min(settings.cpus_per_task, capacity.cpus) if capacity.cpus else settings.cpus_per_task
    needs = Needs(cpus, settings.gpus_per_task if capacity.gpus or capacity.had_gpus else 0.0)
    if own is None:
        return needs
    needs = replace(needs, memory_bytes=own.memory_bytes, accelerator=own.accelerator, custom=own.custom)
    overrides = {name: getattr(own, name) for name in ("cpus", "gpus") if getattr(own, name) is not None}
    return replace(needs, **overrides)


def of_bundle(settings: Settings, grants: Iterable[Grant], capacity: Capacity, whole: bool) -> Needs:
    """The needs of a bundle of these grants: enough for each of them. `whole`: it shares none of its GPUs."""
    every = [needs_of(settings, kind, capacity) for kind in {grant.spec["kind"] for grant in grants}]
    gpus = max(needs.gpus for needs in every)
    return Needs(
        max(needs.cpus for needs in every),
        max(1.0, gpus) if whole and gpus else gpus,
        max(needs.memory_bytes for needs in every),
        next((needs.accelerator for needs in every if needs.accelerator), ""),
        {name: amount for needs in every for name, amount in needs.custom.items()},
    )


def cluster(
    settings: Settings, capacity: Capacity, handed_over: Iterable[Needs], ended: int = 0, only: Collection[str] = ()
) -> Cluster:
    """The free resources, without those of the bundles that were `handed_over`, in order; bundles that do not fit wait.

    If the settings let any bundle wait, as many may wait as `ended` since the last claim: about as many end before the
    next claim, and would leave their slots empty. With `only`, these are the free resources of these nodes.
    """
    needs = {kind: needs_of(settings, kind, capacity) for kind in KINDS}
    nowhere = too_large(settings, capacity)
    capacity = _part(capacity, only) if only else capacity
    room, nodes = _totals(capacity), nodes_of(capacity)
    waiting, waits_for = 0, None
    for taken in map(amounts, handed_over):
        somewhere = any(has_room(node, taken) for node in nodes)
        if not (somewhere and has_room(room, taken)):
            waiting += 1
            waits_for = waits_for or (taken if somewhere else None)
        if somewhere:  # a bundle that fits no node takes nothing
            room |= {name: room.get(name, 0.0) - amount for name, amount in taken.items()}
    slots = int(max(capacity.cpus / settings.cpus_per_task, capacity.gpus))
    ahead = max(settings.lookahead, min(ended, AHEAD_PER_SLOT * slots)) if settings.lookahead else 0
    lookahead = max(0, ahead - waiting)
    nobody_has = {NOWHERE: 1.0}  # so a kind that fits nowhere reserves nothing
    by_kind: dict[str, Mapping[str, float]] = {
        kind: nobody_has if kind in nowhere else amounts(of_kind) for kind, of_kind in needs.items()
    }
    free = max(_fitting(room, of_kind) for of_kind in by_kind.values())
    shared = any(of_kind.gpus for of_kind in needs.values())
    shares: dict[str, float] = {kind: of_kind.gpus for kind, of_kind in needs.items()} if shared else {}
    return Cluster(free + lookahead if capacity.ready else 0, shares, room, by_kind, lookahead, waits_for)


def too_large(settings: Settings, capacity: Capacity) -> dict[str, str]:
    """The kinds of task that no node of the cluster is large enough for, with what one of them takes, in words."""
    taken = {kind: amounts(needs_of(settings, kind, capacity)) for kind in KINDS}
    nodes = nodes_of(capacity)
    return {
        kind: _in_words(of_kind)
        for kind, of_kind in taken.items()
        if not any(has_room(node, of_kind) for node in nodes)
    }


def amounts(needs: Needs) -> Amounts:
    by_name: Amounts = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": float(needs.memory_bytes), **needs.custom}
    if needs.accelerator:
        by_name[_of_type(needs.accelerator)] = needs.gpus
    return {name: amount for name, amount in by_name.items() if amount}


def nodes_of(capacity: Capacity) -> list[Amounts]:
    """The resources of each node, under the names that `amounts` uses."""
    nodes = capacity.nodes or ({"CPU": capacity.cpus, "GPU": capacity.gpus, "memory": ENDLESS},)
    return [
        {**node, **{f"GPU {name}": node.get("GPU", 0.0) for name in node if name.startswith("accelerator_type:")}}
        for node in nodes
    ]


def _part(capacity: Capacity, names: Collection[str]) -> Capacity:
    """The capacity of these nodes only."""
    if not capacity.names:
        return capacity
    nodes = tuple(node for name, node in zip(capacity.names, capacity.nodes, strict=True) if name in names)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return replace(capacity, cpus=cpus, gpus=gpus, nodes=nodes)


def _totals(capacity: Capacity) -> Amounts:
    totals: Amounts = {}
    for node in nodes_of(capacity):
        for name, amount in node.items():
            totals[name] = totals.get(name, 0.0) + amount
    return totals


def _in_words(taken: Amounts) -> str:
    in_units = {**taken, "GiB of memory": taken.get("memory", 0.0) / (1 << 30)}
    words = [f"{amount:g} {name}" for name, amount in in_units.items() if amount and name != "memory"]
    return ", ".join(words)


def _of_type(accelerator: str) -> str:
    return f"GPU accelerator_type:{accelerator}"


def _fitting(free: Amounts, needs: Mapping[str, float]) -> int:
    """How many bundles with these needs fit into the free resources."""
    return max(0, min(int(free.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items())) if needs else 0
