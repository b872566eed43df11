"""The state that Dagster stores of the canary's sensor, read from its SQLite file without loading Dagster.

Dagster has no public method for it: `DagsterInstance.all_instigator_state` is as internal as the file, and the GraphQL
API needs a running web server. Importing Dagster takes two seconds, and `prefs status` answers within one
(tests/test_reading_commands.py). So only the default storage, SQLite files in the instance's folder, is read this way;
for any other storage, and for content of an unexpected shape, the caller asks Dagster itself (`sensor_ticks` in
defs/freshness.py).
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import yaml

from dagster_prefs.freshness.canary import CANARY_SENSOR, Tick

# An instance with one of these keys in its dagster.yaml stores its schedules elsewhere.
ELSEWHERE = {
    "storage",
    "schedule_storage",
    "local_artifact_storage",
    "instance_class",
    "custom_instance_class",
}


def stored_ticks(home: Path, sensor: str = CANARY_SENSOR) -> list[Tick] | None:
    """Return the last tick of each running `sensor` of the canary; None if only Dagster can read the store.

    The list is empty if the instance does not exist yet.
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
            if state["origin"]["job_name"] == sensor
            and state["job_specific_data"] is not None
            and state["status"]["__enum__"] != "InstigatorStatus.STOPPED"
        ]
    except (OSError, sqlite3.Error, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return None
