"""A checkpoint is lost, and its training gives other weights when it runs again: two networks, which nothing mixes."""

import csv
import importlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update
from store_lab import Lab

from service.lab.artifacts import Artifacts
from service.model.executor import Bits, Failed, Grant, Succeeded
from service.model.jobs import LIVE_JOB, RETRIABLE
from service.operations.upgrading import judge_again
from service.queue import retractions
from service.results import aggregates, comparing, correlating, exporting, leaderboard, worst_case
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.store import Database, filing, jobs, joining, recording, tables, trained_again
from service.store.result_tables import results

PGD = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 5}
OTHER = {"architecture": "simple_cnn"}


def answer(lab: Any, grant: Grant, weights: str = "weights", clean: float = 0.96) -> None:
    """Succeed; an attack finds `clean` of its images right, and breaks none of these."""
    outcome = lab.outcome(grant, weights=weights)
    if grant.spec["kind"] == "attack":
        correct = np.arange(grant.spec["samples"]) < clean * grant.spec["samples"]
        bits = Bits(correct.size, np.packbits(correct).tobytes())
        outcome.bits.update(clean_correct=bits, robust=bits)
        outcome.numbers.update(clean_accuracy=clean, robust_accuracy=clean)
    lab.record(Succeeded(grant.task_id, grant.attempt, outcome))


def finish(lab: Any, weights: str = "weights", clean: float = 0.96) -> None:
    while grants := lab.grant():
        for grant in grants:
            answer(lab, grant, weights, clean)


def lose(lab: Any, *grants: Grant, of: str = "checkpoint") -> None:
    """These tasks do not find the weights of their network, or of their `source`."""
    for grant in grants:
        [train] = lab.rows(tables.tasks, digest=grant.spec[of])
        [made] = lab.rows(tables.trainings, task_id=train.id)
        missing = made.checkpoint_digest
        lab.record(Failed(grant.task_id, grant.attempt, "missing_checkpoint", "it is gone", missing=missing))


def lost_and_retried(lab: Any, **job: Any) -> str:
    """A job that has not found the weights, and whose training is queued once more."""
    job_id = str(lab.submit(**job))
    lose(lab, *lab.grant())
    lab.service.retry_job(job_id, user="ann")
    return job_id


def weights_of(lab: Any, job_id: str) -> dict[str, str]:
    """The weights that each part of a job was computed on, by the part."""
    row, used = lab.job(job_id), {}
    for name in ("train", "measure", "attack", "baseline", "control"):
        task = lab.task(getattr(row, f"{name}_task_id"))
        [attempt] = lab.rows(tables.attempts, task_id=task.id, number=task.attempt)
        used[name] = attempt.provenance["weights_sha256"]
    return used


def source_weights(lab: Any, task_id: str) -> str:
    [attempt] = lab.rows(tables.attempts, task_id=task_id, number=lab.task(task_id).attempt)
    return str(attempt.provenance["source_weights_sha256"])


def training_of(lab: Any, job_id: str) -> Any:
    return lab.task(lab.job(job_id).train_task_id)


def made_by(lab: Any, task_id: str) -> str:
    return str(lab.rows(tables.trainings, task_id=task_id)[0].checkpoint_digest)


