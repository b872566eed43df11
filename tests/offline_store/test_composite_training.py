"""Training sets and parity of an entity with a composite key: every label sees the tiles of its whole key."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal

import duckdb
import pytest
import sqlglot
from declared import enrolments

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.training.windows import Features, ViewNotPortable, choose_features

READ = "course_lessons_1d where (lesson_date::timestamp at time zone 'UTC') + interval '{days} days' > now()"
VIEW = f"""
with long_window as (
  select learner_id, course_id, sum(seconds) as seconds, max(last_event_at) as last_event_at
  from {READ.format(days=29)} group by learner_id, course_id
), short_window as (
  select learner_id, course_id, sum(lessons) as lessons
  from {READ.format(days=8)} group by learner_id, course_id
)
select long_window.learner_id, long_window.course_id, 'learning#course'::text as domain_key,
  coalesce(short_window.lessons, 0)::bigint as course_lessons_7d,
  round(long_window.seconds / 60.0, 6) as course_minutes_28d,
  (extract(epoch from long_window.last_event_at) * 1000)::bigint as last_event_at
from long_window
left join short_window
  on short_window.learner_id = long_window.learner_id and short_window.course_id = long_window.course_id
"""
DAY = date(2026, 3, 1)
# Keys that are one text where their parts are joined by a blank or by what separates them.
KEYS = [("a", "b c"), ("a b", "c"), ("a", "b#c"), ("a#b", "c"), ("b", "a"), ("a", "b")]
TILES = [
    (*key, DAY - timedelta(days=back), number + back, 60 * number + back)
    for number, key in enumerate(KEYS, 1)
    for back in (0, 1, 7, 8, 28, 29)
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return enrolments(tmp_path_factory.mktemp("declared"))


def features(registry: Registry, view: str) -> Features:
    found = replace(
        registry,
        contract=replace(
            registry.contract, domains={"learning#course": registry.contract.domains["learning#course"]}
        ),
        queries={"course_progress_rolling": view},
    )
    return choose_features(found, "enrolment")


def expected(key: tuple[str, str], day: date) -> tuple[int, Decimal]:
    """A label's numbers in plain Python."""
    own = [
        (tile, lessons, seconds) for *of, tile, lessons, seconds in TILES if tuple(of) == key and tile < day
    ]
    lessons = sum(lessons for tile, lessons, _ in own if tile >= day - timedelta(days=7))
    seconds = sum(seconds for tile, _, seconds in own if tile >= day - timedelta(days=28))
    # A key without a tile in the longest window has no item.
    return lessons, round(Decimal(seconds) / 60, 6)


def test_every_label_sees_its_whole_key(registry: Registry) -> None:
    found = features(registry, VIEW)
    assert [(spec.name, columns) for spec, columns in found.sources] == [
        ("course_lessons_daily", ("seconds", "lessons"))
    ]
    points = [(*key, day) for key in [*KEYS, ("a", "z")] for day in (DAY, DAY - timedelta(days=3))]
    with duckdb.connect() as session:
        session.execute(
            "create table course_lessons_daily (learner_id text, course_id text, lesson_date date,"
            " lessons bigint, seconds bigint, last_event_at bigint)"
        )
        session.executemany("insert into course_lessons_daily values (?, ?, ?, ?, ?, 1)", TILES)
        session.execute("create table points (point bigint, learner_id text, course_id text, day date)")
        session.executemany(
            "insert into points values (?, ?, ?, ?)",
            [(number, *point) for number, point in enumerate(points)],
        )
        rows = session.execute(found.sql("training")).fetchall()
        assert {number: tuple(values) for number, *values in rows} == {
            number: expected((learner, course), day) for number, (learner, course, day) in enumerate(points)
        }

        # The same join as another engine is told it, here in the words of this one.
        session.execute("create schema training; create schema db")
        session.execute("create table training.course_lessons_daily as from main.course_lessons_daily")
        session.execute(
            "create table db.labels as select learner_id, course_id, day::timestamp + interval 5 hour as label_time"
            " from points"
        )
        text = found.training_sql(
            "duckdb", "db.labels", ["learner_id", "course_id", "label_time"], namespace="training"
        )
        told = {
            (learner, course, at.date()): (lessons, minutes)
            for learner, course, at, lessons, minutes in session.execute(text).fetchall()
        }
        assert told == {
            (learner, course, day): expected((learner, course), day) for learner, course, day in points
        }
    for dialect in ("trino", "spark", "athena"):
        text = found.training_sql(
            dialect, "db.labels", ["learner_id", "course_id", "label_time"], namespace="training"
        )
        assert "t.course_id = p.course_id" in sqlglot.transpile(text, read=dialect, write=dialect)[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            f"{READ.format(days=8)} group by learner_id, course_id",
            f"{READ.format(days=8)} group by learner_id",
            "groups without course_id",
        ),
        (" and short_window.course_id = long_window.course_id", "", "joins without course_id"),
        (
            "coalesce(short_window.lessons, 0)::bigint",
            "row_number() over (partition by long_window.learner_id order by long_window.seconds)",
            "ranks without course_id",
        ),
    ],
)
def test_a_part_of_the_key_is_refused(registry: Registry, old: str, new: str, said: str) -> None:
    assert VIEW.count(old) == 1
    with pytest.raises(ViewNotPortable, match=f"course_progress_rolling {said}"):
        features(registry, VIEW.replace(old, new))
