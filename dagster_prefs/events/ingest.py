"""Ingest files into the raw tables: streaming, in batches, restartable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.formats import (
    ColumnMapping,
    EventFileError,
    FileFormat,
    LineReader,
    check_file,
    content_hash,
    detect,
    read_records,
    table_kind,
)
from dagster_prefs.events.messages import event_time, shift_message
from dagster_prefs.events.pace import Pace
from dagster_prefs.events.raw import (
    Batches,
    FileRecord,
    IngestReport,
    Progress,
    RawMessage,
    RawStore,
)

# How many unreadable rows are named individually.
EXAMPLES = 5
# A batch of long lines must not grow with their length.
BATCH_BYTES = 16 * 1024 * 1024


# Takes a batch of messages of one topic and returns how many of them are new.
Delivery = Callable[[TopicDeclaration, Sequence[RawMessage]], int]


@dataclass(frozen=True)
class FileOptions:
    """Options for reading a file.

    `topic` is detected from the content if it is None; `mapping` is that of `formats.detect`. With `shift_to` (UTC)
    every event time moves by the same whole number of seconds, so that the newest event that is not later than it ends
    there.
    `rate` is the highest number of messages that are stored per second.

    Of a table of columns, `renamed` maps columns to fields, to None where a column is left out; `where` is an SQL
    condition over its columns; `arrived_at` is the column that holds when each row arrived. `constants` are further
    columns, which every row has. Rows of events that happened at or after `until` (UTC) are left out.

    `label` is kept as the file's path, by default the path itself.
    """

    topic: str | None = None
    mapping: ColumnMapping | None = "auto"
    shift_to: datetime | None = None
    rate: float | None = None
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    where: str | None = None
    arrived_at: str | None = None
    constants: Mapping[str, str | None] = field(default_factory=dict)
    label: str | None = None
    until: datetime | None = None

    @property
    def is_selective(self) -> bool:
        """Whether rows of a table may be left out."""
        return self.where is not None or self.until is not None

    def check_lines(self, path: Path) -> None:
        """Raise EventFileError if an option is for tables of columns, and the file is none."""
        given = {
            "--map": self.renamed,
            "--where": self.where,
            "--arrived-at": self.arrived_at,
            "--until": self.until,
        }
        if named := [option for option, value in given.items() if value]:
            raise EventFileError(
                f"{path} holds lines of text, and {' and '.join(named)} need typed columns: write it as Parquet or "
                "Arrow first, or leave that out"
            )
        if self.constants:
            raise EventFileError(
                f"{path} holds lines of text, and its folders are named after columns ({', '.join(self.constants)}), "
                "which only tables have: write it as Parquet, or name the file itself if it has all fields"
            )


@dataclass
class Tally:
    """Counts of a file that is being read; `examples` are (line, reason) of the first unreadable rows."""

    lines: int = 0
    accepted: int = 0
    blank: int = 0
    malformed: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)


def file_source(path: Path) -> str:
    """Return the source name of a file's messages: its name and the first 16 hex digits of its content's SHA-256.

    A byte of the name that is not UTF-8 is escaped, because no engine accepts it as text. Raises EventFileError if the
    file is missing, empty, not a regular file or unreadable.
    """
    check_file(path)
    return f"file:{as_text(path.name)}#{content_hash(path)[:16]}"


def as_text(path: Path | str) -> str:
    """Return a path or name as UTF-8, with escapes for bytes that are not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ingest_file(
    connection: EngineConfiguration,
    registry: Registry,
    path: Path,
    options: FileOptions = FileOptions(),
    *,
    batches: Batches = Batches(),  # noqa: B008
    deliver: Delivery | None = None,
) -> IngestReport:
    """Store every line of a JSON-lines or CSV file (gzip too), or row of a Parquet or Arrow file, in its raw table.

    A shift of the times is stored, and later ingests of the same content reuse it. Offsets are line numbers, from 1.
    Memory does not grow with the file. Ingesting an interrupted file again completes it.

    `deliver` sends the messages elsewhere, for example to Kafka, from where the engine's connector reads them. An
    interrupted file is then sent again from its start, and repetitions are recognised by their event_id.

    Raises EventFileError or RegistryError for the file (after storing the lines before the damage), EngineUnavailable
    or RawStoreError for the engine.
    """
    if (kind := table_kind(path)) is not None:
        # Lines need none of what reads tables.
        from dagster_prefs.events.columnar import open_table
        from dagster_prefs.events.table_ingest import ingest_table

        with _unchanged(path):
            table = open_table(path, kind, content_hash(path), options.constants)
            return ingest_table(connection, registry, table, options, batches=batches, deliver=deliver)
    options.check_lines(path)
    started = time.monotonic()
    before = check_file(path)
    file_format = detect(path, registry, options.topic, options.mapping)
    source, label = file_source(path), options.label or as_text(path)
    with RawStore(connection) as store:
        known = store.recall(source)
        if known is None:
            shift = shift_of(path, file_format, options.shift_to) if options.shift_to else 0
            if deliver is None:
                store.last_offsets(file_format.topic, source)
            known = store.remember_start(FileRecord(source, label, file_format.topic.name, None, shift, None))
        check_topic(path, known, file_format.topic)
        note = _shift_note(known, options.shift_to is not None)
        if known.completed_at is not None:
            lines = known.lines or 0
            return IngestReport(
                source, known.topic, lines, 0, lines, 0, known.shift_seconds, time.monotonic() - started, note
            )
        write = deliver or (lambda topic, batch: store.write(topic, source, batch))
        pace = Pace(options.rate)
        with _unchanged(path, before):
            read = _store(write, path, file_format, known, batches, pace)
        if read.lines == 0:
            raise EventFileError(f"{path} is empty: it has a header but no rows")
        store.remember_end(
            FileRecord(source, label, known.topic, read.lines, known.shift_seconds, datetime.now(UTC))
        )
    return IngestReport(
        source,
        known.topic,
        read.lines,
        read.accepted,
        read.lines - read.accepted,
        read.blank,
        known.shift_seconds,
        time.monotonic() - started,
        note,
        read.malformed,
        tuple(read.examples),
    )


