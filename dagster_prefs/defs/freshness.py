"""Freshness and lag as asset checks, observations and alerts, measured by the times in the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import psycopg

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.defs.offline_store import training_key
from dagster_prefs.defs.resources import asset_job, asset_key, job_schedule, sensor_status
from dagster_prefs.engine.catalog import row_counts
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness import embedded
from dagster_prefs.freshness.alerts import (
    AlertError,
    Webhook,
    channels,
    dump_levels,
    load_levels,
    remembered,
    transitions,
)
from dagster_prefs.freshness.canary import (
    CANARY_SENSOR,
    CanaryState,
    Tick,
    canary_views,
    measure_canary,
)
from dagster_prefs.freshness.levels import QUIET, Measure, Unmeasurable
from dagster_prefs.freshness.measures import unknown
from dagster_prefs.freshness.prober import prober_ticks
from dagster_prefs.freshness.status import evaluate
from dagster_prefs.freshness.views import watched_relations
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

JOB = "freshness_checks"
WATCH_SENSOR = "freshness_watch"
FOLLOWER_SENSOR = "follower_watch"
# The name under which Dagster shows the rows of an asset.
ROW_COUNT = "dagster/row_count"
GROUP = "engine"

# The check of each stage, on the assets of `asset_keys`.
CHECKS = {
    "engine": ("works", "The embedded engine and its follower work, and the disk has space."),
    "ingestion": ("ingestion_lag", "Every message in Kafka is ingested."),
    "views": ("freshness", "Everything that arrived is visible here; a quiet topic is not stale."),
    "online": ("freshness", "A sample of ids is in DynamoDB as it is in the rolling view."),
    "offline": ("freshness", "Every complete day is in the training table as the engine holds it now."),
    "canary": ("canary", "A synthetic event became readable within the freshness target."),
}

# A relation with more rows than this is estimated by the engine instead of counted.
EXACT_ROWS = 100_000

# A function that returns a stage's measures for a time (UTC) and the instance in which they are stored.
Read = Callable[[datetime, dg.DagsterInstance], Sequence[Measure]]

# A sensor's tick may take a minute; a canary that is not readable within this time is read by the next tick.
CANARY_PATIENCE_SECONDS = 10.0


def build(platform: Platform, alert_webhooks: Sequence[str] = ()) -> dg.Definitions:
    """Return the checks of every stage with their job and schedule, and the sensors for external state.

    `alert_webhooks` are the URLs that receive level transitions; without any they are only logged.

    Raises AlertError for a webhook that is no https URL.
    """
    told = channels(alert_webhooks)
    # Drift has a sensor of its own, which tells of it once.
    sources = replace(platform.sources, drift=lambda now: [])
    settings = platform.settings
    keys, probe_name = asset_keys(platform), settings.dagster_name(CANARY_SENSOR)
    streaming = platform.engine.kind == "risingwave"
    stages: dict[str, Read] = {
        "views": lambda now, _: sources.views(now),
        "online": lambda now, _: sources.online(now),
        "offline": lambda now, _: sources.offline(now),
        # The canary is measured by its sensor and the follower; a run only judges their stored ticks.
        "canary": lambda now, instance: last_probe(
            instance,
            sources.registry,
            now=now,
            followed=prober_ticks(settings.state_dir),
            sensor=probe_name,
        ),
    }
    if platform.settings.kafka_bootstrap is not None:
        stages["ingestion"] = lambda now, _: sources.ingestion(now)
    if not streaming:
        stages["engine"] = lambda now, _: sources.embedded(now)
    checks = [
        _checks(settings, stage, keys[stage], measure, _Rows(platform) if stage == "views" else None)
        for stage, measure in stages.items()
    ]
    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.checks(*checks),
        "Evaluate every freshness check against the thresholds of the serving contract.",
    )
    canary_status = sensor_status(settings) if streaming else dg.DefaultSensorStatus.STOPPED

    @dg.sensor(
        name=settings.dagster_name(WATCH_SENSOR),
        minimum_interval_seconds=60,
        default_status=sensor_status(settings),
        description="Reports each change of a level once. Starts no run.",
    )
    def freshness_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        followed = prober_ticks(settings.state_dir)
        probed = last_probe(
            context.instance,
            sources.registry,
            now=datetime.now(UTC),
            followed=followed,
            sensor=probe_name,
        )
        status = evaluate(sources, now=lambda: datetime.now(UTC), extra=probed)
        # The engine has a sensor of its own, which runs more often.
        measures = [measure for measure in status.measures if measure.stage != "engine"]
        return dg.SensorResult(
            cursor=tell_changes(context, measures, told, status.read_at),
            skip_reason=f"read {len(status.measures)} measures, the worst is {status.level}",
        )

    @dg.sensor(
        name=settings.dagster_name(FOLLOWER_SENSOR),
        minimum_interval_seconds=10,
        default_status=sensor_status(settings),
        description="Reports once when the embedded engine, its disk or its follower fails or recovers. Starts no run.",
    )
    def follower_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now = datetime.now(UTC)
        measures = sources.embedded(now)
        return dg.SensorResult(
            cursor=tell_changes(context, measures, told, now),
            skip_reason="; ".join(f"{measure.name}: {measure.reason}" for measure in measures),
        )

    @dg.sensor(
        name=probe_name,
        minimum_interval_seconds=60,
        default_status=canary_status,
        description="Times a synthetic event from its topic to the reader. Starts no run.",
    )
    def canary(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if any(not tick.is_late(datetime.now(UTC)) for tick in prober_ticks(platform.settings.state_dir)):
            return dg.SkipReason("the follower of the embedded engine sends the canary")
        state, measures = _probe(platform, CanaryState.loads(context.cursor))
        return dg.SensorResult(
            cursor=state.dumps(),
            skip_reason="; ".join(f"{measure.name}: {measure.reason}" for measure in measures),
        )

    return dg.Definitions(
        assets=[] if streaming else _parts(platform, keys["engine"]),
        asset_checks=checks,
        jobs=[job],
        sensors=[freshness_watch, canary, *([] if streaming else [follower_watch])],
        schedules=[
            job_schedule(
                settings,
                "freshness_every_5_minutes",
                job,
                "*/5 * * * *",
                "Evaluates every freshness check.",
            )
        ],
    )


def asset_keys(platform: Platform) -> dict[str, dict[str, dg.AssetKey]]:
    """Return the asset of each measure, by stage and name."""
    registry, settings = platform.registry, platform.settings
    domains = {
        domain.name: asset_key(settings, "online", domain.name)
        if settings.publishes or settings.follows
        else asset_key(settings, domain.sink)
        for domain in registry.contract.domains.values()
    }
    return {
        "engine": {name: asset_key(settings, "engine", name) for name in embedded.MEASURES},
        "ingestion": {
            topic.name: asset_key(settings, topic.raw)
            for topic in registry.topics.values()
            if topic.entity or topic.name in registry.contract.freshness.topics
        },
        "views": {one.relation: asset_key(settings, one.relation) for one in watched_relations(registry)},
        "online": domains,
        "offline": {spec.name: training_key(settings, spec) for spec in platform.training_tables.values()},
        "canary": {
            **domains,
            **{name: asset_key(settings, view.relation) for name, view in canary_views(registry).items()},
        },
    }


def last_probe(
    instance: dg.DagsterInstance,
    registry: Registry,
    *,
    now: datetime,
    followed: Sequence[Tick] = (),
    sensor: str = CANARY_SENSOR,
) -> list[Measure]:
    """Return the canary's measures from the ticks of its `sensor` on this instance; `now` is UTC.

    `followed` are the ticks of the follower, if there is one.
    """
    return measure_canary(followed, lambda: sensor_ticks(instance, sensor), registry, now=now)


def sensor_ticks(instance: dg.DagsterInstance, sensor: str = CANARY_SENSOR) -> list[Tick]:
    """Return the last tick of each running `sensor` of the canary.

    Raises Unmeasurable if the instance cannot be read.
    """
    try:
        states: Sequence[Any] = instance.all_instigator_state()
    except Exception as error:
        # Each kind of store raises errors of its own, and none may prevent the other measures.
        reason = " ".join(str(error).split())
        raise Unmeasurable(f"Dagster's instance cannot be read: {reason}") from error
    return [
        Tick(data.last_tick_timestamp or 0.0, data.cursor)
        for state in states
        if (state.instigator_type.value, state.instigator_name) == ("SENSOR", sensor)
        and (data := state.instigator_data) is not None
        and state.status.value != "STOPPED"
    ]


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


class _Rows:
    """The row counts of the relations that hold events or are computed from them."""

    def __init__(self, platform: Platform) -> None:
        self._engine = platform.engine
        topics = platform.registry.topics.values()
        self.sources = [name for topic in topics for name in (topic.raw, topic.parsed)]

    def count(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the rows of each relation that exists; empty if the engine cannot be read."""
        try:
            with self._engine.connect() as connection:
                return row_counts(connection, self._engine, names, exact_up_to=EXACT_ROWS)
        except (PrefsError, psycopg.Error):
            # The measures of the same check report what is wrong with the engine.
            return {}


