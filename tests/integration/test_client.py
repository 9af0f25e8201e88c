"""The Python client: handles, pages, retries, data sets, and what it says when nobody answers."""

import functools
import hashlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.stats import binomtest

from api.cli.commands.options import REACH_SECONDS
from api.client import ApiError, Client, Unanswered, Unreachable, client, questions, transport
from api.http.errors import RETRY_AFTER_SECONDS
from api.serve.supervisor import LONGEST_PAUSE_SECONDS
from service.errors import UncannyError
from service.lab import checkpoints
from service.store.patience import BUSY_SECONDS

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
CLASSES = (client.Client, client.Job, client.Sweep, questions.Questions, questions.Rows, questions.Aggregate)


@pytest.fixture(scope="module", autouse=True)
def called() -> Iterator[set[str]]:
    """The methods of the client that were called and answered, as `Client.submit`."""
    seen: set[str] = set()

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **more: Any) -> Any:
            seen.add(name)
            return method(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in CLASSES:
            for name, value in list(vars(kind).items()):
                if callable(value) and not name.startswith("_"):
                    patch.setattr(kind, name, noting(f"{kind.__name__}.{name}", value))
        yield seen


def test_a_job(server: Any) -> None:
    job = server.client.submit(JOB, seed=201)
    reports: list[float] = []
    done = job.wait(lambda status: reports.append(status["progress"]))
    assert (done["state"], done["user"], reports[-1]) == ("succeeded", "ada", 1.0)
    assert job.status() == done
    assert job.result()["robust_accuracy"] == 0.5
    assert server.client.trajectory(job.id)["attack"]["trajectory"]["step"] == [0, 1]
    assert server.client.task(job.accepted["tasks"][0])["kind"] == "train"


def test_a_sweep(server: Any) -> None:
    sweep = server.client.sweep(name="client", base=JOB, grid={"seed": [202], "scale": [1, 2, 3]})
    assert sweep.accepted["to_compute"]["train"] == 1
    assert sweep.wait()["state"] == sweep.status()["state"] == "succeeded"
    assert sorted(row["scale"] for row in sweep.results(limit=2)) == [1, 2, 3]
    assert [row["scale"] for row in sweep.results(sort="-scale", scale=[2, 3])] == [3, 2]
    assert [job["spec"]["scale"] for job in server.client.jobs(sweep=sweep.id, sort="scale", limit=1)] == [1, 2, 3]
    assert any(found["id"] == sweep.id for found in server.client.sweeps())
    assert server.client.dry_run({"name": "x", "base": JOB, "grid": {"seed": [202]}})["known"]["train"] == 1


@pytest.fixture(scope="module")
def seeds(server: Any) -> Any:
    """Three seeds at two scales, done: 0.5 of the images are robust at s = 1, all of them at s = 50.

    At s = 1 the first network is attacked a second time.
    """
    grid, again = {"seed": [211, 212, 213], "scale": [1, 50]}, {"seed": 211, "scale": 1, "attack_seed": 1}
    sweep = server.client.sweep({"name": "seeds", "base": JOB, "grid": grid, "include": [again]})
    assert sweep.wait(progress=True)["state"] == "succeeded"
    return sweep


def test_results_as_frames(seeds: Any) -> None:
    text = "scale = 50 and attack.norm = l2 and seed in (211, 212)"
    polars = seeds.results(text, sort="seed").to_polars()
    assert polars["seed"].to_list() == [211, 212]
    assert polars["attack.norm"].to_list() == ["l2", "l2"]
    pandas = seeds.results(text, sort="seed").to_pandas()
    assert pandas["robust_accuracy"].tolist() == [1.0, 1.0]
    rows = seeds.results(text)
    assert [len(list(rows)), len(list(rows))] == [2, 2]
    with pytest.raises(ApiError, match="scales") as refused:
        list(seeds.results("scales = 50"))
    assert refused.value.status == 422


def test_statistics(server: Any, seeds: Any) -> None:
    chosen = {"filter": f"sweep = {seeds.id}"}
    found = server.client.aggregate("scale", "robust_accuracy:mean,ci95", **chosen)
    frame = found.to_polars()
    assert found.flat() == frame.to_dicts()
    assert frame["robust_accuracy.mean"].to_list() == [0.5, 1.0]
    half, all_of_them = (binomtest(k, 20).proportion_ci(method="wilson").low for k in (10, 20))  # of 20 images
    assert frame["robust_accuracy.ci95_low"].to_list() == pytest.approx([half, all_of_them])
    assert (frame["results"].to_list(), frame["networks"].to_list()) == ([4, 3], [3, 3])
    with pytest.raises(ApiError, match="allow_mixed"):
        list(server.client.aggregate(**chosen))
    assert [row["results"] for row in server.client.aggregate(**chosen, allow_mixed=True)] == [7]
    [board] = server.client.leaderboard(**chosen, trusted=False)
    [row] = board["rows"]
    assert (row["architecture"], row["robust_accuracy"]) == ("mlp", 0.5)
    assert (row["networks"], row["seeds"], row["results"]) == (3, 3, 4)
    worst = server.client.worst_cases(**chosen)
    assert [row["robust_accuracy_worst_case"] for row in worst] == [0.5] * 3
    [correlation] = server.client.correlations("log_relative_sharpness_median", **chosen, trusted=False)
    assert (correlation["n"], correlation["results"]) == (3, 4)
    ids = [row["job_id"] for row in seeds.results("seed = 211 and attack_seed = 0", sort="scale")]
    compared = server.client.compare(*ids)
    assert compared["differing"]["scale"] == [1.0, 50.0]
    assert compared["union"]["robust_accuracy"] == 0.5
    curves = server.client.trajectories(*ids, parts="attack")
    assert [one["job_id"] for one in curves] == ids
    assert all(set(one["curves"]) == {"attack"} for one in curves)


@pytest.mark.parametrize("format", ["parquet", "csv", "ndjson"])
def test_an_export(server: Any, seeds: Any, tmp_path: Path, format: str) -> None:
    import polars

    file = server.client.export(tmp_path / "rows", f"sweep = {seeds.id}", format=format)
    frame = getattr(polars, {"ndjson": "read_ndjson"}.get(format, f"read_{format}"))(file)
    assert sorted(frame["seed"].to_list()) == [211, 211, 211, 212, 212, 213, 213]
    with pytest.raises(ApiError):
        server.client.export(tmp_path / "refused", "scales = 1")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_retraction(server: Any) -> None:
    job = server.client.submit(JOB, seed=214)
    job.wait()
    done = server.client.retract(job.id, "a bug in the attack", rerun=True)
    assert done["retracted"] == [job.id]
    assert job.id not in {row["job_id"] for row in server.client.results(seed=214)}
    assert job.result()["retraction_reason"] == "a bug in the attack"
    [again] = done["resubmitted"]
    assert server.ended(f"/v1/jobs/{again}")["state"] == "succeeded"
    assert [row["job_id"] for row in server.client.results("seed = 214")] == [again]
    assert server.client.restore(job.id)["restored"] == [job.id]
    assert server.client.retract(filter="seed = 214", reason="all of it")["retracted"] == sorted([job.id, again])


def test_refusals(server: Any) -> None:
    with pytest.raises(ApiError, match="unknown architecture") as refused:
        server.client.submit(JOB, architecture="resnet19")
    assert refused.value.status == 422
    assert refused.value.problem["errors"][0]["pointer"] == "/architecture"
    with pytest.raises(ApiError, match="there is no sweep"):
        server.client.cancel("nothing")


def test_a_sweep_is_changed_cancelled_retried_and_extended(server: Any) -> None:
    client = server.client
    client.pause()
    sweep = client.sweep(name="changing", base=JOB, grid={"seed": [231], "scale": [1, 2]})
    assert client.change(sweep.id, priority=3, labels={"study": "client"})["priority"] == 3
    [first, _] = client.jobs(sweep=sweep.id)
    assert client.change(first["id"], priority=-1)["priority"] == -1
    assert "paused" in client.explain(first["id"])["sentence"]
    assert sweep.cancel()["jobs"] == 2
    assert client.retry(first["id"])["state"] == "queued"
    assert client.retry(sweep.id)["jobs"] == 0
    assert client.retry(sweep.id, states=["cancelled"])["jobs"] == 1
    assert client.boost(first["id"])["boosted"] is True
    assert client.boost(sweep.id)["jobs"] == 1
    assert client.boost(sweep.id, boosted=False)["jobs"] == 2
    client.resume()
    assert sweep.extend(scale=[5])["jobs"] == 1
    assert sweep.wait()["state"] == "succeeded"
    assert {job["id"]: job["priority"] for job in client.jobs(sweep=sweep.id)}[first["id"]] == -1
    with pytest.raises(ApiError, match="there is no sweep"):
        client.change("nothing", priority=1)


def test_what_there_is(server: Any, tmp_path: Path) -> None:
    catalog = server.client.catalog()
    assert {"mlp", "resnet18"} <= set(catalog["architectures"])
    assert server.client.put_user("grace", role="researcher", weight=2.0)["weight"] == 2.0
    assert [user["weight"] for user in server.client.users() if user["name"] == "grace"] == [2.0]
    assert server.client.disable_user("grace")["disabled_at"]
    assert server.client.enable_user("grace")["disabled_at"] is None
    file = tmp_path / "bytes"
    file.write_bytes(b"some bytes")
    assert server.client.ready()["status"] == "ready"
    assert server.client.upload(file) == hashlib.sha256(b"some bytes").hexdigest()


def test_a_data_set(server: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 10)):
        x = generator.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.arange(n, dtype=np.int64) % 2)
    found = server.client.register_dataset("from-a-folder", tmp_path)
    assert (found["name"], found["channels"], found["test_count"]) == ("npz:from-a-folder", 1, 10)
    [registered] = [one for one in server.client.datasets() if one["name"] == found["name"]]
    assert registered["test_sha256"] == found["test_sha256"]
    assert server.client.register_dataset("from-a-folder", tmp_path)["train_sha256"] == found["train_sha256"]
    job = server.client.submit(JOB, dataset="npz:from-a-folder", samples=10)
    assert job.wait()["state"] == "succeeded"
    with pytest.raises(UncannyError, match=r"train\.npz is not there"):
        server.client.register_dataset("empty", tmp_path / "nowhere")


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", patience_seconds=0.3) as client:
        for call in (client.ready, lambda: client.submit(JOB), lambda: list(client.events())):
            with pytest.raises(Unreachable, match="uncanny serve"):
                call()


