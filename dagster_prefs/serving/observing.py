"""Observe the clients' reads, to count or trace them. By default nothing is observed.

An observer is told of each call of a client and of each attempt within it. `ReadCounts` counts them without any further
package, `dagster_prefs.serving.prometheus` shows its counts to Prometheus, and `dagster_prefs.serving.telemetry` makes
spans and metrics of OpenTelemetry.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from dagster_prefs.dynamodb.reader import Attempted, Attempts
from dagster_prefs.errors import PrefsError

C = TypeVar("C")
T = TypeVar("T")

# Upper bounds of the buckets of every histogram of latencies, seconds.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

# Number of ended calls that are counted in one go.
NOTES_AT_ONCE = 256

FOUND, COLD_START, FAILED = "found", "cold_start", "error"

# The kinds of errors that state none, by the name of their class: importing the engine's errors would import its
# driver.
_KINDS = {
    "ItemError": "item",
    "EngineBusy": "busy",
    "EngineUnavailable": "unavailable",
    "PreferencesUnavailable": "unavailable",
}
# Errors of a caller who asked for something impossible: nothing was read.
_OF_CALLERS = frozenset({"ProfileError", "ContractError", "PreferenceError"})


class Outcome(NamedTuple):
    """The outcome of reading one domain: `found`, `cold_start`, or `error` with the error's kind, else empty.

    A domain that failed and is answered with cold-start values is an `error`.
    """

    domain: str
    state: str
    kind: str = ""


# Entity, operation, outcomes, partial profiles, results of the attempts, seconds.
_Note = tuple[str, str, Mapping[Outcome, int], int, list[str], float]


class Call(Attempts, Protocol):
    """One call of a client, while it runs."""

    def end(self, outcomes: Mapping[Outcome, int], partial: int) -> None:
        """The call ended with this number of each outcome, and of profiles that lack a domain.

        The caller does not change `outcomes` afterwards.
        """
        ...


class Observer(Protocol):
    """Observes every call of a client, from many threads. Its methods must be quick and not raise."""

    def call(self, entity: str, operation: str) -> Call:
        """A call begins, of this entity and this method of the client."""
        ...


class RequestSpan(Protocol):
    """The trace of one request to the feature server."""

    def end(self, route: str, status: int) -> None:
        """The request ended, with its route without values and the HTTP status; 0 if its client disconnected first."""
        ...


class RequestSpans(Protocol):
    """Begins the trace of each request, within the trace that its headers name."""

    def start(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """A request arrives. Whatever runs in this context from now on belongs to it."""
        ...


@dataclass(frozen=True)
class Watched:
    """What a feature server exposes about itself: the counts of its clients' reads, and its requests' traces."""

    counts: ReadCounts | None = None
    spans: RequestSpans | None = None


def telemetry_is_on(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables ask for traces or metrics: an endpoint, or an exporter other than none."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if any(environment.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in ("", "TRACES_", "METRICS_")):
        return True
    exporters = (environment.get(f"OTEL_{signal}_EXPORTER", "") for signal in ("TRACES", "METRICS"))
    return any(exporter.strip().lower() not in ("", "none") for exporter in exporters)


@dataclass
class Histogram:
    """Durations in the buckets of LATENCY_BUCKETS, in seconds; the last count is of the longer ones."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.buckets[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.seconds += seconds

    def cumulative(self) -> list[tuple[str, int]]:
        """Prometheus' buckets: upper bound as text, and the number of durations up to it."""
        total, found = 0, []
        for bound, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), self.buckets, strict=True):
            total += count
            found.append((bound, total))
        return found


@dataclass
class Counts:
    """The counts of ReadCounts.

    `reads` by entity and outcome, `partial` profiles by entity, `attempts` by entity and result (`ok` or the kind of
    the first error), `seconds` by entity and operation.
    """

    reads: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    partial: Counter[str] = field(default_factory=Counter)
    attempts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[tuple[str, str], Histogram] = field(default_factory=dict)


