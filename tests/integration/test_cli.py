"""The commands: what they print, and their exit codes."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.core
import typer.main
import yaml
from httpx_sse import connect_sse
from rich.console import Console
from scipy.stats import binomtest

from api.cli import report
from api.cli.commands.submitting import _show_event
from api.cli.main import app, main
from api.client import ApiError, Event, client, render
from api.client.render import percent
from service.model import verdict

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
JOB: dict[str, Any] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}


def commands(group: typer.core.TyperGroup, *names: str) -> Iterator[list[str]]:
    """Every command as the words that one writes."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, *names, name)
        else:
            yield [*names, name]


COMMANDS = list(commands(typer.main.get_command(app)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def uncanny(*arguments: Any, url: str = "", home: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """What the command `uncanny ARGUMENTS` does, in this process."""
    environment = {"UNCANNY_URL": url, "UNCANNY_HOME": str(home) if home else "", **(env or {})}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["uncanny", *map(str, arguments)])
        for name, value in environment.items():
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())


def sentence(done: Done, code: int) -> str:
    """The one line that a command that failed says on stderr."""
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    specs: dict[str, Any] = {
        "sweep": {"name": "cli", "base": {**JOB, "seed": 301}, "grid": {"scale": [1, 2]}},
        "job": {**JOB, "seed": 301, "scale": 3},
        "failing": {"name": "cli fails", "base": JOB, "grid": {"seed": [301, 666]}},
        "refused": {**JOB, "architecture": "resnet19"},
    }
    for name, spec in specs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "job.json").write_text(json.dumps(specs["job"]))
    return {path.name: path for path in tmp_path.iterdir()}


def test_a_sweep_from_file_to_results(server: Any, files: dict[str, Path]) -> None:
    done = uncanny("submit", files["sweep.yaml"], "--wait", "--json", url=server.url)
    assert done.returncode == 0, done.stderr
    sweep = json.loads(done.stdout)
    assert sweep["state"] == "succeeded"

    rows = json.loads(uncanny("results", f"sweep={sweep['id']}", "--sort", "scale", "--json", url=server.url).stdout)
    assert [row["scale"] for row in rows] == [1, 2]
    shown = uncanny("results", f"sweep={sweep['id']}", "scale=2", url=server.url).stdout
    assert "50.0 %" in shown
    assert shown.count("mlp") == 1
    text = uncanny("results", f"sweep={sweep['id']}", "--fields", "scale,attack.norm", "--csv", url=server.url).stdout
    assert text.splitlines()[0] == "scale,attack.norm"
    whole = json.loads(uncanny("results", rows[0]["job_id"], "--json", url=server.url).stdout)
    assert "parts" in whole

    assert len(json.loads(uncanny("jobs", f"sweep={sweep['id']}", "--json", url=server.url).stdout)) == 2
    chosen = f"sweep = {sweep['id']!r} and state = succeeded and not attack.eps > 9"
    assert len(json.loads(uncanny("jobs", "--filter", chosen, "--json", url=server.url).stdout)) == 2
    assert "closed_forms" in uncanny("jobs", rows[0]["job_id"], url=server.url).stdout
    assert sweep["id"] in uncanny("sweeps", url=server.url).stdout
    watched = uncanny("watch", sweep["id"], "--json", url=server.url)
    assert watched.returncode == 0
    said = [json.loads(line)["event"] for line in watched.stdout.splitlines()]
    assert (said[0], said.count("job.succeeded")) == ("sweep.submitted", 2)  # all of it, though it has ended
    again = uncanny("watch", sweep["id"], "--json", url=server.url)
    assert again.stdout == watched.stdout

    one = uncanny("results", rows[0]["job_id"], url=server.url).stdout
    assert "verdict_checks.zero_gradient" in one
    assert "provenance.torch" in one
    job = uncanny("results", f"sweep={sweep['id']}", "--fields", "job_id", "--csv", url=server.url).stdout
    assert "\r" not in job


