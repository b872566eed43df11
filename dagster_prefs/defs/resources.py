"""Shared parts of the definitions: their names, and whether and when schedules and sensors start."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import dagster as dg

from dagster_prefs.declarations.contract import Table
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

# The tag of every run of a platform's jobs. Another team's job in the same deployment may have the same name.
PLATFORM_TAG = "dagster_prefs/platform"

UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def asset_key(settings: Settings, *path: str) -> dg.AssetKey:
    """Return the asset key of a path within this platform, below the prefix of PREFS_ASSET_PREFIX."""
    return dg.AssetKey([*settings.asset_prefix_path, *path])


def platform_name(settings: Settings) -> str:
    """Return the name of this platform within a deployment, as a tag's value."""
    return ".".join(settings.asset_prefix_path) or "default"


def run_tags(settings: Settings) -> dict[str, str]:
    """Return the tags of this platform's runs; those of another environment in the same deployment have others."""
    return {PLATFORM_TAG: platform_name(settings), **settings.dagster_tags}


def engine_pool(settings: Settings) -> str:
    """Return the concurrency pool of the steps that change the engine or DynamoDB."""
    return settings.dagster_name("engine")


def lake_pool(settings: Settings) -> str:
    """Return the concurrency pool of the steps that write Iceberg tables."""
    return settings.dagster_name("lake")


def asset_job(settings: Settings, name: str, selection: dg.AssetSelection, description: str) -> Any:
    """Return a job over assets or checks of this platform; its runs have `run_tags`."""
    return dg.define_asset_job(
        settings.dagster_name(name), selection, description=description, tags=run_tags(settings)
    )


def job_schedule(
    settings: Settings,
    name: str,
    job: Any,
    cron: str,
    description: str,
) -> dg.ScheduleDefinition:
    """Return a schedule of this platform that starts a job at `cron` (UTC), or as PREFS_SCHEDULE_CRONS says."""
    return dg.ScheduleDefinition(job=job, description=description, **schedule_options(settings, name, cron))


def schedule_options(settings: Settings, name: str, cron: str) -> dict[str, Any]:
    """Return the name, the time and the status of a schedule."""
    return {
        "name": settings.dagster_name(name),
        "cron_schedule": settings.schedule_crons.get(name, cron),
        "execution_timezone": "UTC",
        "default_status": schedule_status(settings),
    }


def is_at_work(instance: dg.DagsterInstance, settings: Settings, job: str, *, since: datetime) -> bool:
    """Return whether an unfinished run of this platform's job was created after `since` (UTC)."""
    running = dg.RunsFilter(
        job_name=settings.dagster_name(job), tags=run_tags(settings), statuses=UNFINISHED, created_after=since
    )
    return bool(instance.get_run_records(running, limit=1))


def unknown_check(key: dg.AssetKey, check: str, what: str, error: PrefsError) -> dg.AssetCheckResult:
    """Return the result of a check whose measure, `what`, could not be read: a warning with the reason."""
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=check,
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{what} is unknown: {error}",
    )


def refresh_embedded(platform: Platform, log: Callable[[str], None]) -> None:
    """Apply and publish all that has arrived on the embedded engine, as `prefs refresh` does.

    Raises Failure with the reason and the remedy.
    """
    try:
        log(platform.refresh(log))
    except PrefsError as error:
        raise dg.Failure(description=str(error)) from error


def training_tables_key(settings: Settings) -> dg.AssetKey:
    """Return the asset of the training tables before RisingWave's sinks write to them."""
    return asset_key(settings, "training", "tables")


def table_key(settings: Settings, table: Table) -> dg.AssetKey:
    """Return the asset of a DynamoDB table."""
    return asset_key(settings, "dynamodb", table.name)


def schedule_status(settings: Settings) -> dg.DefaultScheduleStatus:
    """Return the default status of schedules: running only if the environment requests it."""
    on = settings.schedules == "on"
    return dg.DefaultScheduleStatus.RUNNING if on else dg.DefaultScheduleStatus.STOPPED


def sensor_status(settings: Settings) -> dg.DefaultSensorStatus:
    """Return the default status of sensors, by the same rule."""
    on = settings.schedules == "on"
    return dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED
