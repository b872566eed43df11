"""dlt as a peer of benchmarks/export.py: the same rows of the same day to an Iceberg table.

Runs in an environment of its own (`make bench-export` makes it). The engine's address comes in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import dlt
from dlt.sources.sql_database import sql_table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contestant")
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    address, user = os.environ["ENGINE_ADDRESS"], os.environ["ENGINE_USER"]
    password = os.environ["ENGINE_PASSWORD"]
    started = time.perf_counter()
    pipeline = dlt.pipeline(
        pipeline_name="peer",
        pipelines_dir=str(folder / "dlt"),
        destination=dlt.destinations.filesystem(bucket_url=(folder / "dlt-lake").as_uri()),
        dataset_name="training",
    )
    tiles = sql_table(
        credentials=f"postgresql+psycopg2://{user}{':' + password if password else ''}@{address}",
        table="viewer_watch_metrics_1d",
        schema=os.environ["ENGINE_SCHEMA"],
        backend="pyarrow",
        chunk_size=250_000,
    )
    tiles.apply_hints(table_format="iceberg", write_disposition="replace")
    pipeline.run(tiles, loader_file_format="parquet").raise_on_failed_jobs()
    seconds = time.perf_counter() - started
    rows = pipeline.last_trace.last_normalize_info.row_counts["viewer_watch_metrics_1d"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "rows": rows,
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "megabytes": used.ru_maxrss / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
