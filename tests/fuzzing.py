"""The OpenAPI document told by its own requests: what tests of it share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks

from api.http.app import create_app
from service.settings import Settings

load_all_checks()
TRUTHS = CHECKS.get_by_names(
    [
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
        "response_headers_conformance", "allow_header_conformance", "unsupported_method",
    ]
)  # fmt: skip
REFUSALS = CHECKS.get_by_names(["negative_data_rejection"])
DOCUMENT = create_app(Settings(home=Path("nowhere"))).openapi()
WITHOUT_TOKENS = {**DOCUMENT, "components": {"schemas": DOCUMENT["components"]["schemas"]}}
BY_CHANCE = schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": False}}})
FUZZ = settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Target:
    """Where requests go, with which token, and what exists there by the names of path parameters."""

    url: str
    headers: Mapping[str, str]
    existing: Mapping[str, str]


def existing(sweep: dict[str, Any], client: Any) -> dict[str, str]:
    job = next(client.jobs(sweep=sweep["id"]))
    task = client.job(job["id"])["tasks"][0]
    return {"job_id": job["id"], "sweep_id": sweep["id"], "task_id": task["id"]}


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
