"""Who goes next: a pure function, checked on small queues, on any queue, and over many turns of a simulated cluster."""

import json
import zlib
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.scheduling import (
    AGEING_SECONDS,
    MAX_BUNDLE,
    Account,
    Cluster,
    Decision,
    Waiting,
    choose,
    decayed,
    due,
    short_of_mates,
)
from service.queue.decisions import packed, told, unpacked

NOW = 1e9


def waiting(
    name: str, kind: str = "attack", *, on: str = "net", user: str = "ann", priority: int = 0, at: int = 0,
    waited: float = 0.0, needed_by: int = 1, boosted: bool = False,
) -> Waiting:  # fmt: skip
    return Waiting(name, kind, on, user, priority, at, NOW - waited, needed_by, boosted=boosted)


def order(queue: list[Waiting], slots: int, accounts: dict[str, Account] | None = None) -> list[tuple[str, ...]]:
    return [decision.task_ids for decision in choose(queue, accounts or {}, Cluster(slots), NOW)]


def test_nothing_waits_or_nothing_is_free() -> None:
    assert order([], 4) == []
    assert order([waiting("a")], 0) == []
    assert order([waiting("a")], -1) == []


def test_priority_is_among_a_users_own_work() -> None:
    queue = [waiting("low", on="a"), waiting("own", on="c", at=1, priority=1)]
    queue += [waiting("high", on="b", user="bob", priority=100, at=9)]
    assert order(queue, 3, {"bob": Account(device_seconds=1e6)}) == [("own",), ("low",), ("high",)]
    assert order(queue, 3, {"ann": Account(device_seconds=1e6)}) == [("high",), ("own",), ("low",)]


def test_what_is_boosted_goes_before_all_and_in_turn_among_its_like() -> None:
    queue = [waiting("low", on="a", at=1), waiting("high", on="b", priority=100)]
    queue += [waiting(f"bob{i}", on=f"c{i}", user="bob", priority=-5, at=9 + i, boosted=i > 0) for i in (0, 1)]
    queue += [waiting("cyd", on="d", user="cyd", priority=-9, at=20, boosted=True)]
    used = {"bob": Account(device_seconds=1e6, max_gpus=2), "cyd": Account(device_seconds=1e5)}
    assert order(queue, 4, used) == [("cyd",), ("bob1",), ("high",), ("low",)]
    assert order(queue, 4, used | {"bob": Account(max_gpus=0)}) == [("cyd",), ("high",), ("low",)], "a limit is a limit"


def test_who_has_used_least_for_their_weight_goes_first() -> None:
    queue = [waiting("ann", on="a"), waiting("bob", on="b", user="bob", at=9)]
    assert order(queue, 1, {"ann": Account(50.0)}) == [("bob",)]
    assert order(queue, 1, {"ann": Account(50.0), "bob": Account(60.0)}) == [("ann",)]
    assert order(queue, 1, {"ann": Account(50.0), "bob": Account(60.0, weight=2.0)}) == [("bob",)]


def test_what_runs_counts_as_used() -> None:
    queue = [waiting("ann", on="a"), waiting("bob", on="b", user="bob", at=9)]
    assert order(queue, 1, {"ann": Account(devices=1)}) == [("bob",)]
    assert order(queue, 1, {"ann": Account(devices=1), "bob": Account(devices=2)}) == [("ann",)]


def test_users_take_turns_within_one_decision() -> None:
    queue = [waiting(f"ann{i}", "train", on=f"a{i}", at=i) for i in range(3)]
    queue += [waiting(f"bob{i}", "train", on=f"b{i}", user="bob", at=10 + i) for i in range(3)]
    assert order(queue, 4) == [("ann0",), ("bob0",), ("ann1",), ("bob1",)]


def test_then_trainings_and_then_who_came_first() -> None:
    queue = [
        waiting("attack", on="a", at=1),
        waiting("second", "train", on="c", at=3),
        waiting("first", "train", on="b", at=2),
    ]
    assert order(queue, 3) == [("first",), ("second",), ("attack",)]


def test_of_trainings_the_one_that_most_jobs_wait_for() -> None:
    queue = [waiting("one", "train", on="a", at=1), waiting("many", "train", on="b", at=2, needed_by=14)]
    assert order(queue, 1) == [("many",)]


def test_what_shares_a_checkpoint_goes_together() -> None:
    queue = [waiting("a1", on="a", at=1), waiting("b1", on="b", at=2), waiting("a2", on="a", at=3)]
    assert order(queue, 2) == [("a1", "a2"), ("b1",)]


