"""Every operation of the OpenAPI document, asked for what it allows and forbids: the document tells the truth."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from sqlalchemy import create_engine, make_url, text

from api.app import create_app
from api.client import Client
from service.access import Access, Caller
from service.settings import Settings
from service.store import Database

pytestmark = pytest.mark.slow

load_all_checks()
TRUTHS = CHECKS.get_by_names(
    [
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
        "response_headers_conformance", "allow_header_conformance", "unsupported_method",
    ]
)  # fmt: skip
REFUSALS = CHECKS.get_by_names(["negative_data_rejection"])
# Dozens of filters of the same kind each: their combinations are left to chance.
FILTERED = ("/v1/jobs", "/v1/results", "/v1/results:aggregate", "/v1/leaderboard", "/v1/correlations")
MANY_PARAMETERS = [{"include-path": path, "phases": {"coverage": {"enabled": False}}} for path in FILTERED]
DOCUMENT = create_app(Settings(home=Path("nowhere"))).openapi()
OPEN = schemathesis.openapi.from_dict(
    {**DOCUMENT, "components": {"schemas": DOCUMENT["components"]["schemas"]}},  # without tokens
    config=schemathesis.Config.from_dict({"operations": MANY_PARAMETERS}),
)
GUARDED = schemathesis.openapi.from_dict(
    DOCUMENT, config=schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": False}}})
)
FUZZ = settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Target:
    """Where requests go, with which token, and what exists there by the names of path parameters."""

    url: str
    headers: dict[str, str]
    existing: dict[str, str]


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


def existing(sweep: dict[str, Any], client: Any) -> dict[str, str]:
    job = next(client.jobs(sweep=sweep["id"]))
    task = client.job(job["id"])["tasks"][0]
    return {"job_id": job["id"], "sweep_id": sweep["id"], "task_id": task["id"]}


@OPEN.parametrize()
@FUZZ
def test_without_tokens_on_sqlite(case: Any, open_server: Target) -> None:
    ask(case, open_server)


@GUARDED.parametrize()
@FUZZ
def test_with_tokens_on_postgresql(case: Any, guarded_server: Target) -> None:
    ask(case, guarded_server)


def ask(case: Any, target: Target) -> None:
    """The case as it is, and with ids in its path that exist."""
    if case.path == "/v1/events":
        case.query = {**(case.query or {}), "follow": "false"}
    if would_wait(case.query or {}):
        case.query = {**case.query, "wait": 0}
    case.headers = {**(case.headers or {}), **target.headers}
    found = {name: target.existing[name] for name in case.path_parameters or {} if name in target.existing}
    for change in ({}, found) if found else ({},):
        case.path_parameters = {**(case.path_parameters or {}), **change}
        response = requests.request(**case.as_transport_kwargs(base_url=target.url), timeout=20)
        # It takes the percent sign of an escaped path for a part of the name, which it then calls invalid.
        escaped = "%" in response.request.path_url.partition("?")[0]
        unsent = any(value in ([], {}, None) for value in (case.query or {}).values())  # parameters without a value
        case.validate_response(response, checks=TRUTHS if escaped or unsent else TRUTHS + REFUSALS)


def would_wait(query: dict[str, Any]) -> bool:
    """Whether this is a wait that the service grants; one that it must refuse is left as it is."""
    try:
        return 0 <= float(str(query.get("wait"))) <= 60
    except ValueError:
        return False
