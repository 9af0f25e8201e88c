"""Pages and tables of results: every row that was there exactly once, while others are inserted."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from service.errors import InvalidQuery
from service.model.dotted import FAMILIES, flat
from service.model.executor import Succeeded
from service.model.jobs import TaskState
from service.results import exporting
from service.results.insights import Insights, Question
from service.specs.attacks import PRESETS
from service.store import joining
from service.store.result_fields import RESULTS


@pytest.fixture
def finish(lab: Any) -> Callable[..., None]:
    """Submit jobs at these scales, with other seeds each time, and finish them; some numbers are missing."""
    count = iter(range(1000))

    def run(*scales: float) -> None:
        seed = next(count)
        for scale in scales:
            lab.submit(scale=scale, seed=seed)
        while grants := lab.grant():
            for i, grant in enumerate(grants):
                numbers: dict[str, Any] = {}
                if grant.spec["kind"] == "attack":
                    numbers = {"robust_accuracy": grant.spec["scale"] / 10 if i % 3 else None, "flip_rate": 0.5}
                lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, **numbers)))

    return run


@pytest.fixture
def insights(lab: Any) -> Insights:
    return Insights(lab.database)


SORTS = (
    "created_at", "-created_at", "robust_accuracy", "-robust_accuracy", "-scale,robust_accuracy",
    "robust_accuracy,-seed,created_at", "flip_rate,scale", "-architecture,-created_at", "attack.random_start",
)  # fmt: skip


def test_rows_that_come_meanwhile_shift_nothing(insights: Insights, finish: Any) -> None:
    for _ in range(3):
        finish(1, 2, 3, 4)
    before = {sort: [row["job_id"] for row in insights.results(Question(sort=sort))["items"]] for sort in SORTS}
    assert {len(ids) for ids in before.values()} == {12}
    seen: dict[str, list[str]] = {sort: [] for sort in SORTS}
    cursors: dict[str, str | None] = dict.fromkeys(SORTS)
    for round in range(100):
        for sort in list(cursors):
            page = insights.results(Question(sort=sort, limit=5, cursor=cursors[sort]))
            seen[sort] += [row["job_id"] for row in page["items"]]
            cursors[sort] = page["next_cursor"]
            if cursors[sort] is None:
                del cursors[sort]
        if not cursors:
            break
        if round < 3:
            finish(0.5, 2.5, 9)
    for sort, ids in seen.items():
        assert [job_id for job_id in ids if job_id in before[sort]] == before[sort], sort
        assert len(ids) == len(set(ids))


@pytest.mark.slow
@pytest.mark.parametrize("sort", ["robust_accuracy", "-robust_accuracy", "-created_at", "robust_accuracy,-created_at"])
def test_few_cells_are_looked_into_one_by_one_for_the_same_pages(insights: Insights, finish: Any, sort: str) -> None:
    for _ in range(4):
        finish(*range(1, 9))
    finish(1)
    every = insights.results(Question(sort=sort))["items"]
    assert {row["robust_accuracy"] for row in every} > {None}
    for limit in (1, 3, 100):
        question, seen = Question({"scale": ["1", "2"]}, sort, limit=limit), []
        while True:
            page = insights.results(question)
            seen += [row["job_id"] for row in page["items"]]
            if page["next_cursor"] is None:
                break
            question = replace(question, cursor=page["next_cursor"])
        assert seen == [row["job_id"] for row in every if row["scale"] in (1, 2)]


def test_sorted_by_several_fields(insights: Insights, finish: Any) -> None:
    for _ in range(3):
        finish(1, 2, 3)
    rows = insights.results(Question(sort="-scale,seed", limit=100))["items"]
    assert [(row["scale"], row["seed"]) for row in rows] == sorted(
        ((row["scale"], row["seed"]) for row in rows), key=lambda pair: (-pair[0], pair[1])
    )
    rows = insights.results(Question(sort="-robust_accuracy,seed", limit=100))["items"]
    values = [row["robust_accuracy"] for row in rows]
    assert None in values
    known = [value for value in values if value is not None]
    assert values == sorted(known, reverse=True) + [None] * (len(values) - len(known))


def test_an_order_is_of_few_fields_that_there_are(insights: Insights, finish: Any) -> None:
    finish(1, 2, 3)
    with pytest.raises(InvalidQuery, match="it has 9 fields; between 1 and 8"):
        insights.results(Question(sort=",".join(list(RESULTS.known)[:9])))
    for sort in ("created_at,nonsense", "-created_at,verdict_reasons", "", ",", "-"):
        with pytest.raises(InvalidQuery) as refused:
            insights.results(Question(sort=sort))
        assert refused.value.parameter == "sort", sort
    often = insights.results(Question(sort=",".join(["-scale", "scale"] * 60)))["items"]
    assert [row["scale"] for row in often] == [3, 2, 1]
    last = insights.results(Question(sort="robust_accuracy,created_at,-scale"))["items"]
    assert last == insights.results(Question(sort="robust_accuracy,created_at"))["items"]


def test_one_set_of_names_for_rows_and_tables(lab: Any, insights: Insights, finish: Any) -> None:
    transfer = {"type": "transfer", "attack": "pgd_l2", "source": {"architecture": "mlp", "seed": 9}}
    transfer["attack"] = PRESETS["pgd_l2"].model_dump(mode="json")
    lab.submit(attack=transfer)
    finish(1)
    names = [*RESULTS.known, *FAMILIES, "provenance.torch", "labels.x", "flip_rate", "attack.source.seed"]
    for name in names:
        question = Question(sort="created_at", fields=(name,))
        rows = [dict(flat(row)) for row in insights.results(question)["items"]]
        table = exporting.table(lab.database, question)
        assert len("".join(exporting.csv_lines(table)).splitlines()) == 1 + len(rows) == 3
        frame = pl.read_parquet(io.BytesIO(b"".join(exporting.parquet_bytes(table))))
        assert frame.columns == [name]
        if name not in ("attack", "recipe", *FAMILIES) and frame[name].dtype in (pl.Float64, pl.Int64, pl.String):
            assert frame[name].to_list() == [row.get(name) for row in rows], name
    assert [row["norm"] for row in insights.results(Question(fields=("norm",), sort="created_at"))["items"]] == [
        "l2",
        "linf",
    ]
    with pytest.raises(InvalidQuery, match="at most 200 can be named"):
        insights.results(Question(fields=tuple(f"labels.{i}" for i in range(201))))
    with pytest.raises(InvalidQuery, match="at most 200 can be named"):
        exporting.table(lab.database, Question(fields=tuple(f"labels.{i}" for i in range(201))))


def test_parts_of_what_is_no_object(lab: Any, insights: Insights, finish: Any) -> None:
    finish(1)
    for fields, shown in (
        (("provenance.torch", "provenance.torch.x"), {"provenance": {"torch": "2", "torch.x": None}}),
        (("labels.a", "labels.a.b"), {"labels": {"a": None, "a.b": None}}),
        (
            ("versions", "versions.train", "versions.x"),
            {"versions": dict.fromkeys(("train", "measure", "attack", "control"), 1)},
        ),
        (("attack.source.seed", "attack.norm"), {"attack": {"source": {"seed": None}, "norm": "linf"}}),
    ):
        assert insights.results(Question(fields=fields))["items"] == [shown]
    [row] = insights.results(Question(fields=("attack.source.seed", "attack")))["items"]
    assert row["attack"]["type"] == "pgd"


@pytest.mark.parametrize(("values", "groups"), [(10**6, 1), (40, 4)])
def test_row_groups_are_bound_by_their_values(
    insights: Insights, finish: Any, monkeypatch: pytest.MonkeyPatch, values: int, groups: int
) -> None:
    monkeypatch.setattr(exporting, "BATCH_ROWS", 2)
    monkeypatch.setattr(exporting, "GROUP_VALUES", values)
    finish(*range(1, 9))
    table = exporting.table(insights.database, Question(fields=tuple(exporting.COLUMNS[:20])))
    file = pq.ParquetFile(io.BytesIO(b"".join(exporting.parquet_bytes(table))))
    assert (file.metadata.num_rows, file.num_row_groups) == (8, groups)


def test_a_cursor_belongs_to_its_filter_and_sort(insights: Insights, finish: Any) -> None:
    finish(1, 2, 3)
    cursor = insights.results(Question(filter="scale > 0", limit=1))["next_cursor"]
    assert insights.results(Question(filter="scale > 0", limit=2, cursor=cursor))["next_cursor"] is None
    for other in ({"filter": "scale > 1"}, {}, {"filter": "scale > 0", "sort": "scale"}, {"filters": {"seed": ["0"]}}):
        with pytest.raises(InvalidQuery, match="another question"):
            insights.results(Question(cursor=cursor, limit=1, **other))


def test_tables_say_the_same_as_rows(insights: Insights, finish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "BATCH_ROWS", 4)
    monkeypatch.setattr(exporting, "ROWS_OF_JSON", 3)
    monkeypatch.setattr(exporting, "GROUP_ROWS", 5)
    for _ in range(3):
        finish(1, 2, 3)
    question = Question(sort="-robust_accuracy", filter="scale < 3")
    rows = insights.results(question)["items"]
    table = exporting.table(insights.database, question)
    frame = pl.read_parquet(io.BytesIO(b"".join(exporting.parquet_bytes(table))))
    assert frame.columns == list(exporting.COLUMNS)
    assert frame["job_id"].to_list() == [row["job_id"] for row in rows]
    assert frame["robust_accuracy"].to_list() == [row["robust_accuracy"] for row in rows]
    assert frame["attack.eps"].to_list() == [row["attack"]["eps"] for row in rows]
    assert frame["recipe.flip"].dtype == pl.Boolean
    assert frame["finished_at"].dt.strftime("%Y").to_list() == [row["finished_at"][:4] for row in rows]
    lines = list(csv.DictReader(io.StringIO("".join(exporting.csv_lines(table)))))
    assert [line["job_id"] for line in lines] == [row["job_id"] for row in rows]
    assert [line["created_at"] for line in lines] == [row["created_at"] for row in rows]
    assert [line["attack.norm"] for line in lines] == ["linf"] * 6

    every = exporting.table(insights.database, Question(fields=("*",)))
    wide = pl.read_parquet(io.BytesIO(b"".join(exporting.parquet_bytes(every))))
    assert wide["flip_rate"].to_list() == [0.5] * 9
    assert '"torch":"2"' in wide["provenance"][0]
    named = exporting.table(insights.database, Question(fields=("seed", "provenance.torch", "flip_rate", "recipe")))
    assert "".join(exporting.csv_lines(named)).splitlines()[:2] == [
        "seed,provenance.torch,flip_rate,recipe",
        "2,2,0.5,standard",
    ]
    empty = exporting.table(insights.database, Question(filter="scale > 100"))
    assert pl.read_parquet(io.BytesIO(b"".join(exporting.parquet_bytes(empty)))).shape == (0, len(exporting.COLUMNS))


def test_a_task_that_is_computed_again_changes_what_is_shown(lab: Any, insights: Insights, finish: Any) -> None:
    finish(1)
    [row] = insights.results(Question())["items"]
    task_id = insights.result(row["job_id"])["parts"]["attack"]["task_id"]
    with lab.database.write() as connection:
        joining.reopen(connection, 1.0, "ann", {task_id: TaskState.QUEUED})
    [grant] = lab.grant()
    lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, robust_accuracy=0.125)))
    assert [row["robust_accuracy"] for row in insights.results(Question())["items"]] == [0.125]
