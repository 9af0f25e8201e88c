"""Cases from the field: what public bug reports of systems like this tell of, each asked of both stores over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
WRITTEN_OUT: dict[str, Any] = {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10}
FLOATS = {**WRITTEN_OUT, "eps": 0.03137254901960784, "step_size": 2 / 255}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def lab(request: pytest.FixtureRequest, start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home: Path = tmp_path_factory.mktemp("field")
    url = request.getfixturevalue("module_postgresql_url") if request.param == "postgresql" else ""
    with start_server(home, database_url=url) as server:
        yield server


def body(**written: str) -> bytes:
    """The job as JSON in which these fields have exactly this text."""
    fields = {name: json.dumps(value) for name, value in JOB.items()} | written
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


def post(lab: Any, content: bytes, path: str = "/v1/jobs", kind: str = "application/json") -> Any:
    return lab.http.post(path, content=content, headers={"Content-Type": kind})


def sound(lab: Any) -> None:
    """Every list can still be read to its end, and is JSON that holds numbers only."""
    for path in ("/v1/jobs", "/v1/results", "/v1/sweeps"):
        seen = lab.http.get(path, params={"limit": 1000})
        assert seen.status_code == 200
        json.loads(seen.text, parse_constant=pytest.fail)


NINES = "9" * 5000
NOT_JSON = 400  # what has no one meaning as JSON; all else that no field takes is 422
RAW: dict[str, tuple[bytes, str, int]] = {
    "NaN": (body(scale="NaN"), "/scale", NOT_JSON),
    "Infinity": (body(scale="Infinity"), "/scale", NOT_JSON),
    "-Infinity": (body(scale="-Infinity"), "/scale", NOT_JSON),
    "1e999": (body(scale="1e999"), "/scale", 422),
    "1e999 of the attack": (body(attack=json.dumps(WRITTEN_OUT).replace('"8/255"', "1e999")), "/attack/eps", 422),
    "1e-400": (body(scale="1e-400"), "/scale", 422),
    "-1e-400 of the attack": (body(attack=json.dumps(WRITTEN_OUT).replace('"8/255"', "-1e-400")), "/attack/eps", 422),
    "2^63": (body(seed=str(2**63)), "/seed", 422),
    "-2^63 - 1": (body(seed=str(-(2**63) - 1)), "/seed", 422),
    "nines for a whole number": (body(seed=NINES), "", 422),
    "nines for a number": (body(scale=NINES), "", 422),
    "nines in a text": (body(scale=f'"{NINES}"'), "/scale", 422),
    "a NUL": (body(labels=r'{"a": "\u0000"}'), "/labels", 422),
    "half a pair": (body(labels=r'{"a": "\ud800"}'), "/labels", 422),
    "half a pair as a name": (body(architecture=r'"\ud800"'), "/architecture", 422),
    "a key twice": (body()[:-1] + b', "scale": 1, "scale": 5}', "", NOT_JSON),
    "a key twice within": (body(attack='{"type": "pgd", "eps": 0.1, "eps": 0.2}'), "", NOT_JSON),
    "a key twice among many": (
        body(labels="{" + ", ".join(f'"{i % 900}": "1"' for i in range(901)) + "}"),
        "",
        NOT_JSON,
    ),
    "deep": (b"[" * 100_000, "", NOT_JSON),
    "deep inside": (body(labels="[" * 100_000 + "]" * 100_000), "", NOT_JSON),
    "nothing": (b"", "", NOT_JSON),
    "no text": (b"\xff\xfe", "", NOT_JSON),
    "null": (b"null", "", 422),
    "true for a number": (body(scale="true"), "/scale", 422),
    "true for a whole number": (body(seed="true"), "/seed", 422),
}


@pytest.mark.parametrize("name", RAW)
def test_values_in_json(lab: Any, name: str) -> None:
    content, pointer, status = RAW[name]
    before = lab.http.get("/v1/jobs").json()
    answer = post(lab, content)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.content) < 3000
    assert any(problem["pointer"].startswith(pointer) for problem in answer.json()["errors"]), answer.text
    assert post(lab, content, "/v1/sweeps").status_code == status
    assert lab.http.get("/v1/jobs").json() == before
    sound(lab)


def test_a_body_of_50_mb(lab: Any) -> None:
    assert post(lab, b'{"labels": {"a": "' + b"x" * 50_000_000 + b'"}}').status_code == 413
    sound(lab)


def test_a_body_that_says_it_is_plain_text(lab: Any) -> None:
    answer = post(lab, body(), kind="text/plain")
    assert answer.status_code == 415
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["🦆 valley", "שלום עולם", "a\u202eb", "e\u0301 and \u00e9"])
def test_names_come_back_as_they_were(lab: Any, name: str) -> None:
    sweep = {"name": name, "base": JOB, "grid": {"scale": [1]}, "labels": {"note": name}}
    made = lab.http.post("/v1/sweeps", json=sweep)
    assert made.status_code == 201, made.text
    seen = lab.http.get(f"/v1/sweeps/{made.json()['id']}").json()
    assert (seen["name"], seen["labels"]) == (name, {"note": name})


class TestOneNumberOneMeaning:
    GRID = b'{"scale": [1, 1.0, 1e0], "attack": ["pgd_linf", %s, %s]}' % (
        json.dumps(WRITTEN_OUT).encode(),
        json.dumps(FLOATS).encode(),
    )

    def sweep(self, lab: Any, grid: bytes, *more: bytes, dry_run: bool = False) -> Any:
        base = json.dumps({name: value for name, value in JOB.items() if name != "attack"}).encode()
        parts = [b'"name": "one"', b'"base": ' + base, b'"grid": ' + grid, *more]
        return post(lab, b"{" + b", ".join(parts) + b"}", f"/v1/sweeps{'?dry_run=true' if dry_run else ''}")

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_however_it_is_written_it_is_one_job(self, lab: Any, dry_run: bool) -> None:
        answer = self.sweep(lab, self.GRID, dry_run=dry_run)
        assert answer.status_code == (200 if dry_run else 201), answer.text
        assert (answer.json()["jobs"], answer.json()["repetitions"]) == (1, 8)

    def test_a_seed_with_a_point_is_refused(self, lab: Any) -> None:
        answer = post(lab, body(seed="1.0"))
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "/seed"

    def test_a_cell_is_left_out_however_it_is_written(self, lab: Any) -> None:
        answer = self.sweep(lab, b'{"scale": [1, 5], "attack": ["pgd_linf"]}', b'"exclude": [{"scale": 1.0}]')
        assert answer.json()["jobs"] == 1

    @pytest.mark.parametrize(
        ("grid", "more"),
        [(b'{"scale": []}', b'"labels": {}'), (b'{"scale": [1], "attack": ["pgd_l2"]}', b'"exclude": [{"scale": 1}]')],
        ids=["an empty axis", "all left out"],
    )
    def test_no_sweep_is_without_jobs(self, lab: Any, grid: bytes, more: bytes) -> None:
        assert self.sweep(lab, grid, more).status_code == 422
