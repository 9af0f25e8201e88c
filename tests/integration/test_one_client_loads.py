"""One client stops nobody, at the size at which one did: an API process on loopback, its latency, memory and log."""

import os
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
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

    @property
    def processor_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def connect(self, sent: bytes, receive_bytes: int | None = None) -> socket.socket:
        made = socket.socket()
        if receive_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.settimeout(20)
        made.connect(self.place)
        made.sendall(sent)
        return made

    def connected(self, connections: list[socket.socket]) -> int:
        """How many of them the server still has its side of."""
        ports = {connection.getsockname()[1] for connection in connections}
        return sum(
            bool(other.raddr) and other.raddr.port in ports and other.status == psutil.CONN_ESTABLISHED
            for other in self.process.net_connections("tcp")
        )


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Api]:
    """Its settings are the parameter, where there is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this machine gives too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    Database(f"sqlite:///{tmp_path / 'uncanny.db'}").upgrade()
    settings: dict[str, str] = getattr(request, "param", {})
    listening, log = listen("127.0.0.1", 0), tmp_path / "api.log"

    dies = die_with_parent()

    def prepare() -> None:
        dies()
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))

    with log.open("wb") as sink, closing(listening):
        process = subprocess.Popen(
            [sys.executable, "-m", "api.serve.server", "--fd", str(listening.fileno())],
            cwd=TREE, stdout=sink, stderr=sink,
            env={**os.environ, "PYTHONPATH": TREE, "UNCANNY_HOME": str(tmp_path), **settings},
            pass_fds=[listening.fileno()], preexec_fn=prepare,
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
    api.post_seconds()
    alone = min(api.post_seconds() for _ in range(3))
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(api.connect(PUT + b"x" * 1000))
        time.sleep(0.5)
        began = time.perf_counter()
        assert api.http.get("/healthz", timeout=15).status_code == 200
        healthz = time.perf_counter() - began
        beside = min(api.post_seconds() for _ in range(3))  # others use this machine too
        tell(alone_ms=alone * 1e3, beside_ms=beside * 1e3, healthz_ms=healthz * 1e3)
        assert beside < 2 * alone


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


@pytest.mark.parametrize("api", [{"UNCANNY_AUTH": "1"}], indirect=True)
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_large_bodies_without_a_token(api: Api, chunked: bool, tell: Callable[..., None]) -> None:
    """Each was parsed, in 3.6 s of the processor's time, before anybody asked who it is from."""
    body = ("[" + ",".join(["1"] * 8_000_000) + "]").encode()
    head = b"POST /v1/sweeps HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sent = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    if chunked:
        pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
        sent = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces)
        sent += b"0\r\n\r\n"
    before, rss, times = api.processor_seconds, api.megabytes, 5
    for _ in range(times):
        with closing(api.connect(head)) as connection:
            with suppress(ConnectionError):  # it need not take all of it
                connection.sendall(sent)
            assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    each = (api.processor_seconds - before) / times
    tell(processor_seconds_of_each=each, megabytes=api.megabytes - rss)
    assert each < 0.4
    assert api.megabytes - rss < 50
    assert api.http.get("/healthz", timeout=5).status_code == 200


@pytest.mark.timeout(300)
def test_readers_that_stop_reading(api: Api, tell: Callable[..., None]) -> None:
    """All are dropped after 30 s, at the earliest, and who reads on is not."""
    for first in range(4):
        sweep = {"name": "x", "base": JOB, "grid": {"seed": list(range(first * 400, first * 400 + 400))}}
        api.http.post("/v1/sweeps", json=sweep).raise_for_status()
    before = api.megabytes
    ask = b"GET /v1/events?after=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with ExitStack() as stack:
        reading = stack.enter_context(api.connect(ask))
        stopped = [stack.enter_context(api.connect(ask, receive_bytes=4096)) for _ in range(30)]
        reading.settimeout(0.5)
        began, came, most_open, first_dropped = time.monotonic(), 0, 0, 0.0
        while (left := api.connected(stopped)) or not most_open:
            with suppress(TimeoutError):
                came += len(reading.recv(1 << 20))
            most_open = max(most_open, left)
            if left == len(stopped):
                first_dropped = time.monotonic() - began
            assert time.monotonic() - began < 60
        tell(first_dropped=first_dropped, last_dropped=time.monotonic() - began, megabytes=api.megabytes - before)
        assert most_open == len(stopped)
        assert first_dropped > 25
        assert came > 1_000_000
        assert api.connected([reading]) == 1
        assert api.megabytes - before < 100


def test_submissions_behind_a_writer(api: Api, tmp_path: Path, tell: Callable[..., None]) -> None:
    """Fifty that wait for SQLite's writer took all threads, and nothing was answered."""
    api.post_seconds(5)
    http = httpx.Client(base_url=api.http.base_url, timeout=60, limits=httpx.Limits(max_connections=50))
    writer = sqlite3.connect(tmp_path / "uncanny.db", isolation_level=None)
    seconds = []
    with closing(http), closing(writer), ThreadPoolExecutor(50) as pool:
        writer.execute("BEGIN IMMEDIATE")
        posts = [pool.submit(http.post, "/v1/jobs", json={**JOB, "seed": 10**9 + seed}) for seed in range(50)]
        time.sleep(1)  # all of them have come
        held = time.monotonic()
        while time.monotonic() - held < 4:
            for path in ("/healthz", "/v1/jobs"):
                began = time.perf_counter()
                assert api.http.get(path, timeout=15).status_code == 200
                seconds.append(time.perf_counter() - began)
        assert not any(post.done() for post in posts)
        writer.execute("ROLLBACK")
        found = [post.result() for post in posts]
    tell(questions=len(seconds), median_seconds=statistics.median(seconds), slowest_seconds=max(seconds))
    assert max(seconds) < 2
    assert {answer.status_code for answer in found} <= {201, 503}  # too late for those who have waited for ten seconds
    assert sum(answer.status_code == 201 for answer in found) >= 8
    assert all(answer.headers["Retry-After"].isdigit() for answer in found if answer.status_code == 503)


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

    def close_all() -> None:
        for sender in senders:
            if sender is not None:
                sender.close()

    with ExitStack() as stack:
        stack.callback(close_all)
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
