"""Days that RisingWave's Iceberg sinks write: preparing the tables, auditing and tagging the days.

Beyond one machine the sinks fill the same tables (PREFS_EXPORT=sink), and this module writes no row. The tag
pins the snapshot in which a day matched the engine exactly, and its name carries the day's fingerprint, so
that only a late event requires another verification.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Literal

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.audit import AuditFailed, row_findings
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.duck import SORTING, duck_session, registered
from dagster_prefs.iceberg.export import (
    DEFAULT_NAMESPACE,
    SINK_BRANCH,
    ExportConflict,
    exported_days,
    verified_tag,
)
from dagster_prefs.iceberg.files import LiveFile, day_files, parts_of, read_rows
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, ensure_table
from dagster_prefs.iceberg.tiles import tile_snapshot

ATTEMPTS = 5


class DaysAtRisk(OfflineError):
    """A new sink would remove days from a training table that exist nowhere else."""


@dataclass(frozen=True)
class VerifyReport:
    """The outcome for one day.

    `status`: `verified` (the table matches the engine and is tagged now), `unchanged` (it still holds what
    was tagged before), `empty` (neither side has rows of the day). `rows` are the day's in the table; `tag`
    and `snapshot_id` are None for an empty day; `seconds` is wall time.
    """

    table: str
    day: date
    status: Literal["verified", "unchanged", "empty"]
    rows: int
    snapshot_id: int | None
    fingerprint: str | None
    tag: str | None
    seconds: float


def prepare_for_sink(
    engine: EngineConfiguration, catalog: Catalog, spec: TileTable, *, namespace: str = DEFAULT_NAMESPACE
) -> Table:
    """Prepare the table for a RisingWave sink: contract's schema, and no branch of an earlier sink.

    The branch stays while the sink exists. A new sink writes every row that the engine holds, and
    RisingWave's compaction then replaces the whole table by the sink's branch; on an earlier sink's branch
    each row would occur twice. Safe to run again.

    Raises DaysAtRisk where the table holds more of a day than the engine does, SchemaChangeRefused,
    TilesUnreadable, EngineUnavailable, or another OfflineError.
    """
    table = ensure_table(catalog, namespace, spec)
    with engine.connect() as connection:
        there = connection.execute(
            "select 1 from rw_catalog.rw_sinks s join rw_catalog.rw_schemas n on n.id = s.schema_id"
            " where n.name = %s and s.name = %s",
            (engine.schema, spec.sink),
        ).fetchone()
    name = f"{namespace}.{spec.name}"
    if there:
        return table
    held = {
        day: found
        for day, found in exported_days(catalog, spec, namespace=namespace).items()
        if not found.removed
    }
    if held:
        with tile_snapshot(engine, spec) as tiles:
            current = tiles.fingerprints()
        at_risk = sorted(
            day for day, found in held.items() if day not in current or current[day].row_count < found.rows
        )
        if at_risk:
            raise DaysAtRisk(
                f"{name} holds {len(at_risk)} days, the first {at_risk[0]} and the last {at_risk[-1]}, which "
                "are no longer complete in the engine, and RisingWave's sink would delete them from the table: set "
                "PREFS_ICEBERG_NAMESPACE to another one for the sinks, or keep PREFS_EXPORT=platform"
            )
    with translated(f"the table {name}"):
        if SINK_BRANCH in table.refs():
            table.manage_snapshots().remove_branch(SINK_BRANCH).commit()
    return table


def verify_day(
    engine: EngineConfiguration,
    catalog: Catalog,
    spec: TileTable,
    day: date,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    keep_tag: timedelta,
) -> VerifyReport:
    """Compare `day` (UTC) of the table's current snapshot with the engine's tiles, and tag it if they match.

    The tag, and with it the snapshot, is kept for `keep_tag`. Idempotent, and safe to run several times at
    once.

    Raises AuditFailed with every finding (the branch it names is the table's own: main); the sink commits
    every few minutes, so a day that changed just now fails until it has caught up. Raises TableMissing,
    TilesUnreadable, EngineUnavailable, ExportConflict, or another OfflineError.
    """
    started = time.monotonic()
    name = f"{namespace}.{spec.name}"
    with translated(f"the table {name}"):
        table = catalog.load_table(spec.identifier(namespace))
        with tile_snapshot(engine, spec) as tiles:
            fingerprint = tiles.fingerprint(day)
            expected = tiles.totals(day) if fingerprint else (0, dict.fromkeys(spec.totals, Decimal(0)))
        snapshot = table.current_snapshot()
        files = _data_files(table, spec, day)

        def report(status: Literal["verified", "unchanged", "empty"], tag: str | None) -> VerifyReport:
            return VerifyReport(
                table=name,
                day=day,
                status=status,
                rows=sum(file.data.record_count for file in files),
                snapshot_id=table.refs()[tag].snapshot_id if tag else None,
                fingerprint=fingerprint.token if fingerprint else None,
                tag=tag,
                seconds=time.monotonic() - started,
            )

        if fingerprint is None and not files:
            return report("empty", None)
        tag = verified_tag(day, fingerprint.token) if fingerprint else None
        ref = table.refs().get(tag) if tag else None
        # If the sink has written the day again since its verification, the verification no longer holds.
        if ref is not None and parts_of(_data_files(table, spec, day, ref.snapshot_id)) == parts_of(files):
            return report("unchanged", tag)
        rows, totals = expected
        findings = row_findings(
            (batch for file in files for batch in read_rows(table, file, [c.name for c in spec.columns])),
            table,
            spec,
            day,
            rows,
            totals,
            ordered=False,
        )
        repeated = _repeated_keys(table, spec, files)
        if repeated:
            findings.append(f"keys repeated: {repeated} rows")
        if findings or snapshot is None or tag is None:
            raise AuditFailed(
                f"{name} of {day}, which a sink writes, is not what the engine holds "
                f"({'; '.join(findings) or 'the engine holds nothing of this day'}): wait for the sink's next commits "
                "and RisingWave's compaction; if it stays, check whether the sink runs, or drop it, materialize "
                "training/tables and create it again",
                "main",
            )
        if ref is not None:
            # The same rows in other files: the sink compacted the day.
            return report("unchanged", tag)
        _tag(table, day, tag, snapshot.snapshot_id, keep_tag)
        return report("verified", tag)


def _data_files(table: Table, spec: TileTable, day: date, snapshot_id: int | None = None) -> list[LiveFile]:
    remedy = "create the sink with write_mode='copy-on-write', so that only whole rows reach the table's main branch"
    files = day_files(table, spec, day, snapshot_id)
    for kind, found in (
        ("equality", any(file.equality_deletes for file in files)),
        ("position", any(file.deletes for file in files)),
    ):
        if found:
            raise AuditFailed(f"{'.'.join(table.name())} of {day} has {kind} deletes: {remedy}", "main")
    return files


def _repeated_keys(table: Table, spec: TileTable, files: list[LiveFile]) -> int:
    """Count the rows that repeat a key. DuckDB groups the unordered rows, on disk if needed."""
    schema = pa.schema([arrow_schema(table).field(name) for name in spec.key])
    keys = (batch.cast(schema) for file in files for batch in read_rows(table, file, list(spec.key)))
    with duck_session(*SORTING) as session, registered(session, "day", schema, keys):
        names = ", ".join(spec.key)
        [(repeated,)] = session.execute(
            f"select coalesce(sum(n - 1), 0) from (select count(*) as n from day group by {names})"
        ).fetchall()
    return int(repeated)


def _tag(table: Table, day: date, tag: str, snapshot_id: int, keep: timedelta) -> None:
    """Tag the audited snapshot, and remove the day's earlier tags."""
    for _ in range(ATTEMPTS):
        outdated = [name for name in table.refs() if name.startswith(verified_tag(day, "")) and name != tag]
        try:
            change = table.manage_snapshots().create_tag(
                snapshot_id, tag, max_ref_age_ms=int(keep.total_seconds() * 1000)
            )
            for name in outdated:
                change = change.remove_tag(name)
            change.commit()
            return
        except CommitFailedException:
            # The sink commits continuously; the snapshot to tag is still the audited one.
            table.refresh()
            if tag in table.refs():
                return
    raise ExportConflict(
        f"{'.'.join(table.name())} of {day} could not be tagged because others kept committing: run it again"
    )
