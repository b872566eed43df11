"""Tables that other engines write to as well: what they delete is gone for every reader, what they add is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.transforms import BucketTransform
from shipped import FEATURES, SHORT, VIEWER_KEY, WATCH

from dagster_prefs.erasure.training import SubjectInTiles, SubjectInTrainingSet, search_catalog
from dagster_prefs.freshness.offline import offline_lag
from dagster_prefs.iceberg.export import (
    ExportOptions,
    ExportReport,
    export_day,
    exported_days,
    foreign_days,
    stale_days,
)
from dagster_prefs.iceberg.files import (
    LayoutForeign,
    RowsUnreadable,
    count_rows,
    day_files,
    live_files,
)
from dagster_prefs.iceberg.maintenance import maintain
from dagster_prefs.iceberg.tables import ErasedSubject, arrow_schema
from dagster_prefs.training.labels import read_labels
from dagster_prefs.training.outputs import replace_rows
from dagster_prefs.training.parity import ParityOptions, check_parity

from .conftest import DAY, Tiles, table_rows, watch
from .other_engine import add_file, commit_deletes, delete_equal, delete_positions, delete_vector
from .training_world import KEEP, NOW, at, build, fill, later, write_labels

NEXT = DAY + timedelta(days=1)
ROWS = [watch(viewer, DAY, 60 * viewer) for viewer in range(1, 7)]

Deletes = Callable[[Table, str, list[int]], DataFile]


@pytest.fixture(
    params=[
        lambda table, path, places: delete_positions(table, {path: places}),
        lambda table, path, places: delete_vector(table, path, places),
    ],
    ids=["position deletes", "deletion vector"],
)
def deletes(request: pytest.FixtureRequest) -> Deletes:
    found: Deletes = request.param
    return found


def watch_table(catalog: Catalog) -> Table:
    return catalog.load_table(WATCH.identifier("training"))


def only_path(table: Table) -> str:
    (file,) = live_files(table)
    return file.path


def delete_viewers(table: Table, deletes: Deletes, *viewers: int) -> int:
    """Delete the rows of viewers from the table's only file, whose rows lie in the order of the viewers."""
    path = only_path(table)
    held = pq.read_table(path.removeprefix("file://"))["viewer_id"].to_pylist()
    return commit_deletes(table, deletes(table, path, [held.index(viewer) for viewer in viewers]))


def tile(*rows: tuple[Any, ...], table: Table) -> pa.Table:
    names = [column.name for column in WATCH.columns]
    return pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) for row in rows], schema=arrow_schema(table)
    )


def append(catalog: Catalog, *rows: tuple[Any, ...]) -> None:
    """What another writer adds, with pyiceberg, under names of its own."""
    table = watch_table(catalog)
    table.append(tile(*rows, table=table))


def export(tiles: Tiles, catalog: Catalog, **options: Any) -> ExportReport:
    return export_day(tiles.engine, catalog, WATCH, DAY, options=ExportOptions(**options))


def test_a_deleted_row_is_in_no_training_set(catalog: Catalog, tmp_path: Path, deletes: Deletes) -> None:
    fill(catalog, {WATCH.name: ROWS})
    labels = write_labels(tmp_path, [(viewer, at(NEXT)) for viewer in range(1, 7)])
    _, before = build(catalog, labels, tmp_path)
    assert [row[f"watch_minutes_{SHORT}d"] for row in before] == list(map(Decimal, range(1, 7)))
    delete_viewers(watch_table(catalog), deletes, 2, 5)
    _, after = build(catalog, labels, tmp_path)
    assert [row[f"watch_minutes_{SHORT}d"] for row in after] == [1, 0, 3, 4, 0, 6]


