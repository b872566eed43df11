"""The example's scenario, from a seed: viewers who watch, and users of a shop who look and buy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.tools.simulation import (
    DAY_MS,
    EPOCH,
    Plan,
    SimulatedEvent,
    World,
    deliveries,
    iso_text,
    zipf,
)

GENRES = (
    "drama", "comedy", "thriller", "documentary", "crime", "science fiction", "animation", "romance",
    "horror", "family", "action", "sport",
)  # fmt: skip
# Category, median price, standard deviation of the price's logarithm.
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

# Topic → the fields of its messages.
FIELDS = {
    "items": frozenset({"item_id", "title", "category", "brand", "price", "in_stock"}),
    "user.events": frozenset(
        {
            "event_id",
            "user_id",
            "item_id",
            "event_type",
            "category",
            "brand",
            "price",
            "session_id",
            "event_time",
        }
    ),
    "view_events": frozenset(
        {"event_id", "viewer_id", "content_id", "genre", "watch_duration_sec", "completion_pct", "watched_at"}
    ),
    "content_interactions": frozenset({"event_id", "viewer_id", "event_type", "event_ts"}),
}
_TIMES = {"user.events": "event_time", "view_events": "watched_at", "content_interactions": "event_ts"}


@dataclass(frozen=True)
class SimulationPlan(Plan):
    """The size and shape of a simulation of the scenario.

    `view_events`, `shop_events` and `interactions` are the exact numbers of messages of their topics. `items`
    is the size of the catalogue, without malformed entries. `users` defaults to `viewers`.
    """

    viewers: int = 5_000
    view_events: int = 200_000
    shop_events: int = 100_000
    interactions: int = 20_000
    items: int = 2_000
    contents: int = 800
    users: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1, "viewers", "contents", "users")
        self.require(0, "view_events", "shop_events", "interactions")
        self.require(1 if self.shop_events else 0, "items")

    @property
    def total(self) -> int:
        """Number of events, without the catalogue."""
        return sum(self._totals().values())

    def only(self, topics: frozenset[str]) -> SimulationPlan:
        """Return the plan restricted to these topics."""
        return replace(
            self,
            view_events=self.view_events if "view_events" in topics else 0,
            shop_events=self.shop_events if "user.events" in topics else 0,
            interactions=self.interactions if "content_interactions" in topics else 0,
            items=self.items if "items" in topics else 0,
        )

    def counts(self) -> dict[str, int]:
        """Return the number of messages that the plan yields, by topic."""
        return {"items": self.items + round(self.items * self.malformed_share), **self._totals()}

    def _totals(self) -> dict[str, int]:
        return {
            "user.events": self.shop_events,
            "view_events": self.view_events,
            "content_interactions": self.interactions,
        }

    def events(self) -> Iterator[SimulatedEvent]:
        """Yield the messages in order of delivery, the catalogue first. Memory holds one day of them."""
        world = Scenario(self)
        first = EPOCH + timedelta(milliseconds=int(self.end.timestamp() * 1000) - self.days * DAY_MS)
        for message in world.catalogue():
            yield SimulatedEvent("items", message, first)
        yield from deliveries(self, world, self._totals())

    def live(self) -> Iterator[tuple[str, bytes]]:
        """Yield topic and message of events that happen now, endlessly, in the proportions of the counts."""
        totals = self._totals()
        # A seed's messages depend on this order.
        order = ("view_events", "user.events", "content_interactions")
        return Scenario(self).live({topic: totals[topic] for topic in order})


def scenario_topics(registry: Registry) -> frozenset[str]:
    """Return the scenario's topics that the project declares with all fields of their messages.

    The shop's events are about items of the catalogue, so they require both topics.
    """
    there = {
        name
        for name, fields in FIELDS.items()
        if name in registry.topics and fields <= set(registry.topics[name].by_name)
    }
    return frozenset(there if "items" in there else there - {"user.events"})


def scenario_plan(end: datetime, *, seed: int, days: int, entities: int, events: int) -> SimulationPlan:
    """Return a plan of about this many events, in the demo's proportions."""
    return SimulationPlan(
        end,
        seed=seed,
        days=days,
        viewers=entities,
        view_events=events * 10 // 16,
        shop_events=events * 5 // 16,
        interactions=events // 16,
    )


class _Item(NamedTuple):
    item_id: str
    category: str
    brand: str
    price: str | None


