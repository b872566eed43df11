"""What the lake says, read in child processes: how the exports do, what drifted, what values are like.

Iceberg's libraries take more memory than all of the console.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.freshness.levels import Measure, Stage, Unmeasurable
from dagster_prefs.freshness.measures import unknown
from dagster_prefs.values.statistics import Statistics

# A reading takes seconds of a processor, and what it finds changes once a day.
KEPT_SECONDS = 600.0
TIMEOUT_SECONDS = 180.0
PREFS = (sys.executable, "-m", "dagster_prefs")


class ChildReading:
    """What a command prints as JSON, read at most every KEPT_SECONDS; one process at a time reads it."""

    def __init__(self, command: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.command = command
        self._clock = clock
        self._lock = threading.Lock()
        self._told: Any = None
        self._until = float("-inf")

    def __call__(self) -> Any:
        """Return the decoded JSON, None if the process fails or prints none."""
        with self._lock:
            if self._clock() >= self._until:
                self._told = self._read()
                self._until = self._clock() + KEPT_SECONDS
            return self._told

    def _read(self) -> Any:
        try:
            done = subprocess.run(
                self.command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
            return json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None


class LakeReadings:
    """The measures of the training tables and of drift, and the statistics of every attribute."""

    def __init__(
        self,
        registry: Callable[[], Registry],
        *,
        status: Callable[[], Any] | None = None,
        statistics: Callable[[], Any] | None = None,
    ) -> None:
        self._registry = registry
        self._status = status or ChildReading([*PREFS, "status", "--json"])
        self._statistics = statistics or ChildReading([*PREFS, "statistics", "--json"])

    def exports(self, now: datetime) -> list[Measure]:
        """Return the measures of the training tables; they are `unknown` if the process returns none."""
        try:
            return self._of("offline")
        except (LookupError, TypeError):
            tables = [tile.table for tile in self._registry().tiles.values()]
            return unknown(
                "offline", tables, Unmeasurable("`prefs status --json` returned nothing: run it to see why")
            )

    def drift(self, now: datetime) -> list[Measure]:
        """Return a measure for each cause of drift; none if the process returns none."""
        try:
            return self._of("drift")
        except (LookupError, TypeError):
            return []

    def statistics(self) -> Mapping[str, Mapping[str, Statistics]]:
        """Return the newest statistics: relation → attribute → statistics; empty if the process returns none."""
        try:
            return {
                relation: {name: Statistics.from_dict(one) for name, one in attributes.items()}
                for relation, attributes in self._statistics().items()
            }
        except (LookupError, TypeError, ValueError, AttributeError):
            return {}

    def _of(self, stage: Stage) -> list[Measure]:
        return [_measure(one) for one in self._status()["measures"] if one["stage"] == stage]


def _measure(told: dict[str, Any]) -> Measure:
    thresholds = told["thresholds"]
    return Measure(**{**told, "thresholds": None if thresholds is None else Freshness(**thresholds)})
