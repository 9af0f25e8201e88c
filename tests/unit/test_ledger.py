"""One answer per grant, whatever the worker says or does not say; and the executor in threads that keeps to it."""

import threading
import time
from collections.abc import Iterator

import pytest

from service.model.executor import Bundle, Failed, Grant, Lost, Message, Outcome, Progress, Started, Succeeded
from service.model.ledger import Ledger
from service.queue.inprocess import InProcessExecutor


def bundle(*task_ids: str) -> Bundle:
    grants = tuple(Grant(task_id, 1, "0" * 64, {"kind": "attack"}) for task_id in task_ids)
    return Bundle("-".join(task_ids), grants, {})


def lost(messages: list[Lost]) -> list[tuple[str, str]]:
    return [(message.task_id, message.reason) for message in messages]


def test_what_ran_is_lost_and_the_rest_is_given_back() -> None:
    ledger = Ledger(bundle("a", "b", "c"))
    assert ledger.accept(Started("a", 1, "worker"))
    assert ledger.accept(Succeeded("a", 1, Outcome()))
    assert ledger.accept(Started("b", 1, "worker"))
    assert lost(ledger.end("worker_died", "killed")) == [("b", "worker_died"), ("c", "given_back")]
    assert ledger.end("worker_died", "killed") == []


def test_a_worker_that_dies_before_it_says_what_it_runs_dies_of_the_next() -> None:
    assert lost(Ledger(bundle("a", "b")).end("worker_died", "killed")) == [("a", "worker_died"), ("b", "given_back")]


def test_a_second_answer_and_strangers_are_dropped() -> None:
    ledger = Ledger(bundle("a"))
    assert ledger.accept(Failed("a", 1, "error", "broke"))
    assert not ledger.accept(Succeeded("a", 1, Outcome()))
    assert not ledger.accept(Progress("a", 1, 0.5, {}))
    assert not ledger.accept(Started("b", 1, "worker"))
    assert not ledger.accept(Started("a", 2, "worker"))


def test_cancelling_one_that_waits_disturbs_no_other() -> None:
    ledger = Ledger(bundle("a", "b", "c"))
    ledger.accept(Started("a", 1, "worker"))
    stop, answers = ledger.cancel(("b", 1))
    assert (stop, lost(answers)) == (False, [("b", "cancelled")])
    ledger.accept(Succeeded("a", 1, Outcome()))
    assert not ledger.unwanted
    assert not ledger.accept(Started("b", 1, "worker"))
    assert ledger.unwanted  # it took up what nobody wants: the bundle is stopped, the rest comes back
    ledger.stopping = True
    assert lost(ledger.end("executor_lost", "stopped")) == [("c", "given_back")]


def test_cancelling_the_last_one_stops_the_bundle() -> None:
    stop, answers = Ledger(bundle("a")).cancel(("a", 1))
    assert (stop, lost(answers)) == (True, [("a", "cancelled")])


def test_cancelling_what_runs_gives_the_rest_back() -> None:
    ledger = Ledger(bundle("a", "b"))
    ledger.accept(Started("a", 1, "worker"))
    assert ledger.cancel(("a", 1)) == (True, [])
    assert ledger.cancel(("a", 2)) == (False, [])
    assert lost(ledger.end("worker_died", "stopped")) == [("a", "cancelled"), ("b", "given_back")]


def spinning(of: Bundle) -> Iterator[Message]:
    for grant in of.grants:
        yield Started(grant.task_id, grant.attempt, "thread")
        while True:
            time.sleep(0.001)


def answers(executor: InProcessExecutor, count: int) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    deadline = time.monotonic() + 30
    while len(out) < count and time.monotonic() < deadline:
        messages = executor.poll(0.1)
        out += [(m.task_id, m.reason) for m in messages if isinstance(m, Lost)]
        out += [(m.task_id, type(m).__name__) for m in messages if isinstance(m, (Succeeded, Failed))]
    return out


def test_closing_gives_everything_back() -> None:
    executor = InProcessExecutor(spinning)
    executor.submit(bundle("a", "b"))
    executor.submit(bundle("c"))
    while not executor.poll(1.0):
        pass
    executor.close()
    assert not executor.capacity().ready
    executor.submit(bundle("d"))
    assert sorted(answers(executor, 4)) == [(name, "given_back") for name in "abcd"]
    assert executor.poll(0.0) == []


def test_a_thread_that_does_not_stop_is_left_to_itself() -> None:
    release = threading.Event()

    def deaf(of: Bundle) -> Iterator[Message]:
        yield Started(of.grants[0].task_id, 1, "thread")
        while not release.is_set():
            try:
                time.sleep(0.001)
            except KeyboardInterrupt:
                continue
        yield Succeeded(of.grants[0].task_id, 1, Outcome())

    executor = InProcessExecutor(deaf, grace_seconds=0.2)
    executor.submit(bundle("a"))
    while not executor.poll(1.0):
        pass
    executor.cancel("a", 1)
    assert answers(executor, 1) == [("a", "cancelled")]
    release.set()
    assert executor.poll(0.1) == []


def test_what_execute_raises_is_held_against_the_task() -> None:
    def broken(of: Bundle) -> Iterator[Message]:
        yield Started(of.grants[0].task_id, 1, "thread")
        raise RuntimeError("a bug")

    executor = InProcessExecutor(broken)
    executor.submit(bundle("a", "b"))
    assert answers(executor, 2) == [("a", "worker_died"), ("b", "given_back")]


def test_one_that_is_cancelled_while_it_waits_does_not_take_the_next_ones_turn() -> None:
    release = threading.Event()

    def waiting(of: Bundle) -> Iterator[Message]:
        yield Started(of.grants[0].task_id, 1, "thread")
        release.wait(30)
        yield Succeeded(of.grants[0].task_id, 1, Outcome())

    executor = InProcessExecutor(waiting)
    executor.submit(bundle("a"))
    while not executor.poll(1.0):
        pass
    executor.submit(bundle("b"))
    time.sleep(0.1)  # until a thread of its own, if it had one, would wait
    executor.submit(bundle("c"))
    executor.cancel("b", 1)
    release.set()
    assert sorted(answers(executor, 3)) == [("a", "Succeeded"), ("b", "cancelled"), ("c", "Succeeded")]
    executor.close()


@pytest.mark.parametrize("cpus", [1, 2])
def test_as_many_bundles_at_once_as_there_are_cpus(cpus: int) -> None:
    lock, now, most, meet = threading.Lock(), 0, 0, threading.Barrier(cpus, timeout=30)

    def counting(of: Bundle) -> Iterator[Message]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        meet.wait()
        time.sleep(0.05)  # in which one too many would come
        with lock:
            now -= 1
        yield Succeeded(of.grants[0].task_id, 1, Outcome())

    executor = InProcessExecutor(counting, cpus=cpus)
    for name in "abcd":
        executor.submit(bundle(name))
    assert sorted(answers(executor, 4)) == [(name, "Succeeded") for name in "abcd"]
    assert most == cpus