def test_trainings_go_alone() -> None:
    queue = [waiting("train", "train", on="a"), waiting("attack", on="a", at=1)]
    assert order(queue, 1) == [("train",)]


def test_one_checkpoint_is_spread_over_the_free_slots() -> None:
    queue = [waiting(f"t{i}", at=i) for i in range(8)]
    assert order(queue, 4) == [("t0", "t1"), ("t2", "t3"), ("t4", "t5"), ("t6", "t7")]


def test_a_bundle_has_a_limit() -> None:
    assert [len(ids) for ids in order([waiting(f"t{i:03}", at=i) for i in range(100)], 1)] == [MAX_BUNDLE]


def test_the_reason_says_why() -> None:
    [decision] = choose([waiting("a", priority=3)], {"ann": Account(120.4, 2.0, 0.5)}, Cluster(1), NOW)
    used = "ann has used 120 device seconds and has 2 in use at weight 0.5"
    assert decision.reason == f"{used}; priority 3 among their own"
    [aged] = choose([waiting("a", waited=2 * AGEING_SECONDS)], {}, Cluster(1), NOW)
    assert aged.reason.endswith("priority 0 (by waiting: 2) among their own")
    [boosted] = choose([waiting("a", boosted=True)], {}, Cluster(1), NOW)
    assert boosted.reason.startswith("an admin boosted it; ann has used 0")


