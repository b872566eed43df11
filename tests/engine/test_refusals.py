"""What a server refuses in words that nobody knows: one sentence says what was being made, for whom, where to look."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from scripted_wire import RisingWaveWire

from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.engine.explain import engine_words

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
CHAIN = """Failed to run the query

Caused by these errors (recent errors listed first):
  1: gRPC request to meta service (call `/ddl_service.DdlService/{}`) failed: Internal error
  2: the moon is in the wrong phase"""
WORDS = (
    "gRPC request to meta service (call `/ddl_service.DdlService/{}`) failed: Internal error: the moon is in the wrong "
    "phase"
)
SINKS = {
    "PREFS_PUBLISH": "sink",
    "PREFS_KAFKA_BOOTSTRAP": "kafka:9092",
    "PREFS_EXPORT": "sink",
    "PREFS_RAW_RETENTION_SECONDS": "86400",
    "PREFS_ICEBERG_CATALOG": "rest",
    "PREFS_ICEBERG_URI": "http://catalog:8181",
    "PREFS_ICEBERG_WAREHOUSE": "s3://lake",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "hunter2-of-the-key",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


def refused(
    server: RisingWaveWire, target: Path, environment: dict[str, str], *models: str
) -> dict[str, str]:
    """What a run of these models says of each, and what `on_result` was told of it on the way."""
    heard: dict[str, str] = {}
    results = Dbt(server.engine, PROJECT, target, environment).run(
        "run", models, on_result=lambda result: heard.update({result.name: result.message})
    )
    said = {result.name: result.message for result in results if result.status == "error"}
    assert heard == said
    return said


def test_sinks_feeds_and_views(target: Path) -> None:
    models = {
        "sink_engagement_watch": (
            "did not create the DynamoDB sink sink_engagement_watch for domain engagement#watch, "
            "recommendation_service: "
            "look at models/generated/sinks/sink_engagement_watch.sql, the table's key and state in DynamoDB, "
            "PREFS_TABLE_PREFIX, AWS_REGION, AWS_ENDPOINT_URL, and PREFS_SINK_ROLE_ARN or the AWS keys",
            "CreateSink",
        ),
        "sink_training_watch": (
            "did not create the Iceberg sink sink_training_watch for training table viewer_watch_daily: look at "
            "models/generated/sinks/sink_training_watch.sql, the table in the catalog, PREFS_ICEBERG_CATALOG, "
            "PREFS_ICEBERG_URI, PREFS_ICEBERG_CREDENTIAL and PREFS_ICEBERG_WAREHOUSE, and the AWS keys",
            "CreateSink",
        ),
        "sink_raw_items": (
            "did not create the Iceberg sink sink_raw_items for table raw_items in the lake: look at "
            "models/generated/sinks/sink_raw_items.sql, the table in the catalog, PREFS_ICEBERG_CATALOG, "
            "PREFS_ICEBERG_URI, PREFS_ICEBERG_CREDENTIAL and PREFS_ICEBERG_WAREHOUSE, and the AWS keys; its raw table "
            "must have been created with PREFS_RAW_RETENTION_SECONDS, else recreate that or unset PREFS_EXPORT",
            "CreateSink",
        ),
        "kafka_items": (
            "did not create the Kafka feed kafka_items for topic items: look at "
            "models/generated/events/kafka_items.sql, "
            "the topic and its brokers, PREFS_KAFKA_BOOTSTRAP, PREFS_KAFKA_SECURITY_PROTOCOL and what belongs to it",
            "CreateSource",
        ),
        "items": (
            "did not create the materialized view items for ranking: look at models/generated/events/items.sql",
            "CreateMaterializedView",
        ),
        "raw_user_events": (
            "did not create the event table raw_user_events for ranking: look at "
            "models/generated/events/raw_user_events.sql",
            "CreateTable",
        ),
    }
    with RisingWaveWire("3.0.3", {"nspname from pg_namespace": [("public",)]}) as server:
        server.refusals = {
            "(?m)^create sink": CHAIN.format("CreateSink"),
            "(?m)^create source": CHAIN.format("CreateSource"),
            "(?i)^create materialized view": CHAIN.format("CreateMaterializedView"),
            '^create table "': CHAIN.format("CreateTable"),
        }
        said = refused(server, target, SINKS, *models)
    where = f"RisingWave at 127.0.0.1:{server.engine.port}"
    assert said == {
        name: f"{where} {sentence}. It says: {WORDS.format(call)}"
        for name, (sentence, call) in models.items()
    }
    assert "hunter2" not in str(said)


def test_a_secret_and_a_subscription(target: Path) -> None:
    environment = {
        "PREFS_PUBLISH": "changefeed",
        "PREFS_RISINGWAVE_SECRETS": "on",
        "PREFS_KAFKA_BOOTSTRAP": "kafka:9092",
        "PREFS_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "PREFS_KAFKA_SASL_MECHANISM": "PLAIN",
        "PREFS_KAFKA_SASL_USERNAME": "platform",
        "PREFS_KAFKA_SASL_PASSWORD": "hunter2-of-the-topic",
    }
    with RisingWaveWire("3.0.3", {"nspname from pg_namespace": [("public",)]}) as server:
        server.refusals = {
            "^create secret": CHAIN.format("CreateSecret"),
            "^create subscription": CHAIN.format("CreateSubscription"),
        }
        said = refused(server, target, environment, "kafka_items", "sink_engagement_watch")
    assert any("hunter2-of-the-topic" in statement for statement in server.statements)
    assert (
        "did not create the secret of the Kafka feed kafka_items for topic items: look at "
        "models/generated/events/kafka_items.sql, secret_store_private_key of the server, and "
        "PREFS_RISINGWAVE_SECRETS, which may be off. It says: gRPC request"
    ) in said["kafka_items"]
    assert (
        "did not create the subscription sink_engagement_watch for domain engagement#watch, "
        "recommendation_service: look at models/generated/sinks/sink_engagement_watch.sql, the view it reads, and "
        "PREFS_CHANGEFEED_RETENTION_HOURS. It says: "
    ) in said["sink_engagement_watch"]
    assert "hunter2" not in str(said)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Database Error in model x (models/x.sql)\n  division by zero\n  compiled code at target/x.sql",
         "division by zero"),
        ("Failed to run the query\n\nCaused by:\n  Catalog error: no", "Catalog error: no"),
        ("sql parser error: near aws.credentials.secret_access_key = 'hunter2',",
         "sql parser error: near aws.credentials.secret_access_key = '***',"),
        ("Database Error in model x (models/x.sql)\n  Failed to run the query", "nothing"),
    ],
)  # fmt: skip
def test_the_words_of_the_engine_are_kept_without_what_surrounds_them(message: str, words: str) -> None:
    assert engine_words(message) == words


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("Catalog error\n  2: table or source not found: events", "table or source not found: events"),
        # RisingWave 3.0.3 of an insert, an update and a delete.
        ("Catalog error\n  2: table not found: event_exports", "table not found: event_exports"),
        ("Catalog error\n  2: schema not found: dev", None),
        ("Catalog error\n  2: function not found: turntable", None),
    ],
)
def test_what_is_missing_is_told_from_other_failures(said: str, missing: str | None) -> None:
    error = psycopg.errors.UndefinedObject(f"Failed to prepare the statement\n\nCaused by:\n  1: {said}")
    assert missing_relation(error) == missing