def _parts(platform: Platform, keys: Mapping[str, dg.AssetKey]) -> list[dg.AssetSpec]:
    return [
        dg.AssetSpec(
            key,
            group_name=GROUP,
            kinds={"postgres"},
            owners=[platform.contract.owner],
            description=embedded.MEASURES[name],
        )
        for name, key in keys.items()
    ]


def tell_changes(
    context: dg.SensorEvaluationContext,
    measures: Sequence[Measure],
    webhooks: Sequence[Webhook],
    at: datetime,
) -> str:
    """Log and send each change of a level since the sensor's cursor; return the new cursor. `at` is UTC."""
    # Without a channel, the log is the only one.
    names = [webhook.name for webhook in webhooks] or [""]
    known = {name: load_levels(context.cursor, name) for name in names}
    changed = {name: transitions(levels, measures) for name, levels in known.items()}
    for text in dict.fromkeys(one.text for found in changed.values() for one in found):
        context.log.info(text)
    for webhook in webhooks:
        try:
            webhook.tell(changed[webhook.name], at=at)
        except AlertError as error:
            # This channel's levels do not change, so that the next evaluation sends it the same transitions again.
            context.log.error(str(error))
            changed[webhook.name] = []
    return dump_levels({name: remembered(known[name], changed[name]) for name in names})


