"""Whose turn it is, in the store: priority is among a user's own work, shared tasks, an admin's boost."""

from collections import Counter
from importlib import import_module
from typing import Any

import pytest
from dispatching import Scripted, dispatcher, passes, succeeds

from service.errors import Conflict, NotFound
from service.model.executor import Capacity
from service.queue import decisions
from service.queue.claims import SPONSOR_CHECK_SECONDS
from service.queue.explaining import explain
from service.settings import Settings
from service.store import claiming, deciding, users
from service.store.settling import rerank
from service.store.tables import events, jobs, tasks, usage

MIGRATIONS = "service.store.migrations.versions"
ONE_AT_A_TIME = Settings(lookahead=0, backoff_seconds=0.0, lease_seconds=60.0, usage_half_life_seconds=1e9)


def used(lab: Any, **seconds: float) -> None:
    """Have these users used so many device seconds before."""
    with lab.database.write() as connection:
        now = lab.database.now(connection)
        rows = [
            {"user": user, "device_seconds": of, "as_of": now, "recent_seconds": 0.0} for user, of in seconds.items()
        ]
        connection.execute(usage.insert(), rows)


def limit(lab: Any, user: str, **limits: Any) -> None:
    with lab.database.write() as connection:
        users.put_user(connection, lab.database.now(connection), user, limits)


class Turns:
    """A dispatcher with one place to run; `next` is the user of the bundle that it hands over, which succeeds."""

    def __init__(self, lab: Any) -> None:
        self.lab, self.executor = lab, Scripted(succeeds(lab))
        self.executor.room = Capacity(ready=True, cpus=1.0, gpus=0.0)
        self.dispatcher = dispatcher(lab, self.executor, settings=ONE_AT_A_TIME)

    def next(self) -> str | None:
        """Who sponsors the next one; None where nothing can be claimed."""
        before = len(self.executor.bundles)
        for _ in range(4):
            passes(SPONSOR_CHECK_SECONDS)
            self.dispatcher.tick()
            if len(self.executor.bundles) > before:
                [grant, *_] = self.executor.bundles[before].grants
                return str(self.lab.task(grant.task_id).sponsor)
        return None


def test_no_priority_goes_before_another_users_turn(lab: Any) -> None:
    """Three sweeps of one user at 100 take no more than every other turn."""
    for first in range(3):
        lab.submit_sweep({"seed": [10 * first, 10 * first + 1]}, user="bob", priority=100)
    lab.submit_sweep({"seed": [100, 101, 102, 103]}, priority=-100)
    used(lab, bob=100.0, ann=0.0)
    turns = Turns(lab)
    order = [turns.next() for _ in range(6)]
    assert order[0] == "ann"
    assert Counter(order)["ann"] >= 3
    count, differing = decisions.replay(lab.database)
    assert (count >= 6, differing) == (True, [])
    with lab.database.read() as connection:
        reasons = [one["reason"] for row in deciding.recorded(connection) for one in row.decided]
    assert all("device seconds" in reason and "among their own" in reason for reason in reasons)


class TestShared:
    def test_it_goes_in_the_turn_of_whoever_comes_first(self, lab: Any) -> None:
        """Bob asked first and with the higher priority, and has used up his share; ann needs the same."""
        lab.submit(user="bob", priority=100)
        lab.submit(user="bob", priority=100, seed=1)
        hers = lab.submit(user="ann", priority=-100)
        [shared] = lab.rows(tasks, kind="train", shared=True)
        assert shared.sponsor == "bob"
        used(lab, bob=1e6, ann=0.0)
        turns = Turns(lab)
        assert turns.next() == "ann"
        row = lab.task(shared.id)
        assert (row.state, row.sponsor, row.priority, row.sequence) == (
            "running",
            "ann",
            -100,
            lab.job(hers).sequence,
        )
        assert lab.job(hers).state == "running"

    @pytest.mark.parametrize("at_limit", [0, 0.5])
    def test_a_sponsor_who_may_use_nothing_holds_nobody_back(self, lab: Any, at_limit: float) -> None:
        lab.submit(user="bob", priority=5)
        limit(lab, "bob", max_gpus=at_limit)
        turns = Turns(lab)
        assert turns.next() is None
        hers = lab.submit(user="ann")
        assert [turns.next() for _ in range(3)] == ["ann", "ann", None]
        assert lab.job(hers).state == "succeeded"

    def test_of_all_users_in_their_shares(self, lab: Any) -> None:
        """Each pays in turn for what all three need: none alone for all of it."""
        for user, priority in (("bob", 100), ("ann", 0), ("cyd", -100)):
            lab.submit_sweep({"seed": list(range(9))}, user=user, priority=priority)
        turns = Turns(lab)
        order = Counter(turns.next() for _ in range(9))
        assert set(order) == {"ann", "bob", "cyd"}
        assert max(order.values()) <= 5

    def test_an_upgrade_finds_those_that_are(self, lab: Any) -> None:
        for user, seed in (("ann", 0), ("bob", 0), ("ann", 1), ("bob", 2)):
            lab.submit(user=user, seed=seed)
        before = {row.id: row.shared for row in lab.rows(tasks)}
        assert Counter(before.values()) == {True: 4, False: 8}
        with lab.database.write() as connection:
            connection.execute(tasks.update().values(shared=False))
            connection.exec_driver_sql(import_module(f"{MIGRATIONS}.0016_tokens_and_turns").NEEDED_BY_SEVERAL)
        assert {row.id: row.shared for row in lab.rows(tasks)} == before

    def test_it_is_known_while_several_users_need_it(self, lab: Any) -> None:
        def shared() -> set[str]:
            return {row.kind for row in lab.rows(tasks, shared=True)}

        lab.submit(user="ann")
        lab.submit(user="ann", scale=5)
        assert shared() == set(), "one user's jobs share nothing with another"
        bobs = lab.submit(user="bob", scale=10)
        assert shared() == {"train", "attack", "control"}
        cyds = lab.submit_sweep({"scale": [10]}, user="cyd")["id"]
        lab.service.cancel_job(bobs, user="bob")
        assert shared() == {"train", "attack", "control"}
        lab.service.pause_sweep(cyds, user="cyd")
        assert shared() == set()
        lab.service.resume_sweep(cyds, user="cyd")
        assert shared() == {"train", "attack", "control"}
        with lab.database.write() as connection:
            rerank(connection, 0.0, tasks.c.shared, {"cyd": 0, "ann": 1})
        assert {row.sponsor for row in lab.rows(tasks, shared=True)} == {"cyd"}
        with lab.database.read() as connection:
            assert claiming.any_shared(connection)
            assert claiming.sponsored_too_late(connection, {"cyd": 0, "ann": 1}, 9) == []
            [late] = claiming.sponsored_too_late(connection, {"cyd": 1, "ann": 0}, 9)
        assert lab.task(late).kind == "train"


