"""What `pip install uncanny-bench` gives without extras: the client and the commands that ask, and no torch or Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
ASK = "import sys; from api.client import Client; print(sum(1 for _ in Client(sys.argv[1]).jobs()))"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of a new environment that has this project and nothing else."""
    where = tmp_path_factory.mktemp("small") / "environment"
    uv = os.environ.get("UV", "uv")  # which `uv run` says
    python = where / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(where)],
        [uv, "pip", "install", "--quiet", "--python", str(python), str(REPOSITORY)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    return where / "bin"


def run(small: Path, home: Path, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "UNCANNY_HOME": str(home), **environment}
    return subprocess.run(
        [str(small / command[0]), *command[1:]], capture_output=True, text=True, timeout=60, check=False, env=clean,
        cwd=home,
    )  # fmt: skip


def test_it_asks_a_service(small: Path, tmp_path: Path, server: Any) -> None:
    job = server.client.submit({"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 8})
    for command in (["jobs"], ["explain", job.id], ["sweeps"], ["results"]):
        done = run(small, tmp_path, "uncanny", *command, "--json", UNCANNY_URL=server.url)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) is not None
    asked = run(small, tmp_path, "python", "-c", ASK, server.url)
    assert int(asked.stdout) >= 1, asked.stderr


@pytest.mark.parametrize("command", ["serve", "api", "dispatch", "doctor", "gc"])
def test_what_needs_the_service_says_so(small: Path, tmp_path: Path, command: str) -> None:
    done = run(small, tmp_path, "uncanny", command)
    assert done.returncode == 1
    assert "this needs more than the client: install uncanny-bench with its extra `service`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_shell_completes_commands(small: Path, tmp_path: Path) -> None:
    typed = {"_UNCANNY_COMPLETE": "complete_bash", "COMP_WORDS": "uncanny res", "COMP_CWORD": "1"}
    done = run(small, tmp_path, "uncanny", **typed)
    assert done.stdout.split() == ["resume", "results"]
