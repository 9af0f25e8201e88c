"""The documentation page: made from the OpenAPI document by ourselves, so that it needs no internet and no scripts."""

import json
from html import escape
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from api.http.permissions import open_to_all

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1b1b1b } a { color: #8cf } }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888 } summary { cursor: pointer; padding: .3rem 0 }
code, pre { font: 13px/1.45 ui-monospace, monospace } pre { overflow-x: auto; padding: .7rem; background: #8882 }
td, th { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0 } details { margin-left: .3rem }
.method { display: inline-block; width: 4rem; font-weight: 600 }
"""


def install(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False, dependencies=[open_to_all()])
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), str(request.base_url).rstrip("/")))

    @app.get("/", include_in_schema=False, dependencies=[open_to_all()])
    def home(request: Request) -> HTMLResponse:
        return docs(request)


def page(document: dict[str, Any], url: str) -> str:
    """The whole page: a section for each tag, an entry for each operation."""
    info = document["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])} API</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        *(f"<p>{_text(part)}</p>" for part in info["description"].strip().split("\n\n")),
        f"<p>This page for programs: <a href='{escape(urlsplit(url).path)}/openapi.json'>openapi.json</a>, OpenAPI "
        f"{escape(document['openapi'])}.</p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2 id='{escape(tag['name'])}'>{escape(tag['name'])}</h2><p>{_text(tag['description'])}</p>")
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation.get("tags", []):
                    parts.append(_operation(document, url, path, method, operation))
    return "\n".join(parts)


def _operation(document: dict[str, Any], url: str, path: str, method: str, operation: dict[str, Any]) -> str:
    description = operation.get("description", "")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    example = _example(document, body) if body else None
    curl = f"curl -s{'' if method == 'get' else f' -X {method.upper()}'} '{url}{path}'"
    if example is not None:
        curl += f" -H 'Content-Type: application/json' -d '{json.dumps(example, indent=1)}'"
    given = operation.get("parameters", [])
    rows = "".join(_parameter(item) for item in given if item["schema"].get("type") != "array")
    filters = ", ".join(f"`{item['name']}`" for item in given if item["schema"].get("type") == "array")
    summary, _, details = description.partition("\n")
    answers = ", ".join(
        f"{escape(str(status))} {_text(answer['description'])}" for status, answer in operation["responses"].items()
    )
    return (
        f"<details id='{escape(operation['operationId'])}'><summary><code><span class=method>{method.upper()}</span>"
        f"{escape(path)}</code> &nbsp;{_text(summary)}</summary><p>{_text(details)}</p>"
        f"<pre>{escape(curl)}</pre>"
        + (f"<table>{rows}</table>" if rows else "")
        + (f"<p>Filters, repeatable for any of several values: {_text(filters)}</p>" if filters else "")
        + _answer(document, operation)
        + f"<p>Answers: {answers}</p></details>"
    )


def _parameter(item: dict[str, Any]) -> str:
    schema = item.get("schema", {})
    bounds = ", ".join(f"{key} {schema[key]}" for key in ("minimum", "maximum", "default", "enum") if key in schema)
    return (
        f"<tr><td><code>{escape(item['name'])}</code><td>{escape(item['in'])}"
        f"<td>{_text(item.get('description', ''))} {_text(bounds)}"
    )


def _answer(document: dict[str, Any], operation: dict[str, Any]) -> str:
    for status in ("200", "201"):
        content = operation["responses"].get(status, {}).get("content", {}).get("application/json")
        if content:
            example = _example(document, content)
            return f"<pre>{escape(json.dumps(example, indent=1))}</pre>" if example else ""
    return ""


def _example(document: dict[str, Any], content: dict[str, Any]) -> Any:
    """The example of a body, or one put together from those of its fields."""
    return content["examples"][0] if "examples" in content else _sample(document, content.get("schema", {}), 0)


def _sample(document: dict[str, Any], schema: dict[str, Any], depth: int) -> Any:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if schema.get("examples"):
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return _sample(document, choices[0], depth)
    match schema.get("type"):
        case "object" if depth < 4:
            return {name: _sample(document, of, depth + 1) for name, of in schema.get("properties", {}).items()}
        case "array":
            return [_sample(document, schema.get("items", {}), depth + 1)]
        case "integer" | "number":
            return 0
        case "string":
            return "..."
    return None


def _text(text: str) -> str:
    """Escaped, with `code` and **bold**."""
    for mark, tag in (("`", "code"), ("**", "b")):
        pieces = text.split(mark) if mark != "`" else escape(text, quote=False).split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces))
    return text
