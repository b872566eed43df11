"""Drift as measures, for alerts, and the statistics of values in the format that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as PrometheusMetric
from prometheus_client.registry import Collector

from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.levels import Level, Measure

if TYPE_CHECKING:
    from dagster_prefs.freshness.status import Status
    from dagster_prefs.values.drift import Cause
    from dagster_prefs.values.statistics import Statistics

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


class DriftReadings:
    """The measures of drift beside others, read again after some minutes: the statistics change once a day."""

    def __init__(self, read: Callable[[], Sequence[Cause]]) -> None:
        self._read = read
        self._found: list[Measure] = []
        self._until = -1.0

    def added_to(self, status: Status) -> Status:
        """Return the status with the measures of drift."""
        if monotonic() >= self._until:
            try:
                self._found = measure_drift(self._read(), today=status.read_at.date())
            except PrefsError as error:
                self._found = unknown_drift(error)
            self._until = monotonic() + REUSE_SECONDS
        return replace(status, measures=(*status.measures, *self._found))


# Name → help, of the metrics with the labels `relation` and `attribute`.
VALUE_METRICS: Mapping[str, str] = {
    "prefs_values_rows": "Rows of the newest day with statistics.",
    "prefs_values_null_share": "Share of the rows without a value, 0 to 1.",
    "prefs_values_distinct": "Distinct values, estimated.",
    "prefs_values_mean": "Mean of a number.",
    "prefs_values_quantile": "Quantiles of a number.",
    "prefs_values_day_timestamp_seconds": "Beginning of the day that is described.",
}


class ValueMetrics(Collector):
    """The newest statistics of each attribute, read again after some minutes: they change once a day.

    Statistics that cannot be read have no sample, as no other reading that was not taken.
    """

    def __init__(self, read: Callable[[], Mapping[str, Mapping[str, Statistics]]]) -> None:
        self._read = read
        self._found: list[Statistics] = []
        self._until = -1.0

    def collect(self) -> Iterator[PrometheusMetric]:
        """One family for each metric."""
        if monotonic() >= self._until:
            try:
                self._found = [one for found in self._read().values() for one in found.values()]
            except PrefsError:
                self._found = []
            self._until = monotonic() + REUSE_SECONDS
        labels = ("relation", "attribute")
        families = {
            name: GaugeMetricFamily(
                name, text, labels=(*labels, "quantile") if name == "prefs_values_quantile" else labels
            )
            for name, text in VALUE_METRICS.items()
        }
        for one in self._found:
            place = (one.relation, one.attribute)
            midnight = datetime.combine(one.day, datetime.min.time(), UTC)
            for name, value in (
                ("rows", one.rows),
                ("null_share", one.null_share),
                ("distinct", one.distinct),
                ("mean", one.mean),
                ("day_timestamp_seconds", midnight.timestamp()),
            ):
                if value is not None:
                    families[f"prefs_values_{name}"].add_metric(place, value)
            for share, value in one.quantiles_by_share.items():
                families["prefs_values_quantile"].add_metric((*place, str(share)), value)
        yield from (family for family in families.values() if family.samples)