def test_a_report_of_a_sweep(server: Any, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"name": "reported", "base": {**JOB, "scale": 5}, "grid": {
        "seed": [311, 312, 313], "attack": ["pgd_l2", "pgd_linf", {"type": "fgsm", "norm": "linf", "eps": "8/255"}],
        "recipe": [{"epochs": 2}, {"epochs": 2, "lr": 0.05}],
    }, "include": [{"seed": 311, "attack_seed": 1, "attack": "pgd_l2", "recipe": {"epochs": 2}}]}  # fmt: skip
    (tmp_path / "reported.yaml").write_text(yaml.safe_dump(spec))
    sweep = json.loads(uncanny("submit", tmp_path / "reported.yaml", "--wait", "--json", url=server.url).stdout)["id"]
    again = {**spec["base"], "seed": 311, "recipe": {"epochs": 2}}
    server.client.submit(again).wait()  # nothing new: not counted

    found = json.loads(uncanny("report", f"sweep={sweep}", "--json", url=server.url).stdout)
    assert (found["computations"], len(found["groups"])) == (19, 6)
    assert {(group["recipe.lr"], group["robust_accuracy"]["count"]) for group in found["groups"]} == {
        (0.1, 3),
        (0.05, 3),
    }
    counts = Counter((group["networks"], group["results"]) for group in found["groups"])
    assert counts == {(3, 3): 5, (3, 4): 1}  # one network was attacked a second time
    assert [one["computations"] for one in found["made_by"]] == [19]
    rows = server.client.results(sweep=sweep)
    reasons = Counter(reason for row in rows for reason in row["verdict_reasons"])
    assert found["reasons"] == dict(reasons)
    assert sum(n for group in found["groups"] for n in group["verdicts"].values()) == 19
    assert found["most"] == {
        reason: max(row["verdict_counts"][reason] for row in rows if reason in row["verdict_reasons"])
        for reason in reasons
        if any(reason in row["verdict_counts"] for row in rows)
    }

    text = uncanny("report", sweep, url=server.url).stdout
    titles = [line for line in text.splitlines() if line.startswith("## digits")]
    assert titles == sorted(titles)
    assert len(titles) == 3
    one = next(line for line in text.splitlines() if "standard, lr 0.05" in line)
    mean, low, high = (found["groups"][0]["robust_accuracy"][name] for name in ("mean", "ci95_low", "ci95_high"))
    interval = f"{percent(low)} to {percent(high)} of images"  # three networks without a spread
    right = binomtest(20, 20).proportion_ci(method="wilson")
    clean = f"100.0 % | {percent(right.low)} to 100.0 % of images"
    assert f"| mlp | standard, lr 0.05 | 5 | 3 | 3 | {clean} | {percent(mean)} | {interval} |" in one
    attacked_again = [line for line in text.splitlines() if "| mlp | standard, lr 0.1 | 5 | 3 | 4 |" in line]
    assert len(attacked_again) == 1
    assert "Means over `n` trained networks" in text
    chosen = ("--filter", f"sweep = {sweep} and attack.norm = l2 and recipe.lr = 0.1")
    board = uncanny("leaderboard", *chosen, "--any-verdict", "--scale", "all", url=server.url).stdout
    assert re.search(r"networks +results .*\n.* mlp +standard +5 +3 +4 ", board)
    groups = uncanny("aggregate", *chosen, "--by", "scale", "--metrics", "robust_accuracy:count", url=server.url).stdout
    assert re.search(r"scale +results +networks +robust_accuracy\.count *\n *5 +4 +3 +3", groups)
    wilson = binomtest(10, 20).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high))
    for reason, (count, of) in found["most"].items():
        assert f"| `{reason}` | {reasons[reason]} | {count} of {of} images | {report.meaning(reason)} |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|") and "lr 0" in line}
    assert columns == {14}

    done = uncanny("report", sweep, "--output", tmp_path / "report.md", url=server.url)
    assert done.returncode == 0
    assert (tmp_path / "report.md").read_text().count("standard, lr") == 6
    assert "no result matches" in sentence(uncanny("report", "scale=77", url=server.url), 1)


def test_every_reason_of_a_verdict_has_a_meaning() -> None:
    assert report.MEANING.keys() == {check.partition(":")[0] for check in verdict.CHECKS} | {"weak_loss"}


