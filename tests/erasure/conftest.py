"""A world per test: the real dbt project full of events, published to DynamoDB and exported to Iceberg."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from forgotten_world import MESSAGES, World
from psycopg import sql
from relations import insert_events, instant, materialized_views, refresh
from streams import NOW

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.local.services import LocalServices
from dagster_prefs.offline.catalog import open_catalog
from dagster_prefs.offline.export import export_day, exported_days, stale_days
from dagster_prefs.offline.tables import TILE_TABLES
from dagster_prefs.online.contract import load_contract
from dagster_prefs.online.tables import dynamodb_client, provision

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"


@pytest.fixture(scope="session")
def server(services: LocalServices) -> EngineConnection:
    return EngineConnection("127.0.0.1", services.postgres_port, "postgres", "prefs")


@dataclass(frozen=True)
class Template:
    """A database to copy, and its views in the order of refresh."""

    database: str
    order: Sequence[str]


@pytest.fixture(scope="session")
def template(server: EngineConnection, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The whole dbt project with every message read."""
    name = f"erasure_{uuid.uuid4().hex[:8]}"
    with server.connect() as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    engine = server.with_database(name)
    dbt = Dbt(engine, PROJECT, tmp_path_factory.mktemp("dbt"))
    failed = [f"{result.name}: {result.message}" for result in dbt.run("run") if not result.ok]
    assert failed == []
    order = materialized_views(dbt.manifest())
    with server.connect() as connection:
        connection.execute(
            sql.SQL("alter database {} set prefs.clock = {}").format(
                sql.Identifier(name), sql.Literal(instant(NOW).isoformat())
            )
        )
    with engine.connect() as connection:
        insert_events(connection, MESSAGES)
        refresh(connection, order)
    return Template(name, order)


@pytest.fixture(scope="session")
def lake(template: Template, server: EngineConnection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warehouse with every day exported, and a copy of it to go back to."""
    folder = tmp_path_factory.mktemp("lake")
    catalog = open_catalog("sqlite", (folder / "iceberg").as_uri())
    engine = server.with_database(template.database)
    for spec in TILE_TABLES.values():
        for day in stale_days(engine, spec, exported_days(catalog, spec)):
            assert export_day(engine, catalog, spec, day).status == "written"
    shutil.copytree(folder / "iceberg", folder / "fresh")
    return folder


@pytest.fixture
def world(server: EngineConnection, template: Template, lake: Path, aws_endpoint: str) -> Iterator[World]:
    """Everything built: events read, views fresh, items published, days exported."""
    name = f"test_{uuid.uuid4().hex}"
    # Tables name their files by their path, so every test has its warehouse at the same place.
    shutil.rmtree(lake / "iceberg")
    shutil.copytree(lake / "fresh", lake / "iceberg")
    with server.connect() as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template.database)
            )
        )
        connection.execute(
            sql.SQL("alter database {} set prefs.clock = {}").format(
                sql.Identifier(name), sql.Literal(instant(NOW).isoformat())
            )
        )
    engine = server.with_database(name)
    client = dynamodb_client(aws_endpoint, "eu-central-1")
    with engine.connect() as connection:
        connection.execute("set synchronous_commit to off")
        made = World(
            engine, connection, template.order, client, provision(client, load_contract()), lake / "iceberg"
        )
        made.publish()
        yield made
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
