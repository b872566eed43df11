"""The ranking of `ShopClient.rank` in process: the catalogue in memory, and one read of the user's rows.

A score is the sum of a user's affinities to an item's category, brand and price tier, so all items with the
same category, tier and brand share it. The ranker therefore scores groups of items, not items, in exact
integer arithmetic, and reads the requested number of items off the best groups.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from heapq import merge
from itertools import chain, islice
from typing import Any, TypeVar, cast

from psycopg import sql

from dagster_prefs.serving.observing import reading
from dagster_prefs.serving.pool import TURN, Connection
from dagster_prefs.serving.preferences import (
    ENTITY,
    Components,
    RankedItem,
    Ranking,
    RankingParameters,
    ShopClient,
    checked_limit,
    checked_now,
    checked_user,
    is_personal,
    price_tier,
)

# The first characters of md5(item_id) identify a bucket: 4,096 buckets, of some 25 items each at 100,000
# items.
BUCKET_CHARACTERS = 3
FETCH_ROWS = 5_000
SCORE_DIGITS = 6

# Exact decimal sums and products: the precision is never exceeded, so no digit is rounded.
_EXACT = Context(prec=200)
_NONE = b"\xff"

V = TypeVar("V")
Row = tuple[str, str | None, str | None, str | None, Decimal | None]


@dataclass(frozen=True)
class RefreshReport:
    """The outcome of a refresh: items in stock in memory, rows fetched, bytes held, seconds spent."""

    items: int
    fetched_rows: int
    changed_buckets: int
    size_bytes: int
    seconds: float


class CatalogueRanker:
    """Ranks from memory, with the same results as the client's SQL; usable from many threads.

    `refresh` updates the catalogue: it compares one digest per bucket of items, and fetches the buckets that
    changed. The first ranking refreshes automatically; after that the caller decides how often to refresh,
    because this determines how long an item that sold out is still ranked.
    """

    def __init__(self, client: ShopClient) -> None:
        self._client = client
        self._catalogue: _Catalogue | None = None
        self._digests: dict[str, str] = {}
        self._refreshing = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Memory that the catalogue occupies, in bytes; 0 before the first refresh."""
        if self._catalogue is None:
            return 0
        return self._catalogue.size_bytes + sum(
            sys.getsizeof(bucket) + sys.getsizeof(digest) for bucket, digest in self._digests.items()
        )

    def refresh(self) -> RefreshReport:
        """Fetch the changes of `items`; rankings use the old catalogue in the meantime.

        Raises as every read of ShopClient.
        """
        started = time.monotonic()
        with self._refreshing:
            # Digests are read before the rows, so that the next refresh detects a change after that.
            digests = self._client.run(self._read_digests)
            changed = {
                bucket
                for bucket in digests.keys() | self._digests.keys()
                if digests.get(bucket) != self._digests.get(bucket)
            }
            fetched = 0
            if changed or self._catalogue is None:
                present = sorted(changed & digests.keys())
                rows = self._client.run(
                    lambda connection: self._read_items(connection, present, len(digests))
                )
                fetched = len(rows)
                kept = () if self._catalogue is None else self._catalogue.rows()
                rows += [row for row in kept if _bucket(row[0]) not in changed]
                self._catalogue = _Catalogue(rows)
                self._digests = digests
            return RefreshReport(
                items=len(self._catalogue),
                fetched_rows=fetched,
                changed_buckets=len(changed),
                size_bytes=self.size_bytes,
                seconds=time.monotonic() - started,
            )

    def rank(
        self,
        user_id: str,
        limit: int = 50,
        *,
        session: bool = True,
        now: datetime | None = None,
        explain: bool = False,
        parameters: RankingParameters | None = None,
    ) -> Ranking:
        """Rank like `ShopClient.rank`, over the catalogue as of the last refresh."""
        user_id = checked_user(user_id, ranking=True)
        checked_limit(limit)
        moment = checked_now(now)
        chosen = parameters or self._client.parameters
        catalogue = self._catalogue
        while catalogue is None:
            self.refresh()
            catalogue = self._catalogue
        with reading(self._client.observer, ENTITY, "ranking") as told:
            rows = self._client.signals(user_id, chosen, moment)
            with TURN:
                signals = _Signals(rows, chosen, session=session)
                items = tuple(
                    signals.ranked(catalogue.row(position), explain=explain)
                    for position in catalogue.best(signals, limit)
                )
            told.found = is_personal(items)
        return Ranking(user_id, items, session and signals.active, signals.session_seconds, chosen)

    def _relation(self) -> sql.Identifier:
        return sql.Identifier(self._client.engine.schema, "items")

    def _read_digests(self, connection: Connection) -> dict[str, str]:
        statement = sql.SQL(
            """
            select bucket, md5(string_agg(digest, '' order by item_id)) from (
                select item_id, substr(md5(item_id), 1, {characters}) as bucket,
                    md5(
                        md5(item_id) || coalesce(md5(title), '-') || coalesce(md5(category), '-')
                        || coalesce(md5(brand), '-') || coalesce(price::text, '-')
                        || coalesce(in_stock::text, '-')
                    ) as digest
                from {items}
            ) as hashed group by bucket
            """
        ).format(items=self._relation(), characters=sql.Literal(BUCKET_CHARACTERS))
        return dict(connection.execute(statement).fetchall())

    def _read_items(self, connection: Connection, buckets: list[str], all_buckets: int) -> list[Row]:
        statement = sql.SQL("select item_id, title, category, brand, price from {} where in_stock").format(
            self._relation()
        )
        parameters = None
        if len(buckets) < all_buckets:
            statement += sql.SQL(" and substr(md5(item_id), 1, {}) = any(%s::text[])").format(
                sql.Literal(BUCKET_CHARACTERS)
            )
            parameters = [buckets]
        with connection.cursor() as cursor:
            # Streamed in batches, because RisingWave has no server-side cursors.
            return list(cursor.stream(statement, parameters, size=FETCH_ROWS))


