"""What the dispatcher does all the time must not cost more, the more there is in the store."""

from collections.abc import Callable
from typing import Any

import pytest
from dispatching import Scripted
from sqlalchemy import event
from store_lab import Lab

from service.lab.artifacts import Artifacts
from service.model.executor import Grant, Lost, Message, Succeeded
from service.queue.dispatcher import Dispatcher
from service.results import aggregates
from service.results.insights import Insights
from service.results.questions import Question
from service.settings import Settings
from service.store import Database, claiming

HIDDEN = "ix_results_retracted"  # by which retracted results are counted beside an answer
BIG = ("tasks", "jobs", "job_tasks", "task_edges", "events", "attempts", "outcome_bits", "curves", "artifacts")


def losing_the_first(lab: Lab) -> Callable[[Grant], Message]:
    """Every task succeeds but the first one, whose worker dies."""
    lost: list[Grant] = []

    def answer(grant: Grant) -> Message:
        if not lost:
            lost.append(grant)
            return Lost(grant.task_id, grant.attempt, "worker_died", "gone")
        return Succeeded(grant.task_id, grant.attempt, lab.outcome(grant))

    return answer


@pytest.fixture
def watched(sqlite_url: str, artifacts: Artifacts) -> Any:
    """A lab on SQLite, and the plans of the statements that are run in it (the planner of PostgreSQL goes by size)."""
    database = Database(sqlite_url)
    plans: dict[str, list[str]] = {}

    @event.listens_for(database.engine, "before_cursor_execute")
    def _explain(connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if statement.startswith(("WITH", "SELECT", "UPDATE", "DELETE", "INSERT")) and statement not in plans:
            one = parameters[0] if many else parameters
            plans[statement] = [row[3] for row in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", one).fetchall()]

    yield Lab(database, artifacts), plans
    database.close()


def test_no_statement_of_the_loop_scans_a_table(watched: Any) -> None:
    lab, plans = watched
    lab.submit_sweep()
    plans.clear()
    executor = Scripted(losing_the_first(lab), cpus=2.0)
    one = Dispatcher(lab.database, lab.artifacts, executor, Settings(backoff_seconds=0.0), "d1")
    for _ in range(20):
        one._renewed_at = one._looked_at = one._reap_from = 0.0
        one.tick()
    steps = [(step, statement) for statement, found in plans.items() for step in found]
    assert lab.job_states() == {"succeeded": 28}
    assert [
        one for one in steps if any(one[0].startswith(f"SCAN {table}") for table in BIG) and "USING" not in one[0]
    ] == []
    moves = [step for step, statement in steps if statement.startswith("UPDATE jobs SET state")]
    assert moves
    assert not any("ix_jobs_state" in step for step in moves), "jobs are found by id, not among all in a state"
    for index in ("ix_tasks_claim", "ix_tasks_running"):
        assert any(index in step for step, _ in steps)


def test_the_queue_is_read_in_order_and_not_sorted(watched: Any) -> None:
    lab, plans = watched
    lab.submit()
    plans.clear()
    with lab.database.read() as connection:
        claiming.waiting(connection, 1e12, 10)
    [steps] = [steps for statement, steps in plans.items() if "not_before" in statement]
    looks = [step for step in steps if "tasks" in step]
    assert looks == ["SEARCH tasks USING INDEX ix_tasks_claim (sponsor=? AND kind=?)"] * 4
    assert not any("TEMP B-TREE" in step for step in steps)
    [steps] = [steps for statement, steps in plans.items() if "RECURSIVE" in statement]
    looks = [step for step in steps if "tasks" in step or "later" in step]
    assert looks == [
        "SEARCH tasks USING INDEX ix_tasks_claim",
        "SEARCH later USING INDEX ix_tasks_claim (sponsor>?)",
    ]


@pytest.mark.parametrize("verb", ["submit", "join", "start", "finish training", "fail training", "cancel", "retry"])
def test_the_number_of_statements_does_not_grow_with_the_jobs(
    database: Database, artifacts: Artifacts, verb: str
) -> None:
    lab = Lab(database, artifacts)
    counted = 0

    @event.listens_for(database.engine, "before_cursor_execute")
    def _count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    def statements(jobs: int, seed: int) -> int:
        """How many it takes to do this to so many jobs of one training."""
        nonlocal counted
        grid: dict[str, list[Any]] = {"scale": [1 + i / 1000 for i in range(jobs)], "seed": [seed]}
        before = counted
        sweep = lab.submit_sweep(grid)["id"]
        if verb == "submit":
            return counted - before
        before = counted
        if verb == "join":
            lab.submit_sweep(grid)
            return counted - before
        if verb == "cancel":
            lab.service.cancel_sweep(sweep, user="ann")
            return counted - before
        train = next(grant for grant in lab.grant("train") if grant.spec["seed"] == seed)
        if verb == "start":
            return counted - before
        before = counted
        if verb == "finish training":
            lab.succeed(train)
            return counted - before
        lab.fail(train)
        if verb == "fail training":
            return counted - before
        before = counted
        lab.service.retry_failed(sweep, user="ann")
        return counted - before

    statements(1, seed=0)  # some things are only made the first time
    assert statements(300, seed=1) == statements(3, seed=2)
    lab.check()


def test_following_a_sweep_asks_of_each_event_and_lists_nothing(watched: Any) -> None:
    from service.store import history

    lab, plans = watched
    sweep = lab.submit_sweep()["id"]
    plans.clear()
    with lab.database.read() as connection:
        found = history.after(connection, 0, sweep_id=sweep)
    assert len(found) == 1 + 28 + 48
    [steps] = plans.values()
    assert not any("ix_jobs_sweep" in step or "USE TEMP B-TREE" in step for step in steps), steps


def test_a_page_of_few_cells_reads_a_few_rows_of_each(watched: Any) -> None:
    lab, plans = watched
    lab.submit_sweep()
    lab.finish()
    plans.clear()
    Insights(lab.database).results(Question({"architecture": ["mlp"], "scale": ["5"]}, "-robust_accuracy", limit=1))
    steps = [step for found in plans.values() for step in found if "results" in step]
    searches = [step for step in steps if "ix_results_" in step and HIDDEN not in step]
    assert len(searches) >= 2
    assert all("ix_results_cell_robust_accuracy (cell_id=? AND " in step for step in searches), searches
    assert any("(robust_accuracy,sequence)>(?,?)" in step for step in searches), searches
    assert not any(step.startswith("SCAN results") for step in steps if HIDDEN not in step)


def test_an_aggregate_of_networks_without_repeats_reads_one_index_and_no_row(watched: Any) -> None:
    lab, plans = watched
    lab.submit_sweep({"scale": [1, 5], "seed": [0, 1, 2], "architecture": ["mlp", "simple_cnn"]})
    lab.finish()
    metrics = aggregates.metrics_of("robust_accuracy:mean,ci95,count,clean_accuracy:mean")

    def steps() -> list[str]:
        plans.clear()
        aggregates.aggregate(lab.database, [], ["architecture", "scale", "user"], metrics)
        return [step for found in plans.values() for step in found if "results" in step and HIDDEN not in step]

    assert steps() == ["SCAN results USING COVERING INDEX ix_results_cell"]
    lab.submit(attack_seed=1)
    lab.finish()
    [_, of_the_repeated] = steps()  # of the cells where a network is repeated
    assert "INDEX ix_results_cell" in of_the_repeated
    assert "(cell_id=?)" in of_the_repeated
