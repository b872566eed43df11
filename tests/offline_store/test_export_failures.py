"""The table holds the old day or the new one, once, whatever happens in between."""

from __future__ import annotations

import errno
import multiprocessing
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.types import LongType, StringType
from shipped import GENRE, WATCH

from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.iceberg import export, publish
from dagster_prefs.iceberg.audit import AuditFailed, row_findings
from dagster_prefs.iceberg.catalog import (
    CatalogCorrupted,
    CatalogUnavailable,
    OfflineError,
    StorageFull,
    open_catalog,
)
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.files import read_file
from dagster_prefs.iceberg.tables import Column, SchemaChangeRefused, ensure_table
from dagster_prefs.iceberg.tiles import TilesUnreadable

from .conftest import DAY, Tiles, genre, table_rows, watch

OLD = [watch(1, DAY, 100), watch(2, DAY, 200)]
NEW = [*OLD, watch(3, DAY, 300)]


@pytest.fixture
def exported(tiles: Tiles, catalog: Catalog) -> Tiles:
    """The old day is in the table, the new one in the engine."""
    tiles.add(WATCH, OLD)
    export_day(tiles.engine, catalog, WATCH, DAY)
    tiles.add(WATCH, NEW[2:])
    return tiles


class Crash(BaseException):
    """The process is gone: nothing of ours runs any more."""


