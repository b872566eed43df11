"""Replacement of days of a training table: write files, stage on a branch, audit, publish."""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import parquet_file_to_data_file
from pyiceberg.manifest import DataFile
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot, ancestors_of

from dagster_prefs.iceberg import FILE_BYTES
from dagster_prefs.iceberg.audit import AuditFailed, Staged, StagedDay, audit_days
from dagster_prefs.iceberg.catalog import CatalogUnavailable, conflicts_named
from dagster_prefs.iceberg.files import LiveFile, check_writable, file_name, parts_of, tile_files
from dagster_prefs.iceberg.tables import PARQUET, TileTable, arrow_schema

# A reader decodes one row group at a time, and DuckDB returns this many rows at a time; an object store
# serves one file at a time.
ROWS_PER_GROUP = 122_880

# Number of attempts at a commit that conflicts with other writers' commits.
ATTEMPTS = 8

BRANCH_PREFIX = "export-"


@dataclass
class DayFiles:
    """Files of a day that are not visible to readers yet.

    `token` is the day's fingerprint and begins every file's name, followed by `rows`; `rows` and `totals`
    (column → sum) are what the audit must find in them; `properties` become snapshot properties.
    """

    token: str
    rows: int
    totals: Mapping[str, Decimal]
    properties: Mapping[str, str]
    paths: list[str] = field(default_factory=list)
    files: list[DataFile] = field(default_factory=list)


def write_day(
    table: Table, spec: TileTable, day: date, files: DayFiles, batches: Iterable[pa.RecordBatch]
) -> None:
    """Write the batches (in any order, in the table's Arrow schema) to new files sorted by key.

    Adds the files to `files`. Removes everything written if anything fails. Raises LayoutForeign if another
    engine changed the table's layout.
    """
    # DuckDB takes time to load, which those who only read a table need not wait for.
    from dagster_prefs.iceberg.duck import sort_batches

    check_writable(table, spec)
    with closing(sort_batches(batches, arrow_schema(table), spec.key, ROWS_PER_GROUP)) as groups:
        write_groups(table, (day,), files, groups)


def write_groups(
    table: Table, partition: Sequence[Any], files: DayFiles, groups: Iterable[pa.RecordBatch]
) -> None:
    """Write sorted row groups of one partition (its values, in the order of the table's fields) to new files.

    Adds the files to `files`. Removes everything written if anything fails.
    """
    try:
        first = len(files.paths)
        with closing(_FileWriter(table, partition, files)) as writer:
            for group in groups:
                writer.write(group)
        files.files += [
            parquet_file_to_data_file(io=table.io, table_metadata=table.metadata, file_path=path)
            for path in files.paths[first:]
        ]
    except BaseException:
        discard(table, files)
        raise


class _FileWriter:
    """Writes a partition's Parquet files, rolled by size; encodes in a thread while the next rows are read."""

    def __init__(self, table: Table, partition: Sequence[Any], files: DayFiles) -> None:
        self.schema = arrow_schema(table)
        self._table = table
        self._files = files
        spec_ = table.spec()
        self._partition = PartitionKey(
            field_values=[
                PartitionFieldValue(field=field, value=value)
                for field, value in zip(spec_.fields, partition, strict=True)
            ],
            partition_spec=spec_,
            schema=table.schema(),
        )
        self._write = str(uuid.uuid4())
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parquet")
        self._pending: Future[None] | None = None
        self._sink: pa.NativeFile | None = None
        self._parquet: pq.ParquetWriter | None = None

    def write(self, group: pa.RecordBatch) -> None:
        """Write a row group, once the previous one is written."""
        self._wait()
        self._pending = self._encoder.submit(self._encode, group)

    def close(self) -> None:
        try:
            self._wait()
            self._finish_file()
        finally:
            self._encoder.shutdown()
            if self._parquet is not None:
                # After a failure the footer cannot be written either; the file is discarded.
                with suppress(Exception):
                    self._parquet.close()
            if self._sink is not None and not self._sink.closed:
                with suppress(Exception):
                    self._sink.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _encode(self, group: pa.RecordBatch) -> None:
        if self._parquet is None:
            path = self._table.location_provider().new_data_location(
                file_name(self._files.token, self._write, self._files.rows, len(self._files.paths)),
                self._partition,
            )
            self._files.paths.append(path)
            self._sink = self._table.io.new_output(path).create(overwrite=False)
            self._parquet = pq.ParquetWriter(self._sink, self.schema, store_schema=False, **PARQUET)
        self._parquet.write_batch(group)
        if self._sink is not None and self._sink.tell() >= FILE_BYTES:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._parquet is not None and self._sink is not None:
            self._parquet.close()
            self._sink.close()
            self._parquet, self._sink = None, None