@contextmanager
def _unchanged(path: Path, before: os.stat_result | None = None) -> Iterator[None]:
    """Raise EventFileError after the block if the file was changed within it, or since `before`."""
    before = before or check_file(path)
    yield
    after = check_file(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise EventFileError(f"{path} changed while it was read: let its writer finish, then ingest it again")


def check_topic(path: Path | str, known: FileRecord, topic: TopicDeclaration) -> None:
    """Raise EventFileError if a source was stored as messages of another topic."""
    if known.topic != topic.name:
        raise EventFileError(
            f"{path} was ingested as {known.topic} before and is now read as {topic.name}: "
            f"name the topic {known.topic}, or ingest a copy under another file name"
        )


def _shift_note(known: FileRecord, asked: bool) -> str | None:
    if asked and known.completed_at is not None and known.shift_seconds == 0:
        return "its times stay as they are, as at its first ingest; a copy under another name can be shifted"
    if not asked and known.shift_seconds:
        return f"its times are shifted by {known.shift_seconds} s, as at its first ingest"
    return None


def shift_of(path: Path, file_format: FileFormat, now: datetime) -> int:
    """Return the whole seconds from the newest event of the file to `now`, 0 if no time can be read."""
    # An event that the typed layer rejects must not determine the end of a file.
    latest = now + file_format.topic.limits.future_tolerance
    newest: datetime | None = None
    with LineReader(path) as reader:
        try:
            for record in read_records(reader, file_format):
                moment = event_time(record.message, file_format.topic) if record.message else None
                if moment is not None and moment <= latest and (newest is None or moment > newest):
                    newest = moment
        except EventFileError:
            # The lines before the damage are ingested, and ingesting reports the damage.
            if newest is None:
                raise
    return (now - newest) // timedelta(seconds=1) if newest is not None else 0


def _store(
    write: Delivery,
    path: Path,
    file_format: FileFormat,
    known: FileRecord,
    batches: Batches,
    pace: Pace,
) -> Tally:
    """Store the file's records and return their counts."""
    read, size = Tally(), check_file(path).st_size
    batch_size = pace.batch_size(batches.size)
    with LineReader(path) as reader:
        for batch, damage in batches_of(reader, file_format, known.shift_seconds, batch_size, read):
            read.accepted += write(file_format.topic, batch)
            read.lines += len(batch)
            pace.wait(read.lines)
            if batches.progress is not None:
                batches.progress(Progress(read.lines, min(reader.bytes_read, size), size, "bytes"))
            if damage is not None:
                raise damage
    return read


def batches_of(
    reader: LineReader, file_format: FileFormat, shift: int, batch_size: int, read: Tally
) -> Iterator[tuple[list[RawMessage], EventFileError | None]]:
    """Yield batches of messages; the last one carries the damage that ended the file.

    Lines without a message are counted in `read`.
    """
    batch: list[RawMessage] = []
    size = 0
    topic = file_format.topic
    damage: EventFileError | None = None
    try:
        for record in read_records(reader, file_format):
            message = record.message
            if message is None:
                read.blank += 1
                continue
            if record.fault is not None:
                read.malformed += 1
                if len(read.examples) < EXAMPLES:
                    read.examples.append((record.line, record.fault))
            elif shift:
                message = shift_message(message, topic, shift)
            batch.append(RawMessage(0, record.line, message))
            size += len(message)
            if len(batch) >= batch_size or size >= BATCH_BYTES:
                yield batch, None
                batch, size = [], 0
    except EventFileError as error:
        damage = error
    yield batch, damage
