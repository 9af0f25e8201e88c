"""Questions about results, as clients and the shell ask them: of a real server, whose numbers are made up."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
import yaml
from rich.console import Console
from scipy.stats import binomtest
from typer.testing import CliRunner, Result

from api.cli.main import app
from api.cli.snapshots import NoSnapshot, verify
from api.client import ApiError, Client, render
from service.errors import UncannyError

pytestmark = pytest.mark.slow

SCALES, SEEDS = [1, 5, 50], [0, 1, 2]
RESNET = "architecture = resnet18 and dataset = cifar10"


@dataclass(frozen=True)
class Lab:
    """A server with a sweep over scales and seeds, and what its client says of it."""

    server: Any  # as `running_server` of the conftest gives it
    client: Client
    sweep: str

    def ids(self, **filters: Any) -> list[str]:
        return [row["job_id"] for row in self.client.results(sort="created_at", **filters)]

    def uncanny(self, *arguments: Any, code: int = 0) -> Result:
        done = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [*map(str, arguments), "--url", self.server.url])
        assert done.exit_code == code, done.output + repr(done.exception)
        return done


@pytest.fixture(scope="module")
def lab(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with start_server(tmp_path_factory.mktemp("questions")) as server:
        base = {"architecture": "resnet18", "dataset": "cifar10", "attack": "pgd_linf", "samples": 20}
        sweep = server.client.sweep(name="questions", base=base, grid={"scale": SCALES, "seed": SEEDS})
        assert sweep.wait()["state"] == "succeeded"
        yield Lab(server, server.client, sweep.id)


def test_robust_accuracy_per_scale_as_a_frame(lab: Lab) -> None:
    found = lab.client.aggregate("scale", "robust_accuracy:mean,ci95", "architecture = resnet18")
    frame = found.to_polars()
    assert frame.columns == [
        "scale", "results", "networks", "robust_accuracy.mean", "robust_accuracy.ci95_low", "robust_accuracy.ci95_high",
        "robust_accuracy.ci95_of",
    ]  # fmt: skip
    assert frame["scale"].to_list() == SCALES
    assert frame["robust_accuracy.mean"].to_list() == [0.5, 0.5, 1.0]
    half, all_of_them = (binomtest(k, 20).proportion_ci(method="wilson").low for k in (10, 20))  # of 20 images
    assert frame["robust_accuracy.ci95_low"].to_list() == pytest.approx([half, half, all_of_them])
    assert set(frame["robust_accuracy.ci95_of"]) == {"images"}  # the three networks show no spread
    assert list(found.to_pandas()["results"]) == list(found.to_pandas()["networks"]) == [3, 3, 3]
    assert found.spread_of == "networks"
    with pytest.raises(ApiError, match="within one network, and a group has 3"):
        lab.client.aggregate("scale", filter=RESNET, unit="attack_seed")
    one = lab.client.aggregate("scale", filter=RESNET, unit="attack_seed", seed=1)
    assert (one.spread_of, one.items[0]["robust_accuracy"]["count"]) == ("attack_seeds", 1)
    with pytest.raises(ApiError, match="unit"):
        lab.client.aggregate("scale", filter=RESNET, unit="image")  # type: ignore[arg-type]
    with pytest.raises(ApiError, match=r"allow mixing \(allow_mixed\)") as refused:
        lab.client.aggregate(filter=RESNET)
    assert refused.value.status == 422
    assert lab.client.aggregate(filter=RESNET, allow_mixed=True).mixed["scale"] == SCALES
    assert [item["scale"] for item in lab.client.aggregate(by=["scale"], metrics=["clean_accuracy:mean"], seed=1)] == (
        SCALES
    )


def test_rows_and_frames(lab: Lab) -> None:
    rows = lab.client.results(f"{RESNET} and scale < 50", sort="scale,seed", limit=4)
    assert [(row["scale"], row["seed"]) for row in rows] == [(s, seed) for s in (1, 5) for seed in SEEDS]
    frame = rows.to_polars()
    assert (frame.height, frame["scale"].to_list()) == (6, [1, 1, 1, 5, 5, 5])
    assert frame["created_at"].dtype == pl.Datetime("ms", "UTC")
    few = lab.client.results(fields=["scale", "attack.norm", "flip_rate"], seed=[0], sort="scale").to_pandas()
    assert list(few.columns) == ["scale", "attack.norm", "flip_rate"]
    assert few["flip_rate"].tolist() == [0.5] * 3
    with pytest.raises(ApiError, match="architecture"):
        lab.client.results("architektur = resnet18").to_polars()


def test_a_frame_without_its_library(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(UncannyError, match="needs polars: `pip install polars`"):
        lab.client.results().to_polars()


def test_comparing(lab: Lab) -> None:
    a, b = lab.ids(seed=0, scale=[5, 50])
    found = lab.client.compare(a, b)
    assert found["differing"] == {"scale": [5, 50]}
    [pair] = found["pairs"]
    assert (pair["only_a"], pair["only_b"], pair["difference"]) == (0, 10, -0.5)
    assert pair["p_value"] == pytest.approx(2 * 0.5**10)
    assert json.loads(lab.uncanny("compare", a, b, "--json").output) == found
    shown = lab.uncanny("compare", a, b).output
    assert "-0.5" in shown
    assert "\x1b" not in shown
    with pytest.raises(ApiError, match="there is no job"):
        lab.client.compare(a, "nothing")


def test_leaderboard(lab: Lab) -> None:
    [board] = lab.client.leaderboard(RESNET, attack="pgd_linf", trusted=False)
    [row] = board["rows"]
    assert (board["threat_model"], board["preset"]) == ("linf 8/255", "pgd_linf")
    assert (row["networks"], row["seeds"], row["robust_accuracy"], row["scale"]) == (3, 3, 0.5, 1)
    assert (row["robust_accuracy_worst_case"], row["ci95_of"]) == (0.5, "images")
    assert [(attack["preset"], attack["networks"]) for attack in row["attacks"]] == [("pgd_linf", 3)]
    assert len(lab.client.leaderboard(scale="all", trusted=False)[0]["rows"]) == 3
    every = json.loads(lab.uncanny("leaderboard", "--any-verdict", "--scale", "all", "--json").output)
    assert every == lab.client.leaderboard(scale="all", trusted=False)
    shown = lab.uncanny("leaderboard", "--any-verdict", "attack=pgd_linf").output
    for said in ("linf 8/255, with pgd_linf", "worst case", "50.0 %", "of images"):
        assert said in shown
    assert "No trusted results match" in lab.uncanny("leaderboard", "seed=99").output
    assert "No results match" in lab.uncanny("leaderboard", "seed=99", "--any-verdict").output
    [one] = lab.ids(seed=0, scale=1)
    worst = lab.client.result(one)["worst_case"]
    assert (worst["robust_accuracy"], worst["results"], worst["n"]) == (0.5, 3, 20)
    assert [row["flags"] for row in lab.client.results(f"job_id = {one}")] == [[]]


def test_correlations(lab: Lab) -> None:
    [found] = lab.client.correlations("log_relative_sharpness_median", RESNET, trusted=False)
    assert (found["n"], found["pooled"]) == (3, None)  # one point per network, and fewer than ten
    assert (found["over_scales"]["n"], found["over_scales"]["tau"] < 0) == (9, True)
    command = ["correlations", "log_relative_sharpness_median", "--any-verdict"]
    assert json.loads(lab.uncanny(*command, "--json").output) == [found]
    assert "cifar10" in lab.uncanny(*command, "--filter", RESNET).output


def test_curves_of_several(lab: Lab) -> None:
    ids = lab.ids(seed=0)
    items = lab.client.trajectories(*ids, parts="attack")
    assert [item["job_id"] for item in items] == ids
    assert {tuple(item["curves"]) for item in items} == {("attack",)}
    assert items[0]["curves"]["attack"] == lab.client.trajectory(ids[0])["attack"]
    with pytest.raises(ApiError, match="unknown field 'nothing'"):
        lab.client.trajectories(*ids, parts="nothing")


def test_commands_for_rows_and_groups(lab: Lab) -> None:
    rows = json.loads(lab.uncanny("results", "--filter", f"{RESNET} and scale = 5", "--json").output)
    assert [row["scale"] for row in rows] == [5, 5, 5]
    arguments = ["aggregate", "architecture=resnet18", "--by", "scale", "--metrics", "robust_accuracy:mean,count"]
    items = json.loads(lab.uncanny(*arguments, "--json").output)
    assert [item["robust_accuracy"]["count"] for item in items] == [3, 3, 3]
    shown = lab.uncanny(*arguments).output
    assert "robust_accuracy.mean" in shown
    assert "n is the number of trained networks" in shown
    within = lab.uncanny(*arguments, "seed=1", "--unit", "attack_seed").output
    assert "n is the number of attack seeds" in within
    assert "within one network" in str(lab.uncanny(*arguments, "--unit", "attack_seed", code=1).exception)
    assert "No results" in lab.uncanny("aggregate", "--filter", "seed = 99").output
    refused = lab.uncanny("aggregate", "--by", "colour", code=1)
    assert "colour" in str(refused.exception)


@pytest.mark.parametrize("suffix", [".csv", ".ndjson", ".parquet"])
def test_files(lab: Lab, tmp_path: Path, suffix: str) -> None:
    path = lab.client.export(tmp_path / f"rows{suffix}", RESNET, sort="scale,seed", fields="scale,seed")
    read: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".csv": pl.read_csv,
        ".ndjson": pl.read_ndjson,
        ".parquet": pl.read_parquet,
    }
    assert read[suffix](path)["scale"].to_list() == [s for s in SCALES for _ in SEEDS]
    lab.uncanny(
        "export", tmp_path / f"again{suffix}", "--fields", "scale,seed", "--sort", "scale,seed", "--filter", RESNET
    )
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_a_refused_export_leaves_what_was_there(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("mine")
    with pytest.raises(ApiError, match="unknown field"):
        lab.client.export(tmp_path / "rows.csv", "colour = red")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert (tmp_path / "rows.csv").read_text() == "mine"
    with pytest.raises(UncannyError, match=r"\.parquet"):
        lab.client.export(tmp_path / "rows.xlsx")
    with pytest.raises(UncannyError, match="cannot write"):
        lab.client.export(tmp_path / "nowhere" / "rows.csv")


class Moody(BaseHTTPRequestHandler):
    """Answers 503, then hangs up in the middle of the rows, and only then as it should."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, body = (503, b"{}") if len(self.asked) == 1 else (200, b"scale\n1\n50\n")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:8] if len(self.asked) == 2 else body)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_export_that_breaks_off_starts_again(tmp_path: Path) -> None:
    moody = HTTPServer(("127.0.0.1", 0), Moody)
    thread = threading.Thread(target=moody.serve_forever, args=(0.02,))
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{moody.server_port}", patience_seconds=20) as client:
            assert client.export(tmp_path / "rows.csv", "scale > 0").read_text() == "scale\n1\n50\n"
    finally:
        moody.shutdown()
        thread.join()
        moody.server_close()
    assert len(Moody.asked) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_snapshot(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    made = json.loads(
        lab.uncanny("export", "--snapshot", folder, "--filter", f"{RESNET} and scale = 5", "--json").output
    )
    assert made["results"] == 3
    assert {path.name for path in folder.iterdir()} == {
        "CITATION.cff", "README.md", "SHA256SUMS", "results.parquet", "specs.ndjson",
    }  # fmt: skip
    frame = pl.read_parquet(folder / "results.parquet")
    specs = [json.loads(line) for line in (folder / "specs.ndjson").read_text().splitlines()]
    assert [spec["job_id"] for spec in specs] == frame["job_id"].to_list() == lab.ids(scale=5)
    assert [spec["spec_digest"] for spec in specs] == frame["spec_digest"].to_list()
    assert lab.client.submit(specs[0]["spec"]).wait()["spec_digest"] == specs[0]["spec_digest"]
    weights = [lab.client.result(job_id)["weights_sha256"] for job_id in frame["job_id"]]
    assert [json.loads(one)["weights_sha256"] for one in frame["provenance"]] == weights
    assert len(set(weights)) == 3
    citation = yaml.safe_load((folder / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # those that the format asks for
    data = hashlib.sha256((folder / "results.parquet").read_bytes()).hexdigest()
    assert citation["identifiers"][0]["value"] == f"sha256:{data}"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert verify(folder).wrong == []
    assert verify(folder).sha256 == made["sha256"]
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
    with pytest.raises(NoSnapshot, match="already"):
        raise lab.uncanny("export", "--snapshot", folder, code=1).exception or AssertionError
    with pytest.raises(NoSnapshot, match="nothing to freeze"):
        raise lab.uncanny("export", "--snapshot", tmp_path / "empty", "seed=99", code=1).exception or AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["frozen"]


@pytest.mark.parametrize("name", ["results.parquet", "specs.ndjson", "CITATION.cff", "README.md", "SHA256SUMS"])
def test_a_snapshot_that_was_touched(lab: Lab, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "frozen"
    lab.uncanny("export", "--snapshot", folder, "scale=1")
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert verify(folder).wrong
    (folder / name).write_bytes(content)
    assert verify(folder).wrong == []
    (folder / "more.csv").write_text("x")
    assert verify(folder).wrong == ["more.csv was added"]
    (folder / "more.csv").unlink()
    (folder / name).unlink()
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert name in done.output + str(done.exception)


def test_retraction(lab: Lab) -> None:
    base = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
    sweep = lab.client.sweep(name="retracted", base=base, grid={"scale": [1, 5], "seed": [0, 1]})
    sweep.wait()
    first = lab.ids(sweep=sweep.id, scale=1, seed=0)[0]
    before = lab.server.http.get("/v1/events", params={"job": first, "follow": False, "after": 0}).text
    done = lab.client.retract(first, "the attack was wrong", rerun=True)
    assert done["retracted"] == [first]
    [again] = done["resubmitted"]
    job = ended(lab, again)
    assert (job["state"], job["spec"]["replicate"]) == ("succeeded", 1)
    assert first not in lab.ids(sweep=sweep.id)
    assert first in lab.ids(sweep=sweep.id, include_retracted=True)
    [count] = lab.client.aggregate(sweep=sweep.id, by="", allow_mixed=True)
    [with_it] = lab.client.aggregate(sweep=sweep.id, allow_mixed=True, include_retracted=True)
    assert (count["results"], with_it["results"]) == (3, 4)
    whole = lab.client.result(first)
    assert (whole["retracted_by"], whole["retraction_reason"]) == ("ada", "the attack was wrong")
    events = lab.server.http.get("/v1/events", params={"job": first, "follow": False, "after": 0}).text
    assert "result.retracted" not in before
    assert "result.retracted" in events
    other = lab.ids(sweep=sweep.id, scale=5, seed=0)[0]
    curves = lab.server.http.get(f"/v1/results/{first}/trajectory").json()
    compared = lab.client.compare(other, first)["results"]
    for named in (curves, compared[1], lab.client.trajectories(other, first)[1]):
        assert (named["retracted_by"], named["retraction_reason"]) == ("ada", "the attack was wrong")
        assert named["retracted_at"]
    assert compared[0]["retracted_at"] is None
    with pytest.raises(ApiError, match="retracted already") as refused:
        lab.client.retract(first, "again")
    assert refused.value.status == 409
    assert lab.client.restore(first)["restored"] == [first]
    assert first in lab.ids(sweep=sweep.id)

    chosen = f"sweep = {sweep.id} and scale = 5"
    assert len(lab.client.retract(filter=chosen, reason="a bug in scaling")["retracted"]) == 2
    assert {row["scale"] for row in lab.client.results(sweep=sweep.id)} == {1}
    reasons = {row["retraction_reason"] for row in lab.client.results(chosen, include_retracted=True)}
    assert reasons == {"a bug in scaling"}
    [hidden, _] = lab.ids(filter=chosen, include_retracted=True)
    assert hidden in lab.uncanny("retract", hidden, "--undo").output
    assert hidden in lab.uncanny("retract", hidden, "--reason", "after all").output
    shown = lab.ids(sweep=sweep.id)
    done = json.loads(
        lab.uncanny("retract", "--filter", f"sweep = {sweep.id}", "--reason", "everything", "--json").output
    )
    assert done["retracted"] == sorted(shown)
    command = ["results", "--filter", chosen, "--json"]
    assert json.loads(lab.uncanny(*command).output) == []
    assert len(json.loads(lab.uncanny(*command, "--include-retracted").output)) == 2
    assert lab.ids(sweep=sweep.id) == []
    lab.uncanny("retract", hidden, code=1)


def test_all_that_rests_on_a_training_is_retracted_and_restored(lab: Lab) -> None:
    base = {"architecture": "mlp", "dataset": "digits", "samples": 20, "seed": 77}
    base["attack"] = {"type": "fgsm", "norm": "linf", "eps": 0.1}
    sweep = lab.client.sweep(name="spoiled", base=base, grid={"scale": [1, 5]})
    sweep.wait()
    both = lab.ids(sweep=sweep.id)
    for wrong, sentence in (
        ((both[0], "--training", both[0], "--reason", "two"), "give one of"),
        (("--training", both[0], "--measure", "sam_sharpness", "--reason", "two"), "--measure needs --filter"),
        (("--training", both[0]), "say why"),
    ):
        assert sentence in str(lab.uncanny("retract", *wrong, code=1).exception)
    said = lab.uncanny("retract", "--training", both[0], "--reason", "trained on the wrong split", "--rerun").output
    assert all(job_id in said for job_id in both)
    [fifth, sixth] = next(line for line in said.splitlines() if "resubmitted" in line).split(": ")[1].split(", ")
    assert all(ended(lab, job_id)["state"] == "succeeded" for job_id in (fifth, sixth))
    chosen = f"seed = 77 and sweep = {sweep.id}"
    hidden = lab.client.results(chosen)
    assert (list(hidden), hidden.retracted, lab.client.results(chosen, include_retracted=True).retracted) == ([], 2, 0)
    assert (lab.client.aggregate(filter=chosen).retracted, lab.client.aggregate(filter=chosen).items) == (2, [])
    assert "2 retracted results are hidden" in lab.uncanny("results", "--filter", chosen).output
    boards = lab.server.http.get("/v1/leaderboard", params={"filter": "seed = 77", "trusted": False}).json()
    assert (boards["retracted"], len(boards["items"][0]["rows"])) == (2, 1)
    train = next(task for task in lab.client.job(both[0])["tasks"] if task["roles"] == ["train"])
    whole = lab.server.http.get(f"/v1/tasks/{train['id']}").json()
    assert (whole["retraction_reason"], whole["joined"]) == ("trained on the wrong split", False)
    assert (whole["retracted_with"], whole["digest"]) == (train["id"], train["digest"])
    newer = lab.server.http.get(f"/v1/tasks/{train['digest']}").json()
    assert (newer["generation"], newer["joined"], newer["retracted_at"]) == (2, True, None)
    said = lab.uncanny("retract", "--undo", "--filter", chosen).output
    assert all(job_id in said for job_id in both)
    assert "there is a newer generation" in said
    assert lab.client.results("seed = 77 and architecture = mlp").retracted == 0
    assert len(lab.ids(filter="seed = 77 and architecture = mlp")) == 4
    lab.uncanny("retract", "--undo", "--filter", chosen, code=1)
    assert lab.client.retract(task=train["id"], reason="after all")["retracted"] == sorted(both)
    assert lab.client.restore(training=both[1])["restored"] == sorted(both)


def ended(lab: Lab, job_id: str) -> dict[str, Any]:
    """The job at its end."""
    while (job := lab.client.job(job_id, wait_seconds=10))["state"] in ("queued", "running"):
        pass
    return job


def test_a_progress_bar_where_somebody_looks(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=seen, force_terminal=True))
    job = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20, "seed": 7}
    lab.client.sweep(name="watched", base=job, grid={"scale": [1, 2]}).wait()
    assert "100%" in seen.getvalue()
    assert "2/2 jobs" in seen.getvalue()


def test_a_filter_that_is_wrong_says_where(lab: Lab) -> None:
    for path, text, position in (
        ("/v1/results", "architecture = mlp and atack.eps = 1", 23),
        ("/v1/jobs", "scale = five", 8),
        ("/v1/results:aggregate", "scale = 1 or (seed = 1", 22),
        ("/v1/leaderboard", "scale ~ 5", 0),
    ):
        refused = lab.server.http.get(path, params={"filter": text})
        assert refused.status_code == 422
        [error] = refused.json()["errors"]
        assert (error["parameter"], error["position"]) == ("filter", position)


@pytest.mark.parametrize("asked", [{}, {"NO_COLOR": "1"}])
def test_colours_are_left_out_on_request(lab: Lab, asked: dict[str, str]) -> None:
    environment = {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "FORCE_COLOR": "1", **asked}
    command = [sys.executable, "-m", "api.cli", "results", "--filter", RESNET, "--url", lab.server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "resnet18" in done.stdout
    assert bool(re.search(r"\x1b\[[\d;]*[349]\dm", done.stdout)) is not bool(asked)
