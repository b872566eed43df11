"""The judgement before sending is the typed layer's, by the oracle that the typed layer equals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import timedelta
from operator import itemgetter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CANARY_KEYS, HOUR, TOPICS, Message, parse
from relations import instant
from streams import NOW, bodies

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.events.canaries import CanaryKey
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.validity import rejection_reason

KEYS = [CanaryKey(deployment, secret) for deployment, secret in CANARY_KEYS.items()]


def judged_by_oracle(topic: str, body: bytes) -> str | None:
    return parse(Message(topic, "file:a#1", 0, 1, body, None, NOW)).reason


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(TOPICS).flatmap(lambda topic: st.tuples(st.just(topic), bodies(topic))))
def test_reason_is_the_oracles(topics: Mapping[str, Topic], drawn: tuple[str, bytes]) -> None:
    topic, body = drawn
    assert rejection_reason(body, topics[topic], instant(NOW), KEYS) == judged_by_oracle(topic, body)


VIEW = {"event_id": "e1", "viewer_id": 1, "watched_at": "2026-03-15T00:00:00Z"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"watched_at": "2026-03-16T12:30:00Z"}, None),
        ({"watched_at": "2026-03-16T12:30:01Z"}, "event time in the future"),
        ({"watched_at": (NOW + 25 * HOUR) // 1000}, "event time in the future"),
        # Microseconds: 2001.
        ({"watched_at": 10**15 - 1}, None),
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
        ({"completion_pct": 0.0012962962962962963}, None),
        ({"completion_pct": 1e-7}, None),
        ({"completion_pct": "1.5E-2"}, None),
        ({"completion_pct": "1.5E+2"}, "completion_pct outside 0..1"),
        ({"completion_pct": 10**30}, "bad completion_pct"),
        ({"genre": "g" * 1024}, None),
        ({"genre": "g" * 8192}, "genre has 8192 bytes, at most 1024"),
        ({"genre": "é" * 513}, "genre has 1026 bytes, at most 1024"),
        ({"event_id": "e" * 257}, "event_id has 257 bytes, at most 256"),
        ({"content_id": "c" * 300}, "content_id has 300 bytes, at most 256"),
        ({"genre": ["drama", "comedy"]}, "bad genre"),
        ({"genre": {"id": 3}}, "bad genre"),
        ({"genre": True}, "bad genre"),
        ({"genre": None}, None),
        ({"genre": " "}, None),
        ({"event_id": ["e1"]}, "bad event_id"),
        ({"viewer_id": {"id": 1}}, "bad viewer_id"),
        ({"viewer_id": "1e3"}, "bad viewer_id"),
        ({"viewer_id": 1e3}, None),
        ({"event_id": 10**25}, "bad event_id"),
        ({"other": "x" * 2**20}, "message has 1048661 bytes, at most 1048576"),
        ({"watched_at": 1773577800}, None),
        ({"watched_at": 1773577800.25}, None),
        ({"watched_at": 1773577800000}, None),
        ({"watched_at": 1773577800000000}, None),
        ({"watched_at": 1773577800000000000}, None),
        ({"watched_at": 946684799}, "implausible time"),
        ({"watched_at": 0}, "implausible time"),
        ({"watched_at": -1}, "implausible time"),
        ({"watched_at": "12345"}, "implausible time"),
        ({"watched_at": "1999-12-31T23:59:59Z"}, "implausible time"),
        ({"watched_at": "0001-01-01T00:00:00Z"}, "implausible time"),
        ({"watched_at": "2101-01-01T00:00:00Z"}, "implausible time"),
        ({"watched_at": "2100-12-31T23:59:59Z"}, "event time in the future"),
        ({"watched_at": "2026-03-14T10:00:00.1234567Z"}, None),
        ({"watched_at": "2026-03-14t10:00:00.123456789z"}, None),
    ],
)
def test_rules_of_views(topics: Mapping[str, Topic], changes: dict[str, object], reason: str | None) -> None:
    body = json.dumps(VIEW | changes).encode()
    assert rejection_reason(body, topics["view_events"], instant(NOW)) == reason
    assert judged_by_oracle("view_events", body) == reason


@pytest.mark.parametrize("body", [b'{"event_id": 1e999999999}', b'{"a": NaN}', b'"\\ud800"', b"\xff", b"[1"])
def test_what_no_engine_reads_is_not_json(topics: Mapping[str, Topic], body: bytes) -> None:
    assert rejection_reason(body, topics["items"], instant(NOW)) == "not valid JSON"


PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
VARS = yaml.safe_load((PROJECT / "dbt_project.yml").read_text())["vars"]
PLACE = {
    "source",
    "source_partition",
    "source_offset",
    "kafka_timestamp",
    "arrived_at",
    "payload",
    "reason",
    "canary",
}


def test_event_types_are_those_of_the_weights(registry: Registry) -> None:
    accepted = registry.topics["user.events"].by_name["event_type"].accepted
    assert accepted == tuple(VARS["interaction_weights"])


def test_bounds_of_every_message_are_those_of_the_project(topics: Mapping[str, Topic]) -> None:
    for topic in topics.values():
        years = topic.limits.years
        assert VARS["plausible_years"] == {"first": years.first, "last": years.last}
        assert timedelta(hours=VARS["future_tolerance_hours"]) == topic.limits.future_tolerance
        assert VARS["max_message_bytes"] == topic.limits.max_bytes


@pytest.mark.parametrize("topic", TOPICS)
def test_fields_are_those_that_the_parsed_model_declares(topics: Mapping[str, Topic], topic: str) -> None:
    name = topics[topic].parsed
    (model,) = yaml.safe_load((PROJECT / "models" / "generated" / "events" / f"{name}.yml").read_text())[
        "models"
    ]
    spelled = {"minimum": "min", "maximum": "max"}
    declared = [
        {"type": column["data_type"], **column.get("config", {}).get("meta", {})} | {"name": column["name"]}
        for column in model["columns"]
        if column["name"] not in PLACE
    ]
    for column in declared:
        accepted = column.pop("accepted", None) or VARS.get(column.pop("accepted_from", None))
        if accepted:
            assert topics[topic].by_name[column["name"]].accepted == tuple(accepted)
    ours = [
        {
            spelled.get(key, key): value
            for key, value in dataclasses.asdict(field).items()
            if key in ("name", "type", "optional", "max_bytes", "scale", "minimum", "maximum")
            and value is not None
            and value is not False
        }
        for field in topics[topic].fields
    ]
    # The order in which optional fields are judged is that of their declaration.
    assert [column for column in declared if column.get("optional")] == [
        field for field in ours if field.get("optional")
    ]
    assert sorted(declared, key=itemgetter("name")) == sorted(ours, key=itemgetter("name"))
    # An event type is one of a list, every other text has a limit.
    assert all(
        "max_bytes" in column or column["name"] == "event_type"
        for column in declared
        if column["type"] == "text"
    )
