"""Groups, comparisons, leaderboards, correlations and retractions, against what plain Python says of the same rows."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sqlalchemy import insert, update

from service.errors import Conflict, InvalidQuery, InvalidSpec, NotFound, QuotaExceeded
from service.lab.access import NotAllowed
from service.model.dotted import flat
from service.model.executor import Bits, Outcome, Succeeded
from service.model.query import parse
from service.queue import retractions
from service.queue.verbs import Service
from service.results import aggregates, comparing, correlating, leaderboard
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.settings import Settings
from service.specs.attacks import PRESETS
from service.specs.versions import version_of
from service.store import aggregating, filing, tables
from service.store.result_fields import RESULTS
from service.store.result_tables import cells, results
from service.store.tables import jobs

pytestmark = pytest.mark.slow

N = 16


@pytest.fixture
def insights(lab: Any) -> Insights:
    return Insights(lab.database)


def finish(lab: Any) -> None:
    """Numbers that depend on the digest, so that the same task says the same whoever asked for it."""
    while grants := lab.grant():
        for grant in grants:
            random = np.random.RandomState(int(grant.digest[:8], 16))
            outcome: Outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack":
                n = grant.spec["samples"]
                robust = random.rand(n) < 0.6
                bits = {**outcome.bits, "robust": Bits(n, np.packbits(robust).tobytes())}
                numbers = {**outcome.numbers, "robust_accuracy": float(robust.mean()), "clean_accuracy": 1.0}
                numbers["outside_ball"] = int(random.rand() < 0.3)  # then nothing is to be trusted
                numbers["flip_rate"] = None if random.rand() < 0.2 else float(random.rand())
                outcome = Outcome(numbers, outcome.curves, bits, (), outcome.provenance)
            if grant.spec["kind"] == "measure":
                outcome.numbers["log_relative_sharpness_median"] = float(random.randn())
                if grant.spec["measure"]["type"] == "fisher_rao":
                    outcome.numbers["fisher_rao_norm"] = float(random.rand())
                if grant.spec["measure"]["type"] == "sam_sharpness":
                    outcome.numbers["sam_sharpness_loss"] = float(random.rand())
            if grant.spec["kind"] == "train":
                outcome.numbers["test_accuracy"] = float(random.rand())
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))


def distinct(rows: list[dict[str, Any]], by: list[str], metric: str, key: str) -> dict[tuple[Any, ...], list[float]]:
    """The values of each group, one for each of what `key` names."""
    groups: dict[tuple[Any, ...], dict[Any, float]] = defaultdict(dict)
    for row in rows:
        values = groups[tuple(row[name] for name in by)]
        if row[metric] is not None:
            values[row["attack_digest"] if key == "attack" else tuple(row[name] for name in key.split(","))] = row[
                metric
            ]
    return {group: list(values.values()) for group, values in groups.items()}


def test_groups(lab: Any, insights: Insights) -> None:
    grid = {"scale": [1, 5], "seed": [0, 1, 2, 3], "architecture": ["mlp", "simple_cnn"]}
    lab.submit_sweep(grid, user="ann")
    lab.submit_sweep({**grid, "seed": [2, 3, 4]}, user="bob")  # half of it is known, and counted once
    finish(lab)
    rows = insights.results(Question(limit=1000, fields=("*",)))["items"]
    assert len(rows) == 28
    asked = aggregates.metrics_of("robust_accuracy:mean,std,ci95,median,q05,min,max,count,best,worst,flip_rate")
    for text, by in [
        (None, ["architecture", "scale"]),
        ("user = bob", ["scale", "architecture"]),
        (None, ["user", "architecture", "scale"]),
        ("seed < 3", ["architecture", "scale", "seed"]),
    ]:
        found = aggregates.aggregate(lab.database, nodes_of(text), by, asked)
        assert found["mixed"] == {}
        these = [row for row in rows if text is None or (row["seed"] < 3 if "seed" in text else row["user"] == "bob")]
        groups = distinct(these, by, "robust_accuracy", "attack")
        assert [tuple(item[name] for name in by) for item in found["items"]] == sorted(groups)
        for item in found["items"]:
            of, said = groups[tuple(item[name] for name in by)], item["robust_accuracy"]
            assert said["count"] == len(of)
            assert said["mean"] == pytest.approx(np.mean(of))
            assert (said["min"], said["max"], said["best"], said["worst"]) == (min(of), max(of), max(of), min(of))
            assert said["median"] == np.quantile(of, 0.5, method="inverted_cdf")
            assert said["q05"] == min(of)
            [best] = [row for row in rows if row["job_id"] == said["best_job_id"]]
            assert best["robust_accuracy"] == max(of)
            assert said["std"] == (None if len(of) == 1 else pytest.approx(np.std(of, ddof=1), abs=1e-9))
            bounds = (said["ci95_low"], said["ci95_high"])
            if len(set(of)) == 1:  # one network, or several that show no spread: the images tell
                wilson = stats.binomtest(round(of[0] * N), N).proportion_ci(method="wilson")
                assert bounds == pytest.approx((wilson.low, wilson.high))
                assert said["ci95_of"] == "images"
                continue
            half = stats.t.ppf(0.975, len(of) - 1) * stats.sem(of)
            assert bounds == pytest.approx((max(0, np.mean(of) - half), min(1, np.mean(of) + half)))
            assert said["ci95_of"] == "networks"
        flips = distinct(these, by, "flip_rate", "attack")
        for item in found["items"]:
            assert item["flip_rate"]["count"] == len(flips[tuple(item[name] for name in by)])


def test_a_number_of_a_measure_is_counted_once_however_many_attacks_it_stands_beside(
    lab: Any, insights: Insights
) -> None:
    attacks = ["pgd_linf", "pgd_l2", *({"type": "fgsm", "norm": "linf", "eps": f"{n}/255"} for n in (1, 2, 4))]
    for user in ("ann", "bob"):
        for attack in attacks:
            for seed in (0, 1):
                lab.submit(user, attack=attack, seed=seed, scale=5, measures=["fisher_rao"])
    finish(lab)
    rows = insights.results(Question(limit=100, fields=("*",)))["items"]
    assert len(rows) == 20
    for name in ("fisher_rao_norm", "log_relative_sharpness_median"):
        of = {row["seed"]: row[name] for row in rows}
        [item] = aggregates.aggregate(lab.database, [], ["scale"], {name: ("count", "mean", "std")}, allow_mixed=True)[
            "items"
        ]
        assert item["results"] == 20
        assert item[name] == {
            "count": 2,
            "mean": pytest.approx(np.mean(list(of.values()))),
            "std": pytest.approx(np.std(list(of.values()), ddof=1)),
        }
    metrics = {"robust_accuracy": ("count", "mean")}
    [item] = aggregates.aggregate(lab.database, [], ["scale"], metrics, allow_mixed=True)["items"]
    of = {row["attack_digest"]: row["robust_accuracy"] for row in rows}  # five of each network, twice
    assert (item["networks"], item["robust_accuracy"]["count"], len(of)) == (2, 2, 10)
    assert item["robust_accuracy"]["mean"] == pytest.approx(np.mean(list(of.values())))


def test_what_would_take_minutes_is_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.submit_sweep({"seed": list(range(4))})
    finish(lab)
    monkeypatch.setattr(aggregates, "MAX_BEST", 3)
    with pytest.raises(InvalidQuery, match="best and worst are for 3 groups at most, not 4"):
        aggregates.aggregate(lab.database, [], ["seed"], {"robust_accuracy": ("mean", "best")})
    aggregates.aggregate(lab.database, [], ["seed"], {"robust_accuracy": ("mean",)})


@pytest.mark.parametrize(
    ("limits", "by"), [({"MAX_PAIRS": 399, "LEAST_PAIRS": 1}, []), ({"MAX_PAIRS": 19_999}, ["architecture"])]
)
def test_a_bootstrap_of_too_much_is_refused(
    lab: Any, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], by: list[str]
) -> None:
    """One group of too many pairs, or too many groups however few the pairs of each are."""
    lab.submit_sweep({"seed": list(range(10)), "architecture": ["mlp", "simple_cnn"]})
    finish(lab)
    for name, value in limits.items():
        monkeypatch.setattr(correlating, name, value)
    with pytest.raises(InvalidQuery, match=rf"20 networks in {1 + len(by)} groups are too many"):
        correlating.correlations(lab.database, [], "test_accuracy", by=by, trusted=False)
    few = nodes_of("seed < 9")  # too few to be resampled: they cost nothing
    assert len(correlating.correlations(lab.database, few, "test_accuracy", by=["architecture"], trusted=False)) == 2
    monkeypatch.setattr(correlating, "MAX_PAIRS", limits["MAX_PAIRS"] + 1)
    assert len(correlating.correlations(lab.database, [], "test_accuracy", by=by, trusted=False)) == 1 + len(by)


def test_what_differs_in_more_than_seeds_is_not_averaged(lab: Any, insights: Insights) -> None:
    lab.submit_sweep({"scale": [1, 5], "attack": ["pgd_linf", "pgd_l2"], "seed": [0, 1]})
    lab.submit(samples=8, seed=0)
    finish(lab)
    metrics = {"robust_accuracy": ("mean",), "test_accuracy": ("mean", "count")}
    with pytest.raises(InvalidQuery, match="allow_mixed") as refused:
        aggregates.aggregate(lab.database, [], ["scale"], metrics)
    for name in ("attack.eps", "attack.norm", "samples"):
        assert name in refused.value.sentence
    assert "seed" not in refused.value.sentence.replace("than seeds", "")
    one_attack = nodes_of("attack.norm = l2")
    assert len(aggregates.aggregate(lab.database, one_attack, ["scale"], metrics)["items"]) == 2
    assert len(aggregates.aggregate(lab.database, [], ["scale", "norm", "samples"], metrics)["items"]) == 5
    found = aggregates.aggregate(lab.database, [], ["scale"], metrics, allow_mixed=True)
    assert found["mixed"]["attack.norm"] == ["linf", "l2"]
    rows = insights.results(Question(limit=1000))["items"]
    trained = {row["seed"]: row["test_accuracy"] for row in rows}
    for item in found["items"]:  # a training is counted once, however many attacks rest on it
        assert item["test_accuracy"]["count"] == 2
        assert item["test_accuracy"]["mean"] == pytest.approx(np.mean(list(trained.values())))
    for by, metric, said in [
        (["colour"], "robust_accuracy", "colour"),
        (["measures"], "robust_accuracy", "list"),
        (["scale"], "verdict", "numbers"),
        (["scale"], "robust_acuracy", "robust_accuracy"),
    ]:
        with pytest.raises(InvalidQuery, match=said):
            aggregates.aggregate(lab.database, [], by, {metric: ("mean",)})
    for text in ("mean", "robust_accuracy:mode", ":mean,x"):
        with pytest.raises(InvalidQuery):
            aggregates.aggregate(lab.database, [], [], aggregates.metrics_of(text), allow_mixed=True)


INTEGERS = [name for name, of in RESULTS.known.items() if of.kind == "integer"]


def test_statistics_of_every_integer(lab: Any, insights: Insights) -> None:
    """Also of the largest ones, whose squares no integer of a database holds."""
    for seed in (2**31 - 1, 2**31 - 2, 7):
        lab.submit(seed=seed, attack_seed=seed, recipe={"train_samples": 1_297})
    finish(lab)
    rows = [dict(flat(row)) for row in insights.results(Question(limit=100))["items"]]
    asked = ("mean", "std", "min", "max", "median", "count", "best", "worst")
    for name in INTEGERS:
        [item] = aggregates.aggregate(lab.database, [], [], {name: asked}, allow_mixed=True)["items"]
        values = [row[name] for row in rows if row.get(name) is not None]
        assert item[name]["count"] == len(values), name
        if values:
            assert (item[name]["min"], item[name]["max"]) == (min(values), max(values))
            assert item[name]["mean"] == pytest.approx(np.mean(values))
            assert item[name]["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert "seed" in INTEGERS
    assert "versions.control" in INTEGERS


def test_too_many_groups_are_refused_before_all_rows_are_read(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.submit_sweep({"seed": list(range(12)), "scale": [1, 5]})
    finish(lab)
    monkeypatch.setattr(aggregates, "MAX_GROUPS", 3)
    monkeypatch.setattr(aggregating, "FETCHED", 4)
    taken: list[int] = []
    moments = aggregating.moments

    def counted(*arguments: Any) -> Any:
        for rows in moments(*arguments):
            taken.append(len(rows))
            yield rows

    monkeypatch.setattr(aggregating, "moments", counted)
    with pytest.raises(InvalidQuery, match="more than 3 groups"):
        aggregates.aggregate(lab.database, [], ["job_id"], {"robust_accuracy": ("mean",)})
    assert taken == [4]
    found = aggregates.aggregate(lab.database, [], ["user", "scale"], {"robust_accuracy": ("mean",)})
    assert [item["results"] for item in found["items"]] == [12, 12]


def test_too_much_at_once_is_refused(lab: Any) -> None:
    with pytest.raises(InvalidQuery, match="at most 20 can be asked for"):
        aggregates.metrics_of(",".join(f"number_{i}" for i in range(21)))
    assert aggregates.metrics_of("robust_accuracy:mean,mean,q05,q05") == {"robust_accuracy": ("mean", "q05")}
    by = list(RESULTS.known)[:21]
    with pytest.raises(InvalidQuery, match="at most 20 can be grouped by"):
        aggregates.aggregate(lab.database, [], by, {"robust_accuracy": ("mean",)})


def test_a_measure_with_other_parameters_is_not_averaged(lab: Any, insights: Insights) -> None:
    for seed in range(4):
        lab.submit(seed=seed, measures=[{"type": "sam_sharpness", "rho": 0.05 if seed < 2 else 0.5}])
    lab.submit(seed=9)
    finish(lab)
    metrics = {"sam_sharpness_loss": ("mean", "count")}
    with pytest.raises(InvalidQuery, match=r"measures\.sam_sharpness\.rho \(0\.05, 0\.5\)") as refused:
        aggregates.aggregate(lab.database, [], [], metrics)
    assert "(by: measures.sam_sharpness.rho)" in refused.value.sentence
    found = aggregates.aggregate(lab.database, [], [], metrics, allow_mixed=True)
    assert found["mixed"] == {"measures.sam_sharpness.rho": [0.05, 0.5]}
    rho = "measures.sam_sharpness.rho"
    by = aggregates.aggregate(lab.database, [], [rho], metrics)["items"]
    assert [(item[rho], item["sam_sharpness_loss"]["count"]) for item in by] == [(0.05, 2), (0.5, 2), (None, 0)]
    current = version_of("measure", "sam_sharpness")
    chosen = nodes_of(f"{rho} = 0.5 and measures.sam_sharpness.version = {current}")
    one = aggregates.aggregate(lab.database, chosen, [], metrics)
    assert one["items"][0]["results"] == 2
    assert aggregates.aggregate(lab.database, [], [], {"robust_accuracy": ("mean",)})["mixed"] == {}

    apart = correlating.correlations(lab.database, [], "sam_sharpness_loss", trusted=False)
    assert sorted((group["measure_spec"]["rho"], group["n"]) for group in apart) == [(0.05, 2), (0.5, 2)]
    assert {(group["measure_spec"]["version"], group["target_spec"]) for group in apart} == {(current, None)}
    [alike] = correlating.correlations(lab.database, [], "test_accuracy", trusted=False)
    assert (alike["n"], alike["measure_spec"]) == (5, None)
    apart = correlating.correlations(
        lab.database, [], "test_accuracy", target="sam_sharpness_loss", by=["user"], trusted=False
    )
    assert sorted((group["target_spec"]["rho"], group["user"]) for group in apart) == [(0.05, "ann"), (0.5, "ann")]
    with lab.database.write() as connection:  # as if the measure had been defined anew in between
        task = next(row for row in lab.rows(tables.tasks) if "sam_sharpness" in str(row.spec))
        connection.execute(update(tables.tasks).where(tables.tasks.c.id == task.id).values(version=current + 1))
    mixed = aggregates.aggregate(lab.database, nodes_of(f"{rho} = 0.05"), [], metrics, allow_mixed=True)["mixed"]
    assert sorted(mixed["measures.sam_sharpness.version"]) == [current, current + 1]
    by_version = aggregates.aggregate(lab.database, [], [*mixed, rho], metrics)["items"]
    assert sorted(item["sam_sharpness_loss"]["count"] for item in by_version) == [0, 1, 1, 2]


def test_whatever_a_refusal_to_mix_names_can_be_grouped_by(lab: Any) -> None:
    """The fields that cells of all sorts differ in."""
    source = {"architecture": "simple_cnn", "recipe": {"name": "trades"}, "seed": 3}
    attacks = ["pgd_linf", "cw", "noise", "square", {"type": "transfer", "attack": "pgd_linf", "source": source}]
    attacks[-1] = {**attacks[-1], "attack": PRESETS["apgd"].model_dump(mode="json")}  # type: ignore[dict-item]
    for attack in [*attacks, "transfer"]:
        lab.submit(attack=attack, measures=["sam_sharpness"])
    lab.submit(recipe={"name": "sam", "train_samples": 100}, scale=5, scale_bias=False, samples=8)
    lab.submit(measures=[{"type": "sam_sharpness", "rho": 0.5}])
    finish(lab)
    metrics = {"robust_accuracy": ("count",), "sam_sharpness_loss": ("count",)}
    mixed = aggregates.aggregate(lab.database, [], [], metrics, allow_mixed=True)["mixed"]
    assert {"attack.attack.rho", "attack.source.recipe.beta", "recipe.train_samples", "scale_bias"} <= mixed.keys()
    assert {"versions.control", "measures.sam_sharpness.rho"} <= mixed.keys()
    for name in mixed:
        assert aggregates.aggregate(lab.database, [], [name], metrics, allow_mixed=True)["items"], name


def test_groups_of_nothing(lab: Any) -> None:
    assert aggregates.aggregate(lab.database, [], ["scale"], {"robust_accuracy": ("mean",)})["items"] == []


def test_comparing(lab: Any, insights: Insights) -> None:
    ids = [lab.submit(attack=attack) for attack in ("pgd_linf", "square")] + [lab.submit(seed=1), lab.submit(samples=8)]
    finish(lab)
    bits = {}
    for job_id in ids:
        [row] = lab.rows(tables.outcome_bits, task_id=lab.job(job_id).attack_task_id, name="robust")
        bits[job_id] = np.unpackbits(np.frombuffer(row.packed, np.uint8), count=row.n).astype(bool)
    found = comparing.compare(lab.database, ids[:2])
    assert {"attack.type", "attack.queries", "attack.steps"} <= set(found["differing"]) - {"attack.norm", "attack.eps"}
    [pair] = found["pairs"]
    a, b = bits[ids[0]], bits[ids[1]]
    only = int((a & ~b).sum()), int((b & ~a).sum())
    assert (pair["only_a"], pair["only_b"], pair["both"]) == (*only, int((a & b).sum()))
    assert pair["p_value"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert pair["difference_low"] <= pair["difference"] == (only[0] - only[1]) / N <= pair["difference_high"]
    assert found["union"]["robust_accuracy"] == (a & b).mean()
    assert found["union"]["broken_only_by"] == {ids[0]: only[1], ids[1]: only[0]}
    assert comparing.compare(lab.database, [ids[0], ids[2]])["union"] is None
    with pytest.raises(InvalidQuery):
        comparing.compare(lab.database, ids[:1])
    with pytest.raises(NotFound):
        comparing.compare(lab.database, [ids[0], "nothing"])


def test_samples_in_another_order_are_other_images(lab: Any, insights: Insights) -> None:
    """No pair of examples, no common group or board; results from before there was an order are in today's cells."""
    ids = [lab.submit(), lab.submit(order="file"), lab.submit(seed=1)]
    finish(lab)
    with pytest.raises(InvalidQuery, match="different orders"):
        comparing.compare(lab.database, ids[:2])
    metrics = {"robust_accuracy": ("count",)}
    with pytest.raises(InvalidQuery, match="order"):
        aggregates.aggregate(lab.database, [], [], metrics)
    by = aggregates.aggregate(lab.database, [], ["order"], metrics)["items"]
    assert {item["order"]: item["robust_accuracy"]["count"] for item in by} == {"file": 1, "permutation": 2}
    boards = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert sorted((board["order"], len(board["rows"])) for board in boards) == [("file", 1), ("permutation", 1)]
    apart = correlating.correlations(lab.database, [], "test_accuracy", trusted=False)
    assert sorted((group["order"], group["n"]) for group in apart) == [("file", 1), ("permutation", 2)]

    [row] = [row for row in lab.rows(tables.jobs) if row.id == ids[2]]
    old = {name: value for name, value in row.spec.items() if name != "order"}
    assert filing.cell_spec(old, {}) == filing.cell_spec(row.spec, {})
    with lab.database.write() as connection:
        connection.execute(update(tables.jobs).where(tables.jobs.c.id == row.id).values(spec=old))
    for ask, name in ((insights.jobs, "id"), (insights.results, "job_id")):
        found = ask(Question(filter="order = permutation"))["items"]
        assert {item[name] for item in found} == {ids[0], ids[2]}
    assert {item["order"] for item in insights.results(Question(filter="order = permutation"))["items"]} == {
        "permutation"
    }
    assert comparing.compare(lab.database, [ids[0], ids[2]])["differing"].keys() == {"seed"}