class _Texts:
    """Texts in one block of memory: one object per text would occupy several times their bytes."""

    def __init__(self, values: Iterable[str | None]) -> None:
        parts = [_NONE if value is None else value.encode() for value in values]
        self._offsets = array("Q", [0])
        total = 0
        for part in parts:
            total += len(part)
            self._offsets.append(total)
        if total < 2**32:
            self._offsets = array("I", self._offsets)
        self._bytes = b"".join(parts)

    def __getitem__(self, position: int) -> str | None:
        part = self._bytes[self._offsets[position] : self._offsets[position + 1]]
        return None if part == _NONE else part.decode()

    @property
    def size_bytes(self) -> int:
        return sys.getsizeof(self._bytes) + sys.getsizeof(self._offsets)


class _Codes:
    """Maps distinct texts to numbers."""

    def __init__(self) -> None:
        self.texts: list[str | None] = []
        self.codes: dict[str | None, int] = {}

    def add(self, text: str | None) -> int:
        code = self.codes.get(text)
        if code is None:
            code = self.codes[text] = len(self.texts)
            self.texts.append(text)
        return code

    @property
    def size_bytes(self) -> int:
        own = sys.getsizeof(self.texts) + sys.getsizeof(self.codes)
        return own + sum(sys.getsizeof(text) for text in self.texts)


