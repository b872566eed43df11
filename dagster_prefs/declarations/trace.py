"""Trace the columns of a query to the columns that it reads, from its SQL as dbt compiles it.

A column depends on others in two ways. Its value is made from some: `identity`, `transformation`, `aggregation`.
Others only decide: which value is taken (`condition`), which rows count (`filter`, `join`), which rows belong
together (`group`), or which comes first (`order`). A count of rows has only the second kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from graphlib import TopologicalSorter
from typing import Any, TypeVar

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, build_scope, traverse_scope

from dagster_prefs.declarations.lineage import Column, Kind, RelationLineage, Sources, composed, merged

DIALECT = "risingwave"
R = TypeVar("R")


def trace_all(
    queries: Mapping[str, str],
    columns: Mapping[str, Iterable[str]],
    keys: Mapping[str, frozenset[str]],
) -> dict[str, RelationLineage]:
    """Trace several queries, each after the ones it reads. `columns` and `keys` describe all other relations."""
    known: dict[str, Iterable[str]] = dict(columns)
    reads = {name: tables_of(text) & queries.keys() - {name} for name, text in queries.items()}
    found: dict[str, RelationLineage] = {}
    for name in TopologicalSorter(reads).static_order():
        found[name] = trace(queries[name], known, keys)
        if found[name].columns:
            known[name] = tuple(found[name].columns)
    return found


def tables_of(sql: str) -> set[str]:
    """Return the relations that a query reads, without its CTEs; empty if it cannot be read."""
    try:
        scopes = traverse_scope(sqlglot.parse_one(sql, dialect=DIALECT))
    except SqlglotError:
        return set()
    # By scope, because a CTE may have the name of the relation that it reads.
    sources = [source for scope in scopes for source in scope.sources.values()]
    return {source.name for source in sources if isinstance(source, exp.Table)}


class _Untraceable(Exception):
    """The query has a construct that cannot be traced; the message says which."""


def trace(
    sql: str,
    columns: Mapping[str, Iterable[str]],
    keys: Mapping[str, frozenset[str]] | None = None,
) -> RelationLineage:
    """Trace every column of a query.

    `columns` maps the relations that the query reads to the names of their columns, as far as they are known;
    `keys` maps a relation to the columns that identify one of its rows. A query that cannot be traced is returned
    with the reason and does not raise, because it must not stop a deployment.
    """
    try:
        tree = sqlglot.parse_one(sql, dialect=DIALECT)
        if not isinstance(tree, exp.Query):
            raise _Untraceable(f"it is a statement ({tree.key}), not a query")
        scope = build_scope(tree)
        if scope is None:
            raise _Untraceable("sqlglot finds no scope in it")
        tracer = _Tracer(columns, keys or {})
        return RelationLineage(
            tracer.rows(scope), tracer.projections(scope), tuple(sorted(tracer.reads(scope)))
        )
    except _Untraceable as error:
        return RelationLineage({}, {}, untraced=str(error))
    # sqlglot may raise any exception for a construct that it or this module does not know.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return RelationLineage({}, {}, untraced=f"sqlglot cannot read it: {reason[:200]}")


def _once(method: Callable[[_Tracer, Scope], R]) -> Callable[[_Tracer, Scope], R]:
    """Compute a result once per scope: several queries may read one CTE."""

    @wraps(method)
    def wrapped(self: _Tracer, scope: Scope) -> R:
        known = self.known.setdefault(method.__name__, {})
        if id(scope) not in known:
            known[id(scope)] = method(self, scope)
        found: R = known[id(scope)]
        return found

    return wrapped


class _Tracer:
    """Traces the scopes of one query. A scope is a select, a set operation, or rows made of an expression."""

    def __init__(self, columns: Mapping[str, Iterable[str]], keys: Mapping[str, frozenset[str]]) -> None:
        self._columns = {name: tuple(found) for name, found in columns.items()}
        self._keys = keys
        self.known: dict[str, dict[int, Any]] = {}

    @_once
    def projections(self, scope: Scope) -> dict[str, Sources]:
        """Map each output column to what its value is made from and decided by, without what decides the rows."""
        query = scope.expression
        if isinstance(query, exp.SetOperation):
            left, *others = [list(self.projections(one).items()) for one in scope.set_operation_scopes]
            return {
                name: merged(sources, *(other[place][1] for other in others))
                for place, (name, sources) in enumerate(left)
            }
        if not isinstance(query, exp.Select):
            raise _Untraceable(f"it reads rows of {query.key}")
        found: dict[str, Sources] = {}
        for place, projection in enumerate(query.expressions):
            for name, sources in self._projected(scope, projection, place):
                found[name] = sources
        return found

    def _projected(self, scope: Scope, projection: exp.Expr, place: int) -> Iterator[tuple[str, Sources]]:
        star = projection.this if isinstance(projection, exp.Column) else projection
        if not isinstance(star, exp.Star):
            yield projection.alias_or_name or f"column {place + 1}", self._read(scope, projection, "identity")
            return
        if any(star.args.get(name) for name in ("except_", "except", "replace", "rename")):
            raise _Untraceable("it has a `*` with exceptions")
        names = [projection.table] if isinstance(projection, exp.Column) else self._in_order(scope)
        for name in names:
            columns = self._names(scope.sources[name])
            if columns is None:
                raise _Untraceable(f"it has `*` of {name}, whose columns are not known")
            for column in columns:
                yield column, self._source_column(scope, name, column)

    @_once
    def rows(self, scope: Scope) -> Sources:
        """Return what decides which rows a scope has, and which belong together."""
        query = scope.expression
        if isinstance(query, exp.SetOperation):
            parts = [self.rows(one) for one in scope.set_operation_scopes]
            if query.args.get("distinct"):
                parts += [composed("group", one) for one in self.projections(scope).values()]
            return merged(*parts)
        if not isinstance(query, exp.Select):
            return {}
        parts = []
        optional = self._optional(scope)
        for name in self._in_order(scope):
            source = scope.sources[name]
            if name not in optional and isinstance(source, Scope):
                parts.append(self._rows_of_source(scope, source))
        for join in query.args.get("joins") or []:
            if join.alias_or_name not in optional:
                parts.append(self._joined(scope, join))
        kinds: tuple[tuple[str, Kind], ...] = (
            ("where", "filter"),
            ("having", "filter"),
            ("qualify", "filter"),
        )
        for clause, kind in kinds:
            if (found := query.args.get(clause)) is not None:
                parts.append(self._read(scope, found.this, kind))
        if (group := query.args.get("group")) is not None:
            parts += [self._read(scope, self._meant(scope, one), "group") for one in _grouped(group)]
        if (distinct := query.args.get("distinct")) is not None:
            on = distinct.args.get("on")
            parts += (
                [self._read(scope, on, "group")]
                if on is not None
                else [composed("group", one) for one in self.projections(scope).values()]
            )
        order = query.args.get("order")
        if order is not None and (query.args.get("limit") or distinct is not None):
            parts += [self._read(scope, self._meant(scope, one.this), "order") for one in order.expressions]
        return merged(*parts)

    @_once
    def reads(self, scope: Scope) -> set[str]:
        """Return the relations whose rows a scope has, including those of nested queries."""
        optional = self._optional(scope) if isinstance(scope.expression, exp.Select) else {}
        inner: list[Scope] = [*scope.set_operation_scopes, *scope.subquery_scopes]
        found = set()
        for name in self._in_order(scope):
            source = scope.sources[name]
            if name in optional:
                continue
            if isinstance(source, exp.Table):
                found.add(source.name)
            elif isinstance(source, Scope):
                inner.append(source)
        return found.union(*(self.reads(one) for one in inner))

    def _rows_of_source(self, scope: Scope, source: Scope) -> Sources:
        if source.is_udtf:
            return self._read(scope, source.expression, "join")
        return self.rows(source)

    def _joined(self, scope: Scope, join: exp.Join) -> Sources:
        parts = []
        if (on := join.args.get("on")) is not None:
            parts.append(self._read(scope, on, "join"))
        for using in join.args.get("using") or []:
            for name in self._in_order(scope):
                if using.name in (self._names(scope.sources[name]) or ()):
                    parts.append(composed("join", self._source_column(scope, name, using.name)))
        return merged(*parts)

    @_once
    def _optional(self, scope: Scope) -> dict[str, exp.Join]:
        """Return the sources of which a left join adds at most one row, so that they decide no row: name → join."""
        found = {}
        for join in scope.expression.args.get("joins") or []:
            name = join.alias_or_name
            key = self._key(scope.sources.get(name))
            on = join.args.get("on")
            if join.side != "LEFT" or not key or on is None:
                continue
            equal = set()
            for one in on.flatten() if isinstance(on, exp.And) else [on]:
                sides = (one.this, one.expression) if isinstance(one, exp.EQ) else ()
                for side, other in (sides, sides[::-1]) if sides else ():
                    reads_itself = any(column.table == name for column in other.find_all(exp.Column))
                    if isinstance(side, exp.Column) and side.table == name and not reads_itself:
                        equal.add(side.name)
            if key <= equal:
                found[name] = join
        return found

    def _key(self, source: Any) -> frozenset[str]:
        """Return the columns that identify one row of a source; empty if they are not known."""
        if isinstance(source, exp.Table):
            return self._keys.get(source.name, frozenset())
        if not isinstance(source, Scope) or not isinstance(source.expression, exp.Select):
            return frozenset()
        query, group = source.expression, source.expression.args.get("group")
        if group is None:
            return frozenset()
        named = {one.unalias().sql(): one.alias_or_name for one in query.expressions}
        grouped = [named.get(self._meant(source, one).sql()) for one in _grouped(group)]
        return frozenset(name for name in grouped if name) if all(grouped) else frozenset()

    def _meant(self, scope: Scope, expression: exp.Expr) -> exp.Expr:
        """Return the expression behind a number or an alias in `group by` or `order by`."""
        projections: list[exp.Expr] = scope.expression.expressions
        if isinstance(expression, exp.Literal) and expression.is_int:
            place = int(expression.name) - 1
            return projections[place].unalias() if 0 <= place < len(projections) else expression
        if isinstance(expression, exp.Column) and not expression.table:
            aliased: dict[str, exp.Expr] = {
                one.alias: one.this for one in projections if isinstance(one, exp.Alias)
            }
            try:
                self._find(scope, expression)
            except _Untraceable:
                return aliased.get(expression.name, expression)
        return expression

    def _read(self, scope: Scope, node: exp.Expr, kind: Kind) -> Sources:
        """Return what an expression reads, where the result depends on the expression as `kind` says."""
        if isinstance(node, exp.Column):
            name, column = self._find(scope, node)
            return composed(kind, self._source_column(scope, name, column))
        if isinstance(node, exp.Query):
            inner = next((one for one in scope.subquery_scopes if one.expression is node.unnest()), None)
            if inner is None:
                raise _Untraceable("it has a nested query that sqlglot gives no scope")
            values = [composed(kind, one) for one in self.projections(inner).values()]
            return merged(*values, composed(kind, self.rows(inner)) if _decides(kind) else self.rows(inner))
        within = kind if _decides(kind) or isinstance(node, exp.Alias | exp.Paren) else _through(node, kind)
        return merged(*(self._read(scope, part, how) for part, how in _parts(node, within)))

    def _source_column(self, scope: Scope, name: str, column: str) -> Sources:
        """Return what a column of a scope's source is made from, with what decides a row of an optional source."""
        source = self._source(scope, name)
        if isinstance(source, exp.Table):
            found: Sources = {Column(source.name, column): frozenset({"identity"})}
        elif source.is_udtf:
            found = self._read(scope, source.expression, "transformation")
        else:
            found = self.projections(source).get(column, {})
        join = self._optional(scope).get(name) if name in scope.sources else None
        if join is None:
            return found
        rows = self.rows(source) if isinstance(source, Scope) else {}
        return merged(found, rows, composed("join", self._conditions(scope, join)))

    def _conditions(self, scope: Scope, join: exp.Join) -> Sources:
        """Return what the condition of an optional join reads, without tracing that join again."""
        parts = []
        for column in join.args["on"].find_all(exp.Column):
            name, read = self._find(scope, column)
            source = self._source(scope, name)
            if isinstance(source, exp.Table):
                parts.append({Column(source.name, read): frozenset[Kind]({"identity"})})
            elif not source.is_udtf:
                parts.append(self.projections(source).get(read, {}))
        return merged(*parts)

    def _find(self, scope: Scope, column: exp.Column) -> tuple[str, str]:
        """Return the source that a column belongs to, and its name there."""
        if column.table:
            return column.table, column.name
        known = {name: self._names(scope.sources[name]) for name in self._in_order(scope)}
        having = [name for name, columns in known.items() if columns is not None and column.name in columns]
        if not having:
            having = [name for name, columns in known.items() if columns is None]
        if not having and scope.parent is not None and scope.is_subquery:
            return self._find(scope.parent, column)
        if not having:
            raise _Untraceable(f"it reads {column.name}, which is a column of none of its relations")
        # Several sources have the column only after `using`, where it is equal in all of them.
        return having[0], column.name

    def _source(self, scope: Scope, name: str) -> Any:
        """Return the table or scope of this name, in this query or an enclosing one."""
        at: Scope | None = scope
        while at is not None:
            if name in at.sources:
                return at.sources[name]
            at = at.parent
        raise _Untraceable(f"it reads a column of {name}, which is none of its relations")

    def _names(self, source: Any) -> tuple[str, ...] | None:
        """Return the columns of a source, None if they are not known."""
        if isinstance(source, exp.Table):
            return self._columns.get(source.name)
        if source.is_udtf:
            alias = source.expression.args.get("alias")
            return tuple(one.name for one in alias.args.get("columns") or []) or None if alias else None
        return tuple(self.projections(source))

    @staticmethod
    def _in_order(scope: Scope) -> list[str]:
        """Return the names of a select's own sources, in the order in which it reads them."""
        return list(scope.selected_sources)