def test_results_of_two_sets_of_weights_are_of_two_networks(lab: Any) -> None:
    """The values of the issue: clean .96 at s = 1 on the lost weights, .94 at s = 10 on those that came back."""
    insights = Insights(lab.database)
    first = lab.submit(samples=100)
    finish(lab)
    old = training_of(lab, first)
    before = weights_of(lab, first)
    second = lost_and_retried(lab, samples=100, scale=10)
    assert training_of(lab, second).id == old.id
    finish(lab, "others", clean=0.94)

    assert weights_of(lab, first) == before, "what was computed on the lost weights stays together"
    [theirs] = set(weights_of(lab, second).values())
    assert theirs not in before.values()
    assert (lab.job(first).state, lab.job(second).state) == ("succeeded", "succeeded")
    after = training_of(lab, first)
    for name in ("id", "state", "attempt", "worker", "started_at", "finished_at", "former_digest"):
        expected = old.digest if name == "former_digest" else getattr(old, name)
        assert getattr(after, name) == expected, name
    assert not set(tasks_of(lab, first)) & set(tasks_of(lab, second))
    new = training_of(lab, second)
    assert (new.digest, new.attempt, new.generation, new.state) == (old.digest, 1, 2, "succeeded")

    rows = {row["job_id"]: row for row in insights.results(Question(limit=10))["items"]}
    assert [rows[job]["clean_accuracy"] for job in (first, second)] == [0.96, 0.94]
    assert [rows[job]["weights_sha256"] for job in (first, second)] == [before["attack"], theirs]
    assert [rows[job]["flags"] for job in (first, second)] == [["trained_again"], []]
    assert rows[second]["verdict"] == "trusted", "its panel and its baseline ran on its own weights"
    flag = {"task_id": old.id, "weights_sha256": before["train"], "trained_again_as": theirs}
    assert insights.result(first)["flags"] == [{"flag": "trained_again", **flag}]
    assert insights.result(second)["flags"] == []
    assert [row["job_id"] for row in insights.results(Question(filter="flags = trained_again"))["items"]] == [first]
    table = exporting.table(lab.database, Question(fields=("job_id", "flags", "weights_sha256")))
    lines = {line["job_id"]: line for line in csv.DictReader(io.StringIO("".join(exporting.csv_lines(table))))}
    assert [lines[job]["flags"] for job in (first, second)] == ["trained_again", ""]
    [event] = lab.rows(tables.events, kind="task.other_weights")
    assert (event.task_id, event.data) == (old.id, {**flag, "task_id": new.id})
    groups = aggregates.aggregate(lab.database, [], [], {"clean_accuracy": ("count",)}, allow_mixed=True)
    assert groups["items"][0]["clean_accuracy"]["count"] == 2, "two networks are two observations"
    third = lab.submit(samples=100, user="bob")
    finish(lab, "none again", clean=0.94)
    assert set(weights_of(lab, third).values()) == {theirs}
    assert lab.job(third).baseline_task_id == lab.job(second).baseline_task_id


def tasks_of(lab: Any, job_id: str) -> list[str]:
    return [row.task_id for row in lab.rows(tables.job_tasks, job_id=job_id)]


def test_equal_weights_are_the_same_network(lab: Any) -> None:
    first = lab.submit()
    finish(lab)
    done = [lab.rows(table) for table in (tables.attack_results, tables.control_results, tables.outcome_bits)]
    second = lost_and_retried(lab, scale=5)
    finish(lab)
    assert lab.job(second).baseline_task_id == lab.job(first).attack_task_id
    assert lab.job(second).control_task_id == lab.job(first).control_task_id
    assert [row for row in lab.rows(tables.attack_results) if row.task_id == lab.job(first).attack_task_id] == done[0]
    assert lab.rows(tables.control_results) == done[1]
    assert set(done[2]) < set(lab.rows(tables.outcome_bits))
    assert weights_of(lab, first) == weights_of(lab, second)
    assert lab.rows(tables.events, kind="task.other_weights") == []
    assert [row["flags"] for row in Insights(lab.database).results(Question())["items"]] == [[], []]
    train = training_of(lab, first)
    assert (train.attempt, train.generation, lab.task_states("train")) == (2, 2, {"succeeded": 1})


def test_jobs_that_have_not_ended_leave_what_was_computed_on_the_lost_weights(lab: Any) -> None:
    """Theirs is all of the new network, and another user's job that had most of it done waits for that too."""
    first, other = lab.submit(scale=5), lab.submit(scale=10, user="bob", measures=["sam_sharpness"])
    [train] = lab.grant("train")
    answer(lab, train)
    for grant in lab.grant("attack", "control"):
        answer(lab, grant)
    further = lab.grant("measure")
    lose(lab, *(grant for grant in further if grant.spec["scale"] == 5))
    lab.expire()
    assert (lab.job(first).state, lab.job(other).state) == ("failed", "running")
    lab.service.retry_job(first, user="ann")
    old = lab.job(other)
    [again] = lab.grant()
    answer(lab, again, "others")
    new = lab.job(other)
    for name in ("train_task_id", "attack_task_id", "baseline_task_id", "control_task_id", "measure_task_id"):
        assert getattr(new, name) != getattr(old, name), name
    assert (lab.task(new.attack_task_id).state, lab.task(old.attack_task_id).state) == ("queued", "succeeded")
    assert lab.task(old.measure_task_id).state == "cancelled"
    assert lab.task(new.baseline_task_id).generation == 2
    assert {row.job_id for row in lab.rows(tables.events, kind="job.replanned")} == {first, other}
    finish(lab)
    assert lab.job_states() == {"succeeded": 2}
    for job in (first, other):
        assert set(weights_of(lab, job).values()) == {made_by(lab, new.train_task_id)}


