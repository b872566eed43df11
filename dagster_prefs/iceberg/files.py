"""The data files of a snapshot: which rows other engines deleted, and which files this platform wrote.

Engines such as Spark, Trino and Flink delete rows without rewriting a data file: they add a delete file for
it. All readers of Iceberg tables plan and read through this module, so that none of them returns a deleted
row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.expressions import AlwaysTrue, BooleanExpression
from pyiceberg.expressions.parser import parse
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat, ManifestEntry
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.table import FileScanTask, ManifestGroupPlanner, Table
from pyiceberg.table.snapshots import ancestors_of
from pyiceberg.transforms import IdentityTransform

from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.tables import TileTable, arrow_schema

# <fingerprint of the day>-<id of the write>[-<rows of the write>]-<number of the file>.parquet; earlier
# versions of this platform wrote names without the rows.
_FILE_NAME = re.compile(
    r"/(?P<write>(?P<token>[0-9a-f]{16})-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-(?P<rows>\d+))?-\d{5,}\.parquet$"
)


class RowsUnreadable(OfflineError):
    """Another engine wrote or deleted rows of a table in a way that this platform cannot read."""


class LayoutForeign(OfflineError):
    """Another engine changed a training table's layout: it can no longer be read or written by day."""


@dataclass(frozen=True)
class LiveFile:
    """A data file of a snapshot with the delete files that apply to it.

    `deletes` are position deletes and deletion vectors, which `read_rows` applies. `equality_deletes` are not
    supported by pyiceberg: reading the file raises RowsUnreadable. `sequence` is the sequence number of the commit
    that added the file, 0 if it is not known.
    """

    data: DataFile
    snapshot_id: int
    deletes: tuple[DataFile, ...] = ()
    equality_deletes: tuple[DataFile, ...] = ()
    sequence: int = 0

    @property
    def path(self) -> str:
        """Location of the data file."""
        return self.data.file_path

    @cached_property
    def parts(self) -> frozenset[str]:
        """Locations of the data file and of every delete file, which together determine its rows."""
        return frozenset(file.file_path for file in (self.data, *self.deletes, *self.equality_deletes))


def parts_of(files: Iterable[LiveFile]) -> set[str]:
    """Return the locations of all data and delete files: equal if and only if the rows are equal."""
    return {path for file in files for path in file.parts}


def live_files(
    table: Table, row_filter: str | BooleanExpression = "", snapshot_id: int | None = None
) -> list[LiveFile]:
    """Plan the files of a snapshot, the current one by default, that may hold rows of `row_filter`.

    Only delete files that apply count: an equality delete does not affect data written after it. Raises
    OfflineError if the snapshot no longer exists.
    """
    snapshot = table.current_snapshot() if snapshot_id is None else table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        if snapshot_id is None:
            return []
        raise OfflineError(
            f"snapshot {snapshot_id} of {'.'.join(table.name())} expired while it was read: run it again"
        )
    sequence: dict[str, int] = {}
    equality: list[ManifestEntry] = []

    def planned(entry: ManifestEntry) -> bool:
        if entry.data_file.content == DataFileContent.EQUALITY_DELETES:
            # pyiceberg refuses to plan with equality deletes, whether they apply to a file or not.
            equality.append(entry)
            return False
        if entry.data_file.content == DataFileContent.DATA:
            sequence[entry.data_file.file_path] = entry.sequence_number or 0
        return True

    planner = ManifestGroupPlanner(table.metadata, table.io, _expression(row_filter))
    tasks = list(planner.plan_files(snapshot.manifests(table.io), planned))
    return [
        LiveFile(
            task.file,
            snapshot.snapshot_id,
            tuple(sorted(task.delete_files, key=lambda file: file.file_path)),
            tuple(
                entry.data_file
                for entry in equality
                if sequence[task.file.file_path] < (entry.sequence_number or 0)
                and _covers(table, entry.data_file, task.file)
            ),
            sequence[task.file.file_path],
        )
        for task in tasks
    ]


