"""RisingWave's own sinks into a real DynamoDB interface: items equal the rolling views, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from risingwave_server import NO_SERVER, PROJECT, URL, database, refused, rows, run, skipped, until

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.items import ItemDecoder
from dagster_prefs.dynamodb.tables import TableError, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

SECRET = "a-secret-key-of-the-suite"


@dataclass
class World:
    """A deployed database and a table of its own."""

    engine: EngineConfiguration
    folder: Path
    client: Any
    prefix: str
    aws: Mapping[str, str]
    sent: int = 0

    def dbt(self, **environment: str) -> Dbt:
        base = {
            "PREFS_KAFKA_BOOTSTRAP": "",
            "PREFS_PUBLISH": "sink",
            "PREFS_TABLE_PREFIX": self.prefix,
        }
        return Dbt(self.engine, PROJECT, self.folder, {**self.aws, **base, **environment})

    def insert(self, topic: str, bodies: list[dict[str, Any]]) -> None:
        table = {"view_events": "raw_view_events", "content_interactions": "raw_content_interactions"}[topic]
        with self.engine.connect() as connection:
            # One wait for the next barrier at the end instead of one for every row.
            connection.execute("set rw_implicit_flush to false")
            for body in bodies:
                self.sent += 1
                connection.execute(
                    f"insert into {table} (source, source_partition, source_offset, data) values ('test', 0, %s, %s)",
                    (self.sent, json.dumps(body).encode()),
                )
            connection.execute("flush")

    def views(self) -> dict[tuple[int, str], dict[str, Any]]:
        """What the rolling views hold, by viewer and domain."""
        found = {}
        with self.engine.connect() as connection:
            for domain in load_contract(PROJECT).domains.values():
                names = ", ".join(domain.attributes)
                for viewer, key, *values in connection.execute(
                    f"select viewer_id, domain_key, {names} from {domain.relation}"
                ):
                    found[(viewer, key)] = dict(zip(domain.attributes, values, strict=True))
        return found

    def items(self) -> dict[tuple[int, str], dict[str, Any]]:
        """What DynamoDB holds."""
        contract, found = load_contract(PROJECT), {}
        name = f"{self.prefix}viewer_profiles"
        for page in self.client.get_paginator("scan").paginate(TableName=name, ConsistentRead=True):
            for item in page["Items"]:
                viewer, key = int(item["viewer_id"]["N"]), item["domain_key"]["S"]
                values, _ = ItemDecoder(contract.domains[key]).decode(item)
                found[(viewer, key)] = dict(zip(contract.domains[key].attributes, values, strict=True))
        return found


@pytest.fixture(scope="module")
def world(shell_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    endpoint = shell_environment.get("AWS_ENDPOINT_URL")
    if not endpoint:
        pytest.skip("AWS_ENDPOINT_URL names no DynamoDB")
    aws = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": shell_environment.get("AWS_REGION", "eu-central-1"),
        "AWS_ACCESS_KEY_ID": shell_environment.get("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    with database() as engine, pytest.MonkeyPatch.context() as patch:
        for name, value in aws.items():
            patch.setenv(name, value)
        client = dynamodb_client(endpoint, aws["AWS_REGION"])
        prefix = f"{engine.database}_"
        made = World(engine, tmp_path_factory.mktemp("target"), client, prefix, aws)
        rolling = ["+" + domain.relation for domain in load_contract(PROJECT).domains.values()]
        run(made.dbt(), *rolling)
        yield made
        with engine.connect() as connection:
            for domain in load_contract(PROJECT).domains.values():
                connection.execute(f"drop sink if exists {domain.sink}")
        for table in client.list_tables()["TableNames"]:
            if table.startswith(prefix):
                client.delete_table(TableName=table)


def test_a_missing_table_and_one_with_another_key_are_refused(world: World) -> None:
    message = refused(world.dbt(), "sink_engagement_watch")
    assert message.startswith("the DynamoDB table of the sink does not exist: ")
    assert rows(world.engine, "select name from rw_catalog.rw_sinks") == []
    wrong = f"{world.prefix}wrong_"
    world.client.create_table(
        TableName=f"{wrong}viewer_profiles",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "viewer_id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "viewer_id", "KeyType": "HASH"}],
    )
    # What Dagster and `prefs apply` do before a sink.
    with pytest.raises(TableError, match="viewer_profiles"):
        provision(world.client, load_contract(PROJECT), prefix=wrong)
    message = refused(world.dbt(PREFS_TABLE_PREFIX=wrong), "sink_engagement_watch")
    assert message.startswith("the DynamoDB table has another key than the contract")


def test_items_equal_the_views_through_the_story(world: World) -> None:
    provision(world.client, load_contract(PROJECT), prefix=world.prefix)
    now = datetime.now(UTC)
    views = [
        {
            "event_id": f"v{n}", "viewer_id": n % 7, "content_id": f"c{n % 5}",
            "genre": ["drama", "crime", None][n % 3], "watch_duration_sec": 60 + n, "completion_pct": n % 11 / 10,
            "watched_at": (now - timedelta(hours=9 * n)).isoformat(),
        }
        for n in range(60)
    ]  # fmt: skip
    liked = [
        {
            "event_id": f"i{n}", "viewer_id": n % 4, "event_type": ["like", "share", "search"][n % 3],
            "event_ts": (now - timedelta(days=n)).isoformat(),
        }
        for n in range(20)
    ]  # fmt: skip
    # Some before the sinks are made, which they backfill; the rest, repeated ones among them, after.
    world.insert("view_events", views[:30])
    world.insert("content_interactions", liked[:10])
    sinks = [domain.sink for domain in load_contract(PROJECT).domains.values()]
    run(world.dbt(PREFS_RISINGWAVE_SECRETS="on"), *sinks)
    world.insert("view_events", [*views[30:], *views[:5]])
    world.insert("content_interactions", [*liked[10:], {**liked[0], "event_type": "shout"}])
    until(
        lambda: len(world.views()) >= 18 and world.items() == world.views(),
        lambda: f"views {world.views()}, items {world.items()}",
    )
    assert {viewer for viewer, _ in world.items()} == set(range(7))
    # A viewer that leaves a view leaves DynamoDB.
    with world.engine.connect() as connection:
        connection.execute(
            "insert into erased_subjects (subject_kind, subject_id, erased_at) values ('viewer', '3', now())"
        )
    until(
        lambda: world.items() == world.views() and not {key for key in world.items() if key[0] == 3},
        lambda: f"views {world.views()}, items {world.items()}",
    )
    assert skipped(run(world.dbt(PREFS_RISINGWAVE_SECRETS="on"), *sinks))
    # The secret is nowhere but in the engine's store of secrets.
    definitions = str(rows(world.engine, "select * from rw_catalog.rw_sinks"))
    assert SECRET not in definitions
    assert SECRET not in str(rows(world.engine, "select * from deployments"))
    written = [path for path in world.folder.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
