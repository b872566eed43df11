"""Export of tiles to Iceberg, one day at a time: write, audit, publish.

The day's rows are written to files, committed to a branch of their own, audited there against the engine, and
only then become the table's current state, in one commit that names the state it replaces. Readers therefore
see the old day or the new one, whole, whatever fails in between; what a crash leaves behind is an unused
branch and unreferenced files, which `maintenance` removes.

The fingerprint of a day is part of its files' names. Snapshot properties carry it too, for people, but they
go when a snapshot expires and would lie after a rollback; the names of the current files are always the
truth.
"""

from __future__ import annotations

import importlib.metadata
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.io.pyarrow import parquet_file_to_data_file
from pyiceberg.manifest import DataFile
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot, ancestors_of

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.offline.audit import AuditFailed, audit_day
from dagster_prefs.offline.catalog import CatalogUnavailable, OfflineError, explained
from dagster_prefs.offline.tables import TileTable, arrow_schema, ensure_table, scan_day
from dagster_prefs.offline.tiles import Fingerprint, TileSnapshot, TilesUnreadable, tile_snapshot

DEFAULT_NAMESPACE = "training"

# A row group is what a reader decodes at once; a file is what an object store serves at once.
ROWS_PER_GROUP = 500_000
FILE_BYTES = 256 * 1024 * 1024

# How often an export starts again because another one got there first.
ATTEMPTS = 8

BRANCH_PREFIX = "export-"

Status = Literal["written", "unchanged", "empty", "retained"]


class ExportConflict(OfflineError):
    """Other writers kept replacing the table; nothing of ours is visible."""


@dataclass(frozen=True)
class ExportReport:
    """What became of one day.

    `status`: `written` (the day was replaced), `unchanged` (it already held exactly this), `empty` (the
    engine has nothing of it and neither has the table), `retained` (the engine holds less than the table, so
    the table keeps what it has; `reason` says what is less). `rows` and `bytes` are of the day as the table
    now holds it; `snapshot_id` is the table's current snapshot, None for a table without one; `seconds` is
    wall time.
    """

    table: str
    day: date
    status: Status
    rows: int
    bytes: int
    files: int
    snapshot_id: int | None
    fingerprint: str | None
    seconds: float
    attempts: int = 1
    reason: str = ""


@dataclass
class _Written:
    """Files of one attempt, not yet visible, and what the engine said about them."""

    fingerprint: Fingerprint
    totals: Mapping[str, Decimal]
    paths: list[str] = field(default_factory=list)
    files: list[DataFile] = field(default_factory=list)


def export_day(
    engine: EngineConnection,
    catalog: Catalog,
    spec: TileTable,
    day: date,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    keep_before: date | None = None,
    allow_loss: bool = False,
) -> ExportReport:
    """Make the table hold exactly the engine's tiles of `day` (UTC), canaries left out.

    Days before `keep_before` have left the engine's retention: what the table holds of them stays. So does a
    day of which the engine holds fewer rows or a smaller total than the table, because late events only ever
    add; `allow_loss=True` exports it all the same, for someone who knows why it shrank.

    Safe to run again, and several times at once. Raises AuditFailed (naming the branch that keeps the data),
    TilesUnreadable, EngineUnavailable, ExportConflict, or another OfflineError; readers then see what they
    saw.
    """
    started = time.monotonic()
    name = f"{namespace}.{spec.name}"
    for attempt in range(1, ATTEMPTS + 1):
        table = ensure_table(catalog, namespace, spec)
        with explained(f"the table {name}"):
            outcome = _attempt(engine, table, spec, day, keep_before, allow_loss)
        if outcome is None:
            continue
        status, table, fingerprint, reason = outcome
        with explained(f"the table {name}"):
            held = _day_files(table, spec, day)
        snapshot = table.current_snapshot()
        return ExportReport(
            table=name,
            day=day,
            status=status,
            rows=sum(file.record_count for file in held),
            bytes=sum(file.file_size_in_bytes for file in held),
            files=len(held),
            snapshot_id=snapshot.snapshot_id if snapshot else None,
            fingerprint=fingerprint,
            seconds=time.monotonic() - started,
            attempts=attempt,
            reason=reason,
        )
    raise ExportConflict(
        f"{name} of {day} was replaced by others {ATTEMPTS} times while it was exported: "
        "see which other exports or maintenance run, and run it again"
    )


