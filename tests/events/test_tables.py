"""Parquet and Arrow files as events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.ingest import ingest_file
from tests.events.conftest import rows


def stored(engine: EngineConfiguration, table: str = "raw_view_events") -> list[tuple[int, Any]]:
    found = rows(engine, f"select source_offset, data from {table} order by source, source_offset")
    return [(offset, json.loads(data)) for offset, data in found]


def test_a_row_is_a_message(registry: Registry, store: EngineConfiguration, tmp_path: Path) -> None:
    path = tmp_path / "views.parquet"
    table = pa.table(
        {
            "event_id": ['a\\"\t\n', "b\\"],
            "viewer_id": [2**62 + 1, None],
            "watched_at": pa.array([1_600_000_000_000_000, None], pa.timestamp("us")),
        }
    )
    pq.write_table(table, path)
    report = ingest_file(store, registry, path)
    assert report.accepted == 2
    assert stored(store) == [
        (1, {"event_id": 'a\\"\t\n', "viewer_id": 2**62 + 1, "watched_at": "2020-09-13 12:26:40Z"}),
        (2, {"event_id": "b\\"}),
    ]
    assert ingest_file(store, registry, path).already_present == 2