def test_the_bootstrap_is_one_over_examples() -> None:
    random = np.random.RandomState(1)
    a, b = random.rand(200) < 0.7, random.rand(200) < 0.5
    said = comparing.paired(a, b)
    difference = a.astype(float) - b.astype(float)
    means = [difference[random.randint(0, 200, 200)].mean() for _ in range(4000)]
    assert (said["difference_low"], said["difference_high"]) == pytest.approx(
        np.quantile(means, (0.025, 0.975)), abs=0.015
    )


def test_leaderboard(lab: Any, insights: Insights) -> None:
    lab.submit_sweep(
        {"architecture": ["mlp", "simple_cnn"], "seed": [0, 1], "attack": ["pgd_linf", "pgd_l2"], "scale": [1, 5]}
    )
    lab.submit(user="bob")  # the same again
    finish(lab)
    rows = insights.results(Question(limit=100))["items"]
    boards = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert {board["preset"] for board in boards} == {"pgd_linf", "pgd_l2"}
    [board] = leaderboard.leaderboard(lab.database, [], attack="pgd_linf", trusted=False)
    assert [row["rank"] for row in board["rows"]] == list(range(1, 1 + len(board["rows"])))
    believed = [row for row in rows if row["verdict_checks"]["outside_ball"] == "passed"]
    for row in board["rows"]:
        mine = [r for r in rows if r["architecture"] == row["architecture"] and r["attack"]["norm"] == "linf"]
        proven = {r["weights_sha256"] for r in mine if r in believed}
        single = {r["weights_sha256"]: r["robust_accuracy"] for r in mine if r["scale"] == 1}
        assert row["networks"] == len(proven)
        assert row["robust_accuracy"] == pytest.approx(np.mean([single[network] for network in proven]))
        assert row["robust_accuracy_worst_case"] <= row["robust_accuracy"] or row["left_out"]
    trusted = {(row["weights_sha256"], row["threat_model"]) for row in rows
               if row["verdict"] == "trusted" and row["scale"] == 1}  # fmt: skip
    shown = sum(row["networks"] for board in leaderboard.leaderboard(lab.database, []) for row in board["rows"])
    assert shown == len(trusted) < 8
    with pytest.raises(InvalidQuery, match="pgd_linf"):
        leaderboard.leaderboard(lab.database, [], attack="pgd_l3")


