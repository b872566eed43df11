"""How Kafka clients are let in, and which life of a topic is read."""

from __future__ import annotations

import base64
import threading
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from confluent_kafka import Consumer, KafkaException
from pydantic import SecretStr

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.catalog import NotDeployed
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.brokers import KafkaSource, client_properties, msk_token
from dagster_prefs.events.kafka import ingest_topic
from dagster_prefs.events.topics import note_topics, source_name, topic_generations
from dagster_prefs.platform import kafka_security
from dagster_prefs.settings import Settings
from tests.events.conftest import produce

NOW = datetime(2026, 3, 15, tzinfo=UTC)
PASSWORD = SecretStr("open sesame")


def test_plain_text_asks_for_nothing() -> None:
    assert client_properties(kafka_security(Settings(kafka_bootstrap="b:9092"))) == {}


def test_tls_with_a_client_certificate() -> None:
    settings = Settings(
        kafka_bootstrap="b:9093",
        kafka_security_protocol="SSL",
        kafka_ssl_ca_location="/ca.pem",
        kafka_ssl_certificate_pem="CERT",
        kafka_ssl_key_pem=SecretStr("KEY"),
        kafka_ssl_key_password=PASSWORD,
    )
    assert client_properties(kafka_security(settings)) == {
        "security.protocol": "SSL",
        "ssl.ca.location": "/ca.pem",
        "ssl.certificate.pem": "CERT",
        "ssl.key.pem": "KEY",
        "ssl.key.password": "open sesame",
    }


def test_scram_properties_are_what_librdkafka_takes() -> None:
    settings = Settings(
        kafka_bootstrap="b:9094",
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="SCRAM-SHA-512",
        kafka_sasl_username="platform",
        kafka_sasl_password=PASSWORD,
    )
    given = client_properties(kafka_security(settings))
    assert given == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "platform",
        "sasl.password": "open sesame",
    }
    # A property that librdkafka does not know, or not with these values, raises here.
    Consumer({**given, "bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0}).close()
    assert "open sesame" not in repr(settings)


def test_the_msk_token_is_the_presigned_url_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    before = datetime.now(UTC).timestamp()
    token, expires = msk_token("eu-west-1")("")
    assert before + 900 <= expires <= datetime.now(UTC).timestamp() + 900
    assert "=" not in token
    url = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
    assert parts.hostname == "kafka.eu-west-1.amazonaws.com"
    assert query["Action"] == ["kafka-cluster:Connect"]
    assert query["X-Amz-Expires"] == ["900"]
    assert query["User-Agent"]
    assert query["X-Amz-Credential"][0].endswith("/eu-west-1/kafka-cluster/aws4_request")
    # The signature covers what AWS signs: made again for the same second, it is the same.
    request = AWSRequest(
        "GET", "https://kafka.eu-west-1.amazonaws.com/", params={"Action": "kafka-cluster:Connect"}
    )
    signer = SigV4QueryAuth(
        ReadOnlyCredentials("AKIDEXAMPLE", "secret", None), "kafka-cluster", "eu-west-1", 900
    )
    monkeypatch.setattr(
        "botocore.auth.get_current_datetime",
        lambda *_, **__: datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ"),
    )
    signer.add_auth(request)
    assert parse_qs(urlsplit(request.url).query)["X-Amz-Signature"] == query["X-Amz-Signature"]


def test_librdkafka_asks_for_the_msk_token_by_itself(
    monkeypatch: pytest.MonkeyPatch, broker: tuple[str, Any]
) -> None:
    settings = Settings(
        kafka_bootstrap=broker[0], kafka_security_protocol="SASL_SSL", kafka_sasl_mechanism="AWS_MSK_IAM"
    )
    given, asked = client_properties(kafka_security(settings)), threading.Event()

    def sign(text: str) -> tuple[str, float]:
        asked.set()
        return "token", datetime.now(UTC).timestamp() + 900

    consumer = Consumer(
        {**given, "oauth_cb": sign, "bootstrap.servers": broker[0], "group.id": "g", "log_level": 0}
    )
    # No poll: the clients that ask for offsets only would never be let in otherwise.
    assert asked.wait(10)
    consumer.close()


def test_missing_aws_credentials_fail_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.session.Session.get_credentials", lambda _: None)
    with pytest.raises(KafkaException, match="no AWS credentials for MSK: set AWS_PROFILE"):
        msk_token("eu-west-1")("")


@pytest.fixture
def noted(store: EngineConfiguration) -> EngineConfiguration:
    with store.connect() as session:
        session.execute(
            "create table kafka_topics (kafka_topic text primary key, topic_id text, generation int,"
            " noted_at timestamptz)"
        )
    return store


def test_a_topic_enters_its_next_generation_when_its_id_changes(noted: EngineConfiguration) -> None:
    with noted.connect() as session:
        look = lambda identity: note_topics(session, noted, {"t": identity}, now=NOW)["t"]  # noqa: E731
        assert (look("a").state, look("a").state) == ("unnoted", "noted")
        assert look("a").source == "kafka:t"
        # Brokers that tell no ids change nothing.
        assert look(None).state == "unknown"
        assert look("b").state == "recreated"
        life = topic_generations(session, noted, {"t": "b"})["t"]
        assert (life.state, life.generation, life.source) == ("noted", 2, "kafka:t#2")
        assert session.execute("select * from kafka_topics").fetchall() == [("t", "b", 2, NOW)]


def test_the_table_is_missing_before_the_first_run(store: EngineConfiguration) -> None:
    with store.connect() as session, pytest.raises(NotDeployed, match="run `dbt run` in dbt_project/"):
        topic_generations(session, store, {"t": "a"})


def test_a_later_generation_is_read_from_its_start_beside_the_first(
    registry: Registry, store: EngineConfiguration, broker: tuple[str, Any]
) -> None:
    address, _ = broker
    produce(address, "view_events", [b"a", b"b"])
    assert ingest_topic(store, KafkaSource(address), registry.topics["view_events"]).accepted == 2
    again = ingest_topic(
        store, KafkaSource(address, start="latest"), registry.topics["view_events"], generation=2
    )
    assert (again.source, again.accepted) == ("kafka:view_events#2", 2)
    with store.connect() as session:
        found = session.execute(
            "select source, count(*) from raw_view_events group by source order by 1"
        ).fetchall()
    assert found == [(source_name("view_events", 1), 2), (source_name("view_events", 2), 2)]
