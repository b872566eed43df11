"""Translate an engine's error about a statement: which model, whom it serves, and where to look."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dagster_prefs.declarations.names import FEED_KIND, TABLE_KIND, lake_table
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.redaction import redact_options

# The headings that dbt and RisingWave put around the reasons, and dbt's call stack.
_HEADINGS = re.compile(
    r"(Database|Runtime) Error( in .*)?|Failed to run the query|Caused by( these errors \(.*\))?:"
    r"|>.*|compiled code at.*"
)
_FAILED_STATEMENT = re.compile(r"\s*(Database|Runtime) Error in (model|test|snapshot)\b")

# Materialization on RisingWave → its name in messages, and what to check in addition to its model. The sinks into the
# lake and those of domains differ by their destination.
_ICEBERG, _RAW, _DYNAMODB = "sink into Iceberg", "sink of raw messages", "sink into DynamoDB"
_CATALOG = (
    "the table in the catalog, PREFS_ICEBERG_CATALOG, PREFS_ICEBERG_URI, PREFS_ICEBERG_CREDENTIAL and "
    "PREFS_ICEBERG_WAREHOUSE, and the AWS keys"
)
_LOOK_AT: Mapping[str, tuple[str, str]] = {
    TABLE_KIND: ("event table", ""),
    _DYNAMODB: (
        "DynamoDB sink",
        "the table's key and state in DynamoDB, PREFS_TABLE_PREFIX, AWS_REGION, AWS_ENDPOINT_URL, and "
        "PREFS_SINK_ROLE_ARN or the AWS keys",
    ),
    _ICEBERG: ("Iceberg sink", _CATALOG),
    # RisingWave's own remedy, force_append_only, would write rows that change a second time.
    _RAW: (
        "Iceberg sink",
        f"{_CATALOG}; its raw table must have been created with PREFS_RAW_RETENTION_SECONDS, else recreate that or "
        "unset PREFS_EXPORT",
    ),
    "subscription": ("subscription", "the view it reads, and PREFS_CHANGEFEED_RETENTION_HOURS"),
    FEED_KIND: (
        "Kafka feed",
        "the topic and its brokers, PREFS_KAFKA_BOOTSTRAP, PREFS_KAFKA_SECURITY_PROTOCOL and what belongs to it",
    ),
}
_SECRET = "secret_store_private_key of the server, and PREFS_RISINGWAVE_SECRETS, which may be off"  # noqa: S105


def engine_words(message: str) -> str:
    """Return the reasons in an engine's message, outermost first, on one line and without credentials."""
    reasons = [re.sub(r"^\d+: ", "", line.strip()) for line in message.splitlines()]
    kept = [reason for reason in reasons if reason and not _HEADINGS.fullmatch(reason)]
    return redact_options(": ".join(reason.rstrip(":") for reason in kept)) or "nothing"


def failed_statement(
    message: str, unique_id: str, manifest: Mapping[str, Any], engine: EngineConfiguration
) -> str | None:
    """Translate the engine's error about a model or test into one sentence; None for other errors.

    `message` is dbt's, of the node `unique_id` of the manifest. The sentence ends with the engine's own
    words.
    """
    node = manifest["nodes"].get(unique_id)
    if node is None or not _FAILED_STATEMENT.match(message):
        return None
    server = f"{'RisingWave' if engine.kind == 'risingwave' else 'the engine'} at {engine.host}:{engine.port}"
    path, words = node["original_file_path"], engine_words(message)
    if node["resource_type"] != "model":
        return (
            f"{server} could not run {node['resource_type']} {node['name']}: look at {path}. It says: {words}"
        )
    materialization = node["config"]["materialized"]
    if materialization == "sink" and engine.kind == "risingwave":
        meta = node["config"]["meta"]
        materialization = _RAW if "lake_table" in meta else _ICEBERG if lake_table(meta) else _DYNAMODB
    called, beside = _LOOK_AT.get(materialization, (materialization.replace("_", " "), ""))
    if "ddl_service.DdlService/CreateSecret" in message:
        called, beside = f"secret of the {called}", _SECRET
    whom = for_whom(node, manifest)
    return (
        f"{server} did not create the {called} {node['alias']}{f' for {whom}' if whom else ''}: look at {path}"
        f"{f', {beside}' if beside else ''}. It says: {words}"
    )


def for_whom(node: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Describe what a model serves: its domain, topic or training table, and its exposures; else empty."""
    meta, upstream = node["config"]["meta"], node["depends_on"]["nodes"]
    read = [manifest["nodes"][id_]["config"]["meta"] for id_ in upstream if id_ in manifest["nodes"]]
    domains = [one["domain"]["key"] for one in (meta, *read) if one.get("domain")]
    served = [f"domain {domain}" for domain in domains[:1]]
    if "training_table" in meta:
        served = [f"training table {meta['training_table']}"]
    if "lake_table" in meta:
        served = [f"table {meta['lake_table']} in the lake"]
    if "topic" in node["config"]:
        served = [f"topic {node['config']['topic']}"]
    reached, left = set[str](), [node["unique_id"]]
    while left:
        left = [id_ for one in left for id_ in manifest["child_map"].get(one, ()) if id_ not in reached]
        reached.update(left)
    consumers = sorted(id_.split(".")[-1] for id_ in reached if id_.startswith("exposure."))
    return ", ".join([*served, *consumers])