def _crash(*_: Any, **__: Any) -> None:
    raise Crash


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (publish, "_FileWriter"),
        (export, "write_day"),
        (publish, "_stage"),
        (publish, "audit_days"),
        (publish, "_make_current"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_any_step(
    exported: Tiles,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    step: str,
    when: str,
) -> None:
    real: Callable[..., Any] = getattr(module, step)

    def dies(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            real(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(module, step, dies)
        # A process that is gone tidies nothing up.
        patch.setattr(publish, "discard", _crash)
        patch.setattr(publish, "_drop_branch", _crash)
        with pytest.raises(Crash):
            export_day(exported.engine, catalog, WATCH, DAY)
    published = step == "_make_current" and when == "after"
    assert table_rows(catalog, WATCH) == (NEW if published else OLD)
    assert export_day(exported.engine, catalog, WATCH, DAY).status == (
        "unchanged" if published else "written"
    )
    assert table_rows(catalog, WATCH) == NEW


@pytest.mark.parametrize("commit", [0, 1, 2])
def test_a_lost_commit_reply(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, commit: int
) -> None:
    """The commits of an export are: make the branch, write to it, publish it."""
    real = SqlCatalog.commit_table
    count = 0

    def loses_the_reply(self: SqlCatalog, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        answer = real(self, *args, **kwargs)
        count += 1
        if count == commit + 1:
            raise ConnectionResetError("the reply was lost")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(SqlCatalog, "commit_table", loses_the_reply)
        if commit == 2:
            assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"
        else:
            with pytest.raises(CatalogUnavailable):
                export_day(exported.engine, catalog, WATCH, DAY)
            assert table_rows(catalog, WATCH) == OLD
    assert export_day(exported.engine, catalog, WATCH, DAY).status == (
        "unchanged" if commit == 2 else "written"
    )
    assert table_rows(catalog, WATCH) == NEW


@pytest.mark.parametrize("commit", [0, 1, 2])
def test_a_refused_commit_is_tried_again(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, commit: int
) -> None:
    real = SqlCatalog.commit_table
    count = 0

    def refuses(self: SqlCatalog, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == commit + 1:
            raise CommitFailedException("somebody else committed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SqlCatalog, "commit_table", refuses)
    assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"
    assert table_rows(catalog, WATCH) == NEW
    assert set(catalog.load_table(("training", WATCH.name)).refs()) == {"main"}


def test_a_disk_that_fills_up_while_rows_are_written(
    exported: Tiles, catalog: Catalog, warehouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in warehouse.rglob("*.parquet"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(StorageFull, match="no space left"):
            export_day(exported.engine, catalog, WATCH, DAY)
    assert table_rows(catalog, WATCH) == OLD
    assert sorted(path.name for path in warehouse.rglob("*.parquet")) == before
    assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"


def test_a_disk_that_is_full_when_metadata_is_written(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PyArrowFileIO.new_output

    def full(self: PyArrowFileIO, location: str) -> Any:
        if location.endswith((".avro", ".json")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, location)

    with monkeypatch.context() as patch:
        patch.setattr(PyArrowFileIO, "new_output", full)
        with pytest.raises(StorageFull):
            export_day(exported.engine, catalog, WATCH, DAY)
    assert table_rows(catalog, WATCH) == OLD
    assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([watch(4, DAY, 5), watch(4, DAY, 6)], "keys repeated"),
        ([watch(4, DAY, 5, views=1, started=2)], "content_started above views"),
        ([watch(4, DAY, 500, views=0, started=0, completed=0, genres=0)], "views below 1"),
        ([watch(4, DAY, -1)], "watch_seconds below 0"),
        ([watch(4, DAY, 5, at=86_401)], "last_event_at outside the day"),
    ],
)
def test_a_failed_audit_keeps_the_branch_and_says_why(
    exported: Tiles, catalog: Catalog, rows: list[tuple[Any, ...]], finding: str
) -> None:
    exported.add(WATCH, rows)
    with pytest.raises(AuditFailed, match=finding) as caught:
        export_day(exported.engine, catalog, WATCH, DAY)
    table = catalog.load_table(("training", WATCH.name))
    assert caught.value.branch in table.refs()
    assert caught.value.branch in str(caught.value)
    assert table.scan().count() == len(OLD)
    exported.replace(WATCH, DAY, NEW)
    assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"
    assert table_rows(catalog, WATCH) == NEW


def test_a_null_in_a_required_column_is_named(exported: Tiles, catalog: Catalog) -> None:
    exported.add(WATCH, [(987654321, DAY, 5, Decimal(1), None, 1, 1, 1, watch(4, DAY, 5)[-1])])
    with pytest.raises(TilesUnreadable, match="1 rows without views, which the contract requires") as caught:
        export_day(exported.engine, catalog, WATCH, DAY)
    # Logs are kept longer than viewers are.
    assert "987654321" not in "".join(traceback.format_exception(caught.value))
    assert table_rows(catalog, WATCH) == OLD


def test_a_value_that_the_table_cannot_hold_is_named(exported: Tiles, catalog: Catalog) -> None:
    row = list(watch(4, DAY, 5))
    row[[column.name for column in WATCH.columns].index("watch_time_minutes")] = Decimal("0.1234567")
    exported.add(WATCH, [tuple(row)])
    with pytest.raises(
        TilesUnreadable, match=r"value of watch_time_minutes that .* cannot hold .*correct the model"
    ):
        export_day(exported.engine, catalog, WATCH, DAY)
    assert table_rows(catalog, WATCH) == OLD


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([(1, "a"), (1, "b"), (2, "a"), (2, "b")], []),
        ([(1, "a"), (1, "a"), (2, "a"), (2, "a")], ["keys repeated: 2 rows"]),
        ([(2, "a"), (1, "z"), (1, "b"), (3, "a")], ["keys out of order: 2 rows"]),
        ([(1, "b"), (2, "a"), (2, "a"), (1, "c")], ["keys out of order: 1 rows", "keys repeated: 1 rows"]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_order_and_repeats_are_seen_across_batches(
    catalog: Catalog, keys: list[tuple[int, str]], expected: list[str], size: int
) -> None:
    table = ensure_table(catalog, "training", GENRE)
    names = [column.name for column in GENRE.columns]
    rows = [dict(zip(names, genre(viewer, DAY, name, 60), strict=True)) for viewer, name in keys]
    batches = pa.Table.from_pylist(rows, GENRE.arrow_schema).to_batches(size)
    totals = {name: sum(Decimal(row[name]) for row in rows) for name in GENRE.totals}
    assert sorted(row_findings(batches, table, GENRE, DAY, len(rows), totals)) == expected


def test_rows_altered_on_their_way_fail_the_audit(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pq.ParquetWriter.write_table

    def alters(self: pq.ParquetWriter, group: pa.Table, *args: Any) -> None:
        views = group.schema.get_field_index("views")
        changed = pa.array([value + 1 for value in group["views"].to_pylist()], pa.int64())
        real(self, group.set_column(views, group.schema.field(views), changed), *args)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", alters)
    with pytest.raises(AuditFailed, match="sum of views is 9, the engine has 6"):
        export_day(exported.engine, catalog, WATCH, DAY)
    assert table_rows(catalog, WATCH) == OLD


def test_two_exports_of_one_day_at_once(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have written and audited their files before either publishes."""
    real = publish._make_current
    barrier = threading.Barrier(2)
    first_time = threading.local()

    def meets(*args: Any) -> bool:
        if not getattr(first_time, "done", False):
            first_time.done = True
            barrier.wait(timeout=60)
        return real(*args)

    monkeypatch.setattr(publish, "_make_current", meets)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: export_day(exported.engine, catalog, WATCH, DAY), range(2)))
    assert sorted(report.status for report in found) == ["unchanged", "written"]
    assert table_rows(catalog, WATCH) == NEW
    table = catalog.load_table(("training", WATCH.name))
    assert set(table.refs()) == {"main"}


def _export(engine: EngineConfiguration, warehouse: str, days: list[Any], results: Any) -> None:
    catalog = open_catalog("sqlite", warehouse)
    results.put([export_day(engine, catalog, WATCH, day).status for day in days])


def test_processes_that_export_the_same_days_from_nothing(tiles: Tiles, warehouse: Path) -> None:
    days = [DAY + timedelta(days=number) for number in range(3)]
    rows = [watch(viewer, day, 60 + viewer) for day in days for viewer in range(5)]
    tiles.add(WATCH, rows)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    orders = [days, days[::-1], [days[1], days[0], days[2]]]
    processes = [
        context.Process(target=_export, args=(tiles.engine, warehouse.as_uri(), order, results))
        for order in orders
    ]
    for process in processes:
        process.start()
    found = [status for _ in processes for status in results.get(timeout=120)]
    for process in processes:
        process.join(timeout=60)
    assert found.count("written") == 3
    assert found.count("unchanged") == 6
    catalog = open_catalog("sqlite", warehouse.as_uri())
    assert table_rows(catalog, WATCH) == sorted(rows)


def test_a_first_commit_that_others_overtake_twice(
    tiles: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One makes the table's first commit instead, and then another writes to a branch."""
    tiles.add(WATCH, OLD)
    ensure_table(catalog, "training", WATCH)
    real = SqlCatalog.commit_table

    def makes_the_first() -> None:
        publish.ensure_head(catalog.load_table(("training", WATCH.name)))

    def writes_to_a_branch() -> None:
        table = catalog.load_table(("training", WATCH.name))
        head = table.current_snapshot()
        assert head is not None
        table.manage_snapshots().create_branch(head.snapshot_id, "other").commit()
        with table.transaction() as transaction:
            transaction.update_snapshot(branch="other").fast_append().commit()

    others = [makes_the_first, writes_to_a_branch]

    def overtaken(self: SqlCatalog, *args: Any, **kwargs: Any) -> Any:
        if others:
            with monkeypatch.context() as patch:
                patch.setattr(SqlCatalog, "commit_table", real)
                others.pop(0)()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SqlCatalog, "commit_table", overtaken)
    assert export_day(tiles.engine, catalog, WATCH, DAY).status == "written"
    assert not others
    assert table_rows(catalog, WATCH) == OLD


def test_an_export_of_another_day_in_between_is_kept(
    exported: Tiles, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DAY + timedelta(days=1)
    exported.add(WATCH, [watch(9, other, 900)])
    real = publish._make_current
    done = []

    def late(*args: Any) -> bool:
        if not done:
            done.append(True)
            done.append(export_day(exported.engine, catalog, WATCH, other).status)
        return real(*args)

    monkeypatch.setattr(publish, "_make_current", late)
    assert export_day(exported.engine, catalog, WATCH, DAY).status == "written"
    assert done[1:] == ["written"]
    assert table_rows(catalog, WATCH) == sorted([*NEW, watch(9, other, 900)])


def test_an_engine_that_is_down(exported: Tiles, catalog: Catalog, free_port: Callable[[], int]) -> None:
    with pytest.raises(EngineUnavailable):
        export_day(replace(exported.engine, port=free_port()), catalog, WATCH, DAY)
    assert table_rows(catalog, WATCH) == OLD


def test_damaged_metadata_is_named_and_not_overwritten(exported: Tiles, catalog: Catalog) -> None:
    location = catalog.load_table(("training", WATCH.name)).metadata_location
    path = Path(location.removeprefix("file://"))
    path.write_text(path.read_text()[:100])
    with pytest.raises(CatalogCorrupted, match=r"training\.viewer_watch_daily"):
        export_day(exported.engine, catalog, WATCH, DAY)
    path.unlink()
    with pytest.raises(CatalogCorrupted, match="refers to a missing file"):
        export_day(exported.engine, catalog, WATCH, DAY)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sqlite", "s3://bucket/path"), "needs a local warehouse"),
        (("sqlite", "/proc/nowhere"), "cannot be created"),
    ],
)
def test_a_catalog_that_cannot_be_opened(arguments: tuple[Any, str], expected: str) -> None:
    with pytest.raises(OfflineError, match=expected):
        open_catalog(*arguments)


def test_a_catalog_that_is_down(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(CatalogUnavailable, match="cannot be reached"):
        open_catalog("rest", "s3://bucket/path", uri=endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(CatalogUnavailable, match="cannot be reached"):
        open_catalog("glue", "s3://bucket/path", region="eu-central-1", endpoint_url=endpoint)


def test_a_file_that_is_no_catalog(warehouse: Path) -> None:
    warehouse.mkdir()
    (warehouse / "catalog.db").write_text("not a database " * 100)
    with pytest.raises(CatalogCorrupted, match=r"catalog\.db is damaged"):
        open_catalog("sqlite", warehouse.as_uri())


def test_a_column_that_the_tile_gained_reads_as_null_in_old_days(exported: Tiles, catalog: Catalog) -> None:
    wider = replace(WATCH, columns=(*WATCH.columns, Column("rewinds", LongType(), "Rewinds.", minimum=0)))
    exported.execute("alter table viewer_watch_metrics_1d add column rewinds bigint")
    other = DAY + timedelta(days=1)
    exported.add(wider, [(*watch(9, other, 900), 7)])
    assert export_day(exported.engine, catalog, wider, other).status == "written"
    found = {row[0]: row[-1] for row in table_rows(catalog, wider)}
    assert found == {1: None, 2: None, 9: 7}
    table = catalog.load_table(("training", WATCH.name))
    field = table.schema().find_field("rewinds")
    assert (field.required, field.doc) == (False, "Rewinds.")
    # What reads files one by one sees the same.
    batches = [
        batch
        for task in table.scan().plan_files()
        for batch in read_file(table, task.file, ["rewinds", "viewer_id"])
    ]
    read = [row for batch in batches for row in batch.to_pylist()]
    assert {row["viewer_id"]: row["rewinds"] for row in read} == found


def test_a_changed_description_reaches_the_table(exported: Tiles, catalog: Catalog) -> None:
    first, *others = WATCH.columns
    ensure_table(catalog, "training", replace(WATCH, columns=(replace(first, doc="Who watched."), *others)))
    fields = catalog.load_table(("training", WATCH.name)).schema().fields
    assert [field.doc for field in fields] == ["Who watched.", *[column.doc for column in others]]
    assert [field.field_id for field in fields] == [*range(1, len(fields) + 1)]
    assert table_rows(catalog, WATCH) == OLD


def test_a_removed_or_retyped_column_is_refused(exported: Tiles, catalog: Catalog) -> None:
    narrower = replace(WATCH, columns=WATCH.columns[:-1])
    with pytest.raises(
        SchemaChangeRefused,
        match="has the column last_event_at, which the contract of viewer_watch_metrics_1d no longer has: "
        "removing a column is a breaking change",
    ):
        export_day(exported.engine, catalog, narrower, DAY)
    retyped = replace(WATCH, columns=(*WATCH.columns[:-1], Column("last_event_at", StringType(), "")))
    with pytest.raises(
        SchemaChangeRefused,
        match="is timestamptz, the contract of viewer_watch_metrics_1d says string: retyping a column is a breaking",
    ):
        ensure_table(catalog, "training", retyped)
    assert table_rows(catalog, WATCH) == OLD
