"""Read Kafka topics into the raw tables, and write messages to Kafka.

The position of a reader is derived from the raw table, not from a consumer group's commit: with two places to write, a
kill between the writes would lose or repeat messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.environment import CONSUMER_GROUP
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.contact import BROKER_TIMEOUT_SECONDS, Contact
from dagster_prefs.events.contact import KafkaUnavailable as KafkaUnavailable
from dagster_prefs.events.raw import Batches, IngestReport, Progress, RawMessage, RawStore
from dagster_prefs.events.schema_registry import SchemaRegistry, SchemaRegistryUnavailable, decode_avro
from dagster_prefs.events.topics import source_name

POLL_SECONDS = 0.5
GATHER_SECONDS = 0.02
# How long a client that was rejected for good may take to say why.
REASON_SECONDS = 1.0
# The brokers' errors for a topic that they do not have.
_NOT_THERE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def ingest_topic(
    connection: EngineConfiguration,
    kafka: KafkaSource,
    topic: TopicDeclaration,
    *,
    generation: int = 1,
    stop: threading.Event | None = None,
    timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
    batches: Batches = Batches(),  # noqa: B008 (it is frozen)
) -> IngestReport:
    """Store the messages of a Kafka topic in the raw table of `topic`, from where the last reading ended.

    `generation` is that of the topic (see `topics.note_topics`): each generation is a source of its own, and a later
    one is read from its beginning. A partition that was never read starts at `kafka.start`. Ends at the end of the
    topic as of the start of the reading; with `stop`, continues until that is set. Messages without a value are skipped
    and counted as `blank`.

    Raises KafkaUnavailable, with Kafka's own reason, if no brokers are configured, they reject this client or do not
    answer within `timeout_seconds`, the topic does not exist, or it ends before the position that the engine has
    stored; SchemaRegistryUnavailable for a topic in Avro; EngineUnavailable, RawStoreError.
    """
    started = time.monotonic()
    name, bootstrap = kafka.topics.get(topic.name, topic.name), kafka.bootstrap
    if bootstrap is None:
        raise KafkaUnavailable(
            f"topic {name} cannot be read, because no Kafka brokers are configured: set PREFS_KAFKA_BOOTSTRAP"
        )
    decode = decoder(topic, kafka)
    source = source_name(name, generation)
    contact = Contact(
        Consumer,
        bootstrap,
        kafka.client,
        timeout_seconds=timeout_seconds,
        properties={
            "group.id": kafka.group,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "allow.auto.create.topics": False,
        },
    )
    consumer = contact.client
    unserved = f"does not serve topic {name}"
    read = accepted = skipped = 0
    try:
        partitions = topic_partitions(contact, bootstrap, name)
        with RawStore(connection) as store:
            stored = store.last_offsets(topic, source)
            start = kafka.start if generation == 1 else "earliest"
            ends = _assign(contact, bootstrap, name, partitions, stored, start)
            waiting = {partition for partition, end in ends.items() if end is not None}
            last_heard = time.monotonic()
            while waiting if stop is None else not stop.is_set():
                messages = next_messages(consumer, batches.size)
                batch: list[RawMessage] = []
                for message in messages:
                    if message.error() is not None:
                        code = message.error().code()
                        if code == KafkaError._PARTITION_EOF:
                            waiting.discard(message.partition())
                            continue
                        raise _kept(contact.unavailable(unserved, message.error(), name))
                    end = ends[message.partition()]
                    if end is not None and message.offset() >= end - 1:
                        waiting.discard(message.partition())
                    if message.value() is None:
                        skipped += 1
                        continue
                    batch.append(
                        RawMessage(
                            message.partition(),
                            message.offset(),
                            decode(message.value()),
                            _time(message.timestamp()),
                        )
                    )
                accepted += store.write(topic, source, batch)
                read += len(batch)
                if messages:
                    last_heard = time.monotonic()
                    contact.heard()
                else:
                    contact.check(unserved)
                    if stop is None and time.monotonic() - last_heard > timeout_seconds:
                        raise _kept(contact.unavailable(f"sent nothing of topic {name} before its end"))
                if batches.progress is not None and batch:
                    batches.progress(Progress(read, read, None, "messages"))
    except KafkaException as error:
        raise _kept(contact.unavailable(unserved, error.args[0], name)) from None
    finally:
        consumer.close()
    return IngestReport(
        source, topic.name, read, accepted, read - accepted, skipped, 0, time.monotonic() - started
    )


def decoder(topic: TopicDeclaration, kafka: KafkaSource) -> Callable[[bytes], bytes]:
    """Return what turns a message of a topic into the bytes to store: Avro becomes JSON, all else stays.

    Raises SchemaRegistryUnavailable if the topic is in Avro, and no registry is configured or no reader installed.
    """
    if topic.format != "avro":
        return lambda message: message
    if kafka.schemas is None:
        raise SchemaRegistryUnavailable(
            f"topic {topic.name} is in Avro, and no schema registry is configured: set PREFS_SCHEMA_REGISTRY_URL"
        )
    if find_spec("fastavro") is None:
        raise SchemaRegistryUnavailable(
            f"topic {topic.name} is in Avro, and fastavro is not installed: install dagster-prefs[avro]"
        )
    return partial(decode_avro, registry=SchemaRegistry(kafka.schemas))


class TopicUnavailable(KafkaUnavailable):
    """The brokers answer, but do not have the topic or do not let this client see it."""


def topic_partitions(contact: Contact, bootstrap: str, name: str) -> list[int]:
    """Return the partitions of a topic, in order. Raises KafkaUnavailable; TopicUnavailable if the brokers answer."""
    unserved = f"does not serve topic {name}"
    found = contact.wait(
        lambda seconds: contact.client.list_topics(name, timeout=seconds), unserved
    ).topics.get(name)
    if found is not None and found.error is not None and found.error.code() not in _NOT_THERE:
        raise TopicUnavailable(str(contact.unavailable(unserved, found.error, name)))
    if found is None or not found.partitions:
        raise TopicUnavailable(
            f"Kafka at {bootstrap} has no topic {name}: create it, or set its name in Kafka"
        )
    return sorted(found.partitions)


def _assign(
    contact: Contact, bootstrap: str, name: str, partitions: list[int], stored: dict[int, int], start: str
) -> dict[int, int | None]:
    """Start every partition after its stored position. Return the current end of each, None if nothing is left."""
    assignment, ends = [], {}
    for partition in partitions:
        low, high = watermarks(contact, name, partition)
        if partition in stored:
            position = stored[partition] + 1
            if position > high:
                raise KafkaUnavailable(
                    f"topic {name} at {bootstrap} ends at offset {high} of partition {partition}, but the "
                    f"engine holds offset {stored[partition]} of it: it was recreated, and these brokers have "
                    "no topic ids that would have shown it: give it another name"
                )
        else:
            position = OFFSET_BEGINNING if start == "earliest" else OFFSET_END
        first = (
            low if position == OFFSET_BEGINNING else high if position == OFFSET_END else max(position, low)
        )
        ends[partition] = high if first < high else None
        assignment.append(TopicPartition(name, partition, position))
    contact.client.assign(assignment)
    return ends


def next_messages(consumer: Any, most: int) -> list[Any]:
    """Return up to `most` messages and ends of partitions; none if nothing arrives within POLL_SECONDS.

    A single call of `consume` would wait for all of `most` or for its whole time-out, however short the topic is.
    """
    messages: list[Any] = consumer.consume(num_messages=1, timeout=POLL_SECONDS)
    if messages and most > 1:
        messages += consumer.consume(num_messages=most - 1, timeout=GATHER_SECONDS)
    return messages


def watermarks(contact: Contact, name: str, partition: int) -> tuple[int, int]:
    """Return the first offset of a partition, and the one after its last. Raises KafkaUnavailable."""
    low, high = contact.wait(
        lambda seconds: contact.client.get_watermark_offsets(
            TopicPartition(name, partition), timeout=seconds
        ),
        f"does not serve topic {name}",
    )
    return int(low), int(high)


def _time(timestamp: tuple[int, int]) -> datetime | None:
    kind, milliseconds = timestamp
    return None if kind == TIMESTAMP_NOT_AVAILABLE else EPOCH + timedelta(milliseconds=milliseconds)


def _kept(error: KafkaUnavailable) -> KafkaUnavailable:
    return KafkaUnavailable(
        f"{error}; accepted messages are kept: run the same command again to continue from there"
    )


def holds_messages(
    bootstrap: str,
    topic: str,
    *,
    timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
    client: Mapping[str, Any] | None = None,
) -> bool:
    """Return whether a Kafka topic holds any message; `client` adds librdkafka properties, e.g. for TLS.

    Raises KafkaUnavailable, with Kafka's own reason, if the brokers reject this client, do not answer within
    `timeout_seconds` or have no such topic.
    """
    contact = Contact(
        Consumer,
        bootstrap,
        client,
        timeout_seconds=timeout_seconds,
        properties={"group.id": CONSUMER_GROUP, "allow.auto.create.topics": False},
    )
    try:
        for partition in topic_partitions(contact, bootstrap, topic):
            low, high = watermarks(contact, topic, partition)
            if low < high:
                return True
        return False
    finally:
        contact.client.close()


class KafkaWriter:
    """An idempotent producer; when `flush` returns, every message is known to be delivered."""

    def __init__(
        self,
        bootstrap: str,
        *,
        timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._timeout = timeout_seconds
        self._failed: tuple[Any, str] | None = None
        self._contact = Contact(
            Producer,
            bootstrap,
            client,
            timeout_seconds=timeout_seconds,
            properties={
                "enable.idempotence": True,
                "linger.ms": 20,
                "delivery.timeout.ms": int(timeout_seconds * 1000),
            },
        )
        self._producer = self._contact.client

    def check(self, topic: str) -> None:
        """Raise KafkaUnavailable unless the brokers admit this client, answer and have the topic."""
        topic_partitions(self._contact, self._bootstrap, topic)

    def send(self, topic: str, value: bytes, key: bytes | None = None) -> None:
        """Queue one message. Raises KafkaUnavailable if an earlier one was not delivered."""
        untaken = f"does not accept messages for topic {topic}"
        with self._told(untaken, topic):
            while True:
                try:
                    self._producer.produce(topic, value=value, key=key, on_delivery=self._delivered)
                    break
                except BufferError:
                    # The queue is full: serving the callbacks of deliveries frees space.
                    self._producer.poll(POLL_SECONDS)
                    self._raise_failure()
                    self._contact.check(untaken)
            self._producer.poll(0)
        self._raise_failure()

    def flush(self) -> None:
        """Wait for every queued message. Raises KafkaUnavailable if one was not delivered."""
        # A message fails by itself at its time-out, and the extra second serves its callback.
        deadline = time.monotonic() + self._timeout + 1
        with self._told("does not take messages"):
            # The client's own flush is not used: it loses the exception of a client that was rejected for good.
            while left := len(self._producer):
                self._producer.poll(POLL_SECONDS)
                self._raise_failure()
                self._contact.check(f"did not accept {left} messages")
                if time.monotonic() > deadline:
                    raise self._contact.unavailable(f"did not confirm {left} messages")
        self._raise_failure()

    @contextmanager
    def _told(self, what: str, topic: str | None = None) -> Iterator[None]:
        """Translate an error of the client: a client that was rejected for good raises it from every call."""
        try:
            yield
        except KafkaException as error:
            failed = error.args[0]
            if failed.code() == KafkaError._FATAL:
                failed = self._fatal_reason() or failed
            self._raise_failure()
            raise self._contact.unavailable(what, failed, topic) from None

    def _fatal_reason(self) -> Any:
        """Return why the client was rejected for good, None if it does not say so in time.

        It reports the reason once, to a call that serves its callbacks, and may refuse messages a moment earlier.
        """
        deadline = time.monotonic() + REASON_SECONDS
        while time.monotonic() < deadline:
            try:
                self._producer.poll(POLL_SECONDS)
            except KafkaException as reason:
                return reason.args[0]
        return None

    def delivery(self, names: Mapping[str, str]) -> Callable[[TopicDeclaration, Sequence[RawMessage]], int]:
        """Return the `deliver` function for `ingest_file`; `names` maps topics to their names in Kafka.

        Each batch is confirmed before the next is read. Raises KafkaUnavailable, also for a missing topic.
        """
        checked: set[str] = set()

        def deliver(topic: TopicDeclaration, batch: Sequence[RawMessage]) -> int:
            name = names.get(topic.name, topic.name)
            if name not in checked:
                self.check(name)
                checked.add(name)
            for message in batch:
                self.send(name, message.data)
            self.flush()
            return len(batch)

        return deliver

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None and self._failed is None:
            self._failed = error, message.topic()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            error, topic = self._failed
            reason = self._contact.unavailable(f"did not accept a message for topic {topic}", error, topic)
            raise KafkaUnavailable(
                f"{reason}; then send them again: messages that arrive twice are recognised by their event_id"
            )
