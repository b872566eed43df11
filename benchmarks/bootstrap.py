"""A bootstrap of a topic's history on the embedded engine, next to events that Kafka delivers, against an oracle.

    python benchmarks/bootstrap.py [--events 10000000] [--files 40] [--overlap 0.1]

It starts an engine of its own in a temporary folder and deploys the project. The history is Parquet files of views; the
newest share of it (`--overlap`) and as many later events are delivered under a source of Kafka's too, half of them
before the bootstrap and half after. Then it prints one JSON line with

- `bootstrap_seconds` and `per_second`: `prefs bootstrap`, of which the process is killed once in the middle;
- `apply_seconds`: from then until every view has it; the follower works from the beginning;
- `levels`: the levels that the views' freshness had from the beginning of the bootstrap until then;
- `events` and `tiles`: what the engine has;
- `wrong`: events and days of a viewer that differ from the ones computed by DuckDB from the files and the deliveries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.freshness.measures import measure_views
from dagster_prefs.live.presence import read_follower, wait_until_applied
from dagster_prefs.local.services import LocalServices
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
TOPIC = "view_events"
DAYS = 60
BATCH = 5_000
PATIENCE_SECONDS = 7_200.0


def write_history(folder: Path, events: int, files: int, end: datetime) -> None:
    """Write the events as Parquet files in order of time, with their identities."""
    step = timedelta(days=DAYS) / events
    size = -(-events // files)
    for file in range(files):
        numbers = pa.array(range(file * size, min(events, (file + 1) * size)), pa.int64())
        pq.write_table(
            rows_of(numbers, end - timedelta(days=DAYS), step, events), folder / f"{file:05}.parquet"
        )


def rows_of(numbers: pa.Array, first: datetime, step: timedelta, events: int) -> pa.Table:
    """Return the events of these numbers."""
    viewer = pc.subtract(numbers, pc.multiply(pc.divide(numbers, events // 50), events // 50))
    at = pc.add(
        pa.scalar(int(first.timestamp() * 1_000_000)),
        pc.multiply(numbers, int(step.total_seconds() * 1_000_000)),
    )
    return pa.table(
        {
            "event_id": pc.binary_join_element_wise("e", pc.cast(numbers, pa.string()), ""),
            "viewer_id": viewer,
            "content_id": pc.binary_join_element_wise(
                "c", pc.cast(pc.bit_wise_and(numbers, 511), pa.string()), ""
            ),
            "genre": pa.array(["drama", "crime", "sport", "news"]).take(pc.bit_wise_and(numbers, 3)),
            "watch_duration_sec": pc.add(pc.bit_wise_and(numbers, 2047), 1),
            "completion_pct": pc.divide(pc.cast(pc.bit_wise_and(numbers, 127), pa.float64()), 128.0),
            "watched_at": at.cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC")),
        }
    )


def deliver(platform: Platform, table: pa.Table, offset: int) -> None:
    """Store events as Kafka's reader does."""
    topic = platform.registry.topic(TOPIC)
    with RawStore(platform.engine) as store:
        for batch in table.to_batches(BATCH):
            rows = batch.to_pylist()
            messages = [
                RawMessage(
                    0,
                    offset + place,
                    json.dumps({**row, "watched_at": row["watched_at"].isoformat()}).encode(),
                    row["watched_at"],
                )
                for place, row in enumerate(rows)
            ]
            store.write(topic, f"kafka:{TOPIC}", messages)
            offset += len(rows)


