"""Claims: the leading dispatcher chooses tasks, has them granted, and makes them into bundles for the executor."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from service.model import environment, placing, resources, scheduling
from service.model.environment import Environment
from service.model.executor import Bundle, Capacity, Executor, Grant, Needs
from service.model.json import JsonObject
from service.model.scheduling import Account, Cluster, Decision, Waiting
from service.queue import decisions, replanning, sponsoring
from service.settings import KINDS, Settings
from service.store import Connection, Database, claiming, deciding, quotas

SPONSOR_CHECK_SECONDS = 5.0  # between two searches for shared tasks whose sponsor is not the user whose turn is first
QUEUE_WINDOW = 1024  # how far down the ranked queue one decision looks
MAX_FILLED = 64  # bundles that one decision fills from further down the queue

Key = tuple[str, int]
"""`(task id, attempt)`"""
Running = Mapping[Key, Bundle]


@dataclass(frozen=True)
class Choice:
    """What the scheduler saw of the queue and the cluster, and what it chose."""

    way: placing.Way
    accounts: dict[str, Account]
    cluster: Cluster
    now: float
    chosen: list[Decision]


@dataclass
class Claims:
    """Claims of the dispatcher `name`, for nodes that `environment` allows."""

    database: Database
    executor: Executor
    settings: Settings
    name: str
    environment: Environment
    clock: Callable[[], float]
    _handed_over: set[str] = field(default_factory=set)  # ids of the bundles that ran after the last claim
    _passed_on_at: float = -math.inf
    _had_gpus: bool = False

    def capacity(self) -> Capacity:
        """The executor's capacity, with `had_gpus`, which the executor does not remember."""
        current = self.executor.capacity()
        self._had_gpus |= current.gpus > 0
        return replace(current, had_gpus=self._had_gpus)

    def take_over(self, status: JsonObject) -> None:
        """Take `had_gpus` from the status of an earlier dispatcher. The GPUs of a local Ray never change."""
        self._had_gpus |= bool(self.settings.ray_address and status.get("capacity", {}).get("had_gpus"))

    def claim(self, epoch: int | None, running: Running) -> list[Bundle] | None:
        """The bundles to hand over, in addition to the `running` ones; None if the leadership of `epoch` is over."""
        capacity = self.capacity()
        ids = {bundle.id for bundle in running.values()}
        ended, self._handed_over = len(self._handed_over - ids), ids
        cluster = resources.cluster(self.settings, capacity, self._needs(running), ended)
        if cluster.free_slots <= 0:
            return []
        if self.clock() - self._passed_on_at >= SPONSOR_CHECK_SECONDS:
            self._passed_on_at = self.clock()
            sponsoring.pass_on(self.database, self.settings, cluster, lambda to: self._leads(to, epoch))
        half_life, limits = self.settings.usage_half_life_seconds, self.settings.limits
        with self.database.read() as connection:
            now = self.database.now(connection)
            queue = [] if claiming.is_paused(connection) else _queue(connection, now, cluster.free_slots)
            sponsors = {task.sponsor for task in queue}
            accounts = quotas.accounts(connection, now, sponsors, half_life, limits) if queue else {}
            trainings = {task.train_digest for task in queue} if self.environment.aside else set()
            datasets = claiming.datasets_of(connection, trainings) if trainings else {}
        for way in placing.ways(self.environment, capacity, queue, datasets):
            cluster = self._cluster(capacity, way, running, ended)
            chosen = scheduling.choose(way.queue, accounts, cluster, now) if way.queue else []
            if chosen and way.trial is not None:  # a trial takes the next task alone, without others in its bundle
                way = replace(way, queue=[task for task in way.queue if task.task_id == chosen[0].task_ids[0]])
                chosen = scheduling.choose(way.queue, accounts, cluster, now)
            if chosen:
                bundles = self._grant(Choice(way, accounts, cluster, now, chosen), capacity, epoch)
                self._handed_over |= {bundle.id for bundle in bundles or ()}
                return bundles  # the next claim sees the queue without these tasks, and tries the other ways
        return []

    def misplaced(self, running: Running) -> list[Key]:
        """The attempts to give back: their bundles wait in the executor and avoid other nodes than those set aside now.

        Such a bundle would go to a node that was set aside since, or never to one that has returned.
        """
        capacity = self.capacity()
        self.environment.heed(capacity)
        if not capacity.ready:
            return []
        nodes, aside, node_of = environment.names_of(capacity), self.environment.aside, self._nodes(running)
        return [
            key
            for key, bundle in running.items()
            if bundle.id not in node_of
            and not self.environment.is_tried(bundle.id)
            and bundle.avoid & {*nodes} != environment.avoided(aside, nodes, bundle.dataset)
        ]

    def _leads(self, connection: Connection, epoch: int | None) -> bool:
        return claiming.still_leads(connection, self.name, epoch)

    def _nodes(self, running: Running) -> dict[str, str]:
        """The node of each bundle that a worker has taken up, by the bundle's id."""
        nodes = ((bundle.id, self.environment.node_of(key)) for key, bundle in running.items())
        return {bundle_id: node for bundle_id, node in nodes if node is not None}

    def _needs(self, running: Running) -> Iterable[Needs]:
        return {bundle.id: bundle.needs for bundle in running.values()}.values()

    def _cluster(self, capacity: Capacity, way: placing.Way, running: Running, ended: int) -> Cluster:
        """The cluster of that way's nodes only. Bundles that no worker has taken up count as if they went there."""
        node_of = self._nodes(running)
        there = {
            key: bundle
            for key, bundle in running.items()
            if bundle.id not in node_of or node_of[bundle.id] in way.nodes
        }
        cluster = resources.cluster(self.settings, capacity, self._needs(there), ended, way.nodes)
        if way.trial is None:
            return cluster
        return replace(cluster, free_slots=min(1, cluster.free_slots), lookahead=0)

    def _grant(self, choice: Choice, capacity: Capacity, epoch: int | None) -> list[Bundle] | None:
        chosen = choice.chosen
        names = [f"{self.name}-{epoch}-{next(_numbers)}" for _ in chosen]  # unique for ever
        placements = {
            task_id: claiming.Placement(decision.sponsor, name, decision.share)
            for decision, name in zip(chosen, names, strict=True)
            for task_id in decision.task_ids
        }
        bundles: list[Bundle] = []
        with self.database.write() as connection:
            if not self._leads(connection, epoch):
                return None
            if claiming.is_paused(connection):
                return []
            granted = self._granted(connection, choice, placements)
            train_digest = {task.task_id: task.train_digest for task in choice.way.queue}
            sources = {grant.spec["source"] for grant in granted.values() if grant.spec.get("source")}
            checkpoints = claiming.checkpoints_of(connection, {train_digest[task_id] for task_id in granted} | sources)
            for name, decision in zip(names, chosen, strict=True):
                grants = tuple(granted[task_id] for task_id in decision.task_ids if task_id in granted)
                if grants:
                    checkpoint = checkpoints[train_digest[grants[0].task_id]]
                    of_sources = {grant.spec["source"] for grant in grants if grant.spec.get("source")}
                    needs = resources.of_bundle(self.settings, grants, capacity, decision.whole)
                    other = {source: checkpoints[source] for source in of_sources}
                    bundles.append(Bundle(name, grants, *checkpoint, other, needs))
        return [self._placed(bundle, choice.way, capacity) for bundle in bundles]

    def _granted(
        self, connection: Connection, choice: Choice, placements: Mapping[str, claiming.Placement]
    ) -> dict[str, Grant]:
        now, lease = self.database.now(connection), self.settings.lease_seconds
        granted = claiming.grant(connection, now, self.name, lease, list(placements), placements)
        if old := replanning.outdated(granted.values()):
            claiming.take_back(connection, now, self.name, old)
            replanning.replan(connection, now, self.name, old)
            granted = {task_id: grant for task_id, grant in granted.items() if task_id not in old}
        quotas.fold(connection, now, self.settings.usage_half_life_seconds)
        seen = decisions.packed(choice.way.queue, choice.accounts, choice.cluster, choice.now)
        deciding.keep(connection, now, self.name, seen, decisions.told(choice.chosen), self.settings.decision_log)
        return granted

    def _placed(self, bundle: Bundle, way: placing.Way, capacity: Capacity) -> Bundle:
        """The bundle with the nodes that it is to avoid: those set aside, or all but one if it tries that one."""
        nodes = environment.names_of(capacity)
        if way.trial is None:
            return replace(bundle, avoid=environment.avoided(self.environment.aside, nodes, bundle.dataset))
        self.environment.tries(bundle.id, way.trial, bundle.dataset)
        return replace(bundle, avoid=frozenset(nodes) - {way.trial})


def _queue(connection: Connection, now: float, bundles: int) -> list[Waiting]:
    """The first tasks of each user's queue, and for the first `bundles` of them others that fill these bundles.

    A sweep over seeds has the tasks on one checkpoint far apart in the queue. Together in a bundle, they load it once.
    """
    queue = claiming.waiting(connection, now, QUEUE_WINDOW)
    if len(queue) < QUEUE_WINDOW // len(KINDS):
        return queue  # a short queue, of which little or nothing is hidden
    by_id = {task.task_id: task for task in queue}
    for task in scheduling.short_of_mates(queue, now, min(bundles, MAX_FILLED)):
        by_id |= {mate.task_id: mate for mate in claiming.mates_of(connection, now, task)}
    return list(by_id.values())


_numbers = count(1)
