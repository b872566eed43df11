"""Canaries: synthetic events that are timed until a reader sees them (event-to-readable latency).

Each entity reserves an id for its canary. Canaries are never exported and never ranked; the client reports
the age of its items as the freshness of every profile. The canary of an entity without a domain is read from
one of the entity's preference views.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Freshness
from dagster_prefs.declarations.registry import Registry, WatchedView
from dagster_prefs.declarations.reserved import CANARY_AHEAD_SECONDS, canary_of
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.canaries import canary_events, canary_key
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.freshness.levels import Level, Measure, Unmeasurable, judge
from dagster_prefs.freshness.views import watched_relations
from dagster_prefs.ids import Id

SOURCE = "canary"

# Number of latencies kept per path. p99 needs at least a hundred.
WINDOW = 200
# A canary counts as lost when it is not readable after this multiple of the error threshold.
LOST_AFTER = 60


CANARY_SENSOR = "canary"

# A sensor without a tick for longer than this is not running, whatever its state says.
CANARY_INACTIVITY = timedelta(minutes=10)
# A follower probes at least once a minute.
FOLLOWER_INACTIVITY = timedelta(minutes=2)


@dataclass(frozen=True)
class PathState:
    """The state of one path: the canary in flight, and the latencies (seconds) and losses of earlier ones.

    `sent_ms` is the event time of the canary in flight in epoch milliseconds, None when there is none.
    """

    sent_ms: int | None = None
    latencies: tuple[float, ...] = ()
    lost: int = 0
    last_lost: bool = False


@dataclass(frozen=True)
class CanaryState:
    """The state that one probe hands to the next; small enough for a sensor's cursor."""

    paths: Mapping[str, PathState] = field(default_factory=dict)

    def dumps(self) -> str:
        """Serialize the state to JSON."""
        return json.dumps(
            {
                name: [path.sent_ms, [round(value, 3) for value in path.latencies], path.lost, path.last_lost]
                for name, path in self.paths.items()
            },
            separators=(",", ":"),
        )

    @classmethod
    def loads(cls, text: str | None) -> CanaryState:
        """Parse the output of `dumps`. An unreadable text gives an empty state, which only loses past latencies."""
        try:
            content = json.loads(text or "{}")
            return cls(
                {
                    str(name): PathState(sent, tuple(latencies), int(lost), bool(last))
                    for name, (sent, latencies, lost, last) in content.items()
                }
            )
        except (ValueError, TypeError, AttributeError):
            return cls()


def send_canary(
    engine: EngineConfiguration,
    registry: Registry,
    moment: datetime,
    *,
    bootstrap: str | None = None,
    kafka_topics: Mapping[str, str] | None = None,
    client: Mapping[str, Any] | None = None,
    timeout_seconds: float = 5.0,
) -> None:
    """Send one event per topic with the event time `moment`, through Kafka or else into the raw tables.

    Asks the engine first for the key that authenticates canary events. Raises KafkaUnavailable, RawStoreError
    or EngineUnavailable if the events cannot be sent.
    """
    messages = canary_events(registry, canary_key(engine), moment)
    if bootstrap is not None:
        # Here, because every reading of the canary's state would load the client of Kafka.
        from dagster_prefs.events.kafka import KafkaWriter

        names = kafka_topics or {}
        writer = KafkaWriter(bootstrap, timeout_seconds=timeout_seconds, client=client)
        for topic in messages:
            writer.check(names.get(topic, topic))
        for topic, data in messages.items():
            writer.send(names.get(topic, topic), data)
        writer.flush()
        return
    with RawStore(engine) as store:
        for topic, data in messages.items():
            store.write(registry.topic(topic), SOURCE, [RawMessage(0, epoch_ms(moment), data)])


def read_domains(profiles: Any, canary: Id) -> dict[str, int | None]:
    """Map each domain to the newest event in the item of its entity's canary, as a `ProfileClient` reads it.

    Raises PrefsError if a domain fails.
    """
    profile = profiles.get(canary, consistent=True)
    for read in profile.reads.values():
        if read.error is not None:
            raise read.error
    return {name: getattr(profile.domain(name), LAST_EVENT_AT) for name in profile.reads}


def canary_views(registry: Registry) -> dict[str, WatchedView]:
    """Map each entity without a domain to the preference view from which its canary is read."""
    found: dict[str, WatchedView] = {}
    for view in watched_relations(registry):
        declared = registry.preferences.get(view.relation)
        if declared is None or not isinstance(view, WatchedView) or view.unclear:
            continue
        entity = registry.entity(declared.entity)
        if entity.table is not None or entity.name in found:
            continue
        # A view that filters events by kind may exclude the canary's kind.
        kinds = [field.name for field in registry.topic(view.topic).fields if field.accepted]
        shown = " ".join(upstream.only for upstream in view.upstreams)
        if not any(re.search(rf"\b{kind}\b", shown) for kind in kinds):
            found[entity.name] = view
    return found


