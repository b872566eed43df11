"""Filling raw tables, refreshing what stands on them, and reading relations in the oracle's terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
from oracle import CANARY_KEYS, TOPICS, Erasure, Message, Oracle, Row
from psycopg import sql

RAW_TABLES = {
    "user.events": "raw_user_events",
    "view_events": "raw_view_events",
    "content_interactions": "raw_content_interactions",
    "items": "raw_items",
}
# What two engines and Python may round differently; everything else must be equal.
FLOATS = {"decayed_weight", "affinity_score"}

Connection = psycopg.Connection[tuple[Any, ...]]


def instant(micros: int) -> datetime:
    """Microseconds since 1970 → datetime in UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def replace_events(
    connection: Connection, messages: Sequence[Message], erased: Sequence[Erasure] = ()
) -> None:
    """Empty the raw tables and the list of erased subjects, and put these in, and the oracle's canary keys."""
    for table in (*RAW_TABLES.values(), "erased_subjects", "canary_keys"):
        connection.execute(sql.SQL("delete from {}").format(sql.Identifier(table)))
    insert_events(connection, messages)
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into erased_subjects (subject_kind, subject_id, erased_at) values (%s, %s, %s)",
            [(e.kind, e.subject, instant(e.at)) for e in erased],
        )
    insert_canary_keys(connection)


def insert_canary_keys(connection: Connection) -> None:
    """Make the oracle's canaries those of this engine."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into canary_keys (deployment, secret_hex) values (%s, %s)", list(CANARY_KEYS.items())
        )


def insert_events(connection: Connection, messages: Iterable[Message]) -> None:
    """Put messages into the raw tables of their topics."""
    messages = list(messages)
    with connection.cursor() as cursor:
        for topic in TOPICS:
            cursor.executemany(
                sql.SQL(
                    "insert into {} (source, source_partition, source_offset, data, kafka_timestamp, arrived_at)"
                    " values (%s, %s, %s, %s, %s, %s)"
                ).format(sql.Identifier(RAW_TABLES[topic])),
                [
                    (
                        m.source,
                        m.partition,
                        m.offset,
                        m.data,
                        None if m.kafka_timestamp is None else instant(m.kafka_timestamp),
                        instant(m.arrived_at),
                    )
                    for m in messages
                    if m.topic == topic
                ],
            )


def read(connection: Connection, relation: str, columns: Sequence[str]) -> list[Row]:
    """The rows of a relation; timestamps as microseconds since 1970."""
    types = dict(
        connection.execute(
            "select a.attname, t.typname from pg_attribute a join pg_class c on c.oid = a.attrelid"
            " join pg_type t on t.oid = a.atttypid where c.relname = %s and a.attnum > 0",
            (relation,),
        )
    )
    picked = [
        sql.SQL("(extract(epoch from {}) * 1000000)::bigint").format(sql.Identifier(name))
        if types[name] == "timestamptz"
        else sql.Identifier(name)
        for name in columns
    ]
    rows = connection.execute(
        sql.SQL("select {} from {}").format(sql.SQL(", ").join(picked), sql.Identifier(relation))
    ).fetchall()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _sortable(row: Row) -> str:
    return repr([_plain(name, value) for name, value in sorted(row.items()) if name not in FLOATS])


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(name, part) for part in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, Decimal)):
        # 1, 1.0 and 1E+0 are the same number, and so are 0 and -0.
        return format(Decimal(value).normalize(), "f") if value else "0"
    return value


def differences(
    connection: Connection, oracle: Oracle, only: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Relation → (rows only the engine has, rows only the oracle has), for those that differ."""
    found = {}
    for relation, rows in oracle.relations().items():
        if only and relation not in only:
            continue
        columns = list(rows[0]) if rows else []
        if not columns:
            count = connection.execute(
                sql.SQL("select count(*) from {}").format(sql.Identifier(relation))
            ).fetchone()
            if count != (0,):
                found[relation] = (count, [])
            continue
        theirs = {_sortable(row): row for row in read(connection, relation, columns)}
        ours = {_sortable(row): row for row in rows}
        assert len(ours) == len(rows), f"the oracle repeats a row of {relation}"
        extra = [row for key, row in theirs.items() if key not in ours]
        missing = [row for key, row in ours.items() if key not in theirs]
        off = [
            (theirs[key], row)
            for key, row in ours.items()
            if key in theirs
            for name in FLOATS & set(columns)
            if abs(theirs[key][name] - row[name]) > 1e-9 * max(abs(theirs[key][name]), abs(row[name]))
        ]
        number = connection.execute(
            sql.SQL("select count(*) from {}").format(sql.Identifier(relation))
        ).fetchone()
        if extra or missing or off or number != (len(rows),):
            found[relation] = (extra or off or number, missing or len(rows))
    return found


def refresh(connection: Connection, order: Sequence[str]) -> None:
    """Bring every materialized view up to date, in order of dependency."""
    for name in order:
        connection.execute("select prefs_rebuild(%s)", [name])


def materialized_views(manifest: dict[str, Any]) -> list[str]:
    """The materialized views of a dbt manifest, each after what it reads."""
    from graphlib import TopologicalSorter

    nodes = {key: node for key, node in manifest["nodes"].items() if node["resource_type"] == "model"}
    order = TopologicalSorter(
        {key: node["depends_on"]["nodes"] for key, node in nodes.items()}
    ).static_order()
    return [
        nodes[key]["name"]
        for key in order
        if key in nodes and nodes[key]["config"]["materialized"] == "materialized_view"
    ]
