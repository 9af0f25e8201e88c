"""Pausing, changing, extending, explaining and dry runs over real HTTP, and as commands."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from api.cli.main import main
from api.client import ApiError
from service.store import Database, users

pytestmark = pytest.mark.slow

BASE = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
NOBODY = "01939d3e-7b1f-7c3e-a2d4-5f60718293a4"


@pytest.fixture(scope="module")
def quiet(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server without a dispatcher: what is queued stays so."""
    with start_server(tmp_path_factory.mktemp("quiet"), dispatching=False) as running:
        yield running


def problem(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["detail"])


def submit_sweep(server: Any, **grid: list[Any]) -> str:
    return str(server.client.sweep(name="s", base=BASE, grid=grid or {"scale": [1, 5]}).id)


class TestPause:
    def test_a_sweep(self, quiet: Any) -> None:
        sweep = submit_sweep(quiet, seed=[1])
        paused = quiet.http.post(f"/v1/sweeps/{sweep}:pause")
        assert (paused.status_code, paused.json()["state"]) == (200, "paused")
        assert quiet.client.get_sweep(sweep)["state"] == "paused"
        assert quiet.http.post(f"/v1/sweeps/{sweep}:resume").json()["state"] == "running"
        quiet.client.cancel(sweep)
        assert "has ended" in problem(quiet.http.post(f"/v1/sweeps/{sweep}:pause"), 409)
        problem(quiet.http.post(f"/v1/sweeps/{NOBODY}:pause"), 404)
        problem(quiet.http.post(f"/v1/sweeps/{NOBODY}:resume"), 404)

    def test_the_queue(self, quiet: Any) -> None:
        quiet.client.submit(BASE, seed=2)
        assert not quiet.client.queue()["paused"]
        paused = quiet.http.post("/v1/queue:pause", headers={"X-Uncanny-User": "root"}).json()
        assert (paused["paused"], paused["paused_by"]) == (True, "root")
        assert quiet.client.dry_run(BASE)["queue"]["paused"]
        resumed = quiet.client.resume()
        assert (resumed["paused"], resumed["paused_by"]) == (False, None)
        assert resumed["jobs"]["queued"] >= 1
        assert resumed["tasks"]["train"]["queued"] >= 1
        [ada] = [user for user in resumed["users"] if user["user"] == "ada"]
        assert ada == {
            "user": "ada", "weight": 1.0, "device_seconds": 0.0, "gpus_in_use": 0.0, "max_gpus": None, "waiting": True,
        }  # fmt: skip

    def test_a_paused_sweep_waits_and_then_ends(self, server: Any) -> None:
        quiet_for = server.client.sweep(name="p", base={**BASE, "seed": 777}, grid={"scale": [1]})
        server.client.pause(quiet_for.id)
        assert server.client.get_sweep(quiet_for.id)["state"] == "paused"
        done = server.client.sweep(name="q", base={**BASE, "seed": 778}, grid={"scale": [1]}).wait()
        assert done["state"] == "succeeded"
        server.client.cancel(quiet_for.id)


