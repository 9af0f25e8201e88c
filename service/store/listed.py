"""Long lists in SQL: one statement for any number of values or rows. And JSON that the database makes itself."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    literal,
    literal_column,
    select,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.sql.selectable import TableValuedAlias

from service.store.tables import Json
from service.store.values import Values

ENCODER = json.JSONEncoder(ensure_ascii=False)


class _Elements(FunctionElement[str]):
    """The elements of a JSON array, a row each, in a column `value`."""

    name = "elements"
    inherit_cache = True


# Any below: a column of any type.
class json_of(GenericFunction[Any]):  # noqa: N801 - SQLAlchemy's functions are named like SQL's
    """A JSON object from `name, value, name, value ...`."""

    type = Json
    inherit_cache = True


def listed(values: Iterable[str]) -> Select[str]:
    """Texts as one parameter: `column.in_(listed(values))`."""
    array = bindparam(None, json.dumps(list(values)), Text)
    return select(literal_column("value", Text)).select_from(_Elements(array))


def numbered(values: Iterable[int]) -> Select[int]:
    """The same for whole numbers."""
    array = elements(bindparam(None, json.dumps([str(value) for value in values]), Text))
    return select(cast(array.c.value, Integer))


def elements(array: ColumnElement[Any]) -> TableValuedAlias:
    """The texts of a JSON array as rows with a column `value`; none for null."""
    return _Elements(array).table_valued("value")


def insert_rows(connection: Connection, table: Table, rows: Sequence[Values]) -> None:
    """Insert thousands of rows with the same columns, as fast as the driver can. Values of JSON may be text already."""
    if not rows:
        return
    quote = connection.dialect.identifier_preparer.quote
    into = f"{quote(table.name)} ({', '.join(map(quote, rows[0]))})"
    is_json = [isinstance(table.c[column].type, JSON) for column in rows[0]]
    values = (
        [
            stored_json(value) if encode and value is not None and not isinstance(value, str) else value
            for value, encode in zip(row.values(), is_json, strict=True)
        ]
        for row in rows
    )
    if connection.dialect.name == "sqlite":
        placeholders = ", ".join("?" * len(is_json))
        connection.exec_driver_sql(f"INSERT INTO {into} VALUES ({placeholders})", [tuple(row) for row in values])
        return
    driver: Any = connection.dialect.loaded_dbapi  # Any: SQLAlchemy does not know which driver it has
    cursor: Any = connection.connection.cursor()
    try:
        with cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for row in values:
                copy.write_row(row)
    except driver.Error as error:  # as SQLAlchemy raises it for its own statements
        raise DBAPIError.instance(f"COPY {into}", None, error, driver.Error, dialect=connection.dialect) from error


def stored_json(value: object) -> str:
    """JSON with its texts unescaped: SQLite does not find a key that is written in escapes.

    Half of a surrogate pair, which UTF-8 cannot encode, stays an escape.
    """
    return ENCODER.encode(value).encode("utf-8", "backslashreplace").decode()


def json_object(**columns: ColumnElement[Any]) -> ColumnElement[Any]:
    """A JSON object with these columns' values."""
    return json_of(*(part for name, column in columns.items() for part in (literal(name, Text), column)))


@compiles(_Elements, "sqlite")
def _elements_sqlite(element: _Elements, compiler: SQLCompiler, **options: object) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_Elements, "postgresql")
def _elements_postgresql(element: _Elements, compiler: SQLCompiler, **options: object) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **options)} AS json))"


@compiles(json_of, "sqlite")
def _json_of_sqlite(element: json_of, compiler: SQLCompiler, **options: object) -> str:
    return f"json_object({compiler.process(element.clauses, **options)})"


@compiles(json_of, "postgresql")
def _json_of_postgresql(element: json_of, compiler: SQLCompiler, **options: object) -> str:
    return f"json_build_object({compiler.process(element.clauses, **options)})"