class Scenario(World):
    """The viewers, users, contents and items of a simulation, and their behaviour, from a seed."""

    def __init__(self, plan: SimulationPlan) -> None:
        super().__init__(plan)
        self.plan = plan
        rng = self.rng
        self.users = plan.users or plan.viewers
        self._viewer_weights = zipf(plan.viewers, 0.6)
        self._user_weights = zipf(self.users, 0.6)
        self._item_weights = zipf(plan.items, 0.9)
        self._tastes = [(rng.randrange(len(GENRES)), rng.randrange(len(GENRES))) for _ in range(plan.viewers)]
        by_genre: list[list[tuple[str, int]]] = [[] for _ in GENRES]
        for number in range(plan.contents):
            runtime = rng.choice((1320, 1560, 2640, 3120, 5400, 6600))
            by_genre[number % len(GENRES)].append((f"c{number:05d}", runtime))
        self._contents = by_genre
        self._content_weights = [zipf(len(contents), 0.9) for contents in by_genre]
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

    def catalogue(self) -> Iterator[bytes]:
        """Yield the items as messages, some of them out of stock, then the malformed entries."""
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

    def view_session(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield one viewing session of one viewer, long on a binge day: (event time in epoch ms, message)."""
        rng = self.rng
        draw = rng.random
        viewer = self.pick(self._viewer_weights)
        binge = (viewer * 7 + start // DAY_MS) % 23 == 0
        taste = draw()
        genre = self._tastes[viewer][0 if taste < 0.6 else 1] if taste < 0.85 else int(draw() * len(GENRES))
        if not self._contents[genre]:
            genre = 0
        moment = start
        for _ in range(6 + int(draw() * 8) if binge else 1 + int(draw() * draw() * 5)):
            content, runtime = self._contents[genre][self.pick(self._content_weights[genre])]
            share = 0.9 + 0.1 * draw() if draw() < (0.8 if binge else 0.45) else draw()
            seconds = int(runtime * share)
            moment += seconds * 1000
            yield (
                moment,
                (
                    f'{{"event_id":"v-{rng.getrandbits(64):016x}","viewer_id":{viewer + 1},'
                    f'"content_id":"{content}",'
                    f'"genre":"{GENRES[genre]}","watch_duration_sec":{seconds},"completion_pct":{share:.4f},'
                    f'"watched_at":{self.time(moment)}}}'
                ).encode(),
            )
            moment += 5_000 + int(draw() * 60_000)

    def shop_session(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield one visit of one user: views, then possibly a wish, a cart and a purchase of a viewed
        item."""
        rng = self.rng
        draw = rng.random
        user = self.pick(self._user_weights)
        session = f"{rng.getrandbits(48):012x}"
        anchor = self.items[self.pick(self._item_weights)]
        related = self._by_category[anchor.category]
        moment = start
        for _ in range(1 + int(draw() * draw() * 9)):
            item = (
                self.items[related[int(len(related) * draw() * draw())]]
                if draw() < 0.7
                else self.items[self.pick(self._item_weights)]
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
                        f'"event_time":{self.time(moment)}}}'
                    ).encode(),
                )

    def interaction(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield one like, share or search of one viewer."""
        draw = self.rng.random()
        kind = "like" if draw < 0.6 else "search" if draw < 0.85 else "share"
        yield (
            start,
            (
                f'{{"event_id":"x-{self.rng.getrandbits(64):016x}",'
                f'"viewer_id":{self.pick(self._viewer_weights) + 1},"event_type":"{kind}",'
                f'"event_ts":{self.time(start)}}}'
            ).encode(),
        )

    def session(self, topic: str, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield one session of a topic's events that starts at `start` (epoch ms)."""
        if topic == "view_events":
            return self.view_session(start)
        return self.shop_session(start) if topic == "user.events" else self.interaction(start)

    def time_field(self, topic: str) -> str:
        """Return the field of the event time."""
        return _TIMES[topic]

    def malformed(self, topic: str, number: int, moment: int) -> bytes:
        """Return the `number`-th malformed message of a topic, going through all reasons of rejection."""
        key = "user_id" if topic == "user.events" else "viewer_id"
        time_field = self.time_field(topic)
        name = f"bad-{self.rng.getrandbits(64):016x}"
        good: dict[str, object] = {"event_id": name, key: 1, time_field: iso_text(moment)}
        changes: list[dict[str, object]] = [
            {"event_id": None}, {"event_id": {}}, {key: None}, {key: ["x"]}, {time_field: None},
            {time_field: "yesterday"}, {time_field: iso_text(moment + 4000 * DAY_MS)},
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
