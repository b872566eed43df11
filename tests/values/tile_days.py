"""Ordinary days of the example's and the foreign project's tiles, and their export into real Iceberg tables."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog

from dagster_prefs.iceberg.files import day_files, parts_of
from dagster_prefs.iceberg.publish import DayChange, DayFiles, publish_days, write_day
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, counted_sums, ensure_table

MONDAY = date(2026, 3, 2)
GENRES = ("drama", "comedy", "news", "sport", "music", "kids", "science", "crime")
# People do more at the weekend, and other things.
TRAFFIC = (1.0, 0.95, 0.9, 1.0, 1.2, 1.7, 1.6)
NAMESPACE = "training"

Rows = list[dict[str, Any]]


def at(day: date, hour: int = 6) -> datetime:
    """A time in the morning after a day, when it is complete and exported."""
    return datetime.combine(day + timedelta(days=1), time(hour), UTC)


def watch_rows(day: date, *, viewers: int = 420, unit: int = 1) -> Rows:
    """What viewers watched on an ordinary day; with `unit` seconds are sent in another unit."""
    chance = random.Random(f"watch {day}")
    mood = chance.gauss(1, 0.05)
    found = []
    for viewer in range(round(viewers * TRAFFIC[day.weekday()] * chance.gauss(1, 0.04))):
        views = 1 + min(9, int(chance.expovariate(0.6)))
        longer = 1.25 if day.weekday() > 4 else 1.0
        seconds = int(views * 900 * longer * mood * math.exp(chance.gauss(0, 0.7))) // unit
        found.append(
            {
                "viewer_id": viewer,
                "watch_date": day,
                "watch_seconds": seconds,
                "watch_time_minutes": round(Decimal(seconds) / 60, 6),
                "views": views,
                "content_started": min(views, 1 + chance.randrange(views)),
                "completions": sum(chance.random() < 0.4 for _ in range(views)),
                "genres_watched": min(views, 1 + chance.randrange(3)),
                "last_event_at": datetime.combine(day, time(chance.randrange(24)), UTC),
            }
        )
    return found


def genre_rows(day: date, *, without: str = "") -> Rows:
    """What they watched by genre; kids' programmes are a matter of the weekend."""
    chance = random.Random(f"genre {day}")
    weights = [8, 6, 5, 4, 3, 5 if day.weekday() > 4 else 2, 2, 1]
    found = []
    for viewer in range(round(300 * TRAFFIC[day.weekday()] * chance.gauss(1, 0.04))):
        for genre in set(chance.choices(GENRES, weights, k=2)):
            if genre != without:
                seconds = int(1200 * math.exp(chance.gauss(0, 0.7)))
                found.append(
                    {
                        "viewer_id": viewer,
                        "watch_date": day,
                        "genre": genre,
                        "watch_seconds": seconds,
                        "views": 1 + chance.randrange(3),
                        "completions": chance.randrange(2),
                        "last_event_at": datetime.combine(day, time(12), UTC),
                    }
                )
    return found


def interaction_rows(day: date) -> Rows:
    """Likes, shares and searches: mostly few, often none."""
    chance = random.Random(f"interactions {day}")
    return [
        {
            "viewer_id": viewer,
            "interaction_date": day,
            "likes": int(chance.expovariate(0.8)),
            "shares": int(chance.random() < 0.1),
            "searches": int(chance.expovariate(0.5)),
            "last_event_at": datetime.combine(day, time(12), UTC),
        }
        for viewer in range(round(250 * TRAFFIC[day.weekday()] * chance.gauss(1, 0.04)))
    ]


def lesson_rows(day: date, *, unit: int = 1) -> Rows:
    """What learners of the foreign project did."""
    chance = random.Random(f"lessons {day}")
    return [
        {
            "learner_id": f"learner-{learner}",
            "lesson_date": day,
            "lessons": 1 + int(chance.expovariate(0.7)),
            "seconds": int(1500 * math.exp(chance.gauss(0, 0.8))) // unit,
            "finishes": int(chance.random() < 0.5),
            "last_event_at": datetime.combine(day, time(12), UTC),
        }
        for learner in range(round(300 / TRAFFIC[day.weekday()] * chance.gauss(1, 0.04)))
    ]


def days_from(first: date, number: int) -> list[date]:
    """So many days from the first on."""
    return [first + timedelta(days=place) for place in range(number)]


def export(
    catalog: Catalog, spec: TileTable, days: Iterable[date], rows: Callable[[date], Rows]
) -> Mapping[date, int]:
    """Put days into the training table as an export does: written, audited and published with one commit."""
    table = ensure_table(catalog, NAMESPACE, spec)
    schema = arrow_schema(table)
    changes = []
    for day in days:
        batches = pa.Table.from_pylist(
            [{name: row.get(name, 0) for name in spec.by_name} for row in rows(day)], schema
        ).to_batches()
        count, totals = counted_sums(batches, spec.totals)
        written = DayFiles(
            f"{hash((day, count)) & (2**64 - 1):016x}", count, totals, {"prefs.operation": "export"}
        )
        write_day(table, spec, day, written, batches)
        changes.append(DayChange(day, written, parts_of(day_files(table, spec, day))))
    done = publish_days(table, spec, changes)
    assert done.published == {change.day for change in changes}
    return {change.day: change.written.rows for change in changes}
