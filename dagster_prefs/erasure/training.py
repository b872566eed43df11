"""Erase one subject from the training tables and sets: current state, history, and files.

Every day that holds the subject is replaced by the write, audit and publish of an export, and a training
set by its other rows; then the branches and snapshots that still hold the rows are removed, then
unreferenced files. A tag is a deliberate decision to keep a snapshot: it stays and is reported, unless
`drop_tags` is set.
"""

from __future__ import annotations

import csv
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.conversions import from_bytes
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.expressions import EqualTo
from pyiceberg.manifest import DataFile, ManifestContent
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import LongType, StringType

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.export import (
    DEFAULT_NAMESPACE,
    SINK_BRANCH,
    VERIFIED_PREFIX,
    ExportConflict,
    ExportOptions,
    export_days,
    foreign_of,
)
from dagster_prefs.iceberg.files import (
    check_readable,
    day_files,
    live_files,
    parts_of,
    read_rows,
    scan_rows,
    tile_files,
)
from dagster_prefs.iceberg.maintenance import expire, unreferenced_files
from dagster_prefs.iceberg.publish import (
    ATTEMPTS,
    BRANCH_PREFIX,
    DayChange,
    DayFiles,
    publish_day,
    write_day,
)
from dagster_prefs.iceberg.tables import (
    ErasedSubject,
    TileTable,
    arrow_schema,
    counted_sums,
    is_training_set,
)
from dagster_prefs.iceberg.tiles import TilesUnreadable
from dagster_prefs.ids import BLANKS
from dagster_prefs.training.labels import TIME, LabelsRefused, key_values
from dagster_prefs.training.outputs import replace_rows


@dataclass(frozen=True)
class TableHolding:
    """A subject's data in one table.

    Rows of the current state, snapshots that hold a row, the names of tags (and of branches that are not an
    export's) that keep one, and Parquet files with a row, whether a snapshot references them or not.
    """

    table: str
    rows: int
    snapshots: int
    kept_by: tuple[str, ...]
    files: int


@dataclass(frozen=True)
class ErasedTable:
    """The outcome for one table.

    `days_from_engine` were exported again; `days_rewritten` are the table's own rows without the subject's, because the
    engine no longer holds the whole day. A training set has no days.
    """

    table: str
    days_from_engine: tuple[date, ...] = ()
    days_rewritten: tuple[date, ...] = ()
    refs_removed: tuple[str, ...] = ()
    snapshots_expired: int = 0
    files_removed: int = 0


@dataclass(frozen=True)
class CatalogSearch:
    """The tables of a catalog other than the training tables.

    `training_sets` are tables of this platform; `holding` are other tables of labels whose current state holds the
    subject; `unread` gives the reason why a namespace or table was not searched.
    """

    training_sets: tuple[str, ...]
    holding: tuple[str, ...]
    unread: Mapping[str, str]


