"""One client stops nobody: slow heads, bodies and readers, floods of values, labels and lines, a frozen database."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Event, Semaphore
from typing import Any
from urllib.parse import urlsplit

import h11
import httpx
import psutil
import pytest
from waiting import until

from api.http import feed
from api.http.feed import Reader
from api.http.routing import new_turns
from api.http.turns import Turns
from service.errors import DatabaseAway
from service.lab.access import Caller
from service.results.insights import Insights
from service.store import Database, postgresql, reading

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
JSON = {"Content-Type": "application/json"}
HEALTHZ = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
MOST_FROZEN_SECONDS = 20.0  # of POOL_SECONDS, and of what three tries to connect take here
IDS = re.compile(rb"^id: ([0-9]+)$", re.MULTILINE)
MANY = httpx.Limits(max_connections=100)
EVENTS = b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def own(start_server: Any, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server without a dispatcher, for the tests of this module."""
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(sqlite_template, home / "uncanny.db")
    with start_server(home, dispatching=False) as server:
        yield server


@pytest.fixture
def home(sqlite_template: Path, tmp_path: Path) -> Path:
    """A home for a server of a test's own, which is started after what the test changes."""
    shutil.copyfile(sqlite_template, tmp_path / "uncanny.db")
    return tmp_path


def connect(server: Any, sent: bytes, receive_bytes: int | None = None) -> socket.socket:
    place = urlsplit(server.url)
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(20)
    made.connect((place.hostname, place.port))
    made.sendall(sent)
    return made


def answers(server: Any) -> None:
    """What must go on meanwhile: liveness, a question and a submission."""
    with httpx.Client(base_url=server.url, timeout=5) as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/v1/queue").status_code == 200
        assert http.post("/v1/jobs", json={**JOB, "seed": time.time_ns() % 10**6}).status_code == 201


def ended(connection: socket.socket) -> bytes:
    """What came before the server closed the connection."""
    came = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 20):
            came += piece
    return came


