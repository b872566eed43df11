"""The follower as other processes see it: its lock, its last sign of life, its pending work, and when that is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError

# The channel on which writers wake the followers of a database; the payload is the schema that has work
# (macros/engine/kept.sql).
CHANNEL = "prefs_live"
# The first and the longest pause between attempts after a problem, in seconds.
RETRY_SECONDS = (0.5, 10.0)
# A reported problem may be solved already, e.g. by the apply before this command: the follower tries again within this
# time, in seconds.
PATIENCE_SECONDS = RETRY_SECONDS[1] + 1
# A follower without a sign of life for this long counts as gone, in seconds.
GONE_SECONDS = 10.0


class FollowedElsewhere(PrefsError):
    """Another process follows this engine; the message names it."""


class FollowerProblem(PrefsError):
    """The follower cannot continue; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class FollowerState:
    """The follower's last sign of life: its `process`, `seen_at` (UTC), and its `problem` if there is one.

    `step` is the id of its last step that did anything, 0 before the first.
    """

    process: str
    seen_at: datetime
    step: int
    problem: str | None

    def alive(self, now: datetime) -> bool:
        """Return whether the last sign of life is recent at `now` (UTC)."""
        return abs((now - self.seen_at).total_seconds()) < GONE_SECONDS


def read_follower(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> FollowerState | None:
    """Return the state of the last follower, None if there was none. Raises psycopg.Error."""
    try:
        row = connection.execute(
            sql.SQL("select process, seen_at, step, problem from {}").format(
                sql.Identifier(engine.schema, "live_follower")
            )
        ).fetchone()
    except psycopg.Error as error:
        if missing_relation(error):
            return None
        raise
    return None if row is None else FollowerState(*row)


def follow_lock(engine: EngineConfiguration) -> str:
    """Return the name of the advisory lock that the follower of an engine holds."""
    return f"dagster-prefs follow {engine.schema}"


def rebuilding_session(engine: EngineConfiguration) -> str:
    """Return the application name of the session in which a follower rebuilds views beside its own."""
    return f"dagster-prefs rebuild {engine.schema}"[:63]


def pending_views(engine: EngineConfiguration, registry: Registry) -> sql.Composed:
    """Return a query of the pending views and domains: `relation`, and whether its work is `due` now.

    A view that is rebuilt at an interval is due when the interval since its last rebuild has passed, or when
    `live_pending.since` is -infinity (`make_rebuilt_due`). Everything else is due at once.
    """
    seconds = {name: view.every_seconds for name, view in registry.kept.items() if view.every_seconds}
    return sql.SQL(
        "select p.relation, p.since = '-infinity' or v.as_of is null"
        " or extract(epoch from clock_timestamp() - v.as_of) not between 0 and coalesce(e.seconds, 0) as due"
        " from {pending} as p left join {views} as v using (relation)"
        " left join unnest({names}::text[], {seconds}::int[]) as e (relation, seconds) using (relation)"
    ).format(
        pending=sql.Identifier(engine.schema, "live_pending"),
        views=sql.Identifier(engine.schema, "live_views"),
        names=sql.Literal(list(seconds)),
        seconds=sql.Literal(list(seconds.values())),
    )


def is_pending(connection: psycopg.Connection[Any], engine: EngineConfiguration, relation: str) -> bool:
    """Return whether a view waits to be rebuilt. Raises psycopg.Error."""
    return bool(
        connection.execute(
            sql.SQL("select from {} where relation = %s").format(
                sql.Identifier(engine.schema, "live_pending")
            ),
            [relation],
        ).fetchall()
    )


def make_rebuilt_due(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Make all pending views due now, regardless of their interval. Raises psycopg.Error."""
    connection.execute(
        sql.SQL("update {} set since = '-infinity' where relation in (select relation from {})").format(
            sql.Identifier(engine.schema, "live_pending"), sql.Identifier(engine.schema, "live_views")
        )
    )


def wait_until_applied(
    engine: EngineConfiguration,
    *,
    seconds: float,
    patience_seconds: float = PATIENCE_SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Wait until the follower, another process, has applied and published all that has arrived so far.

    Raises FollowerProblem if it has a problem for `patience_seconds`, ends, or does not finish within `seconds`;
    psycopg.Error.
    """
    with engine.connect() as connection:
        table = {
            name: sql.Identifier(engine.schema, name)
            for name in ("raw_arrivals", "live_changes", "live_pending", "live_due", "live_outbox")
        }
        connection.execute(
            sql.SQL(
                "create temporary table prefs_arrived as"
                " select relation, source, source_partition, last_offset from {raw_arrivals}"
            ).format(**table)
        )
        ((changes,),) = connection.execute(
            sql.SQL("select coalesce(max(id), 0) from {live_changes}").format(**table)
        ).fetchall()
        connection.execute("select pg_notify(%s, %s)", [CHANNEL, engine.schema])
        _wait(
            engine,
            connection,
            sql.SQL(
                "select exists (select from {raw_arrivals} join pg_temp.prefs_arrived"
                "   using (relation, source, source_partition, last_offset))"
                " or exists (select from {live_changes} where id <= {changes})"
            ).format(changes=sql.Literal(changes), **table),
            seconds,
            patience_seconds,
        )
        make_rebuilt_due(connection, engine)
        connection.execute("select pg_notify(%s, %s)", [CHANNEL, engine.schema])
        _wait(
            engine,
            connection,
            sql.SQL("select exists (select from {live_pending} where since = '-infinity')").format(**table),
            seconds,
            patience_seconds,
        )
        ((step,),) = connection.execute(
            sql.SQL("select coalesce(max(step), 0) from {live_outbox}").format(**table)
        ).fetchall()
        _wait(
            engine,
            connection,
            sql.SQL("select exists (select from {live_outbox} where first_step <= {step})").format(
                step=sql.Literal(step), **table
            ),
            seconds,
            patience_seconds,
        )


def _wait(
    engine: EngineConfiguration,
    connection: psycopg.Connection[Any],
    waits: sql.Composed,
    seconds: float,
    patience_seconds: float,
) -> None:
    end = time.monotonic() + seconds
    well_at = time.monotonic()
    while True:
        ((still,),) = connection.execute(waits).fetchall()
        if not still:
            return
        state = read_follower(connection, engine)
        if state and not state.problem:
            well_at = time.monotonic()
        elif state and time.monotonic() >= well_at + patience_seconds:
            raise FollowerProblem(f"the follower ({state.process}) has a problem: {state.problem}")
        if state is None or not is_followed(engine, connection):
            raise FollowerProblem("the follower ended: run the command again, or `prefs up`")
        if time.monotonic() > end:
            raise FollowerProblem(
                f"the follower ({state.process}) has not applied everything within {seconds:g} s: see `prefs status`, "
                "or run the command again to continue waiting"
            )
        time.sleep(0.02)


def is_followed(engine: EngineConfiguration, connection: psycopg.Connection[Any]) -> bool:
    """Return whether a process holds the follower's lock, as it does during a long step. Raises psycopg.Error."""
    ((free,),) = connection.execute(
        "select pg_try_advisory_lock(hashtextextended(%s, 0))", [follow_lock(engine)]
    ).fetchall()
    if free:
        connection.execute("select pg_advisory_unlock(hashtextextended(%s, 0))", [follow_lock(engine)])
    return not free
