"""What dbt's own commands show and select of the example, without an engine: lineage, tags, states, docs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from declared import PROJECT
from shipped import REGISTRY
from warm import Warm

Run = Callable[..., str]
KAFKA = {"PREFS_ENGINE": "risingwave", "PREFS_KAFKA_BOOTSTRAP": "127.0.0.1:1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where dbt writes."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def run(warm: Warm, folder: Path) -> Run:
    """`run("ls", …, target="there", **variables)`: what dbt prints, with an engine that nobody reaches."""

    def ran(*words: str, target: str = "state", **variables: str) -> str:
        place = ["--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT)]
        place += ["--target-path", str(folder / target), "--log-path", str(folder / "logs")]
        environment = {**os.environ, "PREFS_ENGINE_PORT": "1", "DBT_STATIC_PARSER": "false", **variables}
        done = warm.run(["dbt", "-q", *words, *place], environment=environment, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return ran


@pytest.fixture(scope="module")
def parsed(run: Run, folder: Path) -> dict[str, Any]:
    """The manifest of `dbt parse`, with the feeds that RisingWave has."""
    run("parse", **KAFKA)
    found: dict[str, Any] = json.loads((folder / "state" / "manifest.json").read_bytes())
    return found


def behind(parsed: dict[str, Any], node: str) -> set[str]:
    """What a node is made from, itself included."""
    found, left = set(), {node}
    while left:
        found |= left
        left = {up for one in left for up in parsed["parent_map"].get(one, ())} - found
    return found


def test_lineage_leads_from_topics_to_what_is_served(parsed: dict[str, Any]) -> None:
    sources = {f"source.dagster_prefs.kafka.{topic.name}": topic for topic in REGISTRY.topics.values()}
    assert parsed["sources"].keys() == sources.keys()
    for name, topic in sources.items():
        children = {f"model.dagster_prefs.{topic.raw}", f"model.dagster_prefs.kafka_{topic.relation}"}
        assert set(parsed["child_map"][name]) == children
    for domain in REGISTRY.contract.domains.values():
        sink = f"model.dagster_prefs.{domain.sink}"
        assert behind(parsed, sink) & sources.keys(), domain.name
        assert any(child.startswith("exposure.") for child in parsed["child_map"][sink]), domain.name


def test_tags_select_generated_and_hand_written_views(parsed: dict[str, Any], run: Run) -> None:
    tagged: dict[str, set[str]] = {}
    for node in parsed["nodes"].values():
        if node["resource_type"] == "model":
            assert node["tags"], f"{node['name']} is selected by no tag"
            for tag in node["tags"]:
                tagged.setdefault(tag, set()).add(node["name"])
    topic = next(topic for topic in REGISTRY.topics.values() if "." in topic.name)
    printed = run(
        "ls",
        "--select",
        f"tag:topic_{topic.relation}",
        "tag:engagement",
        "--output",
        "name",
        "--resource-type",
        "model",
        "--resource-type",
        "source",
        **KAFKA,
    )
    expected = tagged[f"topic_{topic.relation}"] | tagged["engagement"]
    assert set(printed.split()) == expected | {f"kafka.{topic.name}"}
    assert {domain.relation for domain in REGISTRY.contract.domains.values()} & tagged["engagement"]


@pytest.mark.parametrize(
    "variables",
    [
        {
            **KAFKA,
            "PREFS_ENVIRONMENT": "dev_anna",
            "PREFS_KAFKA_BOOTSTRAP": "kafka:9092",
            "PREFS_KAFKA_TOPIC_VIEW_EVENTS": "views",
            "PREFS_PUBLISH": "changefeed",
            "PREFS_RAW_RETENTION_SECONDS": "3600",
            "PREFS_EXPIRY_SPREAD_SECONDS": "60",
        },
        {"PREFS_ENGINE_SCHEMA": "other"},
    ],
    ids=["another environment", "the embedded engine"],
)
def test_nothing_is_modified_where_only_settings_differ(
    variables: dict[str, str], folder: Path, parsed: dict[str, Any], run: Run
) -> None:
    selected = run(
        "ls",
        "--select",
        "state:modified",
        "--state",
        str(folder / "state"),
        target=variables.get("PREFS_ENVIRONMENT", "local"),
        **variables,
    )
    assert "No nodes selected" in selected or not selected.strip()


def test_docs_are_made_without_an_engine(folder: Path, parsed: dict[str, Any], run: Run) -> None:
    run("docs", "generate", "--no-compile", "--empty-catalog", **KAFKA)
    assert (folder / "state" / "index.html").is_file()
    assert (folder / "state" / "catalog.json").is_file()
