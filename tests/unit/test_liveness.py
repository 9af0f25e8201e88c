"""Liveness is progress: who beats without advancing stands still, by the clock of the dispatcher."""

from service.model.executor import ArtifactRef, Lost, Progress, Started
from service.model.liveness import Liveness


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched() -> tuple[Clock, Liveness]:
    clock = Clock()
    one = Liveness(clock)
    one.hear(Started("a", 1, "worker"))
    return clock, one


def test_who_beats_but_does_not_advance_stands_still() -> None:
    clock, one = watched()
    clock.now = 5.0
    one.hear(Progress("a", 1, 0.5, {"step": 1, "at": 1e12}))  # a worker's own clock counts for nothing
    for clock.now in (6.0, 7.0, 8.0):
        one.hear(Progress("a", 1, 0.5, {"loss": clock.now}))
        one.hear(Progress("a", 1, 0.4, {}))
    assert dict(one.standing_still(3.0)) == {("a", 1): 3.0}
    assert dict(one.standing_still(3.1)) == {}


def test_it_is_reported_once_until_it_advances() -> None:
    clock, one = watched()
    clock.now = 10.0
    assert one.newly_standing_still(10.0) == {("a", 1): 10.0}
    clock.now = 11.0
    assert one.newly_standing_still(10.0) == {}
    one.hear(Progress("a", 1, 0.1, {}))
    clock.now = 21.0
    assert one.newly_standing_still(10.0) == {("a", 1): 10.0}


def test_an_epoch_state_is_an_advance() -> None:
    """A training that was resumed comes from its last epoch to where it was."""
    clock, one = watched()
    one.hear(Progress("a", 1, 0.5, {}))
    one.mark()
    assert one.saved == []
    clock.now = 5.0
    one.hear(Progress("a", 1, 0.5, {}, ArtifactRef("0" * 64, 1, "epoch_state")))
    assert dict(one.standing_still(1.0)) == {}
    assert one.saved == [("a", 1)]


def test_who_waits_or_has_its_answer_is_not_watched() -> None:
    clock, one = watched()
    assert ("a", 1) in one
    one.hear(Lost("a", 1, "node_died", "gone"))
    one.hear(Progress("a", 1, 0.9, {}))
    clock.now = 100.0
    assert ("a", 1) not in one
    assert dict(one.standing_still(1.0)) == {}
