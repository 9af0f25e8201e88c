"""Log lines are bounded in rate and size: they lie on the database's disk."""

import json
import logging

from service.logs import MAX_CHARACTERS, OTHERS, OURS, Bounded, JsonLines


def record(name: str, message: str, *arguments: object, error: Exception | None = None) -> logging.LogRecord:
    raised = (type(error), error, None) if error is not None else None
    return logging.LogRecord(name, logging.WARNING, "here.py", 1, message, arguments, raised)


def test_a_flood_is_cut_and_counted_for_each_logger() -> None:
    now = 0.0
    bounded = Bounded(lambda: now)
    noisy = [bounded.filter(record("asyncio", "socket.accept() out of system resource %d", i)) for i in range(10_000)]
    assert noisy == [True] * OTHERS.burst + [False] * (10_000 - OTHERS.burst)
    ours = [bounded.filter(record("uncanny.api", "line")) for _ in range(OURS.burst + 5)]
    assert sum(ours) == OURS.burst
    now = 3.0 / OTHERS.per_second
    lines = [record("asyncio", "again") for _ in range(5)]
    assert [bounded.filter(line) for line in lines] == [True, True, True, False, False]
    assert lines[0].getMessage() == f"again ({10_000 - OTHERS.burst:,} lines before this one were left out)"
    assert lines[1].getMessage() == "again"


def test_hours_of_a_flood_fill_no_disk() -> None:
    now, size = 0.0, 0
    bounded = Bounded(lambda: now)
    for _ in range(36_000):  # an hour of ten lines a second
        now += 0.1
        line = record("uvicorn.error", "x" * 2400)
        size += len(line.getMessage()) * bounded.filter(line)
    assert size < 2400 * (OTHERS.burst + 3600 * OTHERS.per_second + 1) * 1.05


def test_a_long_line_and_a_long_traceback_are_cut() -> None:
    line = record("uncanny.api", "%s failed", "é" * 1_000_000, error=ValueError("y" * 1_000_000))
    assert Bounded().filter(line)
    for written in (JsonLines().format(line), logging.Formatter().format(line)):
        assert len(written) < 8 * MAX_CHARACTERS
        assert "characters ..." in written
    assert json.loads(JsonLines().format(line))["traceback"].endswith("yyy")


def test_what_is_short_is_left_as_it_is() -> None:
    line = record("uncanny.api", "%d of %s", 3, "four")
    assert Bounded().filter(line)
    assert line.getMessage() == "3 of four"
