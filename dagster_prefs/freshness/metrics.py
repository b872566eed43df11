"""The readings in the text format that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dagster_prefs.freshness.levels import LEVELS, Measure
from dagster_prefs.freshness.status import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """One exported metric; `value` names what of a measure it shows."""

    name: str
    help: str
    value: str
    kind: Literal["gauge", "counter"] = "gauge"


METRICS: tuple[Metric, ...] = (
    Metric("prefs_lag_seconds", "Lag that the thresholds of the contract judge.", "lag_seconds"),
    Metric("prefs_lag_warn_seconds", "Lag from which a measure warns.", "warn_seconds"),
    Metric("prefs_lag_error_seconds", "Lag from which the promise is broken.", "error_seconds"),
    Metric("prefs_ingestion_messages_behind", "Messages in Kafka that are not ingested.", "messages_behind"),
    Metric("prefs_view_waiting", "Messages or rows that arrived and are not visible.", "waiting"),
    Metric(
        "prefs_view_newest_event_timestamp_seconds", "Time of the newest visible event.", "newest_event_at"
    ),
    Metric("prefs_view_ahead_seconds", "How far the newest event is in the future.", "ahead_seconds"),
    Metric("prefs_online_sampled", "Viewers that were compared with DynamoDB.", "sampled"),
    Metric("prefs_online_missing", "Sampled viewers without an item.", "missing"),
    Metric("prefs_online_extra", "Sampled items without a viewer.", "extra"),
    Metric("prefs_online_different", "Sampled viewers whose item has other values.", "different"),
    Metric("prefs_export_days_missing", "Complete days that are not exported.", "days_missing"),
    Metric("prefs_export_days_changed", "Days that changed after their export.", "days_changed"),
    Metric("prefs_canary_p50_seconds", "Median time from event to reader.", "p50_seconds"),
    Metric("prefs_canary_p99_seconds", "99th percentile of the time from event to reader.", "p99_seconds"),
    Metric("prefs_canary_lost_total", "Canaries that never became readable.", "lost", "counter"),
)
LEVEL_METRIC = Metric("prefs_level", "1 for the level that a measure has, 0 for the others.", "level")
STATUS_METRICS = (
    Metric("prefs_status_timestamp_seconds", "When the readings were taken.", "read_at"),
    Metric("prefs_status_duration_seconds", "How long the readings took.", "seconds"),
)


def metric_names() -> list[str]:
    """Every name that `render_metrics` may write."""
    return [metric.name for metric in (*METRICS, LEVEL_METRIC, *STATUS_METRICS)]


def render_metrics(status: Status) -> str:
    """The status in Prometheus' text format, labelled with `stage` and `name`."""
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: Status) -> Iterator[str]:
    for metric in METRICS:
        yield from _metric(metric, status.measures)
    yield from _head(LEVEL_METRIC)
    for measure in status.measures:
        for level in LEVELS:
            labels = _labels(measure) | {"level": level}
            yield _sample(LEVEL_METRIC.name, labels, int(measure.level == level))
    for metric, value in zip(STATUS_METRICS, (status.read_at.timestamp(), status.seconds), strict=True):
        yield from _head(metric)
        yield _sample(metric.name, {}, value)


def _metric(metric: Metric, measures: Sequence[Measure]) -> Iterator[str]:
    samples = []
    for measure in measures:
        own: dict[str, int | float | None] = {"lag_seconds": measure.lag_seconds, **measure.values}
        if measure.thresholds is not None:
            own["warn_seconds"] = measure.thresholds.warn_seconds
            own["error_seconds"] = measure.thresholds.error_seconds
        value = own.get(metric.value)
        # A reading that was not taken has no sample: a 0 would look like a good one.
        if value is not None:
            samples.append(_sample(metric.name, _labels(measure), value))
    if samples:
        yield from _head(metric)
        yield from samples


def _head(metric: Metric) -> Iterator[str]:
    yield f"# HELP {metric.name} {metric.help}"
    yield f"# TYPE {metric.name} {metric.kind}"


def _labels(measure: Measure) -> dict[str, str]:
    return {"stage": measure.stage, "name": measure.name}


def _sample(name: str, labels: Mapping[str, str], value: int | float) -> str:
    written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{written}}} {value!r}" if labels else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