def test_as_known_sees_a_row_until_it_was_deleted(catalog: Catalog, tmp_path: Path, deletes: Deletes) -> None:
    day = datetime.now(UTC).date() - timedelta(days=1)
    fill(catalog, {WATCH.name: [watch(1, day, 60), watch(2, day, 120)]})
    known = datetime.now(UTC)
    time.sleep(0.01)
    delete_viewers(watch_table(catalog), deletes, 2)
    now = datetime.now(UTC) + timedelta(milliseconds=10)
    labels = write_labels(tmp_path, [(1, known), (2, known), (1, now), (2, now)])
    _, rows = build(catalog, labels, tmp_path, as_known=True, now=now + timedelta(days=1))
    assert [row[f"watch_minutes_{SHORT}d"] for row in rows] == [1, 2, 1, 0]


def test_parity_does_not_count_deleted_rows(tiles: Tiles, catalog: Catalog, deletes: Deletes) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    # Only the table has the day now.
    tiles.delete(WATCH, DAY)
    delete_viewers(watch_table(catalog), deletes, 2, 5)
    report = check_parity(
        tiles.engine, catalog, lambda viewers: {}, features=FEATURES, now=at(NEXT), options=ParityOptions(1.0)
    )
    assert (report.subjects, report.missing["watch"]) == (4, 4)


def test_compaction_leaves_a_day_with_deletes(tiles: Tiles, catalog: Catalog, deletes: Deletes) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    table = watch_table(catalog)
    delete_viewers(table, deletes, 2, 5)
    append(catalog, watch(9, DAY, 60))
    report = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert (report.days_compacted, report.days_foreign) == ((), (DAY,))
    # The delete file is one that the metadata names.
    assert table_rows(catalog, WATCH) == [row for row in ROWS if row[0] not in (2, 5)] + [watch(9, DAY, 60)]


def test_an_erasure_keeps_what_another_engine_deleted(
    tiles: Tiles, catalog: Catalog, deletes: Deletes
) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    delete_viewers(watch_table(catalog), deletes, 2, 5)
    done = SubjectInTiles(catalog, WATCH, ErasedSubject(VIEWER_KEY, 3, NOW), tiles.engine).erase()
    assert done.days_rewritten == (DAY,)
    assert [row[0] for row in table_rows(catalog, WATCH)] == [1, 4, 6]
    # The rest of the day is still not what this platform exported.
    assert exported_days(catalog, WATCH)[DAY].foreign
    assert SubjectInTiles(catalog, WATCH, ErasedSubject(VIEWER_KEY, 3, NOW), tiles.engine).holding().rows == 0


def test_what_may_be_read_here_is_read_in_tables_of_others(
    catalog: Catalog, tmp_path: Path, deletes: Deletes
) -> None:
    catalog.create_namespace("ml")
    table = catalog.create_table("ml.labels", pq.read_schema(write_labels(tmp_path, [(1, NOW)])))
    table.append(pq.read_table(write_labels(tmp_path, [(viewer, at(NEXT)) for viewer in range(1, 5)])))
    delete_viewers(table, deletes, 2)
    assert read_labels(catalog, "ml.labels", features=FEATURES, now=NOW)["viewer_id"].to_pylist() == [1, 3, 4]
    assert search_catalog(catalog, ErasedSubject(VIEWER_KEY, 2, NOW)).holding == ()
    assert search_catalog(catalog, ErasedSubject(VIEWER_KEY, 3, NOW)).holding == ("ml.labels",)
    ours = catalog.create_table("ml.set", table.schema())
    replace_rows(
        ours, pq.read_table(write_labels(tmp_path, [(v, at(NEXT)) for v in (1, 2, 3)])).to_batches(), {}
    )
    delete_viewers(catalog.load_table("ml.set"), deletes, 3)
    SubjectInTrainingSet(catalog, "ml.set", ErasedSubject(VIEWER_KEY, 1, NOW)).erase()
    assert catalog.load_table("ml.set").scan().to_arrow()["viewer_id"].to_pylist() == [2]