def read_views(
    engine: EngineConfiguration,
    registry: Registry,
    views: Mapping[str, WatchedView],
    session: psycopg.Connection[Any] | None = None,
) -> dict[str, int | None]:
    """Read the newest canary event of each entity from its view in `canary_views`, over a session if there is one."""
    newest: dict[str, int | None] = {}
    for name, view in views.items():
        key = registry.entity(name).key
        try:
            with engine.connect() if session is None else nullcontext(session) as connection:
                row = connection.execute(
                    sql.SQL("select max({}) from {} where {} = %s").format(
                        sql.Identifier(view.time),
                        sql.Identifier(engine.schema, view.relation),
                        sql.Identifier(key.name),
                    ),
                    [canary_of(key)],
                ).fetchone()
        except psycopg.Error as error:
            raise CanaryError(
                f"the canary of {name} cannot be read in {view.relation} ({' '.join(str(error).split())}): "
                "run `dbt build`"
            ) from error
        newest[name] = None if row is None or row[0] is None else epoch_ms(row[0])
    return newest


class CanaryError(PrefsError):
    """A canary could not be sent or read."""


@dataclass(frozen=True)
class Probe:
    """The paths of the canaries, with functions that send an event and read the newest readable one.

    `paths` are those of `canary_paths`, `thresholds` the contract's for canaries; `clock` returns the time in
    UTC, `wait` sleeps for a number of seconds.
    """

    send: Callable[[datetime], None]
    readers: Sequence[Callable[[], Mapping[str, int | None]]]
    paths: Sequence[str]
    thresholds: Freshness
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    wait: Callable[[float], None] = time.sleep
    poll_seconds: float = 0.25

    def run(self, state: CanaryState, *, patience_seconds: float) -> tuple[CanaryState, list[Measure]]:
        """Read the canaries in flight, send one on each idle path, and poll for up to `patience_seconds`.

        The next run looks again for a canary that is not readable by then; a canary older than 60 times the
        error threshold counts as lost. Returns the state for the next run and one measure per path. Never
        raises if an event cannot be sent or read: the measures report it.
        """
        paths, unread = {name: state.paths.get(name, PathState()) for name in self.paths}, None
        if any(path.sent_ms is not None for path in paths.values()):
            paths, unread = self._look(paths)
        paths = {name: self._lose(path) for name, path in paths.items()}
        idle = {name for name, path in paths.items() if path.sent_ms is None}
        unsent: str | None = None
        if idle:
            moment = self.clock()
            try:
                self.send(moment)
            except PrefsError as error:
                unsent = str(error)
            else:
                for name in idle:
                    paths[name] = replace(paths[name], sent_ms=epoch_ms(moment))
        deadline = self.clock() + timedelta(seconds=patience_seconds)
        while any(path.sent_ms is not None for path in paths.values()) and self.clock() < deadline:
            self.wait(self.poll_seconds)
            paths, unread = self._look(paths)
        measures = []
        for name, path in paths.items():
            problem = unread if path.sent_ms is not None else unsent if name in idle else None
            measures.append(_path_measure(name, path, self.thresholds, self.clock(), problem))
        return CanaryState(paths), measures

    def _look(self, paths: Mapping[str, PathState]) -> tuple[dict[str, PathState], str | None]:
        seen: dict[str, int | None] = {}
        problem = None
        for read in self.readers:
            try:
                seen |= read()
            except PrefsError as error:
                problem = str(error)
        now = epoch_ms(self.clock())
        for name, newest in seen.items():
            if newest is not None and newest > now + 1000 * CANARY_AHEAD_SECONDS:
                seen[name] = None
                problem = (
                    f"the canary of {name} is dated {(newest - now) / 1000:.0f} s ahead of this clock: correct the "
                    "clock of the machine that sent it, or this one's"
                )
        found = {}
        for name, path in paths.items():
            newest = seen.get(name)
            if path.sent_ms is not None and newest is not None and newest >= path.sent_ms:
                latency = max(0.0, (now - path.sent_ms) / 1000)
                path = PathState(None, (*path.latencies, latency)[-WINDOW:], path.lost, False)
            found[name] = path
        return found, problem

    def _lose(self, path: PathState) -> PathState:
        limit = LOST_AFTER * self.thresholds.error_seconds
        if path.sent_ms is None or (epoch_ms(self.clock()) - path.sent_ms) / 1000 < limit:
            return path
        return PathState(None, path.latencies, path.lost + 1, True)


