"""Whatever a message holds, everything goes on for everybody: refresh, publish and export."""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from declared import PROJECT
from oracle import HOUR, SECOND, TOPICS, Message, Oracle, parse
from relations import differences, insert_events, instant, materialized_views, refresh
from shipped import TILE_TABLES
from streams import NOW

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days

rng = random.Random(20261128)
# About a gigabyte as text, and 81 KB in a message.
GIGABYTE = b"[" + b",".join([b"1e131071"] * 9_000) + b"]"


def letters(size: int) -> str:
    """Text that no index can compress."""
    return "".join(rng.choices(string.ascii_letters + string.digits, k=size))


def hostile() -> list[bytes]:
    """Values as JSON: of every type, size and magnitude that a field may be given."""
    texts = [
        *(letters(size) for size in (256, 257, 1024, 1025, 2703, 8192, 300_000)),
        *("日" * 341, "😀" * 256, "\x1b]0;x\x07", "\x7f\x01\x02", "\u202e\u2028\ufeff"),
        *("'; drop table raw_items; --", "{{ x }}", "%s%(a)s"),
        *("1e131071", "9" * 5_000, "-" + "9" * 30, "0." + "0" * 9_000 + "1", "1e999", "1e-999"),
        *("Infinity", "NaN", "-0", "9223372036854775808", "epoch", "infinity"),
        *("9999-12-31T23:59:59.999999Z", "0000-00-00T00:00:00Z", "294276-12-31T23:59:59Z"),
        *("2000-01-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-03-10T00:00:00." + "9" * 3_000 + "Z"),
    ]
    numbers = [
        *(b"1e131071", b"-1e131071", b"1e-16383", b"1e400000", b"9" * 100_000, b"0." + b"3" * 16_000),
        *(
            b"1e18",
            b"1e19",
            b"-1e21",
            b"1e27",
            b"1e28",
            b"-0.0",
            b"0.0012962962962962963",
            b"1e-7",
            b"1.5E+2",
        ),
        *(b"18446744073709551615", b"18446744073709551616", b"9223372036854775807", b"-9223372036854775808"),
        *(b"2147483647", b"2147483648", b"4102444800"),
    ]
    others = [GIGABYTE, b'{"a":' + GIGABYTE + b"}", b"[" * 300 + b"]" * 300]
    others += [b"true", b"false", b"null", b"[]", b"{}", b'""', b'"\\u0000"', b'"\\ud800"', b'"\xff"']
    return [*(json.dumps(text, ensure_ascii=False).encode() for text in texts), *numbers, *others]


AT = "2026-03-15T10:00:00Z"
BEST: dict[str, dict[str, Any]] = {
    "user.events": {
        "event_id": "", "user_id": "u", "item_id": "i", "event_type": "purchase", "category": "c", "brand": "b",
        "price": 9, "session_id": "s", "event_time": AT,
    },
    "view_events": {
        "event_id": "", "viewer_id": 9, "content_id": "c", "genre": "g", "watch_duration_sec": 60,
        "completion_pct": 0.5, "watched_at": AT,
    },
    "content_interactions": {"event_id": "", "viewer_id": 9, "event_type": "like", "event_ts": AT},
    "items": {"item_id": "", "title": "t", "category": "c", "brand": "b", "price": 9, "in_stock": True},
}  # fmt: skip


def stream() -> list[Message]:
    """Every hostile value in every field of every topic, extremes that are valid, and one healthy viewer."""
    bodies: list[tuple[str, bytes]] = []
    for topic, best in BEST.items():
        identity = next(iter(best))
        for name in [*best, "other", "erased"]:
            for value in hostile():
                given = best | {identity: f"{topic}-{len(bodies)}", name: "HERE"}
                bodies.append((topic, json.dumps(given).encode().replace(b'"HERE"', value)))
        bodies.append((topic, b"x" * 1_500_000))
        bodies.append((topic, json.dumps(best | {"other": letters(1_500_000)}).encode()))
        bodies.append((topic, b'{"a":' * 200_000))
    # The longest keys that are valid, in every index: one user, several categories; one viewer, several genres.
    for place in range(7):
        name, brand, genre = letters(1024), letters(1024), letters(1024)
        shop = BEST["user.events"] | {"user_id": "u" * 256, "category": name, "brand": brand, "price": 10**20}
        bodies.append(("user.events", json.dumps(shop | {"event_id": f"long-{place}"}).encode()))
        seen = BEST["view_events"] | {"viewer_id": 2**63 - 1, "genre": genre, "watch_duration_sec": 2**31 - 1}
        bodies += [
            ("view_events", json.dumps(seen | {"event_id": f"long-{place}-{turn}"}).encode())
            for turn in range(9)
        ]
    healthy = BEST["view_events"] | {"event_id": "healthy", "viewer_id": 7, "genre": "drama"}
    bodies.append(("view_events", json.dumps(healthy).encode()))
    return [
        Message(topic, "file:a#1", 0, place, body, None, NOW - HOUR + place * SECOND // 1000)
        for place, (topic, body) in enumerate(bodies)
    ]


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return stream()


@pytest.fixture
def filled(
    deployed: EngineConfiguration, dbt_on: Callable[..., Dbt], messages: list[Message]
) -> EngineConfiguration:
    with deployed.connect() as session:
        session.execute("set synchronous_commit to off")
        insert_events(session, messages)
        # A gigabyte would be more than this.
        session.execute("set work_mem to '4MB'")
        refresh(session, materialized_views(dbt_on(deployed).manifest()))
    return deployed


def test_every_reason_is_told_before_as_after(topics: Mapping[str, Topic], messages: list[Message]) -> None:
    told: Counter[str] = Counter()
    for message in messages:
        expected = parse(message).reason
        assert rejection_reason(message.data, topics[message.topic], instant(message.arrived_at)) == expected
        told[str(expected)] += 1
    assert told["None"] > 100
    assert told["message has 1500000 bytes, at most 1048576"] == len(TOPICS)
    assert told["genre has 8192 bytes, at most 1024"] == 1
    assert told["bad genre"] > 10
    assert told["implausible time"] > 10


def test_everything_goes_on(
    filled: EngineConfiguration, messages: list[Message], aws_endpoint: str, tmp_path: Path
) -> None:
    with filled.connect() as session:
        assert differences(session, Oracle(messages, NOW)) == {}
    contract, client = load_contract(PROJECT), dynamodb_client(aws_endpoint, "eu-central-1")
    tables = provision(client, contract)
    for store in domain_stores(filled, client, contract, tables):
        assert publish_domain(store).upserts > 0
    for viewer in (7, 2**63 - 1):
        key = {"viewer_id": {"N": str(viewer)}, "domain_key": {"S": "engagement#watch"}}
        assert "Item" in client.get_item(TableName=tables["viewer"].name, Key=key)
    catalog = open_catalog("sqlite", (tmp_path / "iceberg").as_uri())
    for spec in TILE_TABLES.values():
        days = stale_days(filled, spec, exported_days(catalog, spec))
        assert days
        assert {export_day(filled, catalog, spec, day).status for day in days} == {"written"}
        assert not stale_days(filled, spec, exported_days(catalog, spec))
