"""Every route with what it is for and with what it refuses, over real HTTP."""

import errno
import hashlib
import io
import json
import os
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from fastapi.testclient import TestClient

from api.http.app import create_app
from service.lab.artifacts import MARK
from service.settings import Settings
from service.store import Database
from service.store.result_fields import RESULTS

JOB = {
    "architecture": "simple_cnn",
    "dataset": "digits",
    "scale": 5,
    "attack": {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10},
    "recipe": {"name": "standard", "epochs": 2},
    "samples": 20,
}


def refused(response: Any, status: int = 422) -> dict[str, Any]:
    """The problem document of a response that must be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def pointers(problem: dict[str, Any]) -> dict[str, str]:
    return {error.get("pointer", error.get("parameter")): error["detail"] for error in problem["errors"]}


def test_a_job_from_submission_to_result(server: Any) -> None:
    response = server.http.post("/v1/jobs", json=JOB, headers={"X-Uncanny-User": "grace"})
    assert response.status_code == 201
    location = response.headers["location"]
    assert location == f"/v1/jobs/{response.json()['id']}"

    job = server.ended(location)
    assert (job["state"], job["user"], job["progress"]) == ("succeeded", "grace", 1.0)
    assert job["spec"]["attack"]["eps"] == 8 / 255
    assert job["created_at"].endswith("Z")
    assert {role for task in job["tasks"] for role in task["roles"]} == {
        "train", "closed_forms", "attack", "baseline", "control",
    }  # fmt: skip

    result = server.http.get(f"/v1/results/{job['id']}").json()
    assert result["robust_accuracy"] == 0.5
    assert result["verdict"] == job["verdict"]
    assert set(result["parts"]) == {"train", "closed_forms", "attack", "baseline", "control"}
    assert result["parts"]["attack"]["provenance"]["torch"] == "0.0"
    assert result["parts"]["attack"]["curves"] == ["trajectory"]

    curves = server.http.get(f"/v1/results/{job['id']}/trajectory").json()["curves"]
    assert curves["attack"]["trajectory"]["step"] == [0, 1]
    assert curves["train"]["epochs"]["loss"] == [1.0, 0.5]


def test_a_task_shows_how_its_digest_came_about(server: Any) -> None:
    digest = server.http.post("/v1/jobs", json=JOB).json()["tasks"][0]
    task = server.http.get(f"/v1/tasks/{digest}").json()
    assert hashlib.sha256(task["canonical"].encode()).hexdigest() == digest == task["digest"]
    assert server.http.get(f"/v1/tasks/{task['id']}").json()["digest"] == digest
    assert task["kind"] == "train"
    assert all(attempt["number"] for attempt in task["attempts"])
    refused(server.http.get(f"/v1/tasks/{'0' * 64}"), 404)


def test_unknown_names_are_refused_with_the_known_ones(server: Any) -> None:
    for field, value, known in [
        ("architecture", "resnet19", "resnet18"),
        ("dataset", "cifar11", "cifar10"),
        ("attack", "pgd_l3", "pgd_l2"),
        ("attack", {"type": "pgq"}, "pgd"),
        ("recipe", "standrad", "standard"),
        ("measures", ["sharpnes"], "closed_forms"),
    ]:
        problem = refused(server.http.post("/v1/jobs", json={**JOB, field: value}))
        assert known in pointers(problem)[f"/{field}"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"attack": {**JOB["attack"], "eps": "9/0"}}, "/attack/eps"),  # type: ignore[dict-item]
        ({"scale": 0}, "/scale"),
        ({"scale": "five"}, "/scale"),
        ({"samples": 0}, "/samples"),
        ({"samples": 501}, "/samples"),
        ({"colour": "red"}, "/colour"),
        ({"recipe": {"epochs": -1}}, "/recipe/epochs"),
        ({"attack": {"type": "pgd", "norm": "linf", "eps": 1}}, "/attack/steps"),
        ({"pgd": 5}, "/pgd"),
        ({"a/b~c": 5}, "/a~1b~0c"),
        ({"attack": {**JOB["attack"], "margin": 1}}, "/attack/margin"),  # type: ignore[dict-item]
        ({"attack": {**JOB["attack"], "eps": "1e-400"}}, "/attack/eps"),  # type: ignore[dict-item]
        ({"attack": {**JOB["attack"], "random_start": 1}}, "/attack/random_start"),  # type: ignore[dict-item]
        ({"scale_bias": "yes"}, "/scale_bias"),
        ({"architecture": "vgg11_bn"}, "/architecture"),
        ({"attack": {**JOB["attack"], "norm": "l2", "eps": 9}}, "/attack/eps"),  # type: ignore[dict-item]
        ({"measures": ["sam_sharpness", {"type": "fisher_rao", "images": True}]}, "/measures/1/images"),
    ],
)
def test_bad_values_are_refused_with_their_pointer(server: Any, change: dict[str, Any], pointer: str) -> None:
    body = json.dumps({**JOB, **change})
    response = server.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert pointer in pointers(refused(response))


@pytest.mark.parametrize(
    ("body", "status"), [("", 400), ("{", 400), ("\xff\xfe", 400), ("[]", 422), ("null", 422), ('"job"', 422)]
)
def test_what_is_no_json_object_is_refused(server: Any, body: str, status: int) -> None:
    other = 415 if body else 400
    for kind, expected in (
        ("application/json", status), ("application/json; charset=utf-8", status), ("", other), ("text/plain", other),
    ):  # fmt: skip
        headers = {"Content-Type": kind} if kind else {}
        refused(server.http.post("/v1/jobs", content=body.encode("latin-1"), headers=headers), expected)


def test_how_many_jobs_a_sweep_may_have_is_a_setting(start_server: Any, tmp_path: Path) -> None:
    base = {name: value for name, value in JOB.items() if name != "scale"}
    with start_server(tmp_path, dispatching=False, max_sweep_jobs=2) as server:

        def sent(*scales: int, dry_run: bool = False) -> Any:
            sweep = {"name": "few", "base": base, "grid": {"scale": scales}}
            return server.http.post("/v1/sweeps", params={"dry_run": dry_run}, json=sweep)

        for dry_run in (True, False):
            assert "at most 2" in pointers(refused(sent(1, 2, 3, dry_run=dry_run)))["/grid"]
        made = sent(1, 2).json()["id"]
        longer = server.http.post(f"/v1/sweeps/{made}:extend", json={"grid": {"scale": [3]}})
        assert "at most 2" in pointers(refused(longer))["/grid"]


def test_who_is_asking_comes_before_what_was_sent(start_server: Any, tmp_path: Path) -> None:
    with start_server(tmp_path, dispatching=False, auth=True) as server:
        for body, kind in (("", "application/json"), ("x", "text/plain"), ("[]", "application/json")):
            headers = {"Content-Type": kind}
            refused(server.http.post("/v1/jobs", content=body, headers=headers), 401)


@pytest.mark.parametrize(
    ("change", "pointer", "meant"),
    [
        ({"sample": 5}, "/sample", "samples"),
        ({"recipe": {"epoch": 5}}, "/recipe/epoch", "epochs"),
        ({"attack": {**JOB["attack"], "stepsize": 0.1}}, "/attack/stepsize", "step_size"),  # type: ignore[dict-item]
        ({"attack": {"type": "cw", "eps": 0.1}}, "/attack/eps", "this kind of attack has no 'eps'"),
    ],
)
def test_a_field_that_there_is_not_is_told_what_was_meant(
    server: Any, change: dict[str, Any], pointer: str, meant: str
) -> None:
    assert meant in pointers(refused(server.http.post("/v1/jobs", json={**JOB, **change})))[pointer]
    base = {name: value for name, value in {**JOB, **change}.items() if name != "seed"}
    sweep = {"name": "typo", "base": base, "grid": {"seed": [1, 2]}}
    assert meant in pointers(refused(server.http.post("/v1/sweeps", json=sweep)))[f"/base{pointer}"]


def test_samples_left_out_are_a_thousand_or_the_whole_test_set(server: Any) -> None:
    """And the same computation as the same number written out."""
    job = {name: value for name, value in JOB.items() if name != "samples"}
    made = server.http.post("/v1/jobs", json={**job, "seed": 412}).json()
    spec = server.http.get(f"/v1/jobs/{made['id']}").json()["spec"]
    assert spec["samples"] == 500
    assert server.http.post("/v1/jobs", json={**job, "seed": 412, "samples": 500}).json()["tasks"] == made["tasks"]
    sweep = {"name": "left out", "base": job, "grid": {"seed": [412]}, "include": [{"seed": 412, "samples": 500}]}
    preview = server.http.post("/v1/sweeps", params={"dry_run": "true"}, json=sweep).json()
    assert (preview["jobs"], preview["repetitions"]) == (1, 1)


def test_sweeps(server: Any) -> None:
    body = {
        "name": "two scales",
        "base": {k: v for k, v in JOB.items() if k != "scale"} | {"seed": 5},
        "grid": {"scale": [1, 5], "attack": ["pgd_l2", "pgd_linf"]},
        "labels": {"paper": "yes"},
    }
    preview = server.http.post("/v1/sweeps", params={"dry_run": "true"}, json=body)
    assert preview.status_code == 200
    assert preview.json()["tasks"] == {"train": 1, "measure": 2, "attack": 4, "control": 2}
    assert preview.json()["to_compute"]["train"] == 1

    accepted = server.http.post("/v1/sweeps", json=body)
    assert accepted.status_code == 201
    sweep = server.ended(accepted.headers["location"])
    assert (sweep["state"], sweep["progress"], sweep["jobs"]["total"]) == ("succeeded", 1.0, 4)
    assert sweep["tasks"] == {**dict.fromkeys(sweep["tasks"], 0), "total": 9, "succeeded": 9}
    assert sweep["spec"]["grid"]["scale"] == [1, 5]
    assert any(item["id"] == sweep["id"] for item in server.http.get("/v1/sweeps").json()["items"])

    jobs = server.http.get("/v1/jobs", params={"sweep": sweep["id"], "label": "paper:yes", "attack.norm": "l2"}).json()
    assert len(jobs["items"]) == 2
    again = server.http.post("/v1/sweeps", json=body).json()
    assert again["to_compute"] == {"train": 0, "measure": 0, "attack": 0, "control": 0}
    assert server.http.get(f"/v1/sweeps/{again['id']}").json()["state"] == "succeeded"


def test_a_sweep_is_refused_as_a_whole_and_names_the_field(server: Any) -> None:
    base = {key: value for key, value in JOB.items() if key != "scale"}
    million = {"seed": list(range(10_000)), "scale": [1 + i / 1000 for i in range(1000)]}
    for body, pointer in [
        ({"name": "x", "base": base, "grid": million}, "/grid"),
        ({"name": "x", "base": base, "grid": {"scale": [1, 0]}}, "/grid/scale/1"),
        ({"name": "x", "base": base, "grid": {"scale": [1]}, "include": [{}, {"seed": -1}]}, "/include/1/seed"),
        ({"name": "x", "base": base, "grid": {"scale": []}}, "/grid/scale"),
        ({"name": "x", "base": {**base, "architecture": "resnet19"}, "grid": {"scale": [1]}}, "/base/architecture"),
        ({"name": "x", "base": base}, "/grid"),
        ({"name": "", "base": base, "grid": {"scale": [1]}}, "/name"),
        ({"name": "x", "base": {**base, "dataset": "npz:nowhere"}, "grid": {"scale": [1]}}, None),
    ]:
        found = pointers(refused(server.http.post("/v1/sweeps", json=body)))
        assert pointer is None or any(key.startswith(pointer) for key in found), found


def test_a_failed_training_fails_its_jobs_and_no_others(server: Any) -> None:
    base = {**JOB, "architecture": "mlp"}
    body = {"name": "one diverges", "base": base, "grid": {"seed": [1, 666]}}
    sweep = server.http.post("/v1/sweeps", json=body).json()
    done = server.ended(f"/v1/sweeps/{sweep['id']}")
    assert (done["state"], done["jobs"]["succeeded"], done["jobs"]["failed"]) == ("failed", 1, 1)
    [failed] = server.http.get("/v1/jobs", params={"sweep": sweep["id"], "state": "failed"}).json()["items"]
    assert "diverged in epoch 1" in failed["reason"]
    problem = refused(server.http.get(f"/v1/results/{failed['id']}"), 404)
    assert "diverged in epoch 1" in problem["detail"]

    retried = server.http.post(f"/v1/jobs/{failed['id']}:retry")
    assert retried.status_code == 200
    again = server.ended(f"/v1/jobs/{failed['id']}")
    assert again["state"] == "failed"
    assert max(task["attempt"] for task in again["tasks"]) == 2
    retried = server.http.post(f"/v1/sweeps/{sweep['id']}:retry-failed").json()
    assert (retried["jobs"], retried["states"]) == (1, {"failed": 1, "held": 0, "cancelled": 0})
    bad = server.http.post(f"/v1/sweeps/{sweep['id']}:retry-failed", params={"states": "failed,canceled"})
    assert "did you mean cancelled?" in refused(bad, 422)["detail"]


def test_cancelling(server: Any) -> None:
    job = server.http.post("/v1/jobs", json={**JOB, "seed": 777}).json()
    cancelled = server.http.post(f"/v1/jobs/{job['id']}:cancel")
    assert cancelled.json()["state"] == "cancelled"
    refused(server.http.post(f"/v1/jobs/{job['id']}:cancel"), 409)
    refused(server.http.post(f"/v1/jobs/{uuid4()}:cancel"), 404)
    refused(server.http.post(f"/v1/sweeps/{uuid4()}:cancel"), 404)

    sweep = server.http.post(
        "/v1/sweeps", json={"name": "slow", "base": {**JOB, "seed": 777}, "grid": {"scale": [1, 2]}}
    )
    assert server.http.post(f"{sweep.headers['location']}:cancel").json()["jobs"] == 2
    assert server.http.get(sweep.headers["location"]).json()["state"] == "cancelled"


def test_idempotency(server: Any) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    first = server.http.post("/v1/jobs", json=JOB, headers=key)
    again = server.http.post("/v1/jobs", json=JOB, headers=key)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    refused(server.http.post("/v1/jobs", json={**JOB, "scale": 7}, headers=key))
    other = server.http.post("/v1/jobs", json=JOB, headers={**key, "X-Uncanny-User": "grace"})
    assert other.json()["id"] != first.json()["id"]
    assert server.http.post("/v1/jobs", json=JOB).json()["id"] != first.json()["id"]
    refused(server.http.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "x" * 300}))


def test_two_requests_with_one_key_at_once(server: Any) -> None:
    body = {"name": "at once", "base": JOB, "grid": {"scale": [1, 2, 3]}}
    key = {"Idempotency-Key": str(uuid4())}
    ids: list[str] = []

    def submit() -> None:
        ids.append(server.http.post("/v1/sweeps", json=body, headers=key).json()["id"])

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6
    assert len(set(ids)) == 1


def test_results_in_pages_stay_stable_while_rows_are_inserted(server: Any) -> None:
    sweep = server.sweep("pages", scale=[1, 2, 3, 4, 5, 6, 7])
    seen: list[float] = []
    params: dict[str, Any] = {"sweep": sweep["id"], "limit": 3, "sort": "scale"}
    while True:
        page = server.http.get("/v1/results", params=params).json()
        seen += [row["scale"] for row in page["items"]]
        server.sweep("inserted meanwhile", scale=[len(seen) + 0.5])
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    newest = server.http.get("/v1/results", params={"sweep": sweep["id"], "limit": 1000}).json()["items"]
    assert [row["scale"] for row in newest] == [7, 6, 5, 4, 3, 2, 1]


def test_results_are_filtered_sorted_and_cut_to_fields(server: Any) -> None:
    sweep = server.sweep("fields", scale=[1, 50], attack=["pgd_l2", "pgd_linf"])
    of_it = {"sweep": sweep["id"]}

    def rows(**params: Any) -> list[dict[str, Any]]:
        response = server.http.get("/v1/results", params={**of_it, **params})
        assert response.status_code == 200, response.text
        items: list[dict[str, Any]] = response.json()["items"]
        return items

    assert len(rows()) == 4
    assert [row["scale"] for row in rows(sort="-robust_accuracy")] == [50, 50, 1, 1]
    assert {row["attack"]["norm"] for row in rows(**{"attack.norm": "l2"})} == {"l2"}
    assert {row["attack"]["eps"] for row in rows(**{"attack.eps": "8/255"})} == {8 / 255}
    assert len(rows(scale=["1", "50"])) == 4
    assert len(rows(verdict="invalid")) == 2
    assert rows(scale="50.0", norm="l2", fields="scale,attack.norm,flip_rate,loss_increase_q95") == [
        {"scale": 50.0, "attack": {"norm": "l2"}, "flip_rate": 0.5, "loss_increase_q95": 3.0}
    ]
    [row] = rows(scale=1, norm="linf")
    assert "loss_increase_q95" not in row  # quantiles are shown to who asks for them
    assert row["flip_rate"] == 0.5
    assert row["provenance"]["torch"] == "0.0"
    assert "loss_increase_q95" in rows(scale=1, norm="linf", fields="*")[0]


def test_results_as_csv_and_ndjson(server: Any) -> None:
    sweep = server.sweep("formats", scale=[1, 2, 3])
    params = {"sweep": sweep["id"], "sort": "scale"}
    text = server.http.get("/v1/results", params=params, headers={"Accept": "text/csv"})
    assert text.headers["content-type"].startswith("text/csv")
    header, *lines = text.text.splitlines()
    assert {"job_id", "attack.norm", "attack.eps", "robust_accuracy", "verdict"} <= set(header.split(","))
    assert len(lines) == 3
    lines = server.http.get("/v1/results", params={**params, "format": "ndjson"}).text.splitlines()
    assert [json.loads(line)["scale"] for line in lines] == [1, 2, 3]
    chosen = server.http.get("/v1/results", params={**params, "format": "csv", "fields": "scale,attack.norm"}).text
    assert chosen.splitlines() == ["scale,attack.norm", "1.0,linf", "2.0,linf", "3.0,linf"]
    empty = server.http.get("/v1/results", params={"seed": 987654, "format": "csv", "fields": "scale"}).text
    assert empty.splitlines() == ["scale"]


@pytest.mark.parametrize("format", ["csv", "ndjson", "parquet"])
def test_an_export_says_how_many_retracted_results_it_leaves_out(server: Any, format: str) -> None:
    sweep = server.sweep(f"hidden {format}", scale=[1, 2, 3], seed=["csv", "ndjson", "parquet"].index(format) + 340)
    params = {"sweep": sweep["id"], "format": format, "fields": "job_id"}

    def hidden(**more: Any) -> str | None:
        answer = server.http.get("/v1/results", params={**params, **more})
        assert answer.status_code == 200, answer.text
        count: str | None = answer.headers.get("x-uncanny-retracted")
        return count

    assert hidden() == "0"
    [first] = server.client.results(sweep=sweep["id"], scale=2, fields="job_id")
    server.client.retract(first["job_id"], "the attack was wrong")
    assert (hidden(), hidden(scale=1), hidden(include_retracted=True)) == ("1", "0", None)


@pytest.mark.parametrize(
    ("path", "parameter", "listed"),
    [
        ("/v1/results?colour=red", "colour", "attack.norm"),
        ("/v1/results?sort=colour", "sort", "robust_accuracy"),
        ("/v1/results?fields=colour", "fields", "masked_fraction"),
        ("/v1/results?fields=robust_acuracy", "fields", "did you mean robust_accuracy"),
        ("/v1/results?limit=1001", "limit", "1000"),
        ("/v1/results?scale=five", "scale", "fraction"),
        ("/v1/results?recipe.epochs=2.5", "recipe.epochs", "whole number"),
        ("/v1/results?recipe.epochs=99999999999999999999", "recipe.epochs", "whole number"),
        ("/v1/results?scale_bias=maybe", "scale_bias", "true nor false"),
        ("/v1/results?format=xml", "format", "csv"),
        ("/v1/results?cursor=abc", "cursor", "next_cursor"),
        ("/v1/results?cursor=abc&format=ndjson", "cursor", "next_cursor"),
        ("/v1/results?scale=five&format=ndjson", "scale", "fraction"),
        ("/v1/results?scale=five&format=csv", "scale", "fraction"),
        ("/v1/jobs?label=x", "label", "key:value"),
        ('/v1/jobs?label=a"b:x', "label", "labels.KEY"),
        ("/v1/jobs?label=a%00b:x", "label", "labels.KEY"),
        ("/v1/jobs?sort=labels.a%00b", "sort", "labels.KEY"),
        ('/v1/results?sort=verdict_checks.a"b', "sort", "verdict_checks.masked"),
        ("/v1/jobs?verbose=1", "verbose", "architecture"),
        ("/v1/sweeps?state=running", "state", "cursor"),
        ("/v1/sweeps?dry_run=1", "dry_run", "limit"),
        ("/v1/catalog?x=1", "x", "none"),
        ("/v1/results?sort=created_at,nonsense", "sort", "unknown field"),
        (f"/v1/results?sort={','.join(list(RESULTS.known)[:9])}", "sort", "between 1 and 8"),
        (f"/v1/results?fields={','.join(f'labels.{i}' for i in range(201))}", "fields", "at most 200"),
        (f"/v1/results:aggregate?metrics={','.join(f'm{i}' for i in range(300))}", "metrics", "at most 20"),
        (f"/v1/jobs?{'&'.join(['label=a:b'] * 999)}", "filter", "more than 200 comparisons"),
        (f"/v1/events?follow=false&after={2**63}", "after", "less than or equal to"),
    ],
)
def test_bad_questions_name_the_parameter(server: Any, path: str, parameter: str, listed: str) -> None:
    problem = refused(server.http.get(path))
    assert listed in pointers(problem)[parameter]


def test_a_cursor_belongs_to_its_question(server: Any) -> None:
    sweep = server.sweep("cursor", scale=[1, 2, 3])
    params = {"sweep": sweep["id"], "limit": 1}
    cursor = server.http.get("/v1/results", params=params).json()["next_cursor"]
    assert server.http.get("/v1/results", params={**params, "cursor": cursor}).status_code == 200
    problem = refused(server.http.get("/v1/results", params={**params, "sort": "scale", "cursor": cursor}))
    assert "another question" in problem["detail"]


def test_jobs_in_pages(server: Any) -> None:
    sweep = server.sweep("jobs in pages", scale=[1, 2, 3, 4, 5])
    params: dict[str, Any] = {"sweep": sweep["id"], "limit": 2, "sort": "created_at"}
    seen = []
    while True:
        page = server.http.get("/v1/jobs", params=params).json()
        seen += [job["spec"]["scale"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/jobs", 404),
        ("GET", "/v1/jobs/nothing", 404),
        ("GET", "/v1/sweeps/nothing", 404),
        ("GET", "/v1/results/nothing", 404),
        ("GET", "/v1/results/nothing/trajectory", 404),
        ("GET", "/v1/tasks/nothing", 404),
        ("GET", f"/v1/artifacts/{'0' * 64}", 404),
        ("GET", "/v1/artifacts/nothing", 422),
        ("GET", "/v1/events?sweep=nothing", 404),
        ("DELETE", "/v1/jobs", 405),
        ("POST", "/healthz", 405),
        ("PUT", "/v1/jobs/1:cancel", 405),
    ],
)
def test_whatever_is_refused_is_a_problem_document(server: Any, method: str, path: str, status: int) -> None:
    response = server.http.request(method, path)
    problem = refused(response, status)
    assert problem["instance"] == path.partition("?")[0]
    assert status != 405 or response.headers["allow"]


def test_methods_that_a_path_offers_are_all_named(server: Any) -> None:
    assert server.http.delete("/v1/jobs").headers["allow"] == "POST, GET, HEAD"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/sweeps", "/v1/results", "/v1/catalog", "/v1/queue", "/readyz"])
def test_what_is_polled_is_sent_once(server: Any, path: str) -> None:
    server.idle()
    first = server.http.get(path)
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = server.http.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert server.http.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    head = server.http.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)
    assert head.headers["content-length"] == str(len(first.content))


def test_a_tag_changes_with_the_answer(server: Any) -> None:
    server.client.pause()
    try:
        job = server.client.submit(architecture="mlp", dataset="digits", attack="pgd_l2", samples=20, seed=130)
        before = server.http.get(f"/v1/jobs/{job.id}").headers["etag"]
    finally:
        server.client.resume()
    job.wait()
    assert server.http.get(f"/v1/jobs/{job.id}", headers={"If-None-Match": before}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/events?after=0", "/v1/results?format=csv", "/docs", "/openapi.json"])
def test_head_of_a_stream_ends(server: Any, path: str) -> None:
    head = server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert server.http.head("/v1/jobs/nothing").status_code == 404


def test_a_range_of_an_artifact(server: Any) -> None:
    data = bytes(range(256)) * 8192
    digest = hashlib.sha256(data).hexdigest()
    server.http.put(f"/v1/artifacts/{digest}", content=data)

    def ranged(text: str) -> Any:
        return server.http.get(f"/v1/artifacts/{digest}", headers={"Range": text})

    for text, part, said in (
        ("bytes=0-0", data[:1], f"bytes 0-0/{len(data)}"),
        ("bytes=100-2000099", data[100:2000100], f"bytes 100-2000099/{len(data)}"),
        ("bytes=-5", data[-5:], f"bytes {len(data) - 5}-{len(data) - 1}/{len(data)}"),
        (f"bytes={len(data) - 2}-", data[-2:], f"bytes {len(data) - 2}-{len(data) - 1}/{len(data)}"),
        ("bytes=0-99999999", data, f"bytes 0-{len(data) - 1}/{len(data)}"),
    ):
        found = ranged(text)
        assert (found.status_code, found.headers["content-range"], found.content) == (206, said, part)
    for whole in ("bytes=0-1,5-6", "lines=1-2", "bytes=9-2", "bytes=-"):
        found = ranged(whole)
        assert (found.status_code, found.content) == (200, data)
    beyond = ranged(f"bytes={len(data)}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(data)}")
    known = server.http.get(f"/v1/artifacts/{digest}", headers={"If-None-Match": f'"{digest}"'})
    assert (known.status_code, known.content) == (304, b"")


def test_datasets_and_artifacts(server: Any) -> None:
    files = {split: npz_bytes(n) for split, n in (("train", 12), ("test", 6))}
    digests = {split: hashlib.sha256(data).hexdigest() for split, data in files.items()}
    body = {"name": "tiny", **{f"{split}_sha256": digest for split, digest in digests.items()}}
    problem = refused(server.http.post("/v1/datasets", json=body))
    assert set(pointers(problem)) == {"/train_sha256", "/test_sha256"}

    for split, data in files.items():
        for _ in range(2):
            uploaded = server.http.put(f"/v1/artifacts/{digests[split]}", content=data)
            assert (uploaded.status_code, uploaded.json()["size_bytes"]) == (201, len(data))
    assert server.http.get(f"/v1/artifacts/{digests['train']}").content == files["train"]

    registered = server.http.post("/v1/datasets", json=body)
    assert registered.status_code == 201
    assert registered.json()["name"] == "npz:tiny"
    assert (registered.json()["train_count"], registered.json()["classes"]) == (12, 3)
    assert 0 <= registered.json()["test_images_in_train"] <= 6
    alike = {**body, "name": "alike", "test_sha256": digests["train"]}
    assert "same file" in pointers(refused(server.http.post("/v1/datasets", json=alike)))["/test"]
    assert server.http.post("/v1/datasets", json=body).status_code == 201
    other = {**body, "train_sha256": digests["test"], "test_sha256": digests["train"]}
    refused(server.http.post("/v1/datasets", json=other), 409)
    assert any(row["name"] == "npz:tiny" for row in server.http.get("/v1/datasets").json()["items"])
    assert any(row["name"] == "npz:tiny" for row in server.http.get("/v1/catalog").json()["registered_datasets"])

    job = {**JOB, "dataset": "npz:tiny", "samples": 6}
    assert server.http.post("/v1/jobs", json=job).status_code == 201
    assert "/samples" in pointers(refused(server.http.post("/v1/jobs", json={**job, "samples": 7})))
    unknown = refused(server.http.post("/v1/jobs", json={**job, "dataset": "npz:nope"}))
    assert "npz:tiny" in pointers(unknown)["/dataset"]


def test_an_upload_with_another_digest_leaves_nothing(server: Any) -> None:
    digest = hashlib.sha256(b"what was promised").hexdigest()
    problem = refused(server.http.put(f"/v1/artifacts/{digest}", content=b"something else"))
    assert hashlib.sha256(b"something else").hexdigest() in problem["detail"]
    refused(server.http.get(f"/v1/artifacts/{digest}"), 404)
    refused(server.http.get(f"/v1/artifacts/{hashlib.sha256(b'something else').hexdigest()}"), 404)


def test_files_that_are_no_data_set_are_refused(server: Any) -> None:
    digest = hashlib.sha256(b"no npz").hexdigest()
    server.http.put(f"/v1/artifacts/{digest}", content=b"no npz")
    body = {"name": "broken", "train_sha256": digest, "test_sha256": digest}
    refused(server.http.post("/v1/datasets", json=body))
    refused(server.http.post("/v1/datasets", json={**body, "name": "../up"}))
    refused(server.http.post("/v1/datasets", json={"name": "broken"}))


def test_bodies_have_a_limit(server: Any) -> None:
    huge = b'{"name": "' + b"x" * (server.settings.max_body_bytes + 1) + b'"}'
    headers = {"Content-Type": "application/json"}
    refused(server.http.post("/v1/sweeps", content=huge, headers=headers), 413)
    chunks = (huge[i : i + 65536] for i in range(0, len(huge), 65536))
    refused(server.http.post("/v1/sweeps", content=chunks, headers=headers), 413)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_uploads_have_a_limit(start_server: Any, tmp_path: Path, whole: bool) -> None:
    data = b"x" * 300_000
    digest = hashlib.sha256(data).hexdigest()
    with start_server(tmp_path, dispatching=False, max_upload_bytes=200_000) as server:
        content = data if whole else (data[i : i + 50_000] for i in range(0, len(data), 50_000))
        said = refused(server.http.put(f"/v1/artifacts/{digest}", content=content), 413)
        assert "larger than 200,000 bytes" in str(said)
        assert server.http.get(f"/v1/artifacts/{digest}").status_code == 404
        small = hashlib.sha256(data[:1000]).hexdigest()
        assert server.http.put(f"/v1/artifacts/{small}", content=data[:1000]).is_success
        root = Path(server.settings.artifacts)
        sizes = [file.stat().st_size for file in root.rglob("*") if file.is_file() and file.name != MARK]
        assert sizes == [1000]


def test_every_listing_leads_to_its_next_page(server: Any) -> None:
    server.sweep("three", seed=811, scale=[1, 2, 3])
    for name in ("one", "two"):
        server.client.sweep(name=name, base=JOB, grid={"scale": [1]})
    for path in ("/v1/jobs", "/v1/results", "/v1/sweeps"):
        first = server.http.get(path, params={"limit": 1, "user": "ada"})
        second = server.http.get(first.links["next"]["url"])
        ids = [str(page.json()["items"][0].get("id") or page.json()["items"][0]["job_id"]) for page in (first, second)]
        assert len(set(ids)) == 2
        assert "user=ada" in first.links["next"]["url"]
        with_all = server.http.get(path, params={"limit": 1000, "user": "ada"})
        assert "next" not in with_all.links or len(with_all.json()["items"]) == 1000


def test_the_catalogue(server: Any) -> None:
    found = server.http.get("/v1/catalog").json()
    assert {"simple_cnn", "mlp", "resnet18"} <= set(found["architectures"])
    assert {"digits", "cifar10", "synthetic"} <= set(found["datasets"])
    assert "standard" in found["recipes"]
    assert {"pgd_l2", "pgd_linf"} <= set(found["attack_presets"])
    assert found["recipe_presets"]["trades_literature"] == {
        "name": "trades", "weight_decay": 5e-4, "keep": "best", "held_out": 1000,
    }  # fmt: skip
    assert found["attacks"]["pgd"]["parameters"]["steps"]["minimum"] == 1
    assert "closed_forms" in found["measures"]
    assert "relative_sharpness" in found["always_measured"]
    columns = {column: number for number in found["numbers"] for column in number["columns"]}
    assert (columns["robust_accuracy"]["low"], columns["robust_accuracy"]["high"]) == (0, 1)
    assert columns["train_seconds"]["task_kind"] == "train"


def test_health(server: Any) -> None:
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json()["dispatcher_leads"] is True
    cluster = server.http.get("/v1/cluster").json()
    assert (cluster["leading"], cluster["dispatcher"]) == (True, "dispatcher-of-tests")
    assert "succeeded" in server.http.get("/v1/queue").json()["jobs"]


def test_a_bad_last_event_id_is_refused(server: Any) -> None:
    for ident in (str(2**63), "-1", "x"):
        refused(server.http.get("/v1/events", params={"follow": False}, headers={"Last-Event-ID": ident}))
    last = {"Last-Event-ID": str(2**63 - 1)}
    problem = refused(server.http.get("/v1/events", params={"follow": False}, headers=last))
    assert "there is no event 9223372036854775807 yet: the newest is" in pointers(problem)["Last-Event-ID"]


@pytest.mark.parametrize("filter", ["", " ", "\t\n"])
def test_a_blank_filter_retracts_nothing(server: Any, filter: str) -> None:
    body = {"filter": filter, "reason": "oops"}
    assert "/filter" in pointers(refused(server.http.post("/v1/results:retract", json=body)))


@pytest.mark.parametrize("text", ["1_0", "\u0661", "+1", "inf", "1e-400", "0x10", "true"])
def test_texts_that_are_no_numbers_are_none_in_a_query(server: Any, text: str) -> None:
    assert "scale" in pointers(refused(server.http.get("/v1/leaderboard", params={"scale": text})))
    assert "scale" in pointers(refused(server.http.get("/v1/results", params={"scale": text})))
    for scale in ("5", "5.0", "10/2"):
        assert server.http.get("/v1/leaderboard", params={"scale": scale}).status_code == 200


@pytest.mark.parametrize("text", ["yes", "on", "1", "0", "t", ""])
def test_texts_that_are_no_truth_values_are_none_in_a_query(server: Any, text: str) -> None:
    assert "trusted" in pointers(refused(server.http.get("/v1/leaderboard", params={"trusted": text})))
    assert "dry_run" in pointers(refused(server.http.post("/v1/sweeps", params={"dry_run": text}, json={})))
    assert server.http.get("/v1/leaderboard", params={"trusted": "False"}).status_code == 200


def test_numbers_without_an_end_are_refused(server: Any) -> None:
    for number, status in (("1e999", 422), ("NaN", 400), ("-Infinity", 400), ("1e7", 422)):
        headers = {"Content-Type": "application/json"}
        answer = server.http.put("/v1/users/x", content=f'{{"max_gpus": {number}}}', headers=headers)
        assert "/max_gpus" in pointers(refused(answer, status))
    too_many = {**JOB, "recipe": {"name": "standard", "train_samples": 10**12}}
    assert "/recipe/train_samples" in pointers(refused(server.http.post("/v1/jobs", json=too_many)))


def test_an_origin_that_is_none_is_refused(server: Any) -> None:
    for origin in ("http://[", "null", "http://elsewhere"):
        refused(server.http.get("/v1/jobs", headers={"Origin": origin}), 403)


def test_names_that_are_none_and_hosts_that_are_not_ours_are_refused(server: Any) -> None:
    refused(server.http.post("/v1/jobs", json=JOB, headers={"X-Uncanny-User": "a b\tc;"}))
    refused(server.http.get("/v1/jobs", headers={"Host": "evil.example"}), 403)
    assert server.http.get("/v1/jobs", headers={"Host": "localhost:1"}).status_code == 200


PARTS = {"/docs/swagger-ui-bundle.js": "text/javascript", "/docs/swagger-ui.css": "text/css"}  # of the page


def test_the_documentation_needs_nothing_from_elsewhere(server: Any) -> None:
    page = server.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    addresses = re.findall(r"""(?:src|href)="([^"]*)"|url: '([^']*)'""", page.text)
    assert {one or other for one, other in addresses} == {*PARTS, "/openapi.json", "data:,"}
    assert "//" not in page.text
    for part, kind in PARTS.items():
        answer = server.http.get(part)
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, kind)
    refused(server.http.get("/docs/redoc.standalone.js"), 404)
    assert server.http.get("/").text == page.text


