"""What the typed layer refused, and why."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.events.formats import find_topic
from dagster_prefs.events.raw import explained

RELATION = "rejected_events"


@dataclass(frozen=True)
class RejectedEvent:
    """A refused message: where it came from (a file's offset is its line), why, and its text."""

    topic: str
    source: str
    partition: int
    offset: int
    reason: str
    payload: str


def rejected_counts(connection: EngineConnection) -> dict[str, dict[str, int]]:
    """Refused messages per topic and reason, most frequent first, as of the last refresh.

    Raises EngineUnavailable, or RawStoreError where the relation was not made yet.
    """
    with connection.connect() as session, explained(connection, RELATION):
        rows = session.execute(
            sql.SQL(
                "select topic, reason, count(*) from {} group by topic, reason "
                "order by topic, count(*) desc, reason"
            ).format(sql.Identifier(connection.schema, RELATION))
        ).fetchall()
    counts: dict[str, dict[str, int]] = {}
    for topic, reason, count in rows:
        counts.setdefault(topic, {})[reason] = int(count)
    return counts


def rejected_events(
    connection: EngineConnection, topic: str | None = None, reason: str | None = None, limit: int = 20
) -> list[RejectedEvent]:
    """Up to `limit` refused messages by topic, source and offset, of one topic or reason where given.

    Raises UnknownTopic, EngineUnavailable, or RawStoreError where the relation was not made yet.
    """
    conditions, values = [sql.SQL("true")], []
    if topic is not None:
        conditions.append(sql.SQL("topic = %s"))
        values.append(find_topic(topic).name)
    if reason is not None:
        conditions.append(sql.SQL("reason = %s"))
        values.append(reason)
    query = sql.SQL(
        'select topic, source, "partition", "offset", reason, payload from {} where {} '
        'order by topic, source, "partition", "offset" limit {}'
    ).format(
        sql.Identifier(connection.schema, RELATION), sql.SQL(" and ").join(conditions), sql.Literal(limit)
    )
    with connection.connect() as session, explained(connection, RELATION):
        return [RejectedEvent(*row) for row in session.execute(query, values)]
