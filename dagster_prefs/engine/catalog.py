"""The relations of the engine: what exists, who reads it, and how many rows it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.names import QUERY_SUFFIX
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError


class NotDeployed(PrefsError):
    """A required relation does not exist."""


def missing_relation(error: psycopg.Error) -> str | None:
    """Return what an engine reports as missing; None if the error has another cause."""
    if isinstance(error, psycopg.errors.UndefinedTable):
        return error.diag.message_primary
    # RisingWave has one error code for everything that its binder cannot resolve. What a write needs is a table.
    found = re.search(r"\btable( or source)? not found: \S+", str(error))
    return found.group(0) if found else None


@dataclass(frozen=True)
class CatalogObject:
    """A relation, sink or subscription; a higher id was created later.

    `kind` is one of table, view, materialized view, sink, subscription, source. A kept view of the embedded engine
    counts as one materialized view, which reads the relations of its query.
    """

    id: int
    name: str
    kind: str


@dataclass(frozen=True)
class Catalog:
    """The objects of the engine's schema by name, and what each of their readers reads.

    `reads` also lists readers outside the schema, as `schema.name`; on RisingWave a reader of a plain view
    also reads the relations below the view.
    """

    objects: Mapping[str, CatalogObject]
    reads: Mapping[str, frozenset[str]]

    def readers(self, names: Sequence[str]) -> frozenset[str]:
        """Return all direct and indirect readers of `names`, without `names` themselves."""
        found: set[str] = set()
        below = set(names)
        while below:
            below = {reader for reader, read in self.reads.items() if read & below} - found - set(names)
            found |= below
        return frozenset(found)


def read_catalog(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> Catalog:
    """Read the objects of the engine's schema and their dependencies, without indexes."""
    queries: dict[int, tuple[str, str]] = {}
    if engine.kind == "risingwave":
        objects = connection.execute(
            "select r.id, n.name, r.name, r.relation_type from rw_catalog.rw_relations r"
            " join rw_catalog.rw_schemas n on n.id = r.schema_id"
            " where r.relation_type not in ('index', 'system table')"
            " and n.name not in ('rw_catalog', 'pg_catalog', 'information_schema')"
        ).fetchall()
        reads = connection.execute("select objid, refobjid from rw_catalog.rw_depend").fetchall()
    else:
        objects = connection.execute(
            "select c.oid::bigint, n.nspname, c.relname, case c.relkind when 'v' then 'view'"
            " when 'm' then 'materialized view' else 'table' end"
            " from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where c.relkind in ('r', 'p', 'f', 'v', 'm')"
            " and n.nspname not in ('pg_catalog', 'information_schema') and n.nspname not like 'pg_toast%'"
        ).fetchall()
        kept = {(schema, name) for _, schema, name, kind in objects if kind == "table"}
        queries = {
            id_: (schema, name.removesuffix(QUERY_SUFFIX))
            for id_, schema, name, kind in objects
            if kind == "view"
            and name.endswith(QUERY_SUFFIX)
            and (schema, name.removesuffix(QUERY_SUFFIX)) in kept
        }
        views = set(queries.values())
        objects = [
            (id_, schema, name, "materialized view" if (schema, name) in views else kind)
            for id_, schema, name, kind in objects
            if id_ not in queries
        ]
        reads = connection.execute(
            "select distinct rule.ev_class::bigint, depend.refobjid::bigint from pg_depend as depend"
            " join pg_rewrite as rule on rule.oid = depend.objid and rule.ev_class <> depend.refobjid"
            " where depend.classid = 'pg_rewrite'::regclass and depend.refclassid = 'pg_class'::regclass"
        ).fetchall()
    places = {id_: (schema, name) for id_, schema, name, _ in objects} | queries
    names = {
        id_: name if schema == engine.schema else f"{schema}.{name}" for id_, (schema, name) in places.items()
    }
    upstream: dict[str, set[str]] = {}
    for reader, read in reads:
        if reader in names and read in names:
            upstream.setdefault(names[reader], set()).add(names[read])
    return Catalog(
        objects={
            name: CatalogObject(int(id_), name, kind)
            for id_, schema, name, kind in objects
            if schema == engine.schema
        },
        reads={name: frozenset(read) for name, read in upstream.items()},
    )


def estimated_rows(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, names: Sequence[str]
) -> dict[str, int]:
    """Return PostgreSQL's estimate of the rows of each named relation that exists, -1 where it has none."""
    rows = connection.execute(
        "select relname, reltuples::bigint from pg_class"
        " where relnamespace = to_regnamespace(%s) and relname = any(%s)",
        (engine.schema, list(names)),
    ).fetchall()
    return dict(rows)


def row_counts(
    connection: psycopg.Connection[Any],
    engine: EngineConfiguration,
    names: Sequence[str],
    *,
    exact_up_to: int | None = None,
) -> dict[str, int]:
    """Count the rows of each named relation that exists; exact on the embedded engine.

    With `exact_up_to`, PostgreSQL's estimate is returned for a larger table there, because a count reads all of it. On
    RisingWave, where a count reads the whole relation, the storage's own key count is returned.
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
    there = estimated_rows(connection, engine, names)
    estimated = {name: rows for name, rows in there.items() if exact_up_to is not None and rows > exact_up_to}
    counted = [name for name in names if name in there and name not in estimated]
    if not counted:
        return estimated
    query = sql.SQL(" union all ").join(
        sql.SQL("select {}, count(*) from {}").format(sql.Literal(name), sql.Identifier(engine.schema, name))
        for name in counted
    )
    return estimated | {name: int(count) for name, count in connection.execute(query).fetchall()}
