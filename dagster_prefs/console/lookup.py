"""Find ids of an entity by prefix, in the engine: a page never holds all ids."""

from __future__ import annotations

from psycopg import sql

from dagster_prefs.console.context import Console
from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.ids import BLANKS, Id

MOST_FOUND = 12
# Of a 64-bit id; a prefix of 18 digits and any 19th one may be too large.
DIGITS = 18


def listed_in(registry: Registry, entity: Entity) -> dict[str, str | None]:
    """Return the relations that hold ids of an entity, each with its column of the newest event, if it has one.

    These are the rolling views of its domains or, without domains, its preference views; an id may be in any of them.
    """
    domains = registry.contract.domains.values()
    found: dict[str, str | None] = {
        one.relation: LAST_EVENT_AT for one in domains if one.entity == entity.name
    }
    views = registry.preferences.values()
    return found or {one.relation: None for one in views if one.entity == entity.name}


def find_ids(console: Console, entity: Entity, begin: str = "", limit: int = MOST_FOUND) -> list[Id]:
    """Return up to `limit` ids whose first key has this prefix, without canaries; the newest ids for no prefix.

    Raises like `Console.query`.
    """
    relations = listed_in(console.registry, entity)
    text = begin.strip(BLANKS)
    if not relations or (entity.key.type == "bigint" and text and not text.isdecimal()):
        return []
    keys = sql.SQL(", ").join(map(sql.Identifier, entity.key_names))
    newest = not text and None not in relations.values()
    in_one = sql.SQL(
        "(select {keys}, max({at}) as at from {relation} where {people} and {begins} group by {keys} {some})"
    )
    parts = [
        in_one.format(
            keys=keys,
            at=sql.Identifier(newest_event) if newest and newest_event else sql.SQL("null::bigint"),
            relation=console.relation(relation),
            people=people_only(entity.key),
            begins=_begins(entity, text),
            some=_first(keys, newest, limit),
        )
        for relation, newest_event in relations.items()
    ]
    statement = sql.SQL("select {keys}, max(at) as at from ({parts}) as found group by {keys} {some}").format(
        keys=keys, parts=sql.SQL(" union all ").join(parts), some=_first(keys, newest, limit)
    )
    what = ", ".join(relations)
    rows = console.query(what, lambda connection: connection.execute(statement).fetchall())
    return [row[0] if len(entity.keys) == 1 else tuple(row[:-1]) for row in rows]


def _first(keys: sql.Composable, newest: bool, limit: int) -> sql.Composed:
    order = sql.SQL("at desc, {}").format(keys) if newest else keys
    return sql.SQL("order by {} limit {}").format(order, sql.Literal(limit))


def _begins(entity: Entity, text: str) -> sql.Composable:
    column = sql.Identifier(entity.key.name)
    if not text:
        return sql.SQL("true")
    if entity.key.type != "bigint":
        sought = text.lower() if entity.key.type == "uuid" else text
        return sql.SQL("starts_with({}, {})").format(column, sql.Literal(sought))
    # Ranges instead of texts, so that an index of the key is used: 42 itself, 420 to 429, 4200 to 4299 and so on.
    first, ranges = int(text[:DIGITS]), []
    for zeros in range(DIGITS - len(text[:DIGITS]) + 1):
        low = first * 10**zeros
        ranges.append(
            sql.SQL("{0} between {1} and {2}").format(
                column, sql.Literal(low), sql.Literal(low + 10**zeros - 1)
            )
        )
    return sql.SQL("({})").format(sql.SQL(" or ").join(ranges))
