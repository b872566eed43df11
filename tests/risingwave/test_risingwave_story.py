"""The whole story on a real RisingWave: deploy, events in, every relation equal to the oracle, deploy again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from batch_plans import Explained, read_whole
from risingwave_server import NO_SERVER, PROJECT, URL, database
from shipped import REGISTRY

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)


@pytest.fixture(scope="module")
def risingwave() -> Iterator[EngineConfiguration]:
    """An empty database of the server, dropped afterwards."""
    with database() as engine:
        yield engine


@pytest.fixture(scope="module")
def deployed(risingwave: EngineConfiguration, tmp_path_factory: pytest.TempPathFactory) -> Dbt:
    """The project, deployed; what reads the rolling views for DynamoDB is the publisher."""
    environment = {"PREFS_PUBLISH": "publisher", "PREFS_KAFKA_BOOTSTRAP": ""}
    dbt = Dbt(risingwave, PROJECT, tmp_path_factory.mktemp("target"), environment)
    results = dbt.run("run")
    assert [f"{result.name}: {result.message}" for result in results if not result.ok] == []
    return dbt


def stream(now: int) -> list[Any]:
    """Messages over 40 days before `now` (microseconds): good, repeated, late, wrong and unreadable ones."""
    from oracle import DAY, Message
    from relations import instant

    chance = random.Random(20260315)
    made = []
    for place in range(400):
        topic = chance.choice(["user.events", "view_events", "content_interactions", "items"])
        at = instant(now - chance.randrange(40 * DAY)).isoformat()
        at = chance.choice(
            [at, at.replace("+00:00", "Z"), at.replace("T", " ").replace("+00:00", " UTC"), "x", at]
        )
        body: dict[str, Any] = {
            "event_id": f"e{chance.randrange(120)}", "user_id": f"u{chance.randrange(4)}",
            "viewer_id": chance.choice([-1, 0, 1, 2, 3, "4", "5.0", None, 2**70]), "item_id": f"i{chance.randrange(5)}",
            "event_time": at, "watched_at": at, "event_ts": at, "content_id": f"c{chance.randrange(9)}",
            "category": chance.choice(["A", "B", "C", "", None]), "brand": chance.choice(["X", "Y", ""]),
            "price": chance.choice([None, 0, 24.99, 25, "99.99", 100, 500, -1, "free"]),
            "genre": chance.choice(["drama", "Drama", "Ä", "crime", "sci|fi", "z", None]),
            "watch_duration_sec": chance.choice([0, 1, 59, 61, 3600, -5, None]),
            "completion_pct": chance.choice([0, 0.899999, 0.9, "0.90", 1, 1.5, None]),
            "in_stock": chance.choice([True, False]),
        }  # fmt: skip
        if topic == "content_interactions":
            body["event_type"] = chance.choice(["like", "share", "search", "shout"])
        else:
            body["event_type"] = chance.choice(
                ["view", "view", "purchase", "wishlist", "add_to_cart", "cart"]
            )
        data = chance.choice([json.dumps(body).encode()] * 9 + [b"{", b"\xff\xfe", b"42", b"[]", b""])
        arrived = now - chance.randrange(10) * 1_000_000
        # History, and what Kafka told, of which only the second replaces the other's reference data.
        source = "kafka:test" if topic == "items" and place % 3 == 0 else "test"
        made.append(Message(topic, source, place % 2, place, data, None, arrived))
    return made


def canaries(now: int) -> list[Any]:
    """Canaries of every topic: proven, of another deployment, forged, under a foreign id, and without a proof."""
    from oracle import CANARY_KEYS, DAY, Message, canary_id

    ((deployment, secret),) = CANARY_KEYS.items()
    made = []
    for place in range(60):
        at = (now - place * DAY // 4) // 1000
        identity = [
            canary_id(deployment, secret, at), canary_id("f" * 16, secret, at), canary_id(deployment, "0" * 64, at),
            canary_id(deployment, secret, at + 1), f"canary-{at}",
        ][place % 5]  # fmt: skip
        stranger = place % 7 == 0
        body = {
            "event_id": identity, "viewer_id": -5 if stranger else -1, "user_id": "u1" if stranger else "canary:prefs",
            "event_time": at, "watched_at": at, "event_ts": at, "category": "A", "watch_duration_sec": 60,
        }  # fmt: skip
        for topic, kind in (
            ("user.events", "purchase"),
            ("view_events", ""),
            ("content_interactions", "search"),
        ):
            data = json.dumps({**body, "event_type": kind}).encode()
            made.append(Message(topic, "canaries", 0, place, data, None, now))
    return made


def test_events_come_out_as_the_oracle_says_and_a_second_run_is_a_no_op(
    risingwave: EngineConfiguration, deployed: Dbt
) -> None:
    from oracle import Oracle, micros
    from relations import differences, insert_canary_keys, insert_events

    with risingwave.connect() as connection:
        row = connection.execute("select now()").fetchone()
        assert row is not None
        messages = stream(micros(row[0])) + canaries(micros(row[0]))
        # One wait for the next barrier at the end instead of one for every row.
        connection.execute("set rw_implicit_flush to false")
        insert_events(connection, messages)
        connection.execute("flush")
        # Canaries that arrived before their key are judged again when it comes.
        assert connection.execute("select * from view_events where viewer_id < 0").fetchall() == []
        insert_canary_keys(connection)
        connection.execute("flush")
        oracle = Oracle(messages, micros(row[0]))
        assert len(oracle.watch) > 20
        assert {event["viewer_id"] for event in oracle.watch} > {-1}
        reasons = {one["reason"] for one in oracle.rejected()}
        reserved = {"reserved viewer_id", "reserved user_id", "reserved event_id"}
        assert reasons > reserved | {"canary of another deployment"}
        wrong = differences(connection, oracle)
        # Read at another moment than the oracle's, its values are smaller by the seconds in between.
        wrong.pop("user_category_affinity_now", None)
        assert wrong == {}
        before = connection.execute(
            "select id, name, definition from rw_catalog.rw_relations order by id"
        ).fetchall()
    again = deployed.run("run")
    assert [result.message for result in again if not result.ok] == []
    models = [result for result in again if result.unique_id.startswith("model.")]
    assert len(models) > 30
    assert [result.name for result in models if not result.message.lower().startswith("skip")] == []
    with risingwave.connect() as connection:
        after = connection.execute(
            "select id, name, definition from rw_catalog.rw_relations order by id"
        ).fetchall()
    assert after == before


def test_what_people_and_services_ask_is_answered(risingwave: EngineConfiguration, deployed: Dbt) -> None:
    """The statements of freshness, ranking and rejected messages, which RisingWave reads in its own way."""
    from datetime import UTC, datetime

    from dagster_prefs.events.rejected import rejected_counts
    from dagster_prefs.freshness.measures import measure_views
    from dagster_prefs.serving import ShopClient

    now = datetime.now(UTC)
    with ShopClient(risingwave) as client:
        ranking = client.rank("u1", limit=5, session=True, now=now)
    with risingwave.connect() as connection:
        items = connection.execute("select item_id from items").fetchall()
        rejected = connection.execute("select count(*) from rejected_events").fetchone()
    assert {item.item_id for item in ranking} <= {item for (item,) in items}
    assert ranking
    counted = rejected_counts(risingwave)
    assert rejected == (sum(sum(reasons.values()) for reasons in counted.values()),)
    measures = measure_views(risingwave, REGISTRY, now=now)
    assert [f"{measure.name}: {measure.reason}" for measure in measures if measure.level == "unknown"] == []


def test_a_look_at_freshness_reads_no_relation_whole(
    risingwave: EngineConfiguration, deployed: Dbt, aws_endpoint: str
) -> None:
    """Else it would cost more with every viewer; what is kept is what the server itself plans for each query."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from dagster_prefs.declarations.contract import load_contract
    from dagster_prefs.dynamodb.store import domain_stores
    from dagster_prefs.dynamodb.tables import dynamodb_client, provision
    from dagster_prefs.freshness.canary import canary_views, read_views
    from dagster_prefs.freshness.measures import measure_online, measure_views

    contract = load_contract(PROJECT)
    client = dynamodb_client(aws_endpoint, "eu-central-1")
    tables = provision(client, contract)
    engine = Explained(**asdict(risingwave))
    now = datetime.now(UTC)
    read_views(engine, REGISTRY, canary_views(REGISTRY))
    measures = measure_views(engine, REGISTRY, now=now)
    measures += measure_online(
        contract,
        lambda: domain_stores(engine, client, contract, tables),
        now=now,
        publishes=False,
        wait=lambda seconds: None,
    )
    assert {measure.level for measure in measures if measure.level == "unknown"} == set()
    assert len(engine.plans) > 30
    whole = {query: read_whole(plan) for query, plan in engine.plans.items()}
    assert {query: names for query, names in whole.items() if names} == {}
    with engine.connect() as connection:
        connection.execute("select max(price) from user_events")
    assert read_whole(engine.plans["select max(price) from user_events"]) == {"user_events"}
