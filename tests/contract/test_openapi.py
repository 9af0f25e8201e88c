"""The OpenAPI document is a promise to clients: whatever changes it is a decision, which the snapshot shows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import api
import service
import workers
from api.http.app import create_app
from service.settings import Settings

SNAPSHOT = Path(__file__).with_name("openapi.json")
RENEW = "uv run uncanny openapi > tests/contract/openapi.json"


@pytest.fixture(scope="module")
def document() -> Any:
    return create_app(Settings(home=Path("nowhere"))).openapi()


def differences(was: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two documents differ, as JSON pointers; parameters go by their names, because their order says nothing."""
    was, now = _by_name(was), _by_name(now)
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            place = f"{where}/{name.replace('~', '~0').replace('/', '~1')}"
            if name not in now:
                yield f"gone: {place}"
            elif name not in was:
                yield f"new: {place}"
            else:
                yield from differences(was[name], now[name], place)
    elif was != now:
        yield f"other: {where}"


def _by_name(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value)
    return {f"{item.get('in', '')}:{item['name']}": item for item in value} if named else value


def test_the_document_is_the_snapshot(document: Any) -> None:
    found = list(differences(json.loads(SNAPSHOT.read_text()), json.loads(json.dumps(document))))
    assert not found, "\n".join(["what clients are promised has changed:", *found, f"if that is meant: {RENEW}"])


def test_differences_are_found() -> None:
    assert list(differences({"a": {"b/c": 1, "d": [1]}}, {"a": {"d": [2], "e": 0}})) == [
        "gone: /a/b~1c",
        "other: /a/d",
        "new: /a/e",
    ]
    was, now = ([{"in": "query", "name": name, "x": x} for name in "ab"] for x in (1, 2))
    assert list(differences(was, [*reversed(was)])) == []
    assert list(differences(was, [now[0], was[1]])) == ["other: /query:a/x"]


def test_every_operation_has_a_name_of_its_own_and_every_body_an_example(document: Any) -> None:
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(names) == len(set(names))
    schemas = document["components"]["schemas"]
    for method, path, operation in operations:
        assert operation["summary"], path
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schema = content["schema"]
            named = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            shown = content.get("examples") or schema.get("examples") or named.get("examples")
            assert shown or named.get("format") == "binary", f"{method} {path} has no example"


EXEMPLARY = (
    ("/healthz", "get"), ("/v1/checkpoints", "get"), ("/v1/checkpoints", "post"), ("/v1/correlations", "get"),
    ("/v1/queue", "get"), ("/v1/queue:pause", "post"), ("/v1/queue:resume", "post"), ("/v1/results", "get"),
    ("/v1/tasks/{task_id}", "get"), ("/v1/sweeps/{sweep_id}:cancel", "post"),
    ("/v1/sweeps/{sweep_id}:retry-failed", "post"),
)  # fmt: skip


def example_of(document: Any, content: Any) -> Any:
    """The example of a body, or one put together from those of its fields, as a page of documentation shows it."""
    return content["examples"][0] if "examples" in content else sample_of(document, content.get("schema", {}), 0)


def sample_of(document: Any, schema: Any, depth: int) -> Any:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if schema.get("examples"):
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return sample_of(document, choices[0], depth)
    match schema.get("type"):
        case "object" if depth < 4:
            return {name: sample_of(document, of, depth + 1) for name, of in schema.get("properties", {}).items()}
        case "array":
            return [sample_of(document, schema.get("items", {}), depth + 1)]
        case "integer" | "number":
            return 0
        case "string":
            return "..."
    return None


@pytest.mark.parametrize(("path", "method"), EXEMPLARY)
def test_answers_are_shown_by_example(document: Any, path: str, method: str) -> None:
    [content] = [
        answer["content"]["application/json"]
        for status, answer in document["paths"][path][method]["responses"].items()
        if status in ("200", "201")
    ]
    shown = json.dumps(example_of(document, content))
    assert len(shown) > 2
    assert "..." not in shown.replace("at several scales share ...", "")


def test_questions_are_shown_by_example(document: Any) -> None:
    asked = {"filter", "sort", "fields", "by", "metrics", "cursor", "limit", "ids", "parts", "measure", "target"}
    for path, methods in document["paths"].items():
        for parameter in methods.get("get", {}).get("parameters", []):
            if parameter["name"] in asked and parameter["schema"].get("type") != "array":
                assert parameter.get("examples") or parameter["schema"].get("examples"), (path, parameter["name"])
    for path in ("/v1/datasets", "/v1/checkpoints"):
        assert "404" in document["paths"][path]["post"]["responses"]


def test_types_are_told_to_who_installs_it() -> None:
    for package in (api, service, workers):
        assert package.__file__ is not None
        assert (Path(package.__file__).parent / "py.typed").is_file()


def test_every_answer_in_json_says_what_is_in_it(document: Any) -> None:
    schemas = document["components"]["schemas"]
    asked = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema")
                if schema is None:
                    continue
                for one in schema.get("anyOf", [schema]):
                    named = schemas[one["$ref"].rpartition("/")[2]] if "$ref" in one else one
                    assert named.get("properties"), f"{method} {path} answers {status} with something"
                    asked += 1
    assert asked > 50


def test_headers_are_documented_where_they_are_sent(document: Any) -> None:
    for methods in document["paths"].values():
        for operation in methods.values():
            names = {parameter["name"] for parameter in operation.get("parameters", [])}
            headers = {status: set(answer.get("headers", {})) for status, answer in operation["responses"].items()}
            assert ("Link" in headers.get("200", ())) == ("cursor" in names)
            assert ("Location" in headers.get("201", headers.get("200", ()))) == ("Idempotency-Key" in names)
            assert all("Retry-After" in headers[status] for status in ("429", "503") if status in headers)
    listing = document["paths"]["/v1/jobs"]["get"]["responses"]["200"]["headers"]
    assert set(listing) == {"ETag", "Link"}
