"""Raw messages that RisingWave's own sink appends to the lake: what is complete, and what is put right.

The names of a sink's files tell neither hour nor fingerprint, and one file may hold many hours. So rows are compared
with the engine by place and arrival, in the hours that a new file reaches and in those that were not complete before.

A sink that was created again appends every message again, and no sink knows of erasures. The files with such rows are
written again here: without second copies, and without the content of erased subjects.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.conversions import from_bytes
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table
from pyiceberg.types import TimestamptzType

from dagster_prefs.iceberg import FILE_BYTES
from dagster_prefs.iceberg.catalog import OfflineError, conflicts_named
from dagster_prefs.iceberg.duck import SORTING, duck_session, registered, sort_batches
from dagster_prefs.iceberg.event_reader import complete_until_of
from dagster_prefs.iceberg.event_source import IN_RAW, EventSource, HourPrint
from dagster_prefs.iceberg.event_tables import (
    ARRIVED,
    COMPLETE_SNAPSHOT,
    COMPLETE_UNTIL,
    DAY,
    OFFSET,
    PLACE,
    REJECTED,
    VERIFIED_SEQUENCE,
    EventTable,
    emptied,
)
from dagster_prefs.iceberg.export import ExportConflict
from dagster_prefs.iceberg.files import LiveFile, live_files, read_rows
from dagster_prefs.iceberg.publish import (
    ATTEMPTS,
    ROWS_PER_GROUP,
    DayFiles,
    discard,
    ensure_head,
    write_groups,
)
from dagster_prefs.iceberg.tables import arrow_schema, counted_sums

# A sink commits a file for each minute, writer and partition; an hour of fewer files is left as it is.
MERGED_FROM = 8

_EPOCH = date(1970, 1, 1)
_HOUR_SECONDS, _HOUR_MICROSECONDS = 3600, 3_600_000_000
_HELD = pa.schema(
    [
        ("file", pa.int32()),
        ("sequence", pa.int64()),
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_partition", pa.int32()),
        ("source_offset", pa.int64()),
        ("arrived", pa.int64()),
        ("rejected", pa.bool_()),
        ("subject", pa.string()),
        ("moment", pa.int64()),
    ]
)
_ERASED = pa.schema([("subject", pa.string()), ("until", pa.int64())])
_DELIVERY = ", ".join((*PLACE, "arrived"))

# Returns the rows of a file that replace a batch of its rows; the number is that of the batch's first row in the file.
Transform = Callable[[LiveFile, pa.RecordBatch, int], pa.RecordBatch]


@dataclass
class SinkState:
    """What a sink has written of what the engine holds.

    `waiting` messages are in the raw table and not in the lake yet, the first of which arrived at `waiting_since`
    (UTC). `lost` ones have left the raw table, and are not in the lake. Of `repeated` messages a second copy was
    removed from the lake; `redacted` ones are of erased subjects. `sequence` is that of the newest commit that was
    checked.
    """

    waiting: int = 0
    waiting_since: datetime | None = None
    lost: int = 0
    repeated: int = 0
    redacted: int = 0
    sequence: int = 0


def check_sink(table: Table, spec: EventTable, source: EventSource, first: date | None) -> SinkState:
    """Compare what a sink has written to a raw table with the engine, and put it right.

    Reads the files that reach an hour which may have changed since the last check. Days of arrival before `first` are
    left out. Raises ExportConflict if other writers keep replacing the same files, or another OfflineError.
    """
    return _Check(table, spec, source, first).run()


def note_complete(table: Table, until: datetime, checked: int | None = None) -> None:
    """Note that a table of events is complete until then, unless it already is until later.

    `checked` is the sequence number of the newest commit of a sink that was compared with the engine.
    """
    for _ in range(ATTEMPTS):
        table.refresh()
        known = complete_until_of(table)
        if checked is None and known is not None and known >= until:
            return
        with suppress(CommitFailedException):
            snapshot = ensure_head(table)
            properties = {
                COMPLETE_UNTIL: max(until, known or until).isoformat(),
                COMPLETE_SNAPSHOT: str(snapshot.snapshot_id),
            }
            if checked is not None:
                properties[VERIFIED_SEQUENCE] = str(checked)
            with table.transaction() as change:
                change.set_properties(properties)
            return


def merge_files(table: Table, files: Sequence[LiveFile]) -> tuple[date, ...]:
    """Merge the small ones of a sink's files by the hour in which they begin, where the table is complete.

    Returns the days that changed. Raises ExportConflict, or another OfflineError.
    """
    known = complete_until_of(table)
    small: dict[int, list[LiveFile]] = defaultdict(list)
    for file in files:
        hours = hours_of(table, file)
        if known is not None and max(hours) < _number(known) and file.data.file_size_in_bytes < FILE_BYTES:
            small[min(hours)].append(file)
    return tuple(
        sorted(
            {
                _start(hour).date()
                for hour, group in small.items()
                if len(group) >= MERGED_FROM
                and replace_files(table, [group], lambda _file, batch, _first: batch, "compact")
            }
        )
    )


def replace_files(
    table: Table, groups: Sequence[Sequence[LiveFile]], transform: Transform, operation: str
) -> bool:
    """Write files of a raw table again, with what `transform` makes of their rows, and commit all of them at once.

    A group of files of one day becomes one file for each of the partitions of that day. Commits of the sink meanwhile
    are kept. Returns False if another writer replaced one of the files. Raises ExportConflict, or another OfflineError,
    with what was written removed.
    """
    files = [file for group in groups for file in group]
    written: list[DayFiles] = []
    try:
        for group in groups:
            written.append(_write_again(table, group, transform, operation))
    except BaseException:
        _discard(table, written)
        raise
    going = {file.path for file in files}
    for _ in range(ATTEMPTS):
        table.refresh()
        if not going <= {file.path for file in live_files(table)}:
            _discard(table, written)
            return False
        transaction = table.transaction()
        snapshot = transaction.update_snapshot(snapshot_properties={"prefs.operation": operation}).overwrite()
        for file in files:
            snapshot.delete_data_file(file.data)
        for one in written:
            for new in one.files:
                snapshot.append_data_file(new)
        try:
            with conflicts_named():
                snapshot.commit()
                transaction.commit_transaction()
            return True
        except CommitFailedException:
            continue
    _discard(table, written)
    raise ExportConflict(
        f"{'.'.join(table.name())} was changed by others {ATTEMPTS} times while {len(files)} of its files were "
        "replaced: find out which writers run beside RisingWave's sink, and run it again"
    )


def offsets_in(table: Table, paths: Iterable[str]) -> tuple[int, Any]:
    """Read files back: the number of their rows, and the sum of the offsets in them."""

    def offsets() -> Iterator[pa.RecordBatch]:
        for path in paths:
            with table.io.new_input(path).open() as source, pq.ParquetFile(source) as parquet:
                yield from parquet.iter_batches(columns=[OFFSET])

    rows, sums = counted_sums(offsets(), [OFFSET])
    return rows, sums[OFFSET]


@dataclass
class _Check:
    table: Table
    spec: EventTable
    source: EventSource
    first: date | None
    state: SinkState = field(default_factory=SinkState)

    def run(self) -> SinkState:
        self.table.refresh()
        head = self.table.current_snapshot()
        self.state.sequence = (head.sequence_number or 0) if head else 0
        files: dict[date, list[LiveFile]] = defaultdict(list)
        for file in live_files(self.table):
            files[day_of(self.table, file)].append(file)
        # After the lake, so that what it holds is in the engine too.
        prints: dict[date, dict[int, HourPrint]] = defaultdict(dict)
        for hour, found in self.source.hours().items():
            prints[hour.date()][_number(hour)] = found
        oldest = self.source.oldest_raw()
        # What has left the raw table altogether, as retention takes it, is in the lake or nowhere.
        self.raw_from = _number(oldest) if oldest else None
        erased = [{"subject": subject, "until": _micros(until)} for subject, until in self.source.erased()]
        self.with_subjects = bool(erased)
        with duck_session(*SORTING) as session:
            self.session = session
            batch = pa.RecordBatch.from_pylist(erased, schema=_ERASED)
            with registered(session, "arriving", _ERASED, [batch]):
                session.execute("create table erased as from arriving")
            for day in sorted(files.keys() | prints.keys()):
                if self.first is None or day >= self.first:
                    hours = self._to_check(day, files[day], prints[day])
                    if hours:
                        self._put_right(day, files[day], hours)
                        self._compare(prints[day], hours)
        return self.state

    def _to_check(self, day: date, files: Sequence[LiveFile], prints: Mapping[int, HourPrint]) -> set[int]:
        """Return the hours (since 1970) of a day that may differ from the engine."""
        known = complete_until_of(self.table)
        if known is None:
            return {*prints, *(hour for file in files for hour in self._hours(file))}
        # A commit that was checked says nothing of a table that was rolled back, so this is read only with the other.
        checked = int(self.table.properties.get(VERIFIED_SEQUENCE, 0))
        hours = {hour for file in files if file.sequence > checked for hour in self._hours(file)}
        hours |= {hour for hour in prints if hour >= _number(known)}
        due = {hour: one.rows for hour, one in prints.items() if self._may_come(hour)}
        # History that came late, and that the sink has not written yet.
        if day < known.date() and sum(due.values()) > sum(file.data.record_count for file in files):
            hours |= due.keys()
        return hours

    def _may_come(self, hour: int) -> bool:
        return self.raw_from is not None and hour >= self.raw_from

    def _put_right(self, day: date, files: Sequence[LiveFile], hours: set[int]) -> None:
        """Load the rows of these hours as the table `held`, without second copies and content of erased subjects."""
        for _ in range(ATTEMPTS):
            read = [file for file in files if hours & self._hours(file)]
            self._load(read, hours)
            self.session.execute(
                "create or replace table going as select file, row, copy > 1 as repeated from ("
                # The copy that an erasure has emptied stays, else the one that was written first.
                f"  select *, row_number() over (partition by {_DELIVERY} order by rejected desc, sequence, file, row)"
                "   as copy from held) as copies"
                " left join erased on erased.subject = copies.subject and copies.moment <= erased.until"
                " where copy > 1 or erased.subject is not null"
            )
            [(repeated, redacted)] = self.session.execute(
                "select count(*) filter (repeated), count(*) filter (not repeated) from going"
            ).fetchall()
            if not repeated and not redacted:
                return
            numbers = self.session.execute("select distinct file from going order by file").fetchall()
            places = {file.path: number for number, file in enumerate(read)}
            wrong = [[read[number]] for (number,) in numbers]
            if replace_files(self.table, wrong, partial(self._righted, places), "repair"):
                self.state.repeated += repeated
                self.state.redacted += redacted
            files = live_files(self.table, EqualTo(term=DAY, value=day.isoformat()))
        raise ExportConflict(
            f"files of {'.'.join(self.table.name())} of {day} were replaced by others {ATTEMPTS} times: find out which "
            "exports, erasures or compactions run, and run it again"
        )

    def _load(self, files: Sequence[LiveFile], hours: set[int]) -> None:
        with registered(self.session, "arriving", _HELD, self._rows(files)):
            self.session.execute(
                "create or replace table held as select * from arriving"
                f" where list_contains(?::bigint[], arrived // {_HOUR_MICROSECONDS})",
                [sorted(hours)],
            )

    def _rows(self, files: Sequence[LiveFile]) -> Iterator[pa.RecordBatch]:
        schema, names = arrow_schema(self.table), [*PLACE, ARRIVED, REJECTED]
        subject = [self.spec.key, self.spec.topic.time] if self.with_subjects and self.spec.topic.time else []
        for number, file in enumerate(files):
            row = 0
            for batch in read_rows(self.table, file, [*names, *subject]):
                count = batch.num_rows
                columns = {
                    name: batch.column(name).cast(schema.field(name).type) for name in [*names, *subject]
                }
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array([number] * count, pa.int32()),
                        pa.array([file.sequence] * count, pa.int64()),
                        pa.array(range(row, row + count), pa.int64()),
                        *(
                            columns[name].cast(kind.type)
                            for name, kind in zip(PLACE, (_HELD.field(one) for one in PLACE), strict=True)
                        ),
                        columns[ARRIVED].cast(pa.int64()),
                        columns[REJECTED],
                        columns[subject[0]].cast(pa.string()) if subject else pa.nulls(count, pa.string()),
                        columns[subject[1]].cast(pa.int64()) if subject else pa.nulls(count, pa.int64()),
                    ],
                    schema=_HELD,
                )
                row += count

    def _righted(
        self, places: Mapping[str, int], file: LiveFile, batch: pa.RecordBatch, first: int
    ) -> pa.RecordBatch:
        """Return a batch of a file without second copies, and without the content of erased subjects."""
        found = self.session.execute(
            "select row, repeated from going where file = ? and row >= ? and row < ?",
            [places[file.path], first, first + batch.num_rows],
        ).fetchall()
        kept, erased = [True] * batch.num_rows, [False] * batch.num_rows
        for row, repeated in found:
            kept[row - first] = not repeated
            erased[row - first] = not repeated
        return emptied(batch, pa.array(erased, pa.bool_())).filter(pa.array(kept, pa.bool_()))

    def _compare(self, prints: Mapping[int, HourPrint], hours: set[int]) -> None:
        """Count the messages of these hours that the engine holds, and the table `held` does not."""
        counted = self.session.execute(
            f"select arrived // {_HOUR_MICROSECONDS} as hour, count(*), sum({OFFSET}) from held group by 1"
        ).fetchall()
        held = {int(hour): (int(rows), int(offsets)) for hour, rows, offsets in counted}
        for hour in sorted(hours & prints.keys()):
            one = prints[hour]
            there = held.get(hour, (0, 0))
            if there == (one.rows, one.offsets):
                continue
            if not self._may_come(hour):
                self.state.lost += max(0, one.rows - there[0])
                continue
            places = self.source.places(_start(hour))
            with registered(self.session, "arriving", self.source.places_schema, places):
                self.session.execute(
                    f"create or replace table engine as select * rename ({ARRIVED} as arrived) from arriving"
                )
            # The lake may hold more: what has left the engine stays.
            [(waiting, lost, since)] = self.session.execute(
                f"select count(*) filter ({IN_RAW}), count(*) filter (not {IN_RAW}),"
                f" min(arrived) filter ({IN_RAW}) from engine anti join held using ({_DELIVERY})"
            ).fetchall()
            self.state.lost += lost
            if waiting:
                moment = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=since)
                self.state.waiting += waiting
                self.state.waiting_since = min(moment, self.state.waiting_since or moment)

    def _hours(self, file: LiveFile) -> set[int]:
        return hours_of(self.table, file)


def _write_again(table: Table, files: Sequence[LiveFile], transform: Transform, operation: str) -> DayFiles:
    schema, day = arrow_schema(table), day_of(table, files[0])
    sorted_by = (table.schema().find_column_name(one.source_id) for one in table.sort_order().fields)
    order = tuple(name for name in sorted_by if name) or PLACE

    def remaining(rejected: bool | None = None) -> Iterator[pa.RecordBatch]:
        for file in files:
            first = 0
            for batch in read_rows(table, file, schema.names):
                changed = transform(file, batch, first)
                first += batch.num_rows
                if rejected is not None:
                    changed = changed.filter(pc.equal(changed.column(REJECTED), rejected))
                if changed.num_rows:
                    yield changed.cast(schema)

    rows, totals = counted_sums(remaining(), [OFFSET])
    # The name is that of no hour, so that the platform's own export does not take the file for one of its own.
    written = DayFiles(uuid.uuid4().hex[:16], rows, totals, {"prefs.operation": operation})
    for rejected in (False, True):
        groups = sort_batches(remaining(rejected), schema, order, ROWS_PER_GROUP)
        write_groups(table, (day, rejected), written, groups)
    found = offsets_in(table, written.paths)
    if found != (rows, totals[OFFSET]):
        discard(table, written)
        raise OfflineError(
            f"{files[0].path} was written again with {found[0]} rows and offsets of {found[1]} in all, {rows} with "
            f"{totals[OFFSET]} were due: readers still see what was there, run it again"
        )
    return written


def _discard(table: Table, written: Iterable[DayFiles]) -> None:
    for one in written:
        discard(table, one)


def day_of(table: Table, file: LiveFile) -> date:
    """Return the UTC day of arrival of a file's partition."""
    places = [one.name for one in table.specs()[file.data.spec_id].fields]
    # A date partition is stored as days since 1970.
    return _EPOCH + timedelta(days=int(file.data.partition[places.index(DAY)]))


def hours_of(table: Table, file: LiveFile) -> set[int]:
    """Return the hours (their number since 1970) of which a file may hold messages."""
    column = table.schema().find_field(ARRIVED).field_id
    low = (file.data.lower_bounds or {}).get(column)
    high = (file.data.upper_bounds or {}).get(column)
    if low is None or high is None:
        first = (day_of(table, file) - _EPOCH).days * 24
        return set(range(first, first + 24))
    bounds = [int(from_bytes(TimestamptzType(), bound)) // _HOUR_MICROSECONDS for bound in (low, high)]
    return set(range(bounds[0], bounds[1] + 1))


def _micros(moment: datetime) -> int:
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def _number(moment: datetime) -> int:
    return _micros(moment) // _HOUR_MICROSECONDS


def _start(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * _HOUR_SECONDS, UTC)
