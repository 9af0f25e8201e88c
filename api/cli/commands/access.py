"""`user` and `token`: the users of the service and their tokens."""

from pathlib import Path
from typing import Annotated

import typer

from api.cli.commands.options import EPILOG, AsJson, Home, Url, client_of, print_json, settings_of, whole_number
from api.client import Json
from api.client.render import counted, err, out, show, table
from service.model.access import Role, Scope

user = typer.Typer(help="Users, their roles and quotas (for admins).", no_args_is_help=True, epilog=EPILOG)
token = typer.Typer(help="Tokens that say who you are.", no_args_is_help=True, epilog=EPILOG)

Name = Annotated[str, typer.Argument(metavar="USER")]
USER_COLUMNS = ("name", "role", "weight", "max_queued_jobs", "max_gpus", "disabled_at")
TOKEN_COLUMNS = ("id", "prefix", "name", "scope", "created_at", "expires_at", "last_used_at", "revoked_at")


@user.command("set", epilog=EPILOG)
def set_user(
    name: Name,
    role: Annotated[Role | None, typer.Option(help="What their tokens may do at most; researcher at first.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of the cluster beside others.")] = None,
    max_queued_jobs: Annotated[
        int | None, typer.Option(metavar="N", parser=whole_number(0), help="Unfinished jobs at once.")
    ] = None,
    max_gpus: Annotated[float | None, typer.Option(help="GPUs in use at once.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a user, or change role and quotas of one; one who is disabled stays so."""
    options = {"role": role, "weight": weight, "max_queued_jobs": max_queued_jobs, "max_gpus": max_gpus}
    with client_of(home, url) as client:
        row = client.put_user(name, **{field: value for field, value in options.items() if value is not None})
    _show([row], USER_COLUMNS, as_json, one=True)


@user.command("list", epilog=EPILOG)
def list_users(home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """List all users."""
    with client_of(home, url) as client:
        _show(client.users(), USER_COLUMNS, as_json)


@user.command("disable", epilog=EPILOG)
def disable_user(name: Name, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Refuse all tokens of a user from now on; what they measured stays."""
    with client_of(home, url) as client:
        _show([client.disable_user(name)], USER_COLUMNS, as_json, one=True)


@user.command("enable", epilog=EPILOG)
def enable_user(name: Name, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Let a disabled user in again: their tokens that were not revoked are good."""
    with client_of(home, url) as client:
        _show([client.enable_user(name)], USER_COLUMNS, as_json, one=True)


@token.command("create", epilog=EPILOG)
def create_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for, as in `laptop`.")],
    for_user: Annotated[str | None, typer.Option("--user", help="Whose it is; yours when left out.")] = None,
    scope: Annotated[Scope, typer.Option(help="Each includes those before it.")] = "submit",
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; never when left out.")] = None,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct",
            help="Write to the database itself (UNCANNY_DATABASE_URL, --home), as for the first admin, who has no "
            "token to ask with. Makes the user, and an admin of them where the scope says so.",
        ),
    ] = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. It is printed once and kept nowhere: put it into UNCANNY_TOKEN."""
    if direct:
        made = _create_directly(name, for_user, scope, days, home)
    else:
        with client_of(home, url) as client:
            made = client.create_token(name, user=for_user, scope=scope, expires_in_days=days)
    if as_json:
        return print_json(made)
    err.print(f"Token {made['prefix']} of {made['user']}, scope {made['scope']}; it is shown this once:")
    return out.print(made["secret"], soft_wrap=True)


@token.command("list", epilog=EPILOG)
def list_tokens(
    for_user: Annotated[str | None, typer.Option("--user", help="Another's, for admins.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List your tokens, also revoked ones. No secret is ever shown again."""
    with client_of(home, url) as client:
        _show(client.tokens(user=for_user), TOKEN_COLUMNS, as_json)


@token.command("revoke", epilog=EPILOG)
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID")], home: Home = None, url: Url = None, as_json: AsJson = False
) -> None:
    """Refuse a token from now on, and all that were made with it."""
    with client_of(home, url) as client:
        revoked = client.revoke_token(token_id)
    _show([revoked], TOKEN_COLUMNS, as_json, one=True)
    if children := revoked["revoked_children"]:
        err.print(f"{counted(children, 'token')} made with it, or with these, revoked too")


def _create_directly(name: str, for_user: str | None, scope: Scope, days: float | None, home: Path | None) -> Json:
    from api.http.auth import operating_system_user
    from service.lab.access import Access, Caller
    from service.operations import upgrading
    from service.store import Database

    settings = settings_of(home=home)
    database = Database(settings.database)
    if not settings.database_url:
        upgrading.upgrade(database)
    database.check_schema()
    access, actor = Access(database), operating_system_user()
    owner = for_user or actor
    users = {row["name"]: row for row in access.users()}
    if owner not in users or (scope == "admin" and users[owner]["disabled_at"] is None):
        access.put_user(owner, {"role": "admin"} if scope == "admin" else {}, actor=actor)
    return access.create_token(owner, name, scope, days, by=Caller(actor))


def _show(rows: list[Json], columns: tuple[str, ...], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        return print_json(rows[0] if one else rows)
    cells = [["–" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    return show(table(list(columns), cells))
