"""What a worker process finds out and keeps, without a Ray to run in."""

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import psutil
import pytest
import ray
import torch
from waiting import until

from service.interrupt import interrupt
from service.model.environment import DEVICE_WAIT_SECONDS
from service.model.executor import Bundle, Failed, Fault, Grant, Lost, Message, Needs
from workers import devices, run, worker
from workers.context import Cache, Context
from workers.worker import (
    DELIVERY_SECONDS,
    WorkerSettings,
    _prepared,
    _Warm,
    device_of,
    import_undisturbed,
    run_bundle,
    unprepared,
)

CPU = torch.device("cpu")
RELEASE = devices.release


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As after an illegal memory access: every call of the driver raises. What was asked of it."""
    asked: list[str] = []

    def raises() -> NoReturn:
        asked.append("empty_cache")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    return asked


@pytest.mark.parametrize(
    ("gpu_ids", "visible", "device"),
    [
        ([], None, "cpu"),
        ([], "0,1", "cpu"),
        ([3], None, "cuda:3"),
        (["3"], "2,3", "cuda:1"),
        (["GPU-b"], "GPU-a,GPU-b", "cuda:1"),
    ],
)
def test_torch_counts_the_visible_devices_and_ray_names_them(
    gpu_ids: list[int] | list[str], visible: str | None, device: str
) -> None:
    assert device_of(gpu_ids, visible) == device


def test_what_a_worker_keeps_is_dropped_when_no_bundle_comes() -> None:
    cache = _Warm.take(CPU, 1000)
    cache.get("network", lambda: ("weights", 10))
    _Warm.leave(idle_seconds=60.0)
    assert _Warm.take(CPU, 1000) is cache
    assert len(cache) == 1
    _Warm.leave(idle_seconds=0.02)
    until(lambda: len(cache) == 0)


def test_a_worker_without_a_temporary_folder_cannot_get_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a task has begun, so that it is the node's fault."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    settings = WorkerSettings(str(tmp_path), tmp_path, 5.0)
    with pytest.raises(FileNotFoundError, match="No usable temporary directory"):
        _prepared(Bundle("b", (), {}), settings, "cpu", "n7")


def test_another_size_of_cache_is_another_cache() -> None:
    sizes = (1000, 2000)
    caches: list[Cache] = []
    for size in sizes:
        caches.append(_Warm.take(CPU, size))
        _Warm.leave(idle_seconds=0.0)
    assert [cache.capacity_bytes for cache in caches] == [*sizes]


class TestMoves:
    """From one GPU to another: what was kept on the first is dropped, and the second is tried before it gets work."""

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        seen: list[str] = []
        monkeypatch.setattr(devices, "release", lambda device: seen.append(f"released {device}"))
        monkeypatch.setattr(devices, "probe", lambda device: seen.append(f"probed {device}"))
        monkeypatch.setattr(_Warm, "cache", None)
        monkeypatch.setattr(_Warm, "device", None)
        return seen

    def test_it_leaves_nothing_on_the_first(self, seen: list[str]) -> None:
        cache = _Warm.take(torch.device("cuda:0"), 1000)
        cache.get("network", lambda: ("weights", 10))
        assert _Warm.take(torch.device("cuda:0"), 1000) is cache
        assert seen == ["probed cuda:0"], "once"
        other = _Warm.take(torch.device("cuda:1"), 1000)
        assert (len(cache), len(other)) == (0, 0)
        assert seen == ["probed cuda:0", "released cuda:0", "probed cuda:1"]

    def test_one_that_does_not_compute_is_tried_again(self, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def unfit(device: torch.device) -> None:
            seen.append("unfit")
            raise devices.DeviceUnfit("no kernel image is available")

        monkeypatch.setattr(devices, "probe", unfit)
        for _ in range(2):
            with pytest.raises(devices.DeviceUnfit):
                _Warm.take(torch.device("cuda:0"), 1000)
        assert seen == ["unfit", "unfit"]

    def test_what_is_broken_on_the_first_does_not_count_against_the_second(
        self, seen: list[str], broken: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(devices, "release", RELEASE)
        cache = _Warm.take(torch.device("cuda:0"), 1000)
        cache.get("network", lambda: ("weights", 10))
        assert len(_Warm.take(torch.device("cuda:1"), 1000)) == len(cache) == 0
        assert (seen, broken) == (["probed cuda:0", "probed cuda:1"], ["empty_cache"])

    def test_a_cpu_is_not_tried(self, seen: list[str]) -> None:
        _Warm.take(CPU, 1000)
        assert seen == []


class TestBundle:
    """`run_bundle` on a GPU that Ray names."""

    GRANTS = tuple(Grant(task, 1, "d", {}) for task in "abc")

    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[Message]]]:
        """What a bundle says until its process ends."""
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n7"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name in ("cache", "device", "timer"):
            monkeypatch.setattr(_Warm, name, None)

        def until_exit() -> list[Message]:
            messages: list[Message] = []
            batches = run_bundle(Bundle("b", self.GRANTS, {}), WorkerSettings(str(tmp_path), tmp_path, 5.0))
            with pytest.raises(SystemExit) as exited:
                messages.extend(chain.from_iterable(batches))
            assert exited.value.code == 1
            return messages

        yield until_exit
        if _Warm.timer is not None:
            _Warm.timer.cancel()

    def test_a_process_whose_gpu_broke_ends(
        self, said: Callable[[], list[Message]], broken: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the driver says when its memory is given back."""
        failed = Failed("a", 1, "error", "an illegal memory access was encountered")

        def batches(_bundle: Bundle, _context: Context) -> Iterator[list[Message]]:
            yield [failed]
            raise run.DeviceBroken("the GPU gave up in this process; it needs a new one")

        monkeypatch.setattr(worker, "_prepared", lambda *_: SimpleNamespace(device=torch.device("cuda:0")))
        monkeypatch.setattr(run, "batches", batches)
        assert said() == [failed]
        assert broken == ["empty_cache"]

    @pytest.mark.parametrize("gpus", [[0], []], ids=["a GPU", "none"])
    def test_a_process_whose_gpu_is_unfit_answers_and_keeps_it_busy_for_a_while(
        self, said: Callable[[], list[Message]], monkeypatch: pytest.MonkeyPatch, gpus: list[int]
    ) -> None:
        def unfit(*_: object) -> NoReturn:
            raise devices.DeviceUnfit("no kernel image is available")

        slept: list[float] = []
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
        monkeypatch.setattr(worker, "_prepared", unfit)
        monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=slept.append))
        lost, *rest = said()
        assert isinstance(lost, Lost)
        assert (lost.task_id, lost.reason) == ("a", "environment")
        assert lost.fault is not None
        assert (lost.fault.owner, lost.fault.node) == ("device" if gpus else "node", "n7")
        assert "no kernel image is available" in lost.message
        assert [(one.task_id, getattr(one, "reason", "")) for one in rest] == [("b", "given_back"), ("c", "given_back")]
        assert slept == [DEVICE_WAIT_SECONDS if gpus else DELIVERY_SECONDS]