def test_equality_deletes_are_refused_by_every_reader(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    table = watch_table(catalog)
    delete = delete_equal(table, DAY, viewer_id=[2])
    snapshot = commit_deletes(table, delete)
    labels = write_labels(tmp_path, [(1, at(NEXT))])
    readers: dict[str, Callable[[], Any]] = {
        "training set": lambda: build(catalog, labels, tmp_path),
        "as known": lambda: build(catalog, labels, tmp_path, as_known=True),
        "erasure": lambda: SubjectInTiles(
            catalog, WATCH, ErasedSubject(VIEWER_KEY, 3, NOW), tiles.engine
        ).erase(),
        "rows": lambda: count_rows(table, day_files(table, WATCH, DAY)),
    }
    for name, reader in readers.items():
        with pytest.raises(RowsUnreadable) as caught:
            reader()
        said = str(caught.value)
        assert "training.viewer_watch_daily" in said, name
        assert str(snapshot) in said, (name, said)
        assert delete.file_path in said
        assert "--replace-foreign" in said
    # Parity reads the day from the engine, which has it.
    report = check_parity(
        tiles.engine, catalog, lambda viewers: {}, features=FEATURES, now=at(NEXT), options=ParityOptions(1.0)
    )
    assert (report.subjects, report.engine_days[WATCH.name]) == (6, (DAY,))
    tiles.delete(WATCH, DAY)
    with pytest.raises(RowsUnreadable):
        check_parity(
            tiles.engine,
            catalog,
            lambda viewers: {},
            features=FEATURES,
            now=at(NEXT),
            options=ParityOptions(1.0),
        )
    found = export(tiles, catalog)
    assert (found.status, found.rows) == ("foreign", None)
    assert delete.file_path in found.reason


def test_equality_deletes_of_tables_of_others_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    catalog.create_namespace("ml")
    rows = pq.read_table(write_labels(tmp_path, [(1, at(NEXT))]))
    for name in ("labels", "set"):
        table = catalog.create_table(f"ml.{name}", rows.schema)
        replace_rows(table, rows.to_batches(), {}) if name == "set" else table.append(rows)
        table = catalog.load_table(f"ml.{name}")
        delete = delete_equal(table, DAY, viewer_id=[1])
        delete.partition._data.clear()
        commit_deletes(table, delete)
    with pytest.raises(RowsUnreadable, match=r"ml\.labels has rows that another engine deleted by equality"):
        read_labels(catalog, "ml.labels", features=FEATURES, now=NOW)
    with pytest.raises(RowsUnreadable, match=r"ml\.set has rows"):
        SubjectInTrainingSet(catalog, "ml.set", ErasedSubject(VIEWER_KEY, 1, NOW)).erase()
    assert (
        "deleted by equality"
        in search_catalog(catalog, ErasedSubject(VIEWER_KEY, 1, NOW)).unread["ml.labels"]
    )
    # A training set that is written anew needs nothing of what was there.
    replace_rows(catalog.load_table("ml.set"), rows.to_batches(), {})
    table = catalog.load_table("ml.set")
    assert count_rows(table, live_files(table)) == 1


def test_a_delete_of_what_is_gone_is_no_obstacle(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    tiles.add(WATCH, [*ROWS, watch(1, NEXT, 60)])
    for day in (DAY, NEXT):
        export_day(tiles.engine, catalog, WATCH, day)
    commit_deletes(watch_table(catalog), delete_equal(watch_table(catalog), DAY, viewer_id=[2]))
    # Another day is none of its business.
    _, rows = build(catalog, write_labels(tmp_path, [(1, at(NEXT + timedelta(days=60)))]), tmp_path)
    assert rows[0][f"watch_minutes_{SHORT}d"] == 0
    assert exported_days(catalog, WATCH)[NEXT].rows == 1
    assert export(tiles, catalog, replace_foreign=True).status == "written"
    _, rows = build(catalog, write_labels(tmp_path, [(2, at(NEXT))]), tmp_path)
    assert rows[0][f"watch_minutes_{SHORT}d"] == 2
    assert export(tiles, catalog).status == "unchanged"
    assert maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP).days_foreign == ()


def test_a_delete_file_that_cannot_be_read_is_named(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: ROWS})
    table = watch_table(catalog)
    delete = delete_vector(table, only_path(table), [0], codec="lz4")
    commit_deletes(table, delete)
    labels = write_labels(tmp_path, [(1, at(NEXT))])
    with pytest.raises(RowsUnreadable, match=r"cannot be read \(Unsupported puffin compression codec"):
        build(catalog, labels, tmp_path)


