"""Export of events to the lake: the hours of arrival that changed, each written, audited and published as a whole.

Which hours changed is seen by comparing each hour's fingerprint with that in the names of its files, without a clock or
a position: a message that became visible late, or was imported with an old time of arrival, changes its own hour.
Snapshots and offsets decide nothing, so neither the order of commits nor a gap can lose or double a row.

What the lake holds of an hour and the engine no longer does stays: bytes leave the engine by retention, and a parsed
relation that was built anew holds only what was left of them. A delivery is its place; of one that both hold, the
engine's is newer.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, cast

import duckdb
import psycopg
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.expressions import And, GreaterThanOrEqual, LessThan, LessThanOrEqual
from pyiceberg.table import Table

from dagster_prefs.declarations.names import REDACTED
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.audit import AuditFailed, Staged, StagedDay, total_findings
from dagster_prefs.iceberg.catalog import OfflineError, conflicts_named, translated
from dagster_prefs.iceberg.duck import SORTING, duck_session, quoted, registered
from dagster_prefs.iceberg.event_reader import complete_until_of
from dagster_prefs.iceberg.event_sink import check_sink, note_complete, offsets_in
from dagster_prefs.iceberg.event_source import (
    PEOPLE,
    SUPPRESSED,
    VALID,
    EventSource,
    HourPrint,
    arrived_until,
    event_source,
)
from dagster_prefs.iceberg.event_tables import (
    COMPLETE_FROM,
    DATA,
    DAY,
    OFFSET,
    PLACE,
    REJECTED,
    EventTable,
    TopicTables,
)
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE, ExportConflict, first_of
from dagster_prefs.iceberg.files import LayoutForeign, LiveFile, live_files, parts_of, read_rows
from dagster_prefs.iceberg.publish import (
    ATTEMPTS,
    ROWS_PER_GROUP,
    DayChange,
    DayFiles,
    discard,
    publish_changes,
    write_groups,
)
from dagster_prefs.iceberg.tables import arrow_schema, ensure_layout

# The bounds of a commit, as for tiles. Memory does not depend on them: one hour at a time is sorted, on disk if needed.
HOURS_PER_COMMIT = 100
ROWS_PER_COMMIT = 5_000_000

# <hour>-<fingerprint of the hour>-<id of the write>-<rows of the write>-<number of the file>.parquet
_FILE_NAME = re.compile(
    r"/(?P<hour>\d{10})-(?P<token>[0-9a-f]{16})-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-\d+-\d{5,}\.parquet$"
)


class HoursFailed(OfflineError):
    """Hours of events could not be exported and stay as they are, while others were; the message names them."""

    def __init__(self, hours: Mapping[tuple[str, datetime], str]) -> None:
        named = [f"{topic} from {hour.isoformat()}: {what}" for (topic, hour), what in sorted(hours.items())]
        super().__init__(
            f"{len(named)} hours of events were not exported and stay as they are, every other hour was exported "
            f"({first_of(named)})"
        )


@dataclass
class EventsReport:
    """The outcome of the export of one topic.

    `hours` of arrival were written, in which the tables now hold `raw_rows` and `typed_rows`. Of `lost` messages the
    bytes had left the engine before they were exported; `left` messages have left it now, by retention. `failed` hours
    stay as they were, each with the reason. `complete_until` (UTC) is the instant up to which the tables hold all that
    arrived, None if it is not known.

    Where RisingWave's sink writes the raw table, `raw_rows` are 0, `waiting` messages are not in the lake yet, of
    `repeated` ones a second copy was removed from it, and `redacted` ones of erased subjects lost their content.
    """

    topic: str
    hours: int = 0
    raw_rows: int = 0
    typed_rows: int = 0
    lost: int = 0
    left: int = 0
    waiting: int = 0
    repeated: int = 0
    redacted: int = 0
    failed: dict[datetime, str] = field(default_factory=dict)
    complete_until: datetime | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            **vars(self),
            "failed": {hour.isoformat(): why for hour, why in self.failed.items()},
            "complete_until": None if self.complete_until is None else self.complete_until.isoformat(),
        }


@dataclass(frozen=True)
class EventHours:
    """The hours of a table of events: its files by hour, and the audit of staged ones."""

    def files(
        self, table: Table, *, first: date, last: date, snapshot_id: int | None = None
    ) -> dict[datetime, list[LiveFile]]:
        """Return the files of the hours from `first` to `last`, without those of other writers."""
        days = And(
            GreaterThanOrEqual(term=DAY, value=_day(first)), LessThanOrEqual(term=DAY, value=_day(last))
        )
        found, _ = split_by_hour(live_files(table, days, snapshot_id))
        return {hour: files for hour, files in found.items() if _hour(first) <= hour <= _hour(last)}

    def audit(self, table: Table, staged: Staged, known: Container[date]) -> dict[date, AuditFailed]:
        """Read the offsets of the staged hours back, and compare their number and sum with the engine's."""
        found = self.files(
            table, first=min(staged.days), last=max(staged.days), snapshot_id=staged.snapshot_id
        )
        findings: dict[date, list[str]] = {}
        for hour, one in staged.days.items():
            if parts_of(found.get(_hour(hour), [])) != set(one.paths):
                findings[hour] = ["the branch does not have the files that were written"]
        if not findings and (other := total_findings(table, staged)):
            findings = dict.fromkeys(staged.days, other)
        for hour, one in staged.days.items():
            if hour not in findings and hour not in known and (wrong := self._rows_wrong(table, one)):
                findings[hour] = wrong
        return {
            hour: AuditFailed(
                f"the audit of {'.'.join(table.name())} of {hour.isoformat()} failed ({'; '.join(wrong)}): readers "
                f"still see the previous rows: look at branch {staged.branch}, and run the export again",
                staged.branch,
            )
            for hour, wrong in findings.items()
        }

    def _rows_wrong(self, table: Table, one: StagedDay) -> list[str]:
        rows, offsets = offsets_in(table, one.paths)
        if (rows, offsets) == (one.rows, one.totals[OFFSET]):
            return []
        return [
            f"{rows} rows with offsets of {offsets} in all, {one.rows} with {one.totals[OFFSET]} were due"
        ]


