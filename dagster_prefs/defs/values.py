"""Statistics of values, and their drift as asset checks: an asset, its checks, a daily job, and the alerts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import dagster as dg

from dagster_prefs.declarations.names import STATISTICS_TABLE
from dagster_prefs.defs.freshness import tell_changes
from dagster_prefs.defs.offline_store import training_key
from dagster_prefs.defs.resources import (
    asset_job,
    asset_key,
    job_schedule,
    lake_pool,
    sensor_status,
    unknown_check,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.alerts import channels
from dagster_prefs.freshness.drift import late_statistics, measure_drift, unknown_drift
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.platform import Platform
from dagster_prefs.values.drift import DayDrift
from dagster_prefs.values.statistics import Statistics

JOB = "values"
SENSOR = "drift_watch"
CHECK = "drift"
# The sensor `stale_tiles` exports a complete day within the hour after midnight, or the next where it failed.
CRON = "20 2 * * *"


def build(
    platform: Platform,
    alert_webhooks: Sequence[str] = (),
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dg.Definitions:
    """Return the statistics' asset, the drift checks of the training tables, their job, schedule and sensor.

    `alert_webhooks` each receive a change of a cause's level once; without any it is only logged. `clock` returns the
    time in UTC. Raises AlertError for a webhook that is no https URL.
    """
    if not platform.training_tables:
        return dg.Definitions()
    told = channels(alert_webhooks)
    statistics, checks = _statistics(platform, clock), _checks(platform, clock)
    settings = platform.settings
    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.assets(statistics) | dg.AssetSelection.checks(checks),
        "Describe the complete days that are new or changed, and the rolling views; judge the newest day.",
    )

    @dg.sensor(
        name=settings.dagster_name(SENSOR),
        minimum_interval_seconds=600,
        default_status=sensor_status(settings),
        description="Tells once when the values of a topic's tiles drift, or are as usual again. Starts no run.",
    )
    def drift_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now = clock()
        measures = drift_measures(platform, now)
        return dg.SensorResult(
            cursor=tell_changes(context, measures, told, now),
            skip_reason="; ".join(f"{measure.name}: {measure.level}" for measure in measures)
            or "there are no statistics yet",
        )

    return dg.Definitions(
        assets=[statistics],
        asset_checks=[checks],
        jobs=[job],
        sensors=[drift_watch],
        schedules=[
            job_schedule(
                settings,
                "values_daily",
                job,
                CRON,
                "Describes and judges yesterday's values, once they are exported.",
            )
        ],
    )


def drift_measures(platform: Platform, now: datetime) -> list[Measure]:
    """Return a measure for each cause of drift; `now` is UTC."""
    try:
        return measure_drift(platform.drift(), today=now.date())
    except PrefsError as error:
        return unknown_drift(error)


def _statistics(platform: Platform, clock: Callable[[], datetime]) -> dg.AssetsDefinition:
    settings = platform.settings
    tables = {spec.tile: training_key(settings, spec) for spec in platform.training_tables.values()}

    @dg.asset(
        key=asset_key(settings, "training", STATISTICS_TABLE),
        pool=lake_pool(settings),
        deps=list(tables.values()),
        group_name="offline_store",
        kinds={"duckdb", "iceberg"},
        owners=[platform.contract.owner],
        description="Statistics of every attribute and day: rows, missing and distinct values, quantiles, frequent "
        "texts. Of complete days of the training tables, and of the rolling views as they are.",
    )
    def value_statistics(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        described = platform.collect_statistics(now=clock())
        found = platform.statistics()
        for relation, attributes in found.items():
            # Dagster plots the numbers of an asset's observations over time.
            context.log_event(
                dg.AssetObservation(
                    asset_key=tables.get(relation, asset_key(settings, relation)),
                    metadata=plotted(attributes),
                )
            )
        return dg.MaterializeResult(
            metadata={
                "days_described": len(described),
                "relations": len(found),
                "attributes": sum(len(attributes) for attributes in found.values()),
            }
        )

    return value_statistics


def plotted(attributes: Mapping[str, Statistics]) -> dict[str, dg.MetadataValue | float | int | str]:
    """Return the numbers of a relation's attributes as metadata, with a table of all of them."""
    found: dict[str, dg.MetadataValue | float | int | str] = {}
    for name, one in attributes.items():
        found["values_rows"], found["values_day"] = one.rows, one.day.isoformat()
        found[f"{name}_null_share"] = one.null_share
        found[f"{name}_distinct"] = one.distinct
        if one.mean is not None:
            found[f"{name}_mean"] = one.mean
            found[f"{name}_median"] = one.quantiles_by_share[0.5]
        for value, rows in one.values[:3]:
            found[f"{name}_share_of_{value}"] = rows / max(1, one.known)
    found["values"] = dg.MetadataValue.table(
        records=[
            dg.TableRecord(
                {
                    "attribute": one.attribute,
                    "missing": f"{one.null_share:.1%}",
                    "distinct": one.distinct,
                    "quantiles": ", ".join(f"{value:g}" for value in one.quantiles),
                    "most_frequent": ", ".join(f"{value} ({rows:,})" for value, rows in one.values[:5]),
                }
            )
            for one in attributes.values()
        ],
        schema=dg.TableSchema(
            columns=[
                dg.TableColumn(name, "int" if name == "distinct" else "string")
                for name in ("attribute", "missing", "distinct", "quantiles", "most_frequent")
            ]
        ),
    )
    return found


def _checks(platform: Platform, clock: Callable[[], datetime]) -> dg.AssetChecksDefinition:
    settings = platform.settings
    keys = {
        spec.tile: training_key(settings, spec)
        for spec in platform.training_tables.values()
        if platform.registry.tiles[spec.tile].drift is not False
    }

    @dg.multi_asset_check(
        name=settings.dagster_name("value_drift"),
        specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                additional_deps=[asset_key(settings, "training", STATISTICS_TABLE)],
                description="The newest complete day's values are those of earlier days of the same weekday.",
            )
            for key in keys.values()
        ],
        can_subset=True,
    )
    def value_drift(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {key.asset_key for key in context.selected_asset_check_keys}
        try:
            causes = platform.drift()
        except PrefsError as error:
            for key in selected:
                yield unknown_check(key, CHECK, "drift", error)
            return
        found = {one.relation: one for cause in causes for one in cause.days}
        for relation, key in keys.items():
            if key not in selected:
                continue
            if relation in found:
                yield _result(key, found[relation], today=clock().date())
            else:
                yield dg.AssetCheckResult(
                    asset_key=key,
                    check_name=CHECK,
                    passed=True,
                    description="learning: there are no statistics yet",
                )

    return value_drift


def _result(key: dg.AssetKey, found: DayDrift, *, today: date) -> dg.AssetCheckResult:
    late = late_statistics(found.day, today=today) if found.level in ("ok", "learning") else ""
    numbers: dict[str, Any] = {}
    for finding in found.findings:
        for name, value in (("psi", finding.psi), ("ks", finding.ks)):
            if value is not None:
                numbers[f"{finding.attribute}_{name}"] = value
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=CHECK,
        passed=found.level in ("ok", "learning") and not late,
        severity=dg.AssetCheckSeverity.WARN if found.level == "warn" or late else dg.AssetCheckSeverity.ERROR,
        description=late or found.sentence,
        metadata={
            "level": found.level,
            "day": found.day.isoformat(),
            "rows": found.rows,
            "usual_rows": found.usual,
            "earlier_days": len(found.before),
            **numbers,
        },
    )
