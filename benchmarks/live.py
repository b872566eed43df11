"""How soon an event can be read in DynamoDB on the embedded engine, and what keeping the views current costs.

    python benchmarks/live.py [--histories 320000] [--rates 20,200] [--seconds 60] [--burst 1000]

For each size of history it starts an engine and a local AWS server of its own in a temporary folder, generates the
history, deploys, and runs `prefs follow`. Then it prints one JSON line with

- `build_seconds`: every view over the history, from nothing (in one process, without deploying), and `items_seconds`:
  every item of them;
- `rates`: for each rate of single INSERTs, p50 and p99 of the milliseconds from an event's INSERT to the first
  strongly consistent read that finds it in DynamoDB; every 20th event is looked for;
- `burst_seconds`: so many events in one INSERT, until all are applied and published;
- `steady_per_second`: events a second when 20,000 arrive at once, applied by steps to all views and published;
- `idle_cpu_seconds`: the processor time of the follower and of the engine's backends in a minute without events.

The local AWS server bounds all of it: `put_ms` is a bare PutItem there. A last line has the ratios of the largest
history to the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.live.presence import wait_until_applied
from dagster_prefs.local.services import LocalServices
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings
from dagster_prefs.tools.scenario import SimulationPlan
from dagster_prefs.tools.simulator import fitted, simulate_to_engine

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
TOPIC, DOMAIN = "view_events", "watch"
IDLE_SECONDS = 60
STEADY_EVENTS = 19_000
PATIENCE_SECONDS = 120.0


class Engine:
    """One engine with a history, its store, and a follower."""

    def __init__(self, platform: Platform, viewers: int) -> None:
        self.platform = platform
        self.viewers = viewers
        self.client = platform.dynamodb()
        self.domain = platform.contract.domain(DOMAIN)
        self.table = next(one for one in platform.stores() if one.domain == self.domain).table.name
        self.store = RawStore(platform.engine)
        self.offset = 0
        self.topic = platform.registry.topic(TOPIC)

    def send(self, viewers: Sequence[int]) -> int:
        """Insert one event now of each viewer in one INSERT; returns their time, milliseconds since 1970."""
        now = datetime.now(UTC)
        moment = int(now.timestamp() * 1000)
        messages = []
        for viewer in viewers:
            self.offset += 1
            event = {
                "event_id": f"live-{self.offset}",
                "viewer_id": viewer,
                "content_id": f"c{self.offset % 500}",
                "genre": "drama",
                "watch_duration_sec": 60,
                "completion_pct": 0.5,
                "watched_at": moment,
            }
            messages.append(RawMessage(0, self.offset, json.dumps(event).encode()))
        self.store.write(self.topic, "bench", messages)
        return moment

    def wait(self, viewer: int, moment: int) -> None:
        """Return once a read finds an event of that time."""
        end = time.monotonic() + PATIENCE_SECONDS
        key = {"viewer_id": {"N": str(viewer)}, "domain_key": {"S": self.domain.key}}
        while time.monotonic() < end:
            item = self.client.get_item(TableName=self.table, Key=key, ConsistentRead=True).get("Item")
            if item and int(item["last_event_at"]["N"]) >= moment:
                return
            time.sleep(0.005)
        raise SystemExit(f"viewer {viewer} cannot be read {PATIENCE_SECONDS:g} s later")

    def at_rate(self, rate: float, seconds: float) -> dict[str, float]:
        """Milliseconds from INSERT to read at a rate of events a second."""
        found: list[float] = []
        looking: list[threading.Thread] = []
        busy = threading.Semaphore(2)

        def look(viewer: int, moment: int, started: float) -> None:
            self.wait(viewer, moment)
            found.append((time.monotonic() - started) * 1000)
            busy.release()

        began = time.monotonic()
        for number in range(int(rate * seconds)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            viewer = random.randrange(self.viewers)
            started = time.monotonic()
            moment = self.send([viewer])
            if number % max(1, int(rate / 5)) == 0 and busy.acquire(blocking=False):
                looking.append(threading.Thread(target=look, args=[viewer, moment, started]))
                looking[-1].start()
        behind = time.monotonic() - began - seconds
        for thread in looking:
            thread.join()
        ordered = sorted(found)
        return {
            "p50_ms": round(statistics.median(ordered)),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)]),
            "looked_for": len(ordered),
            "writer_behind_seconds": round(max(0.0, behind), 1),
        }

    def burst(self, events: int) -> float:
        """Seconds until all of so many events in one INSERT are applied and published; some are then read."""
        viewers = [random.randrange(self.viewers) for _ in range(events)]
        started = time.monotonic()
        moment = self.send(viewers)
        wait_until_applied(self.platform.engine, seconds=PATIENCE_SECONDS)
        taken = time.monotonic() - started
        for viewer in random.sample(viewers, 20):
            self.wait(viewer, moment)
        return taken

    def put_ms(self) -> float:
        """A bare PutItem of one item, median milliseconds."""
        taken = []
        for number in range(50):
            started = time.monotonic()
            self.client.put_item(
                TableName=self.table, Item={"viewer_id": {"N": "-7"}, "domain_key": {"S": f"bench{number}"}}
            )
            taken.append((time.monotonic() - started) * 1000)
        return statistics.median(taken)


@contextmanager
def engine(folder: Path, history: int, viewers: int) -> Iterator[tuple[Engine, float, float]]:
    """An engine with a history, and the seconds that all views over it took, and all items."""
    ports = random.sample(range(20_000, 32_000), 2)
    os.environ |= {
        "PREFS_DATA_DIR": str(folder),
        "PREFS_ENGINE_PORT": str(ports[0]),
        "PREFS_LOCAL_AWS_PORT": str(ports[1]),
        "PREFS_PROJECT_DIR": str(PROJECT),
    }
    settings = load_settings()
    services = LocalServices(folder, *ports, user=settings.user, database=settings.database)
    services.up(owner_pid=os.getpid())
    try:
        platform = Platform(settings)
        platform.apply()
        plan = SimulationPlan(
            seed=7,
            viewers=viewers,
            days=35,
            view_events=history * 5 // 8,
            shop_events=history * 5 // 16,
            interactions=history // 16,
            end=datetime.now(UTC),
        )
        simulate_to_engine(platform.engine, platform.registry, fitted(platform.registry, plan))
        follower = platform.follower()
        work, items = follower.work, 0.0

        def timed(domain: Domain, keys: Sequence[str] | None, connection: psycopg.Connection[Any]) -> None:
            nonlocal items
            since = time.monotonic()
            work.publish(domain, keys, connection)
            items += time.monotonic() - since

        follower.work = replace(work, publish=timed)
        started = time.monotonic()
        follower.catch_up()
        yield Engine(platform, viewers), time.monotonic() - started - items, items
    finally:
        services.down()
        services.delete_state()


def measured(history: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size of history."""
    viewers = max(100, history // 64)
    with (
        tempfile.TemporaryDirectory(prefix="prefs-live-") as folder,
        engine(Path(folder), history, viewers) as (one, built, items),
    ):
        put_ms = one.put_ms()
        follower = subprocess.Popen(
            [sys.executable, "-m", "dagster_prefs", "follow"],
            env={**os.environ, "PREFS_LOG_LEVEL": "warning"},
        )
        try:
            moment = one.send([0])
            one.wait(0, moment)
            rates = {str(rate): one.at_rate(rate, arguments.seconds) for rate in arguments.rates}
            burst = one.burst(arguments.burst)
            steady = STEADY_EVENTS / one.burst(STEADY_EVENTS)
            time.sleep(10)
            process = psutil.Process(follower.pid)
            before = sum(process.cpu_times()[:2])
            time.sleep(IDLE_SECONDS)
            idle = (sum(process.cpu_times()[:2]) - before) * 60 / IDLE_SECONDS
        finally:
            follower.terminate()
            follower.wait()
        return {
            "history": history,
            "viewers": viewers,
            "build_seconds": round(built, 1),
            "items_seconds": round(items, 1),
            "put_ms": round(put_ms, 1),
            "rates": rates,
            "burst_events": arguments.burst,
            "burst_seconds": round(burst, 2),
            "steady_per_second": round(steady),
            "idle_cpu_seconds_a_minute": round(idle, 2),
        }


def main() -> None:
    """Measure each size of history and print the figures."""
    parser = argparse.ArgumentParser(description="Freshness and cost of the live embedded engine.")
    parser.add_argument(
        "--histories", type=lambda text: [int(one) for one in text.split(",")], default=[320_000]
    )
    parser.add_argument(
        "--rates", type=lambda text: [float(one) for one in text.split(",")], default=[20, 200]
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--burst", type=int, default=1000)
    arguments = parser.parse_args()
    lines = []
    for history in arguments.histories:
        lines.append(measured(history, arguments))
        print(json.dumps(lines[-1]), flush=True)
    if len(lines) > 1:
        first, last = lines[0], lines[-1]
        print(
            json.dumps(
                {
                    "larger_to_smaller": {
                        rate: round(last["rates"][rate]["p99_ms"] / first["rates"][rate]["p99_ms"], 2)
                        for rate in first["rates"]
                    }
                }
            )
        )


if __name__ == "__main__":
    main()
