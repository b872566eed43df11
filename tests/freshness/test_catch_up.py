"""A late view is no alarm while its backlog is measured to end soon, and is one when it stands still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from shipped import REGISTRY

from dagster_prefs.declarations.contract import Domain, Freshness
from dagster_prefs.defs.freshness import metadata
from dagster_prefs.events.bootstrap import RELATION, BootstrapState, History
from dagster_prefs.freshness.alerts import transitions
from dagster_prefs.freshness.catch_up import (
    CATCH_UP_SECONDS,
    LONG_REBUILD_SECONDS,
    CatchingUp,
    _follower,
    excused,
    is_running,
    measure_history,
    reading_progress,
)
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.metrics import render_metrics
from dagster_prefs.freshness.status import Status
from dagster_prefs.live.backlog import Backlog, make_backlog, read_backlog
from dagster_prefs.live.follower import Follower, Work

TYPED = "views/view_events"
# Whether the work that waits becomes less, and how it is told: (seconds ago, waiting, taken since the note before).
FALLING = [(50, 900_000, 0), (30, 500_000, 400_000), (10, 100_000, 400_000)]
STANDING = [(50, 900_000, 0), (30, 900_000, 0), (10, 900_000, 0)]
GROWING = [(50, 100, 0), (30, 200, 900), (10, 300, 900)]
CREEPING = [(50, 1_000_000, 0), (30, 999_995, 5), (10, 999_990, 5)]
OLD = [(500, 900_000, 0), (400, 100_000, 800_000)]


def noted(world: Any, notes: Sequence[tuple[int, int, int]]) -> None:
    make_backlog(world.connection, world.engine)
    world.execute("delete from live_backlog")
    for seconds, waiting, taken in notes:
        world.execute(
            "insert into live_backlog values (clock_timestamp() - make_interval(secs => %s), %s, 0, %s)",
            [seconds, waiting, taken],
        )


def waiting(world: Any, messages: int, source: str = "kafka:view_events") -> None:
    """Have one write of so many messages wait, as its trigger notes it."""
    world.execute("delete from raw_arrivals where source <> 'test'")
    world.execute(
        "insert into raw_arrivals values ('raw_view_events', %s, 0, 1, 2, %s, now())", [source, messages]
    )


def late(world: Any) -> Measure:
    return {measure.key: measure for measure in world.views()}[TYPED]


@pytest.mark.parametrize(
    ("notes", "source", "level"),
    [
        (FALLING, "kafka:view_events", "catching up"),
        (STANDING, "kafka:view_events", "error"),
        (GROWING, "kafka:view_events", "error"),
        (CREEPING, "kafka:view_events", "error"),
        (OLD, "kafka:view_events", "error"),
        ([], "kafka:view_events", "error"),
        # History is bounded: that it comes faster than it is applied is no overload.
        (GROWING, "file:h#1", "catching up"),
        (STANDING, "file:h#1", "error"),
    ],
)
def test_only_a_backlog_that_ends_soon_is_no_alarm(
    busy: Any, notes: Sequence[tuple[int, int, int]], source: str, level: str
) -> None:
    busy.watch(1, age=2 * 3600)
    noted(busy, notes)
    waiting(busy, notes[-1][1] if notes else 10, source)
    measure = late(busy)
    assert measure.level == level
    assert measure.lag_seconds >= 7200
    alarms = [one.after for one in transitions({}, [measure])]
    assert alarms == ([] if level == "catching up" else ["error"])
    told = metadata(measure)
    text = render_metrics(Status(busy.now, 0.0, (measure,)))
    if level == "catching up":
        rate, left = told["catch_up_rate"], told["catch_up_seconds_left"]
        assert isinstance(rate, float)
        assert isinstance(left, float)
        assert rate > 0
        assert 0 < left < 60
        assert "catching up, " in measure.reason
        assert " left: " in measure.reason
        assert 'prefs_catch_up_seconds_left{name="view_events",stage="views"}' in text
    else:
        assert "catch_up_rate" not in told
        assert "prefs_catch_up_seconds_left{" not in text


def test_a_follower_that_stops_in_the_middle_alarms(busy: Any) -> None:
    busy.watch(1, age=2 * 3600)
    noted(busy, FALLING)
    waiting(busy, 100_000)
    known: dict[str, Any] = {}
    assert transitions(known, [late(busy)]) == []
    # A minute later, without another note.
    busy.execute("update live_backlog set noted_at = noted_at - interval '1 minute'")
    (change,) = transitions(known, [late(busy)])
    assert (change.key, change.after) == (TYPED, "error")


def test_items_are_late_for_the_same_reason(busy: Any) -> None:
    busy.watch(3, age=120)
    busy.refresh(age=100)
    assert {measure.level for measure in busy.online()} > {"ok"}
    noted(busy, FALLING)
    waiting(busy, 10)
    levels = {measure.name: measure.level for measure in busy.online()}
    assert levels["watch"] == "catching up"
    assert set(levels.values()) <= {"ok", "catching up"}


def test_the_follower_notes_its_work(world: Any) -> None:
    def nowhere(domain: Domain, keys: Sequence[str] | None, connection: Any) -> None:
        return

    for viewer in range(30):
        world.watch(viewer)
    assert read_backlog(world.connection, world.engine) is None
    Follower(world.engine, lambda: Work(REGISTRY, nowhere), process="the test").catch_up()
    found = read_backlog(world.connection, world.engine)
    assert found is not None
    assert (found.waiting, found.seconds_left, found.rebuilding_seconds) == (0, 0.0, None)
    assert world.execute("select sum(taken) <= 30, count(*) > 0 from live_backlog") == [(True, True)]


def state(parts_done: int = 1, idle: float = 5.0, **fields: Any) -> BootstrapState:
    from datetime import UTC, datetime

    return replace(
        BootstrapState(
            History("view_events", "iceberg:lake.views"),
            4,
            parts_done,
            parts_done * 1_000_000,
            4_000_000,
            parts_done * 10.0,
            datetime(2026, 11, 30, tzinfo=UTC) - timedelta(seconds=idle),
        ),
        **fields,
    )


def test_what_a_running_bootstrap_adds_counts() -> None:
    growing = Backlog(500_000, 10, 100_000.0, -5.0, None)
    assert _follower(growing, []) is None
    found = _follower(growing, [state()])
    # 3 of 4 million at 100,000 a second.
    assert found is not None
    assert (found.rate, found.seconds_left) == (100_000.0, 30.0)
    assert _follower(replace(growing, worked=None), [state()]) is None
    rebuilding = replace(growing, worked=None, rebuilding_seconds=200.0)
    told = _follower(rebuilding, [])
    assert told is not None
    assert told.rate is None
    assert "rebuilding views" in told.told
    assert _follower(replace(rebuilding, rebuilding_seconds=LONG_REBUILD_SECONDS), []) is None


def test_levels_that_are_no_lag_stay() -> None:
    found = CatchingUp("fast", 1.0, CATCH_UP_SECONDS)
    measure = Measure("views", "v", "error", "late", 9.0, Freshness(1, 2))
    assert excused(measure, found).level == "catching up"
    assert excused(measure, replace(found, seconds_left=CATCH_UP_SECONDS + 1)) == measure
    for level in ("ok", "unknown", "skipped"):
        other = replace(measure, level=level)
        assert excused(other, found) == other


def test_a_bootstrap_is_shown_until_a_day_after_its_end(world: Any) -> None:
    def part(name: str, started: float | None, completed: float | None) -> None:
        world.execute(
            f"insert into {RELATION} values ('view_events', 'iceberg:lake.views', '', '7', %s, 0, 500, %s,"
            " now() - make_interval(secs => %s), now() - make_interval(secs => %s))",
            [name, None if completed is None else 500, started, completed],
        )

    def told() -> list[tuple[str, str]]:
        found = measure_history(world.engine, now=world.execute("select now()")[0][0])
        return [(measure.level, measure.reason) for measure in found]

    def earlier(span: str) -> None:
        world.execute(
            f"update {RELATION} set started_at = started_at - %s::interval,"
            " completed_at = completed_at - %s::interval",
            [span, span],
        )

    assert told() == []
    part("a", 20, 10)
    part("b", 10, None)
    ((level, reason),) = told()
    assert level == "catching up"
    assert reason == "1 of 2 parts, 500 messages, 50 per second, about 10 s left"
    earlier("1 hour")
    ((level, reason),) = told()
    assert level == "warn"
    assert "run the same `prefs bootstrap` again" in reason
    assert not is_running(state(idle=601), state().progressed_at + timedelta(seconds=5))  # type: ignore[operator]
    world.execute(f"update {RELATION} set messages = 500, completed_at = started_at where part = 'b'")
    assert [level for level, _ in told()] == ["ok"]
    earlier("1 day")
    assert told() == []


@pytest.mark.parametrize(
    ("read", "catches"),
    # Seconds of Kafka's time that were read in the fifty seconds before now, and what is left of an hour.
    [(500.0, 400.0), (50.0, None), (10.0, None)],
)
def test_reading_catches_up_only_if_it_is_faster_than_time(
    world: Any, read: float, catches: float | None
) -> None:
    topic = REGISTRY.topics["view_events"]
    for place, (arrived, sent) in enumerate([(51.0, 3600 + read), (1.0, 3600.0)]):
        world.execute(
            f"insert into {topic.parsed} (source, source_partition, source_offset, arrived_at, kafka_timestamp)"
            " values ('kafka:view_events', 0, %s, now() - make_interval(secs => %s),"
            " now() - make_interval(secs => %s))",
            [place, arrived, sent],
        )
    found = reading_progress(world.connection, world.engine, topic, 100_000, 3600.0)
    if catches is None:
        assert found is None
    else:
        assert found is not None
        assert found.seconds_left == pytest.approx(catches, rel=0.05)
        assert found.rate == pytest.approx(100_000 / catches, rel=0.05)
    world.execute(f"update {topic.parsed} set arrived_at = arrived_at - interval '5 minutes'")
    assert reading_progress(world.connection, world.engine, topic, 100_000, 3600.0) is None
