"""The engine's deliveries of one topic: what arrived in each hour, and the rows of an hour with their bytes.

What arrived is read from the parsed relation, which keeps every message that it has read, also those whose bytes have
left the raw table by retention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, cast

import psycopg
import pyarrow as pa
from psycopg import sql

from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.engine.catalog import NotDeployed, missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.event_tables import ARRIVED, DATA, PLACE, SENT, EventTable
from dagster_prefs.iceberg.tiles import TilesUnreadable

HOUR = timedelta(hours=1)
# What libpq holds at a time: a message may have a megabyte and more.
ROWS_FETCHED = 200
# What an Arrow batch holds, at most about.
BATCH_ROWS, BATCH_BYTES = 20_000, 16 * 1024 * 1024
# A row of RisingWave is visible at the next barrier after its arrival; barriers are late under load.
BARRIER_SECONDS = 60.0

VALID, SUPPRESSED, PEOPLE = "prefs_valid", "prefs_suppressed", "prefs_people"
IN_RAW = "prefs_in_raw"


class EventsUnreadable(TilesUnreadable):
    """The engine cannot deliver the events of a topic."""


@dataclass(frozen=True)
class HourPrint:
    """The engine's summary of the deliveries that arrived in one hour.

    `rows` and `offsets` (the sum of their offsets) are of all deliveries, `typed_rows` and `typed_offsets` of those
    that belong into the typed table; `redacted` have lost their content to an erasure. `content` changes with any row.
    """

    rows: int
    offsets: int
    typed_rows: int
    typed_offsets: int
    redacted: int
    content: Decimal

    @property
    def token(self) -> str:
        """16 hexadecimal digits that differ if the hour's content differs."""
        text = f"{self.rows}|{self.offsets}|{self.typed_rows}|{self.content.normalize():f}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class EventSource:
    """One consistent snapshot of the engine. `subject_kind` is None for a topic about nobody that can be erased."""

    def __init__(
        self,
        connection: psycopg.Connection[tuple[Any, ...]],
        engine: EngineConfiguration,
        typed: EventTable,
        subject_kind: str | None,
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._typed = typed
        self._topic = typed.topic
        self._subject_kind = subject_kind

    def hours(self, first: datetime | None = None, last: datetime | None = None) -> dict[datetime, HourPrint]:
        """Return the summary of every hour (its start, UTC) from `first` to `last` in which something arrived."""
        columns = ["reason", SENT, *(field.name for field in self._typed.fields)]
        content = sql.SQL(" || '|' || ").join(
            [
                *(sql.SQL("p.{}::text").format(sql.Identifier(name)) for name in (*PLACE, ARRIVED)),
                *(sql.SQL("coalesce(p.{}::text, '~')").format(sql.Identifier(name)) for name in columns),
                sql.SQL("case when {} then 's' else '' end").format(self._suppressed()),
            ]
        )
        rows = self._connection.execute(
            sql.SQL(
                "select date_trunc('hour', arrived_at), count(*), sum(source_offset),"
                " count(*) filter (where typed), coalesce(sum(source_offset) filter (where typed), 0),"
                " count(*) filter (where reason = 'erased'), sum({hash})"
                " from (select p.arrived_at, p.source_offset, p.reason, {content} as content, {typed} as typed"
                "   from {read} where {between}) as delivered group by 1"
            ).format(
                between=_between(first, last),
                hash=_row_hash(self._engine.kind),
                content=content,
                typed=self._is_typed(),
                read=self._deliveries(),
            )
        ).fetchall()
        return {
            hour: HourPrint(
                int(n), int(offsets), int(typed), int(typed_offsets), int(redacted), Decimal(content)
            )
            for hour, n, offsets, typed, typed_offsets, redacted, content in sorted(rows)
        }

    def redacted(self, first: datetime, last: datetime) -> dict[datetime, int]:
        """Return how many messages of each hour from `first` to `last` have lost their content to an erasure."""
        rows = self._connection.execute(
            sql.SQL(
                "select date_trunc('hour', p.arrived_at), count(*) from {} as p where p.reason = 'erased' and {}"
                " group by 1"
            ).format(self._relation(self._topic.parsed), _between(first, last))
        ).fetchall()
        return {hour: int(count) for hour, count in rows}

    def oldest_raw(self) -> datetime | None:
        """Return the first arrival whose bytes the engine still has, None if it has none."""
        row = self._connection.execute(
            sql.SQL("select min(arrived_at) from {}").format(self._relation(self._topic.raw))
        ).fetchone()
        return row[0] if row else None

    def erasures(self) -> tuple[int, datetime | None]:
        """Return the count of the topic's erased subjects and the latest erasure time, to detect a new one."""
        if self._subject_kind is None:
            return 0, None
        row = self._connection.execute(
            sql.SQL("select count(*), max(erased_at) from {} where subject_kind = %s").format(
                self._relation("erased_subjects")
            ),
            [self._subject_kind],
        ).fetchone()
        return (int(row[0]), row[1]) if row else (0, None)

    def erased(self) -> list[tuple[str, datetime]]:
        """Return the topic's erased subjects, each with the event time until which it is erased."""
        if self._subject_kind is None or self._topic.time is None:
            return []
        return self._connection.execute(
            sql.SQL("select subject_id, erased_at from {} where subject_kind = %s").format(
                self._relation("erased_subjects")
            ),
            [self._subject_kind],
        ).fetchall()

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of `rows`: place, times, bytes (NULL if they have left), what the row is, and its fields."""
        own = self._typed.arrow_schema
        return pa.schema(
            [
                *(own.field(name).with_nullable(True) for name in (*PLACE, SENT, ARRIVED)),
                pa.field(DATA, pa.large_binary()),
                *(pa.field(name, pa.bool_()) for name in (VALID, SUPPRESSED, PEOPLE)),
                *(own.field(field.name).with_nullable(True) for field in self._typed.fields),
            ]
        )

    def rows(self, hour: datetime, *, with_bytes: bool = True) -> Generator[pa.RecordBatch]:
        """Stream the deliveries of an hour, unordered, in Arrow batches of a few megabytes.

        Without `with_bytes` the bytes are NULL, and the raw table is not read.
        """
        schema = self.schema
        query = sql.SQL(
            "select {place}, {times}, {data}, p.reason is null, {suppressed}, {people}, {fields}"
            " from {read} {raw} where p.arrived_at >= {first} and p.arrived_at < {last}"
        ).format(
            place=sql.SQL(", ").join(sql.Identifier("p", name) for name in PLACE),
            times=sql.SQL(", ").join(_microseconds(name) for name in (SENT, ARRIVED)),
            data=sql.Identifier("r", DATA) if with_bytes else sql.SQL("null::bytea"),
            suppressed=self._suppressed(),
            people=self._people(),
            fields=sql.SQL(", ").join(
                _microseconds(field.name) if field.type == "timestamptz" else sql.Identifier("p", field.name)
                for field in self._typed.fields
            ),
            read=self._deliveries(),
            raw=self._raw_of(hour) if with_bytes else sql.SQL(""),
            first=_instant(hour),
            last=_instant(hour + HOUR),
        )
        place = schema.get_field_index(DATA)
        yield from self._streamed(query, schema, lambda row: len(row[place] or b""))

    def places(self, hour: datetime) -> Generator[pa.RecordBatch]:
        """Stream the place and arrival of the deliveries of an hour, and whether the raw table still has each."""
        query = sql.SQL(
            "select {place}, {arrived}, r.source is not null from {parsed} as p {raw}"
            " where p.arrived_at >= {first} and p.arrived_at < {last}"
        ).format(
            place=sql.SQL(", ").join(sql.Identifier("p", name) for name in PLACE),
            arrived=_microseconds(ARRIVED),
            parsed=self._relation(self._topic.parsed),
            raw=self._raw_of(hour),
            first=_instant(hour),
            last=_instant(hour + HOUR),
        )
        yield from self._streamed(query, self.places_schema)

    @property
    def places_schema(self) -> pa.Schema:
        """The Arrow schema of `places`; the arrival is in microseconds since 1970."""
        own = self._typed.arrow_schema
        return pa.schema(
            [
                *(own.field(name) for name in PLACE),
                pa.field(ARRIVED, pa.int64()),
                pa.field(IN_RAW, pa.bool_()),
            ]
        )

    def _streamed(
        self, query: sql.Composed, schema: pa.Schema, size_of: Callable[[tuple[Any, ...]], int] = lambda _: 0
    ) -> Generator[pa.RecordBatch]:
        with (
            self._connection.cursor() as cursor,
            closing(cast("Generator[tuple[Any, ...]]", cursor.stream(query, size=ROWS_FETCHED))) as rows,
        ):
            held: list[tuple[Any, ...]] = []
            size = 0
            for row in rows:
                held.append(row)
                size += size_of(row)
                if len(held) >= BATCH_ROWS or size >= BATCH_BYTES:
                    yield _batch(held, schema)
                    held, size = [], 0
            if held:
                yield _batch(held, schema)

    def _raw_of(self, hour: datetime) -> sql.Composed:
        """Return the join of the raw messages of an hour as `r`."""
        return sql.SQL(
            "left join {raw} as r on r.source = p.source and r.source_partition = p.source_partition"
            " and r.source_offset = p.source_offset and r.arrived_at >= {first} and r.arrived_at < {last}"
        ).format(raw=self._relation(self._topic.raw), first=_instant(hour), last=_instant(hour + HOUR))

    def _deliveries(self) -> sql.Composed:
        """Return the parsed relation as `p`, with the erasure that covers a row, if there is one, as `e`."""
        parsed = sql.SQL("{} as p").format(self._relation(self._topic.parsed))
        if self._subject_kind is None or self._topic.time is None:
            return parsed
        return sql.SQL(
            "{} left join {} as e on e.subject_kind = {} and e.subject_id = p.{}::text and p.{} <= e.erased_at"
        ).format(
            parsed,
            self._relation("erased_subjects"),
            sql.Literal(self._subject_kind),
            sql.Identifier(self._typed.key),
            sql.Identifier(self._topic.time),
        )

    def _suppressed(self) -> sql.Composable:
        suppressible = self._subject_kind is not None and self._topic.time is not None
        return sql.SQL("(e.subject_id is not null)" if suppressible else "false")

    def _people(self) -> sql.Composable:
        return people_only(self._typed.entity.key) if self._typed.entity else sql.SQL("true")

    def _is_typed(self) -> sql.Composed:
        return sql.SQL("(p.reason is null and not {} and {})").format(self._suppressed(), self._people())

    def _relation(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._engine.schema, name)


def _instant(moment: datetime) -> sql.Composed:
    return sql.SQL("{}::timestamptz").format(sql.Literal(moment.isoformat()))


def _between(first: datetime | None, last: datetime | None) -> sql.Composable:
    bounds = [
        sql.SQL("p.arrived_at {} {}::timestamptz").format(sql.SQL(sign), sql.Literal(moment.isoformat()))
        for sign, moment in ((">=", first), ("<", None if last is None else last + HOUR))
        if moment is not None
    ]
    return sql.SQL(" and ").join(bounds) if bounds else sql.SQL("true")


def _microseconds(name: str) -> sql.Composed:
    # A number travels without its time zone, and is the column's own value in Arrow.
    return sql.SQL("(extract(epoch from p.{}) * 1000000)::bigint").format(sql.Identifier(name))


def _batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = []
    for values, field in zip(columns, schema, strict=True):
        if pa.types.is_timestamp(field.type):
            arrays.append(pa.array(values, pa.int64()).cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _row_hash(kind: str) -> sql.SQL:
    """Return the hash of `content` as a bigint, as the macro `row_hash` does."""
    if kind == "local":
        return sql.SQL("('x' || left(md5(content), 15))::bit(60)::bigint")
    # RisingWave has no bit strings.
    digits = " + ".join(
        f"(strpos('0123456789abcdef', substr(md5(content), {digit}, 1)) - 1)::bigint * {16 ** (15 - digit)}"
        for digit in range(1, 16)
    )
    return sql.SQL(f"({digits})")


@contextmanager
def event_source(
    engine: EngineConfiguration, typed: EventTable, subject_kind: str | None
) -> Iterator[EventSource]:
    """Open one consistent, read-only snapshot of the engine.

    Raises NotDeployed if a relation is missing, EventsUnreadable if the connection breaks, EngineUnavailable.
    """
    start = (
        "start transaction isolation level repeatable read read only"
        if engine.kind == "local"
        else "start transaction read only"
    )
    with engine.connect() as connection, _translated(typed):
        connection.execute(start)
        yield EventSource(connection, engine, typed, subject_kind)
        connection.execute("commit")


def arrived_until(engine: EngineConfiguration, typed: EventTable) -> datetime | None:
    """Return the instant (UTC) before which everything that arrived by now is visible to whoever looks from now on.

    A writer's messages become visible together, at its commit, with times of arrival that go back to its start. None if
    the engine does not tell when a writer at work began.
    """
    with engine.connect() as connection, _translated(typed):
        if engine.kind != "local":
            ((now,),) = connection.execute("select now()").fetchall()
            return cast("datetime", now) - timedelta(seconds=BARRIER_SECONDS)
        # Before the writers are looked up: one that begins in between stores later times.
        ((now,),) = connection.execute("select clock_timestamp() - interval '1 microsecond'").fetchall()
        starts = connection.execute(
            "select activity.xact_start from pg_locks as held"
            " left join pg_stat_activity as activity on activity.pid = held.pid"
            " where held.locktype = 'relation' and held.relation = %s::regclass and held.granted"
            " and held.database = (select oid from pg_database where datname = current_database())"
            " and held.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')",
            [f'"{engine.schema}"."{typed.topic.raw}"'],
        ).fetchall()
        if any(start is None for (start,) in starts):
            return None
        began = [start - timedelta(microseconds=1) for (start,) in starts]
        until: datetime = min([now, *began])
        return until


@contextmanager
def _translated(typed: EventTable) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        if missing := missing_relation(error):
            raise NotDeployed(f"{missing}: run `prefs apply`, then export again") from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EventsUnreadable(
            f"the engine did not deliver the events of {typed.topic.name} ({reason}): check that it runs, then run it "
            "again"
        ) from error
