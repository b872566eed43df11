"""What a recommendation service imports: viewer profiles, preference profiles and rankings.

Names are loaded when first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_prefs.serving.catalogue import CatalogueRanker
    from dagster_prefs.serving.domains import InteractionsProfile, PreferencesProfile, WatchProfile
    from dagster_prefs.serving.preferences import PreferenceClient, Ranking, RankingParameters, UserProfile
    from dagster_prefs.serving.profiles import AsyncProfileClient, Profile, ProfileClient

_HOMES = {
    "AsyncProfileClient": "profiles",
    "CatalogueRanker": "catalogue",
    "InteractionsProfile": "domains",
    "PreferenceClient": "preferences",
    "PreferencesProfile": "domains",
    "Profile": "profiles",
    "ProfileClient": "profiles",
    "Ranking": "preferences",
    "RankingParameters": "preferences",
    "UserProfile": "preferences",
    "WatchProfile": "domains",
}

__all__ = [
    "AsyncProfileClient",
    "CatalogueRanker",
    "InteractionsProfile",
    "PreferenceClient",
    "PreferencesProfile",
    "Profile",
    "ProfileClient",
    "Ranking",
    "RankingParameters",
    "UserProfile",
    "WatchProfile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
