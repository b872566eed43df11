"""Shop user profiles and rankings, read over the Postgres wire from either engine."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, get_args, overload

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Entity, Key, Registry
from dagster_prefs.declarations.reserved import PREFIX, is_reserved_text
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import id_text
from dagster_prefs.serving.observing import Observer, attempting, reading
from dagster_prefs.serving.pool import TURN, Connection, ConnectionPool, T

TOP_CATEGORIES = 5
TOP_RECENT_CATEGORIES = 3
MAX_LIMIT = 10_000
# Entries per list of a profile, because a user may have interacted with thousands of categories.
DEFAULT_PROFILE_LIMIT = 100
MAX_PROFILE_LIMIT = 1_000

# Ascending; a price belongs to the first tier whose bound it is below, as in dbt's variable `price_tiers`.
PRICE_TIERS: tuple[tuple[str, Decimal | None], ...] = (
    ("budget", Decimal(25)),
    ("mid-range", Decimal(100)),
    ("premium", Decimal(500)),
    ("luxury", None),
)
# Whom rankings are for, the preference views that a profile and a ranking read, and the relation of the ranked items.
USER = Key("user_id", "text")
CATEGORIES, BRANDS = "user_category_profile", "user_brand_profile"
TIERS, RECENT = "user_price_sensitivity", "user_recent_activity"
ITEMS = "items"
TIER_LEVELS = {name: level for level, (name, _) in enumerate(PRICE_TIERS)}

# Whose reads these are, as an observer is told.
ENTITY = "user"

# A customer with at least this many purchases of a brand counts as loyal.
LOYAL_PURCHASES = 2
# Interest in a category counts as broad from this many different items on.
BROAD_ITEMS = 5


class PreferenceError(PrefsError):
    """A preference read has invalid arguments, or its relations do not exist."""


class PreferencesUnavailable(PreferenceError):
    """The relations of a preference read do not exist, or the engine refused to read them."""


@dataclass(frozen=True, slots=True)
class RankingParameters:
    """Weights and windows of the ranking.

    lifetime = category·category affinity + brand·brand affinity + price_tier·(100·the tier's conversion rate)
    combined = session·interactions of the session in the category + lifetime·lifetime

    The session is the activity of the last `session_hours`. A session that is shorter than
    `min_session_seconds` from its first to its last event does not count, and the ranking uses the lifetime
    score alone.
    """

    category: Decimal = Decimal("0.4")
    brand: Decimal = Decimal("0.3")
    price_tier: Decimal = Decimal("0.3")
    session: Decimal = Decimal("0.6")
    lifetime: Decimal = Decimal("0.4")
    session_hours: Decimal = Decimal(3)
    min_session_seconds: int = 300

    def __post_init__(self) -> None:
        for name in ("category", "brand", "price_tier", "session", "lifetime", "session_hours"):
            value = getattr(self, name)
            if not isinstance(value, Decimal | int) or isinstance(value, bool) or not value >= 0:
                raise PreferenceError(f"{name} must be a Decimal or int of at least 0, not {value!r}")
        if not isinstance(self.min_session_seconds, int) or self.min_session_seconds < 0:
            raise PreferenceError(
                f"min_session_seconds must be an int of at least 0, not {self.min_session_seconds!r}"
            )


@dataclass(frozen=True, slots=True)
class CategoryInterest:
    """A user's interest in one category."""

    category: str
    affinity_score: Decimal
    unique_items_interacted: int
    last_engaged_at: datetime

    @property
    def breadth(self) -> Literal["focused", "broad"]:
        """`broad` from 5 different items on, else `focused`."""
        return "broad" if self.unique_items_interacted >= BROAD_ITEMS else "focused"


@dataclass(frozen=True, slots=True)
class BrandInterest:
    """A user's interest in one brand."""

    brand: str
    brand_affinity: Decimal
    purchase_count: int
    last_brand_interaction: datetime

    @property
    def standing(self) -> Literal["interested", "loyal"]:
        """`loyal` from 2 purchases on, else `interested`."""
        return "loyal" if self.purchase_count >= LOYAL_PURCHASES else "interested"


@dataclass(frozen=True, slots=True)
class TierBehaviour:
    """Views and purchases in one price tier; the rate is None without views."""

    price_tier: str
    views: int
    purchases: int
    conversion_rate: Decimal | None


@dataclass(frozen=True, slots=True)
class SessionActivity:
    """A user's activity in one category within the session window."""

    category: str
    interactions: int
    first_event_at: datetime
    last_event_at: datetime


Interest = CategoryInterest | BrandInterest | SessionActivity
ProfileList = Literal["categories", "brands", "recent"]
PROFILE_LISTS: tuple[ProfileList, ...] = get_args(ProfileList)


@dataclass(frozen=True, slots=True)
class Cursors:
    """The cursor behind each list of a profile, for `ShopClient.get_more`; None if the list is complete."""

    categories: str | None = None
    brands: str | None = None
    recent: str | None = None


@dataclass(frozen=True, slots=True)
class ProfilePage:
    """One further page of a list of a profile; `next` is the cursor of the following page or None."""

    user_id: str
    entries: tuple[Interest, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class ShopUserProfile:
    """A shop user's preference profile. All lists are empty for a user without events.

    The lists are ordered, strongest first, and complete unless the read had a limit: `next` holds the cursors
    of the following pages. `recent` is the session window by category.
    """

    user_id: str
    top_categories: tuple[str, ...]
    preferred_price_tier: str | None
    recent_session_categories: tuple[str, ...]
    categories: tuple[CategoryInterest, ...]
    brands: tuple[BrandInterest, ...]
    price_tiers: tuple[TierBehaviour, ...]
    recent: tuple[SessionActivity, ...]
    next: Cursors = Cursors()

    @property
    def known(self) -> bool:
        """Whether the user has any data."""
        return bool(self.categories or self.brands or self.price_tiers or self.recent)

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Components:
    """The unweighted components of an item's score."""

    category_affinity: Decimal
    brand_affinity: Decimal
    conversion_rate: Decimal
    session_interactions: int


@dataclass(frozen=True, slots=True)
class RankedItem:
    """One item of a ranking; scores are rounded to 6 places.

    `combined_personalization_score` is None in a ranking without session; `components` is None unless the
    ranking was requested with `explain`.
    """

    item_id: str
    title: str | None
    category: str | None
    brand: str | None
    price: Decimal | None
    price_tier: str | None
    personalization_score: Decimal
    combined_personalization_score: Decimal | None
    components: Components | None = None

    @property
    def score(self) -> Decimal:
        """The score that determines the order of the ranking."""
        combined = self.combined_personalization_score
        return self.personalization_score if combined is None else combined

    def as_dict(self) -> dict[str, Any]:
        """Return the item as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[RankedItem]):
    """The best items for a user, best first, as a sequence.

    `session_active` says whether the session counted; `session_seconds` is the time from its first to its
    last event, None without activity.
    """

    user_id: str
    items: tuple[RankedItem, ...]
    session_active: bool
    session_seconds: Decimal | None
    parameters: RankingParameters

    @overload
    def __getitem__(self, index: int) -> RankedItem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RankedItem, ...]: ...
    def __getitem__(self, index: int | slice) -> RankedItem | tuple[RankedItem, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[RankedItem]:
        return iter(self.items)


def price_tier(price: Decimal | None) -> str | None:
    """Return the tier of a price, None for an unknown price."""
    if price is None:
        return None
    for name, below in PRICE_TIERS:
        if below is None or price < below:
            return name
    raise AssertionError("the last tier has no bound")


class ShopClient:
    """Reads the preference views, from many threads, each read in one round trip.

    Connections are pooled, statements are prepared and bounded by `statement_timeout_seconds`; a connection
    that died with the engine is replaced once per read. `observer` is told of every read, those of a CatalogueRanker
    over this client included. Use it as a context manager, or `close` it.

    All reads raise PreferenceError for invalid arguments, PreferencesUnavailable for relations that are
    missing, EngineUnavailable and EngineBusy for the engine.
    """

    def __init__(
        self,
        engine: EngineConfiguration,
        *,
        pool_size: int = 8,
        statement_timeout_seconds: float = 5.0,
        parameters: RankingParameters | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.engine = engine
        self.observer = observer
        self.parameters = parameters or RankingParameters()
        self._pool = ConnectionPool(engine, pool_size, statement_timeout_seconds)
        self._signals = _signals_statement(engine)

    def __enter__(self) -> ShopClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()

    def warm(self) -> None:
        """Open a connection ahead of the first read."""
        self._pool.warm()

    def get_user_profile(
        self, user_id: str, *, now: datetime | None = None, limit: int | None = None
    ) -> ShopUserProfile:
        """Read a user's profile at `now` (UTC; default: the clock).

        top_categories: 5 by affinity; preferred_price_tier: the tier with the best conversion rate (a tier
        without views never wins; ties go to more purchases, more views, the cheaper tier);
        recent_session_categories: 3 by interactions in the session window. Other ties go by name. Each list
        has at most `limit` entries, all if it is None; `get_more` continues at the profile's `next`.
        """
        with reading(self.observer, ENTITY, "profile") as told:
            profile = self._user_profile(user_id, now, limit)
            told.found = profile.known
            return profile

    def _user_profile(self, user_id: str, now: datetime | None, limit: int | None) -> ShopUserProfile:
        moment = checked_now(now)
        user_id = checked_user(user_id)
        if limit is None:
            return build_profile(user_id, self.signals(user_id, self.parameters, moment))
        checked_limit(limit, MAX_PROFILE_LIMIT)
        # One more row than requested tells whether there are further ones. The summaries need a few rows
        # whatever the limit.
        rows = self._fetch(
            _first_signals(self.engine, max(limit, TOP_CATEGORIES) + 1),
            {"user_id": user_id, "since": _since(self.parameters, moment), "now": moment},
        )
        with TURN:
            whole = build_profile(user_id, rows)
        cut = {name: getattr(whole, name)[:limit] for name in PROFILE_LISTS}
        more = {name: _next(name, getattr(whole, name), limit) for name in PROFILE_LISTS}
        return replace(whole, **cut, next=Cursors(**more))

    def get_more(
        self,
        user_id: str,
        name: ProfileList,
        cursor: str | None = None,
        *,
        now: datetime | None = None,
        limit: int = DEFAULT_PROFILE_LIMIT,
    ) -> ProfilePage:
        """Read one list of a user's profile from `cursor` on, or from its start if `cursor` is None.

        `cursor` is `next` of the profile or of the previous page. An entry whose rank changes between two
        reads may be on both pages or on neither.
        """
        moment = checked_now(now)
        checked_limit(limit, MAX_PROFILE_LIMIT)
        values = {"user_id": checked_user(user_id), "since": _since(self.parameters, moment), "now": moment}
        if cursor is not None:
            values["rank"], values["name"] = _read_cursor(name, cursor)
        statement = _list_statement(self.engine, name, limit + 1, after=cursor is not None)
        with reading(self.observer, ENTITY, name) as told:
            profile = build_profile(user_id, self._fetch(statement, values))
            entries = getattr(profile, name)
            told.found = bool(entries)
        return ProfilePage(user_id, entries[:limit], _next(name, entries, limit))

    def check_items(self) -> None:
        """Raise unless `items` can be read by a ranking in SQL."""
        self.run(
            lambda connection: connection.execute(
                sql.SQL("select item_id, title, category, brand, price, in_stock from {} limit 1").format(
                    _relation(self.engine, ITEMS)
                )
            ).fetchall()
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
        """Return the best `limit` items in stock for a user at `now` (UTC; default: the clock).

        Ordered by combined_personalization_score, or without `session` by personalization_score. A missing
        signal counts as 0, so an unknown user also gets a full list; ties go by item_id. The session window
        consists of whole hours of activity: each whose last event is within the window. A canary has no
        ranking.
        """
        moment = checked_now(now)
        chosen = parameters or self.parameters
        user_id = checked_user(user_id, ranking=True)
        values = {
            "user_id": user_id,
            "since": _since(chosen, moment),
            "now": moment,
            "session": session,
            "category_weight": chosen.category,
            "brand_weight": chosen.brand,
            "price_tier_weight": chosen.price_tier,
            "session_weight": chosen.session,
            "lifetime_weight": chosen.lifetime,
            "min_session_seconds": chosen.min_session_seconds,
        }
        statement = _ranking_statement(self.engine, checked_limit(limit))
        with reading(self.observer, ENTITY, "ranking") as told:
            rows = self._fetch(statement, values)
            session_active, session_seconds = rows[0][:2]
            items = tuple(
                _ranked_item(row[2:], session=session, explain=explain) for row in rows if row[2] is not None
            )
            told.found = is_personal(items)
        return Ranking(user_id, items, session and session_active, session_seconds, chosen)

    def signals(self, user_id: str, parameters: RankingParameters, now: datetime) -> list[tuple[Any, ...]]:
        """Read the user's rows of the four preference views in one round trip, for `build_profile`."""
        return self._fetch(self._signals, {"user_id": user_id, "since": _since(parameters, now), "now": now})

    def _fetch(self, statement: sql.Composed | bytes, values: dict[str, Any]) -> list[tuple[Any, ...]]:
        def read(connection: Connection) -> list[tuple[Any, ...]]:
            answer = connection.execute(statement, values, prepare=True)
            with TURN:
                return answer.fetchall()

        return self.run(read)

    def run(self, read: Callable[[Connection], T]) -> T:
        """Call `read` with a pooled connection, and translate errors into those of this client."""
        try:
            return self._pool.run(attempting(read, "select"))
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
            raise PreferencesUnavailable(
                f"{error.diag.message_primary or 'a relation is missing'}: run `dbt build`, "
                f"or check the schema {self.engine.schema}"
            ) from None
        except psycopg.Error as error:
            text = " ".join(str(error).split())
            if "not found" in text.lower():
                # RisingWave has one error code for everything that its binder cannot resolve.
                raise PreferencesUnavailable(
                    f"{text}: run `dbt build`, or check the schema {self.engine.schema}"
                ) from None
            raise PreferencesUnavailable(f"the engine refused the read: {text}") from error


def ranked_entity(registry: Registry) -> Entity | None:
    """Return the entity whose ids a project's relations can rank items for, None if it lacks one of them."""
    views = [registry.preferences.get(name) for name in (CATEGORIES, BRANDS, TIERS, RECENT)]
    entities = {view.entity if view else None for view in views}
    if len(entities) != 1 or not any(topic.relation == ITEMS for topic in registry.topics.values()):
        return None
    entity = registry.entities.get(entities.pop() or "")
    return entity if entity is not None and entity.keys == (USER,) else None


def is_personal(items: Sequence[RankedItem]) -> bool:
    """Whether anything that is known of the user counts in a ranking; else it is what everybody new gets."""
    return bool(items) and items[0].score > 0


def build_profile(user_id: str, rows: Sequence[tuple[Any, ...]]) -> ShopUserProfile:
    """Build a profile from the rows of `ShopClient.signals`."""
    categories = [CategoryInterest(r[1], r[2], r[3], r[6]) for r in rows if r[0] == "category"]
    brands = [BrandInterest(r[1], r[2], r[3], r[6]) for r in rows if r[0] == "brand"]
    tiers = [TierBehaviour(r[1], r[3], r[4], r[2]) for r in rows if r[0] == "tier"]
    recent = [SessionActivity(r[1], r[3], r[5], r[6]) for r in rows if r[0] == "recent"]
    categories.sort(key=lambda entry: (-entry.affinity_score, entry.category))
    brands.sort(key=lambda entry: (-entry.brand_affinity, entry.brand))
    recent.sort(key=lambda entry: (-entry.interactions, entry.category))
    tiers.sort(
        key=lambda entry: (
            entry.conversion_rate is None,
            -(entry.conversion_rate or 0),
            -entry.purchases,
            -entry.views,
            TIER_LEVELS.get(entry.price_tier, len(TIER_LEVELS)),
        )
    )
    return ShopUserProfile(
        user_id=user_id,
        top_categories=tuple(entry.category for entry in categories[:TOP_CATEGORIES]),
        preferred_price_tier=tiers[0].price_tier if tiers and tiers[0].conversion_rate is not None else None,
        recent_session_categories=tuple(entry.category for entry in recent[:TOP_RECENT_CATEGORIES]),
        categories=tuple(categories),
        brands=tuple(brands),
        price_tiers=tuple(tiers),
        recent=tuple(recent),
    )


def checked_user(user_id: str, *, ranking: bool = False) -> str:
    """Return the user id as the events spell it. Raises PreferenceError naming the rule that it breaks."""
    if not isinstance(user_id, str):
        raise PreferenceError(f"a user id must be a text, not {excerpt(user_id)}")
    text = id_text(user_id)
    if text is None or "\x00" in text:
        raise PreferenceError(
            f"a user id must be a text of at least one character without NUL, not {excerpt(user_id)}"
        )
    if ranking and is_reserved_text(text):
        raise PreferenceError(
            f"{excerpt(text)} is a canary (ids that start with {PREFIX!r}), which has no ranking"
        )
    return text


def checked_limit(limit: int, most: int = MAX_LIMIT) -> int:
    """Return the limit. Raises PreferenceError naming the rule that it breaks."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most:
        raise PreferenceError(f"limit must be a whole number from 1 to {most}, not {excerpt(limit)}")
    return limit


def checked_now(now: datetime | None) -> datetime:
    """Return the moment of a read in UTC. Raises PreferenceError for a moment without time zone."""
    if now is None:
        return datetime.now(UTC)
    if now.tzinfo is None:
        raise PreferenceError(f"now must have a time zone, and {now.isoformat()} has none: add tzinfo=UTC")
    return now.astimezone(UTC)


def _since(parameters: RankingParameters, now: datetime) -> datetime:
    return now - timedelta(microseconds=int(parameters.session_hours * 3_600_000_000))


def _relation(engine: EngineConfiguration, name: str) -> sql.Identifier:
    return sql.Identifier(engine.schema, name)


# How to read the rows of a profile's lists, and the columns that rank them, highest first, then by name.
_LISTS: dict[ProfileList, tuple[str, str, str]] = {
    "categories": (
        """
        select 'category' as kind, category as name, affinity_score::numeric as amount,
            unique_items_interacted::bigint as count_a, null::bigint as count_b,
            null::timestamptz as first_at, last_engaged_at as last_at
        from {categories} where user_id = %(user_id)s::text
        """,
        "affinity_score",
        "category",
    ),
    "brands": (
        """
        select 'brand' as kind, brand as name, brand_affinity::numeric as amount,
            purchase_count::bigint as count_a, null::bigint as count_b,
            null::timestamptz as first_at, last_brand_interaction as last_at
        from {brands} where user_id = %(user_id)s::text
        """,
        "brand_affinity",
        "brand",
    ),
    "recent": (
        """
        select 'recent' as kind, category as name, null::numeric as amount,
            interactions as count_a, null::bigint as count_b, first_at, last_at
        from (
            select category, sum(recent_interactions)::bigint as interactions,
                min(first_event_at) as first_at, max(last_event_at) as last_at
            from {recent}
            where user_id = %(user_id)s::text
                and last_event_at >= %(since)s::timestamptz and first_event_at <= %(now)s::timestamptz
            group by category
        ) as session where true
        """,
        "interactions",
        "category",
    ),
}
_TIERS = """
    select 'tier' as kind, price_tier as name, conversion_rate::numeric as amount,
        views::bigint as count_a, purchases::bigint as count_b,
        null::timestamptz as first_at, null::timestamptz as last_at
    from {tiers} where user_id = %(user_id)s::text
    """


def _signals_statement(engine: EngineConfiguration, limit: int | None = None) -> sql.Composed:
    """Build the query for a profile's rows: per list up to `limit` and ordered, or all and unordered."""
    if limit is None:
        parts = [_selected(engine, text) for text in (*(text for text, *_ in _LISTS.values()), _TIERS)]
        return sql.SQL(" union all ").join(parts)
    lists = [
        sql.SQL("{} as ({})").format(
            sql.Identifier(f"first_{name}"), _list_statement(engine, name, limit, after=False)
        )
        for name in PROFILE_LISTS
    ]
    reads = [sql.SQL("select * from {}").format(sql.Identifier(f"first_{name}")) for name in PROFILE_LISTS]
    return sql.SQL("with {}, tiers as ({}) {} union all select * from tiers").format(
        sql.SQL(", ").join(lists), _selected(engine, _TIERS), sql.SQL(" union all ").join(reads)
    )


# Building the statement takes a third of a read's time, and most callers use the same limit.
@lru_cache(maxsize=64)
def _first_signals(engine: EngineConfiguration, limit: int) -> bytes:
    return _signals_statement(engine, limit).as_bytes(None)


def _list_statement(
    engine: EngineConfiguration, name: ProfileList, limit: int, *, after: bool
) -> sql.Composed:
    text, rank, label = _LISTS[name]
    columns = {
        "rank": sql.Identifier(rank),
        "label": sql.Identifier(label),
        "collation": _collation(engine),
        "limit": sql.Literal(limit),
    }
    condition = """
        and ({rank} < %(rank)s::numeric
            or ({rank} = %(rank)s::numeric and {label} {collation} > %(name)s::text {collation}))
        """
    order = " order by {rank} desc, {label} {collation} limit {limit}"
    return _selected(engine, text) + sql.SQL((condition if after else "") + order).format(**columns)


def _selected(engine: EngineConfiguration, text: str) -> sql.Composed:
    return sql.SQL(text).format(
        categories=_relation(engine, CATEGORIES),
        brands=_relation(engine, BRANDS),
        tiers=_relation(engine, TIERS),
        recent=_relation(engine, RECENT),
    )


def _collation(engine: EngineConfiguration) -> sql.SQL:
    # RisingWave orders texts by their bytes and has no collations.
    return sql.SQL('collate "C"' if engine.kind == "local" else "")


def _next(name: ProfileList, entries: Sequence[Interest], limit: int) -> str | None:
    """Return the cursor behind the first `limit` entries, None if there are no more."""
    if len(entries) <= limit:
        return None
    rank, label = _position(entries[limit - 1])
    text = json.dumps([name, format(rank, "f"), label], separators=(",", ":"), ensure_ascii=False)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _position(entry: Interest) -> tuple[Decimal, str]:
    if isinstance(entry, CategoryInterest):
        return Decimal(entry.affinity_score), entry.category
    if isinstance(entry, BrandInterest):
        return Decimal(entry.brand_affinity), entry.brand
    return Decimal(entry.interactions), entry.category


def _read_cursor(name: ProfileList, cursor: str) -> tuple[Decimal, str]:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        of, rank, label = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if of == name and re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,40})?", rank) and "\x00" not in label:
            label.encode()
            return Decimal(rank), label
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise PreferenceError(
        f"cursor is {excerpt(cursor)}, which is not the cursor of a page of {name}: give `next` of the previous page"
    )


