"""What an ingestion would reject, and why, without writing anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dagster_prefs.declarations.masking import masked_message
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.canaries import CanaryKey, stored_keys
from dagster_prefs.events.formats import LineReader, check_file, content_hash, detect, table_kind
from dagster_prefs.events.ingest import EXAMPLES, FileOptions, Tally, batches_of, shift_of
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.raw import Batches, Progress, ProgressCallback
from dagster_prefs.events.validity import rejection_reason

if TYPE_CHECKING:
    from dagster_prefs.events.columnar import Table

# The longest beginning of a message that is shown.
EXCERPT = 200
# Each size would be a reason of its own; `rejected_counts` counts them in the same way.
_SIZE = re.compile(" has [0-9]+ bytes, at most ")


@dataclass
class Reason:
    """The messages of one reason: how many, and (row or line, the reason as it stands, message) of the first.

    Personal values of the messages are masked.
    """

    count: int = 0
    examples: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass
class DryRun:
    """What a file's messages would become: `rejected` of the `messages`, by kind of reason.

    `rows` of the file were read; blank lines and rows that `--where` leaves out are no messages.
    """

    topic: str
    rows: int = 0
    messages: int = 0
    rejected: dict[str, Reason] = field(default_factory=dict)

    @property
    def rejections(self) -> int:
        """The number of messages that would be rejected."""
        return sum(reason.count for reason in self.rejected.values())


@dataclass
class _Judge:
    registry: Registry
    topic: Topic
    keys: Sequence[CanaryKey]
    now: datetime
    found: DryRun

    def __call__(self, row: int, message: bytes, arrived_at: datetime | None = None) -> None:
        self.found.messages += 1
        why = rejection_reason(message, self.topic, arrived_at or self.now, self.keys)
        if why is None:
            return
        reason = self.found.rejected.setdefault(_SIZE.sub(" has too many bytes, at most ", why), Reason())
        reason.count += 1
        if len(reason.examples) < EXAMPLES:
            shown = masked_message(
                self.registry, self.registry.topic(self.topic.name), message.decode("utf-8", "replace")
            )
            reason.examples.append((row, why, shown[:EXCERPT]))


def dry_run_file(
    connection: EngineConfiguration,
    registry: Registry,
    path: Path,
    options: FileOptions,
    progress: ProgressCallback | None = None,
) -> DryRun:
    """Judge every message of a file by the rules of the typed layer, as if it arrived now; writes nothing.

    Duplicates count as valid, because only the engine knows them. Raises EventFileError or RegistryError for
    the file, EngineUnavailable or RawStoreError for the engine, which is asked for the keys of canaries.
    """
    if (kind := table_kind(path)) is not None:
        from dagster_prefs.events.columnar import open_table

        return dry_run_table(
            connection,
            registry,
            open_table(path, kind, content_hash(path), options.constants),
            options,
            progress,
        )
    options.check_lines(path)
    file_format = detect(path, registry, options.topic, options.mapping)
    shift = shift_of(path, file_format, options.shift_to) if options.shift_to else 0
    judge = _judge(connection, registry, file_format.topic)
    read, size = Tally(), check_file(path).st_size
    with LineReader(path) as reader:
        for batch, damage in batches_of(reader, file_format, shift, Batches().size, read):
            for message in batch:
                judge(message.offset, message.data)
            read.lines += len(batch)
            if progress is not None:
                progress(Progress(read.lines, min(reader.bytes_read, size), size, "bytes"))
            if damage is not None:
                raise damage
    judge.found.rows = read.lines + read.blank
    return judge.found


def dry_run_table(
    connection: EngineConfiguration,
    registry: Registry,
    table: Table,
    options: FileOptions,
    progress: ProgressCallback | None = None,
) -> DryRun:
    """Judge every row of a table like `dry_run_file`; a row with a column of arrivals as if it arrived then."""
    from dagster_prefs.events.columnar import Converter
    from dagster_prefs.events.table_ingest import check_table_options, columns_of, table_topic

    topic = table_topic(table, registry, options)
    check_table_options(table, options)
    judge = _judge(connection, registry, topic)
    with Converter(table, topic, columns_of(options)) as converter:
        converter.check_arrivals(judge.now)
        for batch in converter.messages():
            for row, message, arrived_at in batch.triples():
                judge(row, message.encode(), arrived_at)
            judge.found.rows = batch.rows
            if progress is not None:
                progress(Progress(judge.found.messages, batch.rows, table.rows, "rows"))
    return judge.found


def _judge(connection: EngineConfiguration, registry: Registry, topic: Topic) -> _Judge:
    with connection.connect() as session:
        keys = stored_keys(session, connection)
    return _Judge(registry, topic, keys, datetime.now(UTC), DryRun(topic.name))
