"""Why the brokers do not let a client in: Kafka's own reason and the setting, soon, wherever Kafka is used.

Brokers that refuse are played at the socket; the same cases against Kafka 4.1 are tried by hand.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from declared import PROJECT
from pydantic import SecretStr
from shipped import REGISTRY

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.brokers import KafkaSource, client_properties
from dagster_prefs.events.contact import Contact, KafkaUnavailable
from dagster_prefs.events.kafka import KafkaWriter, holds_messages, ingest_topic
from dagster_prefs.events.topics import broker_ids
from dagster_prefs.freshness.canary import send_canary
from dagster_prefs.freshness.ingestion import Broker
from dagster_prefs.freshness.measures import measure_ingestion
from dagster_prefs.platform import Platform, kafka_security
from dagster_prefs.settings import Settings
from tests.events.kafka_faults import FaultyBroker, running, untrusted_listener

TOPIC = "view_events"
PASSWORD = "open sesame"
# Whoever waited for the time-out would wait for ten minutes: that these tests end shows that nobody does.
PATIENCE = 600.0


@dataclass(frozen=True)
class Fault:
    """Settings that do not get in; what the message says of it, and the settings that it names."""

    settings: Settings
    said: str
    names: tuple[str, ...]

    @property
    def bootstrap(self) -> str:
        return self.settings.kafka_bootstrap or ""

    @property
    def client(self) -> Mapping[str, Any]:
        return client_properties(kafka_security(self.settings))


def sasl(address: str, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "kafka_bootstrap": address,
        "kafka_security_protocol": "SASL_PLAINTEXT",
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_sasl_username": "platform",
        "kafka_sasl_password": SecretStr(PASSWORD),
    }
    return Settings(**given | more)


@pytest.fixture(
    params=["password", "mechanism", "certificate", "certificate and password", "host", "access", "ca file"]
)
def fault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fault]:
    kind = request.param
    with ExitStack() as stack:
        tls = untrusted_listener(tmp_path) if "certificate" in kind else None
        broker = stack.enter_context(
            running(
                FaultyBroker(
                    tls=tls,
                    topic_error=KafkaError.TOPIC_AUTHORIZATION_FAILED if kind == "access" else 0,
                    mechanisms=("SCRAM-SHA-512",) if kind == "mechanism" else ("PLAIN", "SCRAM-SHA-512"),
                )
            )
        )
        address = broker.address
        yield {
            "password": Fault(
                sasl(address),
                "Authentication failed: Invalid username or password",
                ("PREFS_KAFKA_SASL_USERNAME", "PREFS_KAFKA_SASL_PASSWORD"),
            ),
            "mechanism": Fault(
                sasl(address), "supported mechanisms: SCRAM-SHA-512", ("PREFS_KAFKA_SASL_MECHANISM",)
            ),
            "certificate": Fault(
                Settings(kafka_bootstrap=address, kafka_security_protocol="SSL"),
                "certificate verify failed",
                ("PREFS_KAFKA_SSL_CA_LOCATION", "PREFS_KAFKA_SSL_CA_PEM"),
            ),
            "certificate and password": Fault(
                sasl(
                    address,
                    kafka_security_protocol="SASL_SSL",
                    kafka_ssl_ca_location=str(tmp_path / "cert.pem"),
                ),
                "Authentication failed: Invalid username or password",
                ("PREFS_KAFKA_SASL_PASSWORD",),
            ),
            "host": Fault(
                Settings(kafka_bootstrap="broker.invalid:9092"),
                "Failed to resolve 'broker.invalid:9092'",
                ("PREFS_KAFKA_BOOTSTRAP",),
            ),
            "access": Fault(
                Settings(kafka_bootstrap=address),
                "Topic authorization failed",
                ("grant Describe and Read", "topic view_events", "PREFS_KAFKA_TOPIC_"),
            ),
            "ca file": Fault(
                Settings(
                    kafka_bootstrap=address,
                    kafka_security_protocol="SSL",
                    kafka_ssl_ca_location=str(tmp_path / "nowhere.pem"),
                ),
                "ssl.ca.location failed",
                ("PREFS_KAFKA_SSL_CA_LOCATION",),
            ),
        }[kind]


def check(said: str, fault: Fault) -> None:
    assert fault.said in said
    for name in fault.names:
        assert name in said
    assert PASSWORD not in said


def consume(store: EngineConfiguration, fault: Fault) -> Any:
    return ingest_topic(
        store,
        KafkaSource(fault.bootstrap, client=fault.client),
        fault.settings.registry().topics[TOPIC],
        timeout_seconds=PATIENCE,
    )


def consume_for_ever(store: EngineConfiguration, fault: Fault) -> Any:
    return ingest_topic(
        store,
        KafkaSource(fault.bootstrap, client=fault.client),
        fault.settings.registry().topics[TOPIC],
        timeout_seconds=PATIENCE,
        stop=threading.Event(),
    )


def look_for_messages(_: EngineConfiguration, fault: Fault) -> Any:
    return holds_messages(fault.bootstrap, TOPIC, client=fault.client, timeout_seconds=PATIENCE)


def lag(_: EngineConfiguration, fault: Fault) -> Any:
    with Broker(fault.bootstrap, client=fault.client, timeout_seconds=PATIENCE) as broker:
        return broker.watermarks(TOPIC)


def produce(_: EngineConfiguration, fault: Fault) -> Any:
    KafkaWriter(fault.bootstrap, client=fault.client, timeout_seconds=PATIENCE).check(TOPIC)


def canary(store: EngineConfiguration, fault: Fault) -> Any:
    moment = datetime(2026, 3, 10, tzinfo=UTC)
    send_canary(
        store, REGISTRY, moment, bootstrap=fault.bootstrap, client=fault.client, timeout_seconds=PATIENCE,
        kafka_topics=dict.fromkeys(("content_interactions", "user.events"), TOPIC),
    )  # fmt: skip


@pytest.mark.parametrize(
    "use", [consume, consume_for_ever, look_for_messages, lag, produce, canary], ids=lambda use: use.__name__
)
def test_the_reason_and_the_setting_are_in_the_message(
    store: EngineConfiguration, fault: Fault, use: Callable[[EngineConfiguration, Fault], Any]
) -> None:
    with pytest.raises(PrefsError) as caught:
        use(store, fault)
    check(str(caught.value), fault)


def test_topics_are_not_told(store: EngineConfiguration, fault: Fault) -> None:
    with pytest.raises(KafkaUnavailable) as caught:
        broker_ids(fault.bootstrap, [TOPIC], client=fault.client, timeout_seconds=PATIENCE)
    check(str(caught.value), fault)


def test_prefs_topics_and_the_feeds_say_why() -> None:
    """`prefs topics`, `prefs consume` before it reads, and the feeds of RisingWave in Dagster."""
    with running(FaultyBroker()) as broker:
        fault = Fault(sasl(broker.address), "Invalid username or password", ("PREFS_KAFKA_SASL_PASSWORD",))
        with pytest.raises(KafkaUnavailable) as caught:
            Platform(fault.settings).kafka_topics()
    check(str(caught.value), fault)


def test_freshness_says_it_of_every_topic(store: EngineConfiguration, fault: Fault) -> None:
    """`prefs status`, `/metrics` and the sensor."""
    measures = measure_ingestion(
        store,
        REGISTRY,
        KafkaSource(
            fault.bootstrap,
            dict.fromkeys(load_contract(PROJECT).freshness.topics, TOPIC),
            client=fault.client,
        ),
        now=datetime.now(UTC),
        timeout_seconds=PATIENCE,
        by_id=True,
    )
    assert len(measures) == len(load_contract(PROJECT).freshness.topics)
    for found in measures:
        assert found.level == "unknown"
        check(found.reason, fault)


def test_messages_that_are_not_taken_say_why(store: EngineConfiguration, tmp_path: Path) -> None:
    """Without a check before: the producer alone knows."""
    with running(FaultyBroker()) as broker:
        fault = Fault(sasl(broker.address), "Invalid username or password", ("PREFS_KAFKA_SASL_PASSWORD",))
        writer = KafkaWriter(fault.bootstrap, client=fault.client, timeout_seconds=PATIENCE)
        writer.send(TOPIC, b"{}")
        with pytest.raises(KafkaUnavailable) as caught:
            writer.flush()
        check(str(caught.value), fault)


def test_one_bad_address_among_good_ones_is_no_fault(broker: tuple[str, Any]) -> None:
    address, producer = broker
    producer.produce(TOPIC, b"x")
    assert producer.flush(60) == 0
    assert holds_messages(f"broker.invalid:9092,{address}", TOPIC) is True


def test_a_listener_of_another_protocol_is_told_by_the_log(tmp_path: Path) -> None:
    with (
        running(FaultyBroker(tls=untrusted_listener(tmp_path))) as broker,
        pytest.raises(
            KafkaUnavailable, match=r"Disconnected.*check PREFS_KAFKA_BOOTSTRAP, PREFS_KAFKA_SECURITY"
        ),
    ):
        holds_messages(broker.address, TOPIC, timeout_seconds=PATIENCE)


def test_a_refusal_that_was_overcome_is_forgotten() -> None:
    contact = Contact(Consumer, "127.0.0.1:1", None, properties={"group.id": "g"})
    try:
        contact._reports.error(KafkaError(KafkaError._AUTHENTICATION, "once"))
        contact.check()
        contact._reports.error(KafkaError(KafkaError._ALL_BROKERS_DOWN))
        with pytest.raises(KafkaUnavailable, match="once"):
            contact.check()
        contact.heard()
        contact.check()
    finally:
        contact.client.close()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (KafkaError.GROUP_AUTHORIZATION_FAILED, "grant Read on the groups dagster-prefs… to user platform"),
        (
            KafkaError.CLUSTER_AUTHORIZATION_FAILED,
            "grant Write on the topics (before Kafka 3.0 also Idempo",
        ),
        (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            "grant Describe and Read (to produce: Write) on topic t to user",
        ),
        (KafkaError._TRANSPORT, "check PREFS_KAFKA_BOOTSTRAP"),
    ],
)
def test_every_refusal_has_a_remedy(code: int, remedy: str) -> None:
    client = {"sasl.username": "platform", "sasl.mechanism": "PLAIN", "sasl.password": PASSWORD}
    contact = Contact(
        Consumer,
        "127.0.0.1:1",
        client | {"security.protocol": "SASL_PLAINTEXT"},
        properties={"group.id": "g"},
    )
    try:
        assert remedy in str(contact.unavailable("does not serve", KafkaError(code), "t"))
    finally:
        contact.client.close()


def test_a_client_goes_with_its_contact() -> None:
    """What only the garbage collector finds is destroyed after the interpreter, and with it the process."""
    gc.disable()
    try:
        contact = Contact(Consumer, "127.0.0.1:1", None, properties={"group.id": "g"})
        client = weakref.ref(contact._reports)
        contact.client.close()
        del contact
        assert client() is None
    finally:
        gc.enable()


def test_an_msk_identity_has_other_settings() -> None:
    contact = Contact(
        Consumer,
        "127.0.0.1:1",
        {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "OAUTHBEARER",
            "oauth_cb": lambda _: ("t", datetime.now(UTC).timestamp() + 900),
        },
        properties={"group.id": "g"},
    )
    try:
        said = str(contact.unavailable("does not answer", KafkaError(KafkaError._AUTHENTICATION, "no")))
        assert "AWS credentials, PREFS_KAFKA_MSK_REGION and PREFS_KAFKA_MSK_ROLE_ARN" in said
    finally:
        contact.client.close()


def test_missing_aws_credentials_are_told_at_once(
    store: EngineConfiguration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.session.Session.get_credentials", lambda _: None)
    settings = Settings(
        kafka_bootstrap="127.0.0.1:1",
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="AWS_MSK_IAM",
    )
    fault = Fault(settings, "no AWS credentials for MSK", ("AWS_PROFILE", "PREFS_KAFKA_MSK_ROLE_ARN"))
    for use in (consume, lag, produce, canary):
        with pytest.raises(KafkaUnavailable) as caught:
            use(store, fault)
        check(str(caught.value), fault)


def test_a_producer_that_may_not_write_is_told_so_by_every_call() -> None:
    """An idempotent producer that is refused once raises that from whatever is called next."""
    with running(FaultyBroker()) as broker:
        for use in (_send_and_flush, _send_for_ever):
            writer = KafkaWriter(broker.address, timeout_seconds=PATIENCE)
            with pytest.raises(
                KafkaUnavailable, match=r"Cluster authorization failed.*grant Write on the topics"
            ):
                use(writer)


def test_a_reason_that_comes_after_the_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client refuses messages a moment before it reports why."""

    class Rejected:
        polls = 0

        def produce(self, topic: str, **_: Any) -> None:
            raise KafkaException(KafkaError(KafkaError._FATAL))

        def poll(self, seconds: float) -> int:
            self.polls += 1
            if self.polls < 3:
                return 0
            raise KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED))

    writer = KafkaWriter("127.0.0.1:1", timeout_seconds=PATIENCE)
    monkeypatch.setattr(writer, "_producer", Rejected())
    with pytest.raises(KafkaUnavailable, match="grant Write on the topics"):
        writer.send(TOPIC, b"{}")


def _send_and_flush(writer: KafkaWriter) -> None:
    writer.send(TOPIC, b"{}")
    writer.flush()


def _send_for_ever(writer: KafkaWriter) -> None:
    while True:
        writer.send(TOPIC, b"{}")
