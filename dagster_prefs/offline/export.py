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

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Literal

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.offline.catalog import OfflineError, explained
from dagster_prefs.offline.publish import (
    ATTEMPTS,
    DayFiles,
    day_files,
    day_of,
    discard,
    only,
    publish_day,
    read_file,
    token_of,
    write_day,
)
from dagster_prefs.offline.tables import (
    VIEWER,
    ErasedViewer,
    TileTable,
    arrow_schema,
    ensure_table,
    exact_sums,
)
from dagster_prefs.offline.tiles import Fingerprint, TileSnapshot, TilesUnreadable, tile_snapshot
from dagster_prefs.online.contract import LAST_EVENT_AT

DEFAULT_NAMESPACE = "training"

VERIFIED_PREFIX = "verified-"

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


def export_day(
    engine: EngineConnection,
    catalog: Catalog,
    spec: TileTable,
    day: date,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    allow_loss: bool = False,
    forgetting: ErasedViewer | None = None,
) -> ExportReport:
    """Make the table hold exactly the engine's tiles of `day` (UTC), canaries left out.

    A day of which the engine holds fewer rows or a smaller total than the table has left its retention, because
    late events only ever add: what the table holds of it stays. `allow_loss=True` exports it all the same, for
    someone who knows why it shrank. Rows of the viewer who is `forgetting` are no loss. Rows of an erased viewer
    are never exported: neither from views that do not know of the erasure yet, nor by an export that had read
    them before it.

    Safe to run again, and several times at once. Raises AuditFailed (naming the branch that keeps the data),
    TilesUnreadable, EngineUnavailable, ExportConflict, or another OfflineError; readers then see what they
    saw.
    """
    started = time.monotonic()
    name = f"{namespace}.{spec.name}"
    for attempt in range(1, ATTEMPTS + 1):
        table = ensure_table(catalog, namespace, spec)
        with explained(f"the table {name}"):
            outcome = _attempt(engine, table, spec, day, allow_loss, forgetting)
        if outcome is None:
            continue
        status, table, fingerprint, reason = outcome
        with explained(f"the table {name}"):
            held = day_files(table, spec, day)
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


@dataclass(frozen=True)
class ExportedDay:
    """What a table holds of one day: `rows`, and the `token` of their fingerprint, None where nothing tells it."""

    token: str | None
    rows: int


def exported_days(
    catalog: Catalog, spec: TileTable, *, namespace: str = DEFAULT_NAMESPACE
) -> dict[date, ExportedDay]:
    """Every day that the table holds; none where there is no table.

    Files of our own carry the token in their names; days that a sink wrote carry it in the tag of their verification.
    """
    with explained(f"the table {namespace}.{spec.name}"):
        try:
            table = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            return {}
        files: dict[date, list[DataFile]] = {}
        for task in table.scan().plan_files():
            files.setdefault(day_of(task.file), []).append(task.file)
    tags = [name.removeprefix(VERIFIED_PREFIX) for name in table.refs() if name.startswith(VERIFIED_PREFIX)]
    verified = {date.fromisoformat(tag[:10]): tag[11:] for tag in tags}
    return {
        day: ExportedDay(
            only({token_of(file) for file in found}) or verified.get(day),
            sum(file.record_count for file in found),
        )
        for day, found in files.items()
    }


def stale_days(
    engine: EngineConnection,
    spec: TileTable,
    exported: Mapping[date, ExportedDay],
    *,
    until: date | None = None,
    by_sink: bool = False,
) -> dict[date, str]:
    """Day → fingerprint token in the engine, of days that `exported` lacks or has in another version.

    Oldest first. Days from `until` on are left out, and so are days of which the engine holds fewer rows than
    the table, because they are leaving its retention. Where a sink writes the table (`by_sink`), such a surplus
    is its mistake and stale, even after the day was verified; a day that was never verified and that the engine
    has nothing of has the token "".
    """
    with tile_snapshot(engine, spec) as tiles:
        wanted = tiles.fingerprints()
    nothing = ExportedDay(None, 0)
    stale = {day for day, found in wanted.items() if exported.get(day, nothing).token != found.token}
    surplus = {day for day, found in wanted.items() if exported.get(day, nothing).rows > found.row_count}
    if by_sink:
        stale |= surplus | {day for day, held in exported.items() if held.token is None and day not in wanted}
    else:
        stale -= surplus
    return {
        day: wanted[day].token if day in wanted else ""
        for day in sorted(stale)
        if until is None or day < until
    }


