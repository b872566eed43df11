"""The audit of exported days, after they were written to a branch and before they are published."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.types import TimestamptzType

from dagster_prefs.declarations.reserved import PREFIX, UUID_PREFIX
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.files import parts_of, tile_files
from dagster_prefs.iceberg.tables import TileTable

BATCH_ROWS = 131_072


class AuditFailed(OfflineError):
    """The written day differs from the engine's; `branch` keeps it, readers never see it."""

    def __init__(self, message: str, branch: str) -> None:
        super().__init__(message)
        self.branch = branch


@dataclass(frozen=True)
class StagedDay:
    """One day on a branch: locations of its new files, and what they replace.

    `rows` and `totals` (column → sum) come from the engine and must be found in the files.
    """

    paths: Sequence[str]
    rows: int
    totals: Mapping[str, Decimal]
    replaced: Sequence[DataFile]


@dataclass(frozen=True)
class Staged:
    """The content of one commit to a branch: its snapshot and the days in it."""

    snapshot_id: int
    branch: str
    days: Mapping[date, StagedDay]


def audit_days(
    table: Table, spec: TileTable, staged: Staged, *, known: Container[date] = ()
) -> dict[date, AuditFailed]:
    """Read the staged days back and compare each with the engine's counts and sums.

    Checks counts, keys unique and sorted, nulls, ranges, totals, and that no other day lost or gained a row. The
    rows of `known` days are not read again, because an earlier audit accepted the same files. Memory is bounded by
    a batch. Returns the error of each day that failed, with every finding.
    """
    found = tile_files(
        table, spec, first=min(staged.days), last=max(staged.days), snapshot_id=staged.snapshot_id
    )
    findings: dict[date, list[str]] = {}
    for day, one in staged.days.items():
        parts = parts_of(found.get(day, []))
        if parts != set(one.paths):
            findings[day] = [f"the branch has {len(parts)} files of the day, {len(one.paths)} were written"]
    if not findings and (other := total_findings(table, staged)):
        # Which day has the wrong rows is not known.
        findings = dict.fromkeys(staged.days, other)
    for day, one in staged.days.items():
        if day not in findings and day not in known:
            findings[day] = row_findings(_batches(table, one.paths), table, spec, day, one.rows, one.totals)
    return {
        day: AuditFailed(
            f"the audit of {'.'.join(table.name())} of {day} failed ({'; '.join(wrong)}): readers still see the "
            f"previous data: look at branch {staged.branch}, correct the tile, and run the export again",
            staged.branch,
        )
        for day, wrong in findings.items()
        if wrong
    }


def total_findings(table: Table, staged: Staged) -> list[str]:
    """Return what is wrong with the number of rows of the whole table after a commit; empty if nothing is."""
    snapshot = table.snapshot_by_id(staged.snapshot_id)
    parent = (
        table.snapshot_by_id(snapshot.parent_snapshot_id)
        if snapshot and snapshot.parent_snapshot_id
        else None
    )
    before = int(_summary(parent, "total-records"))
    after = int(_summary(snapshot, "total-records"))
    replaced = sum(file.record_count for one in staged.days.values() for file in one.replaced)
    expected = before - replaced + sum(one.rows for one in staged.days.values())
    return [] if after == expected else [f"the branch has {after} rows in all days, {expected} were due"]


def _summary(snapshot: Any, name: str) -> str:
    return (snapshot.summary[name] if snapshot is not None and snapshot.summary is not None else None) or "0"


def _batches(table: Table, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        with table.io.new_input(path).open() as source, pq.ParquetFile(source) as parquet:
            yield from parquet.iter_batches(batch_size=BATCH_ROWS)


def row_findings(
    batches: Iterable[pa.RecordBatch],
    table: Table,
    spec: TileTable,
    day: date,
    rows: int,
    totals: Mapping[str, Decimal],
    *,
    ordered: bool = True,
) -> list[str]:
    """Return one finding per violated rule of a day's rows; empty if they match the engine's counts.

    `ordered` rows must be sorted by key; then order and repeated keys are checked too.
    """
    required = [field.name for field in table.schema().fields if field.required]
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    wrong: dict[str, int] = {}
    sums = dict.fromkeys(totals, Decimal(0))
    count = 0
    last: list[pa.RecordBatch] = []

    def note(finding: str, number: Any) -> None:
        if number:
            wrong[finding] = wrong.get(finding, 0) + int(number)

    for batch in batches:
        count += batch.num_rows
        for name in required:
            note(f"{name} is null", batch.column(name).null_count)
        note("another day", _count(pc.not_equal(batch.column(spec.day), pa.scalar(day, pa.date32()))))
        for column in spec.columns:
            values = batch.column(column.name)
            if column.minimum is not None:
                note(f"{column.name} below {column.minimum}", _count(pc.less(values, column.minimum)))
            if isinstance(column.type, TimestamptzType):
                outside = pc.or_(
                    pc.less(values, pa.scalar(midnight, values.type)),
                    pc.greater_equal(values, pa.scalar(midnight + timedelta(days=1), values.type)),
                )
                note(f"{column.name} outside the day", _count(outside))
        if spec.entity.key.type != "bigint":
            prefix = UUID_PREFIX if spec.entity.key.type == "uuid" else PREFIX
            note(f"{spec.subject} of a canary", _count(pc.starts_with(batch.column(spec.subject), prefix)))
        for smaller, larger in spec.at_most:
            note(f"{smaller} above {larger}", _count(pc.greater(batch.column(smaller), batch.column(larger))))
        for name in sums:
            sums[name] += Decimal(pc.sum(batch.column(name)).as_py() or 0)
        if not ordered:
            continue
        keys = batch.select(list(spec.key))
        descending, repeated = _steps(pa.Table.from_batches([*last, keys]))
        note("keys out of order", descending)
        note("keys repeated", repeated)
        # The next batch may start with the same key.
        last = [keys.slice(keys.num_rows - 1)]
    findings = [f"{finding}: {number} rows" for finding, number in wrong.items()]
    if count != rows:
        findings.append(f"{count} rows, the engine has {rows}")
    findings += [
        f"sum of {name} is {sums[name]}, the engine has {total}"
        for name, total in totals.items()
        if sums[name] != total
    ]
    return findings


def _count(mask: pa.Array) -> int:
    return pc.sum(mask).as_py() or 0


def _steps(keys: pa.Table) -> tuple[int, int]:
    """Return how many rows have a smaller key than the row before them, and how many the same key."""
    descending, same = pa.scalar(False), pa.scalar(True)
    for column in keys.combine_chunks().columns:
        before, after = column.slice(0, max(len(column) - 1, 0)), column.slice(1)
        descending = pc.or_(descending, pc.and_(same, pc.greater(before, after)))
        same = pc.and_(same, pc.equal(before, after))
    return _count(descending), _count(same)
