"""Derives rolling features from the rolling views themselves: the SQL behind training sets and parity.

The registry holds every domain's rolling view as dbt compiles it for the engine, so windows, sums and rankings are
written once, in the models. Here the same queries are evaluated at other moments than now: `now()` becomes the day of a
*point* (a subject and the day for which its features are wanted), and a tile is read from its training table.

An N-day window of a day D is the tiles with day ≥ D - N. Serving has no upper bound, so it includes what is known of D
itself. Training ends the window before D, because D is not over when its label is taken.

The local SQL reads the relations `points` (`point`, the entity's key, `day`, and `known_at` if versions matter) and the
training tables by their names, in which instants are integers: microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import pyarrow as pa
import sqlglot
from pyiceberg.types import DateType, DecimalType, IcebergType, StringType
from sqlglot import exp

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Attribute, Domain
from dagster_prefs.declarations.registry import Entity, Key, Registry
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.tables import TileTable, tile_tables

if TYPE_CHECKING:
    import duckdb

Mode = Literal["training", "serving"]
Dialect = Literal["duckdb", "trino", "spark", "athena"]

# Names that the training SQL uses itself.
_TAKEN = frozenset({"points", "labels", "p", "t", "l"})
_NUMBERS = "decimal(28, 6)"
_TYPES = {
    "integer": "bigint",
    "decimal": _NUMBERS,
    "string": "varchar",
    "list<string>": "varchar[]",
    "list<decimal>": f"{_NUMBERS}[]",
    "list<integer>": "bigint[]",
}


class ViewNotPortable(OfflineError):
    """A rolling view contains an expression that can only be evaluated for the present time."""


@dataclass(frozen=True)
class Feature:
    """One value of a domain of the contract.

    `type` and `cold_start` (the value of a subject without history) are DuckDB's SQL.
    """

    name: str
    domain: str
    type: str
    cold_start: str


def feature_of(domain: str, name: str, attribute: Attribute) -> Feature:
    """Return an attribute as a value of training sets. Raises ViewNotPortable for a type that is not exact."""
    if attribute.type not in _TYPES:
        raise ViewNotPortable(
            f"{domain}.{name} is a {attribute.type}, which training data cannot represent exactly: make it a decimal"
        )
    empty = "null" if attribute.nullable else "[]" if attribute.is_list else "0"
    return Feature(name, domain, _TYPES[attribute.type], f"cast({empty} as {_TYPES[attribute.type]})")


class FeatureSet(Protocol):
    """The values of one entity, whatever they promise."""

    @property
    def entity(self) -> Entity: ...

    @property
    def key(self) -> Key: ...

    @property
    def keys(self) -> tuple[Key, ...]: ...

    @property
    def key_names(self) -> tuple[str, ...]: ...

    @property
    def values(self) -> tuple[Feature, ...]: ...


@dataclass(frozen=True)
class TileRead:
    """A select of a view that reads a tile in a window of this many days."""

    select: exp.Select
    spec: TileTable
    days: int


def check_unique_names(entity: Entity, values: Sequence[Feature]) -> None:
    """Raise ViewNotPortable if two of an entity's values have one name."""
    named = [value.name for value in values]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ViewNotPortable(
            f"two domains of {entity.name} have the attribute {twice[0]}, and a training set has one column of a "
            "name: rename one"
        )


def relations_read(view: exp.Expr) -> dict[str, None]:
    """Return the names of the relations that a view reads, without its CTEs, in order of appearance."""
    ctes = {cte.alias for cte in view.find_all(exp.CTE)}
    return dict.fromkeys(table.name for table in view.find_all(exp.Table) if table.name not in ctes)


def features_by_entity(registry: Registry) -> dict[str, Features]:
    """Map entities to their features, for every entity with a domain that reads tiles, in the registry's order."""
    served = {entity_of(registry, domain).name for domain in registry.contract.domains.values()}
    found = {name: Features(registry, entity) for name, entity in registry.entities.items() if name in served}
    return {name: features for name, features in found.items() if features.domains}


def entity_of(registry: Registry, domain: Domain) -> Entity:
    """Return the entity of a domain's items."""
    return registry.entity(domain.entity)


