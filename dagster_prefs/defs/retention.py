"""Retention of readings: Dagster's own retention covers only ticks, and one reading per minute adds up."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
import sqlalchemy as db
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

from dagster_prefs.defs.freshness import CHECKS
from dagster_prefs.defs.freshness import JOB as CHECKS_JOB
from dagster_prefs.defs.resources import schedule_status
from dagster_prefs.platform import Platform

JOB = "delete_old_readings"
# Number of runs to delete per query, so that a backlog does not need more memory.
BATCH = 500
# Dagster stores events that belong to no run, such as a sensor's, under this run id.
NO_RUN = ""


def build(platform: Platform, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dg.Definitions:
    """Return the job that deletes old readings, and its daily schedule. `clock` returns the time in UTC."""
    days = platform.settings.readings_kept_days

    @dg.op(description=f"Delete freshness readings older than {days} days (PREFS_READINGS_KEPT_DAYS).")
    def delete_readings(context: dg.OpExecutionContext) -> None:
        runs, events = delete_readings_before(context.instance, clock() - timedelta(days=days))
        context.log.info(f"deleted {runs} runs of {CHECKS_JOB} and {events} readings of sensors")

    @dg.job(name=JOB, description=f"Keep {days} days of freshness readings in Dagster's event log.")
    def delete_old_readings() -> None:
        delete_readings()

    return dg.Definitions(
        jobs=[delete_old_readings],
        schedules=[
            dg.ScheduleDefinition(
                name="delete_old_readings_daily",
                job=delete_old_readings,
                cron_schedule="40 3 * * *",
                execution_timezone="UTC",
                default_status=schedule_status(platform),
                description="Deletes freshness readings that are too old to be plotted.",
            )
        ],
    )


def delete_readings_before(instance: dg.DagsterInstance, before: datetime) -> tuple[int, int]:
    """Delete readings older than `before` (UTC). Returns the numbers of runs and of events without a run.

    These are the finished runs of the freshness job with their events, what sensors observed and evaluated,
    and the history of the freshness checks except the last evaluation of each. Other runs and events stay.
    Safe to repeat.
    """
    old = dg.RunsFilter(
        job_name=CHECKS_JOB,
        statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED],
        created_before=before,
    )
    runs = 0
    while found := instance.get_run_records(old, limit=BATCH):
        for record in found:
            instance.delete_run(record.dagster_run.run_id)
        runs += len(found)
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        raise dg.Failure(f"{type(storage).__name__} keeps no SQL event log: configure its own retention")
    moment = before.astimezone(UTC).replace(tzinfo=None)
    log, checks = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c
    kinds = (dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    readings = db.and_(
        log.run_id == NO_RUN,
        log.timestamp < moment,
        log.dagster_event_type.in_([kind.value for kind in kinds]),
    )
    with storage.index_connection() as connection:
        connection.execute(
            AssetEventTagsTable.delete().where(
                AssetEventTagsTable.c.event_id.in_(db.select(log.id).where(readings))
            )
        )
        events = connection.execute(SqlEventLogStorageTable.delete().where(readings)).rowcount
        last = db.select(db.func.max(checks.id)).group_by(checks.asset_key, checks.check_name)
        connection.execute(
            AssetCheckExecutionsTable.delete().where(
                checks.check_name.in_({name for name, _ in CHECKS.values()}),
                checks.create_timestamp < moment,
                checks.id.not_in(last),
            )
        )
    # SQLite stores a second copy of events without a run; on a single database this finds nothing.
    with storage.run_connection(NO_RUN) as connection:
        connection.execute(SqlEventLogStorageTable.delete().where(readings))
    return runs, events
