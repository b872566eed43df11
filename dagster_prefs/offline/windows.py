"""What a rolling feature is, taken from the rolling views themselves: the SQL behind training sets and parity.

`views/` holds every domain's rolling view as dbt compiles it for the engine (`prefs contract build` writes it,
a test compares it), so windows, sums and rankings are said once, in the models. Here the same queries are
asked about other moments than now: `now()` becomes the day of a *point*, a viewer and a day that features are
wanted for, and a tile is read from its training table.

An N-day window of a day D is the tiles with day ≥ D - N. Serving leaves it open, so it holds what is known of
D itself; training ends it before D, because D is not over when its label is taken.

The local SQL reads the relations `points` (`point`, `viewer_id`, `day`, and `known_at` where versions count) and
the training tables by their names, in which instants are integers: microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import sqlglot
from sqlglot import exp

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.offline.catalog import OfflineError
from dagster_prefs.offline.duck import registered
from dagster_prefs.offline.tables import TILE_TABLES, VIEWER, TileTable
from dagster_prefs.online.contract import LAST_EVENT_AT, Attribute, load_contract

VIEWS = Path(__file__).with_name("views")

Mode = Literal["training", "serving"]
Dialect = Literal["duckdb", "trino", "spark", "athena"]

_NUMBERS = "decimal(28, 6)"
_TYPES = {
    "integer": "bigint",
    "decimal": _NUMBERS,
    "string": "varchar",
    "list<string>": "varchar[]",
    "list<decimal>": f"{_NUMBERS}[]",
}


class ViewNotPortable(OfflineError):
    """A rolling view says something that can be asked about now only."""


@dataclass(frozen=True)
class Feature:
    """One value of a domain of the contract.

    `type` and `cold_start`, what a viewer without history gets, are SQL of DuckDB.
    """

    name: str
    domain: str
    type: str
    cold_start: str


def _feature(domain: str, name: str, attribute: Attribute) -> Feature:
    if attribute.type not in _TYPES:
        raise ViewNotPortable(
            f"{domain}.{name} is a {attribute.type}, which has no exact equal in training data: make it a decimal"
        )
    empty = "null" if attribute.nullable else "[]" if attribute.type.startswith("list") else "0"
    return Feature(name, domain, _TYPES[attribute.type], f"cast({empty} as {_TYPES[attribute.type]})")


@dataclass(frozen=True)
class _Read:
    """A select of a view that reads a tile in a window of so many days."""

    select: exp.Select
    spec: TileTable
    days: int


def compile_views(project: Path, target: Path, relations: Sequence[str]) -> dict[str, str]:
    """Rolling view → text of its file in `views/`, compiled from the dbt project without an engine.

    `target` is dbt's scratch folder.

    Raises DbtError where a model does not compile, ViewNotPortable where one cannot be asked about other days.
    """
    nowhere = EngineConnection("127.0.0.1", 1, "any", "any", schema="any", kind="risingwave")
    # A spread moves a viewer's day, which a point has already.
    dbt = Dbt(nowhere, project, target, {"PREFS_EXPIRY_SPREAD_SECONDS": "0"})
    place = '"any"."any".'
    found = {}
    for relation, text in sorted(dbt.compiled(relations).items()):
        # Whatever could not be asked about other days is refused here, where the model is being changed.
        _at_points(_parse(relation, text), relation, "training", "duckdb", versions=False, namespace=None)
        found[relation] = (
            "-- Written by `prefs contract build` from the dbt model of this name; change that instead.\n"
            f"{text.replace(place, '')}\n"
        )
    return found


@cache
def features() -> tuple[Feature, ...]:
    """Every attribute of the contract but `last_event_at`, in the contract's order."""
    return tuple(
        _feature(domain.name, name, attribute)
        for domain in load_contract().domains.values()
        for name, attribute in domain.attributes.items()
        if name != LAST_EVENT_AT
    )


@cache
def domains() -> tuple[str, ...]:
    """Names of the domains, in the contract's order."""
    return tuple(domain.name for domain in load_contract().domains.values())


