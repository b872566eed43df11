"""The way of one sent event: its arrival, the step that took it, and when each domain was published and readable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg

from dagster_prefs.console.context import Console
from dagster_prefs.console.events import Sent
from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.live.trail import Trail, read_trail

if TYPE_CHECKING:
    from dagster_prefs.serving.profiles import Profile

# An event whose items have not changed within this time is not watched any longer, seconds.
WATCHED_SECONDS = 30.0

# The values of a domain, in a form that distinguishes two items.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Stop:
    """One stop on the way: what happened, where, when (UTC), and how long after the event was sent, seconds."""

    what: str
    where: str
    at: datetime | None
    seconds: float | None


@dataclass(frozen=True)
class Way:
    """What is known of an event's way; `read_at` maps domains to when the changed item was first read (UTC).

    `before` are the values of each domain when it was sent, and `keys` the keys of the domains.
    """

    sent: Sent
    before: Mapping[str, Values | None]
    keys: Mapping[str, str]
    trail: Trail = field(default_factory=Trail)
    read_at: Mapping[str, datetime] = field(default_factory=dict)

    def seen(self, profile: Profile, now: datetime) -> Way:
        """Return the way after a read of the items at `now` (UTC)."""
        new = {
            name: now
            for name, values in domain_values(profile).items()
            if name not in self.read_at and values != self.before.get(name)
        }
        return replace(self, read_at={**self.read_at, **new}) if new else self

    def is_over(self, now: datetime) -> bool:
        """Whether the way is complete: every published domain was read, or too much time has passed."""
        waited = (now - self.sent.at).total_seconds()
        published = {name for name, key in self.keys.items() if key in (self.trail.published_at or {})}
        return waited > WATCHED_SECONDS or (
            bool(self.read_at) and published <= self.read_at.keys() and waited > 3
        )

    def stops(self, *, followed: bool) -> list[Stop]:
        """Return the stops so far, in their order. `followed` says whether this engine's own steps lead there."""
        place = self.sent.place
        where = f"{place.source}, {place.partition}, {place.offset}" if place else "Kafka"
        found = [self._stop("sent", self.sent.topic.name, self.sent.at)]
        if place is None and not followed:
            found.append(
                Stop("arrival, commit, publish", "RisingWave's own, which name no event", None, None)
            )
        else:
            step = "" if self.trail.step is None else f"step {self.trail.step}"
            found.append(self._stop("arrival", f"{self.sent.topic.raw} at {where}", self.trail.arrived_at))
            found.append(self._stop("commit", step, self.trail.committed_at))
        published = self.trail.published_at or {}
        for name, key in self.keys.items():
            if name in self.read_at:
                if followed:
                    found.append(self._stop("publish", name, published.get(key)))
                found.append(self._stop("read", name, self.read_at[name]))
        return found

    def _stop(self, what: str, where: str, at: datetime | None) -> Stop:
        return Stop(what, where, at, None if at is None else (at - self.sent.at).total_seconds())


def domain_values(profile: Profile) -> dict[str, Values | None]:
    """Return the attributes of each domain of a profile, None for one that could not be read."""
    return {name: read["attributes"] for name, read in profile.as_dict()["domains"].items()}


def follow_trail(console: Console, way: Way) -> Way:
    """Return the way with the engine's current knowledge of it. Raises like `Console.query`."""
    place = way.sent.place
    if place is None or console.settings.engine != "local":
        return way

    def read(connection: psycopg.Connection[Any]) -> Trail:
        return read_trail(connection, console.engine, way.sent.topic, place)

    return replace(way, trail=console.query("the way of the event", read))


def age_seconds(values: Values | None, now: datetime) -> float | None:
    """Return how old a domain's newest event is, seconds; None without one."""
    last = None if values is None else values.get(LAST_EVENT_AT)
    return None if not isinstance(last, int) or last <= 0 else now.timestamp() - last / 1000
