"""The judgement before sending is the typed layer's, by the oracle that the typed layer equals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HOUR, TOPICS, Message, parse
from relations import instant
from streams import NOW, bodies

from dagster_prefs.events.formats import TOPICS as FORMATS
from dagster_prefs.events.validity import EVENT_TYPES, rejection_reason


def judged_by_oracle(topic: str, body: bytes) -> str | None:
    return parse(Message(topic, "file:a#1", 0, 1, body, None, NOW)).reason


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(TOPICS).flatmap(lambda topic: st.tuples(st.just(topic), bodies(topic))))
def test_reason_is_the_oracles(drawn: tuple[str, bytes]) -> None:
    topic, body = drawn
    assert rejection_reason(body, FORMATS[topic], instant(NOW)) == judged_by_oracle(topic, body)


VIEW = {"event_id": "e1", "viewer_id": 1, "watched_at": "2026-03-15T00:00:00Z"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"watched_at": "2026-03-16T12:30:00Z"}, None),
        ({"watched_at": "2026-03-16T12:30:01Z"}, "event time in the future"),
        ({"watched_at": (NOW + 25 * HOUR) // 1000}, "event time in the future"),
        ({"watched_at": 10**15 - 1}, "event time in the future"),
        ({"watched_at": "2026-03-15T24:00:00Z"}, "bad watched_at"),
        ({"watched_at": "2026-03-15T00:00:00+16:00"}, "bad watched_at"),
        ({"event_id": None}, "missing event_id"),
        ({"event_id": None, "erased": "true"}, "erased"),
        ({"event_id": None, "erased": 1}, "missing event_id"),
        ({"event_id": None, "erased": True}, "erased"),
        ({"event_id": None, "erased": False}, "missing event_id"),
        ({"erased": True}, None),
        ({"viewer_id": 2**63}, "bad viewer_id"),
        ({"watch_duration_sec": "-1"}, "negative watch_duration_sec"),
        ({"completion_pct": "1.01"}, "completion_pct outside 0..1"),
    ],
)
def test_rules_of_views(changes: dict[str, object], reason: str | None) -> None:
    body = json.dumps(VIEW | changes).encode()
    assert rejection_reason(body, FORMATS["view_events"], instant(NOW)) == reason
    assert judged_by_oracle("view_events", body) == reason


@pytest.mark.parametrize("body", [b'{"event_id": 1e999999999}', b'{"a": NaN}', b'"\\ud800"', b"\xff", b"[1"])
def test_what_no_engine_reads_is_not_json(body: bytes) -> None:
    assert rejection_reason(body, FORMATS["items"], instant(NOW)) == "not valid JSON"


def test_event_types_are_those_of_the_weights() -> None:
    project = Path(__file__).resolve().parents[2] / "dbt_project" / "dbt_project.yml"
    weights = yaml.safe_load(project.read_text())["vars"]["interaction_weights"]
    assert EVENT_TYPES["user.events"] == set(weights)
