"""How current the typed events and the views are, judged by the time in the data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg import IsolationLevel, sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.events.formats import find_topic
from dagster_prefs.events.progress import unread
from dagster_prefs.freshness.levels import unreadable

# Every rolling window spans at least this long, so newer tiles must be in it.
SURE_WINDOW = timedelta(days=7)
# A refresh that fails for days must not make a look at it slow.
ARRIVALS_LOOKED_AT = 1_000
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Typed:
    """The typed relation of a topic: its key, time and subject columns; reference data has only a key."""

    topic: str
    relation: str
    key: str
    time: str
    subject: tuple[str, str] | None

    @property
    def parsed(self) -> str:
        """The relation with every message of the topic, valid or not."""
        return f"{self.relation}_parsed"

    @property
    def raw(self) -> str:
        """The table of the messages as they came."""
        return find_topic(self.topic).raw_table


@dataclass(frozen=True)
class View:
    """A view with a time column, and the relation it is made from.

    `only` is the condition on upstream rows that the view shows. A rolling view names its tile's `day`; its
    time is in epoch milliseconds.
    """

    topic: str
    relation: str
    time: str
    upstream: str
    only: str = "true"
    day: str | None = None


TYPED: tuple[Typed, ...] = (
    Typed("user.events", "user_events", "event_id", "event_time", ("user", "user_id")),
    Typed("view_events", "view_events", "event_id", "watched_at", ("viewer", "viewer_id")),
    Typed("content_interactions", "content_interactions", "event_id", "event_ts", ("viewer", "viewer_id")),
    Typed("items", "items", "item_id", "", None),
)

VIEWS: tuple[View, ...] = (
    View("user.events", "user_category_profile", "last_engaged_at", "user_events", "category is not null"),
    View("user.events", "user_brand_profile", "last_brand_interaction", "user_events", "brand is not null"),
    View("user.events", "user_recent_activity", "last_event_at", "user_events", "category is not null"),
    View(
        "user.events",
        "user_category_affinity_decayed",
        "last_engaged_at",
        "user_events",
        "category is not null",
    ),
    View("view_events", "viewer_watch_metrics_1d", "last_event_at", "view_events"),
    View("view_events", "viewer_genre_metrics_1d", "last_event_at", "view_events", "genre is not null"),
    View("content_interactions", "viewer_interactions_1d", "last_event_at", "content_interactions"),
    View(
        "view_events",
        "viewer_engagement_rolling",
        "last_event_at",
        "viewer_watch_metrics_1d",
        day="watch_date",
    ),
    View(
        "view_events",
        "viewer_preferences_rolling",
        "last_event_at",
        "viewer_genre_metrics_1d",
        day="watch_date",
    ),
    View(
        "content_interactions",
        "content_interactions_rolling",
        "last_event_at",
        "viewer_interactions_1d",
        day="interaction_date",
    ),
)

RELATIONS: tuple[Typed | View, ...] = (*TYPED, *VIEWS)
_TIMES = {relation.relation: relation.time for relation in RELATIONS}


@dataclass(frozen=True)
class ViewLag:
    """How current one relation is; times are UTC, None where there is no row or no time.

    `newest_arrival` is that of the newest message that typed events are made from, and None for a view.
    `waiting` counts what arrived upstream and is not visible here (for a view: 1 when anything does), and
    `lag_seconds` is the age of the oldest of it: since it arrived, for a view since it happened. It is 0 when
    nothing waits, however long ago the last event was, and negative for one from the future of `now`.
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
    connection: psycopg.Connection[Any], engine: EngineConnection, relation: Typed | View, *, now: datetime
) -> ViewLag:
    """How far a typed relation lags behind the messages that arrived, or a view behind its upstream.

    A quiet topic is not stale: only what arrived and is not visible makes a lag. Both sides are read at the
    same moment, and a look costs the same however many rows there are (`index_time` of the dbt project).
    `now` is UTC; the connection must be in autocommit.

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
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed, now: datetime
) -> ViewLag:
    parsed = sql.Identifier(engine.schema, typed.parsed)
    newest_event = (
        sql.SQL("select max({}) from {}").format(
            sql.Identifier(typed.time), sql.Identifier(engine.schema, typed.relation)
        )
        if typed.time
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
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed
) -> tuple[datetime | None, int]:
    """Arrival of the oldest message that no refresh has read, and how many there are."""
    found = unread(connection, engine, find_topic(typed.topic))
    return (found.since, found.messages) if found else (None, 0)


def _unread_streaming(
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed
) -> tuple[datetime | None, int]:
    """The same on RisingWave, where the newest offset of each partition says how far the parsed relation is."""
    parsed, raw = sql.Identifier(engine.schema, typed.parsed), sql.Identifier(engine.schema, typed.raw)
    progress = connection.execute(
        sql.SQL("select source, source_partition, last_offset from {} where topic = {}").format(
            sql.Identifier(engine.schema, "ingest_progress"), sql.Literal(typed.topic)
        )
    ).fetchall()
    oldest: list[datetime] = []
    waiting = 0
    for source, partition, last in progress:
        # By literals and not by a join or a subquery, for which RisingWave would read the whole relation.
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
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed
) -> datetime | None:
    """Arrival of the oldest write that was parsed and whose last valid message is not among the typed events.

    Only what no refresh of the typed events has covered is looked at, so that a message is missed neither where its
    arrival lies before those that were read, nor where many others came since.
    """
    kind, column = typed.subject or ("", typed.key)
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
            raw=sql.Literal(typed.raw),
            most=sql.Literal(ARRIVALS_LOOKED_AT),
            key=sql.Identifier(typed.key),
            subject=sql.Identifier(column),
            parsed=sql.Identifier(engine.schema, typed.parsed),
            typed=sql.Identifier(engine.schema, typed.relation),
            erased=sql.Identifier(engine.schema, "erased_subjects"),
            kind=sql.Literal(kind),
        ),
    )
    return since if isinstance(since, datetime) else None


def _missing_since(
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed
) -> datetime | None:
    """Arrival of the oldest valid message found that is not among the typed events, None where the newest one is.

    Looks back in steps that double, so that what has been missing for long is told from what came just now,
    and for at least half as long as it has.
    """
    parsed = sql.Identifier(engine.schema, typed.parsed)
    since = None
    before = datetime.max.replace(tzinfo=UTC)
    step = timedelta(seconds=1)
    while True:
        # One key at a time: joined, RisingWave looks keys up in whatever index has the column.
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
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed, place: tuple[Any, ...]
) -> bool:
    """Whether the valid message at a source, partition and offset is a typed event or of an erased subject."""
    kind, column = typed.subject or ("", typed.key)
    key, subject = _read(
        connection,
        sql.SQL(
            "select {}, {}::text from {} where source = {} and source_partition = {} and source_offset = {}"
        ).format(
            sql.Identifier(typed.key),
            sql.Identifier(column),
            sql.Identifier(engine.schema, typed.parsed),
            *map(sql.Literal, place),
        ),
    )
    (there,) = _read(
        connection,
        sql.SQL("select count(*) from {} where {} = {}").format(
            sql.Identifier(engine.schema, typed.relation), sql.Identifier(typed.key), sql.Literal(key)
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
    connection: psycopg.Connection[Any], engine: EngineConnection, view: View, now: datetime
) -> ViewLag:
    (newest,) = _read(
        connection,
        sql.SQL("select max({}) from {}").format(
            sql.Identifier(view.time), sql.Identifier(engine.schema, view.relation)
        ),
    )
    only: sql.Composable = sql.SQL(view.only)
    shown = newest
    if view.day:
        only = sql.SQL("{} >= {}::date").format(
            sql.Identifier(view.day), sql.Literal((now - SURE_WINDOW).astimezone(UTC).date().isoformat())
        )
        newest = None if newest is None else datetime.fromtimestamp(newest / 1000, UTC)
        # The item's time has milliseconds, its tile's microseconds.
        shown = None if newest is None else newest + timedelta(milliseconds=1)
    (since,) = _read(
        connection,
        sql.SQL("select min({time}) from {upstream} where {time} > {shown} and {only}").format(
            time=sql.Identifier(_TIMES[view.upstream]),
            upstream=sql.Identifier(engine.schema, view.upstream),
            shown=sql.Literal(shown or _BEFORE_ALL),
            only=only,
        ),
    )
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


def _read(connection: psycopg.Connection[Any], statement: sql.Composed) -> tuple[Any, ...]:
    """The one row of a statement that gives one."""
    (row,) = connection.execute(statement).fetchall()
    return tuple(row)


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else (now - since).total_seconds()


def _ahead(newest: datetime | None, now: datetime) -> float:
    return 0.0 if newest is None else max(0.0, (newest - now).total_seconds())
