"""A lab of an older version is upgraded with queued, running and finished tasks, and this version goes on with it."""

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatching import LEASE_SECONDS, dispatcher, passes
from sqlalchemy import Connection, MetaData, Row, text
from waiting import until

from service.errors import InvalidQuery
from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Grant
from service.model.verdict import VERSION
from service.operations import upgrading
from service.operations.upgrading import Upgraded
from service.queue.inprocess import InProcessExecutor
from service.results import aggregates, leaderboard
from service.results.questions import nodes_of
from service.specs.versions import version_of_spec
from service.store import Database, tables
from service.store.result_tables import results
from workers.context import Context
from workers.run import execute

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OLD = Path(__file__).parents[2] / "contract"
OUTCOMES = ("trainings", "measurements", "attack_results", "control_results", "outcome_bits", "artifacts")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """The old lab's, as its version left it."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/old.db")
    else:
        database = Database(request.getfixturevalue("postgresql_url"))
        with database.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    database.upgrade("0011")
    with database.write() as connection:
        for statement in gzip.decompress((OLD / "lab_of_schema_0011.sql.gz").read_bytes()).decode().splitlines()[1:]:
            if not database.is_sqlite:
                statement = re.sub(r"X'([0-9a-f]*)'", r"'\\x\1'", statement).replace("%", "%%")
            connection.exec_driver_sql(statement)
        if not database.is_sqlite:  # which counts on after rows that name their id; PostgreSQL does not
            connection.exec_driver_sql("SELECT setval(pg_get_serial_sequence('cells', 'id'), max(id)) FROM cells")
        dies_now(connection, database.now(connection))
    yield database
    database.close()


def dies_now(connection: Connection, now: float) -> None:
    """Its dispatcher has just renewed its leases, and is gone."""
    connection.execute(tables.leases.update().values(expires_at=now + LEASE_SECONDS))
    of_running = text("UPDATE tasks SET lease_expires_at = :at WHERE state = 'running'")
    connection.execute(of_running, {"at": now + LEASE_SECONDS})


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """The weights of its one network that is still needed."""
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    weights = gzip.decompress((OLD / "lab_of_schema_0011.safetensors.gz").read_bytes())
    artifacts.write_chunks("checkpoint", [weights])
    return artifacts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_rows(database: Database) -> dict[str, dict[Any, Row[Any]]]:
    """The rows of its tables by their keys."""
    with database.read() as connection:
        schema = MetaData()
        schema.reflect(connection)
        keys = {name: tuple(table.primary_key) for name, table in schema.tables.items()}
        return {
            name: {
                tuple(row._mapping[column] for column in keys[name]): row for row in connection.execute(table.select())
            }
            for name, table in schema.tables.items()
        }


def what(spec: dict[str, Any]) -> str:
    """Kind, type, scale and version of a task."""
    named = {"train": ("recipe", "name"), "measure": ("measure", "type"), "attack": ("attack", "type")}
    kind = spec["kind"]
    name = spec[named[kind][0]][named[kind][1]] if kind in named else spec["norm"]
    return f"{kind} {name} {spec.get('scale', 1.0):g} v{spec['version']}"


class Watching(InProcessExecutor):
    """With the real tasks, and remembers which it has begun."""

    def __init__(self, lab: Any) -> None:
        self.begun: list[Grant] = []
        context = Context(lab.artifacts, Path(lab.artifacts.root).parent)
        super().__init__(partial(execute, context=context), cpus=2)

    def submit(self, bundle: Bundle) -> None:
        self.begun += bundle.grants
        super().submit(bundle)


def work(lab: Any) -> list[Grant]:
    """This version's dispatcher stands by until the old one's lease is over, and works until no job is left."""
    executor = Watching(lab)
    one = dispatcher(lab, executor, "new")
    one.tick()
    assert not one.leading, "it took over from one whose lease was valid"
    passes(LEASE_SECONDS + 1)

    def is_done() -> bool:
        one.tick()
        return not set(lab.job_states()) & {"queued", "running"}

    until(is_done, 240.0)
    executor.close()
    return executor.begun


AGAIN = {
    "attack pgd 5 v1": "it was running, and its number means the same",
    "attack pgd 50 v1": "it was queued, and its number means the same",
    "measure closed_forms 50 v1": "so was this one",
    "measure sam_sharpness 5 v2": "it was queued as version 1",
    "measure sam_sharpness 50 v2": "it was running as version 1",
    "train adversarial 1 v2": "it was queued as version 1",
    "train trades 1 v2": "it was running as version 1",
    "train standard 1 v1": "it was queued, of another architecture",
}
ON_NEW_NETWORKS = {
    "attack pgd 1 v1": 3, "control linf 1 v1": 3, "measure closed_forms 1 v1": 3, "measure sam_sharpness 1 v2": 2,
}  # fmt: skip


def test_a_lab_of_before_goes_on_under_this_version(lab: Any) -> None:
    before = all_rows(lab.database)
    tasks = list(before["tasks"].values())
    in_state = {"succeeded": 15, "running": 3, "queued": 5, "blocked": 11}
    assert Counter(row.state for row in tasks) == in_state
    assert upgrading.upgrade(lab.database) == Upgraded(judged=6, changed=2)
    begun = work(lab)
    assert lab.job_states() == {"succeeded": 11}
    assert {row.end for row in lab.rows(tables.attempts)} == {"succeeded", "lease_expired", "given_back"}
    finished_keep_their_numbers(lab, before)
    computed_once(lab, begun, {row.digest for row in tasks if row.state == "succeeded"})
    older_ones_are_replaced(lab, tasks)
    judged_again(lab)
    versions_are_kept_apart(lab)


def finished_keep_their_numbers(lab: Any, before: dict[str, dict[Any, Row[Any]]]) -> None:
    after = all_rows(lab.database)
    for name in OUTCOMES:
        assert before[name]
        for key, row in before[name].items():
            now = after[name][key]
            assert {column: now._mapping[column] for column in row._mapping} == dict(row._mapping), (name, key)


def computed_once(lab: Any, begun: list[Grant], finished_before: set[str]) -> None:
    """What was not there, and nothing else."""
    ended = {(row.task_id, row.number) for row in lab.rows(tables.attempts, end="succeeded")}
    computed = [grant for grant in begun if (grant.task_id, grant.attempt) in ended]
    assert not {grant.digest for grant in computed} & finished_before
    assert len({grant.digest for grant in computed}) == len(computed)
    assert Counter(what(grant.spec) for grant in computed) == {**dict.fromkeys(AGAIN, 1), **ON_NEW_NETWORKS}


def older_ones_are_replaced(lab: Any, before: list[Row[Any]]) -> None:
    """What is of an older version, or rests on a training that is, was planned again; all else is done."""
    older = {row.digest for row in before if row.version < version_of_spec(row.spec)}
    for row in before:
        is_replaced = row.state != "succeeded" and {row.digest, row.train_digest} & older
        assert lab.task(row.id).state == ("cancelled" if is_replaced else "succeeded"), what(row.spec)
        if row.state == "running":
            assert [one.end for one in lab.rows(tables.attempts, task_id=row.id, number=1)] == ["lease_expired"]


def judged_again(lab: Any) -> None:
    events = lab.rows(tables.events, kind="result.judged")
    changed = {(lab.job(row.job_id).attack, row.data["before"], row.data["verdict"]) for row in events}
    assert changed == {("noise", "trusted", "not_checked"), ("pgd", "trusted", "invalid")}
    assert {row.verdict_version for row in lab.rows(results)} == {VERSION}


def versions_are_kept_apart(lab: Any) -> None:
    """A network that the older version trained adversarially, and one of this version, are not averaged."""
    adversarial = nodes_of("recipe.name = adversarial")
    metrics = {"robust_accuracy": ("count",), "sam_sharpness": ("count",)}
    with pytest.raises(InvalidQuery, match="allow_mixed"):
        aggregates.aggregate(lab.database, adversarial, [], metrics)
    found = aggregates.aggregate(lab.database, adversarial, [], metrics, allow_mixed=True)
    assert found["mixed"] == {"measures.sam_sharpness.version": [1, 2], "versions.train": [1, 2]}
    boards = leaderboard.leaderboard(lab.database, adversarial, trusted=False)
    assert [sorted(row["train_version"] for row in board["rows"]) for board in boards] == [[1, 2]]
