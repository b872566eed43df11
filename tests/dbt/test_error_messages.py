"""What engines and drivers say, as one sentence with the remedy; the texts are those of real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.engine.dbt import Dbt, one_line

KAFKA = """Database Error in model kafka_items (models/events/kafka_items.sql)
  Failed to run the query

  Caused by these errors (recent errors listed first):
    1: gRPC request to meta service (call `/ddl_service.DdlService/CreateSource`) failed: Internal error
    2: failed to create source worker
    3: failed to fetch metadata from kafka (127.0.0.1:9092)
    4: {}
"""
SINK = """Failed to run the query

  Caused by these errors (recent errors listed first):
    1: gRPC request to meta service (call `/ddl_service.DdlService/CreateSink`) failed: Internal error
    2: failed to validate sink
    3: {}
"""


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            KAFKA.format("topic items not found"),
            "Kafka has no topic items: create it, or set its name in Kafka with PREFS_KAFKA_TOPIC_…",
        ),
        (
            KAFKA.format("BrokerTransportFailure (Local: Broker transport failure)"),
            "RisingWave got no answer from Kafka at 127.0.0.1:9092: check that PREFS_KAFKA_BOOTSTRAP resolves on its "
            "machines, and PREFS_KAFKA_SECURITY_PROTOCOL with what belongs to it",
        ),
        (
            SINK.format("ResourceNotFoundException: Cannot do operations on a non-existent table"),
            "the DynamoDB table of the sink does not exist: materialize its asset dynamodb/… or create "
            "it with Terraform first, and check PREFS_TABLE_PREFIX, AWS_REGION and AWS_ENDPOINT_URL",
        ),
        (
            SINK.format("table t key field domain_key not found in schema or not primary key"),
            "the DynamoDB table has another key than the contract, so it was created by somebody else or for another "
            "version: choose another PREFS_TABLE_PREFIX, or migrate it",
        ),
        (
            SINK.format(
                "DynamoDB error\n    4: DynamoDB table viewer_profiles primary key "
                '["viewer_id"] must match RisingWave primary key ["viewer_id", "domain_key"]'
            ),
            "the DynamoDB table has another key than the contract, so it was created by somebody else or for another "
            "version: choose another PREFS_TABLE_PREFIX, or migrate it",
        ),
        (
            SINK.format("DynamoDB error\n    4: table viewer_profiles not found"),
            "the DynamoDB table of the sink does not exist: materialize its asset dynamodb/… or create "
            "it with Terraform first, and check PREFS_TABLE_PREFIX, AWS_REGION and AWS_ENDPOINT_URL",
        ),
        (
            SINK.format("DynamoDB error\n    4: table viewer_profiles is not active"),
            "the DynamoDB table viewer_profiles is not ACTIVE yet: wait until it is, then run again",
        ),
        (
            "feature DynamoDbSink is not available based on your license\n\nHint: You may want to set a license key",
            "RisingWave's licence does not include this feature: set a key with `alter system set "
            "license_key = '…'`, keep the "
            "cluster at 4 CPU cores and below 20 GiB of memory, or set PREFS_PUBLISH=changefeed and "
            "PREFS_RISINGWAVE_SECRETS=off, which need none",
        ),
        ("Compilation Error in model x\n  no such column\n\n  > in macro y",
         "Compilation Error in model x no such column"),
    ],
)  # fmt: skip
def test_what_a_server_says_becomes_one_sentence(said: str, meant: str) -> None:
    assert one_line(said) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            'connection to server at "h", port 4566 failed: Connection refused\n\tIs the server running on that host?',
            "the risingwave engine at h:4566 cannot be reached (Connection refused): check PREFS_ENGINE_HOST and "
            "PREFS_ENGINE_PORT",
        ),
        (
            'connection to server at "h", port 4566 failed: ERROR:  Invalid password',
            "the engine at h:4566 refused user root: check PREFS_ENGINE_USER and PREFS_ENGINE_PASSWORD",
        ),
        (
            'connection to server at "h", port 4566 failed: FATAL:  could not write init file: No space left on device',
            "the disk of the engine at h:4566 is full (FATAL:  could not write init file: No space left on device): "
            "free space on it, and the engine accepts connections again",
        ),
        (
            'failed: ERROR:  Failed to start a new session\n\nCaused by:\n  database "d" does not exist',
            "the engine at h:4566 has no database d: create it or set PREFS_ENGINE_DATABASE",
        ),
    ],
)
def test_a_refused_connection_names_who_and_what(said: str, meant: str) -> None:
    assert str(EngineConfiguration("h", 4566, "d", "root", kind="risingwave").refusal(said)) == meant


def test_dbt_without_an_engine_says_so_in_one_sentence(tmp_path_factory: pytest.TempPathFactory) -> None:
    # The folder of the offline compilations, whose parsed project is there already.
    project = Path(__file__).resolve().parents[2] / "dbt_project"
    target = tmp_path_factory.getbasetemp() / "risingwave-offline"
    nowhere = EngineConfiguration("127.0.0.1", 9, "dev", "root", kind="risingwave")
    with pytest.raises(EngineUnavailable) as caught:
        Dbt(nowhere, project, target).run("run", ["raw_items"])
    assert str(caught.value) == (
        "the risingwave engine at 127.0.0.1:9 cannot be reached (Connection refused): check PREFS_ENGINE_HOST and "
        "PREFS_ENGINE_PORT"
    )