def _covers(table: Table, delete: DataFile, data: DataFile) -> bool:
    """Return whether an equality delete belongs to the data file's partition, or to none and so to all."""
    everywhere = not table.specs()[delete.spec_id].fields
    return everywhere or (delete.spec_id == data.spec_id and delete.partition == data.partition)


def _expression(row_filter: str | BooleanExpression) -> BooleanExpression:
    if isinstance(row_filter, BooleanExpression):
        return row_filter
    return parse(row_filter) if row_filter else AlwaysTrue()


def tile_files(
    table: Table,
    spec: TileTable,
    *,
    first: date | None = None,
    last: date | None = None,
    snapshot_id: int | None = None,
) -> dict[date, list[LiveFile]]:
    """Return the files of each day from `first` to `last`, ordered by day.

    Raises LayoutForeign for files that are not partitioned by day, and what `live_files` raises.
    """
    conditions = [f"{spec.day} >= '{first.isoformat()}'"] if first else []
    conditions += [f"{spec.day} <= '{last.isoformat()}'"] if last else []
    days: dict[date, list[LiveFile]] = {}
    for file in live_files(table, " and ".join(conditions), snapshot_id):
        days.setdefault(day_of(table, spec, file.data), []).append(file)
    return {day: days[day] for day in sorted(days)}


def day_files(table: Table, spec: TileTable, day: date, snapshot_id: int | None = None) -> list[LiveFile]:
    """Return the files of one day, by default of the current snapshot."""
    return tile_files(table, spec, first=day, last=day, snapshot_id=snapshot_id).get(day, [])


def day_of(table: Table, spec: TileTable, file: DataFile) -> date:
    """Return the day (UTC) of a data file's partition. Raises LayoutForeign if the partition is not a day."""
    place = _day_place(table, spec, table.specs()[file.spec_id])
    if place is None:
        raise LayoutForeign(
            f"{'.'.join(table.name())}: {file.file_path} is not partitioned by {spec.day} (partition spec "
            f"{file.spec_id}): another engine changed the partitioning of the table; rewrite its data files with that "
            f"engine, partitioned by {spec.day} alone"
        )
    # A date partition is stored as days since 1970.
    return date(1970, 1, 1) + timedelta(days=int(file.partition[place]))


def check_writable(table: Table, spec: TileTable) -> None:
    """Raise LayoutForeign unless the table still has the layout that this platform writes."""
    name = ".".join(table.name())
    if table.metadata.format_version > 2:
        raise LayoutForeign(
            f"{name} has Iceberg format version {table.metadata.format_version}, which another engine set and this "
            "version of the platform cannot write (at most 2): copy its rows into a new table of version 2, in another "
            "PREFS_ICEBERG_NAMESPACE, and export to that"
        )
    if len(table.spec().fields) != 1 or _day_place(table, spec, table.spec()) != 0:
        layout = ", ".join(field.name for field in table.spec().fields)
        raise LayoutForeign(
            f"{name} is partitioned by ({layout}), as another engine set it: set its partitioning back to {spec.day} "
            "alone with that engine"
        )


def _day_place(table: Table, spec: TileTable, layout: PartitionSpec) -> int | None:
    day = table.schema().find_field(spec.day).field_id
    for place, field in enumerate(layout.fields):
        if field.source_id == day and isinstance(field.transform, IdentityTransform):
            return place
    return None