def choose_features(registry: Registry, entity: str | None) -> Features:
    """Return the features of the entity of this name, or of the only one with a domain.

    Raises OfflineError if there is no such entity, or several and none is named.
    """
    found = features_by_entity(registry)
    if entity is None and len(found) == 1:
        return next(iter(found.values()))
    if entity not in found:
        what = "the entity is not named" if entity is None else f"{entity} has no features"
        raise OfflineError(f"{what}: name one of {', '.join(found) or '(no entity has a domain)'}")
    return found[entity]


class Features:
    """The served values of one entity, and the SQL that computes them from the training tables.

    `domains` are the names of its domains that read tiles, and `values` their attributes except `last_event_at`, in the
    contract's order. `left_out` names the attributes (`domain.attribute`) that training sets and parity cannot compute,
    each with the reason: they depend on relations that are not exported.

    Raises ViewNotPortable for a view that can only be evaluated for the present time, and for ambiguous names.
    """

    def __init__(self, registry: Registry, entity: Entity) -> None:
        self.registry = registry
        self.entity = entity
        # The first key column, whose day moves if expiry is spread, and all key columns.
        self.key: Key = entity.key
        self.keys = entity.keys
        self.key_names = entity.key_names
        self.contract_version = registry.contract.version
        self._tables = tile_tables(registry)
        self._by_tile = {spec.tile: spec for spec in self._tables.values()}
        self._windows: Mapping[str, int] = registry.variables.get("windows", {})
        self._domains: list[Domain] = []
        self.left_out: dict[str, str] = {}
        self._views: dict[str, exp.Select] = {}
        values: list[Feature] = []
        for domain in registry.contract.domains.values():
            if entity_of(registry, domain) != entity:
                continue
            parsed = parse_view(domain.relation, registry.query(domain.relation))
            if instead := self._read_instead_of_tiles(parsed):
                why = f"it is computed from {instead}, which is not exported"
                self.left_out |= {
                    f"{domain.name}.{name}": why for name in domain.attributes if name != LAST_EVENT_AT
                }
                continue
            self._domains.append(domain)
            if domain.name in _TAKEN or domain.name in self._tables:
                raise ViewNotPortable(
                    f"the domain {domain.name} has the name of a relation of the training SQL: rename it"
                )
            view, unknown = self._portable(domain, parsed)
            self.left_out |= {f"{domain.name}.{name}": why for name, why in unknown.items()}
            self._views[domain.name] = view
            values += [
                feature_of(domain.name, name, attribute)
                for name, attribute in domain.attributes.items()
                if name != LAST_EVENT_AT and name not in unknown
            ]
        self.domains = tuple(domain.name for domain in self._domains)
        self.values = tuple(values)
        check_unique_names(entity, self.values)
        if self._domains:
            # Views that cannot be evaluated for other days are rejected here.
            self._query("training", "duckdb")

    @cached_property
    def sources(self) -> tuple[tuple[TileTable, tuple[str, ...]], ...]:
        """Return the training tables of the features, with the columns of each except key, day and newest event."""
        found: dict[str, dict[str, None]] = {}
        for domain in self._domains:
            for read in self._reads(self._view(domain.name), domain.relation):
                columns = found.setdefault(read.spec.name, {})
                for column in read.select.find_all(exp.Column):
                    if column.name not in (*self.key_names, read.spec.day, LAST_EVENT_AT):
                        columns[column.name] = None
        return tuple((spec, tuple(found[name])) for name, spec in self._tables.items() if name in found)

    def table_of(self, domain: str) -> TileTable:
        """Return the training table of a domain's features; if there are several, the one that is read first."""
        relation = next(found.relation for found in self._domains if found.name == domain)
        return next(self._reads(self._view(domain), relation)).spec

    def windows_of(self, domain: str) -> tuple[int, ...]:
        """Return the days of each window in which a domain reads tiles, ascending; empty if it reads none."""
        return tuple(
            sorted(
                {
                    read.days
                    for found in self._domains
                    if found.name == domain
                    for read in self._reads(self._view(domain), found.relation)
                }
            )
        )

    @cached_property
    def longest_window(self) -> int:
        """Return the number of days of the longest window of any feature."""
        return max(
            read.days
            for domain in self._domains
            for read in self._reads(self._view(domain.name), domain.relation)
        )

    def first_day(self, day: date) -> date:
        """Return the earliest day that any window of `day` contains."""
        longest = timedelta(days=self.longest_window)
        return max(day, date.min + longest) - longest

    def sql(self, mode: Mode, *, versions: bool = False, last_events: bool = False) -> str:
        """Return a query for DuckDB with one row per point: `point`, then every feature in the order of `values`.

        With `last_events`, `<domain>_last_event_at` follows for every domain: the newest event in its longest window,
        in milliseconds since 1970, NULL if the window is empty and the domain has no item.

        With `versions`, tiles carry `known_from` and `known_to` (epoch milliseconds), and a point sees only the version
        that was current at its `known_at`.
        """
        return self._query(mode, "duckdb", versions=versions, last_events=last_events).sql(dialect="duckdb")

    def training_sql(self, dialect: Dialect, labels: str, columns: Sequence[str], *, namespace: str) -> str:
        """Return the point-in-time join in another engine's SQL: all columns of the table `labels`, then all features.

        `labels` is `namespace.table` with `columns`, among them the entity's key and `label_time`, an instant. A label
        of one UTC day sees the days before it, in the newest version of every tile.
        """
        day = utc_day(exp.column("label_time", "l"), dialect)
        source = exp.to_table(labels)
        source.set("alias", exp.TableAlias(this=exp.to_identifier("l")))
        numbered = exp.select("l.*", exp.alias_(point_of(self.key_names, day), "point")).from_(source)
        keys = [f"l.{key}" for key in self.key_names]
        points = exp.select("l.point", *keys, exp.alias_(day.copy(), "day")).distinct()
        query = self._query("training", dialect, namespace=namespace)
        ctes = query.args["with_"]
        ctes.set(
            "expressions",
            [cte("labels", numbered), cte("points", points.from_("labels as l")), *ctes.expressions],
        )
        query = query.join("labels", on="labels.point = p.point")
        names = [exp.column(name, "labels", quoted=True) for name in columns]
        # Without the point, which only joins the rows to each other.
        query.set("expressions", [*names, *query.expressions[1:]])
        return query.sql(dialect=dialect, pretty=True)

    def _query(
        self,
        mode: Mode,
        dialect: Dialect,
        *,
        versions: bool = False,
        last_events: bool = False,
        namespace: str | None = None,
    ) -> exp.Select:
        columns: list[exp.Expr] = [exp.column("point", "p")]
        for value in self.values:
            served = sqlglot.parse_one(
                f"coalesce(cast({value.domain}.{value.name} as {value.type}), {value.cold_start})",
                dialect="duckdb",
            )
            columns.append(exp.alias_(served, value.name))
        if last_events:
            columns += [
                exp.alias_(exp.column(LAST_EVENT_AT, name), f"{name}_{LAST_EVENT_AT}")
                for name in self.domains
            ]
        query = exp.select(*columns).from_("points as p")
        for domain in self._domains:
            view, name = self._view(domain.name), domain.name
            self._at_points(view, domain.relation, mode, dialect, versions, namespace)
            drop_columns(view, {"domain_key"} if last_events else {"domain_key", LAST_EVENT_AT})
            _rename(view, name)
            query = query.with_(name, as_=view).join(name, on=f"{name}.point = p.point", join_type="left")
        return query

    def _view(self, domain: str) -> exp.Select:
        """Return a copy of a domain's view, to be changed."""
        return self._views[domain].copy()

    def _read_instead_of_tiles(self, view: exp.Select) -> str:
        """Return the relations that a domain's view reads if none of them is a tile; empty if one is."""
        read = relations_read(view)
        return "" if self._by_tile.keys() & read.keys() else ", ".join(read)

    def _portable(self, domain: Domain, view: exp.Select) -> tuple[exp.Select, dict[str, str]]:
        """Return a domain's view without the attributes that are not computed from tiles, and those with the reason."""
        unknown = _without_others(view, domain.relation, set(self._by_tile))
        if len(self.keys) > 1:
            check_whole_keys(view, domain.relation, self.key_names)
        reads = list(self._reads(view, domain.relation))
        for read in reads:
            if read.spec.entity != self.entity:
                raise ViewNotPortable(
                    f"{domain.relation} is about {self.entity.name} and reads {read.spec.tile}, whose rows are about "
                    f"{read.spec.entity.name}: read a tile of {self.entity.name}"
                )
            if self._windows and read.days not in self._windows.values():
                windows = ", ".join(f"{name}={days}" for name, days in self._windows.items())
                raise ViewNotPortable(
                    f"{domain.relation} reads {read.spec.tile} in a window of {read.days} days, and the project's "
                    f"windows are {windows}: run `prefs generate`, or add this window to the project's"
                )
            decimals = [
                column.name
                for column in read.select.find_all(exp.Column)
                if isinstance(getattr(read.spec.by_name.get(column.name), "type", None), DecimalType)
            ]
            if decimals and view.find(exp.Round):
                raise ViewNotPortable(
                    f"{domain.relation} rounds, and reads {read.spec.tile}.{decimals[0]}, a decimal: training sets "
                    "compute quotients of whole numbers only; read a bigint column instead, e.g. seconds for minutes"
                )
        return view, unknown

    def _reads(self, query: exp.Select, relation: str) -> Iterator[TileRead]:
        """Return the selects of a view that read a tile, with the window of each.

        Raises ViewNotPortable if there is none.
        """
        reads = list(tile_reads(query, relation, self._by_tile))
        if not reads:
            raise ViewNotPortable(
                f"{relation} does not read a tile on its own: read one of {', '.join(self._by_tile)} in a CTE of "
                "its own, from the tile alone and with within_window(…)"
            )
        yield from reads

    def _at_points(
        self,
        view: exp.Select,
        relation: str,
        mode: Mode,
        dialect: Dialect,
        versions: bool,
        namespace: str | None,
    ) -> None:
        """Rewrite a view of the present time to one of points, in place: the first key becomes `point` throughout.

        The other columns of a composite key stay, as those of the point.
        """
        for read in list(self._reads(view, relation)):
            select, spec = read.select, read.spec
            select.set("where", None)
            for column in list(select.find_all(exp.Column)):
                column.set("table", exp.to_identifier("p" if column.name in self.key_names else "t"))
            since = exp.DateSub(
                this=exp.column("day"), expression=exp.Literal.number(read.days), unit=exp.var("DAY")
            )
            # Computed with the point rather than in the condition, which is evaluated for every pair.
            points = (
                exp.select("*", exp.alias_(exp.cast(since, "date"), "since")).from_("points").subquery("p")
            )
            conditions = [*(f"t.{key} = p.{key}" for key in self.key_names), f"t.{spec.day} >= p.since"]
            if mode == "training":
                conditions.append(f"t.{spec.day} < p.day")
            if versions:
                conditions += ["t.known_from <= p.known_at", "p.known_at < t.known_to"]
            tile = exp.table_(spec.name, db=namespace, alias="t")
            select.set("from_", exp.From(this=points))
            select.set("joins", [exp.Join(this=tile, on=exp.and_(*conditions))])
        for column in view.find_all(exp.Column):
            if column.name == self.key.name and not _inside_join(column):
                column.set("this", exp.to_identifier("point"))
        _in_dialect(view, relation, dialect)


