"""The columns that each asset's columns are made from, as Dagster's metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg

from dagster_prefs.declarations.lineage import Column, Lineage, decisive
from dagster_prefs.declarations.registry import TopicDeclaration

# Returns the asset of a relation.
KeyOf = Callable[[str], dg.AssetKey]
# (Output column, asset, its column) of each dependency.
Dependency = tuple[str, dg.AssetKey, str]


def lineage_metadata(dependencies: Iterable[Dependency]) -> Mapping[str, Any]:
    """Return asset metadata with the column lineage of these dependencies; empty without any."""
    found: dict[str, list[dg.TableColumnDep]] = {}
    for column, asset, name in dependencies:
        found.setdefault(column, []).append(dg.TableColumnDep(asset_key=asset, column_name=name))
    return {"dagster/column_lineage": dg.TableColumnLineage(found)} if found else {}


def same_columns(columns: Iterable[str], asset: dg.AssetKey) -> Mapping[str, Any]:
    """Return the metadata of an asset whose columns are those of another asset."""
    return lineage_metadata((name, asset, name) for name in columns)


def view_metadata(lineage: Lineage, relation: str, key_of: KeyOf) -> Mapping[str, Any]:
    """Return the metadata of a view: what each value is made from or chosen by, or what a count counts."""
    return lineage_metadata(
        (name, key_of(source.of), source.name)
        for name in lineage.columns(relation)
        for source in sorted(decisive(lineage.sources(Column(relation, name))))
    )


def topic_metadata(topic: TopicDeclaration, key_of: KeyOf) -> Mapping[str, Mapping[str, Any]]:
    """Return the metadata of a topic's typed and parsed relation: each field, back to the bytes of the message."""
    data = key_of(topic.raw)
    return {
        topic.relation: same_columns(topic.by_name, key_of(topic.parsed)),
        topic.parsed: lineage_metadata((name, data, "data") for name in topic.by_name),
    }
