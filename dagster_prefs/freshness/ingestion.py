"""Ingestion lag: the engine's read position in each Kafka partition, compared with the brokers' offsets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

import psycopg
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, TopicPartition
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.environment import CONSUMER_GROUP
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.contact import BROKER_TIMEOUT_SECONDS, Contact, KafkaUnavailable
from dagster_prefs.events.kafka import TopicUnavailable, topic_partitions, watermarks
from dagster_prefs.events.topics import TopicGeneration, source_name
from dagster_prefs.freshness.levels import Unmeasurable, unreadable

State = Literal["current", "behind", "lost", "recreated", "unknown"]


class BrokersSilent(Unmeasurable):
    """No broker answers, so measuring the next topic would fail as well."""


@dataclass(frozen=True)
class PartitionLag:
    """The lag of one partition: it holds offsets `low` to below `high`, the engine read up to `last_offset`.

    `messages` counts those the engine has not read yet; `lag_seconds` is the age of the first of them by its
    Kafka timestamp (0 when there is none, None where it has no timestamp, negative for one from the future).
    `state`: `lost` when the broker deleted messages before the engine read them; `recreated` when the
    engine's offset exceeds the topic's, the engine has read a partition that no longer exists (then `low` and
    `high` are 0), or the topic ids show that it has read another topic of that name; `unknown` when the
    engine was configured to start at the end and has read nothing yet.
    """

    partition: int
    low: int
    high: int
    last_offset: int | None
    messages: int
    lag_seconds: float | None
    state: State


@dataclass(frozen=True)
class IngestionLag:
    """The lag of all partitions of one topic, in order."""

    topic: str
    kafka_topic: str
    partitions: tuple[PartitionLag, ...]

    @property
    def messages(self) -> int:
        """Number of messages that the engine has not read yet."""
        return sum(partition.messages for partition in self.partitions)

    @property
    def lag_seconds(self) -> float | None:
        """Age of the oldest unread message: 0 for none, None if unknown, negative if all are from the
        future."""
        if not self.messages:
            return 0.0
        ages = [partition.lag_seconds for partition in self.partitions if partition.messages]
        known = [age for age in ages if age is not None]
        return max(known) if known else None

    @property
    def is_only_behind(self) -> bool:
        """Whether nothing is wrong but that messages are not read yet."""
        return all(partition.state in ("current", "behind") for partition in self.partitions)

    def in_state(self, state: State) -> list[int]:
        """Return the numbers of the partitions in that state."""
        return [partition.partition for partition in self.partitions if partition.state == state]


class Broker:
    """A context manager that reads offsets and single messages from Kafka without joining a consumer group.

    `client` adds librdkafka properties, e.g. for TLS; `group` begins the group id. Raises KafkaUnavailable if
    librdkafka does not accept the properties. Every method raises Unmeasurable, with Kafka's own reason, when the
    brokers reject this client or do not answer within `timeout_seconds`; in the latter case `watermarks` raises its
    subclass BrokersSilent.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
        client: Mapping[str, Any] | None = None,
        group: str = CONSUMER_GROUP,
    ) -> None:
        self._bootstrap = bootstrap
        self._timeout = timeout_seconds
        self._contact = Contact(
            Consumer,
            bootstrap,
            client,
            timeout_seconds=timeout_seconds,
            properties={
                # librdkafka requires a group id; this client never commits an offset to it.
                "group.id": f"{group}-freshness",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                # A broker answers the requests of a connection in order, so a waiting fetch would delay the
                # next request.
                "fetch.wait.max.ms": 10,
                "allow.auto.create.topics": False,
            },
        )
        self._consumer = self._contact.client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def watermarks(self, kafka_topic: str) -> dict[int, tuple[int, int]]:
        """Return the first offset and the one after the last, by partition."""
        try:
            found = topic_partitions(self._contact, self._bootstrap, kafka_topic)
        except TopicUnavailable as error:
            raise Unmeasurable(str(error)) from None
        except KafkaUnavailable as error:
            raise BrokersSilent(str(error)) from None
        try:
            return {partition: watermarks(self._contact, kafka_topic, partition) for partition in found}
        except KafkaUnavailable as error:
            raise Unmeasurable(str(error)) from None

    def first_messages(self, kafka_topic: str, positions: Mapping[int, int]) -> dict[int, datetime | None]:
        """Return the Kafka time of the first message with a value at or after each position, by partition.

        A partition without such a message is absent: its position may be followed only by tombstones or
        control records, which no raw table ever holds.
        """
        found: dict[int, datetime | None] = {}
        if not positions:
            return found
        try:
            self._consumer.assign(
                [TopicPartition(kafka_topic, partition, offset) for partition, offset in positions.items()]
            )
            open_partitions = set(positions)
            deadline = time.monotonic() + self._timeout
            while open_partitions:
                if time.monotonic() >= deadline:
                    raise self._silent(kafka_topic, None, "sent nothing of")
                for message in self._consumer.consume(num_messages=len(open_partitions), timeout=0.2):
                    partition = message.partition()
                    if message.error() is not None:
                        if message.error().code() != KafkaError._PARTITION_EOF:
                            raise self._silent(kafka_topic, message.error())
                    elif message.value() is None:
                        continue
                    else:
                        kind, milliseconds = message.timestamp()
                        found.setdefault(
                            partition,
                            None
                            if kind == TIMESTAMP_NOT_AVAILABLE
                            else datetime.fromtimestamp(milliseconds / 1000, UTC),
                        )
                    if partition in open_partitions:
                        open_partitions.discard(partition)
                        self._consumer.incremental_unassign([TopicPartition(kafka_topic, partition)])
        except KafkaException as error:
            raise self._silent(kafka_topic, error.args[0]) from None
        finally:
            self._consumer.unassign()
        return found

    def _silent(self, kafka_topic: str, error: Any, what: str = "does not serve") -> Unmeasurable:
        said = self._contact.unavailable(f"{what} topic {kafka_topic}", error, kafka_topic)
        return Unmeasurable(str(said))


