"""The worst case of networks, leaderboards and unions, from outcome bits written by hand, on both databases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sqlalchemy import event, update

from api.cli import report
from service.errors import InvalidQuery
from service.model.executor import Bits, Succeeded
from service.model.verdict import VERSION, wilson
from service.queue import retractions
from service.results import comparing, correlating, leaderboard, worst_case
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.specs import versions
from service.store import network_results
from service.store.result_tables import results
from service.store.tables import jobs, tasks

N = 64  # images, enough for a clean accuracy above chance and for a verdict
BALL = {"type": "pgd", "norm": "linf", "eps": 0.15, "step_size": 0.05, "steps": 10}
OTHER_BALL = {"type": "square", "norm": "linf", "eps": 0.15, "queries": 10}
Spec = dict[str, Any]
Broken = Callable[[Spec], set[int]]


@pytest.fixture
def insights(lab: Any) -> Insights:
    return Insights(lab.database)


def bits(broken: set[int], n: int = N) -> np.ndarray[Any, Any]:
    return np.array([i not in broken for i in range(n)])


def finish(lab: Any, broken: Broken, weights: Callable[[Spec], str] | None = None, **numbers: Any) -> None:
    """Answer all that is queued: each attack breaks the images that `broken` says of its spec."""
    while grants := lab.grant():
        for grant in grants:
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack":
                robust = bits(broken(grant.spec), grant.spec["samples"])
                outcome.bits["robust"] = Bits(robust.size, np.packbits(robust).tobytes())
                outcome.numbers.update({"robust_accuracy": float(robust.mean()), "clean_accuracy": 1.0, **numbers})
            if weights is not None and grant.spec["kind"] != "train":
                outcome.provenance["weights_sha256"] = weights(grant.spec)
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))


def by_attack(spec: Spec) -> set[int]:
    attack = spec["attack"]
    if attack["type"] == "pgd" and attack["eps"] == 0.15:
        return {0, 1} if spec["scale"] == 1 else {2}
    return {"square": {1, 3}, "pgd": {4}, "cw": {5}, "noise": {6}, "transfer": {7}}[attack["type"]]


def test_every_attack_of_the_threat_model_counts_at_every_scale(lab: Any, insights: Insights) -> None:
    inside = [
        lab.submit(attack=BALL, samples=N),
        lab.submit(attack=BALL, samples=N, scale=5),
        lab.submit(attack=OTHER_BALL, samples=N),
        lab.submit(attack={"type": "transfer", "attack": BALL}, samples=N),
        lab.submit(attack={"type": "noise", "kind": "uniform", "eps": 0.15}, samples=N),
    ]
    outside = {
        "cw": lab.submit(attack="cw", samples=N), "gaussian": lab.submit(attack="noise", samples=N),
        "eps": lab.submit(attack={**BALL, "eps": 0.1}, samples=N), "norm": lab.submit(attack="pgd_l2", samples=N),
        "seed": lab.submit(attack=BALL, samples=N, seed=1), "samples": lab.submit(attack=BALL, samples=48),
        "bias": lab.submit(attack=BALL, samples=N, scale=5, scale_bias=False),
    }  # fmt: skip
    lab.submit(attack=BALL, samples=N, user="bob")  # the same number again
    finish(lab, by_attack)
    low, high = wilson(N - 6, N)
    for job_id in inside:
        worst = insights.result(job_id)["worst_case"]
        assert (worst["threat_model"], worst["n"], worst["results"]) == ("linf 0.15", N, 5)
        assert (worst["robust_accuracy"], worst["ci95_low"], worst["ci95_high"]) == ((N - 6) / N, low, high)
        assert worst["left_out"] == {}
        named = {one["attack"]["type"]: one for one in worst["attacks"]}
        assert {name: one["scales"] for name, one in named.items()} == {
            "pgd": [1, 5], "square": [1], "transfer": [1], "noise": [1],
        }  # fmt: skip
        assert (named["pgd"]["robust_accuracy"], named["pgd"]["results"]) == ((N - 3) / N, 2)
        assert worst["attacks"][0]["attack"]["type"] == "pgd"
    alone = {name: insights.result(job_id)["worst_case"] for name, job_id in outside.items()}
    assert alone["cw"] is alone["gaussian"] is None
    assert {name: worst["robust_accuracy"] for name, worst in alone.items() if worst} == {
        "eps": (N - 1) / N, "norm": (N - 1) / N, "seed": (N - 2) / N, "samples": 46 / 48, "bias": (N - 1) / N,
    }  # fmt: skip


def test_every_network_and_ball_is_listed_with_its_attacks(lab: Any, insights: Insights) -> None:
    inside = [lab.submit(attack=attack, samples=N) for attack in (BALL, OTHER_BALL, "pgd_l2", "cw")]
    lab.submit(attack=BALL, samples=N, scale=5, scale_bias=False)
    lab.submit(attack=BALL, samples=N, seed=1)
    finish(lab, by_attack)
    rows = worst_case.of_networks(lab.database, [])
    first, other = (lab.rows(results, seed=seed)[0].weights_sha256 for seed in (0, 1))
    found = {
        (row["weights_sha256"], row["threat_model"], row["scale"]): (
            row["robust_accuracy_worst_case"],
            row["attack_count"],
        )
        for row in rows
    }
    assert found == {
        (first, "linf 0.15", 1.0): ((N - 3) / N, 2),
        (first, "linf 0.15", 5.0): ((N - 1) / N, 1),
        (first, "l2 0.025", 1.0): ((N - 1) / N, 1),
        (other, "linf 0.15", 1.0): ((N - 2) / N, 1),
    }
    of_result = insights.result(inside[0])["worst_case"]
    of_network = next(row for row in rows if row["attack_count"] == 2)
    assert {name: of_network[name] for name in of_result.keys() - {"robust_accuracy"}} == {
        name: of_result[name] for name in of_result.keys() - {"robust_accuracy"}
    }
    [alone] = worst_case.of_networks(lab.database, nodes_of("attack = square"))
    assert alone == of_network, "what chose the network does not choose its attacks"
    retractions.retract(lab.service, inside[1], "a bug", user="ann", admin=True)
    assert worst_case.of_networks(lab.database, nodes_of("attack = square")) == []


def test_too_many_worst_cases_are_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worst_case, "MAX_SCOPES", 1)
    lab.submit(attack=BALL, samples=N)
    finish(lab, by_attack)
    assert len(worst_case.of_networks(lab.database, [])) == 1
    lab.submit(attack="pgd_l2", samples=N)
    finish(lab, by_attack)
    with pytest.raises(InvalidQuery, match="chooses 2 worst cases, at most 1"):
        worst_case.of_networks(lab.database, [])


def test_the_threat_model_is_a_field(lab: Any, insights: Insights) -> None:
    asked = {
        "pgd_linf": ("linf 8/255", "white_box"), "pgd_l2": ("l2 0.025", "white_box"),
        "square": ("linf 8/255", "black_box"),
        "transfer": ("linf 8/255", "transfer"), "cw": (None, "white_box"), "noise": (None, "noise"),
        "noise_uniform": ("linf 8/255", "noise"),
    }  # fmt: skip
    ids = {lab.submit(attack=name): of for name, of in asked.items()}
    lab.finish()
    rows = insights.results(Question(limit=100))["items"]
    assert {row["job_id"]: (row["threat_model"], row["adversary"]) for row in rows} == ids
    for text, count in (
        ('threat_model = "linf 8/255"', 4),
        ("threat_model is null", 2),
        ("adversary = noise", 2),
        ("threat_model ~ l2 and adversary != noise", 1),
    ):
        assert len(insights.results(Question(filter=text))["items"]) == count
    found = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert [board["threat_model"] for board in found] == ["l2 0.025", "linf 8/255"]
    assert len(found[1]["rows"][0]["attacks"]) == 4  # with the noise, which breaks what it breaks
    assert leaderboard.leaderboard(lab.database, nodes_of("adversary = noise"), trusted=False) == []


def test_what_proves_nothing_is_left_out_and_counted(
    lab: Any, insights: Insights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack outside the ball, one of an older version, one that was retracted."""
    first = lab.submit(attack=BALL, samples=N)
    finish(lab, lambda _: {0})
    lab.submit(attack={**BALL, "steps": 20}, samples=N)
    finish(lab, lambda _: {1}, outside_ball=1)
    wrong = lab.submit(attack={**BALL, "steps": 30}, samples=N)
    lab.submit(attack=OTHER_BALL, samples=N)
    finish(lab, lambda _: {2})
    assert insights.result(first)["worst_case"]["robust_accuracy"] == (N - 2) / N
    assert insights.result(first)["worst_case"]["left_out"] == {"outside_ball": 1}
    monkeypatch.setattr(versions, "VERSIONS", {"attack/square": 2})
    retractions.retract(lab.service, wrong, "a bug", user="ann", admin=True)
    worst = insights.result(first)["worst_case"]
    assert (worst["robust_accuracy"], worst["results"]) == ((N - 1) / N, 1)
    assert worst["left_out"] == {"outside_ball": 1, "superseded": 1}
    [board] = leaderboard.leaderboard(lab.database, [])
    assert board["rows"][0]["left_out"] == {"outside_ball": 1, "superseded": 1}
    assert leaderboard.leaderboard(lab.database, nodes_of("attack = square"), trusted=False) == []