def test_a_network_stands_once_however_often_its_measures_were_defined_anew(lab: Any, insights: Insights) -> None:
    """As where the same jobs are submitted again after the versions of measures and controls went up."""
    lab.submit_sweep({"seed": [0, 1], "architecture": ["mlp", "simple_cnn"]})
    lab.submit_sweep({"seed": [1, 2], "architecture": ["mlp", "simple_cnn"]}, user="bob")
    finish(lab)
    [before] = leaderboard.leaderboard(lab.database, [], trusted=False)
    with lab.database.write() as connection:
        for cell in lab.rows(cells):
            spec = {**cell.spec, "versions": {**cell.spec["versions"], "measure": 2, "control": 3}}
            row = filing.cell_row(filing.cell_digest(spec), spec)
            again = connection.execute(insert(cells).values(row).returning(cells.c.id)).scalar_one()
            theirs = (results.c.cell_id == cell.id) & (results.c.user == "bob")
            connection.execute(update(results).where(theirs).values(cell_id=again))
    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert [row["networks"] for row in board["rows"]] == [row["networks"] for row in before["rows"]]
    for row, was in zip(board["rows"], before["rows"], strict=True):
        assert row == {name: pytest.approx(value) if isinstance(value, float) else value for name, value in was.items()}


def test_correlations(lab: Any, insights: Insights) -> None:
    lab.submit_sweep({"architecture": ["mlp", "simple_cnn"], "seed": list(range(6)), "scale": [1, 5]})
    lab.submit(user="bob")  # the same again
    finish(lab)
    [found] = correlating.correlations(lab.database, [], "log_relative_sharpness_median", trusted=False)
    rows = insights.results(Question(limit=100, filter="scale = 1 and user = ann"))["items"]
    x, y = ([row[name] for row in rows] for name in ("log_relative_sharpness_median", "robust_accuracy"))
    assert (found["n"], found["architectures"], found["dataset"]) == (12, 2, "digits")
    assert found["pooled"] == pytest.approx(stats.kendalltau(x, y).statistic)
    every = {(row["scale"], row["architecture"], row["seed"]) for row in insights.results(Question(limit=100))["items"]}
    assert found["over_scales"]["n"] == len(every) == 24
    assert "confounded by design" in found["over_scales"]["note"]
    by = correlating.correlations(lab.database, [], "test_accuracy", by=["architecture"], trusted=False)
    assert [(group["architecture"], group["n"], group["pooled"]) for group in by] == [
        ("mlp", 6, None),
        ("simple_cnn", 6, None),
    ]
    trusted = [row for row in rows if row["verdict"] == "trusted"]
    assert [group["n"] for group in correlating.correlations(lab.database, [], "test_accuracy")] == [len(trusted)]
    assert 0 < len(trusted) < 12
    with pytest.raises(InvalidQuery):
        correlating.correlations(lab.database, [], "verdict")
    with lab.database.write() as connection:  # as if a measure of these had been defined anew
        for cell in lab.rows(cells, architecture="mlp"):
            spec = {**cell.spec, "versions": {**cell.spec["versions"], "measure": 99}}
            connection.execute(update(cells).where(cells.c.id == cell.id).values(spec=spec))
    apart = correlating.correlations(lab.database, [], "log_relative_sharpness_median", trusted=False)
    assert sorted((group["measure_version"] == 99, group["n"]) for group in apart) == [(False, 6), (True, 6)]


