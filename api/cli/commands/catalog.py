"""`catalog`: the names that a job can use, and the dictionary of every number that a result can have."""

from collections.abc import Sequence
from typing import Annotated

import typer

from api.cli.commands.options import AsJson, Home, Url, client_of, print_json
from api.client import Json
from api.client.render import show, table, tell

NAMED = ("architectures", "datasets", "recipes", "attacks", "measures")
PRESETS = ("recipe_presets", "attack_presets")
Word = Annotated[str, typer.Argument(metavar="[WORD]", help="Only entries with this in their name, as `valley`.")]


def catalog(word: Word = "", home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """What a job can name, and every number that a result can have: its formula, unit, range, and when it is null."""
    with client_of(home, url) as client:
        content = client.catalog()
    if as_json:
        return print_json(content)
    entries = [
        [kind, name, entry["summary"]] for kind in NAMED for name, entry in content[kind].items() if word in name
    ]
    entries += [["datasets", entry["name"], ""] for entry in content["registered_datasets"] if word in entry["name"]]
    entries += [[kind, name, ""] for kind in PRESETS for name in content[kind] if word in name]
    numbers = [number for number in content.get("numbers", ()) if _has(number, word)]
    if entries:
        show(table(["kind", "name", "summary"], [[kind.replace("_", " "), *rest] for kind, *rest in entries]))
    if numbers:
        show(table(["number", "unit", "null if", "formula"], _rows(numbers)))
    if not entries and not numbers:
        tell(f"Nothing in the catalogue has {word!r} in its name.")
    return None


def _has(number: Json, word: str) -> bool:
    """Whether a name that the pattern stands for has the word in it."""
    return any(word in name for name in number["names"])


def _rows(numbers: Sequence[Json]) -> list[list[str]]:
    return [[number["name"], _unit(number), number["null"], number["formula"]] for number in numbers]


def _unit(number: Json) -> str:
    low, high = ("" if number[bound] is None else f"{number[bound]:g}" for bound in ("low", "high"))
    return f"{number['unit']}, {low}..{high}" if low or high else str(number["unit"])
