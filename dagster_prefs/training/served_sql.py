"""Derives served values of any instant from the views themselves: the SQL behind `--as served` and `--as happened`.

A view is evaluated with other inputs. In every relation that it reads, a label (a *point*) takes the place of the
entity: its rows are those that the label's read would have found, under the label's number instead of the entity's key.
Typed events are those that had arrived by the label's time. A tile is computed from them by its own query, and a view
of other views by theirs. So nothing here knows an attribute, and a view whose rows depend on more than one key, or on
the present time in another place than a condition, is refused.

The local SQL reads `points` (`point`, the entity's key columns, `prefs_clock`, and for each domain `<domain>_day` and
`<domain>_clock`, which the expiry spread moves), and each topic's typed events by the relation's name, with
`prefs_known`, the instant from which an event counts. Instants are timestamps without a zone, in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Literal

import sqlglot
from pyiceberg.types import DecimalType, IcebergType, StringType, TimestamptzType
from sqlglot import exp
from sqlglot.optimizer.scope import traverse_scope

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain
from dagster_prefs.declarations.registry import Entity, Key, Registry, TopicDeclaration
from dagster_prefs.engine.spreads import Spreads
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.tables import TileTable, tile_tables
from dagster_prefs.training.windows import (
    Dialect,
    Feature,
    ViewNotPortable,
    check_unique_names,
    check_whole_keys,
    collected,
    cte,
    drop_columns,
    entity_of,
    exact_quotient,
    feature_of,
    final_select,
    parse_view,
    point_of,
    tile_reads,
    utc_day,
)

# Whether an event counts from its arrival or from its own time.
ServedMeaning = Literal["served", "happened"]


@dataclass(frozen=True)
class ServedOptions:
    """How values as served are printed: their meaning, and the expiry spreads that were in force, by domain."""

    meaning: ServedMeaning = "served"
    spreads: Spreads = field(default_factory=dict)


# Columns that the SQL adds to the relations of a view.
CLOCK, DAY_CLOCK, KNOWN, TILE_DAY = "prefs_clock", "prefs_day_clock", "prefs_known", "prefs_day"
# The suffix of a tile's rows that were computed for single points.
PARTS = "_parts"
# The suffix of the pairs of point and day that need them.
PAIRS = "_pairs"
# Before the name of a domain, so that it differs from those of relations.
_VIEW = "served_"

# Expressions that mean the same in RisingWave, PostgreSQL, DuckDB, Trino and Spark. Others are refused: for example,
# lower() differs outside ASCII, and greatest() in its NULLs.
_PORTABLE: tuple[type[exp.Expr], ...] = (
    exp.Abs, exp.Add, exp.Alias, exp.And, exp.ArrayAgg, exp.AtTimeZone, exp.Between, exp.Boolean, exp.CTE, exp.Case,
    exp.Cast, exp.Coalesce, exp.Column, exp.Count, exp.CurrentTimestamp, exp.DPipe, exp.DataType, exp.DataTypeParam,
    exp.DateTrunc, exp.DenseRank, exp.Distinct, exp.Div, exp.EQ, exp.Except, exp.Extract, exp.Filter, exp.From, exp.GT,
    exp.GTE, exp.Group, exp.Having, exp.Identifier, exp.If, exp.In, exp.Intersect, exp.Interval, exp.Is, exp.Join,
    exp.LT, exp.LTE, exp.Like, exp.Literal, exp.Max, exp.Min, exp.Mod, exp.Mul, exp.NEQ, exp.Neg, exp.Not, exp.Null,
    exp.Nullif, exp.Or, exp.Order, exp.Ordered, exp.Paren, exp.Rank, exp.Round, exp.RowNumber, exp.Select, exp.Star,
    exp.Sub, exp.Subquery, exp.Sum, exp.Table, exp.TableAlias, exp.TimestampTrunc, exp.Union, exp.Var, exp.Where,
    exp.Window, exp.WindowSpec, exp.With,
)  # fmt: skip
_UNITS = {"DAY", "DAYS", "HOUR", "HOURS", "MINUTE", "MINUTES", "SECOND", "SECONDS"}
_NUMBERS = "decimal(28, 6)"
_CASTS = {
    exp.DType.BIGINT, exp.DType.INT, exp.DType.SMALLINT, exp.DType.TEXT, exp.DType.VARCHAR, exp.DType.DATE,
    exp.DType.TIMESTAMP, exp.DType.TIMESTAMPTZ, exp.DType.BOOLEAN,
}  # fmt: skip


@dataclass(frozen=True)
class TileQuery:
    """A tile whose query is one aggregation of one topic's events by key and day, so that its stored rows can be used.

    `select` is that aggregation, `day` the expression of its day over the events, `where` its condition on them.
    `totals` maps the columns that add up over rows to their expressions; `uncounted` counts the events that none of
    its counts includes, None if there is none: equal totals of a day then mean equal events.
    """

    spec: TileTable
    topic: TopicDeclaration
    select: exp.Select
    day: exp.Expr
    totals: Mapping[str, exp.Expr]
    uncounted: exp.Expr | None

    @cached_property
    def day_sql(self) -> str:
        """DuckDB's SQL of the day of an event."""
        holder = exp.select(self.day.copy())
        _adapt(holder, self.spec.tile, "duckdb")
        text: str = holder.expressions[0].sql(dialect="duckdb")
        return text

    @cached_property
    def totals_sql(self) -> str:
        """DuckDB's query of the totals by day over the events: `prefs_day`, the totals, and `uncounted`."""
        uncounted = self.uncounted.copy() if self.uncounted is not None else exp.Literal.number(0)
        query = exp.select(
            exp.alias_(self.day.copy(), TILE_DAY),
            *(exp.alias_(one.copy(), name) for name, one in self.totals.items()),
            exp.alias_(uncounted, "uncounted"),
        ).from_(self.select.args["from_"].this.copy())
        if self.select.args.get("where"):
            query.set("where", self.select.args["where"].copy())
        query = query.group_by(exp.Literal.number(1))
        _adapt(query, self.spec.tile, "duckdb")
        return query.sql(dialect="duckdb")

    @cached_property
    def parts_sql(self) -> str:
        """DuckDB's query of the rows for the pairs of point and day in `<table>_pairs`, from the events.

        The pairs have `point`, the key columns, `prefs_day` and `prefs_clock`. The first key column of the result is
        the point.
        """
        keys = self.spec.entity.key_names
        select = self.select.copy()
        table = select.args["from_"].this
        events = exp.select("*", exp.alias_(self.day.copy(), TILE_DAY)).from_(
            exp.to_table(self.topic.relation)
        )
        used = {column.name for column in select.find_all(exp.Column)}
        fields = [f"e.{one.name}" for one in self.topic.fields if one.name in used and one.name not in keys]
        conditions = [f"e.{key} = p.{key}" for key in keys]
        joined = (
            exp.select(f"p.point as {keys[0]}", *(f"p.{name}" for name in keys[1:]), *fields)
            .from_(exp.to_table(f"{self.spec.name}{PAIRS}").as_("p"))
            .join(
                events.subquery("e"),
                on=exp.and_(*conditions, f"e.{TILE_DAY} = p.{TILE_DAY}", f"e.{KNOWN} <= p.{CLOCK}"),
            )
        )
        table.replace(joined.subquery(table.alias_or_name))
        _adapt(select, self.spec.tile, "duckdb")
        typed = [
            exp.alias_(
                exp.cast(exp.column(one.name), "bigint" if one.name == keys[0] else _stored(one.type)),
                one.name,
            )
            for one in self.spec.columns
        ]
        return exp.select(*typed).from_(select.subquery("computed")).sql(dialect="duckdb")