class TestChange:
    @pytest.mark.parametrize("noun", ["jobs", "sweeps"])
    def test_only_what_was_seen(self, quiet: Any, noun: str) -> None:
        ident = submit_sweep(quiet, seed=[3]) if noun == "sweeps" else quiet.client.submit(BASE, seed=3).id
        path = f"/v1/{noun}/{ident}"
        seen = quiet.http.get(path).headers["ETag"]
        changed = quiet.http.patch(path, json={"priority": 4, "labels": {"a": "b"}}, headers={"If-Match": seen})
        assert changed.status_code == 200
        assert (changed.json()["priority"], changed.json()["labels"]) == (4, {"a": "b"})
        now = changed.headers["ETag"]
        assert now != seen
        assert now == quiet.http.get(path).headers["ETag"]
        late = quiet.http.patch(path, json={"priority": 5}, headers={"If-Match": seen})
        assert "was changed since you looked at it" in problem(late, 412)
        weak = quiet.http.patch(path, json={"priority": 5}, headers={"If-Match": f"W/{now}"})
        problem(weak, 412)
        one_of = quiet.http.patch(path, json={"priority": 5}, headers={"If-Match": f"{seen}, {now}"})
        assert one_of.json()["priority"] == 5
        assert "If-Match" in problem(quiet.http.patch(path, json={"priority": 6}), 428)
        assert quiet.http.patch(path, json={"priority": 6}, headers={"If-Match": "*"}).json()["labels"] == {"a": "b"}
        problem(quiet.http.patch(f"/v1/{noun}/{NOBODY}", json={"priority": 1}, headers={"If-Match": "*"}), 404)

    @pytest.mark.parametrize(
        "body", [{}, {"priority": 101}, {"priority": None}, {"state": "queued"}, {"labels": {"a": 1}}]
    )
    def test_bad_changes_are_refused(self, quiet: Any, body: dict[str, Any]) -> None:
        job = quiet.client.submit(BASE, seed=4).id
        problem(quiet.http.patch(f"/v1/jobs/{job}", json=body, headers={"If-Match": "*"}), 422)

    def test_an_ended_job_has_no_priority_any_more(self, quiet: Any) -> None:
        job = quiet.client.submit(BASE, seed=5).id
        quiet.client.cancel(job)
        response = quiet.http.patch(f"/v1/jobs/{job}", json={"priority": 1}, headers={"If-Match": "*"})
        assert "is cancelled, so its priority cannot be changed" in problem(response, 409)


class TestExtend:
    def test_new_cells_only(self, quiet: Any) -> None:
        sweep = submit_sweep(quiet, scale=[1, 5], seed=[6])
        key = {"Idempotency-Key": "extend once"}
        bodies = [
            quiet.http.post(f"/v1/sweeps/{sweep}:extend", json={"grid": {"scale": [5, 100]}}, headers=key)
            for _ in range(2)
        ]
        assert bodies[0].json() == bodies[1].json()
        assert bodies[1].headers["Idempotency-Replayed"] == "true"
        assert bodies[0].json()["jobs"] == 1
        seen = quiet.client.get_sweep(sweep)
        assert (seen["jobs"]["total"], seen["spec"]["grid"]["scale"]) == (3, [1, 5, 100])

    def test_what_is_no_axis_or_no_value_is_refused(self, quiet: Any) -> None:
        sweep = submit_sweep(quiet, scale=[1], seed=[7])
        for grid, said in [({"epochs": [1]}, "is not an axis"), ({"scale": [0]}, "/grid/scale"), ({}, "grid")]:
            response = quiet.http.post(f"/v1/sweeps/{sweep}:extend", json={"grid": grid})
            assert said in problem(response, 422)
        problem(quiet.http.post(f"/v1/sweeps/{NOBODY}:extend", json={"grid": {"scale": [1]}}), 404)


class TestDryRunAndExplain:
    def test_a_job_and_a_sweep(self, quiet: Any) -> None:
        before = quiet.client.queue()["jobs"]
        job = quiet.client.dry_run({**BASE, "seed": 8})
        assert job["to_compute"] == {"train": 1, "attack": 1, "control": 1, "measure": 1}
        assert (job["jobs"], job["estimate"]["device_seconds_p50"]) == (1, None)
        assert "nothing like it has run here yet" in job["estimate"]["reason"]
        sweep = quiet.client.dry_run({"name": "s", "base": {**BASE, "seed": 8}, "grid": {"scale": [1, 5]}})
        assert (sweep["jobs"], sweep["quota"]["unfinished_jobs_after"]) == (2, sweep["quota"]["unfinished_jobs"] + 2)
        assert quiet.client.queue()["jobs"] == before
        with pytest.raises(ApiError, match="architecture"):
            quiet.client.dry_run({**BASE, "architecture": "nope"})

    def test_history_gives_seconds(self, server: Any) -> None:
        server.sweep("history", seed=9)
        estimate = server.client.dry_run({**BASE, "seed": 10})["estimate"]
        assert estimate["device_seconds_p90"] >= estimate["device_seconds_p50"] > 0
        assert {row["kind"] for row in estimate["history"]} == {"train", "measure", "attack", "control"}
        assert estimate["eta_seconds"] is not None

    def test_explain(self, quiet: Any, server: Any) -> None:
        job = quiet.client.submit(BASE, seed=11)
        said = quiet.client.explain(job.id)
        assert "no dispatcher leads" in said["sentence"]
        assert {task["state"] for task in said["tasks"]} == {"queued", "blocked"}
        problem(quiet.http.get(f"/v1/jobs/{NOBODY}/explain"), 404)
        [done] = list(server.client.results(sweep=server.sweep("x", seed=12, scale=[1])["id"]))
        assert server.client.explain(done["job_id"])["sentence"] == "it has ended: succeeded"

    def test_a_quota_is_told_and_kept(self, quiet: Any) -> None:
        database = Database(quiet.settings.database)
        with database.write() as connection:
            users.put_user(connection, database.now(connection), "eve", {"max_queued_jobs": 1})
        database.close()
        eve = {"X-Uncanny-User": "eve"}
        sweep = {"name": "s", "base": {**BASE, "seed": 13}, "grid": {"scale": [1, 5]}}
        told = quiet.http.post("/v1/sweeps", params={"dry_run": True}, json=sweep, headers=eve).json()["quota"]
        assert (told["fits"], told["max_queued_jobs"]) == (False, 1)
        refused = quiet.http.post("/v1/sweeps", json=sweep, headers=eve)
        assert "eve may have 1 jobs waiting or running and has 0; 2 more do not fit" in problem(refused, 403)
        assert quiet.http.post("/v1/jobs", json=BASE, headers=eve).status_code == 201