def test_a_network_is_counted_once_however_often_it_was_attacked(lab: Any) -> None:
    """The values of the issue: three networks, attack seeds 1 and 2, arrays, a replicate: n is three, not fifteen."""
    for seed in (0, 1, 2):
        for more in ({}, {"attack_seed": 1}, {"attack_seed": 2}, {"arrays": True}, {"replicate": 1}):
            lab.submit(attack=BALL, samples=N, seed=seed, **more)
    lab.submit(attack=BALL, samples=N, user="bob")
    finish(lab, lambda spec: set(range(16 * (1 + seed_of(lab, spec)))), lambda spec: f"{seed_of(lab, spec):064x}")
    [board] = leaderboard.leaderboard(lab.database, [])
    [row] = board["rows"]
    assert (row["networks"], row["seeds"], row["results"]) == (3, 3, 16)
    worst = [0.75, 0.5, 0.25]
    half = stats.t.ppf(0.975, 2) * stats.sem(worst)
    assert (row["robust_accuracy_worst_case"], row["robust_accuracy"]) == (0.5, 0.5)
    assert (row["ci95_low"], row["ci95_high"]) == (0.0, pytest.approx(min(1.0, 0.5 + half)))
    assert row["best"] == 0.75
    [attack] = row["attacks"]
    assert (attack["networks"], attack["results"], attack["attack"]["eps"]) == (3, 15, 0.15)
    assert board["attack"] == attack["attack"]


