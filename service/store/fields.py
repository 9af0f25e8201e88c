"""A field of jobs or results: a name that users can ask about, its kind, and the SQL that it stands for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, select
from sqlalchemy.sql import ColumnElement

from service.errors import InvalidQuery
from service.model.dotted import or_rather
from service.model.query import plain
from service.specs.numbers import METRICS
from service.store.meanings import Meaning
from service.store.result_tables import number_names

Column = ColumnElement[Any]  # Any: a column may be of each type that a `Kind` names
Kind = Literal["text", "number", "integer", "boolean", "time", "list"]
Test = Callable[[Column], Column]


@dataclass(frozen=True)
class Field:
    """A scalar SQL expression of each row, null if the row has no such value.

    `of_cell` is the same expression of the row's cell, if all seeds of a cell have the same value.
    `any_of`, of a list, is whether any element passes a test.
    `task`, of a number, is the id of the task that computed it, if that is not the attack. `measure` is the id of that
    task if it is a measure that the job asked for beyond the closed forms.
    `meaning`, of texts, is what a text stands for, if the field has only certain ones.
    """

    kind: Kind
    column: Column
    of_cell: Column | None = None
    any_of: Callable[[Test], Column] | None = None
    task: Column | None = None
    measure: Column | None = None
    meaning: Meaning | None = None


@dataclass(frozen=True)
class Fields:
    """Fields by name: the `known` ones, families of them (`labels.KEY`), and stored numbers."""

    known: Mapping[str, Field]
    families: Mapping[str, Callable[[str], Field | None]] = field(default_factory=dict)
    number: Callable[[str], Field] | None = None
    family_names: Sequence[str] = ()  # names within the families that an error suggests

    def find(self, connection: Connection, name: str, parameter: str, position: int | None = None) -> Field:
        """The field of this name. Raises `InvalidQuery` for an unknown name, with the nearest known ones."""
        name = plain(name)
        if name in self.known:
            return self.known[name]
        family, _, key = name.partition(".")
        of_family = self.families[family](key) if key and family in self.families else None
        if of_family is not None:
            return of_family
        numbers = stored_numbers(connection) if self.number is not None else []
        if self.number is not None and name in numbers:
            return self.number(name)
        raise unknown(parameter, name, [*self.known, *self.family_names], position, others=numbers)


def unknown(
    parameter: str, name: str, known: Sequence[str], position: int | None = None, others: Sequence[str] = ()
) -> InvalidQuery:
    """The error for an unknown field, with the nearest names; `others` are too many to be listed."""
    return InvalidQuery(parameter, f"unknown field {name!r}{or_rather(name, known, others)}", position)


def stored_numbers(connection: Connection) -> list[str]:
    """The names of all numbers that attacks and measures have stored, without those that have their own column."""
    query = select(number_names.c.name).distinct().order_by(number_names.c.name)
    return [name for name in connection.scalars(query) if name not in METRICS]
