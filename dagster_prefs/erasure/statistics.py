"""Erase one subject from the statistics of values.

Statistics name nobody: no key, and no text that fewer than ten subjects share. But a lowest or highest value may be one
subject's alone. Days of tiles are therefore described again once the subject's rows are gone from their training table.
A rolling view of an earlier day cannot be described again, so that its lowest and highest values are removed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table

from dagster_prefs.declarations.names import STATISTICS_TABLE
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.iceberg.catalog import translated
from dagster_prefs.iceberg.duck import duck_session
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.iceberg.maintenance import expire, unreferenced_files
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.values.collect import TableDays
from dagster_prefs.values.describe import SESSION
from dagster_prefs.values.statistics import Statistics
from dagster_prefs.values.store import (
    RelationDay,
    described_days,
    read_statistics,
    without_extremes,
    write_statistics,
)

# A file that a write has not committed yet is younger.
WRITE_SECONDS = 3600.0


@dataclass(frozen=True)
class StatisticsHolding:
    """What may still tell of the subject: days of relations to be described again, and snapshots of the past."""

    days: int
    snapshots: int


class SubjectInStatistics:
    """The statistics of a subject's training tables and rolling `views`. Every method raises OfflineError.

    To be used when the subject's rows are gone from the training tables. Safe to repeat after a crash anywhere.
    """

    def __init__(
        self,
        catalog: Catalog,
        registry: Registry,
        specs: Sequence[TileTable],
        views: Collection[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> None:
        self.name = f"{namespace}.{STATISTICS_TABLE}"
        self._catalog = catalog
        self._registry = registry
        self._specs = specs
        self._views = views
        self._namespace = namespace

    def holding(self) -> StatisticsHolding:
        """Count what `erase` would change."""
        table = self._table()
        if table is None:
            return StatisticsHolding(0, 0)
        days = sum(len(found) for _, found in self._outdated())
        extremes = {(one.relation, one.day) for one in self._with_extremes()}
        current = table.current_snapshot()
        return StatisticsHolding(
            days + len(extremes),
            sum(current is None or one.snapshot_id != current.snapshot_id for one in table.snapshots()),
        )

    def erase(self) -> None:
        """Describe the changed days again, remove the extremes of views, and then the table's history."""
        if self._table() is None:
            return
        made: list[Statistics] = []
        gone: list[RelationDay] = []
        with duck_session(*SESSION) as session:
            for days, outdated in self._outdated():
                left = {day for day in outdated if day in days.files}
                made += days.describe(session, left, datetime.now(UTC))
                gone += [(days.spec.tile, day) for day in sorted(outdated - left)]
        touched = {(one.relation, one.day) for one in self._with_extremes()}
        made += [without_extremes(one) for one in self._of_views() if (one.relation, one.day) in touched]
        write_statistics(self._catalog, self._namespace, made, gone=gone)
        self._remove_history()

    def _table(self) -> Table | None:
        with translated(f"the table {self.name}"):
            try:
                return self._catalog.load_table(self.name)
            except NoSuchTableError:
                return None

    def _outdated(self) -> Iterable[tuple[TableDays, set[date]]]:
        """Yield each training table with the days whose rows are others than those described."""
        known = described_days(self._catalog, self._namespace)
        for spec in self._specs:
            days = TableDays.load(self._catalog, self._registry, spec, self._namespace)
            yield (
                days,
                {
                    day
                    for (relation, day), version in known.items()
                    if relation == spec.tile and version != days.version(day)
                },
            )

    def _of_views(self) -> list[Statistics]:
        return [
            one
            for view in sorted(self._views)
            for one in read_statistics(self._catalog, self._namespace, relation=view)
        ]

    def _with_extremes(self) -> list[Statistics]:
        return [one for one in self._of_views() if one.minimum is not None or one.maximum is not None]

    def _remove_history(self) -> None:
        with translated(f"the table {self.name}"):
            table = self._catalog.load_table(self.name)
            named = {
                item.data_file.file_path
                for snapshot in table.snapshots()
                for manifest in snapshot.manifests(table.io)
                for item in manifest.fetch_manifest_entry(table.io)
            }
            expire(table, lambda now: [snapshot.snapshot_id for snapshot in now.snapshots()])
            before = time.time() - WRITE_SECONDS
            for file in unreferenced_files(table):
                if file.location.endswith(".parquet") and (
                    file.location in named or file.written_at.timestamp() < before
                ):
                    table.io.delete(file.location)