def _chunked(path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    return f"{head}\r\n\r\n".encode()


class TestBodies:
    def test_sixty_uploads_that_stall_stop_nobody(self, own: Any) -> None:
        """Each held a thread, and forty are all."""
        head = f"PUT /v1/artifacts/{'0' * 64} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n".encode()
        stalled = [connect(own, head + b"x" * 1000) for _ in range(60)]
        try:
            until(lambda: len(list(Path(own.settings.artifacts).glob(".writing-*"))) == 60)
            answers(own)
        finally:
            for connection in stalled:
                connection.close()
        until(lambda: not list(Path(own.settings.artifacts).glob(".writing-*")))

    @pytest.mark.parametrize("path", ["/v1/jobs", "/v1/sweeps", f"/v1/artifacts/{'0' * 64}"])
    def test_a_body_that_does_not_come_is_given_up(self, own: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.limits.BODY_SECONDS", 0.3)
        method = "PUT" if "artifacts" in path else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 999"
        with closing(connect(own, f"{head}\r\n\r\n".encode())) as connection:
            for _ in range(3):  # also one that comes drop by drop
                time.sleep(0.05)
                connection.sendall(b" ")
            answer = ended(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"only 3 bytes came in time" in answer
        until(lambda: not list(Path(own.settings.artifacts).glob(".writing-*")))

    @pytest.mark.parametrize(("path", "status", "most"), [("/v1/nothing", 404, 16), ("/v1/sweeps", 400, 520)])
    def test_tiny_chunks_are_parsed_no_further_than_they_are_wanted(
        self, own: Any, monkeypatch: pytest.MonkeyPatch, path: str, status: int, most: int
    ) -> None:
        """Each costs the event loop as much as a large one, and there are 40,000 in one read."""
        pieces = []
        whole = h11.Connection.next_event

        def counted(parser: h11.Connection) -> Any:
            event = whole(parser)
            if isinstance(event, h11.Data):
                pieces.append(event)
            return event

        monkeypatch.setattr(h11.Connection, "next_event", counted)
        with closing(connect(own, _chunked(path))) as connection:
            with suppress(ConnectionError):  # the server may have ended it
                connection.sendall(b"1\r\n \r\n" * 100_000)
            answer = ended(connection)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"connection: close" in answer.lower()
        assert len(pieces) <= most
        if status == 400:
            assert b"send larger ones, or a Content-Length" in answer

    def test_a_body_in_chunks_of_a_usual_size_is_heard(self, own: Any) -> None:
        body = json.dumps(JOB).encode().ljust(300_000)
        chunks = b"".join(b"64\r\n%b\r\n" % body[start : start + 100] for start in range(0, len(body), 100))
        with closing(connect(own, _chunked("/v1/jobs") + chunks + b"0\r\n\r\n" + HEALTHZ.encode())) as connection:
            came = b""
            while b'{"status":"ok"}' not in came:  # the connection goes on
                came += connection.recv(65536)
        assert came.startswith(b"HTTP/1.1 201 ")

    @pytest.mark.parametrize("path", ["POST /v1/jobs", "POST /v1/sweeps", f"PUT /v1/artifacts/{'0' * 64}"])
    def test_who_hangs_up_in_the_middle_is_no_failure_of_ours(
        self, own: Any, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        head = f"{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{{"
        with caplog.at_level("DEBUG", "uncanny.api"):
            connect(own, head.encode()).close()
            until(lambda: [record for record in caplog.records if path.split()[1] in record.getMessage()])
            answers(own)
        assert [record.getMessage() for record in caplog.records if record.levelno >= 40 or record.exc_info] == []

    def test_only_sweeps_may_be_large(self, own: Any) -> None:
        def status(method: str, path: str, size: int) -> int:
            content = b'{"name": "' + b"x" * size + b'"}'
            return int(own.http.request(method, path, content=content, headers=JSON).status_code)

        for path in ("/v1/jobs", "/v1/tokens", "/v1/datasets", "/v1/checkpoints", "/v1/results:retract"):
            assert (status("POST", path, 1_000_000), status("POST", path, 1_100_000)) == (422, 413)
        assert (status("POST", "/v1/sweeps", 1_100_000), status("POST", "/v1/sweeps", 17_000_000)) == (422, 413)

    def test_bodies_together_have_a_limit_and_small_ones_none(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.limits.HELD_BYTES", 2_000_000)
        head = b"POST /v1/sweeps HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 2000000\r\n\r\n"

        def refused() -> httpx.Response | None:
            """The refusal of the second body. None if the first one is not read in time, or is refused instead."""
            with closing(connect(own, head + b" " * 1_900_000)):
                for _ in range(20):
                    answer = self.sweep(own, 900_000)
                    if answer.status_code == 503:
                        answers(own)
                        return answer
            return None

        refusal = until(refused)
        assert refusal.headers["Retry-After"].isdigit()
        until(lambda: self.sweep(own, 900_000).status_code == 422)

    def sweep(self, server: Any, size: int) -> httpx.Response:
        answer: httpx.Response = server.http.post("/v1/sweeps", content=b" " * size, headers=JSON)
        return answer if answer.status_code != 400 else httpx.Response(422)


class TestValues:
    @pytest.mark.parametrize(
        ("path", "depth", "keys"),
        [
            ("/v1/jobs", "", 70_000),
            ("/v1/jobs", "attack", 70_000),
            ("/v1/sweeps", "base", 70_000),
            pytest.param("/v1/sweeps", "", 1_500_000, marks=pytest.mark.slow),
            pytest.param("/v1/sweeps", "labels", 1_200_000, marks=pytest.mark.slow),
        ],
    )
    def test_a_flood_of_unknown_keys_is_refused_before_it_is_looked_at(
        self, own: Any, path: str, depth: str, keys: int
    ) -> None:
        """1.5 million of them took 2 GB and had no answer."""
        body = "{" + ",".join(f'"{key:x}":1' for key in range(keys)) + "}"
        body = f'{{"{depth}":{body}}}' if depth else body
        answer = own.http.post(path, content=body.encode(), headers=JSON)
        assert (answer.status_code, len(answer.content) < 2000) == (422, True), answer.text[:200]
        assert "are taken" in answer.json()["detail"]

    def test_of_many_errors_the_first_are_told(self, own: Any) -> None:
        answer = own.http.post("/v1/jobs", json={**JOB, **{f"key{i}": 1 for i in range(900)}})
        assert answer.status_code == 422
        assert len(answer.json()["errors"]) == 50
        assert len(answer.content) < 30_000

    @pytest.mark.parametrize("axis", ["include", "exclude"])
    def test_of_many_wrong_cells_the_first_is_told(self, own: Any, axis: str) -> None:
        content = f'{{"name":"x","base":{json.dumps(JOB)},"{axis}":[{",".join("1" * 1_000_000)}]}}'.encode()
        answer = own.http.post("/v1/sweeps", content=content, headers=JSON)
        assert [error["pointer"] for error in answer.json()["errors"]] == [f"/{axis}/0"]

    def test_labels_are_few_and_small(self, own: Any) -> None:
        """A megabyte of them on a sweep of 400 became 825 MB of database."""

        def status(labels: dict[str, str], path: str = "/v1/jobs", **more: Any) -> int:
            return int(own.http.post(path, json={**JOB, "labels": labels, **more}).status_code)

        assert status({f"k{i}": "v" for i in range(50)}) == 201
        assert status({f"k{i}": "v" for i in range(51)}) == 422
        assert status({f"{i}": "é" * 499 for i in range(10)}) == 201  # 9,990 bytes
        assert status({f"{i}": "é" * 500 for i in range(10)}) == 422  # 10,010 bytes in 5,010 characters
        sweep = {"name": "x", "base": JOB, "grid": {"scale": [1, 2]}}
        for labels, refused in (
            ({f"k{i}": "v" for i in range(51)}, "50"),
            ({str(i): "v" * 1000 for i in range(11)}, "10,000"),
        ):
            answer = own.http.post("/v1/sweeps", json={**sweep, "labels": labels})
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/labels")
            assert refused in answer.text


class TestConnections:
    @pytest.mark.parametrize("sent", ["", "GET /healthz HTTP/1.1\r\nHost:", f"{HEALTHZ}GET /heal"])
    def test_a_head_that_does_not_come_is_given_up(self, own: Any, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.connections.HEAD_SECONDS", 0.3)
        with closing(connect(own, sent.encode())) as connection:
            assert ended(connection).count(b"HTTP/1.1 200 OK") == sent.count("\r\n\r\n")

    def drip(self, connection: socket.socket) -> None:
        for _ in range(900):
            connection.sendall(b"X: 1\r\n")
            time.sleep(0.02)

    def test_nor_one_that_comes_drop_by_drop(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.connections.HEAD_SECONDS", 0.3)
        with closing(connect(own, b"GET /healthz HTTP/1.1\r\n")) as connection:
            with pytest.raises(OSError, match=r"reset|Broken pipe"):
                self.drip(connection)

    def test_what_took_long_to_answer_is_no_late_head(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.connections.HEAD_SECONDS", 0.2)
        job = own.client.submit(JOB, seed=1)
        with httpx.Client(base_url=own.url, timeout=20) as http:
            for _ in range(2):
                assert http.get(f"/v1/jobs/{job.id}", params={"wait": 0.6}).json()["state"] == "queued"

    def test_of_too_many_connections_the_idlest_goes(
        self, start_server: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.http.connections.MOST_CONNECTIONS", 20)
        with start_server(home, dispatching=False) as server:
            half = [connect(server, b"GET /healthz HTTP/1.1\r\nHost: 1") for _ in range(60)]
            answers(server)
            assert ended(half[0]) == b""
            for connection in half:
                connection.close()

    def test_a_reader_who_takes_nothing_is_dropped_and_a_slow_one_is_not(
        self, own: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.http.connections.READER_SECONDS", 0.5)
        content = os.urandom(8 << 20)
        digest = hashlib.sha256(content).hexdigest()
        assert own.http.put(f"/v1/artifacts/{digest}", content=content).status_code == 201
        ask = f"GET /v1/artifacts/{digest} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        with closing(connect(own, ask, receive_bytes=4096)) as stopped, closing(connect(own, ask)) as slow:
            came = b""
            while piece := slow.recv(400_000):
                came += piece
                time.sleep(0.05)
            assert came.endswith(content)
            until(lambda: not established(stopped))
            assert len(ended(stopped)) < len(content) / 2


def established(connection: socket.socket) -> bool:
    """Whether the server still has its side of this connection."""
    port = connection.getsockname()[1]
    return any(
        other.raddr and other.raddr.port == port and other.status == psutil.CONN_ESTABLISHED
        for other in psutil.Process().net_connections("tcp")
    )


class TestThreads:
    def test_liveness_takes_no_thread(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def none_left(*_: Any, **__: Any) -> Any:
            raise AssertionError("it took a thread")

        monkeypatch.setattr("anyio.to_thread.run_sync", none_left)
        assert own.http.get("/healthz").json() == {"status": "ok"}

    def test_who_waits_for_a_job_holds_no_thread(self, own: Any) -> None:
        job = own.client.submit(JOB, seed=1)
        ask = f"GET /v1/jobs/{job.id}?wait=30 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        waiting = [connect(own, ask) for _ in range(45)]
        answers(own)
        for connection in waiting:
            connection.close()

    def test_writers_who_wait_for_their_turn_stop_nobody(
        self, start_server: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fifty took all threads while SQLite's writer was busy."""
        turns = new_turns() | {"writers": Turns("writers", 8, 30, 0.5)}
        monkeypatch.setattr("api.http.routing.new_turns", lambda: turns)
        with start_server(home, dispatching=False) as server, ThreadPoolExecutor(50) as pool:
            http = httpx.Client(base_url=server.url, timeout=30, limits=httpx.Limits(max_connections=50))
            with closing(sqlite3.connect(home / "uncanny.db", isolation_level=None)) as writer:
                writer.execute("BEGIN IMMEDIATE")

                def submit(seed: int) -> httpx.Response:
                    return http.post("/v1/jobs", json={**JOB, "seed": seed})

                posts = [pool.submit(submit, seed) for seed in range(50)]
                until(lambda: sum(post.done() for post in posts) == 42)
                for path in ("/healthz", "/readyz", "/v1/queue", "/v1/jobs"):
                    assert server.http.get(path, timeout=5).status_code == 200
                writer.execute("ROLLBACK")
            found = [post.result() for post in posts]
        assert sorted(answer.status_code for answer in found) == [201] * 8 + [503] * 42
        assert all(answer.headers["Retry-After"].isdigit() for answer in found if answer.status_code == 503)

    @pytest.mark.parametrize(
        ("path", "slow"),
        [
            ("/v1/results:aggregate?by=scale", "service.results.aggregates.aggregate"),
            ("/v1/results?format=csv", "service.store.results.columns"),
            ("/v1/results?format=ndjson", "service.store.results.keys"),
            ("/v1/jobs?filter=scale+%3D+5", "service.store.reading.jobs_page"),
        ],
    )
    def test_questions_that_take_long_stop_nobody(
        self, own: Any, path: str, slow: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Forty took all threads. One user has not all turns either, and a stream waits for those of its pieces."""
        until(lambda: not any(turns._here for turns in own.app.state.turns.values()))
        monkeypatch.setitem(own.app.state.turns, "questions", Turns("questions", 3, 12, 0.5, per_user=2))
        module, _, name = slow.rpartition(".")
        usual, go_on, begun = getattr(import_module(module), name), Event(), Semaphore(0)

        def slowly(*arguments: Any, **options: Any) -> Any:
            begun.release()
            assert go_on.wait(20)
            return usual(*arguments, **options)

        with ThreadPoolExecutor(50) as pool, httpx.Client(base_url=own.url, timeout=20, limits=MANY) as http:
            monkeypatch.setattr(slow, slowly)
            hers = [pool.submit(http.get, path, headers={"X-Uncanny-User": "ada"}) for _ in range(50)]
            try:
                assert begun.acquire(timeout=10)
                assert begun.acquire(timeout=10)
                answers(own)
                assert http.get("/readyz").status_code == 200
                his = pool.submit(http.get, path, headers={"X-Uncanny-User": "bob"})
                assert begun.acquire(timeout=10), "there is a turn that she may not have"
            finally:
                go_on.set()
            statuses = Counter(one.result().status_code for one in hers)
            assert his.result().status_code == 200
        assert begun._value < 50
        refused = [one.result() for one in hers if one.result().status_code != 200]
        assert statuses[429] == len(refused) > 0
        assert all(answer.headers["Retry-After"].isdigit() for answer in refused)
        assert "of yours" in refused[0].json()["detail"]

    def test_a_question_that_takes_too_long_is_answered_with_what_to_do(
        self, start_server: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usual = reading.jobs_page

        def slowly(connection: Any, *arguments: Any) -> Any:
            connection.exec_driver_sql(
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
            ).all()
            return usual(connection, *arguments)

        monkeypatch.setattr("service.store.reading.jobs_page", slowly)
        with start_server(home, dispatching=False, statement_seconds=0.3) as server:
            answer = server.http.get("/v1/jobs")
        assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
        assert answer.headers["Retry-After"].isdigit()
        assert "narrow the filter" in answer.json()["detail"]

    def test_exports_whose_readers_take_nothing_hold_no_turn(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each piece of an export is made in a turn of its own, when the one before has been taken."""
        monkeypatch.setitem(own.app.state.turns, "questions", Turns("questions", 2, 50, 5.0))

        def endless(_: Any) -> Iterator[str]:
            while True:
                yield "x" * 1_000_000

        monkeypatch.setattr("service.results.exporting.csv_lines", endless)
        ask = b"GET /v1/results?format=csv HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        stopped = [connect(own, ask, receive_bytes=4096) for _ in range(20)]
        for reader in stopped:
            assert b"200 OK" in reader.recv(1000)
        assert own.http.get("/v1/jobs", timeout=4).status_code == 200
        for reader in stopped:
            reader.close()


class TestReaders:
    def test_all_readers_are_told_by_one_look(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        looks: list[int] = []

        def noted(weight: int, look: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*arguments: Any, **more: Any) -> Any:
                looks.append(weight)
                return look(*arguments, **more)

            return noting

        monkeypatch.setattr(Insights, "news", noted(1, Insights.news))
        monkeypatch.setattr(Insights, "events", noted(50, Insights.events))
        readers = [connect(own, EVENTS) for _ in range(50)]
        for reader in readers:
            until(lambda reader=reader: b"id:" in reader.recv(4096))  # type: ignore[misc]
        before, began = len(looks), time.monotonic()
        job = own.client.submit(JOB, seed=1)
        for reader in readers:
            until(lambda reader=reader: job.id.encode() in reader.recv(1 << 16))  # type: ignore[misc]
        seconds = time.monotonic() - began
        assert sum(looks[before:]) <= seconds / feed.POLL_SECONDS + 3
        for reader in readers:
            reader.close()

    @pytest.mark.parametrize("pending", [0, 64])
    def test_each_is_told_what_a_list_would_tell(
        self, server: Any, pending: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of everything, of a sweep, of a job; also to who is always so far behind that some had to be left out."""
        monkeypatch.setattr("api.http.feed.MOST_PENDING", pending)
        monkeypatch.setattr("api.http.feed.POLL_SECONDS", 0.01)
        server.idle()
        start = server.client.submit({**JOB, "samples": 21}, seed=10_000 + pending)
        begun = next(server.client.events(job=start.id, follow=False)).id
        base = {**JOB, "samples": 22}
        sweep = server.client.sweep(name="told", base=base, grid={"seed": [20_000 + pending], "scale": [1, 2, 3]})
        job = next(server.client.jobs(sweep=sweep.id))["id"]
        which = [
            f"after={begun}",
            f"sweep={sweep.id}",
            f"sweep={sweep.id}&after={begun + 3}",
            f"job={job}",
            f"job={start.id}",
        ]
        readers = [connect(server, EVENTS.replace(b"events", f"events?{of}".encode())) for of in which]
        more = server.client.sweep(name="more", base=base, grid={"seed": [20_000 + pending], "scale": [4, 5]})
        for handle in (start, sweep, more):
            handle.wait()
        server.idle()
        for reader, of in zip(readers, which, strict=True):
            listed = server.http.get(f"/v1/events?{of}&follow=false").content
            expected, came = IDS.findall(listed), b""
            assert len(expected) > 3
            while len(IDS.findall(came)) < len(expected):
                came += reader.recv(1 << 16)
            assert IDS.findall(came) == expected
            reader.close()

    def test_one_that_is_behind_keeps_no_more_than_its_share(self) -> None:
        reader = Reader(Caller("ada"))
        for event_id in range(1000):
            reader.give([(event_id, b"x")])
        assert reader.behind
        assert list(reader.taken()) == []
        reader.behind = False
        reader.give([(1000, b"y")])
        assert list(reader.taken()) == [(1000, b"y")]

    @pytest.mark.slow
    def test_one_that_stops_reading_is_dropped(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.connections.READER_SECONDS", 0.5)
        monkeypatch.setattr("api.http.feed.POLL_SECONDS", 0.01)
        with closing(connect(own, EVENTS, receive_bytes=4096)) as stopped:
            until(lambda: established(stopped))
            sweep = {"name": "x", "base": {**JOB, "dataset": "digits"}, "labels": {}}
            for seed in range(200):
                if not established(stopped):
                    break
                grid = {"seed": list(range(seed * 200, seed * 200 + 200))}
                own.http.post("/v1/sweeps", json={**sweep, "grid": grid}).raise_for_status()
            until(lambda: not established(stopped))

    def test_a_silent_stream_is_kept_open(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.events.PING_SECONDS", 0.05)
        with closing(connect(own, EVENTS)) as connection:
            until(lambda: b": ping" in connection.recv(4096))

    def test_there_are_not_too_many(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.feed.MOST_READERS", 2)
        readers = [connect(own, EVENTS) for _ in range(2)]
        for reader in readers:
            until(lambda reader=reader: b"id:" in reader.recv(4096))  # type: ignore[misc]
        refused = own.http.get("/v1/events")
        assert (refused.status_code, refused.headers["Retry-After"].isdigit()) == (503, True)
        for reader in readers:
            reader.close()
        until(lambda: own.http.get("/v1/events", params={"follow": False}).status_code == 200)


@pytest.fixture(scope="module")
def server_to_freeze(start_postgresql: Any) -> Any:
    return start_postgresql()


class TestFrozenPostgresql:
    @pytest.fixture
    def frozen(self, server_to_freeze: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Database, Any]]:
        """A database with a connection in its pool, and what freezes and thaws its server."""
        monkeypatch.setattr(postgresql, "BUSY_SECONDS", 0.1)
        monkeypatch.setattr(postgresql, "GRACE_SECONDS", 0.3)
        monkeypatch.setattr(postgresql, "PING_SECONDS", 0.3)
        monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 2)
        server = server_to_freeze
        url = server.get_uri("postgres").replace("postgresql://", "postgresql+psycopg://")
        made = Database(url, statement_seconds=0.4)
        with made.read() as connection:
            made.now(connection)
        postmaster = psutil.Process(int((Path(server.pgdata) / "postmaster.pid").read_text().split()[0]))

        def tell(which: signal.Signals) -> None:
            for process in (postmaster, *postmaster.children()):
                process.send_signal(which)

        yield made, tell
        tell(signal.SIGCONT)
        made.close()

    def test_a_pooled_connection_is_given_up(self, frozen: tuple[Database, Any]) -> None:
        made, tell = frozen
        tell(signal.SIGSTOP)
        with pytest.raises(DatabaseAway), made.read() as connection:
            made.now(connection)
        tell(signal.SIGCONT)
        with made.read() as connection:
            assert made.now(connection) > 0

    @pytest.mark.parametrize("kind", ["read", "write"])
    def test_a_transaction_in_the_middle_is_given_up(self, frozen: tuple[Database, Any], kind: str) -> None:
        made, tell = frozen
        with pytest.raises(DatabaseAway, match="said nothing for"):
            self.ask_while_frozen(made, kind, tell)
        tell(signal.SIGCONT)
        with made.write() as connection:
            assert made.now(connection) > 0

    def ask_while_frozen(self, made: Database, kind: str, tell: Callable[[signal.Signals], None]) -> None:
        with getattr(made, kind)() as connection:
            tell(signal.SIGSTOP)
            made.now(connection)

    @pytest.mark.parametrize("kind", ["read", "write"])
    def test_a_statement_that_takes_too_long_is_given_up(self, frozen: tuple[Database, Any], kind: str) -> None:
        made, _ = frozen
        with pytest.raises(DatabaseAway, match="too long"), getattr(made, kind)() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(20)")

    @pytest.fixture
    def frozen_api(self, frozen: tuple[Database, Any], start_server: Any, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
        """An API on that database, whose threads and connections have all been used."""
        made, tell = frozen
        with start_server(tmp_path, dispatching=False, database_url=made.url, statement_seconds=2) as server:
            try:
                until(lambda: self.statuses(server) == {200})
                yield server, tell
            finally:
                tell(signal.SIGCONT)

    def many(self, server: Any) -> list[tuple[httpx.Response, float]]:
        """The answers to 45 questions at once, more than there are threads, and the seconds that each took."""
        paths = (
            "/v1/jobs",
            "/v1/queue",
            "/v1/cluster",
            "/readyz",
            "/v1/sweeps",
            "/v1/networks",
            "/v1/events?follow=false",
        )

        def ask(number: int) -> tuple[httpx.Response, float]:
            began = time.monotonic()
            return http.get(paths[number % len(paths)]), time.monotonic() - began

        with ThreadPoolExecutor(45) as pool, httpx.Client(base_url=server.url, timeout=60, limits=MANY) as http:
            return list(pool.map(ask, range(45)))

    def statuses(self, server: Any) -> set[int]:
        return {answer.status_code for answer, _ in self.many(server)}

    def test_over_http_all_are_answered_meanwhile_and_served_afterwards(self, frozen_api: tuple[Any, Any]) -> None:
        """The last of them after a connection has been tried, waited for, and made anew by those before it."""
        server, tell = frozen_api
        readers = [connect(server, EVENTS) for _ in range(3)]
        for reader in readers:
            until(lambda reader=reader: b"id:" in reader.recv(4096))  # type: ignore[misc]
        tell(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=2) as http:
            asked = pool.submit(self.many, server)
            looks = 0
            while not asked.done():
                assert http.get("/healthz").json() == {"status": "ok"}
                looks += 1
            found = asked.result()
        assert looks > 10
        assert {answer.status_code for answer, _ in found} == {503}
        assert all(answer.headers["Retry-After"].isdigit() for answer, _ in found)
        print(f"\nthe slowest of 45 answers came after {max(seconds for _, seconds in found):.1f} s")
        assert max(seconds for _, seconds in found) < MOST_FROZEN_SECONDS
        tell(signal.SIGCONT)
        job = until(lambda: (answer := server.http.post("/v1/jobs", json=JOB)).status_code == 201 and answer.json())
        for reader in readers:
            assert self.ended_or_told(reader, job["id"])
            reader.close()
        with closing(connect(server, EVENTS.replace(b"events", b"events?after=0"))) as reader:
            until(lambda: job["id"].encode() in reader.recv(1 << 16))
        until(lambda: self.statuses(server) == {200})

    def ended_or_told(self, reader: socket.socket, job_id: str) -> bool:
        came = b""
        while job_id.encode() not in came:
            piece = reader.recv(1 << 16)  # within 20 s
            came += piece
            if not piece or came.endswith(b"0\r\n\r\n"):
                return True
        return True


@dataclass(frozen=True)
class Shared:
    """A server that asks for tokens, and secrets of two users by name."""

    server: Any
    secrets: dict[str, str]

    def ask(self, who: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[who]}"} | more.pop("headers", {})
        answer: httpx.Response = self.server.http.request(method, path, headers=headers, **more)
        return answer

    def connect(self, who: str, head: str, body: bytes = b"") -> socket.socket:
        head = f"{head} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.secrets[who]}\r\n"
        if body:
            head += "Content-Type: application/json\r\nContent-Length: 9000000\r\n"
        return connect(self.server, f"{head}\r\n".encode() + body)


@pytest.fixture(scope="module")
def shared(start_server: Any, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(sqlite_template, home / "uncanny.db")
    with start_server(home, dispatching=False, auth=True, max_open_requests=3) as server:
        access, secrets = server.app.state.access, {}
        for name in ("ada", "bob"):
            access.put_user(name, {"role": "researcher"}, actor="root")
            made = access.create_token(name, "test", "submit", None, by=Caller("root"))
            secrets[name] = made["secret"]
        yield Shared(server, secrets)


class TestShares:
    """What one user has open leaves room for another one, where tokens are asked for."""

    @pytest.mark.parametrize("what", ["streams", "uploads", "waits"])
    def test_of_open_requests(self, shared: Shared, what: str) -> None:
        job = shared.ask("ada", "POST", "/v1/jobs", json={**JOB, "seed": 1}).json()["id"]
        head, body = {
            "streams": ("GET /v1/events", b""),
            "waits": (f"GET /v1/jobs/{job}?wait=30", b""),
            "uploads": (f"PUT /v1/artifacts/{'0' * 64}", b"x"),
        }[what]
        hers = [shared.connect("ada", head, body) for _ in range(3)]
        try:
            until(lambda: shared.server.app.state.open_by["ada"] == 3)
            refused = shared.ask("ada", "GET", "/v1/queue")
            assert (refused.status_code, refused.headers["Retry-After"].isdigit()) == (429, True)
            assert "3 requests of ada are open" in refused.json()["detail"]
            assert shared.ask("bob", "GET", "/v1/queue").status_code == 200
            assert shared.ask("bob", "POST", "/v1/jobs", json={**JOB, "seed": 2}).status_code == 201
            hers.pop().close()
            until(lambda: shared.ask("ada", "GET", "/v1/queue").status_code == 200)
        finally:
            for connection in hers:
                connection.close()
        until(lambda: not shared.server.app.state.open_by)

    def test_of_large_bodies(self, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.http.limits.HELD_BYTES", 2_000_000)

        def sweep(who: str) -> httpx.Response:
            return shared.ask(who, "POST", "/v1/sweeps", content=b" " * 600_000, headers=JSON)

        half = shared.connect("ada", "POST /v1/sweeps", b" " * 900_000)
        try:
            until(lambda: shared.server.app.state.held_by["ada"] > 800_000)
            refused = sweep("ada")
            assert (refused.status_code, refused.headers["Retry-After"].isdigit()) == (429, True)
            assert "large bodies of ada" in refused.json()["detail"]
            assert sweep("bob").status_code == 400
        finally:
            half.close()
        until(lambda: sweep("ada").status_code == 400)
