"""History that RisingWave reads itself: a range of an Iceberg source's rows, inserted into a raw table as messages.

A message's place is a hash of its bytes: RisingWave's batch scans tell neither file nor row. So a row that is read
again, in another order or from a compacted file, is stored once; two rows whose messages are equal byte for byte are
one message, which changes no view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from dagster_prefs.declarations.registry import FieldDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.bootstrap import Part
from dagster_prefs.events.columnar import Columns, Table, check_columns, until_column
from dagster_prefs.events.formats import EventFileError
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.raw import translated
from dagster_prefs.ids import EXACT_FLOAT

# Bits of a place: 8 choose the partition, whose number is a row of `ingest_progress`, and 60 are the offset. Of a
# billion messages two share a place with a probability of 0.2 %, of ten million with one in six million.
PARTITION_DIGITS, OFFSET_DIGITS = 2, 15
DAY = timedelta(days=1)
# Returns when what was written is visible in every view.
FLUSH = "flush"
# The most parts of a history: one event of a far year must not make a part of every day before it.
PARTS = 1_000


@dataclass(frozen=True)
class EngineHistory:
    """A table that RisingWave reads over its source `relation`, as of a snapshot.

    `table` has its columns, `columns` say how they are read, `span` is the first and last event time (UTC) by the
    table's own statistics, None where they tell none.
    """

    relation: str
    snapshot_id: int
    table: Table
    columns: Columns
    span: tuple[datetime, datetime] | None

    def parts(self, engine: EngineConfiguration, topic: Topic) -> list[Part]:
        """Return its parts: the days of event time, of which Iceberg skips all other files, and the rest.

        The rest has no time. Without a span, and for reference data, it is everything. Raises EventFileError for
        columns that cannot be messages.
        """
        check_columns(self.table, self.columns)
        until = self.columns.until
        if until is not None:
            until_column(self.table.schema, topic, self.columns, self.table.name)
        column = next(
            (one for one in self.table.schema.names if self.columns.field_of(one) == topic.time), None
        )
        kind = None if column is None else self.table.schema.field(column).type
        if (
            topic.time is None
            or column is None
            or kind is None
            or self.span is None
            or not (pa.types.is_timestamp(kind) or pa.types.is_date(kind))
        ):
            return [self._part(engine, topic, "all", sql.SQL("true"))]
        name = sql.Identifier(column)
        first = self.span[0].astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        last = self.span[1] if until is None else min(self.span[1], until - timedelta(microseconds=1))
        days = max(1, math.ceil((last - first) / DAY / PARTS))
        found = []
        while first <= last:
            end = first + days * DAY if until is None else min(first + days * DAY, until)
            found.append(
                self._part(
                    engine,
                    topic,
                    f"{first:%Y-%m-%d}" if days == 1 else f"{first:%Y-%m-%d} to {end:%Y-%m-%d}",
                    sql.SQL("{name} >= {first} and {name} < {end}").format(
                        name=name, first=_moment(first, kind), end=_moment(end, kind)
                    ),
                )
            )
            first += days * DAY
        return [*found, self._part(engine, topic, "without a time", sql.SQL("{} is null").format(name))]

    def drop(self, engine: EngineConfiguration) -> None:
        """Drop the source. Raises RawStoreError, EngineUnavailable."""
        with engine.connect() as connection, translated(engine, self.relation):
            connection.execute(
                sql.SQL("drop source if exists {}").format(sql.Identifier(engine.schema, self.relation))
            )

    def check_arrivals(self, engine: EngineConfiguration) -> None:
        """Raise EventFileError if a row has no time of arrival, or one in the future."""
        arrival = self.columns.arrived_at
        if arrival is None:
            return
        with engine.connect() as connection, translated(engine, self.relation):
            ((wrong,),) = connection.execute(
                sql.SQL(
                    "select count(*) from {} for system_version as of {} where {} is null or {} > now()"
                ).format(
                    sql.Identifier(engine.schema, self.relation),
                    sql.Literal(self.snapshot_id),
                    sql.Identifier(arrival),
                    _arrival(self.table.schema, arrival),
                )
            ).fetchall()
        if wrong:
            raise EventFileError(
                f"{self.table.name}: {wrong:,} rows have no time of arrival in {arrival}, or one in the future, and "
                "--arrived-at needs one of every row: name another column"
            )

    def _part(self, engine: EngineConfiguration, topic: Topic, name: str, condition: sql.Composable) -> Part:
        def read() -> int:
            with engine.connect() as connection, translated(engine, topic.raw):
                # Times become text in the session's zone.
                connection.execute("set timezone = 'UTC'")
                rows = insert_rows(connection, engine, topic, self, condition)
                connection.execute(FLUSH)
                return rows

        return Part(name, read)


def insert_rows(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    topic: Topic,
    history: EngineHistory,
    condition: sql.Composable,
) -> int:
    """Insert the rows for which a condition holds as messages, and return their number. Raises psycopg.Error."""
    return connection.execute(insert_statement(engine, topic, history, condition)).rowcount


def insert_statement(
    engine: EngineConfiguration, topic: Topic, history: EngineHistory, condition: sql.Composable
) -> sql.Composed:
    """Return the statement that inserts the rows for which a condition holds; a place that is stored stays."""
    arrival = history.columns.arrived_at
    digits = sql.SQL("md5(message)")
    return sql.SQL(
        "insert into {raw} (source, source_partition, source_offset, data{arrived}) "
        "select {source}, ({partition})::int, {offset}, convert_to(message, 'utf8'){arrived} from ("
        "select {message}::varchar as message{arrives} from {relation} for system_version as of {snapshot} "
        "where {condition}) as read"
    ).format(
        raw=sql.Identifier(engine.schema, topic.raw),
        source=sql.Literal(source_of(history.table.name)),
        partition=_number(digits, 1, PARTITION_DIGITS),
        offset=_number(digits, 1 + PARTITION_DIGITS, OFFSET_DIGITS),
        message=_message(history.table.schema, topic, history.columns),
        arrived=sql.SQL(", arrived_at" if arrival else ""),
        arrives=sql.SQL(", {} as arrived_at").format(_arrival(history.table.schema, arrival))
        if arrival
        else sql.SQL(""),
        relation=sql.Identifier(engine.schema, history.relation),
        snapshot=sql.Literal(history.snapshot_id),
        condition=condition,
    )


def source_of(name: str) -> str:
    """Return the source of a table's messages in the raw table."""
    return f"file:{name}"


