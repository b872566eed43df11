"""Events that a visitor sends: composed from the declared fields, checked by the typed layer's rules, and stored."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Registry, TopicDeclaration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.messages import topics_of
from dagster_prefs.events.raw import Place, RawMessage, RawStore
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.ids import Id

if TYPE_CHECKING:
    from dagster_prefs.events.kafka import KafkaWriter
    from dagster_prefs.platform import Platform


class EventError(PrefsError):
    """An event breaks a rule of its topic; the message names the rule."""


@dataclass(frozen=True)
class Sent:
    """A sent event. `place` is where it was stored, None if it went to Kafka. `at` is UTC."""

    topic: TopicDeclaration
    place: Place | None
    at: datetime


def topics_about(registry: Registry, entity: Entity) -> list[TopicDeclaration]:
    """Return the topics whose events name an id of this entity."""
    return [
        topic
        for topic in registry.topics.values()
        if topic.entity is not None
        and registry.entity(topic.entity).key == entity.key
        and set(entity.key_names) <= topic.by_name.keys()
    ]


def asked_fields(topic: TopicDeclaration, entity: Entity) -> list[FieldDeclaration]:
    """Return the fields that a form must ask for: all but the identity, the id and the event's time."""
    known = {topic.identity, topic.time, *entity.key_names}
    return [field for field in topic.fields if field.name not in known]


def compose_event(
    registry: Registry,
    topic: TopicDeclaration,
    entity: Entity,
    id_: Id,
    given: Mapping[str, Any],
    now: datetime,
) -> bytes:
    """Return the message of an event of the time `now` (UTC) about an id, with these values of other fields.

    Empty values are left out. Raises EventError with the typed layer's reason for a message that it would reject.
    """
    parts = id_ if isinstance(id_, tuple) else (id_,)
    content: dict[str, Any] = {topic.identity: f"console-{uuid.uuid4()}"}
    content |= dict(zip(entity.key_names, parts, strict=True))
    content |= {name: value for name, value in given.items() if value is not None and value != ""}
    if topic.time is not None:
        content[topic.time] = now.isoformat()
    if unknown := content.keys() - topic.by_name.keys():
        raise EventError(f"topic {topic.name} has no field {', '.join(sorted(unknown))}")
    message = json.dumps(content, default=str, ensure_ascii=False).encode("utf-8", "replace")
    if reason := rejection_reason(message, topics_of(registry)[topic.name], now):
        raise EventError(f"the event would be rejected: {reason}")
    return message


class Sender:
    """Sends events as producers do: to Kafka if a connector reads from it, else into the raw table.

    Uses one connection, opened at the first event and reopened after an error. Calls run one at a time.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._lock = Lock()
        self._store: RawStore | None = None
        self._kafka: KafkaWriter | None = None
        # Each process has its own name, because its offsets begin at 0.
        self._source = f"console:{uuid.uuid4().hex[:12]}"
        self._offset = 0

    def send(self, topic: TopicDeclaration, message: bytes) -> Sent:
        """Send a message. Raises RawStoreError, EngineUnavailable or KafkaUnavailable if it is not stored."""
        with self._lock:
            settings = self._platform.settings
            now = datetime.now(UTC)
            if settings.engine == "risingwave" and settings.kafka_bootstrap:
                self._send_to_kafka(topic, message)
                return Sent(topic, None, now)
            self._offset += 1
            place = Place(self._source, 0, self._offset)
            try:
                if self._store is None:
                    self._store = RawStore(self._platform.engine)
                self._store.write(topic, place.source, [RawMessage(place.partition, place.offset, message)])
            except PrefsError:
                self._close()
                raise
            return Sent(topic, place, now)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._close()

    def _send_to_kafka(self, topic: TopicDeclaration, message: bytes) -> None:
        from dagster_prefs.events.kafka import KafkaWriter

        kafka, bootstrap = self._platform.kafka, self._platform.settings.kafka_bootstrap
        if self._kafka is None and bootstrap is not None:
            self._kafka = KafkaWriter(bootstrap, client=kafka.client)
        if self._kafka is not None:
            self._kafka.send(kafka.topics[topic.name], message)
            self._kafka.flush()

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = self._kafka = None
