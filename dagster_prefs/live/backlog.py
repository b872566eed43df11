"""How the follower's work shrinks: what waited at each moment of the last minutes, and how many messages it took.

The follower notes it every few seconds, in an unlogged table: a crash of the engine loses the notes, and nothing but
the judgement of freshness depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.live.presence import follow_lock, pending_views

# How often the work is noted, over how long its decrease is measured, and the least time for a measure, in seconds.
NOTED_SECONDS, WINDOW_SECONDS, LEAST_SECONDS = 2.0, 60.0, 3.0
KEPT_MINUTES = 15
# Rows of waiting work that are counted, at most; to count so many takes a twentieth of the time between two notes.
COUNTED = 1_000_000


@dataclass(frozen=True)
class Backlog:
    """The work that waits for the follower, and how it changed over the last minute at most.

    `waiting` is the number of messages, items and views together, of which `history` are messages that came from files
    and tables: their number is bounded, however fast they came. `worked` is what was worked off per second, whatever
    arrived meanwhile; `shrinking` is by how much the work has become less per second since its highest. Both are None
    where too little is known. `rebuilding_seconds` is for how long the engine has been rebuilding views in one step,
    None if it is not.
    """

    waiting: int
    history: int
    worked: float | None
    shrinking: float | None
    rebuilding_seconds: float | None

    @property
    def rate(self) -> float | None:
        """The rate at which the work ends, in units per second; None while it does not move towards an end."""
        # Most of it is history: it ends at the rate of the work, whatever live messages come beside it.
        found = self.worked if 2 * self.history > self.waiting else self.shrinking
        return found if found is not None and found > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """The estimated seconds until nothing waits; None while the work does not move towards an end."""
        if not self.waiting:
            return 0.0
        return None if self.rate is None else self.waiting / self.rate


def make_backlog(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Make the table of notes, if it is not there. Raises psycopg.Error."""
    connection.execute(
        sql.SQL(
            "create unlogged table if not exists {} (noted_at timestamptz primary key, waiting bigint not null,"
            " views bigint not null, taken bigint not null)"
        ).format(_table(engine, "live_backlog"))
    )


def note_backlog(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry, taken: int
) -> None:
    """Note what waits now, and how many messages and items were `taken` since the last note. Raises psycopg.Error."""
    connection.execute(
        sql.SQL(
            "insert into {notes} (noted_at, waiting, views, taken)"
            " select clock_timestamp(), {waiting} + due.views, due.views, %s"
            " from (select count(*) as views from ({pending}) as p where due) as due on conflict do nothing"
        ).format(
            notes=_table(engine, "live_backlog"),
            waiting=_waiting(engine),
            pending=pending_views(engine, registry),
        ),
        [taken],
    )
    connection.execute(
        sql.SQL("delete from {} where noted_at < clock_timestamp() - make_interval(mins => {})").format(
            _table(engine, "live_backlog"), sql.Literal(KEPT_MINUTES)
        )
    )


def read_backlog(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> Backlog | None:
    """Return the work that waits and how it moves, None before the first follower of this version.

    Raises psycopg.Error.
    """
    try:
        row = connection.execute(
            sql.SQL(
                """
                with notes as (
                    select * from {notes}
                    where noted_at >= clock_timestamp() - make_interval(secs => {window})
                ),
                -- The follower alone knows which views are due.
                last as (select views from {notes} order by noted_at desc limit 1),
                peak as (select noted_at, waiting from notes order by waiting desc, noted_at desc limit 1),
                first as (select noted_at, views from notes order by noted_at limit 1),
                present as (
                    select clock_timestamp() as at, {waiting} + coalesce((select views from last), 0) as waiting,
                        coalesce((select views from last), 0) as views
                )
                select
                    present.waiting,
                    (
                        select coalesce(sum(messages), 0) from (
                            select messages from {raw_arrivals} where source like 'file:%%' limit {most}
                        ) as old
                    )::bigint,
                    extract(epoch from present.at - first.noted_at)::float8,
                    -- What the first note counts as taken was taken before it.
                    (select coalesce(sum(taken), 0) from notes where noted_at > first.noted_at)::bigint
                        + greatest(0, first.views - present.views),
                    extract(epoch from present.at - peak.noted_at)::float8,
                    peak.waiting - present.waiting,
                    (
                        select extract(epoch from present.at - seen_at)::float8 from {live_follower}
                        where exists (select from {live_pending}) and exists (
                            select from pg_locks as held join pg_stat_activity as a on a.pid = held.pid
                            where held.locktype = 'advisory' and held.granted and held.objsubid = 1
                              and held.database = (select oid from pg_database where datname = current_database())
                              and (held.classid::bigint << 32) | held.objid::bigint = hashtextextended(%s, 0)
                              -- Its second session may rebuild a view while the first has done its part; one that
                              -- waits for a stranger does not rebuild.
                              and a.state in ('active', 'idle in transaction')
                              and cardinality(pg_blocking_pids(held.pid)) = 0
                        )
                    )
                from present left join peak on true left join first on true
                """
            ).format(
                window=sql.Literal(WINDOW_SECONDS),
                most=sql.Literal(COUNTED),
                waiting=_waiting(engine),
                notes=_table(engine, "live_backlog"),
                **{name: _table(engine, name) for name in ("raw_arrivals", "live_follower", "live_pending")},
            ),
            [follow_lock(engine)],
        ).fetchone()
    except psycopg.Error as error:
        if missing_relation(error):
            return None
        raise
    if row is None:
        return None
    waiting, history, seconds, worked, since_peak, less, rebuilding = row
    return Backlog(
        waiting,
        history,
        worked / seconds if seconds is not None and seconds >= LEAST_SECONDS else None,
        less / since_peak if since_peak is not None and since_peak >= LEAST_SECONDS else None,
        rebuilding,
    )


def _waiting(engine: EngineConfiguration) -> sql.Composed:
    """Return the expression of the messages and items that wait."""
    return sql.SQL(
        "((select coalesce(sum(messages), 0) from (select messages from {} limit {most}) as a)::bigint"
        " + (select count(*) from (select from {} limit {most}) as o))"
    ).format(_table(engine, "raw_arrivals"), _table(engine, "live_outbox"), most=sql.Literal(COUNTED))


def _table(engine: EngineConfiguration, name: str) -> sql.Identifier:
    return sql.Identifier(engine.schema, name)
