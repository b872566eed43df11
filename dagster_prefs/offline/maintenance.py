"""Upkeep of the training tables: abandoned branches, small files, old snapshots, unreferenced files.

Nothing that a tag or the current state needs is touched, and everything may be run again at any time, beside
running exports too: what is younger than `grace` may belong to one of them and stays.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from dagster_prefs.offline.catalog import explained
from dagster_prefs.offline.export import DEFAULT_NAMESPACE
from dagster_prefs.offline.publish import (
    BRANCH_PREFIX,
    FILE_BYTES,
    DayFiles,
    day_of,
    only,
    publish_day,
    read_file,
    token_of,
    write_day,
)
from dagster_prefs.offline.tables import TileTable, arrow_schema

ATTEMPTS = 5


@dataclass(frozen=True)
class MaintenanceReport:
    """What was done to one table; `bytes_freed` is the size of the removed files."""

    table: str
    branches_removed: tuple[str, ...]
    days_compacted: tuple[date, ...]
    snapshots_expired: int
    files_removed: int
    bytes_freed: int


def maintain(
    catalog: Catalog,
    spec: TileTable,
    *,
    now: datetime,
    keep_snapshots: timedelta,
    grace: timedelta = timedelta(days=1),
    namespace: str = DEFAULT_NAMESPACE,
    compact: bool = True,
) -> MaintenanceReport:
    """Tidy one table.

    Branches of exports that ended `keep_snapshots` before `now` go; days in several small files become one
    file; snapshots older than `keep_snapshots` expire unless a branch or tag points at them or they are
    current; files that no remaining snapshot names go once they are older than `grace`, which must exceed the
    longest export. Days that RisingWave's sinks write are compacted by RisingWave (`compact=False`).

    Raises OfflineError: TableMissing where there is no such table.
    """
    name = f"{namespace}.{spec.name}"
    with explained(f"the table {name}"):
        table = catalog.load_table(spec.identifier(namespace))
        branches = _remove_branches(table, now - keep_snapshots)
        compacted = _compact(table, spec) if compact else ()
        expired = _expire(table, now - keep_snapshots)
        files, size = _remove_orphans(table, now - grace)
    return MaintenanceReport(name, branches, compacted, expired, files, size)


def _remove_branches(table: Table, before: datetime) -> tuple[str, ...]:
    removed = []
    for name, ref in table.refs().items():
        snapshot = table.snapshot_by_id(ref.snapshot_id)
        if name.startswith(BRANCH_PREFIX) and snapshot and snapshot.timestamp_ms < _milliseconds(before):
            try:
                table.manage_snapshots().remove_branch(name).commit()
                removed.append(name)
            except CommitFailedException:
                # Somebody else is at work on this branch, so it is not abandoned after all.
                table.refresh()
    return tuple(removed)


def _compact(table: Table, spec: TileTable) -> tuple[date, ...]:
    days: dict[date, list[DataFile]] = {}
    for task in table.scan().plan_files():
        days.setdefault(day_of(task.file), []).append(task.file)
    done = []
    for day, files in sorted(days.items()):
        if len(files) < 2 or sum(file.file_size_in_bytes for file in files) > FILE_BYTES:
            continue
        token = only({token_of(file) for file in files})
        totals = _totals(table, spec, files)
        # A name without the day's fingerprint would make the next export write the day again, which is right
        # where the files did not agree on one.
        merged = DayFiles(
            token=token or uuid.uuid4().hex[:16],
            rows=sum(file.record_count for file in files),
            totals=totals,
            properties={"prefs.operation": "compact", "prefs.fingerprint": token or ""},
        )
        write_day(table, spec, day, merged, _rows(table, spec, files))
        if publish_day(table, spec, day, merged, {file.file_path for file in files}) is not None:
            done.append(day)
    return tuple(done)


def _totals(table: Table, spec: TileTable, files: list[DataFile]) -> Mapping[str, Decimal]:
    totals = dict.fromkeys(spec.totals, Decimal(0))
    for file in files:
        for batch in read_file(table, file, list(spec.totals)):
            for name in totals:
                totals[name] += Decimal(pc.sum(batch.column(name)).as_py() or 0)
    return totals


def _rows(table: Table, spec: TileTable, files: list[DataFile]) -> Iterator[pa.RecordBatch]:
    schema = arrow_schema(table)
    names = [column.name for column in spec.columns]
    return (batch.cast(schema) for file in files for batch in read_file(table, file, names))


def _expire(table: Table, before: datetime) -> int:
    for attempt in range(1, ATTEMPTS + 1):
        table.refresh()
        kept = {ref.snapshot_id for ref in table.refs().values()}
        old = [
            snapshot.snapshot_id
            for snapshot in table.snapshots()
            if snapshot.timestamp_ms < _milliseconds(before) and snapshot.snapshot_id not in kept
        ]
        if not old:
            break
        try:
            table.maintenance.expire_snapshots().by_ids(old).commit()
            return len(old)
        except CommitFailedException:
            if attempt == ATTEMPTS:
                raise
    return 0


def _remove_orphans(table: Table, before: datetime) -> tuple[int, int]:
    if not isinstance(table.io, PyArrowFileIO):
        return 0, 0
    scheme, host, root = table.io.parse_location(table.location(), table.io.properties)
    storage = table.io.fs_by_scheme(scheme, host)
    found = [
        file
        for file in storage.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
        if file.type == pyarrow.fs.FileType.File and file.mtime < before
    ]
    # Read after the listing: a file that was committed in between is then known to be in use.
    table.refresh()
    used = {table.io.parse_location(location, table.io.properties)[2] for location in referenced_files(table)}
    orphans = [file for file in found if file.path not in used]
    for file in orphans:
        storage.delete_file(file.path)
    return len(orphans), sum(file.size for file in orphans)


def referenced_files(table: Table) -> Iterator[str]:
    """Location of every file, metadata included, that the table or a snapshot of it names."""
    yield table.metadata_location
    for entry in table.metadata.metadata_log:
        yield entry.metadata_file
    for statistics in table.metadata.statistics:
        yield statistics.statistics_path
    seen: set[str] = set()
    for snapshot in table.snapshots():
        yield snapshot.manifest_list
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path in seen:
                continue
            seen.add(manifest.manifest_path)
            yield manifest.manifest_path
            for item in manifest.fetch_manifest_entry(table.io, discard_deleted=True):
                yield item.data_file.file_path


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
