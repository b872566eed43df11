"""Automatic exports: one run for each state of a day; the same state is only retried later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

# A first failure may be temporary and is retried within the hour. After that an operator is needed, and one
# run a day keeps reporting the failure.
FIRST_RETRY = timedelta(hours=1)
LAST_RETRY = timedelta(hours=24)


# The name of a training table and one of its days (UTC).
TableDay = tuple[str, date]


@dataclass(frozen=True)
class Launch:
    """The last automatic export of a table's day.

    `fingerprint` identifies what the engine held of the day then, `attempts` counts the runs for that state,
    `at` is the time of the last one (UTC, in whole seconds).
    """

    fingerprint: str
    attempts: int
    at: datetime

    @property
    def retry_at(self) -> datetime:
        """The time of the next retry: an hour after the first attempt, then twice as long, at most a day."""
        hours: int = 2 ** min(self.attempts - 1, 10)
        return self.at + min(hours * FIRST_RETRY, LAST_RETRY)


def due(
    stale: Mapping[TableDay, str], launched: Mapping[TableDay, Launch], *, now: datetime
) -> tuple[dict[TableDay, Launch], dict[TableDay, Launch]]:
    """Return the exports to start now, and the state for the next evaluation.

    `stale` maps days that need an export to their fingerprint; `launched` is the state of the previous
    evaluation. Days that need no export any more are removed from it. `now` is UTC.
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
    """Serialize launches to JSON, for a sensor's cursor; about 60 bytes each."""
    tables: dict[str, dict[str, tuple[str, int, int]]] = {}
    for (table, day), launch in launches.items():
        tables.setdefault(table, {})[day.isoformat()] = (
            launch.fingerprint,
            launch.attempts,
            int(launch.at.timestamp()),
        )
    return json.dumps(tables, separators=(",", ":"))


def load_launches(text: str | None) -> dict[TableDay, Launch]:
    """Parse the output of `dump_launches`. An unreadable text means no launches, which costs one run."""
    try:
        return {
            (table, date.fromisoformat(day)): Launch(fingerprint, attempts, datetime.fromtimestamp(at, UTC))
            for table, days in json.loads(text or "{}").items()
            for day, (fingerprint, attempts, at) in days.items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}
