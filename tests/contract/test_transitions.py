"""The tables of transitions hold where a state is written: other moves are refused, and no UPDATE goes around them."""

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Table, true, update
from store_lab import Lab

from service import store
from service.model.jobs import JOB_TRANSITIONS, TRANSITIONS, JobState, NoTransition, TaskState
from service.store import tables
from service.store.states import move_jobs, move_tasks

# The two helpers, the three functions that build a new row, and the fields that a filter may name.
ROWS = {
    "joining._task_row",
    "jobs._job_row",
    "trained_again._copy",
    "job_fields.JOBS",
    "states.move_tasks",
    "states.move_jobs",
}


@pytest.mark.parametrize(("before", "after"), list(product(TaskState, repeat=2)))
def test_a_task_moves_as_the_table_says_and_in_no_other_way(before: TaskState, after: TaskState) -> None:
    if after in TRANSITIONS[before]:
        assert move_tasks({before}, after).is_update
    else:
        with pytest.raises(NoTransition, match=f"TaskState: nothing moves from {before} to {after}"):
            move_tasks({before}, after)


@pytest.mark.parametrize(("before", "after"), list(product(JobState, repeat=2)))
def test_a_job_moves_as_the_table_says_and_in_no_other_way(before: JobState, after: JobState) -> None:
    if after in JOB_TRANSITIONS[before]:
        assert move_jobs({before}, after).is_update
    else:
        with pytest.raises(NoTransition, match=f"JobState: nothing moves from {before} to {after}"):
            move_jobs({before}, after)


def test_each_of_several_moves_is_in_the_table() -> None:
    with pytest.raises(NoTransition, match="from blocked to running"):
        move_tasks({TaskState.QUEUED, TaskState.BLOCKED}, TaskState.RUNNING)
    with pytest.raises(NoTransition, match="from queued to held"):
        move_tasks({TaskState.QUEUED}, TaskState.RUNNING, unless=(true(), TaskState.HELD))


def test_an_update_changes_only_rows_in_the_states_that_it_names() -> None:
    statement = move_tasks({TaskState.RUNNING}, TaskState.SUCCEEDED).compile(compile_kwargs={"literal_binds": True})
    assert str(statement) == "UPDATE tasks SET state='succeeded' WHERE tasks.state IN ('running')"


def written_states(module: str, source: str) -> Iterator[str]:
    """Where a module gives a column `state` a value: as a keyword of a call, or as a key of a dictionary."""
    for statement in ast.parse(source).body:
        [target] = statement.targets if isinstance(statement, ast.Assign) else [None]
        name = ast.unparse(target) if target else getattr(statement, "name", "")
        for node in ast.walk(statement):
            keys = node.keys if isinstance(node, ast.Dict) else [getattr(node, "slice", None)]
            texts = [key.value for key in keys if isinstance(key, ast.Constant)]
            columns = [ast.unparse(key) for key in keys if isinstance(key, ast.Attribute)]
            keywords = [word.arg for word in node.keywords] if isinstance(node, ast.Call) else []
            if "state" in [*texts, *keywords] or {"tasks.c.state", "jobs.c.state"} & set(columns):
                yield f"{module}.{name}:{getattr(node, 'lineno', 0)}"


def test_only_the_two_helpers_write_a_state() -> None:
    folder = Path(store.__file__).parent
    places = {place for path in folder.glob("*.py") for place in written_states(path.stem, path.read_text())}
    assert {place.rpartition(":")[0] for place in places} == ROWS, sorted(places)


@pytest.mark.parametrize(
    "around",
    [
        "update(tasks).values(state=TaskState.HELD)",
        "update(tasks).values({'state': 'held'})",
        "update(jobs).values({jobs.c.state: 'held'})",
        "values['state'] = TaskState.HELD",
    ],
)
def test_an_update_that_goes_around_them_is_seen(around: str) -> None:
    assert list(written_states("settling", f"def settle():\n    {around}")) == ["settling.settle:2"]


@pytest.mark.parametrize("table", [tables.tasks, tables.jobs], ids=str)
def test_an_update_whose_columns_no_source_shows_is_refused(lab: Lab, table: Table) -> None:
    values = vars(SimpleNamespace(state="held", reason="it is spelled nowhere"))
    with lab.database.write() as connection, pytest.raises(AssertionError, match="goes around"):
        connection.execute(update(table).values(values))
