"""The daily tiles in Iceberg: one partitioned asset per training table."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from dagster_prefs.defs.column_lineage import same_columns
from dagster_prefs.defs.resources import (
    asset_job,
    asset_key,
    is_at_work,
    lake_pool,
    sensor_status,
    training_tables_key,
)
from dagster_prefs.defs.training_data import jobs_of, maintained, parity_check, training_set_asset
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg.export import ExportOptions, ForeignRows
from dagster_prefs.iceberg.exporter import DayOutcome, Exports, refusal
from dagster_prefs.iceberg.launches import due, dump_launches, load_launches
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

# One run over a range of days needs a backfill policy, which Dagster still calls beta; its own advice is
# to pin the version, as pyproject.toml does.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

GROUP = "offline_store"
# Dagster's documented tags for one run over a range of partitions; it exports no constants for them.
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
EXPORT_JOB = "export"
EXPORT_SENSOR = "stale_tiles"
# An older run has lost its process; the instance's run monitoring ends it.
LONGEST_RUN = timedelta(hours=4)
# Dagster takes some 50 ms to store an event, and a sensor may take a minute; the next tick continues.
EVENTS_PER_LOOK = 200


class ExportConfig(dg.Config):
    """The options of one export run.

    `allow_loss` replaces days of which the engine holds fewer rows or a smaller total than the table;
    otherwise the table keeps them. `replace_foreign` reverts what another writer did to a day; otherwise such
    a day fails.
    """

    allow_loss: bool = False
    replace_foreign: bool = False


def training_key(settings: Settings, spec: TileTable) -> dg.AssetKey:
    """Return the asset of a training table."""
    return asset_key(settings, "training", spec.name)


def ranges(days: Iterable[date]) -> list[tuple[date, date]]:
    """Group days into ranges of consecutive ones, (first, last) each, in order."""
    found: list[tuple[date, date]] = []
    for day in sorted(set(days)):
        if found and found[-1][1] + timedelta(days=1) == day:
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def range_tags(first: date, last: date) -> dict[str, str]:
    """Return the tags that make one run cover a range of days."""
    return {RANGE_START_TAG: first.isoformat(), RANGE_END_TAG: last.isoformat()}


def look(platform: Platform) -> Exports:
    """Compare every complete day of the training tables with the engine.

    Raises OfflineError, EngineUnavailable.
    """
    return platform.exporter.look(datetime.now(UTC))


def build(platform: Platform, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dg.Definitions:
    """Return the export assets with their downstream assets, jobs, and the sensor that exports stale days.

    Where RisingWave's sinks write the tables, the same assets verify, audit and tag. `clock` returns the time
    in UTC.
    """
    settings = platform.settings
    if not platform.training_tables:
        # Without tiles there is nothing to export, train on, or maintain.
        return dg.Definitions(assets=[_provisioned(platform)] if settings.raw_by_sink else [])
    by_sink = settings.export == "sink"
    assets = [_exported(platform, spec, by_sink=by_sink) for spec in platform.training_tables.values()]
    tables = {spec.name: training_key(settings, spec) for spec in platform.training_tables.values()}
    parity = parity_check(platform, tables, clock)
    maintenance = maintained(platform, tables, clock)
    jobs, schedules = jobs_of(platform, maintenance, parity)
    job = asset_job(
        settings,
        EXPORT_JOB,
        # Parity reads weeks of tiles, which is too expensive after every export.
        dg.AssetSelection.assets(*assets) - dg.AssetSelection.checks(parity),
        "Export days of tiles to Iceberg; a day that did not change commits nothing.",
    )

    @dg.sensor(
        name=settings.dagster_name(EXPORT_SENSOR),
        job=job,
        minimum_interval_seconds=3600,
        default_status=sensor_status(settings),
        description="Exports complete days that are missing or changed by late events; checks every hour. "
        "A day that stays stale is retried after 1, 2, 4 … 24 hours.",
    )
    def stale_tiles(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        now = clock()
        if is_at_work(context.instance, settings, EXPORT_JOB, since=now - LONGEST_RUN):
            return dg.SkipReason("an export is active; the next tick checks what it left")
        try:
            found = look(platform)
        except PrefsError as error:
            return dg.SkipReason(str(error))
        stale = found.stale
        starts, launches = due(stale, load_launches(context.cursor), now=now)
        requests = []
        for first, last in ranges(day for _, day in starts):
            # With this key, a daemon that dies before it has stored the cursor does not start the same run
            # again.
            attempts = [
                f"{table} {day} {start.fingerprint} {start.attempts}"
                for (table, day), start in sorted(starts.items())
                if first <= day <= last
            ]
            key = hashlib.sha256("\n".join(attempts).encode()).hexdigest()
            requests.append(dg.RunRequest(run_key=key, tags=range_tags(first, last)))
        reasons = ["stale days wait for their next attempt: see the last run of the export"] if stale else []
        if found.foreign:
            told = str(ForeignRows(found.foreign))
            context.log.warning(told)
            reasons.append(told)
        return dg.SensorResult(
            run_requests=requests,
            asset_events=_unknown_exports(platform, found, context.instance),
            cursor=dump_launches(launches),
            skip_reason=None
            if requests
            else "; ".join(reasons) or "every complete day is exported in its current version",
        )

    return dg.Definitions(
        assets=[
            *assets,
            *([_provisioned(platform)] if by_sink else []),
            maintenance,
            training_set_asset(platform, tables, clock),
        ],
        asset_checks=[parity],
        jobs=[job, *jobs],
        schedules=schedules,
        sensors=[stale_tiles],
    )


def _partitions(platform: Platform) -> dg.DailyPartitionsDefinition:
    return dg.DailyPartitionsDefinition(platform.settings.export_start_date.isoformat(), timezone="UTC")


def _provisioned(platform: Platform) -> dg.AssetsDefinition:
    @dg.asset(
        key=training_tables_key(platform.settings),
        pool=lake_pool(platform.settings),
        group_name=GROUP,
        kinds={"iceberg"},
        owners=[platform.contract.owner],
        description="The tables in the lake with their declared schema, before RisingWave's sinks write to them. "
        "The branch of an earlier sink of tiles goes, because a new one writes every row again.",
    )
    def tables() -> dg.MaterializeResult[Any]:
        found = platform.prepare_training_tables()
        return dg.MaterializeResult(metadata={".".join(table.name()): table.location() for table in found})

    return tables


def _exported(platform: Platform, spec: TileTable, *, by_sink: bool) -> dg.AssetsDefinition:
    settings = platform.settings

    @dg.asset(
        key=training_key(settings, spec),
        pool=lake_pool(settings),
        deps=[
            asset_key(settings, spec.tile),
            asset_key(settings, "tile_fingerprints"),
            *([asset_key(settings, spec.sink)] if by_sink else []),
        ],
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
            ),
            **same_columns(
                platform.registry.tiles[spec.tile].columns,
                asset_key(settings, spec.sink if by_sink else spec.tile),
            ),
        },
    )
    def exported(context: dg.AssetExecutionContext, config: ExportConfig) -> dg.MaterializeResult[Any]:
        days = [date.fromisoformat(key) for key in context.partition_keys]
        done: list[DayOutcome] = []
        left_out: list[DayOutcome] = []
        options = ExportOptions(config.allow_loss, config.replace_foreign)
        for one in platform.exporter.bring_up(spec, days, options):
            (left_out if one.left_out else done).append(one)
            what = f"{spec.name} {one.day}"
            if one.status == "failed":
                context.log.error(f"{what} is left out: {one.reason}")
            elif one.status == "retained":
                context.log.warning(
                    f"{what} stays as it is, with {one.rows} rows: {one.reason}; where that is right, "
                    "materialize it with allow_loss"
                )
        # One line per status: Dagster stores each line as an event, which takes longer than to export a small day.
        for status in sorted({one.status for one in done}):
            alike = [one for one in done if one.status == status]
            periods = ", ".join(_period(*found) for found in ranges(one.day for one in alike))
            context.log.info(f"{spec.name}: {status} {periods} ({sum(one.rows for one in alike)} rows)")
        if left_out:
            # The run fails, but the other days were exported, and Dagster records their materializations.
            for one in done:
                context.log_event(
                    dg.AssetMaterialization(
                        context.asset_key, partition=one.day.isoformat(), metadata={"rows": one.rows}
                    )
                )
            raise refusal(left_out)
        return dg.MaterializeResult(
            metadata={
                "rows": sum(one.rows for one in done),
                "days": len(days),
                "days_verified" if by_sink else "days_written": sum(
                    one.status in ("written", "restored", "verified") for one in done
                ),
                "days_retained": sum(one.status == "retained" for one in done),
            }
        )

    return exported


def _unknown_exports(
    platform: Platform, found: Exports, instance: dg.DagsterInstance
) -> list[dg.AssetMaterialization]:
    """Return the exported days without a materialization in Dagster, because `prefs export` starts no run."""
    events = []
    for spec in platform.training_tables.values():
        key = training_key(platform.settings, spec)
        known = instance.get_materialized_partitions(key)
        events += [
            dg.AssetMaterialization(key, partition=day.isoformat(), metadata={"rows": rows})
            for (table, day), rows in sorted(found.current.items())
            if table == spec.name and day.isoformat() not in known
        ]
    return events[:EVENTS_PER_LOOK]


def _period(first: date, last: date) -> str:
    return str(first) if first == last else f"{first} to {last}"
