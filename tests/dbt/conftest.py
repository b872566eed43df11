"""A copy of the database with every model deployed for each test, and copies of the project to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from relations import instant
from streams import NOW
from workshop import PROJECT, Workshop

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt


@pytest.fixture(scope="session")
def dbt_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target folders of the session, so that dbt parses the project once for each database and environment."""
    return tmp_path_factory.mktemp("dbt-target")


@pytest.fixture
def engine(
    embedded_server: EngineConfiguration, copied_database: Callable[..., Any]
) -> Iterator[EngineConfiguration]:
    """An empty database, like everybody's, but of the same name in every test; see `deployed`."""
    with copied_database("undeployed", embedded_server.with_database("template1")) as made:
        yield made


@pytest.fixture
def deployed(
    deployed_template: EngineConfiguration, copied_database: Callable[..., Any]
) -> Iterator[EngineConfiguration]:
    """A database of its own with every relation deployed, no event in it, and its clock at NOW.

    The streams of these tests happen around that moment. Its name is the same in every test, because dbt parses the
    whole project again wherever it is another.
    """
    with copied_database("deployed", deployed_template, instant(NOW)) as engine:
        yield engine


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
        engine: EngineConfiguration, project: Path = PROJECT, environment: dict[str, str] | None = None
    ) -> Dbt:
        # dbt parses everything again where a target folder was another database's or environment's.
        kind = "-".join(
            [engine.database, *(f"{name}={value}" for name, value in (environment or {}).items())]
        )
        target = dbt_target / kind if project == PROJECT else project / "target"
        return Dbt(engine, project, target, environment)

    return make
