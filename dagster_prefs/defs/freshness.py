"""Freshness and lag as asset checks, observations and alerts, measured by the times in the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.defs.offline_store import asset_key as training_key
from dagster_prefs.defs.resources import schedule_status, sensor_status
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.alerts import (
    AlertError,
    Webhook,
    dump_levels,
    load_levels,
    remembered,
    transitions,
)
from dagster_prefs.freshness.canary import (
    CANARY_SENSOR,
    CanaryState,
    Tick,
    canary_paths,
    canary_views,
    judge_ticks,
)
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.measures import unknown
from dagster_prefs.freshness.prober import prober_ticks
from dagster_prefs.freshness.status import evaluate
from dagster_prefs.freshness.views import watched_relations
from dagster_prefs.platform import Platform

JOB = "freshness_checks"
WATCH_SENSOR = "freshness_watch"

# The check of each stage, on the assets of `asset_keys`.
CHECKS = {
    "ingestion": ("ingestion_lag", "Every message in Kafka is ingested."),
    "views": ("freshness", "What arrived is visible here; a quiet topic is not stale."),
    "online": ("freshness", "A sample of ids is in DynamoDB as it is in the rolling view."),
    "offline": ("freshness", "Every complete day is in the training table as the engine holds it now."),
    "canary": ("canary", "A synthetic event became readable within the promised time."),
}

# A sensor's tick may take a minute; a canary that is not readable within this time is read by the next tick.
CANARY_PATIENCE_SECONDS = 10.0


def build(platform: Platform, alert_webhook: str | None = None) -> dg.Definitions:
    """Return the checks of every stage with their job and schedule, and the sensors for external state.

    `alert_webhook` is the URL that receives level transitions; None only logs them.

    Raises AlertError for a webhook that is no https URL.
    """
    webhook = None if alert_webhook is None else Webhook(alert_webhook)
    sources = platform.sources
    keys = asset_keys(platform)
    streaming = platform.engine.kind == "risingwave"
    stages: dict[str, Callable[[datetime], Sequence[Measure]]] = {
        "views": sources.views,
        "online": sources.online,
        "offline": sources.offline,
    }
    if platform.settings.kafka_bootstrap is not None:
        stages["ingestion"] = sources.ingestion
    if streaming:
        stages["canary"] = lambda now: _probe(platform, CanaryState())[1]
    checks = [_checks(stage, keys[stage], measure) for stage, measure in stages.items()]
    job = dg.define_asset_job(
        JOB,
        dg.AssetSelection.checks(*checks),
        description="Evaluate every freshness check against the thresholds of the serving contract.",
    )
    canary_status = sensor_status(platform) if streaming else dg.DefaultSensorStatus.STOPPED

    @dg.sensor(
        name=WATCH_SENSOR,
        minimum_interval_seconds=60,
        default_status=sensor_status(platform),
        description="Observes Kafka and DynamoDB, and tells each change of a level once. Starts no run.",
    )
    def freshness_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        followed = prober_ticks(platform.settings.data_dir)
        probed = last_probe(context.instance, sources.registry, now=datetime.now(UTC), followed=followed)
        status = evaluate(sources, now=lambda: datetime.now(UTC), extra=probed)
        known = load_levels(context.cursor)
        changed = transitions(known, status.measures)
        for one in changed:
            context.log.info(one.text)
        if webhook is not None:
            try:
                webhook.tell(changed, at=status.read_at)
            except AlertError as error:
                # The stored levels do not change, so that the next evaluation sends the same transitions
                # again.
                context.log.error(str(error))
                changed = []
        outside = [
            measure
            for measure in status.measures
            if measure.stage in ("ingestion", "online") and measure.level != "skipped"
        ]
        return dg.SensorResult(
            asset_events=_events(outside, keys, stages),
            cursor=dump_levels(remembered(known, changed)),
            skip_reason=f"read {len(status.measures)} measures, the worst is {status.level}",
        )

    @dg.sensor(
        name=CANARY_SENSOR,
        minimum_interval_seconds=60,
        default_status=canary_status,
        description="Times a synthetic event from its topic to the reader. Starts no run.",
    )
    def canary(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if any(not tick.is_late(datetime.now(UTC)) for tick in prober_ticks(platform.settings.data_dir)):
            return dg.SkipReason("the follower of the embedded engine sends the canary")
        state, measures = _probe(platform, CanaryState.loads(context.cursor))
        return dg.SensorResult(
            asset_events=_events(measures, keys, stages),
            cursor=state.dumps(),
            skip_reason="; ".join(f"{measure.name}: {measure.reason}" for measure in measures),
        )

    return dg.Definitions(
        asset_checks=checks,
        jobs=[job],
        sensors=[freshness_watch, canary],
        schedules=[
            dg.ScheduleDefinition(
                name="freshness_every_5_minutes",
                job=job,
                cron_schedule="*/5 * * * *",
                execution_timezone="UTC",
                default_status=schedule_status(platform),
                description="Evaluates every freshness check.",
            )
        ],
    )


def asset_keys(platform: Platform) -> dict[str, dict[str, dg.AssetKey]]:
    """Return the asset of each measure, by stage and name."""
    registry, settings = platform.registry, platform.settings
    domains = {
        domain.name: dg.AssetKey(
            ["online", domain.name] if settings.publishes or settings.follows else domain.sink
        )
        for domain in registry.contract.domains.values()
    }
    return {
        "ingestion": {
            topic.name: dg.AssetKey(topic.raw)
            for topic in registry.topics.values()
            if topic.entity or topic.name in registry.contract.freshness.topics
        },
        "views": {one.relation: dg.AssetKey(one.relation) for one in watched_relations(registry)},
        "online": domains,
        "offline": {spec.name: training_key(spec) for spec in platform.training_tables.values()},
        "canary": {
            **domains,
            **{name: dg.AssetKey(view.relation) for name, view in canary_views(registry).items()},
        },
    }


def last_probe(
    instance: dg.DagsterInstance, registry: Registry, *, now: datetime, followed: Sequence[Tick] = ()
) -> list[Measure]:
    """Return the canary's measures from the state that its sensor stored on this instance; `now` is UTC.

    `followed` is what the follower did, if there is one. Judged like `judge_ticks`.
    """
    try:
        states: Sequence[Any] = instance.all_instigator_state()
    except Exception as error:
        if followed:
            return judge_ticks(followed, registry, now=now)
        # Each kind of store raises errors of its own, and none may prevent the other measures.
        return unknown("canary", canary_paths(registry), f"Dagster's instance cannot be read: {error}")
    ticks = [
        Tick(data.last_tick_timestamp or 0.0, data.cursor)
        for state in states
        if (state.instigator_type.value, state.instigator_name) == ("SENSOR", CANARY_SENSOR)
        and (data := state.instigator_data) is not None
        and state.status.value != "STOPPED"
    ]
    return judge_ticks([*ticks, *followed], registry, now=now)


def metadata(measure: Measure) -> dict[str, dg.MetadataValue | float | int | str]:
    """Convert a measure's values to metadata, numbers as numbers so that Dagster plots them."""
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
    found |= measure.notes
    # The prefix keeps the canary's plots apart from those of other measures on the same assets.
    return {f"canary_{name}": value for name, value in found.items()} if measure.stage == "canary" else found