class Scripted(BaseHTTPRequestHandler):
    """Answers as `script` says, one entry a request; the last one again and again."""

    script: ClassVar[list[Callable[["Scripted"], None]]] = []
    asked: ClassVar[list[Any]] = []  # method, path and headers

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, self.headers))
        self.script[min(len(self.asked), len(self.script)) - 1](self)

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_PATCH(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, length: int | None = None, /, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    """Makes a client of a server that follows a script; its sleeps are noted in `slept` and not slept."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []
    clients: list[Client] = []

    def serve(*script: Callable[[Scripted], None], patience_seconds: float = 10) -> Client:
        handler = type("Handler", (Scripted,), {"script": list(script), "asked": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        client = Client(f"http://127.0.0.1:{server.server_port}", patience_seconds=patience_seconds)
        clients.append(client)
        client.asked = handler.asked  # type: ignore[attr-defined]
        return client

    yield serve
    for one in clients:
        one.close()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> "Clock":
    """The client's clock, which only its own sleeps move on."""
    clock = Clock()
    monkeypatch.setattr(transport, "time", clock)
    return clock


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def busy(after: str = "") -> Callable[[Scripted], None]:
    headers = {"Retry_After": after} if after else {}
    return lambda handler: handler.answer(503, b'{"detail": "the database is away"}', **headers)


def says(body: bytes, status: int = 200, kind: str = "application/json") -> Callable[[Scripted], None]:
    return lambda handler: handler.answer(status, body, Content_Type=kind)


def test_a_submission_is_repeated_under_one_key(scripted: Any, clock: Clock) -> None:
    client = scripted(busy(), Scripted.hang_up, says(b'{"id": "1", "state": "queued", "tasks": []}', 201))
    assert client.submit(JOB).id == "1"
    keys = [headers["Idempotency-Key"] for _, _, headers in client.asked]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert keys[0]
    assert len(clock.slept) == 2
    assert sum(clock.slept) < 1


def test_it_comes_back_when_the_service_says(scripted: Any, clock: Clock) -> None:
    client = scripted(busy("3"), busy("2"), busy("soon"), says(b"{}"))
    assert client.ready() == {}
    assert [round(seconds) for seconds in clock.slept] == [3, 2, 0]
    client = scripted(busy("3600"), patience_seconds=5)
    clock.slept.clear()
    with pytest.raises(ApiError, match="the database is away") as refused:
        client.ready()
    assert refused.value.status == 503
    assert sum(clock.slept) == pytest.approx(5, abs=0.5), "no longer than its patience"


def proxy(status: int, **headers: str) -> Callable[[Scripted], None]:
    """An answer of something that stands before the service."""
    return lambda handler: handler.answer(status, b"<html>Bad Gateway</html>", Content_Type="text/html", **headers)


SAFE = {
    "GET": lambda client: client.ready(),
    "submit": lambda client: client.submit(JOB),
    "sweep": lambda client: client.sweep(name="x", base=JOB),
    "extend": lambda client: client.extend("x", {"scale": [1]}),
    "dry run": lambda client: client.dry_run(JOB),
    "PUT": lambda client: client.put_user("ada"),
    "PATCH": lambda client: client.change("x", priority=1),
    "DELETE": lambda client: client.disable_user("ada"),
    "cancel": lambda client: client.cancel("x"),
    "retry": lambda client: client.retry("x"),
    "pause": lambda client: client.pause(),
    "retract": lambda client: client.retract("x", "why"),
}


@pytest.mark.parametrize("how", SAFE)
def test_what_is_safe_is_repeated_when_its_answer_is_lost(scripted: Any, clock: Clock, how: str) -> None:
    lost = (Scripted.hang_up, proxy(502), proxy(503), proxy(504), busy("2"), proxy(429, Retry_After="1"))
    client = scripted(*lost, says(b'{"id": "1"}'))
    SAFE[how](client)
    assert len(client.asked) == len(lost) + 1
    keys = {headers["Idempotency-Key"] for _, _, headers in client.asked}
    assert len(keys) == 1
    assert (None in keys) == (how not in ("submit", "sweep", "extend"))


@pytest.mark.parametrize("lost", [Scripted.hang_up, proxy(502), proxy(503), proxy(504)])
def test_what_is_not_safe_is_asked_once_and_said_to_be_done_perhaps(scripted: Any, clock: Clock, lost: Any) -> None:
    client = scripted(lost, says(b"{}", 201))
    with pytest.raises((Unanswered, ApiError), match=r"may have been done .*uncanny token list") as failed:
        client.create_token("laptop")
    assert "uncanny serve" not in str(failed.value)
    assert len(client.asked) == 1
    scripted(proxy(429), says(b"{}", 201)).create_token("laptop")


def test_work_whose_answer_never_came_may_exist(scripted: Any, clock: Clock) -> None:
    for script, kind in ((Scripted.hang_up, Unanswered), (proxy(502), ApiError)):
        client = scripted(script, patience_seconds=5)
        with pytest.raises(kind, match=r"`(uv run )?uncanny jobs`, `(uv run )?uncanny sweeps`") as failed:
            client.submit(JOB)
        assert "uncanny serve" not in str(failed.value)
        assert len(client.asked) > 3
    client = scripted(Scripted.hang_up, says(b'{"detail": "job x is cancelled"}', 409))
    with pytest.raises(ApiError, match=r"is cancelled \(an earlier try got no answer"):
        client.cancel("x")
    client = scripted(Scripted.hang_up, patience_seconds=1)
    with pytest.raises(Unreachable, match="does not answer") as failed:
        client.ready()
    assert "serve" not in str(failed.value)


def test_a_time_to_come_back_may_be_a_date(scripted: Any, clock: Clock) -> None:
    then = datetime.now(UTC) + timedelta(seconds=7)
    client = scripted(proxy(503, Retry_After=format_datetime(then, usegmt=True)), says(b"{}"))
    client.ready()
    assert clock.slept[0] == pytest.approx(6.5, abs=1)


def test_patience_is_longer_than_the_services_own_waits() -> None:
    with Client("http://127.0.0.1:1") as client:
        assert client.patience_seconds > BUSY_SECONDS + LONGEST_PAUSE_SECONDS + RETRY_AFTER_SECONDS[503]
    assert client.patience_seconds > REACH_SECONDS


def test_a_long_export_that_breaks_is_started_again(scripted: Any, clock: Clock, tmp_path: Path) -> None:
    def late(handler: Scripted) -> None:
        clock.now += 1000  # longer than any patience
        handler.answer(200, b"half", 8)
        handler.hang_up()

    client = scripted(late, late, says(b"all of it", kind="text/csv"))
    assert client.export(tmp_path / "rows.csv").read_bytes() == b"all of it"
    assert len(client.asked) == 3
    client = scripted(late)
    with pytest.raises(Unreachable):
        client.export(tmp_path / "never.csv")
    assert len(client.asked) == transport.RESTARTS + 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"", b"[]", b"\xff"])
