"""What the shipped example declares, by the names that tests of its training tables use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyiceberg.types import DecimalType, LongType

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.iceberg.tables import TileTable, tile_tables
from dagster_prefs.training.windows import choose_features

REGISTRY = load_registry(Path(__file__).resolve().parents[1] / "dbt_project")
TILE_TABLES = tile_tables(REGISTRY)
WATCH = TILE_TABLES["viewer_watch_daily"]
GENRE = TILE_TABLES["viewer_genre_daily"]
INTERACTIONS = TILE_TABLES["viewer_interactions_daily"]
FEATURES = choose_features(REGISTRY, "viewer")
VIEWER_KEY = FEATURES.key
# Days of the example's windows, which the names of its attributes state: a changed window changes no test of these.
SHORT, LONG = REGISTRY.variables["windows"]["short"], REGISTRY.variables["windows"]["long"]

# The attributes whose values tests/offline_store/oracle.py computes and tests/dynamodb writes, by domain.
COMPUTED: Mapping[str, tuple[str, ...]] = {
    "watch": (
        f"watch_minutes_{SHORT}d", f"watch_minutes_{LONG}d", f"titles_{SHORT}d", f"completions_{LONG}d",
        f"genres_watched_{LONG}d",
    ),
    "interactions": (f"likes_{LONG}d", f"shares_{LONG}d", f"searches_{LONG}d"),
    "preferences": (
        "favorite_genre", "favorite_genres", "favorite_genre_shares", f"completion_rate_{LONG}d",
        f"minutes_per_view_{LONG}d",
    ),
}  # fmt: skip


def with_computed_attributes() -> Registry:
    """The example's registry with exactly the domains and attributes of COMPUTED, in that order.

    A domain that somebody adds to the example, or an attribute that somebody adds or retires there, is for tests of its
    own model: tests of the platform, which write rows of these views, know none of the others.
    """
    contract = REGISTRY.contract
    domains = {}
    for key, domain in contract.domains.items():
        if domain.name not in COMPUTED:
            continue
        declared = {**domain.retired, **domain.attributes}
        known = (*COMPUTED[domain.name], LAST_EVENT_AT)
        domains[key] = replace(
            domain,
            attributes={name: declared[name] for name in known},
            retired={name: one for name, one in declared.items() if name not in known},
        )
    return replace(REGISTRY, contract=replace(contract, domains=domains))


def tile_row(spec: TileTable, **values: Any) -> tuple[Any, ...]:
    """One row of a tile in the order of its columns; a column that the caller does not know is 0 or NULL."""
    names = [column.name for column in spec.columns]
    assert values.keys() <= set(names), f"{spec.tile} has no column {sorted(values.keys() - set(names))}"
    return tuple(
        values.get(column.name, 0 if isinstance(column.type, LongType | DecimalType) else None)
        for column in spec.columns
    )
