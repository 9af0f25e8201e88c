"""Who may use which route. A route that is not in the table here, or that is guarded otherwise than it says, fails."""

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from access_table import ADMIN, NEEDED, PUBLIC, READ, SUBMIT
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict
from store_lab import Lab
from waiting import until

from api.http import permissions
from api.http.app import create_app
from api.http.feed import POLL_SECONDS, RENEW_SECONDS
from api.http.permissions import Permission, open_to_all, owner_of
from api.http.routing import OF_MANY, Router, install
from service.errors import Conflict, NotFound, Unauthenticated
from service.lab.access import Access, Caller
from service.queue.verbs import Service
from service.results.insights import Insights
from service.settings import Settings
from service.specs import JobSpec, Sweep
from service.store import Database
from service.store.tables import events

GUARDED = [pair for pair, needed in NEEDED.items() if needed != PUBLIC]
CHANGING = [(method, path) for method, path in GUARDED if method != "GET"]
OWNED = {"job_id", "sweep_id", "task_id", "token_id"}  # what a path names that is somebody's
NOBODYS = {"digest", "name"}  # bytes by their digest; users, which are admins' business
OWNED_PATHS = [(method, path) for method, path in CHANGING if any("{" + name + "}" in path for name in OWNED)]
CELL = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}