@dataclass
class _Used:
    """What a domain's view reads.

    Fields by topic, the longest window and the columns of each tile, the topics that are read without a window and the
    longest window of those that are read in one, and the most digits after the point of a decimal.
    """

    fields: dict[str, set[str]] = field(default_factory=dict)
    tiles: dict[str, int] = field(default_factory=dict)
    tile_columns: dict[str, set[str]] = field(default_factory=dict)
    unbounded: set[str] = field(default_factory=set)
    events: dict[str, int] = field(default_factory=dict)
    scale: int = 6


class ServedFeatures:
    """The served values of one entity, and the SQL that computes them from typed events.

    `domains` (names, in the contract's order) limits them to these. `values` are the attributes except `last_event_at`.
    `left_out` maps `domain.attribute` to the reason why it cannot be computed for another time. Raises ViewNotPortable
    for a domain in `domains` that cannot be computed, and for ambiguous names; OfflineError for an unknown domain.
    """

    def __init__(self, registry: Registry, entity: Entity, domains: Sequence[str] | None = None) -> None:
        self.entity = entity
        self.key: Key = entity.key
        self.keys = entity.keys
        self.key_names = entity.key_names
        self.contract_version = registry.contract.version
        self.registry = registry
        self._specs = {spec.tile: spec for spec in tile_tables(registry).values()}
        self._topics = {topic.relation: topic for topic in registry.topics.values()}
        own = {
            domain.name: domain
            for domain in registry.contract.domains.values()
            if entity_of(registry, domain) == entity
        }
        if unknown := [name for name in domains or () if name not in own]:
            raise OfflineError(
                f"{entity.name} has no domain {unknown[0]}: name one of {', '.join(own) or '(it has none)'}"
            )
        self.left_out: dict[str, str] = {}
        self._domains: list[Domain] = []
        self._used: dict[str, _Used] = {}
        self._queries: dict[frozenset[str], str] = {}
        values: list[Feature] = []
        for domain in own.values():
            if domains is not None and domain.name not in domains:
                continue
            try:
                found = [
                    feature_of(domain.name, name, attribute)
                    for name, attribute in domain.attributes.items()
                    if name != LAST_EVENT_AT
                ]
                used = _Used()
                _Expansion(self, domain, "duckdb", used=used).view()
                # A sum or an element of decimals has their digits, a quotient of the macros has six.
                found = [
                    replace(
                        one,
                        **{
                            name: getattr(one, name).replace(_NUMBERS, f"decimal(28, {used.scale})")
                            for name in ("type", "cold_start")
                        },
                    )
                    for one in found
                ]
            except ViewNotPortable as error:
                if domains is not None:
                    raise
                self.left_out |= {
                    f"{domain.name}.{name}": str(error) for name in domain.attributes if name != LAST_EVENT_AT
                }
                continue
            self._domains.append(domain)
            self._used[domain.name] = used
            values += found
        self.domains = tuple(domain.name for domain in self._domains)
        self.values = tuple(values)
        check_unique_names(entity, self.values)

    @property
    def topics(self) -> Mapping[str, tuple[str, ...]]:
        """Return the topics whose events are read, with the fields of each that any domain needs, without the keys."""
        found: dict[str, set[str]] = {}
        for used in self._used.values():
            for name, fields in used.fields.items():
                found.setdefault(name, set()).update(fields)
        return {
            name: tuple(one.name for one in self.registry.topics[name].fields if one.name in fields)
            for name, fields in found.items()
        }

    def topics_of(self, domain: str) -> tuple[str, ...]:
        """Return the names of the topics whose events a domain is computed from."""
        return tuple(self._used[domain].fields)

    def days_of(self, domain: str, topic: str) -> int | None:
        """Return the days of the longest window in which a domain reads a topic by its time; None without a bound."""
        used = self._used[domain]
        if topic in used.unbounded:
            return None
        days = [used.events[topic]] if topic in used.events else []
        for tile, window in used.tiles.items():
            if topic in self._topics_behind(self.registry.query(tile)):
                query = next((one for one in self.tiles if one.spec.tile == tile), None)
                if query is None or not _is_day_of(query.day, query.topic.time):
                    return None
                days.append(window)
        return max(days, default=None)

    @cached_property
    def tiles(self) -> tuple[TileQuery, ...]:
        """Return the tiles that the domains read and whose stored rows can be used, in the registry's order."""
        read = {tile for used in self._used.values() for tile in used.tiles}
        found = (self._tile_query(spec) for tile, spec in self._specs.items() if tile in read)
        return tuple(one for one in found if one is not None)

    def columns_of(self, tile: TileQuery) -> tuple[str, ...]:
        """Return the columns of a tile that the domains read, and its totals; without the keys and the day."""
        read = {name for used in self._used.values() for name in used.tile_columns.get(tile.spec.tile, ())}
        return tuple(
            column.name
            for column in tile.spec.columns
            if column.name in read | tile.totals.keys()
            and column.name not in (*self.key_names, tile.spec.day)
        )

    def windows_of(self, tile: str) -> Mapping[str, int]:
        """Return the days of the longest window in which each domain reads a tile."""
        return {name: used.tiles[tile] for name, used in self._used.items() if tile in used.tiles}

    def sql(self, *, parted: Sequence[str] = ()) -> str:
        """Return a query for DuckDB with one row per point: `point`, every feature, `<domain>_last_event_at` of each.

        The last is in milliseconds since 1970, and NULL if the view has no row. `parted` are the tiles of which there
        are the table and its parts (`TileQuery`); others are computed from events.
        """
        stored = frozenset(parted)
        if stored not in self._queries:
            self._queries[stored] = self._query("duckdb", parted=stored, last_events=True).sql(
                dialect="duckdb"
            )
        return self._queries[stored]

    def training_sql(
        self,
        dialect: Dialect,
        labels: str,
        columns: Sequence[str],
        *,
        namespace: str,
        options: ServedOptions,
    ) -> str:
        """Return the values as served in another engine's SQL: all columns of the table `labels`, then all features.

        `labels` is `namespace.table` with `columns`, among them the entity's key and `label_time`, an instant. All
        values are computed from the typed events in `namespace`, of which the first delivery of each identity counts.
        Raises ViewNotPortable for a spread of a text key, whose hash the engines do not share.
        """
        spreads, happened = options.spreads, options.meaning == "happened"
        source = exp.to_table(labels).as_("l")
        numbered = exp.select(
            "l.*", exp.alias_(point_of(self.key_names, exp.column("label_time", "l")), "point")
        ).from_(source)
        points = exp.select(
            "l.point",
            *(f"l.{key}" for key in self.key_names),
            exp.alias_(exp.column("label_time", "l"), CLOCK),
        )
        for name in self.domains:
            moved: exp.Expr = exp.column("label_time", "l")
            if any(seconds for _, seconds in spreads.get(name, ())):
                moved = self._moved(moved, spreads[name], name)
            points = points.select(
                exp.alias_(moved.copy(), f"{name}_clock"), exp.alias_(utc_day(moved, dialect), f"{name}_day")
            )
        points = points.distinct()
        query = self._query(dialect, parted=frozenset(), last_events=False)
        topics = [self.registry.topic(name) for name in self.topics]
        events = [
            cte(topic.relation, self._first_deliveries(topic, namespace, happened=happened))
            for topic in topics
        ]
        ctes = query.args["with_"]
        ctes.set(
            "expressions",
            [
                cte("labels", numbered),
                cte("points", points.from_("labels as l")),
                *events,
                *ctes.expressions,
            ],
        )
        query = query.join("labels", on="labels.point = p.point")
        names = [exp.column(name, "labels", quoted=True) for name in columns]
        query.set("expressions", [*names, *query.expressions[1:]])
        return query.sql(dialect=dialect, pretty=True)

    def _first_deliveries(self, topic: TopicDeclaration, namespace: str, *, happened: bool) -> exp.Select:
        """Return the accepted events of a topic's table in the lake, which holds every delivery."""
        place = ("arrived_at", "source", "source_partition", "source_offset")
        number = exp.Window(
            this=exp.RowNumber(),
            partition_by=[exp.column(topic.identity)],
            order=exp.Order(expressions=[exp.Ordered(this=exp.column(name)) for name in place]),
        )
        columns = (*self.key_names, *self.topics[topic.name])
        known = exp.column(topic.time if happened and topic.time else "arrived_at")
        deliveries = exp.select(*columns, exp.alias_(known, KNOWN), exp.alias_(number, "delivery")).from_(
            exp.table_(topic.relation, db=namespace)
        )
        return exp.select(*columns, KNOWN).from_(deliveries.subquery("deliveries")).where("delivery = 1")

    def _moved(self, moment: exp.Expr, spreads: Sequence[tuple[datetime, int]], domain: str) -> exp.Expr:
        if self.key.type != "bigint":
            raise ViewNotPortable(
                f"{domain} was deployed with an expiry spread, which is a hash of {self.key.name} that other engines "
                "do not compute: build the training set here"
            )
        first, *later = spreads
        key = exp.column(self.key.name, "l")

        def part(seconds: int) -> exp.Expr:
            whole = exp.Mod(this=key.copy(), expression=exp.Literal.number(seconds))
            return exp.Abs(this=whole) if seconds else exp.Literal.number(0)

        seconds = exp.Case(default=part(first[1]))
        for since, found in reversed(later):
            condition = exp.GTE(
                this=moment.copy(), expression=exp.cast(exp.Literal.string(since.isoformat()), "timestamptz")
            )
            seconds = seconds.when(condition, part(found))
        if not later:
            return _minus_seconds(moment, part(first[1]))
        return _minus_seconds(moment, seconds)

    def _query(self, dialect: Dialect, *, parted: frozenset[str], last_events: bool) -> exp.Select:
        columns: list[exp.Expr] = [exp.column("point", "p")]
        for value in self.values:
            columns.append(
                exp.alias_(
                    sqlglot.parse_one(
                        f"coalesce(cast({_VIEW}{value.domain}.{value.name} as {value.type}), {value.cold_start})",
                        dialect="duckdb",
                    ),
                    value.name,
                )
            )
        if last_events:
            columns += [
                exp.alias_(exp.column(LAST_EVENT_AT, _VIEW + name), f"{name}_{LAST_EVENT_AT}")
                for name in self.domains
            ]
        query = exp.select(*columns).from_("points as p")
        for domain in self._domains:
            view = _Expansion(self, domain, dialect, parted).view()
            drop_columns(view, {"domain_key"} if last_events else {"domain_key", LAST_EVENT_AT})
            name = _VIEW + domain.name
            query = query.with_(name, as_=view).join(
                name, on=f"{name}.{self.key.name} = p.point", join_type="left"
            )
        return query

    def _topics_behind(self, text: str) -> set[str]:
        """Return the names of the topics that a query is computed from, through the views that it reads."""
        found: set[str] = set()
        for table in real_tables(parse_view("a view", text)):
            if topic := self._topics.get(table.name):
                found.add(topic.name)
            elif table.name in self.registry.queries:
                found |= self._topics_behind(self.registry.query(table.name))
        return found

    def _tile_query(self, spec: TileTable) -> TileQuery | None:
        select = final_select(parse_view(spec.tile, self.registry.query(spec.tile)))
        source, group = select.args.get("from_"), select.args.get("group")
        if source is None or not isinstance(source.this, exp.Table) or group is None:
            return None
        topic = self._topics.get(source.this.name)
        others = ("joins", "having", "qualify", "distinct", "limit", "offset", "with_", "windows")
        if topic is None or topic.keep != "first" or any(select.args.get(name) for name in others):
            return None
        if select.find(exp.Window, exp.CurrentTimestamp):
            return None
        projected = {one.alias_or_name: one.unalias() for one in select.expressions}
        if spec.day not in projected or not {column.name for column in spec.columns} <= projected.keys():
            return None
        day = _unqualified(projected[spec.day])
        grouped = [_unqualified(one) for one in group.expressions]
        needed = [day, *(exp.column(name) for name in self.key_names)]
        if not all(one in grouped for one in needed) or day.find(exp.AggFunc):
            return None
        filters: list[exp.Expr | None] = []
        totals: dict[str, exp.Expr] = {}
        for name, one in projected.items():
            if name not in spec.by_name or _unqualified(one) in grouped:
                continue
            if (added := _added_up(one)) is not None:
                totals[name] = one
                if isinstance(added, exp.Count):
                    filters.append(_counted(added))
        if not filters:
            return None
        uncounted = None
        if all(one is not None for one in filters):
            none = exp.not_(
                exp.or_(
                    *(
                        exp.Coalesce(this=exp.paren(one.copy()), expressions=[exp.false()])
                        for one in filters
                        if one is not None
                    )
                )
            )
            uncounted = exp.Filter(this=exp.Count(this=exp.Star()), expression=exp.Where(this=none))
        return TileQuery(spec, topic, select, day, totals, uncounted)


