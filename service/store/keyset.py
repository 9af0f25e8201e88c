"""Pages by the last row of the page before, never by a count: rows that come or go in between shift nothing."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeGuard, TypeVar

from sqlalchemy import Column as SchemaColumn
from sqlalchemy import Connection, Row, Select, and_, false, or_, select, true, tuple_

from service.errors import InvalidQuery
from service.model.names import ID, UNSTORABLE
from service.store.fields import Column, Field, Kind
from service.store.typed import bytewise, unsorted

# Any in rows and queries: SQLAlchemy cannot type a row of expressions.
Position = tuple[list[object], int]  # the values that the last row is sorted by, and its sequence number
T = TypeVar("T")
NO_CURSOR = "this is not a cursor: take `next_cursor` of the page before"
CHECKSUM_BYTES = 6


@dataclass(frozen=True)
class Term:
    """One field to sort by; nulls come last in both directions."""

    field: Field
    descending: bool

    @property
    def column(self) -> Column:
        return bytewise(self.field.column) if self.field.kind == "text" else self.field.column


@dataclass(frozen=True)
class Among:
    """The rows whose `column` is one of `ids`, of the primary key `group`: few groups, each in order in an index."""

    column: Column
    group: SchemaColumn[int]
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """The rows of a page in their order; `end` is the position of the last one if more rows follow."""

    rows: list[T]
    end: Position | None


@dataclass(frozen=True)
class Order:
    """The fields to sort by, the first one first, and then the order of submission."""

    terms: tuple[Term, ...]
    descending: bool
    sequence: Column

    def page(
        self, connection: Connection, query: Select[Any], after: Position | None, limit: int, among: Among | None = None
    ) -> Page[Row[Any]]:
        """Up to `limit` rows of `query` behind `after`; their columns are those of `query`, then those of the order.

        `among`: read only these groups of rows, each by an index that has it in this order.
        """
        rows = self._rows(connection, query, after, limit + 1, among)
        return Page(rows[:limit], self._position(rows[limit - 1]) if len(rows) > limit else None)

    def _rows(
        self, connection: Connection, query: Select[Any], after: Position | None, limit: int, among: Among | None
    ) -> list[Row[Any]]:
        """Up to `limit` rows, with the values that they are sorted by as `sort_sequence, sort_0, ...`."""
        keys = [term.column.label(f"sort_{i}") for i, term in enumerate(self.terms)]
        query = query.add_columns(self.sequence.label("sort_sequence"), *keys)
        if len(self.terms) == 1:
            return self._page_by_index(connection, query, after, limit, among)
        if after is not None:
            query = query.where(self._behind(*after))
        if not self.terms:
            return self._first(connection, query, (self.sequence,), limit, among)
        order = [part for term in self.terms for part in (term.column.is_(None), _directed(term))]
        return list(connection.execute(query.order_by(*order, self._tie).limit(limit)))

    def _position(self, row: Row[Any]) -> Position:
        return [getattr(row, f"sort_{i}") for i in range(len(self.terms))], row.sort_sequence

    @property
    def _tie(self) -> Column:
        return self.sequence.desc() if self.descending else self.sequence.asc()

    def _page_by_index(
        self, connection: Connection, query: Select[Any], after: Position | None, limit: int, among: Among | None
    ) -> list[Row[Any]]:
        """First the rows with a value, then those without: an index has each in order, but not nulls last."""
        [term] = self.terms
        rows: list[Row[Any]] = []
        if after is None or after[0][0] is not None:
            valued = query.where(term.column.is_not(None))
            if after is not None:
                valued = valued.where(self._behind_in_index(term, after))
            if term.descending == self.descending:
                rows = self._first(connection, valued, (term.column, self.sequence), limit, among)
            else:
                valued = valued if among is None else valued.where(among.column.in_(among.ids))
                rows = list(connection.execute(valued.order_by(_directed(term), self._tie).limit(limit)))
            after = None
        if len(rows) < limit:
            null = query.where(term.column.is_(None))
            if after is not None:
                null = null.where(self._later(after[1]))
            rows += self._first(connection, null, (self.sequence,), limit - len(rows), among)
        return rows

    def _first(
        self, connection: Connection, query: Select[Any], key: tuple[Column, ...], limit: int, among: Among | None
    ) -> list[Row[Any]]:
        """The first rows of `query` in the order of `key`."""
        directed = [column.desc() if self.descending else column.asc() for column in key]
        if among is None:
            return list(connection.execute(query.order_by(*directed).limit(limit)))
        end = self._end(connection, query, key, limit, among)
        if end is not None:
            here, there = tuple_(*key), tuple_(*end)
            query = query.where(here >= there if self.descending else here <= there)
        if connection.dialect.name == "postgresql":  # which may read all rows of the groups otherwise
            of_group = query.where(among.column == among.group).order_by(*directed).limit(limit).lateral("of_group")
            query = (
                select(of_group).select_from(among.group.table.join(of_group, true())).where(among.group.in_(among.ids))
            )
            key = tuple(of_group.c[name] for name in ("sort_0", "sort_sequence")[-len(key) :])
        else:
            # Few rows are left, which SQLite should sort: it could read much of an index on the key to find the first.
            query, key = query.where(among.column.in_(among.ids)), tuple(map(unsorted, key))
        ordered = query.order_by(*(column.desc() if self.descending else column.asc() for column in key))
        return list(connection.execute(ordered.limit(limit)))

    def _end(
        self, connection: Connection, query: Select[Any], key: tuple[Column, ...], limit: int, among: Among
    ) -> tuple[object, ...] | None:
        """A key with at least `limit` rows up to it, from the n-th row of each group; None if they have too few."""
        directed = [column.desc() if self.descending else column.asc() for column in key]
        for n in dict.fromkeys((-(-limit // len(among.ids)), limit)):
            of_group = query.with_only_columns(self.sequence).where(among.column == among.group)
            nth = of_group.order_by(*directed).offset(n - 1).limit(1).correlate(among.group.table).scalar_subquery()
            there = select(nth).where(among.group.in_(among.ids))
            ends = select(*key).where(self.sequence.in_(there)).order_by(*directed)
            row = connection.execute(ends.offset(-(-limit // n) - 1).limit(1)).one_or_none()
            if row is not None:
                return tuple(row)
        return None

    def _behind_in_index(self, term: Term, after: Position) -> Column:
        if term.descending != self.descending:
            return self._behind(*after)
        here, there = tuple_(term.column, self.sequence), tuple_(after[0][0], after[1])
        return here < there if self.descending else here > there

    def _later(self, sequence: int) -> Column:
        return self.sequence < sequence if self.descending else self.sequence > sequence

    def _behind(self, values: Sequence[object], sequence: int) -> Column:
        """The rows that are behind in the first term in which they differ, or equal in all terms and later."""
        either: list[Column] = []
        equal: list[Column] = []
        for term, value in zip(self.terms, values, strict=True):
            column = term.column
            either.append(and_(*equal, _beyond(term, value)))
            equal.append(column.is_(None) if value is None else column == value)
        return or_(*either, and_(*equal, self._later(sequence)))


def _directed(term: Term) -> Column:
    return term.column.desc() if term.descending else term.column.asc()


def _beyond(term: Term, value: object) -> Column:
    if value is None:
        return false()
    return or_(term.column < value if term.descending else term.column > value, term.column.is_(None))


def encode_cursor(question: object, position: Position) -> str:
    """The position where a page ended, bound to the question that the page answers."""
    return _sealed(_fingerprint(question), list(position))


def decode_cursor(question: object, cursor: str, order: Order) -> Position:
    """Raises `InvalidQuery` if the cursor is not ours, is damaged, or belongs to another question."""
    values, sequence = _opened(question, cursor, 2)
    kinds = [term.field.kind for term in order.terms]
    fits = isinstance(values, list) and len(values) == len(kinds) and _is_whole(sequence)
    if not fits or not all(value is None or _fits(kind, value) for kind, value in zip(kinds, values, strict=True)):
        raise InvalidQuery("cursor", NO_CURSOR)
    return values, sequence


def encode_id(question: object, ident: str) -> str:
    """The same for a list in the order of its ids."""
    return _sealed(_fingerprint(question), [ident])


def decode_id(question: object, cursor: str) -> str:
    """Raises `InvalidQuery` as `decode_cursor` does."""
    [ident] = _opened(question, cursor, 1)
    if not (isinstance(ident, str) and ID.fullmatch(ident)):
        raise InvalidQuery("cursor", NO_CURSOR)
    return ident


def _sealed(fingerprint: object, position: list[object]) -> str:
    packed = json.dumps([fingerprint, *position], separators=(",", ":")).encode()
    checksum = hashlib.sha256(packed).digest()[:CHECKSUM_BYTES]
    return base64.urlsafe_b64encode(checksum + packed).decode().rstrip("=")


def _opened(question: object, cursor: str, parts: int) -> list[Any]:  # Any: JSON of the user's, to be checked
    """The parts of a cursor's position. Only the very text that `_sealed` writes is accepted, so any damage shows."""
    try:
        packed = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))[CHECKSUM_BYTES:]
        position: list[Any]
        fingerprint, *position = json.loads(packed)
        is_whole = _sealed(fingerprint, position) == cursor and len(position) == parts
    except (ValueError, TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise InvalidQuery("cursor", NO_CURSOR)
    if fingerprint != _fingerprint(question):
        raise InvalidQuery("cursor", "this cursor belongs to another question: keep filters and sort as they were")
    return position


def _fits(kind: Kind, value: object) -> bool:
    match kind:
        case "text":
            return isinstance(value, str) and not UNSTORABLE.search(value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is_whole(value) and abs(value) < 2**31
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62


def _fingerprint(question: object) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