def test_the_browser_runs_nothing_but_the_documentations_own_scripts(server: Any) -> None:
    page = server.http.get("/docs")
    [script] = re.findall("<script>(.*?)</script>", page.text, re.DOTALL)
    own = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = dict(one.strip().split(" ", 1) for one in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == f"'self' 'sha256-{own}'"
    assert policy["connect-src"] == "'self'"


def test_the_openapi_document(server: Any) -> None:
    document = server.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["tags"], path
            assert operation["description"], path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"], (path, method, status)
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                schema = body["schema"]
                named = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], {})
                examples = body.get("examples") or schema.get("examples") or named.get("examples")
                assert examples, (path, method)
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])


def test_the_examples_of_the_document_are_accepted(server: Any) -> None:
    from api.http.schemas.examples import JOB_EXAMPLE, SWEEP_EXAMPLE

    assert server.http.post("/v1/jobs", json=JOB_EXAMPLE).status_code == 201
    assert server.http.post("/v1/sweeps", json=SWEEP_EXAMPLE, params={"dry_run": True}).status_code == 200


def test_a_database_that_is_away_is_503_with_retry_after(tmp_path: Path) -> None:
    nowhere = Settings(home=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    with application(nowhere) as http:
        for response in (
            http.get("/v1/jobs"),
            http.post("/v1/jobs", json=JOB),
            http.get("/v1/results"),
            http.get("/v1/events"),
            http.get("/readyz"),
        ):
            problem = refused(response, 503)
            assert int(response.headers["retry-after"]) > 0
            assert "does not answer" in problem["detail"]
        assert http.get("/healthz").status_code == 200


def test_an_old_schema_is_said_by_readyz(tmp_path: Path) -> None:
    with application(Settings(home=tmp_path)) as http:
        assert "uncanny db upgrade" in refused(http.get("/readyz"), 503)["detail"]


def test_a_full_disk_under_the_database_is_named_by_readyz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    Database(settings.database).upgrade()
    with application(settings) as http:
        assert http.get("/readyz").status_code == 200
        left = SimpleNamespace(total=1 << 30, used=1 << 30, free=4096)
        monkeypatch.setattr("service.store.database.shutil.disk_usage", lambda _: left)
        response = http.get("/readyz")
        detail = refused(response, 503)["detail"]
        assert detail == f"the database's disk is full (4096 bytes left at {tmp_path}): make room"
        assert int(response.headers["retry-after"]) > 0
        assert http.get("/healthz").status_code == 200


def test_a_full_postgresql_disk_that_only_the_dispatcher_has_met(tmp_path: Path, postgresql_url: str) -> None:
    """PostgreSQL says that its disk is full when it writes: `/readyz` writes if no dispatcher leads."""
    database = Database(postgresql_url)
    with database.write() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
            "'could not extend file' USING ERRCODE = 'disk_full'; END $$"
        )
        connection.exec_driver_sql("CREATE TRIGGER full_disk BEFORE INSERT ON counters EXECUTE FUNCTION full_disk()")
    try:
        with application(Settings(home=tmp_path, database_url=postgresql_url)) as http:
            assert "could not extend file" in refused(http.get("/readyz"), 503)["detail"]
            with database.write() as connection:
                connection.exec_driver_sql("DROP FUNCTION full_disk CASCADE")
            assert http.get("/readyz").status_code == 200
    finally:
        with database.write() as connection:
            connection.exec_driver_sql("DROP FUNCTION IF EXISTS full_disk CASCADE")
        database.close()


