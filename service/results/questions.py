"""A question about jobs or results: which rows, in which order, from which row on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import InvalidQuery
from service.model import query
from service.store import Connection
from service.store.fields import Column, Fields
from service.store.keyset import Order, Position, Term, decode_cursor, encode_cursor

CREATED = "created_at"
NEWEST_FIRST = "-created_at"
ALL_FIELDS = "*"
SORT = "sort"
MAX_SORTED = 8  # fields that an order has


@dataclass(frozen=True)
class Question:
    """Which rows, in which order: a filter, simple filters by field (repeated: any of the values), and `sort`.

    `sort` has fields by comma, each with `-` in front if it descends. `retracted` includes retracted results.
    """

    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sort: str = NEWEST_FIRST
    cursor: str | None = None
    limit: int = 100
    fields: tuple[str, ...] = ()
    filter: str | None = None
    retracted: bool = False

    @property
    def nodes(self) -> list[query.Node]:
        """All filters as trees. Raises `InvalidQuery`."""
        return nodes_of(self.filter, self.filters)

    def order(self, connection: Connection, fields: Fields, sequence: Column) -> Order:
        """Raises `InvalidQuery` for an unknown field, a field that has no order, and too many fields."""
        directions: dict[str, bool] = {}
        for name in query.names_of(self.sort):
            directions.setdefault(name.removeprefix("-"), name.startswith("-"))
        if not 1 <= len(directions) <= MAX_SORTED:
            raise InvalidQuery(SORT, f"it has {len(directions)} fields; between 1 and {MAX_SORTED} can be sorted by")
        terms = []
        for name, descending in directions.items():
            sort_field = fields.find(connection, name, SORT)
            if sort_field.kind == "list":
                raise InvalidQuery(SORT, f"{name} is a list, which has no order")
            terms.append(Term(sort_field, descending))
        # The time of submission breaks all ties: fields after it have no effect.
        names = list(directions)
        terms = terms[: names.index(CREATED)] if CREATED in names else terms
        return Order(tuple(terms), directions.get(CREATED, next(iter(directions.values()))), sequence)

    def after(self, order: Order) -> Position | None:
        return None if self.cursor is None else decode_cursor(self._identity(order), self.cursor, order)

    def _identity(self, order: Order) -> list[object]:
        """The question, with the table of `order`: a cursor is valid for these only."""
        simple = sorted((name, sorted(values)) for name, values in self.filters.items())
        return [str(order.sequence), self.sort, simple, self.filter, self.retracted]

    def next_cursor(self, order: Order, end: Position | None) -> str | None:
        """The cursor of the page that follows the one that ends here; None if none follows."""
        return None if end is None else encode_cursor(self._identity(order), end)


def nodes_of(text: str | None, filters: Mapping[str, Sequence[str]] | None = None) -> list[query.Node]:
    """A filter and simple filters as trees; an empty text asks for everything. Raises `InvalidQuery`."""
    parsed = [query.parse(text)] if text is not None and text.strip() else []
    nodes = [*parsed, *query.from_parameters(filters or {})]
    query.check_size(nodes)
    return nodes