HOURS = EventHours()


def files_by_hour(table: Table, files: Sequence[LiveFile]) -> dict[datetime, list[LiveFile]]:
    """Group files of a table of events by their hour (UTC). Raises LayoutForeign for another writer's files."""
    hours, others = split_by_hour(files)
    if others:
        raise LayoutForeign(
            f"{'.'.join(table.name())}: {others[0].path} is not of this export, which alone writes tables of events: "
            "if RisingWave's sink wrote it, keep PREFS_EXPORT=sink and PREFS_RAW_RETENTION_SECONDS, or set "
            "PREFS_ICEBERG_NAMESPACE to another one; else roll the table back to a snapshot without it"
        )
    return hours


def split_by_hour(files: Sequence[LiveFile]) -> tuple[dict[datetime, list[LiveFile]], list[LiveFile]]:
    """Group the files of this export by their hour (UTC), and list those that another writer added."""
    hours: dict[datetime, list[LiveFile]] = {}
    others: list[LiveFile] = []
    for file in files:
        found = _FILE_NAME.search(file.path)
        if found is None:
            others.append(file)
        else:
            hour = datetime.strptime(found["hour"], "%Y%m%d%H").replace(tzinfo=UTC)
            hours.setdefault(hour, []).append(file)
    return hours, others


def is_outdated(files: Sequence[LiveFile], rows: int, token: str) -> bool:
    """Return whether the files of an hour are not those of an hour with so many rows and this fingerprint."""
    if not files:
        return rows > 0
    names = [_FILE_NAME.search(file.path) for file in files]
    return any(name is None or name["token"] != token for name in names) or any(
        file.deletes or file.equality_deletes for file in files
    )


