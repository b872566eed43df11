"""Features come from the rolling views themselves."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import sqlglot

from dagster_prefs.offline import windows
from dagster_prefs.offline.tables import (
    GENRE,
    INTERACTIONS,
    TILES_PATH,
    WATCH,
    SchemaChangeRefused,
    render_tiles,
)
from dagster_prefs.online.contract import load_contract

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
WINDOW = "(watch_date::timestamp at time zone 'UTC') + interval '4 days' > now()"
SUMS = (
    "select viewer_id, 'a#b' as domain_key, sum(views) as views from viewer_watch_metrics_1d "
    "where {} group by viewer_id"
)


def test_the_checked_in_views_and_columns_are_what_dbt_compiles(tmp_path: Path) -> None:
    relations = [domain.relation for domain in load_contract().domains.values()]
    compiled = windows.compile_views(PROJECT, tmp_path, relations)
    held = {path.stem: path.read_text(encoding="utf-8") for path in windows.VIEWS.glob("*.sql")}
    assert held == compiled, "out of date: run `prefs contract build`"
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert TILES_PATH.read_text(encoding="utf-8") == render_tiles(manifest), (
        "out of date: run `prefs contract build`"
    )
    column = manifest["nodes"]["model.dagster_prefs.viewer_watch_metrics_1d"]["columns"]["views"]
    column["data_type"] = "jsonb"
    with pytest.raises(SchemaChangeRefused, match=r"viewer_watch_metrics_1d\.views is jsonb, which training"):
        render_tiles(manifest)


def test_windows_and_columns_are_read_off_the_views() -> None:
    assert windows.first_day(date(2026, 3, 29)) == date(2026, 3, 1)
    assert {spec: set(columns) for spec, columns in windows.sources()} == {
        WATCH: {"watch_seconds", "content_started", "completions", "genres_watched"},
        GENRE: {"genre", "watch_seconds", "views", "completions"},
        INTERACTIONS: {"likes", "shares", "searches"},
    }
    served = {
        (domain.name, name)
        for domain in load_contract().domains.values()
        for name in domain.attributes
        if name != "last_event_at"
    }
    assert {(feature.domain, feature.name) for feature in windows.features()} == served


def test_another_window_in_the_view_is_another_window_in_the_training_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = windows.features_sql("training")
    text = windows._text("viewer_engagement_rolling")
    assert "interval '8 days'" in text
    changed = {"viewer_engagement_rolling": text.replace("interval '8 days'", "interval '31 days'")}
    unchanged = windows._text
    monkeypatch.setattr(windows, "_text", lambda relation: changed.get(relation) or unchanged(relation))
    windows.longest_window.cache_clear()
    try:
        assert windows.longest_window() == 30
        assert windows.features_sql("training") == before.replace("INTERVAL '7'", "INTERVAL '30'").replace(
            "INTERVAL 7 DAY", "INTERVAL 30 DAY"
        )
        assert windows.features_sql("training") != before
    finally:
        windows.longest_window.cache_clear()


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (SUMS.format("watch_date > '2026-01-01'"), "another condition than within_window"),
        (SUMS.format(f"{WINDOW} and views > 1"), "another condition than within_window"),
        (SUMS.format(WINDOW.replace("days", "hours")), "another condition than within_window"),
        (SUMS.format("true"), "another condition than within_window"),
        ("select viewer_id from view_events", "reads no tile that is exported"),
        (SUMS.format(WINDOW).replace("sum(views)", "round(sum(views), 1)"), "use the macros minutes or ratio"),
        ("drop table x", "is no query"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_asked_about_other_days_is_refused(view: str, message: str) -> None:
    with pytest.raises(windows.ViewNotPortable, match=f"some_view .*{message}|some_view {message}"):
        windows._at_points(windows._parse("some_view", view), "some_view", "training", "duckdb", False, None)


def test_a_portable_view_becomes_a_query_of_points() -> None:
    view = windows._parse("some_view", SUMS.format(WINDOW))
    windows._at_points(view, "some_view", "serving", "duckdb", False, None)
    (read,) = (table for table in view.find_all(sqlglot.exp.Table) if table.name != "points")
    assert read.name == "viewer_watch_daily"
    assert "t.watch_date >= p.since" in view.sql(dialect="duckdb")
    assert "t.watch_date < p.day" not in view.sql(dialect="duckdb")