def test_what_is_not_accepted_any_more_is_not_computed_again(lab: Any, insights: Insights) -> None:
    job = lab.submit()
    finish(lab)
    [row] = lab.rows(jobs)
    with lab.database.write() as connection:  # as an earlier version accepted it
        connection.execute(update(jobs).values(spec={**row.spec, "architecture": "vgg11_bn"}))
    with pytest.raises(InvalidSpec, match="/rerun: a job of these is not accepted any more: /architecture: vgg11_bn"):
        retractions.retract(lab.service, job, "a bug", user="ann", rerun=True, admin=True)
    assert insights.result(job)["retracted_at"] is None


def test_retraction(lab: Any, insights: Insights) -> None:
    first, same, other = lab.submit(), lab.submit(user="bob"), lab.submit(scale=5)
    finish(lab)
    done = retractions.retract(lab.service, first, "a bug", user="ann", rerun=True, admin=True)
    assert done["retracted"] == sorted([first, same])
    assert {row["job_id"] for row in insights.results(Question())["items"]} == {other}
    every = insights.results(Question(retracted=True, filter="retraction_reason = 'a bug'"))["items"]
    assert {row["job_id"] for row in every} == {first, same}
    assert insights.result(first)["retracted_by"] == "ann"
    assert insights.result(first)["robust_accuracy"] is not None
    with pytest.raises(Conflict, match="a bug"):
        retractions.retract(lab.service, same, "again", user="ann", admin=True)
    later = lab.submit(user="eve")  # its numbers are known, and known to be wrong
    assert later not in {row["job_id"] for row in insights.results(Question())["items"]}
    [again] = done["resubmitted"]
    finish(lab)
    assert insights.result(again)["replicate"] == 1
    assert {row["job_id"] for row in insights.results(Question())["items"]} == {other, again}
    assert {event.job_id for event in lab.rows(tables.events) if event.kind == "result.retracted"} == {first, same}
    assert sorted(retractions.restore(lab.service, first, user="ann", admin=True)["restored"]) == sorted(
        [first, same, later]
    )

    rest = retractions.retract_all(
        lab.service, [parse(f"versions.attack = {version_of('attack', 'pgd')} and scale = 5")], "all of it", user="ann"
    )
    assert rest["retracted"] == [other]
    found = aggregates.aggregate(lab.database, [], [], {"robust_accuracy": ("count",)}, allow_mixed=True)
    assert [item["results"] for item in found["items"]] == [4]
    with pytest.raises(NotFound):
        retractions.retract(lab.service, "nothing", "because", user="ann", admin=True)


