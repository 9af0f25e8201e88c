"""What a GPU must do with the workers: memory that runs out, errors that break it, shares, moves, and its names.

`GPU_TESTS_DEVICE=cpu` runs on a CPU what says something of one too: so that it is known to run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load
from torch import nn
from waiting import until

from service.lab.artifacts import Artifacts
from service.model.executor import (
    ArtifactRef,
    Bundle,
    Failed,
    Grant,
    Lost,
    Message,
    Needs,
    Progress,
    Started,
    Succeeded,
)
from service.operations.doctor import cluster_checks
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from service.specs.plan import JobPlan, plan_job
from workers import devices, run, tasks
from workers.context import Context
from workers.doctor import driver_gpus
from workers.science.seeding import deterministic
from workers.worker import WorkerSettings, _Warm, run_bundle

ON_CPU = os.environ.get("GPU_TESTS_DEVICE", "cuda") == "cpu"
DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)
MEBIBYTE = 1 << 20
ABOUT_NOTHING = 100 * MEBIBYTE  # cuBLAS keeps its workspace, and blocks are handed out in pieces of 20 MiB
LONG = 10_000  # epochs of a training that does not end by itself
ANSWER_SECONDS = 120.0
HELD_SECONDS = 10.0  # for which a worker keeps others from a GPU that does not compute
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="there is no GPU"),
]
only_on_a_gpu = pytest.mark.skipif(ON_CPU, reason="says something of a GPU alone")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
_numbers = count(1)


def planned(architecture: str = "mlp", **recipe: Any) -> JobPlan:
    spec = {"architecture": architecture, "dataset": "digits", "attack": "pgd_linf", "scale": 5, "samples": 40}
    return plan_job(JobSpec(**spec, recipe={"epochs": 2, **recipe}), DatasetRef(name="digits"))


def bundle(plan: JobPlan, *specs: dict[str, Any], checkpoint: ArtifactRef | None = None, share: float = 1.0) -> Bundle:
    grants = tuple(Grant(f"task-{next(_numbers)}", 1, "d" * 64, spec) for spec in specs)
    needs = Needs(1.0, 0.0 if ON_CPU else share)
    return Bundle(f"bundle-{next(_numbers)}", grants, plan.train.stored_spec, checkpoint, needs=needs)


def answers(messages: list[Message]) -> list[Succeeded | Failed | Lost]:
    return [message for message in messages if isinstance(message, (Succeeded, Failed, Lost))]


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    yield Context(Artifacts(str(tmp_path / "artifacts")), tmp_path / "data", DEVICE, epoch_state_seconds=0)
    devices.release(DEVICE)


def executed(context: Context, of: Bundle) -> list[Succeeded | Failed | Lost]:
    return answers(list(run.execute(of, context)))


def trained(context: Context) -> tuple[JobPlan, ArtifactRef]:
    plan = planned()
    [made] = executed(context, bundle(plan, plan.train.stored_spec))
    assert isinstance(made, Succeeded), made
    return plan, made.outcome.artifacts[0]


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Lets torch allocate so many bytes more than it holds now."""

    def to(more_bytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        allowed = torch.cuda.memory_reserved(DEVICE) + more_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), DEVICE)

    yield to
    if not ON_CPU:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


# --- provenance ---


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_number_says_on_which_gpu_it_was_made_and_how_much_of_it_it_had(context: Context, share: float) -> None:
    plan, checkpoint = trained(context)
    of = bundle(plan, plan.attack.stored_spec, checkpoint=checkpoint)
    [made] = executed(replace(context, device_share=share), of)
    assert isinstance(made, Succeeded), made
    noted = made.outcome.provenance
    assert noted["device_share"] == share
    assert noted["device_seconds"] == pytest.approx(share * noted["wall_seconds"])
    assert noted["matmul_precision"] == noted["convolution_precision"] == "ieee"
    names = ("gpu_uuid", "gpu_memory_bytes", "gpu_capability", "gpu_sm_count", "device_free_bytes")
    if ON_CPU:
        assert {noted[name] for name in names} == {None}
        return
    driver = {f"GPU-{gpu['uuid']}": gpu for gpu in driver_gpus()}[noted["gpu_uuid"]]
    assert driver["capability"] == noted["gpu_capability"]
    assert driver["driver"] in noted["driver"]
    assert noted["gpu_memory_bytes"] == torch.cuda.get_device_properties(DEVICE).total_memory
    assert noted["gpu_sm_count"] > 0
    assert 0 < noted["device_free_bytes"] < noted["gpu_memory_bytes"]
    assert 0 < noted["peak_device_memory_bytes"] < noted["gpu_memory_bytes"]