def ingestion_lag(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    broker: Broker,
    topic: TopicDeclaration,
    *,
    now: datetime,
    kafka: KafkaSource = KafkaSource(),  # noqa: B008 (it is frozen)
    generation: TopicGeneration | None = None,
) -> IngestionLag:
    """Measure how far the engine is behind each partition of one topic. `now` is UTC.

    `kafka` has the topic's name in Kafka if that differs, and the configured start, which determines the lag of a
    partition that the engine never read. `generation` identifies the topic of that name that is read; without it a
    recreated topic is only recognised by its shorter partitions.

    Raises Unmeasurable if brokers or engine do not answer, or the topic or the raw table does not exist.
    """
    name = kafka.topics.get(topic.name, topic.name)
    marks = broker.watermarks(name)
    source = generation.source if generation else source_name(name, 1)
    read = _last_offsets(connection, engine, topic, source, list(marks))
    states: dict[int, State] = {}
    owed: dict[int, int] = {}
    for partition in read.keys() - marks.keys():
        marks[partition] = (0, 0)
    for partition, (low, high) in sorted(marks.items()):
        last = read.get(partition)
        states[partition] = "current"
        if (generation and generation.state == "recreated") or (last is not None and last >= high):
            states[partition] = "recreated"
        elif last is None and kafka.start == "latest":
            states[partition] = "unknown" if high > low else "current"
        elif last is not None and last + 1 < low:
            states[partition] = "lost"
            if high > low:
                owed[partition] = low
        elif (position := low if last is None else last + 1) < high:
            owed[partition] = position
    firsts = broker.first_messages(name, owed)
    partitions = []
    for partition, (low, high) in sorted(marks.items()):
        behind = partition in firsts
        if behind and states[partition] == "current":
            states[partition] = "behind"
        first = firsts.get(partition)
        age = None if first is None else (now - first).total_seconds()
        partitions.append(
            PartitionLag(
                partition,
                low,
                high,
                read.get(partition),
                messages=high - owed[partition] if behind else 0,
                lag_seconds=age if behind else 0.0,
                state=states[partition],
            )
        )
    return IngestionLag(topic.name, name, tuple(partitions))


def _last_offsets(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    topic: TopicDeclaration,
    source: str,
    partitions: list[int],
) -> dict[int, int]:
    try:
        if engine.kind == "risingwave":
            rows = connection.execute(
                sql.SQL(
                    "select source_partition, last_offset from {} where topic = %s and source = %s"
                ).format(sql.Identifier(engine.schema, "ingest_progress")),
                [topic.name, source],
            ).fetchall()
        else:
            # `ingest_progress` is only as current as the last refresh; the raw table's primary key gives each
            # partition's newest offset without one.
            rows = connection.execute(
                sql.SQL(
                    "select p, (select max(source_offset) from {raw}"
                    " where source = %(source)s and source_partition = p)"
                    " from generate_series(0, (select greatest(max(source_partition), %(highest)s) from {raw}"
                    " where source = %(source)s)) as p"
                ).format(raw=sql.Identifier(engine.schema, topic.raw)),
                {"source": source, "highest": max(partitions)},
            ).fetchall()
    except psycopg.Error as error:
        raise unreadable(topic.name, error) from error
    return {int(partition): int(offset) for partition, offset in rows if offset is not None}
