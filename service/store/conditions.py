"""A filter's tree (`service/model/query.py`) as a condition in SQL, which holds for the same rows on both databases."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, and_, false, func, not_, or_, select, true

from service.errors import InvalidQuery
from service.model import times
from service.model.query import And, Comparison, Node, Not, Or, Value
from service.specs.base import number, shorten, truth
from service.store.fields import Column, Field, Fields, Kind
from service.store.listed import listed
from service.store.meanings import Meaning, storable
from service.store.result_tables import cells, results
from service.store.typed import bytewise, contains, unindexed

S = TypeVar("S", float, bool, str)
MAX_INTEGER = 2**31
LISTED = 5000  # the most cells or ids that are each a parameter of a statement
SOUGHT, MOST = 1000, 4  # a page is read cell by cell if at most `SOUGHT` cells match, and at most one in `MOST`
FEW = 300  # if fewer than one cell in so many matches, results are found by the index on their cell
ORDER: dict[str, Callable[[Any, Any], Column]] = {  # Any: a column, and a value of its type
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
EQUAL = frozenset({"=", "!=", "in", "not in"})
ORDERED = EQUAL | frozenset(ORDER)
OPERATORS: dict[Kind, frozenset[str]] = {
    "text": ORDERED | {"~"},
    "number": ORDERED,
    "integer": ORDERED,
    "time": ORDERED,
    "boolean": EQUAL,
    "list": frozenset({"=", "in", "~"}),
}
# The operators for one stored value, and for several: a name may stand for several ids, several names for one id.
ONE, MANY = (
    {"in": "=", "not in": "!="},
    {"=": "in", "!=": "not in"},
)
NULL = frozenset({"is null", "is not null"})


def condition(connection: Connection, nodes: Sequence[Node], fields: Fields, *, scanning: bool = False) -> Column:
    """All of `nodes` as one condition. If `scanning`, the caller reads the rows in the order of an index anyway.

    Raises `InvalidQuery` for unknown fields and for values and operators that do not suit their kind.
    """
    return _Builder(connection, fields, scanning).build(And(tuple(nodes))) if nodes else true()


def by_cell(connection: Connection, nodes: Sequence[Node], fields: Fields) -> tuple[list[int], Column] | None:
    """`condition` in two: the cells that it allows, and the rest of it. None if it allows many cells."""
    builder = _Builder(connection, fields, scanning=True)
    parts = [inner for node in nodes for inner in (node.parts if isinstance(node, And) else (node,))]
    of_cells = tuple(part for part in parts if builder.is_of_cells(part))
    if not of_cells:
        return None
    ids, every = builder.matching(And(of_cells))
    if not ids or len(ids) > SOUGHT or len(ids) * MOST > every:
        return None
    return ids, and_(true(), *(builder.build(part) for part in parts if part not in of_cells))


class _Builder:
    def __init__(self, connection: Connection, fields: Fields, scanning: bool) -> None:
        self.connection, self.fields, self.scanning = connection, fields, scanning
        self._fields_by_name: dict[str, Field] = {}

    def build(self, node: Node) -> Column:
        if self.is_of_cells(node):
            return self._among_cells(node)
        match node:
            case Comparison():
                return compared(self.connection, node, self._field(node))
            case Not(inner):
                return not_(func.coalesce(self.build(inner), false()))
            case And(parts):
                return and_(*self._built(parts, And))
            case Or(parts):
                return or_(*self._built(parts, Or))

    def _built(self, parts: Sequence[Node], join: type[And] | type[Or]) -> list[Column]:
        """The parts as conditions; all parts about the cell are one condition."""
        of_cells = tuple(part for part in parts if self.is_of_cells(part))
        others = [self.build(part) for part in parts if part not in of_cells]
        return [self._among_cells(join(of_cells)), *others] if of_cells else others

    def _field(self, comparison: Comparison) -> Field:
        name = comparison.field
        if name not in self._fields_by_name:
            field = self.fields.find(self.connection, name, comparison.parameter, comparison.position)
            self._fields_by_name[name] = field
        return self._fields_by_name[name]

    def is_of_cells(self, node: Node) -> bool:
        match node:
            case Comparison():
                return self._field(node).of_cell is not None
            case Not(inner):
                return self.is_of_cells(inner)
            case And(parts) | Or(parts):
                return bool(parts) and all(self.is_of_cells(part) for part in parts)

    def _among_cells(self, node: Node) -> Column:
        """That `node` is true of a result's cell. There are few cells, so those that match are looked up first."""
        ids, every = self.matching(node)
        if not ids:
            return false()
        if len(ids) == every:
            return true()
        scan = self.scanning and len(ids) * FEW > every
        column: Column = unindexed(results.c.cell_id) if scan else results.c.cell_id
        return column.in_(ids if len(ids) <= LISTED else select(cells.c.id).where(self._of_cells(node)))

    def matching(self, node: Node) -> tuple[list[int], int]:
        """The cells of which `node` is true, at most one more than `LISTED`, and the number of all cells."""
        matching = select(cells.c.id).where(self._of_cells(node))
        ids = list(self.connection.scalars(matching.limit(LISTED + 1)))
        return ids, self.connection.execute(select(func.count()).select_from(cells)).scalar_one()

    def _of_cells(self, node: Node) -> Column:
        match node:
            case Comparison():
                field = self._field(node)
                column = field.of_cell if field.of_cell is not None else field.column
                return compared(self.connection, node, Field(field.kind, column, meaning=field.meaning))
            case Not(inner):
                return not_(func.coalesce(self._of_cells(inner), false()))
            case And(parts):
                return and_(*map(self._of_cells, parts))
            case Or(parts):
                return or_(*map(self._of_cells, parts))


