"""Results as tables: CSV, NDJSON and Parquet of everything that matches, batch by batch in constant memory.

The columns are known before the first row is read: the requested ones, else `COLUMNS`; `*` stands for these, `FURTHER`
and every stored number. Values that all results of a cell share are read once and not per row.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from service.model import flags
from service.model.dotted import FAMILIES, flat
from service.model.json import JsonObject
from service.model.observations import FRACTIONS, INTERVALS, Count, accuracy_interval
from service.model.threat_model import threat_model
from service.model.times import iso, milliseconds, seconds_of
from service.results.questions import ALL_FIELDS, Question
from service.results.results import check_fields, keys_of, order_of, other_names, rows_of
from service.store import Connection
from service.store import results as store
from service.store.database import Database
from service.store.datasets import test_samples
from service.store.fields import Kind, stored_numbers
from service.store.keyset import Order
from service.store.result_fields import HEADLINE, RESULTS, SPEC, THREAT_MODEL
from service.store.result_tables import results

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 10_000
MAX_CELLS = 20_000  # cells that are remembered between batches, half a kilobyte each
ROWS_OF_JSON = 500  # rows of a batch if whole rows are read
GROUP_ROWS = 100_000  # rows of a row group of Parquet
GROUP_VALUES = 8_000_000  # values of a row group: wide tables have fewer rows in it
FLAGS = "flags"
RARE = "attack.source.recipe."  # only transfers from a network with another recipe have these columns
COUNTED_BY: dict[Count, str] = {"samples": "samples", "test_samples": "dataset"}
"""The column that tells how many images a fraction is of."""
IN_COLUMNS = tuple(
    field for field, (fraction, _) in INTERVALS.items() if fraction in HEADLINE and FRACTIONS[fraction] in COUNTED_BY
)
"""The intervals whose fractions and counts need no whole row."""
COLUMNS = (
    *("job_id", "sweep_id", "user"),
    *(name for name in SPEC if not name.startswith(RARE)),
    *THREAT_MODEL,
    *HEADLINE,
    *IN_COLUMNS,
    FLAGS,
    *("versions.train", "versions.measure", "versions.attack", "created_at", "finished_at"),
)
FURTHER = (
    *(name for name in SPEC if name.startswith(RARE)),
    *("versions.control", "measures", "measures_failed"),
    *("verdict_reasons", "verdict_checks", "verdict_counts", "verdict_version"),
    *("weights_sha256", "spec_digest", "attack_digest"),
    *("retracted_at", "retracted_by", "retraction_reason", "labels", "provenance"),
    *(field for field in INTERVALS if field not in IN_COLUMNS),
)
MADE_HERE = frozenset({FLAGS, *IN_COLUMNS})  # columns that are no fields
WHOLE = {"attack": "attack.type", "recipe": "recipe.name"}  # objects of which a table shows only the name

Values = list[Any]  # Any: the values of one column, of its kind
Batch = list[Values]
Fetch = Callable[[Connection, Question, Order, Sequence[str]], tuple[Batch, str | None]]
"""The columns of these names, of one page of a question, and the cursor of the next page."""


@dataclass(frozen=True)
class Table:
    """Names and kinds of the columns, and batches of rows as one list of values a column."""

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    batches: Callable[[], Iterator[Batch]]


def table(database: Database, question: Question) -> Table:
    """The table that answers a question. Raises `InvalidQuery` before the first row is read."""
    with database.read() as connection:
        check_fields(connection, question.fields)
        names = _names(connection, question.fields)
        order = order_of(connection, question)
        question.after(order)
        store.selected(connection, question.nodes)
    only_columns = all(
        name in MADE_HERE or (name in RESULTS.known and RESULTS.known[name].any_of is None) for name in names
    )
    fetch: Fetch = _Columns(names) if only_columns else _whole_rows
    question = replace(question, limit=BATCH_ROWS if only_columns else ROWS_OF_JSON)
    return Table(names, tuple(map(_kind, names)), lambda: _batches(database, question, order, names, fetch))


def csv_lines(content: Table) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(content.names)
    for batch in content.batches():
        pairs = zip(batch, content.kinds, strict=True)
        shown = [list(map(iso, column)) if kind == "time" else column for column, kind in pairs]
        writer.writerows(zip(*shown, strict=True))
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def json_lines(rows: Iterator[JsonObject]) -> Iterator[str]:
    return (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def parquet_bytes(content: Table) -> Iterator[bytes]:
    """A Parquet file in pieces, a row group at a time."""
    import pyarrow as pa  # here, because it takes forty megabytes that an API without exports does not need
    import pyarrow.parquet as pq

    types = {
        "text": pa.string(),
        "list": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "boolean": pa.bool_(),
        "time": pa.timestamp("ms", tz="UTC"),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in zip(content.names, content.kinds, strict=True)])
    group_rows = max(1, min(GROUP_ROWS, GROUP_VALUES // len(content.names)))
    sink = _Pieces()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in content.batches():
            arrays = [_array(column, field.type) for column, field in zip(batch, schema, strict=True)]
            waiting.append(pa.record_batch(arrays, schema=schema))
            if sum(len(part) for part in waiting) >= group_rows:
                writer.write_table(pa.Table.from_batches(waiting), row_group_size=group_rows)
                waiting.clear()
                yield from sink.taken()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting), row_group_size=group_rows)
    yield from sink.taken()


def _array(values: Values, kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        values = [None if value is None else milliseconds(value) for value in values]
        return pa.array(values, pa.int64()).cast(kind)
    return pa.array(values, kind)


class _Pieces(io.RawIOBase):
    """A sink whose bytes can be taken while the writer still writes."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # Any: the writer passes several kinds of buffer
        piece = bytes(data)
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def taken(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces


def _names(connection: Connection, fields: Sequence[str]) -> tuple[str, ...]:
    if not fields:
        return COLUMNS
    if ALL_FIELDS in fields:
        return (*COLUMNS, *FURTHER, *stored_numbers(connection))
    return tuple(fields)


def _kind(name: str) -> Kind:
    """The kind of a column. A column that is no field is text (whole objects, unknown keys) or a stored number."""
    if name in RESULTS.known:
        return RESULTS.known[name].kind
    return "text" if name.partition(".")[0] in FAMILIES else "number"


def _batches(
    database: Database, question: Question, order: Order, names: Sequence[str], fetch: Fetch
) -> Iterator[Batch]:
    while True:
        with database.read() as connection:
            columns, cursor = fetch(connection, question, order, names)
        yield columns
        if cursor is None:
            return
        question = replace(question, cursor=cursor)


class _Columns:
    """Reads columns from the index table. The columns of a cell are looked up by its id, once for many rows.

    The intervals of fractions are computed from these columns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._intervals = [name for name in names if name in INTERVALS]
        fractions = dict.fromkeys(INTERVALS[name][0] for name in self._intervals)
        from_these = dict.fromkeys(source for name in fractions for source in (name, COUNTED_BY[FRACTIONS[name]]))
        read = list(dict.fromkeys([*(name for name in names if name not in MADE_HERE), *from_these]))
        self._own = [name for name in read if RESULTS.known[name].of_cell is None]
        self._shared = [name for name in read if RESULTS.known[name].of_cell is not None]
        self._cells: dict[int, tuple[object, ...]] = {}  # the values of `_shared`

    def __call__(
        self, connection: Connection, question: Question, order: Order, names: Sequence[str]
    ) -> tuple[Batch, str | None]:
        flagged = [results.c[name] for name in flags.FLAGS]
        wanted = [*flagged, *(RESULTS.known[name].column for name in self._own)]
        after, limit = question.after(order), question.limit
        page = store.columns(connection, question.nodes, order, after, limit, wanted, retracted=question.retracted)
        cursor = question.next_cursor(order, page.end)
        if not page.cell_ids:
            return [[] for _ in names], cursor
        raised, own = page.values[: len(flagged)], page.values[len(flagged) :]
        columns = dict(zip(self._own, map(list, own), strict=True))
        self._look_up(connection, set(page.cell_ids))
        if self._shared:
            shared = zip(*map(self._cells.__getitem__, page.cell_ids), strict=True)
            columns |= dict(zip(self._shared, map(list, shared), strict=True))
        columns[FLAGS] = [";".join(flags.names_of(*row)) for row in zip(*raised, strict=True)]
        for name in self._intervals:
            columns[name] = _bounds(connection, name, columns)
        return [columns[name] for name in names], cursor

    def _look_up(self, connection: Connection, cell_ids: set[int]) -> None:
        if len(self._cells) > MAX_CELLS:
            self._cells.clear()
        for cell_id, spec in store.cell_specs(connection, cell_ids - self._cells.keys()).items():
            values = dict(flat(spec))
            threat = threat_model(spec["attack"])
            values |= {"threat_model": threat.ball, "adversary": threat.adversary}
            values["norm"] = values.get("attack.attack.norm", values.get("attack.norm"))
            self._cells[cell_id] = tuple(values.get(WHOLE.get(name, name)) for name in self._shared)


def _bounds(connection: Connection, name: str, columns: Mapping[str, Values]) -> list[float | None]:
    """A bound of the interval of a fraction, for each row of these columns."""
    fraction, bound = INTERVALS[name]
    counts = columns[COUNTED_BY[FRACTIONS[fraction]]]
    if FRACTIONS[fraction] == "test_samples":
        counts = list(map(test_samples(connection, set(counts)).get, counts))
    pairs = zip(columns[fraction], counts, strict=True)
    return [accuracy_interval(value, images)[bound] for value, images in pairs]


def _whole_rows(
    connection: Connection, question: Question, order: Order, names: Sequence[str]
) -> tuple[Batch, str | None]:
    """Columns from whole rows: slower, but these have stored numbers, labels and provenance too."""
    page = keys_of(connection, question, order)
    columns: Batch = [[] for _ in names]
    for row in rows_of(connection, [key.job_id for key in page.rows], (ALL_FIELDS,)):
        values = {**dict(flat(row)), **other_names(row)}
        for name, column in zip(names, columns, strict=True):
            column.append(_value(row, values, name))
    return columns, question.next_cursor(order, page.end)


def _value(row: JsonObject, values: JsonObject, name: str) -> object:
    if name in RESULTS.known and RESULTS.known[name].kind == "time":
        text = values.get(name)
        return None if text is None else seconds_of(text)
    if name in row and isinstance(row[name], dict) and name not in WHOLE:
        return json.dumps(row[name], separators=(",", ":"))
    value = values.get(WHOLE.get(name, name))
    return str(value) if _kind(name) == "text" and value is not None else value
