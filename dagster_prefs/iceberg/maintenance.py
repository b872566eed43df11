"""Maintenance of Iceberg tables: abandoned branches, small files, old snapshots, unreferenced files.

Removes nothing that a tag or the current state needs. Safe to run again at any time, also during exports:
files and branches younger than `grace` may belong to a running export and are kept.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.serializers import Compressor
from pyiceberg.table import Table

from dagster_prefs.iceberg import FILE_BYTES
from dagster_prefs.iceberg.catalog import translated
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE, ExportConflict, foreign_of
from dagster_prefs.iceberg.files import LiveFile, live_files, only_token, parts_of, read_rows, tile_files
from dagster_prefs.iceberg.publish import (
    ATTEMPTS,
    BRANCH_PREFIX,
    DayChange,
    DayFiles,
    publish_day,
    write_day,
)
from dagster_prefs.iceberg.tables import (
    TileTable,
    arrow_schema,
    counted_sums,
    is_events,
    is_statistics,
    is_training_set,
)


@dataclass(frozen=True)
class MaintenanceReport:
    """The work done on one table; `bytes_freed` is the size of the removed files.

    `days_foreign` were not compacted, because another writer changed them (see `export_day`).
    """

    table: str
    branches_removed: tuple[str, ...]
    days_compacted: tuple[date, ...]
    days_foreign: tuple[date, ...]
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
    """Maintain one table.

    Removes branches of exports that ended `keep_snapshots` before `now`; merges the small files of a day into
    one; expires snapshots older than `keep_snapshots`, except the current one and those of branches and tags;
    removes files that no remaining snapshot names once they are older than `grace`, which must exceed the
    longest export. RisingWave itself compacts the days that its sinks write (`compact=False`).

    Raises TableMissing if the table does not exist, ExportConflict, or another OfflineError.
    """
    name = f"{namespace}.{spec.name}"
    with translated(f"the table {name}"):
        table = catalog.load_table(spec.identifier(namespace))
        branches = _remove_branches(table, now - keep_snapshots)
        compacted, foreign = _compact(table, spec) if compact else ((), ())
        report = _without_history(table, now, keep_snapshots, grace)
        return replace(report, branches_removed=branches, days_compacted=compacted, days_foreign=foreign)


def maintain_training_sets(
    catalog: Catalog,
    *,
    now: datetime,
    keep_snapshots: timedelta,
    grace: timedelta = timedelta(days=1),
    namespace: str = DEFAULT_NAMESPACE,
) -> list[MaintenanceReport]:
    """Maintain the tables of training sets, of statistics and of events in the namespace.

    Removes old snapshots and unreferenced files, as `maintain` does, and merges the small files that RisingWave's sinks
    of raw messages write. Raises ExportConflict, or another OfflineError, for the first table that fails.
    """
    with translated(f"the Iceberg namespace {namespace}"):
        names = sorted(catalog.list_tables(namespace)) if catalog.namespace_exists(namespace) else []
    reports = []
    for identifier in names:
        with translated(f"the table {'.'.join(identifier)}"):
            table = catalog.load_table(identifier)
            if is_training_set(table) or is_statistics(table) or is_events(table):
                merged = _merge(table) if is_events(table) else ()
                report = _without_history(table, now, keep_snapshots, grace)
                reports.append(replace(report, days_compacted=merged))
    return reports


def _merge(table: Table) -> tuple[date, ...]:
    # DuckDB takes time to load, which those who only read a table need not wait for.
    from dagster_prefs.iceberg.event_export import split_by_hour
    from dagster_prefs.iceberg.event_sink import merge_files
    from dagster_prefs.iceberg.event_tables import REJECTED

    _, others = split_by_hour(live_files(table))
    return merge_files(table, others) if REJECTED in table.schema().column_names else ()


def _without_history(
    table: Table,
    now: datetime,
    keep_snapshots: timedelta,
    grace: timedelta,
) -> MaintenanceReport:
    expired = expire(table, partial(_older, before=now - keep_snapshots))
    files, size = _remove_orphans(table, now - grace)
    return MaintenanceReport(".".join(table.name()), (), (), (), expired, files, size)


def _remove_branches(table: Table, before: datetime) -> tuple[str, ...]:
    removed = []
    for name, ref in table.refs().items():
        snapshot = table.snapshot_by_id(ref.snapshot_id)
        if name.startswith(BRANCH_PREFIX) and snapshot and snapshot.timestamp_ms < _milliseconds(before):
            try:
                table.manage_snapshots().remove_branch(name).commit()
                removed.append(name)
            except CommitFailedException:
                # Another process changed this branch, so it is not abandoned.
                table.refresh()
    return tuple(removed)


def _compact(table: Table, spec: TileTable) -> tuple[tuple[date, ...], tuple[date, ...]]:
    """Merge the small files of each day into one. Returns the merged days and the foreign ones."""
    done, foreign = [], []
    for day, files in tile_files(table, spec).items():
        if foreign_of(table, files):
            # Rewritten under an own name, another writer's rows would pass for an export.
            foreign.append(day)
            continue
        if len(files) < 2 or sum(file.data.file_size_in_bytes for file in files) > FILE_BYTES:
            continue
        token = only_token(files)
        rows, totals = counted_sums(_rows(table, spec.totals, files), spec.totals)
        # If the files do not agree on a fingerprint, the name gets none of the engine's, so that the next
        # export writes the day again.
        merged = DayFiles(
            token=token or uuid.uuid4().hex[:16],
            rows=rows,
            totals=totals,
            properties={"prefs.operation": "compact", "prefs.fingerprint": token or ""},
        )
        schema = arrow_schema(table)
        batches = (batch.cast(schema) for batch in _rows(table, schema.names, files))
        write_day(table, spec, day, merged, batches)
        if publish_day(table, spec, DayChange(day, merged, parts_of(files))):
            done.append(day)
    return tuple(done), tuple(foreign)


def _rows(table: Table, columns: Sequence[str], files: list[LiveFile]) -> Iterator[pa.RecordBatch]:
    return (batch for file in files for batch in read_rows(table, file, list(columns)))


def expire(table: Table, condemned: Callable[[Table], Iterable[int]]) -> int:
    """Expire those `condemned` snapshots that no branch or tag points at, and return their number.

    Calls `condemned` again if another process changed the table in the meantime. Raises ExportConflict if
    that keeps happening.
    """
    for _ in range(ATTEMPTS):
        table.refresh()
        kept = {ref.snapshot_id for ref in table.refs().values()}
        going = sorted(set(condemned(table)) - kept)
        if not going:
            return 0
        with suppress(CommitFailedException):
            table.maintenance.expire_snapshots().by_ids(going).commit()
            return len(going)
    raise ExportConflict(
        f"{'.'.join(table.name())} was changed by others {ATTEMPTS} times while its snapshots were expired: "
        "find out which exports or maintenance run, and run it again"
    )


def _older(table: Table, before: datetime) -> list[int]:
    return [
        snapshot.snapshot_id
        for snapshot in table.snapshots()
        if snapshot.timestamp_ms < _milliseconds(before)
    ]


def _remove_orphans(table: Table, before: datetime) -> tuple[int, int]:
    orphans = [file for file in unreferenced_files(table) if file.written_at < before]
    for file in orphans:
        table.io.delete(file.location)
    return len(orphans), sum(file.size for file in orphans)


@dataclass(frozen=True)
class UnreferencedFile:
    """A file in a table's folder that the table does not reference; `size` is in bytes, `written_at` UTC."""

    location: str
    size: int
    written_at: datetime


