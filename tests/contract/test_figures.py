"""A curve of `examples/figure_scaling.py` is of one network under one attack: what else would be mixed is refused."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.errors import UncannyError
from service.results.insights import Insights
from service.results.questions import Question
from service.store.result_tables import cells

FIGURE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "figure_scaling.py"))
PGD = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.03, "steps": 4}
MIXED: list[tuple[str, str, list[Any]]] = [
    ("attack_seed", "attack_seed", [0, 1]),
    ("seed", "seed", [0, 1]),
    ("replicate", "replicate", [0, 1]),
    ("samples", "samples", [16, 32]),
    ("order", "order", ["permutation", "file"]),
    ("scale_bias", "scale_bias", [True, False]),
    ("recipe.epochs", "recipe", [{"epochs": 2}, {"epochs": 3}]),
    ("attack.eps", "attack", [PGD, {**PGD, "eps": 0.2}]),
    ("attack.restarts", "attack", [PGD, {**PGD, "restarts": 2}]),
]
"""What would be mixed, as the refusal names it, with the field of a job and its values."""


def columns(lab: Any) -> dict[Any, dict[float, dict[str, Any]]]:
    """Of all results of the store."""
    rows = Insights(lab.database).results(Question(limit=100))["items"]
    found: dict[Any, dict[float, dict[str, Any]]] = FIGURE["columns_of"](rows)
    return found


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("named", "field", "values"), MIXED, ids=[named for named, _, _ in MIXED])
def test_results_of_unlike_specs_are_no_curve(lab: Any, named: str, field: str, values: list[Any]) -> None:
    lab.submit_sweep({"scale": [2, 5], field: values[:1]})
    lab.finish()
    [curve] = columns(lab).values()
    assert sorted(curve) == [2, 5]
    lab.submit(scale=5, **{field: values[1]})
    lab.finish()
    with pytest.raises(UncannyError, match=rf"mix results of different {named} \(.+, .+\): choose some, as {named}="):
        columns(lab)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_results_of_two_versions_of_an_attack_are_no_curve(lab: Any) -> None:
    lab.submit_sweep({"scale": [2, 5]})
    lab.finish()
    with lab.database.write() as connection:  # as if the attack had been defined anew
        [cell, _] = lab.rows(cells)
        spec = {**cell.spec, "versions": {**cell.spec["versions"], "attack": 9}}
        connection.execute(update(cells).where(cells.c.id == cell.id).values(spec=spec))
    with pytest.raises(UncannyError, match=r"different versions\.attack \("):
        columns(lab)


def test_every_field_that_a_curve_must_not_mix_is_tried() -> None:
    assert {field for _, field, _ in MIXED} | {"versions"} == set(FIGURE["SPEC"])
