"""A task that was found to be wrong is retracted whole, on SQLite and on PostgreSQL: with all that rests on it."""

from typing import Any

import pytest

from service.errors import Conflict, InvalidQuery, NotFound, QuotaExceeded
from service.lab.access import NotAllowed
from service.model.executor import Grant, Succeeded
from service.operations.housekeeping import Policy, collect
from service.queue import retractions
from service.queue.verbs import Service
from service.results import aggregates, leaderboard
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.settings import Settings
from service.specs.versions import version_of
from service.store import tables

PGD, WEAK = "pgd_linf", {"type": "fgsm", "norm": "linf", "eps": 0.1}
SPLIT = "trained on the wrong split"


def answer(lab: Any, robust: float, **more: float) -> None:
    """Every attack leaves `robust`, every further measure the numbers of `more`, until nothing is queued."""
    while grants := lab.grant():
        lab.record(
            *(Succeeded(one.task_id, one.attempt, lab.outcome(one, **left(one, robust, more))) for one in grants)
        )


def left(grant: Grant, robust: float, more: dict[str, float]) -> dict[str, float]:
    if grant.spec["kind"] == "attack":
        return {"robust_accuracy": robust, "clean_accuracy": 1.0}
    further = grant.spec["kind"] == "measure" and grant.spec["measure"]["type"] != "closed_forms"
    return more if further else {}


def shown(lab: Any, **asked: Any) -> dict[str, float]:
    items = Insights(lab.database).results(Question(**asked))["items"]
    return {row["job_id"]: row["robust_accuracy"] for row in items}


def hidden(lab: Any, filter: str | None = None) -> int:
    return int(Insights(lab.database).results(Question(filter=filter))["retracted"])


def training_of(lab: Any, job_id: str) -> str:
    return str(lab.job(job_id).train_task_id)


def retract(lab: Any, task_id: str, user: str = "ann", *, admin: bool = True, **more: Any) -> dict[str, Any]:
    return retractions.retract_task(lab.service, task_id, SPLIT, user=user, admin=admin, **more)


def restore(lab: Any, task_id: str, user: str = "ann", *, admin: bool = True) -> dict[str, Any]:
    return retractions.restore_task(lab.service, task_id, user=user, admin=admin)


def four(lab: Any, user: str) -> list[str]:
    return [lab.submit(user=user, scale=scale, attack=attack) for scale in (1, 5) for attack in (PGD, WEAK)]


def test_a_training_takes_all_its_scales_attacks_and_users_along(lab: Any) -> None:
    insights = Insights(lab.database)
    mine, theirs, other = four(lab, "ann"), four(lab, "bob"), lab.submit(seed=1)
    answer(lab, 0.25)
    train = training_of(lab, mine[0])
    digest = lab.task(train).digest
    done = retract(lab, train)
    assert done["retracted"] == sorted(mine + theirs)
    assert shown(lab) == {other: 0.25}
    assert (hidden(lab), hidden(lab, "user = bob"), hidden(lab, "seed = 1")) == (8, 4, 0)
    statistics = {"robust_accuracy": ("mean", "count")}
    found = aggregates.aggregate(lab.database, [], ["seed"], statistics, allow_mixed=True)
    assert (found["retracted"], [item["seed"] for item in found["items"]]) == (8, [1])
    boards = leaderboard.leaderboard(lab.database, [])
    assert [row["seeds"] for board in boards for row in board["rows"]] == [1]
    whole = insights.result(theirs[3])
    assert (whole["retracted_by"], whole["retraction_reason"]) == ("ann", SPLIT)
    happened = {
        (event.kind, event.actor, event.data["reason"]) for event in lab.rows(tables.events) if event.data.get("reason")
    }
    assert happened == {("task.retracted", "ann", SPLIT), ("result.retracted", "ann", SPLIT)}
    with pytest.raises(Conflict, match="wrong split"):
        retract(lab, train)

    later = lab.submit(user="eve")
    assert lab.job(later).state == "queued"
    assert (lab.task(training_of(lab, later)).digest, lab.task(training_of(lab, later)).generation) == (digest, 2)
    answer(lab, 0.75)
    assert shown(lab) == {other: 0.25, later: 0.75}
    assert shown(lab, retracted=True) == dict.fromkeys([*mine, *theirs, other], 0.25) | {later: 0.75}
    assert insights.task(digest)["id"] == training_of(lab, later)
    old = insights.task(train)
    assert (old["digest"], old["generation"], old["joined"], old["retracted_with"]) == (digest, 1, False, train)
    assert insights.result(mine[0])["parts"]["train"]["digest"] == digest
    assert insights.result(mine[0])["attack_digest"] == insights.result(later)["attack_digest"]

    back = retractions.restore_all(lab.service, nodes_of("user = bob and scale = 5 and attack = fgsm"), user="ann")
    assert back["restored"] == sorted(mine + theirs)
    assert back["superseded"] == back["tasks"], "new jobs would mix two generations of one training"
    assert shown(lab) == dict.fromkeys([*mine, *theirs, other], 0.25) | {later: 0.75}
    assert (hidden(lab), insights.result(mine[0])["retracted_at"]) == (0, None)
    assert lab.job(lab.submit(user="eve", attack=PGD)).state == "succeeded", "it joins the new generation"
    lab.check()


