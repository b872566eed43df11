"""A training value as served equals what was read from the engine's views at the label's time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_state import BuiltState
from oracle import DAY, HOUR, SECOND, Message
from relations import insert_canary_keys, insert_events, instant, refresh
from shipped import LONG, REGISTRY, SHORT, WATCH
from streams import MIDNIGHT

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings
from dagster_prefs.training.served_sql import choose_served
from dagster_prefs.training.training_set import LabelJoin, build_training_set

FEATURES = choose_served(REGISTRY, "viewer")
VIEWERS = range(4)


def body(number: int, at: int, **fields: Any) -> bytes:
    return json.dumps({"event_id": f"e{number}", "viewer_id": number % 3, **fields}).encode()


def stream() -> list[Message]:
    """Events on both sides of every window's edge; every third arrives hours or days late, and some twice."""
    made = []
    for number in range(28):
        days = (0, 0, 1, SHORT, SHORT + 1, LONG, LONG + 1)[number % 7]
        at = MIDNIGHT - days * DAY + (number % 5 - 2) * 6 * HOUR + number * SECOND
        arrived = at + (0, SECOND, 9 * HOUR, 2 * DAY)[number % 4]
        view = {
            "watched_at": instant(at).isoformat(),
            "content_id": f"c{number % 4}",
            "genre": "abcdef"[number % 6],
        }
        view |= {"watch_duration_sec": 40 + number, "completion_pct": 0.9 if number % 2 else 0.5}
        touch = {"event_ts": instant(at).isoformat(), "event_type": ("like", "share", "search")[number % 3]}
        for topic, fields in (("view_events", view), ("content_interactions", touch)):
            made.append(Message(topic, f"kafka:{topic}", 0, number, body(number, at, **fields), at, arrived))
            if number % 9 == 0:
                again = arrived + 3 * HOUR
                made.append(
                    Message(topic, f"kafka:{topic}", 1, number, body(number + 1, at, **fields), at, again)
                )
    return made


def read(connection: psycopg.Connection[Any], viewer: int) -> dict[str, Any]:
    """What a read of a viewer's views returns, with the cold-start values of the contract where there is no row."""
    found: dict[str, Any] = {}
    for domain in REGISTRY.contract.domains.values():
        names = [value.name for value in FEATURES.values if value.domain == domain.name]
        row = connection.execute(
            f"select {', '.join(names)} from {domain.relation} where viewer_id = %s".encode(), [viewer]
        ).fetchone()
        for place, name in enumerate(names):
            empty = (
                None
                if domain.attributes[name].nullable
                else []
                if "list" in domain.attributes[name].type
                else 0
            )
            found[name] = empty if row is None or row[place] is None else row[place]
    return found


def test_a_value_as_served_is_what_was_read_at_its_time(
    deployed: EngineConfiguration,
    deployed_state: BuiltState,
    aws_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_endpoint)
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", tmp_path.as_uri())
    platform = Platform(load_settings())
    platform.engine = deployed
    catalog = platform.catalog()
    times = [MIDNIGHT - SECOND, MIDNIGHT, MIDNIGHT + 11 * HOUR, MIDNIGHT + DAY]
    expected, waiting = [], sorted(stream(), key=lambda message: message.arrived_at)
    with deployed.connect() as connection:
        insert_canary_keys(connection)
        for time in times:
            insert_events(connection, [message for message in waiting if message.arrived_at <= time])
            waiting = [message for message in waiting if message.arrived_at > time]
            connection.execute("select set_config('prefs.clock', %s, false)", (instant(time).isoformat(),))
            refresh(connection, deployed_state.views)
            expected += [read(connection, viewer) for viewer in VIEWERS]
            if time == times[1]:
                # Of the days that are exported here one gets late events afterwards.
                for days in (1, 2, LONG):
                    export_day(deployed, catalog, WATCH, instant(time - days * DAY).date())
        assert waiting, "some events arrive after the last label"
        insert_events(connection, waiting)
        refresh(connection, deployed_state.views)
    for topic in FEATURES.topics:
        platform.event_exports()[topic].run(instant(MIDNIGHT + 40 * DAY))
    labels = tmp_path / "labels.parquet"
    given = {
        "viewer_id": [viewer for _ in times for viewer in VIEWERS],
        "label_time": pa.array([instant(time) for time in times for _ in VIEWERS], pa.timestamp("us", "UTC")),
    }
    pq.write_table(pa.table(given), labels)
    now = instant(MIDNIGHT + 41 * DAY)
    join = LabelJoin(str(labels), FEATURES, now, meaning="served", spreads=platform.spreads())
    made = build_training_set(catalog, join, tmp_path / "set.parquet")
    found = pq.read_table(made.output).drop_columns(list(given)).to_pylist()
    assert found == expected
    assert len({repr(row) for row in expected}) > 2 * len(VIEWERS), "the values change from label to label"
