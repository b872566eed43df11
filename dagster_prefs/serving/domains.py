"""One typed class per domain of the contract, so that an editor completes `profile.watch.watch_minutes_7d`.

The attributes are the contract's; a test compares them. A class without arguments is the cold-start profile:
what to assume of a viewer of whom nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class WatchProfile:
    """engagement#watch: what a viewer watched lately."""

    watch_minutes_7d: Decimal = Decimal(0)
    watch_minutes_28d: Decimal = Decimal(0)
    titles_7d: int = 0
    completions_28d: int = 0
    genres_watched_28d: int = 0
    last_event_at: int | None = None


@dataclass(frozen=True, slots=True)
class InteractionsProfile:
    """engagement#interactions: how a viewer reacted lately."""

    likes_28d: int = 0
    shares_28d: int = 0
    searches_28d: int = 0
    last_event_at: int | None = None


@dataclass(frozen=True, slots=True)
class PreferencesProfile:
    """engagement#preferences: what a viewer likes to watch."""

    favorite_genre: str | None = None
    favorite_genres: list[str] = field(default_factory=list)
    favorite_genre_shares: list[Decimal] = field(default_factory=list)
    completion_rate_28d: Decimal | None = None
    minutes_per_view_28d: Decimal | None = None
    last_event_at: int | None = None


DomainProfile = WatchProfile | InteractionsProfile | PreferencesProfile

DOMAIN_CLASSES: dict[str, type[DomainProfile]] = {
    "watch": WatchProfile,
    "interactions": InteractionsProfile,
    "preferences": PreferencesProfile,
}
