"""A CSV row that cannot be read is rejected for what it is, at its line, and can be corrected and sent again."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from relations import instant, refresh
from streams import NOW

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.messages import Topic
from dagster_prefs.events.rejected import rejected_events
from dagster_prefs.events.replay import ReplayError, export_rejected, replay_file
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.textfiles import MAX_CELL_BYTES, ROW_FAULTS

HEADERS = {
    "user.events": "event_id,user_id,event_type,event_time",
    "view_events": "event_id,viewer_id,watched_at,genre",
    "content_interactions": "event_id,viewer_id,event_type,event_ts",
    "items": "item_id,title,category,brand",
}
ROWS = {
    "cells": b"1,2",
    "encoding": b"1,2,3,caf\xe9",
    "nul": b"1,2,3,a\0b",
    "quotes": b'1,2,3,a"b"",',
    "size": b"1,2,3," + b"x" * (MAX_CELL_BYTES + 1),
}
AT = instant(NOW)


def refreshed(engine: EngineConfiguration, topic: TopicDeclaration) -> None:
    typed = topic.relation
    with engine.connect() as session:
        refresh(session, [f"{typed}_parsed", typed, "rejected_events"])


@pytest.mark.parametrize("topic", HEADERS)
def test_each_fault_is_named_with_its_line(
    registry: Registry, topics: Mapping[str, Topic], deployed: EngineConfiguration, tmp_path: Path, topic: str
) -> None:
    path = tmp_path / "rows.csv"
    bad = dict(ROWS)
    # A quote inside a cell is text; one that opens a cell and does not close it is not.
    bad["quotes"] = b'1,2,"3,4'
    path.write_bytes(b"\n".join([HEADERS[topic].encode(), *bad.values()]))
    report = ingest_file(deployed, registry, path, FileOptions(topic))
    assert (report.lines, report.malformed) == (len(bad), len(bad))
    refreshed(deployed, registry.topics[topic])
    found = {event.offset: event for event in rejected_events(deployed, topic)}
    assert {line: event.reason for line, event in found.items()} == {
        line: ROW_FAULTS[fault]
        for line, fault in enumerate(bad, 2)  # type: ignore[index]
    }
    for line, raw in enumerate(bad.values(), 2):
        payload = found[line].payload
        assert rejection_reason(payload.encode(), topics[topic], AT) == found[line].reason
        if line == 2:
            assert json.loads(payload)["row"].encode() == raw


def test_only_a_message_without_identity_is_a_row(
    registry: Registry, deployed: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / "views.jsonl"
    message = {
        "event_id": "e",
        "viewer_id": 1,
        "watched_at": "2026-03-14T10:00:00Z",
        "malformed_row": "cells",
    }
    path.write_text(
        "\n".join(json.dumps(one) for one in (message, {"malformed_row": "x"}, {"malformed_row": ["cells"]}))
    )
    ingest_file(deployed, registry, path, FileOptions("view_events"))
    refreshed(deployed, registry.topics["view_events"])
    assert [event.reason for event in rejected_events(deployed)] == ["missing event_id", "missing event_id"]


def test_a_row_is_corrected_and_replayed(
    registry: Registry, deployed: EngineConfiguration, tmp_path: Path
) -> None:
    path, out = tmp_path / "views.csv", tmp_path / "rejected.jsonl"
    path.write_bytes(f"{HEADERS['view_events']}\ne1,1,2026-03-14T10:00:00Z,caf".encode() + b"\xe9\n")
    ingest_file(deployed, registry, path)
    refreshed(deployed, registry.topics["view_events"])
    (tmp_path / "precious").write_text("precious")
    # Where somebody laid links: at the name that temporary files once had, and at the name of the file itself.
    (tmp_path / ".rejected.jsonl.part").symlink_to("precious")
    (tmp_path / "other.jsonl").symlink_to("nowhere")
    assert export_rejected(deployed, out) == 1
    assert (tmp_path / "precious").read_text() == "precious"
    assert stat.S_IMODE(out.lstat().st_mode) == 0o600
    with pytest.raises(ReplayError, match="exists and may contain corrections: name another file"):
        export_rejected(deployed, tmp_path / "other.jsonl")
    assert not os.path.exists(tmp_path / "nowhere")
    line = json.loads(out.read_text())
    assert line["payload"]["row"] == "e1,1,2026-03-14T10:00:00Z,caf\\xe9"
    line["payload"] = {
        "event_id": "e1",
        "viewer_id": 1,
        "watched_at": "2026-03-14T10:00:00Z",
        "genre": "café",
    }
    out.write_text(json.dumps(line))
    assert replay_file(deployed, registry, out, now=AT).sent == 1
    refreshed(deployed, registry.topics["view_events"])
    assert rejected_events(deployed, open_only=True) == []
    with deployed.connect() as session:
        assert session.execute("select genre from view_events").fetchall() == [("café",)]