@pytest.mark.parametrize(("number", "status", "wait"), [(errno.ENOSPC, 507, 30), (errno.EROFS, 503, 2)])
def test_an_artifact_root_that_takes_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, wait: int
) -> None:
    settings = Settings(home=tmp_path)
    Database(settings.database).upgrade()

    def refuses(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with application(settings) as http:
        monkeypatch.setattr("service.lab.artifacts.tempfile.TemporaryDirectory", refuses)
        response = http.put(f"/v1/artifacts/{'0' * 64}", content=b"bytes")
        assert os.strerror(number) in refused(response, status)["detail"]
        assert response.headers["retry-after"] == str(wait)


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_another_protocol_is_answered_in_this_one(server: Any, caplog: pytest.LogCaptureFixture, protocol: str) -> None:
    """As HTTP allows, and without a word in the log: who asks is no reason to install anything."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": protocol,
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "a" * 24,
    }
    answer = server.http.get("/v1/me", headers=headers)
    assert (answer.status_code, "name" in answer.json()) == (200, True)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_what_nobody_expected_is_a_problem_too(tmp_path: Path) -> None:
    with application(Settings(home=tmp_path)) as http:
        http.app.state.insights = None  # type: ignore[attr-defined]
        assert "log" in refused(http.get("/v1/jobs"), 500)["detail"]


@contextmanager
def application(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as http:
        yield http
    app.state.service.database.close()


def npz_bytes(n: int) -> bytes:
    buffer = io.BytesIO()
    images = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    np.savez(buffer, x=images, y=np.arange(n, dtype=np.int64) % 3)
    return buffer.getvalue()


NUL = "/v1/jobs/%00", "/v1/tasks/%00", "/v1/results/a%00b", "/v1/results:compare?ids=%00,x", "/v1/jobs?user=%00"


def test_a_nul_character_is_nobody_s_fault_but_the_client_s(database_url: str, tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, database_url=database_url))
    with TestClient(app, base_url="http://localhost") as http:
        for path in NUL:
            assert http.get(path).status_code in (200, 404, 422), path


@pytest.mark.parametrize("labels", [{"a\0": "x"}, {"a": "\0"}, {'a"b': "x"}, {"": "x"}, {"a": 1}, {"a" * 101: "x"}])
def test_labels_that_could_not_be_asked_for_are_refused(server: Any, labels: dict[str, Any]) -> None:
    job = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 8}
    sweep = {"name": "labelled", "base": job, "grid": {"scale": [1]}}
    for path, body in (("/v1/jobs", job), ("/v1/sweeps", sweep)):
        found = pointers(refused(server.http.post(path, json={**body, "labels": labels})))
        assert all(pointer.startswith("/labels") for pointer in found), found
