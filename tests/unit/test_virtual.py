"""The executor in virtual time: nothing sleeps, no time runs backwards, and bundles are placed as Ray places them."""

import time
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.model.executor import Bundle, Grant, Lost, Message, Needs, Started, Succeeded
from service.queue.virtual import Idle, VirtualClock, VirtualExecutor, outcome

ONE_GPU = {"GPU": 1.0, "CPU": 1.0}
numbers = count()


def bundle(*seconds: float, gpus: float = 1.0, **more: Any) -> Bundle:
    """A bundle of attacks that take so long."""
    grants = [
        Grant(f"task {next(numbers)}", 1, "digest", {"kind": "attack", "samples": 9, "seconds": of_one})
        for of_one in seconds
    ]
    return Bundle(f"bundle {next(numbers)}", tuple(grants), {}, needs=Needs(1.0, gpus), **more)


def executor(*gpus: float, **more: Any) -> tuple[VirtualExecutor, VirtualClock]:
    clock = VirtualClock()
    nodes = {f"node-{i}": {"CPU": 4.0, "GPU": of_node} for i, of_node in enumerate(gpus)}
    return VirtualExecutor(clock, nodes, lambda _, grant: grant.spec["seconds"], {"attack": ONE_GPU}, **more), clock


def all_messages(one: VirtualExecutor, polls: int = 50) -> list[Message]:
    return [message for _ in range(polls) for message in one.poll(0.05)]


@given(st.lists(st.tuples(st.sampled_from(["advance", "sleep"]), st.floats(-1e6, 1e6))))
def test_the_clock_never_goes_backwards(moves: list[tuple[str, float]]) -> None:
    clock, before = VirtualClock(), 0.0
    for how, seconds in moves:
        getattr(clock, how)(seconds)
        assert clock() >= before
        before = clock()


def test_a_poll_moves_the_clock_to_the_next_message_and_never_sleeps() -> None:
    one, clock = executor(1)
    one.submit(bundle(86_400.0, 30.0))
    began = time.monotonic()
    assert [type(message) for message in one.poll(0.05)] == [Started]
    assert clock() == 0.0
    assert [type(message) for message in one.poll(0.05)] == [Succeeded, Started]
    assert clock() == 86_400.0
    assert [type(message) for message in one.poll(0.05)] == [Succeeded]
    assert clock() == 86_430.0
    assert one.poll(0.05) == []
    assert clock() == 86_430.05  # nothing runs
    assert time.monotonic() - began < 5


def test_a_poll_waits_no_longer_than_it_may() -> None:
    one, clock = executor(1, patience_seconds=7.0)
    one.submit(bundle(100.0))
    one.horizon = 10.0
    all_messages(one, polls=1)
    for at in (7.0, 10.0, 10.0):
        assert one.poll(0.05) == []
        assert clock() == at
    assert one.poll(0.0) == []
    assert clock() == 10.0


def test_bundles_go_to_the_first_node_with_room_and_the_others_wait_in_order() -> None:
    one, _ = executor(1, 1)
    bundles = [bundle(10.0), bundle(5.0), bundle(1.0), bundle(1.0)]
    for each in bundles:
        one.submit(each)
    nodes = {message.task_id: message.node for message in all_messages(one) if isinstance(message, Started)}
    assert [nodes[each.grants[0].task_id] for each in bundles] == ["node-0", "node-1", "node-1", "node-1"]
    assert [(run.started_at, run.ended_at) for run in one.runs] == [(0, 5), (5, 6), (6, 7), (0, 10)]


def test_one_that_fits_nowhere_now_lets_smaller_ones_past() -> None:
    one, _ = executor(2)
    first, large, small = bundle(10.0), bundle(10.0, gpus=2.0), bundle(4.0)
    for each in (first, large, small):
        one.submit(each)
    all_messages(one)
    started = {run.task_id: run.started_at for run in one.runs}
    assert [started[each.grants[0].task_id] for each in (first, small, large)] == [0.0, 0.0, 10.0]


def test_a_bundle_goes_to_no_node_that_it_avoids() -> None:
    one, _ = executor(1, 1)
    one.submit(bundle(1.0, avoid=frozenset({"node-0"})))
    [started] = one.poll(0.0)
    assert isinstance(started, Started)
    assert started.node == "node-1"


def test_idle_devices_are_noted_with_what_would_fit() -> None:
    one, clock = executor(2)
    one.submit(bundle(10.0))
    all_messages(one, polls=2)
    assert one.idle == [Idle(0.0, 10.0, 1.0, frozenset({"attack"}))]
    one.submit(bundle(5.0, gpus=2.0))
    all_messages(one, polls=2)
    assert len(one.idle) == 1
    assert clock() == 15.0


@pytest.mark.parametrize("after", [0, 1])
def test_each_grant_has_one_answer_also_of_a_bundle_that_is_cancelled(after: int) -> None:
    one, _ = executor(1)
    running, waiting = bundle(10.0, 10.0, 10.0), bundle(1.0, 1.0)
    one.submit(running)
    one.submit(waiting)
    messages = [message for _ in range(1 + after) for message in one.poll(0.05)]
    one.cancel(waiting.grants[0].task_id, 1)
    one.cancel(running.grants[after].task_id, 1)
    messages += all_messages(one)
    answers = {message.task_id: message for message in messages if not isinstance(message, Started)}
    assert len(answers) == len([message for message in messages if not isinstance(message, Started)]) == 5
    in_order = [answers[grant.task_id] for grant in (*running.grants, *waiting.grants)]
    lost = [answer.reason if isinstance(answer, Lost) else "" for answer in in_order]
    assert lost == [*[""] * after, "cancelled", *["given_back"] * (2 - after), "cancelled", ""]


def test_closing_gives_everything_back() -> None:
    one, _ = executor(1)
    one.submit(bundle(10.0, 10.0))
    one.submit(bundle(10.0))
    one.close()
    lost = [message for message in one.poll(0.0) if isinstance(message, Lost)]
    assert [message.reason for message in lost] == ["given_back"] * 3


@pytest.mark.parametrize("samples", [1, 8, 13])
def test_outcomes_have_a_bit_for_each_sample(samples: int) -> None:
    for kind, names in (("attack", 3), ("control", 6)):
        made = outcome(Grant("task", 1, "digest", {"kind": kind, "samples": samples}), 1.0)
        assert len(made.bits) == names
        for bits in made.bits.values():
            ones = sum(byte.bit_count() for byte in bits.packed)
            assert (bits.n, len(bits.packed), ones in (0, samples)) == (samples, -(-samples // 8), True)
