"""That all exports are well is recalled without Iceberg, until a table, a tile or the day changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pyiceberg.catalog import Catalog
from shipped import REGISTRY, WATCH

from dagster_prefs.files import local_folder
from dagster_prefs.freshness.exports_memo import ExportsMemo
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.iceberg.export import export_day

from .conftest import DAY, Tiles, watch


def test_any_change_ends_what_is_recalled(
    tiles: Tiles, catalog: Catalog, warehouse: Path, tmp_path: Path
) -> None:
    now = datetime(DAY.year, DAY.month, DAY.day, 12, tzinfo=UTC)
    memo = ExportsMemo(tmp_path / "seen.json", warehouse / "catalog.db", "training", DAY)
    well = Measure(
        "offline",
        WATCH.name,
        "ok",
        "well",
        0.0,
        REGISTRY.contract.freshness.export,
        {"missing": 0},
        {"a": "b"},
    )

    def state(at: datetime = now) -> str:
        found = memo.state(tiles.engine, REGISTRY, at)
        assert found is not None
        return found

    tiles.add(WATCH, [watch(1, DAY, 60)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    before = state()
    assert memo.recall(before) is None
    memo.remember(before, [well])
    assert memo.recall(state(now + timedelta(hours=11))) == [well]
    assert memo.recall(state(now + timedelta(hours=12))) is None, "another day is complete"

    tiles.add(WATCH, [watch(2, DAY, 60)])
    late = state()
    assert memo.recall(late) is None, "a tile has changed"
    for bad in (replace(well, level="warn"), replace(well, lag_seconds=1.0), replace(well, thresholds=None)):
        memo.remember(late, [well, bad])
        assert memo.recall(late) is None, "only what is well lasts"
    export_day(tiles.engine, catalog, WATCH, DAY)
    assert state() != late, "the table has changed"

    table = catalog.load_table(("training", WATCH.name))
    metadata = local_folder(table.metadata_location)
    assert metadata is not None
    metadata.unlink()
    assert memo.state(tiles.engine, REGISTRY, now) is None, "what is lost is not well"
