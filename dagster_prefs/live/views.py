"""The kept views of the embedded engine as deployed: their order, their keys, and the keys that a change touches.

To compute a view for some keys, its inputs are restricted, not its output: in the compiled statement each relation is
replaced by its rows of these keys. PostgreSQL would not push a filter on the whole statement into a CTE that is read
twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from graphlib import TopologicalSorter
from typing import Any, Literal, NamedTuple

import psycopg
import sqlglot
from psycopg import sql
from sqlglot import exp
from sqlglot.errors import SqlglotError

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.dynamodb.publisher import KeySql
from dagster_prefs.engine.catalog import read_catalog
from dagster_prefs.engine.connection import EngineConfiguration

# The key of a message in raw and parsed relations.
PLACE = ("source", "source_partition", "source_offset")
# The present time as macros/engine/dialect.sql writes it (macro `clock`).
CLOCK = "coalesce(nullif(current_setting('prefs.clock', true), '')::timestamptz, now())"
_CLOCK = "prefs_clock"
_OTHER_CLOCKS = re.compile(
    r"\b(now\s*\(|current_date|current_timestamp|clock_timestamp|localtimestamp)", re.IGNORECASE
)
# Words that may follow a relation without being its alias.
_NO_ALIAS = frozenset(
    {
        "where", "join", "left", "right", "inner", "full", "cross", "natural", "group", "order", "having", "limit",
        "offset", "union", "intersect", "except", "on", "using", "window", "fetch", "for", "tablesample", "lateral",
    }
)  # fmt: skip

How = Literal["keys", "merging", "rebuilt"]


def raw_sql(text: str) -> sql.SQL:
    """Return SQL from the engine's own catalog or from a deployed definition."""
    return sql.SQL(text)


@dataclass(frozen=True)
class Flip:
    """A comparison with the clock in a view: when it changes for rows of `relation`, their keys become due.

    `rows` is SQL over the relation's columns, `border` is SQL over the time as `{moment}`; the comparison changes for a
    row when the border passes it.
    """

    relation: str
    rows: str
    border: str


@dataclass(frozen=True)
class View:
    """One kept view.

    `key` are the columns by which it is computed, `unique` those of its unique index. `reads` maps each relation in its
    statement to the expressions of the key over that relation, or to None if it is read whole. `feeds` does the same
    for each relation whose changes it follows, with the relations below plain views in place of these. `merged` maps
    the columns of a merged view to `key`, `sum` or `max`.

    The build of a changed view (macros/engine/builds.sql) has `builds`, the view's name; its own name is that of its
    table. Its touched keys are stored until it is `filled`; from then on it is kept by keys, if it can be.
    """

    name: str
    how: How
    definition: str
    columns: Mapping[str, str]
    unique: tuple[str, ...]
    key: tuple[str, ...] = ()
    reads: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    feeds: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    merged: Mapping[str, str] = field(default_factory=dict)
    flips: tuple[Flip, ...] = ()
    every_seconds: int = 0
    timed: bool = False
    builds: str | None = None
    filled: bool = True


@dataclass(frozen=True)
class Reader:
    """A view or domain that depends on a view's changed rows, with the expressions of its key over them."""

    name: str
    expressions: tuple[str, ...]
    domain: bool = False