@cache
def sources() -> tuple[tuple[TileTable, tuple[str, ...]], ...]:
    """The training tables that features are made of, with the columns of each beside viewer, day and newest event."""
    found: dict[str, dict[str, None]] = {}
    for query, relation in _queries():
        for read in _reads(query, relation):
            columns = found.setdefault(read.spec.name, {})
            for column in read.select.find_all(exp.Column):
                if column.name not in (VIEWER, read.spec.day, LAST_EVENT_AT):
                    columns[column.name] = None
    return tuple((spec, tuple(found[name])) for name, spec in TILE_TABLES.items() if name in found)


@cache
def table_of(domain: str) -> TileTable:
    """The training table that a domain's features come from."""
    query, relation = next(found for name, found in zip(domains(), _queries(), strict=True) if name == domain)
    return next(_reads(query, relation)).spec


@cache
def longest_window() -> int:
    """Days of the longest window of any feature."""
    return max(read.days for query, relation in _queries() for read in _reads(query, relation))


def first_day(day: date) -> date:
    """The earliest day that any window of `day` holds."""
    return max(day, date.min + timedelta(days=longest_window())) - timedelta(days=longest_window())


def features_sql(mode: Mode, *, versions: bool = False, last_events: bool = False) -> str:
    """A query of DuckDB that returns one row per point: `point`, then every feature in the order of `features()`.

    With `last_events`, `<domain>_last_event_at` follows for every domain: the newest event in its longest window
    in milliseconds since 1970, NULL where the window is empty and the domain has no item.

    With `versions`, tiles carry `known_from` and `known_to` (epoch milliseconds), and a point sees only the
    version that was current at its `known_at`.
    """
    return _features(mode, "duckdb", versions=versions, last_events=last_events).sql(dialect="duckdb")


def load_tiles(
    session: duckdb.DuckDBPyConnection,
    spec: TileTable,
    columns: Sequence[str],
    batches: Iterable[pa.RecordBatch],
    *,
    where: str,
    versions: bool = False,
) -> None:
    """Make the relation of a training table that the local SQL reads, of those rows for which `where` holds.

    `batches` have viewer, day and `columns`, with `versions` also `known_from` and `known_to`. What reading them
    raises, this raises.
    """
    fields = [pa.field(VIEWER, pa.int64()), pa.field(spec.day, pa.date32())]
    fields += [pa.field(name, pa.string() if name == "genre" else pa.int64()) for name in columns]
    if versions:
        fields += [pa.field("known_from", pa.int64()), pa.field("known_to", pa.int64())]
    schema = pa.schema(fields)
    shaped = (
        pa.RecordBatch.from_arrays(
            [batch.column(field.name).cast(field.type) for field in schema], schema=schema
        )
        for batch in batches
    )
    with registered(session, "incoming", schema, shaped):
        session.execute(f"create table {spec.name} as from incoming where {where}")


