"""One subject is erased everywhere, nobody else is touched, and nothing brings it back."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from erased_world import (
    AHEAD,
    ALONE,
    ERASED_AT,
    ERASURE,
    MESSAGES,
    OLD,
    OWNED,
    PARTED,
    TODAY,
    USER,
    VIEWER,
    World,
    expected_rows,
    like,
    redacted,
    view,
    without,
)
from oracle import DAY, HOUR, Erasure, Message, Oracle
from psycopg import sql
from relations import RAW_TABLES, insert_events, instant
from shipped import FEATURES, REGISTRY, TILE_TABLES, WATCH
from streams import NOW

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.publisher import publish_lock
from dagster_prefs.dynamodb.tables import dynamodb_client
from dagster_prefs.erasure import training as erasure_of_training
from dagster_prefs.erasure.erase import ErasureIncomplete, ErasureReport, erase
from dagster_prefs.erasure.events import Subject, SubjectRefused
from dagster_prefs.erasure.export import export_subject
from dagster_prefs.erasure.items import EntityItems
from dagster_prefs.erasure.training import ErasedTable, SubjectInTable, SubjectInTiles, files_holding
from dagster_prefs.events.ingest import ingest_file
from dagster_prefs.iceberg import export as export_module
from dagster_prefs.iceberg.catalog import CatalogUnavailable, OfflineError
from dagster_prefs.iceberg.export import SINK_BRANCH, ExportOptions, export_day
from dagster_prefs.iceberg.files import day_files, parts_of, read_rows
from dagster_prefs.iceberg.publish import DayChange, DayFiles, publish_day, write_day
from dagster_prefs.iceberg.tables import ErasedSubject, arrow_schema
from dagster_prefs.iceberg.tiles import TilesUnreadable
from dagster_prefs.served_rows import ServedRow
from dagster_prefs.training.training_set import (
    LabelJoin,
    SnapshotExpired,
    TrainingSet,
    build_training_set,
    reproduce_training_set,
)
from dagster_prefs.values.collect import collect_tiles, collect_views
from dagster_prefs.values.store import described_days, read_statistics

# Spelled so that every way to write the user's name is found.
USER_TRACES = (re.escape(USER), r"Zo\\+u00eb/gone", r"Zo\\303\\253/gone")


def in_watch(report: ErasureReport) -> ErasedTable:
    return {table.table: table for table in report.tables}["training.viewer_watch_daily"]


def served_row(viewer: int) -> bytes:
    """A line of the served log."""
    row = ServedRow(
        f"log-{viewer}", instant(NOW), 0.001, "viewer", str(viewer), "engagement#watch", 1, "found", None, {}, 5, (),
        False, False, None, None,
    )  # fmt: skip
    return row.as_json() + b"\n"


def test_a_viewer_is_erased_and_nobody_else(world: World, tmp_path: Path) -> None:
    left = world.leave_the_engine()
    before, items = world.all_rows(), world.items()
    assert world.traces(str(VIEWER))
    log = {
        "served-1.jsonl": served_row(VIEWER) + served_row(123),
        "served-2.jsonl.gz": gzip.compress(served_row(123) + 2 * served_row(VIEWER)),
        "served-3.jsonl": served_row(123),
        "served-4.jsonl.open": served_row(VIEWER) + served_row(VIEWER)[:20],
    }
    for name, content in log.items():
        (tmp_path / name).write_bytes(content)
    stores = world.stores(served_log=("files", str(tmp_path)))
    subject = Subject.named(REGISTRY, "viewer", str(VIEWER))
    exported = export_subject(stores, subject, now=instant(NOW)).as_dict()
    assert [row["row_id"] for row in exported["served_log"][str(tmp_path)]] == [f"log-{VIEWER}"] * 4
    untouched = (tmp_path / "served-3.jsonl").stat().st_ino
    report = erase(stores, subject, now=instant(ERASED_AT))
    assert (tmp_path / "served-1.jsonl").read_bytes() == served_row(123)
    assert gzip.decompress((tmp_path / "served-2.jsonl.gz").read_bytes()) == served_row(123)
    assert (tmp_path / "served-3.jsonl").stat().st_ino == untouched
    assert (tmp_path / "served-4.jsonl.open").read_bytes() == log["served-4.jsonl.open"]
    assert report.unfinished["1 rows in files of the served log that are still written"]

    # Every relation of the engine, rejected messages and progress included, as if the messages said nothing.
    messages = redacted(left, "viewer")
    oracle = Oracle(messages, NOW, erased=[ERASURE])
    assert world.differences(messages, [ERASURE]) == {}
    # DynamoDB: nobody else's item changed before the next publish, and then only that of the shared event.
    assert world.items() == {key: item for key, item in items.items() if key[0] != VIEWER}
    world.publish()
    assert {key for key, item in world.items().items() if items[key] != item} == {
        (123, "engagement#watch"),
        (123, "engagement#preferences"),
        (123, "engagement#sequence"),
    }
    # Iceberg: every other row of every day.
    expected_rows(world, before, oracle)
    assert world.traces(str(VIEWER)) == []

    counts = {(h.place, h.unit): (h.before, h.after) for h in report.holdings}
    owned = [m for m, owner in left if owner == "viewer"]
    for topic, raw in (("view_events", "raw_view_events"), ("user.events", "raw_user_events")):
        assert counts[raw, "messages"] == (sum(m.topic == topic for m in owned), 0)
    assert counts["viewer_profiles", "items"] == (len(world.contract.domains), 0)
    assert counts[str(tmp_path), "rows"] == (3, 0)
    assert counts["training.viewer_watch_daily", "rows"] == (
        sum(row[0] == VIEWER for row in before["viewer_watch_daily"]),
        0,
    )
    assert all(after == 0 for _, after in counts.values())
    assert instant(AHEAD) == report.erased_at
    done = in_watch(report)
    assert done.days_from_engine == (TODAY,)
    assert done.days_rewritten == (OLD, PARTED, ALONE)
    assert {"Kafka topics", "DynamoDB point-in-time recovery", "PostgreSQL"} <= set(report.unfinished)
    # The report has no content: none of the messages' own fields.
    assert not re.search("drama|odd-|w-777", json.dumps(report.as_dict()))

    # The next exports commit nothing, neither the days that the engine has nor those that it lost.
    heads = {name: world.catalog.load_table(spec.identifier("training")).current_snapshot().snapshot_id
             for name, spec in TILE_TABLES.items()}  # fmt: skip
    assert world.export() == []
    for spec in TILE_TABLES.values():
        for day in (OLD, PARTED, TODAY):
            assert export_day(world.engine, world.catalog, spec, day).status in ("retained", "unchanged")
        table = world.catalog.load_table(spec.identifier("training"))
        assert table.current_snapshot().snapshot_id == heads[spec.name]

    # A second time does nothing and says so.
    refreshes = world.refreshes
    again = world.erase(at=ERASED_AT + DAY)
    assert (again.held, again.first_erased, again.erased_at) == (False, False, report.erased_at)
    assert world.refreshes == refreshes
    assert world.differences(messages, [ERASURE]) == {}
    for spec in TILE_TABLES.values():
        table = world.catalog.load_table(spec.identifier("training"))
        assert table.current_snapshot().snapshot_id == heads[spec.name]


def test_a_user_is_erased_and_nobody_else(world: World) -> None:
    before, items = world.all_rows(), world.items()
    assert world.traces(*USER_TRACES)
    report = world.erase("shop_user", f" {USER} ")
    messages = redacted(OWNED, "user")
    assert world.differences(messages, [Erasure("shop_user", USER, ERASED_AT)]) == {}
    assert world.traces(*USER_TRACES) == []
    assert (world.all_rows(), world.items()) == (before, items)
    raw = {h.place: (h.before, h.after) for h in report.holdings if h.unit == "messages"}
    assert raw["raw_user_events"] == (
        sum(owner == "user" and m.topic == "user.events" for m, owner in OWNED),
        0,
    )
    assert report.held
    assert "DynamoDB point-in-time recovery" not in report.unfinished


def test_a_crash_at_any_step_is_completed_by_the_next_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = world.leave_the_engine()
    before = world.all_rows()
    steps: list[str] = []

    class Crash(BaseException):
        pass

    def crash_at(number: int) -> Callable[[str], None]:
        reached = []

        def step(name: str) -> None:
            reached.append(name)
            if len(reached) > number:
                steps.append(name)
                raise Crash

        return step

    for number in range(1, 6):
        with pytest.raises(Crash):
            world.erase(step=crash_at(number))
    # Inside the steps: between deleting an item and the record of its publication, and after each change
    # of a training table.
    for owner, name in (
        (EntityItems, "_delete"),
        (SubjectInTiles, "_rewrite"),
        (SubjectInTable, "_remove_refs"),
        (SubjectInTable, "_expire"),
        (SubjectInTable, "_remove_files"),
    ):
        original = getattr(owner, name)

        def crash(self: Any, *given: Any, original: Any = original) -> None:
            original(self, *given)
            raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(Crash):
                world.erase()
    for number in (6, 8, 10, 12):
        with pytest.raises(Crash):
            world.erase(step=crash_at(number))
    assert len(set(steps)) == 9
    world.erase()
    messages = redacted(left, "viewer")
    assert world.differences(messages, [ERASURE]) == {}
    assert world.traces(str(VIEWER)) == []
    expected_rows(world, before, Oracle(messages, NOW, erased=[ERASURE]))


def test_replays_stay_out_and_new_events_count(world: World) -> None:
    world.erase()
    # A topic that is read again from its start, under another name.
    replay = [replace(m, source="kafka:again", arrived_at=NOW) for m in MESSAGES]
    insert_events(world.connection, replay)
    world.refresh()
    world.publish()
    messages = [*redacted(OWNED, "viewer"), *replay]
    assert world.differences(messages, [ERASURE]) == {}
    assert [key for key in world.items() if key[0] == VIEWER] == []
    assert world.export() == []
    # An event after the erasure is somebody who came back.
    news = [
        Message("view_events", "kafka:b", 0, 1, view("new", VIEWER, 0, watched_at=instant(AHEAD + 1).isoformat()),
                None, NOW),
        Message("content_interactions", "kafka:b", 0, 1,
                like("new", VIEWER, 0, event_ts=instant(AHEAD).isoformat()), None, NOW),
    ]  # fmt: skip
    insert_events(world.connection, news)
    world.refresh()
    world.publish()
    assert world.differences([*messages, *news], [ERASURE]) == {}
    assert {key[1] for key in world.items() if key[0] == VIEWER} == {
        "engagement#watch",
        "engagement#preferences",
        "engagement#sequence",
    }
    assert [row[2] for row in world.execute("select * from viewer_watch_metrics_1d") if row[0] == VIEWER] == [
        60
    ]
    # Erased again, they and the replayed messages go as well, and the time moves.
    again = world.erase(at=AHEAD + HOUR)
    assert again.erased_at == instant(AHEAD + HOUR)
    gone = [
        *redacted(OWNED, "viewer"),
        *redacted([(m, o) for m, (_, o) in zip(replay, OWNED, strict=True)], "viewer"),
    ]
    assert world.differences(
        [*gone, *redacted([(m, "viewer") for m in news], "viewer")],
        [replace(ERASURE, at=AHEAD + HOUR)],
    ) == {}  # fmt: skip
    assert world.traces(str(VIEWER)) == []


def test_what_comes_while_it_runs_is_left_alone(world: World) -> None:
    """A new event of the subject that arrives meanwhile counts, and is not taken for something left."""
    news = Message(
        "view_events", "live", 0, 1, view("live", VIEWER, 0, watched_at=instant(AHEAD + HOUR).isoformat()), None,
        NOW + 40_000 * DAY,
    )  # fmt: skip

    def step(name: str) -> None:
        if name == "redact the messages":
            insert_events(world.connection, [news])

    report = world.erase(step=step)
    assert report.newer_events == 1
    assert world.differences([*redacted(OWNED, "viewer"), news], [ERASURE]) == {}
    assert {h.place for h in report.holdings if h.after} >= {"view_events", "viewer_watch_metrics_1d"}
    assert [key for key in world.items() if key[0] == VIEWER] == []


def test_files_are_not_read_again(registry: Registry, world: World, tmp_path: Any) -> None:
    original = tmp_path / "views.jsonl"
    bodies = [view(f"f{n}", viewer, 0) for n, viewer in enumerate((VIEWER, 7, VIEWER))]
    original.write_bytes(b"\n".join(bodies) + b"\n")
    assert ingest_file(world.engine, registry, original).accepted == 3
    progress = "select source, source_partition, last_offset, messages from ingest_progress order by 1, 2"
    world.refresh()
    reached = world.execute(progress)
    world.erase()
    assert world.execute(progress) == reached
    assert ingest_file(world.engine, registry, original).accepted == 0
    # One that stopped half way is read from its start, and finds every place taken.
    world.execute("update ingest_files set completed_at = null")
    assert ingest_file(world.engine, registry, original).accepted == 0
    world.refresh()
    assert world.traces(str(VIEWER)) == []
    assert world.execute("select count(*) from raw_view_events where source like '%views.jsonl%'") == [(3,)]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(original.read_bytes())
    assert ingest_file(world.engine, registry, copy).accepted == 3
    world.refresh()
    assert world.execute("select count(*) from view_events where viewer_id = %s", [VIEWER]) == [(0,)]
    books = "select (select count(*) from raw_view_events), (select count(*) from view_events), " \
            "(select count(*) from rejected_events where topic = 'view_events')"  # fmt: skip
    ((raw, typed, rejected),) = world.execute(books)
    oracle = Oracle(redacted(OWNED, "viewer"), NOW, erased=[ERASURE])
    # The copy's event of viewer 7 is a duplicate; its two of the viewer are suppressed.
    assert raw == typed + rejected + oracle.duplicates["view_events"] + 1 + 2


def test_what_keeps_the_history_is_named_or_dropped(world: World) -> None:
    """A tag and somebody's branch stay unless told otherwise; an abandoned export does not."""
    table = world.catalog.load_table(WATCH.identifier("training"))
    head = table.current_snapshot().snapshot_id
    table.manage_snapshots().create_tag(head, "audit-2026").create_branch(head, "what-if").create_branch(
        head, "export-2026-03-15-abandoned"
    ).create_tag(head, "verified-2026-03-15-0123456789abcdef").commit()
    first = next(iter(table.snapshots())).snapshot_id
    table.manage_snapshots().create_tag(first, "empty").commit()
    # What a crashed export left: a whole file that nothing names, and half of one.
    (named,) = [task.file.file_path for task in table.scan(row_filter=f"watch_date = '{TODAY}'").plan_files()]
    whole = named.rsplit("/", 1)[0].removeprefix("file://") + "/left-00000.parquet"
    pq.write_table(pq.read_table(named.removeprefix("file://"), partitioning=None), whole)

    report = world.erase()
    assert report.kept_by == {"training.viewer_watch_daily": ["audit-2026", "what-if"]}
    assert any("audit-2026" in place for place in report.unfinished)
    kept = {(h.place, h.unit): h.after for h in report.holdings if h.after}
    assert set(kept) == {
        ("training.viewer_watch_daily", "snapshots"),
        ("training.viewer_watch_daily", "files"),
    }
    table = world.catalog.load_table(WATCH.identifier("training"))
    assert set(table.refs()) == {"main", "audit-2026", "what-if", "empty"}
    assert whole not in {str(path) for path in world.warehouse.rglob("*.parquet")}
    assert all(f"@{head}" in trace or ".parquet" in trace for trace in world.traces(str(VIEWER)))

    again = world.erase(drop_tags=True)
    assert again.kept_by == {}
    table = world.catalog.load_table(WATCH.identifier("training"))
    assert set(table.refs()) == {"main", "empty"}
    assert world.traces(str(VIEWER)) == []


