"""The checks of a history find what they are there for: each is shown a sound history, and one that is not."""

from types import SimpleNamespace
from typing import Any

import pytest
from history_checks import (
    after_the_end,
    before_parents,
    ends_of_jobs,
    gaps,
    over_devices,
    over_quota,
    overlaps,
    recorded,
)


def events(*written: str) -> list[Any]:
    """`"task.running t 1"` and so on, numbered."""
    found = []
    for number, one in enumerate(written, 1):
        kind, ident, *attempt = one.split()
        of = {"job_id": ident} if kind.startswith("job") else {"task_id": ident}
        row = {"id": number, "kind": kind, "job_id": None, "task_id": None, **of}
        found.append(SimpleNamespace(**row, attempt=int(attempt[0]) if attempt else None))
    return found


def attempt(task_id: str, number: int, started_at: float, ended_at: float | None, end: str | None, **more: Any) -> Any:
    row = {"task_id": task_id, "number": number, "started_at": started_at, "ended_at": ended_at, "end": end}
    return SimpleNamespace(**row, **more)


SOUND = events(
    "job.submitted j", "task.queued p", "task.blocked c", "task.running p", "task.queued p", "task.running p",
    "task.succeeded p", "task.queued c", "task.running c", "task.cancelled c", "job.cancelled j", "job.queued j",
    "task.queued c", "task.running c", "task.succeeded c", "job.succeeded j",
)  # fmt: skip
EDGES = [SimpleNamespace(parent_id="p", child_id="c")]
ATTEMPTS = [attempt("t", 1, 0.0, 1.0, "lease_expired"), attempt("t", 2, 1.0, 2.0, "succeeded")]
TASK = SimpleNamespace(id="t", state="succeeded", attempt=2)


def test_a_sound_history() -> None:
    assert not list(gaps(SOUND))
    assert not list(ends_of_jobs(SOUND, ["j"]))
    assert not list(after_the_end(SOUND))
    assert not list(before_parents(SOUND, EDGES))
    assert not list(over_quota(SOUND, {"j": "ann"}, {"ann": 1}))
    assert not list(overlaps(ATTEMPTS))
    assert not list(recorded([TASK], ATTEMPTS, {"t": 1}))


def test_gaps() -> None:
    assert list(gaps(SOUND[:2] + SOUND[3:]))


@pytest.mark.parametrize(
    "written",
    [
        ["job.submitted j"],
        ["job.submitted j", "job.succeeded j", "job.succeeded j"],
        ["job.submitted j", "job.cancelled j", "job.queued j"],
        ["job.submitted i", "job.succeeded i"],
        ["job.submitted j", "job.succeeded j", "job.running j", "job.succeeded j"],
    ],
)
def test_ends_of_jobs(written: list[str]) -> None:
    assert len(list(ends_of_jobs(events(*written), ["j"]))) == 1


def test_a_retry_may_find_all_done_by_others() -> None:
    retried = events("job.submitted j", "job.cancelled j", "job.retried j", "job.succeeded j")
    assert list(ends_of_jobs(retried, ["j"])) == []


@pytest.mark.parametrize("end", ["task.cancelled", "task.succeeded", "task.failed"])
def test_after_the_end(end: str) -> None:
    assert list(after_the_end(events("task.running t", f"{end} t", "task.succeeded t")))
    assert list(after_the_end(events("task.running t", f"{end} t", "task.checkpointed t")))


def test_before_parents() -> None:
    assert list(before_parents(events("task.running p", "task.running c", "task.succeeded p"), EDGES))


def test_over_quota() -> None:
    users = {"i": "ann", "j": "ann", "k": "bob"}
    assert list(over_quota(events("job.submitted i", "job.submitted k", "job.submitted j"), users, {"ann": 1}))
    assert not list(over_quota(events("job.submitted i", "job.succeeded i", "job.submitted j"), users, {"ann": 1}))


def test_overlaps() -> None:
    assert list(overlaps([attempt("t", 1, 0.0, 2.0, "node_died"), attempt("t", 2, 1.0, 3.0, "succeeded")]))
    assert list(overlaps([attempt("t", 1, 0.0, None, None), attempt("t", 2, 1.0, 3.0, "succeeded")]))
    assert list(overlaps([attempt("t", 2, 1.0, 3.0, "succeeded")]))


def test_recorded() -> None:
    assert list(recorded([TASK], ATTEMPTS, {"t": 2})), "twice"
    assert list(recorded([TASK], ATTEMPTS, {})), "not at all"
    assert list(recorded([SimpleNamespace(id="t", state="cancelled", attempt=2)], ATTEMPTS, {"t": 1}))
    superseded = [attempt("t", 1, 0.0, 1.0, "succeeded"), attempt("t", 2, 1.0, 2.0, "cancelled")]
    assert list(recorded([TASK], superseded, {"t": 1})), "the result of an attempt that was not the last"


def test_over_devices() -> None:
    def bundle(name: str, started_at: float, ended_at: float | None) -> Any:
        return attempt(name, 1, started_at, ended_at, "succeeded", bundle=name, device_share=1.0)

    one_after_the_other = [bundle("a", 0.0, 1.0), bundle("b", 1.0, None)]
    at_once = [bundle("a", 0.0, 2.0), bundle("b", 1.0, None)]
    for of, too_many in ((one_after_the_other, 0), (at_once, 1)):
        sponsors = {(one.task_id, one.started_at): "ann" for one in of}
        assert len(list(over_devices(of, sponsors, {"ann": 1.0}))) == too_many
        assert not list(over_devices(of, sponsors, {"bob": 0.0}))
