"""What the barrier interval does to freshness and to write units: event → view, event → DynamoDB, units a second.

    python benchmarks/barriers.py [--intervals 250,1000] [--probes 200] [--seconds 60] [--viewers 20] [--rate 40]

Needs a RisingWave, a Kafka and a DynamoDB, which PREFS_RISINGWAVE_URL, PREFS_KAFKA_BOOTSTRAP and AWS_ENDPOINT_URL
name. For each interval it makes a database with that `barrier_interval_ms` and deploys one domain there, from its topic
to its sink, as `dbt run` does.

- Freshness: each probe is one event of a new viewer, sent at a random moment of the interval. Milliseconds from
  `produce` to the first read that finds the viewer in the rolling view, and to the first that finds it in DynamoDB.
- Write units: `--viewers` viewers get `--rate` events a second for `--seconds`. A proxy between the sink and DynamoDB
  counts what is written, one unit for each KB begun.

Everything that it makes is dropped again. Prints one JSON line per interval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import sql

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.items import item_bytes
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
DOMAIN, TOPIC = "watch", "view_events"
# Below what a probe is told apart from the load by.
FIRST_PROBE = 1_000_000
LOOK_SECONDS = 0.005
PATIENCE_SECONDS = 60.0


class CountingProxy(ThreadingHTTPServer):
    """Passes requests on to DynamoDB and counts what BatchWriteItem writes."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = endpoint
        self.lock = threading.Lock()
        self.items = self.units = self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def counted(self) -> tuple[int, int, int]:
        """Items, write units and requests so far."""
        with self.lock:
            return self.items, self.units, self.requests

    def count(self, body: bytes) -> None:
        tables = json.loads(body)["RequestItems"].values()
        written = [
            # A delete costs what the item weighs, which is as much here as its key.
            item_bytes(write.get("PutRequest", {}).get("Item") or write["DeleteRequest"]["Key"])
            for writes in tables
            for write in writes
        ]
        with self.lock:
            self.requests += 1
            self.items += len(written)
            self.units += sum(-(-size // 1024) for size in written)


class _Handler(BaseHTTPRequestHandler):
    server: CountingProxy
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("X-Amz-Target", "").endswith("BatchWriteItem"):
            self.server.count(body)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        request = urllib.request.Request(self.server.endpoint, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, content, kind = answer.status, answer.read(), answer.headers["Content-Type"]
        except HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers["Content-Type"]
        self.send_response(status)
        self.send_header("Content-Type", kind or "application/x-amz-json-1.0")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: a line a request would be most of what this prints."""


class Stream:
    """One domain from its topic to its sink, in a database of its own."""

    def __init__(
        self, engine: EngineConfiguration, client: Any, table: str, bootstrap: str, topic: str
    ) -> None:
        self.engine, self.client, self.table, self.topic = engine, client, table, topic
        self.domain = load_contract(PROJECT).domain(DOMAIN)
        self.producer: Any = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self.sent = 0

    def send(self, viewer: int) -> float:
        """Produce one event of a viewer; the moment at which it left, on the monotonic clock."""
        self.sent += 1
        body = {
            "event_id": f"b{self.sent}", "viewer_id": viewer, "content_id": "c", "genre": "drama",
            "watch_duration_sec": 60, "completion_pct": 1, "watched_at": datetime.now(UTC).isoformat(),
        }  # fmt: skip
        moment = time.monotonic()
        self.producer.produce(self.topic, json.dumps(body).encode())
        self.producer.poll(0)
        return moment

    def in_view(self, connection: Any, viewer: int) -> bool:
        found = connection.execute(
            sql.SQL("select 1 from {} where viewer_id = %s").format(sql.Identifier(self.domain.relation)),
            [viewer],
        ).fetchone()
        return found is not None

    def in_dynamodb(self, viewer: int) -> bool:
        key = {"viewer_id": {"N": str(viewer)}, "domain_key": {"S": self.domain.key}}
        return "Item" in self.client.get_item(TableName=self.table, Key=key, ConsistentRead=True)


def probe(stream: Stream, probes: int, interval_ms: int) -> tuple[list[float], list[float]]:
    """Milliseconds until each probe was in the view, and until it was in DynamoDB."""
    chance = random.Random(20260315)
    view: list[float] = []
    online: list[float] = []
    with stream.engine.connect() as connection:
        for number in range(probes):
            time.sleep(chance.uniform(0, interval_ms / 1000))
            viewer = FIRST_PROBE + number
            sent = stream.send(viewer)
            seen = stored = 0.0
            while not (seen and stored):
                if time.monotonic() - sent > PATIENCE_SECONDS:
                    raise SystemExit(
                        f"viewer {viewer} did not arrive within {PATIENCE_SECONDS:g} s: is the sink at work?"
                    )
                if not seen and stream.in_view(connection, viewer):
                    seen = time.monotonic()
                if not stored and stream.in_dynamodb(viewer):
                    stored = time.monotonic()
                time.sleep(LOOK_SECONDS)
            view.append((seen - sent) * 1000)
            online.append((stored - sent) * 1000)
    return view, online


def load(stream: Stream, proxy: CountingProxy, viewers: int, rate: float, seconds: float) -> dict[str, Any]:
    """What the sink writes while these viewers get so many events a second."""
    chance = random.Random(20260315)
    before, started = proxy.counted(), time.monotonic()
    events = 0
    while (passed := time.monotonic() - started) < seconds:
        while events < rate * passed:
            stream.send(chance.randrange(viewers))
            events += 1
        time.sleep(0.01)
    if stream.producer.flush(30):
        raise SystemExit("Kafka did not take the events")
    # What is under way still belongs to it.
    last = (0, 0, 0)
    while (now := proxy.counted()) != last:
        last = now
        time.sleep(5)
    items, units, requests = (after - first for after, first in zip(now, before, strict=True))
    return {
        "events": events,
        "items_written": items,
        "write_units": units,
        "write_requests": requests,
        "write_units_per_event": round(units / events, 3),
        "write_units_per_second": round(units / seconds, 1),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


@contextmanager
def deployed(
    server: EngineConfiguration, interval_ms: int, bootstrap: str, proxy: CountingProxy
) -> Iterator[Stream]:
    """A database with this interval, a topic and a table, all dropped afterwards."""
    name = f"bench_barriers_{uuid.uuid4().hex[:8]}"
    region = os.environ.get("AWS_REGION", "eu-central-1")
    client = dynamodb_client(proxy.endpoint, region)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    engine = server.with_database(name)
    with server.connect() as connection:
        connection.execute(
            sql.SQL("create database {} with barrier_interval_ms = {}").format(
                sql.Identifier(name), sql.Literal(interval_ms)
            )
        )
    topic = f"{name}_{TOPIC}"
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    table = provision(client, load_contract(PROJECT), prefix=f"{name}_")["viewer"]
    try:
        with tempfile.TemporaryDirectory(prefix="prefs-bench-") as folder:
            dbt = Dbt(
                engine,
                PROJECT,
                Path(folder),
                {
                    "PREFS_PUBLISH": "sink",
                    "PREFS_TABLE_PREFIX": f"{name}_",
                    "PREFS_KAFKA_BOOTSTRAP": bootstrap,
                    "PREFS_KAFKA_TOPIC_VIEW_EVENTS": topic,
                    "AWS_ENDPOINT_URL": proxy.url,
                    "AWS_REGION": region,
                },
            )
            models = ["+kafka_view_events", f"+{load_contract(PROJECT).domain(DOMAIN).sink}"]
            if failed := [result for result in dbt.run("run", models) if not result.ok]:
                raise SystemExit("; ".join(f"{result.name}: {result.message}" for result in failed))
        yield Stream(engine, client, table.name, bootstrap, topic)
    finally:
        with engine.connect() as connection:
            connection.execute("drop schema public cascade")
        with server.connect() as connection:
            connection.execute(sql.SQL("drop database {}").format(sql.Identifier(name)))
        client.delete_table(TableName=table.name)
        admin.delete_topics([topic])[topic].result(30)


def named(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise SystemExit(f"{variable} must name a server; this is measured on real ones")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--intervals", default="250,1000", help="milliseconds")
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--rate", type=float, default=40, help="events a second")
    arguments = parser.parse_args()
    place = urlsplit(named("PREFS_RISINGWAVE_URL"))
    server = EngineConfiguration(
        place.hostname or "127.0.0.1",
        place.port or 4566,
        place.path.strip("/") or "dev",
        place.username or "root",
        place.password or "",
        kind="risingwave",
    )
    proxy = CountingProxy(named("AWS_ENDPOINT_URL"))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for interval_ms in map(int, arguments.intervals.split(",")):
        with deployed(server, interval_ms, named("PREFS_KAFKA_BOOTSTRAP"), proxy) as stream:
            view, online = probe(stream, arguments.probes, interval_ms)
            line = {
                "barrier_interval_ms": interval_ms,
                "probes": len(view),
                **{
                    f"{what}_{name}_ms": round(percentile(values, share))
                    for what, values in (("view", view), ("dynamodb", online))
                    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
                },
                "viewers": arguments.viewers,
                "events_per_second": arguments.rate,
                **load(stream, proxy, arguments.viewers, arguments.rate, arguments.seconds),
            }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