def choose_served(
    registry: Registry, entity: str | None, domains: Sequence[str] | None = None
) -> ServedFeatures:
    """Return the served values of the entity of this name, or of the only one with a domain.

    `domains` (names) limits them to these. Raises OfflineError if there is no such entity or domain, or several
    entities and none is named; ViewNotPortable if none of the attributes, or one of `domains`, can be computed.
    """
    features = ServedFeatures(registry, served_entity(registry, entity), domains)
    if not features.domains:
        raise ViewNotPortable(
            f"no attribute of {features.entity.name} can be computed as served: "
            f"{next(iter(features.left_out.values()))}"
        )
    return features


def served_entity(registry: Registry, entity: str | None) -> Entity:
    """Return the entity of this name, or the only one with a domain.

    Raises OfflineError if there is no such entity, or several and none is named.
    """
    having = list(dict.fromkeys(entity_of(registry, one).name for one in registry.contract.domains.values()))
    if entity is None and len(having) == 1:
        (entity,) = having
    if entity not in having:
        what = "the entity is not named" if entity is None else f"{entity} has no features"
        raise OfflineError(f"{what}: name one of {', '.join(having) or '(no entity has a domain)'}")
    return registry.entity(entity)


def real_tables(tree: exp.Expr) -> list[exp.Table]:
    """Return the references of a query to relations, without those to its CTEs, which may have the same names."""
    sources = [source for scope in traverse_scope(tree) for source in scope.sources.values()]
    found = {id(source): source for source in sources if isinstance(source, exp.Table)}
    return list(found.values())


