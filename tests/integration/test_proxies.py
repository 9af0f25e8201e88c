"""Behind a proxy that shows the service under a path, strips it or not, and speaks TLS; and what clients accept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from api.client import Client
from api.http.app import create_app
from service.settings import Settings

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
PREFIX = "/lab/uncanny"


@pytest.fixture(scope="module")
def behind(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service that is told its prefix, with three jobs; asked for without the prefix, it is as if one stripped it."""
    with start_server(tmp_path_factory.mktemp("home"), dispatching=False, root_path=f"{PREFIX}/") as server:
        server.client.sweep(name="three", base=JOB, grid={"scale": [1, 2, 3]})
        yield server


@pytest.mark.parametrize("asked", ["", PREFIX], ids=["stripped", "not stripped"])
def test_every_address_that_is_given_has_the_prefix(behind: Any, asked: str) -> None:
    http = behind.http
    made = http.post(f"{asked}/v1/jobs", json=JOB)
    assert made.headers["Location"] == f"{PREFIX}/v1/jobs/{made.json()['id']}"
    assert http.get(made.headers["Location"]).json()["id"] == made.json()["id"]
    seen, path = [], f"{asked}/v1/jobs?limit=1"
    while path:
        page = http.get(path)
        seen += [job["id"] for job in page.json()["items"]]
        link = re.fullmatch(r'<(.*)>; rel="next"', page.headers.get("Link", ""))
        path = link.group(1) if link else ""
        assert not path or path.startswith(f"{PREFIX}/v1/jobs?")
    assert len(seen) == len(set(seen)) >= 4
    missing = http.get(f"{asked}/v1/nothing").json()
    assert (missing["instance"], f"see {PREFIX}/docs" in missing["detail"]) == (f"{PREFIX}/v1/nothing", True)


@pytest.mark.parametrize("path", ["/v1/jobs", "", "/", "/docs"])
def test_the_prefix_twice_is_nothing(behind: Any, path: str) -> None:
    answer = behind.http.get(f"{PREFIX}{PREFIX}{path}")
    assert answer.status_code == 404
    assert answer.json()["instance"] == f"{PREFIX}{PREFIX}{path}"
    assert f"see {PREFIX}/docs" in answer.json()["detail"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("asked", ["", PREFIX], ids=["stripped", "not stripped"])
def test_what_nobody_expected_has_the_prefix(tmp_path: Path, asked: str) -> None:
    app = create_app(Settings(home=tmp_path, root_path=PREFIX))
    app.state.insights = None
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
        answer = http.get(f"{asked}/v1/jobs")
    app.state.service.database.close()
    assert (answer.status_code, answer.json()["instance"]) == (500, f"{PREFIX}/v1/jobs")


@pytest.mark.parametrize("path", ["", "/", "/docs"])
def test_the_documentation_leads_to_the_document(behind: Any, path: str) -> None:
    page = behind.http.get(f"{PREFIX}{path}")
    assert page.status_code == 200
    [link] = re.findall("url: '([^']*)'", page.text)
    assert link == f"{PREFIX}/openapi.json"
    assert behind.http.get(link).json()["servers"] == [{"url": PREFIX}]


def test_the_client_takes_an_address_with_a_path(behind: Any) -> None:
    with Client(f"{behind.url}{PREFIX}/", user="ada") as client:
        job = client.submit(JOB, seed=1)
        assert job.status()["id"] == job.id
        assert len(list(client.jobs(limit=1))) >= 4
        assert next(client.events(job=job.id, follow=False)).kind == "job.submitted"


def test_no_answer_redirects(behind: Any) -> None:
    """A redirect would name the host, and `http` where the proxy speaks TLS: a token would go out in the clear."""
    for method in ("GET", "POST"):
        for path in ("/v1/jobs/", "/v1/sweeps/", "/docs/", f"{PREFIX}/v1/jobs/"):
            answer = behind.http.request(method, path, json=JOB, headers={"X-Forwarded-Proto": "https"})
            assert answer.status_code in (404, 405), path
            assert "Location" not in answer.headers


@pytest.mark.parametrize(
    "wrong", ["uncanny", "https://lab/uncanny", "/v1", "/v1/x", "/docs", "/a b", "//", "/a?b", "/ä"]
)
def test_a_prefix_is_a_path_that_is_none_of_the_services_own(wrong: str) -> None:
    if wrong == "//":
        assert Settings(root_path=wrong).root_path == ""
        return
    with pytest.raises(ValidationError, match="a path such as /uncanny"):
        Settings(root_path=wrong)
    assert Settings(root_path="/v12/").root_path == "/v12"


CSV, NDJSON, PARQUET = "text/csv", "application/x-ndjson", "application/vnd.apache.parquet"
JSON = "application/json"


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("text/csv", CSV),
        ("TEXT/CSV;Q=1.0", CSV),
        ("application/json;q=0.1, text/csv;q=0.9", CSV),
        ("text/csv;q=0.2, application/x-ndjson;q=0.5, */*;q=0.1", NDJSON),
        ("text/csv, */*", CSV),
        ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
        ("text/*", CSV),
        ("application/*;q=0.5, text/csv;q=0.4", JSON),
        ("application/json;q=0, */*", CSV),
        (f"text/csv;q=0, {NDJSON};q=0, {PARQUET}", PARQUET),
        ("application/x-ndjson;charset=utf-8", NDJSON),
        ("text/csv, application/json", CSV),
        ("text/html", None),
        ("application/json;q=0", None),
        ("text/csv;q=lots", None),
        ("*/*;q=0", None),
    ],
)
def test_results_come_as_the_client_likes_them_best(behind: Any, accept: str, given: str | None) -> None:
    answer = behind.http.get("/v1/results", headers={"Accept": accept})
    if given is None:
        assert (answer.status_code, answer.headers["Content-Type"]) == (406, "application/problem+json")
        assert all(media in answer.json()["detail"] for media in (JSON, CSV, NDJSON, PARQUET))
        assert behind.http.get("/v1/results?format=csv", headers={"Accept": accept}).status_code == 200
    else:
        assert answer.headers["Content-Type"].partition(";")[0] == given
        assert answer.headers["Vary"] == "Accept"


def test_what_cannot_be_given_is_refused_before_anything_is_done(behind: Any) -> None:
    before = behind.http.get("/v1/queue").json()["jobs"]
    for method, path, accept in (
        ("GET", "/v1/jobs", CSV),
        ("GET", "/v1/events?follow=false", JSON),
        ("GET", f"/v1/artifacts/{'0' * 64}", JSON),
        ("POST", "/v1/jobs", "text/html"),
    ):
        refused = behind.http.request(
            method, path, headers={"Accept": accept}, json=JOB | {"seed": 9} if method == "POST" else None
        )
        assert refused.status_code == 406, path
    assert behind.http.get("/v1/queue").json()["jobs"] == before
    assert httpx.get(f"{behind.url}/healthz", headers={"Accept": "*/*"}).status_code == 200


def test_settings_travel(tmp_path: Path) -> None:
    assert Settings(home=tmp_path, root_path="/lab/").environment()["UNCANNY_ROOT_PATH"] == "/lab"
