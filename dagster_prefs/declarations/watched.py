"""Which views have a newest time, and from which relations it is computed, derived from their queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import sqlglot
from sqlglot import exp

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Registry, Upstream, WatchedView


def watched_views(registry: Registry) -> tuple[WatchedView, ...]:
    """Return every tile and rolling view, and the preference views that have a newest time."""
    times = {topic.relation: (topic.name, topic.time) for topic in registry.topics.values() if topic.time}
    rolling = [domain.relation for domain in registry.contract.domains.values()]
    others = [name for name in registry.queries if name not in {*rolling, *registry.tiles}]
    found = [_view(registry, relation, times) for relation in others]
    preferences = [view for view in found if not view.unclear]
    tiles = [_view(registry, relation, times) for relation in registry.tiles]
    times |= {tile.relation: (tile.topic, LAST_EVENT_AT) for tile in tiles}
    return (*preferences, *tiles, *(_view(registry, relation, times) for relation in rolling))


def _view(registry: Registry, relation: str, times: Mapping[str, tuple[str, str]]) -> WatchedView:
    """Derive a view's upstreams from its query. `times`: possible upstream → its topic and time column."""
    query = sqlglot.parse_one(registry.query(relation), dialect="risingwave")
    selects = {cte.alias: cte.this for cte in query.find_all(exp.CTE)}
    final = query
    while final.is_star and (source := final.args.get("from_")) and source.this.name in selects:
        final = selects[source.this.name]
    columns = frozenset(column.alias_or_name for column in final.expressions)
    candidates = [column for column in final.expressions if column.alias_or_name == LAST_EVENT_AT]
    for column in candidates or final.expressions:
        sources = list(_sources(column, final, selects))
        newest = sources and all(
            times.get(table, ("", ""))[1] == name and is_newest for _, table, name, is_newest in sources
        )
        if newest:
            upstreams = [_upstream(registry, select, table, name) for select, table, name, _ in sources]
            known = {found.relation: found for found in upstreams if found is not None}
            topic = times[sources[0][1]][0]
            unclear = "" if len(known) == len({table for _, table, _, _ in sources}) else _JOINED
            return WatchedView(topic, relation, column.alias_or_name, tuple(known.values()), columns, unclear)
    return WatchedView("", relation, LAST_EVENT_AT, (), columns, _TIMELESS)


_JOINED = (
    "its query reads events or tiles together with something else, so that which of them it shows is not known: read "
    "them in a CTE of their own"
)
_TIMELESS = (
    f"its query has no {LAST_EVENT_AT} that is the newest time of its inputs: add max(…) as {LAST_EVENT_AT}"
)


def _sources(
    expression: exp.Expr,
    select: exp.Expr,
    selects: Mapping[str, exp.Query],
    is_newest: bool = False,
) -> Iterator[tuple[exp.Expr, str, str, bool]]:
    """Yield the columns from which an expression is computed.

    Each with the select that reads it, its relation, its name, and whether the expression takes its newest
    value.
    """
    if isinstance(select, exp.SetOperation):
        place = select.named_selects.index(expression.alias_or_name)
        for side in (select.left, select.right):
            yield from _sources(side.selects[place], side, selects, is_newest)
        return
    source = select.args.get("from_")
    if source is None:
        return
    read = [source.this, *(join.this for join in select.args.get("joins") or ())]
    for column in expression.find_all(exp.Column):
        taken = is_newest or isinstance(column.find_ancestor(exp.Max, exp.Select), exp.Max)
        tables = [table for table in read if table.alias_or_name == column.table] or read[:1]
        name = tables[0].name
        if name not in selects:
            yield select, name, column.name, taken
            continue
        inner = selects[name]
        for made in inner.selects:
            if made.alias_or_name == column.name:
                yield from _sources(made, inner, selects, taken)


def _upstream(registry: Registry, select: exp.Expr, relation: str, time: str) -> Upstream | None:
    """Return what a select shows of the relation that it reads, None if that cannot be determined."""
    if select.args.get("joins"):
        return None
    where = select.args.get("where")
    tile = registry.tiles.get(relation)
    if tile is None:
        return Upstream(relation, time, where.this.sql(dialect="postgres") if where else "true")
    interval = where.find(exp.Interval) if where else None
    if where is None or interval is None or tile.day not in {c.name for c in where.find_all(exp.Column)}:
        return None
    # The query's filter is day + (N + 1) days > now.
    return Upstream(relation, time, day=tile.day, days=int(interval.this.name) - 1)
