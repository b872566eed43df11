"""What of personal values is shown: of messages, rows and items."""

from __future__ import annotations

import json

import pytest
from personal_data import marked
from shipped import SHORT

from dagster_prefs.declarations.masking import MASK, masked_message, masked_row
from dagster_prefs.declarations.registry import Registry

EVENT = {
    "event_id": "e-4711",
    "viewer_id": 4711,
    "content_id": "film",
    "genre": "drama",
    "watch_duration_sec": -1,
    "watched_at": "2026-01-01T00:00:00Z",
}


def shown(registry: Registry, message: str, topic: str = "view_events") -> str:
    return masked_message(registry, registry.topics.get(topic), message)


def test_of_a_message_only_what_is_declared_and_not_personal_is_shown(registry: Registry) -> None:
    event = EVENT | {"email": "ana@example.com", "ana@example.com": 1, "genre": {"of": "ana"}}
    found = json.loads(shown(registry, json.dumps(event)))
    assert found == {
        "event_id": MASK,
        "viewer_id": MASK,
        "content_id": "film",
        # A value of another type may hold anything.
        "genre": MASK,
        "watch_duration_sec": -1,
        "watched_at": "2026-01-01T00:00:00Z",
        # A field that the topic does not declare may be a misspelt one.
        "email": MASK,
        MASK: MASK,
    }


def test_a_field_that_is_marked_is_masked(registry: Registry) -> None:
    found = json.loads(shown(marked(registry, view_events__genre=True), json.dumps(EVENT)))
    assert (found["genre"], found["content_id"]) == (MASK, "film")


@pytest.mark.parametrize(
    "message", ["viewer 4711 watched", '{"viewer_id": 4711', "[4711]", '"4711"', "[" * 100_000, ""]
)
def test_an_unreadable_message_is_masked_whole(registry: Registry, message: str) -> None:
    assert shown(registry, message) == f"{MASK} ({len(message):,} bytes)"


def test_a_message_of_a_topic_that_is_gone_is_masked_whole(registry: Registry) -> None:
    assert shown(registry, json.dumps(EVENT), "gone").startswith(f"{MASK} (")


def test_rows_about_the_id_that_was_asked_for_keep_its_key(registry: Registry) -> None:
    assert masked_row(registry, "view_events", EVENT) == EVENT
    personal = marked(registry, view_events__content_id=True)
    assert masked_row(personal, "view_events", EVENT) == EVENT | {"content_id": MASK}
    assert masked_row(personal, "view_events", {"content_id": None}) == {"content_id": None}


def test_an_attribute_that_is_made_from_a_marked_field_is_masked(registry: Registry) -> None:
    item = {"favorite_genre": "drama", f"watch_minutes_{SHORT}d": 12}
    relation = registry.contract.domain("preferences").relation
    assert masked_row(registry, relation, item) == item
    found = masked_row(marked(registry, view_events__genre=True), relation, item)
    assert found["favorite_genre"] == MASK