def test_only_an_admin_retracts_or_restores_what_others_have_too(lab: Any, insights: Insights) -> None:
    shared, _, own = lab.submit(), lab.submit(user="bob"), lab.submit(scale=5)
    finish(lab)
    with pytest.raises(NotAllowed, match=r"bob.*ask an admin"):
        retractions.retract(lab.service, shared, "a bug", user="ann", admin=False)
    assert len(insights.results(Question())["items"]) == 3
    assert retractions.retract(lab.service, own, "a bug", user="ann", admin=False)["retracted"] == [own]
    assert retractions.restore(lab.service, own, user="ann", admin=False)["restored"] == [own]
    retractions.retract(lab.service, shared, "a bug", user="ann", admin=True)
    retractions.retract(lab.service, own, "a bug", user="root", admin=True)
    for job_id, who in ((shared, "bob"), (own, "root")):
        with pytest.raises(NotAllowed, match=f"{who}.*ask an admin"):
            retractions.restore(lab.service, job_id, user="ann", admin=False)
    assert insights.results(Question())["items"] == []


@pytest.mark.parametrize("text", [None, "", " ", "\t\n"])
def test_a_filter_that_says_nothing_retracts_nothing(lab: Any, insights: Insights, text: str | None) -> None:
    lab.submit()
    finish(lab)
    with pytest.raises(InvalidQuery, match="would retract every result"):
        retractions.retract_all(lab.service, nodes_of(text), "oops", user="root")
    assert len(insights.results(Question())["items"]) == 1


def test_a_rerun_is_of_every_spec_or_nothing_is_retracted(lab: Any, insights: Insights) -> None:
    for attack_seed in (0, 1):
        lab.submit(attack_seed=attack_seed)
    finish(lab)
    everything = [parse("scale > 0")]
    service = Service(lab.database, lab.artifacts, Settings(max_queued_jobs=1).limits)
    with pytest.raises(QuotaExceeded):
        retractions.retract_all(service, everything, "a bug", user="ann", rerun=True)
    assert len(insights.results(Question())["items"]) == 2
    again = retractions.retract_all(lab.service, everything, "a bug", user="root", rerun=True)["resubmitted"]
    specs = [row.spec for row in lab.rows(tables.jobs) if row.id in again]
    assert sorted((spec["attack_seed"], spec["replicate"]) for spec in specs) == [(0, 1), (1, 1)]
