"""The REES46 format of shop events in CSV files, a data source for the example's shop.

The mapping produces messages of one topic of the example. Projects without that topic are not offered the
mapping.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from dagster_prefs.events.fields import cell_text
from dagster_prefs.events.messages import Topic

TOPIC = "user.events"
COLUMNS = (
    "event_time", "event_type", "product_id", "category_id", "category_code", "brand", "price", "user_id",
    "user_session",
)  # fmt: skip
NAMES = {"product_id": "item_id", "category_code": "category", "user_session": "session_id"}
# The columns that identify a row, in the order of hashing. Not the topic's own order: event ids must not
# change with its declaration, or a file that is ingested again would count twice.
_IDENTIFYING = (
    "event_id", "user_id", "item_id", "event_type", "category", "brand", "price", "session_id", "event_time",
)  # fmt: skip
# Empty cells, also in the spellings that pandas writes.
_MISSING = frozenset({"", "NaN", "<NA>", "NaT"})

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def target(topics: Mapping[str, Topic]) -> Topic | None:
    """Return the topic of the mapping, if the project declares it with all of its fields."""
    topic = topics.get(TOPIC)
    return topic if topic is not None and set(_IDENTIFYING) <= set(topic.names) else None


def message(columns: Iterable[str], cells: Sequence[str], topic: Topic) -> bytes:
    """Convert a row to a message of the topic, whose event id is a hash of its content."""
    found = {
        NAMES.get(name, name): cell
        for name, cell in zip(columns, cells, strict=True)
        if cell.strip() not in _MISSING
    }
    if found.get("event_type", "").strip() == "cart":
        found["event_type"] = "add_to_cart"
    return _encode({"event_id": f"rees46-{_content_hash(found, topic)[:32]}"} | found).encode()


def _content_hash(found: Mapping[str, str], topic: Topic) -> str:
    """Hash what identifies a row, and nothing that tools add, reorder or format in their own way."""
    values = [_canonical(found.get(name, ""), topic, name) for name in _IDENTIFYING]
    return hashlib.sha256(_encode(values).encode()).hexdigest()


def _canonical(cell: str, topic: Topic, name: str) -> str:
    """Return the canonical spelling of a value: 541312140 for 541312140.0, 33.2 for 33.20, times in UTC."""
    text = cell.strip()
    if name != topic.time:
        return cell_text(text)
    moment = topic.limits.years.parse(text)
    return moment.isoformat() if moment is not None else text
