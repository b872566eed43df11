"""A seeded generator of realistic events, and what writes them to the engine, to files or to Kafka.

The same plan always yields the same messages in the same order, which is the order of delivery: a late
event comes after newer ones, a duplicate some time after its first delivery.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.formats import TOPICS
from dagster_prefs.events.raw import (
    FileRecord,
    IngestReport,
    Progress,
    ProgressCallback,
    RawMessage,
    RawStore,
)
from dagster_prefs.files import whole_file

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Activity by hour of the UTC day: a quiet night, a lunch bump, an evening peak.
HOUR_WEIGHTS = (4, 2, 1, 1, 1, 2, 4, 6, 7, 7, 8, 9, 11, 10, 8, 8, 9, 12, 17, 23, 27, 26, 19, 10)
GENRES = (
    "drama", "comedy", "thriller", "documentary", "crime", "science fiction", "animation", "romance",
    "horror", "family", "action", "sport",
)  # fmt: skip
# Category, median price, spread of the logarithm.
CATEGORIES = (
    ("electronics.smartphone", 420.0, 0.6), ("electronics.audio.headphone", 80.0, 0.7),
    ("computers.notebook", 780.0, 0.4), ("appliances.kitchen.kettle", 28.0, 0.4),
    ("appliances.environment.vacuum", 150.0, 0.5), ("furniture.living_room.sofa", 540.0, 0.5),
    ("furniture.bedroom.pillow", 19.0, 0.4), ("apparel.shoes", 65.0, 0.5), ("apparel.tshirt", 17.0, 0.4),
    ("kids.toys", 22.0, 0.6), ("sport.bicycle", 390.0, 0.5), ("construction.tools.drill", 95.0, 0.5),
    ("stationery.notebook", 6.0, 0.4), ("medicine.tonometer", 38.0, 0.3),
)  # fmt: skip
BRANDS = (
    "northpeak", "lumen", "aqua", "kestrel", "orbit", "fjord", "maple", "zenith", "quartz", "willow",
    "cobalt", "tandem",
)  # fmt: skip
ADJECTIVES = ("Compact", "Classic", "Quiet", "Travel", "Studio", "Everyday", "Slim", "Sturdy")

CLOCK = tuple(f"{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(86_400))


class SimulationError(PrefsError):
    """A plan that cannot be simulated, or output that cannot be written."""


@dataclass(frozen=True)
class SimulationPlan:
    """How much to simulate, and of what shape.

    `view_events`, `shop_events` and `interactions` are the exact numbers of messages of their topics over
    the `days` before `end` (UTC); of them `late_share` arrive hours or days late, `duplicate_share` are
    second deliveries and `malformed_share` are refused by the typed layer. `items` is the size of the
    catalogue, malformed entries on top. `users` defaults to `viewers`.
    """

    end: datetime
    seed: int = 1
    viewers: int = 5_000
    days: int = 35
    view_events: int = 200_000
    shop_events: int = 100_000
    interactions: int = 20_000
    items: int = 2_000
    contents: int = 800
    users: int | None = None
    late_share: float = 0.02
    duplicate_share: float = 0.01
    malformed_share: float = 0.005

    def __post_init__(self) -> None:
        for name in ("viewers", "days", "items", "contents", "users"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SimulationError(f"{name} is {value}: simulate at least 1")
        for name in ("view_events", "shop_events", "interactions"):
            if getattr(self, name) < 0:
                raise SimulationError(f"{name} is {getattr(self, name)}: give 0 or more")
        shares = (self.late_share, self.duplicate_share, self.malformed_share)
        if min(shares) < 0 or self.duplicate_share + self.malformed_share > 0.9 or self.late_share > 1:
            raise SimulationError(
                "shares of late, duplicate and malformed events are at least 0, late at most 1, "
                "duplicate and malformed together at most 0.9"
            )
        if self.end.tzinfo is None:
            raise SimulationError("the end of a simulation needs a time zone: give it in UTC, e.g. with a Z")

    @property
    def shape(self) -> str:
        """Twelve hex digits that differ where plans differ in anything but their end."""
        given = {name: value for name, value in asdict(self).items() if name != "end"}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def source(self) -> str:
        """Source name of the plan's messages in the raw tables, `simulate:<seed>:<shape>:<end, epoch s>`."""
        return f"simulate:{self.seed}:{self.shape}:{int(self.end.timestamp())}"

    @property
    def messages(self) -> int:
        """Number of messages the plan yields."""
        extra = round(self.items * self.malformed_share)
        return self.items + extra + self.view_events + self.shop_events + self.interactions


