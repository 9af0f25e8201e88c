"""Fields that jobs and results share: those of specs, labels, checks of a verdict, measures."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import BigInteger, Table, case, cast, exists, func, literal, select

from service.model.verdict import CHECKS, OUTCOMES
from service.specs.measures import FURTHER_MEASURES
from service.specs.parameters import closed_lists, parameters
from service.specs.versions import LATER
from service.store import meanings
from service.store.fields import Column, Field, Kind, Test
from service.store.listed import elements
from service.store.meanings import Meaning, one_of
from service.store.tables import job_tasks, tasks
from service.store.typed import json_text

KINDS: dict[str, Kind] = {"number": "number", "integer": "integer", "boolean": "boolean", "string": "text"}
UNQUOTABLE = re.compile(r'[\x00-\x1f\x7f"\\]')
DIGITS = 18  # the most digits of an integer that every database can hold


def kinds_of(types: Mapping[str, str]) -> dict[str, Kind]:
    return {name: KINDS[kind] for name, kind in types.items()}


SPEC_KINDS = kinds_of(parameters())
SPEC_MEANINGS: dict[str, Meaning] = {
    "dataset": meanings.dataset,
    **{name: one_of(texts) for name, texts in closed_lists().items()},
    **{
        f"{outer}recipe.{name}": meaning
        for outer in ("", "attack.source.")
        for name, meaning in (("checkpoint", meanings.checkpoint), ("weights_sha256", meanings.digest))
    },
}
SHORT = {"attack": "attack.type", "norm": "attack.norm", "recipe": "recipe.name"}
COLUMNS = {"attack.type": "attack", "attack.norm": "norm", "attack.eps": "eps", "recipe.name": "recipe"}


def json_value(column: Column, path: tuple[str, ...], kind: Kind) -> Column:
    """The scalar at this path of a JSON column, as a value of this kind; null if there is none."""
    value: Any = column[path]  # Any: the JSON operators have no common type
    match kind:
        case "number":
            typed: Column = value.as_float()
        case "integer":  # the cast of a longer integer would fail, and with it every query of this field
            text = value.as_string()
            typed = case((func.length(text) <= DIGITS, cast(text, BigInteger)))
        case "boolean":
            typed = value.as_boolean()
        case _:
            typed = value.as_string()
    return typed


def spec_column(table: Table, name: str, kind: Kind) -> Column:
    column = COLUMNS.get(name, name)
    if column in table.c:
        return table.c[column]
    value = json_value(table.c.spec, tuple(name.split(".")), kind)
    return func.coalesce(value, LATER[name]) if name in LATER else value


def measures_field(job_id: Column) -> Field:
    kind = tasks.c.spec["measure", "type"].as_string()

    def any_of(test: Test) -> Column:
        needed = (job_tasks.c.job_id == job_id) & (tasks.c.id == job_tasks.c.task_id) & (tasks.c.kind == "measure")
        return exists(select(literal(1)).where(needed, kind != "closed_forms", test(kind)))

    return Field("list", literal(None), any_of=any_of, meaning=one_of(FURTHER_MEASURES))


def list_field(array: Column, meaning: Meaning | None = None) -> Field:
    def any_of(test: Test) -> Column:
        rows = elements(array)
        return exists(select(literal(1)).select_from(rows).where(test(rows.c.value)))

    return Field("list", array, any_of=any_of, meaning=meaning)


def text_family(column: Column) -> Callable[[str], Field | None]:
    """The texts of a JSON object by their keys. Labels cannot have `UNQUOTABLE` keys, as no JSON path can name them.

    Versions before 0008 stored non-ASCII keys as `\\u` escapes, which SQLite's JSON paths do not decode.
    """

    def text_of(key: str) -> Field | None:
        if UNQUOTABLE.search(key):
            return None
        spellings = dict.fromkeys((key, json.dumps(key)[1:-1]))
        texts = [json_text(column, literal(spelling)) for spelling in spellings]
        return Field("text", texts[0] if len(texts) == 1 else func.coalesce(*texts))

    return text_of


def check_family(column: Column) -> Callable[[str], Field | None]:
    text_of = text_family(column)

    def check_of(key: str) -> Field | None:
        outcome = text_of(key) if key in CHECKS else None
        return None if outcome is None else replace(outcome, meaning=one_of(OUTCOMES))

    return check_of


def text_field(column: Column, meaning: Meaning) -> Field:
    return Field("text", column, meaning=meaning)


CHECK_NAMES = [f"verdict_checks.{name}" for name in CHECKS]  # names that an error suggests
