"""Why the typed layer would refuse a message, told before it is sent.

The same rules as the parsed models, reason by reason; a test holds the two equal on random messages.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from dagster_prefs.events.formats import FUTURE_TOLERANCE, Topic, parse_time

EVENT_TYPES = {
    "user.events": frozenset({"purchase", "wishlist", "add_to_cart", "view"}),
    "content_interactions": frozenset({"like", "share", "search"}),
}
# The reason of what an erasure left: nothing is wrong with it, and nothing of it comes back.
ERASED = "erased"
WHOLE_NUMBER_BITS = {"viewer_id": 64, "watch_duration_sec": 32}
IN_STOCK = frozenset({"true", "1", "false", "0"})

# Beyond these PostgreSQL holds no number, so its JSON does not parse there.
MAX_DIGITS_BEFORE_POINT = 131_072
MAX_DIGITS_AFTER_POINT = 16_383

_DECIMAL = re.compile(r"-?[0-9]{1,10}([.][0-9]{1,18})?([eE][+-]?[0-9])?")
_WHOLE = re.compile(r"-?[0-9]{1,19}([.]0+)?")
_EPOCH_MS = re.compile(r"[0-9]{1,15}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rejection_reason(message: bytes, topic: Topic, arrived_at: datetime) -> str | None:
    """Why `rejected_events` would hold this message if it arrived at `arrived_at` (UTC); None if it is valid."""
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
    if _written(document.get("erased")) == "true" and _text(document, identity) is None:
        return ERASED
    for name in topic.fields:
        if name in topic.required and name != "event_type" and not _readable(document, name, topic):
            return f"bad {name}" if _given(document, name) else f"missing {name}"
    if topic.time_field is not None and _after(
        _text(document, topic.time_field) or "", arrived_at + FUTURE_TOLERANCE
    ):
        return "event time in the future"
    if "event_type" in topic.required:
        kind = _text(document, "event_type")
        if kind is None and not _given(document, "event_type"):
            return "missing event_type"
        if kind not in EVENT_TYPES[topic.name]:
            return "unknown event_type"
    return _bad_measure(document, topic)


def _bad_measure(document: dict[str, Any], topic: Topic) -> str | None:
    for name in ("price", "watch_duration_sec", "completion_pct"):
        if name not in topic.fields or not _given(document, name):
            continue
        if not _readable(document, name, topic):
            return f"bad {name}"
        value = Decimal(_text(document, name) or "")
        if name == "completion_pct":
            if not 0 <= value <= 1:
                return "completion_pct outside 0..1"
        elif value < 0:
            return f"negative {name}"
    unsaid = "in_stock" not in topic.fields or not _given(document, "in_stock")
    if unsaid or _written(document["in_stock"]).lower() in IN_STOCK:
        return None
    return "bad in_stock"


def _readable(document: dict[str, Any], name: str, topic: Topic) -> bool:
    """Whether a field holds a value of its type."""
    text = _text(document, name)
    if text is None:
        return False
    if name == topic.time_field:
        return bool(_EPOCH_MS.fullmatch(text)) or parse_time(text) is not None
    if name in WHOLE_NUMBER_BITS:
        limit = 1 << (WHOLE_NUMBER_BITS[name] - 1)
        return bool(_WHOLE.fullmatch(text)) and -limit <= int(text.partition(".")[0]) < limit
    if name in ("price", "completion_pct"):
        return bool(_DECIMAL.fullmatch(text))
    return True


def _after(text: str, latest: datetime) -> bool:
    if _EPOCH_MS.fullmatch(text):
        # A number can name a year that datetime cannot.
        return int(text) > (latest - _EPOCH) / timedelta(milliseconds=1)
    moment = parse_time(text)
    return moment is not None and moment > latest


def _text(document: dict[str, Any], name: str) -> str | None:
    """A string or number as trimmed text; None where absent, empty or of another type."""
    value = document.get(name)
    if not isinstance(value, str | Decimal):
        return None
    return _written(value).strip(" \t\r\n") or None


def _given(document: dict[str, Any], name: str) -> bool:
    value = document.get(name)
    return value is not None and value != ""


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        # As the engine spells a number: without exponent, and zero without sign.
        return format(abs(value) if value == 0 else value, "f")
    return str(value)


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


def _check_texts(value: Any) -> None:
    """Raises ValueError for a text that no engine can store: U+0000, or half of a surrogate pair."""
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("U+0000")
        value.encode()
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_texts(name)
            _check_texts(part)
    elif isinstance(value, list):
        for part in value:
            _check_texts(part)