def unwanted(lab: Any) -> tuple[str, Grant]:
    """A failed job that has not found its weights, and an attack on them that runs though no job needs it."""
    keeps, gives_up = lab.submit(), lab.submit(user="bob", attack=PGD)
    answer(lab, *lab.grant("train"))
    [runs] = [grant for grant in lab.grant("attack") if grant.task_id == lab.job(gives_up).attack_task_id]
    lose(lab, *lab.grant("measure"))
    assert lab.task(runs.task_id).cancel_requested
    return keeps, runs


def test_what_runs_on_lost_weights_though_nobody_needs_it_is_taken_back_as_they_are_made_again(lab: Any) -> None:
    """Else the next who needs it would have it run on, beside its training."""
    keeps, runs = unwanted(lab)
    lab.service.retry_job(keeps, user="ann")
    assert (lab.task(runs.task_id).state, lab.task(runs.task_id).reason) == ("cancelled", "no live job needs it")
    [attempt] = lab.rows(tables.attempts, task_id=runs.task_id)
    assert attempt.end == "given_back"
    wants = lab.submit(user="eve", attack=PGD)
    answer(lab, runs)  # too late
    assert lab.task(runs.task_id).state == "blocked"
    lab.expire()
    assert [grant.spec["kind"] for grant in lab.grant()] == ["train"]
    lab.expire()
    finish(lab, "others")
    assert set(weights_of(lab, wants).values()) == {made_by(lab, lab.job(wants).train_task_id)}