def seed_of(lab: Any, spec: Spec) -> int:
    [training] = lab.rows(tasks, digest=spec["checkpoint"])
    return int(training.spec["seed"])


def test_boards_sort_by_the_worst_case_over_what_is_stored(lab: Any) -> None:
    """A network that met one weak attack only does not stand above one that met a strong one unseen."""
    for architecture in ("mlp", "simple_cnn"):
        lab.submit(architecture=architecture, attack=BALL, samples=N)
        lab.submit(architecture=architecture, attack=BALL, samples=N, scale=5)
    lab.submit(architecture="simple_cnn", attack=OTHER_BALL, samples=N)
    lab.submit(attack={**BALL, "eps": 0.1}, samples=N)
    lab.submit(attack="cw", samples=N)
    broken = {"mlp": {1.0: {0, 1, 2}, 5.0: {2, 3}}, "simple_cnn": {1.0: {0, 1}, 5.0: {1}}}

    def of_network(spec: Spec) -> set[int]:
        [training] = lab.rows(tasks, digest=spec["checkpoint"])
        square = {10, 11, 12} if spec["attack"]["type"] == "square" else set()
        return square or broken[training.spec["architecture"]][spec["scale"]]

    finish(lab, of_network)
    boards = {board["threat_model"]: board for board in leaderboard.leaderboard(lab.database, [])}
    assert boards.keys() == {"linf 0.15", "linf 0.1"}
    rows = boards["linf 0.15"]["rows"]
    assert [(row["rank"], row["architecture"], row["robust_accuracy_worst_case"]) for row in rows] == [
        (1, "mlp", (N - 4) / N),
        (2, "simple_cnn", (N - 5) / N),
    ]
    assert [row["robust_accuracy"] for row in rows] == [(N - 3) / N, (N - 3) / N]  # the strongest single one
    assert [len(row["attacks"]) for row in rows] == [1, 2]
    assert (rows[0]["ci95_low"], rows[0]["ci95_high"]) == wilson(N - 4, N)  # one network: over its images
    assert (boards["linf 0.15"]["attack"], boards["linf 0.15"]["norm"], boards["linf 0.15"]["eps"]) == (
        None,
        "linf",
        0.15,
    )
    [board] = leaderboard.leaderboard(lab.database, nodes_of("attack = square"))
    assert [row["architecture"] for row in board["rows"]] == ["simple_cnn"]
    assert board["rows"][0]["robust_accuracy_worst_case"] == (N - 5) / N  # still over every stored attack
    scales = leaderboard.leaderboard(lab.database, nodes_of('threat_model = "linf 0.15"'), scale=None, trusted=False)
    assert [(row["architecture"], row["scale"]) for row in scales[0]["rows"]] == [
        ("mlp", 1), ("mlp", 5), ("simple_cnn", 1), ("simple_cnn", 5),
    ]  # fmt: skip


