from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.kafka import (
    GATHER_SECONDS,
    POLL_SECONDS,
    KafkaUnavailable,
    KafkaWriter,
    ingest_topic,
    next_messages,
)
from dagster_prefs.events.raw import Batches, Progress
from tests.events.conftest import produce, rows

Broker = tuple[str, Any]
VALUES = "select data from raw_view_events order by source_partition, source_offset"


def test_a_topic_is_read_once_across_runs(
    registry: Registry, store: EngineConfiguration, broker: Broker
) -> None:
    address, producer = broker
    produce(address, "view_events", [b"a", b"\xff"])
    producer.produce("view_events", value=None)
    assert producer.flush(60) == 0
    produce(address, "view_events", [b"c"])
    first = ingest_topic(store, KafkaSource(address), registry.topics["view_events"])
    assert (first.source, first.lines, first.accepted, first.blank) == ("kafka:view_events", 3, 3, 1)
    again = ingest_topic(store, KafkaSource(address), registry.topics["view_events"])
    assert (again.lines, again.accepted) == (0, 0)
    produce(address, "view_events", [b"d"])
    assert ingest_topic(store, KafkaSource(address), registry.topics["view_events"]).accepted == 1
    assert sorted(rows(store, VALUES)) == sorted([(b"a",), (b"\xff",), (b"c",), (b"d",)])
    assert rows(store, "select count(*) from raw_view_events where kafka_timestamp is null") == [(0,)]


def test_a_short_topic_is_not_waited_for_as_if_it_were_long() -> None:
    """librdkafka waits for every message that a call asks for, so only the first is waited for long."""
    asked = []

    class Consumer:
        def consume(self, num_messages: int, timeout: float) -> list[str]:
            asked.append((num_messages, timeout))
            return [["a"], ["b", "c"], []][len(asked) - 1]

    assert next_messages(Consumer(), 10) == ["a", "b", "c"]
    assert asked == [(1, POLL_SECONDS), (9, GATHER_SECONDS)]
    assert GATHER_SECONDS < POLL_SECONDS
    assert next_messages(Consumer(), 10) == []
    assert asked[2:] == [(1, POLL_SECONDS)]


def test_a_reading_that_was_cut_goes_on_where_the_engine_is(
    registry: Registry, store: EngineConfiguration, broker: Broker
) -> None:
    address, _ = broker
    produce(address, "view_events", [b"%d" % n for n in range(1000)])

    def cut(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_topic(store, KafkaSource(address), registry.topics["view_events"], batches=Batches(100, cut))
    held = rows(store, "select count(*) from raw_view_events")[0][0]
    assert 0 < held < 1000
    report = ingest_topic(store, KafkaSource(address), registry.topics["view_events"], batches=Batches(300))
    assert (report.accepted, report.already_present) == (1000 - held, 0)
    assert {int(value) for (value,) in rows(store, VALUES)} == set(range(1000))


def test_a_reading_without_an_end_stops_when_told(
    registry: Registry, store: EngineConfiguration, broker: Broker
) -> None:
    address, _ = broker
    produce(address, "view_events", [b"x"] * 50)
    stop = threading.Event()
    report = ingest_topic(
        store,
        KafkaSource(address),
        registry.topics["view_events"],
        stop=stop,
        batches=Batches(20, lambda p: stop.set() if p.done == 50 else None),
    )
    assert report.accepted == 50


def test_a_file_goes_through_kafka_where_the_connector_fills_the_raw_tables(
    registry: Registry, store: EngineConfiguration, broker: Broker, tmp_path: Path
) -> None:
    address, _ = broker
    produce(address, "prod.views", [])
    messages = [b'{"event_id":"%d","viewer_id":1,"watched_at":"2026-01-01T00:00:00Z"}' % n for n in range(5)]
    path = tmp_path / "views.jsonl"
    path.write_bytes(b"\n".join([*messages, b"not JSON"]) + b"\n")
    options = FileOptions("view_events")
    deliver = KafkaWriter(address).delivery({"view_events": "prod.views"})
    report = ingest_file(store, registry, path, options, batches=Batches(2), deliver=deliver)
    assert (report.lines, report.accepted) == (6, 6)
    assert rows(store, "select count(*) from raw_view_events") == [(0,)]
    # A complete file is not sent again.
    assert ingest_file(store, registry, path, options, deliver=deliver).accepted == 0
    ingest_topic(store, KafkaSource(address, {"view_events": "prod.views"}), registry.topics["view_events"])
    assert sorted(value for (value,) in rows(store, VALUES)) == sorted([*messages, b"not JSON"])


def test_another_name_in_kafka(registry: Registry, store: EngineConfiguration, broker: Broker) -> None:
    address, _ = broker
    produce(address, "prod.views", [b"x"])
    assert (
        ingest_topic(
            store, KafkaSource(address, {"view_events": "prod.views"}), registry.topics["view_events"]
        ).source
        == "kafka:prod.views"
    )


def test_a_recreated_topic_is_refused(registry: Registry, store: EngineConfiguration, broker: Broker) -> None:
    address, _ = broker
    produce(address, "view_events", [b"x"])
    ingest_topic(store, KafkaSource(address), registry.topics["view_events"])
    with store.connect() as session:
        session.execute("update raw_view_events set source_offset = 5000")
    with pytest.raises(KafkaUnavailable, match="was recreated"):
        ingest_topic(store, KafkaSource(address), registry.topics["view_events"])


def test_no_such_topic_and_no_broker(
    registry: Registry, store: EngineConfiguration, broker: Broker, free_port: Callable[[], int]
) -> None:
    with pytest.raises(KafkaUnavailable, match="has no topic items"):
        ingest_topic(store, KafkaSource(broker[0]), registry.topics["items"], timeout_seconds=3)
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(KafkaUnavailable, match="PREFS_KAFKA_BOOTSTRAP"):
        ingest_topic(store, KafkaSource(nowhere), registry.topics["items"], timeout_seconds=1)
    with pytest.raises(KafkaUnavailable, match="PREFS_KAFKA_BOOTSTRAP"):
        KafkaWriter(nowhere, timeout_seconds=1).check("items")