def verified_tag(day: date, token: str) -> str:
    """Name of the tag that says: in this snapshot the day was exactly what this fingerprint stands for."""
    return f"{VERIFIED_PREFIX}{day.isoformat()}-{token}"


def _attempt(
    engine: EngineConnection,
    table: Table,
    spec: TileTable,
    day: date,
    allow_loss: bool,
    forgetting: ErasedViewer | None,
) -> tuple[Status, Table, str | None, str] | None:
    """One try from a fresh table; None means that another writer changed the day meanwhile."""
    held = day_files(table, spec, day)
    token = only({token_of(file) for file in held})
    with tile_snapshot(engine, spec) as tiles:
        fingerprint = tiles.fingerprint(day)
        if fingerprint is None:
            if held:
                return "retained", table, token, "the engine holds nothing of this day any more"
            return "empty", table, None, ""
        if fingerprint.token == token:
            return "unchanged", table, token, ""
        less = _loss(table, spec, held, fingerprint, forgetting) if held and not allow_loss else ""
        if less:
            return "retained", table, token, less
        erasures = tiles.erasures()
        forgotten = tiles.erased_rows(day)
        if forgotten:
            raise TilesUnreadable(
                f"{spec.tile} of {day} still has {forgotten} rows of erased viewers: the views have not read "
                "the erasure; run `prefs refresh`, then export again"
            )
        written = _write(tiles, table, spec, day, fingerprint)

    def no_erasure_since() -> bool:
        with tile_snapshot(engine, spec) as now:
            return now.erasures() == erasures

    published = publish_day(
        table, spec, day, written, {file.file_path for file in held}, still_valid=no_erasure_since
    )
    if published is None:
        discard(table, written)
        return None
    return "written", published, fingerprint.token, ""


def _loss(
    table: Table,
    spec: TileTable,
    held: list[DataFile],
    fingerprint: Fingerprint,
    forgetting: ErasedViewer | None,
) -> str:
    rows = sum(file.record_count for file in held)
    metric = list(spec.metric)
    erased = Decimal(0)
    if forgetting is not None:
        for file in held:
            for batch in read_file(table, file, [VIEWER, LAST_EVENT_AT, *metric]):
                going = batch.filter(forgetting.rows_of(batch))
                rows -= going.num_rows
                erased += sum(exact_sums([going], metric).values())
    if fingerprint.row_count < rows:
        return f"the engine holds {fingerprint.row_count} rows of this day, the table {rows}"
    sums = exact_sums((batch for file in held for batch in read_file(table, file, metric)), metric)
    total = sum(sums.values()) - erased
    if fingerprint.metric_total < total:
        name = " + ".join(metric)
        return f"the engine's total of {name} of this day is {fingerprint.metric_total}, the table's {total}"
    return ""


def _write(
    tiles: TileSnapshot, table: Table, spec: TileTable, day: date, fingerprint: Fingerprint
) -> DayFiles:
    written = DayFiles(
        token=fingerprint.token,
        rows=fingerprint.row_count,
        totals={},
        properties={"prefs.operation": "export", **fingerprint.properties()},
    )
    with ThreadPoolExecutor(1, "totals") as beside, closing(tiles.rows(day, arrow_schema(table))) as batches:
        adding: list[Future[tuple[int, Mapping[str, Decimal]]]] = []

        def all_rows() -> Iterator[pa.RecordBatch]:
            yield from batches
            # The engine adds up while the rows are sorted and encoded here.
            adding.append(beside.submit(tiles.totals, day))

        write_day(table, spec, day, written, all_rows())
    try:
        rows, written.totals = adding[0].result()
        metric = sum((written.totals[name] for name in spec.metric), Decimal(0))
        if rows != fingerprint.row_count or metric != fingerprint.metric_total:
            raise TilesUnreadable(
                f"tile_fingerprints does not describe {spec.tile} of {day} ({fingerprint.row_count} rows against "
                f"{rows}): the views are being refreshed or were refreshed apart; run `dbt build`, then export again"
            )
    except BaseException:
        discard(table, written)
        raise
    return written