class TestAgeing:
    def test_a_task_that_waits_passes_its_users_better_ones(self) -> None:
        queue = [waiting("old", on="a", waited=3 * AGEING_SECONDS), waiting("new", on="b", priority=2, at=1)]
        assert order(queue, 1) == [("old",)]
        assert order([replace(queue[0], waiting_since=NOW - 1.9 * AGEING_SECONDS), queue[1]], 1) == [("new",)]

    def test_a_backlog_gives_no_advantage_over_others(self) -> None:
        queue = [waiting(f"ann{i}", on=f"a{i}", at=i, waited=30 * AGEING_SECONDS) for i in range(9)]
        queue += [waiting("bob", on="b", user="bob", at=100)]
        assert order(queue, 1, {"ann": Account(1e5)}) == [("bob",)]

    @given(
        st.lists(st.tuples(st.floats(0, 30 * AGEING_SECONDS), st.integers(-5, 5)), min_size=1, max_size=20),
        st.floats(0, 50 * AGEING_SECONDS),
    )
    def test_due_is_the_order_at_any_time(self, tasks: list[tuple[float, int]], later: float) -> None:
        """The index finds the best of a user's tasks by `due` alone, whatever the time is."""
        queue = [
            Waiting(str(i), "attack", str(i), "ann", priority, i, since) for i, (since, priority) in enumerate(tasks)
        ]
        now = 30 * AGEING_SECONDS + later
        [first] = choose(queue, {}, Cluster(1), now)
        points = {task.task_id: task.priority + int((now - task.waiting_since) // AGEING_SECONDS) for task in queue}
        earliest = min(queue, key=lambda task: due(task.waiting_since, task.priority, task.kind))
        assert points[earliest.task_id] >= points[first.task_ids[0]] - 1e-6


class TestLimits:
    def test_a_user_at_the_limit_is_passed_over(self) -> None:
        queue = [waiting(f"ann{i}", on=f"a{i}", priority=9, at=i) for i in range(9)]
        queue += [waiting(f"bob{i}", on=f"b{i}", user="bob", at=i) for i in range(9)]
        accounts = {"ann": Account(devices=1, max_gpus=3)}
        named = ("bob0", "ann0", "bob1", "ann1", "bob2", "bob3", "bob4")
        assert order(queue, 7, accounts) == [(name,) for name in named]

    def test_shares_of_a_gpu_add_up_to_whole_ones(self) -> None:
        queue = [waiting(f"ann{i}", on=f"a{i}", at=i) for i in range(30)]
        decisions = choose(queue, {"ann": Account(max_gpus=2)}, Cluster(30, {"attack": 0.1}), NOW)
        assert len(decisions) == 20


class TestWholeGpus:
    """A task that ran out of the memory of a GPU that it shared has the next GPU to itself."""

    SHARED = Cluster(4, {"attack": 0.5}, {"CPU": 8.0, "GPU": 2.0}, {"attack": {"CPU": 1.0, "GPU": 0.5}}, lookahead=0)

    def test_it_runs_and_takes_no_slot_in_vain(self) -> None:
        queue = [replace(waiting("large"), whole=True), waiting("small", on="b", at=1)]
        decisions = choose(queue, {}, self.SHARED, NOW)
        assert [(decision.task_ids, decision.share, decision.whole) for decision in decisions] == [
            (("large",), 1.0, True),
            (("small",), 0.5, False),
        ]

    def test_such_tasks_on_one_checkpoint_share_a_bundle_with_each_other_alone(self) -> None:
        queue = [replace(waiting(f"large{i}", at=i), whole=True) for i in range(3)]
        queue += [waiting("small", at=9)]
        sizes = [decision.task_ids for decision in choose(queue, {}, replace(self.SHARED, free_slots=1), NOW)]
        assert sizes == [("large0", "large1", "large2")]


class TestLargeTasks:
    """The executor starts small bundles in the room that a large one waits for, so they do not wait beside it."""

    NEEDS: ClassVar[dict[str, dict[str, float]]] = {"train": {"GPU": 2.0}, "attack": {"GPU": 1.0}}

    def chosen(self, free: float, lookahead: int, waits_for: float | None = None) -> list[tuple[str, ...]]:
        queue = [waiting("large", "train", on="a"), *(waiting(f"small{i}", on=f"b{i}", at=1 + i) for i in range(9))]
        waits = None if waits_for is None else {"GPU": waits_for}
        cluster = Cluster(9, {}, {"GPU": free}, self.NEEDS, lookahead, waits)
        return [decision.task_ids for decision in choose(queue, {}, cluster, NOW)]

    def test_a_large_one_waits_and_small_ones_run_in_what_is_left(self) -> None:
        assert self.chosen(1.0, 2) == [("large",)], "one of its two GPUs is free, and is kept for it"
        assert self.chosen(3.0, 2) == [("large",), ("small0",), ("small1",), ("small2",)], "two small ones wait"
        assert self.chosen(-2.0, 1, waits_for=2.0) == [("large",)]

    def test_behind_small_ones_that_wait_already_its_room_is_kept(self) -> None:
        assert self.chosen(1.0, 1, waits_for=1.0) == []
        assert self.chosen(4.0, 1, waits_for=1.0)[0] == ("large",), "it has room"

    def test_without_lookahead_what_fits_goes_first(self) -> None:
        assert self.chosen(1.0, 0) == [("small0",)]


class TestShortOfMates:
    def test_the_first_checkpoints_of_each_user_that_have_less_than_a_bundle(self) -> None:
        queue = [
            waiting(f"{user}{net}", on=net, user=user, at=i) for i, net in enumerate("abc") for user in ("ann", "bob")
        ]
        queue += [waiting(f"more{i}", on="a", at=10 + i) for i in range(MAX_BUNDLE)]
        queue += [waiting("training", "train", on="d")]
        names = [task.task_id for task in short_of_mates(queue, NOW, 4)]
        assert sorted(names) == ["annb", "boba", "bobb"], "ann has a bundle on a"

    def test_priorities_do_not_mix(self) -> None:
        queue = [waiting("low", at=0), *(waiting(f"high{i}", priority=1, at=1 + i) for i in range(MAX_BUNDLE))]
        assert [task.task_id for task in short_of_mates(queue, NOW, 9)] == ["low"]


tasks = st.builds(
    waiting,
    st.uuids().map(str),
    st.sampled_from(["train", "attack", "measure", "control"]),
    on=st.sampled_from("abc"),
    user=st.sampled_from(["ann", "bob", "cyd"]),
    priority=st.integers(-2, 2),
    at=st.integers(0, 20),
    waited=st.floats(0, 4 * AGEING_SECONDS),
    needed_by=st.integers(1, 3),
    boosted=st.booleans(),
)
queues = st.lists(tasks, max_size=40, unique_by=lambda task: task.task_id)
accounts_of_users = st.dictionaries(
    st.sampled_from(["ann", "bob", "cyd"]),
    st.builds(
        Account,
        st.floats(0, 1e6),
        st.integers(0, 3).map(float),
        st.floats(0.1, 10),
        st.none() | st.integers(1, 6).map(float),
    ),
)
clusters = st.builds(
    Cluster,
    st.integers(0, 10),
    st.dictionaries(st.sampled_from(["train", "attack"]), st.sampled_from([0.1, 0.25, 1.0])),
)


@given(queues, accounts_of_users, clusters, st.randoms())
def test_of_any_queue(queue: list[Waiting], accounts: dict[str, Account], cluster: Cluster, shuffler: Any) -> None:
    decisions = choose(queue, accounts, cluster, NOW)
    shuffled = list(queue)
    shuffler.shuffle(shuffled)
    assert choose(shuffled, accounts, cluster, NOW) == decisions, "it depends on how the queue is written down"
    assert len(decisions) <= cluster.free_slots
    by_id = {task.task_id: task for task in queue}
    chosen = [task_id for decision in decisions for task_id in decision.task_ids]
    assert len(chosen) == len(set(chosen))
    devices = defaultdict(float, {name: account.devices for name, account in accounts.items()})
    for decision in decisions:
        bundle = [by_id[task_id] for task_id in decision.task_ids]
        assert bundle
        assert {(task.train_digest, task.sponsor, task.priority, task.boosted) for task in bundle} == {
            (bundle[0].train_digest, decision.sponsor, bundle[0].priority, bundle[0].boosted)
        }
        assert len(bundle) == 1 or all(task.kind != "train" for task in bundle)
        devices[decision.sponsor] += decision.share
        limit = accounts.get(decision.sponsor, Account()).max_gpus
        assert limit is None or devices[decision.sponsor] <= limit + 1e-6
    if len(decisions) < cluster.free_slots:
        left = {by_id[task_id].sponsor for task_id in by_id.keys() - set(chosen)}
        for sponsor in left:
            limit = accounts[sponsor].max_gpus
            assert limit is not None, "somebody was left without a reason"
            assert devices[sponsor] + 1 > limit


@given(queues, accounts_of_users, clusters)
def test_the_log_replays(queue: list[Waiting], accounts: dict[str, Account], cluster: Cluster) -> None:
    seen = packed(queue, accounts, cluster, NOW)
    again = unpacked(seen)
    assert again == (queue, accounts, cluster, NOW)
    assert told(choose(*again)) == told(choose(queue, accounts, cluster, NOW))


def test_what_another_rule_decided_is_not_decided_again() -> None:
    """The log of an earlier version has no rule in it, and another order of values."""
    seen = [[["a", "attack", "net", "ann", 3, 0, NOW, 1, False]], {"ann": [0.0, 1.0, NOW, 1.0, None]}, [1], NOW]
    assert unpacked(zlib.compress(json.dumps(seen).encode())) is None


class Simulation:
    """A cluster of some devices on which every bundle takes a while; usage as the store keeps it."""

    def __init__(self, devices: int, weights: dict[str, float], half_life: float = 1e9, **limits: float) -> None:
        self.devices, self.half_life, self.now = devices, half_life, NOW
        self.accounts = {name: Account(weight=weight, max_gpus=limits.get(name)) for name, weight in weights.items()}
        self.used: dict[str, float] = defaultdict(float)
        self.queue: list[Waiting] = []
        self.running: list[tuple[float, str]] = []
        self.most: Counter[str] = Counter()
        self.order: list[str] = []
        self.served_at: dict[str, float] = {}
        self.submitted = 0

    def submit(self, user: str, count: int, priority: int = 0, name: str = "") -> None:
        for _ in range(count):
            self.submitted += 1
            ident = name or f"{user}{self.submitted}"
            self.queue.append(Waiting(ident, "train", ident, user, priority, self.submitted, self.now))

    def step(self, seconds: float, lasts: Any) -> None:
        """Some time passes; what has ended is replaced."""
        for name, account in self.accounts.items():
            charged = seconds * account.devices
            self.used[name] += charged
            kept = decayed(account.device_seconds, seconds, self.half_life) + charged
            self.accounts[name] = replace(account, device_seconds=kept)
        self.now += seconds
        for one in [one for one in self.running if one[0] <= self.now]:
            self.running.remove(one)
            self.accounts[one[1]] = replace(self.accounts[one[1]], devices=self.accounts[one[1]].devices - 1)
        free = Cluster(self.devices - len(self.running))
        decisions: list[Decision] = choose(self.queue, self.accounts, free, self.now)
        for decision in decisions:
            account = self.accounts[decision.sponsor]
            self.accounts[decision.sponsor] = replace(account, devices=account.devices + 1)
            self.running.append((self.now + lasts(decision.sponsor), decision.sponsor))
            self.most[decision.sponsor] = max(self.most[decision.sponsor], int(account.devices) + 1)
            self.order += decision.task_ids
            self.served_at[decision.sponsor] = self.now
        gone = {task_id for decision in decisions for task_id in decision.task_ids}
        self.queue = [task for task in self.queue if task.task_id not in gone]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=4),
    st.integers(1, 4),
    st.lists(st.sampled_from([20.0, 50.0, 90.0]), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(-100, 100), min_size=1, max_size=5), min_size=4, max_size=4),
)
def test_shares_converge_to_the_weights(
    weights: list[float], devices: int, lasts: list[float], priorities: list[list[int]]
) -> None:
    """Whatever each user's tasks take and whatever priorities they have: within 6 % of all device seconds after 1,500
    turns; and no user with something queued waits for longer than the others need to use up what they are behind."""
    users = [f"user{i}" for i in range(len(weights))]
    cluster, longest = Simulation(devices, dict(zip(users, weights, strict=True))), 0.0
    for _ in range(1500):
        for user in users:
            waits = sum(task.sponsor == user for task in cluster.queue)
            for _ in range(5 - waits):
                mine = priorities[users.index(user)]
                cluster.submit(user, 1, mine[cluster.submitted % len(mine)])
        before = cluster.served_at.copy()
        cluster.step(10.0, lambda user: lasts[users.index(user)])
        longest = max([longest, *(cluster.served_at[user] - before.get(user, NOW) for user in cluster.served_at)])
    assert longest <= max(lasts) * (sum(weights) / min(weights) + len(users)) + 10.0
    total = sum(cluster.used.values())
    assert total >= 0.95 * 1500 * 10.0 * devices, "devices stood idle"
    for user, weight in zip(users, weights, strict=True):
        assert cluster.used[user] / total == pytest.approx(weight / sum(weights), abs=0.06)


