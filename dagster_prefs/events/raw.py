"""Writing messages into the raw tables, each at most once, also after repetitions and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self, TypeVar

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError

# Rows per INSERT, as RisingWave has no COPY. With six parameters each, far below the wire's limit of 65,535.
ROWS_PER_INSERT = 1000
# Bytes of messages per INSERT, which the engine holds in memory at once.
BYTES_PER_INSERT = 8 * 1024 * 1024

AGAIN = "everything accepted so far is kept; run the same command again to complete it"


class RawStoreError(PrefsError):
    """The engine did not accept a batch of messages; earlier batches are stored."""


class RawMessage(NamedTuple):
    """A message with its position in its source; `kafka_timestamp` is None for other sources."""

    partition: int
    offset: int
    data: bytes
    kafka_timestamp: datetime | None = None


class Place(NamedTuple):
    """The position of a message within its topic."""

    source: str
    partition: int
    offset: int


class StoredMessage(NamedTuple):
    """A row of a raw table."""

    source: str
    source_partition: int
    source_offset: int
    data: bytes
    kafka_timestamp: datetime | None
    arrived_at: datetime


Message = TypeVar("Message", RawMessage, StoredMessage)


@dataclass(frozen=True)
class Progress:
    """The progress of an ingestion: `done` of `total` `unit`s; `total` is None if no end is known."""

    messages: int
    done: int
    total: int | None
    unit: str


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Batches:
    """How many messages are stored at a time, and who is told after each batch."""

    size: int = 10_000
    progress: ProgressCallback | None = None


@dataclass(frozen=True)
class IngestReport:
    """The outcome of one ingestion.

    `lines` messages were read (without blank lines and tombstones, which `blank` counts): `accepted` of them
    are new in the raw table, `already_present` were stored before. `shift_seconds` was added to every event
    time. `note` is a sentence for the user, or None. `seconds` is wall time. `malformed` counts rows of a CSV
    file that could not be read, which are stored unchanged and rejected; `examples` are (line, reason) of the
    first of them.
    """

    source: str
    topic: str
    lines: int
    accepted: int
    already_present: int
    blank: int
    shift_seconds: int
    seconds: float
    note: str | None = None
    malformed: int = 0
    examples: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """The stored state of a source; `completed_at` is None until it is complete.

    `lines` is the number of its messages. Of an incomplete table of columns it is the number of rows that were
    read and need not be read again; of another incomplete file it is None.
    """

    source: str
    path: str
    topic: str
    lines: int | None
    shift_seconds: int
    completed_at: datetime | None


class RawStore:
    """A connection to the engine that writes raw tables and `ingest_files`; a context manager.

    Opening raises EngineUnavailable. Every method raises RawStoreError with the remedy: the connection was
    lost, the engine's disk is full, or a table is missing.
    """

    def __init__(self, connection: EngineConfiguration) -> None:
        self.engine = connection
        self._connection = connection.connect(autocommit=True)
        self._staged = False
        self._collided = False

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, topic: TopicDeclaration, source: str, messages: Sequence[RawMessage]) -> int:
        """Store a batch in one transaction, and return how many of its messages are new.

        A message whose source, partition and offset are already stored keeps its first content.
        """
        if not messages:
            return 0
        with self._translated(topic.raw):
            if self.engine.kind == "risingwave":
                return self._insert(topic, source, messages)
            return self._copy(topic, source, messages)

    def copy_lines(
        self, topic: TopicDeclaration, columns: Sequence[str], lines: Sequence[memoryview], read: FileRecord
    ) -> int:
        """Store lines of COPY's text format, which have these columns of the raw table, on the embedded engine.

        Stores `read`, which tells how far the source was read, in the same transaction. Returns how many lines
        are new; one whose place is already stored keeps its first content.
        """
        with self._translated(topic.raw):
            if self._collided:
                return self._copy_staged(topic, columns, lines, read)
            try:
                # Half the processor time of staging, which takes over where a part of the source is stored.
                with self._connection.transaction(), self._connection.cursor() as cursor:
                    accepted = self._copy_text(cursor, self._relation(topic.raw), columns, lines)
                    self._wait_from_now(cursor, topic, columns)
                    self.remember_end(read)
                return accepted
            except psycopg.errors.UniqueViolation:
                self._collided = True
                return self._copy_staged(topic, columns, lines, read)

    def restore(self, topic: TopicDeclaration, messages: Sequence[StoredMessage], relation: str = "") -> int:
        """Store messages of any sources as they once were stored, times included, in the topic's raw table.

        One whose place is already stored keeps its first content. Returns how many are new. RisingWave does not tell,
        so there it is the number of messages; `relation` is there the name of another table of this kind.
        """
        columns = StoredMessage._fields
        if self.engine.kind == "risingwave":
            return self._insert_stored(relation or topic.raw, messages)
        with self._translated(topic.raw), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "create temporary table prefs_restored (like {} including defaults) on commit drop"
                ).format(self._relation(topic.raw))
            )
            with cursor.copy(
                sql.SQL("copy pg_temp.prefs_restored ({}) from stdin (format binary)").format(_names(columns))
            ) as copy:
                copy.set_types(["text", "int4", "int8", "bytea", "timestamptz", "timestamptz"])
                for message in messages:
                    copy.write_row(message)
            cursor.execute(
                sql.SQL(
                    "insert into {} ({columns}) select {columns} from pg_temp.prefs_restored on conflict do nothing"
                ).format(self._relation(topic.raw), columns=_names(columns))
            )
            restored = cursor.rowcount
            self._wait_from_now(cursor, topic, columns)
        return restored

    def _insert_stored(self, relation: str, messages: Sequence[StoredMessage]) -> int:
        row = sql.SQL("({})").format(sql.SQL(", ").join([sql.Placeholder()] * len(StoredMessage._fields)))
        with self._translated(relation):
            for batch in inserted_at_once(messages):
                self._connection.execute(
                    sql.SQL("insert into {} ({}) values {}").format(
                        self._relation(relation),
                        _names(StoredMessage._fields),
                        sql.SQL(", ").join([row] * len(batch)),
                    ),
                    [value for message in batch for value in message],
                )
        return len(messages)

    def _copy_staged(
        self, topic: TopicDeclaration, columns: Sequence[str], lines: Sequence[memoryview], read: FileRecord
    ) -> int:
        raw, staged = self._relation(topic.raw), sql.SQL("pg_temp.prefs_lines")
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "create temporary table prefs_lines (like {} including defaults) on commit drop"
                ).format(raw)
            )
            self._copy_text(cursor, staged, columns, lines)
            cursor.execute(
                sql.SQL("insert into {} ({}) select {} from {} on conflict do nothing").format(
                    raw, _names(columns), _names(columns), staged
                )
            )
            accepted = cursor.rowcount
            self._wait_from_now(cursor, topic, columns)
            self.remember_end(read)
        return accepted

    def _wait_from_now(
        self, cursor: psycopg.Cursor[Any], topic: TopicDeclaration, columns: Sequence[str]
    ) -> None:
        """Have messages that arrived elsewhere, long ago, wait for the follower since this transaction.

        Otherwise they would be waiting for years, for freshness, and every live message for all of them, which
        the follower takes first.
        """
        noted = sql.SQL(".").join([sql.Identifier(self.engine.schema), sql.Identifier("raw_arrivals")])
        if "arrived_at" in columns and cursor.execute(
            "select to_regclass(%s) is not null", [noted.as_string(cursor)]
        ).fetchone() == (True,):
            cursor.execute(
                sql.SQL(
                    "update {} set arrived_at = transaction_timestamp() "
                    "where relation = %s and xmin = pg_current_xact_id()::xid"
                ).format(noted),
                [topic.raw],
            )

    def _copy_text(
        self,
        cursor: psycopg.Cursor[Any],
        relation: sql.Composable,
        columns: Sequence[str],
        lines: Sequence[memoryview],
    ) -> int:
        statement = sql.SQL("copy {} ({}) from stdin").format(relation, _names(columns))
        with cursor.copy(statement) as copy:
            for part in lines:
                copy.write(part)
        return cursor.rowcount

    def last_offsets(self, topic: TopicDeclaration, source: str) -> dict[int, int]:
        """Return the highest stored offset of each partition of a source."""
        with self._translated(topic.raw):
            rows = self._connection.execute(
                sql.SQL(
                    "select source_partition, max(source_offset) from {} where source = %s "
                    "group by source_partition"
                ).format(self._relation(topic.raw)),
                (source,),
            ).fetchall()
        return {int(partition): int(offset) for partition, offset in rows}

    def data(self, topic: TopicDeclaration, place: Place) -> bytes:
        """Return the stored bytes of a message. Raises RawStoreError if it is not stored."""
        with self._translated(topic.raw):
            row = self._connection.execute(
                sql.SQL(
                    'select "data" from {} where source = %s and source_partition = %s and source_offset = %s'
                ).format(self._relation(topic.raw)),
                place,
            ).fetchone()
        if row is None:
            raise RawStoreError(
                f"{topic.raw} has no message {place.source} {place.partition}/{place.offset}: {AGAIN}"
            )
        return bytes(row[0])

    def recall(self, source: str) -> FileRecord | None:
        """Return the stored state of a source, None if there is none."""
        return next((record for record in self.recall_all(source) if record.source == source), None)

    def recall_all(self, prefix: str) -> list[FileRecord]:
        """Return the stored state of every source whose name starts with `prefix`, by name."""
        with self._translated("ingest_files"):
            rows = self._connection.execute(
                sql.SQL(
                    "select source, path, topic, lines, shift_seconds, completed_at from {} "
                    "where substr(source, 1, {}) = %s order by source"
                ).format(self._relation("ingest_files"), sql.Literal(len(prefix))),
                (prefix,),
            ).fetchall()
        return [FileRecord(*row) for row in rows]

    def completed(self, path: str) -> FileRecord | None:
        """Return the stored state of a source that was read completely from this path, None if there is none."""
        with self._translated("ingest_files"):
            row = self._connection.execute(
                sql.SQL(
                    "select source, path, topic, lines, shift_seconds, completed_at from {} "
                    "where path = %s and completed_at is not null order by completed_at desc limit 1"
                ).format(self._relation("ingest_files")),
                (path,),
            ).fetchone()
        return FileRecord(*row) if row else None

    def remember_start(self, record: FileRecord) -> FileRecord:
        """Record the start of a source's first ingestion, once. Returns the stored state."""
        known = self.recall(record.source)
        if known is None:
            self._remember(record, "on conflict (source) do nothing")
            known = self.recall(record.source)
        if known is None:
            raise RawStoreError(
                f"the engine did not store the ingestion progress of {record.source}: {AGAIN}"
            )
        return known

    def remember_end(self, record: FileRecord) -> None:
        """Record that a source is complete, or how far it was read; its first recorded shift stays."""
        self._remember(
            record,
            "on conflict (source) do update set path = excluded.path, topic = excluded.topic, "
            "lines = excluded.lines, completed_at = excluded.completed_at",
        )

    def remember_replayed(self, topic: TopicDeclaration, places: Sequence[Place], at: datetime) -> None:
        """Record that the rejected messages at these positions were sent again at `at` (UTC)."""
        # On RisingWave an insert into a keyed table replaces the row of its key.
        ending = "on conflict do nothing" if self.engine.kind == "local" else ""
        for start in range(0, len(places), ROWS_PER_INSERT):
            batch = places[start : start + ROWS_PER_INSERT]
            values = [value for place in batch for value in (topic.name, *place, at)]
            with self._translated("replayed_events"):
                self._connection.execute(
                    sql.SQL(
                        "insert into {} (topic, source, source_partition, source_offset, replayed_at) values {} {}"
                    ).format(
                        self._relation("replayed_events"),
                        sql.SQL(", ").join([sql.SQL("(%s, %s, %s, %s, %s)")] * len(batch)),
                        sql.SQL(ending),
                    ),
                    values,
                )

    def _remember(self, record: FileRecord, on_conflict: str) -> None:
        # On RisingWave an insert into a keyed table replaces the row of its key.
        ending = on_conflict if self.engine.kind == "local" else ""
        with self._translated("ingest_files"):
            self._connection.execute(
                sql.SQL(
                    "insert into {} (source, path, topic, lines, shift_seconds, completed_at) "
                    "values (%s, %s, %s, %s, %s, %s) {}"
                ).format(self._relation("ingest_files"), sql.SQL(ending)),
                (
                    record.source, record.path, record.topic, record.lines, record.shift_seconds,
                    record.completed_at,
                ),
            )  # fmt: skip

    def _copy(self, topic: TopicDeclaration, source: str, messages: Sequence[RawMessage]) -> int:
        with self._connection.transaction(), self._connection.cursor() as cursor:
            if not self._staged:
                cursor.execute(
                    "create temporary table prefs_incoming (source_partition int, source_offset bigint, "
                    "data bytea, kafka_timestamp timestamptz) on commit delete rows"
                )
            with cursor.copy("copy pg_temp.prefs_incoming from stdin (format binary)") as copy:
                copy.set_types(["int4", "int8", "bytea", "timestamptz"])
                write_row = copy.write_row
                for message in messages:
                    write_row(message)
            cursor.execute(
                sql.SQL(
                    "insert into {} (source, source_partition, source_offset, data, kafka_timestamp) "
                    "select %s, source_partition, source_offset, data, kafka_timestamp "
                    "from pg_temp.prefs_incoming "
                    "on conflict (source, source_partition, source_offset) do nothing"
                ).format(self._relation(topic.raw)),
                (source,),
            )
            accepted = cursor.rowcount
        self._staged = True
        return accepted

    def _insert(self, topic: TopicDeclaration, source: str, messages: Sequence[RawMessage]) -> int:
        accepted = 0
        for batch in inserted_at_once(messages):
            present = self._present(topic, source, batch)
            fresh = [message for message in batch if (message.partition, message.offset) not in present]
            if not fresh:
                continue
            row = sql.SQL("(%s, %s, %s, %s, %s)")
            values: list[Any] = []
            for message in fresh:
                values += [source, *message]
            self._connection.execute(
                sql.SQL(
                    "insert into {} (source, source_partition, source_offset, data, kafka_timestamp) "
                    "values {}"
                ).format(self._relation(topic.raw), sql.SQL(", ").join([row] * len(fresh))),
                values,
            )
            accepted += len(fresh)
        return accepted

    def _present(
        self, topic: TopicDeclaration, source: str, batch: Sequence[RawMessage]
    ) -> set[tuple[int, int]]:
        offsets = [message.offset for message in batch]
        rows = self._connection.execute(
            sql.SQL(
                "select source_partition, source_offset from {} "
                "where source = %s and source_offset between %s and %s"
            ).format(self._relation(topic.raw)),
            (source, min(offsets), max(offsets)),
        ).fetchall()
        return {(int(partition), int(offset)) for partition, offset in rows}

    def _relation(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)

    @contextmanager
    def _translated(self, relation: str) -> Iterator[None]:
        with translated(self.engine, relation):
            yield


