"""Drift as measures, for alerts, and the statistics of values in the format that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as PrometheusMetric
from prometheus_client.registry import Collector

from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.drift import REUSE_SECONDS

if TYPE_CHECKING:
    from dagster_prefs.values.statistics import Statistics

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