def test_a_newcomer_is_served_before_a_heavy_user_and_not_for_ever() -> None:
    cluster = Simulation(2, {"ann": 1.0, "bob": 1.0}, half_life=3600.0)
    for _ in range(600):
        cluster.submit("ann", 2 - len(cluster.queue))
        cluster.step(30.0, lambda _: 60.0)
    before = cluster.used.copy()
    for _ in range(100):
        for user in ("ann", "bob"):
            cluster.submit(user, 3 - sum(task.sponsor == user for task in cluster.queue))
        cluster.step(30.0, lambda _: 60.0)
    assert cluster.used["bob"] > 2 * (cluster.used["ann"] - before["ann"])
    early = cluster.used.copy()
    for _ in range(1200):
        for user in ("ann", "bob"):
            cluster.submit(user, 3 - sum(task.sponsor == user for task in cluster.queue))
        cluster.step(30.0, lambda _: 60.0)
    late = {user: cluster.used[user] - early[user] for user in ("ann", "bob")}
    assert late["ann"] == pytest.approx(late["bob"], rel=0.1)


@settings(max_examples=10, deadline=None)
@given(st.integers(-100, 100), st.integers(-100, 100), st.floats(0.01, 100.0), st.floats(0.0, 1e6))
def test_a_flood_of_another_user_keeps_nobody_waiting(low: int, high: int, weight: float, used: float) -> None:
    """Whatever its priority, it is served when the other has used as much for their weight."""
    cluster = Simulation(1, {"ann": 1.0, "bob": weight}, half_life=7 * 86_400.0)
    cluster.accounts["ann"] = replace(cluster.accounts["ann"], device_seconds=used)
    cluster.submit("ann", 1, priority=low, name="patient")
    turns = 0
    while "patient" not in cluster.order:
        load = {name: account.device_seconds / account.weight for name, account in cluster.accounts.items()}
        assert load["bob"] <= load["ann"] + 7200.0 / weight, f"it waits on, after {turns} turns"
        cluster.submit("bob", 3 - len(cluster.queue), priority=high)
        cluster.step(3600.0, lambda _: 3600.0)
        turns += 1
    assert turns <= 1 or used > 0


