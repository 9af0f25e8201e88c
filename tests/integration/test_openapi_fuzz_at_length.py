"""Every operation of the OpenAPI document, asked for what it allows and forbids: the document tells the truth."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import schemathesis
from fuzzing import BY_CHANCE, DOCUMENT, FUZZ, WITHOUT_TOKENS, Target, ask, existing
from sqlalchemy import create_engine, make_url, text

from api.client import Client
from service.lab.access import Access, Caller
from service.store import Database

pytestmark = pytest.mark.slow

# Dozens of filters of the same kind each: their combinations are left to chance.
FILTERED = ("/v1/jobs", "/v1/results", "/v1/results:aggregate", "/v1/leaderboard", "/v1/correlations")
MANY_PARAMETERS = [{"include-path": path, "phases": {"coverage": {"enabled": False}}} for path in FILTERED]
OPEN = schemathesis.openapi.from_dict(
    WITHOUT_TOKENS, config=schemathesis.Config.from_dict({"operations": MANY_PARAMETERS})
)
GUARDED = schemathesis.openapi.from_dict(DOCUMENT, config=BY_CHANCE)


@pytest.fixture(scope="module")
def open_server(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """On SQLite, without tokens."""
    with start_server(tmp_path_factory.mktemp("open")) as server:
        yield Target(server.url, {}, existing(server.sweep("fuzzed"), server.client))


@pytest.fixture(scope="module")
def guarded_server(
    start_server: Any, postgresql_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """On PostgreSQL, with an administrator's token."""
    template = make_url(postgresql_template)
    name = f"test_{uuid4().hex}"
    administration = create_engine(template.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with administration.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template.database}"))
    url = template.set(database=name).render_as_string(hide_password=False)
    access = Access(Database(url))
    access.put_user("root", {"role": "admin"}, actor="root")
    secret = access.create_token("root", "fuzz", "admin", None, by=Caller("root"))["secret"]
    access.database.close()
    with start_server(tmp_path_factory.mktemp("guarded"), auth=True, database_url=url) as server:
        with Client(server.url, secret) as client:
            base = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
            sweep = client.sweep(name="fuzzed", base=base, grid={"scale": [1, 5]}).wait()
            yield Target(server.url, {"Authorization": f"Bearer {secret}"}, existing(sweep, client))
    with administration.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    administration.dispose()


@OPEN.parametrize()
@FUZZ
def test_without_tokens_on_sqlite(case: Any, open_server: Target) -> None:
    ask(case, open_server)


@GUARDED.parametrize()
@FUZZ
def test_with_tokens_on_postgresql(case: Any, guarded_server: Target) -> None:
    ask(case, guarded_server)