@pytest.mark.parametrize("more_in_engine", [False, True])
def test_rows_of_somebody_else_are_named_and_taken_back(
    tiles: Tiles, catalog: Catalog, more_in_engine: bool
) -> None:
    tiles.add(WATCH, ROWS)
    first = export(tiles, catalog)
    append(catalog, watch(50, DAY, 600), watch(51, DAY, 600))
    if more_in_engine:
        tiles.add(WATCH, [watch(n, DAY, 60) for n in range(20, 40)])
    (strange,) = [
        file.path for file in live_files(watch_table(catalog)) if first.fingerprint not in file.path
    ]

    exported = exported_days(catalog, WATCH)
    assert exported[DAY].token is None
    stale = stale_days(tiles.engine, WATCH, exported)
    assert list(foreign_days(exported, stale)) == [DAY]
    before = table_rows(catalog, WATCH)
    for options in ({}, {"allow_loss": True}):
        left = export(tiles, catalog, **options)
        assert left.status == "foreign"
        assert left.reason == f"data files that this platform did not add: {strange}"
    # Neither upkeep nor an erasure makes them ours.
    maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert table_rows(catalog, WATCH) == before
    assert export(tiles, catalog).status == "foreign"

    done = export(tiles, catalog, replace_foreign=True)
    assert done.status == "written"
    assert table_rows(catalog, WATCH) == sorted(
        [*ROWS, *([watch(n, DAY, 60) for n in range(20, 40)] if more_in_engine else [])]
    )
    assert export(tiles, catalog).status == "unchanged"
    assert foreign_days(exported_days(catalog, WATCH), {}) == {}


