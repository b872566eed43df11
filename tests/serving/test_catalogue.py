"""The in-process ranking gives the answers of the SQL, on random catalogues and through their changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_oracle import World, oracle_ranking, worlds

from dagster_prefs.serving.catalogue import CatalogueRanker
from dagster_prefs.serving.preferences import PreferenceError, RankingParameters

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)

weights = st.decimals(0, 2, places=3)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    world=worlds(NOW),
    session=st.booleans(),
    limit=st.integers(1, 12),
    parameters=st.none()
    | st.builds(
        RankingParameters,
        category=weights,
        brand=weights,
        price_tier=weights,
        session=weights,
        lifetime=weights,
        session_hours=st.sampled_from([Decimal(1), Decimal("2.5"), Decimal(5)]),
        min_session_seconds=st.integers(0, 900),
    ),
)
def test_equal_to_the_sql(
    shop: Any, world: World, session: bool, limit: int, parameters: RankingParameters | None
) -> None:
    shop.clear()
    world.load(shop)
    ranker = CatalogueRanker(shop.client)
    asked: dict[str, Any] = {"session": session, "now": NOW, "explain": True, "parameters": parameters}
    ranking = ranker.rank("u", limit, **asked)
    assert ranking == shop.client.rank("u", limit, **asked)
    if parameters is None:
        scores = [
            (item.item_id, item.combined_personalization_score if session else item.personalization_score)
            for item in ranking
        ]
        assert scores == oracle_ranking(world, "u", limit, NOW, session=session)


def test_halves_round_away_from_zero_as_in_sql(shop: Any) -> None:
    World(
        categories=(("u", "a", 1, 1, NOW), ("u", "b", 3, 1, NOW)),
        items=(("i1", None, "a", None, None, True), ("i2", None, "b", None, None, True)),
    ).load(shop)
    parameters = RankingParameters(category=Decimal("0.0000005"))
    ranking = CatalogueRanker(shop.client).rank("u", session=False, now=NOW, parameters=parameters)
    assert [item.personalization_score for item in ranking] == [Decimal("0.000002"), Decimal("0.000001")]
    assert ranking == shop.client.rank("u", session=False, now=NOW, parameters=parameters)


changes = st.lists(
    st.tuples(
        st.integers(0, 30).map(lambda number: f"item {number}"),
        st.none() | st.sampled_from(["title", "another title", "Ünïcode"]),
        st.none() | st.sampled_from(["audio", "books"]),
        st.none() | st.sampled_from(["acme", "bolt"]),
        st.none() | st.decimals(0, 900, places=2),
        st.booleans() | st.none(),
    ),
    max_size=20,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rounds=st.lists(changes, min_size=2, max_size=4))
def test_refreshing_follows_every_change(shop: Any, rounds: list[list[tuple[Any, ...]]]) -> None:
    shop.clear()
    ranker = CatalogueRanker(shop.client)
    for changed in rounds:
        for row in changed:
            shop.execute("delete from items where item_id = %s", [row[0]])
            if row[5] is not None:
                shop.insert("items", row)
        report = ranker.refresh()
        expected = shop.client.rank("u", 100, now=NOW)
        assert report.items == len(expected)
        assert ranker.rank("u", 100, now=NOW) == expected
    assert ranker.refresh().fetched_rows == 0


def test_a_refresh_fetches_only_the_buckets_that_changed(shop: Any) -> None:
    shop.execute(
        "insert into items select 'item ' || g, null, 'c', null, 1, true from generate_series(1, 3000) g"
    )
    ranker = CatalogueRanker(shop.client)
    first = ranker.refresh()
    assert (first.items, first.fetched_rows) == (3000, 3000)
    shop.execute("update items set price = 2 where item_id = 'item 77'")
    second = ranker.refresh()
    assert second.changed_buckets == 1
    assert 1 <= second.fetched_rows < 30
    shop.execute("delete from items where item_id = 'item 78'")
    assert ranker.refresh().items == 2999


def test_memory_stays_below_200_bytes_an_item(shop: Any) -> None:
    shop.execute(
        """
        insert into items
        select 'item-' || lpad(g::text, 8, '0'), 'Wireless noise cancelling headphones ' || g,
            'category ' || g % 200, 'brand ' || g % 1500, (g % 90000) / 100.0, true
        from generate_series(1, 20000) g
        """
    )
    ranker = CatalogueRanker(shop.client)
    report = ranker.refresh()
    assert report.items == 20_000
    assert report.size_bytes == ranker.size_bytes
    # The digests of the 4,096 buckets do not grow with the catalogue.
    assert report.size_bytes - 4_096 * 160 <= 200 * report.items


def test_errors_are_those_of_the_client(shop: Any) -> None:
    ranker = CatalogueRanker(shop.client)
    with pytest.raises(PreferenceError, match="limit must be"):
        ranker.rank("u", 0)
    with pytest.raises(PreferenceError, match="is a canary"):
        ranker.rank("canary:1")
    shop.execute("drop table items")
    with pytest.raises(PreferenceError, match="run `dbt build`"):
        ranker.refresh()


def test_an_old_session_window_is_empty(shop: Any) -> None:
    World(
        recent=(("u", "a", 5, NOW, NOW, NOW - timedelta(hours=9), NOW - timedelta(hours=8)),),
        items=(("i1", None, "a", None, None, True),),
    ).load(shop)
    ranking = CatalogueRanker(shop.client).rank("u", now=NOW)
    assert (ranking.session_active, ranking.session_seconds) == (False, None)