@dataclass(frozen=True)
class DayChange:
    """A day of which the files at `replaced` give way to those that were `written`.

    `replaced` are the locations of the data and delete files (`parts_of`) of the day when it was read. Of a table of
    events it is not a day but an hour (`datetime` is a `date`).
    """

    day: date
    written: DayFiles
    replaced: Set[str]


@dataclass
class Publication:
    """The outcome of changes: `published` days, and days that `failed` their audit.

    Days that are in neither were changed by another writer, or became outdated.
    """

    published: set[date] = field(default_factory=set)
    failed: dict[date, AuditFailed] = field(default_factory=dict)


class Days(Protocol):
    """How the files of a table belong to days (or hours), and how staged ones are audited."""

    def files(
        self, table: Table, *, first: date, last: date, snapshot_id: int
    ) -> Mapping[Any, list[LiveFile]]:
        """Return the files of each day from `first` to `last` in a snapshot."""

    def audit(self, table: Table, staged: Staged, known: Container[date]) -> Mapping[date, AuditFailed]:
        """Return the error of each staged day that fails; those that are `known` were accepted before."""


@dataclass(frozen=True)
class TileDays:
    """The days of a training table."""

    spec: TileTable

    def files(
        self, table: Table, *, first: date, last: date, snapshot_id: int
    ) -> Mapping[Any, list[LiveFile]]:
        return tile_files(table, self.spec, first=first, last=last, snapshot_id=snapshot_id)

    def audit(self, table: Table, staged: Staged, known: Container[date]) -> Mapping[date, AuditFailed]:
        return audit_days(table, self.spec, staged, known=known)


def publish_days(
    table: Table,
    spec: TileTable,
    changes: Iterable[DayChange],
    *,
    still_valid: Callable[[], bool] = lambda: True,
) -> Publication:
    """Publish days of a training table like `publish_changes`."""
    return publish_changes(table, TileDays(spec), changes, still_valid=still_valid)


def publish_changes(
    table: Table,
    layout: Days,
    changes: Iterable[DayChange],
    *,
    still_valid: Callable[[], bool] = lambda: True,
) -> Publication:
    """Stage days on a branch, audit each, and publish all of them with one commit.

    A day that fails its audit, and a day that another writer changed, is left out, and the others are published.
    The branch of a failed audit keeps the data for inspection. `still_valid` is called right before publishing; if
    it returns False, the written rows are outdated and none is published. Files that are not published and that no
    branch keeps are removed. Raises what catalog and storage raise.

    A commit by another writer to another day moves the table's head: the same files are then staged again on
    top of it, since publishing the old branch would undo the other day.
    """
    left = {change.day: change for change in changes}
    done = Publication()
    accepted: set[date] = set()
    for _ in range(ATTEMPTS):
        if not left:
            break
        first, last = min(left), max(left)
        branch = f"{BRANCH_PREFIX}{_period(first, last)}-{uuid.uuid4().hex[:12]}"
        try:
            table.refresh()
            head = ensure_head(table)
            live = layout.files(table, first=first, last=last, snapshot_id=head.snapshot_id)
            for day, change in list(left.items()):
                if parts_of(live.get(day, [])) != change.replaced:
                    _give_up(table, done, [left.pop(day)])
            if not left:
                break
            held = {day: [file.data for file in live.get(day, [])] for day in left}
            staged = _stage(table, head, branch, left, held)
            refused = layout.audit(table, staged, accepted)
        except CommitFailedException:
            _drop_branch(table, branch)
            continue
        except Exception:
            _drop_branch(table, branch)
            _give_up(table, done, left.values())
            raise
        accepted |= left.keys() - refused.keys()
        if refused:
            # The branch stays. The other days are staged again without the refused ones.
            done.failed |= refused
            left = {day: change for day, change in left.items() if day not in refused}
            continue
        if not still_valid():
            _drop_branch(table, branch)
            break
        # From here on the files stay, because a commit whose reply was lost may still take effect.
        if _make_current(table, head, staged.snapshot_id, branch):
            done.published |= left.keys()
            return done
        _drop_branch(table, branch)
    _give_up(table, done, left.values())
    return done


def publish_day(table: Table, spec: TileTable, change: DayChange) -> bool:
    """Publish one day like `publish_days`. Returns False if another writer changed it; raises AuditFailed."""
    done = publish_days(table, spec, [change])
    for error in done.failed.values():
        raise error
    return change.day in done.published