class SubjectInTable(ABC):
    """One subject's rows in one table. Reads each file once, however many snapshots reference it.

    `time` is the column that decides up to when rows belong to the erased subject. Every method raises
    OfflineError, and does nothing if the table does not exist.
    """

    def __init__(self, catalog: Catalog, name: str, erased: ErasedSubject, time: str) -> None:
        self.name = name
        self._catalog = catalog
        self._erased = erased
        self._key = erased.key.name
        self._time = time
        self._rows: dict[str, int] = {}
        self._manifests: dict[str, list[DataFile]] = {}

    def holding(self) -> TableHolding:
        """Search the table's current state, its history and its folder."""
        with translated(f"the table {self.name}"):
            table = self._load()
            if table is None:
                return TableHolding(self.name, 0, 0, (), 0)
            snapshots = self._snapshots(table)
            refs = table.refs()
            kept = [name for name in self._optional_refs(table) if refs[name].snapshot_id in snapshots]
            files = {path for path, rows in self._rows.items() if rows} | set(self._unreferenced(table))
            return TableHolding(
                self.name,
                sum(self._rows_in(table, file.data) for file in live_files(table)),
                len(snapshots),
                tuple(sorted(name for name in kept if not self._expendable(table, name))),
                sum(table.io.new_input(path).exists() for path in files),
            )

    def erase(self, *, drop_tags: bool = False) -> ErasedTable:
        """Remove the subject; safe to repeat after a crash anywhere, and while exports run.

        `drop_tags` also removes the tags and branches that keep a snapshot with the subject.
        """
        with translated(f"the table {self.name}"):
            if self._load() is None:
                return ErasedTable(self.name)
            exported, rewritten = self._erase_rows()
            removed = self._remove_refs(drop_tags)
            expired = self._expire()
            files = self._remove_files()
        return ErasedTable(self.name, exported, rewritten, removed, expired, files)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the subject's rows of the current state, and those that only the history and the folder hold.

        A file is read once, however many snapshots reference it; the current files hold no earlier rows.
        """
        with translated(f"the table {self.name}"):
            table = self._load()
            if table is None:
                return [], []
            current = self._current(table)
            live = {file.data.file_path for file in live_files(table)}
            earlier = {
                file.file_path
                for snapshot in table.snapshots()
                for file in self._files(table, snapshot)
                if self._rows_in(table, file)
            } | set(self._unreferenced(table))
            return current, [row for path in sorted(earlier - live) for row in self._read(table, path)]

    def _current(self, table: Table) -> list[dict[str, Any]]:
        """Return the subject's rows of the current state."""
        mine = EqualTo(term=self._key, value=self._erased.value)
        rows: list[dict[str, Any]] = scan_rows(table, row_filter=mine).read_all().to_pylist()
        return rows

    def _read(self, table: Table, path: str) -> Iterator[dict[str, Any]]:
        with (
            suppress(FileNotFoundError),
            table.io.new_input(path).open() as source,
            pq.ParquetFile(source) as parquet,
        ):
            for batch in parquet.iter_batches(row_groups=self._groups(parquet)):
                yield from batch.filter(self._mine(batch)).to_pylist()

    def _mine(self, batch: pa.RecordBatch) -> pa.Array:
        """Return a mask of the subject's rows."""
        return self._erased.rows_of(batch, self._time)

    @abstractmethod
    def _erase_rows(self) -> tuple[tuple[date, ...], tuple[date, ...]]:
        """Remove the subject of the current state; returns the days that were exported again and rewritten."""

    def _load(self) -> Table | None:
        try:
            return self._catalog.load_table(self.name)
        except NoSuchTableError:
            return None

    def _table(self) -> Table:
        return self._catalog.load_table(self.name)

    def _snapshots(self, table: Table) -> set[int]:
        """Return the snapshots of the whole history that hold a row of the subject."""
        return {
            snapshot.snapshot_id
            for snapshot in table.snapshots()
            # Reads every file, because the report counts files.
            if sum(self._rows_in(table, file) for file in self._files(table, snapshot))
        }

    def _files(self, table: Table, snapshot: Snapshot) -> Iterator[DataFile]:
        for manifest in snapshot.manifests(table.io):
            if manifest.content != ManifestContent.DATA:
                continue
            path = manifest.manifest_path
            if path not in self._manifests:
                entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                self._manifests[path] = [entry.data_file for entry in entries]
            yield from self._manifests[path]

    def _optional_refs(self, table: Table) -> list[str]:
        """Return the tags and branches that someone created on purpose and may drop."""
        return [name for name in table.refs() if name != MAIN_BRANCH]

    def _expendable(self, table: Table, name: str) -> bool:
        """Return whether a ref can be removed unasked: an export's branch, or the tag of a verified day."""
        is_tag = table.refs()[name].snapshot_ref_type == SnapshotRefType.TAG
        return name.startswith(VERIFIED_PREFIX if is_tag else BRANCH_PREFIX)

    def _remove_refs(self, drop_tags: bool) -> tuple[str, ...]:
        removed: list[str] = []
        for _ in range(ATTEMPTS):
            table = self._table()
            holding = self._snapshots(table)
            going = [
                (name, table.refs()[name])
                for name in self._optional_refs(table)
                if table.refs()[name].snapshot_id in holding and (drop_tags or self._expendable(table, name))
            ]
            if not going:
                break
            change = table.manage_snapshots()
            for name, ref in going:
                if ref.snapshot_ref_type == SnapshotRefType.TAG:
                    change = change.remove_tag(name)
                else:
                    change = change.remove_branch(name)
            try:
                change.commit()
                removed += [name for name, _ in going]
            except CommitFailedException:
                # Another process changed the table; read it again.
                continue
        return tuple(removed)

    def _expire(self) -> int:
        return expire(self._table(), self._snapshots)

    def _remove_files(self) -> int:
        # Of any age: a running export that wrote the branch read the engine before the erasure and cannot
        # publish any more.
        table = self._table()
        going = [path for path in self._unreferenced(table) if self._removable(path)]
        for path in going:
            table.io.delete(path)
        return len(going)

    def _removable(self, path: str) -> bool:
        """Return whether an unreferenced file may be removed."""
        return True

    def _was_named(self, path: str) -> bool:
        """Return whether a snapshot that was read, possibly expired by now, referenced the file."""
        return path in {file.file_path for files in self._manifests.values() for file in files}

    def _unreferenced(self, table: Table) -> list[str]:
        """Return the unreferenced Parquet files in the table's folder that hold the subject."""
        return [
            file.location
            for file in unreferenced_files(table)
            if file.location.endswith(".parquet") and self._rows_at(table, file.location)
        ]

    def _rows_in(self, table: Table, file: DataFile) -> int:
        """Count the subject's rows in a data file; the file's bounds may make reading it unnecessary."""
        field = table.schema().find_field(self._key).field_id
        low, high = file.lower_bounds.get(field), file.upper_bounds.get(field)
        if low is not None and high is not None:
            kind = LongType() if isinstance(self._erased.value, int) else StringType()
            # Bounds of texts may be truncated, and then lie below the lowest and above the highest value.
            first: Any = from_bytes(kind, low)
            last: Any = from_bytes(kind, high)
            if not first <= self._erased.value <= last:
                return 0
        return self._rows_at(table, file.file_path)

    def _rows_at(self, table: Table, path: str) -> int:
        if path not in self._rows:
            try:
                with table.io.new_input(path).open() as source, pq.ParquetFile(source) as parquet:
                    self._rows[path] = self._count(parquet)
            except FileNotFoundError:
                # The files that an outdated export had staged are deleted, but a snapshot may still reference
                # them.
                return 0
            except pa.ArrowInvalid:
                if self._was_named(path):
                    raise
                # An incomplete file is unreferenced, and maintenance removes it.
                return 0
        return self._rows[path]

    def _count(self, parquet: pq.ParquetFile) -> int:
        """Count the subject's rows in an open file."""
        columns = self._columns(set(parquet.schema_arrow.names))
        if not columns:
            # A delete file of another engine contains positions or keys, but no rows.
            return 0
        batches = parquet.iter_batches(row_groups=self._groups(parquet), columns=columns)
        return sum(int(pc.sum(self._mine(batch)).as_py() or 0) for batch in batches)

    def _columns(self, names: set[str]) -> list[str]:
        """Return those of a file's columns that tell whose a row is; empty for a file without rows."""
        return [self._key, self._time] if {self._key, self._time} <= names else []

    def _groups(self, parquet: pq.ParquetFile) -> list[int]:
        """Return the row groups of a file that may hold the subject."""
        place = parquet.schema_arrow.get_field_index(self._key)
        found = []
        for group in range(parquet.num_row_groups):
            bounds = parquet.metadata.row_group(group).column(place).statistics
            if bounds is not None and bounds.has_min_max:
                low: Any = bounds.min
                high: Any = bounds.max
                if not low <= self._erased.value <= high:
                    continue
            found.append(group)
        return found


