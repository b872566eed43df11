"""Training tables without an engine, labels of viewers, and training sets of both."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from shipped import TILE_TABLES, with_computed_attributes

from dagster_prefs.iceberg.tables import arrow_schema, ensure_table
from dagster_prefs.training.training_set import LabelJoin, TrainingSet, build_training_set
from dagster_prefs.training.windows import choose_features

REGISTRY = with_computed_attributes()
FEATURES = choose_features(REGISTRY, "viewer")
KEEP = timedelta(days=30)
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def later() -> datetime:
    """A moment at which everything there is now is old."""
    return datetime.now(UTC) + timedelta(days=60)


def fill(catalog: Catalog, rows: dict[str, list[tuple[Any, ...]]]) -> None:
    """Put rows into the training tables without an engine."""
    for spec in TILE_TABLES.values():
        table = ensure_table(catalog, "training", spec)
        names = [column.name for column in spec.columns]
        values = [dict(zip(names, row, strict=True)) for row in rows.get(spec.name, [])]
        if values:
            table.append(pa.Table.from_pylist(values, schema=arrow_schema(table)))


def write_labels(folder: Path, rows: Sequence[tuple[int, datetime]]) -> str:
    path = folder / "labels.parquet"
    table = pa.table(
        {
            "label": pa.array(range(len(rows)), pa.int64()),
            "viewer_id": pa.array([viewer for viewer, _ in rows], pa.int64()),
            "label_time": pa.array([when for _, when in rows], pa.timestamp("us", tz="UTC")),
        }
    )
    pq.write_table(table, path)
    return str(path)


def build(
    catalog: Catalog, labels: str, folder: Path, **options: Any
) -> tuple[TrainingSet, list[dict[str, Any]]]:
    given = {name: options.pop(name) for name in ("manifest", "tag") if name in options}
    join = LabelJoin(labels, FEATURES, options.pop("now", NOW), **options)
    made = build_training_set(catalog, join, folder / "set.parquet", **given)
    return made, pq.read_table(made.output).to_pylist()


def at(day: date, hour: float = 12.0) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(hours=hour)