def token_prefix(hour: datetime, token: str) -> str:
    """Return how the names of an hour's files begin."""
    return f"{hour:%Y%m%d%H}-{token}"


@dataclass(frozen=True)
class TopicExport:
    """The export of one topic to its tables.

    `subject_kind` is the name under which erasures of its subjects are recorded, None if there are none. `unread`
    returns the earliest arrival of messages that the parsed relation has not read yet, None if there are none. Days of
    arrival before the last `kept` ones are removed from the tables; None keeps all. `raw_by_sink` says that
    RisingWave's sink writes the raw table, which is then checked and put right.
    """

    engine: EngineConfiguration
    catalog: Callable[[], Catalog]
    tables: TopicTables
    subject_kind: str | None
    unread: Callable[[], datetime | None]
    namespace: str = DEFAULT_NAMESPACE
    kept: timedelta | None = None
    raw_by_sink: bool = False

    def run(self, now: datetime) -> EventsReport:
        """Make the tables hold what arrived, and note until when they are complete; `now` is UTC.

        An hour that fails its audit is left out and reported, with all others exported. Idempotent, and safe to run
        several times at once. Raises NotDeployed, EngineUnavailable, or another OfflineError, if engine, catalog or
        storage fail as a whole.
        """
        started = time.monotonic()
        report = EventsReport(self.tables.typed.topic.name)
        catalog = self.catalog()
        raw, typed = (ensure_layout(catalog, self.namespace, spec.layout) for spec in self.tables.both)
        first = _first_kept(now, self.kept)
        # Before anything is read: what becomes visible later arrived later.
        until = arrived_until(self.engine, self.tables.typed)
        waiting = self.unread()
        with translated(f"the tables of events of {report.topic}"):
            self._export(raw, typed, first, report)
            if first is not None:
                for table in (raw, typed):
                    _remove_before(table, first)
            if until is not None and waiting is not None:
                until = min(until, waiting - timedelta(microseconds=1))
            if self.raw_by_sink:
                self._check_raw(raw, first, until, report)
            for table in (typed,) if self.raw_by_sink else (raw, typed):
                if until is not None and not report.failed:
                    note_complete(table, until)
            known = [complete_until_of(table) for table in (raw, typed)]
        report.complete_until = None if None in known else min(one for one in known if one is not None)
        report.seconds = time.monotonic() - started
        return report

    def _check_raw(
        self, raw: Table, first: date | None, until: datetime | None, report: EventsReport
    ) -> None:
        with event_source(self.engine, self.tables.typed, self.subject_kind) as source:
            state = check_sink(raw, self.tables.raw, source, first)
        report.waiting, report.lost = state.waiting, state.lost
        report.repeated, report.redacted = state.repeated, state.redacted
        if until is not None:
            if state.waiting_since is not None:
                until = min(until, state.waiting_since - timedelta(microseconds=1))
            note_complete(raw, until, state.sequence)

    def exported_hours(self) -> Callable[[psycopg.Connection[Any], datetime], bool]:
        """Return a function that says whether the lake holds what a connection sees of an hour of arrival.

        As the tables are now. Raises OfflineError.
        """
        catalog = self.catalog()
        held = []
        with translated(f"the tables of events of {self.tables.typed.topic.name}"):
            for spec in self.tables.both:
                table = catalog.load_table(spec.identifier(self.namespace))
                held.append(files_by_hour(table, live_files(table)))

        def is_exported(connection: psycopg.Connection[Any], hour: datetime) -> bool:
            source = EventSource(connection, self.engine, self.tables.typed, self.subject_kind)
            found = source.hours(hour, hour).get(hour)
            return found is not None and not any(
                is_outdated(files.get(hour, []), rows, found.token)
                for files, rows in zip(held, (found.rows, found.typed_rows), strict=True)
            )

        return is_exported

    def _export(self, raw: Table, typed: Table, first: date | None, report: EventsReport) -> None:
        attempts: Counter[datetime] = Counter()
        left: set[datetime] | None = None
        while left is None or left:
            with (
                event_source(self.engine, self.tables.typed, self.subject_kind) as source,
                duck_session(*SORTING) as session,
            ):
                raw.refresh()
                typed.refresh()
                # Hours that become stale meanwhile are the next export's, or this one might never end.
                chunk = sorted(left)[:HOURS_PER_COMMIT] if left is not None else []
                prints = source.hours(chunk[0], chunk[-1]) if chunk else source.hours()
                work = _Work(source, session, None if self.raw_by_sink else raw, typed, self.tables, prints)
                stale = [hour for hour in work.stale() if first is None or hour.date() >= first]
                if left is None:
                    left = set(stale)
                else:
                    left -= set(chunk) - set(stale)
                taken: list[datetime] = []
                try:
                    for hour in [hour for hour in stale if hour in left][:HOURS_PER_COMMIT]:
                        if work.rows >= ROWS_PER_COMMIT:
                            break
                        attempts[hour] += 1
                        work.write(hour)
                        taken.append(hour)
                except BaseException:
                    work.discard()
                    raise
                erasures = source.erasures()
            published = self._publish(work, erasures, report)
            for hour in taken:
                if hour in published:
                    report.hours += 1
                    report.raw_rows += work.raw_rows[hour]
                    report.typed_rows += work.typed_rows[hour]
                    report.lost += work.lost[hour]
                    left.discard(hour)
                elif hour in report.failed:
                    left.discard(hour)
                elif attempts[hour] >= ATTEMPTS:
                    raise ExportConflict(
                        f"the events of {report.topic} that arrived from {hour.isoformat()} on were replaced by others "
                        f"{ATTEMPTS} times: find out which other exports or erasures run, and run it again"
                    )

    def _publish(
        self, work: _Work, erasures: tuple[int, datetime | None], report: EventsReport
    ) -> set[datetime]:
        """Publish what was written, and return the hours that both tables now hold."""

        def no_erasure_since() -> bool:
            with event_source(self.engine, self.tables.typed, self.subject_kind) as now:
                redacted = now.redacted(min(work.typed_rows), max(work.typed_rows))
                return now.erasures() == erasures and all(
                    redacted.get(hour, 0) == work.prints[hour].redacted for hour in work.typed_rows
                )

        missing: set[datetime] = set()
        for table, changes in work.changes:
            done = publish_changes(table, HOURS, changes, still_valid=no_erasure_since)
            report.failed |= {_hour(hour): str(error) for hour, error in done.failed.items()}
            missing |= {_hour(change.day) for change in changes} - {_hour(hour) for hour in done.published}
        return set(work.typed_rows) - missing


