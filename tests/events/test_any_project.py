"""Events of projects that are not the example: judged, recognised, probed and made up by what they declare."""

from __future__ import annotations

import gzip
import json
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_prefs.declarations.registry import (
    Entity,
    FieldDeclaration,
    Key,
    KeyType,
    Registry,
    RegistryError,
    TopicDeclaration,
)
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.canaries import CanaryKey, canary_events
from dagster_prefs.events.formats import EventFileError, LineReader, detect, read_records
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.messages import Topic, shift_message, topics_of
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.tools.generator import GeneratedPlan
from dagster_prefs.tools.scenario import SimulationPlan, scenario_plan
from dagster_prefs.tools.simulation import Plan
from dagster_prefs.tools.simulator import CombinedPlan, fitted, follow_to_engine, simulate_to_engine

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
KEY = CanaryKey("00c0ffee00c0ffee", "5e" * 32)
LESSON = {
    "event_id": "e1",
    "learner_id": "l1",
    "event_type": "started",
    "lesson_id": "algebra-1",
    "subject": "algebra",
    "seconds": 60,
    "happened_at": "2026-03-15T10:00:00Z",
}


def keyed(courses: Registry, kind: KeyType) -> Registry:
    """The foreign project with another type of key, its field declared as generating would."""
    learner = Entity("learner", (Key("learner_id", kind),), erasable=True, table="learner_profiles")
    lessons = courses.topics["lesson_events"]
    fields = tuple(
        replace(field, type="bigint" if kind == "bigint" else "text") if field.name == "learner_id" else field
        for field in lessons.fields
    )
    return replace(
        courses,
        entities={"learner": learner},
        topics={"lesson_events": replace(lessons, fields=fields)},
    )


# --- the reasons, written down anew for the foreign project's one topic -----------------------------

HEX = "[0-9a-fA-F]"
UUID = re.compile(f"{HEX}{{8}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{12}}")
TIMES: dict[str, str | None] = {
    "2026-03-15T10:00:00Z": None,
    "2026-03-15 10:00:00": None,
    "1773568800": None,
    "2026-03-16T12:00:01Z": "event time in the future",
    "1999-12-31T00:00:00Z": "implausible time",
    "yesterday": "bad happened_at",
}


def given_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value.strip(" \t\r\n") or None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return str(value) if -(2**63) <= value < 2**64 else None


def expected(document: Mapping[str, Any], kind: KeyType) -> str | None:
    """Why the message is rejected, as the design says it for lesson_events."""
    erased = document.get("erased")
    if given_text(document.get("event_id")) is None and (erased is True or erased == "true"):
        return "erased"
    for name in ("event_id", "learner_id", "happened_at"):
        value = document.get(name)
        text = given_text(value)
        if text is None:
            return f"missing {name}" if value is None or value == "" else f"bad {name}"
        if name == "happened_at":
            if reason := TIMES[text]:
                return reason
        elif name == "learner_id" and kind == "bigint":
            if not re.fullmatch("-?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
                return "bad learner_id"
        elif name == "learner_id" and kind == "uuid" and not UUID.fullmatch(text):
            return "bad learner_id"
        elif len(text.encode()) > 256:
            return f"{name} has {len(text.encode())} bytes, at most 256"
    value = document.get("event_type")
    if value is None or value == "":
        return "missing event_type"
    if given_text(value) not in ("started", "finished", "bookmarked"):
        return "unknown event_type"
    for name in ("lesson_id", "subject"):
        value = document.get(name)
        text = given_text(value)
        if text is None and not (value is None or isinstance(value, str)):
            return f"bad {name}"
        if text is not None and len(text.encode()) > 256:
            return f"{name} has {len(text.encode())} bytes, at most 256"
    value = document.get("seconds")
    if value is not None and value != "":
        text = given_text(value) or ""
        if not re.fullmatch("-?[0-9]{1,19}", text) or not -(2**31) <= int(text) < 2**31:
            return "bad seconds"
        if int(text) < 0:
            return "negative seconds"
    learner, event = given_text(document["learner_id"]) or "", given_text(document["event_id"]) or ""
    reserved = {
        "bigint": lambda: int(learner) < 0,
        "text": lambda: learner.startswith("canary:"),
        "uuid": lambda: learner.lower().startswith("00000000-0000-0000-0000-"),
    }[kind]()
    if reserved:
        return "reserved learner_id"
    return "reserved event_id" if event.startswith("canary:") else None


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8),
    st.sampled_from(["", " ", "x" * 256, "é" * 129, "7", "-1", [], {}, ["l1"]]),
)
texts = st.sampled_from(["a", " b ", "canary:prefs", "canary:0123456789abcdef:1:x"])
learners = st.one_of(
    texts,
    st.integers(-2, 3),
    st.sampled_from(["0190163D-8694-739b-aea5-966c26f8ad91", "00000000-0000-0000-0000-000000000001"]),
)


