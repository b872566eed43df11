"""Export of days of tiles to Iceberg: write, audit, publish.

The rows of each day are written to files, committed to a branch of their own, audited there against the engine,
and then published by one commit that names the snapshot it replaces. A range of days shares these commits, up to
DAYS_PER_COMMIT and ROWS_PER_COMMIT, because every commit copies the table's growing metadata. Readers therefore
see either the old or the new day as a whole, whatever fails in between. A crash leaves an unused branch and
unreferenced files, which `maintenance` removes.

The names of a day's files contain its fingerprint. Snapshot properties carry it too, for people, but they
disappear when a snapshot expires and would be wrong after a rollback; the names of the current files are
always right. They also tell what another writer did to a day (`files.foreign_in`): an export never changes
such a day unless it is called with `replace_foreign`.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import OfflineError, Tables, translated
from dagster_prefs.iceberg.files import (
    UNTOUCHED,
    Foreign,
    LiveFile,
    RemovedDay,
    RowsUnreadable,
    count_rows,
    foreign_in,
    only_token,
    own_files,
    parts_of,
    read_file,
    removed_days,
    tile_files,
    token_of,
)
from dagster_prefs.iceberg.publish import ATTEMPTS, DayChange, DayFiles, discard, publish_days, write_day
from dagster_prefs.iceberg.tables import (
    ErasedSubject,
    TileTable,
    arrow_schema,
    counted_sums,
    ensure_table,
    exact_sums,
)
from dagster_prefs.iceberg.tiles import DayUnreadable, Fingerprint, TileSnapshot, tile_snapshot

DEFAULT_NAMESPACE = "training"

VERIFIED_PREFIX = "verified-"

SINK_BRANCH = "ingestion"
"""Where a copy-on-write sink commits, with deletes as files of their own; RisingWave's name for it."""

# The bounds of a commit. They limit what a crash or a lost race makes another run write again, the disk space of
# files that are not published yet, the time for which one snapshot of the engine is held, and the size of the
# snapshot's properties (some 250 bytes a day). Memory does not depend on them: one day at a time is read, in
# batches. A day with more rows has a commit of its own.
DAYS_PER_COMMIT = 100
ROWS_PER_COMMIT = 5_000_000

Status = Literal["written", "unchanged", "empty", "retained", "foreign", "restored", "failed"]


class ExportConflict(OfflineError):
    """Other writers kept replacing the table; nothing was published."""


# Reasons that an error quotes in full; the rest is named.
NAMED_REASONS = 3


def first_of(named: Sequence[str]) -> str:
    """Return the first texts in full, and the number of the others."""
    more = f"; and {len(named) - NAMED_REASONS} more" if len(named) > NAMED_REASONS else ""
    return "; ".join(named[:NAMED_REASONS]) + more


class ForeignRows(OfflineError):
    """Days that another writer changed were left unchanged; the message names days, files and remedy."""

    def __init__(self, days: Mapping[tuple[str, date], str]) -> None:
        named = [f"{table} of {day}: {what}" for (table, day), what in sorted(days.items())]
        super().__init__(
            f"{len(named)} exported days were changed by another writer and stay as they are "
            f"({first_of(named)}): find out who writes to these tables, then run `prefs export --replace-foreign`, "
            "which makes the days what this platform exports again"
        )


