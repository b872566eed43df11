"""The state that Dagster keeps of the canary's sensor, read without loading Dagster, which takes seconds.

Only an instance with its default storage, SQLite files in its folder, is read this way. What is not exactly as
expected is left to Dagster itself.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import yaml

from dagster_prefs.freshness.canary import CANARY_SENSOR, Tick

# With one of these in its dagster.yaml, an instance keeps its schedules somewhere else.
ELSEWHERE = {
    "storage",
    "schedule_storage",
    "local_artifact_storage",
    "instance_class",
    "custom_instance_class",
}


def stored_ticks(home: Path) -> list[Tick] | None:
    """Return the last tick of each running sensor of the canary; None where only Dagster can tell.

    An instance that has not been made yet has none.
    """
    try:
        settings = home / "dagster.yaml"
        if settings.exists() and ELSEWHERE & (yaml.safe_load(settings.read_text()) or {}).keys():
            return None
        store = home / "schedules" / "schedules.db"
        if not store.exists():
            return []
        with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as connection:
            states = [
                json.loads(body)
                for (body,) in connection.execute(
                    "select instigator_body from instigators where instigator_type = 'SENSOR'"
                )
            ]
        return [
            Tick(
                state["job_specific_data"]["last_tick_timestamp"] or 0.0, state["job_specific_data"]["cursor"]
            )
            for state in states
            if state["origin"]["job_name"] == CANARY_SENSOR
            and state["job_specific_data"] is not None
            and state["status"]["__enum__"] != "InstigatorStatus.STOPPED"
        ]
    except (OSError, sqlite3.Error, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return None
