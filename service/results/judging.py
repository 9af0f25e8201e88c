"""Judges results again, by another rule or on other evidence; an event names each verdict that changes."""

from collections.abc import Mapping

from service.model.events import EventKind
from service.model.verdict import VERSION
from service.store import Connection, filing, history, judging
from service.store.history import Event


def judge_results(connection: Connection, now: float, actor: str, before: Mapping[str, str]) -> int:
    """Judge these jobs again, whose verdicts were `before`; an event names each change. Returns how many changed."""
    judged = judging.verdicts(connection, list(before))
    judging.write_verdicts(connection, judged)
    filing.file_verdicts(connection, list(before))
    changed = {
        job_id: {"version": VERSION, "before": before[job_id], "verdict": verdict.verdict}
        for job_id, verdict in judged
        if verdict.verdict != before[job_id]
    }
    events = [Event(EventKind.RESULT_JUDGED, job_id=job_id, data=data) for job_id, data in changed.items()]
    history.append(connection, now, actor, events)
    return len(events)