def test_without_a_newer_generation_what_is_restored_is_joined_again(lab: Any) -> None:
    before = lab.submit(measures=["fisher_rao"])
    answer(lab, 0.5)
    retract(lab, training_of(lab, before))
    assert restore(lab, training_of(lab, before))["superseded"] == []
    again = lab.submit(user="bob", measures=["fisher_rao"])
    assert lab.job(again).state == "succeeded"
    assert shown(lab) == {before: 0.5, again: 0.5}
    assert not any(row.former_digest for row in lab.rows(tables.tasks))


def test_jobs_that_have_not_ended_get_the_new_generation_and_the_old_one_stops(lab: Any) -> None:
    first, second = lab.submit(scale=5), lab.submit(scale=50, user="bob")
    lab.succeed(*lab.grant("train"))
    running = lab.grant("attack")
    train = training_of(lab, first)
    assert retract(lab, train)["replanned"] == 2
    assert lab.job_states() == {"queued": 2}
    assert all(lab.task(grant.task_id).cancel_requested for grant in running)
    lab.succeed(running[0])  # it had ended before it could be stopped
    [fresh] = lab.grant()
    assert (fresh.spec["kind"], fresh.task_id) == ("train", training_of(lab, second))
    assert fresh.task_id != train
    lab.succeed(fresh)
    answer(lab, 0.5)
    assert lab.job_states() == {"succeeded": 2}
    retracted = {row.id for row in lab.rows(tables.tasks) if row.retracted_at is not None}
    assert not retracted & {row.task_id for row in lab.rows(tables.job_tasks)}
    assert {lab.task(task_id).state for task_id in retracted} <= {"succeeded", "running", "cancelled"}
    assert shown(lab) == {first: 0.5, second: 0.5}
    lab.expire()
    lab.check()


def test_a_retry_does_not_go_on_with_retracted_tasks(lab: Any) -> None:
    failed = lab.submit(scale=5)
    lab.succeed(*lab.grant("train"))
    for grant in lab.grant("attack"):
        lab.fail(grant)
    train = training_of(lab, failed)
    retract(lab, train)
    lab.service.retry_job(failed, user="ann")
    [grant] = lab.grant()
    assert (grant.spec["kind"], grant.task_id == train) == ("train", False)
    lab.succeed(grant)
    answer(lab, 0.5)
    assert shown(lab) == {failed: 0.5}
    lab.check()


