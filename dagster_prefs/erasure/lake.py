"""Erase one subject from the tables of events in the lake: current state, history, and files.

A typed event of the subject is deleted. A raw message loses its content and keeps its place, as in the engine, so that
an export does not take it for one that is missing. Valid messages are found by their key; a rejected one may name the
subject anywhere, and all of them are searched, in the partition that they have to themselves.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from dagster_prefs.erasure.events import Subject, names, spellings
from dagster_prefs.erasure.training import SubjectInTable
from dagster_prefs.events.schema_registry import unframed
from dagster_prefs.iceberg.catalog import translated
from dagster_prefs.iceberg.duck import sort_batches
from dagster_prefs.iceberg.event_export import (
    HOURS,
    HOURS_PER_COMMIT,
    files_by_hour,
    split_by_hour,
    token_prefix,
)
from dagster_prefs.iceberg.event_sink import day_of, replace_files
from dagster_prefs.iceberg.event_tables import (
    ARRIVED,
    DATA,
    DAY,
    OFFSET,
    PLACE,
    REJECTED,
    EventTable,
    emptied,
)
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE, ExportConflict
from dagster_prefs.iceberg.files import LiveFile, check_readable, live_files, parts_of, read_rows
from dagster_prefs.iceberg.publish import (
    ATTEMPTS,
    ROWS_PER_GROUP,
    DayChange,
    DayFiles,
    publish_changes,
    write_groups,
)
from dagster_prefs.iceberg.tables import ErasedSubject, arrow_schema, counted_sums


def is_there(catalog: Catalog, spec: EventTable, namespace: str) -> bool:
    """Return whether the table of events exists. Raises OfflineError."""
    with translated(f"the table {namespace}.{spec.name}"):
        return catalog.table_exists(spec.identifier(namespace))


class SubjectInEvents(SubjectInTable):
    """One subject's rows in one table of events.

    Rejected messages are searched that arrived until `arrived_until` (UTC). `by_sink` says that RisingWave's sink
    writes raw tables, whose files exist for minutes before it commits them.
    """

    def __init__(
        self,
        catalog: Catalog,
        spec: EventTable,
        subject: Subject,
        erased: ErasedSubject,
        *,
        arrived_until: datetime,
        namespace: str = DEFAULT_NAMESPACE,
        by_sink: bool = False,
    ) -> None:
        super().__init__(catalog, f"{namespace}.{spec.name}", erased, spec.topic.time or ARRIVED)
        self._spec = spec
        self._subject = subject
        self._arrived_until = arrived_until
        self._is_native = subject.is_key_of(spec.topic)
        self._by_sink = by_sink and spec.kind == "raw"

    def _rows_in(self, table: Table, file: DataFile) -> int:
        if self._holds_rejected(table, file):
            return self._rows_at(table, file.file_path)
        return super()._rows_in(table, file) if self._is_native else 0

    def _columns(self, names: set[str]) -> list[str]:
        if DAY not in names:
            return []
        return [name for name in (self._key, self._time, ARRIVED, REJECTED, DATA) if name in names]

    def _groups(self, parquet: pq.ParquetFile) -> list[int]:
        # The lowest and highest id of rejected messages say nothing of what they name.
        if REJECTED in parquet.schema_arrow.names:
            place = parquet.schema_arrow.get_field_index(REJECTED)
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            statistics = [group.column(place).statistics for group in groups]
            if any(one is None or not one.has_min_max or one.max for one in statistics):
                return list(range(parquet.num_row_groups))
        return super()._groups(parquet) if self._is_native else []

    def _mine(self, batch: pa.RecordBatch) -> pa.Array:
        mine = pa.array([False] * batch.num_rows)
        if self._is_native:
            ids, times = batch.column(self._key), batch.column(self._time)
            own = pc.fill_null(pc.equal(ids, pa.scalar(self._erased.value, ids.type)), False)
            covered = pc.fill_null(pc.less_equal(times, pa.scalar(self._erased.until, times.type)), True)
            if REJECTED in batch.schema.names:
                covered = pc.or_(covered, pc.and_(batch.column(REJECTED), self._arrived(batch)))
            mine = pc.and_(own, covered)
        return pc.or_(mine, self._named(batch)) if REJECTED in batch.schema.names else mine

    def _arrived(self, batch: pa.RecordBatch) -> pa.Array:
        times = batch.column(ARRIVED)
        return pc.less_equal(times, pa.scalar(self._arrived_until, times.type))

    def _named(self, batch: pa.RecordBatch) -> pa.Array:
        """Return a mask of the rejected messages that name the subject."""
        data = batch.column(DATA)
        hinted = pa.array([False] * batch.num_rows)
        for text in spellings(self._subject):
            hinted = pc.or_(hinted, pc.match_substring(data, text.encode()))
        wanted = pc.and_(pc.and_(batch.column(REJECTED), self._arrived(batch)), hinted)
        found = [False] * batch.num_rows
        for place in pc.indices_nonzero(wanted).to_pylist():
            text = unframed(data[place].as_py()).decode("utf-8", "replace")
            found[place] = names(self._subject, text, self._spec.topic)
        return pa.array(found, pa.bool_())

    def _current(self, table: Table) -> list[dict[str, Any]]:
        return [
            row
            for file in live_files(table)
            if self._rows_in(table, file.data)
            for row in self._read(table, file.path)
        ]

    def _erase_rows(self) -> tuple[tuple[date, ...], tuple[date, ...]]:
        days: set[date] = set()
        for _ in range(ATTEMPTS):
            table = self._table()
            found, others = split_by_hour(live_files(table))
            hours = {
                hour: files
                for hour, files in found.items()
                if any(self._rows_in(table, file.data) for file in files)
            }
            others = [file for file in others if self._rows_in(table, file.data)]
            if not hours and not others:
                return (), tuple(sorted(days))
            if others and self._spec.kind == "typed":
                # Nobody but this platform writes typed events.
                files_by_hour(table, others)
            if others and replace_files(table, [[file] for file in others], self._without, "erase"):
                days |= {day_of(table, file) for file in others}
            pending = list(hours)
            while pending:
                taken, pending = pending[:HOURS_PER_COMMIT], pending[HOURS_PER_COMMIT:]
                changes = [
                    DayChange(hour, self._rewrite(table, hour, hours[hour]), parts_of(hours[hour]))
                    for hour in taken
                ]
                done = publish_changes(table, HOURS, changes)
                for error in done.failed.values():
                    raise error
                days |= {hour.date() for hour in taken if hour in done.published}
        raise ExportConflict(
            f"{self.name} was replaced by others {ATTEMPTS} times while a subject was removed from it: "
            "find out which exports or maintenance run, and run it again"
        )

    def _rewrite(self, table: Table, hour: datetime, held: Sequence[LiveFile]) -> DayFiles:
        """Write the rows of an hour again, without the subject's or without their content."""
        check_readable(table, held)
        schema = arrow_schema(table)

        def remaining(rejected: bool | None = None) -> Iterator[pa.RecordBatch]:
            for file in held:
                for batch in read_rows(table, file, schema.names):
                    mine = self._mine(batch)
                    if self._spec.kind == "typed":
                        yield batch.filter(pc.invert(mine)).cast(schema)
                        continue
                    changed = emptied(batch, mine)
                    if rejected is not None:
                        changed = changed.filter(pc.equal(changed.column(REJECTED), rejected))
                    yield changed.cast(schema)

        rows, totals = counted_sums(remaining(), [OFFSET])
        written = DayFiles(
            # Not the engine's fingerprint: the next export compares the hour with the engine.
            token=token_prefix(hour, uuid.uuid4().hex[:16]),
            rows=rows,
            totals=totals,
            properties={"prefs.operation": "erase"},
        )
        for partition in self._partitions():
            batches = remaining(*partition)
            groups = sort_batches(batches, schema, (self._spec.key, *PLACE), ROWS_PER_GROUP)
            write_groups(table, (hour.date(), *partition), written, groups)
        return written

    def _partitions(self) -> list[tuple[bool, ...]]:
        return [(False,), (True,)] if self._spec.kind == "raw" else [()]

    def _without(self, file: LiveFile, batch: pa.RecordBatch, first: int) -> pa.RecordBatch:
        """Return messages of a sink's file, of which the subject's have no content and are rejected."""
        return emptied(batch, self._mine(batch))

    def _removable(self, path: str) -> bool:
        return not self._by_sink or self._was_named(path)

    def _holds_rejected(self, table: Table, file: DataFile) -> bool:
        places = [field.name for field in table.specs()[file.spec_id].fields]
        return REJECTED in places and bool(file.partition[places.index(REJECTED)])
