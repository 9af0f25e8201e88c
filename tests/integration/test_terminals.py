"""What terminals show: narrow, dumb and ASCII ones, names full of markup, readers that have seen enough."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from api.cli.main import app as cli
from api.client import ApiError, render
from api.client.terminal import plain, spoken_to

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_l2", "samples": 20}
NAMES = ["[/red]", "[bold]x[/]", ":smile:", "a\\", "[link=http://x]y[/link]", "100 % [", "Žofie 你好"]


def ask(server: Any, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, its output on pipes."""
    command = [sys.executable, "-m", "api.cli", *arguments, "--url", server.url]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, env=environment)


def on_a_terminal(server: Any, *arguments: str, columns: int = 80, **environment: str) -> tuple[int, str]:
    """The exit code of a command and what it shows on a terminal of so many columns."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "api.cli", *arguments, "--url", server.url]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30", "NO_COLOR": "1", **environment}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(leader, 65536):
            shown += piece
    os.close(leader)
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def here(server: Any, *arguments: str, encoding: str = "utf-8") -> str:
    """What a command, run in this process, writes to an output of that encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    with spoken_to(out, io.StringIO()):
        cli([*arguments, "--url", server.url], standalone_mode=False)
    out.seek(0)
    return out.read()


@pytest.fixture(scope="module")
def named(server: Any) -> list[dict[str, Any]]:
    """Finished sweeps of two jobs each, with names that a terminal might take for something else."""
    return [server.sweep(name, seed=900 + i, scale=[1, 5]) for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def listed(server: Any) -> dict[str, str]:
    """The ids of two jobs of a finished sweep whose name is long; and one of everything that can be listed."""
    sweep = server.sweep("a sweep of which the name is longer than a narrow terminal is wide", seed=990, scale=[1, 5])
    job, other = (job["id"] for job in server.client.jobs(sweep=sweep["id"]))
    return {"job": job, "other": other, "sweep": sweep["id"]}


@pytest.mark.slow
def test_names_are_shown_as_they_are(server: Any, named: list[dict[str, Any]]) -> None:
    done = ask(server, "sweeps", "--limit", str(len(NAMES)))
    assert (done.returncode, done.stderr.partition("There are more")[0]) == (0, "")
    for sweep in named:
        assert any(sweep["id"] in line and f" {sweep['name']} " in line for line in done.stdout.splitlines())
    waited = ask(server, "watch", named[0]["id"])
    assert waited.returncode == 0
    assert "Traceback" not in waited.stderr


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_taken_for_markup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(render, "out", Console(**render.PLAIN, file=out, width=200))
    render.show(render.table(["name", name], [[name, name]], title=name))
    render.say(name)
    assert out.getvalue().count(name) == 5


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        out = io.StringIO()
        monkeypatch.setattr(render, "err", Console(**render.PLAIN, file=out, force_terminal=True, width=120))
        with render.sweep_progress(name) as update:
            update({"progress": 0.5})
        assert name in out.getvalue()


def test_nothing_steers_the_terminal() -> None:
    assert plain("a\x1b[31mb\x07\r\x9bc\u202ed\ne\tf") == "a\\x1b[31mb\\x07\\r\\x9bc\\u202ed\ne\tf"


def test_a_sentence_beside_wide_columns_loses_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several columns were narrowed, and widened again beyond the edge, where a sentence was cut off."""
    sentence = (
        "the loss of some point rose by more than the bound with the distance that was realised, and by a tolerance"
    )
    row = ["a" * 60, "natural logarithm", "no such image, or the statistic falls on an exact zero", sentence]
    monkeypatch.setattr(render, "out", Console(width=100))
    render.show(render.table(["name", "unit", "null if", "formula"], [row, ["b", "share", "never", "short"]]))
    assert set(capsys.readouterr().out.split()) >= {word for cell in row for word in cell.split()}


@pytest.mark.slow
def test_ids_are_whole_on_a_line_of_80_columns_and_are_taken_as_they_are_shown(
    server: Any, named: list[dict[str, Any]]
) -> None:
    sweep = named[0]["id"]
    whole = {job["id"] for job in server.client.jobs(sweep=sweep)}
    for command, noun, ids in (
        (("jobs", f"sweep={sweep}"), "jobs", whole),
        (("results", f"sweep={sweep}"), "results", whole),
        (("sweeps", "--limit", "2"), "sweeps", {sweep["id"] for sweep in named[-2:]}),
    ):
        code, shown = on_a_terminal(server, *command)
        assert code == 0, shown
        first = re.findall("^([0-9a-f]{8}[0-9a-f-]*) ", shown, re.MULTILINE)
        assert len(first) == 2
        assert {next(ident for ident in ids if ident.startswith(short)) for short in first} == ids
        assert max(map(len, first)) < 36
        for short in first:
            path = f"/v1/{noun}/{short}"
            answer = server.http.get(path).json()
            assert answer.get("id", answer.get("job_id")) in ids


LISTING = (
    "jobs", "jobs {job}", "jobs state=succeeded", "sweeps", "results", "results {job}", "results --fields *",
    "results --fields job_id,sweep_id,weights_sha256", "aggregate sweep={sweep} --by architecture,attack.norm,scale",
    "aggregate --by job_id --metrics robust_accuracy:best,worst", "leaderboard", "compare {job} {other}",
    "correlations log_relative_sharpness_median --any-verdict", "queue", "user list", "token list",
    "checkpoint list", "checkpoint list --trained", "data list", "catalog valley",
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("command", LISTING)
def test_no_line_of_a_table_is_longer_than_the_terminal_is_wide(
    server: Any, listed: dict[str, str], command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    made = Console(**render.PLAIN, file=shown, force_terminal=True, color_system=None, width=columns)
    monkeypatch.setattr(render, "out", made)
    tables: list[str] = []
    usual = made.print

    def noted(*of: Any, **more: Any) -> None:
        with made.capture() as captured:
            usual(*of, **more)
        if isinstance(of[0], Table):  # sentences are left to the terminal: a command in one is to be copied
            tables.append(captured.get())

    monkeypatch.setattr(made, "print", noted)
    done = CliRunner().invoke(cli, [*command.format(**listed).split(), "--url", server.url])
    assert (done.exit_code, done.exception) == (0, None), done.output
    lines = [line for table in tables for line in table.splitlines()]
    assert lines, done.output
    assert [line for line in lines if cell_len(line.rstrip()) > columns] == []
    if columns == 40 and not command.startswith("aggregate"):
        assert listed["job"] not in "".join("".join(lines).split()), "an id that is broken cannot be copied"


def test_a_beginning_is_taken_by_routes(server: Any) -> None:
    sweep = server.sweep("by their beginnings", seed=940, scale=[1, 5])["id"]
    one, two = (job["id"] for job in server.client.jobs(sweep=sweep))
    short = server.client.short_ids([one, two, sweep])
    assert all(ident.startswith(prefix) and 8 <= len(prefix) < 36 for ident, prefix in short.items())
    for path in ("jobs/{}", "jobs/{}/explain", "results/{}", "results/{}/trajectory"):
        answer = server.http.get("/v1/" + path.format(short[one].upper())).json()
        assert answer.get("id", answer.get("job_id")) == one, path
    compared = server.client.compare(short[one], short[two])
    assert [row["job_id"] for row in compared["results"]] == [one, two]
    assert [row["job_id"] for row in server.client.trajectories(short[one])] == [one]
    for target in ({"job": short[one]}, {"sweep": short[sweep]}):
        assert "job.succeeded" in {event.kind for event in server.client.events(**target, follow=False)}
    assert server.client.change(short[one], labels={"a": "b"})["id"] == one
    assert server.client.change(short[sweep], labels={"a": "c"})["id"] == sweep
    task = server.client.job(one)["tasks"][0]
    assert server.client.task(task["digest"][:12])["id"] == task["id"]
    assert server.client.retract(short[one], "to see it go")["retracted"] == [one]
    assert server.client.restore(short[one])["restored"] == [one]
    for call in (server.client.job, server.client.get_sweep, server.client.cancel, server.client.result):
        with pytest.raises(ApiError, match=f"more than one id begins with {one[:8]}: ") as refused:
            call(one[:8])
        assert refused.value.status == 409
    with pytest.raises(ApiError, match="there is no sweep 00000000"):
        server.client.cancel("00000000")


@pytest.mark.slow
def test_a_beginning_is_taken_by_commands(server: Any, named: list[dict[str, Any]]) -> None:
    sweep = named[1]["id"]
    one, two = (job["id"] for job in server.client.jobs(sweep=sweep))
    short = server.client.short_ids([one, two, sweep])
    assert json.loads(ask(server, "results", short[one], "--json").stdout)["job_id"] == one
    assert json.loads(ask(server, "jobs", short[one], "--json").stdout)["id"] == one
    watched = ask(server, "watch", short[sweep], "--json").stdout.splitlines()
    assert sum("job.succeeded" in line for line in watched) == 2
    refused = ask(server, "cancel", one[:8])
    assert refused.returncode == 4
    assert f"more than one id begins with {one[:8]}: " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_token_is_revoked_by_the_beginning_of_its_id(start_server: Any, tmp_path: Any) -> None:
    from service.lab.access import Access, Caller
    from service.store import Database

    with start_server(tmp_path, dispatching=False, auth=True) as server:
        access = Access(Database(server.settings.database))
        for name in ("ada", "bob"):
            access.put_user(name, {}, actor="root")
        secrets = {name: access.create_token(name, "x", "submit", None, by=Caller("root")) for name in ("ada", "bob")}
        headers = {"Authorization": f"Bearer {secrets['ada']['secret']}"}
        made = server.http.post("/v1/tokens", json={"name": "y"}, headers=headers).json()
        both = server.http.delete(f"/v1/tokens/{made['id'][:8]}", headers=headers)
        assert both.status_code == 409
        assert secrets["ada"]["id"] in both.text
        assert secrets["bob"]["id"] not in both.text
        assert server.http.delete(f"/v1/tokens/{made['id'][:-1]}", headers=headers).json()["id"] == made["id"]
        assert server.http.delete(f"/v1/tokens/{secrets['bob']['id'][:-1]}", headers=headers).status_code == 404
        access.database.close()


@pytest.mark.slow
def test_ascii_is_enough(server: Any, named: list[dict[str, Any]]) -> None:
    done = ask(server, "sweeps", "--limit", str(len(NAMES)), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "\\u017dofie \\u4f60\\u597d" in done.stdout
    one = ask(server, "results", f"sweep={named[0]['id']}", PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C")
    assert (one.returncode, one.stdout.isascii()) == (0, True)
    assert "50.0 %" in one.stdout
    refused = ask(server, "jobs", "--filter", "user = Žofie and", PYTHONIOENCODING="ascii")
    assert refused.returncode == 4
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_dumb_terminal_gets_lines(server: Any, tmp_path: Any) -> None:
    (tmp_path / "job.json").write_text(json.dumps({**JOB, "seed": 950}))
    code, shown = on_a_terminal(server, "submit", str(tmp_path / "job.json"), "--wait", TERM="dumb")
    assert code == 0, shown
    assert "\x1b" not in shown
    assert "job.json: 0 %" in shown
    assert "succeeded" in shown


def test_a_command_in_ascii(server: Any, listed: dict[str, str]) -> None:
    name = "Žofie 你好"
    sweep = server.sweep(name, seed=991, scale=[1, 5])["id"]
    assert name in here(server, "sweeps", "--limit", "1")
    shown = here(server, "sweeps", "--limit", "1", encoding="ascii")
    assert "\\u017dofie \\u4f60\\u597d" in shown
    shown = here(server, "results", f"sweep={sweep}", encoding="ascii")
    assert "50.0 %" in shown


def test_a_dumb_terminal_gets_no_bar(server: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in a process of its own, which the slow test of lines tries."""
    (tmp_path / "job.json").write_text(json.dumps({**JOB, "seed": 952}))
    shown = io.StringIO()
    dumb = {"TERM": "dumb", "NO_COLOR": "1"}
    made = Console(**render.PLAIN, file=shown, force_terminal=True, width=80, _environ=dumb)
    assert made.is_dumb_terminal
    monkeypatch.setattr(render, "err", made)
    said = here(server, "submit", str(tmp_path / "job.json"), "--wait")
    assert "succeeded" in said + shown.getvalue()
    assert "job.json: 0 %" in shown.getvalue()
    assert "\x1b" not in said + shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["results"], ["results", "--csv"], ["results", "--json"], ["jobs"], ["--help"]])
