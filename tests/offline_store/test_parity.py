from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from pyiceberg.catalog import Catalog
from shipped import COMPUTED, GENRE, INTERACTIONS, LONG, SHORT, WATCH

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.training.parity import ParityOptions, ParityReport, check_parity

from . import oracle
from .conftest import Tiles, genre, interactions, watch
from .training_world import FEATURES

NOW = datetime(2026, 3, 10, 6, tzinfo=UTC)
TODAY = NOW.date()


def days_ago(number: int) -> date:
    return TODAY - timedelta(days=number)


WATCHED = [
    watch(v, days_ago(n), 100 * v + n, views=3, started=2)
    for v in range(1, 6)
    for n in (0, 1, SHORT, SHORT + 1, LONG, LONG + 1)
]
BY_GENRE = [
    genre(v, days_ago(n), "abcdefg"[(v + n) % 7], 50 * v + n)
    for v in range(1, 5)
    for n in (0, 1, 2, 3, 9, LONG)
]
REACTED = [interactions(v, days_ago(n), v, n, 1) for v in (1, 2) for n in (0, 5, LONG + 2)] + [
    interactions(6, days_ago(40), 9, 9, 9)
]


def served() -> dict[int, dict[str, dict[str, Any]]]:
    """What an exact publisher would have written: the serving window is the training window plus today."""
    items: dict[int, dict[str, dict[str, Any]]] = {}
    for viewer in range(1, 7):
        day = TODAY

        # The oracle ends before its day, so tiles from that day on are shifted onto the eve, keys kept apart.
        def shift(rows: list[tuple[Any, ...]], day: date = day) -> list[tuple[Any, ...]]:
            return [(*row[:1], min(row[1], day - timedelta(days=1)), *row[2:]) for row in rows]

        values = oracle.features(
            viewer,
            datetime(day.year, day.month, day.day, tzinfo=UTC),
            shift(WATCHED),
            shift(BY_GENRE),
            shift(REACTED),
        )
        for domain, rows in (("watch", WATCHED), ("preferences", BY_GENRE), ("interactions", REACTED)):
            recent = [row for row in rows if row[0] == viewer and row[1] >= day - timedelta(days=LONG)]
            if recent:
                newest = max(row[-1] for row in recent)
                items.setdefault(viewer, {})[domain] = {name: values[name] for name in COMPUTED[domain]} | {
                    "last_event_at": int(newest.timestamp() * 1000)
                }
    return items


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The training tables, which every test only reads."""
    return open_catalog("sqlite", tmp_path_factory.mktemp("lake").as_uri())


@pytest.fixture(scope="module")
def template(
    embedded_server: EngineConfiguration, copied_database: Callable[..., Any], catalog: Catalog
) -> Iterator[EngineConfiguration]:
    """Everything in the engine; all but today and yesterday in the training tables."""
    with copied_database("parity_template", embedded_server.with_database("template1")) as engine:
        tiles = Tiles(engine)
        for spec, rows in ((WATCH, WATCHED), (GENRE, BY_GENRE), (INTERACTIONS, REACTED)):
            tiles.add(spec, rows)
            for day in sorted({row[1] for row in rows}):
                if day < days_ago(1):
                    assert export_day(engine, catalog, spec, day).status == "written"
        yield engine


@pytest.fixture
def filled(template: EngineConfiguration, copied_database: Callable[..., Any]) -> Iterator[Tiles]:
    """A copy of the engine for each test, which may add to it."""
    with copied_database("parity", template) as engine:
        yield Tiles(engine, made=True)


def check(
    tiles: Tiles, catalog: Catalog, items: dict[int, Any], now: datetime = NOW, **options: Any
) -> ParityReport:
    def read(viewers: Sequence[int]) -> dict[int, Any]:
        return {viewer: items[viewer] for viewer in viewers if viewer in items}

    return check_parity(
        tiles.engine,
        catalog,
        read,
        features=FEATURES,
        now=now,
        options=ParityOptions(**{"share": 1.0, "grace_seconds": 0, **options}),
    )


def test_what_is_served_exactly_passes(filled: Tiles, catalog: Catalog) -> None:
    report = check(filled, catalog, served())
    assert report.worst == ()
    assert report.passed
    assert report.subjects == 6
    assert report.engine_days[WATCH.name] == (days_ago(1), TODAY)
    assert {(item.domain, item.attribute): item.compared for item in report.attributes}[
        "watch", f"watch_minutes_{SHORT}d"
    ] == 5


def test_each_viewers_own_day_boundary_counts(filled: Tiles, catalog: Catalog) -> None:
    late = NOW.replace(hour=0, second=3)
    items = served()
    report = check(filled, catalog, items, now=late, spread_seconds=10, grace_seconds=-86_400)
    # At 3 s past midnight viewers 4 to 6 are still in yesterday's window, which reaches one day further back.
    wrong = {found.subject for found in report.worst if found.attribute == f"watch_minutes_{LONG}d"}
    assert wrong == {4, 5}


@pytest.mark.parametrize(
    ("domain", "attribute", "value"),
    [
        ("watch", f"watch_minutes_{SHORT}d", Decimal("1.5")),
        ("watch", "last_event_at", 5),
        ("interactions", f"likes_{LONG}d", 77),
        ("preferences", "favorite_genre", "zzz"),
        ("preferences", "favorite_genre_shares", []),
        ("preferences", f"completion_rate_{LONG}d", None),
    ],
)
def test_a_planted_corruption_is_found_and_named(
    filled: Tiles, catalog: Catalog, domain: str, attribute: str, value: Any
) -> None:
    items = copy.deepcopy(served())
    due = items[2][domain][attribute]
    items[2][domain][attribute] = value
    report = check(filled, catalog, items)
    assert not report.passed
    assert [(item.domain, item.attribute) for item in report.attributes if item.mismatched] == [
        (domain, attribute)
    ]
    found = report.worst[0]
    assert (found.subject, found.served, found.due) == (2, value, due)


def test_missing_and_extra_items_are_counted(filled: Tiles, catalog: Catalog) -> None:
    items = copy.deepcopy(served())
    del items[1]["watch"]
    items[6] = {"interactions": dict.fromkeys((*COMPUTED["interactions"], "last_event_at"), 9)}
    report = check(filled, catalog, items)
    assert report.missing == {"watch": 1, "interactions": 0, "preferences": 0}
    assert report.extra == {"watch": 0, "interactions": 1, "preferences": 0}
    assert not report.passed


def test_events_that_may_still_be_on_their_way_are_left_out(filled: Tiles, catalog: Catalog) -> None:
    report = check(filled, catalog, {}, grace_seconds=86_400)
    assert report.in_flight == 5 + 4 + 2
    assert report.passed


def test_the_sample_is_stable_and_smaller(filled: Tiles, catalog: Catalog) -> None:
    filled.add(WATCH, [watch(viewer, TODAY, 60) for viewer in range(1000, 1400)])
    seen: list[list[int]] = []

    def read(viewers: Sequence[int]) -> dict[int, Any]:
        seen.append(sorted(viewers))
        return {}

    for _ in range(2):
        check_parity(
            filled.engine,
            catalog,
            read,
            features=FEATURES,
            now=NOW,
            options=ParityOptions(0.25, grace_seconds=0),
        )
    assert seen[0] == seen[1]
    assert 50 < len(seen[0]) < 160


def test_an_event_between_two_milliseconds_is_rounded_as_the_view_does(
    filled: Tiles, catalog: Catalog
) -> None:
    row = watch(9, TODAY, 60)
    moment = row[-1].replace(microsecond=700)
    filled.add(WATCH, [(*row[:-1], moment)])
    whole = moment.replace(microsecond=1000)
    item = oracle.features(9, NOW + timedelta(days=1), [row], [], [])
    items = served() | {
        9: {
            "watch": {name: item[name] for name in COMPUTED["watch"]}
            | {"last_event_at": int(whole.timestamp() * 1000)}
        }
    }
    assert check(filled, catalog, items).worst == ()
