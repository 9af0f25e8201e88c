"""One measure that fails takes nothing else along: the job has a result, with that measure null and its reason."""

from typing import Any

import pytest

from service.model.executor import Failed, Lost
from service.results.questions import Question
from service.results.results import Results

MEASURES = {"measures": ["sam_sharpness", "fisher_rao"]}


def named(grant: Any) -> str:
    return str(grant.spec["measure"]["type"]) if grant.spec["kind"] == "measure" else str(grant.spec["kind"])


@pytest.mark.parametrize("first", [True, False])
def test_the_job_has_a_result_without_it(lab: Any, first: bool) -> None:
    job_id = lab.submit(**MEASURES)
    lab.succeed(*lab.grant("train"))
    grants = lab.grant()
    [broken] = [grant for grant in grants if named(grant) == "sam_sharpness"]
    others = [grant for grant in grants if grant is not broken]
    if first:
        lab.fail(broken, "a step is not finite")
        assert lab.job(job_id).state == "running"
    lab.succeed(*others)
    if not first:
        assert lab.job(job_id).state == "running"
        lab.fail(broken, "a step is not finite")
    assert lab.job(job_id).state == "succeeded"
    [row] = Results(lab.database).results(Question())["items"]
    assert (row["verdict"], row["robust_accuracy"]) == ("trusted", 1.0)
    assert row["measures_failed"] == {"sam_sharpness": "a step is not finite"}
    assert row["measures"] == ["sam_sharpness", "fisher_rao"] or row["measures"] == ["fisher_rao", "sam_sharpness"]
    parts = Results(lab.database).result(job_id)["parts"]
    assert (parts["sam_sharpness"]["failed"], parts["sam_sharpness"]["numbers"]) == ("a step is not finite", {})
    assert parts["fisher_rao"]["failed"] is None


def test_asked_for_again_it_runs_again_and_its_number_is_there(lab: Any) -> None:
    first = lab.submit(**MEASURES)
    lab.succeed(*lab.grant("train"))
    for grant in lab.grant():
        if named(grant) == "sam_sharpness":
            lab.fail(grant)
        else:
            lab.succeed(grant)
    second = lab.submit(**MEASURES)
    assert lab.job(second).state != "succeeded"
    [again] = lab.grant()
    assert named(again) == "sam_sharpness"
    lab.succeed(again)
    assert lab.job_states() == {"succeeded": 2}
    for job_id in (first, second):
        assert Results(lab.database).result(job_id)["measures_failed"] == {}


def test_one_that_takes_its_workers_with_it_takes_no_result_with_it(lab: Any) -> None:
    job_id = lab.submit(**MEASURES)
    lab.succeed(*lab.grant("train"))
    grants = lab.grant()
    [broken] = [grant for grant in grants if named(grant) == "sam_sharpness"]
    lab.succeed(*(grant for grant in grants if grant is not broken))
    for loss in range(3):
        [grant] = lab.grant() if loss else [broken]
        lab.record(Lost(grant.task_id, grant.attempt, "out_of_memory", "SIGKILL"))
    assert lab.job(job_id).state == "succeeded"
    said = Results(lab.database).result(job_id)["measures_failed"]
    assert said == {"sam_sharpness": "it lost its worker 3 times, last: SIGKILL"}
    again = lab.submit(**MEASURES)
    lab.finish()
    assert lab.job(again).state == "succeeded"
    assert Results(lab.database).result(job_id)["measures_failed"] == {}


@pytest.mark.parametrize("kind", ["closed_forms", "attack", "control", "train"])
def test_what_a_result_cannot_do_without_fails_the_job(lab: Any, kind: str) -> None:
    job_id = lab.submit(**MEASURES)
    while lab.job(job_id).state not in ("failed", "succeeded"):
        for grant in lab.grant():
            if named(grant) == kind:
                lab.fail(grant, f"{kind} broke")
                break
            lab.succeed(grant)
        else:
            continue
        break
    assert (lab.job(job_id).state, lab.job(job_id).reason) == ("failed", f"{kind} broke")


def test_one_that_has_not_found_its_checkpoint_fails_the_job_which_can_be_retried(lab: Any) -> None:
    job_id = lab.submit(**MEASURES)
    lab.succeed(*lab.grant("train"))
    for grant in lab.grant():
        if named(grant) == "sam_sharpness":
            lab.record(Failed(grant.task_id, grant.attempt, "missing_checkpoint", "its bytes are gone"))
        else:
            lab.succeed(grant)
    assert lab.job(job_id).state == "failed"
    lab.service.retry_job(job_id, user="ann")
    lab.finish()
    assert lab.job(job_id).state == "succeeded"
