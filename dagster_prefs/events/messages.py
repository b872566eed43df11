"""The messages of one topic as the platform reads them before they are stored: their time, and a value's position."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property

from dagster_prefs.declarations.registry import Key, Registry, RegistryError, TopicDeclaration, uuid_keys
from dagster_prefs.events.fields import Years, field_text


@dataclass(frozen=True)
class Limits:
    """A project's bounds for every message.

    A message of more than `max_bytes` is rejected before it is parsed. The time of an event lies in `years`,
    and at most `future_tolerance` after its arrival.
    """

    max_bytes: int
    years: Years
    future_tolerance: timedelta

    @classmethod
    def of(cls, registry: Registry) -> Limits:
        """Read the bounds from the project's variables. Raises RegistryError naming one that is missing."""
        variables = registry.variables
        try:
            years = variables["plausible_years"]
            return cls(
                int(variables["max_message_bytes"]),
                Years(int(years["first"]), int(years["last"])),
                timedelta(hours=float(variables["future_tolerance_hours"])),
            )
        except KeyError as error:
            raise RegistryError(
                f"the project's variables lack {error.args[0]}: declare it in dbt_project.yml, under vars"
            ) from None


@dataclass(frozen=True)
class Topic(TopicDeclaration):
    """A declared topic, with its entity's first `key` and the project's limits, against which messages are checked.

    `key` is None for reference data, which is about no entity. `uuids` are the fields that must hold a UUID.
    """

    key: Key | None
    uuids: frozenset[str]
    limits: Limits

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The JSON keys."""
        return tuple(self.by_name)

    @cached_property
    def required(self) -> frozenset[str]:
        """The keys that every valid message of the topic has."""
        return frozenset(field.name for field in self.fields if not field.optional)

    @cached_property
    def plain_time(self) -> re.Pattern[bytes] | None:
        """A pattern of the time's key and value that need no JSON parsing: digits, or text without escapes."""
        if self.time is None:
            return None
        return re.compile(rb'"%s"\s*:\s*("[^"\\]*"|[0-9]+)(?=[\s,}])' % re.escape(self.time.encode()))

    def text(self, document: Mapping[str, object], name: str | None) -> str | None:
        """Return a field's value as the text to parse; None if empty, of a wrong type, or `name` is None."""
        return None if name is None else field_text(self.by_name[name], document.get(name))

    def moment(self, document: Mapping[str, object]) -> datetime | None:
        """Return the event time of a parsed message, in UTC; None if it has none."""
        return self.limits.years.parse(self.text(document, self.time) or "")


def topics_of(registry: Registry) -> dict[str, Topic]:
    """Return the topics of a project by name. Raises RegistryError if the project declares no limits."""
    limits = Limits.of(registry)
    return {name: _bind(registry, declared, limits) for name, declared in registry.topics.items()}


def _bind(registry: Registry, declared: TopicDeclaration, limits: Limits) -> Topic:
    values = {field.name: getattr(declared, field.name) for field in dataclasses.fields(TopicDeclaration)}
    entity = None if declared.entity is None else registry.entity(declared.entity)
    uuids = frozenset(uuid_keys(registry.entities, entity))
    return Topic(**values, key=entity.key if entity else None, uuids=uuids, limits=limits)


def event_time(message: bytes, topic: Topic) -> datetime | None:
    """Return the event time in a message, in UTC; None if the topic has none or it is unreadable."""
    found = _time_text(message, topic)
    return topic.limits.years.parse(found) if found is not None else None


def shift_message(message: bytes, topic: Topic, seconds: int) -> bytes:
    """Shift the event time of a message by whole seconds, leaving every other byte unchanged.

    Text becomes ISO 8601 with `Z`, a number keeps its unit. A message whose time is unreadable before or
    after the shift is returned unchanged.
    """
    text = _time_text(message, topic)
    moved = topic.limits.years.shift(text, seconds) if text is not None else None
    if moved is None or topic.time is None:
        return message
    start, end = value_span(message, topic.time, topic.plain_time)
    quoted = message[start : start + 1] == b'"'
    return message[:start] + (f'"{moved}"' if quoted else moved).encode() + message[end:]


def _time_text(message: bytes, topic: Topic) -> str | None:
    if topic.time is None:
        return None
    try:
        value = json.loads(message.decode(), parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return topic.text(value, topic.time) if isinstance(value, dict) else None


_SPACE = re.compile(r"[ \t\r\n]*")


def value_span(message: bytes, field: str, plain: re.Pattern[bytes] | None = None) -> tuple[int, int]:
    """Return the position of the value of a top-level key in a valid JSON object.

    If the key is repeated, its last value counts.
    """
    if plain and message.count(b"{") == 1 and message.count(b'"%s"' % field.encode()) == 1:
        simple = plain.search(message)
        if simple:
            return simple.span(1)
    text = message.decode()
    decoder = json.JSONDecoder()
    span = (0, 0)
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] == '"':
        name, at = decoder.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, at = decoder.raw_decode(text, start)
        if name == field:
            span = (start, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return len(text[: span[0]].encode()), len(text[: span[1]].encode())


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