class ReadCounts:
    """Counts the reads of any number of clients; pass it as `observer` in their options.

    `ProfileClient(…, options=ClientOptions(observer=counts))`, then `counts.snapshot()`. `timed` is called for each
    call with its entity, operation and seconds, some time later, and before the next snapshot.
    """

    def __init__(self, timed: Callable[[str, str, float], None] | None = None) -> None:
        self._timed = timed
        self._lock = threading.Lock()
        self._counts = Counts()
        # A call only appends a note. Right after a read waited for the network the CPU caches are cold, and counting
        # there costs several times as much as counting many calls in one go.
        self._notes: deque[_Note] = deque()

    def call(self, entity: str, operation: str) -> Call:
        """Count a call that begins now."""
        return _Counting(self, entity, operation)

    def snapshot(self) -> Counts:
        """Return a copy of the counts so far."""
        with self._lock:
            ended = self._add_notes()
            now = self._counts
            copy = Counts(
                now.reads.copy(),
                now.partial.copy(),
                now.attempts.copy(),
                {key: Histogram(list(one.buckets), one.seconds) for key, one in now.seconds.items()},
            )
        self._tell(ended)
        return copy

    def _note(self, note: _Note) -> None:
        self._notes.append(note)
        if len(self._notes) >= NOTES_AT_ONCE:
            with self._lock:
                ended = self._add_notes()
            self._tell(ended)

    def _tell(self, ended: list[tuple[str, str, float]]) -> None:
        # Called without the lock: the callback may hold its own lock while it asks for a snapshot.
        if self._timed is not None:
            for entity, operation, seconds in ended:
                self._timed(entity, operation, seconds)

    def _add_notes(self) -> list[tuple[str, str, float]]:
        counts, notes = self._counts, self._notes
        ended = []
        # Take the notes of this moment only, because other threads keep appending.
        for _ in range(len(notes)):
            entity, operation, outcomes, partial, results, seconds = notes.popleft()
            for outcome, number in outcomes.items():
                counts.reads[entity, outcome] += number
            counts.partial[entity] += partial
            for result in results:
                counts.attempts[entity, result] += 1
            key = (entity, operation)
            histogram = counts.seconds.get(key)
            if histogram is None:
                histogram = counts.seconds[key] = Histogram()
            histogram.add(seconds)
            ended.append((entity, operation, seconds))
        return ended


class _Counting:
    """A call that appends a note when it ends."""

    __slots__ = ("_counts", "_entity", "_operation", "_results", "_started")

    def __init__(self, counts: ReadCounts, entity: str, operation: str) -> None:
        self._counts = counts
        self._entity = entity
        self._operation = operation
        self._results: list[str] = []
        self._started = time.perf_counter()

    def attempt(self, number: int, operations: Sequence[str]) -> Attempted:
        return self._attempted

    def _attempted(self, kinds: Sequence[str]) -> None:
        self._results.append(kinds[0] if kinds else "ok")

    def end(self, outcomes: Mapping[Outcome, int], partial: int) -> None:
        seconds = time.perf_counter() - self._started
        self._counts._note((self._entity, self._operation, outcomes, partial, self._results, seconds))


def error_kind(error: BaseException) -> str:
    """Return the kind of an error in a few words that never contain a value of a caller's."""
    kind = getattr(error, "kind", None)
    return kind if isinstance(kind, str) else _KINDS.get(type(error).__name__, "other")


class _Reading:
    """The call of the shop client in this context; `found` says whether its user is known."""

    __slots__ = ("call", "found", "number")

    def __init__(self, call: Call | None) -> None:
        self.call = call
        self.number = 0
        self.found = False


_READING: ContextVar[_Reading | None] = ContextVar("prefs_reading", default=None)


@contextmanager
def reading(observer: Observer | None, entity: str, domain: str) -> Iterator[_Reading]:
    """Observe the block as one call that reads one domain; the block sets `found` of the value it gets.

    An error of the block is counted, unless it is the caller's mistake.
    """
    if observer is None:
        yield _Reading(None)
        return
    told = _Reading(observer.call(entity, domain))
    outcomes: dict[Outcome, int] = {}
    token = _READING.set(told)
    try:
        yield told
        outcomes = {Outcome(domain, FOUND if told.found else COLD_START): 1}
    except Exception as error:
        if type(error).__name__ not in _OF_CALLERS or not isinstance(error, PrefsError):
            outcomes = {Outcome(domain, FAILED, error_kind(error)): 1}
        raise
    finally:
        _READING.reset(token)
        if told.call is not None:
            told.call.end(outcomes, 0)


def attempting(read: Callable[[C], T], operation: str) -> Callable[[C], T]:
    """Observe each call of `read` as an attempt of the current call; return `read` unchanged if there is none."""
    told = _READING.get()
    if told is None or told.call is None:
        return read
    call = told.call

    def attempt(connection: C) -> T:
        told.number += 1
        ended = call.attempt(told.number, [operation])
        try:
            found = read(connection)
        except Exception as error:
            ended([error_kind(error)])
            raise
        ended([])
        return found

    return attempt
