"""Find ids of an entity by how they begin, in the engine: a page never holds all of them."""

from __future__ import annotations

from psycopg import sql

from dagster_prefs.console.context import Console
from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.ids import BLANKS, Id

MOST_FOUND = 12
DIGITS = 18


def listed_in(registry: Registry, entity: Entity) -> str | None:
    """Return a relation with the ids of an entity: a domain's rolling view, else a preference view; None without."""
    domains = (one.relation for one in registry.contract.domains.values() if one.entity == entity.name)
    views = (one.relation for one in registry.preferences.values() if one.entity == entity.name)
    return next(iter([*domains, *views]), None)


def find_ids(console: Console, entity: Entity, begin: str = "", limit: int = MOST_FOUND) -> list[Id]:
    """Return up to `limit` ids whose first key begins so, canaries excluded; without a beginning the newest ones.

    Raises like `Console.query`.
    """
    relation = listed_in(console.registry, entity)
    text = begin.strip(BLANKS)
    if relation is None or (entity.key.type == "bigint" and text and not text.isdecimal()):
        return []
    keys = sql.SQL(", ").join(map(sql.Identifier, entity.key_names))
    in_domain = any(one.relation == relation for one in console.registry.contract.domains.values())
    order = sql.SQL("{} desc").format(sql.Identifier(LAST_EVENT_AT)) if in_domain and not text else keys
    group = sql.SQL("") if in_domain else sql.SQL("group by {}").format(keys)
    statement = sql.SQL("select {} from {} where {} and {} {} order by {} limit {}").format(
        keys, console.relation(relation), people_only(entity.key), _begins(entity, text), group, order,
        sql.Literal(limit),
    )  # fmt: skip
    rows = console.query(relation, lambda connection: connection.execute(statement).fetchall())
    return [row[0] if len(row) == 1 else tuple(row) for row in rows]


def _begins(entity: Entity, text: str) -> sql.Composable:
    column = sql.Identifier(entity.key.name)
    if not text:
        return sql.SQL("true")
    if entity.key.type != "bigint":
        sought = text.lower() if entity.key.type == "uuid" else text
        return sql.SQL("starts_with({}, {})").format(column, sql.Literal(sought))
    # Ranges instead of texts, so that an index of the key is used: 42 itself, 420 to 429, 4200 to 4299 …
    first, ranges = int(text[:DIGITS]), []
    for zeros in range(DIGITS - len(text[:DIGITS]) + 1):
        low = first * 10**zeros
        ranges.append(
            sql.SQL("{0} between {1} and {2}").format(
                column, sql.Literal(low), sql.Literal(low + 10**zeros - 1)
            )
        )
    return sql.SQL("({})").format(sql.SQL(" or ").join(ranges))