def tile_reads(query: exp.Select, relation: str, specs: Mapping[str, TileTable]) -> Iterator[TileRead]:
    """Yield the selects of a view that read a tile, with the window of each; `specs` are the tiles by relation.

    Raises ViewNotPortable for a read in another way than with `within_window` alone.
    """
    for select in query.find_all(exp.Select):
        tables = [table.name for table in select.find_all(exp.Table) if table.name in specs]
        source = select.args.get("from_")
        if (
            not tables
            or source is None
            or not isinstance(source.this, exp.Table)
            or source.this.name not in specs
        ):
            continue
        spec = specs[source.this.name]
        where = select.args.get("where")
        condition = where.this if where else None
        intervals = list(condition.find_all(exp.Interval)) if condition else []
        if (
            select.args.get("joins")
            or not isinstance(condition, exp.GT)
            or {column.name for column in condition.find_all(exp.Column)} != {spec.day}
            or list(condition.expression.find_all(exp.Column))
            or len(intervals) != 1
            or str(intervals[0].args.get("unit")).upper() not in ("DAY", "DAYS")
        ):
            raise ViewNotPortable(
                f"{relation} reads {spec.tile} with another condition than within_window(…): training sets and "
                "parity cannot compute it for other days: read the tile in a CTE of its own with that macro alone"
            )
        # The filter is day + (N + 1) days > now, which keeps N whole days and today.
        days = int(intervals[0].this.name) - 1
        if days < 1:
            raise ViewNotPortable(
                f"{relation} reads {spec.tile} in a window of {days} days: a window must have at least 1 day"
            )
        if unknown := [c.name for c in select.find_all(exp.Column) if c.name not in spec.by_name]:
            raise ViewNotPortable(
                f"{relation} reads {spec.tile}.{unknown[0]}, which the tile does not declare (it has "
                f"{', '.join(spec.by_name)}): declare it, so that it is exported"
            )
        yield TileRead(select, spec, days)


