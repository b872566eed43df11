"""A daily check that what was served is what training sets say was served, and a sensor that tells of its result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import dagster as dg

from dagster_prefs.defs.freshness import tell_changes
from dagster_prefs.defs.resources import asset_job, asset_key, job_schedule, sensor_status, unknown_check
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.alerts import channels
from dagster_prefs.freshness.levels import QUIET, Level, Measure
from dagster_prefs.freshness.measures import unknown
from dagster_prefs.freshness.skew import COMPARED, DomainSkew, measure_skew_of
from dagster_prefs.platform import Platform
from dagster_prefs.training.skew import AttributeSkew, SkewReport

JOB = "skew"
CHECK = "skew"
SENSOR = "skew_watch"
# The metadata of a check that says its level.
LEVEL = "level"
# How old the last evaluation of the daily check may be.
LATE = timedelta(days=2)


def build(
    platform: Platform,
    alert_webhooks: Sequence[str] = (),
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dg.Definitions:
    """Return the check of every served domain, its job, schedule and sensor.

    Nothing if no log is in files of this machine. `alert_webhooks` each receive a change of a domain's level once;
    without any it is only logged. `clock` returns the time in UTC.

    Raises AlertError for a webhook that is no https URL.
    """
    settings = platform.settings
    if not settings.served_log_folders:
        return dg.Definitions()
    told = channels(alert_webhooks)
    checks = _checks(platform, settings.served_log_folders, clock)
    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.checks(checks),
        "Compare the served log with values as served, computed from the events in the lake.",
    )

    @dg.sensor(
        name=settings.dagster_name(SENSOR),
        minimum_interval_seconds=600,
        default_status=sensor_status(settings),
        description="Tells once when a logged value is wrong or too many were late, and when all are right again. "
        "Starts no run: it reads what the check found last.",
    )
    def skew_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now = clock()
        measures = checked_skew(context.instance, domain_keys(platform), now=now)
        return dg.SensorResult(
            cursor=tell_changes(context, measures, told, now),
            skip_reason="; ".join(f"{measure.name}: {measure.level}" for measure in measures),
        )

    return dg.Definitions(
        asset_checks=[checks],
        jobs=[job],
        sensors=[skew_watch],
        schedules=[
            job_schedule(
                settings,
                f"{JOB}_daily",
                job,
                "20 5 * * *",
                "Compares once a day, when the events of the day before are in the lake.",
            )
        ],
    )


def domain_keys(platform: Platform) -> dict[str, dg.AssetKey]:
    """Return the asset of each served domain, by its name."""
    return {
        domain.name: asset_key(platform.settings, "online", domain.name)
        for domain in platform.contract.domains.values()
    }


def checked_skew(
    instance: dg.DagsterInstance, keys: Mapping[str, dg.AssetKey], *, now: datetime
) -> list[Measure]:
    """Return the measure of each domain from the last evaluation of its check; `now` is UTC.

    A check that was never evaluated is skipped; one whose last evaluation is older than LATE is a warning.
    """
    checks = {name: dg.AssetCheckKey(key, CHECK) for name, key in keys.items()}
    try:
        found = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(checks.values()))
    except Exception as error:
        # Each kind of store raises errors of its own.
        return unknown("skew", keys, f"Dagster's instance cannot be read: {error}")
    measures = []
    for name, check in checks.items():
        record = found.get(check)
        entry = record.event if record is not None else None
        event = entry.dagster_event if entry is not None else None
        if entry is None or event is None or event.event_type != dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            measures.append(Measure("skew", name, "skipped", "it was not compared yet"))
            continue
        evaluation = event.asset_check_evaluation_data
        level = cast("Level", getattr(evaluation.metadata.get(LEVEL), "value", "unknown"))
        reason = evaluation.description or ""
        at = datetime.fromtimestamp(entry.timestamp, UTC)
        if level in QUIET and now - at > LATE:
            level, reason = "warn", f"it was last compared at {at:%Y-%m-%d %H:%M} UTC: see the job {JOB}"
        measures.append(Measure("skew", name, level, reason))
    return measures


def _checks(
    platform: Platform, log: Sequence[Path], clock: Callable[[], datetime]
) -> dg.AssetChecksDefinition:
    settings, keys = platform.settings, domain_keys(platform)

    @dg.multi_asset_check(
        name=settings.dagster_name("served_skew"),
        specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                description=f"Every logged value of domain {name} of the last {COMPARED.days} days equals what had "
                "arrived by then, or its difference is explained.",
            )
            for name, key in keys.items()
        ],
        can_subset=True,
    )
    def served_skew(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {key.asset_key for key in context.selected_asset_check_keys}
        try:
            report = platform.skew(log, since=clock() - COMPARED)
        except PrefsError as error:
            for key in selected:
                yield unknown_check(key, CHECK, "skew", error)
            return
        for name, key in keys.items():
            if key in selected:
                yield _result(report, name, key)

    return served_skew


def _result(report: SkewReport, domain: str, key: dg.AssetKey) -> dg.AssetCheckResult:
    found = [one for one in report.attributes.values() if one.domain == domain]
    measure = measure_skew_of(DomainSkew.of(report, domain))
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=CHECK,
        passed=measure.level in QUIET,
        severity=dg.AssetCheckSeverity.WARN if measure.level == "warn" else dg.AssetCheckSeverity.ERROR,
        description=measure.reason,
        metadata={
            LEVEL: measure.level,
            "refused": sum(report.refused.values()),
            **measure.values,
            **{f"{one.attribute}_equal_share": one.equal_share for one in found},
            "examples": _examples(found),
        },
    )


def _examples(found: list[AttributeSkew]) -> dg.TableMetadataValue:
    """Show differences by the ids of their rows, which name nobody."""
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord(
                {
                    "row": example.row_id,
                    "attribute": one.attribute,
                    "cause": example.cause,
                    "served": str(example.served),
                    "expected": str(example.expected),
                }
            )
            for one in found
            for example in one.examples
        ],
        schema=dg.TableSchema(
            columns=[
                dg.TableColumn(name, "string") for name in ("row", "attribute", "cause", "served", "expected")
            ]
        ),
    )
