"""What a rolling feature is: the one definition behind training sets and parity, in SQL over the training
tables.

An N-day window of a day D is the tiles with day ≥ D - N. Serving leaves it open, so it holds what is known of
D itself; training ends it before D, because D is not over when its label is taken. Lengths and the number of
favourite genres are those of the dbt project, which a test compares.

The SQL reads the relations `points` (`point`, `viewer_id`, `day`, and `known_at` where versions count) and
the training tables by their names; `point` numbers what features are wanted for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from dagster_prefs.offline.tables import GENRE, INTERACTIONS, WATCH, TileTable

SHORT_DAYS = 7
LONG_DAYS = 28
FAVORITE_GENRES = 5

Mode = Literal["training", "serving"]


@dataclass(frozen=True)
class Feature:
    """One value of a domain of the contract; `cold_start` is the SQL of what a viewer without history "
    "gets."""

    name: str
    domain: str
    cold_start: str


FEATURES: tuple[Feature, ...] = (
    Feature("watch_minutes_7d", "watch", "cast(0 as decimal(28, 6))"),
    Feature("watch_minutes_28d", "watch", "cast(0 as decimal(28, 6))"),
    Feature("titles_7d", "watch", "cast(0 as bigint)"),
    Feature("completions_28d", "watch", "cast(0 as bigint)"),
    Feature("genres_watched_28d", "watch", "cast(0 as bigint)"),
    Feature("likes_28d", "interactions", "cast(0 as bigint)"),
    Feature("shares_28d", "interactions", "cast(0 as bigint)"),
    Feature("searches_28d", "interactions", "cast(0 as bigint)"),
    Feature("favorite_genre", "preferences", "cast(null as varchar)"),
    Feature("favorite_genres", "preferences", "cast([] as varchar[])"),
    Feature("favorite_genre_shares", "preferences", "cast([] as decimal(28, 6)[])"),
    Feature("completion_rate_28d", "preferences", "cast(null as decimal(28, 6))"),
    Feature("minutes_per_view_28d", "preferences", "cast(null as decimal(28, 6))"),
)

DOMAINS = ("watch", "interactions", "preferences")

# Tables, and the columns of each that the features need.
SOURCES: tuple[tuple[TileTable, tuple[str, ...]], ...] = (
    (WATCH, ("watch_seconds", "content_started", "completions", "genres_watched")),
    (GENRE, ("genre", "watch_seconds", "views", "completions")),
    (INTERACTIONS, ("likes", "shares", "searches")),
)


def first_day(day: date) -> date:
    """The earliest day that any window of `day` holds."""
    return day - timedelta(days=LONG_DAYS)


def in_window(tile_day: str, day: str, days: int, mode: Mode) -> str:
    """SQL: whether the tile day lies in the window of that many days of `day`."""
    start = f"{tile_day} >= cast({day} - interval '{days}' day as date)"
    return f"{start} and {tile_day} < {day}" if mode == "training" else start


def ratio(numerator: str, denominator: str) -> str:
    """SQL: the quotient of two integers, rounded half up to 6 places exactly; NULL where the denominator is
    0.

    In integers, because a division of decimals is one of floats in DuckDB.
    """
    top, bottom = f"cast({numerator} as hugeint)", f"cast({denominator} as hugeint)"
    return (
        f"cast(cast((2000000 * {top} + {bottom}) // nullif(2 * {bottom}, 0) as decimal(28, 0)) * 0.000001 "
        "as decimal(28, 6))"
    )


def features_sql(mode: Mode, *, versions: bool = False, last_events: bool = False) -> str:
    """A query that returns one row per point: `point`, then every feature in the order of FEATURES.

    With `last_events`, tiles carry `last_event_ms` and `<domain>_last_event_at` follows for every domain: the
    newest event in its long window, NULL where the window is empty and the domain has no item.

    With `versions`, tiles carry `known_from` and `known_to` (epoch milliseconds), and a point sees only the
    version that was current at its `known_at`.
    """
    columns = ",\n  ".join(
        f"coalesce({feature.domain}.{feature.name}, {feature.cold_start}) as {feature.name}"
        for feature in FEATURES
    )
    newest = "max(t.last_event_ms)" if last_events else "null"
    if last_events:
        columns += "".join(f",\n  {domain}.last_event_at as {domain}_last_event_at" for domain in DOMAINS)
    return f"""
with watch as (
  select
    p.point,
    {ratio(_windowed_sum("t.watch_seconds", "t.watch_date", mode), "60")} as watch_minutes_7d,
    {ratio("sum(t.watch_seconds)", "60")} as watch_minutes_28d,
    cast({_windowed_sum("t.content_started", "t.watch_date", mode)} as bigint) as titles_7d,
    cast(sum(t.completions) as bigint) as completions_28d,
    cast(sum(t.genres_watched) as bigint) as genres_watched_28d,
    {newest} as last_event_at
  from points as p
  join {WATCH.name} as t on {_same_viewer("t.watch_date", mode, versions)}
  group by p.point
),
interactions as (
  select
    p.point,
    cast(sum(t.likes) as bigint) as likes_28d,
    cast(sum(t.shares) as bigint) as shares_28d,
    cast(sum(t.searches) as bigint) as searches_28d,
    {newest} as last_event_at
  from points as p
  join {INTERACTIONS.name} as t on {_same_viewer("t.interaction_date", mode, versions)}
  group by p.point
),
genres as (
  select
    p.point,
    t.genre,
    sum(t.watch_seconds) as watch_seconds,
    sum(t.views) as views,
    sum(t.completions) as completions,
    {newest} as last_event_at
  from points as p
  join {GENRE.name} as t on {_same_viewer("t.watch_date", mode, versions)}
  group by p.point, t.genre
),
totals as (
  select
    point,
    sum(watch_seconds) as watch_seconds,
    sum(views) as views,
    sum(completions) as completions,
    max(last_event_at) as last_event_at
  from genres
  group by point
),
ranked as (
  select
    genres.point,
    genres.genre,
    coalesce({ratio("genres.watch_seconds", "totals.watch_seconds")}, 0) as share,
    row_number() over (partition by genres.point order by genres.watch_seconds desc, genres.genre) as place
  from genres
  join totals on totals.point = genres.point
),
favorites as (
  select
    point,
    max(case when place = 1 then genre end) as favorite_genre,
    array_agg(genre order by place) as favorite_genres,
    array_agg(share order by place) as favorite_genre_shares
  from ranked
  where place <= {FAVORITE_GENRES}
  group by point
),
preferences as (
  select
    totals.point,
    favorites.favorite_genre,
    favorites.favorite_genres,
    favorites.favorite_genre_shares,
    {ratio("totals.completions", "totals.views")} as completion_rate_28d,
    {ratio("totals.watch_seconds", "60 * totals.views")} as minutes_per_view_28d,
    totals.last_event_at
  from totals
  join favorites on favorites.point = totals.point
)
select
  p.point,
  {columns}
from points as p
left join watch on watch.point = p.point
left join interactions on interactions.point = p.point
left join preferences on preferences.point = p.point
"""


def _same_viewer(tile_day: str, mode: Mode, versions: bool) -> str:
    condition = f"t.viewer_id = p.viewer_id and {in_window(tile_day, 'p.day', LONG_DAYS, mode)}"
    return condition + (" and t.known_from <= p.known_at and p.known_at < t.known_to" if versions else "")


def _windowed_sum(value: str, tile_day: str, mode: Mode) -> str:
    return f"coalesce(sum(case when {in_window(tile_day, 'p.day', SHORT_DAYS, mode)} then {value} end), 0)"