class _Expansion:
    """Rewrites the view of one domain, with all views below it, to one over points."""

    def __init__(
        self,
        features: ServedFeatures,
        domain: Domain,
        dialect: Dialect,
        parted: frozenset[str] = frozenset(),
        used: _Used | None = None,
    ) -> None:
        self.features = features
        self.domain = domain
        self.dialect = dialect
        self.parted = parted
        self.used = used or _Used()
        self._views = 0

    def view(self) -> exp.Select:
        """Return the domain's view over points."""
        return self._expanded(self.domain.relation, (), windowed=False)

    def _expanded(self, relation: str, above: tuple[str, ...], *, windowed: bool) -> exp.Select:
        """Return a view's query over points; `windowed` says that its reader bounds its days."""
        features = self.features
        tree = parse_view(relation, features.registry.query(relation))
        key = features.key.name
        _check_portable(tree, relation)
        check_whole_keys(tree, relation, features.key_names)
        _check_key_is_only_passed_on(tree, relation, key)
        self._check_decimals(tree, relation)
        tables = real_tables(tree)
        self._views += 1
        _rename_ctes(tree, {id(table) for table in tables}, f"{self.domain.name}_{self._views}")
        for read in tile_reads(tree, relation, features._specs):
            table = read.select.args["from_"].this
            if read.spec.entity != features.entity:
                raise ViewNotPortable(
                    f"{relation} is about {features.entity.name} and reads {read.spec.tile}, whose rows are about "
                    f"{read.spec.entity.name}: read a tile of {features.entity.name}"
                )
            tables = [one for one in tables if one is not table]
            self.used.tiles[read.spec.tile] = max(read.days, self.used.tiles.get(read.spec.tile, 0))
            read.select.set("where", None)
            table.replace(self._tile_rows(read.spec, read.days, table, read.select, above))
        for table in tables:
            self._replace(table, relation, above, windowed=windowed)
        if left := tree.find(exp.CurrentTimestamp):
            raise ViewNotPortable(
                f"{relation} uses the present time in {_excerpt(left.parent or left)}, which is not a condition of a "
                "select that reads events: values of another time can be computed only if it compares an event's "
                "column with now() in the `where` of the select that reads the events"
            )
        _adapt(tree, relation, self.dialect)
        return tree

    def _replace(self, table: exp.Table, relation: str, above: tuple[str, ...], *, windowed: bool) -> None:
        features, name = self.features, table.name
        topic = features._topics.get(name)
        if topic is not None:
            if topic.keep != "first":
                raise ViewNotPortable(
                    f"{relation} reads {name}, reference data whose rows change in place (keep: last): values of "
                    "another time can be computed from events only"
                )
            if missing := [key for key in features.key_names if key not in topic.by_name]:
                raise ViewNotPortable(
                    f"{relation} reads {name}, whose rows are not those of one {features.entity.name} (it has no "
                    f"{missing[0]}): values of another time are computed for each key by itself"
                )
            if not windowed:
                days = _window_of(table, topic)
                if days is None:
                    self.used.unbounded.add(topic.name)
                else:
                    self.used.events[topic.name] = max(days, self.used.events.get(topic.name, 0))
            self._read_events(table, topic, relation)
            return
        if name in above or name == relation:
            raise ViewNotPortable(f"{relation} reads itself through {name}")
        if name not in features.registry.queries:
            raise ViewNotPortable(
                f"{relation} reads {name}, which is neither a topic's typed events nor a view of which the registry "
                "has the query: values of another time cannot be computed from it"
            )
        inner = self._expanded(name, (*above, relation), windowed=windowed)
        table.replace(inner.subquery(table.alias_or_name))

    def _read_events(self, table: exp.Table, topic: TopicDeclaration, relation: str) -> None:
        features, alias = self.features, table.alias_or_name
        select = table.find_ancestor(exp.Select)
        if select is None:
            raise ViewNotPortable(f"{relation} reads {topic.relation} outside a select")
        stars = [one for one in select.find_all(exp.Star) if isinstance(one.parent, exp.Select | exp.Column)]
        if any(one.find_ancestor(exp.Select) is select for one in stars):
            if [type(one) for one in select.expressions] != [exp.Star] or select.args.get("joins"):
                raise ViewNotPortable(f"{relation} reads {topic.relation} with `*`: name the columns")
            select.set("expressions", [exp.column(one.name) for one in topic.fields])
        self._clocks(select, alias)
        root = select.root()
        read = {column.name for column in root.find_all(exp.Column)}
        fields = [one.name for one in topic.fields if one.name in read and one.name not in features.key_names]
        self.used.fields.setdefault(topic.name, set()).update(fields)
        columns = [
            f"p.point as {features.key.name}",
            *(f"p.{name}" for name in features.key_names[1:]),
            *(f"e.{name}" for name in fields),
            f"p.{CLOCK}",
            f"p.{self.domain.name}_clock as {DAY_CLOCK}",
        ]
        conditions = [f"e.{key} = p.{key}" for key in features.key_names]
        joined = (
            exp.select(*columns)
            .from_("points as p")
            .join(
                exp.to_table(topic.relation).as_("e"),
                on=exp.and_(*conditions, f"e.{KNOWN} <= p.{CLOCK}"),
            )
        )
        table.replace(joined.subquery(alias))

    def _clocks(self, select: exp.Select, alias: str) -> None:
        """Replace the present time in the condition of a select of events by that of the point."""
        where = select.args.get("where")
        for clock in list(where.find_all(exp.CurrentTimestamp)) if where else ():
            if clock.find_ancestor(exp.Select) is select:
                moved = isinstance(clock.parent, exp.GT) and _is_end_of_day(clock.parent.this)
                clock.replace(exp.column(DAY_CLOCK if moved else CLOCK, alias))

    def _tile_rows(
        self, spec: TileTable, days: int, table: exp.Table, select: exp.Select, above: tuple[str, ...]
    ) -> exp.Subquery:
        """Return the rows of a tile in a window of each point, as a subquery with the table's alias."""
        features = self.features
        since = exp.cast(
            exp.DateSub(
                this=exp.column(f"{self.domain.name}_day"),
                expression=exp.Literal.number(days),
                unit=exp.var("DAY"),
            ),
            "date",
        )
        points = exp.select("*", exp.alias_(since, "since")).from_("points").subquery("p")
        key = features.key.name
        used = {column.name for column in select.find_all(exp.Column)}
        names = [one.name for one in spec.columns if one.name in used and one.name not in features.key_names]
        self.used.tile_columns.setdefault(spec.tile, set()).update(names)
        others = [f"p.{name}" for name in features.key_names[1:]]
        in_window = f"t.{spec.day} >= p.since"

        def rows(source: exp.Expr, conditions: Sequence[str], columns: Sequence[exp.Expr]) -> exp.Select:
            return (
                exp.select(f"p.point as {key}", *others, *columns)
                .from_(points.copy())
                .join(source, on=exp.and_(*conditions, in_window))
            )

        plain = [exp.column(name, "t") for name in names]
        if spec.tile in self.parted:
            stored = [
                exp.alias_(_instant(exp.column(name, "t"), spec.by_name[name].type), name) for name in names
            ]
            keyed = [f"t.{name} = p.{name}" for name in features.key_names]
            whole = rows(exp.to_table(spec.name).as_("t"), [*keyed, f"t.{KNOWN} <= p.{CLOCK}"], stored)
            parts = rows(exp.to_table(spec.name + PARTS).as_("t"), [f"t.{key} = p.point"], plain)
            found: exp.Query = exp.union(whole, parts, distinct=False)
        else:
            inner = self._expanded(spec.tile, above, windowed=True)
            found = rows(inner.subquery("t"), [f"t.{key} = p.point"], plain)
        return exp.Subquery(this=found, alias=exp.TableAlias(this=exp.to_identifier(table.alias_or_name)))

    def _check_decimals(self, tree: exp.Select, relation: str) -> None:
        """Note how many digits the decimals of a view have; refuse a quotient of them, computed in whole numbers."""
        scales: dict[str, int] = {}
        for name in (table.name for table in real_tables(tree)):
            if topic := self.features._topics.get(name):
                found = {one.name: one.scale or 0 for one in topic.fields if one.type == "decimal"}
            elif spec := self.features._specs.get(name):
                found = {
                    one.name: one.type.scale for one in spec.columns if isinstance(one.type, DecimalType)
                }
            else:
                found = {}
            scales |= found
        for column in tree.find_all(exp.Column):
            # A comparison with a decimal is exact; a quotient of one is not.
            compared = isinstance(column.find_ancestor(exp.Predicate, exp.Select), exp.Predicate)
            if column.name not in scales or compared:
                continue
            if tree.find(exp.Round):
                raise ViewNotPortable(
                    f"{relation} rounds, and reads {column.name}, a decimal: values of another time compute quotients "
                    "of whole numbers only; read a bigint column instead, e.g. seconds for minutes"
                )
            self.used.scale = max(self.used.scale, scales[column.name])


