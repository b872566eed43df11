"""Old runs leave Dagster with all that they stored, on both of its stores, and nothing else does."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from dagster_prefs.defs import retention
from dagster_prefs.defs.freshness import JOB
from dagster_prefs.defs.resources import asset_job
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


@dg.multi_asset_check(specs=[dg.AssetCheckSpec(CHECK.name, asset=KEY)])
def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
    context.op_execution_context.log_event(dg.AssetObservation(KEY, metadata={"lag_seconds": 1.0}))
    yield dg.AssetCheckResult(asset_key=KEY, check_name=CHECK.name, passed=True)


@dg.op
def read(context: dg.OpExecutionContext) -> None:
    context.log_event(dg.AssetObservation(KEY, metadata={"lag_seconds": 1.0}))


# Of another team in the same deployment.
@dg.job(name=JOB)
def other() -> None:
    read()


READINGS = dg.Definitions(
    asset_checks=[check],
    jobs=[asset_job(Settings(), JOB, dg.AssetSelection.checks(check), "Read.")],
    executor=dg.in_process_executor,
).resolve_job_def(JOB)


def run_readings(instance: dg.DagsterInstance, times: int) -> list[str]:
    """What the schedule of the freshness job starts."""
    return [READINGS.execute_in_process(instance=instance).run_id for _ in range(times)]


def left(instance: dg.DagsterInstance) -> tuple[int, int, int]:
    """The runs, the observations and the evaluations of the check that the instance holds."""
    checks = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=100)
    observed = instance.fetch_observations(KEY, limit=100).records
    return instance.get_runs_count(), len(observed), len(checks)


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_old_runs_are_deleted_and_no_others(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    first, *_, newest = run_readings(instance, 3)
    kept = other.execute_in_process(instance=instance)
    instance.report_runless_asset_event(dg.AssetMaterialization(KEY))
    assert left(instance) == (4, 4, 3)
    now = datetime.now(UTC)
    assert retention.delete_runs(instance, Settings(), before=now - timedelta(days=1), most=3) == 0
    assert left(instance) == (4, 4, 3)
    assert retention.delete_runs(instance, Settings(), before=now - timedelta(days=1), most=2) == 1
    assert left(instance) == (3, 3, 2), "the oldest is one too many"
    assert not list(Path(instance.root_directory).rglob(f"*{first}*")), "its files went too"

    settings = Settings(data_dir=tmp_path, readings_kept_days=14)
    later = retention.build(Platform(settings), clock=lambda: now + timedelta(days=14, minutes=1))
    assert later.resolve_job_def(retention.JOB).execute_in_process(instance=instance).success
    # The job's own run came on top; of the readings the newest is left, with the level that is shown.
    assert left(instance) == (3, 2, 1)
    (last,) = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=10)
    assert last.run_id == newest
    assert {one.run_id for one in instance.fetch_observations(KEY, limit=9).records} == {newest, kept.run_id}
    assert len(instance.fetch_materializations(KEY, limit=10).records) == 1
    assert retention.delete_runs(instance, Settings(), before=now + timedelta(minutes=1), most=1) == 0


def test_what_dagster_stores_is_bounded_by_the_runs_that_are_kept(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        sizes = []
        for times in (2, 1, 1, 1):
            run_readings(instance, times)
            retention.delete_runs(instance, Settings(), before=datetime.now(UTC) - timedelta(days=1), most=2)
            sizes.append(stored_bytes(tmp_path))
    # The second round is the first that holds three runs at once. SQLite takes whole pages.
    assert max(sizes[2:]) <= sizes[1] + 4 * 4096, sizes