@pytest.mark.parametrize("verdict", ["suspect", "invalid", "not_checked"])
def test_what_is_not_trusted_by_todays_rule_enters_no_board(lab: Any, verdict: str) -> None:
    job_id = lab.submit(attack=BALL, samples=N)
    other = lab.submit(attack=BALL, samples=N, seed=1)
    finish(lab, lambda _: {0})
    with lab.database.write() as connection:
        connection.execute(update(results).where(results.c.job_id == job_id).values(verdict=verdict))
        connection.execute(update(results).where(results.c.job_id == other).values(verdict_version=VERSION - 1))
    assert leaderboard.leaderboard(lab.database, []) == []
    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert board["rows"][0]["networks"] == 2


def test_nothing_correct_enters_no_board(lab: Any) -> None:
    lab.submit(attack=BALL, samples=N)
    while grants := lab.grant():
        for grant in grants:
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack":
                none = Bits(N, np.packbits(np.zeros(N, bool)).tobytes())
                outcome.bits.update(clean_correct=none, robust=none)
                outcome.numbers.update(clean_accuracy=0.0, robust_accuracy=0.0)
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))
    assert leaderboard.leaderboard(lab.database, []) == []
    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert board["rows"][0]["robust_accuracy_worst_case"] == 0.0


def test_flags_are_on_the_board(lab: Any) -> None:
    for steps in (10, 40):
        lab.submit(attack={**BALL, "steps": steps}, samples=N)
    lab.submit(architecture="simple_cnn", attack=BALL, samples=N)
    finish(lab, lambda spec: set(range(20 if spec["attack"]["steps"] == 10 else 5)))
    [board] = leaderboard.leaderboard(lab.database, [])
    assert {row["architecture"]: row["flags"] for row in board["rows"]} == {"mlp": ["not_monotone"], "simple_cnn": []}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_an_interval_stays_within_what_a_share_can_be(counts: list[int]) -> None:
    low, high = leaderboard.spread([count / 50 for count in counts], 50)
    assert low is not None
    assert high is not None
    assert 0 <= low <= sum(counts) / len(counts) / 50 <= high <= 1
    assert low < high


def test_a_union_is_of_one_network_in_one_ball(lab: Any) -> None:
    one, scaled = lab.submit(attack=BALL, samples=N), lab.submit(attack=BALL, samples=N, scale=5)
    square = lab.submit(attack=OTHER_BALL, samples=N)
    cw, l2, other = (
        lab.submit(attack="cw", samples=N),
        lab.submit(attack="pgd_l2", samples=N),
        lab.submit(attack=BALL, samples=N, seed=1),
    )
    finish(lab, by_attack)
    found = comparing.compare(lab.database, [one, scaled, square])
    assert found["union"] == {
        "robust_accuracy": (N - 4) / N,
        "broken_only_by": {one: 1, scaled: 1, square: 1},
        "left_out": {},
    }
    assert [row["threat_model"] for row in found["results"]] == ["linf 0.15"] * 3
    for wrong, said in ((cw, "linf 0.15, no ball"), (l2, "linf 0.15, l2 0.025"), (other, "different networks")):
        refused = comparing.compare(lab.database, [one, wrong])
        assert refused["union"] is None
        assert said in refused["union_refused"]
        assert len(refused["pairs"]) == 1  # of the same images, whatever the attack
    assert "no ball" in comparing.compare(lab.database, [cw, lab_again(lab, cw)])["union_refused"]


