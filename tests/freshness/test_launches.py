"""When a stale day is exported again: the rule alone, without Dagster."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from dagster_prefs.iceberg.launches import Launch, TableDay, due, dump_launches, load_launches

DAY = ("viewer_watch_daily", date(2026, 3, 1))
OTHER = ("viewer_genre_daily", date(2026, 3, 1))
AT = datetime(2026, 3, 3, 12, tzinfo=UTC)


def test_the_same_state_is_tried_after_hours_that_double_up_to_a_day() -> None:
    launches: dict[TableDay, Launch] = {}
    hours = []
    for hour in range(24 * 7):
        starts, launches = due(
            {DAY: "a"}, load_launches(dump_launches(launches)), now=AT + timedelta(hours=hour)
        )
        hours += [hour] * len(starts)
    assert hours == [0, 1, 3, 7, 15, 31, 55, 79, 103, 127, 151]


def test_another_state_is_tried_at_once_and_other_days_do_not_count() -> None:
    _, launches = due({DAY: "a", OTHER: "x"}, {}, now=AT)
    starts, launches = due({DAY: "b", OTHER: "x"}, launches, now=AT)
    assert starts == {DAY: Launch("b", 1, AT)}
    assert launches[OTHER] == Launch("x", 1, AT)


def test_a_day_that_is_exported_is_forgotten() -> None:
    _, launches = due({DAY: "a"}, {}, now=AT)
    starts, launches = due({}, launches, now=AT)
    assert (starts, launches) == ({}, {})
    assert due({DAY: "a"}, launches, now=AT)[0] == {DAY: Launch("a", 1, AT)}


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"t": 1}', '{"t": {"x": ["a", 1, 2]}}', '{"t": {"2026-03-01": ["a"]}}']
)
def test_an_unreadable_cursor_is_a_fresh_start(text: str | None) -> None:
    assert load_launches(text) == {}