def test_a_worker_takes_as_many_images_at_a_time_as_its_device_has_memory_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of = Bundle("b", (Grant("a", 1, "d", {}),), {}, needs=Needs(cpus=2.0, gpus=0.0))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(devices, "batch_images", lambda device, share: 512 if (device, share) == (CPU, 2.0) else 0)
    assert worker._prepared(of, WorkerSettings(str(tmp_path), tmp_path, 5.0), "cpu", "n7").batch_images == 512


INTERRUPTED = """
import signal, sys
from workers.worker import import_undisturbed

signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    import_undisturbed("workers.run")
except KeyboardInterrupt:
    print("torch" in sys.modules and hasattr(sys.modules["torch"], "nn"))
import_undisturbed("workers.run")
import torch
print(float(torch.ones(2).sum()))
"""


def test_a_cancel_while_torch_is_imported_does_not_break_the_process_for_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "2.0"], done.stderr


def test_an_import_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_cuda.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="needs_cuda cannot be imported: OSError: libcudart"):
        import_undisturbed("needs_cuda")


@pytest.mark.parametrize(("device", "owner", "name"), [("node", "node", ""), ("cuda:1", "device", "cuda:1 of ")])
def test_a_worker_that_does_not_get_ready_loses_one_attempt_and_gives_back_the_rest(
    device: str, owner: str, name: str
) -> None:
    grants = tuple(Grant(task, 1, "d", {}) for task in "abc")
    lost, *rest = unprepared(Bundle("b", grants, {}), device, "n7", RuntimeError("it does not wake up"))
    assert isinstance(lost, Lost)
    assert lost.reason == "environment"
    assert lost.fault == Fault(owner, f"{name}{socket.gethostname()}", "n7")  # type: ignore[arg-type]
    assert "it does not wake up" in lost.message
    assert [getattr(one, "reason", "") for one in rest] == ["given_back"] * 2


def test_nobody_is_interrupted_within_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_once.py").write_text("import time\nfor _ in range(50):\n    time.sleep(0.01)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    ends: list[str] = []

    def work() -> None:
        try:
            import imported_once  # type: ignore[import-not-found]

            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            ends.append("whole" if imported_once.whole else "half")

    thread = threading.Thread(target=work)
    thread.start()

    def has_ended() -> bool:
        interrupt(thread)
        return not thread.is_alive()

    until(has_ended)
    assert ends == ["whole"]


def test_who_starts_another_thread_is_not_interrupted_meanwhile() -> None:
    """Else the exception kills the new thread, and who started it waits for ever."""
    ran = started = 0
    over = threading.Event()

    def count() -> None:
        nonlocal ran
        ran += 1

    def work() -> None:
        nonlocal started
        while not over.is_set():
            started += 1
            with suppress(KeyboardInterrupt):
                child = threading.Thread(target=count, daemon=True)
                child.start()
                child.join()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        interrupt(thread)
        time.sleep(0.0005)
    over.set()
    thread.join(10)
    assert not thread.is_alive()
    assert ran >= started - 1


SIBLING = "import sys; from workers.worker import end_frozen; print(end_frozen(int(sys.argv[1])))"


def test_a_worker_that_is_frozen_is_ended_by_one_of_its_node_and_no_other_process_is() -> None:
    """Workers of a node are children of one process, here this one."""

    def is_ended(pid: int) -> bool:
        """What a sibling of this process's children says."""
        command = [sys.executable, "-c", SIBLING, str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"

    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        child = psutil.Process(int(worker.stdout.readline()))
        child.suspend()
        try:
            assert not is_ended(child.pid), "it is none of the node's workers"
            assert not is_ended(worker.pid), "it is not frozen"
            worker.send_signal(signal.SIGSTOP)
            until(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
            assert is_ended(worker.pid)
            assert worker.wait(30) == -signal.SIGKILL
            assert not is_ended(worker.pid), "it is gone"
        finally:
            child.kill()
            worker.kill()
