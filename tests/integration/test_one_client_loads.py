"""One client stops nobody, at the size at which one did: an API process on loopback, its latency, memory and log."""

import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from api.binding import listen
from service.processes import die_with_parent
from service.store import Database

pytestmark = pytest.mark.slow
JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
PUT = f"PUT /v1/artifacts/{'0' * 64} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n".encode()
TREE = os.environ.get("TEST_API_TREE", str(Path(__file__).resolve().parents[2]))  # another one, to compare with


@dataclass
class Api:
    """An API process with 1,024 descriptors at first, as most systems give."""

    place: tuple[str, int]
    log: Path
    process: psutil.Process
    http: httpx.Client

    @property
    def megabytes(self) -> float:
        return float(self.process.memory_info().rss / 2**20)

    def post_seconds(self, times: int = 40) -> float:
        """The median of a submission."""
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            answer = self.http.post("/v1/jobs", json={**JOB, "seed": time.time_ns() % 10**9})
            assert answer.status_code == 201, answer.text
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def connect(self, sent: bytes) -> socket.socket:
        made = socket.create_connection(self.place, timeout=20)
        made.sendall(sent)
        return made


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this machine gives too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    Database(f"sqlite:///{tmp_path / 'uncanny.db'}").upgrade()
    listening, log = listen("127.0.0.1", 0), tmp_path / "api.log"

    def prepare() -> None:
        die_with_parent()
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))

    with log.open("wb") as sink, closing(listening):
        process = subprocess.Popen(
            [sys.executable, "-m", "api.server", "--fd", str(listening.fileno())], cwd=TREE, stdout=sink, stderr=sink,
            env={**os.environ, "PYTHONPATH": TREE, "UNCANNY_HOME": str(tmp_path)}, pass_fds=[listening.fileno()],
            preexec_fn=prepare,
        )  # fmt: skip
        place = listening.getsockname()[:2]
        try:
            with httpx.Client(base_url=f"http://{place[0]}:{place[1]}", timeout=60) as http:
                assert http.get("/healthz").status_code == 200
                yield Api(place, log, psutil.Process(process.pid), http)
        finally:
            process.kill()
            process.wait()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def tell(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def tell(**figures: float) -> None:
        with capsys.disabled():
            print("  " + ", ".join(f"{name} {value:,.3g}" for name, value in figures.items()))

    return tell


@pytest.mark.parametrize("count", [500, 1000])
def test_idle_readers_of_events(api: Api, count: int, tell: Callable[..., None]) -> None:
    """A submission takes at most twice its time without them."""
    api.post_seconds()
    alone, before = min(api.post_seconds() for _ in range(3)), api.megabytes
    with ExitStack() as stack:
        for _ in range(count):
            reader = stack.enter_context(api.connect(b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
            assert reader.recv(1000)
        beside = min(api.post_seconds() for _ in range(3))  # others use this machine too
        tell(readers=count, alone_ms=alone * 1e3, beside_ms=beside * 1e3, megabytes=api.megabytes - before)
        assert beside < 2 * alone


def test_stalled_uploads(api: Api, tell: Callable[..., None]) -> None:
    alone = api.post_seconds()
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(api.connect(PUT + b"x" * 1000))
        time.sleep(0.5)
        began = time.perf_counter()
        assert api.http.get("/healthz", timeout=15).status_code == 200
        tell(alone_ms=alone * 1e3, beside_ms=api.post_seconds() * 1e3, healthz_ms=(time.perf_counter() - began) * 1e3)


def test_stalled_bodies_of_sweeps(api: Api, tell: Callable[..., None]) -> None:
    before = api.megabytes
    head = b"POST /v1/sweeps HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 16000000"
    with ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(api.connect(head + b"\r\n\r\n"))
            connection.settimeout(0.5)
            try:
                connection.sendall(b" " * 15_900_000)
            except OSError:  # it takes no more of it
                continue
        assert api.http.get("/healthz", timeout=15).status_code == 200
        grown = api.megabytes - before
        tell(megabytes=grown)
        assert grown < 400


def test_unknown_keys(api: Api, tell: Callable[..., None]) -> None:
    before = api.megabytes
    content = ("{" + ",".join(f'"{key:x}":1' for key in range(1_400_000)) + "}").encode()
    began = time.perf_counter()
    answer = api.http.post("/v1/sweeps", content=content, headers={"Content-Type": "application/json"})
    tell(seconds=time.perf_counter() - began, megabytes=api.megabytes - before)
    assert (answer.status_code, api.megabytes - before < 400) == (422, True)


def test_half_sent_heads(api: Api, tell: Callable[..., None]) -> None:
    """As many as the process had descriptors made it deaf, and its log grew by megabytes a second."""
    alone = api.post_seconds()
    api.http.close()
    with ExitStack() as stack:
        for _ in range(1500):
            stack.enter_context(api.connect(b"GET /healthz HTTP/1.1\r\nHost: 1"))
        with httpx.Client(base_url=f"http://{api.place[0]}:{api.place[1]}", timeout=5) as api.http:
            beside, size = api.post_seconds(), api.log.stat().st_size
            time.sleep(2)
            grown = (api.log.stat().st_size - size) / 2
            tell(alone_ms=alone * 1e3, beside_ms=beside * 1e3, log_bytes_a_second=grown)
            assert grown < 20_000


def test_labels(api: Api, tmp_path: Path, tell: Callable[..., None]) -> None:
    labels = {f"label{i}": "v" * 190 for i in range(50)}
    grid = {"scale": [round(0.5 + i / 100, 2) for i in range(400)]}
    sweep = {"name": "x", "base": {**JOB, "samples": 20}, "grid": grid, "labels": labels}
    api.http.post("/v1/sweeps", json=sweep).raise_for_status()
    size = sum(file.stat().st_size for file in tmp_path.glob("uncanny.db*")) / 2**20
    tell(megabytes_of_database=size)
    assert size < 40
    many = {f"label{i}": "v" * 1000 for i in range(900)}
    assert api.http.post("/v1/sweeps", json={**sweep, "labels": many}).status_code == 422


@pytest.mark.parametrize(("path", "size"), [("/v1/nothing", 1), ("/v1/sweeps", 1), ("/v1/sweeps", 70)])
def test_tiny_chunks(api: Api, path: str, size: int, tell: Callable[..., None]) -> None:
    """60 connections that send chunks as fast as they can, made again when they end."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    chunks = (f"{size:x}\r\n{' ' * size}\r\n" * (100_000 // (size + 6))).encode()
    senders: list[socket.socket | None] = [None] * 60
    seconds = []
    with ExitStack() as stack:
        stack.callback(lambda: [sender.close() for sender in senders if sender is not None])
        for _ in range(40):
            for index, sender in enumerate(senders):
                if sender is None:
                    sender = senders[index] = api.connect(head.encode())
                    sender.setblocking(False)
                try:
                    sender.send(chunks)
                except BlockingIOError:
                    pass
                except OSError:
                    sender.close()
                    senders[index] = None
            began = time.perf_counter()
            assert api.http.get("/healthz").status_code == 200
            seconds.append(time.perf_counter() - began)
    tell(size=size, median_seconds=statistics.median(seconds), slowest_seconds=max(seconds))
    assert statistics.median(seconds) < 0.5