def load_tiles(
    session: duckdb.DuckDBPyConnection,
    spec: TileTable,
    columns: Sequence[str],
    batches: Iterable[pa.RecordBatch],
    *,
    where: str,
    versions: bool = False,
) -> None:
    """Create the relation of a training table for the local SQL, with the rows for which `where` holds.

    `batches` have the entity's keys, the day and `columns`; with `versions` also `known_from` and `known_to`. Raises
    what reading the batches raises.
    """
    names = (*spec.entity.key_names, spec.day, *columns)
    fields = [pa.field(name, _loaded(spec.by_name[name].type)) for name in names]
    if versions:
        fields += [pa.field("known_from", pa.int64()), pa.field("known_to", pa.int64())]
    schema = pa.schema(fields)
    shaped = (
        pa.RecordBatch.from_arrays(
            [batch.column(field.name).cast(field.type) for field in schema], schema=schema
        )
        for batch in batches
    )
    # Who only asks for windows does not need DuckDB.
    from dagster_prefs.iceberg.duck import registered

    with registered(session, "incoming", schema, shaped):
        session.execute(f"create table {spec.name} as from incoming where {where}")


def utc_day(moment: exp.Expr, dialect: Dialect) -> exp.Expr:
    """Return the UTC date of an instant in another engine's SQL."""
    # As whole days since 1970, because engines disagree on the time zone of a conversion from instant to date.
    seconds = (exp.UnixSeconds if dialect == "spark" else exp.TimeToUnix)(this=moment.copy())
    number = exp.cast(exp.Floor(this=exp.Div(this=seconds, expression=exp.Literal.number(86_400))), "int")
    epoch = exp.cast(exp.Literal.string("1970-01-01"), "date")
    return exp.cast(exp.DateAdd(this=epoch, expression=number, unit=exp.var("DAY")), "date")


