"""Generator of plausible messages for any declared topic, from its fields and a seed.

It depends on no business: a value has its field's type and lies within its bounds, few of the entities and of the texts
are frequent, and every reason for which the typed layer rejects a message occurs.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from dagster_prefs.declarations.registry import FieldDeclaration, Key
from dagster_prefs.events.messages import Topic
from dagster_prefs.tools.simulation import (
    DAY_MS,
    EPOCH,
    Plan,
    SimulatedEvent,
    World,
    deliveries,
    iso_text,
    zipf,
)

# Number of texts for a field without accepted values.
VOCABULARY = 40
# The range above its minimum, for a field without a maximum.
RANGE = 1_000
# The share of messages that omit an optional field.
LEFT_OUT = 0.05


@dataclass(frozen=True)
class GeneratedPlan(Plan):
    """The topics of the generated messages, and their numbers.

    Each topic of events gets its share of `events`; each topic of reference data gets `references` rows, plus
    malformed ones. Each entity has `entities` ids.
    """

    topics: tuple[Topic, ...] = ()
    entities: int = 5_000
    events_total: int = 100_000
    references: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1, "entities")
        self.require(0, "events_total", "references")

    def counts(self) -> dict[str, int]:
        """Return the number of messages that the plan yields, by topic."""
        rows = self.references + round(self.references * self.malformed_share)
        return {topic.name: rows for topic in self._references()} | self._totals()

    def _totals(self) -> dict[str, int]:
        timed = [topic.name for topic in self.topics if topic.time is not None]
        return {
            name: self.events_total // len(timed) + (number < self.events_total % len(timed))
            for number, name in enumerate(timed)
        }

    def _references(self) -> list[Topic]:
        return [topic for topic in self.topics if topic.time is None]

    def events(self) -> Iterator[SimulatedEvent]:
        """Yield the messages in order of delivery, reference data first. Memory holds one day of events."""
        world = _Fields(self)
        first = int(self.end.timestamp() * 1000) - self.days * DAY_MS
        for topic in self._references():
            for number in range(self.references):
                message = world.message(topic, first, f"{topic.identity}-{number:06d}")
                yield SimulatedEvent(topic.name, message, EPOCH + timedelta(milliseconds=first))
            for number in range(round(self.references * self.malformed_share)):
                message = world.malformed(topic.name, number, first)
                yield SimulatedEvent(topic.name, message, EPOCH + timedelta(milliseconds=first))
        yield from deliveries(self, world, self._totals())

    def live(self) -> Iterator[tuple[str, bytes]]:
        """Yield topic and message of events that happen now, endlessly, in the proportions of the counts."""
        return _Fields(self).live(self._totals())


class _Fields(World):
    """Generates values for the declared fields of a plan's topics."""

    def __init__(self, plan: GeneratedPlan) -> None:
        super().__init__(plan)
        self._topics = {topic.name: topic for topic in plan.topics}
        self._optional = {
            topic.name: [
                field.name for field in topic.fields if field.optional and field.name != topic.identity
            ]
            for topic in plan.topics
        }
        self._seed = plan.seed
        self._entities = zipf(plan.entities, 0.6)
        self._words = zipf(VOCABULARY, 0.9)
        # Values for fields with the name of reference data's identity.
        self._references = {
            topic.identity: zipf(plan.references, 0.9)
            for topic in plan.topics
            if topic.time is None and plan.references
        }

    def time_field(self, topic: str) -> str:
        """Return the field of the event time."""
        return self._topics[topic].time or ""

    def session(self, topic: str, start: int) -> Iterator[tuple[int, bytes]]:
        """Return a few events of one entity, about a minute apart."""
        declared = self._topics[topic]
        who = self._who(declared.key)
        moment = start
        for _ in range(1 + int(self.rng.random() * self.rng.random() * 6)):
            moment += 4_000 + int(self.rng.random() * 90_000)
            yield moment, self.message(declared, moment, f"g-{self.rng.getrandbits(64):016x}", who)

    def message(
        self, topic: Topic, moment: int, identity: str, who: int | str | None = None, **changed: Any
    ) -> bytes:
        """Return a message with this identity; a changed field of None is omitted."""
        values: dict[str, Any] = {field.name: self._value(field, moment) for field in topic.fields}
        values[topic.identity] = _of_type(topic.by_name[topic.identity], identity, self.rng)
        if topic.key is not None:
            values[topic.key.name] = self._who(topic.key) if who is None else who
        for name in self._optional[topic.name]:
            if name not in changed and self.rng.random() < LEFT_OUT:
                values[name] = None
        time = None if topic.time is None or topic.time in changed else self.time(moment)
        if topic.time is not None:
            values[topic.time] = None
        values |= changed
        parts = [f"{quote(name)}:{_json(value)}" for name, value in values.items() if value is not None]
        if time is not None:
            parts.append(f"{_json(topic.time)}:{time}")
        return f"{{{','.join(parts)}}}".encode()

    def malformed(self, topic: str, number: int, moment: int) -> bytes:
        """Return the `number`-th malformed message of a topic, going through all reasons of rejection."""
        declared = self._topics[topic]
        identity = f"bad-{self.rng.getrandbits(64):016x}"
        begun = f'{{"{declared.identity}":"{identity}'.encode()
        broken = (begun, begun + b'\xff\xfe"}', b"[1,2]")
        changes = [(field.name, value) for field in declared.fields for value in _faults(declared, field)]
        at = number % (len(broken) + len(changes))
        if at < len(broken):
            return broken[at]
        name, value = changes[at - len(broken)]
        if callable(value):
            value = value(moment)
        return self.message(declared, moment, identity, **{name: value})

    def _who(self, key: Key | None) -> int | str:
        number = self.pick(self._entities)
        if key is None or key.type == "bigint":
            return number + 1
        if key.type == "text":
            return f"{key.name.removesuffix('_id')}-{number + 1:06d}"
        bits = random.Random(f"{self._seed}:{key.name}:{number}").getrandbits(128)  # noqa: S311 (not a secret)
        return str(uuid.UUID(int=bits, version=4))

    def _value(self, field: FieldDeclaration, moment: int) -> str | int | float | bool:
        draw = self.rng.random()
        if field.accepted:
            return field.accepted[int(draw * len(field.accepted))]
        if field.type == "boolean":
            return draw < 0.9
        if field.type == "timestamptz":
            return iso_text(moment)
        if field.type == "text":
            if field.name in self._references:
                return f"{field.name}-{self.pick(self._references[field.name]):06d}"
            return f"{field.name.removesuffix('_id')}-{self.pick(self._words)}"[: field.max_bytes]
        least = field.minimum if field.minimum is not None else 0
        most = field.maximum if field.maximum is not None else least + RANGE
        if field.type == "decimal":
            return round(least + (most - least) * draw, min(field.scale or 0, 4))
        return least + int((most - least + 1) * draw)


def _json(value: Any) -> str:
    """Render a value as `json.dumps` does, which takes several times as long for a text or a whole number."""
    kind = type(value)
    return quote(value) if kind is str else str(value) if kind is int else json.dumps(value)


def _of_type(field: FieldDeclaration, identity: str, rng: random.Random) -> str | int:
    """Return the identity as a value of its field, truncated to the field's size in bytes."""
    if field.type != "text":
        return rng.getrandbits(31)
    return identity[-field.max_bytes :] if field.max_bytes else identity


def _faults(topic: Topic, field: FieldDeclaration) -> list[Any]:
    """Return values for which the field is rejected.

    A function computes a value from the event's time; None omits the field.
    """
    faults: list[Any] = [] if field.optional else [None]
    faults.append(["x"])
    if field.accepted:
        return [*faults, "teleport"]
    if field.name == topic.time:
        return [*faults, "yesterday", lambda moment: iso_text(moment + 4000 * DAY_MS)]
    if field.type != "text":
        faults.append("some")
    if field.max_bytes is not None:
        faults.append("x" * (field.max_bytes + 1))
    if field.minimum is not None:
        faults.append(field.minimum - 1)
    if field.maximum is not None:
        faults.append(field.maximum + 1)
    return faults
