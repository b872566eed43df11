"""The rule that reserves ids for canaries.

In the first key column of each entity, these ids are reserved for the freshness probe: below 0 for a bigint,
those that start with `canary:` for a text, those that start with `00000000-0000-0000-0000-` for a UUID; also
event ids that start with `canary:`. Only the probe sends events with them: every other message with one is
rejected. The data of canaries flows through everything like any event, and is excluded from exports, training
sets, rankings, and counts across entities. A canary is not a person's data, so it can be neither labelled nor
erased. Its profile can be read like any other.

`dbt_project/macros/reserved.sql` is the same rule in SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg import sql

    from dagster_prefs.declarations.registry import Key

PREFIX = "canary:"
UUID_PREFIX = "00000000-0000-0000-0000-"

# The ids of the probe's events; no other reserved id has events.
CANARY_NUMBER = -1
CANARY_TEXT = f"{PREFIX}prefs"
CANARY_UUID = f"{UUID_PREFIX}000000000000"


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


def spare_of(key: Key, number: int) -> int | str:
    """Return a reserved id of this key column that has no events and so no item; `number` from 1 on."""
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
