"""Shared parts of the definitions: asset keys, and whether schedules and sensors start automatically."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import dagster as dg

from dagster_prefs.declarations.contract import Table
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform

TRAINING_TABLES_KEY = dg.AssetKey(["training", "tables"])


UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def is_at_work(instance: dg.DagsterInstance, job: str, *, since: datetime) -> bool:
    """Return whether an unfinished run of a job was created after `since` (UTC)."""
    running = dg.RunsFilter(job_name=job, statuses=UNFINISHED, created_after=since)
    return bool(instance.get_run_records(running, limit=1))


def refresh_embedded(platform: Platform, log: Callable[[str], None]) -> None:
    """Apply and publish all that has arrived on the embedded engine, as `prefs refresh` does.

    Raises Failure with the reason and the remedy.
    """
    try:
        log(platform.refresh(log))
    except PrefsError as error:
        raise dg.Failure(description=str(error)) from error


def table_key(table: Table) -> dg.AssetKey:
    """Return the asset of a DynamoDB table."""
    return dg.AssetKey(["dynamodb", table.name])


def schedule_status(platform: Platform) -> dg.DefaultScheduleStatus:
    """Return the default status of schedules: running only if the environment requests it."""
    on = platform.settings.schedules == "on"
    return dg.DefaultScheduleStatus.RUNNING if on else dg.DefaultScheduleStatus.STOPPED


def sensor_status(platform: Platform) -> dg.DefaultSensorStatus:
    """Return the default status of sensors, by the same rule."""
    on = platform.settings.schedules == "on"
    return dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED
