"""A world per test: the real dbt project full of events, published to DynamoDB and exported to Iceberg."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from built_state import BuiltState
from declared import PROJECT
from erased_world import MESSAGES, World
from relations import insert_events, instant, refresh
from shipped import TILE_TABLES
from streams import NOW

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days


@dataclass(frozen=True)
class Template:
    """A database to copy, and its views in the order of refresh."""

    engine: EngineConfiguration
    order: Sequence[str]


@pytest.fixture(scope="session")
def template(
    deployed_state: BuiltState, deployed_template: EngineConfiguration, copied_database: Callable[..., Any]
) -> Iterator[Template]:
    """The whole dbt project with every message read."""
    with copied_database("erasure_template", deployed_template, instant(NOW)) as engine:
        with engine.connect() as connection:
            insert_events(connection, MESSAGES)
            refresh(connection, deployed_state.views)
        yield Template(engine, deployed_state.views)


@pytest.fixture(scope="session")
def lake(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warehouse with every day exported, and a copy of it to go back to."""
    folder = tmp_path_factory.mktemp("lake")
    catalog = open_catalog("sqlite", (folder / "iceberg").as_uri())
    for spec in TILE_TABLES.values():
        for day in stale_days(template.engine, spec, exported_days(catalog, spec)):
            assert export_day(template.engine, catalog, spec, day).status == "written"
    shutil.copytree(folder / "iceberg", folder / "fresh")
    return folder


@pytest.fixture
def world(
    template: Template, lake: Path, aws_endpoint: str, copied_database: Callable[..., Any]
) -> Iterator[World]:
    """Everything built: events read, views fresh, items published, days exported."""
    # Tables name their files by their path, so every test has its warehouse at the same place.
    shutil.rmtree(lake / "iceberg")
    shutil.copytree(lake / "fresh", lake / "iceberg")
    client = dynamodb_client(aws_endpoint, "eu-central-1")
    with copied_database("erasure", template.engine, instant(NOW)) as engine, engine.connect() as connection:
        made = World(
            engine,
            connection,
            template.order,
            client,
            provision(client, load_contract(PROJECT))["viewer"],
            lake / "iceberg",
        )
        made.publish()
        yield made
