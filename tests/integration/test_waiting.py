"""Who follows a job that waits is told why, as `explain` says it."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import until

from api.cli.commands import waiting
from api.cli.commands.waiting import reasons_told
from api.client import Client
from service.model.environment import SetAside
from service.model.executor import Capacity
from service.store import Database, claiming

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
NOT_THERE = "the files of digits are nowhere"
PATIENCE_SECONDS = 20.0


@pytest.fixture
def idle(start_server: Any, tmp_path: Path) -> Iterator[Any]:
    """A service without a dispatcher."""
    with start_server(tmp_path / "home", dispatching=False) as server:
        yield server


def lead(server: Any, reason: str) -> None:
    """Let a dispatcher lead whose data folder is set aside."""
    database = Database(server.settings.database)
    with database.write() as connection:
        now = database.now(connection)
        aside = SetAside("data_folder", "digits", "", "digits", reason, now, now + 300)
        status = {"capacity": asdict(Capacity(True, 4.0, 0.0)), "set_aside": [asdict(aside)]}
        claiming.lead(connection, now, "tests", None, 600.0, status)
    database.close()


def until_told(lines: list[str], wanted: str) -> None:
    until(lambda: any(wanted in line for line in lines), PATIENCE_SECONDS)


@pytest.mark.parametrize("noun", ["job", "sweep"])
def test_a_reason_is_told_once_and_again_when_it_changes(idle: Any, noun: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(waiting, "tell", lines.append)
    looked = []
    explain = Client.explain

    def noted(client: Client, job_id: str) -> Any:
        looked.append(job_id)
        return explain(client, job_id)

    monkeypatch.setattr(Client, "explain", noted)
    made = idle.client.submit(JOB) if noun == "job" else idle.client.sweep(name="s", base=JOB, grid={"scale": [1, 5]})
    with reasons_told(idle.url, noun, made.id, first_seconds=0, every_seconds=0.02):
        until_told(lines, "no dispatcher leads")
        lead(idle, NOT_THERE)
        until_told(lines, NOT_THERE)
        seen = len(looked)
        until(lambda: len(looked) >= seen + 5, PATIENCE_SECONDS)
        assert len(lines) == 2, "the seconds until it is tried again are no news"
        lead(idle, "the folder cannot be read")
        until_told(lines, "the folder cannot be read")
        made.cancel() if noun == "sweep" else idle.client.cancel(made.id)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("command", "terminal"),
    [("watch", False), pytest.param("submit", False, marks=pytest.mark.slow), ("submit", True)],
    ids=["watch", "submit", "terminal"],
)
def test_commands_that_follow_say_why_it_waits(idle: Any, tmp_path: Path, command: str, terminal: bool) -> None:
    lead(idle, NOT_THERE)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    job = idle.client.submit(JOB)
    arguments = ["watch", job.id] if command == "watch" else ["submit", str(tmp_path / "job.yaml"), "--wait"]
    reading, writing = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "api.cli", *arguments, "--url", idle.url], stdout=subprocess.PIPE, stderr=writing,
        text=True, env={**os.environ, "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(writing)
        said = ""
        while NOT_THERE not in said and (more := os.read(reading, 4096)):
            said += more.decode()
        for one in idle.client.jobs(state="queued"):
            idle.client.cancel(one["id"])
        out, _ = process.communicate(timeout=30)
    os.close(reading)
    assert ": it waits for its turn, 0 of its" in said
    assert (process.returncode, "cancelled" in out) == (1, True)
