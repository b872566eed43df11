"""Topics in Avro: decoded with the schemas of a registry, and what happens when it knows none or does not answer.

The registry is a fake of Confluent's API; test_real_schema_registry.py runs against a real one.
"""

from __future__ import annotations

import base64
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastavro import parse_schema

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events import schema_registry
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.kafka import decoder, ingest_topic
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.schema import avro_schema
from dagster_prefs.events.schema_registry import (
    UNDECODED,
    RegistryAddress,
    SchemaRegistry,
    SchemaRegistryUnavailable,
    UnreadableTopic,
    decode_avro,
    refuse_avro,
)
from dagster_prefs.events.validity import rejection_reason
from tests.events.avro_records import NOW, POINT, TOPICS, avro_value, encoded
from tests.events.conftest import produce, rows

SECRET = "hunter2-very-secret"


class FakeRegistry:
    """Confluent's API over what a test registers: schemas by id, and subjects that schemas refer to."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str | None]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked.append((self.path, self.headers["Authorization"]))
                answer = fake.answers.get(self.path, 404)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = RegistryAddress(f"http://127.0.0.1:{self.server.server_port}/")
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def register(self, number: int, schema: Any, **more: Any) -> None:
        self.answers[f"/schemas/ids/{number}"] = {"schema": json.dumps(schema), **more}


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    made = FakeRegistry()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("topic", TOPICS.values(), ids=TOPICS)
def test_a_record_of_the_printed_schema_is_a_valid_event(topic: Topic, fake: FakeRegistry) -> None:
    """What `prefs schema --format avro` prints, registered and written with, with every field and without."""
    schema = avro_schema(topic, "shop")
    fake.register(7, schema)
    registry = SchemaRegistry(fake.address)
    whole = {field.name: avro_value(topic, field) for field in topic.fields}
    least = {field.name: None if field.optional else whole[field.name] for field in topic.fields}
    for record in (whole, least):
        decoded = decode_avro(encoded(7, schema, record), registry)
        assert rejection_reason(decoded, topic, NOW) is None, decoded
        document = json.loads(decoded, parse_int=Decimal, parse_float=Decimal)
        assert document.keys() == whole.keys()
        for field in topic.fields:
            given, read = record[field.name], topic.text(document, field.name)
            if field.type in ("int", "bigint", "decimal") and given is not None:
                assert Decimal(str(read)) == given
            elif field.type == "timestamptz":
                assert topic.limits.years.parse(str(read)) == given
            elif field.type == "text":
                assert document[field.name] == (given if given is None else str(given))
    assert [path for path, _ in fake.asked] == ["/schemas/ids/7"], "the schema of an id never changes"


EVERY_TYPE = {
    "type": "record",
    "name": "all",
    "fields": [
        {"name": "flag", "type": "boolean"},
        {"name": "kind", "type": {"type": "enum", "name": "kinds", "symbols": ["a", "b"]}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 28, "scale": 8}},
        {"name": "micros", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "local", "type": {"type": "long", "logicalType": "local-timestamp-millis"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "raw", "type": "bytes"},
        {"name": "share", "type": "double"},
        {"name": "nested", "type": {"type": "map", "values": {"type": "array", "items": "long"}}},
    ],
}
RECORD = {
    "flag": True,
    "kind": "b",
    "price": Decimal("-0.00000001"),
    "micros": datetime(2026, 3, 15, 10, 30, 0, 123456, tzinfo=UTC),
    "local": datetime(2026, 3, 15, 10, 30),
    "day": NOW.date(),
    "id": uuid.UUID(int=5),
    "raw": "é".encode(),
    "share": 0.25,
    "nested": {"a": [2**62]},
}


def test_each_type_becomes_json(fake: FakeRegistry) -> None:
    fake.register(1, EVERY_TYPE, schemaType="AVRO")
    assert json.loads(decode_avro(encoded(1, EVERY_TYPE, RECORD), SchemaRegistry(fake.address))) == {
        "flag": True,
        "kind": "b",
        "price": "-0.00000001",
        "micros": "2026-03-15T10:30:00.123456+00:00",
        "local": "2026-03-15T10:30:00",
        "day": "2026-03-15",
        "id": "00000000-0000-0000-0000-000000000005",
        "raw": "é",
        "share": 0.25,
        "nested": {"a": [2**62]},
    }


def test_a_schema_may_refer_to_others(fake: FakeRegistry) -> None:
    named: dict[str, Any] = {}
    parse_schema(POINT, named_schemas=named)
    line = {"type": "record", "name": "Line", "fields": [{"name": "end", "type": "geo.Point"}]}
    fake.register(3, line, references=[{"name": "geo.Point", "subject": "geo/point", "version": 2}])
    fake.answers["/subjects/geo%2Fpoint/versions/2"] = {"schema": json.dumps(POINT)}
    message = encoded(3, line, {"end": {"x": 5}}, named=named)
    assert json.loads(decode_avro(message, SchemaRegistry(fake.address))) == {"end": {"x": 5}}


def test_what_cannot_be_decoded_is_kept_as_it_came_and_rejected(fake: FakeRegistry) -> None:
    topic = replace(TOPICS["dbt_project:view_events"], format="avro")
    fake.register(1, EVERY_TYPE)
    fake.register(2, {"type": "object"}, schemaType="JSON")
    fake.register(3, {"type": "record", "name": "lacks its fields"})
    fake.register(4, "double")
    good = encoded(1, EVERY_TYPE, RECORD)
    registry = SchemaRegistry(fake.address)
    kept = [
        good[:-1],
        good + b"x",
        encoded(1, EVERY_TYPE, RECORD | {"raw": b"\xff"}),
        encoded(4, "double", float("nan")),
        *(b"\x00" + number.to_bytes(4, "big") + good[5:] for number in (2, 3, 99)),
        good[:5],
        good[:3],
        b"\x00",
    ]
    for message in kept:
        assert decode_avro(message, registry) == message
        assert rejection_reason(message, topic, NOW) == UNDECODED
    # JSON of a file, a replay or the probe has no header.
    assert decode_avro(b'{"a": 1}', registry) == b'{"a": 1}'
    assert rejection_reason(b"{", topic, NOW) == "not valid JSON"


def test_an_unknown_id_is_asked_for_again_and_a_known_one_never(fake: FakeRegistry) -> None:
    now = [0.0]
    registry = SchemaRegistry(fake.address, clock=lambda: now[0])
    message = encoded(9, POINT, {"x": 1})
    for _ in range(3):
        assert decode_avro(message, registry) == message
    assert len(fake.asked) == 1
    fake.register(9, POINT)
    now[0] = schema_registry.UNKNOWN_SECONDS
    for _ in range(3):
        assert decode_avro(message, registry) == b'{"x": 1}'
    assert len(fake.asked) == 2


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (401, "PREFS_SCHEMA_REGISTRY_PASSWORD"),
        (500, "answered 500"),
        (b"<html>", "gave no answer"),
        (b"[]", "no JSON object"),
    ],
)
def test_a_registry_that_does_not_answer_stops_the_reading(
    fake: FakeRegistry, answer: Any, told: str
) -> None:
    address = replace(fake.address, user="reader", password=SECRET)
    fake.answers["/schemas/ids/9"] = answer
    with pytest.raises(SchemaRegistryUnavailable, match=told) as caught:
        decode_avro(encoded(9, POINT, {"x": 1}), SchemaRegistry(address))
    assert SECRET not in f"{caught.value}{address!r}"
    expected = base64.b64encode(f"reader:{SECRET}".encode()).decode()
    assert fake.asked == [("/schemas/ids/9", f"Basic {expected}")]


def test_a_topic_in_avro_is_read_from_kafka(
    registry: Registry, store: EngineConfiguration, broker: tuple[str, Any], fake: FakeRegistry
) -> None:
    """An outage of the registry loses nothing, and neither does a schema that it does not have."""
    address, _ = broker
    topic = replace(registry.topics["view_events"], format="avro")
    fake.answers["/schemas/ids/1"] = 503
    known, unknown = encoded(1, POINT, {"x": 1}), encoded(2, POINT, {"x": 2})
    produce(address, "view_events", [known, unknown, b'{"x": 3}'])
    kafka = KafkaSource(address, schemas=fake.address)
    with pytest.raises(SchemaRegistryUnavailable, match="503"):
        ingest_topic(store, kafka, topic)
    fake.register(1, POINT)
    assert ingest_topic(store, kafka, topic).accepted == 3
    found = {bytes(data) for (data,) in rows(store, "select data from raw_view_events")}
    assert found == {b'{"x": 1}', unknown, b'{"x": 3}'}

    # What other topics hold is stored as it came.
    plain = replace(topic, format="json_schema")
    assert decoder(plain, KafkaSource(address))(known) == known
    with pytest.raises(SchemaRegistryUnavailable, match="PREFS_SCHEMA_REGISTRY_URL"):
        decoder(topic, KafkaSource(address))


def test_risingwave_refuses_avro_in_one_sentence(registry: Registry) -> None:
    topics = list(registry.topics.values())
    refuse_avro([*topics, replace(topics[0], format="json_schema")])
    with pytest.raises(UnreadableTopic, match=rf"^topic {topics[0].name} is Avro, .* format: json_schema$"):
        refuse_avro([replace(topics[0], format="avro"), *topics[1:]])