def training_sql(dialect: Dialect, labels: str, columns: Sequence[str], *, namespace: str) -> str:
    """The point-in-time join in another engine's SQL: every column of the table `labels`, then every feature.

    `labels` is `namespace.table` with `columns`, among them `viewer_id` and `label_time`, an instant. A label of
    one UTC day sees the days before it, in the newest version of every tile.
    """
    # As whole days since 1970, because engines disagree about whose midnight a date of an instant means.
    seconds = (exp.UnixSeconds if dialect == "spark" else exp.TimeToUnix)(this=exp.column("label_time", "l"))
    number = exp.cast(exp.Floor(this=exp.Div(this=seconds, expression=exp.Literal.number(86_400))), "int")
    epoch = exp.cast(exp.Literal.string("1970-01-01"), "date")
    day = exp.cast(exp.DateAdd(this=epoch, expression=number, unit=exp.var("DAY")), "date")
    # Labels of one viewer and day see the same; numbering them instead would sort all of them in one place.
    point = exp.Concat(
        expressions=[
            exp.cast(exp.column(VIEWER, "l"), "varchar"),
            exp.Literal.string(" "),
            exp.cast(day, "varchar"),
        ],
        safe=True,
        coalesce=False,
    )
    source = exp.to_table(labels)
    source.set("alias", exp.TableAlias(this=exp.to_identifier("l")))
    numbered = exp.select("l.*", exp.alias_(point, "point")).from_(source)
    points = (
        exp.select("l.point", f"l.{VIEWER}", exp.alias_(day.copy(), "day")).distinct().from_("labels as l")
    )
    query = _features("training", dialect, namespace=namespace)
    ctes = query.args["with_"]
    ctes.set("expressions", [_cte("labels", numbered), _cte("points", points), *ctes.expressions])
    query = query.join("labels", on="labels.point = p.point")
    names = [exp.column(name, "labels", quoted=True) for name in columns]
    # Without the point, which is only how the rows find each other.
    query.set("expressions", [*names, *query.expressions[1:]])
    return query.sql(dialect=dialect, pretty=True)


def _cte(name: str, query: exp.Select) -> exp.CTE:
    return exp.CTE(this=query, alias=exp.TableAlias(this=exp.to_identifier(name)))


@cache
def _text(relation: str) -> str:
    _, _, text = (VIEWS / f"{relation}.sql").read_text(encoding="utf-8").partition("\n")
    return text


def _queries() -> Iterator[tuple[exp.Select, str]]:
    for domain in load_contract().domains.values():
        yield _parse(domain.relation, _text(domain.relation)), domain.relation


def _parse(relation: str, text: str) -> exp.Select:
    query = sqlglot.parse_one(text, dialect="risingwave")
    if not isinstance(query, exp.Select):
        raise ViewNotPortable(f"{relation} is no query: write it as one select")
    return query


def _reads(query: exp.Select, relation: str) -> Iterator[_Read]:
    """The selects of a view that read a tile, with the window that each is filtered by."""
    specs = {spec.tile: spec for spec in TILE_TABLES.values()}
    found = 0
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
                "parity cannot ask that about other days; read the tile in a CTE of its own with that macro alone"
            )
        found += 1
        # The filter is day + (N + 1) days > now, so that N whole days and today are left.
        yield _Read(select, spec, int(intervals[0].this.name) - 1)
    if not found:
        raise ViewNotPortable(f"{relation} reads no tile that is exported: read one of {', '.join(specs)}")


def _features(
    mode: Mode,
    dialect: Dialect,
    *,
    versions: bool = False,
    last_events: bool = False,
    namespace: str | None = None,
) -> exp.Select:
    columns: list[exp.Expr] = [exp.column("point", "p")]
    for feature in features():
        value = sqlglot.parse_one(
            f"coalesce(cast({feature.domain}.{feature.name} as {feature.type}), {feature.cold_start})",
            dialect="duckdb",
        )
        columns.append(exp.alias_(value, feature.name))
    if last_events:
        columns += [
            exp.alias_(exp.column(LAST_EVENT_AT, domain), f"{domain}_{LAST_EVENT_AT}") for domain in domains()
        ]
    query = exp.select(*columns).from_("points as p")
    for domain, (view, relation) in zip(domains(), _queries(), strict=True):
        _at_points(view, relation, mode, dialect, versions, namespace)
        _drop(view, {"domain_key"} if last_events else {"domain_key", LAST_EVENT_AT})
        _rename(view, domain)
        query = query.with_(domain, as_=view).join(domain, on=f"{domain}.point = p.point", join_type="left")
    return query