@pytest.fixture
def run(
    quiet: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """What a command does on the quiet server: `(exit code, what it prints)`."""

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("UNCANNY_URL", quiet.url)
        monkeypatch.setattr("sys.argv", ["uncanny", *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, capsys.readouterr().out

    return command


class TestCommands:
    def test_of_a_sweep(self, quiet: Any, run: Callable[..., tuple[int, str]]) -> None:
        sweep = submit_sweep(quiet, scale=[1, 5], seed=[14])
        assert run("pause", sweep) == (0, f"sweep {sweep} is paused: what runs is finished, nothing more is started\n")
        assert json.loads(run("resume", sweep, "--json")[1])["state"] == "running"
        code, said = run("extend", sweep, "scale=100,200")
        assert code == 0
        assert said.startswith(f"2 new jobs in sweep {sweep}; to compute: ")
        assert json.loads(run("extend", sweep, "scale=300", "--json")[1])["jobs"] == 1
        assert run("extend", sweep, "scale")[0] == 2
        assert run("extend", sweep, "sede=3")[0] == 4
        assert run("priority", sweep, "7") == (0, f"{sweep} has priority 7\n")
        assert json.loads(run("priority", "--json", "--", sweep, "-3")[1])["priority"] == -3
        assert run("cancel", sweep) == (0, f"5 jobs of sweep {sweep} cancelled\n")
        code, said = run("retry", sweep)
        assert (code, said.splitlines()[0]) == (0, f"0 jobs of sweep {sweep} retried")
        assert "5 cancelled stay so" in said
        assert run("retry", sweep, "--states", "faild")[0] == 4
        assert run("retry", sweep, "--states", "failed,cancelled") == (0, f"5 jobs of sweep {sweep} retried\n")
        assert run("boost", sweep) == (0, f"5 jobs of sweep {sweep} boosted\n")
        assert json.loads(run("boost", sweep, "--off", "--json")[1])["jobs"] == 5

    def test_of_a_job_and_the_queue(self, quiet: Any, run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        job = quiet.client.submit(BASE, seed=15).id
        code, said = run("explain", job)
        assert code == 0
        assert "no dispatcher leads" in said
        assert json.loads(run("explain", job, "--json")[1])["job_id"] == job
        assert json.loads(run("priority", job, "2", "--json")[1])["priority"] == 2
        assert run("pause") == (0, "the queue is paused: what runs is finished, nothing more is started\n")
        assert "paused by" in run("queue")[1]
        assert run("resume")[0] == 0
        assert json.loads(run("queue", "--json")[1])["paused"] is False
        file = tmp_path / "job.json"
        file.write_text(json.dumps({**BASE, "seed": 16}))
        code, said = run("submit", str(file), "--dry-run")
        assert code == 0
        assert "Device seconds: unknown (nothing like it has run here yet" in said
        assert said.rstrip().endswith("Nothing was submitted.")
        assert run("cancel", job) == (0, f"job {job} cancelled\n")
        assert run("priority", job, "2")[0] == 4
