"""The last hour of every measure, bounded in memory, and the lines of the page Pipeline."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.rejected import Counts, message_counts
from dagster_prefs.freshness.canary import SOURCE
from dagster_prefs.freshness.levels import Level, Measure, Stage
from dagster_prefs.freshness.prober import prober_ticks
from dagster_prefs.freshness.status import duration

if TYPE_CHECKING:
    from dagster_prefs.console.context import Console
    from dagster_prefs.freshness.status import Status

log = logging.getLogger("dagster_prefs.console")

HOUR_SECONDS = 3600.0
# Time that one point of a series stands for, seconds; the point holds the worst value of that time.
POINT_SECONDS = 15.0
POINTS = int(HOUR_SECONDS / POINT_SECONDS)
# Limit of series. Only measures that came and went make more.
MOST_SERIES = 500
# Interval of the readings while a visitor looks, and otherwise, seconds.
LOOKED_SECONDS, IDLE_SECONDS, LONGEST_SECONDS = 3.0, 30.0, 300.0
# Time after the last request from which on no visitor counts as looking, seconds.
GONE_SECONDS = 10.0
# Largest share of a core that readings use while no visitor looks.
IDLE_SHARE = 0.01
BAD: tuple[Level, ...] = ("error", "unknown")


@dataclass
class Series:
    """The points of one number over the last hour: (seconds of the monotonic clock, value)."""

    points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=POINTS))

    def add(self, at: float, value: float) -> None:
        """Add a value; a point keeps its largest value."""
        if self.points and at - self.points[-1][0] < POINT_SECONDS:
            began, before = self.points[-1]
            self.points[-1] = (began, max(before, value))
        else:
            self.points.append((at, value))

    def since(self, at: float) -> list[tuple[float, float]]:
        """Return the points since a moment."""
        return [point for point in self.points if point[0] >= at]


@dataclass(frozen=True)
class Line:
    """One line of the page: a measure with its last hour.

    `rate` is messages per second, `rejected` the messages rejected in the last hour; both are None if the measure has
    no topic. `last` says when the last event, probe or export was. `lags` are (seconds ago, lag in seconds).
    """

    stage: Stage
    name: str
    level: Level
    reason: str
    rate: float | None
    lag_seconds: float | None
    target_seconds: float | None
    rejected: int | None
    last: str
    lags: tuple[tuple[float, float], ...]

    @property
    def key(self) -> str:
        """`<stage>/<name>`."""
        return f"{self.stage}/{self.name}"

    @property
    def is_bad(self) -> bool:
        """Whether the measure needs attention."""
        return self.level in BAD


class History:
    """Readings of the last hour, safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lags: dict[str, Series] = {}
        self._messages: dict[str, Series] = {}
        self._rejected: dict[str, Series] = {}
        self.status: Status | None = None
        self.probed_at: float | None = None

    def add(self, status: Status, counts: Mapping[str, Counts], probed_at: float | None = None) -> None:
        """Add one reading; `probed_at` is when the follower last probed (epoch seconds)."""
        at = self._clock()
        with self._lock:
            self.status, self.probed_at = status, probed_at
            for measure in status.measures:
                if measure.lag_seconds is not None:
                    _series(self._lags, measure.key).add(at, measure.lag_seconds)
            for topic, found in counts.items():
                _series(self._messages, topic).add(at, found.messages)
                _series(self._rejected, topic).add(at, found.rejected)

    def lines(self, topics: Mapping[str, str], now: datetime) -> list[Line]:
        """Return a line for each measure; `topics` maps the names of measures to the topics that they are about."""
        with self._lock:
            measures = () if self.status is None else self.status.measures
            return [self._line(measure, topics.get(measure.key), now) for measure in measures]

    def _line(self, measure: Measure, topic: str | None, now: datetime) -> Line:
        at = self._clock()
        lags = self._lags.get(measure.key, Series()).since(at - HOUR_SECONDS)
        return Line(
            measure.stage,
            measure.name,
            measure.level,
            measure.reason,
            None if topic is None else rate(self._messages.get(topic, Series()).since(at - 60)),
            measure.lag_seconds,
            None if measure.thresholds is None else measure.thresholds.error_seconds,
            None if topic is None else risen(self._rejected.get(topic, Series()).since(at - HOUR_SECONDS)),
            self._last(measure, now),
            tuple((at - moment, value) for moment, value in lags),
        )

    def _last(self, measure: Measure, now: datetime) -> str:
        if measure.stage == "canary" and self.probed_at is not None:
            return f"probe {duration(max(0.0, now.timestamp() - self.probed_at))} ago"
        if "newest_day" in measure.notes:
            return f"export of {measure.notes['newest_day']}"
        arrived = measure.values.get("newest_arrival_at", measure.values.get("newest_event_at"))
        return "" if arrived is None else f"event {duration(max(0.0, now.timestamp() - arrived))} ago"


