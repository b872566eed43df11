"""Events per second of `ingest_file`, against a plain COPY of the same bytes into a table without a key.

Run it on a running embedded engine: `python benchmarks/ingest.py [events]`. It works in a schema of its
own, which it drops.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.messages import Topic, topic_of
from dagster_prefs.events.raw import IngestReport
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.settings import load_settings
from dagster_prefs.tools.scenario import SimulationPlan
from dagster_prefs.tools.simulator import simulate_to_files

SCHEMA = "benchmark_ingest"


def main(events: int) -> None:
    settings = load_settings()
    engine, registry = replace(EngineConfiguration.of(settings), schema=SCHEMA), settings.registry()
    plan = SimulationPlan(
        datetime(2026, 1, 31, tzinfo=UTC), view_events=events, shop_events=0, interactions=0, items=1
    )
    started = time.perf_counter()
    for _ in plan.events():
        pass
    print(f"simulate           {events / (time.perf_counter() - started):>10,.0f} events/s")
    with engine.connect() as session, tempfile.TemporaryDirectory() as folder:
        session.execute(f"drop schema if exists {SCHEMA} cascade")
        session.execute(f"create schema {SCHEMA}")
        try:
            session.execute(
                f"create table {SCHEMA}.{registry.topics['view_events'].raw} (source text not null, "
                "source_partition int not null, source_offset bigint not null, data bytea not null, "
                "kafka_timestamp timestamptz, arrived_at timestamptz not null default clock_timestamp(), "
                "primary key (source, source_partition, source_offset))"
            )
            session.execute(
                f"create table {SCHEMA}.ingest_files (source text primary key, path text, topic text, "
                "lines bigint, shift_seconds bigint, completed_at timestamptz)"
            )
            session.execute(f"create unlogged table {SCHEMA}.bare (data bytea)")
            path = simulate_to_files(Path(folder), plan)["view_events"]
            lines = path.read_bytes().splitlines()
            started = time.perf_counter()
            with session.cursor().copy(f"copy {SCHEMA}.bare from stdin (format binary)") as copy:
                copy.set_types(["bytea"])
                for line in lines:
                    copy.write_row((line,))
            limit = events / (time.perf_counter() - started)
            print(f"plain COPY         {limit:>10,.0f} events/s")
            table = Path(folder, "views.parquet")
            write_parquet(path, topic_of(registry, "view_events"), table)
            for name, moment in (("ingest_file", None), ("ingest_file, shift", datetime.now(UTC))):
                target = path.rename(path.with_name(f"{name}.jsonl"))
                ingested = ingest_file(engine, registry, target, FileOptions("view_events", shift_to=moment))
                path = target
                tell(name, ingested, limit)
            tell(
                "ingest_file, Parquet",
                ingest_file(engine, registry, table, FileOptions("view_events")),
                limit,
            )
        finally:
            session.execute(f"drop schema if exists {SCHEMA} cascade")


def write_parquet(lines: Path, topic: Topic, target: Path) -> None:
    """Write the valid events as typed columns, in row groups as warehouses export them."""
    types = {
        "bigint": pa.int64(),
        "int": pa.int32(),
        "decimal": pa.float64(),
        "timestamptz": pa.timestamp("us"),
    }
    now = datetime.now(UTC)
    valid = [line for line in lines.read_bytes().splitlines() if rejection_reason(line, topic, now) is None]
    documents = [json.loads(line, parse_int=Decimal, parse_float=Decimal) for line in valid]
    columns = {
        field.name: pa.array(
            [topic.moment(one).replace(tzinfo=None) for one in documents]
            if field.name == topic.time
            else [topic.text(one, field.name) for one in documents]
        ).cast(types.get(field.type, pa.string()))
        for field in topic.fields
    }
    pq.write_table(pa.table(columns), target, row_group_size=250_000)


def tell(name: str, report: IngestReport, limit: float) -> None:
    """Print the pace of an ingestion, and its ratio to the plain COPY's."""
    speed = report.accepted / report.seconds
    print(f"{name:<20} {speed:>8,.0f} events/s   {speed / limit:.2f} of plain COPY")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
