"""Where tasks may go while something is set aside: one bundle as a trial, the rest to the other nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.model.environment import Environment, avoided, names_of
from service.model.executor import Capacity
from service.model.scheduling import Waiting


@dataclass(frozen=True)
class Way:
    """A part of the queue and the nodes that it may go to; on `trial`, at most one bundle of it, to that one node."""

    queue: Sequence[Waiting]
    nodes: frozenset[str]
    trial: str | None = None


def ways(
    environment: Environment, capacity: Capacity, queue: Sequence[Waiting], datasets: Mapping[str, str]
) -> list[Way]:
    """First trials, one for each node whose trial is due; last the tasks that need none.

    `datasets` are by the digest of the training.
    """
    names = names_of(capacity)
    aside = environment.aside
    if not aside:
        return [Way(queue, frozenset(names))]
    dataset_of = {task.task_id: datasets.get(task.train_digest, "") for task in queue}
    wanted = set(dataset_of.values())
    may_try = {(name, dataset): environment.may_try(name, dataset) for name in names for dataset in wanted}
    trials = [
        Way(able, frozenset({name}), trial=name)
        for name in names
        if (able := [task for task in queue if may_try[name, dataset_of[task.task_id]]])
    ]
    somewhere = {dataset: avoided(aside, names, dataset) != frozenset(names) for dataset in wanted}
    rest = [task for task in queue if somewhere[dataset_of[task.task_id]]]
    return [*trials, Way(rest, frozenset(names) - avoided(aside, names, ""))]
