"""Kafka topics into the raw tables, and messages into Kafka.

The position of a reader is what the raw table holds, not what a consumer group committed: the two would
be written in two places, and a kill between them would lose or repeat messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

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

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.formats import Topic, find_topic
from dagster_prefs.events.raw import IngestReport, Progress, ProgressCallback, RawMessage, RawStore
from dagster_prefs.events.topics import source_name

BROKER_TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.5
GATHER_SECONDS = 0.02
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class KafkaUnavailable(PrefsError):
    """The brokers cannot be reached, or a topic is not there or not as the engine remembers it."""


def ingest_topic(
    connection: EngineConnection,
    bootstrap: str,
    topic: str,
    *,
    kafka_topic: str | None = None,
    generation: int = 1,
    start: Literal["earliest", "latest"] = "earliest",
    until: Literal["end"] | None = "end",
    max_messages: int | None = None,
    stop: threading.Event | None = None,
    batch_size: int = 10_000,
    timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
    client: Mapping[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> IngestReport:
    """Store the messages of a Kafka topic in the raw table of `topic`, from where the last reading ended.

    `kafka_topic` is the topic's name in Kafka where it differs, `generation` counts its lives (see
    `topics.note_topics`): each is a source of its own, and a later one is read from its beginning. A partition
    that was never read starts at `start`. With `until="end"` the reading ends at what the topic held when it
    began; with None it goes on until `stop` is set or `max_messages` were stored. Messages without a value are
    skipped and counted as `blank`. `client` adds librdkafka properties, e.g. for TLS.

    Raises UnknownTopic; KafkaUnavailable when the brokers do not answer within `timeout_seconds`, the
    topic does not exist, or it ends before what the engine holds of it; EngineUnavailable, RawStoreError.
    """
    started = time.monotonic()
    known = find_topic(topic)
    name = kafka_topic or topic
    source = source_name(name, generation)
    consumer: Any = Consumer(
        {
            **(client or {}),
            "bootstrap.servers": bootstrap,
            "group.id": "dagster-prefs",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "allow.auto.create.topics": False,
            "log_level": 0,
        }
    )
    read = accepted = skipped = 0
    try:
        partitions = _partitions(consumer, bootstrap, name, timeout_seconds)
        with RawStore(connection) as store:
            stored = store.last_offsets(known, source)
            ends = _assign(
                consumer,
                bootstrap,
                name,
                partitions,
                stored,
                start if generation == 1 else "earliest",
                timeout_seconds,
            )
            waiting = {partition for partition, end in ends.items() if end is not None}
            last_heard = time.monotonic()
            while (until is None or waiting) and not (stop is not None and stop.is_set()):
                room = batch_size if max_messages is None else min(batch_size, max_messages - read)
                if room <= 0:
                    break
                messages = next_messages(consumer, room)
                batch: list[RawMessage] = []
                for message in messages:
                    if message.error() is not None:
                        code = message.error().code()
                        if code == KafkaError._PARTITION_EOF:
                            waiting.discard(message.partition())
                            continue
                        raise _unavailable(bootstrap, name, message.error())
                    end = ends[message.partition()]
                    if end is not None and message.offset() >= end - 1:
                        waiting.discard(message.partition())
                    if message.value() is None:
                        skipped += 1
                        continue
                    batch.append(
                        RawMessage(
                            message.partition(), message.offset(), message.value(), _time(message.timestamp())
                        )
                    )
                accepted += store.write(known, source, batch)
                read += len(batch)
                if messages:
                    last_heard = time.monotonic()
                elif until == "end" and time.monotonic() - last_heard > timeout_seconds:
                    raise KafkaUnavailable(
                        f"Kafka at {bootstrap} sent nothing of topic {name} for {timeout_seconds:g} s before "
                        f"its end: check the brokers; the {accepted} messages so far are kept, and the same "
                        "command goes on from there"
                    )
                if progress is not None and batch:
                    progress(Progress(read, read, max_messages, "messages"))
    except KafkaException as error:
        raise _unavailable(bootstrap, name, error.args[0]) from None
    finally:
        consumer.close()
    return IngestReport(
        source, topic, read, accepted, read - accepted, skipped, 0, time.monotonic() - started
    )


def _partitions(consumer: Any, bootstrap: str, name: str, timeout: float) -> list[int]:
    try:
        found = consumer.list_topics(name, timeout=timeout).topics.get(name)
    except KafkaException as error:
        raise _unavailable(bootstrap, name, error.args[0]) from None
    if found is None or found.error is not None or not found.partitions:
        raise KafkaUnavailable(
            f"Kafka at {bootstrap} has no topic {name}: create it, or set the name it has there"
        )
    return sorted(found.partitions)


def _assign(
    consumer: Any,
    bootstrap: str,
    name: str,
    partitions: list[int],
    stored: dict[int, int],
    start: str,
    timeout: float,
) -> dict[int, int | None]:
    """Start every partition after what is stored; returns where each ends now, None where nothing is left."""
    assignment, ends = [], {}
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(TopicPartition(name, partition), timeout=timeout)
        if partition in stored:
            position = stored[partition] + 1
            if position > high:
                raise KafkaUnavailable(
                    f"topic {name} at {bootstrap} ends at offset {high} of partition {partition}, but the "
                    f"engine holds offset {stored[partition]} of it: it was made anew, and the brokers tell no "
                    "topic ids by which to know it; give it another name"
                )
        else:
            position = OFFSET_BEGINNING if start == "earliest" else OFFSET_END
        first = (
            low if position == OFFSET_BEGINNING else high if position == OFFSET_END else max(position, low)
        )
        ends[partition] = high if first < high else None
        assignment.append(TopicPartition(name, partition, position))
    consumer.assign(assignment)
    return ends


def next_messages(consumer: Any, most: int) -> list[Any]:
    """Return up to `most` messages and ends of partitions; none if nothing comes within POLL_SECONDS.

    One call of `consume` would wait for all of `most` or for its whole time-out, however short the topic is.
    """
    messages: list[Any] = consumer.consume(num_messages=1, timeout=POLL_SECONDS)
    if messages and most > 1:
        messages += consumer.consume(num_messages=most - 1, timeout=GATHER_SECONDS)
    return messages


def _time(timestamp: tuple[int, int]) -> datetime | None:
    kind, milliseconds = timestamp
    return None if kind == TIMESTAMP_NOT_AVAILABLE else EPOCH + timedelta(milliseconds=milliseconds)


def _unavailable(bootstrap: str, name: str, error: Any) -> KafkaUnavailable:
    return KafkaUnavailable(
        f"Kafka at {bootstrap} does not serve topic {name} ({error.str()}): check PREFS_KAFKA_BOOTSTRAP and "
        "that the brokers run; what was accepted is kept, and the same command goes on from there"
    )


def holds_messages(
    bootstrap: str,
    topic: str,
    *,
    timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
    client: Mapping[str, Any] | None = None,
) -> bool:
    """Whether a Kafka topic holds any message; `client` adds librdkafka properties, e.g. for TLS.

    Raises KafkaUnavailable when the brokers do not answer within `timeout_seconds` or have no such topic.
    """
    consumer: Any = Consumer(
        {**(client or {}), "bootstrap.servers": bootstrap, "group.id": "dagster-prefs", "log_level": 0}
    )
    try:
        for partition in _partitions(consumer, bootstrap, topic, timeout_seconds):
            low, high = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=timeout_seconds
            )
            if low < high:
                return True
        return False
    except KafkaException as error:
        raise _unavailable(bootstrap, topic, error.args[0]) from None
    finally:
        consumer.close()


class KafkaWriter:
    """An idempotent producer whose every message is known to be delivered once `flush` returns."""

    def __init__(
        self,
        bootstrap: str,
        *,
        timeout_seconds: float = BROKER_TIMEOUT_SECONDS,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._timeout = timeout_seconds
        self._failed: str | None = None
        self._producer = Producer(
            {
                **(client or {}),
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "linger.ms": 20,
                "delivery.timeout.ms": int(timeout_seconds * 1000),
                "log_level": 0,
            }
        )

    def check(self, topic: str) -> None:
        """Raises KafkaUnavailable unless the brokers answer and have the topic."""
        _partitions(self._producer, self._bootstrap, topic, self._timeout)

    def send(self, topic: str, value: bytes, key: bytes | None = None) -> None:
        """Queue one message; raises KafkaUnavailable if an earlier one was not delivered."""
        while True:
            try:
                self._producer.produce(topic, value=value, key=key, on_delivery=self._delivered)
                break
            except BufferError:
                # The queue is full: deliveries make room.
                self._producer.poll(POLL_SECONDS)
                self._raise_failure()
        self._producer.poll(0)
        self._raise_failure()

    def flush(self) -> None:
        """Wait for every queued message; raises KafkaUnavailable if one was not delivered."""
        left = self._producer.flush(self._timeout + 5)
        self._raise_failure()
        if left:
            raise KafkaUnavailable(
                f"Kafka at {self._bootstrap} did not confirm {left} messages within {self._timeout:g} s: "
                "check the brokers and send them again"
            )

    def delivery(self, names: Mapping[str, str]) -> Callable[[Topic, Sequence[RawMessage]], int]:
        """What `ingest_file` delivers to; `names` gives topics their names in Kafka.

        Each batch is confirmed before the next is read. Raises KafkaUnavailable, also for a missing topic.
        """
        checked: set[str] = set()

        def deliver(topic: Topic, batch: Sequence[RawMessage]) -> int:
            name = names.get(topic.name, topic.name)
            if name not in checked:
                self.check(name)
                checked.add(name)
            for message in batch:
                self.send(name, message.data)
            self.flush()
            return len(batch)

        return deliver

    def _delivered(self, error: Any, _: Any) -> None:
        if error is not None and self._failed is None:
            self._failed = str(error.str())

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise KafkaUnavailable(
                f"Kafka at {self._bootstrap} did not take a message ({self._failed}): check the brokers and "
                "send them again; messages that were taken twice are recognised by their event_id"
            )
