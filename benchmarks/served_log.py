"""What the served log costs a read of a profile, as ratios to a read without it.

`python benchmarks/served_log.py [--endpoint URL] [--rounds N] [--json FILE]`. Like benchmarks/telemetry.py, whose
variants take turns in small rounds. The rows go to files in a temporary folder; what the log's thread takes besides is
in `cpu_ms` of the JSON, for all variants together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

from serving import dynamodb_local
from telemetry import OFF, compare_options

from dagster_prefs.serving import ClientOptions, ServedLog
from dagster_prefs.serving.served_log import FileRows

SHARES = (0.0, 0.01, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the log of served profiles.")
    parser.add_argument("--endpoint", help="URL of a DynamoDB to use instead of DynamoDB Local")
    parser.add_argument("--rounds", type=int, default=100, help="turns of 50 reads by each variant")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with ExitStack() as stack:
        endpoint = given.endpoint or stack.enter_context(dynamodb_local())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = {f"logged, {share:.0%} of ids": ServedLog(FileRows(folder), share=share) for share in SHARES}
        options = {OFF: ClientOptions(30, read_timeout_seconds=30)} | {
            name: ClientOptions(30, read_timeout_seconds=30, log=log) for name, log in logs.items()
        }
        results = compare_options(endpoint, given.rounds, options)
        for name, log in logs.items():
            log.close()
            print(f"{name}: {log.counts}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
