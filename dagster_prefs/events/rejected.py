"""Rejected messages, with the typed layer's reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.raw import translated
from dagster_prefs.events.validity import CLOSED

RELATION = "rejected_events"
FETCH_ROWS = 5_000


@dataclass(frozen=True)
class RejectedEvent:
    """A rejected message: its position (a file's offset is its line), the reason, and its text."""

    topic: str
    source: str
    partition: int
    offset: int
    reason: str
    payload: str


@dataclass(frozen=True)
class Counts:
    """What is stored of a topic: messages that were read, and those of them that were rejected."""

    messages: int
    rejected: int


def message_counts(
    session: psycopg.Connection[Any], connection: EngineConfiguration, *, without: str
) -> dict[str, Counts]:
    """Count the messages of each topic that has some, except those of the source `without`.

    Raises psycopg.Error.
    """
    messages, rejected = (
        session.execute(
            sql.SQL("select topic, {}::bigint from {} where source <> %s group by topic").format(
                sql.SQL(number), sql.Identifier(connection.schema, relation)
            ),
            [without],
        ).fetchall()
        for number, relation in (("sum(messages)", "ingest_progress"), ("count(*)", RELATION))
    )
    counts = {str(topic): int(count) for topic, count in rejected}
    return {str(topic): Counts(int(count), counts.get(topic, 0)) for topic, count in messages}


def rejected_counts(connection: EngineConfiguration, *, open_only: bool = False) -> dict[str, dict[str, int]]:
    """Count rejected messages per topic and kind of reason, most frequent first, as of the last refresh.

    The kind omits the size from a reason that contains one: `genre has too many bytes, at most 1024`.
    `open_only` excludes those that were replayed, and those that need no correction (`validity.CLOSED`).
    Raises EngineUnavailable, or RawStoreError if a relation does not exist yet.
    """
    query = sql.SQL(
        "with kinds as (select topic, {} as kind from {} as rejected where {}) "
        "select topic, kind, count(*) from kinds group by topic, kind order by topic, count(*) desc, kind"
    ).format(
        _KIND, sql.Identifier(connection.schema, RELATION), _is_open(connection) if open_only else _ALWAYS
    )
    with connection.connect() as session, translated(connection, RELATION):
        rows = session.execute(query).fetchall()
    counts: dict[str, dict[str, int]] = {}
    for topic, reason, count in rows:
        counts.setdefault(topic, {})[reason] = int(count)
    return counts


def rejected_events(
    connection: EngineConfiguration,
    topic: str | None = None,
    reason: str | None = None,
    limit: int = 20,
    *,
    open_only: bool = False,
) -> list[RejectedEvent]:
    """Return up to `limit` rejected messages by topic, source and offset.

    `topic` and `reason` (a reason or kind of reason) select among them. Raises EngineUnavailable, or
    RawStoreError if a relation does not exist yet.
    """
    return list(stream_rejected(connection, topic, reason, limit, open_only=open_only))


def stream_rejected(
    connection: EngineConfiguration,
    topic: str | None = None,
    reason: str | None = None,
    limit: int | None = None,
    *,
    open_only: bool = True,
) -> Iterator[RejectedEvent]:
    """Yield the messages of `rejected_events` one by one, in constant memory."""
    conditions, values = [_is_open(connection) if open_only else _ALWAYS], []
    if topic is not None:
        conditions.append(sql.SQL("topic = %s"))
        values.append(topic)
    if reason is not None:
        conditions.append(sql.SQL("(reason = %s or {} = %s)").format(_KIND))
        values += [reason, reason]
    query = sql.SQL(
        'select topic, source, "partition", "offset", reason, payload from {} as rejected where {} '
        'order by topic, source, "partition", "offset" {}'
    ).format(
        sql.Identifier(connection.schema, RELATION),
        sql.SQL(" and ").join(conditions),
        sql.SQL("") if limit is None else sql.SQL("limit {}").format(sql.Literal(limit)),
    )
    with connection.connect() as session, translated(connection, RELATION), session.cursor() as cursor:
        # Streamed in batches, because RisingWave has no server-side cursors.
        for row in cursor.stream(query, values, size=FETCH_ROWS):
            yield RejectedEvent(*row)


_ALWAYS = sql.SQL("true")
# Otherwise each size would be a reason of its own; the macro `too_many_bytes` writes these reasons.
_KIND = sql.SQL("regexp_replace(reason, ' has [0-9]+ bytes, at most ', ' has too many bytes, at most ')")


def _is_open(connection: EngineConfiguration) -> sql.Composed:
    """Return the condition that a row of `rejected` needs a correction."""
    return sql.SQL(
        "rejected.reason not in ({}) and not exists (select 1 from {} as replayed where replayed.topic = rejected.topic"
        ' and replayed.source = rejected.source and replayed.source_partition = rejected."partition"'
        ' and replayed.source_offset = rejected."offset")'
    ).format(
        sql.SQL(", ").join(map(sql.Literal, CLOSED)), sql.Identifier(connection.schema, "replayed_events")
    )
