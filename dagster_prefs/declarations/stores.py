"""Where a relation's columns are stored outside the engine: DynamoDB attributes and Iceberg columns."""

from __future__ import annotations

from dagster_prefs.declarations.lineage import Column
from dagster_prefs.declarations.registry import Registry


def stores_of(column: Column, registry: Registry) -> list[dict[str, str]]:
    """Return where a column of a relation is stored, each with `store`, `table`, `name` and `text`.

    Tables are named without the prefix and namespace of an environment.
    """
    found = []
    if column.is_field:
        return []
    for domain in registry.contract.domains.values():
        if domain.relation == column.of and column.name in domain.attributes:
            table = registry.contract.table_of(domain).name
            found.append(
                {
                    "store": "dynamodb",
                    "table": table,
                    "item": domain.key,
                    "name": column.name,
                    "text": f"DynamoDB {table}, attribute {column.name} of {domain.key}",
                }
            )
    if (tile := registry.tiles.get(column.of)) and column.name in tile.columns:
        text = f"Iceberg {tile.table}, column {column.name}"
        found.append({"store": "iceberg", "table": tile.table, "name": column.name, "text": text})
    return found
