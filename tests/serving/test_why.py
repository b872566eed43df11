"""Served numbers beside the same numbers from the tiles."""

from __future__ import annotations

import json
import re
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from declared import COURSES, PROJECT
from personal_data import marked
from shipped import LONG, REGISTRY, SHORT

from dagster_prefs.declarations.lineage import load_lineage
from dagster_prefs.declarations.masking import MASK
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.serving import ClientOptions, ProfileClient
from dagster_prefs.serving.why import (
    ViewExplanation,
    WhyError,
    explain_attribute,
    explain_view,
    window_days,
)

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
    for tile in REGISTRY.tiles.values():
        for name, column in tile.columns.items():
            # What somebody has added to the example's tiles is NULL here.
            shop.execute(f"alter table {tile.relation} add column if not exists {name} {column.type}")
    shop.insert(
        "viewer_watch_metrics_1d",
        (1, day(1), 100, 0, 3, 2, 1, 2, at(1)),
        (1, day(SHORT), 50, 0, 1, 1, 0, 1, at(SHORT)),
        (1, day(SHORT + 1), 1000, 0, 9, 9, 4, 5, at(SHORT + 1)),
        (1, day(LONG), 7, 0, 1, 1, 1, 1, at(LONG)),
        (1, day(LONG + 1), 9999, 0, 9, 9, 9, 9, at(LONG + 1)),
        (2, day(1), 8888, 0, 9, 9, 9, 9, at(1)),
    )
    shop.insert(
        "viewer_genre_metrics_1d",
        (1, day(1), "news", 60, 2, 1, at(1)),
        (1, day(1), "drama", 40, 1, 0, at(1)),
        (1, day(8), "drama", 20, 1, 1, at(8)),
        (1, day(LONG + 1), "sport", 9999, 9, 9, at(LONG + 1)),
    )
    shop.insert("viewer_interactions_1d", (1, day(3), 1, 2, 3, at(3)), (1, day(LONG), 10, 20, 30, at(LONG)))
    shop.insert(
        "view_events",
        *[(f"e{n}", 1, f"c{n}", "news", n, Decimal("0.5"), at(n)) for n in range(12)],
        ("x", 2) + (None,) * 4 + (at(0),),
    )
    shop.insert("content_interactions", ("i1", 1, "like", at(3)))
    return shop


