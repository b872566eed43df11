"""How current the typed events and the views are, judged by the time in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg import sql

from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.events.formats import find_topic
from dagster_prefs.freshness.levels import Unmeasurable

# Every rolling window spans at least this long, so newer tiles must be in it.
SURE_WINDOW = timedelta(days=7)


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

_SHOP = ("user.events", "user_events")
_WATCH = ("view_events", "viewer_watch_metrics_1d")
_GENRE = ("view_events", "viewer_genre_metrics_1d")
_INTERACTIONS = ("content_interactions", "viewer_interactions_1d")
_KNOWN_CATEGORY = "category is not null"

VIEWS: tuple[View, ...] = (
    View(_SHOP[0], "user_category_profile", "last_engaged_at", _SHOP[1], _KNOWN_CATEGORY),
    View(_SHOP[0], "user_brand_profile", "last_brand_interaction", _SHOP[1], "brand is not null"),
    View(_SHOP[0], "user_recent_activity", "last_event_at", _SHOP[1], _KNOWN_CATEGORY),
    View(_SHOP[0], "user_category_affinity_decayed", "last_engaged_at", _SHOP[1], _KNOWN_CATEGORY),
    View(*_WATCH, "last_event_at", "view_events"),
    View(*_GENRE, "last_event_at", "view_events", "genre is not null"),
    View(*_INTERACTIONS, "last_event_at", "content_interactions"),
    View(_WATCH[0], "viewer_engagement_rolling", "last_event_at", _WATCH[1], day="watch_date"),
    View(_GENRE[0], "viewer_preferences_rolling", "last_event_at", _GENRE[1], day="watch_date"),
    View(
        _INTERACTIONS[0],
        "content_interactions_rolling",
        "last_event_at",
        _INTERACTIONS[1],
        day="interaction_date",
    ),
)

RELATIONS: tuple[Typed | View, ...] = (*TYPED, *VIEWS)
_TIMES = {relation.relation: relation.time for relation in RELATIONS}


@dataclass(frozen=True)
class ViewLag:
    """How current one relation is; times are UTC, None where there is no row or no time.

    `waiting` counts what arrived upstream and is not visible here (for a view: 1 when anything does), and
    `lag_seconds` is how long the oldest of it has waited: 0 when nothing waits, however long ago the last
    event was, and negative where it arrived in the future of `now`. `ahead_seconds` is how far the newest event
    lies in that future.
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
    engine: EngineConnection,
    *,
    now: datetime,
    typed: Sequence[Typed] = TYPED,
    views: Sequence[View] = VIEWS,
) -> list[ViewLag]:
    """How far each typed relation lags behind the messages that arrived, and each view behind its upstream.

    A quiet topic is not stale: only what arrived and is not visible makes a lag. Each comparison is one
    statement, so that both sides are read at the same moment. `now` is UTC.

    Raises Unmeasurable naming the relation that is missing or cannot be read.
    """
    lags = [_typed_lag(connection, engine, relation, now) for relation in typed]
    arrivals = {lag.topic: lag.newest_arrival for lag in lags}
    return lags + [_view_lag(connection, engine, view, arrivals.get(view.topic), now) for view in views]


def _typed_lag(
    connection: psycopg.Connection[Any], engine: EngineConnection, typed: Typed, now: datetime
) -> ViewLag:
    names: dict[str, sql.Composable] = {
        "raw": sql.Identifier(engine.schema, typed.raw),
        "parsed": sql.Identifier(engine.schema, typed.parsed),
        "typed": sql.Identifier(engine.schema, typed.relation),
        "erased": sql.Identifier(engine.schema, "erased_subjects"),
        "key": sql.Identifier(typed.key),
        "newest_event": sql.SQL("(select max({}) from {})").format(
            sql.Identifier(typed.time), sql.Identifier(engine.schema, typed.relation)
        )
        if typed.time
        else sql.SQL("null::timestamptz"),
        "subject": sql.SQL("{}::text").format(sql.Identifier(typed.subject[1]))
        if typed.subject
        else sql.SQL("null::text"),
        "kind": sql.Literal(typed.subject[0] if typed.subject else ""),
    }
    row = _read(
        connection,
        typed.relation,
        sql.SQL(
            "select (select max(arrived_at) from {parsed}), min(arrived_at), count(*), {newest_event}"
            " from {raw} where arrived_at >"
            " (select coalesce(max(arrived_at), '0001-01-01 00:00:00+00'::timestamptz) from {parsed})"
        ).format(**names),
    )
    newest_arrival, oldest_waiting, waiting, newest_event = row
    since = oldest_waiting
    if newest_arrival is not None:
        # The newest valid message must be among the typed events, unless its subject was erased.
        missing = _read(
            connection,
            typed.relation,
            sql.SQL(
                "select count(*) from (select {key} as key, {subject} as subject from {parsed}"
                " where reason is null order by arrived_at desc limit 1) as newest"
                " where not exists (select 1 from {typed} as t where t.{key} = newest.key)"
                " and not exists (select 1 from {erased} as e"
                " where e.subject_kind = {kind} and e.subject_id = newest.subject)"
            ).format(**names),
        )[0]
        if missing:
            waiting += missing
            seen = _changed_at(connection, engine, typed.parsed) or newest_arrival
            since = seen if since is None else min(since, seen)
    return ViewLag(
        topic=typed.topic,
        relation=typed.relation,
        kind="typed",
        newest_event=newest_event,
        newest_arrival=newest_arrival,
        waiting=waiting,
        lag_seconds=_age(since, now),
        ahead_seconds=_ahead(newest_event, now),
    )


