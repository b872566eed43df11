"""Tables of columns as event messages: Parquet and Arrow files, and any other source of Arrow batches.

Each row becomes one JSON object. DuckDB writes the JSON, a batch at a time, so that no row passes through Python
on its way into the raw table. A row's place is its number in the file, from 1; rows that `--where` leaves out count.

Numbers keep every digit: a decimal becomes text without redundant zeros, and a whole number stays a number.
A value that no JSON scalar can hold becomes an object, which the typed layer rejects by the field's name: NaN,
an infinity, a float beyond 2^53 as an id, and text that is not UTF-8.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from dagster_prefs.declarations.registry import FieldDeclaration
from dagster_prefs.events.formats import EventFileError, TableKind
from dagster_prefs.events.messages import Topic
from dagster_prefs.ids import EXACT_FLOAT

# Limits of a batch: its rows, and the bytes of its columns, so that long texts do not make it large.
BATCH_ROWS = 32_768
BATCH_BYTES = 16 * 1024 * 1024
# Number of batches that are converted ahead of the one being stored.
AHEAD = 2
# Memory limit of DuckDB, which holds one batch and its messages.
MEMORY = "512MB"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_RESERVED = "__prefs_"
_ROW, _JSON, _ARRIVAL = f"{_RESERVED}row", f"{_RESERVED}json_", f"{_RESERVED}arrived_at"
_BATCH = "batch"


@dataclass(frozen=True)
class Table:
    """A table of columns that can be read from any row on.

    `name` is used in messages. `source_name` and `identity` (hex) make the name of its source, which is equal for
    equal content. `batches(first, columns)` yields batches from row `first` (0-based) on, each with the number of
    its first row and, where rows were deleted, a mask of the remaining ones; only `columns`, or all.
    """

    name: str
    source_name: str
    identity: str
    schema: pa.Schema
    rows: int | None
    batches: Callable[[int, Sequence[str] | None], Iterator[TableBatch]]


class TableBatch(NamedTuple):
    """Consecutive rows of a table. `first` is the number of the first row, from 0; `kept` masks deleted rows."""

    first: int
    rows: pa.RecordBatch
    kept: pa.BooleanArray | None = None


class Messages(NamedTuple):
    """The messages of a batch, and the number of rows of the table that were read for it.

    `table` has the columns row (from 1), message and, with an arrival column, arrived_at (UTC).
    """

    rows: int
    table: pa.Table

    def triples(self) -> Iterator[tuple[int, str, datetime | None]]:
        """Yield the row, the message and the arrival (UTC, None without a column of arrivals) of each."""
        names = self.table.column_names
        arrivals = self.table.column("arrived_at").to_pylist() if "arrived_at" in names else repeat(None)
        for (row, message), arrival in zip(self.pairs(), arrivals, strict=False):
            yield row, message, arrival and arrival.replace(tzinfo=UTC)

    def pairs(self) -> Iterator[tuple[int, str]]:
        """Yield the row and the message of each."""
        return zip(
            self.table.column("row").to_pylist(), self.table.column("message").to_pylist(), strict=True
        )


@dataclass(frozen=True)
class Columns:
    """How a table's columns are read.

    `renamed` maps columns to fields, or to None if the messages leave the column out. `where` is an SQL
    expression over the table's own columns. `arrived_at` is the column that holds when each row arrived. Rows whose
    event happened at or after `until` (UTC) are left out.
    """

    renamed: Mapping[str, str | None]
    where: str | None = None
    arrived_at: str | None = None
    until: datetime | None = None

    @property
    def changes_messages(self) -> bool:
        """Whether the options change the messages."""
        return bool(self.renamed) or self.arrived_at is not None

    def field_of(self, column: str) -> str | None:
        """Return the JSON key of a column, None if it is left out."""
        return self.renamed.get(column, column)


def open_table(
    path: Path, kind: TableKind, identity: str, constants: Mapping[str, str | None] | None = None
) -> Table:
    """Open a Parquet or Arrow IPC file, with further columns of constants. Raises EventFileError if it is damaged."""
    rows = None
    with _readable(str(path)):
        if kind == "parquet":
            with pq.ParquetFile(path) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        else:
            with pa.memory_map(str(path)) as stream, _arrow_reader(stream) as reader:
                schema = reader.schema
    read = partial(_parquet_batches if kind == "parquet" else _arrow_batches, path)
    # A column of the file takes precedence over the name of its folder.
    added = {name: value for name, value in (constants or {}).items() if name not in schema.names}
    if not added:
        return Table(str(path), path.name, identity, schema, rows, read)
    for name in added:
        schema = schema.append(pa.field(name, pa.string()))
    # Equal rows in another partition are different events.
    folders = "/".join(f"{name}={value}" for name, value in added.items())
    return Table(
        str(path), f"{folders}/{path.name}", identity, schema, rows, partial(_with_constants, added, read)
    )


def _with_constants(
    added: Mapping[str, str | None],
    read: Callable[[int, Sequence[str] | None], Iterator[TableBatch]],
    first: int,
    columns: Sequence[str] | None,
) -> Iterator[TableBatch]:
    held = None if columns is None else [name for name in columns if name not in added]
    for batch in read(first, held):
        rows = batch.rows
        for name, value in added.items():
            if columns is None or name in columns:
                rows = rows.append_column(name, pa.array([value] * rows.num_rows, pa.string()))
        yield batch._replace(rows=rows)


class _readable:
    """Translates Arrow's errors in the block into an EventFileError that names the file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, pa.ArrowException | OSError) and not isinstance(error, EventFileError):
            lines = str(error).splitlines() or [type(error).__name__]
            raise EventFileError(
                f"{self.name} cannot be read, it is damaged or incomplete ({lines[0][:300]}): get the whole file and "
                "ingest it again"
            ) from None