def _ranking_statement(engine: EngineConfiguration, limit: int) -> sql.Composed:
    cases = [
        sql.SQL("when price < {} then {}").format(sql.Literal(below), sql.Literal(name))
        for name, below in PRICE_TIERS
        if below is not None
    ]
    tier = sql.SQL("case when price is null then null {} else {} end").format(
        sql.SQL(" ").join(cases), sql.Literal(PRICE_TIERS[-1][0])
    )
    return sql.SQL(
        """
        with recent as (
            select category, recent_interactions, first_event_at, last_event_at
            from {recent}
            where user_id = %(user_id)s::text
                and last_event_at >= %(since)s::timestamptz and first_event_at <= %(now)s::timestamptz
        ),
        span as (
            select extract(epoch from max(last_event_at) - min(first_event_at))::numeric as seconds
            from recent
        ),
        activity as (
            select seconds, coalesce(seconds >= %(min_session_seconds)s::numeric, false) as active from span
        ),
        sessions as (
            select category, sum(recent_interactions)::numeric as interactions from recent group by category
        ),
        catalogue as (
            select item_id, title, category, brand, price, {tier} as price_tier from {items} where in_stock
        ),
        signals as (
            select i.item_id, i.title, i.category, i.brand, i.price, i.price_tier,
                coalesce(c.affinity_score, 0)::numeric as category_affinity,
                coalesce(b.brand_affinity, 0)::numeric as brand_affinity,
                coalesce(t.conversion_rate, 0)::numeric as conversion_rate,
                coalesce(s.interactions, 0)::numeric as interactions
            from catalogue as i
            left join {categories} as c on c.category = i.category and c.user_id = %(user_id)s::text
            left join {brands} as b on b.brand = i.brand and b.user_id = %(user_id)s::text
            left join {tiers} as t on t.price_tier = i.price_tier and t.user_id = %(user_id)s::text
            left join sessions as s on s.category = i.category
        ),
        lifetimes as (
            select signals.*,
                %(category_weight)s::numeric * category_affinity
                + %(brand_weight)s::numeric * brand_affinity
                + %(price_tier_weight)s::numeric * 100 * conversion_rate as lifetime
            from signals
        ),
        scored as (
            select l.*,
                round(l.lifetime, 6) as personalization_score,
                round(
                    case when a.active then
                        %(session_weight)s::numeric * l.interactions
                        + %(lifetime_weight)s::numeric * l.lifetime
                    else l.lifetime end, 6
                ) as combined_personalization_score
            from lifetimes as l cross join activity as a
        ),
        best as (
            select * from scored
            order by
                case when %(session)s::boolean then combined_personalization_score
                    else personalization_score end desc,
                item_id {collation}
            limit {limit}
        )
        select a.active, a.seconds, b.item_id, b.title, b.category, b.brand, b.price, b.price_tier,
            b.personalization_score, b.combined_personalization_score,
            b.category_affinity, b.brand_affinity, b.conversion_rate, b.interactions::bigint
        from activity as a left join best as b on true
        order by
            case when %(session)s::boolean then b.combined_personalization_score
                else b.personalization_score end desc,
            b.item_id {collation}
        """
    ).format(
        recent=_relation(engine, RECENT),
        categories=_relation(engine, CATEGORIES),
        brands=_relation(engine, BRANDS),
        tiers=_relation(engine, TIERS),
        items=_relation(engine, ITEMS),
        tier=tier,
        limit=sql.Literal(limit),
        collation=_collation(engine),
    )


def _ranked_item(row: Sequence[Any], *, session: bool, explain: bool) -> RankedItem:
    item_id, title, category, brand, price, tier, lifetime, combined, *parts = row
    return RankedItem(
        item_id=item_id,
        title=title,
        category=category,
        brand=brand,
        price=price,
        price_tier=tier,
        personalization_score=lifetime,
        combined_personalization_score=combined if session else None,
        components=Components(*parts) if explain else None,
    )
