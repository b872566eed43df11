"""Old readings leave Dagster's event log, on both of its stores, and nothing else does."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from dagster_prefs.defs import retention
from dagster_prefs.defs.freshness import JOB
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.local.services import LocalServices
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

KEY = dg.AssetKey(["online", "watch"])
CHECK = dg.AssetCheckKey(KEY, "freshness")


@pytest.fixture(params=["sqlite", "production"])
def instance(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    if request.param == "sqlite":
        with dg.DagsterInstance.local_temp(str(tmp_path)) as made:
            yield made
        return
    engine: EngineConfiguration = request.getfixturevalue("engine")
    services: LocalServices = request.getfixturevalue("services")
    for name, value in {
        "HOST": engine.host,
        "PORT": str(engine.port),
        "DATABASE": engine.database,
        "USER": engine.user,
        "PASSWORD": services.passfile.read_text().rpartition(":")[2].strip(),
    }.items():
        monkeypatch.setenv(f"DAGSTER_PG_{name}", value)
    shutil.copy(Path(__file__).parents[2] / "infra" / "dagster" / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as made:
        yield made


@dg.op
def read(context: dg.OpExecutionContext) -> None:
    context.log_event(dg.AssetObservation(KEY, metadata={"lag_seconds": 1.0}))


@dg.job(name=JOB)
def readings() -> None:
    read()


@dg.job
def other() -> None:
    read()


def report(instance: dg.DagsterInstance, passed: bool) -> None:
    """What a sensor reports at one tick."""
    instance.report_runless_asset_event(dg.AssetObservation(KEY, metadata={"lag_seconds": 2.0}))
    instance.report_runless_asset_event(dg.AssetCheckEvaluation(KEY, CHECK.name, passed))


def test_readings_are_deleted_and_nothing_else(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    assert readings.execute_in_process(instance=instance).success
    kept = other.execute_in_process(instance=instance)
    instance.report_runless_asset_event(dg.AssetMaterialization(KEY))
    for passed in (True, True, False):
        report(instance, passed)

    def left() -> tuple[int, int, int]:
        checks = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=10)
        observed = instance.fetch_observations(KEY, limit=10).records
        return instance.get_runs_count(), len(observed), len(checks)

    assert left() == (2, 5, 3)
    now = datetime.now(UTC)
    assert retention.delete_readings_before(instance, now - timedelta(days=1)) == (0, 0)
    assert left() == (2, 5, 3)

    settings = Settings(data_dir=tmp_path, readings_kept_days=14)
    later = retention.build(Platform(settings), clock=lambda: now + timedelta(days=14, minutes=1))
    assert later.resolve_job_def(retention.JOB).execute_in_process(instance=instance).success
    # The job's own run came on top, the run of the readings went.
    assert left() == (2, 1, 1)
    (last,) = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=10)
    assert last.event is not None
    assert last.event.dagster_event is not None
    assert not last.event.dagster_event.asset_check_evaluation_data.passed, "the level that is shown stays"
    assert instance.fetch_observations(KEY, limit=1).records[0].run_id == kept.run_id
    assert len(instance.fetch_materializations(KEY, limit=10).records) == 1
    assert retention.delete_readings_before(instance, now + timedelta(minutes=1)) == (0, 0)
