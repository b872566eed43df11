"""What a read at an instant would have returned, in plain Python over events; independent of the SQL it judges."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

from shipped import LONG, SHORT

from .oracle import six_places


@dataclass(frozen=True)
class View:
    """A typed event of view_events with the time of its arrival, None if it is not known."""

    viewer_id: int
    watched_at: datetime
    arrived_at: datetime | None
    content_id: str | None = "c"
    genre: str | None = "drama"
    watch_duration_sec: int | None = 60
    completion_pct: Decimal | None = None
    event_id: str = "e"


@dataclass(frozen=True)
class Interaction:
    """A typed event of content_interactions."""

    viewer_id: int
    event_ts: datetime
    arrived_at: datetime | None
    event_type: str = "like"
    event_id: str = "e"


@dataclass(frozen=True)
class Lesson:
    """A typed event of the courses' lesson_events."""

    learner_id: str
    happened_at: datetime
    arrived_at: datetime | None
    event_type: str = "started"
    subject: str | None = "maths"
    seconds: int | None = 60
    event_id: str = "e"


def with_ids(rows: Iterable[Any]) -> list[Any]:
    """The rows, each with an identity of its own."""
    return [replace(row, event_id=f"e{number}") for number, row in enumerate(rows)]


def spread_of(key: int | str, seconds: int) -> timedelta:
    """By how much the day of a key begins later."""
    if not seconds:
        return timedelta()
    number = abs(key) if isinstance(key, int) else int(hashlib.md5(key.encode()).hexdigest()[:15], 16)
    return timedelta(seconds=number % seconds)


def day_of(moment: datetime) -> date:
    return moment.astimezone(UTC).date()


def milliseconds(moment: datetime) -> int:
    microseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return (microseconds + 500) // 1000


def viewer_values(
    viewer: int,
    t: datetime,
    views: Iterable[View],
    interactions: Iterable[Interaction],
    *,
    spread: int = 0,
    happened: bool = False,
) -> dict[str, Any]:
    """The served values of a viewer at t: all events that had arrived, in the windows of that moment."""
    today = day_of(t - spread_of(viewer, spread))

    def seen(event: View | Interaction, at: datetime, days: int) -> bool:
        known = at if happened else event.arrived_at
        return (
            event.viewer_id == viewer
            and known is not None
            and known <= t
            and day_of(at) >= today - timedelta(days=days)
        )

    long = [view for view in views if seen(view, view.watched_at, LONG)]
    short = [view for view in long if seen(view, view.watched_at, SHORT)]
    reactions = [one for one in interactions if seen(one, one.event_ts, LONG)]
    titles, genres_by_day = defaultdict(set), defaultdict(set)
    for view in short:
        if view.content_id is not None:
            titles[day_of(view.watched_at)].add(view.content_id)
    for view in long:
        if view.genre is not None:
            genres_by_day[day_of(view.watched_at)].add(view.genre)
    of_genre = [view for view in long if view.genre is not None]
    seconds: dict[str, int] = defaultdict(int)
    for view in of_genre:
        seconds[str(view.genre)] += view.watch_duration_sec or 0
    total = sum(seconds.values())
    best = sorted(seconds, key=lambda name: (-seconds[name], name.encode()))[:5]
    completed = [view for view in of_genre if _completed(view)]
    return {
        f"watch_minutes_{SHORT}d": six_places(Fraction(_seconds(short), 60)),
        f"watch_minutes_{LONG}d": six_places(Fraction(_seconds(long), 60)),
        f"titles_{SHORT}d": sum(map(len, titles.values())),
        f"completions_{LONG}d": sum(map(_completed, long)),
        f"genres_watched_{LONG}d": sum(map(len, genres_by_day.values())),
        f"likes_{LONG}d": sum(one.event_type == "like" for one in reactions),
        f"shares_{LONG}d": sum(one.event_type == "share" for one in reactions),
        f"searches_{LONG}d": sum(one.event_type == "search" for one in reactions),
        "favorite_genre": best[0] if best else None,
        "favorite_genres": best,
        "favorite_genre_shares": [
            six_places(Fraction(seconds[name], total)) if total else Decimal(0) for name in best
        ],
        f"completion_rate_{LONG}d": six_places(Fraction(len(completed), len(of_genre))) if of_genre else None,
        f"minutes_per_view_{LONG}d": six_places(Fraction(total, 60 * len(of_genre))) if of_genre else None,
        "watch_last_event_at": _newest([view.watched_at for view in long]),
        "preferences_last_event_at": _newest([view.watched_at for view in of_genre]),
        "interactions_last_event_at": _newest([one.event_ts for one in reactions]),
    }


def sequence_values(
    viewer: int, t: datetime, views: Iterable[View], *, spread: int = 0, happened: bool = False
) -> dict[str, Any]:
    """The last views of a viewer at t: newest first, then by the id of the event."""
    today = day_of(t - spread_of(viewer, spread))
    seen = [
        view
        for view in views
        if view.viewer_id == viewer
        and (known := view.watched_at if happened else view.arrived_at) is not None
        and known <= t
        and day_of(view.watched_at) >= today - timedelta(days=LONG)
    ]
    newest = sorted(seen, key=lambda view: view.event_id)
    newest = sorted(newest, key=lambda view: view.watched_at, reverse=True)[:50]
    return {
        "recent_content_ids": [view.content_id for view in newest],
        "recent_watched_at": [milliseconds(view.watched_at) for view in newest],
        "recent_completions": [view.completion_pct for view in newest],
        "sequence_last_event_at": _newest([view.watched_at for view in newest]),
    }


def learner_values(
    learner: str, t: datetime, lessons: Sequence[Lesson], *, spread: int = 0, happened: bool = False
) -> dict[str, Any]:
    """The served values of a learner at t; the favourite subjects have no window."""
    today = day_of(t - spread_of(learner, spread))
    seen = [
        one
        for one in lessons
        if one.learner_id == learner
        and (known := one.happened_at if happened else one.arrived_at) is not None
        and known <= t
    ]
    long = [one for one in seen if day_of(one.happened_at) >= today - timedelta(days=28)]
    short = [one for one in long if day_of(one.happened_at) >= today - timedelta(days=7)]
    subjects: dict[str, int] = defaultdict(int)
    for one in seen:
        if one.subject is not None:
            subjects[one.subject] += one.seconds or 0
    best = sorted(subjects, key=lambda name: (-subjects[name], name.encode()))[:5]
    if not long:
        # Without a tile in its window a learner has no row, whatever subjects there were.
        return {
            "lessons_7d": 0,
            "minutes_28d": Decimal(0),
            "favorite_subjects": None,
            "progress_last_event_at": None,
        }
    return {
        "lessons_7d": sum(one.event_type == "started" for one in short),
        "minutes_28d": six_places(Fraction(sum(one.seconds or 0 for one in long), 60)),
        "favorite_subjects": best or None,
        "progress_last_event_at": _newest([one.happened_at for one in long]),
    }


def _completed(view: View) -> bool:
    return view.completion_pct is not None and view.completion_pct >= Decimal("0.9")


def _seconds(views: Iterable[View]) -> int:
    return sum(view.watch_duration_sec or 0 for view in views)


def _newest(moments: list[datetime]) -> int | None:
    return milliseconds(max(moments)) if moments else None
