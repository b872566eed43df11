"""Why a served number is what it is: the tiles and latest events behind it, and the number computed from
them again.

The formulas here are this module's own and not those of the rolling views: a view with a mistake would only
agree with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.serving.preferences import checked_now
from dagster_prefs.serving.profiles import ProfileClient

LONG_DAYS = 28
SHORT_DAYS = 7
TOP_GENRES = 5
LATEST_EVENTS = 10
PLACES = Decimal("0.000001")

Tile = Mapping[str, Any]


class WhyError(PrefsError):
    """The attribute is unknown, or what is behind it cannot be read."""


@dataclass(frozen=True)
class Explanation:
    """One attribute of one viewer, as served and as computed again from its tiles.

    `online` is the served value, None where the viewer has no item or the value is NULL; `online_error`
    says why it could not be read. `in_view` says whether the viewer is in the window at all: if not, no
    item should exist. Tiles and events are newest first.
    """

    viewer_id: int
    domain: str
    attribute: str
    window_start: date
    window_days: int
    online: Any
    online_state: str
    online_error: str | None
    recomputed: Any
    in_view: bool
    equal: bool
    tiles: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class _Source:
    """Where a domain's numbers come from."""

    tiles: str
    day: str
    columns: tuple[str, ...]
    events: str
    event_columns: tuple[str, ...]
    event_time: str


_WATCHED = (
    "view_events",
    ("event_id", "content_id", "genre", "watch_duration_sec", "completion_pct", "watched_at"),
    "watched_at",
)
_SOURCES = {
    "watch": _Source(
        "viewer_watch_metrics_1d",
        "watch_date",
        ("watch_seconds", "views", "content_started", "completions", "genres_watched", "last_event_at"),
        *_WATCHED,
    ),
    "preferences": _Source(
        "viewer_genre_metrics_1d",
        "watch_date",
        ("genre", "watch_seconds", "views", "completions", "last_event_at"),
        *_WATCHED,
    ),
    "interactions": _Source(
        "viewer_interactions_1d",
        "interaction_date",
        ("likes", "shares", "searches", "last_event_at"),
        "content_interactions",
        ("event_id", "event_type", "event_ts"),
        "event_ts",
    ),
}


def _total(tiles: Sequence[Tile], column: str) -> int:
    return sum(int(tile[column]) for tile in tiles)


def _ratio(part: int, whole: int) -> Decimal | None:
    return (Decimal(part) / whole).quantize(PLACES, ROUND_HALF_UP) if whole else None


def _minutes(tiles: Sequence[Tile]) -> Decimal | None:
    return _ratio(_total(tiles, "watch_seconds"), 60)


def _favorites(tiles: Sequence[Tile]) -> list[tuple[str, int]]:
    seconds: dict[str, int] = {}
    for tile in tiles:
        seconds[tile["genre"]] = seconds.get(tile["genre"], 0) + int(tile["watch_seconds"])
    return sorted(seconds.items(), key=lambda entry: (-entry[1], entry[0]))[:TOP_GENRES]


def _shares(tiles: Sequence[Tile]) -> list[Decimal]:
    whole = _total(tiles, "watch_seconds")
    return [_ratio(seconds, whole) or Decimal(0) for _, seconds in _favorites(tiles)]