def _check_portable(tree: exp.Select, relation: str) -> None:
    """Refuse expressions that engines evaluate differently, and nested queries in expressions."""
    for node in tree.walk():
        known = isinstance(node, _PORTABLE)
        if isinstance(node, exp.Cast) and node.to.this not in _CASTS:
            known = node.find_ancestor(exp.Round, exp.Select) is not None and isinstance(
                node.find_ancestor(exp.Round, exp.Select), exp.Round
            )
        elif isinstance(node, exp.Div):
            known = isinstance(node.find_ancestor(exp.Round, exp.Select), exp.Round)
        elif isinstance(node, exp.Extract):
            known = _in_milliseconds(node) is not None
        elif isinstance(node, exp.Interval):
            known = isinstance(node.this, exp.Literal) and str(node.args.get("unit")).upper() in _UNITS
        elif isinstance(node, exp.AtTimeZone):
            known = node.args["zone"].name.upper() == "UTC"
        elif isinstance(node, exp.Subquery):
            known = isinstance(node.parent, exp.From | exp.Join)
        elif isinstance(node, exp.In):
            known = not node.args.get("query") and not node.args.get("unnest")
        elif isinstance(node, exp.Select) and (distinct := node.args.get("distinct")):
            known = distinct.args.get("on") is None
        if not known:
            raise ViewNotPortable(
                f"{relation} has {_excerpt(node)}, which other engines may compute differently or not for each key by "
                "itself: values of another time cannot be computed with it"
            )