class LiveViews:
    """All kept `views`, in the order in which changes pass through them.

    `ordered` contains the builds of changed views too, at their places in this order.
    """

    def __init__(self, engine: EngineConfiguration, registry: Registry, views: Sequence[View]) -> None:
        self.engine = engine
        self.registry = registry
        self.ordered = tuple(views)
        self.views = {view.name: view for view in views if view.builds is None}
        self.parsed = {
            topic.parsed: topic for topic in registry.topics.values() if topic.parsed in self.views
        }
        self.readers = {view.name: tuple(self._readers(view.name)) for view in views}
        self.merging = frozenset(
            relation for view in self.views.values() if view.how == "merging" for relation in view.feeds
        )
        self._statements: dict[str, bytes] = {}

    def rebuilt_by(self, relation: str) -> list[str]:
        """Return the views and builds that become pending when a relation changes, because no key tells it to them."""
        return [
            view.name
            for view in self.ordered
            if relation in view.feeds
            and (
                view.how == "rebuilt"
                or (view.how == "keys" and view.feeds[relation] is None)
                # What is merged into a build may be in the snapshot already from which it is filled.
                or (view.how == "merging" and view.builds is not None)
            )
        ]

    def with_builds(self, relation: str) -> list[View]:
        """Return a kept view and its build, as far as they exist."""
        return [view for view in self.ordered if relation in (view.name, view.builds)]

    def depends(self, name: str, relations: Collection[str]) -> bool:
        """Return whether a view reads one of the relations, directly or through other views."""
        return any(
            below in relations or (below in self.views and self.depends(below, relations))
            for below in self.views[name].feeds
        )

    def table(self, name: str) -> sql.Identifier:
        """Return the identifier of a relation in the engine's schema."""
        return sql.Identifier(self.engine.schema, name)

    def _readers(self, relation: str) -> Iterator[Reader]:
        for view in self.ordered:
            expressions = view.feeds.get(relation)
            if view.how == "keys" and expressions:
                yield Reader(view.name, expressions)
        for domain in self.registry.contract.domains.values():
            if domain.relation == relation:
                yield Reader(domain.key, (self._entity_key(domain),), domain=True)

    def _entity_key(self, domain: Domain) -> str:
        key = KeySql(self.registry.contract.table_of(domain), alias="t")
        return key.text.as_string(None)

    # --- statements ---

    def step(self, view: View) -> bytes:
        """Return the statement that updates a view's rows of some keys to the result of its query.

        Parameters k0, k1, …: one list of texts per key column. It returns (position of the reader in `readers`, key)
        for every row that was removed, added or changed.
        """
        return self._rendered(view, self._step)

    def _rendered(self, view: View, make: Callable[[View], sql.Composed]) -> bytes:
        """Return a view's statement as bytes: psycopg would put the hundreds of parts together at each step."""
        if view.name not in self._statements:
            self._statements[view.name] = make(view).as_bytes(None)
        return self._statements[view.name]

    def _step(self, view: View) -> sql.Composed:
        here = self.table(view.name)
        unique = [sql.Identifier(name) for name in view.unique]
        same = [sql.SQL("t.{0} = r.{0}").format(name) for name in unique]
        again = [sql.SQL("a.{0} = r.{0}").format(name) for name in unique]
        parts = [
            *self._inputs(view),
            sql.SQL("prefs_after as materialized (select t.* from ({}) as t where {})").format(
                raw_sql(self._over_touched(view)), self._touched(view, view.key)
            ),
            sql.SQL("prefs_before as materialized (select t.* from {} as t where {})").format(
                here, self._touched(view, view.key)
            ),
            sql.SQL(
                "prefs_removed as materialized (select * from prefs_before except all select * from prefs_after)"
            ),
            sql.SQL(
                "prefs_added as materialized (select * from prefs_after except all select * from prefs_before)"
            ),
            sql.SQL(
                "prefs_gone as (delete from {} as t using prefs_removed as r where {}"
                " and not exists (select from prefs_added as a where {}))"
            ).format(here, sql.SQL(" and ").join(same), sql.SQL(" and ").join(again)),
            sql.SQL("prefs_put as (insert into {} select * from prefs_added on conflict ({}) do {})").format(
                here,
                sql.SQL(", ").join(unique),
                sql.SQL("update set {}").format(_update(view))
                if set(view.columns) - set(view.unique)
                else sql.SQL("nothing"),
            ),
        ]
        if view.name in self.merging:
            parts.append(
                sql.SQL(
                    "prefs_logged as (insert into {} select -1, r.* from prefs_removed as r"
                    " union all select 1, a.* from prefs_added as a)"
                ).format(delta_table(view.name))
            )
        told: list[sql.Composable] = [
            sql.SQL("select {}, array[{}] as key from prefs_changed as t").format(
                sql.Literal(number),
                sql.SQL(", ").join(raw_sql(f"({_qualified(one)})::text") for one in reader.expressions),
            )
            for number, reader in enumerate(self.readers[view.name])
        ]
        told.append(sql.SQL("select -1, array[count(*)::text] from prefs_changed"))
        parts.append(
            sql.SQL("prefs_changed as (select * from prefs_removed union all select * from prefs_added)")
        )
        return sql.SQL("with {} {}").format(sql.SQL(", ").join(parts), sql.SQL(" union ").join(told))

    def _inputs(self, view: View) -> Iterator[sql.Composed]:
        for relation, expressions in view.reads.items():
            if expressions is not None:
                # In rejected messages any field may be too long for an index; typed events contain none of them.
                valid = relation in self.parsed and self.parsed[relation].relation in (
                    view.name,
                    view.builds,
                )
                yield sql.SQL("{} as (select t.* from {} as t where {}{})").format(
                    sql.Identifier(_touched_name(relation)),
                    self.table(relation),
                    self._touched(view, expressions),
                    sql.SQL(" and t.reason is null" if valid else ""),
                )

    def _touched(self, view: View, expressions: Sequence[str]) -> sql.Composable:
        """Return the condition that a row `t` has one of the touched keys."""
        given = [
            raw_sql(f"%(k{number})s::text[]::{view.columns[name]}[]") for number, name in enumerate(view.key)
        ]
        if len(given) == 1:
            return sql.SQL("{} = any({})").format(raw_sql(_qualified(expressions[0])), given[0])
        return sql.SQL("({}) in (select * from unnest({}))").format(
            sql.SQL(", ").join(raw_sql(_qualified(one)) for one in expressions), sql.SQL(", ").join(given)
        )

    def _over_touched(self, view: View) -> str:
        text = view.definition
        for relation, expressions in view.reads.items():
            if expressions is not None:
                text = self.reading(text, relation, _touched_name(relation))
        # A percent sign is escaped, because psycopg would read it as a parameter.
        return text.replace("%", "%%")

    def reading(self, definition: str, relation: str, instead: str) -> str:
        """Return a definition in which `relation` is replaced by another relation, or by a CTE around it."""
        name = rf'"{re.escape(self.engine.schema)}"\."{re.escape(relation)}"'
        named = re.compile(rf'{name}(?P<behind>\s+(?:as\s+)?"?\w+"?)?')

        def other(found: re.Match[str]) -> str:
            behind = found["behind"] or ""
            words = behind.split()
            if words and (words[0].lower() == "as" or words[0].lower() not in _NO_ALIAS):
                return f'"{instead}"{behind}'
            return f'"{instead}" as "{relation}"{behind}'

        return named.sub(other, definition)

    def merge(self, view: View) -> bytes:
        """Return the statement that adds the logged changes of a merged view's inputs, and subtracts removed rows.

        It returns the keys whose maximum was removed, which `reread` computes again.
        """
        return self._rendered(view, self._merge)

    def _merge(self, view: View) -> sql.Composed:
        kinds = view.merged
        keys = [sql.Identifier(name) for name, what in kinds.items() if what == "key"]
        # The row count of a key tells whether the key still exists.
        rows = next(name for name, what in kinds.items() if what == "sum" and view.columns[name] == "bigint")
        new = {
            "key": sql.SQL("{0}"),
            "sum": sql.SQL("coalesce(v.{0}, 0) + coalesce(p.{0}, 0) - coalesce(m.{0}, 0) as {0}"),
            "max": sql.SQL("greatest(v.{0}, p.{0}) as {0}"),
        }
        lost = [
            sql.SQL("(m.{0} >= v.{0} and not coalesce(p.{0} >= v.{0}, false))").format(sql.Identifier(name))
            for name, what in kinds.items()
            if what == "max"
        ]
        return sql.SQL(
            "with {inputs}, p as materialized ({plus}), m as materialized ({minus}),"
            " merged as materialized (select {values}, coalesce({lost}, false) as prefs_lost"
            "   from p full join m using ({using}) left join {here} as v using ({using})),"
            " gone as (delete from {here} as t using merged as r where {same} and r.{rows} <= 0),"
            " put as (insert into {here} select {columns} from merged where {rows} > 0"
            "   on conflict ({using}) do update set {update})"
            " select array[{texts}] from merged where prefs_lost and {rows} > 0"
        ).format(
            inputs=sql.SQL(", ").join(self._logged(view)),
            plus=raw_sql(self._over_log(view, "added")),
            minus=raw_sql(self._over_log(view, "removed")),
            values=sql.SQL(", ").join(new[kinds[name]].format(sql.Identifier(name)) for name in view.columns),
            lost=sql.SQL(" or ").join([*lost, sql.SQL("false")]),
            using=sql.SQL(", ").join(keys),
            here=self.table(view.name),
            same=sql.SQL(" and ").join(sql.SQL("t.{0} = r.{0}").format(name) for name in keys),
            rows=sql.Identifier(rows),
            columns=sql.SQL(", ").join(sql.Identifier(name) for name in view.columns),
            update=_update(view),
            texts=sql.SQL(", ").join(sql.SQL("{}::text").format(name) for name in keys),
        )

    def _logged(self, view: View) -> Iterator[sql.Composed]:
        for relation in view.feeds:
            for what, sign in (("added", 1), ("removed", -1)):
                yield sql.SQL("{} as (select * from {} where prefs_sign = {})").format(
                    sql.Identifier(f"{relation}__{what}"), delta_table(relation), sql.Literal(sign)
                )

    def _over_log(self, view: View, what: str) -> str:
        text = view.definition
        for relation in view.feeds:
            text = self.reading(text, relation, f"{relation}__{what}")
        return text

    def reread(self, view: View) -> sql.Composed:
        """Return the statement that computes some keys of a merged view from all rows; parameters as for `step`."""
        touched = self._touched(view, view.unique)
        return sql.SQL(
            "with prefs_after as materialized (select t.* from ({query}) as t where {touched}),"
            " gone as (delete from {here} as t where {touched}"
            "   and not exists (select from prefs_after as r where {same}))"
            " insert into {here} select * from prefs_after on conflict ({unique}) do update set {update}"
        ).format(
            query=raw_sql(view.definition.replace("%", "%%")),
            touched=touched,
            here=self.table(view.name),
            same=sql.SQL(" and ").join(
                sql.SQL("t.{0} = r.{0}").format(sql.Identifier(name)) for name in view.unique
            ),
            unique=sql.SQL(", ").join(sql.Identifier(name) for name in view.unique),
            update=_update(view),
        )

    def due(self, view: View, flip: Flip) -> sql.Composed:
        """Return the statement that stores the keys for which a comparison with the clock changed.

        Parameters: `first` and `last`, the times between which the view's rows were computed, and `now`. A clock may
        have stepped back.
        """
        expressions = view.feeds[flip.relation] or ()
        borders = sql.SQL(", ").join(
            raw_sql(flip.border.replace("{moment}", f"%({moment})s::timestamptz"))
            for moment in ("first", "last", "now")
        )
        return sql.SQL(
            "insert into {due} select {view}, array[{key}] from {relation} as t"
            " where {rows} between least({borders}) and greatest({borders}) group by {key} on conflict do nothing"
        ).format(
            due=self.table("live_due"),
            view=sql.Literal(view.name),
            key=sql.SQL(", ").join(raw_sql(f"({_qualified(one)})::text") for one in expressions),
            relation=self.table(flip.relation),
            rows=raw_sql(flip.rows),
            borders=borders,
        )