@contextmanager
def translated(engine: EngineConfiguration, relation: str) -> Iterator[None]:
    """Translate psycopg's errors about `relation` into RawStoreErrors with the remedy."""
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        raise _missing(engine, relation) from None
    except psycopg.errors.UndefinedColumn as error:
        raise RawStoreError(
            f"{relation} in schema {engine.schema} has other columns than this project's ({_first(error)}): "
            "rename that relation or choose another PREFS_ENGINE_SCHEMA, then run `dbt run` in dbt_project/"
        ) from None
    except psycopg.errors.DiskFull as error:
        raise RawStoreError(
            f"the engine's disk is full while writing {relation} ({_first(error)}): free space; {AGAIN}"
        ) from None
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        remedy = "run `prefs up`" if engine.kind == "local" else "check that it runs"
        raise RawStoreError(
            f"the connection to the engine at {engine.host}:{engine.port} was lost while writing {relation} "
            f"({_first(error)}): {remedy}; {AGAIN}"
        ) from None
    except psycopg.Error as error:
        # RisingWave reports a missing relation as an internal error, with the reason later in its text.
        if "table or source not found" in str(error):
            raise _missing(engine, relation) from None
        raise RawStoreError(f"the engine refused a batch for {relation} ({_first(error)}): {AGAIN}") from None


def _missing(engine: EngineConfiguration, relation: str) -> RawStoreError:
    return RawStoreError(
        f"the engine has no table {relation} in schema {engine.schema}: "
        "create it with `dbt run` in dbt_project/ and run the same command again"
    )


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def inserted_at_once(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the messages in parts for one INSERT: of `ROWS_PER_INSERT`, and of `BYTES_PER_INSERT` or one message."""
    start = size = 0
    for place, message in enumerate(messages):
        if place > start and (
            place - start >= ROWS_PER_INSERT or size + len(message.data) > BYTES_PER_INSERT
        ):
            yield messages[start:place]
            start, size = place, 0
        size += len(message.data)
    if start < len(messages):
        yield messages[start:]
