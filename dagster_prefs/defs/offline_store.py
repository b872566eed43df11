"""The daily tiles in Iceberg: one partitioned asset per training table."""

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any

import dagster as dg

from dagster_prefs.defs.resources import Platform
from dagster_prefs.offline.export import days_to_export, export_day
from dagster_prefs.offline.tables import TILE_TABLES, TileTable

GROUP = "offline_store"
# Dagster's documented tags for one run over a range of partitions; it exports no constants for them.
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
EXPORT_JOB = "export"


def asset_key(spec: TileTable) -> dg.AssetKey:
    """The asset of a training table."""
    return dg.AssetKey(["training", spec.name])


def ranges(days: Sequence[date]) -> list[tuple[date, date]]:
    """The days as runs of consecutive ones, (first, last) each, in order."""
    found: list[tuple[date, date]] = []
    for day in sorted(set(days)):
        if found and found[-1][1] + timedelta(days=1) == day:
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def range_tags(first: date, last: date) -> dict[str, str]:
    """Tags that make one run cover a range of days."""
    return {RANGE_START_TAG: first.isoformat(), RANGE_END_TAG: last.isoformat()}


def days_that_need_export(platform: Platform, specs: Sequence[TileTable] | None = None) -> list[date]:
    """Complete days, oldest first, that one of the training tables lacks or holds in an older state."""
    catalog = platform.catalog()
    days = {
        day
        for spec in specs or TILE_TABLES.values()
        for day in days_to_export(
            platform.engine, catalog, spec, namespace=platform.settings.iceberg_namespace
        )
    }
    partitions = set(_partitions(platform).get_partition_keys())
    return sorted(day for day in days if day.isoformat() in partitions)


def build(platform: Platform) -> dg.Definitions:
    """The export assets, their job, and the schedule that exports exactly the days that need it."""
    assets = [_exported(platform, spec) for spec in TILE_TABLES.values()]
    job = dg.define_asset_job(
        EXPORT_JOB,
        dg.AssetSelection.assets(*assets),
        description="Export days of tiles to Iceberg; a day that did not change commits nothing.",
    )

    @dg.schedule(
        name="export_daily",
        job=job,
        cron_schedule="15 * * * *",
        execution_timezone="UTC",
        default_status=platform.default_schedule_status,
        description="Looks every hour for complete days that are missing or changed by late events, and exports those.",
    )
    def export_daily() -> Iterator[dg.RunRequest | dg.SkipReason]:
        days = days_that_need_export(platform)
        if not days:
            yield dg.SkipReason("every complete day is exported as it is")
        for first, last in ranges(days):
            yield dg.RunRequest(run_key=None, tags=range_tags(first, last))

    return dg.Definitions(assets=assets, jobs=[job], schedules=[export_daily])


def _partitions(platform: Platform) -> dg.DailyPartitionsDefinition:
    return dg.DailyPartitionsDefinition(platform.settings.export_start_date.isoformat(), timezone="UTC")


def _exported(platform: Platform, spec: TileTable) -> dg.AssetsDefinition:
    @dg.asset(
        key=asset_key(spec),
        deps=[dg.AssetKey(spec.tile), dg.AssetKey("tile_fingerprints")],
        partitions_def=_partitions(platform),
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=GROUP,
        kinds={"iceberg", "parquet"},
        owners=[platform.contract.owner],
        description=spec.doc,
        metadata={
            "dagster/column_schema": dg.TableSchema(
                columns=[
                    dg.TableColumn(column.name, type=str(column.type), description=column.doc)
                    for column in spec.columns
                ]
            )
        },
    )
    def exported(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        catalog = platform.catalog()
        rows = written = 0
        for key in context.partition_keys:
            report = export_day(
                platform.engine,
                catalog,
                spec,
                date.fromisoformat(key),
                namespace=platform.settings.iceberg_namespace,
            )
            context.log.info(f"{spec.name} {key}: {report.status}, {report.rows} rows")
            rows += report.rows
            written += report.status == "written"
        return dg.MaterializeResult(
            metadata={"rows": rows, "days": len(context.partition_keys), "days_written": written}
        )

    return exported