@pytest.mark.parametrize("recorded", ["together", "later"])
def test_what_still_runs_on_the_old_weights_as_others_come_back(
    lab: Any, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    """As an earlier version may have left it: what ends in the same moment stays with the old, what runs is stopped."""
    for module in (jobs, joining):
        monkeypatch.setattr(module, "let_wait", lambda connection, now, actor, reopened: list(reopened))
    keeps, runs = unwanted(lab)
    lab.service.retry_job(keeps, user="ann")
    wants = lab.submit(user="eve", attack=PGD)
    [train] = lab.grant("train")
    late = Succeeded(runs.task_id, runs.attempt, lab.outcome(runs))
    made = Succeeded(train.task_id, train.attempt, lab.outcome(train, weights="others"))
    for messages in [(late, made)] if recorded == "together" else [(made,), (late,)]:
        lab.record(*messages)
    assert lab.task(runs.task_id).state == ("succeeded" if recorded == "together" else "cancelled")
    [attempt] = lab.rows(tables.attempts, task_id=runs.task_id)
    assert attempt.end == ("succeeded" if recorded == "together" else "given_back")
    assert lab.job(wants).attack_task_id != runs.task_id
    finish(lab)
    assert set(weights_of(lab, wants).values()) == {made_by(lab, lab.job(wants).train_task_id)}


def test_the_weights_that_a_transfer_comes_from(lab: Any) -> None:
    """Only what was made on them: the network that was attacked is the same."""
    moved = {"attack": {"type": "transfer", "attack": PGD, "source": OTHER}}
    first, plain, itself = lab.submit(**moved), lab.submit(), lab.submit(**OTHER)
    finish(lab)
    source = training_of(lab, itself)
    second = lab.submit(**moved, scale=5)
    [attack] = lab.grant("attack")
    lab.succeed(*lab.grant("measure", "control"))
    lose(lab, attack, of="source")
    lab.service.retry_job(second, user="ann")
    assert [row.id for row in lab.rows(tables.tasks, kind="train", state="queued")] == [source.id]
    finish(lab, "others")
    mine, theirs = lab.job(first), lab.job(second)
    assert (mine.train_task_id, mine.control_task_id) == (theirs.train_task_id, theirs.control_task_id)
    assert lab.job(plain).train_task_id == mine.train_task_id
    [new] = lab.rows(tables.tasks, digest=source.digest)
    assert {source_weights(lab, task) for task in (mine.attack_task_id,)} == {made_by(lab, source.id)}
    of_second = {source_weights(lab, task) for task in (theirs.attack_task_id, theirs.baseline_task_id)}
    assert of_second == {made_by(lab, new.id)} != {made_by(lab, source.id)}
    insights = Insights(lab.database)
    flags = {row["job_id"]: row["flags"] for row in insights.results(Question())["items"]}
    assert flags == {first: ["trained_again"], itself: ["trained_again"], plain: [], second: []}
    assert [flag["task_id"] for flag in insights.result(first)["flags"]] == [source.id]


def test_a_retracted_training_that_runs_again(lab: Any) -> None:
    """It is restored as it was; the lost weights are what no new job joins."""
    first = lab.submit()
    finish(lab)
    old = training_of(lab, first)
    lost_and_retried(lab, scale=5)
    [running] = lab.grant("train")
    retractions.retract_task(lab.service, old.id, "a bug", user="root", admin=True)
    answer(lab, running, "others")  # it had ended before it could be stopped
    assert weights_of(lab, first)["train"] == made_by(lab, old.id)
    finish(lab, "thirds")
    back = retractions.restore_task(lab.service, old.id, user="root", admin=True)
    assert back["restored"] == [first]
    assert set(weights_of(lab, first).values()) == {made_by(lab, old.id)}
    insights = Insights(lab.database)
    assert [flag["flag"] for flag in insights.result(first)["flags"]] == ["trained_again"]
    joined = training_of(lab, lab.submit(user="bob", seed=0))
    assert joined.id != old.id
    finish(lab, "thirds")
    digests = [row.digest for row in lab.rows(tables.tasks)]
    assert len(digests) == len(set(digests))


def test_a_new_generation_that_is_retracted_does_not_bring_the_lost_weights_back(lab: Any) -> None:
    first = lab.submit()
    finish(lab)
    old = training_of(lab, first)
    second = lost_and_retried(lab, scale=5)
    finish(lab, "others")
    for task in (old.id, training_of(lab, second).id):
        retractions.retract_task(lab.service, task, "a bug", user="root", admin=True)
    assert old.id in retractions.restore_task(lab.service, old.id, user="root", admin=True)["superseded"]
    third = lab.submit(user="bob")
    assert training_of(lab, third).id not in (old.id, training_of(lab, second).id)
    assert training_of(lab, third).generation == 3
    finish(lab, "thirds")


def test_weights_that_are_lost_twice(lab: Any) -> None:
    jobs = [lab.submit()]
    finish(lab)
    for n, weights in enumerate(("others", "weights"), 2):
        jobs.append(lost_and_retried(lab, scale=n))
        finish(lab, weights)
    used = [set(weights_of(lab, job).values()) for job in jobs]
    assert [len(of) for of in used] == [1, 1, 1]
    assert used[0] == used[2] != used[1]
    assert [training_of(lab, job).generation for job in jobs] == [1, 2, 3]
    assert len({training_of(lab, job).id for job in jobs}) == 3


@pytest.mark.parametrize(
    ("part", "verdict", "masked"), [("control", "not_checked", 0.0), ("baseline", "not_checked", None)]
)
def test_a_verdict_uses_no_evidence_of_other_weights(lab: Any, part: str, verdict: str, masked: float | None) -> None:
    """Such as an earlier version's store has: the attack ran on weights 1, what it is compared with on weights 2."""
    job = lab.submit(scale=5)
    finish(lab, clean=1.0)
    assert lab.job(job).verdict == "trusted"
    with lab.database.write() as connection:
        theirs = tables.attempts.c.task_id == getattr(lab.job(job), f"{part}_task_id")
        connection.execute(update(tables.attempts).where(theirs).values(provenance={"weights_sha256": "b" * 64}))
        connection.execute(update(tables.jobs).values(verdict_version=3))
    assert judge_again(lab.database).changed == 1
    row = lab.job(job)
    assert (row.verdict, row.masked_fraction, row.verdict_checks["masked"] == "not_checked") == (
        verdict,
        masked,
        masked is None,
    )
    assert (row.reverse_fraction is None) == (masked is None)


def answer_as(lab: Any, number: float, part: str, used: str | None) -> None:
    """Succeed until nothing is queued: measures and attack of all that is queued say `number`, and of the tasks of that
    part, an attempt notes other weights, if any."""
    while grants := lab.grant():
        for grant in grants:
            kind = grant.spec["kind"]
            name = grant.spec["measure"]["type"] if kind == "measure" else kind
            numbers = {"sam_sharpness": "sam_sharpness_loss", "closed_forms": "log_relative_sharpness_median"}
            numbers |= {"attack": "robust_accuracy", "train": "test_accuracy"}
            outcome = lab.outcome(grant, **({numbers[name]: number} if name in numbers else {}))
            if used is not None and name == part:
                outcome.provenance["weights_sha256"] = used
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))