def _check_key_is_only_passed_on(tree: exp.Select, relation: str, key: str) -> None:
    """Refuse a view that computes with its key, in whose place a label stands."""
    for column in tree.find_all(exp.Column):
        if column.name != key:
            continue
        node: exp.Expr = column
        if isinstance(node.parent, exp.Coalesce) and all(
            isinstance(one, exp.Column) and one.name == key
            for one in (node.parent.this, *node.parent.expressions)
        ):
            node = node.parent
        parent = node.parent
        passed = (
            isinstance(parent, exp.Select | exp.Group)
            or (isinstance(parent, exp.Alias) and parent.alias == key)
            or (isinstance(parent, exp.Window) and node.arg_key == "partition_by")
            or (isinstance(parent, exp.Is) and isinstance(parent.expression, exp.Null))
            or (
                isinstance(parent, exp.EQ)
                and all(
                    isinstance(side, exp.Column) and side.name == key
                    for side in (parent.this, parent.expression)
                )
            )
        )
        if not passed:
            raise ViewNotPortable(
                f"{relation} computes with the value of {key} in {_excerpt(parent or node)}: values of another time "
                "can only group, join and return it"
            )
    for select in tree.find_all(exp.Select):
        names = [one.alias_or_name for one in select.expressions]
        if select.args.get("distinct") and key not in names:
            raise ViewNotPortable(f"{relation} has a `distinct` without {key}: add the column")


