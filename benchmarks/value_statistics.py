"""Statistics of 5,000,000 tile rows against a bare scan of the same files.

`python benchmarks/value_statistics.py [--rows 5000000] [--days 5] [--folder DIR] [--json FILE]`. It needs no service.
The rows lie in an Iceberg table as exports leave them, one sorted file a day. Each contestant is a process of its own,
so that memory and CPU are its own:

- `describe`: `collect_tiles`, with everything that it promises, the table of statistics included
- `scan`: Arrow reads every column of the same files, and DuckDB counts, sums and takes the extremes of each

Prints wall and CPU seconds, peak memory, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.duck import duck_session, registered
from dagster_prefs.iceberg.files import read_rows, tile_files
from dagster_prefs.iceberg.publish import DayFiles, write_day
from dagster_prefs.iceberg.tables import arrow_schema, ensure_table, tile_tables
from dagster_prefs.values.collect import collect_tiles
from dagster_prefs.values.describe import SESSION

REGISTRY = load_registry(Path(__file__).resolve().parents[1] / "dbt_project")
SPEC = tile_tables(REGISTRY)["viewer_watch_daily"]
LAST_DAY = date(2026, 3, 1)
NAMESPACE = "training"
# The same rows on every run, by viewer and day.
ROWS = """
    select viewer_id, $day as watch_date, 1 + hash(viewer_id, $day) % 9000 as watch_seconds,
      cast((1 + hash(viewer_id, $day) % 9000) / 60 as decimal(28, 6)) as watch_time_minutes,
      1 + hash(viewer_id, $day, 1) % 7 as views, 1 as content_started, hash(viewer_id, $day, 2) % 2 as completions,
      1 as genres_watched, $moment as last_event_at
    from range($viewers) as v(viewer_id)
"""


def prepare(folder: Path, rows: int, days: int) -> None:
    """Make the table unless it is there."""
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    table = ensure_table(catalog, NAMESPACE, SPEC)
    if table.current_snapshot() is not None:
        return
    schema = arrow_schema(table)
    files = []
    with duckdb.connect() as session:
        for number in range(days):
            day = LAST_DAY - timedelta(days=number)
            moment = datetime(day.year, day.month, day.day, 12, tzinfo=UTC).isoformat()
            made = session.sql(
                ROWS.replace("$moment", f"timestamptz '{moment}'"),
                params={"viewers": rows // days, "day": day},
            ).to_arrow_table()
            batches: Iterator[pa.RecordBatch] = (
                pa.RecordBatch.from_arrays(
                    [batch.column(field.name).cast(field.type) for field in schema], schema=schema
                )
                for batch in made.to_batches()
            )
            written = DayFiles(f"{number:016x}", made.num_rows, {}, {})
            write_day(table, SPEC, day, written, batches)
            files += written.files
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as snapshot:
        for file in files:
            snapshot.append_data_file(file)


def describe(folder: Path) -> int:
    """Describe every day, as the nightly job does; returns the number of days."""
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    if catalog.table_exists(f"{NAMESPACE}.value_statistics"):
        catalog.drop_table(f"{NAMESPACE}.value_statistics")
    now = datetime(LAST_DAY.year, LAST_DAY.month, LAST_DAY.day, 6, tzinfo=UTC) + timedelta(days=1)
    return len(collect_tiles(catalog, REGISTRY, NAMESPACE, now=now).described)


def scan(folder: Path) -> int:
    """Read every column of the same files, and aggregate what costs next to nothing; returns the number of rows."""
    table = open_catalog("sqlite", str(folder / "warehouse")).load_table(SPEC.identifier(NAMESPACE))
    schema = arrow_schema(table)
    files = [file for found in tile_files(table, SPEC).values() for file in found]
    batches = (batch.cast(schema) for file in files for batch in read_rows(table, file, schema.names))
    columns = ", ".join(f"count({name}), min({name}), max({name})" for name in schema.names)
    with duck_session(*SESSION) as session, registered(session, "tiles", schema, batches):
        return int(session.execute(f"select count(*), {columns} from tiles").fetchall()[0][0])


def measured(contestant: Callable[[Path], int], folder: Path) -> dict[str, Any]:
    """Run a contestant in a process of its own; wall and CPU seconds, and peak memory in megabytes."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        started, cpu = time.perf_counter(), time.process_time()
        result = contestant(folder)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sender.send((result, time.perf_counter() - started, time.process_time() - cpu, used))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    result, seconds, cpu, memory = receiver.recv()
    process.join()
    return {
        "result": result,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(memory),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--days", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        preparing = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, given.rows, given.days)
        )
        preparing.start()
        preparing.join()
        found = {name: measured(run, folder) for name, run in (("scan", scan), ("describe", describe))}
    found["ratio"] = {
        name: round(found["describe"][name] / found["scan"][name], 2)
        for name in ("seconds", "cpu_seconds", "peak_mb")
    }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
