"""Events in the lake: what arrived is there exactly once, whatever fails, and views come back from it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_state import BuiltState
from oracle import HOUR, SECOND, Erasure, Message, Oracle, micros
from pyiceberg.table import Table, Transaction
from relations import differences, insert_canary_keys, insert_events, instant, refresh
from shipped import REGISTRY
from streams import NOW

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, NodeResult
from dagster_prefs.erasure.erase import Stores, erase
from dagster_prefs.erasure.events import REDACTED, Subject
from dagster_prefs.erasure.export import export_subject
from dagster_prefs.freshness.measures import measure_exported_events
from dagster_prefs.iceberg import event_sink, publish
from dagster_prefs.iceberg.event_export import EventsReport
from dagster_prefs.iceberg.event_reader import (
    Selection,
    complete_from_of,
    complete_until,
    load_accepted,
    read_events,
)
from dagster_prefs.iceberg.event_tables import PLACE, event_tables
from dagster_prefs.iceberg.files import LayoutForeign, live_files
from dagster_prefs.iceberg.maintenance import maintain_training_sets
from dagster_prefs.iceberg.tables import SchemaChangeRefused, ensure_layout
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

TABLES = event_tables(REGISTRY)
VIEWS, ITEMS = "view_events", "items"
FIRST = NOW // HOUR * HOUR - 30 * HOUR


def view(number: str, viewer: Any, at: int, **fields: Any) -> bytes:
    body = {
        "event_id": number, "viewer_id": viewer, "content_id": "c", "genre": "drama", "watch_duration_sec": 60,
        "completion_pct": 0.5, "watched_at": instant(at).isoformat(), **fields,
    }  # fmt: skip
    return json.dumps(body).encode()


# An id that stands in nothing else, and one that continues it.
GONE, ALIKE = 777_000_123, 7_770_001_230


def letter(viewer: int) -> str:
    return "g" if viewer == GONE else "a"


def about(gone: int) -> list[Message]:
    """What names a viewer: valid and rejected messages of its topic, and a rejected one of another."""
    bodies = [
        view("g1", gone, FIRST),
        view("g1", gone, FIRST),
        view("g2", gone, FIRST + HOUR, completion_pct=4),
        b"viewer_id=%d \xff" % gone,
        view(f"g3-{gone}", 5, FIRST) if gone == ALIKE else view("g3", gone, FIRST + 2),
    ]
    made = [
        delivery(2000 + place * 2, body, FIRST + place, f"file:{letter(gone)}#1")
        for place, body in enumerate(bodies)
    ]
    rejected = json.dumps({"price": -1, "viewer_id": gone}).encode()
    return [*made, Message(ITEMS, f"file:{letter(gone)}#1", 0, 1, rejected, None, FIRST)]


def item(number: str, price: float) -> bytes:
    return json.dumps({"item_id": number, "title": number, "price": price}).encode()


def delivery(place: int, body: bytes, arrived_at: int, source: str = "kafka:view_events") -> Message:
    return Message(VIEWS, source, place % 2, place, body, arrived_at, arrived_at)


def stream() -> list[Message]:
    """Valid views with second deliveries, rejected ones, and versions of items, in three hours of two days."""
    made = []
    for place in range(30):
        at = FIRST + place // 10 * 12 * HOUR + place * SECOND
        bodies = [view(f"e{place}", place % 5, at, genre=None if place % 7 == 0 else "drama\\\t\n")]
        if place % 4 == 0:
            bodies.append(view(f"e{place - place % 12}", 99, at, watch_duration_sec=1))
        if place % 9 == 0:
            bodies += [b"\xff\x00 no JSON", view(f"r{place}", place, at, completion_pct=3)]
        # Offsets with gaps.
        made += [delivery(place * 10 + turn, body, at) for turn, body in enumerate(bodies)]
        if place % 5 == 0:
            made.append(Message(ITEMS, "file:items#1", 0, place, item(f"i{place % 3}", place), None, at))
    return made


class Lake:
    """One engine with its tables of events in a catalog of their own."""

    def __init__(self, platform: Platform, order: Sequence[str]) -> None:
        self.platform = platform
        self.engine = platform.engine
        self.order = order
        self.catalog = platform.catalog()

    def export(self, topic: str = VIEWS) -> EventsReport:
        return self.platform.event_exports()[topic].run(instant(NOW))

    def check(self, topic: str = VIEWS) -> EventsReport:
        """Export where RisingWave's sink writes the raw table."""
        return replace(self.platform.event_exports()[topic], raw_by_sink=True).run(instant(NOW))

    def sink(self, condition: str = "true", topic: str = VIEWS) -> int:
        """Append raw messages of the engine as RisingWave's sink does: in files of any hours. Returns their number."""
        declared = REGISTRY.topics[topic]
        table = ensure_layout(self.catalog, "training", TABLES[topic].raw.layout)
        fields = ", ".join(f"p.{field.name}" for field in TABLES[topic].raw.fields)
        claims = " or p.canary is not null" if declared.entity else ""
        with self.engine.connect() as connection:
            found = connection.execute(
                f"select (r.arrived_at at time zone 'UTC')::date, p.reason is not null{claims}, r.source,"
                f" r.source_partition, r.source_offset, r.kafka_timestamp, r.arrived_at, r.data, {fields}"
                f" from {declared.raw} as r join {declared.parsed} as p using (source, source_partition, source_offset)"
                f" where {condition}"
            ).fetchall()
        schema = table.schema().as_arrow()
        rows = [dict(zip(schema.names, row, strict=True)) for row in found]
        table.append(pa.Table.from_pylist(rows, schema=schema))
        return len(rows)

    def arrive(self, messages: Sequence[Message]) -> None:
        with self.engine.connect() as connection:
            insert_events(connection, messages)
            refresh(connection, self.order)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return sorted(connection.execute(query).fetchall(), key=repr)  # type: ignore[arg-type]

    def raw(self, topic: str = VIEWS) -> list[tuple[Any, ...]]:
        columns = [*PLACE, "data", "kafka_timestamp", "arrived_at"]
        return _rows(read_events(self.catalog, TABLES[topic].raw, Selection(columns=columns)).read_all())

    def accepted(self, topic: str = VIEWS, **given: Any) -> list[tuple[Any, ...]]:
        names = [field.name for field in REGISTRY.topics[topic].fields]
        with duckdb.connect() as session:
            load_accepted(session, "found", self.catalog, TABLES[topic].typed, Selection(**given))
            rows = session.sql(f"select {', '.join(names)} from found").to_arrow_table()
        return _rows(rows)

    def typed(self) -> list[tuple[Any, ...]]:
        names = [field.name for field in REGISTRY.topics[VIEWS].fields]
        return self.ask(f"select {', '.join(names)} from view_events")

    def snapshots(self, topic: str = VIEWS) -> list[int]:
        tables = [self.catalog.load_table(spec.identifier("training")) for spec in TABLES[topic].both]
        return [snapshot.snapshot_id for table in tables for snapshot in table.snapshots()]

    def differences(self, messages: Sequence[Message], erased: Sequence[Erasure] = ()) -> dict[str, Any]:
        with self.engine.connect() as connection:
            return differences(connection, Oracle(messages, NOW, erased=erased))

    def files_with(self, trace: int, folder: Path) -> list[str]:
        """The data files, referenced or not, in which the number stands."""
        return [
            path.name
            for path in sorted(folder.rglob("*.parquet"))
            if re.search(rf"\b{trace}\b", repr(pq.read_table(path).to_pylist()))
        ]