def test_a_reader_that_closes_the_pipe_early_ends_a_command_quietly(
    server: Any, named: list[dict[str, Any]], command: list[str]
) -> None:
    url = [] if command == ["--help"] else ["--url", server.url]
    process = subprocess.Popen(
        [sys.executable, "-m", "api.cli", *command, *url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), said) == (0, "")


def test_signs_that_an_encoding_lacks_have_their_like() -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii", newline="")
    with spoken_to(out, io.StringIO()):
        print("– … → Žofie")
    out.seek(0)
    assert out.read() == "- ... -> \\u017dofie\n"


def test_streams_are_given_back() -> None:
    before = sys.stdout
    with spoken_to(io.StringIO(), io.StringIO()):
        assert sys.stdout is not before
    assert sys.stdout is before


@pytest.mark.slow
def test_a_retracted_result_says_so_first(server: Any) -> None:
    job = server.client.submit(JOB, seed=951)
    job.wait()
    server.client.retract(job.id, "the [/red] lamp was on")
    first = ask(server, "results", job.id).stdout.splitlines()[0]
    assert first.startswith("RETRACTED ")
    assert first.endswith("by ada: the [/red] lamp was on")
    server.client.restore(job.id)
    assert "RETRACTED" not in ask(server, "results", job.id).stdout


def test_the_first_line_of_a_result_says_that_it_is_retracted(server: Any) -> None:
    job = server.client.submit(JOB, seed=953)
    job.wait()
    assert "RETRACTED" not in here(server, "results", job.id)
    server.client.retract(job.id, "the [/red] lamp was on")
    first = here(server, "results", job.id).splitlines()[0]
    assert first.startswith("RETRACTED ")
    assert first.endswith("by ada: the [/red] lamp was on")
