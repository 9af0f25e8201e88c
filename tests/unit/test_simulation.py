"""Simulations: makespans that can be computed by hand, fair shares, nobody starved, and the command's sentences."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.cli import main as cli
from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Grant
from service.model.scheduling import MAX_BUNDLE, Account
from service.operations.simulation import Load, Submission, nodes_with, simulate
from service.operations.simulation_report import Measured, Report, duration, report
from service.queue.dispatcher import BATCH_WINDOW_SECONDS
from service.queue.verbs import Service
from service.queue.virtual import Idle, Run
from service.settings import Settings, TaskResources
from service.specs import JobSpec
from service.store import Database, claiming, reading
from service.store.simulated import Turn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = {"train": 100.0, "measure": 10.0, "attack": 20.0, "control": 30.0}
ALIKE = dict.fromkeys(SECONDS, 30.0)
SETTINGS = Settings()


def cells(first: int = 0, networks: int = 1, **changed: Any) -> list[JobSpec]:
    """Jobs on networks of their own: each needs a training, a measure, an attack and a panel of controls."""
    base = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16, "scale": 1, **changed}
    return [JobSpec.model_validate({**base, "seed": seed}) for seed in range(first, first + networks)]


def run(
    *submissions: Submission,
    gpus: float,
    seconds: dict[str, float] | None = None,
    settings: Settings = SETTINGS,
    **users: Account,
) -> Report:
    """Tasks take these seconds by kind, or 20 to 40 by their digest."""

    def length(_: Bundle, grant: Grant) -> float:
        return 20.0 + int(grant.digest[:4], 16) % 21 if seconds is None else seconds[grant.spec["kind"]]

    return simulate(Load(submissions, users), nodes_with(gpus, 4 * gpus), length, settings)


class TestRuns:
    def test_the_makespan_is_that_of_the_work(self) -> None:
        """On one GPU the training comes first, and the rest once the dispatcher has written that it is done."""
        done = run(Submission(50.0, "ann", cells()), gpus=1, seconds=SECONDS)
        assert done.tasks == 4
        assert done.makespan_seconds == pytest.approx(50 + 100 + BATCH_WINDOW_SECONDS + 10 + 20 + 30)
        [ann] = done.users
        assert ann.tasks == 4
        assert ann.device_seconds == pytest.approx(160.0)
        assert done.left == {}

    def test_users_get_shares_by_weight_and_no_gpu_waits(self) -> None:
        loads = [Submission(0.0, name, cells(first, 10)) for name, first in (("ann", 0), ("bob", 100))]
        done = run(*loads, gpus=4, seconds=ALIKE, ann=Account(weight=1), bob=Account(weight=3))
        assert done.tasks == 80
        assert done.windows == 1
        assert done.largest_deviation is not None
        assert done.largest_deviation < 0.2
        assert done.idle_while_fits is not None
        assert done.idle_while_fits < 1e-3
        ann, bob = done.users
        assert bob.done_at_seconds is not None
        assert ann.done_at_seconds == done.makespan_seconds > 1.3 * bob.done_at_seconds

    def test_a_task_as_small_as_the_others_waits_for_a_bundle_and_not_for_the_queue(self) -> None:
        flood = [cell for scale in range(1, 61) for cell in cells(scale=scale)]
        done = run(Submission(0.0, "bob", flood), Submission(200.0, "ann", cells(7)), gpus=4)
        waits = {user.name: user.longest_wait_seconds for user in done.users}
        assert waits["ann"] is not None
        assert waits["ann"] <= (MAX_BUNDLE + 1) * 40.0 < done.makespan_seconds - 200.0

    def test_a_task_that_needs_two_gpus_is_not_starved_by_tasks_that_need_one(self) -> None:
        large = SETTINGS.model_copy(update={"resources": {"train": TaskResources(gpus=2)}})
        flood = [cell for scale in range(1, 61) for cell in cells(scale=scale)]
        submissions = Submission(0.0, "bob", flood), Submission(200.0, "ann", cells(7))
        done = run(*submissions, gpus=4, settings=large)
        waits = {user.name: user.longest_wait_seconds for user in done.users}
        assert waits["ann"] is not None
        assert waits["ann"] <= (MAX_BUNDLE + 1) * 40.0

    def test_what_fits_nowhere_is_said(self) -> None:
        large = SETTINGS.model_copy(update={"resources": {"train": TaskResources(gpus=9)}})
        done = run(Submission(0.0, "ann", cells()), gpus=16, seconds=SECONDS, settings=large)
        assert (done.tasks, done.left) == (0, {"train": 1, "measure": 1, "attack": 1, "control": 1})
        assert "1 task of the kind train did not run: no node has 1 CPU, 9 GPU." in list(done.lines())


def measured(**changed: Any) -> Measured:
    nothing = Measured([], [], [], {}, 1.0, [], 0, 0.0, 0, 0, {}, {})
    return replace(nothing, **changed)


class TestReport:
    def test_nothing_is_no_number(self) -> None:
        empty = report(measured(), 10.0)
        assert (empty.busy, empty.largest_deviation, empty.decision_p50_ms, empty.tasks_per_second) == (None,) * 4
        assert "no two users" in "".join(empty.lines())
        json.dumps(empty.as_json(), allow_nan=False)

    def test_shares_are_compared_in_windows_in_which_both_wait(self) -> None:
        """At first Ann has a quarter, which is due; in the second half-life a half; in the third Bob waits no more."""
        spans: dict[str, list[tuple[float, float]]] = {
            "ann": [(0, 2.5), (10, 15), (20, 30)],
            "bob": [(2.5, 10), (15, 20)],
        }
        runs, turns = [], []
        for name, of_user in spans.items():
            for number, (since, until) in enumerate(of_user):
                runs += [Run(f"{name} {number} {at}", at, at + 0.5, 1.0) for at in _steps(since, until)]
            turns.append(Turn(f"{name} waits", "attack", name, -5.0, 30.0 if name == "ann" else 21.0))
        turns += [Turn(one.task_id, "attack", one.task_id[:3], one.started_at, one.started_at) for one in runs]
        users = {"ann": Account(weight=1), "bob": Account(weight=3)}
        made = report(measured(runs=runs, turns=turns, users=users), 10.0)
        assert (made.windows, made.window_seconds) == (2, 10.0)
        assert made.largest_deviation == pytest.approx(1.0)  # Ann had twice what was due
        assert [user.share for user in made.users] == pytest.approx([17.5 / 30, 12.5 / 30])

    def test_idle_devices_count_while_a_task_waits_for_which_there_is_room(self) -> None:
        turns = [Turn("a", "attack", "ann", 1.0, 3.0), Turn("t", "train", "ann", 0.0, 9.0)]
        idle = [Idle(0.0, 2.0, 2.0, frozenset({"attack"})), Idle(4.0, 6.0, 1.0, frozenset())]
        runs = [Run("a", 5.0, 10.0, 1.0), Run("t", 9.0, 10.0, 1.0)]
        users = {"ann": Account()}
        made = report(measured(runs=runs, turns=turns, idle=idle, users=users, devices=2.0), 10.0)
        assert made.idle_while_fits == pytest.approx(2.0 / 20.0)
        assert made.idle_behind_bundles == 0.0
        capped = report(measured(runs=runs, turns=turns, idle=idle, users={"ann": Account(max_gpus=1)}, devices=2.0), 9)
        assert capped.idle_while_fits == 0.0

    def test_times_are_said_in_the_unit_that_one_would_choose(self) -> None:
        assert [duration(s) for s in (1.5, 90, 5400, 200_000, 300_000)] == [
            "1.5 s",
            "90 s",
            "90 min",
            "55.6 h",
            "3.47 d",
        ]


def _steps(since: float, until: float) -> list[float]:
    return [since + 0.5 * i for i in range(int((until - since) * 2))]


@pytest.fixture
def uncanny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`uncanny simulate WORDS`, without any service: `(exit code, stdout, stderr)`."""
    monkeypatch.setenv("UNCANNY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("UNCANNY_DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["uncanny", "simulate", *words])
        with pytest.raises(SystemExit) as ended:
            cli._run()
        return ended.value.code, *capsys.readouterr()

    return call


