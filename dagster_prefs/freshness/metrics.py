"""The measures in the text format that Prometheus scrapes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as PrometheusMetric
from prometheus_client.registry import Collector

from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.levels import LEVELS, Measure
from dagster_prefs.freshness.status import Status
from dagster_prefs.freshness.values import VALUE_METRICS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsError(PrefsError):
    """The metrics cannot be served."""


@dataclass(frozen=True)
class Metric:
    """One exported metric; `value` names the value of a measure that it exports."""

    name: str
    help: str
    value: str
    kind: Literal["gauge", "counter"] = "gauge"


METRICS: tuple[Metric, ...] = (
    Metric("prefs_lag_seconds", "Lag that is compared with the thresholds of the contract.", "lag_seconds"),
    Metric("prefs_lag_warn_seconds", "Lag from which a measure warns.", "warn_seconds"),
    Metric("prefs_lag_error_seconds", "Lag from which the freshness target is missed.", "error_seconds"),
    Metric(
        "prefs_follower_alive", "1 while a process follows the embedded engine, else 0.", "follower_alive"
    ),
    Metric("prefs_follower_step_age_seconds", "Time since the follower's last step.", "step_age_seconds"),
    Metric(
        "prefs_follower_steps_total", "Steps of the embedded engine that did something.", "steps", "counter"
    ),
    Metric("prefs_follower_waiting_messages", "Messages that the follower has not read.", "waiting_messages"),
    Metric(
        "prefs_follower_waiting_changes", "Changed rows that the follower has not applied.", "waiting_changes"
    ),
    Metric("prefs_follower_waiting_keys", "Items that the follower has not published.", "waiting_keys"),
    Metric(
        "prefs_follower_waiting_views",
        "Views and domains that are due to be compared as a whole.",
        "waiting_views",
    ),
    Metric("prefs_engine_uptime_seconds", "Time since the embedded engine started.", "uptime_seconds"),
    Metric("prefs_engine_disk_free_bytes", "Free space of the embedded engine's disk.", "disk_free_bytes"),
    Metric("prefs_ingestion_messages_behind", "Messages in Kafka that are not ingested.", "messages_behind"),
    Metric("prefs_messages_total", "Messages of a topic that were read.", "topic_messages", "counter"),
    Metric(
        "prefs_rejected_events_total", "Messages of a topic that were rejected.", "topic_rejected", "counter"
    ),
    Metric("prefs_view_waiting", "Messages or rows that arrived and are not visible.", "waiting"),
    Metric(
        "prefs_view_newest_event_timestamp_seconds", "Time of the newest visible event.", "newest_event_at"
    ),
    Metric("prefs_view_ahead_seconds", "How far the newest event is in the future.", "ahead_seconds"),
    Metric("prefs_catch_up_rate", "Units per second at which a backlog ends.", "catch_up_rate"),
    Metric(
        "prefs_catch_up_seconds_left",
        "Estimated time until a backlog is worked off.",
        "catch_up_seconds_left",
    ),
    Metric("prefs_history_parts", "Parts of a topic's history.", "parts"),
    Metric("prefs_history_parts_done", "Parts of a topic's history that are stored.", "parts_done"),
    Metric("prefs_online_sampled", "Ids that were compared with DynamoDB.", "sampled"),
    Metric("prefs_online_missing", "Sampled ids without an item.", "missing"),
    Metric("prefs_online_extra", "Sampled items of ids without a row.", "extra"),
    Metric("prefs_online_different", "Sampled ids whose item has other values.", "different"),
    Metric("prefs_export_days_missing", "Complete days that are not exported.", "days_missing"),
    Metric("prefs_export_days_changed", "Days that changed after their export.", "days_changed"),
    Metric("prefs_export_days_foreign", "Exported days that another writer changed.", "days_foreign"),
    Metric("prefs_events_unexported", "Messages that the lake does not hold yet.", "events_unexported"),
    Metric("prefs_canary_p50_seconds", "Median time from event to reader.", "p50_seconds"),
    Metric("prefs_canary_p99_seconds", "99th percentile of the time from event to reader.", "p99_seconds"),
    Metric("prefs_drift_psi", "Greatest population stability index of a topic's attributes.", "psi"),
    Metric("prefs_drift_ks", "Greatest Kolmogorov-Smirnov distance of a topic's attributes.", "ks"),
    Metric("prefs_drift_attributes", "Attributes of a topic's tiles that drifted.", "attributes_drifted"),
    Metric("prefs_canary_lost_total", "Canaries that never became readable.", "lost", "counter"),
)
LEVEL_METRIC = Metric("prefs_level", "1 for the level that a measure has, 0 for the others.", "level")
STATUS_METRICS = (
    Metric("prefs_status_timestamp_seconds", "When the readings were taken.", "read_at"),
    Metric("prefs_status_duration_seconds", "How long the readings took.", "seconds"),
)


def metric_names() -> list[str]:
    """Return every name that `render_metrics` may write."""
    return [*(metric.name for metric in (*METRICS, LEVEL_METRIC, *STATUS_METRICS)), *VALUE_METRICS]


def render_metrics(status: Status, *others: Collector) -> str:
    """Render the status in Prometheus' text format, labelled with `stage` and `name`, and what the others collect."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in (_Readings(status), *others):
        registry.register(collector)
    return generate_latest(registry).decode()


