"""Messages and events in Iceberg: one asset per topic, exported at an interval."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from dagster_prefs.declarations.names import raw_sink
from dagster_prefs.declarations.registry import TopicDeclaration
from dagster_prefs.defs.resources import asset_job, asset_key, is_at_work, lake_pool, sensor_status
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg.event_export import HoursFailed
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

GROUP = "offline_store"
JOB = "export_events"
SENSOR = "events_to_export"
# An older run has lost its process; the instance's run monitoring ends it.
LONGEST_RUN = timedelta(hours=4)


def events_key(settings: Settings, topic: TopicDeclaration) -> dg.AssetKey:
    """Return the asset of a topic's tables of events."""
    return asset_key(settings, "lake", topic.relation)


def build(platform: Platform, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dg.Definitions:
    """Return the assets of events in the lake, and the sensor that exports them; `clock` returns the time in UTC."""
    assets = [_exported(platform, topic) for topic in platform.registry.topics.values()]
    if not assets:
        return dg.Definitions()
    settings = platform.settings
    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.assets(*assets),
        "Export the messages and events that arrived to Iceberg; an unchanged hour commits nothing.",
    )

    @dg.sensor(
        name=settings.dagster_name(SENSOR),
        job=job,
        minimum_interval_seconds=settings.events_export_seconds,
        default_status=sensor_status(settings),
        description="Exports what arrived since the last export, every PREFS_EVENTS_EXPORT_SECONDS.",
    )
    def events_to_export(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if is_at_work(context.instance, settings, JOB, since=clock() - LONGEST_RUN):
            return dg.SkipReason("an export is active; the next tick continues")
        return dg.RunRequest()

    return dg.Definitions(assets=assets, jobs=[job], sensors=[events_to_export])


def _exported(platform: Platform, topic: TopicDeclaration) -> dg.AssetsDefinition:
    settings = platform.settings

    @dg.asset(
        key=events_key(settings, topic),
        pool=lake_pool(settings),
        deps=[
            asset_key(settings, topic.raw),
            asset_key(settings, topic.parsed),
            *([asset_key(settings, raw_sink(topic.relation))] if settings.raw_by_sink else []),
        ],
        group_name=GROUP,
        kinds={"iceberg", "parquet"},
        owners=[platform.contract.owner],
        description=f"The raw messages and the typed events of topic `{topic.name}` in Iceberg, by hour of arrival.",
    )
    def exported(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        try:
            (report,) = platform.export_events([topic.name])
        except PrefsError as error:
            raise dg.Failure(description=str(error)) from error
        if report.failed:
            raise HoursFailed({(topic.name, hour): why for hour, why in report.failed.items()})
        if report.lost:
            context.log.warning(
                f"{report.lost} messages of {topic.name} left the engine before they were exported: export more often "
                "than PREFS_RAW_RETENTION_SECONDS"
            )
        until = report.complete_until
        return dg.MaterializeResult(
            metadata={
                "hours": report.hours,
                "raw_rows": report.raw_rows,
                "typed_rows": report.typed_rows,
                "lost": report.lost,
                "left_the_engine": report.left,
                **({"waiting": report.waiting, "repeated": report.repeated} if settings.raw_by_sink else {}),
                **({} if until is None else {"complete_until": dg.MetadataValue.timestamp(until)}),
            }
        )

    return exported
