"""Preference profiles and the ranking in SQL, against an independent computation."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlglot
import sqlglot.expressions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_oracle import World, hour, oracle_ranking, worlds

from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.errors import PrefsError
from dagster_prefs.serving.pool import EngineBusy
from dagster_prefs.serving.preferences import (
    PROFILE_LISTS,
    Cursors,
    PreferenceError,
    RankingParameters,
    ShopClient,
    _list_statement,
    _ranking_statement,
    _signals_statement,
    price_tier,
)

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


ITEMS = (
    ("i1", "one", "audio", "acme", Decimal("10"), True),
    ("i2", "two", "audio", "Bolt", Decimal("99.99"), True),
    ("i3", "three", "Books", None, Decimal("100"), True),
    ("i4", "four", None, "core", None, True),
    ("i5", "five", "Books", "acme", Decimal("500"), False),
    ("I6", "six", "cables", "core", Decimal("499.99"), True),
)


def test_profile_of_a_user(shop: Any) -> None:
    at = ago(60)
    shop.insert(
        "user_category_profile",
        *[("u", f"c{number}", score, number, at) for number, score in enumerate([5, 9, 9, 1, 7, 2, 30])],
        ("other", "elsewhere", 1000, 1, at),
    )
    shop.insert("user_brand_profile", ("u", "acme", 21, 2, at), ("u", "bolt", 50, 0, at))
    shop.insert(
        "user_price_sensitivity",
        ("u", "budget", 10, 1, Decimal("0.1")),
        ("u", "premium", 4, 2, Decimal("0.5")),
        ("u", "luxury", 0, 3, None),
    )
    shop.insert(
        "user_recent_activity",
        hour("u", "old", 99, ago(300), ago(181)),
        hour("u", "a", 1, ago(170), ago(169)),
        hour("u", "a", 3, ago(70), ago(60)),
        hour("u", "b", 9, ago(30), ago(20)),
        hour("u", "d", 4, ago(20), ago(10)),
        hour("u", "c", 2, ago(20), ago(10)),
        hour("u", "tomorrow", 50, NOW + timedelta(hours=5), NOW + timedelta(hours=5)),
    )
    profile = shop.client.get_user_profile("u", now=NOW)
    assert profile.known
    assert profile.top_categories == ("c6", "c1", "c2", "c4", "c0")
    assert profile.preferred_price_tier == "premium"
    assert profile.recent_session_categories == ("b", "a", "d")
    assert [(entry.brand, entry.standing) for entry in profile.brands] == [
        ("bolt", "interested"),
        ("acme", "loyal"),
    ]
    assert [entry.breadth for entry in profile.categories[:2]] == ["broad", "focused"]
    assert [entry.price_tier for entry in profile.price_tiers] == ["premium", "budget", "luxury"]
    assert profile.as_dict()["price_tiers"][2] == {
        "price_tier": "luxury",
        "views": 0,
        "purchases": 3,
        "conversion_rate": None,
    }


def test_an_unknown_user_is_empty_and_still_gets_a_full_stable_list(shop: Any) -> None:
    World(items=ITEMS).load(shop)
    profile = shop.client.get_user_profile("nobody", now=NOW)
    assert not profile.known
    assert (profile.top_categories, profile.preferred_price_tier, profile.recent_session_categories) == (
        (),
        None,
        (),
    )
    ranking = shop.client.rank("nobody", now=NOW)
    assert [item.item_id for item in ranking] == ["I6", "i1", "i2", "i3", "i4"]
    assert {item.combined_personalization_score for item in ranking} == {Decimal(0)}
    assert (ranking.session_active, ranking.session_seconds) == (False, None)


def test_a_tier_without_views_never_wins_and_ties_are_stable(shop: Any) -> None:
    shop.insert(
        "user_price_sensitivity",
        ("only purchases", "luxury", 0, 3, None),
        ("tie", "luxury", 2, 1, Decimal("0.5")),
        ("tie", "budget", 4, 2, Decimal("0.5")),
        ("equal", "premium", 2, 1, Decimal("0.5")),
        ("equal", "mid-range", 2, 1, Decimal("0.5")),
    )
    preferred = {
        user: shop.client.get_user_profile(user).preferred_price_tier
        for user in ("only purchases", "tie", "equal")
    }
    assert preferred == {"only purchases": None, "tie": "budget", "equal": "mid-range"}


WORLD = World(
    categories=(("u", "audio", 20, 3, NOW), ("u", "Books", 7, 1, NOW), ("v", "cables", 500, 1, NOW)),
    brands=(("u", "acme", 11, 1, NOW), ("u", "core", 3, 0, NOW)),
    tiers=(
        ("u", "budget", 3, 1, Decimal("0.333333")),
        ("u", "mid-range", 3, 0, Decimal("0")),
        ("u", "luxury", 0, 1, None),
    ),
    recent=(
        hour("u", "cables", 40, ago(50), ago(45)),
        hour("u", "Books", 2, ago(40), ago(35)),
        hour("u", "audio", 99, ago(400), ago(381)),
    ),
    items=ITEMS,
)


def test_homepage_ranking_by_hand(shop: Any) -> None:
    WORLD.load(shop)
    ranking = shop.client.rank("u", session=False, now=NOW)
    assert [(item.item_id, item.personalization_score) for item in ranking] == [
        # 0.4·20 + 0.3·11 + 0.3·33.3333
        ("i1", Decimal("21.299990")),
        ("i2", Decimal("8.000000")),
        ("i3", Decimal("2.800000")),
        ("I6", Decimal("0.900000")),
        ("i4", Decimal("0.900000")),
    ]
    assert all(item.combined_personalization_score is None for item in ranking)
    assert not ranking.session_active


def test_session_aware_ranking_by_hand(shop: Any) -> None:
    WORLD.load(shop)
    ranking = shop.client.rank("u", 2, now=NOW, explain=True)
    assert ranking.session_active
    assert ranking.session_seconds == 15 * 60
    # 0.6·40 + 0.4·0.9, then 0.4·21.29999
    assert [(item.item_id, item.combined_personalization_score) for item in ranking] == [
        ("I6", Decimal("24.360000")),
        ("i1", Decimal("8.519996")),
    ]
    components = ranking[0].components
    assert components is not None
    assert components.session_interactions == 40
    assert components.brand_affinity == 3
    assert (components.category_affinity, components.conversion_rate) == (0, 0)


@pytest.mark.parametrize(("seconds", "active"), [(299, False), (300, True)])
def test_a_session_shorter_than_five_minutes_leaves_the_lifetime_alone(
    shop: Any, seconds: int, active: bool
) -> None:
    World(
        categories=(("u", "audio", 10, 1, NOW),),
        recent=(hour("u", "Books", 9, ago(20), ago(20) + timedelta(seconds=seconds)),),
        items=ITEMS,
    ).load(shop)
    ranking = shop.client.rank("u", 1, now=NOW)
    assert ranking.session_active is active
    best = ranking[0]
    assert (best.category, best.combined_personalization_score) == (
        ("Books", Decimal("5.4")) if active else ("audio", Decimal("4"))
    )


def test_weights_and_hours_are_parameters(shop: Any) -> None:
    WORLD.load(shop)
    parameters = RankingParameters(
        category=Decimal(1),
        brand=Decimal(0),
        price_tier=Decimal(0),
        session=Decimal(1),
        lifetime=Decimal(0),
        session_hours=Decimal(7),
    )
    ranking = shop.client.rank("u", now=NOW, parameters=parameters)
    assert [(item.item_id, item.combined_personalization_score) for item in ranking[:2]] == [
        ("i1", Decimal(99)),
        ("i2", Decimal(99)),
    ]
    assert ranking[0].personalization_score == 20


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(world=worlds(NOW), session=st.booleans(), limit=st.integers(1, 12))
def test_ranking_equals_the_oracle(shop: Any, world: World, session: bool, limit: int) -> None:
    shop.clear()
    world.load(shop)
    ranking = shop.client.rank("u", limit, session=session, now=NOW)
    scores = [
        (item.item_id, item.combined_personalization_score if session else item.personalization_score)
        for item in ranking
    ]
    assert scores == oracle_ranking(world, "u", limit, NOW, session=session)


@pytest.mark.parametrize(
    ("price", "tier"),
    [
        (None, None),
        ("0", "budget"),
        ("24.99", "budget"),
        ("25", "mid-range"),
        ("99.99", "mid-range"),
        ("100", "premium"),
        ("500", "luxury"),
    ],
)
def test_tiers_in_python_are_those_in_sql(shop: Any, price: str | None, tier: str | None) -> None:
    value = None if price is None else Decimal(price)
    shop.insert("items", ("i", None, None, None, value, True))
    assert price_tier(value) == tier
    assert shop.client.rank("u", now=NOW)[0].price_tier == tier


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.rank("canary:1"), "'canary:1' is a canary"),
        (lambda client: client.rank(""), "a user id must be a text"),
        (lambda client: client.get_user_profile(5), "a user id must be a text"),
        (lambda client: client.get_user_profile("a\x00b"), "a user id must be a text"),
        (lambda client: client.rank("u", 0), "limit must be a whole number from 1 to 10000, not 0"),
        (lambda client: client.rank("u", True), "limit must be"),
        (lambda client: client.rank("u", now=datetime(2026, 1, 1)), "now must have a time zone"),
        (lambda client: RankingParameters(category=Decimal(-1)), "category must be"),
        (lambda client: RankingParameters(session_hours=0.5), "session_hours must be a Decimal"),
    ],
)
def test_impossible_arguments_are_named(shop: Any, call: Any, message: str) -> None:
    with pytest.raises(PreferenceError, match=message):
        call(shop.client)


def test_a_user_id_is_data_not_sql(shop: Any) -> None:
    World(items=ITEMS, categories=(("u' or 'x'='x", "Books", 10, 1, NOW),)).load(shop)
    assert shop.client.rank("u' or 'x'='x", 1, now=NOW)[0].item_id == "i3"


def test_missing_relations_are_one_sentence(shop: Any) -> None:
    shop.execute("drop table user_brand_profile")
    with pytest.raises(PreferenceError, match=r"user_brand_profile.* does not exist: run `dbt build`"):
        shop.client.rank("u")


@pytest.mark.parametrize("kind", ["local", "risingwave"])
def test_statements_are_in_the_dialect_of_the_engine(kind: str) -> None:
    engine = EngineConfiguration("127.0.0.1", 1, "dev", "root", schema="shop", kind=kind)  # type: ignore[arg-type]
    dialect = "risingwave" if kind == "risingwave" else "postgres"
    for statement in (
        _ranking_statement(engine, 50),
        _signals_statement(engine),
        _signals_statement(engine, 101),
        *(
            _list_statement(engine, name, 101, after=after)
            for name in PROFILE_LISTS
            for after in (True, False)
        ),
    ):
        text = re.sub(r"%\((\w+)\)s", r"$1", statement.as_string(None))
        (parsed,) = sqlglot.parse(text, dialect=dialect)
        assert parsed is not None
        # RisingWave has no collations; PostgreSQL needs one to order by bytes as RisingWave does.
        assert bool(list(parsed.find_all(sqlglot.exp.Collate))) == (kind == "local" and "order by" in text)
        assert {table.db for table in parsed.find_all(sqlglot.exp.Table) if table.db} == {"shop"}


NAMES = [
    "a",
    "B",
    "Z",
    "ä",
    "Ä",
    "ß",
    "é",
    "e\u0301",
    "\U0001f600",
    "\uffff",
    " a",
    "a b",
    '"',
    "'",
    "\\",
    "%s",
    "a" * 500,
]


@pytest.mark.parametrize("limit", [1, 2, 5, 16, 1000])
def test_pages_are_the_profile(shop: Any, limit: int) -> None:
    """Whatever the names, and where all ranks are equal: every entry once, in the order of the whole."""
    for number, name in enumerate(NAMES):
        shop.insert("user_category_profile", ("u", name, number % 3 - 1, 1, ago(60)))
        shop.insert("user_brand_profile", ("u", name, 7, 1, ago(60)))
        shop.insert("user_recent_activity", hour("u", name, number % 2, ago(70), ago(60)))
    whole = shop.client.get_user_profile("u", now=NOW)
    assert whole.next == Cursors()
    first = shop.client.get_user_profile("u", now=NOW, limit=limit)
    for summary in ("top_categories", "preferred_price_tier", "recent_session_categories", "price_tiers"):
        assert getattr(first, summary) == getattr(whole, summary)
    for name in PROFILE_LISTS:
        entries, cursor = getattr(first, name), getattr(first.next, name)
        assert len(entries) == min(limit, len(NAMES))
        while cursor is not None:
            page = shop.client.get_more("u", name, cursor, now=NOW, limit=limit)
            entries, cursor = entries + page.entries, page.next
        assert entries == getattr(whole, name)
    assert shop.client.get_more("nobody", "brands").entries == ()


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", "W10", "bnVsbA", "WyJicmFuZHMiLCIxZTk5OSIsIngiXQ", "=" * 9, "W" * 9999]
)
def test_a_cursor_that_nobody_gave_is_refused(cursor: str) -> None:
    with ShopClient(EngineConfiguration("127.0.0.1", 1, "d", "u")) as client:
        with pytest.raises(
            PreferenceError, match="which is not the cursor of a page of brands: give `next`"
        ) as caught:
            client.get_more("u", "brands", cursor)
        assert len(str(caught.value)) < 250
        with pytest.raises(PreferenceError, match="limit must be a whole number from 1 to 1000"):
            client.get_user_profile("u", limit=1001)


def test_an_empty_catalogue_ranks_nothing(shop: Any) -> None:
    assert len(shop.client.rank("u", now=NOW)) == 0


def test_connections_that_died_are_replaced(shop: Any) -> None:
    World(items=ITEMS).load(shop)
    assert len(shop.client.rank("u")) == 5
    shop.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where query like %s and pid <> pg_backend_pid() and datname = current_database()",
        [f"%{shop.engine.schema}%"],
    )
    assert len(shop.client.rank("u")) == 5


def test_a_rebuilt_relation_does_not_break_prepared_statements(shop: Any) -> None:
    World(items=ITEMS).load(shop)
    assert len(shop.client.rank("u")) == 5
    shop.execute("alter table items alter column title type varchar")
    shop.execute("alter table user_category_profile alter column category type varchar")
    assert len(shop.client.rank("u")) == 5
    assert shop.client.get_user_profile("u").top_categories == ()


def test_a_slow_statement_is_stopped(shop: Any) -> None:
    World(items=ITEMS).load(shop)
    with (
        ShopClient(shop.engine, statement_timeout_seconds=0.05) as hasty,
        shop.engine.connect(autocommit=False) as blocker,
    ):
        blocker.execute("lock table items in access exclusive mode")
        with pytest.raises(EngineBusy, match=r"did not answer within 0\.05 s"):
            hasty.rank("u")
        blocker.rollback()
        assert len(hasty.rank("u")) == 5


def test_an_engine_that_is_away_is_one_sentence(shop: Any) -> None:
    with (
        ShopClient(replace(shop.engine, port=1)) as client,
        pytest.raises(EngineUnavailable, match="cannot be reached"),
    ):
        client.rank("u")


def test_a_closed_client_says_so(shop: Any) -> None:
    shop.client.close()
    with pytest.raises(PrefsError, match="this client is closed"):
        shop.client.rank("u")
