"""The schemas of an engine that the platform made, one per environment: their size, and their removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.findings import PLATFORM_RELATIONS
from dagster_prefs.engine.catalog import read_catalog
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.lock import lock_deployment
from dagster_prefs.errors import PrefsError

# The table by which a schema of the platform is recognised.
RECORDS = "deployments"
_OWN_BEGINNING = "live_"
# Added to a relation's name: by its unfinished successor, its feed and dbt's temporary relations.
_OWN_MARKS = ("__next_", "__dbt_", "_feed", "_next")


class SchemaInUse(PrefsError):
    """A schema holds, or is read by, relations that the platform did not make."""


@dataclass(frozen=True)
class SchemaSize:
    """A schema of the platform: its number of relations, and their bytes with indexes."""

    name: str
    relations: int
    size_bytes: int


def platform_schemas(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> list[SchemaSize]:
    """Return the schemas that hold the platform's record of deployments, by name. Raises psycopg.Error."""
    if engine.kind == "risingwave":
        rows = connection.execute(
            "select n.name, count(*), coalesce(sum(s.total_key_size + s.total_value_size), 0)"
            " from rw_catalog.rw_schemas as n join rw_catalog.rw_relations as r on r.schema_id = n.id"
            " left join rw_catalog.rw_table_stats as s on s.id = r.id"
            " where n.id in (select schema_id from rw_catalog.rw_tables where name = %s)"
            " group by n.name order by n.name",
            [RECORDS],
        ).fetchall()
    else:
        rows = connection.execute(
            "select n.nspname, count(*) filter (where c.relkind in ('r', 'v', 'm', 'p')),"
            " coalesce(sum(pg_total_relation_size(c.oid)) filter (where c.relkind in ('r', 'm')), 0)"
            " from pg_namespace as n join pg_class as c on c.relnamespace = n.oid"
            " where exists (select from pg_attribute as a join pg_class as t on t.oid = a.attrelid"
            "   where t.relnamespace = n.oid and t.relname = %s and a.attname = 'source_checksum')"
            " group by n.nspname order by n.nspname",
            [RECORDS],
        ).fetchall()
    return [SchemaSize(str(name), int(relations), int(size)) for name, relations, size in rows]


def drop_schema(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> bool:
    """Drop the engine's schema with all that the platform made in it. Returns False if there is no such schema.

    Raises SchemaInUse, before anything is dropped, for relations in it that the platform did not make, and for
    relations elsewhere that read it; psycopg.Error.
    """
    if engine.kind == "risingwave":
        there = connection.execute(
            "select 1 from rw_catalog.rw_schemas where name = %s", [engine.schema]
        ).fetchone()
        if there is None:
            return False
        _refuse_others(connection, engine)
        connection.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(engine.schema)))
        return True
    with connection.transaction():
        # Neither dbt's runs nor the follower's steps may make a relation meanwhile.
        lock_deployment(connection, engine)
        if not connection.execute("select from pg_namespace where nspname = %s", [engine.schema]).fetchall():
            return False
        _refuse_others(connection, engine)
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(engine.schema)))
    return True


def _refuse_others(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    catalog = read_catalog(connection, engine)
    made: set[str] = set()
    if RECORDS in catalog.objects:
        rows = connection.execute(
            sql.SQL("select relation from {}").format(sql.Identifier(engine.schema, RECORDS))
        ).fetchall()
        made = {str(name) for (name,) in rows}
    foreign = sorted(
        name
        for name in catalog.objects
        if name not in made
        and name not in PLATFORM_RELATIONS
        and not name.startswith(_OWN_BEGINNING)
        and not any(mark in name and name.split(mark)[0] in made for mark in _OWN_MARKS)
    )
    if foreign:
        raise SchemaInUse(
            f"schema {engine.schema} holds relations that this platform did not make: {', '.join(foreign)}. "
            "Nothing was dropped: move or drop them, then run it again"
        )
    readers = sorted(name for name in catalog.readers(list(catalog.objects)) if "." in name)
    if readers:
        raise SchemaInUse(
            f"schema {engine.schema} is read from elsewhere, by {', '.join(readers)}. Nothing was dropped: drop these "
            "readers, then run it again"
        )