def _parquet_batches(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[TableBatch]:
    # A buffered stream without reading ahead bounds the memory also where one row group is the whole file.
    with _readable(str(path)), pq.ParquetFile(path, buffer_size=1024 * 1024, pre_buffer=False) as parquet:
        start = 0
        groups: list[int] = []
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group).num_rows
            if not groups and start + size <= first:
                start += size
            else:
                groups.append(group)
        rows = _rows_within(parquet)
        for batch in parquet.iter_batches(rows, groups, columns=columns, use_threads=False):
            yield from _from(first, start, batch)
            start += batch.num_rows


def _rows_within(parquet: pq.ParquetFile) -> int:
    """Return how many rows of a Parquet file are about BATCH_BYTES, at most BATCH_ROWS."""
    sizes = [
        group.total_byte_size / max(1, group.num_rows)
        for group in map(parquet.metadata.row_group, range(parquet.num_row_groups))
    ]
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, *sizes)))) if sizes else BATCH_ROWS


def _arrow_reader(stream: pa.NativeFile) -> Any:
    if stream.read(6) == b"ARROW1":
        return pa.ipc.open_file(stream)
    stream.seek(0)
    return pa.ipc.open_stream(stream)


def _arrow_batches(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[TableBatch]:
    with _readable(str(path)), pa.memory_map(str(path)) as stream, _arrow_reader(stream) as reader:
        start = 0
        for batch in _each(reader):
            yield from _from(first, start, batch.select(columns) if columns is not None else batch)
            start += batch.num_rows


def _each(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return map(reader.get_batch, range(reader.num_record_batches))
    return iter(reader)


def _from(first: int, start: int, batch: pa.RecordBatch) -> Iterator[TableBatch]:
    """Yield the rows of a batch, which begins at row `start`, from row `first` on."""
    skipped = max(0, first - start)
    if skipped < batch.num_rows:
        yield TableBatch(start + skipped, batch.slice(skipped))


def _parts(batch: TableBatch, most: int) -> Iterator[TableBatch]:
    """Split a batch into parts of at most `most` rows and about BATCH_BYTES bytes."""
    rows = batch.rows.num_rows
    size = max(1, min(most, rows * BATCH_BYTES // max(1, batch.rows.nbytes)))
    for at in range(0, rows, size):
        kept = None if batch.kept is None else batch.kept.slice(at, size)
        yield TableBatch(batch.first + at, batch.rows.slice(at, size), kept)


class Converter:
    """Writes the rows of one table as messages of a topic, at most `batch_rows` at a time. A context manager.

    Raises EventFileError, before anything is read, for a column, a type or an expression that cannot be used.
    """

    def __init__(self, table: Table, topic: Topic, columns: Columns, batch_rows: int = BATCH_ROWS) -> None:
        self.table = table
        self.topic = topic
        self.columns = columns
        self.batch_rows = batch_rows
        check_columns(table, columns)
        self._until = until_column(table.schema, topic, columns, table.name) if columns.until else None
        # All converters share one database, because opening one takes longer than reading a small file.
        self._session = _database().cursor()
        try:
            # Conditions on times and times in lists must not depend on the machine's zone.
            self._session.execute("set timezone = 'UTC'")
            self._check_where()
        except BaseException:
            self._session.close()
            raise

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def messages(self, first: int = 0) -> Iterator[Messages]:
        """Yield the messages of the rows from row `first` (0-based) on."""
        return self._converted(first, None)

    def copy_lines(self, source: str, first: int = 0) -> Generator[Messages]:
        """Yield the messages like `messages`, each as the line of COPY's text format for `copy_columns`.

        A thread converts them ahead of the reader, because the engine uses another processor meanwhile.
        """
        return _ahead(lambda: self._converted(first, source))

    @property
    def copy_columns(self) -> tuple[str, ...]:
        """The raw table's columns in the lines of `copy_lines`; the engine sets the others."""
        arrival = ("arrived_at",) if self.columns.arrived_at is not None else ()
        return ("source", "source_partition", "source_offset", "data", *arrival)

    def check_arrivals(self, now: datetime) -> None:
        """Raise EventFileError if a row has no plausible time of arrival: a past one, in the project's years."""
        column = self.columns.arrived_at
        if column is None:
            return
        years = self.topic.limits.years
        needed = None if self.columns.where or self._until else [column]
        for batch in self._batches(0, needed):
            self._register(batch)
            found = self._run(
                f"select {_ROW}, {_quoted(column)}::varchar from {_BATCH} where {self._where()} and not coalesce("
                f"{_ARRIVAL} between make_timestamp({years.first}, 1, 1, 0, 0, 0) and "
                f"least(make_timestamp({years.last + 1}, 1, 1, 0, 0, 0), "
                f"make_timestamp({_microseconds(now)})), false) order by 1 limit 1"
            ).to_pylist()
            if found:
                row, value = found[0].values()
                told = "no value" if value is None else value
                raise EventFileError(
                    f"{self.table.name}, row {row}: {column} has {told}, and --arrived-at needs a time from "
                    f"{years.first} to now: leave such rows out with --where, or name another column"
                )

    def _batches(self, first: int, columns: Sequence[str] | None = None) -> Iterator[TableBatch]:
        for batch in self.table.batches(first, columns):
            yield from _parts(batch, self.batch_rows)

    def _converted(self, first: int, source: str | None) -> Iterator[Messages]:
        for batch in self._batches(first):
            broken = self._register(batch)
            message = _message_sql(self.table.schema, self.topic, self.columns, broken)
            selected = f"{_ROW} as row, {message} as message"
            if self.columns.arrived_at:
                selected += f", {_ARRIVAL} as arrived_at"
            query = f"select {selected} from {_BATCH} where {self._where()}"
            if source is not None:
                query = f"select {_line_sql(source, self.columns)} as line from ({query})"
            yield Messages(batch.first + batch.rows.num_rows, self._run(query))

    def _register(self, batch: TableBatch) -> set[int]:
        """Register a batch as the queried relation. Returns the columns with text that is not UTF-8."""
        rows = batch.rows
        arrays = [_plain(array) for array in rows.columns]
        names = list(rows.schema.names)
        broken: set[int] = set()
        numbers = range(batch.first + 1, batch.first + 1 + rows.num_rows)
        for array, name in zip(list(arrays), list(names), strict=True):
            if _is_text(array.type) and (repaired := _repaired(array)) is not None:
                place = self.table.schema.get_field_index(name)
                broken.add(place)
                arrays[names.index(name)], told = repaired
                arrays.append(told)
                names.append(f"{_JSON}{place}")
        arrays.append(pa.array(numbers, pa.int64()))
        names.append(_ROW)
        if self.columns.arrived_at is not None:
            arrays.append(_arrivals(arrays[names.index(self.columns.arrived_at)], self.topic))
            names.append(_ARRIVAL)
        relation = pa.table(arrays, names)
        if batch.kept is not None:
            relation = relation.filter(batch.kept)
        self._session.register(_BATCH, relation)
        return broken

    def _where(self) -> str:
        # The expression has its own line, because it may end in a comment.
        conditions = [f"(\n{self.columns.where}\n)"] if self.columns.where else []
        if self._until is not None and self.columns.until is not None:
            # A row without a time is kept, so that it is rejected with its reason.
            before = f"make_timestamp({_microseconds(self.columns.until)})"
            conditions.append(f"coalesce({_quoted(self._until)} < {before}, true)")
        return " and ".join(conditions) or "true"

    def _run(self, query: str) -> pa.Table:
        try:
            return self._session.sql(query).to_arrow_table()
        except duckdb.Error as error:
            if self.columns.where:
                raise self._bad_where(error) from None
            raise EventFileError(
                f"{self.table.name} cannot be written as messages ({_one_line(error)}): convert its columns, or leave "
                "one out with --map COLUMN="
            ) from None

    def _check_where(self) -> None:
        if self.columns.where is None:
            return
        schema = self.table.schema
        nothing = [pa.array([], _plain_type(kind)) for kind in schema.types]
        self._session.register(_BATCH, pa.table(nothing, schema.names))
        try:
            # This parses the text as one expression. Inside a query, text could end the condition that it stands in.
            condition = duckdb.SQLExpression(self.columns.where)
            selected = self._session.table(_BATCH).select(condition)
            kind = selected.types[0]
            self._session.table(_BATCH).filter(condition).fetchall()
        except duckdb.Error as error:
            raise self._bad_where(error) from None
        if str(kind) != "BOOLEAN":
            raise EventFileError(
                f"--where is {kind} and not a condition: {self.columns.where!r}; write e.g. "
                f"{_quoted(schema.names[0])} is not null"
            )

    def _bad_where(self, error: duckdb.Error) -> EventFileError:
        return EventFileError(
            f"--where {self.columns.where!r} cannot be evaluated on {self.table.name} ({_one_line(error)}): write an "
            "SQL condition over the file's own columns"
        )


def _one_line(error: duckdb.Error) -> str:
    return " ".join(str(error).split())[:300]


@cache
def _database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            # An expression of `--where` is untrusted: it must not read this machine's files or this
            # process's variables.
            "enable_external_access": False,
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "memory_limit": MEMORY,
            "threads": 1,
        },
    )


def check_columns(table: Table, columns: Columns) -> None:
    """Raise EventFileError for a named column that the table lacks, and for columns that cannot be messages."""
    names = table.schema.names
    found = f"it has {', '.join(names)}"[:400]
    for option, named in (("--map", columns.renamed), ("--arrived-at", [columns.arrived_at])):
        for column in named:
            if column is not None and column not in names:
                raise EventFileError(
                    f"{option} names the column {column}, which {table.name} lacks ({found}): correct it"
                )
    if reserved := [name for name in names if name.lower().startswith(_RESERVED)]:
        raise EventFileError(f"{table.name} has the column {reserved[0]}, a reserved name: rename it")
    folded: dict[str, str] = {}
    for name in names:
        if name.lower() in folded:
            raise EventFileError(
                f"{table.name} has the columns {folded[name.lower()]} and {name}, which are one name in SQL: rename one"
            )
        folded[name.lower()] = name
    fields: dict[str, str] = {}
    for name in names:
        field = columns.field_of(name)
        if field is None:
            continue
        if field in fields:
            raise EventFileError(
                f"the columns {fields[field]} and {name} of {table.name} are both {field}: leave one out with "
                f"--map {name}="
            )
        fields[field] = name
        if refused := _refusal(table.schema.field(name).type):
            raise EventFileError(
                f"the column {name} of {table.name} is {refused}, which JSON cannot hold: convert it, or leave it "
                f"out with --map {name}="
            )
    if columns.arrived_at is not None:
        kind = table.schema.field(columns.arrived_at).type
        if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
            raise EventFileError(
                f"--arrived-at {columns.arrived_at} is {kind} in {table.name} and not a time: name a column of "
                "timestamps, or of whole numbers since 1970"
            )


def until_column(schema: pa.Schema, topic: Topic, columns: Columns, name: str) -> str:
    """Return the column of a topic's event time, by which `--until` ends a history.

    Raises EventFileError for reference data, and for a column that holds no timestamps or dates.
    """
    if topic.time is None:
        raise EventFileError(
            f"--until ends a history by its event times, and {topic.name} is reference data, which has none: leave the "
            "option out; what Kafka tells is never overwritten by history"
        )
    column: str | None = next((one for one in schema.names if columns.field_of(one) == topic.time), None)
    kind = None if column is None else _stored_type(schema.field(column).type)
    if column is None or kind is None or not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        told = f"is {kind}" if column is not None else "is missing"
        raise EventFileError(
            f"--until compares {topic.time}, which {told} in {name}: it needs a column of timestamps or dates; convert "
            "it, or select the rows with --where"
        )
    return column


def _refusal(kind: pa.DataType) -> str | None:
    """Return why values of a type cannot be messages, None if they can."""
    if isinstance(kind, pa.BaseExtensionType):
        return None if kind.extension_name == "arrow.uuid" else _refusal(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _refusal(kind.value_type)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        return next(filter(None, (_refusal(kind.field(at).type) for at in range(kind.num_fields))), None)
    if pa.types.is_union(kind):
        return "a union"
    binary = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return "binary" if any(is_binary(kind) for is_binary in binary) else None


def _message_sql(schema: pa.Schema, topic: Topic, columns: Columns, broken: set[int]) -> str:
    """Return the SQL expression of a row's JSON object, without the columns that are NULL."""
    parts = []
    for place, column in enumerate(schema):
        key = columns.field_of(column.name)
        if key is None or pa.types.is_null(column.type):
            continue
        value = _value_sql(_quoted(column.name), _stored_type(column.type), topic.by_name.get(key))
        if place in broken:
            value = f"coalesce({_JSON}{place}, {value})"
        parts.append(f"{_literal(_encode(key) + ':')} || {value}")
    return f"'{{' || concat_ws(',', {', '.join(parts)}) || '}}'" if parts else "'{}'"


def _value_sql(value: str, kind: pa.DataType, field: FieldDeclaration | None) -> str:
    """Return the SQL expression of a value's JSON, NULL for NULL."""
    types = pa.types
    text = f"{value}::varchar"
    if _is_text(kind) or types.is_nested(kind):
        return f"to_json({value})::varchar"
    if types.is_boolean(kind) or types.is_integer(kind):
        return text
    if types.is_floating(kind):
        usable = f"isfinite({value})"
        if field is not None and field.type in ("text", "bigint"):
            usable += f" and abs({value}) < {EXACT_FLOAT}"
        return f"""case when {usable} then {text} else '{{"number":"' || {text} || '"}}' end"""
    if types.is_decimal(kind):
        return f"""'"' || {f"rtrim(rtrim({text}, '0'), '.')" if kind.scale > 0 else text} || '"'"""
    if types.is_timestamp(kind):
        return f"""'"' || {text} || 'Z"'"""
    if types.is_date(kind) and field is not None and field.type == "timestamptz":
        return f"""'"' || {text} || ' 00:00:00Z"'"""
    return f"""'"' || {text} || '"'"""


def _line_sql(source: str, columns: Columns) -> str:
    # PostgreSQL reads the backslashes of a message twice, in COPY's format and in that of bytea. JSON has no raw
    # control character, which would need more.
    escaped = source.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
    start = _literal(f"{escaped}\t0\t")
    arrival = " || chr(9) || arrived_at::varchar || '+00'" if columns.arrived_at else ""
    return rf"{start} || row::varchar || chr(9) || replace(message, '\', '\\\\'){arrival} || chr(10)"


def _plain(array: pa.Array) -> pa.Array:
    """Convert an array to a type that DuckDB can read, with times in UTC."""
    kind = _plain_type(array.type)
    if kind == array.type:
        return array
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return _plain(pc.run_end_decode(array))
    return array.cast(kind)


def _stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values behind an encoding or an extension type."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind if kind.extension_name == "arrow.uuid" else _stored_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _stored_type(kind.value_type)
    return kind


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which DuckDB reads a column."""
    types = pa.types
    kind = _stored_type(kind)
    if types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit)
    if types.is_float16(kind):
        return pa.float32()
    if types.is_decimal(kind):
        return pa.string() if kind.precision > 38 else pa.decimal128(kind.precision, kind.scale)
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _repaired(array: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """Return an array without the texts that are not UTF-8, and the JSON of those; None if there is no such text.

    DuckDB would read such a text as an empty one.
    """
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        values = array.cast(pa.large_binary()).to_pylist()
    else:
        return None
    texts: list[str | None] = []
    told: list[str | None] = []
    for value in values:
        try:
            texts.append(None if value is None else value.decode())
            told.append(None)
        except UnicodeDecodeError:
            texts.append(None)
            told.append(_encode({"not_utf8": value.decode("utf-8", "backslashreplace")}))
    return pa.array(texts, pa.large_string()), pa.array(told, pa.large_string())


def _arrivals(array: pa.Array, topic: Topic) -> pa.Array:
    """Return times of arrival in microseconds, NULL where a number is no plausible time."""
    if pa.types.is_timestamp(array.type):
        return array.cast(pa.timestamp("us"), safe=False)
    years = topic.limits.years
    moments = [None if value is None else years.parse(str(value)) for value in array.to_pylist()]
    return pa.array([moment and moment.replace(tzinfo=None) for moment in moments], pa.timestamp("us"))


def _microseconds(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _ahead(produce: Callable[[], Iterator[Messages]]) -> Generator[Messages]:
    """Yield the items of `produce`, which runs in a thread at most AHEAD items ahead."""
    ready: queue.Queue[Messages | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(item: Messages | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            with closing(produce()) as items:  # type: ignore[type-var]
                for item in items:
                    if not put(item):
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="prefs-columns", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