class _Catalogue:
    """The items in stock, by column and ordered by id; immutable.

    A group is a category and price tier; a run is a brand within a group. Both are slices of an array of
    positions, ascending within each slice.
    """

    def __init__(self, rows: list[Row]) -> None:
        rows.sort(key=lambda row: row[0])
        self._count = len(rows)
        self._ids = _Texts(row[0] for row in rows)
        self._titles = _Texts(row[1] for row in rows)
        self._prices = _Texts(None if row[4] is None else str(row[4]) for row in rows)
        self._brands = _Codes()
        self._brand_of = array("I", (self._brands.add(row[3]) for row in rows))
        self.groups: list[tuple[str | None, str | None]] = []
        known: dict[tuple[str | None, str | None], int] = {}
        self._group_of = array("I")
        for row in rows:
            group = (sys.intern(row[2]) if row[2] is not None else None, price_tier(row[4]))
            code = known.get(group)
            if code is None:
                code = known[group] = len(self.groups)
                self.groups.append(group)
            self._group_of.append(code)
        self._by_group, self._group_starts = array("I"), array("I")
        for members in _gathered(range(self._count), self._group_of, len(self.groups)):
            self._group_starts.append(len(self._by_group))
            self._by_group.extend(members)
        self._group_starts.append(self._count)
        self._by_run, self._run_starts = array("I"), array("I")
        self._run_groups, self._brand_runs = array("I"), array("I")
        for members in _gathered(self._by_group, self._brand_of, len(self._brands.texts)):
            self._brand_runs.append(len(self._run_groups))
            previous = None
            for place, position in enumerate(members, len(self._by_run)):
                group_code = self._group_of[position]
                if group_code != previous:
                    self._run_groups.append(group_code)
                    self._run_starts.append(place)
                    previous = group_code
            self._by_run.extend(members)
        self._run_starts.append(self._count)
        self._brand_runs.append(len(self._run_groups))

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        arrays = (
            self._brand_of,
            self._group_of,
            self._by_group,
            self._group_starts,
            self._by_run,
            self._run_groups,
            self._run_starts,
            self._brand_runs,
        )
        texts = self._ids.size_bytes + self._titles.size_bytes + self._prices.size_bytes
        groups = sys.getsizeof(self.groups) + sum(
            sys.getsizeof(group) + sys.getsizeof(group[0]) for group in self.groups
        )
        return texts + self._brands.size_bytes + groups + sum(map(sys.getsizeof, arrays))

    def row(self, position: int) -> Row:
        price = self._prices[position]
        category = self.groups[self._group_of[position]][0]
        brand = self._brands.texts[self._brand_of[position]]
        item_id = cast(str, self._ids[position])
        return item_id, self._titles[position], category, brand, None if price is None else Decimal(price)

    def rows(self) -> Iterator[Row]:
        return map(self.row, range(self._count))

    def best(self, signals: _Signals, limit: int) -> Iterator[int]:
        """Return the positions of the best `limit` items, best first, ties by item id."""
        bases = signals.group_scores(self.groups)
        liked: dict[int, int] = {}
        for brand, bonus in signals.brand_bonus.items():
            code = self._brands.codes.get(brand)
            if code is not None:
                liked[code] = bonus
        if not liked and len(set(bases)) == 1:
            return iter(range(min(limit, self._count)))
        floor = self._floor(bases, limit, signals.unit) if min(liked.values(), default=0) >= 0 else None
        levels: dict[int, list[Iterable[int]]] = defaultdict(list)
        rounded = signals.rounded
        slices = memoryview(self._by_run)
        run_groups, run_starts = self._run_groups, self._run_starts
        for code, bonus in liked.items():
            for run in range(self._brand_runs[code], self._brand_runs[code + 1]):
                score = bases[run_groups[run]] + bonus
                if floor is None or score >= floor:
                    levels[rounded(score)].append(slices[run_starts[run] : run_starts[run + 1]])
        slices = memoryview(self._by_group)
        for group, base in enumerate(bases):
            if floor is None or base >= floor:
                members = slices[self._group_starts[group] : self._group_starts[group + 1]]
                levels[rounded(base)].append(self._without(members, liked) if liked else members)
        ordered = (merge(*levels[score]) for score in sorted(levels, reverse=True))
        return islice(chain.from_iterable(ordered), limit)

    def _floor(self, bases: list[int], limit: int, unit: int) -> int | None:
        """Return a lower bound of the best items' scores, if whole groups above it suffice, else None."""
        found = 0
        for base, group in sorted(zip(bases, range(len(bases)), strict=True), reverse=True):
            found += self._group_starts[group + 1] - self._group_starts[group]
            if found >= limit:
                # Scores that differ by less than a unit may be equal after rounding.
                return base - unit
        return None

    def _without(self, members: Iterable[int], liked: dict[int, int]) -> Iterator[int]:
        brand_of = self._brand_of
        return (position for position in members if brand_of[position] not in liked)