@st.composite
def lessons(draw: st.DrawFn) -> dict[str, Any]:
    """A message that is mostly valid: one or two of its fields hold anything, or are left out."""
    document: dict[str, Any] = {
        "event_id": draw(texts),
        "learner_id": draw(learners),
        "event_type": draw(st.sampled_from(["started", "finished", "bookmarked"])),
        "lesson_id": draw(st.none() | texts),
        "subject": draw(st.none() | texts),
        "seconds": draw(st.none() | st.integers(-1, 100) | st.sampled_from(["5", "-5", 2**31])),
        "happened_at": draw(st.sampled_from([*TIMES, *[time for time in TIMES if TIMES[time] is None] * 5])),
    }
    for name in draw(st.sets(st.sampled_from(sorted(set(document) - {"happened_at"})), max_size=2)):
        document[name] = draw(anything)
    if draw(st.integers(0, 9)) == 0:
        document["happened_at"] = draw(st.sampled_from([None, "", True, []]))
    for name in draw(st.sets(st.sampled_from([*document, "erased"]), max_size=1)):
        if name == "erased":
            document |= {"erased": draw(st.sampled_from([True, "true", False, 1]))}
        else:
            del document[name]
    return document


@pytest.mark.parametrize("kind", ["text", "bigint", "uuid"])
@settings(deadline=None, max_examples=150)
@given(document=lessons())
def test_a_message_is_judged_by_what_the_project_declares(
    courses: Registry, kind: KeyType, document: dict[str, Any]
) -> None:
    topic = topics_of(keyed(courses, kind))["lesson_events"]
    assert rejection_reason(json.dumps(document).encode(), topic, NOW) == expected(document, kind)


def test_the_project_bounds_its_messages(courses: Registry) -> None:
    message = json.dumps(LESSON).encode()
    changes: dict[str, tuple[object, str]] = {
        "max_message_bytes": (10, f"message has {len(message)} bytes, at most 10"),
        "plausible_years": ({"first": 2027, "last": 2030}, "implausible time"),
        "future_tolerance_hours": (-2.5, "event time in the future"),
    }
    for name, (value, reason) in changes.items():
        bound = replace(courses, variables={**courses.variables, name: value})
        assert rejection_reason(message, topics_of(bound)["lesson_events"], NOW) == reason
        lacking = replace(courses, variables={k: v for k, v in courses.variables.items() if k != name})
        with pytest.raises(RegistryError, match=f"lack {name}: declare it in dbt_project"):
            topics_of(lacking)
    assert rejection_reason(message, topics_of(courses)["lesson_events"], NOW) is None


FIELDS = (
    FieldDeclaration("event_id", max_bytes=8),
    FieldDeclaration("learner_id", max_bytes=64),
    FieldDeclaration("points", "decimal", scale=2, minimum=0, maximum=10),
    FieldDeclaration("level", optional=True, accepted=("low", "high")),
    FieldDeclaration("seen_at", "timestamptz", optional=True),
    FieldDeclaration("active", "boolean", optional=True),
    FieldDeclaration("at", "timestamptz"),
)
QUIZ = {"event_id": "e", "learner_id": "l", "points": 1, "at": "2026-03-15T10:00:00Z"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"points": "10.004"}, None),
        ({"points": 10.01}, "points outside 0..10"),
        ({"points": None}, "missing points"),
        ({"points": "all"}, "bad points"),
        ({"level": "low"}, None),
        ({"level": "mid"}, "unknown level"),
        ({"level": ["low"]}, "bad level"),
        ({"level": None}, None),
        ({"seen_at": "2026-03-15"}, "bad seen_at"),
        ({"seen_at": 1}, "implausible time"),
        ({"active": "TRUE"}, None),
        ({"active": 2}, "bad active"),
        ({"event_id": "e" * 9}, "event_id has 9 bytes, at most 8"),
    ],
)
def test_every_kind_of_field_has_its_reasons(
    courses: Registry, changes: dict[str, object], reason: str | None
) -> None:
    topic = quizzes(courses)
    assert rejection_reason(json.dumps(QUIZ | changes).encode(), topic, NOW) == reason


