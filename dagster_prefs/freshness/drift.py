"""What drifted, as measures beside those of freshness: from a file where nothing has changed since it was judged.

Judging loads Iceberg's libraries, which takes longer than all else that `prefs status` does; the statistics change once
a day.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from dagster_prefs.declarations.names import STATISTICS_TABLE
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder, write_private
from dagster_prefs.freshness.levels import Level, Measure
from dagster_prefs.iceberg.pointers import catalog_tables

if TYPE_CHECKING:
    from dagster_prefs.values.drift import Cause

# How late the statistics of a complete day may be: they are collected once a day, in the night.
LATE_DAYS = 2
REUSE_SECONDS = 300.0
_LEVELS: Mapping[str, Level] = {"ok": "ok", "learning": "skipped", "warn": "warn", "error": "error"}


def measure_drift(causes: Sequence[Cause], *, today: date) -> list[Measure]:
    """Return a measure for each cause: one alert tells all that the same events brought about. `today` is UTC."""
    return [_measure(cause, today) for cause in causes]


def late_statistics(newest: date, *, today: date) -> str:
    """Return what is wrong with statistics whose newest day is this one; empty if nothing. `today` is UTC."""
    if newest >= today - timedelta(days=LATE_DAYS):
        return ""
    return (
        f"the newest statistics are of {newest}: run `prefs statistics --collect`, and see the job `values`"
    )


def _measure(cause: Cause, today: date) -> Measure:
    newest = max(one.day for one in cause.days)
    findings = [finding for one in cause.days for finding in one.findings]
    level, reason = _LEVELS[cause.level], cause.reason
    if (late := late_statistics(newest, today=today)) and level in ("ok", "skipped"):
        level, reason = "warn", late
    return Measure(
        "drift",
        cause.name,
        level,
        reason,
        values={
            "psi": max((one.psi for one in findings if one.psi is not None), default=0.0),
            "ks": max((one.ks for one in findings if one.ks is not None), default=0.0),
            "attributes_drifted": sum(one.level in ("warn", "error") for one in findings),
        },
        notes={"day": newest.isoformat()},
    )


def unknown_drift(error: PrefsError) -> list[Measure]:
    """Return the measure of statistics that cannot be read."""
    return [Measure("drift", "statistics", "unknown", str(error))]


@dataclass(frozen=True)
class DriftMemo:
    """The last measures of drift, in a file; `catalog` is the file of the SQLite catalog of one machine."""

    path: Path
    catalog: Path
    namespace: str

    def state(self, registry: Registry, today: date) -> str | None:
        """Return a digest of what the measures follow from, None without statistics. Raises sqlite3.Error."""
        location = catalog_tables(self.catalog, self.namespace).get(STATISTICS_TABLE)
        if location is None:
            return None
        return hashlib.sha256(json.dumps([location, dict(registry.hashes), str(today)]).encode()).hexdigest()

    def recall(self, state: str) -> list[Measure] | None:
        """Return the measures of this state, None if others or none are stored."""
        try:
            content = json.loads(self.path.read_text())
            return [Measure(**found) for found in content["measures"]] if content["state"] == state else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def remember(self, state: str, measures: Sequence[Measure]) -> None:
        """Store the measures."""
        try:
            make_private_folder(self.path.parent)
            write_private(
                self.path, json.dumps({"state": state, "measures": [asdict(found) for found in measures]})
            )
        except OSError:
            # Without the file, the next reading only takes longer.
            return


class DriftReadings:
    """The measures of drift, judged again after some minutes, or with a memo only when something has changed."""

    def __init__(
        self,
        read: Callable[[], Sequence[Cause]],
        declared: Callable[[], Registry],
        memo: DriftMemo | None = None,
    ) -> None:
        self._read = read
        self._declared = declared
        self._memo = memo
        self._found: list[Measure] = []
        self._until = -1.0

    def __call__(self, now: datetime) -> list[Measure]:
        """Return a measure for each cause; `now` is UTC."""
        if monotonic() >= self._until:
            try:
                self._found = self._recalled(now.date())
            except PrefsError as error:
                self._found = unknown_drift(error)
            self._until = monotonic() + REUSE_SECONDS
        return self._found

    def _recalled(self, today: date) -> list[Measure]:
        state = None
        if self._memo is not None:
            try:
                state = self._memo.state(self._declared(), today)
            except sqlite3.Error:
                # What is wrong with the catalog, and its remedy, is told by the reading.
                return measure_drift(self._read(), today=today)
            if state is None:
                return []
            if (known := self._memo.recall(state)) is not None:
                return known
        found = measure_drift(self._read(), today=today)
        if self._memo is not None and state is not None:
            self._memo.remember(state, found)
        return found
