"""Row 11: how soon `uncanny serve` accepts a job and runs it, beside Ray's own start; its memory at rest."""

import os
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
import waiting
from benchmarks.serving import wait_until_it_answers

RAY_ALONE = (
    "import ray, time; started = time.perf_counter(); ray.init(address='local', include_dashboard=False, "
    "configure_logging=False, log_to_driver=False); print(time.perf_counter() - started)"
)
JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20, "recipe": {"epochs": 1}}
PATIENCE_SECONDS = 180
MB = 1 << 20


@contextmanager
def service(home: Path) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "api.cli", "serve", "--home", str(home), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield http, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def until(http: httpx.Client, path: str, reached: Any) -> None:
    waiting.until(lambda: reached(http.get(path).raise_for_status().json()), PATIENCE_SECONDS)


def proportional_bytes(process: psutil.Process) -> int:
    """Its memory, what it shares with others in equal parts."""
    return int(process.memory_full_info().pss)


def test_starting(table: Any, tmp_path: Path) -> None:
    seconds: dict[str, list[float]] = {"ray.init alone": [], "serve: job accepted": [], "serve: first task runs": []}
    environment = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    for number in range(3):
        alone = subprocess.run(
            [sys.executable, "-c", RAY_ALONE], env=environment, check=True, capture_output=True, text=True
        )
        seconds["ray.init alone"].append(float(alone.stdout.split()[-1]))
        started = time.perf_counter()
        with service(tmp_path / str(number)) as (http, _):
            wait_until_it_answers(http)
            job = http.post("/v1/jobs", json=JOB).raise_for_status().json()["id"]
            seconds["serve: job accepted"].append(time.perf_counter() - started)
            until(http, f"/v1/jobs/{job}", lambda found: found["state"] not in ("queued",))
            seconds["serve: first task runs"].append(time.perf_counter() - started)
    goals = {"serve: job accepted": 3.0, "serve: first task runs": sorted(seconds["ray.init alone"])[1] + 8}
    table.tell("11", "start of the service, SQLite", seconds, goals=goals, share=0.5)


def test_memory_at_rest(table: Any, tmp_path: Path) -> None:
    with service(tmp_path) as (http, process):
        wait_until_it_answers(http)
        until(http, "/v1/cluster", lambda found: found["status"].get("capacity", {}).get("ready"))
        family = [process, *process.children(recursive=True)]
        [api] = [one for one in family if "api.serve.server" in one.cmdline()]
        own, every = api.memory_info().rss / MB, sum(map(proportional_bytes, family)) / MB
    table.write(
        f"\nRow 11: memory at rest: API {own:.0f} MB (goal 120), the {len(family)} processes {every:.0f} MB (goal 900)"
    )
