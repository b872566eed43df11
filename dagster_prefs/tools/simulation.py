"""The base of every simulation: a plan, a world from its seed, and the order in which messages are delivered.

The same plan always yields the same messages in the same order, which is the order of delivery: a late event
comes after newer ones, a duplicate some time after its first delivery.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

from dagster_prefs.errors import PrefsError

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# How the source names of all plans begin.
SERIES = "simulate:"

# Activity by hour of the UTC day: a quiet night, a small peak at noon, a large one in the evening.
HOUR_WEIGHTS = (4, 2, 1, 1, 1, 2, 4, 6, 7, 7, 8, 9, 11, 10, 8, 8, 9, 12, 17, 23, 27, 26, 19, 10)
CLOCK = tuple(f"{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(86_400))


class SimulationError(PrefsError):
    """A plan cannot be simulated, or its output cannot be written."""


class SimulatedEvent(NamedTuple):
    """One delivery: its topic, its bytes, and the time of its event (of its delivery if malformed)."""

    topic: str
    message: bytes
    event_time: datetime


@dataclass(frozen=True)
class Plan(ABC):
    """A simulation's parameters: the messages of the `days` before `end` (UTC), from one seed.

    Of the events `late_share` arrive hours or days late, `duplicate_share` are second deliveries and
    `malformed_share` are rejected by the typed layer. Raises SimulationError for invalid parameters.
    """

    end: datetime
    seed: int = 1
    days: int = 35
    late_share: float = 0.02
    duplicate_share: float = 0.01
    malformed_share: float = 0.005

    def __post_init__(self) -> None:
        self.require(1, "days")
        shares = (self.late_share, self.duplicate_share, self.malformed_share)
        if min(shares) < 0 or self.duplicate_share + self.malformed_share > 0.9 or self.late_share > 1:
            raise SimulationError(
                "shares of late, duplicate and malformed events are at least 0, late at most 1, "
                "duplicate and malformed together at most 0.9"
            )
        if self.end.tzinfo is None:
            raise SimulationError("the end of a simulation needs a time zone: give it in UTC, e.g. with a Z")

    def require(self, least: int, *names: str) -> None:
        """Raise SimulationError unless each of these numbers is None or at least `least`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                remedy = "give 0 or more" if least == 0 else f"simulate at least {least}"
                raise SimulationError(f"{name} is {value}: {remedy}")

    @property
    def shape(self) -> str:
        """Twelve hex digits that differ if plans differ in anything but their end."""
        given = {name: value for name, value in asdict(self).items() if name != "end"}
        return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @property
    def series(self) -> str:
        """The common prefix of the source names of plans that differ only in their end."""
        return f"{SERIES}{self.seed}:{self.shape}:"

    @property
    def source(self) -> str:
        """Source name of the plan's messages in the raw tables, `simulate:<seed>:<shape>:<end, epoch s>`."""
        return f"{self.series}{int(self.end.timestamp())}"

    @property
    def messages(self) -> int:
        """Number of messages the plan yields."""
        return sum(self.counts().values())

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Return the number of messages that the plan yields, by topic."""

    @abstractmethod
    def events(self) -> Iterator[SimulatedEvent]:
        """Yield the messages in order of delivery, reference data first. Memory holds one day of events."""

    @abstractmethod
    def live(self) -> Iterator[tuple[str, bytes]]:
        """Yield topic and message of events that happen now, endlessly, in the proportions of the counts."""


class World(ABC):
    """The participants of a simulation, and their behaviour, from a seed."""

    def __init__(self, plan: Plan) -> None:
        # The end is part of the seed: two runs with the same event ids would count as repetitions.
        self.rng = random.Random(f"{plan.source}")  # noqa: S311 (not a secret)
        self._hours = list(accumulate(HOUR_WEIGHTS))

    @abstractmethod
    def session(self, topic: str, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield one session of a topic from `start` on: (event time, message), times in epoch ms."""

    @abstractmethod
    def malformed(self, topic: str, number: int, moment: int) -> bytes:
        """Return the `number`-th malformed message of a topic, going through all reasons of rejection."""

    @abstractmethod
    def time_field(self, topic: str) -> str:
        """Return the field of the event time."""

    def pick(self, weights: Sequence[float]) -> int:
        """Return a random index with the probabilities of the cumulative weights."""
        return bisect(weights, self.rng.random() * weights[-1])

    def moment(self, day_start: int) -> int:
        """Return a random time within 24 hours from `day_start` (epoch ms), by the activity per UTC hour."""
        rng = self.rng
        second = bisect(self._hours, rng.random() * self._hours[-1]) * HOUR_MS + int(rng.random() * HOUR_MS)
        return day_start + (second - day_start) % DAY_MS

    def time(self, moment: int) -> str:
        """Return a time (epoch ms) as JSON, usually ISO 8601, sometimes another format of the typed layer."""
        if self.rng.random() < 0.92:
            return _quoted(moment)
        return TIME_FORMATS[1 + int(self.rng.random() * (len(TIME_FORMATS) - 1))](moment)

    def live(self, weights: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Yield current events endlessly: topics by weight, or equally often if all weights are zero."""
        topics = list(weights)
        given = list(weights.values()) if any(weights.values()) else [1] * len(topics)
        while True:
            topic = self.rng.choices(topics, given)[0]
            # The first event of a session, which is placed so that this event happens now.
            now = int(time.time() * 1000)
            _, message = next(iter(self.session(topic, now)))
            value = json.loads(message) | {self.time_field(topic): iso_text(now)}
            yield topic, json.dumps(value, separators=(",", ":")).encode()


def zipf(count: int, exponent: float) -> list[float]:
    """Return the cumulative weights of `count` things with a Zipf distribution."""
    return list(accumulate(1 / (rank + 1) ** exponent for rank in range(count)))


def iso_text(moment: int) -> str:
    """Return epoch milliseconds as ISO 8601 text with `Z`."""
    return _quoted(moment)[1:-1]


def _quoted(moment: int) -> str:
    day, rest = divmod(moment, DAY_MS)
    return f'"{_day(day)}T{CLOCK[rest // 1000]}.{rest % 1000:03d}Z"'


_days: dict[int, str] = {}


def _day(number: int) -> str:
    found = _days.get(number)
    if found is None:
        found = _days[number] = (EPOCH + timedelta(days=number)).date().isoformat()
    return found


# Every format of a time that the typed layer reads; the first is by far the most frequent.
TIME_FORMATS: tuple[Callable[[int], str], ...] = (
    _quoted,
    lambda ms: f'"{_day(ms // DAY_MS)} {CLOCK[ms % DAY_MS // 1000]} UTC"',
    lambda ms: f'"{_day(ms // DAY_MS)} {CLOCK[ms % DAY_MS // 1000]}"',
    lambda ms: f'"{_day(ms // DAY_MS)}T{CLOCK[ms % DAY_MS // 1000]}"',
    lambda ms: _quoted(ms + 2 * HOUR_MS).replace('Z"', '+02:00"'),
    lambda ms: _quoted(ms - 5 * HOUR_MS).replace('Z"', '-0500"').replace("T", " "),
    lambda ms: str(ms),
    lambda ms: f'"{ms}"',
)


def deliveries(plan: Plan, world: World, totals: Mapping[str, int]) -> Iterator[SimulatedEvent]:
    """Yield each topic's `totals` events of the plan's days in order of delivery, repetitions included."""
    rng = world.rng
    end = int(plan.end.timestamp() * 1000)
    first = end - plan.days * DAY_MS
    # Weekends are busier: first the weight of each day, then the number of messages due by its end.
    weights = list(
        accumulate(1.35 if ((first // DAY_MS + day) + 3) % 7 >= 5 else 1.0 for day in range(plan.days))
    )
    made = dict.fromkeys(totals, 0)
    bad = dict.fromkeys(totals, 0)
    repeated = dict.fromkeys(totals, 0)
    pools: dict[str, list[tuple[int, bytes]]] = {topic: [] for topic in totals}
    # (delivery, number, topic, message, event time). The number makes the order total and comparisons cheap.
    queue: list[tuple[int, int, str, bytes, int]] = []
    number = 0
    for day in range(plan.days):
        start = first + day * DAY_MS
        stop = start + DAY_MS
        part = weights[day] / weights[-1]
        for topic, total in totals.items():
            bad_due = round(round(total * plan.malformed_share) * part)
            repeats = round(total * plan.duplicate_share)
            if repeats + round(total * plan.malformed_share) >= total:
                # With a handful of messages there is nothing to repeat.
                repeats = 0
            repeat_due = round(repeats * part)
            due = round(total * part) - bad_due - repeat_due
            of_today: list[tuple[int, bytes]] = []
            while made[topic] < due:
                for moment, message in world.session(topic, world.moment(start)):
                    if moment > end or made[topic] >= due:
                        break
                    made[topic] += 1
                    of_today.append((moment, message))
                    delivery = moment
                    if rng.random() < plan.late_share:
                        delivery = min(end, moment + int((0.5 + 71.5 * rng.random() ** 3) * HOUR_MS))
                    number += 1
                    heappush(queue, (delivery, number, topic, message, moment))
            pools[topic] = of_today or pools[topic]
            while repeated[topic] < repeat_due and pools[topic]:
                moment, message = pools[topic][int(rng.random() * len(pools[topic]))]
                # Later than any late first delivery, so that a repetition is never the first.
                delivery = min(end, moment + 72 * HOUR_MS + int(rng.random() * HOUR_MS))
                repeated[topic] += 1
                number += 1
                heappush(queue, (delivery, number, topic, message, moment))
            while bad[topic] < bad_due:
                moment = world.moment(start)
                number += 1
                heappush(queue, (moment, number, topic, world.malformed(topic, bad[topic], moment), moment))
                bad[topic] += 1
        while queue and (queue[0][0] < stop or day == plan.days - 1):
            _, _, topic, message, moment = heappop(queue)
            yield SimulatedEvent(topic, message, EPOCH + timedelta(milliseconds=moment))
