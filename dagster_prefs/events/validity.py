"""The typed layer's reasons for rejecting a message, determined before it is sent.

The same rules as in the parsed models, reason by reason; a test compares the two on random messages.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from dagster_prefs.declarations.registry import FieldDeclaration, Key
from dagster_prefs.declarations.reserved import canary_of, is_reserved, is_reserved_text
from dagster_prefs.events.canaries import OF_ANOTHER_DEPLOYMENT, CanaryKey, deployment_of, is_proven
from dagster_prefs.events.fields import field_fault, field_text, too_many_bytes
from dagster_prefs.events.formats import row_fault
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.schema_registry import MAGIC, UNDECODED, unframed
from dagster_prefs.ids import BadId, read_key

# The reason of erased messages: nothing is wrong with them, and their content cannot be restored.
ERASED = "erased"
# Reasons of messages that need no correction.
CLOSED = (ERASED, OF_ANOTHER_DEPLOYMENT)

# PostgreSQL stores no number beyond these, so its JSON does not parse there.
MAX_DIGITS_BEFORE_POINT = 131_072
MAX_DIGITS_AFTER_POINT = 16_383

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rejection_reason(
    message: bytes, topic: Topic, arrived_at: datetime, canary_keys: Collection[CanaryKey] = ()
) -> str | None:
    """Return why a message that arrives at `arrived_at` (UTC) would be rejected, None if it is valid.

    `canary_keys` are those of the engine. Without them, as for every producer but the probe, no canary is
    valid.
    """
    if topic.format == "json_schema":
        message = unframed(message)
    if topic.format == "avro" and message.startswith(MAGIC):
        return UNDECODED
    if len(message) > topic.limits.max_bytes:
        return too_many_bytes("message", len(message), topic.limits.max_bytes)
    try:
        document = json.loads(
            message.decode(), parse_int=_number, parse_float=_number, parse_constant=_no_number
        )
        _check_texts(document)
    except (ValueError, ArithmeticError, RecursionError):
        return "not valid JSON"
    if not isinstance(document, dict):
        return "not a JSON object"
    if topic.text(document, topic.identity) is None:
        if document.get("erased") is True or document.get("erased") == "true":
            return ERASED
        if fault := row_fault(document):
            return fault
    for field in topic.fields:
        if not field.optional and not field.accepted and (reason := _required_fault(topic, field, document)):
            return reason
    moment = topic.moment(document)
    if moment is not None and moment > arrived_at + topic.limits.future_tolerance:
        return "event time in the future"
    for field in topic.fields:
        if not field.optional and field.accepted and (reason := _required_fault(topic, field, document)):
            return reason
    for field in topic.fields:
        if field.optional and (reason := _optional_fault(topic, field, document)):
            return reason
    return _reserved(document, topic, canary_keys)


def _reserved(document: dict[str, Any], topic: Topic, keys: Collection[CanaryKey]) -> str | None:
    """Return why a message with a reserved id is rejected; None if it has none, or is a proven canary."""
    if topic.key is None:
        return None
    identity = topic.text(document, topic.identity) or ""
    text = topic.text(document, topic.key.name) or ""
    value = text if topic.key.type == "text" else read_key(topic.key, text)
    deployment = deployment_of(identity) if value == canary_of(topic.key) else None
    if deployment is None:
        if is_reserved(topic.key, value):
            return f"reserved {topic.key.name}"
        return f"reserved {topic.identity}" if is_reserved_text(identity) else None
    own = [key for key in keys if key.deployment == deployment]
    if not own:
        return OF_ANOTHER_DEPLOYMENT
    moment = topic.moment(document)
    proven = moment is not None and is_proven(identity, _milliseconds(moment), own)
    return None if proven else f"reserved {topic.key.name}"


def _milliseconds(moment: datetime) -> int:
    """Return milliseconds since 1970, rounded as the engine rounds them."""
    microseconds = (moment - _EPOCH) // timedelta(microseconds=1)
    return int(Decimal(microseconds).scaleb(-3).to_integral(ROUND_HALF_UP))


def _required_fault(topic: Topic, field: FieldDeclaration, document: dict[str, Any]) -> str | None:
    value = document.get(field.name)
    text = field_text(field, value)
    if text is not None:
        return _fault(topic, field, text)
    if not _given(value):
        return f"missing {field.name}"
    return f"unknown {field.name}" if field.accepted else f"bad {field.name}"


def _optional_fault(topic: Topic, field: FieldDeclaration, document: dict[str, Any]) -> str | None:
    value = document.get(field.name)
    text = field_text(field, value)
    if text is not None:
        return _fault(topic, field, text)
    # A text field with only blanks counts as empty; a number field with a text of blanks is invalid.
    empty = isinstance(value, str) if field.type == "text" else not _given(value)
    return None if value is None or empty else f"bad {field.name}"


def _fault(topic: Topic, field: FieldDeclaration, text: str) -> str | None:
    if field.name in topic.uuids and not _is_uuid(field.name, text):
        return f"bad {field.name}"
    return field_fault(field, text, topic.limits.years)


def _is_uuid(name: str, text: str) -> bool:
    """Whether the text of a field is a UUID, where it must be one; the field is declared as a text."""
    try:
        read_key(Key(name, "uuid"), text)
    except BadId:
        return False
    return True


def _given(value: Any) -> bool:
    return value is not None and value != ""


def _number(text: str) -> Decimal:
    value = Decimal(text)
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError(text)
    if value.adjusted() >= MAX_DIGITS_BEFORE_POINT or exponent < -MAX_DIGITS_AFTER_POINT:
        raise ValueError(text)
    return value


def _no_number(text: str) -> Any:
    raise ValueError(text)


def _check_texts(document: Any) -> None:
    """Raise ValueError for a text that no engine can store: U+0000, or half of a surrogate pair."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if "\x00" in value:
                raise ValueError("U+0000")
            value.encode()
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
