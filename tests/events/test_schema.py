"""The schemas for producers: what satisfies one is accepted by the typed layer's rules, and what they print."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner
from declared import COURSES, PROJECT
from jsonschema import Draft202012Validator

from dagster_prefs.cli import cli
from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.declarations.reserved import canary_value
from dagster_prefs.events.messages import Topic, topics_of
from dagster_prefs.events.schema import avro_schema, json_schema
from dagster_prefs.events.validity import rejection_reason

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
REGISTRIES = {project.name: load_registry(project) for project in (PROJECT, COURSES)}
TOPICS = {
    f"{project}:{name}": topic
    for project, registry in REGISTRIES.items()
    for name, topic in topics_of(registry).items()
}
MISSING = object()
VALUES: tuple[Any, ...] = (
    MISSING, None, "", " ", "x", "x" * 256, "x" * 257, "x" * 1025, "a\x00b", "canary:x", " canary:y", "view", "started",
    "2026-03-01T00:00:00Z", "2026-03-01T00:00:00.123456789+02:00", "2026-03-01", "yesterday", "12", "true",
    0, 1, -1, 1.5, 12.0, 0.25, 1.01, 2**31, -(2**31) - 1, 2**40, 2**63, -(2**63), 10**21, 10**22, 10**28, True, False,
    [], ["x"], {}, "0190163d-8694-739b-aea5-966c26f8ad91", "00000000-0000-0000-0000-000000000001",
)  # fmt: skip


def message_of(topic: Topic) -> dict[str, Any]:
    """A message with a valid value in every field."""
    return {field.name: canary_value(field) for field in topic.fields}


@pytest.mark.parametrize("topic", TOPICS.values(), ids=TOPICS)
def test_what_satisfies_the_schema_is_accepted(topic: Topic) -> None:
    schema = json_schema(topic)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(message_of(topic))
    # Further fields do not matter.
    assert validator.is_valid({**message_of(topic), "further": {"a": [1]}})
    for field in topic.fields:
        outcomes = set()
        for value in VALUES:
            document = {**message_of(topic), field.name: value}
            if value is MISSING:
                del document[field.name]
            satisfied = validator.is_valid(document)
            outcomes.add(satisfied)
            reason = rejection_reason(json.dumps(document).encode(), topic, NOW)
            assert not satisfied or reason is None, (field.name, value, reason)
        assert outcomes == {True, False} or field.accepted, f"{field.name} is never judged both ways"


def test_the_example_is_described(registry: Registry) -> None:
    schema = json_schema(topics_of(registry)["view_events"])
    properties = schema["properties"]
    assert schema["required"] == [
        field.name for field in registry.topics["view_events"].fields if not field.optional
    ]
    assert properties["viewer_id"] == {
        "description": registry.topics["view_events"].by_name["viewer_id"].description,
        "type": "integer",
        "minimum": 0,
        "maximum": 2**63 - 1,
    }
    assert properties["completion_pct"]["type"] == ["number", "null"]
    assert (properties["completion_pct"]["minimum"], properties["completion_pct"]["maximum"]) == (0, 1)
    assert properties["watched_at"]["format"] == "date-time"
    kinds = json_schema(topics_of(registry)["content_interactions"])["properties"]["event_type"]
    assert kinds["enum"] == list(registry.topics["content_interactions"].by_name["event_type"].accepted)


@pytest.mark.parametrize("topic", TOPICS.values(), ids=TOPICS)
def test_avro_has_the_same_fields(topic: Topic) -> None:
    schema = avro_schema(topic, "shop")
    assert (schema["type"], schema["name"], schema["namespace"]) == ("record", topic.relation, "shop")
    assert [field["name"] for field in schema["fields"]] == list(topic.by_name)
    for field in schema["fields"]:
        declared = topic.by_name[field["name"]]
        kind = field["type"]
        assert isinstance(kind, list) == declared.optional
        if declared.optional:
            # Avro takes the default from the first branch of the union.
            assert (kind[0], field["default"]) == ("null", None)
            kind = kind[1]
        if declared.type == "timestamptz":
            assert kind == {"type": "long", "logicalType": "timestamp-millis"}
        if declared.type == "decimal":
            assert (kind["logicalType"], kind["scale"]) == ("decimal", declared.scale)
        if declared.type == "bigint":
            assert kind == "long"


def test_the_command_prints_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(COURSES))
    topic = TOPICS[f"{COURSES.name}:lesson_events"]
    shown = CliRunner().invoke(cli, ["schema", "lesson_events"])
    assert json.loads(shown.stdout) == json_schema(topic)
    shown = CliRunner().invoke(cli, ["schema", "lesson_events", "--format", "avro"])
    assert json.loads(shown.stdout) == avro_schema(topic, "courses")
    unknown = CliRunner().invoke(cli, ["schema", "lessons"])
    assert "unknown topic 'lessons'" in str(unknown.exception)
