"""Which step took a message, and when its items were published: the way of an event, for some minutes.

A step's number leads from the place of a message (`live_trail`) over the outbox to the publishing of a domain
(`live_published`). Neither table holds an id of an entity. Both are unlogged: a crash of the engine loses them, and
nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.raw import Place

KEPT_MINUTES = 15


@dataclass(frozen=True)
class Trail:
    """The way of one message on the embedded engine; times are UTC, None for what has not happened or is not known.

    `committed_at` is when its `step` was about to commit. `published_at` maps the key of each domain that was published
    since, and held that step or a later one, to the first time.
    """

    arrived_at: datetime | None = None
    step: int | None = None
    committed_at: datetime | None = None
    published_at: Mapping[str, datetime] | None = None


def make_trail(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Make the two tables, if they are not there. Raises psycopg.Error."""
    connection.execute(
        sql.SQL(
            "create unlogged table if not exists {trail} (step bigint not null, committed_at timestamptz not null,"
            " topic text not null, source text not null, source_partition int not null,"
            " first_offset bigint not null, last_offset bigint not null);"
            " create index if not exists live_trail_place on {trail}"
            " (topic, source, source_partition, first_offset);"
            " create unlogged table if not exists {published} (domain_key text not null, step bigint not null,"
            " published_at timestamptz not null)"
        ).format(**_tables(engine))
    )


def note_step(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    step: int,
    taken: Sequence[tuple[str, str, int, int, int, int]],
) -> None:
    """Remember which messages a step took: topic, source, partition, first and last offset, and number.

    Raises psycopg.Error.
    """
    if not taken:
        return
    topics, sources, partitions, firsts, lasts, _ = map(list, zip(*taken, strict=True))
    connection.execute(
        sql.SQL(
            "insert into {trail} select %s, clock_timestamp(), t.* from unnest("
            "%s::text[], %s::text[], %s::int[], %s::bigint[], %s::bigint[]) as t"
        ).format(**_tables(engine)),
        [step, topics, sources, partitions, firsts, lasts],
    )


def note_published(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, domain_key: str, step: int
) -> None:
    """Remember that items of a domain were published as of a step. Raises psycopg.Error."""
    connection.execute(
        sql.SQL("insert into {published} values (%s, %s, clock_timestamp())").format(**_tables(engine)),
        [domain_key, step],
    )


def forget_old_steps(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Delete what is older than KEPT_MINUTES. Raises psycopg.Error."""
    before = sql.SQL("clock_timestamp() - make_interval(mins => {})").format(sql.Literal(KEPT_MINUTES))
    connection.execute(
        sql.SQL("delete from {trail} where committed_at < {before}").format(before=before, **_tables(engine))
    )
    connection.execute(
        sql.SQL("delete from {published} where published_at < {before}").format(
            before=before, **_tables(engine)
        )
    )


def read_trail(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, topic: TopicDeclaration, place: Place
) -> Trail:
    """Return the way of the message at a place of a topic so far.

    Raises psycopg.Error; UndefinedTable before the first follower of this version.
    """
    tables = {**_tables(engine), "raw": sql.Identifier(engine.schema, topic.raw)}
    row = connection.execute(
        sql.SQL(
            "select raw.arrived_at, trail.step, trail.committed_at from {raw} as raw left join lateral ("
            "   select step, committed_at from {trail} as t where t.topic = %(topic)s"
            "   and t.source = raw.source and t.source_partition = raw.source_partition"
            "   and raw.source_offset between t.first_offset and t.last_offset order by step limit 1"
            " ) as trail on true"
            " where raw.source = %(source)s and raw.source_partition = %(partition)s and raw.source_offset = %(offset)s"
        ).format(**tables),
        {"topic": topic.name, **place._asdict()},
    ).fetchone()
    if row is None or row[1] is None:
        return Trail() if row is None else Trail(row[0])
    published = connection.execute(
        sql.SQL(
            "select domain_key, min(published_at) from {published} where step >= %s group by domain_key"
        ).format(**tables),
        [row[1]],
    ).fetchall()
    return Trail(row[0], row[1], row[2], dict(published))


def _tables(engine: EngineConfiguration) -> dict[str, sql.Composable]:
    return {
        "trail": sql.Identifier(engine.schema, "live_trail"),
        "published": sql.Identifier(engine.schema, "live_published"),
    }
