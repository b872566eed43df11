"""A RisingWave that is older than the project needs is refused in one sentence, before anything is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner
from scripted_wire import RisingWaveWire

from dagster_prefs.cli import cli
from dagster_prefs.defs import deployment, feature_views
from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.engine.dbt import Dbt, DbtError
from dagster_prefs.engine.version import EngineTooOld, require_version, server_version
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
SENTENCE = (
    "RisingWave at 127.0.0.1:{port} is {old}, and this project needs 3.0.2 or newer: before 3.0.2 its DynamoDB sink "
    "loses throttled writes and items of composite keys, and before 2.8 it reads durations in another unit. Nothing "
    "was changed: upgrade RisingWave, then run again"
)


def sentence(wire: RisingWaveWire) -> str:
    return SENTENCE.format(port=wire.engine.port, old=wire.version)


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RisingWaveWire]:
    """A server that the settings name, without a DynamoDB sink; one for all tests, so that dbt parses once."""
    with (
        RisingWaveWire("2.6.3", {r"nspname from pg_namespace": [("public",)]}) as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {
            "PREFS_ENGINE": "risingwave",
            "PREFS_ENGINE_PORT": str(made.engine.port),
            "PREFS_ENGINE_SSLMODE": "disable",
            "PREFS_PUBLISH": "changefeed",
            "PREFS_DATA_DIR": str(tmp_path_factory.mktemp("state")),
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        }.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture
def old(wire: RisingWaveWire) -> RisingWaveWire:
    wire.version = "2.6.3"
    wire.statements.clear()
    return wire


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_plan_and_apply_refuse_it(old: RisingWaveWire, command: str) -> None:
    answer = CliRunner().invoke(cli, [command])
    assert answer.exit_code == 1
    assert isinstance(answer.exception, EngineTooOld)
    assert str(answer.exception) == sentence(old)
    assert old.changes == []


@pytest.mark.parametrize("schema", ["public", "not_there_yet"])
def test_dbt_alone_refuses_it_in_the_same_words(old: RisingWaveWire, schema: str) -> None:
    platform = Platform(load_settings().model_copy(update={"engine_schema": schema}))
    with pytest.raises(DbtError) as caught:
        platform.dbt.run("run", ["raw_items"])
    assert str(caught.value).endswith(sentence(old))
    assert old.changes == []


def test_dagster_refuses_it_before_topics_and_table(old: RisingWaveWire) -> None:
    platform = Platform(load_settings())
    definitions = dg.Definitions.merge(
        feature_views.build(platform),
        deployment.build(platform),
        dg.Definitions(executor=dg.in_process_executor),
    )
    job = definitions.resolve_job_def(feature_views.EVENT_TABLES_JOB)
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(EngineTooOld) as caught:
        job.execute_in_process(instance=instance)
    assert str(caught.value) == sentence(old)
    assert old.changes == []


def test_a_server_that_is_new_enough_is_taken(wire: RisingWaveWire) -> None:
    wire.version = "3.0.2"
    platform = Platform(load_settings())
    results = platform.dbt.run("run", ["raw_items"])
    assert not [result.message for result in results if "this project needs" in result.message]
    assert any(text.startswith("create table if not exists public.deployments") for text in wire.changes)


@pytest.mark.parametrize(
    ("version", "taken"),
    [("3.0.1", False), ("2.9.0-alpha", False), ("3.0.3", True), ("3.1.0-rc.1", True), ("10.0.0", True)],
)
def test_versions_are_compared_as_numbers(wire: RisingWaveWire, version: str, taken: bool) -> None:
    wire.version = version
    platform = Platform(load_settings())
    with platform.engine.connect() as connection:
        if taken:
            require_version(connection, platform.engine, platform.dbt)
        else:
            with pytest.raises(EngineTooOld, match=f"is {version}, and this project needs"):
                require_version(connection, platform.engine, platform.dbt)


def test_the_embedded_engine_is_never_refused(engine: EngineConfiguration, tmp_path: Path) -> None:
    with engine.connect() as connection:
        require_version(connection, engine, Dbt(engine, PROJECT, tmp_path))


def test_what_is_no_risingwave_says_so(engine: EngineConfiguration) -> None:
    assert server_version("PostgreSQL 18.6 on x86_64") == (0, 0, 0)
    with pytest.raises(
        EngineUnavailable, match=r"is not RisingWave: check PREFS_ENGINE_HOST and PREFS_ENGINE_PORT"
    ):
        replace(engine, kind="risingwave").connect()


def test_the_suite_of_a_real_server_refuses_an_old_one(old: RisingWaveWire) -> None:
    suite = Path(__file__).parents[1] / "risingwave" / "test_risingwave_story.py"
    url = f"postgresql://root@127.0.0.1:{old.engine.port}/dev"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "PREFS_RISINGWAVE_URL": url}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "RisingWave-2.6.3 (abc), and the product needs 3.0.2: name a newer server" in done.stdout
    assert old.changes == []