def test_a_baseline_or_control_is_part_of_the_verdicts_that_need_it(lab: Any) -> None:
    one, five, weak = lab.submit(), lab.submit(scale=5), lab.submit(attack=WEAK)
    answer(lab, 0.5)
    assert retract(lab, lab.job(one).attack_task_id)["retracted"] == sorted([one, five])
    restore(lab, lab.job(one).attack_task_id)
    control = lab.job(one).control_task_id
    assert lab.job(weak).control_task_id != control
    assert retract(lab, control)["retracted"] == sorted([one, five])
    later = lab.submit(user="bob")
    assert lab.job(later).attack_task_id == lab.job(one).attack_task_id, "the attack is right, and not run again"
    answer(lab, 0.1)
    assert shown(lab) == {weak: 0.5, later: 0.5}
    assert [row.kind for row in lab.rows(tables.tasks) if row.generation == 2] == ["control"]


def test_the_network_that_a_transfer_comes_from_counts(lab: Any) -> None:
    source = {"architecture": "simple_cnn", "seed": 1}
    attack = {"type": "transfer", "source": source, "attack": {"type": "fgsm", "norm": "linf", "eps": 0.1}}
    moved, plain, source_itself = lab.submit(attack=attack), lab.submit(attack=WEAK), lab.submit(**source)
    answer(lab, 0.5)
    of_source, own = training_of(lab, source_itself), training_of(lab, moved)
    assert retract(lab, of_source)["retracted"] == sorted([moved, source_itself])
    assert retract(lab, own)["retracted"] == [plain]
    assert restore(lab, of_source)["restored"] == [source_itself], "the other network is retracted still"
    assert lab.task(lab.job(moved).attack_task_id).retracted_with == own
    assert restore(lab, own)["restored"] == sorted([moved, plain])
    assert hidden(lab) == 0


def test_a_result_that_was_retracted_by_itself_stays_so_when_its_training_is_restored(lab: Any) -> None:
    bad, good = lab.submit(), lab.submit(scale=5)
    answer(lab, 0.5)
    retractions.retract(lab.service, bad, "a bug", user="ann", admin=True)
    train = training_of(lab, bad)
    assert retract(lab, train)["retracted"] == [good]
    assert retractions.restore(lab.service, good, user="ann", admin=True)["restored"] == [good]
    assert shown(lab) == {good: 0.5}
    retract(lab, train)
    assert retractions.restore(lab.service, bad, user="ann", admin=True)["restored"] == [], "its training is retracted"
    restore(lab, train)
    assert shown(lab) == {bad: 0.5, good: 0.5}


def test_who_is_no_admin_hides_nobody_elses_result(lab: Any) -> None:
    mine = lab.submit(user="mallory")
    answer(lab, 0.5)
    shared = training_of(lab, mine)
    waiting = lab.submit(user="bob", scale=5)  # on the same training
    for task_id in (shared, lab.job(mine).attack_task_id, lab.task(shared).digest):
        with pytest.raises(NotAllowed, match=r"bob.*ask an admin"):
            retract(lab, task_id, "mallory", admin=False)
    answer(lab, 0.5)
    for task_id in (shared, lab.job(mine).control_task_id, lab.job(waiting).measure_task_id):
        with pytest.raises(NotAllowed, match=r"bob.*ask an admin"):
            retract(lab, task_id, "mallory", admin=False)
    assert shown(lab) == {mine: 0.5, waiting: 0.5}
    other = lab.submit(user="bob", seed=1)
    answer(lab, 0.5)
    with pytest.raises(NotAllowed, match="bob"):
        retract(lab, training_of(lab, other), "mallory", admin=False)
    retract(lab, shared, "root")
    with pytest.raises(NotAllowed, match=r"root.*ask an admin"):
        restore(lab, shared, "bob", admin=False)
    with pytest.raises(NotAllowed, match=r"root.*ask an admin"):
        retractions.restore(lab.service, waiting, user="bob", admin=False)
    with pytest.raises(NotFound):
        retract(lab, "0" * 64)


