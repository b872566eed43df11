"""The projects that tests read: the shipped example, and a foreign one with other events and a text key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dagster_prefs.declarations.contract import parse_contract
from dagster_prefs.declarations.generate import plan_files
from dagster_prefs.declarations.registry import KeyType, Registry, load_registry, registry_dict

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
COURSES = Path(__file__).resolve().parent / "projects" / "courses"
# The four files that give the foreign project a domain of an entity with a composite key.
ENROLMENTS = Path(__file__).resolve().parent / "projects" / "enrolments"


def add_enrolments(project: Path) -> None:
    """Give a copy of the foreign project an entity with a composite key, learner and course, with a tile and a domain.

    Two files change, and four are new.
    """
    for name, old, new in (
        (
            "dbt_project.yml",
            "    learner: {",
            "    enrolment: { keys: { learner_id: text, course_id: text }, table: enrolment_profiles, "
            "erasable: true }\n",
        ),
        (
            "models/lesson_events.yml",
            "      - { name: lesson_id,",
            "      - { name: course_id, data_type: text, description: The course of the lesson., "
            "config: { meta: { optional: true, max_bytes: 100 } } }\n",
        ),
    ):
        file = project / name
        text = file.read_text()
        assert text.count(old) == 1
        # The entity behind the one that was there first.
        at = text.index("\n", text.index(old)) + 1 if name == "dbt_project.yml" else text.index(old)
        file.write_text(text[:at] + new + text[at:])
    shutil.copytree(ENROLMENTS / "models", project / "models", dirs_exist_ok=True)


def enrolments(folder: Path) -> Registry:
    """The registry of such a copy, made in this folder, without what its views compile to."""
    project = folder / "courses"
    shutil.copytree(COURSES, project, ignore=shutil.ignore_patterns("target", "logs"))
    add_enrolments(project)
    found = plan_files(project).declarations
    return Registry(
        project=found.project,
        entities=found.entities,
        topics={topic.declared.name: topic.declared for topic in found.topics},
        tiles={tile.declared.relation: tile.declared for tile in found.tiles},
        contract=parse_contract(found.contract),
        variables=found.variables,
        hashes={},
    )


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