def test_questions_to_all_results(server: Any, tmp_path: Path) -> None:
    sweep = server.sweep("asked", seed=302)
    chosen = ("--filter", f"sweep = {sweep['id']}")

    def asked(*arguments: Any) -> Any:
        done = uncanny(*arguments, url=server.url)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    rows = asked("results", *chosen, "--sort", "scale", "--json")
    assert [row["scale"] for row in rows] == [1, 5]
    groups = asked("aggregate", *chosen, "--by", "scale", "--metrics", "robust_accuracy:mean", "--json")
    assert [group["robust_accuracy"]["mean"] for group in groups] == [0.5, 0.5]
    assert "robust_accuracy.mean" in asked("aggregate", *chosen, "--by", "scale")
    [board] = asked("leaderboard", *chosen, "--any-verdict", "--json")
    assert len(board["rows"]) == 1
    assert "mlp" in asked("leaderboard", *chosen, "--any-verdict", "--scale", "all")
    [worst] = asked("worst-cases", *chosen, "--json")
    assert worst["attack_count"] == len(worst["attacks"]) == 1
    assert worst["weights_sha256"][:12] in asked("worst-cases", *chosen)
    ids = [row["job_id"] for row in rows]
    assert asked("compare", *ids, "--json")["examples"] == 20
    assert "Robust against all of them: 50.0 %" in asked("compare", *ids)
    assert asked("correlations", "log_relative_sharpness_median", *chosen, "--any-verdict", "--json")[0]["n"] == 1
    shown = asked("correlations", "log_relative_sharpness_median", *chosen, "--any-verdict")
    assert "pgd linf" in shown
    assert "confounded by design" in shown
    assert asked("export", tmp_path / "asked.csv", *chosen, "--json")["size_bytes"] > 0
    assert len((tmp_path / "asked.csv").read_text().splitlines()) == 3
    assert asked("retract", ids[0], "--reason", "to see it go", "--json")["retracted"] == [ids[0]]
    assert len(asked("results", *chosen, "--json")) == 1
    left_out = uncanny("export", tmp_path / "asked.csv", *chosen, url=server.url).stderr
    assert "1 retracted results are left out" in left_out
    assert ids[0] in asked("retract", ids[0], "--undo")
    for wrong in (("retract", ids[0]), ("retract", "--reason", "x"), ("export", tmp_path / "asked.xlsx")):
        sentence(uncanny(*wrong, url=server.url), 2)


def test_that_nothing_matches_is_said(server: Any) -> None:
    """On stderr, for what stands on stdout are rows."""
    for command in (
        ["results", "architecture=vgg11_bn"], ["jobs", "seed=987654"], ["aggregate", "architecture=vgg11_bn"],
        ["leaderboard", "architecture=vgg11_bn"], ["correlations", "clean_accuracy", "architecture=vgg11_bn"],
    ):  # fmt: skip
        done = uncanny(*command, url=server.url)
        assert (done.returncode, done.stdout) == (0, ""), command
        assert " match" in done.stderr
    for more in ([], ["--json"]):
        done = uncanny("retract", "--filter", "architecture = vgg11_bn", "--reason", "a typo", *more, url=server.url)
        assert done.returncode == 1
        assert "No result" in done.stderr


def test_recipes_of_a_leaderboard_are_told_apart(server: Any) -> None:
    server.sweep("told apart", seed=320, **{"recipe.epochs": [3, 4]})
    shown = uncanny("leaderboard", "seed=320", "--any-verdict", url=server.url).stdout
    assert "standard, epochs 3" in shown
    assert "standard, epochs 4" in shown


def test_a_terminal_that_is_narrow_breaks_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "out", Console(width=40))
    job_id, reason = "01a22578-97ed-7290-babc-d27411e22b04", "it failed for a reason that takes more than forty columns"
    out = io.StringIO()
    with redirect_stdout(out):
        render.show(render.table(["job", "reason"], [[job_id, reason]]))
    assert job_id in out.getvalue()
    assert " ".join(out.getvalue().replace(job_id, "").split()) == f"job reason {reason}"


def test_submitting_prints_the_next_commands(server: Any, files: dict[str, Path]) -> None:
    for name in ("job.yaml", "job.json", "sweep.yaml"):
        done = uncanny("submit", files[name], url=server.url)
        assert done.returncode == 0, done.stderr
        assert "uncanny watch" in done.stdout
        assert "uncanny results" in done.stdout


def test_a_file_called_minus_is_stdin(server: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(files["sweep.yaml"].read_bytes()), "ascii"))
    done = uncanny("submit", "-", "--dry-run", "--json", url=server.url)
    assert done.stdout == uncanny("submit", files["sweep.yaml"], "--dry-run", "--json", url=server.url).stdout


