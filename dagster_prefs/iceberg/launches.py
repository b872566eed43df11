"""When an export is started by itself: once for what a day holds, again only later or when that changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

# What failed once may heal within the hour; what fails for a day needs a person, and one run a day says so.
FIRST_RETRY = timedelta(hours=1)
LAST_RETRY = timedelta(hours=24)


# A training table's name and a day (UTC) of it.
TableDay = tuple[str, date]


@dataclass(frozen=True)
class Launch:
    """The last export of a table's day that was started by itself.

    `fingerprint` is what the engine held of it then, `attempts` how often that was tried, `at` when (UTC,
    whole seconds count).
    """

    fingerprint: str
    attempts: int
    at: datetime

    @property
    def retry_at(self) -> datetime:
        """When the same may be tried again: an hour after the first attempt, then twice as long, at most a day."""
        hours: int = 2 ** min(self.attempts - 1, 10)
        return self.at + min(hours * FIRST_RETRY, LAST_RETRY)


def due(
    stale: Mapping[TableDay, str], launched: Mapping[TableDay, Launch], *, now: datetime
) -> tuple[dict[TableDay, Launch], dict[TableDay, Launch]]:
    """The exports to start now, and everything to remember until the next look.

    `stale` gives what needs an export its fingerprint, `launched` is what the look before remembered. What needs
    none any more is forgotten. `now` is UTC.
    """
    starts = {}
    for place, fingerprint in stale.items():
        before = launched.get(place)
        if before is None or before.fingerprint != fingerprint:
            starts[place] = Launch(fingerprint, 1, now)
        elif now >= before.retry_at:
            starts[place] = Launch(fingerprint, before.attempts + 1, now)
    kept = {place: launched[place] for place in stale if place in launched}
    return starts, kept | starts


def dump_launches(launches: Mapping[TableDay, Launch]) -> str:
    """The launches as JSON, for a sensor's cursor; about 60 bytes each."""
    tables: dict[str, dict[str, tuple[str, int, int]]] = {}
    for (table, day), launch in launches.items():
        tables.setdefault(table, {})[day.isoformat()] = (
            launch.fingerprint,
            launch.attempts,
            int(launch.at.timestamp()),
        )
    return json.dumps(tables, separators=(",", ":"))


def load_launches(text: str | None) -> dict[TableDay, Launch]:
    """The launches of `dump_launches`; without a readable text nothing was started yet, which costs one run."""
    try:
        return {
            (table, date.fromisoformat(day)): Launch(fingerprint, attempts, datetime.fromtimestamp(at, UTC))
            for table, days in json.loads(text or "{}").items()
            for day, (fingerprint, attempts, at) in days.items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}