def _grouped(group: exp.Group) -> list[exp.Expr]:
    """Return the expressions that rows are grouped by, including those of grouping sets."""
    found = list(group.expressions)
    for name in ("grouping_sets", "cube", "rollup"):
        for one in group.args.get(name) or []:
            found += one.find_all(exp.Column) if isinstance(one, exp.Expr) else []
    return found


def _decides(kind: Kind) -> bool:
    return kind not in ("identity", "transformation", "aggregation")


def _through(node: exp.Expr, kind: Kind) -> Kind:
    """Return how a value depends on the parts of an expression that it depends on directly."""
    return "aggregation" if isinstance(node, exp.AggFunc) or kind == "aggregation" else "transformation"


def _parts(node: exp.Expr, kind: Kind) -> Iterator[tuple[exp.Expr, Kind]]:
    """Return the parts of an expression, each with how the value depends on it."""
    deciding: dict[str, Kind] = {}
    if isinstance(node, exp.Case | exp.If):
        deciding = {"this": "condition"}
    elif isinstance(node, exp.Filter):
        deciding = {"expression": "condition"}
    elif isinstance(node, exp.Window):
        deciding = {"partition_by": "group", "order": "order"}
    elif isinstance(node, exp.Order) and not isinstance(node.parent, exp.WithinGroup):
        deciding = {"expressions": "order"}
    for name, value in node.args.items():
        how = kind if _decides(kind) else deciding.get(name, kind)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, exp.Expr):
                yield one, how