def _last_event(tiles: Sequence[Tile]) -> int:
    newest: datetime = max(tile["last_event_at"] for tile in tiles)
    since = newest - datetime(1970, 1, 1, tzinfo=UTC)
    return (since // timedelta(microseconds=1) + 500) // 1000


# attribute → days of its window, and its value from the tiles of that window.
_DEFINITIONS: dict[tuple[str, str], tuple[int, Callable[[Sequence[Tile]], Any]]] = {
    ("watch", "watch_minutes_7d"): (SHORT_DAYS, _minutes),
    ("watch", "watch_minutes_28d"): (LONG_DAYS, _minutes),
    ("watch", "titles_7d"): (SHORT_DAYS, lambda tiles: _total(tiles, "content_started")),
    ("watch", "completions_28d"): (LONG_DAYS, lambda tiles: _total(tiles, "completions")),
    ("watch", "genres_watched_28d"): (LONG_DAYS, lambda tiles: _total(tiles, "genres_watched")),
    ("watch", "last_event_at"): (LONG_DAYS, _last_event),
    ("interactions", "likes_28d"): (LONG_DAYS, lambda tiles: _total(tiles, "likes")),
    ("interactions", "shares_28d"): (LONG_DAYS, lambda tiles: _total(tiles, "shares")),
    ("interactions", "searches_28d"): (LONG_DAYS, lambda tiles: _total(tiles, "searches")),
    ("interactions", "last_event_at"): (LONG_DAYS, _last_event),
    ("preferences", "favorite_genre"): (LONG_DAYS, lambda tiles: _favorites(tiles)[0][0]),
    ("preferences", "favorite_genres"): (LONG_DAYS, lambda tiles: [genre for genre, _ in _favorites(tiles)]),
    ("preferences", "favorite_genre_shares"): (LONG_DAYS, _shares),
    ("preferences", "completion_rate_28d"): (
        LONG_DAYS,
        lambda tiles: _ratio(_total(tiles, "completions"), _total(tiles, "views")),
    ),
    ("preferences", "minutes_per_view_28d"): (
        LONG_DAYS,
        lambda tiles: _ratio(_total(tiles, "watch_seconds"), 60 * _total(tiles, "views")),
    ),
    ("preferences", "last_event_at"): (LONG_DAYS, _last_event),
}


def explain_attribute(
    engine: EngineConnection,
    profiles: ProfileClient,
    viewer_id: int,
    attribute: str,
    *,
    now: datetime | None = None,
    expiry_spread_seconds: int = 0,
) -> Explanation:
    """Set a served attribute beside the same number computed from the engine's tiles at `now` (UTC).

    `attribute` is a name of the contract (`watch_minutes_7d`); one that several domains have needs its domain
    (`watch.last_event_at`). `expiry_spread_seconds` is the platform's setting.

    Raises WhyError for an unknown or ambiguous attribute and for relations that are missing; the errors of
    ProfileClient for a viewer id that is none or a table that cannot be read.
    """
    moment = checked_now(now)
    domain, name = _resolve(profiles, attribute)
    source = _SOURCES[domain]
    days, compute = _DEFINITIONS[(domain, name)]
    spread = timedelta(seconds=abs(viewer_id) % expiry_spread_seconds if expiry_spread_seconds else 0)
    today = (moment - spread).astimezone(UTC).date()
    profile = profiles.get(viewer_id, [domain], consistent=True)
    read = profile.reads[domain]
    online = getattr(profile.domain(domain), name) if read.state == "found" else None
    tiles, events = _read(engine, source, viewer_id, today - timedelta(days=LONG_DAYS))
    start = today - timedelta(days=days)
    in_view = bool(tiles)
    recomputed = compute([tile for tile in tiles if tile[source.day] >= start]) if in_view else None
    # An item exists exactly while the long window has a tile, whatever the attribute's own window.
    equal = online == recomputed and (read.state == "found") == in_view
    return Explanation(
        viewer_id=viewer_id,
        domain=domain,
        attribute=name,
        window_start=start,
        window_days=days,
        online=online,
        online_state=read.state,
        online_error=None if read.error is None else str(read.error),
        recomputed=recomputed,
        in_view=in_view,
        equal=equal,
        tiles=tuple(tile for tile in tiles if tile[source.day] >= start),
        events=events,
    )


def _resolve(profiles: ProfileClient, attribute: str) -> tuple[str, str]:
    domains = {domain.name: domain for domain in profiles.contract.domains.values()}
    given, _, name = attribute.rpartition(".")
    found = [
        domain
        for domain, declared in domains.items()
        if name in declared.attributes and given in ("", domain)
    ]
    if len(found) == 1:
        return found[0], name
    if found:
        choices = ", ".join(f"{domain}.{name}" for domain in found)
        raise WhyError(f"{name} is an attribute of several domains: say which, {choices}")
    known = ", ".join(
        f"{domain}.{name}" for domain, declared in domains.items() for name in declared.attributes
    )
    raise WhyError(f"unknown attribute {attribute!r}: the contract has {known}")


def _read(
    engine: EngineConnection, source: _Source, viewer_id: int, start: date
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    tile_columns = (source.day, *source.columns)
    tiles = sql.SQL("select {} from {} where viewer_id = %s and {} >= %s order by {} desc").format(
        _columns(tile_columns),
        sql.Identifier(engine.schema, source.tiles),
        sql.Identifier(source.day),
        sql.Identifier(source.day),
    )
    events = sql.SQL("select {} from {} where viewer_id = %s order by {} desc limit {}").format(
        _columns(source.event_columns),
        sql.Identifier(engine.schema, source.events),
        sql.Identifier(source.event_time),
        sql.Literal(LATEST_EVENTS),
    )
    with engine.connect() as connection:
        try:
            tile_rows = connection.execute(tiles, [viewer_id, start]).fetchall()
            event_rows = connection.execute(events, [viewer_id]).fetchall()
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise WhyError(f"the tiles cannot be read ({reason}): run `dbt build`") from None
    return (
        tuple(dict(zip(tile_columns, row, strict=True)) for row in tile_rows),
        tuple(dict(zip(source.event_columns, row, strict=True)) for row in event_rows),
    )


def _columns(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))
