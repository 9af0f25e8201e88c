"""One suite for every executor, with real tasks: exactly one answer per grant, whatever happens to it."""

import gc
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from waiting import until

from service.lab.artifacts import Artifacts
from service.model.executor import (
    ArtifactRef,
    Bundle,
    Executor,
    Failed,
    Grant,
    Lost,
    Message,
    Progress,
    Started,
    Succeeded,
)
from service.queue.inprocess import InProcessExecutor
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from service.specs.plan import JobPlan, plan_job

READY_SECONDS = 120
ANSWER_SECONDS = 120
GRACE_SECONDS = 2.0
Start = Callable[[Settings], Executor]
_numbers = count(1)


def start_in_process(settings: Settings) -> Executor:
    from workers.context import Context
    from workers.run import execute

    torch.set_num_threads(1)
    context = Context(Artifacts(settings.artifacts), settings.data, epoch_state_seconds=settings.epoch_state_seconds)

    def body(bundle: Bundle) -> Iterator[Message]:
        while bundle.id.startswith("talks"):
            yield from (Progress(grant.task_id, grant.attempt, 0.0, {}) for grant in bundle.grants)
        yield from execute(bundle, context)

    return InProcessExecutor(body, grace_seconds=GRACE_SECONDS)


def start_ray(settings: Settings) -> Executor:
    from workers.pool import RayExecutor
    from workers.worker import WorkerSettings, run_bundle

    def body(bundle: Bundle, worker_settings: WorkerSettings) -> Iterator[list[Message]]:
        """The worker's, but for a bundle that hears nothing and for one whose code is broken."""
        import time

        from service.model.executor import Progress, Started

        if bundle.id.startswith("deaf"):
            yield [Started(bundle.grants[0].task_id, bundle.grants[0].attempt, "deaf")]
            time.sleep(300)
        if bundle.id.startswith("broken"):
            raise ImportError("no module named torch")
        while bundle.id.startswith("talks"):
            yield [Progress(grant.task_id, grant.attempt, 0.0, {}) for grant in bundle.grants]
        yield from run_bundle(bundle, worker_settings)

    return RayExecutor(settings, body=body, grace_seconds=GRACE_SECONDS)


