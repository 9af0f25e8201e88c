"""Ids by their beginnings: what only one has is enough, what several have is refused with their names."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select
from store_lab import Lab

from service.errors import AmbiguousId
from service.lab.artifacts import Artifacts
from service.results.insights import Insights, Question
from service.store import Database, identifying
from service.store.tables import jobs, sweeps, tasks

IDS = [
    "01a22d61-f220-729b-aacb-386ab223e4ba",
    "01a22d61-f220-729b-aacb-386b995d827d",
    "01a22d61-ffff-7fff-8000-000000000000",
    "01a22d62-0000-7000-8000-000000000000",
    "ffffffff-ffff-7fff-bfff-ffffffffffff",
]
SWEEP = {"name": "s", "user": "ann", "spec": {}, "priority": 0, "labels": {}, "paused": False, "created_at": 0.0}


@pytest.fixture
def named(database: Database, artifacts: Artifacts) -> Lab:
    """Jobs and one sweep with these ids, the sweep's between those of the jobs. No events tell of them."""
    lab = Lab(database, artifacts)
    [job] = lab.rows(jobs, id=lab.submit())
    with lab.database.write() as connection:
        connection.execute(insert(sweeps).values(**SWEEP, id=IDS[2]))
        for i in (0, 1, 3, 4):
            connection.execute(insert(jobs).values({**job._mapping, "id": IDS[i], "sequence": 1000 + i}))
    return lab


def test_what_only_one_begins_with_is_that_one(named: Lab) -> None:
    insights = Insights(named.database)
    assert insights.identify("job", IDS[0][:28]) == IDS[0]
    assert insights.identify("job", IDS[1][:28].upper()) == IDS[1]
    assert insights.identify("sweep", "01a22d61-ff") == IDS[2]
    assert insights.identify("sweep", "01a22d61-ffff-7fff-") == IDS[2]
    assert insights.identify("job", "01a22d62") == IDS[3]
    assert insights.identify("job", "ffffffff") == IDS[4]
    assert insights.identify("job", "ffffffff-ffff-7fff-bfff-ffffffffff") == IDS[4]


def test_an_id_in_capitals_without_dashes_or_with_blanks_around(named: Lab) -> None:
    insights = Insights(named.database)
    for form in (str.upper, lambda ident: ident.replace("-", ""), lambda ident: f" {ident}\t", lambda ident: ident):
        assert insights.identify("job", form(IDS[0])) == IDS[0]
        assert insights.identify("sweep", form(IDS[2])) == IDS[2]
        assert [row["id"] for row in insights.jobs(Question({"id": [form(IDS[0])]}))["items"]] == [IDS[0]]
        assert insights.jobs(Question({"sweep": [form(IDS[2])]}))["items"] == []
    [task] = named.rows(tasks, kind="attack")
    for written in (task.id.upper(), task.id.replace("-", ""), f" {task.digest.upper()}"):
        assert insights.task(insights.identify("task", written))["id"] == task.id
    assert insights.identify("task", task.digest[:32]) == task.digest, "no id without its dashes"
    assert insights.identify("job", " Foo ") == " Foo "


def test_what_several_begin_with_is_refused_with_their_names(named: Lab) -> None:
    insights = Insights(named.database)
    for kind in ("job", "sweep"):
        with pytest.raises(AmbiguousId, match=f"begins with 01a22d61: .*{IDS[0]}.*{IDS[1]}") as refused:
            insights.identify(kind, "01a22d61")
        assert f"sweep {IDS[2]}" in str(refused.value)


def test_a_sweep_is_no_job_and_less_than_eight_are_no_beginning(named: Lab) -> None:
    insights = Insights(named.database)
    assert insights.identify("job", "01a22d61-ff") == "01a22d61-ff"
    assert insights.identify("sweep", "01a22d62") == "01a22d62"
    for prefix in ("01a22d6", "01a22d63", "nothing", "01a22d6%", "01a22d62_", "0" * 35, ""):
        assert insights.identify("job", prefix) == prefix


def test_a_task_is_found_by_the_beginning_of_its_digest_too(lab: Lab) -> None:
    lab.submit()
    insights = Insights(lab.database)
    for row in lab.rows(tasks):
        assert insights.identify("task", row.digest[:12]) == row.digest
    with pytest.raises(AmbiguousId, match="task "):
        insights.identify("task", lab.rows(tasks)[0].id[:8])


def test_the_shortest_prefix_is_enough_and_one_less_is_not(named: Lab) -> None:
    with named.database.read() as connection:
        everything = [*connection.scalars(select(jobs.c.id)), *connection.scalars(select(sweeps.c.id))]
        shortest = identifying.shortest(connection, everything)
        for ident, prefix in shortest.items():
            assert ident.startswith(prefix)
            assert len(prefix) >= identifying.LEAST
            kind: Any = "sweep" if ident == IDS[2] else "job"
            assert identifying.whole(connection, kind, prefix) == ident
            if len(prefix) > identifying.LEAST:
                assert sum(other.startswith(prefix[:-1]) for other in everything) > 1
    assert shortest[IDS[0]] == IDS[0][:28]
    assert shortest[IDS[4]] == "ffffffff"


@pytest.fixture(scope="module")
def memory() -> Database:
    database = Database("sqlite://")
    sweeps.create(database.engine)
    jobs.create(database.engine)
    return database


HEX = st.text("09af", min_size=32, max_size=32).map(lambda t: f"{t[:8]}-{t[8:12]}-{t[12:16]}-{t[16:20]}-{t[20:]}")


@settings(max_examples=60, deadline=None)
@given(idents=st.sets(HEX, min_size=1, max_size=12), n=st.integers(8, 35), data=st.data())
def test_it_is_what_looking_at_all_of_them_finds(memory: Database, idents: set[str], n: int, data: Any) -> None:
    prefix = data.draw(st.sampled_from(sorted(idents)))[:n]
    with memory.engine.begin() as connection:
        connection.execute(delete(sweeps))
        connection.execute(insert(sweeps), [{**SWEEP, "id": ident} for ident in idents])
        having = [ident for ident in idents if ident.startswith(prefix)]
        if len(having) == 1:
            assert identifying.whole(connection, "sweep", prefix) == having[0]
        else:
            with pytest.raises(AmbiguousId):
                identifying.whole(connection, "sweep", prefix)
        for ident, short in identifying.shortest(connection, sorted(idents)).items():
            assert [other for other in idents if other.startswith(short)] == [ident]
