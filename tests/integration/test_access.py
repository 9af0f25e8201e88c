"""Tokens: who gets in, how far, and that no route forgot to ask. The list of routes is the OpenAPI document's."""

import hashlib
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from access_table import ADMIN, NEEDED, PUBLIC, READ
from benchmarks.generated import fill
from sqlalchemy import insert, select, update
from typer.testing import CliRunner

from api.binding import NotLoopback, check_bind
from api.cli.main import app as cli
from api.client import ApiError, Client
from api.http.auth import FAILURES_PER_MINUTE, READING
from service.lab.access import Access, Caller
from service.settings import Settings
from service.store import Database
from service.store.result_tables import results
from service.store.tables import job_tasks, jobs

pytestmark = pytest.mark.slow

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
NOBODY = "00000000-0000-7000-8000-000000000000"


@dataclass(frozen=True)
class Lab:
    """A server that asks for tokens, an admin, a reader and two researchers by name."""

    server: Any  # as `running_server` of the conftest gives it
    secrets: dict[str, str]

    def http(self, who: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[who]}"}
        answer: httpx.Response = self.server.http.request(method, path, headers=headers, **more)
        return answer

    def client(self, who: str) -> Client:
        return Client(self.server.url, self.secrets[who])


@pytest.fixture(scope="module")
def lab(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with start_server(tmp_path_factory.mktemp("lab"), dispatching=False, auth=True) as server:
        access, root = Access(Database(server.settings.database)), Caller("root")
        secrets = {}
        roles = {"chief": ("admin", "admin"), "ada": ("researcher", "submit"), "bob": ("researcher", "submit")}
        for name, (role, scope) in (roles | {"rita": ("reader", "read")}).items():
            access.put_user(name, {"role": role}, actor="root")
            secrets[name] = access.create_token(name, "test", scope, None, by=root)["secret"]
        fill(access.database, 3)  # results of ada's
        access.database.close()
        yield Lab(server, secrets)


def routes(server: Any) -> list[tuple[str, str]]:
    """Every method and path of the OpenAPI document, and `HEAD` wherever there is `GET`."""
    paths: dict[str, dict[str, Any]] = server.http.get("/openapi.json").json()["paths"]
    listed = [(method.upper(), path) for path, operations in paths.items() for method in operations]
    return listed + [("HEAD", path) for method, path in listed if method == "GET"]


def needed(method: str, path: str) -> str:
    return NEEDED["GET" if method == "HEAD" else method, path]


def concrete(path: str, ident: str = NOBODY) -> str:
    """The path with something in place of each parameter, also of those that are new here."""
    return re.sub(r"{\w+_id}", ident, path.replace("{digest}", "0" * 64)).replace("{name}", "nobody")


def useless_secrets(lab: Lab) -> dict[str, str]:
    """Tokens that are none, or none any more."""
    with lab.client("ada") as ada:
        expired, revoked = ada.create_token("short", expires_in_days=1e-9), ada.create_token("lost")
        ada.revoke_token(revoked["id"])
    return {"forged": lab.secrets["ada"][:-1], "expired": expired["secret"], "revoked": revoked["secret"]}


def problem(response: httpx.Response, status: int) -> str:
    """What is said in a problem document of this status; nothing to a HEAD."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["detail"]) if response.content else ""


def test_no_route_answers_without_a_token_or_with_a_useless_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.auth.FAILURES_PER_MINUTE", 0)  # or these would soon be 429
    useless = useless_secrets(lab)
    asked = 0
    for method, path in routes(lab.server):
        if needed(method, path) == PUBLIC:
            assert lab.server.http.request(method, path).status_code == 200
            continue
        nothing = lab.server.http.request(method, concrete(path))
        assert ("Authorization: Bearer" in problem(nothing, 401)) == (method != "HEAD")
        assert nothing.headers["WWW-Authenticate"] == "Bearer"
        for secret in useless.values():
            headers = {"Authorization": f"Bearer {secret}"}
            problem(lab.server.http.request(method, concrete(path), headers=headers), 401)
        asked += 1
    assert asked >= 60


def test_every_change_takes_the_scope_to_submit_and_some_that_of_an_admin(lab: Lab) -> None:
    listed = routes(lab.server)
    for method, path in listed:
        lowest = needed(method, path)
        if lowest in (PUBLIC, READ):
            continue
        assert method == "HEAD" or repr(lowest) in problem(lab.http("rita", method, concrete(path)), 403)
        if lowest == ADMIN:
            problem(lab.http("ada", method, concrete(path)), 403)
    assert {pair for pair in NEEDED if "users" in pair[1]} <= set(listed)


def test_only_the_owner_and_admins_change_a_job_or_a_sweep(lab: Lab) -> None:
    job = lab.http("ada", "POST", "/v1/jobs", json=JOB).json()["id"]
    sweep = {"name": "hers", "base": JOB, "grid": {"scale": [1, 5]}}
    sweep_id = lab.http("ada", "POST", "/v1/sweeps", json=sweep).json()["id"]
    tried = 0
    for method, path in routes(lab.server):
        ident = job if "{job_id}" in path else sweep_id if "{sweep_id}" in path else None
        if method not in READING and needed(method, path) != ADMIN and ident is not None:
            said = problem(lab.http("bob", method, concrete(path, ident)), 403)
            assert "is ada's: only they or an admin can change it" in said
            tried += 1
    assert tried >= 4
    assert lab.http("bob", "GET", f"/v1/jobs/{job}").json()["user"] == "ada"
    assert lab.http("ada", "POST", f"/v1/jobs/{job}:cancel").json()["state"] == "cancelled"
    assert lab.http("chief", "POST", f"/v1/sweeps/{sweep_id}:cancel").json()["jobs"] == 2
    problem(lab.http("bob", "POST", f"/v1/jobs/{NOBODY}:cancel"), 404)


def test_a_result_that_others_rest_on_is_retracted_and_restored_by_admins_only(lab: Lab) -> None:
    database = Database(lab.server.settings.database)
    with database.write() as connection:
        first, second, third = connection.scalars(select(results.c.job_id).order_by(results.c.sequence))
        attack = connection.scalar(select(results.c.attack_task_id).where(results.c.job_id == first))
        for table, ident in ((results, results.c.job_id), (jobs, jobs.c.id)):  # as where bob asks for the same
            connection.execute(update(table).where(ident == second).values(user="bob", attack_task_id=attack))
        connection.execute(insert(job_tasks).values(job_id=second, task_id=attack))
    database.close()
    because = {"reason": "the attack was wrong"}
    for who, other in (("ada", "bob"), ("bob", "ada")):
        job = first if who == "ada" else second
        said = problem(lab.http(who, "POST", f"/v1/results/{job}:retract", json=because), 403)
        assert f"results of {other} show the same numbers: ask an admin" in said
        assert lab.http(who, "GET", f"/v1/results/{job}/trajectory").json()["retracted_at"] is None
    assert lab.http("chief", "POST", f"/v1/results/{first}:retract", json=because).json()["retracted"] == [
        first,
        second,
    ]
    assert lab.http("ada", "POST", f"/v1/results/{third}:retract", json=because).json()["retracted"] == [third]
    assert lab.http("ada", "POST", f"/v1/results/{third}:restore").json()["restored"] == [third]
    said = problem(lab.http("ada", "POST", f"/v1/results/{first}:restore"), 403)
    assert "chief retracted" in said
    assert lab.http("chief", "POST", f"/v1/results/{first}:restore").json()["restored"] == [first, second]


def test_a_task_that_others_rest_on_is_retracted_and_restored_by_admins_only(lab: Lab) -> None:
    job = lab.http("ada", "POST", "/v1/jobs", json=JOB).json()["id"]
    tasks = lab.http("ada", "GET", f"/v1/jobs/{job}").json()["tasks"]
    train = next(task["id"] for task in tasks if "train" in task["roles"])
    because = {"reason": "trained on the wrong split"}
    assert "jobs of ada rest on it" in problem(lab.http("bob", "POST", f"/v1/tasks/{train}:retract", json=because), 403)
    done = lab.http("ada", "POST", f"/v1/tasks/{train}:retract", json=because).json()
    assert (done["retracted"], done["replanned"], train in done["tasks"]) == ([], 1, True)
    assert lab.http("bob", "GET", f"/v1/tasks/{train}").json()["retracted_by"] == "ada"
    problem(lab.http("bob", "POST", f"/v1/tasks/{train}:restore"), 403)
    assert lab.http("chief", "POST", f"/v1/tasks/{train}:restore").json()["superseded"] == done["tasks"]
    problem(lab.http("chief", "POST", f"/v1/tasks/{NOBODY}:retract", json=because), 404)
    undo = {"filter": "scale > 0"}
    assert "'admin'" in problem(lab.http("ada", "POST", "/v1/results:restore", json=undo), 403)
    lab.http("chief", "POST", f"/v1/jobs/{job}:cancel")


def test_nobody_acts_as_another(lab: Lab) -> None:
    headers = {"Authorization": f"Bearer {lab.secrets['ada']}", "X-Uncanny-User": "chief"}
    problem(lab.server.http.post("/v1/jobs", json=JOB, headers=headers), 403)
    with lab.client("ada") as client:
        assert (client.me()["name"], client.me()["role"], client.me()["scope"]) == ("ada", "researcher", "submit")


def test_a_token_is_never_wider_than_its_maker_or_its_user(lab: Lab) -> None:
    with lab.client("ada") as ada, lab.client("chief") as chief, lab.client("rita") as rita:
        narrow = ada.create_token("read only", scope="read")
        with Client(lab.server.url, narrow["secret"]) as reading:
            assert reading.me()["scope"] == "read"
            with pytest.raises(ApiError, match="takes a token of scope 'submit'"):
                reading.create_token("more", scope="submit")
        wider: list[Callable[[], object]] = [
            lambda: ada.create_token("more", scope="admin"),
            lambda: ada.create_token("more", user="bob"),
        ]
        for make in wider:
            with pytest.raises(ApiError) as refused:
                make()
            assert refused.value.status == 403
        with pytest.raises(ApiError, match="rita is a reader"):
            chief.create_token("more", user="rita", scope="submit")
        with pytest.raises(ApiError, match="there is no user nobody: `uncanny user set nobody`"):
            chief.create_token("more", user="nobody")
        with pytest.raises(ApiError, match="only an admin can see"):
            rita.tokens(user="ada")
        chief.put_user("bob", role="reader")
        with lab.client("bob") as bob:
            assert bob.me()["scope"] == "read", "a lower role bites at once"
        chief.put_user("bob", role="researcher")


def test_a_revoked_an_expired_and_a_disabled_token_are_refused_at_once(lab: Lab) -> None:
    with lab.client("ada") as ada, lab.client("chief") as chief:
        made = ada.create_token("short", expires_in_days=1e-9)
        with Client(lab.server.url, made["secret"]) as late, pytest.raises(ApiError, match="expired"):
            late.me()
        made = ada.create_token("lost laptop")
        with Client(lab.server.url, made["secret"]) as lost:
            assert lost.me()["token_id"] == made["id"]
            used = next(row for row in ada.tokens() if row["id"] == made["id"])
            assert used["last_used_at"] is not None
            with lab.client("bob") as bob, pytest.raises(ApiError, match="no token"):
                bob.revoke_token(made["id"])
            assert ada.revoke_token(made["id"])["revoked_at"] is not None
            with pytest.raises(ApiError, match="revoked") as refused:
                lost.me()
            assert refused.value.status == 401
        with pytest.raises(ApiError, match="revoked before"):
            ada.revoke_token(made["id"])
        chief.disable_user("bob")
        chief.put_user("bob", weight=2.0)
        with lab.client("bob") as bob, pytest.raises(ApiError):
            bob.me()
        assert chief.enable_user("bob")["disabled_at"] is None
        with lab.client("bob") as bob:
            assert bob.me()["name"] == "bob"


def test_the_last_admin_stays_one(lab: Lab) -> None:
    with lab.client("chief") as chief:
        refusals: list[Callable[[], object]] = [
            lambda: chief.put_user("chief", role="reader"),
            lambda: chief.put_user("chief", disabled=True),
            lambda: chief.disable_user("chief"),
        ]
        for refuses in refusals:
            with pytest.raises(ApiError, match="chief is the last admin") as refused:
                refuses()
            assert refused.value.status == 409
        chief.put_user("chief", role="admin", weight=1.0)
        chief.put_user("deputy", role="admin")
        chief.disable_user("deputy")
        with pytest.raises(ApiError, match="chief is the last admin"):
            chief.put_user("chief", role="researcher")
        chief.put_user("deputy", disabled=False)
        chief.put_user("deputy", role="reader")
        assert chief.me()["role"] == "admin"


def test_no_secret_is_stored_or_shown_again(lab: Lab) -> None:
    path = lab.server.settings.home / "uncanny.db"
    with sqlite3.connect(path) as database:
        dump = "\n".join(database.iterdump())
    for secret in lab.secrets.values():
        assert secret not in dump
        assert hashlib.sha256(secret.encode()).hexdigest() in dump
    shown = lab.http("chief", "GET", "/v1/tokens", params={"user": "ada"}).text
    assert "secret" not in shown
    assert "sha256" not in shown
    assert lab.secrets["ada"][:12] in shown


def test_changes_of_users_and_tokens_are_events_with_their_actor(lab: Lab) -> None:
    with lab.client("chief") as chief:
        made = chief.create_token("audited", user="ada")
        chief.revoke_token(made["id"])
        chief.put_user("carl", role="reader", weight=2.0, max_queued_jobs=7)
        events = list(chief.events(after=0, follow=False))
    told = [(event.kind, event.data["actor"], event.data["data"].get("id")) for event in events]
    assert ("token.created", "chief", made["id"]) in told
    assert ("token.revoked", "chief", made["id"]) in told
    assert any(kind == "user.created" and actor == "chief" for kind, actor, _ in told)
    assert made["secret"] not in str(events)


def test_a_token_outlives_no_token_that_made_it(lab: Lab) -> None:
    with lab.client("ada") as ada:
        short = ada.create_token("short", expires_in_days=1)
    with Client(lab.server.url, short["secret"]) as client:
        for asked in (None, 90.0, 1.0):
            assert client.create_token("heir", expires_in_days=asked)["expires_at"] == short["expires_at"]
        sooner = client.create_token("heir", scope="read", expires_in_days=0.5)
        assert sooner["expires_at"] < short["expires_at"]
    with Client(lab.server.url, sooner["secret"]) as reading:
        with pytest.raises(ApiError, match="takes a token of scope 'submit'"):
            reading.revoke_token(short["id"])
        assert reading.revoke_token(sooner["id"])["revoked_at"], "whatever its scope, it can be given up"
    with lab.client("chief") as chief:
        brief = chief.create_token("brief", scope="admin", expires_in_days=1)
    with Client(lab.server.url, brief["secret"]) as admin:
        assert admin.create_token("lasting", scope="admin")["expires_at"] is None


def test_only_admins_and_who_did_it_are_told_of_users_and_tokens(lab: Lab) -> None:
    with lab.client("chief") as chief, lab.client("ada") as ada, lab.client("bob") as bob:
        chief.put_user("dora", role="reader")
        made = ada.create_token("told")
        job = ada.submit(JOB)
        told = {
            who: [event for event in client.events(after=0, follow=False) if event.kind.startswith(("user.", "token."))]
            for who, client in (("chief", chief), ("ada", ada), ("bob", bob))
        }
        assert any(event.data["data"].get("name") == "dora" for event in told["chief"])
        assert {event.data["actor"] for event in told["ada"]} == {"ada"}
        assert made["id"] in [event.data["data"].get("id") for event in told["ada"]]
        assert {event.data["actor"] for event in told["bob"]} <= {"bob"}
        assert job.id in {event.data["job_id"] for event in bob.events(after=0, follow=False)}


def test_too_many_requests_are_told_when_to_come_back(
    start_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("limits.storage.memory.time", SimpleNamespace(time=lambda: now))  # all in one minute
    with start_server(tmp_path, dispatching=False, auth=True, requests_per_minute=5) as server:
        access = Access(Database(server.settings.database))
        access.put_user("ada", {}, actor="root")
        secret = access.create_token("ada", "test", "read", None, by=Caller("root"))["secret"]
        access.database.close()
        headers = {"Authorization": f"Bearer {secret}"}
        answers = [server.http.get("/v1/me", headers=headers) for _ in range(8)]
        assert [answer.status_code for answer in answers[:5]] == [200] * 5
        assert "more than 5 requests a minute" in problem(answers[7], 429)
        assert int(answers[7].headers["Retry-After"]) >= 1
        guess = {"Authorization": "Bearer unc_a-guess"}
        guesses = [server.http.get("/v1/me", headers=guess) for _ in range(FAILURES_PER_MINUTE + 1)]
        assert {answer.status_code for answer in guesses[:-1]} == {401}
        assert problem(guesses[-1], 429)
        now += 120
        assert server.http.get("/v1/me", headers=headers).status_code == 200


def test_a_page_of_another_site_cannot_use_a_server_without_tokens(server: Any) -> None:
    refused = server.http.post("/v1/jobs", json=JOB, headers={"Origin": "https://elsewhere.example"})
    assert "may not use this server" in problem(refused, 403)
    own = server.http.get("/v1/me", headers={"Origin": server.url})
    assert own.json()["scope"] == "admin"


def test_answers_carry_headers_that_bind_a_browser(server: Any) -> None:
    for response in (server.http.get("/docs"), server.http.get("/v1/nowhere"), server.http.get("/v1/jobs")):
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_listening_beyond_this_machine_takes_tokens() -> None:
    with pytest.raises(NotLoopback, match="token create NAME --scope admin --direct"):
        check_bind(Settings(host="0.0.0.0"))
    check_bind(Settings(host="0.0.0.0", auth=True))
    check_bind(Settings(host="0.0.0.0", insecure=True))


def test_the_first_admin_comes_from_the_shell(
    start_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner().invoke
    monkeypatch.setenv("UNCANNY_HOME", str(tmp_path))
    made = run(cli, ["token", "create", "first", "--user", "chief", "--scope", "admin", "--direct", "--json"])
    assert made.exit_code == 0, made.output
    with start_server(tmp_path, dispatching=False, auth=True) as server:
        monkeypatch.setenv("UNCANNY_URL", server.url)
        refused = run(cli, ["user", "list"])
        assert refused.exception is not None
        assert "send a token" in str(refused.exception)
        monkeypatch.setenv("UNCANNY_TOKEN", httpx.Response(200, text=made.stdout).json()["secret"])
        assert run(cli, ["user", "set", "ada", "--weight", "2"]).exit_code == 0
        listed = run(cli, ["user", "list", "--json"])
        assert [(row["name"], row["role"]) for row in httpx.Response(200, text=listed.stdout).json()] == [
            ("ada", "researcher"),
            ("chief", "admin"),
        ]
        mine = run(cli, ["token", "create", "laptop", "--days", "30"])
        assert mine.exit_code == 0
        assert mine.stdout.strip().startswith("unc_")
        tokens = httpx.Response(200, text=run(cli, ["token", "list", "--json"]).stdout).json()
        assert {row["name"] for row in tokens} == {"first", "laptop"}
        gone = run(cli, ["token", "revoke", tokens[1]["id"], "--json"])
        assert gone.exit_code == 0
        assert run(cli, ["user", "disable", "ada"]).exit_code == 0
        again = run(cli, ["user", "set", "ada", "--weight", "3", "--json"])
        assert httpx.Response(200, text=again.stdout).json()["disabled_at"] is not None
        assert run(cli, ["user", "enable", "ada"]).exit_code == 0
        assert run(cli, ["user", "enable", "nobody"]).exception is not None
        gone = run(cli, ["token", "revoke", tokens[0]["id"]])
        assert gone.exit_code == 0
