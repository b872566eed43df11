"""Events in the lake: what arrived is there exactly once, whatever fails, and the accepted events are the engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
from oracle import HOUR, Message
from pyiceberg.catalog import Catalog
from relations import insert_events, instant, refresh
from shipped import REGISTRY
from streams import NOW

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.progress import unread
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.event_export import EventsReport, TopicExport
from dagster_prefs.iceberg.event_reader import Selection, load_accepted, read_events
from dagster_prefs.iceberg.event_tables import PLACE, event_tables

TABLES = event_tables(REGISTRY)
VIEWS = "view_events"


def view(number: str, viewer: Any, at: int, **fields: Any) -> bytes:
    body = {
        "event_id": number, "viewer_id": viewer, "content_id": "c", "genre": "drama", "watch_duration_sec": 60,
        "completion_pct": 0.5, "watched_at": instant(at).isoformat(), **fields,
    }  # fmt: skip
    return json.dumps(body).encode()


def item(number: str, price: float) -> bytes:
    return json.dumps({"item_id": number, "title": number, "price": price}).encode()


def stream() -> list[Message]:
    """Valid views with second deliveries, rejected ones, and versions of items, over two days of arrival."""
    made = []
    for place in range(40):
        at = NOW - 30 * HOUR + place * (HOUR // 2)
        bodies = [view(f"e{place}", place % 5, at, genre=None if place % 7 == 0 else "drama")]
        if place % 4 == 0:
            bodies.append(view(f"e{place}", 99, at, watch_duration_sec=1))
        if place % 9 == 0:
            bodies += [b"\xff\x00 no JSON", view(f"r{place}", place, at, completion_pct=3)]
        made += [
            # Offsets with gaps, in two partitions.
            Message(VIEWS, "kafka:view_events", place % 2, place * 10 + turn, body, at, at + turn * HOUR)
            for turn, body in enumerate(bodies)
        ]
        if place % 5 == 0:
            made.append(
                Message("items", "file:items#1", 0, place, item(f"i{place % 3}", place), None, at + place)
            )
    return made


class Lake:
    """One engine with its tables of events in a catalog of their own."""

    def __init__(self, engine: EngineConfiguration, catalog: Catalog, order: Sequence[str]) -> None:
        self.engine = engine
        self.catalog = catalog
        self.order = order

    def export(self, topic: str = VIEWS, **options: Any) -> EventsReport:
        def waiting() -> datetime | None:
            with self.engine.connect() as connection:
                found = unread(connection, self.engine, REGISTRY.topics[topic])
            return found.since if found else None

        entity = REGISTRY.topics[topic].entity
        kind = REGISTRY.family(entity)[0].name if entity else None
        work = TopicExport(
            self.engine, lambda: self.catalog, TABLES[topic], kind, waiting, "training", **options
        )
        return work.run(instant(NOW))

    def arrive(self, messages: Sequence[Message]) -> None:
        with self.engine.connect() as connection:
            insert_events(connection, messages)
            refresh(connection, self.order)

    def engine_rows(self, query: str) -> list[tuple[Any, ...]]:
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

    def snapshots(self, topic: str = VIEWS) -> list[int]:
        tables = [self.catalog.load_table(spec.identifier("training")) for spec in TABLES[topic].both]
        return [snapshot.snapshot_id for table in tables for snapshot in table.snapshots()]


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


TYPED = "select event_id, viewer_id, content_id, genre, watch_duration_sec, completion_pct, watched_at from view_events"


@pytest.fixture
def lake(deployed: EngineConfiguration, deployed_state: Any, tmp_path: Path) -> Iterator[Lake]:
    made = Lake(deployed, open_catalog("sqlite", tmp_path.as_uri()), deployed_state.views)
    made.arrive(stream())
    return made


def test_what_arrived_is_exported_exactly_and_once(lake: Lake) -> None:
    done = lake.export()
    typed = lake.engine_rows(TYPED)
    assert done.failed == {}
    assert done.lost == 0
    assert lake.raw() == raw_of(stream())
    assert lake.accepted() == typed
    assert len(typed) == 40
    # Canaries and rejected messages have no typed event; of an hour without any there is no file.
    assert done.raw_rows == len(raw_of(stream()))
    assert done.typed_rows == 50
    unreadable = Selection(where="unreadable = true")
    assert read_events(lake.catalog, TABLES[VIEWS].raw, unreadable).read_all().num_rows == 5
    before = lake.snapshots()
    again = lake.export()
    assert (again.hours, again.raw_rows, lake.snapshots()) == (0, 0, before)
    # An earlier delivery that becomes visible late is in its own hour, and is the event from then on.
    first = Message(VIEWS, "file:history#1", 0, 7, view("e4", 7, NOW - 29 * HOUR), None, NOW - 50 * HOUR)
    lake.arrive([first])
    assert lake.export().hours == 1
    assert lake.raw() == raw_of([*stream(), first])
    assert lake.accepted() == lake.engine_rows(TYPED)
    assert [row[1] for row in lake.accepted() if row[0] == "e4"] == [7]
    # By arrival: only what had arrived by then.
    early = lake.accepted(arrived_until=instant(NOW - 29 * HOUR))
    assert 0 < len(early) < len(typed)
    assert set(early) <= {*typed, *lake.engine_rows(TYPED)}


def test_all_versions_of_reference_data_are_kept(lake: Lake) -> None:
    lake.export("items")
    with duckdb.connect() as session:
        load_accepted(session, "found", lake.catalog, TABLES["items"].typed)
        session.execute("set timezone = 'UTC'")
        versions = session.sql(
            "select item_id, price::int, replaced_at from found order by item_id, arrived_at"
        ).fetchall()
    newest = {(row[0], int(row[1])) for row in versions if row[2] is None}
    assert newest == {
        (name, int(price)) for name, price in lake.engine_rows("select item_id, price from items")
    }
    assert len(versions) == 8
    assert len(newest) == 3
