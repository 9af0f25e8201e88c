"""The live stream: what it sends, where it resumes, when it ends."""

import threading
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from waiting import until

from service.errors import DatabaseAway
from service.results.insights import Insights

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}


def test_a_job_s_events_and_those_of_its_tasks(server: Any) -> None:
    job = server.client.submit(JOB, seed=101)
    job.wait()
    events = list(server.client.events(job=job.id, follow=False))
    kinds = [event.kind for event in events]
    assert kinds[0] == "job.submitted"
    assert "job.succeeded" in kinds
    assert {"task.queued", "task.running", "task.succeeded"} <= set(kinds)
    ids = [event.id for event in events]
    assert ids == sorted(set(ids))
    assert {event.data["job_id"] for event in events} == {job.id, None}


def test_a_stream_resumes_without_loss_or_repetition(server: Any) -> None:
    sweep = server.sweep("events", seed=102, scale=[1, 2, 3])
    everything = [event.id for event in server.client.events(sweep=sweep["id"], follow=False)]
    for at in (0, 1, len(everything) // 2, len(everything) - 1):
        rest = [event.id for event in server.client.events(sweep=sweep["id"], follow=False, after=everything[at])]
        assert rest == everything[at + 1 :]


def test_a_list_that_breaks_off_is_taken_up_where_it_was(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is away between two pages: an end of the stream there would say that this was all."""
    sweep = server.sweep("breaks off", seed=104, scale=[1, 2, 3])
    everything = [event.id for event in server.client.events(sweep=sweep["id"], follow=False)]
    pages = iter([1, 2, None, 3, 1000])

    def moody(self: Insights, after: int, **of: Any) -> Any:
        page = next(pages, 1000)
        if page is None:
            raise DatabaseAway("it went away")
        first, happened, running = events(self, after, **of)
        return first, happened[:page], running

    events = Insights.events
    monkeypatch.setattr(Insights, "events", moody)
    assert [event.id for event in server.client.events(sweep=sweep["id"], follow=False)] == everything
    assert next(pages, None) is None


def test_a_database_that_is_away_is_said_before_the_stream_begins(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to who comes back: an empty stream each time would keep a client coming for ever."""

    def away(self: Insights) -> int:
        raise DatabaseAway("it went away")

    monkeypatch.setattr(Insights, "last_event", away)
    answer = server.http.get("/v1/events", params={"follow": False}, headers={"Last-Event-ID": "1"})
    assert (answer.status_code, answer.headers["Retry-After"].isdigit()) == (503, True)


def test_following_sees_what_happens_meanwhile(server: Any) -> None:
    seen: list[str] = []
    first = server.client.submit(JOB, seed=777)

    def follow() -> None:
        for event in server.client.events(job=first.id):
            seen.append(event.kind)
            if event.kind == "job.cancelled":
                return

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: "progress" in seen)
    first.client.cancel(first.id)
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "progress" in seen
    assert seen[-1] == "job.cancelled"


def test_without_a_target_it_begins_now(server: Any) -> None:
    server.sweep("before", seed=103)
    server.idle()
    assert list(server.client.events(follow=False)) == []
    assert len(list(server.client.events(follow=False, after=0))) > 10


def test_a_stream_says_where_it_begins_before_anything_happens(server: Any) -> None:
    """So that a break before the first event loses nothing."""
    server.idle()
    with connect_sse(httpx.Client(timeout=20), "GET", f"{server.url}/v1/events") as source:
        first = next(source.iter_sse())
    assert (first.data, first.id.isdecimal()) == ("", True)
    job = server.client.submit(JOB, seed=104)
    missed = server.client.events(after=int(first.id), follow=False)
    assert next(missed).data["job_id"] == job.id
    job.wait()


def test_progress_has_no_id_and_state_changes_do(server: Any) -> None:
    job = server.client.submit(JOB, seed=777, samples=19)
    progress: dict[str, Any] = {}
    with connect_sse(httpx.Client(timeout=20), "GET", f"{server.url}/v1/events", params={"job": job.id}) as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        last_id = "0"
        for event in source.iter_sse():
            if event.event == "progress":
                progress = event.json()
                assert event.id == last_id  # what a browser would send to resume is still the last state change
                if progress["progress"]:
                    break
            last_id = event.id
    server.client.cancel(job.id)
    assert progress["kind"] == "train"
    assert progress["progress"] == 0.5
    assert progress["detail"] == {"done": 1, "total": 2}
