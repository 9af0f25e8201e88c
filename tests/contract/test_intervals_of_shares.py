"""Every accuracy has its Wilson interval, over the images that it is a share of, on SQLite and on PostgreSQL."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from typed import number

from service.model.executor import Outcome, Succeeded
from service.model.observations import FRACTIONS
from service.results import aggregates, exporting
from service.results.insights import Insights
from service.results.questions import Question
from workers.science.evaluation import evaluate_attack

N, CORRECT, TEST = 200, 160, 500  # samples of the jobs, those that are right without an attack, test images of digits
OF_ATTACK = {
    "clean_accuracy": CORRECT / N, "robust_accuracy": 30 / N, "robust_accuracy_any_iterate": 20 / N,
    "robust_top5_accuracy": 180 / N, "robust_accuracy_of_correct": 25 / CORRECT, "flip_rate": 135 / CORRECT,
}  # fmt: skip
FRACTION_OF = {**OF_ATTACK, "test_accuracy": 0.9}
IMAGES = {"samples": N, "n_clean_correct": CORRECT, "test_samples": TEST}


def wilson(share: float, images: int) -> tuple[float, float]:
    found = stats.binomtest(round(share * images), images).proportion_ci(method="wilson")
    return found.low, found.high


def expected(name: str, images: int | None = None) -> tuple[float, float]:
    return wilson(FRACTION_OF[name], images or IMAGES[FRACTIONS[name]])


def finish(lab: Any, **numbers: Any) -> None:
    """Trainings leave weights by their seed; attacks leave `OF_ATTACK`, changed by `numbers`."""

    def answer(grant: Any) -> Outcome:
        if grant.spec["kind"] == "train":
            weights = lab.artifacts.write_chunks("checkpoint", [f"weights of {grant.spec['seed']}".encode()])
            outcome: Outcome = replace(lab.outcome(grant), artifacts=(weights,))
            return outcome
        of_attack = {**OF_ATTACK, "n_clean_correct": CORRECT, **numbers} if grant.spec["kind"] == "attack" else {}
        left: Outcome = lab.outcome(grant, **of_attack)
        return left

    while grants := lab.grant():
        lab.record(*(Succeeded(grant.task_id, grant.attempt, answer(grant)) for grant in grants))


def exported(lab: Any, kind: str, *fields: str) -> dict[str, Any]:
    """The only row, as a file of this kind has it."""
    question = Question(fields=fields)
    match kind:
        case "csv":
            text = "".join(exporting.csv_lines(exporting.table(lab.database, question)))
            [row] = csv.DictReader(io.StringIO(text))
        case "ndjson":
            [line] = exporting.json_lines(Insights(lab.database).all_results(question))
            row = json.loads(line)
        case "parquet":
            content = b"".join(exporting.parquet_bytes(exporting.table(lab.database, question)))
            [row] = pl.read_parquet(io.BytesIO(content)).rows(named=True)
        case _:
            [row] = Insights(lab.database).results(question)["items"]
    return dict(row)


def bounds(row: dict[str, Any], name: str) -> tuple[float, float]:
    return float(row[f"{name}_ci95_low"]), float(row[f"{name}_ci95_high"])


@pytest.mark.parametrize("kind", ["page", "csv", "ndjson", "parquet"])
def test_each_share_of_a_result_has_the_interval_of_its_own_images(lab: Any, kind: str) -> None:
    job_id = lab.submit(samples=N)
    finish(lab)
    assert FRACTION_OF.keys() == FRACTIONS.keys()
    for name in FRACTIONS:
        fields = (f"{name}_ci95_low", f"{name}_ci95_high")
        assert bounds(exported(lab, kind, *fields), name) == pytest.approx(expected(name))
    whole = exported(lab, kind, "*")
    for name in FRACTIONS:
        assert bounds(whole, name) == pytest.approx(expected(name))
    by_default = exported(lab, kind)
    of_columns = ("clean_accuracy", "robust_accuracy", "test_accuracy")
    for name in of_columns if kind in ("csv", "parquet") else FRACTIONS:
        assert bounds(by_default, name) == pytest.approx(expected(name))
    one = Insights(lab.database).result(job_id)
    for name in FRACTIONS:
        assert bounds(one, name) == pytest.approx(expected(name))


def test_where_the_images_are_not_known_there_is_no_interval(lab: Any) -> None:
    """An attack of an early version does not tell how many images were right."""
    lab.submit(samples=N)
    finish(lab, n_clean_correct=None, robust_top5_accuracy=None)
    row = exported(lab, "page", "*")
    for name in ("robust_accuracy_of_correct", "flip_rate", "robust_top5_accuracy"):
        assert row[f"{name}_ci95_low"] is row[f"{name}_ci95_high"] is None
    assert bounds(row, "robust_accuracy_any_iterate") == pytest.approx(expected("robust_accuracy_any_iterate"))
    metrics = aggregates.metrics_of("flip_rate:mean,ci95,test_accuracy:ci95")
    [found] = aggregates.aggregate(lab.database, [], [], metrics)["items"]
    assert (found["flip_rate"]["ci95_low"], found["flip_rate"]["ci95_of"]) == (None, None)
    assert found["test_accuracy"]["ci95_of"] == "images"


def test_the_test_images_of_a_labs_own_data_set_are_its_own(lab: Any) -> None:
    def upload(n: int) -> str:
        buffer = io.BytesIO()
        np.savez(buffer, x=np.zeros((n, 8, 8, 1), np.uint8), y=np.arange(n) % 10)
        return str(lab.artifacts.write_chunks("dataset", [buffer.getvalue()]).digest)

    lab.service.register_dataset("mine", upload(30), upload(20), user="ann")
    lab.submit(dataset="npz:mine", samples=10)
    finish(lab)
    for kind in ("page", "csv"):
        row = exported(lab, kind, "test_accuracy_ci95_low", "test_accuracy_ci95_high")
        assert bounds(row, "test_accuracy") == pytest.approx(wilson(0.9, 20))
    metrics = aggregates.metrics_of("test_accuracy:ci95")
    [found] = aggregates.aggregate(lab.database, [], [], metrics)["items"]
    said = found["test_accuracy"]
    assert (said["ci95_low"], said["ci95_high"]) == pytest.approx(wilson(0.9, 20))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("by", [(), ("attack_seed",), ("dataset", "scale")])
def test_a_group_without_a_spread_has_the_interval_of_its_distinct_images(
    lab: Any, seeds: tuple[int, ...], by: tuple[str, ...]
) -> None:
    """However many networks show the same share: these are the same images."""
    lab.submit_sweep({"samples": [N], "seed": list(seeds)})
    finish(lab)
    metrics = dict.fromkeys(FRACTIONS, ("mean", "ci95"))
    [found] = aggregates.aggregate(lab.database, [], by, metrics)["items"]
    for name in FRACTIONS:
        said = found[name]
        assert said["ci95_of"] == "images"
        assert (said["ci95_low"], said["ci95_high"]) == pytest.approx(expected(name)), name


def test_of_networks_with_equal_shares_the_best_one_counts(lab: Any) -> None:
    """Each flips half of what it gets right: 160 images of one, 80 of the other, which may be among these."""
    lab.submit(samples=N, seed=0)
    finish(lab, flip_rate=0.5)
    lab.submit(samples=N, seed=1)
    finish(lab, flip_rate=0.5, n_clean_correct=80)
    metrics = aggregates.metrics_of("flip_rate:ci95,count")
    [found] = aggregates.aggregate(lab.database, [], [], metrics)["items"]
    said = found["flip_rate"]
    assert (said["count"], said["ci95_of"]) == (2, "images")
    assert (said["ci95_low"], said["ci95_high"]) == pytest.approx(wilson(0.5, 160))
    each = aggregates.aggregate(lab.database, [], ["seed"], metrics)["items"]
    assert [one["flip_rate"]["ci95_low"] for one in each] == pytest.approx([wilson(0.5, n)[0] for n in (160, 80)])
    lab.submit(samples=N, seed=2)
    finish(lab, flip_rate=0.75)
    [spread] = aggregates.aggregate(lab.database, [], [], metrics)["items"]
    assert spread["flip_rate"]["ci95_of"] == "networks"


def test_the_names_and_counts_of_shares_are_those_that_attacks_leave() -> None:
    """Each share times its number of images is a whole number of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7)).eval()
    x, y = torch.rand(50, 3, 2, 2), torch.randint(7, (50,))
    params = {"norm": "linf", "eps": 0.2}
    numbers = evaluate_attack(model, x, y, torch.arange(50), attack="fgsm", params=params).numbers
    counts = {"samples": 50, "n_clean_correct": number(numbers, "n_clean_correct")}
    assert 0 < counts["n_clean_correct"] < 50
    for name in FRACTIONS.keys() - {"test_accuracy"}:
        images = number(numbers, name) * counts[FRACTIONS[name]]
        assert images == pytest.approx(round(images), abs=1e-9), name
