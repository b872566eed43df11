"""The raw tables as dbt makes them, in an empty database of the embedded engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.kafka import KafkaWriter


@pytest.fixture
def store(engine: EngineConfiguration, registry: Registry) -> EngineConfiguration:
    """The engine with empty raw tables and `ingest_files`."""
    with engine.connect() as session:
        for topic in registry.topics.values():
            session.execute(
                f"create table {topic.raw} (source text not null, source_partition int not null, "
                "source_offset bigint not null, data bytea not null, kafka_timestamp timestamptz, "
                "arrived_at timestamptz not null default clock_timestamp(), "
                "primary key (source, source_partition, source_offset))"
            )
        session.execute(
            "create table ingest_files (source text primary key, path text, topic text, lines bigint, "
            "shift_seconds bigint, completed_at timestamptz)"
        )
        session.execute(
            "create table canary_keys (deployment text primary key, secret_hex text, made_at timestamptz)"
        )
    return engine


def rows(engine: EngineConfiguration, query: str) -> list[tuple[Any, ...]]:
    with engine.connect() as session:
        return session.execute(query).fetchall()


def produce(bootstrap: str, topic: str, messages: list[bytes]) -> None:
    writer = KafkaWriter(bootstrap)
    writer.check(topic)
    for message in messages:
        writer.send(topic, message)
    writer.flush()


@pytest.fixture
def broker() -> Iterator[tuple[str, Any]]:
    """A Kafka cluster inside librdkafka: its address, and a producer that may send tombstones."""
    producer: Any = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 0})
    found = producer.list_topics(timeout=60).brokers.values()
    yield ",".join(f"{node.host}:{node.port}" for node in found), producer
    producer.flush(5)