EXPECTED: dict[str, Any] = {
    f"watch_minutes_{SHORT}d": Decimal("2.5"),
    f"watch_minutes_{LONG}d": Decimal("19.283333"),
    f"titles_{SHORT}d": 3,
    f"completions_{LONG}d": 6,
    f"genres_watched_{LONG}d": 9,
    "watch.last_event_at": int((at(1) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1) + 500)
    // 1000,
    f"likes_{LONG}d": 11,
    f"shares_{LONG}d": 22,
    f"searches_{LONG}d": 33,
    # 60 seconds each; the tie goes by name.
    "favorite_genre": "drama",
    "favorite_genres": ["drama", "news"],
    "favorite_genre_shares": [Decimal("0.5"), Decimal("0.5")],
    f"completion_rate_{LONG}d": Decimal("0.5"),
    f"minutes_per_view_{LONG}d": Decimal("0.5"),
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
        (rows,) = entry.tiles.values()
        newest = [tile["last_event_at"] for tile in rows]
        assert newest == sorted(newest, reverse=True)
        assert len(newest) > 0
        assert entry.window_start == day(entry.window_days)
        assert json.dumps(entry.as_dict(), default=str)


def test_a_difference_shows(tiles: Any, online: Any) -> None:
    online.put("interactions", 1, [11, 22, 34, 5])
    with online.reader("lean") as client:
        found = explain_attribute(tiles.engine, client, 1, f"searches_{LONG}d", now=NOW)
        missing = explain_attribute(tiles.engine, client, 1, f"titles_{SHORT}d", now=NOW)
        left = explain_attribute(tiles.engine, client, 1, f"searches_{LONG}d", now=NOW + timedelta(days=60))
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
        found = explain_attribute(tiles.engine, client, 1, f"watch_minutes_{SHORT}d", now=NOW)
    assert {topic: [event["event_id"] for event in rows] for topic, rows in found.events.items()} == {
        "view_events": [f"e{n}" for n in range(10)],
        "content_interactions": ["i1"],
    }


def test_personal_values_are_compared_and_then_masked(
    tiles: Any, online: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_values(online)
    with online.reader("lean") as client:
        monkeypatch.setattr(client, "registry", marked(registry, view_events__genre=True))
        found = explain_attribute(tiles.engine, client, 1, "favorite_genre", now=NOW)
        plain = explain_attribute(tiles.engine, client, 1, f"titles_{SHORT}d", now=NOW)
    assert (found.online, found.recomputed, found.equal) == (MASK, MASK, True)
    assert {tile["genre"] for rows in found.tiles.values() for tile in rows} == {MASK}
    assert {event["genre"] for event in found.events["view_events"]} == {MASK}
    assert {event["viewer_id"] for event in plain.events["view_events"]} == {1}
    assert plain.online == 3


def test_the_expiry_spread_moves_the_window(tiles: Any, online: Any) -> None:
    with online.reader("lean") as client:
        # Viewer 1 rolls over one second after midnight, and it is half past.
        same = explain_attribute(
            tiles.engine, client, 1, f"titles_{SHORT}d", now=NOW, expiry_spread_seconds=3600
        )
        early = NOW.replace(minute=0)
        still = explain_attribute(
            tiles.engine, client, 1, f"titles_{SHORT}d", now=early, expiry_spread_seconds=3600
        )
    assert (same.window_start, still.window_start) == (day(SHORT), day(SHORT + 1))
    assert (same.recomputed, still.recomputed) == (3, 12)


@pytest.mark.parametrize("project", [PROJECT, COURSES])
def test_the_window_of_an_attribute_is_that_of_its_view(project: Path) -> None:
    """Where a name says days, the view's query says the same; found through whatever stands in between."""
    registry = load_registry(project)
    found = {
        f"{domain.name}.{name}": window_days(registry, domain, name)
        for domain in registry.contract.domains.values()
        for name in domain.attributes
    }
    for name, days in found.items():
        if named := re.search(r"_([0-9]+)d$", name):
            assert days == int(named[1]), name
    assert found.get("progress.favorite_subjects") is None
    assert found.get("preferences.favorite_genres", LONG) == LONG


def test_a_foreign_project_is_explained(shop: Any, dynamodb_endpoint: str, courses: Registry) -> None:
    shop.execute(
        "create table learner_lessons_1d (learner_id text, lesson_date date, lessons bigint, seconds bigint,"
        " finishes bigint, last_event_at timestamptz);"
        " create table lesson_events (event_id text, learner_id text, event_type text, lesson_id text, subject text,"
        " seconds int, happened_at timestamptz)"
    )
    learner = "o'neil %s"
    shop.insert(
        "learner_lessons_1d",
        (learner, day(1), 2, 90, 1, at(1)),
        (learner, day(8), 5, 30, 1, at(8)),
        ("other", day(1), 100, 100, 1, at(1)),
    )
    shop.insert(
        "lesson_events",
        ("e1", learner, "started", "1", "sql", 90, at(1)),
        ("e2", learner, "started", "2", "go", 120, at(8)),
        ("e3", "other", "started", "3", "c", 900, at(1)),
    )
    client = dynamodb_client(dynamodb_endpoint, "eu-central-1")
    prefix = f"why_{uuid.uuid4().hex[:12]}_"
    table = provision(client, courses.contract, prefix=prefix)["learner"]
    domain = courses.contract.domain("progress")
    item = ItemEncoder(courses.contract, domain).encode(learner, [2, Decimal("2"), ["go", "sql"], 5])
    client.put_item(TableName=table.name, Item=item)
    try:
        with ProfileClient(
            courses,
            endpoint_url=dynamodb_endpoint,
            region="eu-central-1",
            table_prefix=prefix,
            options=ClientOptions(30),
        ) as profiles:
            lessons, minutes, subjects = (
                explain_attribute(shop.engine, profiles, learner, name, now=NOW, expiry_spread_seconds=spread)
                for name, spread in (("lessons_7d", 0), ("minutes_28d", 60), ("favorite_subjects", 0))
            )
    finally:
        client.delete_table(TableName=table.name)
    assert (lessons.online, lessons.recomputed, lessons.equal, lessons.window_days) == (2, 2, True, 7)
    assert [row["lessons"] for row in lessons.tiles["learner_lessons_1d"]] == [2]
    assert (minutes.online, minutes.recomputed, minutes.equal) == (Decimal("2"), Decimal("2"), True)
    assert (subjects.recomputed, subjects.equal, subjects.window_days) == (["go", "sql"], True, None)
    assert [event["event_id"] for event in subjects.events["lesson_events"]] == ["e1", "e2"]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("minutes", "unknown attribute 'minutes': the contract has"),
        (f"interactions.titles_{SHORT}d", "unknown attribute"),
        ("last_event_at", r"several domains: name one of interactions\.last_event_at"),
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
        explain_attribute(shop.engine, client, 1, f"titles_{SHORT}d")


def test_the_rows_of_a_preference_view_are_recomputed_from_its_events(shop: Any) -> None:
    lineage = load_lineage(PROJECT, REGISTRY)
    shop.execute(
        "create table user_events (event_id text, user_id text, item_id text, brand text, category text, price numeric,"
        " event_type text, session_id text, event_time timestamptz);"
        " create table user_category_affinity_decayed (user_id text, category text, decayed_weight double precision,"
        " last_engaged_at timestamptz)"
    )
    affinity = lineage.queries["user_category_affinity_now"]
    shop.execute(f"create view user_category_affinity_now as {affinity}")
    shop.insert(
        "user_events",
        ("e1", "ada", "i1", "orbit", "lamp", 20, "view", "s", at(1)),
        ("e2", "ada", "i1", "orbit", "lamp", 20, "purchase", "s", at(0)),
        ("e3", "ada", "i2", None, "sofa", 120, "view", "s", at(2)),
        ("e4", "bob", "i9", "orbit", "lamp", 900, "purchase", "s", at(0)),
    )
    shop.insert("user_category_profile", ("ada", "lamp", 11, 1, at(0)), ("ada", "sofa", 9, 1, at(2)))
    shop.insert("user_price_sensitivity", ("ada", "budget", 1, 1, 1), ("ada", "premium", 1, 0, 0))
    shop.insert("user_category_affinity_decayed", ("ada", "lamp", 3.5, at(0)), ("bob", "sofa", 1, at(0)))

    def explain(name: str) -> ViewExplanation:
        return explain_view(shop.engine, REGISTRY, lineage, "ada", name)

    found = explain("user_category_profile.affinity_score")
    assert [row["affinity_score"] for row in found.served] == [11, 9]
    assert found.recomputed is not None
    assert [row["affinity_score"] for row in found.recomputed] == [11, 1]
    assert [row["category"] for row in found.recomputed] == ["lamp", "sofa"]
    assert (found.equal, found.reason) == (False, "")
    assert [event["event_id"] for event in found.events["user_events"]] == ["e2", "e1", "e3"]
    # Its query is in the lineage only.
    assert explain("user_price_sensitivity.conversion_rate").equal is True
    # What reads the clock is computed for the same moment.
    decayed = explain("user_category_affinity_now.affinity_score")
    assert (len(decayed.served), decayed.equal) == (1, True)
    assert json.loads(json.dumps(found.as_dict(), default=str))["relation"] == "user_category_profile"
    with pytest.raises(
        WhyError, match=r"unknown column 'user_category_profile\.score': the preference views have"
    ):
        explain("user_category_profile.score")
    shop.execute("drop table user_events cascade")
    with pytest.raises(WhyError, match=r"user_brand_profile cannot be read .*: run `prefs apply`"):
        explain("user_brand_profile.brand")
