"""Drift fires on the first complete day on which data really drifted, and is silent on ordinary days."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from click.testing import CliRunner
from pyiceberg.catalog import Catalog
from shipped import GENRE, REGISTRY, WATCH
from tile_days import (
    MONDAY,
    NAMESPACE,
    Rows,
    at,
    days_from,
    export,
    genre_rows,
    lesson_rows,
    watch_rows,
)

from dagster_prefs.cli import cli
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.defs import values as definitions
from dagster_prefs.iceberg.tables import TileTable, tile_tables
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings
from dagster_prefs.values.collect import collect_tiles
from dagster_prefs.values.drift import (
    Cause,
    Limits,
    causes_on,
    judge,
    ks_by_chance,
    psi_by_chance,
    psi_of,
)
from dagster_prefs.values.store import read_statistics

DAYS = days_from(MONDAY, 60)
DRIFTED = DAYS[-1] + timedelta(days=1)
MORNING = at(DRIFTED)


def all_finished(day: date) -> Rows:
    return [{**row, "completions": row["views"]} for row in watch_rows(day)]


# Table → what its drifted day was made by; the warehouse is this module's.
NOW_THERE: dict[str, Callable[[date], Rows]] = {}

# Case → the rows of each table on the drifted day, and what is named then.
CASES: dict[str, tuple[dict[TileTable, Callable[[date], Rows]], str]] = {
    "minutes as seconds": (
        {WATCH: lambda day: watch_rows(day, unit=60)},
        "watch_seconds: PSI",
    ),
    "a genre that disappears": (
        {GENRE: lambda day: genre_rows(day, without="music")},
        "genre: music vanished",
    ),
    "a tenth of the traffic": ({WATCH: lambda day: watch_rows(day, viewers=42)}, "rows, "),
    "all completion 1.0": ({WATCH: all_finished}, "completions: PSI"),
}


def judged(catalog: Catalog, **changed: Any) -> list[Cause]:
    """Put the drifted day into the tables, ordinary where none is named, and judge it as the nightly job does."""
    for spec, ordinary in ((WATCH, watch_rows), (GENRE, genre_rows)):
        rows = changed.get(spec.name, ordinary)
        # An ordinary day that is there stays.
        if NOW_THERE.get(spec.name) is not rows:
            export(catalog, spec, [DRIFTED], rows)
            NOW_THERE[spec.name] = rows
    collect_tiles(catalog, REGISTRY, NAMESPACE, now=MORNING)
    return causes_on(catalog, REGISTRY, NAMESPACE)


def test_sixty_ordinary_days_are_silent(catalog: Catalog) -> None:
    found = read_statistics(catalog, NAMESPACE)
    for spec in (WATCH, GENRE):
        tile = REGISTRY.tiles[spec.tile]
        for place, day in enumerate(DAYS):
            one = judge(tile, day, found)
            assert one is not None
            # Two earlier days of its weekday are needed.
            assert one.level == ("learning" if place < 14 else "ok"), one.sentence
            assert len(one.before) == min(4, place // 7)


@pytest.mark.parametrize("case", CASES)
def test_drift_fires_on_its_first_complete_day_with_one_cause(catalog: Catalog, case: str) -> None:
    changes, named = CASES[case]
    (cause,) = judged(catalog, **{spec.name: rows for spec, rows in changes.items()})
    assert (cause.name, cause.level) == ("view_events", "error")
    assert named in cause.reason
    assert {one.day for one in cause.days} == {DRIFTED}
    # The other tile of the same events is as usual.
    drifted = [one.relation for one in cause.days if one.level == "error"]
    assert drifted == [spec.tile for spec in changes]


def test_an_ordinary_day_after_a_drifted_one_is_silent_again(catalog: Catalog) -> None:
    assert [cause.level for cause in judged(catalog)] == ["ok"]


def test_what_both_tiles_say_is_one_cause(catalog: Catalog) -> None:
    (cause,) = judged(
        catalog,
        **{
            WATCH.name: lambda day: watch_rows(day, unit=60),
            GENRE.name: lambda day: [
                {**row, "watch_seconds": row["watch_seconds"] // 60} for row in genre_rows(day)
            ],
        },
    )
    assert cause.level == "error"
    for tile in (WATCH.tile, GENRE.tile):
        assert f"{tile} on" in cause.reason


def test_a_day_without_any_traffic_is_an_error(catalog: Catalog) -> None:
    judged(catalog)
    quiet = DRIFTED + timedelta(days=1)
    now = at(quiet)
    collect_tiles(catalog, REGISTRY, NAMESPACE, now=now, empty={WATCH.tile: {quiet}})
    causes = causes_on(catalog, REGISTRY, NAMESPACE, day=quiet)
    assert [cause.level for cause in causes] == ["error"]
    assert "0 rows" in causes[0].reason
    # Where the engine does not say so, nothing is known of such a day.
    assert collect_tiles(catalog, REGISTRY, NAMESPACE, now=now).gone == ((WATCH.tile, quiet),)


def test_an_odd_day_among_the_earlier_ones_changes_nothing(catalog: Catalog) -> None:
    found = read_statistics(catalog, NAMESPACE, relation=WATCH.tile)
    tile = REGISTRY.tiles[WATCH.tile]
    last = DAYS[-1]
    # As if a week before everything had been sixty times larger.
    shifted = [
        replace(one, buckets=tuple((bound * 60, rows) for bound, rows in one.buckets))
        if one.day == last - timedelta(weeks=1)
        else one
        for one in found
    ]
    one = judge(tile, last, shifted)
    assert one is not None
    assert one.level == "ok", one.sentence


def test_the_foreign_project_is_judged_too(empty_catalog: Catalog, courses: Registry) -> None:
    (spec,) = tile_tables(courses).values()
    days = days_from(MONDAY, 22)
    export(empty_catalog, spec, days, lambda day: lesson_rows(day, unit=60 if day == days[-1] else 1))
    levels = []
    for last in days[-2:]:
        collect_tiles(empty_catalog, courses, NAMESPACE, now=at(last))
        (cause,) = causes_on(empty_catalog, courses, NAMESPACE, day=last)
        levels.append((cause.name, cause.level))
    assert levels == [("lesson_events", "ok"), ("lesson_events", "error")]


def test_limits_of_the_declaration_count(catalog: Catalog) -> None:
    judged(catalog, **{WATCH.name: all_finished})
    found = read_statistics(catalog, NAMESPACE, relation=WATCH.tile)
    tile = REGISTRY.tiles[WATCH.tile]

    def level(drift: Any, of_tile: Any = None) -> str | None:
        columns = {**tile.columns, "completions": replace(tile.columns["completions"], drift=drift)}
        one = judge(replace(tile, columns=columns, drift=of_tile), DRIFTED, found)
        return None if one is None else one.level

    assert level(None) == "error"
    assert level(False) == "ok"
    high = {"warn": 0.1, "error": 9}
    assert level({"psi": high, "ks": {"warn": 0.1, "error": 1}}) == "warn"
    assert level({"psi": {"warn": 8, "error": 9}, "ks": {"warn": 0.99, "error": 1}}) == "ok"
    assert level(None, False) is None
    assert level(None, {"min_rows": 10_000}) == "learning"


def test_the_index_and_its_chance() -> None:
    # Worked by hand: (0.3 - 0.2) ln(0.3 / 0.2) + (0.7 - 0.8) ln(0.7 / 0.8), half a row a bin left aside.
    assert psi_of([200_000, 800_000], [300_000, 700_000]) == pytest.approx(0.0539, abs=1e-4)
    assert psi_of([5, 5], [5, 5]) == 0
    # The quantile of chi-square with 9 degrees of freedom at 1 - 1e-6 is 45.1; with 1 it is 23.9, and the
    # approximation a sixth above it.
    assert psi_by_chance(1000, 1000, 10) == pytest.approx(45.1 * 0.002, rel=0.02)
    assert 23.9 * 0.002 < psi_by_chance(1000, 1000, 2) < 28 * 0.002
    assert ks_by_chance(100, 100) == pytest.approx(0.381, abs=1e-3)
    # Two samples of one population stay below what chance makes of them.
    chance = random.Random(1)
    for _ in range(50):
        samples = [[0] * 10, [0] * 10]
        for sample in samples:
            for _ in range(150):
                sample[chance.randrange(10)] += 1
        assert psi_of(*samples) < psi_by_chance(150, 150, 10)
    assert Limits(0.1, 0.25).level(0.2, floor=0.3) == "ok"


class Inbox:
    """A webhook that keeps what it got."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                inbox.texts.append(json.loads(self.rfile.read(size))["text"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_dagster_checks_the_day_and_alerts_once(
    catalog: Catalog, warehouse: Path, tmp_path: Path, inbox: Inbox
) -> None:
    judged(catalog, **{WATCH.name: lambda day: watch_rows(day, unit=60)})
    platform = Platform(Settings(iceberg_warehouse=warehouse.as_uri(), data_dir=tmp_path))
    built = dg.Definitions.merge(
        definitions.build(platform, [f"http://127.0.0.1:{inbox.server.server_port}"], clock=lambda: MORNING),
        dg.Definitions(executor=dg.in_process_executor),
    )
    job = dg.define_asset_job("only_checks", dg.AssetSelection.all_asset_checks())
    with dg.DagsterInstance.ephemeral() as instance:
        made = dg.Definitions.merge(built, dg.Definitions(jobs=[job]))
        result = made.resolve_job_def("only_checks").execute_in_process(instance=instance)
        checks = {one.asset_key.path[-1]: one for one in result.get_asset_check_evaluations()}
        assert {name: one.passed for name, one in checks.items()} == {
            "viewer_watch_daily": False,
            "viewer_genre_daily": True,
            # Nothing was ever exported.
            "viewer_interactions_daily": True,
        }
        assert checks["viewer_watch_daily"].severity == dg.AssetCheckSeverity.ERROR
        assert checks["viewer_watch_daily"].metadata["watch_seconds_psi"].value > 1
        assert "learning" in str(checks["viewer_interactions_daily"].description)

        sensor = built.get_repository_def().get_sensor_def(definitions.SENSOR)
        cursor = None
        for _ in range(2):
            context = dg.build_sensor_context(instance=instance, cursor=cursor)
            cursor = sensor.evaluate_tick(context).cursor
        (text,) = inbox.texts
        assert text.count("drift/view_events: ok → error") == 1
        assert "watch_seconds" in text
        assert "watch_time_minutes" in text

        judged(catalog)
        sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))
        assert "drift/view_events: error → ok" in inbox.texts[1]


def test_commands_show_statistics_and_drift(
    catalog: Catalog, warehouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(catalog, **{GENRE.name: lambda day: genre_rows(day, without="music")})
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", warehouse.as_uri())
    run = CliRunner().invoke
    done = run(cli, ["drift", "--day", DRIFTED.isoformat(), "--json"], standalone_mode=False)
    found = json.loads(done.stdout)
    assert (done.return_value, found["level"]) == (2, "error")
    assert [cause["cause"] for cause in found["causes"]] == ["view_events"]
    shown = run(cli, ["drift", "--day", DAYS[-1].isoformat()], standalone_mode=False)
    assert shown.return_value == 0
    assert "viewer_watch_metrics_1d" in shown.stdout
    assert "no statistics to compare" in run(cli, ["drift", "--day", "2020-01-01"]).stdout

    found = json.loads(run(cli, ["statistics", "--json"]).stdout)
    genre = found[GENRE.tile]["genre"]
    assert genre["day"] == DRIFTED.isoformat()
    assert "music" not in {one["value"] for one in genre["values"]}
    assert "median" in run(cli, ["statistics", WATCH.tile]).stdout
    wrong = run(cli, ["statistics", "nothing"])
    assert "there are no statistics of nothing" in str(wrong.exception)