class SubjectInTiles(SubjectInTable):
    """One subject's rows in one training table.

    If RisingWave's sinks write the table (`by_sink`), only they change the current state and their branch;
    this class only erases the history.
    """

    def __init__(
        self,
        catalog: Catalog,
        spec: TileTable,
        erased: ErasedSubject,
        engine: EngineConfiguration,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        by_sink: bool = False,
    ) -> None:
        super().__init__(catalog, f"{namespace}.{spec.name}", erased, LAST_EVENT_AT)
        self._spec = spec
        self._engine = engine
        self._namespace = namespace
        self._by_sink = by_sink

    def _optional_refs(self, table: Table) -> list[str]:
        # A sink whose branch is missing starts an empty one, which the next compaction makes the whole table.
        return [name for name in super()._optional_refs(table) if not (self._by_sink and name == SINK_BRANCH)]

    def _removable(self, path: str) -> bool:
        # A sink's files, with rows of all subjects, exist for minutes before it commits them.
        return not self._by_sink or self._was_named(path)

    def _days(self, table: Table) -> dict[date, int]:
        days: dict[date, int] = {}
        for day, files in tile_files(table, self._spec).items():
            if rows := sum(self._rows_in(table, file.data) for file in files):
                days[day] = rows
        return days

    def _erase_rows(self) -> tuple[tuple[date, ...], tuple[date, ...]]:
        if self._by_sink:
            return (), ()
        exported: list[date] = []
        rewritten: list[date] = []
        for _ in range(ATTEMPTS):
            days = sorted(self._days(self._table()))
            if not days:
                return tuple(exported), tuple(rewritten)
            done = self._export(days)
            exported += done
            rewritten += [day for day in days if day not in done and self._rewrite(day)]
        raise ExportConflict(
            f"{self.name} was replaced by others {ATTEMPTS} times while a subject was removed from it: "
            "find out which exports or maintenance run, and run it again"
        )

    def _export(self, days: list[date]) -> list[date]:
        """Replace the days that the engine still holds in full by its rows; returns those days."""
        options = ExportOptions(erasing=self._erased)
        written: list[date] = []
        # A problem with other subjects' tiles must not block this erasure; the next export reports it.
        with suppress(TilesUnreadable):
            for report in export_days(
                self._engine, self._catalog, self._spec, days, namespace=self._namespace, options=options
            ):
                if isinstance(report.error, ExportConflict):
                    raise report.error
                if report.status == "written":
                    written.append(report.day)
        return written

    def _rewrite(self, day: date) -> bool:
        """Replace a day by its own rows without the subject's. Returns False if another writer was faster."""
        table = self._table()
        head = table.current_snapshot()
        if head is None:
            return False
        held = day_files(table, self._spec, day, head.snapshot_id)
        check_readable(table, held)
        schema = arrow_schema(table)

        def remaining() -> Iterator[pa.RecordBatch]:
            for file in held:
                for batch in read_rows(table, file, schema.names):
                    yield batch.filter(pc.invert(self._erased.rows_of(batch))).cast(schema)

        rows, totals = counted_sums(remaining(), self._spec.totals)
        written = DayFiles(
            # A new token, because the day no longer matches the engine's fingerprint. A day that another
            # writer changed gets a name that does not count as an own export.
            token=f"foreign-{uuid.uuid4().hex[:8]}" if foreign_of(table, held) else uuid.uuid4().hex[:16],
            rows=rows,
            totals=totals,
            properties={"prefs.operation": "erase"},
        )
        write_day(table, self._spec, day, written, remaining())
        return publish_day(table, self._spec, DayChange(day, written, parts_of(held)))


