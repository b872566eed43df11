"""Ingest files into the raw tables: streaming, in batches, restartable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
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
)
from dagster_prefs.events.messages import event_time, shift_message
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
    """

    topic: str | None = None
    mapping: ColumnMapping | None = "auto"
    shift_to: datetime | None = None


@dataclass
class _Tally:
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
    return f"file:{_as_text(path.name)}#{content_hash(path)[:16]}"


def _as_text(path: Path | str) -> str:
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
    """Store every line of a JSON-lines or CSV file (gzip too) in the raw table of its topic.

    A shift of the times is stored, and later ingests of the same content reuse it. Offsets are line numbers, from 1.
    Memory does not grow with the file. Ingesting an interrupted file again completes it.

    `deliver` sends the messages elsewhere, for example to Kafka, from where the engine's connector reads them. An
    interrupted file is then sent again from its start, and repetitions are recognised by their event_id.

    Raises EventFileError or RegistryError for the file (after storing the lines before the damage), EngineUnavailable
    or RawStoreError for the engine.
    """
    started = time.monotonic()
    before = check_file(path)
    file_format = detect(path, registry, options.topic, options.mapping)
    source = file_source(path)
    with RawStore(connection) as store:
        known = store.recall(source)
        if known is None:
            shift = _shift_to(path, file_format, options.shift_to) if options.shift_to else 0
            if deliver is None:
                store.last_offsets(file_format.topic, source)
            known = store.remember_start(
                FileRecord(source, _as_text(path), file_format.topic.name, None, shift, None)
            )
        _check_topic(path, known, file_format)
        note = _shift_note(known, options.shift_to is not None)
        if known.completed_at is not None:
            lines = known.lines or 0
            return IngestReport(
                source, known.topic, lines, 0, lines, 0, known.shift_seconds, time.monotonic() - started, note
            )
        write = deliver or (lambda topic, batch: store.write(topic, source, batch))
        read = _store(write, path, file_format, known, batches, before.st_size)
        after = check_file(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise EventFileError(
                f"{path} changed while it was read: let its writer finish, then ingest it again"
            )
        if read.lines == 0:
            raise EventFileError(f"{path} is empty: it has a header but no rows")
        store.remember_end(
            FileRecord(
                source, _as_text(path), known.topic, read.lines, known.shift_seconds, datetime.now(UTC)
            )
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


def _check_topic(path: Path, known: FileRecord, file_format: FileFormat) -> None:
    if known.topic != file_format.topic.name:
        raise EventFileError(
            f"{path} was ingested as {known.topic} before and is now read as {file_format.topic.name}: "
            f"name the topic {known.topic}, or ingest a copy under another file name"
        )


def _shift_note(known: FileRecord, asked: bool) -> str | None:
    if asked and known.completed_at is not None and known.shift_seconds == 0:
        return "its times stay as they are, as at its first ingest; a copy under another name can be shifted"
    if not asked and known.shift_seconds:
        return f"its times are shifted by {known.shift_seconds} s, as at its first ingest"
    return None


def _shift_to(path: Path, file_format: FileFormat, now: datetime) -> int:
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
    size: int,
) -> _Tally:
    """Store the file's records and return their counts."""
    read = _Tally()
    with LineReader(path) as reader:
        for batch, damage in _batches(reader, file_format, known.shift_seconds, batches.size, read):
            read.accepted += write(file_format.topic, batch)
            read.lines += len(batch)
            if batches.progress is not None:
                batches.progress(Progress(read.lines, min(reader.bytes_read, size), size, "bytes"))
            if damage is not None:
                raise damage
    return read


def _batches(
    reader: LineReader, file_format: FileFormat, shift: int, batch_size: int, read: _Tally
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
