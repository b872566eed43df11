"""Records in Avro, as a producer writes them with the schema that `prefs schema` prints."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from typing import Any

from declared import COURSES, PROJECT
from fastavro import parse_schema, schemaless_writer

from dagster_prefs.declarations.registry import FieldDeclaration, load_registry
from dagster_prefs.declarations.reserved import canary_value
from dagster_prefs.events.messages import Topic, topics_of

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
TOPICS = {
    f"{project.name}:{name}": topic
    for project in (PROJECT, COURSES)
    for name, topic in topics_of(load_registry(project)).items()
}
POINT = {"type": "record", "name": "Point", "namespace": "geo", "fields": [{"name": "x", "type": "int"}]}


def encoded(number: int, schema: Any, document: Any, *, named: Any = None) -> bytes:
    """A message as Confluent's serializer writes it."""
    body = BytesIO()
    schemaless_writer(body, parse_schema(schema, named_schemas=named or {}), document)
    return b"\x00" + number.to_bytes(4, "big") + body.getvalue()


def avro_value(topic: Topic, field: FieldDeclaration) -> Any:
    """A valid value of a field, as a producer's record has it."""
    value = canary_value(field)
    if field.name in topic.uuids:
        return uuid.UUID(str(value))
    if field.type == "timestamptz":
        return datetime(2026, 3, 15, 10, 30, 0, 123000, tzinfo=UTC)
    return (
        Decimal(str(value)).quantize(Decimal(1).scaleb(-(field.scale or 0)))
        if field.type == "decimal"
        else value
    )