class SubjectInTrainingSet(SubjectInTable):
    """One subject's rows in a training set stored as an Iceberg table; the other rows keep their order."""

    def __init__(self, catalog: Catalog, name: str, erased: ErasedSubject) -> None:
        super().__init__(catalog, name, erased, TIME)

    def _erase_rows(self) -> tuple[tuple[date, ...], tuple[date, ...]]:
        table = self._table()
        if any(self._rows_in(table, file.data) for file in live_files(table)):
            others = scan_rows(table, row_filter=self._erased.others(TIME))
            replace_rows(table, others, {"prefs.operation": "erase"})
        return (), ()


def search_catalog(catalog: Catalog, erased: ErasedSubject) -> CatalogSearch:
    """Search all namespaces for tables of training sets, and tables of labels that hold the subject.

    Tables that this role may not read are part of the result, because a catalog may cover a whole account.
    Raises OfflineError if the namespaces cannot be listed.
    """
    key = erased.key.name
    training_sets: list[str] = []
    holding: list[str] = []
    unread: dict[str, str] = {}
    with translated("the Iceberg catalog"):
        namespaces = sorted(catalog.list_namespaces())
    names: list[str] = []
    for namespace in namespaces:
        try:
            with translated(f"the Iceberg namespace {'.'.join(namespace)}"):
                names += sorted(".".join(found) for found in catalog.list_tables(namespace))
        except (OfflineError, NotImplementedError) as error:
            # Some REST catalogs do not list tables.
            unread[".".join(namespace)] = str(error)
    for name in names:
        try:
            with translated(f"the table {name}"):
                table = catalog.load_table(name)
                if not {key, TIME} <= set(table.schema().column_names):
                    continue
                if is_training_set(table):
                    training_sets.append(name)
                # Compared as text, which fits an id of any type.
                elif any(
                    b.num_rows for b in scan_rows(table, [key], EqualTo(term=key, value=str(erased.value)))
                ):
                    holding.append(name)
        except OfflineError as error:
            unread[name] = str(error)
        except ValueError as error:
            # The column's type cannot represent such an id.
            unread[name] = f"its column {key} cannot be compared with the id: {str(error).splitlines()[0]}"
    return CatalogSearch(tuple(training_sets), tuple(holding), unread)