@settings(max_examples=10, deadline=None)
@given(st.integers(-3, 0), st.integers(1, 3), st.sampled_from(["ann", "bob"]), st.floats(0.1, 5.0))
def test_nothing_starves(low: int, high: int, flooder: str, weight: float) -> None:
    """A task of low priority under an endless flood of better ones, of another user's or of its own: it is claimed
    once it has waited for as many points as it lacks, and one turn."""
    cluster = Simulation(1, {"ann": 1.0, "bob": weight})
    cluster.submit(flooder, 3, priority=high)
    cluster.step(1.0, lambda _: 600.0)
    cluster.submit("ann", 1, priority=low, name="patient")
    patience = (high - low + 1) * AGEING_SECONDS + 1200.0
    while cluster.now < NOW + patience and "patient" not in cluster.order:
        cluster.submit(flooder, 3 - len([task for task in cluster.queue if task.priority == high]), priority=high)
        cluster.step(600.0, lambda _: 600.0)
    assert "patient" in cluster.order


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=60, max_size=60))
def test_limits_are_never_exceeded(limit: int, arrivals: list[int]) -> None:
    cluster = Simulation(6, {"ann": 5.0, "bob": 1.0}, ann=limit)
    for count in arrivals:
        cluster.submit("ann", count, priority=3)
        cluster.submit("bob", count // 2)
        cluster.step(7.0, lambda _: 20.0)
    assert cluster.most["ann"] <= limit
