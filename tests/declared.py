"""The projects that tests read: the shipped example, and a foreign one with other events and a text key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_prefs.declarations.registry import KeyType, load_registry, registry_dict

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
COURSES = Path(__file__).resolve().parent / "projects" / "courses"


def two_entities(key_type: KeyType = "text") -> dict[str, Any]:
    """The example's registry with a domain of items, which have a key of that type and a table of their own."""
    declared = registry_dict(load_registry(PROJECT))
    declared["entities"]["item"] = {
        "keys": {"item_id": key_type},
        "erasable": False,
        "table": "item_profiles",
    }
    contract = declared["contract"]
    contract["tables"]["item"] = {
        **contract["tables"]["viewer"],
        "name": "item_profiles",
        "partition_key": {"name": "item_id", "type": "S"},
    }
    contract["domains"]["item#trend"] = {
        **contract["domains"]["engagement#watch"],
        "name": "trend",
        "entity": "item",
        "relation": "item_trend",
        "sink": "sink_item_trend",
    }
    return declared
