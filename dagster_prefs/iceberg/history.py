"""The rows of any Iceberg table with their places, to be ingested as a history of events.

A row's place is its number in its data file, which no later deletion changes: other rows of the file keep
theirs. Data files never change, so their location is their identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan, _read_deletes, schema_to_pyarrow
from pyiceberg.table import FileScanTask, Table
from pyiceberg.types import DateType, PrimitiveType, TimestampType, TimestamptzType

from dagster_prefs.iceberg.catalog import OfflineError, TableMissing, translated
from dagster_prefs.iceberg.files import LiveFile, RowsUnreadable, check_readable, live_files


@dataclass(frozen=True)
class HistoryFile:
    """One data file of a table's snapshot, with the columns that the table has now.

    `name` is used in messages; `file_name` and `identity` (hex) distinguish it from every other file.
    """

    name: str
    file_name: str
    identity: str
    rows: int
    schema: pa.Schema
    table: Table
    file: LiveFile

    def batches(
        self, first: int, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, pa.RecordBatch, pa.BooleanArray | None]]:
        """Yield batches from row `first` (0-based) on: the first row's number, the rows, and which are not deleted.

        Raises OfflineError if the file cannot be read.
        """
        # The table's columns by their ids: a column may have had another name when the file was written.
        fields = self.table.schema()
        scan = ArrowScan(
            self.table.metadata,
            self.table.io,
            fields if columns is None else fields.select(*columns),
            AlwaysTrue(),
        )
        start = 0
        with translated(self.name):
            gone = self._deleted()
            # The public method reads all rows of a file into memory and applies the deletes, which loses the
            # rows' numbers.
            task = FileScanTask(self.file.data, set())
            for batch in scan._record_batches_from_scan_tasks_and_deletes([task], {}):
                skipped = min(batch.num_rows, max(0, first - start))
                if skipped < batch.num_rows:
                    rows = batch.slice(skipped)
                    yield start + skipped, rows, _kept(start + skipped, rows.num_rows, gone)
                start += batch.num_rows

    def _deleted(self) -> pa.Array | None:
        """Return the numbers of the deleted rows, from 0; None if no row was deleted."""
        found: list[pa.Array] = []
        for deletes in self.file.deletes:
            try:
                positions = _read_deletes(self.table.io, deletes).get(self.file.path)
            except (ValueError, LookupError, NotImplementedError) as error:
                if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError):
                    raise
                raise RowsUnreadable(
                    f"{self.name}: the deletes {deletes.file_path} cannot be read ({error})"
                ) from error
            if positions is not None:
                found += positions.chunks
        return pa.concat_arrays(found) if found else None


def _kept(start: int, rows: int, gone: pa.Array | None) -> pa.BooleanArray | None:
    if gone is None:
        return None
    numbers = pa.array(range(start, start + rows), pa.int64())
    return pc.invert(pc.is_in(numbers, value_set=gone.cast(pa.int64())))


def history_files(catalog: Catalog, name: str) -> list[HistoryFile]:
    """Return the data files of the current snapshot of the table `namespace.table`, ordered by their locations.

    Raises OfflineError: the table does not exist or has no rows, or an engine deleted rows in a way that cannot be
    read.
    """
    with _named(name):
        table = catalog.load_table(name)
        files = sorted(live_files(table), key=lambda file: file.path)
        check_readable(table, files)
        schema = schema_to_pyarrow(table.schema(), include_field_ids=False)
    if not files:
        raise OfflineError(f"the Iceberg table {name} is empty: it has no data files")
    return [
        HistoryFile(
            f"iceberg:{name} {PurePosixPath(file.path).name}",
            PurePosixPath(file.path).name,
            hashlib.sha256(file.path.encode()).hexdigest(),
            file.data.record_count,
            schema,
            table,
            file,
        )
        for file in files
    ]


@dataclass(frozen=True)
class HistorySnapshot:
    """A snapshot of a table that an engine reads itself: its columns, and the number of its rows before deletes."""

    name: str
    snapshot_id: int
    schema: pa.Schema
    rows: int
    table: Table
    files: tuple[LiveFile, ...]

    def span(self, column: str) -> tuple[datetime, datetime] | None:
        """Return the first and the last moment (UTC) in a column of times or dates, by the files' statistics.

        None where a file that has values has no statistics of them, or the column has another type.
        """
        field = self.table.schema().find_field(column)
        kind = field.field_type
        if not isinstance(kind, DateType | TimestampType | TimestamptzType):
            return None
        found: list[datetime] = []
        for file in self.files:
            data = file.data
            if (data.null_value_counts or {}).get(field.field_id) == data.record_count:
                continue
            for bounds in (data.lower_bounds, data.upper_bounds):
                if field.field_id not in (bounds or {}):
                    return None
                found.append(_moment(kind, bounds[field.field_id]))
        return (min(found), max(found)) if found else None


def _moment(kind: PrimitiveType, bound: bytes) -> datetime:
    value = from_bytes(kind, bound)
    if isinstance(kind, DateType):
        day = date(1970, 1, 1) + timedelta(days=int(value))
        return datetime(day.year, day.month, day.day, tzinfo=UTC)
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(value))


def history_snapshot(catalog: Catalog, name: str, snapshot_id: int | None = None) -> HistorySnapshot:
    """Return a snapshot of the table `namespace.table`: this one if the table still has it, else the current one.

    Raises OfflineError: the table does not exist or has no rows.
    """
    with _named(name):
        table = catalog.load_table(name)
        kept = None if snapshot_id is None else table.snapshot_by_id(snapshot_id)
        snapshot = kept or table.current_snapshot()
        files = tuple(live_files(table, snapshot_id=snapshot.snapshot_id)) if snapshot else ()
        schema = schema_to_pyarrow(table.schema(), include_field_ids=False)
    if snapshot is None or not files:
        raise OfflineError(f"the Iceberg table {name} is empty: it has no data files")
    rows = sum(file.data.record_count for file in files)
    return HistorySnapshot(f"iceberg:{name}", snapshot.snapshot_id, schema, rows, table, files)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Check the name of a table, and translate errors about it."""
    if "." not in name:
        raise TableMissing(f"iceberg:{name} is no Iceberg table: write iceberg:NAMESPACE.TABLE")
    with translated(f"the Iceberg table {name}"):
        yield
