"""The counts of reads for Prometheus: on the page of the feature server, or of any service that has prometheus_client.

counts = ReadCounts()
prometheus_client.REGISTRY.register(ReadCollector(counts))
client = ProfileClient(…, options=ClientOptions(observer=counts))
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dagster_prefs.serving.observing import FAILED, ReadCounts

READS = "prefs_reads_total"
READ_ERRORS = "prefs_read_errors_total"
READ_PARTIAL = "prefs_read_partial_profiles_total"
READ_ATTEMPTS = "prefs_read_attempts_total"
READ_SECONDS = "prefs_read_seconds"


class ReadCollector(Collector):
    """Shows what a ReadCounts has counted, as of each scrape."""

    def __init__(self, counts: ReadCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """The families of metrics of reads."""
        counts = self._counts.snapshot()
        reads = CounterMetricFamily(
            READS,
            "Reads of a domain by outcome: found, cold_start or error.",
            labels=("entity", "domain", "outcome"),
        )
        errors = CounterMetricFamily(
            READ_ERRORS, "Reads of a domain that failed, by cause.", labels=("entity", "domain", "kind")
        )
        by_outcome: dict[tuple[str, str, str], int] = {}
        for (entity, outcome), number in sorted(counts.reads.items()):
            key = (entity, outcome.domain, outcome.state)
            by_outcome[key] = by_outcome.get(key, 0) + number
            if outcome.state == FAILED:
                errors.add_metric((entity, outcome.domain, outcome.kind), number)
        for key, number in by_outcome.items():
            reads.add_metric(key, number)
        yield reads
        yield errors
        partial = CounterMetricFamily(READ_PARTIAL, "Profiles that lacked a domain.", labels=("entity",))
        for entity, number in sorted(counts.partial.items()):
            partial.add_metric((entity,), number)
        yield partial
        attempts = CounterMetricFamily(
            READ_ATTEMPTS,
            "Attempts of calls by their result: ok, or the kind of the first error.",
            labels=("entity", "result"),
        )
        for (entity, result), number in sorted(counts.attempts.items()):
            attempts.add_metric((entity, result), number)
        yield attempts
        seconds = HistogramMetricFamily(
            READ_SECONDS, "Time of a call of a client.", labels=("entity", "operation")
        )
        for labels, histogram in sorted(counts.seconds.items()):
            seconds.add_metric(labels, histogram.cumulative(), histogram.seconds)
        yield seconds
