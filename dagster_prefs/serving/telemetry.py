"""Traces and metrics of OpenTelemetry, with the extra `telemetry`; nothing else imports it.

A service that has set OpenTelemetry up gives its client a `ReadTelemetry`; `prefs serve` sets it up itself from the
standard variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, …) with `start_telemetry`. A call of a client is a
span, each attempt within it (the concurrent requests of one round, or one statement) a span below it, and a request to
the feature server the span above it, within the trace of its `traceparent`. No id of a person is in a span.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.sdk import metrics as sdk_metrics
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    MetricExporter,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
    set_span_in_context,
)

from dagster_prefs.dynamodb.reader import Attempted
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.logs import TRACE_ID
from dagster_prefs.serving.observing import (
    FAILED,
    LATENCY_BUCKETS,
    Call,
    ReadCounts,
    Reads,
    count_outcomes,
)

SCOPE = "dagster_prefs"
SERVICE = "prefs-feature-server"
PROTOCOL = "http/protobuf"
# A method that a client makes up must not become a series or a name of its own.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ERROR = Status(StatusCode.ERROR)
# So many traces are sampled or not in a row.
DRAWN_AT_ONCE = 256
_BY_ID_AND_PARENT = re.compile(
    r"ParentBased\{root:(?:TraceIdRatioBased\{([^}]*)\}|(AlwaysOnSampler)|AlwaysOffSampler),"
    r"remoteParentSampled:AlwaysOnSampler,remoteParentNotSampled:AlwaysOffSampler,"
    r"localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler\}"
)


class TelemetryError(PrefsError):
    """A variable of OpenTelemetry asks for what this platform does not have."""


class ReadTelemetry:
    """Tells OpenTelemetry of the reads of any number of clients; an observer for their options.

    Counts them too, in `counts`, which a page for Prometheus may show as well. Without providers it uses the global
    ones, which the service has set.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._draws = _Draws.of(self._tracer)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._durations = meter.create_histogram(
            "prefs.read.duration",
            unit="s",
            description="Time of a call of a client.",
            explicit_bucket_boundaries_advisory=LATENCY_BUCKETS,
        )
        # Observed first at each collection, which brings the durations up to now into the histogram.
        for name, description, observe in (
            ("prefs.reads", "Reads of a domain by outcome.", self._observe_reads),
            ("prefs.read.partial_profiles", "Profiles that lacked a domain.", self._observe_partial),
            ("prefs.read.attempts", "Attempts of calls by their result.", self._observe_attempts),
        ):
            meter.create_observable_counter(name, [observe], description=description)
        self.counts = ReadCounts(self._record)
        # By entity and operation: the span's name and attributes.
        self._known: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}

    def call(self, entity: str, operation: str) -> Call:
        """A call begins: a span within the one that runs in this context."""
        counted = self.counts.call(entity, operation)
        draws = self._draws
        if draws is not None:
            # Where nothing set a context, no span can be in it, which takes longer to see.
            parent = trace.get_current_span().get_span_context() if get_current() else None
            if parent is None or not parent.is_valid:
                is_sampled = draws.next_is_sampled()
            else:
                is_sampled = parent.trace_flags.sampled
            if not is_sampled:
                return counted
        name, attributes = self._named(entity, operation)
        span = self._tracer.start_span(name, attributes=attributes)
        return _Traced(self._tracer, counted, span) if span.is_recording() else counted

    def _named(self, entity: str, operation: str) -> tuple[str, dict[str, str]]:
        known = self._known.get((entity, operation))
        if known is None:
            attributes = {"prefs.entity": entity, "prefs.operation": operation}
            known = self._known[entity, operation] = (f"read {entity} {operation}", attributes)
        return known

    def _record(self, entity: str, operation: str, seconds: Sequence[float]) -> None:
        attributes = self._named(entity, operation)[1]
        for value in seconds:
            self._durations.record(value, attributes)

    def _observe_reads(self, _: CallbackOptions) -> Iterable[Observation]:
        for (entity, outcome), number in self.counts.snapshot().reads.items():
            attributes = {
                "prefs.entity": entity,
                "prefs.domain": outcome.domain,
                "prefs.outcome": outcome.state,
            }
            yield Observation(
                number, {**attributes, "error.type": outcome.kind} if outcome.kind else attributes
            )

    def _observe_partial(self, _: CallbackOptions) -> Iterable[Observation]:
        for entity, number in self.counts.snapshot().partial.items():
            yield Observation(number, {"prefs.entity": entity})

    def _observe_attempts(self, _: CallbackOptions) -> Iterable[Observation]:
        for (entity, result), number in self.counts.snapshot().attempts.items():
            yield Observation(number, {"prefs.entity": entity, "prefs.result": result})