PARTS = {
    "closed_forms": "log_relative_sharpness_median",
    "sam_sharpness": "sam_sharpness_loss",
    "train": "test_accuracy",
}


def left_out_of(lab: Any, job_id: str, part: str, used: str) -> None:
    """The result shows no number of that part, anywhere, and says so; it shows all others."""
    insights, number = Insights(lab.database), PARTS[part]
    [row] = insights.results(Question(filter=f"job_id = {job_id}"))["items"]
    assert (row["flags"], row["robust_accuracy"], row["verdict"]) == (["mixed_weights"], 0.25, "trusted")
    shown = {name: row.get(name) for name in PARTS.values()}
    assert shown == dict.fromkeys(PARTS.values(), 0.25) | {number: None}
    assert row["measures_failed"].keys() == {"sam_sharpness"} & {part}
    [flag] = insights.result(job_id)["flags"]
    task = next(of["task_id"] for name, of in insights.result(job_id)["parts"].items() if name == part)
    assert flag == {"flag": "mixed_weights", "task_id": task, "part": part, "weights_sha256": used}
    assert insights.results(Question(filter=f"{number} is null"))["items"] == [row]
    for name in PARTS.values():
        group = aggregates.aggregate(lab.database, [], [], {name: ("count",)}, allow_mixed=True)["items"][0]
        assert group[name]["count"] == (1 if name == number else 2)
        points = correlating.correlations(lab.database, [], name, trusted=False)
        assert [of["n"] for of in points] == [1 if name == number else 2], name
    table = exporting.table(lab.database, Question(fields=("job_id", "flags", number)))
    lines = {line["job_id"]: line for line in csv.DictReader(io.StringIO("".join(exporting.csv_lines(table))))}
    assert (lines[job_id]["flags"], lines[job_id][number]) == ("mixed_weights", "")


@pytest.mark.parametrize("part", ["closed_forms", "sam_sharpness"])
def test_a_measure_of_other_weights_is_left_out(lab: Any, part: str) -> None:
    """Whatever left it so, such as the store of an earlier version whose jobs had not ended."""
    other = lab.submit(seed=1, measures=["sam_sharpness"])
    answer_as(lab, 0.5, part, None)
    job = lab.submit(measures=["sam_sharpness"])
    answer_as(lab, 0.25, part, "b" * 64)
    left_out_of(lab, job, part, "b" * 64)
    assert Insights(lab.database).result(other)["flags"] == []


