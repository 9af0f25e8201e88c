"""The kinds of events are a closed list: each is written by the modules that the list names, and by no other."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from service.model import events
from service.model.events import EventKind
from service.model.jobs import JobState, TaskState

ROOT = Path(events.__file__).parents[1]
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in ROOT.rglob("*.py")}
COMMENT = re.compile(r'(?P<name>[A-Z_]+) = "[a-z_.]+"  # (?P<writers>[a-z_., ]+)')
WRITING = {"Event", "append_for_jobs", "append_for_tasks", "_tell"}  # who is given a kind
OF_STATES = {*map(EventKind.of_task, TaskState), *map(EventKind.of_job, JobState)}
STATE_WRITER = re.compile(r"EventKind\.of_(task|job)\(|append_for_tasks\(\s*connection, now, \w+, None,")


def writers(kind: EventKind) -> set[str]:
    """The modules that the comment beside the kind names; `.settling` is in the folder of the one before."""
    comments = {match["name"]: match["writers"] for match in COMMENT.finditer(inspect.getsource(events))}
    folder, *names = re.split(r"(?:, )?\.", comments[kind.name].strip())
    return {f"{folder}.{name}" for name in names}


def test_each_state_of_a_task_and_of_a_job_has_a_kind() -> None:
    assert EventKind.of_task(TaskState.HELD) is EventKind.TASK_HELD
    assert EventKind.of_job(JobState.FAILED) is EventKind.JOB_FAILED
    assert len(OF_STATES) == len(TaskState) + len(JobState)


@pytest.mark.parametrize("kind", EventKind)
def test_a_kind_is_written_by_the_modules_that_the_list_names_and_by_no_other(kind: EventKind) -> None:
    naming = {module for module, source in SOURCES.items() if re.search(rf"EventKind\.{kind.name}\b", source)}
    by_state = {module for module, source in SOURCES.items() if kind in OF_STATES and STATE_WRITER.search(source)}
    assert naming <= writers(kind) <= naming | by_state


def test_no_module_writes_a_kind_as_a_text() -> None:
    for module, source in SOURCES.items():
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) in WRITING:
                texts = [text for text in map(ast.unparse, call.args) if re.match(r"f?['\"]", text)]
                assert not texts, f"{module} writes {texts}"
