"""Refreshes triggered by new events."""

from datetime import UTC, datetime

import dagster as dg

from dagster_prefs.defs.feature_views import REFRESH_JOB
from dagster_prefs.defs.resources import sensor_status
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.live.follower import read_follower
from dagster_prefs.platform import Platform


def build(platform: Platform) -> dg.Definitions:
    """Return the sensor that refreshes the embedded engine's views; RisingWave's need no refresh."""
    if platform.engine.kind == "risingwave":
        return dg.Definitions()

    @dg.sensor(
        name="new_events",
        job_name=REFRESH_JOB,
        minimum_interval_seconds=platform.settings.refresh_poll_seconds,
        default_status=sensor_status(platform),
        description="Starts a refresh when the raw tables hold messages that no refresh has read.",
    )
    def new_events() -> dg.RunRequest | dg.SkipReason:
        try:
            with platform.engine.connect() as connection:
                follower = read_follower(connection, platform.engine)
                if follower and follower.alive(datetime.now(UTC)) and not follower.problem:
                    return dg.SkipReason(f"{follower.process} follows the engine and applies what arrives")
                waiting = waiting_since(connection, platform.engine, platform.registry)
        except PrefsError as error:
            return dg.SkipReason(str(error))
        if not waiting:
            return dg.SkipReason("nothing arrived since the last refresh")
        # The key identifies the waiting messages, so that a failing refresh is not started repeatedly for the
        # same ones.
        key = ",".join(f"{topic}@{found.mark}" for topic, found in sorted(waiting.items()))
        return dg.RunRequest(run_key=key)

    return dg.Definitions(sensors=[new_events])
