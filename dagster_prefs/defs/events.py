"""The job that applies the events of the embedded engine if no follower does."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from dagster_prefs.defs.resources import (
    engine_pool,
    is_at_work,
    refresh_embedded,
    run_tags,
    schedule_options,
    sensor_status,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.freshness.embedded import FOLLOWER, measure_embedded
from dagster_prefs.platform import Platform

CATCH_UP_JOB = "catch_up"
NEW_EVENTS_SENSOR = "new_events"
# A run that is unfinished for longer than this was killed, and blocks no other run.
LONGEST_RUN = timedelta(hours=1)


def build(platform: Platform) -> dg.Definitions:
    """Return the job that applies arrived events, with its sensor and schedule; RisingWave needs none."""
    if platform.engine.kind == "risingwave":
        return dg.Definitions()
    settings = platform.settings

    @dg.op(
        name=settings.dagster_name("apply_events"),
        pool=engine_pool(settings),
        description="Apply and publish all that has arrived, and what time has changed, as `prefs refresh` does.",
    )
    def apply_events(context: dg.OpExecutionContext) -> None:
        refresh_embedded(platform, context.log.info)

    @dg.job(
        name=settings.dagster_name(CATCH_UP_JOB),
        tags=run_tags(settings),
        description="Keep views and items current if no follower runs.",
    )
    def catch_up() -> None:
        apply_events()

    @dg.sensor(
        name=settings.dagster_name(NEW_EVENTS_SENSOR),
        job=catch_up,
        minimum_interval_seconds=settings.refresh_poll_seconds,
        default_status=sensor_status(settings),
        description="If no follower runs: applies the messages that no refresh has read.",
    )
    def new_events(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            if reason := _done_elsewhere(platform, context.instance):
                return dg.SkipReason(reason)
            with platform.engine.connect() as connection:
                waiting = waiting_since(connection, platform.engine, platform.registry)
        except PrefsError as error:
            return dg.SkipReason(str(error))
        if not waiting:
            return dg.SkipReason("nothing arrived since the last refresh")
        # The key identifies the waiting messages, so that a failing refresh is not started repeatedly for the
        # same ones.
        key = ",".join(f"{topic}@{found.mark}" for topic, found in sorted(waiting.items()))
        return dg.RunRequest(run_key=key)

    @dg.schedule(
        job=catch_up,
        **schedule_options(settings, "catch_up_hourly", "0 * * * *"),
        description="If no follower runs: refreshes once an hour even without events, because windows move.",
    )
    def catch_up_hourly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        reason = _done_elsewhere(platform, context.instance)
        return dg.SkipReason(reason) if reason else dg.RunRequest()

    return dg.Definitions(jobs=[catch_up], sensors=[new_events], schedules=[catch_up_hourly])


def _done_elsewhere(platform: Platform, instance: dg.DagsterInstance) -> str:
    """Return which process applies the events already, a follower or a running job; empty if none does."""
    (follower,) = (
        one
        for one in measure_embedded(platform.engine, platform.registry, platform.settings.data_dir)
        if one.name == FOLLOWER
    )
    if follower.values.get("follower_alive"):
        return f"a follower applies them: {follower.reason}"
    if is_at_work(instance, platform.settings, CATCH_UP_JOB, since=datetime.now(UTC) - LONGEST_RUN):
        # Otherwise a steady stream of events would start runs faster than they end.
        return "a run is active; the next tick checks what it left"
    return ""