class SimulatedEvent(NamedTuple):
    """One delivery: its topic, its bytes, and the time of its event (of its delivery where malformed)."""

    topic: str
    message: bytes
    event_time: datetime


class _Item(NamedTuple):
    item_id: str
    category: str
    brand: str
    price: str | None


def _zipf(count: int, exponent: float) -> list[float]:
    return list(accumulate(1 / (rank + 1) ** exponent for rank in range(count)))


def _quoted(moment: int) -> str:
    day, rest = divmod(moment, DAY_MS)
    return f'"{_day(day)}T{CLOCK[rest // 1000]}.{rest % 1000:03d}Z"'


_days: dict[int, str] = {}


def _day(number: int) -> str:
    found = _days.get(number)
    if found is None:
        found = _days[number] = (EPOCH + timedelta(days=number)).date().isoformat()
    return found


# Every way of writing a time that the typed layer reads; the first is by far the most frequent.
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


class World:
    """The viewers, users, contents and items of a simulation, and how they behave, from one seed."""

    def __init__(self, plan: SimulationPlan) -> None:
        self.plan = plan
        # The end is part of the seed: event ids of two runs must not meet, or one would count as a repeat.
        self.rng = rng = random.Random(f"{plan.source}")  # noqa: S311 (not a secret)
        self.users = plan.users or plan.viewers
        self._viewer_weights = _zipf(plan.viewers, 0.6)
        self._user_weights = _zipf(self.users, 0.6)
        self._item_weights = _zipf(plan.items, 0.9)
        self._hours = list(accumulate(HOUR_WEIGHTS))
        self._tastes = [(rng.randrange(len(GENRES)), rng.randrange(len(GENRES))) for _ in range(plan.viewers)]
        by_genre: list[list[tuple[str, int]]] = [[] for _ in GENRES]
        for number in range(plan.contents):
            runtime = rng.choice((1320, 1560, 2640, 3120, 5400, 6600))
            by_genre[number % len(GENRES)].append((f"c{number:05d}", runtime))
        self._contents = by_genre
        self._content_weights = [_zipf(len(contents), 0.9) for contents in by_genre]
        self.items = [self._item(number) for number in range(plan.items)]
        by_category: dict[str, list[int]] = {}
        for number, item in enumerate(self.items):
            by_category.setdefault(item.category, []).append(number)
        self._by_category = by_category

    def _item(self, number: int) -> _Item:
        rng = self.rng
        category, median, spread = CATEGORIES[rng.randrange(len(CATEGORIES))]
        price = f"{max(0.5, median * rng.lognormvariate(0, spread)):.2f}"
        return _Item(
            f"i{number:06d}",
            "" if rng.random() < 0.03 else category,
            "" if rng.random() < 0.05 else BRANDS[rng.randrange(len(BRANDS))],
            None if rng.random() < 0.02 else price,
        )

    def _pick(self, weights: Sequence[float]) -> int:
        return bisect(weights, self.rng.random() * weights[-1])

    def catalogue(self) -> Iterator[bytes]:
        """The items as messages, some of them out of stock, then the malformed entries."""
        rng = self.rng
        for item in self.items:
            name = item.category.rsplit(".", 1)[-1].replace("_", " ") or "article"
            title = f"{rng.choice(ADJECTIVES)} {item.brand} {name}".replace("  ", " ")
            fields = {
                "item_id": item.item_id,
                "title": title,
                "category": item.category,
                "brand": item.brand,
                "price": float(item.price) if item.price is not None else None,
                "in_stock": rng.random() >= 0.06,
            }
            yield json.dumps(fields, separators=(",", ":")).encode()
        bad = (
            b'{"title":"no id","price":1}',
            b'{"item_id":"x-negative","price":-1}',
            b"{item",
            b'{"item_id":{}}',
        )
        for number in range(round(self.plan.items * self.plan.malformed_share)):
            yield bad[number % len(bad)]

    def moment(self, day_start: int) -> int:
        """A time within the 24 hours from `day_start` (epoch ms), by the hour's activity in UTC."""
        rng = self.rng
        second = bisect(self._hours, rng.random() * self._hours[-1]) * HOUR_MS + int(rng.random() * HOUR_MS)
        return day_start + (second - day_start) % DAY_MS

    def _time(self, moment: int) -> str:
        if self.rng.random() < 0.92:
            return _quoted(moment)
        return TIME_FORMATS[1 + int(self.rng.random() * (len(TIME_FORMATS) - 1))](moment)

    def view_session(self, start: int) -> Iterator[tuple[int, bytes]]:
        """One sitting of one viewer: (event time in epoch ms, message); on a binge day a long one."""
        rng = self.rng
        draw = rng.random
        viewer = self._pick(self._viewer_weights)
        binge = (viewer * 7 + start // DAY_MS) % 23 == 0
        taste = draw()
        genre = self._tastes[viewer][0 if taste < 0.6 else 1] if taste < 0.85 else int(draw() * len(GENRES))
        if not self._contents[genre]:
            genre = 0
        moment = start
        for _ in range(6 + int(draw() * 8) if binge else 1 + int(draw() * draw() * 5)):
            content, runtime = self._contents[genre][self._pick(self._content_weights[genre])]
            share = 0.9 + 0.1 * draw() if draw() < (0.8 if binge else 0.45) else draw()
            seconds = int(runtime * share)
            moment += seconds * 1000
            yield (
                moment,
                (
                    f'{{"event_id":"v-{rng.getrandbits(64):016x}","viewer_id":{viewer + 1},'
                    f'"content_id":"{content}",'
                    f'"genre":"{GENRES[genre]}","watch_duration_sec":{seconds},"completion_pct":{share:.4f},'
                    f'"watched_at":{self._time(moment)}}}'
                ).encode(),
            )
            moment += 5_000 + int(draw() * 60_000)

    def shop_session(self, start: int) -> Iterator[tuple[int, bytes]]:
        """One visit of one user: views, then perhaps a wish, a cart and a purchase of what was viewed."""
        rng = self.rng
        draw = rng.random
        user = self._pick(self._user_weights)
        session = f"{rng.getrandbits(48):012x}"
        anchor = self.items[self._pick(self._item_weights)]
        related = self._by_category[anchor.category]
        moment = start
        for _ in range(1 + int(draw() * draw() * 9)):
            item = (
                self.items[related[int(len(related) * draw() * draw())]]
                if draw() < 0.7
                else self.items[self._pick(self._item_weights)]
            )
            steps = ["view"]
            if draw() < 0.05:
                steps.append("wishlist")
            if draw() < 0.10:
                steps.append("add_to_cart")
                if draw() < 0.45:
                    steps.append("purchase")
            for step in steps:
                moment += 4_000 + int(draw() * 50_000)
                yield (
                    moment,
                    (
                        f'{{"event_id":"s-{rng.getrandbits(64):016x}","user_id":"u{user + 1:06d}",'
                        f'"item_id":"{item.item_id}","event_type":"{step}","category":"{item.category}",'
                        f'"brand":"{item.brand}","price":{item.price or "null"},"session_id":"{session}",'
                        f'"event_time":{self._time(moment)}}}'
                    ).encode(),
                )

    def interaction(self, start: int) -> Iterator[tuple[int, bytes]]:
        """One like, share or search of one viewer."""
        draw = self.rng.random()
        kind = "like" if draw < 0.6 else "search" if draw < 0.85 else "share"
        yield (
            start,
            (
                f'{{"event_id":"x-{self.rng.getrandbits(64):016x}",'
                f'"viewer_id":{self._pick(self._viewer_weights) + 1},"event_type":"{kind}",'
                f'"event_ts":{self._time(start)}}}'
            ).encode(),
        )

    def session(self, topic: str, start: int) -> Iterator[tuple[int, bytes]]:
        """One session of a topic's events that starts at `start` (epoch ms)."""
        if topic == "view_events":
            return self.view_session(start)
        return self.shop_session(start) if topic == "user.events" else self.interaction(start)

    def malformed(self, topic: str, number: int, moment: int) -> bytes:
        """The `number`-th malformed message of a topic: every reason of refusal comes round."""
        key = "user_id" if topic == "user.events" else "viewer_id"
        time_field = TOPICS[topic].time_field or ""
        name = f"bad-{self.rng.getrandbits(64):016x}"
        good: dict[str, object] = {"event_id": name, key: 1, time_field: parse_ms(moment)}
        changes: list[dict[str, object]] = [
            {"event_id": None}, {"event_id": {}}, {key: None}, {key: ["x"]}, {time_field: None},
            {time_field: "yesterday"}, {time_field: parse_ms(moment + 4000 * DAY_MS)},
        ]  # fmt: skip
        if topic == "view_events":
            good |= {
                "content_id": "c00001",
                "genre": "drama",
                "watch_duration_sec": 60,
                "completion_pct": 0.5,
            }
            changes += [
                {"viewer_id": "twelve"}, {"watch_duration_sec": -5}, {"watch_duration_sec": "long"},
                {"completion_pct": 1.5}, {"completion_pct": -0.1}, {"completion_pct": "all"},
            ]  # fmt: skip
        else:
            good["event_type"] = "view" if topic == "user.events" else "like"
            changes += [{"event_type": "teleport"}, {"event_type": None}]
        if topic == "user.events":
            good |= {"item_id": "i000001", "category": "kids.toys", "brand": "orbit", "price": 1}
            changes += [{"price": -3.5}, {"price": "cheap"}]
        broken = (
            b'{"event_id": "' + name.encode(),
            b'{"event_id":"\xff\xfe' + name.encode() + b'"}',
            b"[1,2]",
        )
        at = number % (len(broken) + len(changes))
        if at < len(broken):
            return broken[at]
        changed = good | changes[at - len(broken)]
        return json.dumps({field: value for field, value in changed.items() if value is not None}).encode()


def parse_ms(moment: int) -> str:
    """Epoch milliseconds as ISO 8601 text with `Z`."""
    return _quoted(moment)[1:-1]


def simulate(plan: SimulationPlan) -> Iterator[SimulatedEvent]:
    """The plan's messages in order of delivery, the catalogue first; memory holds a day of them."""
    world = World(plan)
    rng = world.rng
    end = int(plan.end.timestamp() * 1000)
    first = end - plan.days * DAY_MS
    for message in world.catalogue():
        yield SimulatedEvent("items", message, EPOCH + timedelta(milliseconds=first))
    totals = {
        "user.events": plan.shop_events,
        "view_events": plan.view_events,
        "content_interactions": plan.interactions,
    }
    # Weekends are busier: the share of each day, then how many messages are due by its end.
    weights = list(
        accumulate(1.35 if ((first // DAY_MS + day) + 3) % 7 >= 5 else 1.0 for day in range(plan.days))
    )
    made = dict.fromkeys(totals, 0)
    bad = dict.fromkeys(totals, 0)
    repeated = dict.fromkeys(totals, 0)
    pools: dict[str, list[tuple[int, bytes]]] = {topic: [] for topic in totals}
    # (delivery, number, topic, message, event time); the number keeps the order total and the heap fast.
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
                # A handful of messages: there would be nothing to repeat.
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
                # After any lateness of the first delivery, so that a repeat is never the first.
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


class EventSink(Protocol):
    """Where simulated messages go."""

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Take messages with their numbers within the topic (from 1); returns how many are new."""

    def finish(self) -> None:
        """Make everything written durable."""


class EngineSink:
    """Raw tables of the engine, under one source name."""

    def __init__(self, store: RawStore, source: str) -> None:
        self._store = store
        self.source = source

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Store a batch; raises RawStoreError."""
        rows = [RawMessage(0, offset, message) for offset, message in messages]
        return self._store.write(TOPICS[topic], self.source, rows)

    def finish(self) -> None:
        """Every batch is committed already."""


class KafkaSink:
    """Kafka topics; `names` gives topics their names there where they differ, `client` adds librdkafka properties."""

    def __init__(
        self,
        bootstrap: str,
        names: Mapping[str, str] | None = None,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        from dagster_prefs.events.kafka import KafkaWriter

        self._writer = KafkaWriter(bootstrap, client=client)
        self._names = names or {}
        self._checked: set[str] = set()

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Send a batch; raises KafkaUnavailable."""
        name = self._names.get(topic, topic)
        if name not in self._checked:
            self._writer.check(name)
            self._checked.add(name)
        for _, message in messages:
            self._writer.send(name, message)
        return len(messages)

    def finish(self) -> None:
        """Wait for every delivery; raises KafkaUnavailable."""
        self._writer.flush()


def remembered_end(connection: EngineConnection, plan: SimulationPlan) -> datetime | None:
    """The newest end at which a plan of this shape was written to the engine, whole or in part; else None.

    A run that goes on from there, with `replace(plan, end=…)`, adds what is missing and nothing twice.
    Raises EngineUnavailable, RawStoreError.
    """
    with RawStore(connection) as store:
        ends = [
            int(r.source.rsplit(":", 1)[1]) for r in store.recall_all(f"simulate:{plan.seed}:{plan.shape}:")
        ]
    return datetime.fromtimestamp(max(ends), UTC) if ends else None


def simulate_to_engine(
    connection: EngineConnection,
    plan: SimulationPlan,
    *,
    batch_size: int = 10_000,
    rate: float | None = None,
    progress: ProgressCallback | None = None,
) -> list[IngestReport]:
    """Write a plan into the raw tables and report per topic; a repeated plan adds only what is missing.

    `rate` limits events per second. Raises EngineUnavailable, RawStoreError.
    """
    started = time.monotonic()
    plan = replace(plan, end=plan.end.replace(microsecond=0))
    with RawStore(connection) as store:
        record = FileRecord(plan.source, "simulation", "all", None, 0, None)
        known = store.remember_start(record)
        if known.completed_at is not None:
            held = plan_counts(plan)
            return [
                IngestReport(plan.source, topic, n, 0, n, 0, 0, time.monotonic() - started)
                for topic, n in held.items()
            ]
        counts = _write(
            simulate(plan), EngineSink(store, plan.source), plan.messages, batch_size, rate, progress
        )
        store.remember_end(
            replace(record, lines=sum(n for n, _ in counts.values()), completed_at=datetime.now(UTC))
        )
    seconds = time.monotonic() - started
    return [
        IngestReport(plan.source, topic, n, new, n - new, 0, 0, seconds) for topic, (n, new) in counts.items()
    ]


def plan_counts(plan: SimulationPlan) -> dict[str, int]:
    """Messages per topic that a plan yields."""
    return {
        "items": plan.items + round(plan.items * plan.malformed_share),
        "user.events": plan.shop_events,
        "view_events": plan.view_events,
        "content_interactions": plan.interactions,
    }


def simulate_to_kafka(
    bootstrap: str,
    plan: SimulationPlan,
    *,
    names: Mapping[str, str] | None = None,
    client: Mapping[str, Any] | None = None,
    rate: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Send a plan to the Kafka topics of its messages; returns messages delivered per topic.

    `names` gives topics their names in Kafka where they differ, `client` adds librdkafka properties, e.g. for TLS.

    Raises KafkaUnavailable when a topic is missing or a message was not delivered.
    """
    counts = _write(simulate(plan), KafkaSink(bootstrap, names, client), plan.messages, 1000, rate, progress)
    return {topic: n for topic, (n, _) in counts.items()}


def simulate_to_files(
    folder: Path, plan: SimulationPlan, *, compress: bool = False, progress: ProgressCallback | None = None
) -> dict[str, Path]:
    """Write a plan as one `.jsonl` (or `.jsonl.gz`) file per topic; returns the file of each topic.

    A file takes its name when it is whole: an interrupted run leaves no half file under it.
    Raises SimulationError when the folder cannot be written.
    """
    suffix = ".jsonl.gz" if compress else ".jsonl"
    paths: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for done, (topic, message, _) in enumerate(simulate(plan), 1):
                if topic not in files:
                    paths[topic] = folder / f"{topic}{suffix}"
                    raw = stack.enter_context(whole_file(paths[topic]))
                    # Without name and time of writing, so that the same plan gives the same bytes.
                    files[topic] = raw
                    if compress:
                        packed: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0)
                        files[topic] = stack.enter_context(packed)
                files[topic].write(message + b"\n")
                if progress is not None and done % 10_000 == 0:
                    progress(Progress(done, done, plan.messages, "messages"))
    except OSError as error:
        raise SimulationError(
            f"{folder} cannot be written ({error.strerror}): choose another folder"
        ) from None
    return paths


def follow(
    sink: EventSink,
    plan: SimulationPlan,
    *,
    rate: float = 20.0,
    seconds: float | None = None,
    stop: threading.Event | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """A live trickle: `rate` events per second whose event time is now, until `stop` or for `seconds`.

    The plan gives the seed, viewers, users and items; topics come in the proportions of its counts.
    Returns messages per topic. Raises what the sink raises, and SimulationError for a rate of 0 or less.
    """
    if rate <= 0:
        raise SimulationError(f"the rate is {rate:g} events per second: give a positive number")
    world = World(plan)
    topics = ["view_events", "user.events", "content_interactions"]
    weights = [plan.view_events, plan.shop_events, plan.interactions]
    if not any(weights):
        weights = [1, 1, 1]
    stop = stop or threading.Event()
    counts: dict[str, int] = {}
    started = time.monotonic()
    sent = 0
    while not stop.is_set() and (seconds is None or time.monotonic() - started < seconds):
        due = int((time.monotonic() - started) * rate) + 1 - sent
        batches: dict[str, list[tuple[int, bytes]]] = {}
        for _ in range(due):
            topic = world.rng.choices(topics, weights)[0]
            counts[topic] = counts.get(topic, 0) + 1
            batches.setdefault(topic, []).append((counts[topic], _live(world, topic)))
        for topic, batch in batches.items():
            sink.write(topic, batch)
        sent += due
        if progress is not None:
            progress(Progress(sent, sent, None, "messages"))
        stop.wait(max(0.05, min(0.5, 1 / rate)))
    sink.finish()
    return counts


def follow_to_engine(
    connection: EngineConnection,
    plan: SimulationPlan,
    *,
    rate: float = 20.0,
    seconds: float | None = None,
    stop: threading.Event | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """`follow` into the raw tables, as a source of its own. Raises EngineUnavailable, RawStoreError."""
    plan = replace(plan, end=datetime.now(UTC))
    with RawStore(connection) as store:
        sink = EngineSink(store, f"simulate:{plan.seed}:live:{int(plan.end.timestamp() * 1000)}")
        return follow(sink, plan, rate=rate, seconds=seconds, stop=stop, progress=progress)


def _live(world: World, topic: str) -> bytes:
    """One event of now: the first of a session, placed so that it happens at this moment."""
    now = int(time.time() * 1000)
    _, message = next(iter(world.session(topic, now)))
    field = TOPICS[topic].time_field or ""
    value = json.loads(message)
    value[field] = parse_ms(now)
    return json.dumps(value, separators=(",", ":")).encode()


def _write(
    events: Iterable[SimulatedEvent],
    sink: EventSink,
    total: int,
    batch_size: int,
    rate: float | None,
    progress: ProgressCallback | None,
) -> dict[str, tuple[int, int]]:
    """Write events by topic in batches; returns messages and new messages per topic."""
    if rate is not None and rate <= 0:
        raise SimulationError(f"the rate is {rate:g} events per second: give a positive number")
    size = batch_size if rate is None else max(1, min(batch_size, int(rate / 4)))
    batches: dict[str, list[tuple[int, bytes]]] = {}
    counts: dict[str, int] = {}
    new: dict[str, int] = {}
    started = time.monotonic()

    def flush(topic: str) -> None:
        new[topic] = new.get(topic, 0) + sink.write(topic, batches[topic])
        batches[topic] = []
        done = sum(counts.values())
        if rate is not None:
            time.sleep(max(0.0, done / rate - (time.monotonic() - started)))
        if progress is not None:
            progress(Progress(done, done, total, "messages"))

    for topic, message, _ in events:
        counts[topic] = counts.get(topic, 0) + 1
        batch = batches.setdefault(topic, [])
        batch.append((counts[topic], message))
        if len(batch) >= size:
            flush(topic)
    for topic, batch in batches.items():
        if batch:
            flush(topic)
    sink.finish()
    return {topic: (count, new.get(topic, 0)) for topic, count in counts.items()}