def test_something_else_that_answers_is_said(scripted: Any, body: bytes) -> None:
    client = scripted(says(body, kind="text/html"))
    for call in (client.ready, lambda: client.submit(JOB), lambda: list(client.jobs())):
        with pytest.raises(ApiError, match="text/html and not with JSON: is it the address of an Uncanny service"):
            call()


def test_events_go_on_after_the_database_was_away(scripted: Any, clock: Clock) -> None:
    def events(*parts: bytes) -> Callable[[Scripted], None]:
        return says(b"".join(parts), kind="text/event-stream")

    one, two = (f"event: task.queued\ndata: {{}}\nid: {i}\n\n".encode() for i in (7, 8))
    client = scripted(
        busy("1"),
        events(b"id: 6\n\n"),
        busy("1"),
        events(b"id: 6\n\n", b": ping\n\n", one),
        busy(),
        busy(),
        events(two),
    )
    seen = list(itertools.islice(client.events(), 2))
    assert [event.id for event in seen] == [7, 8]
    assert [headers["Last-Event-ID"] for _, _, headers in client.asked] == [None, None, "6", "6", "7", "7", "7"]

    for script, kind in ((busy("1"), ApiError), (says(b"<html>", kind="text/html"), Unreachable)):
        client = scripted(script, patience_seconds=3)
        with pytest.raises(kind):
            list(client.events())
    with pytest.raises(ApiError, match="no such job"):
        list(scripted(says(b'{"detail": "no such job"}', 404)).events(job="x"))


