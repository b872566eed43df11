"""One day of tiles to Iceberg, against the bare limit of the same machine and against dlt, as ratios.

`python benchmarks/export.py [--rows 5000000] [--dlt PYTHON] [--json FILE]`. It needs the engine to be up
(`prefs up`) and works in a schema of its own, which it drops. Each contestant is a process of its own, so that
its memory and CPU are its own; they take turns, so that a drift of the machine meets all of them alike:

- `export`: `export_day`, with the write, the audit and the publishing commit
- `copy`: COPY of the same rows to a client that throws them away
- `parquet`: pyarrow writing the same Parquet from memory
- `dlt`: sql_database (pyarrow backend) to an Iceberg table, without audit or atomic replacement of the day

The limit is `copy` and `parquet`, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.files import day_files
from dagster_prefs.iceberg.publish import ROWS_PER_GROUP
from dagster_prefs.iceberg.tables import PARQUET, tile_tables
from dagster_prefs.settings import load_settings

WATCH = tile_tables(load_registry(Path(__file__).resolve().parents[1] / "dbt_project"))["viewer_watch_daily"]
SCHEMA = "benchmark_export"
DAY = date(2026, 3, 10)
ROUNDS = 3

# Keys come in no order and minutes have six places, as in a view over real events.
TILES = """
create table viewer_watch_metrics_1d as
    select (g * 7919 %% %(prime)s)::bigint as viewer_id, date '2026-03-10' as watch_date,
        (g * 31 %% 9000)::bigint as watch_seconds, round((g * 31 %% 9000) / 60.0, 6) as watch_time_minutes,
        (1 + g %% 7)::bigint as views, 1::bigint as content_started, (g %% 2)::bigint as completions,
        1::bigint as genres_watched,
        timestamptz '2026-03-10 00:00+00' + (g * 13 %% 86400) * interval '1 second' as last_event_at
    from generate_series(1::bigint, %(rows)s) as g;
create unique index on viewer_watch_metrics_1d (viewer_id, watch_date);
create table tile_fingerprints as
    select 'viewer_watch_metrics_1d'::text as tile, watch_date as tile_date, count(*) as row_count,
        sum(watch_seconds) as metric_total, 1::numeric as content_hash, max(last_event_at) as last_event_at
    from viewer_watch_metrics_1d group by watch_date;
create table erased_subjects (subject_kind text, subject_id text, erased_at timestamptz);
analyze viewer_watch_metrics_1d, tile_fingerprints;
"""


def engine() -> EngineConfiguration:
    return replace(EngineConfiguration.of(load_settings()), schema=SCHEMA)


def exported(folder: Path) -> tuple[int, float]:
    catalog = open_catalog("sqlite", folder.as_uri())
    started = time.perf_counter()
    report = export_day(engine(), catalog, WATCH, DAY)
    if report.status != "written":
        sys.exit(f"the export wrote nothing: {report.status} {report.reason}")
    return report.rows, time.perf_counter() - started


def copied(_: Path) -> tuple[int, float]:
    names = [column.name for column in WATCH.columns if column.name != WATCH.day]
    query = sql.SQL("copy (select {} from {} where {} = {}) to stdout").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Identifier(SCHEMA, WATCH.tile),
        sql.Identifier(WATCH.day),
        sql.Literal(DAY),
    )
    rows = 0
    with engine().connect() as connection, connection.cursor() as cursor:
        started = time.perf_counter()
        with cursor.copy(query) as copy:
            while copy.read():
                pass
        rows = cursor.rowcount
        return rows, time.perf_counter() - started


def written(folder: Path) -> tuple[int, float]:
    table = open_catalog("sqlite", folder.as_uri()).load_table(WATCH.identifier("training"))
    files = [file.path.removeprefix("file://") for file in day_files(table, WATCH, DAY)]
    rows = pa.concat_tables([pq.read_table(path) for path in files])
    started = time.perf_counter()
    pq.write_table(
        rows, folder / "limit.parquet", row_group_size=ROWS_PER_GROUP, store_schema=False, **PARQUET
    )
    return rows.num_rows, time.perf_counter() - started


CONTESTANTS: dict[str, Callable[[Path], tuple[int, float]]] = {
    "export": exported,
    "copy": copied,
    "parquet": written,
}


def measured(name: str, folder: Path, interpreter: Path | None = None) -> dict[str, Any]:
    connection = engine()
    script = Path(__file__) if interpreter is None else Path(__file__).with_name("dlt_peer.py")
    told = {
        "ENGINE_ADDRESS": f"{connection.host}:{connection.port}/{connection.database}",
        "ENGINE_USER": connection.user,
        "ENGINE_PASSWORD": connection.password,
        "ENGINE_SCHEMA": SCHEMA,
        # libpq's own variable: the embedded engine's password is in a file.
        "PGPASSFILE": connection.passfile or "",
    }
    outcome = subprocess.run(
        [interpreter or sys.executable, script, "--contestant", name, "--folder", folder],
        env=os.environ | told, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the export of one day of tiles.")
    parser.add_argument("--rows", type=int, default=5_000_000, help="tiles of the day")
    parser.add_argument("--dlt", type=Path, metavar="PYTHON", help="interpreter that has dlt, the peer")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        rows, seconds = CONTESTANTS[given.contestant](given.folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(
            json.dumps(
                {
                    "rows": rows,
                    "seconds": seconds,
                    "cpu": used.ru_utime + used.ru_stime,
                    "megabytes": used.ru_maxrss / 1024,
                }
            )
        )
        return

    place = engine()
    schema = sql.Identifier(SCHEMA)
    with place.connect() as session:
        session.execute(sql.SQL("drop schema if exists {} cascade").format(schema))
        session.execute(sql.SQL("create schema {}").format(schema))
        # A prime above the number of rows: multiplying by it permutes the ids.
        prime = next(
            n
            for n in range(given.rows + 1, given.rows * 2 + 3)
            if all(n % d for d in range(2, int(n**0.5) + 1))
        )
        for statement in TILES.strip().removesuffix(";").split(";"):
            session.execute(
                sql.SQL(statement % {"rows": given.rows, "prime": prime})  # type: ignore[arg-type]
            )
    best: dict[str, dict[str, Any]] = {}
    try:
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                for name in CONTESTANTS:
                    keep_best(best, name, measured(name, Path(folder)))
                if given.dlt:
                    keep_best(best, "dlt", measured("dlt", Path(folder), given.dlt))
    finally:
        with place.connect() as session:
            session.execute(sql.SQL("drop schema {} cascade").format(schema))
    limit = best["copy"]["seconds"] + best["parquet"]["seconds"]
    print(f"\n{given.rows:,} tiles of one day, best of {ROUNDS}, at process level")
    print(
        "| | seconds | rows per second | CPU, s | peak, MB | throughput : limit |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, found in best.items():
        print(
            f"| {name} | {found['seconds']:.1f} | {found['rows'] / found['seconds']:,.0f} | {found['cpu']:.1f} | "
            f"{found['megabytes']:.0f} | {limit / found['seconds']:.2f} |"
        )
    if not given.dlt:
        print("dlt is left out: --dlt names the interpreter of an environment that has it")
    if given.json:
        given.json.write_text(json.dumps(best | {"limit_seconds": limit}, indent=2) + "\n")


def keep_best(best: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    if name not in best or found["seconds"] < best[name]["seconds"]:
        best[name] = found


if __name__ == "__main__":
    main()
