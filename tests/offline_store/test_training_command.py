"""`prefs training-set` as it is typed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from pyiceberg.catalog import Catalog
from shipped import LONG, SHORT, TILE_TABLES, WATCH

from dagster_prefs.cli import cli
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg.tables import arrow_schema, ensure_table

from .conftest import DAY, watch


@pytest.fixture
def filled(catalog: Catalog, warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", warehouse.as_uri())
    monkeypatch.setenv("PREFS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for spec in TILE_TABLES.values():
        table = ensure_table(catalog, "training", spec)
        if spec is WATCH:
            row = dict(zip([column.name for column in spec.columns], watch(1, DAY, 600), strict=True))
            table.append(pa.Table.from_pylist([row], schema=arrow_schema(table)))
    when = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC) + timedelta(days=1)
    Path("labels.csv").write_text(f"viewer_id,label_time,bought\n1,{when.isoformat()},yes\n")
    return catalog


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["training-set", *arguments], standalone_mode=False)


def test_a_training_set_is_built_and_reproduced(filled: Catalog) -> None:
    assert run("--labels", "labels.csv").exception is None
    (row,) = pq.read_table("labels.training.parquet").to_pylist()
    assert (row["bought"], row[f"watch_minutes_{SHORT}d"], row[f"completions_{LONG}d"]) == ("yes", 10, 1)
    manifest = json.loads(Path("labels.training.parquet.manifest.json").read_text())
    assert manifest["labels"]["source"] == "labels.csv"
    done = run("reproduce", "labels.training.parquet.manifest.json")
    assert done.exception is None
    assert "1 rows, equal to those of" in done.output
    assert pq.read_table("labels.training.reproduced.parquet").to_pylist() == [row]
    Path("labels.csv").write_text("viewer_id,label_time\n2,2026-03-01T00:00:00Z\n")
    failed = run("reproduce", "labels.training.parquet.manifest.json", "--output", "again.csv")
    assert isinstance(failed.exception, PrefsError)
    assert "no longer contains the labels of the manifest" in str(failed.exception)
    assert not Path("again.csv").exists()


def test_sql_is_printed_and_nothing_written(filled: Catalog, tmp_path: Path) -> None:
    schema = pa.schema([("viewer_id", pa.int64()), ("label_time", pa.timestamp("us", "UTC"))])
    filled.create_table("training.labels", schema)
    before = {path.name for path in tmp_path.iterdir()}
    printed = run("--labels", "training.labels", "--print-sql", "spark")
    assert printed.exception is None
    assert "training.viewer_watch_daily" in printed.output
    assert "COLLECT_LIST" in printed.output
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_is_missing_is_said(filled: Catalog) -> None:
    assert "--labels is missing" in str(run().exception)
    assert "nothing.csv does not exist" in str(run("--labels", "nothing.csv").exception)
