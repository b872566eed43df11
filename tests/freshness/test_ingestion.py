"""Ingestion lag against a Kafka cluster (librdkafka's own) that goes on while the ingester stands still."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from kafka_cluster import Cluster
from shipped import REGISTRY

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.kafka import ingest_topic
from dagster_prefs.freshness.ingestion import Broker, ingestion_lag
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.measures import measure_ingestion
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

TOPIC = "view_events"


@pytest.fixture
def measure(world: Any, cluster: Cluster) -> Callable[..., Measure]:
    def read(start: Literal["earliest", "latest"] = "earliest") -> Measure:
        found = measure_ingestion(
            world.engine,
            REGISTRY,
            KafkaSource(cluster.bootstrap, start=start),
            now=world.now,
            timeout_seconds=60,
        )
        return {one.name: one for one in found}[TOPIC]

    return read


def partitions(measure: Measure) -> dict[int, dict[str, Any]]:
    return {row["partition"]: row for row in json.loads(measure.notes["by_partition"])}


def test_lag_grows_while_the_ingester_stands_and_goes_when_it_runs(
    registry: Registry, world: Any, cluster: Cluster, measure: Callable[..., Measure]
) -> None:
    for number in range(6):
        cluster.send(TOPIC, number % 2, world.now - timedelta(seconds=60 - number))
    ingest_topic(world.engine, KafkaSource(cluster.bootstrap), registry.topics[TOPIC])
    assert measure().level == "ok"
    assert measure().values["messages_behind"] == 0

    cluster.send(TOPIC, 1, world.now - timedelta(seconds=4))
    cluster.send(TOPIC, 1, world.now - timedelta(seconds=1))
    cluster.send(TOPIC, 3, world.now - timedelta(seconds=2))
    late = measure()
    assert late.level == "warn"
    assert late.values["messages_behind"] == 3
    assert late.lag_seconds == pytest.approx(4, abs=0.01)
    rows = partitions(late)
    assert (rows[1]["messages"], rows[1]["state"]) == (2, "behind")
    assert (rows[3]["messages"], rows[3]["last_offset"]) == (1, None)
    assert rows[0]["state"] == "current"
    world.later(seconds=2)
    assert measure().level == "error"

    ingest_topic(world.engine, KafkaSource(cluster.bootstrap), registry.topics[TOPIC])
    assert measure().level == "ok"
    world.later(hours=1)
    assert measure().level == "ok", "a quiet topic has no lag"


def test_tombstones_are_never_owed(
    registry: Registry, world: Any, cluster: Cluster, measure: Callable[..., Measure]
) -> None:
    cluster.send(TOPIC, 2, world.now - timedelta(seconds=60))
    ingest_topic(world.engine, KafkaSource(cluster.bootstrap), registry.topics[TOPIC])
    cluster.send(TOPIC, 2, world.now - timedelta(seconds=50), None)
    assert measure().level == "ok"
    cluster.send(TOPIC, 2, world.now - timedelta(seconds=40))
    assert measure().lag_seconds == pytest.approx(40, abs=0.01)


def test_a_topic_that_was_recreated_is_an_error(
    world: Any, cluster: Cluster, measure: Callable[..., Measure]
) -> None:
    world.execute(
        "insert into raw_view_events (source, source_partition, source_offset, data)"
        " values ('kafka:view_events', 0, 700, '{}')"
    )
    found = measure()
    assert found.level == "error"
    assert partitions(found)[0]["state"] == "recreated"
    assert "was recreated" in found.reason


def test_a_topic_that_was_recreated_with_fewer_partitions_is_an_error(
    world: Any, measure: Callable[..., Measure]
) -> None:
    world.execute(
        "insert into raw_view_events (source, source_partition, source_offset, data)"
        " values ('kafka:view_events', 6, 1, '{}')"
    )
    found = measure()
    assert found.level == "error"
    assert {number: row["state"] for number, row in partitions(found).items()} == {
        **dict.fromkeys(range(4), "current"),
        6: "recreated",
    }


def test_a_message_from_the_future_has_no_age(
    registry: Registry, world: Any, cluster: Cluster, measure: Callable[..., Measure]
) -> None:
    """Its producer's clock is wrong, and would make a reader that stands still look current for as long."""
    cluster.send(TOPIC, 1, world.now + timedelta(hours=1))
    found = measure()
    assert found.level == "unknown"
    assert "3600 s in the future" in found.reason
    assert found.lag_seconds == 0
    cluster.send(TOPIC, 2, world.now - timedelta(seconds=60))
    assert measure().level == "unknown"
    assert measure().lag_seconds == pytest.approx(60, abs=0.01)
    ingest_topic(world.engine, KafkaSource(cluster.bootstrap), registry.topics[TOPIC])
    assert measure().level == "ok"