class _Work:
    """The hours that one commit of each table changes. `raw` is None where RisingWave's sink writes it."""

    def __init__(
        self,
        source: EventSource,
        session: duckdb.DuckDBPyConnection,
        raw: Table | None,
        typed: Table,
        tables: TopicTables,
        prints: Mapping[datetime, HourPrint],
    ) -> None:
        self.source = source
        self.session = session
        self.raw = raw
        self.typed = typed
        self.tables = tables
        self.prints = prints
        self.rows = 0
        self.raw_changes: list[DayChange] = []
        self.typed_changes: list[DayChange] = []
        self.raw_rows: dict[datetime, int] = {}
        self.typed_rows: dict[datetime, int] = {}
        self.lost: dict[datetime, int] = {}
        self._held_raw = {} if raw is None else files_by_hour(raw, live_files(raw))
        self._held_typed = files_by_hour(typed, live_files(typed))
        oldest = None if raw is None else source.oldest_raw()
        # What has left the raw table altogether, as retention takes it, is in the lake or nowhere.
        self._raw_from = _hour(oldest) if oldest else datetime.max.replace(tzinfo=UTC)

    def stale(self) -> list[datetime]:
        """Return the hours, oldest first, of which a table holds other rows than the engine."""
        return [
            hour
            for hour, found in self.prints.items()
            if is_outdated(self._held_typed.get(hour, []), found.typed_rows, found.token)
            or (hour >= self._raw_from and is_outdated(self._held_raw.get(hour, []), found.rows, found.token))
        ]

    def write(self, hour: datetime) -> None:
        """Write the files of an hour. Raises OfflineError, with what was written discarded."""
        arriving = self.source.rows(hour, with_bytes=self.raw is not None)
        with registered(self.session, "arriving", self.source.schema, arriving):
            self.session.execute("create or replace table engine as from arriving")
        found = self.prints[hour]
        place = ", ".join(PLACE)
        self._check(found, place)
        self.lost[hour], self.raw_rows[hour] = 0, 0
        if self.raw is not None:
            self._write_raw(self.raw, hour, place)
        held = self._held_typed.get(hour, [])
        self._load("held_typed", self.typed, held)
        kept = f"held_typed anti join engine using ({place})"
        rows, offsets = self._counted(kept)
        typed = self._files(hour, found.typed_rows + rows, found.typed_offsets + offsets)
        if typed.rows or held:
            self._write(self.typed, (hour.date(),), typed, self._typed_query(hour, kept))
            self.typed_changes.append(DayChange(hour, typed, parts_of(held)))
        self.typed_rows[hour] = typed.rows
        self.rows += found.rows

    @property
    def changes(self) -> list[tuple[Table, list[DayChange]]]:
        """The tables with the changes of their hours."""
        raw = [] if self.raw is None else [(self.raw, self.raw_changes)]
        return [*raw, (self.typed, self.typed_changes)]

    def discard(self) -> None:
        """Remove the files of all hours."""
        for table, changes in self.changes:
            for change in changes:
                discard(table, change.written)

    def _write_raw(self, table: Table, hour: datetime, place: str) -> None:
        found, held = self.prints[hour], self._held_raw.get(hour, [])
        self._load("held_raw", table, held)
        self.lost[hour], _ = self._counted(f"engine anti join held_raw using ({place}) where {DATA} is null")
        kept = f"held_raw anti join (from engine where {DATA} is not null) as there using ({place})"
        rows, offsets = self._counted(kept)
        gone, gone_offsets = self._counted(f"engine where {DATA} is null")
        raw = self._files(hour, found.rows - gone + rows, found.offsets - gone_offsets + offsets)
        if hour >= self._raw_from and (raw.rows or held):
            for rejected in (False, True):
                query = self._raw_query(table, hour, rejected, kept)
                self._write(table, (hour.date(), rejected), raw, query)
            self.raw_changes.append(DayChange(hour, raw, parts_of(held)))
        self.raw_rows[hour] = raw.rows

    def _load(self, name: str, table: Table, files: Sequence[LiveFile]) -> None:
        schema = arrow_schema(table)
        rows = (batch.cast(schema) for file in files for batch in read_rows(table, file, schema.names))
        with registered(self.session, "arriving", schema, rows):
            self.session.execute(f"create or replace table {name} as from arriving")

    def _check(self, found: HourPrint, place: str) -> None:
        """Compare the rows that were read with the summary, which the engine computed on its own."""
        rows, offsets = self._counted("engine")
        [(twice,)] = self.session.execute(
            f"select count(*) from (select 1 from engine group by {place} having count(*) > 1)"
        ).fetchall()
        if (rows, offsets, twice) != (found.rows, found.offsets, 0):
            raise OfflineError(
                f"{self.tables.typed.topic.parsed} delivered {rows} rows of an hour, {twice} places of them more than "
                f"once, and counted {found.rows}: run the export again"
            )

    def _counted(self, what: str) -> tuple[int, int]:
        [(rows, offsets)] = self.session.execute(
            f"select count(*), coalesce(sum({OFFSET}), 0) from {what}"
        ).fetchall()
        return int(rows), int(offsets)

    def _files(self, hour: datetime, rows: int, offsets: int) -> DayFiles:
        return DayFiles(
            token=token_prefix(hour, self.prints[hour].token),
            rows=rows,
            totals={OFFSET: Decimal(offsets)},
            properties={"prefs.operation": "export", "prefs.row-count": str(rows)},
        )

    def _write(self, table: Table, partition: tuple[Any, ...], files: DayFiles, query: str) -> None:
        schema = arrow_schema(table)
        groups = (
            batch.cast(schema)
            for batch in self.session.sql(query).to_arrow_reader(ROWS_PER_GROUP)
            if batch.num_rows
        )
        with closing(groups):
            write_groups(table, partition, files, groups)

    def _raw_query(self, table: Table, hour: datetime, rejected: bool, kept: str) -> str:
        spec = self.tables.raw
        own = {field.name for field in spec.fields}
        columns = []
        for name in arrow_schema(table).names:
            if name == DAY:
                columns.append(f"date '{hour.date()}' as {DAY}")
            elif name == REJECTED:
                columns.append(f"({SUPPRESSED} or not {VALID}) as {REJECTED}")
            elif name in own or name == DATA:
                # A message that an erasure covers and has not reached yet leaves the engine without its content.
                empty = f"'{REDACTED.decode()}'::blob" if name == DATA else "null"
                columns.append(
                    f"case when {SUPPRESSED} then {empty} else {quoted(name)} end as {quoted(name)}"
                )
            else:
                columns.append(self._column(name))
        return self._sorted(
            spec, table, f"select {', '.join(columns)} from engine where {DATA} is not null", kept,
            f"{REJECTED} = {rejected}",
        )  # fmt: skip

    def _typed_query(self, hour: datetime, kept: str) -> str:
        columns = [
            f"date '{hour.date()}' as {DAY}" if name == DAY else self._column(name)
            for name in arrow_schema(self.typed).names
        ]
        return self._sorted(
            self.tables.typed, self.typed,
            f"select {', '.join(columns)} from engine where {VALID} and not {SUPPRESSED} and {PEOPLE}",
            kept, "true",
        )  # fmt: skip

    def _column(self, name: str) -> str:
        # A field that is not declared any more has a column for as long as the table exists.
        return quoted(name) if name in self.source.schema.names else f"null as {quoted(name)}"

    def _sorted(self, spec: EventTable, table: Table, rows: str, kept: str, condition: str) -> str:
        names = ", ".join(quoted(name) for name in arrow_schema(table).names)
        order = ", ".join(quoted(name) for name in (spec.key, *PLACE))
        return (
            f"select {names} from ({rows} union all by name select {names} from {kept})"
            f" where {condition} order by {order}"
        )


def _remove_before(table: Table, first: date) -> None:
    """Remove the hours before a day. Raises ExportConflict if other writers keep committing."""
    old = LessThan(term=DAY, value=first.isoformat())
    for _ in range(ATTEMPTS):
        table.refresh()
        if not live_files(table, old):
            return
        with suppress(CommitFailedException), conflicts_named(), table.transaction() as change:
            change.delete(old, snapshot_properties={"prefs.operation": "retention"})
            change.set_properties({COMPLETE_FROM: first.isoformat()})
    if live_files(table, old):
        raise ExportConflict(
            f"{'.'.join(table.name())} was changed by others {ATTEMPTS} times while its hours before {first} were "
            "removed: find out which exports or maintenance run, and run it again"
        )


def _first_kept(now: datetime, kept: timedelta | None) -> date | None:
    return None if kept is None else (now - kept).date()


def _hour(moment: date) -> datetime:
    """Return the start of the hour of a moment, UTC."""
    return cast("datetime", moment).astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _day(moment: date) -> str:
    return _hour(moment).date().isoformat()