def read_rows(table: Table, file: LiveFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a training table's file that no engine deleted, in the order of `columns`.

    A column that was added to the table later is NULL. Raises RowsUnreadable naming table, snapshot and
    delete file if the deletes cannot be applied.
    """
    check_readable(table, [file])
    if file.deletes or file.data.file_format != FileFormat.PARQUET:
        yield from _scanned(table, file, columns, AlwaysTrue())
    else:
        yield from read_file(table, file.data, columns)


def _scanned(
    table: Table, file: LiveFile, columns: Sequence[str], row_filter: BooleanExpression
) -> Iterator[pa.RecordBatch]:
    schema = arrow_schema(table)
    # One file at a time, because pyiceberg holds all rows of a file that it reads in memory.
    scan = ArrowScan(table.metadata, table.io, table.schema().select(*columns), row_filter)
    try:
        for batch in scan.to_record_batches([FileScanTask(file.data, set(file.deletes))]):
            arrays = [batch.column(name).cast(schema.field(name).type) for name in columns]
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise
    except (ValueError, LookupError, NotImplementedError) as error:
        # A Puffin file of another codec, an empty delete file, Avro: pyiceberg has no common exception for
        # them.
        raise RowsUnreadable(
            f"{'.'.join(table.name())}: {' with '.join(sorted(file.parts))} of snapshot {file.snapshot_id} cannot be "
            f"read ({error}): {_REWRITE}"
        ) from error


_REWRITE = (
    "have the engine that wrote it rewrite the table's data files (Spark: call system.rewrite_data_files with the "
    "option delete-file-threshold 1), or, for a day of a training table, run `prefs export --replace-foreign`"
)


def check_readable(table: Table, files: Iterable[LiveFile]) -> None:
    """Raise RowsUnreadable, naming table, snapshot and delete file, where a file has equality deletes."""
    for file in files:
        if file.equality_deletes:
            raise RowsUnreadable(
                f"{'.'.join(table.name())} has rows that another engine deleted by equality: "
                f"{file.equality_deletes[0].file_path} of snapshot {file.snapshot_id} applies to {file.path}, and such "
                f"deletes cannot be read here: {_REWRITE}"
            )


def scan_rows(
    table: Table,
    columns: Sequence[str] | None = None,
    row_filter: str | BooleanExpression = "",
    snapshot_id: int | None = None,
) -> pa.RecordBatchReader:
    """Read the rows of a whole snapshot for which `row_filter` holds, without deleted ones.

    Raises what `read_rows` raises, before the first row if the deletes cannot be read at all.
    """
    names = list(columns or [field.name for field in table.schema().fields])
    files = live_files(table, row_filter, snapshot_id)
    check_readable(table, files)
    schema = pa.schema([arrow_schema(table).field(name) for name in names])
    # By field id, as Iceberg defines columns: another writer's table may have renamed a column.
    batches = (
        batch.cast(schema)
        for file in files
        for batch in _scanned(table, file, names, _expression(row_filter))
    )
    return pa.RecordBatchReader.from_batches(schema, batches)


def count_rows(table: Table, files: Iterable[LiveFile]) -> int:
    """Count the rows of the files that no engine deleted. Raises RowsUnreadable if that is not possible."""
    total = 0
    for file in files:
        if not file.deletes and not file.equality_deletes:
            total += file.data.record_count
        else:
            total += sum(b.num_rows for b in read_rows(table, file, [table.schema().fields[0].name]))
    return total


def read_file(table: Table, file: DataFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield every row written to one file, deleted or not. Columns added to the table later are NULL."""
    schema = arrow_schema(table)
    with table.io.new_input(file.file_path).open() as source, pq.ParquetFile(source) as parquet:
        held = set(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(columns=[name for name in columns if name in held]):
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column(name) if name in held else pa.nulls(batch.num_rows, schema.field(name).type)
                    for name in columns
                ],
                names=list(columns),
            )


def file_name(token: str, write: str, rows: int, number: int) -> str:
    """Return the name of a data file: its day's fingerprint, id and rows of its write, and its number in it.

    Snapshot properties disappear when their snapshot expires; names stay and identify the platform's own
    files.
    """
    return f"{token}-{write}-{rows}-{number:05}.parquet"


def token_of(file: DataFile) -> str | None:
    """Return the fingerprint in the name of an own file, None for another writer's file."""
    found = _FILE_NAME.search(file.file_path)
    return found["token"] if found else None


def only_token(files: Iterable[LiveFile]) -> str | None:
    """Return the fingerprint that all files share, None if they differ."""
    tokens = {token_of(file.data) for file in files}
    return next(iter(tokens)) if len(tokens) == 1 else None


