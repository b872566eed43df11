"""What the shipped example declares, by the names that tests of its training tables use."""

from __future__ import annotations

from pathlib import Path

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.iceberg.tables import tile_tables
from dagster_prefs.training.windows import choose_features

REGISTRY = load_registry(Path(__file__).resolve().parents[1] / "dbt_project")
TILE_TABLES = tile_tables(REGISTRY)
WATCH = TILE_TABLES["viewer_watch_daily"]
GENRE = TILE_TABLES["viewer_genre_daily"]
INTERACTIONS = TILE_TABLES["viewer_interactions_daily"]
FEATURES = choose_features(REGISTRY, "viewer")
VIEWER_KEY = FEATURES.key
