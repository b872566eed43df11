"""Freshness and lag as asset checks and observations, judged by the time in the data."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import dagster as dg

from dagster_prefs.defs.offline_store import asset_key as training_key
from dagster_prefs.defs.resources import Platform
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.measures import measure_offline, measure_online, measure_views
from dagster_prefs.freshness.views import RELATIONS
from dagster_prefs.offline.tables import TILE_TABLES

CHECK = "freshness"
JOB = "freshness_checks"


def build(platform: Platform) -> dg.Definitions:
    """The freshness checks of views, domains and exports, and the job and schedule that evaluate them."""
    contract = platform.contract

    def views() -> list[Measure]:
        return measure_views(platform.engine, contract, now=datetime.now(UTC))

    def online() -> list[Measure]:
        def connect() -> tuple[object, object]:
            client = platform.dynamodb()
            return client, platform.provision(client)

        return measure_online(
            platform.engine,
            contract,
            connect,  # type: ignore[arg-type]
            now=datetime.now(UTC),
            publishes=platform.publishes,
        )

    def offline() -> list[Measure]:
        return measure_offline(
            platform.engine,
            contract,
            platform.catalog,
            list(TILE_TABLES.values()),
            namespace=platform.settings.iceberg_namespace,
            start=platform.settings.export_start_date,
            now=datetime.now(UTC),
        )

    domains = {
        domain.name: dg.AssetKey(["online", domain.name] if platform.publishes else domain.sink)
        for domain in contract.domains.values()
    }
    checks = [
        _checks(
            "view_freshness",
            {relation.relation: dg.AssetKey(relation.relation) for relation in RELATIONS},
            views,
            "What arrived is visible here; a quiet topic is not stale.",
        ),
        _checks(
            "online_freshness",
            domains,
            online,
            "A sample of viewers is in DynamoDB as it is in the rolling view.",
        ),
        _checks(
            "export_freshness",
            {spec.name: training_key(spec) for spec in TILE_TABLES.values()},
            offline,
            "Every complete day is in the training table as the engine holds it now.",
        ),
    ]
    job = dg.define_asset_job(
        JOB,
        dg.AssetSelection.checks(*checks),
        description="Evaluate every freshness check against the thresholds of the serving contract.",
    )
    return dg.Definitions(
        asset_checks=checks,
        jobs=[job],
        schedules=[
            dg.ScheduleDefinition(
                name="freshness_every_5_minutes",
                job=job,
                cron_schedule="*/5 * * * *",
                execution_timezone="UTC",
                default_status=platform.default_schedule_status,
                description="Evaluates every freshness check.",
            )
        ],
    )


def check_result(measure: Measure, key: dg.AssetKey) -> dg.AssetCheckResult:
    """A measure as the result of its asset check; what is unknown fails."""
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=CHECK,
        passed=measure.level in ("ok", "skipped"),
        severity=dg.AssetCheckSeverity.WARN if measure.level == "warn" else dg.AssetCheckSeverity.ERROR,
        description=measure.reason,
        metadata=metadata(measure),
    )


def metadata(measure: Measure) -> dict[str, dg.MetadataValue | float | int | str]:
    """A measure's numbers and texts, numbers as numbers so that Dagster plots them."""
    found: dict[str, dg.MetadataValue | float | int | str] = {
        "level": measure.level,
        "reason": measure.reason,
    }
    if measure.lag_seconds is not None:
        found["lag_seconds"] = float(measure.lag_seconds)
    if measure.thresholds is not None:
        found["warn_seconds"] = float(measure.thresholds.warn_seconds)
        found["error_seconds"] = float(measure.thresholds.error_seconds)
    for name, value in measure.values.items():
        found[name] = dg.MetadataValue.timestamp(value) if name.endswith("_at") else value
    return {**found, **measure.notes}


def _checks(
    name: str, keys: dict[str, dg.AssetKey], measure: Callable[[], Sequence[Measure]], description: str
) -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(
        name=name,
        specs=[dg.AssetCheckSpec(CHECK, asset=key, description=description) for key in keys.values()],
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {check.asset_key for check in context.selected_asset_check_keys}
        for found in measure():
            key = keys[found.name]
            if key not in selected:
                continue
            context.log.info(f"{found.key}: {found.level}: {found.reason}")
            context.op_execution_context.log_event(
                dg.AssetObservation(asset_key=key, metadata=metadata(found))
            )
            yield check_result(found, key)

    return checks