def _period(first: date, last: date) -> str:
    return first.isoformat() if first == last else f"{first.isoformat()}-to-{last.isoformat()}"


def _give_up(table: Table, done: Publication, changes: Iterable[DayChange]) -> None:
    # The branch of a failed audit also holds the days that passed theirs, so it needs their files.
    if not done.failed:
        for change in changes:
            discard(table, change.written)


def ensure_head(table: Table) -> Snapshot:
    """Return the table's current snapshot; creates an empty one if there is none, to start branches at.

    Raises CommitFailedException if another writer's commit came first.
    """
    if table.current_snapshot() is None:
        with conflicts_named(), table.transaction() as transaction:
            transaction.update_snapshot().fast_append().commit()
    head = table.current_snapshot()
    if head is None:
        raise CatalogUnavailable(
            "the catalog lost the first, empty commit: run the export again, which is safe"
        )
    return head


def _stage(
    table: Table,
    head: Snapshot,
    branch: str,
    changes: Mapping[date, DayChange],
    held: Mapping[date, list[DataFile]],
) -> Staged:
    """Commit the days to a branch that starts at `head`, which holds `held`."""
    # A commit of its own, because a retried transaction would lose the branch's starting point.
    for attempt in range(1, ATTEMPTS + 1):
        try:
            table.manage_snapshots().create_branch(head.snapshot_id, branch).commit()
            break
        except CommitFailedException:
            if attempt == ATTEMPTS:
                raise
            table.refresh()
    properties = {
        "prefs.code-version": importlib.metadata.version("dagster-prefs"),
        **_properties(changes.values()),
    }
    transaction = table.transaction()
    snapshot = transaction.update_snapshot(snapshot_properties=properties, branch=branch).overwrite()
    for day, change in changes.items():
        for file in held[day]:
            snapshot.delete_data_file(file)
        for file in change.written.files:
            snapshot.append_data_file(file)
    snapshot.commit()
    with conflicts_named():
        transaction.commit_transaction()
    staged = table.snapshot_by_name(branch)
    if staged is None:
        raise CatalogUnavailable(f"the catalog lost the branch {branch}: run the export again, which is safe")
    return Staged(
        staged.snapshot_id,
        branch,
        {
            day: StagedDay(change.written.paths, change.written.rows, change.written.totals, held[day])
            for day, change in changes.items()
        },
    )


def _properties(changes: Iterable[DayChange]) -> dict[str, str]:
    """Return the snapshot properties of the changed days.

    Those of a single day are `prefs.day` and the day's own. Those of several days are `prefs.operation`, and
    `prefs.days`: a JSON object of each day's own, without the prefix.
    """
    by_day = {change.day.isoformat(): change.written.properties for change in changes}
    if len(by_day) == 1:
        ((day, own),) = by_day.items()
        return {"prefs.day": day, **own}
    short = {
        day: {name.removeprefix("prefs."): value for name, value in own.items()}
        for day, own in sorted(by_day.items())
    }
    operations = sorted({own["operation"] for own in short.values()})
    return {"prefs.operation": "+".join(operations), "prefs.days": json.dumps(short, separators=(",", ":"))}


def _make_current(table: Table, head: Snapshot, staged: int, branch: str) -> bool:
    """Publish a staged snapshot if the table's current one is still `head`, on which it was staged."""
    current = table.current_snapshot()
    if current is None or current.snapshot_id != head.snapshot_id:
        return False
    try:
        # The commit requires the current snapshot to be the one just compared.
        table.manage_snapshots().set_current_snapshot(snapshot_id=staged).remove_branch(branch).commit()
        return True
    except CommitFailedException:
        table.refresh()
        return _is_published(table, staged)
    except Exception:
        # The commit may have succeeded although its reply was lost.
        table.refresh()
        if _is_published(table, staged):
            return True
        raise


def _is_published(table: Table, snapshot_id: int) -> bool:
    return any(
        ancestor.snapshot_id == snapshot_id
        for ancestor in ancestors_of(table.current_snapshot(), table.metadata)
    )


def _drop_branch(table: Table, branch: str) -> None:
    # Best effort: a remaining branch does no harm, and maintenance removes it.
    with suppress(Exception):
        table.refresh()
        if branch in table.refs():
            table.manage_snapshots().remove_branch(branch).commit()


def discard(table: Table, written: DayFiles) -> None:
    # Best effort: a remaining file does no harm, and maintenance removes it.
    for path in written.paths:
        with suppress(Exception):
            table.io.delete(path)
