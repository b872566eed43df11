"""What the clients and the server tell of themselves: counts, Prometheus, OpenTelemetry, ids of requests."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from scripted_dynamodb import Reply, Request, Script, answer, failure
from served import REGION, SERVED, profile_client, running
from waiting import wait_for

from dagster_prefs.dynamodb.transport import ReadError
from dagster_prefs.logs import REQUEST_ID
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ProfileClient, ReadCounts, ShopClient
from dagster_prefs.serving.observing import (
    LATENCY_BUCKETS,
    NOTES_AT_ONCE,
    Observer,
    Outcome,
    SimpleOutcome,
    Watched,
    telemetry_is_on,
)
from dagster_prefs.serving.preferences import PreferenceError, PreferencesUnavailable
from dagster_prefs.serving.prometheus import ReadCollector
from dagster_prefs.serving.telemetry import (
    ReadTelemetry,
    RequestTelemetry,
    TelemetryError,
    start_telemetry,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def options(observer: Observer, **given: Any) -> ClientOptions:
    return ClientOptions(30, read_timeout_seconds=30, observer=observer, **given)


def client_of(script: Script, observer: Observer, **given: Any) -> ProfileClient:
    return ProfileClient(
        SERVED, endpoint_url=script.endpoint, region=REGION, options=options(observer, **given)
    )


def watch_fails(request: Request) -> Reply:
    """The first domain always fails, and everybody is new."""
    key = request.body.get("Key", {}).get("domain_key", {}).get("S")
    return failure("InternalServerError", status=500) if key == "engagement#watch" else answer({})


@pytest.mark.parametrize("transport", ["lean", "boto3"])
def test_reads_are_counted_by_domain_and_outcome(script: Script, transport: str) -> None:
    script.behave = watch_fails
    counts = ReadCounts()
    with client_of(script, counts, max_attempts=2, transport=transport) as client:
        client.get(1, ["watch", "interactions"])
        # What stands in for a domain that failed does not make it one that was read.
        client.get(2, ["watch"], fallback="cold_start")
        client.get_many([3, 4], ["interactions"])
        script.behave = lambda request: failure("ExpiredTokenException")
        with pytest.raises(ReadError):
            client.get(5, ["interactions"])
    found = counts.snapshot()
    assert found.reads == {
        ("viewer", Outcome("watch", "error", "unavailable")): 2,
        ("viewer", Outcome("interactions", "cold_start")): 3,
        ("viewer", Outcome("interactions", "error", "credentials")): 1,
    }
    assert found.partial == {"viewer": 2}
    assert found.attempts == {
        ("viewer", "unavailable"): 4,
        ("viewer", "ok"): 1,
        ("viewer", "credentials"): 1,
    }
    assert {key: sum(one.buckets) for key, one in found.seconds.items()} == {
        ("viewer", "get"): 3,
        ("viewer", "get_many"): 1,
    }


def test_reads_of_the_shop_are_counted(shop: Any) -> None:
    counts = ReadCounts()
    with ShopClient(shop.engine, observer=counts) as client:
        client.get_user_profile("nobody")
        client.rank("nobody")
        client.get_more("nobody", "brands")
        with pytest.raises(PreferenceError):
            client.get_user_profile("")
        shop.execute("drop table user_brand_profile")
        with pytest.raises(PreferencesUnavailable):
            client.get_user_profile("nobody")
    found = counts.snapshot()
    assert found.reads == {
        ("user", Outcome("profile", "cold_start")): 1,
        ("user", Outcome("ranking", "cold_start")): 1,
        ("user", Outcome("brands", "cold_start")): 1,
        ("user", Outcome("profile", "error", "unavailable")): 1,
    }
    assert found.attempts["user", "ok"] == 3
    assert sum(found.attempts.values()) >= 4


def test_prometheus_shows_the_counts_of_any_service(script: Script) -> None:
    script.behave = watch_fails
    counts = ReadCounts()
    registry = CollectorRegistry()
    registry.register(ReadCollector(counts))
    with client_of(script, counts, max_attempts=1) as client:
        client.get(1, ["watch", "interactions"])
    lines = generate_latest(registry).decode().splitlines()
    assert 'prefs_reads_total{domain="watch",entity="viewer",outcome="error"} 1.0' in lines
    assert 'prefs_reads_total{domain="interactions",entity="viewer",outcome="cold_start"} 1.0' in lines
    assert 'prefs_read_errors_total{domain="watch",entity="viewer",kind="unavailable"} 1.0' in lines
    assert 'prefs_read_partial_profiles_total{entity="viewer"} 1.0' in lines
    assert 'prefs_read_attempts_total{entity="viewer",result="unavailable"} 1.0' in lines
    assert 'prefs_read_seconds_count{entity="viewer",operation="get"} 1.0' in lines


class Collected:
    """OpenTelemetry with everything kept in memory."""

    def __init__(self, share: float = 1.0) -> None:
        self._spans = InMemorySpanExporter()
        self.tracers = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)))
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.reads = ReadTelemetry(tracer_provider=self.tracers, meter_provider=self.meters)
        self.requests = RequestTelemetry(tracer_provider=self.tracers, meter_provider=self.meters)

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self._spans.get_finished_spans(), key=lambda span: span.start_time or 0)

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def test_a_call_is_a_span_and_each_attempt_one_below_it(script: Script) -> None:
    script.behave = lambda request: (
        failure("InternalServerError", status=500) if request.number == 1 else answer({})
    )
    collected = Collected()
    with client_of(script, collected.reads) as client:
        client._lag_read_at = dict.fromkeys(client._lag_read_at, float("inf"))
        client.get(42, ["watch"])
    call, first, second = collected.spans
    assert (call.name, call.kind, call.status.status_code) == (
        "read viewer get",
        SpanKind.INTERNAL,
        StatusCode.UNSET,
    )
    assert dict(call.attributes or {}) == {
        "prefs.entity": "viewer",
        "prefs.operation": "get",
        "prefs.cold_start": 1,
    }
    assert [parent_of(one) for one in (call, first, second)] == [None, id_of(call), id_of(call)]
    assert [one.kind for one in (first, second)] == [SpanKind.CLIENT] * 2
    assert [(one.attributes or {})["prefs.attempt"] for one in (first, second)] == [1, 2]
    assert (first.attributes or {})["error.type"] == "unavailable"
    assert [one.status.status_code for one in (first, second)] == [StatusCode.ERROR, StatusCode.UNSET]
    # Nobody's id is in a trace.
    assert "42" not in json.dumps([dict(span.attributes or {}) for span in collected.spans])
    metrics = collected.metrics()
    assert [(point.attributes["prefs.outcome"], point.value) for point in metrics["prefs.reads"]] == [
        ("cold_start", 1)
    ]
    assert {point.attributes["prefs.result"]: point.value for point in metrics["prefs.read.attempts"]} == {
        "unavailable": 1,
        "ok": 1,
    }
    assert metrics["prefs.read.duration"][0].count == 1


def test_a_failed_call_is_an_error_of_its_span(script: Script) -> None:
    script.behave = lambda request: failure("ExpiredTokenException")
    collected = Collected()
    with client_of(script, collected.reads) as client, pytest.raises(ReadError):
        client.get(1, ["watch"])
    call = collected.spans[0]
    assert call.status.status_code is StatusCode.ERROR
    assert (call.attributes or {})["error.type"] == "credentials"


def test_what_is_not_sampled_has_no_span_and_is_counted(script: Script) -> None:
    collected = Collected(share=0.0)
    with client_of(script, collected.reads) as client:
        client.get(1, ["watch"])
    assert collected.spans == []
    assert collected.metrics()["prefs.read.duration"][0].count == 1
    assert collected.reads.counts.snapshot().attempts == {("viewer", "ok"): 1}


def test_nobody_is_told_of_a_duration_with_the_lock_held() -> None:
    """OpenTelemetry takes a snapshot while it holds its own lock, which it takes again for each duration."""
    counts: ReadCounts
    told: list[int] = []

    def timed(entity: str, operation: str, seconds: Sequence[float]) -> None:
        other = threading.Thread(target=counts.snapshot, daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive()
        told.append(len(seconds))

    counts = ReadCounts(timed)
    for _ in range(NOTES_AT_ONCE + 1):
        counts.call("viewer", "get").end(0.5, ["ok"], [])
    counts.snapshot()
    assert told == [NOTES_AT_ONCE, 1]


def test_a_call_that_is_not_sampled_costs_little(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of OpenTelemetry runs for it but a look at the context; its duration is recorded later, with others."""
    collected = Collected(share=0.0)
    with client_of(script, collected.reads) as client:
        monkeypatch.setattr(sdk_trace.Tracer, "start_span", None)
        for _ in range(3):
            client.get(1, ["watch"])
    (point,) = collected.metrics()["prefs.read.duration"]
    assert (point.count, sum(point.bucket_counts)) == (3, 3)
    assert 0 < point.min <= point.max <= point.sum
    assert point.explicit_bounds == LATENCY_BUCKETS


