"""The export of all training tables: the days that need an export, and the outcomes. Does not depend on Dagster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from pyiceberg.catalog import Catalog

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.audit import AuditFailed
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.export import (
    AS_IT_IS,
    DaysFailed,
    ExportOptions,
    ForeignRows,
    export_days,
    exported_days,
    foreign_days,
    stale_days,
)
from dagster_prefs.iceberg.launches import TableDay
from dagster_prefs.iceberg.tables import TileTable


@dataclass(frozen=True)
class Exports:
    """The complete days of the training tables.

    `stale` days need an export, with the engine's fingerprint. `foreign` days need an operator's decision, because
    another writer changed them as described. `current` days are up to date, with their rows.
    """

    stale: Mapping[TableDay, str]
    foreign: Mapping[TableDay, str]
    current: Mapping[TableDay, int]


@dataclass(frozen=True)
class DayOutcome:
    """The outcome of an export or a verification for one day of a table; `rows` are those that the table now holds."""

    table: str
    day: date
    status: str
    rows: int
    reason: str = ""

    @property
    def left_out(self) -> bool:
        """Whether the day still needs an export, or an operator's decision."""
        return self.status in ("foreign", "failed")


@dataclass(frozen=True)
class Exporter:
    """Updates training tables to the engine's tiles, from the UTC day `start` on.

    `catalog` is opened at each use. If RisingWave's sinks write the tables (`by_sink`), days are verified instead, and
    their tags are kept for `kept`. `report` is called with each table of which days were exported or verified.
    """

    engine: EngineConfiguration
    catalog: Callable[[], Catalog]
    tables: Mapping[str, TileTable]
    namespace: str
    start: date
    by_sink: bool
    kept: timedelta
    report: Callable[[TileTable], None] = lambda spec: None

    def look(self, now: datetime) -> Exports:
        """Compare every complete day of the training tables with the engine; `now` is UTC.

        Raises OfflineError, EngineUnavailable.
        """
        catalog = self.catalog()
        stale: dict[TableDay, str] = {}
        foreign: dict[TableDay, str] = {}
        current: dict[TableDay, int] = {}
        for spec in self.tables.values():
            exported = exported_days(catalog, spec, namespace=self.namespace)
            found = stale_days(self.engine, spec, exported, by_sink=self.by_sink)
            # RisingWave's sink names every file of its table, so none of them is foreign.
            others = {} if self.by_sink else foreign_days(exported, found)
            foreign |= {(spec.name, day): str(what) for day, what in others.items()}
            stale |= {(spec.name, day): token for day, token in found.items() if day not in others}
            current |= {
                (spec.name, day): held.rows
                for day, held in exported.items()
                if held.token is not None and day not in found
            }
        return Exports(*(self._complete(days, now) for days in (stale, foreign, current)))

    def bring_up(
        self, spec: TileTable, days: Sequence[date], options: ExportOptions = AS_IT_IS
    ) -> Iterator[DayOutcome]:
        """Export days of one table, or verify what the sink wrote. Raises OfflineError, EngineUnavailable."""
        brought = False
        for outcome in self._outcomes(spec, days, options):
            brought = brought or not outcome.left_out
            yield outcome
        if brought:
            self.report(spec)

    def _outcomes(
        self, spec: TileTable, days: Sequence[date], options: ExportOptions
    ) -> Iterator[DayOutcome]:
        catalog = self.catalog()
        if not self.by_sink:
            reports = export_days(self.engine, catalog, spec, days, namespace=self.namespace, options=options)
            for report in reports:
                yield DayOutcome(spec.name, report.day, report.status, report.rows or 0, report.reason)
            return
        from dagster_prefs.iceberg.verify import verify_day

        for day in days:
            try:
                found = verify_day(
                    self.engine, catalog, spec, day, namespace=self.namespace, keep_tag=self.kept
                )
                yield DayOutcome(spec.name, day, found.status, found.rows)
            except AuditFailed as error:
                yield DayOutcome(spec.name, day, "failed", 0, str(error))

    def export(
        self,
        days: Iterable[TableDay],
        options: ExportOptions = AS_IT_IS,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Export these days of these tables. A failing table or day prevents no other.

        `say` receives a line for each day that was left out, with the reason. After all other days are exported, raises
        an error that names every day that was left out; also EngineUnavailable.
        """
        wanted = set(days)
        outcomes: list[DayOutcome] = []
        for spec in self.tables.values():
            asked = sorted(day for table, day in wanted if table == spec.name)
            told: list[DayOutcome] = []
            try:
                for outcome in self.bring_up(spec, asked, options) if asked else ():
                    told.append(outcome)
            except OfflineError as error:
                done = {outcome.day for outcome in told}
                told += [
                    DayOutcome(spec.name, day, "failed", 0, str(error)) for day in asked if day not in done
                ]
            outcomes += told
        for outcome in outcomes:
            if outcome.left_out or outcome.status == "retained":
                say(f"{outcome.table} {outcome.day} stays as it is: {outcome.reason}")
        if left_out := [outcome for outcome in outcomes if outcome.left_out]:
            raise refusal(left_out)

    def _complete(self, days: Mapping[TableDay, Any], now: datetime) -> dict[TableDay, Any]:
        return {place: what for place, what in days.items() if self.start <= place[1] < now.date()}


def refusal(left_out: Iterable[DayOutcome]) -> OfflineError:
    """Return the error that names the days that were left out, with their reasons."""
    days = list(left_out)
    foreign = {(one.table, one.day): one.reason for one in days if one.status == "foreign"}
    failed = {(one.table, one.day): one.reason for one in days if one.status == "failed"}
    if not failed:
        return ForeignRows(foreign)
    return DaysFailed(failed | {key: str(ForeignRows({key: what})) for key, what in foreign.items()})