def files_holding(erased: ErasedSubject, folders: Sequence[Path]) -> list[Path]:
    """Find the Parquet and CSV files of training sets and labels below the folders that hold the subject.

    Those files have the entity's key and `label_time` as columns. Raises OfflineError for a folder that does
    not exist or a file that cannot be read.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise OfflineError(f"{folder} is not a folder: name an existing folder of training sets")
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix.lower() in (".parquet", ".csv") and _holds(path, erased):
                found.append(path)
    return found


def rows_of_file(path: Path, erased: ErasedSubject) -> list[dict[str, Any]]:
    """Return the subject's rows of a file that `files_holding` found. Raises OfflineError if it cannot be read."""
    with _searched(path):
        return [
            row
            for batch in _batches(path, erased.key.name, whole=True)
            for row in batch.filter(_mask(batch.column(erased.key.name), erased, path)).to_pylist()
        ]


def _holds(path: Path, erased: ErasedSubject) -> bool:
    with _searched(path):
        return any(
            pc.any(_mask(batch.column(0), erased, path)).as_py()
            for batch in _batches(path, erased.key.name, whole=False)
        )


@contextmanager
def _searched(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, LabelsRefused) as error:
        raise OfflineError(
            f"{path} cannot be searched ({str(error).splitlines()[0]}): repair or remove it, or name other folders"
        ) from error


def _batches(path: Path, key: str, *, whole: bool) -> Iterator[pa.RecordBatch]:
    """Yield the keys of a file of labels, or its `whole` rows; nothing if it has no labels."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            names = next(csv.reader(lines), [])
        if not {key, TIME} <= set(names):
            return
        convert = pa.csv.ConvertOptions(
            include_columns=names if whole else [key],
            # Other columns as they are written.
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        quoted = pa.csv.ParseOptions(newlines_in_values=True)
        with pa.csv.open_csv(path, parse_options=quoted, convert_options=convert) as batches:
            yield from batches
        return
    with pq.ParquetFile(path) as parquet:
        if {key, TIME} <= set(parquet.schema_arrow.names):
            yield from parquet.iter_batches(columns=None if whole else [key])


def _mask(ids: pa.Array, erased: ErasedSubject, path: Path) -> pa.Array:
    """Return which of the ids, in any spelling that labels may use, are the subject's."""
    if erased.key.type == "bigint" and pa.types.is_string(ids.type):
        there = ids.is_valid()
        given = key_values(pa.chunked_array([ids]).drop_null(), erased.key, str(path))
        same = pc.equal(given, erased.value).combine_chunks()
        return pc.replace_with_mask(pa.array([False] * len(ids)), there, same)
    if erased.key.type == "bigint":
        return pc.fill_null(pc.equal(ids, erased.value), False)
    texts = pc.utf8_trim(ids.cast(pa.string()), BLANKS)
    if erased.key.type == "uuid":
        texts = pc.utf8_lower(texts)
    return pc.fill_null(pc.equal(texts, erased.value), False)
