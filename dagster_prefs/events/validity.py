"""Why the typed layer would refuse a message, told before it is sent.

The same rules as the parsed models, reason by reason; a test holds the two equal on random messages.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from dagster_prefs.events.canaries import OF_ANOTHER_DEPLOYMENT, CanaryKey, deployment_of, is_proven
from dagster_prefs.events.fields import MAX_MESSAGE_BYTES, Field, parse_time, too_many_bytes
from dagster_prefs.events.formats import FUTURE_TOLERANCE, Topic, row_fault
from dagster_prefs.online.reserved import (
    CANARY_USER_ID,
    CANARY_VIEWER_ID,
    is_reserved_text,
    is_reserved_viewer,
)

EVENT_TYPES = {
    "user.events": frozenset({"purchase", "wishlist", "add_to_cart", "view"}),
    "content_interactions": frozenset({"like", "share", "search"}),
}
# The reason of what an erasure left: nothing is wrong with it, and nothing of it comes back.
ERASED = "erased"
# Reasons of messages that wait for no correction.
CLOSED = (ERASED, OF_ANOTHER_DEPLOYMENT)

# Beyond these PostgreSQL holds no number, so its JSON does not parse there.
MAX_DIGITS_BEFORE_POINT = 131_072
MAX_DIGITS_AFTER_POINT = 16_383

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rejection_reason(
    message: bytes, topic: Topic, arrived_at: datetime, canary_keys: Collection[CanaryKey] = ()
) -> str | None:
    """Why `rejected_events` would hold this message if it arrived at `arrived_at` (UTC); None if it is valid.

    `canary_keys` are those of the engine. Without them, as for everybody but the probe, no canary is valid.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        return too_many_bytes("message", len(message), MAX_MESSAGE_BYTES)
    try:
        document = json.loads(
            message.decode(), parse_int=_number, parse_float=_number, parse_constant=_no_number
        )
        _check_texts(document)
    except (ValueError, ArithmeticError, RecursionError):
        return "not valid JSON"
    if not isinstance(document, dict):
        return "not a JSON object"
    identity = "item_id" if topic.name == "items" else "event_id"
    if topic.field(identity).text(document.get(identity)) is None:
        if document.get("erased") is True or document.get("erased") == "true":
            return ERASED
        if fault := row_fault(document):
            return fault
    for field in topic.declared:
        if field.optional or field.name == "event_type":
            continue
        if reason := _required_fault(field, document.get(field.name)):
            return reason
    if topic.time_field is not None:
        moment = parse_time(topic.field(topic.time_field).text(document.get(topic.time_field)) or "")
        if moment is not None and moment > arrived_at + FUTURE_TOLERANCE:
            return "event time in the future"
    if "event_type" in topic.required:
        kind = topic.field("event_type").text(document.get("event_type"))
        if kind is None and not _given(document.get("event_type")):
            return "missing event_type"
        if kind not in EVENT_TYPES[topic.name]:
            return "unknown event_type"
    for field in topic.declared:
        if field.optional and (reason := _optional_fault(field, document.get(field.name))):
            return reason
    return _reserved(document, topic, canary_keys)


def _reserved(document: dict[str, Any], topic: Topic, keys: Collection[CanaryKey]) -> str | None:
    """Why a message with a reserved id is rejected; None where it has none, or is a proven canary."""
    if topic.time_field is None:
        return None
    identity = topic.field("event_id").text(document.get("event_id")) or ""
    subject = "viewer_id" if "viewer_id" in topic.fields else "user_id"
    text = topic.field(subject).text(document.get(subject)) or ""
    if subject == "viewer_id":
        viewer = int(text.partition(".")[0])
        reserved, probed = is_reserved_viewer(viewer), viewer == CANARY_VIEWER_ID
    else:
        reserved, probed = is_reserved_text(text), text == CANARY_USER_ID
    deployment = deployment_of(identity) if probed else None
    if deployment is None:
        return (
            f"reserved {subject}" if reserved else "reserved event_id" if is_reserved_text(identity) else None
        )
    own = [key for key in keys if key.deployment == deployment]
    if not own:
        return OF_ANOTHER_DEPLOYMENT
    moment = parse_time(topic.field(topic.time_field).text(document.get(topic.time_field)) or "")
    proven = moment is not None and is_proven(identity, _milliseconds(moment), own)
    return None if proven else f"reserved {subject}"


def _milliseconds(moment: datetime) -> int:
    """Milliseconds since 1970, rounded as the engine rounds them."""
    microseconds = (moment - _EPOCH) // timedelta(microseconds=1)
    return int(Decimal(microseconds).scaleb(-3).to_integral(ROUND_HALF_UP))


def _required_fault(field: Field, value: Any) -> str | None:
    text = field.text(value)
    if text is None:
        return f"bad {field.name}" if _given(value) else f"missing {field.name}"
    return field.fault(text)


def _optional_fault(field: Field, value: Any) -> str | None:
    text = field.text(value)
    if text is not None:
        return field.fault(text)
    # A text of blanks alone is an empty one, but it is no number.
    empty = isinstance(value, str) if field.type == "text" else not _given(value)
    return None if value is None or empty else f"bad {field.name}"


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
    """Raises ValueError for a text that no engine can store: U+0000, or half of a surrogate pair."""
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
