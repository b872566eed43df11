"""What the engine holds: relations, their size, and what arrived but is not visible yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.errors import PrefsError


class NotDeployed(PrefsError):
    """A relation that should be there is not."""


def row_counts(
    connection: psycopg.Connection[Any], engine: EngineConnection, names: Sequence[str]
) -> dict[str, int]:
    """Rows of each of the named relations that exist, exact on the embedded engine.

    On RisingWave, where a count reads the whole relation, it is the storage's own key count.
    """
    if not names:
        return {}
    if engine.kind == "risingwave":
        rows = connection.execute(
            "select r.name, s.total_key_count from rw_catalog.rw_table_stats s"
            " join rw_catalog.rw_relations r on r.id = s.id join rw_catalog.rw_schemas n on n.id = r.schema_id"
            " where n.name = %s and r.name = any(%s)",
            (engine.schema, list(names)),
        ).fetchall()
        return {name: int(count) for name, count in rows}
    there = {
        name
        for (name,) in connection.execute(
            "select relname from pg_class where relnamespace = %s::regnamespace and relname = any(%s)",
            (engine.schema, list(names)),
        )
    }
    counted = [name for name in names if name in there]
    if not counted:
        return {}
    query = sql.SQL(" union all ").join(
        sql.SQL("select {}, count(*) from {}").format(sql.Literal(name), sql.Identifier(engine.schema, name))
        for name in counted
    )
    return {name: int(count) for name, count in connection.execute(query).fetchall()}


def require_relation(connection: psycopg.Connection[Any], engine: EngineConnection, name: str) -> None:
    """Raise NotDeployed, with the remedy, when `name` is not in the engine's schema."""
    found = connection.execute(
        "select 1 from information_schema.tables where table_schema = %s and table_name = %s"
        " union all select 1 from pg_catalog.pg_matviews where schemaname = %s and matviewname = %s",
        (engine.schema, name, engine.schema, name),
    ).fetchone()
    if found is None:
        raise NotDeployed(
            f"{engine.schema}.{name} is not in database {engine.database}: run `dbt run` in dbt_project/"
        )