def test_an_erasure_does_not_make_rows_of_somebody_else_ours(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    append(catalog, watch(50, DAY, 600))
    tiles.delete(WATCH, DAY)
    SubjectInTiles(catalog, WATCH, ErasedSubject(VIEWER_KEY, 3, NOW), tiles.engine).erase()
    assert [row[0] for row in table_rows(catalog, WATCH)] == [1, 2, 4, 5, 6, 50]
    assert export(tiles, catalog).status == "foreign"


def test_days_that_the_engine_lost_go_back_to_our_own_export(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [*ROWS, watch(-1, DAY, 5)])
    first = export(tiles, catalog)
    append(catalog, watch(50, DAY, 600))
    table = watch_table(catalog)
    (ours,) = [file.path for file in live_files(table) if str(first.fingerprint) in file.path]
    commit_deletes(table, delete_positions(table, {ours: [0, 1]}))
    tiles.delete(WATCH, DAY, "viewer_id > 2")
    tiles.execute("insert into erased_subjects values ('viewer', '4', now())")
    found = export(tiles, catalog)
    assert found.status == "foreign"
    assert "data files that this platform did not add" in found.reason
    assert "delete files of another engine" in found.reason

    done = export(tiles, catalog, replace_foreign=True)
    assert done.status == "restored"
    assert "the engine has 2 rows of this day, the table 6" in done.reason
    # All of ours, and nobody who was erased meanwhile.
    assert table_rows(catalog, WATCH) == [row for row in ROWS if row[0] != 4]
    again = export(tiles, catalog, replace_foreign=True)
    assert (again.status, again.rows) == ("retained", 5)


def test_a_day_that_was_overwritten_elsewhere_comes_back_from_the_history(
    tiles: Tiles, catalog: Catalog
) -> None:
    tiles.add(WATCH, ROWS)
    first = export(tiles, catalog)
    tiles.delete(WATCH, DAY)
    table = watch_table(catalog)
    table.overwrite(tile(watch(1, DAY, 1), table=table), f"watch_date = '{DAY}'")
    assert export(tiles, catalog).status == "foreign"
    done = export(tiles, catalog, replace_foreign=True)
    assert (done.status, done.fingerprint) == ("restored", first.fingerprint)
    assert table_rows(catalog, WATCH) == ROWS

    # Once the snapshot is gone there is nothing to go back to, and that is said.
    table = watch_table(catalog)
    table.overwrite(tile(watch(1, DAY, 1), table=table), f"watch_date = '{DAY}'")
    maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    lost = export(tiles, catalog, replace_foreign=True)
    assert lost.status == "foreign"
    assert "no snapshot holds its own export any more" in lost.reason
    assert table_rows(catalog, WATCH) == [watch(1, DAY, 1)]


def test_a_day_that_was_removed_elsewhere_is_exported_again_or_named(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [*ROWS, watch(1, NEXT, 60)])
    for day in (DAY, NEXT):
        export_day(tiles.engine, catalog, WATCH, day)
    watch_table(catalog).delete(f"watch_date = '{DAY}'")
    snapshot = watch_table(catalog).current_snapshot()
    assert snapshot is not None
    exported = exported_days(catalog, WATCH)
    stale = stale_days(tiles.engine, WATCH, exported)
    # The engine has all of it: an export like any other.
    assert (list(stale), foreign_days(exported, stale)) == ([DAY], {})
    lag = offline_lag(tiles.engine, catalog, WATCH, namespace="training", start=DAY, now=at(NEXT, 48))
    assert (lag.missing, lag.changed, lag.foreign) == ((DAY,), (), {})
    assert export(tiles, catalog).status == "written"

    watch_table(catalog).delete(f"watch_date = '{DAY}'")
    snapshot = watch_table(catalog).current_snapshot()
    assert snapshot is not None
    tiles.delete(WATCH, DAY, "viewer_id > 2")
    exported = exported_days(catalog, WATCH)
    stale = stale_days(tiles.engine, WATCH, exported)
    said = f"snapshot {snapshot.snapshot_id} of another writer (delete) removed its 6 rows"
    assert {day: str(found) for day, found in foreign_days(exported, stale).items()} == {DAY: said}
    left = export(tiles, catalog)
    assert (left.status, left.reason) == (
        "foreign", f"{said}; the engine has 2 rows of this day, the table 6"
    )  # fmt: skip
    assert export(tiles, catalog, replace_foreign=True).status == "restored"
    assert [row for row in table_rows(catalog, WATCH) if row[1] == DAY] == ROWS


def test_a_part_of_a_day_that_is_gone_is_noticed(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles.add(WATCH, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr("dagster_prefs.iceberg.publish.FILE_BYTES", 1)
        patch.setattr("dagster_prefs.iceberg.publish.ROWS_PER_GROUP", 2)
        assert export(tiles, catalog).files > 1
    # Pyiceberg drops a file whose every row goes.
    watch_table(catalog).delete("viewer_id >= 5")
    left = export(tiles, catalog)
    assert (left.status, left.reason) == ("foreign", "2 rows of its export were deleted with their files")
    assert export(tiles, catalog, replace_foreign=True).status == "written"
    assert table_rows(catalog, WATCH) == ROWS


def test_files_of_an_earlier_export_that_come_back_are_noticed(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    table = watch_table(catalog)
    old = only_path(table)
    tiles.add(WATCH, [watch(9, DAY, 60)])
    export(tiles, catalog)
    # Under its own name, as `add_files` or a restored copy would bring it.
    name = "watch_date=2026-03-10/" + old.rpartition("/")[2]
    Path(old.removeprefix("file://")).unlink()
    rows = tile(*ROWS, table=table)
    plain = rows.cast(pa.schema([pa.field(f.name, f.type, f.nullable) for f in rows.schema]))
    add_file(watch_table(catalog), name, plain)
    assert len(table_rows(catalog, WATCH)) == 13
    assert "did not add" in export(tiles, catalog).reason
    assert export(tiles, catalog, replace_foreign=True).status == "written"
    assert len(table_rows(catalog, WATCH)) == 7


def test_files_of_earlier_versions_of_this_platform_are_ours(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "dagster_prefs.iceberg.publish.file_name",
            lambda token, write, rows, number: f"{token}-{write}-{number:05}.parquet",
        )
        tiles.add(WATCH, ROWS)
        assert export(tiles, catalog).status == "written"
    assert export(tiles, catalog).status == "unchanged"
    assert exported_days(catalog, WATCH)[DAY].rows == 6


def test_another_layout_is_refused(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    with watch_table(catalog).update_spec() as change:
        change.add_field("viewer_id", BucketTransform(4), "bucket")
    tiles.add(WATCH, [watch(9, DAY, 60)])
    with pytest.raises(LayoutForeign, match=r"is partitioned by \(watch_date, bucket\)"):
        export(tiles, catalog)
    # By day still, so that it is read.
    _, rows = build(catalog, write_labels(tmp_path, [(2, at(NEXT))]), tmp_path)
    assert rows[0][f"watch_minutes_{SHORT}d"] == 2
    with watch_table(catalog).update_spec() as change:
        change.remove_field("bucket")
        change.remove_field("watch_date")
    append(catalog, watch(9, DAY, 60))
    with pytest.raises(LayoutForeign, match="is not partitioned by watch_date"):
        build(catalog, write_labels(tmp_path, [(2, at(NEXT))]), tmp_path)


def test_a_table_of_version_3_is_read_and_not_written(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    # Pyiceberg does not upgrade to it, either.
    metadata = Path(watch_table(catalog).metadata_location.removeprefix("file://"))
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(content | {"format-version": 3, "next-row-id": 0}))
    tiles.add(WATCH, [watch(9, DAY, 60)])
    with pytest.raises(LayoutForeign, match="has Iceberg format version 3"):
        export(tiles, catalog)
    _, rows = build(catalog, write_labels(tmp_path, [(2, at(NEXT))]), tmp_path)
    assert rows[0][f"watch_minutes_{SHORT}d"] == 2


def test_a_lost_race_with_a_delete_is_not_published(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, deletes: Deletes
) -> None:
    """Rows that were deleted while a day was being rewritten do not come back."""
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    from dagster_prefs.erasure import training as forget

    real, calls = forget.write_day, []

    def write(*given: Any) -> None:
        real(*given)
        if not calls:
            calls.append(1)
            delete_viewers(watch_table(catalog), deletes, 5)

    monkeypatch.setattr(forget, "write_day", write)
    tiles.delete(WATCH, DAY)
    SubjectInTiles(catalog, WATCH, ErasedSubject(VIEWER_KEY, 3, NOW), tiles.engine).erase()
    assert [row[0] for row in table_rows(catalog, WATCH)] == [1, 2, 4, 6]


def test_freshness_names_the_days(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, ROWS)
    export(tiles, catalog)
    append(catalog, watch(50, DAY, 600))
    lag = offline_lag(tiles.engine, catalog, WATCH, namespace="training", start=DAY, now=at(NEXT, 24))
    assert (lag.missing, lag.changed, list(lag.foreign)) == ((), (), [DAY])
    assert "data files that this platform did not add" in lag.foreign[DAY]
    by_sink = offline_lag(
        tiles.engine, catalog, WATCH, namespace="training", start=DAY, now=at(NEXT, 24), by_sink=True
    )
    assert by_sink.foreign == {}