def _rows(table: Any) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.values()) for row in table.to_pylist()), key=repr)


def raw_of(messages: Sequence[Message], topic: str = VIEWS) -> list[tuple[Any, ...]]:
    """What the raw table must hold."""
    return sorted(
        (
            (
                m.source, m.partition, m.offset, m.data,
                None if m.kafka_timestamp is None else instant(m.kafka_timestamp), instant(m.arrived_at),
            )
            for m in messages
            if m.topic == topic
        ),
        key=repr,
    )  # fmt: skip


@pytest.fixture
def lake(
    deployed: EngineConfiguration,
    deployed_state: BuiltState,
    aws_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Lake:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_endpoint)
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", tmp_path.as_uri())
    monkeypatch.setenv("PREFS_RAW_RETENTION_SECONDS", "3600")
    platform = Platform(load_settings())
    platform.engine = deployed
    made = Lake(platform, deployed_state.views)
    with deployed.connect() as connection:
        insert_canary_keys(connection)
    made.arrive(stream())
    return made


def test_what_arrived_is_exported_exactly_and_once(lake: Lake) -> None:
    done = lake.export()
    assert (done.failed, done.lost) == ({}, 0)
    assert lake.raw() == raw_of(stream())
    typed = lake.typed()
    assert lake.accepted() == typed
    assert len(typed) == 30
    assert (done.hours, done.raw_rows, done.typed_rows) == (3, len(raw_of(stream())), 38)
    unreadable = Selection(where="rejected = true")
    assert read_events(lake.catalog, TABLES[VIEWS].raw, unreadable).read_all().num_rows == 8
    before = lake.snapshots()
    again = lake.export()
    assert (again.hours, again.raw_rows, lake.snapshots()) == (0, 0, before)
    # An earlier delivery that becomes visible late is in its own hour, and is the event from then on.
    first = delivery(7, view("e4", 7, FIRST), FIRST - HOUR, "file:history#1")
    lake.arrive([first])
    assert lake.export().hours == 1
    assert lake.raw() == raw_of([*stream(), first])
    assert lake.accepted() == lake.typed() != typed
    # As of an earlier arrival only what had arrived by then counts.
    assert lake.accepted(arrived_until=instant(FIRST - 1)) == [row for row in lake.typed() if row[0] == "e4"]
    assert len(lake.accepted(arrived_until=instant(FIRST + HOUR))) == 10