def with_topic(
    registry: Registry, name: str, fields: tuple[FieldDeclaration, ...], **changes: Any
) -> Registry:
    """The project with one more topic of learners."""
    declared = TopicDeclaration(
        **{
            "name": name, "relation": name, "raw": f"raw_{name}", "parsed": f"{name}_parsed", "identity": "event_id",
            "keep": "first", "entity": "learner", "time": "at", "fields": fields,
        } | changes
    )  # fmt: skip
    return replace(registry, topics={**registry.topics, name: declared})


def quizzes(courses: Registry) -> Topic:
    return topics_of(with_topic(courses, "quizzes", FIELDS))["quizzes"]


# --- which topic a file is of -----------------------------------------------------------------------


def written(folder: Path, *records: Mapping[str, object], header: bool = False) -> Path:
    path = folder / ("given.csv" if header else "given.jsonl")
    lines = [json.dumps(record) for record in records]
    if header:
        lines = [",".join(records[0]), *(",".join(map(str, record.values())) for record in records)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("header", [False, True])
def test_a_file_is_of_the_topic_whose_keys_it_has(courses: Registry, tmp_path: Path, header: bool) -> None:
    path = written(tmp_path, LESSON, header=header)
    found = detect(path, courses)
    assert found.topic.name == "lesson_events"
    with LineReader(path) as reader:
        (record,) = read_records(reader, found)
    assert rejection_reason(record.message or b"", found.topic, NOW) is None
    moved = shift_message(record.message or b"", found.topic, 3600)
    assert json.loads(moved)["happened_at"] == "2026-03-15T11:00:00Z"


@pytest.mark.parametrize("header", [False, True])
def test_the_most_specific_topic_wins_and_equal_ones_are_named(
    courses: Registry, tmp_path: Path, header: bool
) -> None:
    plain = (
        FieldDeclaration("event_id"),
        FieldDeclaration("learner_id"),
        FieldDeclaration("at", "timestamptz"),
    )
    graded = (*plain, FieldDeclaration("grade"))
    rated = (*plain, FieldDeclaration("stars", "int", optional=True))
    both = with_topic(with_topic(courses, "visits", plain), "grades", graded)
    record = {"event_id": "e", "learner_id": "l", "at": "2026-03-15T10:00:00Z"}
    assert detect(written(tmp_path, record, header=header), both).topic.name == "visits"
    assert detect(written(tmp_path, record | {"grade": "A"}, header=header), both).topic.name == "grades"
    three = with_topic(both, "ratings", rated)
    assert detect(written(tmp_path, record | {"stars": 5}, header=header), three).topic.name == "ratings"
    path = written(tmp_path, record, header=header)
    with pytest.raises(
        EventFileError, match=r"given.* may be of visits or ratings, .*event_id.*: name the topic"
    ):
        detect(path, three)
    assert detect(path, three, "ratings").topic.name == "ratings"


def test_a_record_that_tells_decides_for_one_that_does_not(courses: Registry, tmp_path: Path) -> None:
    plain = (
        FieldDeclaration("event_id"),
        FieldDeclaration("learner_id"),
        FieldDeclaration("at", "timestamptz"),
    )
    both = with_topic(courses, "visits", plain)
    both = with_topic(both, "ratings", (*plain, FieldDeclaration("stars", "int", optional=True)))
    record = {"event_id": "e", "learner_id": "l", "at": "2026-03-15T10:00:00Z"}
    assert detect(written(tmp_path, record, record | {"stars": 1}), both).topic.name == "ratings"


def test_reference_data_has_no_key_of_an_event(courses: Registry, tmp_path: Path) -> None:
    fields = (FieldDeclaration("lesson_id"), FieldDeclaration("subject", optional=True))
    taught = with_topic(courses, "lessons", fields, identity="lesson_id", keep="last", entity=None, time=None)
    assert detect(written(tmp_path, {"lesson_id": "a", "subject": "b"}), taught).topic.name == "lessons"
    assert detect(written(tmp_path, LESSON), taught).topic.name == "lesson_events"
    without = {name: value for name, value in LESSON.items() if name != "event_id"}
    with pytest.raises(EventFileError, match="does not identify its topic"):
        detect(written(tmp_path, without), taught)


def mapped_id(path: Path, project: Registry) -> str:
    with LineReader(path) as reader:
        (record,) = read_records(reader, detect(path, project))
    return str(json.loads(record.message or b"")["event_id"])


def test_the_mapping_of_a_shop_is_not_offered_where_there_is_none(
    registry: Registry, courses: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "oct.csv"
    path.write_text(
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
        "2019-10-01 00:00:00 UTC,cart,1,2,,b,35.790,3,s-1\n"
    )
    assert detect(path, registry).mapping == "rees46"
    with pytest.raises(
        EventFileError, match=r"rees46 makes messages of user\.events, which this project does not"
    ):
        detect(path, courses, mapping="rees46")
    with pytest.raises(EventFileError) as caught:
        detect(path, courses)
    assert "rees46" not in str(caught.value)
    assert "lesson_events" in str(caught.value)
    # The event id of a row does not depend on the order in which the topic's fields are declared.
    shop = registry.topics["user.events"]
    turned = replace(registry, topics={"user.events": replace(shop, fields=shop.fields[::-1])})
    assert len({mapped_id(path, project) for project in (registry, turned)}) == 1
    # A shop's topic of another make is not the one that the mapping knows.
    events = registry.topics["user.events"]
    fewer = replace(events, fields=tuple(field for field in events.fields if field.name != "brand"))
    with pytest.raises(EventFileError, match="which this project does not declare"):
        detect(path, replace(registry, topics={"user.events": fewer}), mapping="rees46")


def test_an_unknown_topic_is_refused_with_the_nearest(courses: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"'lesson_event'.*did you mean lesson_events"):
        detect(written(tmp_path, LESSON), courses, "lesson_event")


# --- canaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "learner"),
    [("text", "canary:prefs"), ("bigint", -1), ("uuid", "00000000-0000-0000-0000-000000000000")],
)
def test_the_probe_has_a_valid_event_of_every_topic(
    courses: Registry, kind: KeyType, learner: int | str
) -> None:
    project = keyed(courses, kind)
    if kind == "text":
        project = with_topic(project, "quizzes", (FieldDeclaration("event_id", max_bytes=256), *FIELDS[1:]))
    moment = datetime(2026, 3, 15, 11, 59, 59, 123_456, tzinfo=UTC)
    sent = canary_events(project, KEY, moment)
    assert set(sent) == set(project.topics)
    for name, message in sent.items():
        topic = topics_of(project)[name]
        document = json.loads(message)
        assert set(document) == set(topic.names)
        assert document["learner_id"] == learner
        assert topic.moment(json.loads(message, parse_int=Decimal)) == moment.replace(microsecond=123_000)
        assert rejection_reason(message, topic, NOW, [KEY]) is None
        assert rejection_reason(message, topic, NOW) == "canary of another deployment"
        copied = message.replace(b".123", b".124")
        assert rejection_reason(copied, topic, NOW, [KEY]) == "reserved learner_id"


def test_the_example_has_canaries_of_its_events_alone(registry: Registry) -> None:
    topics = topics_of(registry)
    sent = canary_events(registry, KEY, NOW)
    assert set(sent) == {name for name, topic in topics.items() if topic.time}
    for name, message in sent.items():
        assert rejection_reason(message, topics[name], NOW, [KEY]) is None


# --- made-up messages -------------------------------------------------------------------------------


def plan_of(project: Registry, **changes: Any) -> GeneratedPlan:
    given: dict[str, Any] = {
        "end": NOW, "seed": 7, "days": 6, "entities": 40, "events_total": 2_000, "references": 30,
        "malformed_share": 0.05, "duplicate_share": 0.03, "late_share": 0.05,
    }  # fmt: skip
    return GeneratedPlan(topics=tuple(topics_of(project).values()), **(given | changes))


@pytest.mark.parametrize("kind", ["text", "bigint", "uuid"])
def test_made_up_messages_are_valid_and_the_rest_has_every_reason(courses: Registry, kind: KeyType) -> None:
    project = keyed(courses, kind)
    plan = plan_of(project)
    topic = topics_of(project)["lesson_events"]
    events = list(plan.events())
    assert events == list(plan.events())
    assert events != list(replace(plan, seed=8).events())
    assert plan.source != replace(plan, end=NOW - timedelta(hours=1)).source
    assert Counter(event.topic for event in events) == plan.counts() == {"lesson_events": 2_000}
    reasons = Counter(rejection_reason(event.message, topic, event.event_time) for event in events)
    assert sum(n for reason, n in reasons.items() if reason) == 100
    assert {
        "not valid JSON", "not a JSON object", "missing event_id", "bad event_id", "missing learner_id",
        "bad learner_id", "missing event_type", "unknown event_type", "missing happened_at", "bad happened_at",
        "event time in the future", "bad seconds", "negative seconds", "bad subject",
        "subject has 257 bytes, at most 256",
    } <= set(reasons)  # fmt: skip
    documents = [json.loads(e.message) for e in events if rejection_reason(e.message, topic, NOW) is None]
    assert {document["event_type"] for document in documents} == {"started", "finished", "bookmarked"}
    assert len({document["learner_id"] for document in documents}) > 20
    assert any("subject" not in document for document in documents)
    assert len(documents) - len({document["event_id"] for document in documents}) == 60
    if kind == "uuid":
        assert all(str(uuid.UUID(document["learner_id"])) == document["learner_id"] for document in documents)


def test_other_kinds_of_topics_are_made_up_too(courses: Registry) -> None:
    fields = (FieldDeclaration("lesson_id"), FieldDeclaration("subject", optional=True, max_bytes=4))
    project = with_topic(
        courses, "lessons", fields, identity="lesson_id", keep="last", entity=None, time=None
    )
    project = with_topic(project, "quizzes", (FieldDeclaration("event_id", max_bytes=64), *FIELDS[1:]))
    topics = topics_of(project)
    plan = plan_of(project, malformed_share=0.2)
    events = list(plan.events())
    assert Counter(event.topic for event in events) == plan.counts()
    valid = [e for e in events if rejection_reason(e.message, topics[e.topic], e.event_time) is None]
    held = Counter(event.topic for event in valid)
    assert held == {"lessons": 30, "lesson_events": 800, "quizzes": 800}
    known = {json.loads(event.message)["lesson_id"] for event in valid if event.topic == "lessons"}
    told = {json.loads(event.message).get("lesson_id") for event in valid if event.topic == "lesson_events"}
    assert told - {None} <= known


def kept(registry: Registry, *names: str) -> Registry:
    return replace(registry, topics={name: registry.topics[name] for name in names})


def planned(project: Registry, events: int = 160) -> Plan:
    return fitted(project, scenario_plan(NOW, seed=7, days=3, entities=10, events=events))


def test_the_scenario_plays_with_the_topics_that_are_there(registry: Registry, courses: Registry) -> None:
    whole = planned(registry)
    assert isinstance(whole, SimulationPlan)
    counts = {name: count for name, count in whole.counts().items() if name != "items"}
    assert counts == {"user.events": 50, "view_events": 100, "content_interactions": 10}
    viewers = kept(registry, "view_events", "content_interactions")
    shop = kept(registry, "user.events", "items")
    for project in (viewers, shop):
        plan = planned(project)
        assert isinstance(plan, SimulationPlan)
        assert {event.topic for event in plan.events()} == set(project.topics)
        live = plan.live()
        assert {next(live)[0] for _ in range(200)} == {n for n, t in project.topics.items() if t.time}
    # Without the catalogue that the scenario's shoppers buy from, what they do is made up.
    alone = planned(kept(registry, "user.events"))
    assert isinstance(alone, GeneratedPlan)
    mixed = planned(
        replace(
            registry,
            entities={**registry.entities, **courses.entities},
            topics={**registry.topics, **courses.topics},
        )
    )
    assert isinstance(mixed, CombinedPlan)
    assert mixed.counts()["lesson_events"] == 160 // 3
    assert Counter(event.topic for event in mixed.events()) == mixed.counts()
    live = mixed.live()
    assert "lesson_events" in {next(live)[0] for _ in range(400)}


@pytest.fixture
def learned(engine: EngineConfiguration, courses: Registry) -> EngineConfiguration:
    """An engine with the foreign project's raw table and `ingest_files`."""
    with engine.connect() as session:
        session.execute(
            f"create table {courses.topics['lesson_events'].raw} (source text not null, source_partition int, "
            "source_offset bigint, data bytea not null, kafka_timestamp timestamptz, "
            "primary key (source, source_partition, source_offset))"
        )
        session.execute(
            "create table ingest_files (source text primary key, path text, topic text, lines bigint, "
            "shift_seconds bigint, completed_at timestamptz)"
        )
    return engine


def test_the_engine_takes_the_events_of_a_foreign_project(
    learned: EngineConfiguration, courses: Registry, tmp_path: Path
) -> None:
    plan = planned(courses)
    (report,) = simulate_to_engine(learned, courses, plan)
    assert (report.topic, report.accepted) == ("lesson_events", 160)
    (again,) = simulate_to_engine(learned, courses, plan)
    assert (again.accepted, again.already_present) == (0, 160)
    assert sum(follow_to_engine(learned, courses, plan, rate=100, seconds=0.1).values()) > 0
    path = tmp_path / "lessons.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(LESSON).encode() + b"\n"))
    report = ingest_file(learned, courses, path, FileOptions(shift_to=NOW))
    assert (report.topic, report.accepted, report.shift_seconds) == ("lesson_events", 1, 2 * 3600)