def _checks(
    settings: Settings, stage: str, keys: Mapping[str, dg.AssetKey], measure: Read, rows: _Rows | None
) -> dg.AssetChecksDefinition:
    check, description = CHECKS[stage]

    @dg.multi_asset_check(
        name=settings.dagster_name(f"{stage}_freshness"),
        specs=[dg.AssetCheckSpec(check, asset=key, description=description) for key in keys.values()],
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {key.asset_key for key in context.selected_asset_check_keys}

        def observe(key: dg.AssetKey, values: Mapping[str, Any]) -> None:
            context.op_execution_context.log_event(dg.AssetObservation(asset_key=key, metadata=values))

        counts: Mapping[str, int] = {}
        if rows is not None:
            names = [name for name, key in keys.items() if key in selected]
            sources = rows.sources if len(names) == len(keys) else []
            counts = rows.count([*names, *sources])
            for name in sources:
                if name in counts:
                    observe(asset_key(settings, name), {ROW_COUNT: counts[name]})
        for found in measure(datetime.now(UTC), context.instance):
            key = keys[found.name]
            if key not in selected:
                continue
            if found.level not in QUIET:
                context.log.info(f"{found.key}: {found.level}: {found.reason}")
            observe(key, metadata(found) | ({ROW_COUNT: counts[found.name]} if found.name in counts else {}))
            yield dg.AssetCheckResult(
                asset_key=key,
                check_name=check,
                passed=found.level in QUIET,
                severity=_severity(found),
                description=found.reason,
                metadata=metadata(found),
            )

    return checks


def _probe(platform: Platform, state: CanaryState) -> tuple[CanaryState, list[Measure]]:
    with ExitStack() as clients:
        try:
            probe = platform.probe(clients)
        except PrefsError as error:
            return state, unknown("canary", asset_keys(platform)["canary"], error)
        return probe.run(state, patience_seconds=CANARY_PATIENCE_SECONDS)
