"""Messages that wait: those that the views have not read, determined without a clock, and those not in the lake.

On the embedded engine `raw_arrivals` has a row for each write, inserted by a trigger of the raw tables in the
writer's own transaction (macros/engine/arrivals.sql). The arrival time is informational only, because a clock
may step back.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.catalog import NotDeployed, missing_relation
from dagster_prefs.engine.connection import EngineConfiguration

# Where the last export of each topic is recorded, and how many messages that wait for the next one are counted.
EXPORTS, EXPORTS_COUNTED = "event_exports", 100_000


@dataclass(frozen=True)
class Waiting:
    """The messages of a topic that no refresh has read: number, oldest arrival (UTC), and identity.

    `mark` is equal if and only if the same messages wait.
    """

    messages: int
    since: datetime
    mark: str


def waiting_since(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry
) -> dict[str, Waiting]:
    """Return the unread messages of each topic on the embedded engine; topics without any are absent.

    Raises NotDeployed when the event tables do not exist yet.
    """
    waiting = {}
    for topic in registry.topics.values():
        try:
            found = unread(connection, engine, topic)
        except psycopg.errors.UndefinedTable as error:
            missing = str(error).partition('"')[2].partition('"')[0] or topic.raw
            raise NotDeployed(
                f"{missing} is not in database {engine.database}: run `dbt run` in dbt_project/"
            ) from None
        if found is not None:
            waiting[topic.name] = found
    return waiting


def unread(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, topic: TopicDeclaration
) -> Waiting | None:
    """Return the unread messages of one topic on the embedded engine, None if there are none.

    Raises psycopg.Error.
    """
    query = sql.SQL(
        "select sum(messages)::bigint, min(arrived_at),"
        " md5(string_agg(concat_ws('/', source, source_partition, first_offset, last_offset), ','"
        " order by source, source_partition, first_offset))"
        " from {arrivals} as arrival where relation = %s and not exists (select from {parsed} as parsed"
        " where parsed.source = arrival.source and parsed.source_partition = arrival.source_partition"
        " and parsed.source_offset = arrival.first_offset)"
        # A write whose messages were deleted in the meantime does not wait.
        " and exists (select from {raw} as raw where raw.source = arrival.source"
        " and raw.source_partition = arrival.source_partition"
        " and raw.source_offset between arrival.first_offset and arrival.last_offset"
        " and not exists (select from {parsed} as parsed where parsed.source = raw.source"
        " and parsed.source_partition = raw.source_partition and parsed.source_offset = raw.source_offset))"
    ).format(
        arrivals=sql.Identifier(engine.schema, "raw_arrivals"),
        raw=sql.Identifier(engine.schema, topic.raw),
        parsed=sql.Identifier(engine.schema, topic.parsed),
    )
    ((messages, since, mark),) = connection.execute(query, [topic.raw]).fetchall()
    return Waiting(messages, since, mark) if messages else None


@dataclass(frozen=True)
class Unexported:
    """What the lake does not hold of a topic: `messages` that arrived since `complete_until`, the first at `since`.

    Times are UTC; `since` is None if nothing waits. At most EXPORTS_COUNTED messages are counted.
    """

    topic: TopicDeclaration
    complete_until: datetime
    messages: int
    since: datetime | None


def note_exported(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    topic: TopicDeclaration,
    complete_until: datetime,
    at: datetime,
) -> None:
    """Record that the lake holds all of a topic that arrived until then; `at` is now. Times are UTC.

    Does nothing where the relation is not deployed yet. Raises psycopg.Error.
    """
    # On RisingWave an insert into a keyed table replaces the row of its key.
    ending = (
        " on conflict (topic) do update set complete_until = excluded.complete_until,"
        " exported_at = excluded.exported_at"
        if engine.kind == "local"
        else ""
    )
    try:
        connection.execute(
            sql.SQL(
                "insert into {} (topic, complete_until, exported_at) values (%s, %s, %s)" + ending
            ).format(sql.Identifier(engine.schema, EXPORTS)),
            [topic.name, complete_until, at],
        )
    except psycopg.Error as error:
        if not missing_relation(error):
            raise


def unexported(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry
) -> list[Unexported]:
    """Return what the lake does not hold of each topic that was ever exported. Raises psycopg.Error."""
    try:
        exported = dict(
            connection.execute(
                sql.SQL("select topic, complete_until from {}").format(sql.Identifier(engine.schema, EXPORTS))
            ).fetchall()
        )
    except psycopg.Error as error:
        if missing_relation(error):
            return []
        raise
    found = []
    for topic in registry.topics.values():
        if topic.name in exported:
            until = exported[topic.name]
            ((messages, since),) = connection.execute(
                sql.SQL(
                    "select count(*), min(arrived_at) from (select arrived_at from {} where arrived_at > {}"
                    " order by arrived_at limit {}) as later"
                ).format(
                    sql.Identifier(engine.schema, topic.parsed),
                    sql.Literal(until),
                    sql.Literal(EXPORTS_COUNTED),
                )
            ).fetchall()
            found.append(Unexported(topic, until, messages, since))
    return found