def test_a_retraction_of_ones_own_hides_nothing_that_others_ask_for_later(lab: Any) -> None:
    mine = lab.submit(user="mallory")
    lab.succeed(*lab.grant("train"))
    [attack] = lab.grant("attack")
    lab.succeed(attack)
    answer(lab, 0.25)
    retractions.retract(lab.service, mine, "for fun", user="mallory", admin=False)
    bob = lab.submit(user="bob")
    assert lab.job(bob).attack_task_id != attack.task_id
    answer(lab, 0.5)
    assert shown(lab) == {bob: 0.5}
    assert retractions.restore(lab.service, mine, user="mallory", admin=False)["superseded"] == [attack.task_id]
    assert set(shown(lab)) == {mine, bob}


def test_a_result_that_others_wait_for_is_not_retracted_by_its_owner(lab: Any) -> None:
    mine = lab.submit(user="mallory")
    answer(lab, 0.25)
    waiting = lab.submit(user="bob", measures=["fisher_rao"])  # the same attack, and a measure that is to come
    with pytest.raises(NotAllowed, match=r"bob.*ask an admin"):
        retractions.retract(lab.service, mine, "for fun", user="mallory", admin=False)
    answer(lab, 0.25)
    assert set(shown(lab)) == {mine, waiting}


def test_a_further_measure_is_retracted_by_its_version_and_takes_no_other_number_along(lab: Any) -> None:
    insights = Insights(lab.database)
    measures = ["sam_sharpness", "fisher_rao"]
    both, none = lab.submit(measures=measures), lab.submit(scale=5)
    while grants := lab.grant():
        for grant in grants:
            kind = grant.spec.get("measure", {}).get("type")
            by_kind = {"sam_sharpness": {"sam_sharpness_loss": 3.0}, "fisher_rao": {"fisher_rao_norm": 2.0}}
            lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, **by_kind.get(kind, {}))))
    wrong = nodes_of(f"measures.sam_sharpness.version = {version_of('measure', 'sam_sharpness')}")

    def numbers(job_id: str) -> dict[str, Any]:
        fields = ("job_id", "sam_sharpness_loss", "fisher_rao_norm", "measures_failed")
        [row] = [row for row in insights.results(Question(fields=fields))["items"] if row["job_id"] == job_id]
        return dict(row)

    def counted(metric: str) -> int:
        found = aggregates.aggregate(lab.database, [], [], {metric: ("count",)}, allow_mixed=True)
        return int(found["items"][0][metric]["count"])

    assert numbers(both)["sam_sharpness_loss"] == 3.0
    done = retractions.retract_all(lab.service, wrong, "a step overflowed", user="root", measure="sam_sharpness")
    assert (done["retracted"], done["unmeasured"], len(done["tasks"])) == ([], [both], 1)
    said = {"sam_sharpness": "retracted: a step overflowed"}
    assert numbers(both) == {
        "job_id": both,
        "sam_sharpness_loss": None,
        "fisher_rao_norm": 2.0,
        "measures_failed": said,
    }
    # Two results of one network are one observation.
    assert (counted("sam_sharpness_loss"), counted("fisher_rao_norm"), counted("robust_accuracy")) == (0, 1, 1)
    assert insights.results(Question(filter="sam_sharpness_loss is not null"))["items"] == []
    assert insights.result(both)["parts"]["sam_sharpness"]["numbers"]["sam_sharpness_loss"] == 3.0
    assert set(shown(lab)) == {both, none}

    later = lab.submit(user="bob", measures=measures)
    answer(lab, 0.5, sam_sharpness_loss=1.0)
    assert (numbers(later)["sam_sharpness_loss"], numbers(both)["sam_sharpness_loss"]) == (1.0, None)
    assert lab.job(later).attack_task_id == lab.job(both).attack_task_id
    back = retractions.restore_all(lab.service, wrong, user="root", measure="sam_sharpness")
    assert (back["restored"], back["measured"], back["superseded"]) == ([], [both], back["tasks"])
    assert numbers(both)["sam_sharpness_loss"] == 3.0
    for name in ("closed_forms", "sam_sharpnes"):
        with pytest.raises(InvalidQuery, match="unknown measure"):
            retractions.retract_all(lab.service, wrong, "a bug", user="root", measure=name)