@pytest.fixture(scope="session", params=[start_in_process, start_ray], ids=["in-process", "ray"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Lab"]:
    start: Start = request.param
    port = request.getfixturevalue("ray_head") if start is start_ray else 0
    settings = Settings(home=tmp_path_factory.mktemp("home"), epoch_state_seconds=0, ray_address="", ray_port=port)
    executor = start(settings)
    until(lambda: executor.capacity().ready, READY_SECONDS)
    yield Lab(executor, Artifacts(settings.artifacts))
    executor.close()
    assert not executor.capacity().ready
    gc.collect()  # here, lest another test's thread is interrupted in the destructor of what this one left


@pytest.fixture
def ray_lab(lab: "Lab") -> "Lab":
    if isinstance(lab.executor, InProcessExecutor):
        pytest.skip("there is no worker process")
    return lab


class Lab:
    """An executor, and what a test asks of it."""

    def __init__(self, executor: Executor, artifacts: Artifacts) -> None:
        self.executor, self.artifacts = executor, artifacts
        self.checkpoint: ArtifactRef | None = None

    def submit(
        self, plan: JobPlan, *specs: dict[str, Any], checkpoint: ArtifactRef | None = None, name: str = ""
    ) -> Bundle:
        grants = tuple(Grant(f"task-{next(_numbers)}", next(_numbers), "d" * 64, spec) for spec in specs)
        bundle = Bundle(f"{name}{next(_numbers)}", grants, plan.train.stored_spec, checkpoint)
        self.executor.submit(bundle)
        return bundle

    def until(self, *bundles: Bundle, enough: Callable[[list[Message]], bool] | None = None) -> list[Message]:
        """All messages until each grant has its answer, or there are enough of them. None may belong to no one."""
        open_ = {(g.task_id, g.attempt) for bundle in bundles for g in bundle.grants}
        messages: list[Message] = []
        deadline = time.monotonic() + ANSWER_SECONDS
        while open_ and not (enough and enough(messages)):
            assert time.monotonic() < deadline, f"no answer for {open_}; so far: {messages}"
            for message in self.executor.poll(0.5):
                key = (message.task_id, message.attempt)
                assert key in open_, f"unasked for, or a second answer: {message}"
                messages.append(message)
                if isinstance(message, (Succeeded, Failed, Lost)):
                    open_.discard(key)
        return messages

    def until_running(self, bundle: Bundle) -> str:
        """Until the first task says that it makes progress; returns its worker."""
        seen = self.until(bundle, enough=lambda messages: any(isinstance(m, Progress) for m in messages))
        return next(m.worker for m in seen if isinstance(m, Started))

    def trained(self) -> tuple[JobPlan, ArtifactRef]:
        plan = plan_of()
        if self.checkpoint is None:
            bundle = self.submit(plan, plan.train.stored_spec)
            made = answers(self.until(bundle), bundle)[0]
            assert isinstance(made, Succeeded), made
            self.checkpoint = made.outcome.artifacts[0]
        return plan, self.checkpoint


def plan_of(**changes: Any) -> JobPlan:
    spec = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 32, "recipe": {"epochs": 1}}
    return plan_job(JobSpec(**{**spec, **changes}), DatasetRef(name="digits"))


def endless() -> JobPlan:
    return plan_of(recipe={"epochs": 10_000})


def answers(messages: list[Message], bundle: Bundle) -> list[Succeeded | Failed | Lost]:
    """The answer of each grant of the bundle, in order."""
    found = {m.task_id: m for m in messages if isinstance(m, (Succeeded, Failed, Lost))}
    return [found[grant.task_id] for grant in bundle.grants]


def reasons(messages: list[Message], bundle: Bundle) -> list[str]:
    return [
        answer.reason if isinstance(answer, Lost) else type(answer).__name__ for answer in answers(messages, bundle)
    ]


def test_a_training_succeeds_and_its_weights_are_there(lab: Lab) -> None:
    plan = plan_of(seed=3)
    bundle = lab.submit(plan, plan.train.stored_spec)
    messages = lab.until(bundle)
    assert isinstance(messages[0], Started)
    [made] = answers(messages, bundle)
    assert isinstance(made, Succeeded)
    assert lab.artifacts.exists(made.outcome.artifacts[0].digest)
    assert made.outcome.numbers["epochs"] == 1


def test_one_failure_in_a_bundle_leaves_the_others_alone(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    attack, measure = plan.attack.stored_spec, plan.closed_forms.stored_spec
    bundle = lab.submit(plan, attack, {**attack, "samples": 10_000}, measure, checkpoint=checkpoint)
    messages = lab.until(bundle)
    assert reasons(messages, bundle) == ["Succeeded", "Failed", "Succeeded"]
    failed = answers(messages, bundle)[1]
    assert isinstance(failed, Failed)
    assert failed.kind == "configuration"
    assert "500 images" in failed.message


@pytest.mark.slow  # further processes of Ray, which import torch
def test_bundles_at_once_each_get_their_answers(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    bundles = [lab.submit(plan, plan.closed_forms.stored_spec, checkpoint=checkpoint) for _ in range(6)]
    messages = lab.until(*bundles)
    assert [reasons(messages, bundle) for bundle in bundles] == [["Succeeded"]] * 6


def test_progress_and_epoch_states_arrive_while_it_runs(lab: Lab) -> None:
    plan = endless()
    bundle = lab.submit(plan, plan.train.stored_spec)
    seen = lab.until(bundle, enough=lambda messages: any(isinstance(m, Progress) and m.resume for m in messages))
    progress = next(m for m in seen if isinstance(m, Progress) and m.resume)
    assert progress.resume is not None
    assert lab.artifacts.exists(progress.resume.digest)
    assert 0 < progress.fraction < 1
    lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    assert reasons(lab.until(bundle), bundle) == ["cancelled"]


def test_cancelling_what_runs_gives_the_rest_back_within_seconds(lab: Lab) -> None:
    plan = endless()
    bundle = lab.submit(plan, plan.train.stored_spec, plan.train.stored_spec)
    lab.until_running(bundle)
    started = time.monotonic()
    lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    assert reasons(lab.until(bundle), bundle) == ["cancelled", "given_back"]
    assert time.monotonic() - started < GRACE_SECONDS + 5
    again, checkpoint = lab.trained()
    after = lab.submit(again, again.closed_forms.stored_spec, checkpoint=checkpoint)
    assert reasons(lab.until(after), after) == ["Succeeded"]


def test_what_was_answered_before_a_cancellation_is_not_lost(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    bundle = lab.submit(plan, plan.closed_forms.stored_spec, endless().train.stored_spec, checkpoint=checkpoint)
    time.sleep(1)  # in which the first one answers, and nobody reads it
    lab.executor.cancel(bundle.grants[1].task_id, bundle.grants[1].attempt)
    assert reasons(lab.until(bundle), bundle) == ["Succeeded", "cancelled"]


def test_cancelling_what_waits_in_a_bundle_leaves_what_runs_alone(lab: Lab) -> None:
    plan = plan_of(recipe={"epochs": 40})
    bundle = lab.submit(plan, plan.train.stored_spec, plan.train.stored_spec)
    lab.until_running(bundle)
    lab.executor.cancel(bundle.grants[1].task_id, bundle.grants[1].attempt)
    assert reasons(lab.until(bundle), bundle) == ["Succeeded", "cancelled"]


def test_cancelling_what_is_unknown_or_over_changes_nothing(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    bundle = lab.submit(plan, plan.closed_forms.stored_spec, checkpoint=checkpoint)
    lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt + 1)
    assert reasons(lab.until(bundle), bundle) == ["Succeeded"]
    lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    assert lab.executor.poll(0.2) == []


@pytest.mark.slow  # further processes of Ray, which import torch
def test_a_bundle_that_waits_for_a_place_can_be_cancelled(lab: Lab) -> None:
    plan = endless()
    bundles = [lab.submit(plan, plan.train.stored_spec) for _ in range(3)]  # one more than there are CPUs
    last = bundles[-1].grants[0]
    lab.executor.cancel(last.task_id, last.attempt)
    for bundle in bundles[:2]:
        lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    messages = lab.until(*bundles)
    assert [reasons(messages, bundle) for bundle in bundles] == [["cancelled"]] * 3


def test_nothing_to_say_takes_as_long_as_the_timeout(lab: Lab) -> None:
    took = []
    for _ in range(3):  # of which a busy machine may delay one
        started = time.monotonic()
        assert lab.executor.poll(0.3) == []
        took.append(time.monotonic() - started)
    assert 0.25 < min(took) < 1.0


def test_a_poll_ends_also_while_a_bundle_always_has_something_to_say(lab: Lab) -> None:
    plan = endless()
    bundle = lab.submit(plan, plan.train.stored_spec, name="talks")
    lab.until(bundle, enough=bool)
    started = time.monotonic()
    assert lab.executor.poll(0.3)
    assert time.monotonic() - started < 10
    lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    assert isinstance(answers(lab.until(bundle), bundle)[0], Lost)


@pytest.mark.slow  # further processes of Ray, which import torch
def test_a_killed_worker_costs_the_task_that_ran_and_gives_the_rest_back(ray_lab: Lab) -> None:
    plan = endless()
    done, _ = ray_lab.trained()
    bundle = ray_lab.submit(plan, done.train.stored_spec, plan.train.stored_spec, plan.train.stored_spec)
    seen = ray_lab.until(
        bundle,
        enough=lambda messages: any(
            isinstance(m, Progress) and m.task_id == bundle.grants[1].task_id for m in messages
        ),
    )
    assert reasons(seen, Bundle("", bundle.grants[:1], {})) == ["Succeeded"]
    worker = next(m.worker for m in seen if isinstance(m, Started))
    started = time.monotonic()
    os.kill(int(re.findall(r"pid (\d+)", worker)[0]), signal.SIGKILL)
    rest = Bundle("", bundle.grants[1:], {})
    assert reasons(ray_lab.until(rest), rest) == ["worker_died", "given_back"]
    assert time.monotonic() - started < 5
    after = ray_lab.submit(done, done.train.stored_spec)
    assert reasons(ray_lab.until(after), after) == ["Succeeded"]


@pytest.mark.slow  # further processes of Ray, which import torch
def test_a_worker_that_does_not_hear_is_killed_after_the_grace_period(ray_lab: Lab) -> None:
    plan = endless()
    bundle = ray_lab.submit(plan, plan.train.stored_spec, plan.train.stored_spec, name="deaf")
    ray_lab.until(bundle, enough=bool)
    time.sleep(0.5)  # until it sleeps
    started = time.monotonic()
    ray_lab.executor.cancel(bundle.grants[0].task_id, bundle.grants[0].attempt)
    assert reasons(ray_lab.until(bundle), bundle) == ["cancelled", "given_back"]
    assert GRACE_SECONDS <= time.monotonic() - started < GRACE_SECONDS + 5


def test_a_worker_that_breaks_before_a_task_has_begun_is_the_environments_fault(ray_lab: Lab) -> None:
    plan = endless()
    bundle = ray_lab.submit(plan, plan.train.stored_spec, plan.train.stored_spec, name="broken")
    messages = ray_lab.until(bundle)
    assert reasons(messages, bundle) == ["environment", "given_back"]
    lost = answers(messages, bundle)[0]
    assert isinstance(lost, Lost)
    assert lost.message == "the worker failed: no module named torch"
    assert lost.fault is not None
    assert lost.fault.owner == "node"


@pytest.mark.slow  # further processes of Ray, which import torch
def test_workers_stay_warm(ray_lab: Lab) -> None:
    plan, checkpoint = ray_lab.trained()
    pids = set()
    for _ in range(6):
        bundle = ray_lab.submit(plan, plan.closed_forms.stored_spec, checkpoint=checkpoint)
        made = answers(ray_lab.until(bundle), bundle)[0]
        assert isinstance(made, Succeeded)
        pids.add(made.outcome.provenance["pid"])
    assert len(pids) <= 2  # as many processes as there are CPUs, not one for each bundle
    assert os.getpid() not in pids


def test_the_local_ray_keeps_to_this_machine_and_this_user(ray_lab: Lab) -> None:
    import ray

    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
    head = next(one for one in psutil.Process().children() if "workers.head" in one.cmdline())
    listening = {
        connection.laddr.ip
        for process in head.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