def point_of(keys: Sequence[str], moment: exp.Expr) -> exp.Expr:
    """Return the text that names a label's key and moment: labels of one key and moment share their features.

    Numbering the labels instead would sort all of them in one place.
    """
    parts: list[exp.Expr] = [exp.cast(exp.column(key, "l"), "varchar") for key in keys]
    if len(parts) > 1:
        # Encoded as in a sort key, so that no two keys yield the same text.
        parts = [
            sqlglot.parse_one(f"replace(replace({part.sql()}, '%', '%25'), '#', '%23')") for part in parts
        ]
    separated = [piece for part in parts for piece in (exp.Literal.string("#"), part)][1:]
    return exp.Concat(
        expressions=[*separated, exp.Literal.string(" "), exp.cast(moment.copy(), "varchar")],
        safe=True,
        coalesce=False,
    )


def spread_part(key: Key, seconds: str) -> str:
    """Return DuckDB's SQL of the seconds by which a key's day begins later, like the macro `expiry_spread`.

    `seconds` is SQL of the spread, which must not be 0.
    """
    # For other than integer keys the macro uses row_hash, which is this expression.
    number = key.name if key.type == "bigint" else f"cast('0x' || left(md5({key.name}), 15) as bigint)"
    return f"abs({number} % {seconds})"


def cte(name: str, query: exp.Select) -> exp.CTE:
    """Return a named query for a `with`."""
    return exp.CTE(this=query, alias=exp.TableAlias(this=exp.to_identifier(name)))


def parse_view(relation: str, text: str) -> exp.Select:
    """Parse the compiled SQL of a relation. Raises ViewNotPortable unless it is one select."""
    query = sqlglot.parse_one(text, dialect="risingwave")
    if not isinstance(query, exp.Select):
        raise ViewNotPortable(f"{relation} is no query: write it as one select")
    return query


