"""`uncanny serve` as a process: what it survives, what it refuses, and that it leaves nothing behind."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
import waiting
from processes import SERVE, WITHOUT_RAY, another, gone, half, serving

from api import home as homes
from api.client import Client
from service.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20, "recipe": {"epochs": 1}}


@pytest.fixture(autouse=True)
def no_inherited_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("RAY_", "UNCANNY_")):
            monkeypatch.delenv(name)


T = TypeVar("T")


def until(what: Callable[[], T | None], seconds: float = 30) -> T:
    """Processes come and go meanwhile, and the one that answers too."""
    return waiting.until(what, seconds, ignoring=(httpx.TransportError, psutil.NoSuchProcess))


def test_the_api_is_started_again_and_requests_wait_meanwhile(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, url), Client(url) as client:
        accepted = client.submit(JOB)
        api = until(lambda: half(process, "api.serve.server"))
        api.kill()
        assert client.job(accepted.id)["state"] == "queued"  # the same client, at once: the connection waits
        until(lambda: another(process, "api.serve.server", api))
        assert (tmp_path / "logs" / "api.log").read_text().count("answers requests") == 2


def test_an_event_stream_resumes_through_a_restart_of_the_api(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, url), Client(url, patience_seconds=60) as client:
        client.submit(JOB)
        everything = [event.id for event in client.events(after=0, follow=False)]
        followed = client.events(after=0)
        seen = [next(followed).id for _ in everything]
        api = until(lambda: half(process, "api.serve.server"))
        api.kill()
        second = client.submit(JOB, scale=5)
        rest = next(followed)  # the stream broke; the same iterator goes on where it was
        missed = list(client.events(after=seen[-1], follow=False))
        assert seen == everything
        assert rest == missed[0]
        assert second.id in [event.data["job_id"] for event in missed]
        resumed = httpx.get(
            f"{url}/v1/events", params={"follow": False}, headers={"Last-Event-ID": str(missed[0].id)}, timeout=30
        )
        told = [int(line.removeprefix("id: ")) for line in resumed.text.splitlines() if line.startswith("id: ")]
        assert told == [event.id for event in missed]  # first, without data, the one that it starts behind
        until(lambda: another(process, "api.serve.server", api))


def test_no_secret_is_written_anywhere(tmp_path: Path) -> None:
    create = ["token", "create", "first", "--user", "chief", "--scope", "admin", "--direct", "--json"]
    made = subprocess.run(
        [sys.executable, "-m", "api.cli", *create, "--home", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    secrets = [json.loads(made.stdout)["secret"], "unc_this-is-no-token-at-all"]
    with serving(tmp_path, WITHOUT_RAY, "--auth") as (_, url):
        with Client(url, secrets[0]) as client:
            client.submit(JOB)
            secrets.append(client.create_token("second", scope="submit")["secret"])
        for secret in secrets:  # also where clients should not have put them
            httpx.get(f"{url}/v1/nowhere/{secret}", params={"token": secret}, headers=bearer(secret), timeout=30)
            httpx.post(f"{url}/v1/jobs", content="{", headers=bearer(secret), timeout=30)
    assert "answers requests" in (tmp_path / "logs" / "api.log").read_text()
    for path in tmp_path.rglob("*"):
        written = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in secrets if secret.encode() in written], path


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_the_dispatcher_is_started_again_and_its_orphans_are_ended(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, _):
        dispatcher = until(lambda: half(process, "time.sleep"))
        orphans = until(dispatcher.children)
        dispatcher.kill()
        until(lambda: another(process, "time.sleep", dispatcher))
        until(lambda: gone(orphans))


def test_what_is_adopted_while_orphans_are_ended_is_ended_too() -> None:
    """A process that dies between two looks leaves its children to the supervisor, and they were in neither."""
    script = """
import subprocess, psutil
from service.processes import adopt_orphans
from api.serve.supervisor import Supervisor

adopt_orphans()
orphan = psutil.Process(subprocess.Popen(["sh", "-c", "sleep 1000 & wait"]).pid)
children = psutil.Process.children
while not (left := children(orphan)):
    pass
