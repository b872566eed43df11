"""Typed and rejected events are the same from a table of columns as from JSON lines, and as a dry run said."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from relations import instant, refresh
from streams import NOW

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events import dry_run
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.rejected import rejected_counts

COLUMNS = {
    "event_id": pa.string(), "viewer_id": pa.int64(), "content_id": pa.float64(), "genre": pa.string(),
    "watch_duration_sec": pa.int32(), "completion_pct": pa.decimal128(7, 5), "watched_at": pa.timestamp("us"),
}  # fmt: skip
AT = instant(NOW)


def views(count: int) -> list[dict[str, Any]]:
    """Rows of views, some of them wrong in one column or another."""
    draw = random.Random(20)

    def either(good: Any, *bad: Any) -> Any:
        return draw.choice(bad) if draw.random() < 0.06 else good

    return [
        {
            "event_id": either(f"e{draw.randrange(count)}", None, "", "canary:x", "e" * 300, 'q"\\\n\té'),
            "viewer_id": either(draw.randrange(20), None, -1, 2**60 + 1),
            "content_id": either(float(draw.randrange(9)), None, 2.5, 1e300),
            "genre": either(draw.choice(["drama", "sport"]), None, " ", "g\x00", "日" * 400),
            "watch_duration_sec": either(draw.randrange(5000), None, -1),
            "completion_pct": either(
                Decimal(draw.randrange(100_001)).scaleb(-5), None, Decimal("1.5"), Decimal("-0.1")
            ),
            "watched_at": either(
                AT.replace(tzinfo=None) - timedelta(microseconds=draw.randrange(10**12)),
                None,
                datetime(1970, 1, 1),
                datetime(2027, 1, 1),
            ),
        }
        for _ in range(count)
    ]


def line(row: dict[str, Any]) -> bytes:
    spelled = {"completion_pct": str, "watched_at": datetime.isoformat}
    return json.dumps(
        {
            name: spelled[name](value) if name in spelled else value
            for name, value in row.items()
            if value is not None
        }
    ).encode()


def found(engine: EngineConfiguration) -> tuple[list[Any], list[Any]]:
    """Refresh; returns the typed events, and place and reason of the rejected ones."""
    with engine.connect() as session:
        refresh(session, ["view_events_parsed", "view_events", "rejected_events"])
        typed = session.execute("select * from view_events order by event_id").fetchall()
        rejected = session.execute('select "offset", reason from rejected_events order by 1').fetchall()
        session.execute("delete from raw_view_events; delete from raw_arrivals")
    return typed, rejected


def test_a_table_becomes_what_its_json_lines_become(
    registry: Registry, deployed: EngineConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = views(600)
    table, lines, arrived = tmp_path / "views.parquet", tmp_path / "views.jsonl", tmp_path / "arrived.parquet"
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
    pq.write_table(pa.table(columns), table, row_group_size=100)
    # In the reverse order, so that of equal ids the last row wins, and too early for some event times.
    moments = [instant(NOW) - timedelta(hours=place) for place in range(len(rows))]
    pq.write_table(pa.table(columns | {"at": moments}), arrived)
    lines.write_bytes(b"\n".join(map(line, rows)))
    with deployed.connect() as session:
        session.execute(
            f"alter table raw_view_events alter arrived_at set default to_timestamp({NOW // 10**6})"
        )

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return AT

    monkeypatch.setattr(dry_run, "datetime", Clock)
    results = []
    for path, options in (
        (lines, FileOptions()),
        (table, FileOptions()),
        (arrived, FileOptions(arrived_at="at", renamed={"at": None})),
    ):
        expected = dry_run.dry_run_file(deployed, registry, path, options)
        with deployed.connect() as session:
            assert session.execute("select count(*) from raw_view_events").fetchone() == (0,)
        assert (
            expected.messages
            == expected.rows
            == ingest_file(deployed, registry, path, options).accepted
            == 600
        )
        with deployed.connect() as session:
            waiting = session.execute("select sum(messages), min(arrived_at) >= %s from raw_arrivals", [AT])
            # Whatever their arrival, they wait since they were stored.
            assert waiting.fetchone() == (600, True)
        results.append(found(deployed))
        told = {kind: reason.count for kind, reason in expected.rejected.items()}
        assert told == rejected_counts(deployed)["view_events"]
        places = {place for reason in expected.rejected.values() for place, *_ in reason.examples}
        assert places <= {place for place, _ in results[-1][1]}
    assert results[0] == results[1]
    assert len(results[0][0]) > 200
    assert len(Counter(reason for _, reason in results[0][1])) > 8
    typed, rejected = results[2]
    assert {row[0] for row in typed} < {row[0] for row in results[0][0]}
    assert typed != [row for row in results[0][0] if row[0] in {one[0] for one in typed}]
    assert "event time in the future" in {reason for _, reason in rejected}
