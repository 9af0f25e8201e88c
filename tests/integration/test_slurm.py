"""The Slurm job of the examples on real Ray nodes; `srun` and `scontrol` are stand-ins that know this machine alone."""

import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from accounts import reached_by_nobody
from processes import Lab, running_lab
from waiting import until

from service.processes import free_port
from service.store import Database
from service.store.tables import attempts, leases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "uncanny.sbatch"
LONG = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16, "recipe": {"epochs": 400}}
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@" --node-ip-address=127.0.0.1
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && printf '127.0.0.1\\n127.0.0.1\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on two CPUs of each node, whose temporary folder is everybody's."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    temporary = tempfile.mkdtemp(prefix="u-", dir="/tmp")
    os.chmod(temporary, 0o1777)
    yield {"PATH": path, "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "2", "RAY_TMPDIR": temporary}
    shutil.rmtree(temporary, ignore_errors=True)


def is_closed(slurm: dict[str, str], process: psutil.Process, nodes: int) -> None:
    """What the job's nodes have in the file system, while they are at work, is out of another account's reach."""
    folders = list(Path(slurm["RAY_TMPDIR"]).iterdir())
    assert len(folders) == nodes
    assert all(folder.name.startswith(f"ray-{slurm['SLURM_JOB_ID']}-") for folder in folders)
    assert {(folder.stat().st_uid, folder.stat().st_mode & 0o777) for folder in folders} == {(os.getuid(), 0o700)}
    places = [place for folder in folders for place in folder.rglob("*")]
    assert {"sockets", "logs", "runtime_resources", "raylet"} <= {place.name for place in places}
    assert any(place.is_dir() and place.stat().st_mode & 0o777 == 0o777 for place in places), "Ray opens them"
    listening = {Path(one.laddr) for one in sockets_of(process) if one.laddr.startswith("/")}
    assert {place.name for place in listening} >= {"raylet", "plasma_store"}
    assert listening <= set(places)
    if os.getuid() == 0:  # becoming another account takes root
        assert reached_by_nobody(places) == []


def sockets_of(process: psutil.Process) -> Iterator[Any]:
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            yield from member.net_connections("unix")


def capacity(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = lab.rows(leases)[0].status["capacity"]
    return found


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    home = tmp_path / "home"
    home.mkdir()
    with running_lab(None, home, lease_seconds=8.0) as lab:
        yield lab


def test_a_job_joins_a_head_and_its_tasks_are_preempted_at_its_end(lab: Lab, slurm: dict[str, str]) -> None:
    for name in ("node 1", "node 2"):
        lab.kill(name)
    until(lambda: capacity(lab)["cpus"] == 0)
    lab.start("slurm", "bash", str(SCRIPT), **slurm, SLURM_JOB_NUM_NODES="1")
    until(lambda: capacity(lab)["cpus"] == 2)
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 1})
    until(lambda: lab.training(1).resume_digest)
    is_closed(slurm, psutil.Process(lab.processes["slurm"].pid), nodes=1)
    lab.processes["slurm"].send_signal(signal.SIGTERM)
    until(lambda: capacity(lab)["cpus"] == 0)
    row = lab.training(1)
    assert (row.state, row.attempt) == ("running", 1), "what runs goes on until Slurm ends it"
    assert lab.processes["slurm"].poll() is None
    lab.kill("slurm")
    lab.start_worker("node 1")
    until(lambda: lab.settled(job.id), 200)
    row = lab.training(1)
    assert (row.state, row.errors, row.suspect_losses) == ("succeeded", 0, 0)
    assert [one.end for one in lab.rows(attempts, task_id=row.id)] == ["preempted", "succeeded"]
    assert row.detail["resumed_after_epoch"] > 0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Lab]:
    """A database, a token, and nothing that runs."""
    database = Database(f"sqlite:///{tmp_path / 'uncanny.db'}")
    database.upgrade()
    (tmp_path / "token").write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "UNCANNY_"))}
    environment |= {
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "UNCANNY_HOME": str(tmp_path),
        "UNCANNY_STOP_SECONDS": "5", "HEAD_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Lab(tmp_path, None, database, environment, listening)
    database.close()


def test_a_job_without_a_head_is_a_cluster_of_its_own(store: Lab, slurm: dict[str, str]) -> None:
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "127.0.0.1"}
    store.start("slurm", "bash", str(SCRIPT), **slurm, **nodes)
    process = store.processes["slurm"]
    family: list[psutil.Process] = []
    try:
        until(lambda: store.leader, 120)
        until(lambda: capacity(store)["ready"] and capacity(store)["cpus"] == 4, 120)
        is_closed(slurm, psutil.Process(process.pid), nodes=2)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (store.home / "slurm.log").read_text()
        assert store.leader == "", "the dispatcher has left in peace"
    finally:
        for member in family or psutil.Process(process.pid).children(recursive=True):
            if member.is_running():
                member.kill()  # as Slurm does
        process.kill()
        process.wait()