def canary_paths(registry: Registry) -> list[str]:
    """Return the names of the timed paths: each domain, and each entity that has a preference view only."""
    return [*(domain.name for domain in registry.contract.domains.values()), *canary_views(registry)]


def judge_state(
    state: CanaryState, paths: Sequence[str], thresholds: Freshness, *, now: datetime
) -> list[Measure]:
    """Return one measure per path from the state that a probe stored. `now` is UTC."""
    return [_path_measure(name, state.paths.get(name, PathState()), thresholds, now) for name in paths]


@dataclass(frozen=True)
class Tick:
    """The last probe of a running sensor or of the follower: seconds since 1970 (0 before the first), and its state.

    `problem` is the reason if nothing could be sent or read.
    """

    at: float
    cursor: str | None
    problem: str | None = None
    from_follower: bool = False

    def is_late(self, now: datetime) -> bool:
        """Return whether the next probe is long overdue at `now` (UTC)."""
        limit = FOLLOWER_INACTIVITY if self.from_follower else CANARY_INACTIVITY
        return now - datetime.fromtimestamp(self.at, UTC) > limit


def measure_canary(
    followed: Sequence[Tick], sensors: Callable[[], Sequence[Tick]], registry: Registry, *, now: datetime
) -> list[Measure]:
    """Return the canary's measures from the ticks of the follower and of Dagster's sensors; `now` is UTC.

    If `sensors` raises Unmeasurable, the follower's ticks are judged alone; without any, all measures are `unknown`.
    """
    try:
        ticks = [*sensors(), *followed]
    except Unmeasurable as error:
        if not followed:
            return [Measure("canary", name, "unknown", str(error)) for name in canary_paths(registry)]
        ticks = [*followed]
    return judge_ticks(ticks, registry, now=now)


def judge_ticks(ticks: Sequence[Tick], registry: Registry, *, now: datetime) -> list[Measure]:
    """Return the canary's measures from these ticks; `now` is UTC.

    They are `skipped` if there is no tick, and `unknown` if the newest one is late or has a problem.
    """
    names = canary_paths(registry)
    if not ticks:
        reason = (
            "the canary is off: on the embedded engine the follower sends it (`prefs up`), else the sensor "
            f"{CANARY_SENSOR} of Dagster: start it there"
        )
        return [Measure("canary", name, "skipped", reason) for name in names]
    last = max(ticks, key=lambda tick: tick.at)
    if last.is_late(now):
        since = f"since {datetime.fromtimestamp(last.at, UTC):%Y-%m-%d %H:%M:%S} UTC" if last.at else "yet"
        reason = (
            f"the follower has sent no canary {since}: run `prefs up`"
            if last.from_follower
            else f"the sensor {CANARY_SENSOR} has not ticked {since}: check that the Dagster daemon runs"
        )
        return [Measure("canary", name, "unknown", reason) for name in names]
    if last.problem is not None:
        return [Measure("canary", name, "unknown", last.problem) for name in names]
    return judge_state(CanaryState.loads(last.cursor), names, registry.contract.freshness.canary, now=now)


def _path_measure(
    name: str, path: PathState, thresholds: Freshness, now: datetime, problem: str | None = None
) -> Measure:
    values: dict[str, int | float] = {"lost": path.lost, "window": len(path.latencies)}
    lag: float | None = None
    history = f"{path.lost} lost"
    if path.latencies:
        lag = path.latencies[-1]
        values["p50_seconds"] = percentile(path.latencies, 0.50)
        values["p99_seconds"] = percentile(path.latencies, 0.99)
        history = (
            f"p50 {values['p50_seconds']:.1f} s and p99 {values['p99_seconds']:.1f} s of the last "
            f"{len(path.latencies)}, {history}"
        )
    level: Level
    if path.sent_ms is not None:
        lag = (epoch_ms(now) - path.sent_ms) / 1000
        level = judge(lag, thresholds)
        reason = f"a canary is not readable after {lag:.1f} s"
        # A canary in flight for less than the threshold does not alarm, unless the previous one was lost.
        if path.last_lost:
            level, reason = "error", f"{reason}, and the one before was lost"
    elif path.last_lost:
        level, reason = "error", "the last canary was lost: it never became readable"
    elif lag is None:
        level, reason = "unknown", "no canary was sent yet"
    else:
        level = judge(lag, thresholds)
        reason = f"the last canary was readable after {lag:.1f} s"
    reason = f"{reason} ({history})"
    if problem is not None:
        level = level if level == "error" else "unknown"
        reason = f"{reason}: {problem}"
    return Measure("canary", name, level, reason, lag, thresholds, values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def epoch_ms(moment: datetime) -> int:
    """Convert a moment to whole milliseconds since 1970."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
