"""What is set aside, for whom and for how long, under a clock that the tests move."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from service.model import placing
from service.model.environment import (
    DEVICE_WAIT_SECONDS,
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    QUICK_LOSSES,
    QUICK_SECONDS,
    Environment,
    avoided,
    hindrance,
    reported,
)
from service.model.executor import (
    ArtifactRef,
    Bundle,
    Capacity,
    Failed,
    Fault,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Started,
    Succeeded,
)
from service.model.scheduling import Waiting

BOTH = ("n1", "n2")
ROOT = Fault("artifact_root", "/srv/artifacts", "n1", writing=True)
DATA = Fault("data_folder", "/srv/data", "n1", dataset="cifar10")
NODE = Fault("node", "gpu1", "n1")
DEVICE = Fault("device", "cuda:1 of gpu1", "n1")


class World:
    """An environment, its clock, and attempts of bundles of one task."""

    def __init__(self, names: Sequence[str] = BOTH) -> None:
        self.now = 1000.0
        self.names = names
        self.environment = Environment(lambda: self.now)
        self._count = 0

    def takes_up(self, node: str = "n1", dataset: str = "cifar10", *, tried: bool = False) -> Bundle:
        self._count += 1
        bundle = Bundle(f"b{self._count}", (Grant(f"t{self._count}", 1, "d", {}),), {"dataset": {"name": dataset}})
        if tried:
            assert self.environment.may_try(node, dataset)
            self.environment.tries(bundle.id, node, dataset)
        self.hears(bundle, Started(f"t{self._count}", 1, f"host-of-{node} pid 1", node))
        return bundle

    def hears(self, bundle: Bundle, message: Message) -> None:
        self.environment.hear(message, bundle, self.names)

    def loses(self, bundle: Bundle, fault: Fault, why: str = "it failed") -> None:
        self.hears(bundle, Lost(bundle.grants[0].task_id, 1, "environment", why, fault))

    def fails(self, bundle: Bundle, **changed: Any) -> None:
        self.hears(bundle, replace(Failed(bundle.grants[0].task_id, 1, "error", "CUDA error"), **changed))

    def succeeds(self, bundle: Bundle, *, wrote: bool = True) -> None:
        artifacts = (ArtifactRef("d", 1, "checkpoint"),) if wrote else ()
        self.hears(bundle, Succeeded(bundle.grants[0].task_id, 1, Outcome(artifacts=artifacts)))

    def avoids(self, dataset: str = "cifar10") -> set[str]:
        return set(avoided(self.environment.aside, self.names, dataset))


def test_the_owner_waits_twice_as_long_each_time_and_is_back_after_a_success() -> None:
    world = World()
    world.loses(world.takes_up(), NODE)
    waits = []
    for _ in range(7):
        assert not world.environment.may_try("n1", "digits")
        [one] = world.environment.aside
        waits.append(one.retry_at - world.now)
        world.now = one.retry_at
        assert world.avoids() == {"n1"}, "it gets no more than what it is tried with"
        tried = world.takes_up(tried=True)
        assert not world.environment.may_try("n1", "cifar10"), "one at a time"
        world.loses(tried, NODE)
    assert waits == [min(FIRST_WAIT_SECONDS * 2**n, LONGEST_WAIT_SECONDS) for n in range(7)]
    world.now += LONGEST_WAIT_SECONDS
    world.succeeds(world.takes_up(tried=True))
    assert world.avoids() == set()
    assert [what for what, _ in world.environment.news] == ["set_aside"] * 8 + ["returned"]


def test_a_device_keeps_nobody_from_its_node_for_its_finder_keeps_it_busy() -> None:
    world = World()
    for losses in (1, 2, 3):
        world.loses(world.takes_up(), DEVICE)
        world.loses(world.takes_up(), DEVICE)  # the other half of it, found at the same time
        [one] = world.environment.aside
        assert (one.losses, one.retry_at - world.now, world.avoids()) == (losses, DEVICE_WAIT_SECONDS, set())
        world.now += DEVICE_WAIT_SECONDS
    for device, left in (("cuda:0", 1), ("cuda:1", 0)):
        bundle = world.takes_up()
        world.hears(bundle, Started(bundle.grants[0].task_id, 1, f"gpu1 pid 7 {device}", "n1"))
        world.succeeds(bundle)
        assert len(world.environment.aside) == left, "only what ran on it shows that it is well"
    assert [what for what, _ in world.environment.news] == ["set_aside"] * 3 + ["returned"]


def test_those_that_ran_beside_the_first_loss_say_nothing_more() -> None:
    world = World()
    first, second, third = (world.takes_up() for _ in range(3))
    world.now += 1
    world.loses(first, ROOT)
    [before] = world.environment.aside
    world.now += 1
    world.loses(second, ROOT)
    assert world.environment.aside == [before], "the wait is not doubled by what was under way"
    world.succeeds(third)
    assert world.environment.aside == [before], "nor is it over: that began when the root was well"


@pytest.mark.parametrize(
    ("fault", "wrote", "back"), [(ROOT, False, False), (ROOT, True, True), (NODE, False, True), (DATA, False, True)]
)
def test_only_who_wrote_shows_that_there_is_room_again(fault: Fault, wrote: bool, back: bool) -> None:
    world = World()
    world.loses(world.takes_up(), fault)
    world.now += FIRST_WAIT_SECONDS
    world.succeeds(world.takes_up(tried=True), wrote=wrote)
    assert (world.environment.aside == []) == back


def test_progress_is_as_good_as_a_success() -> None:
    """A training of a day shows that its node works after its first step."""
    world = World()
    world.loses(world.takes_up(), NODE)
    world.now += FIRST_WAIT_SECONDS
    tried = world.takes_up(tried=True)
    world.hears(tried, Progress(tried.grants[0].task_id, 1, 0.0, {}))
    assert world.avoids() == {"n1"}
    world.hears(tried, Progress(tried.grants[0].task_id, 1, 0.001, {}))
    assert world.avoids() == set()


def test_a_data_folder_keeps_only_tasks_on_its_data_set() -> None:
    world = World()
    world.loses(world.takes_up(), DATA)
    assert (world.avoids("cifar10"), world.avoids("digits")) == ({"n1"}, set())


def test_a_folder_that_nodes_may_share_is_tried_on_one_of_them_at_a_time() -> None:
    """A hundred nodes with one full root lose one attempt each time, not a hundred."""
    world = World([f"n{n}" for n in range(100)])
    for node in world.names:
        world.loses(world.takes_up(node), replace(ROOT, node=node))
    stops = hindrance(world.environment.aside, world.names, "digits")
    assert stops is not None
    assert "artifact root /srv/artifacts is set aside and is tried again in 30 s: it failed" in stops.sentence(
        world.now
    )
    lost = 0
    for _ in range(60):
        world.now += 10
        for node in world.names:
            if world.environment.may_try(node, "digits"):
                tried = world.takes_up(node, tried=True)
                assert not any(world.environment.may_try(other, "digits") for other in world.names)
                world.loses(tried, replace(ROOT, node=node))
                lost += 1
    assert 10 <= lost <= 20, "in ten minutes"
    world.now += LONGEST_WAIT_SECONDS
    world.succeeds(world.takes_up("n7", tried=True))
    for node in sorted(world.avoids()):
        world.succeeds(world.takes_up(node, tried=True))
    assert world.avoids() == set(), "and they are all back at once"


def test_while_one_node_is_left_nothing_stops() -> None:
    world = World()
    world.loses(world.takes_up("n1"), ROOT)
    assert hindrance(world.environment.aside, world.names, "digits") is None


def test_a_node_that_loses_one_task_after_the_other_is_set_aside_where_others_are_left() -> None:
    world = World()
    for n in range(QUICK_LOSSES):
        assert world.avoids() == set()
        world.fails(world.takes_up("n1"), message=f"error {n}")
    assert world.avoids() == {"n1"}
    [one] = world.environment.aside
    assert (one.owner, one.name) == ("node", "host-of-n1")
    assert f"{QUICK_LOSSES} tasks in a row" in one.reason
    assert one.reason.endswith(f"error {QUICK_LOSSES - 1}")
    for _ in range(3 * QUICK_LOSSES):
        world.fails(world.takes_up("n2"))
    assert world.avoids() == {"n1"}, "the last node stays: it may as well be the tasks' doing"


@pytest.mark.parametrize("harmless", ["a success between", "slow", "the spec's", "one task again and again"])
def test_what_says_nothing_against_a_node(harmless: str) -> None:
    world = World()
    for _ in range(3 * QUICK_LOSSES):
        bundle = world.takes_up("n1")
        if harmless == "slow":
            world.now += QUICK_SECONDS + 1
        if harmless == "a success between":
            world.succeeds(world.takes_up("n1"))
        kind = "configuration" if harmless == "the spec's" else "error"
        if harmless == "one task again and again":
            again = Grant("t1", 1, "d", {})
            bundle = replace(bundle, grants=(again,))
        world.fails(bundle, kind=kind)
    assert world.environment.aside == []


def test_nodes_that_are_gone_are_forgotten_and_unfit_ones_told() -> None:
    world = World()
    world.loses(world.takes_up(), NODE)
    world.now += FIRST_WAIT_SECONDS
    tried = world.takes_up(tried=True)
    world.environment.heed(Capacity(True, 4.0, 0.0, ({"CPU": 4.0},), ("n2",), {"n3": "other code"}))
    assert world.environment.aside == []
    assert not world.environment.is_tried(tried.id)
    assert [(one.node, one.reason) for one in reported({"set_aside": world.environment.as_status(0.0)})] == [
        ("n3", "other code")
    ]
    world.environment.heed(Capacity(True, 8.0, 0.0, ({"CPU": 4.0},) * 2, ("n2", "n3")))
    assert [(what, one.node) for what, one in world.environment.news] == [
        ("set_aside", "n1"), ("returned", "n1"), ("set_aside", "n3"), ("returned", "n3"),
    ]  # fmt: skip


def test_the_next_dispatcher_goes_on_with_the_wait() -> None:
    world = World()
    world.loses(world.takes_up(), DATA)
    world.now += 10
    told = world.environment.as_status(5_000_000.0)  # the database's clock
    other = World()
    other.now = 7.0
    other.environment.take_over(reported({"set_aside": told}), 5_000_005.0)
    [one] = other.environment.aside
    assert (one.retry_at - other.now, other.avoids(), one.reason) == (FIRST_WAIT_SECONDS - 15, {"n1"}, "it failed")
    other.now = one.retry_at
    other.loses(other.takes_up(tried=True), DATA)
    assert other.environment.aside[0].losses == 2


def test_ways() -> None:
    """First what a node that is due is tried with, then the rest to where it may go."""
    capacity = Capacity(True, 8.0, 0.0, ({"CPU": 4.0},) * 2, BOTH)
    queue = [Waiting(name, "train", f"of {name}", "ann", 0, n) for n, name in enumerate(("cifar10", "digits"))]
    datasets = {f"of {name}": name for name in ("cifar10", "digits")}

    def seen(world: World) -> list[tuple[list[str], set[str], str | None]]:
        found = placing.ways(world.environment, capacity, queue, datasets)
        return [([task.task_id for task in way.queue], set(way.nodes), way.trial) for way in found]

    world = World()
    assert seen(world) == [(["cifar10", "digits"], {"n1", "n2"}, None)]
    world.loses(world.takes_up(), DATA)
    assert seen(world) == [(["cifar10", "digits"], {"n1", "n2"}, None)], "digits may go anywhere"
    world.loses(world.takes_up("n2"), replace(DATA, node="n2"))
    assert seen(world) == [(["digits"], {"n1", "n2"}, None)]
    world.now += FIRST_WAIT_SECONDS
    world.loses(world.takes_up("n2"), replace(NODE, node="n2"))
    assert seen(world) == [(["cifar10"], {"n1"}, "n1"), (["digits"], {"n1"}, None)]
