"""What the definitions share: asset keys, and whether schedules and sensors start automatically."""

from __future__ import annotations

import dagster as dg

from dagster_prefs.declarations.contract import Table
from dagster_prefs.platform import Platform

TRAINING_TABLES_KEY = dg.AssetKey(["training", "tables"])


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