@pytest.mark.parametrize("part", PARTS)
def test_so_it_is_in_a_store_that_mixed_them_before(lab: Any, part: str) -> None:
    """There, a training that ran again overwrote its weights and its numbers in place."""
    other, job = lab.submit(seed=1, measures=["sam_sharpness"]), ""
    answer_as(lab, 0.5, part, None)
    job = lab.submit(measures=["sam_sharpness"])
    answer_as(lab, 0.25, part, None)
    before = {row.job_id: row for row in lab.rows(results)}
    assert not any(row.mixed_weights for row in before.values())
    task = Insights(lab.database).result(job)["parts"][part]["task_id"]
    with lab.database.write() as connection:
        used = update(tables.attempts).where(tables.attempts.c.task_id == task)
        connection.execute(used.values(provenance={"weights_sha256": "b" * 64}))
        if part == "train":
            of_it = update(tables.trainings).where(tables.trainings.c.task_id == task)
            connection.execute(of_it.values(checkpoint_digest="b" * 64))
    migration = importlib.import_module("service.store.migrations.versions.0020_mixed_weights")
    for _ in range(2):
        with lab.database.write() as connection, Operations.context(MigrationContext.configure(connection)):
            migration._fill()
        left_out_of(lab, job, part, "b" * 64)
    migrated = lab.rows(results)
    assert [row for row in migrated if row.job_id == other] == [before[other]]
    with lab.database.write() as connection:  # as where the task is computed again: once more with the others
        filing.refresh(connection, [task])
    assert {row.job_id: row.mixed_weights for row in lab.rows(results)} == {other: False, job: True}
    left_out_of(lab, job, part, "b" * 64)


def test_a_measure_that_runs_again_on_the_weights_of_its_attack_is_shown(lab: Any) -> None:
    job = lab.submit(measures=["sam_sharpness"])
    answer_as(lab, 0.25, "closed_forms", "b" * 64)
    [task] = [row.task_id for row in lab.rows(tables.measurements) if row.log_relative_sharpness_median == 0.25]
    with lab.database.write() as connection:
        used = update(tables.attempts).where(tables.attempts.c.task_id == task)
        connection.execute(used.values(provenance={"weights_sha256": made_by(lab, lab.job(job).train_task_id)}))
        filing.refresh(connection, [task])
    [row] = lab.rows(results)
    assert (row.mixed_weights, row.log_relative_sharpness_median) == (False, 0.25)


def test_nothing_that_is_asked_of_results_mixes_two_networks_of_one_spec(lab: Any) -> None:
    """Ten specs, each of two networks: whatever is told of them is told of 20, each with its own numbers."""
    n, specs = 32, 10

    def work(weights: str, first: int) -> None:
        """Of the network of seed i, the attack breaks the first `first + i` images, and that is its sharpness too."""
        while grants := lab.grant():
            done = []
            for grant in grants:
                kind, seed = grant.spec["kind"], grant.spec.get("seed", 0)
                outcome = lab.outcome(grant, weights=weights)
                if kind != "train":
                    [train] = lab.rows(tables.tasks, digest=grant.spec["checkpoint"])
                    seed = train.spec["seed"]
                broken = first + seed
                if kind == "measure":
                    outcome.numbers["log_relative_sharpness_median"] = float(broken)
                if kind == "attack":
                    bits = Bits(n, np.packbits(np.arange(n) >= broken).tobytes())
                    outcome.bits.update(robust=bits)
                    outcome.numbers.update(clean_accuracy=1.0, robust_accuracy=1 - broken / n)
                done.append(Succeeded(grant.task_id, grant.attempt, outcome))
            lab.record(*done)

    firsts = [lab.submit(samples=n, seed=seed) for seed in range(specs)]
    work("weights", 1)
    lost = [lab.submit(samples=n, seed=seed, scale=5) for seed in range(specs)]
    lose(lab, *lab.grant())
    for job in lost:
        lab.service.retry_job(job, user="ann")
    work("others", 16)
    seconds = [lab.submit(samples=n, seed=seed, user="bob") for seed in range(specs)]
    work("others", 16)
    rows = {row.job_id: row for row in lab.rows(results)}
    pairs = list(zip(firsts, seconds, strict=True))
    assert [lab.job(a).spec_digest == lab.job(b).spec_digest for a, b in pairs] == [True] * specs
    assert len({rows[job].weights_sha256 for job in (*firsts, *seconds)}) == 2 * specs
    broken = {job: 1 + seed for seed, job in enumerate(firsts)} | {job: 16 + seed for seed, job in enumerate(seconds)}
    shares = {rows[job].weights_sha256: 1 - of / n for job, of in broken.items()}

    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    [line] = board["rows"]
    assert (line["networks"], line["best"]) == (2 * specs, max(shares.values()))
    assert line["robust_accuracy_worst_case"] == pytest.approx(sum(shares.values()) / len(shares))
    assert line["flags"] == ["trained_again"]
    worst = worst_case.of_networks(lab.database, [])
    assert {of["weights_sha256"]: of["robust_accuracy_worst_case"] for of in worst} == shares
    for job in broken:
        assert Insights(lab.database).result(job)["worst_case"]["robust_accuracy"] == 1 - broken[job] / n

    [ranks] = correlating.correlations(lab.database, [], "log_relative_sharpness_median", trusted=False)
    assert (ranks["n"], ranks["pooled"], ranks["over_scales"]["n"]) == (2 * specs, pytest.approx(-1.0), 3 * specs)
    group = aggregates.aggregate(lab.database, nodes_of("scale = 1"), [], {"robust_accuracy": ("count", "min", "max")})
    found = group["items"][0]["robust_accuracy"]
    assert (found["count"], found["min"], found["max"]) == (2 * specs, min(shares.values()), max(shares.values()))

    compared = comparing.compare(lab.database, [firsts[0], seconds[0]])
    assert compared["differing"] == {}
    assert (compared["union"], compared["union_refused"]) == (None, "these are attacks on different networks")
    assert (compared["pairs"][0]["only_a"], compared["pairs"][0]["only_b"]) == (15, 0)


