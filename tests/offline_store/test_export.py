from __future__ import annotations

from datetime import date, timedelta

import pytest
from pyiceberg.catalog import Catalog
from shipped import GENRE, WATCH

from dagster_prefs.iceberg.export import ExportedDay, ExportOptions, export_day, exported_days, stale_days
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.iceberg.tiles import TilesUnreadable

from .conftest import DAY, Tiles, some_rows, table_rows, watch

NEXT = DAY + timedelta(days=1)


def test_a_day_holds_exactly_the_engines_rows_without_canaries(
    tiles: Tiles, catalog: Catalog, spec: TileTable
) -> None:
    rows = some_rows(spec, DAY)
    canaries = some_rows(spec, DAY, viewers=2, offset=-2)
    tiles.add(spec, rows + canaries + some_rows(spec, NEXT))
    report = export_day(tiles.engine, catalog, spec, DAY)
    assert (report.status, report.rows, report.files) == ("written", len(rows), 1)
    assert table_rows(catalog, spec) == sorted(rows)
    table = catalog.load_table(("training", spec.name))
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert snapshot.snapshot_id == report.snapshot_id
    assert snapshot.summary["prefs.day"] == "2026-03-10"
    assert snapshot.summary["prefs.row-count"] == str(len(rows))
    assert set(table.refs()) == {"main"}
    assert [str(field) for field in table.spec().fields] == [f"1000: {spec.day}: identity(2)"]
    viewers = table.scan().to_arrow()["viewer_id"].to_pylist()
    assert viewers == sorted(viewers)


