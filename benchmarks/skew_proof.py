"""Whether what is served during live traffic is what a training set as served says: every difference explained.

    python benchmarks/skew_proof.py [--reads 100000] [--rate 200] [--history 20000] [--entities 500]
                                    [--folder DIR] [--json FILE]

On the embedded engine it starts an engine and a local AWS server of its own in a folder, generates a history, deploys,
and runs `prefs follow`. With PREFS_ENGINE=risingwave everything is that of the settings (name a schema of its own with
PREFS_ENVIRONMENT, and PREFS_DATA_DIR for the lake): it deploys, generates the history into Kafka, and runs `prefs
publish --follow` unless the engine's own sinks write DynamoDB.

Then the simulator sends `--rate` events a second, while the Python client reads `--reads` profiles, logs each one, and
goes on until all are read: singly and in groups, eventually and strongly consistent, of known and unknown ids. When the
events that had arrived by the last read are in the lake, it prints the skew report: the share of each cause, and the
latency from an event's arrival to the reader. The exit code is 2 if a value is wrong, or a row cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg import sql

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.ids import Id
from dagster_prefs.local.services import LocalServices
from dagster_prefs.platform import Platform
from dagster_prefs.serving import ClientOptions, ProfileClient, ServedLog
from dagster_prefs.serving.served_log import FileRows, LogCounts
from dagster_prefs.settings import Settings, load_settings
from dagster_prefs.training.skew import CAUSES, CLOCKS, SkewReport

PROJECT = Path(__file__).resolve().parents[1] / "dbt_project"
READERS = 2
GROUP = 10
# How long the events that had arrived by the last read may take into the lake.
PATIENCE_SECONDS = 300.0


@contextmanager
def environment(folder: Path) -> Iterator[Settings]:
    """Settings of an embedded engine of its own in a folder, which runs meanwhile, or those of RisingWave."""
    os.environ.setdefault("PREFS_PROJECT_DIR", str(PROJECT))
    if os.environ.get("PREFS_ENGINE") == "risingwave":
        yield load_settings()
        return
    ports = random.sample(range(20_000, 32_000), 2)
    os.environ |= {
        "PREFS_DATA_DIR": str(folder),
        "PREFS_ENGINE_PORT": str(ports[0]),
        "PREFS_LOCAL_AWS_PORT": str(ports[1]),
    }
    settings = load_settings()
    services = LocalServices(folder, *ports, user=settings.user, database=settings.database)
    services.up(owner_pid=os.getpid())
    try:
        yield settings
    finally:
        services.down()


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `prefs` command that runs until the block ends. Raises SystemExit if it ended before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dagster_prefs", *command],
        env={**os.environ, "PREFS_LOG_LEVEL": "warning"},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
        if process.poll() is not None:
            raise SystemExit(
                f"`prefs {' '.join(command)}` ended with {process.returncode} before the reads did"
            )
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def prefs(*command: str) -> None:
    """Run a `prefs` command to its end."""
    subprocess.run([sys.executable, "-m", "dagster_prefs", *command], check=True, stdout=subprocess.DEVNULL)


def known_ids(platform: Platform, registry: Registry, entity: str) -> list[Id]:
    """The ids that the domains of an entity have values of, without canaries."""
    table = registry.contract.tables[entity]
    found: set[Id] = set()
    with platform.engine.connect() as connection:
        for domain in registry.contract.domains_of(entity):
            names = [key.name for key in registry.entity(entity).keys]
            rows = connection.execute(
                sql.SQL("select {} from {}").format(
                    sql.SQL(", ").join(map(sql.Identifier, names)),
                    sql.Identifier(platform.engine.schema, domain.relation),
                )
            ).fetchall()
            found |= {row[0] if len(row) == 1 else tuple(row) for row in rows}
    return sorted(id_ for id_ in found if not table.key_text(id_).startswith(("-", "canary:")))


def wait_for_history(platform: Platform) -> None:
    """Wait until the views have ids, and their number no longer grows. Raises SystemExit if that takes too long."""
    entity, before = next(iter(platform.registry.contract.tables)), 0
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        found = len(known_ids(platform, platform.registry, entity))
        if found >= GROUP and found == before:
            return
        before = found
        time.sleep(5)
    raise SystemExit(f"the views have {before} ids of {entity} after {PATIENCE_SECONDS:g} s")


class Reading:
    """Reads of one client from some threads, until so many profiles are read."""

    def __init__(self, client: ProfileClient, ids: Sequence[Id], reads: int) -> None:
        self.client = client
        self.ids = ids
        self.left = reads
        self.lock = threading.Lock()
        self.failures: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._read, args=[number]) for number in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _take(self, number: int) -> int:
        with self.lock:
            taken = min(number, self.left)
            self.left -= taken
            return taken

    def _read(self, seed: int) -> None:
        drawn = random.Random(seed)
        while taken := self._take(drawn.choice([1, GROUP])):
            ids = drawn.sample(self.ids, taken)
            consistent = drawn.random() < 0.5
            try:
                if taken == 1:
                    self.client.get(ids[0], consistent=consistent)
                else:
                    self.client.get_many(ids, consistent=consistent)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")


def read_all(platform: Platform, folder: Path, reads: int) -> tuple[LogCounts, float, list[str]]:
    """Read profiles of the first served entity, and log them all; return the log's counts and the seconds."""
    settings, registry = platform.settings, platform.registry
    entity = next(iter(registry.contract.tables))
    ids = known_ids(platform, registry, entity)
    if len(ids) < GROUP:
        raise SystemExit(f"the views have {len(ids)} ids of {entity}: generate a longer history")
    if all(isinstance(id_, int) for id_ in ids):
        # Some that are not known: they have cold-start values.
        ids += [10**12 + number for number in range(max(1, len(ids) // 50))]
    log = ServedLog(FileRows(folder), share=1.0)
    client = ProfileClient(
        registry,
        entity=entity,
        endpoint_url=settings.aws_endpoint,
        region=settings.aws_region,
        table_prefix=settings.table_prefix,
        # The local AWS server may take long on a busy machine.
        options=ClientOptions(30, read_timeout_seconds=30, log=log),
    )
    reading, started = Reading(client, ids, reads), time.monotonic()
    reading.run()
    seconds = time.monotonic() - started
    client.close()
    log.flush(120)
    log.close()
    return log.counts, seconds, reading.failures


def export(platform: Platform, until: datetime) -> None:
    """Bring the events into the lake that had arrived by then."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        reports = platform.export_events()
        behind = [one.topic for one in reports if one.complete_until is None or one.complete_until < until]
        if not behind:
            return
        if time.monotonic() > end:
            raise SystemExit(f"the lake is not complete until {until} for {', '.join(behind)}")
        time.sleep(2)


def print_report(report: SkewReport) -> None:
    """Print the share of each cause, and what stands out."""
    differing = report.causes.total()
    print(
        f"{report.rows:,} rows, {report.compared:,} values compared, {differing:,} differ "
        f"({differing / max(1, report.compared):.3%})"
    )
    for cause in CAUSES:
        number = report.causes[cause]
        print(f"  {cause:22} {number:9,} {number / max(1, report.compared):9.4%}")
    print("  attribute                               equal")
    for (domain, name), one in report.attributes.items():
        print(f"  {domain + '.' + name:38} {one.equal_share:8.3%}")
    behind = ", ".join(f"{seconds:.3f} s ({share:.0%})" for share, seconds in report.behind_seconds.items())
    print(f"values that differ were behind by {behind or 'nothing'}")
    for what, number in (*report.refused.items(), *report.unknown.items()):
        print(f"{number:,} rows not compared: {what}")
    for name in sorted(report.left_out):
        print(f"{name} is not computed")
    for one in report.attributes.values():
        for example in one.examples:
            if example.cause in ("wrong", "clock difference"):
                print(f"{one.domain}.{one.attribute}: {example}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reads", type=int, default=100_000, help="profiles, each of all domains")
    parser.add_argument("--rate", type=float, default=200.0, help="events a second")
    parser.add_argument("--history", type=int, default=20_000, help="events before the traffic")
    parser.add_argument("--entities", type=int, default=500, help="ids of each entity")
    parser.add_argument("--folder", type=Path, help="keeps the engine, the lake and the log")
    parser.add_argument("--json", type=Path, help="also writes the figures there")
    given = parser.parse_args()
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefs-skew-"))
        folder = (given.folder or Path(scratch)).absolute()
        settings = stack.enter_context(environment(folder))
        platform, streaming = Platform(settings), settings.engine == "risingwave"
        target = "kafka" if streaming else "engine"
        shape = ["--entities", str(given.entities), "--to", target]
        prefs("apply")
        prefs("simulate", "--events", str(given.history), *shape)
        log = folder / "served"
        if not streaming:
            prefs("refresh")
            stack.enter_context(running("follow"))
        elif settings.follows:
            stack.enter_context(running("publish", "--follow"))
        if streaming:
            wait_for_history(platform)
        began = datetime.now(UTC)
        with running(
            "simulate", "--follow", "--rate", str(given.rate), "--events", str(given.history), *shape
        ):
            # Until the traffic flows.
            time.sleep(10)
            counts, seconds, failures = read_all(platform, log, given.reads)
            last = datetime.now(UTC)
            # A clock that is behind sees what arrives later.
            time.sleep(CLOCKS.total_seconds() * 2)
        print(
            f"{settings.engine}: {given.reads:,} reads in {seconds:.0f} s at {given.rate:g} events/s; the log has "
            f"{counts.written:,} rows, dropped {counts.dropped:,}; {len(failures):,} reads failed"
        )
        for failure in dict.fromkeys(failures[:3]):
            print(f"  {failure}")
        export(platform, last + CLOCKS)
        measured = time.monotonic()
        report = platform.skew([log])
        print_report(report)
        print(f"compared in {time.monotonic() - measured:.0f} s")
        if given.json:
            figures: dict[str, Any] = {
                "engine": settings.engine,
                "reads": given.reads,
                "rate": given.rate,
                "seconds": seconds,
                "failed_reads": len(failures),
                "began": began.isoformat(),
                "took": (last - began) / timedelta(seconds=1),
                **report.as_dict(),
            }
            given.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")
        return 2 if report.causes["wrong"] or report.refused or report.unknown or counts.dropped else 0


if __name__ == "__main__":
    sys.exit(main())
