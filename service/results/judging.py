"""Judging results again, by another rule or by other evidence; an event names each verdict that changes."""

from collections.abc import Mapping

from service.model.verdict import VERSION
from service.store import Connection, filing, history, judging
from service.store.history import Event


def judge_results(connection: Connection, now: float, actor: str, before: Mapping[str, str]) -> int:
    """Judge these jobs again, whose verdicts were `before`; an event names each change. Returns how many changed."""
    found = judging.verdicts(connection, list(before))
    judging.write_verdicts(connection, found)
    filing.file_verdicts(connection, list(before))
    events = [
        Event(
            "result.judged", job_id=row["id"],
            data={"version": VERSION, "before": before[row["id"]], "verdict": row["verdict"]},
        )
        for row in found
        if row["verdict"] != before[row["id"]]
    ]  # fmt: skip
    history.append(connection, now, actor, events)
    return len(events)
