"""The foreign project's generated models judge its messages as the commands do."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.canaries import CanaryKey, canary_events, canary_key
from dagster_prefs.events.messages import topics_of
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.events.rejected import rejected_counts
from dagster_prefs.events.replay import export_rejected, replay_file
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.tools.generator import GeneratedPlan
from dagster_prefs.tools.simulator import simulate_to_engine
from tests.declared import COURSES

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
READERS = ["lesson_events_parsed", "lesson_events", "rejected_events"]


def canaries(registry: Registry, key: CanaryKey) -> list[bytes]:
    """The probe's event, one of another deployment, a copy with another time, and others with reserved ids."""
    (own,) = canary_events(registry, key, NOW - timedelta(seconds=1)).values()
    (foreign,) = canary_events(registry, CanaryKey.random(), NOW).values()
    moved = json.loads(own) | {"happened_at": "2026-03-15T11:00:00Z"}
    person = json.loads(own) | {"learner_id": "l1"}
    unproven = json.loads(own) | {"event_id": "e1"}
    return [own, foreign, *(json.dumps(changed).encode() for changed in (moved, person, unproven))]


HEADER = b"\x00\x00\x00\x00\x07"


def framed() -> dict[bytes, str | None]:
    """Messages with the header of Confluent's wire format, which the topic declares, and their reasons."""
    lesson = {"learner_id": "l1", "event_type": "started", "happened_at": "2026-03-15T11:00:00Z"}
    return {
        HEADER + json.dumps({"event_id": "framed", **lesson}).encode(): None,
        HEADER + json.dumps(lesson).encode(): "missing event_id",
        HEADER + b'["e1"]': "not a JSON object",
        HEADER + b"{": "not valid JSON",
        HEADER: "not valid JSON",
        b"\x00": "not valid JSON",
        HEADER + HEADER + b"{}": "not valid JSON",
    }


def test_models_and_commands_reject_alike(
    courses: Registry, engine: EngineConfiguration, tmp_path: Path
) -> None:
    topic = topics_of(courses)["lesson_events"]
    plan = GeneratedPlan(
        NOW, seed=3, days=4, topics=(topic,), entities=20, events_total=500, malformed_share=0.6
    )
    dbt = Dbt(engine, COURSES, tmp_path / "target")
    assert all(
        node.ok
        for node in dbt.run("run", ["+rejected_events", "+lesson_events", "replayed_events", "ingest_files"])
    )
    (report,) = simulate_to_engine(engine, courses, plan)
    assert report.accepted == 500
    key = canary_key(engine)
    sent = [*canaries(courses, key), *framed()]
    with RawStore(engine) as store:
        assert store.write(topic, "probe", [RawMessage(0, at, data) for at, data in enumerate(sent)]) == 12
    with engine.connect() as session:
        session.execute(sql.SQL("update {} set arrived_at = %s").format(sql.Identifier(topic.raw)), [NOW])
    assert all(node.ok for node in dbt.run("run", READERS))
    with engine.connect() as session:
        judged = session.execute(
            sql.SQL(
                "select raw.data, parsed.reason from {} as raw"
                " join {} as parsed using (source, source_partition, source_offset)"
            ).format(sql.Identifier(topic.raw), sql.Identifier(topic.parsed))
        ).fetchall()
        ((typed,),) = session.execute(
            sql.SQL("select count(*) from {}").format(sql.Identifier(topic.relation))
        ).fetchall()
    assert len(judged) == 512
    assert {data: reason for data, reason in judged if data in framed()} == framed()
    assert [(data, reason) for data, reason in judged] == [
        (data, rejection_reason(data, topic, NOW, [key])) for data, _ in judged
    ]
    reasons = Counter(reason for _, reason in judged)
    assert len(reasons) > 15
    assert reasons["canary of another deployment"] == reasons["reserved event_id"] == 1
    assert reasons["reserved learner_id"] == 2
    # 200 valid events, a part of them twice, the probe's, and one with a header.
    assert reasons[None] == 202
    assert typed == 202 - round(500 * plan.duplicate_share)
    counted = rejected_counts(engine)["lesson_events"]
    assert sum(counted.values()) == 512 - 202

    # What is corrected comes in again, and is judged by the same declarations before.
    path = tmp_path / "rejected.jsonl"
    assert export_rejected(engine, path, reason="unknown event_type") == reasons["unknown event_type"] > 0
    path.write_text(path.read_text().replace('"teleport"', '"started"').replace('["x"]', '"finished"'))
    assert replay_file(engine, courses, path, now=NOW).sent == reasons["unknown event_type"]
