"""Options that commands share, the settings and filters that they stand for, and JSON on stdout."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from api.client import Client
from api.home import service_url
from service.errors import UncannyError
from service.settings import Settings
from service.specs.base import whole


def whole_number(least: int, most: int | None = None) -> Callable[[str | int], int]:
    """The parser of an option that is a whole number in this range: digits, and a leading `-` if `least` has one.

    It refuses `1_0`, `+5` and ` 5`, which Python's `int` would accept.
    """
    allowed = f"{least:,} or more" if most is None else f"{least:,} to {most:,}"

    def parse(value: str | int) -> int:
        try:
            parsed = whole(value) if isinstance(value, str) else value  # typer parses defaults too
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if parsed < least or (most is not None and parsed > most):
            raise typer.BadParameter(f"{parsed:,} is not in the range: {allowed}")
        return parsed

    return parse


Home = Annotated[Path | None, typer.Option("--home", help="Folder of database, artifacts, data, logs [UNCANNY_HOME].")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on [UNCANNY_HOST].")]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        metavar="N",
        parser=whole_number(0, 65535),
        help="Port to listen on; 0 takes a free one [UNCANNY_PORT].",
    ),
]
Auth = Annotated[bool | None, typer.Option("--auth", help="Ask every request for a token [UNCANNY_AUTH].")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Listen beyond this machine without any login.")]
Url = Annotated[str | None, typer.Option("--url", help="Where the service is [UNCANNY_URL].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Filters = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE ...", help="Only rows with this, as scale=5; a field repeated: any of these."),
]

Filter = Annotated[str, typer.Option("--filter", help='As "architecture = resnet18 and attack.eps <= 8/255".')]
Retracted = Annotated[bool, typer.Option("--include-retracted", help="Take retracted results too.")]

FAILED = 1  # the exit code
EPILOG = "Exit codes: 0 done; 1 failed jobs or an error; 2 bad usage; 3 no service answers; 4 the service refuses."
REACH_SECONDS = 2.0  # if nothing listens at the address; a service that is busy gets the client's own patience


class BadUsage(UncannyError):
    """The options and arguments do not go together, or one of them is malformed."""


def settings_of(**flags: Any) -> Settings:  # Any: the types of the settings, which the settings check
    """Settings from the environment, overridden by the flags that were given."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        sentences = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadUsage(f"bad settings: {sentences}") from None


def client_of(home: Path | None, url: str | None) -> Client:
    return Client(service_url(settings_of(home=home, url=url)), reach_seconds=REACH_SECONDS)


def program() -> str:
    return settings_of().program


def filters_of(words: list[str] | None) -> dict[str, Any]:  # Any: so that they pass beside named parameters
    """`["scale=5", "scale=10"]` as `{"scale": ["5", "10"]}`."""
    filters: dict[str, list[str]] = {}
    for item in words or []:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise BadUsage(f"{item!r} is not of the form FIELD=VALUE")
        filters.setdefault(name, []).append(value)
    return filters


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_line(value: object) -> None:
    """One line of JSON, at once."""
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()
