"""A range of days of one table is exported with one audited commit, and a bad day does not hold up the others."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from shipped import GENRE, WATCH

from dagster_prefs.iceberg import export, publish
from dagster_prefs.iceberg.audit import AuditFailed
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.export import (
    DaysFailed,
    ExportConflict,
    ExportReport,
    export_day,
    export_days,
    exported_days,
)
from dagster_prefs.iceberg.exporter import Exporter
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.iceberg.tiles import DayUnreadable

from .conftest import DAY, Tiles, genre, table_rows, watch

DAYS = [DAY + timedelta(days=number) for number in range(5)]


def rows_of(*days: date) -> list[tuple[Any, ...]]:
    return [watch(viewer, day, 60 + viewer) for day in days for viewer in range(3)]


def watch_table(catalog: Catalog) -> Table:
    return catalog.load_table(("training", WATCH.name))


def export_all(tiles: Tiles, catalog: Catalog, days: list[date] = DAYS) -> list[ExportReport]:
    return list(export_days(tiles.engine, catalog, WATCH, days))


def statuses(reports: list[ExportReport]) -> dict[date, str]:
    return {report.day: report.status for report in reports}


def publications(catalog: Catalog) -> int:
    return len(watch_table(catalog).history())


def test_a_range_is_one_commit_that_says_what_is_in_it(tiles: Tiles, catalog: Catalog) -> None:
    held = [DAYS[0], DAYS[1], DAYS[3]]
    tiles.add(WATCH, rows_of(*held))
    reports = export_all(tiles, catalog, [*DAYS, DAYS[0]])
    assert statuses(reports) == {day: "written" if day in held else "empty" for day in DAYS}
    assert table_rows(catalog, WATCH) == sorted(rows_of(*held))
    table = watch_table(catalog)
    assert set(table.refs()) == {"main"}
    # The first entry is the empty commit at which branches start.
    assert publications(catalog) == 2
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert {report.snapshot_id for report in reports} == {snapshot.snapshot_id}
    said = json.loads(snapshot.summary["prefs.days"])
    assert {day: (found["fingerprint"], found["row-count"]) for day, found in said.items()} == {
        report.day.isoformat(): (report.fingerprint, "3") for report in reports if report.status == "written"
    }
    assert snapshot.summary["prefs.operation"] == "export"
    assert {day: found.token for day, found in exported_days(catalog, WATCH).items()} == {
        report.day: report.fingerprint for report in reports if report.status == "written"
    }

    before = table.metadata_location
    assert set(statuses(export_all(tiles, catalog)).values()) == {"unchanged", "empty"}
    assert watch_table(catalog).metadata_location == before
    tiles.add(WATCH, [watch(9, DAYS[1], 60)])
    assert [day for day, status in statuses(export_all(tiles, catalog)).items() if status == "written"] == [
        DAYS[1]
    ]
    assert watch_table(catalog).current_snapshot().summary["prefs.day"] == DAYS[1].isoformat()


def test_days_that_cannot_be_exported_are_left_out_and_named(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, rows_of(DAYS[2]))
    export_day(tiles.engine, catalog, WATCH, DAYS[2])
    tiles.add(WATCH, rows_of(*DAYS[:2], *DAYS[3:]))
    null = list(watch(8, DAYS[1], 60))
    null[4] = None
    tiles.add(WATCH, [tuple(null), watch(1, DAYS[2], 5)])
    tiles.add(WATCH, [watch(7, DAYS[3], 60)], refresh=False)
    reports = export_all(tiles, catalog)
    assert list(statuses(reports).values()) == ["written", "failed", "failed", "failed", "written"]
    unread, refused, apart = reports[1:4]
    assert isinstance(unread.error, DayUnreadable)
    assert "1 rows without views" in unread.reason
    assert isinstance(refused.error, AuditFailed)
    assert "keys repeated: 1 rows" in refused.reason
    assert isinstance(apart.error, DayUnreadable)
    assert "does not describe" in apart.reason
    # The failed day stays as readers saw it, and the branch keeps what failed.
    assert table_rows(catalog, WATCH) == sorted(rows_of(DAYS[0], DAYS[2], DAYS[4]))
    table = watch_table(catalog)
    assert set(table.refs()) == {"main", refused.error.branch}
    kept = table.scan(snapshot_id=table.refs()[refused.error.branch].snapshot_id).to_arrow()
    assert kept.num_rows == 3 + 4 + 3
    assert publications(catalog) == 3

    told = str(DaysFailed({(WATCH.name, report.day): report.reason for report in reports[1:4]}))
    assert told.startswith("3 days were not exported and stay as they are, every other day was exported (")
    assert all(f"{WATCH.name} of {day}: " in told for day in DAYS[1:4])

    for day in DAYS[1:4]:
        tiles.replace(WATCH, day, rows_of(day))
    assert list(statuses(export_all(tiles, catalog)).values()) == [
        "unchanged", "written", "unchanged", "written", "unchanged"
    ]  # fmt: skip
    assert table_rows(catalog, WATCH) == sorted(rows_of(*DAYS))


@pytest.mark.parametrize(
    ("bound", "value", "sizes"), [("DAYS_PER_COMMIT", 2, [2, 2, 1]), ("ROWS_PER_COMMIT", 7, [3, 2])]
)
def test_a_commit_is_bounded(
    tiles: Tiles,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    value: int,
    sizes: list[int],
) -> None:
    tiles.add(WATCH, rows_of(*DAYS))
    monkeypatch.setattr(export, bound, value)
    reports = export_all(tiles, catalog)
    assert set(statuses(reports).values()) == {"written"}
    by_commit: dict[int | None, int] = {}
    for report in reports:
        by_commit[report.snapshot_id] = by_commit.get(report.snapshot_id, 0) + 1
    assert list(by_commit.values()) == sizes
    assert table_rows(catalog, WATCH) == sorted(rows_of(*DAYS))


def test_a_day_that_another_export_took_in_between_is_read_again_alone(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles.add(WATCH, rows_of(*DAYS))
    real = publish._make_current
    done: list[str] = []

    def late(*args: Any) -> bool:
        if not done:
            done.append("started")
            done.append(export_day(tiles.engine, catalog, WATCH, DAYS[2]).status)
            # What the range has read of this day is outdated from here on.
            tiles.add(WATCH, [watch(9, DAYS[2], 60)])
        return real(*args)

    monkeypatch.setattr(publish, "_make_current", late)
    reports = export_all(tiles, catalog)
    assert done[1:] == ["written"]
    assert set(statuses(reports).values()) == {"written"}
    assert [report.attempts for report in sorted(reports, key=lambda report: report.day)] == [1, 1, 2, 1, 1]
    assert table_rows(catalog, WATCH) == sorted([*rows_of(*DAYS), watch(9, DAYS[2], 60)])


def test_a_day_that_others_keep_taking_is_left_out(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles.add(WATCH, rows_of(*DAYS[:2]))
    real = export.publish_days

    def taken(table: Table, spec: Any, changes: Any, **given: Any) -> Any:
        return real(table, spec, [change for change in changes if change.day != DAYS[1]], **given)

    monkeypatch.setattr(export, "publish_days", taken)
    first, second = export_all(tiles, catalog, DAYS[:2])
    assert (first.status, second.status, second.attempts) == ("written", "failed", publish.ATTEMPTS)
    assert isinstance(second.error, ExportConflict)
    assert table_rows(catalog, WATCH) == sorted(rows_of(DAYS[0]))


def test_all_tables_are_exported_without_dagster_and_a_day_or_table_that_fails_holds_up_no_other(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Exporter(
        engine=tiles.engine,
        catalog=lambda: catalog,
        tables={spec.name: spec for spec in (GENRE, WATCH)},
        namespace="training",
        start=DAYS[1],
        by_sink=False,
        kept=timedelta(days=30),
    )
    now = datetime(DAYS[4].year, DAYS[4].month, DAYS[4].day, 23, 59, tzinfo=UTC)
    tiles.add(WATCH, rows_of(*DAYS))
    tiles.add(GENRE, [genre(1, day, "drama", 60) for day in DAYS])
    # The day before the first, and the day that is not over, are nobody's business.
    complete = {(spec.name, day) for spec in (GENRE, WATCH) for day in DAYS[1:4]}
    found = exporter.look(now)
    assert (set(found.stale), found.foreign, found.current) == (complete, {}, {})

    tiles.add(WATCH, [watch(7, DAYS[2], 60)], refresh=False)
    said: list[str] = []
    with monkeypatch.context() as patch:
        whole = export.ensure_table

        def refused(asked: Catalog, namespace: str, spec: TileTable) -> Table:
            if spec == GENRE:
                raise OfflineError("the catalog refuses this table")
            return whole(asked, namespace, spec)

        patch.setattr(export, "ensure_table", refused)
        with pytest.raises(DaysFailed, match="4 days were not exported") as failed:
            exporter.export(found.stale, say=said.append)
    assert "the catalog refuses this table" in str(failed.value)
    assert len(said) == 4
    assert f"{WATCH.name} {DAYS[2]} stays as it is: tile_fingerprints does not describe" in said[-1]
    assert table_rows(catalog, WATCH) == sorted(rows_of(DAYS[1], DAYS[3]))

    tiles.refresh(WATCH)
    found = exporter.look(now)
    assert set(found.stale) == complete - {(WATCH.name, DAYS[1]), (WATCH.name, DAYS[3])}
    assert found.current == {(WATCH.name, DAYS[1]): 3, (WATCH.name, DAYS[3]): 3}
    exporter.export(found.stale)
    found = exporter.look(now)
    assert (found.stale, set(found.current)) == ({}, complete)
