"""The state of the exports, read in a child process: Iceberg's libraries take more memory than the whole console."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.freshness.levels import Measure, Unmeasurable
from dagster_prefs.freshness.measures import unknown

# A reading of exports takes seconds of a processor, and they change once a day.
KEPT_SECONDS = 600.0
TIMEOUT_SECONDS = 180.0
COMMAND = (sys.executable, "-m", "dagster_prefs", "status", "--json")


class ExportsReading:
    """The measures of the training tables, as `prefs status` reads them, at most every KEPT_SECONDS."""

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
        self._found: list[Measure] = []
        self._until = float("-inf")

    def __call__(self, now: datetime) -> list[Measure]:
        """Return the measures; they are `unknown` if the child process returns none."""
        if self._clock() >= self._until:
            self._found = self._read()
            self._until = self._clock() + KEPT_SECONDS
        return self._found

    def _read(self) -> list[Measure]:
        tables = [tile.table for tile in self._registry().tiles.values()]
        try:
            done = subprocess.run(
                self._command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
            told = json.loads(done.stdout)["measures"]
            return [_measure(one) for one in told if one["stage"] == "offline"]
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
            return unknown(
                "offline", tables, Unmeasurable("`prefs status --json` returned nothing: run it to see why")
            )


def _measure(told: dict[str, Any]) -> Measure:
    thresholds = told["thresholds"]
    return Measure(**{**told, "thresholds": None if thresholds is None else Freshness(**thresholds)})
