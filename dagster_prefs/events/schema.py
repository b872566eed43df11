"""A topic's schema for its producers, from its declaration: JSON Schema, and Avro with the same fields.

The platform reads more than the JSON Schema describes (numbers in texts, times in other formats): a message that
satisfies the schema is accepted, whatever a schema can express of the rules. It cannot express bytes in UTF-8 (its
lengths are characters), days of a month, or that a time must not lie in the future.
"""

from __future__ import annotations

from typing import Any

from dagster_prefs.declarations.registry import FieldDeclaration
from dagster_prefs.declarations.reserved import PREFIX, UUID_PREFIX
from dagster_prefs.events.fields import DIGITS
from dagster_prefs.events.messages import Topic
from dagster_prefs.ids import INT64

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_INT32 = 1 << 31
# U+0000 can be stored by no engine, and a text of blanks counts as empty.
_NO_NUL = r"^[^\u0000]*$"
_NOT_EMPTY = r"^[^\u0000]*[^\u0000 \t\r\n][^\u0000]*$"
_UUID = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
# RFC 3339, which is the recommended one of the formats that are read.
_TIME = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]+)?"
    r"(Z|[+-](0[0-9]|1[0-5]):[0-5][0-9])$"
)


def json_schema(topic: Topic) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a topic's messages."""
    return {
        "$schema": DIALECT,
        "title": topic.name,
        "description": f"One message of at most {topic.limits.max_bytes} bytes. Further fields are ignored.",
        "type": "object",
        "properties": {field.name: _property(topic, field) for field in topic.fields},
        "required": [field.name for field in topic.fields if not field.optional],
        "additionalProperties": True,
    }


def avro_schema(topic: Topic, namespace: str) -> dict[str, Any]:
    """Return the Avro schema of a record with a topic's fields; an optional one may be null, its default.

    The platform itself reads JSON: this is for a registry, and for other consumers of the same fields.
    """
    fields = []
    for field in topic.fields:
        kind = _avro_type(topic, field)
        entry: dict[str, Any] = {"name": field.name, "type": ["null", kind] if field.optional else kind}
        if field.description:
            entry["doc"] = field.description
        if field.optional:
            entry["default"] = None
        fields.append(entry)
    return {"type": "record", "name": topic.relation, "namespace": namespace, "fields": fields}


def _property(topic: Topic, field: FieldDeclaration) -> dict[str, Any]:
    rules = _rules(topic, field)
    if "enum" in rules:
        rules["enum"] += [None] if field.optional else []
    elif field.optional:
        rules["type"] = [rules["type"], "null"]
    notes = [field.description] if field.description else []
    if field.type == "text" and field.max_bytes is not None:
        notes.append(f"At most {field.max_bytes} bytes in UTF-8.")
    if field.type == "decimal":
        notes.append(f"Rounded to {field.scale or 0} places.")
    if field.type == "timestamptz":
        notes.append(f"In the years {topic.limits.years.first} to {topic.limits.years.last}.")
    return {**({"description": " ".join(notes)} if notes else {}), **rules}


def _rules(topic: Topic, field: FieldDeclaration) -> dict[str, Any]:
    own_key = topic.key is not None and field.name == topic.key.name
    if field.accepted:
        return {"enum": list(field.accepted)}
    if field.name in topic.uuids:
        reserved = {"not": {"pattern": f"^{UUID_PREFIX}"}} if own_key else {}
        return {"type": "string", "format": "uuid", "pattern": _UUID, **reserved}
    if field.type == "text":
        length = {} if field.max_bytes is None else {"maxLength": field.max_bytes}
        names_canaries = topic.key is not None and (own_key or field.name == topic.identity)
        reserved = {"not": {"pattern": rf"^[ \t\r\n]*{PREFIX}"}} if names_canaries else {}
        return {"type": "string", "pattern": _NO_NUL if field.optional else _NOT_EMPTY, **length, **reserved}
    if field.type == "timestamptz":
        return {"type": "string", "format": "date-time", "pattern": _TIME}
    if field.type == "boolean":
        return {"type": "boolean"}
    if field.type == "decimal":
        most = 10 ** (DIGITS - (field.scale or 0)) - 1
        return {"type": "number", **_range(field, -most, most)}
    least, most = (-_INT32, _INT32 - 1) if field.type == "int" else (-INT64, INT64 - 1)
    # Negative ids of the key are the canaries'.
    return {"type": "integer", **_range(field, 0 if own_key else least, most)}


def _range(field: FieldDeclaration, least: int, most: int) -> dict[str, int]:
    low = least if field.minimum is None else max(least, field.minimum)
    return {"minimum": low, "maximum": most if field.maximum is None else min(most, field.maximum)}


def _avro_type(topic: Topic, field: FieldDeclaration) -> Any:
    if field.name in topic.uuids:
        return {"type": "string", "logicalType": "uuid"}
    if field.type == "decimal":
        return {"type": "bytes", "logicalType": "decimal", "precision": DIGITS, "scale": field.scale or 0}
    # An enum would make a new accepted value a break of the schema, so that accepted texts stay strings.
    return {
        "text": "string",
        "bigint": "long",
        "int": "int",
        "boolean": "boolean",
        "timestamptz": {"type": "long", "logicalType": "timestamp-millis"},
    }[field.type]
