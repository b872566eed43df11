"""Feast as a peer of benchmarks/serving.py: the same features in two feature views, read when told to.

Runs in an environment of its own (`make bench-serving` makes it), because Feast's dependencies do not agree
with ours. Prints one line of JSON when its tables are filled; then each line on standard input,
`{"callers": n, "reads": n}`, is one round whose latencies (ms), CPU and wall time (seconds) it answers.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Float64, Int64, String

SCHEMAS = {
    "watch": {
        "watch_minutes_7d": Float64,
        "watch_minutes_28d": Float64,
        "titles_7d": Int64,
        "completions_28d": Int64,
        "genres_watched_28d": Int64,
        "last_event_at": Int64,
    },
    "preferences": {
        "favorite_genre": String,
        "favorite_genres": Array(String),
        "favorite_genre_shares": Array(Float64),
        "completion_rate_28d": Float64,
        "minutes_per_view_28d": Float64,
        "last_event_at": Int64,
    },
}


def store_of(
    endpoint: str, region: str, folder: Path, rows: dict[str, list[object]], viewers: int
) -> FeatureStore:
    config = {
        "project": f"benchmark_{folder.name.replace('-', '_')}",
        "registry": str(folder / "registry.db"),
        "provider": "aws",
        "offline_store": {"type": "file"},
        "online_store": {
            "type": "dynamodb",
            "region": region,
            "endpoint_url": endpoint,
            "max_pool_connections": 32,
        },
        "entity_key_serialization_version": 3,
    }
    store = FeatureStore(config=RepoConfig(repo_path=folder, **config))
    viewer = Entity(name="viewer", join_keys=["viewer_id"], value_type=ValueType.INT64)
    moment = datetime.now(UTC)
    for name, schema in SCHEMAS.items():
        frame = pandas.DataFrame(
            [[number, moment, *rows[name]] for number in range(viewers)],
            columns=["viewer_id", "event_timestamp", *schema],
        )
        path = folder / f"{name}.parquet"
        frame.to_parquet(path)
        view = FeatureView(
            name=name,
            entities=[viewer],
            ttl=timedelta(days=1),
            schema=[Field(name=feature, dtype=kind) for feature, kind in schema.items()],
            source=FileSource(path=str(path), timestamp_field="event_timestamp"),
        )
        store.apply([viewer, view])
        store.write_to_online_store(name, frame)
    return store


def main() -> None:
    endpoint, region, folder, viewers = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    rows = json.loads(sys.stdin.readline())
    store = store_of(endpoint, region, folder, rows, viewers)
    features = [
        f"{name}:{feature}"
        for name, schema in SCHEMAS.items()
        for feature in schema
        if feature != "last_event_at"
    ]
    seen = store.get_online_features(features=features, entity_rows=[{"viewer_id": 1}]).to_dict()
    print(json.dumps({"seen": seen}), flush=True)
    lock = threading.Lock()
    latencies: list[float] = []

    def call(caller: int, reads: int) -> None:
        taken = []
        for number in range(reads):
            viewer = (caller * 7919 + number * 31) % viewers
            started = time.perf_counter()
            store.get_online_features(features=features, entity_rows=[{"viewer_id": viewer}]).to_dict()
            taken.append((time.perf_counter() - started) * 1000)
        with lock:
            latencies.extend(taken)

    for line in sys.stdin:
        asked = json.loads(line)
        latencies.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(asked["callers"]) as pool:
            list(pool.map(call, range(asked["callers"]), [asked["reads"]] * asked["callers"]))
        print(
            json.dumps(
                {
                    "latencies": latencies,
                    "cpu": time.process_time() - cpu,
                    "wall": time.perf_counter() - wall,
                }
            ),
            flush=True,
        )
    store.teardown()


if __name__ == "__main__":
    main()
