"""The state of the embedded engine: its server, the free space of its disk, and its follower."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.freshness.catch_up import LONG_REBUILD_SECONDS
from dagster_prefs.freshness.levels import Level, Measure, Unmeasurable, unreadable
from dagster_prefs.live.presence import (
    GONE_SECONDS,
    RETRY_SECONDS,
    follow_lock,
    pending_views,
    rebuilding_session,
)

SERVER, DISK, FOLLOWER = "server", "disk", "follower"
MEASURES: Mapping[str, str] = {
    SERVER: "The server of the embedded engine.",
    DISK: "The disk of the data folder, on which the embedded engine writes.",
    FOLLOWER: "The process that applies and publishes the events of the embedded engine.",
}

# Free space of the disk in bytes: below the first figure a write of the engine may fail, below the second it soon may.
FULL_BYTES, NEARLY_FULL_BYTES = 100_000_000, 500_000_000
# A step of this many seconds is worth a warning; a rebuild of the example's views takes less.
LONG_STEP_SECONDS = 120.0
# A follower that lost the engine returns within its longest pause; the supervisor starts another one within the same
# time.
BACK_SECONDS = 2 * RETRY_SECONDS[1]
# Waiting work is counted up to this number, so that a reading costs the same during a burst.
COUNTED = 100_000


class _State(NamedTuple):
    """The engine's view of its follower at one moment; durations are in seconds.

    `process`, `problem` and `silent` are its last sign of life, None if no process follows. `pid` is the engine's
    session that holds the follower's lock now, with its `state` and the name of the session that `blocks` it. `steps`
    is the number of steps since the engine was set up.
    """

    uptime: float
    process: str | None
    problem: str | None
    silent: float | None
    pid: int | None
    state: str | None
    blocks: str | None
    messages: int
    changes: int
    keys: int
    views: int
    oldest: float | None
    steps: int = 0

    @property
    def alive(self) -> bool:
        """Whether a process follows: it gives signs of life, or the engine is working for it."""
        recent = self.silent is None or self.silent < GONE_SECONDS
        return (self.pid is not None and (recent or self.state == "active")) or self.retries

    @property
    def retries(self) -> bool:
        """Whether it reports a problem and retries; between its attempts it releases the lock."""
        return bool(self.problem) and self.silent is not None and self.silent < BACK_SECONDS

    @property
    def waiting(self) -> str:
        """The work that waits for the follower, in words; empty if there is none."""
        counts = (
            (self.messages, "messages"),
            (self.changes, "changes"),
            (self.keys, "items to publish"),
            (self.views, "views or domains to compare"),
        )
        return ", ".join(f"{number:,} {what}" for number, what in counts if number)


def measure_embedded(engine: EngineConfiguration, registry: Registry, data_dir: Path) -> list[Measure]:
    """Measure the server, the disk of `data_dir` and the follower; empty on RisingWave, which has neither.

    Takes a few milliseconds and writes nothing. Never raises: an unreadable part is `unknown` or an `error`, with the
    reason and the remedy.
    """
    if engine.kind != "local":
        return []
    disk = _disk(data_dir)
    try:
        with engine.connect() as connection:
            state = _read(connection, engine, registry)
    except EngineUnavailable as error:
        down = f"{error}; the follower continues by itself when the engine answers"
        return [
            Measure("engine", SERVER, "error", str(error)),
            disk,
            Measure("engine", FOLLOWER, "unknown", down),
        ]
    except Unmeasurable as error:
        return [
            Measure("engine", SERVER, "ok", "it answers"),
            disk,
            Measure("engine", FOLLOWER, "unknown", str(error)),
        ]
    server = Measure(
        "engine",
        SERVER,
        "ok",
        f"it has answered for {state.uptime:.0f} s",
        values={"uptime_seconds": state.uptime},
    )
    follower = _follower(state)
    if disk.level == "error" and follower.level in ("warn", "error"):
        # A follower on a full disk cannot store the reason why it fails.
        follower = replace(follower, reason=f"{disk.reason}; {follower.reason}")
    return [server, disk, follower]


def _disk(data_dir: Path) -> Measure:
    # The folder may not exist yet; it will be on the disk of its nearest existing parent.
    folder = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Measure("engine", DISK, "unknown", f"{folder} cannot be read: {error.strerror or error}")
    level: Level = "ok"
    reason = f"{free / 1e9:,.1f} GB are free at {folder}"
    if free < NEARLY_FULL_BYTES:
        level = "error" if free < FULL_BYTES else "warn"
        what = "so that the engine cannot write" if level == "error" else "which will soon be too little"
        remedy = "free some space, and the follower continues by itself"
        reason = f"{free / 1e6:,.0f} MB are free at {folder}, {what}: {remedy}"
    return Measure("engine", DISK, level, reason, values={"disk_free_bytes": free})


def _follower(state: _State) -> Measure:
    level, reason = _judge(state)
    if state.waiting and level != "ok":
        reason = f"{reason}; waiting: {state.waiting}"
    values: dict[str, int | float] = {
        "follower_alive": int(state.alive),
        "waiting_messages": state.messages,
        "waiting_changes": state.changes,
        "waiting_keys": state.keys,
        "waiting_views": state.views,
        "steps": state.steps,
    }
    if state.silent is not None:
        values["step_age_seconds"] = state.silent
    notes = {"process": state.process} if state.process else {}
    # The age of the waiting work: without a step in between, it is the lag of everything behind the follower.
    lag = None if state.oldest is None else max(0.0, state.oldest)
    return Measure("engine", FOLLOWER, level, reason, lag, values=values, notes=notes)


def _judge(state: _State) -> tuple[Level, str]:
    silent = state.silent
    if silent is None:
        if state.pid is not None:
            return "ok", "it is starting"
        return (
            "skipped",
            "no follower runs: `prefs up` starts a follower, `prefs refresh` applies what has arrived",
        )
    if state.retries:
        return "error", f"{state.process} retries after this problem: {state.problem}"
    if state.pid is None:
        if silent >= state.uptime:
            if state.uptime < BACK_SECONDS:
                return (
                    "warn",
                    f"the engine started {state.uptime:.0f} s ago, and {state.process} is not back yet: it returns "
                    "by itself, else run `prefs up`",
                )
            return (
                "error",
                f"no follower has run since the engine started {state.uptime:.0f} s ago: run `prefs up`",
            )
        return (
            "error",
            f"{state.process} ended unexpectedly {silent:.0f} s ago: the supervisor of `prefs up` starts another "
            "within half a minute; where none runs, run `prefs up`, and see logs/follower.log in the data folder"
            f"{f'; its last problem was: {state.problem}' if state.problem else ''}",
        )
    if silent < GONE_SECONDS:
        waits = f"{state.waiting} wait" if state.waiting else "nothing waits"
        return "ok", f"{state.process} follows, {waits}"
    if state.blocks:
        return (
            "warn",
            f"{state.process} has waited for {state.blocks} for {silent:.0f} s, and continues when that ends",
        )
    if state.state == "active":
        level: Level = "ok"
        if silent >= LONG_STEP_SECONDS:
            level = "catching up" if state.views and silent < LONG_REBUILD_SECONDS else "warn"
        return level, f"{state.process} has been at one step for {silent:.0f} s: it rebuilds a view"
    return (
        "error",
        f"{state.process} has not given a sign of life for {silent:.0f} s: end that process, and the supervisor of "
        "`prefs up` starts another",
    )


def _read(connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry) -> _State:
    tables = {
        name: sql.Identifier(engine.schema, name)
        for name in ("live_follower", "raw_arrivals", "live_changes", "live_outbox", "live_steps")
    }
    query = sql.SQL(
        """
        with arrivals as (select messages, arrived_at from {raw_arrivals} limit {most}),
        holder as (
            select pid, pg_blocking_pids(pid) as blocked_by from pg_locks
            where locktype = 'advisory' and granted and objsubid = 1
              and database = (select oid from pg_database where datname = current_database())
              and (classid::bigint << 32) | objid::bigint = hashtextextended(%(lock)s, 0)
            limit 1
        )
        select
            extract(epoch from clock_timestamp() - pg_postmaster_start_time())::float8,
            follower.process,
            follower.problem,
            extract(epoch from clock_timestamp() - follower.seen_at)::float8,
            holder.pid,
            -- Its own session waits while only the one beside it rebuilds a view.
            case
                when exists (
                    select from pg_stat_activity
                    where application_name = %(beside)s and state = 'active' and datname = current_database()
                ) then 'active' else activity.state
            end,
            (
                select coalesce(nullif(application_name, ''), 'process ' || pid) from pg_stat_activity
                where pid = any(holder.blocked_by) limit 1
            ),
            (select coalesce(sum(messages), 0) from arrivals)::bigint,
            (select count(*) from (select from {live_changes} limit {most}) as changes),
            (select count(*) from (select from {live_outbox} limit {most}) as keys),
            (select count(*) from ({pending}) as pending where due),
            (select extract(epoch from clock_timestamp() - min(arrived_at)) from arrivals)::float8,
            (select case when is_called then last_value else 0 end from {live_steps})
        from (select) as one
        left join {live_follower} as follower on true
        left join holder on true
        left join pg_stat_activity as activity on activity.pid = holder.pid
        """
    ).format(most=sql.Literal(COUNTED), pending=pending_views(engine, registry), **tables)
    try:
        (row,) = connection.execute(
            query, {"lock": follow_lock(engine), "beside": rebuilding_session(engine)}
        ).fetchall()
    except psycopg.Error as error:
        raise unreadable("the follower", error) from error
    return _State(*row)
