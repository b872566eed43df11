"""What a training value is, in plain Python over the rows of the tiles; independent of the SQL it judges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

_PLACES = Decimal("0.000001")


def six_places(value: Fraction) -> Decimal:
    scaled = value * 1_000_000
    whole, rest = divmod(scaled.numerator, scaled.denominator)
    return Decimal(whole + (1 if 2 * rest >= scaled.denominator else 0)) * _PLACES


def features(
    viewer: int,
    label_time: datetime,
    watch: Iterable[tuple[Any, ...]],
    genre: Iterable[tuple[Any, ...]],
    interactions: Iterable[tuple[Any, ...]],
) -> dict[str, Any]:
    day = label_time.astimezone(UTC).date()

    def within(tile_viewer: int, tile_day: date, days: int) -> bool:
        return tile_viewer == viewer and day - timedelta(days=days) <= tile_day <= day - timedelta(days=1)

    long_watch = [row for row in watch if within(row[0], row[1], 28)]
    short_watch = [row for row in long_watch if within(row[0], row[1], 7)]
    reactions = [row for row in interactions if within(row[0], row[1], 28)]
    genres: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tile_viewer, tile_day, name, seconds, views, completions, _ in genre:
        if within(tile_viewer, tile_day, 28):
            genres[name] = [a + b for a, b in zip(genres[name], (seconds, views, completions), strict=True)]
    seconds, views, completions = (sum(values[n] for values in genres.values()) for n in range(3))
    best = sorted(genres, key=lambda name: (-genres[name][0], name.encode()))[:5]
    return {
        "watch_minutes_7d": six_places(Fraction(sum(row[2] for row in short_watch), 60)),
        "watch_minutes_28d": six_places(Fraction(sum(row[2] for row in long_watch), 60)),
        "titles_7d": sum(row[5] for row in short_watch),
        "completions_28d": sum(row[6] for row in long_watch),
        "genres_watched_28d": sum(row[7] for row in long_watch),
        "likes_28d": sum(row[2] for row in reactions),
        "shares_28d": sum(row[3] for row in reactions),
        "searches_28d": sum(row[4] for row in reactions),
        "favorite_genre": best[0] if best else None,
        "favorite_genres": best,
        "favorite_genre_shares": [
            six_places(Fraction(genres[name][0], seconds)) if seconds else Decimal(0) for name in best
        ],
        "completion_rate_28d": six_places(Fraction(completions, views)) if views else None,
        "minutes_per_view_28d": six_places(Fraction(seconds, 60 * views)) if views else None,
    }
