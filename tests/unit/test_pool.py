"""What the pool makes of a cluster, of Ray's errors and of a GPU's memory, told to it as Ray and CUDA tell it."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Capacity, Failed, Fault, Grant, Lost, Needs, Started
from service.model.ledger import Ledger
from service.settings import Settings
from workers import cluster, devices, dispatch, pool, run
from workers.context import Context
from workers.revision import identity

GIGABYTE = 1 << 30


def node(name: str, *, alive: bool = True, reason: int = 0, **resources: float) -> dict[str, Any]:
    own = {"node:127.0.0.1": 1.0, "object_store_memory": 1e9}
    return {"NodeID": name, "Alive": alive, "DeathReason": reason, "Resources": {**own, **resources}}


@pytest.fixture
def ray_has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def has(*nodes: dict[str, Any], draining: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))
        monkeypatch.setattr(cluster, "state", SimpleNamespace(get_draining_nodes=lambda: dict.fromkeys(draining, 0)))

    return has


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pool.RayExecutor:
    """One whose thread never connects to a Ray."""
    monkeypatch.setattr(pool.RayExecutor, "_hold_ray", lambda self: None)
    return pool.RayExecutor(Settings(home=tmp_path, ray_address="127.0.0.1:1"))


class TestNodes:
    def test_those_that_take_work(self, ray_has: Callable[..., None]) -> None:
        ray_has(node("head", memory=1e9), node("a", CPU=4, GPU=1), node("b", alive=False, CPU=4))
        found = cluster.nodes()
        assert found.resources == {"a": {"CPU": 4, "GPU": 1}}
        assert (found.dead, found.preempted) == ({"b"}, set())

    def test_one_that_is_drained_takes_no_more_work_and_its_tasks_were_preempted(
        self, ray_has: Callable[..., None]
    ) -> None:
        ray_has(node("a", CPU=4), node("b", CPU=4), draining=("b",))
        found = cluster.nodes()
        assert (set(found.resources), found.dead, found.preempted) == ({"a"}, set(), {"b"})

    def test_one_that_was_taken_away_was_preempted_and_one_that_crashed_was_not(
        self, ray_has: Callable[..., None]
    ) -> None:
        ray_has(node("a", alive=False, reason=cluster.PREEMPTED), node("b", alive=False, reason=1))
        found = cluster.nodes()
        assert (found.dead, found.preempted) == ({"a", "b"}, {"a"})


class TestLosses:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OutOfMemoryError("the node ran low on memory"), "out_of_memory"),  # type: ignore[no-untyped-call]
            (WorkerCrashedError(), "worker_died"),
            (NodeDiedError("gone"), "node_died"),  # type: ignore[no-untyped-call]
            (LocalRayletDiedError(), "node_died"),
            (ObjectLostError("ab" * 28, None, ""), "node_died"),
            (GetTimeoutError("too long"), "executor_lost"),
        ],
    )
    def test_of_a_bundle_by_rays_error(self, error: RayError, reason: str) -> None:
        assert pool._reason(error) == reason

    def test_a_worker_that_died_with_its_node_is_told_apart_from_one_that_crashed(
        self, executor: pool.RayExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray says of both that the worker crashed; of the node it knows a little later."""
        seen = cluster.Nodes({}, {"died"}, set())
        monkeypatch.setattr(pool, "nodes", lambda: seen)
        monkeypatch.setattr(executor, "_ready", lambda _: [])
        executor._preempted = {"preempted"}
        for place in ("died", "preempted", "lives"):
            bundle = Bundle(place, (Grant(place, 1, "d", {"kind": "train"}),), {})
            running = pool._Running(Ledger(bundle), None, act_at=0.0, node=place, crash="it crashed")
            executor._bundles[place] = running
        lost = {message.task_id: message for message in executor.poll(0.0)}
        assert {name: one.reason for name, one in lost.items() if isinstance(one, Lost)} == {
            "died": "node_died",
            "preempted": "preempted",
            "lives": "worker_died",
        }

    @pytest.mark.parametrize(("ready", "reason"), [(False, "environment"), (True, "worker_died")])
    def test_a_worker_that_dies_before_it_is_ready_is_the_nodes_fault(
        self, executor: pool.RayExecutor, monkeypatch: pytest.MonkeyPatch, ready: bool, reason: str
    ) -> None:
        bundle = Bundle("b", tuple(Grant(name, 1, "d", {"kind": "measure"}) for name in "ab"), {})
        executor._bundles["b"] = pool._Running(Ledger(bundle), iter(["started"]))
        monkeypatch.setattr(ray, "get", lambda _: [Started("a", 1, "gpu7 pid 3, starting", "n7", ready)])
        executor._read("b")
        lost, rest = executor._end("b", "worker_died", "it crashed")
        assert isinstance(lost, Lost)
        assert lost.reason == reason
        assert lost.fault == (None if ready else Fault("node", "gpu7", "n7"))
        assert isinstance(rest, Lost)
        assert (rest.reason, rest.fault) == ("given_back", None)

    def test_a_body_that_cannot_even_begin_is_no_tasks_fault(
        self, executor: pool.RayExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executor._checks._fit = {"n1"}
        executor._bundles["b"] = pool._Running(
            Ledger(Bundle("b", (Grant("a", 1, "d", {}),), {})), iter(["the body is not there"])
        )

        def fails(_: object) -> None:
            missing = ModuleNotFoundError("No module named 'service'")
            raise RayTaskError("run_bundle", "Traceback", missing)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(ray, "get", fails)
        [lost] = executor._read("b")
        assert isinstance(lost, Lost)
        assert (lost.reason, lost.fault) == ("environment", Fault("node", "a node of the cluster", ""))
        assert executor._checks._fit == set(), "all nodes are asked again"

    @pytest.mark.parametrize(
        ("device", "share", "others_bytes", "reason"),
        [
            ("cpu", 1.0, 0, "out_of_memory"),
            ("cuda:0", 1.0, 0, "out_of_memory"),
            ("cuda:0", 0.25, 0, "out_of_shared_memory"),
            ("cuda:0", 1.0, 30 * GIGABYTE, "out_of_shared_memory"),
        ],
    )
    def test_of_memory_that_others_may_have_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, share: float, others_bytes: int, reason: str
    ) -> None:
        """A neighbour on a GPU is not to answer for what another one has taken."""
        own, total = 40 * GIGABYTE, 80 * GIGABYTE
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - own - others_bytes, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: own)

        def runs_out(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(run, "run", runs_out)
        monkeypatch.setattr(devices, "computes", lambda _: True)
        context = Context(Artifacts(str(tmp_path)), tmp_path, torch.device(device), device_share=share)
        answer, broken = run._answer(
            Grant("t", 1, "d", {"kind": "attack"}), Bundle("b", (), {}), context, lambda _: None, threading.Event()
        )
        assert isinstance(answer, Lost)
        assert (answer.reason, broken) == (reason, False)


class TestHeldDevices:
    """A worker that cannot use its GPU keeps it, so that the next bundle goes to another."""

    def test_what_is_held_is_no_capacity(self, executor: pool.RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        nodes = ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0})
        executor._capacity = Capacity(True, 16.0, 4.0, nodes, ("n1", "n2"))
        bundle = Bundle("b", (Grant("a", 1, "d", {}),), {}, needs=Needs(1.0, 1.0))
        fault = Fault("device", "cuda:1 of gpu7", "n2")
        said = [Lost("a", 1, "environment", "no kernel image is available", fault)]
        executor._bundles["b"] = pool._Running(Ledger(bundle), iter(["its answer"]), needs=bundle.needs)
        monkeypatch.setattr(ray, "get", lambda _: said)
        assert executor.capacity().gpus == 4.0
        assert executor._read("b") == said
        left = executor.capacity()
        assert (left.cpus, left.gpus) == (15.0, 3.0)
        assert left.nodes == ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 7.0, "GPU": 1.0})
        assert executor._end("b", "worker_died", "its worker ended") == []
        assert executor.capacity().gpus == 4.0

    def test_one_whose_node_is_gone_takes_nothing_from_the_others(self) -> None:
        capacity = Capacity(True, 8.0, 2.0, ({"CPU": 8.0, "GPU": 2.0},), ("n1",))
        assert pool.without(capacity, [("n9", Needs(1.0, 1.0))]) == capacity


