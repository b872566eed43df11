from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.ingest import ingest_file
from dagster_prefs.events.kafka import holds_messages
from dagster_prefs.events.messages import Topic, event_time
from dagster_prefs.events.raw import Progress
from dagster_prefs.tools.scenario import SimulationPlan
from dagster_prefs.tools.simulation import SimulatedEvent, SimulationError
from dagster_prefs.tools.simulator import (
    follow_to_engine,
    remembered_end,
    simulate_to_engine,
    simulate_to_files,
    simulate_to_kafka,
)
from tests.events.conftest import rows

END = datetime(2026, 11, 21, 6, tzinfo=UTC)
PLAN = SimulationPlan(
    END, seed=7, viewers=60, days=9, view_events=3000, shop_events=2000, interactions=600, items=150,
    malformed_share=0.05, duplicate_share=0.03, late_share=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def events() -> list[SimulatedEvent]:
    return list(PLAN.events())


def parsed(events: list[SimulatedEvent], topic: str) -> list[dict[str, Any]]:
    found = []
    for event in events:
        try:
            value = json.loads(event.message.decode())
        except ValueError:
            continue
        if event.topic == topic and isinstance(value, dict):
            found.append(value)
    return found


def test_the_same_plan_gives_the_same_messages(events: list[SimulatedEvent]) -> None:
    assert events == list(PLAN.events())
    assert events != list(replace(PLAN, seed=8).events())
    assert Counter(event.topic for event in events) == PLAN.counts()


@pytest.mark.parametrize("total", [0, 1, 2, 17])
def test_counts_are_exact_in_the_small(total: int) -> None:
    plan = replace(
        PLAN, view_events=total, shop_events=total, interactions=total, items=1, viewers=1, contents=1
    )
    assert Counter(event.topic for event in plan.events()) == Counter(
        {topic: count for topic, count in plan.counts().items() if count}
    )


def test_times_lie_in_the_days_before_the_end(events: list[SimulatedEvent]) -> None:
    for event in events:
        assert END - timedelta(days=PLAN.days) <= event.event_time <= END


def test_late_events_and_duplicates_are_as_many_as_asked(events: list[SimulatedEvent]) -> None:
    for topic, total in (("view_events", 3000), ("user.events", 2000), ("content_interactions", 600)):
        ids = Counter(e.message for e in events if e.topic == topic and b'"event_id"' in e.message)
        assert sum(n - 1 for m, n in ids.items() if b"bad-" not in m) == round(total * 0.03)
    views = [e for e in events if e.topic == "view_events"]
    newest, late = views[0].event_time, 0
    for event in views:
        late += event.event_time < newest - timedelta(minutes=20)
        newest = max(newest, event.event_time)
    assert 60 <= late <= 400


def test_every_kind_of_malformed_message_comes(
    topics: Mapping[str, Topic], events: list[SimulatedEvent]
) -> None:
    by_topic: dict[str, Counter[str]] = {topic: Counter() for topic in topics}
    for event in events:
        by_topic[event.topic][refusal(event, topics[event.topic])] += 1
    common = {"not valid JSON", "not a JSON object", "missing event_id", "bad event_id", "future"}
    assert common | {
        "missing viewer_id", "bad viewer_id", "missing watched_at", "bad watched_at",
        "negative watch_duration_sec", "bad watch_duration_sec", "completion_pct outside 0..1",
        "bad completion_pct",
    } <= set(by_topic["view_events"])  # fmt: skip
    assert common | {
        "missing user_id", "bad user_id", "missing event_time", "bad event_time", "unknown event_type",
        "missing event_type", "negative price", "bad price",
    } <= set(by_topic["user.events"])  # fmt: skip
    for topic, total in (("view_events", 3000), ("user.events", 2000), ("content_interactions", 600)):
        assert sum(n for reason, n in by_topic[topic].items() if reason) == round(total * 0.05)


def refusal(event: SimulatedEvent, topic: Topic) -> str:
    """Why a message is no valid event, written down anew from the design; empty where it is one."""
    try:
        value = json.loads(event.message.decode())
    except ValueError:
        return "not valid JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    keys = ["item_id"] if topic.name == "items" else ["event_id"]
    keys += {"user.events": ["user_id"], "items": []}.get(topic.name, ["viewer_id"])
    for key in keys:
        if value.get(key) is None:
            return f"missing {key}"
        if not isinstance(value[key], str | int) or (key == "viewer_id" and not str(value[key]).isdigit()):
            return f"bad {key}"
    if topic.time:
        if topic.time not in value:
            return f"missing {topic.time}"
        moment = event_time(event.message, topic)
        if moment is None:
            return f"bad {topic.time}"
        if moment > END + timedelta(hours=24):
            return "future"
    kinds = {"user.events": ("view", "wishlist", "add_to_cart", "purchase")}.get(
        topic.name, ("like", "share", "search")
    )
    if topic.name in ("user.events", "content_interactions"):
        if "event_type" not in value:
            return "missing event_type"
        if value["event_type"] not in kinds:
            return "unknown event_type"
    for field in ("price", "watch_duration_sec", "completion_pct"):
        if isinstance(value.get(field), str):
            return f"bad {field}"
        if field == "completion_pct" and not 0 <= value.get(field, 0) <= 1:
            return "completion_pct outside 0..1"
        if (value.get(field) or 0) < 0:
            return f"negative {field}"
    return ""


def test_the_shape_is_that_of_people(events: list[SimulatedEvent]) -> None:
    contents = Counter(view.get("content_id") for view in parsed(events, "view_events"))
    counts = sorted(contents.values(), reverse=True)
    assert sum(counts[: len(counts) // 10]) > 0.25 * sum(counts)
    hours = Counter(e.event_time.hour for e in events if e.topic == "view_events")
    assert sum(hours[h] for h in (19, 20, 21, 22)) > 3 * sum(hours[h] for h in (1, 2, 3, 4))
    items = {
        item["item_id"]: item for item in parsed(events, "items") if "item_id" in item and "in_stock" in item
    }
    assert len(items) == PLAN.items
    assert any(not item["in_stock"] for item in items.values())
    shop = parsed(events, "user.events")
    viewed = {(e.get("session_id"), e.get("item_id")) for e in shop if e.get("event_type") == "view"}
    bought = [(e["session_id"], e["item_id"]) for e in shop if e.get("event_type") == "purchase"]
    assert bought
    assert set(bought) <= viewed
    assert any(e.get("price", 0) is None for e in shop)
    assert any(e.get("brand") == "" for e in shop)
    assert any(e.get("category") == "" for e in shop)
    written = [str(view.get("watched_at")) for view in parsed(events, "view_events")]
    for mark in ("Z", " UTC", "+02:00", "-0500"):
        assert any(text.endswith(mark) for text in written), mark
    assert any(text.isdigit() for text in written)


def test_the_engine_takes_a_plan_once(
    registry: Registry, topics: Mapping[str, Topic], store: EngineConfiguration, events: list[SimulatedEvent]
) -> None:
    def cut(progress: Progress) -> None:
        if progress.messages > 2000:
            raise KeyboardInterrupt

    assert remembered_end(store, PLAN) is None
    with pytest.raises(KeyboardInterrupt):
        simulate_to_engine(store, registry, PLAN, batch_size=500, progress=cut)
    assert remembered_end(store, replace(PLAN, end=END + timedelta(days=1))) == END
    reports = simulate_to_engine(store, registry, PLAN)
    assert {r.topic: r.lines for r in reports} == PLAN.counts()
    assert sum(r.already_present for r in reports) > 1000
    again = simulate_to_engine(store, registry, PLAN)
    assert {r.topic: (r.accepted, r.already_present) for r in again} == {
        topic: (0, count) for topic, count in PLAN.counts().items()
    }
    for topic in topics.values():
        held = rows(store, f"select source_offset, data from {topic.raw} order by source_offset")
        assert held == list(enumerate((e.message for e in events if e.topic == topic.name), 1))


@pytest.mark.parametrize("compress", [False, True])
def test_files_can_be_ingested(
    registry: Registry,
    store: EngineConfiguration,
    tmp_path: Path,
    events: list[SimulatedEvent],
    compress: bool,
) -> None:
    paths = simulate_to_files(tmp_path / "out", PLAN, compress=compress)
    for topic, path in paths.items():
        content = gzip.decompress(path.read_bytes()) if compress else path.read_bytes()
        assert content.split(b"\n")[:-1] == [e.message for e in events if e.topic == topic]
        report = ingest_file(store, registry, path)
        assert (report.topic, report.accepted) == (topic, PLAN.counts()[topic])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths.values())


def test_kafka_takes_a_plan(broker: tuple[str, Any]) -> None:
    small = replace(PLAN, view_events=50, shop_events=40, interactions=20, items=10)
    assert simulate_to_kafka(broker[0], small) == small.counts()


def test_topics_may_have_other_names_in_kafka(broker: tuple[str, Any]) -> None:
    address, producer = broker
    small = replace(PLAN, view_events=50, shop_events=0, interactions=0, items=1)
    # The cluster makes a topic when it is first asked for.
    for name in ("prod.views", "prod.items"):
        producer.list_topics(name, timeout=60)
    assert holds_messages(address, "prod.views") is False
    simulate_to_kafka(address, small, names={"view_events": "prod.views", "items": "prod.items"})
    assert holds_messages(address, "prod.views") is True


def test_a_live_trickle_happens_now(
    registry: Registry, topics: Mapping[str, Topic], store: EngineConfiguration
) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    counts = follow_to_engine(store, registry, PLAN, rate=200, seconds=0.3)
    assert sum(counts.values()) > 0
    for topic, count in counts.items():
        held = rows(store, f"select data from {topics[topic].raw}")
        assert len(held) == count
        for (data,) in held:
            moment = event_time(data, topics[topic])
            assert moment is not None
            assert before < moment <= datetime.now(UTC)


@pytest.mark.parametrize(
    "wrong", [{"viewers": 0}, {"view_events": -1}, {"late_share": 2.0}, {"end": datetime(2026, 1, 1)}]
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SimulationError):
        replace(PLAN, **wrong)