class DaysFailed(OfflineError):
    """Days could not be exported and stay as they are, while others were; the message names days and reasons."""

    def __init__(self, days: Mapping[tuple[str, date], str]) -> None:
        named = sorted(days.items())
        reasons = [f"{table} of {day}: {what}" for (table, day), what in named[:NAMED_REASONS]]
        rest = ", ".join(f"{table} of {day}" for (table, day), _ in named[NAMED_REASONS:])
        more = f"; and {rest}, with their reasons in the log of the run" if rest else ""
        super().__init__(
            f"{len(named)} days were not exported and stay as they are, every other day was exported "
            f"({'; '.join(reasons)}{more})"
        )


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export, all of which are off by default.

    `allow_loss` exports a day although the engine holds less of it than the table. `replace_foreign` reverts what
    another writer did to a day. `erasing` is a subject that is being erased, whose missing rows are therefore no loss.
    """

    allow_loss: bool = False
    replace_foreign: bool = False
    erasing: ErasedSubject | None = None


AS_IT_IS = ExportOptions()


@dataclass(frozen=True)
class ExportReport:
    """The outcome for one day.

    `status`: `written` (the day was replaced), `unchanged` (it already held exactly this), `empty` (neither
    the engine nor the table has rows of it), `retained` (the engine holds less than the table, so the table
    keeps its rows; `reason` says what is less), `foreign` (another writer changed the day, which is left
    unchanged; `reason` names the files), `restored` (another writer's changes were reverted; the engine no
    longer holds all of the day), `failed` (`error`, and as text `reason`, say why; the day stays as it was).
    `rows` (None where deletes of another engine cannot be read) and `bytes` are those of the day as the table now
    holds it; `snapshot_id` is the table's current snapshot, None for a table without one; `seconds` is the wall
    time of the commit that the day shares with others, from the first row read.
    """

    table: str
    day: date
    status: Status
    rows: int | None
    bytes: int
    files: int
    snapshot_id: int | None
    fingerprint: str | None
    seconds: float
    attempts: int = 1
    reason: str = ""
    error: OfflineError | None = None


def export_day(
    engine: EngineConfiguration,
    catalog: Catalog,
    spec: TileTable,
    day: date,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    options: ExportOptions = AS_IT_IS,
) -> ExportReport:
    """Export one day like `export_days`.

    Raises AuditFailed (naming the branch that keeps the data), TilesUnreadable, EngineUnavailable, ExportConflict,
    or another OfflineError; what readers see is then unchanged.
    """
    (report,) = export_days(engine, catalog, spec, [day], namespace=namespace, options=options)
    if report.error is not None:
        raise report.error
    return report


def export_days(
    engine: EngineConfiguration,
    catalog: Catalog,
    spec: TileTable,
    days: Iterable[date],
    *,
    namespace: str = DEFAULT_NAMESPACE,
    options: ExportOptions = AS_IT_IS,
) -> Iterator[ExportReport]:
    """Make the table hold exactly the engine's tiles of `days` (UTC), without canaries.

    Yields one report per day, as the commits that hold the days are made. A day that cannot be read, fails its audit,
    or is changed repeatedly by other writers is left out and reported as `failed`; the others are published.

    If the engine holds fewer rows or a smaller total of a day than the table, the day has left the engine's retention,
    because late events only ever add: the table keeps its rows. The option `allow_loss` exports the day anyway, for an
    operator who knows why it shrank. Rows of an erased subject are never exported: neither from views that do not
    reflect the erasure yet, nor by an export that read them before it.

    A day to which another writer added rows, or of which it deleted or replaced some, is left unchanged and reported as
    `foreign`. The option `replace_foreign` reverts that writer's changes: the day becomes what the engine holds, or, if
    that is less than this platform's last export of the day, that export again.

    Idempotent, and safe to run several times at once. Raises TilesUnreadable, EngineUnavailable, or another
    OfflineError, if engine, catalog or storage fail as a whole; days that were not reported are then unchanged.
    """
    name = f"{namespace}.{spec.name}"
    left = sorted(set(days))
    attempts: Counter[date] = Counter()
    while left:
        started = time.monotonic()
        table = ensure_table(catalog, namespace, spec)
        with translated(f"the table {name}"):
            outcomes = _Attempt(engine, table, spec, options).run(left, attempts)
            for day in left:
                if day not in outcomes and attempts[day] >= ATTEMPTS:
                    outcomes[day] = _Outcome("failed", error=_conflict(name, day))
            reports = _reports(table, spec, outcomes, time.monotonic() - started)
        left = [day for day in left if day not in outcomes]
        for report in reports:
            yield replace(report, attempts=max(1, attempts[report.day]))


def _conflict(name: str, day: date) -> ExportConflict:
    return ExportConflict(
        f"{name} of {day} was replaced by others {ATTEMPTS} times while it was exported: "
        "find out which other exports or maintenance run, and run it again"
    )


@dataclass(frozen=True)
class _Outcome:
    """The outcome of one attempt for a day."""

    status: Status
    token: str | None = None
    reason: str = ""
    error: OfflineError | None = None


def _reports(
    table: Table, spec: TileTable, outcomes: Mapping[date, _Outcome], seconds: float
) -> list[ExportReport]:
    """Report days as the table now holds them."""
    if not outcomes:
        return []
    snapshot = table.current_snapshot()
    held = tile_files(table, spec, first=min(outcomes), last=max(outcomes))
    reports = []
    for day, outcome in sorted(outcomes.items()):
        files = held.get(day, [])
        try:
            rows = count_rows(table, files)
        except RowsUnreadable:
            rows = None
        reports.append(
            ExportReport(
                table=".".join(table.name()),
                day=day,
                status=outcome.status,
                rows=rows,
                bytes=sum(file.data.file_size_in_bytes for file in files),
                files=len(files),
                snapshot_id=snapshot.snapshot_id if snapshot else None,
                fingerprint=outcome.token,
                seconds=seconds,
                reason=outcome.reason or str(outcome.error or ""),
                error=outcome.error,
            )
        )
    return reports


@dataclass(frozen=True)
class ExportedDay:
    """The content of a table for one day: `rows`, and the `token` of their fingerprint, None if it is not known.

    `foreign` describes another writer's changes to the day; its token is None then, and `rows` are those of its data
    files, deleted ones included. A day that such a writer `removed` is listed with the rows that it had.
    """

    token: str | None
    rows: int
    foreign: Foreign | RemovedDay = UNTOUCHED

    @property
    def removed(self) -> bool:
        """Whether the table no longer holds any row of the day."""
        return isinstance(self.foreign, RemovedDay)


def exported_days(
    catalog: Tables, spec: TileTable, *, namespace: str = DEFAULT_NAMESPACE
) -> dict[date, ExportedDay]:
    """Return every day that the table holds or another writer removed; empty if the table does not exist.

    The names of exported files carry the token; for days that a sink wrote, the tag of their verification
    does.
    """
    with translated(f"the table {namespace}.{spec.name}"):
        try:
            table = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            return {}
        tags = [
            name.removeprefix(VERIFIED_PREFIX) for name in table.refs() if name.startswith(VERIFIED_PREFIX)
        ]
        verified = {date.fromisoformat(tag[:10]): tag[11:] for tag in tags}
        days: dict[date, ExportedDay] = {}
        for day, files in tile_files(table, spec).items():
            foreign = foreign_of(table, files)
            if foreign:
                days[day] = ExportedDay(None, sum(file.data.record_count for file in files), foreign)
            else:
                days[day] = ExportedDay(only_token(files) or verified.get(day), count_rows(table, files))
        for day, removed in removed_days(table, spec, days).items():
            days[day] = ExportedDay(None, removed.rows, removed)
    return days


def foreign_days(
    exported: Mapping[date, ExportedDay], stale: Mapping[date, str]
) -> dict[date, Foreign | RemovedDay]:
    """Return the days, oldest first, that an export does not change without `replace_foreign`.

    Another writer changed them. A removed day of which the engine still holds everything (so that it is
    `stale`) is not among them: it is exported again.
    """
    return {
        day: exported[day].foreign
        for day in sorted(exported)
        if exported[day].foreign and not (exported[day].removed and day in stale)
    }


def foreign_of(table: Table, files: list[LiveFile]) -> Foreign:
    """Describe what another writer did to a day. The files of a RisingWave sink are not foreign."""
    by_sink = SINK_BRANCH in table.refs() or any(name.startswith(VERIFIED_PREFIX) for name in table.refs())
    if by_sink and not any(token_of(file.data) for file in files):
        return UNTOUCHED
    return foreign_in(files)


def stale_days(
    engine: EngineConfiguration,
    spec: TileTable,
    exported: Mapping[date, ExportedDay],
    *,
    until: date | None = None,
    by_sink: bool = False,
) -> dict[date, str]:
    """Return the days that `exported` lacks or holds in another version, with the engine's fingerprint token.

    Oldest first. Excludes days from `until` on, and days of which the engine holds fewer rows than the table,
    because they are leaving the engine's retention. Where a sink writes the table (`by_sink`), a surplus of
    rows is an error of the sink and stale, even after the day was verified; the token is "" for a day that
    was never verified and of which the engine has no rows.
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
    """Return the name of the tag that marks a snapshot in which the day matched this fingerprint exactly."""
    return f"{VERIFIED_PREFIX}{day.isoformat()}-{token}"