def export_days(
    engine: EngineConnection,
    catalog: Catalog,
    spec: TileTable,
    days: Iterable[date],
    *,
    namespace: str = DEFAULT_NAMESPACE,
    keep_before: date | None = None,
) -> Iterator[ExportReport]:
    """Export several days, each in its own commit, so that a failure keeps the days before it."""
    for day in days:
        yield export_day(engine, catalog, spec, day, namespace=namespace, keep_before=keep_before)


def days_to_export(
    engine: EngineConnection,
    catalog: Catalog,
    spec: TileTable,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    keep_before: date | None = None,
    until: date | None = None,
) -> list[date]:
    """Days whose tiles the table lacks or holds in another version, oldest first.

    Days before `keep_before` and from `until` on are left out, and so are days of which the engine holds
    fewer rows than the table. Creates nothing; a table that does not exist holds nothing.
    """
    with tile_snapshot(engine, spec) as tiles:
        wanted = tiles.fingerprints()
    held = exported_fingerprints(catalog, spec, namespace=namespace)
    rows = _exported_rows(catalog, spec, namespace)
    return sorted(
        day
        for day, fingerprint in wanted.items()
        if held.get(day) != fingerprint.token
        and (keep_before is None or day >= keep_before)
        and (until is None or day < until)
        and fingerprint.row_count >= rows.get(day, 0)
    )


def exported_fingerprints(
    catalog: Catalog, spec: TileTable, *, namespace: str = DEFAULT_NAMESPACE
) -> dict[date, str | None]:
    """Day → fingerprint token of every day the table holds; None where its files do not tell one."""
    tokens: dict[date, set[str]] = {}
    for file in _current_files(catalog, spec, namespace):
        tokens.setdefault(_day_of(file), set()).add(_token_of(file))
    return {day: _only(found) for day, found in tokens.items()}


def _exported_rows(catalog: Catalog, spec: TileTable, namespace: str) -> dict[date, int]:
    rows: dict[date, int] = {}
    for file in _current_files(catalog, spec, namespace):
        rows[_day_of(file)] = rows.get(_day_of(file), 0) + file.record_count
    return rows


def _current_files(catalog: Catalog, spec: TileTable, namespace: str) -> list[DataFile]:
    with explained(f"the table {namespace}.{spec.name}"):
        try:
            table = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            return []
        return [task.file for task in table.scan().plan_files()]


def _attempt(
    engine: EngineConnection,
    table: Table,
    spec: TileTable,
    day: date,
    keep_before: date | None,
    allow_loss: bool,
) -> tuple[Status, Table, str | None, str] | None:
    """One try from a fresh table; None means that another writer changed the day meanwhile."""
    held = _day_files(table, spec, day)
    token = _only({_token_of(file) for file in held})
    if keep_before is not None and day < keep_before:
        return (
            ("retained" if held else "empty"),
            table,
            token,
            f"days before {keep_before} are kept as they are",
        )
    with tile_snapshot(engine, spec) as tiles:
        fingerprint = tiles.fingerprint(day)
        if fingerprint is None:
            if held:
                return "retained", table, token, "the engine holds nothing of this day any more"
            return "empty", table, None, ""
        if fingerprint.token == token:
            return "unchanged", table, token, ""
        less = "" if allow_loss else _loss(table, spec, held, fingerprint)
        if less:
            return "retained", table, token, less
        written = _write(tiles, table, spec, day, fingerprint)
    published = _publish(table, spec, day, written, {file.file_path for file in held})
    if published is None:
        _discard(table, written)
        return None
    return "written", published, fingerprint.token, ""


def _loss(table: Table, spec: TileTable, held: list[DataFile], fingerprint: Fingerprint) -> str:
    rows = sum(file.record_count for file in held)
    if fingerprint.row_count < rows:
        return f"the engine holds {fingerprint.row_count} rows of this day, the table {rows}"
    total = Decimal(0)
    for file in held:
        for batch in _read(table, file, list(spec.metric)):
            for column in batch.columns:
                total += Decimal(pc.sum(column).as_py() or 0)
    if fingerprint.metric_total < total:
        name = " + ".join(spec.metric)
        return f"the engine's total of {name} of this day is {fingerprint.metric_total}, the table's {total}"
    return ""


