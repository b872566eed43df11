"""What has been read is remembered without a clock, and without a number that writers commit out of order."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from shipped import REGISTRY

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.freshness.measures import measure_views
from dagster_prefs.freshness.views import typed_relations, view_lag
from dagster_prefs.settings import load_settings

INSERT = (
    "insert into raw_view_events (source, source_partition, source_offset, data, arrived_at)"
    " values (%s, 0, %s, %s, %s) on conflict do nothing"
)


def event(name: str, moment: datetime) -> bytes:
    return json.dumps({"event_id": name, "viewer_id": 1, "watched_at": moment.isoformat()}).encode()


def waiting(world: Any) -> dict[str, int]:
    with world.engine.connect() as connection:
        return {
            topic: found.messages
            for topic, found in waiting_since(connection, world.engine, load_settings().registry()).items()
        }


def of_view_events(world: Any) -> tuple[str, Any]:
    (measure,) = [
        one for one in measure_views(world.engine, REGISTRY, now=world.now) if one.name == "view_events"
    ]
    return measure.level, measure.values["waiting"]


@pytest.mark.parametrize("stepped", [timedelta(days=1), timedelta(0)], ids=["a day back", "the same instant"])
def test_a_clock_that_stepped_back_hides_nothing(busy: Any, stepped: timedelta) -> None:
    ((newest,),) = busy.execute("select max(arrived_at) from raw_view_events")
    # It happened two days ago, because more than a day after its arrival it would be rejected.
    busy.execute(INSERT, ["late", 1, event("late", busy.now - timedelta(days=2)), newest - stepped])
    assert waiting(busy) == {"view_events": 1}
    assert of_view_events(busy) == ("error", 1)
    busy.refresh("view_events_parsed")
    # Read, and not among the typed events yet.
    assert waiting(busy) == {}
    assert of_view_events(busy) == ("error", 1)
    busy.refresh()
    assert of_view_events(busy) == ("ok", 0)
    assert busy.execute("select count(*) from view_events where event_id = 'late'") == [(1,)]


def test_the_lower_number_that_is_committed_last_is_seen(busy: Any) -> None:
    """Offset, arrival and transaction number of the slow writer are all below those of the quick one."""
    with busy.engine.connect() as slow, slow.transaction():
        slow.execute(INSERT, ["both", 1, event("slow", busy.now), busy.now - timedelta(hours=1)])
        busy.execute(INSERT, ["both", 2, event("quick", busy.now), busy.now])
        assert waiting(busy) == {"view_events": 1}
        busy.refresh()
        assert waiting(busy) == {}
        # As dbt's refresh deletes what it reads.
        busy.execute("delete from raw_arrivals")
    assert waiting(busy) == {"view_events": 1}
    assert of_view_events(busy) == ("error", 1)
    busy.refresh()
    assert (waiting(busy), of_view_events(busy)) == ({}, ("ok", 0))


def test_what_is_there_already_does_not_wait_again(busy: Any) -> None:
    busy.execute(INSERT, ["once", 1, event("once", busy.now), busy.now])
    busy.refresh()
    busy.execute(INSERT, ["once", 1, event("once", busy.now), busy.now])
    assert waiting(busy) == {}


def test_what_was_deleted_before_it_was_read_does_not_wait(busy: Any) -> None:
    with busy.engine.connect() as connection, connection.transaction(), connection.cursor() as cursor:
        cursor.execute("create temporary table new (n bigint) on commit drop")
        cursor.execute("insert into new select generate_series(1, 3)")
        cursor.execute(
            "insert into raw_view_events (source, source_partition, source_offset, data)"
            " select 'gone', 0, n, %s from new",
            [event("gone", busy.now)],
        )
    busy.execute("delete from raw_view_events where source = 'gone' and source_offset = 1")
    assert waiting(busy) == {"view_events": 3}
    busy.execute("delete from raw_view_events where source = 'gone'")
    assert waiting(busy) == {}


def test_the_mark_is_of_what_waits(registry: Registry, busy: Any) -> None:
    def mark() -> str:
        with busy.engine.connect() as connection:
            return waiting_since(connection, busy.engine, registry)["view_events"].mark

    busy.execute(INSERT, ["one", 1, event("one", busy.now), busy.now])
    first = mark()
    assert mark() == first
    busy.execute(INSERT, ["one", 2, event("two", busy.now), busy.now - timedelta(days=1)])
    assert mark() != first


def test_on_risingwave_the_newest_offsets_tell(busy: Any) -> None:
    # RisingWave's statements are plain SQL, so the embedded engine runs them too.
    streaming = replace(busy.engine, kind="risingwave")
    (typed,) = [one for one in typed_relations(REGISTRY) if one.relation == "view_events"]

    def lag() -> tuple[int, float]:
        with busy.engine.connect() as connection:
            found = view_lag(connection, streaming, typed, now=busy.now)
        return found.waiting, found.lag_seconds

    assert lag() == (0, 0.0)
    day = timedelta(days=1)
    for offset in (1, 2):
        busy.execute(INSERT, ["new", offset, event(f"n{offset}", busy.now - 2 * day), busy.now - day])
    # There, the progress is that of the raw tables.
    busy.execute(
        "insert into ingest_progress select 'view_events', source, source_partition, max(source_offset), count(*),"
        " max(kafka_timestamp), max(arrived_at) from raw_view_events where source = 'new' group by 2, 3"
    )
    assert lag() == (2, day.total_seconds())
    busy.refresh()
    assert lag() == (0, 0.0)
