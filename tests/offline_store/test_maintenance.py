from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from shipped import WATCH

from dagster_prefs.iceberg.audit import AuditFailed
from dagster_prefs.iceberg.catalog import TableMissing
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.maintenance import maintain, maintain_training_sets
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.training.outputs import replace_rows

from .conftest import DAY, Tiles, some_rows, table_rows, watch
from .training_world import KEEP, later


def files(warehouse: Path) -> set[str]:
    return {path.name for path in (warehouse / "training").rglob("*") if path.is_file()}


def test_the_current_state_and_tags_outlive_everything(
    tiles: Tiles, catalog: Catalog, warehouse: Path
) -> None:
    tiles.add(WATCH, [watch(1, DAY, 100)])
    tagged = export_day(tiles.engine, catalog, WATCH, DAY)
    table = catalog.load_table(("training", WATCH.name))
    assert tagged.snapshot_id is not None
    table.manage_snapshots().create_tag(tagged.snapshot_id, "model-7").commit()
    for viewer in range(2, 5):
        tiles.add(WATCH, [watch(viewer, DAY, 100)])
        export_day(tiles.engine, catalog, WATCH, DAY)
    current = table_rows(catalog, WATCH)
    parquet = {path.name for path in warehouse.rglob("*.parquet")}
    report = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    # The first, empty snapshot and the two between the tag and the current one.
    assert report.snapshots_expired == 3
    assert report.files_removed >= 2
    assert report.bytes_freed > 0
    assert len({path.name for path in warehouse.rglob("*.parquet")}) == 2 < len(parquet) == 4
    assert table_rows(catalog, WATCH) == current
    assert table_rows(catalog, WATCH, tagged.snapshot_id) == [watch(1, DAY, 100)]
    before = files(warehouse)
    again = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert (again.snapshots_expired, again.files_removed, again.branches_removed) == (0, 0, ())
    assert files(warehouse) == before
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "unchanged"


def test_what_is_young_stays(tiles: Tiles, catalog: Catalog, warehouse: Path) -> None:
    tiles.add(WATCH, [watch(1, DAY, 100)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    stray = warehouse / "training" / WATCH.name / "data" / "stray.parquet"
    stray.write_bytes(b"of an export that still runs")
    report = maintain(catalog, WATCH, now=datetime.now(UTC), keep_snapshots=KEEP)
    assert (report.snapshots_expired, report.files_removed) == (0, 0)
    old = (datetime.now(UTC) - timedelta(days=2)).timestamp()
    os.utime(stray, (old, old))
    report = maintain(catalog, WATCH, now=datetime.now(UTC), keep_snapshots=KEEP)
    assert (report.files_removed, report.bytes_freed) == (1, 28)
    assert not stray.exists()


def test_the_branch_of_a_failed_audit_goes_in_the_end(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [watch(1, DAY, -5)])
    with pytest.raises(AuditFailed) as caught:
        export_day(tiles.engine, catalog, WATCH, DAY)
    assert maintain(catalog, WATCH, now=datetime.now(UTC), keep_snapshots=KEEP).branches_removed == ()
    report = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert report.branches_removed == (caught.value.branch,)
    assert set(catalog.load_table(("training", WATCH.name)).refs()) == {"main"}


def test_small_files_of_a_day_become_one(
    tiles: Tiles, catalog: Catalog, spec: TileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_day = DAY + timedelta(days=1)
    tiles.add(spec, some_rows(spec, DAY, viewers=40) + some_rows(spec, next_day))
    with monkeypatch.context() as patch:
        patch.setattr("dagster_prefs.iceberg.publish.FILE_BYTES", 1)
        patch.setattr("dagster_prefs.iceberg.publish.ROWS_PER_GROUP", 10)
        assert export_day(tiles.engine, catalog, spec, DAY).files > 2
    export_day(tiles.engine, catalog, spec, next_day)
    before = table_rows(catalog, spec)
    report = maintain(catalog, spec, now=datetime.now(UTC), keep_snapshots=KEEP)
    assert report.days_compacted == (DAY,)
    assert table_rows(catalog, spec) == before
    done = export_day(tiles.engine, catalog, spec, DAY)
    assert (done.status, done.files) == ("unchanged", 1)
    assert maintain(catalog, spec, now=datetime.now(UTC), keep_snapshots=KEEP).days_compacted == ()


def test_training_sets_lose_their_history_and_tables_of_others_keep_it(
    tiles: Tiles, catalog: Catalog, warehouse: Path
) -> None:
    catalog.create_namespace("training")
    rows = [pa.table({"viewer_id": [1, 2], "clicked": [0, run]}) for run in range(3)]
    ours, theirs = (catalog.create_table(f"training.{name}", rows[0].schema) for name in ("ours", "theirs"))
    for found in rows:
        replace_rows(ours, found.to_batches(), {})
        ours = catalog.load_table("training.ours")
        theirs.overwrite(found)
    tiles.add(WATCH, [watch(1, DAY, 100)])
    export_day(tiles.engine, catalog, WATCH, DAY)
    kept = files(warehouse)
    assert [
        (report.snapshots_expired, report.files_removed)
        for report in maintain_training_sets(catalog, now=datetime.now(UTC), keep_snapshots=KEEP)
    ] == [(0, 0)]
    assert files(warehouse) == kept

    [report] = maintain_training_sets(catalog, now=later(), keep_snapshots=KEEP)
    assert (report.table, report.snapshots_expired) == ("training.ours", 2)
    assert catalog.load_table("training.ours").scan().to_arrow().to_pylist() == rows[2].to_pylist()
    assert len(list((warehouse / "training" / "ours").rglob("*.parquet"))) == 1
    assert len(catalog.load_table("training.theirs").snapshots()) == len(theirs.snapshots()) > 2
    [again] = maintain_training_sets(catalog, now=later(), keep_snapshots=KEEP)
    assert (again.snapshots_expired, again.files_removed) == (0, 0)


def test_a_catalog_without_the_namespace_has_no_training_sets(catalog: Catalog) -> None:
    assert maintain_training_sets(catalog, now=later(), keep_snapshots=KEEP) == []


def test_a_table_that_is_not_there(catalog: Catalog) -> None:
    with pytest.raises(TableMissing, match=r"training\.viewer_watch_daily does not exist"):
        maintain(catalog, WATCH, now=datetime.now(UTC), keep_snapshots=KEEP)