def compared(connection: Connection, comparison: Comparison, field: Field) -> Column:
    """One comparison. It is null if the field is null, except for lists and for `is null` and `is not null`."""
    operator: str = comparison.operator
    kind = field.kind
    _check_operator(comparison, field)
    if kind == "time" and operator not in NULL:
        return _at(operator, field.column, [_span(comparison, value) for value in comparison.values])
    if field.meaning is not None and operator in EQUAL:
        values = _meant(connection, comparison, field.meaning)
        operator = (ONE if len(values) == 1 else MANY).get(operator, operator)
    else:
        values = [literal_of(kind, comparison, value) for value in comparison.values]
        if field.meaning is not None and operator == "~":
            _check_part(connection, comparison, field.meaning)
    if field.any_of is not None:
        if operator in NULL:
            some = field.any_of(lambda _: true())
            return not_(some) if operator == "is null" else some
        return field.any_of(lambda element: _scalar(operator, element, values, "text"))
    return _scalar(operator, field.column, values, kind)


def _check_operator(comparison: Comparison, field: Field) -> None:
    """Raises `InvalidQuery` if the field has no such operator. Closed lists, names and ids have no useful order."""
    operator, kind = comparison.operator, field.kind
    operators = OPERATORS[kind] if field.meaning is None else OPERATORS[kind] - ORDER.keys()
    if operator in operators | NULL:
        return
    what = f"a {kind}" if operator not in ORDER or kind != "text" else "a text without an order"
    advice = f"; use `not ({comparison.field} in (...))`" if kind == "list" and operator in ("!=", "not in") else ""
    allowed = ", ".join(sorted(operators))
    sentence = f"{comparison.field} is {what}, which can be asked for by {allowed}, not by {operator}{advice}"
    raise InvalidQuery(comparison.parameter, sentence, comparison.position)


def _check_part(connection: Connection, comparison: Comparison, meaning: Meaning) -> None:
    [value] = comparison.values
    try:
        meaning.check_part(connection, comparison.field, value.text)
    except ValueError as error:
        raise InvalidQuery(comparison.parameter, str(error), value.position) from None


def _meant(connection: Connection, comparison: Comparison, meaning: Meaning) -> list[str]:
    """The stored values that the values of a comparison stand for. Raises `InvalidQuery` for an unknown one."""
    values: dict[str, None] = {}
    for value in dict.fromkeys(comparison.values):
        text = literal_of("text", comparison, value)
        try:
            values |= dict.fromkeys(meaning.whole(connection, comparison.field, text))
        except ValueError as error:
            raise InvalidQuery(comparison.parameter, str(error), value.position) from None
    return list(values)


def _at(operator: str, column: Column, spans: Sequence[tuple[float, float]]) -> Column:
    """A time compared with days or milliseconds, each `(from, to)`: `<=` includes all of the span, `>` none of it."""
    [first, end] = spans[0]
    match operator:
        case "=" | "in":
            return or_(*(and_(column >= first, column < end) for first, end in spans))
        case "!=" | "not in":
            return and_(*(or_(column < first, column >= end) for first, end in spans))
        case "<":
            return column < first
        case "<=":
            return column < end
        case ">":
            return column >= end
        case _:
            return column >= first


def _scalar(operator: str, column: Column, values: list[Any], kind: Kind) -> Column:  # Any: see `literal_of`
    test: Column
    match operator:
        case "is null":
            test = column.is_(None)
        case "is not null":
            test = column.is_not(None)
        case "=":
            test = column == values[0]
        case "!=":
            test = column != values[0]
        case "in":
            test = column.in_(_listed(values))
        case "not in":
            test = column.not_in(_listed(values))
        case "~":
            test = contains(column, values[0])
        case _:
            test = ORDER[operator](bytewise(column) if kind == "text" else column, values[0])
    return test


def _listed(values: list[Any]) -> Any:  # Any: as SQLAlchemy takes it, values or a subquery
    """A name may stand for more ids than a statement has parameters: many ids become one parameter."""
    return listed(values) if len(values) > LISTED and isinstance(values[0], str) else values


def literal_of(kind: Kind, comparison: Comparison, value: Value) -> Any:  # Any: the type depends on the kind
    """A value in the type of its field's kind. Raises `InvalidQuery` with its position and what was expected."""
    text = value.text

    def refuse(sentence: str) -> InvalidQuery:
        return InvalidQuery(comparison.parameter, sentence, value.position)

    match kind:
        case "text" | "list":
            return _parsed(storable, text, refuse)
        case "boolean":
            return _parsed(truth, text, refuse)
    parsed = _parsed(number, text, refuse)
    if kind == "integer":
        if not (parsed.is_integer() and abs(parsed) < MAX_INTEGER):
            raise refuse(f"{shorten(text)} is not a whole number that fits")
        return int(parsed)
    return parsed


def _parsed(read: Callable[[str], S], text: str, refuse: Callable[[str], InvalidQuery]) -> S:
    try:
        return read(text)
    except ValueError as error:
        raise refuse(str(error)) from None


def _span(comparison: Comparison, value: Value) -> tuple[float, float]:
    try:
        return times.span(value.text)
    except (ValueError, OverflowError):
        sentence = f"{shorten(value.text)} is no time such as 2026-01-31 or 2026-01-31T12:00:00Z"
        raise InvalidQuery(comparison.parameter, sentence, value.position) from None