class TestBoost:
    def test_a_boosted_job_goes_before_all_and_is_an_event(self, lab: Any) -> None:
        lab.submit_sweep({"seed": [1, 2, 3]}, user="ann", priority=100)
        first, second = (lab.submit(user="bob", seed=seed, priority=-100) for seed in (10, 11))
        used(lab, bob=1e6, ann=0.0)
        lab.service.boost_job(second, user="chief")
        lab.service.boost_job(second, user="chief")
        assert [(row.actor, row.job_id) for row in lab.rows(events, kind="job.boosted")] == [("chief", second)]
        assert {row.boosted for row in lab.rows(tasks, sponsor="bob")} == {False, True}
        turns = Turns(lab)
        assert [turns.next() for _ in range(3)] == ["bob", "bob", "ann"], (
            "its training, what follows it, and then others"
        )
        assert (lab.job(first).state, lab.job(second).state) == ("queued", "succeeded")
        with lab.database.read() as connection:
            reasons = [one["reason"] for row in deciding.recorded(connection) for one in row.decided]
        boosted = [reason.startswith("an admin boosted it; bob has used 1000") for reason in reasons]
        assert boosted == [True, True, False]
        assert decisions.replay(lab.database)[1] == []
        with pytest.raises(Conflict, match="is succeeded, so it has no turn any more"):
            lab.service.boost_job(second, user="chief")
        with pytest.raises(NotFound):
            lab.service.boost_job("nope", user="chief")

    def test_a_boosted_sweep_and_back(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"seed": [1, 2]}, user="bob")["id"]
        lab.submit(user="ann", seed=3)
        used(lab, bob=1e6, ann=0.0)
        assert lab.service.boost_sweep(sweep, user="chief") == 2
        assert lab.service.boost_sweep(sweep, user="chief") == 0
        lab.service.extend(sweep, {"seed": [9]}, user="bob")
        assert {row.spec["seed"]: row.boosted for row in lab.rows(jobs, sweep_id=sweep)} == {1: True, 2: True, 9: False}
        turns = Turns(lab)
        turns.executor.room = Capacity(ready=True, cpus=0.0, gpus=0.0)
        turns.dispatcher.tick()  # it leads, and claims nothing
        job = next(row.id for row in lab.rows(jobs, sweep_id=sweep) if row.spec["seed"] == 1)
        said = explain(lab.database, ONE_AT_A_TIME, job)["sentence"]
        assert "it is next (an admin boosted it; bob has used 1000000 device seconds at weight 1; priority 0" in said
        turns.executor.room = Capacity(ready=True, cpus=1.0, gpus=0.0)
        assert lab.service.boost_sweep(sweep, user="chief", boosted=False) == 2
        assert not lab.rows(tasks, boosted=True)
        assert len(lab.rows(events, kind="job.unboosted")) == 2
        turns.next()
        assert turns.next() == "ann"

    def test_a_shared_task_is_boosted_while_one_that_needs_it_is(self, lab: Any) -> None:
        lab.submit(user="ann")
        bobs = lab.submit(user="bob", scale=5, priority=-3)
        [train] = lab.rows(tasks, kind="train")
        lab.service.boost_job(bobs, user="chief")
        row = lab.task(train.id)
        assert (row.boosted, row.sponsor, row.priority) == (True, "bob", -3)
        assert row.due < train.due - 1e9
        lab.service.cancel_job(bobs, user="bob")
        row = lab.task(train.id)
        assert (row.boosted, row.sponsor, row.due) == (False, "ann", train.due)
