"""The public interface for services: profiles of the contract's entities, shop user profiles and rankings.

Names are imported on first use, so that importing this package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_prefs.serving.catalogue import CatalogueRanker
    from dagster_prefs.serving.observing import ReadCounts
    from dagster_prefs.serving.preferences import Ranking, RankingParameters, ShopClient, ShopUserProfile
    from dagster_prefs.serving.profiles import AsyncProfileClient, ClientOptions, Profile, ProfileClient
    from dagster_prefs.serving.served_log import ServedLog

_HOMES = {
    "AsyncProfileClient": "profiles",
    "CatalogueRanker": "catalogue",
    "ClientOptions": "profiles",
    "ShopClient": "preferences",
    "Profile": "profiles",
    "ProfileClient": "profiles",
    "Ranking": "preferences",
    "RankingParameters": "preferences",
    "ReadCounts": "observing",
    "ServedLog": "served_log",
    "ShopUserProfile": "preferences",
}

__all__ = [
    "AsyncProfileClient",
    "CatalogueRanker",
    "ClientOptions",
    "Profile",
    "ProfileClient",
    "Ranking",
    "RankingParameters",
    "ReadCounts",
    "ServedLog",
    "ShopClient",
    "ShopUserProfile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