def delta_table(relation: str) -> sql.Identifier:
    """Return the session's table of the rows of a relation that this step adds (sign 1) and removes (-1)."""
    return sql.Identifier("pg_temp", f"live_{relation}")


def _update(view: View) -> sql.Composed:
    """Return the assignments of an upsert for the columns outside the unique key."""
    return sql.SQL(", ").join(
        sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name))
        for name in view.columns
        if name not in view.unique
    )


def _touched_name(relation: str) -> str:
    return f"{relation}__touched"


def _qualified(expression: str) -> str:
    return f't."{expression}"' if re.fullmatch(r"\w+", expression) else expression


# --- reading what is deployed ---


def read_views(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, registry: Registry
) -> LiveViews:
    """Read the kept views from the engine's catalog and from `deployments`.

    A view that the registry does not contain, or whose keys cannot be traced, is rebuilt after each change.
    """
    catalog = read_catalog(connection, engine)
    kept = {name for name, one in catalog.objects.items() if one.kind == "materialized view"}
    plain = {name for name, one in catalog.objects.items() if one.kind == "view"}
    definitions = dict(
        connection.execute(
            sql.SQL(
                "select relation, definition from {} where state = 'deployed' and relation = any(%s)"
            ).format(sql.Identifier(engine.schema, "deployments")),
            [sorted(kept)],
        ).fetchall()
    )
    builds = read_builds(connection, engine)
    columns: dict[str, dict[str, str]] = {}
    for relation, name, kind in connection.execute(
        "select c.relname, a.attname, format_type(a.atttypid, a.atttypmod) from pg_attribute as a"
        " join pg_class as c on c.oid = a.attrelid where c.relnamespace = %s::regnamespace and a.attnum > 0"
        " and not a.attisdropped order by c.relname, a.attnum",
        [engine.schema],
    ):
        columns.setdefault(relation, {})[name] = kind
    unique: dict[str, tuple[str, ...]] = {}
    for relation, names in connection.execute(
        "select c.relname, array_agg(a.attname::text order by k.place) from pg_index as i"
        " join pg_class as c on c.oid = i.indrelid"
        " cross join unnest(i.indkey::smallint[]) with ordinality as k (number, place)"
        " join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.number"
        " where c.relnamespace = %s::regnamespace and i.indisunique and i.indexprs is null and i.indpred is null"
        " group by c.relname, i.indexrelid order by i.indexrelid desc",
        [engine.schema],
    ):
        unique[relation] = tuple(names)

    def below(relation: str) -> Iterator[str]:
        """Return the relations whose changes appear in a relation: itself, or those below a plain view."""
        if relation not in plain:
            yield relation
            return
        for one in sorted(catalog.reads.get(relation, ())):
            yield from below(one)

    def inputs(name: str) -> dict[str, tuple[str, ...]]:
        return {one: tuple(below(one)) for one in sorted(catalog.reads.get(name, ()))}

    described = _Described(registry, columns, unique)
    order = TopologicalSorter({name: set(catalog.reads.get(name, ())) for name in (*kept, *plain)})
    views = []
    for name in order.static_order():
        if name in kept and name in definitions:
            views.append(described.view(name, definitions[name], inputs(name)))
        elif name in kept and name in builds:
            # What is declared of the view applies to its build.
            build = builds[name]
            as_view = _Described(
                registry,
                {**columns, build.relation: columns[name]},
                {**unique, build.relation: unique.get(name, ())},
            ).view(build.relation, build.definition, inputs(name))
            views.append(replace(as_view, name=name, builds=build.relation, filled=build.filled))
    return LiveViews(engine, registry, views)


