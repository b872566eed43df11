"""The rule that reserves ids for canaries.

For each entity, these ids of its first key column are reserved: numbers below 0, texts that start with `canary:`, and
UUIDs that start with `00000000-0000-0000-0000-`. The first column decides for a composite key too. Event ids that start
with `canary:` are also reserved. Only the freshness probe may send events with reserved ids: every other such message
is rejected.

The rows of a canary pass through all views like those of any event, and are left out of exports, training sets,
rankings, and counts across entities. A canary is nobody's personal data, so it can be neither labelled nor erased. Its
profile can be read like any other.

`dbt_project/macros/reserved.sql` is the same rule in SQL.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg import sql

    from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Key, Registry
    from dagster_prefs.ids import Id

PREFIX = "canary:"
UUID_PREFIX = "00000000-0000-0000-0000-"

# The ids of the probe's events; the other reserved ids have no events.
CANARY_NUMBER = -1
CANARY_TEXT = f"{PREFIX}prefs"
CANARY_UUID = f"{UUID_PREFIX}000000000000"

# A canary may be this far ahead of this clock. Clocks that are kept by NTP differ by less; a canary further ahead means
# that a clock is wrong, and says nothing about the pipeline.
CANARY_AHEAD_SECONDS = 5.0


def is_reserved(key: Key, value: int | str) -> bool:
    """Return whether an id of this key column, as returned by `ids.read_key`, is reserved for canaries."""
    if key.type == "bigint":
        return int(value) < 0
    return str(value).startswith(UUID_PREFIX if key.type == "uuid" else PREFIX)


def reserved_range(key: Key) -> str:
    """Describe the reserved ids of this key column, for messages."""
    return "below 0" if key.type == "bigint" else f"from {UUID_PREFIX if key.type == 'uuid' else PREFIX} on"


def canary_of(key: Key) -> int | str:
    """Return the id of this key column with which the probe sends events."""
    if key.type == "bigint":
        return CANARY_NUMBER
    return CANARY_UUID if key.type == "uuid" else CANARY_TEXT


def canary_value(field: FieldDeclaration) -> str | int | bool:
    """Return a value that the field accepts: the last of its accepted values, else one within its bounds.

    A number is the field's maximum, else 60 or its minimum, whichever is larger; a time is the first of 2026.
    """
    if field.accepted:
        return field.accepted[-1]
    if field.type == "boolean":
        return True
    if field.type == "timestamptz":
        return "2026-01-01T00:00:00Z"
    if field.type == "text":
        return "canary"[: field.max_bytes]
    return field.maximum if field.maximum is not None else max(60, field.minimum or 0)


def canary_parts(registry: Registry, entity: Entity) -> dict[str, int | str]:
    """Map each key column after the first to the value that every canary of the entity has in it.

    The value is accepted by each topic about the entity's first key that has the field.
    """
    family = {one.name for one in registry.family(entity.name)}
    parts: dict[str, int | str] = {}
    for key in entity.keys[1:]:
        fields = [
            topic.by_name[key.name]
            for topic in registry.topics.values()
            if topic.entity in family and key.name in topic.by_name
        ]
        if key.type == "uuid":
            parts[key.name] = CANARY_UUID
        elif fields:
            parts[key.name] = canary_value(min(fields, key=_room))
    return parts


def _room(field: FieldDeclaration) -> tuple[bool, int]:
    limit = field.maximum if field.type != "text" else field.max_bytes
    return not field.accepted, sys.maxsize if limit is None else limit


def canary_id(registry: Registry, entity: Entity, first: int | str | None = None) -> Id:
    """Return the id of the probe's events for this entity; `first` replaces the value of its first key column."""
    first = canary_of(entity.key) if first is None else first
    return (first, *canary_parts(registry, entity).values()) if len(entity.keys) > 1 else first


def spare_of(key: Key, number: int) -> int | str:
    """Return a reserved id of this key column that has no events and so no item. `number` counts from 1."""
    if key.type == "bigint":
        return CANARY_NUMBER - number
    return f"{UUID_PREFIX}{number:012x}" if key.type == "uuid" else f"{PREFIX}spare-{number}"


def people_only(key: Key) -> sql.Composed:
    """Return the SQL condition that excludes rows of canaries by this key column."""
    # Imported here, because a service that only reads DynamoDB has no psycopg.
    from psycopg import sql

    column = sql.Identifier(key.name)
    if key.type == "bigint":
        return sql.SQL("{} >= 0").format(column)
    prefix = sql.Literal(UUID_PREFIX if key.type == "uuid" else PREFIX)
    return sql.SQL("not starts_with({}, {})").format(column, prefix)


def is_reserved_text(identity: str) -> bool:
    """Return whether a text identifier, such as an event's id, is reserved for canaries."""
    return identity.startswith(PREFIX)
