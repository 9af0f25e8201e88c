"""Expressions that both databases must answer alike: scalars out of JSON by their type, and texts by code point."""

from typing import Any

from sqlalchemy import Float, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Boolean


class json_number(FunctionElement[float]):  # noqa: N801 - named like a function of SQL
    """`json_number(column, key)`: the number at this key; null if there is none, or a value of another type."""

    type = Float(53)
    inherit_cache = True


class json_text(FunctionElement[str]):  # noqa: N801
    """The text at this key."""

    type = Text()
    inherit_cache = True


class json_list(FunctionElement[str]):  # noqa: N801
    """The array at this key, as JSON."""

    type = Text()
    inherit_cache = True


class json_flag(FunctionElement[bool]):  # noqa: N801
    """The boolean at this key."""

    type = Boolean()
    inherit_cache = True


class bytewise(FunctionElement[str]):  # noqa: N801
    """A text that is ordered by its code points, whatever the collation of the database."""

    type = Text()
    inherit_cache = True


class unindexed(FunctionElement[Any]):  # noqa: N801 - Any: a column of any type
    """Wraps a column so that SQLite does not choose an index on it."""

    inherit_cache = True


class unsorted(FunctionElement[Any]):  # noqa: N801 - Any: integers or floats
    """Wraps a number so that the planner does not choose an index on it for sorting."""

    inherit_cache = True


class contains(FunctionElement[bool]):  # noqa: N801
    """`contains(text, part)`; upper and lower case differ."""

    type = Boolean()
    inherit_cache = True


@compiles(json_number, "sqlite")
def _number_sqlite(element: json_number, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_sqlite(element, compiler, "'integer', 'real'", **options)


@compiles(json_text, "sqlite")
def _text_sqlite(element: json_text, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_sqlite(element, compiler, "'text'", **options)


@compiles(json_flag, "sqlite")
def _flag_sqlite(element: json_flag, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_sqlite(element, compiler, "'true', 'false'", **options)


@compiles(json_list, "sqlite")
def _list_sqlite(element: json_list, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_sqlite(element, compiler, "'array'", **options)


# Any: the element is of each of the types above.
def _scalar_sqlite(element: FunctionElement[Any], compiler: SQLCompiler, types: str, **options: object) -> str:
    column, key = (compiler.process(part, **options) for part in element.clauses)
    path = f"""'$."' || {key} || '"'"""
    return f"CASE WHEN json_type({column}, {path}) IN ({types}) THEN json_extract({column}, {path}) END"


@compiles(json_number, "postgresql")
def _number_postgresql(element: json_number, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_postgresql(element, compiler, "number", "DOUBLE PRECISION", **options)


@compiles(json_text, "postgresql")
def _text_postgresql(element: json_text, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_postgresql(element, compiler, "string", "TEXT", **options)


@compiles(json_flag, "postgresql")
def _flag_postgresql(element: json_flag, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_postgresql(element, compiler, "boolean", "BOOLEAN", **options)


@compiles(json_list, "postgresql")
def _list_postgresql(element: json_list, compiler: SQLCompiler, **options: object) -> str:
    return _scalar_postgresql(element, compiler, "array", "TEXT", **options)


# Any: as for `_scalar_sqlite`.
def _scalar_postgresql(
    element: FunctionElement[Any], compiler: SQLCompiler, kind: str, sql: str, **options: object
) -> str:
    column, key = (compiler.process(part, **options) for part in element.clauses)
    name = f"CAST({key} AS TEXT)"
    return f"CASE WHEN json_typeof({column} -> {name}) = '{kind}' THEN CAST({column} ->> {name} AS {sql}) END"


@compiles(bytewise, "sqlite")
def _bytewise_sqlite(element: bytewise, compiler: SQLCompiler, **options: object) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(bytewise, "postgresql")
def _bytewise_postgresql(element: bytewise, compiler: SQLCompiler, **options: object) -> str:
    return f'({compiler.process(element.clauses, **options)} COLLATE "C")'


@compiles(unindexed, "sqlite")
def _unindexed_sqlite(element: unindexed, compiler: SQLCompiler, **options: object) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


@compiles(unindexed, "postgresql")
def _unindexed_postgresql(element: unindexed, compiler: SQLCompiler, **options: object) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(unsorted)
def _unsorted(element: unsorted, compiler: SQLCompiler, **options: object) -> str:
    return f"({compiler.process(element.clauses, **options)} + 0)"


@compiles(contains, "sqlite")
def _contains_sqlite(element: contains, compiler: SQLCompiler, **options: object) -> str:
    return f"(instr({compiler.process(element.clauses, **options)}) > 0)"


@compiles(contains, "postgresql")
def _contains_postgresql(element: contains, compiler: SQLCompiler, **options: object) -> str:
    return f"(strpos({compiler.process(element.clauses, **options)}) > 0)"