def _severity(measure: Measure) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.WARN if measure.level == "warn" else dg.AssetCheckSeverity.ERROR


def _checks(
    stage: str, keys: Mapping[str, dg.AssetKey], measure: Callable[[datetime], Sequence[Measure]]
) -> dg.AssetChecksDefinition:
    check, description = CHECKS[stage]

    @dg.multi_asset_check(
        name=f"{stage}_freshness",
        specs=[dg.AssetCheckSpec(check, asset=key, description=description) for key in keys.values()],
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {key.asset_key for key in context.selected_asset_check_keys}
        for found in measure(datetime.now(UTC)):
            key = keys[found.name]
            if key not in selected:
                continue
            context.log.info(f"{found.key}: {found.level}: {found.reason}")
            context.op_execution_context.log_event(
                dg.AssetObservation(asset_key=key, metadata=metadata(found))
            )
            yield dg.AssetCheckResult(
                asset_key=key,
                check_name=check,
                passed=found.level in ("ok", "skipped"),
                severity=_severity(found),
                description=found.reason,
                metadata=metadata(found),
            )

    return checks


def _events(
    measures: Sequence[Measure],
    keys: Mapping[str, Mapping[str, dg.AssetKey]],
    checked: Mapping[str, object],
) -> list[dg.AssetObservation | dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    events: list[dg.AssetObservation | dg.AssetMaterialization | dg.AssetCheckEvaluation] = []
    for measure in measures:
        key = keys[measure.stage][measure.name]
        events.append(dg.AssetObservation(asset_key=key, metadata=metadata(measure)))
        if measure.stage in checked:
            events.append(
                dg.AssetCheckEvaluation(
                    asset_key=key,
                    check_name=CHECKS[measure.stage][0],
                    passed=measure.level in ("ok", "skipped"),
                    severity=_severity(measure),
                    description=measure.reason,
                    metadata=metadata(measure),
                )
            )
    return events


def _probe(platform: Platform, state: CanaryState) -> tuple[CanaryState, list[Measure]]:
    with ExitStack() as clients:
        try:
            probe = platform.probe(clients)
        except PrefsError as error:
            return state, unknown("canary", asset_keys(platform)["canary"], error)
        return probe.run(state, patience_seconds=CANARY_PATIENCE_SECONDS)
