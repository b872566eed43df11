"""Ingest tables of columns into the raw tables: a batch at a time, restartable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pyarrow as pa

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.columnar import BATCH_ROWS, Columns, Converter, Table
from dagster_prefs.events.formats import EventFileError, topic_of_columns
from dagster_prefs.events.ingest import Delivery, FileOptions, as_text, check_topic
from dagster_prefs.events.messages import Topic, topics_of
from dagster_prefs.events.pace import Pace
from dagster_prefs.events.raw import Batches, FileRecord, IngestReport, Progress, RawMessage, RawStore


def columns_of(options: FileOptions) -> Columns:
    """Return how a table is read according to the options."""
    return Columns(options.renamed, options.where, options.arrived_at, options.until)


def table_source(table: Table, columns: Columns) -> str:
    """Return the source name of a table's messages: like a file's, but different if options change the messages.

    A table that was ingested with a wrong `--map` can therefore be ingested again with the right one.
    """
    identity = table.identity
    if columns.changes_messages:
        told = json.dumps([identity, sorted(columns.renamed.items()), columns.arrived_at])
        identity = hashlib.sha256(told.encode()).hexdigest()
    return f"file:{as_text(table.source_name)}#{identity[:16]}"


def table_topic(table: Table, registry: Registry, options: FileOptions) -> Topic:
    """Infer the topic of a table from its columns. Raises EventFileError or RegistryError."""
    topics = topics_of(registry)
    wanted = topics[registry.topic(options.topic).name] if options.topic is not None else None
    columns = columns_of(options)
    names = [field for name in table.schema.names if (field := columns.field_of(name)) is not None]
    topic = topic_of_columns(table.name, names, topics, wanted, ", or give --map COLUMN=FIELD for each")
    for column, field in options.renamed.items():
        if field is not None and field not in topic.names:
            raise EventFileError(
                f"--map {column}={field}: {topic.name} has no field {field}; its fields are {', '.join(topic.names)}"
            )
    return topic


def ingest_table(
    connection: EngineConfiguration,
    registry: Registry,
    table: Table,
    options: FileOptions = FileOptions(),  # noqa: B008
    *,
    batches: Batches = Batches(),  # noqa: B008
    deliver: Delivery | None = None,
) -> IngestReport:
    """Store every row of a table as a message in the raw table of its topic. Offsets are row numbers, from 1.

    An interrupted table is completed by ingesting it again: on the embedded engine from the first batch that
    is not stored, else from its start. `deliver` and errors are those of `ingest_file`.
    """
    started = time.monotonic()
    columns = columns_of(options)
    topic = table_topic(table, registry, options)
    check_table_options(table, options)
    if options.arrived_at is not None and (deliver is not None or connection.kind != "local"):
        raise EventFileError(
            f"--arrived-at {options.arrived_at} needs the embedded engine: on RisingWave a message arrives when its "
            "engine reads it; leave the option out"
        )
    source = table_source(table, columns)
    pace = Pace(options.rate)
    rows = pace.batch_size(BATCH_ROWS)
    with RawStore(connection) as store, Converter(table, topic, columns, rows) as converter:
        # Each condition selects other rows, so each has its own record of progress.
        label = options.label or as_text(table.name)
        record = FileRecord(_record_name(source, options), label, topic.name, None, 0, None)
        known = store.recall(record.source)
        if known is None:
            converter.check_arrivals(datetime.now(UTC))
            if deliver is None:
                store.last_offsets(topic, source)
            known = store.remember_start(record)
        check_topic(table.name, known, topic)
        if known.completed_at is not None:
            lines = known.lines or 0
            return IngestReport(source, known.topic, lines, 0, lines, 0, 0, time.monotonic() - started)
        if deliver is None and connection.kind == "local":
            # With a condition, the number of messages of the earlier rows is not known.
            begin = 0 if options.is_selective else known.lines or 0
            run = _Run(store, topic, source, record, begin, begin)
            writing = run.copied(converter, pace)
        else:
            run = _Run(store, topic, source, record)
            writing = run.written(converter, deliver, pace)
        # Close the messages before the converter, because their thread may be using its session.
        with closing(writing):
            for rows in writing:
                if batches.progress is not None:
                    batches.progress(Progress(run.lines, rows, table.rows, "rows"))
        if run.rows == 0:
            raise EventFileError(f"{table.name} is empty: it has columns but no rows")
        store.remember_end(replace(record, lines=run.lines, completed_at=datetime.now(UTC)))
    selecting = [
        option
        for option, value in (("--where", options.where), ("--until", options.until))
        if value is not None
    ]
    return IngestReport(
        source, topic.name, run.lines, run.accepted, run.lines - run.accepted, 0, 0, time.monotonic() - started,
        f"{' and '.join(selecting)} left out {run.rows - run.lines:,} of {run.rows:,} rows" if selecting else None,
    )  # fmt: skip


def check_table_options(table: Table, options: FileOptions) -> None:
    """Raise EventFileError for an option that only files of lines have."""
    if options.shift_to is not None:
        raise EventFileError(
            f"--shift-to-now does not move the times of {table.name}, a table of columns: leave it out, or write the "
            "table as JSON lines"
        )


def _record_name(source: str, options: FileOptions) -> str:
    if not options.is_selective:
        return source
    told = options.where or ""
    if options.until is not None:
        told += f" until {options.until.isoformat()}"
    return f"{source}?{hashlib.sha256(told.encode()).hexdigest()[:8]}"


@dataclass
class _Run:
    """The progress of storing one table: `rows` read so far gave `lines` messages, of which `accepted` are new."""

    store: RawStore
    topic: Topic
    source: str
    record: FileRecord
    rows: int = 0
    lines: int = 0
    accepted: int = 0

    def copied(self, converter: Converter, pace: Pace) -> Generator[int]:
        """Copy the messages to the embedded engine. Yields the number of rows read, after each batch."""
        begun = self.lines
        lines = converter.copy_lines(self.source, self.rows)
        try:
            for batch in lines:
                read = replace(self.record, lines=batch.rows)
                self.accepted += self.store.copy_lines(
                    self.topic, converter.copy_columns, list(_buffers(batch.table)), read
                )
                self.rows, self.lines = batch.rows, self.lines + batch.table.num_rows
                pace.wait(self.lines - begun)
                yield self.rows
        finally:
            lines.close()

    def written(self, converter: Converter, deliver: Delivery | None, pace: Pace) -> Generator[int]:
        """Insert the messages, or pass them to `deliver`. Yields like `copied`."""
        for batch in converter.messages():
            messages = [RawMessage(0, row, message.encode()) for row, message in batch.pairs()]
            if deliver is not None:
                self.accepted += deliver(self.topic, messages)
            else:
                self.accepted += self.store.write(self.topic, self.source, messages)
            self.rows, self.lines = batch.rows, self.lines + len(messages)
            pace.wait(self.lines)
            yield self.rows


def _buffers(table: pa.Table) -> Iterator[memoryview]:
    """Yield the texts of the only column in order, without copying them."""
    for chunk in table.column(0).chunks:
        if len(chunk):
            _, offsets, data = chunk.cast(pa.large_string()).buffers()
            places = memoryview(offsets).cast("q")
            yield memoryview(data)[places[chunk.offset] : places[chunk.offset + len(chunk)]]
