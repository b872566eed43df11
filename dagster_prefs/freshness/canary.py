"""A synthetic event at an interval, timed until a reader sees it: the true event-to-readable latency.

The canary is a reserved viewer and user. They are never exported and never ranked, and the client reports the
age of the viewer's items as the freshness of every profile.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.canaries import CanaryKey, canary_key
from dagster_prefs.events.formats import find_topic
from dagster_prefs.events.kafka import KafkaWriter
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.freshness.levels import Level, Measure, judge
from dagster_prefs.online.contract import LAST_EVENT_AT, Contract, Freshness
from dagster_prefs.online.reserved import CANARY_USER_ID, CANARY_VIEWER_ID
from dagster_prefs.serving.profiles import CANARY_AHEAD_SECONDS

SOURCE = "canary"
SHOP = "shop"

# Latencies kept per path: p99 needs a hundred.
WINDOW = 200
# A canary is lost when it is not readable after this many times the error threshold.
LOST_AFTER = 60


@dataclass(frozen=True)
class PathState:
    """One path's memory: the canary under way, and the latencies (seconds) and losses of earlier ones.

    `sent_ms` is the event time of the canary under way in epoch milliseconds, None when none is.
    """

    sent_ms: int | None = None
    latencies: tuple[float, ...] = ()
    lost: int = 0
    last_lost: bool = False


@dataclass(frozen=True)
class CanaryState:
    """Everything that is remembered from one probe to the next; small enough for a sensor's cursor."""

    paths: Mapping[str, PathState] = field(default_factory=dict)

    def dumps(self) -> str:
        """The state as JSON."""
        return json.dumps(
            {
                name: [path.sent_ms, [round(value, 3) for value in path.latencies], path.lost, path.last_lost]
                for name, path in self.paths.items()
            },
            separators=(",", ":"),
        )

    @classmethod
    def loads(cls, text: str | None) -> CanaryState:
        """The state of `dumps`; a missing or unreadable one is a fresh start, as it only costs the window."""
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


def canary_messages(moment: datetime, key: CanaryKey) -> dict[str, dict[str, Any]]:
    """Topic → the canary's message of that moment (UTC, whole milliseconds count), proven with `key`."""
    milliseconds = epoch_ms(moment)
    identity = key.event_id(milliseconds)
    at = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
    return {
        "view_events": {
            "event_id": identity,
            "viewer_id": CANARY_VIEWER_ID,
            "content_id": "canary",
            "genre": "canary",
            "watch_duration_sec": 60,
            "completion_pct": 1,
            "watched_at": at,
        },
        "content_interactions": {
            "event_id": identity,
            "viewer_id": CANARY_VIEWER_ID,
            "event_type": "search",
            "event_ts": at,
        },
        "user.events": {
            "event_id": identity,
            "user_id": CANARY_USER_ID,
            "item_id": "canary",
            "event_type": "view",
            "category": "canary",
            "brand": None,
            "price": None,
            "session_id": "canary",
            "event_time": at,
        },
    }


def send_canary(
    engine: EngineConnection,
    moment: datetime,
    *,
    bootstrap: str | None = None,
    kafka_topics: Mapping[str, str] | None = None,
    client: Mapping[str, Any] | None = None,
    timeout_seconds: float = 5.0,
) -> None:
    """Send one event per topic with the event time `moment`: through Kafka, else into the raw tables.

    The engine holds the key that proves them, and is asked for it first. Raises KafkaUnavailable, RawStoreError or
    EngineUnavailable when they cannot be sent.
    """
    messages = {
        topic: json.dumps(message, separators=(",", ":")).encode()
        for topic, message in canary_messages(moment, canary_key(engine)).items()
    }
    if bootstrap is not None:
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
            store.write(find_topic(topic), SOURCE, [RawMessage(0, epoch_ms(moment), data)])


def read_domains(profiles: Any) -> dict[str, int | None]:
    """Domain → newest canary event that a `ProfileClient` reads; raises PrefsError when a domain fails."""
    profile = profiles.get(CANARY_VIEWER_ID, consistent=True)
    for read in profile.reads.values():
        if read.error is not None:
            raise read.error
    return {name: getattr(profile.domain(name), LAST_EVENT_AT) for name in profile.reads}


def read_shop(engine: EngineConnection) -> dict[str, int | None]:
    """Newest canary event that the ranking reads, over the Postgres wire."""
    try:
        with engine.connect() as connection:
            row = connection.execute(
                sql.SQL("select max(last_engaged_at) from {} where user_id = %s").format(
                    sql.Identifier(engine.schema, "user_category_profile")
                ),
                [CANARY_USER_ID],
            ).fetchone()
    except psycopg.Error as error:
        raise CanaryError(
            f"the canary's preferences cannot be read ({' '.join(str(error).split())}): run `dbt build`"
        ) from error
    return {SHOP: None if row is None or row[0] is None else epoch_ms(row[0])}


class CanaryError(PrefsError):
    """The canary could not be sent or read."""


@dataclass(frozen=True)
class Probe:
    """The canary's path, as functions: how an event is sent, and how what is readable is read.

    `clock` gives the time in UTC, `wait` pauses for seconds.
    """

    send: Callable[[datetime], None]
    readers: Sequence[Callable[[], Mapping[str, int | None]]]
    contract: Contract
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    wait: Callable[[float], None] = time.sleep
    poll_seconds: float = 0.25

    def run(self, state: CanaryState, *, patience_seconds: float) -> tuple[CanaryState, list[Measure]]:
        """Settle the canaries under way, send one where none is, and watch for `patience_seconds`.

        A canary that is not readable by then is looked for again by the next run; one that is older than
        the path's patience (60 times the error threshold) is lost. Returns the state for the next run and
        one measure per path. Never raises for what cannot be sent or read: that is in the measures.
        """
        paths, unread = self._look(
            {name: state.paths.get(name, PathState()) for name in canary_paths(self.contract)}
        )
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
            measures.append(_path_measure(name, path, self.contract.freshness.canary, self.clock(), problem))
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
        limit = LOST_AFTER * self.contract.freshness.canary.error_seconds
        if path.sent_ms is None or (epoch_ms(self.clock()) - path.sent_ms) / 1000 < limit:
            return path
        return PathState(None, path.latencies, path.lost + 1, True)


def canary_paths(contract: Contract) -> list[str]:
    """The names of the paths that a canary is timed on: each domain, and the shop's."""
    return [*(domain.name for domain in contract.domains.values()), SHOP]


def judge_state(state: CanaryState, contract: Contract, *, now: datetime) -> list[Measure]:
    """One measure per path of a state that a probe left; `now` is UTC."""
    return [
        _path_measure(name, state.paths.get(name, PathState()), contract.freshness.canary, now)
        for name in canary_paths(contract)
    ]


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
        # What is under way for less than the threshold is no news, unless the one before was lost.
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
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def epoch_ms(moment: datetime) -> int:
    """Whole milliseconds since 1970 of a moment."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
