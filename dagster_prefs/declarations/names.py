"""The names that are derived from a model's, and how long the names of an engine may be."""

from __future__ import annotations

# PostgreSQL cuts off what is longer, without an error.
NAME_BYTES = 63
# Behind the name of a kept view of the embedded engine: the view of its query (macros/engine/kept.sql). What steps
# derive, such as `live_…`, is shorter, or a name within one statement.
QUERY_SUFFIX = "__query"

# The Iceberg table of statistics of values, beside the training tables.
STATISTICS_TABLE = "value_statistics"


def raw_table(relation: str) -> str:
    """Return the name of a topic's raw table, by that of its typed relation."""
    return f"raw_{relation}"


def kafka_feed(relation: str) -> str:
    """Return the name of a topic's Kafka feed, by that of its typed relation."""
    return f"kafka_{relation}"


def parsed_view(relation: str) -> str:
    """Return the name of a topic's parsed view, by that of its typed relation."""
    return f"{relation}_parsed"


def bytes_too_many(relation: str, *, kept: bool) -> int:
    """Return by how many bytes a name is too long for a relation, or for one that is a kept view; 0 if it fits."""
    longest = relation + QUERY_SUFFIX if kept else relation
    return max(0, len(longest.encode()) - NAME_BYTES)
