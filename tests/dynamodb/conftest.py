"""A fresh schema with the three sink relations as plain tables, and a fresh DynamoDB table, per test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from psycopg import sql
from shipped import with_computed_attributes

from dagster_prefs.declarations.contract import Contract, Domain
from dagster_prefs.dynamodb.publisher import PublishReport, publish_domain
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import TableReport, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration

SQL_TYPE = {
    "integer": "bigint",
    "decimal": "numeric",
    "float": "double precision",
    "string": "text",
    "list<string>": "text[]",
    "list<decimal>": "numeric[]",
    "list<integer>": "bigint[]",
}


@dataclass
class Store:
    """The engine's side and DynamoDB's side of one test."""

    engine: EngineConfiguration
    client: Any
    contract: Contract
    table: TableReport
    prefix: str

    def execute(self, statement: Any, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def create_sink(self, domain: Domain) -> None:
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(SQL_TYPE[attribute.type]))
            for name, attribute in domain.attributes.items()
        )
        self.execute(
            sql.SQL("create table {} (viewer_id bigint, domain_key text, {})").format(
                sql.Identifier(domain.sink), columns
            )
        )

    def put(self, name: str, viewer_id: int | None, *values: Any) -> None:
        domain = self.contract.domain(name)
        self.execute(
            sql.SQL("delete from {} where viewer_id = {}").format(
                sql.Identifier(domain.sink), sql.Literal(viewer_id)
            )
        )
        row = [viewer_id, domain.key, *values]
        self.execute(
            sql.SQL("insert into {} values ({})").format(
                sql.Identifier(domain.sink), sql.SQL(", ").join(map(sql.Literal, row))
            )
        )

    def remove(self, name: str, viewer_id: int) -> None:
        sink = self.contract.domain(name).sink
        self.execute(
            sql.SQL("delete from {} where viewer_id = {}").format(
                sql.Identifier(sink), sql.Literal(viewer_id)
            )
        )

    def domain(self, name: str, client: Any = None) -> DomainStore:
        return DomainStore(
            self.engine, client or self.client, self.contract, self.contract.domain(name), self.table
        )

    def publish(self, name: str, client: Any = None, **options: Any) -> PublishReport:
        return publish_domain(self.domain(name, client), **options)

    def items(self, name: str | None = None) -> dict[tuple[int, str], dict[str, Any]]:
        pages = self.client.get_paginator("scan").paginate(TableName=self.table.name, ConsistentRead=True)
        found = {
            (int(item["viewer_id"]["N"]), item["domain_key"]["S"]): item
            for page in pages
            for item in page["Items"]
        }
        key = None if name is None else self.contract.domain(name).key
        return {identity: item for identity, item in found.items() if key in (None, identity[1])}

    def recreate_table(self) -> None:
        self.client.delete_table(TableName=self.table.name)
        self.table = provision(self.client, self.contract, prefix=self.prefix)["viewer"]


@pytest.fixture
def contract() -> Contract:
    """The example's, with the attributes of which these tests write values."""
    return with_computed_attributes().contract


@pytest.fixture
def store(database: EngineConfiguration, dynamodb_endpoint: str, contract: Contract) -> Iterator[Store]:
    schema = f"online_{uuid.uuid4().hex[:12]}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    client = dynamodb_client(dynamodb_endpoint, "eu-central-1")
    prefix = f"{schema}_"
    made = Store(
        replace(database, schema=schema),
        client,
        contract,
        provision(client, contract, prefix=prefix)["viewer"],
        prefix,
    )
    made.execute(
        "create table online_published (table_id text, domain_key text, entity_key text, fingerprint text, "
        "primary key (table_id, domain_key, entity_key))"
    )
    for domain in contract.domains.values():
        made.create_sink(domain)
    try:
        yield made
    finally:
        client.delete_table(TableName=made.table.name)
        with database.connect() as connection:
            connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))
