"""A range of small days of every training table to Iceberg: day by day, as one range, and by `prefs export`.

`python benchmarks/export_range.py [--days 35] [--rows 50] [--json FILE]`. It needs the engine to be up (`prefs up`)
and works in a schema of its own, which it drops, and with catalogs of its own. Each contestant is a process of its own
and starts with empty tables; they take turns, so that a drift of the machine meets all of them
alike:

- `days`: `export_day` for each day, with the write, the audit and the publishing commit of each
- `range`: `export_days` for each table, which audits every day and publishes all of them with one commit
- `command`: `prefs export`, with all that it loads
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
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg import sql
from pyiceberg.types import DateType, DecimalType, StringType, TimestamptzType

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, export_days
from dagster_prefs.iceberg.tables import TileTable, tile_tables
from dagster_prefs.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
TABLES = tile_tables(load_registry(PROJECT)).values()
SCHEMA = "benchmark_export_range"
ROUNDS = 3


def engine() -> EngineConfiguration:
    return replace(EngineConfiguration.of(load_settings()), schema=SCHEMA)


def complete_days(number: int) -> list[date]:
    today = datetime.now(UTC).date()
    return [today - timedelta(days=ago) for ago in range(number, 0, -1)]


def tile_query(spec: TileTable) -> sql.Composed:
    """Return a query for `rows` tiles of each day, which every rule of the audit accepts."""

    def value(name: str) -> sql.SQL:
        kind = spec.by_name[name].type
        if name == spec.day:
            return sql.SQL("moment::date")
        if name == spec.subject:
            return sql.SQL("number")
        if isinstance(kind, StringType):
            return sql.SQL("'text ' || number")
        if isinstance(kind, TimestamptzType):
            return sql.SQL("moment at time zone 'UTC' + interval '1 hour'")
        return sql.SQL({DateType: "moment::date", DecimalType: "1::numeric"}.get(type(kind), "1::bigint"))

    return sql.SQL(
        "select {columns} from generate_series({first}::timestamp, {last}::timestamp, interval '1 day') as moment,"
        " generate_series(1::bigint, {rows}) as number"
    ).format(
        columns=sql.SQL(", ").join(
            value(column.name) + sql.SQL(" as ") + sql.Identifier(column.name) for column in spec.columns
        ),
        first=sql.Placeholder("first"),
        last=sql.Placeholder("last"),
        rows=sql.Placeholder("rows"),
    )


def fill(session: Any, days: list[date], rows: int) -> None:
    session.execute(sql.SQL("set search_path to {}").format(sql.Identifier(SCHEMA)))
    session.execute(
        "create table erased_subjects (subject_kind text, subject_id text, erased_at timestamptz);"
        "create table tile_fingerprints (tile text, tile_date date, row_count bigint, metric_total numeric,"
        " content_hash numeric, last_event_at timestamptz)"
    )
    for spec in TABLES:
        tile = sql.Identifier(spec.tile)
        columns = sql.SQL("create table {} as {}").format(tile, tile_query(spec))
        cursor = session.cursor()
        # Parameters of a utility statement are only possible on the client's side.
        cursor.execute(
            columns.as_string(session)
            .replace("%(first)s", f"'{days[0]}'")
            .replace("%(last)s", f"'{days[-1]}'")
            .replace("%(rows)s", str(rows))
        )
        session.execute(
            sql.SQL(
                "insert into tile_fingerprints select {name}, {day}, count(*), sum({metric}), 1, max(last_event_at)"
                " from {tile} group by {day}"
            ).format(
                name=sql.Literal(spec.tile),
                day=sql.Identifier(spec.day),
                metric=sql.SQL(" + ").join(map(sql.Identifier, spec.metric)),
                tile=tile,
            )
        )


def by_day(folder: Path, days: list[date]) -> float:
    catalog = open_catalog("sqlite", folder.as_uri())
    started = time.perf_counter()
    for spec in TABLES:
        for day in days:
            export_day(engine(), catalog, spec, day)
    return time.perf_counter() - started


def by_range(folder: Path, days: list[date]) -> float:
    catalog = open_catalog("sqlite", folder.as_uri())
    started = time.perf_counter()
    for spec in TABLES:
        for _ in export_days(engine(), catalog, spec, days):
            pass
    return time.perf_counter() - started


def by_command(folder: Path, days: list[date]) -> float:
    settings = load_settings()
    connection = engine()
    own = {
        "PREFS_PROJECT_DIR": str(PROJECT),
        "PREFS_DATA_DIR": str(folder.parent / "state"),
        "PREFS_ICEBERG_WAREHOUSE": folder.as_uri(),
        "PREFS_ENGINE_SCHEMA": SCHEMA,
        "PREFS_ENGINE_PORT": str(connection.port),
        "PREFS_ENGINE_USER": connection.user,
        "PREFS_ENGINE_PASSWORD": connection.password,
        # The password of an embedded engine lies in the data folder that it was started with.
        **({"PGPASSFILE": connection.passfile} if connection.passfile else {}),
        "PREFS_ENGINE_DATABASE": connection.database,
        "PREFS_LOCAL_AWS_PORT": str(settings.local_aws_port),
        "PREFS_EXPORT_START_DATE": days[0].isoformat(),
    }
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dagster_prefs", "export"],
        env=os.environ | own, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return time.perf_counter() - started


CONTESTANTS: dict[str, Callable[[Path, list[date]], float]] = {
    "days": by_day,
    "range": by_range,
    "command": by_command,
}


def measured(name: str, days: int, place: str) -> dict[str, Any]:
    """Run one contestant in a process of its own, with empty tables in a new folder of `place`."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        outcome = subprocess.run(
            [sys.executable, __file__, "--contestant", name, "--folder", folder, "--days", str(days)],
            stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
        catalog = open_catalog("sqlite", Path(folder).as_uri())
        tables = [catalog.load_table(spec.identifier("training")) for spec in TABLES]
        held = {sum(1 for _ in table.inspect.partitions().to_pylist()) for table in tables}
        if held != {days}:
            sys.exit(f"{name} exported {held} days, not {days}")
        # A commit writes one file of metadata, which its name numbers from 0.
        found["commits"] = sum(
            int(table.metadata_location.rpartition("/")[2].partition("-")[0]) + 1 for table in tables
        )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the export of a range of small days.")
    parser.add_argument("--days", type=int, default=35, help="days of the range")
    parser.add_argument("--rows", type=int, default=50, help="tiles of a day of a table")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    days = complete_days(given.days)
    if given.contestant:
        seconds = CONTESTANTS[given.contestant](given.folder, days)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(one.ru_utime + one.ru_stime for one in used)
        megabytes = max(one.ru_maxrss for one in used) / 1024
        print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": megabytes}))
        return

    schema = sql.Identifier(SCHEMA)
    best: dict[str, dict[str, Any]] = {}
    with engine().connect() as session:
        session.execute(sql.SQL("drop schema if exists {} cascade").format(schema))
        session.execute(sql.SQL("create schema {}").format(schema))
        fill(session, days, given.rows)
        try:
            with tempfile.TemporaryDirectory() as place:
                for _ in range(ROUNDS):
                    for name in CONTESTANTS:
                        found = measured(name, given.days, place)
                        if name not in best or found["seconds"] < best[name]["seconds"]:
                            best[name] = found
        finally:
            session.execute(sql.SQL("drop schema {} cascade").format(schema))
    slowest = best["days"]["seconds"]
    print(f"\n{given.days} days of {given.rows} tiles, {len(TABLES)} tables, best of {ROUNDS}")
    print(
        "| | seconds | CPU of the process, s | peak, MB | commits | days : it |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, found in best.items():
        print(
            f"| {name} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['megabytes']:.0f} | "
            f"{found['commits']} | {slowest / found['seconds']:.1f} |"
        )
    if given.json:
        given.json.write_text(json.dumps(best, indent=2))


if __name__ == "__main__":
    main()