def _write(
    tiles: TileSnapshot, table: Table, spec: TileTable, day: date, fingerprint: Fingerprint
) -> _Written:
    rows, totals = tiles.totals(day)
    metric = sum((totals[name] for name in spec.metric), Decimal(0))
    if rows != fingerprint.row_count or metric != fingerprint.metric_total:
        raise TilesUnreadable(
            f"tile_fingerprints does not describe {spec.tile} of {day} ({fingerprint.row_count} rows "
            f"against {rows}): "
            "the views are being refreshed or were refreshed apart; run `dbt build`, then export again"
        )
    written = _Written(fingerprint, totals)
    writer = _FileWriter(table, spec, day, fingerprint.token, written.paths)
    try:
        with closing(writer), closing(tiles.rows(day, writer.schema)) as batches:
            for batch in batches:
                writer.write(batch)
        written.files = [
            parquet_file_to_data_file(io=table.io, table_metadata=table.metadata, file_path=path)
            for path in written.paths
        ]
    except BaseException:
        _discard(table, written)
        raise
    return written


class _FileWriter:
    """Parquet files of one day, rolled by size; encoding runs beside the reading of the next rows."""

    def __init__(self, table: Table, spec: TileTable, day: date, token: str, paths: list[str]) -> None:
        self.schema = arrow_schema(table)
        self._table = table
        self._token = token
        self._paths = paths
        spec_ = table.spec()
        self._partition = PartitionKey(
            field_values=[PartitionFieldValue(field=spec_.fields[0], value=day)],
            partition_spec=spec_,
            schema=table.schema(),
        )
        self._attempt = uuid.uuid4()
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parquet")
        self._pending: Future[None] | None = None
        self._rows: list[pa.RecordBatch] = []
        self._count = 0
        self._sink: pa.NativeFile | None = None
        self._parquet: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        self._rows.append(batch)
        self._count += batch.num_rows
        if self._count >= ROWS_PER_GROUP:
            self._hand_over()

    def close(self) -> None:
        try:
            self._hand_over()
            self._wait()
            self._finish_file()
        finally:
            self._encoder.shutdown()
            if self._parquet is not None:
                # After a failure the footer cannot be written either; the file is thrown away.
                with suppress(Exception):
                    self._parquet.close()
            if self._sink is not None and not self._sink.closed:
                with suppress(Exception):
                    self._sink.close()

    def _hand_over(self) -> None:
        self._wait()
        if self._rows:
            group = pa.Table.from_batches(self._rows, schema=self.schema)
            self._rows, self._count = [], 0
            self._pending = self._encoder.submit(self._encode, group)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _encode(self, group: pa.Table) -> None:
        if self._parquet is None:
            path = self._table.location_provider().new_data_location(
                f"{self._token}-{self._attempt}-{len(self._paths):05}.parquet", self._partition
            )
            self._paths.append(path)
            self._sink = self._table.io.new_output(path).create(overwrite=False)
            self._parquet = pq.ParquetWriter(self._sink, self.schema, compression="zstd", store_schema=False)
        self._parquet.write_table(group, row_group_size=ROWS_PER_GROUP)
        if self._sink is not None and self._sink.tell() >= FILE_BYTES:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._parquet is not None and self._sink is not None:
            self._parquet.close()
            self._sink.close()
            self._parquet, self._sink = None, None


