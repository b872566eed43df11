"""What a training value is, in plain Python over the rows of the tiles; independent of the SQL it judges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

from shipped import GENRE, INTERACTIONS, LONG, SHORT, WATCH

from dagster_prefs.iceberg.tables import TileTable

_PLACES = Decimal("0.000001")


def six_places(value: Fraction) -> Decimal:
    scaled = value * 1_000_000
    whole, rest = divmod(scaled.numerator, scaled.denominator)
    return Decimal(whole + (1 if 2 * rest >= scaled.denominator else 0)) * _PLACES


def named(spec: TileTable, rows: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The rows of a tile by the names of its columns."""
    names = [column.name for column in spec.columns]
    return [dict(zip(names, row, strict=True)) for row in rows]


def features(
    viewer: int,
    label_time: datetime,
    watch: Iterable[tuple[Any, ...]],
    genre: Iterable[tuple[Any, ...]],
    interactions: Iterable[tuple[Any, ...]],
) -> dict[str, Any]:
    day = label_time.astimezone(UTC).date()

    def within(row: dict[str, Any], tile_day: date, days: int) -> bool:
        return row["viewer_id"] == viewer and day - timedelta(days=days) <= tile_day <= day - timedelta(
            days=1
        )

    long_watch = [row for row in named(WATCH, watch) if within(row, row["watch_date"], LONG)]
    short_watch = [row for row in long_watch if within(row, row["watch_date"], SHORT)]
    reactions = [
        row for row in named(INTERACTIONS, interactions) if within(row, row["interaction_date"], LONG)
    ]
    genres: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in named(GENRE, genre):
        if within(row, row["watch_date"], LONG):
            more = (row["watch_seconds"], row["views"], row["completions"])
            genres[row["genre"]] = [a + b for a, b in zip(genres[row["genre"]], more, strict=True)]
    seconds, views, completions = (sum(values[n] for values in genres.values()) for n in range(3))
    best = sorted(genres, key=lambda name: (-genres[name][0], name.encode()))[:5]
    return {
        f"watch_minutes_{SHORT}d": six_places(Fraction(sum(row["watch_seconds"] for row in short_watch), 60)),
        f"watch_minutes_{LONG}d": six_places(Fraction(sum(row["watch_seconds"] for row in long_watch), 60)),
        f"titles_{SHORT}d": sum(row["content_started"] for row in short_watch),
        f"completions_{LONG}d": sum(row["completions"] for row in long_watch),
        f"genres_watched_{LONG}d": sum(row["genres_watched"] for row in long_watch),
        f"likes_{LONG}d": sum(row["likes"] for row in reactions),
        f"shares_{LONG}d": sum(row["shares"] for row in reactions),
        f"searches_{LONG}d": sum(row["searches"] for row in reactions),
        "favorite_genre": best[0] if best else None,
        "favorite_genres": best,
        "favorite_genre_shares": [
            six_places(Fraction(genres[name][0], seconds)) if seconds else Decimal(0) for name in best
        ],
        f"completion_rate_{LONG}d": six_places(Fraction(completions, views)) if views else None,
        f"minutes_per_view_{LONG}d": six_places(Fraction(seconds, 60 * views)) if views else None,
    }
