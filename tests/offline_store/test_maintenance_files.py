"""Upkeep deletes no file that the current metadata names, whoever wrote it and whatever it is for."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyiceberg.avro.file import AvroFile
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from pyiceberg.table.statistics import StatisticsFile
from shipped import WATCH

from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.maintenance import maintain

from .conftest import DAY, Tiles, table_rows, watch
from .other_engine import commit_deletes, delete_equal, delete_positions, delete_vector
from .training_world import KEEP, later

NEXT = DAY + timedelta(days=1)


def texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON or Avro, wherever it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for found in value.values():
            yield from texts(found)
    elif isinstance(value, list | tuple):
        for found in value:
            yield from texts(found)
    elif hasattr(value, "_data"):
        yield from texts(list(value._data))


def named(table: Table) -> set[Path]:
    """Every file that the metadata names, and what those of Avro name, by no knowledge of any field."""
    found: set[Path] = set()
    waiting = [Path(table.metadata_location.removeprefix("file://"))]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        content: Any = None
        # An earlier metadata file belongs to the table, what it alone names does not.
        if path.name.endswith(".metadata.json") and len(found) == 1:
            content = json.loads(path.read_text())
        elif path.suffix == ".avro":
            with AvroFile(table.io.new_input(f"file://{path}")) as records:
                content = list(records)
        prefix = table.location()
        waiting += [Path(t.removeprefix("file://")) for t in texts(content) if t.startswith(prefix)]
    return found


def test_every_file_that_the_metadata_names_stays(tiles: Tiles, catalog: Catalog) -> None:
    tiles.add(WATCH, [watch(viewer, day, 60) for viewer in range(1, 9) for day in (DAY, NEXT)])
    for day in (DAY, NEXT):
        export_day(tiles.engine, catalog, WATCH, day)
    table = catalog.load_table(WATCH.identifier("training"))
    first, second = (task.file.file_path for task in table.scan().plan_files())
    commit_deletes(table, delete_positions(table, {first: [0]}))
    commit_deletes(table, delete_vector(table, second, [1]))
    rows = len(table_rows(catalog, WATCH))
    table.manage_snapshots().create_tag(table.refresh().current_snapshot().snapshot_id, "kept").commit()
    commit_deletes(table, delete_equal(table, DAY, viewer_id=[5]))
    # Statistics as Spark and Trino leave them: of a table, of its partitions, and of a kind that is not known here.
    current = table.refresh().current_snapshot()
    assert current is not None
    made = {}
    for kind in ("stats.puffin", "partition-stats.parquet", "sketch.bin"):
        made[kind] = f"{table.location()}/metadata/{uuid.uuid4()}-{kind}"
        with table.io.new_output(made[kind]).create() as out:
            out.write(kind.encode())
    table.update_statistics().set_statistics(
        StatisticsFile(
            snapshot_id=current.snapshot_id,
            statistics_path=made["stats.puffin"],
            file_size_in_bytes=12,
            file_footer_size_in_bytes=4,
            blob_metadata=[],
        )
    ).commit()
    metadata = Path(table.refresh().metadata_location.removeprefix("file://"))
    content = json.loads(metadata.read_text())
    content["partition-statistics"] = [
        {
            "snapshot-id": current.snapshot_id,
            "statistics-path": made["partition-stats.parquet"],
            "file-size-in-bytes": 23,
        }
    ]
    content["sketches"] = [{"of": {"path": made["sketch.bin"]}}]
    metadata.write_text(json.dumps(content))

    before = named(catalog.load_table(WATCH.identifier("training")))
    assert {path.name.rpartition("-")[2] for path in before} >= {
        "stats.puffin",
        "sketch.bin",
        "deletes.puffin",
    }
    stray = metadata.with_name("stray-stats.parquet")
    stray.write_bytes(b"named by nothing")
    # Expiring would write other metadata, without what pyiceberg does not know.
    report = maintain(catalog, WATCH, now=later(), keep_snapshots=timedelta(days=3650))
    assert (report.snapshots_expired, report.files_removed) == (0, 1)
    assert not stray.exists()
    assert [path for path in before if not path.exists()] == []

    done = maintain(catalog, WATCH, now=later(), keep_snapshots=KEEP)
    assert done.snapshots_expired > 0
    after = named(catalog.load_table(WATCH.identifier("training")))
    assert {path.name for path in after} >= {Path(made[kind]).name for kind in list(made)[:2]}
    tag = catalog.load_table(WATCH.identifier("training")).refs()["kept"]
    assert len(table_rows(catalog, WATCH, tag.snapshot_id)) == rows