def _at_points(
    view: exp.Select, relation: str, mode: Mode, dialect: Dialect, versions: bool, namespace: str | None
) -> None:
    """Turn a view of now into one of points, in place: `viewer_id` becomes `point` throughout."""
    for read in list(_reads(view, relation)):
        select, spec = read.select, read.spec
        select.set("where", None)
        for column in list(select.find_all(exp.Column)):
            column.set("table", exp.to_identifier("p" if column.name == VIEWER else "t"))
        since = exp.DateSub(
            this=exp.column("day"), expression=exp.Literal.number(read.days), unit=exp.var("DAY")
        )
        # Beside the point rather than in the condition, which is asked for every pair.
        points = exp.select("*", exp.alias_(exp.cast(since, "date"), "since")).from_("points").subquery("p")
        conditions = [f"t.{VIEWER} = p.{VIEWER}", f"t.{spec.day} >= p.since"]
        if mode == "training":
            conditions.append(f"t.{spec.day} < p.day")
        if versions:
            conditions += ["t.known_from <= p.known_at", "p.known_at < t.known_to"]
        tile = exp.table_(spec.name, db=namespace, alias="t")
        select.set("from_", exp.From(this=points))
        select.set("joins", [exp.Join(this=tile, on=exp.and_(*conditions))])
    for column in view.find_all(exp.Column):
        if column.name == VIEWER and not _inside_join(column):
            column.set("this", exp.to_identifier("point"))
    for quotient in list(view.find_all(exp.Round)):
        quotient.replace(_exact(quotient, relation, dialect))
    for cast in list(view.find_all(exp.Cast)):
        moment = cast.this.find(exp.Extract)
        if moment is not None:
            # Microseconds → milliseconds, half up as the engine rounds.
            cast.replace(sqlglot.parse_one(f"({moment.expression.sql()} + 500) // 1000", dialect="duckdb"))
    if dialect == "spark":
        for aggregate in list(view.find_all(exp.ArrayAgg)):
            order = aggregate.this
            if isinstance(order, exp.Order):
                aggregate.replace(_collected(order))


def _rename(view: exp.Select, domain: str) -> None:
    """Give the CTEs of a view names of its own: engines without nested ones see those of all views at once."""
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


def _exact(node: exp.Round, relation: str, dialect: Dialect) -> exp.Expr:
    """The quotient of two integers, rounded half up to 6 places exactly; NULL where the denominator is 0.

    In integers, because a division of decimals is one of floats in DuckDB and rounds as it likes elsewhere.
    """
    quotient = node.this
    if not isinstance(quotient, exp.Div) or node.args["decimals"].name != "6":
        raise ViewNotPortable(f"{relation} rounds {quotient.sql()}: use the macros minutes or ratio")
    top, bottom = (_integer(side) for side in (quotient.this, quotient.expression))
    if dialect == "duckdb":
        whole = f"(2000000 * cast({top} as hugeint) + {bottom}) // nullif(2 * cast({bottom} as hugeint), 0)"
    else:
        # A difference that divides without rest: exact whether the engine divides integers, decimals or doubles.
        over, under = f"(2000000 * {top} + {bottom})", f"(2 * {bottom})"
        whole = f"({over} - {over} % nullif({under}, 0)) / nullif({under}, 0)"
    return sqlglot.parse_one(
        f"cast(cast({whole} as decimal(28, 0)) * 0.000001 as {_NUMBERS})", dialect="duckdb"
    )


def _integer(side: exp.Expr) -> str:
    """A side of a quotient without what makes the engine divide decimals."""
    while isinstance(side, exp.Paren | exp.Cast):
        side = side.this
    if isinstance(side, exp.Literal):
        return str(int(float(side.name)))
    return f"({side.sql(dialect='duckdb')})"


def _collected(order: exp.Order) -> exp.Expr:
    """Spark's aggregate of a list knows no order: pairs are sorted and taken apart again."""
    place = order.expressions[0].this.sql(dialect="spark")
    pairs = f"collect_list(struct({place} as place, {order.this.sql(dialect='spark')} as value))"
    return sqlglot.parse_one(f"transform(array_sort({pairs}), x -> x.value)", dialect="spark")


def _drop(view: exp.Select, names: set[str]) -> None:
    for select in view.find_all(exp.Select):
        kept = [column for column in select.expressions if column.alias_or_name not in names]
        select.set("expressions", kept)