WORKSPACE = """
import os, sys, torch
from pathlib import Path
from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Grant, Succeeded
from service.specs.plan import plan_job
from service.specs import DatasetRef, JobSpec
from workers.context import Context
from workers.run import execute

os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
job = JobSpec(architecture="mlp", dataset="digits", attack="pgd_linf", samples=8, recipe={"epochs": 1})
spec = plan_job(job, DatasetRef(name="digits")).train.stored_spec
context = Context(Artifacts(sys.argv[1]), Path(sys.argv[1]), torch.device("cuda", 0))
made = list(execute(Bundle("b", (Grant("t", 1, "d" * 64, spec),), spec), context))[-1]
assert isinstance(made, Succeeded), made
context.cache.clear()
before = torch.cuda.memory_allocated()
torch._C._cuda_clearCublasWorkspaces()
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], before - torch.cuda.memory_allocated())
"""


@only_on_a_gpu
def test_a_new_worker_gives_cublas_the_workspace_that_makes_it_deterministic(tmp_path: Path) -> None:
    """Eight of 4,096 KiB: cuBLAS reads the variable once, when a process first multiplies."""
    done = subprocess.run(
        [sys.executable, "-c", WORKSPACE, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    config, size_bytes = done.stdout.split()
    assert config == ":4096:8", done.stderr
    assert int(size_bytes) >= 8 * 4096 << 10


# --- memory ---


def takes(size_bytes: int) -> Callable[..., Any]:
    """A measure that first allocates so much."""
    measure = tasks.run_measure

    def greedy(*args: Any, **options: Any) -> Any:
        held = torch.empty(size_bytes, dtype=torch.uint8, device=DEVICE)
        made = measure(*args, **options)
        del held
        return made

    return greedy


@pytest.mark.parametrize(("share", "reason"), [(1.0, "out_of_memory"), (0.5, "out_of_shared_memory")])
def test_memory_that_runs_out_loses_the_attempt_and_the_rest_goes_on(
    context: Context, limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, share: float, reason: str
) -> None:
    plan, checkpoint = trained(context)
    too_much = 1 << 46 if ON_CPU else 4 << 30
    if not ON_CPU:
        limit(1 << 30)
    monkeypatch.setattr(tasks, "run_measure", takes(too_much))
    both = bundle(plan, plan.closed_forms.stored_spec, plan.attack.stored_spec, checkpoint=checkpoint)
    lost, attacked = executed(replace(context, device_share=share), both)
    assert isinstance(lost, Lost), lost
    assert lost.reason == ("out_of_memory" if ON_CPU else reason), lost.message
    assert lost.fault is None
    assert isinstance(attacked, Succeeded), attacked


@only_on_a_gpu
def test_what_the_worker_keeps_makes_room_before_the_attempt_is_lost(
    context: Context, limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, checkpoint = trained(context)
    context.cache.clear()
    limit(1 << 30)
    kept = 600 * MEBIBYTE
    context.cache.get("another network", lambda: (torch.empty(kept, dtype=torch.uint8, device=DEVICE), kept))
    tried = []
    greedy = takes(kept)

    def counted(*args: Any, **options: Any) -> Any:
        tried.append(torch.cuda.memory_allocated(DEVICE))
        return greedy(*args, **options)

    monkeypatch.setattr(tasks, "run_measure", counted)
    [made] = executed(context, bundle(plan, plan.closed_forms.stored_spec, checkpoint=checkpoint))
    assert isinstance(made, Succeeded), made
    assert len(tried) == 2
    assert tried[1] < tried[0] - kept / 2


@only_on_a_gpu
def test_a_convolution_whose_workspace_does_not_fit_is_out_of_memory_however_cudnn_says_so(
    limit: Callable[[int], None],
) -> None:
    """cuDNN takes a plan with less workspace while there is one."""
    errors: dict[int, RuntimeError] = {}
    x = torch.rand(64, 64, 64, 64, device=DEVICE, requires_grad=True)
    layer = nn.Conv2d(64, 128, 3, padding=1).to(DEVICE)
    for mebibytes in (0, 2, 32, 128, 136, 160, 256, 320, 400, 8192):
        torch.cuda.empty_cache()
        limit(mebibytes * MEBIBYTE)
        try:
            with deterministic(DEVICE):
                torch.autograd.grad(layer(x).square().mean(), [x, layer.weight])
            torch.cuda.synchronize(DEVICE)
        except RuntimeError as error:
            errors[mebibytes] = error.with_traceback(None)  # whose frames would hold what it had allocated
    for mebibytes, seen in errors.items():
        print(f"\n{mebibytes} MiB: {type(seen).__name__}: {str(seen).splitlines()[0]}")
    assert all(devices.ran_out_of_memory(seen) for seen in errors.values())
    assert 0 in errors
    assert 8192 not in errors
    assert devices.computes(DEVICE)


FULL = """
import json, sys, threading, torch
from torch import nn
from workers.devices import computes, ran_out_of_memory

MEBIBYTE = 1 << 20
device = torch.device("cuda", 0)
computes(device)
said = []

def operations():
    a = torch.rand(256, 256, device=device)
    yield "matmul", lambda: a @ a
    yield "linear", lambda: nn.functional.linear(a, a, a[0])
    yield "convolution", lambda: nn.functional.conv2d(a.reshape(4, 16, 32, 32), torch.rand(8, 16, 3, 3, device=device))
    yield "eigenvalues", lambda: torch.linalg.eigvalsh(a @ a.T)
    yield "fft", lambda: torch.fft.rfft2(a)
    yield "svd", lambda: torch.linalg.svdvals(a)

def all_of_them():  # in a thread of its own, which has handles of its own
    try:
        for name, operation in operations():
            try:
                operation()
                torch.cuda.synchronize()
            except Exception as error:
                said.append([left, name, type(error).__name__, str(error).splitlines()[0], ran_out_of_memory(error)])
    except Exception as error:
        said.append([left, "inputs", type(error).__name__, str(error).splitlines()[0], ran_out_of_memory(error)])

filler = []
for chunk in (1024, 20):  # torch asks the driver for each by itself
    try:
        while True:
            filler.append(torch.empty(chunk * MEBIBYTE, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        pass
for left in range(0, 400, 20):
    thread = threading.Thread(target=all_of_them)
    thread.start()
    thread.join()
    del filler[-1]
    torch.cuda.empty_cache()
del filler
torch.cuda.empty_cache()
print(json.dumps({"said": said, "computes": computes(device)}))
"""


@only_on_a_gpu
def test_a_full_gpu_is_out_of_memory_however_its_libraries_say_so() -> None:
    """The libraries take memory behind torch's back, for their handles and kernels."""
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{json.dumps(found['said'], indent=1)}")
    assert found["said"], "the GPU was never full"
    assert [one for one in found["said"] if not one[-1]] == []
    assert found["computes"], "memory that ran out breaks nothing"


def test_a_worker_that_nobody_needs_gives_its_memory_back(context: Context) -> None:
    cache = _Warm.take(DEVICE, 1 << 30)
    context = replace(context, cache=cache)
    plan, checkpoint = trained(context)
    specs = (plan.closed_forms.stored_spec, plan.attack.stored_spec)
    assert all(isinstance(one, Succeeded) for one in executed(context, bundle(plan, *specs, checkpoint=checkpoint)))
    kept = 300 * MEBIBYTE
    cache.get("another network", lambda: (torch.empty(kept, dtype=torch.uint8, device=DEVICE), kept))
    devices.release(DEVICE)
    assert len(cache) > 1, "networks stay at hand between bundles"
    if not ON_CPU:
        assert torch.cuda.memory_reserved(DEVICE) < kept + ABOUT_NOTHING, "what no tensor uses does not stay"
    _Warm.leave(idle_seconds=0.0)
    until(lambda: len(cache) == 0)
    if not ON_CPU:
        until(lambda: torch.cuda.memory_reserved(DEVICE) < ABOUT_NOTHING)
        assert torch.cuda.memory_allocated(DEVICE) < ABOUT_NOTHING


@pytest.mark.parametrize("wrong", [False, True], ids=["done", "failed"])
@pytest.mark.usefixtures("limit")
def test_after_a_bundle_the_gpu_has_its_memory_back(
    context: Context, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """Through `run_bundle`, with what Ray would have said."""
    size = 8 * MEBIBYTE if ON_CPU else 1 << 30
    greedy = takes(size)

    def measured(*args: Any, **options: Any) -> Any:
        made = greedy(*args, **options)
        if wrong:
            raise RuntimeError("a bug")
        return made

    plan, checkpoint = trained(context)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setattr(tasks, "run_measure", measured)
    says: dict[str, Callable[[], object]] = {"get_gpu_ids": lambda: [] if ON_CPU else [visible]}
    says["get_runtime_context"] = lambda: SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**says))
    artifacts = str(context.data_dir.parent / "artifacts")
    settings = WorkerSettings(artifacts, context.data_dir, 0.0, idle_seconds=0.0, gpu_idle_seconds=0.0)
    of = bundle(plan, plan.closed_forms.stored_spec, checkpoint=checkpoint)
    [made] = answers([message for messages in run_bundle(of, settings) for message in messages])
    assert isinstance(made, Failed if wrong else Succeeded), made
    cache = _Warm.cache
    assert cache is not None
    until(lambda: len(cache) == 0)
    if not ON_CPU:
        assert torch.cuda.max_memory_allocated(DEVICE) >= size
        until(lambda: torch.cuda.memory_reserved(DEVICE) < ABOUT_NOTHING)


def gibibyte(device: torch.device) -> tuple[torch.Tensor, int]:
    return torch.empty(1 << 30, dtype=torch.uint8, device=device), 1 << 30


@only_on_a_gpu
@on_two
def test_a_process_that_moves_to_another_gpu_leaves_nothing_on_the_first(context: Context) -> None:
    made = []
    for device in (DEVICE, OTHER, DEVICE):
        torch.cuda.set_device(device)
        here = replace(context, device=device, cache=_Warm.take(device, 4 << 30))
        plan = planned()
        [one] = executed(here, bundle(plan, plan.train.stored_spec))
        assert isinstance(one, Succeeded), one
        made.append(one.outcome)
        left = OTHER if device == DEVICE else DEVICE
        assert torch.cuda.memory_reserved(left) < ABOUT_NOTHING
        here.cache.get("more", partial(gibibyte, device))
    first, other, again = made
    assert first.provenance["gpu_uuid"] == again.provenance["gpu_uuid"] != other.provenance["gpu_uuid"]
    assert first.artifacts == again.artifacts, "bit-equal on one GPU"
    _Warm.drop()


# --- processes of Ray ---


class Lab:
    """Real workers on this machine's GPU, and what they have said."""

    def __init__(self, port: int, home: Path, body: Callable[..., Iterator[list[Message]]]) -> None:
        from workers.pool import RayExecutor

        settings = Settings(home=home, epoch_state_seconds=0, ray_address="", ray_port=port)
        self.executor = RayExecutor(settings, body=body)
        self.artifacts = Artifacts(settings.artifacts)
        self.said: list[Message] = []
        self.until(lambda: self.executor.capacity().ready)

    def submit(self, *bundles: Bundle) -> None:
        for one in bundles:
            self.executor.submit(one)

    def until(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (found := what()):
            assert time.monotonic() < deadline, self.said
            self.said += self.executor.poll(0.1)
        return found

    def answers(self, of: Bundle) -> list[Succeeded | Failed | Lost]:
        names = [grant.task_id for grant in of.grants]
        self.until(lambda: sum(one.task_id in names for one in answers(self.said)) == len(names))
        return [one for one in answers(self.said) if one.task_id in names]

    def worker(self, of: Bundle) -> Started:
        """Where the bundle's first task is under way."""
        name = of.grants[0].task_id
        self.until(lambda: any(isinstance(one, Progress) and one.task_id == name for one in self.said))
        return next(one for one in self.said if isinstance(one, Started) and one.task_id == name and one.ready)

    def trained(self) -> tuple[JobPlan, ArtifactRef]:
        plan = planned()
        of = bundle(plan, plan.train.stored_spec)
        self.submit(of)
        [made] = self.answers(of)
        assert isinstance(made, Succeeded), made
        return plan, made.outcome.artifacts[0]


@pytest.fixture(scope="module")
def lab(ray_head: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    on_cpu, held_seconds = ON_CPU, HELD_SECONDS

    def body(bundle: Bundle, settings: WorkerSettings) -> Iterator[list[Message]]:
        """The worker's; a measure at scale 555 is a bug, one at 666 breaks the GPU, one at 777 takes most of it, and
        one at 444 comes to a GPU that does not compute.
        """
        from unittest import mock

        import torch

        from workers import devices, tasks, worker

        if bundle.grants[0].spec.get("scale") == 444:

            def unfit(device: torch.device) -> None:
                raise devices.DeviceUnfit(f"{device} cannot run a small convolution")

            devices.probe = unfit  # the process ends after this bundle
            worker._Warm.device = None
            vars(worker)["DEVICE_WAIT_SECONDS"] = held_seconds

        measure = tasks.run_measure

        def trouble(task: Any, *args: Any) -> Any:
            if task.scale == 666:
                if on_cpu:
                    devices.computes = lambda device: False
                    raise RuntimeError("an illegal memory access was encountered")
                held = torch.zeros(1024, device="cuda")
                said = {"shape": (1 << 40,), "typestr": "<f4", "data": (held.data_ptr(), False), "version": 2}
                beyond = torch.as_tensor(type("Beyond", (), {"__cuda_array_interface__": said})(), device="cuda")
                (beyond[1 << 39 : (1 << 39) + 1024] + 1).sum().item()
            if task.scale == 555:
                torch.rand(3, device="cpu" if on_cpu else "cuda") + torch.rand(4, device="cpu" if on_cpu else "cuda")
            if task.scale == 777:
                size = 1 << 46 if on_cpu else 6 * torch.cuda.get_device_properties(0).total_memory // 10
                torch.empty(size, dtype=torch.uint8, device="cpu" if on_cpu else "cuda")
            return measure(task, *args)

        with mock.patch.object(tasks, "run_measure", trouble):
            yield from worker.run_bundle(bundle, settings)

    lab = Lab(ray_head, tmp_path_factory.mktemp("home"), body)
    yield lab
    lab.executor.close()


def at_scale(plan: JobPlan, scale: float) -> dict[str, Any]:
    return {**plan.closed_forms.stored_spec, "scale": scale}


def test_two_workers_share_a_gpu_and_each_has_its_part_of_the_memory(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    long = planned(epochs=LONG)
    under_way = bundle(long, long.train.stored_spec, share=0.5)
    lab.submit(under_way)
    first = lab.worker(under_way)
    specs = [at_scale(plan, 777), plan.attack.stored_spec]
    beside = bundle(plan, *specs, checkpoint=checkpoint, share=0.5)
    lab.submit(beside)
    lost, attacked = lab.answers(beside)
    second = next(
        one for one in lab.said if isinstance(one, Started) and one.task_id == beside.grants[0].task_id and one.ready
    )
    assert first.pid != second.pid
    assert first.worker.split()[-1] == second.worker.split()[-1] == str(DEVICE)
    assert isinstance(lost, Lost), lost
    assert lost.reason == ("out_of_memory" if ON_CPU else "out_of_shared_memory"), lost.message
    assert isinstance(attacked, Succeeded), attacked
    assert attacked.outcome.provenance["device_share"] == (1.0 if ON_CPU else 0.5)
    seen = len(lab.said)
    lab.until(lambda: any(one.task_id == first.task_id and isinstance(one, Progress) for one in lab.said[seen:]))
    lab.executor.cancel(first.task_id, 1)
    lab.answers(under_way)


def test_on_half_a_gpu_beside_a_neighbour_a_training_learns_what_it_learns_alone(lab: Lab) -> None:
    """Up to rounding: cuDNN takes another plan where its workspace does not fit."""
    plan, long = planned("simple_cnn", epochs=3), planned("simple_cnn", epochs=LONG)
    neighbour = bundle(long, long.train.stored_spec, share=0.5)
    lab.submit(neighbour)
    beside_pid = lab.worker(neighbour).pid
    outcomes = []
    for share in (0.5, 1.0):
        of = bundle(plan, plan.train.stored_spec, share=share)
        lab.submit(of)
        [made] = lab.answers(of)
        assert isinstance(made, Succeeded), made
        outcomes.append(made.outcome)
        if share == 0.5:
            assert made.outcome.provenance["pid"] != beside_pid
            assert not [one for one in answers(lab.said) if one.task_id == neighbour.grants[0].task_id]
            lab.executor.cancel(neighbour.grants[0].task_id, 1)
            lab.answers(neighbour)
    shared, alone = outcomes
    assert shared.provenance["device_share"] == (1.0 if ON_CPU else 0.5)
    assert alone.provenance["device_share"] == 1.0
    weights = []
    for outcome in outcomes:
        with lab.artifacts.open(outcome.artifacts[0].digest) as file:
            weights.append(load(file.read()))
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-2, atol=1e-3)


def test_a_cancelled_training_leaves_its_worker_and_its_gpu_usable(lab: Lab) -> None:
    long = planned(epochs=LONG)
    of = bundle(long, long.train.stored_spec)
    lab.submit(of)
    before = lab.worker(of)
    lab.executor.cancel(of.grants[0].task_id, 1)
    [ended] = lab.answers(of)
    assert isinstance(ended, Lost)
    assert ended.reason == "cancelled"
    plan = planned(epochs=50)
    after = bundle(plan, plan.train.stored_spec)
    lab.submit(after)
    assert lab.worker(after).pid == before.pid
    [made] = lab.answers(after)
    assert isinstance(made, Succeeded), made


def test_a_gpu_that_an_error_broke_ends_the_process_and_the_rest_is_given_back(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    specs = [at_scale(plan, 666), plan.attack.stored_spec]
    of = bundle(plan, *specs, checkpoint=checkpoint)
    lab.submit(of)
    failed, back = lab.answers(of)
    assert isinstance(failed, Failed), failed
    assert "illegal memory access" in failed.message
    assert (back.task_id, getattr(back, "reason", "")) == (of.grants[1].task_id, "given_back")
    pid = next(one.pid for one in lab.said if isinstance(one, Started) and one.task_id == failed.task_id and one.pid)
    lab.until(lambda: not psutil.pid_exists(pid))
    again = bundle(plan, plan.attack.stored_spec, checkpoint=checkpoint)
    lab.submit(again)
    [made] = lab.answers(again)
    assert isinstance(made, Succeeded), made
    assert made.outcome.provenance["pid"] != pid


@only_on_a_gpu
def test_a_gpu_that_does_not_compute_is_kept_busy_for_a_while(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    lab.until(lambda: lab.executor.capacity().gpus >= 1)
    whole = lab.executor.capacity().gpus
    of = bundle(plan, at_scale(plan, 444), plan.attack.stored_spec, checkpoint=checkpoint)
    lab.submit(of)
    lost, back = lab.answers(of)
    assert isinstance(lost, Lost), lost
    assert (lost.reason, getattr(lost.fault, "owner", "")) == ("environment", "device"), lost
    assert (back.task_id, getattr(back, "reason", "")) == (of.grants[1].task_id, "given_back")
    assert lab.executor.capacity().gpus == whole - 1, "nothing is placed on it meanwhile"
    lab.until(lambda: lab.executor.capacity().gpus == whole)
    again = bundle(plan, plan.attack.stored_spec, checkpoint=checkpoint)
    lab.submit(again)
    [made] = lab.answers(again)
    assert isinstance(made, Succeeded), made


def test_an_error_that_leaves_the_gpu_as_it_was_leaves_the_process_too(lab: Lab) -> None:
    plan, checkpoint = lab.trained()
    of = bundle(plan, at_scale(plan, 555), plan.attack.stored_spec, checkpoint=checkpoint)
    lab.submit(of)
    failed, made = lab.answers(of)
    assert isinstance(failed, Failed), failed
    assert "must match the size of tensor" in failed.message
    assert isinstance(made, Succeeded), made
    again = bundle(plan, plan.attack.stored_spec, checkpoint=checkpoint)
    lab.submit(again)
    [after] = lab.answers(again)
    assert isinstance(after, Succeeded), after
    assert made.outcome.provenance["pid"] == after.outcome.provenance["pid"]
    assert made.outcome.numbers == after.outcome.numbers


# --- names ---

NAMED = """
import json, sys, time
from pathlib import Path
from service.model.executor import Bundle, Grant, Needs, Started, Succeeded
from service.specs.plan import plan_job
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from workers.head import running, use_driver_environment

home, gpus = Path(sys.argv[1]), float(sys.argv[2])
with running(cpus=1) as head:
    use_driver_environment(head.home, local=True)
    from workers.pool import RayExecutor

    executor = RayExecutor(Settings(home=home, ray_address="", ray_port=head.port))
    deadline = time.monotonic() + 120
    while not executor.capacity().ready and time.monotonic() < deadline:
        executor.poll(0.1)
    job = JobSpec(architecture="mlp", dataset="digits", attack="pgd_linf", samples=8, recipe={"epochs": 1})
    spec = plan_job(job, DatasetRef(name="digits")).train.stored_spec
    executor.submit(Bundle("b", (Grant("t", 1, "d" * 64, spec),), spec, needs=Needs(1.0, gpus)))
    said = []
    while not any(isinstance(one, Succeeded) for one in said) and time.monotonic() < deadline:
        said += executor.poll(0.1)
    executor.close()
worker = [one.worker for one in said if isinstance(one, Started) and one.ready][0]
print(json.dumps([worker.split()[-1], said[-1].outcome.provenance["gpu_uuid"]]))
"""


def uuid_of(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


SPELLINGS: dict[str, Callable[[], tuple[str | None, list[int]]]] = {
    "unset": lambda: (None, list(range(torch.cuda.device_count()))),
    "index": lambda: ("0", [0]),
    "uuid": lambda: (uuid_of(0), [0]),
    "permuted": lambda: ("1,0", [1, 0]),
    "permuted uuids": lambda: (f"{uuid_of(1)},{uuid_of(0)}", [1, 0]),
    "the second alone": lambda: ("1", [1]),
}
"""`CUDA_VISIBLE_DEVICES`, and the GPUs that it names, as torch counts all of them."""


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="counts all GPUs of the machine")
@pytest.mark.parametrize(
    "spelling",
    [pytest.param(name, marks=() if name in ("unset", "index", "uuid") else on_two) for name in SPELLINGS],
)
def test_a_worker_finds_its_gpu_however_it_is_named(spelling: str, tmp_path: Path) -> None:
    if ON_CPU and spelling != "unset":
        pytest.skip("says something of a GPU alone")
    visible, named = SPELLINGS[spelling]()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", NAMED, str(tmp_path), "0" if ON_CPU else "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    device, uuid = json.loads(done.stdout.splitlines()[-1])
    assert torch.device(device).type == DEVICE.type
    assert uuid == (None if ON_CPU else uuid_of(named[torch.device(device).index]))


# --- the doctor ---


def test_the_doctor_finds_nothing_wrong_with_this_machines_gpus(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["UNCANNY_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "workers.doctor"], capture_output=True, text=True, timeout=300, check=False,
        env=environment,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    [node] = report["nodes"]
    checks = {check.name.split(maxsplit=2)[-1]: check for check in cluster_checks(Settings(home=tmp_path), report)}
    print(f"\n{json.dumps({name: check.as_json() for name, check in checks.items()}, indent=1)}")
    assert node["torch_trouble"] == ""
    assert checks["gpus"].state == "ok", checks["gpus"]
    assert len(node["devices"]) == node["gpus"] == torch.cuda.device_count()
    for index, device in enumerate(node["devices"]):
        assert (device["fits"], device["trouble"]) == (True, "")
        assert device["uuid"] in {gpu["uuid"] for gpu in node["listed"]}
        assert checks[f"gpu {index}"].state in ("ok", "warn"), checks[f"gpu {index}"]