def test_weights_may_take_longer_to_check_than_other_answers(
    scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = scripted(says(b"{}"))
    waited: list[Any] = []
    request = client._http.request

    def noted(method: str, path: str, **more: Any) -> Any:
        waited.append(more.get("timeout", client._http.timeout).read)
        return request(method, path, **more)

    monkeypatch.setattr(client._http, "request", noted)
    (tmp_path / "weights").write_bytes(b"")
    client.register_checkpoint("x", tmp_path / "weights", architecture="mlp", dataset="digits")
    assert waited == [120, 400]
    assert waited[1] > checkpoints.FITTING_SECONDS + checkpoints.TURN_SECONDS


def test_every_method_of_the_client_is_called_on_a_real_server(
    server: Any, called: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the tests of this module, and here what is left."""
    tests = {name for name in globals() if name.startswith("test_")}
    if tests - {item.originalname for item in request.session.items if isinstance(item, pytest.Function)}:
        pytest.skip("not all tests of this module were asked for")
    one = server.client
    job = one.submit(JOB, seed=221)
    job.wait()
    assert one.result(job.id)["job_id"] == job.id
    assert job.id.startswith(one.short_ids([job.id])[job.id])
    assert next(one.events(job=job.id, follow=False)).data["job_id"] == job.id
    assert one.cluster()["leading"]
    assert one.queue()["paused"] is False
    assert one.me()["name"] == "ada"
    one.put_user("ada", role="researcher")
    token = one.create_token("laptop", user="ada")
    assert token["id"] in {row["id"] for row in one.tokens(user="ada")}
    assert one.revoke_token(token["id"])["revoked_at"]
    assert one.checkpoints() == []
    assert next(one.networks(recipe="standard", architecture=JOB["architecture"]))["jobs"] >= 1
    (tmp_path / "weights").write_bytes(b"no weights")
    with pytest.raises(ApiError, match="not safetensors"):
        one.register_checkpoint("none", tmp_path / "weights", architecture="mlp", dataset="digits")
    groups = one.aggregate("seed", "robust_accuracy:mean", "seed = 221")
    assert len(groups.to_pandas()) == len(list(groups)) == 1
    public = {
        f"{kind.__name__}.{name}"
        for kind in CLASSES
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("_")
    }
    assert len(public) > 50
    assert public - called == set()