@dataclass(frozen=True)
class _Attempt:
    """One attempt to export days to a freshly loaded table, with one commit."""

    engine: EngineConfiguration
    table: Table
    spec: TileTable
    options: ExportOptions

    @cached_property
    def removed(self) -> dict[date, RemovedDay]:
        """The days, whether the table holds them again or not, that another writer removed."""
        return removed_days(self.table, self.spec, ())

    def run(self, days: Sequence[date], attempts: Counter[date]) -> dict[date, _Outcome]:
        """Export the first of `days`, as many as one commit may hold; counts an attempt for each.

        Returns the outcome of each day that is done with. Other days were not reached, or another writer changed
        them in the meantime.
        """
        outcomes: dict[date, _Outcome] = {}
        changes: list[DayChange] = []
        held = tile_files(self.table, self.spec, first=days[0], last=days[-1])
        erasures: list[tuple[int, datetime | None]] = []
        pending = deque(days)
        try:
            while pending and _room_for(changes):
                day = pending[0]
                try:
                    with tile_snapshot(self.engine, self.spec) as tiles:
                        fingerprints = tiles.fingerprints()
                        erasures.append(tiles.erasures())
                        while pending and _room_for(changes):
                            day = pending.popleft()
                            attempts[day] += 1
                            outcome, written = self._prepare(
                                tiles, day, fingerprints.get(day), held.get(day, [])
                            )
                            outcomes[day] = outcome
                            if written is not None:
                                changes.append(DayChange(day, written, parts_of(held.get(day, []))))
                except DayUnreadable as error:
                    # The engine's snapshot may have ended with the error: the next days are read from another one.
                    outcomes[day] = _Outcome("failed", error=error)
        except BaseException:
            for change in changes:
                discard(self.table, change.written)
            raise

        def no_erasure_since() -> bool:
            with tile_snapshot(self.engine, self.spec) as now:
                # Each snapshot of this attempt counts, the earliest included.
                return {now.erasures()} == set(erasures)

        done = publish_days(self.table, self.spec, changes, still_valid=no_erasure_since)
        for change in changes:
            if change.day in done.failed:
                outcomes[change.day] = _Outcome("failed", error=done.failed[change.day])
            elif change.day not in done.published:
                del outcomes[change.day]
        return outcomes

    def _prepare(
        self, tiles: TileSnapshot, day: date, fingerprint: Fingerprint | None, held: list[LiveFile]
    ) -> tuple[_Outcome, DayFiles | None]:
        """Decide what becomes of a day, and write its files if it changes. Raises DayUnreadable."""
        foreign: Foreign | RemovedDay | None = foreign_of(self.table, held) if held else self.removed.get(day)
        replace_foreign = self.options.replace_foreign
        if isinstance(foreign, Foreign) and foreign and not replace_foreign:
            return _Outcome("foreign", reason=str(foreign)), None
        token = None if foreign else only_token(held)
        own = own_files(self.table, self.spec, day) if foreign else []
        # The rows that the table must not lose. Another writer's changes do not count while the platform's
        # own files exist.
        due = own or [file.data for file in held]
        if fingerprint is None and not due and not foreign:
            return _Outcome("empty"), None
        if fingerprint is not None and fingerprint.token == token:
            return _Outcome("unchanged", token), None
        removed_rows = foreign.rows if isinstance(foreign, RemovedDay) else 0
        less = self._less(due, removed_rows, fingerprint)
        if foreign and less and not replace_foreign:
            return _Outcome("foreign", reason=f"{foreign}; {less}"), None
        if foreign and less and not own:
            remedy = "export it with allow_loss" if fingerprint else "remove it with the engine that wrote it"
            reason = f"{foreign}; {less}, and no snapshot holds its own export any more: {remedy}"
            return _Outcome("foreign", reason=reason), None
        if not foreign and less:
            return _Outcome("retained", token, less), None
        written = (
            self._restore(tiles, day, own)
            if less or not fingerprint
            else self._export(tiles, day, fingerprint)
        )
        return _Outcome(
            "restored" if less else "written", written.token, f"{foreign}; {less}" if less else ""
        ), written

    def _export(self, tiles: TileSnapshot, day: date, fingerprint: Fingerprint) -> DayFiles:
        """Write the engine's rows of the day."""
        forgotten = tiles.erased_rows(day)
        if forgotten:
            raise DayUnreadable(
                f"{self.spec.tile} of {day} still has {forgotten} rows of erased subjects: the views have not "
                "read the erasure; run `prefs refresh`, then export again"
            )
        return _write(tiles, self.table, self.spec, day, fingerprint)

    def _restore(self, tiles: TileSnapshot, day: date, own: list[DataFile]) -> DayFiles:
        """Write the rows of the last own export of the day again, without subjects that were erased since."""
        erased = tiles.erased_subjects()
        schema = arrow_schema(self.table)

        def rows() -> Iterator[pa.RecordBatch]:
            for file in own:
                for batch in read_file(self.table, file, schema.names):
                    for subject in erased:
                        batch = batch.filter(pc.invert(subject.rows_of(batch)))
                    yield batch.cast(schema)

        count, totals = counted_sums(rows(), self.spec.totals)
        complete = count == sum(file.record_count for file in own)
        written = DayFiles(
            # Without an erased subject's rows, the day no longer matches the fingerprint in its files' names.
            token=(token_of(own[0]) if complete else None) or uuid.uuid4().hex[:16],
            rows=count,
            totals=totals,
            properties={"prefs.operation": "restore"},
        )
        write_day(self.table, self.spec, day, written, rows())
        return written

    def _less(self, due: list[DataFile], removed_rows: int, fingerprint: Fingerprint | None) -> str:
        """Describe what the engine has less of than the table; empty if nothing, or if a loss is allowed.

        The table's rows of the day are those of the files that are `due`, or, if none is left, the
        `removed_rows`.
        """
        if fingerprint is None:
            return "the engine no longer has rows of this day"
        if self.options.allow_loss:
            return ""
        if due:
            return self._loss(due, fingerprint)
        lost = fingerprint.row_count < removed_rows
        return f"the engine has {fingerprint.row_count} rows of this day" if lost else ""

    def _loss(self, due: list[DataFile], fingerprint: Fingerprint) -> str:
        rows = sum(file.record_count for file in due)
        metric = list(self.spec.metric)
        erased = Decimal(0)
        erasing = self.options.erasing
        if erasing is not None:
            for file in due:
                for batch in read_file(self.table, file, [self.spec.subject, LAST_EVENT_AT, *metric]):
                    going = batch.filter(erasing.rows_of(batch))
                    rows -= going.num_rows
                    erased += sum(exact_sums([going], metric).values())
        if fingerprint.row_count < rows:
            return f"the engine has {fingerprint.row_count} rows of this day, the table {rows}"
        sums = exact_sums((batch for file in due for batch in read_file(self.table, file, metric)), metric)
        total = sum(sums.values()) - erased
        if fingerprint.metric_total < total:
            name = " + ".join(metric)
            return (
                f"the engine's total of {name} of this day is {fingerprint.metric_total}, the table's {total}"
            )
        return ""


def _room_for(changes: Sequence[DayChange]) -> bool:
    """Return whether the commit of these changes may hold another day."""
    rows = sum(change.written.rows for change in changes)
    return len(changes) < DAYS_PER_COMMIT and rows < ROWS_PER_COMMIT


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
            # The engine computes the totals while the rows are sorted and encoded here.
            adding.append(beside.submit(tiles.totals, day))

        write_day(table, spec, day, written, all_rows())
    try:
        rows, written.totals = adding[0].result()
        metric = sum((written.totals[name] for name in spec.metric), Decimal(0))
        if rows != fingerprint.row_count or metric != fingerprint.metric_total:
            raise DayUnreadable(
                f"tile_fingerprints does not describe {spec.tile} of {day} ({fingerprint.row_count} rows against "
                f"{rows}): the views are being refreshed, or were not refreshed together: run `dbt "
                "build`, then export again"
            )
    except BaseException:
        discard(table, written)
        raise
    return written
