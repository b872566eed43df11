"""`prefs publish` on a real RisingWave and a real DynamoDB interface: kill -9, expiry, a token that is too old."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from risingwave_server import NO_SERVER, URL, engine_settings, server_of
from shipped import LONG, SHORT

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.items import ItemDecoder
from dagster_prefs.dynamodb.lease import LEASE_IDS
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
# Every viewer has a second of the day of his own in which his windows roll over: its number is his id.
SPREAD = 86_399
PATIENCE_SECONDS = 180

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)


@dataclass
class World:
    """A deployed database, an empty table, and the environment of the commands."""

    engine: EngineConfiguration
    environment: Mapping[str, str]
    client: Any
    table: str
    prefix: str
    events: int = 0
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def prefs(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("prefs")), *arguments],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def watch(self, seconds: Mapping[int, int], at: datetime) -> None:
        """Each of these viewers watches for so many seconds; visible in the views on return."""
        from oracle import Message
        from relations import insert_events

        arrived = round(datetime.now(UTC).timestamp() * 1_000_000)
        messages = []
        for viewer_id, watched in seconds.items():
            self.events += 1
            body = {
                "event_id": f"e{self.events}", "viewer_id": viewer_id, "content_id": "c", "genre": "drama",
                "watch_duration_sec": watched, "completion_pct": 0.95, "watched_at": at.isoformat(),
            }  # fmt: skip
            data = json.dumps(body).encode()
            messages.append(Message("view_events", "test", 0, self.events, data, None, arrived))
        with self.engine.connect() as connection:
            # One wait for the next barrier at the end instead of one for every row.
            connection.execute("set rw_implicit_flush to false")
            insert_events(connection, messages)
            connection.execute("flush")

    def view(self) -> dict[tuple[int, str], dict[str, Any]]:
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
        """What DynamoDB holds, leases aside."""
        contract, found = load_contract(PROJECT), {}
        for page in self.client.get_paginator("scan").paginate(TableName=self.table, ConsistentRead=True):
            for item in page["Items"]:
                viewer, key = int(item["viewer_id"]["N"]), item["domain_key"]["S"]
                if viewer != LEASE_IDS["N"]:
                    values, _ = ItemDecoder(contract.domains[key]).decode(item)
                    found[(viewer, key)] = dict(zip(contract.domains[key].attributes, values, strict=True))
        return found

    def until(self, condition: Callable[[], bool], what: str) -> None:
        pause = threading.Event()
        deadline = datetime.now(UTC) + timedelta(seconds=PATIENCE_SECONDS)
        while not condition():
            for process in self.running:
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    raise AssertionError(f"prefs ended: {process.communicate()}")
            assert datetime.now(UTC) < deadline, f"{what}: view {self.view()}, items {self.items()}"
            pause.wait(0.3)


@pytest.fixture(scope="module")
def world(shell_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    endpoint = shell_environment.get("AWS_ENDPOINT_URL")
    if not endpoint:
        pytest.skip("AWS_ENDPOINT_URL names no DynamoDB")
    server = server_of(URL)
    name = f"prefs_{uuid.uuid4().hex[:12]}"
    with server.connect() as connection:
        connection.execute(f"create database {name}")
    engine = server.with_database(name)
    aws = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": shell_environment.get("AWS_REGION", "eu-central-1"),
        "AWS_ACCESS_KEY_ID": shell_environment.get("AWS_ACCESS_KEY_ID", "test"),
        "AWS_SECRET_ACCESS_KEY": shell_environment.get("AWS_SECRET_ACCESS_KEY", "test"),
    }
    made = {
        "PREFS_PUBLISH": "changefeed",
        "PREFS_EXPIRY_SPREAD_SECONDS": str(SPREAD),
        "PREFS_KAFKA_BOOTSTRAP": "",
    }
    prefix = f"{name}_"
    environment = {
        **aws,
        **made,
        **engine_settings(engine),
        "PREFS_TABLE_PREFIX": prefix,
        "PREFS_DATA_DIR": str(tmp_path_factory.mktemp("state")),
        "PREFS_CHANGEFEED_LEASE_SECONDS": "3",
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, aws[variable])
        client = dynamodb_client(endpoint, aws["AWS_REGION"])
        table = provision(client, load_contract(PROJECT), prefix=prefix)["viewer"]
        there = World(engine, environment, client, table.name, prefix)
        try:
            results = Dbt(engine, PROJECT, tmp_path_factory.mktemp("target"), made).run(
                "run", ["+" + domain.sink for domain in load_contract(PROJECT).domains.values()]
            )
            assert [f"{result.name}: {result.message}" for result in results if not result.ok] == []
            yield there
        finally:
            for process in there.running:
                process.kill()
                process.wait()
            client.delete_table(TableName=table.name)
            with engine.connect() as connection:
                for (kept,) in connection.execute(
                    "select r.name from rw_catalog.rw_relations r join rw_catalog.rw_schemas s on s.id = r.schema_id"
                    " where s.name = 'public' and r.relation_type = 'table'"
                ).fetchall():
                    connection.execute(f"drop table {kept} cascade")
            with server.connect() as connection:
                connection.execute(f"drop database {name}")


def test_a_follower_that_is_killed_and_one_that_follows_it(world: World) -> None:
    now = datetime.now(UTC)
    world.watch({viewer: 60 * viewer for viewer in range(1, 6)}, now)
    first = world.prefs("publish", "--follow")
    world.until(
        lambda: {viewer for viewer, _ in world.items()} == {1, 2, 3, 4, 5} and world.items() == world.view(),
        "the first items",
    )

    # The window of this viewer rolls over soon: his one tile is as old as can be.
    expiry = datetime.now(UTC) + timedelta(seconds=90)
    leaver = (expiry.hour * 60 + expiry.minute) * 60 + expiry.second
    oldest = datetime(expiry.year, expiry.month, expiry.day, 12, tzinfo=UTC) - timedelta(days=LONG + 1)
    world.watch({leaver: 600}, oldest)
    world.until(lambda: (leaver, "engagement#watch") in world.items(), "the item that will expire")

    # Killed in the middle of changes, and the next one goes on from where the token is.
    for round_ in range(3):
        world.watch(dict.fromkeys(range(1, 4), 30 + round_), now)
        if round_ == 1:
            first.send_signal(signal.SIGKILL)
            first.wait(30)
    second = world.prefs("publish", "--follow")
    world.until(lambda: world.items() == world.view(), "the changes after the kill")
    minutes = world.items()[(1, "engagement#watch")][f"watch_minutes_{SHORT}d"]
    assert minutes == round(Decimal(60 + 30 + 31 + 32) / 60, 6)

    # No event tells that the window is over; the engine does.
    world.until(
        lambda: not [viewer for viewer, _ in world.items() if viewer == leaver], "the item that expired"
    )
    assert world.items() == world.view()
    second.send_signal(signal.SIGTERM)
    _, told = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "whole view" not in told, "the second follower had a token to go on from"


def test_a_token_that_is_too_old_leaves_no_stale_item(world: World) -> None:
    now = datetime.now(UTC)
    world.watch({1: 10, 40: 20}, now)
    process = world.prefs("publish", "--json")
    _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, told
    alien = {"viewer_id": {"N": "41"}, "domain_key": {"S": "engagement#watch"}, "last_event_at": {"N": "1"}}
    world.client.put_item(TableName=world.table, Item=alien)
    for key in load_contract(PROJECT).domains:
        world.client.update_item(
            TableName=world.table,
            Key={"viewer_id": {"N": str(LEASE_IDS["N"])}, "domain_key": {"S": f"publisher#{key}"}},
            UpdateExpression="set #t = :t",
            ExpressionAttributeNames={"#t": "token"},
            ExpressionAttributeValues={":t": {"N": str(round(now.timestamp() * 1000) - 40 * 86_400_000)}},
        )
    process = world.prefs("publish", "--json")
    answer, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, told
    assert "no longer retained" in told
    assert [report["resyncs"] for report in json.loads(answer)] == [1] * len(load_contract(PROJECT).domains)
    assert world.items() == world.view()
    assert (40, "engagement#watch") in world.items()

    # The next one goes on from the token, and finds what happened in between.
    world.watch({40: 20}, now)
    again = world.prefs("publish", "--json")
    answer, told = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, told
    assert [report["resyncs"] for report in json.loads(answer)] == [0] * len(load_contract(PROJECT).domains)
    assert world.items() == world.view()
