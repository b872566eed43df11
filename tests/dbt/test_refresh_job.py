"""The refresh as Dagster runs it: what starts it, what it reports, and what happens when a service is gone."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from relations import insert_events
from streams import MIDNIGHT, watch

from dagster_prefs.defs.assembly import build_definitions
from dagster_prefs.defs.feature_views import REFRESH_JOB
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.settings import Settings, load_settings

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: dbt parses the project once."""
    return tmp_path_factory.mktemp("refresh")


@pytest.fixture
def settings(
    deployed: EngineConfiguration, aws_endpoint: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    for name, value in {
        "PREFS_DATA_DIR": str(data_dir),
        "PREFS_ENGINE_PORT": str(deployed.port),
        "PREFS_ENGINE_DATABASE": deployed.database,
        "AWS_ENDPOINT_URL": aws_endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def refresh(definitions: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = definitions.resolve_job_def(REFRESH_JOB)
    return job.execute_in_process(instance=instance, raise_on_error=False, run_config=QUIET)


def evaluate(definitions: dg.Definitions, instance: dg.DagsterInstance) -> object:
    (sensor,) = [sensor for sensor in definitions.sensors or () if sensor.name == "new_events"]
    assert isinstance(sensor, dg.SensorDefinition)
    return sensor(dg.build_sensor_context(instance=instance))


def test_arriving_events_start_one_refresh_that_publishes_them(
    settings: Settings, deployed: EngineConfiguration
) -> None:
    definitions = build_definitions(settings)
    with dg.DagsterInstance.ephemeral() as instance:
        assert isinstance(evaluate(definitions, instance), dg.SkipReason)

        with deployed.connect() as connection:
            insert_events(connection, [watch(number, number % 3, MIDNIGHT) for number in range(7)])
        request = evaluate(definitions, instance)
        assert isinstance(request, dg.RunRequest)
        # The same arrivals give the same key, for which Dagster starts a run only once.
        again = evaluate(definitions, instance)
        assert isinstance(again, dg.RunRequest)
        assert again.run_key == request.run_key

        result = refresh(definitions, instance)
        assert result.success
        assert isinstance(evaluate(definitions, instance), dg.SkipReason)

        published = {
            event.asset_key.path[-1]: event.materialization.metadata["upserts"].value
            for event in result.get_asset_materialization_events()
            if event.asset_key is not None and event.asset_key.path[0] == "online"
        }
        assert published == {"watch": 3, "preferences": 3, "interactions": 0}
        checks = {
            evaluation.asset_key.to_user_string(): evaluation.passed
            for evaluation in result.get_asset_check_evaluations()
            if evaluation.check_name == "everything_published"
        }
        assert checks == {"online/watch": True, "online/preferences": True, "online/interactions": True}

        second = refresh(definitions, instance)
        assert second.success
        assert all(
            event.materialization.metadata["upserts"].value == 0
            for event in second.get_asset_materialization_events()
            if event.asset_key is not None and event.asset_key.path[0] == "online"
        )


def test_a_missing_service_fails_the_run_with_a_sentence_and_keeps_the_views(
    settings: Settings, deployed: EngineConfiguration, free_port: object
) -> None:
    closed = settings.model_copy(update={"aws_endpoint_url": f"http://127.0.0.1:{free_port()}"})  # type: ignore[operator]
    definitions = build_definitions(closed)
    with deployed.connect() as connection:
        insert_events(connection, [watch(1, 1, MIDNIGHT)])
    with dg.DagsterInstance.ephemeral() as instance:
        result = refresh(definitions, instance)
    assert not result.success
    errors = [
        event.step_failure_data.error.to_string()
        for event in result.all_events
        if event.is_step_failure and event.step_failure_data.error
    ]
    assert any("127.0.0.1" in error for error in errors)