def test_rerun_submits_what_was_hidden_again_or_nothing_is_retracted(lab: Any) -> None:
    for user in ("ann", "bob"):
        lab.submit(user=user)
    lab.submit(scale=5)
    answer(lab, 0.25)
    train = lab.rows(tables.tasks, kind="train")[0].id
    small = Service(lab.database, lab.artifacts, Settings(max_queued_jobs=1).limits)
    with pytest.raises(QuotaExceeded):
        retractions.retract_task(small, train, SPLIT, user="ann", rerun=True, admin=True)
    assert len(shown(lab)) == 3
    again = retract(lab, train, rerun=True)["resubmitted"]
    assert len(again) == 2
    answer(lab, 0.75)
    assert shown(lab) == dict.fromkeys(again, 0.75)


def test_the_bytes_of_what_is_retracted_stay(lab: Any) -> None:
    job_id = lab.submit()
    answer(lab, 0.5)
    retract(lab, training_of(lab, job_id))
    [training] = lab.rows(tables.trainings)
    collect(lab.database, lab.artifacts, Policy(age_seconds=-1e6))
    assert lab.artifacts.exists(training.checkpoint_digest)


@pytest.mark.parametrize("text", [None, " "])
def test_a_filter_that_says_nothing_restores_nothing(lab: Any, text: str | None) -> None:
    with pytest.raises(InvalidQuery, match="it is empty"):
        retractions.restore_all(lab.service, nodes_of(text), user="root")


@pytest.mark.parametrize("by", ["job", "filter"])
def test_verdicts_do_not_rest_on_a_retracted_attack_at_one(lab: Any, by: str) -> None:
    """It hides the attack at s = 1 only; the other scales lose what they were compared with, until it is back."""
    at_one, at_five, other = lab.submit(), lab.submit(scale=5), lab.submit(scale=5, attack=WEAK)
    answer(lab, 0.25)
    insights = Insights(lab.database)
    before = insights.result(at_five)
    assert (before["verdict"], before["masked_fraction"], before["verdict_checks"]["masked"]) == (
        "trusted",
        0.0,
        "passed",
    )
    untouched = insights.result(other)
    nodes = nodes_of("scale = 1")
    if by == "job":
        retractions.retract(lab.service, at_one, "a bug", user="ann", admin=True)
    else:
        retractions.retract_all(lab.service, nodes, "a bug", user="ann")
    without = insights.result(at_five)
    assert (without["verdict"], without["masked_fraction"], without["verdict_checks"]["masked"]) == (
        "not_checked",
        None,
        "not_checked",
    )
    assert shown(lab, filter="verdict = trusted") == {other: 0.25}
    later = lab.submit(scale=7)
    answer(lab, 0.25)
    assert insights.result(later)["verdict"] == "not_checked"
    if by == "job":
        retractions.restore(lab.service, at_one, user="ann", admin=True)
    else:
        retractions.restore_all(lab.service, nodes, user="ann")
    again = insights.result(at_five)
    assert {name for name in again if again[name] != before[name]} == {"worst_case"}  # the later job's, too
    assert insights.result(other) == untouched
    assert insights.result(later)["verdict"] == "trusted"
    events = [event for event in lab.rows(tables.events, kind="result.judged") if event.job_id == at_five]
    assert [(event.actor, event.data["before"], event.data["verdict"]) for event in events] == [
        ("ann", "trusted", "not_checked"),
        ("ann", "not_checked", "trusted"),
    ]