def test_an_export_that_read_before_the_erasure_cannot_publish(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_module.publish_days
    insert_events(
        world.connection,
        [
            Message("view_events", "more", 0, place, view(f"more{place}", viewer, 3), None, NOW)
            for place, viewer in enumerate((VIEWER, 7))
        ],
    )
    world.refresh()

    def late(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(export_module, "publish_days", original)
        world.execute("insert into erased_subjects values ('viewer', %s, %s)", [str(VIEWER), instant(AHEAD)])
        return original(*given, **options)

    monkeypatch.setattr(export_module, "publish_days", late)
    # It starts again, and then meets views that do not know of the erasure.
    with pytest.raises(TilesUnreadable, match="prefs refresh"):
        export_day(world.engine, world.catalog, WATCH, TODAY - timedelta(days=3))
    world.refresh()
    assert export_day(world.engine, world.catalog, WATCH, TODAY - timedelta(days=3)).rows == 1
    world.erase()
    assert world.traces(str(VIEWER)) == []


def test_another_writer_of_the_day_is_met_by_another_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day is replaced while it is rewritten: the other's rows stay, and the viewer goes from them too."""
    world.leave_the_engine()
    before = world.all_rows()
    original = erasure_of_training.publish_day
    replaced: list[date] = []

    def late(table: Any, spec: Any, change: DayChange) -> bool:
        if not replaced and spec == WATCH:
            replaced.append(change.day)
            assert maintain_one_day(world, change.day)
        return original(table, spec, change)

    monkeypatch.setattr(erasure_of_training, "publish_day", late)
    report = world.erase()
    assert replaced == [OLD]
    assert in_watch(report).days_rewritten == (PARTED, ALONE, OLD)
    assert [row for row in world.rows(WATCH) if row[1] == OLD] == [
        row for row in without(before)["viewer_watch_daily"] if row[1] == OLD
    ]
    assert world.traces(str(VIEWER)) == []


def maintain_one_day(world: World, day: date) -> bool:
    """What a compaction does: the day's rows in a new file."""
    table = world.catalog.load_table(WATCH.identifier("training"))
    held = day_files(table, WATCH, day)
    batches = [batch for file in held for batch in read_rows(table, file, table.schema().column_names)]
    rows = pa.Table.from_batches(batches)
    written = DayFiles(
        token="another",
        rows=rows.num_rows,
        totals={name: sum(map(Decimal, rows[name].to_pylist())) for name in WATCH.totals},
        properties={},
    )
    write_day(table, WATCH, day, written, rows.cast(arrow_schema(table)).to_batches())
    return publish_day(table, WATCH, DayChange(day, written, parts_of(held)))


def test_what_an_engine_keeps_until_its_retention_is_told_with_the_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger refuses what RisingWave refuses of a table that deletes by age; the lake is erased nevertheless."""
    raw = sorted(set(RAW_TABLES.values()))
    world.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise 'append-only table does not support update or delete'; end $$"
    )
    for table in raw:
        world.execute(
            sql.SQL("create trigger refuse before update on {} execute function refuse()").format(
                sql.Identifier(table)
            )
        )
    given = world.stores
    for retention, when in ((timedelta(days=7), "{:%Y-%m-%d %H:%M} UTC"), (None, "their retention ends")):
        monkeypatch.setattr(world, "stores", partial(given, raw_retention=retention))
        before = datetime.now(UTC)
        with pytest.raises(ErasureIncomplete, match="raw_view_events") as failure:
            world.erase()
        whens = {when.format(moment + (retention or timedelta())) for moment in (before, datetime.now(UTC))}
        assert any(
            f"leave by themselves until {one}, run `prefs rebuild all --from-lake` after that"
            in str(failure.value)
            for one in whens
        )
    assert [row for row in world.rows(WATCH) if row[0] == VIEWER] == []


def test_a_table_of_the_sinks_is_left_to_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its current state is not rewritten beside them; the history goes once they have taken the rows out."""
    heads = {
        name: world.catalog.load_table(spec.identifier("training")).current_snapshot().snapshot_id
        for name, spec in TILE_TABLES.items()
    }
    given = world.stores
    monkeypatch.setattr(world, "stores", lambda: given(tables_by_sink=True))
    # The sink's own branch, and a file that it has still to commit.
    written = world.catalog.load_table(WATCH.identifier("training"))
    written.manage_snapshots().create_branch(heads[WATCH.name], SINK_BRANCH).commit()
    uncommitted = world.warehouse / "training" / WATCH.name / "data" / "uncommitted.parquet"
    pq.write_table(written.scan().to_arrow(), uncommitted)
    with pytest.raises(ErasureIncomplete, match=r"training.viewer_watch_daily: 4 rows.*next commits"):
        world.erase(drop_tags=True)
    written.refresh()
    assert written.refs()[SINK_BRANCH].snapshot_id == heads[WATCH.name]
    assert uncommitted.exists()
    # Committed, compacted and brought to main, as RisingWave does.
    uncommitted.unlink()
    written.manage_snapshots().remove_branch(SINK_BRANCH).commit()
    for name, spec in TILE_TABLES.items():
        table = world.catalog.load_table(spec.identifier("training"))
        assert table.current_snapshot().snapshot_id == heads[name]
        for day in (OLD, PARTED, ALONE, TODAY):
            export_day(world.engine, world.catalog, spec, day, options=ExportOptions(allow_loss=True))
        table.refresh()
        # The day that was the viewer's alone.
        table.delete(f"viewer_id = {VIEWER}")
    assert world.erase().held
    assert world.traces(str(VIEWER)) == []


def test_an_unknown_subject_is_suppressed_all_the_same(world: World) -> None:
    before = world.all_rows()
    report = world.erase(name="424242")
    assert (report.held, report.first_erased) == (False, True)
    assert world.all_rows() == before
    assert world.execute("select * from erased_subjects") == [("viewer", "424242", instant(ERASED_AT))]
    assert world.refreshes == 0


def test_a_store_that_is_down_is_named_and_the_next_run_completes(
    world: World, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def down() -> Any:
        raise CatalogUnavailable("the Iceberg catalog cannot be reached: check its address")

    dead = dynamodb_client(f"http://127.0.0.1:{free_port()}", "eu-central-1")
    elsewhere = dynamodb_client(world.client.meta.endpoint_url, "eu-west-1")
    engine = replace(world.engine, port=free_port())
    given = world.stores
    for changes, step, reason in (
        ({"engine": engine}, "suppress the subject", "prefs up"),
        ({"dynamodb": lambda: dead}, "delete the items", "cannot be reached"),
        ({"dynamodb": lambda: elsewhere}, "delete the items", "table viewer_profiles does not exist"),
        ({"catalog": down}, "open the Iceberg catalog", "check its address"),
    ):
        monkeypatch.setattr(world, "stores", lambda changes=changes: given(**changes))
        with pytest.raises(ErasureIncomplete, match=f"{step}.*{reason}.*run the same command again"):
            world.erase()
    monkeypatch.setattr(world, "stores", given)
    assert world.erase().held
    assert world.traces(str(VIEWER)) == []


def test_items_that_a_sink_deletes_meanwhile_are_reported(world: World) -> None:
    def step(name: str) -> None:
        # As soon as the views no longer have the viewer, on RisingWave.
        if name == "delete the items in DynamoDB":
            for viewer, key in world.items():
                if viewer == VIEWER:
                    world.client.delete_item(
                        TableName=world.table.name,
                        Key={"viewer_id": {"N": str(viewer)}, "domain_key": {"S": key}},
                    )

    report = world.erase(step=step)
    [held] = [holding for holding in report.holdings if holding.store == "dynamodb"]
    assert (held.before, held.after) == (len(world.contract.domains), 0)


def test_a_publisher_at_work_is_waited_for(world: World) -> None:
    items = EntityItems(world.client, world.contract, "viewer", world.table.name, VIEWER, instant(AHEAD))
    with world.engine.connect() as publisher:
        publisher.execute(
            "select pg_advisory_lock(hashtextextended(%s, 0))",
            [publish_lock(world.engine, "engagement#preferences")],
        )
        with pytest.raises(Exception, match="another publisher"):
            items.withdraw(world.engine, lock_timeout_seconds=0.05)
        assert len(items.keys()) == len(world.contract.domains)
    assert items.withdraw(world.engine) == len(world.contract.domains)
    assert world.execute("select count(*) from online_published where entity_key = %s", [str(VIEWER)]) == [
        (0,)
    ]


@pytest.mark.parametrize(
    ("kind", "given", "rule"),
    [
        ("viewer", "12a", "is not a viewer .*64-bit integer.*`prefs erase shop_user ID`"),
        ("viewer", "1.5", "64-bit integer"),
        ("viewer", "", "64-bit integer"),
        ("viewer", "9223372036854775808", "64-bit integer"),
        ("viewer", "-5", "is a canary: ids below 0"),
        ("shop_user", "canary:1", "is a canary: ids from canary: on"),
        ("shop_user", " ", "must be a text of 1 to"),
        ("person", "1", "is not an entity .*`prefs erase viewer ID` or `prefs erase shop_user ID`"),
    ],
)
def test_what_is_no_subject_is_refused(kind: str, given: str, rule: str) -> None:
    with pytest.raises(SubjectRefused, match=rule):
        Subject.named(REGISTRY, kind, given)


def test_ids_are_taken_as_events_spell_them() -> None:
    viewer, user = REGISTRY.entity("viewer"), REGISTRY.entity("shop_user")
    named = partial(Subject.named, REGISTRY)
    assert named("viewer", " 007 ") == named("viewer", "7.0") == Subject(viewer, "7")
    assert named("viewer", str(2**63 - 1)).value == 2**63 - 1
    assert named("shop_user", "\tcanary ") == Subject(user, "canary")


def test_training_sets_in_the_catalog_are_erased_with_their_history(
    world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of this platform lose the viewer's rows; labels of others that hold them, and what is damaged, are named."""
    catalog = world.catalog
    days = [TODAY - timedelta(days=number) for number in (1, 3)]
    moments = [datetime(day.year, day.month, day.day, 12, tzinfo=UTC) for day in days]
    labels = pa.table(
        {
            "viewer_id": pa.array([7, VIEWER, 123, VIEWER], pa.int64()),
            "label_time": pa.array(
                [moments[0], moments[0], moments[1], moments[1]], pa.timestamp("us", "UTC")
            ),
            "label": ["a", "b", "c", "d"],
        }
    )
    pq.write_table(labels, tmp_path / "labels.parquet")
    catalog.create_namespace("ml")
    for name, rows in (("labels", labels), ("labels_of_7", labels.slice(0, 1)), ("damaged", labels)):
        catalog.create_table(f"ml.{name}", rows.schema).append(rows)
    damaged = catalog.load_table("ml.damaged").metadata_location.removeprefix("file://")
    Path(damaged).write_text("{")

    def build(output: str) -> TrainingSet:
        return build_training_set(
            catalog,
            LabelJoin(str(tmp_path / "labels.parquet"), FEATURES, instant(NOW)),
            output,
            manifest=tmp_path / f"{Path(output).name}.json",
        )

    for output in ("ml.set", "ml.set", "ml.tagged"):
        made = build(output)
    written = build(str(tmp_path / "set.csv"))
    tagged = catalog.load_table("ml.tagged")
    tagged.manage_snapshots().create_tag(tagged.current_snapshot().snapshot_id, "first").commit()
    before = catalog.load_table("ml.set").scan().to_arrow()
    assert before["viewer_id"].to_pylist() == [7, VIEWER, 123, VIEWER]

    report = world.erase(training_sets=[tmp_path])
    after = {name: catalog.load_table(name).scan().to_arrow() for name in ("ml.set", "ml.tagged")}
    assert after["ml.set"].equals(before.filter(pc.not_equal(before["viewer_id"], VIEWER)))
    assert after["ml.tagged"].equals(after["ml.set"])
    counts = {(h.place, h.unit): (h.before, h.after) for h in report.holdings}
    assert (counts["ml.set", "rows"], counts["ml.set", "snapshots"]) == ((2, 0), (2, 0))
    assert counts["ml.set", "files"] == (2, 0)
    assert (counts["ml.tagged", "rows"], counts["ml.tagged", "snapshots"]) == ((2, 0), (1, 1))
    assert report.kept_by == {"ml.tagged": ["first"]}
    assert [snapshot.summary["prefs.operation"] for snapshot in catalog.load_table("ml.set").snapshots()] == [
        "erase"
    ]
    assert report.training_sets == ["ml.labels", str(tmp_path / "labels.parquet"), str(tmp_path / "set.csv")]
    assert list(report.unread) == ["ml.damaged"]
    assert "damaged" in report.unread["ml.damaged"]
    assert {"training_sets", "unread"} <= set(report.as_dict())

    # What was made of the expired snapshots cannot be had again, and nothing is written instead.
    for manifest in (made.manifest, written.manifest):
        with pytest.raises(
            SnapshotExpired, match=r"training\.viewer_genre_daily has expired, .*an erased subject"
        ):
            reproduce_training_set(catalog, manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert not (tmp_path / "again.parquet").exists()

    head = catalog.load_table("ml.set").current_snapshot().snapshot_id
    again = world.erase(drop_tags=True)
    assert again.kept_by == {}
    assert catalog.load_table("ml.set").current_snapshot().snapshot_id == head
    holding = {
        str(path.parent.parent.name)
        for path in world.warehouse.rglob("*.parquet")
        if VIEWER in pq.read_table(path, columns=["viewer_id"], partitioning=None)["viewer_id"].to_pylist()
    }
    assert holding == {"labels", "damaged"}


def test_files_of_training_sets_and_labels_are_named(tmp_path: Any) -> None:
    at = pa.array([instant(NOW)] * 2, pa.timestamp("us", "UTC"))
    for name, viewers in (("with", [1, VIEWER]), ("sub/without", [1, 2])):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"viewer_id": viewers, "label_time": at}), path)
    pq.write_table(pa.table({"viewer_id": [VIEWER]}), tmp_path / "tiles.parquet")
    for name, viewer in (("text", VIEWER), ("text-without", 1)):
        (tmp_path / f"{name}.csv").write_text(
            f'label,viewer_id,label_time\n"two\nlines, one label",2,x\nb,{viewer},x\n'
        )
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text(f"viewer_id,name\n{VIEWER},x\n")
    erased = ErasedSubject(FEATURES.key, VIEWER, instant(NOW))
    assert files_holding(erased, [tmp_path]) == [tmp_path / "text.csv", tmp_path / "with.parquet"]
    with pytest.raises(OfflineError, match="is not a folder: name an existing folder of training sets"):
        files_holding(erased, [tmp_path / "nowhere"])
    for name, content in (("bad.parquet", b"PAR1"), ("bad.csv", b"viewer_id,label_time\nmany,x\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OfflineError, match=rf"{name} cannot be searched .*: repair or remove it"):
            files_holding(erased, [tmp_path])
        (tmp_path / name).unlink()


def test_statistics_keep_nothing_of_an_erased_subject(world: World) -> None:
    """What they hold of a tile day is computed again; of views, whose past days are gone, the extremes leave."""
    now = instant(NOW) + timedelta(days=1)
    name = "training.value_statistics"
    assert world.erase(kind="shop_user", name="nobody").held is False
    collect_tiles(world.catalog, REGISTRY, "training", now=now, days=60)
    collect_views(world.catalog, REGISTRY, world.engine, "training", now=now)
    rolling = [domain.relation for domain in REGISTRY.contract.domains.values() if domain.entity == "viewer"]
    before = described_days(world.catalog, "training")
    held = {
        (spec.tile, row[list(spec.by_name).index(spec.day)])
        for spec in TILE_TABLES.values()
        for row in world.rows(spec)
        if row[0] == VIEWER
    }
    assert (WATCH.tile, ALONE) in held & before.keys()
    report = world.erase()

    counts = {(h.place, h.unit): (h.before, h.after) for h in report.holdings}
    known = described_days(world.catalog, "training")
    assert counts[name, "days"] == (len(held & before.keys()) + len(rolling), 0)
    assert counts[name, "snapshots"] == (1, 0)
    assert len(world.catalog.load_table(name).snapshots()) == 1
    assert len(list((world.warehouse / "training" / "value_statistics" / "data").glob("*.parquet"))) == 1
    # The day that only the viewer had is gone, and of the others the viewer does not count.
    found = read_statistics(world.catalog, "training")
    assert (WATCH.tile, ALONE) not in known
    rows = world.rows(WATCH)
    for day in (OLD, PARTED, TODAY):
        (one,) = [s for s in found if (s.relation, s.day, s.attribute) == (WATCH.tile, day, "viewer_id")]
        assert one.rows == sum(row[1] == day for row in rows)
    assert {one.minimum for one in found if one.relation in rolling} == {None}
    # They are computed again for nobody in particular.
    collect_views(world.catalog, REGISTRY, world.engine, "training", now=now)
    assert world.erase(name="424242").held is False
    again = {(h.place, h.unit): (h.before, h.after) for h in world.erase().holdings}
    assert again[name, "days"] == again[name, "snapshots"] == (0, 0)
