"""Days that a sink wrote: verified against the engine and tagged, or refused with every difference.

RisingWave's sink is not here; what it leaves in the table is: files of rows in no order, under names that say nothing.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from shipped import GENRE, WATCH

from dagster_prefs.iceberg.audit import AuditFailed
from dagster_prefs.iceberg.catalog import TableMissing
from dagster_prefs.iceberg.export import SINK_BRANCH, export_day, exported_days, stale_days
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, ensure_table
from dagster_prefs.iceberg.verify import DaysAtRisk, VerifyReport, prepare_for_sink, verify_day

from .conftest import DAY, Tiles, genre, watch

KEEP = timedelta(days=30)
ROWS = [watch(3, DAY, 61), watch(1, DAY, 60), watch(2, DAY, 600, views=3)]


@pytest.fixture
def sinks(tiles: Tiles) -> Tiles:
    """The engine with RisingWave's list of sinks, which is empty."""
    tiles.execute("create schema rw_catalog")
    tiles.execute("create table rw_catalog.rw_schemas as select 1 as id, 'public' as name")
    tiles.execute("create table rw_catalog.rw_sinks (schema_id int, name text)")
    return tiles


def sink(catalog: Catalog, spec: TileTable, *rows: tuple[Any, ...]) -> None:
    table = ensure_table(catalog, "training", spec)
    names = [column.name for column in spec.columns]
    values = [dict(zip(names, row, strict=True)) for row in rows]
    table.append(pa.Table.from_pylist(values, schema=arrow_schema(table)))


def verify(tiles: Tiles, catalog: Catalog, spec: TileTable = WATCH, day: date = DAY) -> VerifyReport:
    return verify_day(tiles.engine, catalog, spec, day, keep_tag=KEEP)


def test_a_day_as_the_engine_has_it_is_tagged_once(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [*ROWS, watch(-1, DAY, 5)])
    sink(catalog, WATCH, *ROWS[:1])
    sink(catalog, WATCH, *ROWS[1:])
    assert list(stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))) == [DAY]

    report = verify(tiles, catalog)
    assert (report.status, report.rows) == ("verified", 3)
    assert report.tag is not None
    tag = catalog.load_table(WATCH.identifier("training")).refs()[report.tag]
    assert (tag.snapshot_id, tag.max_ref_age_ms) == (report.snapshot_id, 30 * 86_400_000)
    assert list(stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))) == []
    assert verify(tiles, catalog).status == "unchanged"


def test_a_late_event_asks_for_another_verification(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, ROWS)
    sink(catalog, WATCH, *ROWS)
    old = verify(tiles, catalog)
    tiles.add(WATCH, [watch(9, DAY, 7)])
    assert list(stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))) == [DAY]
    with pytest.raises(AuditFailed, match=r"3 rows, the engine has 4.*wait for the sink's next commits"):
        verify(tiles, catalog)
    sink(catalog, WATCH, watch(9, DAY, 7))
    new = verify(tiles, catalog)
    refs = catalog.load_table(WATCH.identifier("training")).refs()
    assert new.status == "verified"
    assert new.tag in refs
    assert old.tag not in refs


def test_every_difference_is_named(tiles: Tiles, catalog: Catalog) -> None:
    rows = [genre(1, DAY, "drama", 60), genre(1, DAY, "news", 30), genre(2, DAY, "drama", 10)]
    tiles.add(GENRE, rows)
    sink(catalog, GENRE, rows[0], rows[2], genre(1, DAY, "drama", 29))
    with pytest.raises(
        AuditFailed, match=r"sum of watch_seconds is 99, the engine has 100.*keys repeated: 1 rows"
    ):
        verify(tiles, catalog, GENRE)
    assert list(catalog.load_table(GENRE.identifier("training")).refs()) == ["main"]


def test_rows_of_a_day_that_the_engine_has_not_are_no_empty_day(tiles: Tiles, catalog: Catalog) -> None:
    sink(catalog, WATCH, *ROWS)
    assert verify(tiles, catalog, day=DAY + timedelta(days=1)).status == "empty"
    with pytest.raises(AuditFailed, match="3 rows, the engine has 0"):
        verify(tiles, catalog)