psutil.Process.children = lambda self, recursive=False: [] if recursive else children(self)
supervisor = Supervisor.__new__(Supervisor)
supervisor.parts = []
supervisor._end_orphans()
print(sum(one.is_running() for one in (orphan, *left)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly(tmp_path: Path, which: signal.Signals) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, url):
        until(lambda: until(lambda: half(process, "time.sleep")).children())
        family = psutil.Process(process.pid).children(recursive=True)
        with httpx.stream("GET", f"{url}/v1/events", timeout=10):  # an open stream does not hold it up
            began = time.monotonic()
            process.send_signal(which)
            assert process.wait(timeout=30) == 0
            assert time.monotonic() - began < 15
        until(lambda: gone(family))
        assert not (tmp_path / "serve.json").exists()


def test_children_follow_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, _):
        halves = [until(lambda: half(process, "api.serve.server")), until(lambda: half(process, "time.sleep"))]
        process.kill()
        process.wait()
        until(lambda: gone(halves))
    with serving(tmp_path, WITHOUT_RAY) as (_, url):
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_one_service_for_one_home(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (_, url):
        second = subprocess.run(
            [*SERVE, "--home", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert second.stderr.strip().splitlines() == [second.stderr.strip()]
        assert url in second.stderr
        assert "--home" in second.stderr
        jobs = [sys.executable, "-m", "api.cli", "jobs", "--home", str(tmp_path), "--json"]
        found = subprocess.run(jobs, capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(found.stdout) == []  # without a --url it finds the service of its home


def test_a_note_is_not_believed_once_another_process_has_the_number_of_the_one_that_wrote_it(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, url="", port=1234)
    homes.announce(settings, "http://127.0.0.1:9999")
    assert homes.service_url(settings) == "http://127.0.0.1:9999"
    note = json.loads((tmp_path / "serve.json").read_text())
    written_before = {**note, "process_began_at": note["process_began_at"] - 60}
    (tmp_path / "serve.json").write_text(json.dumps(written_before))
    assert homes.running_url(settings) is None
    assert homes.service_url(settings) == f"http://{settings.host}:1234"
    homes.lock(settings).close()


@pytest.mark.parametrize("command", ["serve", "api"])
def test_a_port_in_use_and_an_address_for_everyone_are_refused(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bad = {"serve": ["--port", str(taken.getsockname()[1])], "api": ["--host", "0.0.0.0"]}[command]
        arguments = [sys.executable, "-m", "api.cli", command, "--home", str(tmp_path), *bad]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    [sentence] = done.stderr.strip().splitlines()
    assert {"serve": "another --port", "api": "--insecure"}[command] in sentence


def test_a_database_of_another_schema_is_refused_and_nothing_is_left_running(tmp_path: Path) -> None:
    environment = {**os.environ, "UNCANNY_DATABASE_URL": f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"}
    arguments = [*WITHOUT_RAY, "--home", str(tmp_path), "--port", "0"]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "run `uncanny db upgrade`" in ended.stderr
    with (tmp_path / "serve.lock").open() as lock:  # its children would hold it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def with_ray(home: Path) -> Iterator[tuple["subprocess.Popen[str]", Client]]:
    with serving(home, SERVE) as (process, url), Client(url, patience_seconds=60) as client:
        yield process, client


LONG = {**JOB, "recipe": {"epochs": 300}}


def test_jobs_are_accepted_before_ray_is_up(tmp_path: Path) -> None:
    """And its dispatcher may be killed while a job runs: it finishes, on the head that stayed, and nothing is left."""
    with with_ray(tmp_path) as (process, client):
        job = client.submit(LONG)
        assert client.cluster()["leading"] is False
        until(lambda: job.status()["state"] == "running", 100)
        dispatcher, head = (until(partial(half, process, m)) for m in ("workers.dispatch", "workers.head"))
        ray = head.children(recursive=True)
        dispatcher.kill()
        assert job.wait()["state"] == "succeeded"
        assert half(process, "workers.head") == head
        assert any("raylet" in member.name() and member.is_running() for member in ray)
        endless = client.submit({**LONG, "recipe": {"epochs": 10_000}})
        until(lambda: endless.status()["state"] == "running", 100)
        family = psutil.Process(process.pid).children(recursive=True)
        with httpx.stream("GET", f"{client.url}/v1/events", params={"after": 0}, timeout=60) as reader:
            lines = reader.iter_lines()
            until(lambda: next(lines).startswith("event:"))
            process.terminate()
            list(lines)  # raises where the body breaks off
            assert process.wait(timeout=30) == 0
        until(lambda: gone(family))


def test_a_dead_head_takes_the_dispatcher_along_and_both_are_started_again(tmp_path: Path) -> None:
    with with_ray(tmp_path) as (process, client):
        job = client.submit(LONG)
        until(lambda: job.status()["state"] == "running", 100)
        dispatcher, head = (until(partial(half, process, m)) for m in ("workers.dispatch", "workers.head"))
        ray = head.children(recursive=True)
        next(member for member in ray if "gcs_server" in member.name()).kill()
        until(lambda: gone([dispatcher, head, *ray]))
        assert job.wait()["state"] == "succeeded"
        assert another(process, "workers.dispatch", dispatcher)
        assert another(process, "workers.head", head)


def test_a_killed_supervisor_leaves_nothing_running(tmp_path: Path) -> None:
    with with_ray(tmp_path) as (process, client):
        job = client.submit(LONG)
        until(lambda: job.status()["state"] == "running", 100)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in member.name() for member in family)
        process.kill()
        process.wait()
        until(lambda: gone(family), 10)


def test_a_second_signal_does_not_wait_for_what_runs(tmp_path: Path) -> None:
    with with_ray(tmp_path) as (process, client):
        job = client.submit({**LONG, "recipe": {"epochs": 10_000}})
        until(lambda: job.status()["state"] == "running", 100)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        time.sleep(0.5)
        assert process.poll() is None  # it waits for what runs
        began = time.monotonic()
        process.terminate()
        process.wait(timeout=30)
        assert time.monotonic() - began < 3
        until(lambda: gone(family))


def test_it_stops_with_streams_open_and_the_reader_sees_a_proper_end(tmp_path: Path) -> None:
    with serving(tmp_path, WITHOUT_RAY) as (process, url):
        # More events than the buffers between the two hold.
        Client(url).sweep(name="many", base=JOB, grid={"seed": list(range(2000)), "scale": [1, 5]})
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as deaf:  # it asks, and never reads
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(f"GET /v1/events?after=0 HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            with httpx.stream("GET", f"{url}/v1/events", params={"after": 0}, timeout=60) as reader:
                lines = reader.iter_lines()
                until(lambda: next(lines).startswith("event:"))
                process.terminate()
                for _ in lines:  # raises where the body breaks off
                    pass
            assert process.wait(timeout=30) == 0
        assert (tmp_path / "logs" / "api.log").read_text().endswith("has stopped\n")  # it was not killed


AWKWARD = ["lab #1", "100% done", "what?now", "größe", "d" * 95, "a link", "relative"]


@pytest.mark.parametrize("name", AWKWARD)
def test_an_awkward_home(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ready, a job succeeds, the database lies inside, nothing new beside it, and all is there the next time."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / name
    if name == "a link":
        (tmp_path / "real").mkdir()
        home.symlink_to(tmp_path / "real")
    beside = set(os.listdir(tmp_path)) | {name}
    given = Path(name) if name == "relative" else home
    with with_ray(given) as (_, client):
        job = client.submit(JOB)
        assert job.wait()["state"] == "succeeded"
        client.result(job.id)
    assert (home / "uncanny.db").is_file()
    assert set(os.listdir(tmp_path)) == beside
    with serving(given, WITHOUT_RAY) as (_, url), Client(url) as client:
        assert client.job(job.id)["state"] == "succeeded"


def test_a_proxy_that_is_not_there_does_not_matter_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with with_ray(tmp_path) as (_, client):
        assert client.submit(JOB).wait()["state"] == "succeeded"
        jobs = [sys.executable, "-m", "api.cli", "jobs", "--home", str(tmp_path), "--json"]
        found = subprocess.run(jobs, capture_output=True, text=True, timeout=60, check=True)
        assert [job["state"] for job in json.loads(found.stdout)] == ["succeeded"]
