"""What the pages show, as plain functions: events, scores, histories, ways; no browser and no engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, get_args

import pytest

from dagster_prefs.access import AccessError
from dagster_prefs.console import history
from dagster_prefs.console.app import PAGES, make_app, needed_right
from dagster_prefs.console.context import Console, ReadOnly
from dagster_prefs.console.events import EventError, Sent, asked_fields, compose_event, topics_about
from dagster_prefs.console.history import Counts, History, Line, Watcher, sparkline, topics_of_measures
from dagster_prefs.console.lake_readings import ChildReading, LakeReadings
from dagster_prefs.console.runbook_page import FILE, paragraphs
from dagster_prefs.console.shop import moves, reason, score_parts, shop_of
from dagster_prefs.console.viewers_page import shown_entities
from dagster_prefs.console.way import Way
from dagster_prefs.console.why_page import attributes_of
from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.events.raw import Place
from dagster_prefs.freshness.levels import Measure, Stage
from dagster_prefs.freshness.status import Status
from dagster_prefs.live.trail import Trail
from dagster_prefs.serving.preferences import Components, RankedItem, Ranking, RankingParameters
from dagster_prefs.settings import Settings, SettingsError, load_settings
from dagster_prefs.values.statistics import Statistics

NOW = datetime(2026, 3, 15, 12, 30, tzinfo=UTC)

# --- pages follow from the registry ---


def test_each_project_has_the_pages_of_what_it_declares(registry: Registry, courses: Registry) -> None:
    def paths(found: Registry) -> list[str]:
        return [page.path for page in PAGES if page.exists(found)]

    assert paths(registry) == ["/shop", "/viewers", "/pipeline", "/catalog", "/why", "/runbook"]
    assert paths(courses) == ["/viewers", "/pipeline", "/catalog", "/why", "/runbook"]
    assert [entity.name for entity in shown_entities(courses)] == ["learner"]
    assert attributes_of(courses, courses.entity("learner"))[:2] == [
        "progress.lessons_7d",
        "progress.minutes_28d",
    ]
    # Of a person of the shop every column of every preference view, of a viewer every attribute of every domain.
    assert "user_category_profile.affinity_score" in attributes_of(registry, registry.entity("shop_user"))
    assert "preferences.favorite_genres" in attributes_of(registry, registry.entity("viewer"))


def test_a_path_needs_the_right_of_its_page() -> None:
    assert needed_right(PAGES, "/shop") == "shop"
    assert needed_right(PAGES, "/viewers/x") == "domains"
    assert needed_right(PAGES, "/shopping") is None
    assert needed_right(PAGES, "/_nicegui_ws/socket.io") is None


# --- events ---


def test_an_event_of_a_foreign_project_is_composed_from_its_declaration(courses: Registry) -> None:
    (learner,) = shown_entities(courses)
    (topic,) = topics_about(courses, learner)
    assert [field.name for field in asked_fields(topic, learner)] == [
        "event_type",
        "lesson_id",
        "subject",
        "seconds",
    ]
    given = {"event_type": "started", "subject": "", "seconds": "60", "lesson_id": None}
    message = json.loads(compose_event(courses, topic, learner, "Zoë / 7", given, NOW))
    assert message.pop("event_id").startswith("console-")
    assert message == {
        "learner_id": "Zoë / 7",
        "event_type": "started",
        "seconds": "60",
        "happened_at": NOW.isoformat(),
    }


@pytest.mark.parametrize(
    ("id_", "given", "says"),
    [
        ("ana", {"event_type": "danced"}, "unknown event_type"),
        ("ana", {"event_type": "started", "seconds": "-1"}, "negative seconds"),
        ("canary:1", {"event_type": "started"}, "reserved learner_id"),
        ("ana", {"event_type": "started", "colour": "red"}, "has no field colour"),
    ],
)
def test_an_event_that_would_be_rejected_is_not_sent(
    courses: Registry, id_: str, given: dict[str, Any], says: str
) -> None:
    (learner,) = shown_entities(courses)
    (topic,) = topics_about(courses, learner)
    with pytest.raises(EventError, match=says):
        compose_event(courses, topic, learner, id_, given, NOW)


# --- the shop ---

ITEM = RankedItem(
    "i1", "Lamp", "home", "lumen", Decimal("19.90"), "budget", Decimal("7.1"), Decimal("3.44"),
    Components(Decimal(10), Decimal(7), Decimal("0.0333333"), 1),
)  # fmt: skip


@pytest.mark.parametrize("active", [True, False])
def test_the_parts_of_a_score_add_up_to_it(active: bool) -> None:
    lifetime = Decimal("0.4") * 10 + Decimal("0.3") * 7 + Decimal("0.3") * 100 * Decimal("0.0333333")
    score = Decimal("0.6") * 1 + Decimal("0.4") * lifetime if active else lifetime
    item = replace(ITEM, combined_personalization_score=score)
    ranking = Ranking("u", (item,), active, Decimal(600), RankingParameters())
    parts = score_parts(item, ranking)
    assert sum(parts.values()) == item.score
    assert (parts["session"] > 0) == active
    assert reason(item, parts).startswith("category home ")
    assert ("session home 0.60" in reason(item, parts)) == active


def test_what_a_click_sends_has_the_fields_of_its_item(registry: Registry) -> None:
    shop = shop_of(registry)
    assert shop is not None
    assert set(shop.actions) == {"view", "wishlist", "add_to_cart", "purchase"}
    values = shop.values("wishlist", ITEM, "console-1")
    message = json.loads(compose_event(registry, shop.topic, shop.entity, "new-1", values, NOW))
    assert {
        name: message[name] for name in ("item_id", "category", "brand", "price", "event_type", "session_id")
    } == {
        "item_id": "i1",
        "category": "home",
        "brand": "lumen",
        "price": "19.90",
        "event_type": "wishlist",
        "session_id": "console-1",
    }


def test_a_shop_is_found_only_where_items_are_ranked(courses: Registry, registry: Registry) -> None:
    assert shop_of(courses) is None
    without = {name: view for name, view in registry.preferences.items() if name != "user_recent_activity"}
    assert shop_of(replace(registry, preferences=without)) is None


def test_a_ranking_says_what_rose() -> None:
    first, second, third = (replace(ITEM, item_id=name) for name in "abc")
    before = Ranking("u", (first, second), False, None, RankingParameters())
    after = Ranking("u", (third, second, first), False, None, RankingParameters())
    assert moves(before, after) == {"b": 0, "a": -2}
    assert moves(None, after) == {}


# --- the last hour ---


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def status(lag: float, level: Any = "ok") -> Status:
    target = Freshness(2, 5)
    measures = (
        Measure(
            "views",
            "lesson_events",
            level,
            "because",
            lag,
            target,
            {"newest_arrival_at": NOW.timestamp() - 90},
        ),
        Measure("canary", "progress", "ok", "fine", 0.2, target),
        Measure("offline", "lessons", "ok", "fine", 0.0, target, notes={"newest_day": "2026-03-14"}),
    )
    return Status(NOW, 0.1, measures)


def test_a_line_has_rate_lag_rejected_target_and_the_last_hour(courses: Registry) -> None:
    clock = Clock()
    kept = History(clock)
    kept.add(status(0.5), {"lesson_events": Counts(100, 3)}, NOW.timestamp() - 4)
    clock.now += 20
    kept.add(status(7.0, "error"), {"lesson_events": Counts(160, 5)}, NOW.timestamp() - 4)
    views, canary, export = kept.lines(topics_of_measures(courses), NOW)
    assert (views.rate, views.rejected, views.lag_seconds, views.target_seconds) == (3.0, 2, 7.0, 5)
    assert views.lags == ((20.0, 0.5), (0.0, 7.0))
    assert views.is_bad
    assert (views.last, canary.last, export.last) == (
        "event 90.0 s ago",
        "probe 4.0 s ago",
        "export of 2026-03-14",
    )
    assert (canary.rate, canary.rejected) == (None, None)


def test_an_hour_is_bounded_and_keeps_the_worst_of_each_point(courses: Registry) -> None:
    clock = Clock()
    kept = History(clock)
    for second in range(0, 3 * 3600, 5):
        clock.now += 5
        kept.add(status(9.0 if second == 3 * 3600 - 100 else 0.1), {"lesson_events": Counts(second, 0)})
    line = kept.lines(topics_of_measures(courses), NOW)[0]
    assert history.POINTS - 2 <= len(line.lags) <= history.POINTS
    assert max(ago for ago, _ in line.lags) <= history.HOUR_SECONDS
    assert max(value for _, value in line.lags) == 9.0
    assert line.rate == pytest.approx(1.0)
    for number in range(2 * history.MOST_SERIES):
        history._series(kept._lags, str(number))
    assert len(kept._lags) == history.MOST_SERIES


def test_a_sparkline_is_numbers_and_its_target() -> None:
    line = Line("views", "<b>", "ok", "<i>", 1.0, 0.1, 5.0, 0, "", ((3600.0, 0.0), (0.0, 5.0)))
    drawn = sparkline(line)
    assert 'points="0.0,24.0 120.0,2.0"' in drawn
    assert "stroke-dasharray" in drawn
    assert "<b>" not in drawn
    assert sparkline(replace(line, lags=line.lags[:1])) == ""


def test_it_reads_rarely_while_nobody_looks() -> None:
    watcher = Watcher(None)  # type: ignore[arg-type] # nothing is read
    assert watcher.pause_seconds(0.01) == history.IDLE_SECONDS
    assert watcher.pause_seconds(1.0) == 1.0 / history.IDLE_SHARE
    assert watcher.pause_seconds(60.0) == history.LONGEST_SECONDS
    watcher.look()
    assert watcher.pause_seconds(60.0) == history.LOOKED_SECONDS


def test_every_stage_has_its_paragraph() -> None:
    told = paragraphs(FILE.read_text())
    assert set(told) == set(get_args(Stage))
    assert all(title and body for title, body in told.values())


def test_the_lake_is_read_by_processes_of_their_own(courses: Registry) -> None:
    clock = Clock()
    measure = {"stage": "offline", "name": "lessons", "level": "warn", "reason": "late", "lag_seconds": 3.0,
               "thresholds": {"warn_seconds": 1, "error_seconds": 9}, "values": {}, "notes": {}}  # fmt: skip
    drifted = {**measure, "stage": "drift", "name": "lesson_events", "thresholds": None}
    minutes = Statistics(
        "view", "progress_rolling", NOW.date(), "minutes", "number", 40, 20, 5, 3, "", NOW, 1.0, 9.0, 4.0,
        (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    )  # fmt: skip

    def told(answer: object) -> ChildReading:
        return ChildReading([sys.executable, "-c", f"print({json.dumps(answer)!r})"], clock)

    status = told({"measures": [measure, {**measure, "stage": "views"}, drifted]})
    statistics = told({"progress_rolling": {"minutes": minutes.as_dict()}})
    lake = LakeReadings(lambda: courses, status=status, statistics=statistics)
    (found,) = lake.exports(NOW)
    assert [one.key for one in lake.drift(NOW)] == ["drift/lesson_events"]
    assert (found.name, found.level, found.thresholds) == ("lessons", "warn", Freshness(1, 9))
    assert lake.statistics() == {"progress_rolling": {"minutes": minutes}}
    status.command = statistics.command = [sys.executable, "-c", "1/0"]
    assert lake.exports(NOW) == [found], "it is kept for a while"
    clock.now += 601
    (unknown,) = lake.exports(NOW)
    assert (unknown.stage, unknown.level) == ("offline", "unknown")
    assert "prefs status --json" in unknown.reason
    assert lake.drift(NOW) == []
    assert lake.statistics() == {}


# --- the way of an event ---


def test_the_way_of_an_event_is_told_in_its_order(courses: Registry) -> None:
    topic = courses.topic("lesson_events")

    def later(milliseconds: int) -> datetime:
        return NOW + timedelta(milliseconds=milliseconds)

    sent = Sent(topic, Place("console:1", 0, 7), NOW)
    way = Way(sent, {"progress": {"lessons_7d": 1}}, {"progress": "learning#progress", "other": "x#other"})
    assert [(stop.what, stop.seconds) for stop in way.stops(followed=True)] == [
        ("sent", 0.0), ("arrival", None), ("commit", None),
    ]  # fmt: skip
    trail = Trail(later(5), 12, later(60), {"learning#progress": later(90), "x#other": later(95)})
    way = replace(way, trail=trail, read_at={"progress": later(120)})
    told = [(stop.what, stop.where, stop.seconds) for stop in way.stops(followed=True)]
    assert told == [
        ("sent", "lesson_events", 0.0),
        ("arrival", "raw_lesson_events at console:1, 0, 7", 0.005),
        ("commit", "step 12", 0.06),
        ("publish", "progress", 0.09),
        ("read", "progress", 0.12),
    ]
    assert not way.is_over(later(5000)), "the other domain was published and not read"
    assert way.is_over(later(31_000))
    by_kafka = replace(way, sent=replace(sent, place=None), trail=Trail())
    assert [stop.what for stop in by_kafka.stops(followed=False)] == [
        "sent",
        "arrival, commit, publish",
        "read",
    ]


# --- what may be sent, and where it may be served ---


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    def given(**variables: str) -> Settings:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load_settings()

    return given


def never() -> Status:
    raise AssertionError("nothing is read")


def test_production_refuses_the_switch(settings: Callable[..., Settings]) -> None:
    with pytest.raises(
        SettingsError, match=r"PREFS_CONSOLE_SEND=on is refused in production.*AWS_ENDPOINT_URL"
    ):
        settings(PREFS_CONSOLE_SEND="on", PREFS_ENGINE="risingwave")
    with pytest.raises(SettingsError, match="PREFS_PROVISIONING is verify"):
        settings(PREFS_CONSOLE_SEND="on", PREFS_ENGINE="local", PREFS_PROVISIONING="verify")


@pytest.mark.parametrize(
    ("variables", "demo", "says"),
    [
        ({}, True, None),
        ({}, False, "holds no demo events"),
        ({"PREFS_CONSOLE_SEND": "on"}, False, None),
        ({"PREFS_CONSOLE_SEND": "off"}, True, "PREFS_CONSOLE_SEND is off"),
        ({"PREFS_PROVISIONING": "verify"}, True, "in production"),
        ({"PREFS_ENGINE": "risingwave"}, True, "in production"),
        (
            {"PREFS_ENGINE": "risingwave", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            True,
            "holds no demo events",
        ),
    ],
)
def test_it_is_read_only_unless_it_is_the_demo(
    settings: Callable[..., Settings], variables: dict[str, str], demo: bool, says: str | None
) -> None:
    console = Console(settings(**variables), read_status=never, is_demo=lambda: demo)
    if says is None:
        console.check_sending()
    else:
        with pytest.raises(ReadOnly, match=says):
            console.check_sending()
    console.close()


def test_off_loopback_it_does_not_start_without_a_token(settings: Callable[..., Settings]) -> None:
    console = Console(settings(), read_status=never)
    with pytest.raises(AccessError, match=r"--host 0\.0\.0\.0 is not loopback.*PREFS_TOKENS"):
        make_app(console, host="0.0.0.0", port=1)
    console.close()