def test_a_union_leaves_out_what_a_worst_case_does_and_names_it(
    lab: Any, insights: Insights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack that leaves the ball breaks what is robust in it; so may one of an older version."""
    first = lab.submit(attack=BALL, samples=N)
    finish(lab, lambda _: {0})
    outside = lab.submit(attack={**BALL, "steps": 20}, samples=N)
    finish(lab, lambda _: {1}, outside_ball=1)
    wrong, square = lab.submit(attack={**BALL, "steps": 30}, samples=N), lab.submit(attack=OTHER_BALL, samples=N)
    finish(lab, lambda _: {2})
    monkeypatch.setattr(versions, "VERSIONS", {"attack/square": 2})
    retractions.retract(lab.service, wrong, "a bug", user="ann", admin=True)
    union = comparing.compare(lab.database, [first, outside, wrong, square])["union"]
    assert union["robust_accuracy"] == insights.result(first)["worst_case"]["robust_accuracy"] == (N - 1) / N
    assert union["left_out"] == {outside: "outside_ball", wrong: "retracted", square: "superseded"}
    assert union["broken_only_by"] == {first: 1}
    none = comparing.compare(lab.database, [outside, square])
    assert (none["union"], none["union_refused"]) == (None, "none of these proves anything: outside_ball, superseded")


def test_a_union_is_not_over_two_ways_to_scale(lab: Any) -> None:
    """With the bias left alone a network at s = 5 predicts other classes than at s = 1, and than with it scaled."""
    both, weights = (lab.submit(attack=BALL, samples=N, scale=5, scale_bias=bias) for bias in (True, False))
    finish(lab, by_attack)
    assert "without the bias scaled" in comparing.compare(lab.database, [both, weights])["union_refused"]


def lab_again(lab: Any, job_id: str) -> str:
    """The same job with another attack seed."""
    again: str = lab.submit(attack=lab.job(job_id).spec["attack"], samples=N, attack_seed=1)
    finish(lab, by_attack)
    return again


def test_images_in_another_order_are_other_images(lab: Any) -> None:
    """Also of one network and data set: at one place stand two examples, which no test may pair."""
    ids = [lab.submit(attack=BALL, samples=N, attack_seed=seed) for seed in (0, 1)]
    finish(lab, by_attack)
    assert comparing.compare(lab.database, ids)["union"]
    with lab.database.write() as connection:
        spec = {**lab.job(ids[1]).spec, "order": "file"}
        connection.execute(update(jobs).where(jobs.c.id == ids[1]).values(spec=spec))
    with pytest.raises(InvalidQuery, match="different orders"):
        comparing.compare(lab.database, ids)


def test_a_board_takes_a_statement_for_many_networks(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.submit_sweep({"seed": list(range(4)), "samples": [N], "attack": [BALL]})
    finish(lab, by_attack)
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    taken = []
    for at_once in (200, 2, 1):
        monkeypatch.setattr(network_results, "AT_ONCE", at_once)
        statements.clear()
        event.listen(lab.database.engine, "before_cursor_execute", note)
        try:
            [board] = leaderboard.leaderboard(lab.database, [])
        finally:
            event.remove(lab.database.engine, "before_cursor_execute", note)
        assert board["rows"][0]["networks"] == 4
        taken.append(sum("outcome_bits" in statement for statement in statements))
    assert taken == [1, 2, 4]
    assert len(statements) < 16


def test_images_that_met_no_number_are_counted_and_said(lab: Any, insights: Insights) -> None:
    """40 of 100, as the attack stored them: the result is invalid, with the share, and proves nothing."""
    job_id = lab.submit(attack=BALL, samples=100)
    while grants := lab.grant():
        for grant in grants:
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack":
                met = np.arange(100) < 40
                outcome.bits["non_finite"] = Bits(100, np.packbits(met).tobytes())
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))
    result = insights.result(job_id)
    assert (result["verdict"], result["verdict_reasons"]) == ("invalid", ["non_finite"])
    assert result["verdict_counts"]["non_finite"] == [40, 100]
    assert result["worst_case"] is None
    assert report.images(result["verdict_counts"]["non_finite"]) == "40 of 100 images"
    assert report.meaning("non_finite").startswith("a logit or a gradient is NaN")


@pytest.mark.parametrize("trusted", [True, False])
def test_correlations_are_of_attacks_in_a_ball(lab: Any, trusted: bool) -> None:
    """Whatever their verdicts are: noise looks for nothing, and `cw` has no ball."""
    noise = {"type": "noise", "norm": "linf", "eps": 0.1, "kind": "uniform"}
    for attack in ("pgd_linf", noise, {"type": "cw"}):
        lab.submit(attack=attack)
    finish(lab, by_attack)
    groups = correlating.correlations(lab.database, [], "test_accuracy", trusted=trusted)
    assert [group["attack"]["type"] for group in groups] == ["pgd"]


def test_correlations_by_attack_show_the_whole_attack(lab: Any) -> None:
    lab.submit(attack="pgd_linf")
    lab.finish()
    [group] = correlating.correlations(lab.database, [], "test_accuracy", by=["attack", "samples"], trusted=False)
    assert group["attack"]["type"] == "pgd"
    assert group["samples"] == 16
