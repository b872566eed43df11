"""Served numbers beside the same numbers from the tiles."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from dagster_prefs.offline.windows import longest_window
from dagster_prefs.online.contract import load_contract
from dagster_prefs.serving.why import _DEFINITIONS, WhyError, explain_attribute

NOW = datetime(2026, 3, 10, 0, 30, tzinfo=UTC)
TODAY = date(2026, 3, 10)

DDL = """
create table viewer_watch_metrics_1d (
    viewer_id bigint, watch_date date, watch_seconds bigint, watch_time_minutes numeric, views bigint,
    content_started bigint, completions bigint, genres_watched bigint, last_event_at timestamptz
);
create table viewer_genre_metrics_1d (
    viewer_id bigint, watch_date date, genre text, watch_seconds bigint, views bigint, completions bigint,
    last_event_at timestamptz
);
create table viewer_interactions_1d (
    viewer_id bigint, interaction_date date, likes bigint, shares bigint, searches bigint,
    last_event_at timestamptz
);
create table view_events (
    event_id text, viewer_id bigint, content_id text, genre text, watch_duration_sec int,
    completion_pct numeric, watched_at timestamptz
);
create table content_interactions (event_id text, viewer_id bigint, event_type text, event_ts timestamptz);
"""


def day(back: int) -> date:
    return TODAY - timedelta(days=back)


def at(back: int) -> datetime:
    return datetime(2026, 3, 10, 12, 0, 0, 123_500, tzinfo=UTC) - timedelta(days=back)


@pytest.fixture
def tiles(shop: Any) -> Any:
    shop.execute(DDL)
    shop.insert(
        "viewer_watch_metrics_1d",
        (1, day(1), 100, 0, 3, 2, 1, 2, at(1)),
        (1, day(7), 50, 0, 1, 1, 0, 1, at(7)),
        (1, day(8), 1000, 0, 9, 9, 4, 5, at(8)),
        (1, day(28), 7, 0, 1, 1, 1, 1, at(28)),
        (1, day(29), 9999, 0, 9, 9, 9, 9, at(29)),
        (2, day(1), 8888, 0, 9, 9, 9, 9, at(1)),
    )
    shop.insert(
        "viewer_genre_metrics_1d",
        (1, day(1), "news", 60, 2, 1, at(1)),
        (1, day(1), "drama", 40, 1, 0, at(1)),
        (1, day(8), "drama", 20, 1, 1, at(8)),
        (1, day(29), "sport", 9999, 9, 9, at(29)),
    )
    shop.insert("viewer_interactions_1d", (1, day(3), 1, 2, 3, at(3)), (1, day(28), 10, 20, 30, at(28)))
    shop.insert(
        "view_events",
        *[(f"e{n}", 1, f"c{n}", "news", n, Decimal("0.5"), at(n)) for n in range(12)],
        ("x", 2) + (None,) * 4 + (at(0),),
    )
    shop.insert("content_interactions", ("i1", 1, "like", at(3)))
    return shop


EXPECTED: dict[str, Any] = {
    "watch_minutes_7d": Decimal("2.5"),
    "watch_minutes_28d": Decimal("19.283333"),
    "titles_7d": 3,
    "completions_28d": 6,
    "genres_watched_28d": 9,
    "watch.last_event_at": int((at(1) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1) + 500)
    // 1000,
    "likes_28d": 11,
    "shares_28d": 22,
    "searches_28d": 33,
    # 60 seconds each; the tie goes by name.
    "favorite_genre": "drama",
    "favorite_genres": ["drama", "news"],
    "favorite_genre_shares": [Decimal("0.5"), Decimal("0.5")],
    "completion_rate_28d": Decimal("0.5"),
    "minutes_per_view_28d": Decimal("0.5"),
}


def serve_values(online: Any) -> None:
    watch = [EXPECTED[name] for name in list(EXPECTED)[:6]]
    online.put("watch", 1, watch)
    online.put("interactions", 1, [11, 22, 33, 5])
    online.put("preferences", 1, [*list(EXPECTED.values())[9:14], 5])


def test_online_and_recomputed_side_by_side(tiles: Any, online: Any) -> None:
    serve_values(online)
    with online.reader("lean") as client:
        found = {name: explain_attribute(tiles.engine, client, 1, name, now=NOW) for name in EXPECTED}
    assert {name: entry.recomputed for name, entry in found.items()} == EXPECTED
    assert {name: entry.online for name, entry in found.items()} == EXPECTED
    for entry in found.values():
        assert entry.equal
        assert entry.in_view
        newest = [tile["last_event_at"] for tile in entry.tiles]
        assert newest == sorted(newest, reverse=True)
        assert entry.window_start == day(entry.window_days)
        assert json.dumps(entry.as_dict(), default=str)


def test_a_difference_shows(tiles: Any, online: Any) -> None:
    online.put("interactions", 1, [11, 22, 34, 5])
    with online.reader("lean") as client:
        found = explain_attribute(tiles.engine, client, 1, "searches_28d", now=NOW)
        missing = explain_attribute(tiles.engine, client, 1, "titles_7d", now=NOW)
        left = explain_attribute(tiles.engine, client, 1, "searches_28d", now=NOW + timedelta(days=60))
    assert (found.online, found.recomputed, found.equal) == (34, 33, False)
    assert (missing.online, missing.recomputed, missing.online_state, missing.equal) == (
        None,
        3,
        "cold_start",
        False,
    )
    # The viewer left the window, and the item is still there.
    assert (left.in_view, left.online, left.recomputed, left.equal) == (False, 34, None, False)


def test_the_latest_events_are_shown(tiles: Any, online: Any) -> None:
    with online.reader("lean") as client:
        found = explain_attribute(tiles.engine, client, 1, "watch_minutes_7d", now=NOW)
    assert [event["event_id"] for event in found.events] == [f"e{n}" for n in range(10)]


def test_the_expiry_spread_moves_the_window(tiles: Any, online: Any) -> None:
    with online.reader("lean") as client:
        # Viewer 1 rolls over one second after midnight, and it is half past.
        same = explain_attribute(tiles.engine, client, 1, "titles_7d", now=NOW, expiry_spread_seconds=3600)
        early = NOW.replace(minute=0)
        still = explain_attribute(tiles.engine, client, 1, "titles_7d", now=early, expiry_spread_seconds=3600)
    assert (same.window_start, still.window_start) == (day(7), day(8))
    assert (same.recomputed, still.recomputed) == (3, 12)


def test_every_attribute_of_the_contract_is_explained() -> None:
    declared = {
        (domain.name, attribute)
        for domain in load_contract().domains.values()
        for attribute in domain.attributes
    }
    assert set(_DEFINITIONS) == declared
    # The formulas are written twice on purpose; the windows must be those of the views all the same.
    assert max(days for days, _ in _DEFINITIONS.values()) == longest_window()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("minutes", "unknown attribute 'minutes': the contract has"),
        ("interactions.titles_7d", "unknown attribute"),
        ("last_event_at", r"several domains: say which, interactions\.last_event_at"),
    ],
)
def test_unclear_attributes_are_named(shop: Any, online: Any, attribute: str, message: str) -> None:
    with online.reader("lean") as client, pytest.raises(WhyError, match=message):
        explain_attribute(shop.engine, client, 1, attribute)


def test_missing_tiles_are_one_sentence(shop: Any, online: Any) -> None:
    with (
        online.reader("lean") as client,
        pytest.raises(WhyError, match=r"the tiles cannot be read .*: run `dbt build`"),
    ):
        explain_attribute(shop.engine, client, 1, "titles_7d")