def test_a_reader_that_starts_at_the_end_cannot_be_judged_before_its_first_message(
    world: Any, cluster: Cluster, measure: Callable[..., Measure]
) -> None:
    cluster.send(TOPIC, 1, world.now - timedelta(seconds=60))
    found = measure(start="latest")
    assert found.level == "unknown"
    assert partitions(found)[1]["state"] == "unknown"
    assert partitions(found)[3]["state"] == "current"


def test_messages_that_the_broker_deleted_unread_are_lost(world: Any) -> None:
    class Expired(Broker):
        """Brokers whose retention ran ahead of the engine; the mock cluster deletes nothing."""

        def watermarks(self, kafka_topic: str) -> dict[int, tuple[int, int]]:
            return {0: (10, 12)}

        def first_messages(self, kafka_topic: str, positions: Any) -> dict[int, datetime | None]:
            assert positions == {0: 10}
            return {0: datetime(2026, 1, 1, tzinfo=UTC)}

    world.execute(
        "insert into raw_view_events (source, source_partition, source_offset, data)"
        " values ('kafka:view_events', 0, 4, '{}')"
    )
    with world.engine.connect() as connection, Expired("127.0.0.1:1") as broker:
        lag = ingestion_lag(connection, world.engine, broker, REGISTRY.topic(TOPIC), now=world.now)
    assert lag.in_state("lost") == [0]
    assert lag.messages == 2


def test_a_topic_that_is_missing_hides_no_other(world: Any, cluster: Cluster) -> None:
    found = measure_ingestion(
        world.engine,
        REGISTRY,
        KafkaSource(cluster.bootstrap, {"user.events": "no such topic"}),
        now=world.now,
        timeout_seconds=60,
    )
    levels = {one.name: one.level for one in found}
    assert levels == {"user.events": "unknown", "view_events": "ok", "content_interactions": "ok"}


def test_brokers_that_are_down_are_unknown(world: Any, free_port: Callable[[], int]) -> None:
    found = measure_ingestion(
        world.engine, REGISTRY, KafkaSource(f"127.0.0.1:{free_port()}"), now=world.now, timeout_seconds=0.3
    )
    assert {one.level for one in found} == {"unknown"}
    assert all("PREFS_KAFKA_BOOTSTRAP" in one.reason for one in found)


def test_no_brokers_are_skipped_and_say_so(world: Any) -> None:
    found = measure_ingestion(world.engine, REGISTRY, KafkaSource(), now=world.now)
    assert {one.level for one in found} == {"skipped"}
    assert all("no Kafka is configured" in one.reason for one in found)


def test_an_engine_that_is_down_is_unknown(
    world: Any, cluster: Cluster, free_port: Callable[[], int]
) -> None:
    found = measure_ingestion(
        replace(world.engine, port=free_port()), REGISTRY, KafkaSource(cluster.bootstrap), now=world.now
    )
    assert {one.level for one in found} == {"unknown"}
    assert all("cannot be reached" in one.reason for one in found)


def test_a_history_ends_where_kafka_is_read_from(world: Any, cluster: Cluster) -> None:
    """The latest time among the messages at the offsets: from then on no partition lacks anything."""
    platform = Platform(Settings(kafka_bootstrap=cluster.bootstrap))
    for partition, age in ((0, 500), (0, 300), (1, 400), (1, 100)):
        cluster.send(TOPIC, partition, world.now - timedelta(seconds=age))
    partitions = sorted(cluster.producer.list_topics(TOPIC, timeout=60).topics[TOPIC].partitions)
    empty = dict.fromkeys(partitions, 0)
    # The fixture's tombstone is at offset 0.
    ended = platform.history_end(TOPIC, {**empty, 0: 2, 1: 0})
    assert abs(ended - (world.now - timedelta(seconds=300))) < timedelta(seconds=1)
    ended = platform.history_end(TOPIC, {**empty, 0: 3, 1: 0})
    assert abs(ended - (world.now - timedelta(seconds=400))) < timedelta(seconds=1)
    for offsets, wrong in (
        ({**empty, 0: 3, 1: 2}, "has no message with a time at these offsets"),
        ({0: 0}, "names no offset of partition 1"),
        ({**empty, 99: 0}, "names partition 99"),
    ):
        with pytest.raises(PrefsError, match=wrong):
            platform.history_end(TOPIC, offsets)
    with pytest.raises(PrefsError, match="PREFS_KAFKA_BOOTSTRAP names no brokers"):
        Platform(Settings()).history_end(TOPIC, empty)
