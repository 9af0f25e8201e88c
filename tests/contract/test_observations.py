"""One observation is one trained network, on SQLite and on PostgreSQL: no repeat of it changes a count."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sqlalchemy import update

from service.errors import InvalidQuery
from service.model import verdict
from service.model.executor import Bits, Outcome, Succeeded
from service.model.observations import range_of
from service.results import aggregates, correlating, exporting, leaderboard
from service.results.insights import Insights
from service.results.questions import Question, nodes_of
from service.store import tables
from service.store.result_fields import RESULTS
from service.store.result_tables import results

N = 500
ROBUST = {0: 0.284, 1: 0.31, 2: 0.338}  # of three seeds, under an attack with nothing random
CI95 = aggregates.metrics_of("robust_accuracy:mean,std,ci95,median,min,max,count")


def finish(lab: Any, robust: dict[int, float], drawn: float = 0.0, **of_all: Any) -> None:
    """Equal seeds train equal weights; an attack leaves `robust` of the seed, and `drawn` more for each attack seed."""
    seed_of: dict[str, int] = {}

    def answer(grant: Any) -> Outcome:
        spec = grant.spec
        if spec["kind"] == "train":
            seed_of[grant.digest] = spec["seed"]
            weights = lab.artifacts.write_chunks("checkpoint", [f"weights of seed {spec['seed']}".encode()])
            outcome: Outcome = replace(lab.outcome(grant), artifacts=(weights,))
            return outcome
        seed = seed_of[spec["checkpoint"]]
        if spec["kind"] == "measure":
            return lab.outcome(grant, log_relative_sharpness_median=-float(seed))  # type: ignore[no-any-return]
        share = robust[seed] + drawn * spec.get("attack_seed", 0)
        outcome = lab.outcome(grant, **{"robust_accuracy": share, "clean_accuracy": 1.0, **of_all})
        bits = np.packbits(np.arange(spec["samples"]) < round(share * spec["samples"]))
        return replace(outcome, bits={**outcome.bits, "robust": Bits(spec["samples"], bits.tobytes())})

    for row in lab.rows(tables.tasks, kind="train", state="succeeded"):
        seed_of[row.digest] = row.spec["seed"]
    while grants := lab.grant():
        lab.record(*(Succeeded(grant.task_id, grant.attempt, answer(grant)) for grant in grants))


def submit_three(lab: Any, seeds: Sequence[int] = (0, 1, 2), user: str = "ann", **more: Any) -> None:
    lab.submit_sweep({"samples": [N], "seed": list(seeds), **{name: [value] for name, value in more.items()}}, user)


def repeat(lab: Any) -> None:
    """The same networks under the same attack: four results more of each."""
    for repeated in ({"attack_seed": 1}, {"attack_seed": 2}, {"arrays": True}, {"replicate": 1}):
        submit_three(lab, **repeated)


def asked(lab: Any, *by: str, metrics: Any = CI95, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = aggregates.aggregate(lab.database, [], by, metrics, **more)["items"]
    return found


def alike(found: dict[str, Any]) -> dict[str, Any]:
    """Statistics to compare others with: sums and values round differently."""
    return {
        name: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value for name, value in found.items()
    }


def test_repeats_of_three_networks_are_three_observations(lab: Any) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    [before] = asked(lab)
    [correlated] = correlating.correlations(lab.database, [], "log_relative_sharpness_median", trusted=False)
    repeat(lab)
    finish(lab, ROBUST)
    [after] = asked(lab)
    assert (before["results"], after["results"]) == (3, 15)
    assert before["networks"] == after["networks"] == after["robust_accuracy"]["count"] == 3
    assert after["robust_accuracy"] == alike(before["robust_accuracy"])
    shares = list(ROBUST.values())
    half = stats.t.ppf(0.975, 2) * stats.sem(shares)
    assert half > 0.05
    bounds = [after["robust_accuracy"][name] for name in ("ci95_low", "ci95_high")]
    assert bounds == pytest.approx([np.mean(shares) - half, np.mean(shares) + half])
    assert after["robust_accuracy"]["ci95_of"] == "networks"
    by_seed = asked(lab, "seed")
    assert [(one["seed"], one["results"], one["networks"]) for one in by_seed] == [(seed, 5, 1) for seed in range(3)]
    for one in by_seed:  # a single network tells nothing of others; its images are no wider for being attacked again
        said = one["robust_accuracy"]
        wilson = stats.binomtest(round(ROBUST[one["seed"]] * N), N).proportion_ci(method="wilson")
        assert (said["count"], said["std"], said["ci95_of"]) == (1, None, "images")
        assert (said["ci95_low"], said["ci95_high"]) == pytest.approx((wilson.low, wilson.high))
    by_attack_seed = asked(lab, "attack_seed")
    assert [one["robust_accuracy"]["count"] for one in by_attack_seed] == [3, 3, 3]
    [again] = correlating.correlations(lab.database, [], "log_relative_sharpness_median", trusted=False)
    assert (correlated["results"], again["results"], again["over_scales"]["results"]) == (3, 15, 15)
    assert {**again, "results": 3, "over_scales": {**again["over_scales"], "results": 3}} == correlated
    assert (again["n"], again["over_scales"]["n"]) == (3, 3)


def test_any_repeats_leave_count_and_interval(lab: Any) -> None:
    """Rows added at random: of other users (the same tasks), with arrays, as replicates."""
    submit_three(lab)
    finish(lab, ROBUST)
    [before] = asked(lab)
    random = np.random.default_rng(0)
    for done in range(2):
        for _ in range(5):
            again = {"user": str(random.choice(["bob", "cyd"])), "arrays": bool(random.integers(2)),
                     "replicate": int(random.integers(3))}  # fmt: skip
            lab.submit(seed=int(random.integers(3)), samples=N, **again)
        finish(lab, ROBUST)
        [after] = asked(lab)
        assert after["results"] == 3 + 5 * (done + 1)
        assert after["robust_accuracy"] == alike(before["robust_accuracy"])


def test_attack_seeds_are_averaged_within_their_network_however_often_each_was_run(lab: Any) -> None:
    submit_three(lab)
    submit_three(lab, (0,), attack_seed=4)
    submit_three(lab, (0,), attack_seed=4, arrays=True)
    finish(lab, ROBUST, drawn=0.01)
    [found] = asked(lab)
    values = [ROBUST[0] + 0.02, ROBUST[1], ROBUST[2]]
    said = found["robust_accuracy"]
    assert (said["count"], said["mean"]) == (3, pytest.approx(np.mean(values)))
    assert (said["min"], said["max"], said["median"]) == pytest.approx((min(values), max(values), np.median(values)))
    best = asked(lab, metrics={"robust_accuracy": ("worst", "best")})[0]["robust_accuracy"]
    assert (best["worst"], best["best"]) == (ROBUST[0], ROBUST[2])  # of single results, which have a job


def test_the_spread_of_attack_seeds_is_asked_for_and_said(lab: Any) -> None:
    submit_three(lab, (0, 1))
    for attack_seed in (1, 2):
        submit_three(lab, (0,), attack_seed=attack_seed)
    submit_three(lab, (0,), attack_seed=2, replicate=1)
    finish(lab, ROBUST, drawn=0.01)
    with pytest.raises(InvalidQuery, match="within one network, and a group has 2"):
        asked(lab, unit="attack_seed")
    found = aggregates.aggregate(lab.database, nodes_of("seed = 0"), [], CI95, unit="attack_seed")
    assert found["spread_of"] == "attack_seeds"
    [item] = found["items"]
    values = [ROBUST[0], ROBUST[0] + 0.01, ROBUST[0] + 0.02]
    said = item["robust_accuracy"]
    assert (item["results"], item["networks"], said["count"], said["ci95_of"]) == (4, 1, 3, "attack_seeds")
    assert said["std"] == pytest.approx(np.std(values, ddof=1))
    assert said["ci95_high"] - said["mean"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(values))
    assert aggregates.aggregate(lab.database, [], [], CI95)["spread_of"] == "networks"
    each = asked(lab, "weights_sha256", unit="attack_seed")
    assert sorted(one["robust_accuracy"]["count"] for one in each) == [1, 3]


@pytest.mark.parametrize(("shares", "low", "high"), [((0.7, 0.92), 0.0, 1.0), ((0.92, 0.94), 0.8029, 1.0)])
def test_an_interval_of_an_accuracy_stays_in_0_to_1(
    lab: Any, shares: tuple[float, float], low: float, high: float
) -> None:
    submit_three(lab, (0, 1))
    finish(lab, dict(enumerate(shares)))
    [found] = asked(lab)
    said = found["robust_accuracy"]
    assert (said["ci95_low"], said["ci95_high"]) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_nothing_or_all_is_robust_the_distinct_images_give_the_interval(lab: Any, share: float) -> None:
    lab.submit_sweep({"seed": [0, 1, 2], "samples": [200]})
    finish(lab, dict.fromkeys(range(3), share))
    [found] = asked(lab)
    said = found["robust_accuracy"]
    wilson = stats.binomtest(round(200 * share), 200).proportion_ci(method="wilson")
    assert (said["count"], said["std"], said["ci95_of"]) == (3, 0.0, "images")
    assert (said["ci95_low"], said["ci95_high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    [of_a_part] = asked(lab, metrics=aggregates.metrics_of("masked_fraction:ci95"))
    assert of_a_part["masked_fraction"] == {"ci95_low": None, "ci95_high": None, "ci95_of": None}


def test_standard_deviations_do_not_cancel(lab: Any) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    values = [1e8 - 1, 1e8, 1e8 + 1]
    with lab.database.write() as connection:
        for seed, value in enumerate(values):
            of_seed = update(results).where(results.c.seed == seed)
            connection.execute(of_seed.values(robust_loss=value, clean_loss=0.9 + 1e-9 * seed, train_seconds=seed))
    metrics = dict.fromkeys(("robust_loss", "clean_loss", "train_seconds"), ("std", "mean"))
    [found] = asked(lab, metrics=metrics)
    assert found["robust_loss"] == {"std": 1.0, "mean": 1e8}
    assert found["clean_loss"]["std"] == pytest.approx(1e-9, rel=1e-6)
    assert found["train_seconds"]["std"] == pytest.approx(1.0)


def test_what_two_rules_counted_is_not_averaged(lab: Any) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    with lab.database.write() as connection:
        connection.execute(update(results).where(results.c.seed == 2).values(verdict_version=1))
    for name in ("masked_fraction", "masked_fraction_of_correct", "reverse_fraction", "masked_n"):
        with pytest.raises(InvalidQuery, match=rf"verdict_version \((1, {verdict.VERSION}|{verdict.VERSION}, 1)\)"):
            asked(lab, metrics={name: ("mean",)})
        apart = asked(lab, "verdict_version", metrics={name: ("count",)})
        assert [(one["verdict_version"], one[name]["count"]) for one in apart] == [(1, 1), (verdict.VERSION, 2)]
        [mixed] = asked(lab, metrics={name: ("count",)}, allow_mixed=True)
        assert mixed[name]["count"] == 3
    assert asked(lab)[0]["robust_accuracy"]["count"] == 3  # no verdict changes what an attack left


LATER = {seed: share - 0.1 for seed, share in ROBUST.items()}  # by another version of the attack


@pytest.mark.parametrize("task", ["attack/pgd", "measure/closed_forms", "train/standard", "control"])
def test_what_two_versions_of_a_task_computed_is_not_averaged(lab: Any, newer: Callable[..., None], task: str) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    newer(task)
    submit_three(lab)
    finish(lab, LATER)
    attacked_again = task.startswith(("attack", "train"))
    version = f"versions.{task.partition('/')[0]}"
    with pytest.raises(InvalidQuery, match=rf"differ in more than seeds: {version} \((1, 2|2, 1)\)\. Filter"):
        asked(lab)
    old, new = asked(lab, version)
    assert [(one[version], one["results"], one["networks"]) for one in (old, new)] == [(1, 3, 3), (2, 3, 3)]
    means = [one["robust_accuracy"]["mean"] for one in (old, new)]
    expected = [np.mean(list(of.values())) for of in (ROBUST, LATER if attacked_again else ROBUST)]
    assert means == pytest.approx(expected)
    [mixed] = asked(lab, allow_mixed=True)
    assert (mixed["results"], mixed["networks"], mixed["robust_accuracy"]["count"]) == (6, 3, 3)
    [chosen] = aggregates.aggregate(lab.database, nodes_of(f"{version} = 2"), [], CI95)["items"]
    assert chosen["robust_accuracy"] == new["robust_accuracy"]


def test_boards_and_correlations_do_not_mix_versions(lab: Any, newer: Callable[..., None]) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    newer("attack/pgd")
    submit_three(lab)
    finish(lab, LATER)
    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert board["version"] == 2
    [row] = board["rows"]
    assert (row["networks"], row["results"], row["left_out"]) == (3, 3, {"superseded": 3})
    assert row["robust_accuracy"] == pytest.approx(np.mean(list(LATER.values())))
    assert [(attack["version"], attack["results"]) for attack in row["attacks"]] == [(2, 3)]
    measure = "log_relative_sharpness_median"
    newer("attack/pgd", "measure/closed_forms")
    submit_three(lab)
    finish(lab, LATER)
    found = correlating.correlations(lab.database, [], measure, trusted=False)
    assert [(one["version"], one["measure_version"], one["n"]) for one in found] == [(1, 1, 3), (2, 1, 3), (2, 2, 3)]


@pytest.mark.parametrize("text", ["verdict = trusted", "not (verdict = invalid or seed = 7)", "masked_fraction < 1"])
def test_what_two_rules_chose_is_not_averaged_or_correlated(lab: Any, text: str) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    with lab.database.write() as connection:
        connection.execute(update(results).where(results.c.seed == 2).values(verdict_version=1))

    def chosen(text: str, *by: str, **more: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = aggregates.aggregate(lab.database, nodes_of(text), by, CI95, **more)["items"]
        return found

    with pytest.raises(InvalidQuery, match="verdict_version"):
        chosen(text)
    with pytest.raises(InvalidQuery, match="verdict_version"):
        asked(lab, "verdict")
    assert [one["networks"] for one in chosen(text, "verdict_version")] == [1, 2]
    assert [one["networks"] for one in chosen(text, allow_mixed=True)] == [3]
    assert [one["networks"] for one in chosen(f"({text}) and verdict_version = {verdict.VERSION}")] == [2]
    measure = "log_relative_sharpness_median"
    apart = correlating.correlations(lab.database, nodes_of(text), measure, trusted=False)
    assert [(one["verdict_version"], one["n"]) for one in apart] == [(1, 1), (verdict.VERSION, 2)]
    [whole] = correlating.correlations(lab.database, [], measure, trusted=False)
    assert whole["n"] == 3
    assert "verdict_version" not in whole


def test_correlations_count_networks_that_todays_rule_trusts(lab: Any) -> None:
    """Nine networks stay below the ten points that a tau needs, however many results each has."""
    robust = {seed: 0.05 * seed for seed in range(10)}
    submit_three(lab, range(9))
    submit_three(lab, range(9), attack_seed=9)
    finish(lab, robust, drawn=0.06)

    def correlation(**more: Any) -> dict[str, Any]:
        [found] = correlating.correlations(lab.database, [], "log_relative_sharpness_median", **more)
        return found

    nine = correlation(trusted=False)
    assert (nine["n"], nine["pooled"]) == (9, None)
    submit_three(lab, [9])
    finish(lab, robust, drawn=0.06)
    ten = correlation(trusted=False)
    means = [share + 0.27 if seed < 9 else share for seed, share in robust.items()]  # of attack seeds 0 and 9
    tau = stats.kendalltau([-seed for seed in robust], means).statistic
    assert -1 < tau < 0
    assert (ten["n"], ten["pooled"]) == (10, pytest.approx(tau))
    with lab.database.write() as connection:
        connection.execute(update(results).values(verdict="trusted"))
        connection.execute(update(results).where(results.c.seed == 9).values(verdict_version=verdict.VERSION - 1))
    assert correlation()["n"] == 9


def test_two_ways_to_scale_are_not_averaged_into_one_point(lab: Any) -> None:
    """At s = 1 there is one network, at s = 5 there are two with the same weights."""
    for scale, bias in ((1, True), (5, True), (5, False)):
        submit_three(lab, scale=scale, scale_bias=bias)
    finish(lab, ROBUST)
    measure = "log_relative_sharpness_median"
    [found] = correlating.correlations(lab.database, [], measure, trusted=False)
    assert (found["n"], found["over_scales"]["n"], found["over_scales"]["tau"]) == (3, 9, None)
    assert "filter scale_bias" in found["over_scales"]["note"]
    for asked_for in ("scale_bias = true", "scale_bias = false or scale = 1"):
        [found] = correlating.correlations(lab.database, nodes_of(asked_for), measure, trusted=False)
        assert (found["n"], found["over_scales"]["n"]) == (3, 6)
        assert found["over_scales"]["tau"] is not None


@pytest.mark.parametrize("fields", [(), ("robust_accuracy_ci95_high",), ("*",)])
def test_a_single_accuracy_carries_its_wilson_interval(lab: Any, fields: tuple[str, ...]) -> None:
    submit_three(lab)
    finish(lab, ROBUST)
    question = Question(sort="seed", fields=fields)
    exported = list(csv.DictReader(io.StringIO("".join(exporting.csv_lines(exporting.table(lab.database, question))))))
    shown = Insights(lab.database).results(question)["items"]
    for seed, (line, row) in enumerate(zip(exported, shown, strict=True)):
        wilson = stats.binomtest(round(ROBUST[seed] * N), N).proportion_ci(method="wilson")
        for of in (line, row):
            assert float(of["robust_accuracy_ci95_high"]) == pytest.approx(wilson.high)
            if fields[:1] != ("robust_accuracy_ci95_high",):
                assert float(of["robust_accuracy_ci95_low"]) == pytest.approx(wilson.low)
                assert float(of["clean_accuracy_ci95_low"]) == pytest.approx(0.992376, abs=1e-6)
                assert float(of["clean_accuracy_ci95_high"]) == 1.0


def test_one_result_whole_and_one_without_an_accuracy(lab: Any) -> None:
    job_id = lab.submit(samples=N)
    finish(lab, ROBUST, clean_accuracy=None)
    result = Insights(lab.database).result(job_id)
    assert result["clean_accuracy_ci95_low"] is result["clean_accuracy_ci95_high"] is None
    assert result["robust_accuracy_ci95_low"] < result["robust_accuracy"] < result["robust_accuracy_ci95_high"]


def test_every_field_of_an_interval_is_of_a_share_and_no_field_itself() -> None:
    from service.model.observations import FRACTIONS, INTERVALS

    assert {share for share, _ in INTERVALS.values()} == FRACTIONS.keys()
    assert not INTERVALS.keys() & RESULTS.known.keys()
    assert all(range_of(share) == (0.0, 1.0) for share in FRACTIONS)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("size", [1e-320, 1e-170, 1e200, 5e307])
def test_tiny_and_huge_numbers_have_a_mean_and_a_spread(lab: Any, size: float) -> None:
    """Their squares are 0 or infinite in sums of SQL, and PostgreSQL fails there."""
    submit_three(lab)
    finish(lab, ROBUST)
    name = "log_relative_sharpness_median"
    with lab.database.write() as connection:
        for seed in range(3):
            values = {name: size * (seed + 1)}
            connection.execute(update(results).where(results.c.seed == seed).values(values))
    [found] = asked(lab, metrics=aggregates.metrics_of(f"{name}:mean,std,ci95,median"))
    said = found[name]
    assert (said["mean"], said["median"]) == (pytest.approx(2 * size, rel=1e-3, abs=0), 2 * size)
    assert said["std"] == pytest.approx(size, rel=1e-3, abs=0)
    half = float(stats.t.ppf(0.975, 2)) * size / math.sqrt(3)
    bounds = None if not math.isfinite(2 * size + half) else pytest.approx(2 * size + half, rel=1e-3, abs=0)
    assert said["ci95_high"] == bounds
    [alone] = asked(lab, metrics=aggregates.metrics_of(f"{name}:mean"))
    assert alone[name]["mean"] == said["mean"]
