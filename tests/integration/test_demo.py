"""`uncanny demo` as a new user runs it: HTTP, SQL, Ray, torch, all real."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console

from api.cli.demo import SWEEP, _table

pytestmark = pytest.mark.slow

NORMS = ("l2", "linf")
SCALES = ["0.25", "0.5", "1", "2.5", "5", "10", "50"]


@contextmanager
def demo_under_way(home: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "api.cli", "demo", "--home", str(home), "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNCANNY_", "RAY_"))}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()


def demo(home: Path, *options: str) -> Any:
    with demo_under_way(home, *options) as process:
        stdout, stderr = process.communicate(timeout=280)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def left_running(home: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_first_run_computes_everything(home: Path) -> None:
    done = demo(home, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sweep"]["state"] == "succeeded"
    assert (found["accepted"]["jobs"], found["accepted"]["to_compute"]["train"]) == (28, 2)
    rows = {(row["architecture"], row["scale"], row["attack"]["norm"]): row for row in found["results"]}
    assert len(rows) == 28
    for architecture in ("simple_cnn", "mlp"):
        for norm in ("l2", "linf"):
            at_one, at_fifty = (rows[architecture, scale, norm] for scale in (1, 50))
            assert at_one["clean_accuracy"] > 0.9
            assert 0.1 < at_one["robust_accuracy"] < at_one["clean_accuracy"] - 0.2
            assert at_one["masked_fraction"] < 0.05
            assert at_fifty["clean_accuracy"] == at_one["clean_accuracy"]
            assert at_fifty["robust_accuracy"] > at_one["robust_accuracy"] + 0.1
            assert at_fifty["masked_fraction"] > 0.2
            assert at_fifty["zero_gradient_fraction"] > 0.5
            assert at_fifty["verdict"] == "invalid"
            assert at_fifty["log_relative_sharpness_median"] < at_one["log_relative_sharpness_median"]
    assert left_running(home) == []


def test_the_second_run_is_at_once_and_says_so(home: Path) -> None:
    began = time.monotonic()
    done = demo(home)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert "s, the start of the service included, from the store without starting Ray" in done.stdout
    assert (home / "logs" / "head.log").read_text().count("Ray runtime started") == 1  # by the first run
    assert "2 trainings" in done.stdout
    for architecture in ("simple_cnn", "mlp"):
        table = done.stdout.partition(f"{architecture} on digits")[2].splitlines()[4:11]
        assert [line.split()[0] for line in table] == SCALES
        assert all(line.split()[-1] in ("trusted", "suspect", "invalid") for line in table)
    assert "/docs" in done.stdout
    assert "uncanny serve" in done.stdout


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    row = {"architecture": "mlp", "clean_accuracy": 1.0, "robust_accuracy": 1.0, "zero_gradient_fraction": 1.0}
    row |= {"log_relative_sharpness_median": -123.45, "masked_fraction": 1.0, "verdict": "trusted"}
    rows = [{**row, "scale": scale, "attack": {"norm": norm}} for scale in SWEEP["grid"]["scale"] for norm in NORMS]
    lines = {}
    for width in (80, 100, 160):
        console = Console(file=io.StringIO(), width=width)
        console.print(_table("mlp", rows))
        lines[width] = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines[80] == lines[100] == lines[160]
    assert len(lines[80]) == 1 + 3 + len(SCALES)
    header = " ".join(lines[80][1:4]).split()
    assert sorted({word for word in header if len(word) > 1}) == sorted(
        ["clean", "grad.", "l2", "linf", "log", "masked", "median", "robust", "scale", "sharpness", "verdict", "zero"]
    )


def test_kept_it_stays_up_until_ctrl_c_and_serves_another_demo_too(home: Path) -> None:
    with demo_under_way(home, "--keep") as kept:
        assert kept.stdout is not None
        said = next(line for line in kept.stdout if "Documentation of the API" in line)
        url = said.split()[-1]
        another = demo(home)
        assert another.returncode == 0, another.stderr
        assert f"Using the service that runs at {url.removesuffix('/docs')}" in another.stderr
        assert httpx.get(url).status_code == 200, "the other demo has left it alone"
        kept.send_signal(signal.SIGINT)
        _, stderr = kept.communicate(timeout=180)
        assert (kept.returncode, "Ctrl-C stops it" in stderr) == (0, True), stderr
    assert left_running(home) == []


def test_what_keeps_it_from_starting_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "api.cli", "demo", "--home", str(tmp_path)]
        command += ["--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "another --port" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
