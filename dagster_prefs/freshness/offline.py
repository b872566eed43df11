"""Offline lag: how far the training tables are behind the tiles from which they are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.export import exported_days, foreign_days, stale_days
from dagster_prefs.iceberg.tables import TileTable

if TYPE_CHECKING:
    from dagster_prefs.iceberg.catalog import Tables


@dataclass(frozen=True)
class OfflineLag:
    """The lag of one training table; days are UTC.

    `missing` are complete days that the engine holds and the table does not, `changed` those whose tiles
    changed after their export (late events), `foreign` those that another writer changed, with a description
    of the change: an export does not touch them. `lag_seconds` is the time since the oldest missing day was
    complete, 0 when none is missing.
    """

    table: str
    newest_day: date | None
    missing: tuple[date, ...]
    changed: tuple[date, ...]
    foreign: Mapping[date, str]
    lag_seconds: float


def offline_lag(
    engine: EngineConfiguration,
    catalog: Tables,
    spec: TileTable,
    *,
    namespace: str,
    start: date,
    now: datetime,
    by_sink: bool = False,
) -> OfflineLag:
    """Compare one training table with the tiles of the engine, for the days from `start` to yesterday.

    `now` is UTC; its day is not complete and never missing. `by_sink` says that a RisingWave sink writes the
    table, so that rows which the engine does not have are an error of the sink and not the result of
    retention.

    Raises OfflineError if catalog or tiles cannot be read, EngineUnavailable for the engine.
    """
    today = now.astimezone(UTC).date()
    exported = exported_days(catalog, spec, namespace=namespace)
    stale = stale_days(engine, spec, exported, until=today, by_sink=by_sink)
    # RisingWave's sink names every file of its table, so none of them is foreign.
    others = {} if by_sink else foreign_days(exported, stale)
    foreign = {day: str(found) for day, found in others.items() if day >= start}
    needed = [day for day in stale if day >= start and day not in others]
    held = {day for day, found in exported.items() if not found.removed}
    missing = tuple(day for day in needed if day not in held)
    lag = 0.0
    if missing:
        complete = datetime.combine(missing[0] + timedelta(days=1), time(), UTC)
        lag = max(0.0, (now - complete).total_seconds())
    return OfflineLag(
        table=spec.name,
        newest_day=max(held, default=None),
        missing=missing,
        changed=tuple(day for day in needed if day in held),
        foreign=foreign,
        lag_seconds=lag,
    )
