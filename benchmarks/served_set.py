"""A training set as served, against DuckDB's bare as-of join of the same Parquet files.

    python benchmarks/served_set.py [--tiles 10000000] [--events 30000000] [--labels 1000000] [--days 60]
                                    [--folder DIR] [--json FILE]

Events are made once (in a folder that is kept where `--folder` names one), and the tiles from them as their queries
make them: both lie in Iceberg tables as exports leave them, by day. One event in fifty arrives hours or days late. The
domains are those that read tiles. Each contestant is a process of its own, so that memory and CPU are its own:

- `served`: `build_training_set` as served with everything it promises: checked labels, accepted events, refusals,
  fingerprints, manifest
- `as-of`: DuckDB over the same files: every label joined with the newest tile row of its viewer before it (`asof
  join`), one of each table, written to Parquet; nothing summed, checked or refused

Prints wall and CPU seconds, peak memory, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from training_set import FEATURES, GENRE, INTERACTIONS, LAST_DAY, REGISTRY, WATCH, measured, shaped

from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.duck import JOINING
from dagster_prefs.iceberg.event_tables import COMPLETE_SNAPSHOT, COMPLETE_UNTIL, event_tables
from dagster_prefs.iceberg.publish import DayFiles, write_day
from dagster_prefs.iceberg.tables import arrow_schema, ensure_layout, ensure_table
from dagster_prefs.training.served_sql import ServedFeatures
from dagster_prefs.training.training_set import LabelJoin, build_training_set

SERVED = ServedFeatures(REGISTRY, REGISTRY.entity("viewer"), FEATURES.domains)
EVENTS = {name: tables.typed for name, tables in event_tables(REGISTRY).items() if name in SERVED.topics}
# Ahead of every label and arrival.
COMPLETE = datetime(2100, 6, 1, tzinfo=UTC)

# A day of each topic: number, viewer and time of an event from hashes of its number and the day.
_NUMBERED = """
    with numbered as (
      select number, hash(number, $day) as h,
        cast((hash(number, $day, 'viewer') % {active} + {shift}) % {viewers} as bigint) as viewer_id,
        $midnight + interval 1 second * cast(hash(number, $day, 'time') % 86400 as bigint) as moment
      from range({events}) as n(number)
    ), arrived as (
      select *, moment + case when h % 50 = 0 then interval 1 hour * cast(1 + h // 50 % 100 as bigint)
        else interval 1 second end as arrived_at
      from numbered
    )"""
DAYS = {
    "view_events": """
      select 'v' || strftime($day, '%j') || number as event_id, viewer_id, 'content ' || h % 5000 as content_id,
        case when h % 40 > 0 then 'genre ' || (h // 7 % 2 + viewer_id % 10) end as genre,
        cast(h // 3 % 4000 as integer) as watch_duration_sec,
        cast(h // 11 % 1001 / 1000 as decimal(28, 9)) as completion_pct, moment as watched_at, arrived_at, number
      from arrived order by viewer_id""",
    "content_interactions": """
      select 'i' || strftime($day, '%j') || number as event_id, viewer_id,
        ['like', 'share', 'search'][cast(1 + h % 3 as bigint)] as event_type, moment as event_ts, arrived_at, number
      from arrived order by viewer_id""",
}


def prepare(folder: Path, tiles: int, events: int, labels: int, days: int) -> None:
    """Make the tables and `labels.parquet` unless they are there."""
    done = folder / "ready.json"
    plan = {"tiles": tiles, "events": events, "labels": labels, "days": days}
    if done.is_file() and json.loads(done.read_text()) == plan:
        return
    shutil.rmtree(folder / "warehouse", ignore_errors=True)
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    # As in `training_set`: half of all viewers watch on a day, in two genres; a fifth interact.
    viewers = round(tiles / days / (0.5 + 2 * 0.5 + 0.2))
    with duckdb.connect() as session:
        session.execute("set timezone = 'UTC'")
        for name, share in (("view_events", 0.9), ("content_interactions", 0.1)):
            spec = EVENTS[name]
            table = ensure_layout(catalog, "training", spec.layout)
            for number in range(days):
                day = LAST_DAY - timedelta(days=days - 1 - number)
                rows = session.sql(
                    (_NUMBERED + DAYS[name])
                    .replace(
                        "{active}", str(max(1, round(viewers * (0.55 if name == "view_events" else 0.25))))
                    )
                    # Another part of the viewers each day.
                    .replace("{shift}", str(number * 7919 % viewers))
                    .replace("{viewers}", str(viewers))
                    .replace("{events}", str(round(events * share / days)))
                    .replace("$midnight", f"timestamptz '{day.isoformat()} 00:00:00+00'")
                    .replace("$day", f"date '{day.isoformat()}'")
                ).to_arrow_table()
                _append_events(table, rows, day)
            _complete(table)
        _write_tiles(session, catalog, folder, days)
        session.execute(
            f"copy (select number as label, hash(number) % {viewers} as viewer_id, timestamptz "
            f"'{LAST_DAY.isoformat()} 12:00:00+00' - interval 1 second * cast(hash(number, 1) % "
            f"{86_400 * (days - 30)} as bigint) as label_time from range({labels}) as n(number)) "
            f"to '{folder / 'labels.parquet'}' (format parquet)"
        )
    done.write_text(json.dumps(plan))


def _append_events(table: Table, rows: pa.Table, day: date) -> None:
    schema = arrow_schema(table)
    length = rows.num_rows
    # By day of the event, which the partition does not claim to be exactly.
    columns = {
        "arrival_day": pa.repeat(pa.scalar(day, pa.date32()), length),
        "source": pa.repeat(pa.scalar("kafka:bench"), length),
        "source_partition": pa.repeat(pa.scalar(0, pa.int32()), length),
        "source_offset": rows["number"],
        "kafka_timestamp": rows["arrived_at"],
    }
    arrays = [
        columns.get(one.name, rows[one.name] if one.name in rows.column_names else None) for one in schema
    ]
    table.append(
        pa.Table.from_arrays(
            [array.cast(one.type) for array, one in zip(arrays, schema, strict=True)], schema=schema
        )
    )


def _complete(table: Table) -> None:
    snapshot = table.current_snapshot()
    if snapshot is not None:
        with table.transaction() as change:
            change.set_properties(
                {COMPLETE_UNTIL: COMPLETE.isoformat(), COMPLETE_SNAPSHOT: str(snapshot.snapshot_id)}
            )


_VIEWS = """
  sum(watch_duration_sec) as watch_seconds, count(*) as views,
  count(*) filter (where completion_pct >= 0.9) as completions, max(watched_at) as last_event_at"""
TILES = {
    WATCH.name: f"""
      select viewer_id, $day as watch_date, cast(0 as decimal(28, 6)) as watch_time_minutes,
        count(distinct content_id) as content_started, count(distinct genre) as genres_watched, {_VIEWS}
      from $events group by viewer_id order by viewer_id""",
    GENRE.name: f"""
      select viewer_id, $day as watch_date, genre, {_VIEWS}
      from $events where genre is not null group by viewer_id, genre order by viewer_id, genre""",
    INTERACTIONS.name: """
      select viewer_id, $day as interaction_date, count(*) filter (where event_type = 'like') as likes,
        count(*) filter (where event_type = 'share') as shares,
        count(*) filter (where event_type = 'search') as searches, max(event_ts) as last_event_at
      from $events group by viewer_id order by viewer_id""",
}


def _write_tiles(session: duckdb.DuckDBPyConnection, catalog: Catalog, folder: Path, days: int) -> None:
    """Write each tile's days as the tile's query makes them from the events."""
    for tile in SERVED.tiles:
        spec = tile.spec
        table = ensure_table(catalog, "training", spec)
        files = []
        for number in range(days):
            day = LAST_DAY - timedelta(days=days - 1 - number)
            source = (
                f"read_parquet('{folder}/warehouse/training/{tile.topic.relation}/data/"
                f"arrival_day={day.isoformat()}/*.parquet', hive_partitioning = false)"
            )
            query = TILES[spec.name].replace("$events", source).replace("$day", f"date '{day.isoformat()}'")
            rows = session.sql(query).to_arrow_table()
            written = DayFiles(f"{number:016x}", rows.num_rows, {}, {})
            write_day(table, spec, day, written, shaped(rows, arrow_schema(table)))
            files += written.files
        with table.transaction() as transaction, transaction.update_snapshot().fast_append() as snapshot:
            for file in files:
                snapshot.append_data_file(file)


def served(folder: Path) -> None:
    catalog = open_catalog("sqlite", str(folder / "warehouse"))
    join = LabelJoin(str(folder / "labels.parquet"), SERVED, COMPLETE, meaning="served")
    build_training_set(catalog, join, folder / "served.parquet")


def as_of(folder: Path) -> None:
    with closing(
        duckdb.connect(
            str(folder / f"bare-{os.getpid()}.duckdb"),
            config={"memory_limit": JOINING[0], "preserve_insertion_order": False},
        )
    ) as session:
        columns, joins = ["l.*"], []
        for place, tile in enumerate(SERVED.tiles):
            spec = tile.spec
            files = f"{folder}/warehouse/training/{spec.name}/data/**/*.parquet"
            source = f"read_parquet('{files}', hive_partitioning = false)"
            columns += [f"t{place}.{name} as {name}_{place}" for name in tile.totals]
            joins.append(
                f"asof left join {source} as t{place} on t{place}.viewer_id = l.viewer_id "
                f"and t{place}.last_event_at <= l.label_time"
            )
        query = f"select {', '.join(columns)} from '{folder / 'labels.parquet'}' as l {' '.join(joins)}"
        session.execute(f"copy ({query}) to '{folder / 'as-of.parquet'}' (format parquet, compression zstd)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=10_000_000, help="about; three events make one row")
    parser.add_argument("--events", type=int, default=30_000_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=60, help="days of events, at least 31")
    parser.add_argument("--folder", type=Path, help="keeps the events for the next run")
    parser.add_argument("--json", type=Path, help="also writes the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-served-set-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measured(lambda: prepare(folder, options.tiles, options.events, options.labels, options.days))
        catalog = open_catalog("sqlite", str(folder / "warehouse"))
        names = [tile.spec.name for tile in SERVED.tiles]
        tiles, events = (
            sum(_rows(catalog, name) for name in found)
            for found in (names, [spec.name for spec in EVENTS.values()])
        )
        figures = {
            "served": measured(lambda: served(folder)),
            "as-of": measured(lambda: as_of(folder)),
        }
        rows = pq.ParquetFile(folder / "served.parquet").metadata.num_rows
    print(
        f"{tiles:,} tiles, {events:,} events, {rows:,} labels, {os.cpu_count()} cores, {JOINING[0]} for the join"
    )
    for name, found in figures.items():
        print(
            f"{name:9} {found['seconds']:7.1f} s {found['cpu_seconds']:7.1f} CPU s {found['peak_mb']:7,.0f} MB"
        )
    print(
        f"served / as-of: {figures['served']['seconds'] / figures['as-of']['seconds']:.2f} wall, "
        f"{figures['served']['cpu_seconds'] / figures['as-of']['cpu_seconds']:.2f} CPU"
    )
    if options.json:
        content = {"tiles": tiles, "events": events, "labels": rows, **figures}
        options.json.write_text(json.dumps(content, indent=2))


def _rows(catalog: Catalog, name: str) -> int:
    snapshot = catalog.load_table(f"training.{name}").current_snapshot()
    summary = snapshot.summary if snapshot else None
    return int(summary["total-records"] or 0) if summary else 0


if __name__ == "__main__":
    main()