def test_a_day_is_read_whole_over_many_runs_of_blocks(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run of blocks may hold nothing of the day, and the last one ends in the middle.
    monkeypatch.setattr("dagster_prefs.iceberg.tiles.BLOCKS_READ", 2)
    spec = GENRE
    first = some_rows(spec, DAY, viewers=700)
    last = some_rows(spec, DAY, viewers=300, offset=5_000)
    for rows in (first, some_rows(spec, NEXT, viewers=900), last):
        tiles.add(spec, rows, refresh=False)
    tiles.refresh(spec)
    assert export_day(tiles.engine, catalog, spec, DAY).rows == len(first + last)
    assert table_rows(catalog, spec) == sorted(first + last)


def test_an_unchanged_day_commits_nothing(tiles: Tiles, catalog: Catalog, spec: TileTable) -> None:
    tiles.add(spec, some_rows(spec, DAY))
    first = export_day(tiles.engine, catalog, spec, DAY)
    before = catalog.load_table(("training", spec.name)).metadata_location
    second = export_day(tiles.engine, catalog, spec, DAY)
    assert (second.status, second.snapshot_id, second.rows) == ("unchanged", first.snapshot_id, first.rows)
    assert catalog.load_table(("training", spec.name)).metadata_location == before


def test_a_late_event_brings_back_only_its_own_day(tiles: Tiles, catalog: Catalog, spec: TileTable) -> None:
    days = [DAY, NEXT, NEXT + timedelta(days=1)]
    for day in days:
        tiles.add(spec, some_rows(spec, day))
    assert list(stale_days(tiles.engine, spec, exported_days(catalog, spec))) == days
    assert list(stale_days(tiles.engine, spec, exported_days(catalog, spec), until=NEXT)) == [DAY]
    assert [export_day(tiles.engine, catalog, spec, day).status for day in days] == ["written"] * 3
    assert list(stale_days(tiles.engine, spec, exported_days(catalog, spec))) == []
    before = table_rows(catalog, spec)

    tiles.add(spec, some_rows(spec, NEXT, viewers=1, offset=900))
    assert list(stale_days(tiles.engine, spec, exported_days(catalog, spec))) == [NEXT]
    statuses = [export_day(tiles.engine, catalog, spec, day).status for day in days]
    assert statuses == ["unchanged", "written", "unchanged"]
    assert table_rows(catalog, spec) == sorted(before + some_rows(spec, NEXT, viewers=1, offset=900))


def test_what_left_the_engine_stays_in_the_table(tiles: Tiles, catalog: Catalog, spec: TileTable) -> None:
    rows = some_rows(spec, DAY)
    tiles.add(spec, rows)
    export_day(tiles.engine, catalog, spec, DAY)

    tiles.delete(spec, DAY, "viewer_id < 10")
    report = export_day(tiles.engine, catalog, spec, DAY)
    assert (report.status, report.rows) == ("retained", len(rows))
    assert "the engine has" in report.reason
    assert list(stale_days(tiles.engine, spec, exported_days(catalog, spec))) == []

    tiles.delete(spec, DAY)
    assert export_day(tiles.engine, catalog, spec, DAY).status == "retained"
    assert table_rows(catalog, spec) == sorted(rows)


def test_a_smaller_total_with_as_many_rows_is_a_loss_too(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [watch(1, DAY, 100), watch(2, DAY, 200)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    tiles.replace(WATCH, DAY, [watch(1, DAY, 100), watch(2, DAY, 150)])
    report = export_day(tiles.engine, catalog, WATCH, DAY)
    assert report.status == "retained"
    assert "250" in report.reason
    assert "300" in report.reason
    assert (
        export_day(tiles.engine, catalog, WATCH, DAY, options=ExportOptions(allow_loss=True)).status
        == "written"
    )
    assert table_rows(catalog, WATCH) == [watch(1, DAY, 100), watch(2, DAY, 150)]


def test_a_day_without_tiles_is_empty(tiles: Tiles, catalog: Catalog, spec: TileTable) -> None:
    report = export_day(tiles.engine, catalog, spec, date(2020, 1, 1))
    assert (report.status, report.rows, report.snapshot_id) == ("empty", 0, None)
    tiles.add(spec, some_rows(spec, DAY, viewers=2, offset=-2))
    assert export_day(tiles.engine, catalog, spec, DAY).status == "empty"


def test_fingerprints_survive_expiry_and_follow_a_rollback(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [watch(1, DAY, 100)])
    old = export_day(tiles.engine, catalog, WATCH, DAY)
    tiles.add(WATCH, [watch(2, DAY, 5)])
    new = export_day(tiles.engine, catalog, WATCH, DAY)
    assert exported_days(catalog, WATCH) == {DAY: ExportedDay(new.fingerprint, 2)}
    table = catalog.load_table(("training", WATCH.name))
    table.manage_snapshots().rollback_to_snapshot(old.snapshot_id).commit()
    assert exported_days(catalog, WATCH) == {DAY: ExportedDay(old.fingerprint, 1)}
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    table.refresh()
    current = table.current_snapshot()
    assert current is not None
    table.maintenance.expire_snapshots().by_ids(
        [
            snapshot.snapshot_id
            for snapshot in table.snapshots()
            if snapshot.snapshot_id != current.snapshot_id
        ]
    ).commit()
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "unchanged"


def test_views_refreshed_apart_are_not_exported(tiles: Tiles, catalog: Catalog, spec: TileTable) -> None:
    tiles.add(spec, some_rows(spec, DAY))
    tiles.add(spec, some_rows(spec, DAY, viewers=1, offset=500), refresh=False)
    with pytest.raises(TilesUnreadable, match="does not describe"):
        export_day(tiles.engine, catalog, spec, DAY)
    assert table_rows(catalog, spec) == []


def test_a_missing_relation_says_which_and_what_to_do(tiles: Tiles, catalog: Catalog) -> None:
    tiles.execute("drop table tile_fingerprints")
    with pytest.raises(TilesUnreadable, match=r"tile_fingerprints .*dbt build"):
        export_day(tiles.engine, catalog, WATCH, DAY)
    with pytest.raises(TilesUnreadable, match="viewer_watch_metrics_1d"):
        stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))


def test_a_tile_that_the_fingerprints_leave_out_is_refused(
    tiles: Tiles, catalog: Catalog, spec: TileTable
) -> None:
    assert stale_days(tiles.engine, spec, exported_days(catalog, spec)) == {}
    tiles.add(spec, some_rows(spec, DAY, viewers=2, offset=-2), refresh=False)
    assert stale_days(tiles.engine, spec, exported_days(catalog, spec)) == {}, (
        "canaries are in no fingerprint"
    )
    tiles.add(spec, some_rows(spec, DAY), refresh=False)
    with pytest.raises(TilesUnreadable, match=f"has no row of {spec.tile}, which has rows: its model leaves"):
        stale_days(tiles.engine, spec, exported_days(catalog, spec))
