"""Specs with anything in place of anything: accepted, or refused with a pointer to what is wrong; never a failure."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.http.schemas.examples import JOB_EXAMPLE, SWEEP_EXAMPLE

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=8),
    st.sampled_from(["8/255", "1/0", "nan", "-0", "1e999", "pgd_l2", "standard", "npz:x", "\x00", "\ud800"]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document, its own first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inside for deeper in places(item, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@pytest.mark.parametrize(("path", "example"), [("/v1/jobs", JOB_EXAMPLE), ("/v1/sweeps", SWEEP_EXAMPLE)])
def test_nothing_in_a_spec_breaks_it(server: Any, path: str, example: dict[str, Any]) -> None:
    @settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(places(example)), ANYTHING), min_size=1, max_size=2))
    def check(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        [(place, value), *more] = changes
        body = replaced(example, place, value)
        for place, value in more:
            if place in places(body):
                body = replaced(body, place, value)
        response = server.http.post(
            path, params={"dry_run": True}, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (200, 422), response.text
        if response.status_code == 422:
            assert all("pointer" in error for error in response.json()["errors"])
            assert response.json()["errors"]

    check()