def _rename_ctes(tree: exp.Select, real: set[int], prefix: str) -> None:
    """Give the CTEs of a view names of their own: engines without nested CTEs see those of all views at once."""
    names = {found.alias for found in tree.find_all(exp.CTE)}
    for table in tree.find_all(exp.Table):
        if table.name in names and id(table) not in real:
            table.set("alias", exp.TableAlias(this=exp.to_identifier(table.alias_or_name)))
            table.set("this", exp.to_identifier(f"{prefix}_{table.name}"))
    for found in tree.find_all(exp.CTE):
        found.set("alias", exp.TableAlias(this=exp.to_identifier(f"{prefix}_{found.alias}")))


def _adapt(tree: exp.Select, relation: str, dialect: Dialect) -> None:
    """Rewrite quotients, instants and ordered lists so that the dialect's engine computes them exactly, in place."""
    for quotient in list(tree.find_all(exp.Round)):
        quotient.replace(exact_quotient(quotient, relation, dialect))
    for extract in list(tree.find_all(exp.Extract)):
        whole = _in_milliseconds(extract)
        if whole is not None:
            moment = extract.expression.sql(dialect=dialect)
            found = sqlglot.parse_one(_MILLISECONDS[dialect].format(moment), dialect=dialect)
            whole.replace(exp.paren(found) if isinstance(whole.parent, exp.Binary) else found)
    if dialect == "duckdb":
        for zone in list(tree.find_all(exp.AtTimeZone)):
            zone.replace(exp.paren(zone.this.copy()))
        for kind in tree.find_all(exp.DataType):
            if kind.this == exp.DType.TIMESTAMPTZ:
                kind.set("this", exp.DType.TIMESTAMP)
        return
    for cast in list(tree.find_all(exp.Cast)):
        moment = cast.this.unnest()
        if cast.to.this == exp.DType.DATE and isinstance(moment, exp.AtTimeZone):
            cast.replace(utc_day(moment.this, dialect))
    if dialect == "spark":
        for aggregate in list(tree.find_all(exp.ArrayAgg)):
            if isinstance(aggregate.this, exp.Order):
                aggregate.replace(collected(aggregate.this))