def _in_dialect(view: exp.Select, relation: str, dialect: Dialect) -> None:
    """Rewrite quotients, instants and ordered lists so that the dialect's engine computes them exactly."""
    for quotient in list(view.find_all(exp.Round)):
        quotient.replace(exact_quotient(quotient, relation, dialect))
    for cast in list(view.find_all(exp.Cast)):
        moment = cast.this.find(exp.Extract)
        if moment is not None:
            # Microseconds → milliseconds, rounded half up like the engine.
            cast.replace(sqlglot.parse_one(f"({moment.expression.sql()} + 500) // 1000", dialect="duckdb"))
    if dialect == "spark":
        for aggregate in list(view.find_all(exp.ArrayAgg)):
            order = aggregate.this
            if isinstance(order, exp.Order):
                aggregate.replace(collected(order))


def _rename(view: exp.Select, domain: str) -> None:
    """Give the CTEs of a view unique names: engines without nested CTEs see those of all views at once."""
    names = {cte.alias for cte in view.ctes}
    for cte in view.ctes:
        cte.set("alias", exp.TableAlias(this=exp.to_identifier(f"{domain}_{cte.alias}")))
    for table in view.find_all(exp.Table):
        if table.name in names:
            table.set("alias", exp.TableAlias(this=exp.to_identifier(table.alias_or_name)))
            table.set("this", exp.to_identifier(f"{domain}_{table.name}"))


def _inside_join(column: exp.Column) -> bool:
    join = column.find_ancestor(exp.Join, exp.Select)
    return isinstance(join, exp.Join) and column.table in ("t", "p")


def exact_quotient(node: exp.Round, relation: str, dialect: Dialect) -> exp.Expr:
    """Return the quotient of two integers, rounded half up to 6 places exactly; NULL if the denominator is 0.

    Computed in integers, because DuckDB divides decimals as floats, whose rounding is not defined.
    """
    quotient = node.this
    places = node.args.get("decimals")
    if not isinstance(quotient, exp.Div) or places is None or places.name != "6":
        raise ViewNotPortable(f"{relation} rounds {quotient.sql()}: use the macros minutes or ratio")
    top, bottom = (_integer(side) for side in (quotient.this, quotient.expression))
    if dialect == "duckdb":
        whole = f"(2000000 * cast({top} as hugeint) + {bottom}) // nullif(2 * cast({bottom} as hugeint), 0)"
    else:
        # The difference divides without a remainder: exact whether the engine divides integers, decimals or doubles.
        over, under = f"(2000000 * {top} + {bottom})", f"(2 * {bottom})"
        whole = f"({over} - {over} % nullif({under}, 0)) / nullif({under}, 0)"
    return sqlglot.parse_one(
        f"cast(cast({whole} as decimal(28, 0)) * 0.000001 as {_NUMBERS})", dialect="duckdb"
    )


def _integer(side: exp.Expr) -> str:
    """Return a side of a quotient without the casts that make the engine divide decimals."""
    while isinstance(side, exp.Paren | exp.Cast):
        side = side.this
    if isinstance(side, exp.Literal):
        return str(int(float(side.name)))
    return f"({side.sql(dialect='duckdb')})"


def collected(order: exp.Order) -> exp.Expr:
    """Rewrite an ordered list for Spark, whose aggregate has no order: rows are sorted by a comparison, and unpacked.

    NULLs come as in the engines: last, and first where the order descends.
    """
    keys, cases = [], []
    for number, one in enumerate(order.expressions):
        keys.append(f"{one.this.sql(dialect='spark')} as k{number}")
        a, b = f"a.k{number}", f"b.k{number}"
        if one.args.get("desc"):
            a, b = b, a
        cases.append(
            f"when {a} < {b} or ({a} is not null and {b} is null) then -1 "
            f"when {a} > {b} or ({a} is null and {b} is not null) then 1"
        )
    rows = f"collect_list(struct({', '.join(keys)}, {order.this.sql(dialect='spark')} as value))"
    sorting = f"array_sort({rows}, (a, b) -> case {' '.join(cases)} else 0 end)"
    return sqlglot.parse_one(f"transform({sorting}, x -> x.value)", dialect="spark")


def _loaded(kind: IcebergType) -> pa.DataType:
    """Return the type in which a column of a tile is joined: text stays text, instants are microseconds since 1970."""
    if isinstance(kind, StringType):
        return pa.string()
    if isinstance(kind, DateType):
        return pa.date32()
    return pa.decimal128(kind.precision, kind.scale) if isinstance(kind, DecimalType) else pa.int64()


