"""The preference reads by their definitions, in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from hypothesis import strategies as st

CATEGORIES = ["audio", "Books", "cables", "über"]
BRANDS = ["acme", "Bolt", "core"]
TIERS = ["budget", "mid-range", "premium", "luxury"]


@dataclass(frozen=True)
class World:
    """Rows of the five relations, as the oracle sees them."""

    categories: tuple[tuple[Any, ...], ...] = ()
    brands: tuple[tuple[Any, ...], ...] = ()
    tiers: tuple[tuple[Any, ...], ...] = ()
    recent: tuple[tuple[Any, ...], ...] = ()
    items: tuple[tuple[Any, ...], ...] = ()

    def load(self, shop: Any) -> None:
        for relation, rows in (
            ("user_category_profile", self.categories),
            ("user_brand_profile", self.brands),
            ("user_price_sensitivity", self.tiers),
            ("user_recent_activity", self.recent),
            ("items", self.items),
        ):
            if rows:
                shop.insert(relation, *rows)


def oracle_tier(price: Decimal | None) -> str | None:
    if price is None:
        return None
    return "budget" if price < 25 else "mid-range" if price < 100 else "premium" if price < 500 else "luxury"


def oracle_ranking(
    world: World, user: str, limit: int, now: datetime, *, session: bool
) -> list[tuple[str, Decimal]]:
    """The ranking by its definition, item by item: (item_id, score) best first."""
    recent = [
        row for row in world.recent if row[0] == user and row[6] >= now - timedelta(hours=3) and row[5] <= now
    ]
    long_enough = bool(recent) and max(row[6] for row in recent) - min(row[5] for row in recent) >= timedelta(
        minutes=5
    )
    scored = []
    for item_id, _, category, brand, price, in_stock in world.items:
        if not in_stock:
            continue
        affinity = sum((row[2] for row in world.categories if row[:2] == (user, category)), 0)
        loyalty = sum((row[2] for row in world.brands if row[:2] == (user, brand)), 0)
        rate = sum((row[4] or 0 for row in world.tiers if row[:2] == (user, oracle_tier(price))), Decimal(0))
        score = (4 * Decimal(affinity) + 3 * Decimal(loyalty) + 3 * 100 * rate) / 10
        if session and long_enough:
            interactions = sum(row[2] for row in recent if row[1] == category)
            score = (6 * Decimal(interactions) + 4 * score) / 10
        scored.append((item_id, score.quantize(Decimal("0.000001"), ROUND_HALF_UP)))
    scored.sort(key=lambda entry: (-entry[1], entry[0]))
    return scored[:limit]


def hour(user: str, category: str, interactions: int, first: datetime, last: datetime) -> tuple[Any, ...]:
    start = first.replace(minute=0, second=0, microsecond=0)
    return (user, category, interactions, start, start + timedelta(hours=1), first, last)


money = st.decimals(0, 600, places=2)


@st.composite
def worlds(draw: st.DrawFn, now: datetime) -> World:
    """Relations of the user u with few keys, so that signals and items meet."""

    def sample(keys: list[str], row: Any) -> tuple[tuple[Any, ...], ...]:
        chosen = draw(st.lists(st.sampled_from(keys), unique=True))
        return tuple(row(key) for key in chosen)

    def activity(category: str) -> tuple[Any, ...]:
        first = now - timedelta(minutes=draw(st.integers(0, 400)))
        return hour(
            "u", category, draw(st.integers(1, 9)), first, first + timedelta(minutes=draw(st.integers(0, 10)))
        )

    return World(
        categories=sample(CATEGORIES, lambda key: ("u", key, draw(st.integers(1, 200)), 1, now)),
        brands=sample(BRANDS, lambda key: ("u", key, draw(st.integers(1, 200)), 0, now)),
        tiers=sample(
            TIERS,
            lambda key: ("u", key, 1, 1, draw(st.none() | st.decimals(0, 3, places=6))),
        ),
        recent=sample(CATEGORIES, activity),
        items=tuple(
            (f"item {number}", None, category, brand, price, in_stock)
            for number, (category, brand, price, in_stock) in enumerate(
                draw(
                    st.lists(
                        st.tuples(
                            st.none() | st.sampled_from(CATEGORIES),
                            st.none() | st.sampled_from(BRANDS),
                            st.none() | money | st.sampled_from([Decimal(25), Decimal(100), Decimal(500)]),
                            st.booleans(),
                        ),
                        max_size=12,
                    )
                )
            )
        ),
    )
