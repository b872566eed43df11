"""Databases of one's own on the RisingWave server that PREFS_RISINGWAVE_URL names."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import yaml
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, NodeResult
from dagster_prefs.engine.version import server_version

URL = os.environ.get("PREFS_RISINGWAVE_URL", "")
NO_SERVER = "PREFS_RISINGWAVE_URL names no RisingWave server"
PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
PATIENCE = timedelta(minutes=3)
# In this order, because what comes later is read by what comes before.
KINDS = ("sink", "subscription", "view", "materialized view", "table", "source")


def server_of(url: str) -> EngineConfiguration:
    """The server that PREFS_RISINGWAVE_URL names, at its own database."""
    parts = urlsplit(url)
    return EngineConfiguration(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or 4566,
        database=parts.path.strip("/") or "dev",
        user=parts.username or "root",
        password=parts.password or "",
        kind="risingwave",
    )


def refuse_old_server(url: str) -> None:
    """Fail on a server that is older than the product requires: green there would mean nothing."""
    project = yaml.safe_load((PROJECT / "dbt_project.yml").read_text())
    needed = project["vars"]["requires_risingwave"]["version"]
    with server_of(url).connect() as connection:
        ((text,),) = connection.execute("select version()").fetchall()
    if server_version(text) < tuple(map(int, needed.split("."))):
        pytest.fail(f"PREFS_RISINGWAVE_URL names {text}, and the product needs {needed}: name a newer server")


@contextmanager
def database() -> Iterator[EngineConfiguration]:
    """An empty database, dropped with all that is in it afterwards."""
    server = server_of(URL)
    name = f"prefs_{uuid.uuid4().hex[:12]}"
    with server.connect() as connection:
        connection.execute(f"create database {name}")
    try:
        yield server.with_database(name)
    finally:
        with server.with_database(name).connect() as connection:
            empty(connection)
        with server.connect() as connection:
            connection.execute(f"drop database {name}")


def empty(connection: psycopg.Connection[Any]) -> None:
    """Drop every relation and secret of the current database."""
    for kind in KINDS:
        for schema, name in connection.execute(
            "select s.name, r.name from rw_catalog.rw_relations r join rw_catalog.rw_schemas s on s.id = r.schema_id"
            " where r.relation_type = %s and s.name not in ('rw_catalog', 'pg_catalog', 'information_schema')",
            (kind,),
        ).fetchall():
            drop = sql.SQL("drop {} if exists {} cascade").format(sql.SQL(kind), sql.Identifier(schema, name))
            connection.execute(drop)
    for schema, name in connection.execute(
        "select n.name, s.name from rw_catalog.rw_secrets s join rw_catalog.rw_schemas n on n.id = s.schema_id"
    ).fetchall():
        connection.execute(sql.SQL("drop secret {}").format(sql.Identifier(schema, name)))


def run(dbt: Dbt, *select: str) -> dict[str, NodeResult]:
    """`dbt run` of what is selected, all of which must succeed; model → its result."""
    results = dbt.run("run", select)
    assert [f"{result.name}: {result.message}" for result in results if not result.ok] == []
    return {result.name: result for result in results}


def engine_settings(engine: EngineConfiguration) -> dict[str, str]:
    """The environment by which the platform finds this engine."""
    return {
        "PREFS_ENGINE": "risingwave",
        "PREFS_ENGINE_HOST": engine.host,
        "PREFS_ENGINE_PORT": str(engine.port),
        "PREFS_ENGINE_DATABASE": engine.database,
        "PREFS_ENGINE_USER": engine.user,
        "PREFS_ENGINE_PASSWORD": engine.password,
    }


def refused(dbt: Dbt, model: str) -> str:
    """What `dbt run` says of a model that it must refuse."""
    (result,) = [result for result in dbt.run("run", [model]) if result.name == model]
    assert result.status == "error", result
    return result.message


def skipped(results: dict[str, NodeResult]) -> bool:
    """Whether a run says of every model that it changed nothing."""
    models = [result for result in results.values() if result.unique_id.startswith("model.")]
    return bool(models) and all(result.message.lower().startswith("skip") for result in models)


def until(condition: Callable[[], bool], what: Callable[[], Any]) -> None:
    """Wait for a condition; `what` says how things stand when it does not come."""
    pause = threading.Event()
    deadline = datetime.now(UTC) + PATIENCE
    while not condition():
        assert datetime.now(UTC) < deadline, what()
        pause.wait(0.5)


def rows(engine: EngineConfiguration, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return connection.execute(query, parameters or None).fetchall()