@pytest.mark.parametrize(
    "sampler", [ParentBased(TraceIdRatioBased(0.25)), TraceIdRatioBased(0.25), ParentBased(ALWAYS_ON)]
)
def test_a_share_of_the_traces_is_sampled(sampler: Sampler) -> None:
    """The same share, with ids of their own, whether the sampler's decisions can be drawn ahead or not."""
    spans = InMemorySpanExporter()
    tracers = TracerProvider(sampler=sampler)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    reads = ReadTelemetry(tracer_provider=tracers, meter_provider=MeterProvider([]))
    for _ in range(2000):
        reads.call("viewer", "get").end(0.5, ["ok"], [{"watch": SimpleOutcome("found")}])
    found = {span.context.trace_id for span in spans.get_finished_spans() if span.context}
    assert len(found) == len(spans.get_finished_spans())
    # Eight standard deviations.
    all_of_them = sampler.get_description().startswith("ParentBased{root:AlwaysOn")
    assert len(found) == 2000 if all_of_them else 345 < len(found) < 655
    assert all(sampler.should_sample(None, id_, "x").decision is Decision.RECORD_AND_SAMPLE for id_ in found)
    assert reads.counts.snapshot().reads == {("viewer", Outcome("watch", "found")): 2000}


def watched_client(script: Script, observer: Observer) -> AsyncProfileClient:
    return AsyncProfileClient(
        SERVED, endpoint_url=script.endpoint, region=REGION, options=options(observer, max_attempts=1)
    )