def test_a_table_grows_with_its_topic_and_keeps_all_versions_of_reference_data(lake: Lake) -> None:
    full = lake.platform.event_exports()[ITEMS]
    spec = full.tables.typed
    fewer = replace(spec, fields=tuple(field for field in spec.fields if field.name != "price"))
    replace(full, tables=replace(full.tables, typed=fewer)).run(instant(NOW))
    ensure_layout(lake.catalog, "training", spec.layout)
    rows = read_events(lake.catalog, spec, Selection(columns=["item_id", "price"])).read_all().to_pylist()
    assert sorted({row["item_id"] for row in rows}) == ["i0", "i1", "i2"]
    assert {row["price"] for row in rows} == {None}
    full.run(instant(NOW))
    # A field that is not declared any more keeps its column; a type that would lose values is refused.
    table = ensure_layout(lake.catalog, "training", fewer.layout)
    assert "price" in table.schema().column_names
    retyped = replace(
        spec,
        fields=tuple(
            replace(field, type="text") if field.name == "price" else field for field in spec.fields
        ),
    )
    with pytest.raises(SchemaChangeRefused, match=r"items\.price is decimal"):
        ensure_layout(lake.catalog, "training", retyped.layout)
    with duckdb.connect() as session:
        load_accepted(session, "found", lake.catalog, TABLES[ITEMS].typed)
        found = session.sql("select item_id, price, replaced_at is null from found").fetchall()
    assert len(found) == 6
    assert sorted((row[:2] for row in found if row[2]), key=repr) == lake.ask(
        "select item_id, price from items"
    )