def unreferenced_files(table: Table) -> list[UnreferencedFile]:
    """Return every file in the table's folder that neither the table nor one of its snapshots references."""
    if not isinstance(table.io, PyArrowFileIO):
        return []
    scheme, host, root = table.io.parse_location(table.location(), table.io.properties)
    storage = table.io.fs_by_scheme(scheme, host)
    found = storage.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
    # Refreshed after the listing, so that a file committed in between is known to be in use.
    table.refresh()
    used = {
        table.io.parse_location(name, table.io.properties)[2] for name in _referenced(table) if root in name
    }
    prefix = table.location().removesuffix(root)
    return [
        UnreferencedFile(prefix + file.path, file.size, file.mtime)
        for file in found
        if file.type == pyarrow.fs.FileType.File and file.path not in used
    ]


def _referenced(table: Table) -> Iterator[str]:
    """Yield the location of every file, metadata included, that the table or a snapshot references."""
    yield table.metadata_location
    # Every string of the metadata file, not only the fields that this version of pyiceberg knows, so that the
    # statistics files of newer engines are kept too.
    metadata = table.io.new_input(table.metadata_location)
    with metadata.open() as source:
        content = Compressor.get_compressor(table.metadata_location).stream_decompressor(source).read()
    yield from _texts(json.loads(content))
    seen: set[str] = set()
    for snapshot in table.snapshots():
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path in seen:
                continue
            seen.add(manifest.manifest_path)
            yield manifest.manifest_path
            for item in manifest.fetch_manifest_entry(table.io, discard_deleted=True):
                yield item.data_file.file_path


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for found in value.values() for text in _texts(found))
    elif isinstance(value, list):
        yield from (text for found in value for text in _texts(found))


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