def test_a_sink_that_wrote_twice_is_found_and_named(tiles: Tiles, catalog: Catalog) -> None:
    """Where the platform exports, a day of which the engine holds less is leaving it; where a sink does, it is the
    sink's mistake."""
    next_day = DAY + timedelta(days=1)
    tiles.add(WATCH, [*ROWS, watch(1, next_day, 60)])
    sink(catalog, WATCH, *ROWS, watch(1, next_day, 60))
    for day in (DAY, next_day):
        assert verify(tiles, catalog, day=day).status == "verified"
    assert stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH), by_sink=True) == {}

    # One verified day a second time, and one that the engine never had.
    sink(catalog, WATCH, *ROWS)
    nobody = next_day + timedelta(days=1)
    sink(catalog, WATCH, watch(1, nobody, 60))
    assert stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH)) == {}
    stale = stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH), by_sink=True)
    assert list(stale) == [DAY, nobody]
    assert list(
        stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH), by_sink=True, until=next_day)
    ) == [DAY]
    assert stale[nobody] == ""
    with pytest.raises(
        AuditFailed,
        match=r"2026-03-10.*6 rows, the engine has 3; .*keys repeated: 3 rows.*drop it, materialize training/tables",
    ):
        verify(tiles, catalog)
    assert verify(tiles, catalog, day=next_day).status == "unchanged"

    # The sink's compaction puts it right: the same rows in another file.
    table = catalog.load_table(WATCH.identifier("training"))
    table.overwrite(
        table.scan(row_filter=f"watch_date = '{next_day}'").to_arrow(), f"watch_date >= '{next_day}'"
    )
    table.delete("watch_date = '2026-03-10'")
    sink(catalog, WATCH, *ROWS)
    assert stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH), by_sink=True) == {}
    assert [verify(tiles, catalog, day=day).status for day in (DAY, next_day)] == ["unchanged"] * 2


def test_no_table_is_an_error_with_a_remedy(tiles: Tiles, catalog: Catalog) -> None:
    with pytest.raises(TableMissing, match="does not exist"):
        verify(tiles, catalog)


def test_the_platform_may_take_a_day_over_again(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, ROWS)
    sink(catalog, WATCH, *ROWS[:2])
    # RisingWave's branch tells that a sink wrote the table: its files are not those of a stranger.
    table = catalog.load_table(WATCH.identifier("training"))
    table.manage_snapshots().create_branch(table.current_snapshot().snapshot_id, SINK_BRANCH).commit()
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    assert list(stale_days(tiles.engine, WATCH, exported_days(catalog, WATCH))) == []


def test_a_new_sink_begins_without_the_rows_of_an_earlier_one(sinks: Tiles, catalog: Catalog) -> None:
    table = prepare_for_sink(sinks.engine, catalog, WATCH)
    assert table.schema().as_struct() == WATCH.schema.as_struct()
    sinks.add(WATCH, ROWS)
    sink(catalog, WATCH, *ROWS)
    table.refresh()
    table.manage_snapshots().create_branch(table.current_snapshot().snapshot_id, SINK_BRANCH).commit()

    # While the sink is there, the branch is its own.
    sinks.execute("insert into rw_catalog.rw_sinks values (1, 'sink_training_watch')")
    assert SINK_BRANCH in prepare_for_sink(sinks.engine, catalog, WATCH).refs()
    sinks.execute("delete from rw_catalog.rw_sinks")
    for _ in range(2):
        assert list(prepare_for_sink(sinks.engine, catalog, WATCH).refs()) == ["main"]
    assert verify(sinks, catalog).status == "verified"


def test_days_that_only_the_table_has_are_kept_from_a_new_sink(sinks: Tiles, catalog: Catalog) -> None:
    earlier = DAY - timedelta(days=1)
    sinks.add(WATCH, [*ROWS, watch(1, earlier, 60)])
    sink(catalog, WATCH, *ROWS, watch(1, earlier, 60))
    prepare_for_sink(sinks.engine, catalog, WATCH)
    sinks.delete(WATCH, DAY, "viewer_id = 3")
    with pytest.raises(
        DaysAtRisk, match=f"holds 1 days, the first {DAY} and the last {DAY},.*ICEBERG_NAMESPACE"
    ):
        prepare_for_sink(sinks.engine, catalog, WATCH)
    sinks.delete(WATCH, earlier)
    with pytest.raises(DaysAtRisk, match=f"holds 2 days, the first {earlier} and the last {DAY},"):
        prepare_for_sink(sinks.engine, catalog, WATCH)
