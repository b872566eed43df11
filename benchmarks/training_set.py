"""A training set against what no join can beat, and against DuckDB's bare join of the same Parquet files.

    python benchmarks/training_set.py [--tiles 10000000] [--labels 1000000] [--days 60] [--folder DIR] [--json FILE]

Tiles are made once (in a folder that is kept where `--folder` names one) and lie in Iceberg tables as exports leave
them: one sorted file a day. Each contestant is a process of its own, so that memory and CPU are its own:

- `build`: `build_training_set` with everything it promises: checked labels, snapshots, fingerprints, manifest
- `as known`: the same with the version of every tile at the label's time
- `join`: DuckDB over the same files and labels, the same features, written to Parquet; nothing checked, no manifest
- `limit`: DuckDB reads the columns that the features need, sums them, and writes as many rows as there are labels

Prints wall and CPU seconds, peak memory, and the ratios of `build` to the other two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.duck import JOINING
from dagster_prefs.iceberg.publish import DayFiles, write_day
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, ensure_table, tile_tables
from dagster_prefs.training.training_set import LabelJoin, build_training_set
from dagster_prefs.training.windows import choose_features

# Ahead of the clock, so that every version is older than the labels that `as known` compares it with.
REGISTRY = load_registry(Path(__file__).resolve().parents[1] / "dbt_project")
TABLES = tile_tables(REGISTRY)
WATCH, GENRE, INTERACTIONS = (
    TABLES[name] for name in ("viewer_watch_daily", "viewer_genre_daily", "viewer_interactions_daily")
)
FEATURES = choose_features(REGISTRY, "viewer")
LAST_DAY = date(2100, 3, 1)
GENRES = 12


# A day of each table, by number of viewers, from hashes of viewer and day: the same on every run.
_ACTIVE = "from range($viewers) as v(viewer_id) where hash(viewer_id, $day, '{salt}') % 10 < {tenths}"
_H = "hash(viewer_id, $day, '{salt}')"
DAYS = {
    WATCH.name: f"""
        select viewer_id, $day as watch_date, 1 + {_H} % 9000 as watch_seconds,
          cast(0 as decimal(28, 6)) as watch_time_minutes, 1 + {_H} % 7 as views, 1 as content_started,
          {_H} % 2 as completions, 1 as genres_watched, $moment as last_event_at {_ACTIVE}
        order by viewer_id""".replace("{salt}", "watch").replace("{tenths}", "5"),
    GENRE.name: f"""
        select viewer_id, $day as watch_date, 'genre ' || (({_H} + k) % {GENRES}) as genre,
          1 + ({_H} // 7 + k) % 4000 as watch_seconds, 1 + {_H} % 3 as views, {_H} % 2 as completions,
          $moment as last_event_at {_ACTIVE.replace(" where", ", range(2) as g(k) where")}
        order by viewer_id, genre""".replace("{salt}", "watch").replace("{tenths}", "5"),
    INTERACTIONS.name: f"""
        select viewer_id, $day as interaction_date, {_H} % 3 as likes, {_H} % 5 // 4 as shares,
          {_H} % 7 // 6 as searches, $moment as last_event_at {_ACTIVE}
        order by viewer_id""".replace("{salt}", "likes").replace("{tenths}", "2"),
}


def prepare(folder: Path, tiles: int, labels: int, days: int) -> None:
    """Make the tables and `labels.parquet` unless they are there."""
    done = folder / "ready.json"
    plan = {"tiles": tiles, "labels": labels, "days": days}
    if done.is_file() and json.loads(done.read_text()) == plan:
        return
    # Of another plan, or of a run that did not end.
    shutil.rmtree(folder / "warehouse", ignore_errors=True)
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    # Half of all viewers watch on a day, in two genres; a fifth interact.
    viewers = round(tiles / days / (0.5 + 2 * 0.5 + 0.2))
    with duckdb.connect() as session:
        for spec, _ in FEATURES.sources:
            table = ensure_table(catalog, "training", spec)
            files = []
            for number in range(days):
                day = LAST_DAY - timedelta(days=days - 1 - number)
                moment = datetime(day.year, day.month, day.day, 12, tzinfo=UTC).isoformat()
                rows = session.sql(
                    DAYS[spec.name].replace("$moment", f"timestamptz '{moment}'"),
                    params={"viewers": viewers, "day": day},
                ).to_arrow_table()
                written = DayFiles(f"{number:016x}", rows.num_rows, {}, {})
                write_day(table, spec, day, written, shaped(rows, arrow_schema(table)))
                files += written.files
            with table.transaction() as transaction, transaction.update_snapshot().fast_append() as snapshot:
                for file in files:
                    snapshot.append_data_file(file)
        session.execute(
            f"copy (select number as label, hash(number) % {viewers} as viewer_id, timestamptz "
            f"'{LAST_DAY.isoformat()} 12:00:00+00' - interval 1 second * cast(hash(number, 1) % "
            f"{86_400 * (days - 30)} as bigint) as label_time from range({labels}) as n(number)) "
            f"to '{folder / 'labels.parquet'}' (format parquet)"
        )
    done.write_text(json.dumps(plan))


def shaped(rows: pa.Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_batches():
        yield pa.RecordBatch.from_arrays(
            [batch.column(field.name).cast(field.type) for field in schema], schema=schema
        )


def build(folder: Path, *, as_known: bool = False) -> None:
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    build_training_set(
        catalog,
        LabelJoin(
            str(folder / "labels.parquet"), FEATURES, datetime(2101, 1, 1, tzinfo=UTC), as_known=as_known
        ),
        folder / "build.parquet",
    )


def _session(folder: Path) -> duckdb.DuckDBPyConnection:
    session = duckdb.connect(
        str(folder / f"bare-{os.getpid()}.duckdb"),
        config={"memory_limit": JOINING[0], "preserve_insertion_order": False},
    )
    session.execute(
        "create view points as select label as point, viewer_id, cast(label_time at time zone 'UTC' as date) as day "
        f"from '{folder / 'labels.parquet'}'"
    )
    for spec, _ in FEATURES.sources:
        session.execute(
            f"create view {spec.name} as from read_parquet('{_files(folder, spec)}', hive_partitioning = false)"
        )
    return session


def _files(folder: Path, spec: TileTable) -> str:
    return str(folder / "warehouse" / "training" / spec.name / "data" / "**" / "*.parquet")


def join(folder: Path) -> None:
    with closing(_session(folder)) as session:
        session.execute(
            f"copy (select * from '{folder / 'labels.parquet'}' as labels join ({FEATURES.sql('training')}) as f "
            f"on f.point = labels.label) to '{folder / 'join.parquet'}' (format parquet, compression zstd)"
        )


def limit(folder: Path) -> None:
    with closing(_session(folder)) as session:
        for spec, columns in FEATURES.sources:
            sums = ", ".join(
                f"count({name})" if name == "genre" else f"sum({name})" for name in ("viewer_id", *columns)
            )
            session.execute(f"select {sums}, max({spec.day}) from {spec.name}").fetchall()
        labels = folder / "labels.parquet"
        values = ", ".join(f"label + {n} as f{n}" for n in range(11))
        session.execute(
            f"copy (select *, {values}, [label] as a, [viewer_id] as b from '{labels}') "
            f"to '{folder / 'limit.parquet'}' (format parquet, compression zstd)"
        )


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds and peak MB of `work` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        started = time.perf_counter()
        work()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        send.send(
            {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_mb": usage.ru_maxrss / 1024,
            }
        )

    process = context.Process(target=run)
    process.start()
    # Its end has to stay open in one process only, or a failure would be waited for for ever.
    send.close()
    try:
        found: dict[str, float] = receive.recv()
    finally:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=60, help="days of tiles, at least 31")
    parser.add_argument("--folder", type=Path, help="keeps the tiles for the next run")
    parser.add_argument("--json", type=Path, help="also writes the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-training-set-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measured(lambda: prepare(folder, options.tiles, options.labels, options.days))
        contestants: dict[str, Callable[[], None]] = {
            "build": lambda: build(folder),
            "as known": lambda: build(folder, as_known=True),
            "join": lambda: join(folder),
            "limit": lambda: limit(folder),
        }
        figures = {name: measured(work) for name, work in contestants.items()}
        rows = pq.ParquetFile(folder / "build.parquet").metadata.num_rows
    print(f"{options.tiles:,} tiles, {rows:,} labels, {os.cpu_count()} cores, {JOINING[0]} for the join")
    for name, found in figures.items():
        print(
            f"{name:9} {found['seconds']:7.1f} s {found['cpu_seconds']:7.1f} CPU s {found['peak_mb']:7,.0f} MB"
        )
    for other in ("join", "limit"):
        print(
            f"build / {other}: {figures['build']['seconds'] / figures[other]['seconds']:.2f} wall, "
            f"{figures['build']['cpu_seconds'] / figures[other]['cpu_seconds']:.2f} CPU"
        )
    if options.json:
        options.json.write_text(json.dumps({"tiles": options.tiles, "labels": rows, **figures}, indent=2))


if __name__ == "__main__":
    main()
