"""What the feature server does for others while many ask for one large profile at once.

    prefs up
    python benchmarks/server_load.py

A user has 1,300 categories. `--requests` of them are asked for at the same moment, each on a connection of its
own, while another process asks /healthz every 10 ms. Printed are how the requests were answered, when the last one
was, and how long /healthz took meanwhile. The server and both clients share this machine's cores, so the
milliseconds are an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.settings import load_settings

SCHEMA = "server_load_benchmark"
CATEGORIES = 1300
TABLES = """
create table user_category_profile as
    select 'u' as user_id, 'category ' || g as category, g::bigint as affinity_score,
        3::bigint as unique_items_interacted, now() as last_engaged_at
    from generate_series(1, %(categories)s) as g;
create table user_brand_profile as
    select 'u' as user_id, 'brand ' || g as brand, g::bigint as brand_affinity, 1::bigint as purchase_count,
        now() as last_brand_interaction
    from generate_series(1, 300) as g;
create table user_price_sensitivity as
    select 'u' as user_id, tier as price_tier, 10::bigint as views, 2::bigint as purchases, 0.2 as conversion_rate
    from unnest(array['budget', 'mid-range', 'premium', 'luxury']) as tier;
create table user_recent_activity as
    select 'u' as user_id, 'category ' || g as category, 5::bigint as recent_interactions,
        now() - interval '1 hour' as window_start, now() as window_end,
        now() - interval '40 minutes' as first_event_at, now() - interval '10 minutes' as last_event_at
    from generate_series(1, 30) as g;
create table items (item_id text, title text, category text, brand text, price numeric, in_stock boolean);
create index on user_category_profile (user_id);
create index on user_brand_profile (user_id);
analyze;
"""


@contextmanager
def server(engine: EngineConfiguration) -> Iterator[int]:
    """`prefs serve` on a schema of its own; gives the port."""
    schema = sql.Identifier(SCHEMA)
    with engine.connect() as session:
        session.execute(sql.SQL("drop schema if exists {} cascade").format(schema))
        session.execute(sql.SQL("create schema {}").format(schema))
        session.execute(sql.SQL("set search_path to {}").format(schema))
        session.execute(TABLES.replace("%(categories)s", str(CATEGORIES)))
    process = subprocess.Popen(
        [sys.executable, "-m", "dagster_prefs", "serve", "--only", "users", "--port", "0"],
        env={**os.environ, "PREFS_ENGINE_SCHEMA": SCHEMA, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+?:\d+", process.stdout.readline())
        if url is None:
            sys.exit("the server did not start")
        port = urlsplit(url[0]).port
        assert port is not None
        yield port
    finally:
        process.terminate()
        process.wait()
        with engine.connect() as session:
            session.execute(sql.SQL("drop schema {} cascade").format(schema))


def ask(port: int, path: str) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = b""
        while part := peer.recv(65536):
            found += part
    return int(found[9:12])


def watch_health(port: int) -> None:
    """Ask /healthz every 10 ms until standard input ends; print the milliseconds of each answer."""
    import threading

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    taken = []
    print("watching", flush=True)
    while not ended.wait(0.01):
        started = time.perf_counter()
        if ask(port, "/healthz") != 200:
            sys.exit("/healthz was not answered 200")
        taken.append((time.perf_counter() - started) * 1000)
    print(json.dumps(taken))


async def load(port: int, path: str, requests: int) -> list[tuple[int, float, int]]:
    """Status, milliseconds and bytes of each of the requests, which are sent at the same moment."""
    peers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(requests)]
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    started = time.perf_counter()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, float, int]:
        writer.write(request)
        found = await reader.read(-1)
        writer.close()
        return int(found[9:12]), (time.perf_counter() - started) * 1000, len(found)

    return await asyncio.gather(*(one(*peer) for peer in peers))


def at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def measure(port: int, path: str, requests: int, rounds: int) -> None:
    health: list[float] = []
    answers: list[tuple[int, float, int]] = []
    for _ in range(rounds):
        watcher = subprocess.Popen(
            [sys.executable, __file__, "--watch", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watcher.stdout is not None
        watcher.stdout.readline()
        time.sleep(0.2)
        answers += asyncio.run(load(port, path, requests))
        health += json.loads(watcher.communicate("")[0])
    statuses = ", ".join(
        f"{count} of {status}" for status, count in sorted(Counter(a[0] for a in answers).items())
    )
    times = [taken for _, taken, _ in answers]
    size = max(length for _, _, length in answers)
    print(
        f"| `{path}` | {statuses} | {size / 1024:.0f} | {at(times, 0.5):.0f} | {max(times):.0f} "
        f"| {at(health, 0.5):.1f} | {at(health, 0.99):.1f} | {max(health):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The feature server under many requests at once.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--path", action="append", help="what is asked for; may be given several times")
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        watch_health(given.watch)
        return
    with server(EngineConfiguration.of(load_settings())) as port:
        for _ in range(600):
            if ask(port, "/readyz") == 200:
                break
            time.sleep(0.1)
        else:
            sys.exit("the server does not become ready")
        print(f"{given.requests} requests at once, {given.rounds} times\n")
        print(
            "| request | answers | KiB at most | answered, ms p50 | last | /healthz, ms p50 | p99 | max |\n"
            "|---|---|---:|---:|---:|---:|---:|---:|"
        )
        for path in given.path or ["/v1/users/u/profile", "/v1/users/u/profile?limit=1000"]:
            measure(port, path, given.requests, given.rounds)


if __name__ == "__main__":
    main()