@dataclass(frozen=True)
class Foreign:
    """Another writer's changes to a day; empty if the day is as one own write left it.

    `files` are data files that this platform did not commit, `deletes` delete files that apply to its own,
    `missing_rows` the number of own rows whose files are gone.
    """

    files: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    missing_rows: int = 0

    def __bool__(self) -> bool:
        return bool(self.files or self.deletes or self.missing_rows)

    def __str__(self) -> str:
        parts = []
        if self.files:
            parts.append(f"data files that this platform did not add: {_some(self.files)}")
        if self.deletes:
            parts.append(f"delete files of another engine: {_some(self.deletes)}")
        if self.missing_rows:
            parts.append(f"{self.missing_rows} rows of its export were deleted with their files")
        return "; ".join(parts)


UNTOUCHED = Foreign()


def _some(paths: Sequence[str]) -> str:
    # A day that another engine rewrote may have hundreds of files.
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def foreign_in(files: Sequence[LiveFile]) -> Foreign:
    """Find what other writers did to a day, from the files' names alone.

    An unchanged day consists of all files of exactly one own write, without deletes: every export, compaction
    and erasure replaces the whole day.
    """
    writes = Counter(write for write, _ in map(_write_of, files) if write is not None)
    # Files of an earlier export that were added again have own names too; which write is valid is then
    # unknown.
    mixed = len(writes) > 1
    strange = tuple(sorted(file.path for file in files if mixed or _write_of(file)[0] is None))
    deletes = sorted({found.file_path for file in files for found in (*file.deletes, *file.equality_deletes)})
    missing = 0
    if len(writes) == 1:
        ours = [file for file in files if _write_of(file)[0] is not None]
        due = _write_of(ours[0])[1]
        missing = max(0, due - sum(file.data.record_count for file in ours)) if due is not None else 0
    return Foreign(strange, tuple(deletes), missing)


def _write_of(file: LiveFile) -> tuple[str | None, int | None]:
    """Return the id and row count of the own write that made a file; None where the name has none."""
    found = _FILE_NAME.search(file.path)
    if found is None:
        return None, None
    return found["write"], int(found["rows"]) if found["rows"] else None


def own_files(table: Table, spec: TileTable, day: date) -> list[DataFile]:
    """Return the data files of the last complete own write of a day.

    From the current snapshot, or else its newest ancestor; empty if neither holds it any more. Ignores what
    other engines deleted from these files.
    """
    for snapshot in ancestors_of(table.current_snapshot(), table.metadata):
        ours = [
            LiveFile(file.data, file.snapshot_id)
            for file in day_files(table, spec, day, snapshot.snapshot_id)
            if _write_of(file)[0] is not None
        ]
        if ours and not foreign_in(ours):
            return [file.data for file in ours]
    return []


@dataclass(frozen=True)
class RemovedDay:
    """A day that another writer's commit (`snapshot_id`, its `operation`) removed, with the rows it had."""

    snapshot_id: int
    operation: str
    rows: int

    def __str__(self) -> str:
        return (
            f"snapshot {self.snapshot_id} of another writer ({self.operation}) removed its {self.rows} rows"
        )


def removed_days(table: Table, spec: TileTable, held: Iterable[date]) -> dict[date, RemovedDay]:
    """Find own days that another writer removed entirely, as far back as the removing snapshots are kept.

    `held` are the days that the table holds. Days that were rolled back are not included.
    """
    there = set(held)
    found: dict[date, RemovedDay] = {}
    for snapshot in ancestors_of(table.current_snapshot(), table.metadata):
        summary = snapshot.summary
        if summary is None or summary["prefs.operation"] or not int(summary["deleted-data-files"] or 0):
            continue
        days: dict[date, int] = {}
        for manifest in snapshot.manifests(table.io):
            if manifest.added_snapshot_id != snapshot.snapshot_id or not manifest.deleted_files_count:
                continue
            for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=False):
                removed = entry.status == 2 and entry.data_file.content == DataFileContent.DATA
                if removed and token_of(entry.data_file) is not None:
                    day = day_of(table, spec, entry.data_file)
                    days[day] = days.get(day, 0) + entry.data_file.record_count
        for day, rows in days.items():
            if day not in there and day not in found:
                found[day] = RemovedDay(snapshot.snapshot_id, summary.operation.value, rows)
    return found
