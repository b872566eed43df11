"""A database with every model deployed, made once and copied for each test."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg import sql
from relations import instant
from streams import NOW
from workshop import PROJECT, Workshop, assert_all_ok

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.local.services import LocalServices


@pytest.fixture(scope="session")
def dbt_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One target folder for the session, so that dbt parses the project once."""
    return tmp_path_factory.mktemp("dbt-target")


@pytest.fixture(scope="session")
def deployed_template(services: LocalServices, dbt_target: Path) -> Iterator[EngineConnection]:
    """A database in which `dbt run` has made every relation, empty of events."""
    server = EngineConnection(
        host="127.0.0.1", port=services.postgres_port, database="postgres", user="prefs", kind="local"
    )
    name = f"template_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    template = server.with_database(name)
    assert_all_ok(Dbt(template, PROJECT, dbt_target).run("run"))
    yield template
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def deployed(deployed_template: EngineConnection) -> Iterator[EngineConnection]:
    """A database of its own with every relation deployed, no event in it, and its clock at NOW."""
    server = deployed_template.with_database("postgres")
    name = f"deployed_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(deployed_template.database)
            )
        )
        # The streams of these tests happen around one moment; the database's clock stands there.
        connection.execute(
            sql.SQL("alter database {} set prefs.clock = {}").format(
                sql.Identifier(name), sql.Literal(instant(NOW).isoformat())
            )
        )
    yield server.with_database(name)
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def project_copy(tmp_path: Path) -> Path:
    """A copy of the dbt project that a test may change."""
    copy = tmp_path / "dbt_project"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns("target", "logs"))
    return copy


@pytest.fixture(scope="session")
def _workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("workshop") / "dbt_project"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns("target", "logs"))
    return copy


@pytest.fixture
def workshop(_workshop: Path) -> Iterator[Workshop]:
    """The copy, as the project is; changes are undone afterwards."""
    made = Workshop(_workshop)
    yield made
    made.restore()


@pytest.fixture
def dbt_on(dbt_target: Path) -> Callable[..., Dbt]:
    """`dbt_on(engine, project=PROJECT, environment={})`: the project against a database."""

    def make(
        engine: EngineConnection, project: Path = PROJECT, environment: dict[str, str] | None = None
    ) -> Dbt:
        target = dbt_target if project == PROJECT else project / "target"
        return Dbt(engine, project, target, environment)

    return make
