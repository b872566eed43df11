"""Topics with the schemas of a real registry that speaks Confluent's API; skipped unless one is named.

TEST_SCHEMA_REGISTRY_URL names it, e.g. http://127.0.0.1:8080/apis/ccompat/v7 of Apicurio. Every run registers subjects
of its own there.
"""

from __future__ import annotations

import json
import os
import urllib.request
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import quote

import pytest
from fastavro import parse_schema

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.kafka import ingest_topic
from dagster_prefs.events.schema import avro_schema, json_schema
from dagster_prefs.events.schema_registry import RegistryAddress, SchemaRegistry, decode_avro
from dagster_prefs.events.validity import rejection_reason
from tests.events.avro_records import NOW, POINT, TOPICS, avro_value, encoded
from tests.events.conftest import produce, rows

URL = os.environ.get("TEST_SCHEMA_REGISTRY_URL", "")

pytestmark = pytest.mark.skipif(not URL, reason="TEST_SCHEMA_REGISTRY_URL names no registry")

RUN = uuid.uuid4().hex


def register(subject: str, schema: Any, kind: str = "AVRO", references: Any = ()) -> int:
    """Register a schema as a producer does, and return its id."""
    body = {"schema": json.dumps(schema), "schemaType": kind, "references": list(references)}
    request = urllib.request.Request(
        f"{URL.rstrip('/')}/subjects/{quote(f'{RUN}-{subject}', safe='')}/versions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return int(json.load(answer)["id"])


@pytest.fixture
def schemas() -> SchemaRegistry:
    return SchemaRegistry(RegistryAddress(URL))


@pytest.mark.parametrize("name", TOPICS)
def test_a_record_of_each_printed_schema_is_a_valid_event(name: str, schemas: SchemaRegistry) -> None:
    topic = TOPICS[name]
    # The subject of a topic of Kafka, as serializers name it.
    schema = avro_schema(topic, f"run_{RUN}")
    number = register(f"{topic.name}-value", schema)
    record = {field.name: avro_value(topic, field) for field in topic.fields}
    decoded = decode_avro(encoded(number, schema, record), schemas)
    assert rejection_reason(decoded, replace(topic, format="avro"), NOW) is None, decoded

    document = {
        field.name: value.isoformat()
        if isinstance(value, datetime)
        else str(value)
        if field.type == "text"
        else value
        for field in topic.fields
        for value in [avro_value(topic, field)]
    }
    framed = b"\x00" + register(f"{topic.name}-json", json_schema(topic), "JSON").to_bytes(4, "big")
    message = framed + json.dumps(document, default=float).encode()
    assert rejection_reason(message, replace(topic, format="json_schema"), NOW) is None
    # In a topic of Avro it is kept as it came: its schema is of another kind.
    assert decode_avro(message, schemas) == message


def test_a_schema_that_refers_to_another_is_read(schemas: SchemaRegistry) -> None:
    point = POINT | {"namespace": f"geo_{RUN}"}
    named: dict[str, Any] = {}
    parse_schema(point, named_schemas=named)
    register("geo/point", point)
    name = f"geo_{RUN}.Point"
    line = {"type": "record", "name": "Line", "fields": [{"name": "end", "type": name}]}
    number = register("line", line, references=[{"name": name, "subject": f"{RUN}-geo/point", "version": 1}])
    assert json.loads(decode_avro(encoded(number, line, {"end": {"x": 5}}, named=named), schemas)) == {
        "end": {"x": 5}
    }


def test_messages_of_kafka_are_decoded_with_its_schemas(
    registry: Registry, store: EngineConfiguration, broker: tuple[str, Any]
) -> None:
    address, _ = broker
    topic = replace(registry.topics["view_events"], format="avro")
    schema = POINT | {"namespace": f"kafka_{RUN}"}
    known = encoded(register("view_events-value", schema), schema, {"x": 1})
    unknown = encoded(2**31 - 1, schema, {"x": 2})
    produce(address, "view_events", [known, unknown])
    assert ingest_topic(store, KafkaSource(address, schemas=RegistryAddress(URL)), topic).accepted == 2
    found = {bytes(data) for (data,) in rows(store, "select data from raw_view_events")}
    assert found == {b'{"x": 1}', unknown}
