"""Asking again for what one has: `HEAD`, `ETag`, `If-None-Match`, on every route of the OpenAPI document."""

import hashlib
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
ASKING = {"/v1/results:compare": "ids", "/v1/results:trajectories": "ids"}  # which need to be told of what
CHANGING = {"/v1/cluster", "/v1/events"}  # by themselves, or never the same


@pytest.fixture(scope="module")
def paths(server: Any) -> list[str]:
    """Every path that can be read, of a job that is done, its sweep, a task and an artifact."""
    sweep = server.sweep("conditional", seed=140, scale=[1])
    job = next(server.client.jobs(sweep=sweep["id"]))["id"]
    data = b"bytes to be read again"
    digest = hashlib.sha256(data).hexdigest()
    server.http.put(f"/v1/artifacts/{digest}", content=data)
    found = {
        "job_id": job,
        "sweep_id": sweep["id"],
        "digest": digest,
        "task_id": server.client.job(job)["tasks"][0]["id"],
    }
    document = server.http.get("/openapi.json").json()["paths"]
    readable = [path for path, operations in document.items() if "get" in operations and path != "/v1/events"]
    return [
        path.format(**found) + (f"?{ASKING[path]}={job}" if path in ASKING else "")
        for path in [*readable, "/openapi.json"]
    ]


def answers(http: httpx.Client, paths: list[str]) -> list[tuple[str, httpx.Response]]:
    """What they answer; those that need more parameters than this test knows of refuse, which is an answer too."""
    return [(path, http.get(path)) for path in paths]


def test_head_says_what_get_does(server: Any, paths: list[str]) -> None:
    for path, got in answers(server.http, paths):
        headed = server.http.head(path)
        assert headed.status_code == got.status_code, path
        assert headed.content == b""
        assert set(headed.headers) == set(got.headers), path
        assert headed.headers.get("content-type") == got.headers.get("content-type")


def test_what_one_has_is_not_sent_again(server: Any, paths: list[str]) -> None:
    server.idle()
    compared = 0
    for path, got in answers(server.http, paths):
        if got.status_code != 200 or path in CHANGING:
            continue
        tag = got.headers["ETag"]
        for method in ("GET", "HEAD"):
            for held in (tag, f'"other", W/{tag}', "*"):
                again = server.http.request(method, path, headers={"If-None-Match": held})
                assert (again.status_code, again.content) == (304, b""), (method, path, held)
                assert again.headers["Cache-Control"] == got.headers["Cache-Control"]
        assert server.http.get(path, headers={"If-None-Match": '"other"'}).content == got.content
        compared += 1
    assert compared >= 18


def test_a_job_that_goes_on_has_another_tag_though_it_can_be_changed_with_the_old_one(server: Any) -> None:
    server.client.pause()
    try:
        path = f"/v1/jobs/{server.client.submit(JOB, seed=141).id}"
        first = server.http.get(path)
    finally:
        server.client.resume()
    server.ended(path)
    done = server.http.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (done.status_code, done.json()["state"]) == (200, "succeeded")
    assert done.headers["ETag"] != first.headers["ETag"]
    body = {"labels": {"seen": "early"}}
    assert server.http.patch(path, json=body, headers={"If-Match": first.headers["ETag"]}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/events?after=0", "/v1/results?format=csv", "/v1/results?format=parquet"])
def test_head_of_a_stream_ends_at_once(server: Any, path: str) -> None:
    response = server.http.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert "ETag" not in response.headers


def test_where_there_is_no_get_there_is_no_head(server: Any) -> None:
    response = server.http.head("/v1/queue:pause")
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