def bootstrap(folder: Path, parts: int, platform: Platform) -> float:
    """Run the command, killed once when half of the parts are stored, and return the seconds of both runs."""
    command = [sys.executable, "-m", "dagster_prefs", "bootstrap", TOPIC, "--from", str(folder)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None:
            states = platform.bootstraps(TOPIC)
            if states and states[0].parts_done >= parts // 2:
                first.send_signal(signal.SIGKILL)
                break
            time.sleep(0.2)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


@contextmanager
def followed(platform: Platform) -> Iterator[Counter[str]]:
    """Follow meanwhile, and count the levels of the views' freshness, read every two seconds."""
    levels: Counter[str] = Counter()
    ended = threading.Event()
    follower = platform.follower()
    # The local AWS server would be measured instead.
    follower.work = replace(follower.work, publish=lambda domain, keys, connection: None, readers={})

    def look() -> None:
        while not ended.wait(2):
            now = datetime.now(UTC)
            levels.update(one.level for one in measure_views(platform.engine, platform.registry, now=now))

    threads = [threading.Thread(target=follower.run, args=[ended]), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        with platform.engine.connect() as connection:
            # Until the follower has told of its first step, a wait for it would find none.
            while read_follower(connection, platform.engine) is None:
                time.sleep(0.1)
        yield levels
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def applied(platform: Platform) -> float:
    """Wait until all that has arrived is applied, and return the seconds."""
    started = time.monotonic()
    wait_until_applied(platform.engine, seconds=PATIENCE_SECONDS)
    return time.monotonic() - started


def wrong(platform: Platform, folder: Path, later: pa.Table) -> int:
    """Return how many events and days of a viewer differ from what files and deliveries say."""
    tile = "select viewer_id, watch_date, watch_seconds, views from viewer_watch_metrics_1d"
    with duckdb.connect() as session, platform.engine.connect() as connection:
        session.register("later", later)
        session.execute("set timezone = 'UTC'")
        session.execute(
            f"create table expected as select viewer_id, watched_at::date as day, sum(watch_duration_sec) as seconds,"
            f" count(*) as views from (from '{folder}/*.parquet' union all from later) group by 1, 2"
        )
        ours = folder.parent / "tiles.csv"
        with (
            ours.open("wb") as target,
            connection.cursor().copy(f"copy ({tile}) to stdout (format csv)") as copy,
        ):
            for part in copy:
                target.write(bytes(part))
        ((days,),) = session.execute(
            "with found as (select * from read_csv(?, header = false, names = ['viewer_id', 'day', 'seconds', 'views'],"
            " types = ['bigint', 'date', 'hugeint', 'bigint']))"
            " select (select count(*) from (from found except from expected))"
            " + (select count(*) from (from expected except from found))",
            [str(ours)],
        ).fetchall()
        ((expected,),) = session.execute("select sum(views) from expected").fetchall()
        ((events,),) = connection.execute("select count(*) from view_events").fetchall()
    return int(days) + abs(int(expected) - int(events))


def main() -> None:
    """Measure one bootstrap and print the figures."""
    parser = argparse.ArgumentParser(description="A bootstrap on the embedded engine.")
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--overlap", type=float, default=0.1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefs-bootstrap-") as where:
        folder = Path(where)
        figures = measured(folder, given.events, given.files, given.overlap)
        print(json.dumps(figures))


def measured(folder: Path, events: int, files: int, overlap: float) -> dict[str, Any]:
    """Return the figures of one bootstrap."""
    ports = random.sample(range(20_000, 32_000), 2)
    os.environ |= {
        "PREFS_DATA_DIR": str(folder / "data"),
        "PREFS_ENGINE_PORT": str(ports[0]),
        "PREFS_LOCAL_AWS_PORT": str(ports[1]),
        "PREFS_PROJECT_DIR": str(PROJECT),
    }
    settings = load_settings()
    services = LocalServices(folder / "data", *ports, user=settings.user, database=settings.database)
    services.up(owner_pid=os.getpid())
    try:
        platform = Platform(settings)
        platform.apply()
        history = folder / "history"
        history.mkdir()
        # Nothing happens in the future, also not what Kafka alone delivers.
        end = datetime.now(UTC) - timedelta(days=DAYS * overlap)
        step = timedelta(days=DAYS) / events
        write_history(history, events, files, end)
        shared = int(events * overlap)
        kafka = rows_of(
            pa.array(range(events - shared, events + shared), pa.int64()),
            end - timedelta(days=DAYS),
            step,
            events,
        )
        deliver(platform, kafka.slice(0, shared), 0)
        with followed(platform) as levels:
            before = applied(platform)
            levels.clear()
            seconds = bootstrap(history, files, platform)
            views = applied(platform)
            during = dict(levels)
            deliver(platform, kafka.slice(shared), shared)
            after = applied(platform)
        with platform.engine.connect() as connection:
            ((held, tiles),) = connection.execute(
                "select (select count(*) from view_events), (select count(*) from viewer_watch_metrics_1d)"
            ).fetchall()
        return {
            "history": events,
            "files": files,
            "delivered_by_kafka": kafka.num_rows,
            "bootstrap_seconds": round(seconds, 1),
            "per_second": round(events / seconds),
            "apply_seconds": round(views, 1),
            "apply_kafka_seconds": [round(before, 1), round(after, 1)],
            "levels": during,
            "events": held,
            "tiles": tiles,
            "wrong": wrong(platform, history, kafka.slice(shared)),
        }
    finally:
        services.down()
        services.delete_state()


if __name__ == "__main__":
    main()