def test_a_request_goes_on_in_its_callers_trace(script: Script, shop: Any) -> None:
    collected = Collected()
    watched = Watched(collected.reads.counts, collected.requests)
    preferences = ShopClient(shop.engine, observer=collected.reads)
    with running(
        watched_client(script, collected.reads), preferences, watched=watched, catalogue_refresh_seconds=None
    ) as caller:
        for flag in ("01", "00"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}
            assert caller.call("GET", "/v1/profiles/42?domains=watch", headers=headers)[0] == 200
        sampled = collected.spans
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert caller.call("GET", "/v1/users/u1/profile", headers=headers)[0] == 200
        text = caller.get("/metrics")[1]
        # A client that goes away before its request has arrived.
        before = len(collected.spans)
        with socket.create_connection(("127.0.0.1", caller.port), timeout=60) as peer:
            peer.sendall(b"POST /v1/profiles HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
        wait_for(lambda: len(collected.spans) > before)
        gone = collected.spans[-1]
    assert (gone.name, dict(gone.attributes or {})) == (
        "POST other",
        {"http.request.method": "POST", "http.route": "other"},
    )
    request, call, attempt = sampled
    assert request.name == "GET /v1/profiles/{viewer_id}"
    assert request.kind is SpanKind.SERVER
    assert (request.attributes or {})["http.response.status_code"] == 200
    assert {format(span.context.trace_id, "032x") for span in sampled if span.context} == {TRACE}
    assert [parent_of(span) for span in sampled] == [int(PARENT, 16), id_of(request), id_of(call)]
    assert attempt.name == "GetItem"
    shop_spans = collected.spans[len(sampled) : before]
    assert [span.name for span in shop_spans] == [
        "GET /v1/users/{user_id}/profile",
        "read user profile",
        "select",
    ]
    assert parent_of(shop_spans[1]) == id_of(shop_spans[0])
    assert 'prefs_reads_total{domain="watch",entity="viewer",outcome="cold_start"} 2.0' in text
    assert 'prefs_reads_total{domain="profile",entity="user",outcome="cold_start"} 1.0' in text
    durations = collected.metrics()["http.server.request.duration"]
    assert {point.attributes["http.route"]: point.count for point in durations} == {
        "/v1/profiles/{viewer_id}": 2,
        "/v1/users/{user_id}/profile": 1,
        "other": 1,
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [("order-7:a", True), ("", False), ("a b", False), ("x" * 129, False), ("<script>", False)],
)
def test_a_request_has_an_id_that_is_returned(
    script: Script, given: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG, "dagster_prefs.serving.gate"),
        running(profile_client(script.endpoint), None) as caller,
    ):
        ids = set()
        for path in ("/v1/profiles/1?domains=watch", "/nowhere", "/healthz", "/v1/profiles/none"):
            _, _, headers = caller.call("GET", path, headers={"X-Request-Id": given})
            ids.add(headers["x-request-id"])
            assert (headers["x-request-id"] == given) == kept
    assert len(ids) == (1 if kept else 4)
    assert {record.route for record in caplog.records} >= {"/v1/profiles/{viewer_id}", "other"}  # type: ignore[attr-defined]
    assert REQUEST_ID.get() is None


def test_a_fault_of_the_server_is_logged_with_the_request_that_met_it(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(AsyncProfileClient, "get", lambda *_, **__: 1 / 0)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(REQUEST_ID.get())

    handler = Handler()
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        with running(profile_client(script.endpoint), None) as caller:
            status, _, headers = caller.call("GET", "/v1/profiles/1", headers={"X-Request-Id": "abc"})
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert (status, headers["x-request-id"]) == (500, "abc")
    assert seen == ["abc"]


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    # The client alone: tests/serving/test_import.py.
    code = (
        "import sys\n"
        "import dagster_prefs.serving.server, dagster_prefs.cli.serving\n"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, False),
        ({"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_standard_variables_switch_it_on(environment: dict[str, str], on: bool) -> None:
    assert telemetry_is_on(environment) is on


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', and only http/protobuf",
        ),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin': use otlp, console or none"),
        (
            {"OTEL_METRICS_EXPORTER": "prometheus"},
            "OTEL_METRICS_EXPORTER is 'prometheus': use otlp, console or none",
        ),
    ],
)
def test_what_is_not_installed_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TelemetryError, match=message):
        start_telemetry(environment)
