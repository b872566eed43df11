"""Retention of raw messages on the embedded engine: those that the lake holds leave the raw tables, and no view falls.

RisingWave deletes by itself (`retention_seconds`), and tells no view. Here the same is done with care: a deleted row
would be noted for the follower (macros/engine/kept.sql), which would then remove it from every view.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.lock import deployment_locked
from dagster_prefs.events.raw import translated

HOUR = timedelta(hours=1)

IsExported = Callable[[psycopg.Connection[Any], datetime], bool]


def let_leave(
    engine: EngineConfiguration, topic: TopicDeclaration, before: datetime, is_exported: IsExported
) -> int:
    """Delete the raw messages of the hours of arrival that ended before `before` (UTC), and return their number.

    Only those that were read, and of an hour of which `is_exported` says that the lake holds what the connection sees.
    The newest of each partition stays, from which a source is read on. What was read from the others stays in the
    views, also when these are rebuilt. Safe to repeat, and to interrupt. Raises RawStoreError, EngineUnavailable.
    """
    left = 0
    with engine.connect() as connection, translated(engine, topic.raw):
        hours = connection.execute(
            sql.SQL(
                "select distinct date_trunc('hour', arrived_at) as hour from {} where arrived_at < %s order by hour"
            ).format(sql.Identifier(engine.schema, topic.raw)),
            [before],
        ).fetchall()
        # One snapshot decides and deletes: what becomes visible in between stays.
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        for (hour,) in hours:
            if hour + HOUR <= before:
                # Before the snapshot, so that no step and no rebuild finds the messages gone without the note.
                with deployment_locked(connection, engine), connection.transaction():
                    if is_exported(connection, hour):
                        left += _leave(connection, engine, topic, hour)
    return left


def _leave(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, topic: TopicDeclaration, hour: datetime
) -> int:
    table = {
        "raw": sql.Identifier(engine.schema, topic.raw),
        "parsed": sql.Identifier(engine.schema, topic.parsed),
        "retained": sql.Identifier(engine.schema, "raw_retained"),
        "changes": sql.Identifier(engine.schema, "live_changes"),
    }
    gone = connection.execute(
        sql.SQL(
            "delete from {raw} as raw using {parsed} as parsed"
            " where raw.arrived_at >= %(first)s and raw.arrived_at < %(last)s"
            " and parsed.source = raw.source and parsed.source_partition = raw.source_partition"
            " and parsed.source_offset = raw.source_offset"
            " and exists (select from {raw} as newer where newer.source = raw.source"
            "   and newer.source_partition = raw.source_partition and newer.source_offset > raw.source_offset)"
        ).format(**table),
        {"first": hour, "last": hour + HOUR},
    ).rowcount
    if gone:
        connection.execute(
            sql.SQL(
                "insert into {retained} as t (relation, before) values (%s, %s)"
                " on conflict (relation) do update set before = greatest(t.before, excluded.before)"
            ).format(**table),
            [topic.parsed, hour + HOUR],
        )
        # What the trigger has noted in this transaction, which nobody has seen.
        connection.execute(
            sql.SQL("delete from {changes} where relation = %s and xmin = pg_current_xact_id()::xid").format(
                **table
            ),
            [topic.raw],
        )
    return gone