def _without_others(view: exp.Select, relation: str, tiles: set[str]) -> dict[str, str]:
    """Remove from a view, in place, what it joins to tiles from other relations; return attribute → reason.

    Only a left join can be removed without changing the set of rows.
    """
    names = {cte.alias for cte in view.ctes}
    final = final_select(view)
    others: dict[str, str] = {}
    for cte in view.ctes:
        if cte.this is final:
            continue
        for table in cte.this.find_all(exp.Table):
            other = others.get(table.name) if table.name in names else table.name
            if other is not None and other not in tiles:
                others[cte.alias] = other
    removed: dict[str, str] = {}
    joins = []
    for join in final.args.get("joins") or ():
        name = join.this.name
        other = others.get(name) if name in names else None if name in tiles else name
        if other is None:
            joins.append(join)
        elif join.side.upper() != "LEFT":
            raise ViewNotPortable(
                f"{relation} has rows only where {other} has some, which is not exported: training sets and parity "
                f"do not have them: use a left join, or export a tile with the columns that are read from {other}"
            )
        else:
            removed[join.this.alias_or_name] = other
    if not removed:
        return {}
    final.set("joins", joins)
    view.args["with_"].set("expressions", [cte for cte in view.ctes if cte.alias not in others])
    unknown: dict[str, str] = {}
    for column in list(final.expressions):
        found = [removed[part.table] for part in column.find_all(exp.Column) if part.table in removed]
        if found:
            unknown[column.alias_or_name] = f"it is computed from {found[0]}, which is not exported"
    final.set("expressions", [column for column in final.expressions if column.alias_or_name not in unknown])
    # Not the attributes of its CTEs, if the select is the view itself.
    own = [column for column in final.find_all(exp.Column) if column.find_ancestor(exp.Select) is final]
    left = [column.table for column in own if column.table in removed]
    bare = [column.name for column in own if not column.table]
    if left or bare or LAST_EVENT_AT in unknown:
        what = removed[left[0]] if left else next(iter(removed.values()))
        raise ViewNotPortable(
            f"{relation} joins {what}, which is not exported, and its rows or its {LAST_EVENT_AT} depend on it, or a "
            "column is written without its table: compute the other attributes from tiles alone"
        )
    return unknown


def check_whole_keys(view: exp.Select, relation: str, keys: tuple[str, ...]) -> None:
    """Reject a view that groups, ranks or joins by a part of a composite key.

    A point is one whole key, so that a total over the other parts would cover this part only.
    """
    for select in view.find_all(exp.Select):
        group = select.args.get("group")
        aggregates = any(
            found.find_ancestor(exp.Select) is select and not isinstance(found.parent, exp.Window)
            for found in select.find_all(exp.AggFunc)
        )
        places: list[tuple[str, list[exp.Expr]]] = (
            [("groups", [group] if group else [])] if aggregates else []
        )
        places += [("ranks", window.args.get("partition_by") or []) for window in select.find_all(exp.Window)]
        places += [
            ("joins", [join.args["on"]] if join.args.get("on") else list(join.args.get("using") or ()))
            for join in select.args.get("joins") or ()
        ]
        for what, found in places:
            named = {part.name for one in found for part in one.find_all(exp.Column, exp.Identifier)}
            if missing := [key for key in keys if key not in named]:
                raise ViewNotPortable(
                    f"{relation} {what} without {missing[0]}, a part of the key ({', '.join(keys)}): a training "
                    "set computes each key by itself: use all parts, or declare a domain of another entity"
                )


def final_select(view: exp.Select) -> exp.Select:
    """Return the select that defines a view's columns: `select * from` a CTE is that CTE."""
    selects = {cte.alias: cte.this for cte in view.ctes}
    found = view
    while (
        [type(column) for column in found.expressions] == [exp.Star]
        and isinstance(found.args["from_"].this, exp.Table)
        and isinstance(selects.get(found.args["from_"].this.name), exp.Select)
    ):
        found = selects[found.args["from_"].this.name]
    return found


def drop_columns(view: exp.Select, names: set[str]) -> None:
    """Remove the columns of these names from every select of a view, in place."""
    for select in view.find_all(exp.Select):
        kept = [column for column in select.expressions if column.alias_or_name not in names]
        select.set("expressions", kept)
