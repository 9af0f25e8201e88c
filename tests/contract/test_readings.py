"""The read-only questions, on SQLite and on PostgreSQL: they must answer alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dispatching import Scripted
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.errors import DatabaseAway, InvalidQuery, NotFound
from service.model.executor import ArtifactRef, Bits, Grant, Outcome, Progress
from service.queue.dispatcher import Dispatcher
from service.queue.verbs import Service
from service.results.insights import Insights, Question
from service.results.views import eta_seconds, sweep_state
from service.settings import Settings
from service.specs import JobSpec, Sweep
from service.store import Database

BASE = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 10}
PANEL = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")


@pytest.fixture
def insights(service: Service) -> Insights:
    return Insights(service.database)


@pytest.fixture
def executor() -> Scripted:
    return Scripted(cpus=2.0)


@pytest.fixture
def finish(service: Service, executor: Scripted, tmp_path: Path) -> Callable[..., None]:
    """Let the dispatcher work until `limit` more tasks are done, or nothing is left to do."""
    settings = Settings(home=tmp_path)
    dispatcher = Dispatcher(service.database, service.artifacts, executor, settings, "dispatcher-of-tests")

    def run(limit: int = 10_000) -> None:
        dispatcher.tick()
        while True:
            limit -= executor.finish(made_up, limit)
            if not dispatcher.tick() or not limit:
                return

    return run


def made_up(grant: Grant) -> Outcome:
    spec, provenance = grant.spec, {"wall_seconds": 2.0}
    if spec["kind"] == "train":
        return Outcome({"seconds": 1.0}, artifacts=(ArtifactRef(grant.digest, 1, "checkpoint"),), provenance=provenance)
    if spec["kind"] == "measure":
        numbers = {"log_relative_sharpness_median": -spec["scale"] if spec["scale"] < 50 else None}
        return Outcome(numbers, provenance=provenance)
    n = spec["samples"]
    if spec["kind"] == "control":
        counts = ("eps_zero_changed", "random_forward_changed", "train_mode_modules", "batch_dependent_changed")
        bits = {f"robust_{name}": packed([True] * n) for name in PANEL}
        return Outcome(dict.fromkeys(counts, 0), bits=bits, provenance=provenance)
    bits = {"clean_correct": packed([True] * n), "robust": packed([True] * n), "zero_gradient": packed([False] * n)}
    numbers = {"robust_accuracy": 1 / spec["scale"], "clean_accuracy": 1.0, "flip_rate": 0.0}
    return Outcome(numbers, {"trajectory": {"step": [0, 1]}}, bits, (), provenance)


def packed(bits: list[bool]) -> Bits:
    return Bits(len(bits), np.packbits(np.array(bits)).tobytes())


def submit(service: Service, user: str = "ada", **grid: list[Any]) -> str:
    sweep = Sweep(name="readings", base=BASE, grid=grid or {"scale": [1, 5]}, labels={"for": "tests"})
    return str(service.submit_sweep(sweep, user=user).body["id"])


def pages(ask: Callable[[Question], dict[str, Any]], limit: int, **question: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = ask(Question(limit=limit, cursor=cursor, **question))
        assert len(page["items"]) <= limit
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


@pytest.mark.parametrize(
    "sort", ["scale", "-scale", "attack.eps", "-attack.steps", "recipe.lr", "created_at", "dataset"]
)
def test_every_order_gives_every_job_once(service: Service, insights: Insights, sort: str) -> None:
    submit(service, scale=[5, 1, 2.5], attack=["pgd_l2", "pgd_linf", "cw"], seed=[0, 1])
    everything = insights.jobs(Question(limit=1000, sort=sort))["items"]
    assert [job["id"] for job in pages(insights.jobs, 4, sort=sort)] == [job["id"] for job in everything]
    assert len({job["id"] for job in everything}) == 18
    if sort.endswith("scale"):
        scales = [job["spec"]["scale"] for job in everything]
        assert scales == sorted(scales, reverse=sort.startswith("-"))
    if sort == "attack.eps":  # an attack without eps comes last, in every direction
        assert {job["spec"]["attack"]["type"] for job in everything[-6:]} == {"cw"}


def test_nulls_come_last_and_pages_pass_over_them(service: Service, insights: Insights, finish: Any) -> None:
    submit(service, scale=[50, 1, 100, 5])
    finish()
    for sort, expected in [("log_relative_sharpness_median", [5, 1]), ("-log_relative_sharpness_median", [1, 5])]:
        for limit in (1, 2, 3, 10):
            scales = [row["scale"] for row in pages(insights.results, limit, sort=sort)]
            assert scales[:2] == expected
            assert sorted(scales[2:]) == [50, 100]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"scale": ["5"]}, 4),
        ({"scale": ["5", "1"]}, 8),
        ({"attack.norm": ["l2"], "scale": ["1"]}, 2),
        ({"norm": ["linf"]}, 4),
        ({"attack": ["pgd"]}, 8),
        ({"attack.eps": ["8/255"]}, 4),
        ({"attack.steps": ["25"]}, 4),
        ({"attack.random_start": ["false"]}, 8),
        ({"attack.random_start": ["true"]}, 0),
        ({"attack.loss": ["cross_entropy"]}, 8),
        ({"recipe": ["standard"]}, 8),
        ({"recipe.epochs": ["100"]}, 8),
        ({"seed": ["1"]}, 4),
        ({"state": ["queued"]}, 8),
        ({"state": ["failed", "succeeded"]}, 0),
        ({"user": ["ada"]}, 8),
        ({"label": ["for:tests"]}, 8),
        ({"label": ["for:others"]}, 0),
    ],
)
def test_filters(service: Service, insights: Insights, filters: dict[str, list[str]], expected: int) -> None:
    submit(service, scale=[1, 5], attack=["pgd_l2", "pgd_linf"], seed=[0, 1])
    assert len(insights.jobs(Question(filters))["items"]) == expected


@pytest.mark.parametrize("filters", [{"colour": ["red"]}, {"scale": ["x"]}, {"seed": ["1.5"]}, {"seed": [str(2**40)]}])
def test_filters_that_make_no_sense(insights: Insights, filters: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidQuery) as refused:
        insights.jobs(Question(filters))
    assert refused.value.parameter == next(iter(filters))


def test_a_job_with_its_tasks(service: Service, insights: Insights, finish: Any) -> None:
    reply = service.submit(JobSpec(**BASE, scale=5, measures=("sam_sharpness",)), user="ada")
    job = insights.job(reply.body["id"])
    assert [task["kind"] for task in job["tasks"]].count("measure") == 2
    assert sorted(role for task in job["tasks"] for role in task["roles"]) == [
        "attack", "baseline", "closed_forms", "control", "measure", "train",
    ]  # fmt: skip
    finish()
    assert insights.job(job["id"])["state"] == "succeeded"
    assert set(insights.result(job["id"])["parts"]) == {
        "attack", "baseline", "closed_forms", "control", "sam_sharpness", "train",
    }  # fmt: skip
    at_one = service.submit(JobSpec(**BASE), user="ada").body["id"]
    assert ["attack", "baseline"] in [task["roles"] for task in insights.job(at_one)["tasks"]]


def test_a_sweep_s_progress_and_eta(service: Service, insights: Insights, finish: Any) -> None:
    sweep_id = submit(service, scale=[1, 5, 10])
    sweep = insights.sweep(sweep_id)
    assert (sweep["state"], sweep["progress"], sweep["eta_seconds"]) == ("running", 0.0, None)
    assert sweep["jobs"]["queued"] == 3
    assert sweep["tasks"]["total"] == 8  # a training, three measures, three attacks, a panel
    finish(1)
    sweep = insights.sweep(sweep_id)
    assert sweep["tasks"]["succeeded"] == 1
    assert sweep["progress"] == 1 / 8
    assert sweep["eta_seconds"] == 7 * 2.0 / 2  # two seconds each on two CPUs
    finish()
    sweep = insights.sweep(sweep_id)
    assert (sweep["state"], sweep["progress"], sweep["eta_seconds"]) == ("succeeded", 1.0, None)
    again = submit(service, user="grace", scale=[1, 5, 10])
    assert insights.sweep(again)["state"] == "succeeded"
    assert [item["id"] for item in insights.sweeps(user=None, cursor=None, limit=10)["items"]] == [again, sweep_id]
    page = insights.sweeps(user=None, cursor=None, limit=1)
    assert insights.sweeps(user=None, cursor=page["next_cursor"], limit=1)["items"][0]["id"] == sweep_id
    assert [item["id"] for item in insights.sweeps(user="ada", cursor=None, limit=10)["items"]] == [sweep_id]


def test_states_of_a_sweep() -> None:
    none = dict.fromkeys(("queued", "running", "succeeded", "failed", "cancelled", "held"), 0)
    assert sweep_state({**none, "succeeded": 1, "running": 1}, False) == "running"
    assert sweep_state({**none, "queued": 1}, True) == "paused"
    assert sweep_state({**none, "succeeded": 1, "failed": 1}, True) == "failed"
    assert sweep_state({**none, "succeeded": 1, "held": 1}, False) == "failed"
    assert sweep_state({**none, "succeeded": 1, "cancelled": 1}, False) == "cancelled"
    assert sweep_state({**none, "succeeded": 1}, False) == "succeeded"
    assert eta_seconds([], {}, 4) is None


def test_results_and_their_curves(service: Service, insights: Insights, finish: Any) -> None:
    submit(service, scale=[2, 4])
    finish()
    first, second = insights.results(Question(sort="scale"))["items"]
    assert (first["robust_accuracy"], second["robust_accuracy"]) == (0.5, 0.25)
    assert (first["verdict"], first["log_relative_sharpness_median"], first["flip_rate"]) == ("trusted", -2.0, 0.0)
    assert first["attack"]["norm"] == "linf"
    assert first["provenance"] == {"wall_seconds": 2.0}
    assert insights.trajectory(first["job_id"])["curves"]["attack"] == {"trajectory": {"step": [0, 1]}}
    assert len(insights.results(Question({"robust_accuracy": ["0.25"]}))["items"]) == 1
    assert [row["scale"] for row in insights.all_results(Question(sort="-robust_accuracy"))] == [2, 4]


def test_what_is_not_there(service: Service, insights: Insights) -> None:
    job = service.submit(JobSpec(**BASE), user="ada").body["id"]
    for ask in (insights.result, insights.trajectory):
        with pytest.raises(NotFound, match="is queued: it has no result"):
            ask(job)
    for look in (insights.job, insights.sweep, insights.task, insights.result):
        with pytest.raises(NotFound, match="there is no"):
            look("nothing")


def test_events_and_progress(service: Service, insights: Insights, executor: Scripted, finish: Any) -> None:
    sweep_id = submit(service)
    other = service.submit(JobSpec(**BASE, seed=9), user="ada").body["id"]
    finish(0)
    executor.said = [Progress(grant.task_id, grant.attempt, 0.25, {"epoch": 3}) for grant in executor.grants]
    finish(0)
    _, happened, running = insights.events(0, sweep_id=sweep_id)
    assert happened[0]["kind"] == "sweep.submitted"
    assert {"job.submitted", "task.queued", "task.blocked", "task.running"} <= {event["kind"] for event in happened}
    assert other not in {event["job_id"] for event in happened}
    assert [(task["progress"], task["detail"]) for task in running] == [(0.25, {"epoch": 3})]
    _, later, _ = insights.events(happened[3]["id"], sweep_id=sweep_id)
    assert [event["id"] for event in later] == [event["id"] for event in happened[4:]]
    assert insights.last_event() >= happened[-1]["id"]
    assert len(insights.events(0, job_id=other)[2]) == 1


def test_queue_and_cluster(service: Service, insights: Insights, finish: Any) -> None:
    nobody: dict[str, Any] = {
        "leading": False,
        "dispatcher": None,
        "lease_expires_at": None,
        "set_aside": [],
        "status": {},
    }
    assert insights.cluster() == nobody
    submit(service)
    assert insights.queue()["jobs"] == {"queued": 2}
    assert insights.queue()["tasks"]["train"] == {"queued": 1}
    finish()
    assert insights.cluster()["leading"] is True
    assert insights.queue()["jobs"] == {"succeeded": 2}


def test_a_statement_that_never_works_is_no_database_that_is_away(service: Service) -> None:
    """As one with more columns than a database has: 54011 on PostgreSQL, plain errors on SQLite."""
    columns = ", ".join(f"{i} AS c{i}" for i in range(3000))
    with pytest.raises(OperationalError, match=r"too many|target lists"), service.database.read() as connection:
        connection.execute(text(f"SELECT {columns}"))


def test_a_turn_that_does_not_come_is_a_database_that_is_away(postgresql_url: str) -> None:
    first, second = Database(postgresql_url), Database(postgresql_url)
    try:
        with first.read() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(7265011)"))
            with pytest.raises(DatabaseAway, match="lock timeout"), second.read() as waiting:
                waiting.execute(text("SELECT set_config('lock_timeout', '50ms', true), pg_advisory_xact_lock(7265011)"))
    finally:
        first.close()
        second.close()
