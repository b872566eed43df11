"""A fresh schema with the preference relations as plain tables."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.serving.preferences import PreferenceClient

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

    engine: EngineConnection
    client: PreferenceClient

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
def shop(engine: EngineConnection) -> Iterator[Shop]:
    schema = f"serving_{uuid.uuid4().hex[:12]}"
    with engine.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    inside = replace(engine, schema=schema)
    with inside.connect() as connection:
        connection.execute(DDL)
    with PreferenceClient(inside) as client:
        yield Shop(inside, client)
    with engine.connect() as connection:
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))