def _publish(table: Table, spec: TileTable, day: date, written: _Written, replaced: set[str]) -> Table | None:
    """Stage on a branch, audit it, make it current; None if another writer changed this very day.

    A commit by another writer to another day moves the table's head: the same files are then staged again on
    top of it, since publishing what was staged before would undo the other day.
    """
    for _ in range(ATTEMPTS):
        table.refresh()
        head = _head(table)
        held = [task.file for task in scan_day(table, spec, day, head.snapshot_id).plan_files()]
        if {file.file_path for file in held} != replaced:
            return None
        branch = f"{BRANCH_PREFIX}{day.isoformat()}-{uuid.uuid4().hex[:12]}"
        try:
            staged = _stage(table, head, branch, day, written, held)
            audit_day(
                table,
                spec,
                day,
                snapshot_id=staged,
                branch=branch,
                rows=written.fingerprint.row_count,
                totals=written.totals,
                paths=written.paths,
                replaced=held,
            )
        except AuditFailed:
            # The branch keeps the data for people to look at.
            raise
        except CommitFailedException:
            _drop_branch(table, branch)
            continue
        except Exception:
            _drop_branch(table, branch)
            _discard(table, written)
            raise
        # From here on a commit whose reply is lost may still take place, so the files stay.
        if _make_current(table, head, staged, branch):
            return table
        _drop_branch(table, branch)
    return None


def _head(table: Table) -> Snapshot:
    """The table's current snapshot, an empty one where it has none: a branch has to start somewhere."""
    if table.current_snapshot() is None:
        with table.transaction() as transaction:
            transaction.update_snapshot().fast_append().commit()
    head = table.current_snapshot()
    if head is None:
        raise CatalogUnavailable("the catalog lost a first, empty commit: run it again, which is safe")
    return head


def _stage(
    table: Table, head: Snapshot, branch: str, day: date, written: _Written, held: list[DataFile]
) -> int:
    """Commit the day to a branch that starts at `head`, which holds `held`; returns the new snapshot's id."""
    # A commit of its own: a retried transaction would forget where the branch was to start.
    for attempt in range(1, ATTEMPTS + 1):
        try:
            table.manage_snapshots().create_branch(head.snapshot_id, branch).commit()
            break
        except CommitFailedException:
            if attempt == ATTEMPTS:
                raise
            table.refresh()
    properties = {
        "prefs.day": day.isoformat(),
        "prefs.code-version": importlib.metadata.version("dagster-prefs"),
        **written.fingerprint.properties(),
    }
    with table.transaction() as transaction:
        snapshot = transaction.update_snapshot(snapshot_properties=properties, branch=branch).overwrite()
        for file in held:
            snapshot.delete_data_file(file)
        for file in written.files:
            snapshot.append_data_file(file)
        snapshot.commit()
    staged = table.snapshot_by_name(branch)
    if staged is None:
        raise CatalogUnavailable(f"the catalog lost the branch {branch}: run the export again, which is safe")
    return staged.snapshot_id


def _make_current(table: Table, head: Snapshot, staged: int, branch: str) -> bool:
    """Publish a staged snapshot if the table's current one is still `head`, on which it was staged."""
    current = table.current_snapshot()
    if current is None or current.snapshot_id != head.snapshot_id:
        return False
    try:
        # The commit requires that the current snapshot is the one just compared.
        table.manage_snapshots().set_current_snapshot(snapshot_id=staged).remove_branch(branch).commit()
        return True
    except CommitFailedException:
        table.refresh()
        return _is_published(table, staged)
    except Exception:
        # The reply may be what was lost, not the commit.
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
    # Best effort: a branch that stays is harmless, and maintenance removes it.
    with suppress(Exception):
        table.refresh()
        if branch in table.refs():
            table.manage_snapshots().remove_branch(branch).commit()


def _discard(table: Table, written: _Written) -> None:
    # Best effort: a file that stays is harmless, and maintenance removes it.
    for path in written.paths:
        with suppress(Exception):
            table.io.delete(path)


def _read(table: Table, file: DataFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with table.io.new_input(file.file_path).open() as source, pq.ParquetFile(source) as parquet:
        yield from parquet.iter_batches(columns=columns)


def _day_files(table: Table, spec: TileTable, day: date) -> list[DataFile]:
    return [task.file for task in scan_day(table, spec, day).plan_files()]


def _day_of(file: DataFile) -> date:
    # A date partition is stored as days since 1970.
    return date(1970, 1, 1) + timedelta(days=int(file.partition[0]))


def _token_of(file: DataFile) -> str:
    return file.file_path.rsplit("/", 1)[-1].split("-", 1)[0]


def _only(tokens: set[str]) -> str | None:
    return next(iter(tokens)) if len(tokens) == 1 else None
