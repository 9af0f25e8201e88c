"""A page of results reads a small part of them, for every question that has an index, on both databases."""

from typing import Any

import pytest
from benchmarks.generated import INDEXED, fill
from sqlalchemy import event, text

from service.results.insights import Insights, Question
from service.store import Database

pytestmark = pytest.mark.slow

CELLS = 5600


def question(asked: dict[str, Any]) -> Question:
    simple = {name: [str(value)] for name, value in asked.items() if name not in ("sort", "filter")}
    return Question(simple, asked.get("sort", "-created_at"), filter=asked.get("filter"))


def steps_of_sqlite(database: Database, asked: Question | None) -> int:
    """Tens of instructions of SQLite's machine for a page; for None those that read one column of every row."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    with database.read() as connection:
        driver: Any = connection.connection.driver_connection
    driver.set_progress_handler(count, 10)  # the pool has one connection
    try:
        if asked is None:
            with database.read() as connection:
                connection.execute(text("SELECT sum(robust_loss) FROM results NOT INDEXED")).all()
        else:
            Insights(database).results(asked)
    finally:
        driver.set_progress_handler(None, 0)
    return steps


def rows_of_postgresql(database: Database, asked: Question) -> dict[str, int]:
    """How many rows of each table the statements of a page read."""
    read: dict[str, int] = {}

    @event.listens_for(database.engine, "before_cursor_execute")
    def _explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH")):
            cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            _add(cursor.fetchone()[0][0]["Plan"], read)

    try:
        Insights(database).results(asked)
    finally:
        event.remove(database.engine, "before_cursor_execute", _explain)
    return read


def _add(node: dict[str, Any], read: dict[str, int]) -> None:
    if "Relation Name" in node:
        rows = (
            node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        )
        read[node["Relation Name"]] = read.get(node["Relation Name"], 0) + round(rows * node["Actual Loops"])
    for inner in node.get("Plans", []):
        _add(inner, read)


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [("sqlite", 10), pytest.param("postgresql", 40, marks=pytest.mark.slow)],  # which reads all of a few by choice
)
def test_a_page_reads_a_small_part_of_all_results(request: pytest.FixtureRequest, kind: str, seeds: int) -> None:
    database, count = Database(request.getfixturevalue(f"{kind}_url")), seeds * CELLS
    fill(database, count)
    for name, parameters in INDEXED.items():
        asked = question(parameters)
        assert len(Insights(database).results(asked)["items"]) == 100
        if database.is_sqlite:
            assert steps_of_sqlite(database, asked) < 0.5 * steps_of_sqlite(database, None), name
        else:
            read = rows_of_postgresql(database, asked)
            assert set(read) >= {"cells", "results", "jobs", "attempts"}
            assert {table: rows for table, rows in read.items() if table != "cells" and rows > count / 20} == {}, name
    database.close()
