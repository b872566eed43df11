"""Catching up: a lag whose backlog is measured to end soon, which is no reason to wake anybody.

It takes a measured rate and an end within CATCH_UP_SECONDS. A backlog that stands still, grows, or will take longer is
stale like any other, and so is one whose rate cannot be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.bootstrap import BootstrapState, bootstrap_states
from dagster_prefs.freshness.levels import Level, Measure, unreadable
from dagster_prefs.live.backlog import LEAST_SECONDS, Backlog, read_backlog

# How long a backlog may take at its measured rate and still counts as catching up, in seconds.
CATCH_UP_SECONDS = 3_600.0
# A rebuild may take this many seconds before somebody should look, e.g. of the views over a long history.
LONG_REBUILD_SECONDS = 900.0
# A bootstrap that has not completed a part for this long is stuck or was stopped, in seconds; parts that take longer
# on average may take three times that.
INACTIVE_SECONDS = 600.0
# How far apart two messages are, by their arrival, whose Kafka times measure the speed of reading, in seconds.
READING_SECONDS = 60.0
COMPLETE_SHOWN = timedelta(days=1)


@dataclass(frozen=True)
class CatchingUp:
    """A backlog that is worked off: how, in words, at which rate, and the estimated seconds until it is gone.

    Within a rebuild of views neither is known, and it counts as catching up for LONG_REBUILD_SECONDS only.
    """

    told: str
    rate: float | None = None
    seconds_left: float | None = None


def excused(measure: Measure, found: CatchingUp | None) -> Measure:
    """Return a measure as `catching up` if it is late, by a backlog that is measured to end soon."""
    if found is None or measure.level not in ("warn", "error"):
        return measure
    if found.seconds_left is not None and found.seconds_left > CATCH_UP_SECONDS:
        return measure
    values = dict(measure.values)
    reason = f"catching up, {found.told}"
    if found.rate is not None and found.seconds_left is not None:
        reason += f", about {shown_seconds(found.seconds_left)} left"
        values |= {"catch_up_rate": found.rate, "catch_up_seconds_left": found.seconds_left}
    return replace(measure, level="catching up", reason=f"{reason}: {measure.reason}", values=values)


def follower_progress(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, now: datetime
) -> CatchingUp | None:
    """Return how the follower of the embedded engine works off what waits, None if it does not, or on RisingWave.

    What a running bootstrap will add counts too. Raises Unmeasurable.
    """
    if engine.kind != "local":
        return None
    try:
        backlog = read_backlog(connection, engine)
        running = [state for state in bootstrap_states(connection, engine) if is_running(state, now)]
    except psycopg.Error as error:
        raise unreadable("the follower's work", error) from error
    return None if backlog is None else _follower(backlog, running)


def _follower(backlog: Backlog, running: Sequence[BootstrapState]) -> CatchingUp | None:
    rate, left = backlog.rate, backlog.seconds_left
    if running and backlog.worked:
        # While history comes faster than it is applied, the work grows towards its known end.
        rate = backlog.worked
        left = max(sum(state.seconds_left or 0.0 for state in running), backlog.waiting / rate)
    if rate is not None and left is not None:
        return CatchingUp(f"{rate:,.3g} messages and items per second", rate, left)
    seconds = backlog.rebuilding_seconds
    if seconds is not None and seconds < LONG_REBUILD_SECONDS:
        return CatchingUp(f"rebuilding views since {shown_seconds(seconds)}")
    return None


def reading_progress(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    topic: TopicDeclaration,
    behind: int,
    lag_seconds: float,
) -> CatchingUp | None:
    """Return how a topic's reading gets nearer to the end of Kafka, None if it does not.

    `behind` messages are not read, the first of them sent `lag_seconds` ago. The speed is that of the Kafka times of
    what arrived in the last minute: only reading that is faster than time itself ever arrives at the end. Raises
    psycopg.Error.
    """
    ((now,),) = connection.execute("select now()").fetchall()
    recent = now - timedelta(seconds=READING_SECONDS)

    def read_at(first: datetime, last: datetime, order: str) -> tuple[datetime, datetime] | None:
        """Return when a message from Kafka arrived and was sent: the last or first between two arrivals."""
        row = connection.execute(
            sql.SQL(
                "select arrived_at, kafka_timestamp from {} where arrived_at > {} and arrived_at <= {}"
                " and kafka_timestamp is not null order by arrived_at {} limit 1"
            ).format(
                sql.Identifier(engine.schema, topic.parsed),
                sql.Literal(first),
                sql.Literal(last),
                sql.SQL(order),
            )
        ).fetchone()
        return None if row is None else (row[0], row[1])

    newest = read_at(recent, now, "desc")
    before = read_at(recent - 5 * (now - recent), recent, "desc") or read_at(recent, now, "asc")
    if newest is None or before is None:
        # Nothing is read at the moment.
        return None
    (began_at, first_at), (arrived_at, sent_at) = before, newest
    passed = (arrived_at - began_at).total_seconds()
    read = (sent_at - first_at).total_seconds()
    # A gain that could be the jitter of two clocks is none.
    if passed < LEAST_SECONDS or read <= 1.05 * passed or lag_seconds <= 0:
        return None
    left = lag_seconds / (read / passed - 1)
    rate = behind / left
    return CatchingUp(f"{rate:,.3g} messages per second", rate, left)


def is_running(state: BootstrapState, now: datetime) -> bool:
    """Return whether a bootstrap progresses: it is not complete, and a part was begun or completed recently."""
    if state.is_complete or state.progressed_at is None:
        return False
    usual = state.seconds / state.parts_done if state.parts_done else 0.0
    return (now - state.progressed_at).total_seconds() < max(INACTIVE_SECONDS, 3 * usual)


def measure_history(engine: EngineConfiguration, *, now: datetime) -> list[Measure]:
    """Measure every bootstrap that is not complete, or was completed within a day; `now` is UTC.

    Never raises: what cannot be read is measured elsewhere, and without an engine there is nothing to say of history.
    """
    try:
        with engine.connect() as connection:
            states = bootstrap_states(connection, engine)
    except (PrefsError, psycopg.Error):
        return []
    return [
        _bootstrap_measure(state, now)
        for state in states
        if not state.is_complete
        or (state.progressed_at is not None and now - state.progressed_at < COMPLETE_SHOWN)
    ]


def _bootstrap_measure(state: BootstrapState, now: datetime) -> Measure:
    name = f"{state.history.topic} from {state.history.shown}"
    values: dict[str, int | float] = {
        "parts": state.parts,
        "parts_done": state.parts_done,
        "messages": state.messages,
    }
    told = f"{state.parts_done} of {state.parts} parts, {state.messages:,} messages"
    level: Level = "ok"
    if state.is_complete:
        return Measure("history", name, level, f"complete: {told}", values=values)
    if state.rate is not None and state.seconds_left is not None:
        values |= {"catch_up_rate": state.rate, "catch_up_seconds_left": state.seconds_left}
        told += f", {state.rate:,.0f} per second, about {shown_seconds(state.seconds_left)} left"
    if is_running(state, now):
        level, reason = "catching up", told
    else:
        level = "warn"
        reason = f"{told}; it was stopped or does not progress: run the same `prefs bootstrap` again to go on"
    idle = None if state.progressed_at is None else max(0.0, (now - state.progressed_at).total_seconds())
    return Measure("history", name, level, reason, idle, values=values)


def shown_seconds(seconds: float) -> str:
    """Return a duration for a sentence: `40 s`, `3 min`."""
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
