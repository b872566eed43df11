"""What several definitions share: keys of assets, and whether schedules and sensors start by themselves."""

from __future__ import annotations

import dagster as dg

from dagster_prefs.declarations.contract import Table
from dagster_prefs.platform import Platform

TRAINING_TABLES_KEY = dg.AssetKey(["training", "tables"])


def table_key(table: Table) -> dg.AssetKey:
    """The asset of a DynamoDB table."""
    return dg.AssetKey(["dynamodb", table.name])


def schedule_status(platform: Platform) -> dg.DefaultScheduleStatus:
    """Schedules start by themselves only where the environment asks for it."""
    on = platform.settings.schedules == "on"
    return dg.DefaultScheduleStatus.RUNNING if on else dg.DefaultScheduleStatus.STOPPED


def sensor_status(platform: Platform) -> dg.DefaultSensorStatus:
    """The same for sensors."""
    on = platform.settings.schedules == "on"
    return dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED
