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
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from dagster_prefs.dynamodb.reader import Attempts
from dagster_prefs.errors import PrefsError

if TYPE_CHECKING:
    from dagster_prefs.serving.served_log import ServedLog

C = TypeVar("C")
T = TypeVar("T")

# Upper bounds of the buckets of every histogram of latencies, seconds.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

# This many ended calls are counted at once; profiles of calls with more than MOST_READS_NOTED are counted immediately.
NOTES_AT_ONCE = 256
MOST_READS_NOTED = 8

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


class DomainOutcome(Protocol):
    """How one domain of one profile was read, such as a DomainRead."""

    @property
    def state(self) -> str:
        """`found`, `cold_start`, or anything for one with an error."""
        ...

    @property
    def error(self) -> BaseException | None:
        """The error of its read; it counts even if cold-start values stand in."""
        ...


class SimpleOutcome(NamedTuple):
    """The outcome of a domain without a profile."""

    state: str
    error: BaseException | None = None


# For each profile of a call, how its domains were read.
Reads = Sequence[Mapping[str, DomainOutcome]]
# (domain, state, kind of error) of each domain of a profile.
_Signature = tuple[tuple[str, str, str], ...]


class Call(Protocol):
    """One call of a client, while it runs; calls that differ in nothing may share one."""

    @property
    def attempts(self) -> Attempts | None:
        """Who is told when an attempt begins and ends, as for spans; None if its result is enough."""
        ...

    def end(self, seconds: float, results: Sequence[str], reads: Reads, *, answered: bool = True) -> None:
        """The call ended after so many seconds, its attempts with `ok` or the kind of their first error.

        `answered` is false if it raised instead of an answer. The caller changes `results` and `reads` no more.
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
    """What a feature server exposes about itself: the counts of its clients' reads, its requests' traces, and the log.

    `log` is that of its clients, which the server closes after them.
    """

    counts: ReadCounts | None = None
    spans: RequestSpans | None = None
    log: ServedLog | None = None


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

    `ProfileClient(…, options=ClientOptions(observer=counts))`, then `counts.snapshot()`. `timed` is called with an
    entity, an operation and the seconds of several such calls, some time later, and before the next snapshot.
    """

    def __init__(self, timed: Callable[[str, str, Sequence[float]], None] | None = None) -> None:
        self._timed = timed
        self._lock = threading.Lock()
        self._counts = Counts()
        self._calls: dict[tuple[str, str], _Counting] = {}
        # A call only leaves a note here: a read waits for the network, and what comes after it runs with cold caches,
        # at several times the price of the same work in a row.
        self._notes: deque[tuple[_Counting, float, Sequence[str], Reads, bool]] = deque()

    def call(self, entity: str, operation: str) -> Call:
        """Count a call that begins now."""
        key = (entity, operation)
        return self._calls.get(key) or self._calls.setdefault(key, _Counting(self, key))

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

    def _note(
        self, of: _Counting, seconds: float, results: Sequence[str], reads: Reads, answered: bool
    ) -> None:
        if len(reads) > MOST_READS_NOTED:
            with self._lock:
                self._count_reads(of.key[0], _signatures(reads), answered)
            reads = ()
        self._notes.append((of, seconds, results, reads, answered))
        if len(self._notes) >= NOTES_AT_ONCE:
            with self._lock:
                ended = self._add_notes()
            self._tell(ended)

    def _tell(self, ended: Mapping[tuple[str, str], list[float]]) -> None:
        # Never with the lock held: whoever is told may hold one of its own while it asks for a snapshot.
        if self._timed is not None:
            for (entity, operation), seconds in ended.items():
                self._timed(entity, operation, seconds)

    def _add_notes(self) -> dict[tuple[str, str], list[float]]:
        counts, notes = self._counts, self._notes
        ended: dict[tuple[str, str], list[float]] = {}
        # Most calls of a client end alike, so that what they have in common is counted once.
        alike: dict[tuple[str, bool], Counter[_Signature]] = {}
        # Those of now, although other threads go on.
        for _ in range(len(notes)):
            of, seconds, results, reads, answered = notes.popleft()
            entity = of.key[0]
            ended.setdefault(of.key, []).append(seconds)
            for result in results:
                counts.attempts[entity, result] += 1
            found = alike.get((entity, answered))
            if found is None:
                found = alike[entity, answered] = Counter()
            for domains in reads:
                found[_signature(domains)] += 1
        for (entity, answered), signatures in alike.items():
            self._count_reads(entity, signatures, answered)
        for key, durations in ended.items():
            histogram = counts.seconds.setdefault(key, Histogram())
            for seconds in durations:
                histogram.add(seconds)
        return ended

    def _count_reads(self, entity: str, signatures: Mapping[_Signature, int], answered: bool) -> None:
        for signature, number in signatures.items():
            for domain, state, kind in signature:
                self._counts.reads[entity, Outcome(domain, state, kind)] += number
            self._counts.partial[entity] += number * (answered and any(kind for *_, kind in signature))


class _Counting:
    """The calls of one operation, each of which leaves a note when it ends."""

    __slots__ = ("_counts", "key")

    # Their results are enough.
    attempts: Attempts | None = None

    def __init__(self, counts: ReadCounts, key: tuple[str, str]) -> None:
        self._counts = counts
        self.key = key

    def end(self, seconds: float, results: Sequence[str], reads: Reads, *, answered: bool = True) -> None:
        self._counts._note(self, seconds, results, reads, answered)


def _signature(domains: Mapping[str, DomainOutcome]) -> _Signature:
    return tuple(
        [
            (name, one.state, "") if one.error is None else (name, FAILED, error_kind(one.error))
            for name, one in domains.items()
        ]
    )


def _signatures(reads: Reads) -> Counter[_Signature]:
    return Counter(map(_signature, reads))


def count_outcomes(reads: Reads) -> Counter[Outcome]:
    """Return how often each outcome occurred."""
    found: Counter[Outcome] = Counter()
    for signature, number in _signatures(reads).items():
        for one in signature:
            found[Outcome(*one)] += number
    return found


def error_kind(error: BaseException) -> str:
    """Return the kind of an error in a few words that never contain a value of a caller's."""
    kind = getattr(error, "kind", None)
    return kind if isinstance(kind, str) else _KINDS.get(type(error).__name__, "other")


class _Reading:
    """The call of the shop client in this context; `found` says whether its user is known."""

    __slots__ = ("call", "found", "results")

    def __init__(self, call: Call | None) -> None:
        self.call = call
        self.results: list[str] = []
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
    started = time.perf_counter()
    call = observer.call(entity, domain)
    told = _Reading(call)
    reads: Reads = ()
    answered = False
    token = _READING.set(told)
    try:
        yield told
        reads = ({domain: SimpleOutcome(FOUND if told.found else COLD_START)},)
        answered = True
    except Exception as error:
        if type(error).__name__ not in _OF_CALLERS or not isinstance(error, PrefsError):
            reads = ({domain: SimpleOutcome(FAILED, error)},)
        raise
    finally:
        _READING.reset(token)
        call.end(time.perf_counter() - started, told.results, reads, answered=answered)


def attempting(read: Callable[[C], T], operation: str) -> Callable[[C], T]:
    """Observe each call of `read` as an attempt of the current call; return `read` unchanged if there is none."""
    told = _READING.get()
    if told is None or told.call is None:
        return read
    attempts, results = told.call.attempts, told.results

    def attempt(connection: C) -> T:
        ended = None if attempts is None else attempts.attempt(len(results) + 1, [operation])
        kinds: list[str] = []
        try:
            return read(connection)
        except Exception as error:
            kinds.append(error_kind(error))
            raise
        finally:
            results.extend(kinds or ["ok"])
            if ended is not None:
                ended(kinds)

    return attempt
