"""Retention of runs: Dagster's own retention covers only ticks, and the readings of every five minutes accumulate."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as db

from dagster_prefs.defs import deployment, events, feature_views, freshness, lake, training_data, values
from dagster_prefs.defs.resources import job_schedule, run_tags
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

JOB = "delete_old_readings"
# The jobs that schedules and sensors start repeatedly. Exports of tiles are not included: their materializations show
# in the UI which days exist.
RECURRING = (
    freshness.JOB,
    feature_views.REFRESH_JOB,
    feature_views.TESTS_JOB,
    events.CATCH_UP_JOB,
    deployment.JOB,
    training_data.PARITY_JOB,
    training_data.MAINTENANCE_JOB,
    values.JOB,
    lake.JOB,
    JOB,
)
FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
# Number of runs to delete per query, so that a backlog does not need more memory.
BATCH = 100


def build(platform: Platform, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dg.Definitions:
    """Return the job that deletes old runs, and its hourly schedule. `clock` returns the time in UTC."""
    settings = platform.settings
    days, most = settings.readings_kept_days, settings.kept_runs

    @dg.op(
        name=settings.dagster_name("delete_readings"),
        description=f"Delete runs of recurring jobs that are older than {days} days (PREFS_READINGS_KEPT_DAYS), or "
        f"beyond the last {most} of their job (PREFS_READINGS_KEPT_RUNS).",
    )
    def delete_readings(context: dg.OpExecutionContext) -> None:
        deleted = delete_runs(context.instance, settings, before=clock() - timedelta(days=days), most=most)
        context.log.info(f"deleted {deleted} runs")

    @dg.job(
        name=settings.dagster_name(JOB),
        tags=run_tags(settings),
        description=f"Keep {days} days, and {most} runs, of freshness readings and the like.",
    )
    def delete_old_readings() -> None:
        delete_readings()

    return dg.Definitions(
        jobs=[delete_old_readings],
        schedules=[
            job_schedule(
                settings,
                "delete_old_readings_hourly",
                delete_old_readings,
                "40 * * * *",
                "Deletes runs that are too old to be plotted, so that Dagster's storage is bounded.",
            )
        ],
    )


def delete_runs(instance: dg.DagsterInstance, settings: Settings, *, before: datetime, most: int) -> int:
    """Delete finished runs of this platform's recurring jobs, and return their number. Safe to repeat.

    Of each job the newest run stays, and the others that are no older than `before` (UTC) and among the last `most`.
    With a run, its events, observations, check evaluations and files are deleted, except the last evaluation of each
    check, which the UI shows.
    """
    deleted = 0
    for job in RECURRING:
        finished = dg.RunsFilter(
            job_name=settings.dagster_name(job), tags=run_tags(settings), statuses=FINISHED
        )
        newest = instance.get_run_records(finished, limit=most)
        if not newest:
            continue
        kept = [newest[0], *(record for record in newest[1:] if record.create_timestamp >= before)]
        cursor = kept[-1].dagster_run.run_id
        while found := instance.get_run_records(finished, limit=BATCH, cursor=cursor):
            runs = [record.dagster_run.run_id for record in found]
            # First, because a repetition finds only runs that are not deleted.
            _delete_check_history(instance, runs)
            for run in runs:
                instance.delete_run(run)
                _delete_files(instance, run)
            deleted += len(runs)
    return deleted


def _delete_check_history(instance: dg.DagsterInstance, runs: Sequence[str]) -> None:
    """Delete the evaluations of checks in these runs, except the last one of each check.

    Dagster 1.13 has no call for it: `delete_run` leaves them, and `wipe_assets` deletes the materializations too.
    """
    storage: Any = instance.event_log_storage
    statement = db.text(
        "delete from asset_check_executions where run_id in :runs"
        " and id not in (select max(id) from asset_check_executions group by asset_key, check_name)"
    ).bindparams(db.bindparam("runs", expanding=True))
    with storage.index_connection() as connection:
        connection.execute(statement, {"runs": list(runs)})


def _delete_files(instance: dg.DagsterInstance, run: str) -> None:
    """Delete the files that `delete_run` leaves: the output of a run's processes, and its events' SQLite file."""
    instance.compute_log_manager.delete_logs(prefix=[run])
    for file in Path(instance.root_directory, "history", "runs").glob(f"{run}.db*"):
        file.unlink(missing_ok=True)