@dataclass(frozen=True)
class Guarded:
    """An application that asks for tokens: a secret of each scope by name, and what is ada's by its path parameter."""

    app: FastAPI
    access: Access
    secrets: dict[str, str]
    hers: dict[str, str]

    def ask(
        self, method: str, path: str, secret: str | None = None, more_headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """The answer to a request with everything in the path filled in by what is ada's."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                return await http.request(method, path.format(**self.hers), headers=headers, **more)

        headers = (
            {"Content-Type": "application/json"}
            | (more_headers or {})
            | ({"Authorization": f"Bearer {secret}"} if secret else {})
        )
        return asyncio.run(send())


@pytest.fixture(scope="module")
def lab(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """`rita` may read, `ada` and `bob` submit, `chief` is an admin."""
    settings = Settings(home=tmp_path_factory.mktemp("guarded"), auth=True)
    shutil.copyfile(sqlite_template, settings.home / "uncanny.db")
    app = create_app(settings)
    access: Access = app.state.access
    service: Service = app.state.service
    roles = {"rita": ("reader", READ), "ada": ("researcher", SUBMIT), "bob": ("researcher", SUBMIT)}
    secrets, tokens = {}, {}
    for name, (role, scope) in (roles | {"chief": ("admin", ADMIN)}).items():
        access.put_user(name, {"role": role}, actor="root")
        made = access.create_token(name, "test", scope, None, by=Caller("root"))
        secrets[name], tokens[name] = made["secret"], made["id"]
    sweep = Sweep.model_validate({"name": "hers", "base": CELL, "grid": {"scale": [1, 5]}})
    hers = {
        "job_id": service.submit(JobSpec.model_validate(CELL), user="ada").body["id"],
        "sweep_id": service.submit_sweep(sweep, user="ada").body["id"],
        "token_id": tokens["ada"], "digest": "0" * 64, "name": "ada", "file": "swagger-ui.css",
    }  # fmt: skip
    hers["task_id"] = Insights(service.database).job(hers["job_id"])["tasks"][0]["id"]
    yield Guarded(app, access, secrets, hers)
    access.database.close()


def routes_of(routes: Any) -> Iterator[Any]:
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from routes_of(included.routes) if included is not None else [route]


async def untouched() -> AsyncIterator[bytes]:
    """A body that must not be read."""
    pytest.fail("the body was read before it was known who sends it")
    yield b""


def test_the_table_has_every_route_and_no_other(lab: Guarded) -> None:
    routes = {
        (method, route.path)
        for route in routes_of(lab.app.routes)
        for method in route.methods - {"HEAD"}  # as `GET`: `Conditional` makes it one
    }
    assert routes == set(NEEDED), "say in NEEDED who may use a new route, and whose things it changes in OWNED"
    documented = {(m.upper(), path) for path, of in lab.app.openapi()["paths"].items() for m in of}
    assert documented <= routes
    named = {name.split("}")[0] for _, path in CHANGING for name in path.split("{")[1:]}
    assert named <= OWNED | NOBODYS, "a route changes something of which this test does not know whose it is"


def test_every_route_declares_what_the_table_says(lab: Guarded) -> None:
    for route in routes_of(lab.app.routes):
        if route.path == "/openapi.json":  # the framework's own
            continue
        permission = permissions.declared(route)
        needed = permission.scope if isinstance(permission, Permission) else PUBLIC
        assert {needed} == {NEEDED[method, route.path] for method in route.methods}, route.path


PLANTED = [
    ("POST", "/planted", [], "declares 0 permissions"),
    ("GET", "/planted", [], "declares 0 permissions"),
    ("GET", "/planted", [permissions.scope("read"), permissions.scope("admin")], "declares 2 permissions"),
    ("POST", "/planted", [permissions.scope("read")], "changes something"),
    ("DELETE", "/planted", [open_to_all()], "changes something"),
    ("POST", "/planted/{name}", [owner_of("job")], "has no job_id in its path"),
    ("POST", "/planted/{job_id}:change", [permissions.scope("submit")], "changes what one user owns"),
    ("PATCH", "/planted/{sweep_id}", [permissions.scope("submit")], "changes what one user owns"),
]


@pytest.mark.parametrize(("method", "path", "dependencies", "why"), PLANTED)
def test_a_planted_route_without_a_fitting_permission_is_refused(
    method: str, path: str, dependencies: list[Any], why: str
) -> None:
    router = Router(tags=["planted"])
    with pytest.raises(TypeError, match=why):
        router.add_api_route(path, lambda: None, methods=[method], dependencies=dependencies)


class Open(BaseModel):
    """A body that drops fields which it does not know."""

    name: str


class Closed(Open):
    model_config = ConfigDict(extra="forbid")


def test_a_planted_route_that_drops_unknown_fields_is_refused() -> None:
    def drops(body: Open) -> None: ...

    with pytest.raises(TypeError, match="forbid"):
        Router(tags=[]).add_api_route("/planted", drops, methods=["POST"], dependencies=[permissions.scope("submit")])


def test_a_planted_router_that_is_not_strict_is_refused() -> None:
    lax = APIRouter()
    lax.add_api_route("/planted", lambda: None)
    with pytest.raises(TypeError, match="not strict"):
        install(FastAPI(), [lax])
    app = FastAPI()
    install(app, [])
    with pytest.raises(TypeError, match="declares 0 permissions"):
        app.add_api_route("/planted", lambda: None)


def test_a_planted_route_is_strict_without_being_told(lab: Guarded) -> None:
    def planted(body: Closed) -> dict[str, str]:
        """Answers with the name."""
        return {"name": body.name}

    app = create_app(lab.app.state.settings)
    app.add_api_route("/v1/planted", planted, methods=["POST"], dependencies=[permissions.scope("submit")])
    asking = replace(lab, app=app)
    ada = lab.secrets["ada"]
    assert asking.ask("POST", "/v1/planted", ada, content=b'{"name": "a"}').status_code == 200
    for path, body, status in (
        ("/v1/planted", b'{"name": "a", "name": "b"}', 400),
        ("/v1/planted", b'{"name": "a", "more": 1}', 422),
        ("/v1/planted?more=1", b'{"name": "a"}', 422),
    ):
        assert asking.ask("POST", path, ada, content=body).status_code == status
    assert asking.ask("POST", "/v1/planted", lab.secrets["rita"], content=untouched()).status_code == 403
    app.state.access.database.close()


def test_every_question_about_many_rows_takes_a_turn(lab: Guarded) -> None:
    documented = {
        path: {parameter["name"] for parameter in operations["get"].get("parameters", [])}
        for path, operations in lab.app.openapi()["paths"].items()
        if "get" in operations
    }
    many = {path for path, names in documented.items() if names & {"filter", "cursor"}}
    assert many <= OF_MANY <= documented.keys()


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_good_token_it_is_401_before_the_body_is_read(
    lab: Guarded, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.auth.FAILURES_PER_MINUTE", 0)  # or these would soon be 429
    for secret in (None, lab.secrets["ada"][:-1]):
        answer = lab.ask(method, path, secret, content=untouched())
        assert answer.status_code == 401, answer.text
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_who_asks_is_known_before_the_size_of_a_body_matters(lab: Guarded) -> None:
    """16 MB without a token were parsed; of a body that is too large nothing is read of anybody."""
    for path, declared in (("/v1/jobs", 2 << 20), ("/v1/sweeps", 50 << 20), ("/v1/artifacts/" + "0" * 64, 9 << 30)):
        method = "PUT" if "artifacts" in path else "POST"
        for secret, status in ((None, 401), (lab.secrets["rita"], 403), (lab.secrets["ada"], 413)):
            answer = lab.ask(method, path, secret, content=untouched(), more_headers={"Content-Length": str(declared)})
            assert answer.status_code == status, answer.text


def test_to_be_known_takes_no_turn_of_a_writer(lab: Guarded) -> None:
    """That a token was used is written down, by one thread at a time: the others answer meanwhile."""
    secrets = []
    for name in ("vic", "wes", "xia"):
        lab.access.put_user(name, {}, actor="root")
        secrets.append(lab.access.create_token(name, "new", "read", None, by=Caller("root"))["secret"])
    with (
        closing(sqlite3.connect(lab.access.database.path or "", isolation_level=None)) as writer,
        ThreadPoolExecutor(3) as pool,
    ):
        writer.execute("BEGIN IMMEDIATE")
        asked = [pool.submit(lab.access.caller, secret) for secret in secrets]
        until(lambda: sum(one.done() for one in asked) >= 2)
        writer.execute("ROLLBACK")
        assert sorted(one.result().name for one in asked) == ["vic", "wes", "xia"]


@pytest.mark.parametrize(("method", "path"), [pair for pair in GUARDED if NEEDED[pair] != READ])
def test_a_token_of_a_lower_scope_is_403_before_the_body_is_read(lab: Guarded, method: str, path: str) -> None:
    needed = NEEDED[method, path]
    for who in ("rita", "ada") if needed == ADMIN else ("rita",):
        if who == "rita" and "{token_id}" in path:
            continue  # below: she may give up her own
        answer = lab.ask(method, path, lab.secrets[who], content=untouched())
        assert answer.status_code == 403, answer.text
        assert repr(needed) in answer.json()["detail"]


@pytest.mark.parametrize(("method", "path"), OWNED_PATHS)
def test_what_is_another_users_cannot_be_changed(lab: Guarded, method: str, path: str) -> None:
    # Whose a task is, is known once it is looked at, and that is where the reason is written down.
    content = b'{"reason": "wrong"}' if "{task_id}" in path else untouched()
    refused = lab.ask(method, path, lab.secrets["bob"], content=content)
    assert refused.status_code in (403, 404, 409), refused.text
    why = ("'admin'",) if NEEDED[method, path] == ADMIN else ("is ada's", "of yours", "jobs of ada", "not retracted")
    assert any(sentence in refused.text for sentence in why)
    assert lab.ask("GET", "/v1/me", lab.secrets["ada"]).status_code == 200
    assert lab.ask("GET", "/v1/sweeps/{sweep_id}", lab.secrets["bob"]).json()["state"] == "running"


@pytest.mark.parametrize(("method", "path"), [pair for pair, needed in NEEDED.items() if needed == READ])
def test_who_may_read_is_let_in(lab: Guarded, method: str, path: str) -> None:
    more: dict[str, Any] = {"params": {"follow": False}} if path == "/v1/events" else {}
    assert lab.ask(method, path, lab.secrets["rita"], **more).status_code not in (401, 403)


@pytest.mark.parametrize(("method", "path"), [pair for pair, needed in NEEDED.items() if needed == PUBLIC])
def test_what_is_public_asks_nobody(lab: Guarded, method: str, path: str) -> None:
    assert lab.ask(method, path).status_code == 200


def test_tokens_of_another_user_are_neither_listed_nor_made(lab: Guarded) -> None:
    assert lab.ask("GET", "/v1/tokens?user=ada", lab.secrets["bob"]).status_code == 403
    made = lab.ask("POST", "/v1/tokens", lab.secrets["bob"], json={"name": "x", "user": "ada"})
    assert made.status_code == 403
    assert lab.ask("DELETE", "/v1/tokens/{token_id}", lab.secrets["rita"], content=untouched()).status_code == 403


class TestTokens:
    @pytest.fixture
    def access(self, database: Database) -> Access:
        access = Access(database)
        for name, role in (("ada", "researcher"), ("chief", "admin")):
            access.put_user(name, {"role": role}, actor="root")
        return access

    def token(self, access: Access, user: str, by: Caller, scope: str = "submit") -> tuple[str, Caller]:
        made = access.create_token(user, "test", scope, None, by=by)
        return made["secret"], access.caller(made["secret"])

    def test_one_takes_along_what_was_made_with_it_and_with_these(self, access: Access) -> None:
        """The tokens of a chain and of another branch, of which the thief holds the second."""
        kept, first = self.token(access, "chief", Caller("root"), "admin")
        leaked, second = self.token(access, "chief", first, "admin")
        heirs = [self.token(access, "ada", second)]
        heirs.append(self.token(access, "ada", heirs[0][1]))
        heirs.append(self.token(access, "chief", second, "admin"))
        other, _ = self.token(access, "ada", first)
        early = access.revoke_token(heirs[2][1].token_id or "", by=first)
        assert early["revoked_children"] == 0
        revoked = access.revoke_token(second.token_id or "", by=first)
        assert (revoked["revoked_children"], revoked["parent_id"]) == (2, first.token_id)
        for secret in (leaked, *(secret for secret, _ in heirs)):
            with pytest.raises(Unauthenticated, match="revoked"):
                access.caller(secret)
        assert [access.caller(secret).name for secret in (kept, other)] == ["chief", "ada"]
        with pytest.raises(Conflict, match="revoked before"):
            access.revoke_token(second.token_id or "", by=first)

    def test_each_of_them_is_an_event(self, access: Access, artifacts: Any) -> None:
        _, first = self.token(access, "ada", Caller("root"))
        _, heir = self.token(access, "ada", first)
        access.revoke_token(first.token_id or "", by=Caller("chief"))
        rows = Lab(access.database, artifacts).rows(events, kind="token.revoked")
        assert [(row.actor, row.data["id"], row.data.get("with")) for row in rows] == [
            ("chief", first.token_id, None),
            ("chief", heir.token_id, first.token_id),
        ]

    def test_one_that_was_revoked_meanwhile_makes_no_other(self, access: Access) -> None:
        """The request was let in before the token was revoked, and written after."""
        _, caller = self.token(access, "ada", Caller("root"))
        access.revoke_token(caller.token_id or "", by=caller)
        with pytest.raises(Unauthenticated):
            access.create_token("ada", "heir", "submit", None, by=caller)
        assert len(access.tokens(by=Caller("root"), user="ada")) == 1

    def test_other_changes_of_a_disabled_user_let_nobody_in(self, access: Access) -> None:
        secret, caller = self.token(access, "ada", Caller("root"))
        access.put_user("ada", {"disabled": True}, actor="chief")
        for changes in ({}, {"weight": 2.0}, {"role": "admin"}, {"max_gpus": None}, {"disabled": True}):
            assert access.put_user("ada", changes, actor="chief")["disabled_at"] is not None
            with pytest.raises(Unauthenticated):
                access.caller(secret)
            with pytest.raises(Unauthenticated):
                access.renewed(caller)
        with pytest.raises(Conflict, match="uncanny user enable ada"):
            access.create_token("ada", "new", "read", None, by=Caller("root"))
        assert access.put_user("ada", {"disabled": False}, actor="chief")["disabled_at"] is None
        assert access.caller(secret).name == "ada"
        with pytest.raises(NotFound, match="no user adda"):
            access.put_user("adda", {"disabled": False}, actor="chief")


def ends(lab: Guarded, secret: str, meanwhile: Callable[[], object]) -> tuple[bool, bool]:
    """Whether a stream of events that nobody ends goes on before `meanwhile` was done, and whether it does after."""

    async def follow() -> tuple[bool, bool]:
        transport = httpx.ASGITransport(app=lab.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            request = http.get("/v1/events", headers={"Authorization": f"Bearer {secret}"}, timeout=None)
            stream = asyncio.ensure_future(request)
            await asyncio.wait([stream], timeout=0.2)
            before = stream.done()
            meanwhile()
            done, _ = await asyncio.wait([stream], timeout=15)
            stream.cancel()
            return not before, not done

    return asyncio.run(follow())


@pytest.mark.parametrize("how", ["revoked", "expired", "disabled"])
def test_a_stream_of_events_ends_with_its_token(lab: Guarded, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.feed.RENEW_SECONDS", 0.1)
    days = 1.0 / 86_400 if how == "expired" else None
    lab.access.put_user("dora", {}, actor="root")
    made = lab.access.create_token("dora", "watching", "read", days, by=Caller("root"))
    after = {
        "revoked": lambda: lab.access.revoke_token(made["id"], by=Caller("root")),
        "disabled": lambda: lab.access.put_user("dora", {"disabled": True}, actor="root"),
        "expired": lambda: None,  # a second after it was made
    }
    assert ends(lab, made["secret"], after[how]) == (True, False)
    lab.access.put_user("dora", {"disabled": False}, actor="root")


def test_a_stream_is_asked_often_enough_to_end_within_15_seconds() -> None:
    assert RENEW_SECONDS + 2 * POLL_SECONDS < 10