def test_a_retry_finds_what_is_missing_by_a_field(lab: Any) -> None:
    """A message that happens to name the checkpoint says nothing, and one that does not, hides nothing."""
    job = lab.submit()
    lab.succeed(*lab.grant("train"))
    made = made_by(lab, lab.job(job).train_task_id)
    [attack] = lab.grant("attack")
    lab.record(Failed(attack.task_id, attack.attempt, "missing_checkpoint", f"not {made}", missing="c" * 64))
    lab.service.retry_job(job, user="ann")
    assert lab.task_states("train") == {"succeeded": 1}
    [attack] = lab.grant("attack")
    lab.record(Failed(attack.task_id, attack.attempt, "missing_checkpoint", "where is it?", missing=made))
    assert lab.rows(tables.attempts, task_id=attack.task_id, number=2)[0].missing_digest == made
    lab.service.retry_job(job, user="ann")
    assert lab.task_states("train") == {"queued": 1}
    finish(lab)


def test_attempts_of_before_have_what_was_missing_in_their_message(lab: Any) -> None:
    job = lab.submit()
    lab.succeed(*lab.grant("train"))
    lose(lab, *lab.grant("attack"))
    made = made_by(lab, lab.job(job).train_task_id)
    migration = importlib.import_module("service.store.migrations.versions.0018_trained_again")
    with lab.database.write() as connection:
        lost = update(tables.attempts).where(tables.attempts.c.end == "missing_checkpoint")
        connection.execute(lost.values(missing_digest=None, message=f"artifact {made} is not under /x/{'d' * 65}"))
        with Operations.context(MigrationContext.configure(connection)):
            migration._fill()
    assert [row.missing_digest for row in lab.rows(tables.attempts) if row.missing_digest] == [made]


WORDS = ("submit", "train", "work", "hold", "late", "lose", "lose", "retry", "retry", "cancel", "expire")
LOST = (("train", 0, 0), ("work", 1, 0), ("lose", 0, 0), ("retry", 0, 0))
STEPS = st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 3), st.integers(0, 2)), min_size=10, max_size=30)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 5},
    OTHER,
    {"attack": {"type": "transfer", "attack": PGD, "source": OTHER}, "scale": 5},
)


