"""A fresh schema with the preference relations as plain tables."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from psycopg import sql
from scripted_dynamodb import Script, answer
from scripted_dynamodb import serve as serve_script
from shipped import with_computed_attributes

from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.serving import ClientOptions, ProfileClient
from dagster_prefs.serving.preferences import ShopClient

REGION = "eu-central-1"
SERVED = with_computed_attributes()

DDL = """
create table user_category_profile (
    user_id text, category text, affinity_score bigint, unique_items_interacted bigint,
    last_engaged_at timestamptz
);
create table user_brand_profile (
    user_id text, brand text, brand_affinity bigint, purchase_count bigint, last_brand_interaction timestamptz
);
create table user_price_sensitivity (
    user_id text, price_tier text, views bigint, purchases bigint, conversion_rate numeric
);
create table user_recent_activity (
    user_id text, category text, recent_interactions bigint, window_start timestamptz, window_end timestamptz,
    first_event_at timestamptz, last_event_at timestamptz
);
create table items (item_id text, title text, category text, brand text, price numeric, in_stock boolean);
"""


@dataclass
class Shop:
    """The preference relations of one test."""

    engine: EngineConfiguration
    client: ShopClient

    def execute(self, statement: Any, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def insert(self, relation: str, *rows: Sequence[Any]) -> None:
        with self.engine.connect() as connection, connection.cursor() as cursor:
            cursor.executemany(
                sql.SQL("insert into {} values ({})").format(
                    sql.Identifier(relation), sql.SQL(", ").join([sql.Placeholder()] * len(rows[0]))
                ),
                rows,
            )

    def clear(self) -> None:
        self.execute(
            "truncate user_category_profile, user_brand_profile, user_price_sensitivity, "
            "user_recent_activity, items"
        )


@pytest.fixture
def shop(database: EngineConfiguration) -> Iterator[Shop]:
    schema = f"serving_{uuid.uuid4().hex[:12]}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    inside = replace(database, schema=schema)
    with inside.connect() as connection:
        connection.execute(DDL)
    with ShopClient(inside) as client:
        yield Shop(inside, client)
    with database.connect() as connection:
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


class Online:
    """A fresh table of one test."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.contract = SERVED.contract
        self.prefix = f"serving_{uuid.uuid4().hex[:12]}_"
        self.client = dynamodb_client(endpoint, REGION)
        self.table = provision(self.client, self.contract, prefix=self.prefix)["viewer"]

    def put(self, name: str, viewer_id: int, values: list[Any], **changes: Any) -> None:
        item = ItemEncoder(self.contract, self.contract.domain(name)).encode(viewer_id, values)
        item.update(changes)
        self.client.put_item(TableName=self.table.name, Item=item)

    def reader(self, transport: str, clock: Callable[[], float] = time.time) -> ProfileClient:
        return ProfileClient(
            SERVED,
            endpoint_url=self.endpoint,
            region=REGION,
            table_prefix=self.prefix,
            options=ClientOptions(30, read_timeout_seconds=30, transport=transport),  # type: ignore[arg-type]
            clock=clock,
        )


@pytest.fixture
def online(dynamodb_endpoint: str) -> Iterator[Online]:
    made = Online(dynamodb_endpoint)
    yield made
    made.client.delete_table(TableName=made.table.name)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """A scripted DynamoDB, which answers that nothing is there, and the keys for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    made, stop = serve_script(lambda request: answer({}))
    yield made
    stop()
