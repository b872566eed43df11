"""The names derived from a model's name, and the maximum length of names in an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# PostgreSQL truncates longer names without an error.
NAME_BYTES = 63
# The suffix of the view with a kept view's query, on the embedded engine (macros/engine/kept.sql). The names that steps
# derive, such as `live_…`, are shorter or are used within one statement only.
QUERY_SUFFIX = "__query"

# The Iceberg table of statistics of values, beside the training tables.
STATISTICS_TABLE = "value_statistics"

# The materializations of raw tables and of Kafka feeds. The former is dbt-risingwave's name for any table, with or
# without a connector; ours have none. A feed is a source with the model's name, and a sink from it into the topic's raw
# table (macro `kafka_feed`).
TABLE_KIND = "table_with_connector"
FEED_KIND = "kafka_feed"

REDACTED = b'{"erased":true}'
"""What remains of a message after its subject's erasure; the typed layer rejects it with the reason `erased`."""


def raw_table(relation: str) -> str:
    """Return the name of a topic's raw table from that of its typed relation."""
    return f"raw_{relation}"


def kafka_feed(relation: str) -> str:
    """Return the name of a topic's Kafka feed from that of its typed relation."""
    return f"kafka_{relation}"


def raw_sink(relation: str) -> str:
    """Return the name of the sink of a topic's raw messages into the lake from that of its typed relation."""
    return f"sink_raw_{relation}"


def parsed_view(relation: str) -> str:
    """Return the name of a topic's parsed view from that of its typed relation."""
    return f"{relation}_parsed"


def lake_table(meta: Mapping[str, Any]) -> str | None:
    """Return the table in the lake that a sink writes, by its model's meta: of tiles or of raw messages; else None."""
    found: str | None = meta.get("training_table") or meta.get("lake_table")
    return found


def bytes_too_many(relation: str, *, kept: bool) -> int:
    """Return by how many bytes a name is too long for a relation, or for one that is a kept view; 0 if it fits."""
    longest = relation + QUERY_SUFFIX if kept else relation
    return max(0, len(longest.encode()) - NAME_BYTES)