def _series(held: dict[str, Series], key: str) -> Series:
    if key not in held:
        while len(held) >= MOST_SERIES:
            del held[next(iter(held))]
        held[key] = Series()
    return held[key]


def rate(points: Sequence[tuple[float, float]]) -> float | None:
    """Return how much a count rose per second over its points; None for fewer than two points."""
    if len(points) < 2:
        return None
    (first, before), (last, after) = points[0], points[-1]
    return max(0.0, (after - before) / (last - first))


def risen(points: Sequence[tuple[float, float]]) -> int:
    """Return by how much a count rose over its points."""
    return int(max(0.0, points[-1][1] - points[0][1])) if points else 0


def read_counts(console: Console) -> dict[str, Counts]:
    """Return the counts of each topic's messages. Raises like `Console.query`."""

    return console.query(
        "the counts of messages",
        lambda connection: message_counts(connection, console.engine, without=SOURCE),
    )


def topics_of_measures(registry: Registry) -> dict[str, str]:
    """Map the key of each measure of a topic itself to the topic."""
    found = {}
    for topic in registry.topics.values():
        found[f"views/{topic.relation}"] = topic.name
        found[f"ingestion/{topic.name}"] = topic.name
    return found


def sparkline(line: Line, *, width: int = 120, height: int = 26) -> str:
    """Return the lags of the last hour as an SVG of numbers only, the target as a dashed line; empty without two."""
    if len(line.lags) < 2:
        return ""
    top = max(*(value for _, value in line.lags), line.target_seconds or 0.0, 0.001)
    points = " ".join(
        f"{width * (1 - min(ago, HOUR_SECONDS) / HOUR_SECONDS):.1f},{height - 2 - (height - 4) * value / top:.1f}"
        for ago, value in line.lags
    )
    target = ""
    if line.target_seconds is not None:
        level = height - 2 - (height - 4) * line.target_seconds / top
        target = (
            f'<line x1="0" x2="{width}" y1="{level:.1f}" y2="{level:.1f}" stroke="currentColor" '
            'stroke-dasharray="2 3" opacity=".4"/>'
        )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{target}'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


class Watcher:
    """Reads all measures on its own thread: often while a visitor looks, and rarely otherwise."""

    def __init__(self, console: Console) -> None:
        self.history = History()
        self.problem: str | None = None
        self._console = console
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._looked_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current reading."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Note that a visitor looks now."""
        if time.monotonic() - self._looked_at > GONE_SECONDS:
            self._wake.set()
        self._looked_at = time.monotonic()

    def read(self) -> None:
        """Take one reading into the history. Raises PrefsError."""
        ticks = prober_ticks(self._console.settings.state_dir)
        status = self._console.read_status()
        counts: dict[str, Counts] = {}
        # The measures already say why the engine does not answer.
        with suppress(PrefsError):
            counts = read_counts(self._console)
        self.history.add(status, counts, ticks[0].at if ticks else None)

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.process_time()
            try:
                self.read()
                self.problem = None
            except PrefsError as error:
                self.problem = str(error)
            # Catch every error: if the thread ended, the page would show an old state forever.
            except Exception as error:
                log.exception("a reading failed")
                self.problem = f"a reading failed ({type(error).__name__}: {error}): see the console's log"
            self._wake.wait(self.pause_seconds(time.process_time() - began))
            self._wake.clear()

    def pause_seconds(self, cost_seconds: float) -> float:
        """Return how long to wait after a reading that took this much processor time, seconds."""
        if time.monotonic() - self._looked_at < GONE_SECONDS:
            return LOOKED_SECONDS
        return min(LONGEST_SECONDS, max(IDLE_SECONDS, cost_seconds / IDLE_SHARE))
