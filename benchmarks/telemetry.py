"""What counting and tracing cost a read of a profile, as ratios to a read without either.

`python benchmarks/telemetry.py [--endpoint URL] [--rounds N] [--json FILE]`. Like benchmarks/serving.py it starts
DynamoDB Local unless an endpoint is named. Spans and metrics go to a collector in a process of its own that takes and
forgets them. Variants take turns in small rounds, so that a drift of the machine meets all of them alike. What the
exporters' threads take besides is in `cpu_ms` of the JSON, for all variants together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from serving import AT, PROJECT, REGION, VIEWERS, Variant, dynamodb_local, measure, reading

from dagster_prefs.declarations.contract import load_contract
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.serving import ClientOptions, ProfileClient, ReadCounts
from dagster_prefs.serving.observing import Observer
from dagster_prefs.serving.telemetry import ReadTelemetry

COLLECTOR = """
import http.server
class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_port, flush=True)
server.serve_forever()
"""
OFF = "off"


@contextmanager
def collector() -> Iterator[str]:
    """A collector's URL."""
    process = subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait()


def telemetry(share: float, url: str, stack: ExitStack) -> ReadTelemetry:
    """What sends this share of the traces, and all metrics, to a collector."""
    tracers = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)))
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{url}/v1/metrics"), 5_000)
    meters = MeterProvider([reader])
    stack.callback(tracers.shutdown)
    stack.callback(meters.shutdown)
    return ReadTelemetry(tracer_provider=tracers, meter_provider=meters)


def caller_cpu(clients: dict[str, ProfileClient], domains: list[str] | None, rounds: int) -> dict[str, float]:
    """Return the processor time of the calling thread, ms a read: the mean of all turns but the slowest tenth.

    A turn is 8 reads, and the order of the variants is drawn for each: on a machine that others use, two clients
    without telemetry then differ by half a percent, where medians of the time that passed differ by ten.
    """
    found: dict[str, list[float]] = {name: [] for name in clients}
    names = list(clients)
    for turn in range(rounds * 8):
        random.shuffle(names)
        for name in names:
            started = time.thread_time_ns()
            for number in range(8):
                clients[name].get((turn * 31 + number) % VIEWERS, domains)
            found[name].append((time.thread_time_ns() - started) / 8e6)
    kept = int(rounds * 8 * 0.9)
    return {name: sum(sorted(turns)[:kept]) / kept for name, turns in found.items()}


def compare(endpoint: str, rounds: int) -> dict[str, Any]:
    """Print and return the figures of reads that are counted and traced."""
    with ExitStack() as stack:
        url = stack.enter_context(collector())
        observers: dict[str, Observer | None] = {
            OFF: None,
            "counted": ReadCounts(),
            "traced, none sampled": telemetry(0.0, url, stack),
            "traced, 1 % sampled": telemetry(0.01, url, stack),
            "traced, all sampled": telemetry(1.0, url, stack),
        }
        options = {
            name: ClientOptions(30, read_timeout_seconds=30, observer=observer)
            for name, observer in observers.items()
        }
        return compare_options(endpoint, rounds, options)


def compare_options(endpoint: str, rounds: int, options: Mapping[str, ClientOptions]) -> dict[str, Any]:
    """Print and return the figures of a client with each of these options, one of which is `off`."""
    contract = load_contract(PROJECT)
    admin = dynamodb_client(endpoint, REGION)
    prefix = f"benchmark_{os.getpid()}_"
    table = provision(admin, contract, prefix=prefix)["viewer"].name
    encoder = ItemEncoder(contract, contract.domain("watch"))
    values = [Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT]
    puts = [{"PutRequest": {"Item": encoder.encode(viewer, values)}} for viewer in range(VIEWERS)]
    for start in range(0, VIEWERS, 25):
        admin.batch_write_item(RequestItems={table: puts[start : start + 25]})  # type: ignore[dict-item]
    results: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            clients = {
                name: stack.enter_context(
                    ProfileClient(
                        PROJECT,
                        endpoint_url=endpoint,
                        region=REGION,
                        table_prefix=prefix,
                        options=given,
                    )
                )
                for name, given in options.items()
            }
            for title, domains in (("1 domain", ["watch"]), ("all domains", None)):
                variants = [
                    Variant(
                        name,
                        reading(lambda viewer, client=client, domains=domains: client.get(viewer, domains)),
                    )
                    for name, client in clients.items()
                ]
                measure(variants, callers=1, rounds=rounds, reads=50)
                figures = {variant.name: variant.figures() for variant in variants}
                for name, cpu_ms in caller_cpu(clients, domains, rounds).items():
                    figures[name]["caller_cpu_ms"] = cpu_ms
                base = figures[OFF]
                print(
                    f"\none viewer, {title}\n"
                    f"| | p50, ms | p50 : {OFF} | caller's CPU, ms | caller's CPU : {OFF} |\n|---"
                    + "|---:" * 4
                    + "|"
                )
                for name, found in figures.items():
                    print(
                        f"| {name} | {found['p50_ms']:.3f} | {found['p50_ms'] / base['p50_ms']:.3f} | "
                        f"{found['caller_cpu_ms']:.3f} | {found['caller_cpu_ms'] / base['caller_cpu_ms']:.3f} |"
                    )
                results[title] = figures
    finally:
        admin.delete_table(TableName=table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of counting and tracing profile reads.")
    parser.add_argument("--endpoint", help="URL of a DynamoDB to use instead of DynamoDB Local")
    parser.add_argument("--rounds", type=int, default=100, help="turns of 50 reads by each variant")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with ExitStack() as stack:
        endpoint = given.endpoint or stack.enter_context(dynamodb_local())
        results = compare(endpoint, given.rounds)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