def _message(schema: pa.Schema, topic: Topic, columns: Columns) -> sql.Composed:
    parts: list[sql.Composable] = []
    for column in schema:
        key = columns.field_of(column.name)
        if key is not None and not pa.types.is_null(column.type):
            parts += [
                sql.Literal(key),
                _value(sql.Identifier(column.name), column.type, topic.by_name.get(key)),
            ]
    return sql.SQL("jsonb_build_object({})").format(sql.SQL(", ").join(parts))


def _value(value: sql.Composable, kind: pa.DataType, field: FieldDeclaration | None) -> sql.Composable:
    """Return the SQL expression of a value in the message, as `columnar` writes it."""
    types = pa.types
    text = sql.SQL("{}::varchar").format(value)
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_nested(kind):
        return value
    if types.is_floating(kind):
        number = sql.SQL("{}::double precision").format(text if types.is_float32(kind) else value)
        unusable = "{n} = 'NaN'::double precision or abs({n}) = 'Infinity'::double precision"
        if field is not None and field.type in ("text", "bigint"):
            unusable += f" or abs({{n}}) >= {EXACT_FLOAT}"
        return sql.SQL(
            "case when " + unusable + " then jsonb_build_object('number', {text}) else to_jsonb({n}) end"
        ).format(n=number, text=text)
    if types.is_decimal(kind):
        return sql.SQL(
            "case when strpos({text}, '.') > 0 then rtrim(rtrim({text}, '0'), '.') else {text} end"
        ).format(text=text)
    if types.is_date(kind) and field is not None and field.type == "timestamptz":
        return sql.SQL("{} || ' 00:00:00Z'").format(text)
    return text


def _arrival(schema: pa.Schema, column: str | None) -> sql.Composable:
    name = sql.Identifier(column or "")
    kind = schema.field(column).type
    if pa.types.is_integer(kind):
        # The magnitude tells the unit: microseconds have 16 digits in the plausible years.
        return sql.SQL(
            "to_timestamp({n} / case when {n} < 100000000000 then 1.0 when {n} < 100000000000000 then 1000.0"
            " when {n} < 100000000000000000 then 1000000.0 else 1000000000.0 end)"
        ).format(n=name)
    return name if getattr(kind, "tz", None) else sql.SQL("{} at time zone 'UTC'").format(name)


def _moment(moment: datetime, kind: pa.DataType) -> sql.Composable:
    # Of the column's own type, because only such a comparison reaches the scan and skips files.
    if pa.types.is_date(kind):
        # A day that has begun counts whole, as midnight is before any other time of it.
        began = moment.date() + (DAY if moment.time() != datetime.min.time() else timedelta())
        return sql.SQL("{}::date").format(sql.Literal(began.isoformat()))
    if getattr(kind, "tz", None) is None:
        return sql.SQL("{}::timestamp").format(sql.Literal(moment.replace(tzinfo=None).isoformat(" ")))
    return sql.SQL("{}::timestamptz").format(sql.Literal(moment.isoformat(" ")))


def _number(digits: sql.Composable, first: int, count: int) -> sql.Composed:
    """Return the number that `count` hexadecimal digits are, from digit `first` (1-based) on."""
    # RisingWave has no bit strings.
    terms: Sequence[sql.Composable] = [
        sql.SQL("(strpos('0123456789abcdef', substr({digits}, {at}, 1)) - 1)::bigint * {weight}").format(
            digits=digits, at=sql.Literal(first + place), weight=sql.Literal(16 ** (count - 1 - place))
        )
        for place in range(count)
    ]
    return sql.SQL("({})").format(sql.SQL(" + ").join(terms))