class _Draws(IdGenerator):
    """Decides ahead which traces that begin with a call are sampled, many in a row.

    To begin a span that is not sampled takes some 20 µs after a wait for the network, with cold caches, and most are
    not sampled. Only for samplers that decide by a trace's id, and by its parent where it has one: the standard ones
    whose name begins with `parentbased`.
    """

    @classmethod
    def of(cls, tracer: Tracer) -> Self | None:
        """Return the draws of a tracer, which it takes the ids of its traces from; None for any other sampler."""
        if not isinstance(tracer, sdk_trace.Tracer) or isinstance(tracer.id_generator, cls):
            # Of a tracer that another observer draws for already, each span is begun.
            return None
        plain = _BY_ID_AND_PARENT.fullmatch(tracer.sampler.get_description())
        return cls(tracer, float(plain[1] or bool(plain[2]))) if plain else None

    def __init__(self, tracer: sdk_trace.Tracer, share: float) -> None:
        # As TraceIdRatioBased decides: asking the sampler itself takes 3 µs a draw, this 0.2 µs.
        self._limit = TraceIdRatioBased.TRACE_ID_LIMIT
        self._bound = TraceIdRatioBased.get_bound_for_rate(share)
        self._ids = tracer.id_generator
        self._drawn: deque[int | None] = deque()
        self._next = threading.local()
        tracer.id_generator = self

    def next_is_sampled(self) -> bool:
        """Whether the trace that begins next in this thread is sampled; if so, it gets the id that was drawn for it."""
        try:
            drawn = self._drawn.popleft()
        except IndexError:
            ids = [self._ids.generate_trace_id() for _ in range(DRAWN_AT_ONCE)]
            drawn, *others = [id_ if id_ & self._limit < self._bound else None for id_ in ids]
            self._drawn.extend(others)
        if drawn is None:
            return False
        self._next.id = drawn
        return True

    def generate_trace_id(self) -> int:
        """Return the id that was drawn in this thread, or else a new one."""
        drawn: int | None = self._next.__dict__.pop("id", None)
        return self._ids.generate_trace_id() if drawn is None else drawn

    def generate_span_id(self) -> int:
        """Return a new id."""
        return self._ids.generate_span_id()

    def is_trace_id_random(self) -> bool:
        """Whether the ids are random."""
        return self._ids.is_trace_id_random()


class _Traced:
    """A call that is counted and traced."""

    __slots__ = ("_counted", "_inside", "_span", "_tracer")

    def __init__(self, tracer: Tracer, counted: Call, span: Span) -> None:
        self._tracer = tracer
        self._counted = counted
        self._span = span
        self._inside = set_span_in_context(span)

    @property
    def attempts(self) -> _Traced:
        return self

    def attempt(self, number: int, operations: Sequence[str]) -> Attempted:
        operation = operations[0]
        span = self._tracer.start_span(
            f"{operation} attempt {number}" if number > 1 else operation,
            self._inside,
            SpanKind.CLIENT,
            {
                "db.system.name": "postgresql" if operation == "select" else "aws.dynamodb",
                "db.operation.name": operation,
                "prefs.attempt": number,
                "prefs.requests": len(operations),
            },
        )

        def ended(kinds: Sequence[str]) -> None:
            if kinds:
                span.set_attribute("error.type", kinds[0])
                span.set_status(_ERROR)
            span.end()

        return ended

    def end(self, seconds: float, results: Sequence[str], reads: Reads, *, answered: bool = True) -> None:
        self._counted.end(seconds, results, reads, answered=answered)
        totals: dict[str, int] = {}
        for outcome, number in count_outcomes(reads).items():
            totals[outcome.state] = totals.get(outcome.state, 0) + number
            if outcome.state == FAILED:
                self._span.set_attribute("error.type", outcome.kind)
        self._span.set_attributes({f"prefs.{state}": number for state, number in totals.items()})
        if FAILED in totals:
            self._span.set_status(_ERROR)
        self._span.end()


