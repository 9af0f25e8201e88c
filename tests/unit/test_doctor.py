"""What the doctor makes of what a cluster says of itself, and of room on a disk."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from service.operations.doctor import LEAST_BYTES, LOW_BYTES, Check, cluster_checks, room_check
from service.settings import Settings
from workers.doctor import listed_in

VERSIONS = {"python": "3.11.9", "ray": "2.55.0", "torch": "2.11.0"}
DEVICE = {
    "name": "H100", "uuid": "1b2c", "capability": "9.0", "fits": True, "total_bytes": 80 << 30, "free_bytes": 79 << 30,
    "trouble": "",
}  # fmt: skip
LISTED = {
    "uuid": "1b2c", "name": "H100", "capability": "9.0", "driver": "580.65.06", "compute_mode": "Default", "fits": True,
}  # fmt: skip
KERNEL_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 01:24:00 UTC 2025"
OLD = {"devices": [], "torch_trouble": "RuntimeError: The NVIDIA driver on your system is too old"}
NODE = {
    "name": "gpu1", "cpus": 16.0, "gpus": 2.0, "code_digest": "a", "versions": VERSIONS, "skew_seconds": 0.0,
    "devices": [DEVICE, {**DEVICE, "uuid": "77aa"}], "torch_trouble": "", "built_for": ["sm_80", "sm_90"],
    "listed": [LISTED, {**LISTED, "uuid": "77aa"}], "cuda": "13.2", "lacks_for_compile": [], "driver": "NVRM",
    "artifacts": "", "free_bytes": 1 << 40,
    "data": {"cifar10": {"state": "whole", "files": []}, "svhn": {"state": "absent", "files": []}},
}  # fmt: skip
REPORT = {"token": True, "seconds": 1.0, "code_digest": "a", "versions": VERSIONS, "nodes": [NODE]}


def checks(report: dict[str, Any]) -> dict[str, Check]:
    return {check.name: check for check in cluster_checks(Settings(ray_address="head:6379"), report)}


def test_a_sound_cluster_has_nothing_to_be_said_against_it() -> None:
    found = checks(REPORT)
    assert {check.state for check in found.values()} == {"ok"}
    assert not any(check.advice for check in found.values())
    assert "Ray has 2, torch sees 2 (H100, H100)" in found["node gpu1 gpus"].said
    assert found["node gpu1 data"].said == "cifar10 with the right checksums; downloaded when asked for: svhn"


@pytest.mark.parametrize(
    ("change", "name", "state", "said"),
    [
        ({"gpus": 0.0, "devices": []}, "gpus", "ok", "none: tasks run on its CPUs"),
        ({"devices": []}, "gpus", "fail", "Ray has 2, torch sees 0"),
        ({"gpus": 1.0}, "gpus", "warn", "Ray has 1, torch sees 2"),
        (OLD, "gpus", "fail", "driver 580.65.06: RuntimeError: The NVIDIA driver"),
        ({**OLD, "listed": [{**LISTED, "driver": "535.104.05"}]}, "gpus", "fail", "needs driver 580 or newer"),
        ({**OLD, "listed": [], "driver": KERNEL_MODULE}, "gpus", "fail", "needs driver 580 or newer"),
        ({**OLD, "listed": [{**LISTED, "fits": False}]}, "gpu 0", "fail", "H100, compute capability 9.0: torch has no"),
        ({"devices": [{**DEVICE, "trouble": "no kernel image"}]}, "gpu 0", "fail", "free: no kernel image"),
        ({"devices": [{**DEVICE, "trouble": "no", "fits": False}]}, "gpu 0", "fail", "is built for sm_80, sm_90"),
        ({"listed": [{**LISTED, "compute_mode": "Prohibited"}]}, "gpu 0", "fail", "compute mode is Prohibited"),
        ({"devices": [{**DEVICE, "free_bytes": 50 << 30}]}, "gpu 0", "warn", "50.0 GiB free of 80.0: others use it"),
        ({"lacks_for_compile": ["C++ compiler (g++)"]}, "compiler", "warn", "no C++ compiler (g++): `compile: true`"),
        ({"lacks_for_compile": ["gcc", "Python.h"]}, "compiler", "warn", "no gcc, no Python.h: `compile: true` fails"),
        ({"code_digest": "b"}, "", "fail", "its code is not this machine's"),
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "", "warn", "torch 2.12.0"),
        ({"error": "NodeDiedError"}, "", "fail", "NodeDiedError"),
        ({"skew_seconds": 7.5}, "clock", "warn", "7.5"),
        ({"artifacts": "PermissionError: /artifacts"}, "artifacts", "fail", "PermissionError"),
        ({"free_bytes": 1000}, "room", "fail", "0.0 GiB free"),
        ({"data": {"cifar10": {"state": "damaged", "files": ["/d/x"]}}}, "data cifar10", "fail", "checksums"),
    ],
)
def test_what_is_wrong_with_a_node_is_named(change: dict[str, Any], name: str, state: str, said: str) -> None:
    report = deepcopy(REPORT)
    report["nodes"][0].update(change)  # type: ignore[index]
    check = checks(report)[f"node gpu1 {name}".strip()]
    assert (check.state, said in check.said) == (state, True), check
    assert bool(check.advice) == (state != "ok")


@pytest.mark.parametrize(("share", "state"), [(1.0, "warn"), (0.5, "fail")])
def test_a_gpu_for_one_process_is_not_for_tasks_that_share_it_and_hardly_for_workers_that_stay(
    share: float, state: str
) -> None:
    report = deepcopy(REPORT)
    report["nodes"][0]["listed"][1]["compute_mode"] = "Exclusive_Process"  # type: ignore[index]
    found = cluster_checks(Settings(ray_address="head:6379", gpus_per_task=share), report)
    assert {check.name: check.state for check in found}["node gpu1 gpu 1"] == state


def test_a_cluster_that_is_not_there_or_open_or_empty() -> None:
    assert checks({"error": "nothing answers"})["ray"].state == "fail"
    assert checks({**REPORT, "token": False})["ray token"].state == "warn"
    assert checks({**REPORT, "nodes": []})["ray"].state == "fail"


def test_room_is_little_before_it_is_too_little() -> None:
    states = [room_check("room", free).state for free in (LOW_BYTES, LOW_BYTES - 1, LEAST_BYTES, LEAST_BYTES - 1)]
    assert states == ["ok", "warn", "warn", "fail"]


def test_settings_of_a_home_are_enough(tmp_path: Path) -> None:
    assert next(iter(cluster_checks(Settings(home=tmp_path), REPORT))).said.startswith("a local Ray: 1 node")


def test_gpus_whose_capability_the_driver_does_not_know_are_left_out() -> None:
    said = "GPU-1b2c, NVIDIA H100, 9.0, 580.65.06, Default\nGPU-77aa, NVIDIA H100, [N/A], 580.65.06, [N/A]\n\n"
    assert [gpu["uuid"] for gpu in listed_in(said)] == ["1b2c"]
    assert listed_in("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == []
