"""Rejected messages out, corrected by hand, and in again: the books balance at every step."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from oracle import DAY, Message
from relations import insert_events, instant, refresh
from streams import NOW
from warm import Warm

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.raw import RawMessage, RawStore, RawStoreError
from dagster_prefs.events.rejected import rejected_counts, rejected_events
from dagster_prefs.events.replay import (
    ReplayError,
    ReplayReport,
    export_rejected,
    replay_file,
    replay_unchanged,
)

AT = instant(NOW)
SOURCE = "file:a#1"
RELATIONS = ("view_events_parsed", "view_events", "rejected_events")

VALID = {"event_id": "e1", "viewer_id": 7, "watched_at": "2026-03-14T10:00:00Z", "watch_duration_sec": 60}
BODIES = [
    json.dumps(VALID).encode(),
    json.dumps(VALID).encode(),
    b'{"event_id": "e2", "viewer_id": "twelve", "watched_at": "2026-03-14T10:00:00Z", "completion_pct": 0.50}',
    b'{"event_id": "e3", "viewer_id": 3, "watched_at": "2026-03-14T10:00:00Z", "watch_duration_sec": -5}',
    b'{"event_id": "e4", "viewer_id": 4, "watched_at": "2026-03-14T10:00:00Z"',
    b"\xff\xfe",
    b'{"event_id": "e5", "viewer_id": 5, "watched_at": "2026-03-17T00:00:00Z"}',
]


class Stream:
    """The view events of one test, with what stands on them."""

    def __init__(self, engine: EngineConfiguration) -> None:
        self.engine = engine

    def refresh(self) -> None:
        with self.engine.connect() as session:
            refresh(session, RELATIONS)

    def books(self) -> tuple[int, int, int, int]:
        """raw, typed, rejected and repeated messages, once the views are current; they balance."""
        self.refresh()
        with self.engine.connect() as session:
            row = session.execute(
                "select (select count(*) from raw_view_events), (select count(*) from view_events),"
                " (select count(*) from rejected_events where topic = 'view_events'),"
                " (select count(*) - count(distinct event_id) from view_events_parsed where reason is null)"
            ).fetchone()
        assert row is not None
        assert row[0] == row[1] + row[2] + row[3]
        return row

    def open(self) -> dict[str, int]:
        return rejected_counts(self.engine, open_only=True).get("view_events", {})

    def durations(self) -> dict[str, Any]:
        with self.engine.connect() as session:
            return dict(session.execute("select event_id, watch_duration_sec from view_events").fetchall())


@pytest.fixture
def stream(deployed: EngineConfiguration) -> Stream:
    with deployed.connect() as session:
        insert_events(
            session,
            [Message("view_events", SOURCE, 0, n, body, None, NOW) for n, body in enumerate(BODIES, 1)],
        )
    made = Stream(deployed)
    made.refresh()
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, documents: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def corrected(path: Path) -> list[dict[str, Any]]:
    """Every line of an exported file, its payload made valid."""
    changed = lines(path)
    for document in changed:
        if document["reason"] == "not valid JSON":
            document["payload"] = json.dumps(VALID | {"event_id": f"fixed-{document['offset']}"})
        else:
            document["payload"] |= {
                "viewer_id": 12,
                "watch_duration_sec": 5,
                "watched_at": VALID["watched_at"],
            }
    return changed


def test_corrected_messages_become_typed_and_the_books_balance(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    assert stream.books() == (7, 1, 5, 1)
    file = tmp_path / "rejected.jsonl"
    assert export_rejected(stream.engine, file) == 5
    rewrite(file, corrected(file))
    assert replay_file(stream.engine, registry, file, now=AT) == ReplayReport(5, 0)
    assert stream.books() == (12, 6, 5, 1)
    assert stream.durations() == {
        "e1": 60, "e2": 5, "e3": 5, "e5": 5, f"fixed-{5}": 60, f"fixed-{6}": 60,
    }  # fmt: skip
    assert stream.open() == {}
    assert rejected_events(stream.engine, open_only=True) == []
    # The refused messages themselves stay, and can be listed.
    assert len(rejected_events(stream.engine)) == 5


def test_the_same_file_sends_nothing_new(registry: Registry, stream: Stream, tmp_path: Path) -> None:
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file)
    rewrite(file, corrected(file))
    replay_file(stream.engine, registry, file, now=AT)
    before = stream.books()
    assert replay_file(stream.engine, registry, file, now=AT) == ReplayReport(0, 5)
    assert stream.books() == before
    again = tmp_path / "again.jsonl"
    assert export_rejected(stream.engine, again) == 0


def test_what_is_still_invalid_is_said_and_nothing_is_sent(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file)
    documents = lines(file)
    documents[0]["payload"]["viewer_id"] = 12
    documents.append(documents[0])
    documents.append(documents[1] | {"offset": 999})
    documents.append({"topic": "view_events"})
    documents.append(documents[1] | {"topic": "view_event"})
    documents.append(documents[1] | {"offset": "3"})
    rewrite(file, documents)
    with file.open("a") as end:
        end.write("{half a line\n")
    before = stream.books()
    with pytest.raises(ReplayError, match=r"10 of 11 lines of .* nothing was sent: correct them") as refused:
        replay_file(stream.engine, registry, file, now=AT)
    said = dict(refused.value.problems)
    assert said[2] == "negative watch_duration_sec"
    assert said[3] == said[4] == "not valid JSON"
    assert said[5] == "event time in the future"
    assert said[6].startswith("the same message as line 1")
    assert "0/999 was rejected" in said[7]
    assert said[8].startswith("lacks source, partition, offset, payload")
    assert "view_events" in said[9]
    assert "has another type" in said[10]
    assert said[11].startswith("not valid JSON (")
    assert stream.books() == before
    assert len(stream.open()) == 4
    report = replay_file(stream.engine, registry, file, now=AT, skip_invalid=True)
    assert (report.sent, report.already_replayed, sum(report.left_out.values())) == (1, 0, 10)
    assert stream.books() == (8, 2, 5, 1)


def test_a_payload_is_sent_character_for_character(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file, reason="bad viewer_id")
    (line,) = file.read_text().splitlines()
    assert BODIES[2].decode() in line
    file.write_text(line.replace('"twelve"', "12 ") + "\n")
    replay_file(stream.engine, registry, file, now=AT)
    with stream.engine.connect() as session:
        rows = session.execute(
            "select source, source_partition, source_offset, data from raw_view_events where source <> %s",
            (SOURCE,),
        ).fetchall()
    assert rows == [(f"replay:{SOURCE}", 0, 3, BODIES[2].replace(b'"twelve"', b"12 "))]


def test_a_replay_that_is_refused_again_is_open_again(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    """Between judgement and arrival the clock of the engine may say otherwise: nothing is lost then."""
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file, reason="event time in the future")
    assert replay_file(stream.engine, registry, file, now=AT + timedelta(days=2)).sent == 1
    with stream.engine.connect() as session:
        session.execute("update raw_view_events set arrived_at = %s where source <> %s", (AT, SOURCE))
    assert stream.books() == (8, 1, 6, 1)
    (still,) = rejected_events(stream.engine, reason="event time in the future", open_only=True)
    assert still.source == f"replay:{SOURCE}"
    assert replay_unchanged(stream.engine, registry, now=AT + timedelta(days=2)).sent == 1
    assert stream.books() == (9, 2, 6, 1)
    assert "event time in the future" not in stream.open()


def test_unchanged_sends_what_is_valid_by_now(registry: Registry, stream: Stream) -> None:
    later = instant(NOW + 2 * DAY)
    report = replay_unchanged(stream.engine, registry, now=later)
    assert report.sent == 1
    assert report.left_out == {"bad viewer_id": 1, "negative watch_duration_sec": 1, "not valid JSON": 2}
    assert stream.books() == (8, 2, 5, 1)
    assert replay_unchanged(stream.engine, registry, "view_events", now=later).sent == 0


def test_what_was_erased_after_the_export_does_not_come_back(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file)
    rewrite(file, corrected(file))
    with stream.engine.connect() as session:
        session.execute("update raw_view_events set data = %s where source_offset = 3", (b'{"erased":true}',))
    stream.refresh()
    with pytest.raises(ReplayError) as refused:
        replay_file(stream.engine, registry, file, now=AT)
    assert refused.value.problems == ((1, "its subject was erased after the export: remove the line"),)
    assert replay_file(stream.engine, registry, file, now=AT, skip_invalid=True).sent == 4
    # Nothing is wrong with what an erasure left, so it waits for nobody.
    assert stream.open() == {}
    assert rejected_counts(stream.engine)["view_events"]["erased"] == 1


def test_an_interruption_before_the_note_is_completed_by_the_same_command(
    registry: Registry, stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file)
    rewrite(file, corrected(file))

    def away(*_: object) -> None:
        raise RawStoreError("the engine went away")

    with monkeypatch.context() as patch:
        patch.setattr(RawStore, "remember_replayed", away)
        with pytest.raises(RawStoreError):
            replay_file(stream.engine, registry, file, now=AT)
    replay_file(stream.engine, registry, file, now=AT)
    assert stream.books() == (12, 6, 5, 1)
    assert stream.open() == {}


def test_messages_go_where_the_raw_tables_are_filled_from(
    registry: Registry, stream: Stream, tmp_path: Path
) -> None:
    sent: list[tuple[str, bytes]] = []

    def deliver(topic: TopicDeclaration, batch: list[RawMessage]) -> int:
        sent.extend((topic.name, message.data) for message in batch)
        return len(batch)

    file = tmp_path / "rejected.jsonl"
    export_rejected(stream.engine, file, reason="bad viewer_id")
    file.write_text(file.read_text().replace('"twelve"', "12"))
    assert replay_file(stream.engine, registry, file, now=AT, deliver=deliver).sent == 1
    assert replay_file(stream.engine, registry, file, now=AT, deliver=deliver).already_replayed == 1
    assert sent == [("view_events", BODIES[2].replace(b'"twelve"', b"12"))]
    assert stream.books()[0] == 7
    assert "bad viewer_id" not in stream.open()


def test_an_existing_file_is_not_overwritten(stream: Stream, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("corrections\n")
    with pytest.raises(ReplayError, match="exists and may contain corrections"):
        export_rejected(stream.engine, file)
    assert file.read_text() == "corrections\n"


def test_the_command_says_what_stands_in_the_way(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Warm
) -> None:
    monkeypatch.setenv("PREFS_ENGINE_PORT", str(stream.engine.port))
    monkeypatch.setenv("PREFS_ENGINE_DATABASE", stream.engine.database)

    def prefs(*words: str) -> subprocess.CompletedProcess[str]:
        return warm.run(["prefs", "rejected", *words], environment=os.environ, timeout=120)

    file = tmp_path / "rejected.jsonl"
    listed = json.loads(prefs("--topic", "view_events", "--json").stdout)
    unreadable = [event["payload"] for event in listed if event["reason"] == "not valid JSON"]
    assert len(unreadable) == 2
    assert all(re.fullmatch(r"••• \([0-9]+ bytes\)", payload) for payload in unreadable)
    read = [json.loads(event["payload"]) for event in listed if event["reason"] != "not valid JSON"]
    assert {event["viewer_id"] for event in read if "viewer_id" in event} == {"•••"}
    assert "5 messages" in prefs("export", str(file)).stdout
    assert '"twelve"' in file.read_text(), "the export shows what the list masks"
    assert file.stat().st_mode & 0o777 == 0o600
    refused = prefs("replay", str(file))
    assert refused.returncode == 1
    assert f"{file}, line 2: negative watch_duration_sec" in refused.stdout
    assert len(refused.stderr.strip().splitlines()) == 1
    rewrite(file, corrected(file))
    assert "5 messages sent" in prefs("replay", str(file)).stdout
    assert json.loads(prefs("--json").stdout) == {}
    assert json.loads(prefs("--all", "--json").stdout)["view_events"]["not valid JSON"] == 2


def test_a_database_without_the_note_is_named(engine: EngineConfiguration, tmp_path: Path) -> None:
    with engine.connect() as session:
        session.execute(
            'create table rejected_events (topic text, source text, "partition" int, "offset" bigint,'
            " reason text, payload text)"
        )
    with pytest.raises(RawStoreError, match=r"no table .*: create it with `dbt run`"):
        export_rejected(engine, tmp_path / "rejected.jsonl")
    assert list(tmp_path.iterdir()) == []
