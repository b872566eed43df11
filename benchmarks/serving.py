"""Reads of viewer profiles and rankings, beside boto3, raw HTTP and Feast, as a table of ratios and as JSON.

`python benchmarks/serving.py [--endpoint URL] [--feast PYTHON] [--json FILE]`. Without an endpoint it fetches
DynamoDB Local from Maven Central with `mvn` and runs it with `java`, in a temporary folder. Feast runs in the
environment of the named interpreter. The ranking needs the embedded engine to be up (`prefs up`); it works in
a schema of its own, which it drops. Variants take turns in small rounds, so that a drift of the machine meets
all of them alike.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psycopg import sql

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.serving import CatalogueRanker, ClientOptions, ProfileClient, ShopClient
from dagster_prefs.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
REGION = "eu-central-1"
SCHEMA = "benchmark_serving"
VIEWERS = 500
AT = 1_760_000_000_000
POM = """<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>benchmark</groupId><artifactId>benchmark</artifactId><version>1</version><dependencies><dependency>
<groupId>com.amazonaws</groupId><artifactId>DynamoDBLocal</artifactId><version>2.6.1</version>
</dependency></dependencies></project>"""


@dataclass
class Round:
    """What a round of reads took: each call in milliseconds, CPU and wall time in seconds."""

    latencies: list[float]
    cpu: float
    wall: float


@dataclass
class Variant:
    """One way to read: `run` makes every one of n callers read m times."""

    name: str
    run: Callable[[int, int], Round]
    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0

    def figures(self) -> dict[str, float]:
        ordered = sorted(self.latencies)
        return {
            "p50_ms": ordered[len(ordered) // 2],
            "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
            "per_second": len(ordered) / self.wall,
            "cpu_ms": self.cpu / len(ordered) * 1000,
        }


def reading(read: Callable[[int], Any]) -> Callable[[int, int], Round]:
    """Rounds of calls in threads of this process."""

    def call(caller: int, reads: int) -> list[float]:
        taken = []
        for number in range(reads):
            started = time.perf_counter()
            read((caller * 7919 + number * 31) % VIEWERS)
            taken.append((time.perf_counter() - started) * 1000)
        return taken

    def run(callers: int, reads: int) -> Round:
        cpu, wall = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            taken = list(pool.map(call, range(callers), [reads] * callers))
        return Round(
            [latency for each in taken for latency in each],
            time.process_time() - cpu,
            time.perf_counter() - wall,
        )

    return run


def measure(variants: list[Variant], *, callers: int, rounds: int, reads: int) -> None:
    """Let the variants take turns: `reads` calls by each of `callers` threads a round."""
    for turn in range(rounds + 1):
        for variant in variants:
            result = variant.run(callers, reads)
            # The first round warms connections up.
            if turn:
                variant.latencies += result.latencies
                variant.cpu += result.cpu
                variant.wall += result.wall


def report(title: str, variants: list[Variant], base: str) -> dict[str, Any]:
    figures = {variant.name: variant.figures() for variant in variants}
    print(
        f"\n{title}\n| | p50, ms | p99, ms | per second | CPU, ms | p50 : {base} |\n|---" + "|---:" * 5 + "|"
    )
    for name, found in figures.items():
        ratio = found["p50_ms"] / figures[base]["p50_ms"]
        print(
            f"| {name} | {found['p50_ms']:.2f} | {found['p99_ms']:.2f} | {found['per_second']:,.0f} | "
            f"{found['cpu_ms']:.2f} | {ratio:.2f} |"
        )
    return figures


def raw_batch(endpoint: str, table: str, sort_keys: list[str]) -> Callable[[int], Any]:
    """BatchGetItem as an unsigned POST on a kept-alive connection for each thread: the floor."""
    local = threading.local()
    address = urlsplit(endpoint).netloc
    # DynamoDB Local wants an Authorization header, and does not check its signature.
    head = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": "DynamoDB_20120810.BatchGetItem",
        "Authorization": f"AWS4-HMAC-SHA256 Credential=local/20260101/{REGION}/dynamodb/aws4_request, "
        "SignedHeaders=host, Signature=0",
    }

    def read(viewer: int) -> Any:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(address)
        keys = [{"viewer_id": {"N": str(viewer)}, "domain_key": {"S": key}} for key in sort_keys]
        local.connection.request("POST", "/", json.dumps({"RequestItems": {table: {"Keys": keys}}}), head)
        return json.loads(local.connection.getresponse().read())

    return read


@contextmanager
def feast(python: Path | None, endpoint: str, rows: dict[str, list[Any]]) -> Iterator[list[Variant]]:
    """Feast's reads of the same features in two feature views, in a process of its own."""
    if python is None:
        print("Feast is left out: --feast names the interpreter of an environment that has it")
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        peer = subprocess.Popen(
            [python, Path(__file__).with_name("feast_peer.py"), endpoint, REGION, folder, str(VIEWERS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            # DynamoDB Local wants credentials, and does not check them.
            env={"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"} | os.environ,
        )  # fmt: skip
        assert peer.stdin is not None
        assert peer.stdout is not None
        questions, answers = peer.stdin, peer.stdout

        def ask(question: dict[str, Any]) -> dict[str, Any]:
            questions.write(json.dumps(question, default=float) + "\n")
            questions.flush()
            answer = answers.readline()
            if not answer:
                sys.exit(f"Feast stopped: run {python} {' '.join(map(str, peer.args[1:]))} to see why")  # type: ignore[index]
            found: dict[str, Any] = json.loads(answer)
            return found

        try:
            ask(rows)
            yield [
                Variant(
                    "Feast, 2 feature views",
                    lambda callers, reads: Round(**ask({"callers": callers, "reads": reads})),
                )
            ]
        finally:
            # Feast deletes its tables when its input ends.
            questions.close()
            peer.wait()


def profiles(endpoint: str, feast_python: Path | None) -> dict[str, Any]:
    contract = load_contract(PROJECT)
    admin = dynamodb_client(endpoint, REGION)
    table = provision(admin, contract, prefix=f"benchmark_{os.getpid()}_")["viewer"].name
    rows: dict[str, list[Any]] = {
        "watch": [Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT],
        "interactions": [1, 2, 3, AT],
        "preferences": ["drama", ["drama", "news"], [Decimal("0.75"), Decimal("0.25")], None, Decimal(9), AT],
    }
    for name, values in rows.items():
        encoder = ItemEncoder(contract, contract.domain(name))
        puts = [{"PutRequest": {"Item": encoder.encode(viewer, values)}} for viewer in range(VIEWERS)]
        for start in range(0, VIEWERS, 25):
            admin.batch_write_item(RequestItems={table: puts[start : start + 25]})  # type: ignore[dict-item]
    keys = {name: contract.domain(name).key for name in rows}
    patient = ClientOptions(30, read_timeout_seconds=30, pool_size=32)
    lean, fallback = (
        ProfileClient(
            PROJECT,
            endpoint_url=endpoint,
            region=REGION,
            table_prefix=table.removesuffix(contract.tables["viewer"].name),
            options=options,
        )
        for options in (patient, replace(patient, transport="boto3"))
    )

    def key(viewer: int, name: str) -> Any:
        return {"viewer_id": {"N": str(viewer)}, "domain_key": {"S": keys[name]}}

    def batch(viewers: list[int], names: list[str]) -> Any:
        wanted = [key(viewer, name) for viewer in viewers for name in names]
        return admin.batch_get_item(RequestItems={table: {"Keys": wanted}})

    two = ["watch", "preferences"]
    results: dict[str, Any] = {}
    try:
        with feast(feast_python, endpoint, {name: rows[name] for name in two}) as peers:
            for callers in (1, 8):
                suffix = f"{callers} caller{'s' if callers > 1 else ''}"
                raw = raw_batch(endpoint, table, [keys[name] for name in two])
                reads: dict[str, Callable[[int], Any]] = {
                    "boto3 GetItem": lambda v: admin.get_item(TableName=table, Key=key(v, "watch")),
                    "boto3 BatchGetItem, 2 keys": lambda v: batch([v], two),
                    "raw BatchGetItem, 2 keys": raw,
                    "lean, 1 domain": lambda v: lean.get(v, ["watch"]),
                    "lean, 2 domains": lambda v: lean.get(v, two),
                    "lean, 3 domains": lambda v: lean.get(v),
                    "boto3 fallback, 2 domains": lambda v: fallback.get(v, two),
                }
                variants = [Variant(name, reading(read)) for name, read in reads.items()]
                variants += [Variant(peer.name, peer.run) for peer in peers]
                measure(variants, callers=callers, rounds=12, reads=max(20, 100 // callers))
                results[suffix] = report(f"one viewer, {suffix}", variants, "boto3 BatchGetItem, 2 keys")
                hundred = [
                    Variant(
                        "boto3 BatchGetItem, 100 keys",
                        reading(lambda v: batch(list(range(v, v + 100)), ["watch"])),
                    ),
                    Variant(
                        "lean, 100 viewers", reading(lambda v: lean.get_many(range(v, v + 100), ["watch"]))
                    ),
                ]
                measure(hundred, callers=callers, rounds=6, reads=5)
                results[f"100 viewers, {suffix}"] = report(
                    f"100 viewers, {suffix}", hundred, "boto3 BatchGetItem, 100 keys"
                )
    finally:
        lean.close()
        fallback.close()
        admin.delete_table(TableName=table)
    return results


CATALOGUE = """
create table items as
    select 'item-' || lpad(g::text, 8, '0') as item_id, 'Wireless noise cancelling headphones ' || g as title,
        'category ' || (power(random(), 2) * 200)::int as category,
        'brand ' || (power(random(), 2) * 1500)::int as brand,
        (random() * 90000)::int / 100.0 as price, true as in_stock
    from generate_series(1, 100000) as g;
create table user_category_profile as
    select distinct on (user_id, category) 'user ' || u as user_id,
        'category ' || (power(random(), 2) * 200)::int as category,
        (random() * 200)::int::bigint as affinity_score,
        3::bigint as unique_items_interacted, now() as last_engaged_at
    from generate_series(0, 499) as u, generate_series(1, 15);
create table user_brand_profile as
    select distinct on (user_id, brand) 'user ' || u as user_id,
        'brand ' || (power(random(), 2) * 1500)::int as brand,
        (random() * 200)::int::bigint as brand_affinity,
        1::bigint as purchase_count, now() as last_brand_interaction
    from generate_series(0, 499) as u, generate_series(1, 30);
create table user_price_sensitivity as
    select 'user ' || u as user_id, tier as price_tier, 10::bigint as views, 2::bigint as purchases,
        0.2 as conversion_rate
    from generate_series(0, 499) as u, unnest(array['budget', 'mid-range', 'premium', 'luxury']) as tier;
create table user_recent_activity as
    select 'user ' || u as user_id, 'category ' || u % 7 as category, 5::bigint as recent_interactions,
        now() - interval '1 hour' as window_start, now() as window_end,
        now() - interval '40 minutes' as first_event_at, now() - interval '10 minutes' as last_event_at
    from generate_series(0, 499) as u;
create index on user_category_profile (user_id);
create index on user_brand_profile (user_id);
create index on user_price_sensitivity (user_id);
create index on user_recent_activity (user_id);
analyze items, user_category_profile, user_brand_profile, user_price_sensitivity, user_recent_activity;
"""


def rankings() -> dict[str, Any]:
    engine = replace(EngineConfiguration.of(load_settings()), schema=SCHEMA)
    schema = sql.Identifier(SCHEMA)
    with engine.connect() as session:
        session.execute(sql.SQL("drop schema if exists {} cascade").format(schema))
        session.execute(sql.SQL("create schema {}").format(schema))
        session.execute(CATALOGUE)
    try:
        with ShopClient(engine, statement_timeout_seconds=60) as client:
            ranker = CatalogueRanker(client)
            refreshed = ranker.refresh()
            moment = datetime.now(UTC)
            for user in ("user 1", "user 77", "nobody"):
                if ranker.rank(user, now=moment, explain=True) != client.rank(user, now=moment, explain=True):
                    sys.exit(f"the two rankings of {user} differ: nothing to compare")
            variants = [
                Variant("SQL", reading(lambda number: client.rank(f"user {number}"))),
                Variant("in process", reading(lambda number: ranker.rank(f"user {number}"))),
            ]
            measure(variants[:1], callers=1, rounds=6, reads=5)
            measure(variants[1:], callers=1, rounds=6, reads=100)
            figures = report("ranking 100,000 items, 1 caller", variants, "SQL")
            bytes_each = refreshed.size_bytes / refreshed.items
            print(
                f"\nmemory {bytes_each:.0f} bytes an item; first refresh {refreshed.seconds:.1f} s, ", end=""
            )
            print(f"one without changes {ranker.refresh().seconds:.2f} s")
            return figures | {"bytes_per_item": bytes_each}
    finally:
        with engine.connect() as session:
            session.execute(sql.SQL("drop schema {} cascade").format(schema))


@contextmanager
def dynamodb_local() -> Iterator[str]:
    if not shutil.which("mvn") or not shutil.which("java"):
        sys.exit(
            "no --endpoint was given and mvn or java is not installed: start a DynamoDB and name its URL"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pom.xml").write_text(POM)
        subprocess.run(
            ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib"],
            cwd=folder,
            check=True,
        )
        server = subprocess.Popen(
            ["java", "-Djava.library.path=lib", "-cp", "lib/*",
             "com.amazonaws.services.dynamodbv2.local.main.ServerRunner",
             "-inMemory", "-sharedDb", "-disableTelemetry", "-port", str(port)],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        sys.exit(
                            "DynamoDB Local did not start: run it yourself and name its URL with --endpoint"
                        )
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of profile reads and rankings.")
    parser.add_argument("--endpoint", help="URL of a DynamoDB to use instead of DynamoDB Local")
    parser.add_argument("--feast", type=Path, metavar="PYTHON", help="interpreter that has Feast, the peer")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", choices=["profiles", "rankings"], help="one half of it")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    if given.only != "rankings":
        if given.endpoint:
            results["profiles"] = profiles(given.endpoint, given.feast)
        else:
            with dynamodb_local() as endpoint:
                results["profiles"] = profiles(endpoint, given.feast)
    if given.only != "profiles":
        results["rankings"] = rankings()
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