def test_the_command_simulates_an_example(uncanny: Any, tmp_path: Path) -> None:
    quick = str(EXAMPLES / "quick.yaml")
    code, out, _ = uncanny(quick, "--user", "ann=2", "--gpus", "8", "--cpus", "32", "--seconds", "train=60", "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["tasks"], made["left"], made["devices"]) == (144, {}, 8)
    assert [(user["name"], user["weight"], user["tasks"]) for user in made["users"]] == [("ann", 2, 144)]
    assert sum(made["assumed"].values()) == 144
    assert not (tmp_path / "home").exists()


def test_the_command_tells_people(uncanny: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("{architecture: mlp, dataset: digits, attack: pgd_l2, samples: 20}")
    code, out, err = uncanny("job.yaml", "--user", "ann=2", "--user", "bob=1", "--gpus", "1")
    assert (code, err) == (0, "")
    assert out.startswith("8 tasks in 23.3 min on 1 device.")
    assert "Stated lengths were taken for 8 tasks" in out
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [["ann", "2", "4"], ["bob", "1", "4"]]


def test_the_command_asks_the_store(uncanny: Any, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/home/uncanny.db")
    database.upgrade()
    assert "all jobs of the store have ended" in uncanny("--from-store", "--gpus", "1")[2]
    service = Service(database, Artifacts(str(tmp_path / "home" / "artifacts")))
    for cell, user in zip(cells(networks=2), ("ann", "bob"), strict=True):
        service.submit(cell, user=user)
    assert "no dispatcher has reported a cluster" in uncanny("--from-store")[2]
    with database.write() as connection:
        node = {"cpus": 4.0, "gpus": 1.0, "nodes": [{"CPU": 4.0, "GPU": 1.0}], "names": ["here"]}
        claiming.lead(connection, database.now(connection), "d1", None, 60.0, {"capacity": node})
    as_it_is, more = (
        json.loads(uncanny("--from-store", *words, "--weight", "ann=3", "--json")[1])
        for words in ((), ("--gpus", "+1"))
    )
    assert (as_it_is["tasks"], as_it_is["devices"], more["tasks"], more["devices"]) == (8, 1, 8, 2)
    assert as_it_is["makespan_seconds"] > 1.9 * more["makespan_seconds"]
    assert {user["name"]: user["weight"] for user in more["users"]} == {"ann": 3, "bob": 1}
    with database.read() as connection:
        assert reading.queue_counts(connection)[0] == {"queued": 2}
    database.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "say what to simulate"),
        (("good.yaml",), "say how many GPUs the cluster has, as --gpus 8"),
        (("missing.yaml", "--gpus", "1"), "cannot read missing.yaml"),
        (("broken.yaml", "--gpus", "1"), "broken.yaml: neither YAML nor JSON: line 1"),
        (("wrong.yaml", "--gpus", "1"), "wrong.yaml: /base/architecture: "),
        (("own.yaml", "--gpus", "1"), "it cannot be simulated: /dataset: npz:ours is not registered"),
        (("good.yaml", "--gpus", "many"), "--gpus: 'many' is no number"),
        (("good.yaml", "--gpus", "1e9"), "--gpus: a cluster of 1,000,000,000 GPUs is too large"),
        (("good.yaml", "--gpus", "nan"), "--gpus: 'nan' is no number"),
        (("good.yaml", "--gpus", "+4"), "there is none: write --gpus 4"),
        (("good.yaml", "--gpus", "1", "--user", "ann"), "--user: 'ann' is not of the form NAME=NUMBER"),
        (("good.yaml", "--gpus", "1", "--user", "ann=0"), "--user: '0' is no number above 0"),
        (("good.yaml", "--gpus", "1", "--weight", "zoe=2"), "--weight: zoe has submitted nothing (users: somebody)"),
        (("good.yaml", "--gpus", "1", "--seconds", "nap=2"), "--seconds: nap is no kind of task"),
    ],
)
def test_bad_input_is_one_sentence(uncanny: Any, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    job = "{{architecture: {0}, dataset: {1}, attack: pgd_l2, samples: 20}}"
    (tmp_path / "good.yaml").write_text(job.format("mlp", "digits"))
    (tmp_path / "own.yaml").write_text(job.format("mlp", "'npz:ours'"))
    (tmp_path / "wrong.yaml").write_text("{name: wrong, base: {architecture: resnet19}, grid: {scale: [1]}}")
    (tmp_path / "broken.yaml").write_text("name: [")
    code, out, err = uncanny(*words)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert sentence in err
