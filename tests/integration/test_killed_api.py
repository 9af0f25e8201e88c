"""100 clients submit with keys while the API's process is killed again and again: each key is one job, and answered."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from history_checks import violations
from sqlalchemy import select
from store_lab import Lab
from waiting import until

from api.binding import listen
from api.client import Client
from service.processes import die_with_parent
from service.settings import Settings
from service.store import Database, tables

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
CLIENTS, KILL_SECONDS, PATIENCE_SECONDS = 100, 5.0, 300.0
SECONDS, KILLS = 60.0, 8  # a busy machine takes longer, because the API must answer before it is killed


def start_api(settings: Settings, listening: socket.socket) -> "subprocess.Popen[bytes]":
    log = (settings.home / "api.log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "api.serve.server", "--fd", str(listening.fileno())], stdout=log, stderr=log,
            env={**os.environ, **settings.environment()}, pass_fds=[listening.fileno()], preexec_fn=die_with_parent(),
        )  # fmt: skip


def keep_killing(settings: Settings, listening: socket.socket, url: str, clients: list[Future[float]]) -> int:
    """Kill the API 5 s after it answers, and start it again, for a minute; the last one lives. Returns the kills.

    It ends where a client has ended before its time.
    """
    began, kills = time.monotonic(), 0
    while True:
        process = start_api(settings, listening)
        until(lambda: answers(url))
        over = time.monotonic() - began > SECONDS and kills >= KILLS
        if over or any(client.done() for client in clients):
            return kills
        time.sleep(KILL_SECONDS)
        process.kill()
        process.wait()
        kills += 1


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).is_success
    except httpx.TransportError:
        return False


def submit(url: str, number: int, stop: threading.Event, ids: dict[str, list[str]]) -> float:
    """Submit job after job; every third is asked for twice under its key. Returns the longest wait in seconds."""
    chance, longest, count = random.Random(number), 0.0, 0
    with Client(url, user=f"user-{number}", patience_seconds=PATIENCE_SECONDS) as client:
        while True:
            key = f"{number}-{count}"
            body = {**JOB, "seed": count, "labels": {"key": key}}
            for _ in range(2 if count % 3 == 0 else 1):
                began = time.monotonic()
                headers = {"Idempotency-Key": key}
                answer = client._request("POST", "/v1/jobs", json=body, headers=headers, repeatable=True)
                ids[key].append(answer["id"])
                longest = max(longest, time.monotonic() - began)
            count += 1
            if stop.wait(chance.uniform(1, 3)):
                return longest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_key_is_one_job_and_is_answered(
    database_url: str, tmp_path: Path, start_dispatcher: Callable[..., Any], artifacts: Any
) -> None:
    settings = Settings(home=tmp_path, database_url=database_url, port=0)
    listening, stop = listen("127.0.0.1", 0), threading.Event()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    ids: dict[str, list[str]] = defaultdict(list)
    database = Database(database_url)
    with listening, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(submit, url, number, stop, ids) for number in range(CLIENTS)]
        try:
            kills = keep_killing(settings, listening, url, clients)
        finally:
            stop.set()
        longest = max(client.result() for client in clients)

    def jobs() -> list[Any]:
        with database.read() as connection:
            return list(connection.execute(select(tables.jobs.c.id, tables.jobs.c.labels, tables.jobs.c.state)))

    with start_dispatcher(settings):  # not before: its thread would share this process with 100 clients
        until(lambda: {job.state for job in jobs()} == {"succeeded"}, PATIENCE_SECONDS)
    stored: dict[str, list[str]] = defaultdict(list)
    for job in jobs():
        stored[job.labels["key"]].append(job.id)
    lost, doubled = ids.keys() - stored.keys(), [key for key, of_key in stored.items() if len(of_key) > 1]
    print(f"\n{kills} kills, {len(ids)} keys, {len(lost)} lost, {len(doubled)} doubled; longest wait {longest:.1f} s")
    assert kills >= KILLS
    assert Counter(map(len, stored.values())) == {1: len(ids)}
    assert {key: {job_id} for key, [job_id] in stored.items()} == {key: set(answered) for key, answered in ids.items()}
    assert not list(violations(database, [job_id for [job_id] in stored.values()]))
    Lab(database, artifacts).check()
    database.close()
