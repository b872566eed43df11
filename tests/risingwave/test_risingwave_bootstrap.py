"""A history that a real RisingWave reads itself from an Iceberg table, next to what came from Kafka."""

from __future__ import annotations

import json
import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from risingwave_server import NO_SERVER, URL, database, engine_settings, run

from dagster_prefs.events import engine_history
from dagster_prefs.events.ingest import FileOptions
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

pytestmark = pytest.mark.skipif(not URL, reason=NO_SERVER)

# `TEST_HISTORY` events measure the rate, e.g. 1000000.
EVENTS = int(os.environ.get("TEST_HISTORY", "3000"))
DAYS = 5


def events(first: datetime) -> pa.Table:
    chance = random.Random(7)
    return pa.table(
        {
            "event_id": [f"e{number}" for number in range(EVENTS)],
            "viewer_id": [chance.randrange(50) for _ in range(EVENTS)],
            "content_id": [f"c{chance.randrange(9)}" for _ in range(EVENTS)],
            "genre": [chance.choice(["drama", None, "Ä"]) for _ in range(EVENTS)],
            "watch_duration_sec": [chance.randrange(-1, 4000) for _ in range(EVENTS)],
            "completion_pct": [chance.choice([0.25, 0.95, 1.0]) for _ in range(EVENTS)],
            "watched_at": pa.array(
                [first + timedelta(days=DAYS) * number / EVENTS for number in range(EVENTS)],
                pa.timestamp("us", "UTC"),
            ),
        }
    )


def test_a_stopped_bootstrap_goes_on_and_overlaps_with_kafka(
    aws_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_store.rest_catalog import rest_server
    from oracle import Message, Oracle, micros
    from relations import differences, insert_canary_keys, insert_events

    boto3.client("s3", endpoint_url=aws_endpoint).create_bucket(
        Bucket="history", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )
    behind = SqlCatalog(
        "history",
        uri=f"sqlite:///{tmp_path / 'history.db'}",
        warehouse="s3://history/warehouse",
        **{"s3.endpoint": aws_endpoint, "s3.region": "eu-central-1"},
    )
    behind.create_namespace("lake")
    first = datetime.now(UTC).replace(microsecond=0) - timedelta(days=DAYS + 1)
    table = events(first)
    stored = behind.create_table("lake.views", table.schema)
    for start in range(0, EVENTS, EVENTS // DAYS):
        stored.append(table.slice(start, EVENTS // DAYS))
    with rest_server(behind, "prefs:open sesame") as rest, database() as engine:
        for name, value in {
            "AWS_ENDPOINT_URL": aws_endpoint,
            **engine_settings(engine),
            "PREFS_PUBLISH": "sink",
            "PREFS_KAFKA_BOOTSTRAP": "",
            "PREFS_ICEBERG_CATALOG": "rest",
            "PREFS_ICEBERG_URI": rest.uri,
            "PREFS_ICEBERG_CREDENTIAL": "prefs:open sesame",
            "PREFS_ICEBERG_WAREHOUSE": "s3://history/warehouse",
            "PREFS_DATA_DIR": str(tmp_path / "data"),
        }.items():
            monkeypatch.setenv(name, value)
        platform = Platform(load_settings())
        # Few builds have the Java libraries of the other client.
        platform.dbt._environment["PREFS_ICEBERG_CATALOG"] = "rest_rust"
        run(platform.dbt, "+viewer_engagement_rolling", "bootstrap_parts", "canary_keys")
        kafka = [
            Message(
                "view_events", "kafka:view_events", 0, number, json.dumps(row, default=str).encode(),
                micros(row["watched_at"]), micros(datetime.now(UTC)),
            )
            for number, row in enumerate(table.slice(EVENTS - 200).to_pylist())
        ]  # fmt: skip
        with engine.connect() as connection:
            insert_canary_keys(connection)
            insert_events(connection, kafka[:100])
            connection.execute("flush")
        inserts, calls = engine_history.insert_rows, []

        def fails(*given: Any) -> int:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inserts(*given)

        monkeypatch.setattr(engine_history, "insert_rows", fails)
        with pytest.raises(KeyboardInterrupt):
            platform.bootstrap("view_events", "iceberg:lake.views", FileOptions())
        monkeypatch.setattr(engine_history, "insert_rows", inserts)
        (stopped,) = platform.bootstraps("view_events")
        assert (stopped.parts_done, stopped.is_complete) == (2, False)
        state = platform.bootstrap("view_events", "iceberg:lake.views", FileOptions())
        assert (state.is_complete, state.messages) == (True, EVENTS)
        print(f"{state.messages:,} messages in {state.seconds:.1f} s: {state.rate:,.0f}/s")
        with engine.connect() as connection:
            insert_events(connection, kafka[100:])
            connection.execute("flush")
            columns = "source, source_partition, source_offset, data, kafka_timestamp, arrived_at"
            held = [
                Message("view_events", *row[:4], row[4] and micros(row[4]), micros(row[5]))
                for row in connection.execute(f"select {columns} from raw_view_events").fetchall()
            ]
            assert len(held) == EVENTS + 200
            ((now,),) = connection.execute("select now()").fetchall()
            relations = ["view_events", "viewer_watch_metrics_1d", "viewer_engagement_rolling"]
            assert differences(connection, Oracle(held, micros(now)), relations) == {}
            ((counted,),) = connection.execute("select count(*) from view_events").fetchall()
            assert counted == sum(seconds >= 0 for seconds in table["watch_duration_sec"].to_pylist())
            # Nothing of it is left in the catalog, and with it none of its credentials.
            left = connection.execute("select name from rw_catalog.rw_sources").fetchall()
            assert [name for (name,) in left if name.startswith("history_of")] == []