def test_history_counts_in_the_lake_until_kafka_has_told(lake: Lake) -> None:
    """The engine's rule for reference data, at every arrival: i0 is 20 at first, then what Kafka says."""
    lake.arrive(
        [
            Message(ITEMS, "kafka:items", 0, 1, item("i0", 1), None, FIRST + 70 * HOUR),
            Message(ITEMS, "file:z#1", 0, 1, item("i0", 2), None, FIRST + 71 * HOUR),
            Message(ITEMS, "replay:kafka:items", 0, 1, item("i0", 3), None, FIRST + 72 * HOUR),
            Message(ITEMS, "file:z#1", 0, 2, item("new", 4), None, FIRST + 73 * HOUR),
        ]
    )
    lake.export(ITEMS)
    with duckdb.connect() as session:
        load_accepted(session, "found", lake.catalog, TABLES[ITEMS].typed)
        found = session.sql("select item_id, price, replaced_at is null from found").fetchall()
    assert sorted((row[:2] for row in found if row[2]), key=repr) == lake.ask(
        "select item_id, price from items"
    )
    assert [int(row[1]) for row in found if row[0] == "i0" and row[1] < 4 and row[1] > 0] == [1, 3]


def test_a_crash_and_another_exporter_lose_and_double_nothing(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(name: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(publish, name, fail)
            with pytest.raises(KeyboardInterrupt):
                lake.export()

    for name in ("_FileWriter", "_stage", "_make_current"):
        failing(name)
        assert lake.raw() == []
    # Two at once, of which one is published while the other has written its files.
    real, others = publish._stage, []

    def stage(*given: Any) -> Any:
        if not others:
            others.append(threading.Thread(target=lake.export))
            others[0].start()
            others[0].join()
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_stage", stage)
        lake.export()
    assert len(others) == 1
    assert lake.raw() == raw_of(stream())
    assert lake.accepted() == lake.typed()


def test_a_table_is_complete_until_before_the_oldest_writer(lake: Lake) -> None:
    spec = TABLES[VIEWS].typed
    assert complete_until(lake.catalog, spec) is None
    with lake.engine.connect(autocommit=False) as writer:
        ((began,),) = writer.execute("select transaction_timestamp()").fetchall()
        writer.execute(
            "insert into raw_view_events (source, source_partition, source_offset, data)"
            " values ('simulate:1', 0, 1, %s)",
            [view("open", 3, NOW)],
        )
        found = lake.export().complete_until
        assert found is not None
        assert found < began
        assert complete_until(lake.catalog, spec) == found
        writer.commit()
    # Committed and not read yet: still not complete beyond it.
    waiting = lake.export().complete_until
    assert waiting is not None
    assert began <= lake.ask("select arrived_at from raw_view_events where source = 'simulate:1'")[0][0]
    assert waiting < lake.ask("select arrived_at from raw_view_events where source = 'simulate:1'")[0][0]
    lake.arrive([])
    began = datetime.now(UTC)
    done = lake.export()
    assert done.hours == 1
    assert done.complete_until is not None
    assert done.complete_until > began
    # Rolled back, nothing is known; the next export knows again.
    table = lake.catalog.load_table(spec.identifier("training"))
    newest = table.current_snapshot()
    assert newest is not None
    table.manage_snapshots().set_current_snapshot(snapshot_id=newest.parent_snapshot_id).commit()
    assert complete_until(lake.catalog, spec) is None
    lake.export()
    assert complete_until(lake.catalog, spec) is not None
    assert lake.accepted() == lake.typed()


def test_views_outlive_the_raw_messages_and_come_back_from_the_lake(lake: Lake) -> None:
    messages = stream()
    assert lake.differences(messages) == {}
    reports = {report.topic: report for report in lake.platform.export_events()}
    # All but the newest of each partition of each source.
    assert reports[VIEWS].left == len(raw_of(messages)) - 2
    assert lake.ask("select count(*) from raw_view_events") == [(2,)]
    lake.arrive([])
    assert lake.differences(messages) == {}
    # Nothing was noted for the follower, and nothing leaves again or changes in the lake.
    assert lake.ask("select count(*) from live_changes where relation = 'raw_view_events'") == [(0,)]
    (again,) = lake.platform.export_events([VIEWS])
    assert (again.hours, again.left, again.lost) == (0, 0, 0)
    assert lake.raw() == raw_of(messages)
    # What arrives later counts beside what left: a second delivery does not, an event does.
    later = [delivery(1000, view("e3", 50, NOW), NOW), delivery(1001, view("new", 50, NOW), NOW)]
    lake.arrive(later)
    messages += later
    assert lake.differences(messages) == {}
    # Views that were lost come back, while an event arrives.
    lake.ask("with gone as (delete from raw_retained) select 1")
    lake.arrive([])
    assert set(lake.differences(messages)) >= {"view_events", "viewer_watch_metrics_1d", "rejected_events"}
    lake.platform.stores()
    live = delivery(1002, view("live", 51, NOW), NOW)

    def say(line: str) -> None:
        if "restored" in line and VIEWS in line:
            with lake.engine.connect() as connection:
                insert_events(connection, [live])

    rebuilt = lake.platform.rebuild("all", from_lake=True, say=say)
    assert {"view_events_parsed", "viewer_watch_metrics_1d", "items"} <= set(rebuilt)
    assert lake.differences([*messages, live]) == {}
    assert lake.ask("select count(*) from raw_view_events") == [(len(raw_of([*messages, live])),)]
    # They leave again, and the lake holds the same as before.
    lake.platform.export_events([VIEWS])
    assert lake.raw() == raw_of([*messages, live])
    lake.arrive([])
    assert lake.differences([*messages, live]) == {}


def test_a_parsed_relation_is_not_replaced_while_messages_have_left(
    lake: Lake, dbt_on: Callable[..., Dbt]
) -> None:
    lake.platform.export_events([VIEWS])
    assert ("view_events_parsed",) in lake.ask("select relation from raw_retained")

    def anew() -> NodeResult:
        results = dbt_on(lake.engine).run("run", ["view_events_parsed"], arguments=["--full-refresh"])
        return next(one for one in results if one.name == "view_events_parsed")

    result = anew()
    assert not result.ok
    assert "prefs rebuild view_events_parsed --from-lake" in result.message
    assert lake.differences(stream()) == {}, "nothing was changed"
    lake.platform.stores()
    lake.platform.rebuild("view_events_parsed", from_lake=True)
    assert ("view_events_parsed",) not in lake.ask("select relation from raw_retained")
    result = anew()
    assert result.ok, result.message
    assert lake.differences(stream()) == {}


def test_days_before_the_kept_ones_leave_the_lake(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.export()
    monkeypatch.setenv("PREFS_EVENTS_KEPT_DAYS", "1")
    platform = Platform(load_settings())
    platform.engine = lake.engine
    export = platform.event_exports()[VIEWS]
    # Of the three hours one is of the last day.
    now = instant(NOW) + timedelta(days=1)
    # Another exporter removes the same hours while this one does.
    real, others = Transaction.commit_transaction, [1]

    def overtaken(transaction: Transaction) -> Table:
        if others and transaction._snapshot_producers:
            others.pop()
            with monkeypatch.context() as patch:
                patch.setattr(Transaction, "commit_transaction", real)
                platform.event_exports()[VIEWS].run(now)
        return real(transaction)

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit_transaction", overtaken)
        export.run(now)
    assert not others
    first = (now - timedelta(days=1)).date()
    kept = [message for message in stream() if instant(message.arrived_at).date() >= first]
    assert 0 < len(raw_of(kept)) < len(raw_of(stream()))
    assert lake.raw() == raw_of(kept)
    for spec in TABLES[VIEWS].both:
        table = lake.catalog.load_table(spec.identifier("training"))
        assert complete_from_of(table) == datetime.combine(first, time(), UTC)
    # What the engine still has of those days is not exported again.
    assert export.run(now).hours == 0
    assert lake.raw() == raw_of(kept)


def test_the_lag_of_the_lake_is_read_without_it(lake: Lake) -> None:
    def measured(hours: float) -> list[Any]:
        now = datetime.now(UTC) + timedelta(hours=hours)
        return measure_exported_events(lake.engine, REGISTRY, now=now, every_seconds=3600)

    assert measured(0) == []
    lake.platform.export_events([VIEWS])
    (measure,) = measured(100)
    assert (measure.name, measure.level, measure.lag_seconds) == ("raw_view_events", "ok", 0.0)
    now = datetime.now(UTC)
    late = micros(now + timedelta(seconds=1))
    lake.arrive([delivery(5000 + place, view(f"w{place}", 1, late), late) for place in range(3)])
    levels = [
        (measure.level, measure.values["events_unexported"])
        for hours in (1, 4, 25)
        for measure in measured(hours)
    ]
    assert levels == [("ok", 3), ("warn", 3), ("error", 3)]
    assert "3 messages wait for the next export" in measured(4)[0].reason


def test_an_erased_subject_is_in_no_file_and_stays_erased(lake: Lake, tmp_path: Path) -> None:
    messages = [*stream(), *about(GONE), *about(ALIKE)]
    lake.arrive([*about(GONE), *about(ALIKE)])
    lake.platform.export_events([VIEWS, ITEMS])
    assert lake.ask("select count(*) from raw_view_events where source like 'file:%'") == [(2,)]
    assert len(lake.files_with(GONE, tmp_path)) >= 4
    stores = Stores(
        lake.engine,
        REGISTRY,
        lambda: lake.catalog,
        lake.platform.dynamodb,
        "",
        lambda: lake.arrive([]),
        "training",
    )
    lake.platform.stores()
    subject = Subject.named(REGISTRY, "viewer", str(GONE))
    known = export_subject(stores, subject, now=instant(NOW)).training
    assert {name.split(".")[1]: len(rows) for name, rows in known.items() if rows} == {
        "raw_view_events": 5, "view_events": 3, "raw_items": 1,
    }  # fmt: skip
    report = erase(stores, subject, now=instant(NOW))
    held = {
        (one.place, one.unit): (one.before, one.after) for one in report.holdings if one.store == "iceberg"
    }
    assert held["training.raw_view_events", "rows"] == (5, 0)
    assert held["training.view_events", "rows"] == (3, 0)
    assert held["training.raw_items", "rows"] == (1, 0)
    assert lake.files_with(GONE, tmp_path) == []
    assert len(lake.files_with(ALIKE, tmp_path)) >= 3

    def emptied(given: Sequence[Message]) -> list[Message]:
        return [replace(one, data=REDACTED) if one.source == "file:g#1" else one for one in given]

    erased = [Erasure("viewer", str(GONE), NOW)]
    assert lake.raw() == raw_of(emptied(messages))
    assert lake.differences(emptied(messages), erased) == {}
    # Neither the next export nor a rebuild brings anything back.
    lake.platform.export_events([VIEWS])
    assert lake.raw() == raw_of(emptied(messages))
    assert lake.accepted() == lake.typed()
    lake.platform.rebuild("view_events", from_lake=True)
    assert lake.differences(emptied(messages), erased) == {}
    lake.export()
    assert lake.files_with(GONE, tmp_path) == []


def test_what_a_sink_writes_is_complete_once_the_lake_has_it(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = raw_of(stream())
    assert lake.check().waiting == len(messages)
    # The second of three hours is on its way.
    missing = [row for row in messages if (row[5] - instant(FIRST)) // timedelta(hours=12) == 1]
    first = min(row[5] for row in missing)
    assert lake.sink(f"r.arrived_at < '{first}' or r.arrived_at >= '{first + timedelta(hours=12)}'")
    behind = lake.check()
    assert (behind.waiting, behind.lost, behind.failed) == (len(missing), 0, {})
    assert behind.complete_until == first - timedelta(microseconds=1)
    # Typed events do not wait for it.
    assert lake.accepted() == lake.typed()
    lake.sink(f"r.arrived_at = '{first}'")
    assert lake.check().complete_until == sorted(row[5] for row in missing)[1] - timedelta(microseconds=1)
    lake.sink(f"r.arrived_at > '{first}' and r.arrived_at < '{first + timedelta(hours=12)}'")
    done = lake.check()
    assert (done.waiting, done.repeated) == (0, 0)
    assert done.complete_until is not None
    assert done.complete_until > instant(FIRST)
    assert lake.raw() == messages
    assert (
        read_events(lake.catalog, TABLES[VIEWS].raw, Selection(where="rejected = true")).read_all().num_rows
        == 8
    )
    before = lake.snapshots()
    assert (lake.check().waiting, lake.snapshots()) == (0, before)
    # A sink commits every minute; maintenance merges what it left.
    many = [delivery(4000 + place, view(f"m{place}", 3, FIRST), FIRST + place) for place in range(3)]
    monkeypatch.setattr(event_sink, "MERGED_FROM", 3)
    lake.arrive(many)
    for place in range(3):
        lake.sink(f"r.source_offset = {4000 + place}")
    messages = raw_of([*stream(), *many])
    table = lake.catalog.load_table(TABLES[VIEWS].raw.identifier("training"))
    before = len(live_files(table))
    lake.check()
    for merged in ((instant(FIRST).date(),), ()):
        reports = maintain_training_sets(
            lake.catalog, now=datetime.now(UTC), keep_snapshots=timedelta(days=1), namespace="training"
        )
        assert {
            report.days_compacted for report in reports if report.table == "training.raw_view_events"
        } == {merged}
        assert len(live_files(table.refresh())) < before - 1
        assert lake.raw() == messages
        assert (lake.check().waiting, lake.check().repeated) == (0, 0)
    # History of an hour that was complete.
    late = delivery(7, view("late", 7, FIRST), FIRST - HOUR, "file:history#1")
    lake.arrive([late])
    assert lake.check().waiting == 1
    lake.sink("r.source = 'file:history#1'")
    assert lake.check().waiting == 0
    assert lake.raw() == raw_of([*stream(), *many, late])
    # What no sink can bring any more.
    lake.arrive([delivery(9, view("left", 7, FIRST), FIRST - 2 * HOUR, "file:history#1")])
    lake.ask(
        "with gone as (delete from raw_view_events where source_offset = 9 returning 1) select count(*) from gone"
    )
    lake.ask("with gone as (delete from live_changes returning 1) select count(*) from gone")
    assert (lake.check().waiting, lake.raw()) == (0, raw_of([*stream(), *many, late]))


def test_a_sink_that_was_made_again_doubles_nothing(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = raw_of(stream())
    # The platform's own export came first, then the sink, and then another one.
    lake.export()
    assert lake.sink() == len(messages)
    lake.check()
    assert lake.raw() == messages
    half = lake.sink("r.source_partition = 0")
    assert 0 < half < len(messages)
    # The sink goes on while files are replaced.
    more = [delivery(3000 + place, view(f"m{place}", 3, FIRST), FIRST + place) for place in range(4)]
    turns = {"_write_again": iter(range(1000)), "live_files": iter(range(1000))}

    def meanwhile(name: str, turn: int, condition: str) -> Callable[..., Any]:
        real = getattr(event_sink, name)

        def call(*given: Any) -> Any:
            found = real(*given)
            if next(turns[name]) == turn:
                assert lake.sink(condition) > 0
            return found

        return call

    lake.arrive(more)
    with monkeypatch.context() as patch:
        # While the first file is written, and between the look at the table and the commit.
        patch.setattr(
            event_sink, "_write_again", meanwhile("_write_again", 0, "r.source_offset in (3000, 3001)")
        )
        patch.setattr(event_sink, "live_files", meanwhile("live_files", 1, "r.source_offset >= 3002"))
        assert lake.check().repeated == half
    assert next(turns["live_files"]) > 3, "the commit was tried again"
    assert lake.raw() == raw_of([*stream(), *more])
    # Typed events of what arrived meanwhile.
    lake.check()
    before = lake.snapshots()
    assert (lake.check().repeated, lake.snapshots()) == (0, before)
    # What fails leaves the lake as it was.
    lake.sink("r.source_partition = 1")
    doubled = lake.raw()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(event_sink, "offsets_in", fail)
        with pytest.raises(KeyboardInterrupt):
            lake.check()
    assert lake.raw() == doubled
    assert lake.check().repeated == len(doubled) - len(messages) - len(more)
    assert lake.raw() == raw_of([*stream(), *more])
    # The platform's export does not take these files for its own.
    with pytest.raises(LayoutForeign, match="keep PREFS_EXPORT=sink and PREFS_RAW_RETENTION_SECONDS"):
        lake.export()
    assert lake.raw() == raw_of([*stream(), *more])


def test_an_erased_subject_is_in_no_file_of_a_sink(lake: Lake, tmp_path: Path) -> None:
    messages = [*stream(), *about(GONE), *about(ALIKE)]
    lake.arrive([*about(GONE), *about(ALIKE)])
    for topic in (VIEWS, ITEMS):
        lake.sink(topic=topic)
        lake.check(topic)
    assert len(lake.files_with(GONE, tmp_path)) >= 4
    # Rows of hers that the sink has not committed when she is erased.
    spec = TABLES[VIEWS].raw
    held = read_events(lake.catalog, spec, Selection(where=f"viewer_id = {GONE}")).read_all()
    stores = Stores(
        lake.engine, REGISTRY, lambda: lake.catalog, lake.platform.dynamodb, "", lambda: lake.arrive([]), "training",
        True, None, True,
    )  # fmt: skip
    lake.platform.stores()
    subject = Subject.named(REGISTRY, "viewer", str(GONE))
    report = erase(stores, subject, now=instant(NOW))
    counts = {
        (one.place, one.unit): (one.before, one.after) for one in report.holdings if one.store == "iceberg"
    }
    assert counts["training.raw_view_events", "rows"] == (5, 0)
    assert counts["training.raw_items", "rows"] == (1, 0)
    assert any("had not committed" in what for what in report.unfinished)
    assert lake.files_with(GONE, tmp_path) == []
    assert len(lake.files_with(ALIKE, tmp_path)) >= 2

    def emptied(given: Sequence[Message]) -> list[Message]:
        return [replace(one, data=REDACTED) if one.source == "file:g#1" else one for one in given]

    assert lake.raw() == raw_of(emptied(messages))
    assert lake.check().waiting == 0
    # They come now, and as new messages at other places: a second copy goes, and a new one loses its content.
    lake.catalog.load_table(spec.identifier("training")).append(held)
    assert held.num_rows > 0
    assert lake.files_with(GONE, tmp_path) != []
    assert lake.check().repeated == held.num_rows
    assert lake.raw() == raw_of(emptied(messages))
    again = [replace(one, offset=one.offset + 500) for one in about(GONE)[:2]]
    lake.arrive(again)
    assert lake.sink("r.source_offset >= 2500") == 2
    assert lake.check().redacted == 2
    assert lake.raw() == raw_of(emptied([*messages, *again]))
    # Views come back from it.
    lake.platform.rebuild("view_events", from_lake=True)
    assert lake.differences([*emptied(messages), *again], [Erasure("viewer", str(GONE), NOW)]) == {}