class RequestTelemetry:
    """Traces and times the requests to a feature server, as a part of its callers' traces."""

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._seconds = metrics.get_meter(SCOPE, meter_provider=meter_provider).create_histogram(
            "http.server.request.duration",
            unit="s",
            description="Time to the answer of a request.",
            explicit_bucket_boundaries_advisory=LATENCY_BUCKETS,
        )
        self._fields = {name.lower().encode(): name.lower() for name in propagate.get_global_textmap().fields}

    def start(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> _RequestSpan:
        """A request arrives: its span is the current one of this context from now on."""
        carrier = {
            self._fields[name]: value.decode("latin-1") for name, value in headers if name in self._fields
        }
        parent = propagate.extract(carrier) if carrier else Context()
        known = method if method in _METHODS else "_OTHER"
        span = self._tracer.start_span(known, parent, SpanKind.SERVER, {"http.request.method": known})
        if span.is_recording():
            TRACE_ID.set(trace.format_trace_id(span.get_span_context().trace_id))
        return _RequestSpan(span, attach(set_span_in_context(span, parent)), known, self._seconds.record)


class _RequestSpan:
    __slots__ = ("_method", "_record", "_span", "_started", "_token")

    def __init__(self, span: Span, token: Any, method: str, record: Callable[..., None]) -> None:
        self._span = span
        self._token = token
        self._method = method
        self._record = record
        self._started = time.perf_counter()

    def end(self, route: str, status: int) -> None:
        """The request was answered, or its client went away."""
        told: dict[str, str | int] = {"http.route": route}
        if status:
            told["http.response.status_code"] = status
        if self._span.is_recording():
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attributes(told)
            if status >= 500:
                self._span.set_status(_ERROR)
        self._span.end()
        self._record(time.perf_counter() - self._started, {"http.request.method": self._method, **told})
        detach(self._token)


def start_telemetry(environment: Mapping[str, str]) -> None:
    """Send traces and metrics of this process to where OpenTelemetry's variables say, until it ends.

    OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER may be `otlp` (the default), `console` or `none`; everything else
    (endpoint, headers, sampler, resource, intervals) the SDK reads from its own variables. Providers that are set
    already stay, as those of `opentelemetry-instrument`. Raises TelemetryError for another exporter or protocol.
    """
    resource = Resource.create(
        {} if _names_service(environment) else {SERVICE_NAME: SERVICE},
    )
    span_exporters = [_SPAN_EXPORTERS[name]() for name in _exporters(environment, "TRACES", _SPAN_EXPORTERS)]
    metric_exporters = [
        _METRIC_EXPORTERS[name]() for name in _exporters(environment, "METRICS", _METRIC_EXPORTERS)
    ]
    if span_exporters and not isinstance(trace.get_tracer_provider(), sdk_trace.TracerProvider):
        tracers = sdk_trace.TracerProvider(resource=resource)
        for exporter in span_exporters:
            tracers.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(tracers)
    if metric_exporters and not isinstance(metrics.get_meter_provider(), sdk_metrics.MeterProvider):
        readers = [PeriodicExportingMetricReader(exporter) for exporter in metric_exporters]
        metrics.set_meter_provider(sdk_metrics.MeterProvider(readers, resource))


_SPAN_EXPORTERS: dict[str, Callable[[], SpanExporter]] = {
    "otlp": OTLPSpanExporter,
    "console": ConsoleSpanExporter,
}
_METRIC_EXPORTERS: dict[str, Callable[[], MetricExporter]] = {
    "otlp": OTLPMetricExporter,
    "console": ConsoleMetricExporter,
}


def _exporters(environment: Mapping[str, str], signal: str, known: Mapping[str, Any]) -> list[str]:
    variable = f"OTEL_{signal}_EXPORTER"
    given = environment.get(variable, "").strip().lower() or "otlp"
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known and name != "none":
            raise TelemetryError(f"{variable} is {excerpt(name)}: use {', '.join(known)} or none")
    if "otlp" in names:
        _check_protocol(environment, signal)
    return [name for name in names if name != "none"]


def _check_protocol(environment: Mapping[str, str], signal: str) -> None:
    for variable in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        given = environment.get(variable)
        if given:
            if given.strip().lower() != PROTOCOL:
                raise TelemetryError(
                    f"{variable} is {excerpt(given)}, and only {PROTOCOL} is installed: set it to {PROTOCOL}, and the "
                    "endpoint to the collector's HTTP port, usually 4318"
                )
            return


def _names_service(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("OTEL_SERVICE_NAME")) or f"{SERVICE_NAME}=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