def test_a_typing_error_is_no_empty_list(server: Any) -> None:
    sweep = server.sweep("by its name", seed=305)
    assert "did you mean failed?" in sentence(uncanny("jobs", "state=faild", url=server.url), 4)
    said = sentence(uncanny("results", "--filter", "not verdict in (suspct, invald)", url=server.url), 4)
    assert "did you mean suspect?" in said
    assert "did you mean by its name?" in sentence(uncanny("results", "sweep=by its nam", url=server.url), 4)
    with pytest.raises(ApiError, match="did you mean mlp"):
        list(server.client.jobs(architecture="mpl"))
    for named in ("by its name", sweep["id"][:-1]):
        shown = uncanny("results", f"sweep={named}", "--json", url=server.url).stdout
        assert {row["sweep_id"] for row in json.loads(shown)} == {sweep["id"]}
        assert len(list(server.client.results(sweep=named))) == 2
    everything = list(server.client.results(f"sweep = '{sweep['name']}' and created_at = {sweep['created_at'][:10]}"))
    assert len(everything) == 2


def test_a_gap_of_events_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _show_event(Event(9, "gap", {"from": 1, "to": 9}), as_json=False)
    assert capsys.readouterr().err.startswith("Events 1 to 9 are not kept any more")
    _show_event(Event(9, "gap", {"from": 1, "to": 9}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"id": 9, "event": "gap", "data": {"from": 1, "to": 9}}


def test_a_dry_run_submits_nothing(server: Any, files: dict[str, Path]) -> None:
    before = len(list(server.client.jobs()))
    for name in ("job.yaml", "sweep.yaml"):
        done = uncanny("submit", files[name], "--dry-run", url=server.url)
        assert done.returncode == 0
        assert "Nothing was submitted" in done.stdout
    preview = json.loads(uncanny("submit", files["sweep.yaml"], "--dry-run", "--json", url=server.url).stdout)
    assert preview["jobs"] == 2
    assert len(list(server.client.jobs())) == before


def test_failed_jobs_are_exit_code_1(server: Any, files: dict[str, Path]) -> None:
    done = uncanny("submit", files["failing.yaml"], "--wait", "--json", url=server.url)
    assert done.returncode == 1
    sweep = json.loads(done.stdout)
    assert sweep["jobs"]["failed"] == 1
    [named] = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert re.search(r"^cli fails: \d0? %, \d/2 jobs, ETA ", done.stderr, re.MULTILINE)  # stderr is no terminal
    assert "mlp on digits" in named
    assert "seed 666" in named
    assert "diverged" in named
    assert uncanny("watch", sweep["id"], url=server.url).returncode == 1
    retried = uncanny("retry", sweep["id"], "--json", url=server.url)
    assert json.loads(retried.stdout)["jobs"] == 1
    assert "1 job of sweep" in uncanny("retry", server_wait(server, sweep["id"]), url=server.url).stdout


def test_ctrl_c_while_waiting_is_130_and_the_work_goes_on(server: Any, tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump({**JOB, "seed": 777, "scale": 2.5}))
    command = [sys.executable, "-m", "api.cli", "submit", str(tmp_path / "slow.yaml"), "--wait", "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().split()[-1].rstrip(".")
        server.running(job_id)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"watch {job_id}" in said
    assert "Traceback" not in said
    assert server.client.job(job_id)["state"] == "running"
    server.client.cancel(job_id)


def test_a_reader_that_has_seen_enough_is_no_error(server: Any) -> None:
    server.sweep("read in part", seed=312, scale=[1, 2, 3])
    for command in ("results", "jobs"):
        line = f"{shlex.quote(sys.executable)} -m api.cli {command} --json --url {server.url} | head -1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "[\n"
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


def server_wait(server: Any, sweep_id: str) -> str:
    server.ended(f"/v1/sweeps/{sweep_id}")
    return sweep_id


def test_cancel(server: Any) -> None:
    job = server.client.submit(JOB, seed=777)
    assert "cancelled" in uncanny("cancel", job.id, url=server.url).stdout
    assert "is cancelled" in sentence(uncanny("cancel", job.id, url=server.url), 4)
    assert "there is no" in sentence(uncanny("cancel", "nothing", url=server.url), 4)


def test_what_the_service_refuses_is_exit_code_4_with_the_problem_document(server: Any, files: dict[str, Path]) -> None:
    assert "resnet18" in sentence(uncanny("submit", files["refused.yaml"], url=server.url), 4)
    assert "robust_accuracy" in sentence(uncanny("results", "--sort", "robust_acuracy", url=server.url), 4)
    assert "no job and no sweep" in sentence(uncanny("watch", "nothing", url=server.url), 4)
    done = uncanny("submit", files["refused.yaml"], "--json", url=server.url)
    assert done.returncode == 4
    problem = json.loads(done.stdout)
    assert (problem["status"], problem["errors"][0]["pointer"]) == (422, "/architecture")


def test_bad_usage_is_exit_code_2(server: Any, tmp_path: Path) -> None:
    assert "cannot read" in sentence(uncanny("submit", tmp_path / "nowhere.yaml", url=server.url), 2)
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }")
    assert "neither YAML nor JSON" in sentence(uncanny("submit", tmp_path / "broken.yaml", url=server.url), 2)
    (tmp_path / "twice.yaml").write_text("architecture: mlp\narchitecture: simple_cnn\n")
    assert "line 2" in sentence(uncanny("submit", tmp_path / "twice.yaml", url=server.url), 2)
    (tmp_path / "nan.yaml").write_text("{architecture: mlp, dataset: digits, attack: pgd_l2, scale: .nan}")
    assert "/scale is nan" in sentence(uncanny("submit", tmp_path / "nan.yaml", url=server.url), 2)
    (tmp_path / "list.yaml").write_text("- 1")
    assert "mapping" in sentence(uncanny("submit", tmp_path / "list.yaml", url=server.url), 2)
    assert "FIELD=VALUE" in sentence(uncanny("results", "a", "b", url=server.url), 2)
    assert "UNCANNY" not in sentence(uncanny("jobs", url=server.url, env={"UNCANNY_PORT": "many"}), 2)
    for arguments in (["nonsense"], ["submit"], ["results", "--limit", "x"]):
        done = uncanny(*arguments, url=server.url)
        assert done.returncode == 2
        assert "Usage" in done.stderr


def test_nobody_answers_is_exit_code_3(files: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert url in sentence(uncanny("submit", files["job.yaml"], url=url), 3)
    assert "uncanny serve" in sentence(uncanny("jobs", "--url", url, home=tmp_path), 3)


def test_data(server: Any, tmp_path: Path) -> None:
    for split, n in (("train", 20), ("test", 10)):
        x = np.zeros((n, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.arange(n, dtype=np.int64) % 2)
    done = uncanny("data", "add", "from-the-cli", tmp_path, url=server.url)
    assert "npz:from-the-cli: 20 training and 10 test images of 3x8x8, 2 classes" in done.stdout
    assert "npz:from-the-cli" in uncanny("data", "list", url=server.url).stdout
    assert json.loads(uncanny("data", "list", "--json", url=server.url).stdout)
    assert "is not there" in sentence(uncanny("data", "add", "x", tmp_path / "nowhere", url=server.url), 1)


def test_db(tmp_path: Path) -> None:
    missing = uncanny("db", "status", home=tmp_path)
    assert missing.returncode == 1
    assert "uncanny db upgrade" in missing.stdout
    assert list(tmp_path.iterdir()) == []  # looking writes nothing
    made = json.loads(uncanny("db", "upgrade", "--json", home=tmp_path).stdout)
    assert (made["before"], made["database"].endswith("uncanny.db")) == (None, True)
    assert f"schema {made['schema']} -> {made['schema']}" in uncanny("db", "upgrade", home=tmp_path).stdout
    assert "none -> " in uncanny("db", "upgrade", home=tmp_path / "other").stdout
    status = uncanny("db", "status", "--json", home=tmp_path)
    assert (status.returncode, json.loads(status.stdout)["current"]) == (0, True)


def test_the_installed_command(server: Any, files: dict[str, Path]) -> None:
    command = [str(Path(sys.executable).parent / "uncanny"), "submit", str(files["refused.yaml"])]
    environment = {**os.environ, "UNCANNY_URL": server.url}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert "resnet18" in sentence(Done(done.returncode, done.stdout, done.stderr), 4)


def test_help_names_the_exit_codes() -> None:
    for command in (*COMMANDS, []):
        assert "Exit codes" in uncanny(*command, "--help").stdout, command


def test_every_command_speaks_json() -> None:
    """But for those that run until they are stopped, and the document that is JSON already."""
    silent = [" ".join(command) for command in COMMANDS if "--json" not in uncanny(*command, "--help").stdout]
    assert silent == ["api", "dispatch", "openapi"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_the_shell_completes_commands(shell: str) -> None:
    command = [str(Path(sys.executable).parent / "uncanny")]
    environment = {**os.environ, "_UNCANNY_COMPLETE": f"source_{shell}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert "_UNCANNY_COMPLETE" in done.stdout
    assert "--show-completion" in uncanny("--help").stdout
    words = {"COMP_WORDS": "uncanny res", "COMP_CWORD": "1", "_UNCANNY_COMPLETE": "complete_bash"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **words}, check=True)
    assert sorted(done.stdout.split()) == ["results", "resume"]


def test_the_catalogue_has_what_jobs_can_name_and_every_number(server: Any) -> None:
    shown = uncanny("catalog", url=server.url).stdout
    assert all(word in shown for word in ("resnet18", "pgd_linf", "sam_sharpness", "robust_accuracy", "share, 0..1"))
    some = uncanny("catalog", "valley", url=server.url).stdout
    assert "valley_loose_{valley}" in some
    assert "robust_accuracy" not in some
    whole = json.loads(uncanny("catalog", "--json", url=server.url).stdout)
    assert whole == server.client.catalog()
    assert "has 'no such' in its name" in uncanny("catalog", "no such", url=server.url).stderr


def test_rows_that_are_not_shown_are_said(server: Any) -> None:
    sweep = server.sweep("many", seed=303, scale=[1, 2, 3])
    for command in (["results", f"sweep={sweep['id']}"], ["jobs", f"sweep={sweep['id']}"], ["sweeps"]):
        for kind in (["--json"], ["--csv"], []):
            if kind == ["--csv"] and command[0] != "results":
                continue
            cut = uncanny(*command, *kind, "--limit", "1", url=server.url)
            assert cut.returncode == 0
            assert cut.stderr.startswith("There are more than this one: --limit shows more"), cut
            assert "These are" not in cut.stdout
            assert kind != ["--json"] or len(json.loads(cut.stdout)) == 1
    whole = uncanny("results", f"sweep={sweep['id']}", "--json", "--limit", "3", url=server.url)
    assert (len(json.loads(whole.stdout)), whole.stderr) == (3, "")
    assert "`uncanny export FILE`" in uncanny("results", "--limit", "1", url=server.url).stderr


def test_watching_goes_on_while_the_database_is_away(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.client.submit(JOB, seed=304)
    job.wait()
    stream, refused = connect_sse, iter([True, True])

    def moody(http: Any, method: str, path: str, **more: Any) -> Any:
        return stream(http, method, "/v1/away" if next(refused, False) else path, **more)

    def away(response: Any) -> None:
        if response.url.path == "/v1/away":
            raise ApiError(503, {"detail": "the database is away"})

    monkeypatch.setattr(client, "connect_sse", moody)
    monkeypatch.setattr(client, "check", away)
    watched = uncanny("watch", job.id, "--json", url=server.url)
    assert watched.returncode == 0, watched.stderr
    assert json.loads(watched.stdout.splitlines()[0])["event"] == "job.submitted"
    assert next(refused, None) is None


@pytest.mark.parametrize(("name", "jobs", "trainings"), [("quick.yaml", 84, 6), ("paper.yaml", 112, 8)])
def test_the_examples_are_accepted(server: Any, name: str, jobs: int, trainings: int) -> None:
    preview = json.loads(uncanny("submit", EXAMPLES / name, "--dry-run", "--json", url=server.url).stdout)
    assert (preview["jobs"], preview["tasks"]["train"]) == (jobs, trainings)


def test_the_curl_script_runs_as_it_is(server: Any) -> None:
    environment = {**os.environ, "UNCANNY_URL": server.url}
    script = EXAMPLES / "curl.sh"
    done = subprocess.run([script], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep is succeeded" in done.stdout
    assert "event: job.succeeded" in done.stdout
    assert "scale,attack.norm,clean_accuracy" in done.stdout


def test_backup_and_restore(server: Any, tmp_path: Path) -> None:
    """Of a service at work; and its results are those of the service that is made of the backup."""
    server.sweep("backup", seed=302)
    home, folder = tmp_path / "home", tmp_path / "backups"
    folder.mkdir()
    said = uncanny("db", "backup", folder, home=server.settings.home)
    assert said.returncode == 0, said
    [made] = folder.iterdir()
    assert said.stdout.startswith(f"{made}: ")
    assert f"Now copy {server.settings.artifacts}." in said.stdout
    back = json.loads(uncanny("db", "restore", made, "--json", home=home).stdout)
    assert back["rows"]["results"] >= 2
    assert back["missing_artifacts"]
    assert "is not empty" in sentence(uncanny("db", "restore", made, home=home), 1)
    again = uncanny("db", "restore", made, "--replace", home=home)
    assert f"artifacts are not under {home / 'artifacts'}, so copy them there:" in again.stdout
    made.write_bytes(made.read_bytes()[:-100])
    assert "not all of a backup" in sentence(uncanny("db", "restore", made, "--replace", home=home), 1)
