"""The refresh as Dagster runs it: what starts it, what it reports, and what happens when a service is gone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from relations import insert_events
from streams import MIDNIGHT, watch

from dagster_prefs.defs import events
from dagster_prefs.defs.assembly import build_definitions
from dagster_prefs.defs.events import CATCH_UP_JOB, NEW_EVENTS_SENSOR
from dagster_prefs.defs.feature_views import REFRESH_JOB
from dagster_prefs.defs.resources import run_tags
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.live.follower import Follower, Work
from dagster_prefs.live.presence import read_follower
from dagster_prefs.platform import Platform
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


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as made:
        yield made


def run(
    definitions: dg.Definitions,
    job: str,
    instance: dg.DagsterInstance,
    config: Mapping[str, Any] | None = None,
) -> dg.ExecuteInProcessResult:
    return definitions.resolve_job_def(job).execute_in_process(
        instance=instance, raise_on_error=False, run_config={**QUIET, **(config or {})}
    )


def evaluate(definitions: dg.Definitions, instance: dg.DagsterInstance) -> object:
    sensor = definitions.get_repository_def().get_sensor_def(NEW_EVENTS_SENSOR)
    return sensor(dg.build_sensor_context(instance=instance))


def test_arriving_events_are_applied_by_one_run_where_nobody_follows(
    settings: Settings, deployed: EngineConfiguration, instance: dg.DagsterInstance
) -> None:
    definitions = events.build(Platform(settings))
    hourly = definitions.get_repository_def().get_schedule_def("catch_up_hourly")

    def due() -> object:
        return hourly(dg.build_schedule_context(instance=instance))

    assert isinstance(evaluate(definitions, instance), dg.SkipReason)
    assert isinstance(due(), dg.RunRequest), "windows move without events"

    with deployed.connect() as connection:
        insert_events(connection, [watch(number, number % 3, MIDNIGHT) for number in range(7)])
        request = evaluate(definitions, instance)
        assert isinstance(request, dg.RunRequest)
        # The same arrivals give the same key, for which Dagster starts a run only once.
        again = evaluate(definitions, instance)
        assert isinstance(again, dg.RunRequest)
        assert again.run_key == request.run_key

        job = definitions.resolve_job_def(CATCH_UP_JOB)
        foreign = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        assert isinstance(due(), dg.RunRequest), "another team's job of the same name"
        at_work = instance.create_run_for_job(
            job, status=dg.DagsterRunStatus.STARTED, tags=run_tags(settings)
        )
        for skipped in (evaluate(definitions, instance), due()):
            assert isinstance(skipped, dg.SkipReason)
            assert "is active" in (skipped.skip_message or "")
        instance.report_run_failed(at_work)
        instance.report_run_failed(foreign)

        assert run(definitions, CATCH_UP_JOB, instance).success
        assert isinstance(evaluate(definitions, instance), dg.SkipReason)
        watched = Platform(settings).dynamodb().scan(TableName="viewer_profiles")["Items"]
        assert {item["viewer_id"]["N"] for item in watched} == {"0", "1", "2"}

        stop = threading.Event()
        follower = Follower(deployed, lambda: Work(settings.registry(), lambda *_: None), process="the test")
        thread = threading.Thread(target=follower.run, args=[stop])
        thread.start()
        try:
            while read_follower(connection, deployed) is None:
                stop.wait(0.02)
            for skipped in (evaluate(definitions, instance), due()):
                assert isinstance(skipped, dg.SkipReason)
                assert "a follower applies them: the test follows" in (skipped.skip_message or "")
        finally:
            stop.set()
            thread.join()


def test_a_materialization_applies_a_changed_definition_and_never_polls(
    settings: Settings, deployed: EngineConfiguration, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """What a click on one view does: nothing, where its definition is deployed; all of it, where it is not.

    The step's disk has nothing of what the code location made when it loaded, as in a container of its own.
    """
    view = "viewer_watch_metrics_1d"
    settings = settings.model_copy(update={"asset_prefix": "team/clicks", "data_dir": tmp_path / "new"})
    # With two upstream relations, of which the first by name is not the first to be made.
    names = (view, "view_events", "view_events_parsed")
    job = dg.define_asset_job("one", dg.AssetSelection.assets(*(["team", "clicks", name] for name in names)))
    definitions = dg.Definitions.merge(build_definitions(settings), dg.Definitions(jobs=[job]))
    shutil.rmtree(settings.data_dir)

    with deployed.connect() as connection:

        def materialize(config: Mapping[str, Any] | None = None) -> tuple[int, str]:
            """The rows afterwards, and what is told of dbt."""
            result = run(definitions, "one", instance, config)
            assert result.success
            made = {
                str(event.asset_key and event.asset_key.to_user_string()): event.materialization.metadata
                for event in result.get_asset_materialization_events()
            }
            assert list(made) == [
                f"team/clicks/{name}" for name in ("view_events_parsed", "view_events", view)
            ]
            metadata = made[f"team/clicks/{view}"]
            ((rows,),) = connection.execute(f"select count(*) from {view}").fetchall()
            assert metadata["dagster/row_count"].value == rows
            return rows, str(metadata["dbt"].value)

        insert_events(connection, [watch(number, number, MIDNIGHT) for number in range(3)])
        Platform(settings).refresh()
        insert_events(connection, [watch(9, 9, MIDNIGHT)])
        connection.execute(f"delete from {view} where viewer_id = 0")
        assert materialize() == (2, "its definition is already applied")
        # From everything, the event too that nobody has applied.
        assert materialize({"ops": {"team_clicks_dbt_models": {"config": {"rebuild": True}}}})[0] == 4
        connection.execute(f"delete from {view} where viewer_id = 0")
        connection.execute(
            "update deployments set checksum = 'another', definition = 'select 1' where relation = %s", [view]
        )
        assert materialize()[0] == 4


def test_a_missing_service_fails_the_run_with_a_sentence_and_keeps_the_views(
    settings: Settings, deployed: EngineConfiguration, instance: dg.DagsterInstance, free_port: object
) -> None:
    closed = settings.model_copy(update={"aws_endpoint_url": f"http://127.0.0.1:{free_port()}"})  # type: ignore[operator]
    definitions = build_definitions(closed)
    with deployed.connect() as connection:
        insert_events(connection, [watch(1, 1, MIDNIGHT)])
    result = run(definitions, REFRESH_JOB, instance)
    assert not result.success
    errors = [
        event.step_failure_data.error.to_string()
        for event in result.all_events
        if event.is_step_failure and event.step_failure_data.error
    ]
    assert any("127.0.0.1" in error for error in errors)
