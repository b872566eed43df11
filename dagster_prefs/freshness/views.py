"""Freshness of typed events and views, measured by the times in the data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg import IsolationLevel, sql

from dagster_prefs.declarations.registry import Registry, TopicDeclaration, Upstream, WatchedView
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.progress import unread
from dagster_prefs.freshness.levels import Unmeasurable, unreadable

# Bounds the cost of a measurement after refreshes have failed for days.
ARRIVALS_LOOKED_AT = 1_000
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Typed:
    """The typed relation of a topic.

    `subject` is the kind under which erasures of its subjects are recorded, with their key column; None for reference
    data.
    """

    declared: TopicDeclaration
    subject: tuple[str, str] | None

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self.declared.name

    @property
    def relation(self) -> str:
        """The relation of the valid events."""
        return self.declared.relation


def watched_relations(registry: Registry) -> tuple[Typed | WatchedView, ...]:
    """Return every typed relation, tile and rolling view, and the preference views that have a newest time."""
    return (*typed_relations(registry), *registry.watched)


def typed_relations(registry: Registry) -> tuple[Typed, ...]:
    """Return the typed relation of every topic."""
    return tuple(
        Typed(
            topic,
            (registry.family(topic.entity)[0].name, registry.entity(topic.entity).key.name)
            if topic.entity
            else None,
        )
        for topic in registry.topics.values()
    )


@dataclass(frozen=True)
class ViewLag:
    """The freshness of one relation; times are UTC, None where there is no row or no time.

    `newest_arrival` is that of the newest message that was parsed into typed events, and None for a view.
    `waiting` counts what arrived upstream and is not visible here (for a view: 1 if anything did), and
    `lag_seconds` is the age of the oldest of it: since its arrival, for a view since its event time. It is 0
    when nothing waits, however long ago the last event was, and negative for one from the future of `now`.
    `ahead_seconds` is how far the newest event lies in that future.
    """

    topic: str
    relation: str
    kind: Literal["typed", "view"]
    newest_event: datetime | None
    newest_arrival: datetime | None
    waiting: int
    lag_seconds: float
    ahead_seconds: float


def view_lag(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    relation: Typed | WatchedView,
    *,
    now: datetime,
) -> ViewLag:
    """Measure how far a typed relation lags behind the messages that arrived, or a view behind its upstream.

    A topic without new events is not stale: only messages that arrived and are not visible make a lag. Both
    sides are read at the same moment, and the cost does not depend on the number of rows (`index_time` of the
    dbt project). `now` is UTC; the connection must be in autocommit.

    Raises Unmeasurable naming the relation that is missing or cannot be read.
    """
    connection.isolation_level, connection.read_only = IsolationLevel.REPEATABLE_READ, True
    try:
        with connection.transaction():
            if isinstance(relation, Typed):
                return _typed_lag(connection, engine, relation, now)
            return _view_lag(connection, engine, relation, now)
    except psycopg.Error as error:
        raise unreadable(relation.relation, error) from error


def _typed_lag(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed, now: datetime
) -> ViewLag:
    parsed = sql.Identifier(engine.schema, typed.declared.parsed)
    newest_event = (
        sql.SQL("select max({}) from {}").format(
            sql.Identifier(typed.declared.time), sql.Identifier(engine.schema, typed.relation)
        )
        if typed.declared.time
        else sql.SQL("select null::timestamptz")
    )
    newest_arrival, newest = _read(
        connection, sql.SQL("select (select max(arrived_at) from {}), ({})").format(parsed, newest_event)
    )
    streaming = engine.kind == "risingwave"
    since, waiting = (_unread_streaming if streaming else _unread)(connection, engine, typed)
    missing = [_missing_since(connection, engine, typed)]
    if not streaming:
        missing.append(_missing_arrival(connection, engine, typed))
    if known := [moment for moment in missing if moment is not None]:
        since, waiting = min(known if since is None else [since, *known]), waiting + 1
    return ViewLag(
        topic=typed.topic,
        relation=typed.relation,
        kind="typed",
        newest_event=newest,
        newest_arrival=newest_arrival,
        waiting=waiting,
        lag_seconds=_age(since, now),
        ahead_seconds=_ahead(newest, now),
    )


def _unread(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed
) -> tuple[datetime | None, int]:
    """Return the arrival of the oldest message that no refresh has read, and the number of such messages."""
    found = unread(connection, engine, typed.declared)
    return (found.since, found.messages) if found else (None, 0)


def _unread_streaming(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed
) -> tuple[datetime | None, int]:
    """The same on RisingWave, judged by the newest offset of each partition in the parsed relation."""
    parsed, raw = (
        sql.Identifier(engine.schema, name) for name in (typed.declared.parsed, typed.declared.raw)
    )
    progress = connection.execute(
        sql.SQL("select source, source_partition, last_offset from {} where topic = {}").format(
            sql.Identifier(engine.schema, "ingest_progress"), sql.Literal(typed.topic)
        )
    ).fetchall()
    oldest: list[datetime] = []
    waiting = 0
    for source, partition, last in progress:
        # Literals, because RisingWave would read the whole relation for a join or a subquery.
        of_partition = sql.SQL("source = {} and source_partition = {}").format(
            sql.Literal(source), sql.Literal(partition)
        )
        (there,) = _read(
            connection,
            sql.SQL("select count(*) from {} where {} and source_offset = {}").format(
                parsed, of_partition, sql.Literal(last)
            ),
        )
        if there:
            continue
        (shown,) = _read(
            connection, sql.SQL("select max(source_offset) from {} where {}").format(parsed, of_partition)
        )
        since, messages = _read(
            connection,
            sql.SQL("select min(arrived_at), count(*) from {} where {} and source_offset > {}").format(
                raw, of_partition, sql.Literal(-1 if shown is None else shown)
            ),
        )
        if messages:
            oldest.append(since)
            waiting += messages
    return min(oldest, default=None), waiting


def _missing_arrival(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed
) -> datetime | None:
    """Return the arrival of the oldest parsed write whose last valid message is not among the typed events.

    Only reads writes that no refresh of the typed events has covered, so that a message is found even if it
    arrived before those that were read, or many others arrived since.
    """
    kind, column = typed.subject or ("", typed.declared.identity)
    (since,) = _read(
        connection,
        sql.SQL(
            "select min(arrival.arrived_at) from (select * from {arrivals} where relation = {raw} limit {most})"
            " as arrival cross join lateral (select {key} as key, {subject}::text as subject from {parsed} as parsed"
            " where parsed.source = arrival.source and parsed.source_partition = arrival.source_partition"
            " and parsed.source_offset between arrival.first_offset and arrival.last_offset and reason is null"
            " order by parsed.source_offset desc limit 1) as newest"
            " where not exists (select from {typed} as typed where typed.{key} = newest.key)"
            " and not exists (select from {erased} as erased where erased.subject_kind = {kind}"
            " and erased.subject_id = newest.subject)"
        ).format(
            arrivals=sql.Identifier(engine.schema, "raw_arrivals"),
            raw=sql.Literal(typed.declared.raw),
            most=sql.Literal(ARRIVALS_LOOKED_AT),
            key=sql.Identifier(typed.declared.identity),
            subject=sql.Identifier(column),
            parsed=sql.Identifier(engine.schema, typed.declared.parsed),
            typed=sql.Identifier(engine.schema, typed.relation),
            erased=sql.Identifier(engine.schema, "erased_subjects"),
            kind=sql.Literal(kind),
        ),
    )
    return since if isinstance(since, datetime) else None


def _missing_since(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed
) -> datetime | None:
    """Return the arrival of the oldest valid message that is not a typed event, None if the newest one is.

    Looks back in steps that double, so that a message which has been missing for long is distinguished from
    one that just arrived, and the age found is at least half of the real one.
    """
    parsed = sql.Identifier(engine.schema, typed.declared.parsed)
    since = None
    before = datetime.max.replace(tzinfo=UTC)
    step = timedelta(seconds=1)
    while True:
        # One key per query: in a join, RisingWave may look keys up in any index that contains the column.
        found = connection.execute(
            sql.SQL(
                "select source, source_partition, source_offset, arrived_at from {}"
                " where reason is null and arrived_at < {} order by arrived_at desc limit 1"
            ).format(parsed, sql.Literal(before))
        ).fetchone()
        if found is None or _is_accounted_for(connection, engine, typed, found[:3]):
            return since
        since = found[3]
        before, step = since - step, 2 * step


def _is_accounted_for(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, typed: Typed, place: tuple[Any, ...]
) -> bool:
    """Return whether the valid message at `place` is a typed event or belongs to an erased subject."""
    kind, column = typed.subject or ("", typed.declared.identity)
    key, subject = _read(
        connection,
        sql.SQL(
            "select {}, {}::text from {} where source = {} and source_partition = {} and source_offset = {}"
        ).format(
            sql.Identifier(typed.declared.identity),
            sql.Identifier(column),
            sql.Identifier(engine.schema, typed.declared.parsed),
            *map(sql.Literal, place),
        ),
    )
    (there,) = _read(
        connection,
        sql.SQL("select count(*) from {} where {} = {}").format(
            sql.Identifier(engine.schema, typed.relation),
            sql.Identifier(typed.declared.identity),
            sql.Literal(key),
        ),
    )
    if there:
        return True
    (erased,) = _read(
        connection,
        sql.SQL("select count(*) from {} where subject_kind = {} and subject_id = {}").format(
            sql.Identifier(engine.schema, "erased_subjects"), sql.Literal(kind), sql.Literal(subject)
        ),
    )
    return bool(erased)


def _view_lag(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, view: WatchedView, now: datetime
) -> ViewLag:
    if view.unclear:
        raise Unmeasurable(f"{view.relation} cannot be watched: {view.unclear}")
    (newest,) = _read(
        connection,
        sql.SQL("select max({}) from {}").format(
            sql.Identifier(view.time), sql.Identifier(engine.schema, view.relation)
        ),
    )
    shown = newest
    if view.is_rolling:
        newest = None if newest is None else datetime.fromtimestamp(newest / 1000, UTC)
        # An item's time has milliseconds, its tile's microseconds.
        shown = None if newest is None else newest + timedelta(milliseconds=1)
    waiting = [_waiting(connection, engine, upstream, shown, now) for upstream in view.upstreams]
    since = min((moment for moment in waiting if moment is not None), default=None)
    return ViewLag(
        topic=view.topic,
        relation=view.relation,
        kind="view",
        newest_event=newest,
        newest_arrival=None,
        waiting=int(since is not None),
        lag_seconds=_age(since, now),
        ahead_seconds=_ahead(newest, now),
    )


def _waiting(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    upstream: Upstream,
    shown: datetime | None,
    now: datetime,
) -> datetime | None:
    """Return the oldest time in a relation that is newer than what the view shows."""
    only: sql.Composable = sql.SQL(upstream.only)
    if upstream.day:
        first = (now - timedelta(days=upstream.days)).astimezone(UTC).date()
        only = sql.SQL("{} >= {}::date").format(sql.Identifier(upstream.day), sql.Literal(first.isoformat()))
    (since,) = _read(
        connection,
        sql.SQL("select min({time}) from {upstream} where {time} > {shown} and ({only})").format(
            time=sql.Identifier(upstream.time),
            upstream=sql.Identifier(engine.schema, upstream.relation),
            shown=sql.Literal(shown or _BEFORE_ALL),
            only=only,
        ),
    )
    return since if isinstance(since, datetime) else None


def _read(connection: psycopg.Connection[Any], statement: sql.Composed) -> tuple[Any, ...]:
    """Return the only row of a statement's result."""
    (row,) = connection.execute(statement).fetchall()
    return tuple(row)


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else (now - since).total_seconds()


def _ahead(newest: datetime | None, now: datetime) -> float:
    return 0.0 if newest is None else max(0.0, (newest - now).total_seconds())