# Microseconds → milliseconds, rounded half up like the engine. Trino has seconds as a double only, which tells
# microseconds apart until the year 2242.
_OF_SECONDS = "(cast(round(to_unixtime({}) * 1000000) as bigint) + 500) / 1000"
_MILLISECONDS: Mapping[Dialect, str] = {
    "duckdb": "(epoch_us({}) + 500) // 1000",
    "spark": "(unix_micros({}) + 500) div 1000",
    "trino": _OF_SECONDS,
    "athena": _OF_SECONDS,
}


def _in_milliseconds(extract: exp.Extract) -> exp.Cast | None:
    """Return the cast around `(extract(epoch from …) * 1000)::bigint`, None around another extract."""
    product = extract.parent
    cast = product.parent if isinstance(product, exp.Mul) else None
    while isinstance(cast, exp.Paren):
        cast = cast.parent
    fits = (
        extract.name.lower() == "epoch"
        and isinstance(product, exp.Mul)
        and product.expression.name == "1000"
        and isinstance(cast, exp.Cast)
        and cast.to.this == exp.DType.BIGINT
    )
    return cast if fits and isinstance(cast, exp.Cast) else None


def _is_end_of_day(node: exp.Expr) -> bool:
    """Return whether an expression is a day's end as the macro `within_window` writes it."""
    if not isinstance(node, exp.Add) or not isinstance(node.expression, exp.Interval):
        return False
    moment = node.this.unnest()
    return (
        str(node.expression.args.get("unit")).upper() in ("DAY", "DAYS")
        and isinstance(moment, exp.AtTimeZone)
        and isinstance(moment.this, exp.Cast)
        and moment.this.to.this == exp.DType.TIMESTAMP
    )


def _window_of(table: exp.Table, topic: TopicDeclaration) -> int | None:
    """Return the days of the window in which a select reads events by their UTC date; None without one."""
    select = table.find_ancestor(exp.Select)
    where = select.args.get("where") if select is not None else None
    for condition in (
        where.this.flatten() if where and isinstance(where.this, exp.And) else [where and where.this]
    ):
        if (
            isinstance(condition, exp.GT)
            and isinstance(condition.expression, exp.CurrentTimestamp)
            and _is_end_of_day(condition.this)
            and _is_day_of(condition.this.this.unnest().this.this, topic.time)
        ):
            # The filter is day + (N + 1) days > now, which keeps N whole days and today.
            return int(condition.this.expression.this.name) - 1
    return None


def _is_day_of(day: exp.Expr, time: str | None) -> bool:
    """Return whether an expression is the UTC date of this column, as the macro `utc_date` writes it."""
    moment = day.this.unnest() if isinstance(day, exp.Cast) else day
    return (
        isinstance(day, exp.Cast)
        and day.to.this == exp.DType.DATE
        and isinstance(moment, exp.AtTimeZone)
        and isinstance(moment.this, exp.Column)
        and moment.this.name == time
    )


def _added_up(node: exp.Expr) -> exp.Count | exp.Sum | None:
    """Return the count or sum that a tile's column is, None if its values do not add up over rows."""
    while isinstance(node, exp.Paren | exp.Cast):
        node = node.this
    if isinstance(node, exp.Coalesce) and len(node.expressions) == 1 and node.expressions[0].name == "0":
        node = node.this
    inner = node.this if isinstance(node, exp.Filter) else node
    if isinstance(inner, exp.Count | exp.Sum) and not isinstance(inner.this, exp.Distinct):
        return inner
    return None


def _counted(count: exp.Count) -> exp.Expr | None:
    """Return the condition of the events that a count includes, None if it includes all."""
    filtered = count.parent
    conditions: list[exp.Expr] = []
    if isinstance(filtered, exp.Filter):
        conditions.append(filtered.expression.this.copy())
    if not isinstance(count.this, exp.Star | exp.Literal):
        conditions.append(exp.not_(exp.Is(this=count.this.copy(), expression=exp.null())))
    return exp.and_(*conditions) if conditions else None


def _unqualified(node: exp.Expr) -> exp.Expr:
    copy = node.copy()
    for column in [copy] if isinstance(copy, exp.Column) else copy.find_all(exp.Column):
        column.set("table", None)
    return copy


def _instant(column: exp.Column, kind: IcebergType) -> exp.Expr:
    """Return a stored column of a tile as the views see it: its instants are microseconds since 1970."""
    return exp.func("make_timestamp", column) if isinstance(kind, TimestamptzType) else column


def _stored(kind: IcebergType) -> str:
    """Return DuckDB's type of a tile's column."""
    if isinstance(kind, TimestamptzType):
        return "timestamp"
    if isinstance(kind, StringType):
        return "varchar"
    return (
        f"decimal({kind.precision}, {kind.scale})" if isinstance(kind, DecimalType) else _SQL_TYPES[str(kind)]
    )


_SQL_TYPES = {"long": "bigint", "int": "integer", "date": "date", "boolean": "boolean"}


def _minus_seconds(moment: exp.Expr, seconds: exp.Expr) -> exp.Expr:
    second = exp.Interval(this=exp.Literal.string("1"), unit=exp.var("SECOND"))
    return exp.Sub(this=moment.copy(), expression=exp.Mul(this=exp.paren(seconds), expression=second))


def _excerpt(node: exp.Expr) -> str:
    text = node.sql(dialect="risingwave")
    return text if len(text) <= 80 else f"{text[:77]}…"
