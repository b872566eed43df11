"""The ids that are reserved for canaries: the one rule about them.

Of each entity, the ids of its first key column are reserved that the freshness probe uses: below 0 of a bigint, those
that start with `canary:` of a text, those that start with `00000000-0000-0000-0000-` of a UUID; also event ids that
start with `canary:`. Only the probe sends events with them: every other message that has one is rejected. What a canary
leaves behind flows through everything like any event, and is left out of exports, training sets, rankings, and counts
across entities. A canary is nobody's data, so that none can be labelled or erased. Its profile can be read like any
other.

`dbt_project/macros/reserved.sql` is the same rule in SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg import sql

    from dagster_prefs.declarations.registry import Key

PREFIX = "canary:"
UUID_PREFIX = "00000000-0000-0000-0000-"

# Whose events the probe sends; no other reserved id has events.
CANARY_NUMBER = -1
CANARY_TEXT = f"{PREFIX}prefs"
CANARY_UUID = f"{UUID_PREFIX}000000000000"


def is_reserved(key: Key, value: int | str) -> bool:
    """Whether an id of this key column, as `ids.read_key` reads it, is reserved for canaries."""
    if key.type == "bigint":
        return int(value) < 0
    return str(value).startswith(UUID_PREFIX if key.type == "uuid" else PREFIX)


def reserved_range(key: Key) -> str:
    """The reserved ids of this key column, for people."""
    return "below 0" if key.type == "bigint" else f"from {UUID_PREFIX if key.type == 'uuid' else PREFIX} on"


def canary_of(key: Key) -> int | str:
    """The id of this key column with which the probe sends events."""
    if key.type == "bigint":
        return CANARY_NUMBER
    return CANARY_UUID if key.type == "uuid" else CANARY_TEXT


def spare_of(key: Key, number: int) -> int | str:
    """A reserved id of this key column with which nobody sends events, and so without an item; `number` from 1 on."""
    if key.type == "bigint":
        return CANARY_NUMBER - number
    return f"{UUID_PREFIX}{number:012x}" if key.type == "uuid" else f"{PREFIX}spare-{number}"


def people_only(key: Key) -> sql.Composed:
    """The condition of SQL that a row with this key column is not a canary's."""
    # A service that only reads DynamoDB has no psycopg.
    from psycopg import sql

    column = sql.Identifier(key.name)
    if key.type == "bigint":
        return sql.SQL("{} >= 0").format(column)
    prefix = sql.Literal(UUID_PREFIX if key.type == "uuid" else PREFIX)
    return sql.SQL("not starts_with({}, {})").format(column, prefix)


def is_reserved_text(identity: str) -> bool:
    """Whether a text that names something, as an event's id, is reserved for canaries."""
    return identity.startswith(PREFIX)