def _view_lag(
    connection: psycopg.Connection[Any],
    engine: EngineConnection,
    view: View,
    newest_arrival: datetime | None,
    now: datetime,
) -> ViewLag:
    only: sql.Composable = sql.SQL(view.only)
    if view.day:
        only = sql.SQL("{} >= {}::date").format(
            sql.Identifier(view.day), sql.Literal((now - SURE_WINDOW).astimezone(UTC).date().isoformat())
        )
    newest, newest_upstream = _read(
        connection,
        view.relation,
        sql.SQL(
            "select (select max({time}) from {view}),"
            " (select max({upstream_time}) from {upstream} where {only})"
        ).format(
            time=sql.Identifier(view.time),
            view=sql.Identifier(engine.schema, view.relation),
            upstream_time=sql.Identifier(_TIMES[view.upstream]),
            upstream=sql.Identifier(engine.schema, view.upstream),
            only=only,
        ),
    )
    if view.day:
        newest = None if newest is None else datetime.fromtimestamp(newest / 1000, UTC)
        # The item's time has milliseconds, its tile's microseconds.
        newest_upstream = newest_upstream and newest_upstream - timedelta(milliseconds=1)
    behind = newest_upstream is not None and (newest is None or newest < newest_upstream)
    since = None
    if behind:
        since = _changed_at(connection, engine, view.upstream) or newest_upstream
    return ViewLag(
        topic=view.topic,
        relation=view.relation,
        kind="view",
        newest_event=newest,
        newest_arrival=newest_arrival,
        waiting=int(behind),
        lag_seconds=_age(since, now),
        ahead_seconds=_ahead(newest, now),
    )


def _changed_at(
    connection: psycopg.Connection[Any], engine: EngineConnection, relation: str
) -> datetime | None:
    # A batch view changes when it is refreshed; RisingWave knows when each row did.
    statement = (
        sql.SQL("select max(_rw_timestamp) from {}").format(sql.Identifier(engine.schema, relation))
        if engine.kind == "risingwave"
        else sql.SQL("select max(deployed_at) from {} where relation = {}").format(
            sql.Identifier(engine.schema, "deployments"), sql.Literal(relation)
        )
    )
    found: datetime | None = _read(connection, relation, statement)[0]
    return found


def _read(connection: psycopg.Connection[Any], relation: str, statement: sql.Composed) -> tuple[Any, ...]:
    try:
        row: tuple[Any, ...] | None = connection.execute(statement).fetchone()
    except psycopg.errors.UndefinedColumn as error:
        raise Unmeasurable(f"{relation}: {error.diag.message_primary}: run `dbt build` first") from None
    except psycopg.Error as error:
        if missing := missing_relation(error):
            raise Unmeasurable(f"{relation}: {missing}: run `dbt build` first") from None
        raise Unmeasurable(
            f"{relation}: the engine failed while reading ({' '.join(str(error).split())}): "
            "look at its log and run again"
        ) from error
    if row is None:
        raise Unmeasurable(f"{relation}: the engine gave no answer: run again")
    return row


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else (now - since).total_seconds()


def _ahead(newest: datetime | None, now: datetime) -> float:
    return 0.0 if newest is None else max(0.0, (newest - now).total_seconds())