def interleaved(lab: Any, examples: int, **how: Any) -> Counter[str]:
    """Losses, retries and late answers in any order, on three sets of weights: what the examples came to."""
    seen: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **how)
    @given(steps=STEPS)
    def holds(steps: list[tuple[str, int, int]]) -> None:
        with lab.database.write() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                connection.execute(delete(table))
        interleave(lab, steps)
        seen["other weights"] += len(lab.rows(tables.events, kind="task.other_weights"))
        seen["jobs"] += one_network_each(lab)
        lab.check()

    holds()
    return seen


def test_no_succeeded_job_mixes_weights(lab: Any) -> None:
    seen = interleaved(lab, 5, derandomize=True)
    assert seen["other weights"] >= 3, seen
    assert seen["jobs"] >= 8, seen


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_none_does_so_at_length(lab: Any) -> None:
    seen = interleaved(lab, 60)
    assert seen["other weights"] >= 25, seen


MUTANTS: dict[str, tuple[ModuleType, str, Callable[..., object]]] = {
    "it is one task all the same": (trained_again, "other_weights", lambda *_: {}),
    "children stay": (trained_again, "_copy_children", lambda *_: {}),
    "what runs goes on": (trained_again, "_end_children", lambda *_: []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_found_that(name: str, database: Database, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, instead = MUTANTS[name]
    monkeypatch.setattr(module, function, instead)
    monkeypatch.setattr(recording, "other_weights", trained_again.other_weights)
    with pytest.raises(AssertionError):
        interleaved(Lab(database, artifacts), 100, derandomize=True, phases=[Phase.generate])


def interleave(lab: Any, steps: list[tuple[str, int, int]]) -> None:
    held: list[Grant] = []  # what runs, or did until it was taken back
    jobs = [lab.submit()]

    def succeed(grants: list[Grant], weights: int) -> None:
        lab.record(*(Succeeded(one.task_id, one.attempt, lab.outcome(one, f"weights {weights}")) for one in grants))

    for word, n, weights in (*LOST, *steps):
        job_id = jobs[n % len(jobs)]
        job = lab.job(job_id)
        match word:
            case "submit":
                jobs.append(lab.submit(user=f"user{n % 2}", **KINDS[n]))
            case "train":
                succeed(lab.grant("train"), weights)
            case "work":
                grants = lab.grant()
                succeed(grants[: 2 * n], weights)
                held += grants[2 * n :]
            case "hold":
                held += lab.grant()
            case "late":
                succeed(held[n::2], weights)
            case "lose":
                of = "source" if n == 3 else "checkpoint"
                held += lab.grant("attack", "measure", "control")
                lose(lab, *[grant for grant in held if grant.spec.get(of)][-1 - n :: 2], of=of)
            case "retry" if job.state in RETRIABLE:
                lab.service.retry_job(job_id, user=job.user)
            case "cancel" if job.state in LIVE_JOB and n == 0:
                lab.service.cancel_job(job_id, user=job.user)
            case "expire":
                lab.expire()
    lab.expire()
    for job in lab.rows(tables.jobs):
        if job.state in RETRIABLE:
            lab.service.retry_job(job.id, user=job.user)
    finish(lab)
    assert lab.job_states() == {"succeeded": len(jobs)}


def one_network_each(lab: Any) -> int:
    """How many jobs have succeeded, each on one set of weights, as its row says."""
    by_task = defaultdict(list)
    for attempt in lab.rows(tables.attempts):
        by_task[attempt.task_id].append(attempt)
    provenance = {
        task.id: by_task[task.id][task.attempt - 1].provenance for task in lab.rows(tables.tasks, state="succeeded")
    }
    filed = {row.job_id: row for row in lab.rows(results)}
    done = lab.rows(tables.jobs, state="succeeded")
    for job in done:
        parts = [getattr(job, f"{name}_task_id") for name in ("train", "measure", "attack", "baseline", "control")]
        assert {provenance[task]["weights_sha256"] for task in parts} == {made_by(lab, job.train_task_id)}
        assert filed[job.id].weights_sha256 == made_by(lab, job.train_task_id)
        assert filed[job.id].train_task_id == job.train_task_id
        sources = {provenance[task].get("source_weights_sha256") for task in parts[2:4]}
        assert len(sources) == 1
        assert job.verdict_checks["masked"] != "not_checked" or sources != {None}
    return len(done)