class TestNeeds:
    def test_as_ray_takes_them(self) -> None:
        needs = Needs(2.0, 0.5, 3 * GIGABYTE, "A100", {"fast_disk": 1.0})
        assert pool._options(needs) == {
            "num_cpus": 2.0, "num_gpus": 0.5, "memory": 3 * GIGABYTE, "accelerator_type": "A100",
            "resources": {"fast_disk": 1.0},
        }  # fmt: skip
        assert pool._options(Needs()) == {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {}}
        kept_away = pool._options(Needs(), {"b", "a"})["label_selector"]
        assert kept_away == {"ray.io/node-id": "!in(a,b)"}

    def test_what_ray_refuses_fails_its_tasks_with_a_sentence(self, executor: pool.RayExecutor) -> None:
        executor._capacity = Capacity(True, 8.0, 0.0)
        grants = tuple(Grant(name, 1, "d", {"kind": "measure"}) for name in "ab")
        executor.submit(Bundle("b", grants, {}, needs=Needs(custom={"CPU": 1.0})))
        failed = executor._lost
        assert [type(one) for one in failed] == [Failed, Failed]
        assert all("UNCANNY_RESOURCES" in one.message for one in failed if isinstance(one, Failed))
        assert executor._bundles == {}


class TestCode:
    def test_a_node_of_other_code_gets_no_work_and_stops_no_other(
        self, executor: pool.RayExecutor, ray_has: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = "a" * 56, "b" * 56
        ray_has(node(one, CPU=4), node(two, CPU=4))
        other = {**identity(), "code": "0" * 64}
        there = {one: other, two: other}
        now = 100.0
        executor._checks = cluster.NodeChecks(lambda: now)
        asked: list[str] = []

        class Probe:
            def options(self, *, scheduling_strategy: Any) -> "Probe":
                asked.append(scheduling_strategy.node_id)
                return self

            def remote(self) -> dict[str, str | None]:
                return there[asked[-1]]

        monkeypatch.setattr(ray, "remote", lambda **_: lambda _: Probe())
        monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
        with pytest.raises(cluster.OtherCode, match=r"node a{56} has other code than this dispatcher"):
            executor._look()
        there[one] = identity()
        now += cluster.RETRY_SECONDS
        executor._capacity = capacity = executor._look()
        assert (capacity.ready, capacity.cpus, capacity.names) == (True, 4.0, (one,))
        assert list(capacity.unfit) == [two]
        assert f"node {two} has other code" in capacity.unfit[two]
        assert asked == [one, two, one, two]
        executor._look()
        assert asked == [one, two, one, two], "each node once; one that is not fit after a while again"
        there[two] = identity()
        now += 2 * cluster.RETRY_SECONDS
        assert executor._look() == Capacity(True, 8.0, 0.0, ({"CPU": 4}, {"CPU": 4}), (one, two))
        assert asked[4:] == [two]
        executor._checks.forget()
        executor._look()
        assert asked[5:] == [one, two], "after a failure that the first answer did not show"

    def test_nor_does_one_that_starts_no_worker(
        self, executor: pool.RayExecutor, ray_has: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ray_has(node("a" * 56, CPU=4))
        cancelled: list[str] = []

        class Probe:
            def options(self, *, scheduling_strategy: Any) -> "Probe":
                return self

            def remote(self) -> str:
                return "probe"

        def wait_in_vain(answer: str, timeout: float) -> None:
            raise GetTimeoutError

        monkeypatch.setattr(ray, "remote", lambda **_: lambda _: Probe())
        monkeypatch.setattr(ray, "get", wait_in_vain)
        monkeypatch.setattr(ray, "cancel", lambda probe, force: cancelled.append(probe))
        with pytest.raises(cluster.NoWorker, match=r"node a{56} starts no worker within 60 s"):
            executor._look()
        assert cancelled == ["probe"]


class TestSignals:
    def test_two_at_once_are_one_and_a_later_one_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A service manager signals every process of the service, and the supervisor then its dispatcher again."""
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {}
        ended: list[int] = []
        now = 100.0
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        monkeypatch.setattr(os, "_exit", ended.append)
        monkeypatch.setattr(time, "monotonic", lambda: now)
        stop = threading.Event()
        dispatch._stop_on_signals(stop)
        for _ in range(2):
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert stop.is_set()
        assert ended == []
        now += 5
        handlers[signal.SIGINT](signal.SIGINT, None)
        assert ended == [130]
