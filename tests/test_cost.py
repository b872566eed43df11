"""The cost model by itself: known cases, its limits, and what it refuses. tests/dbt holds it against a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from declared import COURSES, PROJECT
from shipped import LONG, SHORT

from dagster_prefs.cli import cli
from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.tools.cost import (
    Capacities,
    CostError,
    DomainLoad,
    Prices,
    Shape,
    TileLoad,
    Workload,
    engine_rows,
    estimate,
    event_writes,
    expiry_writes,
    overrides,
    project_shape,
    rows_kept,
    scale_table_of,
    served_entity,
    tile_rows,
    topic_shares,
    uniform_shape,
)

SCALE = Path(__file__).parents[1] / "docs" / "scale.md"
REGISTRY = load_registry(PROJECT)
VIEWER = REGISTRY.entity("viewer")
SHARES = {"view_events": 0.9, "content_interactions": 0.1}
WATCH = DomainLoad("watch", 150.0, (7, 28), frozenset({"view_events"}))
PLAIN = Workload(1_000_000, 10_000_000, SHARES)


def shape(entities: int = PLAIN.entities) -> Shape:
    return project_shape(REGISTRY, VIEWER, entities)


def test_without_folding_every_event_is_a_put_of_each_domain_it_touches() -> None:
    found_shape = shape()
    fast = replace(PLAIN, refresh_seconds=0.001)
    # 9 of 10 events are views, 1 is an interaction.
    touched = {"view_events": 9_000_000, "content_interactions": 1_000_000}
    for domain in found_shape.domains:
        expected = sum(touched[topic] for topic in domain.topics)
        assert event_writes(fast, domain) == pytest.approx(expected, rel=1e-5), domain.name


def test_one_refresh_a_day_writes_every_active_viewer_once() -> None:
    daily = replace(PLAIN, refresh_seconds=86_400)
    assert event_writes(daily, WATCH) == pytest.approx(250_000)


def test_rarer_refreshes_never_write_more() -> None:
    pauses = (0.1, 1, 60, 3_600, 43_200, 86_400)
    writes = [event_writes(replace(PLAIN, refresh_seconds=pause), WATCH) for pause in pauses]
    assert writes == sorted(writes, reverse=True)


def test_known_shares() -> None:
    half = replace(PLAIN, daily_active_share=0.5)
    assert expiry_writes(half, WATCH) == pytest.approx(750_000)
    assert expiry_writes(half, replace(WATCH, windows=(28,))) == pytest.approx(500_000)
    assert rows_kept(half, replace(WATCH, windows=(1,))) == pytest.approx(750_000)
    everybody = replace(PLAIN, daily_active_share=1.0)
    assert expiry_writes(everybody, WATCH) == rows_kept(everybody, WATCH) == 1_000_000


def test_nobody_does_nothing() -> None:
    found = estimate(
        Workload(10, 0, SHARES, daily_active_share=0.0),
        shape(10),
        target_seconds=5,
    )
    assert (found.event_writes_per_day, found.burst_writes, found.items, found.write_units_per_day) == (
        0,
        0,
        0,
        0,
    )
    assert found.dollars["total"] == found.dollars["lake"]


def test_spreading_lowers_midnight_and_nothing_else() -> None:
    found_shape = shape()
    plain = estimate(PLAIN, found_shape, target_seconds=5)
    spread = estimate(replace(PLAIN, spread_seconds=3_600), found_shape, target_seconds=5)
    assert plain.burst_writes == spread.burst_writes
    assert plain.burst_per_second == pytest.approx(plain.burst_writes / 5, abs=1)
    assert spread.burst_per_second == pytest.approx(plain.burst_writes / 3_600, abs=1)
    assert plain.write_units_per_day == spread.write_units_per_day
    assert plain.dollars == spread.dollars
    # What it says is needed is enough, and a second less is not.
    needed = plain.needed_spread_seconds
    assert needed
    for seconds, enough in ((needed, True), (needed - 1, False)):
        limit = next(
            limit
            for limit in estimate(
                replace(PLAIN, spread_seconds=seconds), found_shape, target_seconds=5
            ).limits
            if "midnight" in limit.name
        )
        assert (limit.used <= 1) is enough


def test_raw_messages_may_go_before_what_was_read_from_them() -> None:
    found_shape = shape()
    all_of_them, a_month = (engine_rows(replace(PLAIN, raw_days=days), found_shape) for days in (None, 30))
    assert a_month.pop("raw events") == 30 * PLAIN.events_per_day
    assert all_of_them.pop("raw events") == 365 * PLAIN.events_per_day
    assert a_month == all_of_them


def test_units_are_whole_kilobytes() -> None:
    small, large = (uniform_shape(shape(1_000), 1, attributes) for attributes in (20, 40))
    assert small.domains[0].item_bytes < 1_024 < large.domains[0].item_bytes < 2_048
    reads = Workload(1_000, 1_000, SHARES, reads_per_day=1_000)
    once, twice = (estimate(reads, found, target_seconds=5) for found in (small, large))
    assert twice.write_units_per_day == pytest.approx(2 * once.write_units_per_day, abs=1)
    # Both fit in 4 KiB, and an eventually consistent read is half a unit.
    assert once.read_units_per_day == twice.read_units_per_day == 500


def test_a_fenced_writer_pays_twice_for_its_writes_alone() -> None:
    found_shape = shape()
    plain, fenced = (
        estimate(replace(PLAIN, fenced=fenced), found_shape, target_seconds=5) for fenced in (False, True)
    )
    assert fenced.write_units_per_day == pytest.approx(2 * plain.write_units_per_day, abs=1)
    assert fenced.event_writes_per_day == plain.event_writes_per_day
    assert fenced.dollars["table"] == plain.dollars["table"]


def test_dollars_follow_the_prices() -> None:
    found_shape = shape()
    found = estimate(PLAIN, found_shape, target_seconds=5)
    assert found.dollars["writes"] == (
        Decimal(found.write_units_per_day * 30) / 1_000_000 * Decimal("0.625")
    ).quantize(Decimal("0.01"))
    assert found.dollars["total"] == sum(amount for name, amount in found.dollars.items() if name != "total")
    free = Prices(*[Decimal(0)] * 6)
    assert set(estimate(PLAIN, found_shape, target_seconds=5, prices=free).dollars.values()) == {
        Decimal("0.00")
    }


def test_a_larger_quota_is_less_used() -> None:
    found_shape = shape()
    limits = [
        estimate(
            PLAIN, found_shape, target_seconds=5, capacities=Capacities(table_write_units=units)
        ).breaks_first.used
        for units in (40_000, 80_000)
    ]
    assert limits[0] == pytest.approx(2 * limits[1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"entities": 0}, "entities is 0: give 1 or more"),
        ({"events_per_day": -1}, "events_per_day is -1: give 0 or more"),
        ({"shares": {"view_events": 1.5}}, "view_events is 1.5: give a share from 0 to 1"),
        ({"shares": {"view_events": 0.5}}, "the shares of view_events add up to 0.5: they must add up to 1"),
        ({"shares": {}}, "the shares of no topic add up to 0: they must"),
        ({"daily_active_share": math.nan}, "daily_active_share is nan"),
        ({"peak_factor": 0.5}, "peak_factor is 0.5: give 1 or more"),
        ({"refresh_seconds": 0}, "refresh_seconds is 0: give more than 0"),
        ({"raw_days": 400}, r"raw_days is 400: give 1 to history_days \(365\)"),
        ({"spread_seconds": 86_400}, "spread_seconds is 86400: give 0 to 86399"),
        (
            {"events_per_day": 100_000},
            "90,000 events a day of view_events cannot make 250,000 entities active",
        ),
    ],
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CostError, match=named):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("million_write_units", "is not NAME=VALUE with one of the names million_write_units, "),
        ("gold=1", "is not NAME=VALUE"),
        ("table_gib_month=cheap", "table_gib_month is 'cheap', which is not a number"),
    ],
)
def test_a_price_that_is_none_is_refused(given: str, named: str) -> None:
    with pytest.raises(CostError, match=named):
        overrides([given], Prices)


def test_prices_and_capacities_have_a_domain() -> None:
    for price in ("-1", "NaN", "Infinity"):
        with pytest.raises(CostError, match="give US dollars, 0 or more"):
            Prices(**overrides([f"table_gib_month={price}"], Prices))
    with pytest.raises(CostError, match="table_write_units is 0: give 1 or more"):
        Capacities(**overrides(["table_write_units=0"], Capacities))


def test_the_command() -> None:
    runner = CliRunner()
    arguments = ["cost", "--entities", "1000", "--events-per-day", "5000", "--spread-seconds", "60"]
    shown = runner.invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "AWS list prices" in shown.output
    told = json.loads(runner.invoke(cli, [*arguments, "--json"]).output)
    expected = estimate(
        Workload(1_000, 5_000, SHARES, spread_seconds=60),
        shape(1_000),
        target_seconds=5,
    )
    assert told["write_units_per_day"] == expected.write_units_per_day
    assert told["dollars"]["total"] == str(expected.dollars["total"])
    dearer = runner.invoke(cli, [*arguments, "--json", "--price", "million_write_units=625"])
    assert Decimal(json.loads(dearer.output)["dollars"]["writes"]) > Decimal(told["dollars"]["writes"])
    uniform = json.loads(
        runner.invoke(cli, [*arguments, "--json", "--domains", "7", "--attributes", "3"]).output
    )
    assert len(uniform["item_bytes"]) == 7
    with pytest.raises(PrefsError, match="set --domains too"):
        runner.invoke(cli, [*arguments, "--attributes", "3"], catch_exceptions=False)


def test_a_project_says_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics, tiles, windows and domains come from what is declared, and the shares from the project or the caller."""
    courses = load_registry(COURSES)
    entity = served_entity(courses, None)
    found = project_shape(courses, entity, 1_000)
    (tile,), (domain,) = found.tiles, found.domains
    assert (tile.name, tile.topics) == ("learner_lessons_1d", {"lesson_events"})
    assert (tile.row_bytes, domain.item_bytes) == pytest.approx((18.8, 154))
    assert (domain.name, domain.windows, domain.topics) == ("progress", (7, 28), {"lesson_events"})
    workload = Workload(1_000, 4_000, topic_shares(courses, entity), daily_active_share=0.5)
    assert tile_rows(workload, found) == {"learner_lessons_1d": 500}
    watch = next(load for load in shape(1_000).domains if load.name == "watch")
    assert (watch.windows, watch.topics) == ((SHORT, LONG), {"view_events"})
    with pytest.raises(CostError, match="the entity nobody has no domain: give --entity with one of learner"):
        served_entity(courses, "nobody")
    with pytest.raises(CostError, match="view_events is no topic about learner: name lesson_events"):
        topic_shares(courses, entity, {"view_events": 1.0})
    typo = replace(REGISTRY, variables={"workload": {"rows_per_active_day": {"genre": 2}}})
    with pytest.raises(
        CostError, match="workload, rows_per_active_day: genre is not declared: name one of viewer_"
    ):
        project_shape(typo, VIEWER, 10)
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(COURSES))
    told = CliRunner().invoke(cli, ["cost", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["tile_rows_per_day"] == {"learner_lessons_1d": 250_000}


def test_shares_that_are_left_out_are_equal() -> None:
    assert topic_shares(REGISTRY, VIEWER) == SHARES
    assert topic_shares(REGISTRY, VIEWER, {"view_events": 0.7}) == pytest.approx(
        {"view_events": 0.7, "content_interactions": 0.3}
    )
    arguments = ["cost", "--json", "--share", "content_interactions=0.5"]
    told = json.loads(CliRunner().invoke(cli, arguments).output)
    assert told["workload"]["shares"] == {"view_events": 0.5, "content_interactions": 0.5}
    with pytest.raises(PrefsError, match=r"'views' is not TOPIC=SHARE: write e\.g\. views=0\.9"):
        CliRunner().invoke(cli, ["cost", "--share", "views"], catch_exceptions=False)


def cells_below(heading: str) -> list[list[str]]:
    """The rows of the documentation's table whose first column has this heading."""
    _, _, after = SCALE.read_text().partition(f"| {heading} |")
    rows = after.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_documents_table_follows_from_what_it_assumes() -> None:
    """The page states its own tiles and domains, so that a change of the example's models leaves it true."""
    tiles = tuple(
        TileLoad(name, frozenset({topic}), float(size), float(rows), float(distinct))
        for name, topic, size, rows, distinct in cells_below("tile")
    )
    domains = tuple(
        DomainLoad(name, float(size), tuple(map(int, windows.split(", "))), frozenset({topic}))
        for name, topic, windows, size in cells_below("domain")
    )
    assert len(tiles) == len(domains) == 3

    def assumed(viewers: int) -> Shape:
        more = 1 if viewers >= 100_000_000 else 0
        return Shape(tiles, tuple(replace(each, item_bytes=each.item_bytes + more) for each in domains))

    table = scale_table_of("viewer", assumed, SHARES, target_seconds=5)
    assert table in SCALE.read_text(), f"docs/scale.md: replace the table by\n{table}"


def test_the_table_of_a_project() -> None:
    """`prefs cost --table` prints what follows from the project's own shape."""
    table = scale_table_of("viewer", shape, SHARES, target_seconds=5)
    assert CliRunner().invoke(cli, ["cost", "--table"]).output.strip() == table