class _Signals:
    """A user's affinities to categories, brands and tiers, as exact integers on one scale."""

    def __init__(
        self, rows: Sequence[tuple[Any, ...]], parameters: RankingParameters, *, session: bool
    ) -> None:
        self._session = session
        self._parameters = parameters
        self.categories: dict[str, Decimal] = {}
        self.brands: dict[str, Decimal] = {}
        self.tiers: dict[str, Decimal] = {}
        self.recent: dict[str, int] = {}
        first: datetime | None = None
        last: datetime | None = None
        for kind, name, amount, count, _, first_at, last_at in rows:
            if kind == "category":
                self.categories[name] = amount
            elif kind == "brand":
                self.brands[name] = amount
            elif kind == "tier":
                self.tiers[name] = amount or Decimal(0)
            else:
                self.recent[name] = count
                first = first_at if first is None else min(first, first_at)
                last = last_at if last is None else max(last, last_at)
        self.session_seconds: Decimal | None = None
        if first is not None and last is not None:
            span = last - first
            micros = (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds
            self.session_seconds = Decimal(micros).scaleb(-6)
        self.active = (
            self.session_seconds is not None and self.session_seconds >= parameters.min_session_seconds
        )
        multiply = _EXACT.multiply
        self._lifetime_category = {n: multiply(parameters.category, v) for n, v in self.categories.items()}
        self._lifetime_brand = {n: multiply(parameters.brand, v) for n, v in self.brands.items()}
        per_rate = multiply(Decimal(parameters.price_tier), Decimal(100))
        self._lifetime_tier = {n: multiply(per_rate, v) for n, v in self.tiers.items()}
        combined = session and self.active
        lifetime = Decimal(parameters.lifetime) if combined else Decimal(1)
        categories = {n: multiply(lifetime, v) for n, v in self._lifetime_category.items()}
        if combined:
            for name, count in self.recent.items():
                gain = multiply(Decimal(parameters.session), Decimal(count))
                categories[name] = _EXACT.add(categories.get(name, Decimal(0)), gain)
        brands = {n: multiply(lifetime, v) for n, v in self._lifetime_brand.items()}
        tiers = {n: multiply(lifetime, v) for n, v in self._lifetime_tier.items()}
        values = [*categories.values(), *brands.values(), *tiers.values()]
        self._digits = max([SCORE_DIGITS, *(-_exponent(value) for value in values)])
        self._categories = {n: self._scaled(v) for n, v in categories.items()}
        self.brand_bonus = {n: self._scaled(v) for n, v in brands.items()}
        self._tiers = {n: self._scaled(v) for n, v in tiers.items()}
        self.unit: int = 10 ** (self._digits - SCORE_DIGITS)

    def group_score(self, category: str | None, tier: str | None) -> int:
        """Return the score of an item of this category and tier, of a brand unknown to the user."""
        return _of(self._categories, category, 0) + _of(self._tiers, tier, 0)

    def group_scores(self, groups: Sequence[tuple[str | None, str | None]]) -> list[int]:
        """Return the `group_score` of many groups."""
        categories, tiers = self._categories.get, self._tiers.get
        return [categories(category, 0) + tiers(tier, 0) for category, tier in groups]  # type: ignore[arg-type]

    def rounded(self, score: int) -> int:
        """Round a score to 6 places, halves away from zero, as SQL does."""
        half = self.unit // 2
        return (score + half) // self.unit if score >= 0 else -((half - score) // self.unit)

    def ranked(self, row: Row, *, explain: bool) -> RankedItem:
        item_id, title, category, brand, price = row
        tier = price_tier(price)
        zero = Decimal(0)
        lifetime = _of(self._lifetime_category, category, zero)
        lifetime = _EXACT.add(lifetime, _of(self._lifetime_brand, brand, zero))
        lifetime = _EXACT.add(lifetime, _of(self._lifetime_tier, tier, zero))
        combined = None
        if self._session:
            score = self.group_score(category, tier) + _of(self.brand_bonus, brand, 0)
            combined = Decimal(self.rounded(score)).scaleb(-SCORE_DIGITS)
        components = None
        if explain:
            components = Components(
                category_affinity=_of(self.categories, category, zero),
                brand_affinity=_of(self.brands, brand, zero),
                conversion_rate=_of(self.tiers, tier, zero),
                session_interactions=_of(self.recent, category, 0),
            )
        return RankedItem(
            item_id=item_id,
            title=title,
            category=category,
            brand=brand,
            price=price,
            price_tier=tier,
            personalization_score=_round(lifetime),
            combined_personalization_score=combined,
            components=components,
        )

    def _scaled(self, value: Decimal) -> int:
        return int(_EXACT.scaleb(value, self._digits))


def _of(values: dict[str, V], name: str | None, default: V) -> V:
    return default if name is None else values.get(name, default)


def _round(value: Decimal) -> Decimal:
    return value.quantize(Decimal(1).scaleb(-SCORE_DIGITS), rounding="ROUND_HALF_UP", context=_EXACT)


def _exponent(value: Decimal) -> int:
    return cast(int, value.as_tuple().exponent)


def _gathered(positions: Iterable[int], codes: array[int], count: int) -> list[array[int]]:
    """Group positions by their code, 0 … count - 1, each group in the given order.

    `sorted` by code would return the same, but would not let other threads run in the meantime, so that
    requests waited for as long as a refresh sorted: 0.4 s with a million items.
    """
    found = [array("I") for _ in range(count)]
    for position in positions:
        found[codes[position]].append(position)
    return found


def _bucket(item_id: str) -> str:
    return hashlib.md5(item_id.encode(), usedforsecurity=False).hexdigest()[:BUCKET_CHARACTERS]
