"""How the exports do and what drifted, read in a process of its own.

Iceberg's libraries take more memory than all of the console.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.freshness.levels import Measure, Stage, Unmeasurable
from dagster_prefs.freshness.measures import unknown

# A reading of exports takes seconds of a processor, and they change once a day.
KEPT_SECONDS = 600.0
TIMEOUT_SECONDS = 180.0
COMMAND = (sys.executable, "-m", "dagster_prefs", "status", "--json")


class ExportsReading:
    """The measures of the training tables and of drift, as `prefs status` reads them, at most every KEPT_SECONDS."""

    def __init__(
        self,
        registry: Callable[[], Registry],
        *,
        command: Sequence[str] = COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._command = command
        self._clock = clock
        self._lock = threading.Lock()
        self._found: list[Measure] = []
        self._until = float("-inf")

    def exports(self, now: datetime) -> list[Measure]:
        """Return the measures of the training tables; they are `unknown` where the process tells none."""
        return self._of("offline")

    def drift(self, now: datetime) -> list[Measure]:
        """Return a measure for each cause of drift; none where the process tells none."""
        return self._of("drift")

    def _of(self, stage: Stage) -> list[Measure]:
        # Both are asked for at once, and read by one process.
        with self._lock:
            if self._clock() >= self._until:
                self._found = self._read()
                self._until = self._clock() + KEPT_SECONDS
            return [found for found in self._found if found.stage == stage]

    def _read(self) -> list[Measure]:
        tables = [tile.table for tile in self._registry().tiles.values()]
        try:
            done = subprocess.run(
                self._command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
            told = json.loads(done.stdout)["measures"]
            return [_measure(one) for one in told if one["stage"] in ("offline", "drift")]
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
            return unknown(
                "offline", tables, Unmeasurable("`prefs status --json` returned nothing: run it to see why")
            )


def _measure(told: dict[str, Any]) -> Measure:
    thresholds = told["thresholds"]
    return Measure(**{**told, "thresholds": None if thresholds is None else Freshness(**thresholds)})