class MetricsServer(ThreadingHTTPServer):
    """Serves `/metrics` on one address; `serve_forever` runs it until `shutdown`.

    `read` evaluates the measures; one answer is reused for `reuse_seconds`, so that concurrent scrapes do not multiply
    the load on the engine. `others` collect further metrics. Port 0 selects a free port, see `server_port`.

    Raises MetricsError if the address is in use or is not on this machine.
    """

    daemon_threads = True

    def __init__(
        self,
        read: Callable[[], Status],
        *,
        host: str = "127.0.0.1",
        port: int = 9475,
        reuse_seconds: float = 10.0,
        others: Sequence[Collector] = (),
    ) -> None:
        self._read = read
        self._others = others
        self._reuse = reuse_seconds
        self._lock = threading.Lock()
        self._answer = b""
        self._until = -1.0
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise MetricsError(
                f"metrics cannot be served at {host}:{port} ({error.strerror}): choose another port"
            ) from None

    def exposition(self) -> bytes:
        """Return the metrics, evaluated again if the last evaluation is too old."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._answer = render_metrics(self._read(), *self._others).encode()
                self._until = time.monotonic() + self._reuse
            return self._answer


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/metrics":
            self.send_error(404, "the metrics are at /metrics")
            return
        body = self.server.exposition()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Discard the log line of a scrape."""


class _Readings(Collector):
    """Collects one status for prometheus_client."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[PrometheusMetric]:
        """Yield a family for each metric that has samples."""
        status = self._status
        for metric in METRICS:
            # A reading that failed has no sample, because a 0 would look like a good value.
            values = [(measure, _value(metric, measure)) for measure in status.measures]
            if samples := [(measure, value) for measure, value in values if value is not None]:
                family = _family(metric, ("stage", "name"))
                for measure, value in samples:
                    family.add_metric((measure.stage, measure.name), value)
                yield family
        levels = _family(LEVEL_METRIC, ("stage", "name", "level"))
        for measure in status.measures:
            for level in LEVELS:
                levels.add_metric((measure.stage, measure.name, level), measure.level == level)
        yield levels
        for metric, value in zip(STATUS_METRICS, (status.read_at.timestamp(), status.seconds), strict=True):
            yield GaugeMetricFamily(metric.name, metric.help, value)


def _family(metric: Metric, labels: Sequence[str]) -> GaugeMetricFamily | CounterMetricFamily:
    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return family(metric.name, metric.help, labels=labels)


def _value(metric: Metric, measure: Measure) -> int | float | None:
    own: dict[str, int | float | None] = {"lag_seconds": measure.lag_seconds, **measure.values}
    if measure.thresholds is not None:
        own["warn_seconds"] = measure.thresholds.warn_seconds
        own["error_seconds"] = measure.thresholds.error_seconds
    return own.get(metric.value)