class Build(NamedTuple):
    """The build of a changed view, `relation`."""

    relation: str
    definition: str
    filled: bool


def read_builds(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> dict[str, Build]:
    """Return the builds of changed views by the names of their tables. Raises psycopg.Error."""
    table = sql.Identifier(engine.schema, "live_builds")
    ((there,),) = connection.execute(
        "select to_regclass(%s) is not null", [table.as_string(connection)]
    ).fetchall()
    if not there:
        # What is deployed is from a version without builds.
        return {}
    rows = connection.execute(sql.SQL("select built, relation, definition, filled from {}").format(table))
    return {built: Build(*values) for built, *values in rows}


@dataclass(frozen=True)
class _Described:
    """Derives how each view is kept from the registry and the catalog."""

    registry: Registry
    columns: Mapping[str, Mapping[str, str]]
    unique: Mapping[str, tuple[str, ...]]

    def view(self, name: str, definition: str, inputs: Mapping[str, tuple[str, ...]]) -> View:
        columns, unique = self.columns[name], self.unique.get(name, ())
        declared = self.registry.kept.get(name)
        topics = {topic.relation: topic for topic in self.registry.topics.values()}
        parsed = {topic.parsed: topic for topic in self.registry.topics.values()}
        feeds: dict[str, tuple[str, ...] | None] = {base: None for bases in inputs.values() for base in bases}
        rebuilt = View(
            name,
            "rebuilt",
            definition,
            columns,
            unique,
            feeds=feeds,
            every_seconds=(declared.every_seconds or 0) if declared else 0,
            timed=_clocked(definition),
        )
        if not unique:
            return rebuilt
        if name in parsed:
            return self._by_keys(rebuilt, PLACE, inputs, {parsed[name].raw: PLACE})
        if name in topics:
            identity = (topics[name].identity,)
            return self._by_keys(rebuilt, identity, inputs, {topics[name].parsed: identity})
        if name == "rejected_events":
            return self._by_keys(
                rebuilt, ("source", "partition", "offset"), inputs, dict.fromkeys(inputs, PLACE)
            )
        if name in ("ingest_progress", "tile_fingerprints") or (declared and declared.by == "merging"):
            merged = _merged(definition, columns, unique)
            if merged:
                return View(
                    name, "merging", definition, columns, unique, key=unique, feeds=feeds, merged=merged
                )
            return rebuilt
        if declared is None or declared.by != "key":
            return rebuilt
        given = {one: declared.key for one in inputs if one not in declared.whole}
        if (day := self._day_of(name, definition, given)) is not None:
            (source, expression), tile = day, self.registry.tiles[name]
            return self._by_keys(
                rebuilt, (*declared.key, tile.day), inputs, {source: (*declared.key, expression)}
            )
        return self._by_keys(rebuilt, declared.key, inputs, given)

    def _by_keys(
        self,
        view: View,
        key: tuple[str, ...],
        inputs: Mapping[str, tuple[str, ...]],
        given: Mapping[str, tuple[str, ...]],
    ) -> View:
        feeds: dict[str, tuple[str, ...] | None] = {}
        for relation, bases in inputs.items():
            expressions = given.get(relation)
            for base in bases:
                plain = base == relation or (
                    expressions is not None and all(one in self.columns.get(base, {}) for one in expressions)
                )
                feeds[base] = expressions if plain else None
        flips = _flips(view.definition, feeds) if view.timed else ()
        # While changed views are built, the old ones are not as they are declared now.
        fits = set(key) <= set(view.columns) and all(
            not one.isidentifier() or one in self.columns.get(relation, {})
            for relation, expressions in given.items()
            if relation in inputs
            for one in expressions
        )
        if flips is None or not fits:
            return view
        return View(
            view.name,
            "keys",
            view.definition,
            view.columns,
            view.unique,
            key=key,
            reads={relation: given.get(relation) for relation in inputs},
            feeds=feeds,
            flips=flips,
            timed=view.timed,
        )

    def _day_of(
        self, name: str, definition: str, given: Mapping[str, tuple[str, ...]]
    ) -> tuple[str, str] | None:
        """Return the relation below a tile and the expression of its day there; None if it cannot be derived."""
        tile = self.registry.tiles.get(name)
        if tile is None or len(given) != 1:
            return None
        (source,) = given
        try:
            query = _parse(definition)
        except SqlglotError:
            return None
        for select in query.find_all(exp.Select):
            tables = [one for one in select.find_all(exp.Table) if one.parent_select is select]
            if len(tables) == 1 and tables[0].name == source and tables[0].db:
                for projection in select.expressions:
                    if projection.alias_or_name == tile.day:
                        found = projection.unalias()
                        names = {column.name for column in found.find_all(exp.Column)}
                        if names <= set(self.columns.get(source, {})):
                            return source, f"({found.sql('postgres')})"
        return None


# The views are read again whenever one of them changes.
@lru_cache(maxsize=512)
def _parse(definition: str) -> exp.Expr:
    """Return a definition's tree, which must not be changed. Raises SqlglotError."""
    return sqlglot.parse_one(definition, dialect="postgres")


def _clocked(definition: str) -> bool:
    return CLOCK in definition or _OTHER_CLOCKS.search(definition) is not None


def _flips(definition: str, feeds: Mapping[str, tuple[str, ...] | None]) -> tuple[Flip, ...] | None:
    """Return the comparisons with the clock, each over one relation; None if one has another form."""
    text = definition.replace(CLOCK, _CLOCK)
    if _OTHER_CLOCKS.search(text):
        return None
    try:
        query = _parse(text)
    except SqlglotError:
        return None
    found = []
    for clock in [column for column in query.find_all(exp.Column) if column.name == _CLOCK]:
        comparison = clock.find_ancestor(exp.Predicate)
        select = clock.find_ancestor(exp.Select)
        if comparison is None or select is None or comparison.find_ancestor(exp.Where) is None:
            return None
        tables = [one for one in select.find_all(exp.Table) if one.parent_select is select]
        if len(tables) != 1 or not tables[0].db or not feeds.get(tables[0].name):
            return None
        flip = _flip(comparison, tables[0].name)
        if flip is None:
            return None
        found.append(flip)
    return tuple(dict.fromkeys(found))


def _flip(comparison: exp.Predicate, relation: str) -> Flip | None:
    """Return a comparison of rows with the clock, with durations moved to the clock's side; None for other forms."""
    if not isinstance(comparison, (exp.GT, exp.GTE, exp.LT, exp.LTE)):
        return None
    sides = [comparison.this, comparison.expression]
    clocks = [{column.name for column in side.find_all(exp.Column)} for side in sides]
    rows, border = sides if clocks[1] == {_CLOCK} else reversed(sides)
    if _CLOCK in {column.name for column in rows.find_all(exp.Column)}:
        return None
    border = border.copy()
    # The rows' side must be indexable: adding days to a time is not immutable.
    while isinstance(rows, (exp.Add, exp.Sub, exp.Paren)):
        if isinstance(rows, exp.Paren):
            rows = rows.this
        elif isinstance(rows.expression, exp.Interval):
            away = exp.Sub if isinstance(rows, exp.Add) else exp.Add
            border = away(this=exp.paren(border), expression=rows.expression.copy())
            rows = rows.this
        else:
            break
    text = border.sql("postgres").replace("%", "%%")
    return Flip(
        relation,
        f"({rows.sql('postgres')})".replace("%", "%%"),
        "(" + re.sub(rf'"?\b{_CLOCK}\b"?', "{moment}", text) + ")",
    )


def _merged(definition: str, columns: Mapping[str, str], unique: Sequence[str]) -> dict[str, str] | None:
    """Return the role of each column of a merged view; None if it is not made of counts, sums and maxima per key."""
    try:
        query = _parse(definition)
    except SqlglotError:
        return None
    for select in query.find_all(exp.Select):
        if select.args.get("group") and [one.alias_or_name for one in select.expressions] == list(columns):
            found = {}
            for one in select.expressions:
                inner = one.unalias()
                what = {exp.Count: "sum", exp.Sum: "sum", exp.Max: "max"}.get(type(inner))
                if one.alias_or_name in unique:
                    what = "key"
                if what is None:
                    return None
                found[one.alias_or_name] = what
            if {name for name, what in found.items() if what == "key"} == set(unique):
                return found
    return None


def topics_of_key(registry: Registry, column: str) -> list[TopicDeclaration]:
    """Return the topics of typed events whose entity has this first key column."""
    return [
        topic
        for topic in registry.topics.values()
        if topic.entity and registry.entities[topic.entity].key.name == column
    ]
